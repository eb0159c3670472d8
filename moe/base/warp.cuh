/* warp.cuh: reductions and scans of one warp, or of aligned groups of 2, 4, 8, 16 or 32 lanes
   of it. Every lane of the warp takes part; the order of additions is fixed. */
#ifndef MOE_BASE_WARP_CUH
#define MOE_BASE_WARP_CUH

#include "cuda.cuh"

#define MOEI_WARP 32
#define MOEI_FULL 0xffffffffu

/* Blocks are one-dimensional throughout. */
MOE_DEVICE int moei_lane(void) { return (int)(threadIdx.x & 31u); }
MOE_DEVICE int moei_warp(void) { return (int)(threadIdx.x >> 5); }

/* Returns x, which the compiler takes for a new value: it computes again what it would otherwise
   have kept in registers since x was last used. */
MOE_DEVICE uint64_t moei_opaque(uint64_t x)
{
#if !MOE_ON_HOST
    asm volatile("" : "+l"(x));
#endif
    return x;
}

/* Sum over the aligned group of `width` lanes; every lane gets it. */
MOE_DEVICE float moei_group_sum(float v, int width)
{
    for (int d = width >> 1; d > 0; d >>= 1) v += __shfl_xor_sync(MOEI_FULL, v, d);
    return v;
}

MOE_DEVICE float moei_group_max(float v, int width)
{
    for (int d = width >> 1; d > 0; d >>= 1) v = fmaxf(v, __shfl_xor_sync(MOEI_FULL, v, d));
    return v;
}

/* Largest of the warp's; every lane gets it. */
MOE_DEVICE uint32_t moei_warp_max(uint32_t v)
{
#if !MOE_ON_HOST && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(MOEI_FULL, v);
#else
    for (int d = MOEI_WARP >> 1; d > 0; d >>= 1) {
        const uint32_t u = __shfl_xor_sync(MOEI_FULL, v, d);
        v = u > v ? u : v;
    }
    return v;
#endif
}

/* Sum of the values of the lanes up to and including this one, modulo 2^32. */
MOE_DEVICE int moei_warp_inclusive_scan(int v)
{
    for (int d = 1; d < MOEI_WARP; d <<= 1) {
        const int u = __shfl_up_sync(MOEI_FULL, v, d);
        if (moei_lane() >= d) v = (int)((unsigned)v + (unsigned)u);
    }
    return v;
}

#endif
