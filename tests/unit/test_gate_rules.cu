/* test_gate_rules.cu: the rules and scores of moe/gate.cuh against their reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_gate_rules.cu -o test_gate_rules
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_gate_rules.cu -o test_gate_rules

   A token whose choices hang on a difference below the rounding of fp32 may choose otherwise: the
   reference tells how near it was, and such tokens are compared by their sums alone. */
#include "tests/test.h"

#include "moe/gate.cuh"
#include "moe/ref/gate_rules.h"

/* A case: a descriptor that holds options alone, and how the rest is drawn. */
typedef struct rules_case {
    moe_gate_desc options;
    int T, E, K, dtype;
    int bias, expert_disabled, token_disabled, prob, nan, seed_offset; /* 1: with it */
    float spread; /* of the logits; 0 = 1 */
    int pad;      /* stride - E */
    int misalign; /* of the logits, elements */
} rules_case;

static int64_t row_of(const rules_case* c, int64_t t) { return t * (c->E + c->pad); }

/* The same twice: on the host for the reference, on the device for the gate. */
typedef struct rules_bufs {
    void* logits;
    float* bias;
    uint8_t *expert_disabled, *token_disabled;
    uint64_t offset;
    tbuf d_logits, d_bias, d_expert_disabled, d_token_disabled, d_offset;
    tbuf ids, weights, count, chunk, prob, workspace, fault;
    moe_gate_desc host, device;
} rules_bufs;

static void fill(rules_bufs* b, const rules_case* c, trand* r)
{
    const float spread = c->spread != 0 ? c->spread : 1.0f;
    test_poison(b->logits, b->d_logits.bytes); /* NaN between the rows */
    for (int64_t t = 0; t < c->T; ++t)
        for (int e = 0; e < c->E; ++e)
            moe_store(b->logits, row_of(c, t) + e, c->dtype, spread * trand_normal(r));
    for (int e = 0; e < c->E; ++e) {
        b->bias[e] = 0.3f * trand_normal(r);
        b->expert_disabled[e] = trand_int(r, 0, 5) == 0;
    }
    for (int t = 0; t < c->T; ++t) {
        b->token_disabled[t] = (uint8_t)(trand_int(r, 0, 4) == 0 ? trand_int(r, 1, 255) : 0);
        if (c->nan && trand_int(r, 0, 6) == 0) { /* any NaN: all bits set is one too */
            const int64_t at = row_of(c, t) + trand_int(r, 0, c->E - 1);
            moe_store(b->logits, at, c->dtype, NAN);
            if (t & 1 && c->dtype == MOE_FP32) ((uint32_t*)b->logits)[at] = 0xffffffffu;
            if (t & 1 && c->dtype != MOE_FP32) ((uint16_t*)b->logits)[at] = 0xffff;
        }
    }
    b->offset = trand_bits(r);
}

static void put(rules_bufs* b)
{
    tbuf_put(&b->d_logits, b->logits);
    tbuf_put(&b->d_bias, b->bias);
    tbuf_put(&b->d_expert_disabled, b->expert_disabled);
    tbuf_put(&b->d_token_disabled, b->token_disabled);
    tbuf_put(&b->d_offset, &b->offset);
}

