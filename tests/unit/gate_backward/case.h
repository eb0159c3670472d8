/* case.h: a case, its buffers, how it is drawn, run and compared */
#ifndef MOE_TESTS_GATE_BACKWARD_CASE_H
#define MOE_TESTS_GATE_BACKWARD_CASE_H

#include "tests/unit/gate_rules/case.h"

#include "moe/gate_backward.cuh"
#include "moe/ref/gate_backward.h"

TEST_CALL(call_backward, moe_gate_backward, moe_gate_backward_desc)

/* A case: that of the gate, and what its gradients have besides. */
typedef struct back_case {
    rules_case gate;
    int no_dweights, balance,
        by_z;     /* 1: without dweights; with balance_grad; with its factor of z */
    int dtype;    /* of dlogits */
    int pad;      /* stride - E of dlogits */
    int misalign; /* of dlogits, elements */
    int in_place; /* 1: dlogits are the logits; the three above are theirs */
} back_case;

typedef struct back_bufs {
    rules_bufs gate;          /* ids, weights: written by moe_gate */
    float *dweights, *losses; /* [T, K], [E + 1] on the host */
    tbuf d_dweights, d_losses, dlogits;
    moe_gate_backward_desc d;
} back_bufs;

/* Draws gradients; those of unused choices are NaN. */
static void back_fill(back_bufs* b, const back_case* c, trand* r)
{
    const int64_t slots = (int64_t)c->gate.T * c->gate.K;
    int32_t* ids = (int32_t*)tbuf_copy(&b->gate.ids);
    for (int64_t s = 0; s < slots; ++s) b->dweights[s] = ids[s] < 0 ? NAN : trand_normal(r);
    for (int e = 0; e <= c->gate.E; ++e) b->losses[e] = trand_normal(r);
    if (!c->by_z) b->losses[c->gate.E] = 0;
    tbuf_put(&b->d_dweights, b->dweights);
    tbuf_put(&b->d_losses, b->losses);
    free(ids);
}

/* Draws a case, runs the gate, and fills in the descriptor of the gradients. */
static void back_new(back_bufs* b, const back_case* c, trand* r)
{
    const int64_t T = c->gate.T, E = c->gate.E, K = c->gate.K;
    const size_t elem = (size_t)moe_dtype_bytes(c->dtype);
    bufs_new(&b->gate, &c->gate, r);
    CHECK_STATUS(moe_gate(&b->gate.device, test_now.stream), MOE_OK);
    b->dweights = (float*)test_host(T * K * 4);
    b->losses = (float*)test_host(E * 4 + 4);
    b->d_dweights = tbuf_new("dweights", (size_t)(T * K) * 4, 4);
    b->d_losses = tbuf_new("balance_grad", (size_t)E * 4 + 4, c->pad ? 4 : 0);
    b->dlogits = tbuf_new("dlogits", (size_t)(T * (E + c->pad)) * elem, (size_t)c->misalign * elem);
    back_fill(b, c, r);
    memset(&b->d, 0, sizeof b->d);
    b->d.gate = b->gate.device;
    b->d.gate.workspace = 0, b->d.gate.workspace_bytes = 0; /* not used */
    if (!c->no_dweights) b->d.dweights = (const float*)b->d_dweights.p;
    if (c->balance) b->d.balance_grad = (const float*)b->d_losses.p;
    b->d.dlogits = c->in_place ? b->gate.d_logits.p : b->dlogits.p;
    b->d.dlogits_dtype = c->in_place ? c->gate.dtype : c->dtype;
    if (c->in_place) b->d.dlogits_stride = b->d.gate.logits_stride;
    else if (c->pad) b->d.dlogits_stride = E + c->pad;
}

static void back_free(back_bufs* b)
{
    tbufs_free(TBUFS(&b->d_dweights, &b->d_losses, &b->dlogits));
    free(b->dweights), free(b->losses);
    bufs_free(&b->gate);
}

static const char* back_text(const back_case* c)
{
    static char text[600];
    snprintf(text, sizeof text,
             "%s; dweights=%d balance=%d z=%d dlogits %s pad=%d misalign=%d in place=%d",
             case_text(&c->gate), !c->no_dweights, c->balance, c->by_z, moe_dtype_name(c->dtype),
             c->pad, c->misalign, c->in_place);
    return text;
}

/* The reference's gradients for these choices, [T, E]. The caller frees them. */
static double* back_exact(const back_bufs* b, const back_case* c, const int32_t* ids)
{
    const int64_t T = c->gate.T, E = c->gate.E, K = c->gate.K;
    double *exact = (double*)test_host(T * E * 8), *g = (double*)test_host(T * K * 8);
    double* losses = (double*)test_host(E * 8 + 8);
    for (int64_t s = 0; s < T * K; ++s) g[s] = (double)b->dweights[s];
    for (int64_t e = 0; e <= E; ++e) losses[e] = (double)b->losses[e];
    moe_ref_gate_backward_f64(&b->gate.host, ids, c->no_dweights ? 0 : g, c->balance ? losses : 0,
                              exact);
    free(g), free(losses);
    return exact;
}

