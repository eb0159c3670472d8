/* consume.cuh: a consumer of the Hopper grouped GEMM: a warpgroup that multiplies 64 rows of each
   tile by 256 rows of B, applies bias and activation to its accumulators, rounds and stores.

   Stores are deferred: rounded results wait in registers, and each of the next tile's first steps
   stores a part of them while the tensor cores work. So a tile's end costs bias, activation and
   rounding alone. fp32 results, which have no room to wait, and transposed ones are stored at once.
   The results of a gradient are handed over to warps that compute and store it (gradient.cuh).

   Where a thread's accumulators belong: ptx.cuh. With gate and up, accumulator i < 64 is a gate, and
   64 + i its up. */
#ifndef MOE_GEMM_WGMMA_CONSUME_CUH
#define MOE_GEMM_WGMMA_CONSUME_CUH

#include "../../activation.cuh"
#include "../flags.cuh"
#include "gradient.cuh"
#include "store.cuh"

#if MOEI_WGMMA_HERE

/* The step of depths i, i + 1, ... of a tile: starts the products of the stage. consumer: 0 or 1.
   With the fourth warpgroup of a gradient a thread has 128 registers for the compiler, and a product
   at most 128 columns. */
MOE_DEVICE void moei_wgmma_start_step(float acc[128], moei_wgmma_ring* r, int consumer, int i,
                                      const int gathered, const int gradient,
                                      const moe_gemm_shape f)
{
    const unsigned char* stage = r->stages + r->stage * MOEI_WGMMA_STAGE;
    const uint64_t a = moei_wgmma_operand(stage + consumer * MOEI_WGMMA_A_HALF, f.a_major);
    const uint64_t b = moei_wgmma_operand(stage + 2 * MOEI_WGMMA_A_HALF, f.b_major);
    moei_barrier_wait(r->s->full + r->stage, r->parity);
    if (gathered) moei_wgmma_sees_copies();
    moei_wgmma_begin();
    MOE_UNROLL
    for (int k = 0; k < 4; ++k) {
        const uint64_t ak = a + k * moei_wgmma_advance(f.a_major);
        const uint64_t bk = b + k * moei_wgmma_advance(f.b_major);
        if (gradient) {
            moei_wgmma_128(acc, ak, bk, i > 0 || k > 0, f);
            moei_wgmma_128(acc + 64, ak, bk + (MOEI_WGMMA_B_HALF >> 4), i > 0 || k > 0, f);
        } else {
            moei_wgmma(acc, ak, bk, i > 0 || k > 0, f);
        }
    }
    moei_wgmma_commit();
}

/* Ends the step of depths i, ...: releases the stage of the step before, whose products are complete
   after the wait. */
MOE_DEVICE void moei_wgmma_end_step(moei_wgmma_ring* r, int i)
{
    moei_wgmma_wait(1);
    if (i > 0) moei_wgmma_release(r, moei_wgmma_before(r));
    moei_wgmma_next(r);
}

/* Releases the stages of a tile, of k depths, of which the consumer has no row. */
MOE_DEVICE void moei_wgmma_skip(moei_wgmma_ring* r, int k)
{
    for (int i = 0; i < k; i += 64) {
        moei_barrier_wait(r->s->full + r->stage, r->parity);
        __syncwarp(MOE_FULL_WARP); /* all lanes have seen the phase, which may end now */
        moei_wgmma_release(r, r->stage);
        moei_wgmma_next(r);
    }
}

/* Where a thread's accumulators go: rows r and r + 8, every 8 columns two neighbouring ones.
   Accumulators from 64 on are ups where gated, else those from column 128 on. */
typedef struct moei_wgmma_target {
    char* c;              /* address of row r, first column */
    int64_t below, right; /* bytes to 8 rows on, to the next column */
    int rows;             /* the tile's rows from r on */
    int columns;          /* columns of C from the first one on */
} moei_wgmma_target;

/* Returns where the results of *p go. */
MOE_DEVICE moei_wgmma_target moei_wgmma_target_of(const moei_wgmma_pending* p,
                                                  const moe_gemm_output* o, const int transposed)
{
    const int quad = moe_lane() & 3, line = moe_lane() >> 2, before = quad * 6;
    const int bytes = o->dtype == MOE_FP32 ? 4 : 2;
    moei_wgmma_target t;
    t.c = p->c - before * bytes;
    if (transposed) t.c = p->c + (2 * quad - line) * (o->stride - 1) * bytes;
    t.below = (transposed ? 1 : o->stride) * 8 * bytes;
    t.right = (transposed ? o->stride : 1) * bytes;
    t.rows = p->rows;
    t.columns = p->columns + before;
    return t;
}

