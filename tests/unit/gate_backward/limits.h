/* limits.h: NaN, infinities, ids out of range, other tokens, repeated runs, graphs

   test_infinities  infinite and huge logits: no NaN; -inf has gradient 0
   test_by_hand     rows with +inf, worked out by hand
   test_nan         a NaN in a logit, in a gradient: its own token alone
   test_alone       a token's bits do not depend on the other tokens
   test_bad_ids     ids out of range are unused and set the fault word
   test_stopped     after a stop fault nothing is written
   test_bits        the same bits every run
   test_graph       a captured gate and its gradients, replayed with other logits
   test_far_apart   rows past 2^32 elements */
#ifndef MOE_TESTS_GATE_BACKWARD_LIMITS_H
#define MOE_TESTS_GATE_BACKWARD_LIMITS_H

#include "tests/unit/gate_backward/values.h"

/* Reads the gradients of a case of dense fp32 rows. */
static float* back_got(const back_bufs* b) { return (float*)tbuf_copy(&b->dlogits); }

static void test_back_infinities(void)
{
    static const float values[] = {INFINITY, -INFINITY, 3e38f, -3e38f, 1e20f, 0.0f, 1.0f};
    trand r = trand_new(51);
    for (int i = 0; i < BACK_SHAPES; ++i)
        for (int score = 1; score <= MOE_SCORE_QUADRATIC; ++score)
            for (int n = 0; n < 8; ++n) {
                back_case c = back_plain(5, back_shapes[i][1], back_shapes[i][2]);
                back_bufs b;
                float *got, *logits;
                const int64_t all = (int64_t)c.gate.T * c.gate.E;
                c.gate.options.score = score;
                c.gate.options.renormalize = n & 1;
                c.balance = n >> 1 & 1;
                c.by_z = n >> 2 & 1;
                c.gate.expert_disabled = 1;
                back_new(&b, &c, &r);
                logits = (float*)b.gate.logits;
                for (int64_t k = 0; k < all; ++k) logits[k] = values[trand_int(&r, 0, 6)];
                put(&b.gate);
                CHECK_STATUS(moe_gate(&b.gate.device, test_now.stream), MOE_OK);
                back_fill(&b, &c, &r);
                CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
                got = back_got(&b);
                for (int64_t k = 0; k < all; ++k) {
                    CHECK(got[k] == got[k], "logit %g has gradient NaN, score %d",
                          (double)logits[k], score);
                    if (logits[k] == -INFINITY && score != MOE_SCORE_QUADRATIC)
                        CHECK(got[k] == 0, "-inf has gradient %g", (double)got[k]);
                }
                back_compare(&b, &c, 0, 0);
                free(got);
                back_free(&b);
            }
}

/* Runs gradients of one row written by hand, and requires want [E]. */
static void check_back_row(const char* what, moe_gate_desc o, const float* dweights,
                           const float* losses, const float* want)
{
    const int E = o.num_experts, K = o.top_k;
    moe_gate_backward_desc d;
    tbuf l = tbuf_from("logits", o.logits, (size_t)E * 4, 0),
         ids = tbuf_new("ids", (size_t)K * 4, 0);
    tbuf weights = tbuf_new("weights", (size_t)K * 4, 0),
         out = tbuf_new("dlogits", (size_t)E * 4, 0);
    tbuf g = tbuf_from("dweights", dweights, (size_t)K * 4, 0), fault = tfault_new(0), c;
    float* got;
    memset(&d, 0, sizeof d);
    memset(&c, 0, sizeof c);
    o.logits = l.p, o.ids = (int32_t*)ids.p, o.weights = (float*)weights.p;
    o.fault = (uint64_t*)fault.p, o.rank = TEST_RANK;
    CHECK_STATUS(moe_gate(&o, test_now.stream), MOE_OK);
    d.gate = o;
    d.dweights = (const float*)g.p;
    if (losses) {
        c = tbuf_from("balance_grad", losses, (size_t)E * 4 + 4, 0);
        d.balance_grad = (const float*)c.p;
    }
    d.dlogits = out.p;
    CHECK_STATUS(moe_gate_backward(&d, test_now.stream), MOE_OK);
    got = (float*)tbuf_copy(&out);
    for (int e = 0; e < E; ++e)
        CHECK(got[e] == want[e] || fabsf(got[e] - want[e]) <= 1e-6f * (1 + fabsf(want[e])),
              "%s, expert %d: %g, not %g", what, e, (double)got[e], (double)want[e]);
    CHECK_FAULT(&fault, MOE_FAULT_NONE, 0);
    free(got);
    tbufs_free(TBUFS(&l, &ids, &weights, &out, &g, &fault, &c));
}