/* Returns the absolute sum of what makes up the gradients of token t: mag [E], by the logits after
   the rules, times the derivatives of square, cosine and temperature. Returns how near a sparsemax
   score is to the edge of the support; 1 for other scores, -1 for a token without gradients. */
static double back_magnitude(const back_bufs* b, const back_case* c, const int32_t* ids,
                             const float* weights, int64_t t, double* mag)
{
    const moe_gate_desc* h = &b->gate.host;
    const int E = c->gate.E, K = c->gate.K, score = h->score ? h->score : MOE_SCORE_SOFTMAX;
    const int own = h->renormalize || score == MOE_SCORE_TOPK_SOFTMAX;
    const int sparse = score == MOE_SCORE_SPARSEMAX, sigmoid = score == MOE_SCORE_SIGMOID;
    moe_ref_row_f64* row = (moe_ref_row_f64*)malloc(sizeof *row);
    double dot = 0, mean = 0, total = 0, all = 0, chosen = 0, near = 1, sum = 0, lse, scores = 0;
    for (int e = 0; e < E; ++e) mag[e] = 0;
    moei_ref_read_f64(h, t, row);
    if (row->nan || (h->token_disabled && h->token_disabled[t])) {
        free(row);
        return -1;
    }
    moei_ref_score_f64(h, row);
    lse = moei_ref_lse_f64(row, E);
    for (int e = 0; e < E; ++e) scores += row->score[e];
    for (int k = 0; k < K && !c->no_dweights; ++k) {
        const int64_t s = t * K + k;
        if (ids[s] < 0) continue;
        total += fabs((double)weights[s]);
        dot += fabs((double)weights[s] * (double)b->dweights[s]);
        all += fabs((double)b->dweights[s]);
        chosen += row->score[ids[s]];
    }
    if (own && total > 0) mean = dot / total;
    for (int e = 0; e < E; ++e) {
        const double l = row->logit[e],
                     p = sigmoid && scores > 0 ? row->score[e] / scores : row->score[e];
        const double cc = c->balance ? fabs((double)b->losses[e]) : 0;
        if (!row->seen[e]) continue;
        if (c->balance) sum += sparse ? (p > 0) * cc : p * cc;
        if (sparse) {
            const double gap = fabs((l == row->max ? 0 : l - row->max) - row->tau);
            if (gap < near) near = gap;
        }
    }
    for (int k = 0; k < K && !c->no_dweights; ++k) {
        const int64_t s = t * K + k;
        const double scale = h->scale != 0 ? fabs((double)h->scale) : 1;
        if (ids[s] < 0) continue;
        mag[ids[s]] +=
            (fabs((double)b->dweights[s]) + mean) *
            (sparse ? scale * (own ? (1 + 1 / chosen) / chosen : 1) : fabs((double)weights[s])) /
            (sigmoid ? 1 + exp(row->logit[ids[s]]) : 1);
        if (sparse) sum += (all + mean) * scale * (own ? (1 + 1 / chosen) / chosen : 1) / K;
    }
    for (int e = 0; e < E; ++e) {
        const double l = row->logit[e], cc = c->balance ? fabs((double)b->losses[e]) : 0;
        double p = row->score[e], slope = 1, share, q;
        if (!row->seen[e]) continue;
        if (sigmoid) p = scores > 0 ? p / scores / (1 + exp(l)) : 1;
        if (sparse) p = p > 0;
        if (p > 0) mag[e] += p * (cc + sum + (own || sigmoid || sparse ? 0 : dot));
        share = exp(l == row->max ? 0 : l - row->max);
        if (c->balance && share > 0 && b->losses[E] != 0)
            mag[e] += share * fabs(lse * (double)b->losses[E]);
        q = moe_load(b->gate.logits, row_of(&c->gate, t) + e, c->gate.dtype);
        if (h->temperature != 0) q /= (double)h->temperature;
        if (h->noise != 0) q += (double)h->noise * moei_ref_normal_f64(h, t, e);
        if (score == MOE_SCORE_QUADRATIC) slope = 2 * fabs(q) + 1;
        if (score == MOE_SCORE_PIONEER) slope = 2;
        if (mag[e] > 0) mag[e] *= slope / (h->temperature != 0 ? (double)h->temperature : 1);
    }
    free(row);
    return near;
}

/* Compares one gradient. Numbers near the largest fp32 may be infinite, of the same sign: a factor
   on the way may pass fp32. */
static void back_compare_one(double got, double want, double bound, int64_t t, int e)
{
    const int overflows = fabs(want) > 1e37 && fabs(got) > 3e38 && (got > 0) == (want > 0);
    CHECK(fabs(got - want) <= bound || overflows || (bound > 1e38 && got == got),
          "token %lld expert %d: %.9g, not %.9g; bound %.3g", (long long)t, e, got, want, bound);
}