static void bufs_new(rules_bufs* b, const rules_case* c, trand* r)
{
    const size_t slots = (size_t)c->T * (size_t)c->K, E = (size_t)c->E, T = (size_t)c->T;
    moe_gate_desc* d = &b->device;
    const size_t elem = (size_t)moe_dtype_bytes(c->dtype);
    const size_t logits = (size_t)row_of(c, c->T) * elem;
    size_t bytes = 0;
    b->logits = test_host((int64_t)logits);
    b->bias = (float*)test_host((int64_t)E * 4);
    b->expert_disabled = (uint8_t*)test_host((int64_t)E);
    b->token_disabled = (uint8_t*)test_host((int64_t)T);
    b->d_logits = tbuf_new("logits", logits, (size_t)c->misalign * elem);
    fill(b, c, r);
    b->d_bias = tbuf_new("expert_bias", E * 4, 4);
    b->d_expert_disabled = tbuf_new("expert_disabled", E, 1);
    b->d_token_disabled = tbuf_new("token_disabled", T, 3);
    b->d_offset = tbuf_new("seed_offset", 8, 8);
    put(b);
    b->ids = tbuf_new("ids", slots * 4, 4);
    b->weights = tbuf_new("weights", slots * 4, 12);
    b->count = tbuf_new("expert_count", E * 4, 4);
    b->chunk = tbuf_new("chunk_count", E * (size_t)moe_num_chunks(c->T) * 4, 8);
    b->prob = tbuf_new("prob_sum", E * 4, 4);
    b->fault = tfault_new(0);
    b->host = c->options;
    b->host.num_tokens = c->T;
    b->host.num_experts = c->E;
    b->host.top_k = c->K;
    b->host.logits_dtype = c->dtype;
    b->host.logits = b->logits;
    b->host.logits_stride = c->pad ? c->E + c->pad : 0;
    if (c->bias) b->host.expert_bias = b->bias;
    if (c->expert_disabled) b->host.expert_disabled = b->expert_disabled;
    if (c->token_disabled) b->host.token_disabled = b->token_disabled;
    if (c->seed_offset) b->host.seed_offset = &b->offset;
    *d = b->host;
    d->logits = b->d_logits.p;
    if (c->bias) d->expert_bias = (const float*)b->d_bias.p;
    if (c->expert_disabled) d->expert_disabled = (const uint8_t*)b->d_expert_disabled.p;
    if (c->token_disabled) d->token_disabled = (const uint8_t*)b->d_token_disabled.p;
    if (c->seed_offset) d->seed_offset = (const uint64_t*)b->d_offset.p;
    d->ids = (int32_t*)b->ids.p;
    d->weights = (float*)b->weights.p;
    d->expert_count = (int32_t*)b->count.p;
    d->chunk_count = (int32_t*)b->chunk.p;
    if (c->prob) d->prob_sum = (float*)b->prob.p;
    d->fault = (uint64_t*)b->fault.p;
    d->rank = TEST_RANK;
    CHECK_STATUS(moe_gate_workspace(d, &bytes), MOE_OK);
    b->workspace = tbuf_new("workspace", bytes, 0);
    d->workspace = bytes ? b->workspace.p : 0;
    d->workspace_bytes = bytes;
}

static void bufs_free(rules_bufs* b)
{
    tbuf* all[] = {&b->d_logits, &b->d_bias, &b->d_expert_disabled, &b->d_token_disabled,
                   &b->d_offset, &b->ids,    &b->weights,           &b->count,
                   &b->chunk,    &b->prob,   &b->workspace,         &b->fault};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i) tbuf_free(all[i]);
    free(b->logits);
    free(b->bias);
    free(b->expert_disabled);
    free(b->token_disabled);
}

static const char* case_text(const rules_case* c)
{
    static char text[400];
    const moe_gate_desc* o = &c->options;
    snprintf(
        text, sizeof text,
        "T=%d E=%d K=%d %s score=%d renormalize=%d scale=%g temperature=%g noise=%g dropout=%g "
        "threshold=%g groups=%d of %d batch=%d bias=%d off=%d/%d prob=%d nan=%d seed=%llu+%d",
        c->T, c->E, c->K, moe_dtype_name(c->dtype), o->score, o->renormalize, (double)o->scale,
        (double)o->temperature, (double)o->noise, (double)o->dropout, (double)o->threshold,
        o->top_groups, o->num_groups, o->whole_batch, c->bias, c->expert_disabled,
        c->token_disabled, c->prob, c->nan, (unsigned long long)o->seed, c->seed_offset);
    return text;
}

/* By how much fast logarithms may move a logit of token t: normal numbers of radius r are right to
   about 5e-7 / r, since log2(u) is right to an absolute 2^-22 where u is near 1. A square moves more. */
static double noise_error(const moe_gate_desc* d, int64_t t)
{
    double least = 1;
    if (d->noise == 0) return 0;
    for (int e = 0; e < d->num_experts; e += 4) {
        const moe_random4 r = moei_ref_words(d, t, e / 4, MOE_GATE_STREAM_NOISE);
        const double a = -2 * log(((double)r.x + 0.5) / 4294967296.0);
        const double b = -2 * log(((double)r.z + 0.5) / 4294967296.0);
        least = fmin(least, fmin(a, b));
    }
    return (double)d->noise * fmin(7e-4, 5e-7 / sqrt(least)) *
           (d->score == MOE_SCORE_QUADRATIC ? 10 : 1);
}

