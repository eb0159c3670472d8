/* block_layer.h: the reference of the block-sparse layer forms, forward and backward. C11 and
   C++14; no CUDA.

   For each slot (t, k) with expert e = ids[t, k] and weight w:

     h    = w1[e] x[t]                  2I numbers, all gates and then all ups; not gated I
     f    = activation(h)               I numbers
     y[t] += w2[e] (w f)

   Backward, from dy, the gradient of a loss by y:

     da   = w2[e]^T dy[t]               gradient by w f
     dweights[t, k] = da . f
     dh   = w da activation'(h)
     dw2[e] += dy[t] (w f)^T     dw1[e] += dh x[t]^T     dx[t] += w1[e]^T dh

   The clamped SwiGLU has the gradient of its inside at the clamp bounds themselves.

   Functions: moe_ref_block_layer_f32 and _f64, moe_ref_activation_grad_f32 and _f64. */
#ifndef MOE_REF_BLOCK_LAYER_H
#define MOE_REF_BLOCK_LAYER_H

#include <string.h>

#include "experts.h"

typedef struct moe_ref_block_layer_desc {
    const void* x;       /* [T, H] x_dtype */
    const int32_t* ids;  /* [T, K], outside 0 .. E-1: unused; null: slot k of each token is expert
                            k, K is E */
    const void* weights; /* [T, K] weights_dtype */
    const void* dy;      /* [T, H] dy_dtype; null: forward alone */
    moe_weights w1, w2;  /* as in block_layer/desc.h, w_dtype; host pointers */
    int64_t x_stride, dy_stride;              /* elements between rows; 0 = H */
    int32_t x_dtype, dy_dtype, weights_dtype; /* moe_dtype or MOE_REF_REAL */
    int32_t w_dtype;                          /* moe_dtype; MOE_REF_REAL: dense, at base */
    int32_t pre_dtype;                        /* moe_dtype of h; 0 = not rounded */
    int32_t act_dtype;                        /* moe_dtype of w f, da and dh; 0 = not rounded */
    int32_t rows_dtype; /* moe_dtype of a slot's term of y and of dx; 0 = not rounded */
    int32_t activation; /* moe_activation; 0 = SwiGLU */
    float alpha, limit; /* of the clamped SwiGLU; 0 = 1.702 and 7 */
    int32_t num_tokens, num_experts, top_k, hidden, intermediate; /* T, E, K, H, I */
} moe_ref_block_layer_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "block_layer.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "block_layer.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
