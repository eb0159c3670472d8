/* test_block_layer.cu: moe/block_layer.cuh against its reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_block_layer.cu -o test_block_layer
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_block_layer.cu -o test_block_layer */
#include "tests/test.h"
#include "tests/test_weights.h"

#include "moe/block_layer.cuh"
#include "moe/ref/block_layer.h"

enum {
    DENSE = MOE_BLOCK_LAYER_DENSE,
    SPARSE = MOE_BLOCK_LAYER_SPARSE,
    BATCH = MOE_BLOCK_LAYER_BATCH
};

typedef struct layer_case {
    int form, T, H, I, E, K;
    int block, dtype, grad_dtype, activation;
    float alpha, limit;
    int max_experts;
    int table, pad;   /* of the weights; pad also of x, y, dy and dx, times 1, 2, 3, 4 */
    int unused, bad;  /* percent of ids that are -1, out of range */
    int experts;      /* only the first so many are chosen; 0: all */
    int one_expert;   /* 1: every slot has expert E - 1 */
    int own_act_grad; /* 1: the gradient by pre has memory of its own */
    int in_place;     /* 1: dx is dy */
    int tile;
} layer_case;

typedef struct layer_bufs {
    tbuf x, ids, weights, y, dy, dx, dw1, dw2, grad_expert, dweights, act_grad, saved, workspace;
    tbuf fault;
    tweights w1, w2;
    void *h_x, *h_dy;
    int32_t* h_ids;
    float* h_weights;
    int num_active, active[TWEIGHTS_MOST]; /* ascending */
    moe_block_layer_desc d;
} layer_bufs;

static const char* case_text(const layer_case* c)
{
    static char text[400];
    snprintf(text, sizeof text,
             "%s T=%d H=%d I=%d E=%d K=%d block=%d %s grads %s activation=%d (%g %g) max=%d "
             "table=%d pad=%d unused=%d bad=%d experts=%d one=%d own=%d in_place=%d tile=%d",
             c->form == DENSE    ? "dense"
             : c->form == SPARSE ? "sparse"
                                 : "batch",
             c->T, c->H, c->I, c->E, c->K, c->block, moe_dtype_name(c->dtype),
             moe_dtype_name(c->grad_dtype), c->activation, (double)c->alpha, (double)c->limit,
             c->max_experts, c->table, c->pad, c->unused, c->bad, c->experts, c->one_expert,
             c->own_act_grad, c->in_place, c->tile);
    return text;
}

static layer_case normal_case(int form, int T, int H, int I, int E, int K)
{
    layer_case c;
    memset(&c, 0, sizeof c);
    c.form = form;
    c.T = T;
    c.H = H;
    c.I = I;
    c.E = E;
    c.K = form == DENSE ? 0 : K;
    c.block = 16;
    c.dtype = c.grad_dtype = test_half();
    return c;
}

static int gated(const layer_case* c)
{
    return c->activation == 0 || moe_activation_is_gated(c->activation);
}

/* Elements between rows, all of them different where there is a pad. */
static int64_t x_stride(const layer_case* c) { return c->H + c->pad; }
static int64_t y_stride(const layer_case* c) { return c->H + 2 * c->pad; }
static int64_t dy_stride(const layer_case* c) { return c->H + 3 * c->pad; }
static int64_t dx_stride(const layer_case* c) { return c->H + (c->in_place ? 3 : 4) * c->pad; }

static size_t rows_bytes(const layer_case* c, int64_t stride)
{
    return (size_t)moe_extent(c->T, stride, c->H, c->dtype);
}

/* Rows of w1, entries of a token's weights, slots of dw1. */
static int64_t up_rows(const layer_case* c) { return gated(c) ? 2 * c->I : c->I; }
static int64_t choices(const layer_case* c) { return c->form == DENSE ? c->E : c->K; }
static int slots_of(const layer_case* c) { return c->max_experts ? c->max_experts : c->E; }

/* Fresh ids and weights; who is active. */
static void fill_routing(layer_bufs* b, const layer_case* c, trand* r)
{
    const int64_t K = choices(c), experts = c->experts ? c->experts : c->E;
    int order[TWEIGHTS_MOST], seen[TWEIGHTS_MOST] = {0};
    for (int e = 0; e < c->E; ++e) order[e] = e;
    for (int i = (int)experts - 1; i > 0; --i) { /* batch: the first K are the batch's */
        const int j = (int)trand_int(r, 0, i), at = order[i];
        order[i] = order[j];
        order[j] = at;
    }
    for (int64_t t = 0; t < c->T; ++t)
        for (int64_t k = 0; k < K; ++k) {
            const int64_t s = t * K + k, u = trand_int(r, 0, 99);
            int e = (int)trand_int(r, 0, experts - 1);
            b->h_weights[s] = 0.1f + 0.9f * (float)trand_int(r, 0, 1000) / 1000;
            if (c->form == DENSE) e = (int)k;
            if (c->form == BATCH) e = order[(k + t) % K];
            if (c->one_expert && c->form != DENSE) e = c->E - 1;
            if (c->form != DENSE && u < c->unused) e = -1;
            else if (c->form != DENSE && u < c->unused + c->bad)
                e = u % 4 == 0 ? c->E : u % 4 == 1 ? INT32_MAX : u % 4 == 2 ? -2 : INT32_MIN;
            if (c->form != DENSE) b->h_ids[s] = e;
            if (e >= 0 && e < c->E) seen[e] = 1;
        }
    b->num_active = 0;
    for (int e = 0; e < c->E; ++e)
        if (seen[e]) b->active[b->num_active++] = e;
    tbuf_put(&b->weights, b->h_weights);
    if (c->form != DENSE) tbuf_put(&b->ids, b->h_ids);
}

/* Weights [E, n, k], NaN or null where the expert is not active. */
static void fill_weights(tweights* w, const layer_bufs* b, const layer_case* c, int n, int k,
                         trand* r)
{
    tweights_want want;
    int on[TWEIGHTS_MOST] = {0};
    memset(&want, 0, sizeof want);
    want.experts = c->E;
    want.n = n;
    want.k = k;
    want.dtype = c->dtype;
    want.major = MOE_MAJOR_K;
    want.table = c->table;
    want.pad = c->pad;
    want.scale = (float)(1.5 / sqrt((double)k));
    tweights_new(w, &want, r);
    for (int i = 0; i < b->num_active; ++i) on[b->active[i]] = 1;
    if (c->table) {
        void** address = (void**)tbuf_copy(&w->table[0]);
        for (int e = 0; e < c->E; ++e)
            if (!on[e]) address[e] = 0;
        tbuf_put(&w->table[0], address);
        free(address);
    } else {
        const int64_t row = k + c->pad, matrix = row * n + c->pad;
        for (int e = 0; e < c->E; ++e)
            for (int64_t i = 0; i < n && !on[e]; ++i)
                test_poison((uint16_t*)w->host[0][0] + e * matrix + i * row, (size_t)k * 2);
        tbuf_put(&w->part[0][0], w->host[0][0]);
    }
}

static void reset(layer_bufs* b)
{
    const uint64_t none = 0;
    tbuf_poison(&b->y);
    tbuf_poison(&b->dx);
    tbuf_poison(&b->dw1);
    tbuf_poison(&b->dw2);
    tbuf_poison(&b->grad_expert);
    tbuf_poison(&b->dweights);
    tbuf_poison(&b->act_grad);
    tbuf_poison(&b->saved);
    tbuf_poison(&b->workspace);
    tbuf_put(&b->dy, b->h_dy);
    tbuf_put(&b->fault, &none);
}

static void bufs_new(layer_bufs* b, const layer_case* c, trand* r)
{
    const int64_t T = c->T, H = c->H, I = c->I, K = choices(c), U = up_rows(c);
    const size_t slots = (size_t)slots_of(c), grad = (size_t)moe_dtype_bytes(c->grad_dtype);
    moe_block_layer_bytes bytes;
    moe_block_layer_desc* d = &b->d;
    memset(b, 0, sizeof *b);
    b->h_x = trows_new(r, T, x_stride(c), H, c->dtype, TFILL_NORMAL, 1);
    b->h_dy = trows_new(r, T, dy_stride(c), H, c->dtype, TFILL_NORMAL, 1);
    b->h_ids = (int32_t*)test_host(T * K * 4);
    b->h_weights = (float*)test_host(T * K * 4);
    b->x = tbuf_from("x", b->h_x, rows_bytes(c, x_stride(c)), 16);
    b->dy = tbuf_from("dy", b->h_dy, rows_bytes(c, dy_stride(c)), 16);
    b->ids = tbuf_new("ids", c->form == DENSE ? 0 : (size_t)(T * K) * 4, 4);
    b->weights = tbuf_new("weights", (size_t)(T * K) * 4, 4);
    fill_routing(b, c, r);
    fill_weights(&b->w1, b, c, (int)U, (int)H, r);
    fill_weights(&b->w2, b, c, (int)H, (int)I, r);
    b->y = tbuf_new("y", rows_bytes(c, y_stride(c)), 16);
    b->dx = tbuf_new("dx", c->in_place ? 0 : rows_bytes(c, dx_stride(c)), 16);
    b->dw1 = tbuf_new("dw1", slots * (size_t)(U * H) * grad, 16);
    b->dw2 = tbuf_new("dw2", slots * (size_t)(H * I) * grad, 16);
    b->grad_expert = tbuf_new("grad_expert", slots * 4, 4);
    b->dweights = tbuf_new("dweights", (size_t)(T * K) * 4, 4);
    b->fault = tfault_new(0);
    d->x = b->x.p;
    d->ids = c->form == DENSE ? (const int32_t*)0 : (const int32_t*)b->ids.p;
    d->weights = (const float*)b->weights.p;
    d->w1 = b->w1.d;
    d->w2 = b->w2.d;
    d->y = b->y.p;
    d->dy = b->dy.p;
    d->dx = c->in_place ? b->dy.p : b->dx.p;
    d->dw1 = b->dw1.p;
    d->dw2 = b->dw2.p;
    d->grad_expert = (int32_t*)b->grad_expert.p;
    d->dweights = (float*)b->dweights.p;
    d->x_stride = c->pad ? x_stride(c) : 0;
    d->y_stride = c->pad ? y_stride(c) : 0;
    d->dy_stride = c->pad ? dy_stride(c) : 0;
    d->dx_stride = c->pad ? dx_stride(c) : 0;
    d->fault = (uint64_t*)b->fault.p;
    d->rank = TEST_RANK;
    d->form = c->form;
    d->num_tokens = c->T;
    d->hidden = c->H;
    d->intermediate = c->I;
    d->num_experts = c->E;
    d->top_k = c->K;
    d->max_experts = c->max_experts;
    d->block = c->block == 128 ? 0 : c->block;
    d->dtype = c->dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->dtype;
    d->grad_dtype = c->grad_dtype == c->dtype ? MOE_DTYPE_DEFAULT : c->grad_dtype;
    d->activation = c->activation;
    d->alpha = c->alpha;
    d->limit = c->limit;
    d->choice.tile = c->tile;
    CHECK_STATUS(moe_block_layer_sizes(d, &bytes), MOE_OK);
    b->act_grad = tbuf_new("act_grad", c->own_act_grad ? bytes.act_grad : 0, 16);
    if (c->own_act_grad) d->act_grad = b->act_grad.p;
    b->saved = tbuf_new("saved", bytes.saved, 0);
    b->workspace =
        tbuf_new("workspace", bytes.forward > bytes.backward ? bytes.forward : bytes.backward, 0);
    d->saved = b->saved.p;
    d->saved_bytes = bytes.saved;
    d->workspace = b->workspace.p;
    d->workspace_bytes = b->workspace.bytes;
    reset(b);
}

static void bufs_free(layer_bufs* b)
{
    tbuf* all[] = {&b->x,     &b->ids,       &b->weights, &b->y,           &b->dy,
                   &b->dx,    &b->dw1,       &b->dw2,     &b->grad_expert, &b->dweights,
                   &b->saved, &b->workspace, &b->fault,   &b->act_grad};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; ++i) tbuf_free(all[i]);
    tweights_free(&b->w1);
    tweights_free(&b->w2);
    free(b->h_x);
    free(b->h_dy);
    free(b->h_ids);
    free(b->h_weights);
}

/* Scratch is poisoned between the two, so that backward cannot lean on what forward left there. */
static moe_status both(layer_bufs* b)
{
    moe_status s = moe_block_layer_forward(&b->d, test_now.stream);
    if (s != MOE_OK) return s;
    tbuf_poison(&b->workspace);
    return moe_block_layer_backward(&b->d, test_now.stream);
}

/* What the reference gives, exact or as the dtypes on the way round it. */
typedef struct layer_ref {
    double *y, *dx, *dw1, *dw2, *dweights;
    struct layer_ref* bound; /* of each element's error; of the exact ones alone */
} layer_ref;

/* What rounding a number to the dtype may change it by. */
static double half_ulp(double v, int dtype)
{
    if (dtype == MOE_FP32) return ldexp(fabs(v), -24);
    return dtype == MOE_FP16 ? ldexp(fabs(v), -11) + ldexp(1, -25) : ldexp(fabs(v), -8);
}

/* What summing n products in fp32 may, in the order of the tensor cores. */
static double sum_error(double abs_sum, int64_t n)
{
    return ((double)n / 16 + 2) * ldexp(1, -23) * abs_sum;
}

static double square(double v) { return v * v; }

