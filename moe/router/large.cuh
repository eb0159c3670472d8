/* large.cuh: the tile of many tokens: a block makes 128 rows of x times 128 experts.

   x comes through a ring of three stages filled by cp.async. The weights come through registers,
   one half step ahead, and are split on their way into one of two buffers of `terms` tiles. A piece
   of x, once loaded, is multiplied by all terms. Two blocks a multiprocessor, so that one splits
   while the other multiplies. */
#ifndef MOE_ROUTER_LARGE_CUH
#define MOE_ROUTER_LARGE_CUH

#include "../base/copy.cuh"
#include "../base/warp.cuh"
#include "../gemm/mma.cuh"
#include "split.cuh"

/* The large tile: rows of x and experts, depth of a step, pitch of its rows in shared memory. */
#define MOEI_SPLIT_TILE 128
#define MOEI_SPLIT_DEPTH 32
#define MOEI_SPLIT_PITCH (MOEI_SPLIT_DEPTH + 8)
#define MOEI_SPLIT_STAGES 3 /* of x */
#define MOEI_SPLIT_ELEMS (MOEI_SPLIT_TILE * MOEI_SPLIT_PITCH)
#define MOEI_SPLIT_OUT (MOEI_SPLIT_TILE + 4) /* pitch of the sums */

MOE_HOST size_t moei_split_large_smem(void) /* of a block, bytes; the sums take less */
{
    return (size_t)2 * MOEI_SPLIT_ELEMS * (MOEI_SPLIT_STAGES + 2 * MOE_ROUTER_SPLIT_TERMS);
}

/* What a thread of the large tile copies: of x one 16-byte piece of a row and of the row 64 below,
   of the weights, a half step at a time, 4 neighbours of a row and of the row 8 below. Within a
   warp the rows are such that both stores meet all banks. */
typedef struct moei_split_loader {
    const char* x;  /* the piece of the first row, at the depth 0 */
    const float* w; /* the 4 neighbours of the first row, at the depth 0 */
    int x_at, w_at; /* elements from the beginning of a tile */
    int x_left;     /* H less the piece's depth in a step; what is not there is not below it */
    int w_left;
    int x_rows, w_rows; /* bit i: the i-th of the two rows exists */
} moei_split_loader;

MOE_DEVICE void moei_split_begin(moei_split_loader* p, const moei_split_args* d, int64_t t0, int e0)
{
    const int lane = moei_lane(), warp = moei_warp();
    const int xr = warp * 8 + (lane >> 2 & 1) * 4 + (lane >> 3), xk = (lane & 3) * 8;
    const int wr = warp * 16 + (lane >> 1 & 7), wk = (lane >> 4) * 8 + (lane & 1) * 4;
    p->x_rows = p->w_rows = 0;
    MOEI_UNROLL
    for (int i = 0; i < 2; ++i) {
        if (t0 + xr + 64 * i < d->num_tokens) p->x_rows |= 1 << i;
        if (e0 + wr + 8 * i < d->num_experts) p->w_rows |= 1 << i;
    }
    p->x = (const char*)d->x + ((p->x_rows ? t0 + xr : 0) * d->x_stride + xk) * 2;
    p->w = d->w + (p->w_rows ? e0 + wr : 0) * d->w_stride + wk;
    p->x_at = xr * MOEI_SPLIT_PITCH + xk;
    p->w_at = wr * MOEI_SPLIT_PITCH + wk;
    p->x_left = d->hidden - xk;
    p->w_left = d->hidden - wk;
}

/* Begins the copy of depth k .. k + 32 of x; one row of fp16, two of bf16. */
MOE_DEVICE void moei_split_copy_x(const moei_split_loader* p, const moei_split_args* d,
                                  uint16_t* stage, int k)
{
    const bool in = k < p->x_left;
    const char* from = in ? p->x + (int64_t)k * 2 : (const char*)d->x;
    moei_copy16_async(stage + p->x_at, from, in && (p->x_rows & 1) ? 16 : 0);
    if (d->x_dtype != MOE_FP16) {
        const bool both = in && (p->x_rows & 2);
        moei_copy16_async(stage + p->x_at + 64 * MOEI_SPLIT_PITCH,
                          both ? from + 64 * d->x_stride * 2 : (const char*)d->x, both ? 16 : 0);
    }
    moei_copy_commit();
}

