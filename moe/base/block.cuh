/* block.cuh: reductions and scans of one thread block. Every thread takes part. */
#ifndef MOE_BASE_BLOCK_CUH
#define MOE_BASE_BLOCK_CUH

#include "warp.cuh"

/* Scratch of one block scan, in shared memory. */
typedef struct moei_block_scan_scratch {
    int warp_sum[MOEI_WARP];
} moei_block_scan_scratch;

/* Exclusive scan over the threads of a block of whole warps; *total gets the sum of all.
   Ends with a barrier, so the scratch may be used again at once. */
MOE_DEVICE int moei_block_exclusive_scan(int v, moei_block_scan_scratch* s, int* total)
{
    const int warps = (int)(blockDim.x >> 5);
    const int inclusive = moei_warp_inclusive_scan(v);
    int before, all;
    if (moei_lane() == 31) s->warp_sum[moei_warp()] = inclusive;
    __syncthreads();
    { /* each warp scans the warp sums for itself: no second barrier before they are read */
        const int w = moei_lane() < warps ? s->warp_sum[moei_lane()] : 0;
        const int scan = moei_warp_inclusive_scan(w);
        before = __shfl_sync(MOEI_FULL, scan - w, moei_warp());
        all = __shfl_sync(MOEI_FULL, scan, warps - 1);
    }
    __syncthreads();
    *total = all;
    return before + inclusive - v;
}

#endif
