/* test_experts.cu: moe/experts.cuh against its reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_experts.cu -o test_experts
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_experts.cu -o test_experts */
#include "tests/test.h"
#include "tests/test_weights.h"

/* No fp16 with weights along N: a variant that was not compiled must be refused. */
#define MOE_GEMM_VARIANT_LIST(X, ...)                                                             \
    X(f16_kk, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                    \
    X(bf16_kk, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                   \
    X(bf16_kn, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)
#include "moe/experts.cuh"
#include "moe/ref/experts.h"
#include "moe/ref/route.h"
#include "tests/test_bound.h"

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
    int sampled; /* check every so many rows of an expert; 0: all */
} experts_case;

typedef struct experts_bufs {
    tbuf x, offset, row_slot, act, rows, table, part[MOST_EXPERTS], fault;
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
             "T=%d H=%d I=%d E=%d K=%d %s -> %s activation=%d (%g %g) gate_up=%d bias %d %d major %d %d table %d %d %d "
             "pads %d %d %d %d in_order=%d num_rows=%d dropped=%d none=%d bad=%d one=%d tile=%d",
             c->T, c->H, c->I, c->E, c->K, moe_dtype_name(c->dtype), moe_dtype_name(c->rows_dtype),
             c->activation, (double)c->alpha, (double)c->limit, c->gate_up, c->bias1, c->bias2, c->major1, c->major2, c->table1, c->table2,
             c->out_table, c->x_pad, c->act_pad, c->row_pad, c->w_pad, c->in_order, c->num_rows,
             c->dropped, c->none, c->bad, c->one, c->tile);
    return text;
}

/* bf16 where there is code for it, the small tile. */
static experts_case normal_case(int T, int H, int I, int E, int K)
{
    experts_case c;
    memset(&c, 0, sizeof c);
    c.T = T;
    c.H = H;
    c.I = I;
    c.E = E;
    c.K = K;
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
    int32_t count[MOST_EXPERTS];
    moe_ref_route_desc d;
    const int one = (int)trand_int(r, 0, c->E - 1);
    for (int s = 0; s < slots; ++s) {
        const int u = (int)trand_int(r, 0, 99);
        ids[s] = c->one ? one : (int32_t)trand_int(r, 0, c->E - 1);
        if (u < c->dropped) ids[s] = -1;
    }
    memset(&d, 0, sizeof d);
    d.ids = ids;
    d.expert_count = count;
    d.expert_offset = b->h_offset;
    d.row_slot = row_slot;
    d.num_tokens = c->T;
    d.num_experts = c->E;
    d.top_k = c->K;
    moe_ref_route(&d);
    for (int m = 0; m < b->num_rows; ++m) b->h_row_slot[m] = m < slots ? row_slot[m] : -1;
    for (int i = 0; i < c->none + c->bad && b->h_offset[c->E] > 0; ++i) {
        const int m = (int)trand_int(r, 0, b->h_offset[c->E] - 1);
        b->h_row_slot[m] = i < c->none ? -1 : i & 1 ? slots : -7;
    }
    free(ids);
    free(row_slot);
}

static void bufs_new(experts_bufs* b, const experts_case* c, trand* r)
{
    const int64_t x_stride = c->H + c->x_pad, act_stride = c->I + c->act_pad;
    const int64_t row_stride = c->H + c->row_pad;
    const int row_bytes = moe_dtype_bytes(c->rows_dtype);
    int64_t x_rows;
    tmlp_want want;
    memset(b, 0, sizeof *b);
    b->num_rows = c->num_rows ? c->num_rows : c->T * c->K;
    b->h_row_slot = (int32_t*)test_host(b->num_rows * 4);
    fill_rows(b, c, r);
    x_rows = c->in_order ? b->num_rows : c->T;
    b->h_x = trows_new(r, x_rows, x_stride, c->H, c->dtype, TFILL_NORMAL, 1);
    b->x = tbuf_from("x", b->h_x, (size_t)moe_extent(x_rows, x_stride, c->H, c->dtype), 16);
    memset(&want, 0, sizeof want);
    want.experts = c->E;
    want.hidden = c->H;
    want.intermediate = c->I;
    want.dtype = c->dtype;
    want.activation = c->activation;
    want.gate_up = c->gate_up;
    want.major1 = c->major1;
    want.major2 = c->major2;
    want.table1 = c->table1;
    want.table2 = c->table2;
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
    if (c->out_table) {
        void* address[MOST_EXPERTS];
        for (int e = 0; e < c->E; ++e) {
            const int64_t rows = b->h_offset[e + 1] - b->h_offset[e];
            b->part[e] = tbuf_new("rows of an expert", (size_t)(rows * row_stride * row_bytes),
                                  16 * (size_t)(e % 3));
            address[e] = b->part[e].p;
        }
        b->table = tbuf_from("table", address, (size_t)c->E * sizeof(void*), 8);
        b->d.table = (void* const*)b->table.p;
    } else {
        b->rows = tbuf_new("rows", (size_t)(b->num_rows * row_stride * row_bytes), 16);
        b->d.rows = b->rows.p;
    }
    b->fault = tfault_new(0);
    b->d.x = b->x.p;
    b->d.x_stride = c->x_pad ? x_stride : 0;
    b->d.w1 = b->mlp.w1.d;
    b->d.w2 = b->mlp.w2.d;
    b->d.bias1 = c->bias1 ? b->mlp.bias1.p : (const void*)0;
    b->d.bias2 = c->bias2 ? b->mlp.bias2.p : (const void*)0;
    b->d.expert_offset = (const int32_t*)b->offset.p;
    b->d.row_slot = c->in_order ? (const int32_t*)0 : (const int32_t*)b->row_slot.p;
    b->d.act = b->act.p;
    b->d.act_stride = c->act_pad ? act_stride : 0;
    b->d.row_stride = c->row_pad ? row_stride : 0;
    b->d.fault = (uint64_t*)b->fault.p;
    b->d.rank = TEST_RANK;
    b->d.num_tokens = c->in_order && c->num_rows ? 0 : c->T;
    b->d.num_rows = c->num_rows;
    b->d.hidden = c->H;
    b->d.intermediate = c->I;
    b->d.num_experts = c->E;
    b->d.top_k = c->in_order && c->num_rows ? 0 : c->K;
    b->d.dtype = c->dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->dtype;
    b->d.rows_dtype = c->rows_dtype == c->dtype ? MOE_DTYPE_DEFAULT : c->rows_dtype;
    b->d.gate_up = c->gate_up == MOE_GATE_UP_CONCATENATED ? MOE_GATE_UP_DEFAULT : c->gate_up;
    b->d.activation = c->activation;
    b->d.alpha = c->alpha;
    b->d.limit = c->limit;
    b->d.tile = c->tile;
}

