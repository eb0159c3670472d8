/* args.h: what the kernels of the grouped GEMMs take: descriptors, checked and resolved. C11 and C++14.

   Two neighbours that share 8 bytes are loaded as one, which moves nvcc's choice of registers. Measured
   on an H200: n beside k makes the up product 2 % quicker, m beside n the k-grouped one 5 % slower. */
#ifndef MOE_GEMM_ARGS_H
#define MOE_GEMM_ARGS_H

#include "../layout.h"

/* C [.., n], and what happens to the sums on their way to it. */
typedef struct moe_gemm_output {
    void* base;         /* first row; null with a table */
    void* const* table; /* [E] where each expert's rows begin; or null */
    int64_t stride;     /* elements between rows */
    const void* bias;   /* [E, n], with gate and up [E, 2n]; or null */
    int32_t dtype;      /* of C: bias_dtype or fp32 */
    int32_t bias_dtype; /* fp16 or bf16 */
    int32_t activation; /* moe_activation, never 0 */
    int32_t gated;      /* of a gated activation how B has gate and up, a moe_gate_up; else 0 */
    int32_t accumulate; /* 1: added to what C holds; 0: written */
    float alpha, limit; /* of MOE_ACTIVATION_SWIGLU_CLAMPED */
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
    int32_t num_experts, num_rows, n, k, row_div, rank;
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
