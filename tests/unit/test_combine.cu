/* test_combine.cu: moe/combine.cuh against its reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_combine.cu -o test_combine
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_combine.cu -o test_combine */
#include "tests/test.h"

#include "moe/combine.cuh"
#include "moe/ref/combine.h"
#include "moe/ref/route.h"
#include "moe/route.cuh"

#define MOST_BUFFERS 40

enum { NO_RESIDUAL, RESIDUAL, IN_PLACE };
enum { NO_SHARED, SHARED, SHARED_WEIGHTED };

typedef struct combine_case {
    int T, H, K;
    int buffers; /* allocations; 0: one array and no table */
    int rows;    /* in each of them */
    int rows_dtype, y_dtype;
    int residual;                             /* as above */
    int row_pad, y_pad, residual_pad;         /* stride - H */
    int row_at, y_at, residual_at;            /* misalignment, elements */
    int unweighted;                           /* 1: no weights */
    int dropped, bad;                         /* percent of the slots */
    int bounds;                               /* 1: num_rows is given */
    int bare;                                 /* 1: no fault word */
    int shared, shared_pad, shared_at;        /* as above; stride - H; misalignment, elements */
} combine_case;

typedef struct combine_bufs {
    tbuf buffer[MOST_BUFFERS], table, place, weights, residual, shared, shared_weight, y, fault;
    void* row[MOST_BUFFERS]; /* host copies of the buffers */
    moe_place* h_place;
    float* h_weights;
    void *h_residual, *h_shared;
    float* h_shared_weight;
    int count; /* of buffers */
    moe_combine_desc d;
} combine_bufs;

static const char* case_text(const combine_case* c)
{
    static char text[300];
    snprintf(
        text, sizeof text,
        "T=%d H=%d K=%d buffers=%d rows=%d %s -> %s residual=%d pads %d %d %d, misaligned by %d "
        "%d %d, unweighted=%d dropped=%d%% bad=%d%% bounds=%d bare=%d shared=%d pad %d at %d",
        c->T, c->H, c->K, c->buffers, c->rows, moe_dtype_name(c->rows_dtype),
        moe_dtype_name(c->y_dtype), c->residual, c->row_pad, c->y_pad, c->residual_pad, c->row_at,
        c->y_at, c->residual_at, c->unweighted, c->dropped, c->bad, c->bounds, c->bare, c->shared, c->shared_pad,
        c->shared_at);
    return text;
}

/* Random numbers in the rows, NaN in the gaps between them. */
static void* new_rows(trand* r, int64_t rows, int64_t stride, int H, int dtype)
{
    void* p = test_host(rows * stride * 4);
    for (int64_t i = 0; i < rows; ++i)
        for (int h = 0; h < H; ++h) moe_store(p, i * stride + h, dtype, trand_normal(r));
    return p;
}

/* Places and weights; what a dropped slot weighs is NaN, so nobody may look at it. */
static void fill_places(combine_bufs* b, const combine_case* c, trand* r)
{
    for (int64_t s = 0; s < (int64_t)c->T * c->K; ++s) {
        const int64_t u = trand_int(r, 0, 99);
        moe_place p;
        p.buffer = (int32_t)trand_int(r, 0, b->count - 1);
        p.row = (int32_t)trand_int(r, 0, c->rows - 1);
        b->h_weights[s] = trand_normal(r);
        if (u < c->dropped) {
            p.buffer = -1;
            p.row = u & 1 ? -1 : 5;
            b->h_weights[s] = NAN;
        } else if (u < c->dropped + c->bad) {
            const int64_t how = trand_int(r, 0, c->bounds ? 6 : 4);
            if (how == 0) p.buffer = b->count;
            if (how == 1) p.buffer = -2;
            if (how == 2) p.buffer = INT32_MAX;
            if (how == 3) p.row = -1;
            if (how == 4) p.row = INT32_MIN;
            if (how == 5) p.row = c->rows;
            if (how == 6) p.row = INT32_MAX;
            b->h_weights[s] = NAN;
        }
        b->h_place[s] = p;
    }
}

/* Fills y's buffer with what it holds before the call: poison, or the residual. */
static void reset_y(combine_bufs* b, const combine_case* c)
{
    if (c->residual == IN_PLACE) tbuf_put(&b->y, b->h_residual);
    else tbuf_poison(&b->y);
}

static void bufs_new(combine_bufs* b, const combine_case* c, trand* r)
{
    const int64_t slots = (int64_t)c->T * c->K, row_stride = c->H + c->row_pad;
    const int row_bytes = moe_dtype_bytes(c->rows_dtype), y_bytes = moe_dtype_bytes(c->y_dtype);
    const int y_pad = c->y_pad, residual_pad = c->residual == IN_PLACE ? y_pad : c->residual_pad;
    void* address[MOST_BUFFERS + 1];
    memset(b, 0, sizeof *b);
    b->count = c->buffers ? c->buffers : 1;
    for (int i = 0; i < b->count; ++i) {
        b->row[i] = new_rows(r, c->rows, row_stride, c->H, c->rows_dtype);
        b->buffer[i] =
            tbuf_from("rows", b->row[i], moe_extent(c->rows, row_stride, c->H, c->rows_dtype),
                      (size_t)(c->row_at * row_bytes));
        address[i] = b->buffer[i].p;
    }
    b->h_place = (moe_place*)test_host(slots * 8);
    b->h_weights = (float*)test_host(slots * 4);
    b->h_residual = new_rows(r, c->T, c->H + residual_pad, c->H, c->y_dtype);
    fill_places(b, c, r);
    b->table = tbuf_from("table", address, (size_t)b->count * sizeof(void*), 8);
    b->place = tbuf_from("place", b->h_place, (size_t)slots * 8, 8);
    b->weights = tbuf_from("weights", b->h_weights, (size_t)slots * 4, 4);
    b->residual = tbuf_from("residual", b->h_residual,
                            moe_extent(c->T, c->H + residual_pad, c->H, c->y_dtype),
                            (size_t)(c->residual_at * y_bytes));
    b->h_shared = new_rows(r, c->T, c->H + c->shared_pad, c->H, c->rows_dtype);
    b->shared = tbuf_from("shared", b->h_shared,
                          moe_extent(c->T, c->H + c->shared_pad, c->H, c->rows_dtype),
                          (size_t)(c->shared_at * row_bytes));
    b->h_shared_weight = (float*)test_host(c->T * 4);
    for (int t = 0; t < c->T; ++t) b->h_shared_weight[t] = trand_normal(r);
    b->shared_weight = tbuf_from("shared_weight", b->h_shared_weight, (size_t)c->T * 4, 4);
    b->y = tbuf_new("y", moe_extent(c->T, c->H + y_pad, c->H, c->y_dtype),
                    (size_t)(c->y_at * y_bytes));
    reset_y(b, c);
    b->fault = tfault_new(0);
    if (c->buffers) {
        b->d.table = (const void* const*)b->table.p;
        b->d.num_buffers = b->count;
    } else {
        b->d.rows = b->buffer[0].p;
    }
    b->d.place = (const moe_place*)b->place.p;
    b->d.weights = c->unweighted ? (const float*)0 : (const float*)b->weights.p;
    if (c->residual == RESIDUAL) b->d.residual = b->residual.p;
    if (c->residual == IN_PLACE) b->d.residual = b->y.p;
    if (c->shared) {
        b->d.shared = b->shared.p;
        b->d.shared_stride = c->shared_pad ? c->H + c->shared_pad : 0;
    }
    if (c->shared == SHARED_WEIGHTED) b->d.shared_weight = (const float*)b->shared_weight.p;
    b->d.row_stride = c->row_pad ? row_stride : 0;
    b->d.residual_stride = residual_pad ? c->H + residual_pad : 0;
    b->d.rows_dtype = c->rows_dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->rows_dtype;
    b->d.y = b->y.p;
    b->d.y_stride = y_pad ? c->H + y_pad : 0;
    b->d.y_dtype = c->y_dtype == c->rows_dtype ? MOE_DTYPE_DEFAULT : c->y_dtype;
    b->d.fault = c->bare ? (uint64_t*)0 : (uint64_t*)b->fault.p;
    b->d.rank = TEST_RANK;
    b->d.num_tokens = c->T;
    b->d.hidden = c->H;
    b->d.top_k = c->K;
    b->d.num_rows = c->bounds ? c->rows : 0;
}

