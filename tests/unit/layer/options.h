/* options.h: the options of route and of the gate reach their stations.

     test_layer_route_options  draws padding, capacity by position and by weight, and replicas, each
                               and together, with all optional outputs of both stations
     test_layer_gate_rules     runs every rule of the gate: the choice is that of moe_gate for the
                               same logits, bit for bit, and the stations after it follow it */
#ifndef MOE_TESTS_LAYER_OPTIONS_H
#define MOE_TESTS_LAYER_OPTIONS_H

#include "tests/unit/layer/compare.h"

static void test_layer_route_options(void)
{
    trand r = trand_new(21);
    for (int i = 0; i < 24; ++i) {
        layer_case c = normal_case(47, 64, 40, 6, i % 5 == 4 ? 3 : 2);
        c.from = i % 3;
        c.row_multiple = i & 1 ? (int)trand_int(&r, 2, 70) : 0;
        c.capacity = i & 2 ? (int)trand_int(&r, 1, 20) : 0;
        c.drop_rule = c.capacity ? (int)trand_int(&r, 0, MOE_DROP_BY_WEIGHT) : 0;
        c.replicas = i & 4 ? 6 + (int)trand_int(&r, 0, 5) : 0;
        c.absent = c.replicas ? i >> 3 & 1 : 0;
        c.outputs = i & 8 ? 1 : 0;
        c.bias = (int)trand_int(&r, 0, 1); /* makes rows of padding nonzero */
        c.residual = (int)trand_int(&r, NO_RESIDUAL, RESIDUAL);
        c.shared = i % 7 == 0 ? 24 : 0;
        c.unused = 10;
        if (i / 6 & 1) c.tile = MOE_TILE_128x256;
        run_case(&c, &r);
    }
}

/* Requires the choice and prob_sum that moe_gate gives with the layer's logits and options, and a
   choice or weights that differ from those without the rule. */
static void compare_rule(const layer_bufs* b, const layer_case* c, const tbuf* prob_sum, int rule)
{
    const int slots = c->T * c->K;
    const size_t bytes = (size_t)slots * 4;
    tbuf ids = tbuf_new("ids", bytes, 0), weights = tbuf_new("weights", bytes, 0);
    tbuf prob = tbuf_new("prob_sum", (size_t)c->E * 4, 4), space;
    moe_gate_desc g = b->d.gate;
    moe_layer_view v;
    moe_ref_gate_desc plain = {};
    int32_t* plain_ids = (int32_t*)test_host(slots * 4);
    double *plain_weights = (double*)test_host(slots * 8), most = 0;
    void* copy = tbuf_copy(&b->workspace);
    void *want_ids, *want_weights, *want_prob;
    CHECK_STATUS(moe_layer_get_view(&b->d, &v), MOE_OK);
    g.logits = v.logits, g.ids = (int32_t*)ids.p, g.weights = (float*)weights.p;
    g.expert_count = 0;
    if (g.prob_sum) g.prob_sum = (float*)prob.p;
    g.num_tokens = c->T, g.num_experts = c->E, g.top_k = c->K;
    CHECK_STATUS(moe_gate_workspace(&g, &g.workspace_bytes), MOE_OK);
    space = tbuf_new("workspace", g.workspace_bytes, 0);
    g.workspace = space.p;
    CHECK_STATUS(moe_gate(&g, test_now.stream), MOE_OK);
    want_ids = tbuf_copy(&ids), want_weights = tbuf_copy(&weights), want_prob = tbuf_copy(&prob);
    CHECK(memcmp(in_copy(b, copy, v.ids), want_ids, bytes) == 0 &&
              memcmp(in_copy(b, copy, v.weights), want_weights, bytes) == 0 &&
              tbuf_holds(prob_sum, want_prob),
          "rule %d has not reached the gate", rule);
    plain.logits = c->from == FROM_ROUTER ? in_copy(b, copy, v.logits) : b->h_logits;
    plain.logits_dtype = MOE_FP32;
    plain.num_tokens = c->T, plain.num_experts = c->E, plain.top_k = c->K;
    moe_ref_gate_f64(&plain, plain_ids, plain_weights, 0, 0);
    for (int k = 0; k < slots; ++k)
        if (fabs(plain_weights[k] - ((float*)want_weights)[k]) > most)
            most = fabs(plain_weights[k] - ((float*)want_weights)[k]);
    CHECK(most > 1e-3 || memcmp(plain_ids, want_ids, bytes) != 0, "rule %d changes nothing", rule);
    tbufs_free(TBUFS(&ids, &weights, &prob, &space));
    TFREE(plain_ids, plain_weights, copy, want_ids, want_weights, want_prob);
}

static void test_layer_gate_rules(void)
{
    enum { T = 39, E = 8, K = 2, RULES = 12 };
    static const uint8_t off[E] = {0, 1, 0, 0, 0, 0, 1, 0};
    trand r = trand_new(22);
    for (int rule = 0; rule < RULES; ++rule)
        for (int from = FROM_ROUTER; from <= FROM_LOGITS; ++from) {
            layer_case c = normal_case(T, 64, 40, E, K);
            layer_bufs b;
            float h_bias[E];
            uint8_t token_disabled[T];
            tbuf bias, expert, token, prob_sum = tbuf_new("prob_sum", E * 4, 4);
            c.rules = c.outputs = 1;
            c.from = from;
            c.replicas = rule % 4 == 3 ? E + 2 : 0;
            for (int e = 0; e < E; ++e) h_bias[e] = trand_normal(&r) * 0.2f;
            for (int t = 0; t < T; ++t) token_disabled[t] = trand_int(&r, 0, 3) == 0;
            bias = tbuf_from("expert_bias", h_bias, sizeof h_bias, 4);
            expert = tbuf_from("expert_disabled", off, sizeof off, 1);
            token = tbuf_from("token_disabled", token_disabled, sizeof token_disabled, 1);
            bufs_new(&b, &c, &r);
            set_rule(&b.d.gate, rule, &bias, &expert, &token);
            if (rule & 1) b.d.gate.prob_sum = (float*)prob_sum.p;
            fit_workspace(&b, &c);
            CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
            compare(&b, &c);
            compare_rule(&b, &c, &prob_sum, rule);
            tbufs_free(TBUFS(&bias, &expert, &token, &prob_sum));
            bufs_free(&b);
        }
}

static void layer_options(void)
{
    RUN(test_layer_route_options);
    RUN(test_layer_gate_rules);
}

#endif
