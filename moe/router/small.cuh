/* small.cuh: the tile of few tokens: a block makes 32 rows of x times 16 experts.

   Its 8 warps take turns with the steps of H, 64 deep each, and share nothing before the sums,
   which are added up in the order of the warps. The next step's x and weights come into registers
   while this one's are multiplied. */
#ifndef MOE_ROUTER_SMALL_CUH
#define MOE_ROUTER_SMALL_CUH

#include "../base/copy.cuh"
#include "../base/warp.cuh"
#include "../gemm/mainloop.cuh"
#include "split.cuh"

/* As MOE_GEMM_SHAPE_*: rows of x, experts, depth of one warp's step; a warp has the whole tile. */
#define MOEI_SPLIT_SMALL 32, 16, 64, 1, 1, 1
#define MOEI_SPLIT_SMALL_WARPS 8

/* Shared memory of a block, bytes: a stage for each warp; the sums take less. */
#define MOEI_SPLIT_SMEM_small(x_dtype)                                                             \
    (MOEI_SPLIT_SMALL_WARPS * MOEI_RING_BYTES(MOE_ROUTER_SPLIT_TERMS, MOEI_SPLIT_SMALL))

#define MOEI_SPLIT_SMALL_OUT 20 /* pitch of the sums: 16 and some */

/* What a lane of the small tile holds of a step: of x a piece of every 4th row, of the weights 4
   neighbours of every 2nd. */
MOE_DEVICE void moei_split_small_load(const moei_router_args* d, uint4* x, uint4* w, int64_t t0,
                                      int e0, int k, const int x_dtype, const moe_gemm_shape f)
{
    const int xk = k + (moei_lane() & 7) * 8, wk = k + (moei_lane() & 15) * 4;
    MOEI_UNROLL
    for (int i = 0; i < moei_split_tokens(f.tm, x_dtype) / 4; ++i) {
        const int r = (moei_lane() >> 3) + i * 4;
        x[i] = make_uint4(0, 0, 0, 0);
        if (t0 + r < d->num_tokens && xk < d->hidden)
            x[i] = moei_load16((const uint16_t*)d->x + (t0 + r) * d->x_stride + xk);
    }
    MOEI_UNROLL
    for (int i = 0; i < f.tn / 2; ++i) {
        const int r = (moei_lane() >> 4) + i * 2;
        w[i] = make_uint4(0, 0, 0, 0);
        if (e0 + r < d->num_experts && wk < d->hidden)
            w[i] = moei_load16((const float*)d->w + (e0 + r) * d->w_stride + wk);
    }
}

/* Stores it in the warp's stage, split; of an fp16 x the lower parts in the tile's lower half. */
MOE_DEVICE void moei_split_small_store(uint16_t* stage, const uint4* x, const uint4* w,
                                       const int x_dtype, const moe_gemm_shape f)
{
    const int xk = (moei_lane() & 7) * 8, wk = (moei_lane() & 15) * 4;
    MOEI_UNROLL
    for (int i = 0; i < moei_split_tokens(f.tm, x_dtype) / 4; ++i) {
        uint16_t* to = stage + moei_swizzled((moei_lane() >> 3) + i * 4, xk, f.tk);
        uint4 hi = x[i], lo;
        if (x_dtype == MOE_FP16) {
            moei_split_x(&hi, &lo, x[i]);
            moei_store16(to + f.tm / 2 * f.tk, lo);
        }
        moei_store16(to, hi);
    }
    stage += f.tm * f.tk;
    MOEI_UNROLL
    for (int i = 0; i < f.tn / 2; ++i) {
        uint2 term[3];
        moei_split4(term, w[i], f.terms);
        MOEI_UNROLL
        for (int j = 0; j < f.terms; ++j)
            *(uint2*)(stage + j * f.tn * f.tk +
                      moei_swizzled((moei_lane() >> 4) + i * 2, wk, f.tk)) = term[j];
    }
}

/* One block makes one tile; its warps take turns with the steps of H and share nothing before the
   sums. x_dtype and f are literals. */
MOE_DEVICE_BODY void moei_split_small(const moei_router_args* d, unsigned char* shared,
                                      const int x_dtype, const moe_gemm_shape f)
{
    const int warps = MOEI_SPLIT_SMALL_WARPS, stride = warps * f.tk;
    const int tokens = moei_split_tokens(f.tm, x_dtype);
    const int tiles = (d->num_experts + f.tn - 1) / f.tn;
    const int64_t t0 = (int64_t)(blockIdx.x / (unsigned)tiles) * tokens;
    const int e0 = (int)(blockIdx.x % (unsigned)tiles) * f.tn;
    uint16_t* const stage = (uint16_t*)shared + moei_warp() * moei_stage_elems(f);
    moei_ring r;
    moei_mma_c acc[4][4];
    uint4 x[8], w[8];

    r.stages = stage, r.elems = moei_stage_elems(f), r.slot = 0;
    r.lane_a = moei_mma_lane_a(0, f.tk, MOE_MAJOR_K);
    r.lane_b = moei_mma_lane_b(0, f.tk, MOE_MAJOR_K);
    moei_tile_zero(acc, f);
    moei_split_small_load(d, x, w, t0, e0, moei_warp() * f.tk, x_dtype, f);
    for (int k = moei_warp() * f.tk; k < d->hidden; k += stride) {
        moei_ring_fragments g;
        moei_split_small_store(stage, x, w, x_dtype, f);
        __syncwarp(MOEI_FULL);
        if (k + stride < d->hidden) moei_split_small_load(d, x, w, t0, e0, k + stride, x_dtype, f);
        MOEI_UNROLL
        for (int c = 0; c < moei_ring_chunks(f); ++c) {
            moei_ring_load(&g, &r, 0, c, f);
            moei_tile_products(acc, g.a[c / f.terms & 1], g.b[c & 1], f);
        }
        __syncwarp(MOEI_FULL);
    }

    MOEI_UNROLL
    for (int m = 0; m < f.wm / 16; ++m)
        moei_mma_store((float*)stage + m * 16 * MOEI_SPLIT_SMALL_OUT, &acc[m][0],
                       MOEI_SPLIT_SMALL_OUT);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < tokens * f.tn; i += warps * MOEI_WARP) {
        const int row = i / f.tn, c = i % f.tn;
        float sum = 0.0f;
        for (int part = 0; part < (x_dtype == MOE_FP16 ? 2 : 1); ++part)
            for (int j = 0; j < warps; ++j)
                sum +=
                    ((const float*)((const uint16_t*)shared +
                                    j * moei_stage_elems(
                                            f)))[(row + part * tokens) * MOEI_SPLIT_SMALL_OUT + c];
        if (t0 + row < d->num_tokens && e0 + c < d->num_experts)
            d->logits[(t0 + row) * d->logits_stride + e0 + c] = sum;
    }
}

#endif
