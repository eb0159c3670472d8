/* test_mlp.h: what the tests of the experts and of the layer share: the MLP's sizes, its
   reference, its routing. */
#ifndef MOE_TESTS_TEST_MLP_H
#define MOE_TESTS_TEST_MLP_H

#include "tests/test.h"
#include "tests/test_weights.h"

#include "moe/ref/experts.h"
#include "moe/ref/route.h"

/* Returns the parameters of an MLP of these sizes; weights k-major, in one allocation, dense. */
MOEI_UNUSED static tmlp_want tmlp_sizes(int experts, int hidden, int intermediate, int dtype,
                                        int activation, int gate_up)
{
    tmlp_want w = {};
    w.experts = experts, w.hidden = hidden, w.intermediate = intermediate;
    w.dtype = dtype, w.activation = activation, w.gate_up = gate_up;
    w.major1 = w.major2 = MOE_MAJOR_K;
    return w;
}

/* Requires that a plan of two products refuses each null argument. */
#define CHECK_PLAN_NULL(plan, desc_)                                                               \
    do {                                                                                           \
        moe_gemm_plan up_, down_;                                                                  \
        CHECK_STATUS(plan(0, &up_, &down_), MOE_STATUS(MOE_ERR_NULL, desc));                       \
        CHECK_STATUS(plan(desc_, 0, &down_), MOE_STATUS(MOE_ERR_NULL, desc));                      \
        CHECK_STATUS(plan(desc_, &up_, 0), MOE_STATUS(MOE_ERR_NULL, desc));                        \
    } while (0)

/* Returns a reference's descriptor with the weights and, where asked for, the biases of m. All
   dtypes are this one. */
MOEI_UNUSED static moe_ref_experts_desc tmlp_ref(const tmlp* m, int dtype, int bias1, int bias2)
{
    moe_ref_experts_desc d = {};
    d.w1 = tweights_host(&m->w1), d.w2 = tweights_host(&m->w2);
    d.bias1 = bias1 ? m->h_bias1 : (void*)0, d.bias2 = bias2 ? m->h_bias2 : (void*)0;
    d.x_dtype = d.w_dtype = d.bias_dtype = dtype;
    return d;
}

/* Routes ids [T, K] without options. Writes offset [E + 1], row_slot [T * K] and, where it is not
   null, place [T * K]. */
MOEI_UNUSED static void tmlp_route(const int32_t* ids, int T, int E, int K, int32_t* offset,
                                   int32_t* row_slot, moe_place* place)
{
    moe_ref_route_desc d = {};
    d.ids = ids;
    d.expert_count = (int32_t*)test_host(E * 4);
    d.expert_offset = offset, d.row_slot = row_slot, d.place = place;
    d.num_tokens = T, d.num_experts = E, d.top_k = K;
    moe_ref_route(&d);
    free(d.expert_count);
}

#endif
