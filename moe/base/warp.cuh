/* warp.cuh: reductions and prefix sums of one warp, or of aligned groups of 2, 4, 8, 16 or 32 lanes
   of a warp. Every lane of the warp calls each function; the order of additions is fixed. */
#ifndef MOE_BASE_WARP_CUH
#define MOE_BASE_WARP_CUH

#include "cuda.cuh"

#define MOE_WARP_SIZE 32
#define MOE_FULL_WARP 0xffffffffu

/* Return the calling thread's lane (0 .. 31) and warp; thread blocks are one-dimensional. */
MOE_DEVICE int moe_lane(void) { return (int)(threadIdx.x & 31u); }
MOE_DEVICE int moe_warp(void) { return (int)(threadIdx.x >> 5); }

/* Returns x as a value that the compiler takes for new. What follows from x is then computed again,
   not kept in registers since the last use of x. */
MOE_DEVICE uint64_t moei_opaque(uint64_t x)
{
#if !MOE_ON_HOST
    asm volatile("" : "+l"(x));
#endif
    return x;
}

/* Return the sum or the maximum over the aligned group of `width` lanes, to every lane. */
MOE_DEVICE float moe_warp_sum(float v, int width)
{
    for (int d = width >> 1; d > 0; d >>= 1) v += __shfl_xor_sync(MOE_FULL_WARP, v, d);
    return v;
}

MOE_DEVICE float moe_warp_max(float v, int width)
{
    for (int d = width >> 1; d > 0; d >>= 1) v = fmaxf(v, __shfl_xor_sync(MOE_FULL_WARP, v, d));
    return v;
}

/* Returns the maximum over the warp, to every lane. */
MOE_DEVICE uint32_t moe_warp_max_u32(uint32_t v)
{
#if !MOE_ON_HOST && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(MOE_FULL_WARP, v);
#else
    for (int d = MOE_WARP_SIZE >> 1; d > 0; d >>= 1) {
        const uint32_t u = __shfl_xor_sync(MOE_FULL_WARP, v, d);
        v = u > v ? u : v;
    }
    return v;
#endif
}

/* Returns the sum of v over the lanes up to and including the calling one, modulo 2^32. */
MOE_DEVICE int moe_warp_inclusive_scan(int v)
{
    for (int d = 1; d < MOE_WARP_SIZE; d <<= 1) {
        const int u = __shfl_up_sync(MOE_FULL_WARP, v, d);
        if (moe_lane() >= d) v = (int)((unsigned)v + (unsigned)u);
    }
    return v;
}

#endif
