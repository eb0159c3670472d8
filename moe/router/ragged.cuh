/* ragged.cuh: the product of x and a router of one 16-bit dtype, for any number of experts and any
   stride of logits. gemm/grouped.cuh does not accept E of 60, 1 or 100, for example. Called by
   router.cuh.

   Computes the tile of gemm/tile.cuh with padding: weights past expert E - 1 are zeros in shared
   memory, and their products are not stored. The kernel reads nothing past the operands, writes
   nothing between rows of logits, and takes no workspace. Each logit is one sum in ascending h, 16
   depths at a time: its bits do not depend on the tile, on E, or on T.

   A block computes one tile. After the last step the staging reuses the memory of the ring.

   Requires sm_75 for fp16, sm_80 for bf16; H a multiple of 8; x, the weights and the rows of both
   16-byte aligned. */
#ifndef MOE_ROUTER_RAGGED_CUH
#define MOE_ROUTER_RAGGED_CUH

#include "../base/check.h"
#include "../fields.h"
#include "../gemm/grouped.cuh"
#include "store.cuh"

/* tile; as MOE_GEMM_SHAPE_*: rows, experts, tile_k, warps along rows and experts, stages; least
   thread blocks a multiprocessor. Either tile takes less shared memory than the 64 KB of sm_75. */
#define MOEI_RAGGED_LIST(X, ...)                                                                  \
    X(wide, 128, 128, 32, 2, 2, 3, 2, __VA_ARGS__)                                                \
    X(narrow, 64, 64, 64, 2, 4, 3, 2, __VA_ARGS__)

/* Computes one tile by one block. All threads of the block call it. Blocks of the same rows of x
   have successive numbers and share these rows in L2. */
MOE_DEVICE_BODY void moei_ragged_block(const moe_grouped_gemm_args* d, unsigned char* shared,
                                       const moe_gemm_shape f)
{
    const int columns = (d->n + f.tile_n - 1) / f.tile_n;
    const int warp_m = moe_warp() % f.warps_m, warp_n = moe_warp() / f.warps_m;
    const moei_logits to = {(float*)d->c.base, d->c.stride, d->num_rows, d->n};
    uint16_t* const ring = (uint16_t*)shared;
    moei_mma_c acc[4][4];
    moe_tile_position t;
    t.expert = t.begin = 0;
    t.end = d->num_rows;
    t.row = (int)(blockIdx.x / (unsigned)columns) * f.tile_m;
    t.column = (int)(blockIdx.x % (unsigned)columns);
    moei_tile_sum(acc, d, t, ring, f);
    __syncthreads(); /* every warp has read the ring: the staging may overwrite it */
    moei_router_store(to, acc, (float*)ring + moe_warp() * moei_staging_floats(f.wn),
                      (int64_t)t.row + warp_m * f.wm, t.column * f.tile_n + warp_n * f.wn, f.wm,
                      f.wn);
}

#define MOEI_RAGGED_SHAPE(...) moe_gemm_shape_of(__VA_ARGS__, MOE_MAJOR_K, MOE_MAJOR_K)
#define MOEI_RAGGED_LEAST(dtype) ((dtype) == MOE_BF16 ? 80 : 75)

#define MOEI_RAGGED_KERNEL(name, tile_m, tile_n, tile_k, warps_m, warps_n, stages, blocks, half,   \
                           dtype)                                                                  \
    MOE_KERNEL((warps_m) * (warps_n)*32, blocks)                                                   \
    moei_router_ragged_##name##_##half(MOE_ARG(moe_grouped_gemm_args) d)                           \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (MOEI_CODE_HERE(MOEI_RAGGED_LEAST(dtype), MOEI_CODE_ANY) &&                             \
            !moe_fault_stopped(d.fault))                                                           \
            moei_ragged_block(                                                                     \
                &d, shared,                                                                        \
                MOEI_RAGGED_SHAPE(tile_m, tile_n, tile_k, warps_m, warps_n, stages, dtype));       \
    }
MOEI_RAGGED_LIST(MOEI_RAGGED_KERNEL, f16, MOE_FP16)
MOEI_RAGGED_LIST(MOEI_RAGGED_KERNEL, bf16, MOE_BF16)
#undef MOEI_RAGGED_KERNEL

