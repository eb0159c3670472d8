/* faults.h: wrong offsets, tables and numbers that are not finite

   test_scatter_bad_offset        offsets and counts out of order
   test_scatter_counts_past_2_31  counts whose sum passes 2^31 and 2^32
   test_scatter_bad_first         only the first offset is wrong
   test_scatter_bad_table         a null or misaligned address
   test_scatter_nan               NaN and infinity stay in their token */
#ifndef MOE_TESTS_COMBINE_SCATTER_FAULTS_H
#define MOE_TESTS_COMBINE_SCATTER_FAULTS_H

#include "tests/unit/combine_scatter/case.h"

/* The call with a wrong expert: without a fault word all others are added; with one, it says which
   is wrong, and a later call that is given the same word does nothing. */
static void check_bad_expert(scatter_bufs* b, const scatter_case* c, int code, int e)
{
    void* y;
    b->d.fault = 0;
    CHECK_STATUS(moe_combine_scatter(&b->d, test_now.stream), MOE_OK);
    compare(b, c, e);
    b->d.fault = (uint64_t*)b->fault.p;
    tbuf_put(&b->y, b->h_y);
    CHECK_STATUS(moe_combine_scatter(&b->d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b->fault, code, e);
    y = tbuf_copy(&b->y);
    CHECK_STATUS(moe_combine_scatter(&b->d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b->y, y), "after a stop fault");
    CHECK_FAULT(&b->fault, code, e);
    free(y);
}

/* Offsets and counts that make no sense. */
static void test_scatter_bad_offset(void)
{
    trand r = trand_new(6);
    for (int i = 0; i < 8; ++i) {
        scatter_case c = normal_case(20, 64, 6, 10);
        scatter_bufs b;
        c.y_dtype = MOE_FP32;
        c.by = i < 4 ? BY_OFFSET : i < 6 ? BY_COUNT : BY_BOTH;
        do bufs_new(&b, &c, &r);
        while (b.h_count[5] == 0 && (bufs_free(&b), 1));
        if (i == 0) b.h_offset[6] = b.R + 1;
        if (i == 1) b.h_offset[6] = b.h_offset[5] - 1;
        if (i == 2) b.h_offset[6] = INT32_MIN;
        if (i == 3) b.h_offset[6] = INT32_MAX;
        if (i == 4) b.h_count[5] = INT32_MAX;
        if (i == 5) b.h_count[5] = -1;
        if (i == 6) b.h_count[5] = b.h_offset[6] - b.h_offset[5] + 1;
        if (i == 7) b.h_count[5] = INT32_MIN;
        tbuf_put(&b.offset, b.h_offset);
        tbuf_put(&b.count, b.h_count);
        b.h_count[5] = 0;
        check_bad_expert(&b, &c, MOE_FAULT_BAD_OFFSET, 5);
        bufs_free(&b);
    }
}

/* Counts without offsets whose sum passes 2^31 and 2^32, within a thread's share and over several
   threads: an expert behind them begins nowhere, though the sum modulo 2^32 is a row. */
static void test_scatter_counts_past_2_31(void)
{
    enum { T = 6, H = 16, R = 8, MOST = 600 };
    static const struct {
        int experts, apart; /* experts between two with a count; 256: all of them one thread's */
        int big, small;     /* so many count INT32_MAX each, then one `small` */
    } step[] = {{4, 1, 2, 2}, {4, 1, 2, 3},       {4, 1, 1, 1},     {6, 1, 4, 4},
                {4, 1, 0, 9}, {600, 1, 514, 514}, {600, 256, 2, 2}, {600, 256, 2, 4}};
    trand r = trand_new(16);
    scatter_case c = normal_case(T, H, 1, R);
    void* rows = new_rows(&c, &r, R, H, MOE_BF16);
    void* y = new_rows(&c, &r, T, H, MOE_BF16);
    int32_t token[R];
    for (int i = 0; i < R; ++i) token[i] = i % T;
    for (size_t i = 0; i < sizeof step / sizeof *step; ++i) {
        int32_t count[MOST] = {0};
        tbuf brows = tbuf_from("rows", rows, R * H * 2, 0), by = tbuf_from("y", y, T * H * 2, 0);
        tbuf btoken = tbuf_from("row_token", token, sizeof token, 0), bcount, fault = tfault_new(0);
        moe_combine_scatter_desc d;
        for (int e = 0; e < step[i].big; ++e) count[e * step[i].apart] = INT32_MAX;
        count[step[i].big * step[i].apart] = step[i].small;
        count[step[i].experts - 1] = 5;
        bcount = tbuf_from("expert_count", count, (size_t)step[i].experts * 4, 0);
        memset(&d, 0, sizeof d);
        d.rows = brows.p;
        d.expert_count = (const int32_t*)bcount.p;
        d.row_token = (const int32_t*)btoken.p;
        d.y = by.p;
        d.num_tokens = T;
        d.hidden = H;
        d.num_experts = step[i].experts;
        d.num_rows = R;
        CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&by, y), "step %d: rows of an expert that begins nowhere", (int)i);
        d.fault = (uint64_t*)fault.p;
        d.rank = TEST_RANK;
        CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
        CHECK_FAULT(&fault, MOE_FAULT_BAD_OFFSET, 0);
        CHECK(tbuf_holds(&by, y), "step %d, with a fault word", (int)i);
        tbufs_free(TBUFS(&brows, &by, &btoken, &bcount, &fault));
    }
    free(rows);
    free(y);
}

