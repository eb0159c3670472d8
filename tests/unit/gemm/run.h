/* run.h: a case of moe_grouped_gemm: how it is drawn, run, and compared with the reference. */
#ifndef MOE_TESTS_GEMM_RUN_H
#define MOE_TESTS_GEMM_RUN_H

#include "moe/gemm/grouped.cuh"
#include "tests/unit/gemm/case.h"

/* Draws dtypes, majors, activation, pads, tables and how the numbers are drawn. */
static void randomise(gemm_case* c, trand* r)
{
    c->dtype = trand_int(r, 0, 1) ? MOE_FP16 : MOE_BF16;
    c->c_dtype = trand_int(r, 0, 1) ? MOE_FP32 : c->dtype;
    c->b_major = (int)trand_int(r, MOE_MAJOR_K, MOE_MAJOR_MN);
    c->activation = (int)trand_int(r, MOE_ACTIVATION_NONE, MOE_ACTIVATION_RELU2);
    if (trand_int(r, 0, 2) == 0) c->activation = MOE_ACTIVATION_SWIGLU;
    if (trand_int(r, 0, 2) == 0) c->activation = MOE_ACTIVATION_NONE;
    c->gate_up = (int)trand_int(r, MOE_GATE_UP_CONCATENATED, MOE_GATE_UP_SEPARATE);
    c->bias = (int)trand_int(r, 0, 1);
    c->b_table = (int)trand_int(r, 0, 1);
    c->c_table = (int)trand_int(r, 0, 1);
    c->a_pad = 8 * (int)trand_int(r, 0, 2);
    c->b_pad = 8 * (int)trand_int(r, 0, 2);
    c->c_pad = 8 * (int)trand_int(r, 0, 2);
    c->pre = (int)trand_int(r, 0, 1);
    c->pre_pad = 8 * (int)trand_int(r, 0, 2);
    c->fill = (int)trand_int(r, TFILL_NORMAL, TFILL_INT);
    c->lead = trand_int(r, 0, 2) ? 0 : (int)trand_int(r, 1, 9);
    c->slack = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 70);
}

/* Picks every `step`-th row of each group. Writes pick, and first [num_groups + 1]: where a group's
   rows begin in pick. Returns how many there are. */
static int64_t pick_rows(const gemm_bufs* b, int64_t step, int32_t* pick, int32_t* first)
{
    int64_t n = 0;
    for (int i = 0; i < b->num_groups; ++i) {
        first[i] = (int32_t)n;
        for (int64_t m = group_of(b, i).begin; m < group_of(b, i).end; m += step)
            pick[n++] = (int32_t)m;
    }
    first[b->num_groups] = (int32_t)n;
    return n;
}

/* Computes the exact product of the picked rows [first[num_groups], n], and sum |a b|. pick names
   the rows, first[i] says where a group's begin in pick. use_up: of the up matrices. */
static void exact_product(const gemm_bufs* b, const gemm_case* c, const int32_t* pick,
                          const int32_t* first, int n, int bias_stride, int bias_at, int use_up,
                          double* exact, double* sum)
{
    const int64_t count = first[b->num_groups];
    double* a = (double*)test_host(count * c->k * 8);
    moe_ref_gemm_desc r = {};
    moe_gemm_group picked[MOST_EXPERTS];
    for (int i = 0; i < b->num_groups; ++i)
        picked[i] = moe_gemm_group{group_of(b, i).expert, first[i], first[i + 1]};
    for (int64_t i = 0; i < count; ++i) {
        const int64_t from = a_row_of(b, c, pick[i]);
        for (int k = 0; k < c->k; ++k)
            a[i * c->k + k] = from >= 0 ? moe_load(b->h_a, from * c->k + k, c->dtype) : 0;
    }
    r.a = a, r.a_dtype = MOE_REF_REAL;
    r.group = picked, r.num_groups = b->num_groups;
    r.b = tweights_host(&b->b), r.b_dtype = c->dtype, r.use_up = use_up;
    r.bias = c->bias ? (const uint16_t*)b->h_bias + bias_at : (const void*)0;
    r.bias_dtype = c->dtype, r.bias_stride = bias_stride;
    r.num_experts = c->E, r.n = n, r.k = c->k;
    moe_ref_gemm_f64(&r, exact, sum);
    free(a);
}

/* Returns the bytes of a buffer that were written in rows that no group has. */
static int64_t left_out_strays(const gemm_bufs* b, const tbuf* buffer, int elem, int64_t stride,
                               int64_t columns)
{
    unsigned char* p = (unsigned char*)tbuf_copy(buffer);
    int64_t strays = 0;
    for (int m = 0; m < b->num_rows; ++m)
        for (int64_t i = m * stride * elem; !has_row(b, m) && i < (m * stride + columns) * elem;
             ++i)
            strays += p[i] != test_poison_byte((size_t)i);
    free(p);
    return strays;
}

