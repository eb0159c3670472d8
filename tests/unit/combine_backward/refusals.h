/* refusals.h: bad places and tables, the fault word, descriptors that combine_backward refuses.

   test_backward_faults      the smallest bad slot, earlier faults, stop faults
   test_backward_bad_table   entries of the tables that are null or misaligned
   test_backward_refusals    every field, wrong in every way: its own status, nothing written */
#ifndef MOE_TESTS_COMBINE_BACKWARD_REFUSALS_H
#define MOE_TESTS_COMBINE_BACKWARD_REFUSALS_H

#include "tests/unit/combine_backward/case.h"

/* Requires that every output holds its poison. */
static void outputs_untouched(const backward_bufs* b, const char* what)
{
    int untouched = tbuf_holds(&b->dweights, 0) && tbuf_holds(&b->dshared, 0) &&
                    tbuf_holds(&b->dshared_weight, 0);
    for (int i = 0; i < b->count; ++i) untouched &= tbuf_holds(&b->drow[i], 0);
    CHECK(untouched, "%s wrote something", what);
}

static void test_backward_faults(void)
{
    trand r = trand_new(40);
    backward_case c = normal_case(60, 40, 5);
    backward_bufs b;
    bufs_new(&b, &c, &r);
    b.h_place[123].buffer = 7;
    b.h_place[77].buffer = 3;
    b.h_place[77].row = c.rows;
    b.h_place[299].buffer = -9;
    b.h_weights[123] = b.h_weights[77] = b.h_weights[299] = NAN;
    put(&b);
    for (int i = 0; i < 3; ++i) {
        CHECK_STATUS(moe_combine_backward(&b.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_PLACE, 77);
    }
    compare(&b, &c);
    put(&b);
    tfault_put(&b.fault, MOE_FAULT_BAD_ID, 5000); /* an earlier code stays */
    CHECK_STATUS(moe_combine_backward(&b.d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_ID, 5000);
    CHECK(!tbuf_holds(&b.dweights, 0), "a data fault stopped combine_backward");
    put(&b);
    tfault_put(&b.fault, MOE_FAULT_BAD_OFFSET, 2);
    CHECK_STATUS(moe_combine_backward(&b.d, test_now.stream), MOE_OK);
    outputs_untouched(&b, "a call after a stop fault");
    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 2);
    bufs_free(&b);
}

/* An entry of a table that is no address of an element: null, or misaligned by a byte or, for fp32,
   by two. Its slots have dweights 0 and no row, and the fault names the first of them. An entry
   that is aligned to its elements alone is a good one. */
static void test_backward_bad_table(void)
{
    enum { BAD = 2 };
    static const int offs[] = {1, 2, 3, 4, 6, 8, 16, 0}; /* bytes; 0: null */
    trand r = trand_new(41);
    for (int dtype = MOE_FP32; dtype <= MOE_BF16; ++dtype)
        for (size_t i = 0; i < sizeof offs / sizeof *offs; ++i)
            for (int of_gradients = 0; of_gradients < 2; ++of_gradients) {
                backward_case c = normal_case(30, i & 1 ? 64 : 51, 3);
                const int off = offs[i], good = off && off % moe_dtype_bytes(dtype) == 0;
                backward_bufs b;
                tbuf *buffer, *table;
                void** entries;
                c.rows_dtype = c.dy_dtype = dtype;
                bufs_new(&b, &c, &r);
                buffer = of_gradients ? &b.drow[BAD] : &b.buffer[BAD];
                table = of_gradients ? &b.drows_table : &b.table;
                entries = (void**)tbuf_copy(table);
                if (good) { /* the rows move along */
                    const size_t bytes = buffer->bytes;
                    tbuf_free(buffer);
                    *buffer = tbuf_new("moved", bytes, (size_t)off);
                    entries[BAD] = buffer->p;
                } else {
                    entries[BAD] = off ? AT(entries[BAD], off) : (void*)0;
                }
                tbuf_put(table, entries);
                for (int s = 0; s < c.T * c.K && !good; ++s)
                    if (b.h_place[s].buffer == BAD) b.h_weights[s] = NAN;
                put(&b);
                CHECK_STATUS(moe_combine_backward(&b.d, test_now.stream), MOE_OK);
                for (int s = 0; s < c.T * c.K && !good; ++s) /* the reference skips these */
                    if (b.h_place[s].buffer == BAD) b.h_place[s].buffer = b.count;
                tbuf_put(&b.place, b.h_place);
                compare(&b, &c);
                free(entries);
                bufs_free(&b);
            }
}

TEST_REFUSED(refused, moe_combine_backward, moe_combine_backward_prepare, moe_combine_backward)

#define ONE_ARRAY                                                                                  \
    d.table = 0, d.drows_table = 0, d.num_buffers = 0, d.rows = b->buffer[0].p,                    \
    d.drows = b->drow[0].p
#define NO_OUTPUTS                                                                                 \
    d.table = 0, d.drows_table = 0, d.num_buffers = 0, d.dweights = 0, d.dshared = 0,              \
    d.dshared_weight = 0, d.shared = 0, d.shared_weight = 0

/* Sizes, dtypes, strides, and fields that contradict each other. */
static void refused_options(const backward_bufs* b)
{
    const moe_combine_backward_desc good = b->d;
    moe_combine_backward_desc d;
    CHECK_STATUS(moe_combine_backward(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED_EACH(hidden, MOE_ERR_RANGE, hidden, 0, -64, (1 << 28) + 1);
    REFUSED_EACH(top_k, MOE_ERR_RANGE, top_k, 0, -1, INT32_MIN, MOE_COMBINE_MAX_TOP_K + 1);
    REFUSED_EACH(rows_dtype, MOE_ERR_DTYPE, rows_dtype, 4, -1);
    REFUSED_EACH(dy_dtype, MOE_ERR_DTYPE, dy_dtype, 4, -2);
    REFUSED_EACH(dy_stride, MOE_ERR_STRIDE, dy_stride, 63, -64);
    REFUSED_EACH(row_stride, MOE_ERR_STRIDE, row_stride, 63, -64);
    REFUSED_EACH(drows_stride, MOE_ERR_STRIDE, drows_stride, 63, -64, INT64_MAX);
    REFUSED_EACH(shared_stride, MOE_ERR_STRIDE, shared_stride, 63, -64);
    REFUSED_EACH(dshared_stride, MOE_ERR_STRIDE, dshared_stride, 63, -64);
    REFUSED(d.num_rows = -1, MOE_ERR_RANGE, num_rows);
    REFUSED_EACH(num_buffers, MOE_ERR_RANGE, num_buffers, 0, -1);
    REFUSED((ONE_ARRAY, d.num_buffers = 2), MOE_ERR_RANGE, num_buffers);
    REFUSED((ONE_ARRAY, d.num_buffers = -1), MOE_ERR_RANGE, num_buffers);
    REFUSED(d.rows = b->buffer[0].p, MOE_ERR_CONFLICT, rows);
    REFUSED((d.dweights = 0), MOE_ERR_CONFLICT, table);
    REFUSED((ONE_ARRAY, d.dweights = 0), MOE_ERR_CONFLICT, rows);
    REFUSED((ONE_ARRAY, d.drows_table = good.drows_table), MOE_ERR_CONFLICT, drows_table);
    REFUSED(d.drows = b->drow[0].p, MOE_ERR_CONFLICT, drows);
    REFUSED((d.drows_table = 0, d.drows = b->drow[0].p), MOE_ERR_CONFLICT, drows);
    REFUSED((d.table = 0, d.dweights = 0, d.drows = b->drow[0].p), MOE_ERR_CONFLICT, drows);
    REFUSED(d.dshared_weight = 0, MOE_ERR_CONFLICT, shared);
    REFUSED((d.dshared_weight = 0, d.shared = 0, d.dshared = 0), MOE_ERR_CONFLICT, shared_weight);
}

/* Buffers that are missing or misaligned. */
static void refused_buffers(const backward_bufs* b)
{
    const moe_combine_backward_desc good = b->d;
    moe_combine_backward_desc d;
    REFUSED(d.dy = 0, MOE_ERR_NULL, dy);
    REFUSED(d.table = 0, MOE_ERR_NULL, table);
    REFUSED((ONE_ARRAY, d.rows = 0), MOE_ERR_NULL, table);
    REFUSED(d.place = 0, MOE_ERR_NULL, place);
    REFUSED((NO_OUTPUTS, d.dweights = good.dweights, d.rows = b->buffer[0].p, d.place = 0),
            MOE_ERR_NULL, place);
    REFUSED((NO_OUTPUTS, d.drows = b->drow[0].p, d.place = 0), MOE_ERR_NULL, place);
    REFUSED(d.shared = 0, MOE_ERR_NULL, shared);
    REFUSED((d.shared = 0, d.dshared = 0), MOE_ERR_NULL, shared);
    REFUSED((d.table = 0, d.drows_table = 0, d.num_buffers = 0), MOE_ERR_NULL, table);
    REFUSED((NO_OUTPUTS), MOE_ERR_NULL, drows);
    REFUSED(d.dy = AT(d.dy, 1), MOE_ERR_ALIGN, dy);
    REFUSED((d.dy = AT(d.dy, 2), d.dy_dtype = MOE_FP32), MOE_ERR_ALIGN, dy);
    REFUSED(d.table = (const void* const*)AT(d.table, 4), MOE_ERR_ALIGN, table);
    REFUSED((ONE_ARRAY, d.rows = AT(d.rows, 1)), MOE_ERR_ALIGN, rows);
    REFUSED(d.place = (const moe_place*)AT(d.place, 4), MOE_ERR_ALIGN, place);
    REFUSED(d.weights = (const float*)AT(d.weights, 2), MOE_ERR_ALIGN, weights);
    REFUSED(d.shared = AT(d.shared, 1), MOE_ERR_ALIGN, shared);
    REFUSED(d.shared_weight = (const float*)AT(d.shared_weight, 2), MOE_ERR_ALIGN, shared_weight);
    REFUSED(d.drows_table = (void* const*)AT(d.drows_table, 4), MOE_ERR_ALIGN, drows_table);
    REFUSED((ONE_ARRAY, d.drows = AT(d.drows, 1)), MOE_ERR_ALIGN, drows);
    REFUSED(d.dweights = (float*)AT(d.dweights, 2), MOE_ERR_ALIGN, dweights);
    REFUSED(d.dshared = AT(d.dshared, 1), MOE_ERR_ALIGN, dshared);
    REFUSED(d.dshared_weight = (float*)AT(d.dshared_weight, 2), MOE_ERR_ALIGN, dshared_weight);
    REFUSED_RANK_AND_FAULT();
    REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
}

/* Outputs that overlap an input or each other. */
static void refused_overlaps(const backward_bufs* b)
{
    const moe_combine_backward_desc good = b->d;
    moe_combine_backward_desc d;
    const int64_t row = b->d.hidden * 2;
    REFUSED((ONE_ARRAY, d.drows = (void*)d.dy), MOE_ERR_OVERLAP, drows);
    REFUSED((ONE_ARRAY, d.drows = AT(d.rows, row)), MOE_ERR_OVERLAP, drows);
    REFUSED((ONE_ARRAY, d.drows = (void*)d.rows, d.drows_stride = 72), MOE_ERR_OVERLAP, drows);
    REFUSED((ONE_ARRAY, d.drows = (void*)d.place), MOE_ERR_OVERLAP, drows);
    REFUSED((ONE_ARRAY, d.drows = (void*)d.weights), MOE_ERR_OVERLAP, drows);
    REFUSED((ONE_ARRAY, d.dweights = (float*)d.drows), MOE_ERR_OVERLAP, dweights);
    REFUSED((ONE_ARRAY, d.dweights = (float*)d.rows), MOE_ERR_OVERLAP, dweights);
    REFUSED((ONE_ARRAY, d.drows = (void*)d.rows, d.dweights = (float*)d.rows), MOE_ERR_OVERLAP,
            dweights);
    REFUSED(d.dweights = (float*)d.weights, MOE_ERR_OVERLAP, dweights);
    REFUSED(d.dweights = (float*)d.drows_table, MOE_ERR_OVERLAP, dweights);
    REFUSED(d.dshared = (void*)d.dy, MOE_ERR_OVERLAP, dshared);
    REFUSED(d.dshared = AT(d.shared, row), MOE_ERR_OVERLAP, dshared);
    REFUSED((d.dshared = (void*)d.shared, d.dshared_stride = 72), MOE_ERR_OVERLAP, dshared);
    REFUSED(d.dshared = (void*)d.table, MOE_ERR_OVERLAP, dshared);
    REFUSED(d.dshared_weight = (float*)d.shared_weight, MOE_ERR_OVERLAP, dshared_weight);
    REFUSED(d.dshared_weight = d.dweights + 1, MOE_ERR_OVERLAP, dshared_weight);
    REFUSED((d.dshared = (void*)d.shared, d.dshared_weight = (float*)d.shared), MOE_ERR_OVERLAP,
            dshared_weight);
    REFUSED(d.fault = (uint64_t*)d.place, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.table, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.drows_table, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.dy, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.dshared, MOE_ERR_OVERLAP, fault);
    { /* rows further apart than H: another buffer in the last of them */
        tbuf big = tbuf_new("big", 24 * 72 * 2, 0);
        char *p = (char*)big.p, *end = p + (9 * 72 + 64) * 2, *end_rows = p + (4 * 72 + 64) * 2;
        REFUSED((d.dy = p, d.dy_stride = 72, d.fault = (uint64_t*)(end - 8)), MOE_ERR_OVERLAP,
                fault);
        REFUSED((d.shared = p, d.shared_stride = 72, d.dshared = end - 2), MOE_ERR_OVERLAP,
                dshared);
        REFUSED((d.dshared = p, d.dshared_stride = 72, d.dshared_weight = (float*)(end - 4)),
                MOE_ERR_OVERLAP, dshared_weight);
        REFUSED((ONE_ARRAY, d.rows = p, d.row_stride = 72, d.num_rows = 5,
                 d.dweights = (float*)(end_rows - 4)),
                MOE_ERR_OVERLAP, dweights);
        REFUSED((ONE_ARRAY, d.drows = p, d.drows_stride = 72, d.num_rows = 5,
                 d.dweights = (float*)(end_rows - 4)),
                MOE_ERR_OVERLAP, dweights);
        CHECK(tbuf_holds(&big, 0), "a refused call wrote something");
        tbuf_free(&big);
    }
}
#undef ONE_ARRAY
#undef NO_OUTPUTS

/* Every field, wrong in every way: its own status, and nothing is written. */
static void test_backward_refusals(void)
{
    trand r = trand_new(42);
    const backward_case c = normal_case(10, 64, 4);
    backward_bufs b;
    bufs_new(&b, &c, &r);
    refused_options(&b);
    refused_buffers(&b);
    refused_overlaps(&b);
    TEST_CUDA(cudaDeviceSynchronize());
    outputs_untouched(&b, "a refused call");
    CHECK(tbuf_holds(&b.dy, b.h_dy) && tbuf_holds(&b.shared, b.h_shared) &&
              tbuf_holds(&b.buffer[0], b.row[0]),
          "a refused call wrote an input");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    launch(&b, &c);
    bufs_free(&b);
}

static void combine_backward_refusals(void)
{
    RUN(test_backward_faults);
    RUN(test_backward_bad_table);
    RUN(test_backward_refusals);
}

#endif
