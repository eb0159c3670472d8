/* values.h: results against the reference: activations, random cases, large tiles, sampled shapes. */
#ifndef MOE_TESTS_EXPERTS_BACKWARD_VALUES_H
#define MOE_TESTS_EXPERTS_BACKWARD_VALUES_H

#include "tests/unit/experts_backward/case.h"

static void test_random(void)
{
    trand r = trand_new(1);
    for (int i = 0; i < (test_long() ? 150 : 40); ++i) {
        const backward_case c = random_case(&r, 40);
        run_case(&c, &r);
    }
}

/* Every activation, in every layout of gate and up, one product at a time and with copies. */
static void test_activations(void)
{
    trand r = trand_new(2);
    for (int activation = MOE_ACTIVATION_NONE; activation <= MOE_ACTIVATION_RELU2; ++activation)
        for (int gate_up = MOE_GATE_UP_CONCATENATED; gate_up <= MOE_GATE_UP_SEPARATE; ++gate_up) {
            backward_case c = normal_case(30, 40, 24, 4, 2);
            if (gate_up > 1 && !moe_activation_is_gated(activation)) continue;
            c.activation = activation, c.gate_up = gate_up;
            c.gathered = gate_up == MOE_GATE_UP_SEPARATE;
            if (activation == MOE_ACTIVATION_SWIGLU_CLAMPED) c.alpha = 1.3f, c.limit = 1;
            run_case(&c, &r);
        }
}

/* Rows of an expert around the tiles' edges, on the paths that this device has; also with w2
   frozen and the gradient written over pre. */
static void test_row_counts(void)
{
    static const int tokens[] = {1, 2, 63, 64, 65, 127, 128, 129, 200};
    trand r = trand_new(3);
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; ++i)
        for (int path = 0; path <= MOE_GEMM_PATH_WGMMA; path += MOE_GEMM_PATH_WGMMA) {
            backward_case c = normal_case(tokens[i], 72, 40, 3, 1);
            c.one = i % 2, c.gathered = (int)(i + path) % 2, c.tile = 0, c.path = path;
            if (i % 3 == 2) c.own_dpre = 0, c.left_out = 1 << DW2;
            run_case(&c, &r);
        }
}

/* Shapes at the edge: no tokens, one token, K = E, one expert. */
static void test_edges(void)
{
    static const int shape[][5] = {
        {0, 16, 8, 3, 2}, {1, 8, 8, 1, 1}, {3, 8, 16, 5, 5}, {70, 24, 8, 1, 1}};
    trand r = trand_new(4);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; ++i)
        for (int in_order = 0; in_order < 2; ++in_order) {
            backward_case c =
                normal_case(shape[i][0], shape[i][1], shape[i][2], shape[i][3], shape[i][4]);
            c.in_order = in_order;
            run_case(&c, &r);
        }
}

static void experts_backward_values(void)
{
    RUN(test_random);
    RUN(test_activations);
    RUN(test_row_counts);
    RUN(test_edges);
}

#endif
