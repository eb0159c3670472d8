/* test_compare.h: how results are compared with their references. Every element is looked at,
   NaN never passes, and a reference of about zero is refused, since a kernel that wrote nothing
   but zeros would pass with it. Included by test.h. */
#ifndef MOE_TESTS_TEST_COMPARE_H
#define MOE_TESTS_TEST_COMPARE_H

/* Equal integers. Returns 1 where all are. */
#define CHECK_INTS(what, got, want, n) test_ints((what), (got), (want), (n), __FILE__, __LINE__)
MOEI_UNUSED static int test_ints(const char* what, const int32_t* got, const int32_t* want,
                                 int64_t n, const char* file, int line)
{
    int64_t bad = 0, first = 0;
    for (int64_t i = 0; i < n; ++i)
        if (got[i] != want[i] && bad++ == 0) first = i;
    return test_check(bad == 0, file, line, what, ": %lld of %lld differ; [%lld] is %d, not %d",
                      (long long)bad, (long long)n, (long long)first, bad ? got[first] : 0,
                      bad ? want[first] : 0);
}

/* What the buffer of this dtype keeps of the exact number. */
MOEI_UNUSED static double test_rounded(double v, int dtype)
{
    if (dtype == MOE_FP16) return moe_fp16_to_f32(moe_f32_to_fp16((float)v));
    if (dtype == MOE_BF16) return moe_bf16_to_f32(moe_f32_to_bf16((float)v));
    return (float)v;
}

/* Shared by the comparisons: |got - exact| <= bound[i], or <= bound[0] where `each` is 0. The
   worst element of each of the first bad rows is printed. zero: 1: all may be about zero, by rule
   or, where there are few, by chance. */
MOEI_UNUSED static int test_compared(const char* what, const void* got, int dtype, int64_t stride,
                                     const double* exact, const double* bound, int each,
                                     int64_t rows, int64_t cols, int zero, const char* file,
                                     int line)
{
    int64_t bad_rows = 0;
    double worst = 0, largest = 0, widest = 0;
    for (int64_t r = 0; r < rows; ++r) {
        double row_worst = 0; /* error over bound */
        int64_t at = -1;
        for (int64_t c = 0; c < cols; ++c) {
            const double want = exact[r * cols + c], b = bound[each ? r * cols + c : 0];
            const double error = fabs((double)moe_load(got, r * stride + c, dtype) - want);
            const double ratio = error <= b ? (b > 0 ? error / b : 0) : error / b;
            if (!(error <= b) && (at < 0 || !(ratio <= row_worst))) {
                at = c;
                row_worst = ratio;
            }
            if (error <= b && ratio > worst) worst = ratio;
            if (fabs(want) > largest) largest = fabs(want);
            if (b > widest) widest = b;
        }
        if (at >= 0 && bad_rows++ < 4)
            test_check(0, file, line, what, ": row %lld: [%lld] is %.9g, not %.9g; bound %.3g",
                       (long long)r, (long long)at, (double)moe_load(got, r * stride + at, dtype),
                       exact[r * cols + at], bound[each ? r * cols + at : 0]);
    }
    if (test_now.verbose && !bad_rows && rows > 0 && cols > 0)
        printf("  %s: worst error %.2f of the bound, which is at most %.3g; values up to %.3g\n",
               what, worst, widest, largest);
    if (rows > 0 && cols > 0 && !zero)
        test_check(largest > 16 * widest, file, line, what,
                   ": the reference is about zero (%g), so this shows nothing", largest);
    return test_check(bad_rows == 0, file, line, what, ": %lld of %lld rows are wrong",
                      (long long)bad_rows, (long long)rows);
}
MOEI_UNUSED static int test_within(const char* what, const void* got, int dtype, int64_t stride,
                                   const double* exact, const double* bound, int each, int64_t rows,
                                   int64_t cols, const char* file, int line)
{
    return test_compared(what, got, dtype, stride, exact, bound, each, rows, cols, 0, file, line);
}

/* Each element within a bound of its own. exact and bound are dense; zero: as above. */
#define CHECK_WITHIN(what, got, dtype, stride, exact, bound, rows, cols, zero)                     \
    test_compared((what), (got), (dtype), (stride), (exact), (bound), 1, (rows), (cols), (zero),   \
                  __FILE__, __LINE__)

/* The house bound: max error <= 2 x the error of `ideal` + 1e-5. `ideal` is the exact result
   taken through the dtypes that the kernel must go through; null: rounded to `dtype` once.
   got has rows `stride` apart, exact and ideal are dense. */
#define CHECK_CLOSE(what, got, dtype, stride, exact, ideal, rows, cols)                            \
    test_close((what), (got), (dtype), (stride), (exact), (ideal), (rows), (cols), __FILE__,       \
               __LINE__)
MOEI_UNUSED static int test_close(const char* what, const void* got, int dtype, int64_t stride,
                                  const double* exact, const double* ideal, int64_t rows,
                                  int64_t cols, const char* file, int line)
{
    double bound = 0;
    for (int64_t i = 0; i < rows * cols; ++i) {
        const double e = fabs((ideal ? ideal[i] : test_rounded(exact[i], dtype)) - exact[i]);
        if (!(e <= bound)) bound = e;
    }
    bound = 2 * bound + 1e-5;
    return test_within(what, got, dtype, stride, exact, &bound, 0, rows, cols, file, line);
}

/* fp32 sums of `terms` products: error <= (terms / 16 + 2) * 2^-23 * sum of the |products|, for
   each element by itself. */
#define CHECK_CLOSE_SUM(what, got, stride, exact, abs_sum, terms, rows, cols)                      \
    test_close_sum((what), (got), (stride), (exact), (abs_sum), (terms), (rows), (cols), __FILE__, \
                   __LINE__)
MOEI_UNUSED static int test_close_sum(const char* what, const void* got, int64_t stride,
                                      const double* exact, const double* abs_sum, int terms,
                                      int64_t rows, int64_t cols, const char* file, int line)
{
    double* bound = (double*)test_host(rows * cols * 8);
    int ok;
    for (int64_t i = 0; i < rows * cols; ++i)
        bound[i] = (terms / 16.0 + 2) * ldexp(1, -23) * abs_sum[i];
    ok = test_within(what, got, MOE_FP32, stride, exact, bound, 1, rows, cols, file, line);
    free(bound);
    return ok;
}

/* Error <= `relative` times the exact value, for each element: for results with no cancellation. */
#define CHECK_CLOSE_RELATIVE(what, got, dtype, stride, exact, relative, rows, cols)                \
    test_close_relative((what), (got), (dtype), (stride), (exact), (relative), (rows), (cols),     \
                        __FILE__, __LINE__)
MOEI_UNUSED static int test_close_relative(const char* what, const void* got, int dtype,
                                           int64_t stride, const double* exact, double relative,
                                           int64_t rows, int64_t cols, const char* file, int line)
{
    double* bound = (double*)test_host(rows * cols * 8);
    int ok;
    for (int64_t i = 0; i < rows * cols; ++i) bound[i] = relative * fabs(exact[i]);
    ok = test_within(what, got, dtype, stride, exact, bound, 1, rows, cols, file, line);
    free(bound);
    return ok;
}

#endif
