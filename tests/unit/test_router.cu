/* test_router.cu: moe/router.cuh against its reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_router.cu -o test_router
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_router.cu -o test_router

   test_router_dtypes       all pairs of dtypes, shapes and strides
   test_router_fallback     single properties that tensor cores do not take
   test_router_ragged       E that is no multiple of 8, with either tile
   test_router_shapes       drawn shapes
   test_router_split        both tiles of the bf16 split
   test_router_split_exact  every bit of a weight survives the split
   test_router_no_tokens    T = 0
   test_router_nan          NaN stays in its token, on every path
   test_router_stopped      after a stop fault nothing is written
   test_router_refusals     every field, with its status
   test_router_same_bits    the same bits over runs
   test_router_batch        with batch_invariant the same bits for some tokens alone, on every path
   router/large.h           large shapes, and rows past 2^32 elements */
#include "tests/test.h"
#include "tests/test_weights.h"

/* The router asks for nothing else. */
#define MOE_GEMM_VARIANT_LIST(X, ...)                                                             \
    X(f16_kk, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                    \
    X(bf16_kk, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)
#include "moe/ref/router.h"
#include "moe/router.cuh"

typedef struct router_case {
    int T, H, E;
    int x_dtype, router_dtype;
    int x_pad, router_pad, logits_pad; /* stride - dense */
    int x_at, router_at, logits_at;    /* misalignment, elements */
    int fill;
} router_case;

typedef struct router_bufs {
    tbuf x, router, logits, fault;
    void *h_x, *h_router;
    moe_router_desc d;
} router_bufs;

static const char* case_text(const router_case* c)
{
    static char text[200];
    snprintf(text, sizeof text, "T=%d H=%d E=%d %s x %s pads %d %d %d misaligned by %d %d %d", c->T,
             c->H, c->E, moe_dtype_name(c->x_dtype), moe_dtype_name(c->router_dtype), c->x_pad,
             c->router_pad, c->logits_pad, c->x_at, c->router_at, c->logits_at);
    return text;
}

static router_case normal_case(int T, int H, int E)
{
    router_case c;
    memset(&c, 0, sizeof c);
    c.T = T;
    c.H = H;
    c.E = E;
    c.x_dtype = c.router_dtype = MOE_BF16;
    return c;
}

static void bufs_new(router_bufs* b, const router_case* c, trand* r)
{
    const int64_t x_stride = c->H + c->x_pad, router_stride = c->H + c->router_pad;
    const int x_bytes = moe_dtype_bytes(c->x_dtype),
              router_bytes = moe_dtype_bytes(c->router_dtype);
    memset(b, 0, sizeof *b);
    b->h_x = trows_new(r, c->T, x_stride, c->H, c->x_dtype, c->fill, 1);
    b->h_router = trows_new(r, c->E, router_stride, c->H, c->router_dtype, c->fill,
                            (float)(1 / sqrt((double)c->H)));
    /* of few logits one may be about zero by chance: of token 0's products the first half (of a few
       all) are positive, the signs of the others alternate */
    for (int64_t i = 0; (int64_t)c->T * c->E < 8 && i < (int64_t)c->E * c->H; ++i) {
        const int64_t h = i % c->H, at = i / c->H * router_stride + h;
        const float w = moe_load(b->h_router, at, c->router_dtype);
        const int positive = c->H < 32 || h <= c->H / 2 || h % 2;
        if ((moe_load(b->h_x, h, c->x_dtype) * w > 0) != positive)
            moe_store(b->h_router, at, c->router_dtype, -w);
    }
    b->x = tbuf_from("x", b->h_x, (size_t)moe_extent(c->T, x_stride, c->H, c->x_dtype),
                     (size_t)(c->x_at * x_bytes));
    b->router = tbuf_from("router", b->h_router,
                          (size_t)moe_extent(c->E, router_stride, c->H, c->router_dtype),
                          (size_t)(c->router_at * router_bytes));
    b->logits = tbuf_new("logits", (size_t)moe_extent(c->T, c->E + c->logits_pad, c->E, MOE_FP32),
                         (size_t)c->logits_at * 4);
    b->fault = tfault_new(0);
    b->d.x = b->x.p;
    b->d.router = b->router.p;
    b->d.x_stride = c->x_pad ? x_stride : 0;
    b->d.router_stride = c->router_pad ? router_stride : 0;
    b->d.x_dtype = c->x_dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->x_dtype;
    b->d.router_dtype = c->router_dtype == c->x_dtype ? MOE_DTYPE_DEFAULT : c->router_dtype;
    b->d.logits = (float*)b->logits.p;
    b->d.logits_stride = c->logits_pad ? c->E + c->logits_pad : 0;
    b->d.fault = (uint64_t*)b->fault.p;
    b->d.num_tokens = c->T;
    b->d.hidden = c->H;
    b->d.num_experts = c->E;
}

static void bufs_free(router_bufs* b)
{
    tbuf_free(&b->x);
    tbuf_free(&b->router);
    tbuf_free(&b->logits);
    tbuf_free(&b->fault);
    free(b->h_x);
    free(b->h_router);
}

/* Must tensor cores take it, and how? As router.cuh documents it; where this binary holds no code
   for the dtype, they do not. */
enum { SCALAR, GEMM, SPLIT, RAGGED, WAYS };
static int wanted_way(const router_case* c)
{
    const int half = c->x_dtype != MOE_FP32 && c->H % 8 == 0 && c->x_pad % 8 == 0 &&
                     c->x_at % 8 == 0;
    if (half && c->x_dtype == c->router_dtype && c->router_pad % 8 == 0 && c->router_at % 8 == 0 &&
        test_gemm_status(c->x_dtype, MOE_TILE_AUTO) == MOE_OK)
        return c->E % 8 == 0 && c->logits_pad % 8 == 0 && c->logits_at % 4 == 0 ? GEMM : RAGGED;
    if (half && c->router_dtype == MOE_FP32 && c->router_pad % 4 == 0 && c->router_at % 4 == 0 &&
        test_gemm_status(MOE_BF16, MOE_TILE_AUTO) == MOE_OK)
        return SPLIT;
    return SCALAR;
}

/* A shape that goes one of the ways. */
static router_case case_of(int way, int T, int H, int E)
{
    router_case c = normal_case(T, way == SCALAR ? H - 1 : H, way == RAGGED ? E - 1 : E);
    if (way == SPLIT) c.router_dtype = MOE_FP32;
    return c;
}

/* Every `step`-th token. */
static void compare_some(const router_bufs* b, const router_case* c, int step)
{
    const int before = test_now.failures;
    const int64_t T = c->T, E = c->E, H = c->H, stride = E + c->logits_pad;
    const int64_t x_stride = H + c->x_pad, router_stride = H + c->router_pad, n = (T + step - 1) / step;
    double* exact = (double*)test_host(n * E * 8);
    double* sum = (double*)test_host(n * E * 8);
    double* x = (double*)test_host(n * H * 8);
    double* w = (double*)test_host(E * H * 8);
    float* logits = (float*)tbuf_copy(&b->logits);
    float* some = (float*)test_host(n * E * 4);
    int64_t written, wrong = 0;
    moe_ref_router_desc r;
    memset(&r, 0, sizeof r);
    r.x = x;
    r.w = w;
    r.x_dtype = r.w_dtype = MOE_REF_REAL;
    r.num_tokens = (int)n;
    r.num_experts = c->E;
    r.hidden = c->H;
    for (int absolute = 0; absolute < 2; ++absolute) { /* sum x w, then sum |x| |w| */
        for (int64_t t = 0; t < n; ++t)
            for (int64_t h = 0; h < H; ++h) {
                const double v = moe_load(b->h_x, t * step * x_stride + h, c->x_dtype);
                x[t * H + h] = absolute ? fabs(v) : v;
            }
        for (int64_t e = 0; e < E; ++e)
            for (int64_t h = 0; h < H; ++h) {
                const double v = moe_load(b->h_router, e * router_stride + h, c->router_dtype);
                w[e * H + h] = absolute ? fabs(v) : v;
            }
        moe_ref_router_f64(&r, absolute ? sum : exact);
    }
    for (int64_t t = 0; t < n; ++t)
        for (int64_t e = 0; e < E; ++e) {
            some[t * E + e] = logits[t * step * stride + e];
            wrong += c->fill == TFILL_INT && !(some[t * E + e] == exact[t * E + e]);
        }
    written = test_strays(logits, (int64_t)b->logits.bytes, 4, stride, E, 0, T);
    CHECK(written == 0, "%lld bytes between the rows were written", (long long)written);
    CHECK(wrong == 0, "%lld are not the exact sum", (long long)wrong);
    CHECK_CLOSE_SUM("logits", some, E, exact, sum, c->H, n, E);
    CHECK_FAULT(&b->fault, MOE_FAULT_NONE, 0);
    CHECK(tbuf_holds(&b->x, b->h_x) && tbuf_holds(&b->router, b->h_router), "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    free(exact);
    free(sum);
    free(x);
    free(w);
    free(logits);
    free(some);
}

/* The path for this descriptor must be the one that the case is documented to take. */
static void check_path(const moe_router_desc* d, const router_case* c)
{
    const int way = wanted_way(c);
    int path = -1;
    CHECK_STATUS(moe_router_plan(d, &path), MOE_OK);
    CHECK(way == SPLIT ? path == MOE_ROUTER_BF16_SPLIT_LARGE || path == MOE_ROUTER_BF16_SPLIT_SMALL
          : way == RAGGED
              ? path == MOE_ROUTER_RAGGED_NARROW || (path == MOE_ROUTER_RAGGED_WIDE && c->E > 64)
              : path == (way == GEMM ? MOE_ROUTER_GEMM : MOE_ROUTER_SCALAR),
          "%s: path %d", case_text(c), path);
}

/* Does a block of the device have the shared memory of this tile? */
static int split_fits(int small, int x_dtype)
{
    moe_device dev;
    return moe_device_query(&dev) == MOE_OK &&
           moei_bf16_split_variant(small, x_dtype)->smem <= (size_t)dev.smem_block;
}

/* Queues the split product with one tile or the other, whatever the shape would choose. */
static moe_status call_split(moe_router_desc d, int small)
{
    moe_router_prepared p;
    MOE_TRY(moe_router_prepare(&d, &p));
    CHECK(p.path == MOE_ROUTER_BF16_SPLIT_LARGE || p.path == MOE_ROUTER_BF16_SPLIT_SMALL, "path %d",
          p.path);
    MOE_TRY(moei_bf16_split_prepare(&p.gemm.launch, &p.args, small));
    return moe_router_run(&p, test_now.stream);
}

static void run_case(const router_case* c, trand* r)
{
    router_bufs b;
    bufs_new(&b, c, r);
    check_path(&b.d, c);
    if (CHECK_STATUS(moe_router_logits(&b.d, test_now.stream), MOE_OK)) compare_some(&b, c, 1);
    bufs_free(&b);
}

/* All pairs of dtypes; shapes and strides for tensor cores, then others. */
static void test_router_dtypes(void)
{
    trand r = trand_new(1);
    for (int x = MOE_FP32; x <= MOE_BF16; ++x)
        for (int w = MOE_FP32; w <= MOE_BF16; ++w)
            for (int i = 0; i < 6; ++i) {
                router_case c = normal_case(i & 1 ? 65 : 33, i & 2 ? 136 : 64, i & 1 ? 72 : 8);
                c.x_dtype = x;
                c.router_dtype = w;
                c.fill = i == 5 ? TFILL_INT : TFILL_NORMAL;
                if (i == 3) c.x_pad = 8, c.router_pad = 16, c.logits_pad = 8;
                if (i == 4) c.H = 71, c.E = 13;
                run_case(&c, &r);
            }
}

/* One thing at a time that tensor cores do not take. */
static void test_router_fallback(void)
{
    trand r = trand_new(2);
    for (int i = 0; i < 9; ++i)
        for (int dtype = MOE_FP16; dtype <= MOE_BF16; ++dtype) {
            router_case c = normal_case(67, 80, 72);
            c.x_dtype = c.router_dtype = dtype;
            if (i == 0) c.H = 81;
            if (i == 1) c.E = 71;
            if (i == 2) c.x_pad = 3;
            if (i == 3) c.router_pad = 1;
            if (i == 4) c.logits_pad = 5;
            if (i == 5) c.x_at = 1;
            if (i == 6) c.router_at = 3;
            if (i == 7) c.logits_at = 1;
            if (i == 8) c.router_dtype = dtype == MOE_FP16 ? MOE_BF16 : MOE_FP16;
            if (test_gemm_status(dtype, MOE_TILE_AUTO) == MOE_OK)
                CHECK(wanted_way(&c) == (i == 1 || i == 4 || i == 7 ? RAGGED : SCALAR), "case %d",
                      i);
            run_case(&c, &r);
        }
}

/* Queues the ragged product with one tile or the other, whatever the shape would choose. */
static moe_status call_ragged(moe_router_desc d, int narrow)
{
    moe_router_prepared p;
    moe_grouped_gemm_desc g;
    MOE_TRY(moe_router_prepare(&d, &p));
    CHECK(p.path == MOE_ROUTER_RAGGED_WIDE || p.path == MOE_ROUTER_RAGGED_NARROW, "path %d", p.path);
    moei_router_gemm_desc(&d, &g);
    MOE_TRY(moei_ragged_prepare(
        &p.gemm.launch, &g,
        moei_variant_find(moei_ragged_variants,
                          narrow ? MOEI_RAGGED_TILE_narrow : MOEI_RAGGED_TILE_wide, p.args.x_dtype,
                          MOE_MAJOR_K, MOE_MAJOR_K)));
    return moe_router_run(&p, test_now.stream);
}

/* Numbers of experts that are no multiple of 8, those of models among them, on tensor cores with
   either tile: no scalar path, no stray write between rows of logits. */
static void test_router_ragged(void)
{
    static const int Es[] = {1, 7, 12, 60, 65, 100, 127, 129, 130};
    static const int Ts[] = {1, 63, 64, 65, 127, 129, 200}, Hs[] = {8, 24, 32, 64, 72, 136, 200};
    trand r = trand_new(12);
    for (size_t i = 0; i < sizeof Es / sizeof *Es; ++i)
        for (int n = 0; n < (MOE_ON_HOST ? 4 : 20); ++n) {
            router_case c = normal_case(Ts[trand_int(&r, 0, 6)], Hs[trand_int(&r, 0, 6)], Es[i]);
            float* both[2];
            c.x_dtype = c.router_dtype = n & 1 ? MOE_FP16 : MOE_BF16;
            c.x_pad = (int)trand_int(&r, 0, 2) * 8;
            c.router_pad = (int)trand_int(&r, 0, 2) * 8;
            c.logits_pad = (int)trand_int(&r, 0, 5);
            c.logits_at = (int)trand_int(&r, 0, 3);
            c.fill = n == 3 && c.T * c.E > 100 ? TFILL_INT : TFILL_NORMAL;
            if (wanted_way(&c) == GEMM) c.logits_pad = 1;
            if (wanted_way(&c) != RAGGED) continue; /* the binary lacks the dtype */
            for (int narrow = 0; narrow < 2; ++narrow) {
                router_bufs b;
                trand same = trand_new(100 + n);
                bufs_new(&b, &c, &same);
                check_path(&b.d, &c);
                if (CHECK_STATUS(call_ragged(b.d, narrow), MOE_OK)) compare_some(&b, &c, 1);
                both[narrow] = (float*)tbuf_copy(&b.logits);
                if (narrow)
                    CHECK(memcmp(both[0], both[1], b.logits.bytes) == 0,
                          "%s: the tiles give different bits", case_text(&c));
                bufs_free(&b);
            }
            free(both[0]);
            free(both[1]);
        }
}

static void test_router_shapes(void)
{
    static const int Ts[] = {1, 2, 31, 64, 65, 129}, Es[] = {1, 5, 8, 64, 65, 136};
    static const int Hs[] = {1, 7, 8, 16, 17, 72, 256};
    trand r = trand_new(3);
    for (size_t i = 0; i < sizeof Ts / sizeof *Ts; ++i)
        for (size_t j = 0; j < sizeof Es / sizeof *Es; ++j)
            for (size_t k = 0; k < sizeof Hs / sizeof *Hs; ++k) {
                router_case c = normal_case(Ts[i], Hs[k], Es[j]);
                c.x_dtype = (int)trand_int(&r, MOE_FP32, MOE_BF16);
                c.router_dtype = trand_int(&r, 0, 2) ? c.x_dtype : (int)trand_int(&r, 1, 3);
                c.x_pad = trand_int(&r, 0, 1) ? 0 : (int)trand_int(&r, 1, 17);
                c.router_pad = trand_int(&r, 0, 1) ? 0 : (int)trand_int(&r, 1, 17);
                c.logits_pad = trand_int(&r, 0, 1) ? 0 : (int)trand_int(&r, 1, 17);
                /* a few sums of whole numbers may all be zero */
                c.fill = Hs[k] < 8 || Es[j] * Ts[i] < 16 ? TFILL_NORMAL : (int)trand_int(&r, 0, 1);
                run_case(&c, &r);
            }
}

/* Both tiles of the split product over shapes and strides. */
static void test_router_split(void)
{
    static const int Ts[] = {1, 17, 33, 64, 129, 200}, Es[] = {1, 13, 16, 33, 128, 131};
    static const int Hs[] = {8, 16, 32, 40, 64, 104, 584};
    trand r = trand_new(10);
    for (int i = 0; i < (MOE_ON_HOST ? 24 : 200); ++i) {
        router_case c = normal_case(Ts[trand_int(&r, 0, 5)], Hs[i % 7], Es[trand_int(&r, 0, 5)]);
        c.x_dtype = i & 1 ? MOE_FP16 : MOE_BF16;
        c.router_dtype = MOE_FP32;
        c.x_pad = (int)trand_int(&r, 0, 2) * 8;
        c.router_pad = (int)trand_int(&r, 0, 2) * 4;
        c.logits_pad = (int)trand_int(&r, 0, 5);
        c.logits_at = (int)trand_int(&r, 0, 3);
        for (int small = 0; small < 2 && wanted_way(&c) == SPLIT; ++small) {
            router_bufs b;
            if (!split_fits(small, c.x_dtype)) continue;
            bufs_new(&b, &c, &r);
            if (CHECK_STATUS(call_split(b.d, small), MOE_OK)) compare_some(&b, &c, 1);
            bufs_free(&b);
        }
    }
}

/* A token whose only number is a 1 gets the weights themselves, every bit of them: none is rounded.
   One with a 1 and a -1 gets the difference of two weights, which here is all in bits that bf16
   does not have. Whole range of fp32, infinities and NaN. */
static void test_router_split_exact(void)
{
    enum { T = 40, H = 80, E = 24, SPECIAL = 12 };
    static const uint32_t special[SPECIAL] = {
        0x7f7fffffu, 0xff7fffffu, 0x3f800008u, 0x3f7fffffu, 0x0d800001u, 0x7f000001u,
        0x00000000u, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7f800001u, 0xffc00001u};
    trand r = trand_new(11);
    for (int way = 0; way < 4; ++way) {
        const int small = way & 1, H0 = 3 + (int)trand_int(&r, 0, H - 4);
        router_case c = normal_case(T, H, E);
        router_bufs b;
        float* got;
        int wrong = 0;
        c.x_dtype = way & 2 ? MOE_FP16 : MOE_BF16;
        c.router_dtype = MOE_FP32;
        if (wanted_way(&c) != SPLIT) return;
        if (!split_fits(small, c.x_dtype)) continue;
        bufs_new(&b, &c, &r);
        for (int e = 0; e < E; ++e) { /* exponents -90 .. 37; column 0 is 1, column 1 just above */
            for (int h = 0; h < H; ++h) {
                const uint32_t u = (uint32_t)trand_bits(&r);
                ((uint32_t*)b.h_router)[e * H + h] =
                    (u & 0x807fffffu) | (uint32_t)trand_int(&r, 37, 164) << 23;
            }
            ((float*)b.h_router)[e * H] = 1;
            ((float*)b.h_router)[e * H + 1] = 1 + (float)(e + 1) * ldexpf(1, -20);
        }
        for (int t = 0; t < T; ++t)
            for (int h = 0; h < H; ++h) moe_store(b.h_x, t * H + h, c.x_dtype, 0);
        moe_store(b.h_x, 0, c.x_dtype, -1);
        moe_store(b.h_x, 1, c.x_dtype, 1);
        for (int t = 1; t < T; ++t) moe_store(b.h_x, t * H + t, c.x_dtype, t & 1 ? 1 : -1);
        tbuf_put(&b.x, b.h_x);
        tbuf_put(&b.router, b.h_router);
        if (!CHECK_STATUS(call_split(b.d, small), MOE_OK)) return;
        got = (float*)tbuf_copy(&b.logits);
        for (int e = 0; e < E; ++e) {
            wrong += got[e] != (float)(e + 1) * ldexpf(1, -20);
            for (int t = 1; t < T; ++t)
                wrong += got[t * E + e] != (t & 1 ? 1 : -1) * ((float*)b.h_router)[e * H + t];
        }
        CHECK(wrong == 0, "way %d: %d logits are not the weight", way, wrong);
        free(got);

        for (int e = 0; e < SPECIAL; ++e) ((uint32_t*)b.h_router)[e * H + H0] = special[e];
        for (int h = 0; h < H; ++h) moe_store(b.h_x, h, c.x_dtype, h == H0);
        tbuf_put(&b.x, b.h_x);
        tbuf_put(&b.router, b.h_router);
        CHECK_STATUS(call_split(b.d, small), MOE_OK);
        got = (float*)tbuf_copy(&b.logits);
        for (int e = 0; e < SPECIAL; ++e) {
            const float want = moe_f32_from_bits(special[e]);
            const int nan = isnan(want) || (isinf(want) && c.x_dtype == MOE_FP16);
            CHECK(nan ? got[e] != got[e] : got[e] == want, "way %d: weight %08x gives %g", way,
                  (unsigned)special[e], got[e]);
        }
        for (int e = SPECIAL; e < E; ++e) /* the others do not see it */
            CHECK(got[e] == ((float*)b.h_router)[e * H + H0], "way %d: expert %d", way, e);
        free(got);
        bufs_free(&b);
    }
}

static void test_router_no_tokens(void)
{
    moe_router_desc d;
    memset(&d, 0, sizeof d);
    d.hidden = 64;
    d.num_experts = 8;
    CHECK_STATUS(moe_router_logits(&d, test_now.stream), MOE_OK);
    d.hidden = 0;
    CHECK_STATUS(moe_router_logits(&d, test_now.stream), MOE_STATUS(MOE_ERR_RANGE, hidden));
}

/* A NaN in a token is that token's alone, on every path. */
static void test_router_nan(void)
{
    trand r = trand_new(4);
    for (int way = SCALAR; way < WAYS; ++way) {
        router_case c = case_of(way, 70, 64, 16);
        router_bufs b;
        float* got;
        int wrong = 0;
        bufs_new(&b, &c, &r);
        moe_store(b.h_x, 37 * c.H + 5, MOE_BF16, NAN);
        tbuf_put(&b.x, b.h_x);
        CHECK_STATUS(moe_router_logits(&b.d, test_now.stream), MOE_OK);
        got = (float*)tbuf_copy(&b.logits);
        for (int e = 0; e < c.E; ++e) wrong += got[37 * c.E + e] == got[37 * c.E + e];
        CHECK(wrong == 0, "the token's logits are NaN");
        moe_store(b.h_x, 37 * c.H + 5, MOE_BF16, 0);
        memset(got + 37 * c.E, 0, (size_t)c.E * 4);
        { /* the others: as if the token were zeros */
            for (int h = 0; h < c.H; ++h) moe_store(b.h_x, 37 * c.H + h, MOE_BF16, 0);
            tbuf_put(&b.x, b.h_x);
            tbuf_put(&b.logits, got);
            compare_some(&b, &c, 1);
        }
        free(got);
        bufs_free(&b);
    }
}

/* After a stop fault nothing happens, on every path. */
static void test_router_stopped(void)
{
    trand r = trand_new(5);
    for (int way = SCALAR; way < WAYS; ++way) {
        const uint64_t stop = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 2), none = 0;
        router_case c = case_of(way, 20, 64, 16);
        router_bufs b;
        bufs_new(&b, &c, &r);
        tbuf_put(&b.fault, &stop);
        CHECK_STATUS(moe_router_logits(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.logits, 0), "after a stop fault");
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 2);
        tbuf_put(&b.fault, &none);
        b.d.fault = 0;
        CHECK_STATUS(moe_router_logits(&b.d, test_now.stream), MOE_OK);
        compare_some(&b, &c, 1);
        bufs_free(&b);
    }
}

