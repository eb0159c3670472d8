/* mma.h: the CPU's stand-in for fragments and their product, behind the functions that gemm/mma.cuh
   defines on a GPU. Included by that file, after base/cuda.cuh and layout.h.

     c += a * b   a [16 m, 16 k], b [16 k, 16 n] fp16 or bf16, c [16 m, 16 n] fp32

   A lane holds 8 elements of each fragment. No code may depend on which: the layouts are drawn from
   the seed, differently for a, b and c, so that code which depends on a layout fails. All c
   fragments have one layout, so they may be combined element by element.

   Products and sums are fp32, k ascending, each rounded. A tensor core rounds differently, so exact
   checks use small integers. moei_mma is a meeting of the 32 lanes (warp.h): the last lane to
   arrive computes for all. Loads and stores are per lane and do not wait; other lanes see a store
   after __syncwarp. The run fails with misaligned pointers or leading dimensions, and where a
   fragment is used with another dtype than it was loaded with. */
#ifndef MOE_HOST_MMA_H
#define MOE_HOST_MMA_H

#include "../base/cuda.cuh" /* host.h, and through it <numeric> and <random> */
#include "../gemm/swizzle.h"
#include "../layout.h"

#define MOEI_MMA_C_ELEMS 8 /* elements of moei_mma_c::x in one lane */

typedef struct moeh_mma_input {
    float x[8]; /* the calling lane's elements; moeh_layout has the order */
    int dtype;  /* MOE_FP16 or MOE_BF16 */
} moei_mma_a, moei_mma_b;
typedef struct moei_mma_c {
    float x[MOEI_MMA_C_ELEMS];
} moei_mma_c;

/* Layout of a fragment: lane l holds the elements 8 run[l] .. 8 run[l] + 7 in row order, and
   element j of them is x[column_order[j]]. */
struct moeh_layout {
    unsigned char run[32], column_order[8];
};
struct moeh_layouts {
    uint64_t seed;
    moeh_layout a, b, c;
};

/* Returns the layouts of a, b and c, drawn anew when the seed has changed. */
inline const moeh_layouts& moeh_mma_layouts()
{
    static moeh_layouts l = {~moeh_get().seed, {}, {}, {}};
    if (l.seed != moeh_get().seed) {
        l.seed = moeh_get().seed;
        std::minstd_rand random((unsigned)(l.seed ^ l.seed >> 32) + 12345);
        for (moeh_layout* one : {&l.a, &l.b, &l.c}) {
            std::iota(one->run, one->run + 32, 0);
            std::iota(one->column_order, one->column_order + 8, 0);
            std::shuffle(one->run, one->run + 32, random);
            std::shuffle(one->column_order, one->column_order + 8, random);
        }
        /* moeh_mma_all does not reorder columns: b and c have the same `column_order` */
        memcpy(l.b.column_order, l.c.column_order, sizeof l.b.column_order);
    }
    return l;
}

/* Loads the calling lane's elements of a fragment from a swizzled stage. along: the rows of the
   fragment are lines and its columns are contiguous; else rows and columns are exchanged. */
inline void moeh_mma_load(moeh_mma_input* f, const moeh_layout& l, const uint16_t* stage, int row,
                          int column, int ld, int dtype, bool along)
{
    if (dtype != MOE_FP16 && dtype != MOE_BF16) moeh_fail("loads a fragment of no dtype");
    if ((uintptr_t)stage % 32 || ld <= 0 || (ld != 32 && ld % 64))
        moeh_fail("loads a fragment from a stage that is not 32-byte aligned, or has no "
                  "swizzled lines");
    const int run = l.run[moeh_lane()];
    row += run >> 1, column += (run & 1) * 8;
    for (int j = 0; j < 8; ++j)
        f->x[l.column_order[j]] = moe_load(
            stage, along ? moei_swizzled(row, column + j, ld) : moei_swizzled(column + j, row, ld),
            dtype);
    f->dtype = dtype;
}

/* Fails the run unless row, m and k are multiples of 16. row and m must share no bits: a GPU
   joins them by XOR. The fragment must end within the ld elements of a line. along: as in
   moeh_mma_load. */
