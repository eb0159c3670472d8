/* desc.h: the descriptor of the experts' backward pass, and its stages. C11 and C++14.
   experts_backward.cuh has the formulas. */
#ifndef MOE_EXPERTS_BACKWARD_DESC_H
#define MOE_EXPERTS_BACKWARD_DESC_H

#include "../gemm/desc.h"

#define MOE_EXPERTS_BACKWARD_WORKSPACE (6 * MOE_GROUPED_GEMM_WORKSPACE) /* bytes */

/* Fields as in moe_experts_desc where they have its names. All of x, dy, pre, rows and matrices are
   16-byte aligned. */
typedef struct moe_experts_backward_desc {
    /* in */
    const void* x;  /* [T, H] dtype; row_slot null: [num_rows, H] in expert order */
    const void* dy; /* [T, H] dtype: gradient by the sum of a token's weighted rows; row_slot null:
                          [num_rows, H] in expert order */
    const void* x_rows;  /* [num_rows, H] the rows of x in expert order, zeros where row_slot is -1:
                            read in place of x; or null: products gather rows of x */
    const void* dy_rows; /* the same of dy; requires row_weight where weights are given; or null */
    void* pre;           /* [num_rows, 2I] or [num_rows, I] dtype, of forward; gates, then ups */
    const float* weights;    /* [T, K] factor on each slot's row; row_slot null: [num_rows]; null: 1
                                each */
    const float* row_weight; /* [num_rows] the same in expert order; read with dy_rows alone */
    moe_weights w1;          /* as in forward; interleaved: one array, k-major */
    moe_weights w2;
    const void* bias2;            /* [E, H] dtype, for dweights; or null */
    const int32_t* expert_offset; /* [E + 1]; null with one expert: all num_rows rows */
    const int32_t* row_slot;      /* [num_rows] slot of each row, -1: none; null: in expert order */
    const int32_t* slot_row;      /* [T, K] row of each slot; required with dweights and row_slot */
    int64_t x_stride, dy_stride;  /* elements between rows; 0 = H; multiples of 8 */
    /* out, each may be null */
    void* rows; /* [num_rows, H] rows_dtype: gradient by the token of each row, to be added up by
                   combine without weights; may be the memory of dy, x_rows and dy_rows */
    int64_t row_stride;   /* elements between rows of `rows`; 0 = H; multiple of 8 */
    moe_weight_grads dw1; /* w1's shape, layout and major, grad_dtype */
    moe_weight_grads dw2; /* w2's */
    void* dbias1;         /* [E, 2I] or [E, I] grad_dtype, ordered as bias1 */
    void* dbias2;         /* [E, H] grad_dtype */
    float* dweights;      /* shape of weights; 0 where a slot has no row */
    /* scratch */
    void* dpre; /* as pre: gradient of the pre-activations; null: written over pre */
    void* act;  /* [num_rows, I] dtype: weighted activations; required with dw2. Hopper's
                        path takes a product with dpre null where act is given */
    float* dot; /* [num_rows, ceil(I / 64)] parts of dweights, written where given; required with
                        dweights */
    uint64_t* fault; /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens, num_rows, hidden, intermediate, num_experts, top_k; /* as in forward */
    int32_t dtype;           /* fp16 or bf16; 0 = bf16 */
    int32_t rows_dtype;      /* of rows: dtype or fp32; 0 = dtype */
    int32_t rows_accumulate; /* 1: adds to rows; 0: overwrites */
    int32_t grad_dtype;      /* of dw1, dw2 and both biases: dtype or fp32; 0 = dtype */
    int32_t activation;      /* moe_activation; 0 = SwiGLU */
    int32_t gate_up;         /* moe_gate_up; 0 = concatenated */
    float alpha, limit;      /* of the clamped SwiGLU, as in forward */
    int32_t accumulate;      /* 1: adds to dw1, dw2, dbias1 and dbias2; 0: overwrites */
    int32_t empty_experts; /* gradients of an expert without rows: 0: zeros; 1: left as they are */
    int32_t tile;          /* moe_tile of all products; 0 = chosen by shape and device */
    int32_t path;          /* moe_gemm_path that all products must run; 0 = chosen */
    int32_t batch_invariant; /* as in gemm/desc.h, for the products that write rows */
    int32_t grid_limit;      /* as in gemm/desc.h */
    int32_t rank;            /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    /* workspace */
    void* workspace;        /* 16-byte aligned, for one call at a time; or null, as in forward */
    size_t workspace_bytes; /* bytes at workspace: MOE_EXPERTS_BACKWARD_WORKSPACE or more */
} moe_experts_backward_desc;

/* Stages of the backward pass, in their order. DW2 and DBIAS2 are the last to read dy_rows, DW1 to
   read x_rows; ROWS writes rows. */
typedef enum moe_experts_backward_stage {
    MOE_EXPERTS_BACKWARD_PRE,      /* dy, pre -> dpre, act, dot */
    MOE_EXPERTS_BACKWARD_DW2,      /* dy, act -> dw2 */
    MOE_EXPERTS_BACKWARD_DBIAS2,   /* dy -> dbias2 */
    MOE_EXPERTS_BACKWARD_DWEIGHTS, /* dot -> dweights */
    MOE_EXPERTS_BACKWARD_DW1,      /* dpre, x -> dw1 */
    MOE_EXPERTS_BACKWARD_DBIAS1,   /* dpre -> dbias1 */
    MOE_EXPERTS_BACKWARD_ROWS,     /* dpre, w1 -> rows */
    MOE_EXPERTS_BACKWARD_STAGES
} moe_experts_backward_stage;

#endif