static double* zeros(int64_t n)
{
    double* p = (double*)test_host(n * 8);
    for (int64_t i = 0; i < n; ++i) p[i] = 0;
    return p;
}

/* An activation and its two derivatives, and how far each moves where its arguments do. */
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

/* Squares of errors, and sums of absolute values, that come together in each element: roundings of
   pre, act, d and the gradient by pre, each by itself, and the sums. */
static void bound_of_slot(const moe_ref_block_layer_desc* d, int64_t t, int64_t slot, int e,
                          layer_ref* square_of, layer_ref* abs_of)
{
    const int gate = !d->activation || moe_activation_is_gated(d->activation);
    const int I = d->intermediate, H = d->hidden, U = gate ? 2 * I : I, dtype = d->w_dtype;
    const double w = ((const double*)d->weights)[slot];
    const void* m1 = moei_ref_matrix(d->w1.base, d->w1.table, &d->w1, dtype, e, U, H);
    const void* m2 = moei_ref_matrix(d->w2.base, d->w2.table, &d->w2, dtype, e, H, I);
    double *w1 = zeros((int64_t)U * H), *w2 = zeros((int64_t)H * I), *h = zeros(U), *eh = zeros(U);
    double *x = zeros(H), *dy = zeros(H), *sum_y = zeros(H), *sum_dx = zeros(H);
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
        eh[i] = half_ulp(h[i], dtype) + sum_error(sum, H);
    }
    for (int i = 0; i < I; ++i) {
        double at[3], move[3], da = 0, sum = 0, a, ea, eda;
        moved(d, h[i], gate ? h[I + i] : 0, eh[i], gate ? eh[I + i] : 0, at, move);
        a = w * at[0];
        ea = fabs(w) * move[0] + half_ulp(a, dtype);
        for (int j = 0; j < H; ++j) da += w2[j * I + i] * dy[j], sum += fabs(w2[j * I + i] * dy[j]);
        eda = half_ulp(da, dtype) + sum_error(sum, H);
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
                half_ulp(dh, dtype);
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
        if (d->rows_dtype) { /* rounded before tokens' rows are added up: at most this much */
            square_of->y[t * H + j] += square(half_ulp(sum_y[j], dtype));
            square_of->dx[t * H + j] += square(half_ulp(sum_dx[j], dtype));
        }
    }
    free(w1), free(w2), free(h), free(eh), free(x), free(dy), free(sum_y), free(sum_dx);
}

static layer_ref sums_new(int64_t tokens, int64_t dw1, int64_t dw2, int64_t slots)
{
    layer_ref r;
    r.y = zeros(tokens);
    r.dx = zeros(tokens);
    r.dw1 = zeros(dw1);
    r.dw2 = zeros(dw2);
    r.dweights = zeros(slots);
    r.bound = 0;
    return r;
}

static void ref_free(layer_ref* r)
{
    free(r->y);
    free(r->dx);
    free(r->dw1);
    free(r->dw2);
    free(r->dweights);
    if (r->bound) ref_free(r->bound);
    free(r->bound);
}

/* Four times the root of the squares, for errors that are as often up as down; then the sum's own
   and what is stored. */
static void bound_all(double* bound, const double* abs_sum, const double* exact, int64_t count,
                      int64_t terms, int dtype)
{
    for (int64_t i = 0; i < count; ++i)
        bound[i] = 4 * sqrt(bound[i]) + sum_error(abs_sum[i], terms) +
                   1.01 * half_ulp(fabs(exact[i]) + 4 * sqrt(bound[i]), dtype);
}

static layer_ref* bounds_new(const moe_ref_block_layer_desc* d, const layer_case* c,
                             const layer_ref* exact)
{
    const int64_t T = c->T, H = c->H, I = c->I, K = d->top_k, E = c->E, U = up_rows(c);
    layer_ref* r = (layer_ref*)test_host(sizeof *r);
    layer_ref sums = sums_new(T * H, E * U * H, E * H * I, T * K);
    *r = sums_new(T * H, E * U * H, E * H * I, T * K);
    for (int64_t s = 0; s < T * K; ++s) {
        const int e = d->ids ? d->ids[s] : (int)(s % K);
        if (e >= 0 && e < E) bound_of_slot(d, s / K, s, e, r, &sums);
    }
    bound_all(r->y, sums.y, exact->y, T * H, K * I, c->dtype);
    bound_all(r->dx, sums.dx, exact->dx, T * H, K * U, c->dtype);
    bound_all(r->dw1, sums.dw1, exact->dw1, E * U * H, T, c->grad_dtype);
    bound_all(r->dw2, sums.dw2, exact->dw2, E * H * I, T, c->grad_dtype);
    bound_all(r->dweights, sums.dweights, exact->dweights, T * K, I, MOE_FP32);
    ref_free(&sums);
    return r;
}

static layer_ref ref_new(const layer_bufs* b, const layer_case* c, int rounded)
{
    const int64_t T = c->T, H = c->H, I = c->I, K = choices(c), U = up_rows(c);
    double* weights = (double*)test_host(T * K * 8);
    int32_t* ids = (int32_t*)test_host(T * K * 4);
    moe_ref_block_layer_desc d;
    layer_ref r;
    memset(&d, 0, sizeof d);
    for (int64_t s = 0; s < T * K; ++s) {
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
    /* the clamped SwiGLU's gradient jumps: both have to agree on which side a number is */
    d.pre_dtype = rounded || c->activation == MOE_ACTIVATION_SWIGLU_CLAMPED ? c->dtype : 0;
    d.act_dtype = rounded ? c->dtype : 0;
    d.rows_dtype = rounded && c->form == SPARSE ? c->dtype : 0;
    d.activation = c->activation;
    d.alpha = c->alpha;
    d.limit = c->limit;
    d.num_tokens = c->T;
    d.num_experts = c->E;
    d.top_k = (int)K;
    d.hidden = c->H;
    d.intermediate = c->I;
    r.y = (double*)test_host(T * H * 8);
    r.dx = (double*)test_host(T * H * 8);
    r.dw1 = (double*)test_host(c->E * U * H * 8);
    r.dw2 = (double*)test_host(c->E * H * I * 8);
    r.dweights = (double*)test_host(T * K * 8);
    CHECK(moe_ref_block_layer_f64(&d, r.y, r.dx, r.dw1, r.dw2, r.dweights) == 0, "out of memory");
    d.rows_dtype = c->form == SPARSE ? c->dtype : 0;
    r.bound = rounded ? (layer_ref*)0 : bounds_new(&d, c, &r);
    for (int64_t s = 0; c->form == BATCH && s < T * K; ++s)
        for (int64_t j = s / K * K; j < s; ++j)
            if (b->h_ids[s] >= 0 && b->h_ids[j] == b->h_ids[s]) {
                r.dweights[s] = r.dweights[j];
                if (r.bound) r.bound->dweights[s] = r.bound->dweights[j];
                break;
            }
    free(weights);
    free(ids);
    if (rounded) {
        for (int64_t i = 0; i < T * H; ++i) r.y[i] = test_rounded(r.y[i], c->dtype);
        for (int64_t i = 0; i < T * H; ++i) r.dx[i] = test_rounded(r.dx[i], c->dtype);
        for (int64_t i = 0; i < c->E * U * H; ++i) r.dw1[i] = test_rounded(r.dw1[i], c->grad_dtype);
        for (int64_t i = 0; i < c->E * H * I; ++i) r.dw2[i] = test_rounded(r.dw2[i], c->grad_dtype);
        for (int64_t i = 0; i < T * K; ++i) r.dweights[i] = test_rounded(r.dweights[i], MOE_FP32);
    }
    return r;
}

/* Each element by its own bound. */
static void check_each(const char* what, const void* got, int dtype, int64_t stride,
                       const double* exact, const double* bound, int64_t rows, int64_t cols)
{
    int64_t bad = 0;
    double worst = 0;
    for (int64_t i = 0; i < rows * cols; ++i) {
        const double v = moe_load(got, i / cols * stride + i % cols, dtype);
        const double error = fabs(v - exact[i]);
        if (error <= bound[i] && bound[i] > 0 && error / bound[i] > worst) worst = error / bound[i];
        if (!(error <= bound[i]) && bad++ < 3)
            CHECK(0, "%s: [%lld, %lld] is %.9g, not %.9g; its bound is %.3g", what,
                  (long long)(i / cols), (long long)(i % cols), v, exact[i], bound[i]);
    }
    CHECK(bad == 0, "%s: %lld of %lld", what, (long long)bad, (long long)(rows * cols));
    if (test_now.verbose) printf("  each of %s: at most %.2f of its bound\n", what, worst);
}

/* The house bound over few numbers, which may all be small. */
static void check_few(const char* what, const void* got, int dtype, const double* exact,
                      const double* ideal, int64_t n)
{
    double bound = 0, worst = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double e = fabs(ideal[i] - exact[i]), g = fabs(moe_load(got, i, dtype) - exact[i]);
        if (!(e <= bound)) bound = e;
        if (!(g <= worst)) worst = g;
    }
    CHECK(worst <= 2 * bound + 1e-5, "%s: error %g, bound %g", what, worst, 2 * bound + 1e-5);
}

static void check_array(const char* what, const void* got, int dtype, int64_t stride,
                        const double* exact, const double* ideal, int64_t rows, int64_t cols)
{
    int64_t zeros = 0;
    for (int64_t i = 0; i < rows * cols; ++i) zeros += exact[i] == 0;
    if (zeros == rows * cols) { /* nothing was chosen: zeros and no less */
        int64_t bad = 0;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j) bad += moe_load(got, i * stride + j, dtype) != 0;
        CHECK(bad == 0, "%s: %lld are not zero", what, (long long)bad);
    } else if (rows * cols < 256) {
        CHECK(stride == cols, "%s", what);
        check_few(what, got, dtype, exact, ideal, rows * cols);
    } else {
        CHECK_CLOSE(what, got, dtype, stride, exact, ideal, rows, cols);
    }
}

static void check_forward(const layer_bufs* b, const layer_case* c, const layer_ref* exact,
                          const layer_ref* ideal)
{
    const int64_t stride = y_stride(c);
    void* y = tbuf_copy(&b->y);
    if (c->T * c->H < 256)
        for (int64_t t = 0; t < c->T; ++t)
            check_array("y", (uint16_t*)y + t * stride, c->dtype, c->H, exact->y + t * c->H,
                        ideal->y + t * c->H, 1, c->H);
    else check_array("y", y, c->dtype, stride, exact->y, ideal->y, c->T, c->H);
    check_each("y", y, c->dtype, stride, exact->y, exact->bound->y, c->T, c->H);
    CHECK(test_strays(y, (int64_t)b->y.bytes, 2, stride, c->H, 0, c->T) == 0, "y");
    free(y);
}

static void check_backward(const layer_bufs* b, const layer_case* c, const layer_ref* exact,
                           const layer_ref* ideal)
{
    const int64_t T = c->T, H = c->H, I = c->I, U = up_rows(c), stride = dx_stride(c);
    const int slots = slots_of(c), bytes = moe_dtype_bytes(c->grad_dtype);
    char* dx = (char*)tbuf_copy(c->in_place ? &b->dy : &b->dx);
    char *dw1 = (char*)tbuf_copy(&b->dw1), *dw2 = (char*)tbuf_copy(&b->dw2);
    float* dweights = (float*)tbuf_copy(&b->dweights);
    int32_t* grad_expert = (int32_t*)tbuf_copy(&b->grad_expert);
    int64_t strays = 0;
    if (T * H < 256)
        for (int64_t t = 0; t < T; ++t)
            check_array("dx", dx + t * stride * 2, c->dtype, H, exact->dx + t * H,
                        ideal->dx + t * H, 1, H);
    else check_array("dx", dx, c->dtype, stride, exact->dx, ideal->dx, T, H);
    check_each("dx", dx, c->dtype, stride, exact->dx, exact->bound->dx, T, H);
    check_each("dweights", dweights, MOE_FP32, choices(c), exact->dweights, exact->bound->dweights,
               T, choices(c));
    if (!c->in_place) CHECK(test_strays(dx, (int64_t)b->dx.bytes, 2, stride, H, 0, T) == 0, "dx");
    check_array("dweights", dweights, MOE_FP32, choices(c), exact->dweights, ideal->dweights, T,
                choices(c));
    for (int i = 0; i < slots; ++i) {
        const int want = i < b->num_active ? b->active[i] : -1;
        if (!CHECK(grad_expert[i] == want, "slot %d: %d, not %d", i, grad_expert[i], want)) break;
    }
    for (int i = 0; i < slots && i < b->num_active; ++i) { /* each by its own bound */
        const int64_t e = b->active[i];
        check_array("dw1", dw1 + i * U * H * bytes, c->grad_dtype, H, exact->dw1 + e * U * H,
                    ideal->dw1 + e * U * H, U, H);
        check_array("dw2", dw2 + i * H * I * bytes, c->grad_dtype, I, exact->dw2 + e * H * I,
                    ideal->dw2 + e * H * I, H, I);
        check_each("dw1", dw1 + i * U * H * bytes, c->grad_dtype, H, exact->dw1 + e * U * H,
                   exact->bound->dw1 + e * U * H, U, H);
        check_each("dw2", dw2 + i * H * I * bytes, c->grad_dtype, I, exact->dw2 + e * H * I,
                   exact->bound->dw2 + e * H * I, H, I);
    }
    for (int64_t i = b->num_active * U * H * bytes; i < (int64_t)b->dw1.bytes; ++i)
        strays += (unsigned char)dw1[i] != test_poison_byte((size_t)i);
    for (int64_t i = b->num_active * H * I * bytes; i < (int64_t)b->dw2.bytes; ++i)
        strays += (unsigned char)dw2[i] != test_poison_byte((size_t)i);
    CHECK(strays == 0, "%lld bytes of slots without an expert were written", (long long)strays);
    free(dx);
    free(dw1);
    free(dw2);
    free(dweights);
    free(grad_expert);
}

