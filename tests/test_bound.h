/* test_bound.h: how far each number of an expert's MLP may be from the exact one, by itself.
   Included after test.h and test_weights.h. */
#ifndef MOE_TESTS_TEST_BOUND_H
#define MOE_TESTS_TEST_BOUND_H

#include "moe/ref/experts.h"

/* A sum of `terms` products in fp32, as in CHECK_CLOSE_SUM. */
MOEI_UNUSED static double tsum_error(double abs_sum, int terms)
{
    return (terms / 16.0 + 2) * ldexp(1, -23) * abs_sum;
}

/* The bound of CHECK_CLOSE for sums of `terms` numbers in fp32, whose error is that of numbers as
   large as the largest result. got, exact and ideal are dense. */
#define CHECK_CLOSE_SUMS(what, got, exact, ideal, terms, rows, cols)                               \
    tclose_sums((what), (got), (exact), (ideal), (terms), (rows), (cols), __FILE__, __LINE__)
MOEI_UNUSED static int tclose_sums(const char* what, const float* got, const double* exact,
                                   const double* ideal, int64_t terms, int64_t rows, int64_t cols,
                                   const char* file, int line)
{
    double off = 0, largest = 0, bound;
    for (int64_t i = 0; i < rows * cols; ++i) {
        off = fmax(off, fabs(ideal[i] - exact[i]));
        largest = fmax(largest, fabs(exact[i]));
    }
    bound = 2 * off + 1e-5 + tsum_error(largest, (int)terms);
    return test_within(what, got, MOE_FP32, cols, exact, &bound, 0, rows, cols, file, line);
}

/* How far an activation is off where its arguments are: as far as at the corners of what that
   allows, some ulp of the function and the rounding of its exponent. */
MOEI_UNUSED static double tactivation_error(int activation, float alpha, float limit, double v,
                                            double up, double v_error, double up_error)
{
    const double want = moe_ref_activation_f64(activation, v, up, alpha, limit);
    const double a = alpha != 0 ? fabs(alpha) : 1.702;
    const double ulps = ldexp(8 + a * fabs(v) + (fabs(v) < 15 ? v * v : 225), -23);
    double moved = 0;
    if (activation == MOE_ACTIVATION_NONE) return v_error;
    for (int corner = 0; corner < 4; ++corner) {
        const double at =
            moe_ref_activation_f64(activation, v + (corner & 1 ? v_error : -v_error),
                                   up + (corner & 2 ? up_error : -up_error), alpha, limit);
        const double by = 1.1 * fabs(at - want);
        if (by > moved) moved = by;
    }
    return moved + ulps * fabs(want) + ldexp(fabs(v) * (fabs(up) + 1) + 1, -126);
}

/* Bounds of act [R, I] and of rows [R, H], or null, for the reference's exact descriptor d: act
   rounded to act_dtype, rows to rows_dtype. */
MOEI_UNUSED static void texperts_bound(const moe_ref_experts_desc* d, int act_dtype, int rows_dtype,
                                       double* act, double* rows)
{
    const int64_t R = d->expert_offset[d->num_experts], I = d->intermediate, H = d->hidden;
    const int kind = d->activation ? d->activation : MOE_ACTIVATION_SWIGLU;
    const int gated = moe_activation_is_gated(kind);
    const int separate = gated && d->gate_up == MOE_GATE_UP_SEPARATE;
    const int pairs = gated && d->gate_up == MOE_GATE_UP_INTERLEAVED;
    const int64_t U = gated ? 2 * I : I, n = separate ? I : U;
    double *h = (double*)test_host(R * U * 8), *sum = (double*)test_host(R * U * 8);
    double *exact = (double*)test_host(R * I * 8), *out = (double*)test_host(R * H * 8);
    double *out_sum = (double*)test_host(R * H * 8), *moved = (double*)test_host(R * H * 8);
    moe_ref_gemm_desc g;
    memset(&g, 0, sizeof g);
    g.a = d->x;
    g.a_dtype = d->x_dtype;
    g.a_stride = d->x_stride;
    g.row_index = d->row_slot;
    g.row_div = d->row_slot ? d->top_k : 1;
    g.expert_offset = d->expert_offset;
    g.b = d->w1;
    g.b_dtype = d->w_dtype;
    g.bias_dtype = d->bias_dtype;
    g.bias_stride = U;
    g.num_experts = d->num_experts;
    g.n = (int)n;
    g.k = (int)H;
    for (int up = 0; up <= separate; ++up) { /* gates [R, I], then ups; or both in one */
        g.use_up = up;
        g.bias = d->bias1 ? (const uint16_t*)d->bias1 + up * I : (const void*)0;
        moe_ref_gemm_f64(&g, h + up * R * I, sum + up * R * I);
    }
    for (int64_t r = 0; r < R; ++r)
        for (int64_t i = 0; i < I; ++i) {
            const int64_t v = separate ? r * I + i : r * U + (pairs ? 2 * i : i);
            const int64_t u = !gated ? v : separate ? R * I + v : pairs ? v + 1 : v + I;
            double* const b = &act[r * I + i];
            exact[r * I + i] = moe_ref_activation_f64(kind, h[v], h[u], d->alpha, d->limit);
            *b = tactivation_error(kind, d->alpha, d->limit, h[v], h[u], tsum_error(sum[v], (int)H),
                                   tsum_error(sum[u], (int)H));
            *b += tround(fabs(exact[r * I + i]) + *b, act_dtype);
        }
    memset(&g, 0, sizeof g);
    g.a_dtype = MOE_REF_REAL;
    g.expert_offset = d->expert_offset;
    g.b = d->w2;
    g.b_dtype = d->w_dtype;
    g.num_experts = d->num_experts;
    g.n = (int)H;
    g.k = (int)I;
    g.a = act;
    moe_ref_gemm_f64(&g, out, moved);
    g.a = exact;
    g.bias = d->bias2;
    g.bias_dtype = d->bias_dtype;
    moe_ref_gemm_f64(&g, out, out_sum);
    for (int64_t i = 0; i < R * H && rows; ++i) {
        rows[i] = moved[i] + tsum_error(out_sum[i] + moved[i], (int)I);
        rows[i] += tround(fabs(out[i]) + rows[i], rows_dtype);
    }
    free(h), free(sum), free(exact), free(out), free(out_sum), free(moved);
}

#endif
