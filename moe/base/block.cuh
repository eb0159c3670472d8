/* block.cuh: reductions and scans of one thread block. Every thread takes part. */
#ifndef MOE_BASE_BLOCK_CUH
#define MOE_BASE_BLOCK_CUH

#include "warp.cuh"

/* Scratch of one scan or sum, in shared memory. */
typedef struct moe_block_scan_scratch {
    int warp_sum[MOE_WARP_SIZE];
} moe_block_scan_scratch;

/* Exclusive scan over the threads of a block of whole warps, modulo 2^32; *total gets the sum of
   all. Ends with a barrier, so the scratch may be used again at once. */
MOE_DEVICE int moe_block_exclusive_scan(int v, moe_block_scan_scratch* s, int* total)
{
    const int warps = (int)(blockDim.x >> 5);
    const int inclusive = moe_warp_inclusive_scan(v);
    int before, all;
    if (moe_lane() == 31) s->warp_sum[moe_warp()] = inclusive;
    __syncthreads();
    { /* each warp scans the warp sums for itself: no second barrier before they are read */
        const int w = moe_lane() < warps ? s->warp_sum[moe_lane()] : 0;
        const int scan = moe_warp_inclusive_scan(w);
        before = __shfl_sync(MOE_FULL_WARP, (int)((unsigned)scan - (unsigned)w), moe_warp());
        all = __shfl_sync(MOE_FULL_WARP, scan, warps - 1);
    }
    __syncthreads();
    *total = all;
    return (int)((unsigned)before + (unsigned)inclusive - (unsigned)v);
}

/* Sum over the threads of a block of whole warps, in a fixed order; every thread gets it. Ends with
   a barrier. */
MOE_DEVICE float moe_block_sum(float v, moe_block_scan_scratch* s)
{
    const int warps = (int)(blockDim.x >> 5);
    const float sum = moe_warp_sum(v, MOE_WARP_SIZE);
    float all;
    if (moe_lane() == 0) s->warp_sum[moe_warp()] = __float_as_int(sum);
    __syncthreads();
    all = moe_lane() < warps ? __int_as_float(s->warp_sum[moe_lane()]) : 0.0f;
    all = moe_warp_sum(all, MOE_WARP_SIZE);
    __syncthreads();
    return all;
}

#endif