/* Inputs are what they were. */
static void check_inputs(const layer_bufs* b, const layer_case* c)
{
    CHECK(tbuf_holds(&b->x, b->h_x), "x changed");
    CHECK(c->in_place || tbuf_holds(&b->dy, b->h_dy), "dy changed");
    CHECK(c->form == DENSE || tbuf_holds(&b->ids, b->h_ids), "ids changed");
    CHECK(tbuf_holds(&b->weights, b->h_weights), "weights changed");
    CHECK(tweights_same(&b->w1) && tweights_same(&b->w2), "w1 or w2 changed");
}

/* First slot whose id is bad; -1: none. */
static int64_t first_bad(const layer_bufs* b, const layer_case* c)
{
    for (int64_t s = 0; c->form != DENSE && s < (int64_t)c->T * c->K; ++s)
        if (b->h_ids[s] < -1 || b->h_ids[s] >= c->E) return s;
    return -1;
}

static void run_case(const layer_case* c, trand* r)
{
    layer_bufs b;
    layer_ref exact, ideal;
    const int failures = test_now.failures;
    int64_t bad;
    bufs_new(&b, c, r);
    exact = ref_new(&b, c, 0);
    ideal = ref_new(&b, c, 1);
    bad = first_bad(&b, c);
    if (CHECK_STATUS(both(&b), MOE_OK)) {
        check_forward(&b, c, &exact, &ideal);
        check_backward(&b, c, &exact, &ideal);
        check_inputs(&b, c);
        CHECK_FAULT(&b.fault, bad < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_ID, bad < 0 ? 0 : bad);
    }
    if (test_now.failures > failures) printf("  in %s\n", case_text(c));
    ref_free(&exact);
    ref_free(&ideal);
    bufs_free(&b);
}

/* ---- the reference ---- */

/* A loss, and its change along a random direction, by all that has a gradient. */
static void test_reference_gradients(void)
{
    trand r = trand_new(1);
    for (int activation = MOE_ACTIVATION_NONE; activation <= MOE_ACTIVATION_RELU2; ++activation)
        for (int dense = 0; dense < 2; ++dense) {
            enum { T = 5, H = 6, I = 7, E = 4, K = 3, MOST = 4096 };
            const int k = dense ? E : K, U = moe_activation_is_gated(activation) ? 2 * I : I;
            const double step = 1e-5;
            int32_t ids[T * K];
            static double in[4][MOST], dir[4][MOST], at[4][MOST], grad[4][MOST];
            double dy[T * H], y[T * H];
            const int64_t count[4] = {T * H, E * U * H, E * H * I, T * k};
            double loss[2] = {0, 0}, slope = 0, terms = 0;
            moe_ref_block_layer_desc d;
            memset(&d, 0, sizeof d);
            for (int i = 0; i < T * K; ++i) ids[i] = (int)trand_int(&r, -1, E - 1);
            for (int i = 0; i < T * H; ++i) dy[i] = trand_normal(&r);
            for (int i = 0; i < 4; ++i)
                for (int64_t j = 0; j < count[i]; ++j) {
                    in[i][j] = trand_normal(&r) * (i == 1 || i == 2 ? 0.6 : 1);
                    dir[i][j] = trand_normal(&r);
                }
            d.ids = dense ? (const int32_t*)0 : ids;
            d.dy = dy;
            d.x_dtype = d.dy_dtype = d.weights_dtype = d.w_dtype = MOE_REF_REAL;
            d.activation = activation;
            if (activation == MOE_ACTIVATION_SWIGLU_CLAMPED) d.alpha = 1.3f, d.limit = 1.1f;
            d.num_tokens = T, d.num_experts = E, d.top_k = k, d.hidden = H, d.intermediate = I;
            for (int side = -1; side <= 1; ++side) {
                for (int i = 0; i < 4; ++i)
                    for (int64_t j = 0; j < count[i]; ++j)
                        at[i][j] = in[i][j] + side * step * dir[i][j];
                d.x = at[0];
                d.w1.base = at[1];
                d.w2.base = at[2];
                d.weights = at[3];
                if (side == 0) {
                    moe_ref_block_layer_f64(&d, y, grad[0], grad[1], grad[2], grad[3]);
                    continue;
                }
                moe_ref_block_layer_f64(&d, y, 0, 0, 0, 0);
                for (int i = 0; i < T * H; ++i) loss[side > 0] += y[i] * dy[i];
            }
            for (int i = 0; i < 4; ++i)
                for (int64_t j = 0; j < count[i]; ++j) {
                    slope += grad[i][j] * dir[i][j];
                    terms += fabs(grad[i][j] * dir[i][j]);
                }
            /* kinks of the clamp and of ReLU^2's slope may lie within a step */
            CHECK(fabs((loss[1] - loss[0]) / (2 * step) - slope) <= 1e-4 * terms && terms > 1,
                  "activation %d: %g, not %g", activation, slope, (loss[1] - loss[0]) / (2 * step));
        }
}

/* ---- the forms ---- */

static void test_forms(void)
{
    static const int tokens[] = {1, 2, 15, 16, 17, 37};
    trand r = trand_new(2);
    for (int form = DENSE; form <= BATCH; ++form)
        for (size_t i = 0; i < sizeof tokens / sizeof tokens[0]; ++i) {
            layer_case c = normal_case(form, tokens[i], 24, 32, 5, (int)(1 + i % 3));
            if (i % 2) c.dtype = c.grad_dtype = MOE_FP16;
            if (i % 3 == 1) c.grad_dtype = MOE_FP32;
            c.table = i % 2 == 0;
            c.pad = i % 3 == 2 ? 8 : 0;
            c.own_act_grad = i % 3 == 0;
            c.in_place = i % 4 == 3;
            if (form != DENSE) c.unused = i % 3 == 0 ? 0 : 20;
            run_case(&c, &r);
        }
}

static void test_blocks(void)
{
    static const int block[] = {16, 32, 64, 128};
    trand r = trand_new(3);
    for (int form = DENSE; form <= BATCH; ++form)
        for (int i = 0; i < 4; ++i) {
            layer_case c = normal_case(form, block[i] + 3, 16 + 8 * i,
                                       block[i] < 64 ? 3 * block[i] : block[i], 3, 2);
            c.block = block[i];
            c.activation = i % 2 ? MOE_ACTIVATION_GELU : MOE_ACTIVATION_SWIGLU;
            c.grad_dtype = MOE_FP32;
            run_case(&c, &r);
        }
}

static void test_activations(void)
{
    trand r = trand_new(4);
    for (int a = 0; a <= MOE_ACTIVATION_RELU2; ++a)
        for (int clamp = 0; clamp < (a == MOE_ACTIVATION_SWIGLU_CLAMPED ? 2 : 1); ++clamp) {
            layer_case c = normal_case(DENSE + (a + clamp) % 3, 21, 32, 48, 3, 2);
            c.activation = a;
            if (clamp) c.alpha = 0.8f, c.limit = 0.75f;
            c.dtype = c.grad_dtype = a % 2 ? MOE_FP16 : test_half();
            run_case(&c, &r);
        }
}

/* w1 and w2 that put a token's numbers into pre and out of act as they are; weights of 1. */
static void make_identity(layer_bufs* b, const layer_case* c)
{
    memset(b->w1.host[0][0], 0, b->w1.part[0][0].bytes);
    memset(b->w2.host[0][0], 0, b->w2.part[0][0].bytes);
    for (int i = 0; i < up_rows(c); ++i) moe_store(b->w1.host[0][0], i * c->H + i, c->dtype, 1);
    for (int i = 0; i < c->I; ++i) moe_store(b->w2.host[0][0], i * c->I + i, c->dtype, 1);
    for (int64_t i = 0; i < c->T; ++i) b->h_weights[i] = 1;
    tbuf_put(&b->w1.part[0][0], b->w1.host[0][0]);
    tbuf_put(&b->w2.part[0][0], b->w2.host[0][0]);
    tbuf_put(&b->weights, b->h_weights);
}

/* Activations and their slopes over all sizes of numbers, through the identity: H = I = block, w1
   and w2 put each token's numbers straight into pre and out of act. */
static void test_curves(void)
{
    static const float edge[] = {0,   -0.0f, 1e-6f, -1e-6f, 30,   -30,
                                 200, -200,  3e4f,  -3e4f,  6e4f, -6e4f};
    trand r = trand_new(5);
    for (int a = MOE_ACTIVATION_NONE; a <= MOE_ACTIVATION_RELU2; ++a) {
        layer_case c = normal_case(DENSE, 64, 32, 16, 1, 0);
        layer_bufs b;
        const int g = moe_activation_is_gated(a);
        int64_t bad = 0, checked = 0;
        c.activation = a;
        c.dtype = c.grad_dtype = MOE_FP16;
        bufs_new(&b, &c, &r);
        make_identity(&b, &c);
        for (int64_t i = 0; i < (int64_t)c.T * c.H; ++i) {
            static const float scale[] = {0.1f, 1, 4, 10};
            float v = trand_normal(&r) * scale[i / c.H % 4];
            if (i / c.H >= 60) { /* ups that keep what comes out finite, as ReLU^2 does not */
                v = i % c.H < c.I ? edge[trand_int(&r, 0, a == MOE_ACTIVATION_RELU2 ? 7 : 11)]
                                  : trand_normal(&r) * 0.25f;
            }
            moe_store(b.h_x, i, c.dtype, v);
            if (i / c.H >= 60) moe_store(b.h_dy, i, c.dtype, 1);
        }
        tbuf_put(&b.x, b.h_x);
        reset(&b);
        if (CHECK_STATUS(both(&b), MOE_OK)) {
            uint16_t *y = (uint16_t*)tbuf_copy(&b.y), *dx = (uint16_t*)tbuf_copy(&b.dx);
            for (int64_t t = 0; t < c.T; ++t)
                for (int i = 0; i < c.I; ++i) {
                    const double v = moe_load(b.h_x, t * c.H + i, c.dtype);
                    const double up = g ? moe_load(b.h_x, t * c.H + c.I + i, c.dtype) : 0;
                    const double d = moe_load(b.h_dy, t * c.H + i, c.dtype);
                    double by_v, by_up, want[3], got[3];
                    moe_ref_activation_grad_f64(a, v, up, 0, 0, &by_v, &by_up);
                    want[0] = moe_ref_activation_f64(a, v, up, 0, 0);
                    want[1] = by_v * d;
                    want[2] = by_up * d;
                    got[0] = moe_load(y, t * c.H + i, c.dtype);
                    got[1] = moe_load(dx, t * c.H + i, c.dtype);
                    got[2] = g ? moe_load(dx, t * c.H + c.I + i, c.dtype) : 0;
                    for (int j = 0; j < 3; ++j) {
                        if (fabs(want[j]) > 65000) continue; /* infinite in fp16, or nearly */
                        ++checked;
                        if (!(fabs(got[j] - want[j]) <= fabs(want[j]) / 900 + 2e-6) && bad++ < 3)
                            CHECK(0, "activation %d of %g, %g: part %d is %g, not %g", a, v, up, j,
                                  got[j], want[j]);
                    }
                }
            CHECK(bad == 0 && checked > 2000, "activation %d: %lld of %lld", a, (long long)bad,
                  (long long)checked);
            free(y);
            free(dx);
        }
        bufs_free(&b);
    }
}

/* The clamped SwiGLU's gradient at the limit itself, where it passes, and a step of fp16 to either
   side of it, where it passes or is 0. */
