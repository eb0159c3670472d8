/* values.h: the block layer against its reference in double, forward and backward.

     test_reference_gradients  the reference itself: gradients against the slope of a loss
     test_forms                each form, few tokens, all dtypes, tables, pads, dx in place
     test_blocks               each size of sparse blocks
     test_large                more of everything
     test_ids                  ids of -1 or out of range, all or none; one expert; many experts
     test_max_experts          dw1 and dw2 with room for the active experts alone, and for more */
#ifndef MOE_TESTS_BLOCK_LAYER_VALUES_H
#define MOE_TESTS_BLOCK_LAYER_VALUES_H

#include "tests/unit/block_layer/compare.h"

/* Moves x, w1, w2 and the weights at once along a random direction. */
static void test_reference_gradients(void)
{
    trand r = trand_new(1);
    for (int activation = MOE_ACTIVATION_NONE; activation <= MOE_ACTIVATION_RELU2; ++activation)
        for (int dense = 0; dense < 2; ++dense) {
            enum { T = 5, H = 6, I = 7, E = 4, K = 3, MOST = 4096 };
            const int k = dense ? E : K, U = moe_activation_is_gated(activation) ? 2 * I : I;
            const double move = 1e-5;
            int32_t ids[T * K];
            static double in[4][MOST], dir[4][MOST], at[4][MOST], grad[4][MOST];
            double dy[T * H], y[T * H];
            const int64_t count[4] = {T * H, E * U * H, E * H * I, T * k};
            double loss[2] = {0, 0}, slope = 0, sum = 0;
            moe_ref_block_layer_desc d;
            memset(&d, 0, sizeof d);
            for (int i = 0; i < T * K; ++i) ids[i] = (int)trand_int(&r, -1, E - 1);
            for (int i = 0; i < T * H; ++i) dy[i] = trand_normal(&r);
            for (int i = 0; i < 4; ++i)
                for (int64_t j = 0; j < count[i]; ++j) {
                    in[i][j] = trand_normal(&r) * (i == 1 || i == 2 ? 0.6 : 1);
                    dir[i][j] = trand_normal(&r);
                }
            d.ids = dense ? (const int32_t*)0 : ids;
            d.dy = dy;
            d.x_dtype = d.dy_dtype = d.weights_dtype = d.w_dtype = MOE_REF_REAL;
            d.activation = activation;
            if (activation == MOE_ACTIVATION_SWIGLU_CLAMPED) d.alpha = 1.3f, d.limit = 1.1f;
            d.num_tokens = T, d.num_experts = E, d.top_k = k, d.hidden = H, d.intermediate = I;
            for (int side = -1; side <= 1; ++side) {
                for (int i = 0; i < 4; ++i)
                    for (int64_t j = 0; j < count[i]; ++j)
                        at[i][j] = in[i][j] + side * move * dir[i][j];
                d.x = at[0];
                d.w1.base = at[1];
                d.w2.base = at[2];
                d.weights = at[3];
                if (side == 0) {
                    moe_ref_block_layer_f64(&d, y, grad[0], grad[1], grad[2], grad[3]);
                    continue;
                }
                moe_ref_block_layer_f64(&d, y, 0, 0, 0, 0);
                for (int i = 0; i < T * H; ++i) loss[side > 0] += y[i] * dy[i];
            }
            for (int i = 0; i < 4; ++i)
                for (int64_t j = 0; j < count[i]; ++j) {
                    slope += grad[i][j] * dir[i][j];
                    sum += fabs(grad[i][j] * dir[i][j]);
                }
            /* kinks of the clamp and of ReLU^2's slope may lie within a move */
            CHECK(fabs((loss[1] - loss[0]) / (2 * move) - slope) <= 1e-4 * sum && sum > 1,
                  "activation %d: %g, not %g", activation, slope, (loss[1] - loss[0]) / (2 * move));
        }
}

static void test_forms(void)
{
    static const int tokens[] = {1, 2, 15, 16, 17, 37};
    trand r = trand_new(2);
    for (int form = DENSE; form <= BATCH; ++form)
        for (size_t i = 0; i < sizeof tokens / sizeof tokens[0]; ++i) {
            layer_case c = normal_case(form, tokens[i], 24, 32, 5, (int)(1 + i % 3));
            if (i % 2) c.dtype = c.grad_dtype = MOE_FP16;
            if (i % 3 == 1) c.grad_dtype = MOE_FP32;
            c.table = i % 2 == 0;
            c.pad = i % 3 == 2 ? 8 : 0;
            c.own_act_grad = i % 3 == 0;
            c.in_place = i % 4 == 3;
            if (form != DENSE) c.unused = i % 3 == 0 ? 0 : 20;
            run_case(&c, &r);
        }
}

static void test_blocks(void)
{
    static const int block[] = {16, 32, 64, 128};
    trand r = trand_new(3);
    for (int form = DENSE; form <= BATCH; ++form)
        for (int i = 0; i < 4; ++i) {
            layer_case c = normal_case(form, block[i] + 3, 16 + 8 * i,
                                       block[i] < 64 ? 3 * block[i] : block[i], 3, 2);
            c.block = block[i];
            c.activation = i % 2 ? MOE_ACTIVATION_GELU : MOE_ACTIVATION_SWIGLU;
            c.grad_dtype = MOE_FP32;
            run_case(&c, &r);
        }
}

static void test_large(void)
{
    trand r = trand_new(6);
    for (int form = DENSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, MOE_ON_HOST ? 70 : 700, MOE_ON_HOST ? 64 : 256,
                                   MOE_ON_HOST ? 64 : 256, MOE_ON_HOST ? 6 : 16, 3);
        c.block = MOE_ON_HOST ? 32 : 64;
        run_case(&c, &r);
    }
}

static void test_ids(void)
{
    trand r = trand_new(7);
    for (int form = SPARSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 33, 24, 32, 7, 3);
        c.unused = 30;
        c.bad = 20;
        run_case(&c, &r);
        c.unused = 97;
        c.bad = 0;
        run_case(&c, &r);
        c.unused = 100; /* all of them */
        run_case(&c, &r);
        c.unused = 0;
        c.bad = 100;
        run_case(&c, &r);
        c.bad = 0;
        c.one_expert = 1; /* all slots have one expert */
        run_case(&c, &r);
        c.one_expert = 0;
        c.experts = 3; /* experts 3 .. 6 have no rows */
        run_case(&c, &r);
        c = normal_case(form, 20, 24, 16, 2, 5); /* more choices than experts */
        c.one_expert = 1;
        run_case(&c, &r);
        c = normal_case(form, 19, 16, 16, 1, 1);
        run_case(&c, &r);
        c = normal_case(form, 9, 16, 16, 70, 2); /* more experts than block rows */
        run_case(&c, &r);
    }
}

static void test_max_experts(void)
{
    trand r = trand_new(8);
    for (int form = SPARSE; form <= BATCH; ++form) {
        layer_case c = normal_case(form, 33, 24, 32, 8, 3);
        c.experts = 3;
        c.max_experts = 3;
        run_case(&c, &r);
        c.max_experts = 5; /* the last ones stay empty */
        c.grad_dtype = MOE_FP32;
        run_case(&c, &r);
    }
}

static void block_layer_values(void)
{
    RUN(test_reference_gradients);
    RUN(test_forms);
    RUN(test_blocks);
    RUN(test_large);
    RUN(test_ids);
    RUN(test_max_experts);
}

#endif
