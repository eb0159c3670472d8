/* large.h: block lists of masks and routings of many sparse blocks.

     test_huge   more than 2^31 possible sparse blocks, few of them present; then so many present
                 that 32 bits do not hold their number
     test_large  the largest masks and routings that are common; smaller ones on the CPU */
#ifndef MOE_TESTS_BLOCK_LIST_LARGE_H
#define MOE_TESTS_BLOCK_LIST_LARGE_H

#include "tests/unit/block_list/case.h"

static void test_huge(void)
{
    const int experts = 4096, each = 16384, top_k = 2, RB = 64;
    const int64_t CB = (int64_t)experts * each;
    trand r = trand_new(8);
    tlist t;
    moe_block_sparse_list_desc *d = &t.d, host;
    int32_t* ids = (int32_t*)test_host(RB * 16 * top_k * 4);
    int64_t at = 0;
    memset(&t, 0, sizeof t);
    t.RB = RB;
    d->block_rows = d->block_columns = 16;
    d->rows = RB * 16;
    d->columns = (int32_t)(CB * 16);
    d->num_experts = experts;
    d->top_k = top_k;
    d->max_blocks = 8 * each;
    CHECK((int64_t)RB * CB > 0x7fffffff);
    memset(ids, 0xff, (size_t)(RB * 16 * top_k) * 4); /* -1: unused */
    for (int i = ROW_OFFSET; i <= COLUMN_INDEX; ++i)
        t.want[i] = (int32_t*)test_host(tlist_entries(&t, i, d->max_blocks) * 4);
    for (int i = 0; i < RB; ++i) {
        t.want[ROW_OFFSET][i] = (int32_t)at;
        if (i % 9 == 8 || i == RB - 1) {
            const int e = i == RB - 1 ? experts - 1 : (int)trand_int(&r, 0, experts - 1);
            ids[(i * 16 + trand_int(&r, 0, 15)) * top_k + 1] = e;
            for (int c = 0; c < each; ++c) t.want[COLUMN_INDEX][at++] = e * each + c;
        }
    }
    t.want[ROW_OFFSET][RB] = (int32_t)at;
    host = *d;
    host.ids = ids;
    tlist_device_new(&t, &host, 0);
    CHECK(at == d->max_blocks);
    CHECK_STATUS(moe_block_sparse_list_build(d, test_now.stream), MOE_OK);
    tlist_same(&t.list[ROW_OFFSET], t.want[ROW_OFFSET], RB + 1);
    tlist_same(&t.list[COLUMN_INDEX], t.want[COLUMN_INDEX], at);
    CHECK_FAULT(&t.word, MOE_FAULT_NONE, 0);
    { /* every expert in every row */
        const int64_t all = (int64_t)RB * experts;
        int32_t* more = (int32_t*)test_host(all * 16 * 4);
        tbuf source;
        for (int64_t i = 0; i < all * 16; ++i) more[i] = (int32_t)(i % experts);
        source = tbuf_from("ids", more, (size_t)all * 16 * 4, 0);
        d->ids = (const int32_t*)source.p;
        d->top_k = experts;
        memset(t.want[ROW_OFFSET], 0, RB * 4 + 4);
        tbuf_poison(&t.list[ROW_OFFSET]);
        tbuf_poison(&t.list[COLUMN_INDEX]);
        CHECK_STATUS(moe_block_sparse_list_build(d, test_now.stream), MOE_OK);
        tlist_same(&t.list[ROW_OFFSET], t.want[ROW_OFFSET], RB + 1);
        tlist_same(&t.list[COLUMN_INDEX], 0, 0);
        CHECK_FAULT(&t.word, MOE_FAULT_NO_ROOM, all * each);
        tbuf_free(&source);
        free(more);
    }
    tlist_free(&t);
    free(ids);
}

static void test_large(void)
{
    trand r = trand_new(9);
    const int64_t RB = MOE_ON_HOST ? 1056 : 16384, CB = MOE_ON_HOST ? 1056 : 4096;
    const int64_t rows = MOE_ON_HOST ? 4096 : 262144;
    for (int i = MOE_ON_HOST; i < 2; ++i) {
        moe_block_sparse_list_desc d = tlist_shape(&r, RB, CB);
        uint8_t* bytes = tlist_bytes(&r, RB * CB, 0.1);
        d.bytes = bytes;
        tlist_run(&d, 1, 0, i ? 0 : 1, "large");
        free(bytes);
    }
    {
        moe_block_sparse_list_desc d = tlist_routing(&r, rows, 256, 4);
        int32_t* ids = tlist_ids(&r, rows * 8, 256, 0);
        d.top_k = 8;
        d.ids = ids;
        tlist_run(&d, 1, 0, 0, "many ids");
        free(ids);
    }
}

static void block_list_large(void)
{
    RUN(test_huge);
    RUN(test_large);
}

#endif
