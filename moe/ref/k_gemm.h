/* k_gemm.h: the reference of the k-grouped GEMM: an expert's rows are the reduced dimension. C11
   and C++14; no CUDA.

     c[e, i, j] = sum over rows r of expert e of a[a_row(r), i] * b[b_row(r), j]
     a_row(r) = a_index ? a_index[r] / a_div : r, and the same of b

   A row with an index of -1 (or outside 0 .. a_rows-1, if a_rows is given) adds nothing.
   Functions: moe_ref_k_gemm_f32 and moe_ref_k_gemm_f64. */
#ifndef MOE_REF_K_GEMM_H
#define MOE_REF_K_GEMM_H

#include "real.h"

typedef struct moe_ref_k_gemm_desc {
    const void* a;                /* [a_rows, m] dtype */
    const void* b;                /* [b_rows, n] dtype */
    const int32_t* a_index;       /* [R] divided by a_div: row of a; or null: row r */
    const int32_t* b_index;       /* [R] divided by b_div: row of b; or null: row r */
    const int32_t* expert_offset; /* [E + 1] */
    int64_t a_stride, b_stride;   /* elements between rows; 0 = dense */
    int64_t a_rows, b_rows;       /* rows of a and b, for the bounds check; 0 = not checked */
    int32_t dtype;                /* moe_dtype or MOE_REF_REAL */
    int32_t a_div, b_div;         /* >= 1; 0 = 1 */
    int32_t num_experts, m, n;    /* E, m, n */
} moe_ref_k_gemm_desc;

/* Returns the row of a or b that row r reads; -1: none. */
MOE_HOST int64_t moei_ref_k_row(const int32_t* index, int64_t r, int32_t div, int64_t rows)
{
    int64_t from = index ? index[r] : r;
    if (from >= 0 && div > 1) from /= div;
    return from < 0 || (rows && from >= rows) ? -1 : from;
}

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "k_gemm.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "k_gemm.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
