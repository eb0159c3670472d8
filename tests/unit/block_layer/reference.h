/* reference.h: what the block layer must give: exact numbers, the same numbers as the dtypes on the
   way round them, and a bound of each element's error. */
#ifndef MOE_TESTS_BLOCK_LAYER_REFERENCE_H
#define MOE_TESTS_BLOCK_LAYER_REFERENCE_H

#include "moe/ref/block_layer.h"
#include "tests/unit/block_layer/case.h"
#include "tests/test_bound.h" /* after test_weights.h */

typedef struct layer_ref {
    double *y, *dx, *dw1, *dw2, *dweights; /* dw1 and dw2 of all experts */
    struct layer_ref* bound;               /* of each element's error; of the exact ones alone */
} layer_ref;

/* Elements of each array. */
typedef struct layer_counts {
    int64_t y, dx, dw1, dw2, dweights;
} layer_counts;

static layer_counts counts_of(const layer_case* c)
{
    const int64_t T = c->T, H = c->H, I = c->I, E = c->E;
    const layer_counts n = {T * H, T * H, E * up_rows(c) * H, E * H * I, T * choices(c)};
    return n;
}

/* zero: 0 leaves the numbers poison. */
static layer_ref arrays_new(const layer_case* c, int zero)
{
    const layer_counts n = counts_of(c);
    layer_ref r;
    r.y = zero ? tzeros(n.y) : (double*)test_host(n.y * 8);
    r.dx = zero ? tzeros(n.dx) : (double*)test_host(n.dx * 8);
    r.dw1 = zero ? tzeros(n.dw1) : (double*)test_host(n.dw1 * 8);
    r.dw2 = zero ? tzeros(n.dw2) : (double*)test_host(n.dw2 * 8);
    r.dweights = zero ? tzeros(n.dweights) : (double*)test_host(n.dweights * 8);
    r.bound = 0;
    return r;
}

static void ref_free(layer_ref* r)
{
    free(r->y), free(r->dx), free(r->dw1), free(r->dw2), free(r->dweights);
    if (r->bound) ref_free(r->bound);
    free(r->bound);
}

/* ------------------------------------------------------------------ bounds */

static double square(double v) { return v * v; }

/* Fills in an activation and its two derivatives, and how far each moves where its arguments do. */
static void moved(const moe_ref_block_layer_desc* d, double v, double up, double by_v, double by_up,
                  double* at, double* move)
{
    const int a = d->activation ? d->activation : MOE_ACTIVATION_SWIGLU;
    for (int i = 0; i < 5; ++i) {
        const double x = v + (i == 0 ? 0 : i & 1 ? by_v : -by_v);
        const double u = up + (i == 0 ? 0 : i & 2 ? by_up : -by_up);
        double f[3];
        f[0] = moe_ref_activation_f64(a, x, u, d->alpha, d->limit);
        moe_ref_activation_grad_f64(a, x, u, d->alpha, d->limit, &f[1], &f[2]);
        for (int j = 0; j < 3; ++j) {
            if (i == 0) at[j] = f[j], move[j] = 1e-6 * fabs(f[j]) + 1e-6;
            else if (fabs(f[j] - at[j]) > move[j]) move[j] = fabs(f[j] - at[j]);
        }
    }
}

/* Adds a slot's share to the squares of errors and the sums of absolute values of each element: of
   the roundings of pre, act, d and the gradient by pre, each by itself, and of the fp32 sums. */
