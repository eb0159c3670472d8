/* large.h: many rows, and rows past 2^32 elements

   test_scatter_large      many rows on few tokens, in groups of columns
   test_scatter_past_2_31  rows and y past 2^32 elements */
#ifndef MOE_TESTS_COMBINE_SCATTER_LARGE_H
#define MOE_TESTS_COMBINE_SCATTER_LARGE_H

#include "tests/unit/combine_scatter/case.h"

/* Many rows on few tokens, wide and in groups of columns, so that additions meet. */
static void test_scatter_large(void)
{
    trand r = trand_new(14);
    for (int i = 0; i < 3; ++i) {
        scatter_case c =
            normal_case(MOE_ON_HOST ? 9 : 200, 2056, MOE_ON_HOST ? 4 : 40, MOE_ON_HOST ? 10 : 60);
        c.rows_dtype = MOE_FP16;
        c.y_dtype = MOE_FP32 + i;
        c.table = 1;
        run_case(&c, &r);
    }
}

/* Rows and y past 2^32 elements. */
static void test_scatter_past_2_31(void)
{
    trand r = trand_new(15);
    if (!twide_possible(2)) return;
    for (int which = 0; which < 2; ++which) {
        scatter_case c = normal_case(5, 64, 3, 6);
        scatter_bufs b;
        moe_combine_scatter_desc d;
        twide wide;
        void* want;
        c.whole = 1;
        do bufs_new(&b, &c, &r);
        while (b.R < 3 && (bufs_free(&b), 1));
        if (!twide_new(&wide, which ? "y" : "rows", which ? c.T : b.R, c.H, MOE_BF16)) {
            bufs_free(&b);
            continue;
        }
        CHECK_STATUS(moe_combine_scatter(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c, -1);
        want = tbuf_copy(&b.y);
        d = b.d;
        if (which) {
            d.y = wide.p;
            d.y_stride = wide.stride;
            twide_put(&wide, b.h_y);
        } else {
            d.rows = wide.p;
            d.row_stride = wide.stride;
            twide_put(&wide, b.row[0]);
            tbuf_put(&b.y, b.h_y);
        }
        CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
        if (which) twide_holds(&wide, want);
        else CHECK(tbuf_holds(&b.y, want), "wide rows");
        twide_free(&wide);
        free(want);
        bufs_free(&b);
    }
}

static void combine_scatter_large(void)
{
    RUN(test_scatter_large);
    RUN(test_scatter_past_2_31);
}

#endif
