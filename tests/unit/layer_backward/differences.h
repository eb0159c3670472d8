/* differences.h: gradients of the whole layer, from inputs alone, against finite differences.

     test_backward_differences  the references of the stations, one after another without rounding,
                                against differences of the reference of the whole layer: of x, router,
                                w1, w2, biases, those of the shared expert, and its weights
     test_backward_whole        the device's gradients against the same references, from inputs to
                                results */
#ifndef MOE_TESTS_LAYER_BACKWARD_DIFFERENCES_H
#define MOE_TESTS_LAYER_BACKWARD_DIFFERENCES_H

#include "tests/unit/layer_backward/case.h"

/* The inputs that have gradients. */
enum { X, ROUTER, W1, W2, BIAS1, BIAS2, S_W1, S_W2, S_BIAS1, S_BIAS2, S_WEIGHT, INPUTS };

typedef struct whole {
    float* in[INPUTS];
    double* grad[INPUTS];
    int64_t size[INPUTS];
    float* dy;
    moe_ref_layer_desc d;
    moe_gate_desc gate;
} whole;

/* Copies numbers of a dtype to fp32. */
static float* whole_copy(const void* from, int dtype, int64_t n)
{
    float* to = (float*)test_host(n * 4);
    for (int64_t i = 0; i < n; ++i) to[i] = moe_load(from, i, dtype);
    return to;
}

/* Takes the inputs of a case with dense, k-major, concatenated weights. */
static void whole_new(whole* w, const grads_bufs* b, const grads_case* c)
{
    const layer_case* f = &c->f;
    const int64_t T = f->T, H = f->H, I = f->I, E = f->E, Is = f->shared;
    const int64_t W = up_rows(f->activation, f->I), Ws = up_rows(f->shared_activation, f->shared);
    const void* from[INPUTS] = {b->f.h_x,
                                b->f.h_router,
                                b->f.mlp.w1.host[0][0],
                                b->f.mlp.w2.host[0][0],
                                b->f.mlp.h_bias1,
                                b->f.mlp.h_bias2,
                                b->f.shared.w1.host[0][0],
                                b->f.shared.w2.host[0][0],
                                b->f.shared.h_bias1,
                                b->f.shared.h_bias2,
                                b->f.h_shared_weight};
    const int64_t size[INPUTS] = {T * H,  E * H,  E * W * H, E * H * I, E * W, E * H,
                                  Ws * H, H * Is, Ws,        H,         T};
    moe_ref_layer_desc* d = &w->d;
    memset(w, 0, sizeof *w);
    for (int i = 0; i < INPUTS; ++i) {
        w->size[i] = size[i];
        w->in[i] = whole_copy(from[i], i == S_WEIGHT ? MOE_FP32 : f->dtype, size[i]);
        w->grad[i] = (double*)calloc((size_t)size[i] + 1, 8);
    }
    w->dy = whole_copy(b->h_dy, f->dtype, T * H);
    d->x = w->in[X], d->router = w->in[ROUTER];
    d->w1.base = w->in[W1], d->w2.base = w->in[W2];
    d->bias1 = w->in[BIAS1], d->bias2 = w->in[BIAS2];
    d->x_dtype = d->w_dtype = d->router_dtype = d->bias_dtype = MOE_FP32;
    d->num_tokens = f->T, d->num_experts = f->E, d->top_k = f->K, d->hidden = f->H;
    d->intermediate = f->I, d->activation = f->activation, d->alpha = f->alpha, d->limit = f->limit;
    d->score = f->score, d->renormalize = f->renormalize, d->scale = f->scale;
    d->shared.w1.base = w->in[S_W1], d->shared.w2.base = w->in[S_W2];
    d->shared.bias1 = w->in[S_BIAS1], d->shared.bias2 = w->in[S_BIAS2];
    d->shared.weight = w->in[S_WEIGHT], d->shared.intermediate = f->shared;
    d->shared.activation = f->shared_activation;
    w->gate.num_tokens = f->T, w->gate.num_experts = f->E, w->gate.top_k = f->K;
    w->gate.score = f->score, w->gate.renormalize = f->renormalize, w->gate.scale = f->scale;
}

