/* activation.cuh: every activation of the experts and its derivative, 8 numbers at a time, in fp32.
   Device functions; the stations' kernels call them on registers.

     SwiGLU            v sigma(v) u               SiLU        v sigma(v)
     GEGLU             v Phi(v) u                 GELU        v Phi(v)
     GEGLU, tanh form  v (1 + tanh(c(v))) / 2 u   GELU, tanh  v (1 + tanh(c(v))) / 2
     clamped SwiGLU    g sigma(alpha g) (h + 1)   ReLU^2      max(v, 0)^2
                       g = min(v, limit), h = u clamped to -limit .. limit

   v is the gate, or the only input of an activation that is not gated; u is up.
   c(v) = sqrt(2 / pi) (v + 0.044715 v^3). Phi is the normal distribution, sigma the logistic
   function.

   Numerics: an infinite input gives the function's limit, NaN stays NaN. Errors: about 2 ulp of the
   exponential, 2^-22 for Phi; derivatives within 1e-6 of their largest value. The same with
   --use_fast_math.

     const moei_activation a = moei_activation_of(MOE_ACTIVATION_SWIGLU, 0.0f, 0.0f);
     moei_activate(v, u, 8, &a, true);      // v becomes the activation
     moei_activate_grad(v, u, s, 8, &a, true);  // and s, u its derivatives by gate, up

   Minimum architecture: any. Source of the forms: Shazeer 2020 (arXiv 2002.05202), Hendrycks and
   Gimpel 2016 (arXiv 1606.08415), So et al. 2021 (arXiv 2109.08668); the clamped form is that of
   gpt-oss. */
#ifndef MOE_ACTIVATION_CUH
#define MOE_ACTIVATION_CUH

#include "base/numeric.cuh"
#include "fields.h"
#include "layout.h"

#define MOEI_MINUS_LOG2E (-1.44269504f)

/* Refuses a MOE_ACTIVATION_* that does not exist; an alpha whose product with log2(e) is not finite,
   and a limit that is not; both where given to another activation than the clamped SwiGLU. Fills in
   their defaults. */
MOE_HOST moe_status moei_activation_check(int activation, float* alpha, float* limit)
{
    MOE_REQUIRE(activation >= MOE_ACTIVATION_NONE && activation <= MOE_ACTIVATION_RELU2,
                MOE_ERR_OPTION, activation);
    if (activation == MOE_ACTIVATION_SWIGLU_CLAMPED) {
        MOE_REQUIRE(moei_f32_is_finite(MOEI_MINUS_LOG2E * *alpha), MOE_ERR_RANGE, alpha);
        MOE_REQUIRE(moe_f32_bits(*limit + 0.0f) < 0x7f800000u, MOE_ERR_RANGE, limit);
        if (*alpha == 0.0f) *alpha = 1.702f;
        if (*limit == 0.0f) *limit = 7.0f;
    } else {
        MOE_REQUIRE(*alpha == 0.0f, MOE_ERR_CONFLICT, alpha);
        MOE_REQUIRE(*limit == 0.0f, MOE_ERR_CONFLICT, limit);
    }
    return MOE_OK;
}

/* The function of one number that an activation applies to its gate. */
typedef enum moei_curve {
    MOEI_CURVE_NONE,    /* v */
    MOEI_CURVE_SIGMOID, /* v / (1 + 2^(a v)) */
    MOEI_CURVE_TANH,    /* v / (1 + 2^(v (A + B v^2))), A and B below */
    MOEI_CURVE_ERF,     /* v Phi(v) */
    MOEI_CURVE_RELU2    /* max(v, 0)^2 */
} moei_curve;

/* A resolved activation: fill it in with moei_activation_of. */
typedef struct moei_activation {
    int32_t curve;   /* moei_curve */
    int32_t clamped; /* 1: the clamped SwiGLU; 0: no limit */
    float a;         /* of MOEI_CURVE_SIGMOID: -log2(e), times alpha where clamped */
    float limit;     /* used where clamped: not negative */
} moei_activation;

/* Returns the resolved form of a MOE_ACTIVATION_* other than 0. alpha and limit: of the clamped
   SwiGLU, with their defaults filled in. */
MOE_HOST_DEVICE moei_activation moei_activation_of(int activation, float alpha, float limit)
{
    moei_activation a;
    a.clamped = activation == MOE_ACTIVATION_SWIGLU_CLAMPED;
    a.a = a.clamped ? MOEI_MINUS_LOG2E * alpha : MOEI_MINUS_LOG2E;
    a.limit = limit;
    a.curve = activation == MOE_ACTIVATION_NONE    ? MOEI_CURVE_NONE
              : activation == MOE_ACTIVATION_RELU2 ? MOEI_CURVE_RELU2
              : activation == MOE_ACTIVATION_GELU || activation == MOE_ACTIVATION_GEGLU
                  ? MOEI_CURVE_ERF
              : activation == MOE_ACTIVATION_GELU_TANH || activation == MOE_ACTIVATION_GEGLU_TANH
                  ? MOEI_CURVE_TANH
                  : MOEI_CURVE_SIGMOID;
    return a;
}

