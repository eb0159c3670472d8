/* test_ref.cu: moe/ref: the references against numbers worked out by hand, against each other
   where two layouts describe the same weights, and float against double. No kernel runs here.

     nvcc -I. -arch=sm_90a tests/unit/test_ref.cu -o test_ref
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_ref.cu -o test_ref

   test_ref_router          logits by hand
   test_ref_gate            ids and weights by hand
   test_ref_route           maps by hand
   test_ref_gemm            a product by hand
   test_ref_experts         the same weights in every layout
   test_ref_activations     every activation against its formula
   test_ref_combine_shared  a shared row
   test_ref_layer           the layer against its stations */
#include "tests/test.h"

#include "moe/ref/ref.h"

static int near_to(double a, double b) { return fabs(a - b) <= 1e-12 * (1 + fabs(b)); }

static void test_ref_router(void)
{
    const float x[] = {1, 2, 99, 3, -4, 99}, w[] = {0.5f, 1, -2, 3, 0, 0.25f};
    double d[6];
    float f[6];
    moe_ref_router_desc r;
    memset(&r, 0, sizeof r);
    r.x = x;
    r.w = w;
    r.x_stride = 3;
    r.x_dtype = r.w_dtype = MOE_FP32;
    r.num_tokens = 2;
    r.num_experts = 3;
    r.hidden = 2;
    moe_ref_router_f64(&r, d);
    moe_ref_router_f32(&r, f);
    CHECK(d[0] == 2.5 && d[1] == 4 && d[2] == 0.5 && d[3] == -2.5 && d[4] == -18 && d[5] == -1);
    for (int i = 0; i < 6; ++i) CHECK(d[i] == f[i]);
}

static void test_ref_gate(void)
{
    const float inf = INFINITY;
    const float l[5][4] = {{1, 3, 2, 3}, {-inf, -inf, -inf, -inf}, {0, inf, 1, inf},
                           {0, 1, NAN, 2}, {0, -inf, 0, 1}};
    int32_t ids[15], count[4], chunk[4];
    double w[15];
    moe_ref_gate_desc g;
    memset(&g, 0, sizeof g);
    g.logits = l;
    g.logits_dtype = MOE_FP32;
    g.num_tokens = 5;
    g.num_experts = 4;
    g.top_k = 3;
    CHECK(moe_ref_gate_f64(&g, ids, w, count, chunk) == 3, "token 3 holds the NaN");
    {
        const int32_t want[] = {1, 3, 2, -1, -1, -1, 1, 3, 2, -1, -1, -1, 3, 0, 2};
        const double s0 = 2 + exp(-1) + exp(-2), s4 = 1 + 2 * exp(-1);
        CHECK_INTS("ids", ids, want, 15);
        CHECK(near_to(w[0], 1 / s0) && near_to(w[1], 1 / s0) && near_to(w[2], exp(-1) / s0));
        CHECK(w[3] == 0 && w[4] == 0 && w[5] == 0);
        CHECK(w[6] == 0.5 && w[7] == 0.5 && w[8] == 0);
        CHECK(w[9] == 0 && w[10] == 0 && w[11] == 0);
        CHECK(near_to(w[12], 1 / s4) && near_to(w[13], exp(-1) / s4) && w[13] == w[14]);
        CHECK(count[0] == 1 && count[1] == 2 && count[2] == 3 && count[3] == 3);
        CHECK(memcmp(count, chunk, sizeof count) == 0);
    }
    g.score = MOE_SCORE_TOPK_SOFTMAX;
    g.scale = 3;
    moe_ref_gate_f64(&g, ids, w, 0, 0);
    CHECK(near_to(w[0], 3 / (2 + exp(-1))) && near_to(w[0] + w[1] + w[2], 3) && w[3] == 0);
    g.score = MOE_SCORE_SIGMOID;
    g.renormalize = 1;
    moe_ref_gate_f64(&g, ids, w, 0, 0);
    {
        const double a = 1 / (1 + exp(-3)), b = 1 / (1 + exp(-2));
        CHECK(near_to(w[0], 3 * a / (2 * a + b)) && near_to(w[2], 3 * b / (2 * a + b)));
        CHECK(w[3] == 0 && w[4] == 0, "nothing is chosen");
        CHECK(w[6] == w[7] && near_to(w[6] + w[7] + w[8], 3));
    }
}

