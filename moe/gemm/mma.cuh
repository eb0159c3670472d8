/* mma.cuh: one 16 x 16 x 16 tensor-core product of a warp behind plain functions. WMMA, written
   with the instructions that nvcuda::wmma compiles to (ldmatrix, mma.sync): so the major of a
   fragment can be chosen at run time, and a product can be predicated. Only this file contains
   these instructions; on the CPU the stand-in host/mma.h has the same functions.

     moei_mma_a, moei_mma_b   a 16 x 16 fragment of A [m, k] or B [k, n], fp16 or bf16
     moei_mma_c               a 16 x 16 fragment of C, fp32; x[MOEI_MMA_C_ELEMS] of each lane

   All 32 lanes of a warp call each function together. Addresses are in shared memory; those of
   loads are 32-byte aligned, with ld 32 or a multiple of 64. Callers pass dtype as a literal.
   Callers must not depend on how a fragment is spread over the lanes; all fragments of C are
   spread alike. fp16 from sm_75, bf16 from sm_80. */
#ifndef MOE_GEMM_MMA_CUH
#define MOE_GEMM_MMA_CUH

#include "../base/numeric.cuh"
#include "../base/warp.cuh"
#include "../layout.h"
#include "swizzle.h"

#if MOE_ON_HOST

#include "../host/mma.h"

#else

#define MOEI_MMA_C_ELEMS 8

/* The registers of mma.m16n8k16: A is four 8 x 8 matrices; B and C are two halves of 8 columns. */
typedef struct moei_mma_a {
    uint32_t x[4];
} moei_mma_a;
typedef struct moei_mma_b {
    uint32_t x[4];
} moei_mma_b;
typedef struct moei_mma_c {
    float x[MOEI_MMA_C_ELEMS];
} moei_mma_c;

