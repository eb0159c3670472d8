/* flags.cuh: counters of row blocks in memory: which rows of A have come, which rows of C are
   stored. desc.h says what they mean (ready, done). Called by tile.cuh and wgmma/.

   Row block b is rows 128 b .. 128 b + 127 of C. One thread waits for all that copy A, before a
   barrier that lets them begin. One thread counts for all that store C, after a barrier that all
   of them reach. */
#ifndef MOE_GEMM_FLAGS_CUH
#define MOE_GEMM_FLAGS_CUH

#include "../base/fault.cuh"
#include "../base/flag.cuh"
#include "../faults.h"
#include "args.h"

/* Returns the first row of the next row block. */
MOE_DEVICE int moei_next_row_block(int row)
{
    return (row / MOE_GEMM_ROW_BLOCK + 1) * MOE_GEMM_ROW_BLOCK;
}

/* Waits until the rows of A of rows row .. end - 1 of C have come. The wait ends without them where
   the fault word holds a stop fault, or the time is over, which raises MOE_FAULT_NOT_READY; then
   *waits becomes 0, and the block's later calls do nothing. *waits is 1 before the first call. One
   thread calls it. Requires d->ready. */
MOE_DEVICE void moei_ready_wait(const moe_grouped_gemm_args* d, int32_t* waits, int row, int end)
{
    for (; row < end && *waits; row = moei_next_row_block(row)) {
        const uint32_t* flag = d->ready + row / MOE_GEMM_ROW_BLOCK;
        uint64_t begun = 0;
        while (*waits && (int32_t)(moei_flag_load(flag) - d->ready_value) < 0) {
            const uint64_t now = moei_nanoseconds();
            if (!begun) begun = now;
            if (moe_fault_stops(d->fault)) {
                *waits = 0;
            } else if (now - begun > (uint64_t)d->ready_timeout_ms * 1000000) {
                *waits = 0;
                moe_fault_raise(d->fault, MOE_FAULT_NOT_READY, d->rank, row);
            }
            __nanosleep(64);
            MOE_SPIN();
        }
    }
}

/* Counts `columns` elements of each of rows row .. end - 1 of C, which are stored: by the calling
   thread, or by others before a barrier. Counts nothing after a stop fault, since the rows of A may
   have been missing. One thread calls it. Requires d->done. */
MOE_DEVICE void moei_done_count(const moe_grouped_gemm_args* d, int row, int end, int columns)
{
    if (moe_fault_stops(d->fault)) return;
    while (row < end) {
        int next = moei_next_row_block(row);
        next = next < end ? next : end;
        moei_flag_add(d->done + row / MOE_GEMM_ROW_BLOCK,
                      (uint32_t)(next - row) * (uint32_t)(columns / 8));
        row = next;
    }
}

#endif
