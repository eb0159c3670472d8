/* gradient.cuh: the backward pass through an activation on Hopper: from a consumer's accumulators
   to C, act and dot (gemm/gradient.cuh). Called by consume.cuh and tile.cuh.

   A fourth warpgroup computes it, so that the tensor cores go on with the next tile. At the end of
   a tile a consumer hands P of its 64 rows over where act will stand (gradient.hand): L2 holds it,
   and the ring keeps most of shared memory. Two warps take it, half of the rows each. A lane has 8
   neighbouring columns of a row, 16 bytes of P, of gates, of ups and of act; a warp 256 columns, a
   row of the tile. Meanwhile tensor copies bring pre of later rows into shared memory, and P of
   later rows is loaded.

   P is handed over in 16 bits, as fp16 times a power of two for each row of a tile: the largest
   finite number of the row has exponent 14. So P is rounded to 11 bits; numbers below 2^-28 of the
   largest have an error of at most 2^-39 of it. */
#ifndef MOE_GEMM_WGMMA_GRADIENT_CUH
#define MOE_GEMM_WGMMA_GRADIENT_CUH

#include "../flags.cuh"
#include "../gradient.cuh"
#include "store.cuh"

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

/* Where pre of a warp's next rows stands. */
typedef struct moei_wgmma_fetch {
    const moei_tensor_map* map;
    unsigned char* box; /* [2][MOEI_WGMMA_PRE_BOX] */
    uint64_t* arrived;  /* [2]: a box is complete */
    int next, parity;   /* the box that is taken next, and the parity of its phase */
} moei_wgmma_fetch;

/* Starts to bring pre of rows from `row` on to box i. One thread calls it. */
MOE_DEVICE void moei_wgmma_fetch_box(const moei_wgmma_fetch* f, int i, int column, int row)
{
    moei_barrier_expect(f->arrived + i, MOEI_WGMMA_PRE_BOX);
    moei_tensor_load_halves(f->box + i * MOEI_WGMMA_PRE_BOX, f->map, column, row, f->arrived + i);
}

/* Sets the lane's vectors of pre from its gates at `from`; zeros where not `read`. */
MOE_DEVICE void moei_wgmma_take_row(moei_gradient_pre* pre, const unsigned char* from, bool read)
{
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) pre->gate[i] = pre->up[i] = 0;
    if (read) {
        moei_gradient_load_words(pre->gate, (const uint16_t*)from, 4);
        moei_gradient_load_words(pre->up, (const uint16_t*)(from + MOEI_WGMMA_PRE_ROW / 2), 4);
    }
}

/* Loads the vector of a row that is `there` from *from, and moves *from on to the next row.
   Otherwise sets zeros. */
MOE_DEVICE void moei_wgmma_load_hand(uint32_t word[4], const uint16_t** from, int64_t stride,
                                     bool there)
{
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) word[i] = 0;
    if (there) moei_gradient_load_words(word, *from, 4);
    *from += stride;
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

/* Computes and stores half `part` of the rows that a consumer has handed over. Lane i holds what
   belongs to row i of them. The whole warp calls it. activation: that of *d or a literal of the same
   value. all, a literal: 1: it is gated, and there are act and dot: code without branches. For each
   box of pre:
     1. wait until it has come
     2. take a row of it; with its last row start to bring the box two further on
     3. take P of the row, load that of a later one
     4. compute and store C, act and dot */