/* moei_variant.tile of the ragged variants. */
enum { MOEI_RAGGED_TILE_wide, MOEI_RAGGED_TILE_narrow };

static const moei_variant moei_ragged_variants[] = {
#define MOEI_RAGGED_ROW(name, tile_m, tile_n, tile_k, warps_m, warps_n, stages, blocks, half,      \
                        dtype)                                                                     \
    {(const void*)moei_router_ragged_##name##_##half,                                              \
     "moei_router_ragged_" #name "_" #half,                                                        \
     MOE_GEMM_PATH_WMMA,                                                                           \
     MOEI_VARIANT_ANY_ROWS,                                                                        \
     1,                                                                                            \
     MOEI_SHAPE_INIT(tile_m, tile_n, tile_k, warps_m, warps_n, stages, dtype, MOE_MAJOR_K,         \
                     MOE_MAJOR_K),                                                                 \
     MOEI_RAGGED_TILE_##name,                                                                      \
     blocks,                                                                                       \
     MOEI_RING_BYTES(1, tile_m, tile_n, tile_k, warps_m, warps_n, stages),                         \
     MOEI_RAGGED_LEAST(dtype),                                                                     \
     MOEI_CODE_ANY},
    MOEI_RAGGED_LIST(MOEI_RAGGED_ROW, f16, MOE_FP16)
    MOEI_RAGGED_LIST(MOEI_RAGGED_ROW, bf16, MOE_BF16)
#undef MOEI_RAGGED_ROW
    MOEI_VARIANT_END};

/* Returns the grid size. */
MOE_HOST int64_t moei_ragged_blocks(const moe_grouped_gemm_desc* d, const moei_variant* v)
{
    const int64_t tile_m = v->shape.tile_m, tile_n = v->shape.tile_n;
    return ((d->num_rows + tile_m - 1) / tile_m) * ((d->n + tile_n - 1) / tile_n);
}

/* Sets *chosen to the variant for a product; to null where the operands do not fit or the current
   device or this binary cannot run it. Requires a, b.base, c, dtype, n, k, num_rows and all strides
   of d; fills in the other defaults. The wide tile reads x half as often; it is faster where every
   multiprocessor has one, and taken with batch_invariant. */
MOE_HOST moe_status moei_ragged_choose(moe_grouped_gemm_desc* d, const moei_variant** chosen)
{
    const moei_variant* v = moei_variant_find(moei_ragged_variants, MOEI_RAGGED_TILE_wide, d->dtype,
                                              MOE_MAJOR_K, MOE_MAJOR_K);
    moe_device dev;
    int runs;
    *chosen = 0;
    d->activation = MOE_ACTIVATION_NONE;
    d->a_major = d->b.major = MOE_MAJOR_K;
    d->row_div = 1;
    d->a_rows = d->num_rows;
    if (d->k % 8 != 0 || d->a_stride % 8 != 0 || d->b.row_stride % 8 != 0 ||
        !moei_aligned(d->a, 16) || !moei_aligned(d->b.base, 16) || d->num_rows > MOE_GEMM_MAX_ROWS)
        return MOE_OK;
    MOE_TRY(moe_device_query(&dev));
    if (!MOE_ON_HOST && d->dtype == MOE_BF16 && dev.major < 8) return MOE_OK;
    MOE_TRY(moei_variant_runs(v, &dev, 0, &runs));
    if (!runs) return MOE_OK;
    if (d->n <= 64 || (!d->batch_invariant && moei_ragged_blocks(d, v) < dev.sms))
        v = moei_variant_find(moei_ragged_variants, MOEI_RAGGED_TILE_narrow, d->dtype, MOE_MAJOR_K,
                              MOE_MAJOR_K);
    if (moei_ragged_blocks(d, v) <= 0x7fffffff) *chosen = v;
    return MOE_OK;
}

/* Prepares the launch of variant v. */
MOE_HOST moe_status moei_ragged_prepare(moe_launch* l, const moe_grouped_gemm_desc* d,
                                        const moei_variant* v)
{
    return moei_variant_prepare(l, v, moei_ragged_blocks(d, v), 0);
}

#endif
