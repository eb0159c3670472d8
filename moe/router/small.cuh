/* small.cuh: the bf16 split for few tokens: a block computes 32 rows of x times 16 experts. Called
   by router.cuh.

   Each of the 8 warps has the whole tile and every 8th step of H, 64 depths each. Warps share
   nothing before the sums, which are added in the order of the warps. A warp loads the next step's
   x and weights to registers while it multiplies this step's. */
#ifndef MOE_ROUTER_SMALL_CUH
#define MOE_ROUTER_SMALL_CUH

#include "../base/copy.cuh"
#include "../base/warp.cuh"
#include "../gemm/mainloop.cuh"
#include "bf16_split.cuh"

/* As MOE_GEMM_SHAPE_*: rows of x, experts, tile_k of one warp's step; a warp has the whole tile. */
#define MOEI_BF16_SPLIT_SMALL 32, 16, 64, 1, 1, 1
#define MOEI_BF16_SPLIT_SMALL_WARPS 8

/* Shared memory of a block, bytes: a stage for each warp, reused for the sums, which take less. */
#define MOEI_BF16_SPLIT_SMEM_small(x_dtype)                                                        \
    (MOEI_BF16_SPLIT_SMALL_WARPS * MOEI_RING_BYTES(MOE_ROUTER_BF16_TERMS, MOEI_BF16_SPLIT_SMALL))

#define MOEI_BF16_SPLIT_SMALL_OUT 20 /* floats between rows of the sums: 16 and padding */

/* Loads a lane's share of the step that begins at depth k: of x a 16-byte vector of every 4th
   row, of the weights one of every 2nd row. Zeros past the last token, expert or depth. */
MOE_DEVICE void moei_bf16_split_small_load(const moei_router_args* d, uint4* x, uint4* w,
                                           int64_t t0, int e0, int k, const int x_dtype,
                                           const moe_gemm_shape f)
{
    const int xk = k + (moe_lane() & 7) * 8, wk = k + (moe_lane() & 15) * 4;
    MOE_UNROLL
    for (int i = 0; i < moei_bf16_split_tokens(f.tile_m, x_dtype) / 4; ++i) {
        const int r = (moe_lane() >> 3) + i * 4;
        x[i] = make_uint4(0, 0, 0, 0);
        if (t0 + r < d->num_tokens && xk < d->hidden)
            x[i] = moei_load16((const uint16_t*)d->x + (t0 + r) * d->x_stride + xk);
    }
    MOE_UNROLL
    for (int i = 0; i < f.tile_n / 2; ++i) {
        const int r = (moe_lane() >> 4) + i * 2;
        w[i] = make_uint4(0, 0, 0, 0);
        if (e0 + r < d->num_experts && wk < d->hidden)
            w[i] = moei_load16((const float*)d->w + (e0 + r) * d->w_stride + wk);
    }
}

/* Splits a lane's x and weights and stores them to the warp's stage. Of an fp16 x the upper parts
   are the first half of the tile's rows, the lower parts the second half. */
MOE_DEVICE void moei_bf16_split_small_store(uint16_t* stage, const uint4* x, const uint4* w,
                                            const int x_dtype, const moe_gemm_shape f)
{
    const int xk = (moe_lane() & 7) * 8, wk = (moe_lane() & 15) * 4;
    MOE_UNROLL
    for (int i = 0; i < moei_bf16_split_tokens(f.tile_m, x_dtype) / 4; ++i) {
        uint16_t* to = stage + moei_swizzled((moe_lane() >> 3) + i * 4, xk, f.tile_k);
        uint4 hi = x[i], lo;
        if (x_dtype == MOE_FP16) {
            moei_bf16_split_x(&hi, &lo, x[i]);
            moei_store16(to + f.tile_m / 2 * f.tile_k, lo);
        }
        moei_store16(to, hi);
    }
    stage += f.tile_m * f.tile_k;
    MOE_UNROLL
    for (int i = 0; i < f.tile_n / 2; ++i) {
        uint2 term[3];
        moei_bf16_split4(term, w[i], f.terms);
        MOE_UNROLL
        for (int j = 0; j < f.terms; ++j)
            *(uint2*)(stage + j * f.tile_n * f.tile_k +
                      moei_swizzled((moe_lane() >> 4) + i * 2, wk, f.tile_k)) = term[j];
    }
}

