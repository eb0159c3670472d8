/* schedule.cuh: the order of tiles: which tile of which expert a block computes next. Kernels read
   the offsets on the device: no copy to the host, and a captured graph replays with other routing.
   Called by tile.cuh and k_tile.cuh.

   A group is the rows of one expert, group e those of expert e. m-grouped products may have a list
   of groups instead (moe_gemm_group): group i is then entry i, and names its expert.

   Tiles are numbered group after group. Two orders within a group:
     m-grouped  tiles cover the rows of C that the group has, in bands of MOEI_GEMM_BAND row
                tiles. All column tiles of a band come before the next band; row tiles vary
                fastest. The blocks that run at one time then share few rows of A and few columns
                of B, which stay in L2. Clusters take pairs of tiles: wgmma/order.cuh
     k-grouped  tiles cover the expert's own C [m, n]; the expert's rows are the depths. Row tiles
                vary fastest */
#ifndef MOE_GEMM_SCHEDULE_CUH
#define MOE_GEMM_SCHEDULE_CUH

#include "../base/block.cuh"
#include "../base/fault.cuh"
#include "../faults.h"
#include "../layout.h"
#include "args.h"
#include "shape.h"

#define MOEI_GEMM_BAND 16 /* row tiles of a band */

/* Most tiles of a list of groups, about: less than MOEI_VARIANT_MAX_TILES by more than the error of
   an fp32 sum. */
#define MOEI_GEMM_MOST_TILES 2.147e9f

/* One tile of C. */
typedef struct moe_tile_position {
    int32_t expert;     /* 0 .. E - 1 */
    int32_t begin, end; /* the group's rows begin .. end - 1 of C; k-grouped: of A and B */
    int32_t row;        /* first row of the tile; less than `begin` only where A is mn-major */
    int32_t column;     /* number of the column tile, 0 ..; k-grouped: first column */
} moe_tile_position;

/* The rows of each group. */
typedef struct moei_groups {
    const int32_t* expert_offset;  /* [E + 1]; null: one expert owns num_rows rows */
    int32_t num_experts, num_rows; /* E; upper bound of the rows */
    const moe_gemm_group* list;    /* [num_groups]; null: group e is expert e's rows */
    int32_t num_groups;            /* without a list E */
} moei_groups;

/* Returns the groups of an m-grouped product. */
MOE_DEVICE moei_groups moei_groups_of(const moe_grouped_gemm_args* d)
{
    moei_groups g;
    g.expert_offset = d->expert_offset;
    g.num_experts = d->num_experts;
    g.num_rows = d->num_rows;
    g.list = d->group;
    g.num_groups = d->group ? d->num_groups : d->num_experts;
    return g;
}

/* Return group i's expert, its first row, and the row after the last. */
MOE_DEVICE int moei_group_expert(const moei_groups* g, int i)
{
    return g->list ? g->list[i].expert : i;
}

MOE_DEVICE int moei_group_begin(const moei_groups* g, int i)
{
    if (g->list) return g->list[i].begin;
    return g->expert_offset ? g->expert_offset[i] : 0;
}

MOE_DEVICE int moei_group_end(const moei_groups* g, int i)
{
    if (g->list) return g->list[i].end;
    return g->expert_offset ? g->expert_offset[i + 1] : g->num_rows;
}

/* Returns true where group i's rows are in order and within num_rows, and its expert exists;
   otherwise raises MOE_FAULT_BAD_OFFSET in the fault word. */
MOE_DEVICE bool moei_group_good(const moei_groups* g, int i, uint64_t* fault, int rank)
{
    const int begin = moei_group_begin(g, i), end = moei_group_end(g, i);
    const int expert = moei_group_expert(g, i);
    if (begin >= 0 && end >= begin && end <= g->num_rows && expert >= 0 && expert < g->num_experts)
        return true;
    moe_fault_raise(fault, MOE_FAULT_BAD_OFFSET, rank, i);
    return false;
}

