/* moe.cuh: every station of a layer. Include one station's header instead to compile less. What
   trains with tensor cores stands apart, for it compiles as long again: layer_backward.cuh, and its
   experts_backward.cuh and router_backward.cuh. */
#ifndef MOE_MOE_CUH
#define MOE_MOE_CUH

#include "balance_loss.cuh"
#include "block_layer.cuh"
#include "combine_backward.cuh"
#include "combine_scatter.cuh"
#include "ep/barrier.cuh"
#include "ep/layer.cuh"
#include "gate_backward.cuh"
#include "layer.cuh"
#include "moe.h"
#include "permute.cuh"

#endif