static void test_ref_route(void)
{
    const int32_t ids[] = {2, 0, -1, 2, 0, 7, 2, 2};
    const float weights[] = {1, 2, 3, 4, 5, 6, 7, 8};
    int32_t count[3], offset[4], slot_row[8], row_slot[8];
    float row_weight[8];
    moe_place place[8];
    moe_ref_route_desc r;
    memset(&r, 0, sizeof r);
    r.ids = ids;
    r.weights = weights;
    r.expert_count = count;
    r.expert_offset = offset;
    r.slot_row = slot_row;
    r.row_slot = row_slot;
    r.row_weight = row_weight;
    r.place = place;
    r.num_tokens = 4;
    r.num_experts = 3;
    r.top_k = 2;
    for (r.place_kind = 0; r.place_kind <= MOE_PLACE_BY_EXPERT; ++r.place_kind) {
        const int32_t c[] = {2, 0, 4}, o[] = {0, 2, 2, 6}, sr[] = {2, 0, -1, 3, 1, -1, 4, 5};
        const int32_t rs[] = {1, 4, 0, 3, 6, 7, -1, -1};
        const int split = r.place_kind == MOE_PLACE_BY_EXPERT;
        CHECK(moe_ref_route(&r) == 5, "slot 5 names expert 7");
        CHECK_INTS("expert_count", count, c, 3);
        CHECK_INTS("expert_offset", offset, o, 4);
        CHECK_INTS("slot_row", slot_row, sr, 8);
        CHECK_INTS("row_slot", row_slot, rs, 8);
        CHECK(row_weight[2] == 1 && row_weight[5] == 8 && row_weight[6] == 0);
        CHECK(place[2].buffer == -1 && place[2].row == -1 && place[5].buffer == -1);
        CHECK(place[6].buffer == (split ? 2 : 0) && place[6].row == (split ? 2 : 4));
        CHECK(place[1].buffer == 0 && place[1].row == 0);
    }
}

static void test_ref_gemm(void)
{
    /* two experts with 2 and 1 rows, N = 2, K = 3; a row is taken from row_index / 2 */
    const float a[] = {1, 2, 3, -1, 0, 2}, b[] = {1, 0, 0, 1, 1, 1, 2, 0, -1, 0, 3, 0};
    const float bias[] = {10, 20, 30, 40};
    const int32_t offset[] = {0, 2, 3}, index[] = {2, -1, 1};
    float f[6];
    double c[6], s[6];
    moe_ref_gemm_desc g;
    memset(&g, 0, sizeof g);
    g.a = a;
    g.row_index = index;
    g.expert_offset = offset;
    g.bias = bias;
    g.b.base = b;
    g.a_dtype = g.b_dtype = MOE_FP32;
    g.row_div = 2;
    g.num_experts = 2;
    g.n = 2;
    g.k = 3;
    moe_ref_gemm_f64(&g, c, s);
    moe_ref_gemm_f32(&g, f, 0);
    CHECK(c[0] == 9 && c[1] == 21, "row 1 of a, expert 0: %g %g", c[0], c[1]);
    CHECK(c[2] == 10 && c[3] == 20, "no row: the bias alone");
    CHECK(c[4] == 29 && c[5] == 46, "row 0 of a, expert 1: %g %g", c[4], c[5]);
    CHECK(s[0] == 11 && s[1] == 23 && s[4] == 35 && s[5] == 46);
    for (int i = 0; i < 6; ++i) CHECK(c[i] == f[i]);
}

enum { T = 5, E = 3, K = 2, H = 6, I = 4 };