static void whole_free(whole* w)
{
    for (int i = 0; i < INPUTS; ++i) TFREE(w->in[i], w->grad[i]);
    free(w->dy);
}

/* Returns the loss <dy, y>; writes ids and weights [T, K], where they are not null. */
static double whole_loss(const whole* w, int32_t* ids, double* weights)
{
    const int64_t n = w->size[X];
    double *y = (double*)test_host(n * 8), loss = 0;
    CHECK(moe_ref_layer_f64(&w->d, y, ids, weights) == 0, "memory");
    for (int64_t i = 0; i < n; ++i) loss += y[i] * w->dy[i];
    free(y);
    return loss;
}

/* Computes the pre-activations of one MLP without rounding. */
static double* whole_pre(const whole* w, const int32_t* row_slot, const int32_t* offset, int shared)
{
    const moe_ref_layer_desc* d = &w->d;
    const int64_t n = shared ? w->size[S_BIAS1] : w->size[BIAS1] / d->num_experts;
    const int experts = shared ? 1 : d->num_experts;
    double* pre = (double*)test_host(offset[experts] * n * 8);
    moe_ref_gemm_desc g = {};
    g.a = d->x, g.a_dtype = MOE_FP32, g.row_index = row_slot, g.row_div = row_slot ? d->top_k : 1;
    g.b.base = w->in[shared ? S_W1 : W1], g.b_dtype = MOE_FP32;
    g.bias = w->in[shared ? S_BIAS1 : BIAS1], g.bias_dtype = MOE_FP32;
    g.expert_offset = offset, g.num_experts = experts, g.n = (int)n, g.k = d->hidden;
    moe_ref_gemm_f64(&g, pre, 0);
    return pre;
}

/* Runs the backward reference of one MLP; returns its rows. */
static double* whole_mlp(whole* w, const double* weights, const double* pre,
                         const int32_t* row_slot, const int32_t* offset, int shared,
                         double* dweights)
{
    const moe_ref_layer_desc* f = &w->d;
    double* rows =
        (double*)calloc((size_t)(offset[shared ? 1 : f->num_experts] * f->hidden) + 1, 8);
    moe_ref_experts_backward_desc d = {};
    moe_ref_experts_grads_f64 g = {};
    d.x = f->x, d.dy = w->dy, d.pre = pre, d.weights = weights;
    d.weights_dtype = d.pre_dtype = MOE_REF_REAL;
    d.row_slot = row_slot, d.expert_offset = offset;
    d.w1.base = w->in[shared ? S_W1 : W1], d.w2.base = w->in[shared ? S_W2 : W2];
    d.bias2 = w->in[shared ? S_BIAS2 : BIAS2];
    d.x_dtype = d.w_dtype = MOE_FP32;
    d.activation = shared ? f->shared.activation : f->activation;
    if (!shared) d.alpha = f->alpha, d.limit = f->limit;
    d.num_tokens = f->num_tokens, d.top_k = f->top_k, d.hidden = f->hidden;
    d.num_experts = shared ? 1 : f->num_experts;
    d.intermediate = shared ? f->shared.intermediate : f->intermediate;
    g.rows = rows, g.dweights = dweights;
    g.dw1 = w->grad[shared ? S_W1 : W1], g.dw2 = w->grad[shared ? S_W2 : W2];
    g.dbias1 = w->grad[shared ? S_BIAS1 : BIAS1], g.dbias2 = w->grad[shared ? S_BIAS2 : BIAS2];
    CHECK(moe_ref_experts_backward_f64(&d, &g) == 0, "memory");
    return rows;
}

