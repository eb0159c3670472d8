/* list_mark.cuh: the first launch of list.cuh: converts every source into words of bits and counts
   them.

   A thread block has 32 block rows (number `tile`) and one span of 32 words. Warp r makes the words
   of block row r, one word a lane. With a column order, warp k then counts the set bits of each
   column of word k. */
#ifndef MOE_BLOCK_SPARSE_LIST_MARK_CUH
#define MOE_BLOCK_SPARSE_LIST_MARK_CUH

#include "../base/copy.cuh"
#include "../base/fault.cuh"
#include "../base/warp.cuh"
#include "../faults.h"
#include "desc.h"

#define MOEI_SPARSE_LIST_THREADS 1024
#define MOEI_SPARSE_LIST_SPAN 1024 /* bits of a block row in one thread block: 32 words */

/* Arguments of the three kernels. One bit represents a group of `each` block columns: one column,
   or all columns of an expert. */
typedef struct moei_sparse_list_args {
    moe_block_sparse_list_desc d;              /* checked */
    int32_t num_block_rows, num_block_columns; /* RB, CB */
    int32_t groups, each; /* groups of block columns; columns of a group: groups * each = CB */
    int32_t words;        /* words of a block row: ceil(groups / 32) */
    int32_t tiles;        /* sets of 32 block rows: ceil(RB / 32), at least 1 */
    int32_t spans;        /* sets of 32 words: ceil(words / 32), at least 1 */
    int32_t row_sums;     /* sets of 1024 block rows: ceil(RB / 1024), at least 1 */
    int32_t wide_bytes;   /* 1: rows of bytes can be read as 16-byte vectors; 0: byte by byte */
    /* workspace; every count is in bits */
    uint32_t* word;       /* [RB, words] the mask */
    int32_t* row_count;   /* [spans, RB] bits of a block row in a span */
    int32_t* row_start;   /* [RB] bits of the earlier rows in the same set of 1024 */
    int32_t* row_sum;     /* [row_sums] bits of a set of 1024 rows */
    int32_t* above;       /* [tiles, words * 32] bits of a group in 32 block rows; after the second
                             launch: in all block rows before those */
    int32_t* group_count; /* [words * 32] bits of a group */
    int32_t* group_start; /* [words * 32] bits of the earlier groups in the same word */
    int32_t* word_sum;    /* [words] bits of a word's groups */
    int32_t* bad_offset;  /* [spans] first expert of a span with a bad offset, or -1 */
    int32_t* stopped;     /* [1] 1: a stop fault was raised before this list */
} moei_sparse_list_args;

/* Returns a word whose bit i is 1 where byte i of v is not 0. */
MOE_DEVICE uint32_t moei_sparse_list_nonzero4(uint32_t v)
{
    const uint32_t top = (((v & 0x7f7f7f7fu) + 0x7f7f7f7fu) | v) & 0x80808080u;
    return ((top >> 7) * 0x01020408u) >> 24;
}

/* Returns the same of 16 bytes. */
MOE_DEVICE uint32_t moei_sparse_list_nonzero16(uint4 v)
{
    return moei_sparse_list_nonzero4(v.x) | moei_sparse_list_nonzero4(v.y) << 4 |
           moei_sparse_list_nonzero4(v.z) << 8 | moei_sparse_list_nonzero4(v.w) << 12;
}

/* Transposes 32 x 32 bits: bit c of lane r becomes bit r of lane c. Called by a whole warp. */
MOE_DEVICE uint32_t moei_sparse_list_transpose(uint32_t word)
{
    uint32_t low = 0xffffu; /* the lower field of each pair of fields, `step` bits wide */
    MOE_UNROLL
    for (int step = 16; step > 0; step >>= 1) {
        const uint32_t other = __shfl_xor_sync(MOE_FULL_WARP, word, step);
        if (moe_lane() & step) word = (word & ~low) | (other >> step & low);
        else word = (word & low) | (other & low) << step;
        low ^= low << (step >> 1);
    }
    return word;
}

