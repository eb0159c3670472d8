/* test_combine_scatter.cu: moe/combine_scatter.cuh against a naive sum in double. The additions
   come in any order, so bounds, not bits, are compared; sums of small whole numbers are exact.

     nvcc -I. -arch=sm_90a tests/unit/test_combine_scatter.cu -o test_combine_scatter
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_combine_scatter.cu -o test_combine_scatter */
#include "tests/test.h"

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

/* The token or slot of each row, and its weight; NaN where nobody may look. */
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
    tbuf_free(&b->table);
    tbuf_free(&b->offset);
    tbuf_free(&b->count);
    tbuf_free(&b->index);
    tbuf_free(&b->weight);
    tbuf_free(&b->y);
    tbuf_free(&b->fault);
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

/* All pairs of dtypes, joined rows and a table, tokens and slots, the three ways to say which rows
   an expert has; whole numbers, whose sums are exact, and others. */
static void test_scatter_dtypes(void)
{
    trand r = trand_new(1);
    for (int from = MOE_FP32; from <= MOE_BF16; ++from)
        for (int to = MOE_FP32; to <= MOE_BF16; ++to)
            for (int i = 0; i < 12; ++i) {
                scatter_case c = normal_case(i % 3 ? 21 : 6, i & 1 ? 136 : 64, 9, 12);
                c.rows_dtype = from;
                c.y_dtype = to;
                c.table = i & 1;
                c.slots = i >> 1 & 1;
                c.by = i % 3;
                c.unused = i & 4 ? 20 : 0;
                c.whole = i & 1;
                run_case(&c, &r);
            }
}

/* Odd H, strides and addresses: what cannot move 16 bytes, or 4, at a time. */
static void test_scatter_narrow(void)
{
    trand r = trand_new(2);
    for (int i = 0; i < 10; ++i)
        for (int pair = 0; pair < 9; ++pair) {
            scatter_case c = normal_case(11, 72, 5, 9);
            c.rows_dtype = MOE_FP32 + pair % 3;
            c.y_dtype = MOE_FP32 + pair / 3;
            c.table = i & 1;
            if (i == 0) c.H = 71;
            if (i == 1) c.H = 1;
            if (i == 2) c.H = 77, c.row_pad = 3, c.y_pad = 3;
            if (i == 3) c.row_pad = 1;
            if (i == 4) c.y_pad = 1;
            if (i == 5) c.row_at = 1;
            if (i == 6) c.y_at = 1;
            if (i == 7) c.y_at = 2, c.row_at = 3;
            if (i == 8) c.H = 70, c.row_pad = 2, c.y_pad = 10;
            if (i == 9) c.H = 4;
            c.whole = pair & 1;
            run_case(&c, &r);
        }
}

static void test_scatter_shapes(void)
{
    static const int Ts[] = {1, 2, 33, 130}, Es[] = {1, 3, 32, 40}, Hs[] = {8, 65, 256, 520, 1288};
    trand r = trand_new(3);
    for (int i = 0; i < (MOE_ON_HOST ? 60 : 400); ++i) {
        scatter_case c = normal_case(Ts[trand_int(&r, 0, 3)], Hs[trand_int(&r, 0, 4)],
                                     Es[trand_int(&r, 0, 3)], (int)trand_int(&r, 0, 30));
        if (trand_int(&r, 0, 5) == 0) c.rows = -1;
        c.K = (int)trand_int(&r, 1, 9);
        c.rows_dtype = (int)trand_int(&r, MOE_FP32, MOE_BF16);
        c.y_dtype = (int)trand_int(&r, MOE_FP32, MOE_BF16);
        c.table = (int)trand_int(&r, 0, 1);
        c.by = (int)trand_int(&r, 0, 2);
        c.slots = (int)trand_int(&r, 0, 1);
        c.row_pad = trand_int(&r, 0, 2) ? 0 : (int)trand_int(&r, 1, 17);
        c.y_pad = trand_int(&r, 0, 2) ? 0 : (int)trand_int(&r, 1, 17);
        c.unweighted = trand_int(&r, 0, 3) == 0;
        c.unused = (int)trand_int(&r, 0, 2) * 15;
        c.bad = trand_int(&r, 0, 3) ? 0 : 10;
        c.max_rows = (int)trand_int(&r, 0, 2) * 20; /* also less than there are, and more */
        c.bare = trand_int(&r, 0, 3) == 0;
        c.whole = c.T > 2 && (int)trand_int(&r, 0, 1);
        run_case(&c, &r);
    }
}

