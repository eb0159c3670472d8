/* compare.h: comparison of the block layer's outputs with the reference; a case from its inputs to
   its comparison. */
#ifndef MOE_TESTS_BLOCK_LAYER_COMPARE_H
#define MOE_TESTS_BLOCK_LAYER_COMPARE_H

#include "tests/unit/block_layer/reference.h"

/* Compares each element by its own bound. */
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

/* Compares few numbers, which may all be small, by the bound of CHECK_CLOSE. */
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
    if (zeros == rows * cols) { /* nothing was chosen */
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

/* Compares y or dx [T, H], and checks the gaps between its rows. bytes: of the buffer; -1 skips the
   gaps. */
static void check_rows(const char* what, const char* got, int64_t bytes, const layer_case* c,
                       int64_t stride, const double* exact, const double* ideal,
                       const double* bound)
{
    const int64_t T = c->T, H = c->H;
    if (T * H < 256)
        for (int64_t t = 0; t < T; ++t)
            check_array(what, got + t * stride * 2, c->dtype, H, exact + t * H, ideal + t * H, 1,
                        H);
    else check_array(what, got, c->dtype, stride, exact, ideal, T, H);
    check_each(what, got, c->dtype, stride, exact, bound, T, H);
    if (bytes >= 0) CHECK(test_strays(got, bytes, 2, stride, H, 0, T) == 0, "%s", what);
}

/* Compares dw1 or dw2, a matrix [rows, cols] of each active expert. Returns how many bytes behind
   the last one were written. */
static int64_t check_matrices(const tbuf* dw, const layer_bufs* b, const layer_case* c,
                              const double* exact, const double* ideal, const double* bound,
                              int64_t rows, int64_t cols)
{
    const int64_t elems = rows * cols, bytes = elems * moe_dtype_bytes(c->grad_dtype);
    char* got = (char*)tbuf_copy(dw);
    int64_t strays = 0;
    for (int i = 0; i < grad_slots(c) && i < b->num_active; ++i) {
        const int64_t at = b->active[i] * elems;
        check_array(dw->name, got + i * bytes, c->grad_dtype, cols, exact + at, ideal + at, rows,
                    cols);
        check_each(dw->name, got + i * bytes, c->grad_dtype, cols, exact + at, bound + at, rows,
                   cols);
    }
    for (int64_t i = b->num_active * bytes; i < (int64_t)dw->bytes; ++i)
        strays += (unsigned char)got[i] != test_poison_byte((size_t)i);
    free(got);
    return strays;
}

static void check_forward(const layer_bufs* b, const layer_case* c, const layer_ref* exact,
                          const layer_ref* ideal)
{
    char* y = (char*)tbuf_copy(&b->y);
    check_rows("y", y, (int64_t)b->y.bytes, c, y_stride(c), exact->y, ideal->y, exact->bound->y);
    free(y);
}

static void check_backward(const layer_bufs* b, const layer_case* c, const layer_ref* exact,
                           const layer_ref* ideal)
{
    const int64_t T = c->T, H = c->H, I = c->I, U = up_rows(c), K = choices(c);
    char* dx = (char*)tbuf_copy(c->in_place ? &b->dy : &b->dx);
    float* dweights = (float*)tbuf_copy(&b->dweights);
    int32_t* grad_expert = (int32_t*)tbuf_copy(&b->grad_expert);
    int64_t strays = 0;
    check_rows("dx", dx, c->in_place ? -1 : (int64_t)b->dx.bytes, c, dx_stride(c), exact->dx,
               ideal->dx, exact->bound->dx);
    check_each("dweights", dweights, MOE_FP32, K, exact->dweights, exact->bound->dweights, T, K);
    check_array("dweights", dweights, MOE_FP32, K, exact->dweights, ideal->dweights, T, K);
    for (int i = 0; i < grad_slots(c); ++i) {
        const int want = i < b->num_active ? b->active[i] : -1;
        if (!CHECK(grad_expert[i] == want, "grad_expert[%d]: %d, not %d", i, grad_expert[i], want))
            break;
    }
    strays += check_matrices(&b->dw1, b, c, exact->dw1, ideal->dw1, exact->bound->dw1, U, H);
    strays += check_matrices(&b->dw2, b, c, exact->dw2, ideal->dw2, exact->bound->dw2, H, I);
    CHECK(strays == 0, "%lld bytes behind the last active expert were written", (long long)strays);
    free(dx), free(dweights), free(grad_expert);
}

/* Compares the outputs of forward and, with `backward`, of backward. */
static void check_results(const layer_bufs* b, const layer_case* c, int backward)
{
    layer_ref exact = ref_new(b, c, 0), ideal = ref_new(b, c, 1);
    check_forward(b, c, &exact, &ideal);
    if (backward) check_backward(b, c, &exact, &ideal);
    ref_free(&exact);
    ref_free(&ideal);
}

/* Checks that the inputs are what they were. */
static void check_inputs(const layer_bufs* b, const layer_case* c)
{
    CHECK(tbuf_holds(&b->x, b->h_x), "x changed");
    CHECK(c->in_place || tbuf_holds(&b->dy, b->h_dy), "dy changed");
    CHECK(c->form == DENSE || tbuf_holds(&b->ids, b->h_ids), "ids changed");
    CHECK(tbuf_holds(&b->weights, b->h_weights), "weights changed");
    CHECK(tweights_same(&b->w1) && tweights_same(&b->w2), "w1 or w2 changed");
}

static void run_case(const layer_case* c, trand* r)
{
    layer_bufs b;
    const int failures = test_now.failures;
    int64_t bad;
    bufs_new(&b, c, r);
    bad = first_bad(&b, c);
    if (CHECK_STATUS(both(&b), MOE_OK)) {
        check_results(&b, c, 1);
        check_inputs(&b, c);
        CHECK_FAULT(&b.fault, bad < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_ID, bad < 0 ? 0 : bad);
    }
    if (test_now.failures > failures) printf("  in %s\n", case_text(c));
    bufs_free(&b);
}

#endif
