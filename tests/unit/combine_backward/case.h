/* case.h: a case of combine_backward: how its inputs are drawn, its buffers, and how the gradients
   are compared with the reference in double.

   normal_case, random_case   a case with usual fields; one whose fields are drawn
   bufs_new                   draws the inputs and makes the buffers
   fill                       draws rows, places and weights; no two slots share a place, and every
                              row that no slot names is NaN
   put                        puts inputs on the device again and poison into the outputs
   launch                     queues combine_backward and compares
   compare                    compares every output, what must not be written, and the fault word
   run_case                   all of it */
#ifndef MOE_TESTS_COMBINE_BACKWARD_CASE_H
#define MOE_TESTS_COMBINE_BACKWARD_CASE_H

#include "tests/test.h"
#include "tests/test_rows.h"

#include "moe/combine_backward.cuh"
#include "moe/ref/combine_backward.h"

#define MOST_BUFFERS 12

enum { DROWS = 1, DWEIGHTS = 2, DSHARED = 4, DSHARED_WEIGHT = 8, ALL_OUTPUTS = 15 };

typedef struct backward_case {
    int T, H, K;
    int buffers; /* allocations; 0: one array and no table */
    int rows;    /* in each of them; buffers * rows >= T * K */
    int rows_dtype, dy_dtype;
    int outputs;  /* sum of the above */
    int in_place; /* 1: the gradients of rows and of the shared rows replace these */
    int dy_pad, row_pad, drows_pad, shared_pad, dshared_pad; /* stride - H */
    int dy_at, row_at, drows_at, shared_at, dshared_at;      /* misalignment, elements */
    int unweighted;                                          /* 1: no weights */
    int shared_weighted;                                     /* 1: with shared_weight */
    int dropped, bad;                                        /* percent of the slots */
    int bounds;                                              /* 1: num_rows is given */
    int bare;                                                /* 1: no fault word */
} backward_case;

typedef struct backward_bufs {
    tbuf buffer[MOST_BUFFERS], drow[MOST_BUFFERS], table, drows_table;
    tbuf dy, place, weights, shared, shared_weight, dweights, dshared, dshared_weight, fault;
    void* row[MOST_BUFFERS]; /* host copies of the buffers */
    moe_place* h_place;
    float *h_weights, *h_shared_weight;
    void *h_dy, *h_shared;
    int count; /* of buffers */
    moe_combine_backward_desc d;
} backward_bufs;

static const char* case_text(const backward_case* c)
{
    static char text[400];
    snprintf(text, sizeof text,
             "T=%d H=%d K=%d buffers=%d rows=%d %s dy %s outputs=%d in_place=%d pads dy %d row %d "
             "drows %d shared %d dshared %d, misaligned by %d %d %d %d %d, unweighted=%d "
             "shared_weighted=%d dropped=%d%% bad=%d%% bounds=%d bare=%d",
             c->T, c->H, c->K, c->buffers, c->rows, moe_dtype_name(c->rows_dtype),
             moe_dtype_name(c->dy_dtype), c->outputs, c->in_place, c->dy_pad, c->row_pad,
             c->drows_pad, c->shared_pad, c->dshared_pad, c->dy_at, c->row_at, c->drows_at,
             c->shared_at, c->dshared_at, c->unweighted, c->shared_weighted, c->dropped, c->bad,
             c->bounds, c->bare);
    return text;
}

/* Strides that the outputs have: in place those of the inputs. */
static int64_t drows_stride(const backward_case* c)
{
    return c->H + (c->in_place ? c->row_pad : c->drows_pad);
}
static int64_t dshared_stride(const backward_case* c)
{
    return c->H + (c->in_place ? c->shared_pad : c->dshared_pad);
}

/* Draws the elements of a row: 0.5 and more on average, so that no dot is about zero. */
static void draw_row(trand* r, void* rows, int64_t first, int64_t H, int dtype)
{
    for (int64_t h = 0; h < H; ++h) moe_store(rows, first + h, dtype, trand_normal(r) + 0.5f);
}