/* Fills in all gradients from the references of the stations. */
static void whole_grads(whole* w)
{
    const moe_ref_layer_desc* d = &w->d;
    const int64_t T = d->num_tokens, H = d->hidden, E = d->num_experts, K = d->top_k;
    const int32_t all[2] = {0, d->num_tokens};
    int32_t *ids = (int32_t*)test_host(T * K * 4), *row_slot = (int32_t*)test_host(T * K * 4);
    int32_t* offset = (int32_t*)test_host(E * 4 + 4);
    double *weights = (double*)test_host(T * K * 8), *dweights = (double*)test_host(T * K * 8);
    double *logits = (double*)test_host(T * E * 8), *dlogits = (double*)test_host(T * E * 8);
    double *shared_weight = (double*)test_host(T * 8), *pre, *rows, *shared;
    float* given = (float*)test_host(T * E * 4);
    moe_ref_router_desc router = {};
    moe_ref_router_backward_desc back = {};
    whole_loss(w, ids, weights);
    tmlp_route(ids, d->num_tokens, d->num_experts, d->top_k, offset, row_slot, 0);
    pre = whole_pre(w, row_slot, offset, 0);
    rows = whole_mlp(w, weights, pre, row_slot, offset, 0, dweights);
    free(pre);
    pre = whole_pre(w, 0, all, 1);
    for (int64_t t = 0; t < T; ++t) shared_weight[t] = w->in[S_WEIGHT][t];
    shared = whole_mlp(w, shared_weight, pre, 0, all, 1, w->grad[S_WEIGHT]);
    router.x = d->x, router.w = d->router, router.x_dtype = router.w_dtype = MOE_FP32;
    router.num_tokens = d->num_tokens, router.num_experts = d->num_experts,
    router.hidden = d->hidden;
    moe_ref_router_f64(&router, logits);
    for (int64_t i = 0; i < T * E; ++i) given[i] = (float)logits[i];
    w->gate.logits = given, w->gate.logits_dtype = MOE_FP32;
    moe_ref_gate_backward_f64(&w->gate, ids, dweights, 0, dlogits);
    back.forward = router, back.dlogits = dlogits, back.dlogits_dtype = MOE_REF_REAL;
    moe_ref_router_backward_f64(&back, w->grad[X], w->grad[ROUTER], 0, 0);
    for (int64_t m = 0; m < offset[E]; ++m)
        for (int64_t h = 0; h < H; ++h) w->grad[X][row_slot[m] / K * H + h] += rows[m * H + h];
    for (int64_t i = 0; i < T * H; ++i) w->grad[X][i] += shared[i];
    TFREE(ids, row_slot, offset, weights, dweights, logits, dlogits, shared_weight, pre, rows,
          shared, given);
}

static grads_case whole_case(int score, int renormalize, int activation, trand* r)
{
    grads_case c = grads_of(normal_case(7, 16, 8, 5, 2));
    c.f.score = score, c.f.renormalize = renormalize, c.f.activation = activation;
    c.f.scale = trand_int(r, 0, 1) ? 1.75f : 0;
    c.f.bias = 1, c.f.shared = 16, c.f.shared_bias = c.f.shared_weighted = 1;
    return c;
}

