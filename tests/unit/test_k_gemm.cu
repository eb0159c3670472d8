/* test_k_gemm.cu: the k-grouped GEMM, whose reduced dimension is the rows, against its reference.

     nvcc -I. -arch=sm_90a tests/unit/test_k_gemm.cu -o test_k_gemm
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_k_gemm.cu -o test_k_gemm

   test_k_shapes     numbers of rows about tile_k, tiles, tails, dtypes
   test_k_lone       one expert; all rows at one; no rows
   test_k_gather     either operand gathered; strides; tables; added to C
   test_k_wgmma      the wgmma path, with and without workspace
   test_k_rule       where C's transpose is computed, its sizes choose the tile
   test_k_nan        NaN and infinity stay with their expert
   test_k_faults     bad offsets and addresses, stop faults
   test_k_same_bits  the same bits over runs
   test_k_refusals   every field, with its status
   test_k_far_rows   the largest row numbers
   test_k_graph      a captured product replayed */
#include "tests/test.h"
#include "tests/test_weights.h"

#include "moe/gemm/k_grouped.cuh"
#include "moe/ref/k_gemm.h"
#include "tests/test_case.h"
#include "tests/test_case_rows.h"

enum { MOST = 80 };

typedef struct k_case {
    int E, m, n, dtype, c_dtype, tile, path, grid_limit;
    int rows[MOST];          /* of each expert */
    int a_gather, b_gather;  /* 0: row r itself; else an index, divided by this */
    int none, bad;           /* entries of the indices: -1; out of range */
    int a_pad, b_pad, c_pad; /* stride - least */
    int c_table, accumulate, empty; /* empty: as empty_experts */
    int beyond; /* rows that no expert owns: all NaN */
} k_case;

typedef struct k_bufs {
    void *h_a, *h_b, *h_c; /* what C holds before */
    int32_t *h_index[2], h_offset[MOST + 1];
    int num_rows;
    int64_t a_rows, b_rows, c_size; /* elements of C, strides included */
    tbuf a, b, index[2], offset, c, table, fault, workspace;
    moe_k_grouped_gemm_desc d;
} k_bufs;

static const char* case_text(const k_case* c)
{
    static char text[200];
    snprintf(text, sizeof text,
             "E=%d m=%d n=%d rows %d %d %d.. %s -> %s tile=%d gather %d %d none=%d bad=%d pads %d "
             "%d %d table=%d accumulate=%d empty=%d path=%d",
             c->E, c->m, c->n, c->rows[0], c->rows[1], c->rows[2], moe_dtype_name(c->dtype),
             moe_dtype_name(c->c_dtype), c->tile, c->a_gather, c->b_gather, c->none, c->bad,
             c->a_pad, c->b_pad, c->c_pad, c->c_table, c->accumulate, c->empty, c->path);
    return text;
}

static k_case normal_case(int E, const int* rows, int m, int n)
{
    k_case c = {};
    c.E = E, c.m = m, c.n = n;
    memcpy(c.rows, rows, (size_t)E * sizeof(int));
    c.dtype = c.c_dtype = test_half();
    return c;
}

/* Returns what the call must answer: a refusal where this binary or device lacks the code. */
static moe_status expected(const k_case* c)
{
    return test_gemm_status(c->dtype, c->tile == MOE_TILE_64x64 ? MOE_TILE_AUTO : c->tile);
}

/* Draws an index of `rows` rows of an operand; some entries that experts own are -1 or bad. */
static int32_t* index_new(const k_bufs* b, const k_case* c, int gather, int64_t rows, trand* r)
{
    int32_t* index = (int32_t*)test_host((b->num_rows + 1) * 4);
    for (int i = 0; i < b->num_rows; ++i)
        index[i] = (int32_t)trand_int(r, 0, (int)(rows * gather) - 1);
    for (int i = 0; i < c->none + c->bad && b->h_offset[c->E] > 0; ++i)
        index[trand_int(r, 0, b->h_offset[c->E] - 1)] = i < c->none ? -1
                                                        : i & 1     ? (int32_t)(rows * gather)
                                                                    : -3;
    return index;
}

/* Does an operand with this index, or without one, have no row for entry i? */
static int row_lacks(const int32_t* index, int64_t i, int64_t rows, int gather)
{
    return index && (index[i] < 0 || index[i] >= rows * gather);
}