static void bufs_free(combine_bufs* b)
{
    for (int i = 0; i < b->count; ++i) {
        tbuf_free(&b->buffer[i]);
        free(b->row[i]);
    }
    tbuf_free(&b->table);
    tbuf_free(&b->place);
    tbuf_free(&b->weights);
    tbuf_free(&b->residual);
    tbuf_free(&b->shared);
    tbuf_free(&b->shared_weight);
    tbuf_free(&b->y);
    tbuf_free(&b->fault);
    free(b->h_shared);
    free(b->h_shared_weight);
    free(b->h_place);
    free(b->h_weights);
    free(b->h_residual);
}

/* Half the distance of two neighbours of the dtype around v. */
static double half_ulp(double v, int dtype)
{
    int e;
    frexp(v, &e);
    if (dtype == MOE_FP16) return ldexp(1, e - 11 < -24 ? -25 : e - 12);
    return ldexp(1, e - 9);
}

static void compare(const combine_bufs* b, const combine_case* c)
{
    const int64_t T = c->T, H = c->H, stride = H + c->y_pad;
    const int before = test_now.failures;
    double* exact = (double*)test_host(T * H * 8);
    double* sum = (double*)test_host(T * H * 8);
    void* y = tbuf_copy(&b->y);
    int64_t bad, zeros = 0, wrong = 0, gaps = 0;
    /* the house bound takes roundings to cancel; a few rows added again and again round alike, each
       addition by up to 2^-24 of the sum */
    const int K = c->K + (c->shared != 0);
    const int terms = c->rows < 8 && K > 4 ? 8 * (K + 1) - 32 : K + 1;
    moe_ref_combine_desc r;
    memset(&r, 0, sizeof r);
    if (c->buffers) r.table = (const void* const*)b->row;
    else r.rows = b->row[0];
    r.num_buffers = b->count;
    r.place = b->h_place;
    r.weights = c->unweighted ? (const float*)0 : b->h_weights;
    r.residual = c->residual ? b->h_residual : (void*)0;
    r.shared = c->shared ? b->h_shared : (void*)0;
    r.shared_weight = c->shared == SHARED_WEIGHTED ? b->h_shared_weight : (float*)0;
    r.shared_stride = H + c->shared_pad;
    r.row_stride = H + c->row_pad;
    r.residual_stride = H + (c->residual == IN_PLACE ? c->y_pad : c->residual_pad);
    r.rows_dtype = c->rows_dtype;
    r.residual_dtype = c->y_dtype;
    r.num_tokens = c->T;
    r.hidden = c->H;
    r.top_k = c->K;
    r.num_rows = c->bounds ? c->rows : 0;
    bad = moe_ref_combine_f64(&r, exact, sum);

    for (int64_t t = 0; t < T; ++t)
        for (int64_t h = 0; h < H; ++h) {
            const int64_t i = t * H + h;
            const double got = moe_load(y, t * stride + h, c->y_dtype);
            const double fp32 = (terms / 16.0 + 2) * ldexp(1, -23) * sum[i];
            zeros += sum[i] == 0;
            if (c->y_dtype == MOE_FP32) continue;
            /* rounded once, from an fp32 sum: tighter than the bound of the house */
            if (!(fabs(got - exact[i]) <= half_ulp(exact[i], c->y_dtype) * 1.0001 + fp32 * 1.0001 ||
                  fabs(got - exact[i]) <= half_ulp(got, c->y_dtype) * 1.0001 + fp32 * 1.0001))
                if (wrong++ == 0)
                    CHECK(0, "token %lld [%lld]: %.9g, not %.9g", (long long)t, (long long)h, got,
                          exact[i]);
            if (sum[i] == 0 && got != 0) CHECK(0, "token %lld is not 0", (long long)t);
        }
    CHECK(wrong == 0, "%lld elements are not the rounded sum", (long long)wrong);
    for (int64_t t = 0; t + 1 < T; ++t) /* what stands between the rows is not y's */
        for (int64_t h = H; h < stride; ++h) {
            const float g = moe_load(y, t * stride + h, c->y_dtype);
            gaps += g == g;
        }
    CHECK(gaps == 0, "%lld elements between the rows of y were written", (long long)gaps);
    if (zeros == T * H) {
        for (int64_t t = 0; t < T; ++t)
            for (int64_t h = 0; h < H; ++h)
                CHECK(moe_load(y, t * stride + h, c->y_dtype) == 0, "nothing to add gives 0");
    } else if (c->y_dtype == MOE_FP32) {
        CHECK_CLOSE_SUM("y", y, stride, exact, sum, terms, T, H);
    } else {
        CHECK_CLOSE("y", y, c->y_dtype, stride, exact, (const double*)0, T, H);
    }
    CHECK_FAULT(&b->fault, bad < 0 || c->bare ? MOE_FAULT_NONE : MOE_FAULT_BAD_PLACE,
                bad < 0 || c->bare ? 0 : bad);
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    free(exact);
    free(sum);
    free(y);
}