/* The four sources. Each function is called by a whole warp, and returns to a lane word number
   span * 32 + lane of block row `row`, 0 .. RB - 1. */

/* Converts bytes. */
MOE_DEVICE uint32_t moei_sparse_list_of_bytes(const moei_sparse_list_args* a, int row, int span)
{
    const uint8_t* bytes = a->d.bytes + (int64_t)row * a->num_block_columns;
    const int lane = moe_lane(), first = span * MOEI_SPARSE_LIST_SPAN;
    uint32_t word = 0;
    if (a->wide_bytes) { /* a lane reads the bytes of half a word, twice */
        const int even = lane * 2 & 31, j = first + lane * 16;
        uint4 v[2];
        uint32_t half[2];
        MOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            v[i] = make_uint4(0, 0, 0, 0);
            if (j + i * 512 < a->num_block_columns) v[i] = moei_load16(bytes + j + i * 512);
        }
        MOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const uint32_t own = moei_sparse_list_nonzero16(v[i]);
            half[i] = __shfl_sync(MOE_FULL_WARP, own, even);
            half[i] |= __shfl_sync(MOE_FULL_WARP, own, even + 1) << 16;
        }
        return lane < 16 ? half[0] : half[1];
    }
    for (int k = 0; k < 32 && first + k * 32 < a->num_block_columns; k += 8) {
        uint32_t v[8];
        MOE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int j = first + (k + i) * 32 + lane;
            v[i] = j < a->num_block_columns ? bytes[j] : 0u;
        }
        MOE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const uint32_t bits = __ballot_sync(MOE_FULL_WARP, v[i] != 0);
            if (lane == k + i) word = bits;
        }
    }
    return word;
}

/* Converts bits: clears those past the last column. */
MOE_DEVICE uint32_t moei_sparse_list_of_bits(const moei_sparse_list_args* a, int row, int span)
{
    const int k = span * 32 + moe_lane(), last = a->num_block_columns & 31;
    uint32_t word = 0;
    if (k < a->words) word = a->d.bits[(int64_t)row * a->words + k];
    return k == a->words - 1 && last ? word & ((1u << last) - 1u) : word;
}

/* Converts ids. bits [32]: shared memory of this warp. Raises BAD_ID in span 0 alone. */
MOE_DEVICE uint32_t moei_sparse_list_of_ids(const moei_sparse_list_args* a, int row, int span,
                                            uint32_t* bits)
{
    const moe_block_sparse_list_desc* d = &a->d;
    const int64_t begin = (int64_t)row * d->block_rows;
    const int64_t here = d->rows - begin < d->block_rows ? d->rows - begin : d->block_rows;
    const int64_t first = d->whole_batch ? 0 : begin * d->top_k;
    const int slots = (d->whole_batch ? 1 : (int)here) * d->top_k; /* at most 2^19 */
    bits[moe_lane()] = 0;
    __syncwarp(MOE_FULL_WARP);
    for (int from = moe_lane(); from - moe_lane() < slots; from += 8 * MOE_WARP_SIZE) {
        int id[8];
        MOE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int slot = from + i * MOE_WARP_SIZE;
            id[i] = slot < slots ? d->ids[first + slot] : -1;
        }
        MOE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int bit = id[i] - span * MOEI_SPARSE_LIST_SPAN;
            if (id[i] >= 0 && id[i] < a->groups) {
                if (bit >= 0 && bit < MOEI_SPARSE_LIST_SPAN)
                    atomicOr(bits + (bit >> 5), 1u << (bit & 31));
            } else if (id[i] != -1 && span == 0) {
                moe_fault_raise(d->fault, MOE_FAULT_BAD_ID, d->rank,
                                first + from + i * MOE_WARP_SIZE);
            }
        }
    }
    __syncwarp(MOE_FULL_WARP);
    return bits[moe_lane()];
}

/* Converts expert_offset. Writes to *bad the first expert of the span whose range decreases or
   passes the last row, or -1. */