static void bufs_new(k_bufs* b, const k_case* c, trand* r)
{
    const int64_t a_stride = c->m + c->a_pad, b_stride = c->n + c->b_pad;
    const int64_t c_stride = c->n + c->c_pad;
    memset(b, 0, sizeof *b);
    for (int e = 0; e < c->E; ++e) b->h_offset[e + 1] = b->h_offset[e] + c->rows[e];
    b->num_rows = b->h_offset[c->E] + c->beyond;
    b->a_rows = c->a_gather ? b->num_rows / 2 + 3 : b->num_rows;
    b->b_rows = c->b_gather ? b->num_rows / 2 + 5 : b->num_rows;
    b->h_a = trows_new(r, b->a_rows, a_stride, c->m, c->dtype, TFILL_NORMAL, 1);
    b->h_b = trows_new(r, b->b_rows, b_stride, c->n, c->dtype, TFILL_NORMAL, 1);
    for (int64_t i = b->h_offset[c->E]; i < b->num_rows; ++i) { /* of no expert: never read */
        for (int j = 0; j < c->m && !c->a_gather; ++j)
            moe_store(b->h_a, i * a_stride + j, c->dtype, NAN);
        for (int j = 0; j < c->n && !c->b_gather; ++j)
            moe_store(b->h_b, i * b_stride + j, c->dtype, NAN);
    }
    if (c->a_gather) b->h_index[0] = index_new(b, c, c->a_gather, b->a_rows, r);
    if (c->b_gather) b->h_index[1] = index_new(b, c, c->b_gather, b->b_rows, r);
    for (int64_t i = 0; i < b->h_offset[c->E]; ++i) { /* no row of the other: never read */
        const int no_a = row_lacks(b->h_index[0], i, b->a_rows, c->a_gather);
        const int no_b = row_lacks(b->h_index[1], i, b->b_rows, c->b_gather);
        for (int j = 0; j < c->m && !c->a_gather && no_b; ++j)
            moe_store(b->h_a, i * a_stride + j, c->dtype, NAN);
        for (int j = 0; j < c->n && !c->b_gather && no_a; ++j)
            moe_store(b->h_b, i * b_stride + j, c->dtype, NAN);
    }
    b->a = tbuf_from("a", b->h_a, (size_t)moe_extent(b->a_rows, a_stride, c->m, c->dtype), 16);
    b->b = tbuf_from("b", b->h_b, (size_t)moe_extent(b->b_rows, b_stride, c->n, c->dtype), 16);
    for (int i = 0; i < 2; ++i)
        if (b->h_index[i])
            b->index[i] = tbuf_from("index", b->h_index[i], (size_t)b->num_rows * 4, 4);
    b->offset = tbuf_from("offset", b->h_offset, (size_t)c->E * 4 + 4, 4);
    b->c_size = (int64_t)c->E * c->m * c_stride;
    b->h_c = trows_new(r, (int64_t)c->E * c->m, c_stride, c_stride, c->c_dtype, TFILL_NORMAL, 1);
    b->c = tbuf_new("c", (size_t)(b->c_size * moe_dtype_bytes(c->c_dtype)), 16);
    if (c->accumulate) tbuf_put(&b->c, b->h_c);
    if (c->c_table) { /* experts in descending order */
        void* at[MOST];
        for (int e = 0; e < c->E; ++e)
            at[e] = (char*)b->c.p + (c->E - 1 - e) * c->m * c_stride * moe_dtype_bytes(c->c_dtype);
        b->table = tbuf_from("table", at, (size_t)c->E * sizeof(void*), 8);
    }
    b->fault = tfault_new(0);
    b->d.a = b->a.p, b->d.b = b->b.p;
    b->d.a_stride = c->a_pad ? a_stride : 0, b->d.b_stride = c->b_pad ? b_stride : 0;
    b->d.a_rows = c->a_gather ? b->a_rows : 0, b->d.b_rows = c->b_gather ? b->b_rows : 0;
    b->d.a_index = (const int32_t*)b->index[0].p, b->d.b_index = (const int32_t*)b->index[1].p;
    b->d.a_div = c->a_gather > 1 ? c->a_gather : 0, b->d.b_div = c->b_gather > 1 ? c->b_gather : 0;
    b->d.expert_offset = (const int32_t*)b->offset.p;
    b->d.c = c->c_table ? (void*)0 : b->c.p;
    b->d.c_table = (void* const*)b->table.p;
    b->d.c_stride = c->c_pad ? c_stride : 0;
    b->d.fault = (uint64_t*)b->fault.p;
    b->d.rank = TEST_RANK;
    b->d.num_experts = c->E, b->d.num_rows = b->num_rows, b->d.m = c->m, b->d.n = c->n;
    b->d.dtype = c->dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->dtype;
    b->d.c_dtype = c->c_dtype == c->dtype ? MOE_DTYPE_DEFAULT : c->c_dtype;
    b->d.accumulate = c->accumulate;
    b->d.empty_experts = c->empty;
    b->d.tile = c->tile;
    b->d.grid_limit = c->grid_limit;
    b->d.path = c->path;
    b->workspace = tbuf_new("workspace", MOE_GROUPED_GEMM_WORKSPACE, 16);
    b->d.workspace = b->workspace.p, b->d.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
}

