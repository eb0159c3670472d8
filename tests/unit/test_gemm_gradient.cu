/* test_gemm_gradient.cu: the grouped GEMM's backward pass through an activation, against its
   reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_gemm_gradient.cu -o test_gemm_gradient
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_gemm_gradient.cu -o test_gemm_gradient

     test_gradient_activations  every activation on both paths and all tiles, both dtypes and majors
                                of B, with and without act, dot and row_weight
     test_gradient_rows         experts of 0, 1, 63 .. 65, 127 .. 129, 191 .. 193 rows, mixed
     test_gradient_tails        n and k that no tile divides
     test_gradient_gather       rows of A by an index: with a divisor, without a row, out of range
     test_gradient_infinite     an infinite P makes dot of its row infinite, not NaN, and no other
     test_gradient_extremes     P of 1e30 beside 1e-30, all tiny, an infinity or a NaN among others:
                                C is exact
     test_gradient_gates        gates that are infinite, NaN, large or 0: the limits of SiLU
     test_gradient_in_place     C over pre: the bits of C elsewhere
     test_gradient_bits         the same bits every run; the same parts of dot from all WMMA tiles
     test_gradient_tiles        the same bits for any grid, with rows in other tiles; tiles of 1 .. 20
                                steps
     test_gradient_batch        with batch_invariant the same bits for a row alone
     test_gradient_fresh        1,000 calls on fresh inputs twice: the same hashes
     test_gradient_groups       a list of groups has the bits of the offsets
     test_gradient_faults       stores nothing after a stop fault, or where offsets are bad
     test_gradient_own_kernel   tiles of moe_gemm_tile_gradient
     test_gradient_plan         the tile does not depend on the activation; limits of the wgmma path
     test_gradient_refusals     what the calls refuse

   Bounds: P is off by the error of its sum. The activation is off as in activations.h; a derivative
   by 1e-6 of its largest value, as activation.cuh says. */
#include "moe/gemm/grouped_gradient.cuh"
#include "moe/ref/gemm_gradient.h"
#include "tests/test_refusals.h"
#include "tests/unit/gemm/case.h"
#include "tests/unit/gemm/fresh.h"

typedef struct gradient_case {
    gemm_case g;          /* the product; its activation is none */
    int activation;       /* moe_activation */
    int act, dot, weight; /* 1: given */
    int act_pad, pre_pad; /* stride - dense; multiples of 8 */
    float alpha, limit;
} gradient_case;

typedef struct gradient_bufs {
    gemm_bufs b; /* of the product; b.c is not used */
    tbuf pre, weight, c, act, dot;
    void* h_pre;
    float* h_weight;
    int64_t weights; /* elements of weight */
    int columns, parts;
} gradient_bufs;

static const char* gradient_text(const gradient_case* c)
{
    static char text[500];
    snprintf(text, sizeof text,
             "activation=%d act=%d dot=%d weight=%d pads %d %d none=%d bad=%d %s", c->activation,
             c->act, c->dot, c->weight, c->act_pad, c->pre_pad, c->g.none, c->g.bad,
             case_text(&c->g));
    return text;
}

/* Returns a case with everything given. */
static gradient_case gradient_normal(int E, const int* rows, int n, int k, int activation)
{
    gradient_case c = {};
    c.g = normal_case(E, rows, n, k);
    c.activation = activation;
    c.act = c.dot = c.weight = 1;
    return c;
}

/* Draws dtype, major of B, tables, pads and what is given. */
static void gradient_randomise(gradient_case* c, trand* r)
{
    c->g.dtype = c->g.c_dtype = trand_int(r, 0, 1) ? MOE_FP16 : test_half();
    c->g.b_major = (int)trand_int(r, MOE_MAJOR_K, MOE_MAJOR_MN);
    c->g.b_table = (int)trand_int(r, 0, 1);
    c->g.a_pad = 8 * (int)trand_int(r, 0, 2);
    c->g.b_pad = 8 * (int)trand_int(r, 0, 2);
    c->g.c_pad = 8 * (int)trand_int(r, 0, 2);
    c->act_pad = 8 * (int)trand_int(r, 0, 2);
    c->pre_pad = 8 * (int)trand_int(r, 0, 2);
    c->g.lead = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 9);
    c->g.slack = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 70);
    c->g.no_ticket = (int)trand_int(r, 0, 1);
    c->activation = (int)trand_int(r, MOE_ACTIVATION_NONE + 1, MOE_ACTIVATION_RELU2);
    if (trand_int(r, 0, 2) == 0) c->activation = MOE_ACTIVATION_SWIGLU;
    c->act = (int)trand_int(r, 0, 3) > 0;
    c->dot = (int)trand_int(r, 0, 3) > 0;
    c->weight = (int)trand_int(r, 0, 3) > 0;
    if (c->activation == MOE_ACTIVATION_SWIGLU_CLAMPED && trand_int(r, 0, 1))
        c->alpha = 0.8f, c->limit = 0.75f; /* less than some gates and ups */
}

/* Has row m of C a row of A? Its weight is at *index. */
static int gradient_reads(const gradient_bufs* b, const gradient_case* c, int m, int64_t* index)
{
    *index = c->g.gather ? b->b.h_index[m] : m;
    return a_row_of(&b->b, &c->g, m) >= 0;
}

/* Draws pre and row_weight. Elements that must not be read are NaN. */
static void gradient_bufs_new(gradient_bufs* b, const gradient_case* c, trand* r)
{
    const int gated = moe_activation_is_gated(c->activation), n = c->g.n;
    const int64_t stride = (gated ? 2 * n : n) + c->pre_pad;
    int64_t pre_bytes, rows;
    memset(b, 0, sizeof *b);
    bufs_new(&b->b, &c->g, r);
    rows = b->b.num_rows;
    b->columns = gated ? 2 * n : n, b->parts = (n + 63) / 64;
    b->weights = c->g.gather ? b->b.a_rows * c->g.gather : rows;
    b->h_pre = test_host(rows * stride * 2);
    b->h_weight = (float*)test_host(b->weights * 4);
    for (int64_t i = 0; i < b->weights; ++i) b->h_weight[i] = NAN;
    for (int64_t i = 0; i < rows * stride; ++i) moe_store(b->h_pre, i, c->g.dtype, NAN);
    for (int m = b->b.h_offset[0]; m < b->b.h_offset[c->g.E]; ++m) {
        int64_t index;
        if (!gradient_reads(b, c, m, &index)) continue;
        b->h_weight[index] = trand_normal(r);
        for (int j = 0; j < b->columns; ++j)
            moe_store(b->h_pre, m * stride + j, c->g.dtype, 1.5f * trand_normal(r));
    }
    pre_bytes = moe_extent(rows, stride, b->columns, c->g.dtype);
    b->pre = tbuf_from("pre", b->h_pre, (size_t)pre_bytes, 16);
    b->weight = tbuf_from("row_weight", b->h_weight, (size_t)b->weights * 4, 4);
    b->c = tbuf_new("c", (size_t)moe_extent(rows, b->columns + c->g.c_pad, b->columns, c->g.dtype),
                    16);
    b->act = tbuf_new("act", (size_t)moe_extent(rows, n + c->act_pad, n, c->g.dtype), 16);
    b->dot = tbuf_new("dot", (size_t)(rows * b->parts) * 4, 4);
    b->b.d.gradient = 1;
    b->b.d.activation = c->activation, b->b.d.alpha = c->alpha, b->b.d.limit = c->limit;
    b->b.d.pre = b->pre.p, b->b.d.pre_stride = c->pre_pad ? stride : 0;
    b->b.d.c = b->c.p, b->b.d.c_stride = c->g.c_pad ? b->columns + c->g.c_pad : 0;
    if (c->weight) b->b.d.row_weight = (const float*)b->weight.p;
    if (c->act) b->b.d.act = b->act.p, b->b.d.act_stride = c->act_pad ? n + c->act_pad : 0;
    if (c->dot) b->b.d.dot = (float*)b->dot.p;
}

