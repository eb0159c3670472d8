/* fault.cuh: the fault word as kernels see it; fault.h has its meaning, faults.h the codes and texts. */
#ifndef MOE_BASE_FAULT_CUH
#define MOE_BASE_FAULT_CUH

#include "cuda.cuh"
#include "fault.h"

/* Records a fault; `word` may be null. Costs one atomic, on bad data only. */
MOE_DEVICE void moei_fault_raise(uint64_t* word, int code, int rank, int64_t index)
{
    if (word)
        atomicMax((unsigned long long*)word, (unsigned long long)MOEI_FAULT_KEY(code, rank, index));
}

/* Has an earlier kernel of the chain met a fault that stops it? All threads of the block call
   it and get one answer, also while another block of this kernel raises a fault. */
MOE_DEVICE bool moei_fault_stopped(const uint64_t* word)
{
    uint64_t seen = 0;
    if (!word) return false;
    if (threadIdx.x == 0) seen = *(const volatile uint64_t*)word;
    return __syncthreads_or(MOEI_FAULT_STOPS(seen)) != 0;
}

#endif