inline void moeh_mma_place(int row, int m, int k, int ld, bool along)
{
    if (row < 0 || m < 0 || k < 0 || row % 16 || m % 16 || k % 16 || (row & m) ||
        (along ? k : row + m) + 16 > ld)
        moeh_fail("loads a fragment from a place that a warp does not have");
}

/* Return a lane's part of the address: here the first row. */
MOE_DEVICE int moei_mma_lane_a(int row, int, int) { return row; }
MOE_DEVICE int moei_mma_lane_b(int row, int, int) { return row; }
MOE_DEVICE void moei_mma_load_a(moei_mma_a* f, const uint16_t* stage, int lane, int m, int k,
                                int ld, int dtype, int major)
{
    moeh_mma_place(lane, m, k, ld, major == MOE_MAJOR_K);
    moeh_mma_load(f, moeh_mma_layouts().a, stage, lane + m, k, ld, dtype, major == MOE_MAJOR_K);
}
/* b is stored as [k, n]. */
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

/* Computes the whole product, for all lanes. b and c keep the order of `column_order`. */
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
            const float f = a[16 * m + (k & 8) + l.a.column_order[k & 7]];
            c0 += f * b[4 * k];
            c1 += f * b[4 * k + 1];
            c2 += f * b[4 * k + 2];
            c3 += f * b[4 * k + 3];
        }
        left[0] = c0, left[1] = c1, right[0] = c2, right[1] = c3;
    }
}

/* Adds a * b to c. All 32 lanes call it. */
MOE_DEVICE void moei_mma(moei_mma_c* c, const moei_mma_a* a, const moei_mma_b* b, int dtype)
{
    const moeh_mma_lane mine = {c->x, a->x, b->x};
    if (a->dtype != dtype || b->dtype != dtype)
        moeh_fail("uses a fragment with another dtype than it was loaded with");
    moeh_meet(0xffffffffu, "moei_mma", moeh_mma_all, (uint64_t)(uintptr_t)&mine);
}

/* Does the same where `keep` is not 0; `keep` is uniform over the warp. */
MOE_DEVICE void moei_mma_if(moei_mma_c* c, const moei_mma_a* a, const moei_mma_b* b, int dtype,
                            int keep)
{
    if (keep) moei_mma(c, a, b, dtype);
}

/* Stores the calling lane's elements to p: columns are `column` floats apart, rows `row` floats. */
inline void moeh_mma_store(float* p, const moei_mma_c* c, int row, int column)
{
    const moeh_layout& l = moeh_mma_layouts().c;
    const int ld = row > column ? row : column;
    if ((uintptr_t)p % 32 || ld % 4 || ld <= 0)
        moeh_fail("stores a fragment that is not 32-byte aligned, or ld % 4 is not 0");
    const int run = l.run[moeh_lane()];
    p += (run >> 1) * row + (run & 1) * 8 * column;
    for (int j = 0; j < 8; ++j) p[j * column] = c->x[l.column_order[j]];
}

/* Stores the fragment at p, rows ld floats apart. */
MOE_DEVICE void moei_mma_store(float* p, const moei_mma_c* c, int ld)
{
    moeh_mma_store(p, c, ld, 1);
}

/* Stores the fragment at p, rounded to fp16 or bf16, rows ld elements apart. */
MOE_DEVICE void moei_mma_store_half(uint16_t* p, const moei_mma_c* c, int ld, int dtype)
{
    const moeh_layout& l = moeh_mma_layouts().c;
    const int run = l.run[moeh_lane()];
    if ((uintptr_t)p % 4 || ld % 2 || ld <= 0)
        moeh_fail("stores a fragment that is not 4-byte aligned, or ld is odd");
    p += (run >> 1) * ld + (run & 1) * 8;
    for (int j = 0; j < 8; ++j) moe_store(p, j, dtype, c->x[l.column_order[j]]);
}

/* Stores the fragment transposed at p: columns are ld floats apart. */
MOE_DEVICE void moei_mma_store_transposed(float* p, const moei_mma_c* c, int ld)
{
    moeh_mma_store(p, c, 1, ld);
}

#endif
