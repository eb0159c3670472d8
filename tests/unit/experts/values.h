/* values.h: results of moe_experts, against the reference in double.

     test_experts_layouts      runs all layouts of gate and up, with and without biases, both
                               dtypes, 16-bit and fp32 rows
     test_experts_activations  runs every activation with every layout, with and without biases
     test_experts_limits       gives every activation infinities, NaN and numbers whose exponential
                               overflows, as biases of rows of zeros: infinities become limits, NaN
                               stays
     test_experts_no_offset    leaves expert_offset null: all num_rows rows are the one expert's
     test_experts_shapes       draws shapes, strides, and how x and the rows are given
     test_experts_tiles        runs every tile once
     test_experts_in_order     gives x in expert order, with num_rows and without */
#ifndef MOE_TESTS_EXPERTS_VALUES_H
#define MOE_TESTS_EXPERTS_VALUES_H

#include "tests/unit/experts/case.h"

static void test_experts_layouts(void)
{
    trand r = trand_new(1);
    for (int gate_up = MOE_GATE_UP_CONCATENATED; gate_up <= MOE_GATE_UP_SEPARATE; ++gate_up)
        for (int bias = 0; bias < 4; ++bias)
            for (int i = 0; i < 6; ++i) { /* 2 of 6 are fp16 */
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
                if (c.major1 == MOE_MAJOR_K && c.major2 == MOE_MAJOR_K && trand_int(&r, 0, 2))
                    c.tile = MOE_TILE_128x256;
                run_case(&c, &r);
            }
}

static void test_experts_activations(void)
{
    trand r = trand_new(16);
    for (int kind = MOE_ACTIVATION_NONE; kind <= MOE_ACTIVATION_RELU2; ++kind)
        for (int gate_up = MOE_GATE_UP_CONCATENATED; gate_up <= MOE_GATE_UP_SEPARATE; ++gate_up)
            for (int i = 0; i < 4; ++i) {
                experts_case c = normal_case(19, 72, 56, 4, 2);
                c.activation = kind;
                c.gate_up = gate_up; /* ignored where the activation is not gated */
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
    { /* as in gpt-oss: interleaved, biases, defaults, gates and ups beyond the limit */
        experts_case c = normal_case(30, 64, 64, 3, 2);
        experts_bufs b;
        c.activation = MOE_ACTIVATION_SWIGLU_CLAMPED;
        c.gate_up = MOE_GATE_UP_INTERLEAVED;
        c.bias1 = c.bias2 = 1;
        bufs_new(&b, &c, &r);
        for (int64_t i = 0; i < c.E * 2 * c.I; ++i)
            moe_store(b.mlp.h_bias1, i, c.dtype, 8 * trand_normal(&r));
        tbuf_put(&b.mlp.bias1, b.mlp.h_bias1);
        run_bufs(&b, &c);
    }
}

static void test_experts_limits(void)
{
    static const double gate[] = {-INFINITY, INFINITY, NAN, -3e38, 3e38, -1e4,
                                  -200,      -100,     -90, 90,    0,    -1};
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
                    if (gated) moe_store(b.mlp.h_bias1, pairs ? 2 * i + 1 : c.I + i, c.dtype, 1.5f);
                }
                tbuf_put(&b.mlp.bias1, b.mlp.h_bias1);
                CHECK_STATUS(moe_experts_up(&b.d, test_now.stream), MOE_OK);
                act = (char*)tbuf_copy(&b.act);
                for (int i = 0; i < c.T * c.I; ++i) {
                    const int at = i % c.I;
                    const double v = moe_load(b.mlp.h_bias1, pairs ? 2 * at : at, c.dtype);
                    const double exact = moe_ref_activation_f64(kind, v, 1.5, 0, 0);
                    const double want = test_rounded(exact, c.dtype);
                    const double got = moe_load(act, i, c.dtype);
                    const double bound = 0.01 * fabs(want) + 1e-6; /* subnormals may be 0 */
                    CHECK(isnan(v)         ? isnan(want) && isnan(got)
                          : isfinite(want) ? fabs(got - want) <= bound
                                           : got == want,
                          "activation %d of %g is %g, not %g; %s", kind, v, got, want,
                          case_text(&c));
                }
                free(act);
                bufs_free(&b);
            }
}

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
        run_bufs(&b, &c);
    }
}

static void test_experts_shapes(void)
{
    static const int shapes[][5] = {{1, 8, 8, 1, 1},     {3, 8, 16, 2, 2},    {40, 64, 32, 1, 1},
                                    {9, 136, 24, 4, 4},  {31, 40, 72, 64, 2}, {66, 64, 64, 3, 2},
                                    {17, 24, 200, 7, 6}, {70, 16, 40, 2, 2}};
    trand r = trand_new(2);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; ++i)
        for (int j = 0; j < (MOE_ON_HOST ? 3 : 12); ++j) {
            const int* s = shapes[i];
            experts_case c = normal_case(s[0], s[1], s[2], s[3], s[4]);
            c.gate_up = (int)trand_int(&r, MOE_GATE_UP_CONCATENATED, MOE_GATE_UP_SEPARATE);
            c.activation = trand_int(&r, 0, 1) ? (int)trand_int(&r, 0, MOE_ACTIVATION_RELU2) : 0;
            c.rows_dtype = trand_int(&r, 0, 1) ? MOE_FP32 : c.dtype;
            c.bias1 =
                (int)trand_int(&r, 0, 1) || (c.T == 1 && c.activation == MOE_ACTIVATION_RELU2);
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
            if (c.major1 == MOE_MAJOR_K && c.major2 == MOE_MAJOR_K && trand_int(&r, 0, 2))
                c.tile = MOE_TILE_128x256;
            run_case(&c, &r);
        }
}

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

static void experts_values(void)
{
    RUN(test_experts_layouts);
    RUN(test_experts_activations);
    RUN(test_experts_limits);
    RUN(test_experts_no_offset);
    RUN(test_experts_shapes);
    RUN(test_experts_tiles);
    RUN(test_experts_in_order);
}

#endif
