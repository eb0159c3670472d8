/* gradient.cuh: the backward pass through an activation on Hopper: from a consumer's accumulators
   to C, act and dot (gemm/gradient.cuh). Called by consume.cuh and tile.cuh.

   A fourth warpgroup computes it, so that the tensor cores go on with the next tile. At the end of a
   tile a consumer hands P of its 64 rows over in shared memory, and two warps take it: one has the
   even rows, the other the odd ones. A lane has 8 neighbouring columns of a row, 16 bytes of gates,
   of ups and of act; a warp 256 columns, a row of the tile. pre of the next rows is loaded meanwhile.

   P is handed over in 16 bits, as fp16 times a power of two for each row of a tile: the largest
   finite number of the row has exponent 14. So P is rounded to 11 bits; numbers below 2^-28 of the
   largest have an error of at most 2^-39 of it. */
#ifndef MOE_GEMM_WGMMA_GRADIENT_CUH
#define MOE_GEMM_WGMMA_GRADIENT_CUH

#include "../flags.cuh"
#include "../gradient.cuh"
#include "store.cuh"

#define MOEI_WGMMA_AHEAD 4 /* rows of pre that a warp loads ahead */

#if MOEI_WGMMA_HERE

/* ---- consumers ---- */

/* Returns the power of two that brings `largest`, a finite number >= 0, to exponent 14; at most
   2^126, whose inverse is a number too. 0: 1. */
MOE_DEVICE float moei_wgmma_scale(float largest)
{
    const int exponent = largest > 0.0f ? 268 - (int)(__float_as_uint(largest) >> 23) : 127;
    return __uint_as_float((uint32_t)(exponent < 253 ? exponent : 253) << 23);
}

/* Returns the inverse of a power of two that moei_wgmma_scale gives, exactly. */
MOE_DEVICE float moei_wgmma_inverse(float scale)
{
    return __uint_as_float((254u << 23) - __float_as_uint(scale));
}

/* Returns the largest |v| of one row in the warp, finite: 1: of finite numbers alone. below: 0: row
   r, 1: row r + 8; a literal. */
MOE_DEVICE float moei_wgmma_largest(const float acc[128], const int below, const int finite)
{
    float largest = 0.0f;
    MOE_UNROLL
    for (int i = 2 * below; i < 128; i += 4) {
        MOE_UNROLL
        for (int j = 0; j < 2; ++j) {
            const float v = fabsf(acc[i + j]);
            largest = fmaxf(largest, finite && v == INFINITY ? 0.0f : v);
        }
    }
    MOE_UNROLL
    for (int lane = 1; lane < 4; lane *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(MOE_FULL_WARP, largest, lane));
    return largest;
}

/* Hands over P of the consumer's rows of a tile. turn: hand-overs of this consumer before. row: its
   first row; rows: from it on. The warpgroup calls it.
     1. find the scales of the thread's two rows
     2. wait until the rows handed over before are stored
     3. write P, 64 columns at a time, and the scales */
MOE_DEVICE void moei_wgmma_hand_over(moei_wgmma_handed* h, moei_wgmma_shared* s, int consumer,
                                     int turn, float acc[128], int row, int rows, int first)
{
    const int line = moe_warp() % 4 * 16 + (moe_lane() >> 2);
    float scale[2] = {moei_wgmma_largest(acc, 0, 0), moei_wgmma_largest(acc, 1, 0)}; /* 1. */
    if (__any_sync(MOE_FULL_WARP, fmaxf(scale[0], scale[1]) == INFINITY)) {
        scale[0] = moei_wgmma_largest(acc, 0, 1);
        scale[1] = moei_wgmma_largest(acc, 1, 1);
    }
    scale[0] = moei_wgmma_scale(scale[0]), scale[1] = moei_wgmma_scale(scale[1]);
    moei_barrier_wait(s->stored + consumer, (turn & 1) ^ 1); /* 2. */
    MOE_UNROLL
    for (int q = 0; q < 4; ++q) { /* 3. */
        uint32_t x[16];
        MOE_UNROLL
        for (int i = 0; i < 32; ++i) acc[32 * q + i] *= scale[i >> 1 & 1];
        moei_wgmma_round(x, acc, 2 * q, MOE_FP16);
        moei_wgmma_round(x + 8, acc, 2 * q + 1, MOE_FP16);
        moei_wgmma_write_box(h->p + q * MOEI_WGMMA_BOX, x);
    }
    if ((moe_lane() & 3) == 0) {
        h->unit[line] = moei_wgmma_inverse(scale[0]);
        h->unit[line + 8] = moei_wgmma_inverse(scale[1]);
    }
    if (threadIdx.x % 128 == 0) h->row = row, h->rows = rows, h->first = first;
    moei_barrier_arrive(s->handed + consumer);
}

/* Tells the warps that there are no more tiles. The warpgroup calls it. */
MOE_DEVICE void moei_wgmma_hand_end(moei_wgmma_handed* h, moei_wgmma_shared* s, int consumer,
                                    int turn)
{
    moei_barrier_wait(s->stored + consumer, (turn & 1) ^ 1);
    if (threadIdx.x % 128 == 0) h->rows = 0;
    moei_barrier_arrive(s->handed + consumer);
}

