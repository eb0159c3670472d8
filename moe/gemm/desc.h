/* desc.h: descriptor, options and plan of the grouped GEMM (grouped.cuh, grouped_gradient.cuh).
   C11 and C++14. */
#ifndef MOE_GEMM_DESC_H
#define MOE_GEMM_DESC_H

#include "../base/status.h"
#include "../layout.h"

/* Most rows of A and of C: row numbers of a tile that ends past the last row still fit int32_t. */
#define MOE_GEMM_MAX_ROWS (0x7fffffff - 255)

#define MOE_GROUPED_GEMM_WORKSPACE 16 /* bytes of workspace that a product uses */

#define MOE_GEMM_ROW_BLOCK 128 /* rows of C that share a counter of `ready` and one of `done` */

/* Tile shapes, tile_m x tile_n. With a gated activation a tile has tile_n / 2 columns of C. */
typedef enum moe_tile {
    MOE_TILE_AUTO = 0,
    MOE_TILE_128x256, /* many rows an expert; 180 KB of shared memory a thread block, on the wgmma
                         path 194 KB, with gradient 218 KB; WMMA: k-major operands only */
    MOE_TILE_128x128, /* many rows an expert on smaller chips */
    MOE_TILE_32x128,  /* few tiles, or few rows an expert */
    MOE_TILE_64x64    /* runs on every architecture, sm_75 included */
} moe_tile;

/* The code that multiplies; on the CPU, whose stand-ins run. */
typedef enum moe_gemm_path {
    MOE_GEMM_PATH_NONE = 0, /* an empty plan */
    MOE_GEMM_PATH_WMMA,     /* tensor cores through WMMA: every architecture */
    MOE_GEMM_PATH_WGMMA     /* through wgmma, fed by tensor copies: Hopper, code of sm_90a */
} moe_gemm_path;

/* Rows begin .. end - 1 of C, computed with the weights and the bias of one expert. An entry of a
   list of groups. */
typedef struct moe_gemm_group {
    int32_t expert;     /* 0 .. E - 1 */
    int32_t begin, end; /* 0 <= begin <= end <= num_rows; begin == end: no rows */
} moe_gemm_group;

/* For every row r of every expert e (rows expert_offset[e] .. expert_offset[e + 1]):

     C[r, :] = activation( A[row(r), :] * B_e^T + bias_e ),  row(r) = row_index[r] / row_div

   B_e is [n, k], with a gated activation [2n, k]. Accumulates in fp32, k ascending within a tile's
   pipeline. a, c, pre, act and the matrices of b are 16-byte aligned.

   Three options serve rows that come from and go to other kernels and devices while this one runs:

     group  replaces expert_offset: group i is rows begin .. end - 1 with one expert's weights. The
            kernel takes tiles group after group, in the order of the list. An expert may have any
            number of groups. A row may be in one group at most. Rows in none are neither read nor
            written.
     ready  counts the rows of A that have come. Row block b is rows 128 b .. 128 b + 127 of C, not
            of A. A tile's rows of A are read when, for each row block b that has rows of the tile,
            (int32_t)(ready[b] - ready_value) >= 0. The kernel that brings rows stores them and then
            adds to the counter with release semantics at system scope. Rows of A alone may come
            late: all other inputs are complete when the kernel starts. Tiles wait in their order,
            so bring the rows of the first tiles first, and leave multiprocessors to the kernel that
            brings rows (grid_limit). The wait ends without the rows after ready_timeout_ms, which
            raises the stop fault MOE_FAULT_NOT_READY, and where the fault word holds a stop fault.
            C is then undefined.
     done   counts the elements of the product that are stored. After those of row block b are
            visible to all devices, the kernel adds their number / 8 to done[b], with release
            semantics at system scope. A row block is complete when its counter has grown by n / 8
            for each of its rows that is in a group. All outputs of an element are stored before it
            is counted. Results of a tile may be counted as late as the next tile of the thread
            block is computed. Nothing is counted after a stop fault.

   With `gradient` the product P = A[row(r), :] * B_e^T [num_rows, n] is the gradient by a result of
   the activation, before the row's weight, and stays in fp32. B_e is [n, k], never gated. With
   v = pre[r, j], gated u = pre[r, n + j], and w, the row's weight:

     C[r, j]     = w P[r, j] * derivative of activation(v, u) by v
     C[r, n + j] = w P[r, j] * derivative by u, gated
     act[r, j]   = w activation(v, u)
     dot[r, p]   = sum of P[r, j] activation(v, u) over j = 64 p .. 64 p + 63 below n

   A row of dot adds up to the gradient of w. dot is summed in a fixed order. Where row_index has no
   row of A, w, v and u count as 0: row_weight and pre are not read there. C may be pre itself, with
   the same address and stride: each element of pre is read before C replaces it. */
