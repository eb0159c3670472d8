/* consume.cuh: a consumer of the Hopper grouped GEMM: a warpgroup that multiplies 64 rows of each
   tile by 256 rows of B, applies bias and activation to its accumulators, rounds and stores.

   Stores are deferred: rounded results wait in registers, and each of the next tile's first steps
   stores a part of them while the tensor cores work. So a tile's end costs bias, activation and
   rounding alone. fp32 results, which have no room to wait, are stored at once.

   Where a thread's accumulators belong: ptx.cuh. With gate and up, accumulator i < 64 is a gate, and
   64 + i its up. */
#ifndef MOE_GEMM_WGMMA_CONSUME_CUH
#define MOE_GEMM_WGMMA_CONSUME_CUH

#include "../../activation.cuh"
#include "ring.cuh"

#if MOEI_WGMMA_HERE

/* Rounded results of a warp's 16 rows that are still to be stored. */
typedef struct moei_wgmma_pending {
    uint32_t x[64]; /* pairs of columns: [groups of 32 columns][rows r, r + 8][4] */
    char* c;        /* address of row r, column `column` of C */
    int rows;       /* the tile's rows from r on: more than 0: row r exists, more than 8: r + 8 */
    int columns;    /* columns of C from `column` on */
    int groups;     /* groups of 32 columns that are pending, 0 .. 8 */
} moei_wgmma_pending;

/* Exchanges registers within four lanes 4 q .. 4 q + 3: x[j] of lane i becomes x[i] of lane j. The
   whole warp calls it. */
MOE_DEVICE void moei_quad_transpose(uint32_t x[4])
{
    const bool odd = (moe_lane() & 1) != 0, high = (moe_lane() & 2) != 0;
    MOE_UNROLL
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(MOE_FULL_WARP, odd ? x[i] : x[i + 1], 1);
        if (odd) x[i] = got;
        else x[i + 1] = got;
    }
    MOE_UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint32_t got = __shfl_xor_sync(MOE_FULL_WARP, high ? x[i] : x[i + 2], 2);
        if (high) x[i] = got;
        else x[i + 2] = got;
    }
}

/* Stores the first 32 of the pending columns, 16 bytes a lane and row, and moves the others up.
   below: bytes to 8 rows on. */
MOE_DEVICE void moei_wgmma_store_next(moei_wgmma_pending* p, int64_t below)
{
    moei_quad_transpose(p->x);
    moei_quad_transpose(p->x + 4);
    if (p->columns > 0) {
        if (p->rows > 0) moei_store16(p->c, make_uint4(p->x[0], p->x[1], p->x[2], p->x[3]));
        if (p->rows > 8) moei_store16(p->c + below, make_uint4(p->x[4], p->x[5], p->x[6], p->x[7]));
    }
    p->c += 64;
    p->columns -= 32;
    --p->groups;
    MOE_UNROLL
    for (int i = 0; i < 56; ++i) p->x[i] = p->x[i + 8];
}

/* One step: starts the products of the stage, then releases the stage of the step before, which is
   `*before`: its products are complete. consumer: 0 or 1. */
MOE_DEVICE void moei_wgmma_step(float acc[128], moei_wgmma_ring* r, int consumer, bool first,
                                int* before, bool copies, const int dtype)
{
    const unsigned char* stage = r->stages + r->stage * MOEI_WGMMA_STAGE;
    const uint64_t a = moei_wgmma_operand(stage + consumer * MOEI_WGMMA_HALF);
    const uint64_t b = moei_wgmma_operand(stage + 2 * MOEI_WGMMA_HALF);
    moei_barrier_wait(r->s->full + r->stage, r->parity);
    moei_wgmma_sees_copies(copies);
    moei_wgmma_begin();
    MOE_UNROLL
    for (int k = 0; k < 4; ++k) moei_wgmma(acc, a + k * 2, b + k * 2, !first || k > 0, dtype);
    moei_wgmma_commit();
    moei_wgmma_wait(1);
    if (!first && moe_lane() == 0) moei_barrier_arrive(r->s->empty + *before);
    *before = r->stage;
    moei_wgmma_next(r);
}

/* Releases the stages of a tile of which the consumer has no row. */
MOE_DEVICE void moei_wgmma_skip(moei_wgmma_ring* r, int steps)
{
    for (int i = 0; i < steps; ++i) {
        moei_barrier_wait(r->s->full + r->stage, r->parity);
        __syncwarp(MOE_FULL_WARP); /* all lanes have seen the phase, which may end now */
        if (moe_lane() == 0) moei_barrier_arrive(r->s->empty + r->stage);
        moei_wgmma_next(r);
    }
}