/* fp16 alone: the thread splits the piece that it has copied itself, when that has arrived. */
MOE_DEVICE void moei_split_arrived(const moei_split_loader* p, const moei_split_args* d,
                                   uint16_t* stage)
{
    if (d->x_dtype == MOE_FP16) {
        uint4 hi, lo;
        moei_split_x(&hi, &lo, moei_load16(stage + p->x_at));
        moei_store16(stage + p->x_at, hi);
        moei_store16(stage + p->x_at + 64 * MOEI_SPLIT_PITCH, lo);
    }
}

/* The weights of depth k .. k + 16. */
MOE_DEVICE void moei_split_load_w(const moei_split_loader* p, const moei_split_args* d, uint4* v,
                                  int k)
{
    MOEI_UNROLL
    for (int i = 0; i < 2; ++i) {
        v[i] = make_uint4(0, 0, 0, 0);
        if (k < p->w_left && (p->w_rows >> i & 1))
            v[i] = moei_load16(p->w + i * 8 * d->w_stride + k);
    }
}

/* Splits them into the `terms` tiles that begin at `to`; half says which half of the step. */
MOE_DEVICE void moei_split_store_w(const moei_split_loader* p, uint16_t* to, const uint4* v,
                                   const int half, const int terms)
{
    MOEI_UNROLL
    for (int i = 0; i < 2; ++i) {
        uint2 term[3];
        moei_split4(term, v[i], terms);
        MOEI_UNROLL
        for (int j = 0; j < terms; ++j)
            *(uint2*)(to + j * MOEI_SPLIT_ELEMS + p->w_at + i * 8 * MOEI_SPLIT_PITCH + half * 16) =
                term[j];
    }
}

/* A warp's 64 rows x 32 experts at 16 of depth: the pieces of x serve all terms, the small ones
   first, where sums are small too. */
MOE_DEVICE void moei_split_multiply(moei_mma_c acc[4][2], const uint16_t* x, const uint16_t* w,
                                    const int terms)
{
    moei_mma_a a[4];
    moei_mma_b b[2][2];
    MOEI_UNROLL
    for (int j = 0; j < 2; ++j)
        moei_mma_load_b(&b[(terms - 1) & 1][j],
                        w + (terms - 1) * MOEI_SPLIT_ELEMS + j * 16 * MOEI_SPLIT_PITCH,
                        MOEI_SPLIT_PITCH, MOE_BF16, MOE_MAJOR_K);
    MOEI_UNROLL
    for (int i = 0; i < 4; ++i)
        moei_mma_load_a(&a[i], x + i * 16 * MOEI_SPLIT_PITCH, MOEI_SPLIT_PITCH, MOE_BF16,
                        MOE_MAJOR_K);
    MOEI_UNROLL
    for (int t = terms - 1; t >= 0; --t) {
        if (t > 0) {
            MOEI_UNROLL
            for (int j = 0; j < 2; ++j)
                moei_mma_load_b(&b[(t - 1) & 1][j],
                                w + (t - 1) * MOEI_SPLIT_ELEMS + j * 16 * MOEI_SPLIT_PITCH,
                                MOEI_SPLIT_PITCH, MOE_BF16, MOE_MAJOR_K);
        }
        MOEI_UNROLL
        for (int i = 0; i < 4; ++i) {
            MOEI_UNROLL
            for (int j = 0; j < 2; ++j)
                moei_mma(&acc[i][j], &a[i], &b[t & 1][j], MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K);
        }
    }
}

/* One block makes one tile. While a step is multiplied, the next one's weights come in and are
   split into the other of two buffers, and x is two steps ahead. One barrier a step: it says that
   the step's x and weights are there and that the step before has been read by everyone. */
