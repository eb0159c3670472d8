/* moe.cuh: every station. Include one station's header instead to compile less. */
#ifndef MOE_MOE_CUH
#define MOE_MOE_CUH

#include "block_layer.cuh"
#include "combine_scatter.cuh"
#include "layer.cuh"
#include "moe.h"
#include "permute.cuh"

/* Loads every kernel of this translation unit now, before anything spins on the GPU: a first launch
   under lazy loading synchronises. Each station's header has the same for its own. */
MOE_HOST moe_status moe_preload(void)
{
    MOEI_TRY(moe_layer_preload());
    MOEI_TRY(moe_permute_preload());
    MOEI_TRY(moe_combine_scatter_preload());
    return moe_block_layer_preload();
}

#endif
