/* layer.h: the reference of the whole layer: router, plain gate, route with its options, experts,
   a shared expert, combine. C11 and C++14; no CUDA.

   moe_ref_layer_f32 and moe_ref_layer_f64. Nothing is rounded between the stations unless a
   dtype below asks for it, as kernels do that keep an intermediate result in that dtype. */
#ifndef MOE_REF_LAYER_H
#define MOE_REF_LAYER_H

#include "combine.h"
#include "experts.h"
#include "gate.h"
#include "route.h"
#include "router.h"

/* An MLP that every token goes through, as in moe_layer_shared. */
typedef struct moe_ref_layer_shared {
    moe_weights w1, w2; /* w_dtype */
    const void* bias1;  /* bias_dtype */
    const void* bias2;
    const float* weight;  /* [T]; null = 1 each */
    int32_t intermediate; /* 0 = none */
    int32_t activation, gate_up;
    float alpha, limit;
} moe_ref_layer_shared;

typedef struct moe_ref_layer_desc {
    const void* x;        /* [T, H] x_dtype */
    const void* router;   /* [E, H] router_dtype; unused where logits are given */
    const void* logits;   /* [T, E] logits_dtype; null: the router's */
    const void* residual; /* [T, H] residual_dtype; or null */
    moe_weights w1, w2;   /* as in experts.h; of physical experts, with replicas */
    const void* bias1;
    const void* bias2;
    int64_t x_stride, router_stride, logits_stride, residual_stride; /* elements; 0 = dense */
    int32_t x_dtype, w_dtype, router_dtype, residual_dtype;          /* moe_dtype */
    int32_t bias_dtype;                                              /* 0 = fp32 */
    int32_t logits_dtype; /* of given logits; else what the router's are rounded to, 0 = not */
    int32_t act_dtype;    /* what the activations are rounded to; 0 = not rounded */
    int32_t rows_dtype;   /* what the expert rows are rounded to; 0 = not rounded */
    int32_t num_tokens, num_experts, top_k, hidden, intermediate;
    int32_t score, renormalize; /* as in gate.h */
    float scale;
    int32_t activation; /* moe_activation; 0 = SwiGLU */
    int32_t gate_up;    /* moe_gate_up */
    float alpha, limit; /* of the clamped SwiGLU; 0 = 1.702 and 7 */
    moe_ref_route_desc route; /* its options and optional outputs, else 0 */
    moe_ref_layer_shared shared;
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
