/* case.h: a case of moe_experts: how it is drawn, run, and compared with the reference. */
#ifndef MOE_TESTS_EXPERTS_CASE_H
#define MOE_TESTS_EXPERTS_CASE_H

#include "tests/test.h"
#include "tests/test_weights.h"

#include "moe/experts.cuh"
#include "tests/test_bound.h"
#include "tests/test_case.h"
#include "tests/test_case_rows.h"
#include "tests/test_mlp.h"

#define MOST_EXPERTS TWEIGHTS_MOST

typedef struct experts_case {
    int T, H, I, E, K;
    int dtype, rows_dtype, gate_up;
    int activation; /* 0: SwiGLU */
    float alpha, limit;
    int bias1, bias2;
    int major1, major2, table1, table2; /* of the weights */
    int out_table;                      /* an allocation an expert for the rows */
    int x_pad, act_pad, row_pad, w_pad; /* stride - dense, multiples of 8 */
    int in_order;                       /* 1: x is in expert order, no row_slot */
    int num_rows;                       /* 0: T * K */
    int dropped;                        /* percent of the slots */
    int none, bad;                      /* rows of row_slot made -1, made wrong */
    int one;                            /* 1: everything on one expert */
    int tile;
    int sampled; /* compares every so many rows of an expert; 0: all */
} experts_case;

typedef struct experts_bufs {
    tbuf x, offset, row_slot, act, fault;
    tgrouped rows;
    tmlp mlp;
    void* h_x;
    int32_t h_offset[MOST_EXPERTS + 1], *h_row_slot;
    int num_rows; /* most */
    moe_experts_desc d;
} experts_bufs;

static const char* case_text(const experts_case* c)
{
    static char text[300];
    snprintf(text, sizeof text,
             "T=%d H=%d I=%d E=%d K=%d %s -> %s activation=%d (%g %g) gate_up=%d bias %d %d major "
             "%d %d table %d %d %d pads %d %d %d %d in_order=%d num_rows=%d dropped=%d none=%d "
             "bad=%d one=%d tile=%d",
             c->T, c->H, c->I, c->E, c->K, moe_dtype_name(c->dtype), moe_dtype_name(c->rows_dtype),
             c->activation, (double)c->alpha, (double)c->limit, c->gate_up, c->bias1, c->bias2,
             c->major1, c->major2, c->table1, c->table2, c->out_table, c->x_pad, c->act_pad,
             c->row_pad, c->w_pad, c->in_order, c->num_rows, c->dropped, c->none, c->bad, c->one,
             c->tile);
    return text;
}

/* Returns a case with bf16 where there is code for it, and the small tile. */
static experts_case normal_case(int T, int H, int I, int E, int K)
{
    experts_case c = {};
    c.T = T, c.H = H, c.I = I, c.E = E, c.K = K;
    c.dtype = c.rows_dtype = test_half();
    c.gate_up = MOE_GATE_UP_CONCATENATED;
    c.major1 = c.major2 = MOE_MAJOR_K;
    c.tile = MOE_TILE_64x64;
    return c;
}

/* Draws a routing: offsets and row_slot. */
static void fill_rows(experts_bufs* b, const experts_case* c, trand* r)
{
    const int slots = c->T * c->K;
    int32_t* ids = (int32_t*)test_host(slots * 4);
    int32_t* row_slot = (int32_t*)test_host(slots * 4);
    const int one = (int)trand_int(r, 0, c->E - 1);
    for (int s = 0; s < slots; ++s) {
        const int u = (int)trand_int(r, 0, 99);
        ids[s] = c->one ? one : (int32_t)trand_int(r, 0, c->E - 1);
        if (u < c->dropped) ids[s] = -1;
    }
    tmlp_route(ids, c->T, c->E, c->K, b->h_offset, row_slot, 0);
    for (int m = 0; m < b->num_rows; ++m) b->h_row_slot[m] = m < slots ? row_slot[m] : -1;
    for (int i = 0; i < c->none + c->bad && b->h_offset[c->E] > 0; ++i) {
        const int m = (int)trand_int(r, 0, b->h_offset[c->E] - 1);
        b->h_row_slot[m] = i < c->none ? -1 : i & 1 ? slots : -7;
    }
    TFREE(ids, row_slot);
}