/* Largest error over its bound, of all comparisons. */
static double back_worst;

/* Compares all gradients with the reference for the choices that the gate made. Skips tokens whose
   sparsemax support depends on rounding. Counts in *shown the gradients that a zero would fail;
   null: does not count. `relative`: of a gradient's absolute sum; 0: what rounding does. */
static void back_compare(const back_bufs* b, const back_case* c, double relative, int64_t* shown)
{
    const int64_t T = c->gate.T, E = c->gate.E;
    const int dtype = b->d.dlogits_dtype ? b->d.dlogits_dtype : MOE_FP32;
    const int64_t stride = b->d.dlogits_stride ? b->d.dlogits_stride : E;
    const tbuf* out = c->in_place ? &b->gate.d_logits : &b->dlogits;
    const double spread = c->gate.spread != 0 ? (double)c->gate.spread : 1.0;
    const double least = relative > 0
                             ? relative
                             : 4e-6 * (1 + spread) * (1 + spread) * (1 + c->gate.options.noise * 4);
    const double step = dtype == MOE_FP32 ? 0 : dtype == MOE_FP16 ? ldexp(1, -11) : ldexp(1, -8);
    const int before = test_now.failures;
    int32_t* ids = (int32_t*)tbuf_copy(&b->gate.ids);
    float* weights = (float*)tbuf_copy(&b->gate.weights);
    void* got = tbuf_copy(out);
    double *exact = back_exact(b, c, ids), *mag = (double*)test_host(E * 8);
    for (int64_t t = 0; t < T; ++t) {
        const double near = back_magnitude(b, c, ids, weights, t, mag);
        const double noisy = noise_error(&b->gate.host, t);
        if (near >= 0 && near < 1 && (near < 4 * least || near < 4 * noisy)) continue;
        for (int64_t e = 0; e < E; ++e) {
            const double want = exact[t * E + e];
            /* on a GPU a probability below 2^-126 counts as 0; here it has factors below 2^16 */
            const double bound = mag[e] * (least + 8 * noisy) + step * fabs(want) +
                                 (dtype == MOE_FP16 ? ldexp(1, -25) : 0) +
                                 (MOE_ON_HOST ? 1e-36 : ldexp(1, -110));
            const double value = (double)moe_load(got, t * stride + e, dtype);
            if (near < 0) CHECK(value == 0, "token %lld has gradient %g", (long long)t, value);
            else back_compare_one(value, want, bound, t, (int)e);
            if (near >= 0 && fabs(want) < 1e30 && fabs(value - want) > back_worst * bound)
                back_worst = fabs(value - want) / bound;
            if (shown) *shown += fabs(want) > 100 * bound;
        }
    }
    if (!c->in_place)
        CHECK(test_strays(got, (int64_t)out->bytes, moe_dtype_bytes(dtype), stride, E, 0, T) == 0,
              "what is between the rows was written");
    if (test_now.failures > before) printf("  in: %s\n", back_text(c));
    free(ids), free(weights), free(got), free(exact), free(mag);
}

/* Draws, runs and compares a case. */
static void back_run(const back_case* c, trand* r, int64_t* shown)
{
    back_bufs b;
    back_new(&b, c, r);
    CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
    back_compare(&b, c, 0, shown);
    CHECK_FAULT(&b.gate.fault, moe_fault_decode(tfault_word(&b.gate.fault)).code,
                moe_fault_decode(tfault_word(&b.gate.fault)).index);
    back_free(&b);
}

static back_case back_plain(int T, int E, int K)
{
    back_case c;
    memset(&c, 0, sizeof c);
    c.gate = plain_case(T, E, K);
    c.dtype = MOE_FP32;
    return c;
}

/* Draws options of a gate of this score, each rule in one case of `of`. K is fitted to the groups.
   */
static void back_rules(rules_case* c, trand* r, int of)
{
    moe_gate_desc* o = &c->options;
    o->seed = trand_bits(r);
    c->seed_offset = trand_one_in(r, of);
    if (trand_one_in(r, of)) o->temperature = 0.7f;
    if (trand_one_in(r, of)) o->scale = trand_int(r, 0, 1) ? 2.5f : -0.5f;
    c->expert_disabled = c->E > 2 && trand_one_in(r, of);
    c->token_disabled = trand_one_in(r, of);
    c->nan = trand_one_in(r, of);
    o->whole_batch = trand_one_in(r, 2 * of);
    if (o->whole_batch) return;
    if (trand_one_in(r, of)) o->noise = 0.5f;
    if (trand_one_in(r, of)) o->dropout = 0.25f;
    if (o->score == MOE_SCORE_SIGMOID && trand_one_in(r, of)) o->threshold = 0.4f;
    c->bias = trand_one_in(r, of);
    if (c->E % 4 == 0 && trand_one_in(r, of)) {
        o->num_groups = 4, o->top_groups = 2;
        if (c->K > c->E / 2) c->K = c->E / 2;
    }
}

#endif