static void run_case(const combine_case* c, trand* r)
{
    combine_bufs b;
    bufs_new(&b, c, r);
    CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
    compare(&b, c);
    for (int i = 0; i < b.count; ++i)
        CHECK(tbuf_holds(&b.buffer[i], b.row[i]), "rows were written");
    CHECK(tbuf_holds(&b.residual, b.h_residual) && tbuf_holds(&b.place, b.h_place) &&
              tbuf_holds(&b.shared, b.h_shared) && tbuf_holds(&b.shared_weight, b.h_shared_weight),
          "inputs");
    bufs_free(&b);
}

/* The usual shape of a case: one allocation an expert, reached through the table. */
static combine_case normal_case(int T, int H, int K)
{
    combine_case c;
    memset(&c, 0, sizeof c);
    c.T = T;
    c.H = H;
    c.K = K;
    c.buffers = 7;
    c.rows = 5;
    c.rows_dtype = MOE_BF16;
    c.y_dtype = MOE_BF16;
    c.dropped = 10;
    c.bounds = 1;
    return c;
}

static combine_case random_case(trand* r, int T, int H, int K)
{
    combine_case c = normal_case(T, H, K);
    c.buffers = trand_int(r, 0, 3) ? (int)trand_int(r, 1, 12) : 0;
    c.rows = (int)trand_int(r, 1, 9);
    c.rows_dtype = (int)trand_int(r, MOE_FP32, MOE_BF16);
    c.y_dtype = (int)trand_int(r, MOE_FP32, MOE_BF16);
    c.residual = (int)trand_int(r, NO_RESIDUAL, IN_PLACE);
    c.row_pad = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 17);
    c.y_pad = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 17);
    c.residual_pad = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 17);
    c.row_at = trand_int(r, 0, 2) ? 0 : (int)trand_int(r, 1, 9);
    c.y_at = trand_int(r, 0, 2) ? 0 : (int)trand_int(r, 1, 9);
    c.residual_at = trand_int(r, 0, 2) ? 0 : (int)trand_int(r, 1, 9);
    c.unweighted = trand_int(r, 0, 4) == 0;
    c.dropped = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 60);
    c.bad = trand_int(r, 0, 2) ? 0 : (int)trand_int(r, 1, 20);
    c.bounds = (int)trand_int(r, 0, 1);
    c.bare = trand_int(r, 0, 5) == 0;
    c.shared = trand_int(r, 0, 1) ? NO_SHARED : (int)trand_int(r, SHARED, SHARED_WEIGHTED);
    c.shared_pad = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 17);
    c.shared_at = trand_int(r, 0, 2) ? 0 : (int)trand_int(r, 1, 9);
    return c;
}

/* Every H with every K, the rest drawn. */
static void test_combine_shapes(void)
{
    static const int Hs[] = {1,   3,   4,   7,    8,    16,   31,   100,
                             128, 250, 256, 1000, 1024, 2048, 2056, 4104};
    static const int Ks[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 70};
    static const int Ts[] = {1, 2, 3, 31, 32, 33};
    trand r = trand_new(1);
    for (size_t i = 0; i < sizeof Hs / sizeof *Hs; ++i)
        for (size_t j = 0; j < sizeof Ks / sizeof *Ks; ++j)
            for (int n = 0; n < (MOE_ON_HOST ? 2 : 6); ++n) {
                const int T = Ts[trand_int(&r, 0, MOE_ON_HOST && Hs[i] > 500 ? 2 : 5)];
                const combine_case c = random_case(&r, T, Hs[i], Ks[j]);
                run_case(&c, &r);
            }
}

/* No K is too large. */
static void test_combine_many_choices(void)
{
    trand r = trand_new(14);
    for (int H = 7; H <= 8; ++H) {
        combine_case c = normal_case(2, H, 2000);
        run_case(&c, &r);
        c.shared = SHARED;
        c.K = MOE_COMBINE_MAX_TOP_K;
        run_case(&c, &r);
    }
}

/* All pairs of dtypes, with table and without, with every sort of residual, aligned and not. */
static void test_combine_dtypes(void)
{
    trand r = trand_new(2);
    for (int rows = MOE_FP32; rows <= MOE_BF16; ++rows)
        for (int y = MOE_FP32; y <= MOE_BF16; ++y)
            for (int residual = NO_RESIDUAL; residual <= IN_PLACE; ++residual)
                for (int buffers = 0; buffers < 2; ++buffers)
                    for (int at = 0; at < 2; ++at)
                        for (int odd = 0; odd < 2; ++odd) {
                            combine_case c = normal_case(9, odd ? 253 : 256, 8);
                            c.rows_dtype = rows;
                            c.y_dtype = y;
                            c.residual = residual;
                            c.buffers = buffers ? 5 : 0;
                            c.rows = buffers ? 4 : 20;
                            c.row_at = at;
                            run_case(&c, &r);
                        }
}

/* Each address misaligned alone, by every remainder; strides too. */
static void test_combine_alignment(void)
{
    trand r = trand_new(3);
    for (int which = 0; which < 8; ++which)
        for (int by = 1; by <= 8; ++by)
            for (int dtypes = 0; dtypes < 4; ++dtypes) {
                combine_case c = normal_case(4, 64, 3);
                c.rows_dtype = dtypes & 1 ? MOE_FP32 : MOE_FP16;
                c.y_dtype = dtypes & 2 ? MOE_FP32 : MOE_FP16;
                c.residual = RESIDUAL;
                if (which == 0) c.row_at = by;
                if (which == 1) c.y_at = by;
                if (which == 2) c.residual_at = by;
                if (which == 3) c.row_pad = by;
                if (which == 4) c.y_pad = by;
                if (which == 5) c.residual_pad = by;
                if (which >= 6) c.shared = SHARED_WEIGHTED;
                if (which == 6) c.shared_at = by;
                if (which == 7) c.shared_pad = by;
                run_case(&c, &r);
            }
}

