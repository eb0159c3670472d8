/* schedule.h: the schedule of the grouped GEMM by itself: which tiles there are, in which order.

     test_gemm_schedule      walks every tile of every expert once, in order: experts one after
                             another, bands of row tiles in one, all columns in a band, rows fastest
     test_gemm_pairs         the same for the pairs of tiles of the wgmma path
     test_gemm_schedule_bad  makes no tiles of bad offsets, and records the first bad expert */
#ifndef MOE_TESTS_GEMM_SCHEDULE_H
#define MOE_TESTS_GEMM_SCHEDULE_H

#include "tests/test.h"

#include "moe/gemm/grouped.cuh"
#include "tests/test_case.h"

typedef struct schedule_args {
    const int32_t* expert_offset;
    int32_t num_experts, num_rows, column_tiles, row_align, tile_rows, most;
    int32_t* num_tiles;       /* [1] */
    moe_tile_position* tiles; /* [most] */
    uint64_t* fault;
} schedule_args;

MOE_DEVICE moei_schedule schedule_of(const schedule_args* d, unsigned char* shared)
{
    moei_schedule s;
    s.groups.expert_offset = d->expert_offset;
    s.groups.num_experts = d->num_experts;
    s.groups.num_rows = d->num_rows;
    s.groups.list = 0;
    s.groups.num_groups = d->num_experts;
    s.column_tiles = d->column_tiles;
    s.row_align = d->row_align;
    s.tile_start = (int*)shared;
    return s;
}

MOE_KERNEL(128, 1) schedule_kernel(MOE_ARG(schedule_args) d)
{
    MOE_SHARED(moe_block_scan_scratch, scratch);
    MOE_SHARED_DYNAMIC(shared);
    const moei_schedule s = schedule_of(&d, shared);
    const int count = moei_schedule_build(&s, &scratch, d.fault, TEST_RANK, d.tile_rows, 0, 0);
    if (threadIdx.x == 0) *d.num_tiles = count;
    for (int i = (int)threadIdx.x; i < count && i < d.most; i += (int)blockDim.x)
        d.tiles[i] = moei_schedule_tile(&s, i, d.tile_rows);
}

/* Runs the schedule for these offsets, of which expert `bad` is wrong; -1: none. Returns the number
   of tiles, and the tiles in *tiles. */
static int run_schedule(const int32_t* offset, int E, int rows, int columns, int align,
                        int tile_rows, int bad, moe_tile_position** tiles)
{
    const int most = (rows / tile_rows + 2 * E + 1) * columns;
    int32_t count;
    schedule_args a = {};
    moe_launch_config c = moe_grid(1, 128, ((size_t)E + 1) * 4, test_now.stream);
    tbuf bo = {}, bn = tbuf_new("num_tiles", 4, 0), bf = tfault_new(0);
    tbuf bt = tbuf_new("tiles", (size_t)most * sizeof(moe_tile_position), 0);
    if (offset) bo = tbuf_from("offset", offset, (size_t)E * 4 + 4, 4);
    a.expert_offset = (const int32_t*)bo.p;
    a.num_experts = E, a.num_rows = rows;
    a.column_tiles = columns, a.row_align = align, a.tile_rows = tile_rows, a.most = most;
    a.num_tiles = (int32_t*)bn.p;
    a.tiles = (moe_tile_position*)bt.p;
    a.fault = (uint64_t*)bf.p;
    CHECK_STATUS(MOE_LAUNCH(schedule_kernel, c, a), MOE_OK);
    tbuf_get(&bn, &count);
    CHECK(count <= most, "%d tiles of %d", count, most);
    CHECK_FAULT_AT(&bf, MOE_FAULT_BAD_OFFSET, bad);
    *tiles = (moe_tile_position*)tbuf_copy(&bt);
    if (bad >= 0) CHECK(tbuf_holds(&bt, 0), "tiles of bad offsets");
    tbufs_free(TBUFS(&bo, &bn, &bt, &bf));
    return count;
}

/* Requires every tile of every expert exactly once, in the order of the walk. */
static void check_schedule(const int32_t* offset, int E, int rows, int columns, int align,
                           int tile_rows)
{
    moe_tile_position* tiles;
    const int count = run_schedule(offset, E, rows, columns, align, tile_rows, -1, &tiles);
    int at = 0, wrong = 0;
    for (int e = 0; e < E; ++e) {
        const int begin = offset ? offset[e] : 0, end = offset ? offset[e + 1] : rows;
        const int first = begin / align * align;
        if (begin == end) continue;
        for (int band = first; band < end; band += MOEI_GEMM_BAND * tile_rows)
            for (int column = 0; column < columns; ++column)
                for (int i = 0; i < MOEI_GEMM_BAND && band + i * tile_rows < end; ++i, ++at) {
                    const moe_tile_position t = tiles[at < count ? at : 0];
                    wrong += at >= count || t.expert != e || t.begin != begin || t.end != end ||
                             t.row != band + i * tile_rows || t.column != column;
                }
    }
    CHECK(wrong == 0 && at == count, "E=%d columns=%d align=%d tile=%d: %d wrong, %d tiles, not %d",
          E, columns, align, tile_rows, wrong, count, at);
    free(tiles);
}

