/* sweeps.h: every score and rule over shapes of each form of the kernel

   test_scores       each score in each form, with and without renormalisation, scale, sums
   test_rules        every rule alone and all together, for each score
   test_spreads      logits nearly equal and far apart
   test_sizes        more chunks than warps; one token; one expert; all experts
   test_stopped      after a stop fault nothing is written
   test_threshold    the sigmoid threshold: from all chosen to none
   test_few_experts  fewer experts left than choices
   test_whole_batch  one selection for a whole batch
   test_ties         equal logits, scores, groups: the lower index is chosen
   test_infinities   infinite and huge logits */
#ifndef MOE_TESTS_GATE_RULES_SWEEPS_H
#define MOE_TESTS_GATE_RULES_SWEEPS_H

#include "tests/unit/gate_rules/case.h"

/* Shapes of each form of the kernel: in registers with 4, 8 and 32 lanes, a warp a token. */
static const int shapes[][3] = {{70, 128, 8},  {37, 100, 5}, {33, 16, 2},
                                {40, 256, 8},  {21, 200, 3}, {20, 512, 10},
                                {9, 1000, 32}, {12, 64, 40}, {6, 1500, 4}};
#define SHAPES ((int)(sizeof shapes / sizeof *shapes))

/* Each score in each form, with and without renormalisation, scale, probabilities. */
static void test_scores(void)
{
    trand r = trand_new(1);
    double share = 0;
    int n = 0;
    for (int i = 0; i < SHAPES; ++i)
        for (int score = 0; score <= MOE_SCORE_PIONEER; ++score)
            for (int variant = 0; variant < 4; ++variant) {
                rules_case c = plain_case(shapes[i][0], shapes[i][1], shapes[i][2]);
                if (MOE_ON_HOST && variant > 1 && c.E >= 512) continue;
                c.options.score = score;
                c.options.renormalize = variant & 1;
                c.options.scale = variant == 2 ? 2.5f : 0.0f;
                c.prob = variant != 3;
                c.z = variant != 2;
                c.dtype = variant == 2 ? MOE_FP16 : MOE_FP32;
                c.spread = variant == 3 ? 2.0f : 0.0f;
                share += run_case(&c, &r), ++n;
            }
    CHECK(share / n > 0.8, "only %.2f of the tokens could be compared", share / n);
}

/* Every rule by itself and all together, for each score. */
static void test_rules(void)
{
    trand r = trand_new(2);
    double share = 0;
    int n = 0;
    enum { TEMPERATURE, NOISE, DROPOUT, BIAS, EXPERT_DISABLED, TOKEN_DISABLED, GROUPS, NANS, ALL, RULES };
    for (int i = 0; i < SHAPES; ++i)
        for (int rule = 0; rule < RULES; ++rule)
            for (int score = 1; score <= MOE_SCORE_PIONEER; ++score) {
                rules_case c = plain_case(shapes[i][0], shapes[i][1], shapes[i][2]);
                if (MOE_ON_HOST && c.E >= 512 && trand_int(&r, 0, 2)) continue;
                c.options.score = score;
                c.options.seed = trand_bits(&r);
                c.options.renormalize = (int)trand_int(&r, 0, 1);
                c.dtype = trand_int(&r, 0, 2) ? MOE_FP32 : MOE_BF16;
                c.pad = trand_int(&r, 0, 1) ? 0 : (int)trand_int(&r, 1, 17);
                c.misalign = trand_int(&r, 0, 1) ? 0 : (int)trand_int(&r, 1, 9);
                c.seed_offset = (int)trand_int(&r, 0, 1);
                c.prob = (int)trand_int(&r, 0, 1);
                c.z = (int)trand_int(&r, 0, 1);
                if (rule == TEMPERATURE || rule == ALL) c.options.temperature = 0.7f;
                if (rule == NOISE || rule == ALL) c.options.noise = 0.5f;
                if (rule == DROPOUT || rule == ALL) c.options.dropout = 0.25f;
                c.bias = rule == BIAS || rule == ALL;
                c.expert_disabled = rule == EXPERT_DISABLED || rule == ALL;
                c.token_disabled = rule == TOKEN_DISABLED || rule == ALL;
                c.nan = rule == NANS || (rule == ALL && trand_int(&r, 0, 1));
                if (rule == GROUPS || rule == ALL) {
                    const int group = c.E % 8 == 0 ? c.E / 8 : 5;
                    c.options.num_groups = c.E / group > 32 ? 20 : c.E / group;
                    c.options.top_groups = c.options.num_groups / 2;
                    while (c.E / c.options.num_groups * c.options.top_groups < c.K)
                        ++c.options.top_groups;
                }
                share += run_case(&c, &r), ++n;
            }
    CHECK(share / n > 0.7, "only %.2f of the tokens could be compared", share / n);
}