/* Returns rows of such elements; the gaps between them are NaN. */
static void* draw_rows(trand* r, int64_t rows, int64_t stride, int64_t H, int dtype)
{
    void* p = test_host(moe_extent(rows, stride, H, dtype));
    for (int64_t i = 0; i < rows; ++i) draw_row(r, p, i * stride, H, dtype);
    return p;
}

/* Draws places, weights and rows. The weight of a slot without a row is NaN: it must not be read.
   A row that no slot names is poison, which is NaN. */
static void fill(backward_bufs* b, const backward_case* c, trand* r)
{
    const int64_t all = (int64_t)b->count * c->rows, stride = c->H + c->row_pad;
    int32_t* at = (int32_t*)test_host(all * 4);
    for (int64_t i = 0; i < all; ++i) at[i] = (int32_t)i;
    for (int64_t i = all - 1; i > 0; --i) {
        const int64_t j = trand_int(r, 0, i);
        const int32_t swap = at[i];
        at[i] = at[j];
        at[j] = swap;
    }
    for (int i = 0; i < b->count; ++i)
        test_poison(b->row[i], moe_extent(c->rows, stride, c->H, c->rows_dtype));
    for (int64_t s = 0; s < (int64_t)c->T * c->K; ++s) {
        const int64_t u = trand_int(r, 0, 99);
        moe_place p;
        p.buffer = at[s] / c->rows;
        p.row = at[s] % c->rows;
        b->h_weights[s] = trand_normal(r);
        if (u < c->dropped) {
            p.buffer = -1;
            p.row = u & 1 ? -1 : 0;
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
        } else {
            draw_row(r, b->row[p.buffer], p.row * stride, c->H, c->rows_dtype);
        }
        b->h_place[s] = p;
    }
    free(at);
}

/* Puts rows, places, weights and shared rows on the device, and poison into the outputs. */
static void put(backward_bufs* b)
{
    for (int i = 0; i < b->count; ++i) {
        tbuf_put(&b->buffer[i], b->row[i]);
        tbuf_poison(&b->drow[i]);
    }
    tbuf_put(&b->place, b->h_place);
    tbuf_put(&b->weights, b->h_weights);
    tbuf_put(&b->shared, b->h_shared);
    tbufs_poison(TBUFS(&b->dweights, &b->dshared, &b->dshared_weight));
    tfault_put(&b->fault, MOE_FAULT_NONE, 0);
}

/* Fills in the descriptor. */
static void describe(backward_bufs* b, const backward_case* c)
{
    moe_combine_backward_desc* d = &b->d;
    memset(d, 0, sizeof *d);
    d->dy = b->dy.p;
    if (c->outputs & DWEIGHTS) {
        if (c->buffers) d->table = (const void* const*)b->table.p;
        else d->rows = b->buffer[0].p;
        d->dweights = (float*)b->dweights.p;
    }
    if (c->outputs & DROWS) {
        if (c->buffers)
            d->drows_table = (void* const*)(c->in_place ? &b->table : &b->drows_table)->p;
        else d->drows = (c->in_place ? b->buffer : b->drow)[0].p;
    }
    if (c->buffers && (c->outputs & (DROWS | DWEIGHTS))) d->num_buffers = b->count;
    if (c->outputs & (DROWS | DWEIGHTS)) d->place = (const moe_place*)b->place.p;
    d->weights = c->unweighted ? (const float*)0 : (const float*)b->weights.p;
    if (c->outputs & DSHARED) d->dshared = (c->in_place ? &b->shared : &b->dshared)->p;
    if (c->outputs & DSHARED_WEIGHT) {
        d->shared = b->shared.p;
        d->dshared_weight = (float*)b->dshared_weight.p;
    }
    if (c->shared_weighted && (c->outputs & (DSHARED | DSHARED_WEIGHT)))
        d->shared_weight = (const float*)b->shared_weight.p;
    d->dy_stride = c->dy_pad ? c->H + c->dy_pad : 0;
    d->row_stride = c->row_pad ? c->H + c->row_pad : 0;
    d->drows_stride = drows_stride(c) == c->H ? 0 : drows_stride(c);
    d->shared_stride = c->shared_pad ? c->H + c->shared_pad : 0;
    d->dshared_stride = dshared_stride(c) == c->H ? 0 : dshared_stride(c);
    d->rows_dtype = c->rows_dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->rows_dtype;
    d->dy_dtype = c->dy_dtype == c->rows_dtype ? MOE_DTYPE_DEFAULT : c->dy_dtype;
    d->fault = c->bare ? (uint64_t*)0 : (uint64_t*)b->fault.p;
    d->num_tokens = c->T;
    d->hidden = c->H;
    d->top_k = c->K;
    d->num_rows = c->bounds ? c->rows : 0;
    d->rank = TEST_RANK;
}

