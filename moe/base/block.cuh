/* block.cuh: sum and exclusive prefix sum over one thread block. Every thread of the block calls
   each function; blockDim.x is a multiple of 32, up to 1024. */
#ifndef MOE_BASE_BLOCK_CUH
#define MOE_BASE_BLOCK_CUH

#include "warp.cuh"

/* Scratch of one prefix sum or sum, in shared memory. */
typedef struct moe_block_scan_scratch {
    int warp_sum[MOE_WARP_SIZE]; /* one value a warp */
} moe_block_scan_scratch;

/* Returns the sum of v over the threads before the calling one, modulo 2^32: an exclusive prefix
   sum. *total gets the sum over the block. Ends with a barrier: the scratch may be reused at
   once. */
MOE_DEVICE int moe_block_exclusive_scan(int v, moe_block_scan_scratch* s, int* total)
{
    const int warps = (int)(blockDim.x >> 5);
    const int inclusive = moe_warp_inclusive_scan(v);
    int before, all;
    if (moe_lane() == 31) s->warp_sum[moe_warp()] = inclusive;
    __syncthreads();
    { /* every warp scans the warp sums by itself: saves a barrier before they are read */
        const int w = moe_lane() < warps ? s->warp_sum[moe_lane()] : 0;
        const int scan = moe_warp_inclusive_scan(w);
        before = __shfl_sync(MOE_FULL_WARP, (int)((unsigned)scan - (unsigned)w), moe_warp());
        all = __shfl_sync(MOE_FULL_WARP, scan, warps - 1);
    }
    __syncthreads();
    *total = all;
    return (int)((unsigned)before + (unsigned)inclusive - (unsigned)v);
}

/* Returns the sum of v over the block to every thread, added in a fixed order. Ends with a barrier:
   the scratch may be reused at once. */
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
