/* moe.cuh: every station. Include one station's header instead to compile less. */
#ifndef MOE_MOE_CUH
#define MOE_MOE_CUH

#include "block_layer.cuh"
#include "combine_scatter.cuh"
#include "layer.cuh"
#include "moe.h"
#include "permute.cuh"

/* Loads every station's kernels now, before anything spins on the GPU: a first launch under lazy
   loading synchronises. Each station's header has the same for its own; a file that includes
   gemm/k_grouped.cuh as well calls moe_k_grouped_gemm_preload. */
MOE_HOST moe_status moe_preload(void)
{
    MOE_TRY(moe_layer_preload());
    MOE_TRY(moe_permute_preload());
    MOE_TRY(moe_combine_scatter_preload());
    return moe_block_layer_preload();
}

#endif