/* A shared row, weighted or not, beside few and many rows, live, dropped and bad ones. */
static void test_combine_shared(void)
{
    static const int Ks[] = {1, 2, 3, 4, 7, 8, 9, 31, 32, 33};
    trand r = trand_new(15);
    for (size_t i = 0; i < sizeof Ks / sizeof *Ks; ++i)
        for (int shared = SHARED; shared <= SHARED_WEIGHTED; ++shared)
            for (int how = 0; how < 6; ++how) {
                combine_case c = normal_case(7, how & 1 ? 200 : 51, Ks[i]);
                c.shared = shared;
                c.residual = (int)trand_int(&r, NO_RESIDUAL, IN_PLACE);
                c.rows_dtype = (int)trand_int(&r, MOE_FP32, MOE_BF16);
                c.y_dtype = (int)trand_int(&r, MOE_FP32, MOE_BF16);
                c.unweighted = how == 1;
                c.dropped = how == 2 || how == 3 ? 100 : 20; /* the shared row alone */
                c.bad = how == 5 ? 30 : 0;
                run_case(&c, &r);
            }
    { /* it is one more row, the last one: the same bits as a token with a slot more */
        enum { T = 6, H = 64, K = 3 };
        combine_case c = normal_case(T, H, K);
        combine_bufs b;
        moe_combine_desc d;
        float weights[T * (K + 1)];
        moe_place place[T * (K + 1)];
        uint16_t rows[T * H];
        tbuf bp, bw, bs, bt;
        void *want, *address[MOST_BUFFERS + 1];
        c.dropped = 0;
        c.shared = SHARED_WEIGHTED;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c);
        want = tbuf_copy(&b.y);
        for (int t = 0; t < T; ++t)
            for (int k = 0; k <= K; ++k) {
                const moe_place last = {b.count, t};
                place[t * (K + 1) + k] = k < K ? b.h_place[t * K + k] : last;
                weights[t * (K + 1) + k] = k < K ? b.h_weights[t * K + k] : b.h_shared_weight[t];
            }
        memcpy(rows, b.h_shared, sizeof rows);
        bs = tbuf_from("shared", rows, sizeof rows, 0);
        bp = tbuf_from("place", place, sizeof place, 0);
        bw = tbuf_from("weights", weights, sizeof weights, 0);
        for (int i = 0; i < b.count; ++i) address[i] = b.buffer[i].p;
        address[b.count] = bs.p;
        bt = tbuf_from("table", address, (size_t)(b.count + 1) * sizeof(void*), 0);
        d = b.d;
        d.shared = 0;
        d.shared_weight = 0;
        d.place = (const moe_place*)bp.p;
        d.weights = (const float*)bw.p;
        d.table = (const void* const*)bt.p;
        d.num_buffers = b.count + 1;
        d.num_rows = 0;
        d.top_k = K + 1;
        tbuf_poison(&b.y);
        CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.y, want), "other bits than as a row of the table");
        tbuf_free(&bs);
        tbuf_free(&bp);
        tbuf_free(&bw);
        tbuf_free(&bt);
        free(want);
        bufs_free(&b);
    }
}

/* Kernels of one's own on the public pieces: one that finds rows and copies them to where route's
   order is wanted, one that makes tokens of y in an order and on a grid of its own. */
typedef struct own_args {
    moe_combine_args d;
    char* rows; /* [T, K, H] in rows_dtype */
    int32_t first, step;
} own_args;

MOE_KERNEL(64, 1) own_rows_kernel(MOE_ARG(own_args) a)
{
    const int bytes = a.d.hidden * (a.d.rows_dtype == MOE_FP32 ? 4 : 2);
    const int64_t slots = (int64_t)a.d.num_tokens * a.d.top_k;
    for (int64_t s = blockIdx.x; s < slots; s += gridDim.x) {
        const char* row = moe_combine_row(&a.d, s);
        for (int i = (int)threadIdx.x; i < bytes; i += (int)blockDim.x)
            a.rows[s * bytes + i] = row ? row[i] : 0;
    }
}

MOE_KERNEL(96, 1) own_tokens_kernel(MOE_ARG(own_args) a)
{
    MOE_SHARED(moe_combine_shared, shared);
    MOE_SHARED_DYNAMIC(source);
    for (int64_t t = a.first + (int64_t)blockIdx.x * a.step; t < a.d.num_tokens;
         t += (int64_t)gridDim.x * a.step) {
        if (a.d.rows_dtype == MOE_FP32)
            moe_combine_token(&a.d, t, &shared, (moe_combine_source*)source, MOE_FP32);
        else if (a.d.rows_dtype == MOE_BF16)
            moe_combine_token(&a.d, t, &shared, (moe_combine_source*)source, MOE_BF16);
        __syncthreads();
    }
}

static void test_combine_own_kernel(void)
{
    trand r = trand_new(16);
    for (int i = 0; i < 6; ++i) {
        combine_case c = normal_case(23, i & 1 ? 64 : 37, i == 2 ? 9 : 3);
        const int64_t slots = c.T * c.K;
        combine_bufs b;
        own_args a;
        tbuf rows;
        moe_launch_config l;
        c.rows_dtype = i & 2 ? MOE_FP32 : MOE_BF16;
        c.residual = i % 3;
        c.shared = i % 3;
        c.bad = i & 1 ? 20 : 0;
        c.row_pad = i == 4 ? 3 : 0;
        c.buffers = i == 5 ? 0 : 7;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_combine_resolve(&b.d, &a.d), MOE_OK);
        {
            const int64_t row_bytes = c.H * moe_dtype_bytes(c.rows_dtype);
            const int64_t stride = (c.H + c.row_pad) * moe_dtype_bytes(c.rows_dtype);
            char* got;
            int wrong = 0;
            rows = tbuf_new("rows", (size_t)(slots * row_bytes), 0);
            a.rows = (char*)rows.p;
            l = moe_grid(5, 64, 0, test_now.stream);
            CHECK_STATUS(MOE_LAUNCH(own_rows_kernel, l, a), MOE_OK);
            got = (char*)tbuf_copy(&rows);
            for (int64_t s = 0; s < slots; ++s) {
                const moe_place p = b.h_place[s];
                const int live = p.buffer >= 0 && p.buffer < b.count && p.row >= 0 && p.row < c.rows;
                for (int64_t k = 0; k < row_bytes; ++k)
                    wrong += got[s * row_bytes + k] !=
                             (live ? ((char*)b.row[p.buffer])[p.row * stride + k] : 0);
            }
            CHECK(wrong == 0, "%d bytes of rows", wrong);
            free(got);
            tbuf_free(&rows);
        }
        for (a.first = 0, a.step = 2; a.first < a.step; ++a.first) {
            l = moe_grid(4, 96, (size_t)moe_combine_sources(&a.d) * sizeof(moe_combine_source),
                         test_now.stream);
            CHECK_STATUS(MOE_LAUNCH(own_tokens_kernel, l, a), MOE_OK);
        }
        compare(&b, &c);
        bufs_free(&b);
    }
    {
        moe_combine_desc d;
        moe_combine_args a, was;
        memset(&d, 0, sizeof d);
        memset(&a, 0xab, sizeof a);
        was = a;
        CHECK_STATUS(moe_combine_resolve(0, &a), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_combine_resolve(&d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_combine_resolve(&d, &a), MOE_STATUS(MOE_ERR_RANGE, hidden));
        CHECK(!memcmp(&a, &was, sizeof a), "a refused descriptor filled in arguments");
    }
}

