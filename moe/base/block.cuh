/* block.cuh: reductions and scans of one thread block. Every thread takes part. */
#ifndef MOE_BASE_BLOCK_CUH
#define MOE_BASE_BLOCK_CUH

#include "warp.cuh"

/* Scratch of one scan or sum, in shared memory. */
typedef struct moei_block_scan_scratch {
    int warp_sum[MOEI_WARP];
} moei_block_scan_scratch;

/* Exclusive scan over the threads of a block of whole warps, modulo 2^32; *total gets the sum of
   all. Ends with a barrier, so the scratch may be used again at once. */
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
        before = __shfl_sync(MOEI_FULL, (int)((unsigned)scan - (unsigned)w), moei_warp());
        all = __shfl_sync(MOEI_FULL, scan, warps - 1);
    }
    __syncthreads();
    *total = all;
    return (int)((unsigned)before + (unsigned)inclusive - (unsigned)v);
}

/* Sum over the threads of a block of whole warps, in a fixed order; every thread gets it. Ends with
   a barrier. */
MOE_DEVICE float moei_block_sum(float v, moei_block_scan_scratch* s)
{
    const int warps = (int)(blockDim.x >> 5);
    const float sum = moei_group_sum(v, MOEI_WARP);
    float all;
    if (moei_lane() == 0) s->warp_sum[moei_warp()] = __float_as_int(sum);
    __syncthreads();
    all = moei_lane() < warps ? __int_as_float(s->warp_sum[moei_lane()]) : 0.0f;
    all = moei_group_sum(all, MOEI_WARP);
    __syncthreads();
    return all;
}

#endif