static void bufs_new(experts_bufs* b, const experts_case* c, trand* r)
{
    const int64_t x_stride = c->H + c->x_pad, act_stride = c->I + c->act_pad;
    const int64_t row_stride = c->H + c->row_pad;
    int64_t x_rows;
    tmlp_want want = tmlp_sizes(c->E, c->H, c->I, c->dtype, c->activation, c->gate_up);
    memset(b, 0, sizeof *b);
    b->num_rows = c->num_rows ? c->num_rows : c->T * c->K;
    b->h_row_slot = (int32_t*)test_host(b->num_rows * 4);
    fill_rows(b, c, r);
    x_rows = c->in_order ? b->num_rows : c->T;
    b->h_x = trows_new(r, x_rows, x_stride, c->H, c->dtype, TFILL_NORMAL, 1);
    b->x = tbuf_from("x", b->h_x, (size_t)moe_extent(x_rows, x_stride, c->H, c->dtype), 16);
    want.major1 = c->major1, want.major2 = c->major2;
    want.table1 = c->table1, want.table2 = c->table2;
    want.pad = c->w_pad;
    tmlp_new(&b->mlp, &want, r);
    if (c->activation == MOE_ACTIVATION_RELU2 && c->bias1 && c->T == 1) {
        /* of so few numbers all may be negative by chance: the first has a bias against it */
        for (int e = 0; e < c->E; ++e) moe_store(b->mlp.h_bias1, (int64_t)e * c->I, c->dtype, 8.0f);
        tbuf_put(&b->mlp.bias1, b->mlp.h_bias1);
    }
    b->offset = tbuf_from("offset", b->h_offset, (size_t)c->E * 4 + 4, 4);
    b->row_slot = tbuf_from("row_slot", b->h_row_slot, (size_t)b->num_rows * 4, 4);
    b->act = tbuf_new("act", (size_t)moe_extent(b->num_rows, act_stride, c->I, c->dtype), 16);
    tgrouped_new(&b->rows, "rows", c->out_table, c->E, b->h_offset, b->num_rows, c->H, row_stride,
                 c->rows_dtype);
    b->fault = tfault_new(0);

    b->d.x = b->x.p, b->d.x_stride = c->x_pad ? x_stride : 0;
    b->d.w1 = b->mlp.w1.d, b->d.w2 = b->mlp.w2.d;
    b->d.bias1 = c->bias1 ? b->mlp.bias1.p : (const void*)0;
    b->d.bias2 = c->bias2 ? b->mlp.bias2.p : (const void*)0;
    b->d.expert_offset = (const int32_t*)b->offset.p;
    b->d.row_slot = c->in_order ? (const int32_t*)0 : (const int32_t*)b->row_slot.p;
    b->d.act = b->act.p, b->d.act_stride = c->act_pad ? act_stride : 0;
    b->d.rows = b->rows.all.p, b->d.row_stride = c->row_pad ? row_stride : 0;
    b->d.table = (void* const*)b->rows.table.p;
    b->d.fault = (uint64_t*)b->fault.p, b->d.rank = TEST_RANK;
    b->d.num_tokens = c->in_order && c->num_rows ? 0 : c->T;
    b->d.top_k = c->in_order && c->num_rows ? 0 : c->K;
    b->d.num_rows = c->num_rows, b->d.num_experts = c->E;
    b->d.hidden = c->H, b->d.intermediate = c->I;
    b->d.dtype = c->dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->dtype;
    b->d.rows_dtype = c->rows_dtype == c->dtype ? MOE_DTYPE_DEFAULT : c->rows_dtype;
    b->d.gate_up = c->gate_up == MOE_GATE_UP_CONCATENATED ? MOE_GATE_UP_DEFAULT : c->gate_up;
    b->d.activation = c->activation, b->d.alpha = c->alpha, b->d.limit = c->limit;
    b->d.tile = c->tile;
}

