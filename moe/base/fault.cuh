/* fault.cuh: the fault word as kernels use it. fault.h defines the word, faults.h the codes and
   texts. */
#ifndef MOE_BASE_FAULT_CUH
#define MOE_BASE_FAULT_CUH

#include "cuda.cuh"
#include "fault.h"

/* Returns MOEI_FAULT_KEY, computed only where a fault is met. In C, rank << 44 is uniform over the
   kernel: the compiler computes the shift ahead of the branch and holds the result in a register.
   This costs 4 % of route's placing launch. Here the instruction that adds the rank depends on the
   index. */
MOE_DEVICE uint64_t moei_fault_key(int code, int rank, int64_t index)
{
#if MOE_ON_HOST
    return MOEI_FAULT_KEY(code, rank, index);
#else
    uint64_t key;
    asm("{ .reg .u32 lower, upper;\n\t" /* the key of rank 0, minus rank << 44 */
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

/* Records a fault with one atomic operation, so good data cost nothing. `word` may be null. rank is
   0 .. MOE_FAULT_MAX_RANK. */
MOE_DEVICE void moe_fault_raise(uint64_t* word, int code, int rank, int64_t index)
{
    if (word)
        atomicMax((unsigned long long*)word, (unsigned long long)moei_fault_key(code, rank, index));
}

/* Returns true where the word, which may be null, holds a stop fault now. Called by any thread. */
MOE_DEVICE bool moe_fault_stops(const uint64_t* word)
{
    return word && MOEI_FAULT_STOPS(*(const volatile uint64_t*)word);
}

/* Returns true where an earlier kernel of the chain met a stop fault. All threads of the block call
   moe_fault_stopped and get one answer, also while another block of this kernel raises a fault:
   thread 0 reads the word, and a barrier distributes what was read. */
MOE_DEVICE bool moe_fault_stopped(const uint64_t* word)
{
    if (!word) return false;
    return __syncthreads_or(threadIdx.x == 0 && moe_fault_stops(word)) != 0;
}

#endif