/* Returns x / (1 + 2^(a x)); with a = MOEI_MINUS_LOG2E this is SiLU. */
MOE_DEVICE float moei_sigmoid_unit(float x, float a)
{
    const float v = x < -3.40282347e38f ? -3.40282347e38f : x; /* infinity / infinity is NaN */
    return __fdividef(v, 1.0f + moei_exp2_fast(a * v));
}

/* s [4] = SiLU of v [4] by one reciprocal, that of the product of four denominators: reciprocals
   and exponentials are the slow instructions here. Returns true where this product is too large or
   NaN, as with a gate below -69, or four below -17; s is then not usable. */
MOE_DEVICE bool moei_silu_4(float s[4], const float v[4])
{
    float d[4], first, second, both, r;
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) d[i] = 1.0f + moei_exp2_fast(MOEI_MINUS_LOG2E * v[i]);
    first = d[0] * d[1];
    second = d[2] * d[3];
    both = first * second;
    r = moei_reciprocal_fast(both);
    s[0] = v[0] * (second * r * d[1]);
    s[1] = v[1] * (second * r * d[0]);
    s[2] = v[2] * (first * r * d[3]);
    s[3] = v[3] * (first * r * d[2]);
    return !(both < 1e30f);
}

/* Returns x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 = x / (1 + 2^(x (A + B x^2))), since
   (1 + tanh(u)) / 2 = sigma(2 u). */
#define MOEI_GELU_TANH_A (-2.30220819f)  /* -2 log2(e) sqrt(2 / pi) */
#define MOEI_GELU_TANH_B (-0.102943240f) /* the same times 0.044715 */
MOE_DEVICE float moei_gelu_tanh(float x)
{
    const float most = 3.40282347e38f, v = x < -most ? -most : x; /* infinity times 0 is NaN */
    const float square = fminf(v * v, 1e30f);
    return v * __fdividef(1.0f, 1.0f + moei_exp2_fast(
                                           v * fmaf(MOEI_GELU_TANH_B, square, MOEI_GELU_TANH_A)));
}

/* Returns x Phi(x) = x (1 + erf(x / sqrt(2))) / 2. With z = |x|, Phi(-z) = e^(-z^2 / 2) f(1 / (1 +
   0.3 z)). f is a polynomial of degree 8 without constant, fitted to a relative error of 2^-22. So
   the small results of large negative x are right too, up to the rounding of z^2. An infinity gives
   the limit, NaN stays NaN. */
MOE_DEVICE float moei_gelu(float x)
{
    const float z = fminf(fabsf(x), 15.0f), t = __fdividef(1.0f, fmaf(0.3f, z, 1.0f));
    float f = 0.03593173251f;
    f = fmaf(f, t, -0.15827599168f);
    f = fmaf(f, t, 0.20820659399f);
    f = fmaf(f, t, -0.05539385602f);
    f = fmaf(f, t, 0.12946921587f);
    f = fmaf(f, t, 0.09963748604f);
    f = fmaf(f, t, 0.12079835683f);
    f = fmaf(f, t, 0.11962638795f);
    f *= t * moei_exp2_fast(-0.721347520f * z * z);
    return (x < 0.0f ? 0.0f : x) - z * f;
}

/* Returns the derivative by v of v / (1 + 2^(p + q)) = v s, where p = a v, q = b v^3 and v = x:
   s - ln 2 (p + 3 q) s (1 - s). Exponents p + q are clamped to -115 .. 115: beyond, s (1 - s) is
   negligible. */
MOE_DEVICE float moei_sigmoid_slope(float x, float p, float q)
{
    const float e = moei_exp2_fast(fminf(fmaxf(p + q, -115.0f), 115.0f));
    const float m = fminf(fmaxf(fmaf(3.0f, q, p), -345.0f), 345.0f);
    const float s = __fdividef(1.0f, 1.0f + e);
    return moei_is_nan(x) ? x : s * fmaf(-0.693147182f * m, e * s, 1.0f);
}

/* v becomes moei_sigmoid_unit(v, a). Returns its derivative by v, that of moei_sigmoid_slope, by
   the same exponential and reciprocal. Where the exponential is infinite both are 0. */
MOE_DEVICE float moei_sigmoid_grad(float* v, float a)
{
    const float s = moei_reciprocal_fast(1.0f + moei_exp2_fast(a * *v)); /* has NaN of v */
    *v = fmaxf(*v, -3.40282347e38f) * s;
    return fmaf(fminf(-0.693147182f * a * *v, 3.40282347e38f), 1.0f - s, s); /* finite: 0 t is 0 */
}

