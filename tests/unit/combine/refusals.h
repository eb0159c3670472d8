/* refusals.h: bad places and tables, the fault word, descriptors that combine refuses.

   test_combine_faults      the smallest bad slot, earlier faults, stop faults
   test_combine_bad_table   entries of the table that are null or misaligned
   test_combine_refusals    every field, wrong in every way: its own status, nothing written */
#ifndef MOE_TESTS_COMBINE_REFUSALS_H
#define MOE_TESTS_COMBINE_REFUSALS_H

#include "tests/unit/combine/case.h"

static void test_combine_faults(void)
{
    trand r = trand_new(6);
    combine_case c = normal_case(60, 40, 5);
    combine_bufs b;
    bufs_new(&b, &c, &r);
    b.h_place[123].buffer = 7;
    b.h_place[77].buffer = 3;
    b.h_place[77].row = 5;
    b.h_place[299].buffer = -9;
    b.h_weights[123] = b.h_weights[77] = b.h_weights[299] = NAN;
    put_places(&b);
    for (int i = 0; i < 3; ++i) {
        CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_PLACE, 77);
    }
    compare(&b, &c);
    tfault_put(&b.fault, MOE_FAULT_BAD_ID, 5000); /* an earlier code stays */
    tbuf_poison(&b.y);
    CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_ID, 5000);
    CHECK(!tbuf_holds(&b.y, 0), "a data fault stopped combine");
    tfault_put(&b.fault, MOE_FAULT_BAD_OFFSET, 2);
    tbuf_poison(&b.y);
    CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b.y, 0), "combine ran on after a stop fault");
    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 2);
    bufs_free(&b);
}

/* An entry of the table that is no address of an element: null, or misaligned by a byte or, for
   fp32, by two. Its slots are dropped, the fault names the first of them, and nothing traps. An
   entry that is aligned to its elements alone is a good one. */
static void test_combine_bad_table(void)
{
    enum { BAD = 2 };
    static const int offs[] = {1, 2, 3, 4, 6, 8, 16, 0}; /* bytes; 0: null */
    trand r = trand_new(16);
    for (int dtype = MOE_FP32; dtype <= MOE_BF16; ++dtype)
        for (size_t i = 0; i < sizeof offs / sizeof *offs; ++i) {
            combine_case c = normal_case(30, i & 1 ? 64 : 51, 3);
            const int off = offs[i], good = off && off % moe_dtype_bytes(dtype) == 0;
            combine_bufs b;
            void** table;
            c.rows_dtype = c.y_dtype = dtype;
            c.row_pad = 16;
            c.rows = 5;
            bufs_new(&b, &c, &r);
            table = (void**)tbuf_copy(&b.table);
            if (good) { /* the rows move along */
                const size_t bytes = b.buffer[BAD].bytes;
                tbuf_free(&b.buffer[BAD]);
                b.buffer[BAD] = tbuf_from("rows", b.row[BAD], bytes, (size_t)off);
                table[BAD] = b.buffer[BAD].p;
            } else {
                table[BAD] = off ? AT(table[BAD], off) : (void*)0;
            }
            tbuf_put(&b.table, table);
            for (int s = 0; s < c.T * c.K && !good; ++s)
                if (b.h_place[s].buffer == BAD) b.h_weights[s] = NAN;
            tbuf_put(&b.weights, b.h_weights);
            CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
            for (int s = 0; s < c.T * c.K && !good; ++s) /* the reference skips these */
                if (b.h_place[s].buffer == BAD) b.h_place[s].buffer = c.buffers;
            compare(&b, &c);
            free(table);
            bufs_free(&b);
        }
}

TEST_REFUSED(refused, moe_combine, moe_combine_prepare, moe_combine)