static tbufs gradient_outputs(gradient_bufs* b) { return TBUFS(&b->c, &b->act, &b->dot); }

static void gradient_bufs_free(gradient_bufs* b)
{
    tbufs_free(TBUFS(&b->pre, &b->weight, &b->c, &b->act, &b->dot));
    TFREE(b->h_pre, b->h_weight);
    bufs_free(&b->b);
}

/* What the picked rows must hold, and how far each element may be from that before C and act are
   rounded: [rows, columns of c, n, parts]. */
typedef struct gradient_exact {
    int64_t rows;
    double *c, *act, *dot, *c_bound, *act_bound, *dot_bound;
} gradient_exact;

/* The factor of the derivative by v beside the curve's, and the curve itself, of an element. */
static double gradient_gain(const gradient_case* c, double u)
{
    const double most = c->limit != 0 ? c->limit : 7;
    if (!moe_activation_is_gated(c->activation)) return 1;
    if (c->activation != MOE_ACTIVATION_SWIGLU_CLAMPED) return fabs(u);
    return fabs((u > most ? most : u < -most ? -most : u) + 1);
}

/* Fills in the bounds of element j of picked row i. p, p_error: P and its error; w: the weight. */
static void gradient_bound(const gradient_exact* x, const gradient_case* c, int64_t i, int j,
                           double v, double u, double p, double p_error, double w)
{
    const int gated = moe_activation_is_gated(c->activation), n = c->g.n, parts = (n + 63) / 64;
    const int64_t columns = gated ? 2 * n : n;
    const double one = c->activation == MOE_ACTIVATION_SWIGLU_CLAMPED ? 0 : 1; /* gain 1 */
    const double a = moe_ref_activation_f64(c->activation, v, u, c->alpha, c->limit);
    const double ea = tactivation_error(c->activation, c->alpha, c->limit, v, u, 0, 0);
    double slope, by_up, largest;
    moe_ref_activation_grad_f64(c->activation, v, u, c->alpha, c->limit, &slope, &by_up);
    largest = c->activation == MOE_ACTIVATION_RELU2 ? fabs(slope) : 1.2;
    for (int up = 0; up <= gated; ++up) {
        const double f = up ? by_up : slope;
        const double ef = ldexp(fabs(f), -22) +
                          (up ? tactivation_error(c->activation, c->alpha, c->limit, v, one, 0, 0)
                              : 1e-6 * largest * gradient_gain(c, u));
        x->c_bound[i * columns + up * n + j] =
            fabs(w) * (p_error * (fabs(f) + ef) + fabs(p) * ef) + ldexp(fabs(w * p * f), -22);
    }
    x->act_bound[i * n + j] = fabs(w) * ea + ldexp(fabs(w * a), -23);
    x->dot_bound[i * parts + j / 64] +=
        p_error * (fabs(a) + ea) + fabs(p) * ea + tsum_error(fabs(p * a), 64);
}

static void gradient_exact_new(gradient_exact* x, const gradient_bufs* b, const gradient_case* c,
                               const int32_t* pick, const int32_t* first)
{
    const int n = c->g.n, parts = b->parts, columns = b->columns, gated = columns > n;
    const int64_t rows = first[c->g.E], stride = columns + c->pre_pad;
    double *p = (double*)test_host(rows * n * 8), *p_abs = (double*)test_host(rows * n * 8);
    int32_t* index = (int32_t*)test_host(rows * 4);
    uint16_t* pre = (uint16_t*)test_host(rows * columns * 2);
    moe_ref_gemm_gradient_desc d = {};
    x->rows = rows;
    x->c = (double*)test_host(rows * columns * 8),
    x->c_bound = (double*)test_host(rows * columns * 8);
    x->act = (double*)test_host(rows * n * 8), x->act_bound = (double*)test_host(rows * n * 8);
    x->dot = (double*)test_host(rows * parts * 8);
    x->dot_bound = (double*)test_host(rows * parts * 8);
    for (int64_t i = 0; i < rows * parts; ++i) x->dot_bound[i] = 0;
    for (int64_t i = 0; i < rows; ++i) {
        index[i] = c->g.gather ? b->b.h_index[pick[i]] : pick[i];
        memcpy(pre + i * columns, (const uint16_t*)b->h_pre + pick[i] * stride,
               (size_t)columns * 2);
    }
    d.product.a = b->b.h_a, d.product.a_dtype = c->g.dtype, d.product.a_rows = b->b.a_rows;
    d.product.row_index = index, d.product.row_div = c->g.gather;
    d.product.expert_offset = first;
    d.product.b = tweights_host(&b->b.b), d.product.b_dtype = c->g.dtype;
    d.product.num_experts = c->g.E, d.product.n = n, d.product.k = c->g.k;
    d.pre = pre, d.pre_dtype = c->g.dtype;
    d.row_weight = c->weight ? b->h_weight : (const float*)0;
    d.activation = c->activation, d.alpha = c->alpha, d.limit = c->limit;
    moe_ref_gemm_gradient_f64(&d, p, p_abs, x->c, x->act, x->dot);
    for (int64_t i = 0; i < rows; ++i) {
        int64_t at;
        const int reads = gradient_reads(b, c, pick[i], &at);
        const double w = !reads ? 0 : c->weight ? b->h_weight[at] : 1;
        double largest = 0;
        for (int j = 0; j < n; ++j) largest = fmax(largest, fabs(p[i * n + j]));
        for (int j = 0; j < n; ++j) {
            double error = tsum_error(p_abs[i * n + j], c->g.k);
            if (c->g.path == MOE_GEMM_PATH_WGMMA) /* P is handed over as scaled fp16 */
                error += ldexp(fabs(p[i * n + j]) + error, -11) + ldexp(largest, -39);
            const double v = reads ? moe_load(pre, i * columns + j, c->g.dtype) : 0;
            const double u = reads && gated ? moe_load(pre, i * columns + n + j, c->g.dtype) : 0;
            gradient_bound(x, c, i, j, v, u, p[i * n + j], error, w);
        }
    }
    TFREE(p, p_abs, index, pre);
}

