/* case.h: a case, its buffers, how it is drawn, run and compared */
#ifndef MOE_TESTS_COMBINE_SCATTER_CASE_H
#define MOE_TESTS_COMBINE_SCATTER_CASE_H

#include "tests/test.h"
#include "tests/test_rows.h"

#include "moe/combine_scatter.cuh"
#include "moe/route.cuh"

#define MOST_EXPERTS 48

enum { BY_OFFSET, BY_COUNT, BY_BOTH };

typedef struct scatter_case {
    int T, H, E, K;
    int rows; /* about so many an expert, some with none; -1: all on one expert */
    int rows_dtype, y_dtype;
    int table;          /* 1: an allocation an expert */
    int by;             /* as above */
    int slots;          /* 1: row_slot, 0: row_token */
    int row_pad, y_pad; /* stride - H */
    int row_at, y_at;   /* misalignment, elements */
    int unweighted;     /* 1: no weights */
    int unused, bad;    /* percent of the rows: token -1, out of range */
    int max_rows, bare; /* bare: no fault word */
    int whole;          /* 1: whole numbers, sums are exact */
} scatter_case;

typedef struct scatter_bufs {
    tbuf buffer[MOST_EXPERTS], table, offset, count, index, weight, y, fault;
    void* row[MOST_EXPERTS];
    int32_t h_offset[MOST_EXPERTS + 1], h_count[MOST_EXPERTS];
    int32_t* h_index;
    float* h_weight;
    void* h_y;
    int R, buffers, first_bad;
    moe_combine_scatter_desc d;
} scatter_bufs;

static const char* case_text(const scatter_case* c)
{
    static char text[240];
    snprintf(text, sizeof text,
             "T=%d H=%d E=%d K=%d rows=%d %s -> %s table=%d by=%d slots=%d pads %d %d, misaligned "
             "by %d %d, unweighted=%d unused=%d%% bad=%d%% max_rows=%d bare=%d whole=%d",
             c->T, c->H, c->E, c->K, c->rows, moe_dtype_name(c->rows_dtype),
             moe_dtype_name(c->y_dtype), c->table, c->by, c->slots, c->row_pad, c->y_pad, c->row_at,
             c->y_at, c->unweighted, c->unused, c->bad, c->max_rows, c->bare, c->whole);
    return text;
}

static scatter_case normal_case(int T, int H, int E, int rows)
{
    scatter_case c;
    memset(&c, 0, sizeof c);
    c.T = T;
    c.H = H;
    c.E = E;
    c.K = 2;
    c.rows = rows;
    c.rows_dtype = c.y_dtype = MOE_BF16;
    return c;
}

static float draw(const scatter_case* c, trand* r)
{
    static const float whole[] = {-2, -1, 1, 2};
    return c->whole ? whole[trand_int(r, 0, 3)] : trand_normal(r);
}

/* Rows of numbers, NaN in the gaps between them. */
static void* new_rows(const scatter_case* c, trand* r, int64_t rows, int64_t stride, int dtype)
{
    void* p = test_host(rows * stride * 4);
    for (int64_t i = 0; i < rows; ++i)
        for (int h = 0; h < c->H; ++h) moe_store(p, i * stride + h, dtype, draw(c, r));
    return p;
}

/* How many rows each expert has, and where they begin: with both given, there is room between. */
static void fill_counts(scatter_bufs* b, const scatter_case* c, trand* r)
{
    int at = 0;
    for (int e = 0; e < c->E; ++e) {
        b->h_count[e] = c->rows < 0          ? (e == c->E / 2 ? 150 : 0)
                        : trand_int(r, 0, 3) ? (int)trand_int(r, 0, 2 * c->rows)
                                             : 0;
        b->h_offset[e] = at;
        at += b->h_count[e] + (c->by == BY_BOTH ? (int)trand_int(r, 0, 3) : 0);
    }
    b->h_offset[c->E] = b->R = at;
}

/* The token or slot of each row, and its weight; NaN where no kernel may read. */
static void fill_rows(scatter_bufs* b, const scatter_case* c, trand* r)
{
    b->first_bad = -1;
    for (int e = 0; e < c->E; ++e)
        for (int i = b->h_offset[e]; i < b->h_offset[e + 1]; ++i) {
            const int64_t u = trand_int(r, 0, 99), most = (int64_t)c->T * (c->slots ? c->K : 1);
            const int live = i < b->h_offset[e] + b->h_count[e];
            b->h_weight[i] = draw(c, r);
            b->h_index[i] = (int32_t)trand_int(r, 0, most - 1);
            if (live && u >= c->unused + c->bad) continue;
            b->h_weight[i] = NAN;
            b->h_index[i] = u < c->unused ? -1 : u & 1 ? -2 - (int32_t)u : (int32_t)(most + u - 1);
            if (c->slots && b->h_index[i] >= 0) b->h_index[i] += c->K;
            if (b->h_index[i] >= 0 && b->h_index[i] < most) b->h_index[i] = INT32_MAX;
            if (live && u >= c->unused && b->first_bad < 0) b->first_bad = i;
        }
}