static void bufs_free(k_bufs* b)
{
    tbufs_free(TBUFS(&b->a, &b->b, &b->offset, &b->c, &b->fault, &b->table, &b->index[0],
                     &b->index[1], &b->workspace));
    TFREE(b->h_a, b->h_b, b->h_c, b->h_index[0], b->h_index[1]);
}

/* Returns the first row of an expert whose index is out of range, or -1. */
static int64_t first_bad(const k_bufs* b, const k_case* c)
{
    for (int64_t i = 0; i < b->h_offset[c->E]; ++i)
        for (int of = 0; of < 2; ++of) {
            const int64_t rows = of ? b->b_rows : b->a_rows, div = of ? c->b_gather : c->a_gather;
            const int32_t* index = b->h_index[of];
            if (index && (index[i] < -1 || index[i] >= rows * div)) return i;
        }
    return -1;
}

static void compare(const k_bufs* b, const k_case* c)
{
    const int before = test_now.failures;
    const int64_t E = c->E, rows = E * c->m, size = rows * c->n, c_stride = c->n + c->c_pad;
    const int64_t bad = first_bad(b, c);
    double* exact = (double*)test_host(size * 8);
    double* bound = (double*)test_host(size * 8);
    char* got = (char*)tbuf_copy(&b->c);
    moe_ref_k_gemm_desc r = {};
    int64_t written = 0;
    r.a = b->h_a, r.b = b->h_b;
    r.a_stride = c->m + c->a_pad, r.b_stride = c->n + c->b_pad;
    r.a_rows = b->a_rows, r.b_rows = b->b_rows;
    r.a_index = b->h_index[0], r.b_index = b->h_index[1];
    r.a_div = c->a_gather, r.b_div = c->b_gather;
    r.expert_offset = b->h_offset;
    r.dtype = c->dtype;
    r.num_experts = c->E, r.m = c->m, r.n = c->n;
    moe_ref_k_gemm_f64(&r, exact, bound);
    for (int64_t i = 0; i < size; ++i) {
        const int e = (int)(i / c->n / c->m);
        const int64_t at = (i / c->n) * c_stride + i % c->n;
        const int64_t in_c = c->c_table ? at + (c->E - 1 - 2 * e) * (int64_t)c->m * c_stride : at;
        if (c->accumulate) exact[i] += moe_load(b->h_c, in_c, c->c_dtype);
        bound[i] = (c->rows[e] / 16.0 + 2) * ldexp(1, -23) * (bound[i] + fabs(exact[i])) +
                   2 * tround(fabs(exact[i]), c->c_dtype) + 1e-30;
    }
    if (c->c_table) { /* in ascending order again */
        const int64_t one = c->m * c_stride * moe_dtype_bytes(c->c_dtype);
        char* ascending = (char*)test_host(E * one);
        for (int e = 0; e < c->E; ++e)
            memcpy(ascending + e * one, got + (c->E - 1 - e) * one, (size_t)one);
        free(got);
        got = ascending;
    }
    for (int e = 0; e < c->E && c->empty && !c->accumulate; ++e)
        for (int64_t i = 0; i < (int64_t)c->m * c->n && c->rows[e] == 0; ++i) {
            const int64_t at = (e * c->m + i / c->n) * c_stride + i % c->n;
            const float was = moe_load(got, at, c->c_dtype);
            CHECK(was != was, "an expert without rows, to be left as it is");
            moe_store(got, at, c->c_dtype, 0.0f);
        }
    if (b->h_offset[c->E] > 0)
        test_within("c", got, c->c_dtype, c_stride, exact, bound, 1, rows, c->n, __FILE__,
                    __LINE__);
    for (int e = 0; e < c->E && !c->accumulate; ++e)
        for (int64_t i = 0; i < (int64_t)c->m * c->n && c->rows[e] == 0; ++i)
            CHECK(moe_load(got, (e * c->m + i / c->n) * c_stride + i % c->n, c->c_dtype) == 0,
                  "an expert without rows");
    if (!c->accumulate) {
        written = test_strays(got, b->c_size * moe_dtype_bytes(c->c_dtype),
                              moe_dtype_bytes(c->c_dtype), c_stride, c->n, 0, rows);
    } else { /* as it was; with a table in descending order */
        for (int64_t i = 0; i < b->c_size; ++i) {
            const int64_t e = i / c_stride / c->m, one = (int64_t)c->m * c_stride;
            const int64_t was = c->c_table ? i + (c->E - 1 - 2 * e) * one : i;
            if (i % c_stride >= c->n)
                written += moe_load(got, i, c->c_dtype) != moe_load(b->h_c, was, c->c_dtype);
        }
    }
    CHECK(written == 0, "%lld places between the rows were written", (long long)written);
    CHECK_FAULT_AT(&b->fault, MOE_FAULT_BAD_ROW, bad);
    CHECK(tbuf_holds(&b->a, b->h_a) && tbuf_holds(&b->b, b->h_b), "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    TFREE(exact, bound, got);
}

/* Returns 1 where the product asks for wgmma, and this binary or device has none. */
static int lacks_wgmma(const k_bufs* b)
{
    moe_k_grouped_gemm_prepared p;
    return b->d.path == MOE_GEMM_PATH_WGMMA &&
           moe_k_grouped_gemm_prepare(&b->d, &p) == MOE_STATUS(MOE_ERR_DEVICE, path);
}

/* Runs and compares a case whose buffers the test has changed, and frees them. */
static void run_bufs(k_bufs* b, const k_case* c)
{
    CHECK_STATUS(moe_k_grouped_gemm(&b->d, test_now.stream), MOE_OK);
    compare(b, c);
    bufs_free(b);
}

static void run_case(const k_case* c, trand* r)
{
    k_bufs b;
    bufs_new(&b, c, r);
    if (CHECK_STATUS(moe_k_grouped_gemm(&b.d, test_now.stream), expected(c)) &&
        expected(c) == MOE_OK)
        compare(&b, c);
    bufs_free(&b);
}

/* Runs numbers of rows about tile_k, none, many; all tiles; tails of m and n; both dtypes. */
static void test_k_shapes(void)
{
    static const int rows[] = {0, 1, 31, 32, 33, 63, 64, 65, 127, 129, 0};
    static const int sizes[][2] = {{8, 8}, {64, 64}, {72, 136}, {136, 72}, {200, 264}};
    static const int tiles[] = {MOE_TILE_AUTO, MOE_TILE_64x64, MOE_TILE_128x128, MOE_TILE_128x256};
    trand r = trand_new(1);
    for (int i = 0; i < 5; ++i)
        for (int tile = 0; tile < 4; ++tile)
            for (int half = 0; half < 2; ++half) {
                k_case c = normal_case(11, rows, sizes[i][0], sizes[i][1]);
                if (MOE_ON_HOST && i == 4 && half) continue;
                c.tile = tiles[tile];
                c.dtype = half ? MOE_FP16 : MOE_BF16;
                c.c_dtype = trand_int(&r, 0, 1) ? MOE_FP32 : c.dtype;
                c.grid_limit = (i + tile) % 2 ? 3 : 0;
                c.beyond = 9;
                run_case(&c, &r);
            }
}

/* Runs one expert alone; every row at one expert of many; no rows at all. */
static void test_k_lone(void)
{
    trand r = trand_new(2);
    for (int i = 0; i < 12; ++i) { /* from 6 on by wgmma */
        int rows[MOST] = {0};
        k_case c;
        k_bufs b;
        if (i % 6 < 2) rows[0] = i % 6 ? 97 : 1;
        else rows[i * 11 % 64] = i % 6 == 5 ? 0 : 40;
        c = normal_case(i % 6 < 2 ? 1 : 64, rows, 40, 72);
        if (i % 6 == 4) c.c_table = 1;
        if (i >= 6) c.path = MOE_GEMM_PATH_WGMMA;
        bufs_new(&b, &c, &r);
        if (lacks_wgmma(&b)) {
            bufs_free(&b);
            continue;
        }
        if (i % 6 < 2) b.d.expert_offset = 0; /* all rows are the one expert's */
        run_bufs(&b, &c);
    }
}

/* Gathers either operand, or both: entries of -1 and out of range; strides; tables; added to C. */
static void test_k_gather(void)
{
    static const int some[] = {30, 0, 70, 5, 41};
    trand r = trand_new(3);
    for (int i = 0; i < (MOE_ON_HOST ? 24 : 60); ++i) {
        k_case c = normal_case(5, some, i % 5 == 4 ? 136 : 40, i % 3 ? 72 : 24);
        c.a_gather = (int)trand_int(&r, 0, 3);
        c.b_gather = (int)trand_int(&r, 0, 3);
        if (i % 3 == 1) c.none = 12;
        if (i % 6 == 2) c.bad = 1 + (int)trand_int(&r, 0, 5);
        c.a_pad = 8 * (int)trand_int(&r, 0, 2);
        c.b_pad = 8 * (int)trand_int(&r, 0, 2);
        c.c_pad = 8 * (int)trand_int(&r, 0, 2);
        c.c_table = (int)trand_int(&r, 0, 1);
        c.accumulate = (int)trand_int(&r, 0, 1);
        c.empty = (int)trand_int(&r, 0, 1);
        c.c_dtype = trand_int(&r, 0, 1) ? MOE_FP32 : c.dtype;
        c.tile = i % 4 == 0 ? MOE_TILE_128x128 : i % 4 == 2 ? MOE_TILE_128x256 : MOE_TILE_64x64;
        c.beyond = (int)trand_int(&r, 0, 1) * 20;
        if (expected(&c) == MOE_OK) run_case(&c, &r);
    }
}

/* Sums on the wgmma path, rows in order or those of one operand gathered, some without an index:
   experts without rows, tails of rows, m and n, more pairs of tiles than clusters; the same bits
   without the workspace. */
static void test_k_wgmma(void)
{
    static const int sizes[] = {0, 1, 63, 64, 65, 127, 128, 129, 200, 321};
    trand r = trand_new(8);
    for (int i = 0; i < (MOE_ON_HOST ? 24 : 150); ++i) {
        int rows[6];
        k_case c;
        k_bufs b;
        moe_status s;
        void* want;
        for (int e = 0; e < 6; ++e) rows[e] = sizes[trand_int(&r, 0, 9)];
        c = normal_case(6, rows, 8 * (int)trand_int(&r, 1, 40), 8 * (int)trand_int(&r, 1, 40));
        c.path = MOE_GEMM_PATH_WGMMA;
        c.dtype = trand_int(&r, 0, 1) ? MOE_FP16 : MOE_BF16;
        c.c_dtype = trand_int(&r, 0, 1) ? MOE_FP32 : c.dtype;
        c.a_pad = 8 * (int)trand_int(&r, 0, 2);
        c.b_pad = 8 * (int)trand_int(&r, 0, 2);
        c.c_pad = 8 * (int)trand_int(&r, 0, 2);
        c.c_table = (int)trand_int(&r, 0, 1);
        c.accumulate = (int)trand_int(&r, 0, 1);
        c.empty = (int)trand_int(&r, 0, 1);
        c.beyond = (int)trand_int(&r, 0, 1) * 20;
        if (i % 3 == 1) c.a_gather = (int)trand_int(&r, 1, 3);
        if (i % 3 == 2) c.b_gather = (int)trand_int(&r, 1, 3);
        if (i % 4 == 1) c.none = (int)trand_int(&r, 1, 40);
        if (i % 8 == 5) c.bad = (int)trand_int(&r, 1, 3);
        bufs_new(&b, &c, &r);
        s = moe_k_grouped_gemm(&b.d, test_now.stream);
        if (i == 0 && s == MOE_STATUS(MOE_ERR_DEVICE, path)) {
            test_leave_out("no wgmma on this device, or no code of sm_90a");
            bufs_free(&b);
            return;
        }
        CHECK_STATUS(s, MOE_OK);
        compare(&b, &c);
        want = tbuf_copy(&b.c);
        if (c.accumulate) tbuf_put(&b.c, b.h_c);
        b.d.workspace = 0; /* fixed order */
        CHECK_STATUS(moe_k_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.c, want), "without a workspace the bits differ");
        free(want);
        bufs_free(&b);
    }
}