/* Adds the bias to the accumulators. */
MOE_DEVICE void moei_wgmma_add_bias(float acc[128], const moe_gemm_output* o, int64_t expert, int n,
                                    const moei_wgmma_pending* p, const int dtype)
{
    int columns = moei_wgmma_target_of(p, o, 0).columns;
    const int column = n - columns; /* the first one */
    const int apart = o->gated == MOE_GATE_UP_INTERLEAVED ? 2 : 1;
    const uint16_t* at =
        (const uint16_t*)o->bias + expert * n * (o->gated ? 2 : 1) + (int64_t)column * apart;
    MOE_UNROLL
    for (int half = 0; half < 128; half += 64) {
        MOE_UNROLL
        for (int j = 0; j < 16; ++j) {
            float* v = acc + half + 4 * j;
            if (8 * j < columns) {
                const float first = moe_half_to_f32(at[8 * j * apart], dtype);
                const float second = moe_half_to_f32(at[(8 * j + 1) * apart], dtype);
                v[0] += first, v[1] += second, v[2] += first, v[3] += second;
            }
        }
        at += !o->gated ? 128 : apart == 2 ? 1 : n;
        if (!o->gated) columns -= 128;
    }
}

/* Adds C to the results, 64 or, not gated, 128. */
MOE_DEVICE void moei_wgmma_add_c(float acc[128], const moe_gemm_output* o,
                                 const moei_wgmma_target* t)
{
    MOE_UNROLL
    for (int i = 0; i < 64; ++i) { /* columns from i / 2 * 8 on, row r or r + 8 */
        const char* at = t->c + i % 2 * t->below + i / 2 * 8 * t->right;
        if (i / 2 * 8 < t->columns && t->rows > i % 2 * 8 && !(o->gated && i >= 32)) {
            acc[2 * i] += moe_load_f32(at, 0, o->dtype);
            acc[2 * i + 1] += moe_load_f32(at + t->right, 0, o->dtype);
        }
    }
}

/* Stores fp32 results; transposed, a literal: neighbouring columns are apart. */
MOE_DEVICE void moei_wgmma_store_f32(const float acc[128], const moe_gemm_output* o,
                                     const moei_wgmma_target* t, const int transposed)
{
    MOE_UNROLL
    for (int i = 0; i < 64; ++i) {
        char* at = t->c + i % 2 * t->below + i / 2 * 8 * t->right;
        if (i / 2 * 8 < t->columns && t->rows > i % 2 * 8 && !(o->gated && i >= 32)) {
            if (transposed) {
                *(float*)at = acc[2 * i];
                *(float*)(at + t->right) = acc[2 * i + 1];
            } else {
                *(float2*)at = make_float2(acc[2 * i], acc[2 * i + 1]);
            }
        }
    }
}

/* Stores what the activation is applied to: 128 gates and 128 ups, or 256 columns. row: of the
   thread's first accumulator. */
MOE_DEVICE void moei_wgmma_store_pre(const float acc[128], const moei_wgmma_pending* p,
                                     const moe_gemm_output* o, int64_t row, int n, const int dtype)
{
    const int column = n - p->columns; /* the lane's first of 8, in each 32 columns */
    const int64_t below = o->pre_stride * 16;
    char* at = (char*)o->pre + (row * o->pre_stride + column) * 2;
    MOE_UNROLL
    for (int g = 0; g < 8; ++g) {
        const int first = o->gated ? g % 4 * 32 : g * 32;
        char* to = at + (first + (o->gated && g >= 4 ? n : 0)) * 2;
        uint32_t x[8];
        moei_wgmma_round(x, acc, g, dtype);
        moei_quad_transpose(x);
        moei_quad_transpose(x + 4);
        if (p->columns > first) {
            if (p->rows > 0) moei_store16(to, make_uint4(x[0], x[1], x[2], x[3]));
            if (p->rows > 8) moei_store16(to + below, make_uint4(x[4], x[5], x[6], x[7]));
        }
    }
}

/* Applies SwiGLU to gates v [32] and their ups v [64 .. 95]: v becomes the activation. Four gates of
   one row share a reciprocal; four that cannot have one each, so a row's bits do not depend on the
   thread's other row. */
MOE_DEVICE void moei_wgmma_swiglu_32(float* v)
{
    float s[32];
    bool apart = false;
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const float* g = v + i / 2 * 8 + i % 2 * 2; /* of row r, or r + 8 */
        const float gate[4] = {g[0], g[1], g[4], g[5]};
        const bool no = moei_silu_4(s + 4 * i, gate);
        apart = apart || no;
    }
    if (apart) {
        MOE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const float* g = v + i / 2 * 8 + i % 2 * 2;
            const float gate[4] = {g[0], g[1], g[4], g[5]};
            if (moei_silu_4(s + 4 * i, gate)) {
                MOE_UNROLL
                for (int j = 0; j < 4; ++j)
                    s[4 * i + j] = moei_sigmoid_unit(gate[j], MOEI_MINUS_LOG2E);
            }
        }
    }
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        float* g = v + i / 2 * 8 + i % 2 * 2;
        g[0] = s[4 * i] * g[64];
        g[1] = s[4 * i + 1] * g[65];
        g[4] = s[4 * i + 2] * g[68];
        g[5] = s[4 * i + 3] * g[69];
    }
}

