/* fault.h: the fault word, for what only the device can see. C11 and C++14.

   A fault word is one uint64_t in device memory that the caller owns and hands to
   the stations of a chain. 0 means no fault. A kernel that meets bad data records
   {code, rank, index} and goes on, in bounds, to its end. The word keeps the fault
   that comes first by code, then rank, then index: the same one every run,
   whichever thread met its own first.

   Codes are of two sorts. After a data fault everything but what the fault names is right. After
   a stop fault (codes 1 to MOE_FAULT_LAST_STOP) the later kernels that are given the same word do
   nothing. faults.h has the codes and their texts.

   The caller clears the word: cudaMemsetAsync(fault, 0, 8, stream) before a chain,
   as often or as rarely as it likes. No kernel clears it. */
#ifndef MOE_BASE_FAULT_H
#define MOE_BASE_FAULT_H

#include <stdint.h>

#include "config.h"

enum {
    MOE_FAULT_LAST_STOP = 15,
    MOE_FAULT_MAX_RANK = 4095 /* that a word can hold */
};

typedef struct moe_fault {
    int32_t code;  /* MOE_FAULT_*, 0: none */
    int32_t rank;  /* rank that saw it, 0 on one GPU */
    int64_t index; /* token, slot, row or expert, as the code's text says */
} moe_fault;

/* The word is the complement of code:8 rank:12 index:44, so that an atomic maximum keeps
   the smallest key and 0 stays "none". */
#define MOEI_FAULT_KEY(code, rank, index)                                                         \
    (~(((uint64_t)(code) << 56) | ((uint64_t)((rank)&0xfff) << 44) |                              \
       ((uint64_t)(index)&0xfffffffffffull)))

/* Does this word stop the kernels that see it? */
#define MOEI_FAULT_STOPS(word) ((word) != 0 && (~(word) >> 56) <= MOE_FAULT_LAST_STOP)

MOE_HOST moe_fault moe_fault_decode(uint64_t word)
{
    moe_fault f = {0, 0, 0};
    if (word) {
        const uint64_t key = ~word;
        f.code = (int32_t)(key >> 56);
        f.rank = (int32_t)((key >> 44) & 0xfff);
        f.index = (int64_t)(key & 0xfffffffffffull);
    }
    return f;
}

#endif