static void bufs_free(experts_bufs* b)
{
    tbuf_free(&b->x);
    tbuf_free(&b->offset);
    tbuf_free(&b->row_slot);
    tbuf_free(&b->act);
    if (b->rows.p) tbuf_free(&b->rows);
    if (b->table.p) tbuf_free(&b->table);
    for (int e = 0; e < MOST_EXPERTS; ++e)
        if (b->part[e].p) tbuf_free(&b->part[e]);
    tbuf_free(&b->fault);
    tmlp_free(&b->mlp);
    free(b->h_x);
    free(b->h_row_slot);
}

/* Is every output still the poison? */
static int untouched(const experts_bufs* b, const experts_case* c)
{
    int same = tbuf_holds(&b->act, 0);
    for (int e = 0; e < c->E && c->out_table; ++e) same &= tbuf_holds(&b->part[e], 0);
    return same && (c->out_table || tbuf_holds(&b->rows, 0));
}

/* act against the exact activations; rows against the exact product of the device's own act, and
   against the whole MLP with nothing rounded on the way. */
static void compare(const experts_bufs* b, const experts_case* c)
{
    const int before = test_now.failures, H = c->H, I = c->I, slots = c->T * c->K;
    const int64_t act_stride = I + c->act_pad, row_stride = H + c->row_pad;
    const int row_bytes = moe_dtype_bytes(c->rows_dtype), step = c->sampled ? c->sampled : 1;
    const int total = b->h_offset[c->E];
    int32_t offset[MOST_EXPERTS + 1], *row_slot = (int32_t*)test_host(total * 4);
    int32_t* pick = (int32_t*)test_host(total * 4);
    int64_t n = 0, bad = -1, written = 0;
    double *exact, *exact_act, *ideal, *product, *product_sum, *mine, *act_bound, *row_bound;
    char* act = (char*)tbuf_copy(&b->act);
    char* rows = c->out_table ? (char*)0 : (char*)tbuf_copy(&b->rows);
    float *got, *got_act;
    moe_ref_experts_desc d;
    moe_ref_gemm_desc g;
    for (int e = 0; e < c->E; ++e) {
        offset[e] = (int32_t)n;
        for (int m = b->h_offset[e]; m < b->h_offset[e + 1]; ++m) {
            const int s = b->h_row_slot[m], wrong = !c->in_order && (s < -1 || s >= slots);
            if (wrong && bad < 0) bad = m;
            if ((m - b->h_offset[e]) % step) continue;
            pick[n] = m;
            row_slot[n++] = c->in_order ? m : wrong ? -1 : s;
        }
    }
    offset[c->E] = (int32_t)n;
    exact = (double*)test_host(n * H * 8);
    ideal = (double*)test_host(n * H * 8);
    product = (double*)test_host(n * H * 8);
    product_sum = (double*)test_host(n * H * 8);
    exact_act = (double*)test_host(n * I * 8);
    mine = (double*)test_host(n * I * 8);
    act_bound = (double*)test_host(n * I * 8);
    row_bound = (double*)test_host(n * H * 8);
    got = (float*)test_host(n * H * 4);
    got_act = (float*)test_host(n * I * 4);

    memset(&d, 0, sizeof d);
    d.x = b->h_x;
    d.row_slot = row_slot;
    d.expert_offset = offset;
    d.w1 = tweights_host(&b->mlp.w1);
    d.w2 = tweights_host(&b->mlp.w2);
    d.bias1 = c->bias1 ? b->mlp.h_bias1 : (void*)0;
    d.bias2 = c->bias2 ? b->mlp.h_bias2 : (void*)0;
    d.x_stride = H + c->x_pad;
    d.x_dtype = d.w_dtype = d.bias_dtype = c->dtype;
    d.activation = c->activation;
    d.alpha = c->alpha;
    d.limit = c->limit;
    d.gate_up = c->gate_up;
    d.num_experts = c->E;
    d.top_k = c->in_order ? 1 : c->K;
    d.hidden = H;
    d.intermediate = I;
    CHECK(moe_ref_experts_f64(&d, exact, exact_act, 0) == 0, "memory");
    texperts_bound(&d, c->dtype, c->rows_dtype, act_bound, row_bound); /* each element's own */
    d.act_dtype = c->dtype;
    CHECK(moe_ref_experts_f64(&d, ideal, 0, 0) == 0, "memory");

    for (int e = 0; e < c->E; ++e) {
        char* part = c->out_table ? (char*)tbuf_copy(&b->part[e]) : (char*)0;
        for (int64_t i = offset[e]; i < offset[e + 1]; ++i) {
            const int64_t at = part ? pick[i] - b->h_offset[e] : pick[i];
            for (int h = 0; h < H; ++h)
                got[i * H + h] = moe_load(part ? part : rows, at * row_stride + h, c->rows_dtype);
            for (int j = 0; j < I; ++j)
                mine[i * I + j] = got_act[i * I + j] =
                    moe_load(act, pick[i] * act_stride + j, c->dtype);
        }
        if (part)
            written += test_strays(part, (int64_t)b->part[e].bytes, row_bytes, row_stride, H, 0,
                                   b->h_offset[e + 1] - b->h_offset[e]);
        free(part);
    }
    if (rows)
        written += test_strays(rows, (int64_t)b->rows.bytes, row_bytes, row_stride, H, 0, total);
    written += test_strays(act, (int64_t)b->act.bytes, 2, act_stride, I, 0, total);
    CHECK(written == 0, "%lld bytes that are nobody's were written", (long long)written);

    memset(&g, 0, sizeof g);
    g.a = mine;
    g.a_dtype = MOE_REF_REAL;
    g.expert_offset = offset;
    g.b = d.w2;
    g.b_dtype = c->dtype;
    g.bias = d.bias2;
    g.bias_dtype = c->dtype;
    g.num_experts = c->E;
    g.n = H;
    g.k = I;
    moe_ref_gemm_f64(&g, product, product_sum);
    if (n > 0) {
        double* rounded = (double*)test_host(n * (H > I ? H : I) * 8);
        for (int64_t i = 0; i < n * I; ++i) rounded[i] = test_rounded(exact_act[i], c->dtype);
        CHECK_CLOSE("act", got_act, MOE_FP32, I, exact_act, rounded, n, I);
        test_within("act", got_act, MOE_FP32, I, exact_act, act_bound, 1, n, I, __FILE__, __LINE__);
        if (c->rows_dtype == MOE_FP32) {
            CHECK_CLOSE_SUM("rows from act", got, H, product, product_sum, I, n, H);
        } else {
            for (int64_t i = 0; i < n * H; ++i) rounded[i] = test_rounded(product[i], c->rows_dtype);
            CHECK_CLOSE("rows from act", got, MOE_FP32, H, product, rounded, n, H);
            for (int64_t i = 0; i < n * H; ++i) {
                const double by = tsum_error(product_sum[i], I);
                rounded[i] = by + tround(fabs(product[i]) + by, c->rows_dtype);
            }
            test_within("rows from act", got, MOE_FP32, H, product, rounded, 1, n, H, __FILE__,
                        __LINE__);
        }
        for (int64_t i = 0; i < n * H; ++i) ideal[i] = test_rounded(ideal[i], c->rows_dtype);
        CHECK_CLOSE("rows", got, MOE_FP32, H, exact, ideal, n, H);
        test_within("rows", got, MOE_FP32, H, exact, row_bound, 1, n, H, __FILE__, __LINE__);
        free(rounded);
    }
    CHECK_FAULT(&b->fault, bad < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_ROW, bad < 0 ? 0 : bad);
    CHECK(tbuf_holds(&b->x, b->h_x) && tmlp_same(&b->mlp) && tbuf_holds(&b->offset, b->h_offset) &&
              tbuf_holds(&b->row_slot, b->h_row_slot),
          "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    free(exact);
    free(ideal);
    free(product);
    free(product_sum);
    free(exact_act);
    free(mine);
    free(act_bound);
    free(row_bound);
    free(got);
    free(got_act);
    free(row_slot);
    free(pick);
    free(act);
    free(rows);
}

/* What moe_experts must answer: MOE_OK, or the refusal where this file has no variant for the case
   or this binary no code for the variant. The up product is asked first. */
static moe_status expected(const experts_case* c)
{
    const moe_status s = test_gemm_status(c->dtype, c->tile);
    const int fp16 = c->dtype == MOE_FP16;
    if (fp16 && c->major1 == MOE_MAJOR_MN) return MOE_STATUS(MOE_ERR_NOT_COMPILED, w1);
    if (s == MOE_OK && fp16 && c->major2 == MOE_MAJOR_MN) return MOE_STATUS(MOE_ERR_NOT_COMPILED, w2);
    return s;
}

static void run_case(const experts_case* c, trand* r)
{
    const moe_status want = expected(c);
    experts_bufs b;
    bufs_new(&b, c, r);
    if (CHECK_STATUS(moe_experts(&b.d, test_now.stream), want)) {
        if (want == MOE_OK) compare(&b, c);
        else CHECK(untouched(&b, c), "%s: refused, but an output was written", case_text(c));
    }
    bufs_free(&b);
}

/* All layouts of gate and up, with and without biases, both dtypes, 16-bit rows and fp32. */
static void test_experts_layouts(void)
{
    trand r = trand_new(1);
    for (int gate_up = MOE_GATE_UP_CONCATENATED; gate_up <= MOE_GATE_UP_SEPARATE; ++gate_up)
        for (int bias = 0; bias < 4; ++bias)
            for (int i = 0; i < 6; ++i) { /* of them 2 fp16 */
                experts_case c = normal_case(23, 72, 56, 5, 3);
                c.gate_up = gate_up;
                c.bias1 = bias & 1;
                c.bias2 = bias >> 1;
                c.dtype = i < 2 ? MOE_FP16 : MOE_BF16;
                c.rows_dtype = (i ^ bias) & 1 ? MOE_FP32 : c.dtype;
                if (i >= 2) {
                    c.major1 = i & 1 ? MOE_MAJOR_MN : MOE_MAJOR_K;
                    c.major2 = i & 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
                }
                c.table1 = (int)trand_int(&r, 0, 1);
                c.table2 = (int)trand_int(&r, 0, 1);
                c.out_table = (int)trand_int(&r, 0, 1);
                c.w_pad = 8 * (int)trand_int(&r, 0, 2);
                c.tile = i & 1 ? MOE_TILE_32x128 : MOE_TILE_64x64;
                run_case(&c, &r);
            }
}

/* Every activation with every layout of gate and up, with biases and without. */
static void test_experts_activations(void)
{
    trand r = trand_new(16);
    for (int kind = MOE_ACTIVATION_NONE; kind <= MOE_ACTIVATION_RELU2; ++kind)
        for (int gate_up = MOE_GATE_UP_CONCATENATED; gate_up <= MOE_GATE_UP_SEPARATE; ++gate_up)
            for (int i = 0; i < 4; ++i) {
                experts_case c = normal_case(19, 72, 56, 4, 2);
                c.activation = kind;
                c.gate_up = gate_up; /* of no meaning to those that are not gated */
                c.bias1 = i & 1;
                c.bias2 = i >> 1;
                c.dtype = c.rows_dtype = i == 2 ? MOE_FP16 : MOE_BF16;
                if (c.dtype == MOE_BF16) c.major1 = (int)trand_int(&r, MOE_MAJOR_K, MOE_MAJOR_MN);
                c.table1 = (int)trand_int(&r, 0, 1);
                c.w_pad = 8 * (int)trand_int(&r, 0, 1);
                if (kind == MOE_ACTIVATION_SWIGLU_CLAMPED && i) {
                    c.alpha = i == 1 ? 0.5f : 0;
                    c.limit = i == 2 ? 0 : 0.75f;
                }
                run_case(&c, &r);
            }
    { /* gpt-oss as it is: pairs, biases, the defaults, gates and ups beyond the limit */
        experts_case c = normal_case(30, 64, 64, 3, 2);
        experts_bufs b;
        c.activation = MOE_ACTIVATION_SWIGLU_CLAMPED;
        c.gate_up = MOE_GATE_UP_INTERLEAVED;
        c.bias1 = c.bias2 = 1;
        bufs_new(&b, &c, &r);
        for (int64_t i = 0; i < c.E * 2 * c.I; ++i)
            moe_store(b.mlp.h_bias1, i, c.dtype, 8 * trand_normal(&r));
        tbuf_put(&b.mlp.bias1, b.mlp.h_bias1);
        CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* Every activation at infinities, NaN and numbers whose exponential overflows, as biases of rows of
   zeros: infinities are limits, NaN stays. */
static void test_experts_limits(void)
{
    static const double gate[] = {-INFINITY, INFINITY, NAN, -3e38, 3e38, -1e4, -200, -100, -90, 90, 0, -1};
    enum { LIMITS = sizeof gate / sizeof gate[0] };
    trand r = trand_new(18);
    for (int kind = MOE_ACTIVATION_SWIGLU; kind <= MOE_ACTIVATION_RELU2; ++kind)
        for (int gate_up = MOE_GATE_UP_CONCATENATED; gate_up <= MOE_GATE_UP_SEPARATE; ++gate_up)
            for (int half = 0; half < 2; ++half) {
                experts_case c = normal_case(3, 8, 16, 1, 1);
                const int gated = moe_activation_is_gated(kind);
                const int pairs = gated && gate_up == MOE_GATE_UP_INTERLEAVED;
                experts_bufs b;
                char* act;
                c.activation = kind;
                c.gate_up = gate_up;
                c.bias1 = c.in_order = 1;
                c.dtype = c.rows_dtype = half ? MOE_FP16 : MOE_BF16;
                bufs_new(&b, &c, &r);
                if (expected(&c) != MOE_OK) {
                    bufs_free(&b);
                    continue;
                }
                memset(b.h_x, 0, b.x.bytes);
                tbuf_put(&b.x, b.h_x);
                for (int i = 0; i < c.I; ++i) {
                    moe_store(b.mlp.h_bias1, pairs ? 2 * i : i, c.dtype, (float)gate[i % LIMITS]);
                    if (gated)
                        moe_store(b.mlp.h_bias1, pairs ? 2 * i + 1 : c.I + i, c.dtype, 1.5f);
                }
                tbuf_put(&b.mlp.bias1, b.mlp.h_bias1);
                CHECK_STATUS(moe_experts_up(&b.d, test_now.stream), MOE_OK);
                act = (char*)tbuf_copy(&b.act);
                for (int i = 0; i < c.T * c.I; ++i) {
                    const int at = i % c.I;
                    const double v = moe_load(b.mlp.h_bias1, pairs ? 2 * at : at, c.dtype);
                    const double exact = moe_ref_activation_f64(kind, v, 1.5, 0, 0);
                    const double want = test_rounded(exact, c.dtype), got = moe_load(act, i, c.dtype);
                    CHECK(isnan(v) ? isnan(want) && isnan(got)
                          : isfinite(want)
                              ? fabs(got - want) <= 0.01 * fabs(want) + 1e-6 /* subnormals may be 0 */
                              : got == want,
                          "activation %d of %g is %g, not %g; %s", kind, v, got, want, case_text(&c));
                }
                free(act);
                bufs_free(&b);
            }
}

/* One expert needs no offsets: all num_rows rows are its own. */
static void test_experts_no_offset(void)
{
    trand r = trand_new(17);
    for (int i = 0; i < 2; ++i) {
        experts_case c = normal_case(33, 64, 40, 1, 1);
        experts_bufs b;
        c.in_order = 1;
        c.num_rows = i ? 33 : 0;
        bufs_new(&b, &c, &r);
        b.d.expert_offset = 0;
        CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* Shapes, strides, ways to give the rows. */
static void test_experts_shapes(void)
{
    static const int shapes[][5] = {{1, 8, 8, 1, 1},    {3, 8, 16, 2, 2},   {40, 64, 32, 1, 1},
                                    {9, 136, 24, 4, 4}, {31, 40, 72, 64, 2}, {66, 64, 64, 3, 2},
                                    {17, 24, 200, 7, 6}, {70, 16, 40, 2, 2}};
    trand r = trand_new(2);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; ++i)
        for (int j = 0; j < (MOE_ON_HOST ? 3 : 12); ++j) {
            const int* s = shapes[i];
            experts_case c = normal_case(s[0], s[1], s[2], s[3], s[4]);
            c.gate_up = (int)trand_int(&r, MOE_GATE_UP_CONCATENATED, MOE_GATE_UP_SEPARATE);
            c.activation = trand_int(&r, 0, 1) ? (int)trand_int(&r, 0, MOE_ACTIVATION_RELU2) : 0;
            c.rows_dtype = trand_int(&r, 0, 1) ? MOE_FP32 : c.dtype;
            c.bias1 = (int)trand_int(&r, 0, 1) || (c.T == 1 && c.activation == MOE_ACTIVATION_RELU2);
            c.bias2 = (int)trand_int(&r, 0, 1);
            c.major1 = (int)trand_int(&r, MOE_MAJOR_K, MOE_MAJOR_MN);
            c.major2 = (int)trand_int(&r, MOE_MAJOR_K, MOE_MAJOR_MN);
            c.table1 = (int)trand_int(&r, 0, 1);
            c.table2 = (int)trand_int(&r, 0, 1);
            c.out_table = (int)trand_int(&r, 0, 1);
            c.x_pad = 8 * (int)trand_int(&r, 0, 2);
            c.act_pad = 8 * (int)trand_int(&r, 0, 2);
            c.row_pad = 8 * (int)trand_int(&r, 0, 2);
            c.w_pad = 8 * (int)trand_int(&r, 0, 2);
            c.in_order = j == 1;
            c.num_rows = j == 2 ? s[0] * s[4] + 13 : 0;
            c.dropped = s[0] > 5 ? (int)trand_int(&r, 0, 1) * 30 : 0;
            c.one = trand_int(&r, 0, 3) == 0;
            c.tile = (int)trand_int(&r, 0, 2) ? (int)trand_int(&r, MOE_TILE_32x128, MOE_TILE_64x64)
                                              : MOE_TILE_AUTO;
            run_case(&c, &r);
        }
}

/* The large tiles, once each. */
static void test_experts_tiles(void)
{
    trand r = trand_new(3);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile) {
        experts_case c = normal_case(60, 72, 136, 2, 2);
        c.tile = tile;
        c.bias1 = c.bias2 = 1;
        run_case(&c, &r);
    }
}

/* x in expert order with its own number of rows, and no tokens at all. */
static void test_experts_in_order(void)
{
    trand r = trand_new(4);
    for (int i = 0; i < 4; ++i) {
        experts_case c = normal_case(30, 48, 40, 5, 2);
        c.in_order = 1;
        c.num_rows = i & 1 ? 71 : 0;
        c.dropped = 20;
        c.out_table = i >> 1;
        run_case(&c, &r);
    }
}

/* Rows that name no slot read as zeros; those that name a wrong one do and set the fault word. */
static void test_experts_bad_rows(void)
{
    trand r = trand_new(5);
    for (int i = 0; i < 6; ++i) {
        experts_case c = normal_case(40, 48, 40, 6, 3);
        c.bias1 = c.bias2 = i & 1; /* zeros make the biases' own rows */
        c.none = i < 4 ? 5 : 0;
        c.bad = i < 2 ? 0 : 7;
        run_case(&c, &r);
    }
}

/* A bad offset: the up product stops, and so does the down product that follows. */
static void test_experts_bad_offsets(void)
{
    trand r = trand_new(6);
    for (int i = 0; i < 2; ++i) {
        experts_case c = normal_case(20, 48, 40, 4, 2);
        experts_bufs b;
        int32_t offset[5];
        bufs_new(&b, &c, &r);
        memcpy(offset, b.h_offset, sizeof offset);
        offset[2] = i ? -5 : 41;
        tbuf_put(&b.offset, offset);
        CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
        CHECK(untouched(&b, &c), "outputs");
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 1);
        tbuf_put(&b.offset, b.h_offset); /* good again, but the word still says stop */
        CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
        CHECK(untouched(&b, &c), "outputs after a stop fault");
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 1);
        bufs_free(&b);
    }
}

/* No rows is no error: none offered, or none used. */
static void test_experts_no_rows(void)
{
    trand r = trand_new(7);
    experts_case c = normal_case(20, 48, 40, 4, 2);
    experts_bufs b;
    moe_experts_desc d;
    bufs_new(&b, &c, &r);
    memset(b.h_offset, 0, sizeof b.h_offset);
    tbuf_put(&b.offset, b.h_offset);
    CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
    CHECK(untouched(&b, &c), "no row is used");
    d = b.d;
    d.num_tokens = 0;
    CHECK_STATUS(moe_experts(&d, test_now.stream), MOE_OK);
    d.row_slot = 0;
    d.top_k = 0;
    CHECK_STATUS(moe_experts(&d, test_now.stream), MOE_OK);
    CHECK(untouched(&b, &c), "no row is there");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    bufs_free(&b);
}

/* The two products one by one are moe_experts. */
static void test_experts_halves(void)
{
    trand r = trand_new(8);
    experts_case c = normal_case(30, 72, 56, 4, 2);
    experts_bufs b;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_experts_up(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_experts_down(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_experts_up(&b.d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b.rows, 0) && !tbuf_holds(&b.act, 0), "up writes act alone");
    {
        void* act = tbuf_copy(&b.act);
        void* rows;
        CHECK_STATUS(moe_experts_down(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.act, act), "down writes rows alone");
        compare(&b, &c);
        rows = tbuf_copy(&b.rows);
        tbuf_poison(&b.act);
        tbuf_poison(&b.rows);
        CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.act, act) && tbuf_holds(&b.rows, rows), "both at once");
        free(act);
        free(rows);
    }
    bufs_free(&b);
}

