/* case.h: a case of combine: how rows, places and weights are drawn, its buffers, and how y is
   compared with the reference in double.

   normal_case, random_case   a case with usual fields; one whose fields are drawn
   bufs_new                   draws the inputs and makes the buffers
   put_places                 puts places and weights on the device again
   launch                     queues combine and compares
   compare                    compares y, the gaps between its rows, and the fault word
   run_case                   all of it */
#ifndef MOE_TESTS_COMBINE_CASE_H
#define MOE_TESTS_COMBINE_CASE_H

#include "tests/test.h"
#include "tests/test_rows.h"

#include "moe/combine.cuh"
#include "moe/ref/combine.h"

#define MOST_BUFFERS 40

enum { NO_RESIDUAL, RESIDUAL, IN_PLACE };
enum { NO_SHARED, SHARED, SHARED_WEIGHTED };

typedef struct combine_case {
    int T, H, K;
    int buffers; /* allocations; 0: one array and no table */
    int rows;    /* in each of them */
    int rows_dtype, y_dtype;
    int residual;                      /* as above */
    int row_pad, y_pad, residual_pad;  /* stride - H */
    int row_at, y_at, residual_at;     /* misalignment, elements */
    int unweighted;                    /* 1: no weights */
    int dropped, bad;                  /* percent of the slots */
    int bounds;                        /* 1: num_rows is given */
    int bare;                          /* 1: no fault word */
    int shared, shared_pad, shared_at; /* as above; stride - H; misalignment, elements */
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
        c->y_at, c->residual_at, c->unweighted, c->dropped, c->bad, c->bounds, c->bare, c->shared,
        c->shared_pad, c->shared_at);
    return text;
}

/* Draws numbers in the rows; the gaps between them are NaN. */
static void* draw_rows(trand* r, int64_t rows, int64_t stride, int H, int dtype)
{
    return trows_new(r, rows, stride, H, dtype, TFILL_NORMAL, 1);
}

/* Draws places and weights. The weight of a slot without a row is NaN: combine must not read it. */
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

/* Puts places and weights on the device, after the test changed them. */
static void put_places(combine_bufs* b)
{
    tbuf_put(&b->place, b->h_place);
    tbuf_put(&b->weights, b->h_weights);
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
        b->row[i] = draw_rows(r, c->rows, row_stride, c->H, c->rows_dtype);
        b->buffer[i] =
            tbuf_from("rows", b->row[i], moe_extent(c->rows, row_stride, c->H, c->rows_dtype),
                      (size_t)(c->row_at * row_bytes));
        address[i] = b->buffer[i].p;
    }
    b->h_place = (moe_place*)test_host(slots * 8);
    b->h_weights = (float*)test_host(slots * 4);
    b->h_residual = draw_rows(r, c->T, c->H + residual_pad, c->H, c->y_dtype);
    fill_places(b, c, r);
    b->table = tbuf_from("table", address, (size_t)b->count * sizeof(void*), 8);
    b->place = tbuf_from("place", b->h_place, (size_t)slots * 8, 8);
    b->weights = tbuf_from("weights", b->h_weights, (size_t)slots * 4, 4);
    b->residual = tbuf_from("residual", b->h_residual,
                            moe_extent(c->T, c->H + residual_pad, c->H, c->y_dtype),
                            (size_t)(c->residual_at * y_bytes));
    b->h_shared = draw_rows(r, c->T, c->H + c->shared_pad, c->H, c->rows_dtype);
    b->shared = tbuf_from("shared", b->h_shared,
                          moe_extent(c->T, c->H + c->shared_pad, c->H, c->rows_dtype),
                          (size_t)(c->shared_at * row_bytes));
    b->h_shared_weight = (float*)test_host(c->T * 4);
    trand_fill_normal(r, b->h_shared_weight, c->T, MOE_FP32);
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
    tbufs_free(TBUFS(&b->table, &b->place, &b->weights, &b->residual, &b->shared, &b->shared_weight,
                     &b->y, &b->fault));
    free(b->h_shared), free(b->h_shared_weight);
    free(b->h_place), free(b->h_weights), free(b->h_residual);
}

/* Half the distance of two neighbours of the dtype around v. */
static double half_ulp(double v, int dtype)
{
    int e;
    frexp(v, &e);
    if (dtype == MOE_FP16) return ldexp(1, e - 11 < -24 ? -25 : e - 12);
    return ldexp(1, e - 9);
}