/* More rows than the grid has blocks for, so that blocks loop. */
static void test_scatter_loops(void)
{
    trand r = trand_new(4);
    for (int i = 0; i < 2; ++i) {
        scatter_case c = normal_case(50, 40, 2, 600);
        scatter_bufs b;
        c.y_dtype = MOE_FP32;
        c.max_rows = i ? 1 : 40;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_combine_scatter(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c, -1);
        bufs_free(&b);
    }
}

static void test_scatter_nothing(void)
{
    trand r = trand_new(5);
    scatter_case c = normal_case(5, 16, 3, 4);
    scatter_bufs b;
    moe_combine_scatter_desc d;
    memset(&d, 0, sizeof d);
    d.hidden = 64;
    d.num_experts = 8;
    CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
    d.num_rows = 4;
    CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
    d.num_tokens = 4;
    d.num_rows = 0;
    CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
    bufs_new(&b, &c, &r); /* experts of which none has a row: no address is looked at */
    memset(b.h_offset, 0, sizeof b.h_offset);
    memset(b.h_count, 0, sizeof b.h_count);
    tbuf_put(&b.offset, b.h_offset);
    CHECK_STATUS(moe_combine_scatter(&b.d, test_now.stream), MOE_OK);
    compare(&b, &c, -1);
    bufs_free(&b);
}

/* The call with a wrong expert: without a fault word all others are added; with one, it says which
   is wrong, and a later call that is given the same word does nothing. */
static void check_bad_expert(scatter_bufs* b, const scatter_case* c, int code, int e)
{
    void* y;
    b->d.fault = 0;
    CHECK_STATUS(moe_combine_scatter(&b->d, test_now.stream), MOE_OK);
    compare(b, c, e);
    b->d.fault = (uint64_t*)b->fault.p;
    tbuf_put(&b->y, b->h_y);
    CHECK_STATUS(moe_combine_scatter(&b->d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b->fault, code, e);
    y = tbuf_copy(&b->y);
    CHECK_STATUS(moe_combine_scatter(&b->d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b->y, y), "after a stop fault");
    CHECK_FAULT(&b->fault, code, e);
    free(y);
}

/* Offsets and counts that make no sense. */
static void test_scatter_bad_offset(void)
{
    trand r = trand_new(6);
    for (int i = 0; i < 8; ++i) {
        scatter_case c = normal_case(20, 64, 6, 10);
        scatter_bufs b;
        c.y_dtype = MOE_FP32;
        c.by = i < 4 ? BY_OFFSET : i < 6 ? BY_COUNT : BY_BOTH;
        do bufs_new(&b, &c, &r);
        while (b.h_count[5] == 0 && (bufs_free(&b), 1));
        if (i == 0) b.h_offset[6] = b.R + 1;
        if (i == 1) b.h_offset[6] = b.h_offset[5] - 1;
        if (i == 2) b.h_offset[6] = INT32_MIN;
        if (i == 3) b.h_offset[6] = INT32_MAX;
        if (i == 4) b.h_count[5] = INT32_MAX;
        if (i == 5) b.h_count[5] = -1;
        if (i == 6) b.h_count[5] = b.h_offset[6] - b.h_offset[5] + 1;
        if (i == 7) b.h_count[5] = INT32_MIN;
        tbuf_put(&b.offset, b.h_offset);
        tbuf_put(&b.count, b.h_count);
        b.h_count[5] = 0;
        check_bad_expert(&b, &c, MOE_FAULT_BAD_OFFSET, 5);
        bufs_free(&b);
    }
}

/* Counts without offsets whose sum passes 2^31 and 2^32, within a thread's share and across threads:
   an expert behind them begins nowhere, though the sum modulo 2^32 is a row. */
static void test_scatter_counts_past_2_31(void)
{
    enum { T = 6, H = 16, R = 8, MOST = 600 };
    static const struct {
        int experts, apart; /* experts between two with a count; 256: all of them one thread's */
        int big, small;     /* so many count INT32_MAX each, then one `small` */
    } step[] = {{4, 1, 2, 2}, {4, 1, 2, 3},       {4, 1, 1, 1},     {6, 1, 4, 4},
                {4, 1, 0, 9}, {600, 1, 514, 514}, {600, 256, 2, 2}, {600, 256, 2, 4}};
    trand r = trand_new(16);
    scatter_case c = normal_case(T, H, 1, R);
    void* rows = new_rows(&c, &r, R, H, MOE_BF16);
    void* y = new_rows(&c, &r, T, H, MOE_BF16);
    int32_t token[R];
    for (int i = 0; i < R; ++i) token[i] = i % T;
    for (size_t i = 0; i < sizeof step / sizeof *step; ++i) {
        int32_t count[MOST] = {0};
        tbuf brows = tbuf_from("rows", rows, R * H * 2, 0), by = tbuf_from("y", y, T * H * 2, 0);
        tbuf btoken = tbuf_from("row_token", token, sizeof token, 0), bcount, fault = tfault_new(0);
        moe_combine_scatter_desc d;
        for (int e = 0; e < step[i].big; ++e) count[e * step[i].apart] = INT32_MAX;
        count[step[i].big * step[i].apart] = step[i].small;
        count[step[i].experts - 1] = 5;
        bcount = tbuf_from("expert_count", count, (size_t)step[i].experts * 4, 0);
        memset(&d, 0, sizeof d);
        d.rows = brows.p;
        d.expert_count = (const int32_t*)bcount.p;
        d.row_token = (const int32_t*)btoken.p;
        d.y = by.p;
        d.num_tokens = T;
        d.hidden = H;
        d.num_experts = step[i].experts;
        d.num_rows = R;
        CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&by, y), "step %d: rows of an expert that begins nowhere", (int)i);
        d.fault = (uint64_t*)fault.p;
        d.rank = TEST_RANK;
        CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
        CHECK_FAULT(&fault, MOE_FAULT_BAD_OFFSET, 0);
        CHECK(tbuf_holds(&by, y), "step %d, with a fault word", (int)i);
        tbuf_free(&brows);
        tbuf_free(&by);
        tbuf_free(&btoken);
        tbuf_free(&bcount);
        tbuf_free(&fault);
    }
    free(rows);
    free(y);
}