/* Weights of every layout that hold the same numbers, in double's hands the same result. */
static void test_ref_experts(void)
{
    trand r = trand_new(1);
    float x[T * H], w1[E * 2 * I * H], w2[E * H * I], bias1[E * 2 * I], bias2[E * H];
    float pairs[E * 2 * I * H], pair_bias[E * 2 * I], gate[E * I * H], up[E * I * H];
    float w1_mn[E * H * 2 * I], w2_mn[E * (I * (H + 3))];
    const void *gates[E], *ups[E], *w2s[E];
    const int32_t offset[] = {0, 4, 4, 10}, row_slot[] = {0, 3, 4, 9, 1, 2, 5, 6, 7, 8};
    double y[10 * H], other[10 * H], act[10 * I], h[10 * 2 * I], want[10 * H];
    float single[10 * H];
    moe_ref_experts_desc d;
    trand_fill_normal(&r, x, T * H, MOE_FP32);
    trand_fill_normal(&r, w1, E * 2 * I * H, MOE_FP32);
    trand_fill_normal(&r, w2, E * H * I, MOE_FP32);
    trand_fill_normal(&r, bias1, E * 2 * I, MOE_FP32);
    trand_fill_normal(&r, bias2, E * H, MOE_FP32);
    for (int e = 0; e < E; ++e) {
        for (int n = 0; n < 2 * I; ++n) {
            const int pair = n < I ? 2 * n : 2 * (n - I) + 1;
            pair_bias[e * 2 * I + pair] = bias1[e * 2 * I + n];
            for (int k = 0; k < H; ++k) {
                const float v = w1[(e * 2 * I + n) * H + k];
                pairs[(e * 2 * I + pair) * H + k] = v;
                w1_mn[(e * H + k) * 2 * I + n] = v;
                if (n < I) gate[(e * I + n) * H + k] = v;
                else up[(e * I + n - I) * H + k] = v;
            }
        }
        for (int n = 0; n < H; ++n)
            for (int k = 0; k < I; ++k)
                w2_mn[e * I * (H + 3) + k * (H + 3) + n] = w2[(e * H + n) * I + k];
        gates[e] = gate + e * I * H;
        ups[e] = up + e * I * H;
        w2s[e] = w2 + e * H * I;
    }
    /* by the definition, with nothing shared */
    for (int e = 0; e < E; ++e)
        for (int row = offset[e]; row < offset[e + 1]; ++row) {
            const float* t = x + row_slot[row] / K * H;
            double a[I];
            for (int i = 0; i < I; ++i) {
                double g = bias1[e * 2 * I + i], u = bias1[e * 2 * I + I + i];
                for (int k = 0; k < H; ++k) {
                    g += (double)w1[(e * 2 * I + i) * H + k] * t[k];
                    u += (double)w1[(e * 2 * I + I + i) * H + k] * t[k];
                }
                a[i] = g / (1 + exp(-g)) * u;
            }
            for (int n = 0; n < H; ++n) {
                double sum = bias2[e * H + n];
                for (int i = 0; i < I; ++i) sum += (double)w2[(e * H + n) * I + i] * a[i];
                want[row * H + n] = sum;
            }
        }
    memset(&d, 0, sizeof d);
    d.x = x;
    d.row_slot = row_slot;
    d.expert_offset = offset;
    d.w1.base = w1;
    d.w2.base = w2;
    d.bias1 = bias1;
    d.bias2 = bias2;
    d.x_dtype = d.w_dtype = MOE_FP32;
    d.num_experts = E;
    d.top_k = K;
    d.hidden = H;
    d.intermediate = I;
    CHECK(moe_ref_experts_f64(&d, y, act, h) == 0);
    for (int i = 0; i < 10 * H; ++i)
        CHECK(fabs(y[i] - want[i]) < 1e-12, "[%d] %g, not %g", i, y[i], want[i]);
    CHECK(moe_ref_experts_f32(&d, single, 0, 0) == 0);
    for (int i = 0; i < 10 * H; ++i) CHECK(fabs(single[i] - y[i]) < 1e-4, "float against double");

    d.w1.base = w1_mn; /* [H, 2I], and [I, H] with a gap after each row */
    d.w1.major = MOE_MAJOR_MN;
    d.w2.base = w2_mn;
    d.w2.major = MOE_MAJOR_MN;
    d.w2.row_stride = H + 3;
    CHECK(moe_ref_experts_f64(&d, other, 0, 0) == 0 && memcmp(y, other, sizeof y) == 0, "MN-major");

    memset(&d.w1, 0, sizeof d.w1);
    memset(&d.w2, 0, sizeof d.w2);
    d.w1.base = pairs;
    d.bias1 = pair_bias;
    d.w2.table = w2s;
    d.gate_up = MOE_GATE_UP_INTERLEAVED;
    CHECK(moe_ref_experts_f64(&d, other, 0, 0) == 0 && memcmp(y, other, sizeof y) == 0, "pairs");

    d.w1.base = gate;
    d.w1.up = up;
    d.bias1 = bias1;
    d.gate_up = MOE_GATE_UP_SEPARATE;
    CHECK(moe_ref_experts_f64(&d, other, 0, 0) == 0 && memcmp(y, other, sizeof y) == 0, "separate");
    d.w1.base = d.w1.up = 0;
    d.w1.table = gates;
    d.w1.up_table = ups;
    CHECK(moe_ref_experts_f64(&d, other, 0, 0) == 0 && memcmp(y, other, sizeof y) == 0, "tables");

    d.act_dtype = MOE_BF16; /* the activations are rounded, and only they */
    CHECK(moe_ref_experts_f64(&d, other, h, 0) == 0);
    for (int i = 0; i < 10 * I; ++i) CHECK(h[i] == moe_ref_round_f64(act[i], MOE_BF16));
    CHECK(memcmp(y, other, sizeof y) != 0);
}

