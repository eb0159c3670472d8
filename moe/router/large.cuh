/* large.cuh: the tile of many tokens: a block makes 256 rows of x times 128 experts.

   x comes through a ring of three stages filled by cp.async. The weights come the same way as fp32,
   each thread's to a place of its own, and it splits them, a step ahead, into one of two buffers of
   `terms` tiles. A piece of x, once loaded, is multiplied by all terms; copies and splits stand
   between the products, so that the tensor cores have work meanwhile. */
#ifndef MOE_ROUTER_LARGE_CUH
#define MOE_ROUTER_LARGE_CUH

#include "../base/copy.cuh"
#include "../base/warp.cuh"
#include "../gemm/mma.cuh"
#include "split.cuh"

/* The large tile: rows of x, experts, depth of a step, pitch of its rows in shared memory. */
#define MOEI_SPLIT_HIGH 256
#define MOEI_SPLIT_TILE 128
#define MOEI_SPLIT_DEPTH 32
#define MOEI_SPLIT_PITCH (MOEI_SPLIT_DEPTH + 8)
#define MOEI_SPLIT_X_ELEMS (MOEI_SPLIT_HIGH * MOEI_SPLIT_PITCH) /* of a stage of x */
#define MOEI_SPLIT_ELEMS (MOEI_SPLIT_TILE * MOEI_SPLIT_PITCH)   /* of a term of the weights */
#define MOEI_SPLIT_OUT (MOEI_SPLIT_TILE + 4)                    /* pitch of the sums */

/* Shared memory of a block, bytes: x, the terms, the weights as they came; then the sums. */
MOE_HOST size_t moei_split_large_smem(void)
{
    const size_t ring = (size_t)2 * (3 * MOEI_SPLIT_X_ELEMS +
                                     2 * MOE_ROUTER_SPLIT_TERMS * MOEI_SPLIT_ELEMS) +
                        (size_t)8 * MOEI_SPLIT_THREADS * 16;
    const size_t out = (size_t)MOEI_SPLIT_HIGH * MOEI_SPLIT_OUT * 4;
    return ring > out ? ring : out;
}

/* What a thread of the large tile copies: of x one 16-byte piece of the rows 0, 64, 128, 192 below
   its first, of the weights 4 neighbours of two rows in each half of a step. Within a warp the rows
   are such that both stores meet all banks. The pointers move on at the end of a step, when the
   copies have long read them. */
typedef struct moei_split_loader {
    const char* x[4];  /* the piece of each row, at the depth to be copied next */
    const float* w[2]; /* the 4 neighbours of each row */
    int x_at, w_at;    /* elements from the beginning of a tile */
    int x_left;        /* what is left of H for the piece of x; not above 0: zeros */
    int w_left;
    int x_rows, w_rows; /* bit i: the i-th of the rows exists */
} moei_split_loader;

MOE_DEVICE void moei_split_begin(moei_split_loader* p, const moei_split_args* d, int64_t t0, int e0)
{
    const int lane = moei_lane(), warp = moei_warp();
    const int xr = warp * 8 + (lane >> 2 & 1) * 4 + (lane >> 3), xk = (lane & 3) * 8;
    const int wr = warp * 16 + (lane >> 1 & 7), wk = (lane >> 4) * 8 + (lane & 1) * 4;
    p->x_rows = p->w_rows = 0;
    MOEI_UNROLL
    for (int i = 0; i < 4; ++i) {
        const bool in = t0 + xr + 64 * i < d->num_tokens && (i < 2 || d->x_dtype != MOE_FP16);
        p->x_rows |= (in ? 1 : 0) << i;
        p->x[i] = (const char*)d->x + ((in ? t0 + xr + 64 * i : 0) * d->x_stride + xk) * 2;
    }
    MOEI_UNROLL
    for (int i = 0; i < 2; ++i) {
        const bool in = e0 + wr + 8 * i < d->num_experts;
        p->w_rows |= (in ? 1 : 0) << i;
        p->w[i] = d->w + (in ? e0 + wr + 8 * i : 0) * d->w_stride + wk;
    }
    p->x_at = xr * MOEI_SPLIT_PITCH + xk;
    p->w_at = wr * MOEI_SPLIT_PITCH + wk;
    p->x_left = d->hidden - xk;
    p->w_left = d->hidden - wk;
}