static void bound_of_slot(const moe_ref_block_layer_desc* d, int64_t t, int64_t slot, int e,
                          layer_ref* square_of, layer_ref* abs_of)
{
    const int gate = !d->activation || moe_activation_is_gated(d->activation);
    const int I = d->intermediate, H = d->hidden, U = gate ? 2 * I : I, dtype = d->w_dtype;
    const double w = ((const double*)d->weights)[slot];
    const void* m1 = moei_ref_matrix(d->w1.base, d->w1.table, &d->w1, dtype, e, U, H);
    const void* m2 = moei_ref_matrix(d->w2.base, d->w2.table, &d->w2, dtype, e, H, I);
    double *w1 = tzeros((int64_t)U * H), *w2 = tzeros((int64_t)H * I), *h = tzeros(U),
           *eh = tzeros(U);
    double *x = tzeros(H), *dy = tzeros(H), *sum_y = tzeros(H), *sum_dx = tzeros(H);
    for (int i = 0; i < U * H; ++i)
        w1[i] = moe_load(m1, moei_ref_element(&d->w1, U, H, i / H, i % H), dtype);
    for (int i = 0; i < H * I; ++i)
        w2[i] = moe_load(m2, moei_ref_element(&d->w2, H, I, i / I, i % I), dtype);
    for (int j = 0; j < H; ++j) {
        x[j] = moe_load(d->x, t * d->x_stride + j, dtype);
        dy[j] = moe_load(d->dy, t * d->dy_stride + j, dtype);
    }
    for (int i = 0; i < U; ++i) {
        double sum = 0;
        for (int j = 0; j < H; ++j) h[i] += w1[i * H + j] * x[j], sum += fabs(w1[i * H + j] * x[j]);
        eh[i] = tround(fabs(h[i]), dtype) + tsum_error(sum, H);
    }
    for (int i = 0; i < I; ++i) {
        double at[3], move[3], da = 0, sum = 0, a, ea, eda;
        moved(d, h[i], gate ? h[I + i] : 0, eh[i], gate ? eh[I + i] : 0, at, move);
        a = w * at[0];
        ea = fabs(w) * move[0] + tround(fabs(a), dtype);
        for (int j = 0; j < H; ++j) da += w2[j * I + i] * dy[j], sum += fabs(w2[j * I + i] * dy[j]);
        eda = tround(fabs(da), dtype) + tsum_error(sum, H);
        square_of->dweights[slot] += square(eda * at[0]) + square(da * move[0]);
        abs_of->dweights[slot] += fabs(da * at[0]);
        for (int j = 0; j < H; ++j) {
            const int64_t at_w2 = ((int64_t)e * H + j) * I + i;
            square_of->y[t * H + j] += square(w2[j * I + i] * ea);
            sum_y[j] += fabs(w2[j * I + i] * a);
            square_of->dw2[at_w2] += square(dy[j] * ea);
            abs_of->dw2[at_w2] += fabs(dy[j] * a);
        }
        for (int g = 0; g <= gate; ++g) {
            const double dh = w * da * at[1 + g];
            const double edh =
                fabs(w) * (eda * fabs(at[1 + g]) + fabs(da) * move[1 + g] + eda * move[1 + g]) +
                tround(fabs(dh), dtype);
            for (int j = 0; j < H; ++j) {
                const int64_t at_w1 = ((int64_t)e * U + g * I + i) * H + j;
                const double by = w1[(g * I + i) * H + j];
                square_of->dx[t * H + j] += square(by * edh);
                sum_dx[j] += fabs(by * dh);
                square_of->dw1[at_w1] += square(x[j] * edh);
                abs_of->dw1[at_w1] += fabs(x[j] * dh);
            }
        }
    }
    for (int j = 0; j < H; ++j) {
        abs_of->y[t * H + j] += sum_y[j];
        abs_of->dx[t * H + j] += sum_dx[j];
        if (d->rows_dtype) { /* rounded before a token's rows are added: at most this */
            square_of->y[t * H + j] += square(tround(sum_y[j], dtype));
            square_of->dx[t * H + j] += square(tround(sum_dx[j], dtype));
        }
    }
    free(w1), free(w2), free(h), free(eh), free(x), free(dy), free(sum_y), free(sum_dx);
}

/* Makes bounds of squares of errors: four times their root, as errors are as often up as down; then
   the sum's own error and that of the store. */
static void bound_all(double* bound, const double* abs_sum, const double* exact, int64_t count,
                      int terms, int dtype)
{
    for (int64_t i = 0; i < count; ++i)
        bound[i] = 4 * sqrt(bound[i]) + tsum_error(abs_sum[i], terms) +
                   1.01 * tround(fabs(exact[i]) + 4 * sqrt(bound[i]), dtype);
}