/* Logits that are nearly equal (sparsemax keeps them all) and far apart (what is chosen by a bias, by
   groups or for the batch is far below the largest), each score in each form. */
static void test_spreads(void)
{
    static const float spreads[] = {0.1f, 40.0f};
    trand r = trand_new(14);
    for (int i = 0; i < SHAPES; ++i)
        for (int score = 1; score <= MOE_SCORE_PIONEER; ++score)
            for (int n = 0; n < 8; ++n) {
                rules_case c = plain_case(shapes[i][0] / 2, shapes[i][1], shapes[i][2]);
                c.spread = spreads[n & 1];
                c.z = n & 1;
                c.options.score = score;
                c.options.renormalize = n >> 1 & 1;
                c.prob = 1;
                c.bias = n >= 4 && score == MOE_SCORE_TOPK_SOFTMAX;
                c.options.whole_batch = n >= 4 && !c.bias;
                if (c.spread > 1 && score == MOE_SCORE_QUADRATIC) c.spread = 6;
                run_case(&c, &r);
            }
}

/* More chunks than a block has warps, with sums over them; one token; one expert; all experts. */
static void test_sizes(void)
{
    static const int sizes[][3] = {{700, 12, 3}, {2300, 7, 2}, {1, 128, 8}, {1, 1, 1}, {50, 1, 1},
                                   {9, 8, 8},    {5, 33, 33},  {3, 700, 8}, {17, 96, 8}};
    trand r = trand_new(15);
    for (int i = 0; i < 9; ++i)
        for (int n = 0; n < 4; ++n) {
            rules_case c = plain_case(sizes[i][0], sizes[i][1], sizes[i][2]);
            c.options.whole_batch = n & 1;
            c.prob = c.token_disabled = 1;
            c.z = n < 2;
            c.bias = !(n & 1);
            c.dtype = n & 2 ? MOE_BF16 : MOE_FP32;
            c.pad = n & 2 ? 5 : 0;
            c.nan = n == 3 || c.T < 20; /* maybe nothing is chosen */
            run_case(&c, &r);
        }
}

/* After a stop fault nothing is written. */
static void test_stopped(void)
{
    trand r = trand_new(16);
    for (int batch = 0; batch < 2; ++batch)
        for (int i = 0; i < SHAPES; ++i) {
            const uint64_t word = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 4);
            rules_case c = plain_case(shapes[i][0], shapes[i][1], shapes[i][2]);
            rules_bufs b;
            c.options.whole_batch = batch;
            c.prob = c.z = 1;
            bufs_new(&b, &c, &r);
            tbuf_put(&b.fault, &word);
            CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
            CHECK(tbuf_holds(&b.ids, 0) && tbuf_holds(&b.weights, 0) && tbuf_holds(&b.chunk, 0) &&
                      tbuf_holds(&b.prob, 0) && tbuf_holds(&b.z, 0) && tbuf_holds(&b.workspace, 0),
                  "the gate ran on after a stop fault");
            CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 4);
            bufs_free(&b);
        }
}

/* The sigmoid's threshold: from all chosen to none, the unused at the end. */
static void test_threshold(void)
{
    static const float at[] = {1e-6f, 0.2f, 0.5f, 0.75f, 0.9f, 0.999f};
    trand r = trand_new(3);
    for (int i = 0; i < SHAPES; ++i)
        for (int k = 0; k < 6; ++k) {
            rules_case c = plain_case(shapes[i][0], shapes[i][1], shapes[i][2]);
            c.options.score = MOE_SCORE_SIGMOID;
            c.options.threshold = at[k];
            c.options.renormalize = k & 1;
            c.bias = k == 3;
            c.nan = k == 5; /* maybe nothing is chosen */
            run_case(&c, &r);
        }
}