static void test_clamp_edges(void)
{
    static const float limits[] = {0, 0.75f}; /* 0: 7 */
    trand r = trand_new(26);
    for (int l = 0; l < 2; ++l) {
        const float limit = l ? limits[l] : 7, step = l ? 1.0f / 2048 : 1.0f / 256;
        const float edge[] = {limit,        limit - step,  limit + step, -limit,
                              step - limit, -limit - step, 0.5f,         -0.25f};
        layer_case c = normal_case(DENSE, 64, 32, 16, 1, 0);
        layer_bufs b;
        int64_t passed[2] = {0, 0}, zero[2] = {0, 0};
        c.activation = MOE_ACTIVATION_SWIGLU_CLAMPED;
        c.limit = limits[l];
        c.dtype = c.grad_dtype = MOE_FP16;
        bufs_new(&b, &c, &r);
        make_identity(&b, &c);
        for (int i = 0; i < c.T * c.I; ++i) { /* all pairs */
            const int64_t at = i / c.I * c.H + i % c.I;
            moe_store(b.h_x, at, c.dtype, edge[i % 8]);
            moe_store(b.h_x, at + c.I, c.dtype, edge[i / 8 % 8]);
            moe_store(b.h_dy, at, c.dtype, 1 + (float)(i % 3));
        }
        tbuf_put(&b.x, b.h_x);
        reset(&b);
        if (CHECK_STATUS(both(&b), MOE_OK)) {
            uint16_t *y = (uint16_t*)tbuf_copy(&b.y), *dx = (uint16_t*)tbuf_copy(&b.dx);
            for (int i = 0; i < c.T * c.I; ++i) {
                const int64_t at = i / c.I * c.H + i % c.I;
                const float v = edge[i % 8], up = edge[i / 8 % 8];
                const double d = moe_load(b.h_dy, at, c.dtype);
                const double got[] = {moe_load(y, at, c.dtype), moe_load(dx, at, c.dtype),
                                      moe_load(dx, at + c.I, c.dtype)};
                double want[3];
                want[0] = moe_ref_activation_f64(c.activation, v, up, 0, c.limit);
                moe_ref_activation_grad_f64(c.activation, v, up, 0, c.limit, &want[1], &want[2]);
                for (int j = 0; j < 3; ++j) {
                    const double w = j ? want[j] * d : want[j];
                    CHECK(fabs(got[j] - w) <= fabs(w) / 900 + 2e-6,
                          "limit %g, gate %g, up %g: part %d is %g, not %g", (double)limit,
                          (double)v, (double)up, j, got[j], w);
                }
                passed[0] += v == limit && got[1] != 0;
                passed[1] += fabsf(up) == limit && got[2] != 0;
                zero[0] += v > limit && got[1] == 0;
                zero[1] += fabsf(up) > limit && got[2] == 0;
            }
            CHECK(passed[0] >= 64 && passed[1] >= 128 && zero[0] == 128 && zero[1] == 256,
                  "gates %lld pass, %lld not; ups %lld, %lld", (long long)passed[0],
                  (long long)zero[0], (long long)passed[1], (long long)zero[1]);
            free(y);
            free(dx);
        }
        bufs_free(&b);
    }
}

typedef struct slope_args {
    const float* v;
    float* slope;
    int32_t n;
} slope_args;

MOE_KERNEL(256, 1) slope_kernel(MOE_ARG(slope_args) a)
{
    const int i = (int)(blockIdx.x * 256 + threadIdx.x);
    if (i < a.n) a.slope[i] = moei_gelu_slope(a.v[i]);
}

/* GELU's slope in fp32: near 0 a series, further off by a quotient, and where they meet. */
static void test_gelu_slope(void)
{
    enum { N = 4096 };
    static const float edge[] = {0,       -0.0f,       1e-30f,       -1e-30f,    1e-6f, 0.125f,
                                 -0.125f, 0.12500001f, -0.12500001f, 0.1249999f, 15,    -15,
                                 16,      -16,         1e30f,        -1e30f};
    trand r = trand_new(27);
    static float v[N];
    const moe_launch_config config = moe_grid(N / 256, 256, 0, test_now.stream);
    slope_args a;
    tbuf in, out;
    float* got;
    double worst[2] = {0, 0};
    for (int i = 0; i < N; ++i) {
        v[i] = i < 16 ? edge[i] : (float)trand_int(&r, -1000, 1000) / 1000;
        if (i >= 16 && i % 2) v[i] *= 0.13f;
        if (i >= 16 && i % 8 == 0) v[i] *= 6;
    }
    in = tbuf_from("v", v, sizeof v, 0);
    out = tbuf_new("slope", sizeof v, 0);
    a.v = (const float*)in.p;
    a.slope = (float*)out.p;
    a.n = N;
    CHECK_STATUS(MOE_LAUNCH(slope_kernel, config, a), MOE_OK);
    got = (float*)tbuf_copy(&out);
    for (int i = 0; i < N; ++i) {
        const int far = fabsf(v[i]) > 0.125f;
        const double bound = far ? 2e-6 : 1.5e-7;
        double want, by_up, error;
        moe_ref_activation_grad_f64(MOE_ACTIVATION_GELU, v[i], 0, 0, 0, &want, &by_up);
        error = fabs(got[i] - want);
        if (error > worst[far]) worst[far] = error;
        CHECK(error <= bound, "slope of %.9g: %.9g, not %.9g", (double)v[i], (double)got[i], want);
    }
    if (test_now.verbose) printf("  gelu's slope: errors up to %g, %g\n", worst[0], worst[1]);
    free(got);
    tbuf_free(&in);
    tbuf_free(&out);
}

/* A longer run of everything. */
static void test_large(void)
{
    trand r = trand_new(6);
    for (int form = DENSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, MOE_ON_HOST ? 70 : 700, MOE_ON_HOST ? 64 : 256,
                                   MOE_ON_HOST ? 64 : 256, MOE_ON_HOST ? 6 : 16, 3);
        c.block = MOE_ON_HOST ? 32 : 64;
        run_case(&c, &r);
    }
}

static void test_ids(void)
{
    trand r = trand_new(7);
    for (int form = SPARSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 33, 24, 32, 7, 3);
        c.unused = 30;
        c.bad = 20;
        run_case(&c, &r);
        c.unused = 97;
        c.bad = 0;
        run_case(&c, &r);
        c.unused = 100; /* nothing at all */
        run_case(&c, &r);
        c.unused = 0;
        c.bad = 100;
        run_case(&c, &r);
        c.bad = 0;
        c.one_expert = 1; /* everything on one, in each of a token's slots */
        run_case(&c, &r);
        c.one_expert = 0;
        c.experts = 3; /* experts 3 .. 6 have nothing */
        run_case(&c, &r);
        c = normal_case(form, 20, 24, 16, 2, 5); /* more choices than experts */
        c.one_expert = 1;
        run_case(&c, &r);
        c = normal_case(form, 19, 16, 16, 1, 1);
        run_case(&c, &r);
        c = normal_case(form, 9, 16, 16, 70, 2); /* more experts than blocks of rows */
        run_case(&c, &r);
    }
}

static void test_max_experts(void)
{
    trand r = trand_new(8);
    for (int form = SPARSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 33, 24, 32, 8, 3);
        c.experts = 3;
        c.max_experts = 3;
        run_case(&c, &r);
        c.max_experts = 5; /* the last ones stay empty */
        c.grad_dtype = MOE_FP32;
        run_case(&c, &r);
    }
}

/* More active experts than slots: nothing is written but the fault. */
static void test_no_room(void)
{
    trand r = trand_new(9);
    for (int form = DENSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 40, 24, 32, 5, 3);
        layer_bufs b;
        layer_ref exact, ideal;
        c.max_experts = 2;
        bufs_new(&b, &c, &r);
        exact = ref_new(&b, &c, 0);
        ideal = ref_new(&b, &c, 1);
        CHECK_STATUS(both(&b), MOE_OK);
        check_forward(&b, &c, &exact, &ideal);
        CHECK_FAULT(&b.fault, MOE_FAULT_NO_ROOM, b.num_active);
        CHECK(b.num_active > 2, "%d experts", b.num_active);
        CHECK(tbuf_holds(&b.dx, 0) && tbuf_holds(&b.dw1, 0) && tbuf_holds(&b.dw2, 0) &&
                  tbuf_holds(&b.dweights, 0) && tbuf_holds(&b.grad_expert, 0),
              "form %d: written", form);
        reset(&b); /* without gradients of weights nobody wants room */
        b.d.dw1 = b.d.dw2 = 0;
        b.d.grad_expert = 0;
        CHECK_STATUS(both(&b), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        CHECK(!tbuf_holds(&b.dx, 0) && !tbuf_holds(&b.dweights, 0), "not written");
        reset(&b); /* nowhere to tell: the first ones, and within bounds */
        b.d.dw1 = b.dw1.p;
        b.d.dw2 = b.dw2.p;
        b.d.grad_expert = (int32_t*)b.grad_expert.p;
        b.d.fault = 0;
        CHECK_STATUS(both(&b), MOE_OK);
        {
            int32_t* got = (int32_t*)tbuf_copy(&b.grad_expert);
            CHECK_INTS("grad_expert", got, b.active, 2);
            free(got);
        }
        ref_free(&exact);
        ref_free(&ideal);
        bufs_free(&b);
    }
}

/* A batch whose tokens do not agree. */
static void test_batch_of_many(void)
{
    trand r = trand_new(10);
    layer_case c = normal_case(BATCH, 20, 24, 32, 6, 2);
    layer_bufs b;
    bufs_new(&b, &c, &r);
    for (int s = 0; s < c.T * c.K; ++s) b.h_ids[s] = s % 5;
    tbuf_put(&b.ids, b.h_ids);
    CHECK_STATUS(both(&b), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_NO_ROOM, 5);
    CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.dx, 0) && tbuf_holds(&b.dw1, 0) &&
              tbuf_holds(&b.dw2, 0) && tbuf_holds(&b.dweights, 0) && tbuf_holds(&b.grad_expert, 0),
          "written");
    b.d.fault = 0; /* nowhere to tell: within bounds */
    CHECK_STATUS(both(&b), MOE_OK);
    bufs_free(&b);
}

static void test_bad_table(void)
{
    trand r = trand_new(11);
    for (int second = 0; second < 2; ++second) {
        layer_case c = normal_case(SPARSE, 30, 24, 32, 4, 2);
        layer_bufs b;
        void** address;
        c.table = 1;
        bufs_new(&b, &c, &r);
        address = (void**)tbuf_copy(second ? &b.w2.table[0] : &b.w1.table[0]);
        address[b.active[1]] = second ? (char*)address[b.active[1]] + 8 : 0;
        tbuf_put(second ? &b.w2.table[0] : &b.w1.table[0], address);
        CHECK_STATUS(both(&b), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_TABLE, b.active[1]);
        CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.dx, 0) && tbuf_holds(&b.dw1, 0), "written");
        free(address);
        bufs_free(&b);
    }
}

/* ---- who lacks an expert ---- */

enum { ODD_X_ROW, ODD_X_NAN, ODD_X_INF, ODD_DY_ROW, ODD_DY_INF, ODD_BOTH, ODD_LARGE, ODD_KINDS };

/* Puts what is not finite, or overflows fp16 on its way, into token t's x, dy or both. */
static void make_odd(layer_bufs* b, const layer_case* c, int64_t t, int kind, trand* r)
{
    const int64_t at = trand_int(r, 0, c->H - 1);
    for (int64_t j = 0; j < c->H; ++j) {
        const int64_t x = t * x_stride(c) + j, dy = t * dy_stride(c) + j;
        if (kind == ODD_X_ROW || kind == ODD_BOTH) moe_store(b->h_x, x, c->dtype, NAN);
        if (kind == ODD_X_NAN && j == at) moe_store(b->h_x, x, c->dtype, NAN);
        if (kind == ODD_X_INF && j == at) moe_store(b->h_x, x, c->dtype, -INFINITY);
        if (kind == ODD_DY_ROW || kind == ODD_BOTH) moe_store(b->h_dy, dy, c->dtype, NAN);
        if (kind == ODD_DY_INF && j == at) moe_store(b->h_dy, dy, c->dtype, INFINITY);
        if (kind == ODD_LARGE) moe_store(b->h_x, x, c->dtype, j % 2 ? 6e4f : -6e4f);
    }
}

static int all_zero(const void* p, size_t bytes)
{
    int zero = 1;
    for (size_t i = 0; i < bytes; ++i) zero &= ((const unsigned char*)p)[i] == 0;
    return zero;
}

/* Two tokens, one of which has no expert: it changes nothing, whatever it holds. */
static void test_lacking_one(void)
{
    trand r = trand_new(20);
    for (int i = 0; i < 2 * ODD_KINDS; ++i) {
        layer_case c = normal_case(BATCH, 2, 8, 16, 1, 1), alone = c;
        const int kind = i % ODD_KINDS;
        layer_bufs b, one;
        alone.T = 1;
        c.dtype = c.grad_dtype = alone.dtype = alone.grad_dtype = i % 2 ? MOE_FP16 : test_half();
        bufs_new(&b, &c, &r);
        bufs_new(&one, &alone, &r);
        b.h_ids[0] = 0, b.h_ids[1] = -1;
        b.h_weights[0] = one.h_weights[0] = 1;
        b.h_weights[1] = i % 3 == 2 ? NAN : 0;
        make_odd(&b, &c, 1, kind, &r);
        memcpy(one.h_x, b.h_x, one.x.bytes);
        memcpy(one.h_dy, b.h_dy, one.dy.bytes);
        tbuf_put(&b.x, b.h_x);
        tbuf_put(&b.ids, b.h_ids);
        tbuf_put(&b.weights, b.h_weights);
        reset(&b);
        tbuf_put(&one.x, one.h_x);
        tbuf_put(&one.weights, one.h_weights);
        tbuf_put(&one.w1.part[0][0], b.w1.host[0][0]);
        tbuf_put(&one.w2.part[0][0], b.w2.host[0][0]);
        reset(&one);
        CHECK_STATUS(both(&b), MOE_OK);
        CHECK_STATUS(both(&one), MOE_OK);
        {
            const tbuf* mine[] = {&b.y, &b.dx, &b.dweights, &b.dw1, &b.dw2};
            const tbuf* want[] = {&one.y, &one.dx, &one.dweights, &one.dw1, &one.dw2};
            for (int j = 0; j < 5; ++j) {
                char *got = (char*)tbuf_copy(mine[j]), *first = (char*)tbuf_copy(want[j]);
                CHECK(memcmp(got, first, want[j]->bytes) == 0, "kind %d: %s of token 0", kind,
                      mine[j]->name);
                CHECK(!all_zero(first, want[j]->bytes), "%s shows nothing", mine[j]->name);
                CHECK(all_zero(got + want[j]->bytes, mine[j]->bytes - want[j]->bytes),
                      "kind %d: %s of token 1", kind, mine[j]->name);
                free(got);
                free(first);
            }
        }
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        bufs_free(&b);
        bufs_free(&one);
    }
}

