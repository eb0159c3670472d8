/* experts_backward.h: the reference of moe/experts_backward.cuh. C11 and C++14; no CUDA.

   For each row r of expert e, with slot s = row_slot[r], token t = s / K and weight w = weights[s]
   (without row_slot s = t = r), d = w2[e]^T dy[t]:

     act[r]     = w activation(pre[r])          dpre[r] = w d * derivatives of the activation
     rows[r]    = w1[e]^T dpre[r]               dweights[s] = d . activation(pre[r]) + dy[t] . bias2[e]
     dw2[e]    += dy[t] act[r]^T                dw1[e] += dpre[r] x[t]^T
     dbias2[e] += w dy[t]                       dbias1[e] += dpre[r]

   A row with a slot of -1 or past the last has zeros, and adds nothing. Columns of pre, dpre, dbias1
   and rows of dw1 are all gates and then all ups, whatever gate_up says of w1.

   Functions: moe_ref_experts_backward_f32 and moe_ref_experts_backward_f64. */
#ifndef MOE_REF_EXPERTS_BACKWARD_H
#define MOE_REF_EXPERTS_BACKWARD_H

#include <string.h>

#include "block_layer.h" /* derivatives of activations */

typedef struct moe_ref_experts_backward_desc {
    const void* x;                /* [T, H] x_dtype; without row_slot [R, H] */
    const void* dy;               /* [T, H] x_dtype; without row_slot [R, H] */
    const void* pre;              /* [R, 2I] or [R, I] pre_dtype */
    const void* weights;          /* [T, K] weights_dtype, without row_slot [R]; null: 1 each */
    const int32_t* row_slot;      /* [R]; or null */
    const int32_t* expert_offset; /* [E + 1] */
    moe_weights w1, w2;           /* as in experts.h, w_dtype */
    const void* bias2;            /* [E, H] w_dtype; or null */
    int64_t x_stride, dy_stride;  /* elements between rows; 0 = H */
    int32_t x_dtype, w_dtype, pre_dtype, weights_dtype; /* moe_dtype or MOE_REF_REAL */
    int32_t act_dtype;                                  /* of act and dpre; 0 = not rounded */
    int32_t d_bits; /* significant bits of d where it is rounded before it is used; 0 = not */
    int32_t activation, gate_up; /* 0: SwiGLU, concatenated */
    float alpha, limit;          /* of the clamped SwiGLU; 0 = 1.702 and 7 */
    int32_t num_tokens, num_experts, top_k, hidden, intermediate; /* T, E, K, H, I */
} moe_ref_experts_backward_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "experts_backward.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "experts_backward.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
