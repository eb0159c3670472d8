/* replay.h: route launched again: the same bits, a captured graph, in one chain with the gate.

   test_route_same_bits    the same bits every run, without options and under each drop rule
   test_route_after_gate   gate and route in one graph, the gate's counts handed over
   test_route_graph        a captured route launched again with other ids */
#ifndef MOE_TESTS_ROUTE_REPLAY_H
#define MOE_TESTS_ROUTE_REPLAY_H

#include "tests/unit/route/case.h"

#include "moe/gate.cuh"

TEST_CALL(call_gate, moe_gate, moe_gate_desc)
TEST_CALL(call_route, moe_route, moe_route_desc)

static void test_route_same_bits(void)
{
    static const int shape[][3] = {{200, 128, 8}, {65, 300, 4}, {100, 5, 33}};
    trand r = trand_new(8);
    for (int i = 0; i < 9; ++i) { /* without options, by position, by weight */
        route_case c = full_case(&r, shape[i % 3][0], shape[i % 3][1], shape[i % 3][2]);
        route_bufs b;
        c.pattern = DUPLICATES;
        c.drops = 1;
        if (i >= 3) {
            c.rule = i / 3;
            c.capacity = c.T * c.K / c.E + 1;
            c.multiple = 8;
        }
        case_new(&b, &c, &r);
        test_same_bits("route", call_route, &b.d, TBUFS(OUTPUTS(&b)), MOE_ON_HOST ? 4 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* Gate and route in a graph that is launched again with other logits. The routing is the one that
   the reference finds from the gate's ids, and the same as without the gate's counts. */
static void test_route_after_gate(void)
{
    static const int shape[][3] = {{97, 64, 8}, {64, 7, 2}, {33, 300, 4}, {40, 50, 40}};
    trand r = trand_new(9);
    for (int i = 0; i < 4; ++i) {
        route_case c = full_case(&r, shape[i][0], shape[i][1], shape[i][2]);
        const int64_t slots = (int64_t)c.T * c.K, n = (int64_t)c.T * c.E;
        int32_t* ids = (int32_t*)test_host(slots * 4);
        float* weights = (float*)test_host(slots * 4);
        float* logits = (float*)test_host(n * 4);
        tbuf bl = tbuf_new("logits", (size_t)n * 4, 0);
        route_bufs b, alone;
        moe_gate_desc gate;
        test_chain both = {{call_gate, call_route}, {&gate, &b.d}};
        tgraph g;
        c.pattern = UNIFORM;
        c.counts = 1;
        fill_ids(ids, &c, &r);
        bufs_new(&b, &c, ids, weights);
        memset(&gate, 0, sizeof gate);
        gate.logits = bl.p;
        gate.ids = (int32_t*)b.ids.p;
        gate.weights = (float*)b.weights.p;
        gate.chunk_count = (int32_t*)b.chunk.p;
        gate.fault = (uint64_t*)b.fault.p;
        gate.rank = TEST_RANK;
        gate.num_tokens = c.T;
        gate.num_experts = c.E;
        gate.top_k = c.K;
        CHECK_STATUS(moe_gate_preload(), MOE_OK);
        CHECK_STATUS(moe_route_preload(), MOE_OK);
        if (tgraph_capture(&g, test_call_chain, &both)) {
            for (int run = 0; run < 3; ++run) {
                trand_fill_normal(&r, logits, n, MOE_FP32);
                tbuf_put(&bl, logits);
                tbufs_poison(TBUFS(OUTPUTS(&b), &b.ids, &b.chunk));
                tgraph_launch(&g);
                tbuf_get(&b.ids, b.h_ids);
                tbuf_get(&b.weights, b.h_weights);
                for (int64_t s = 0; s < slots; ++s) CHECK(b.h_ids[s] >= 0 && b.h_ids[s] < c.E);
                compare(&b, &c);
                c.counts = 0;
                bufs_new(&alone, &c, b.h_ids, b.h_weights);
                launch(&alone, &c);
                bufs_free(&alone);
                c.counts = 1;
            }
            tgraph_free(&g);
        }
        bufs_free(&b);
        tbuf_free(&bl);
        free(ids), free(weights), free(logits);
    }
}

/* A captured route, launched again with every pattern of ids. */
static void graph_case(int rule, int replicas)
{
    enum { T = 90, K = 6 };
    trand r = trand_new(10);
    route_case c = full_case(&r, T, 40, K);
    int32_t ids[T * K];
    float weights[T * K];
    route_bufs b;
    tgraph g;
    test_poison(weights, sizeof weights);
    c.drops = 1;
    c.rule = rule;
    c.capacity = rule ? 14 : 0;
    c.multiple = rule ? 4 : 0;
    c.replicas = replicas;
    if (replicas) {
        c.P = 50;
        fill_replicas(&c, &r);
    }
    fill_ids(ids, &c, &r);
    bufs_new(&b, &c, ids, weights);
    if (tgraph_capture(&g, call_route, &b.d)) {
        CHECK(tbufs_untouched(TBUFS(OUTPUTS(&b))), "capture itself runs nothing");
        for (c.pattern = 0; c.pattern < PATTERNS; ++c.pattern) {
            draw_slots(b.h_ids, b.h_weights, &c, &r);
            tbuf_put(&b.ids, b.h_ids);
            tbuf_put(&b.weights, b.h_weights);
            tfault_put(&b.fault, MOE_FAULT_NONE, 0);
            tbufs_poison(TBUFS(OUTPUTS(&b)));
            tgraph_launch(&g);
            compare(&b, &c);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
    free(c.replica_offset), free(c.replica_expert);
}

static void test_route_graph(void)
{
    for (int rule = 0; rule <= MOE_DROP_BY_WEIGHT; ++rule) graph_case(rule, rule);
}

static void route_replay(void)
{
    RUN(test_route_same_bits);
    RUN(test_route_after_gate);
    RUN(test_route_graph);
}

#endif