/* Compares all outputs; returns the share of tokens whose choices were compared. */
static double compare(const rules_bufs* b, const rules_case* c)
{
    const int T = c->T, E = c->E, K = c->K;
    const int64_t slots = (int64_t)T * K, chunks = moe_num_chunks(T);
    int32_t* ids = (int32_t*)test_host(slots * 4);
    double* weights = (double*)test_host(slots * 8);
    double* margin = (double*)test_host((int64_t)T * 8);
    double* prob = (double*)test_host((int64_t)E * 8);
    int32_t* counted = (int32_t*)calloc((size_t)(E * (chunks + 1)), 4);
    int32_t* got_ids = (int32_t*)tbuf_copy(&b->ids);
    float* got = (float*)tbuf_copy(&b->weights);
    int32_t* count = (int32_t*)tbuf_copy(&b->count);
    int32_t* chunk = (int32_t*)tbuf_copy(&b->chunk);
    const int before = test_now.failures;
    /* what rounding does: to logits a step of theirs, which their noise, squares and cosines spread */
    const double spread = c->spread != 0 ? (double)c->spread : 1.0;
    const double least = 3e-6 * (1 + spread) * (1 + spread) * (1 + c->options.noise * 4);
    const double close = c->options.score >= MOE_SCORE_QUADRATIC /* to weights: e to the logits */
                             ? least
                             : least / (1 + spread);
    int compared = 0, used = 0;
    int64_t first_nan = -1;
    double slack = 0; /* of the sums, for tokens of imprecise noise */
    moe_ref_gate_rules_f64(&b->host, ids, weights, prob, margin);
    for (int t = 0; t < T; ++t) {
        const double noisy = noise_error(&b->host, t);
        int same = margin[t] >= least && noisy <= least / 2;
        if (noisy > least / 2) slack += noisy;
        for (int k = 0; k < K; ++k) {
            const int64_t s = (int64_t)t * K + k;
            const int e = got_ids[s];
            if (!CHECK(e >= -1 && e < E, "token %d choice %d: id %d", t, k, e)) continue;
            if (e >= 0) {
                ++counted[E * (1 + t / moe_chunk_tokens(T)) + e];
                ++counted[e];
            }
            CHECK(got[s] == got[s] && (e >= 0 || got[s] == 0), "token %d choice %d: weight %g", t, k,
                  (double)got[s]);
            used += e >= 0;
            if (!same) continue;
            CHECK(e == ids[s], "token %d choice %d: id %d, not %d (margin %g)", t, k, e, ids[s],
                  margin[t]);
            CHECK(fabs(got[s] - weights[s]) <= close * 2 * (fabs(weights[s]) + (c->options.score ==
                  MOE_SCORE_SPARSEMAX ? 1.0 : 1e-30)) * (c->options.scale ? fabs(c->options.scale) : 1),
                  "token %d choice %d: weight %.9g, not %.9g", t, k, (double)got[s], weights[s]);
        }
        compared += same;
        if (first_nan < 0 && !(c->token_disabled && b->token_disabled[t]))
            for (int e = 0; e < E; ++e)
                if (!(c->expert_disabled && b->expert_disabled[e]) &&
                    !(c->options.dropout > 0 && moei_ref_dropped(&b->host, t, e))) {
                    const float l = (float)moe_load(b->logits, row_of(c, t) + e, c->dtype);
                    if (l != l) first_nan = t;
                }
    }
    CHECK_INTS("expert_count", count, counted, E);
    CHECK_INTS("chunk_count", chunk, counted + E, E * chunks);
    CHECK_FAULT(&b->fault, first_nan < 0 ? MOE_FAULT_NONE : MOE_FAULT_NAN_LOGIT,
                first_nan < 0 ? 0 : first_nan);
    CHECK(T < 8 || used > 0 || c->nan ||
              (c->options.score == MOE_SCORE_SPARSEMAX && c->options.whole_batch),
          "nothing was chosen, so this shows nothing");
    if (c->prob) {
        float* sums = (float*)tbuf_copy(&b->prob);
        double all = 0, want = 0;
        for (int e = 0; e < E; ++e) {
            CHECK(fabs(sums[e] - prob[e]) <= least * 2 * (prob[e] + 0.01 * T) + slack,
                  "prob_sum %d: %.9g, not %.9g", e, (double)sums[e], prob[e]);
            all += sums[e];
            want += prob[e];
        }
        CHECK(fabs(all - want) < 1e-4 * (want + 1), "probabilities of %g in all, not %g", all, want);
        free(sums);
    } else {
        CHECK(tbuf_holds(&b->prob, 0), "prob_sum was not given");
    }
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    free(ids);
    free(weights);
    free(margin);
    free(prob);
    free(counted);
    free(got_ids);
    free(got);
    free(count);
    free(chunk);
    return T > 0 ? (double)compared / T : 1;
}

