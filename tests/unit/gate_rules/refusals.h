/* refusals.h: bad descriptors

   test_refusals  every option out of range, or in conflict with another */
#ifndef MOE_TESTS_GATE_RULES_REFUSALS_H
#define MOE_TESTS_GATE_RULES_REFUSALS_H

#include "tests/unit/gate_rules/case.h"

/* Every option outside its range, or beside one that it contradicts. */
static void test_refusals(void)
{
    rules_case c = plain_case(40, 24, 3);
    trand r = trand_new(11);
    rules_bufs b;
    moe_gate_desc good, d;
    c.prob = c.z = c.bias = c.expert_disabled = c.token_disabled = c.seed_offset = 1;
    c.pad = 24; /* a last row that dense strides would not reach */
    bufs_new(&b, &c, &r);
    good = b.device;
    REFUSED(d.score = MOE_SCORE_PIONEER + 1, MOE_ERR_OPTION, score);
    REFUSED_EACH(temperature, MOE_ERR_RANGE, temperature, -1, NAN, INFINITY, 1e-38f);
    REFUSED_EACH(noise, MOE_ERR_RANGE, noise, -0.1f, NAN, INFINITY);
    REFUSED_EACH(dropout, MOE_ERR_RANGE, dropout, 1, -0.5f, NAN);
    REFUSED_EACH(threshold, MOE_ERR_RANGE, threshold, 1, -1, NAN);
    REFUSED(d.threshold = 0.5f, MOE_ERR_CONFLICT, threshold);
    REFUSED_EACH(num_groups, MOE_ERR_RANGE, num_groups, -1, 5);
    REFUSED((d.num_groups = 40, d.num_experts = 80, d.logits_stride = 0), MOE_ERR_RANGE,
            num_groups);
    REFUSED(d.top_groups = 2, MOE_ERR_RANGE, top_groups);
    REFUSED((d.num_groups = 4, d.top_groups = 5), MOE_ERR_RANGE, top_groups);
    REFUSED((d.num_groups = 4, d.top_groups = -1), MOE_ERR_RANGE, top_groups);
    REFUSED((d.num_groups = 12, d.top_groups = 1), MOE_ERR_CONFLICT, top_groups);
    REFUSED_EACH(whole_batch, MOE_ERR_OPTION, whole_batch, 2, -1);
    REFUSED(d.whole_batch = 1, MOE_ERR_CONFLICT, expert_bias);
    REFUSED((d.whole_batch = 1, d.expert_bias = 0, d.noise = 1), MOE_ERR_CONFLICT, noise);
    REFUSED((d.whole_batch = 1, d.expert_bias = 0, d.dropout = 0.5f), MOE_ERR_CONFLICT, dropout);
    REFUSED((d.whole_batch = 1, d.expert_bias = 0, d.num_groups = 2, d.top_groups = 1),
            MOE_ERR_CONFLICT, num_groups);
    REFUSED((d.whole_batch = 1, d.expert_bias = 0, d.score = MOE_SCORE_SIGMOID, d.threshold = 0.5f),
            MOE_ERR_CONFLICT, threshold);
    REFUSED((d.whole_batch = 1, d.expert_bias = 0), MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.workspace = 0, MOE_ERR_NULL, workspace);
    REFUSED(d.workspace = (char*)d.workspace + 8, MOE_ERR_ALIGN, workspace);
    REFUSED(d.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.workspace = d.prob_sum - 1, MOE_ERR_OVERLAP, workspace);
    REFUSED(d.prob_sum = (float*)((char*)d.prob_sum + 2), MOE_ERR_ALIGN, prob_sum);
    REFUSED(d.expert_bias = (float*)((char*)d.expert_bias + 1), MOE_ERR_ALIGN, expert_bias);
    REFUSED(d.seed_offset = (uint64_t*)((char*)d.seed_offset + 4), MOE_ERR_ALIGN, seed_offset);
    REFUSED(d.z_sum = (float*)((char*)d.z_sum + 2), MOE_ERR_ALIGN, z_sum);
    REFUSED(d.z_sum = (float*)d.logits, MOE_ERR_OVERLAP, z_sum);
    REFUSED(d.z_sum = d.prob_sum + 23, MOE_ERR_OVERLAP, z_sum);
    REFUSED(d.workspace = (void*)((uintptr_t)d.z_sum & ~(uintptr_t)15), MOE_ERR_OVERLAP, workspace);
    REFUSED(d.prob_sum = (float*)d.logits, MOE_ERR_OVERLAP, prob_sum);
    REFUSED(d.prob_sum = (float*)d.logits + 39 * 48 + 23, MOE_ERR_OVERLAP, prob_sum);
    REFUSED(d.workspace = (void*)(((uintptr_t)d.logits + 39 * 48 * 4 + 15) & ~(uintptr_t)15),
            MOE_ERR_OVERLAP, workspace);
    REFUSED(d.prob_sum = (float*)d.expert_bias, MOE_ERR_OVERLAP, prob_sum);
    REFUSED(d.prob_sum = (float*)d.expert_bias + 23, MOE_ERR_OVERLAP, prob_sum);
    REFUSED(d.ids = (int32_t*)((uintptr_t)(d.expert_disabled + 23) & ~(uintptr_t)3),
            MOE_ERR_OVERLAP, ids);
    REFUSED(d.ids = (int32_t*)((uintptr_t)(d.token_disabled + 39) & ~(uintptr_t)3), MOE_ERR_OVERLAP,
            ids);
    REFUSED(d.ids = (int32_t*)((uintptr_t)d.expert_disabled & ~(uintptr_t)3), MOE_ERR_OVERLAP, ids);
    REFUSED(d.ids = (int32_t*)((uintptr_t)(d.token_disabled + 4) & ~(uintptr_t)3), MOE_ERR_OVERLAP,
            ids);
    REFUSED(d.weights = (float*)d.seed_offset, MOE_ERR_OVERLAP, weights);
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.ids, 0) && tbuf_holds(&b.weights, 0) && tbuf_holds(&b.prob, 0) &&
              tbuf_holds(&b.z, 0) && tbuf_holds(&b.workspace, 0) && tbuf_holds(&b.count, 0) &&
              tbuf_holds(&b.chunk, 0),
          "a refused call wrote something");
    CHECK_STATUS(moe_gate(&good, test_now.stream), MOE_OK);
    compare(&b, &c);
    bufs_free(&b);
}

static void gate_rules_refusals(void)
{
    RUN(test_refusals);
}

#endif
