/* mma.cuh: one 16 x 16 x 16 tensor-core product of a warp behind plain functions. The one file
   that names nvcuda::wmma; on the CPU the stand-in of host/mma.h has the same functions.

     moei_mma_a, moei_mma_b   a 16 x 16 piece of A [M, K] or B [K, N], fp16 or bf16
     moei_mma_c               a 16 x 16 piece of C, fp32; x[MOEI_MMA_C_ELEMS] of each lane

   dtype and major are literals where these are called, so each piece is one fragment type in
   registers. Which element a lane holds is not defined; it is the same for all C pieces.
   All 32 lanes call together; addresses in shared memory, 32-byte aligned, ld a multiple of 8.
   fp16 from sm_75, bf16 from sm_80. */
#ifndef MOE_GEMM_MMA_CUH
#define MOE_GEMM_MMA_CUH

#include "../base/cuda.cuh"
#include "../layout.h"

#if MOE_ON_HOST

#include "../host/mma.h"

#else

#include <mma.h>

#define MOEI_MMA_C_ELEMS 8

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define MOEI_MMA_BF16 1
#else
#define MOEI_MMA_BF16 0
#endif

/* Only the member that dtype and major name is ever used; the others take no register. */
typedef struct moei_mma_a {
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, __half, nvcuda::wmma::row_major> hk;
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, __half, nvcuda::wmma::col_major> hm;
#if MOEI_MMA_BF16
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, __nv_bfloat16,
                           nvcuda::wmma::row_major> bk;
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, __nv_bfloat16,
                           nvcuda::wmma::col_major> bm;
#endif
} moei_mma_a;

typedef struct moei_mma_b {
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, __half, nvcuda::wmma::col_major> hk;
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, __half, nvcuda::wmma::row_major> hm;
#if MOEI_MMA_BF16
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, __nv_bfloat16,
                           nvcuda::wmma::col_major> bk;
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, __nv_bfloat16,
                           nvcuda::wmma::row_major> bm;
#endif
} moei_mma_b;

typedef nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> moei_mma_c;

/* nvcuda's loads of bf16 pieces address memory generically, four loads where the fp16 ones are one
   ldmatrix; so the instruction they stand for is written here with its address in shared memory.
   op is a or b, layout row or col. */
#define MOEI_MMA_LOAD_BF16(op, layout, f, p, ld)                                                  \
    asm volatile("wmma.load." #op ".sync.aligned." #layout ".m16n16k16.shared.bf16 "              \
                 "{%0, %1, %2, %3}, [%4], %5;"                                                    \
                 : "=r"(((unsigned*)&(f))[0]), "=r"(((unsigned*)&(f))[1]),                        \
                   "=r"(((unsigned*)&(f))[2]), "=r"(((unsigned*)&(f))[3])                         \
                 : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(ld)                            \
                 : "memory")

/* Piece of A at p: element (m, k) at p[m * ld + k] where major is MOE_MAJOR_K, at p[k * ld + m]
   where it is MOE_MAJOR_MN. */
MOE_DEVICE void moei_mma_load_a(moei_mma_a* f, const uint16_t* p, int ld, const int dtype,
                                const int major)
{
    if (dtype == MOE_FP16) {
        if (major == MOE_MAJOR_K) nvcuda::wmma::load_matrix_sync(f->hk, (const __half*)p, ld);
        else nvcuda::wmma::load_matrix_sync(f->hm, (const __half*)p, ld);
    } else {
#if MOEI_MMA_BF16
        if (major == MOE_MAJOR_K) MOEI_MMA_LOAD_BF16(a, row, f->bk, p, ld);
        else MOEI_MMA_LOAD_BF16(a, col, f->bm, p, ld);
#endif
    }
}

/* Piece of B at p: element (k, n) at p[n * ld + k] where major is MOE_MAJOR_K, at p[k * ld + n]
   where it is MOE_MAJOR_MN. */
MOE_DEVICE void moei_mma_load_b(moei_mma_b* f, const uint16_t* p, int ld, const int dtype,
                                const int major)
{
    if (dtype == MOE_FP16) {
        if (major == MOE_MAJOR_K) nvcuda::wmma::load_matrix_sync(f->hk, (const __half*)p, ld);
        else nvcuda::wmma::load_matrix_sync(f->hm, (const __half*)p, ld);
    } else {
#if MOEI_MMA_BF16
        if (major == MOE_MAJOR_K) MOEI_MMA_LOAD_BF16(b, col, f->bk, p, ld);
        else MOEI_MMA_LOAD_BF16(b, row, f->bm, p, ld);
#endif
    }
}

MOE_DEVICE void moei_mma_zero(moei_mma_c* c) { nvcuda::wmma::fill_fragment(*c, 0.0f); }

/* c += a * b */
MOE_DEVICE void moei_mma(moei_mma_c* c, const moei_mma_a* a, const moei_mma_b* b, const int dtype,
                         const int a_major, const int b_major)
{
    if (dtype == MOE_FP16) {
        if (a_major == MOE_MAJOR_K && b_major == MOE_MAJOR_K)
            nvcuda::wmma::mma_sync(*c, a->hk, b->hk, *c);
        else if (a_major == MOE_MAJOR_K) nvcuda::wmma::mma_sync(*c, a->hk, b->hm, *c);
        else if (b_major == MOE_MAJOR_K) nvcuda::wmma::mma_sync(*c, a->hm, b->hk, *c);
        else nvcuda::wmma::mma_sync(*c, a->hm, b->hm, *c);
    } else {
#if MOEI_MMA_BF16
        if (a_major == MOE_MAJOR_K && b_major == MOE_MAJOR_K)
            nvcuda::wmma::mma_sync(*c, a->bk, b->bk, *c);
        else if (a_major == MOE_MAJOR_K) nvcuda::wmma::mma_sync(*c, a->bk, b->bm, *c);
        else if (b_major == MOE_MAJOR_K) nvcuda::wmma::mma_sync(*c, a->bm, b->bk, *c);
        else nvcuda::wmma::mma_sync(*c, a->bm, b->bm, *c);
#endif
    }
}

/* Rows of the piece at p, ld floats apart. */
MOE_DEVICE void moei_mma_store(float* p, const moei_mma_c* c, int ld)
{
    nvcuda::wmma::store_matrix_sync(p, *c, (unsigned)ld, nvcuda::wmma::mem_row_major);
}

#undef MOEI_MMA_LOAD_BF16

#endif
#endif