static double run_case(const rules_case* c, trand* r)
{
    rules_bufs b;
    double share;
    bufs_new(&b, c, r);
    CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
    share = compare(&b, c);
    bufs_free(&b);
    return share;
}

static rules_case plain_case(int T, int E, int K)
{
    rules_case c;
    memset(&c, 0, sizeof c);
    c.T = T;
    c.E = E;
    c.K = K;
    c.dtype = MOE_FP32;
    return c;
}

/* Rows written by hand, fp32: `o` has the options, the sizes and host addresses of logits, bias and
   experts that are off. ids, weights, prob: what must come; null: what the reference says, which
   must agree in any case. Each form of the kernel runs: as it is; with expert_disabled; and, without
   groups, one of so many experts, all further ones off, that a warp has a token. */
static void check_rows(const char* what, const moe_gate_desc* o, const int32_t* ids,
                       const double* weights, const double* prob, int fault, int64_t index)
{
    const int T = o->num_tokens, K = o->top_k, before = test_now.failures;
    const int forms = o->num_groups > 1 ? 2 : 3;
    const double least = o->noise > 0 ? 2e-6 : 1e-37; /* the device draws noise by quick functions */
    const int64_t slots = (int64_t)T * K;
    for (int form = 0; form < forms; ++form) {
        const int E = form == 2 ? 1028 : o->num_experts;
        float* logits = (float*)test_host((int64_t)T * E * 4);
        float* bias = (float*)test_host(E * 4);
        uint8_t* off = (uint8_t*)test_host(E);
        int32_t* want_ids = (int32_t*)test_host(slots * 4);
        double* want = (double*)test_host(slots * 8);
        double* want_prob = (double*)test_host(E * 8);
        void* poison = test_host(slots * 4);
        moe_gate_desc h = *o, d;
        tbuf b[8];
        size_t bytes = 0;
        int32_t* got_ids;
        float *got, *got_prob;
        memset(poison, 0x5a, (size_t)slots * 4);
        for (int e = 0; e < E; ++e) {
            const int in = e < o->num_experts;
            for (int t = 0; t < T; ++t)
                logits[t * E + e] = in ? ((const float*)o->logits)[t * o->num_experts + e] : 3.0f;
            bias[e] = in && o->expert_bias ? o->expert_bias[e] : 0.0f;
            off[e] = in ? (uint8_t)(o->expert_disabled && o->expert_disabled[e]) : 1;
        }
        h.num_experts = E;
        h.logits = logits;
        h.expert_bias = o->expert_bias ? bias : 0;
        h.expert_disabled = o->expert_disabled || form > 0 ? off : 0;
        moe_ref_gate_rules_f64(&h, want_ids, want, want_prob, 0);
        if (ids) CHECK(memcmp(ids, want_ids, (size_t)slots * 4) == 0, "ids of the reference");
        for (int64_t s = 0; weights && s < slots; ++s)
            CHECK(fabs(weights[s] - want[s]) <= 1e-9 + 1e-6 * fabs(want[s]),
                  "slot %lld: the reference has %g", (long long)s, want[s]);
        for (int e = 0; prob && e < E; ++e)
            CHECK(fabs((e < o->num_experts ? prob[e] : 0) - want_prob[e]) <= 1e-6 * T,
                  "prob_sum %d: the reference has %g", e, want_prob[e]);
        d = h;
        b[0] = tbuf_from("logits", logits, (size_t)T * (size_t)E * 4, 0);
        b[1] = tbuf_from("expert_bias", bias, (size_t)E * 4, 0);
        b[2] = tbuf_from("expert_disabled", off, (size_t)E, 0);
        b[3] = tbuf_from("ids", poison, (size_t)slots * 4, 0);
        b[4] = tbuf_from("weights", poison, (size_t)slots * 4, 0);
        b[5] = tbuf_new("prob_sum", (size_t)E * 4, 0);
        b[6] = tfault_new(0);
        d.logits = b[0].p;
        if (d.expert_bias) d.expert_bias = (const float*)b[1].p;
        if (d.expert_disabled) d.expert_disabled = (const uint8_t*)b[2].p;
        d.ids = (int32_t*)b[3].p;
        d.weights = (float*)b[4].p;
        if (prob) d.prob_sum = (float*)b[5].p;
        d.fault = (uint64_t*)b[6].p;
        d.rank = TEST_RANK;
        CHECK_STATUS(moe_gate_workspace(&d, &bytes), MOE_OK);
        b[7] = tbuf_new("workspace", bytes, 0);
        d.workspace = bytes ? b[7].p : 0;
        d.workspace_bytes = bytes;
        CHECK_STATUS(moe_gate(&d, test_now.stream), MOE_OK);
        got_ids = (int32_t*)tbuf_copy(&b[3]);
        got = (float*)tbuf_copy(&b[4]);
        got_prob = (float*)tbuf_copy(&b[5]);
        for (int64_t s = 0; s < slots; ++s) {
            CHECK(got_ids[s] == want_ids[s], "slot %lld: id %d, not %d", (long long)s, got_ids[s],
                  want_ids[s]);
            CHECK(fabs(got[s] - want[s]) <= 4e-6 * fabs(want[s]) + least,
                  "slot %lld: weight %.9g, not %.9g", (long long)s, (double)got[s], want[s]);
        }
        for (int e = 0; prob && e < E; ++e)
            CHECK(fabs(got_prob[e] - want_prob[e]) <= 4e-6 * T, "prob_sum %d: %.9g, not %.9g", e,
                  (double)got_prob[e], want_prob[e]);
        CHECK_FAULT(&b[6], fault, index);
        if (test_now.failures > before) printf("  in: %s, form %d\n", what, form);
        for (int i = 0; i < 8; ++i) tbuf_free(&b[i]);
        free(logits), free(bias), free(off), free(want_ids), free(want), free(want_prob);
        free(poison), free(got_ids), free(got), free(got_prob);
    }
}