MOE_DEVICE void moei_wgmma_gradient_rows(const moe_grouped_gemm_args* d, const moei_wgmma_handed* h,
                                         moei_wgmma_fetch* f, int part, int activation,
                                         const int all, const int dtype)
{
    enum { BOX = MOEI_WGMMA_PRE_ROWS };
    const moe_gemm_gradient* o = &d->gradient;
    const bool gated = all || o->gated, acts = all || o->act != 0, dots = all || o->dot != 0;
    const int lane = moe_lane(), column = h->first + 8 * lane, parts = (d->n + 63) / 64;
    const int rows = h->rows < 64 ? h->rows : 64, half = (rows + 1) / 2, from = part * half;
    const int count = part ? rows - half : half, first = h->row + from;
    const moei_gradient_row mine = moei_gradient_row_of(d, first + lane, lane < count);
    const unsigned reads = __ballot_sync(MOE_FULL_WARP, mine.read);
    const bool inside = column < d->n, fetches = moei_elect();
    const bool sums = inside && lane % 8 == 0; /* 8 lanes have 64 columns */
    const uint16_t* hand = o->hand + first * o->hand_stride + column;
    uint16_t* c = (uint16_t*)d->c.base + first * d->c.stride + column;
    uint16_t* act = (uint16_t*)o->act + first * o->act_stride + column;
    float* dot = o->dot + (int64_t)first * parts + column / 64;
    uint32_t p[BOX][4]; /* P of row i in i % BOX */
    for (int i = 0; i < 2; ++i)
        if (fetches && i * BOX < count)
            moei_wgmma_fetch_box(f, f->next ^ i, h->first, first + i * BOX);
    MOE_UNROLL
    for (int i = 0; i < BOX; ++i)
        moei_wgmma_load_hand(p[i], &hand, o->hand_stride, inside && i < count);
    MOE_NO_UNROLL
    for (int i0 = 0; i0 < count; i0 += BOX) {
        const unsigned char* box = f->box + f->next * MOEI_WGMMA_PRE_BOX + lane * 16;
        moei_barrier_wait(f->arrived + f->next, f->parity); /* 1. */
        MOE_UNROLL
        for (int j = 0; j < BOX; ++j) {
            const int i = i0 + j;
            const float weight = __shfl_sync(MOE_FULL_WARP, mine.weight, i);
            moei_gradient_pre pre;
            float sum;
            if (i >= count) break;
            moei_wgmma_take_row(&pre, box + j * MOEI_WGMMA_PRE_ROW, reads >> i & 1); /* 2. */
            if (j == BOX - 1) {
                __syncwarp(MOE_FULL_WARP);
                if (fetches && i0 + 2 * BOX < count)
                    moei_wgmma_fetch_box(f, f->next, h->first, first + i0 + 2 * BOX);
            }
            MOE_UNROLL
            for (int q = 0; q < 4; ++q) pre.act[q] = p[j][q]; /* 3. */
            moei_wgmma_load_hand(p[j], &hand, o->hand_stride, inside && i + BOX < count);
            sum = moei_wgmma_vector(&pre, d, h->unit[from + i], weight, activation, dtype); /* 4. */
            if (inside) {
                moei_gradient_store_words(c, pre.gate, 4);
                if (gated) moei_gradient_store_words(c + d->n, pre.up, 4);
                if (acts) moei_gradient_store_words(act, pre.act, 4);
            }
            c += d->c.stride;
            act += o->act_stride;
            if (dots) {
                sum = moe_warp_sum(inside ? sum : 0.0f, 8);
                if (sums) *dot = sum;
                dot += parts;
            }
        }
        f->next ^= 1;
        f->parity ^= f->next ^ 1; /* after both boxes */
    }
}

/* The fourth warpgroup: warps 2 i and 2 i + 1 of it take what consumer i hands over. box:
   [4 warps][2][MOEI_WGMMA_PRE_BOX]. */
MOE_DEVICE void moei_wgmma_compute(const moei_wgmma_args* a, moei_wgmma_shared* s,
                                   unsigned char* box, const int dtype)
{
    const moe_grouped_gemm_args* d = &a->d;
    const int warp = moe_warp() % 4, consumer = warp / 2, part = warp % 2;
    const moei_wgmma_handed* h = s->hand + consumer;
    moei_wgmma_fetch f;
    f.map = &a->c;
    f.box = box + warp * 2 * MOEI_WGMMA_PRE_BOX;
    f.arrived = s->arrived[warp];
    f.next = f.parity = 0;
    for (int turn = 0;; ++turn) {
        moei_barrier_wait(s->handed + consumer, turn & 1);
        if (h->rows == 0) break;
        if (d->c.activation == MOE_ACTIVATION_SWIGLU && d->gradient.act && d->gradient.dot)
            moei_wgmma_gradient_rows(d, h, &f, part, MOE_ACTIVATION_SWIGLU, 1, dtype);
        else moei_wgmma_gradient_rows(d, h, &f, part, d->c.activation, 0, dtype);
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
