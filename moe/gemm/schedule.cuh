/* schedule.cuh: which tile of which expert a block computes next, read from the offsets on the
   device, so that no host copy is needed and a captured graph replays with other routing.

   Tiles are numbered expert after expert. Within an expert they are walked in bands of
   MOEI_GEMM_BAND row tiles: all column tiles of a band before the next band, rows fastest. The
   blocks that run at one time then share few rows of A and few columns of B, which stay in L2. */
#ifndef MOE_GEMM_SCHEDULE_CUH
#define MOE_GEMM_SCHEDULE_CUH

#include "../base/block.cuh"
#include "../base/fault.cuh"
#include "../faults.h"
#include "../layout.h"

#define MOEI_GEMM_BAND 16

/* One tile of C. */
typedef struct moe_tile_position {
    int32_t expert;
    int32_t begin, end; /* the expert's rows; k-grouped: of A and B */
    int32_t row;        /* first row of the tile; below `begin` only where rows are aligned down */
    int32_t column;     /* number of the tile along the columns; k-grouped: first column */
} moe_tile_position;

/* What the schedule needs; tile_start [E + 1] lies in shared memory. */
typedef struct moei_schedule {
    const int32_t* expert_offset; /* [E + 1], or null: one group of num_rows rows */
    int32_t num_experts, num_rows;
    int32_t column_tiles; /* tiles along N */
    int32_t row_align;    /* 1, or 8 where A is read along M and tiles begin at multiples of 8 */
    int* tile_start;      /* first tile of each expert; the last entry is the number of tiles */
} moei_schedule;

MOE_DEVICE int moei_expert_begin(const moei_schedule* s, int e)
{
    return s->expert_offset ? s->expert_offset[e] : 0;
}

MOE_DEVICE int moei_expert_end(const moei_schedule* s, int e)
{
    return s->expert_offset ? s->expert_offset[e + 1] : s->num_rows;
}

/* Fills tile_start; all threads of the block call it. Returns the number of tiles, or -1 when the
   offsets make no sense, which sets the fault word. */
MOE_DEVICE int moei_schedule_build(const moei_schedule* s, moei_block_scan_scratch* scratch,
                                   uint64_t* fault, int rank, const int tile_rows)
{
    int before = 0, bad = 0;
    for (int e0 = 0; e0 < s->num_experts; e0 += (int)blockDim.x) {
        const int e = e0 + (int)threadIdx.x;
        int tiles = 0, total, at;
        if (e < s->num_experts) {
            const int begin = moei_expert_begin(s, e), end = moei_expert_end(s, e);
            if (begin < 0 || end < begin || end > s->num_rows) {
                bad = 1;
                moei_fault_raise(fault, MOE_FAULT_BAD_OFFSET, rank, e);
            } else if (end > begin) {
                const int first = begin - begin % s->row_align;
                tiles = (end - first + tile_rows - 1) / tile_rows * s->column_tiles;
            }
        }
        at = moei_block_exclusive_scan(tiles, scratch, &total);
        if (e < s->num_experts) s->tile_start[e] = before + at;
        before += total;
    }
    if (threadIdx.x == 0) s->tile_start[s->num_experts] = before;
    return __syncthreads_or(bad) ? -1 : before;
}

/* Where tile number `index` lies. Needs index below the number of tiles. */
MOE_DEVICE moe_tile_position moei_schedule_tile(const moei_schedule* s, int index, const int tile_rows)
{
    int lo = 0, hi = s->num_experts; /* tile_start[lo] <= index < tile_start[hi] */
    moe_tile_position t;
    int local, row_tiles, first, band, in_band, height;
    while (hi - lo > 1) {
        const int mid = (lo + hi) >> 1;
        if (s->tile_start[mid] <= index) lo = mid;
        else hi = mid;
    }
    t.expert = lo;
    t.begin = moei_expert_begin(s, lo);
    t.end = moei_expert_end(s, lo);
    first = t.begin - t.begin % s->row_align;
    local = index - s->tile_start[lo];
    row_tiles = (t.end - first + tile_rows - 1) / tile_rows;
    band = local / (MOEI_GEMM_BAND * s->column_tiles);
    in_band = local - band * MOEI_GEMM_BAND * s->column_tiles;
    height = row_tiles - band * MOEI_GEMM_BAND;
    if (height > MOEI_GEMM_BAND) height = MOEI_GEMM_BAND;
    t.column = in_band / height;
    t.row = first + (band * MOEI_GEMM_BAND + in_band - t.column * height) * tile_rows;
    return t;
}

#endif
