/* replay.h: combine launched again: the same bits, a captured graph, in one chain with route.

   test_combine_same_bits     the same bits every run
   test_combine_after_route   route and combine in one graph, against joined rows added in row order
   test_combine_graph         a captured combine launched again with other places and buffers */
#ifndef MOE_TESTS_COMBINE_REPLAY_H
#define MOE_TESTS_COMBINE_REPLAY_H

#include "tests/unit/combine/case.h"

#include "moe/ref/route.h"
#include "moe/route.cuh"

TEST_CALL(call_route, moe_route, moe_route_desc)
TEST_CALL(call_combine, moe_combine, moe_combine_desc)

static void test_combine_same_bits(void)
{
    trand r = trand_new(9);
    for (int i = 0; i < 4; ++i) {
        combine_case c = normal_case(50, i & 1 ? 250 : 512, i & 2 ? 8 : 33);
        combine_bufs b;
        c.residual = RESIDUAL;
        bufs_new(&b, &c, &r);
        test_same_bits("combine", call_combine, &b.d, TBUFS(&b.y), MOE_ON_HOST ? 5 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

enum { CHAIN_T = 45, CHAIN_E = 6, CHAIN_K = 3, CHAIN_H = 136, CHAIN_SLOTS = CHAIN_T * CHAIN_K };

/* Compares y with what joining all rows (`cat`) and adding them in row order (`index_add`) gives in
   fp32. expert: the rows of each expert. */
static void compare_joined(const float* y, const int32_t* ids, const float* weights,
                           float* const* expert, int run)
{
    enum { T = CHAIN_T, E = CHAIN_E, K = CHAIN_K, H = CHAIN_H };
    float* sum = (float*)test_host(T * H * 4);
    int32_t count[E], offset[E + 1], row_slot[CHAIN_SLOTS];
    double largest = 0, worst = 0;
    moe_ref_route_desc d;
    memset(&d, 0, sizeof d);
    d.ids = ids;
    d.expert_count = count;
    d.expert_offset = offset;
    d.row_slot = row_slot;
    d.num_tokens = T;
    d.num_experts = E;
    d.top_k = K;
    moe_ref_route(&d);
    memset(sum, 0, T * H * 4);
    for (int e = 0; e < E; ++e)
        for (int row = offset[e]; row < offset[e + 1]; ++row)
            for (int h = 0; h < H; ++h)
                sum[row_slot[row] / K * H + h] +=
                    weights[row_slot[row]] * expert[e][(row - offset[e]) * H + h];
    for (int i = 0; i < T * H; ++i) {
        const double error = fabs((double)y[i] - (double)sum[i]);
        if (!(error <= worst)) worst = error;
        if (fabs((double)sum[i]) > largest) largest = fabs((double)sum[i]);
    }
    CHECK(largest > 0.5 && worst < 1e-6, "run %d: error %g of %g", run, worst, largest);
    free(sum);
}

/* Experts in allocations of their own, places from route, everything in a graph whose routing
   changes between launches. */
static void test_combine_after_route(void)
{
    enum { T = CHAIN_T, E = CHAIN_E, K = CHAIN_K, H = CHAIN_H, SLOTS = CHAIN_SLOTS };
    trand r = trand_new(10);
    int32_t ids[SLOTS];
    float weights[SLOTS];
    float* expert[E];
    tbuf buffer[E], bi = tbuf_new("ids", SLOTS * 4, 0), bw = tbuf_new("weights", SLOTS * 4, 0);
    tbuf bt, bc = tbuf_new("count", E * 4, 0), bo = tbuf_new("offset", E * 4 + 4, 0);
    tbuf bp = tbuf_new("place", SLOTS * 8, 0), by = tbuf_new("y", T * H * 4, 0);
    tbuf bs, bf = tfault_new(0);
    void* address[E];
    moe_route_desc route;
    moe_combine_desc combine;
    test_chain both = {{call_route, call_combine}, {&route, &combine}};
    tgraph g;
    for (int e = 0; e < E; ++e) {
        expert[e] = (float*)draw_rows(&r, SLOTS, H, H, MOE_FP32);
        buffer[e] = tbuf_from("expert", expert[e], SLOTS * H * 4, 0);
        address[e] = buffer[e].p;
    }
    bt = tbuf_from("table", address, sizeof address, 0);
    memset(&route, 0, sizeof route);
    route.ids = (const int32_t*)bi.p;
    route.expert_count = (int32_t*)bc.p;
    route.expert_offset = (int32_t*)bo.p;
    route.place = (moe_place*)bp.p;
    route.place_kind = MOE_PLACE_BY_EXPERT;
    route.fault = (uint64_t*)bf.p;
    route.rank = TEST_RANK;
    route.num_tokens = T;
    route.num_experts = E;
    route.top_k = K;
    CHECK_STATUS(moe_route_workspace(&route, &route.workspace_bytes), MOE_OK);
    bs = tbuf_new("workspace", route.workspace_bytes, 0);
    route.workspace = bs.p;
    memset(&combine, 0, sizeof combine);
    combine.table = (const void* const*)bt.p;
    combine.num_buffers = E;
    combine.place = (const moe_place*)bp.p;
    combine.weights = (const float*)bw.p;
    combine.rows_dtype = MOE_FP32;
    combine.y = by.p;
    combine.fault = (uint64_t*)bf.p;
    combine.rank = TEST_RANK;
    combine.num_tokens = T;
    combine.hidden = H;
    combine.top_k = K;
    CHECK_STATUS(moe_route_preload(), MOE_OK);
    CHECK_STATUS(moe_combine_preload(), MOE_OK);
    if (tgraph_capture(&g, test_call_chain, &both)) {
        for (int run = 0; run < 4; ++run) {
            float* y;
            for (int s = 0; s < SLOTS; ++s) {
                ids[s] = (int32_t)trand_int(&r, run == 3 ? -1 : 0, run == 1 ? 1 : E - 1);
                weights[s] = (float)trand_int(&r, 1, 99) / (100.0f * K);
            }
            tbuf_put(&bi, ids);
            tbuf_put(&bw, weights);
            tbufs_poison(TBUFS(&bp, &by));
            tgraph_launch(&g);
            y = (float*)tbuf_copy(&by);
            compare_joined(y, ids, weights, expert, run);
            CHECK_FAULT(&bf, MOE_FAULT_NONE, 0);
            free(y);
        }
        tgraph_free(&g);
    }
    for (int e = 0; e < E; ++e) {
        tbuf_free(&buffer[e]);
        free(expert[e]);
    }
    tbufs_free(TBUFS(&bi, &bw, &bt, &bc, &bo, &bp, &by, &bs, &bf));
}

/* A captured combine, launched again with other places and other buffers in the table. */
static void test_combine_graph(void)
{
    trand r = trand_new(11);
    combine_case c = normal_case(33, 200, 6);
    combine_bufs b;
    tgraph g;
    bufs_new(&b, &c, &r);
    if (tgraph_capture(&g, call_combine, &b.d)) {
        CHECK(tbuf_holds(&b.y, 0), "capture itself runs nothing");
        for (int run = 0; run < 4; ++run) {
            void *host = b.row[run], *address[MOST_BUFFERS];
            tbuf buffer = b.buffer[run];
            b.row[run] = b.row[6]; /* two entries change places */
            b.row[6] = host;
            b.buffer[run] = b.buffer[6];
            b.buffer[6] = buffer;
            for (int i = 0; i < b.count; ++i) address[i] = b.buffer[i].p;
            c.bad = run == 2 ? 10 : 0;
            fill_places(&b, &c, &r);
            tbuf_put(&b.table, address);
            put_places(&b);
            tfault_put(&b.fault, MOE_FAULT_NONE, 0);
            tbuf_poison(&b.y);
            tgraph_launch(&g);
            compare(&b, &c);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
}

static void combine_replay(void)
{
    RUN(test_combine_same_bits);
    RUN(test_combine_after_route);
    RUN(test_combine_graph);
}

#endif