/* ---- m-grouped ---- */

/* Return the address of an expert's matrix, and of its separate up projection. */
MOE_DEVICE const char* moei_weight_base(const moe_weights* w, int expert)
{
    if (w->table) return (const char*)w->table[expert];
    return (const char*)w->base + (int64_t)expert * w->expert_stride * 2;
}

MOE_DEVICE const char* moei_weight_up(const moe_weights* w, int expert)
{
    if (w->up_table) return (const char*)w->up_table[expert];
    return (const char*)w->up + (int64_t)expert * w->expert_stride * 2;
}

/* Returns true where the tables hold an address, 16-byte aligned, for each expert that has rows;
   sums, a literal: 1: k-grouped, the table of C for each expert. Otherwise raises
   MOE_FAULT_BAD_TABLE in the fault word. All threads of the block call it. */
MOE_DEVICE bool moei_gemm_tables_good(const moe_grouped_gemm_args* d, const moei_groups* g,
                                      const int sums)
{
    bool bad = false;
    if ((sums || (!d->b.table && !d->b.up_table)) && !d->c.table) return true;
    for (int i = (int)threadIdx.x; i < g->num_groups; i += (int)blockDim.x) {
        const int e = moei_group_expert(g, i);
        const uintptr_t b = !sums && d->b.table ? (uintptr_t)d->b.table[e] : 16;
        const uintptr_t up = !sums && d->b.up_table ? (uintptr_t)d->b.up_table[e] : 16;
        const uintptr_t c = d->c.table ? (uintptr_t)d->c.table[e] : 16;
        if ((sums || moei_group_end(g, i) > moei_group_begin(g, i)) &&
            (!b || !up || !c || ((b | up | c) & 15) != 0)) {
            bad = true;
            moe_fault_raise(d->fault, MOE_FAULT_BAD_TABLE, d->rank, e);
        }
    }
    return !__syncthreads_or(bad);
}

/* The order of the m-grouped tiles. */
typedef struct moei_schedule {
    moei_groups groups;
    int32_t column_tiles; /* column tiles of a group */
    int32_t row_align;    /* 8 where A is mn-major: tiles begin at multiples of 8; otherwise 1 */
    int32_t skip_empty;   /* k-grouped: 1: experts without rows have no tiles. Else not read */
    int* tile_start;      /* [num_groups + 1] in shared memory: first tile of each group; the last
                             entry is the number of tiles */
} moei_schedule;

/* Return the pairs of row tiles that share a column, and the row tiles left over, which take two
   columns: of a group with so many half row tiles. A group of three halves alone takes one
   shared pair: half of a block is idle, but the weights are read once. */
MOE_DEVICE int moei_schedule_shared(int halves) { return halves == 3 ? 1 : halves / 4; }

MOE_DEVICE int moei_schedule_unshared(int halves) { return halves == 3 ? 0 : (halves % 4 + 1) / 2; }

/* Returns the tiles of a group with so many rows, or the pairs of tiles that clusters take. */
MOE_DEVICE int moei_schedule_count(int rows, int tile_rows, int column_tiles, const int pairs)
{
    const int halves = (rows + tile_rows / 2 - 1) / (tile_rows / 2);
    if (!pairs) return (rows + tile_rows - 1) / tile_rows * column_tiles;
    return moei_schedule_shared(halves) * column_tiles +
           moei_schedule_unshared(halves) * ((column_tiles + 1) / 2);
}

/* Fills tile_start by a prefix sum over the groups; with `pairs`, a literal, tile_start counts
   pairs of tiles (moei_schedule_count). m: 0, or k-grouped: rows of each expert's C. All threads of
   the block call it; the barrier at the end makes tile_start visible to all. Returns the number of
   tiles, or -1 where a group's rows are out of order or range, which sets the fault word; so does a
   list whose groups overlap so far that their tiles cannot be counted (index: num_groups). */
