/* gemm.h: the reference of the grouped GEMM. C11 and C++14; no CUDA.

     c[r, n] = bias[e, n] + sum over k of a[a_row(r), k] * b[e][n, k]
     e is the expert that owns row r: expert_offset[e] <= r < expert_offset[e + 1]
     a_row(r) = row_index ? row_index[r] / row_div : r

   With a list of groups e is instead the expert of the group that has row r. Rows in no group are
   not written.

   A row_index of -1 (or outside 0 .. a_rows-1, if a_rows is given) reads zeros.
   Functions: moe_ref_gemm_f32 and moe_ref_gemm_f64. */
#ifndef MOE_REF_GEMM_H
#define MOE_REF_GEMM_H

#include "../gemm/desc.h"
#include "real.h"

typedef struct moe_ref_gemm_desc {
    const void* a;                /* [a_rows, k] a_dtype */
    const int32_t* row_index;     /* [R] divided by row_div: row of a; or null: row r */
    const int32_t* expert_offset; /* [E + 1]; not read with a list of groups */
    const moe_gemm_group* group;  /* [num_groups]; or null: group e is expert e's rows */
    const void* bias;             /* [E, n] bias_dtype; or null */
    moe_weights b;                /* [E, n, k], or [E, k, n] where mn-major; host pointers */
    int64_t a_stride;             /* elements between rows; 0 = k */
    int64_t bias_stride;          /* elements between experts; 0 = n */
    int64_t a_rows;               /* rows of a, for the bounds check; 0 = not checked */
    int32_t a_dtype;              /* moe_dtype or MOE_REF_REAL */
    int32_t b_dtype;              /* moe_dtype */
    int32_t bias_dtype;           /* moe_dtype or MOE_REF_REAL; 0 = fp32 */
    int32_t row_div;              /* >= 1; 0 = 1 */
    int32_t num_experts, n, k;    /* E, n, k */
    int32_t num_groups;           /* read with group */
    int32_t use_up;               /* 1: reads b's `up` matrices in place of base and table */
} moe_ref_gemm_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "gemm.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "gemm.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
