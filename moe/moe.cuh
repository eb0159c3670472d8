/* moe.cuh: every station of a layer. Include one station's header instead to compile less. Products
   for gradients stand apart: gemm/grouped_gradient.cuh, gemm/k_grouped.cuh. */
#ifndef MOE_MOE_CUH
#define MOE_MOE_CUH

#include "block_layer.cuh"
#include "combine_scatter.cuh"
#include "ep/barrier.cuh"
#include "ep/layer.cuh"
#include "layer.cuh"
#include "moe.h"
#include "permute.cuh"

#endif