static void test_by_hand(void)
{
    static const float inf2[] = {INFINITY, 1, INFINITY, -INFINITY}, g[] = {3, 1, 5, 7};
    static const float one[] = {2, 2}, far[] = {60, -60}, low[] = {-300, -300};
    static const float quarter[] = {0.5f, -0.5f}, none[] = {0, 0, 0, 0}, nothing[] = {0, 0};
    static const float z[] = {0, 0, 0, 0, 1}, by_z[] = {INFINITY, 0, INFINITY, 0};
    static const float share[] = {0.5f, 0, -0.5f, 0}, all_minus[] = {-INFINITY, -INFINITY};
    static const float tail[] = {8.7565108e-27f, -8.7565108e-27f},
                       lse2[] = {1.34657359f, 1.34657359f};
    static const float balance[] = {4, 0, 0}, even[] = {1, -1}, only_z[] = {0, 0, 1};
    static const float unequal[] = {1, 0}, sparse[] = {0, 0}, gap[] = {0.25f, 0};
    static const float spread[] = {1, -1}, pair[] = {1, 0, -1, 0}, twice[] = {2, -2};
    /* two +inf share: s = (1/2, 0, 1/2, 0), g of the choices 0 and 2 is 3 and 1 */
    check_back_row("softmax, +inf", rows(inf2, 1, 4, 2, MOE_SCORE_SOFTMAX), g, 0, share);
    check_back_row("top-k softmax, +inf", rows(inf2, 1, 4, 2, MOE_SCORE_TOPK_SOFTMAX), g, 0, share);
    check_back_row("sparsemax, +inf", rows(inf2, 1, 4, 2, MOE_SCORE_SPARSEMAX), g, 0, pair);
    check_back_row("sigmoid, +inf", rows(inf2, 1, 4, 2, MOE_SCORE_SIGMOID), g, 0, none);
    check_back_row("z of +inf", rows(inf2, 1, 4, 2, MOE_SCORE_TOPK_SOFTMAX), none, z, by_z);
    check_back_row("one +inf: saturated", rows(inf2, 1, 2, 1, MOE_SCORE_SOFTMAX), g, 0, nothing);
    check_back_row("nothing is seen", rows(all_minus, 1, 2, 1, MOE_SCORE_SOFTMAX), g, z, nothing);
    /* equal logits: s = (1/2, 1/2) */
    check_back_row("softmax", rows(one, 1, 2, 2, MOE_SCORE_SOFTMAX), g, 0, quarter);
    check_back_row("quadratic: times 2 q", rows(one, 1, 2, 2, MOE_SCORE_QUADRATIC), g, 0, twice);
    check_back_row("balance", rows(one, 1, 2, 2, MOE_SCORE_SOFTMAX), nothing, balance, even);
    check_back_row("sigmoid's balance", rows(low, 1, 2, 2, MOE_SCORE_SIGMOID), nothing, balance,
                   even);
    check_back_row("z: lse / 2", rows(one, 1, 2, 2, MOE_SCORE_SIGMOID), nothing, only_z, lse2);
    /* 1 - sigmoid(60) = 8.8e-27: no cancellation */
    check_back_row("sigmoid far out", rows(far, 1, 2, 2, MOE_SCORE_SIGMOID), spread, 0, tail);
    /* sparsemax of (1/4, 0): s = (5/8, 3/8), both in the support */
    check_back_row("sparsemax", rows(gap, 1, 2, 2, MOE_SCORE_SPARSEMAX), spread, 0, even);
    check_back_row("sparsemax, one of two", rows(unequal, 1, 2, 1, MOE_SCORE_SPARSEMAX), g, 0,
                   sparse);
}

