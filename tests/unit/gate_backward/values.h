/* values.h: gradients against the reference in double

   test_values      every score and E, options at random
   test_all_rules   every rule alone and all together
   test_dtypes      dtypes, strides and alignments of logits and dlogits; in place
   test_top_k       K from 1 to E
   test_spreads     logits nearly equal and far apart: no cancellation of 1 - sigmoid
   test_sizes       no tokens, one, many */
#ifndef MOE_TESTS_GATE_BACKWARD_VALUES_H
#define MOE_TESTS_GATE_BACKWARD_VALUES_H

#include "tests/unit/gate_backward/case.h"

static void test_values(void)
{
    static const int experts[] = {1, 3, 8, 60, 128, 160, 256, 512, 1024, 1500, 2048};
    trand r = trand_new(31);
    for (int i = 0; i < (int)(sizeof experts / sizeof *experts); ++i)
        for (int score = 0; score <= MOE_SCORE_PIONEER; ++score) {
            int64_t shown = 0;
            for (int n = 0; n < 12; ++n) {
                const int E = experts[i], few = E < 12 ? E : 12;
                const int T = (int)trand_int(&r, 1, E > 512 ? 3 : E > 128 ? 9 : 40);
                const int K = n == 3 ? E : (int)trand_int(&r, 1, few);
                back_case c = back_plain(T, E, K);
                if (MOE_ON_HOST && E > 512 && n > 5) continue;
                c.gate.options.score = score;
                c.gate.options.renormalize = n & 1;
                c.balance = n >> 1 & 1;
                c.by_z = n >> 2 & 1;
                c.no_dweights = n == 6;
                if (n > 3) back_rules(&c.gate, &r, 4);
                c.gate.dtype = n > 7 ? trand_dtype(&r) : MOE_FP32;
                c.dtype = n > 7 ? trand_dtype(&r) : MOE_FP32;
                back_run(&c, &r, &shown);
            }
            CHECK(shown > 0 || experts[i] == 1, "E=%d score=%d: all gradients are about zero",
                  experts[i], score);
        }
}

/* Shapes of each form of the kernel: 8, 16 and 32 lanes a token; a warp a token. */
static const int back_shapes[][3] = {{37, 128, 8},  {33, 100, 5}, {35, 16, 2},   {21, 256, 8},
                                     {11, 200, 20}, {6, 512, 10}, {5, 1000, 32}, {3, 1100, 4}};
#define BACK_SHAPES ((int)(sizeof back_shapes / sizeof *back_shapes))

static void test_all_rules(void)
{
    enum {
        TEMPERATURE,
        NOISE,
        DROPOUT,
        BIAS,
        EXPERT_DISABLED,
        TOKEN_DISABLED,
        GROUPS,
        THRESHOLD,
        BATCH,
        NANS,
        ALL,
        RULES
    };
    trand r = trand_new(32);
    for (int i = 0; i < BACK_SHAPES; ++i)
        for (int rule = 0; rule < RULES; ++rule) {
            int64_t shown = 0;
            for (int score = 1; score <= MOE_SCORE_PIONEER; ++score) {
                back_case c = back_plain(back_shapes[i][0], back_shapes[i][1], back_shapes[i][2]);
                moe_gate_desc* o = &c.gate.options;
                const int all = rule == ALL;
                if (MOE_ON_HOST && c.gate.E >= 512 && trand_int(&r, 0, 2)) continue;
                o->score = score;
                o->seed = trand_bits(&r);
                o->renormalize = (int)trand_int(&r, 0, 1);
                c.balance = (int)trand_int(&r, 0, 1);
                c.by_z = (int)trand_int(&r, 0, 1);
                if (rule == TEMPERATURE || all) o->temperature = 1.4f;
                if (rule == NOISE || all) o->noise = 0.5f;
                if (rule == DROPOUT || all) o->dropout = 0.25f;
                if (rule == THRESHOLD && score == MOE_SCORE_SIGMOID) o->threshold = 0.6f;
                c.gate.bias = rule == BIAS || all;
                c.gate.expert_disabled = rule == EXPERT_DISABLED || all;
                c.gate.token_disabled = rule == TOKEN_DISABLED || all;
                c.gate.nan = rule == NANS || all;
                o->whole_batch = rule == BATCH;
                if ((rule == GROUPS || all) && c.gate.E % 4 == 0)
                    o->num_groups = 4, o->top_groups = 3;
                back_run(&c, &r, &shown);
            }
            CHECK(shown > 0 || back_shapes[i][1] >= 512, "rule %d: all gradients are about zero",
                  rule);
        }
}

