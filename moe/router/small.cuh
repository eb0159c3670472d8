/* small.cuh: the tile of few tokens: a block makes 32 rows of x times 16 experts.

   Its 8 warps take turns with the steps of H, 64 deep each, and share nothing before the sums,
   which are added up in the order of the warps. The next step's x and weights come into registers
   while this one's are multiplied. */
#ifndef MOE_ROUTER_SMALL_CUH
#define MOE_ROUTER_SMALL_CUH

#include "../base/copy.cuh"
#include "../base/warp.cuh"
#include "../gemm/mma.cuh"
#include "split.cuh"

/* Rows of x and experts of a tile, depth of one warp's step, pitches in shared memory. */
#define MOEI_SPLIT_ROWS 32
#define MOEI_SPLIT_EXPERTS 16
#define MOEI_SPLIT_SMALL_DEPTH 64
#define MOEI_SPLIT_SMALL_PITCH (MOEI_SPLIT_SMALL_DEPTH + 8)
#define MOEI_SPLIT_SMALL_OUT (MOEI_SPLIT_EXPERTS + 4)

MOE_HOST size_t moei_split_small_smem(void) /* of a block, bytes; the sums take less */
{
    return (size_t)(MOEI_SPLIT_THREADS / 32) * 2 * MOEI_SPLIT_SMALL_PITCH *
           (MOEI_SPLIT_ROWS + MOE_ROUTER_SPLIT_TERMS * MOEI_SPLIT_EXPERTS);
}

/* What a lane of the small tile holds of a step: of x a piece of every 4th row, of the weights 4
   neighbours of every 2nd. */
MOE_DEVICE void moei_split_small_load(const moei_split_args* d, uint4* x, uint4* w, int64_t t0,
                                      int e0, int k)
{
    const int xk = k + (moei_lane() & 7) * 8, wk = k + (moei_lane() & 15) * 4;
    const int rows = moei_split_tokens(MOEI_SPLIT_ROWS, d->x_dtype);
    MOEI_UNROLL
    for (int i = 0; i < 8; ++i) {
        const int r = (moei_lane() >> 3) + i * 4;
        x[i] = make_uint4(0, 0, 0, 0);
        if (r < rows && t0 + r < d->num_tokens && xk < d->hidden)
            x[i] = moei_load16((const uint16_t*)d->x + (t0 + r) * d->x_stride + xk);
    }
    MOEI_UNROLL
    for (int i = 0; i < 8; ++i) {
        const int r = (moei_lane() >> 4) + i * 2;
        w[i] = make_uint4(0, 0, 0, 0);
        if (e0 + r < d->num_experts && wk < d->hidden)
            w[i] = moei_load16(d->w + (e0 + r) * d->w_stride + wk);
    }
}

/* Stores it in the warp's shared memory, split. */
MOE_DEVICE void moei_split_small_store(const moei_split_args* d, uint16_t* xs, uint16_t* ws,
                                       const uint4* x, const uint4* w, const int terms)
{
    const int xk = (moei_lane() & 7) * 8, wk = (moei_lane() & 15) * 4;
    MOEI_UNROLL
    for (int i = 0; i < 8; ++i) {
        uint16_t* to = xs + ((moei_lane() >> 3) + i * 4) * MOEI_SPLIT_SMALL_PITCH + xk;
        if (d->x_dtype != MOE_FP16) {
            moei_store16(to, x[i]);
        } else if (i < 4) {
            uint4 hi, lo;
            moei_split_x(&hi, &lo, x[i]);
            moei_store16(to, hi);
            moei_store16(to + MOEI_SPLIT_ROWS / 2 * MOEI_SPLIT_SMALL_PITCH, lo);
        }
    }
    MOEI_UNROLL
    for (int i = 0; i < 8; ++i) {
        uint2 term[3];
        moei_split4(term, w[i], terms);
        MOEI_UNROLL
        for (int j = 0; j < terms; ++j)
            *(uint2*)(ws +
                      (j * MOEI_SPLIT_EXPERTS + (moei_lane() >> 4) + i * 2) *
                          MOEI_SPLIT_SMALL_PITCH +
                      wk) = term[j];
    }
}

