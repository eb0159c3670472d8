/* test_router_backward.cu: moe/router_backward.cuh against its reference, in double.

     nvcc -I. -arch=sm_90a tests/unit/test_router_backward.cu -o test_router_backward
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_router_backward.cu -o test_router_backward

     test_values      dtypes, shapes, strides, both paths, both outputs or one
     test_many        many tokens: drouter in several parts
     test_padding     tokens of NaN whose dlogits are 0 change nothing
     test_special     infinities and NaN stay where they are
     test_differences finite differences of the router's own reference
     test_bits        same bits every time; a graph replayed with other inputs
     test_no_tokens   T = 0
     test_refused     bad descriptors */
#include "tests/test.h"

#include "moe/ref/router_backward.h"
#include "moe/router_backward.cuh"
#include "tests/test_case.h"
#include "tests/test_weights.h"

typedef struct router_case {
    int T, H, E;
    int x_dtype, router_dtype, grad_dtype;
    int x_pad, router_pad, dlogits_pad, dx_pad;
    int dx_accumulate, accumulate;
    int no_dx, no_drouter, no_workspace;
    int zeros; /* percent of the tokens whose dlogits are all 0 */
    int nan;   /* 1: x of these tokens is NaN */
} router_case;

typedef struct router_bufs {
    tbuf x, router, dlogits, dx, drouter, workspace, fault;
    void *h_x, *h_router, *h_dx, *h_drouter;
    float* h_dlogits;
    moe_router_backward_desc d;
} router_bufs;

static const char* case_text(const router_case* c)
{
    static char text[300];
    snprintf(text, sizeof text,
             "T=%d H=%d E=%d x %s router %s grad %s pads %d %d %d %d accumulate %d %d none %d %d "
             "workspace=%d zeros=%d nan=%d",
             c->T, c->H, c->E, moe_dtype_name(c->x_dtype), moe_dtype_name(c->router_dtype),
             moe_dtype_name(c->grad_dtype), c->x_pad, c->router_pad, c->dlogits_pad, c->dx_pad,
             c->dx_accumulate, c->accumulate, c->no_dx, c->no_drouter, !c->no_workspace, c->zeros,
             c->nan);
    return text;
}

static router_case normal_case(int T, int H, int E)
{
    router_case c = {};
    c.T = T, c.H = H, c.E = E;
    c.x_dtype = c.router_dtype = test_half();
    c.grad_dtype = MOE_FP32;
    return c;
}

static void fill(router_bufs* b, const router_case* c, trand* r)
{
    const int64_t x_stride = c->H + c->x_pad, stride = c->E + c->dlogits_pad;
    for (int64_t t = 0; t < c->T; ++t) {
        const int zero = (int)trand_int(r, 0, 99) < c->zeros;
        for (int h = 0; h < c->H; ++h)
            moe_store(b->h_x, t * x_stride + h, c->x_dtype, zero && c->nan ? NAN : trand_normal(r));
        for (int e = 0; e < c->E; ++e) b->h_dlogits[t * stride + e] = zero ? 0 : trand_normal(r);
    }
    tbuf_put(&b->x, b->h_x), tbuf_put(&b->dlogits, b->h_dlogits);
}

static void reset(router_bufs* b, const router_case* c)
{
    tbufs_poison(TBUFS(&b->dx, &b->drouter));
    if (c->dx_accumulate) tbuf_put(&b->dx, b->h_dx);
    if (c->accumulate) tbuf_put(&b->drouter, b->h_drouter);
    tfault_put(&b->fault, MOE_FAULT_NONE, 0);
}

