/* sizes.h: no tokens, many slots, large buffers.

   test_backward_no_tokens      T = 0 needs no buffer
   test_backward_many_choices   K of 2000, and the most there may be
   test_backward_large          sizes of models, on a GPU only
   test_backward_past_2_31      dy, rows, gradients or shared rows past 2^32 elements */
#ifndef MOE_TESTS_COMBINE_BACKWARD_SIZES_H
#define MOE_TESTS_COMBINE_BACKWARD_SIZES_H

#include "tests/unit/combine_backward/case.h"

/* T = 0 needs no buffer. */
static void test_backward_no_tokens(void)
{
    trand r = trand_new(30);
    backward_case c = normal_case(0, 64, 4);
    backward_bufs b;
    moe_combine_backward_desc d;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_combine_backward(&b.d, test_now.stream), MOE_OK);
    memset(&d, 0, sizeof d); /* with no tokens no buffer is needed */
    d.hidden = 64;
    d.top_k = 4;
    CHECK_STATUS(moe_combine_backward(&d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    bufs_free(&b);
}

/* No K up to MOE_COMBINE_MAX_TOP_K is too large. */
static void test_backward_many_choices(void)
{
    trand r = trand_new(31);
    for (int H = 7; H <= 8; ++H) {
        backward_case c = normal_case(2, H, 2000);
        c.outputs = DROWS | DWEIGHTS;
        run_case(&c, &r);
        c = normal_case(2, H, MOE_COMBINE_MAX_TOP_K);
        run_case(&c, &r);
        c.outputs = DROWS | DSHARED;
        run_case(&c, &r);
    }
}

static void test_backward_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(32);
    for (int i = 0; i < 4; ++i) {
        backward_case c = normal_case(i == 2 ? 20000 : 2048, i == 2 ? 128 : 2048, i == 1 ? 6 : 8);
        c.in_place = i == 1;
        c.outputs = i == 3 ? DROWS : ALL_OUTPUTS;
        c.rows_dtype = i == 1 ? MOE_FP16 : MOE_BF16;
        run_case(&c, &r);
    }
#endif
}

/* Inputs or outputs that lie past 2^32 elements: the bits of the same call on dense ones, 16 bytes
   and an element at a time. */
static void test_backward_past_2_31(void)
{
    enum { DY, ROWS, GRADIENTS, SHAREDS, SHARED_GRADIENTS };
    static const char* const name[] = {"dy", "rows", "drows", "shared", "dshared"};
    trand r = trand_new(33);
    for (int which = DY; which <= SHARED_GRADIENTS; ++which)
        for (int narrow = 0; narrow < 2; ++narrow) {
            backward_case c = normal_case(5, narrow ? 67 : 264, 1);
            backward_bufs b;
            moe_combine_backward_desc d;
            twide wide;
            void *drows, *dweights, *dshared, *dshared_weight;
            c.buffers = 0; /* one array, whose 5 rows all count */
            c.rows = 5;
            c.dropped = 0;
            if (!twide_new(&wide, name[which], 5, c.H, MOE_BF16)) continue;
            bufs_new(&b, &c, &r);
            launch(&b, &c);
            drows = tbuf_copy(&b.drow[0]), dweights = tbuf_copy(&b.dweights);
            dshared = tbuf_copy(&b.dshared), dshared_weight = tbuf_copy(&b.dshared_weight);
            put(&b);
            d = b.d;
            if (which == DY) d.dy = wide.p, d.dy_stride = wide.stride;
            if (which == ROWS) d.rows = wide.p, d.row_stride = wide.stride;
            if (which == GRADIENTS) d.drows = wide.p, d.drows_stride = wide.stride;
            if (which == SHAREDS) d.shared = wide.p, d.shared_stride = wide.stride;
            if (which == SHARED_GRADIENTS) d.dshared = wide.p, d.dshared_stride = wide.stride;
            if (which == DY) twide_put(&wide, b.h_dy);
            if (which == ROWS) twide_put(&wide, b.row[0]);
            if (which == SHAREDS) twide_put(&wide, b.h_shared);
            CHECK_STATUS(moe_combine_backward(&d, test_now.stream), MOE_OK);
            if (which == GRADIENTS) twide_holds(&wide, drows);
            else CHECK(tbuf_holds(&b.drow[0], drows), "drows, wide %s", name[which]);
            if (which == SHARED_GRADIENTS) twide_holds(&wide, dshared);
            else CHECK(tbuf_holds(&b.dshared, dshared), "dshared, wide %s", name[which]);
            CHECK(tbuf_holds(&b.dweights, dweights), "dweights, wide %s", name[which]);
            CHECK(tbuf_holds(&b.dshared_weight, dshared_weight), "dshared_weight, wide %s",
                  name[which]);
            CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
            twide_free(&wide);
            free(drows), free(dweights), free(dshared), free(dshared_weight);
            bufs_free(&b);
        }
}

static void combine_backward_sizes(void)
{
    RUN(test_backward_no_tokens);
    RUN(test_backward_many_choices);
    RUN(test_backward_large);
    RUN(test_backward_past_2_31);
}

#endif