/* Compares pre with what the activation is applied to, raw [count, columns of B], in the picked
   rows. Requires that nothing else was written. */
static void compare_pre(const gemm_bufs* b, const gemm_case* c, const int32_t* pick, int64_t count,
                        const double* raw, const double* raw_sum)
{
    const int columns = pre_columns(c), n = c->n;
    const int pairs = is_gated(c) && c->gate_up == MOE_GATE_UP_INTERLEAVED;
    const int64_t stride = columns + c->pre_pad;
    char* got = (char*)tbuf_copy(&b->pre);
    int64_t wrong = 0;
    for (int64_t i = 0; i < count && has_pre(c); ++i)
        for (int j = 0; j < columns; ++j) {
            const int64_t at = i * columns + (!pairs ? j : j < n ? 2 * j : 2 * (j - n) + 1);
            const double error = tsum_error(raw_sum[at], c->k) + 1e-30;
            wrong += !(fabs(moe_load(got, pick[i] * stride + j, c->dtype) - raw[at]) <=
                       error + tround(fabs(raw[at]) + error, c->dtype));
        }
    CHECK(wrong == 0, "%lld of %lld of pre are wrong", (long long)wrong,
          (long long)(count * columns));
    CHECK(test_strays(got, (int64_t)b->pre.bytes, 2, stride, columns,
                      has_pre(c) ? b->h_offset[0] : 0, has_pre(c) ? b->h_offset[c->E] : 0) == 0,
          "pre was written outside the rows");
    CHECK(!has_pre(c) || left_out_strays(b, &b->pre, 2, stride, columns) == 0,
          "pre was written in rows of no group");
    free(got);
}

/* Computes what C must hold in the picked rows [first[num_groups], n], and how far each element may
   be from it before C is rounded. */
static void exact_c(const gemm_bufs* b, const gemm_case* c, const int32_t* pick,
                    const int32_t* first, double* exact, double* bound)
{
    const int gated = is_gated(c), n = c->n, b_n = gated ? 2 * n : n;
    const int pairs = gated && c->gate_up == MOE_GATE_UP_INTERLEAVED;
    const int64_t count = first[b->num_groups];
    double* raw = (double*)test_host(count * b_n * 8);
    double* raw_sum = (double*)test_host(count * b_n * 8);
    if (gated && c->gate_up == MOE_GATE_UP_SEPARATE) { /* to [count, gates and then ups] */
        double* half = (double*)test_host(count * n * 8);
        double* half_sum = (double*)test_host(count * n * 8);
        for (int up = 0; up < 2; ++up) {
            exact_product(b, c, pick, first, n, b_n, up * n, up, half, half_sum);
            for (int64_t i = 0; i < count; ++i) {
                memcpy(raw + i * b_n + up * n, half + i * n, (size_t)n * 8);
                memcpy(raw_sum + i * b_n + up * n, half_sum + i * n, (size_t)n * 8);
            }
        }
        TFREE(half, half_sum);
    } else {
        exact_product(b, c, pick, first, b_n, b_n, 0, 0, raw, raw_sum);
    }
    compare_pre(b, c, pick, count, raw, raw_sum);
    for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < n; ++j) {
            const int64_t g = i * b_n + (pairs ? 2 * j : j);
            const int64_t u = !gated ? g : i * b_n + (pairs ? 2 * j + 1 : n + j);
            exact[i * n + j] =
                moe_ref_activation_f64(c->activation, raw[g], raw[u], c->alpha, c->limit);
            bound[i * n + j] =
                tactivation_error(c->activation, c->alpha, c->limit, raw[g], raw[u],
                                  tsum_error(raw_sum[g], c->k), tsum_error(raw_sum[u], c->k));
        }
    TFREE(raw, raw_sum);
}