static void bufs_new(router_bufs* b, const router_case* c, trand* r)
{
    const int64_t T = c->T, H = c->H, E = c->E;
    const int64_t x_stride = H + c->x_pad, router_stride = H + c->router_pad,
                  dx_stride = H + c->dx_pad;
    moe_router_backward_desc* d = &b->d;
    memset(b, 0, sizeof *b);
    b->h_x = test_host(T * x_stride * 4);
    b->h_dlogits = (float*)test_host(T * (E + c->dlogits_pad) * 4);
    b->h_router = trows_new(r, E, router_stride, H, c->router_dtype, TFILL_NORMAL, 1);
    b->h_dx = trows_new(r, T, dx_stride, H, c->x_dtype, TFILL_NORMAL, 1);
    b->h_drouter = trows_new(r, E, H, H, c->grad_dtype, TFILL_NORMAL, 1);
    b->x = tbuf_new("x", (size_t)moe_extent(T, x_stride, H, c->x_dtype), 16);
    b->router = tbuf_from("router", b->h_router,
                          (size_t)moe_extent(E, router_stride, H, c->router_dtype), 16);
    b->dlogits = tbuf_new("dlogits", (size_t)moe_extent(T, E + c->dlogits_pad, E, MOE_FP32), 4);
    b->dx = tbuf_new("dx", (size_t)moe_extent(T, dx_stride, H, c->x_dtype), 16);
    b->drouter = tbuf_new("drouter", (size_t)(E * H * moe_dtype_bytes(c->grad_dtype)), 16);
    b->fault = tfault_new(0);
    fill(b, c, r);
    d->x = b->x.p, d->router = b->router.p, d->dlogits = (const float*)b->dlogits.p;
    d->x_stride = c->x_pad ? x_stride : 0, d->router_stride = c->router_pad ? router_stride : 0;
    d->dlogits_stride = c->dlogits_pad ? E + c->dlogits_pad : 0;
    d->dx_stride = c->dx_pad ? dx_stride : 0;
    d->x_dtype = c->x_dtype, d->router_dtype = c->router_dtype, d->grad_dtype = c->grad_dtype;
    d->dx = c->no_dx ? (void*)0 : b->dx.p, d->drouter = c->no_drouter ? (void*)0 : b->drouter.p;
    d->dx_accumulate = c->dx_accumulate, d->accumulate = c->accumulate;
    d->fault = (uint64_t*)b->fault.p, d->rank = TEST_RANK;
    d->num_tokens = c->T, d->hidden = c->H, d->num_experts = c->E;
    CHECK_STATUS(moe_router_backward_workspace(d, &d->workspace_bytes), MOE_OK);
    b->workspace = tbuf_new("workspace", d->workspace_bytes, 0);
    d->workspace = c->no_workspace || !d->workspace_bytes ? (void*)0 : b->workspace.p;
    reset(b, c);
}

static void bufs_free(router_bufs* b)
{
    tbufs_free(
        TBUFS(&b->x, &b->router, &b->dlogits, &b->dx, &b->drouter, &b->workspace, &b->fault));
    TFREE(b->h_x, b->h_router, b->h_dx, b->h_drouter, b->h_dlogits);
}

/* Compares one result: the bound of fp32 sums, the rounding to its dtype, and `each`, what the split
   path moves a product by. */
static void compare_one(const char* what, const tbuf* buf, int dtype, int64_t stride, double* exact,
                        double* size, const void* before, int terms, double each, int64_t rows,
                        int64_t cols)
{
    void* got = tbuf_copy(buf);
    for (int64_t i = 0; i < rows * cols; ++i) {
        const int64_t at = i / cols * stride + i % cols;
        if (before) exact[i] += moe_load(before, at, dtype);
        size[i] = (terms / 16.0 + 2) * ldexp(size[i] + fabs(exact[i]), -23) + each * size[i] +
                  2 * tround(fabs(exact[i]), dtype);
    }
    test_within(what, got, dtype, stride, exact, size, 1, rows, cols, __FILE__, __LINE__);
    if (!before)
        CHECK(test_strays(got, (int64_t)buf->bytes, moe_dtype_bytes(dtype), stride, cols, 0,
                          rows) == 0,
              "%s: written outside the rows", what);
    free(got);
}

