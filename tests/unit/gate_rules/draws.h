/* draws.h: what is drawn, and what repeats

   test_draws           noise is normal, dropout as often as said; another seed draws other numbers
   test_bits_and_graph  the same bits every run; a captured gate draws anew by seed_offset
   test_no_tokens       T = 0 */
#ifndef MOE_TESTS_GATE_RULES_DRAWS_H
#define MOE_TESTS_GATE_RULES_DRAWS_H

#include "tests/unit/gate_rules/case.h"

/* The noise is normal and the dropout as often as said; another seed draws other numbers. */
static void test_draws(void)
{
    enum { T = 400, E = 64 };
    rules_case c = plain_case(T, E, 1);
    rules_bufs b;
    trand r = trand_new(8);
    double sum = 0, squares = 0, fourth = 0;
    int dropped = 0, same = 0;
    int32_t *first, *second;
    c.options.noise = 1.0f;
    c.options.dropout = 0.3f;
    c.options.seed = trand_bits(&r);
    bufs_new(&b, &c, &r);
    for (int64_t t = 0; t < T; ++t)
        for (int e = 0; e < E; ++e) {
            const double n = moei_ref_normal_f64(&b.host, t, e);
            sum += n, squares += n * n, fourth += n * n * n * n;
            dropped += moei_ref_dropped(&b.host, t, e);
        }
    CHECK(fabs(sum / (T * E)) < 0.03, "mean %g", sum / (T * E));
    CHECK(fabs(squares / (T * E) - 1) < 0.05, "variance %g", squares / (T * E));
    CHECK(fabs(fourth / (T * E) - 3) < 0.5, "fourth moment %g", fourth / (T * E));
    CHECK(fabs(dropped / (double)(T * E) - 0.3) < 0.02, "%d of %d dropped", dropped, T * E);
    CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
    compare(&b, &c);
    first = (int32_t*)tbuf_copy(&b.ids);
    b.device.seed += 1;
    b.host.seed += 1;
    CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
    compare(&b, &c);
    second = (int32_t*)tbuf_copy(&b.ids);
    for (int t = 0; t < T; ++t) same += first[t] == second[t];
    CHECK(same < T / 2, "%d of %d tokens chose alike under two seeds", same, T);
    free(first);
    free(second);
    bufs_free(&b);
}

/* The same bits every run; a captured gate draws anew when its seed_offset changes. */
static void test_bits_and_graph(void)
{
    trand r = trand_new(9);
    for (int i = 0; i < SHAPES; ++i) {
        rules_case c = plain_case(shapes[i][0], shapes[i][1], shapes[i][2]);
        const uint64_t no_fault = 0;
        rules_bufs b;
        tgraph g;
        c.options.score = 1 + i % MOE_SCORE_PIONEER;
        c.options.noise = 0.3f;
        c.options.dropout = 0.1f;
        c.bias = c.expert_disabled = c.token_disabled = c.prob = c.z = c.seed_offset = 1;
        if (i % 3 == 2) {
            c.options.whole_batch = 1;
            c.options.noise = c.options.dropout = 0;
            c.bias = 0;
        }
        bufs_new(&b, &c, &r);
        test_same_bits("gate", call_gate, &b.device,
                       TBUFS(&b.ids, &b.weights, &b.count, &b.chunk, &b.prob, &b.z),
                       MOE_ON_HOST ? 3 : 100);
        compare(&b, &c);
        if (tgraph_capture(&g, call_gate, &b.device)) {
            for (int n = 0; n < 3; ++n) {
                fill(&b, &c, &r);
                put(&b);
                tbuf_put(&b.fault, &no_fault);
                tbuf_poison(&b.ids);
                tbuf_poison(&b.prob);
                tbuf_poison(&b.z);
                tgraph_launch(&g);
                compare(&b, &c);
            }
            tgraph_free(&g);
        }
        bufs_free(&b);
    }
}

static void test_no_tokens(void)
{
    rules_case c = plain_case(0, 17, 3);
    trand r = trand_new(10);
    rules_bufs b;
    float zeros[17];
    memset(zeros, 0, sizeof zeros);
    c.prob = c.z = c.bias = 1;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b.prob, zeros) && tbuf_holds(&b.z, zeros) && tbuf_holds(&b.count, zeros),
          "sums of nothing");
    bufs_free(&b);
}

static void gate_rules_draws(void)
{
    RUN(test_draws);
    RUN(test_bits_and_graph);
    RUN(test_no_tokens);
}

#endif
