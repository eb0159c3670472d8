/* backward_desc.h: the descriptor of the layer's backward pass, its stages and the view of its
   workspace. C11 and C++14. layer_backward.cuh defines what they mean. */
#ifndef MOE_LAYER_BACKWARD_DESC_H
#define MOE_LAYER_BACKWARD_DESC_H

#include "desc.h"

/* Gradients of the shared expert; each may be null. */
typedef struct moe_layer_backward_shared {
    moe_weight_grads dw1; /* as the shared expert's w1, grad_dtype */
    moe_weight_grads dw2; /* as its w2 */
    void* dbias1;         /* [2 Is] or [Is] grad_dtype */
    void* dbias2;         /* [H] grad_dtype */
    float* dweight;       /* [T] gradient by shared.weight */
} moe_layer_backward_shared;

typedef struct moe_layer_backward_desc {
    moe_layer_desc
        layer; /* as its forward was called, with `saved`. y and residual are not used; the
                             workspace may be another, of moe_layer_backward_workspace bytes */
    /* in */
    const void* dy;            /* [T, H] dtype, 16-byte aligned: gradient of a loss by y */
    const float* balance_grad; /* [E + 1] of balance_loss.cuh; null: no balance losses. With the
                                  caller's logits dlogits has their gradient, and is required */
    int64_t dy_stride;         /* elements between rows; 0 = H; multiple of 8 */
    /* out, gradients of the same loss; null: not computed */
    void* dx;             /* [T, H] dtype, 16-byte aligned; may be dy itself */
    int64_t dx_stride;    /* elements between rows; 0 = H; multiple of 8 */
    void* drouter;        /* [E, H] router_grad_dtype; with a router alone */
    float* dlogits;       /* [T, E]; not with ids */
    float* dweights;      /* [T, K] by the weights of the slots */
    moe_weight_grads dw1; /* [P, 2I, H] as w1, grad_dtype */
    moe_weight_grads dw2; /* [P, H, I] as w2, grad_dtype */
    void* dbias1;         /* [P, 2I] or [P, I] grad_dtype, ordered as bias1 */
    void* dbias2;         /* [P, H] grad_dtype */
    moe_layer_backward_shared shared;
    /* options */
    int32_t grad_dtype;        /* of dw1, dw2 and biases: dtype or fp32; 0 = dtype */
    int32_t router_grad_dtype; /* of drouter: fp32 or router_dtype; 0 = router_dtype */
    int32_t accumulate;        /* 1: adds to all gradients of weights, biases and router; rounded to
                                  grad_dtype each time, so take fp32 */
    int32_t dx_accumulate;     /* 1: dx += the gradient; for y = x + layer(x) let dx be dy */
    int32_t empty_experts; /* gradients of an expert without rows: 0: zeros; 1: left as they are */
    int32_t gather;        /* moe_layer_gather; 0 = chosen by shape and device */
} moe_layer_backward_desc;

/* How products of the backward pass read rows of dy and of x. */
typedef enum moe_layer_gather {
    MOE_LAYER_GATHER_AUTO = 0,
    MOE_LAYER_GATHER_FUSED, /* while they are loaded */
    MOE_LAYER_GATHER_FIRST  /* from copies in expert order, made in the workspace's [R, H] rows */
} moe_layer_gather;

/* Buffers of the workspace; null where not used. */
typedef struct moe_layer_backward_view {
    void* experts_workspace; /* of the experts, then of the shared expert */
    void* act;               /* [R, I] dtype; of the shared expert [T, Is] */
    void* rows;              /* [R, H] rows_dtype: the gradients */
    void* copies; /* [R, H] dtype: copies of dy, then of x; before the gradients in `rows`,
                                but for a layer over ranks with overlap */
    void* router_workspace; /* in `rows`, between these uses */
    float* dot;             /* [R, ceil(I / 64)] */
    float* shared_dot;      /* [T, ceil(Is / 64)] */
    float* dweights;        /* [T, K]: the caller's or in the workspace, like the next */
    float* dlogits;         /* [T, E] */
    void* pre;              /* as in moe_layer_view: saved or computed again */
    void* shared_pre;
    int32_t* shared_slot; /* [T] tokens that the shared expert reads, with token_disabled */
} moe_layer_backward_view;

/* Stages of the backward pass, in the order of moe_layer_backward_run. */
typedef enum moe_layer_backward_stage {
    MOE_LAYER_BACKWARD_RECOMPUTE, /* pre-activations, with recompute */
    MOE_LAYER_BACKWARD_GATHER_DY, /* dy in expert order */
    MOE_LAYER_BACKWARD_PRE,       /* gradient by the pre-activations */
    MOE_LAYER_BACKWARD_DW2,
    MOE_LAYER_BACKWARD_DBIAS2,
    MOE_LAYER_BACKWARD_DWEIGHTS,
    MOE_LAYER_BACKWARD_SHARED_PRE, /* the same of the shared expert */
    MOE_LAYER_BACKWARD_SHARED_DW2,
    MOE_LAYER_BACKWARD_SHARED_DBIAS2,
    MOE_LAYER_BACKWARD_SHARED_DWEIGHT,
    MOE_LAYER_BACKWARD_GATE,   /* dlogits */
    MOE_LAYER_BACKWARD_ROUTER, /* drouter, and the router's part of dx: dy is not read any more */
    MOE_LAYER_BACKWARD_SHARED_DW1,
    MOE_LAYER_BACKWARD_SHARED_DBIAS1,
    MOE_LAYER_BACKWARD_SHARED_ROWS, /* the shared expert's part of dx */
    MOE_LAYER_BACKWARD_GATHER_X,    /* x in expert order */
    MOE_LAYER_BACKWARD_DW1,
    MOE_LAYER_BACKWARD_DBIAS1,
    MOE_LAYER_BACKWARD_ROWS,    /* gradient by each row's token */
    MOE_LAYER_BACKWARD_COMBINE, /* dx */
    MOE_LAYER_BACKWARD_STAGES
} moe_layer_backward_stage;

/* Returns the name of a stage, "?" for a value that is none: static storage. */
MOE_HOST const char* moe_layer_backward_stage_name(int stage)
{
    static const char* const name[] = {
        "recompute", "gather_dy",  "pre",        "dw2",           "dbias2",
        "dweights",  "shared_pre", "shared_dw2", "shared_dbias2", "shared_dweight",
        "gate",      "router",     "shared_dw1", "shared_dbias1", "shared_rows",
        "gather_x",  "dw1",        "dbias1",     "rows",          "combine"};
    return stage >= 0 && stage < MOE_LAYER_BACKWARD_STAGES ? name[stage] : "?";
}

#endif