MOE_DEVICE int moei_schedule_build(const moei_schedule* s, moe_block_scan_scratch* scratch,
                                   uint64_t* fault, int rank, const int tile_rows, const int pairs,
                                   int m)
{
    const moei_groups* g = &s->groups;
    unsigned before = 0; /* modulo 2^32: a list's tiles are checked afterwards */
    int bad = 0;
    float sum = 0; /* about the thread's part of the tiles */
    for (int i0 = 0; i0 < g->num_groups; i0 += (int)blockDim.x) {
        const int i = i0 + (int)threadIdx.x;
        int tiles = 0, total, at;
        if (i < g->num_groups) {
            const int begin = moei_group_begin(g, i), end = moei_group_end(g, i);
            if (!moei_group_good(g, i, fault, rank)) {
                bad = 1;
            } else if ((m && !s->skip_empty) || end > begin) {
                const int first = begin - begin % s->row_align;
                tiles = moei_schedule_count(m ? m : end - first, tile_rows, s->column_tiles, pairs);
            }
        }
        at = moe_block_exclusive_scan(tiles, scratch, &total);
        if (i < g->num_groups) s->tile_start[i] = (int)(before + (unsigned)at);
        before += (unsigned)total;
        sum += (float)tiles;
    }
    if (threadIdx.x == 0) s->tile_start[g->num_groups] = (int)before;
    if (g->list && !(moe_block_sum(sum, scratch) < MOEI_GEMM_MOST_TILES)) {
        bad = 1;
        if (threadIdx.x == 0) moe_fault_raise(fault, MOE_FAULT_BAD_OFFSET, rank, g->num_groups);
    }
    return __syncthreads_or(bad) ? -1 : (int)before;
}

/* Returns the position of tile number `index`. Requires 0 <= index < number of tiles. */
MOE_DEVICE moe_tile_position moei_schedule_tile(const moei_schedule* s, int index,
                                                const int tile_rows)
{
    int lo = 0, hi = s->groups.num_groups; /* tile_start[lo] <= index < tile_start[hi] */
    moe_tile_position t;
    int local, row_tiles, first, band, in_band, height;
    while (hi - lo > 1) {
        const int mid = (lo + hi) >> 1;
        if (s->tile_start[mid] <= index) lo = mid;
        else hi = mid;
    }
    t.expert = moei_group_expert(&s->groups, lo);
    t.begin = moei_group_begin(&s->groups, lo);
    t.end = moei_group_end(&s->groups, lo);
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

/* ---- k-grouped ---- */

/* The order of the k-grouped tiles. */
typedef struct moei_k_schedule {
    moei_groups groups;
    int32_t num_tiles, row_tiles, column_tiles; /* tiles of all experts; along m and n of one */
} moei_k_schedule;

/* Returns the order of the tiles of shape f of each expert's C [m, n]. */
MOE_DEVICE moei_k_schedule moei_k_schedule_of(const moei_groups g, int m, int n,
                                              const moe_gemm_shape f)
{
    moei_k_schedule s;
    s.groups = g;
    s.row_tiles = (m + f.tile_m - 1) / f.tile_m;
    s.column_tiles = (n + f.tile_n - 1) / f.tile_n;
    s.num_tiles = s.row_tiles * s.column_tiles * g.num_experts;
    return s;
}

/* Returns the position of tile number `index`: first row and column in the expert's C, rows
   begin .. end - 1 of A and B. */
MOE_DEVICE moe_tile_position moei_k_schedule_tile(const moei_k_schedule* s, int index,
                                                  const moe_gemm_shape f)
{
    const int each = s->row_tiles * s->column_tiles, local = index % each;
    moe_tile_position t;
    t.expert = index / each;
    t.begin = moei_group_begin(&s->groups, t.expert);
    t.end = moei_group_end(&s->groups, t.expert);
    t.row = local % s->row_tiles * f.tile_m;
    t.column = local / s->row_tiles * f.tile_n;
    return t;
}

#endif