static void test_gemm_schedule(void)
{
    enum { MOST = 300 };
    static const int Es[] = {1, 2, 7, 64, 127, 129, MOST}, columns[] = {1, 3, 17};
    static const int sizes[] = {0,   0,   0,   1,   1,   7,   63,   64,  65,
                                127, 128, 129, 511, 512, 513, 2049, 4500};
    static const int tile_rows[] = {32, 64, 128}, num_sizes = sizeof sizes / sizeof *sizes;
    trand r = trand_new(1);
    for (size_t i = 0; i < sizeof Es / sizeof *Es; ++i)
        for (size_t j = 0; j < sizeof columns / sizeof *columns; ++j)
            for (size_t k = 0; k < sizeof tile_rows / sizeof *tile_rows; ++k)
                for (int align = 1; align <= 8; align += 7) {
                    const int E = Es[i];
                    int32_t offset[MOST + 1];
                    offset[0] = trand_int(&r, 0, 1) ? 0 : (int32_t)trand_int(&r, 1, 90);
                    for (int e = 0; e < E; ++e)
                        offset[e + 1] =
                            offset[e] + sizes[trand_int(&r, 0, num_sizes - (E > 20 ? 3 : 1))];
                    check_schedule(offset, E, offset[E] + (int)trand_int(&r, 0, 3), columns[j],
                                   align, tile_rows[k]);
                }
    check_schedule(0, 1, 1000, 5, 1, 64); /* no offsets: all rows are the one expert's */
    check_schedule(0, 1, 1, 1, 8, 128);
    check_schedule(0, 1, 0, 3, 1, 64);
    {
        static const int32_t nothing[] = {0, 0, 0, 0}, all[] = {0, 0, 999, 999};
        check_schedule(nothing, 3, 50, 4, 1, 64);
        check_schedule(all, 3, 999, 4, 8, 32);
    }
}

typedef struct pairs_args {
    schedule_args s;        /* tiles: not used */
    moei_wgmma_tile* tiles; /* [s.most, 2] */
} pairs_args;

/* *num_tiles: the number of pairs; -2: no code of sm_90a. */
MOE_KERNEL(128, 1) pairs_kernel(MOE_ARG(pairs_args) d)
{
    MOE_SHARED(moe_block_scan_scratch, scratch);
    MOE_SHARED_DYNAMIC(shared);
    const moei_schedule s = schedule_of(&d.s, shared);
    int count = moei_schedule_build(&s, &scratch, d.s.fault, TEST_RANK, d.s.tile_rows, 1, 0);
#if MOEI_WGMMA_HERE
    for (int i = moe_warp(); i < count && i < d.s.most; i += (int)blockDim.x / 32)
        for (int rank = 0; rank < 2; ++rank) {
            const moei_wgmma_tile t = moei_wgmma_tile_of(&s, i, rank, 3, 0);
            if (moe_lane() == 0) d.tiles[i * 2 + rank] = t;
        }
#else
    count = -2;
#endif
    if (threadIdx.x == 0) *d.s.num_tiles = count;
}

