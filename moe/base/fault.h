/* fault.h: the fault word, for what only the device can see. C11 and C++14.

   A fault word is one uint64_t in device memory that the caller owns and hands to
   the stations of a chain. 0 means no fault. A kernel that meets bad data records
   {code, rank, index} and goes on, in bounds, to its end. The word keeps the fault
   that comes first by code, then rank, then index: the same one every run,
   whichever thread met its own first.

   Codes are of two sorts. After a data fault (a NaN row, an id out of range) the
   slot, row or token concerned drops out, as the code's text says, and everything
   else is right. After a stop fault (offsets that make no sense) the later kernels
   that are given the same word do nothing.

   The caller clears the word: cudaMemsetAsync(fault, 0, 8, stream) before a chain,
   as often or as rarely as it likes. No kernel clears it.

     uint64_t word;  cudaMemcpy(&word, desc.fault, 8, cudaMemcpyDeviceToHost);
     moe_fault f = moe_fault_decode(word);
     if (f.code) printf("%s at %lld, rank %d\n", moe_fault_text(f.code), f.index, f.rank); */
#ifndef MOE_BASE_FAULT_H
#define MOE_BASE_FAULT_H

#include <stdint.h>

#include "config.h"

/* code, what `index` counts, text. Stop faults first: they win over data faults. */
#define MOEI_FAULT_LIST(X)                                                                        \
    X(NONE, "no fault")                                                                           \
    X(BAD_OFFSET, "expert_offset decreases or passes the last row (index: expert)")               \
    X(BAD_TABLE, "null or misaligned address in a table of experts (index: expert)")              \
    X(BAD_BLOCK, "a block list out of range or not ascending (index: entry)")                     \
    X(NO_ROOM, "max_blocks is less than the mask has (index: blocks it has)")                     \
    X(NAN_LOGIT, "a logit counts as NaN: the token selects nothing (index: token)")               \
    X(BAD_ID, "expert id out of range: the slot is dropped (index: slot)")                        \
    X(BAD_ROW, "row map out of range: read as zeros, not added to y (index: row or slot)")        \
    X(BAD_COUNT, "chunk_count is not that of these ids: their rows are wrong (index: slot or 0)") \
    X(BAD_PLACE, "place or its address out of range: the slot is dropped (index: slot)")          \
    X(BAD_REPLICA, "an expert without a replica in range: the slot is dropped (index: slot)")     \
    X(NAN_SUM, "a batch's logits of +inf and -inf: the expert is not chosen (index: expert)")

enum {
#define MOEI_FAULT_ENUM(name, text) MOE_FAULT_##name,
    MOEI_FAULT_LIST(MOEI_FAULT_ENUM)
#undef MOEI_FAULT_ENUM
        MOE_NUM_FAULTS,
    MOE_FAULT_LAST_STOP = MOE_FAULT_NO_ROOM
};

typedef struct moe_fault {
    int32_t code;  /* MOE_FAULT_*, 0 = none */
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
    moe_fault f = {MOE_FAULT_NONE, 0, 0};
    if (word) {
        const uint64_t key = ~word;
        f.code = (int32_t)(key >> 56);
        f.rank = (int32_t)((key >> 44) & 0xfff);
        f.index = (int64_t)(key & 0xfffffffffffull);
    }
    return f;
}

/* Static storage, never null. */
MOE_HOST const char* moe_fault_text(int code)
{
    static const char* const text[] = {
#define MOEI_FAULT_STR(name, str) str,
        MOEI_FAULT_LIST(MOEI_FAULT_STR)
#undef MOEI_FAULT_STR
    };
    return code >= 0 && code < MOE_NUM_FAULTS ? text[code] : "unknown fault";
}

#endif