TEST_REFUSED(refused, moe_router_logits, moe_router_prepare, moe_router)

static void test_router_refusals(void)
{
    trand r = trand_new(6);
    router_case c = normal_case(20, 64, 16);
    router_bufs b;
    moe_router_desc good, d;
    bufs_new(&b, &c, &r);
    good = b.d;
    CHECK_STATUS(moe_router_logits(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED_EACH(hidden, MOE_ERR_RANGE, hidden, 0, -64);
    REFUSED_EACH(num_experts, MOE_ERR_RANGE, num_experts, 0, -1, INT32_MAX);
    REFUSED(d.batch_invariant = 2, MOE_ERR_OPTION, batch_invariant);
    REFUSED_RANK_AND_FAULT();
    REFUSED_EACH(x_dtype, MOE_ERR_DTYPE, x_dtype, 4, -1);
    REFUSED_EACH(router_dtype, MOE_ERR_DTYPE, router_dtype, 4, -1);
    REFUSED_EACH(x_stride, MOE_ERR_STRIDE, x_stride, 63, -64);
    REFUSED_EACH(router_stride, MOE_ERR_STRIDE, router_stride, 63, -64);
    REFUSED_EACH(logits_stride, MOE_ERR_STRIDE, logits_stride, 15, -16);
    REFUSED(d.x = 0, MOE_ERR_NULL, x);
    REFUSED(d.router = 0, MOE_ERR_NULL, router);
    REFUSED(d.logits = 0, MOE_ERR_NULL, logits);
    REFUSED(d.x = AT(d.x, 1), MOE_ERR_ALIGN, x);
    REFUSED((d.x = AT(d.x, 2), d.x_dtype = MOE_FP32), MOE_ERR_ALIGN, x);
    REFUSED(d.router = AT(d.router, 1), MOE_ERR_ALIGN, router);
    REFUSED((d.router = AT(d.router, 2), d.router_dtype = MOE_FP32), MOE_ERR_ALIGN, router);
    REFUSED(d.logits = (float*)AT(d.logits, 2), MOE_ERR_ALIGN, logits);
    REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
    REFUSED(d.logits = (float*)d.x, MOE_ERR_OVERLAP, logits);
    REFUSED(d.logits = (float*)AT(d.x, 20 * 64 * 2 - 4), MOE_ERR_OVERLAP, logits);
    REFUSED(d.logits = (float*)AT(d.router, 16 * 64 * 2 - 4), MOE_ERR_OVERLAP, logits);
    REFUSED(d.fault = (uint64_t*)d.x, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.router, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)AT(d.logits, 20 * 16 * 4 - 8), MOE_ERR_OVERLAP, fault);
    { /* rows apart: the last of them, and what lies beyond the dense extent */
        tbuf big = tbuf_new("big", 20 * 72 * 4 + 64, 0);
        char *p = (char*)big.p, *last = p + 19 * 72 * 2, *last_w = p + 15 * 80 * 2;
        REFUSED((d.x = p, d.x_stride = 72, d.fault = (uint64_t*)(last + 120)), MOE_ERR_OVERLAP,
                fault);
        REFUSED((d.x = p, d.x_stride = 72, d.logits = (float*)(last + 124)), MOE_ERR_OVERLAP,
                logits);
        REFUSED((d.router = p, d.router_stride = 80, d.fault = (uint64_t*)(last_w + 120)),
                MOE_ERR_OVERLAP, fault);
        REFUSED((d.router = p, d.router_stride = 80, d.logits = (float*)(last_w + 124)),
                MOE_ERR_OVERLAP, logits);
        REFUSED((d.logits = (float*)p, d.logits_stride = 72,
                 d.fault = (uint64_t*)(p + 19 * 72 * 4 + 56)),
                MOE_ERR_OVERLAP, fault);
        CHECK(tbuf_holds(&big, 0), "a refused call wrote something");
        tbuf_free(&big);
    }
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.logits, 0), "a refused call wrote logits");
    CHECK_STATUS(moe_router_logits(&good, test_now.stream), MOE_OK);
    compare_some(&b, &c, 1);
    bufs_free(&b);
}