static void bufs_free(experts_bufs* b)
{
    tbufs_free(TBUFS(&b->x, &b->offset, &b->row_slot, &b->act, &b->fault));
    tgrouped_free(&b->rows);
    tmlp_free(&b->mlp);
    TFREE(b->h_x, b->h_row_slot);
}

/* Is every output still the poison? */
static int untouched(const experts_bufs* b)
{
    return tbuf_holds(&b->act, 0) && tgrouped_untouched(&b->rows);
}

/* Does row m name a slot that does not exist? */
static int bad_row(const experts_bufs* b, const experts_case* c, int m)
{
    return !c->in_order && (b->h_row_slot[m] < -1 || b->h_row_slot[m] >= c->T * c->K);
}

/* Compares rows [n, H] with the exact product of the device's own act [n, I] and w2. */
static void compare_product(const experts_case* c, const moe_ref_experts_desc* d, const double* act,
                            const float* rows, int64_t n)
{
    const int64_t H = c->H, size = n * H;
    double *exact = (double*)test_host(size * 8), *sum = (double*)test_host(size * 8);
    moe_ref_gemm_desc g = {};
    g.a = act, g.a_dtype = MOE_REF_REAL;
    g.expert_offset = d->expert_offset;
    g.b = d->w2, g.b_dtype = c->dtype;
    g.bias = d->bias2, g.bias_dtype = c->dtype;
    g.num_experts = c->E, g.n = c->H, g.k = c->I;
    moe_ref_gemm_f64(&g, exact, sum);
    if (c->rows_dtype == MOE_FP32) {
        CHECK_CLOSE_SUM("rows from act", rows, H, exact, sum, c->I, n, H);
    } else {
        double *ideal = (double*)test_host(size * 8), *bound = (double*)test_host(size * 8);
        test_round_all(ideal, exact, size, c->rows_dtype);
        for (int64_t i = 0; i < size; ++i) bound[i] = tsum_error(sum[i], c->I);
        trows_round_bound(bound, exact, size, c->rows_dtype);
        CHECK_CLOSE_BOTH("rows from act", rows, exact, ideal, bound, n, H);
        TFREE(ideal, bound);
    }
    TFREE(exact, sum);
}

/* Compares act with the exact activations; rows with the exact product of the device's own act, and
   with the whole MLP without rounding in between. */
