/* replay.h: block lists built again: many runs, graphs, calls after a fault.

     test_repeats     every run gives the same bits
     test_graph       a graph replayed with other masks and with other routing, without room too
     test_stop_fault  a call after a stop fault writes nothing, after a data fault everything; calls
                      without a fault word */
#ifndef MOE_TESTS_BLOCK_LIST_REPLAY_H
#define MOE_TESTS_BLOCK_LIST_REPLAY_H

#include "tests/unit/block_list/case.h"

static void test_repeats(void)
{
    trand r = trand_new(10);
    moe_block_sparse_list_desc d = tlist_shape(&r, 150, 90);
    uint8_t* bytes = tlist_bytes(&r, 150 * 90, 0.3);
    tlist t;
    tbufs out = {};
    d.bytes = bytes;
    t = tlist_new(&d, 1, 0, -1, 0);
    for (int i = 0; i < LISTS; ++i) out.at[i] = &t.list[i];
    test_same_bits("list", tlist_call, &t.d, out, MOE_ON_HOST ? 10 : 100);
    tlist_check(&t, "after many runs");
    tlist_free(&t);
    free(bytes);
}

/* Replays a graph with four sources. The room is for 60 % of all sparse blocks: the last
   mask has more. */
static void test_graph(void)
{
    trand r = trand_new(11);
    for (int routed = 0; routed < 3; ++routed) {
        const int RB = 50, CB = 75, experts = 25;
        moe_block_sparse_list_desc d = tlist_shape(&r, RB, CB);
        void* source[4];
        tlist t;
        tgraph g;
        for (int i = 0; i < 4; ++i)
            source[i] = routed == 0   ? (void*)tlist_bytes(&r, RB * CB, 0.1 + 0.2 * i)
                        : routed == 1 ? (void*)tlist_ids(&r, 800, experts, 0)
                                      : (void*)tlist_offsets(&r, 400, experts);
        if (routed) d = tlist_routing(&r, 400, experts, 3);
        if (routed == 1) d.top_k = 2;
        for (int i = 0; i < 4; ++i) {
            if (routed == 0) d.bytes = (const uint8_t*)source[i];
            else if (routed == 1) d.ids = (const int32_t*)source[i];
            else d.expert_offset = (const int32_t*)source[i];
            if (i == 0) {
                t = tlist_new(&d, 1, 0, routed == 0 ? RB * CB * 6 / 10 : RB * CB, 0);
                if (!tgraph_capture(&g, tlist_call, &t.d)) return;
            }
            tbuf_put(&t.source, source[i]);
            tlist_expect(&t, &d, t.d.max_blocks);
            tlist_poison(&t);
            tgraph_launch(&g);
            tlist_check(&t, "replayed");
        }
        tgraph_free(&g);
        tlist_free(&t);
        for (int i = 0; i < 4; ++i) free(source[i]);
    }
}

static void test_stop_fault(void)
{
    trand r = trand_new(12);
    static const int codes[] = {MOE_FAULT_BAD_OFFSET,       MOE_FAULT_BAD_TABLE,
                                MOE_FAULT_BAD_SPARSE_BLOCK, MOE_FAULT_NO_ROOM,
                                MOE_FAULT_NAN_LOGIT,        MOE_FAULT_BAD_ID};
    for (int i = 0; i < 12; ++i) {
        const int stops = codes[i / 2] <= MOE_FAULT_LAST_STOP;
        moe_block_sparse_list_desc d = tlist_routing(&r, 300, 30, 2);
        int32_t* source = i & 1 ? tlist_ids(&r, 600, 30, 0) : tlist_offsets(&r, 300, 30);
        uint64_t word = MOEI_FAULT_KEY(codes[i / 2], TEST_RANK, 77);
        tlist t;
        if (i & 1) d.ids = source, d.top_k = 2;
        else d.expert_offset = source;
        t = tlist_new(&d, 1, 0, -1, 0);
        tbuf_put(&t.word, &word);
        CHECK_STATUS(moe_block_sparse_list_build(&t.d, test_now.stream), MOE_OK);
        if (stops) {
            tlist_check_untouched(&t);
            CHECK_FAULT(&t.word, codes[i / 2], 77);
        } else {
            t.fault.code = codes[i / 2];
            t.fault.index = 77;
            tlist_check(&t, "after a data fault");
        }
        tlist_free(&t);
        free(source);
    }
    for (int i = 0; i < 3; ++i) { /* without a fault word: good offsets, bad ones, no room */
        moe_block_sparse_list_desc d = tlist_routing(&r, 300, 30, 2);
        int32_t* source = tlist_offsets(&r, 300, 30);
        tlist t;
        d.expert_offset = source;
        if (i == 1) source[9] = -5;
        else source[0] = 0, source[1] = source[1] > 0 ? source[1] : 0, source[30] = 300;
        t = tlist_new(&d, 1, i == 2 ? -1 : 0, -1, 0);
        t.d.fault = 0;
        CHECK_STATUS(moe_block_sparse_list_build(&t.d, test_now.stream), MOE_OK);
        t.fault.code = MOE_FAULT_NONE;
        t.fault.index = 0;
        tlist_check(&t, "no fault word");
        tlist_free(&t);
        free(source);
    }
}

static void block_list_replay(void)
{
    RUN(test_repeats);
    RUN(test_graph);
    RUN(test_stop_fault);
}

#endif