static void gradient_exact_free(gradient_exact* x)
{
    TFREE(x->c, x->act, x->dot, x->c_bound, x->act_bound, x->dot_bound);
}

/* Compares the picked rows of an output with `exact` [rows, cols]; requires that the rest of the
   buffer is untouched. given 0: all of it. */
static void gradient_compare(const tbuf* out, const gradient_bufs* b, const gradient_case* c,
                             const int32_t* pick, int64_t rows, int dtype, int64_t cols,
                             int64_t pad, int given, const double* exact, double* bound)
{
    const int32_t* offset = b->b.h_offset;
    char* all = (char*)tbuf_copy(out);
    float* got = (float*)test_host(rows * cols * 4);
    double* ideal = (double*)test_host(rows * cols * 8);
    CHECK(test_strays(all, (int64_t)out->bytes, moe_dtype_bytes(dtype), cols + pad, cols,
                      given ? offset[0] : 0, given ? offset[c->g.E] : 0) == 0,
          "%s was written outside the rows", out->name);
    for (int64_t i = 0; i < rows * cols; ++i)
        got[i] = moe_load(all, pick[i / cols] * (cols + pad) + i % cols, dtype);
    test_round_all(ideal, exact, rows * cols, dtype);
    if (given && rows > 0 && dtype == MOE_FP32) {
        test_within(out->name, got, MOE_FP32, cols, exact, bound, 1, rows, cols, __FILE__,
                    __LINE__);
    } else if (given && rows > 0) {
        trows_round_bound(bound, exact, rows * cols, dtype);
        if (c->g.path == MOE_GEMM_PATH_WGMMA && dtype == MOE_FP16) /* P is rounded as far as C */
            test_within(out->name, got, MOE_FP32, cols, exact, bound, 1, rows, cols, __FILE__,
                        __LINE__);
        else CHECK_CLOSE_BOTH(out->name, got, exact, ideal, bound, rows, cols);
    }
    for (int64_t i = 0; i < rows * cols && given; ++i) {
        int64_t at;
        if (!CHECK(gradient_reads(b, c, pick[i / cols], &at) || got[i] == 0,
                   "%s: a row without a row of A is not 0", out->name))
            break;
    }
    free(all);
    TFREE(got, ideal);
}

static void gradient_check(const gradient_bufs* b, const gradient_case* c)
{
    const int before = test_now.failures;
    int32_t *pick = (int32_t*)test_host(b->b.num_rows * 4), first[MOST_EXPERTS + 1];
    int64_t bad = -1;
    gradient_exact x;
    trows_pick(c->g.E, b->b.h_offset, c->g.sampled ? c->g.sampled : 1, pick, first);
    gradient_exact_new(&x, b, c, pick, first);
    gradient_compare(&b->c, b, c, pick, x.rows, c->g.dtype, b->columns, c->g.c_pad, 1, x.c,
                     x.c_bound);
    gradient_compare(&b->act, b, c, pick, x.rows, c->g.dtype, c->g.n, c->act ? c->act_pad : 0,
                     c->act, x.act, x.act_bound);
    gradient_compare(&b->dot, b, c, pick, x.rows, MOE_FP32, b->parts, 0, c->dot, x.dot,
                     x.dot_bound);
    for (int m = b->b.h_offset[c->g.E] - 1; m >= b->b.h_offset[0]; --m)
        if (a_row_of(&b->b, &c->g, m) == -2) bad = m;
    CHECK_FAULT_AT(&b->b.fault, MOE_FAULT_BAD_ROW, bad);
    CHECK(tbuf_holds(&b->pre, b->h_pre) && tbuf_holds(&b->weight, b->h_weight) &&
              tweights_same(&b->b.b) && tgrouped_untouched(&b->b.c),
          "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", gradient_text(c));
    gradient_exact_free(&x);
    free(pick);
}

TEST_CALL(call_gradient, moe_grouped_gemm_gradient, moe_grouped_gemm_desc)

/* Draws, runs and compares a case on its tile and path. */
static void gradient_run(const gradient_case* c, trand* r)
{
    gradient_bufs b;
    moe_status want;
    gradient_bufs_new(&b, c, r);
    want = test_gemm_status(c->g.dtype, b.b.d.tile);
    CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), want);
    if (want == MOE_OK) gradient_check(&b, c), compare_flags(&b.b, &c->g);
    gradient_bufs_free(&b);
}

/* Returns whether the wgmma path runs here. */
static int gradient_here(void)
{
    moe_grouped_gemm_desc d = {};
    moe_gemm_plan p;
    d.num_experts = 1, d.n = d.k = 8, d.dtype = test_half();
    d.gradient = 1, d.activation = MOE_ACTIVATION_SWIGLU;
    d.path = MOE_GEMM_PATH_WGMMA, d.tile = MOE_TILE_128x256;
    if (moe_grouped_gemm_gradient_plan(&d, &p) == MOE_OK) return 1;
    CHECK(!MOE_ON_HOST, "the CPU runs the wgmma path");
    test_leave_out("no wgmma on this device, or no code of sm_90a");
    return 0;
}

/* Sets tile and path: 0: wgmma; 1 .. 4: each tile on WMMA. Returns 0 where the path is not here. */
static int gradient_on(gradient_case* c, int which)
{
    c->g.tile = which ? MOE_TILE_128x256 + which - 1 : MOE_TILE_128x256;
    c->g.path = which ? MOE_GEMM_PATH_WMMA : MOE_GEMM_PATH_WGMMA;
    return which || gradient_here();
}

static void test_gradient_activations(void)
{
    static const int rows[] = {33, 0, 5};
    trand r = trand_new(61);
    for (int kind = MOE_ACTIVATION_NONE; kind <= MOE_ACTIVATION_RELU2; ++kind)
        for (int which = 0; which <= 4; ++which)
            for (int i = 0; i < (MOE_ON_HOST ? 2 : 8); ++i) {
                gradient_case c = gradient_normal(3, rows, i & 1 ? 136 : 72, 40, kind);
                const int options = kind + 3 * which + 5 * i;
                if (!gradient_on(&c, which)) continue;
                c.g.dtype = c.g.c_dtype = (i + kind) & 1 ? MOE_FP16 : test_half();
                c.g.b_major = (i + which) & 1 ? MOE_MAJOR_MN : MOE_MAJOR_K;
                c.act = options % 4 != 1, c.dot = options % 4 != 2, c.weight = options % 4 != 3;
                if (kind == MOE_ACTIVATION_SWIGLU_CLAMPED && i & 1) c.alpha = 0.8f, c.limit = 0.75f;
                gradient_run(&c, &r);
            }
}

