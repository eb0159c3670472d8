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
#define MOEI_TENSOR_SWIZZLE_128B 3
#define MOEI_TENSOR_PROMOTION_256B 3

/* A matrix of 16-bit elements, or several. */
typedef struct moei_tensor {
    const void* base;      /* 16-byte aligned */
    int64_t columns, rows; /* elements of a row; rows; both below 2^32 */
    int64_t matrices;      /* 0: one, which has no number */
    int64_t row_stride;    /* elements between rows; a multiple of 8, below 2^39 */
    int64_t matrix_stride; /* elements between matrices; likewise */
    int32_t box_rows;      /* rows of a box, 1 .. 256 */
    int32_t dtype;         /* MOE_FP16 or MOE_BF16 */
} moei_tensor;

/* Encodes the map of *t. A box has 64 columns and is swizzled (ptx.cuh). Loads of elements outside
   the matrix give zeros. */
MOE_HOST moe_status moei_tensor_encode(moei_tensor_map* map, const moei_tensor* t)
{
#if MOE_ON_HOST
    memset(map, 0, sizeof *map);
    memcpy(map, t, sizeof *t);
#else
    typedef int (*encode_fn)(void* map, int type, uint32_t rank, void* base, const uint64_t* size,
                             const uint64_t* stride, const uint32_t* box, const uint32_t* step,
                             int interleave, int swizzle, int promotion, int fill);
    const uint64_t size[3] = {(uint64_t)t->columns, (uint64_t)t->rows, (uint64_t)t->matrices};
    const uint64_t stride[2] = {(uint64_t)t->row_stride * 2, (uint64_t)t->matrix_stride * 2};
    const uint32_t box[3] = {64, (uint32_t)t->box_rows, 1}, step[3] = {1, 1, 1};
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
                        t->matrices ? 3 : 2, (void*)t->base, size, stride, box, step, 0,
                        MOEI_TENSOR_SWIZZLE_128B, MOEI_TENSOR_PROMOTION_256B, 0) != 0)
        return moe_cuda_status(cudaErrorInvalidValue);
    memcpy(map, &m, sizeof *map);
#endif
    return MOE_OK;
}

#endif