/* A buffer of rows, `at` elements misaligned; host null: poison. */
static tbuf rows_buf(const char* name, const void* host, int64_t rows, int64_t stride, int H,
                     int dtype, int at)
{
    const size_t bytes = moe_extent(rows, stride, H, dtype);
    const size_t misalign = (size_t)(at * moe_dtype_bytes(dtype));
    return host ? tbuf_from(name, host, bytes, misalign) : tbuf_new(name, bytes, misalign);
}

static void bufs_new(backward_bufs* b, const backward_case* c, trand* r)
{
    const int64_t slots = (int64_t)c->T * c->K, row_stride = c->H + c->row_pad;
    void *address[MOST_BUFFERS], *gradient[MOST_BUFFERS];
    memset(b, 0, sizeof *b);
    b->count = c->buffers ? c->buffers : 1;
    b->h_place = (moe_place*)test_host(slots * 8);
    b->h_weights = (float*)test_host(slots * 4);
    b->h_dy = draw_rows(r, c->T, c->H + c->dy_pad, c->H, c->dy_dtype);
    b->h_shared = draw_rows(r, c->T, c->H + c->shared_pad, c->H, c->rows_dtype);
    b->h_shared_weight = (float*)test_host(c->T * 4);
    trand_fill_normal(r, b->h_shared_weight, c->T, MOE_FP32);
    for (int i = 0; i < b->count; ++i) {
        b->row[i] = test_host(moe_extent(c->rows, row_stride, c->H, c->rows_dtype));
        b->buffer[i] =
            rows_buf("rows", b->row[i], c->rows, row_stride, c->H, c->rows_dtype, c->row_at);
        b->drow[i] =
            rows_buf("drows", 0, c->rows, drows_stride(c), c->H, c->rows_dtype, c->drows_at);
        address[i] = b->buffer[i].p;
        gradient[i] = b->drow[i].p;
    }
    fill(b, c, r);
    b->table = tbuf_from("table", address, (size_t)b->count * sizeof(void*), 8);
    b->drows_table = tbuf_from("drows_table", gradient, (size_t)b->count * sizeof(void*), 8);
    b->place = tbuf_from("place", b->h_place, (size_t)slots * 8, 8);
    b->weights = tbuf_from("weights", b->h_weights, (size_t)slots * 4, 4);
    b->dy = rows_buf("dy", b->h_dy, c->T, c->H + c->dy_pad, c->H, c->dy_dtype, c->dy_at);
    b->shared = rows_buf("shared", b->h_shared, c->T, c->H + c->shared_pad, c->H, c->rows_dtype,
                         c->shared_at);
    b->shared_weight = tbuf_from("shared_weight", b->h_shared_weight, (size_t)c->T * 4, 4);
    b->dweights = tbuf_new("dweights", (size_t)slots * 4, 4);
    b->dshared =
        rows_buf("dshared", 0, c->T, dshared_stride(c), c->H, c->rows_dtype, c->dshared_at);
    b->dshared_weight = tbuf_new("dshared_weight", (size_t)c->T * 4, 4);
    b->fault = tfault_new(0);
    describe(b, c);
    put(b);
}