static void test_gradient_rows(void)
{
    static const int sizes[] = {0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193};
    trand r = trand_new(62);
    for (int which = 0; which <= 4; ++which)
        for (int i = 0; i < (MOE_ON_HOST ? (which ? 2 : 6) : 40); ++i) {
            int rows[6];
            gradient_case c;
            for (int e = 0; e < 6; ++e) rows[e] = sizes[trand_int(&r, 0, 10)];
            c = gradient_normal(6, rows, 8 * (int)trand_int(&r, 1, 34),
                                8 * (int)trand_int(&r, 1, 9), MOE_ACTIVATION_SWIGLU);
            gradient_randomise(&c, &r);
            c.g.sampled = MOE_ON_HOST ? 7 : 3;
            c.g.flags = (int)trand_int(&r, 0, 1);
            if (gradient_on(&c, which)) gradient_run(&c, &r);
        }
}

static void test_gradient_tails(void)
{
    static const int ns[] = {8, 72, 264}, ks[] = {8, 200}, rows[] = {3, 0, 41};
    trand r = trand_new(63);
    for (int which = 0; which <= 4; ++which)
        for (int i = 0; i < 6; ++i) {
            gradient_case c = gradient_normal(3, rows, ns[i % 3], ks[i / 3], MOE_ACTIVATION_SWIGLU);
            gradient_randomise(&c, &r);
            if (gradient_on(&c, which)) gradient_run(&c, &r);
        }
}

static void test_gradient_gather(void)
{
    static const int rows[] = {17, 0, 70, 1, 40};
    trand r = trand_new(64);
    for (int which = 0; which <= 4; ++which)
        for (int i = 0; i < (MOE_ON_HOST ? 3 : 24); ++i) {
            gradient_case c = gradient_normal(5, rows, 72, 40, MOE_ACTIVATION_SWIGLU);
            gradient_randomise(&c, &r);
            c.weight |= i == 0;
            c.g.gather = i % 3 == 0 ? 1 : (int)trand_int(&r, 2, 9);
            c.g.a_rows = (int)trand_int(&r, 1, 90);
            c.g.none = 20;
            c.g.bad = i % 3 == 2 ? 10 : 0;
            if (gradient_on(&c, which)) gradient_run(&c, &r);
        }
}

/* P of row 5 is infinite in all columns. Past n, where the row meets zeros of B, P is NaN. */
static void test_gradient_infinite(void)
{
    static const int rows[] = {70};
    trand r = trand_new(65);
    for (int which = 0; which <= 4; ++which) {
        gradient_case c = gradient_normal(1, rows, 136, 40, MOE_ACTIVATION_RELU2);
        gradient_bufs b;
        float* dot;
        void* got;
        int wrong = 0;
        if (!gradient_on(&c, which) || test_gemm_status(c.g.dtype, c.g.tile) != MOE_OK) continue;
        c.weight = 1;
        gradient_bufs_new(&b, &c, &r);
        b.h_weight[5] = ldexpf(1, -40); /* infinite all the same */
        tbuf_put(&b.weight, b.h_weight);
        for (int k = 0; k < c.g.k; ++k)
            moe_store(b.b.h_a, 5 * c.g.k + k, c.g.dtype, k ? 0 : INFINITY);
        for (int j = 0; j < c.g.n; ++j) {
            moe_store(b.b.b.host[0][0], j * c.g.k, c.g.dtype, 1);
            moe_store(b.h_pre, 5 * c.g.n + j, c.g.dtype, 1);
        }
        tbuf_put(&b.b.a, b.b.h_a);
        tbuf_put(&b.b.b.part[0][0], b.b.b.host[0][0]);
        tbuf_put(&b.pre, b.h_pre);
        CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
        dot = (float*)tbuf_copy(&b.dot);
        for (int i = 0; i < rows[0] * b.parts; ++i)
            wrong += i / b.parts == 5 ? dot[i] != INFINITY : !isfinite(dot[i]);
        got = tbuf_copy(&b.c);
        for (int j = 0; j < c.g.n; ++j)
            wrong += moe_load(got, 5 * (int64_t)b.columns + j, c.g.dtype) != INFINITY;
        CHECK(wrong == 0, "%d parts or elements: %s", wrong, gradient_text(&c));
        TFREE(dot, got);
        gradient_bufs_free(&b);
    }
}

/* What P of an expert is, in column j, in a row where A is 1: on wgmma numbers of a row are exact
   within a factor of 2^28. */
static float extreme_of(int expert, int j, int dtype)
{
    const float least = dtype == MOE_FP16 ? ldexpf(1, -14) : ldexpf(1, -125);
    const float most = dtype == MOE_FP16 ? 16384.0f : expert < 3 ? ldexpf(1, 99) : ldexpf(1, -90);
    if (expert == 2 && j == 77) return -INFINITY;
    if (expert == 3 && j == 130) return NAN;
    if (expert == 1) return least;
    return j % 3 == 0 ? most : ldexpf(j % 3 == 1 ? -most : (1.0f + j % 100) * most, -28);
}

/* P is one product, pre is 1: C = 2 P, exact; a part of dot is the sum of P. */
static void test_gradient_extremes(void)
{
    static const int rows[] = {70, 5, 130, 64};
    trand r = trand_new(73);
    for (int which = 0; which <= 4; ++which) {
        gradient_case c = gradient_normal(4, rows, 264, 72, MOE_ACTIVATION_RELU2);
        gradient_bufs b;
        float *got, *dot;
        int wrong = 0, wrong_dot = 0;
        if (!gradient_on(&c, which) || test_gemm_status(c.g.dtype, c.g.tile) != MOE_OK) continue;
        c.weight = 0, c.g.b_table = 1;
        gradient_bufs_new(&b, &c, &r);
        for (int m = 0; m < b.b.num_rows; ++m) {
            for (int k = 0; k < c.g.k; ++k)
                moe_store(b.b.h_a, m * c.g.k + k, c.g.dtype, k == 0 ? (m % 2 ? 1 : -1) : 0);
            for (int j = 0; j < c.g.n; ++j) moe_store(b.h_pre, m * c.g.n + j, c.g.dtype, 1);
        }
        for (int e = 0; e < 4; ++e) {
            for (int j = 0; j < c.g.n; ++j)
                for (int k = 0; k < c.g.k; ++k)
                    moe_store(b.b.b.host[0][e], j * c.g.k + k, c.g.dtype,
                              k == 0 ? extreme_of(e, j, c.g.dtype) : 0);
            tbuf_put(&b.b.b.part[0][e], b.b.b.host[0][e]);
        }
        tbuf_put(&b.b.a, b.b.h_a);
        tbuf_put(&b.pre, b.h_pre);
        CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
        got = (float*)tbuf_copy(&b.c), dot = (float*)tbuf_copy(&b.dot);
        for (int e = 0; e < 4; ++e)
            for (int m = b.b.h_offset[e]; m < b.b.h_offset[e + 1]; ++m)
                for (int part = 0; part < b.parts; ++part) {
                    double sum = 0, all = 0;
                    const float is = dot[m * b.parts + part];
                    for (int j = part * 64; j < c.g.n && j < part * 64 + 64; ++j) {
                        const float p = extreme_of(e, j, c.g.dtype) * (m % 2 ? 1 : -1);
                        const float is_c = moe_load(got, m * (int64_t)c.g.n + j, c.g.dtype);
                        wrong += isnan(p) ? !isnan(is_c) : is_c != 2 * p;
                        sum += p, all += fabs(p);
                    }
                    wrong_dot += isnan(sum)   ? !isnan(is)
                                 : isinf(sum) ? is != sum
                                              : !(fabs(is - sum) <= tsum_error(all, 64));
                }
        CHECK(wrong == 0, "%d elements of C: %s", wrong, gradient_text(&c));
        CHECK(wrong_dot == 0, "%d parts of dot: %s", wrong_dot, gradient_text(&c));
        TFREE(got, dot);
        gradient_bufs_free(&b);
    }
}