/* Keeps NaN and infinities with the expert that has them, though tiles run past its rows. */
/* The first variant of bf16 that suits on 132 multiprocessors. */
static const moei_variant* k_chosen(const moe_k_grouped_gemm_desc* d)
{
    const moei_variant* v = moei_k_gemm_variants;
    while (v->shape.dtype != MOE_BF16 || !moei_k_suits(v, d, 132)) ++v;
    return v;
}

static void test_k_rule(void)
{
    static const int32_t index[1] = {0};
    for (int narrow = 0; narrow < 2; ++narrow)
        for (int gathered = 0; gathered < 2; ++gathered) {
            moe_k_grouped_gemm_desc d = {};
            const moei_variant* v;
            d.num_experts = 64, d.m = narrow ? 64 : 4096, d.n = narrow ? 4096 : 64;
            if (gathered) d.b_index = index; /* an address, nothing runs */
            v = k_chosen(&d);
            CHECK((v->path == MOE_GEMM_PATH_WGMMA) == (narrow != gathered),
                  "m %d n %d, b_index %d: path %d tile %d", d.m, d.n, gathered, v->path, v->tile);
            if (v->path == MOE_GEMM_PATH_WGMMA)
                CHECK(moei_k_num_tiles(&d, v) == 64 * 16, "%d tiles", (int)moei_k_num_tiles(&d, v));
        }
}