/* Applies the activation. */
MOE_DEVICE void moei_wgmma_activate(float acc[128], const moe_gemm_output* o)
{
    const bool gated = o->gated != 0;
    if (o->activation == MOE_ACTIVATION_SWIGLU) {
        moei_wgmma_swiglu_32(acc);
        moei_wgmma_swiglu_32(acc + 32);
    } else if (o->activation != MOE_ACTIVATION_NONE) {
        const moei_activation a = moei_activation_of(o->activation, o->alpha, o->limit);
        MOE_NO_UNROLL
        for (int half = gated; half < 2; ++half) { /* not gated: both halves, in turn */
            MOE_UNROLL
            for (int j = 0; j < 64; j += 32) moei_activate(acc + j, acc + 64 + j, 32, &a, gated);
            if (!gated) {
                MOE_UNROLL
                for (int j = 0; j < 64; ++j) {
                    const float v = acc[j];
                    acc[j] = acc[64 + j];
                    acc[64 + j] = v;
                }
            }
        }
    }
}

/* Ends a tile: adds the bias, stores what the activation is applied to where the caller wants it,
   applies the activation, adds C where results are added to it; rounds the results into *p, or
   stores fp32 ones. */
MOE_DEVICE void moei_wgmma_finish(moei_wgmma_pending* p, float acc[128], const moe_gemm_output* o,
                                  int expert, int row, int n, const moe_gemm_shape f)
{
    p->groups = o->gated ? 4 : 8;
    p->next = o->dtype == MOE_FP32 ? p->groups : 0;
    if (o->activation == MOE_ACTIVATION_NONE && !o->bias && !o->pre && !o->accumulate &&
        o->dtype != MOE_FP32) { /* the least work: first */
        MOE_UNROLL
        for (int g = 0; g < 8; ++g) moei_wgmma_round(p->x + 8 * g, acc, g, f.dtype);
        return;
    }
    if (f.a_major == MOE_MAJOR_K) { /* k-grouped products have none of these */
        if (o->bias) moei_wgmma_add_bias(acc, o, expert, n, p, f.dtype);
        if (o->pre) moei_wgmma_store_pre(acc, p, o, row, n, f.dtype);
        moei_wgmma_activate(acc, o);
    }
    if (o->accumulate || o->dtype == MOE_FP32) {
        const moei_wgmma_target to = moei_wgmma_target_of(p, o, 0);
        if (o->accumulate) moei_wgmma_add_c(acc, o, &to);
        if (o->dtype == MOE_FP32) moei_wgmma_store_f32(acc, o, &to, 0);
    }
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) moei_wgmma_round(p->x + 8 * g, acc, g, f.dtype);
    if (o->gated) { /* not stored; without values they would take registers until here */
        MOE_UNROLL
        for (int i = 32; i < 64; ++i) p->x[i] = 0;
    } else {
        MOE_UNROLL
        for (int g = 4; g < 8; ++g) moei_wgmma_round(p->x + 8 * g, acc, g, f.dtype);
    }
}

/* Ends a tile of C's transpose: adds C where results are added to it, stores at once. */
MOE_DEVICE void moei_wgmma_finish_transposed(moei_wgmma_pending* p, float acc[128],
                                             const moe_gemm_output* o, const int dtype)
{
    const moei_wgmma_target to = moei_wgmma_target_of(p, o, 1);
    if (o->accumulate) moei_wgmma_add_c(acc, o, &to);
    if (o->dtype == MOE_FP32) {
        moei_wgmma_store_f32(acc, o, &to, 1);
    } else {
        MOE_UNROLL
        for (int i = 0; i < 64; ++i) { /* a lane stores two rows of one of 8 columns */
            const uint32_t x = moei_transpose_matrix(moe_pack2(acc[2 * i], acc[2 * i + 1], dtype));
            if (i / 2 * 8 < to.columns && to.rows > i % 2 * 8)
                *(uint32_t*)(p->c + i % 2 * to.below + i / 2 * 8 * to.right) = x;
        }
    }
    p->next = p->groups = 0;
    MOE_UNROLL
    for (int i = 0; i < 64; ++i) p->x[i] = 0; /* else they would take registers until here */
}