/* Where a thread's accumulators go: rows r and r + 8, pairs of columns 8 apart. */
typedef struct moei_wgmma_target {
    char* c;       /* address of row r, first pair */
    int64_t below; /* bytes to 8 rows on */
    int rows;      /* the tile's rows from r on */
    int columns;   /* columns of C from the first pair on */
    int column;    /* of the first pair */
    int expert;
} moei_wgmma_target;

/* Adds bias, applies the activation, adds C, stores fp32: of 32 accumulators v of a thread, 4 pairs
   of columns from pair `pair` on, in rows r and r + 8; v[16 ..]: their ups, or not gated the pairs
   128 columns on. */
MOE_DEVICE void moei_wgmma_finish_part(float v[32], const moe_gemm_output* o,
                                       const moei_wgmma_target* t, int pair, int n, const int dtype)
{
    const bool gated = o->gated != 0, pairs = o->gated == MOE_GATE_UP_INTERLEAVED;
    const int bytes = o->dtype == MOE_FP32 ? 4 : 2;
    if (o->bias) {
        const uint16_t* bias = (const uint16_t*)o->bias + (int64_t)t->expert * n * (gated ? 2 : 1);
        MOE_UNROLL
        for (int j = 0; j < 8; ++j) {
            const int x = (pair + j % 4) * 8 + (j >= 4 && !gated ? 128 : 0), step = pairs ? 2 : 1;
            const uint16_t* at = bias + (int64_t)(t->column + x) * step;
            if (gated && j >= 4) at += pairs ? 1 : n;
            if (x < t->columns) {
                const float first = moe_half_to_f32(at[0], dtype);
                const float second = moe_half_to_f32(at[step], dtype);
                v[4 * j] += first, v[4 * j + 1] += second;
                v[4 * j + 2] += first, v[4 * j + 3] += second;
            }
        }
    }
    if (o->activation != MOE_ACTIVATION_NONE) {
        const moei_activation a = moei_activation_of(o->activation, o->alpha, o->limit);
        moei_activate_8(v, v + 16, &a, gated);
        moei_activate_8(v + 8, v + 24, &a, gated);
        if (!gated) {
            moei_activate_8(v + 16, v, &a, false);
            moei_activate_8(v + 24, v, &a, false);
        }
    }
    MOE_UNROLL
    for (int i = 0; i < 16; ++i) { /* pair i / 2, row r or r + 8 */
        const int x = (pair + i / 2 % 4) * 8 + (i >= 8 ? 128 : 0);
        char* at = t->c + i % 2 * t->below + x * bytes;
        if (x < t->columns && t->rows > i % 2 * 8 && !(gated && i >= 8)) {
            if (o->accumulate) {
                v[2 * i] += moe_load_f32(at, 0, o->dtype);
                v[2 * i + 1] += moe_load_f32(at, 1, o->dtype);
            }
            if (bytes == 4) *(float2*)at = make_float2(v[2 * i], v[2 * i + 1]);
        }
    }
}

/* Ends a tile: bias, activation, C where results are added to it; then rounds the results into *p,
   or stores fp32 ones. row: of this thread's first accumulator; rows: the tile's rows from it on;
   column: first of the tile.
     1. plain: no bias, C overwritten, 16-bit; no activation, or SwiGLU
     2. else a quarter of the accumulators at a time: the body stands once, and the accumulators
        move through it
     3. round into *p */
