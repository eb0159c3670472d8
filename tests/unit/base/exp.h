/* exp.h: base/numeric.cuh, activation.cuh: exp, silu, NaN

   test_exp  exp and silu within their bounds; silu of four numbers by one reciprocal, or refused */
#ifndef MOE_TESTS_BASE_EXP_H
#define MOE_TESTS_BASE_EXP_H

#include "tests/test.h"

#include "moe/activation.cuh"
#include "moe/base/numeric.cuh"

typedef struct exp_args {
    const float* x; /* [n] */
    float* exp;     /* [n] */
    float* silu;    /* [n] */
    float* four;    /* [n] silu by moei_silu_4 with three others (with_other) */
    int32_t* far;   /* [n] what it returned */
    int32_t* nan;   /* [n] */
    int32_t n;
} exp_args;

/* Returns the number of the jth of four numbers that are one group, the 0th of them i itself. */
MOE_HOST_DEVICE int with_other(int i, int j, int n) { return (int)(((int64_t)i + 1009 * j) % n); }

MOE_KERNEL(256, 1) exp_kernel(MOE_ARG(exp_args) d)
{
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < d.n;
         i += (int)(gridDim.x * blockDim.x)) {
        d.exp[i] = moe_exp(d.x[i]);
        d.silu[i] = moei_sigmoid_unit(d.x[i], -1.44269504f);
        d.nan[i] = moei_is_nan(d.x[i]);
        {
            float v[4], s[4];
            for (int j = 0; j < 4; ++j) v[(i + j) & 3] = d.x[with_other(i, j, d.n)];
            d.far[i] = moei_silu_4(s, v);
            d.four[i] = s[i & 3];
        }
    }
}

/* Distance of the floats around `v`. */
static double ulp_of(double v)
{
    int e;
    frexp(v, &e);
    return ldexp(1, e - 24 < -149 ? -149 : e - 24);
}

static void test_exp(void)
{
    const int n = MOE_ON_HOST ? 200000 : 4000000;
    float *x = (float*)test_host((int64_t)n * 4), *e, *s;
    int32_t* nan;
    double worst = 0, worst_at = 0, worst_silu = 0, worst_silu_at = 0;
    moe_launch_config c = moe_grid(MOE_ON_HOST ? 4 : 256, 256, 0, test_now.stream);
    exp_args a;
    tbuf bx, be = tbuf_new("exp", (size_t)n * 4, 0), bs = tbuf_new("silu", (size_t)n * 4, 0);
    tbuf bn = tbuf_new("nan", (size_t)n * 4, 0), b4 = tbuf_new("four", (size_t)n * 4, 0);
    tbuf bf = tbuf_new("far", (size_t)n * 4, 0);
    float* four;
    int32_t* far;
    int fars = 0;
    trand r = trand_new(5);
    static const float special[] = {0.0f,    -0.0f,     INFINITY, -INFINITY, NAN,    1.0f,
                                    -1.0f,   88.72283f, 88.8f,    1e30f,     -1e30f, -87.33f,
                                    -104.5f, -200.0f,   1e-40f,   -1e-40f};
    for (int i = 0; i < n; ++i) /* the whole range, and more of what softmax sees */
        x[i] = i & 1 ? -104.0f + 193.0f * (float)((double)i / n) : trand_normal(&r) * 5.0f;
    memcpy(x, special, sizeof special);
    bx = tbuf_from("x", x, (size_t)n * 4, 0);
    a.x = (const float*)bx.p;
    a.exp = (float*)be.p;
    a.silu = (float*)bs.p;
    a.nan = (int32_t*)bn.p;
    a.four = (float*)b4.p;
    a.far = (int32_t*)bf.p;
    a.n = n;
    CHECK_STATUS(MOE_LAUNCH(exp_kernel, c, a), MOE_OK);
    e = (float*)tbuf_copy(&be);
    s = (float*)tbuf_copy(&bs);
    nan = (int32_t*)tbuf_copy(&bn);
    four = (float*)tbuf_copy(&b4);
    far = (int32_t*)tbuf_copy(&bf);
    CHECK(e[0] == 1.0f && e[1] == 1.0f, "exp(0) is %g, exp(-0) %g", e[0], e[1]);
    CHECK(moe_f32_bits(e[2]) == 0x7f800000u && moe_f32_bits(e[3]) == 0, "exp of the infinities");
    CHECK(moe_f32_bits(e[9]) == 0x7f800000u && moe_f32_bits(e[10]) == 0, "exp far outside");
    CHECK(moe_f32_bits(e[8]) == 0x7f800000u && moe_f32_bits(e[13]) == 0, "exp just outside");
    CHECK(s[0] == 0.0f && s[1] == 0.0f && s[9] == 1e30f && s[10] == 0.0f, "silu at the ends");
    for (int i = 0; i < n; ++i) {
        const double v = x[i], want = exp(v), silu = v / (1 + exp(-v));
        double bits = 0; /* of the product of the four denominators */
        for (int j = 0; j < 4; ++j) {
            const double w = x[with_other(i, j, n)];
            bits += w < -700 ? -w * 1.4427 : log2(1 + exp(-w));
        }
        CHECK(bits < 99.5                   ? !far[i]
              : bits > 99.8 || bits != bits ? far[i]
                                            : 1,
              "silu_4 of %g: returned %d at 2^%g", v, far[i], bits);
        fars += far[i];
        CHECK(nan[i] == (x[i] != x[i]));
        if (!(fabs(v) < 1000)) continue;
        if (want < ldexp(1, 128)) {
            /* --use_fast_math may flush what is below 2^-126 */
            const double floor = want < ldexp(1, -126) ? ldexp(1, -126) : 0;
            const double error = fabs(e[i] - want) / ulp_of(want);
            const double slack = floor > 0 ? floor / ulp_of(want) : 0;
            CHECK(error <= 3 || (slack > 0 && fabs(e[i] - want) <= floor), "exp(%.9g): %.2f ulp", v,
                  error);
            if (slack == 0 && error > worst) {
                worst = error;
                worst_at = v;
            }
        }
        { /* |silu| is tiny below -80: the absolute error counts there */
            const double error = fabs(s[i] - silu) / (fabs(silu) + 1e-30);
            CHECK(far[i] || fabs(four[i] - silu) <= 2e-6 * fabs(silu) * (1 + fabs(v) / 8) + 1e-30,
                  "silu_4(%.9g): %.9g, not %.9g", v, (double)four[i], silu);
            CHECK(fabs(s[i] - silu) <= 2e-6 * fabs(silu) * (1 + fabs(v) / 8) + 1e-30,
                  "silu(%.9g): %.9g, not %.9g", v, (double)s[i], silu);
            if (fabs(v) < 20 && error > worst_silu) {
                worst_silu = error;
                worst_silu_at = v;
            }
        }
    }
    if (test_now.verbose)
        printf("  exp: at most %.2f ulp (at %g); silu: %.3g relative (at %g, |x| < 20)\n", worst,
               worst_at, worst_silu, worst_silu_at);
    CHECK(fars > n / 50 && fars < n / 50 * 49, "%d of %d groups are refused", fars, n);
    free(x), free(e), free(s), free(nan), free(four), free(far);
    tbufs_free(TBUFS(&bx, &be, &bs, &bn, &b4, &bf));
}

static void base_exp(void)
{
    RUN(test_exp);
}

#endif