/* Computes one tile by one block. All threads of the block call it. shared:
   MOEI_BF16_SPLIT_SMEM_small bytes. x_dtype and f are literals.

   1. Each warp sets up its own stage and loads its first step to registers.
   2. For each of its steps a warp splits the registers into the stage, loads its next step to
      registers, and multiplies the stage. The stage is the warp's own: __syncwarp guards it.
   3. Each warp stores its sums to its stage; the barrier makes them visible to the block.
   4. Each thread adds the sums of all warps for some logits, in the order of the warps (fp16: first
      of the upper parts of x, then of the lower parts), and stores the logits. */
MOE_DEVICE_BODY void moei_bf16_split_small(const moei_router_args* d, unsigned char* shared,
                                           const int x_dtype, const moe_gemm_shape f)
{
    const int warps = MOEI_BF16_SPLIT_SMALL_WARPS, stride = warps * f.tile_k;
    const int tokens = moei_bf16_split_tokens(f.tile_m, x_dtype);
    const int tiles = (d->num_experts + f.tile_n - 1) / f.tile_n;
    const int64_t t0 = (int64_t)(blockIdx.x / (unsigned)tiles) * tokens;
    const int e0 = (int)(blockIdx.x % (unsigned)tiles) * f.tile_n;
    uint16_t* const stage = (uint16_t*)shared + moe_warp() * moei_stage_elems(f);
    moei_ring r;
    moei_mma_c acc[4][4];
    uint4 x[8], w[8];

    /* 1. first step */
    r.stages = stage, r.elems = moei_stage_elems(f), r.stage = 0;
    r.lane_a = moei_mma_lane_a(0, f.tile_k, MOE_MAJOR_K);
    r.lane_b = moei_mma_lane_b(0, f.tile_k, MOE_MAJOR_K);
    moei_tile_zero(acc, f);
    moei_bf16_split_small_load(d, x, w, t0, e0, moe_warp() * f.tile_k, x_dtype, f);
    /* 2. steps of the warp */
    for (int k = moe_warp() * f.tile_k; k < d->hidden; k += stride) {
        moei_ring_fragments g;
        moei_bf16_split_small_store(stage, x, w, x_dtype, f);
        __syncwarp(MOE_FULL_WARP);
        if (k + stride < d->hidden)
            moei_bf16_split_small_load(d, x, w, t0, e0, k + stride, x_dtype, f);
        MOE_UNROLL
        for (int c = 0; c < moei_ring_products(f); ++c) {
            moei_ring_load(&g, &r, 0, c, f);
            moei_tile_products(acc, g.a[c / f.terms & 1], g.b[c & 1], f);
        }
        __syncwarp(MOE_FULL_WARP);
    }

    MOE_UNROLL /* 3. sums of the warp */
    for (int m = 0; m < f.wm / 16; ++m)
        moei_mma_store((float*)stage + m * 16 * MOEI_BF16_SPLIT_SMALL_OUT, &acc[m][0],
                       MOEI_BF16_SPLIT_SMALL_OUT);
    __syncthreads(); /* 4. sums of the block */
    for (int i = (int)threadIdx.x; i < tokens * f.tile_n; i += warps * MOE_WARP_SIZE) {
        const int row = i / f.tile_n, c = i % f.tile_n;
        float sum = 0.0f;
        for (int part = 0; part < (x_dtype == MOE_FP16 ? 2 : 1); ++part)
            for (int j = 0; j < warps; ++j)
                sum +=
                    ((const float*)((const uint16_t*)shared +
                                    j * moei_stage_elems(
                                            f)))[(row + part * tokens) * MOEI_BF16_SPLIT_SMALL_OUT +
                                                 c];
        if (t0 + row < d->num_tokens && e0 + c < d->num_experts)
            d->logits[(t0 + row) * d->logits_stride + e0 + c] = sum;
    }
}

#endif