/* Every activation against its formula, and where the formulas meet. */
static void test_ref_activations(void)
{
    static const double at[] = {-40, -9, -3, -1, -0.25, 0, 0.25, 1, 3, 9, 40};
    for (size_t i = 0; i < sizeof at / sizeof *at; ++i) {
        const double v = at[i], up = 1.5 - v / 3, silu = v / (1 + exp(-v));
        const double gelu = 0.5 * v * erfc(-v / sqrt(2)), pi = acos(-1);
        const double inner = sqrt(2 / pi) * (v + 0.044715 * v * v * v);
        const double tanh_gelu = 0.5 * v * (1 + tanh(inner));
        const double g = v > 7 ? 7 : v, u = up > 7 ? 7 : up < -7 ? -7 : up;
#define REF(kind, alpha, limit) moe_ref_activation_f64(MOE_ACTIVATION_##kind, v, up, alpha, limit)
#define NEAR(a, b) CHECK(near_to(a, b), "at %g: %.17g, not %.17g", v, a, b)
        CHECK(REF(NONE, 0, 0) == v, "none");
        NEAR(REF(SWIGLU, 0, 0), silu * up);
        NEAR(REF(SILU, 0, 0), silu);
        NEAR(REF(GELU, 0, 0), gelu);
        NEAR(REF(GEGLU, 0, 0), gelu * up);
        NEAR(REF(GELU_TANH, 0, 0), tanh_gelu);
        NEAR(REF(GEGLU_TANH, 0, 0), tanh_gelu * up);
        NEAR(REF(RELU2, 0, 0), v > 0 ? v * v : 0);
        NEAR(REF(SWIGLU_CLAMPED, 0, 0), (u + 1) * g / (1 + exp(-(double)1.702f * g)));
        NEAR(REF(SWIGLU_CLAMPED, 1, 100), (up + 1) * silu);
        NEAR(REF(SWIGLU_CLAMPED, -2, 0.5f),
             ((up > 0.5 ? 0.5 : up < -0.5 ? -0.5 : up) + 1) * (v > 0.5 ? 0.5 : v) /
                 (1 + exp(2 * (v > 0.5 ? 0.5 : v))));
        CHECK(fabs(REF(GELU, 0, 0) - REF(GELU_TANH, 0, 0)) < 1e-3, "both forms of Phi");
        CHECK(fabs(moe_ref_activation_f32(MOE_ACTIVATION_GEGLU, (float)v, (float)up, 0, 0) -
                   gelu * up) < 1e-5 * (1 + fabs(gelu * up)),
              "float against double");
#undef NEAR
#undef REF
    }
    { /* not gated: w1 [I, H] and I biases an expert, whatever gate_up says */
        trand r = trand_new(3);
        float x[T * H], w1[E * I * H], w2[E * H * I], bias1[E * I];
        const int32_t offset[] = {0, 2, 2, 5};
        double y[5 * H], act[5 * I];
        moe_ref_experts_desc d;
        trand_fill_normal(&r, x, T * H, MOE_FP32);
        trand_fill_normal(&r, w1, E * I * H, MOE_FP32);
        trand_fill_normal(&r, w2, E * H * I, MOE_FP32);
        trand_fill_normal(&r, bias1, E * I, MOE_FP32);
        memset(&d, 0, sizeof d);
        d.x = x;
        d.expert_offset = offset;
        d.w1.base = w1;
        d.w2.base = w2;
        d.bias1 = bias1;
        d.x_dtype = d.w_dtype = MOE_FP32;
        d.activation = MOE_ACTIVATION_RELU2;
        d.num_experts = E;
        d.hidden = H;
        d.intermediate = I;
        for (d.gate_up = 0; d.gate_up <= MOE_GATE_UP_SEPARATE; ++d.gate_up) {
            CHECK(moe_ref_experts_f64(&d, y, act, 0) == 0);
            for (int row = 0; row < 5; ++row)
                for (int i = 0; i < I; ++i) {
                    const int e = row < 2 ? 0 : 2;
                    double v = bias1[e * I + i];
                    for (int k = 0; k < H; ++k)
                        v += (double)w1[(e * I + i) * H + k] * x[row * H + k];
                    CHECK(near_to(act[row * I + i], v > 0 ? v * v : 0), "row %d [%d]", row, i);
                }
        }
    }
}