static int has_expert(const layer_bufs* b, const layer_case* c, int64_t t, int e)
{
    int has = 0;
    for (int k = 0; k < c->K; ++k) has |= b->h_ids[t * c->K + k] == e;
    return has;
}

static int any_odd(const char* p, int64_t n, int dtype)
{
    int odd = 0;
    for (int64_t i = 0; i < n; ++i) odd |= !isfinite(moe_load(p, i, dtype));
    return odd;
}

/* Makes some tokens that lack one expert odd: every other token, and the gradients of every expert
   that none of them has, keep their bits; a token without any expert gets zeros. Sparse too. */
static void run_lacking(const layer_case* c, int kind, trand* r)
{
    const int64_t T = c->T, H = c->H, grad = moe_dtype_bytes(c->grad_dtype);
    const int64_t m1 = up_rows(c) * H * grad, m2 = H * c->I * grad;
    const int failures = test_now.failures;
    layer_bufs b;
    char *before[5], *after[5], *odd = (char*)test_host(T);
    int victim, lacking = 0, kept = 0;
    bufs_new(&b, c, r);
    {
        const tbuf* out[] = {&b.y, &b.dx, &b.dweights, &b.dw1, &b.dw2};
        victim = b.active[trand_int(r, 0, b.num_active - 1)];
        memset(odd, 0, (size_t)T);
        for (int64_t t = T - 1; t >= 0; --t) { /* the last one, and some */
            int none = 1;
            if (has_expert(&b, c, t, victim) || (lacking && trand_int(r, 0, 5) > 0)) continue;
            for (int e = 0; e < c->E; ++e) none &= !has_expert(&b, c, t, e);
            odd[t] = (char)(none ? 2 : 1);
            ++lacking;
        }
        CHECK_STATUS(both(&b), MOE_OK);
        for (int j = 0; j < 5; ++j) before[j] = (char*)tbuf_copy(out[j]);
        for (int64_t t = 0; t < T; ++t)
            if (odd[t]) make_odd(&b, c, t, kind, r);
        tbuf_put(&b.x, b.h_x);
        reset(&b);
        CHECK_STATUS(both(&b), MOE_OK);
        for (int j = 0; j < 5; ++j) after[j] = (char*)tbuf_copy(out[j]);
    }
    for (int64_t t = 0; t < T; ++t)
        for (int j = 0; j < 3; ++j) { /* y, dx, dweights */
            const int64_t row = j < 2 ? H * 2 : c->K * 4;
            const int64_t at = t * (j == 0 ? y_stride(c) * 2 : j == 1 ? dx_stride(c) * 2 : row);
            static const char* const name[] = {"y", "dx", "dweights"};
            if (odd[t] == 2)
                CHECK(all_zero(after[j] + at, (size_t)row), "%s of token %d, which has no expert",
                      name[j], (int)t);
            else if (!odd[t])
                CHECK(memcmp(after[j] + at, before[j] + at, (size_t)row) == 0,
                      "%s of token %d, which is as it was", name[j], (int)t);
            else if (j == 0 && (kind <= ODD_X_NAN || kind == ODD_BOTH))
                CHECK(any_odd(after[j] + at, H, c->dtype), "y of token %d hides what x holds",
                      (int)t);
            else if (j == 1 && kind <= ODD_BOTH && kind != ODD_X_INF)
                CHECK(any_odd(after[j] + at, H, c->dtype), "dx of token %d hides it", (int)t);
        }
    for (int i = 0; i < b.num_active; ++i) {
        int has = 0;
        for (int64_t t = 0; t < T; ++t) has |= odd[t] && has_expert(&b, c, t, b.active[i]);
        if (has && kind < ODD_LARGE && kind != ODD_X_INF) {
            CHECK(any_odd(after[3] + i * m1, m1 / grad, c->grad_dtype), "dw1 hides it");
            CHECK(any_odd(after[4] + i * m2, m2 / grad, c->grad_dtype), "dw2 hides it");
        } else if (!has) {
            CHECK(memcmp(after[3] + i * m1, before[3] + i * m1, (size_t)m1) == 0,
                  "dw1 of expert %d, which no odd token has", b.active[i]);
            CHECK(memcmp(after[4] + i * m2, before[4] + i * m2, (size_t)m2) == 0,
                  "dw2 of expert %d, which no odd token has", b.active[i]);
            ++kept;
        }
    }
    if (c->form == BATCH) { /* whatever the workspace held before: 3 could be a place in it */
        int32_t* threes = (int32_t*)test_host((int64_t)b.workspace.bytes);
        for (size_t i = 0; i < b.workspace.bytes / 4; ++i) threes[i] = 3;
        reset(&b);
        CHECK_STATUS(moe_block_layer_forward(&b.d, test_now.stream), MOE_OK);
        tbuf_put(&b.workspace, threes);
        CHECK_STATUS(moe_block_layer_backward(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.dw1, after[3]) && tbuf_holds(&b.dw2, after[4]),
              "dw1 or dw2 depends on what the workspace held");
        free(threes);
    }
    CHECK(lacking > 0 && kept > 0, "%d tokens lack expert %d: shows nothing", lacking, victim);
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    if (test_now.failures > failures) printf("  in %s, kind %d\n", case_text(c), kind);
    for (int j = 0; j < 5; ++j) {
        free(before[j]);
        free(after[j]);
    }
    free(odd);
    bufs_free(&b);
}

static void test_lacking(void)
{
    static const int blocks[] = {16, 16, 32, 64, 128};
    trand r = trand_new(21);
    for (int form = SPARSE; form <= BATCH; ++form)
        for (int i = 0; i < (!MOE_ON_HOST ? 4 : form == BATCH ? 2 : 1) * ODD_KINDS; ++i) {
            const int block = blocks[i % 5];
            layer_case c =
                normal_case(form, 45 + i, i % 4 == 1 && block < 64 ? 264 : 40, block, 6, 3);
            c.block = block;
            c.unused = 45;
            c.dtype = c.grad_dtype = i % 2 ? MOE_FP16 : test_half();
            if (i % 3 == 1) c.grad_dtype = MOE_FP32;
            c.pad = i % 3 == 2 ? 8 : 0;
            c.table = i % 4 == 2;
            c.own_act_grad = i % 2;
            c.activation = i % 3 == 0 ? MOE_ACTIVATION_GELU : 0;
            c.tile = i % 7 == 3 ? MOE_BLOCK_SPARSE_TILE_64x64 : 0;
            run_lacking(&c, i % ODD_KINDS, &r);
        }
}

/* ---- the forms against each other ---- */

/* `to` gets from's tokens and weights: ids [T, E] in any order, or the dense form's columns. */
static void same_inputs(layer_bufs* to, const layer_bufs* from)
{
    tbuf* a[] = {&to->x, &to->w1.part[0][0], &to->w2.part[0][0]};
    const void* host[] = {from->h_x, from->w1.host[0][0], from->w2.host[0][0]};
    memcpy(to->h_dy, from->h_dy, from->dy.bytes);
    for (int i = 0; i < 3; ++i) tbuf_put(a[i], host[i]);
    reset(to);
}

static void test_batch_of_all_is_dense(void)
{
    trand r = trand_new(12);
    for (int i = 0; i < 3; ++i) {
        layer_case dense = normal_case(DENSE, i == 0 ? 37 : 16 + i, 24, 32, 5, 0), batch = dense;
        layer_bufs a, b;
        dense.activation = batch.activation = i == 1 ? MOE_ACTIVATION_GELU_TANH : 0;
        dense.block = batch.block = i == 2 ? 32 : 16;
        batch.form = BATCH;
        batch.K = batch.E;
        bufs_new(&a, &dense, &r);
        bufs_new(&b, &batch, &r);
        same_inputs(&b, &a);
        for (int s = 0; s < batch.T * batch.K; ++s)
            b.h_weights[s] = a.h_weights[s / batch.K * batch.E + b.h_ids[s]];
        tbuf_put(&b.weights, b.h_weights);
        CHECK_STATUS(both(&a), MOE_OK);
        CHECK_STATUS(both(&b), MOE_OK);
        {
            const tbuf* one[] = {&a.y, &a.dx, &a.dw1, &a.dw2, &a.grad_expert};
            const tbuf* two[] = {&b.y, &b.dx, &b.dw1, &b.dw2, &b.grad_expert};
            float *da = (float*)tbuf_copy(&a.dweights), *db = (float*)tbuf_copy(&b.dweights);
            int bad = 0;
            for (int j = 0; j < 5; ++j) {
                void* got = tbuf_copy(one[j]);
                CHECK(tbuf_holds(two[j], got), "%s differs", one[j]->name);
                CHECK(!tbuf_holds(one[j], 0), "%s is not written", one[j]->name);
                free(got);
            }
            for (int s = 0; s < batch.T * batch.K; ++s)
                bad += memcmp(&db[s], &da[s / batch.K * batch.E + b.h_ids[s]], 4) != 0;
            CHECK(bad == 0, "%d of dweights differ", bad);
            free(da);
            free(db);
        }
        bufs_free(&a);
        bufs_free(&b);
    }
}

/* Largest difference and largest value of two buffers. */
static void check_agree(const tbuf* a, const tbuf* b, int dtype)
{
    void *x = tbuf_copy(a), *y = tbuf_copy(b);
    double most = 0, apart = 0;
    for (int64_t i = 0; i < (int64_t)a->bytes / moe_dtype_bytes(dtype); ++i) {
        const double v = moe_load(x, i, dtype), d = fabs(v - moe_load(y, i, dtype));
        if (fabs(v) > most) most = fabs(v);
        if (!(d <= apart)) apart = d;
    }
    CHECK(most > 0.1 && apart <= most / 50, "%s: %g apart of %g", a->name, apart, most);
    free(x);
    free(y);
}

/* One routing, three ways: sparse, batch with the same ids, dense with weights 0 elsewhere. */
static void test_forms_agree(void)
{
    trand r = trand_new(13);
    layer_case batch = normal_case(BATCH, 45, 24, 32, 5, 3), sparse = batch, dense = batch;
    layer_bufs a, b, c;
    sparse.form = SPARSE;
    dense.form = DENSE;
    dense.K = 0;
    batch.grad_dtype = sparse.grad_dtype = dense.grad_dtype = MOE_FP32;
    bufs_new(&c, &dense, &r); /* has all experts' weights */
    bufs_new(&a, &batch, &r);
    bufs_new(&b, &sparse, &r);
    same_inputs(&a, &c);
    same_inputs(&b, &c);
    memcpy(b.h_ids, a.h_ids, a.ids.bytes);
    memcpy(b.h_weights, a.h_weights, a.weights.bytes);
    memset(c.h_weights, 0, c.weights.bytes);
    for (int s = 0; s < batch.T * batch.K; ++s)
        c.h_weights[s / batch.K * batch.E + a.h_ids[s]] = a.h_weights[s];
    tbuf_put(&b.ids, b.h_ids);
    tbuf_put(&b.weights, b.h_weights);
    tbuf_put(&c.weights, c.h_weights);
    CHECK_STATUS(both(&a), MOE_OK);
    CHECK_STATUS(both(&b), MOE_OK);
    CHECK_STATUS(both(&c), MOE_OK);
    check_agree(&a.y, &b.y, batch.dtype);
    check_agree(&a.y, &c.y, batch.dtype);
    check_agree(&a.dx, &b.dx, batch.dtype);
    check_agree(&a.dx, &c.dx, batch.dtype);
    check_agree(&a.dweights, &b.dweights, MOE_FP32);
    {
        const int64_t m1 = up_rows(&batch) * batch.H, m2 = (int64_t)batch.H * batch.I;
        tbuf one[2], two[2], three[2];
        one[0] = a.dw1, one[1] = a.dw2;
        two[0] = b.dw1, two[1] = b.dw2;
        three[0] = c.dw1, three[1] = c.dw2;
        for (int i = 0; i < a.num_active; ++i)
            for (int j = 0; j < 2; ++j) { /* slot i; in the dense form the expert's own */
                const size_t bytes = (size_t)(j ? m2 : m1) * 4;
                tbuf p = one[j], q = two[j], s = three[j];
                p.p = (char*)p.p + (size_t)i * bytes;
                q.p = (char*)q.p + (size_t)i * bytes;
                s.p = (char*)s.p + (size_t)a.active[i] * bytes;
                p.bytes = q.bytes = s.bytes = bytes;
                check_agree(&p, &q, MOE_FP32);
                check_agree(&p, &s, MOE_FP32);
            }
    }
    bufs_free(&a);
    bufs_free(&b);
    bufs_free(&c);
}

/* ---- bits, graphs, faults ---- */

static moe_status call_both(void* context, cudaStream_t stream)
{
    layer_bufs* b = (layer_bufs*)context;
    const moe_status s = moe_block_layer_forward(&b->d, stream);
    return s == MOE_OK ? moe_block_layer_backward(&b->d, stream) : s;
}

static moe_status call_backward(void* context, cudaStream_t stream)
{
    return moe_block_layer_backward(&((layer_bufs*)context)->d, stream);
}