/* ---- the fourth warpgroup ---- */

/* Replaces a row's vector of pre by those of C and act. Returns the sum of P activation(v, u). p:
   the vector of P in units of `unit`. */
MOE_DEVICE float moei_wgmma_vector(moei_gradient_pre* pre, const moe_grouped_gemm_args* d, uint4 p,
                                   float unit, float weight, int activation, const int dtype)
{
    const moei_gradient_activation g = moei_gradient_activation_of(d, activation);
    const uint32_t word[4] = {p.x, p.y, p.z, p.w};
    float v[8];
    MOE_UNROLL
    for (int j = 0; j < 4; ++j) {
        const float2 two = moe_unpack2(word[j], MOE_FP16);
        v[2 * j] = two.x, v[2 * j + 1] = two.y;
    }
    return unit * moei_gradient_words(pre, v, 0, 4, unit, weight, 0.0f, &g, dtype);
}

/* Computes and stores the rows that a consumer has handed over: rows `part`, part + 2, ... Lane i
   holds what belongs to row 2 i + part. The whole warp calls it. activation: that of *d or a literal
   of the same value. */
MOE_DEVICE void moei_wgmma_gradient_rows(const moe_grouped_gemm_args* d, const moei_wgmma_handed* h,
                                         int part, int activation, const int dtype)
{
    const int lane = moe_lane(), own = 2 * lane + part, column = h->first + 8 * lane;
    const int rows = h->rows < 64 ? h->rows : 64, count = (rows - part + 1) / 2;
    const moei_gradient_row mine = moei_gradient_row_of(d, h->row + own, own < rows);
    const unsigned reads = __ballot_sync(MOE_FULL_WARP, mine.read);
    const unsigned char* box = h->p + lane / 8 * MOEI_WGMMA_BOX;
    moei_gradient_pre pre[MOEI_WGMMA_AHEAD];
    moei_gradient_row r;
    r.there = true;
    MOE_UNROLL
    for (int j = 0; j < MOEI_WGMMA_AHEAD; ++j) {
        r.row = h->row + 2 * j + part, r.read = j < count && (reads >> j & 1);
        pre[j] = moei_gradient_load(d, &r, column, 4);
    }
    MOE_NO_UNROLL
    for (int i0 = 0; i0 < count; i0 += MOEI_WGMMA_AHEAD) {
        MOE_UNROLL
        for (int j = 0; j < MOEI_WGMMA_AHEAD; ++j) {
            const int i = i0 + j, line = 2 * i + part, next = i + MOEI_WGMMA_AHEAD;
            const float weight = __shfl_sync(MOE_FULL_WARP, mine.weight, i & 31);
            float sum;
            if (i >= count) break;
            sum = moei_wgmma_vector(pre + j, d,
                                    *(const uint4*)(box + line * 128 + ((lane ^ line) & 7) * 16),
                                    h->unit[line], weight, activation, dtype);
            r.row = h->row + line;
            moei_gradient_store(d, &r, column, pre + j, 4);
            if (d->gradient.dot) { /* 8 lanes have 64 columns */
                sum = moe_warp_sum(column < d->n ? sum : 0.0f, 8);
                if ((lane & 7) == 0 && column < d->n)
                    moei_gradient_store_dot(d, r.row, column, sum);
            }
            r.row += 2 * MOEI_WGMMA_AHEAD, r.read = next < count && (reads >> (next & 31) & 1);
            pre[j] = moei_gradient_load(d, &r, column, 4);
        }
    }
}

/* The fourth warpgroup: warps 2 i and 2 i + 1 of it take what consumer i hands over. SwiGLU has code
   of its own, without branches. */
MOE_DEVICE void moei_wgmma_compute(const moe_grouped_gemm_args* d, const moei_wgmma_handed* all,
                                   moei_wgmma_shared* s, const int dtype)
{
    const int consumer = moe_warp() % 4 / 2, part = moe_warp() % 2;
    const moei_wgmma_handed* h = all + consumer;
    for (int turn = 0;; ++turn) {
        moei_barrier_wait(s->handed + consumer, turn & 1);
        if (h->rows == 0) break;
        if (d->c.activation == MOE_ACTIVATION_SWIGLU)
            moei_wgmma_gradient_rows(d, h, part, MOE_ACTIVATION_SWIGLU, dtype);
        else moei_wgmma_gradient_rows(d, h, part, d->c.activation, dtype);
        if (d->done) {
            const int left = d->n - h->first, rows = h->rows < 64 ? h->rows : 64;
            moei_named_barrier(2 + consumer, 64);
            if (part == 0 && moe_lane() == 0)
                moei_done_count(d, h->row, h->row + rows, left < 256 ? left : 256);
        }
        moei_barrier_arrive(s->stored + consumer);
    }
}

#endif
#endif