/* Options of rows written by hand. */
static moe_gate_desc rows(const float* logits, int T, int E, int K, int score)
{
    moe_gate_desc o;
    memset(&o, 0, sizeof o);
    o.logits = logits;
    o.num_tokens = T;
    o.num_experts = E;
    o.top_k = K;
    o.score = score;
    return o;
}

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
        const float l4[] = {-inf, 1, -inf, -inf, 0.9f, 0.9f, -1, -1}, b4[] = {5, 0, 0, 0, 0, 0, 0, 0};
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

/* A batch's sums of infinities and of large numbers; whom NaN leave out. */
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
            moe_ref_gate_rules_f64(&b.host, ids, want, 0, margin);
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

/* Shapes of each form of the kernel: in registers with 4, 8 and 32 lanes, a warp a token. */
static const int shapes[][3] = {{70, 128, 8}, {37, 100, 5},  {33, 16, 2},   {40, 256, 8}, {21, 200, 3},
                                {20, 512, 10}, {9, 1000, 32}, {12, 64, 40}, {6, 1500, 4}};
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
    enum { TEMPERATURE, NOISE, DROPOUT, BIAS, EXPERT_OFF, TOKEN_OFF, GROUPS, NANS, ALL, RULES };
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
                if (rule == TEMPERATURE || rule == ALL) c.options.temperature = 0.7f;
                if (rule == NOISE || rule == ALL) c.options.noise = 0.5f;
                if (rule == DROPOUT || rule == ALL) c.options.dropout = 0.25f;
                c.bias = rule == BIAS || rule == ALL;
                c.expert_disabled = rule == EXPERT_OFF || rule == ALL;
                c.token_disabled = rule == TOKEN_OFF || rule == ALL;
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
            c.prob = 1;
            bufs_new(&b, &c, &r);
            tbuf_put(&b.fault, &word);
            CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
            CHECK(tbuf_holds(&b.ids, 0) && tbuf_holds(&b.weights, 0) && tbuf_holds(&b.chunk, 0) &&
                      tbuf_holds(&b.prob, 0) && tbuf_holds(&b.workspace, 0),
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
                c.expert_disabled = c.prob = 1;
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
                c.token_disabled = c.nan = !variant;
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
            c.expert_disabled = 1;
            bufs_new(&b, &c, &r);
            for (int64_t k = 0; k < (int64_t)c.T * c.E; ++k)
                ((float*)b.logits)[k] = values[trand_int(&r, 0, 6)];
            put(&b);
            CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
            compare(&b, &c);
            bufs_free(&b);
        }
}

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

