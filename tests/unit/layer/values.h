/* values.h: results of the layer, against the references in double.

     test_layer_gates        runs every score, renormalised or not, scaled or not, through the
                             router and from given logits
     test_layer_activations  runs every activation of the experts and of a shared expert
     test_layer_shared       runs a shared expert of every form, weighted or not, with every
                             residual and y over x
     test_layer_rows_dtype   runs fp32 rows with both dtypes and the shared expert; rows beyond fp16
                             that their weight makes fit
     test_layer_entries      runs every source of the choice with all forms of weights, both dtypes
     test_layer_shapes       draws shapes, strides, residuals, biases and scores
     test_layer_ids          gives ids: some -1, some twice in a token, some out of range, more of
                             them than experts; and none but -1
     test_layer_residual     puts y in its own buffer, over x, over the residual, over both, with
                             strides
     test_layer_large        runs 4096 tokens on 64 experts, on a GPU */
#ifndef MOE_TESTS_LAYER_VALUES_H
#define MOE_TESTS_LAYER_VALUES_H

#include "tests/unit/layer/compare.h"

static void test_layer_gates(void)
{
    trand r = trand_new(1);
    for (int score = 0; score <= MOE_SCORE_SIGMOID; ++score)
        for (int i = 0; i < 8; ++i) {
            layer_case c = normal_case(37, 64, 40, 7, 3);
            c.score = score;
            c.renormalize = i & 1;
            c.scale = i & 2 ? 2.5f : 0;
            c.from = i & 4 ? FROM_LOGITS : FROM_ROUTER;
            c.dtype = c.router_dtype = trand_int(&r, 0, 1) ? MOE_FP16 : MOE_BF16;
            run_case(&c, &r);
        }
}

static void test_layer_activations(void)
{
    trand r = trand_new(19);
    for (int kind = MOE_ACTIVATION_NONE; kind <= MOE_ACTIVATION_RELU2; ++kind)
        for (int i = 0; i < 2; ++i) {
            layer_case c = normal_case(25, 64, 40, 6, 2);
            c.activation = kind;
            c.gate_up = (int)trand_int(&r, MOE_GATE_UP_CONCATENATED, MOE_GATE_UP_SEPARATE);
            c.bias = i;
            c.from = (int)trand_int(&r, FROM_ROUTER, FROM_IDS);
            if (kind == MOE_ACTIVATION_SWIGLU_CLAMPED && i) c.alpha = 1.25f, c.limit = 0.5f;
            if (i) {
                c.shared = 32;
                c.shared_activation = (int)trand_int(&r, 0, MOE_ACTIVATION_RELU2);
                c.shared_gate_up = (int)trand_int(&r, 0, MOE_GATE_UP_SEPARATE);
            }
            run_case(&c, &r);
        }
}

static void test_layer_shared(void)
{
    trand r = trand_new(20);
    for (int weighted = 0; weighted < 2; ++weighted)
        for (int residual = NO_RESIDUAL; residual <= RESIDUAL_IS_X; ++residual)
            for (int i = 0; i < 3; ++i) {
                layer_case c = normal_case(33, 72, 40, 5, 2);
                c.from = i;
                c.residual = residual;
                c.y_is_x = i == 1;
                c.shared = 8 * (int)trand_int(&r, 1, 12);
                c.shared_weighted = weighted;
                c.shared_gate_up = i + 1;
                c.shared_bias = (int)trand_int(&r, 0, 1);
                c.dtype = c.router_dtype = i == 2 ? MOE_FP16 : MOE_BF16;
                c.x_pad = residual == RESIDUAL ? 8 : 0;
                c.unused = i == 2 ? 60 : 0; /* some tokens have the shared expert alone */
                run_case(&c, &r);
            }
}

static void test_layer_rows_dtype(void)
{
    trand r = trand_new(23);
    for (int i = 0; i < 8; ++i) {
        layer_case c = normal_case(29, 72, 40, 5, 2);
        c.from = i % 3;
        c.dtype = c.router_dtype = i & 1 ? MOE_FP16 : MOE_BF16;
        c.rows_dtype = i < 6 ? MOE_FP32 : c.dtype; /* the dtype may be named */
        c.shared = i & 2 ? 24 : 0;
        c.shared_weighted = i & 1;
        c.residual = (int)trand_int(&r, NO_RESIDUAL, RESIDUAL);
        c.row_multiple = i & 4 ? 16 : 0;
        run_case(&c, &r);
    }
    for (int wide = 0; wide < 2; ++wide) { /* rows beyond fp16, whose weight makes y fit */
        layer_case c = normal_case(5, 16, 8, 1, 1);
        layer_bufs b;
        char* y;
        c.dtype = c.router_dtype = MOE_FP16;
        c.from = FROM_IDS;
        c.bias = 1;
        c.rows_dtype = wide ? MOE_FP32 : 0;
        bufs_new(&b, &c, &r);
        for (int i = 0; i < c.H * c.I; ++i) moe_store(b.mlp.w2.host[0][0], i, c.dtype, 18.0f);
        tbuf_put(&b.mlp.w2.part[0][0], b.mlp.w2.host[0][0]);
        memset(b.mlp.h_bias2, 0, b.mlp.bias2.bytes);
        tbuf_put(&b.mlp.bias2, b.mlp.h_bias2);
        memset(b.h_x, 0, b.x.bytes);
        tbuf_put(&b.x, b.h_x);
        for (int i = 0; i < 2 * c.I; ++i) /* act is 1250 = 50 * 25 */
            moe_store(b.mlp.h_bias1, i, c.dtype, i < c.I ? 50.0f : 25.0f);
        tbuf_put(&b.mlp.bias1, b.mlp.h_bias1);
        for (int t = 0; t < c.T; ++t) b.h_ids[t] = 0, b.h_weights[t] = 0.03f;
        tbuf_put(&b.ids, b.h_ids), tbuf_put(&b.weights, b.h_weights);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        y = (char*)tbuf_copy(&b.y);
        for (int i = 0; i < c.T * c.H; ++i) {
            const float got = moe_load(y, i, c.dtype); /* rows of 8 * 18 * 1250 = 1.8e5 */
            CHECK(wide ? got >= 5396 && got <= 5404 : isinf(got), "y is %g", (double)got);
        }
        free(y);
        bufs_free(&b);
    }
}