/* P and ups are 1. */
static void test_gradient_gates(void)
{
    static const int rows[] = {70, 5};
    static const float gate[6] = {INFINITY, -INFINITY, NAN, 65504.0f, -65504.0f, 0.0f};
    static const float slope[6] = {1, 0, NAN, 1, 0, 0.5f},
                       act[6] = {INFINITY, 0, NAN, 65504.0f, 0, 0};
    trand r = trand_new(77);
    for (int which = 0; which <= 4; ++which) {
        gradient_case c = gradient_normal(2, rows, 264, 72, MOE_ACTIVATION_SWIGLU);
        gradient_bufs b;
        float *got, *got_act;
        int wrong = 0;
        if (!gradient_on(&c, which) || test_gemm_status(c.g.dtype, c.g.tile) != MOE_OK) continue;
        c.weight = 0, c.g.b_table = 1;
        gradient_bufs_new(&b, &c, &r);
        for (int m = 0; m < b.b.num_rows; ++m) {
            for (int k = 0; k < c.g.k; ++k) moe_store(b.b.h_a, m * c.g.k + k, c.g.dtype, k == 0);
            for (int j = 0; j < c.g.n; ++j) {
                moe_store(b.h_pre, m * 2 * c.g.n + j, c.g.dtype, gate[(m + j) % 6]);
                moe_store(b.h_pre, m * 2 * c.g.n + c.g.n + j, c.g.dtype, 1);
            }
        }
        for (int e = 0; e < 2; ++e) {
            for (int i = 0; i < c.g.n * c.g.k; ++i)
                moe_store(b.b.b.host[0][e], i, c.g.dtype, i % c.g.k == 0);
            tbuf_put(&b.b.b.part[0][e], b.b.b.host[0][e]);
        }
        tbuf_put(&b.b.a, b.b.h_a);
        tbuf_put(&b.pre, b.h_pre);
        CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
        got = (float*)tbuf_copy(&b.c), got_act = (float*)tbuf_copy(&b.act);
        for (int m = 0; m < b.b.num_rows; ++m)
            for (int j = 0; j < c.g.n; ++j)
                for (int part = 0; part < 3; ++part) { /* C's two, and act */
                    uint16_t one;
                    const float* want = part ? act : slope;
                    const float is =
                        part < 2 ? moe_load(got, (m * 2 + part) * (int64_t)c.g.n + j, c.g.dtype)
                                 : moe_load(got_act, m * (int64_t)c.g.n + j, c.g.dtype);
                    moe_store(&one, 0, c.g.dtype, want[(m + j) % 6]);
                    wrong +=
                        isnan(want[(m + j) % 6]) ? !isnan(is) : is != moe_load(&one, 0, c.g.dtype);
                }
        CHECK(wrong == 0, "%d elements of C and act: %s", wrong, gradient_text(&c));
        TFREE(got, got_act);
        gradient_bufs_free(&b);
    }
}

static void test_gradient_in_place(void)
{
    static const int rows[] = {40, 0, 170, 64};
    trand r = trand_new(74);
    for (int which = 0; which <= 4; ++which)
        for (int i = 0; i < (MOE_ON_HOST && which ? 2 : 4); ++i) {
            gradient_case c = gradient_normal(4, rows, i % 2 ? 264 : 136, which ? 72 : 200,
                                              i % 2 ? MOE_ACTIVATION_GELU : MOE_ACTIVATION_SWIGLU);
            gradient_bufs b;
            void* want[3];
            uint16_t* all;
            int64_t stride;
            c.g.gather = i / 2 * 2, c.g.none = 20;
            c.g.lead = 3, c.g.slack = 5;
            c.g.c_pad = c.pre_pad = 8 * (i % 3);
            if (!gradient_on(&c, which) || test_gemm_status(c.g.dtype, c.g.tile) != MOE_OK)
                continue;
            gradient_bufs_new(&b, &c, &r);
            stride = b.columns + c.g.c_pad;
            CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
            gradient_check(&b, &c);
            for (int j = 0; j < 3; ++j) want[j] = tbuf_copy(gradient_outputs(&b).at[j]);
            all = (uint16_t*)want[0]; /* rows and columns that are not C stay those of pre */
            for (int64_t j = 0; j < (int64_t)(b.c.bytes / 2); ++j)
                if (j / stride < b.b.h_offset[0] || j / stride >= b.b.h_offset[4] ||
                    j % stride >= b.columns)
                    all[j] = ((const uint16_t*)b.h_pre)[j];
            tbufs_poison(gradient_outputs(&b));
            tbuf_put(&b.c, b.h_pre);
            b.b.d.pre = b.b.d.c;
            CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
            for (int j = 0; j < 3; ++j) {
                const tbuf* out = gradient_outputs(&b).at[j];
                CHECK(tbuf_holds(out, want[j]), "%s has other bits in place: %s", out->name,
                      gradient_text(&c));
                free(want[j]);
            }
            gradient_bufs_free(&b);
        }
}

/* Grids of all sizes, then lists of groups that cut the rows elsewhere: on the wgmma path. */
static void test_gradient_tiles(void)
{
    static const int rows[] = {300, 70}, ks[] = {64, 72, 192, 320, 1280};
    trand r = trand_new(75);
    for (int i = 0; i < 5; ++i) {
        gradient_case c = gradient_normal(2, rows, 520, ks[i], MOE_ACTIVATION_SWIGLU);
        gradient_bufs b;
        void* want[3];
        c.g.gather = i % 2 * 2;
        c.g.sampled = MOE_ON_HOST ? 9 : 1;
        if (!gradient_on(&c, 0)) return;
        gradient_bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
        gradient_check(&b, &c);
        for (int j = 0; j < 3; ++j) want[j] = tbuf_copy(gradient_outputs(&b).at[j]);
        for (int other = 0; other < (MOE_ON_HOST && i == 4 ? 2 : 6); ++other) {
            moe_grouped_gemm_desc d = b.b.d;
            moe_gemm_group list[4];
            tbuf groups;
            const int cut = (int)trand_int(&r, 1, 299);
            const moe_gemm_group four[4] = {
                {1, 300, 370}, {0, cut, 300}, {0, cut / 2, cut}, {0, 0, cut / 2}};
            memcpy(list, four, sizeof list);
            groups = tbuf_from("group", list, sizeof list, 4);
            d.grid_limit = other % 2 ? 2 : (int)trand_int(&r, 3, 9);
            if (other / 2 == 1) d.workspace = 0, d.workspace_bytes = 0;
            if (other % 2)
                d.expert_offset = 0, d.group = (const moe_gemm_group*)groups.p, d.num_groups = 4;
            tbufs_poison(gradient_outputs(&b));
            CHECK_STATUS(moe_grouped_gemm_gradient(&d, test_now.stream), MOE_OK);
            for (int j = 0; j < 3; ++j) {
                const tbuf* out = gradient_outputs(&b).at[j];
                CHECK(tbuf_holds(out, want[j]), "%s has other bits: grid %d, cut %d: %s", out->name,
                      d.grid_limit, cut, gradient_text(&c));
            }
            tbuf_free(&groups);
        }
        for (int j = 0; j < 3; ++j) free(want[j]);
        gradient_bufs_free(&b);
    }
}

