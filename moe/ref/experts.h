/* experts.h: the reference of the expert MLP. C11 and C++14; no CUDA.

   For each row r of expert e, with token t = row_slot[r] / K (or row r of x itself):

     h    = w1[e] x[t] + bias1[e]        2I numbers, gates and ups as gate_up says; not gated I
     a    = activation(h)                I numbers, rounded to act_dtype
     y[r] = w2[e] a + bias2[e]

   moe_activation in layout.h has the formulas.

   Functions: moe_ref_experts_f32 and moe_ref_experts_f64. */
#ifndef MOE_REF_EXPERTS_H
#define MOE_REF_EXPERTS_H

#include "gemm.h"

typedef struct moe_ref_experts_desc {
    const void* x;                /* [T, H] x_dtype; [R, H] in row order where row_slot is null */
    const int32_t* row_slot;      /* [R] slot of each row; or null */
    const int32_t* expert_offset; /* [E + 1] */
    moe_weights w1;               /* [E, 2I, H]; [E, I, H] with a separate `up` or where not gated;
                                     host pointers */
    moe_weights w2;               /* [E, H, I]; host pointers */
    const void* bias1;            /* [E, 2I] or [E, I] bias_dtype, in the order of w1's rows;
                                     separate: I gates, then I ups; or null */
    const void* bias2;            /* [E, H] bias_dtype; or null */
    int64_t x_stride;             /* elements between rows; 0 = H */
    int32_t x_dtype;              /* moe_dtype or MOE_REF_REAL */
    int32_t w_dtype;              /* moe_dtype, of w1 and w2 */
    int32_t bias_dtype;           /* moe_dtype; 0 = fp32 */
    int32_t act_dtype;            /* moe_dtype of a, between the products; 0 = not rounded */
    int32_t activation;           /* moe_activation; 0 = SwiGLU */
    float alpha, limit;           /* of the clamped SwiGLU; 0 = 1.702 and 7 */
    int32_t gate_up;              /* moe_gate_up, of gated activations; 0 = concatenated */
    int32_t num_experts, top_k, hidden, intermediate; /* E, K, H, I */
} moe_ref_experts_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "experts.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "experts.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