static void bufs_new(scatter_bufs* b, const scatter_case* c, trand* r)
{
    const int64_t row_stride = c->H + c->row_pad, y_stride = c->H + c->y_pad;
    const int row_bytes = moe_dtype_bytes(c->rows_dtype), y_bytes = moe_dtype_bytes(c->y_dtype);
    void* address[MOST_EXPERTS];
    memset(b, 0, sizeof *b);
    fill_counts(b, c, r);
    b->h_index = (int32_t*)test_host((int64_t)b->R * 4);
    b->h_weight = (float*)test_host((int64_t)b->R * 4);
    fill_rows(b, c, r);
    b->buffers = c->table ? c->E : 1;
    for (int i = 0; i < b->buffers; ++i) {
        const int n = c->table ? b->h_count[i] : b->R;
        b->row[i] = new_rows(c, r, n, row_stride, c->rows_dtype);
        b->buffer[i] =
            tbuf_from("rows", b->row[i], (size_t)moe_extent(n, row_stride, c->H, c->rows_dtype),
                      (size_t)(c->row_at * row_bytes));
        address[i] = n ? b->buffer[i].p : 0; /* an expert without rows needs no address */
    }
    b->h_y = new_rows(c, r, c->T, y_stride, c->y_dtype);
    b->table = tbuf_from("table", address, (size_t)b->buffers * sizeof(void*), 8);
    b->offset = tbuf_from("expert_offset", b->h_offset, (size_t)(c->E + 1) * 4, 4);
    b->count = tbuf_from("expert_count", b->h_count, (size_t)c->E * 4, 4);
    b->index = tbuf_from("row_token", b->h_index, (size_t)b->R * 4, 4);
    b->weight = tbuf_from("row_weight", b->h_weight, (size_t)b->R * 4, 4);
    b->y = tbuf_from("y", b->h_y, (size_t)moe_extent(c->T, y_stride, c->H, c->y_dtype),
                     (size_t)(c->y_at * y_bytes));
    b->fault = tfault_new(0);
    if (c->table) b->d.table = (const void* const*)b->table.p;
    else b->d.rows = b->buffer[0].p;
    if (c->by != BY_COUNT) b->d.expert_offset = (const int32_t*)b->offset.p;
    if (c->by != BY_OFFSET) b->d.expert_count = (const int32_t*)b->count.p;
    if (c->slots) {
        b->d.row_slot = (const int32_t*)b->index.p;
        b->d.top_k = c->K;
    } else {
        b->d.row_token = (const int32_t*)b->index.p;
    }
    b->d.row_weight = c->unweighted ? (const float*)0 : (const float*)b->weight.p;
    b->d.row_stride = c->row_pad ? row_stride : 0;
    b->d.rows_dtype = c->rows_dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->rows_dtype;
    b->d.y = b->y.p;
    b->d.y_stride = c->y_pad ? y_stride : 0;
    b->d.y_dtype = c->y_dtype == c->rows_dtype ? MOE_DTYPE_DEFAULT : c->y_dtype;
    b->d.fault = c->bare ? (uint64_t*)0 : (uint64_t*)b->fault.p;
    b->d.rank = TEST_RANK;
    b->d.num_tokens = c->T;
    b->d.hidden = c->H;
    b->d.num_experts = c->E;
    b->d.num_rows = b->R;
    b->d.max_rows = c->max_rows;
}

static void bufs_free(scatter_bufs* b)
{
    for (int i = 0; i < b->buffers; ++i) {
        tbuf_free(&b->buffer[i]);
        free(b->row[i]);
    }
    tbufs_free(TBUFS(&b->table, &b->offset, &b->count, &b->index, &b->weight, &b->y, &b->fault));
    free(b->h_index);
    free(b->h_weight);
    free(b->h_y);
}

/* exact [T, H] = y before + sum of weight * row; bound: each product and each sum rounds once to
   y's dtype, products also in fp32. `skip` is an expert left out, or -1. Returns the number of
   elements to which a few rows are added: most of them must differ from what y held by more than
   the bound, or the comparison shows nothing. */