TEST_CALL(call_router, moe_router_logits, moe_router_desc)

static void test_router_same_bits(void)
{
    trand r = trand_new(7);
    CHECK_STATUS(moe_router_preload(), MOE_OK);
    for (int way = SCALAR; way < WAYS; ++way) {
        router_case c = case_of(way, 150, 200, 72);
        router_bufs b;
        tgraph g;
        bufs_new(&b, &c, &r);
        test_same_bits("router", call_router, &b.d, TBUFS(&b.logits), MOE_ON_HOST ? 3 : 100);
        if (tgraph_capture(&g, call_router, &b.d)) {
            void* x = trows_new(&r, c.T, c.H, c.H, MOE_BF16, TFILL_NORMAL, 1);
            free(b.h_x);
            b.h_x = x;
            tbuf_put(&b.x, x);
            tbuf_poison(&b.logits);
            tgraph_launch(&g);
            compare_some(&b, &c, 1);
            tgraph_free(&g);
        }
        bufs_free(&b);
    }
}

static void test_router_batch(void)
{
    static const int counts[] = {4, 32, 100};
    trand r = trand_new(12);
    for (int way = 0; way < WAYS; ++way)
        for (int i = 0; i < 3; ++i) {
            const router_case c = case_of(way, 300, 264, i == 2 ? 200 : 24);
            const int first = 4 * (int)trand_int(&r, 1, 40), count = counts[i];
            const size_t at = (size_t)first * (size_t)c.E;
            router_bufs b;
            int all = -1, some = -1;
            float *want, *got;
            bufs_new(&b, &c, &r);
            b.d.batch_invariant = 1;
            CHECK_STATUS(moe_router_plan(&b.d, &all), MOE_OK);
            CHECK_STATUS(moe_router_logits(&b.d, test_now.stream), MOE_OK);
            want = (float*)tbuf_copy(&b.logits);
            tbuf_poison(&b.logits);
            b.d.x = (const char*)b.d.x + (size_t)first * (size_t)c.H * moe_dtype_bytes(c.x_dtype);
            b.d.logits += at;
            b.d.num_tokens = count;
            CHECK_STATUS(moe_router_plan(&b.d, &some), MOE_OK);
            CHECK(all == some, "way %d: path %s, not %s", way, moe_router_path_name(some),
                  moe_router_path_name(all));
            CHECK_STATUS(moe_router_logits(&b.d, test_now.stream), MOE_OK);
            got = (float*)tbuf_copy(&b.logits);
            CHECK(memcmp(got + at, want + at, (size_t)count * (size_t)c.E * 4) == 0,
                  "way %d, %d tokens: other bits", way, count);
            free(want), free(got);
            bufs_free(&b);
        }
}

#include "tests/unit/router/large.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_router_dtypes);
    RUN(test_router_fallback);
    RUN(test_router_ragged);
    RUN(test_router_shapes);
    RUN(test_router_split);
    RUN(test_router_split_exact);
    RUN(test_router_no_tokens);
    RUN(test_router_nan);
    RUN(test_router_stopped);
    RUN(test_router_refusals);
    RUN(test_router_same_bits);
    RUN(test_router_batch);
    router_large();
    return test_end();
}
