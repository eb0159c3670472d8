/* copy.cuh: 16-byte copies, plain and asynchronous, and 16-byte atomic additions. Their inline PTX
   stands here, each function with a body for older architectures and one for the CPU.

   A row that another kernel or a peer has just written is read by a plain global load, never
   through the read-only path. */
#ifndef MOE_BASE_COPY_CUH
#define MOE_BASE_COPY_CUH

#include "cuda.cuh"

/* Load or store one 16-byte vector at the 16-byte aligned address p. */
MOE_DEVICE uint4 moei_load16(const void* p)
{
    MOEI_ALIGNED(p, 16);
    return *(const uint4*)p;
}
MOE_DEVICE void moei_store16(void* p, uint4 v)
{
    MOEI_ALIGNED(p, 16);
    *(uint4*)p = v;
}

/* Load 16 (8) bytes that are read once: the caches evict them first (ld.global.cs). p is 16-byte
   (8-byte) aligned. */
MOE_DEVICE uint4 moei_load16_once(const void* p)
{
#if MOE_ON_HOST
    return moei_load16(p);
#else
    return __ldcs((const uint4*)p);
#endif
}
MOE_DEVICE uint2 moei_load8_once(const void* p)
{
#if MOE_ON_HOST
    MOEI_ALIGNED(p, 8);
    return *(const uint2*)p;
#else
    return __ldcs((const uint2*)p);
#endif
}

/* Stores 16 bytes that the kernel does not read again, by one instruction: the caches evict them
   first (st.global.cs). p is 16-byte aligned. The compiler splits moei_store16 where the four words
   stand in registers apart, and then a warp's store touches each sector four times. */
MOE_DEVICE void moei_store16_streaming(void* p, uint4 v)
{
#if MOE_ON_HOST
    moei_store16(p, v);
#else
    __stcs((uint4*)p, v);
#endif
}

/* Begins to bring the 128-byte line of p, which a load will need soon, into L2. */
MOE_DEVICE void moei_prefetch_line(const void* p)
{
#if MOE_ON_HOST
    (void)p;
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
#endif
}

/* Loads 4 bytes at the 4-byte aligned p. The compiler does not move this load, so several of them
   are in flight long before their first use. */
MOE_DEVICE uint32_t moei_load4_early(const void* p)
{
#if MOE_ON_HOST
    uint32_t v;
    MOEI_ALIGNED(p, 4);
    memcpy(&v, p, 4);
    return v;
#else
    uint32_t v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
#endif
}

/* Copies `bytes` (0, 2, ... 16) bytes from global to shared memory asynchronously and fills the
   16-byte vector up with zeros. With 0 bytes `from` is not read, but must still be an address.
   to_shared is 16-byte aligned, and so is `from` where it is read. Before sm_80 the copy is
   synchronous, through registers. */
