/* sizes.h: no tokens, many slots, large buffers.

   test_combine_no_tokens      T = 0 needs no buffer
   test_combine_many_choices   K of 2000, and the most there may be
   test_combine_large          sizes of models, on a GPU only
   test_combine_past_2_31      rows, y, residual or shared rows past 2^32 elements */
#ifndef MOE_TESTS_COMBINE_SIZES_H
#define MOE_TESTS_COMBINE_SIZES_H

#include "tests/unit/combine/case.h"

/* T = 0 needs no buffer. */
static void test_combine_no_tokens(void)
{
    trand r = trand_new(5);
    combine_case c = normal_case(0, 64, 4);
    combine_bufs b;
    moe_combine_desc d;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
    memset(&d, 0, sizeof d); /* with no tokens no buffer is needed */
    d.hidden = 64;
    d.top_k = 4;
    CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    bufs_free(&b);
}

/* No K up to MOE_COMBINE_MAX_TOP_K is too large. */
static void test_combine_many_choices(void)
{
    trand r = trand_new(14);
    for (int H = 7; H <= 8; ++H) {
        combine_case c = normal_case(2, H, 2000);
        run_case(&c, &r);
        c.shared = SHARED;
        c.K = MOE_COMBINE_MAX_TOP_K;
        run_case(&c, &r);
    }
}

static void test_combine_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(12);
    for (int i = 0; i < 3; ++i) {
        combine_case c = normal_case(i == 2 ? 20000 : 4096, i == 2 ? 128 : 2048, i == 1 ? 6 : 8);
        c.buffers = 32;
        c.rows = 256;
        c.residual = i;
        c.rows_dtype = i == 1 ? MOE_FP16 : MOE_BF16;
        run_case(&c, &r);
    }
#endif
}

/* Rows, y, residual or shared rows that lie past 2^32 elements: the bits of the same call on dense
   ones, 16 bytes and an element at a time. */
static void test_combine_past_2_31(void)
{
    enum { ROWS, Y, RESIDUALS, SHAREDS };
    static const char* const name[] = {"rows", "y", "residual", "shared"};
    trand r = trand_new(13);
    for (int which = ROWS; which <= SHAREDS; ++which)
        for (int narrow = 0; narrow < 2; ++narrow) {
            combine_case c = normal_case(5, narrow ? 67 : 264, 2);
            combine_bufs b;
            moe_combine_desc d;
            twide wide;
            void* want;
            c.buffers = 0; /* one array: 5 rows */
            c.residual = RESIDUAL;
            c.shared = SHARED_WEIGHTED;
            if (!twide_new(&wide, name[which], 5, c.H, MOE_BF16)) continue;
            bufs_new(&b, &c, &r);
            for (int s = 0; s < c.T * c.K; ++s) { /* every row of the array counts */
                b.h_place[s].buffer = 0;
                b.h_place[s].row = s % c.rows;
                b.h_weights[s] = trand_normal(&r) + 0.25f;
            }
            put_places(&b);
            launch(&b, &c);
            want = tbuf_copy(&b.y);
            tbuf_poison(&b.y);
            d = b.d;
            if (which == ROWS) d.rows = wide.p, d.row_stride = wide.stride;
            if (which == Y) d.y = wide.p, d.y_stride = wide.stride;
            if (which == RESIDUALS) d.residual = wide.p, d.residual_stride = wide.stride;
            if (which == SHAREDS) d.shared = wide.p, d.shared_stride = wide.stride;
            if (which != Y)
                twide_put(&wide, which == ROWS        ? b.row[0]
                                 : which == RESIDUALS ? b.h_residual
                                                      : b.h_shared);
            CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
            if (which == Y) twide_holds(&wide, want);
            else CHECK(tbuf_holds(&b.y, want), "wide %s, narrow %d", name[which], narrow);
            CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
            twide_free(&wide);
            free(want);
            bufs_free(&b);
        }
}

static void combine_sizes(void)
{
    RUN(test_combine_no_tokens);
    RUN(test_combine_many_choices);
    RUN(test_combine_large);
    RUN(test_combine_past_2_31);
}

#endif