/* Requires that row t of both has the same bits. */
static void same_row(const float* a, const float* b, int t, int E, const char* what)
{
    CHECK(memcmp(a + (int64_t)t * E, b + (int64_t)t * E, (size_t)E * 4) == 0,
          "%s: token %d changed", what, t);
}

static void test_back_nan(void)
{
    trand r = trand_new(52);
    for (int i = 0; i < BACK_SHAPES; ++i)
        for (int score = 1; score <= MOE_SCORE_PIONEER; ++score)
            for (int n = 0; n < 4; ++n) {
                back_case c =
                    back_plain(back_shapes[i][0] < 8 ? 5 : 9, back_shapes[i][1], back_shapes[i][2]);
                const int T = c.gate.T, E = c.gate.E, K = c.gate.K,
                          bad = (int)trand_int(&r, 0, T - 1);
                back_bufs b;
                float *clean, *with_grad, *with_logit;
                int32_t* ids;
                int64_t slot = -1;
                int found = 0;
                c.gate.options.score = score;
                c.gate.options.renormalize = n & 1;
                c.balance = c.by_z = n >> 1;
                back_new(&b, &c, &r);
                CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
                clean = back_got(&b);
                ids = (int32_t*)tbuf_copy(&b.gate.ids);
                for (int k = 0; k < K; ++k)
                    if (ids[(int64_t)bad * K + k] >= 0) slot = (int64_t)bad * K + k;
                if (!CHECK(slot >= 0, "token %d chose nothing", bad)) continue;
                b.dweights[slot] = NAN;
                tbuf_put(&b.d_dweights, b.dweights);
                CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
                with_grad = back_got(&b);
                for (int e = 0; e < E; ++e)
                    found += with_grad[(int64_t)bad * E + e] != with_grad[(int64_t)bad * E + e];
                CHECK(found > 0, "a NaN gradient does not show: score %d", score);
                ((float*)b.gate.logits)[(int64_t)bad * E + trand_int(&r, 0, E - 1)] = NAN;
                put(&b.gate);
                CHECK_STATUS(moe_gate(&b.gate.device, test_now.stream), MOE_OK);
                CHECK_FAULT(&b.gate.fault, MOE_FAULT_NAN_LOGIT, bad);
                CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
                with_logit = back_got(&b);
                for (int t = 0; t < T; ++t) {
                    if (t != bad) same_row(clean, with_grad, t, E, "NaN in dweights");
                    if (t != bad) same_row(clean, with_logit, t, E, "NaN in logits");
                }
                for (int e = 0; e < E; ++e)
                    CHECK(with_logit[(int64_t)bad * E + e] == 0,
                          "a token with a NaN has gradient %g",
                          (double)with_logit[(int64_t)bad * E + e]);
                free(clean), free(with_grad), free(with_logit), free(ids);
                back_free(&b);
            }
}

/* Changes all tokens but one to others: ordinary, infinite, far apart. */
static void test_alone(void)
{
    trand r = trand_new(53);
    for (int i = 0; i < BACK_SHAPES; ++i)
        for (int score = 1; score <= MOE_SCORE_PIONEER; ++score) {
            back_case c =
                back_plain(back_shapes[i][0] < 8 ? 5 : 9, back_shapes[i][1], back_shapes[i][2]);
            const int T = c.gate.T, E = c.gate.E, own = (int)trand_int(&r, 0, T - 1);
            back_bufs b;
            float* first;
            c.gate.options.score = score;
            c.gate.options.renormalize = i & 1;
            c.gate.options.noise = score == MOE_SCORE_SOFTMAX ? 0.2f : 0.0f;
            c.balance = c.by_z = (i + score) & 1;
            back_new(&b, &c, &r);
            CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
            first = back_got(&b);
            for (int n = 0; n < 3; ++n) {
                float* again;
                for (int64_t k = 0; k < (int64_t)T * E; ++k)
                    if (k / E != own)
                        ((float*)b.gate.logits)[k] = n == 0                ? trand_normal(&r)
                                                     : n == 1              ? 50 * trand_normal(&r)
                                                     : trand_one_in(&r, 5) ? INFINITY
                                                                           : 1.0f;
                put(&b.gate);
                CHECK_STATUS(moe_gate(&b.gate.device, test_now.stream), MOE_OK);
                CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
                again = back_got(&b);
                same_row(first, again, own, E, "other tokens");
                free(again);
            }
            free(first);
            back_free(&b);
        }
}