static void test_gradient_bits(void)
{
    static const int rows[] = {40, 0, 70};
    trand r = trand_new(66);
    void* first = 0;
    gradient_case c = gradient_normal(3, rows, 200, 136, MOE_ACTIVATION_SWIGLU);
    gradient_bufs b;
    gradient_bufs_new(&b, &c, &r);
    for (int which = 0; which <= 4; ++which) {
        if (!gradient_on(&c, which) || test_gemm_status(c.g.dtype, c.g.tile) != MOE_OK) continue;
        b.b.d.tile = c.g.tile, b.b.d.path = c.g.path;
        test_same_bits("gradient", call_gradient, &b.b.d, gradient_outputs(&b),
                       MOE_ON_HOST ? 2 : 100);
        gradient_check(&b, &c);
        if (which == 0) continue;
        if (first) CHECK(tbuf_holds(&b.dot, first), "tile %d: other parts of dot", c.g.tile);
        else first = tbuf_copy(&b.dot);
    }
    free(first);
    gradient_bufs_free(&b);
}

/* Row 3 of 140 alone, with the bits that it has among the others. */
static void test_gradient_batch(void)
{
    static const int rows[] = {140};
    enum { ROW = 3 };
    trand r = trand_new(67);
    gradient_case c = gradient_normal(1, rows, 264, 72, MOE_ACTIVATION_SWIGLU);
    gradient_bufs b;
    moe_grouped_gemm_desc d;
    char *want[3], *got[3];
    int32_t offset[2] = {0, 1};
    c.g.tile = 0;
    gradient_bufs_new(&b, &c, &r);
    d = b.b.d;
    d.batch_invariant = 1;
    if (test_gemm_status(c.g.dtype, MOE_TILE_128x128) == MOE_OK) {
        const tbufs out = gradient_outputs(&b);
        CHECK_STATUS(moe_grouped_gemm_gradient(&d, test_now.stream), MOE_OK);
        for (int i = 0; i < 3; ++i) want[i] = (char*)tbuf_copy(out.at[i]);
        d.num_rows = 1;
        d.a = (const char*)d.a + ROW * c.g.k * 2;
        d.pre = (char*)d.pre + ROW * b.columns * 2;
        d.row_weight += ROW;
        tbuf_put(&b.b.offset, offset);
        tbufs_poison(out);
        CHECK_STATUS(moe_grouped_gemm_gradient(&d, test_now.stream), MOE_OK);
        for (int i = 0; i < 3; ++i) {
            const size_t bytes = out.at[i]->bytes / (size_t)rows[0];
            got[i] = (char*)tbuf_copy(out.at[i]);
            CHECK(memcmp(got[i], want[i] + ROW * bytes, bytes) == 0, "%s has other bits",
                  out.at[i]->name);
            TFREE(want[i], got[i]);
        }
    }
    gradient_bufs_free(&b);
}

static void test_gradient_fresh(void)
{
    enum { CALLS = MOE_ON_HOST ? 4 : 1000 };
    static const int rows[] = {300, 5, 0, 129, 260};
    trand r = trand_new(70);
    for (int form = 0; form < 3; ++form) { /* in order, gathered, in order with C over pre */
        static unsigned long long hash[2][CALLS];
        const moe_launch_config l = moe_grid(MOE_ON_HOST ? 1 : 64, 256, 0, test_now.stream);
        gradient_case c = gradient_normal(5, rows, MOE_ON_HOST ? 264 : 1032, MOE_ON_HOST ? 72 : 712,
                                          MOE_ACTIVATION_SWIGLU);
        gradient_bufs b;
        tbuf bh;
        c.weight = 0;
        c.g.gather = form == 1 ? 2 : 0;
        if (!gradient_on(&c, 0)) return;
        bh = tbuf_new("hash", sizeof hash, 0);
        gradient_bufs_new(&b, &c, &r);
        if (form == 2) b.b.d.pre = b.c.p;
        TEST_CUDA(cudaMemset(bh.p, 0, sizeof hash));
        for (int pass = 0; pass < 2; ++pass)
            for (int i = 0; i < CALLS; ++i) {
                const tbuf* const in[] = {&b.b.a, &b.b.b.part[0][0], &b.pre};
                const tbufs out = gradient_outputs(&b);
                for (int j = 0; j < 3; ++j)
                    TEST_CUDA(
                        cudaMemsetAsync(out.at[j]->p, 0x22, out.at[j]->bytes, test_now.stream));
                for (int j = 0; j < 3; ++j)
                    fill_fresh(in[j]->p, (int64_t)(in[j]->bytes / 2), i + j * CALLS, c.g.dtype, l);
                if (form == 2)
                    TEST_CUDA(cudaMemcpyAsync(b.c.p, b.pre.p, b.pre.bytes, cudaMemcpyDeviceToDevice,
                                              test_now.stream));
                CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
                for (int j = 0; j < 3; ++j)
                    add_hash(out.at[j], (unsigned long long*)bh.p + pass * CALLS + i, l);
            }
        tbuf_get(&bh, hash);
        check_hashes(hash[0], hash[1], CALLS);
        tbuf_free(&bh);
        gradient_bufs_free(&b);
    }
}

/* A list of groups that names the experts' rows, the last expert first. */
static void test_gradient_groups(void)
{
    static const int rows[] = {40, 0, 70};
    trand r = trand_new(71);
    for (int which = 0; which <= 4; ++which) {
        gradient_case c = gradient_normal(3, rows, 136, 72, MOE_ACTIVATION_GEGLU);
        moe_gemm_group list[3];
        gradient_bufs b;
        void* want[3];
        tbuf groups;
        if (!gradient_on(&c, which) || test_gemm_status(c.g.dtype, c.g.tile) != MOE_OK) continue;
        gradient_bufs_new(&b, &c, &r);
        for (int i = 0; i < 3; ++i) {
            list[i].expert = 2 - i;
            list[i].begin = b.b.h_offset[2 - i], list[i].end = b.b.h_offset[3 - i];
        }
        groups = tbuf_from("group", list, sizeof list, 4);
        CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
        gradient_check(&b, &c);
        for (int i = 0; i < 3; ++i) want[i] = tbuf_copy(gradient_outputs(&b).at[i]);
        tbufs_poison(gradient_outputs(&b));
        b.b.d.expert_offset = 0;
        b.b.d.group = (const moe_gemm_group*)groups.p, b.b.d.num_groups = 3;
        CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
        for (int i = 0; i < 3; ++i) {
            const tbuf* out = gradient_outputs(&b).at[i];
            CHECK(tbuf_holds(out, want[i]), "%s has other bits by a list", out->name);
            free(want[i]);
        }
        tbuf_free(&groups);
        gradient_bufs_free(&b);
    }
}