static void test_k_nan(void)
{
    static const int some[] = {20, 7, 33};
    trand r = trand_new(4);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile) {
        k_case c = normal_case(3, some, 40, 72);
        k_bufs b;
        float* got;
        int64_t nan[3] = {0, 0, 0};
        if (tile == MOE_TILE_32x128) continue;
        c.tile = tile;
        c.c_dtype = MOE_FP32;
        bufs_new(&b, &c, &r);
        if (lacks_wgmma(&b)) {
            bufs_free(&b);
            continue;
        }
        for (int i = 20 * 40; i < 27 * 40; ++i)
            moe_store(b.h_a, i, c.dtype, i & 1 ? NAN : INFINITY);
        tbuf_put(&b.a, b.h_a);
        CHECK_STATUS(moe_k_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        got = (float*)tbuf_copy(&b.c);
        for (int i = 0; i < 3 * 40 * 72; ++i) nan[i / (40 * 72)] += !(fabsf(got[i]) <= 3e38f);
        CHECK(nan[0] == 0 && nan[1] == 40 * 72 && nan[2] == 0, "%d %d %d", (int)nan[0], (int)nan[1],
              (int)nan[2]);
        free(got);
        bufs_free(&b);
    }
}

/* Leaves C as it is with bad offsets, bad addresses, or a stop fault of an earlier kernel. */
static void test_k_faults(void)
{
    static const int some[] = {10, 20, 30, 5};
    static const int code[] = {MOE_FAULT_BAD_OFFSET, MOE_FAULT_BAD_OFFSET,
                               MOE_FAULT_BAD_OFFSET, MOE_FAULT_BAD_SPARSE_BLOCK,
                               MOE_FAULT_BAD_TABLE,  MOE_FAULT_BAD_TABLE,
                               MOE_FAULT_NONE,       MOE_FAULT_BAD_TABLE};
    static const int index[] = {1, 3, 0, 3, 2, 2, 0, 1};
    static const int gap[] = {10, 0, 30, 5};
    trand r = trand_new(5);
    for (int i = 0; i < 16; ++i) { /* from 8 on by wgmma */
        const int how = i % 8;
        k_case c = normal_case(4, how == 7 ? gap : some, 72, 40);
        k_bufs b;
        int32_t offset[5];
        void* at[4];
        c.c_table = how >= 4;
        if (i >= 8) c.path = MOE_GEMM_PATH_WGMMA;
        bufs_new(&b, &c, &r);
        if (lacks_wgmma(&b)) {
            bufs_free(&b);
            continue;
        }
        memcpy(offset, b.h_offset, sizeof offset);
        if (how == 0) offset[2] = 9;  /* expert 1 ends before it begins */
        if (how == 1) offset[4] = 66; /* past num_rows */
        if (how == 2) offset[0] = -1;
        if (how == 3) tfault_put(&b.fault, code[how], index[how]);
        tbuf_put(&b.offset, offset);
        if (c.c_table) {
            tbuf_get(&b.table, at);
            if (how == 4) at[2] = 0;
            if (how == 5) at[2] = (char*)at[2] + 8;
            if (how == 7) at[1] = (char*)at[1] + 8; /* of an expert without rows: its sums are 0 */
            if (how != 6) tbuf_put(&b.table, at);
        }
        CHECK_STATUS(moe_k_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        if (how == 6) {
            compare(&b, &c);
        } else {
            CHECK(tbuf_holds(&b.c, 0), "how=%d", how);
            CHECK_FAULT(&b.fault, code[how], index[how]);
            b.d.fault = 0; /* writes nothing without a fault word either */
            if (how != 3) CHECK_STATUS(moe_k_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            CHECK(tbuf_holds(&b.c, 0), "without a fault word, how=%d", how);
        }
        bufs_free(&b);
    }
}

TEST_CALL(call, moe_k_grouped_gemm, moe_k_grouped_gemm_desc)

static void test_k_same_bits(void)
{
    static const int some[] = {30, 0, 170, 5, 41};
    trand r = trand_new(6);
    k_case c = normal_case(5, some, 136, 264);
    k_bufs b;
    c.a_gather = 2;
    bufs_new(&b, &c, &r);
    test_same_bits("k_gemm", call, &b.d, TBUFS(&b.c), MOE_ON_HOST ? 3 : 100);
    compare(&b, &c);
    bufs_free(&b);
}

TEST_REFUSED(refused, moe_k_grouped_gemm, moe_k_grouped_gemm_prepare, moe_k_grouped_gemm)

static void test_k_refusals(void)
{
    static const int some[] = {10, 20, 11};
    trand r = trand_new(7);
    k_case c = normal_case(3, some, 64, 72);
    k_bufs b;
    moe_k_grouped_gemm_desc good, d;
    moe_k_grouped_gemm_prepared p;
    c.a_gather = c.b_gather = 2;
    bufs_new(&b, &c, &r);
    good = b.d;
    CHECK_STATUS(moe_k_grouped_gemm_prepare(0, &p), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_k_grouped_gemm_prepare(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_k_grouped_gemm_run(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.a = 0, MOE_ERR_NULL, a);
    REFUSED(d.b = 0, MOE_ERR_NULL, b);
    REFUSED(d.c = 0, MOE_ERR_NULL, c);
    REFUSED(d.expert_offset = 0, MOE_ERR_NULL, expert_offset);
    REFUSED_NUM_EXPERTS();
    REFUSED(d.num_rows = -1, MOE_ERR_RANGE, num_rows);
    REFUSED(d.m = 0, MOE_ERR_RANGE, m);
    REFUSED(d.m = 60, MOE_ERR_MULTIPLE, m);
    REFUSED(d.n = -8, MOE_ERR_RANGE, n);
    REFUSED(d.n = 68, MOE_ERR_MULTIPLE, n);
    REFUSED(d.dtype = MOE_FP32, MOE_ERR_DTYPE, dtype);
    REFUSED(d.c_dtype = c.dtype == MOE_BF16 ? MOE_FP16 : MOE_BF16, MOE_ERR_DTYPE, c_dtype);
    REFUSED(d.a_div = -1, MOE_ERR_RANGE, a_div);
    REFUSED(d.b_div = -1, MOE_ERR_RANGE, b_div);
    REFUSED(d.accumulate = 2, MOE_ERR_OPTION, accumulate);
    REFUSED_EACH(empty_experts, MOE_ERR_OPTION, empty_experts, 2, -1);
    REFUSED(d.grid_limit = -1, MOE_ERR_RANGE, grid_limit);
    REFUSED_RANK_AND_FAULT();
    REFUSED_EACH(tile, MOE_ERR_OPTION, tile, MOE_TILE_32x128, -1);
    REFUSED_EACH(path, MOE_ERR_OPTION, path, MOE_GEMM_PATH_WGMMA + 1, -1);
    REFUSED(d.path = MOE_GEMM_PATH_WGMMA, MOE_ERR_CONFLICT, path); /* both gathered */
    REFUSED(d.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE - 1, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.workspace = AT(d.workspace, 8), MOE_ERR_ALIGN, workspace);
    REFUSED(d.workspace = d.c, MOE_ERR_OVERLAP, workspace);
    REFUSED(d.a_rows = -1, MOE_ERR_RANGE, a_rows);
    REFUSED(d.b_rows = -1, MOE_ERR_RANGE, b_rows);
    REFUSED(d.a_stride = 56, MOE_ERR_STRIDE, a_stride);
    REFUSED(d.a_stride = 65, MOE_ERR_ALIGN, a_stride);
    REFUSED(d.b_stride = 64, MOE_ERR_STRIDE, b_stride);
    REFUSED(d.b_stride = 76, MOE_ERR_ALIGN, b_stride);
    REFUSED(d.c_stride = 64, MOE_ERR_STRIDE, c_stride);
    REFUSED(d.c_stride = 76, MOE_ERR_ALIGN, c_stride);
    REFUSED(d.c_expert_stride = 64 * 72 - 8, MOE_ERR_STRIDE, c_expert_stride);
    REFUSED(d.c_expert_stride = 64 * 72 + 4, MOE_ERR_ALIGN, c_expert_stride);
    REFUSED(d.a = AT(d.a, 8), MOE_ERR_ALIGN, a);
    REFUSED(d.b = AT(d.b, 8), MOE_ERR_ALIGN, b);
    REFUSED(d.c = AT(d.c, 8), MOE_ERR_ALIGN, c);
    REFUSED(d.a_index = (const int32_t*)AT(d.a_index, 2), MOE_ERR_ALIGN, a_index);
    REFUSED(d.b_index = (const int32_t*)AT(d.b_index, 2), MOE_ERR_ALIGN, b_index);
    REFUSED(d.expert_offset = (const int32_t*)AT(d.expert_offset, 2), MOE_ERR_ALIGN, expert_offset);
    REFUSED(d.c_table = (void* const*)b.offset.p, MOE_ERR_CONFLICT, c);
    REFUSED((d.c = 0, d.c_table = (void* const*)AT(b.c.p, 4)), MOE_ERR_ALIGN, c);
    REFUSED(d.c = (void*)d.a, MOE_ERR_OVERLAP, c);
    REFUSED(d.c = (void*)d.b, MOE_ERR_OVERLAP, c);
    REFUSED(d.c = DOWN_TO(d.a_index, 16), MOE_ERR_OVERLAP, c);
    REFUSED(d.c = DOWN_TO(d.b_index, 16), MOE_ERR_OVERLAP, c);
    REFUSED(d.fault = (uint64_t*)d.c, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)AT(d.c, 3 * 64 * 72 * 2 - 8), MOE_ERR_OVERLAP, fault);
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.c, 0), "a refused call wrote C");
    bufs_free(&b);
    c.a_gather = c.b_gather = 0; /* what wgmma does not take */
    bufs_new(&b, &c, &r);
    good = b.d;
    good.path = MOE_GEMM_PATH_WGMMA;
    REFUSED(d.grid_limit = 1, MOE_ERR_CONFLICT, path);
    REFUSED(d.a_div = 2, MOE_ERR_CONFLICT, path);
    REFUSED(d.b_div = 2, MOE_ERR_CONFLICT, path);
    REFUSED(d.a_rows = d.num_rows - 1, MOE_ERR_CONFLICT, path);
    REFUSED(d.b_rows = d.num_rows - 1, MOE_ERR_CONFLICT, path);
    good.a = (void*)((uintptr_t)1 << 50), good.a_rows = 1 << 29; /* addresses only, nothing runs */
    good.a_index = good.expert_offset;
    REFUSED(d.a_stride = 64, MOE_ERR_CONFLICT, path); /* gathered from 64 GiB */
    good.a = b.d.a, good.a_rows = good.num_rows, good.a_index = 0;
    good.b = (void*)((uintptr_t)1 << 50), good.b_rows = 1 << 29;
    good.b_index = good.expert_offset;
    REFUSED(d.b_stride = 72, MOE_ERR_CONFLICT, path);
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.c, 0), "a refused call wrote C");
    bufs_free(&b);
}

