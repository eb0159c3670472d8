/* differences.h: finite differences in double of the whole gate, from logits to weights and losses

   test_differences       every score and rule: against the reference's gradients and the kernel's
   test_loss_differences  each balance loss, from logits to the loss, through moe_balance_loss */
#ifndef MOE_TESTS_GATE_BACKWARD_DIFFERENCES_H
#define MOE_TESTS_GATE_BACKWARD_DIFFERENCES_H

#include "tests/unit/gate_backward/case.h"

#include "moe/balance_loss.cuh"
#include "moe/ref/balance.h"

/* What a gate computes in double, and the loss that is differentiated. */
typedef struct diff_point {
    int32_t* ids;    /* [T, K] */
    double* weights; /* [T, K] */
    double* prob;    /* [E] */
    double* margin;  /* [T] */
    double z, loss;
} diff_point;

static diff_point diff_new(const rules_case* c)
{
    diff_point p;
    p.ids = (int32_t*)test_host((int64_t)c->T * c->K * 4);
    p.weights = (double*)test_host((int64_t)c->T * c->K * 8);
    p.prob = (double*)test_host((int64_t)c->E * 8);
    p.margin = (double*)test_host((int64_t)c->T * 8);
    p.z = p.loss = 0;
    return p;
}

static void diff_free(diff_point* p)
{
    free(p->ids), free(p->weights), free(p->prob), free(p->margin);
}

/* loss = sum of weights * g + sum of losses[e] * prob_sum[e] + losses[E] / 2 * z_sum. */
static void diff_loss(diff_point* p, const moe_gate_desc* h, const double* g, const double* losses)
{
    moe_ref_gate_rules_f64(h, p->ids, p->weights, p->prob, &p->z, p->margin);
    p->loss = losses[h->num_experts] / 2 * p->z;
    for (int64_t s = 0; s < (int64_t)h->num_tokens * h->top_k; ++s)
        if (p->ids[s] >= 0) p->loss += p->weights[s] * g[s];
    for (int e = 0; e < h->num_experts; ++e) p->loss += losses[e] * p->prob[e];
}

/* Differentiates by every logit of tokens whose choices do not change nearby. Returns how many
   gradients were compared. */
static int diff_compare(back_bufs* b, const back_case* c)
{
    const int T = c->gate.T, E = c->gate.E, K = c->gate.K, before = test_now.failures;
    const double h = 1e-5;
    moe_gate_desc d = b->gate.host;
    double *logits = (double*)test_host((int64_t)T * E * 8),
           *g = (double*)test_host((int64_t)T * K * 8);
    double *losses = tzeros(E + 1), *exact = (double*)test_host((int64_t)T * E * 8);
    double* mag = (double*)test_host((int64_t)E * 8);
    diff_point at = diff_new(&c->gate), more = diff_new(&c->gate), less = diff_new(&c->gate);
    float *got = (float*)tbuf_copy(&b->dlogits), *weights = (float*)tbuf_copy(&b->gate.weights);
    int32_t* ids = (int32_t*)tbuf_copy(&b->gate.ids);
    int compared = 0;
    for (int t = 0; t < T; ++t)
        for (int e = 0; e < E; ++e)
            logits[t * E + e] = moe_load(b->gate.logits, row_of(&c->gate, t) + e, c->gate.dtype);
    for (int e = 0; e <= E && c->balance; ++e) losses[e] = (double)b->losses[e];
    d.logits = logits, d.logits_dtype = MOE_REF_REAL, d.logits_stride = 0;
    for (int s = 0; s < T * K; ++s) g[s] = ids[s] < 0 ? 0 : (double)b->dweights[s];
    diff_loss(&at, &d, g, losses);
    moe_ref_gate_backward_f64(&d, at.ids, g, c->balance ? losses : 0, exact);
    for (int t = 0; t < T; ++t) {
        const double near = back_magnitude(b, c, ids, weights, t, mag);
        if (near >= 0 && near < 1e-3) continue; /* at the edge of the support */
        if (at.margin[t] < 1e-3 || memcmp(at.ids + t * K, ids + t * K, (size_t)K * 4)) continue;
        if (noise_error(&b->gate.host, t) > 1e-6) continue;
        for (int e = 0; e < E; ++e) {
            double* const l = &logits[t * E + e];
            const double was = *l;
            double slope;
            *l = was + h;
            diff_loss(&more, &d, g, losses);
            *l = was - h;
            diff_loss(&less, &d, g, losses);
            *l = was;
            if (memcmp(more.ids + t * K, less.ids + t * K, (size_t)K * 4)) continue; /* a tie */
            slope = (more.loss - less.loss) / (2 * h);
            if (!(slope == slope)) slope = 0; /* a disabled token may hold a NaN */
            CHECK(fabs(exact[t * E + e] - slope) <= 2e-7 * (1 + mag[e]),
                  "token %d expert %d: the reference has %.9g, differences %.9g", t, e,
                  exact[t * E + e], slope);
            CHECK(fabs((double)got[t * E + e] - slope) <= 2e-7 + 4e-5 * mag[e],
                  "token %d expert %d: the kernel has %.9g, differences %.9g", t, e,
                  (double)got[t * E + e], slope);
            compared += fabs(slope) > 1e-4;
        }
    }
    if (test_now.failures > before) printf("  in: %s\n", back_text(c));
    diff_free(&at), diff_free(&more), diff_free(&less);
    free(logits), free(g), free(losses), free(exact), free(mag), free(got), free(weights),
        free(ids);
    return compared;
}