static void test_gradient_faults(void)
{
    static const int rows[] = {10, 20, 30};
    trand r = trand_new(72);
    for (int which = 0; which <= 4; ++which) {
        gradient_case c = gradient_normal(3, rows, 72, 40, MOE_ACTIVATION_SWIGLU);
        gradient_bufs b;
        int32_t offset[4];
        if (!gradient_on(&c, which) || test_gemm_status(c.g.dtype, c.g.tile) != MOE_OK) continue;
        gradient_bufs_new(&b, &c, &r);
        tfault_put(&b.b.fault, MOE_FAULT_BAD_OFFSET, 7);
        CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
        CHECK(tbufs_untouched(gradient_outputs(&b)), "after a stop fault");
        tfault_put(&b.b.fault, MOE_FAULT_NONE, 0);
        memcpy(offset, b.b.h_offset, sizeof offset);
        offset[2] = offset[1] - 1;
        tbuf_put(&b.b.offset, offset);
        CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
        CHECK(tbufs_untouched(gradient_outputs(&b)), "expert 1 ends before it begins");
        CHECK_FAULT(&b.b.fault, MOE_FAULT_BAD_OFFSET, 1);
        tfault_put(&b.b.fault, MOE_FAULT_NONE, 0);
        tbuf_put(&b.b.offset, b.b.h_offset);
        CHECK_STATUS(moe_grouped_gemm_gradient(&b.b.d, test_now.stream), MOE_OK);
        gradient_check(&b, &c);
        gradient_bufs_free(&b);
    }
}

MOE_KERNEL(128, 1) gradient_kernel(MOE_ARG(moe_grouped_gemm_args) d)
{
    MOE_SHARED_DYNAMIC(shared);
    const moe_tile_position t = {0, 0, d.num_rows, (int)blockIdx.x * 64, (int)blockIdx.y};
    moe_gemm_tile_gradient(
        &d, t, shared, moe_gemm_shape_of(MOE_GEMM_SHAPE_64x64, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K));
}

static void test_gradient_own_kernel(void)
{
    static const int rows[] = {100};
    trand r = trand_new(68);
    gradient_case c = gradient_normal(1, rows, 72, 40, MOE_ACTIVATION_GEGLU);
    gradient_bufs b;
    moe_grouped_gemm_args d;
    moe_launch_config l;
    c.g.dtype = c.g.c_dtype = MOE_FP16;
    gradient_bufs_new(&b, &c, &r);
    l = moe_grid(2, 128,
                 moe_gemm_tile_smem(
                     moe_gemm_shape_of(MOE_GEMM_SHAPE_64x64, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K)),
                 test_now.stream);
    l.grid.y = 2;
    CHECK_STATUS(moe_gemm_tile_resolve(&b.b.d, &d), MOE_STATUS(MOE_ERR_CONFLICT, gradient));
    CHECK_STATUS(moe_gemm_tile_gradient_resolve(&b.b.d, &d), MOE_OK);
    CHECK_STATUS(MOE_LAUNCH(gradient_kernel, l, d), MOE_OK);
    gradient_check(&b, &c);
    gradient_bufs_free(&b);
}

/* Requires that the wgmma path takes as many experts, and as large a stride of pre, as the header
   says. */
static void gradient_plan_limits(void)
{
    moe_grouped_gemm_desc d = {};
    moe_gemm_plan p;
    d.n = d.k = 64, d.num_experts = 1792, d.num_rows = 1, d.dtype = test_half(), d.gradient = 1;
    d.activation = MOE_ACTIVATION_SWIGLU, d.path = MOE_GEMM_PATH_WGMMA, d.tile = MOE_TILE_128x256;
    d.a = d.b.base = (void*)((uintptr_t)1 << 44), d.pre = (void*)((uintptr_t)1 << 46);
    d.c = (void*)((uintptr_t)1 << 45), d.expert_offset = (const int32_t*)(uintptr_t)4096;
    if (!gradient_here()) return;
    CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, &p), MOE_OK);
    d.num_experts = 1793;
    CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, &p), MOE_STATUS(MOE_ERR_CONFLICT, path));
    d.path = 0, d.tile = 0;
    CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, &p), MOE_OK);
    d.num_experts = 1, d.path = MOE_GEMM_PATH_WGMMA, d.pre_stride = (int64_t)1 << 39;
    CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, &p), MOE_STATUS(MOE_ERR_CONFLICT, path));
}

static void test_gradient_plan(void)
{
    static const int rows[] = {1, 100, 8192, 1000000}, ns[] = {8, 128, 136, 512, 7168};
    for (int i = 0; i < 4 * 5; ++i) {
        moe_grouped_gemm_desc d = {};
        moe_gemm_plan p[2] = {};
        d.a = (void*)(uintptr_t)4096; /* addresses only, nothing runs */
        d.b.base = (void*)((uintptr_t)1 << 44);
        d.c = (void*)((uintptr_t)1 << 45);
        d.pre = (void*)((uintptr_t)1 << 46);
        d.expert_offset = (const int32_t*)((uintptr_t)1 << 47);
        d.n = ns[i % 5], d.k = 64, d.num_experts = 8, d.num_rows = rows[i / 5];
        d.dtype = test_half(), d.gradient = 1;
        for (int gated = 0; gated < 2; ++gated) {
            d.activation = gated ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_RELU2;
            CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, p + gated), MOE_OK);
        }
        CHECK(memcmp(p, p + 1, sizeof *p) == 0, "n %d, %d rows: tile %d, gated %d", d.n, d.num_rows,
              p[0].tile, p[1].tile);
        CHECK(p[0].tile_m == 128 || rows[i / 5] < 1000000 || d.n <= 64, "n %d, %d rows: tile %d",
              d.n, d.num_rows, p[0].tile);
        d.c = (void*)d.pre; /* without act: on wgmma P has no place to be handed over in */
        CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, p), MOE_OK);
        CHECK(p[0].path == MOE_GEMM_PATH_WMMA, "path %d", p[0].path);
        d.path = MOE_GEMM_PATH_WGMMA;
        CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, p), MOE_STATUS(MOE_ERR_CONFLICT, path));
    }
    gradient_plan_limits();
}

TEST_REFUSED(calls_refuse, moe_grouped_gemm_gradient, moe_grouped_gemm_gradient_prepare,
             moe_grouped_gemm)

/* Requires that the plan and all calls refuse d alike. Runs nothing where the plan accepts d: its
   addresses may be of no buffer. */