static void test_layer_entries(void)
{
    trand r = trand_new(2);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from)
        for (int gate_up = MOE_GATE_UP_CONCATENATED; gate_up <= MOE_GATE_UP_SEPARATE; ++gate_up)
            for (int i = 0; i < 4; ++i) {
                layer_case c = normal_case(33, 72, 56, 8, 2);
                c.from = from;
                c.gate_up = gate_up;
                c.dtype = i & 1 ? MOE_FP16 : MOE_BF16;
                c.router_dtype = i == 3 ? MOE_FP32 : c.dtype;
                c.bias = i >> 1;
                c.table = (i + gate_up) & 1;
                c.major = i == 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
                c.tile = i ? MOE_TILE_32x128 : MOE_TILE_AUTO;
                run_case(&c, &r);
            }
}

static void test_layer_shapes(void)
{
    static const int shapes[][5] = {{1, 64, 40, 4, 2},   {2, 8, 8, 1, 1},    {3, 24, 16, 5, 5},
                                    {31, 40, 72, 64, 2}, {65, 64, 32, 3, 1}, {33, 136, 24, 6, 6},
                                    {97, 16, 24, 2, 1}};
    trand r = trand_new(3);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; ++i)
        for (int j = 0; j < (MOE_ON_HOST ? 2 : 8); ++j) {
            const int* s = shapes[i];
            layer_case c = normal_case(s[0], s[1], s[2], s[3], s[4]);
            c.from = j == 0 ? FROM_ROUTER : (int)trand_int(&r, FROM_ROUTER, FROM_IDS);
            c.bias = (int)trand_int(&r, 0, 1);
            c.gate_up = (int)trand_int(&r, MOE_GATE_UP_CONCATENATED, MOE_GATE_UP_SEPARATE);
            c.residual = (int)trand_int(&r, NO_RESIDUAL, RESIDUAL_IS_X);
            c.score = (int)trand_int(&r, MOE_SCORE_SOFTMAX, MOE_SCORE_SIGMOID);
            c.x_pad = 8 * (int)trand_int(&r, 0, 2);
            c.y_pad = trand_int(&r, 0, 1) ? 0 : (int)trand_int(&r, 1, 9);
            c.residual_pad = trand_int(&r, 0, 1) ? 0 : (int)trand_int(&r, 1, 9);
            run_case(&c, &r);
        }
}

static void test_layer_ids(void)
{
    trand r = trand_new(4);
    for (int i = 0; i < 8; ++i) {
        layer_case c = normal_case(50, 40, 32, i & 1 ? 3 : 9, i & 1 ? 5 : 3);
        c.from = FROM_IDS;
        c.unused = i & 2 ? 40 : 0;
        c.bad = i & 4 ? 20 : 0;
        c.residual = i % 3 ? RESIDUAL : NO_RESIDUAL;
        c.bias = i & 1;
        run_case(&c, &r);
    }
    for (int residual = NO_RESIDUAL; residual <= RESIDUAL; ++residual) { /* every id is -1 */
        layer_case c = normal_case(20, 40, 32, 4, 2);
        layer_bufs b;
        void* want;
        c.from = FROM_IDS;
        c.unused = 100;
        c.residual = residual;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        want = calloc(1, b.y.bytes);
        CHECK(tbuf_holds(&b.y, residual ? b.h_residual : want), "y");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        free(want);
        bufs_free(&b);
    }
}

static void test_layer_residual(void)
{
    trand r = trand_new(5);
    for (int residual = NO_RESIDUAL; residual <= RESIDUAL_IS_X; ++residual)
        for (int y_is_x = 0; y_is_x < 2; ++y_is_x)
            for (int pads = 0; pads < 2; ++pads) {
                layer_case c = normal_case(35, 48, 40, 5, 2);
                c.residual = residual;
                c.y_is_x = y_is_x;
                c.x_pad = pads ? 16 : 0;
                c.y_pad = pads ? 5 : 0;
                c.residual_pad = pads ? 3 : 0;
                run_case(&c, &r);
            }
}

static void test_layer_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(16);
    for (int i = 0; i < 3; ++i) {
        layer_case c = normal_case(i == 2 ? 32 : 4096, 1024, 512, 64, 8);
        c.dtype = c.router_dtype = i == 1 ? MOE_FP16 : MOE_BF16;
        c.gate_up = i + 1;
        c.residual = i == 0 ? RESIDUAL : NO_RESIDUAL;
        c.score = i + 1;
        c.renormalize = i == 1;
        c.tile = MOE_TILE_AUTO;
        c.sampled = i == 2 ? 3 : 201;
        run_case(&c, &r);
    }
#endif
}

static void layer_values(void)
{
    RUN(test_layer_gates);
    RUN(test_layer_activations);
    RUN(test_layer_shared);
    RUN(test_layer_rows_dtype);
    RUN(test_layer_entries);
    RUN(test_layer_shapes);
    RUN(test_layer_ids);
    RUN(test_layer_residual);
    RUN(test_layer_large);
}

#endif
