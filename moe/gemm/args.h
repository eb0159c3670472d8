/* args.h: what the kernels of the grouped GEMMs take: descriptors, checked and resolved. C11 and C++14.

   The order of the numbers is part of the code: two that share 8 bytes are loaded as one, which moves
   ptxas's choice of registers, and the large tiles have none to spare. In this order no target spills.
   Seen of others: up products 2 % slower, k-grouped ones 5 %, and spills on sm_75 and sm_80. */
#ifndef MOE_GEMM_ARGS_H
#define MOE_GEMM_ARGS_H

#include "../layout.h"

/* C [.., n], and what happens to the sums on their way to it. */
typedef struct moe_gemm_output {
    void* base;         /* first row; null with a table */
    void* const* table; /* [E] where each expert's rows begin; or null */
    int64_t stride;     /* elements between rows */
    const void* bias;   /* [E, n], with gate and up [E, 2n]; or null */
    float limit, alpha; /* of MOE_ACTIVATION_SWIGLU_CLAMPED */
    int32_t activation; /* moe_activation, never 0 */
    int32_t accumulate; /* 1: added to what C holds; 0: written */
    int32_t dtype;      /* of C: bias_dtype or fp32 */
    int32_t gated;      /* of a gated activation how B has gate and up, a moe_gate_up; else 0 */
    int32_t bias_dtype; /* fp16 or bf16 */
} moe_gemm_output;

/* One product per expert: gemm/grouped.cuh. */
typedef struct moe_grouped_gemm_args {
    const void* a;
    const int32_t* row_index;     /* or null */
    const int32_t* expert_offset; /* or null */
    moe_weights b;
    moe_gemm_output c;
    uint64_t* fault; /* or null */
    int64_t a_stride, a_rows;
    int32_t num_rows, num_experts, k, n, rank, row_div;
} moe_grouped_gemm_args;

/* One product per expert over its rows: gemm/k_grouped.cuh. */
typedef struct moe_k_grouped_gemm_args {
    const void *a, *b;                /* of products without rows any address: nothing is read */
    const int32_t *a_index, *b_index; /* or null */
    const int32_t* expert_offset;     /* or null */
    moe_gemm_output c;                /* rows of an expert's C: 0 .. m */
    uint64_t* fault;                  /* or null */
    int64_t a_stride, b_stride, a_rows, b_rows;
    int64_t c_expert_bytes; /* between matrices of c.base */
    int32_t num_experts, num_rows, rank, m, n, a_div, b_div;
} moe_k_grouped_gemm_args;

#endif
