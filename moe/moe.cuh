/* moe.cuh: every station of a layer, forward, and the block-sparse layer forms. Include one station's
   header instead to compile less. What trains stands apart, for it compiles as long again:
   layer_backward.cuh (with those of experts, gate and router), ep/layer_backward.cuh,
   combine_backward.cuh, balance_loss.cuh. */
#ifndef MOE_MOE_CUH
#define MOE_MOE_CUH

#include "block_layer.cuh"
#include "combine_scatter.cuh"
#include "ep/barrier.cuh"
#include "ep/hosts.cuh"
#include "ep/incomplete.cuh"
#include "ep/layer.cuh"
#include "ep/profile.cuh"
#include "layer.cuh"
#include "moe.h"
#include "permute.cuh"

#endif
