/* test_mlp.h: what the tests of the experts and of the layer share: the MLP's sizes, its
   reference, its routing. */
#ifndef MOE_TESTS_TEST_MLP_H
#define MOE_TESTS_TEST_MLP_H

#include "tests/test.h"
#include "tests/test_case.h"
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

/* Defines `name`, which requires that the plan and what `calls_refuse` calls refuse d alike. Runs
   nothing where the plan accepts d: its addresses may be of no buffer. */
#define TEST_REFUSED_PLAN(name, plan, calls_refuse, type)                                          \
    static void name(const type##_desc* d, moe_status want, const trefusal* at)                    \
    {                                                                                              \
        moe_gemm_plan up, down;                                                                    \
        const moe_status s = plan(d, &up, &down);                                                  \
        test_status_at(at, s, want, #plan);                                                        \
        if (s != MOE_OK) calls_refuse(d, want, at);                                                \
    }

/* What the experts and the layer refuse alike, with H = 64, I = 40, biases, weights in one
   allocation. */
#define REFUSED_MLP()                                                                              \
    do {                                                                                           \
        const void* const* const far_ = (const void* const*)TEST_FAR;                              \
        const void* const* const off_ = (const void* const*)AT(TEST_FAR, 4);                       \
        REFUSED_EACH(hidden, MOE_ERR_RANGE, hidden, 0, -64);                                       \
        REFUSED(d.hidden = 60, MOE_ERR_MULTIPLE, hidden);                                          \
        REFUSED_EACH(intermediate, MOE_ERR_RANGE, intermediate, 0, -8);                            \
        REFUSED(d.intermediate = 36, MOE_ERR_MULTIPLE, intermediate);                              \
        REFUSED_NUM_EXPERTS();                                                                     \
        REFUSED_EACH(dtype, MOE_ERR_DTYPE, dtype, MOE_FP32, 4, -1);                                \
        REFUSED_EACH(rows_dtype, MOE_ERR_DTYPE, rows_dtype, 4, -1,                                 \
                     test_half() == MOE_FP16 ? MOE_BF16 : MOE_FP16);                               \
        REFUSED_EACH(gate_up, MOE_ERR_OPTION, gate_up, 4, -1);                                     \
        REFUSED_EACH(activation, MOE_ERR_OPTION, activation, MOE_ACTIVATION_RELU2 + 1, -1);        \
        REFUSED_EACH(alpha, MOE_ERR_CONFLICT, alpha, 1, 1.702f);                                   \
        REFUSED_EACH(limit, MOE_ERR_CONFLICT, limit, 1, 7);                                        \
        REFUSED((d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED, d.alpha = NAN), MOE_ERR_RANGE,      \
                alpha);                                                                            \
        REFUSED((d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED, d.limit = NAN), MOE_ERR_RANGE,      \
                limit);                                                                            \
        REFUSED((d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED, d.limit = -1), MOE_ERR_RANGE,       \
                limit);                                                                            \
        REFUSED_EACH(tile, MOE_ERR_OPTION, tile, 99, -1);                                          \
        REFUSED_EACH(x_stride, MOE_ERR_STRIDE, x_stride, 56, -64);                                 \
        REFUSED(d.x_stride = 68, MOE_ERR_ALIGN, x_stride);                                         \
        REFUSED_EACH(w1.major, MOE_ERR_OPTION, w1, 3, -1);                                         \
        REFUSED_EACH(w2.major, MOE_ERR_OPTION, w2, 3, -1);                                         \
        REFUSED(d.w1.row_stride = 56, MOE_ERR_STRIDE, w1);                                         \
        REFUSED(d.w2.row_stride = 32, MOE_ERR_STRIDE, w2);                                         \
        REFUSED(d.w1.row_stride = 68, MOE_ERR_ALIGN, w1);                                          \
        REFUSED(d.w2.row_stride = 44, MOE_ERR_ALIGN, w2);                                          \
        REFUSED_EACH(w1.expert_stride, MOE_ERR_STRIDE, w1, -8, -64);                               \
        REFUSED_EACH(w2.expert_stride, MOE_ERR_STRIDE, w2, -8, -64);                               \
        REFUSED_EACH(w1.expert_stride, MOE_ERR_ALIGN, w1, 4, 64 * 40 + 1);                         \
        REFUSED_EACH(w2.expert_stride, MOE_ERR_ALIGN, w2, 4, 64 * 40 + 4);                         \
        REFUSED(d.w1.table = far_, MOE_ERR_CONFLICT, w1);                                          \
        REFUSED(d.w2.table = far_, MOE_ERR_CONFLICT, w2);                                          \
        REFUSED((d.w1.base = 0, d.w1.table = off_), MOE_ERR_ALIGN, w1);                            \
        REFUSED((d.w2.base = 0, d.w2.table = off_), MOE_ERR_ALIGN, w2);                            \
        REFUSED(d.x = 0, MOE_ERR_NULL, x);                                                         \
        REFUSED(d.w1.base = 0, MOE_ERR_NULL, w1);                                                  \
        REFUSED(d.w2.base = 0, MOE_ERR_NULL, w2);                                                  \
        REFUSED(d.x = AT(d.x, 8), MOE_ERR_ALIGN, x);                                               \
        REFUSED(d.w1.base = AT(d.w1.base, 8), MOE_ERR_ALIGN, w1);                                  \
        REFUSED(d.w2.base = AT(d.w2.base, 8), MOE_ERR_ALIGN, w2);                                  \
        REFUSED(d.bias1 = AT(d.bias1, 1), MOE_ERR_ALIGN, bias1);                                   \
        REFUSED(d.bias2 = AT(d.bias2, 1), MOE_ERR_ALIGN, bias2);                                   \
        REFUSED_RANK_AND_FAULT();                                                                  \
        REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);    \
    } while (0)

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
