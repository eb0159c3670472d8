/* ref.h: all references: every station in plain C, in float and in double, written to be read and
   to be compared with. C11 and C++14; no CUDA, no threads, no optimisation.

   The tests take the results of the _f64 functions on the same rounded inputs as exact. */
#ifndef MOE_REF_REF_H
#define MOE_REF_REF_H

#include "balance.h"
#include "block_layer.h"
#include "block_sparse.h"
#include "combine.h"
#include "combine_backward.h"
#include "exchange.h"
#include "experts.h"
#include "experts_backward.h"
#include "gate.h"
#include "gate_backward.h"
#include "gate_rules.h"
#include "gemm.h"
#include "gemm_gradient.h"
#include "k_gemm.h"
#include "layer.h"
#include "permute.h"
#include "real.h"
#include "route.h"
#include "router.h"
#include "router_backward.h"

#endif