/* Begins the copy of piece i (0 .. 3) of x. fp16 has two rows alone. */
MOE_DEVICE void moei_split_copy_x(const moei_split_loader* p, const moei_split_args* d,
                                  uint16_t* stage, const int i)
{
    if (i < 2 || d->x_dtype != MOE_FP16)
        moei_copy16_async(stage + p->x_at + i * 64 * MOEI_SPLIT_PITCH, p->x[i],
                          p->x_left > 0 && (p->x_rows >> i & 1) ? 16 : 0);
}

/* Begins the copy of piece i (half * 2 + row) of the weights, as they are, to a place of the
   thread's own. */
MOE_DEVICE void moei_split_copy_w(const moei_split_loader* p, uint4* raw, const int i)
{
    moei_copy16_async(raw + i * MOEI_SPLIT_THREADS + threadIdx.x, p->w[i & 1] + i / 2 * 16,
                      i / 2 * 16 < p->w_left && (p->w_rows >> (i & 1) & 1) ? 16 : 0);
}

MOE_DEVICE void moei_split_next_x(moei_split_loader* p)
{
    MOEI_UNROLL
    for (int i = 0; i < 4; ++i) p->x[i] += MOEI_SPLIT_DEPTH * 2;
    p->x_left -= MOEI_SPLIT_DEPTH;
}

MOE_DEVICE void moei_split_next_w(moei_split_loader* p)
{
    p->w[0] += MOEI_SPLIT_DEPTH;
    p->w[1] += MOEI_SPLIT_DEPTH;
    p->w_left -= MOEI_SPLIT_DEPTH;
}

/* fp16 alone: the thread splits the piece that it has copied itself, when that has arrived. */
MOE_DEVICE void moei_split_arrived(const moei_split_loader* p, const moei_split_args* d,
                                   uint16_t* stage)
{
    if (d->x_dtype == MOE_FP16) {
        MOEI_UNROLL
        for (int i = 0; i < MOEI_SPLIT_HIGH / 128; ++i) {
            uint16_t* at = stage + p->x_at + i * 64 * MOEI_SPLIT_PITCH;
            uint4 hi, lo;
            moei_split_x(&hi, &lo, moei_load16(at));
            moei_store16(at, hi);
            moei_store16(at + MOEI_SPLIT_HIGH / 2 * MOEI_SPLIT_PITCH, lo);
        }
    }
}

/* Splits piece `piece` (half * 2 + row) of a step's weights into the `terms` tiles at `to`. */
MOE_DEVICE void moei_split_store_w(const moei_split_loader* p, uint16_t* to, uint4 v,
                                   const int piece, const int terms)
{
    uint2 term[3];
    moei_split4(term, v, terms);
    MOEI_UNROLL
    for (int j = 0; j < terms; ++j)
        *(uint2*)(to + j * MOEI_SPLIT_ELEMS + p->w_at + (piece & 1) * 8 * MOEI_SPLIT_PITCH +
                  piece / 2 * 16) = term[j];
}

/* The pieces of a term of the weights that a warp multiplies at 16 of depth. */
MOE_DEVICE void moei_split_load_b(moei_mma_b* b, const uint16_t* w, const int term)
{
    MOEI_UNROLL
    for (int j = 0; j < 4; ++j)
        moei_mma_load_b(&b[j], w + term * MOEI_SPLIT_ELEMS + j * 16 * MOEI_SPLIT_PITCH,
                        MOEI_SPLIT_PITCH, MOE_BF16, MOE_MAJOR_K);
}

MOE_DEVICE void moei_split_load_a(moei_mma_a* a, const uint16_t* x, const int i)
{
    moei_mma_load_a(a, x + i * 16 * MOEI_SPLIT_PITCH, MOEI_SPLIT_PITCH, MOE_BF16, MOE_MAJOR_K);
}

/* One block makes one tile; its warps 64 x 64 each. While a step is multiplied, the next one's
   weights are split into the other of two buffers; x is two steps ahead, the weights three. The
   small terms are multiplied first, where sums are small too. One barrier a step: it says that the
   step's x and weights are there and that the step before has been read by everyone. */