/* Counts what was pending, all of which is stored. The warpgroup calls it. */
MOE_DEVICE void moei_wgmma_count(const moe_grouped_gemm_args* d, const moei_wgmma_pending* p,
                                 int consumer)
{
    const bool counts = threadIdx.x % 128 == 0; /* has the consumer's first row and column */
    if (counts) moei_tensor_store_wait();
    moei_named_barrier(2 + consumer, 128);
    if (counts) {
        const int row = p->boxed >= 0 ? p->boxed : ~p->boxed, columns = 32 * p->groups;
        moei_done_count(d, row, row + (p->rows < 64 ? p->rows : 64),
                        p->columns < columns ? p->columns : columns);
    }
    __syncwarp(MOE_FULL_WARP);
}

/* A consumer. For each tile:
     1. multiply the steps; during each of the first ones store 32 columns of the tile before, in
        short tiles 64; count the tile before
     2. release the last stage
     3. finish: bias, activation, rounding; or store a transpose; or hand P of a gradient over
   A consumer without rows of the tile releases the stages. At the end stores and counts what is
   pending. */
MOE_DEVICE void moei_wgmma_consume(const moei_wgmma_args* a, moei_wgmma_ring r,
                                   int consumer, const int gathered, const int gradient,
                                   const moe_gemm_shape f)
{
    const moe_grouped_gemm_args* d = &a->d;
    const int by_depth = f.a_major == MOE_MAJOR_MN; /* k-grouped */
    const int boxes = gathered || by_depth || gradient ? 0 : a->boxes;
    const int transposed = gathered && by_depth ? a->transposed : 0;
    const int counts = !by_depth && !gradient && d->done != 0;
    const int warp = moe_warp() % 4, line = consumer * 64 + warp * 16 + (moe_lane() >> 2);
    int hand_overs = 0; /* of a gradient */
    moei_wgmma_pending p;
    p.c = 0;
    p.rows = p.columns = 0;
    p.next = p.groups = 0;
    p.boxed = -1;
    MOE_UNROLL
    for (int i = 0; i < 64; ++i) p.x[i] = 0;
    for (int turn = 0;; ++turn) {
        const moei_wgmma_tile* t = r.s->position + turn % MOEI_WGMMA_ENTRIES;
        int rows, depths;
        moei_barrier_wait(r.s->full + r.stage, r.parity);
        /* a shuffle: the compiler must know that the branches are uniform */
        rows = __shfl_sync(MOE_FULL_WARP, t->expert < 0 ? -1 : moei_wgmma_rows(t), 0);
        if (rows < 0) break;
        depths = gathered && !by_depth ? d->k : __shfl_sync(MOE_FULL_WARP, t->steps, 0) * 64;
        if (rows > consumer * 64) {
            float acc[128];
            int i = 0;
            MOE_NO_UNROLL
            for (; !gradient && p.next < p.groups && i < depths; i += 64) { /* 1. */
                moei_wgmma_start_step(acc, &r, consumer, i, gathered, gradient, f);
                moei_wgmma_store_part(&p, a, &r, consumer, depths, boxes);
                moei_wgmma_end_step(&r, i);
            }
            MOE_NO_UNROLL
            while (!gradient && p.next < p.groups)
                moei_wgmma_store_part(&p, a, &r, consumer, depths, boxes);
            if (counts) moei_wgmma_count(d, &p, consumer);
            if (!gradient) {
                p.boxed = __shfl_sync(MOE_FULL_WARP, t->row, 0) + consumer * 64;
                if (!boxes || rows < consumer * 64 + 64) p.boxed = ~p.boxed;
                moei_wgmma_aim(&p, &d->c, t, a->c_expert_bytes, t->row + line, rows - line,
                               t->first, d->n, transposed);
            }
            MOE_NO_UNROLL
            for (; i < depths; i += 64) {
                moei_wgmma_start_step(acc, &r, consumer, i, gathered, gradient, f);
                moei_wgmma_end_step(&r, i);
            }
            moei_wgmma_wait(0); /* 2. */
            moei_wgmma_settle(acc);
            moei_wgmma_release(&r, moei_wgmma_before(&r));
            if (transposed) moei_wgmma_finish_transposed(&p, acc, &d->c, f.dtype); /* 3. */
            else if (gradient)
                moei_wgmma_hand_over(d, r.s, consumer, hand_overs++, acc, t->row + consumer * 64,
                                     rows - consumer * 64, t->first);
            else moei_wgmma_finish(&p, acc, &d->c, t->expert, t->row + line, d->n, f);
        } else {
            moei_wgmma_skip(&r, depths);
        }
    }
    if (gradient) moei_wgmma_hand_end(r.s, consumer, hand_overs);
    MOE_NO_UNROLL
    while (!gradient && p.next < p.groups) moei_wgmma_store_part(&p, a, &r, consumer, 0, boxes);
    if (counts) moei_wgmma_count(d, &p, consumer);
    if (boxes && threadIdx.x % 128 == 0) moei_tensor_store_wait();
}

#endif
#endif
