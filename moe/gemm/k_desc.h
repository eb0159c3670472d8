/* k_desc.h: descriptor of the k-grouped GEMM, which reduces over the rows of each expert.
   k_grouped.cuh has the formula. C11 and C++14. */
#ifndef MOE_GEMM_K_DESC_H
#define MOE_GEMM_K_DESC_H

#include "../base/status.h"
#include "desc.h"

/* Most rows: the loader's look-ahead counts up to 447 rows past the last. */
#define MOE_K_GEMM_MAX_ROWS (0x7fffffff - 511)

typedef struct moe_k_grouped_gemm_desc {
    /* in */
    const void* a;                /* [a_rows, m] dtype, 16-byte aligned */
    const void* b;                /* [b_rows, n] dtype, 16-byte aligned */
    int64_t a_stride, b_stride;   /* elements between rows; 0 = dense; multiples of 8 */
    int64_t a_rows, b_rows;       /* rows of A and B, 0 .. MOE_GEMM_MAX_ROWS; 0 = num_rows */
    const int32_t* a_index;       /* [num_rows] a_row(r) = a_index[r] / a_div; -1: r is not summed;
                                     null = r */
    const int32_t* b_index;       /* [num_rows] b_row(r) = b_index[r] / b_div; else as a_index */
    const int32_t* expert_offset; /* [E + 1]; null with one expert: all num_rows rows */
    /* out */
    void* c;                 /* [E, m, n] c_dtype, 16-byte aligned; or null with a table */
    void* const* c_table;    /* [E] device array: each expert's matrix, 16-byte aligned; or null */
    int64_t c_stride;        /* elements between rows; 0 = n; multiple of 8 */
    int64_t c_expert_stride; /* elements between matrices of c; 0 = m c_stride; multiple of 8 */
    uint64_t* fault;         /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_experts;  /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t num_rows;     /* R, 0 .. MOE_K_GEMM_MAX_ROWS: upper bound of the rows */
    int32_t m, n;         /* rows and columns of each C: 8 .. 2^28; multiples of 8 */
    int32_t a_div, b_div; /* divide a_index, b_index, >= 1; 0 = 1; K maps slots to tokens */
    int32_t dtype;        /* of A and B: fp16 or bf16; 0 = bf16 */
    int32_t c_dtype;      /* dtype or fp32; 0 = dtype */
    int32_t accumulate;   /* 1: adds the result to C; 0: overwrites C */
    int32_t empty_experts; /* C of experts without rows: 0: zeros, with accumulate unchanged; 1: left
                              as it is */
    int32_t tile;         /* MOE_TILE_128x256, _128x128, _64x64; 0 = chosen by shape and device */
    int32_t path;         /* moe_gemm_path that must run; 0 = chosen */
    int32_t grid_limit;   /* most thread blocks, on the wgmma path 2 or more; 0 = as many as run at
                             one time */
    int32_t rank;         /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    /* workspace */
    void* workspace;        /* as in desc.h */
    size_t workspace_bytes; /* bytes at workspace: MOE_GROUPED_GEMM_WORKSPACE or more */
} moe_k_grouped_gemm_desc;

#endif