/* Returns the derivative of x Phi(x): Phi(x) + x e^(-x^2 / 2) / sqrt(2 pi). */
MOE_DEVICE float moei_gelu_slope(float x)
{
    const float z = fminf(fmaxf(x, -15.0f), 15.0f);
    const float density = 0.398942280f * moei_exp2_fast(-0.721347520f * z * z);
    const float near_0 = fmaf(z * z, fmaf(z * z, 0.025f, -0.166666667f), 1.0f);
    const float phi =
        fabsf(z) > 0.125f ? __fdividef(moei_gelu(z), z) : fmaf(z * 0.398942280f, near_0, 0.5f);
    return moei_is_nan(x) ? x : fmaf(z, density, phi);
}

/* v [count] = curve(v); count is a literal. */
MOE_DEVICE void moei_apply_curve(float* v, const int count, const moei_activation* a)
{
    if (a->curve == MOEI_CURVE_SIGMOID) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) v[i] = moei_sigmoid_unit(v[i], a->a);
    } else if (a->curve == MOEI_CURVE_TANH) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) v[i] = moei_gelu_tanh(v[i]);
    } else if (a->curve == MOEI_CURVE_ERF) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) v[i] = moei_gelu(v[i]);
    } else if (a->curve == MOEI_CURVE_RELU2) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) v[i] = v[i] < 0.0f ? 0.0f : v[i] * v[i];
    }
}

/* slope [count] = curve'(v [count]), of curves but MOEI_CURVE_SIGMOID. count is a literal. */
MOE_DEVICE void moei_slope(float* slope, const float* v, const int count, const moei_activation* a)
{
    const float most = 3.40282347e38f;
    if (a->curve == MOEI_CURVE_TANH) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) {
            const float x = fminf(fmaxf(v[i], -most), most);
            slope[i] = moei_sigmoid_slope(v[i], MOEI_GELU_TANH_A * x,
                                          MOEI_GELU_TANH_B * fminf(x * x, 1e30f) * x);
        }
    } else if (a->curve == MOEI_CURVE_ERF) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) slope[i] = moei_gelu_slope(v[i]);
    } else if (a->curve == MOEI_CURVE_RELU2) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) slope[i] = v[i] < 0.0f ? 0.0f : 2.0f * v[i];
    } else {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) slope[i] = 1.0f;
    }
}

/* v [count] = activation(v, u [count]); count is a literal. u is read only where gated, and
   overwritten where clamped. */
MOE_DEVICE void moei_activate(float* v, float* u, const int count, const moei_activation* a,
                              bool gated)
{
    if (a->clamped) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) { /* comparisons: fminf and fmaxf would lose a NaN */
            v[i] = v[i] > a->limit ? a->limit : v[i];
            u[i] = (u[i] > a->limit ? a->limit : u[i] < -a->limit ? -a->limit : u[i]) + 1.0f;
        }
    }
    moei_apply_curve(v, count, a);
    if (gated) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) v[i] *= u[i];
    }
}

/* v [count] = activation(v, u [count]); s [count] = its derivative by v; where gated, u = its
   derivative by u. count is a literal, at most 8. A clamped number has derivative 0 beyond the
   limit, not at the limit itself. */
MOE_DEVICE void moei_activate_grad(float* v, float* u, float* s, const int count,
                                   const moei_activation* a, bool gated)
{
    uint32_t out = 0; /* bit i: gate i is beyond the limit; bit 8 + i: up i */
    if (a->clamped) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) {
            out |= (v[i] > a->limit ? 1u : 0u) << i;
            out |= (u[i] > a->limit || u[i] < -a->limit ? 256u : 0u) << i;
            v[i] = v[i] > a->limit ? a->limit : v[i];
            u[i] = (u[i] > a->limit ? a->limit : u[i] < -a->limit ? -a->limit : u[i]) + 1.0f;
        }
    }
    if (a->curve == MOEI_CURVE_SIGMOID) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) s[i] = moei_sigmoid_grad(v + i, a->a);
    } else {
        moei_slope(s, v, count, a);
        moei_apply_curve(v, count, a);
    }
    if (a->clamped) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i)
            if (out >> i & 1) s[i] = 0.0f;
    }
    if (gated) {
        MOE_UNROLL
        for (int i = 0; i < count; ++i) {
            const float up = u[i];
            u[i] = out >> i & 256 ? 0.0f : v[i];
            v[i] *= up;
            s[i] *= up;
        }
    }
}

/* The backward pass of 4 numbers of one row. t [4]: the gradient by the activation, before the
   row's weight. Returns sum + the sum of each t times its activation, added in order. v, u [4]
   become weight * activation(v, u) and, where gated, weight * t * the derivative by u;
   s [4] = weight * t * the derivative by v. Overwrites t. */
MOE_DEVICE float moei_activate_backward_4(float* v, float* u, float* s, float* t, float weight,
                                          float sum, const moei_activation* a, bool gated)
{
    moei_activate_grad(v, u, s, 4, a, gated);
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) {
        sum = fmaf(t[i], v[i], sum);
        t[i] *= weight;
        u[i] *= t[i];
        s[i] *= t[i];
        v[i] *= weight;
    }
    return sum;
}

#endif
