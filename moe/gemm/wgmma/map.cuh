/* map.cuh: encodes tensor maps on the host. The driver's function is found at run time: no -lcuda.
   On the CPU a map holds the moei_tensor itself. */
#ifndef MOE_GEMM_WGMMA_MAP_CUH
#define MOE_GEMM_WGMMA_MAP_CUH

#include "../../base/cuda.cuh"
#include "args.h"

/* Values of cuda.h, which this file does not include: that header has parameters with names that
   users have as macros. */
#define MOEI_TENSOR_FP16 6
#define MOEI_TENSOR_BF16 9
#define MOEI_TENSOR_SWIZZLE_NONE 0
#define MOEI_TENSOR_SWIZZLE_128B 3
#define MOEI_TENSOR_PROMOTION_256B 3

/* The form of matrices of 16-bit elements. A copy names the matrix by its distance from base; with a
   map of halves it is the one at base. */
typedef struct moei_tensor {
    const void* base;      /* of memory that the device can read, 16-byte aligned */
    int64_t columns, rows; /* elements of a row; rows; both below 2^32 */
    int64_t row_stride;    /* elements between rows; a multiple of 8, below 2^39 */
    int32_t box_rows;      /* rows of a box, 1 .. 256 */
    int32_t dtype;         /* MOE_FP16 or MOE_BF16 */
    int32_t halves;        /* of a map of halves: 1 or 2; otherwise 0 */
} moei_tensor;

/* Beside columns and rows a map has the dimensions of 2^30 16-byte vectors, and of 2^30 groups of so
   many vectors: together all distances, modulo 2^64. So one map serves the matrices of all experts,
   also where a table holds their addresses. A map of halves has neither. The base must be mapped,
   though nothing is read there: copies by a map with another base fail. */
#define MOEI_TENSOR_LOG2 30

/* Encodes the map of *t; elements outside the matrix are zeros. A box has 64 columns and is swizzled
   (ptx.cuh). Of a map of halves it has 256 columns of the first half, then 256 of the second one, of
   each of its rows, not swizzled: [box_rows][2][256]. All of a half that is not there is zeros. */
MOE_HOST moe_status moei_tensor_encode(moei_tensor_map* map, const moei_tensor* t)
{
#if MOE_ON_HOST
    memset(map, 0, sizeof *map);
    memcpy(map, t, sizeof *t);
#else
    typedef int (*encode_fn)(void* map, int type, uint32_t rank, void* base, const uint64_t* size,
                             const uint64_t* stride, const uint32_t* box, const uint32_t* step,
                             int interleave, int swizzle, int promotion, int fill);
    const uint64_t many = (uint64_t)1 << MOEI_TENSOR_LOG2;
    const uint64_t columns = (uint64_t)t->columns, rows = (uint64_t)t->rows;
    const uint64_t row_bytes = (uint64_t)t->row_stride * 2;
    const uint64_t size[4] = {columns, rows, many, many}, stride[3] = {row_bytes, 16, many * 16};
    const uint32_t box[4] = {64, (uint32_t)t->box_rows, 1, 1}, step[4] = {1, 1, 1, 1};
    const uint64_t half_size[3] = {columns, (uint64_t)t->halves, rows};
    const uint64_t half_stride[2] = {columns * 2, row_bytes};
    const uint32_t half_box[3] = {256, 2, (uint32_t)t->box_rows};
    alignas(64) moei_tensor_map m;
    cudaDriverEntryPointQueryResult found;
    void* fn = 0;
#if CUDART_VERSION >= 12050
    MOE_TRY_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000,
                                                  cudaEnableDefault, &found));
#else
    MOE_TRY_CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &fn, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess || !fn) return moe_cuda_status(cudaErrorNotSupported);
    if (((encode_fn)fn)(&m, t->dtype == MOE_FP16 ? MOEI_TENSOR_FP16 : MOEI_TENSOR_BF16,
                        t->halves ? 3 : 4, (void*)(uintptr_t)t->base, t->halves ? half_size : size,
                        t->halves ? half_stride : stride, t->halves ? half_box : box, step, 0,
                        t->halves ? MOEI_TENSOR_SWIZZLE_NONE : MOEI_TENSOR_SWIZZLE_128B,
                        MOEI_TENSOR_PROMOTION_256B, 0) != 0)
        return moe_cuda_status(cudaErrorInvalidValue);
    memcpy(map, &m, sizeof *map);
#endif
    return MOE_OK;
}

#endif