/* The first offset alone is wrong: only the first expert is. */
static void test_scatter_bad_first(void)
{
    trand r = trand_new(7);
    scatter_case c = normal_case(20, 64, 6, 10);
    scatter_bufs b;
    c.y_dtype = MOE_FP32;
    bufs_new(&b, &c, &r);
    b.h_offset[0] = -3;
    tbuf_put(&b.offset, b.h_offset);
    b.h_offset[0] = 0;
    check_bad_expert(&b, &c, MOE_FAULT_BAD_OFFSET, 0);
    bufs_free(&b);
}

/* A null or misaligned address of an expert that has rows. */
static void test_scatter_bad_table(void)
{
    trand r = trand_new(8);
    for (int i = 0; i < 2; ++i) {
        scatter_case c = normal_case(20, 64, 6, 10);
        scatter_bufs b;
        void** table;
        const int bad = 2;
        c.table = 1;
        c.y_dtype = MOE_FP32;
        do bufs_new(&b, &c, &r);
        while (b.h_count[2] == 0 && (bufs_free(&b), 1));
        table = (void**)tbuf_copy(&b.table);
        table[bad] = i ? (char*)table[bad] + 1 : (void*)0;
        tbuf_put(&b.table, table);
        check_bad_expert(&b, &c, MOE_FAULT_BAD_TABLE, bad);
        free(table);
        bufs_free(&b);
    }
}

/* What is not finite stays so, in its token alone. */
static void test_scatter_nan(void)
{
    trand r = trand_new(9);
    for (int dtype = MOE_FP32; dtype <= MOE_BF16; ++dtype) {
        scatter_case c = normal_case(20, 72, 4, 20);
        scatter_bufs b;
        void* y;
        int row = 0, nan, inf;
        c.y_dtype = dtype;
        c.unweighted = 1;
        bufs_new(&b, &c, &r);
        if (b.R == 0) {
            bufs_free(&b);
            continue;
        }
        moe_store(b.row[0], row * c.H + 5, MOE_BF16, NAN);
        moe_store(b.row[0], row * c.H + 6, MOE_BF16, -INFINITY);
        tbuf_put(&b.buffer[0], b.row[0]);
        CHECK_STATUS(moe_combine_scatter(&b.d, test_now.stream), MOE_OK);
        y = tbuf_copy(&b.y);
        nan = inf = 0;
        for (int i = 0; i < c.T * c.H; ++i) {
            const float v = moe_load(y, i, dtype);
            nan += v != v;
            inf += v == -INFINITY;
        }
        CHECK(nan == 1 && inf == 1, "%s: %d NaN, %d infinite", moe_dtype_name(dtype), nan, inf);
        CHECK(moe_load(y, b.h_index[row] * c.H + 6, dtype) == -INFINITY, "whose it is");
        free(y);
        bufs_free(&b);
    }
}