/* All slots dropped: the residual, or 0. All slots bad: the same, and the first one is named. */
static void test_combine_nothing_to_add(void)
{
    trand r = trand_new(4);
    for (int dtype = MOE_FP32; dtype <= MOE_BF16; ++dtype)
        for (int residual = NO_RESIDUAL; residual <= IN_PLACE; ++residual)
            for (int H = 63; H <= 64; ++H)
                for (int bad = 0; bad < 2; ++bad) {
                    combine_case c = normal_case(6, H, 4);
                    c.y_dtype = dtype;
                    c.residual = residual;
                    c.dropped = bad ? 0 : 100;
                    c.bad = bad ? 100 : 0;
                    run_case(&c, &r);
                }
}

static void test_combine_no_tokens(void)
{
    trand r = trand_new(5);
    combine_case c = normal_case(0, 64, 4);
    combine_bufs b;
    moe_combine_desc d;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
    memset(&d, 0, sizeof d); /* with no tokens no buffer is needed */
    d.hidden = 64;
    d.top_k = 4;
    CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    bufs_free(&b);
}

static void test_combine_faults(void)
{
    trand r = trand_new(6);
    combine_case c = normal_case(60, 40, 5);
    combine_bufs b;
    uint64_t word;
    bufs_new(&b, &c, &r);
    b.h_place[123].buffer = 7;
    b.h_place[77].buffer = 3;
    b.h_place[77].row = 5;
    b.h_place[299].buffer = -9;
    b.h_weights[123] = b.h_weights[77] = b.h_weights[299] = NAN;
    tbuf_put(&b.place, b.h_place);
    tbuf_put(&b.weights, b.h_weights);
    for (int i = 0; i < 3; ++i) {
        CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_PLACE, 77);
    }
    compare(&b, &c);
    word = MOEI_FAULT_KEY(MOE_FAULT_BAD_ID, TEST_RANK, 5000); /* an earlier code stays */
    tbuf_put(&b.fault, &word);
    tbuf_poison(&b.y);
    CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_ID, 5000);
    CHECK(!tbuf_holds(&b.y, 0), "a data fault stopped combine");
    word = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 2);
    tbuf_put(&b.fault, &word);
    tbuf_poison(&b.y);
    CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b.y, 0), "combine ran on after a stop fault");
    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 2);
    bufs_free(&b);
}

/* Small whole numbers, sums by hand: a row that two slots of a token name, a slot of -1 between
   live ones, a token without any, and no place for what a dropped slot weighs. */
static void test_combine_by_hand(void)
{
    enum { T = 3, H = 2, K = 3 };
    static const float rows[] = {1, 2, 10, 20, 100, 200}, other[] = {3, -3};
    static const moe_place place[] = {{0, 1}, {-1, -1}, {1, 0},  {0, 2},  {0, 2},
                                      {0, 0}, {-1, -1}, {-1, 7}, {-1, -1}};
    static const float weights[] = {2, NAN, -1, 1, 0.5f, 4, NAN, INFINITY, NAN};
    static const float residual[] = {1000, 2000, 0, 0, 5, 6}, shared[] = {7, 8, 1, 2, 3, 4};
    static const float shared_weight[] = {1, -2, 10};
    static const float plain[] = {17, 43, 154, 308, 0, 0};
    static const float all[] = {1024, 2051, 152, 304, 35, 46};
    tbuf b0 = tbuf_from("rows", rows, sizeof rows, 0), b1 = tbuf_from("rows", other, 8, 0);
    void* address[] = {b0.p, b1.p};
    tbuf bt = tbuf_from("table", address, sizeof address, 0);
    tbuf bp = tbuf_from("place", place, sizeof place, 0);
    tbuf bw = tbuf_from("weights", weights, sizeof weights, 0);
    tbuf br = tbuf_from("residual", residual, sizeof residual, 0);
    tbuf bs = tbuf_from("shared", shared, sizeof shared, 0);
    tbuf bsw = tbuf_from("shared_weight", shared_weight, sizeof shared_weight, 0);
    tbuf by = tbuf_new("y", sizeof plain, 0), fault = tfault_new(0);
    moe_combine_desc d;
    memset(&d, 0, sizeof d);
    d.table = (const void* const*)bt.p;
    d.num_buffers = 2;
    d.place = (const moe_place*)bp.p;
    d.weights = (const float*)bw.p;
    d.rows_dtype = MOE_FP32;
    d.y = by.p;
    d.fault = (uint64_t*)fault.p;
    d.rank = TEST_RANK;
    d.num_tokens = T;
    d.hidden = H;
    d.top_k = K;
    CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&by, plain), "rows alone");
    d.residual = br.p;
    d.shared = bs.p;
    d.shared_weight = (const float*)bsw.p;
    tbuf_poison(&by);
    CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&by, all), "rows, residual and shared row");
    CHECK_FAULT(&fault, MOE_FAULT_NONE, 0);
    tbuf_free(&b0);
    tbuf_free(&b1);
    tbuf_free(&bt);
    tbuf_free(&bp);
    tbuf_free(&bw);
    tbuf_free(&br);
    tbuf_free(&bs);
    tbuf_free(&bsw);
    tbuf_free(&by);
    tbuf_free(&fault);
}

/* An entry of the table that is no address of an element: null, or misaligned by a byte or, for
   fp32, by two. Its slots are dropped, the first of them is the fault's, and nothing traps. An
   entry that is aligned to its elements alone is a good one. */
static void test_combine_bad_table(void)
{
    enum { BAD = 2 };
    static const int offs[] = {1, 2, 3, 4, 6, 8, 16, 0}; /* bytes; 0: null */
    trand r = trand_new(16);
    for (int dtype = MOE_FP32; dtype <= MOE_BF16; ++dtype)
        for (size_t i = 0; i < sizeof offs / sizeof *offs; ++i) {
            combine_case c = normal_case(30, i & 1 ? 64 : 51, 3);
            const int off = offs[i], good = off && off % moe_dtype_bytes(dtype) == 0;
            combine_bufs b;
            void** table;
            c.rows_dtype = c.y_dtype = dtype;
            c.row_pad = 16;
            c.rows = 5;
            bufs_new(&b, &c, &r);
            table = (void**)tbuf_copy(&b.table);
            if (good) { /* the rows moved along */
                const size_t bytes = b.buffer[BAD].bytes;
                tbuf_free(&b.buffer[BAD]);
                b.buffer[BAD] = tbuf_from("rows", b.row[BAD], bytes, (size_t)off);
                table[BAD] = b.buffer[BAD].p;
            } else {
                table[BAD] = off ? (char*)table[BAD] + off : (void*)0;
            }
            tbuf_put(&b.table, table);
            for (int s = 0; s < c.T * c.K && !good; ++s)
                if (b.h_place[s].buffer == BAD) b.h_weights[s] = NAN;
            tbuf_put(&b.weights, b.h_weights);
            CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
            for (int s = 0; s < c.T * c.K && !good; ++s) /* what the reference leaves out */
                if (b.h_place[s].buffer == BAD) b.h_place[s].buffer = c.buffers;
            compare(&b, &c);
            free(table);
            bufs_free(&b);
        }
}