typedef struct moe_grouped_gemm_desc {
    /* in */
    const void* a;                /* [a_rows, k] dtype; a_major MN: [k, a_rows] */
    int64_t a_stride;             /* elements between rows (MN: depths); 0 = dense; multiple of 8 */
    int64_t a_rows;               /* rows of A, 0 .. MOE_GEMM_MAX_ROWS; 0 = num_rows */
    const int32_t* row_index;     /* [num_rows] row(r) as above, -1 = a row of zeros; null = r */
    moe_weights b;                /* B_e of each expert, dtype; strides multiples of 8 */
    const void* bias;             /* [E, n] dtype, gated: [E, 2n] ordered as B's rows; or null */
    const int32_t* expert_offset; /* [E + 1]; null with one expert: all num_rows rows; null with a
                                     list of groups */
    const moe_gemm_group* group;  /* [num_groups] as above; or null. Requires c, not c_table */
    const uint32_t* ready;        /* [ceil(num_rows / 128)] as above, memory that the device can
                                     read; or null: all rows of A are there */
    /* out */
    void* c;              /* [num_rows, n] c_dtype, rows in expert order; or null with a table */
    void* const* c_table; /* [E] device array: expert e's rows begin at c_table[e], 16-byte
                             aligned; or null */
    int64_t c_stride;     /* elements between rows; 0 = n; multiple of 8 */
    void* pre;            /* [num_rows, n] dtype, gated [num_rows, 2n], gates and then ups: what the
                             activation is applied to, for a backward pass; or null, as where there
                             is no activation and C is fp32 */
    int64_t pre_stride;   /* elements between rows; 0 = dense; multiple of 8 */
    uint32_t* done;       /* [ceil(num_rows / 128)] as above, added to; n below 2^27; or null */
    uint64_t* fault;      /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_experts; /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t num_rows;    /* upper bound of the rows, 0 .. MOE_GEMM_MAX_ROWS; expert_offset has the
                            actual number */
    int32_t n, k;        /* columns of C, depths: 8 .. 2^28; multiples of 8 */
    int32_t row_div;     /* divides row_index, >= 1; 0 = 1; K maps slots to tokens */
    int32_t dtype;       /* of A, B and bias: fp16 or bf16; 0 = bf16 */
    int32_t c_dtype;     /* dtype or fp32; 0 = dtype */
    int32_t a_major;     /* moe_major; 0 = MOE_MAJOR_K; MOE_MAJOR_MN requires row_index null */
    int32_t activation;  /* moe_activation (layout.h); 0 = none */
    int32_t gate_up;     /* moe_gate_up; 0 = concatenated; used only by gated activations */
    float alpha, limit;  /* of MOE_ACTIVATION_SWIGLU_CLAMPED, else 0: |alpha| < 2.3e38, 0 = 1.702;
                            limit finite and not negative, 0 = 7 */
    int32_t tile;        /* moe_tile; 0 = chosen by shape and device */
    int32_t path;        /* moe_gemm_path that must run; 0 = chosen */
    int32_t accumulate;  /* 1: adds the result to C; 0: overwrites C */
    int32_t rank;        /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    /* 1: the kernel is chosen without regard to num_rows, as for many: a row's bits do not depend on
       other rows. A single row may then cost a tile of 128. 0: chosen by num_rows too */
    int32_t batch_invariant;
    int32_t num_groups;        /* 1 .. MOE_MAX_EXPERTS, an upper bound: groups may have no rows; 0:
                                  no list */
    uint32_t ready_value;      /* of a counter whose row block has come, or more */
    uint32_t ready_timeout_ms; /* longest wait for a row block, milliseconds; 0 = 10000 */
    int32_t grid_limit; /* most thread blocks, which leaves multiprocessors to other kernels; on the
                           wgmma path 2 or more; 0 = as many as run at one time */
    /* workspace */
    void* workspace;        /* 16-byte aligned, for one call at a time: calls that may run together
                               have one each. Null: the wgmma path hands out tiles in a fixed order,
                               slower where experts differ in rows. The result is the same */
    size_t workspace_bytes; /* bytes at workspace: MOE_GROUPED_GEMM_WORKSPACE or more */
    /* the backward pass through an activation */
    int32_t gradient;        /* 1: as above, for the calls of grouped_gradient.cuh. Requires
                                pre, which is read. C has dtype, where gated 2n
                                columns: c_stride 0 = dense. Without bias, accumulate, c_table,
                                fp32 C; gate_up concatenated. 0: forward, for those of
                                grouped.cuh */
    const float* row_weight; /* [num_rows] w of each row, with row_index of each index:
                                [a_rows * row_div], w = row_weight[row_index[r]]; null = 1 */
    void* act;               /* out: [num_rows, n] dtype, for the gradient of the next product's B;
                                or null. Null with C over pre: not on the wgmma path */
    int64_t act_stride;      /* elements between rows; 0 = n; multiple of 8 */
    float* dot;              /* out: [num_rows, ceil(n / 64)], dense; or null */
} moe_grouped_gemm_desc;

/* Kernel and grid of a launch. moe_grouped_gemm_plan fills it in with the choice of the launch. */
typedef struct moe_gemm_plan {
    int32_t path;                    /* moe_gemm_path */
    int32_t tile;                    /* moe_tile */
    int32_t tile_m, tile_n, tile_k;  /* rows of A, rows of B, depths of one step */
    int32_t stages, threads, blocks; /* stages of the ring, threads a block, grid size at most */
    size_t smem;                     /* dynamic shared memory of a block, bytes */
} moe_gemm_plan;

/* Returns the bytes from the first to the last element of `experts` 16-bit matrices [n, k]. */
MOE_HOST uint64_t moei_weight_extent(const moe_weights* w, int64_t experts, int64_t n, int64_t k)
{
    const int64_t rows = w->major == MOE_MAJOR_MN ? k : n,
                  columns = w->major == MOE_MAJOR_MN ? n : k;
    const int64_t row = w->row_stride ? w->row_stride : columns;
    const int64_t expert = w->expert_stride ? w->expert_stride : row * rows;
    return (uint64_t)(experts - 1) * (uint64_t)expert * 2 +
           moe_extent(rows, row, columns, MOE_BF16);
}

/* Returns the name of a moe_gemm_path: static storage, never null. */
MOE_HOST const char* moe_gemm_path_name(int path)
{
    return path == MOE_GEMM_PATH_WMMA ? "wmma" : path == MOE_GEMM_PATH_WGMMA ? "wgmma" : "none";
}

#endif
