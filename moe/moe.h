/* moe.h: everything that is plain C (C11 and C++14): version, statuses, faults, types, shapes,
   random numbers, and the descriptors of gate, route, grouped GEMMs, block-sparse product,
   layers and expert parallelism. */
#ifndef MOE_MOE_H
#define MOE_MOE_H

#include "base/config.h"
#include "base/random.h"
#include "base/types.h"
#include "block_layer/desc.h"
#include "block_sparse/desc.h"
#include "ep/layer_desc.h"
#include "ep/profile.h"
#include "ep/survive.h"
#include "faults.h"
#include "fields.h"
#include "gate/desc.h"
#include "gemm/desc.h"
#include "gemm/k_desc.h"
#include "layer/desc.h"
#include "layout.h"
#include "route/desc.h"

#endif
