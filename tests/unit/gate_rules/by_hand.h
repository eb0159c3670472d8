/* by_hand.h: rows written by hand: limits, offsets, edges

   test_minus_infinity     -infinity is no choice
   test_nan_bias           a NaN bias excludes its expert
   test_lone_expert        groups with one expert left
   test_small_sigmoids     probabilities of sigmoids that all underflow
   test_batch_sums         sums of a batch with infinities, large numbers and NaN
   test_large_squares      quadratic scores whose squares overflow
   test_huge               a huge largest logit; chosen logits far below 0
   test_offset             an offset of the row, under a temperature
   test_low_bias           a bias of -infinity is chosen last
   test_offset_noise       an offset of the row, with a temperature and noise
   test_groups_low         groups of huge negative logits
   test_order_below_huge   a temperature keeps the order below a huge logit
   test_smallest_sigmoids  sigmoids of the smallest numbers
   test_temperatures       logits and temperature both tiny or both huge
   test_threshold_edge     a score equal to the threshold is used
   test_large_angles       cosines of large angles
   test_dropout_steps      dropout in steps of 2^-16 */
#ifndef MOE_TESTS_GATE_RULES_BY_HAND_H
#define MOE_TESTS_GATE_RULES_BY_HAND_H

#include "tests/unit/gate_rules/case.h"

