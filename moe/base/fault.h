/* fault.h: the fault word, for errors that only the device can see. C11 and C++14.

   A fault word is one uint64_t in device memory. The caller owns it and passes it to the stations
   of a chain. 0 means no fault. A kernel that meets bad data records {code, rank, index} and
   continues, in bounds, to its end. The word keeps the fault with the smallest code, then rank,
   then index: the same one every run, whichever thread records first.

   After a data fault everything is right but what the fault names. After a stop fault (codes 1 to
   MOE_FAULT_LAST_STOP) the later kernels with the same word do nothing. faults.h has the codes and
   their texts.

   No kernel clears the word. The caller does, before a chain and as often as needed:
   cudaMemsetAsync(fault, 0, 8, stream). */
#ifndef MOE_BASE_FAULT_H
#define MOE_BASE_FAULT_H

#include <stdint.h>

#include "config.h"

enum {
    MOE_FAULT_LAST_STOP = 15, /* largest code of a stop fault */
    MOE_FAULT_MAX_RANK = 4095 /* largest rank that a word can hold */
};

typedef struct moe_fault {
    int32_t code;  /* MOE_FAULT_*; 0: no fault */
    int32_t rank;  /* rank that recorded it; 0 on one GPU */
    int64_t index; /* token, slot, row, expert, entry or count: the code's text names which */
} moe_fault;

/* The word is the complement of code:8 rank:12 index:44, so that an atomic maximum keeps the
   smallest key and 0 stays "no fault". */
#define MOEI_FAULT_KEY(code, rank, index)                                                         \
    (~(((uint64_t)(code) << 56) | ((uint64_t)((rank)&0xfff) << 44) |                              \
       ((uint64_t)(index)&0xfffffffffffull)))

/* 1 where this word stops the kernels that read it. */
#define MOEI_FAULT_STOPS(word) ((word) != 0 && (~(word) >> 56) <= MOE_FAULT_LAST_STOP)

/* Returns the fault that a word holds; code 0 where it holds none. */
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