/* Compares everything that C holds with the reference. Requires that nothing else was written. */
static void compare(const gemm_bufs* b, const gemm_case* c)
{
    const int before = test_now.failures, n = c->n;
    int32_t *pick = (int32_t*)test_host(b->num_rows * 4), first[MOST_EXPERTS + 1];
    const int64_t count = pick_rows(b, c->sampled ? c->sampled : 1, pick, first);
    const int64_t size = count * n;
    double *exact = (double*)test_host(size * 8), *bound = (double*)test_host(size * 8);
    double* ideal = (double*)test_host(size * 8);
    float* got = (float*)test_host(size * 4);
    int32_t all[MOST_EXPERTS + 1]; /* of a list all rows are read as the first expert's */
    int64_t bad = -1, wrong = 0, nonzero = 0, strays;
    for (int e = 0; e <= c->E; ++e) all[e] = e ? (int32_t)count : 0;
    strays = tgrouped_get(&b->c, pick, c->groups ? all : first, got);
    if (c->groups)
        strays += left_out_strays(b, &b->c.all, moe_dtype_bytes(c->c_dtype), c->n + c->c_pad, c->n);
    CHECK(strays == 0, "%lld bytes outside the rows were written", (long long)strays);
    compare_flags(b, c);
    exact_c(b, c, pick, first, exact, bound);
    test_round_all(ideal, exact, size, c->c_dtype);
    if (c->fill == TFILL_INT &&
        c->activation == MOE_ACTIVATION_NONE) { /* exact sums, rounded once */
        for (int64_t i = 0; i < size; ++i) {
            wrong += !(got[i] == ideal[i]);
            nonzero += exact[i] != 0;
        }
        CHECK(wrong == 0, "%lld of %lld are not the exact sum", (long long)wrong, (long long)size);
        if (count > 0 && c->none + c->bad == 0)
            CHECK(4 * nonzero > size, "mostly zeros show nothing");
    } else if (count > 0 && c->c_dtype == MOE_FP32) {
        test_within("c", got, MOE_FP32, n, exact, bound, 1, count, n, __FILE__, __LINE__);
    } else if (count > 0) {
        trows_round_bound(bound, exact, size, c->c_dtype);
        CHECK_CLOSE_BOTH("c", got, exact, ideal, bound, count, n);
    }
    if (!c->bias) /* rows of zeros give zeros, exactly, whatever the activation */
        for (int64_t i = 0; i < count; ++i)
            for (int j = 0; j < n && a_row_of(b, c, pick[i]) < 0; ++j) wrong += got[i * n + j] != 0;
    CHECK(wrong == 0, "rows without a row of A");
    for (int m = b->h_offset[c->E] - 1; m >= b->h_offset[0]; --m)
        if (has_row(b, m) && a_row_of(b, c, m) == -2) bad = m;
    CHECK_FAULT_AT(&b->fault, MOE_FAULT_BAD_ROW, bad);
    CHECK(tweights_same(&b->b) && tbuf_holds(&b->offset, b->h_offset) &&
              tbuf_holds(&b->bias, b->h_bias) && tbuf_holds(&b->index, b->h_index),
          "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    TFREE(pick, exact, bound, ideal, got);
}

TEST_CALL(call_gemm, moe_grouped_gemm, moe_grouped_gemm_desc)

/* Queues a case, with its counters as before the first call. Returns 0 where this binary has no
   code for it; then requires its refusal. */
static int launch(const gemm_bufs* b, const gemm_case* c)
{
    const moe_status want = test_gemm_status(c->dtype, b->d.tile);
    if (c->flags)
        TEST_CUDA(cudaMemcpyAsync(b->done.p, b->h_done, b->done.bytes, cudaMemcpyHostToDevice,
                                  test_now.stream));
    if (!CHECK_STATUS(moe_grouped_gemm(&b->d, test_now.stream), want)) return 0;
    if (want != MOE_OK)
        CHECK(tgrouped_untouched(&b->c), "%s: refused, but C was written", case_text(c));
    return want == MOE_OK;
}

/* Runs and compares a case whose buffers the test has changed, and frees them. */
static void run_bufs(gemm_bufs* b, const gemm_case* c)
{
    CHECK_STATUS(moe_grouped_gemm(&b->d, test_now.stream), MOE_OK);
    compare(b, c);
    bufs_free(b);
}

/* Draws, runs and compares a case. Tiles that several paths have run on each, and on the chosen
   path with and without its workspace. */
static void run_case(const gemm_case* c, trand* r)
{
    gemm_case one = *c;
    gemm_bufs b;
    one.no_ticket = (int)trand_int(r, 0, 1);
    bufs_new(&b, &one, r);
    if (launch(&b, &one)) compare(&b, &one);
    if (trand_int(r, 0, 3) == 0) { /* again by few blocks */
        b.d.grid_limit = (int)trand_int(r, 2, 9);
        tgrouped_poison(&b.c);
        if (launch(&b, &one)) compare(&b, &one);
        b.d.grid_limit = 0;
    }
    if (one.path == 0 && (one.tile == MOE_TILE_128x256 || one.tile == MOE_TILE_AUTO)) {
        one.path = b.d.path = MOE_GEMM_PATH_WMMA;
        tgrouped_poison(&b.c);
        if (launch(&b, &one)) compare(&b, &one);
    }
    bufs_free(&b);
}

#endif
