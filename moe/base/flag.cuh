/* flag.cuh: words in memory by which kernels, also of other devices, tell each other that data are
   there. A writer stores its data and then adds to a word (release). A reader loads the word
   (acquire) and then reads the data. Both at system scope. */
#ifndef MOE_BASE_FLAG_CUH
#define MOE_BASE_FLAG_CUH

#include "cuda.cuh"

/* Returns a word. What was stored before its last addition, by any device, is visible then
   (acquire). */
MOE_DEVICE uint32_t moei_flag_load(const uint32_t* p)
{
#if MOE_ON_HOST
    MOEI_ALIGNED(p, 4);
    return *(const volatile uint32_t*)p;
#else
    uint32_t v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
#endif
}

/* Adds v to a word, after all that the thread has seen (release). */
MOE_DEVICE void moei_flag_add(uint32_t* p, uint32_t v)
{
#if MOE_ON_HOST
    atomicAdd(p, v);
#else
    asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#endif
}

/* Adds v to a word. Orders nothing else (relaxed). */
MOE_DEVICE void moei_flag_add_relaxed(uint32_t* p, uint32_t v)
{
#if MOE_ON_HOST
    atomicAdd(p, v);
#else
    asm volatile("red.relaxed.sys.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#endif
}

/* Load or store a 64-bit word that another device may store or load at that time. Orders nothing
   else (relaxed, system scope). */
MOE_DEVICE uint64_t moei_flag_load8(const uint64_t* p)
{
#if MOE_ON_HOST
    MOEI_ALIGNED(p, 8);
    return *(const volatile uint64_t*)p;
#else
    uint64_t v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
#endif
}
MOE_DEVICE void moei_flag_store8(uint64_t* p, uint64_t v)
{
#if MOE_ON_HOST
    MOEI_ALIGNED(p, 8);
    *(volatile uint64_t*)p = v;
#else
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
#endif
}

/* Returns the device's clock in nanoseconds, more than 0. */
MOE_DEVICE uint64_t moei_nanoseconds(void)
{
#if MOE_ON_HOST
    return moeh_clock();
#else
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
#endif
}

#endif