/* A shared row is added with its weight, whatever becomes of the others. */
static void test_ref_combine_shared(void)
{
    const float rows[] = {1, 2, 3, 4}, shared[] = {10, 20, 99, 30, 40}, weight[] = {2, 0.5f};
    const moe_place place[] = {{0, 1}, {-1, -1}};
    double y[4], sum[4];
    moe_ref_combine_desc c;
    memset(&c, 0, sizeof c);
    c.rows = rows;
    c.place = place;
    c.shared = shared;
    c.shared_stride = 3;
    c.rows_dtype = MOE_FP32;
    c.num_tokens = 2;
    c.hidden = 2;
    c.top_k = 1;
    moe_ref_combine_f64(&c, y, sum);
    CHECK(y[0] == 13 && y[1] == 24 && y[2] == 30 && y[3] == 40, "weight 1");
    c.shared_weight = weight;
    moe_ref_combine_f64(&c, y, sum);
    CHECK(y[0] == 23 && y[1] == 44 && y[2] == 15 && y[3] == 20 && sum[1] == 44, "weighted");
}

/* The layer is what its stations give one after the other. */
static void test_ref_layer(void)
{
    trand r = trand_new(2);
    float x[T * H], router[E * H], w1[E * 2 * I * H], w2[E * H * I];
    double y[T * H], want[T * H], weights[T * K], logits[T * E];
    float single[T * H];
    int32_t ids[T * K];
    moe_ref_layer_desc d;
    trand_fill_normal(&r, x, T * H, MOE_FP32);
    trand_fill_normal(&r, router, E * H, MOE_FP32);
    trand_fill_normal(&r, w1, E * 2 * I * H, MOE_FP32);
    trand_fill_normal(&r, w2, E * H * I, MOE_FP32);
    memset(&d, 0, sizeof d);
    d.x = x;
    d.router = router;
    d.residual = x;
    d.w1.base = w1;
    d.w2.base = w2;
    d.x_dtype = d.w_dtype = d.router_dtype = d.residual_dtype = MOE_FP32;
    d.num_tokens = T;
    d.num_experts = E;
    d.top_k = K;
    d.hidden = H;
    d.intermediate = I;
    d.renormalize = 1;
    CHECK(moe_ref_layer_f64(&d, y, ids, weights) == 0);
    for (int t = 0; t < T; ++t) {
        double* l = logits + t * E;
        int first = 0, second = -1;
        for (int e = 0; e < E; ++e) {
            l[e] = 0;
            for (int h = 0; h < H; ++h) l[e] += (double)x[t * H + h] * router[e * H + h];
            if (l[e] > l[first]) first = e;
        }
        for (int e = 0; e < E; ++e)
            if (e != first && (second < 0 || l[e] > l[second])) second = e;
        CHECK(ids[t * K] == first && ids[t * K + 1] == second, "token %d", t);
        CHECK(fabs(weights[t * K] - 1 / (1 + exp(l[second] - l[first]))) < 1e-12);
        CHECK(fabs(weights[t * K] + weights[t * K + 1] - 1) < 1e-12);
        for (int n = 0; n < H; ++n) want[t * H + n] = x[t * H + n];
        for (int k = 0; k < K; ++k) {
            const int e = ids[t * K + k];
            for (int i = 0; i < I; ++i) {
                double g = 0, u = 0, a;
                for (int h = 0; h < H; ++h) {
                    g += (double)w1[(e * 2 * I + i) * H + h] * x[t * H + h];
                    u += (double)w1[(e * 2 * I + I + i) * H + h] * x[t * H + h];
                }
                a = g / (1 + exp(-g)) * u;
                for (int n = 0; n < H; ++n)
                    want[t * H + n] += weights[t * K + k] * w2[(e * H + n) * I + i] * a;
            }
        }
    }
    for (int i = 0; i < T * H; ++i)
        CHECK(fabs(y[i] - want[i]) < 1e-11, "[%d] %g, not %g", i, y[i], want[i]);
    CHECK(moe_ref_layer_f32(&d, single, 0, 0) == 0);
    for (int i = 0; i < T * H; ++i) CHECK(fabs(single[i] - y[i]) < 1e-3, "float against double");
    { /* a shared expert adds what it gives as an expert that every token chooses */
        float gates[T];
        int32_t offset[2] = {0, T};
        double alone[T * H];
        moe_ref_experts_desc e;
        for (int t = 0; t < T; ++t) gates[t] = 0.25f * (float)t;
        memset(&e, 0, sizeof e);
        e.x = x;
        e.expert_offset = offset;
        e.w1.base = w1 + 2 * I * H; /* that of expert 1 */
        e.w2.base = w2 + H * I;
        e.x_dtype = e.w_dtype = MOE_FP32;
        e.activation = MOE_ACTIVATION_GEGLU;
        e.num_experts = 1;
        e.hidden = H;
        e.intermediate = I;
        CHECK(moe_ref_experts_f64(&e, alone, 0, 0) == 0);
        d.shared.w1 = e.w1;
        d.shared.w2 = e.w2;
        d.shared.weight = gates;
        d.shared.intermediate = I;
        d.shared.activation = MOE_ACTIVATION_GEGLU;
        CHECK(moe_ref_layer_f64(&d, want, 0, 0) == 0);
        for (int i = 0; i < T * H; ++i)
            CHECK(fabs(want[i] - y[i] - gates[i / H] * alone[i]) < 1e-11, "shared, [%d]", i);
        memset(&d.shared, 0, sizeof d.shared);
    }
    { /* padding changes nothing; a capacity of one row an expert does */
        d.route.row_multiple = 7;
        CHECK(moe_ref_layer_f64(&d, want, 0, 0) == 0 && memcmp(want, y, sizeof y) == 0, "padding");
        d.route.capacity = 1;
        CHECK(moe_ref_layer_f64(&d, want, 0, 0) == 0 && memcmp(want, y, sizeof y) != 0, "capacity");
        memset(&d.route, 0, sizeof d.route);
    }
    d.rows_dtype = MOE_BF16;
    CHECK(moe_ref_layer_f64(&d, want, 0, 0) == 0);
    {
        double most = 0;
        for (int i = 0; i < T * H; ++i)
            if (fabs(y[i] - want[i]) > most) most = fabs(y[i] - want[i]);
        CHECK(most > 0 && most < 0.5, "rows rounded to bf16 change y by %g", most);
    }
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_ref_router);
    RUN(test_ref_gate);
    RUN(test_ref_route);
    RUN(test_ref_gemm);
    RUN(test_ref_experts);
    RUN(test_ref_activations);
    RUN(test_ref_combine_shared);
    RUN(test_ref_layer);
    return test_end();
}