static void bufs_free(backward_bufs* b)
{
    for (int i = 0; i < b->count; ++i) {
        tbufs_free(TBUFS(&b->buffer[i], &b->drow[i]));
        free(b->row[i]);
    }
    tbufs_free(TBUFS(&b->table, &b->drows_table, &b->dy, &b->place, &b->weights, &b->shared,
                     &b->shared_weight, &b->dweights, &b->dshared, &b->dshared_weight, &b->fault));
    free(b->h_place), free(b->h_weights), free(b->h_shared_weight);
    free(b->h_dy), free(b->h_shared);
}

/* The reference's descriptor, over the host copies. */
static moe_ref_combine_backward_desc reference(const backward_bufs* b, const backward_case* c)
{
    moe_ref_combine_backward_desc r;
    memset(&r, 0, sizeof r);
    r.forward.table = (const void* const*)b->row;
    r.forward.num_buffers = b->count;
    r.forward.place = b->h_place;
    r.forward.weights = c->unweighted ? (const float*)0 : b->h_weights;
    r.forward.shared = b->h_shared;
    r.forward.shared_weight = c->shared_weighted ? b->h_shared_weight : (float*)0;
    r.forward.row_stride = c->H + c->row_pad;
    r.forward.shared_stride = c->H + c->shared_pad;
    r.forward.rows_dtype = c->rows_dtype;
    r.forward.num_tokens = c->T;
    r.forward.hidden = c->H;
    r.forward.top_k = c->K;
    r.forward.num_rows = c->bounds ? c->rows : 0;
    r.dy = b->h_dy;
    r.dy_stride = c->H + c->dy_pad;
    r.dy_dtype = c->dy_dtype;
    return r;
}

/* Half the distance of two neighbours of the dtype around v. */
static double half_ulp(double v, int dtype)
{
    int e;
    frexp(v, &e);
    if (dtype == MOE_FP32) return ldexp(1, e - 25);
    if (dtype == MOE_FP16) return ldexp(1, e - 11 < -24 ? -25 : e - 12);
    return ldexp(1, e - 9);
}

/* Compares rows [rows, H] of products, each rounded to fp32 and to the dtype. */
static void compare_products(const char* what, const void* got, const double* exact, int64_t rows,
                             int64_t H, int dtype)
{
    int64_t wrong = 0, zeros = 0;
    for (int64_t i = 0; i < rows * H; ++i) {
        const double v = moe_load(got, i, dtype), error = fabs(v - exact[i]);
        const double slack = fabs(exact[i]) * ldexp(1.0001, -24) + ldexp(1, -149);
        zeros += exact[i] == 0;
        if (!(error <= half_ulp(exact[i], dtype) * 1.0001 + slack ||
              error <= half_ulp(v, dtype) * 1.0001 + slack))
            if (wrong++ == 0)
                CHECK(0, "%s: row %lld [%lld]: %.9g, not %.9g", what, (long long)(i / H),
                      (long long)(i % H), v, exact[i]);
    }
    CHECK(wrong == 0, "%s: %lld elements are not the rounded product", what, (long long)wrong);
    if (zeros < rows * H) CHECK_CLOSE(what, got, dtype, H, exact, (const double*)0, rows, H);
}

/* Compares the sums of H products with the bound of the house; all zeros where every slot has no
   row. */
static void compare_dots(const char* what, const tbuf* b, const double* exact, int64_t rows,
                         int64_t columns, int H)
{
    void* got = tbuf_copy(b);
    int64_t zeros = 0;
    for (int64_t i = 0; i < rows * columns; ++i) zeros += exact[rows * columns + i] == 0;
    if (zeros < rows * columns) {
        CHECK_CLOSE_SUM(what, got, columns, exact, exact + rows * columns, H, rows, columns);
    } else {
        for (int64_t i = 0; i < rows * columns; ++i)
            CHECK(((const float*)got)[i] == 0, "%s: [%lld] is not 0", what, (long long)i);
    }
    free(got);
}

/* Compares the gradient rows of all slots. All other bytes of the buffers must be what they were:
   padding rows, gaps between rows, the rows of slots that were skipped. */
