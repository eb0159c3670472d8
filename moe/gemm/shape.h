/* shape.h: the shape of a tensor-core tile. C11 and C++14.

   Functions take the shape by value. In the stamped kernels all members are literals once the calls
   are inlined, so that accumulators stay in registers and loops unroll. */
#ifndef MOE_GEMM_SHAPE_H
#define MOE_GEMM_SHAPE_H

#include "../base/types.h"

typedef struct moe_gemm_shape {
    int32_t tile_m, tile_n, tile_k; /* m and n of a tile, depths of a step; multiples of 16 */
    int32_t warps_m, warps_n;       /* warps along m and along n */
    int32_t stages;                 /* of the ring: 2 or more, grouped GEMMs 3; 1: no ring */
    int32_t dtype;                  /* of A and B: MOE_FP16 or MOE_BF16 */
    int32_t a_major, b_major;       /* MOE_MAJOR_K or MOE_MAJOR_MN */
    int32_t wm, wn, threads;        /* m and n of a warp tile, with WMMA at most 64; threads of a
                                       block, with wgmma all warpgroups' */
    int32_t terms;                  /* 1; or 2, 3: B is a sum of `terms` matrices, and a stage has
                                       the tile of each (router/bf16_split.cuh) */
} moe_gemm_shape;

/* The first six arguments of moe_gemm_shape_of. A pass of copies has 32 rows (threads * 8 /
   tile_k). */
#define MOE_GEMM_SHAPE_128x256 128, 256, 64, 2, 4, 3
#define MOE_GEMM_SHAPE_128x128 128, 128, 32, 2, 2, 3
#define MOE_GEMM_SHAPE_32x128 32, 128, 64, 2, 4, 3
#define MOE_GEMM_SHAPE_64x64 64, 64, 32, 2, 2, 3

/* Initializes a shape in a table: the arguments of moe_gemm_shape_of; _TERMS: terms before them. */
#define MOEI_SHAPE_INIT(...) MOEI_SHAPE_INIT_(1, __VA_ARGS__)
#define MOEI_SHAPE_INIT_TERMS(...) MOEI_SHAPE_INIT_(__VA_ARGS__)
#define MOEI_SHAPE_INIT_(terms, tile_m, tile_n, tile_k, warps_m, warps_n, stages, dtype, a_major,  \
                         b_major)                                                                  \
    {                                                                                              \
        tile_m, tile_n, tile_k, warps_m, warps_n, stages, dtype, a_major, b_major,                 \
            (tile_m) / (warps_m), (tile_n) / (warps_n), (warps_m) * (warps_n)*32, terms            \
    }

/* Returns a shape: moe_gemm_shape_of(MOE_GEMM_SHAPE_64x64, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K). */
MOE_HOST_DEVICE moe_gemm_shape moe_gemm_shape_of(int tile_m, int tile_n, int tile_k, int warps_m,
                                                 int warps_n, int stages, int dtype, int a_major,
                                                 int b_major)
{
    moe_gemm_shape f;
    f.tile_m = tile_m, f.tile_n = tile_n, f.tile_k = tile_k;
    f.warps_m = warps_m, f.warps_n = warps_n, f.stages = stages;
    f.dtype = dtype, f.a_major = a_major, f.b_major = b_major;
    f.wm = tile_m / warps_m, f.wn = tile_n / warps_n, f.threads = warps_m * warps_n * 32;
    f.terms = 1;
    return f;
}

/* Returns f with other majors. */
MOE_HOST_DEVICE moe_gemm_shape moei_shape_with(moe_gemm_shape f, int a_major, int b_major)
{
    f.a_major = a_major, f.b_major = b_major;
    return f;
}

/* Returns f with B as a sum of `terms` matrices. */
MOE_HOST_DEVICE moe_gemm_shape moei_shape_terms(moe_gemm_shape f, int terms)
{
    f.terms = terms;
    return f;
}

/* Returns the elements of a stage: A's tile, then one tile of B for each term. */
MOE_HOST_DEVICE int moei_stage_elems(const moe_gemm_shape f)
{
    return (f.tile_m + f.terms * f.tile_n) * f.tile_k;
}

/* Returns the bytes of the ring of stages. */
MOE_HOST_DEVICE size_t moei_ring_bytes(const moe_gemm_shape f)
{
    return (size_t)f.stages * 2 * (size_t)moei_stage_elems(f);
}

/* Return the size of the staging, 16 rows of fp32 for each warp: pitch and floats of one warp's
   part, bytes of a block's. */
MOE_HOST_DEVICE int moei_staging_pitch(int wn) { return wn + 8; } /* floats between rows */
MOE_HOST_DEVICE int moei_staging_floats(int wn) { return 16 * moei_staging_pitch(wn); }
MOE_HOST_DEVICE size_t moei_staging_bytes(const moe_gemm_shape f)
{
    return (size_t)f.threads / 32 * (size_t)moei_staging_floats(f.wn) * 4;
}

/* moei_ring_bytes and moei_staging_bytes of a MOE_GEMM_SHAPE_* as constants, for a table. */
#define MOEI_RING_BYTES(terms, ...) MOEI_RING_BYTES_(terms, __VA_ARGS__)
#define MOEI_RING_BYTES_(terms, tile_m, tile_n, tile_k, warps_m, warps_n, stages)                  \
    (2 * (stages) * ((tile_m) + (terms) * (tile_n)) * (tile_k))
#define MOEI_STAGING_BYTES(...) MOEI_STAGING_BYTES_(__VA_ARGS__)
#define MOEI_STAGING_BYTES_(tile_m, tile_n, tile_k, warps_m, warps_n, stages)                      \
    (4 * 16 * (warps_m) * ((tile_n) + 8 * (warps_n)))

#endif
