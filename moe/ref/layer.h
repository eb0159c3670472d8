/* layer.h: the reference of the whole layer: router, gate without rules, route with its options,
   experts, a shared expert, combine. C11 and C++14; no CUDA.

   Between the stations a value is rounded only where a dtype below asks for it. Set the dtypes in
   which a kernel keeps its intermediate results.

   Functions: moe_ref_layer_f32 and moe_ref_layer_f64. */
#ifndef MOE_REF_LAYER_H
#define MOE_REF_LAYER_H

#include "combine.h"
#include "experts.h"
#include "gate.h"
#include "route.h"
#include "router.h"

/* An MLP that every token passes, as in moe_layer_shared. */
typedef struct moe_ref_layer_shared {
    moe_weights w1, w2;          /* [2 Is or Is, H] and [H, Is] w_dtype */
    const void* bias1;           /* [2 Is] or [Is] bias_dtype; or null */
    const void* bias2;           /* [H] bias_dtype; or null */
    const float* weight;         /* [T] factor on the output; null = 1 each */
    int32_t intermediate;        /* Is; 0 = no shared expert */
    int32_t activation, gate_up; /* moe_activation, moe_gate_up; 0 = SwiGLU, concatenated */
    float alpha, limit;          /* of the clamped SwiGLU; 0 = 1.702 and 7 */
} moe_ref_layer_shared;

typedef struct moe_ref_layer_desc {
    const void* x;        /* [T, H] x_dtype */
    const void* router;   /* [E, H] router_dtype; not read where logits are given */
    const void* logits;   /* [T, E] logits_dtype; null: computed by the router */
    const void* residual; /* [T, H] residual_dtype; or null */
    moe_weights w1, w2;   /* as in experts.h; of P physical experts with replicas */
    const void* bias1;    /* [P, 2I] or [P, I] bias_dtype; or null */
    const void* bias2;    /* [P, H] bias_dtype; or null */
    int64_t x_stride, router_stride, logits_stride, residual_stride; /* elements; 0 = dense */
    int32_t x_dtype, w_dtype, router_dtype, residual_dtype;          /* moe_dtype */
    int32_t bias_dtype;                                              /* moe_dtype; 0 = fp32 */
    int32_t logits_dtype; /* moe_dtype of given logits; of the router's 0 = not rounded */
    int32_t act_dtype;    /* moe_dtype of the activations; 0 = not rounded */
    int32_t rows_dtype;   /* moe_dtype of the expert rows; 0 = not rounded */
    int32_t num_tokens, num_experts, top_k, hidden, intermediate; /* T, E, K, H, I */
    int32_t score, renormalize;  /* as in gate.h */
    float scale;                 /* factor on the weights; 0 = 1 */
    int32_t activation;          /* moe_activation; 0 = SwiGLU */
    int32_t gate_up;             /* moe_gate_up; 0 = concatenated */
    float alpha, limit;          /* of the clamped SwiGLU; 0 = 1.702 and 7 */
    moe_ref_route_desc route;    /* its options and optional outputs; all else 0 */
    moe_ref_layer_shared shared; /* intermediate 0 = none */
} moe_ref_layer_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "layer.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "layer.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