static void compare(const experts_bufs* b, const experts_case* c)
{
    const int before = test_now.failures, H = c->H, I = c->I, total = b->h_offset[c->E];
    const int64_t act_stride = I + c->act_pad;
    int32_t *pick = (int32_t*)test_host(total * 4), *row_slot = (int32_t*)test_host(total * 4);
    int32_t first[MOST_EXPERTS + 1];
    const int64_t n = trows_pick(c->E, b->h_offset, c->sampled ? c->sampled : 1, pick, first);
    double *exact = (double*)test_host(n * H * 8), *exact_act = (double*)test_host(n * I * 8);
    double *ideal = (double*)test_host(n * H * 8), *ideal_act = (double*)test_host(n * I * 8);
    double *bound = (double*)test_host(n * H * 8), *act_bound = (double*)test_host(n * I * 8);
    double* act_f64 = (double*)test_host(n * I * 8);
    float *rows = (float*)test_host(n * H * 4), *act = (float*)test_host(n * I * 4);
    void* act_copy = tbuf_copy(&b->act);
    int64_t bad = -1, strays = tgrouped_get(&b->rows, pick, first, rows);
    moe_ref_experts_desc d = tmlp_ref(&b->mlp, c->dtype, c->bias1, c->bias2);
    strays += test_strays(act_copy, (int64_t)b->act.bytes, 2, act_stride, I, 0, total);
    CHECK(strays == 0, "%lld bytes outside the rows were written", (long long)strays);
    for (int m = total - 1; m >= 0; --m)
        if (bad_row(b, c, m)) bad = m;
    for (int64_t i = 0; i < n; ++i) {
        row_slot[i] = c->in_order ? pick[i] : bad_row(b, c, pick[i]) ? -1 : b->h_row_slot[pick[i]];
        for (int j = 0; j < I; ++j)
            act_f64[i * I + j] = act[i * I + j] =
                moe_load(act_copy, pick[i] * act_stride + j, c->dtype);
    }

    d.x = b->h_x, d.x_stride = H + c->x_pad;
    d.row_slot = row_slot, d.expert_offset = first;
    d.activation = c->activation, d.alpha = c->alpha, d.limit = c->limit, d.gate_up = c->gate_up;
    d.num_experts = c->E, d.top_k = c->in_order ? 1 : c->K, d.hidden = H, d.intermediate = I;
    CHECK(moe_ref_experts_f64(&d, exact, exact_act, 0) == 0, "memory");
    texperts_bound(&d, c->dtype, c->rows_dtype, act_bound, bound);
    d.act_dtype = c->dtype;
    CHECK(moe_ref_experts_f64(&d, ideal, 0, 0) == 0, "memory");
    if (n > 0) {
        test_round_all(ideal_act, exact_act, n * I, c->dtype);
        test_round_all(ideal, ideal, n * H, c->rows_dtype);
        CHECK_CLOSE_BOTH("act", act, exact_act, ideal_act, act_bound, n, I);
        compare_product(c, &d, act_f64, rows, n);
        CHECK_CLOSE_BOTH("rows", rows, exact, ideal, bound, n, H);
    }
    CHECK_FAULT_AT(&b->fault, MOE_FAULT_BAD_ROW, bad);
    CHECK(tbuf_holds(&b->x, b->h_x) && tmlp_same(&b->mlp) && tbuf_holds(&b->offset, b->h_offset) &&
              tbuf_holds(&b->row_slot, b->h_row_slot),
          "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    TFREE(pick, row_slot, exact, exact_act, ideal, ideal_act, bound, act_bound, act_f64, rows, act);
    free(act_copy);
}

/* Returns what moe_experts must answer: MOE_OK, or the refusal where this file has no variant for
   the case or this binary no code for the variant. The up product is checked first. */
static moe_status expected(const experts_case* c)
{
    const moe_status s = test_gemm_status(c->dtype, c->tile);
    const int fp16 = c->dtype == MOE_FP16;
    if (fp16 && c->major1 == MOE_MAJOR_MN) return MOE_STATUS(MOE_ERR_NOT_COMPILED, w1);
    if (s == MOE_OK && fp16 && c->major2 == MOE_MAJOR_MN)
        return MOE_STATUS(MOE_ERR_NOT_COMPILED, w2);
    return s;
}

/* Runs and compares a case whose buffers the test has changed, and frees them. */
static void run_bufs(experts_bufs* b, const experts_case* c)
{
    CHECK_STATUS(moe_experts(&b->d, test_now.stream), MOE_OK);
    compare(b, c);
    bufs_free(b);
}

/* Draws, runs and compares a case. Requires its refusal where `expected` says so. */
static void run_case(const experts_case* c, trand* r)
{
    const moe_status want = expected(c);
    experts_bufs b;
    bufs_new(&b, c, r);
    if (CHECK_STATUS(moe_experts(&b.d, test_now.stream), want)) {
        if (want == MOE_OK) compare(&b, c);
        else CHECK(untouched(&b), "%s: refused, but an output was written", case_text(c));
    }
    bufs_free(&b);
}

#endif