static void test_bad_ids(void)
{
    static const int32_t bad[] = {-2, INT32_MIN, INT32_MAX, 0 /* E */};
    trand r = trand_new(54);
    for (int i = 0; i < BACK_SHAPES; ++i)
        for (int n = 0; n < 8; ++n) {
            back_case c = back_plain(back_shapes[i][0], back_shapes[i][1], back_shapes[i][2]);
            const int64_t slots = (int64_t)c.gate.T * c.gate.K;
            int64_t first = -1;
            int32_t *ids, *unused;
            back_bufs b;
            c.gate.options.score = 1 + n % MOE_SCORE_PIONEER;
            c.gate.options.renormalize = n & 1;
            c.balance = n >> 1 & 1;
            back_new(&b, &c, &r);
            ids = (int32_t*)tbuf_copy(&b.gate.ids);
            unused = (int32_t*)tbuf_copy(&b.gate.ids);
            for (int64_t s = 0; s < slots; ++s)
                if (trand_one_in(&r, 7)) {
                    const int64_t k = trand_int(&r, 0, 3);
                    ids[s] = k == 3 ? c.gate.E : bad[k];
                    unused[s] = -1;
                    if (first < 0) first = s;
                }
            tbuf_put(&b.gate.ids, ids);
            CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
            CHECK_FAULT(&b.gate.fault, first < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_ID,
                        first < 0 ? 0 : first);
            { /* the same as with -1 */
                float* got = back_got(&b);
                tbuf_put(&b.gate.ids, unused);
                CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
                CHECK(tbuf_holds(&b.dlogits, got), "an id out of range is not as -1");
                free(got);
            }
            free(ids), free(unused);
            back_free(&b);
        }
}

static void test_back_stopped(void)
{
    trand r = trand_new(55);
    for (int i = 0; i < BACK_SHAPES; ++i)
        for (int balance = 0; balance < 2; ++balance) {
            const uint64_t word = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 4);
            back_case c = back_plain(back_shapes[i][0], back_shapes[i][1], back_shapes[i][2]);
            back_bufs b;
            c.balance = balance;
            c.gate.options.renormalize = 1;
            back_new(&b, &c, &r);
            tbuf_put(&b.gate.fault, &word);
            CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
            CHECK(tbuf_holds(&b.dlogits, 0), "the gradients ran on after a stop fault");
            CHECK_FAULT(&b.gate.fault, MOE_FAULT_BAD_OFFSET, 4);
            back_free(&b);
        }
}

static void test_bits(void)
{
    trand r = trand_new(56);
    for (int i = 0; i < BACK_SHAPES; ++i)
        for (int score = 1; score <= MOE_SCORE_PIONEER; ++score) {
            back_case c = back_plain(back_shapes[i][0], back_shapes[i][1], back_shapes[i][2]);
            back_bufs b;
            if (MOE_ON_HOST && c.gate.E >= 512 && score % 3) continue;
            c.gate.options.score = score;
            c.gate.options.noise = score & 1 ? 0.3f : 0.0f;
            c.gate.bias = c.gate.expert_disabled = c.gate.token_disabled = c.gate.seed_offset = 1;
            c.balance = c.by_z = i & 1;
            back_new(&b, &c, &r);
            test_same_bits("gradients", call_backward, &b.d, TBUFS(&b.dlogits),
                           MOE_ON_HOST ? 3 : 100);
            back_free(&b);
        }
}

