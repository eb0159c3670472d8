/* values.h: y against the reference.

   test_combine_shapes          H, K and T of lists, the other fields drawn
   test_combine_dtypes          all pairs of dtypes, table or not, every kind of residual
   test_combine_alignment       each address and stride misaligned alone
   test_combine_shared          a shared row, weighted or not; the bits of one more row
   test_combine_nothing_to_add  all slots dropped, or all bad
   test_combine_by_hand         sums of small whole numbers, written down
   test_combine_one_array       one buffer without a table */
#ifndef MOE_TESTS_COMBINE_VALUES_H
#define MOE_TESTS_COMBINE_VALUES_H

#include "tests/unit/combine/case.h"

/* Every H with every K; the other fields are drawn. */
static void test_combine_shapes(void)
{
    static const int Hs[] = {1,   3,   4,   7,    8,    16,   31,   100,
                             128, 250, 256, 1000, 1024, 2048, 2056, 4104};
    static const int Ks[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 70};
    static const int Ts[] = {1, 2, 3, 31, 32, 33};
    trand r = trand_new(1);
    for (size_t i = 0; i < sizeof Hs / sizeof *Hs; ++i)
        for (size_t j = 0; j < sizeof Ks / sizeof *Ks; ++j)
            for (int n = 0; n < (MOE_ON_HOST ? 2 : 6); ++n) {
                const int T = Ts[trand_int(&r, 0, MOE_ON_HOST && Hs[i] > 500 ? 2 : 5)];
                const combine_case c = random_case(&r, T, Hs[i], Ks[j]);
                run_case(&c, &r);
            }
}

/* All pairs of dtypes, with table and without, with every kind of residual, aligned and not. */
static void test_combine_dtypes(void)
{
    trand r = trand_new(2);
    for (int rows = MOE_FP32; rows <= MOE_BF16; ++rows)
        for (int y = MOE_FP32; y <= MOE_BF16; ++y)
            for (int residual = NO_RESIDUAL; residual <= IN_PLACE; ++residual)
                for (int buffers = 0; buffers < 2; ++buffers)
                    for (int at = 0; at < 2; ++at)
                        for (int odd = 0; odd < 2; ++odd) {
                            combine_case c = normal_case(9, odd ? 253 : 256, 8);
                            c.rows_dtype = rows;
                            c.y_dtype = y;
                            c.residual = residual;
                            c.buffers = buffers ? 5 : 0;
                            c.rows = buffers ? 4 : 20;
                            c.row_at = at;
                            run_case(&c, &r);
                        }
}

/* Each address misaligned alone, by every remainder; strides too. */
static void test_combine_alignment(void)
{
    trand r = trand_new(3);
    for (int which = 0; which < 8; ++which)
        for (int by = 1; by <= 8; ++by)
            for (int dtypes = 0; dtypes < 4; ++dtypes) {
                combine_case c = normal_case(4, 64, 3);
                c.rows_dtype = dtypes & 1 ? MOE_FP32 : MOE_FP16;
                c.y_dtype = dtypes & 2 ? MOE_FP32 : MOE_FP16;
                c.residual = RESIDUAL;
                if (which == 0) c.row_at = by;
                if (which == 1) c.y_at = by;
                if (which == 2) c.residual_at = by;
                if (which == 3) c.row_pad = by;
                if (which == 4) c.y_pad = by;
                if (which == 5) c.residual_pad = by;
                if (which >= 6) c.shared = SHARED_WEIGHTED;
                if (which == 6) c.shared_at = by;
                if (which == 7) c.shared_pad = by;
                run_case(&c, &r);
            }
}

/* A shared row is one more row, the last one: the same bits as a token with a slot more. */
static void shared_as_slot(trand* r)
{
    enum { T = 6, H = 64, K = 3 };
    combine_case c = normal_case(T, H, K);
    combine_bufs b;
    moe_combine_desc d;
    float weights[T * (K + 1)];
    moe_place place[T * (K + 1)];
    tbuf bp, bw, bs, bt;
    void *want, *address[MOST_BUFFERS + 1];
    c.dropped = 0;
    c.shared = SHARED_WEIGHTED;
    bufs_new(&b, &c, r);
    launch(&b, &c);
    want = tbuf_copy(&b.y);
    for (int t = 0; t < T; ++t)
        for (int k = 0; k <= K; ++k) {
            const moe_place last = {b.count, t};
            place[t * (K + 1) + k] = k < K ? b.h_place[t * K + k] : last;
            weights[t * (K + 1) + k] = k < K ? b.h_weights[t * K + k] : b.h_shared_weight[t];
        }
    bs = tbuf_from("shared", b.h_shared, T * H * 2, 0);
    bp = tbuf_from("place", place, sizeof place, 0);
    bw = tbuf_from("weights", weights, sizeof weights, 0);
    for (int i = 0; i < b.count; ++i) address[i] = b.buffer[i].p;
    address[b.count] = bs.p;
    bt = tbuf_from("table", address, (size_t)(b.count + 1) * sizeof(void*), 0);
    d = b.d;
    d.shared = 0;
    d.shared_weight = 0;
    d.place = (const moe_place*)bp.p;
    d.weights = (const float*)bw.p;
    d.table = (const void* const*)bt.p;
    d.num_buffers = b.count + 1;
    d.num_rows = 0;
    d.top_k = K + 1;
    tbuf_poison(&b.y);
    CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b.y, want), "other bits than as a row of the table");
    tbufs_free(TBUFS(&bs, &bp, &bw, &bt));
    free(want);
    bufs_free(&b);
}

