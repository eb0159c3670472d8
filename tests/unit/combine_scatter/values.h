/* values.h: y against the naive sum

   test_scatter_dtypes   all pairs of dtypes, table or not, tokens and slots
   test_scatter_narrow   odd H, strides and addresses
   test_scatter_shapes   drawn shapes
   test_scatter_loops    more rows than thread blocks
   test_scatter_nothing  no tokens, no rows */
#ifndef MOE_TESTS_COMBINE_SCATTER_VALUES_H
#define MOE_TESTS_COMBINE_SCATTER_VALUES_H

#include "tests/unit/combine_scatter/case.h"

/* All pairs of dtypes, joined rows and a table, tokens and slots, the three ways to say which rows
   an expert has; whole numbers, whose sums are exact, and others. */
static void test_scatter_dtypes(void)
{
    trand r = trand_new(1);
    for (int from = MOE_FP32; from <= MOE_BF16; ++from)
        for (int to = MOE_FP32; to <= MOE_BF16; ++to)
            for (int i = 0; i < 12; ++i) {
                scatter_case c = normal_case(i % 3 ? 21 : 6, i & 1 ? 136 : 64, 9, 12);
                c.rows_dtype = from;
                c.y_dtype = to;
                c.table = i & 1;
                c.slots = i >> 1 & 1;
                c.by = i % 3;
                c.unused = i & 4 ? 20 : 0;
                c.whole = i & 1;
                run_case(&c, &r);
            }
}

/* Odd H, strides and addresses: what cannot move 16 bytes, or 4, at a time. */
static void test_scatter_narrow(void)
{
    trand r = trand_new(2);
    for (int i = 0; i < 10; ++i)
        for (int pair = 0; pair < 9; ++pair) {
            scatter_case c = normal_case(11, 72, 5, 9);
            c.rows_dtype = MOE_FP32 + pair % 3;
            c.y_dtype = MOE_FP32 + pair / 3;
            c.table = i & 1;
            if (i == 0) c.H = 71;
            if (i == 1) c.H = 1;
            if (i == 2) c.H = 77, c.row_pad = 3, c.y_pad = 3;
            if (i == 3) c.row_pad = 1;
            if (i == 4) c.y_pad = 1;
            if (i == 5) c.row_at = 1;
            if (i == 6) c.y_at = 1;
            if (i == 7) c.y_at = 2, c.row_at = 3;
            if (i == 8) c.H = 70, c.row_pad = 2, c.y_pad = 10;
            if (i == 9) c.H = 4;
            c.whole = pair & 1;
            run_case(&c, &r);
        }
}

static void test_scatter_shapes(void)
{
    static const int Ts[] = {1, 2, 33, 130}, Es[] = {1, 3, 32, 40}, Hs[] = {8, 65, 256, 520, 1288};
    trand r = trand_new(3);
    for (int i = 0; i < (MOE_ON_HOST ? 60 : 400); ++i) {
        scatter_case c = normal_case(Ts[trand_int(&r, 0, 3)], Hs[trand_int(&r, 0, 4)],
                                     Es[trand_int(&r, 0, 3)], (int)trand_int(&r, 0, 30));
        if (trand_int(&r, 0, 5) == 0) c.rows = -1;
        c.K = (int)trand_int(&r, 1, 9);
        c.rows_dtype = (int)trand_int(&r, MOE_FP32, MOE_BF16);
        c.y_dtype = (int)trand_int(&r, MOE_FP32, MOE_BF16);
        c.table = (int)trand_int(&r, 0, 1);
        c.by = (int)trand_int(&r, 0, 2);
        c.slots = (int)trand_int(&r, 0, 1);
        c.row_pad = trand_int(&r, 0, 2) ? 0 : (int)trand_int(&r, 1, 17);
        c.y_pad = trand_int(&r, 0, 2) ? 0 : (int)trand_int(&r, 1, 17);
        c.unweighted = trand_int(&r, 0, 3) == 0;
        c.unused = (int)trand_int(&r, 0, 2) * 15;
        c.bad = trand_int(&r, 0, 3) ? 0 : 10;
        c.max_rows = (int)trand_int(&r, 0, 2) * 20; /* also less than there are, and more */
        c.bare = trand_int(&r, 0, 3) == 0;
        c.whole = c.T > 2 && (int)trand_int(&r, 0, 1);
        run_case(&c, &r);
    }
}

/* More rows than the grid has blocks for, so that blocks loop. */
static void test_scatter_loops(void)
{
    trand r = trand_new(4);
    for (int i = 0; i < 2; ++i) {
        scatter_case c = normal_case(50, 40, 2, 600);
        scatter_bufs b;
        c.y_dtype = MOE_FP32;
        c.max_rows = i ? 1 : 40;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_combine_scatter(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c, -1);
        bufs_free(&b);
    }
}

static void test_scatter_nothing(void)
{
    trand r = trand_new(5);
    scatter_case c = normal_case(5, 16, 3, 4);
    scatter_bufs b;
    moe_combine_scatter_desc d;
    memset(&d, 0, sizeof d);
    d.hidden = 64;
    d.num_experts = 8;
    CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
    d.num_rows = 4;
    CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
    d.num_tokens = 4;
    d.num_rows = 0;
    CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
    bufs_new(&b, &c, &r); /* experts of which none has a row: no address is looked at */
    memset(b.h_offset, 0, sizeof b.h_offset);
    memset(b.h_count, 0, sizeof b.h_count);
    tbuf_put(&b.offset, b.h_offset);
    CHECK_STATUS(moe_combine_scatter(&b.d, test_now.stream), MOE_OK);
    compare(&b, &c, -1);
    bufs_free(&b);
}

static void combine_scatter_values(void)
{
    RUN(test_scatter_dtypes);
    RUN(test_scatter_narrow);
    RUN(test_scatter_shapes);
    RUN(test_scatter_loops);
    RUN(test_scatter_nothing);
}

#endif