/* Runs rows of the largest numbers allowed: the look-ahead past the last does not overflow. */
static void test_k_far_rows(void)
{
    const int last = MOE_K_GEMM_MAX_ROWS, offset[2] = {last - 3, last};
    static const int some[] = {3};
    trand r = trand_new(9);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile) {
        k_case c = normal_case(1, some, 40, 72);
        k_bufs b;
        float got[40 * 72];
        int wrong = 0;
        c.tile = tile;
        c.c_dtype = MOE_FP32;
        if (tile == MOE_TILE_32x128 || expected(&c) != MOE_OK) continue;
        bufs_new(&b, &c, &r);
        tbuf_free(&b.offset);
        b.offset = tbuf_from("offset", offset, sizeof offset, 4);
        b.d.expert_offset = (const int32_t*)b.offset.p;
        b.d.num_rows = last;
        b.d.a_div = b.d.b_div = 1 << 30; /* all three are row 1 */
        b.d.a_rows = b.d.b_rows = 2;
        CHECK_STATUS(moe_k_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        tbuf_get(&b.c, got);
        for (int i = 0; i < 40 * 72; ++i) {
            const float v =
                moe_load(b.h_a, 40 + i / 72, c.dtype) * moe_load(b.h_b, 72 + i % 72, c.dtype);
            wrong += !(fabsf(got[i] - 3 * v) <= ldexpf(fabsf(v), -20));
        }
        CHECK(wrong == 0, "tile %d: %d wrong", tile, wrong);
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        b.d.num_rows = last + 1;
        CHECK_STATUS(moe_k_grouped_gemm(&b.d, test_now.stream),
                     MOE_STATUS(MOE_ERR_RANGE, num_rows));
        bufs_free(&b);
    }
}