static void test_back_graph(void)
{
    trand r = trand_new(57);
    for (int i = 0; i < BACK_SHAPES; ++i) {
        back_case c = back_plain(back_shapes[i][0], back_shapes[i][1], back_shapes[i][2]);
        const uint64_t no_fault = 0;
        back_bufs b;
        tgraph g;
        test_chain chain;
        c.gate.options.score = 1 + i % MOE_SCORE_PIONEER;
        c.gate.options.noise = 0.3f;
        c.gate.options.dropout = 0.1f;
        c.gate.bias = c.gate.expert_disabled = c.gate.token_disabled = c.gate.seed_offset = 1;
        c.balance = c.by_z = 1;
        back_new(&b, &c, &r);
        chain.call[0] = call_gate, chain.context[0] = &b.gate.device;
        chain.call[1] = call_backward, chain.context[1] = &b.d;
        if (tgraph_capture(&g, test_call_chain, &chain)) {
            for (int n = 0; n < 3; ++n) {
                fill(&b.gate, &c.gate, &r);
                put(&b.gate);
                for (int64_t s = 0; s < (int64_t)c.gate.T * c.gate.K; ++s)
                    b.dweights[s] = trand_normal(&r);
                tbuf_put(&b.d_dweights, b.dweights);
                tbuf_put(&b.gate.fault, &no_fault);
                tbuf_poison(&b.dlogits);
                tbuf_poison(&b.gate.ids);
                tgraph_launch(&g);
                back_compare(&b, &c, 0, 0);
            }
            tgraph_free(&g);
        }
        back_free(&b);
    }
}

static void test_far_apart(void)
{
    enum { T = 3, E = 12, K = 2 };
    static const float logits[T * E] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 2, 1, 5, 4, 1, 6,
                                        3, 8, 1, 1, 2, 9, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6};
    static const float g[T * K] = {1, -2, 3, 1, -1, 2};
    moe_gate_backward_desc d;
    tbuf ids, weights, grad, dense;
    twide in, out;
    float* want;
    if (!twide_possible(4)) return;
    memset(&d, 0, sizeof d);
    if (!twide_new(&in, "logits", T, E, MOE_FP32)) return;
    if (!twide_new(&out, "dlogits", T, E, MOE_FP32)) {
        twide_free(&in);
        return;
    }
    twide_put(&in, logits);
    ids = tbuf_new("ids", T * K * 4, 0), weights = tbuf_new("weights", T * K * 4, 0);
    grad = tbuf_from("dweights", g, sizeof g, 0), dense = tbuf_new("dense", T * E * 4, 0);
    d.gate.logits = in.p, d.gate.logits_stride = in.stride;
    d.gate.ids = (int32_t*)ids.p, d.gate.weights = (float*)weights.p;
    d.gate.num_tokens = T, d.gate.num_experts = E, d.gate.top_k = K;
    CHECK_STATUS(moe_gate(&d.gate, test_now.stream), MOE_OK);
    d.dweights = (const float*)grad.p;
    d.dlogits = dense.p;
    CHECK_STATUS(moe_gate_backward(&d, test_now.stream), MOE_OK);
    want = (float*)tbuf_copy(&dense);
    d.dlogits = out.p, d.dlogits_stride = out.stride;
    CHECK_STATUS(moe_gate_backward(&d, test_now.stream), MOE_OK);
    CHECK(twide_holds(&out, want) && twide_holds(&in, logits), "rows far apart");
    free(want);
    tbufs_free(TBUFS(&ids, &weights, &grad, &dense));
    twide_free(&in), twide_free(&out);
}

static void gate_backward_limits(void)
{
    RUN(test_back_infinities);
    RUN(test_by_hand);
    RUN(test_back_nan);
    RUN(test_alone);
    RUN(test_bad_ids);
    RUN(test_back_stopped);
    RUN(test_bits);
    RUN(test_back_graph);
    RUN(test_far_apart);
}

#endif
