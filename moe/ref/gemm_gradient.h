/* gemm_gradient.h: the reference of the grouped GEMM's backward pass through an activation. C11 and
   C++14; no CUDA.

   P is the product of gemm.h, without bias. For row r and column j, v = pre[r, j], gated
   u = pre[r, n + j], w the row's weight:

     c[r, j]     = w P[r, j] * derivative of activation(v, u) by v
     c[r, n + j] = w P[r, j] * derivative by u, gated
     act[r, j]   = w activation(v, u)
     dot[r, p]   = sum of P[r, j] activation(v, u) over 64 columns, j / 64 = p

   w = row_weight[row_index[r]], without row_index row_weight[r], without row_weight 1. A row with no
   row of a has w = 0, and zeros in place of pre.

   Functions: moe_ref_gemm_gradient_f32 and moe_ref_gemm_gradient_f64. */
#ifndef MOE_REF_GEMM_GRADIENT_H
#define MOE_REF_GEMM_GRADIENT_H

#include "block_layer.h" /* derivatives of activations */
#include "gemm.h"

typedef struct moe_ref_gemm_gradient_desc {
    moe_ref_gemm_desc product; /* of P [R, n]; bias is not used */
    const void* pre;           /* [R, n], gated [R, 2n] pre_dtype */
    const float* row_weight;   /* as above; or null */
    int64_t pre_stride;        /* elements between rows; 0 = dense */
    int32_t pre_dtype;         /* moe_dtype or MOE_REF_REAL */
    int32_t activation;        /* moe_activation, not 0 */
    float alpha, limit;        /* of the clamped SwiGLU; 0 = 1.702 and 7 */
} moe_ref_gemm_gradient_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "gemm_gradient.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "gemm_gradient.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
