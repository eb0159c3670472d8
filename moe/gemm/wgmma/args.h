/* args.h: the kernels' argument of the grouped GEMM on Hopper (wgmma). C11 and C++14. */
#ifndef MOE_GEMM_WGMMA_ARGS_H
#define MOE_GEMM_WGMMA_ARGS_H

#include "../args.h"

/* A matrix in global memory as tensor copies see it, encoded by map.cuh: 128 opaque bytes
   (CUtensorMap), on a 64-byte boundary where a kernel reads them. */
typedef struct moei_tensor_map {
    uint64_t word[16];
} moei_tensor_map;

/* Boxes are the parts that one tensor copy moves: 64 depths (128 bytes) of so many rows. */
typedef struct moei_wgmma_args {
    moei_tensor_map a;       /* [a_rows, k], boxes of 64 rows; unused where rows are gathered */
    moei_tensor_map b[2];    /* [E, n, k], boxes of 128 rows: gates and ups; not gated: B twice */
    moe_grouped_gemm_args d; /* the product */
    int32_t* ticket;         /* [1] 0 at the start: number of pairs of tiles that clusters have
                                taken beyond their first; null: cluster i takes pairs i, i +
                                clusters, ... */
    uint64_t unused[7];      /* a launch copies whole 64-byte units */
} moei_wgmma_args;

/* The parameter of the kernels: tensor maps stand on a 64-byte boundary there. */
#if defined(__CUDACC__)
typedef struct alignas(64) moei_wgmma_param {
#else
typedef struct moei_wgmma_param {
#endif
    moei_wgmma_args a;
} moei_wgmma_param;

/* The variant's shape (gemm/shape.h): a consumer warp has 16 x 256 of a tile. */
#define MOEI_WGMMA_SHAPE(dtype, a_major, b_major)                                                  \
    {                                                                                              \
        128, 256, 64, 8, 1, 4, dtype, a_major, b_major, 16, 256, 384, 1                            \
    }

#endif