static moe_status call_gate(void* d, cudaStream_t stream)
{
    return moe_gate((const moe_gate_desc*)d, stream);
}

/* The same bits every run; a captured gate draws anew when its seed_offset changes. */
static void test_bits_and_graph(void)
{
    trand r = trand_new(9);
    for (int i = 0; i < SHAPES; ++i) {
        rules_case c = plain_case(shapes[i][0], shapes[i][1], shapes[i][2]);
        const uint64_t no_fault = 0;
        rules_bufs b;
        tbuf* out[5];
        tgraph g;
        c.options.score = 1 + i % MOE_SCORE_PIONEER;
        c.options.noise = 0.3f;
        c.options.dropout = 0.1f;
        c.bias = c.expert_disabled = c.token_disabled = c.prob = c.seed_offset = 1;
        if (i % 3 == 2) {
            c.options.whole_batch = 1;
            c.options.noise = c.options.dropout = 0;
            c.bias = 0;
        }
        bufs_new(&b, &c, &r);
        out[0] = &b.ids, out[1] = &b.weights, out[2] = &b.count, out[3] = &b.chunk, out[4] = &b.prob;
        test_same_bits("gate", call_gate, &b.device, out, 5, MOE_ON_HOST ? 3 : 100);
        compare(&b, &c);
        if (tgraph_capture(&g, call_gate, &b.device)) {
            for (int n = 0; n < 3; ++n) {
                fill(&b, &c, &r);
                put(&b);
                tbuf_put(&b.fault, &no_fault);
                tbuf_poison(&b.ids);
                tbuf_poison(&b.prob);
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
    c.prob = c.bias = 1;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_gate(&b.device, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b.prob, zeros) && tbuf_holds(&b.count, zeros), "sums of nothing");
    bufs_free(&b);
}

/* Every option outside its range, or beside one that it contradicts. */
static void test_refusals(void)
{
    rules_case c = plain_case(40, 24, 3);
    trand r = trand_new(11);
    rules_bufs b;
    moe_gate_desc good, d;
    c.prob = c.bias = c.expert_disabled = c.token_disabled = c.seed_offset = 1;
    c.pad = 24; /* a last row that dense strides would not reach */
    bufs_new(&b, &c, &r);
    good = b.device;
#define REFUSED(change, kind, field)                                                              \
    d = good;                                                                                     \
    change;                                                                                       \
    CHECK_STATUS(moe_gate(&d, test_now.stream), MOE_STATUS(kind, field));                         \
    CHECK_REFUSED(moe_gate_prepared, moe_gate_prepare, &d, MOE_STATUS(kind, field))
    REFUSED(d.score = MOE_SCORE_PIONEER + 1, MOE_ERR_OPTION, score);
    REFUSED(d.temperature = -1, MOE_ERR_RANGE, temperature);
    REFUSED(d.temperature = NAN, MOE_ERR_RANGE, temperature);
    REFUSED(d.temperature = INFINITY, MOE_ERR_RANGE, temperature);
    REFUSED(d.temperature = 1e-38f, MOE_ERR_RANGE, temperature);
    REFUSED(d.noise = -0.1f, MOE_ERR_RANGE, noise);
    REFUSED(d.noise = NAN, MOE_ERR_RANGE, noise);
    REFUSED(d.noise = INFINITY, MOE_ERR_RANGE, noise);
    REFUSED(d.dropout = 1, MOE_ERR_RANGE, dropout);
    REFUSED(d.dropout = -0.5f, MOE_ERR_RANGE, dropout);
    REFUSED(d.dropout = NAN, MOE_ERR_RANGE, dropout);
    REFUSED(d.threshold = 1, MOE_ERR_RANGE, threshold);
    REFUSED(d.threshold = -1, MOE_ERR_RANGE, threshold);
    REFUSED(d.threshold = NAN, MOE_ERR_RANGE, threshold);
    REFUSED(d.threshold = 0.5f, MOE_ERR_CONFLICT, threshold);
    REFUSED(d.num_groups = -1, MOE_ERR_RANGE, num_groups);
    REFUSED(d.num_groups = 5, MOE_ERR_RANGE, num_groups);
    REFUSED((d.num_groups = 40, d.num_experts = 80, d.logits_stride = 0), MOE_ERR_RANGE, num_groups);
    REFUSED(d.top_groups = 2, MOE_ERR_RANGE, top_groups);
    REFUSED((d.num_groups = 4, d.top_groups = 5), MOE_ERR_RANGE, top_groups);
    REFUSED((d.num_groups = 4, d.top_groups = -1), MOE_ERR_RANGE, top_groups);
    REFUSED((d.num_groups = 12, d.top_groups = 1), MOE_ERR_CONFLICT, top_groups);
    REFUSED(d.whole_batch = 2, MOE_ERR_OPTION, whole_batch);
    REFUSED(d.whole_batch = -1, MOE_ERR_OPTION, whole_batch);
    REFUSED(d.whole_batch = 1, MOE_ERR_CONFLICT, expert_bias);
    REFUSED((d.whole_batch = 1, d.expert_bias = 0, d.noise = 1), MOE_ERR_CONFLICT, noise);
    REFUSED((d.whole_batch = 1, d.expert_bias = 0, d.dropout = 0.5f), MOE_ERR_CONFLICT, dropout);
    REFUSED((d.whole_batch = 1, d.expert_bias = 0, d.num_groups = 2, d.top_groups = 1),
            MOE_ERR_CONFLICT, num_groups);
    REFUSED((d.whole_batch = 1, d.expert_bias = 0, d.score = MOE_SCORE_SIGMOID, d.threshold = 0.5f),
            MOE_ERR_CONFLICT, threshold);
    REFUSED((d.whole_batch = 1, d.expert_bias = 0), MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.workspace = 0, MOE_ERR_NULL, workspace);
    REFUSED(d.workspace = (char*)d.workspace + 8, MOE_ERR_ALIGN, workspace);
    REFUSED(d.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.workspace = d.prob_sum - 1, MOE_ERR_OVERLAP, workspace);
    REFUSED(d.prob_sum = (float*)((char*)d.prob_sum + 2), MOE_ERR_ALIGN, prob_sum);
    REFUSED(d.expert_bias = (float*)((char*)d.expert_bias + 1), MOE_ERR_ALIGN, expert_bias);
    REFUSED(d.seed_offset = (uint64_t*)((char*)d.seed_offset + 4), MOE_ERR_ALIGN, seed_offset);
    REFUSED(d.prob_sum = (float*)d.logits, MOE_ERR_OVERLAP, prob_sum);
    REFUSED(d.prob_sum = (float*)d.logits + 39 * 48 + 23, MOE_ERR_OVERLAP, prob_sum);
    REFUSED(d.workspace = (void*)(((uintptr_t)d.logits + 39 * 48 * 4 + 15) & ~(uintptr_t)15),
            MOE_ERR_OVERLAP, workspace);
    REFUSED(d.prob_sum = (float*)d.expert_bias, MOE_ERR_OVERLAP, prob_sum);
    REFUSED(d.prob_sum = (float*)d.expert_bias + 23, MOE_ERR_OVERLAP, prob_sum);
    REFUSED(d.ids = (int32_t*)((uintptr_t)(d.expert_disabled + 23) & ~(uintptr_t)3),
            MOE_ERR_OVERLAP, ids);
    REFUSED(d.ids = (int32_t*)((uintptr_t)(d.token_disabled + 39) & ~(uintptr_t)3), MOE_ERR_OVERLAP,
            ids);
    REFUSED(d.ids = (int32_t*)((uintptr_t)d.expert_disabled & ~(uintptr_t)3), MOE_ERR_OVERLAP, ids);
    REFUSED(d.ids = (int32_t*)((uintptr_t)(d.token_disabled + 4) & ~(uintptr_t)3), MOE_ERR_OVERLAP,
            ids);
    REFUSED(d.weights = (float*)d.seed_offset, MOE_ERR_OVERLAP, weights);
#undef REFUSED
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.ids, 0) && tbuf_holds(&b.weights, 0) && tbuf_holds(&b.prob, 0) &&
              tbuf_holds(&b.workspace, 0) && tbuf_holds(&b.count, 0) && tbuf_holds(&b.chunk, 0),
          "a refused call wrote something");
    CHECK_STATUS(moe_gate(&good, test_now.stream), MOE_OK);
    compare(&b, &c);
    bufs_free(&b);
}

