/* store.cuh: stores a tensor-core tile of logits from accumulators to memory, for any E and any
   stride of logits. Called by ragged.cuh and large.cuh. */
#ifndef MOE_ROUTER_STORE_CUH
#define MOE_ROUTER_STORE_CUH

#include "../gemm/epilogue.cuh"
#include "../gemm/mma.cuh"

/* The destination of logits. */
typedef struct moei_logits {
    float* to;             /* [rows, experts] */
    int64_t stride;        /* elements between rows */
    int32_t rows, experts; /* T, E */
} moei_logits;

/* Stores a warp's accumulators, wm x wn, to rows from `row` on and experts from `column` on. Sums
   past the last row or expert are not stored. All lanes of the warp call it. staging:
   moei_staging_floats(wn) floats of the warp's own, in shared memory. */
MOE_DEVICE void moei_router_store(const moei_logits d, const moei_mma_c acc[4][4], float* staging,
                                  int64_t row, int column, const int wm, const int wn)
{
    const int ld = moei_staging_pitch(wn);
    MOE_UNROLL
    for (int m = 0; m < wm / 16; ++m) {
        MOE_UNROLL
        for (int j = 0; j < wn / 16; ++j) moei_mma_store(staging + j * 16, &acc[m][j], ld);
        __syncwarp(MOE_FULL_WARP);
        MOE_NO_UNROLL
        for (int u = moe_lane(); u < 16 * wn; u += MOE_WARP_SIZE) {
            const int64_t t = row + m * 16 + u / wn;
            const int e = column + u % wn;
            if (t < d.rows && e < d.experts) d.to[t * d.stride + e] = staging[u / wn * ld + u % wn];
        }
        __syncwarp(MOE_FULL_WARP);
    }
}

#endif