static void compare_drows(const backward_bufs* b, const backward_case* c, const double* exact)
{
    const int64_t H = c->H, slots = (int64_t)c->T * c->K, elem = moe_dtype_bytes(c->rows_dtype);
    char* dense = (char*)test_host(slots * H * elem);
    void *got[MOST_BUFFERS], *want[MOST_BUFFERS];
    for (int i = 0; i < b->count; ++i) {
        const tbuf* buffer = c->in_place ? &b->buffer[i] : &b->drow[i];
        got[i] = tbuf_copy(buffer);
        want[i] = test_host((int64_t)buffer->bytes);
        if (c->in_place) memcpy(want[i], b->row[i], buffer->bytes);
    }
    memset(dense, 0, (size_t)(slots * H * elem));
    for (int64_t s = 0; s < slots; ++s) {
        const moe_place p = b->h_place[s];
        const int64_t at = p.row * drows_stride(c) * elem;
        if (p.buffer < 0 || p.buffer >= b->count || p.row < 0 || p.row >= c->rows) continue;
        memcpy(dense + s * H * elem, (char*)got[p.buffer] + at, (size_t)(H * elem));
        memcpy((char*)want[p.buffer] + at, (char*)got[p.buffer] + at, (size_t)(H * elem));
    }
    compare_products("drows", dense, exact, slots, H, c->rows_dtype);
    for (int i = 0; i < b->count; ++i) {
        CHECK(memcmp(got[i], want[i], b->drow[i].bytes) == 0,
              "buffer %d: bytes of no slot's row were written", i);
        free(got[i]), free(want[i]);
    }
    free(dense);
}

/* Compares dshared and the gaps between its rows. */
static void compare_dshared(const backward_bufs* b, const backward_case* c, const double* exact)
{
    const int64_t T = c->T, row = c->H * moe_dtype_bytes(c->rows_dtype);
    const int64_t pitch = dshared_stride(c) * moe_dtype_bytes(c->rows_dtype);
    char* got = (char*)tbuf_copy(c->in_place ? &b->shared : &b->dshared);
    char* dense = (char*)test_host(T * row);
    for (int64_t t = 0; t < T; ++t) memcpy(dense + t * row, got + t * pitch, (size_t)row);
    compare_products("dshared", dense, exact, T, c->H, c->rows_dtype);
    for (int64_t t = 0; t + 1 < T; ++t)
        for (int64_t i = row; i < pitch; ++i)
            if (got[t * pitch + i] != (char)test_poison_byte((size_t)(t * pitch + i))) {
                CHECK(0, "the gap after row %lld of dshared was written", (long long)t);
                i = pitch, t = T;
            }
    free(got), free(dense);
}

/* Compares every output that the case asks for, and the fault word. Inputs and the other outputs
   must be untouched. */
static void compare(const backward_bufs* b, const backward_case* c)
{
    const int64_t T = c->T, H = c->H, slots = T * c->K;
    const int before = test_now.failures, replaced = c->in_place ? c->outputs : 0;
    double *drows = (double*)test_host(slots * H * 8), *dweights = (double*)test_host(slots * 16);
    double *dshared = (double*)test_host(T * H * 8), *dshared_weight = (double*)test_host(T * 16);
    const moe_ref_combine_backward_desc r = reference(b, c);
    int64_t bad = moe_ref_combine_backward_f64(&r, drows, dweights, dshared, dshared_weight);
    if (c->outputs & DROWS) compare_drows(b, c, drows);
    if (c->outputs & DWEIGHTS) compare_dots("dweights", &b->dweights, dweights, T, c->K, c->H);
    if (c->outputs & DSHARED) compare_dshared(b, c, dshared);
    if (c->outputs & DSHARED_WEIGHT)
        compare_dots("dshared_weight", &b->dshared_weight, dshared_weight, T, 1, c->H);
    if (c->bare || !(c->outputs & (DROWS | DWEIGHTS))) bad = -1;
    CHECK_FAULT_AT(&b->fault, MOE_FAULT_BAD_PLACE, bad);
    for (int i = 0; i < b->count; ++i)
        CHECK(((replaced & DROWS) || tbuf_holds(&b->buffer[i], b->row[i])) &&
                  (((c->outputs & DROWS) && !c->in_place) || tbuf_holds(&b->drow[i], 0)),
              "rows, or gradients that were not asked for");
    CHECK(tbuf_holds(&b->dy, b->h_dy) && tbuf_holds(&b->place, b->h_place) &&
              tbuf_holds(&b->weights, b->h_weights) &&
              ((replaced & DSHARED) || tbuf_holds(&b->shared, b->h_shared)) &&
              tbuf_holds(&b->shared_weight, b->h_shared_weight),
          "inputs");
    CHECK(((c->outputs & DWEIGHTS) || tbuf_holds(&b->dweights, 0)) &&
              ((c->outputs & DSHARED && !c->in_place) || tbuf_holds(&b->dshared, 0)) &&
              ((c->outputs & DSHARED_WEIGHT) || tbuf_holds(&b->dshared_weight, 0)),
          "outputs that were not asked for");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    free(drows), free(dweights), free(dshared), free(dshared_weight);
}