static void compare(const router_bufs* b, const router_case* c)
{
    const int64_t T = c->T, E = c->E, H = c->H;
    const int before = test_now.failures;
    double *dx = (double*)test_host(T * H * 8), *dx_size = (double*)test_host(T * H * 8);
    double *dw = (double*)test_host(E * H * 8), *dw_size = (double*)test_host(E * H * 8);
    moe_ref_router_backward_desc r = {};
    moe_router_backward_prepared p;
    double each;
    int some = 0;
    CHECK_STATUS(moe_router_backward_prepare(&b->d, &p), MOE_OK);
    each = p.splits ? ldexp(1, -16) : 0;
    r.forward.x = b->h_x, r.forward.w = b->h_router;
    r.forward.x_stride = H + c->x_pad, r.forward.w_stride = H + c->router_pad;
    r.forward.x_dtype = c->x_dtype, r.forward.w_dtype = c->router_dtype;
    r.forward.num_tokens = c->T, r.forward.num_experts = c->E, r.forward.hidden = c->H;
    r.dlogits = b->h_dlogits, r.dlogits_stride = E + c->dlogits_pad;
    moe_ref_router_backward_f64(&r, dx, dw, dx_size, dw_size);
    for (int64_t i = 0; i < E * H; ++i) some |= dw[i] != 0;
    if (c->no_dx) CHECK(c->dx_accumulate || tbuf_holds(&b->dx, 0), "dx was not asked for");
    else if (some)
        compare_one("dx", &b->dx, c->x_dtype, H + c->dx_pad, dx, dx_size,
                    c->dx_accumulate ? b->h_dx : (void*)0, c->E,
                    c->router_dtype == MOE_FP32 ? 2 * each : each, T, H);
    if (c->no_drouter)
        CHECK(c->accumulate || tbuf_holds(&b->drouter, 0), "drouter was not asked for");
    else if (some)
        compare_one("drouter", &b->drouter, c->grad_dtype, H, dw, dw_size,
                    c->accumulate ? b->h_drouter : (void*)0, c->T, each, E, H);
    CHECK_FAULT(&b->fault, MOE_FAULT_NONE, 0);
    CHECK(tbuf_holds(&b->x, b->h_x) && tbuf_holds(&b->router, b->h_router) &&
              tbuf_holds(&b->dlogits, b->h_dlogits),
          "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    TFREE(dx, dx_size, dw, dw_size);
}

static void run_case(const router_case* c, trand* r)
{
    router_bufs b;
    bufs_new(&b, c, r);
    if (CHECK_STATUS(moe_router_backward(&b.d, test_now.stream), MOE_OK)) compare(&b, c);
    bufs_free(&b);
}

static void test_values(void)
{
    static const int dtypes[] = {MOE_FP32, MOE_FP16, MOE_BF16};
    trand r = trand_new(1);
    for (int i = 0; i < (test_long() ? 120 : 60); ++i) {
        router_case c = normal_case((int)trand_int(&r, 1, 90), (int)trand_int(&r, 1, 100),
                                    (int)trand_int(&r, 1, 70));
        c.x_dtype = dtypes[trand_int(&r, 0, 2)], c.router_dtype = dtypes[trand_int(&r, 0, 2)];
        if (i % 2) { /* what the split path takes */
            c.H = (c.H + 7) / 8 * 8, c.x_dtype = MOE_BF16;
            if (c.router_dtype == MOE_FP16) c.router_dtype = MOE_BF16;
        }
        c.grad_dtype = trand_int(&r, 0, 1) ? MOE_FP32 : c.router_dtype;
        c.x_pad = 8 * (int)trand_int(&r, 0, 1), c.router_pad = 8 * (int)trand_int(&r, 0, 1);
        c.dx_pad = 8 * (int)trand_int(&r, 0, 1), c.dlogits_pad = (int)trand_int(&r, 0, 5);
        if (trand_int(&r, 0, 5) == 0) c.x_pad = 3, c.dx_pad = 5;
        c.dx_accumulate = (int)trand_int(&r, 0, 1), c.accumulate = (int)trand_int(&r, 0, 1);
        c.no_dx = trand_int(&r, 0, 5) == 0, c.no_drouter = trand_int(&r, 0, 5) == 0;
        c.no_workspace = trand_int(&r, 0, 5) == 0;
        c.zeros = trand_int(&r, 0, 2) ? 0 : 30;
        run_case(&c, &r);
    }
}

static void test_many(void)
{
    trand r = trand_new(2);
    for (int fp32 = 0; fp32 < 2; ++fp32) {
        router_case c = normal_case(2100, 40, 20);
        moe_router_backward_prepared p;
        router_bufs b;
        c.x_dtype = MOE_BF16, c.router_dtype = fp32 ? MOE_FP32 : MOE_BF16;
        c.zeros = 10;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_router_backward_prepare(&b.d, &p), MOE_OK);
        CHECK(p.splits == (test_half() == MOE_BF16), "tensor cores");
        CHECK(!p.splits || p.split_args.parts == 4, "%d parts", p.split_args.parts);
        CHECK_STATUS(moe_router_backward_run(&p, test_now.stream), MOE_OK);
        compare(&b, &c);
        bufs_free(&b);
    }
}

static void test_padding(void)
{
    static const int dtypes[] = {MOE_FP32, MOE_FP16, MOE_BF16};
    trand r = trand_new(3);
    for (int i = 0; i < 3; ++i) {
        router_case c = normal_case(50, 24, 11);
        c.x_dtype = c.router_dtype = dtypes[i];
        c.zeros = 40, c.nan = 1;
        run_case(&c, &r);
    }
}