static layer_ref* bounds_new(const moe_ref_block_layer_desc* d, const layer_case* c,
                             const layer_ref* exact)
{
    const int K = d->top_k, E = c->E;
    const layer_counts n = counts_of(c);
    layer_ref* r = (layer_ref*)test_host(sizeof *r);
    layer_ref sums = arrays_new(c, 1);
    *r = arrays_new(c, 1);
    for (int64_t s = 0; s < n.dweights; ++s) {
        const int e = d->ids ? d->ids[s] : (int)(s % K);
        if (e >= 0 && e < E) bound_of_slot(d, s / K, s, e, r, &sums);
    }
    bound_all(r->y, sums.y, exact->y, n.y, K * c->I, c->dtype);
    bound_all(r->dx, sums.dx, exact->dx, n.dx, K * (int)up_rows(c), c->dtype);
    bound_all(r->dw1, sums.dw1, exact->dw1, n.dw1, c->T, c->grad_dtype);
    bound_all(r->dw2, sums.dw2, exact->dw2, n.dw2, c->T, c->grad_dtype);
    bound_all(r->dweights, sums.dweights, exact->dweights, n.dweights, c->I, MOE_FP32);
    ref_free(&sums);
    return r;
}

/* ------------------------------------------------------------------ numbers */

static void round_all(double* p, int64_t count, int dtype)
{
    for (int64_t i = 0; i < count; ++i) p[i] = test_rounded(p[i], dtype);
}

/* rounded: 0 gives exact numbers and bounds, 1 what the dtypes make of the exact numbers. */
static layer_ref ref_new(const layer_bufs* b, const layer_case* c, int rounded)
{
    const int64_t K = choices(c);
    const layer_counts n = counts_of(c);
    double* weights = (double*)test_host(n.dweights * 8);
    int32_t* ids = (int32_t*)test_host(n.dweights * 4);
    moe_ref_block_layer_desc d;
    layer_ref r;
    memset(&d, 0, sizeof d);
    for (int64_t s = 0; s < n.dweights; ++s) {
        weights[s] = b->h_weights[s];
        if (c->form != DENSE) ids[s] = b->h_ids[s];
        for (int64_t j = s / K * K; c->form == BATCH && j < s; ++j)
            if (ids[s] >= 0 && ids[j] == ids[s]) { /* one row of act has both weights */
                weights[j] += weights[s];
                ids[s] = -1;
            }
    }
    d.x = b->h_x;
    d.ids = c->form == DENSE ? (const int32_t*)0 : ids;
    d.weights = weights;
    d.weights_dtype = MOE_REF_REAL;
    d.dy = b->h_dy;
    d.w1 = tweights_host(&b->w1);
    d.w2 = tweights_host(&b->w2);
    d.x_stride = x_stride(c);
    d.dy_stride = dy_stride(c);
    d.x_dtype = d.dy_dtype = d.w_dtype = c->dtype;
    /* the clamped SwiGLU's gradient jumps: both must see a number on the same side */
    d.pre_dtype = rounded || c->activation == MOE_ACTIVATION_SWIGLU_CLAMPED ? c->dtype : 0;
    d.act_dtype = rounded ? c->dtype : 0;
    d.rows_dtype = rounded && c->form == SPARSE ? c->dtype : 0;
    d.activation = c->activation;
    d.alpha = c->alpha;
    d.limit = c->limit;
    d.num_tokens = c->T, d.num_experts = c->E, d.top_k = (int)K;
    d.hidden = c->H, d.intermediate = c->I;
    r = arrays_new(c, 0);
    CHECK(moe_ref_block_layer_f64(&d, r.y, r.dx, r.dw1, r.dw2, r.dweights) == 0, "out of memory");
    d.rows_dtype = c->form == SPARSE ? c->dtype : 0;
    if (!rounded) r.bound = bounds_new(&d, c, &r);
    for (int64_t s = 0; c->form == BATCH && s < n.dweights; ++s)
        for (int64_t j = s / K * K; j < s; ++j)
            if (b->h_ids[s] >= 0 && b->h_ids[j] == b->h_ids[s]) {
                r.dweights[s] = r.dweights[j];
                if (r.bound) r.bound->dweights[s] = r.bound->dweights[j];
                break;
            }
    free(weights), free(ids);
    if (rounded) {
        round_all(r.y, n.y, c->dtype);
        round_all(r.dx, n.dx, c->dtype);
        round_all(r.dw1, n.dw1, c->grad_dtype);
        round_all(r.dw2, n.dw2, c->grad_dtype);
        round_all(r.dweights, n.dweights, MOE_FP32);
    }
    return r;
}

#endif
