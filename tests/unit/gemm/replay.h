/* replay.h: calls that must give the same bits: runs, graphs, rows far apart.

     test_gemm_same_bits  runs every tile many times: the same bits
     test_gemm_batch      computes some rows of a batch alone: with batch_invariant the same kernel
                          and bits, in other places of other tiles
     test_gemm_graph      launches a captured product again with other offsets, rows and inputs
     test_gemm_past_2_31  puts rows or experts past 2^32 elements, on every tile: the bits of the
                          same call on dense rows */
#ifndef MOE_TESTS_GEMM_REPLAY_H
#define MOE_TESTS_GEMM_REPLAY_H

#include "tests/unit/gemm/run.h"

static void test_gemm_same_bits(void)
{
    static const int rows[] = {40, 0, 70};
    trand r = trand_new(12);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile) {
        gemm_case c = normal_case(3, rows, 72, 136);
        gemm_bufs b;
        c.tile = tile;
        c.activation = tile & 1 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
        c.c_dtype = MOE_FP32;
        if (test_gemm_status(c.dtype, tile) != MOE_OK) continue;
        bufs_new(&b, &c, &r);
        test_same_bits("gemm", call_gemm, &b.d, TBUFS(&b.c.all), MOE_ON_HOST ? 2 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

static void test_gemm_batch(void)
{
    static const int rows[] = {300, 0, 70, 5};
    enum { MOST_ROWS = 375 };
    trand r = trand_new(15);
    for (int i = 0; i < (MOE_ON_HOST ? 6 : 48); ++i) {
        gemm_case c = normal_case(4, rows, i & 1 ? 72 : 264, 8 * (int)trand_int(&r, 1, 30));
        const int every = 1 << trand_int(&r, 1, 5), first = (int)trand_int(&r, 0, 2);
        int32_t offset[5] = {0}, index[MOST_ROWS], from[MOST_ROWS];
        int wrong = 0;
        size_t bytes;
        moe_gemm_plan all, some;
        gemm_bufs b;
        char *want, *got;
        randomise(&c, &r);
        c.b_table = c.c_table = c.c_pad = c.lead = c.slack = c.tile = 0;
        c.gather = 2;
        bufs_new(&b, &c, &r);
        b.d.batch_invariant = 1;
        if (moe_grouped_gemm_plan(&b.d, &all) == MOE_STATUS(MOE_ERR_DEVICE, dtype)) {
            bufs_free(&b);
            continue;
        }
        CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        want = (char*)tbuf_copy(&b.c.all);
        for (int e = 0; e < 4; ++e) {
            offset[e + 1] = offset[e];
            for (int m = b.h_offset[e] + first; m < b.h_offset[e + 1]; m += every)
                from[offset[e + 1]++] = m;
        }
        for (int m = 0; m < MOST_ROWS; ++m) index[m] = m < offset[4] ? b.h_index[from[m]] : -1;
        tbuf_put(&b.offset, offset);
        tbuf_put(&b.index, index);
        tbuf_poison(&b.c.all);
        b.d.num_rows = offset[4];
        b.d.a_rows = b.a_rows;
        CHECK_STATUS(moe_grouped_gemm_plan(&b.d, &some), MOE_OK);
        CHECK(all.path == some.path && all.tile == some.tile, "paths %d %d, tiles %d %d", all.path,
              some.path, all.tile, some.tile);
        CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        got = (char*)tbuf_copy(&b.c.all);
        bytes = (size_t)(c.n * moe_dtype_bytes(c.c_dtype));
        for (int m = 0; m < offset[4]; ++m)
            wrong += memcmp(got + (size_t)m * bytes, want + (size_t)from[m] * bytes, bytes) != 0;
        CHECK(wrong == 0, "%d of %d rows have other bits: %s", wrong, offset[4], case_text(&c));
        TFREE(want, got);
        bufs_free(&b);
    }
}

static void test_gemm_graph(void)
{
    static const int rows[] = {30, 10, 0, 25};
    trand r = trand_new(13);
    CHECK_STATUS(moe_grouped_gemm_preload(), MOE_OK);
    for (int i = 0; i < 2; ++i) { /* on Hopper the largest tile takes the wgmma path */
        gemm_case c = normal_case(4, rows, 72, 72);
        gemm_bufs b;
        tgraph g;
        c.gather = 3;
        c.a_rows = 25;
        c.tile = i ? MOE_TILE_128x256 : MOE_TILE_64x64;
        if (test_gemm_status(c.dtype, c.tile) != MOE_OK) continue;
        bufs_new(&b, &c, &r);
        if (tgraph_capture(&g, call_gemm, &b.d)) {
            CHECK(tgrouped_untouched(&b.c), "capture itself runs nothing");
            for (int run = 0; run < 3; ++run) {
                if (run > 0) trows_share(4, b.num_rows, c.rows, b.h_offset, &r);
                for (int m = 0; m < b.num_rows; ++m) b.h_index[m] = (int32_t)trand_int(&r, 0, 74);
                if (run == 2) b.h_index[b.h_offset[4] - 1] = 75;
                tbuf_put(&b.offset, b.h_offset);
                tbuf_put(&b.index, b.h_index);
                tbuf_poison(&b.c.all);
                tgraph_launch(&g);
                compare(&b, &c);
            }
            tgraph_free(&g);
        }
        bufs_free(&b);
    }
}

/* What lies far apart: rows of A, k-major, gathered or mn-major; experts of B, or each expert's
   gate and up; rows of B, gates and ups of one matrix, rows of mn-major B; rows of C, joined or
   behind a table. */
enum { A_FAR, A_GATHERED, A_ALONG_M, B_EXPERTS, B_UP, B_ROWS, B_HALVES, B_ALONG_N, C_FAR, C_TABLE };

static gemm_case far_case(int what)
{
    static const int some[] = {3, 0, 2, 1, 2}, one[] = {8};
    const int rows_of_b = what == B_ROWS || what == B_HALVES || what == B_ALONG_N;
    gemm_case c = normal_case(rows_of_b ? 1 : 5, rows_of_b ? one : some, 24, 40);
    if (what == A_GATHERED) c.gather = 2, c.a_rows = 5;
    if (what == A_ALONG_M) c.a_major = MOE_MAJOR_MN;
    if (what == B_UP || what == B_HALVES) c.activation = MOE_ACTIVATION_SWIGLU;
    if (what == B_UP) c.gate_up = MOE_GATE_UP_SEPARATE;
    if (what == B_ROWS) c.n = 72; /* more than the rows that a loader takes at once */
    if (what == B_ALONG_N) c.b_major = MOE_MAJOR_MN;
    if (what == C_TABLE) c.c_table = 1;
    return c;
}

/* Makes `wide` for `what` and points d there. Returns what its rows must hold; null: no memory. */
static void* far_new(twide* wide, tbuf* table, moe_grouped_gemm_desc* d, const gemm_bufs* b,
                     const gemm_case* c, int what)
{
    const int64_t matrix = c->n * c->k; /* elements of one of B's */
    const int64_t count = what == A_ALONG_M || what == B_ALONG_N ? c->k
                          : what <= A_GATHERED                   ? b->a_rows
                          : what <= B_UP                         ? c->E
                          : what == B_ROWS                       ? c->n
                          : what == B_HALVES                     ? 2 * c->n
                                                                 : b->num_rows;
    const int64_t cols = what == A_ALONG_M   ? b->a_rows
                         : what == B_EXPERTS ? matrix
                         : what == B_UP      ? 2 * matrix
                         : what >= B_ALONG_N ? c->n
                                             : c->k;
    char* dense;
    if (!twide_new(wide, "the far rows", count, cols, c->dtype)) return 0;
    if (what <= A_ALONG_M) {
        dense = (char*)tbuf_copy(&b->a);
        d->a = wide->p, d->a_stride = wide->stride;
    } else if (what < C_FAR) {
        const char *gate = (const char*)b->b.host[0][0], *up = (const char*)b->b.host[1][0];
        dense = (char*)test_host(count * cols * 2);
        if (!up) memcpy(dense, gate, (size_t)(count * cols * 2));
        for (int e = 0; e < c->E && up; ++e) { /* an expert's gate, then its up */
            memcpy(dense + e * matrix * 4, gate + e * matrix * 2, (size_t)matrix * 2);
            memcpy(dense + e * matrix * 4 + matrix * 2, up + e * matrix * 2, (size_t)matrix * 2);
        }
        d->b.base = wide->p;
        if (up) d->b.up = wide->p + matrix * 2;
        if (what <= B_UP) d->b.expert_stride = wide->stride;
        else d->b.row_stride = wide->stride;
    } else {
        void* address[MOST_EXPERTS];
        dense = (char*)test_host(count * cols * 2);
        d->c_stride = wide->stride;
        if (what == C_FAR) {
            d->c = wide->p;
        } else {
            for (int e = 0; e < c->E; ++e)
                address[e] = wide->p + b->h_offset[e] * wide->stride * wide->elem;
            *table = tbuf_from("c_table", address, (size_t)c->E * sizeof(void*), 0);
            d->c_table = (void* const*)table->p;
        }
    }
    return dense;
}

/* Returns a copy of all rows of a dense C, joined or of each expert. */
static char* all_rows(const gemm_bufs* b, const gemm_case* c)
{
    const int64_t row = c->n * moe_dtype_bytes(c->c_dtype);
    char* rows = (char*)(c->c_table ? test_host(b->num_rows * row) : tbuf_copy(&b->c.all));
    for (int e = 0; e < c->E && c->c_table; ++e)
        tbuf_get(&b->c.part[e], rows + b->h_offset[e] * row);
    return rows;
}

static void test_gemm_past_2_31(void)
{
    trand r = trand_new(16);
    if (!twide_possible(2)) return;
    for (int what = A_FAR; what <= C_TABLE; ++what) {
        const gemm_case c = far_case(what);
        gemm_bufs b;
        moe_grouped_gemm_desc d;
        tbuf table = {};
        twide wide;
        void* dense;
        bufs_new(&b, &c, &r);
        d = b.d;
        dense = far_new(&wide, &table, &d, &b, &c, what);
        for (int tile = MOE_TILE_64x64; tile >= MOE_TILE_128x256 && dense; --tile) {
            char* want;
            if (tile == MOE_TILE_128x256 && (what == A_ALONG_M || what == B_ALONG_N)) continue;
            d.tile = b.d.tile = tile;
            tgrouped_poison(&b.c);
            if (!launch(&b, &c)) continue;
            compare(&b, &c);
            want = all_rows(&b, &c);
            tgrouped_poison(&b.c);
            twide_poison(&wide);
            if (what < C_FAR) twide_put(&wide, dense);
            CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_OK);
            if (what < C_FAR) CHECK(tbuf_holds(&b.c.all, want), "far %d, tile %d", what, tile);
            CHECK(twide_holds(&wide, what < C_FAR ? dense : want), "far %d, tile %d", what, tile);
            CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
            free(want);
        }
        if (dense) twide_free(&wide);
        tbufs_free(TBUFS(&table));
        free(dense);
        bufs_free(&b);
    }
}

static void gemm_replay(void)
{
    RUN(test_gemm_same_bits);
    RUN(test_gemm_batch);
    RUN(test_gemm_graph);
    RUN(test_gemm_past_2_31);
}

#endif