/* Queues combine_backward and compares. */
static void launch(const backward_bufs* b, const backward_case* c)
{
    CHECK_STATUS(moe_combine_backward(&b->d, test_now.stream), MOE_OK);
    compare(b, c);
}

/* Draws, runs and compares a case. */
static void run_case(const backward_case* c, trand* r)
{
    backward_bufs b;
    bufs_new(&b, c, r);
    launch(&b, c);
    bufs_free(&b);
}

/* The usual case: one allocation an expert, reached through the table, with a few padding rows. */
static backward_case normal_case(int T, int H, int K)
{
    backward_case c;
    memset(&c, 0, sizeof c);
    c.T = T, c.H = H, c.K = K;
    c.buffers = 7;
    c.rows = (T * K + 6) / 7 + 1;
    c.rows_dtype = c.dy_dtype = MOE_BF16;
    c.outputs = ALL_OUTPUTS;
    c.shared_weighted = 1;
    c.dropped = 10;
    c.bounds = 1;
    return c;
}

static backward_case random_case(trand* r, int T, int H, int K)
{
    backward_case c = normal_case(T, H, K);
    const int count = trand_int(r, 0, 3) ? (int)trand_int(r, 1, MOST_BUFFERS) : 0;
    c.buffers = count;
    c.rows = T * K / (count ? count : 1) + (int)trand_int(r, 1, 4);
    c.rows_dtype = trand_dtype(r);
    c.dy_dtype = trand_dtype(r);
    c.outputs = trand_one_in(r, 2) ? ALL_OUTPUTS : (int)trand_int(r, 1, ALL_OUTPUTS);
    c.in_place = trand_one_in(r, 3);
    c.dy_pad = trand_some(r, 2, 1, 17);
    c.row_pad = trand_some(r, 2, 1, 17);
    c.drows_pad = trand_some(r, 2, 1, 17);
    c.shared_pad = trand_some(r, 2, 1, 17);
    c.dshared_pad = trand_some(r, 2, 1, 17);
    c.dy_at = trand_some(r, 5, 1, 9);
    c.row_at = trand_some(r, 5, 1, 9);
    c.drows_at = trand_some(r, 5, 1, 9);
    c.shared_at = trand_some(r, 5, 1, 9);
    c.dshared_at = trand_some(r, 5, 1, 9);
    if (trand_one_in(r, 2)) { /* 16-byte vectors, where H is a multiple of 8 */
        c.dy_pad = c.row_pad = c.drows_pad = c.shared_pad = c.dshared_pad = 8;
        c.dy_at = c.row_at = c.drows_at = c.shared_at = c.dshared_at = 0;
    }
    c.unweighted = trand_one_in(r, 5);
    c.shared_weighted = trand_one_in(r, 2);
    c.dropped = trand_some(r, 2, 1, 60);
    c.bad = trand_some(r, 3, 1, 20);
    c.bounds = (int)trand_int(r, 0, 1);
    c.bare = trand_one_in(r, 6);
    return c;
}

#endif