MOE_DEVICE uint32_t moei_sparse_list_of_offset(const moei_sparse_list_args* a, int row, int span,
                                               int* bad)
{
    const moe_block_sparse_list_desc* d = &a->d;
    const int64_t begin = (int64_t)row * d->block_rows, end = begin + d->block_rows;
    const int lane = moe_lane(), first = span * MOEI_SPARSE_LIST_SPAN;
    unsigned first_bad = MOE_FULL_WARP; /* of this lane's experts; MOE_FULL_WARP, -1: none */
    uint32_t word = 0;
    for (int k0 = 0; k0 < 32 && first + k0 * 32 < a->groups; k0 += 8) {
        int from[8], upto[8];
        MOE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int e = first + (k0 + i) * 32 + lane;
            from[i] = e < a->groups ? d->expert_offset[e] : 0;
            upto[i] = e < a->groups ? d->expert_offset[e + 1] : 0;
        }
        MOE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const bool here = from[i] < upto[i] && from[i] < end && upto[i] > begin;
            const uint32_t bits = __ballot_sync(MOE_FULL_WARP, here);
            if (lane == k0 + i) word = bits;
            if (from[i] < 0 || upto[i] < from[i] || upto[i] > d->rows) {
                const unsigned expert = (unsigned)(first + (k0 + i) * 32 + lane);
                first_bad = expert < first_bad ? expert : first_bad;
            }
        }
    }
    for (int step = 16; step > 0; step >>= 1) {
        const unsigned other = __shfl_xor_sync(MOE_FULL_WARP, first_bad, step);
        first_bad = other < first_bad ? other : first_bad;
    }
    *bad = (int)first_bad;
    return word;
}

typedef struct moei_sparse_list_mark_shared {
    uint32_t word[32][33]; /* [block row][word] */
} moei_sparse_list_mark_shared;

/* Writes words, counts and bad offsets to the workspace. Also records whether a stop fault was
   raised before: when the third launch runs, the fault word may hold a fault of this list. */
MOE_KERNEL(MOEI_SPARSE_LIST_THREADS, 1) moei_sparse_list_mark(MOE_ARG(moei_sparse_list_args) a)
{
    MOE_SHARED(moei_sparse_list_mark_shared, s);
    const int tile = (int)(blockIdx.x / (unsigned)a.spans);
    const int span = (int)(blockIdx.x % (unsigned)a.spans);
    const int lane = moe_lane(), warp = moe_warp(), row = tile * 32 + warp;
    const bool checks = a.d.expert_offset && row == 0; /* offsets are checked even where RB is 0 */
    uint32_t word = 0;
    bool stopped;
    int count, bad = -1;

    moe_pdl_trigger();
    moe_pdl_wait();
    stopped = moe_fault_stopped(a.d.fault);
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.stopped = stopped;
    if (!stopped && (row < a.num_block_rows || checks)) {
        if (a.d.bytes) word = moei_sparse_list_of_bytes(&a, row, span);
        else if (a.d.bits) word = moei_sparse_list_of_bits(&a, row, span);
        else if (a.d.ids) word = moei_sparse_list_of_ids(&a, row, span, s.word[warp]);
        else if (a.d.expert_offset) word = moei_sparse_list_of_offset(&a, row, span, &bad);
        if (checks && lane == 0) a.bad_offset[span] = bad;
    }
    if (row < a.num_block_rows && span * 32 + lane < a.words)
        a.word[(int64_t)row * a.words + span * 32 + lane] = word;
    count = moe_warp_inclusive_scan(__popc(word));
    if (row < a.num_block_rows && lane == 31)
        a.row_count[(int64_t)span * a.num_block_rows + row] = count;
    if (!a.d.column_offset) return;

    /* barrier: a warp counts one word of all 32 block rows */
    s.word[warp][lane] = word;
    __syncthreads();
    if (span * 32 + warp < a.words) {
        count = __popc(moei_sparse_list_transpose(s.word[lane][warp]));
        a.above[((int64_t)tile * a.words + span * 32 + warp) * 32 + lane] = count;
    }
}

#endif
