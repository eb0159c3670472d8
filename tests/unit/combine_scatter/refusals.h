/* refusals.h: bad descriptors

   test_scatter_refusals  every field, with its status */
#ifndef MOE_TESTS_COMBINE_SCATTER_REFUSALS_H
#define MOE_TESTS_COMBINE_SCATTER_REFUSALS_H

#include "tests/unit/combine_scatter/case.h"

TEST_REFUSED(refused, moe_combine_scatter, moe_combine_scatter_prepare, moe_combine_scatter)

static void test_scatter_refusals(void)
{
    trand r = trand_new(13);
    scatter_case c = normal_case(20, 64, 6, 10);
    scatter_bufs b;
    moe_combine_scatter_desc good, d;
    bufs_new(&b, &c, &r);
    good = b.d;
    CHECK_STATUS(moe_combine_scatter(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED_EACH(hidden, MOE_ERR_RANGE, hidden, 0, (1 << 28) + 1);
    REFUSED_NUM_EXPERTS();
    REFUSED(d.num_rows = -1, MOE_ERR_RANGE, num_rows);
    REFUSED(d.max_rows = -1, MOE_ERR_RANGE, max_rows);
    REFUSED(d.rows_dtype = 4, MOE_ERR_DTYPE, rows_dtype);
    REFUSED(d.y_dtype = -1, MOE_ERR_DTYPE, y_dtype);
    REFUSED_EACH(row_stride, MOE_ERR_STRIDE, row_stride, 63, INT64_MAX);
    REFUSED(d.y_stride = -64, MOE_ERR_STRIDE, y_stride);
    REFUSED(d.table = (const void* const*)b.table.p, MOE_ERR_CONFLICT, rows);
    REFUSED((d.row_slot = d.row_token, d.top_k = 2), MOE_ERR_CONFLICT, row_slot);
    REFUSED((d.row_slot = d.row_token, d.row_token = 0), MOE_ERR_RANGE, top_k);
    REFUSED(d.rows = 0, MOE_ERR_NULL, table);
    REFUSED(d.expert_offset = 0, MOE_ERR_NULL, expert_offset);
    REFUSED(d.row_token = 0, MOE_ERR_NULL, row_token);
    REFUSED(d.y = 0, MOE_ERR_NULL, y);
    REFUSED((d.rows = 0, d.table = (const void* const*)AT(b.table.p, 4)), MOE_ERR_ALIGN, table);
    REFUSED(d.rows = AT(d.rows, 1), MOE_ERR_ALIGN, rows);
    REFUSED(d.expert_offset = (const int32_t*)AT(d.expert_offset, 2), MOE_ERR_ALIGN, expert_offset);
    REFUSED(d.expert_count = (const int32_t*)AT(b.count.p, 1), MOE_ERR_ALIGN, expert_count);
    REFUSED(d.row_token = (const int32_t*)AT(d.row_token, 2), MOE_ERR_ALIGN, row_token);
    REFUSED((d.row_slot = (const int32_t*)AT(d.row_token, 2), d.row_token = 0, d.top_k = 1),
            MOE_ERR_ALIGN, row_slot);
    REFUSED(d.row_weight = (const float*)AT(d.row_weight, 1), MOE_ERR_ALIGN, row_weight);
    REFUSED(d.y = AT(d.y, 1), MOE_ERR_ALIGN, y);
    REFUSED_RANK_AND_FAULT();
    REFUSED(d.y = (void*)d.rows, MOE_ERR_OVERLAP, y);
    REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
    REFUSED((d.num_rows = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
    REFUSED(d.fault = (uint64_t*)d.y, MOE_ERR_OVERLAP, fault);
    REFUSED((d.rows = 0, d.table = (const void* const*)d.y), MOE_ERR_OVERLAP, y);
    REFUSED(d.expert_offset = (const int32_t*)AT(d.y, 20 * 64 * 2 - 4), MOE_ERR_OVERLAP, y);
    REFUSED(d.expert_count = (const int32_t*)d.y, MOE_ERR_OVERLAP, y);
    REFUSED((d.row_slot = (const int32_t*)d.y, d.row_token = 0, d.top_k = 1), MOE_ERR_OVERLAP, y);
    REFUSED(d.row_weight = (const float*)d.y, MOE_ERR_OVERLAP, y);
    REFUSED(d.expert_count = (const int32_t*)d.fault, MOE_ERR_OVERLAP, fault);
    { /* rows further apart than H: another buffer in the last of them */
        tbuf big = tbuf_new("big", (size_t)(20 + b.R) * 72 * 2, 0);
        char *p = (char*)big.p, *end_y = p + (19 * 72 + 64) * 2;
        char* end_rows = p + ((b.R - 1) * 72 + 64) * 2;
        REFUSED((d.y = p, d.y_stride = 72, d.fault = (uint64_t*)(end_y - 8)), MOE_ERR_OVERLAP,
                fault);
        REFUSED((d.y = p, d.y_stride = 72, d.row_token = (const int32_t*)(end_y - 4)),
                MOE_ERR_OVERLAP, y);
        REFUSED((d.y = p, d.y_stride = 72, d.rows = end_y - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.rows = p, d.row_stride = 72, d.y = end_rows - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.rows = p, d.row_stride = 72, d.fault = (uint64_t*)(end_rows - 8)),
                MOE_ERR_OVERLAP, fault);
        CHECK(tbuf_holds(&big, 0), "a refused call wrote something");
        tbuf_free(&big);
    }
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.y, b.h_y), "a refused call wrote y");
    CHECK_STATUS(moe_combine_scatter(&good, test_now.stream), MOE_OK);
    compare(&b, &c, -1);
    bufs_free(&b);
}

static void combine_scatter_refusals(void)
{
    RUN(test_scatter_refusals);
}

#endif