static moe_status call_scatter(void* d, cudaStream_t stream)
{
    return moe_combine_scatter((const moe_combine_scatter_desc*)d, stream);
}

/* A captured graph replayed with other rows, tokens and counts. */
static void test_scatter_graph(void)
{
    trand r = trand_new(10);
    scatter_case c = normal_case(40, 264, 7, 20);
    scatter_bufs b;
    tgraph g;
    c.y_dtype = MOE_FP32;
    c.by = BY_BOTH;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_combine_scatter_preload(), MOE_OK);
    if (tgraph_capture(&g, call_scatter, &b.d)) {
        for (int i = 0; i < 3; ++i) {
            for (int e = 0; e < c.E; ++e)
                b.h_count[e] = (int)trand_int(&r, 0, b.h_offset[e + 1] - b.h_offset[e]);
            fill_rows(&b, &c, &r);
            tbuf_put(&b.count, b.h_count);
            tbuf_put(&b.index, b.h_index);
            tbuf_put(&b.weight, b.h_weight);
            tbuf_put(&b.y, b.h_y);
            tgraph_launch(&g);
            compare(&b, &c, -1);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
}

/* What route writes fits as it is. */
static void test_scatter_after_route(void)
{
    enum { T = 37, K = 3, E = 5, H = 48, R = T * K };
    trand r = trand_new(11);
    scatter_case c = normal_case(T, H, E, 0);
    moe_route_desc route;
    moe_combine_scatter_desc d;
    float *weights = (float*)test_host(R * 4), *y0 = (float*)test_host(T * H * 4), *got;
    int32_t* ids = (int32_t*)test_host(R * 4);
    void* rows;
    tbuf b_ids, b_weights, b_count, b_offset, b_slot, b_row_slot, b_row_weight, b_rows, b_y, b_work;
    double worst = 0;
    int32_t* row_slot;
    for (int i = 0; i < R; ++i) {
        ids[i] = (int32_t)trand_int(&r, -1, E - 1);
        weights[i] = trand_normal(&r);
    }
    for (int i = 0; i < T * H; ++i) y0[i] = trand_normal(&r);
    rows = new_rows(&c, &r, R, H, MOE_BF16);
    memset(&route, 0, sizeof route);
    route.num_tokens = T, route.num_experts = E, route.top_k = K;
    CHECK_STATUS(moe_route_workspace(&route, &route.workspace_bytes), MOE_OK);
    b_ids = tbuf_from("ids", ids, R * 4, 0);
    b_weights = tbuf_from("weights", weights, R * 4, 0);
    b_count = tbuf_new("expert_count", E * 4, 0);
    b_offset = tbuf_new("expert_offset", E * 4 + 4, 0);
    b_slot = tbuf_new("slot_row", R * 4, 0);
    b_row_slot = tbuf_new("row_slot", R * 4, 0);
    b_row_weight = tbuf_new("row_weight", R * 4, 0);
    b_rows = tbuf_from("rows", rows, R * H * 2, 0);
    b_y = tbuf_from("y", y0, T * H * 4, 0);
    b_work = tbuf_new("workspace", route.workspace_bytes, 0);
    route.ids = (const int32_t*)b_ids.p;
    route.weights = (const float*)b_weights.p;
    route.expert_count = (int32_t*)b_count.p;
    route.expert_offset = (int32_t*)b_offset.p;
    route.slot_row = (int32_t*)b_slot.p;
    route.row_slot = (int32_t*)b_row_slot.p;
    route.row_weight = (float*)b_row_weight.p;
    route.workspace = b_work.p;
    CHECK_STATUS(moe_route(&route, test_now.stream), MOE_OK);
    memset(&d, 0, sizeof d);
    d.rows = b_rows.p;
    d.expert_offset = route.expert_offset;
    d.row_slot = route.row_slot;
    d.row_weight = route.row_weight;
    d.top_k = K;
    d.y = b_y.p;
    d.y_dtype = MOE_FP32;
    d.num_tokens = T, d.hidden = H, d.num_experts = E, d.num_rows = R;
    CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
    got = (float*)tbuf_copy(&b_y);
    row_slot = (int32_t*)tbuf_copy(&b_row_slot);
    for (int h = 0; h < H; ++h)
        for (int t = 0; t < T; ++t) {
            double want = y0[t * H + h];
            for (int i = 0; i < R; ++i)
                if (row_slot[i] >= 0 && row_slot[i] / K == t)
                    want += (double)weights[row_slot[i]] * moe_load(rows, i * H + h, MOE_BF16);
            if (!(fabs(got[t * H + h] - want) <= worst)) worst = fabs(got[t * H + h] - want);
        }
    CHECK(worst <= 1e-5, "error %g", worst);
    CHECK(memcmp(got, y0, T * H * 4) != 0, "y has not changed");
    tbuf_free(&b_ids), tbuf_free(&b_weights), tbuf_free(&b_count), tbuf_free(&b_offset);
    tbuf_free(&b_slot), tbuf_free(&b_row_slot), tbuf_free(&b_row_weight), tbuf_free(&b_rows);
    tbuf_free(&b_y), tbuf_free(&b_work);
    free(weights), free(y0), free(ids), free(rows), free(got), free(row_slot);
}

/* Someone's own kernel: warp w adds row w to y[0], then the whole block adds row 0 to y[1]. */
typedef struct foreign_args {
    void* y;
    const void* rows;
    int y_dtype, rows_dtype, columns, stride;
} foreign_args;

MOE_KERNEL(128, 1) foreign_kernel(MOE_ARG(foreign_args) a)
{
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int yb = a.y_dtype == MOE_FP32 ? 4 : 2, rb = a.rows_dtype == MOE_FP32 ? 4 : 2;
    moe_add_row_atomic(a.y, a.y_dtype, (const char*)a.rows + warp * a.stride * rb, a.rows_dtype,
                       (float)(warp + 1), a.columns, lane, 32);
    moe_add_row_atomic((char*)a.y + a.stride * yb, a.y_dtype, a.rows, a.rows_dtype, 0.5f, a.columns,
                       (int)threadIdx.x, (int)blockDim.x);
}

static void test_scatter_foreign_kernel(void)
{
    trand r = trand_new(12);
    for (int i = 0; i < 27; ++i) {
        const int columns = i < 9 ? 328 : i < 18 ? 1 : 77, stride = i < 9 ? 328 : 79;
        const int from = MOE_FP32 + i % 3, to = MOE_FP32 + i / 3 % 3;
        void *rows = test_host(4 * stride * 4), *y0 = test_host(2 * stride * 4), *y;
        tbuf b_rows, b_y;
        foreign_args a;
        moe_launch_config l;
        int wrong = 0;
        trand_fill_int(&r, rows, 4 * stride, from, -4, 4);
        trand_fill_int(&r, y0, 2 * stride, to, -4, 4);
        b_rows = tbuf_from("rows", rows, (size_t)(4 * stride * moe_dtype_bytes(from)), 0);
        b_y = tbuf_from("y", y0, (size_t)(2 * stride * moe_dtype_bytes(to)), 0);
        a.y = b_y.p, a.rows = b_rows.p;
        a.y_dtype = to, a.rows_dtype = from, a.columns = columns, a.stride = stride;
        l = moe_grid(1, 128, 0, test_now.stream);
        CHECK_STATUS(MOE_LAUNCH(foreign_kernel, l, a), MOE_OK);
        y = tbuf_copy(&b_y);
        for (int h = 0; h < stride; ++h) { /* all of it exact, halves too */
            float sum = moe_load(y0, h, to), half = moe_load(y0, stride + h, to);
            for (int w = 0; w < 4 && h < columns; ++w)
                sum += (float)(w + 1) * moe_load(rows, w * stride + h, from);
            if (h < columns) half += 0.5f * moe_load(rows, h, from);
            wrong += moe_load(y, h, to) != sum || moe_load(y, stride + h, to) != half;
        }
        CHECK(wrong == 0, "%s -> %s, %d columns: %d wrong", moe_dtype_name(from),
              moe_dtype_name(to), columns, wrong);
        tbuf_free(&b_rows), tbuf_free(&b_y);
        free(rows), free(y0), free(y);
    }
}

#define REFUSED(change, kind, field)                                                              \
    do {                                                                                          \
        d = good;                                                                                 \
        change;                                                                                   \
        test_status(moe_combine_scatter(&d, test_now.stream), MOE_STATUS(kind, field), __FILE__,  \
                    __LINE__, #change);                                                           \
        CHECK_REFUSED(moe_combine_scatter_prepared, moe_combine_scatter_prepare, &d,              \
                      MOE_STATUS(kind, field));                                                   \
    } while (0)
#define AT(p, bytes) ((void*)((char*)(p) + (bytes)))

static void test_scatter_refusals(void)
{
    trand r = trand_new(13);
    scatter_case c = normal_case(20, 64, 6, 10);
    scatter_bufs b;
    moe_combine_scatter_desc good, d;
    bufs_new(&b, &c, &r);
    good = b.d;
    CHECK_STATUS(moe_combine_scatter(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED(d.hidden = 0, MOE_ERR_RANGE, hidden);
    REFUSED(d.hidden = (1 << 28) + 1, MOE_ERR_RANGE, hidden);
    REFUSED(d.num_experts = 0, MOE_ERR_RANGE, num_experts);
    REFUSED(d.num_experts = MOE_MAX_EXPERTS + 1, MOE_ERR_RANGE, num_experts);
    REFUSED(d.num_rows = -1, MOE_ERR_RANGE, num_rows);
    REFUSED(d.max_rows = -1, MOE_ERR_RANGE, max_rows);
    REFUSED(d.rows_dtype = 4, MOE_ERR_DTYPE, rows_dtype);
    REFUSED(d.y_dtype = -1, MOE_ERR_DTYPE, y_dtype);
    REFUSED(d.row_stride = 63, MOE_ERR_STRIDE, row_stride);
    REFUSED(d.row_stride = INT64_MAX, MOE_ERR_STRIDE, row_stride);
    REFUSED(d.y_stride = -64, MOE_ERR_STRIDE, y_stride);
    REFUSED(d.table = (const void* const*)b.table.p, MOE_ERR_CONFLICT, rows);
    REFUSED((d.row_slot = d.row_token, d.top_k = 2), MOE_ERR_CONFLICT, row_slot);
    REFUSED((d.row_slot = d.row_token, d.row_token = 0), MOE_ERR_RANGE, top_k);
    REFUSED(d.rows = 0, MOE_ERR_NULL, table);
    REFUSED(d.expert_offset = 0, MOE_ERR_NULL, expert_offset);
    REFUSED(d.row_token = 0, MOE_ERR_NULL, row_token);
    REFUSED(d.y = 0, MOE_ERR_NULL, y);
    REFUSED((d.rows = 0, d.table = (const void* const*)AT(b.table.p, 4)), MOE_ERR_ALIGN, table);
    REFUSED(d.rows = AT(d.rows, 1), MOE_ERR_ALIGN, rows);
    REFUSED(d.expert_offset = (const int32_t*)AT(d.expert_offset, 2), MOE_ERR_ALIGN, expert_offset);
    REFUSED(d.expert_count = (const int32_t*)AT(b.count.p, 1), MOE_ERR_ALIGN, expert_count);
    REFUSED(d.row_token = (const int32_t*)AT(d.row_token, 2), MOE_ERR_ALIGN, row_token);
    REFUSED((d.row_slot = (const int32_t*)AT(d.row_token, 2), d.row_token = 0, d.top_k = 1),
            MOE_ERR_ALIGN, row_slot);
    REFUSED(d.row_weight = (const float*)AT(d.row_weight, 1), MOE_ERR_ALIGN, row_weight);
    REFUSED(d.y = AT(d.y, 1), MOE_ERR_ALIGN, y);
    REFUSED(d.rank = -1, MOE_ERR_RANGE, rank);
    REFUSED(d.rank = MOE_FAULT_MAX_RANK + 1, MOE_ERR_RANGE, rank);
    REFUSED(d.fault = (uint64_t*)AT(d.fault, 4), MOE_ERR_ALIGN, fault);
    REFUSED(d.y = (void*)d.rows, MOE_ERR_OVERLAP, y);
    REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
    REFUSED((d.num_rows = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
    REFUSED(d.fault = (uint64_t*)d.y, MOE_ERR_OVERLAP, fault);
    REFUSED((d.rows = 0, d.table = (const void* const*)d.y), MOE_ERR_OVERLAP, y);
    REFUSED(d.expert_offset = (const int32_t*)AT(d.y, 20 * 64 * 2 - 4), MOE_ERR_OVERLAP, y);
    REFUSED(d.expert_count = (const int32_t*)d.y, MOE_ERR_OVERLAP, y);
    REFUSED((d.row_slot = (const int32_t*)d.y, d.row_token = 0, d.top_k = 1), MOE_ERR_OVERLAP, y);
    REFUSED(d.row_weight = (const float*)d.y, MOE_ERR_OVERLAP, y);
    REFUSED(d.expert_count = (const int32_t*)d.fault, MOE_ERR_OVERLAP, fault);
    { /* rows further apart than H: another buffer in the last of them */
        tbuf big = tbuf_new("big", (size_t)(20 + b.R) * 72 * 2, 0);
        char *p = (char*)big.p, *end_y = p + (19 * 72 + 64) * 2;
        char* end_rows = p + ((b.R - 1) * 72 + 64) * 2;
        REFUSED((d.y = p, d.y_stride = 72, d.fault = (uint64_t*)(end_y - 8)), MOE_ERR_OVERLAP,
                fault);
        REFUSED((d.y = p, d.y_stride = 72, d.row_token = (const int32_t*)(end_y - 4)),
                MOE_ERR_OVERLAP, y);
        REFUSED((d.y = p, d.y_stride = 72, d.rows = end_y - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.rows = p, d.row_stride = 72, d.y = end_rows - 2), MOE_ERR_OVERLAP, y);
        REFUSED((d.rows = p, d.row_stride = 72, d.fault = (uint64_t*)(end_rows - 8)),
                MOE_ERR_OVERLAP, fault);
        CHECK(tbuf_holds(&big, 0), "a refused call wrote something");
        tbuf_free(&big);
    }
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.y, b.h_y), "a refused call wrote y");
    CHECK_STATUS(moe_combine_scatter(&good, test_now.stream), MOE_OK);
    compare(&b, &c, -1);
    bufs_free(&b);
}

/* Many rows on few tokens, wide and in groups of columns, so that additions meet. */
static void test_scatter_large(void)
{
    trand r = trand_new(14);
    for (int i = 0; i < 3; ++i) {
        scatter_case c =
            normal_case(MOE_ON_HOST ? 9 : 200, 2056, MOE_ON_HOST ? 4 : 40, MOE_ON_HOST ? 10 : 60);
        c.rows_dtype = MOE_FP16;
        c.y_dtype = MOE_FP32 + i;
        c.table = 1;
        run_case(&c, &r);
    }
}

/* Rows and y past 2^32 elements. */
static void test_scatter_past_2_31(void)
{
    trand r = trand_new(15);
    if (!twide_possible(2)) return;
    for (int which = 0; which < 2; ++which) {
        scatter_case c = normal_case(5, 64, 3, 6);
        scatter_bufs b;
        moe_combine_scatter_desc d;
        twide wide;
        void* want;
        c.whole = 1;
        do bufs_new(&b, &c, &r);
        while (b.R < 3 && (bufs_free(&b), 1));
        if (!twide_new(&wide, which ? "y" : "rows", which ? c.T : b.R, c.H, MOE_BF16)) {
            bufs_free(&b);
            continue;
        }
        CHECK_STATUS(moe_combine_scatter(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c, -1);
        want = tbuf_copy(&b.y);
        d = b.d;
        if (which) {
            d.y = wide.p;
            d.y_stride = wide.stride;
            twide_put(&wide, b.h_y);
        } else {
            d.rows = wide.p;
            d.row_stride = wide.stride;
            twide_put(&wide, b.row[0]);
            tbuf_put(&b.y, b.h_y);
        }
        CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
        if (which) twide_holds(&wide, want);
        else CHECK(tbuf_holds(&b.y, want), "wide rows");
        twide_free(&wide);
        free(want);
        bufs_free(&b);
    }
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_scatter_dtypes);
    RUN(test_scatter_narrow);
    RUN(test_scatter_shapes);
    RUN(test_scatter_loops);
    RUN(test_scatter_nothing);
    RUN(test_scatter_bad_offset);
    RUN(test_scatter_counts_past_2_31);
    RUN(test_scatter_bad_first);
    RUN(test_scatter_bad_table);
    RUN(test_scatter_nan);
    RUN(test_scatter_graph);
    RUN(test_scatter_after_route);
    RUN(test_scatter_foreign_kernel);
    RUN(test_scatter_refusals);
    RUN(test_scatter_large);
    RUN(test_scatter_past_2_31);
    return test_end();
}
