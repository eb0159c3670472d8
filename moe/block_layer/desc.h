/* desc.h: the descriptor of the block-sparse layer forms. C11 and C++14. block_layer.cuh has the
   formulas. */
#ifndef MOE_BLOCK_LAYER_DESC_H
#define MOE_BLOCK_LAYER_DESC_H

#include "../block_sparse/desc.h"

/* The experts of a token. */
typedef enum moe_block_layer_form {
    MOE_BLOCK_LAYER_DENSE = 1, /* every expert, weighted */
    MOE_BLOCK_LAYER_SPARSE,    /* the token's own K */
    MOE_BLOCK_LAYER_BATCH      /* K that the whole batch has chosen */
} moe_block_layer_form;

/* One descriptor for forward and backward; each reads its own fields and ignores the others. */
typedef struct moe_block_layer_desc {
    /* in */
    const void* x;        /* [T, H] dtype, 16-byte aligned */
    const int32_t* ids;   /* [T, K] as moe_gate writes them, -1 = none; dense: null. batch: at most
                             K different experts in all */
    const float* weights; /* [T, K]; dense: [T, E] */
    moe_weights w1;       /* [E, 2I, H] dtype, k-major: all gates of an expert, then all ups; of
                             activations that are not gated [E, I, H] */
    moe_weights w2;       /* [E, H, I] dtype, k-major */
    int64_t x_stride;     /* elements between rows; 0 = H; multiple of 8 */
    /* out: forward */
    void* y;          /* [T, H] dtype, 16-byte aligned */
    int64_t y_stride; /* elements between rows; 0 = H; multiple of 8 */
    /* in: backward */
    const void* dy;    /* [T, H] dtype, 16-byte aligned: gradient of a loss with respect to y */
    int64_t dy_stride; /* elements between rows; 0 = H; multiple of 8 */
    /* out: backward; gradients of the same loss; null: not computed */
    void* dx;             /* [T, H] dtype, 16-byte aligned; or null; may be dy itself */
    int64_t dx_stride;    /* elements between rows; 0 = H; multiple of 8 */
    void* dw1;            /* [max_experts, 2I or I, H] grad_dtype, 16-byte aligned; or null */
    void* dw2;            /* [max_experts, H, I] grad_dtype, 16-byte aligned; or null */
    int32_t* grad_expert; /* [max_experts] expert of each matrix of dw1 and dw2, ascending; -1:
                             none, the matrix is not written. Required with dw1 or dw2; else null */
    float* dweights;      /* shape of weights; 0 where ids has no expert; or null */
    void* act_grad;       /* moe_block_layer_bytes.act_grad bytes, 16-byte aligned: the gradient of
                             the pre-activations; null: written over the pre-activations in
                             `saved`, which then serves one backward */
    uint64_t* fault;      /* [1] fault word; or null */
    /* sizes and options */
    int32_t form;                   /* moe_block_layer_form */
    int32_t num_tokens;             /* T >= 0 */
    int32_t hidden;                 /* H, multiple of 8, up to 2^28 */
    int32_t intermediate;           /* I, multiple of block, up to 2^28 */
    int32_t num_experts;            /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;                  /* K, 1 .. 2048; dense: 0 */
    int32_t max_experts;            /* matrices of dw1 and of dw2, 1 .. E; 0 = E */
    int32_t block;                  /* rows and columns of a sparse block: 16, 32, 64 or 128;
                                       0 = 128 */
    int32_t dtype;                  /* fp16 or bf16; 0 = bf16 */
    int32_t grad_dtype;             /* of dw1 and dw2: dtype or fp32; 0 = dtype */
    int32_t activation;             /* moe_activation; 0 = SwiGLU */
    float alpha, limit;             /* of the clamped SwiGLU, else 0: |alpha| < 2.3e38, 0 = 1.702;
                                       limit finite and not negative, 0 = 7 */
    moe_block_sparse_choice choice; /* of all products; all 0 = by the rule in block_sparse.cuh */
    int32_t rank;                   /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    /* memory */
    void* saved;            /* 256-byte aligned: data of forward for its backward */
    size_t saved_bytes;     /* >= moe_block_layer_bytes.saved */
    void* workspace;        /* 256-byte aligned: scratch of one call */
    size_t workspace_bytes; /* >= moe_block_layer_bytes.forward, .backward */
} moe_block_layer_desc;

/* Bytes that a layer of these sizes takes, for any routing. */
typedef struct moe_block_layer_bytes {
    size_t saved;    /* from forward to backward */
    size_t forward;  /* workspace of moe_block_layer_forward */
    size_t backward; /* workspace of moe_block_layer_backward; may be the same memory */
    size_t act_grad; /* of the descriptor's act_grad, if not null */
} moe_block_layer_bytes;

#endif