/* Every field, wrong in every way: its own status, and nothing is written. */
static void test_combine_refusals(void)
{
    trand r = trand_new(7);
    combine_case c = normal_case(10, 64, 4);
    combine_bufs b;
    moe_combine_desc good, d;
    c.residual = RESIDUAL;
    bufs_new(&b, &c, &r);
    good = b.d;
#define REFUSED(change, kind, field)                                                              \
    d = good;                                                                                     \
    change;                                                                                       \
    CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_STATUS(kind, field));                      \
    CHECK_REFUSED(moe_combine_prepared, moe_combine_prepare, &d, MOE_STATUS(kind, field))
#define AT(p, bytes) ((void*)((char*)(p) + (bytes)))
#define ONE_ARRAY d.table = 0, d.num_buffers = 0, d.rows = b.buffer[0].p
    CHECK_STATUS(moe_combine(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED(d.hidden = 0, MOE_ERR_RANGE, hidden);
    REFUSED(d.hidden = -64, MOE_ERR_RANGE, hidden);
    REFUSED(d.top_k = 0, MOE_ERR_RANGE, top_k);
    REFUSED(d.top_k = -1, MOE_ERR_RANGE, top_k);
    REFUSED(d.top_k = INT32_MIN, MOE_ERR_RANGE, top_k);
    REFUSED(d.rows_dtype = 4, MOE_ERR_DTYPE, rows_dtype);
    REFUSED(d.rows_dtype = -1, MOE_ERR_DTYPE, rows_dtype);
    REFUSED(d.y_dtype = 4, MOE_ERR_DTYPE, y_dtype);
    REFUSED(d.y_dtype = -2, MOE_ERR_DTYPE, y_dtype);
    REFUSED(d.row_stride = 63, MOE_ERR_STRIDE, row_stride);
    REFUSED(d.row_stride = -64, MOE_ERR_STRIDE, row_stride);
    REFUSED(d.y_stride = 63, MOE_ERR_STRIDE, y_stride);
    REFUSED(d.y_stride = -64, MOE_ERR_STRIDE, y_stride);
    REFUSED(d.residual_stride = 63, MOE_ERR_STRIDE, residual_stride);
    REFUSED(d.shared_stride = 63, MOE_ERR_STRIDE, shared_stride);
    REFUSED(d.shared_stride = -64, MOE_ERR_STRIDE, shared_stride);
    REFUSED(d.shared = AT(b.shared.p, 1), MOE_ERR_ALIGN, shared);
    REFUSED(d.shared_weight = (const float*)b.shared_weight.p, MOE_ERR_CONFLICT, shared_weight);
    REFUSED((d.shared = b.shared.p, d.shared_weight = (const float*)AT(b.shared_weight.p, 2)),
            MOE_ERR_ALIGN, shared_weight);
    REFUSED(d.shared = d.y, MOE_ERR_OVERLAP, y);
    REFUSED(d.shared = AT(d.y, 9 * 128), MOE_ERR_OVERLAP, y);
    REFUSED((d.shared = b.shared.p, d.shared_weight = (const float*)d.y), MOE_ERR_OVERLAP, y);
    REFUSED(d.shared = (void*)d.fault, MOE_ERR_OVERLAP, fault);
    REFUSED(d.num_rows = -1, MOE_ERR_RANGE, num_rows);
    REFUSED(d.rows = b.buffer[0].p, MOE_ERR_CONFLICT, rows);
    REFUSED(d.num_buffers = 0, MOE_ERR_RANGE, num_buffers);
    REFUSED(d.num_buffers = -1, MOE_ERR_RANGE, num_buffers);
    REFUSED((ONE_ARRAY, d.num_buffers = 2), MOE_ERR_RANGE, num_buffers);
    REFUSED((ONE_ARRAY, d.num_buffers = -1), MOE_ERR_RANGE, num_buffers);
    REFUSED((ONE_ARRAY, d.rows = 0), MOE_ERR_NULL, table);
    REFUSED(d.place = 0, MOE_ERR_NULL, place);
    REFUSED(d.y = 0, MOE_ERR_NULL, y);
    REFUSED(d.table = (const void* const*)AT(d.table, 4), MOE_ERR_ALIGN, table);
    REFUSED((ONE_ARRAY, d.rows = AT(d.rows, 1)), MOE_ERR_ALIGN, rows);
    REFUSED(d.place = (const moe_place*)AT(d.place, 4), MOE_ERR_ALIGN, place);
    REFUSED(d.weights = (const float*)AT(d.weights, 2), MOE_ERR_ALIGN, weights);
    REFUSED(d.y = AT(d.y, 1), MOE_ERR_ALIGN, y);
    REFUSED((d.y = AT(d.y, 2), d.y_dtype = MOE_FP32), MOE_ERR_ALIGN, y);
    REFUSED(d.residual = AT(d.residual, 1), MOE_ERR_ALIGN, residual);
    REFUSED(d.rank = -1, MOE_ERR_RANGE, rank);
    REFUSED(d.rank = MOE_FAULT_MAX_RANK + 1, MOE_ERR_RANGE, rank);
    REFUSED(d.fault = (uint64_t*)AT(d.fault, 4), MOE_ERR_ALIGN, fault);
    REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
    REFUSED(d.y = (void*)d.table, MOE_ERR_OVERLAP, y);
    REFUSED((ONE_ARRAY, d.y = b.buffer[0].p), MOE_ERR_OVERLAP, y);
    REFUSED((ONE_ARRAY, d.y = AT(b.buffer[0].p, 4 * 64 * 2)), MOE_ERR_OVERLAP, y);
    REFUSED(d.y = (void*)d.place, MOE_ERR_OVERLAP, y);
    REFUSED(d.y = (void*)d.weights, MOE_ERR_OVERLAP, y);
    REFUSED(d.y = AT(d.residual, 128), MOE_ERR_OVERLAP, y);
    REFUSED((d.y = (void*)d.residual, d.y_stride = 72), MOE_ERR_OVERLAP, y);
    REFUSED(d.fault = (uint64_t*)d.y, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.place, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.table, MOE_ERR_OVERLAP, fault);
    REFUSED((d.y = (void*)d.residual, d.fault = (uint64_t*)d.y), MOE_ERR_OVERLAP, fault);
    { /* rows further apart than H: another buffer in the last of them */
        tbuf big = tbuf_new("big", 24 * 72 * 2, 0);
        char *p = (char*)big.p, *end = p + (9 * 72 + 64) * 2, *end_rows = p + (4 * 72 + 64) * 2;
        REFUSED((d.residual = p, d.residual_stride = 72, d.y = end - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.residual = p, d.residual_stride = 72, d.fault = (uint64_t*)(end - 8)),
                MOE_ERR_OVERLAP, fault);
        REFUSED((d.shared = p, d.shared_stride = 72, d.y = end - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.shared = p, d.shared_stride = 72, d.fault = (uint64_t*)(end - 8)),
                MOE_ERR_OVERLAP, fault);
        REFUSED((d.y = p, d.y_stride = 72, d.residual = end - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.y = p, d.y_stride = 72, d.shared = end - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.y = p, d.y_stride = 72, d.fault = (uint64_t*)(end - 8)), MOE_ERR_OVERLAP, fault);
        REFUSED((ONE_ARRAY, d.rows = p, d.row_stride = 72, d.num_rows = 5, d.y = end_rows - 2),
                MOE_ERR_OVERLAP, y);
        REFUSED((ONE_ARRAY, d.rows = p, d.row_stride = 72, d.num_rows = 5,
                 d.fault = (uint64_t*)(end_rows - 8)),
                MOE_ERR_OVERLAP, fault);
        CHECK(tbuf_holds(&big, 0), "a refused call wrote something");
        tbuf_free(&big);
    }
#undef REFUSED
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.y, 0), "a refused call wrote y");
    CHECK(tbuf_holds(&b.residual, b.h_residual) && tbuf_holds(&b.buffer[0], b.row[0]),
          "or an input");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    CHECK_STATUS(moe_combine(&good, test_now.stream), MOE_OK);
    compare(&b, &c);
    bufs_free(&b);
}