/* An infinity in one dlogit reaches that token's dx and that expert's drouter, and no other. */
static void test_special(void)
{
    trand r = trand_new(4);
    for (int dtype = MOE_FP16; dtype <= MOE_BF16; ++dtype)
        for (int what = 0; what < 2; ++what) {
            router_case c = normal_case(40, 16, 9);
            router_bufs b;
            float *dx, *dw;
            c.x_dtype = c.router_dtype = dtype;
            bufs_new(&b, &c, &r);
            b.h_dlogits[7 * c.E + 5] = what ? NAN : INFINITY;
            tbuf_put(&b.dlogits, b.h_dlogits);
            CHECK_STATUS(moe_router_backward(&b.d, test_now.stream), MOE_OK);
            dx = (float*)test_host(c.T * c.H * 4);
            {
                void* p = tbuf_copy(&b.dx);
                for (int i = 0; i < c.T * c.H; ++i) dx[i] = moe_load(p, i, dtype);
                free(p);
            }
            dw = (float*)tbuf_copy(&b.drouter);
            for (int i = 0; i < c.T * c.H; ++i)
                CHECK((fabsf(dx[i]) < INFINITY) == (i / c.H != 7), "dx of token %d", i / c.H);
            for (int i = 0; i < c.E * c.H; ++i)
                CHECK((fabsf(dw[i]) < INFINITY) == (i / c.H != 5), "drouter of expert %d", i / c.H);
            TFREE(dx, dw);
            bufs_free(&b);
        }
}

/* d (sum of logits * g) by x and by the router, from differences of the router's own reference. */
static void test_differences(void)
{
    enum { T = 5, H = 6, E = 4 };
    trand r = trand_new(5);
    double x[T * H], w[E * H], g[T * E], logits[T * E], dx[T * H], dw[E * H];
    moe_ref_router_backward_desc d = {};
    for (int i = 0; i < T * H; ++i) x[i] = trand_normal(&r);
    for (int i = 0; i < E * H; ++i) w[i] = trand_normal(&r);
    for (int i = 0; i < T * E; ++i) g[i] = trand_normal(&r);
    d.forward.x = x, d.forward.w = w, d.dlogits = g;
    d.forward.x_dtype = d.forward.w_dtype = d.dlogits_dtype = MOE_REF_REAL;
    d.forward.num_tokens = T, d.forward.num_experts = E, d.forward.hidden = H;
    moe_ref_router_backward_f64(&d, dx, dw, 0, 0);
    for (int i = 0; i < T * H + E * H; ++i) {
        double* at = i < T * H ? x + i : w + i - T * H;
        const double was = *at, want = i < T * H ? dx[i] : dw[i - T * H];
        double sum = 0;
        for (int side = -1; side <= 1; side += 2) {
            *at = was + side * 1e-4;
            moe_ref_router_f64(&d.forward, logits);
            for (int k = 0; k < T * E; ++k) sum += side * logits[k] * g[k];
        }
        *at = was;
        CHECK(fabs(sum / 2e-4 - want) < 1e-7 * (1 + fabs(want)), "number %d", i);
    }
}

TEST_CALL(run_router, moe_router_backward, moe_router_backward_desc)

static void test_bits(void)
{
    trand r = trand_new(6);
    for (int scalar = 0; scalar < 2; ++scalar) {
        router_case c = normal_case(130, 48, 17);
        router_bufs b;
        tgraph g;
        c.x_dtype = c.router_dtype = scalar ? MOE_FP16 : test_half();
        bufs_new(&b, &c, &r);
        test_same_bits("router_backward", run_router, &b.d, TBUFS(&b.dx, &b.drouter),
                       MOE_ON_HOST && !test_long() ? 10 : 100);
        if (tgraph_capture(&g, run_router, &b.d)) {
            for (int i = 0; i < 3; ++i) {
                fill(&b, &c, &r);
                reset(&b, &c);
                tgraph_launch(&g);
                compare(&b, &c);
            }
            tgraph_free(&g);
        }
        tfault_put(&b.fault, MOE_FAULT_BAD_OFFSET, 1); /* after a stop fault nothing is written */
        tbufs_poison(TBUFS(&b.dx, &b.drouter));
        CHECK_STATUS(moe_router_backward(&b.d, test_now.stream), MOE_OK);
        CHECK(tbufs_untouched(TBUFS(&b.dx, &b.drouter)), "after a stop fault");
        bufs_free(&b);
    }
}