/* Loads four 8 x 8 matrices. Each lane passes the address of one of their 32 rows, 16 bytes. */
MOE_DEVICE void moei_mma_load(uint32_t* x, const uint16_t* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

/* moei_mma_load with each matrix transposed. */
MOE_DEVICE void moei_mma_load_transposed(uint32_t* x, const uint16_t* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

/* Return which 8 elements of a 16 x 16 fragment a lane passes to ldmatrix: the line, 0 .. 15, and
   the first element in that line, 0 or 8. Matrix 1 of the four lies in the next 8 lines; with swap,
   in the same lines as matrix 0. */
MOE_DEVICE int moei_mma_lane_line(int swap)
{
    return swap ? (moe_lane() & 7) + (moe_lane() >> 4) * 8 : moe_lane() & 15;
}
MOE_DEVICE int moei_mma_lane_element(int swap)
{
    return (swap ? moe_lane() >> 3 & 1 : moe_lane() >> 4) * 8;
}

/* Load fragment (row + m, k) of A, or (k, row + n) of B, from a stage whose lines of ld elements
   are swizzled (swizzle.h). A k-major line is a row of A or a column of B; an mn-major line is a
   depth.

   row: first row (column) of the warp tile, a multiple of wm (wn), which is 16, 32 or 64.
   m, n: below wm (wn). m, n and k are multiples of 16.
   lane: the lane's part of the address, which contains row; computed once by moei_mma_lane_a(row,
   ld, major) or _b. XOR adds k, or mn-major m or n: within a line the swizzle is an XOR too. */
MOE_DEVICE int moei_mma_lane_a(int row, int ld, int major)
{
    const int mn_major = major == MOE_MAJOR_MN;
    const int line = moei_mma_lane_line(mn_major), e = moei_mma_lane_element(mn_major);
    return mn_major ? moei_swizzled(line, row + e, ld) : moei_swizzled(row + line, e, ld);
}
MOE_DEVICE int moei_mma_lane_b(int row, int ld, int major)
{
    const int k_major = major == MOE_MAJOR_K;
    const int line = moei_mma_lane_line(k_major), e = moei_mma_lane_element(k_major);
    return k_major ? moei_swizzled(row + line, e, ld) : moei_swizzled(line, row + e, ld);
}
MOE_DEVICE void moei_mma_load_a(moei_mma_a* f, const uint16_t* stage, int lane, const int m, int k,
                                int ld, const int dtype, const int major)
{
    (void)dtype;
    if (major == MOE_MAJOR_K) moei_mma_load(f->x, stage + (lane ^ k) + m * ld);
    else moei_mma_load_transposed(f->x, stage + (lane ^ m) + k * ld);
}
MOE_DEVICE void moei_mma_load_b(moei_mma_b* f, const uint16_t* stage, int lane, const int n, int k,
                                int ld, const int dtype, const int major)
{
    (void)dtype;
    if (major == MOE_MAJOR_K) moei_mma_load(f->x, stage + (lane ^ k) + n * ld);
    else moei_mma_load_transposed(f->x, stage + (lane ^ n) + k * ld);
}

/* c = 0 */
MOE_DEVICE void moei_mma_zero(moei_mma_c* c)
{
    MOE_UNROLL
    for (int i = 0; i < MOEI_MMA_C_ELEMS; ++i) c->x[i] = 0.0f;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define MOEI_MMA_HALF(type, half)                                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %10, 0;\n"                                      \
                 "@p mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                 \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n}"              \
                 : "+f"(c->x[4 * half]), "+f"(c->x[4 * half + 1]), "+f"(c->x[4 * half + 2]),       \
                   "+f"(c->x[4 * half + 3])                                                        \
                 : "r"(a->x[0]), "r"(a->x[1]), "r"(a->x[2]), "r"(a->x[3]), "r"(b->x[2 * half]),    \
                   "r"(b->x[2 * half + 1]), "r"(keep))
#define MOEI_MMA_BF16 1
#else
/* mma.sync of sm_75 has 8 depths, and fp16 only. */
#define MOEI_MMA_HALF(type, half)                                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %10, 0;\n"                                      \
                 "@p mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 "                  \
                 "{%0, %1, %2, %3}, {%4, %5}, {%8}, {%0, %1, %2, %3};\n"                           \
                 "@p mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 "                  \
                 "{%0, %1, %2, %3}, {%6, %7}, {%9}, {%0, %1, %2, %3};\n}"                          \
                 : "+f"(c->x[4 * half]), "+f"(c->x[4 * half + 1]), "+f"(c->x[4 * half + 2]),       \
                   "+f"(c->x[4 * half + 3])                                                        \
                 : "r"(a->x[0]), "r"(a->x[1]), "r"(a->x[2]), "r"(a->x[3]), "r"(b->x[2 * half]),    \
                   "r"(b->x[2 * half + 1]), "r"(keep))
#define MOEI_MMA_BF16 0
#endif

/* c += a * b, predicated: c is unchanged where keep, equal in all lanes, is 0. */
MOE_DEVICE void moei_mma_if(moei_mma_c* c, const moei_mma_a* a, const moei_mma_b* b,
                            const int dtype, int keep)
{
    if (dtype == MOE_FP16) {
        MOEI_MMA_HALF("f16", 0);
        MOEI_MMA_HALF("f16", 1);
    } else {
#if MOEI_MMA_BF16
        MOEI_MMA_HALF("bf16", 0);
        MOEI_MMA_HALF("bf16", 1);
#endif
    }
}

/* c += a * b */
MOE_DEVICE void moei_mma(moei_mma_c* c, const moei_mma_a* a, const moei_mma_b* b, const int dtype)
{
    moei_mma_if(c, a, b, dtype, 1);
}

/* Stores the rows of the fragment at p, ld floats apart. */
MOE_DEVICE void moei_mma_store(float* p, const moei_mma_c* c, int ld)
{
    p += (moe_lane() >> 2) * ld + (moe_lane() & 3) * 2;
    MOE_UNROLL
    for (int i = 0; i < 4; ++i)
        *(float2*)(p + (i & 1) * 8 * ld + (i >> 1) * 8) = make_float2(c->x[2 * i], c->x[2 * i + 1]);
}

/* Stores the rows of the fragment at p, rounded to fp16 or bf16, ld elements apart. */
MOE_DEVICE void moei_mma_store_half(uint16_t* p, const moei_mma_c* c, int ld, const int dtype)
{
    p += (moe_lane() >> 2) * ld + (moe_lane() & 3) * 2;
    MOE_UNROLL
    for (int i = 0; i < 4; ++i)
        *(uint32_t*)(p + (i & 1) * 8 * ld + (i >> 1) * 8) =
            moe_pack2(c->x[2 * i], c->x[2 * i + 1], dtype);
}

/* Stores the columns of the fragment at p, ld floats apart. */
MOE_DEVICE void moei_mma_store_transposed(float* p, const moei_mma_c* c, int ld)
{
    p += (moe_lane() >> 2) + (moe_lane() & 3) * 2 * ld;
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) p[((i >> 2) * 8 + (i & 1)) * ld + (i >> 1 & 1) * 8] = c->x[i];
}

#undef MOEI_MMA_HALF

#endif
#endif
