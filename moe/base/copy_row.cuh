/* copy_row.cuh: copies rows in vectors of 16, 8, 4 or 2 bytes. Called by permute.cuh and by kernels
   of one's own. */
#ifndef MOE_BASE_COPY_ROW_CUH
#define MOE_BASE_COPY_ROW_CUH

#include "copy.cuh"

/* Loads one vector of `width` bytes, a literal; the words past it are 0. */
MOE_DEVICE uint4 moei_load_vector(const char* p, const int width)
{
    uint4 v = make_uint4(0, 0, 0, 0);
    if (width == 16) return moei_load16(p);
    if (width == 8) {
        const uint2 u = *(const uint2*)p;
        v.x = u.x, v.y = u.y;
    } else if (width == 4) {
        v.x = *(const uint32_t*)p;
    } else {
        v.x = *(const uint16_t*)p;
    }
    return v;
}

/* Stores one vector of `width` bytes, a literal. */
MOE_DEVICE void moei_store_vector(char* p, uint4 v, const int width)
{
    if (width == 16) moei_store16(p, v);
    else if (width == 8) *(uint2*)p = make_uint2(v.x, v.y);
    else if (width == 4) *(uint32_t*)p = v.x;
    else *(uint16_t*)p = (uint16_t)v.x;
}

/* Copies `bytes`, a multiple of width (x null: zeros); four vectors a thread in flight. */
MOE_DEVICE void moei_copy_vectors(char* y, const char* x, int64_t bytes, int thread, int threads,
                                  const int width)
{
    const int64_t step = (int64_t)threads * width;
    for (int64_t i = (int64_t)thread * width; i < bytes; i += 4 * step) {
        uint4 v[4];
        MOE_UNROLL
        for (int u = 0; u < 4; ++u) {
            v[u] = make_uint4(0, 0, 0, 0);
            if (x && i + u * step < bytes) v[u] = moei_load_vector(x + i + u * step, width);
        }
        MOE_UNROLL
        for (int u = 0; u < 4; ++u)
            if (i + u * step < bytes) moei_store_vector(y + i + u * step, v[u], width);
    }
}

/* Copies one row, y[0 .. bytes) = x[0 .. bytes), or zeros where x is null; for kernels of one's
   own. `threads` threads share the work; this one is number `thread` of them: (lane, 32) for a
   warp, (threadIdx.x, blockDim.x) for a block. A thread has four vectors in flight. The threads
   need not converge: no barrier, no shared memory. A barrier must stand before other threads read
   y. y and x do not overlap and are aligned to 2 bytes; bytes is even. Vectors of 16 (8, 4) bytes
   where both begin at multiples of 16 (8, 4); the bytes after the last whole vector are copied 2 at
   a time. */
MOE_DEVICE void moe_copy_row(void* y, const void* x, int64_t bytes, int thread, int threads)
{
    const uintptr_t both = (uintptr_t)y | (uintptr_t)x;
    const int width = both % 16 == 0 ? 16 : both % 8 == 0 ? 8 : both % 4 == 0 ? 4 : 2;
    const int64_t done = bytes - bytes % width;
    char* to = (char*)y;
    const char* from = (const char*)x;
    if (width == 16) moei_copy_vectors(to, from, done, thread, threads, 16);
    else if (width == 8) moei_copy_vectors(to, from, done, thread, threads, 8);
    else if (width == 4) moei_copy_vectors(to, from, done, thread, threads, 4);
    else moei_copy_vectors(to, from, done, thread, threads, 2);
    if (done < bytes)
        moei_copy_vectors(to + done, from ? from + done : 0, bytes - done, thread, threads, 2);
}

#endif