static void check_pairs(const int32_t* offset, int E, int columns)
{
    const int most = (offset[E] / MOEI_WGMMA_ROWS + 2 * E + 1) * (columns + 1);
    int32_t count;
    int wrong = 0, at = 0;
    pairs_args a = {};
    moei_wgmma_tile* tiles;
    moe_launch_config c = moe_grid(1, 128, ((size_t)E + 1) * 4, test_now.stream);
    tbuf bo = tbuf_from("offset", offset, (size_t)E * 4 + 4, 4), bf = tfault_new(0);
    tbuf bn = tbuf_new("num_pairs", 4, 0);
    tbuf bt = tbuf_new("tiles", (size_t)most * 2 * sizeof(moei_wgmma_tile), 0);
    a.s.expert_offset = (const int32_t*)bo.p;
    a.s.num_experts = E, a.s.num_rows = offset[E], a.s.column_tiles = columns, a.s.most = most;
    a.s.row_align = 1, a.s.tile_rows = MOEI_WGMMA_ROWS;
    a.s.num_tiles = (int32_t*)bn.p;
    a.s.fault = (uint64_t*)bf.p;
    a.tiles = (moei_wgmma_tile*)bt.p;
    CHECK_STATUS(MOE_LAUNCH(pairs_kernel, c, a), MOE_OK);
    tbuf_get(&bn, &count);
    tiles = (moei_wgmma_tile*)tbuf_copy(&bt);
    if (count == -2) test_leave_out("no code of sm_90a");
    for (int e = 0; e < E && count >= 0; ++e) { /* walks the order */
        const int begin = offset[e], end = offset[e + 1];
        const int full = MOEI_WGMMA_ROWS, left = (end - begin) % (2 * full);
        /* a pair of row tiles with more than a half and a tile; a first pair with more than a tile */
        const int shared = (end - begin) / (2 * full) +
                           (left > full + full / 2 || (left > full && end - begin < 2 * full));
        const int unshared = (end - begin - shared * 2 * full + full - 1) / full;
        const int bands = (shared + MOEI_WGMMA_BAND - 1) / MOEI_WGMMA_BAND;
        const int each = bands ? (shared + bands - 1) / bands : 0;
        for (int band = 0; band < (bands ? bands : unshared > 0); ++band)
            for (int first = 0; first < columns; first += 2) {
                const int two = first + 1 < columns ? 2 : 1;
                const int top = band * each;
                const int bottom = top + each < shared ? top + each : shared;
                for (int i = 0; i < two * (bottom - top); ++i, ++at) {
                    const moei_wgmma_tile* t = tiles + 2 * (at < count ? at : 0);
                    const int row = begin + (top + i % (bottom - top)) * 2 * MOEI_WGMMA_ROWS;
                    const int column = first + i / (bottom - top);
                    for (int rank = 0; rank < 2; ++rank)
                        wrong += at >= count || t[rank].expert != e || t[rank].begin != begin ||
                                 t[rank].end != end || t[rank].column != column ||
                                 t[rank].row != row + rank * MOEI_WGMMA_ROWS || !t[rank].shared;
                }
                for (int i = 0; i < unshared && band + 1 >= bands; ++i, ++at) {
                    const moei_wgmma_tile* t = tiles + 2 * (at < count ? at : 0);
                    const int row = begin + (2 * shared + i) * MOEI_WGMMA_ROWS;
                    for (int rank = 0; rank < 2; ++rank)
                        wrong += at >= count || t[rank].expert != e || t[rank].begin != begin ||
                                 t[rank].end != end || t[rank].column != first + rank ||
                                 t[rank].row != (rank < two ? row : end) || t[rank].shared;
                }
            }
    }
    CHECK(wrong == 0 && (at == count || count < 0), "E=%d columns=%d: %d wrong, %d pairs, not %d",
          E, columns, wrong, count, at);
    CHECK_FAULT_AT(&bf, MOE_FAULT_BAD_OFFSET, -1);
    free(tiles);
    tbufs_free(TBUFS(&bo, &bn, &bt, &bf));
}

static void test_gemm_pairs(void)
{
    enum { MOST = 1100 };
    static const int Es[] = {1, 2, 31, 33, 128, 1024, MOST}, columns[] = {1, 2, 3, 12, 17};
    static const int sizes[] = {0,   0,   1,   64,  65,  127,  128,  129,  192,  193,  256,
                                257, 384, 385, 448, 449, 3072, 6145, 6272, 6300, 6350, 9000};
    trand r = trand_new(2);
    for (size_t i = 0; i < sizeof Es / sizeof *Es; ++i)
        for (size_t j = 0; j < sizeof columns / sizeof *columns; ++j) {
            const int E = Es[i];
            int32_t offset[MOST + 1];
            offset[0] = (int32_t)trand_int(&r, 0, 90);
            for (int e = 0; e < E; ++e)
                offset[e + 1] = offset[e] + sizes[trand_int(&r, 0, E > 40 ? 10 : 21)];
            check_pairs(offset, E, columns[j]);
        }
}

static void test_gemm_schedule_bad(void)
{
    enum { E = 200 };
    static const int where[] = {0, 1, 60, 127, 128, 150, E - 1};
    int32_t offset[E + 1];
    moe_tile_position* tiles;
    for (size_t i = 0; i < sizeof where / sizeof *where; ++i)
        for (int how = 0; how < 3; ++how) {
            const int at = where[i]; /* the expert that is wrong */
            int first = at;
            for (int e = 0; e <= E; ++e) offset[e] = 3 * e + 5;
            if (how == 0) offset[at + 1] = offset[at] - 1;
            if (how == 1) {
                offset[at] = -1 - at;
                if (at > 0) first = at - 1; /* it ends there */
            }
            if (how == 2) offset[at + 1] = 3 * E + 6;
            CHECK(run_schedule(offset, E, 3 * E + 5, 2, 1, 64, first, &tiles) == -1, "how=%d", how);
            free(tiles);
        }
    for (int e = 0; e <= E; ++e) offset[e] = 3 * e + 5;
    offset[E] = INT32_MAX;
    CHECK(run_schedule(offset, E, 3 * E + 5, 2, 8, 64, E - 1, &tiles) == -1, "far past the rows");
    free(tiles);
}

static void gemm_schedule(void)
{
    RUN(test_gemm_schedule);
    RUN(test_gemm_pairs);
    RUN(test_gemm_schedule_bad);
}

#endif