MOE_DEVICE void moei_wgmma_finish(moei_wgmma_pending* p, float acc[128],
                                  const moe_grouped_gemm_args* d, const moe_tile_position* t,
                                  int row, int rows, int column, const int dtype)
{
    const moe_gemm_output* o = &d->c;
    const int quad = moe_lane() & 3, bytes = o->dtype == MOE_FP32 ? 4 : 2;
    const bool gated = o->gated != 0, swiglu = o->activation == MOE_ACTIVATION_SWIGLU;
    char* c = o->table ? (char*)o->table[t->expert] - (int64_t)t->begin * o->stride * bytes
                       : (char*)o->base;
    c += ((int64_t)row * o->stride + column) * bytes;
    if (!o->bias && !o->accumulate && o->dtype != MOE_FP32 &&
        (swiglu || o->activation == MOE_ACTIVATION_NONE)) { /* 1. */
        if (swiglu) {
            MOE_UNROLL
            for (int i = 0; i < 64; ++i)
                acc[i] = moei_sigmoid_unit(acc[i], MOEI_MINUS_LOG2E) * acc[64 + i];
        }
    } else { /* 2. */
        moei_wgmma_target to;
        to.c = c + quad * 2 * bytes;
        to.below = o->stride * 8 * bytes;
        to.rows = rows;
        to.column = column + quad * 2;
        to.columns = d->n - to.column;
        to.expert = t->expert;
        MOE_NO_UNROLL
        for (int pair = 0; pair < 16; pair += 4) {
            float v[32];
            MOE_UNROLL
            for (int j = 0; j < 16; ++j) v[j] = acc[j], v[16 + j] = acc[64 + j];
            moei_wgmma_finish_part(v, o, &to, pair, d->n, dtype);
            MOE_UNROLL
            for (int j = 0; j < 48; ++j) acc[j] = acc[j + 16], acc[64 + j] = acc[80 + j];
            MOE_UNROLL
            for (int j = 0; j < 16; ++j) acc[48 + j] = v[j], acc[112 + j] = v[16 + j];
        }
    }
    p->groups = bytes == 4 ? 0 : gated ? 4 : 8; /* 3. */
    MOE_UNROLL
    for (int i = 0; i < 32; ++i) {
        const int at = i / 4 * 8 + i % 4;
        p->x[at] = moe_pack2(acc[4 * i], acc[4 * i + 1], dtype);
        p->x[at + 4] = moe_pack2(acc[4 * i + 2], acc[4 * i + 3], dtype);
    }
    p->c = c + quad * 16;
    p->rows = rows;
    p->columns = d->n - column - quad * 8;
}

/* A consumer. For each tile:
     1. multiply the steps; after each of the first ones store 32 columns of the tile before
     2. release the last stage
     3. finish: bias, activation, rounding
   A consumer without rows of the tile releases the stages. At the end stores what is pending. */
MOE_DEVICE void moei_wgmma_consume(const moei_wgmma_args* a, moei_wgmma_ring r,
                                   const moei_wgmma_tiles* w, int consumer, const int dtype)
{
    const moe_grouped_gemm_args* d = &a->d;
    const int warp = moe_warp() % 4, line = consumer * 64 + warp * 16 + (moe_lane() >> 2);
    const int64_t below = d->c.stride * 16;
    const bool copies = d->row_index != 0;
    moei_wgmma_pending p;
    p.c = 0;
    p.rows = p.columns = p.groups = 0;
    MOE_UNROLL
    for (int i = 0; i < 64; ++i) p.x[i] = 0;
    for (int turn = 0;; ++turn) {
        const moe_tile_position* t = r.s->position + (turn & 7);
        moei_barrier_wait(r.s->full + r.stage, r.parity);
        /* shuffles: the compiler must know that the branches are uniform */
        if (__shfl_sync(MOE_FULL_WARP, t->expert, 0) < 0) break;
        if (__shfl_sync(MOE_FULL_WARP, moei_wgmma_rows(t), 0) > consumer * 64) {
            float acc[128];
            int before = 0, i = 0;
            MOE_NO_UNROLL
            for (; p.groups > 0 && i < w->steps; ++i) { /* 1. */
                moei_wgmma_step(acc, &r, consumer, i == 0, &before, copies, dtype);
                moei_wgmma_store_next(&p, below);
            }
            MOE_NO_UNROLL
            while (p.groups > 0) moei_wgmma_store_next(&p, below);
            MOE_NO_UNROLL
            for (; i < w->steps; ++i)
                moei_wgmma_step(acc, &r, consumer, i == 0, &before, copies, dtype);
            moei_wgmma_wait(0); /* 2. */
            moei_wgmma_settle(acc);
            if (moe_lane() == 0) moei_barrier_arrive(r.s->empty + before);
            moei_wgmma_finish(&p, acc, d, t, t->row + line, moei_wgmma_rows(t) - line, /* 3. */
                              t->column * w->columns, dtype);
        } else {
            moei_wgmma_skip(&r, w->steps);
        }
    }
    if (moe_lane() == 0) moei_barrier_arrive(r.s->empty + r.stage);
    MOE_NO_UNROLL
    while (p.groups > 0) moei_wgmma_store_next(&p, below);
}

#endif
#endif