MOE_DEVICE_BODY void moei_split_large(const moei_split_args* d, unsigned char* shared,
                                      const int terms)
{
    const int tokens = moei_split_tokens(MOEI_SPLIT_TILE, d->x_dtype);
    const int tiles = (d->num_experts + MOEI_SPLIT_TILE - 1) / MOEI_SPLIT_TILE;
    const int64_t t0 = (int64_t)(blockIdx.x / (unsigned)tiles) * tokens;
    const int e0 = (int)(blockIdx.x % (unsigned)tiles) * MOEI_SPLIT_TILE;
    const int steps = (d->hidden + MOEI_SPLIT_DEPTH - 1) / MOEI_SPLIT_DEPTH;
    const int row = moei_warp() % 2 * 64, column = moei_warp() / 2 * 32; /* the warp's */
    uint16_t* const ring = (uint16_t*)shared;
    uint16_t* const weights = ring + MOEI_SPLIT_STAGES * MOEI_SPLIT_ELEMS;
    float* const out = (float*)shared; /* after the last step */
    moei_split_loader load;
    moei_mma_c acc[4][2];
    uint4 v[2];

    MOEI_UNROLL
    for (int i = 0; i < 4; ++i) {
        MOEI_UNROLL
        for (int j = 0; j < 2; ++j) moei_mma_zero(&acc[i][j]);
    }
    moei_split_begin(&load, d, t0, e0);
    moei_split_copy_x(&load, d, ring, 0);
    moei_split_copy_x(&load, d, ring + MOEI_SPLIT_ELEMS, MOEI_SPLIT_DEPTH);
    MOEI_UNROLL
    for (int half = 0; half < 2; ++half) {
        moei_split_load_w(&load, d, v, half * 16);
        moei_split_store_w(&load, weights, v, half, terms);
    }
    moei_copy_wait(1);
    moei_split_arrived(&load, d, ring);

    for (int step = 0; step < steps; ++step) {
        const uint16_t* x = ring + step % MOEI_SPLIT_STAGES * MOEI_SPLIT_ELEMS;
        const uint16_t* w = weights + (step & 1) * terms * MOEI_SPLIT_ELEMS;
        uint16_t* next = weights + (~step & 1) * terms * MOEI_SPLIT_ELEMS;
        const int k = (step + 1) * MOEI_SPLIT_DEPTH;
        __syncthreads();
        moei_split_copy_x(&load, d, ring + (step + 2) % MOEI_SPLIT_STAGES * MOEI_SPLIT_ELEMS,
                          k + MOEI_SPLIT_DEPTH);
        MOEI_UNROLL
        for (int half = 0; half < 2; ++half) {
            moei_split_load_w(&load, d, v, k + half * 16);
            moei_split_multiply(acc, x + row * MOEI_SPLIT_PITCH + half * 16,
                                w + column * MOEI_SPLIT_PITCH + half * 16, terms);
            moei_split_store_w(&load, next, v, half, terms);
        }
        moei_copy_wait(1);
        moei_split_arrived(&load, d, ring + (step + 1) % MOEI_SPLIT_STAGES * MOEI_SPLIT_ELEMS);
    }

    moei_copy_wait(0);
    __syncthreads();
    MOEI_UNROLL
    for (int i = 0; i < 4; ++i) {
        MOEI_UNROLL
        for (int j = 0; j < 2; ++j)
            moei_mma_store(out + (row + i * 16) * MOEI_SPLIT_OUT + column + j * 16, &acc[i][j],
                           MOEI_SPLIT_OUT);
    }
    __syncthreads();
    for (int r = moei_warp(); r < tokens && t0 + r < d->num_tokens; r += MOEI_SPLIT_THREADS / 32) {
        MOEI_UNROLL
        for (int c = moei_lane(); c < MOEI_SPLIT_TILE; c += 32) {
            float sum = out[r * MOEI_SPLIT_OUT + c];
            if (d->x_dtype == MOE_FP16) sum += out[(r + tokens) * MOEI_SPLIT_OUT + c];
            if (e0 + c < d->num_experts) d->logits[(t0 + r) * d->logits_stride + e0 + c] = sum;
        }
    }
}

#endif