/* Fills exact [T, H], and sum [T, H] of the |products|. Returns the first bad slot, or -1. */
static int64_t combine_exact(const combine_bufs* b, const combine_case* c, double* exact,
                             double* sum)
{
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
    r.shared_stride = c->H + c->shared_pad;
    r.row_stride = c->H + c->row_pad;
    r.residual_stride = c->H + (c->residual == IN_PLACE ? c->y_pad : c->residual_pad);
    r.rows_dtype = c->rows_dtype;
    r.residual_dtype = c->y_dtype;
    r.num_tokens = c->T;
    r.hidden = c->H;
    r.top_k = c->K;
    r.num_rows = c->bounds ? c->rows : 0;
    return moe_ref_combine_f64(&r, exact, sum);
}

/* Compares y, the gaps between its rows and the fault word with the reference. */
static void compare(const combine_bufs* b, const combine_case* c)
{
    const int64_t T = c->T, H = c->H, stride = H + c->y_pad;
    const int before = test_now.failures;
    double* exact = (double*)test_host(T * H * 8);
    double* sum = (double*)test_host(T * H * 8);
    void* y = tbuf_copy(&b->y);
    /* the house bound takes roundings to cancel; a few rows added again and again round alike, each
       addition by up to 2^-24 of the sum */
    const int K = c->K + (c->shared != 0);
    const int terms = c->rows < 8 && K > 4 ? 8 * (K + 1) - 32 : K + 1;
    const int64_t bad = combine_exact(b, c, exact, sum);
    int64_t zeros = 0, wrong = 0, gaps = 0;
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
    for (int64_t t = 0; t + 1 < T; ++t) /* the gaps between the rows are not y's */
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
    CHECK_FAULT_AT(&b->fault, MOE_FAULT_BAD_PLACE, c->bare ? -1 : bad);
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    free(exact), free(sum), free(y);
}

/* Queues combine and compares. */
static void launch(const combine_bufs* b, const combine_case* c)
{
    CHECK_STATUS(moe_combine(&b->d, test_now.stream), MOE_OK);
    compare(b, c);
}

/* Draws, runs and compares a case. */
static void run_case(const combine_case* c, trand* r)
{
    combine_bufs b;
    bufs_new(&b, c, r);
    launch(&b, c);
    for (int i = 0; i < b.count; ++i)
        CHECK(tbuf_holds(&b.buffer[i], b.row[i]), "rows were written");
    CHECK(tbuf_holds(&b.residual, b.h_residual) && tbuf_holds(&b.place, b.h_place) &&
              tbuf_holds(&b.shared, b.h_shared) && tbuf_holds(&b.shared_weight, b.h_shared_weight),
          "inputs");
    bufs_free(&b);
}

/* The usual case: one allocation an expert, reached through the table. */
static combine_case normal_case(int T, int H, int K)
{
    combine_case c;
    memset(&c, 0, sizeof c);
    c.T = T, c.H = H, c.K = K;
    c.buffers = 7;
    c.rows = 5;
    c.rows_dtype = c.y_dtype = MOE_BF16;
    c.dropped = 10;
    c.bounds = 1;
    return c;
}

static combine_case random_case(trand* r, int T, int H, int K)
{
    combine_case c = normal_case(T, H, K);
    c.buffers = trand_int(r, 0, 3) ? (int)trand_int(r, 1, 12) : 0;
    c.rows = (int)trand_int(r, 1, 9);
    c.rows_dtype = trand_dtype(r);
    c.y_dtype = trand_dtype(r);
    c.residual = (int)trand_int(r, NO_RESIDUAL, IN_PLACE);
    c.row_pad = trand_some(r, 2, 1, 17);
    c.y_pad = trand_some(r, 2, 1, 17);
    c.residual_pad = trand_some(r, 2, 1, 17);
    c.row_at = trand_some(r, 3, 1, 9);
    c.y_at = trand_some(r, 3, 1, 9);
    c.residual_at = trand_some(r, 3, 1, 9);
    c.unweighted = trand_one_in(r, 5);
    c.dropped = trand_some(r, 2, 1, 60);
    c.bad = trand_some(r, 3, 1, 20);
    c.bounds = (int)trand_int(r, 0, 1);
    c.bare = trand_one_in(r, 6);
    c.shared = trand_some(r, 2, SHARED, SHARED_WEIGHTED);
    c.shared_pad = trand_some(r, 2, 1, 17);
    c.shared_at = trand_some(r, 3, 1, 9);
    return c;
}

#endif