static void test_no_tokens(void)
{
    trand r = trand_new(7);
    for (int accumulate = 0; accumulate < 2; ++accumulate) {
        router_case c = normal_case(0, 16, 5);
        router_bufs b;
        float* got;
        c.accumulate = accumulate;
        bufs_new(&b, &c, &r);
        b.d.x = b.d.router = b.d.dlogits = 0;
        CHECK_STATUS(moe_router_backward(&b.d, test_now.stream), MOE_OK);
        got = (float*)tbuf_copy(&b.drouter);
        for (int i = 0; i < 16 * 5; ++i)
            CHECK(got[i] == (accumulate ? ((float*)b.h_drouter)[i] : 0), "number %d", i);
        free(got);
        bufs_free(&b);
    }
}

TEST_REFUSED(refused, moe_router_backward, moe_router_backward_prepare, moe_router_backward)

static void test_refused(void)
{
    trand r = trand_new(8);
    router_case c = normal_case(20, 64, 8);
    router_bufs b;
    moe_router_backward_desc good, d;
    bufs_new(&b, &c, &r);
    good = b.d;
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED_EACH(hidden, MOE_ERR_RANGE, hidden, 0, -64, (1 << 28) + 8);
    REFUSED_NUM_EXPERTS();
    REFUSED_EACH(x_dtype, MOE_ERR_DTYPE, x_dtype, 4, -1);
    REFUSED_EACH(router_dtype, MOE_ERR_DTYPE, router_dtype, 4, -1);
    REFUSED_EACH(grad_dtype, MOE_ERR_DTYPE, grad_dtype, 4, -1,
                 test_half() == MOE_FP16 ? MOE_BF16 : MOE_FP16);
    REFUSED_EACH(dx_accumulate, MOE_ERR_OPTION, dx_accumulate, 2, -1);
    REFUSED_EACH(accumulate, MOE_ERR_OPTION, accumulate, 2, -1);
    REFUSED_EACH(x_stride, MOE_ERR_STRIDE, x_stride, 63, -64);
    REFUSED_EACH(router_stride, MOE_ERR_STRIDE, router_stride, 63, -64);
    REFUSED_EACH(dlogits_stride, MOE_ERR_STRIDE, dlogits_stride, 7, -8);
    REFUSED_EACH(dx_stride, MOE_ERR_STRIDE, dx_stride, 63, -64);
    REFUSED(d.x = 0, MOE_ERR_NULL, x);
    REFUSED(d.router = 0, MOE_ERR_NULL, router);
    REFUSED(d.dlogits = 0, MOE_ERR_NULL, dlogits);
    REFUSED(d.x = AT(d.x, 1), MOE_ERR_ALIGN, x);
    REFUSED(d.router = AT(d.router, 1), MOE_ERR_ALIGN, router);
    REFUSED(d.dlogits = (const float*)AT(d.dlogits, 2), MOE_ERR_ALIGN, dlogits);
    REFUSED(d.dx = AT(d.dx, 1), MOE_ERR_ALIGN, dx);
    REFUSED(d.drouter = AT(d.drouter, 2), MOE_ERR_ALIGN, drouter);
    REFUSED(d.dx = (void*)d.x, MOE_ERR_OVERLAP, dx);
    REFUSED(d.drouter = (void*)d.router, MOE_ERR_OVERLAP, drouter);
    REFUSED(d.drouter = (void*)d.dlogits, MOE_ERR_OVERLAP, drouter);
    if (test_half() == MOE_BF16) {
        REFUSED(d.workspace = AT(d.workspace, 16), MOE_ERR_ALIGN, workspace);
        REFUSED(--d.workspace_bytes, MOE_ERR_WORKSPACE, workspace_bytes);
        REFUSED((d.workspace = (void*)((uintptr_t)d.x / 256 * 256)), MOE_ERR_OVERLAP, workspace);
    }
    REFUSED_RANK_AND_FAULT();
    CHECK_STATUS(moe_router_backward(0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_router_backward_prepare(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_router_backward_run(0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_router_backward_workspace(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK(tbufs_untouched(TBUFS(&b.dx, &b.drouter)), "outputs of refused calls");
    bufs_free(&b);
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_values);
    RUN(test_many);
    RUN(test_padding);
    RUN(test_special);
    RUN(test_differences);
    RUN(test_bits);
    RUN(test_no_tokens);
    RUN(test_refused);
    return test_end();
}