/* The first offset alone is wrong: only the first expert is. */
static void test_scatter_bad_first(void)
{
    trand r = trand_new(7);
    scatter_case c = normal_case(20, 64, 6, 10);
    scatter_bufs b;
    c.y_dtype = MOE_FP32;
    bufs_new(&b, &c, &r);
    b.h_offset[0] = -3;
    tbuf_put(&b.offset, b.h_offset);
    b.h_offset[0] = 0;
    check_bad_expert(&b, &c, MOE_FAULT_BAD_OFFSET, 0);
    bufs_free(&b);
}

/* A null or misaligned address of an expert that has rows. */
static void test_scatter_bad_table(void)
{
    trand r = trand_new(8);
    for (int i = 0; i < 2; ++i) {
        scatter_case c = normal_case(20, 64, 6, 10);
        scatter_bufs b;
        void** table;
        const int bad = 2;
        c.table = 1;
        c.y_dtype = MOE_FP32;
        do bufs_new(&b, &c, &r);
        while (b.h_count[2] == 0 && (bufs_free(&b), 1));
        table = (void**)tbuf_copy(&b.table);
        table[bad] = i ? (char*)table[bad] + 1 : (void*)0;
        tbuf_put(&b.table, table);
        check_bad_expert(&b, &c, MOE_FAULT_BAD_TABLE, bad);
        free(table);
        bufs_free(&b);
    }
}

/* What is not finite stays so, in its token alone. */
static void test_scatter_nan(void)
{
    trand r = trand_new(9);
    for (int dtype = MOE_FP32; dtype <= MOE_BF16; ++dtype) {
        scatter_case c = normal_case(20, 72, 4, 20);
        scatter_bufs b;
        void* y;
        int row = 0, nan, inf;
        c.y_dtype = dtype;
        c.unweighted = 1;
        bufs_new(&b, &c, &r);
        if (b.R == 0) {
            bufs_free(&b);
            continue;
        }
        moe_store(b.row[0], row * c.H + 5, MOE_BF16, NAN);
        moe_store(b.row[0], row * c.H + 6, MOE_BF16, -INFINITY);
        tbuf_put(&b.buffer[0], b.row[0]);
        CHECK_STATUS(moe_combine_scatter(&b.d, test_now.stream), MOE_OK);
        y = tbuf_copy(&b.y);
        nan = inf = 0;
        for (int i = 0; i < c.T * c.H; ++i) {
            const float v = moe_load(y, i, dtype);
            nan += v != v;
            inf += v == -INFINITY;
        }
        CHECK(nan == 1 && inf == 1, "%s: %d NaN, %d infinite", moe_dtype_name(dtype), nan, inf);
        CHECK(moe_load(y, b.h_index[row] * c.H + 6, dtype) == -INFINITY, "whose it is");
        free(y);
        bufs_free(&b);
    }
}

static void combine_scatter_faults(void)
{
    RUN(test_scatter_bad_offset);
    RUN(test_scatter_counts_past_2_31);
    RUN(test_scatter_bad_first);
    RUN(test_scatter_bad_table);
    RUN(test_scatter_nan);
}

#endif
