/* replay.h: a graph, and route before the scatter

   test_scatter_graph        a graph replayed with other rows, tokens and counts
   test_scatter_after_route  the maps that route writes */
#ifndef MOE_TESTS_COMBINE_SCATTER_REPLAY_H
#define MOE_TESTS_COMBINE_SCATTER_REPLAY_H

#include "tests/unit/combine_scatter/case.h"

TEST_CALL(call_scatter, moe_combine_scatter, moe_combine_scatter_desc)

/* A captured graph replayed with other rows, tokens and counts. */
static void test_scatter_graph(void)
{
    trand r = trand_new(10);
    scatter_case c = normal_case(40, 264, 7, 20);
    scatter_bufs b;
    tgraph g;
    c.y_dtype = MOE_FP32;
    c.by = BY_BOTH;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_combine_scatter_preload(), MOE_OK);
    if (tgraph_capture(&g, call_scatter, &b.d)) {
        for (int i = 0; i < 3; ++i) {
            for (int e = 0; e < c.E; ++e)
                b.h_count[e] = (int)trand_int(&r, 0, b.h_offset[e + 1] - b.h_offset[e]);
            fill_rows(&b, &c, &r);
            tbuf_put(&b.count, b.h_count);
            tbuf_put(&b.index, b.h_index);
            tbuf_put(&b.weight, b.h_weight);
            tbuf_put(&b.y, b.h_y);
            tgraph_launch(&g);
            compare(&b, &c, -1);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
}

/* What route writes fits as it is. */
static void test_scatter_after_route(void)
{
    enum { T = 37, K = 3, E = 5, H = 48, R = T * K };
    trand r = trand_new(11);
    scatter_case c = normal_case(T, H, E, 0);
    moe_route_desc route;
    moe_combine_scatter_desc d;
    float *weights = (float*)test_host(R * 4), *y0 = (float*)test_host(T * H * 4), *got;
    int32_t* ids = (int32_t*)test_host(R * 4);
    void* rows;
    tbuf b_ids, b_weights, b_count, b_offset, b_slot, b_row_slot, b_row_weight, b_rows, b_y, b_work;
    double worst = 0;
    int32_t* row_slot;
    for (int i = 0; i < R; ++i) {
        ids[i] = (int32_t)trand_int(&r, -1, E - 1);
        weights[i] = trand_normal(&r);
    }
    for (int i = 0; i < T * H; ++i) y0[i] = trand_normal(&r);
    rows = new_rows(&c, &r, R, H, MOE_BF16);
    memset(&route, 0, sizeof route);
    route.num_tokens = T, route.num_experts = E, route.top_k = K;
    CHECK_STATUS(moe_route_workspace(&route, &route.workspace_bytes), MOE_OK);
    b_ids = tbuf_from("ids", ids, R * 4, 0);
    b_weights = tbuf_from("weights", weights, R * 4, 0);
    b_count = tbuf_new("expert_count", E * 4, 0);
    b_offset = tbuf_new("expert_offset", E * 4 + 4, 0);
    b_slot = tbuf_new("slot_row", R * 4, 0);
    b_row_slot = tbuf_new("row_slot", R * 4, 0);
    b_row_weight = tbuf_new("row_weight", R * 4, 0);
    b_rows = tbuf_from("rows", rows, R * H * 2, 0);
    b_y = tbuf_from("y", y0, T * H * 4, 0);
    b_work = tbuf_new("workspace", route.workspace_bytes, 0);
    route.ids = (const int32_t*)b_ids.p;
    route.weights = (const float*)b_weights.p;
    route.expert_count = (int32_t*)b_count.p;
    route.expert_offset = (int32_t*)b_offset.p;
    route.slot_row = (int32_t*)b_slot.p;
    route.row_slot = (int32_t*)b_row_slot.p;
    route.row_weight = (float*)b_row_weight.p;
    route.workspace = b_work.p;
    CHECK_STATUS(moe_route(&route, test_now.stream), MOE_OK);
    memset(&d, 0, sizeof d);
    d.rows = b_rows.p;
    d.expert_offset = route.expert_offset;
    d.row_slot = route.row_slot;
    d.row_weight = route.row_weight;
    d.top_k = K;
    d.y = b_y.p;
    d.y_dtype = MOE_FP32;
    d.num_tokens = T, d.hidden = H, d.num_experts = E, d.num_rows = R;
    CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
    got = (float*)tbuf_copy(&b_y);
    row_slot = (int32_t*)tbuf_copy(&b_row_slot);
    for (int h = 0; h < H; ++h)
        for (int t = 0; t < T; ++t) {
            double want = y0[t * H + h];
            for (int i = 0; i < R; ++i)
                if (row_slot[i] >= 0 && row_slot[i] / K == t)
                    want += (double)weights[row_slot[i]] * moe_load(rows, i * H + h, MOE_BF16);
            if (!(fabs(got[t * H + h] - want) <= worst)) worst = fabs(got[t * H + h] - want);
        }
    CHECK(worst <= 1e-5, "error %g", worst);
    CHECK(memcmp(got, y0, T * H * 4) != 0, "y has not changed");
    tbufs_free(TBUFS(&b_ids, &b_weights, &b_count, &b_offset, &b_slot, &b_row_slot, &b_row_weight,
                     &b_rows, &b_y, &b_work));
    free(weights), free(y0), free(ids), free(rows), free(got), free(row_slot);
}

static void combine_scatter_replay(void)
{
    RUN(test_scatter_graph);
    RUN(test_scatter_after_route);
}

#endif