/* The plan is what a launch of either product takes. */
static void test_experts_plan(void)
{
    trand r = trand_new(9);
    for (int tile = MOE_TILE_AUTO; tile <= MOE_TILE_64x64; ++tile) {
        experts_case c = normal_case(200, 64, 40, 3, 2);
        experts_bufs b;
        moe_gemm_plan p[2];
        c.tile = tile;
        test_poison(p, sizeof p);
        bufs_new(&b, &c, &r);
        if (CHECK_STATUS(moe_experts_plan(&b.d, p, p + 1), expected(&c)) && expected(&c) == MOE_OK)
            for (int i = 0; i < 2; ++i) test_plan(&p[i], c.dtype, tile);
        CHECK_STATUS(moe_experts_plan(0, p, p), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_experts_plan(&b.d, 0, p), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_experts_plan(&b.d, p, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK(untouched(&b, &c), "a plan runs nothing");
        bufs_free(&b);
    }
}

/* The plan and the launch must refuse it alike. Where the plan does not, nothing is launched. */
static void refused(const moe_experts_desc* d, moe_status want, int line)
{
    moe_gemm_plan up, down;
    moe_experts_prepared prepared;
    const moe_status s = moe_experts_plan(d, &up, &down);
    test_status(s, want, __FILE__, line, "moe_experts_plan");
    if (s == MOE_OK) return;
    test_poison(&prepared, sizeof prepared);
    test_status(moe_experts_prepare(d, &prepared), want, __FILE__, line, "moe_experts_prepare");
    test_empty(&prepared, sizeof prepared, line);
    test_status(moe_experts_run(&prepared, test_now.stream), MOE_OK, __FILE__, line, "moe_experts_run");
    test_status(moe_experts(d, test_now.stream), want, __FILE__, line, "moe_experts");
    test_status(moe_experts_up(d, test_now.stream), want, __FILE__, line, "moe_experts_up");
    test_status(moe_experts_down(d, test_now.stream), want, __FILE__, line, "moe_experts_down");
}

static void test_experts_refusals(void)
{
    enum { T = 20, H = 64, I = 40, E = 3, K = 2, ROWS = T * K };
    trand r = trand_new(10);
    experts_case c = normal_case(T, H, I, E, K);
    experts_bufs b;
    moe_experts_desc good, d;
    tbuf table, arena = tbuf_new("arena", 65536, 0); /* an output and any input */
    void* address[E];
    c.bias1 = c.bias2 = 1;
    c.gate_up = MOE_GATE_UP_SEPARATE;
    bufs_new(&b, &c, &r);
    for (int e = 0; e < E; ++e) address[e] = b.rows.p;
    table = tbuf_from("table", address, sizeof address, 0);
    good = b.d;
    CHECK_STATUS(moe_experts(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED((d.num_tokens = INT32_MAX, d.top_k = INT32_MAX), MOE_ERR_RANGE, num_tokens);
    REFUSED((d.num_tokens = 0, d.num_rows = ROWS), MOE_ERR_RANGE, num_tokens);
    REFUSED(d.num_rows = -1, MOE_ERR_RANGE, num_rows);
    REFUSED(d.top_k = 0, MOE_ERR_RANGE, top_k);
    REFUSED(d.top_k = -1, MOE_ERR_RANGE, top_k);
    REFUSED((d.row_slot = 0, d.top_k = -1, d.num_rows = ROWS), MOE_ERR_RANGE, top_k);
    REFUSED(d.hidden = 0, MOE_ERR_RANGE, hidden);
    REFUSED(d.hidden = -64, MOE_ERR_RANGE, hidden);
    REFUSED(d.hidden = 60, MOE_ERR_MULTIPLE, hidden);
    REFUSED(d.intermediate = 0, MOE_ERR_RANGE, intermediate);
    REFUSED(d.intermediate = -8, MOE_ERR_RANGE, intermediate);
    REFUSED(d.intermediate = 36, MOE_ERR_MULTIPLE, intermediate);
    REFUSED(d.num_experts = 0, MOE_ERR_RANGE, num_experts);
    REFUSED(d.num_experts = -1, MOE_ERR_RANGE, num_experts);
    REFUSED(d.num_experts = MOE_MAX_EXPERTS + 1, MOE_ERR_RANGE, num_experts);
    REFUSED(d.dtype = MOE_FP32, MOE_ERR_DTYPE, dtype);
    REFUSED(d.dtype = 4, MOE_ERR_DTYPE, dtype);
    REFUSED(d.dtype = -1, MOE_ERR_DTYPE, dtype);
    REFUSED(d.rows_dtype = c.dtype == MOE_BF16 ? MOE_FP16 : MOE_BF16, MOE_ERR_DTYPE, rows_dtype);
    REFUSED(d.rows_dtype = 4, MOE_ERR_DTYPE, rows_dtype);
    REFUSED(d.rows_dtype = -1, MOE_ERR_DTYPE, rows_dtype);
    REFUSED(d.gate_up = 4, MOE_ERR_OPTION, gate_up);
    REFUSED(d.gate_up = -1, MOE_ERR_OPTION, gate_up);
    REFUSED(d.activation = MOE_ACTIVATION_RELU2 + 1, MOE_ERR_OPTION, activation);
    REFUSED(d.activation = -1, MOE_ERR_OPTION, activation);
    REFUSED(d.alpha = 1.702f, MOE_ERR_CONFLICT, alpha);
    REFUSED(d.limit = 7, MOE_ERR_CONFLICT, limit);
    REFUSED((d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED, d.alpha = NAN), MOE_ERR_RANGE, alpha);
    REFUSED((d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED, d.limit = -1), MOE_ERR_RANGE, limit);
    REFUSED(d.activation = MOE_ACTIVATION_SILU, MOE_ERR_CONFLICT, w1); /* a second matrix */
    REFUSED((d.activation = MOE_ACTIVATION_SILU, d.w1.up = 0, d.alpha = 1), MOE_ERR_CONFLICT, alpha);
    REFUSED(d.tile = 99, MOE_ERR_OPTION, tile);
    REFUSED(d.tile = -1, MOE_ERR_OPTION, tile);
    REFUSED(d.x_stride = 56, MOE_ERR_STRIDE, x_stride);
    REFUSED(d.x_stride = -64, MOE_ERR_STRIDE, x_stride);
    REFUSED(d.x_stride = 68, MOE_ERR_ALIGN, x_stride);
    REFUSED(d.act_stride = 32, MOE_ERR_STRIDE, act_stride);
    REFUSED(d.act_stride = -40, MOE_ERR_STRIDE, act_stride);
    REFUSED(d.act_stride = 44, MOE_ERR_ALIGN, act_stride);
    REFUSED(d.row_stride = 56, MOE_ERR_STRIDE, row_stride);
    REFUSED(d.row_stride = -64, MOE_ERR_STRIDE, row_stride);
    REFUSED(d.row_stride = 68, MOE_ERR_ALIGN, row_stride);
    REFUSED(d.w1.major = 3, MOE_ERR_OPTION, w1);
    REFUSED(d.w2.major = -1, MOE_ERR_OPTION, w2);
    REFUSED(d.w1.row_stride = 56, MOE_ERR_STRIDE, w1);
    REFUSED(d.w2.row_stride = 32, MOE_ERR_STRIDE, w2);
    REFUSED(d.w1.row_stride = 68, MOE_ERR_ALIGN, w1);
    REFUSED(d.w2.row_stride = 44, MOE_ERR_ALIGN, w2);
    REFUSED(d.w1.expert_stride = -64, MOE_ERR_STRIDE, w1);
    REFUSED(d.w2.expert_stride = -64, MOE_ERR_STRIDE, w2);
    REFUSED(d.w1.expert_stride = 64 * 40 + 1, MOE_ERR_ALIGN, w1);
    REFUSED(d.w2.expert_stride = 64 * 40 + 4, MOE_ERR_ALIGN, w2);
    REFUSED(d.w1.table = (const void* const*)table.p, MOE_ERR_CONFLICT, w1);
    REFUSED(d.w1.up_table = (const void* const*)table.p, MOE_ERR_CONFLICT, w1);
    REFUSED(d.w2.table = (const void* const*)table.p, MOE_ERR_CONFLICT, w2);
    REFUSED(d.table = (void* const*)table.p, MOE_ERR_CONFLICT, rows);
    REFUSED(d.x = 0, MOE_ERR_NULL, x);
    REFUSED(d.w1.base = 0, MOE_ERR_NULL, w1);
    REFUSED(d.w1.up = 0, MOE_ERR_NULL, w1);
    REFUSED(d.w2.base = 0, MOE_ERR_NULL, w2);
    REFUSED(d.expert_offset = 0, MOE_ERR_NULL, expert_offset);
    REFUSED(d.act = 0, MOE_ERR_NULL, act);
    REFUSED(d.rows = 0, MOE_ERR_NULL, rows);
    REFUSED(d.x = AT(d.x, 8), MOE_ERR_ALIGN, x);
    REFUSED(d.w1.base = AT(d.w1.base, 8), MOE_ERR_ALIGN, w1);
    REFUSED(d.w1.up = AT(d.w1.up, 2), MOE_ERR_ALIGN, w1);
    REFUSED(d.w2.base = AT(d.w2.base, 8), MOE_ERR_ALIGN, w2);
    REFUSED((d.w1.base = 0, d.w1.table = (const void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, w1);
    REFUSED((d.w1.up = 0, d.w1.up_table = (const void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, w1);
    REFUSED((d.w2.base = 0, d.w2.table = (const void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, w2);
    REFUSED((d.rows = 0, d.table = (void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, rows);
    REFUSED(d.bias1 = AT(d.bias1, 1), MOE_ERR_ALIGN, bias1);
    REFUSED(d.bias2 = AT(d.bias2, 1), MOE_ERR_ALIGN, bias2);
    REFUSED(d.expert_offset = (const int32_t*)AT(d.expert_offset, 2), MOE_ERR_ALIGN, expert_offset);
    REFUSED(d.row_slot = (const int32_t*)AT(d.row_slot, 2), MOE_ERR_ALIGN, row_slot);
    REFUSED(d.act = AT(d.act, 8), MOE_ERR_ALIGN, act);
    REFUSED(d.rows = AT(d.rows, 8), MOE_ERR_ALIGN, rows);
    REFUSED(d.rank = -1, MOE_ERR_RANGE, rank);
    REFUSED(d.rank = MOE_FAULT_MAX_RANK + 1, MOE_ERR_RANGE, rank);
    REFUSED(d.fault = (uint64_t*)AT(d.fault, 4), MOE_ERR_ALIGN, fault);
    /* without tokens, too */
    REFUSED((d.num_tokens = 0, d.expert_offset = 0), MOE_ERR_NULL, expert_offset);
    REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
    /* act is written first, and may be nothing that either product reads; rows are an output, and
       no input, x and the first weights included, may be lost to them */
    for (int end = 0; end < 2; ++end) { /* an input over an output's first or last bytes */
        void* const at = AT(arena.p, end ? ROWS * I * 2 - 16 : 0);
        good.act = arena.p;
        REFUSED(d.x = at, MOE_ERR_OVERLAP, act);
        REFUSED(d.w1.base = at, MOE_ERR_OVERLAP, act);
        REFUSED(d.w1.up = at, MOE_ERR_OVERLAP, act);
        REFUSED(d.bias1 = at, MOE_ERR_OVERLAP, act);
        REFUSED(d.row_slot = (const int32_t*)at, MOE_ERR_OVERLAP, act);
        REFUSED(d.expert_offset = (const int32_t*)at, MOE_ERR_OVERLAP, act);
        REFUSED(d.w2.base = at, MOE_ERR_OVERLAP, act);
        REFUSED(d.bias2 = at, MOE_ERR_OVERLAP, act);
        good.act = b.act.p;
    }
    for (int end = 0; end < 2; ++end) {
        void* const at = AT(arena.p, end ? ROWS * H * 2 - 16 : 0);
        good.rows = arena.p;
        REFUSED(d.act = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.w2.base = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.bias2 = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.expert_offset = (const int32_t*)at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.x = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.w1.base = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.w1.up = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.bias1 = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.row_slot = (const int32_t*)at, MOE_ERR_OVERLAP, rows);
        good.rows = b.rows.p;
    }
    { /* at addresses far from all others: nothing is launched */
        char* const far = (char*)((uintptr_t)1 << 44);
        const size_t bias = E * 2 * I * 2; /* bytes, of gates and of ups */
        const size_t last = (ROWS - 1) * 2;
        moe_gemm_plan up, down;
        /* the last ups' biases; where they end, rows may begin */
        REFUSED((d.rows = far, d.bias1 = far - bias + 2), MOE_ERR_OVERLAP, rows);
        d.bias1 = far - bias;
        CHECK_STATUS(moe_experts_plan(&d, &up, &down), MOE_OK);
        REFUSED((d.act = far, d.bias1 = far - bias + 2), MOE_ERR_OVERLAP, act);
        REFUSED((d.rows = far, d.bias2 = far - E * H * 2 + 2), MOE_ERR_OVERLAP, rows);
        /* tables of which one entry lies there */
        REFUSED((d.rows = far, d.w1.up = 0, d.w1.up_table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, rows);
        REFUSED((d.rows = far, d.w1.base = 0, d.w1.table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, rows);
        REFUSED((d.rows = far, d.w2.base = 0, d.w2.table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, rows);
        REFUSED((d.act = far, d.w1.up = 0, d.w1.up_table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, act);
        REFUSED((d.act = far, d.w1.base = 0, d.w1.table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, act);
        REFUSED((d.act = far, d.w2.base = 0, d.w2.table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, act);
        REFUSED((d.act = far, d.rows = 0, d.table = (void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, act);
        /* the last rows of strided ones */
        REFUSED((d.x = far, d.x_stride = 72, d.rows = far + (T - 1) * 72 * 2 + 112),
                MOE_ERR_OVERLAP, rows);
        REFUSED((d.x = far, d.x_stride = 72, d.act = far + (T - 1) * 72 * 2 + 112), MOE_ERR_OVERLAP,
                act);
        REFUSED((d.act = far, d.act_stride = 48, d.rows = far + last * 48 + 64), MOE_ERR_OVERLAP,
                rows);
        REFUSED((d.rows = far, d.row_stride = 72, d.fault = (uint64_t*)(far + last * 72 + 120)),
                MOE_ERR_OVERLAP, fault);
        REFUSED((d.rows = far, d.row_stride = 72, d.act = far + last * 72 + 112), MOE_ERR_OVERLAP,
                rows);
        REFUSED((d.rows = far, d.row_stride = 72, d.x = far + last * 72 + 112), MOE_ERR_OVERLAP,
                rows);
    }
    /* the last bytes of the last expert's weights count */
    REFUSED((d.w1.base = arena.p, d.act = AT(arena.p, E * I * H * 2 - 16)), MOE_ERR_OVERLAP, act);
    REFUSED((d.w2.base = arena.p, d.act = AT(arena.p, E * I * H * 2 - 16)), MOE_ERR_OVERLAP, act);
    REFUSED(d.fault = (uint64_t*)d.x, MOE_ERR_OVERLAP, fault);
    REFUSED((d.rows = 0, d.table = (void* const*)d.fault), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.w1.base, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.w1.up, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.w2.base, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.bias1, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.bias2, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.expert_offset, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.row_slot, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.act, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)AT(d.rows, ROWS * H * 2 - 8), MOE_ERR_OVERLAP, fault);
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(untouched(&b, &c) && tbuf_holds(&arena, 0), "a refused call wrote an output");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    CHECK_STATUS(moe_experts(&good, test_now.stream), MOE_OK);
    compare(&b, &c);
    tbuf_free(&arena);
    tbuf_free(&table);
    bufs_free(&b);
}

/* A variant that this file did not compile is refused before anything is queued, whichever of the
   two products needs it. */
static void test_experts_not_compiled(void)
{
    trand r = trand_new(11);
    for (int second = 0; second < 2; ++second) {
        experts_case c = normal_case(20, 64, 40, 3, 2);
        experts_bufs b;
        moe_gemm_plan up, down;
        c.dtype = c.rows_dtype = MOE_FP16;
        c.major1 = second ? MOE_MAJOR_K : MOE_MAJOR_MN;
        c.major2 = second ? MOE_MAJOR_MN : MOE_MAJOR_K;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_experts_plan(&b.d, &up, &down), expected(&c));
        CHECK_STATUS(moe_experts(&b.d, test_now.stream), expected(&c));
        CHECK(moe_status_kind(expected(&c)) == MOE_ERR_NOT_COMPILED, "product %d", second);
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK(untouched(&b, &c), "refused because of product %d, but something was queued", second);
        bufs_free(&b);
    }
}

static moe_status call_experts(void* d, cudaStream_t stream)
{
    return moe_experts((const moe_experts_desc*)d, stream);
}

static void test_experts_same_bits(void)
{
    trand r = trand_new(12);
    for (int i = 0; i < 2; ++i) {
        experts_case c = normal_case(45, 72, 136, 5, 2);
        experts_bufs b;
        tbuf* out[2];
        c.tile = i ? MOE_TILE_32x128 : MOE_TILE_AUTO;
        c.rows_dtype = i ? MOE_FP32 : c.dtype;
        bufs_new(&b, &c, &r);
        out[0] = &b.act;
        out[1] = &b.rows;
        test_same_bits("experts", call_experts, &b.d, out, 2, MOE_ON_HOST ? 3 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* A captured MLP, launched again with other routing. */
static void test_experts_graph(void)
{
    trand r = trand_new(13);
    experts_case c = normal_case(33, 72, 56, 6, 3);
    experts_bufs b;
    tgraph g;
    bufs_new(&b, &c, &r);
    if (tgraph_capture(&g, call_experts, &b.d)) {
        CHECK(untouched(&b, &c), "capture itself runs nothing");
        for (int run = 0; run < 3; ++run) {
            c.dropped = 30 * run;
            c.one = run == 2;
            fill_rows(&b, &c, &r);
            tbuf_put(&b.offset, b.h_offset);
            tbuf_put(&b.row_slot, b.h_row_slot);
            tbuf_poison(&b.act);
            tbuf_poison(&b.rows);
            tgraph_launch(&g);
            compare(&b, &c);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
}

static void test_experts_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(14);
    for (int i = 0; i < 3; ++i) {
        experts_case c = normal_case(i == 2 ? 64 : 4096, 1024, 512, 64, 8);
        c.dtype = c.rows_dtype = i == 1 ? MOE_FP16 : MOE_BF16;
        c.gate_up = i + 1;
        c.bias1 = c.bias2 = i == 1;
        c.out_table = i == 0;
        c.tile = MOE_TILE_AUTO;
        c.sampled = i == 2 ? 5 : 211;
        run_case(&c, &r);
    }
#endif
}

/* Rows of x, of act or of the output, joined or in an expert's own allocation, that lie past 2^32
   elements: the bits of the same call on dense ones. */
static void test_experts_past_2_31(void)
{
    enum { X, ACT, ROWS, TABLE };
    static const char* const name[] = {"x", "act", "rows", "an expert's rows"};
    trand r = trand_new(15);
    for (int which = X; which <= TABLE; ++which) {
        experts_case c = normal_case(5, 72, 56, 3, 2);
        experts_bufs b;
        moe_experts_desc d;
        twide wide;
        tbuf* out = &b.rows;
        void *act, *rows;
        if (!twide_new(&wide, name[which], which == X ? c.T : c.T * c.K, which == ACT ? c.I : c.H,
                       c.dtype))
            continue;
        c.out_table = c.one = which == TABLE;
        bufs_new(&b, &c, &r);
        for (int e = 0; e < c.E && c.one; ++e) /* the expert that has all rows */
            if (b.h_offset[e + 1] > b.h_offset[e]) out = &b.part[e];
        CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c);
        act = tbuf_copy(&b.act);
        rows = tbuf_copy(out);
        tbuf_poison(&b.act);
        tbuf_poison(out);
        d = b.d;
        if (which == X) {
            d.x = wide.p;
            d.x_stride = wide.stride;
            twide_put(&wide, b.h_x);
        } else if (which == ACT) {
            d.act = wide.p;
            d.act_stride = wide.stride;
        } else {
            void* address[MOST_EXPERTS];
            for (int e = 0; e < c.E; ++e) address[e] = wide.p;
            if (which == ROWS) d.rows = wide.p;
            else tbuf_put(&b.table, address);
            d.row_stride = wide.stride;
        }
        CHECK_STATUS(moe_experts(&d, test_now.stream), MOE_OK);
        if (which == ACT) twide_holds(&wide, act);
        else CHECK(tbuf_holds(&b.act, act), "other bits in act, wide %s", name[which]);
        if (which >= ROWS) twide_holds(&wide, rows);
        else CHECK(tbuf_holds(out, rows), "other bits in rows, wide %s", name[which]);
        if (which == X) CHECK(twide_holds(&wide, b.h_x), "x was written");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        free(act);
        free(rows);
        twide_free(&wide);
        bufs_free(&b);
    }
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_experts_layouts);
    RUN(test_experts_activations);
    RUN(test_experts_limits);
    RUN(test_experts_no_offset);
    RUN(test_experts_shapes);
    RUN(test_experts_tiles);
    RUN(test_experts_in_order);
    RUN(test_experts_bad_rows);
    RUN(test_experts_bad_offsets);
    RUN(test_experts_no_rows);
    RUN(test_experts_halves);
    RUN(test_experts_plan);
    RUN(test_experts_refusals);
    RUN(test_experts_not_compiled);
    RUN(test_experts_same_bits);
    RUN(test_experts_graph);
    RUN(test_experts_large);
    RUN(test_experts_past_2_31);
    return test_end();
}