static void test_same_bits_again(void)
{
    const int runs = MOE_ON_HOST ? 4 : 100;
    trand r = trand_new(14);
    for (int form = DENSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 37, 24, 32, 5, 2);
        layer_bufs b;
        c.own_act_grad = 1;
        bufs_new(&b, &c, &r);
        {
            tbuf* out[] = {&b.y, &b.dx, &b.dw1, &b.dw2, &b.dweights, &b.grad_expert};
            void* first[6];
            test_same_bits("both", call_both, &b, out, 6, runs);
            for (int i = 0; i < 6; ++i) first[i] = tbuf_copy(out[i]);
            test_same_bits("one forward, several backwards", call_backward, &b, out + 1, 5, runs);
            for (int i = 1; i < 6; ++i) CHECK(tbuf_holds(out[i], first[i]), "%s", out[i]->name);
            b.d.act_grad = 0; /* over pre itself */
            reset(&b);
            CHECK_STATUS(both(&b), MOE_OK);
            for (int i = 0; i < 6; ++i) CHECK(tbuf_holds(out[i], first[i]), "%s", out[i]->name);
            for (int i = 0; i < 6; ++i) free(first[i]);
        }
        bufs_free(&b);
    }
}

/* Only what is wanted is written, and it is what it is with all of them. */
static void test_wanted(void)
{
    trand r = trand_new(15);
    for (int form = DENSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 21, 24, 32, 4, 2);
        layer_bufs b;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(both(&b), MOE_OK);
        {
            tbuf* out[] = {&b.dx, &b.dw1, &b.dw2, &b.dweights};
            void* all[4];
            for (int i = 0; i < 4; ++i) all[i] = tbuf_copy(out[i]);
            for (int i = 0; i < 4; ++i) {
                const moe_block_layer_desc d = b.d;
                reset(&b);
                if (i != 0) b.d.dx = 0;
                if (i != 1) b.d.dw1 = 0;
                if (i != 2) b.d.dw2 = 0;
                if (i != 3) b.d.dweights = 0;
                if (i != 1 && i != 2) b.d.grad_expert = 0;
                CHECK_STATUS(both(&b), MOE_OK);
                for (int j = 0; j < 4; ++j)
                    CHECK(tbuf_holds(out[j], i == j ? all[j] : 0), "%s, %d wanted", out[j]->name,
                          i);
                b.d = d;
            }
            for (int i = 0; i < 4; ++i) free(all[i]);
        }
        bufs_free(&b);
    }
}

static void test_graph(void)
{
    trand r = trand_new(16);
    for (int form = DENSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 37, 24, 32, 5, 2);
        layer_bufs b;
        tgraph g;
        bufs_new(&b, &c, &r);
        if (c.form != DENSE) { /* every expert will be chosen in some replay */
            layer_case full = c;
            layer_bufs other;
            full.form = DENSE;
            full.K = 0;
            bufs_new(&other, &full, &r);
            same_inputs(&b, &other);
            for (int i = 0; i < 2; ++i) {
                tweights *to = i ? &b.w2 : &b.w1, *from = i ? &other.w2 : &other.w1;
                memcpy(to->host[0][0], from->host[0][0], to->part[0][0].bytes);
            }
            memcpy(b.h_x, other.h_x, b.x.bytes);
            bufs_free(&other);
        }
        if (!tgraph_capture(&g, call_both, &b)) return;
        for (int replay = 0; replay < 3; ++replay) {
            layer_ref exact, ideal;
            c.unused = replay == 1 ? 60 : 0;
            c.one_expert = replay == 2;
            fill_routing(&b, &c, &r);
            reset(&b);
            exact = ref_new(&b, &c, 0);
            ideal = ref_new(&b, &c, 1);
            tgraph_launch(&g);
            TEST_CUDA(cudaDeviceSynchronize());
            check_forward(&b, &c, &exact, &ideal);
            check_backward(&b, &c, &exact, &ideal);
            CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
            ref_free(&exact);
            ref_free(&ideal);
        }
        tgraph_free(&g);
        bufs_free(&b);
    }
}

static void test_stop_faults(void)
{
    const uint64_t word = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 7);
    trand r = trand_new(17);
    for (int form = DENSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 37, 24, 32, 5, 2);
        layer_bufs b;
        bufs_new(&b, &c, &r);
        for (int after = 0; after < 2; ++after) { /* before forward, before backward */
            reset(&b);
            if (after) CHECK_STATUS(moe_block_layer_forward(&b.d, test_now.stream), MOE_OK);
            TEST_CUDA(cudaDeviceSynchronize());
            tbuf_put(&b.fault, &word);
            if (!after) CHECK_STATUS(moe_block_layer_forward(&b.d, test_now.stream), MOE_OK);
            CHECK_STATUS(moe_block_layer_backward(&b.d, test_now.stream), MOE_OK);
            CHECK(tbuf_holds(&b.y, 0) == !after, "y");
            CHECK(tbuf_holds(&b.dx, 0) && tbuf_holds(&b.dw1, 0) && tbuf_holds(&b.dw2, 0) &&
                      tbuf_holds(&b.dweights, 0) && tbuf_holds(&b.grad_expert, 0),
                  "form %d: written", form);
            CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 7);
        }
        bufs_free(&b);
    }
}

static void test_no_tokens(void)
{
    trand r = trand_new(18);
    for (int form = DENSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 0, 24, 32, 5, 2);
        layer_bufs b;
        moe_block_layer_bytes bytes;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_block_layer_sizes(&b.d, &bytes), MOE_OK);
        CHECK(bytes.saved == 0 && bytes.forward == 0 && bytes.backward == 0 && bytes.act_grad == 0,
              "no memory for nothing");
        CHECK_STATUS(both(&b), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        CHECK(tbuf_holds(&b.dw1, 0) && tbuf_holds(&b.dw2, 0), "written");
        {
            const int32_t none[5] = {-1, -1, -1, -1, -1};
            CHECK(tbuf_holds(&b.grad_expert, none), "grad_expert");
        }
        b.d.grad_expert = 0;
        CHECK_STATUS(moe_block_layer_backward(&b.d, test_now.stream),
                     MOE_STATUS(MOE_ERR_NULL, grad_expert));
        b.d.grad_expert = (int32_t*)b.grad_expert.p;
        b.d.x = b.d.dy = b.d.w1.base = b.d.w2.base = 0; /* nobody reads them, nor memory */
        b.d.w1.table = b.d.w2.table = 0;
        b.d.y = b.d.dx = 0;
        b.d.ids = 0;
        b.d.weights = 0;
        b.d.saved = b.d.workspace = (void*)16;
        CHECK_STATUS(both(&b), MOE_OK);
        bufs_free(&b);
    }
}

/* Memory is what block_layer.cuh says. */
static void test_sizes(void)
{
    for (int form = DENSE; form <= BATCH; ++form)
        for (int block = 16; block <= 128; block *= 2) {
            const int T = 1000, H = 64, I = 256, E = 16, K = 4;
            moe_block_layer_desc d;
            moe_block_layer_bytes bytes;
            double rows;
            memset(&d, 0, sizeof d);
            d.form = form;
            d.num_tokens = T, d.hidden = H, d.intermediate = I, d.num_experts = E;
            d.top_k = form == DENSE ? 0 : K;
            d.block = block;
            CHECK_STATUS(moe_block_layer_sizes(&d, &bytes), MOE_OK);
            rows = form == SPARSE ? (T * K + E * (block - 1)) / block * block
                                  : (T + block - 1) / block * block * (form == DENSE ? E : K);
            CHECK((double)bytes.act_grad == rows * 2 * I * 2, "%zu", bytes.act_grad);
            CHECK((double)bytes.saved >= rows * 2 * I * 2 &&
                      (double)bytes.saved <= rows * 2 * I * 2 * (1 + 24.0 / block / block) + 131072,
                  "form %d, block %d: saved %zu of %g", form, block, bytes.saved, rows * 2 * I * 2);
            rows = rows * I * 2 + (form == SPARSE ? rows * H * 2 : 0);
            CHECK((double)bytes.forward >= rows && (double)bytes.forward <= rows + 131072,
                  "%zu of %g", bytes.forward, rows);
            CHECK((double)bytes.backward >= rows && (double)bytes.backward <= rows + 131072,
                  "%zu of %g", bytes.backward, rows);
        }
}

/* ---- refusals ---- */

static layer_bufs* refused_bufs;

static void refused_by(const moe_block_layer_desc* d, moe_status want, int line, int which)
{
    layer_bufs* b = refused_bufs;
    moe_status got = MOE_OK;
    moe_block_layer_bytes bytes;
    char text[2][MOE_STATUS_TEXT];
    if (which & 1) got = moe_block_layer_forward(d, test_now.stream);
    if (which & 3) {
        moe_block_layer_prepared p;
        test_poison(&p, sizeof p);
        test_status(which & 1 ? moe_block_layer_prepare_forward(d, &p)
                              : moe_block_layer_prepare_backward(d, &p),
                    want, __FILE__, line, "prepare");
        test_empty(&p, sizeof p, line);
    }
    CHECK(!(which & 1) || got == want, "line %d, forward: got \"%s\", expected \"%s\"", line,
          moe_status_describe(got, text[0]), moe_status_describe(want, text[1]));
    if (which & 2) got = moe_block_layer_backward(d, test_now.stream);
    CHECK(!(which & 2) || got == want, "line %d, backward: got \"%s\", expected \"%s\"", line,
          moe_status_describe(got, text[0]), moe_status_describe(want, text[1]));
    if (which & 4) got = moe_block_layer_sizes(d, &bytes);
    CHECK(!(which & 4) || got == want, "line %d, sizes: got \"%s\", expected \"%s\"", line,
          moe_status_describe(got, text[0]), moe_status_describe(want, text[1]));
    CHECK(tbuf_holds(&b->y, 0) && tbuf_holds(&b->dx, 0) && tbuf_holds(&b->dw1, 0) &&
              tbuf_holds(&b->dw2, 0) && tbuf_holds(&b->dweights, 0) &&
              tbuf_holds(&b->grad_expert, 0) && tbuf_holds(&b->saved, 0) &&
              tbuf_holds(&b->workspace, 0),
          "line %d: written", line);
}

static void refused(const moe_block_layer_desc* d, moe_status want, int line)
{
    refused_by(d, want, line, 7);
}

/* Refused by forward, by backward, by both of them. */
#define REFUSED_BY(which, change, kind, field)                                                     \
    d = good;                                                                                      \
    change;                                                                                        \
    refused_by(&d, MOE_STATUS(kind, field), __LINE__, which)
#define UP_TO(p, bytes) AT(p, -(uintptr_t)(p) % (bytes))
#define REFUSED_FORWARD(change, kind, field) REFUSED_BY(1, change, kind, field)
#define REFUSED_BACKWARD(change, kind, field) REFUSED_BY(2, change, kind, field)
#define REFUSED_BOTH(change, kind, field) REFUSED_BY(3, change, kind, field)