/* Every field, wrong in every way: its own status, and nothing is written. */
static void test_combine_refusals(void)
{
    trand r = trand_new(7);
    combine_case c = normal_case(10, 64, 4);
    combine_bufs b;
    moe_combine_desc good, d;
    c.residual = RESIDUAL;
    bufs_new(&b, &c, &r);
    good = b.d;
#define ONE_ARRAY d.table = 0, d.num_buffers = 0, d.rows = b.buffer[0].p
    CHECK_STATUS(moe_combine(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED_EACH(hidden, MOE_ERR_RANGE, hidden, 0, -64);
    REFUSED_EACH(top_k, MOE_ERR_RANGE, top_k, 0, -1, INT32_MIN);
    REFUSED_EACH(rows_dtype, MOE_ERR_DTYPE, rows_dtype, 4, -1);
    REFUSED_EACH(y_dtype, MOE_ERR_DTYPE, y_dtype, 4, -2);
    REFUSED_EACH(row_stride, MOE_ERR_STRIDE, row_stride, 63, -64);
    REFUSED_EACH(y_stride, MOE_ERR_STRIDE, y_stride, 63, -64);
    REFUSED(d.residual_stride = 63, MOE_ERR_STRIDE, residual_stride);
    REFUSED_EACH(shared_stride, MOE_ERR_STRIDE, shared_stride, 63, -64);
    REFUSED(d.shared = AT(b.shared.p, 1), MOE_ERR_ALIGN, shared);
    REFUSED(d.shared_weight = (const float*)b.shared_weight.p, MOE_ERR_CONFLICT, shared_weight);
    REFUSED((d.shared = b.shared.p, d.shared_weight = (const float*)AT(b.shared_weight.p, 2)),
            MOE_ERR_ALIGN, shared_weight);
    REFUSED(d.shared = d.y, MOE_ERR_OVERLAP, y);
    REFUSED(d.shared = AT(d.y, 9 * 128), MOE_ERR_OVERLAP, y);
    REFUSED((d.shared = b.shared.p, d.shared_weight = (const float*)d.y), MOE_ERR_OVERLAP, y);
    REFUSED(d.shared = (void*)d.fault, MOE_ERR_OVERLAP, fault);
    REFUSED(d.num_rows = -1, MOE_ERR_RANGE, num_rows);
    REFUSED(d.rows = b.buffer[0].p, MOE_ERR_CONFLICT, rows);
    REFUSED_EACH(num_buffers, MOE_ERR_RANGE, num_buffers, 0, -1);
    REFUSED((ONE_ARRAY, d.num_buffers = 2), MOE_ERR_RANGE, num_buffers);
    REFUSED((ONE_ARRAY, d.num_buffers = -1), MOE_ERR_RANGE, num_buffers);
    REFUSED((ONE_ARRAY, d.rows = 0), MOE_ERR_NULL, table);
    REFUSED(d.place = 0, MOE_ERR_NULL, place);
    REFUSED(d.y = 0, MOE_ERR_NULL, y);
    REFUSED(d.table = (const void* const*)AT(d.table, 4), MOE_ERR_ALIGN, table);
    REFUSED((ONE_ARRAY, d.rows = AT(d.rows, 1)), MOE_ERR_ALIGN, rows);
    REFUSED(d.place = (const moe_place*)AT(d.place, 4), MOE_ERR_ALIGN, place);
    REFUSED(d.weights = (const float*)AT(d.weights, 2), MOE_ERR_ALIGN, weights);
    REFUSED(d.y = AT(d.y, 1), MOE_ERR_ALIGN, y);
    REFUSED((d.y = AT(d.y, 2), d.y_dtype = MOE_FP32), MOE_ERR_ALIGN, y);
    REFUSED(d.residual = AT(d.residual, 1), MOE_ERR_ALIGN, residual);
    REFUSED_RANK_AND_FAULT();
    REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
    REFUSED(d.y = (void*)d.table, MOE_ERR_OVERLAP, y);
    REFUSED((ONE_ARRAY, d.y = b.buffer[0].p), MOE_ERR_OVERLAP, y);
    REFUSED((ONE_ARRAY, d.y = AT(b.buffer[0].p, 4 * 64 * 2)), MOE_ERR_OVERLAP, y);
    REFUSED(d.y = (void*)d.place, MOE_ERR_OVERLAP, y);
    REFUSED(d.y = (void*)d.weights, MOE_ERR_OVERLAP, y);
    REFUSED(d.y = AT(d.residual, 128), MOE_ERR_OVERLAP, y);
    REFUSED((d.y = (void*)d.residual, d.y_stride = 72), MOE_ERR_OVERLAP, y);
    REFUSED(d.fault = (uint64_t*)d.y, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.place, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.table, MOE_ERR_OVERLAP, fault);
    REFUSED((d.y = (void*)d.residual, d.fault = (uint64_t*)d.y), MOE_ERR_OVERLAP, fault);
    { /* rows further apart than H: another buffer in the last of them */
        tbuf big = tbuf_new("big", 24 * 72 * 2, 0);
        char *p = (char*)big.p, *end = p + (9 * 72 + 64) * 2, *end_rows = p + (4 * 72 + 64) * 2;
        REFUSED((d.residual = p, d.residual_stride = 72, d.y = end - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.residual = p, d.residual_stride = 72, d.fault = (uint64_t*)(end - 8)),
                MOE_ERR_OVERLAP, fault);
        REFUSED((d.shared = p, d.shared_stride = 72, d.y = end - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.shared = p, d.shared_stride = 72, d.fault = (uint64_t*)(end - 8)),
                MOE_ERR_OVERLAP, fault);
        REFUSED((d.y = p, d.y_stride = 72, d.residual = end - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.y = p, d.y_stride = 72, d.shared = end - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.y = p, d.y_stride = 72, d.fault = (uint64_t*)(end - 8)), MOE_ERR_OVERLAP, fault);
        REFUSED((ONE_ARRAY, d.rows = p, d.row_stride = 72, d.num_rows = 5, d.y = end_rows - 2),
                MOE_ERR_OVERLAP, y);
        REFUSED((ONE_ARRAY, d.rows = p, d.row_stride = 72, d.num_rows = 5,
                 d.fault = (uint64_t*)(end_rows - 8)),
                MOE_ERR_OVERLAP, fault);
        CHECK(tbuf_holds(&big, 0), "a refused call wrote something");
        tbuf_free(&big);
    }
#undef ONE_ARRAY
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.y, 0), "a refused call wrote y");
    CHECK(tbuf_holds(&b.residual, b.h_residual) && tbuf_holds(&b.buffer[0], b.row[0]),
          "or an input");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    launch(&b, &c);
    bufs_free(&b);
}

static void combine_refusals(void)
{
    RUN(test_combine_faults);
    RUN(test_combine_bad_table);
    RUN(test_combine_refusals);
}

#endif
