/* gradient.cuh: the backward pass through an activation on Hopper: from a consumer's accumulators
   to C, act and dot (gemm/gradient.cuh). Called by consume.cuh and tile.cuh.

   A fourth warpgroup computes it, so that the tensor cores go on with the next tile. At the end of
   a tile a consumer hands P of its 64 rows over where act will stand (gradient.hand): L2 holds it,
   and the ring keeps all of shared memory. Two warps take it: one has the even rows, the other the odd
   ones. A lane has 8 neighbouring columns of a row, 16 bytes of P, of gates, of ups and of act; a
   warp 256 columns, a row of the tile. P and pre of the next rows are loaded meanwhile.

   P is handed over in 16 bits, as fp16 times a power of two for each row of a tile: the largest
   finite number of the row has exponent 14. So P is rounded to 11 bits; numbers below 2^-28 of the
   largest have an error of at most 2^-39 of it. */
#ifndef MOE_GEMM_WGMMA_GRADIENT_CUH
#define MOE_GEMM_WGMMA_GRADIENT_CUH

#include "../flags.cuh"
#include "../gradient.cuh"
#include "store.cuh"

#define MOEI_WGMMA_HAND_AHEAD 2 /* rows of P that a warp loads ahead */

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
   first row; rows: from it on; first: first column. The warpgroup calls it.
     1. find the scales of the thread's two rows
     2. store P, 32 columns at a time
     3. wait until the rows handed over before are stored; write the scales */
MOE_DEVICE void moei_wgmma_hand_over(const moe_grouped_gemm_args* d, moei_wgmma_shared* s,
                                     int consumer, int turn, float acc[128], int row, int rows,
                                     int first)
{
    const moe_gemm_gradient* o = &d->gradient;
    const int line = moe_warp() % 4 * 16 + (moe_lane() >> 2), quad = moe_lane() & 3;
    const int columns = d->n - first - quad * 8;
    uint16_t* to = o->hand + (row + line) * o->hand_stride + first + quad * 8;
    moei_wgmma_handed* h = s->hand + consumer;
    float scale[2] = {moei_wgmma_largest(acc, 0, 0), moei_wgmma_largest(acc, 1, 0)}; /* 1. */
    if (__any_sync(MOE_FULL_WARP, fmaxf(scale[0], scale[1]) == INFINITY)) {
        scale[0] = moei_wgmma_largest(acc, 0, 1);
        scale[1] = moei_wgmma_largest(acc, 1, 1);
    }
    scale[0] = moei_wgmma_scale(scale[0]), scale[1] = moei_wgmma_scale(scale[1]);
    MOE_UNROLL
    for (int g = 0; g < 8; ++g) { /* 2. */
        uint32_t x[8];
        MOE_UNROLL
        for (int i = 0; i < 16; ++i) acc[16 * g + i] *= scale[i >> 1 & 1];
        moei_wgmma_round(x, acc, g, MOE_FP16);
        moei_quad_transpose(x);
        moei_quad_transpose(x + 4);
        if (columns <= 32 * g) continue;
        if (line < rows) moei_store16(to + 32 * g, make_uint4(x[0], x[1], x[2], x[3]));
        if (line + 8 < rows)
            moei_store16(to + 8 * o->hand_stride + 32 * g, make_uint4(x[4], x[5], x[6], x[7]));
    }
    moei_barrier_wait(s->stored + consumer, (turn & 1) ^ 1); /* 3. */
    if ((moe_lane() & 3) == 0) {
        h->unit[line] = moei_wgmma_inverse(scale[0]);
        h->unit[line + 8] = moei_wgmma_inverse(scale[1]);
    }
    if (threadIdx.x % 128 == 0) h->row = row, h->rows = rows, h->first = first;
    moei_barrier_arrive(s->handed + consumer);
}

/* Tells the warps that there are no more tiles. The warpgroup calls it. */
MOE_DEVICE void moei_wgmma_hand_end(moei_wgmma_shared* s, int consumer, int turn)
{
    moei_barrier_wait(s->stored + consumer, (turn & 1) ^ 1);
    if (threadIdx.x % 128 == 0) s->hand[consumer].rows = 0;
    moei_barrier_arrive(s->handed + consumer);
}

/* ---- the fourth warpgroup ---- */

/* Loads the vector of a row that is `there` from *from, and moves *from on to the row after the
   next. Otherwise sets zeros. */
MOE_DEVICE void moei_wgmma_load_hand(uint32_t word[4], const uint16_t** from, int64_t stride,
                                     bool there)
{
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) word[i] = 0;
    if (there) moei_gradient_load_words(word, *from, 4);
    *from += 2 * stride;
}

/* Replaces a row's vector of pre and P, in units of `unit`, by those of C and act. Returns the sum of
   P activation(v, u). */
