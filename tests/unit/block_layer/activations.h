/* activations.h: the block layer's activations and their gradients.

     test_activations  every activation in a layer, against the reference
     test_curves       every activation and its slopes over all sizes of numbers, each by itself
     test_clamp_edges  the clamped SwiGLU at its limit, and an ulp of fp16 to either side
     test_gelu_slope   GELU's slope in fp32: near 0 a series, further off a quotient */
#ifndef MOE_TESTS_BLOCK_LAYER_ACTIVATIONS_H
#define MOE_TESTS_BLOCK_LAYER_ACTIVATIONS_H

#include "tests/unit/block_layer/compare.h"

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

/* ------------------------------------------------------------------ through the identity */

/* A dense layer of one expert in fp16. With w1 and w2 the identity each token's numbers are pre,
   and act is y. */
static layer_case identity_case(int activation, float limit)
{
    layer_case c = normal_case(DENSE, 64, 32, 16, 1, 0);
    c.activation = activation;
    c.limit = limit;
    c.dtype = c.grad_dtype = MOE_FP16;
    return c;
}

/* Sets w1 and w2 to the identity, weights to 1. */
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

/* Calls forward and backward with the host's x and dy. Copies y and dx, which the caller frees. */
static int run_identity(layer_bufs* b, uint16_t** y, uint16_t** dx)
{
    tbuf_put(&b->x, b->h_x);
    reset(b);
    if (!CHECK_STATUS(both(b), MOE_OK)) return 0;
    *y = (uint16_t*)tbuf_copy(&b->y);
    *dx = (uint16_t*)tbuf_copy(&b->dx);
    return 1;
}

/* Element i of token t: its gate, its up, and y, dx by gate, dx by up as they are and must be. */
typedef struct curve {
    double gate, up, got[3], want[3];
} curve;

static curve curve_at(const layer_bufs* b, const layer_case* c, const uint16_t* y,
                      const uint16_t* dx, int64_t t, int i)
{
    const int has_up = moe_activation_is_gated(c->activation);
    const int64_t at = t * c->H + i, up = at + c->I;
    const double dy = moe_load(b->h_dy, at, c->dtype);
    curve v;
    v.gate = moe_load(b->h_x, at, c->dtype);
    v.up = has_up ? moe_load(b->h_x, up, c->dtype) : 0;
    v.got[0] = moe_load(y, at, c->dtype);
    v.got[1] = moe_load(dx, at, c->dtype);
    v.got[2] = has_up ? moe_load(dx, up, c->dtype) : 0;
    v.want[0] = moe_ref_activation_f64(c->activation, v.gate, v.up, 0, c->limit);
    moe_ref_activation_grad_f64(c->activation, v.gate, v.up, 0, c->limit, &v.want[1], &v.want[2]);
    v.want[1] *= dy;
    v.want[2] *= dy;
    return v;
}

static int curve_close(const curve* v, int j)
{
    return fabs(v->got[j] - v->want[j]) <= fabs(v->want[j]) / 900 + 2e-6;
}

static void test_curves(void)
{
    static const float edge[] = {0,   -0.0f, 1e-6f, -1e-6f, 30,   -30,
                                 200, -200,  3e4f,  -3e4f,  6e4f, -6e4f};
    trand r = trand_new(5);
    for (int a = MOE_ACTIVATION_NONE; a <= MOE_ACTIVATION_RELU2; ++a) {
        const layer_case c = identity_case(a, 0);
        layer_bufs b;
        uint16_t *y, *dx;
        int64_t bad = 0, checked = 0;
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
        if (run_identity(&b, &y, &dx)) {
            for (int e = 0; e < c.T * c.I; ++e) {
                const curve v = curve_at(&b, &c, y, dx, e / c.I, e % c.I);
                for (int j = 0; j < 3; ++j) {
                    if (fabs(v.want[j]) > 65000) continue; /* infinite in fp16, or nearly */
                    ++checked;
                    if (!curve_close(&v, j) && bad++ < 3)
                        CHECK(0, "activation %d of %g, %g: number %d is %g, not %g", a, v.gate,
                              v.up, j, v.got[j], v.want[j]);
                }
            }
            CHECK(bad == 0 && checked > 2000, "activation %d: %lld of %lld", a, (long long)bad,
                  (long long)checked);
            free(y), free(dx);
        }
        bufs_free(&b);
    }
}

/* At the limit itself the gradient passes; beyond it, it is 0. */
static void test_clamp_edges(void)
{
    static const float limits[] = {0, 0.75f}; /* 0: 7 */
    trand r = trand_new(26);
    for (int l = 0; l < 2; ++l) {
        const float limit = l ? limits[l] : 7, ulp = l ? 1.0f / 2048 : 1.0f / 256;
        const float edge[] = {limit,       limit - ulp,  limit + ulp, -limit,
                              ulp - limit, -limit - ulp, 0.5f,        -0.25f};
        const layer_case c = identity_case(MOE_ACTIVATION_SWIGLU_CLAMPED, limits[l]);
        layer_bufs b;
        uint16_t *y, *dx;
        int64_t passed[2] = {0, 0}, zero[2] = {0, 0};
        bufs_new(&b, &c, &r);
        make_identity(&b, &c);
        for (int i = 0; i < c.T * c.I; ++i) { /* all pairs */
            const int64_t at = i / c.I * c.H + i % c.I;
            moe_store(b.h_x, at, c.dtype, edge[i % 8]);
            moe_store(b.h_x, at + c.I, c.dtype, edge[i / 8 % 8]);
            moe_store(b.h_dy, at, c.dtype, 1 + (float)(i % 3));
        }
        if (run_identity(&b, &y, &dx)) {
            for (int i = 0; i < c.T * c.I; ++i) {
                const float gate = edge[i % 8], up = edge[i / 8 % 8];
                const curve v = curve_at(&b, &c, y, dx, i / c.I, i % c.I);
                for (int j = 0; j < 3; ++j)
                    CHECK(curve_close(&v, j), "limit %g, gate %g, up %g: number %d is %g, not %g",
                          (double)limit, v.gate, v.up, j, v.got[j], v.want[j]);
                passed[0] += gate == limit && v.got[1] != 0;
                passed[1] += fabsf(up) == limit && v.got[2] != 0;
                zero[0] += gate > limit && v.got[1] == 0;
                zero[1] += fabsf(up) > limit && v.got[2] == 0;
            }
            CHECK(passed[0] >= 64 && passed[1] >= 128 && zero[0] == 128 && zero[1] == 256,
                  "gates %lld pass, %lld not; ups %lld, %lld", (long long)passed[0],
                  (long long)zero[0], (long long)passed[1], (long long)zero[1]);
            free(y), free(dx);
        }
        bufs_free(&b);
    }
}

/* ------------------------------------------------------------------ alone */

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

/* Tries numbers of both sides of 0.125, where series and quotient meet. */
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

static void block_layer_activations(void)
{
    RUN(test_activations);
    RUN(test_curves);
    RUN(test_clamp_edges);
    RUN(test_gelu_slope);
}

#endif