/* -infinity is no choice: id -1 where fewer others are left than K, whatever speaks for it. */
static void test_minus_infinity(void)
{
    const float inf = INFINITY;
    const float few[] = {-inf, 1, -inf, 0, -inf, -inf, -inf, -inf, NAN, 0, -inf, 1};
    const double e1 = exp(-1.0), s0 = 1 / (1 + exp(-1.0)), none[4] = {0, 0, 0, 0};
    {
        const int32_t ids[] = {1, 3, -1, -1, -1, -1, -1, -1, -1};
        const double soft[] = {1 / (1 + e1), e1 / (1 + e1), 0, 0, 0, 0, 0, 0, 0};
        const double prob[] = {0, 1 / (1 + e1), 0, e1 / (1 + e1)};
        const double sigmoid[] = {s0, 0.5, 0, 0, 0, 0, 0, 0, 0};
        moe_gate_desc o = rows(few, 3, 4, 3, MOE_SCORE_SOFTMAX);
        check_rows("softmax", &o, ids, soft, 0, MOE_FAULT_NAN_LOGIT, 2);
        check_rows("softmax, sums", &o, ids, soft, prob, MOE_FAULT_NAN_LOGIT, 2);
        o.score = MOE_SCORE_TOPK_SOFTMAX;
        check_rows("top-k softmax", &o, ids, soft, 0, MOE_FAULT_NAN_LOGIT, 2);
        o.score = MOE_SCORE_SIGMOID;
        check_rows("sigmoid", &o, ids, sigmoid, 0, MOE_FAULT_NAN_LOGIT, 2);
    }
    {
        const int32_t ids[] = {1, -1, -1, -1, -1, -1, -1, -1, -1};
        const double one[] = {1, 0, 0, 0, 0, 0, 0, 0, 0}, prob[] = {0, 1, 0, 0};
        moe_gate_desc o = rows(few, 3, 4, 3, MOE_SCORE_SPARSEMAX);
        check_rows("sparsemax", &o, ids, one, prob, MOE_FAULT_NAN_LOGIT, 2);
    }
    for (int score = 1; score <= MOE_SCORE_SPARSEMAX; ++score) { /* a row of nothing else */
        const int32_t ids[] = {-1, -1};
        moe_gate_desc o = rows(few + 4, 1, 4, 2, score);
        check_rows("a row of -inf", &o, ids, none, none, MOE_FAULT_NONE, 0);
        o.renormalize = 1;
        o.temperature = 0.5f;
        check_rows("a row of -inf, divided", &o, ids, none, none, MOE_FAULT_NONE, 0);
    }
    for (int score = 1; score <= MOE_SCORE_SIGMOID; ++score) { /* a bias speaks for it */
        const float bias[] = {9, 0, inf, 0};
        const int32_t ids[] = {1, 3, -1};
        moe_gate_desc o = rows(few, 1, 4, 3, score);
        o.expert_bias = bias;
        check_rows("bias", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
        o.top_k = 2;
        check_rows("bias, enough others", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
    }
    for (int size = 2; size <= 4; size += 2) { /* nor does it help its group */
        const float l2[] = {-inf, 1, 0.9f, 0.9f}, b2[] = {5, 0, 0, 0};
        const float l4[] = {-inf, 1, -inf, -inf, 0.9f, 0.9f, -1, -1},
                    b4[] = {5, 0, 0, 0, 0, 0, 0, 0};
        const int32_t ids2[] = {2, 3, -1}, ids4[] = {4, 5, 6};
        for (int score = 1; score <= MOE_SCORE_SIGMOID; ++score) {
            moe_gate_desc o = rows(size == 2 ? l2 : l4, 1, 2 * size, 2, score);
            o.expert_bias = size == 2 ? b2 : b4;
            o.num_groups = 2;
            o.top_groups = 1;
            if (score == MOE_SCORE_TOPK_SOFTMAX) o.temperature = 2; /* .5 alone; .45 twice */
            check_rows("groups", &o, size == 2 ? ids2 : ids4, 0, 0, MOE_FAULT_NONE, 0);
        }
    }
    { /* a finite logit is a choice, however low; a temperature does not make it -inf */
        const float low[] = {-3e38f, -inf, -2e38f, -inf};
        const int32_t ids[] = {2, 0, -1};
        const float bias[] = {0, 1, 0.5f, 1};
        moe_gate_desc o = rows(low, 1, 4, 3, MOE_SCORE_SIGMOID);
        check_rows("low", &o, ids, none, 0, MOE_FAULT_NONE, 0);
        o.expert_bias = bias;
        check_rows("low, bias", &o, ids, none, 0, MOE_FAULT_NONE, 0);
        o.temperature = 0.1f;
        check_rows("low, bias, temperature", &o, ids, none, 0, MOE_FAULT_NONE, 0);
    }
    { /* the same with enough others */
        const float low[] = {-3e38f, 0, 1, -1}, bias[] = {1.5f, 0, 0, 0};
        const int32_t ids[] = {0, 2};
        moe_gate_desc o = rows(low, 1, 4, 2, MOE_SCORE_SIGMOID);
        o.expert_bias = bias;
        o.temperature = 0.1f;
        check_rows("low, temperature", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
    }
    { /* squared it is +inf */
        const float l[] = {-inf, 1, inf, 2};
        const int32_t ids[] = {0, 2, 3};
        const double half[] = {0.5, 0.5, 0}, prob[] = {0.5, 0, 0.5, 0};
        moe_gate_desc o = rows(l, 1, 4, 3, MOE_SCORE_QUADRATIC);
        check_rows("quadratic", &o, ids, half, prob, MOE_FAULT_NONE, 0);
    }
}

/* A NaN bias: its expert is out, and its group has no more for it than its other experts. */
static void test_nan_bias(void)
{
    const float l2[] = {1, 0, 0.9f, 0.9f}, b2[] = {0, NAN, 0, 0};
    const float l4[] = {1, 0, -9, -9, 0.9f, 0.9f, -9, -9}, b4[] = {0, NAN, NAN, NAN, 0, 0, 0, 0};
    const float lone[] = {NAN, NAN, 0, 0};
    const int32_t two = 2, four = 4, none[] = {2, 3, -1};
    moe_gate_desc o = rows(l2, 1, 4, 1, MOE_SCORE_SIGMOID);
    o.num_groups = 2;
    o.top_groups = 1;
    o.expert_bias = b2;
    check_rows("groups of 2", &o, &two, 0, 0, MOE_FAULT_NONE, 0);
    o = rows(l4, 1, 8, 1, MOE_SCORE_SIGMOID);
    o.num_groups = 2;
    o.top_groups = 1;
    o.expert_bias = b4;
    check_rows("groups of 4", &o, &four, 0, 0, MOE_FAULT_NONE, 0);
    o = rows(l2, 1, 4, 3, MOE_SCORE_SIGMOID);
    o.expert_bias = lone;
    check_rows("no groups", &o, none, 0, 0, MOE_FAULT_NONE, 0);
}

/* Groups of which one expert is left: its score is that one's, and a temperature's offset would
   count once there and twice elsewhere. */
static void test_lone_expert(void)
{
    const float l[] = {3, 9, 9, 9, 2, 2, 1, 1}, low[] = {-1, 9, 9, 9, -2, -2, -3, -3};
    const uint8_t off[] = {0, 1, 1, 1, 0, 0, 0, 0};
    const int32_t four = 4, zero = 0;
    for (int temperature = 0; temperature < 2; ++temperature)
        for (int score = 1; score <= MOE_SCORE_SIGMOID; ++score) {
            const int32_t* want = score == MOE_SCORE_TOPK_SOFTMAX || score == MOE_SCORE_SIGMOID
                                      ? &four : &zero; /* softmax: e against 2 */
            moe_gate_desc o = rows(l, 1, 8, 1, score);
            o.num_groups = 2;
            o.top_groups = 1;
            o.expert_disabled = off;
            o.temperature = temperature ? 0.5f : 0.0f;
            check_rows("lone", &o, want, 0, 0, MOE_FAULT_NONE, 0);
            if (score != MOE_SCORE_TOPK_SOFTMAX) continue;
            o.logits = low;
            check_rows("lone, low", &o, &zero, 0, 0, MOE_FAULT_NONE, 0);
        }
}

/* Probabilities of sigmoids that all underflow. */
static void test_small_sigmoids(void)
{
    const float l[] = {-100, -100, -100, -101, -1e30f, -1e30f, -2e30f, -1e30f, -88, 0};
    const double a = 1 / (1 + exp(-1.0)), half[] = {0.5, 0.5}, ab[] = {a, 1 - a};
    const double b[] = {0, 1}, all[] = {1 + a, 4 - a};
    moe_gate_desc o = rows(l, 1, 2, 1, MOE_SCORE_SIGMOID);
    check_rows("-100, -100", &o, 0, 0, half, MOE_FAULT_NONE, 0);
    o.logits = l + 2;
    check_rows("-100, -101", &o, 0, 0, ab, MOE_FAULT_NONE, 0);
    o.logits = l + 4;
    check_rows("-1e30, -1e30", &o, 0, 0, half, MOE_FAULT_NONE, 0);
    o.logits = l + 6;
    check_rows("-2e30, -1e30", &o, 0, 0, b, MOE_FAULT_NONE, 0);
    o.logits = l;
    o.num_tokens = 5;
    check_rows("all", &o, 0, 0, all, MOE_FAULT_NONE, 0);
}

/* A batch's sums of infinities and of large numbers; experts that NaN excludes. */
static void test_batch_sums(void)
{
    const float inf = INFINITY, far = MOE_GATE_MAX_COSINE;
    { /* both infinities: NaN, and a fault */
        const float l[] = {inf, 1, 0, -inf, 2, 0};
        const int32_t ids[] = {1, 2, -1, 1, 2, -1};
        moe_gate_desc o = rows(l, 2, 3, 3, MOE_SCORE_SIGMOID);
        o.whole_batch = 1;
        check_rows("inf - inf", &o, ids, 0, 0, MOE_FAULT_NAN_SUM, 0);
    }
    { /* one of them */
        const float l[] = {3, 1, inf, -inf, 2, 0};
        const int32_t ids[] = {2, 1, -1, 2, 1, -1};
        moe_gate_desc o = rows(l, 2, 3, 3, MOE_SCORE_SIGMOID);
        o.whole_batch = 1;
        check_rows("one infinity", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
    }
    { /* finite numbers have finite sums */
        const float l[] = {-3e38f, 2e38f, 3e38f, 3e38f, -3e38f, 2e38f, 3e38f, -3e38f};
        const int32_t ids[] = {2, 1, 3, 0, 2, 1, 3, 0};
        moe_gate_desc o = rows(l, 2, 4, 4, MOE_SCORE_SIGMOID);
        o.whole_batch = 1;
        check_rows("large", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
    }
    { /* a NaN of a disabled expert leaves no token out */
        const float l[] = {NAN, 0, 1, 0, 5, 1};
        const uint8_t off[] = {1, 0, 0};
        const int32_t ids[] = {1, 1};
        moe_gate_desc o = rows(l, 2, 3, 1, MOE_SCORE_SOFTMAX);
        float swapped[6];
        o.whole_batch = 1;
        o.expert_disabled = off;
        check_rows("NaN of a disabled expert", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
        for (int i = 0; i < 6; ++i) swapped[i] = l[(i + 3) % 6]; /* then it is expert 0 of token 1 */
        o.logits = swapped;
        check_rows("the same, later", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
    }
    { /* a cosine that counts as NaN does */
        const float l[] = {0, 1, far, -2, 2, 3};
        const int32_t ids[] = {1, -1, 1};
        moe_gate_desc o = rows(l, 3, 2, 1, MOE_SCORE_PIONEER);
        o.whole_batch = 1;
        check_rows("pioneer", &o, ids, 0, 0, MOE_FAULT_NAN_LOGIT, 1);
    }
}

/* Quadratic scores of logits whose squares overflow: |l| decides, weights are limits. */
static void test_large_squares(void)
{
    const float l[] = {2e19f, 3e19f, -3e19f, 1, 1e30f, -2e38f, 2e37f, 3e38f};
    const int32_t ids[] = {1, 2, 0, 3, 1, 2}; /* of 1e30, -2e38, 2e37, 3e38 */
    const double weights[] = {0.5, 0.5, 0, 1, 0, 0}, prob[] = {0, 0.5, 0.5, 1};
    moe_gate_desc o = rows(l, 2, 4, 3, MOE_SCORE_QUADRATIC);
    check_rows("squares", &o, ids, weights, prob, MOE_FAULT_NONE, 0);
    o.temperature = 4; /* some are finite again */
    check_rows("squares, temperature", &o, ids, weights, prob, MOE_FAULT_NONE, 0);
}

/* Rows whose largest logit is huge, with no infinity in sight; and chosen ones far below 0. */
static void test_huge(void)
{
    static const float at[] = {0.9e8f, 1e8f, 1e9f, 1e12f, 1e20f, 1e30f, 1e38f, 3.4e38f};
    for (int i = 0; i < 8; ++i)
        for (int score = 1; score <= MOE_SCORE_QUADRATIC; ++score)
            for (int renormalize = 0; renormalize < 2; ++renormalize) {
                const float h = at[i];
                const float l[] = {1,      h / 2, h, 0, -h, h, 0,      -1,  h, nextafterf(h, 0),
                                   -h / 2, 1,     0, -h, -h, -h, -h / 2, -h, -h, -h / 4};
                moe_gate_desc o = rows(l, 4, 5, 3, score);
                o.renormalize = renormalize && i < 6; /* nor are sigmoids of -1e38 renormalised */
                check_rows("huge", &o, 0, 0, 0, MOE_FAULT_NONE, 0);
            }
    {
        const float l[] = {0, 0, -1e10f, -1e10f}, bias[] = {-1, -1, 1e10f, 1e10f};
        const int32_t ids[] = {2, 3};
        const double half[] = {0.5, 0.5};
        moe_gate_desc o = rows(l, 1, 4, 2, MOE_SCORE_TOPK_SOFTMAX);
        o.expert_bias = bias;
        check_rows("far below", &o, ids, half, 0, MOE_FAULT_NONE, 0);
    }
}

/* An offset of the whole row, under a temperature. */
static void test_offset(void)
{
    static const float at[] = {0, 906, -906, 60000, 4e6f};
    for (int i = 0; i < 5; ++i)
        for (int score = 1; score <= MOE_SCORE_SPARSEMAX; ++score) {
            enum { T = 20, E = 24 };
            float l[T * E];
            moe_gate_desc o = rows(l, T, E, 4, score);
            if (score == MOE_SCORE_SIGMOID) continue;
            for (int t = 0; t < T; ++t) /* all different, in steps that fp32 has at 4e6 */
                for (int e = 0; e < E; ++e)
                    l[t * E + e] = at[i] + 0.5f * (float)((e * 7 + t) % E);
            o.temperature = 15.6f;
            check_rows("offset", &o, 0, 0, 0, MOE_FAULT_NONE, 0);
        }
}

/* A bias of -infinity: chosen last, and its group has its score from the other. */
static void test_low_bias(void)
{
    const float l[] = {1, 0, 0.9f, 0.9f}, bias[] = {0, -INFINITY, 0, 0};
    const int32_t all[] = {0, 2, 3, 1}, one[] = {2}, lone[] = {0, 1};
    moe_gate_desc o = rows(l, 1, 4, 4, MOE_SCORE_SIGMOID);
    o.expert_bias = bias;
    check_rows("all", &o, all, 0, 0, MOE_FAULT_NONE, 0);
    o.num_groups = 2, o.top_groups = 1;
    o.top_k = 1;
    check_rows("the group of two", &o, one, 0, 0, MOE_FAULT_NONE, 0);
    {
        const float high[] = {9, 0, -9, -9}; /* 1 + nothing is more than 0 + 0 */
        o.logits = high;
        o.top_k = 2;
        check_rows("the lone one's group", &o, lone, 0, 0, MOE_FAULT_NONE, 0);
    }
}

/* An offset of the whole row, under a temperature and with noise: neither rounds the other away. */
static void test_offset_noise(void)
{
    static const float at[] = {0, 906, -906, 1e5f}, temperature[] = {2, 15.6f, 1e-3f, 1e-7f};
    for (int i = 0; i < 4; ++i)
        for (int n = 0; n < 4; ++n)
            for (int score = 1; score <= MOE_SCORE_SPARSEMAX; ++score) {
                enum { T = 12, E = 24 };
                float l[T * E];
                moe_gate_desc o = rows(l, T, E, 4, score);
                if (score == MOE_SCORE_SIGMOID) continue;
                if (fabs(at[i] / temperature[n]) > 1e10) continue; /* the reference rounds there */
                for (int t = 0; t < T; ++t) /* of the low temperatures all alike */
                    for (int e = 0; e < E; ++e)
                        l[t * E + e] = at[i] + (n < 2 ? 0.5f * (float)((e * 7 + t) % E) : 0.0f);
                o.temperature = temperature[n];
                o.noise = 0.5f;
                o.seed = 3;
                check_rows("offset, noise", &o, 0, 0, 0, MOE_FAULT_NONE, 0);
            }
}

/* Groups of huge negative logits: their sums of two, and what a temperature makes of them, stay above
   a group that has none. */
static void test_groups_low(void)
{
    const float m = -3.40282347e38f, f = -3.3895314e38f; /* fp32's and bf16's smallest */
    const float low[] = {0, m, m, m, -1, -1, -1, -1, 0, f, f, f, -1, -1, -1, -1,
                         0, -1e9f, -1e9f, -1e9f, -1e-30f, -1e-30f, -1e-30f, -1e-30f};
    const float all[] = {0, 0, 0, 0, -2e38f, -2e38f, -2e38f, -2e38f, 0, 0, 0, 0, m, m, m, m};
    const float bias[8] = {0}, temperature[] = {0, 0.5f, 0.7f, 1e-30f};
    const uint8_t off[] = {1, 1, 1, 1, 0, 0, 0, 0};
    const int32_t ids[] = {4, 4, 4};
    for (int i = 0; i < 4; ++i)
        for (int biased = 0; biased < 2; ++biased) {
            moe_gate_desc o = rows(low, 3, 8, 1, MOE_SCORE_TOPK_SOFTMAX);
            o.num_groups = 2, o.top_groups = 1;
            o.temperature = temperature[i];
            if (biased) o.expert_bias = bias;
            check_rows("low", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
            o.logits = all, o.num_tokens = 2;
            o.expert_disabled = off;
            check_rows("only low ones left", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
        }
}

/* Under a temperature a huge largest logit leaves the others' order as it is. */
static void test_order_below_huge(void)
{
    static const int scores[] = {MOE_SCORE_SOFTMAX, MOE_SCORE_TOPK_SOFTMAX, MOE_SCORE_SIGMOID};
    const float l[] = {1e9f, 1, 2, 3, 3e38f, 1e9f, -5, 2e9f};
    const int32_t ids[] = {0, 3, 2, 0, 3, 1};
    for (int i = 0; i < 3; ++i) {
        moe_gate_desc o = rows(l, 2, 4, 3, scores[i]);
        o.temperature = 2;
        check_rows("below a huge one", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
    }
}

/* Sigmoids of the smallest numbers there are do not vanish together. */
static void test_smallest_sigmoids(void)
{
    const float m = -3.40282347e38f;
    const float l[] = {m, m, m, -3.2e38f, -3.2e38f, -3.2e38f, -3.39e38f, -3.39e38f, -3.39e38f};
    const double third[] = {1.0 / 3, 1.0 / 3, 1.0 / 3, 1.0 / 3, 1.0 / 3, 1.0 / 3, 1.0 / 3, 1.0 / 3,
                            1.0 / 3}, prob[] = {1, 1, 1};
    moe_gate_desc o = rows(l, 3, 3, 3, MOE_SCORE_SIGMOID);
    o.renormalize = 1;
    check_rows("smallest", &o, 0, third, prob, MOE_FAULT_NONE, 0);
}

/* Logits and temperature that are both tiny or both huge: what one divides by the other is not. */
static void test_temperatures(void)
{
    static const int power[] = {-50, -20, 20, 80};
    for (int i = 0; i < 4; ++i)
        for (int score = 1; score <= MOE_SCORE_PIONEER; ++score)
            for (int judged = 0; judged < 2; ++judged) {
                enum { T = 12, E = 24 };
                float l[T * E], bias[E];
                moe_gate_desc o = rows(l, T, E, 4, score);
                for (int t = 0; t < T; ++t)
                    for (int e = 0; e < E; ++e)
                        l[t * E + e] = ldexpf(0.37f * (float)((e * 7 + t) % E - 9), power[i]);
                for (int e = 0; e < E; ++e) bias[e] = 0.013f * (float)(e * 5 % E);
                o.temperature = ldexpf(1.0f, power[i]);
                if (judged) o.expert_bias = bias;
                if (score == MOE_SCORE_SIGMOID) o.threshold = 0.6f;
                check_rows("temperature", &o, 0, 0, 0, MOE_FAULT_NONE, 0);
                if (score == MOE_SCORE_PIONEER) continue;
                o.temperature = ldexpf(1.0f, power[i] - 40); /* now only the logits are moderate */
                check_rows("steep", &o, 0, 0, 0, MOE_FAULT_NONE, 0);
            }
}

/* A score that is the threshold is used. */
static void test_threshold_edge(void)
{
    const float l[] = {0, 1e-5f, -1e-5f, -0.0f, 1.0986123f + 1e-5f, 1.0986123f - 1e-5f, 2, -2};
    const int32_t most[] = {-1, -1, -1, -1, 2, 0, -1, -1};
    const int32_t ids[] = {1, 0, 3, -1, 2, 0, 1, -1};
    moe_gate_desc o = rows(l, 2, 4, 4, MOE_SCORE_SIGMOID);
    o.threshold = 0.5f;
    check_rows("0.5", &o, ids, 0, 0, MOE_FAULT_NONE, 0);
    o.threshold = 0.75f;
    check_rows("0.75", &o, most, 0, 0, MOE_FAULT_NONE, 0);
}

/* Cosines of large angles. */
static void test_large_angles(void)
{
    enum { T = 60, E = 12, K = 2 };
    static const float at[] = {1e4f, 1e5f, 1e6f};
    trand r = trand_new(18);
    for (int i = 0; i < 3; ++i)
        for (int form = 0; form < 2; ++form) {
            rules_case c = plain_case(T, form ? 1100 : E, K);
            rules_bufs b;
            int32_t* ids = (int32_t*)test_host(T * K * 4);
            double* want = (double*)test_host(T * K * 8);
            double* margin = (double*)test_host(T * 8);
            int32_t* got_ids;
            float* got;
            int compared = 0;
            c.options.score = MOE_SCORE_PIONEER;
            c.expert_disabled = form;
            bufs_new(&b, &c, &r);
            for (int e = 0; e < c.E; ++e) b.expert_disabled[e] = e >= E;
            for (int64_t k = 0; k < (int64_t)T * c.E; ++k)
                ((float*)b.logits)[k] = at[i] * (float)(trand_int(&r, 0, 1) * 2 - 1) *
                                        (1 + 0.04f * trand_normal(&r) / 6);
            put(&b);
            moe_ref_gate_rules_f64(&b.host, ids, want, 0, 0, margin);
            CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
            got_ids = (int32_t*)tbuf_copy(&b.ids);
            got = (float*)tbuf_copy(&b.weights);
            for (int t = 0; t < T; ++t)
                for (int k = 0; k < K && margin[t] >= 3e-6; ++k, ++compared) {
                    const int s = t * K + k;
                    CHECK(got_ids[s] == ids[s], "token %d choice %d: %d, not %d", t, k, got_ids[s],
                          ids[s]);
                    CHECK(fabs(got[s] - want[s]) <= 3e-6 * want[s],
                          "token %d choice %d: %.9g, not %.9g", t, k, (double)got[s], want[s]);
                }
            CHECK(compared > T * K * 2 / 3, "only %d choices could be compared", compared);
            bufs_free(&b);
            free(ids), free(want), free(margin), free(got_ids), free(got);
        }
}

/* Dropout in steps of 2^-16: a draw that is the steps keeps the expert. */
static void test_dropout_steps(void)
{
    enum { E = 16 };
    CHECK(moe_gate_dropout_steps(0.3f) == 19661, "0.3: %d", moe_gate_dropout_steps(0.3f));
    CHECK(moe_gate_dropout_steps(1e-9f) == 1, "1e-9: %d", moe_gate_dropout_steps(1e-9f));
    CHECK(moe_gate_dropout_steps(0.99999994f) == 65535, "nearly 1");
    CHECK(moe_gate_dropout_steps(0) == 0, "0");
    for (int e = 0; e < E; ++e) { /* the expert whose draw is looked at has the largest logit */
        float l[E];
        int32_t id;
        moe_gate_desc o = rows(l, 1, E, 1, MOE_SCORE_SOFTMAX);
        moe_random4 r;
        uint32_t words[4], draw;
        for (int i = 0; i < E; ++i) l[i] = i == e ? 5.0f : -(float)i;
        do { /* a draw in the middle: steps around it are in range */
            ++o.seed;
            r = moe_random_words(o.seed, (uint32_t)e / 8, 0, MOE_GATE_STREAM_DROPOUT, 0);
            words[0] = r.x, words[1] = r.y, words[2] = r.z, words[3] = r.w;
            draw = e & 1 ? words[e % 8 / 2] >> 16 : words[e % 8 / 2] & 0xffffu;
        } while (draw < 1000 || draw > 60000);
        id = e;
        o.dropout = (float)draw / 65536.0f;
        check_rows("a draw that is the steps", &o, 0, 0, 0, MOE_FAULT_NONE, 0);
        CHECK(!moei_ref_dropped(&o, 0, id), "the reference keeps it");
        o.dropout = (float)(draw + 1) / 65536.0f;
        check_rows("a draw one below the steps", &o, 0, 0, 0, MOE_FAULT_NONE, 0);
        CHECK(moei_ref_dropped(&o, 0, id), "the reference drops it");
    }
}

static void gate_rules_by_hand(void)
{
    RUN(test_minus_infinity);
    RUN(test_nan_bias);
    RUN(test_lone_expert);
    RUN(test_small_sigmoids);
    RUN(test_batch_sums);
    RUN(test_large_squares);
    RUN(test_huge);
    RUN(test_offset);
    RUN(test_low_bias);
    RUN(test_offset_noise);
    RUN(test_groups_low);
    RUN(test_order_below_huge);
    RUN(test_smallest_sigmoids);
    RUN(test_temperatures);
    RUN(test_threshold_edge);
    RUN(test_large_angles);
    RUN(test_dropout_steps);
}

#endif
