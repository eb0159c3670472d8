/* order.cuh: the order of tiles of the Hopper grouped GEMM: which tiles the two blocks of a cluster
   compute next. Called by the producers (produce.cuh).

   A cluster takes a pair of tiles at a time, one for each block:
     shared     two neighbouring row tiles of one column tile. Each block loads one half of B for
                both
     unshared   one row tile and two neighbouring column tiles: the one or two row tiles that a
                group has left over; the second column may be past the last, its block then has
                no rows

   Pairs are numbered group after group (schedule.cuh). A group's row tiles are cut into bands of at
   most 2 * MOEI_WGMMA_BAND row tiles, as even as whole pairs allow. A band takes two columns at a
   time: all row tiles of the first column, then of the second, then in the last band the unshared
   pairs of both. So pairs that run at one time have few rows and few columns, which stay in L2. */
#ifndef MOE_GEMM_WGMMA_ORDER_CUH
#define MOE_GEMM_WGMMA_ORDER_CUH

#include "../schedule.cuh"
#include "ptx.cuh"

#define MOEI_WGMMA_ROWS 128 /* of a tile */
#define MOEI_WGMMA_BAND 12  /* most pairs of row tiles in a band */

/* Where a tile's operands lie: distances of depth 0 of row 0 from the base of the tensor maps. */
typedef struct moei_wgmma_matrices {
    uint64_t a;
    uint64_t b[2]; /* the expert's, of both halves of a stage; gated: its gates and its ups */
} moei_wgmma_matrices;

/* A block's tile. */
typedef struct moei_wgmma_tile {
    moei_wgmma_matrices from; /* filled in by produce.cuh, like first */
    int32_t expert;     /* 0 .. E - 1; -1: the cluster has no more tiles */
    int32_t begin, end; /* the group's rows of C; k-grouped: 0, m */
    int32_t row;        /* first row of the tile; end where the tile has no rows */
    int32_t column;     /* number of the column tile */
    int32_t first;      /* its first column */
    int32_t shared;     /* 1: the other block has the same column */
    int32_t steps;      /* stages of the sum, 1 or more */
    int32_t origin;     /* k-grouped: the expert's first row of A and B, depth 0; otherwise 0 */
    int32_t depth;      /* first depth of the first stage, 0; k-grouped: so that the last stage ends
                           with the expert's rows. Depths below 0 are zeros */
} moei_wgmma_tile;

#if MOEI_WGMMA_HERE

/* Returns the position of the tile of block `cluster_rank`, of pair number `index`. steps: of each
   tile; m: 0, or k-grouped: rows of each expert's C, and steps is not read. Requires 0 <= index <
   number of pairs. The whole warp calls it. */
MOE_DEVICE moei_wgmma_tile moei_wgmma_tile_of(const moei_schedule* s, int index, int cluster_rank,
                                              int steps, int m)
{
    int lo = 0, hi = s->groups.num_groups; /* tile_start[lo] <= index < tile_start[hi] */
    moei_wgmma_tile t;
    int local, halves, bands, height, last, row, columns, first_column;
    while (hi - lo > 1) { /* 32 entries at a time, `apart` entries apart */
        const int apart = (hi - lo + 31) / 32, at = lo + moe_lane() * apart;
        const bool before = at < hi && s->tile_start[at] <= index;
        lo += (31 - __clz((int)__ballot_sync(MOE_FULL_WARP, before))) * apart;
        hi = lo + apart < hi ? lo + apart : hi;
    }
    t.expert = moei_group_expert(&s->groups, lo);
    t.begin = moei_group_begin(&s->groups, lo);
    t.end = moei_group_end(&s->groups, lo);
    t.steps = steps;
    t.origin = t.depth = t.first = 0;
    if (m) {
        const int rows = t.end - t.begin;
        t.steps = rows > 0 ? (rows + 63) / 64 : 1;
        t.origin = t.begin;
        t.depth = rows - t.steps * 64;
        t.begin = 0, t.end = m;
    }
    t.row = t.begin;
    local = index - s->tile_start[lo]; /* of the group; then of the band; then of two columns */
    halves = (t.end - t.begin + MOEI_WGMMA_ROWS / 2 - 1) / (MOEI_WGMMA_ROWS / 2);
    height = moei_schedule_shared(halves);
    last = moei_schedule_unshared(halves);
    bands = (height + MOEI_WGMMA_BAND - 1) / MOEI_WGMMA_BAND;
    row = t.begin + height * 2 * MOEI_WGMMA_ROWS; /* of the first unshared pair */
    if (bands > 1) {
        const int each = (height + bands - 1) / bands;
        int band = local / (each * s->column_tiles);
        band = band < bands ? band : bands - 1; /* the unshared pairs follow the last band's */
        local -= band * each * s->column_tiles;
        t.row += band * each * 2 * MOEI_WGMMA_ROWS;
        height = band < bands - 1 ? each : height - band * each;
        last = band < bands - 1 ? 0 : last;
    }
    first_column = local / (2 * height + last) * 2;
    local -= first_column / 2 * (2 * height + last);
    columns = s->column_tiles - first_column < 2 ? 1 : 2;
    t.shared = local < columns * height;
    if (t.shared) {
        const int second = local >= height;
        t.column = first_column + second;
        t.row += (2 * (local - second * height) + cluster_rank) * MOEI_WGMMA_ROWS;
    } else {
        t.column = first_column + cluster_rank;
        t.row = cluster_rank < columns ? row + (local - columns * height) * MOEI_WGMMA_ROWS : t.end;
    }
    return t;
}

/* Returns the rows of a tile that exist, 0 .. MOEI_WGMMA_ROWS. */
MOE_DEVICE int moei_wgmma_rows(const moei_wgmma_tile* t)
{
    return t->end - t->row < MOEI_WGMMA_ROWS ? t->end - t->row : MOEI_WGMMA_ROWS;
}

#endif
#endif
