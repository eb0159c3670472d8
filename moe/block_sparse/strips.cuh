/* strips.cuh: the list of blocks that a product walks, made from the mask of a call: one list for
   each strip of tiles, in which the strips of several low blocks may be joined.

     block [..]   numbers of the blocks along the other axis, ascending
     info [..]    bits: which of the joined strips have the block

   A strip's blocks stand at begin .. end. One thread block makes one strip: it gathers the bits of
   MOEI_SPARSE_STRIPS_WINDOW blocks at a time in shared memory, then writes those that are not 0. */
#ifndef MOE_BLOCK_SPARSE_STRIPS_CUH
#define MOE_BLOCK_SPARSE_STRIPS_CUH

#include "../base/block.cuh"
#include "../base/fault.cuh"
#include "../faults.h"
#include "desc.h"

#define MOEI_SPARSE_STRIPS_THREADS 256
#define MOEI_SPARSE_STRIPS_WINDOW 1024

typedef struct moei_sparse_strips_args {
    const uint8_t* bytes; /* the mask, one of three */
    const uint32_t* bits;
    const int32_t *offset, *index; /* the list's row or column order */
    int32_t *begin, *end, *block, *info;
    int32_t* partial;    /* [strips] 1: some block is not in all of the joined strips */
    const int32_t* only; /* partial of the plan whose rest this is, a strip of which is `ratio`
                            strips here: 0: not walked; or null: all are */
    uint64_t* fault;
    int32_t num_block_rows; /* strips of blocks along the axis of the tiles' rows */
    int32_t others;     /* blocks along the other axis */
    int32_t join;       /* strips of blocks in a strip of tiles, 1 .. 8 */
    int32_t by_column;  /* 1: num_block_rows are columns of the mask's bytes or bits */
    int32_t words;      /* words in a row of bits */
    int32_t max_blocks; /* of the list */
    int32_t ratio;
    int32_t rank;
} moei_sparse_strips_args;

typedef struct moei_sparse_strips_shared {
    moe_block_scan_scratch scan;
    uint32_t bits[MOEI_SPARSE_STRIPS_WINDOW];
} moei_sparse_strips_shared;

/* Does the mask have block `other` of block_row `block_row`? */
MOE_DEVICE uint32_t moei_sparse_strips_has(const moei_sparse_strips_args* d, int block_row,
                                           int other)
{
    const int64_t row = d->by_column ? other : block_row, column = d->by_column ? block_row : other;
    if (d->bytes)
        return d->bytes[row * (d->by_column ? d->num_block_rows : d->others) + column] != 0;
    return d->bits[row * d->words + (column >> 5)] >> (column & 31) & 1u;
}

MOE_KERNEL(MOEI_SPARSE_STRIPS_THREADS, 1) moei_sparse_strips(MOE_ARG(moei_sparse_strips_args) d)
{
    MOE_SHARED(moei_sparse_strips_shared, s);
    const int strip = (int)blockIdx.x, tid = (int)threadIdx.x;
    const int first = strip * d.join;
    const int joined = d.num_block_rows - first < d.join ? d.num_block_rows - first : d.join;
    const uint32_t all = (1u << joined) - 1;
    int bad = 0, partial = 0, at, count = 0;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault)) return;
    if (d.only && !d.only[strip / d.ratio]) return; /* nobody reads this one */
    at = d.offset ? d.offset[first] : strip * d.others;
    if (d.offset) { /* the list must be in order before anything is written at its offsets */
        for (int i = 0; i < joined; ++i) {
            const int begin = d.offset[first + i], end = d.offset[first + i + 1];
            if (begin < 0 || end < begin || end > d.max_blocks || end - begin > d.others ||
                (i == 0 && begin != at)) {
                if (tid == 0) moe_fault_raise(d.fault, MOE_FAULT_BAD_BLOCK, d.rank, begin);
                bad = 1;
                break;
            }
            for (int b = begin + tid; b < end; b += MOEI_SPARSE_STRIPS_THREADS) {
                const int o = d.index[b];
                if ((uint32_t)o >= (uint32_t)d.others || (b > begin && d.index[b - 1] >= o)) {
                    moe_fault_raise(d.fault, MOE_FAULT_BAD_BLOCK, d.rank, b);
                    bad = 1;
                }
            }
        }
    }
    bad = __syncthreads_or(bad);
    for (int from = 0; from < d.others && !bad; from += MOEI_SPARSE_STRIPS_WINDOW) {
        const int window = d.others - from < MOEI_SPARSE_STRIPS_WINDOW ? d.others - from
                                                                       : MOEI_SPARSE_STRIPS_WINDOW;
        for (int o = tid; o < MOEI_SPARSE_STRIPS_WINDOW; o += MOEI_SPARSE_STRIPS_THREADS) {
            uint32_t bits = 0;
            for (int i = 0; i < joined && !d.offset && o < window; ++i)
                bits |= moei_sparse_strips_has(&d, first + i, from + o) << i;
            s.bits[o] = bits;
        }
        __syncthreads();
        for (int i = 0; i < joined && d.offset; ++i)
            for (int b = d.offset[first + i] + tid; b < d.offset[first + i + 1];
                 b += MOEI_SPARSE_STRIPS_THREADS) {
                const int o = d.index[b] - from;
                if (o >= 0 && o < window) atomicOr(&s.bits[o], 1u << i);
            }
        __syncthreads();
        for (int o = tid; o - tid < window; o += MOEI_SPARSE_STRIPS_THREADS) {
            int total;
            const uint32_t bits = s.bits[o];
            const int before = moe_block_exclusive_scan(bits != 0, &s.scan, &total);
            if (bits) {
                if (bits != all) partial = 1;
                d.block[at + count + before] = from + o;
                d.info[at + count + before] = (int32_t)bits;
            }
            count += total;
        }
    }
    partial = __syncthreads_or(partial);
    if (tid == 0) {
        d.partial[strip] = partial;
        d.begin[strip] = bad ? 0 : at;
        d.end[strip] = bad ? 0 : at + count;
    }
}

#endif