static void test_backward_differences(void)
{
    static const char* const name[INPUTS] = {
        "x",         "router",    "w1",           "w2",           "bias1",        "bias2",
        "shared.w1", "shared.w2", "shared.bias1", "shared.bias2", "shared.weight"};
    trand r = trand_new(41);
    for (int i = 0; i <= MOE_ACTIVATION_RELU2; ++i) { /* every activation */
        static const int scores[] = {MOE_SCORE_SOFTMAX, MOE_SCORE_TOPK_SOFTMAX, MOE_SCORE_SIGMOID};
        const grads_case c = whole_case(scores[i % 3], i % 2, i, &r);
        const double step = ldexp(1, -10);
        grads_bufs b;
        whole w;
        bufs_begin(&b, &c, &r);
        whole_new(&w, &b, &c);
        whole_grads(&w);
        for (int in = 0; in < INPUTS; ++in) {
            const int64_t slots = (int64_t)w.d.num_tokens * w.d.top_k;
            int32_t* ids[2] = {(int32_t*)test_host(slots * 4), (int32_t*)test_host(slots * 4)};
            int compared = 0, jumps = 0;
            double largest = 0;
            for (int64_t k = 0; k < w.size[in]; k += 1 + w.size[in] / 24) {
                const float was = w.in[in][k];
                double difference = 0, at[2];
                for (int side = 0; side < 2; ++side) {
                    w.in[in][k] = (float)(was + (side ? step : -step));
                    at[side] = w.in[in][k];
                    difference += (side ? 1 : -1) * whole_loss(&w, ids[side], 0);
                }
                w.in[in][k] = was;
                difference /= at[1] - at[0];
                if (fabs(w.grad[in][k]) > largest) largest = fabs(w.grad[in][k]);
                if (memcmp(ids[0], ids[1], (size_t)slots * 4) != 0) {
                    ++jumps; /* of the loss: the step changes a choice, where no gradient is */
                    continue;
                }
                ++compared;
                CHECK(fabs(difference - w.grad[in][k]) < 2e-4 * (1 + fabs(difference)),
                      "%s[%lld]: %g, by differences %g", name[in], (long long)k, w.grad[in][k],
                      difference);
            }
            CHECK(largest > 1e-3, "%s: gradients of about zero show nothing", name[in]);
            CHECK(jumps <= compared, "%s: %d of %d steps change a choice", name[in], jumps,
                  jumps + compared);
            TFREE(ids[0], ids[1]);
        }
        whole_free(&w);
        bufs_end(&b);
    }
}

/* Requires that all numbers of a gradient together are within `most` of the exact ones' norm. A
   rounding to bf16 moves a number by up to 0.4 %; sums of few numbers that cancel move further. */
static void check_norm(const char* what, const tbuf* buf, int dtype, const double* exact, int64_t n,
                       double most)
{
    void* p = tbuf_copy(buf);
    double off = 0, size = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double v = moe_load(p, i, dtype) - exact[i];
        off += v * v, size += exact[i] * exact[i];
    }
    CHECK(size > 0 && off < most * most * size, "%s: off by %g of its norm", what,
          sqrt(off / size));
    free(p);
}

static void test_backward_whole(void)
{
    trand r = trand_new(42);
    for (int i = 0; i < 6; ++i) {
        grads_case c = whole_case(i % 2 ? MOE_SCORE_SIGMOID : MOE_SCORE_SOFTMAX, i / 2 % 2, 0, &r);
        grads_bufs b;
        whole w;
        c.router_grad_dtype = MOE_FP32, c.gather = 1 + i % 2, c.recompute = i / 3;
        bufs_begin(&b, &c, &r);
        whole_new(&w, &b, &c);
        whole_grads(&w);
        if (run_both(&b, &c)) {
            check_norm("dx", &b.dx, c.f.dtype, w.grad[X], w.size[X], 0.01);
            check_norm("drouter", &b.drouter, MOE_FP32, w.grad[ROUTER], w.size[ROUTER], 0.02);
            check_norm("dw1", &b.dw1, MOE_FP32, w.grad[W1], w.size[W1], 0.01);
            check_norm("dw2", &b.dw2, MOE_FP32, w.grad[W2], w.size[W2], 0.01);
            check_norm("dbias1", &b.dbias1, MOE_FP32, w.grad[BIAS1], w.size[BIAS1], 0.01);
            check_norm("dbias2", &b.dbias2, MOE_FP32, w.grad[BIAS2], w.size[BIAS2], 1e-5);
            check_norm("shared.dw1", &b.s_dw1, MOE_FP32, w.grad[S_W1], w.size[S_W1], 0.01);
            check_norm("shared.dw2", &b.s_dw2, MOE_FP32, w.grad[S_W2], w.size[S_W2], 0.01);
            check_norm("shared.dweight", &b.s_dweight, MOE_FP32, w.grad[S_WEIGHT], w.size[S_WEIGHT],
                       0.02);
        }
        whole_free(&w);
        bufs_end(&b);
    }
}

static void layer_backward_differences(void)
{
    RUN(test_backward_differences);
    RUN(test_backward_whole);
}

#endif