/* One block makes one tile; its warps take turns with the steps of H and share nothing before the
   sums. */
MOE_DEVICE_BODY void moei_split_small(const moei_split_args* d, unsigned char* shared,
                                      const int terms)
{
    const int warps = MOEI_SPLIT_THREADS / 32, stride = warps * MOEI_SPLIT_SMALL_DEPTH;
    const int tokens = moei_split_tokens(MOEI_SPLIT_ROWS, d->x_dtype);
    const int tiles = (d->num_experts + MOEI_SPLIT_EXPERTS - 1) / MOEI_SPLIT_EXPERTS;
    const int64_t t0 = (int64_t)(blockIdx.x / (unsigned)tiles) * tokens;
    const int e0 = (int)(blockIdx.x % (unsigned)tiles) * MOEI_SPLIT_EXPERTS;
    const int elems = (MOEI_SPLIT_ROWS + terms * MOEI_SPLIT_EXPERTS) * MOEI_SPLIT_SMALL_PITCH;
    uint16_t* const xs = (uint16_t*)shared + moei_warp() * elems;
    uint16_t* const ws = xs + MOEI_SPLIT_ROWS * MOEI_SPLIT_SMALL_PITCH;
    moei_mma_c acc[2];
    uint4 x[8], w[8];

    moei_mma_zero(&acc[0]);
    moei_mma_zero(&acc[1]);
    moei_split_small_load(d, x, w, t0, e0, moei_warp() * MOEI_SPLIT_SMALL_DEPTH);
    for (int k = moei_warp() * MOEI_SPLIT_SMALL_DEPTH; k < d->hidden; k += stride) {
        moei_split_small_store(d, xs, ws, x, w, terms);
        __syncwarp(MOEI_FULL);
        if (k + stride < d->hidden) moei_split_small_load(d, x, w, t0, e0, k + stride);
        MOEI_UNROLL
        for (int i = 0; i < MOEI_SPLIT_SMALL_DEPTH; i += 16) {
            moei_mma_a a[2];
            MOEI_UNROLL
            for (int m = 0; m < 2; ++m)
                moei_mma_load_a(&a[m], xs + m * 16 * MOEI_SPLIT_SMALL_PITCH + i,
                                MOEI_SPLIT_SMALL_PITCH, MOE_BF16, MOE_MAJOR_K);
            MOEI_UNROLL
            for (int t = terms - 1; t >= 0; --t) { /* small terms first */
                moei_mma_b b;
                moei_mma_load_b(&b, ws + t * MOEI_SPLIT_EXPERTS * MOEI_SPLIT_SMALL_PITCH + i,
                                MOEI_SPLIT_SMALL_PITCH, MOE_BF16, MOE_MAJOR_K);
                MOEI_UNROLL
                for (int m = 0; m < 2; ++m)
                    moei_mma(&acc[m], &a[m], &b, MOE_BF16);
            }
        }
        __syncwarp(MOEI_FULL);
    }

    MOEI_UNROLL
    for (int m = 0; m < 2; ++m)
        moei_mma_store((float*)xs + m * 16 * MOEI_SPLIT_SMALL_OUT, &acc[m], MOEI_SPLIT_SMALL_OUT);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < tokens * MOEI_SPLIT_EXPERTS; i += MOEI_SPLIT_THREADS) {
        const int r = i / MOEI_SPLIT_EXPERTS, c = i % MOEI_SPLIT_EXPERTS;
        float sum = 0.0f;
        for (int part = 0; part < (d->x_dtype == MOE_FP16 ? 2 : 1); ++part)
            for (int j = 0; j < warps; ++j)
                sum += ((const float*)((const uint16_t*)shared +
                                       j * elems))[(r + part * tokens) * MOEI_SPLIT_SMALL_OUT + c];
        if (t0 + r < d->num_tokens && e0 + c < d->num_experts)
            d->logits[(t0 + r) * d->logits_stride + e0 + c] = sum;
    }
}

#endif
