/* case.h: a case, its buffers, how it is drawn, run and compared; rows written by hand */
#ifndef MOE_TESTS_GATE_RULES_CASE_H
#define MOE_TESTS_GATE_RULES_CASE_H

#include "tests/test_gate.h"

#include "moe/ref/gate_rules.h"

/* A case: a descriptor that holds options alone, and how the rest is drawn. */
typedef struct rules_case {
    moe_gate_desc options;
    int T, E, K, dtype;
    int bias, expert_disabled, token_disabled, prob, z, nan, seed_offset; /* 1: with it */
    float spread;                                                         /* of the logits; 0 = 1 */
    int pad;                                                              /* stride - E */
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
    tbuf ids, weights, count, chunk, prob, z, workspace, fault;
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
    b->z = tbuf_new("z_sum", 4, 4);
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
    if (c->z) d->z_sum = (float*)b->z.p;
    d->fault = (uint64_t*)b->fault.p;
    d->rank = TEST_RANK;
    CHECK_STATUS(moe_gate_workspace(d, &bytes), MOE_OK);
    b->workspace = tbuf_new("workspace", bytes, 0);
    d->workspace = bytes ? b->workspace.p : 0;
    d->workspace_bytes = bytes;
}

static void bufs_free(rules_bufs* b)
{
    tbuf* all[] = {&b->d_logits,
                   &b->d_bias,
                   &b->d_expert_disabled,
                   &b->d_token_disabled,
                   &b->d_offset,
                   &b->ids,
                   &b->weights,
                   &b->count,
                   &b->chunk,
                   &b->prob,
                   &b->z,
                   &b->workspace,
                   &b->fault};
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
        "threshold=%g groups=%d of %d batch=%d bias=%d off=%d/%d prob=%d z=%d nan=%d seed=%llu+%d",
        c->T, c->E, c->K, moe_dtype_name(c->dtype), o->score, o->renormalize, (double)o->scale,
        (double)o->temperature, (double)o->noise, (double)o->dropout, (double)o->threshold,
        o->top_groups, o->num_groups, o->whole_batch, c->bias, c->expert_disabled,
        c->token_disabled, c->prob, c->z, c->nan, (unsigned long long)o->seed, c->seed_offset);
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

/* Compares z_sum with the exact one. `relative` is the error of a logit, `slack` how far imprecise
   noise may move the logarithms. Numbers beyond fp32 are infinite. */
static void compare_z(const tbuf* b, double want, int T, double relative, double slack)
{
    float got;
    tbuf_get(b, &got);
    if (want > 3.4e38) CHECK(got > 3e38f, "z_sum: %g, not %g", (double)got, want);
    else
        CHECK(fabs(got - want) <=
                  relative * 2 * (want + T) + 2 * sqrt(want) * slack + slack * slack,
              "z_sum: %.9g, not %.9g", (double)got, want);
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
    double z, slack = 0; /* of the sums, for tokens of imprecise noise */
    moe_ref_gate_rules_f64(&b->host, ids, weights, prob, &z, margin);
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
            CHECK(got[s] == got[s] && (e >= 0 || got[s] == 0), "token %d choice %d: weight %g", t,
                  k, (double)got[s]);
            used += e >= 0;
            if (!same) continue;
            CHECK(e == ids[s], "token %d choice %d: id %d, not %d (margin %g)", t, k, e, ids[s],
                  margin[t]);
            CHECK(fabs(got[s] - weights[s]) <=
                      close * 2 *
                          (fabs(weights[s]) +
                           (c->options.score == MOE_SCORE_SPARSEMAX ? 1.0 : 1e-30)) *
                          (c->options.scale ? fabs(c->options.scale) : 1),
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
        CHECK(fabs(all - want) < 1e-4 * (want + 1), "probabilities of %g in all, not %g", all,
              want);
        free(sums);
    } else {
        CHECK(tbuf_holds(&b->prob, 0), "prob_sum was not given");
    }
    if (c->z) compare_z(&b->z, z, T, least, slack);
    else CHECK(tbuf_holds(&b->z, 0), "z_sum was not given");
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
    const double least =
        o->noise > 0 ? 2e-6 : 1e-37; /* the device draws noise by quick functions */
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
        tbuf b[9];
        size_t bytes = 0;
        double want_z;
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
        moe_ref_gate_rules_f64(&h, want_ids, want, want_prob, &want_z, 0);
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
        b[8] = tbuf_new("z_sum", 4, 0);
        if (prob) d.prob_sum = (float*)b[5].p, d.z_sum = (float*)b[8].p;
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
        if (prob) compare_z(&b[8], want_z, T, 4e-6, 0);
        CHECK_FAULT(&b[6], fault, index);
        if (test_now.failures > before) printf("  in: %s, form %d\n", what, form);
        for (int i = 0; i < 9; ++i) tbuf_free(&b[i]);
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

#endif
