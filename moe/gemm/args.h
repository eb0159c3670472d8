/* args.h: kernel arguments of the grouped GEMMs: descriptors, checked and resolved. C11 and C++14.

   grouped.cuh and k_grouped.cuh fill them in on the host; kernels take them by value.

   Keep the order of the members. ptxas loads two numbers that share 8 bytes as one. The order thus
   changes the choice of registers, and the large tiles have no register to spare. In this order no
   target spills. Other orders made up products 2 % slower, k-grouped products 5 % slower, or
   spilled on sm_75 and sm_80. */
#ifndef MOE_GEMM_ARGS_H
#define MOE_GEMM_ARGS_H

#include "desc.h"

/* C [.., n], and the epilogue before the store. */
typedef struct moe_gemm_output {
    void* base;         /* [.., n] dtype: row 0 of C, k-grouped: of expert 0's C; null with table */
    void* const* table; /* [E] device array: address of each expert's first row; or null */
    int64_t stride;     /* elements between rows */
    const void* bias;   /* [E, n] bias_dtype, with gate and up [E, 2n]; or null */
    float limit, alpha; /* of MOE_ACTIVATION_SWIGLU_CLAMPED: limit > 0, alpha not 0; otherwise 0 */
    int32_t activation; /* moe_activation, never 0 */
    int32_t accumulate; /* 1: adds the result to C; 0: overwrites C */
    int32_t dtype;      /* of C: bias_dtype or MOE_FP32 */
    int32_t gated;      /* layout of gate and up in B: a moe_gate_up; 0: activation not gated */
    int32_t bias_dtype; /* MOE_FP16 or MOE_BF16: of A, B, bias and pre */
    void* pre;          /* [num_rows, n], gated [num_rows, 2n]: before the activation; or null */
    int64_t pre_stride; /* elements between rows of pre */
} moe_gemm_output;

/* The backward pass through an activation (gemm/gradient.cuh), for kernels that have it:
   c.activation is the activation, c.pre is an input, c.gated is 0. */
typedef struct moe_gemm_gradient {
    const float* row_weight; /* [num_rows], with row_index by index[r]; null: 1 */
    void* act;               /* [num_rows, n] c.bias_dtype: weighted activations; or null */
    int64_t act_stride;      /* elements between rows of act */
    uint16_t* hand;          /* wgmma: act, or C where there is none: holds P of a tile until act
                                and C of the tile are stored (wgmma/gradient.cuh) */
    int64_t hand_stride;     /* elements between rows of hand */
    float* dot;    /* [num_rows, ceil(n / 64)]: parts of the weights' gradients; or null */
    int32_t gated; /* 1: pre and C have n gates, then n ups; 0: n columns */
} moe_gemm_gradient;

/* One product per expert: gemm/grouped.cuh. dtype is c.bias_dtype. */
typedef struct moe_grouped_gemm_args {
    const void* a;                /* [a_rows, k] dtype; mn-major: [k, a_rows] */
    const int32_t* row_index;     /* [num_rows] row(r) = row_index[r] / row_div, -1: 0s; null: r */
    const int32_t* expert_offset; /* [E + 1]; null: one expert owns all num_rows rows */
    moe_weights b;                /* [E, n, k], gated [E, 2n, k]; strides and major filled in */
    moe_gemm_output c;            /* [num_rows, n] in expert order */
    uint64_t* fault;              /* [1] fault word; or null */
    int64_t a_stride, a_rows;     /* elements between rows (mn-major: depths) of A; rows of A */
    int32_t num_rows, num_experts, k, n, rank, row_div; /* as in gemm/desc.h; row_div >= 1 */
    const moe_gemm_group* group; /* [num_groups] rows of each group; null: each expert is one */
    const uint32_t* ready;       /* [ceil(num_rows / 128)] as in gemm/desc.h; or null */
    uint32_t* done;              /* [ceil(num_rows / 128)] as in gemm/desc.h; or null */
    int32_t num_groups;          /* 0 where group is null */
    uint32_t ready_value, ready_timeout_ms; /* as in gemm/desc.h; the second is not 0 */
    moe_gemm_gradient gradient;
} moe_grouped_gemm_args;

/* One product per expert, reduced over the expert's rows: gemm/k_grouped.cuh. */
typedef struct moe_k_grouped_gemm_args {
    const void *a, *b;                /* [a_rows, m], [b_rows, n] c.bias_dtype; never null: with
                                         num_rows = 0 any address, which is not read */
    const int32_t *a_index, *b_index; /* [num_rows] index[r] / div, -1: r is not summed; null: r */
    const int32_t* expert_offset;     /* [E + 1]; null: one expert owns all num_rows rows */
    moe_gemm_output c;                /* [E, m, n]; rows count from 0 within an expert's C */
    uint64_t* fault;                  /* [1] fault word; or null */
    int64_t a_stride, b_stride, a_rows, b_rows; /* elements between rows; number of rows */
    int64_t c_expert_bytes;           /* bytes between the matrices of c.base */
    int32_t num_experts, num_rows, rank, m, n, a_div, b_div; /* as in gemm/k_desc.h; div >= 1 */
    int32_t skip_empty;               /* 1: C of experts without rows is left as it is */
} moe_k_grouped_gemm_args;

#endif
