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
   another dtype or major than they are used with, fail the run. */
#ifndef MOE_HOST_MMA_H
#define MOE_HOST_MMA_H

#include "../base/cuda.cuh"
#include "../layout.h"

#define MOEI_MMA_C_ELEMS 8 /* elements of moei_mma_c::x in one lane */

typedef struct moei_mma_a {
    float x[8];
    int dtype, major;
} moei_mma_a;
typedef struct moei_mma_b {
    float x[8];
    int dtype, major;
} moei_mma_b;
typedef struct moei_mma_c {
    float x[MOEI_MMA_C_ELEMS];
} moei_mma_c;

/* Who holds what: lane[i] has the elements 8 i .. 8 i + 7 of a piece in row order, element j of
   them at place slot[j]; run is the inverse of lane. b and c have the same slots, so that a
   product can be taken with the columns where they are. */
struct moeh_layout {
    unsigned char lane[32], run[32], slot[8];
};
struct moeh_layouts {
    uint64_t seed;
    bool made;
    moeh_layout a, b, c;
};

inline void moeh_shuffle_bytes(unsigned char* p, unsigned n, uint64_t* random)
{
    for (unsigned i = 0; i < n; ++i) p[i] = (unsigned char)i;
    for (unsigned i = n; i > 1; --i) {
        *random = *random * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(p[i - 1], p[(*random >> 33) % i]);
    }
}

inline void moeh_make_layout(moeh_layout* l, uint64_t* random)
{
    moeh_shuffle_bytes(l->lane, 32, random);
    moeh_shuffle_bytes(l->slot, 8, random);
    for (unsigned i = 0; i < 32; ++i) l->run[l->lane[i]] = (unsigned char)i;
}

inline const moeh_layouts& moeh_mma_layouts()
{
    static moeh_layouts l;
    if (!l.made || l.seed != moeh_get().seed) {
        uint64_t random = moeh_get().seed * 0x9e3779b97f4a7c15ull + 12345;
        l.seed = moeh_get().seed;
        l.made = true;
        moeh_make_layout(&l.a, &random);
        moeh_make_layout(&l.b, &random);
        moeh_make_layout(&l.c, &random);
        memcpy(l.b.slot, l.c.slot, sizeof l.b.slot);
    }
    return l;
}

/* fp16 to fp32 in a few operations: the exponent is moved by a multiplication, which also
   normalises subnormals. */
inline float moeh_mma_f32(uint16_t h, int dtype)
{
    if (dtype == MOE_BF16) return moe_f32_from_bits((uint32_t)h << 16);
    const float power = moe_f32_from_bits((127u + 112u) << 23);
    const float v = moe_f32_from_bits((uint32_t)(h & 0x7fffu) << 13) * power;
    uint32_t bits = moe_f32_bits(v) | (uint32_t)(h & 0x8000u) << 16;
    if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
    return moe_f32_from_bits(bits);
}

/* This lane's elements of the 16x16 piece whose element (r, c) is at p[r * row + c * column]. */
inline void moeh_mma_load(float* x, const moeh_layout& l, const uint16_t* p, size_t row,
                          size_t column, int ld, int dtype)
{
    if ((uintptr_t)p % 32 || ld % 8 || ld <= 0)
        moeh_fail("loads a tensor-core piece that is not 32-byte aligned, or ld % 8 is not 0");
    if (dtype != MOE_FP16 && dtype != MOE_BF16) moeh_fail("loads a tensor-core piece of no dtype");
    const unsigned run = l.run[moeh_lane()];
    uint16_t h[8];
    float f[8];
    p += (run >> 1) * row + (run & 1) * 8 * column;
    for (int j = 0; j < 8; ++j) h[j] = p[(size_t)j * column];
    if (dtype == MOE_FP16)
        for (int j = 0; j < 8; ++j) f[j] = moeh_mma_f32(h[j], MOE_FP16);
    else
        for (int j = 0; j < 8; ++j) f[j] = moeh_mma_f32(h[j], MOE_BF16);
    for (int j = 0; j < 8; ++j) x[l.slot[j]] = f[j];
}

