/* faults.h: the faults that a kernel can record, and their texts. C11 and C++14.

     uint64_t word;  cudaMemcpy(&word, desc.fault, 8, cudaMemcpyDeviceToHost);
     moe_fault f = moe_fault_decode(word);
     if (f.code) printf("%s at %lld, rank %d\n", moe_fault_text(f.code), f.index, f.rank);

   base/fault.h defines the fault word. After a data fault the slot, row or token concerned is
   dropped, as the text says, and everything else is right. After a stop fault the later kernels
   with the same word do nothing. */
#ifndef MOE_FAULTS_H
#define MOE_FAULTS_H

#include "base/fault.h"

/* name, code, text. Codes 1 to MOE_FAULT_LAST_STOP stop later kernels; the smaller code is kept. */
#define MOEI_FAULT_LIST(X)                                                                         \
    X(NONE, 0, "no fault")                                                                         \
    X(BAD_OFFSET, 1,                                                                               \
      "expert_offset decreases or passes the last row (index: expert), or an entry of a list of "  \
      "groups is out of range (index: entry)")                                                     \
    X(BAD_TABLE, 2, "null or misaligned address in a table of experts (index: expert)")            \
    X(BAD_SPARSE_BLOCK, 3, "a list of sparse blocks out of range or not ascending (index: entry)") \
    X(NO_ROOM, 4, "max_blocks is less than the mask has (index: sparse blocks it has)")            \
    X(NOT_READY, 5, "rows of A did not become ready in time (index: row)")                         \
    X(PEER_LATE, 6, "a rank did not come in time (index: moe_peers_late_decode has its parts)")    \
    X(ROWS_FULL, 7, "rows pass the room of their buffer (index: rows that it would need)")         \
    X(NAN_LOGIT, 16, "a logit counts as NaN: the token selects nothing (index: token)")            \
    X(BAD_ID, 17, "expert id out of range: the slot is dropped (index: slot)")                     \
    X(BAD_ROW, 18, "row map out of range: read as zeros, not added to y (index: row or slot)")     \
    X(BAD_COUNT, 19,                                                                               \
      "chunk_count is not that of these ids: their rows are wrong (index: slot or 0)")             \
    X(BAD_PLACE, 20, "place or its address out of range: the slot is dropped (index: slot)")       \
    X(BAD_REPLICA, 21, "an expert without a replica in range: the slot is dropped (index: slot)")  \
    X(NAN_SUM, 22, "a batch's logits of +inf and -inf: the expert is not chosen (index: expert)")

enum {
#define MOEI_FAULT_ENUM(name, code, text) MOE_FAULT_##name = code,
    MOEI_FAULT_LIST(MOEI_FAULT_ENUM)
#undef MOEI_FAULT_ENUM
};

/* Returns the text of a code: static storage, never null. */
MOE_HOST const char* moe_fault_text(int code)
{
    switch (code) {
#define MOEI_FAULT_CASE(name, code, text)                                                         \
    case code: return text;
        MOEI_FAULT_LIST(MOEI_FAULT_CASE)
#undef MOEI_FAULT_CASE
    }
    return "unknown fault";
}

#endif