static int64_t naive(const scatter_bufs* b, const scatter_case* c, int skip, double* exact,
                     double* bound)
{
    const int64_t row_stride = c->H + c->row_pad, y_stride = c->H + c->y_pad;
    const double unit = ldexp(1, c->y_dtype == MOE_FP32 ? -24 : c->y_dtype == MOE_FP16 ? -11 : -8);
    int* n = (int*)calloc((size_t)c->T + 1, sizeof(int));
    int64_t touched = 0;
    for (int64_t t = 0; t < c->T; ++t)
        for (int h = 0; h < c->H; ++h) {
            exact[t * c->H + h] = moe_load(b->h_y, t * y_stride + h, c->y_dtype);
            bound[t * c->H + h] = fabs(exact[t * c->H + h]);
        }
    for (int e = 0; e < c->E; ++e)
        for (int i = 0; i < b->h_count[e] && e != skip; ++i) {
            const int r = b->h_offset[e] + i;
            const int64_t t = b->h_index[r] < 0 ? -1 : b->h_index[r] / (c->slots ? c->K : 1);
            if (t < 0 || t >= c->T) continue;
            ++n[t];
            for (int h = 0; h < c->H; ++h) {
                const double v = (c->unweighted ? 1.0 : (double)b->h_weight[r]) *
                                 moe_load(c->table ? b->row[e] : b->row[0],
                                          (c->table ? i : r) * row_stride + h, c->rows_dtype);
                exact[t * c->H + h] += v;
                bound[t * c->H + h] += fabs(v);
            }
        }
    for (int64_t t = 0; t < c->T; ++t)
        for (int h = 0; h < c->H; ++h) /* fp16 also rounds at its smallest number */
            bound[t * c->H + h] =
                1.05 * ((n[t] + 1) * (unit + ldexp(1, -24)) * bound[t * c->H + h] +
                        (c->y_dtype == MOE_FP16 ? (2 * n[t]) * ldexp(1, -25) : 0));
    for (int t = 0; t < c->T; ++t) touched += n[t] > 0 && n[t] < 8;
    free(n);
    return touched * c->H;
}

static void compare(const scatter_bufs* b, const scatter_case* c, int skip)
{
    const int before = test_now.failures;
    const int64_t T = c->T, H = c->H, y_stride = H + c->y_pad;
    double* exact = (double*)test_host(T * H * 8);
    double* bound = (double*)test_host(T * H * 8);
    void* y = tbuf_copy(&b->y);
    int64_t wrong = 0, shown = 0, worst = 0;
    const int64_t touched = naive(b, c, skip, exact, bound);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t h = 0; h < H; ++h) {
            const double got = moe_load(y, t * y_stride + h, c->y_dtype), want = exact[t * H + h];
            const double most = c->whole ? 0 : bound[t * H + h];
            if (!(fabs(got - want) <= most) && wrong++ == 0) worst = t * H + h;
            shown += fabs(want - moe_load(b->h_y, t * y_stride + h, c->y_dtype)) > most;
        }
    CHECK(wrong == 0, "%lld of %lld wrong; token %lld, column %lld: %.9g, not %.9g, bound %.3g",
          (long long)wrong, (long long)(T * H), (long long)(worst / H), (long long)(worst % H),
          (double)moe_load(y, worst / H * y_stride + worst % H, c->y_dtype), exact[worst],
          bound[worst]);
    CHECK(touched < 32 || shown * 4 > touched, "only %lld of %lld elements tell y from what it was",
          (long long)shown, (long long)touched);
    CHECK(test_strays(y, (int64_t)b->y.bytes, moe_dtype_bytes(c->y_dtype), y_stride, H, 0, T) == 0,
          "something between the rows of y was written");
    for (int i = 0; i < b->buffers; ++i) CHECK(tbuf_holds(&b->buffer[i], b->row[i]), "rows");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    free(exact);
    free(bound);
    free(y);
}

static void run_case(const scatter_case* c, trand* r)
{
    scatter_bufs b;
    bufs_new(&b, c, r);
    if (CHECK_STATUS(moe_combine_scatter(&b.d, test_now.stream), MOE_OK)) compare(&b, c, -1);
    if (!CHECK_FAULT(&b.fault, b.first_bad >= 0 && !c->bare ? MOE_FAULT_BAD_ROW : MOE_FAULT_NONE,
                     b.first_bad >= 0 && !c->bare ? b.first_bad : 0))
        printf("  in: %s\n", case_text(c));
    bufs_free(&b);
}

#endif