static void test_differences(void)
{
    trand r = trand_new(41);
    for (int score = 1; score <= MOE_SCORE_PIONEER; ++score)
        for (int renormalize = 0; renormalize < 2; ++renormalize) {
            int compared = 0;
            for (int n = 0; n < 24; ++n) {
                const int E = n < 12 ? 8 : (int)trand_int(&r, 2, 12);
                const int most = E < 6 ? E : 6;
                back_case c = back_plain(4, E, (int)trand_int(&r, 1, most));
                back_bufs b;
                c.gate.options.score = score;
                c.gate.options.renormalize = renormalize;
                c.balance = n & 1;
                c.by_z = n >> 1 & 1;
                if (n > 4) back_rules(&c.gate, &r, 3);
                c.gate.nan = 0;
                back_new(&b, &c, &r);
                CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
                compared += diff_compare(&b, &c);
                back_free(&b);
            }
            CHECK(compared > 50, "score %d: %d gradients were compared", score, compared);
        }
}

/* The losses as functions of what the gate sums: [0] auxiliary, [1] variance with P in place of f
   to first order, [2] z. */
static double diff_balance(const moe_ref_balance_desc* o, int kind, const int32_t* count,
                           const double* prob, double z)
{
    const int E = o->num_experts;
    double tokens = 0, slots = 0, sum = 0;
    for (int e = 0; e < E; ++e) tokens += prob[e], slots += count[e];
    for (int e = 0; e < E; ++e) {
        const double f = count[e] / slots, P = prob[e] / tokens;
        sum += kind == 0 ? o->aux_coefficient * E * f * P
                         : o->variance_coefficient * 2 / E * (f - 1.0 / E) * P;
    }
    return kind == 2 ? o->z_coefficient * z / tokens : sum;
}

static void test_loss_differences(void)
{
    trand r = trand_new(42);
    for (int score = 1; score <= MOE_SCORE_PIONEER; ++score)
        for (int kind = 0; kind < 3; ++kind) {
            enum { T = 5, E = 7, K = 3 };
            back_case c = back_plain(T, E, K);
            moe_ref_balance_desc o = {E, kind == 0 ? 1.5 : 0, kind == 1 ? 20.0 : 0,
                                      kind == 2 ? 0.5 : 0};
            moe_balance_loss_desc d;
            back_bufs b;
            diff_point p = diff_new(&c.gate), q = diff_new(&c.gate);
            double logits[T * E], mag[E];
            float *got, losses[E + 1];
            int32_t *count, *ids;
            float* weights;
            tbuf fault = tfault_new(0);
            c.gate.options.score = score;
            c.gate.options.temperature = 0.8f;
            c.gate.prob = c.gate.z = c.balance = c.by_z = c.no_dweights = 1;
            back_new(&b, &c, &r);
            memset(&d, 0, sizeof d);
            d.expert_count = (const int32_t*)b.gate.count.p;
            d.prob_sum = (const float*)b.gate.prob.p;
            d.z_sum = (const float*)b.gate.z.p;
            d.balance_grad = (float*)b.d_losses.p;
            d.fault = (uint64_t*)fault.p;
            d.num_experts = E;
            d.aux_coefficient = (float)o.aux_coefficient;
            d.variance_coefficient = (float)o.variance_coefficient;
            d.z_coefficient = (float)o.z_coefficient;
            CHECK_STATUS(moe_balance_loss(&d, test_now.stream), MOE_OK);
            CHECK_STATUS(moe_gate_backward(&b.d, test_now.stream), MOE_OK);
            tbuf_get(&b.d_losses, losses);
            memcpy(b.losses, losses, sizeof losses); /* for back_magnitude */
            got = (float*)tbuf_copy(&b.dlogits);
            count = (int32_t*)tbuf_copy(&b.gate.count);
            ids = (int32_t*)tbuf_copy(&b.gate.ids);
            weights = (float*)tbuf_copy(&b.gate.weights);
            for (int i = 0; i < T * E; ++i) logits[i] = (double)((const float*)b.gate.logits)[i];
            for (int t = 0; t < T; ++t) {
                const double near = back_magnitude(&b, &c, ids, weights, t, mag), h = 1e-5;
                for (int e = 0; e < E && near > 1e-3; ++e) {
                    moe_gate_desc g = b.gate.host;
                    double more, less, slope;
                    g.logits = logits, g.logits_dtype = MOE_REF_REAL;
                    logits[t * E + e] += h;
                    moe_ref_gate_rules_f64(&g, p.ids, p.weights, p.prob, &p.z, p.margin);
                    logits[t * E + e] -= 2 * h;
                    moe_ref_gate_rules_f64(&g, q.ids, q.weights, q.prob, &q.z, q.margin);
                    logits[t * E + e] += h;
                    more = diff_balance(&o, kind, count, p.prob, p.z);
                    less = diff_balance(&o, kind, count, q.prob, q.z);
                    slope = (more - less) / (2 * h);
                    CHECK(fabs((double)got[t * E + e] - slope) <= 1e-7 + 1e-4 * mag[e],
                          "score %d loss %d token %d expert %d: %.9g, not %.9g", score, kind, t, e,
                          (double)got[t * E + e], slope);
                }
            }
            free(got), free(count), free(ids), free(weights);
            diff_free(&p), diff_free(&q);
            tbuf_free(&fault);
            back_free(&b);
        }
}

static void gate_backward_differences(void)
{
    RUN(test_differences);
    RUN(test_loss_differences);
}

#endif
