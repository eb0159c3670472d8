/* fault.cuh: the fault word as kernels see it; fault.h has its meaning, faults.h the codes and texts. */
#ifndef MOE_BASE_FAULT_CUH
#define MOE_BASE_FAULT_CUH

#include "cuda.cuh"
#include "fault.h"

/* MOEI_FAULT_KEY, computed where a fault is met and nowhere before. The rank's part of that
   expression is the same all kernel long, so the compiler computes it ahead of the branch and holds
   it in a register: 4 % of route's placing launch. Here it waits for the index. */
MOE_DEVICE uint64_t moei_fault_key(int code, int rank, int64_t index)
{
#if MOE_ON_HOST
    return MOEI_FAULT_KEY(code, rank, index);
#else
    uint64_t key;
    asm("{ .reg .u32 lower, upper;\n\t" /* as if of rank 0, then less rank << 44 */
        ".reg .u64 first;\n\t"
        "sub.u64 first, %1, %2;\n\t"
        "mov.b64 {lower, upper}, first;\n\t"
        "mad.lo.u32 upper, %3, 0xfffff000, upper;\n\t"
        "mov.b64 %0, {lower, upper}; }"
        : "=l"(key)
        : "l"(MOEI_FAULT_KEY(code, 0, 0)), "l"((uint64_t)index & 0xfffffffffffull), "r"(rank));
    return key;
#endif
}

/* Records a fault; `word` may be null. rank is 0 .. MOE_FAULT_MAX_RANK. Costs one atomic, on bad
   data only. */
MOE_DEVICE void moe_fault_raise(uint64_t* word, int code, int rank, int64_t index)
{
    if (word)
        atomicMax((unsigned long long*)word, (unsigned long long)moei_fault_key(code, rank, index));
}

/* Has an earlier kernel of the chain met a fault that stops it? All threads of the block call
   it and get one answer, also while another block of this kernel raises a fault. */
MOE_DEVICE bool moe_fault_stopped(const uint64_t* word)
{
    uint64_t seen = 0;
    if (!word) return false;
    if (threadIdx.x == 0) seen = *(const volatile uint64_t*)word;
    return __syncthreads_or(MOEI_FAULT_STOPS(seen)) != 0;
}

#endif
