/* mma.h: the stand-in for 16x16x16 tensor-core pieces, behind the functions that gemm/mma.cuh
   defines on a GPU. Included by that file, after base/cuda.cuh and layout.h.

     c += a * b   a [16 m, 16 k], b [16 k, 16 n] fp16 or bf16, c [16 m, 16 n] fp32

   A lane holds 8 elements of each piece. On a GPU nobody may know which; here they are drawn
   from the seed, differently for a, b and c, so that code which leans on a layout fails. All c
   pieces share one, so c pieces may be combined element by element.

   Products and sums are taken in fp32, k ascending, each rounded: a tensor core rounds
   otherwise, so exact checks want small integers. moei_mma is a meeting of the 32 lanes: the last
   to come computes for all. Loads and stores are each lane's own and do not wait; others see a
   store after __syncwarp. Misaligned pointers and leading dimensions, and pieces loaded with
   another dtype than they are used with, fail the run. */
#ifndef MOE_HOST_MMA_H
#define MOE_HOST_MMA_H

#include "../base/cuda.cuh" /* host.h, and through it <numeric> and <random> */
#include "../gemm/swizzle.h"
#include "../layout.h"

#define MOEI_MMA_C_ELEMS 8 /* elements of moei_mma_c::x in one lane */

typedef struct moeh_mma_input {
    float x[8];
    int dtype;
} moei_mma_a, moei_mma_b;
typedef struct moei_mma_c {
    float x[MOEI_MMA_C_ELEMS];
} moei_mma_c;

/* Who holds what: lane l has the elements 8 run[l] .. 8 run[l] + 7 of a piece in row order,
   element j of them in x[slot[j]]. */
struct moeh_layout {
    unsigned char run[32], slot[8];
};
struct moeh_layouts {
    uint64_t seed;
    moeh_layout a, b, c;
};

inline const moeh_layouts& moeh_mma_layouts()
{
    static moeh_layouts l = {~moeh_get().seed, {}, {}, {}};
    if (l.seed != moeh_get().seed) {
        l.seed = moeh_get().seed;
        std::minstd_rand random((unsigned)(l.seed ^ l.seed >> 32) + 12345);
        for (moeh_layout* one : {&l.a, &l.b, &l.c}) {
            std::iota(one->run, one->run + 32, 0);
            std::iota(one->slot, one->slot + 8, 0);
            std::shuffle(one->run, one->run + 32, random);
            std::shuffle(one->slot, one->slot + 8, random);
        }
        /* a product is taken with the columns where they are: b and c have the same slots */
        memcpy(l.b.slot, l.c.slot, sizeof l.b.slot);
    }
    return l;
}

/* This lane's elements of a piece of a swizzled stage; along lines: the rows of the piece are lines,
   and its columns stand side by side in them; else the other way round. */
inline void moeh_mma_load(moeh_mma_input* f, const moeh_layout& l, const uint16_t* stage, int row,
                          int column, int ld, int dtype, bool along)
{
    if (dtype != MOE_FP16 && dtype != MOE_BF16) moeh_fail("loads a tensor-core piece of no dtype");
    if ((uintptr_t)stage % 32 || ld <= 0 || (ld != 32 && ld % 64))
        moeh_fail("loads a tensor-core piece from a stage that is not 32-byte aligned, or has no "
                  "swizzled lines");
    const int run = l.run[moeh_lane()];
    row += run >> 1, column += (run & 1) * 8;
    for (int j = 0; j < 8; ++j)
        f->x[l.slot[j]] = moe_load(
            stage, along ? moei_swizzled(row, column + j, ld) : moei_swizzled(column + j, row, ld),
            dtype);
    f->dtype = dtype;
}

/* What the device asks of a piece's place: it joins the numbers by XOR. along: lines are rows. */
inline void moeh_mma_place(int row, int m, int k, int ld, bool along)
{
    if (row < 0 || m < 0 || k < 0 || row % 16 || m % 16 || k % 16 || (row & m) ||
        (along ? k : row + m) + 16 > ld)
        moeh_fail("loads a tensor-core piece from a place that a warp does not have");
}

/* A lane's own part is the first row here. */
MOE_DEVICE int moei_mma_lane_a(int row, int, int) { return row; }
MOE_DEVICE int moei_mma_lane_b(int row, int, int) { return row; }
MOE_DEVICE void moei_mma_load_a(moei_mma_a* f, const uint16_t* stage, int lane, int m, int k,
                                int ld, int dtype, int major)
{
    moeh_mma_place(lane, m, k, ld, major == MOE_MAJOR_K);
    moeh_mma_load(f, moeh_mma_layouts().a, stage, lane + m, k, ld, dtype, major == MOE_MAJOR_K);
}
/* b is held as [k, n]. */
MOE_DEVICE void moei_mma_load_b(moei_mma_b* f, const uint16_t* stage, int lane, int n, int k,
                                int ld, int dtype, int major)
{
    moeh_mma_place(lane, n, k, ld, major == MOE_MAJOR_K);
    moeh_mma_load(f, moeh_mma_layouts().b, stage, k, lane + n, ld, dtype, major == MOE_MAJOR_MN);
}

