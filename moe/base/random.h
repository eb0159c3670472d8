/* random.h: random numbers by counter. The same counter and key give the same words on the host and
   on the device, in any order and on any number of threads. C11 and C++14.

   Philox4x32-10: ten rounds map a counter of 128 bits and a key of 64 bits to 128 random bits.

   Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. */
#ifndef MOE_BASE_RANDOM_H
#define MOE_BASE_RANDOM_H

#include <stdint.h>

#include "config.h"

/* 128 random bits. */
typedef struct moe_random4 {
    uint32_t x, y, z, w; /* words 0, 1, 2, 3: any value, each equally likely */
} moe_random4;

/* Returns the four words of counter {c0, c1, c2, c3} under the key. */
MOE_HOST_DEVICE moe_random4 moe_random_words(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                             uint32_t c3)
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    moe_random4 r;
    int round;
    r.x = c0, r.y = c1, r.z = c2, r.w = c3;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)0xd2511f53u * r.x, b = (uint64_t)0xcd9e8d57u * r.z;
        r.x = (uint32_t)(b >> 32) ^ r.y ^ k0;
        r.y = (uint32_t)b;
        r.z = (uint32_t)(a >> 32) ^ r.w ^ k1;
        r.w = (uint32_t)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return r;
}

#endif