static void test_refusals(void)
{
    trand r = trand_new(19);
    layer_case c = normal_case(SPARSE, 37, 24, 32, 5, 2);
    layer_bufs b;
    moe_block_layer_desc d, good;
    moe_block_layer_bytes bytes;
    c.own_act_grad = 1;
    bufs_new(&b, &c, &r);
    refused_bufs = &b;
    good = b.d;
    CHECK_STATUS(moe_block_layer_forward(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_layer_backward(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_layer_sizes(0, &bytes), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_layer_sizes(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_layer_sizes(&good, &bytes), MOE_OK);

    REFUSED(d.form = 0, MOE_ERR_OPTION, form);
    REFUSED(d.form = 4, MOE_ERR_OPTION, form);
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED(d.num_tokens = INT32_MAX, MOE_ERR_RANGE, num_tokens);
    REFUSED(d.num_tokens = INT32_MAX / 2 - 100, MOE_ERR_RANGE, num_tokens);
    REFUSED(d.hidden = 0, MOE_ERR_RANGE, hidden);
    REFUSED(d.hidden = 20, MOE_ERR_MULTIPLE, hidden);
    REFUSED(d.hidden = INT32_MAX - 7, MOE_ERR_RANGE, hidden);
    REFUSED(d.intermediate = 0, MOE_ERR_RANGE, intermediate);
    REFUSED(d.intermediate = 24, MOE_ERR_MULTIPLE, intermediate);
    REFUSED(d.intermediate = INT32_MAX - 15, MOE_ERR_RANGE, intermediate);
    REFUSED(d.intermediate = 1 << 28, MOE_ERR_RANGE, intermediate); /* columns of all experts */
    REFUSED(d.num_experts = 0, MOE_ERR_RANGE, num_experts);
    REFUSED(d.num_experts = MOE_MAX_EXPERTS + 1, MOE_ERR_RANGE, num_experts);
    REFUSED(d.top_k = 0, MOE_ERR_RANGE, top_k);
    REFUSED(d.top_k = MOE_COMBINE_MAX_TOP_K + 1, MOE_ERR_RANGE, top_k);
    REFUSED(d.max_experts = -1, MOE_ERR_RANGE, max_experts);
    REFUSED(d.max_experts = 6, MOE_ERR_RANGE, max_experts);
    REFUSED(d.block = 8, MOE_ERR_OPTION, block);
    REFUSED(d.block = 48, MOE_ERR_OPTION, block);
    REFUSED(d.dtype = MOE_FP32, MOE_ERR_DTYPE, dtype);
    REFUSED(d.dtype = 9, MOE_ERR_DTYPE, dtype);
    REFUSED(d.dtype = MOE_FP16; d.grad_dtype = MOE_BF16, MOE_ERR_DTYPE, grad_dtype);
    REFUSED(d.grad_dtype = 9, MOE_ERR_DTYPE, grad_dtype);
    REFUSED(d.activation = -1, MOE_ERR_OPTION, activation);
    REFUSED(d.activation = MOE_ACTIVATION_RELU2 + 1, MOE_ERR_OPTION, activation);
    REFUSED(d.alpha = 1, MOE_ERR_CONFLICT, alpha);
    REFUSED(d.limit = 1, MOE_ERR_CONFLICT, limit);
    REFUSED(d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED; d.alpha = INFINITY, MOE_ERR_RANGE, alpha);
    REFUSED(d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED; d.limit = -1, MOE_ERR_RANGE, limit);
    REFUSED(d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED; d.limit = NAN, MOE_ERR_RANGE, limit);
    REFUSED(d.x_stride = 16, MOE_ERR_STRIDE, x_stride);
    REFUSED(d.y_stride = 16, MOE_ERR_STRIDE, y_stride);
    REFUSED(d.dy_stride = 16, MOE_ERR_STRIDE, dy_stride);
    REFUSED(d.dx_stride = 16, MOE_ERR_STRIDE, dx_stride);
    REFUSED(d.x_stride = 28, MOE_ERR_ALIGN, x_stride);
    REFUSED(d.y_stride = 28, MOE_ERR_ALIGN, y_stride);
    REFUSED(d.dy_stride = 28, MOE_ERR_ALIGN, dy_stride);
    REFUSED(d.dx_stride = 28, MOE_ERR_ALIGN, dx_stride);
    REFUSED(d.w1.row_stride = 16, MOE_ERR_STRIDE, w1);
    REFUSED(d.w2.row_stride = 16, MOE_ERR_STRIDE, w2);
    REFUSED(d.w1.row_stride = 28, MOE_ERR_ALIGN, w1);
    REFUSED(d.w2.expert_stride = 12, MOE_ERR_ALIGN, w2);
    REFUSED(d.w1.expert_stride = -8, MOE_ERR_STRIDE, w1);
    REFUSED(d.w1.major = MOE_MAJOR_MN, MOE_ERR_OPTION, w1);
    REFUSED(d.w2.major = 7, MOE_ERR_OPTION, w2);
    REFUSED(d.w1.up = d.x, MOE_ERR_CONFLICT, w1);
    REFUSED(d.w2.up = d.x, MOE_ERR_CONFLICT, w2);
    REFUSED(d.w1.table = (const void* const*)d.x, MOE_ERR_CONFLICT, w1);
    REFUSED(d.w2.table = (const void* const*)d.x, MOE_ERR_CONFLICT, w2);
    REFUSED(d.form = MOE_BLOCK_LAYER_DENSE; d.ids = 0, MOE_ERR_CONFLICT, top_k);
    REFUSED(d.form = MOE_BLOCK_LAYER_DENSE; d.top_k = 0, MOE_ERR_CONFLICT, ids);
    REFUSED_BOTH(d.choice.tile = 99, MOE_ERR_OPTION, choice);

    REFUSED_BOTH(d.x = 0, MOE_ERR_NULL, x);
    REFUSED_BOTH(d.ids = 0, MOE_ERR_NULL, ids);
    REFUSED_BOTH(d.weights = 0, MOE_ERR_NULL, weights);
    REFUSED_BOTH(d.w1.base = 0, MOE_ERR_NULL, w1);
    REFUSED_BOTH(d.w2.base = 0, MOE_ERR_NULL, w2);
    REFUSED_FORWARD(d.y = 0, MOE_ERR_NULL, y);
    REFUSED_BACKWARD(d.dy = 0, MOE_ERR_NULL, dy);
    REFUSED_BACKWARD(d.dy = 0; d.dx = 0, MOE_ERR_NULL, dy);
    REFUSED_BACKWARD(d.grad_expert = 0, MOE_ERR_NULL, grad_expert);
    REFUSED_BACKWARD(d.dw1 = d.dw2 = 0, MOE_ERR_CONFLICT, grad_expert);
    REFUSED_BOTH(d.saved = 0, MOE_ERR_NULL, saved);
    REFUSED_BOTH(d.workspace = 0, MOE_ERR_NULL, workspace);
    REFUSED_BOTH(d.saved = 0; d.saved_bytes = 0, MOE_ERR_NULL, saved);
    REFUSED_BOTH(d.workspace = 0; d.workspace_bytes = 0, MOE_ERR_NULL, workspace);
    REFUSED_BOTH(d.saved_bytes = bytes.saved - 1, MOE_ERR_WORKSPACE, saved_bytes);
    REFUSED_FORWARD(d.workspace_bytes = bytes.forward - 1, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED_BACKWARD(d.workspace_bytes = bytes.backward - 1, MOE_ERR_WORKSPACE, workspace_bytes);

    REFUSED_BOTH(d.x = AT(d.x, 8), MOE_ERR_ALIGN, x);
    REFUSED_BOTH(d.ids = (const int32_t*)AT(d.ids, 2), MOE_ERR_ALIGN, ids);
    REFUSED_BOTH(d.weights = (const float*)AT(d.weights, 2), MOE_ERR_ALIGN, weights);
    REFUSED_BOTH(d.w1.base = AT(d.w1.base, 8), MOE_ERR_ALIGN, w1);
    REFUSED_BOTH(d.w2.base = AT(d.w2.base, 8), MOE_ERR_ALIGN, w2);
    REFUSED_BOTH(d.w1.base = 0; d.w1.table = (const void* const*)AT(d.x, 4), MOE_ERR_ALIGN, w1);
    REFUSED_BOTH(d.w2.base = 0; d.w2.table = (const void* const*)AT(d.x, 4), MOE_ERR_ALIGN, w2);
    REFUSED_BACKWARD(d.dy = d.dx = AT(d.dx, 8), MOE_ERR_ALIGN, dy);
    REFUSED_BOTH(d.saved = AT(d.saved, 16), MOE_ERR_ALIGN, saved);
    REFUSED_BOTH(d.workspace = AT(d.workspace, 16), MOE_ERR_ALIGN, workspace);
    REFUSED_BOTH(d.rank = -1, MOE_ERR_RANGE, rank);
    REFUSED_BOTH(d.rank = MOE_FAULT_MAX_RANK + 1, MOE_ERR_RANGE, rank);
    REFUSED_BOTH(d.fault = (uint64_t*)AT(d.fault, 4), MOE_ERR_ALIGN, fault);
    REFUSED_FORWARD(d.y = AT(d.y, 8), MOE_ERR_ALIGN, y);
    REFUSED_BACKWARD(d.dy = AT(d.dy, 8), MOE_ERR_ALIGN, dy);
    REFUSED_BACKWARD(d.dx = AT(d.dx, 8), MOE_ERR_ALIGN, dx);
    REFUSED_BACKWARD(d.dw1 = AT(d.dw1, 8), MOE_ERR_ALIGN, dw1);
    REFUSED_BACKWARD(d.dw2 = AT(d.dw2, 8), MOE_ERR_ALIGN, dw2);
    REFUSED_BACKWARD(d.dweights = (float*)AT(d.dweights, 2), MOE_ERR_ALIGN, dweights);
    REFUSED_BACKWARD(d.grad_expert = (int32_t*)AT(d.grad_expert, 2), MOE_ERR_ALIGN, grad_expert);
    REFUSED_BACKWARD(d.act_grad = AT(d.act_grad, 8), MOE_ERR_ALIGN, act_grad);

    REFUSED_FORWARD(d.y = (void*)d.x, MOE_ERR_OVERLAP, y);
    REFUSED_FORWARD(d.y = (void*)d.w2.base, MOE_ERR_OVERLAP, y);
    REFUSED_FORWARD(d.w1.base = 0; d.w1.table = (const void* const*)d.y, MOE_ERR_OVERLAP, y);
    REFUSED_BACKWARD(d.w2.base = 0; d.w2.table = (const void* const*)d.dw2, MOE_ERR_OVERLAP, dw2);
    REFUSED_BOTH(d.saved = UP_TO(d.x, 256), MOE_ERR_OVERLAP, saved);
    REFUSED_BOTH(d.fault = (uint64_t*)UP_TO(d.ids, 8), MOE_ERR_OVERLAP, fault);
    REFUSED_BOTH(d.fault = (uint64_t*)UP_TO(d.weights, 8), MOE_ERR_OVERLAP, fault);
    REFUSED_BOTH(d.fault = (uint64_t*)d.workspace, MOE_ERR_OVERLAP, fault);
    REFUSED_BACKWARD(d.dx = (void*)d.x, MOE_ERR_OVERLAP, dx);
    REFUSED_BACKWARD(d.dx = (void*)d.dy; d.dx_stride = 32, MOE_ERR_OVERLAP, dx);
    REFUSED_BACKWARD(d.dw2 = d.dw1, MOE_ERR_OVERLAP, dw2);
    REFUSED_BACKWARD(d.dw1 = (void*)d.w1.base, MOE_ERR_OVERLAP, dw1);
    REFUSED_BACKWARD(d.dweights = (float*)d.weights, MOE_ERR_OVERLAP, dweights);
    REFUSED_BACKWARD(d.grad_expert = (int32_t*)d.ids, MOE_ERR_OVERLAP, grad_expert);
    REFUSED_BACKWARD(d.act_grad = d.dw2, MOE_ERR_OVERLAP, act_grad);
    REFUSED_BOTH(d.workspace = d.saved;
                 d.workspace_bytes = d.saved_bytes << 8, MOE_ERR_OVERLAP, workspace);
    REFUSED_BOTH(d.fault = (uint64_t*)d.saved, MOE_ERR_OVERLAP, fault);
    bufs_free(&b);
}

/* With rows further apart than they are long the last one lies behind T * H elements. What is
   written must stay out of that too, and out of the last expert's matrices. */
static void test_strided_overlap(void)
{
    trand r = trand_new(22);
    for (int form = DENSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 3, 24, 16, 3, 2);
        layer_bufs b;
        moe_block_layer_desc d, good;
        char *x, *y, *dy, *dx, *w1, *w2;
        c.pad = 32;
        bufs_new(&b, &c, &r);
        refused_bufs = &b;
        good = b.d;
        x = (char*)good.x + (c.T - 1) * x_stride(&c) * 2;
        y = (char*)good.y + (c.T - 1) * y_stride(&c) * 2;
        dy = (char*)good.dy + (c.T - 1) * dy_stride(&c) * 2;
        dx = (char*)good.dx + (c.T - 1) * dx_stride(&c) * 2;
        w1 = (char*)good.w1.base + b.w1.part[0][0].bytes - (c.pad + 8) * 2;
        w2 = (char*)good.w2.base + b.w2.part[0][0].bytes - (c.pad + 8) * 2;
        REFUSED_BOTH(d.fault = (uint64_t*)x, MOE_ERR_OVERLAP, fault);
        REFUSED_BOTH(d.fault = (uint64_t*)(x + 40), MOE_ERR_OVERLAP, fault);
        REFUSED_BOTH(d.fault = (uint64_t*)w1, MOE_ERR_OVERLAP, fault);
        REFUSED_BOTH(d.fault = (uint64_t*)w2, MOE_ERR_OVERLAP, fault);
        REFUSED_FORWARD(d.fault = (uint64_t*)y, MOE_ERR_OVERLAP, fault);
        REFUSED_FORWARD(d.fault = (uint64_t*)(y + 40), MOE_ERR_OVERLAP, fault);
        REFUSED_FORWARD(d.y = x + 32, MOE_ERR_OVERLAP, y);
        REFUSED_BACKWARD(d.fault = (uint64_t*)(dy + 40), MOE_ERR_OVERLAP, fault);
        REFUSED_BACKWARD(d.fault = (uint64_t*)(dx + 40), MOE_ERR_OVERLAP, fault);
        REFUSED_BACKWARD(d.dx = x + 32, MOE_ERR_OVERLAP, dx);
        REFUSED_BACKWARD(d.dx = dy + 32, MOE_ERR_OVERLAP, dx);
        REFUSED_BACKWARD(d.dw1 = x + 32, MOE_ERR_OVERLAP, dw1);
        REFUSED_BACKWARD(d.dw1 = dy + 32, MOE_ERR_OVERLAP, dw1);
        REFUSED_BACKWARD(d.dw1 = dx + 32, MOE_ERR_OVERLAP, dw1);
        REFUSED_BACKWARD(d.dw2 = x + 32, MOE_ERR_OVERLAP, dw2);
        REFUSED_BACKWARD(d.dw2 = dy + 32, MOE_ERR_OVERLAP, dw2);
        REFUSED_BACKWARD(d.dw2 = dx + 32, MOE_ERR_OVERLAP, dw2);
        REFUSED_BACKWARD(d.dweights = (float*)(x + 44), MOE_ERR_OVERLAP, dweights);
        REFUSED_BACKWARD(d.dweights = (float*)(dy + 44), MOE_ERR_OVERLAP, dweights);
        REFUSED_BACKWARD(d.dweights = (float*)(dx + 44), MOE_ERR_OVERLAP, dweights);
        REFUSED_BACKWARD(d.grad_expert = (int32_t*)(dy + 44), MOE_ERR_OVERLAP, grad_expert);
        REFUSED_BACKWARD(d.grad_expert = (int32_t*)(dx + 44), MOE_ERR_OVERLAP, grad_expert);
        REFUSED_BACKWARD(d.act_grad = dy + 32, MOE_ERR_OVERLAP, act_grad);
        REFUSED_BACKWARD(d.act_grad = dx + 32, MOE_ERR_OVERLAP, act_grad);
        CHECK_STATUS(both(&b), MOE_OK);
        bufs_free(&b);
    }
}

/* Who is active, in the memory that forward leaves: places past the last one and experts without a
   token are -1, written over whatever was there. */
static void test_active(void)
{
    trand r = trand_new(23);
    for (int i = 0; i < 3 * 4; ++i) {
        layer_case c = normal_case(DENSE + i % 3, 20, 16, 16, i < 6 ? 7 : 300, 3);
        layer_bufs b;
        moei_block_layer l;
        int32_t active[TWEIGHTS_MOST], slot[TWEIGHTS_MOST];
        int32_t got[TWEIGHTS_MOST];
        if (c.E > TWEIGHTS_MOST) c.E = TWEIGHTS_MOST;
        c.unused = 20 + 80 * (i / 3 % 2);
        bufs_new(&b, &c, &r);
        if (i / 3 % 2) { /* whatever was there: zeros are experts and places */
            char* zeros = (char*)test_host((int64_t)b.saved.bytes);
            memset(zeros, 0, b.saved.bytes);
            tbuf_put(&b.saved, zeros);
            free(zeros);
        }
        for (int e = 0; e < c.E; ++e) active[e] = slot[e] = -1;
        for (int k = 0; k < b.num_active; ++k) {
            active[k] = b.active[k];
            slot[b.active[k]] = k;
        }
        CHECK_STATUS(moe_block_layer_forward(&b.d, test_now.stream), MOE_OK);
        CHECK_STATUS(moei_block_layer_plan(&b.d, &l), MOE_OK);
        TEST_CUDA(cudaDeviceSynchronize());
        TEST_CUDA(cudaMemcpy(got, l.active.active, (size_t)c.E * 4, cudaMemcpyDeviceToHost));
        CHECK_INTS("active", got, active, c.E);
        TEST_CUDA(cudaMemcpy(got, l.active.active_index, (size_t)c.E * 4, cudaMemcpyDeviceToHost));
        CHECK_INTS("active_index", got, slot, c.E);
        TEST_CUDA(cudaMemcpy(got, l.active.count, 4, cudaMemcpyDeviceToHost));
        CHECK(got[0] == b.num_active, "%d are active, not %d", got[0], b.num_active);
        bufs_free(&b);
    }
}

/* ---- 64 bits ---- */

/* Rows of x, y, dy, dx and matrices of experts that lie past 2^32 elements: the bits of the same
   call on dense ones. Two far buffers at a time, 8 GiB each. */
static void test_block_layer_past_2_31(void)
{
    static const char* const name[2][2] = {{"x", "y"}, {"dy", "dx"}};
    trand r = trand_new(24);
    if (!twide_possible(2)) return;
    for (int i = 0; i < 3 * 3; ++i) {
        layer_case c = normal_case(DENSE + i / 3, 37, 24, 32, 5, 2);
        const int weights = i % 3 == 2;
        const int64_t m1 = up_rows(&c) * c.H, m2 = (int64_t)c.H * c.I;
        const tbuf* out[7];
        void* near[7];
        layer_bufs b;
        twide wide[2] = {};
        c.own_act_grad = 1;
        bufs_new(&b, &c, &r);
        out[0] = &b.y, out[1] = &b.dx, out[2] = &b.dw1, out[3] = &b.dw2, out[4] = &b.dweights;
        out[5] = &b.grad_expert;
        CHECK_STATUS(both(&b), MOE_OK);
        for (int j = 0; j < 6; ++j) near[j] = tbuf_copy(out[j]);
        reset(&b);
        if (twide_new(&wide[0], weights ? "w1" : name[i % 3][0], weights ? c.E : c.T,
                      weights ? m1 : c.H, c.dtype)) {
            if (twide_new(&wide[1], weights ? "w2" : name[i % 3][1], weights ? c.E : c.T,
                          weights ? m2 : c.H, c.dtype)) {
                const void* first = weights ? b.w1.host[0][0] : i % 3 ? b.h_dy : b.h_x;
                twide_put(&wide[0], first);
                if (weights) twide_put(&wide[1], b.w2.host[0][0]);
                if (i % 3 == 0) {
                    b.d.x = wide[0].p, b.d.x_stride = wide[0].stride;
                    b.d.y = wide[1].p, b.d.y_stride = wide[1].stride;
                } else if (i % 3 == 1) {
                    b.d.dy = wide[0].p, b.d.dy_stride = wide[0].stride;
                    b.d.dx = wide[1].p, b.d.dx_stride = wide[1].stride;
                } else {
                    b.d.w1.base = wide[0].p, b.d.w1.expert_stride = wide[0].stride;
                    b.d.w2.base = wide[1].p, b.d.w2.expert_stride = wide[1].stride;
                }
                CHECK_STATUS(both(&b), MOE_OK);
                for (int j = 0; j < 6; ++j)
                    if (weights || j != i % 3)
                        CHECK(tbuf_holds(out[j], near[j]), "other bits in %s, form %d, far %s",
                              out[j]->name, c.form, wide[0].name);
                CHECK(twide_holds(&wide[0], first), "an input was written");
                twide_holds(&wide[1], weights ? b.w2.host[0][0] : near[i % 3]);
                CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
                twide_free(&wide[1]);
            }
            twide_free(&wide[0]);
        }
        for (int j = 0; j < 6; ++j) free(near[j]);
        bufs_free(&b);
    }
}

/* Slots of dw1 and dw2 past 2^32 elements: 4096 experts, a token each, that share their matrices
   and repeat after 4 tokens; each slot is that of a layer of the first 4. Not far: fewer and
   smaller ones. weights [T, E] and [T, K] cannot get there: act has at least 16 times as many
   elements, in one list of blocks. */
static void run_gradients(int far)
{
    const int E = far ? 4096 : 12, H = far ? 1024 : 32, I = far ? 1040 : 48;
    const int64_t matrix = (int64_t)H * I, most = (int64_t)E * matrix * 2;
    trand r = trand_new(25);
    layer_case small = normal_case(SPARSE, 4, H, I, 4, 1);
    layer_bufs b;
    moe_block_layer_desc d;
    moe_block_layer_bytes bytes;
    char *x, *dy, *near[2], *got;
    int32_t* ids;
    float* weights;
    void** address[2];
    if (far && !test_has_memory(2 * (size_t)most + ((size_t)4 << 30))) return;
    small.activation = MOE_ACTIVATION_GELU;
    bufs_new(&b, &small, &r);
    for (int e = 0; e < 4; ++e) b.h_ids[e] = e;
    trand_fill_normal(&r, b.w1.host[0][0], matrix, small.dtype);
    trand_fill_normal(&r, b.w2.host[0][0], matrix, small.dtype);
    for (int e = 1; e < 4; ++e) { /* one expert's matrices for all */
        memcpy((char*)b.w1.host[0][0] + e * matrix * 2, b.w1.host[0][0], (size_t)matrix * 2);
        memcpy((char*)b.w2.host[0][0] + e * matrix * 2, b.w2.host[0][0], (size_t)matrix * 2);
    }
    tbuf_put(&b.w1.part[0][0], b.w1.host[0][0]);
    tbuf_put(&b.w2.part[0][0], b.w2.host[0][0]);
    tbuf_put(&b.ids, b.h_ids);
    b.d.max_experts = 0;
    CHECK_STATUS(both(&b), MOE_OK);
    near[0] = (char*)tbuf_copy(&b.dw1);
    near[1] = (char*)tbuf_copy(&b.dw2);

    x = (char*)test_host((int64_t)E * H * 2);
    dy = (char*)test_host((int64_t)E * H * 2);
    ids = (int32_t*)test_host((int64_t)E * 4);
    weights = (float*)test_host((int64_t)E * 4);
    for (int i = 0; i < 2; ++i) address[i] = (void**)test_host((int64_t)E * 8);
    for (int e = 0; e < E; ++e) {
        memcpy(x + (int64_t)e * H * 2, (char*)b.h_x + e % 4 * H * 2, (size_t)H * 2);
        memcpy(dy + (int64_t)e * H * 2, (char*)b.h_dy + e % 4 * H * 2, (size_t)H * 2);
        ids[e] = e;
        weights[e] = b.h_weights[e % 4];
        address[0][e] = b.w1.part[0][0].p;
        address[1][e] = b.w2.part[0][0].p;
    }
    {
        tbuf d_x = tbuf_from("x", x, (size_t)E * (size_t)H * 2, 0);
        tbuf d_dy = tbuf_from("dy", dy, (size_t)E * (size_t)H * 2, 0);
        tbuf d_y = tbuf_new("y", (size_t)E * (size_t)H * 2, 0);
        tbuf d_ids = tbuf_from("ids", ids, (size_t)E * 4, 0);
        tbuf d_weights = tbuf_from("weights", weights, (size_t)E * 4, 0);
        tbuf w1 = tbuf_from("w1 table", address[0], (size_t)E * 8, 0);
        tbuf w2 = tbuf_from("w2 table", address[1], (size_t)E * 8, 0);
        tbuf slots = tbuf_new("grad_expert", (size_t)E * 4, 0);
        tbuf dw[2], saved, workspace;
        d = b.d;
        d.num_tokens = d.num_experts = E;
        d.x = d_x.p, d.dy = d_dy.p, d.y = d_y.p, d.dx = 0, d.dweights = 0;
        d.ids = (const int32_t*)d_ids.p, d.weights = (const float*)d_weights.p;
        d.w1.base = d.w2.base = 0;
        d.w1.table = (const void* const*)w1.p, d.w2.table = (const void* const*)w2.p;
        d.grad_expert = (int32_t*)slots.p;
        CHECK_STATUS(moe_block_layer_sizes(&d, &bytes), MOE_OK);
        saved = tbuf_new("saved", bytes.saved, 0);
        workspace = tbuf_new("workspace",
                             bytes.forward > bytes.backward ? bytes.forward : bytes.backward, 0);
        d.saved = saved.p, d.saved_bytes = bytes.saved;
        d.workspace = workspace.p, d.workspace_bytes = workspace.bytes;
        for (int i = 0; i < 2; ++i) dw[i] = tbuf_new(i ? "dw2" : "dw1", (size_t)most, 0);
        d.dw1 = dw[0].p, d.dw2 = dw[1].p;
        CHECK(!far || (int64_t)(E - 1) * matrix > (int64_t)1 << 32, "not far");
        CHECK_STATUS(moe_block_layer_forward(&d, test_now.stream), MOE_OK);
        CHECK_STATUS(moe_block_layer_backward(&d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        got = (char*)test_host(matrix * 2);
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 12; ++j) { /* the first four, four in the middle, the last four */
                const int e = (j < 4 ? 0 : j < 8 ? E / 2 - 2 : E - 4) + j % 4;
                TEST_CUDA(cudaMemcpy(got, (char*)dw[i].p + (int64_t)e * matrix * 2,
                                     (size_t)matrix * 2, cudaMemcpyDeviceToHost));
                CHECK(memcmp(got, near[i] + e % 4 * matrix * 2, (size_t)matrix * 2) == 0,
                      "%s of slot %d", dw[i].name, e);
                CHECK(any_odd(got, matrix, small.dtype) == 0 && !all_zero(got, (size_t)matrix * 2),
                      "%s of slot %d shows nothing", dw[i].name, e);
            }
        free(got);
        for (int i = 0; i < 2; ++i) tbuf_free(&dw[i]);
        tbuf_free(&saved);
        tbuf_free(&workspace);
        tbuf_free(&slots);
        tbuf_free(&w1);
        tbuf_free(&w2);
        tbuf_free(&d_x);
        tbuf_free(&d_dy);
        tbuf_free(&d_y);
        tbuf_free(&d_ids);
        tbuf_free(&d_weights);
    }
    for (int i = 0; i < 2; ++i) {
        free(near[i]);
        free(address[i]);
    }
    free(x);
    free(dy);
    free(ids);
    free(weights);
    bufs_free(&b);
}

static void test_gradients_of_copies(void) { run_gradients(0); }

static void test_gradients_past_2_31(void)
{
    if (twide_possible(2)) run_gradients(1);
}

static void test_preload(void) { CHECK_STATUS(moe_block_layer_preload(), MOE_OK); }

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_reference_gradients);
    RUN(test_forms);
    RUN(test_blocks);
    RUN(test_activations);
    RUN(test_curves);
    RUN(test_clamp_edges);
    RUN(test_gelu_slope);
    RUN(test_large);
    RUN(test_ids);
    RUN(test_max_experts);
    RUN(test_no_room);
    RUN(test_batch_of_many);
    RUN(test_bad_table);
    RUN(test_lacking_one);
    RUN(test_lacking);
    RUN(test_batch_of_all_is_dense);
    RUN(test_forms_agree);
    RUN(test_same_bits_again);
    RUN(test_wanted);
    RUN(test_graph);
    RUN(test_stop_faults);
    RUN(test_no_tokens);
    RUN(test_sizes);
    RUN(test_refusals);
    RUN(test_strided_overlap);
    RUN(test_active);
    RUN(test_block_layer_past_2_31);
    RUN(test_gradients_of_copies);
    RUN(test_gradients_past_2_31);
    RUN(test_preload);
    return test_end();
}
