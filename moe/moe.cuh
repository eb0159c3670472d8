/* moe.cuh: every station. Include one station's header instead to compile less. */
#ifndef MOE_MOE_CUH
#define MOE_MOE_CUH

#include "block_layer.cuh"
#include "combine_scatter.cuh"
#include "layer.cuh"
#include "moe.h"
#include "permute.cuh"

#endif
