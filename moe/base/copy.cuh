/* copy.cuh: 16-byte copies, plain and asynchronous. The inline PTX of the copies lives here, each
   piece with its body for older chips and for the CPU.

   Rows that another kernel or a peer has just written are read by plain global loads, never
   through the read-only path. */
#ifndef MOE_BASE_COPY_CUH
#define MOE_BASE_COPY_CUH

#include "cuda.cuh"

/* 16 bytes, both addresses aligned to them. */
MOE_DEVICE uint4 moei_load16(const void* p) { return *(const uint4*)p; }
MOE_DEVICE void moei_store16(void* p, uint4 v) { *(uint4*)p = v; }

/* 4 bytes, read here and now: the compiler leaves the load where it stands, so that several go out
   together long before their first use. */
MOE_DEVICE uint32_t moei_load4_early(const void* p)
{
#if MOE_ON_HOST
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
#else
    uint32_t v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
#endif
}

/* Copies `bytes` (0, 2, ... 16) bytes from global to shared memory without waiting and fills up to
   16 with zeros. Where it is 0, `from` is not read, but must still be an address. Both addresses
   16-byte aligned. Before sm_80 the copy passes through registers at once. */
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

/* Closes this thread's group of copies. */
MOE_DEVICE void moei_copy_commit(void)
{
#if MOE_ON_HOST
    moeh_copy_commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Waits until at most `pending` (a literal, 0 to 6) of this thread's groups are still under way.
   Other threads see the data after a barrier. */
MOE_DEVICE void moei_copy_wait(const int pending)
{
#if MOE_ON_HOST
    moeh_copy_wait(pending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    switch (pending) { /* the instruction takes an immediate */
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

#endif