/* Without a table, one buffer: place.buffer 0 is it, and 1 is outside. */
static void test_combine_one_array(void)
{
    trand r = trand_new(8);
    for (int num_buffers = 0; num_buffers < 2; ++num_buffers) {
        combine_case c = normal_case(20, 72, 4);
        combine_bufs b;
        c.buffers = 0;
        c.rows = 30;
        bufs_new(&b, &c, &r);
        b.h_place[11].buffer = 1;
        b.h_weights[11] = NAN;
        tbuf_put(&b.place, b.h_place);
        tbuf_put(&b.weights, b.h_weights);
        b.d.num_buffers = num_buffers;
        CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c);
        bufs_free(&b);
    }
}

static moe_status call_combine(void* d, cudaStream_t stream)
{
    return moe_combine((const moe_combine_desc*)d, stream);
}

static void test_combine_same_bits(void)
{
    trand r = trand_new(9);
    for (int i = 0; i < 4; ++i) {
        combine_case c = normal_case(50, i & 1 ? 250 : 512, i & 2 ? 8 : 33);
        combine_bufs b;
        tbuf* out[1];
        c.residual = RESIDUAL;
        bufs_new(&b, &c, &r);
        out[0] = &b.y;
        test_same_bits("combine", call_combine, &b.d, out, 1, MOE_ON_HOST ? 5 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* route and combine in one chain. */
typedef struct chain {
    moe_route_desc route;
    moe_combine_desc combine;
} chain;

static moe_status call_chain(void* context, cudaStream_t stream)
{
    const chain* c = (const chain*)context;
    MOE_TRY(moe_route(&c->route, stream));
    return moe_combine(&c->combine, stream);
}

/* Experts in allocations of their own, places from route, everything in a graph whose routing
   changes between launches. The result is compared with what joining all rows (`cat`) and adding
   them in row order (`index_add`) gives in fp32. */
static void test_combine_after_route(void)
{
    enum { T = 45, E = 6, K = 3, H = 136, SLOTS = T * K };
    trand r = trand_new(10);
    int32_t* ids = (int32_t*)test_host(SLOTS * 4);
    float* weights = (float*)test_host(SLOTS * 4);
    float* expert[E];
    float* sum = (float*)test_host(T * H * 4);
    int32_t count[E], offset[E + 1], row_slot[SLOTS];
    tbuf buffer[E], bi = tbuf_new("ids", SLOTS * 4, 0), bw = tbuf_new("weights", SLOTS * 4, 0);
    tbuf bt, bc = tbuf_new("count", E * 4, 0), bo = tbuf_new("offset", E * 4 + 4, 0);
    tbuf bp = tbuf_new("place", SLOTS * 8, 0), by = tbuf_new("y", T * H * 4, 0);
    tbuf bs, bf = tfault_new(0);
    void* address[E];
    size_t bytes = 0;
    chain both;
    tgraph g;
    for (int e = 0; e < E; ++e) {
        expert[e] = (float*)new_rows(&r, SLOTS, H, H, MOE_FP32);
        buffer[e] = tbuf_from("expert", expert[e], SLOTS * H * 4, 0);
        address[e] = buffer[e].p;
    }
    bt = tbuf_from("table", address, sizeof address, 0);
    memset(&both, 0, sizeof both);
    both.route.ids = (const int32_t*)bi.p;
    both.route.expert_count = (int32_t*)bc.p;
    both.route.expert_offset = (int32_t*)bo.p;
    both.route.place = (moe_place*)bp.p;
    both.route.place_kind = MOE_PLACE_BY_EXPERT;
    both.route.fault = (uint64_t*)bf.p;
    both.route.rank = TEST_RANK;
    both.route.num_tokens = T;
    both.route.num_experts = E;
    both.route.top_k = K;
    CHECK_STATUS(moe_route_workspace(&both.route, &bytes), MOE_OK);
    bs = tbuf_new("workspace", bytes, 0);
    both.route.workspace = bs.p;
    both.route.workspace_bytes = bytes;
    both.combine.table = (const void* const*)bt.p;
    both.combine.num_buffers = E;
    both.combine.place = (const moe_place*)bp.p;
    both.combine.weights = (const float*)bw.p;
    both.combine.rows_dtype = MOE_FP32;
    both.combine.y = by.p;
    both.combine.fault = (uint64_t*)bf.p;
    both.combine.rank = TEST_RANK;
    both.combine.num_tokens = T;
    both.combine.hidden = H;
    both.combine.top_k = K;
    CHECK_STATUS(moe_route_preload(), MOE_OK);
    CHECK_STATUS(moe_combine_preload(), MOE_OK);
    if (tgraph_capture(&g, call_chain, &both)) {
        for (int run = 0; run < 4; ++run) {
            moe_ref_route_desc d;
            double largest = 0, worst = 0;
            float* y;
            for (int s = 0; s < SLOTS; ++s) {
                ids[s] = (int32_t)trand_int(&r, run == 3 ? -1 : 0, run == 1 ? 1 : E - 1);
                weights[s] = (float)trand_int(&r, 1, 99) / (100.0f * K);
            }
            tbuf_put(&bi, ids);
            tbuf_put(&bw, weights);
            tbuf_poison(&bp);
            tbuf_poison(&by);
            tgraph_launch(&g);
            y = (float*)tbuf_copy(&by);
            memset(&d, 0, sizeof d);
            d.ids = ids;
            d.expert_count = count;
            d.expert_offset = offset;
            d.row_slot = row_slot;
            d.num_tokens = T;
            d.num_experts = E;
            d.top_k = K;
            moe_ref_route(&d);
            memset(sum, 0, T * H * 4);
            for (int e = 0; e < E; ++e)
                for (int row = offset[e]; row < offset[e + 1]; ++row)
                    for (int h = 0; h < H; ++h)
                        sum[row_slot[row] / K * H + h] +=
                            weights[row_slot[row]] * expert[e][(row - offset[e]) * H + h];
            for (int i = 0; i < T * H; ++i) {
                const double error = fabs((double)y[i] - (double)sum[i]);
                if (!(error <= worst)) worst = error;
                if (fabs((double)sum[i]) > largest) largest = fabs((double)sum[i]);
            }
            CHECK(largest > 0.5 && worst < 1e-6, "run %d: error %g of %g", run, worst, largest);
            CHECK_FAULT(&bf, MOE_FAULT_NONE, 0);
            free(y);
        }
        tgraph_free(&g);
    }
    for (int e = 0; e < E; ++e) {
        tbuf_free(&buffer[e]);
        free(expert[e]);
    }
    tbuf_free(&bi);
    tbuf_free(&bw);
    tbuf_free(&bt);
    tbuf_free(&bc);
    tbuf_free(&bo);
    tbuf_free(&bp);
    tbuf_free(&by);
    tbuf_free(&bs);
    tbuf_free(&bf);
    free(ids);
    free(weights);
    free(sum);
}

/* A captured combine, launched again with other places and other buffers in the table. */
static void test_combine_graph(void)
{
    trand r = trand_new(11);
    combine_case c = normal_case(33, 200, 6);
    combine_bufs b;
    tgraph g;
    bufs_new(&b, &c, &r);
    if (tgraph_capture(&g, call_combine, &b.d)) {
        CHECK(tbuf_holds(&b.y, 0), "capture itself runs nothing");
        for (int run = 0; run < 4; ++run) {
            const uint64_t no_fault = 0;
            void *host = b.row[run], *address[MOST_BUFFERS];
            tbuf buffer = b.buffer[run];
            b.row[run] = b.row[6]; /* two entries change places */
            b.row[6] = host;
            b.buffer[run] = b.buffer[6];
            b.buffer[6] = buffer;
            for (int i = 0; i < b.count; ++i) address[i] = b.buffer[i].p;
            c.bad = run == 2 ? 10 : 0;
            fill_places(&b, &c, &r);
            tbuf_put(&b.table, address);
            tbuf_put(&b.place, b.h_place);
            tbuf_put(&b.weights, b.h_weights);
            tbuf_put(&b.fault, &no_fault);
            tbuf_poison(&b.y);
            tgraph_launch(&g);
            compare(&b, &c);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
}

static void test_combine_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(12);
    for (int i = 0; i < 3; ++i) {
        combine_case c = normal_case(i == 2 ? 20000 : 4096, i == 2 ? 128 : 2048, i == 1 ? 6 : 8);
        c.buffers = 32;
        c.rows = 256;
        c.residual = i;
        c.rows_dtype = i == 1 ? MOE_FP16 : MOE_BF16;
        run_case(&c, &r);
    }
#endif
}

/* Rows, y, residual or shared rows that lie past 2^32 elements: the bits of the same call on dense
   ones, 16 bytes and an element at a time. */
static void test_combine_past_2_31(void)
{
    enum { ROWS, Y, RESIDUALS, SHAREDS };
    static const char* const name[] = {"rows", "y", "residual", "shared"};
    trand r = trand_new(13);
    for (int which = ROWS; which <= SHAREDS; ++which)
        for (int narrow = 0; narrow < 2; ++narrow) {
            combine_case c = normal_case(5, narrow ? 67 : 264, 2);
            combine_bufs b;
            moe_combine_desc d;
            twide wide;
            void* want;
            c.buffers = 0; /* one array: 5 rows */
            c.residual = RESIDUAL;
            c.shared = SHARED_WEIGHTED;
            if (!twide_new(&wide, name[which], 5, c.H, MOE_BF16)) continue;
            bufs_new(&b, &c, &r);
            for (int s = 0; s < c.T * c.K; ++s) { /* every row of every buffer counts */
                b.h_place[s].buffer = 0;
                b.h_place[s].row = s % c.rows;
                b.h_weights[s] = trand_normal(&r) + 0.25f;
            }
            tbuf_put(&b.place, b.h_place);
            tbuf_put(&b.weights, b.h_weights);
            CHECK_STATUS(moe_combine(&b.d, test_now.stream), MOE_OK);
            compare(&b, &c);
            want = tbuf_copy(&b.y);
            tbuf_poison(&b.y);
            d = b.d;
            if (which == ROWS) {
                d.rows = wide.p;
                d.row_stride = wide.stride;
                twide_put(&wide, b.row[0]);
            } else if (which == Y) {
                d.y = wide.p;
                d.y_stride = wide.stride;
            } else if (which == RESIDUALS) {
                d.residual = wide.p;
                d.residual_stride = wide.stride;
                twide_put(&wide, b.h_residual);
            } else {
                d.shared = wide.p;
                d.shared_stride = wide.stride;
                twide_put(&wide, b.h_shared);
            }
            CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
            if (which == Y) twide_holds(&wide, want);
            else CHECK(tbuf_holds(&b.y, want), "wide %s, narrow %d", name[which], narrow);
            CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
            twide_free(&wide);
            free(want);
            bufs_free(&b);
        }
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_combine_shapes);
    RUN(test_combine_many_choices);
    RUN(test_combine_dtypes);
    RUN(test_combine_alignment);
    RUN(test_combine_shared);
    RUN(test_combine_own_kernel);
    RUN(test_combine_nothing_to_add);
    RUN(test_combine_no_tokens);
    RUN(test_combine_faults);
    RUN(test_combine_by_hand);
    RUN(test_combine_bad_table);
    RUN(test_combine_refusals);
    RUN(test_combine_one_array);
    RUN(test_combine_same_bits);
    RUN(test_combine_after_route);
    RUN(test_combine_graph);
    RUN(test_combine_large);
    RUN(test_combine_past_2_31);
    return test_end();
}
