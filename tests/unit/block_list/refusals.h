/* refusals.h: block lists that are refused.

     test_refusals  each wrong field is refused with its own kind and field; nothing is written, and
                    the right descriptors still run */
#ifndef MOE_TESTS_BLOCK_LIST_REFUSALS_H
#define MOE_TESTS_BLOCK_LIST_REFUSALS_H

#include "tests/test_refusals.h"
#include "tests/unit/block_list/case.h"

TEST_REFUSED(refused, moe_block_sparse_list_build, moe_block_sparse_list_prepare,
             moe_block_sparse_list)

static void test_refusals(void)
{
    trand r = trand_new(13);
    moe_block_sparse_list_desc base = tlist_shape(&r, 40, 50),
                               routed = tlist_routing(&r, 100, 10, 2), good, d;
    uint8_t* bytes = tlist_bytes(&r, 40 * 50, 0.5);
    int32_t* ids = tlist_ids(&r, 200, 10, 0);
    tlist t, u;
    size_t n;
    base.bytes = bytes;
    routed.ids = ids;
    routed.top_k = 2;
    t = tlist_new(&base, 1, 0, -1, 0);
    u = tlist_new(&routed, 1, 0, -1, 0);
    CHECK_STATUS(moe_block_sparse_list_build(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_sparse_list_workspace(0, &n), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_sparse_list_workspace(&t.d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    d = t.d;
    d.block_rows = 48;
    CHECK_STATUS(moe_block_sparse_list_workspace(&d, &n), MOE_STATUS(MOE_ERR_RANGE, block_rows));
    memset(&d, 0, sizeof d);
    d.rows = t.d.rows, d.columns = t.d.columns;
    d.block_rows = t.d.block_rows, d.block_columns = t.d.block_columns;
    CHECK_STATUS(moe_block_sparse_list_workspace(&d, &n), MOE_OK); /* no address is needed */
    CHECK(n == t.d.workspace_bytes, "%zu bytes, with addresses %zu", n, t.d.workspace_bytes);

    good = t.d; /* by bytes */
    REFUSED(d.rows = -1, MOE_ERR_RANGE, rows);
    REFUSED(d.columns = -1, MOE_ERR_RANGE, columns);
    REFUSED(d.rows = d.columns = 0x7fffffff;
            d.block_rows = d.block_columns = 16, MOE_ERR_RANGE, columns);
    REFUSED_EACH(block_rows, MOE_ERR_RANGE, block_rows, 0, 256);
    REFUSED(d.block_columns = 8, MOE_ERR_RANGE, block_columns);
    REFUSED(d.max_blocks = -1, MOE_ERR_RANGE, max_blocks);
    REFUSED(d.bytes = 0, MOE_ERR_NULL, bytes);
    REFUSED(d.bits = (const uint32_t*)u.source.p, MOE_ERR_CONFLICT, bits);
    REFUSED(d.ids = u.d.ids, MOE_ERR_CONFLICT, ids);
    REFUSED(d.expert_offset = u.d.ids, MOE_ERR_CONFLICT, expert_offset);
    REFUSED(d.columns = 3 * d.block_columns; d.num_experts = 3, MOE_ERR_CONFLICT, num_experts);
    REFUSED(d.top_k = 1, MOE_ERR_CONFLICT, top_k);
    REFUSED(d.whole_batch = 1, MOE_ERR_CONFLICT, whole_batch);
    REFUSED(d.row_offset = 0, MOE_ERR_NULL, row_offset);
    REFUSED(d.column_index = 0, MOE_ERR_NULL, column_index);
    REFUSED(d.column_offset = 0, MOE_ERR_NULL, column_offset);
    REFUSED(d.row_index = 0, MOE_ERR_NULL, row_index);
    REFUSED(d.position = 0, MOE_ERR_NULL, position);
    REFUSED(d.workspace = 0, MOE_ERR_NULL, workspace);
    REFUSED(d.workspace = 0; d.workspace_bytes = 0, MOE_ERR_NULL, workspace);
    REFUSED(d.column_offset = d.row_index = 0, MOE_ERR_NULL, column_offset);
    REFUSED(d.row_index = d.position = 0, MOE_ERR_NULL, row_index);
    REFUSED(--d.workspace_bytes, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.bytes = 0; d.bits = (const uint32_t*)AT(t.source.p, 2), MOE_ERR_ALIGN, bits);
    REFUSED(d.row_offset = (int32_t*)AT(d.row_offset, 2), MOE_ERR_ALIGN, row_offset);
    REFUSED(d.column_index = (int32_t*)AT(d.column_index, 1), MOE_ERR_ALIGN, column_index);
    REFUSED(d.column_offset = (int32_t*)AT(d.column_offset, 3), MOE_ERR_ALIGN, column_offset);
    REFUSED(d.row_index = (int32_t*)AT(d.row_index, 2), MOE_ERR_ALIGN, row_index);
    REFUSED(d.position = (int32_t*)AT(d.position, 2), MOE_ERR_ALIGN, position);
    REFUSED(d.workspace = AT(d.workspace, 8), MOE_ERR_ALIGN, workspace);
    REFUSED_RANK_AND_FAULT();
    REFUSED(d.row_offset = (int32_t*)AT(d.bytes, 1600), MOE_ERR_OVERLAP, row_offset);
    REFUSED(d.bits = (const uint32_t*)d.bytes; d.bytes = 0;
            d.row_offset = (int32_t*)AT(d.bits, 40 * 2 * 4 - 4), MOE_ERR_OVERLAP, row_offset);
    REFUSED(d.column_index = d.row_offset + 40, MOE_ERR_OVERLAP, column_index);
    REFUSED(d.column_offset = d.column_index, MOE_ERR_OVERLAP, column_offset);
    REFUSED(d.row_index = d.column_index + d.max_blocks - 1, MOE_ERR_OVERLAP, row_index);
    REFUSED(d.position = d.column_offset + 50, MOE_ERR_OVERLAP, position);
    REFUSED(d.position = d.row_index + d.max_blocks - 1, MOE_ERR_OVERLAP, position);
    REFUSED(d.position = d.column_index - (d.max_blocks - 1), MOE_ERR_OVERLAP, position);
    REFUSED(d.fault = (uint64_t*)AT(d.position, (d.max_blocks - 2) / 2 * 8), MOE_ERR_OVERLAP,
            fault);
    REFUSED(d.workspace = (void*)d.position, MOE_ERR_OVERLAP, workspace);
    REFUSED(d.workspace = AT(DOWN_TO(d.bytes, 16), 1024), MOE_ERR_OVERLAP, workspace);
    REFUSED(d.fault = (uint64_t*)AT(d.workspace, 64), MOE_ERR_OVERLAP, fault);

    good = u.d; /* by ids */
    REFUSED(d.ids = 0, MOE_ERR_NULL, bytes);
    REFUSED(d.expert_offset = u.d.ids, MOE_ERR_CONFLICT, expert_offset);
    REFUSED_NUM_EXPERTS();
    REFUSED(d.num_experts = 11, MOE_ERR_CONFLICT, num_experts);
    REFUSED(d.num_experts = 40;
            d.columns = 40 * (d.block_columns / 2), MOE_ERR_CONFLICT, num_experts);
    REFUSED_EACH(top_k, MOE_ERR_RANGE, top_k, 0, MOE_MAX_EXPERTS + 1);
    REFUSED(d.expert_offset = d.ids; d.ids = 0, MOE_ERR_CONFLICT, top_k);
    REFUSED(d.whole_batch = 2, MOE_ERR_OPTION, whole_batch);
    REFUSED(d.ids = (const int32_t*)AT(d.ids, 2), MOE_ERR_ALIGN, ids);
    REFUSED(d.expert_offset = (const int32_t*)AT(d.ids, 1); d.ids = 0;
            d.top_k = 0, MOE_ERR_ALIGN, expert_offset);
    REFUSED(d.row_offset = (int32_t*)AT(d.ids, 796), MOE_ERR_OVERLAP, row_offset);
    REFUSED(d.expert_offset = d.ids; d.ids = 0; d.top_k = 0;
            d.column_index = (int32_t*)AT(d.expert_offset, 40), MOE_ERR_OVERLAP, column_index);

    TEST_CUDA(cudaDeviceSynchronize());
    tlist_check_untouched(&t);
    tlist_check_untouched(&u);
    CHECK(tbuf_holds(&t.workspace, 0), "the workspace was written");
    CHECK_FAULT(&t.word, MOE_FAULT_NONE, 0);
    CHECK_STATUS(moe_block_sparse_list_build(&t.d, test_now.stream), MOE_OK); /* as it was */
    tlist_check(&t, "after refusals");
    CHECK_STATUS(moe_block_sparse_list_build(&u.d, test_now.stream), MOE_OK);
    tlist_check(&u, "after refusals");
    CHECK_STATUS(moe_block_sparse_list_preload(), MOE_OK);
    tlist_free(&t);
    tlist_free(&u);
    free(bytes);
    free(ids);
}

static void block_list_refusals(void) { RUN(test_refusals); }

#endif