MOE_DEVICE float moei_wgmma_vector(moei_gradient_pre* pre, const moe_grouped_gemm_args* d,
                                   float unit, float weight, int activation, const int dtype)
{
    const moei_gradient_activation g = moei_gradient_activation_of(d, activation);
    float v[8];
    MOE_UNROLL
    for (int j = 0; j < 4; ++j) {
        const float2 two = moe_unpack2(pre->act[j], MOE_FP16);
        v[2 * j] = two.x, v[2 * j + 1] = two.y;
    }
    return unit * moei_gradient_words(pre, v, 0, 4, unit, weight, 0.0f, &g, dtype);
}

/* Computes and stores the rows that a consumer has handed over: rows `part`, part + 2, ... Lane i
   holds what belongs to row 2 i + part. The whole warp calls it. activation: that of *d or a literal
   of the same value. ahead: rows of pre that are loaded ahead, 2 or 3, a literal. */
MOE_DEVICE void moei_wgmma_gradient_rows(const moe_grouped_gemm_args* d, const moei_wgmma_handed* h,
                                         int part, int activation, const int ahead, const int dtype)
{
    const moe_gemm_gradient* o = &d->gradient;
    const int lane = moe_lane(), own = 2 * lane + part, column = h->first + 8 * lane;
    const int rows = h->rows < 64 ? h->rows : 64, count = (rows - part + 1) / 2;
    const int64_t first = h->row + part, parts = (d->n + 63) / 64;
    const moei_gradient_row mine = moei_gradient_row_of(d, h->row + own, own < rows);
    const unsigned reads = __ballot_sync(MOE_FULL_WARP, mine.read);
    const bool inside = column < d->n;
    const uint16_t* from = (const uint16_t*)d->c.pre + first * d->c.pre_stride + column;
    const uint16_t* hand = o->hand + first * o->hand_stride + column;
    uint16_t* c = (uint16_t*)d->c.base + first * d->c.stride + column;
    uint16_t* act = o->act ? (uint16_t*)o->act + first * o->act_stride + column : c;
    float* dot = 0;
    moei_gradient_pre pre[3]; /* of row i in i % ahead; act holds P before the row's turn */
    if (o->dot && inside && lane % 8 == 0) dot = o->dot + first * parts + column / 64;
    MOE_UNROLL
    for (int j = 0; j < ahead; ++j, from += 2 * d->c.pre_stride)
        pre[j] = moei_gradient_load_at(d, from, inside && j < count && (reads >> j & 1), 4);
    MOE_UNROLL
    for (int j = 0; j < MOEI_WGMMA_HAND_AHEAD; ++j)
        moei_wgmma_load_hand(pre[j].act, &hand, o->hand_stride, inside && j < count);
    MOE_NO_UNROLL
    for (int i0 = 0; i0 < count; i0 += ahead) {
        MOE_UNROLL
        for (int j = 0; j < ahead; ++j) {
            const int i = i0 + j, next = i + ahead;
            const float weight = __shfl_sync(MOE_FULL_WARP, mine.weight, i);
            float sum;
            if (i >= count) break;
            sum = moei_wgmma_vector(pre + j, d, h->unit[2 * i + part], weight, activation, dtype);
            if (inside) moei_gradient_store_at(d, c, act, pre + j, 4);
            c += 2 * d->c.stride;
            act += 2 * o->act_stride;
            if (o->dot) { /* 8 lanes have 64 columns */
                sum = moe_warp_sum(inside ? sum : 0.0f, 8);
                if (dot) *dot = sum, dot += 2 * parts;
            }
            pre[j] =
                moei_gradient_load_at(d, from, inside && next < count && (reads >> next & 1), 4);
            from += 2 * d->c.pre_stride;
            moei_wgmma_load_hand(pre[(j + MOEI_WGMMA_HAND_AHEAD) % ahead].act, &hand,
                                 o->hand_stride, inside && i + MOEI_WGMMA_HAND_AHEAD < count);
        }
    }
}

/* The fourth warpgroup: warps 2 i and 2 i + 1 of it take what consumer i hands over. SwiGLU has code
   of its own, without branches. ahead: as above. */
MOE_DEVICE void moei_wgmma_compute(const moe_grouped_gemm_args* d, moei_wgmma_shared* s,
                                   const int ahead, const int dtype)
{
    const int consumer = moe_warp() % 4 / 2, part = moe_warp() % 2;
    const moei_wgmma_handed* h = s->hand + consumer;
    for (int turn = 0;; ++turn) {
        moei_barrier_wait(s->handed + consumer, turn & 1);
        if (h->rows == 0) break;
        if (d->c.activation == MOE_ACTIVATION_SWIGLU)
            moei_wgmma_gradient_rows(d, h, part, MOE_ACTIVATION_SWIGLU, ahead, dtype);
        else moei_wgmma_gradient_rows(d, h, part, d->c.activation, ahead, dtype);
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