MOE_DEVICE_BODY void moei_split_large(const moei_split_args* d, unsigned char* shared,
                                      const int terms)
{
    const int tokens = moei_split_tokens(MOEI_SPLIT_HIGH, d->x_dtype);
    const int tiles = (d->num_experts + MOEI_SPLIT_TILE - 1) / MOEI_SPLIT_TILE;
    const int64_t t0 = (int64_t)(blockIdx.x / (unsigned)tiles) * tokens;
    const int e0 = (int)(blockIdx.x % (unsigned)tiles) * MOEI_SPLIT_TILE;
    const int steps = (d->hidden + MOEI_SPLIT_DEPTH - 1) / MOEI_SPLIT_DEPTH;
    const int row = moei_warp() % 4 * 64, column = moei_warp() / 4 * 64; /* the warp's */
    uint16_t* const ring = (uint16_t*)shared;
    uint16_t* x[3] = {ring, ring + MOEI_SPLIT_X_ELEMS, ring + 2 * MOEI_SPLIT_X_ELEMS};
    uint16_t* w = ring + 3 * MOEI_SPLIT_X_ELEMS; /* `terms` tiles to multiply, then as many more */
    uint16_t* next = w + terms * MOEI_SPLIT_ELEMS;
    uint4* raw = (uint4*)(next + terms * MOEI_SPLIT_ELEMS); /* and the same behind it */
    uint4* raw_next = raw + 4 * MOEI_SPLIT_THREADS;
    float* const out = (float*)shared; /* after the last step */
    moei_split_loader load;
    moei_mma_c acc[4][4];

    MOEI_UNROLL
    for (int i = 0; i < 4; ++i) {
        MOEI_UNROLL
        for (int j = 0; j < 4; ++j) moei_mma_zero(&acc[i][j]);
    }
    moei_split_begin(&load, d, t0, e0);
    MOEI_UNROLL
    for (int i = 0; i < 4; ++i) moei_split_copy_w(&load, raw, i);
    moei_split_next_w(&load);
    moei_copy_commit();
    moei_copy_wait(0);
    MOEI_UNROLL
    for (int i = 0; i < 4; ++i)
        moei_split_store_w(&load, w, raw[i * MOEI_SPLIT_THREADS + threadIdx.x], i, terms);
    MOEI_UNROLL
    for (int s = 0; s < 2; ++s) { /* x of a step and the weights of the step after */
        MOEI_UNROLL
        for (int i = 0; i < 4; ++i) {
            moei_split_copy_x(&load, d, x[s], i);
            moei_split_copy_w(&load, s ? raw_next : raw, i);
        }
        moei_split_next_x(&load);
        moei_split_next_w(&load);
        moei_copy_commit();
    }
    moei_copy_wait(1);
    moei_split_arrived(&load, d, x[0]);

    for (int step = 0; step < steps; ++step) {
        const uint16_t* xw = x[0] + row * MOEI_SPLIT_PITCH;
        const uint16_t* ww = w + column * MOEI_SPLIT_PITCH;
        moei_mma_a a[4];
        moei_mma_b b[2][4];
        uint4 v = make_uint4(0, 0, 0, 0);
        __syncthreads();
        moei_split_load_b(b[0], ww, terms - 1);
        MOEI_UNROLL
        for (int i = 0; i < 4; ++i) moei_split_load_a(&a[i], xw, i);
        MOEI_UNROLL
        for (int u = 0; u < 2 * terms; ++u) { /* half u / terms, term terms - 1 - u % terms */
            if (u + 1 < 2 * terms)
                moei_split_load_b(b[(u + 1) & 1], ww + (u + 1) / terms * 16,
                                  terms - 1 - (u + 1) % terms);
            if (u < 4) {
                v = raw[u * MOEI_SPLIT_THREADS + threadIdx.x];
                moei_split_copy_x(&load, d, x[2], u);
            }
            MOEI_UNROLL
            for (int i = 0; i < 4; ++i) {
                MOEI_UNROLL
                for (int j = 0; j < 4; ++j)
                    moei_mma(&acc[i][j], &a[i], &b[u & 1][j], MOE_BF16);
                if (u == terms - 1) moei_split_load_a(&a[i], xw + 16, i);
            }
            if (u < 4) {
                moei_split_store_w(&load, next, v, u, terms);
                moei_split_copy_w(&load, raw, u); /* where v stood */
            }
        }
        moei_copy_commit();
        moei_split_next_x(&load);
        moei_split_next_w(&load);
        {
            uint16_t *const x0 = x[0], *const w0 = w;
            uint4* const raw0 = raw;
            x[0] = x[1], x[1] = x[2], x[2] = x0;
            raw = raw_next, raw_next = raw0;
            w = next, next = w0;
        }
        moei_copy_wait(1);
        moei_split_arrived(&load, d, x[0]);
    }

    moei_copy_wait(0);
    __syncthreads();
    MOEI_UNROLL
    for (int i = 0; i < 4; ++i) {
        MOEI_UNROLL
        for (int j = 0; j < 4; ++j)
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
