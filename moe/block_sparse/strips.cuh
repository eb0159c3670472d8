/* strips.cuh: makes the lists that a product walks from the mask of a call: one list for each
   strip, which may join several block rows of fewer rows than a tile. Prepared by prepare.cuh.

     block [..]   block columns of the entries, ascending
     info [..]    bits: the joined block rows that have the entry

   A strip's entries are begin .. end. One thread block makes one strip: gathers the bits of
   MOEI_SPARSE_STRIPS_WINDOW block columns at a time in shared memory, then writes the nonzero ones.
   Block rows and block columns are those of the normal form (tile.cuh). */
#ifndef MOE_BLOCK_SPARSE_STRIPS_CUH
#define MOE_BLOCK_SPARSE_STRIPS_CUH

#include "../base/block.cuh"
#include "../base/fault.cuh"
#include "../faults.h"
#include "desc.h"

#define MOEI_SPARSE_STRIPS_THREADS 256
#define MOEI_SPARSE_STRIPS_WINDOW 1024

/* Arguments of the kernel. entries: num_strips * others for bytes or bits, max_blocks for a
   list. */
typedef struct moei_sparse_strips_args {
    const uint8_t* bytes;                /* [RB, CB] the mask, one of three forms; or null */
    const uint32_t* bits;                /* [RB, words]; or null */
    const int32_t *offset, *index;       /* the list's row order, or column order; or null */
    int32_t *begin, *end, *block, *info; /* [strips], [strips], [entries], [entries] */
    int32_t* partial;       /* [strips] 1: some joined block row lacks an entry; else 0 */
    const int32_t* only;    /* [ceil(strips / ratio)] `partial` of the other plan; 0: its
                               strip, `ratio` of these, is not walked. Null: all are walked */
    uint64_t* fault;        /* [1] fault word; or null */
    int32_t num_block_rows; /* block rows */
    int32_t others;         /* block columns */
    int32_t join;           /* block rows of a strip, 1 .. 8 */
    int32_t by_column;      /* 1: block rows are block columns of the mask as stored */
    int32_t words;          /* words in a row of bits */
    int32_t max_blocks;     /* entries of a list; else 0 */
    int32_t ratio;          /* 1 where `only` is null */
    int32_t rank;           /* reported with a fault */
} moei_sparse_strips_args;

/* Shared memory of a thread block. */
typedef struct moei_sparse_strips_shared {
    moe_block_scan_scratch scan;
    uint32_t bits[MOEI_SPARSE_STRIPS_WINDOW]; /* joined block rows with each block column */
} moei_sparse_strips_shared;

/* Returns 1 where bytes or bits have the sparse block at `block_row`, block column `other`. */
MOE_DEVICE uint32_t moei_sparse_strips_has(const moei_sparse_strips_args* d, int block_row,
                                           int other)
{
    const int64_t row = d->by_column ? other : block_row, column = d->by_column ? block_row : other;
    if (d->bytes)
        return d->bytes[row * (d->by_column ? d->num_block_rows : d->others) + column] != 0;
    return d->bits[row * d->words + (column >> 5)] >> (column & 31) & 1u;
}

/* Makes the list of strip blockIdx.x.
     1. Check the strip's part of a mask's list, before any write at its offsets. Barrier: every
        thread gets the result; a bad list gives an empty strip.
     2. For each window, gather the bits of its block columns: of bytes or bits by reading each
        sparse block, of a list by an atomicOr for each entry (barrier before: bits are 0; after:
        all are set).
     3. Write the entries whose bits are not 0, each at its prefix sum. The scan ends with a
        barrier: the next window may overwrite the bits.
     4. Write partial, begin and end. */
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
    if (d.only && !d.only[strip / d.ratio]) return; /* no tile reads this strip */
    at = d.offset ? d.offset[first] : strip * d.others;
    if (d.offset) { /* 1. check the list */
        for (int i = 0; i < joined; ++i) {
            const int begin = d.offset[first + i], end = d.offset[first + i + 1];
            if (begin < 0 || end < begin || end > d.max_blocks || end - begin > d.others ||
                (i == 0 && begin != at)) {
                if (tid == 0) moe_fault_raise(d.fault, MOE_FAULT_BAD_SPARSE_BLOCK, d.rank, begin);
                bad = 1;
                break;
            }
            for (int b = begin + tid; b < end; b += MOEI_SPARSE_STRIPS_THREADS) {
                const int o = d.index[b];
                if ((uint32_t)o >= (uint32_t)d.others || (b > begin && d.index[b - 1] >= o)) {
                    moe_fault_raise(d.fault, MOE_FAULT_BAD_SPARSE_BLOCK, d.rank, b);
                    bad = 1;
                }
            }
        }
    }
    bad = __syncthreads_or(bad);
    /* 2. and 3. for each window */
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
        /* 3. write */
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
    /* 4. the strip */
    partial = __syncthreads_or(partial);
    if (tid == 0) {
        d.partial[strip] = partial;
        d.begin[strip] = bad ? 0 : at;
        d.end[strip] = bad ? 0 : at + count;
    }
}

#endif
