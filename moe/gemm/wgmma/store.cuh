/* store.cuh: stores of the Hopper grouped GEMM: rounded results of a consumer's 64 rows, which wait
   in registers and are stored a part at a time (consume.cuh).

   Two ways. A thread stores 16 bytes of its rows: any rows, any C. Or boxes of 64 rows by 64 columns
   pass through shared memory, and a tensor copy stores each: where all 64 rows exist and C is one
   array. Boxes are faster where tiles have few steps, so little time for their stores; the launch
   decides (moei_wgmma_args.boxes). */
#ifndef MOE_GEMM_WGMMA_STORE_CUH
#define MOE_GEMM_WGMMA_STORE_CUH

#include "../../base/copy.cuh"
#include "../../base/numeric.cuh"
#include "ring.cuh"

#if MOEI_WGMMA_HERE

/* Rounded results of a warp's 16 rows that are still to be stored. */
typedef struct moei_wgmma_pending {
    uint32_t x[64]; /* two columns each: [groups of 32 columns][rows r, r + 8][4] */
    char* c;  /* address of row r, column `column` of C; transposed (args.h): of the first two rows
                that the lane stores of a column */
    int rows; /* the tile's rows from r on: more than 0: row r exists, more than 8: r + 8 */
    int columns;      /* columns of C from `column` on */
    int next, groups; /* groups of 32 columns: the next one to store; those of a tile, 4 or 8, 0
                         before the first tile. What is stored at once: next is groups */
    int boxed;        /* first row of C of the consumer's, which boxes store; where threads store,
                         its complement, which is negative */
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

/* Stores pending columns 32 g .. 32 g + 31, g a literal, 16 bytes a lane and row. stride: of C. */
MOE_DEVICE void moei_wgmma_store_group(moei_wgmma_pending* p, const int g, int64_t stride)
{
    uint32_t* x = p->x + 8 * g;
    char* c = p->c + 64 * g;
    moei_quad_transpose(x);
    moei_quad_transpose(x + 4);
    if (p->columns > 32 * g) {
        if (p->rows > 0) moei_store16(c, make_uint4(x[0], x[1], x[2], x[3]));
        if (p->rows > 8) moei_store16(c + stride * 16, make_uint4(x[4], x[5], x[6], x[7]));
    }
}

/* Stores the next 32 of the pending columns. One branch is cheaper than to move the others up. */
MOE_DEVICE void moei_wgmma_store_next(moei_wgmma_pending* p, int64_t stride)
{
    switch (p->next++) {
    case 0: moei_wgmma_store_group(p, 0, stride); break;
    case 1: moei_wgmma_store_group(p, 1, stride); break;
    case 2: moei_wgmma_store_group(p, 2, stride); break;
    case 3: moei_wgmma_store_group(p, 3, stride); break;
    case 4: moei_wgmma_store_group(p, 4, stride); break;
    case 5: moei_wgmma_store_group(p, 5, stride); break;
    case 6: moei_wgmma_store_group(p, 6, stride); break;
    default: moei_wgmma_store_group(p, 7, stride);
    }
}

/* Sets where the results of a tile go; nothing is pending. row: of this thread's first accumulator;
   rows: the tile's rows from it on; column: first of the tile. */
MOE_DEVICE void moei_wgmma_aim(moei_wgmma_pending* p, const moe_gemm_output* o,
                               const moei_wgmma_tile* t, int64_t expert_bytes, int row, int rows,
                               int column, int n, int transposed)
{
    const int quad = moe_lane() & 3, line = moe_lane() >> 2, bytes = o->dtype == MOE_FP32 ? 4 : 2;
    char* c = o->table ? (char*)o->table[t->expert] - (int64_t)t->begin * o->stride * bytes
                       : (char*)o->base + t->expert * expert_bytes;
    if (transposed) p->c = c + ((column + line) * o->stride + row - line + quad * 2) * bytes;
    else p->c = c + ((int64_t)row * o->stride + column + quad * 8) * bytes;
    p->rows = transposed ? rows + line : rows;
    p->columns = n - column - quad * 8;
}

/* Rounds 32 columns, accumulators 16 g .. 16 g + 15, g a literal, to x [8]: rows r, r + 8 of 4. */
MOE_DEVICE void moei_wgmma_round(uint32_t* x, const float acc[128], const int g, const int dtype)
{
    MOE_UNROLL
    for (int j = 0; j < 4; ++j) {
        x[j] = moe_pack2(acc[16 * g + 4 * j], acc[16 * g + 4 * j + 1], dtype);
        x[j + 4] = moe_pack2(acc[16 * g + 4 * j + 2], acc[16 * g + 4 * j + 3], dtype);
    }
}

/* Writes 64 rounded columns, x as in moei_wgmma_pending, to a box of shared memory: lines of 128
   bytes, swizzled (ptx.cuh). */
MOE_DEVICE void moei_wgmma_write_box(unsigned char* box, const uint32_t x[16])
{
    const int row =
        moe_warp() % 4 * 16 + moe_lane() % 8; /* of matrices with rows r; r + 8 follow */
    MOE_UNROLL
    for (int g = 0; g < 2; ++g) {
        const int vector = (4 * g + moe_lane() / 8) ^ (row & 7);
        unsigned char* to = box + row * 128 + vector * 16;
        moei_store_matrices(to, x + 8 * g);
        moei_store_matrices(to + 8 * 128, x + 8 * g + 4);
    }
}

/* Stores the next 64 of the pending columns through the consumer's box. The warpgroup calls it. */
MOE_DEVICE void moei_wgmma_store_box(moei_wgmma_pending* p, const moei_wgmma_args* a,
                                     unsigned char* box, int consumer)
{
    const bool starts = threadIdx.x % 128 == 0;
    const int q = p->next / 2;
    if (starts) moei_tensor_store_wait_read();
    moei_named_barrier(2 + consumer, 128);
    switch (q) {
    case 0: moei_wgmma_write_box(box, p->x); break;
    case 1: moei_wgmma_write_box(box, p->x + 16); break;
    case 2: moei_wgmma_write_box(box, p->x + 32); break;
    default: moei_wgmma_write_box(box, p->x + 48);
    }
    moei_wgmma_sees_copies();
    moei_named_barrier(2 + consumer, 128);
    if (starts) moei_tensor_store(box, &a->c, a->d.n - p->columns + 64 * q, p->boxed);
    p->next += 2;
}

/* Stores the next part of what is pending: a box; or 32 columns, in short tiles 64. boxes: 0: there
   are none. */
MOE_DEVICE void moei_wgmma_store_part(moei_wgmma_pending* p, const moei_wgmma_args* a,
                                      const moei_wgmma_ring* r, int consumer, int depths, int boxes)
{
    if (boxes && p->boxed >= 0) {
        moei_wgmma_store_box(p, a, r->stages + MOEI_WGMMA_RING + consumer * MOEI_WGMMA_BOX,
                             consumer);
        return;
    }
    MOE_NO_UNROLL
    for (int j = 0; j < (depths > 7 * 64 ? 1 : 2) && p->next < p->groups; ++j)
        moei_wgmma_store_next(p, a->d.c.stride);
}

#endif
#endif