/* Launches a captured product again with other offsets, indices and inputs. */
static void test_k_graph(void)
{
    static const int some[] = {30, 10, 0, 25};
    trand r = trand_new(8);
    k_case c = normal_case(4, some, 72, 40);
    k_bufs b;
    tgraph g;
    c.b_gather = 2;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_k_grouped_gemm_preload(), MOE_OK);
    if (tgraph_capture(&g, call, &b.d)) {
        CHECK(tbuf_holds(&b.c, 0), "capture itself runs nothing");
        for (int run = 0; run < 3; ++run) {
            if (run > 0) trows_share(4, b.num_rows, c.rows, b.h_offset, &r);
            for (int i = 0; i < b.num_rows; ++i)
                b.h_index[1][i] = (int32_t)trand_int(&r, 0, (int)(b.b_rows * 2) - 1);
            for (int64_t i = 0; i < b.a_rows * c.m; ++i)
                moe_store(b.h_a, i, c.dtype, trand_normal(&r));
            tbuf_put(&b.offset, b.h_offset);
            tbuf_put(&b.index[1], b.h_index[1]);
            tbuf_put(&b.a, b.h_a);
            tbuf_poison(&b.c);
            tgraph_launch(&g);
            compare(&b, &c);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_k_shapes);
    RUN(test_k_lone);
    RUN(test_k_gather);
    RUN(test_k_wgmma);
    RUN(test_k_rule);
    RUN(test_k_nan);
    RUN(test_k_faults);
    RUN(test_k_same_bits);
    RUN(test_k_far_rows);
    RUN(test_k_graph);
    RUN(test_k_refusals);
    return test_end();
}
