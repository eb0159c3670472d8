/* check.h: compares what the layer gave with moe/ref, in float64.

   The reference takes the layer's own fp32 logits, so that a near tie cannot make it choose
   another expert, and must then choose the same experts; the logits themselves are checked
   against x and the router. The bound of y is the house's: twice the error that rounding alone
   makes, which is seen by running the reference again with every intermediate result rounded to
   the dtype that the layer keeps it in, + 1e-5. */
#ifndef MOE_SAMPLE_CHECK_H
#define MOE_SAMPLE_CHECK_H

#include "moe/layer.cuh"
#include "moe/ref/ref.h"
#include "options.h"
#include "show.h"

/* All in host memory. */
typedef struct check_input {
    const uint16_t *x, *router, *w1, *w2, *shared_w1, *shared_w2, *y;
    const float* logits;
    const int32_t* ids;
    const options* o; /* what ran */
} check_input;

typedef struct check_result {
    int tokens;         /* compared */
    int64_t not_finite; /* elements of y, over all tokens */
    int64_t other_ids;  /* choices that differ */
    double logit_error,
        logit_bound;              /* the worst logit, as a share of its own bound: error / bound */
    double error, bound, largest; /* of y */
} check_result;

/* Token number i of the sample: spread over the whole batch, moved by the seed. */
static int64_t check_token(const check_input* in, int i, int count, uint64_t seed)
{
    const int64_t stride = in->o->tokens / count, at = i * stride;
    return at + (int64_t)((seed * 2654435761u + (uint64_t)i * 40503u) % (uint64_t)stride);
}

/* One token: its logits, choices and output. The reference runs twice, exact and rounded. */
static int check_one(const check_input* in, int64_t t, check_result* r, double* scratch)
{
    const options* o = in->o;
    const int H = o->hidden, E = o->experts, K = o->top_k;
    double *exact = scratch, *rounded = scratch + H;
    int32_t* ids = (int32_t*)(scratch + 2 * H);
    moe_ref_layer_desc d;
    for (int e = 0; e < E; ++e) {
        double sum = 0, abs_sum = 0, error, bound;
        for (int h = 0; h < H; ++h) {
            const double p = (double)moe_load(in->x, t * H + h, o->dtype) *
                             (double)moe_load(in->router, (int64_t)e * H + h, o->dtype);
            sum += p;
            abs_sum += fabs(p);
        }
        error = fabs(in->logits[t * E + e] - sum);
        bound = (H / 16.0 + 2) * ldexp(1, -23) * abs_sum + 1e-30;
        if (error > r->logit_error * bound || isnan(error)) r->logit_error = error / bound;
    }
    memset(&d, 0, sizeof d);
    d.x = in->x + t * H;
    d.logits = in->logits + t * E;
    d.w1.base = in->w1;
    d.w2.base = in->w2;
    d.x_dtype = d.w_dtype = o->dtype;
    d.num_tokens = 1;
    d.num_experts = E;
    d.top_k = K;
    d.hidden = H;
    d.intermediate = o->intermediate;
    d.score = o->score;
    d.renormalize = o->renormalize;
    d.activation = o->activation;
    d.shared.w1.base = in->shared_w1;
    d.shared.w2.base = in->shared_w2;
    d.shared.intermediate = o->shared;
    d.shared.activation = o->activation;
    if (moe_ref_layer_f64(&d, exact, ids, 0)) return -1;
    d.act_dtype = d.rows_dtype = o->dtype;
    if (moe_ref_layer_f64(&d, rounded, 0, 0)) return -1;
    for (int k = 0; k < K; ++k) r->other_ids += ids[k] != in->ids[t * K + k];
    for (int h = 0; h < H; ++h) {
        const double error = fabs((double)moe_load(in->y, t * H + h, o->dtype) - exact[h]);
        const double ideal = fabs(moe_ref_round_f64(rounded[h], o->dtype) - exact[h]);
        if (error > r->error || isnan(error)) r->error = error; /* a NaN stays */
        if (2 * ideal + 1e-5 > r->bound) r->bound = 2 * ideal + 1e-5;
        if (fabs(exact[h]) > r->largest) r->largest = fabs(exact[h]);
    }
    return 0;
}

/* Compares `count` tokens; looks at all of y for what is not finite. 0, or -1 out of memory. */
static int check_layer(const check_input* in, int count, uint64_t seed, check_result* r)
{
    double* scratch = (double*)malloc((size_t)(2 * in->o->hidden + in->o->top_k) * sizeof(double));
    int bad = !scratch;
    memset(r, 0, sizeof *r);
    for (int64_t i = 0; i < (int64_t)in->o->tokens * in->o->hidden; ++i)
        r->not_finite += !isfinite(moe_load(in->y, i, in->o->dtype));
    r->tokens = count < in->o->tokens ? count : in->o->tokens;
    for (int i = 0; i < r->tokens && !bad; ++i) {
        show_progress("checking against the reference", i, r->tokens);
        bad = check_one(in, check_token(in, i, r->tokens, seed), r, scratch);
    }
    show_progress("", 1, 1);
    free(scratch);
    return bad ? -1 : 0;
}

/* Prints the verdict; 1 if all is right. */
static int show_check(const check_input* in, const check_result* r)
{
    const int ok = r->not_finite == 0 && r->other_ids == 0 && r->logit_error <= 1 &&
                   r->error <= r->bound && r->largest > 16 * r->bound;
    printf("check against moe/ref in float64, %d of %d tokens, every element\n", r->tokens,
           in->o->tokens);
    printf("  logits    worst error %.2f of its bound, (H/16 + 2) 2^-23 sum |x w|\n",
           r->logit_error);
    printf("  experts   %lld of %lld choices differ\n", (long long)r->other_ids,
           (long long)r->tokens * in->o->top_k);
    printf(
        "  y         largest error %.3g, bound %.3g, values up to %.3g; %lld of all not finite\n",
        r->error, r->bound, r->largest, (long long)r->not_finite);
    printf("%s\n", ok ? "PASSED: the layer is right" : "FAILED: the layer is wrong");
    return ok;
}

#endif