MOE_DEVICE void moei_copy16_async(void* to_shared, const void* from, int bytes)
{
#if MOE_ON_HOST
    moeh_copy_async(to_shared, from, 16, (size_t)bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned to = (unsigned)__cvta_generic_to_shared(to_shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
#else
    uint4 v = make_uint4(0, 0, 0, 0);
    if (bytes == 16) v = *(const uint4*)from;
    *(uint4*)to_shared = v;
    if (bytes < 16)
        for (int i = 0; i < bytes / 2; ++i) ((uint16_t*)to_shared)[i] = ((const uint16_t*)from)[i];
#endif
}

/* Copies 16 bytes likewise, without the choice of how many: fewer instructions. sm_80 or later. */
MOE_DEVICE void moei_copy16_whole_async(void* to_shared, const void* from)
{
#if !MOE_ON_HOST && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned to = (unsigned)__cvta_generic_to_shared(to_shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
    moei_copy16_async(to_shared, from, 16);
#endif
}

/* Closes the calling thread's group of copies. */
MOE_DEVICE void moei_copy_commit(void)
{
#if MOE_ON_HOST
    moeh_copy_commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Waits until at most `pending` (a literal, 0 to 6) of the calling thread's groups are in flight.
   Other threads see the data after a barrier. */
MOE_DEVICE void moei_copy_wait(const int pending)
{
#if MOE_ON_HOST
    moeh_copy_wait(pending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    switch (pending) { /* wait_group takes an immediate */
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    }
#else
    (void)pending;
#endif
}

/* ---- atomic additions to global memory, without a result ----

   Each element is added separately: another thread may see some elements of a vector added and
   others not yet. 16-bit elements are rounded to nearest at each addition. */

#if !MOE_ON_HOST
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 &&                                              \
    __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
#define MOEI_ADD_VECTOR 1 /* red takes vectors (PTX 8.1) and bf16 */
#else
#define MOEI_ADD_VECTOR 0
#endif
#endif

/* Adds one fp16 or bf16 element v to *p; p is 2-byte aligned. */
MOE_DEVICE void moei_add2_atomic(uint16_t* p, uint16_t v, const int dtype)
{
#if MOE_ON_HOST
    MOEI_ALIGNED(p, 2);
    moe_store(p, 0, dtype, moe_load(p, 0, dtype) + moe_load(&v, 0, dtype));
#else
    if (dtype == MOE_FP16) {
        asm volatile("red.relaxed.gpu.global.add.noftz.f16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
    } else {
#if MOEI_ADD_VECTOR
        asm volatile("red.relaxed.gpu.global.add.noftz.bf16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
#else
        unsigned short seen = *(volatile unsigned short*)p, old;
        do {
            const float sum =
                __uint_as_float((uint32_t)seen << 16) + __uint_as_float((uint32_t)v << 16);
            old = seen;
            seen =
                atomicCAS((unsigned short*)p, old, __bfloat16_as_ushort(__float2bfloat16_rn(sum)));
        } while (seen != old);
#endif
    }
#endif
}

/* Adds two neighbouring fp16 or bf16 elements; p is 4-byte aligned. */
MOE_DEVICE void moei_add4_atomic(void* p, uint32_t v, const int dtype)
{
#if MOE_ON_HOST
    MOEI_ALIGNED(p, 4);
    moei_add2_atomic((uint16_t*)p, (uint16_t)(v & 0xffffu), dtype);
    moei_add2_atomic((uint16_t*)p + 1, (uint16_t)(v >> 16), dtype);
#else
    if (dtype == MOE_FP16) {
        asm volatile("red.relaxed.gpu.global.add.noftz.f16x2 [%0], %1;" ::"l"(p), "r"(v)
                     : "memory");
    } else {
#if MOEI_ADD_VECTOR
        asm volatile("red.relaxed.gpu.global.add.noftz.bf16x2 [%0], %1;" ::"l"(p), "r"(v)
                     : "memory");
#else
        unsigned seen = *(volatile unsigned*)p, old;
        do {
            const __nv_bfloat162 sum = __floats2bfloat162_rn(
                __uint_as_float(seen << 16) + __uint_as_float(v << 16),
                __uint_as_float(seen & 0xffff0000u) + __uint_as_float(v & 0xffff0000u));
            old = seen;
            seen = atomicCAS((unsigned*)p, old, *(const unsigned*)&sum);
        } while (seen != old);
#endif
    }
#endif
}

/* Adds a 16-byte vector: 8 elements of fp16 or bf16, or 4 of fp32; p is 16-byte aligned. */
MOE_DEVICE void moei_add16_atomic(void* p, uint4 v, const int dtype)
{
#if MOE_ON_HOST
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    MOEI_ALIGNED(p, 16);
    for (int i = 0; i < 4; ++i) {
        if (dtype == MOE_FP32) ((float*)p)[i] += moe_f32_from_bits(w[i]);
        else moei_add4_atomic((uint32_t*)p + i, w[i], dtype);
    }
#elif MOEI_ADD_VECTOR
    if (dtype == MOE_FP32)
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p),
                     "f"(__uint_as_float(v.x)), "f"(__uint_as_float(v.y)),
                     "f"(__uint_as_float(v.z)), "f"(__uint_as_float(v.w))
                     : "memory");
    else if (dtype == MOE_FP16)
        asm volatile("red.relaxed.gpu.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};" ::"l"(p),
                     "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
    else
        asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(p),
                     "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
#else
    if (dtype == MOE_FP32) {
        atomicAdd((float*)p, __uint_as_float(v.x));
        atomicAdd((float*)p + 1, __uint_as_float(v.y));
        atomicAdd((float*)p + 2, __uint_as_float(v.z));
        atomicAdd((float*)p + 3, __uint_as_float(v.w));
    } else {
        moei_add4_atomic(p, v.x, dtype);
        moei_add4_atomic((char*)p + 4, v.y, dtype);
        moei_add4_atomic((char*)p + 8, v.z, dtype);
        moei_add4_atomic((char*)p + 12, v.w, dtype);
    }
#endif
}

#endif