/* Fewer experts left than choices, down to none: the unused choices are -1. */
static void test_few_experts(void)
{
    trand r = trand_new(4);
    for (int i = 0; i < SHAPES; ++i)
        for (int left = 0; left < 4; ++left)
            for (int score = 1; score <= MOE_SCORE_PIONEER; ++score) {
                rules_case c = plain_case(shapes[i][0] < 20 ? 3 : 18, shapes[i][1], shapes[i][2]);
                rules_bufs b;
                c.options.score = score;
                c.options.renormalize = score & 1;
                c.expert_disabled = c.prob = c.z = 1;
                c.nan = left == 0;
                bufs_new(&b, &c, &r);
                memset(b.expert_disabled, 1, (size_t)c.E);
                for (int n = 0; n < left; ++n) b.expert_disabled[trand_int(&r, 0, c.E - 1)] = 0;
                put(&b);
                CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
                compare(&b, &c);
                bufs_free(&b);
            }
}

/* One selection for a whole batch. */
static void test_whole_batch(void)
{
    trand r = trand_new(5);
    double share = 0;
    int n = 0;
    for (int i = 0; i < SHAPES; ++i)
        for (int score = 1; score <= MOE_SCORE_PIONEER; ++score)
            for (int variant = 0; variant < 2; ++variant) {
                rules_case c = plain_case(shapes[i][0], shapes[i][1], shapes[i][2]);
                c.options.score = score;
                c.options.whole_batch = 1;
                c.options.renormalize = variant;
                c.options.temperature = variant ? 1.5f : 0.0f;
                c.prob = c.expert_disabled = variant;
                c.token_disabled = c.nan = c.z = !variant;
                share += run_case(&c, &r), ++n;
            }
    CHECK(share / n > 0.7, "only %.2f of the batches could be compared", share / n);
}

/* Equal logits, scores, groups: the lower index wins, in every form. Small whole numbers: every score
   of a kind is the same bits. */
static void test_ties(void)
{
    trand r = trand_new(6);
    for (int i = 0; i < SHAPES; ++i)
        for (int score = 1; score <= MOE_SCORE_QUADRATIC; ++score)
            for (int groups = 0; groups < 2; ++groups) {
                rules_case c = plain_case(shapes[i][0], shapes[i][1], shapes[i][2]);
                rules_bufs b;
                c.options.score = score;
                c.expert_disabled = 1;
                if (groups && c.E % 4) continue;
                if (groups) c.options.num_groups = 4, c.options.top_groups = 3;
                if (c.K > c.E / 4 * 3) continue;
                bufs_new(&b, &c, &r);
                trand_fill_int(&r, b.logits, (int64_t)c.T * c.E, c.dtype, 0, 2);
                put(&b);
                CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
                compare(&b, &c);
                bufs_free(&b);
            }
}

/* Infinite and huge logits. */
static void test_infinities(void)
{
    static const float values[] = {INFINITY, -INFINITY, 3e38f, -3e38f, 1e20f, 0.0f, 1.0f};
    trand r = trand_new(7);
    for (int i = 0; i < SHAPES; ++i)
        for (int score = 1; score <= MOE_SCORE_QUADRATIC; ++score) {
            rules_case c = plain_case(12, shapes[i][1], shapes[i][2]);
            rules_bufs b;
            c.options.score = score;
            c.expert_disabled = c.z = 1;
            bufs_new(&b, &c, &r);
            for (int64_t k = 0; k < (int64_t)c.T * c.E; ++k)
                ((float*)b.logits)[k] = values[trand_int(&r, 0, 6)];
            put(&b);
            CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
            compare(&b, &c);
            bufs_free(&b);
        }
}

static void gate_rules_sweeps(void)
{
    RUN(test_scores);
    RUN(test_rules);
    RUN(test_spreads);
    RUN(test_sizes);
    RUN(test_stopped);
    RUN(test_threshold);
    RUN(test_few_experts);
    RUN(test_whole_batch);
    RUN(test_ties);
    RUN(test_infinities);
}

#endif