static void test_dtypes(void)
{
    trand r = trand_new(33);
    int64_t shown = 0;
    for (int i = 0; i < BACK_SHAPES; ++i)
        for (int n = 0; n < 18; ++n) {
            back_case c = back_plain(back_shapes[i][0], back_shapes[i][1], back_shapes[i][2]);
            c.gate.options.score = 1 + (int)trand_int(&r, 0, MOE_SCORE_PIONEER - 1);
            c.gate.options.renormalize = (int)trand_int(&r, 0, 1);
            c.balance = n % 2;
            c.gate.dtype = MOE_FP32 + n % 3;
            c.dtype = MOE_FP32 + n / 3 % 3;
            c.in_place = n >= 9 && c.gate.dtype == c.dtype;
            if (n >= 9) {
                c.gate.pad = trand_some(&r, 2, 1, 17);
                c.gate.misalign = trand_some(&r, 2, 1, 9);
                c.pad = trand_some(&r, 2, 1, 17);
                c.misalign = trand_some(&r, 2, 1, 9);
            }
            if (!c.in_place) {
                back_run(&c, &r, &shown);
            } else { /* the reference reads the logits from the host */
                back_bufs b;
                char* got;
                const int64_t elem = moe_dtype_bytes(c.dtype), stride = c.gate.E + c.gate.pad;
                back_new(&b, &c, &r);
                CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
                back_compare(&b, &c, 0, &shown);
                got = (char*)tbuf_copy(&b.gate.d_logits);
                for (int64_t t = 0; t < c.gate.T; ++t)
                    CHECK(memcmp(got + (t * stride + c.gate.E) * elem,
                                 (char*)b.gate.logits + (t * stride + c.gate.E) * elem,
                                 (size_t)(c.gate.pad * elem)) == 0,
                          "what follows row %lld was written", (long long)t);
                free(got);
                back_free(&b);
            }
        }
    CHECK(shown > 0, "all gradients are about zero");
}

static void test_top_k(void)
{
    static const int sizes[] = {1, 7, 64, 130, 300, 1030};
    trand r = trand_new(34);
    for (int i = 0; i < 6; ++i)
        for (int n = 0; n < 6; ++n)
            for (int score = 1; score <= MOE_SCORE_PIONEER; ++score) {
                const int E = sizes[i], more = E < 40 ? E : 40;
                const int K = n == 0   ? 1
                              : n == 1 ? E
                              : n == 2 ? (E + 1) / 2
                                       : (int)trand_int(&r, 1, more);
                back_case c = back_plain(E > 300 ? 2 : 5, E, K);
                if (MOE_ON_HOST && E > 300 && n > 2) continue;
                c.gate.options.score = score;
                c.gate.options.renormalize = n & 1;
                c.balance = n > 3;
                back_run(&c, &r, 0);
            }
}

static void test_spreads(void)
{
    static const float spreads[] = {0.1f, 30.0f};
    trand r = trand_new(35);
    for (int i = 0; i < BACK_SHAPES; ++i)
        for (int score = 1; score <= MOE_SCORE_PIONEER; ++score)
            for (int n = 0; n < 8; ++n) {
                back_case c =
                    back_plain(back_shapes[i][0] / 2 + 1, back_shapes[i][1], back_shapes[i][2]);
                if (MOE_ON_HOST && c.gate.E >= 512 && n > 3) continue;
                c.gate.spread = spreads[n & 1];
                c.gate.options.score = score;
                c.gate.options.renormalize = n >> 1 & 1;
                c.balance = c.by_z = n >> 2 & 1;
                if (c.gate.spread > 1 && score == MOE_SCORE_QUADRATIC) c.gate.spread = 6;
                back_run(&c, &r, 0);
            }
}

static void test_sizes(void)
{
    static const int sizes[][3] = {{0, 17, 3},   {1, 128, 8}, {1, 1, 1},   {50, 1, 1},
                                   {31, 64, 6},  {32, 64, 6}, {33, 64, 6}, {500, 12, 3},
                                   {1, 1500, 3}, {0, 2000, 3}};
    trand r = trand_new(36);
    for (int i = 0; i < 10; ++i)
        for (int n = 0; n < 4; ++n) {
            back_case c = back_plain(sizes[i][0], sizes[i][1], sizes[i][2]);
            c.gate.options.renormalize = n & 1;
            c.balance = n >> 1;
            c.by_z = n == 3;
            back_run(&c, &r, 0);
        }
}

static void gate_backward_values(void)
{
    RUN(test_values);
    RUN(test_all_rules);
    RUN(test_dtypes);
    RUN(test_top_k);
    RUN(test_spreads);
    RUN(test_sizes);
}

#endif
