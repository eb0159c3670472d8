/* activations.h: activations, by themselves and in the epilogue of the grouped GEMM.

     test_gemm_activations_alone  gives each activation numbers of every size, infinities and NaN.
                                  Bound: some ulp of the result and an ulp of the exponent, where
                                  sigma and Phi are not subnormal
     test_gemm_activations        runs every activation in every layout of gate and up, with biases
                                  and without, in both dtypes of C */
#ifndef MOE_TESTS_GEMM_ACTIVATIONS_H
#define MOE_TESTS_GEMM_ACTIVATIONS_H

#include "moe/ref/experts.h"
#include "tests/unit/gemm/run.h"

typedef struct activation_args {
    const float *v, *up; /* [n] */
    float* out;          /* [n] */
    int32_t n;           /* multiple of 8 */
    moe_grouped_gemm_args d;
} activation_args;

MOE_KERNEL(64, 1) activation_kernel(MOE_ARG(activation_args) a)
{
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x) * 8; i < a.n;
         i += (int)(gridDim.x * blockDim.x) * 8) {
        float v[8], up[8];
        MOE_UNROLL
        for (int x = 0; x < 8; ++x) {
            v[x] = a.v[i + x];
            up[x] = a.up[i + x];
        }
        {
            const moei_activation act =
                moei_activation_of(a.d.c.activation, a.d.c.alpha, a.d.c.limit);
            moei_activate(v, up, 8, &act, a.d.c.gated != 0);
        }
        MOE_UNROLL
        for (int x = 0; x < 8; ++x) a.out[i + x] = v[x];
    }
}

static void test_gemm_activations_alone(void)
{
    enum { N = 4096 };
    static const float special[] = {
        0,      -0.0f,   INFINITY, -INFINITY, 3e38f, -3e38f, 1e30f, -1e30f, 1e19f, -1e19f, 2e19f,
        -2e19f, 1e4f,    -1e4f,    127,       -127,  88,     -88,   15,     -15,   14.9f,  -14.9f,
        1e-30f, -1e-30f, 1e-40f,   -1e-40f,   NAN,   7,      -7,    6.9f,   -6.9f, 12.8f};
    trand r = trand_new(20);
    float v[N], up[N], got[N];
    for (int i = 0; i < N; ++i) {
        const float size = (float)exp2((double)trand_int(&r, -20, 6));
        v[i] = i < 32 ? special[i] : trand_normal(&r) * (i & 1 ? 4 : size);
        up[i] = i < 32 ? 1 : trand_normal(&r) * (i & 1 ? 4 : size);
    }
    for (int kind = MOE_ACTIVATION_GEGLU; kind <= MOE_ACTIVATION_RELU2; ++kind)
        for (int option = 0; option < (kind == MOE_ACTIVATION_SWIGLU_CLAMPED ? 3 : 1); ++option) {
            tbuf bv = tbuf_from("v", v, sizeof v, 0), bu = tbuf_from("up", up, sizeof up, 0);
            tbuf bo = tbuf_new("out", sizeof got, 0);
            moe_launch_config c = moe_grid(3, 64, 0, test_now.stream);
            moe_grouped_gemm_desc d = {};
            activation_args a = {};
            double worst = 0;
            a.v = (const float*)bv.p, a.up = (const float*)bu.p, a.out = (float*)bo.p, a.n = N;
            d.num_experts = 1, d.n = d.k = 8;
            d.dtype = MOE_FP16, d.activation = kind;
            if (option == 1) d.alpha = 1.0f, d.limit = 3.0f;
            if (option == 2) d.alpha = -0.01f, d.limit = 1e30f;
            CHECK_STATUS(moe_gemm_tile_resolve(&d, &a.d), MOE_OK);
            CHECK_STATUS(MOE_LAUNCH(activation_kernel, c, a), MOE_OK);
            tbuf_get(&bo, got);
            for (int i = 0; i < N; ++i) {
                const double alpha = fabs(a.d.c.alpha), at = fmin(fabs(v[i]), 1000);
                const double ulps = 16 + alpha * at + (at < 15 ? 2 * at * at : 450);
                double want = moe_ref_activation_f64(kind, v[i], up[i], a.d.c.alpha, a.d.c.limit);
                if (v[i] == -INFINITY) want = option == 2 ? v[i] : 0; /* alpha < 0: no bound */
                if (v[i] != v[i]) {
                    CHECK(got[i] != got[i], "activation %d: NaN becomes %g", kind, (double)got[i]);
                    continue;
                }
                if (fabs(want) >= 3.4e38) { /* of the result, or of a number in between */
                    CHECK(got[i] == (want > 0 ? INFINITY : -INFINITY) ||
                              fabs(got[i] - want) <= 1e-4 * fabs(want),
                          "activation %d of %g is %g", kind, (double)v[i], (double)got[i]);
                    continue;
                }
                {
                    const double error = fabs(got[i] - want);
                    const double bound =
                        ldexp(ulps, -23) * fabs(want) + ldexp(at * (fabs(up[i]) + 1) + 1, -126);
                    if (!(error <= bound))
                        CHECK(0, "activation %d (%d) of %.9g, %.9g: %.9g, not %.9g", kind, option,
                              (double)v[i], (double)up[i], (double)got[i], want);
                    if (error / bound > worst) worst = error / bound;
                }
            }
            if (test_now.verbose) printf("  activation %d: %.2f of the bound\n", kind, worst);
            tbufs_free(TBUFS(&bv, &bu, &bo));
        }
}

static void test_gemm_activations(void)
{
    static const int rows[] = {33, 0, 40};
    trand r = trand_new(21);
    for (int kind = MOE_ACTIVATION_NONE; kind <= MOE_ACTIVATION_RELU2; ++kind)
        for (int gate_up = MOE_GATE_UP_CONCATENATED; gate_up <= MOE_GATE_UP_SEPARATE; ++gate_up)
            for (int i = 0; i < 6; ++i) {
                gemm_case c = normal_case(3, rows, 72, 40);
                if (!moe_activation_is_gated(kind) && gate_up != MOE_GATE_UP_CONCATENATED) continue;
                c.activation = kind;
                c.gate_up = gate_up;
                c.bias = i & 1;
                c.c_dtype = i & 2 ? MOE_FP32 : c.dtype;
                c.b_major = trand_int(&r, 0, 1) ? MOE_MAJOR_MN : MOE_MAJOR_K;
                c.tile = (int)trand_int(&r, MOE_TILE_128x128, MOE_TILE_64x64);
                if (i >= 4) { /* k-major: on Hopper the wgmma path */
                    c.tile = MOE_TILE_128x256;
                    c.b_major = MOE_MAJOR_K;
                }
                if (kind == MOE_ACTIVATION_SWIGLU_CLAMPED && i) {
                    c.alpha = i % 4 == 1 ? 0.5f : i == 2 ? 0 : -2.0f;
                    c.limit = i % 4 == 1 ? 0 : 0.5f; /* less than some gates and ups */
                }
                run_case(&c, &r);
            }
}

static void gemm_activations(void)
{
    RUN(test_gemm_activations_alone);
    RUN(test_gemm_activations);
}

#endif