MOE_DEVICE void moei_mma_load_a(moei_mma_a* f, const uint16_t* p, int ld, int dtype, int major)
{
    const bool mn = major == MOE_MAJOR_MN;
    const size_t m = mn ? 1 : (size_t)ld, k = mn ? (size_t)ld : 1;
    moeh_mma_load(f->x, moeh_mma_layouts().a, p, m, k, ld, dtype);
    f->dtype = dtype;
    f->major = mn;
}

/* b is held as [k, n]. */
MOE_DEVICE void moei_mma_load_b(moei_mma_b* f, const uint16_t* p, int ld, int dtype, int major)
{
    const bool mn = major == MOE_MAJOR_MN;
    const size_t k = mn ? (size_t)ld : 1, n = mn ? 1 : (size_t)ld;
    moeh_mma_load(f->x, moeh_mma_layouts().b, p, k, n, ld, dtype);
    f->dtype = dtype;
    f->major = mn;
}

MOE_DEVICE void moei_mma_zero(moei_mma_c* c)
{
    for (int j = 0; j < 8; ++j) c->x[j] = 0.0f;
}

struct moeh_mma_lane { /* what a lane brings to the meeting */
    moei_mma_c* c;
    const float *a, *b;
};

typedef float moeh_float4 __attribute__((vector_size(16), may_alias, aligned(4)));

/* The whole product, for all lanes. Rows of b and c keep their columns in slot order. */
__attribute__((noinline)) inline void moeh_mma_all(const uint64_t* value, uint32_t mask)
{
    const moeh_layouts& l = moeh_mma_layouts();
    float a[256];
    moeh_float4 b[64];
    if (mask != 0xffffffffu) moeh_fail("calls moei_mma in a warp that is not whole");
    for (int i = 0; i < 32; ++i) {
        memcpy(a + 8 * i, ((const moeh_mma_lane*)(uintptr_t)value[l.a.lane[i]])->a, 32);
        memcpy(b + 2 * i, ((const moeh_mma_lane*)(uintptr_t)value[l.b.lane[i]])->b, 32);
    }
    for (int m = 0; m < 16; ++m) { /* a row of c in four registers */
        moeh_float4* const left =
            (moeh_float4*)((const moeh_mma_lane*)(uintptr_t)value[l.c.lane[2 * m]])->c->x;
        moeh_float4* const right =
            (moeh_float4*)((const moeh_mma_lane*)(uintptr_t)value[l.c.lane[2 * m + 1]])->c->x;
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

MOE_DEVICE void moei_mma(moei_mma_c* c, const moei_mma_a* a, const moei_mma_b* b, int dtype,
                         int a_major, int b_major)
{
    const moeh_mma_lane mine = {c, a->x, b->x};
    if (a->dtype != dtype || b->dtype != dtype || a->major != (a_major == MOE_MAJOR_MN) ||
        b->major != (b_major == MOE_MAJOR_MN))
        moeh_fail("uses a tensor-core piece with another dtype or major than it was loaded with");
    moeh_meet(0xffffffffu, MOEH_MEET_CALL, (uint64_t)(uintptr_t)&mine, 0, moeh_mma_all);
}

/* Row-major fp32, ld elements a row. */
MOE_DEVICE void moei_mma_store(float* p, const moei_mma_c* c, int ld)
{
    const moeh_layout& l = moeh_mma_layouts().c;
    if ((uintptr_t)p % 32 || ld % 4 || ld <= 0)
        moeh_fail("stores a tensor-core piece that is not 32-byte aligned, or ld % 4 is not 0");
    const unsigned run = l.run[moeh_lane()];
    p += (size_t)(run >> 1) * (size_t)ld + (run & 1) * 8;
    for (int j = 0; j < 8; ++j) p[j] = c->x[l.slot[j]];
}

#endif