static void refused(const moe_grouped_gemm_desc* d, moe_status want, const trefusal* at)
{
    moe_gemm_plan p;
    const moe_status s = moe_grouped_gemm_gradient_plan(d, &p);
    test_status_at(at, s, want, "moe_grouped_gemm_gradient_plan");
    if (s != MOE_OK) calls_refuse(d, want, at);
}

static void test_gradient_refusals(void)
{
    static const int rows[] = {12, 9, 20};
    trand r = trand_new(69);
    gradient_case c = gradient_normal(3, rows, 64, 40, MOE_ACTIVATION_SWIGLU);
    gradient_bufs b;
    moe_grouped_gemm_desc good, d;
    tbuf table;
    void* address[3] = {};
    c.g.gather = 2;
    c.g.a_rows = 30;
    gradient_bufs_new(&b, &c, &r);
    table = tbuf_from("table", address, sizeof address, 0);
    good = b.b.d;
    REFUSED_EACH(gradient, MOE_ERR_OPTION, gradient, 2, -1);
    REFUSED(d.bias = b.b.bias.p, MOE_ERR_CONFLICT, bias);
    REFUSED(d.accumulate = 1, MOE_ERR_CONFLICT, accumulate);
    REFUSED(d.c_dtype = MOE_FP32, MOE_ERR_CONFLICT, c_dtype);
    REFUSED((d.c = 0, d.c_table = (void* const*)table.p), MOE_ERR_CONFLICT, c_table);
    REFUSED(d.c_table = (void* const*)table.p, MOE_ERR_CONFLICT, c_table);
    REFUSED_EACH(gate_up, MOE_ERR_CONFLICT, gate_up, MOE_GATE_UP_INTERLEAVED, MOE_GATE_UP_SEPARATE);
    REFUSED(d.b.up = d.b.base, MOE_ERR_CONFLICT, b);
    REFUSED(d.b.up_table = (const void* const*)table.p, MOE_ERR_CONFLICT, b);
    REFUSED(d.pre = 0, MOE_ERR_NULL, pre);
    REFUSED(d.c = 0, MOE_ERR_NULL, c);
    REFUSED(d.gradient = 0, MOE_ERR_CONFLICT, gradient); /* grouped.cuh takes it */
    /* strides of 2n and n columns, alignment */
    REFUSED_EACH(c_stride, MOE_ERR_STRIDE, c_stride, 120, 64, -128);
    REFUSED(d.c_stride = 132, MOE_ERR_ALIGN, c_stride);
    REFUSED_EACH(pre_stride, MOE_ERR_STRIDE, pre_stride, 120, 64, -128);
    REFUSED(d.pre_stride = 132, MOE_ERR_ALIGN, pre_stride);
    REFUSED_EACH(act_stride, MOE_ERR_STRIDE, act_stride, 56, -64, INT64_MAX - 7);
    REFUSED(d.act_stride = 68, MOE_ERR_ALIGN, act_stride);
    REFUSED(d.pre = AT(d.pre, 8), MOE_ERR_ALIGN, pre);
    REFUSED(d.act = AT(d.act, 8), MOE_ERR_ALIGN, act);
    REFUSED(d.dot = (float*)AT(d.dot, 2), MOE_ERR_ALIGN, dot);
    REFUSED(d.row_weight = (const float*)AT(d.row_weight, 2), MOE_ERR_ALIGN, row_weight);
    /* outputs that overlap something: from the first byte to the last */
    REFUSED((d.c = d.pre, d.c_stride = 136), MOE_ERR_OVERLAP, c); /* C is pre, but for its stride */
    REFUSED(d.c = AT(d.pre, 41 * 128 * 2 - 16), MOE_ERR_OVERLAP, c);
    REFUSED(d.c = DOWN_TO(AT(d.row_weight, 30 * 2 * 4 - 4), 16), MOE_ERR_OVERLAP, c);
    REFUSED(d.act = (void*)d.a, MOE_ERR_OVERLAP, act);
    REFUSED(d.act = d.pre, MOE_ERR_OVERLAP, act);
    REFUSED(d.act = d.c, MOE_ERR_OVERLAP, act);
    REFUSED(d.act = AT(d.c, 41 * 128 * 2 - 16), MOE_ERR_OVERLAP, act);
    REFUSED(d.dot = (float*)d.c, MOE_ERR_OVERLAP, dot);
    REFUSED(d.dot = (float*)AT(d.act, 41 * 64 * 2 - 4), MOE_ERR_OVERLAP, dot);
    REFUSED(d.dot = (float*)AT(d.row_weight, 30 * 2 * 4 - 4), MOE_ERR_OVERLAP, dot);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.dot, 40 * 4), 8), MOE_ERR_OVERLAP, fault);
    { /* parts of 64 columns, the last one smaller; weights of rows without an index */
        char* const far = TEST_FAR;
        moe_gemm_plan p = {};
        REFUSED((d.dot = (float*)far, d.act = far + 41 * 4 - 4, d.act = DOWN_TO(d.act, 16)),
                MOE_ERR_OVERLAP, dot);
        d.act = UP_TO(far + 41 * 4, 16);
        CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, &p), MOE_OK);
        REFUSED((d.row_index = 0, d.row_div = 0, d.a_rows = 0, d.row_weight = (float*)far,
                 d.dot = (float*)(far + 40 * 4)),
                MOE_ERR_OVERLAP, dot);
        d.dot = (float*)(far + 41 * 4);
        d.a = far + 4096; /* 41 rows */
        CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, &p), MOE_OK);
        /* of row_weight 2^31 elements are read at most, since an index is an int32_t */
        REFUSED((d.row_div = 1 << 30, d.row_weight = (float*)far,
                 d.dot = (float*)(far + ((size_t)8 << 30) - 4)),
                MOE_ERR_OVERLAP, dot);
        d.dot = (float*)(far + ((size_t)8 << 30));
        CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, &p), MOE_OK);
        d = good; /* nothing is read or written */
        d.num_rows = 0, d.pre = d.c = 0, d.a = d.b.base = 0;
        CHECK_STATUS(moe_grouped_gemm_gradient_plan(&d, &p), MOE_OK);
    }
    CHECK(tbufs_untouched(gradient_outputs(&b)), "a refused call wrote an output");
    CHECK_FAULT(&b.b.fault, MOE_FAULT_NONE, 0);
    tbuf_free(&table);
    gradient_bufs_free(&b);
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_gradient_activations);
    RUN(test_gradient_rows);
    RUN(test_gradient_tails);
    RUN(test_gradient_gather);
    RUN(test_gradient_infinite);
    RUN(test_gradient_extremes);
    RUN(test_gradient_gates);
    RUN(test_gradient_in_place);
    RUN(test_gradient_bits);
    RUN(test_gradient_tiles);
    RUN(test_gradient_batch);
    RUN(test_gradient_fresh);
    RUN(test_gradient_groups);
    RUN(test_gradient_faults);
    RUN(test_gradient_own_kernel);
    RUN(test_gradient_plan);
    RUN(test_gradient_refusals);
    return test_end();
}