/* moe_warp_top_k from a kernel of one's own: one warp, a row in shared memory. */
typedef struct top_args {
    const float* merit;
    int32_t* ids;
    int32_t num_experts, top_k;
} top_args;

typedef struct top_shared {
    float row[300];
} top_shared;

MOE_KERNEL(32, 1) top_kernel(MOE_ARG(top_args) d)
{
    MOE_SHARED(top_shared, s);
    for (int e = moe_lane(); e < d.num_experts; e += MOE_WARP_SIZE)
        s.row[e] = d.merit[(int64_t)blockIdx.x * d.num_experts + e];
    __syncwarp(MOE_FULL_WARP);
    moe_warp_top_k(d.ids + (int64_t)blockIdx.x * d.top_k, s.row, d.num_experts, d.top_k);
}

static void test_warp_top_k(void)
{
    enum { ROWS = 20, E = 300, K = 12 };
    trand r = trand_new(12);
    float* merit = (float*)test_host(ROWS * E * 4);
    int32_t* want = (int32_t*)test_host(ROWS * K * 4);
    tbuf in, out;
    top_args a;
    moe_launch_config c = moe_grid(ROWS, 32, 0, test_now.stream);
    for (int row = 0; row < ROWS; ++row) {
        char taken[E];
        memset(taken, 0, sizeof taken);
        for (int e = 0; e < E; ++e) {
            merit[row * E + e] = row & 1 ? (float)trand_int(&r, -2, 2) : trand_normal(&r);
            if (row >= ROWS - 3 && (row == ROWS - 1 || trand_int(&r, 0, 40))) merit[row * E + e] = NAN;
        }
        for (int k = 0; k < K; ++k) {
            int best = -1;
            for (int e = 0; e < E; ++e) {
                const float v = merit[row * E + e];
                if (v == v && !taken[e] && (best < 0 || v > merit[row * E + best])) best = e;
            }
            want[row * K + k] = best;
            if (best >= 0) taken[best] = 1;
        }
    }
    in = tbuf_from("merit", merit, ROWS * E * 4, 0);
    out = tbuf_new("ids", ROWS * K * 4, 0);
    a.merit = (const float*)in.p;
    a.ids = (int32_t*)out.p;
    a.num_experts = E;
    a.top_k = K;
    CHECK_STATUS(MOE_LAUNCH(top_kernel, c, a), MOE_OK);
    CHECK(tbuf_holds(&out, want), "ids");
    tbuf_free(&in);
    tbuf_free(&out);
    free(merit);
    free(want);
}

static void test_large(void)
{
#if !MOE_ON_HOST
    static const int big[][3] = {{32768, 128, 8}, {8192, 256, 8}, {3001, 512, 10}, {2000, 4096, 8}};
    trand r = trand_new(13);
    for (int i = 0; i < 4; ++i)
        for (int n = 0; n < 3; ++n) {
            rules_case c = plain_case(big[i][0], big[i][1], big[i][2]);
            c.options.score = n == 1 ? MOE_SCORE_SIGMOID : n == 2 ? MOE_SCORE_SPARSEMAX : 0;
            c.options.noise = n == 0 ? 1.0f : 0.0f;
            c.options.whole_batch = n == 2;
            c.bias = n == 1;
            c.options.num_groups = n == 1 ? 8 : 0;
            c.options.top_groups = n == 1 ? 4 : 0;
            c.prob = 1;
            run_case(&c, &r);
        }
#endif
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
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
    RUN(test_draws);
    RUN(test_bits_and_graph);
    RUN(test_no_tokens);
    RUN(test_refusals);
    RUN(test_warp_top_k);
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
    RUN(test_large);
    return test_end();
}