/* A shared row, weighted or not, with few and many rows, live, dropped and bad ones. */
static void test_combine_shared(void)
{
    static const int Ks[] = {1, 2, 3, 4, 7, 8, 9, 31, 32, 33};
    trand r = trand_new(15);
    for (size_t i = 0; i < sizeof Ks / sizeof *Ks; ++i)
        for (int shared = SHARED; shared <= SHARED_WEIGHTED; ++shared)
            for (int how = 0; how < 6; ++how) {
                combine_case c = normal_case(7, how & 1 ? 200 : 51, Ks[i]);
                c.shared = shared;
                c.residual = (int)trand_int(&r, NO_RESIDUAL, IN_PLACE);
                c.rows_dtype = trand_dtype(&r);
                c.y_dtype = trand_dtype(&r);
                c.unweighted = how == 1;
                c.dropped = how == 2 || how == 3 ? 100 : 20; /* the shared row alone */
                c.bad = how == 5 ? 30 : 0;
                run_case(&c, &r);
            }
    shared_as_slot(&r);
}

/* All slots dropped: the residual, or 0. All slots bad: the same, and the first one is named. */
static void test_combine_nothing_to_add(void)
{
    trand r = trand_new(4);
    for (int dtype = MOE_FP32; dtype <= MOE_BF16; ++dtype)
        for (int residual = NO_RESIDUAL; residual <= IN_PLACE; ++residual)
            for (int H = 63; H <= 64; ++H)
                for (int bad = 0; bad < 2; ++bad) {
                    combine_case c = normal_case(6, H, 4);
                    c.y_dtype = dtype;
                    c.residual = residual;
                    c.dropped = bad ? 0 : 100;
                    c.bad = bad ? 100 : 0;
                    run_case(&c, &r);
                }
}

/* Small whole numbers, sums by hand: a row that two slots of a token name, a slot of -1 between
   live ones, a token without any. The weight of a dropped slot is NaN or infinite. */
static void test_combine_by_hand(void)
{
    enum { T = 3, H = 2, K = 3 };
    static const float rows[] = {1, 2, 10, 20, 100, 200}, other[] = {3, -3};
    static const moe_place place[] = {{0, 1}, {-1, -1}, {1, 0},  {0, 2},  {0, 2},
                                      {0, 0}, {-1, -1}, {-1, 7}, {-1, -1}};
    static const float weights[] = {2, NAN, -1, 1, 0.5f, 4, NAN, INFINITY, NAN};
    static const float residual[] = {1000, 2000, 0, 0, 5, 6}, shared[] = {7, 8, 1, 2, 3, 4};
    static const float shared_weight[] = {1, -2, 10};
    static const float plain[] = {17, 43, 154, 308, 0, 0};
    static const float all[] = {1024, 2051, 152, 304, 35, 46};
    tbuf b0 = tbuf_from("rows", rows, sizeof rows, 0), b1 = tbuf_from("rows", other, 8, 0);
    void* address[] = {b0.p, b1.p};
    tbuf bt = tbuf_from("table", address, sizeof address, 0);
    tbuf bp = tbuf_from("place", place, sizeof place, 0);
    tbuf bw = tbuf_from("weights", weights, sizeof weights, 0);
    tbuf br = tbuf_from("residual", residual, sizeof residual, 0);
    tbuf bs = tbuf_from("shared", shared, sizeof shared, 0);
    tbuf bsw = tbuf_from("shared_weight", shared_weight, sizeof shared_weight, 0);
    tbuf by = tbuf_new("y", sizeof plain, 0), fault = tfault_new(0);
    moe_combine_desc d;
    memset(&d, 0, sizeof d);
    d.table = (const void* const*)bt.p;
    d.num_buffers = 2;
    d.place = (const moe_place*)bp.p;
    d.weights = (const float*)bw.p;
    d.rows_dtype = MOE_FP32;
    d.y = by.p;
    d.fault = (uint64_t*)fault.p;
    d.rank = TEST_RANK;
    d.num_tokens = T;
    d.hidden = H;
    d.top_k = K;
    CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&by, plain), "rows alone");
    d.residual = br.p;
    d.shared = bs.p;
    d.shared_weight = (const float*)bsw.p;
    tbuf_poison(&by);
    CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&by, all), "rows, residual and shared row");
    CHECK_FAULT(&fault, MOE_FAULT_NONE, 0);
    tbufs_free(TBUFS(&b0, &b1, &bt, &bp, &bw, &br, &bs, &bsw, &by, &fault));
}

/* One buffer without a table: place.buffer 0 is that buffer, and 1 is outside. */
static void test_combine_one_array(void)
{
    trand r = trand_new(8);
    for (int num_buffers = 0; num_buffers < 2; ++num_buffers) {
        combine_case c = normal_case(20, 72, 4);
        combine_bufs b;
        c.buffers = 0;
        c.rows = 30;
        bufs_new(&b, &c, &r);
        b.h_place[11].buffer = 1;
        b.h_weights[11] = NAN;
        put_places(&b);
        b.d.num_buffers = num_buffers;
        launch(&b, &c);
        bufs_free(&b);
    }
}

static void combine_values(void)
{
    RUN(test_combine_shapes);
    RUN(test_combine_dtypes);
    RUN(test_combine_alignment);
    RUN(test_combine_shared);
    RUN(test_combine_nothing_to_add);
    RUN(test_combine_by_hand);
    RUN(test_combine_one_array);
}

#endif
