/* args.h: the kernels' argument of the grouped GEMM on Hopper (wgmma). C11 and C++14. */
#ifndef MOE_GEMM_WGMMA_ARGS_H
#define MOE_GEMM_WGMMA_ARGS_H

#include "../args.h"

/* A matrix in global memory as tensor copies see it, encoded by map.cuh: 128 opaque bytes
   (CUtensorMap), on a 64-byte boundary where a kernel reads them. */
typedef struct moei_tensor_map {
    uint64_t word[16];
} moei_tensor_map;

/* Boxes are the parts that one tensor copy moves: 64 elements (128 bytes) of so many lines, of pre
   256 gates and 256 ups. */
typedef struct moei_wgmma_args {
    moei_tensor_map a; /* [a_rows, k], boxes of 64 rows; unused where rows are gathered;
                                k-grouped: [num_rows, m], boxes of 64 depths */
    moei_tensor_map b; /* [n, k], boxes of 128 rows; mn-major: [k, n], boxes of 64 depths. Gates
                                and ups are matrices of their own */
    moei_tensor_map c; /* boxes: [num_rows, n], boxes of 64 rows; a gradient: pre, boxes of
                                MOEI_WGMMA_PRE_ROWS rows; otherwise unused */
    moe_grouped_gemm_args d; /* the product; k-grouped: b.base is B, k is not read */
    int32_t* ticket;         /* [1] 0 at the start: number of pairs of tiles that clusters have
                                taken beyond their first; null: cluster i takes pairs i, i +
                                clusters, ... */
    int64_t up;              /* bytes from gates to ups in one array; 0: separate, or not gated */
    int64_t c_expert_bytes;  /* k-grouped: bytes between the matrices of c.base; otherwise 0 */
    int32_t m;               /* k-grouped: rows of each expert's C; otherwise 0 */
    int32_t boxes;           /* 1: full tiles are stored by tensor copies (wgmma/store.cuh) */
    int32_t transposed;      /* k-grouped: 1: C is stored as [E, n, m] */
    int32_t skip_empty;      /* k-grouped: 1: C of experts without rows is left as it is */
    int32_t unused[10];      /* a launch copies whole 64-byte units */
} moei_wgmma_args;

/* The parameter of the kernels: tensor maps stand on a 64-byte boundary there. */
#if defined(__CUDACC__)
typedef struct alignas(64) moei_wgmma_param {
#else
typedef struct moei_wgmma_param {
#endif
    moei_wgmma_args a;
} moei_wgmma_param;

/* Stages of the ring, and threads of a block: a producer and two consumers, a warpgroup each. A
   gradient has a warpgroup more (wgmma/gradient.cuh). */
#define MOEI_WGMMA_STAGES 4
#define MOEI_WGMMA_THREADS 384
#define MOEI_WGMMA_GRADIENT_THREADS 512

/* Of a gradient: rows of a box of pre, and bytes of such a row: 256 gates, then 256 ups. Each of the
   four warps that compute has two boxes. */
#define MOEI_WGMMA_PRE_ROWS 3
#define MOEI_WGMMA_PRE_ROW 1024
#define MOEI_WGMMA_PRE_BOX (MOEI_WGMMA_PRE_ROWS * MOEI_WGMMA_PRE_ROW)
#define MOEI_WGMMA_PRE (4 * 2 * MOEI_WGMMA_PRE_BOX)

/* The shape (gemm/shape.h) of the path's tiles, whose consumers' 8 warps have 16 x 256 each. */
#define MOEI_WGMMA_SHAPE(threads, dtype, a_major, b_major)                                         \
    {                                                                                              \
        128, 256, 64, 8, 1, MOEI_WGMMA_STAGES, dtype, a_major, b_major, 16, 256, threads, 1        \
    }

/* Returns the bits of a wgmma descriptor beside the address, which has the lowest 14: at 16 and at
   32 the strides in 16 bytes, between 64 rows of an mn-major operand and between 8 lines; at 62 the
   swizzle of 128 bytes. */
MOE_HOST_DEVICE uint64_t moei_wgmma_layout(int major)
{
    const uint64_t next_rows = major == MOE_MAJOR_MN ? 64 * 128 : 16, next_lines = 8 * 128;
    return next_rows >> 4 << 16 | next_lines >> 4 << 32 | (uint64_t)1 << 62;
}

/* Returns what moves a descriptor 16 depths on: 16 lines of an mn-major operand, or 32 bytes. */
MOE_HOST_DEVICE uint64_t moei_wgmma_advance(int major)
{
    return major == MOE_MAJOR_MN ? 16 * 128 >> 4 : 32 >> 4;
}

#endif