MOE_DEVICE void moei_mma_zero(moei_mma_c* c)
{
    for (int j = 0; j < 8; ++j) c->x[j] = 0.0f;
}

struct moeh_mma_lane { /* what a lane brings to the meeting */
    float* c;
    const float *a, *b;
};

typedef float moeh_float4 __attribute__((vector_size(16), may_alias, aligned(4)));

/* The whole product, for all lanes. Rows of b and c keep their columns in slot order. */
__attribute__((noinline)) inline void moeh_mma_all(moeh_warp* w, uint32_t mask)
{
    const moeh_layouts& l = moeh_mma_layouts();
    float a[256];
    moeh_float4 b[64], *c[32];
    if (mask != 0xffffffffu) moeh_fail("calls moei_mma in a warp that is not whole");
    for (int i = 0; i < 32; ++i) {
        const moeh_mma_lane* const lane = (const moeh_mma_lane*)(uintptr_t)w->at[i].value;
        memcpy(a + 8 * l.a.run[i], lane->a, 32);
        memcpy(b + 2 * l.b.run[i], lane->b, 32);
        c[l.c.run[i]] = (moeh_float4*)lane->c;
    }
    for (int m = 0; m < 16; ++m) { /* a row of c in four registers */
        moeh_float4 *const left = c[2 * m], *const right = c[2 * m + 1];
        moeh_float4 c0 = left[0], c1 = left[1], c2 = right[0], c3 = right[1];
        for (int k = 0; k < 16; ++k) {
            const float f = a[16 * m + (k & 8) + l.a.slot[k & 7]];
            c0 += f * b[4 * k];
            c1 += f * b[4 * k + 1];
            c2 += f * b[4 * k + 2];
            c3 += f * b[4 * k + 3];
        }
        left[0] = c0, left[1] = c1, right[0] = c2, right[1] = c3;
    }
}

MOE_DEVICE void moei_mma(moei_mma_c* c, const moei_mma_a* a, const moei_mma_b* b, int dtype)
{
    const moeh_mma_lane mine = {c->x, a->x, b->x};
    if (a->dtype != dtype || b->dtype != dtype)
        moeh_fail("uses a tensor-core piece with another dtype than it was loaded with");
    moeh_meet(0xffffffffu, "moei_mma", moeh_mma_all, (uint64_t)(uintptr_t)&mine);
}

MOE_DEVICE void moei_mma_if(moei_mma_c* c, const moei_mma_a* a, const moei_mma_b* b, int dtype,
                            int keep)
{
    if (keep) moei_mma(c, a, b, dtype);
}

/* This lane's elements of a piece to p: those of a row `column` apart, rows `row`. */
inline void moeh_mma_store(float* p, const moei_mma_c* c, int row, int column)
{
    const moeh_layout& l = moeh_mma_layouts().c;
    const int ld = row > column ? row : column;
    if ((uintptr_t)p % 32 || ld % 4 || ld <= 0)
        moeh_fail("stores a tensor-core piece that is not 32-byte aligned, or ld % 4 is not 0");
    const int run = l.run[moeh_lane()];
    p += (run >> 1) * row + (run & 1) * 8 * column;
    for (int j = 0; j < 8; ++j) p[j * column] = c->x[l.slot[j]];
}

/* Rows of the piece at p, ld floats apart. */
MOE_DEVICE void moei_mma_store(float* p, const moei_mma_c* c, int ld)
{
    moeh_mma_store(p, c, ld, 1);
}

/* Rows of the piece, rounded to fp16 or bf16, at p, ld elements apart. */
MOE_DEVICE void moei_mma_store_half(uint16_t* p, const moei_mma_c* c, int ld, int dtype)
{
    const moeh_layout& l = moeh_mma_layouts().c;
    const int run = l.run[moeh_lane()];
    if ((uintptr_t)p % 4 || ld % 2 || ld <= 0)
        moeh_fail("stores a tensor-core piece that is not 4-byte aligned, or ld is odd");
    p += (run >> 1) * ld + (run & 1) * 8;
    for (int j = 0; j < 8; ++j) moe_store(p, j, dtype, c->x[l.slot[j]]);
}

/* Columns of the piece at p, ld floats apart. */
MOE_DEVICE void moei_mma_store_transposed(float* p, const moei_mma_c* c, int ld)
{
    moeh_mma_store(p, c, 1, ld);
}

#endif
