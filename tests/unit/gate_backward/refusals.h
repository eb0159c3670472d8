/* refusals.h: bad descriptors of moe_gate_backward

   test_back_refusals  each field: its status, dlogits untouched */
#ifndef MOE_TESTS_GATE_BACKWARD_REFUSALS_H
#define MOE_TESTS_GATE_BACKWARD_REFUSALS_H

#include "tests/unit/gate_backward/case.h"

TEST_REFUSED(refused_backward, moe_gate_backward, moe_gate_backward_prepare, moe_gate_backward)

#define BACK_REFUSED(change, kind, field) REFUSED_BY(refused_backward, change, #change, kind, field)

static void test_back_refusals(void)
{
    back_case c = back_plain(40, 24, 3);
    trand r = trand_new(61);
    back_bufs b;
    moe_gate_backward_desc good, d;
    c.gate.bias = c.gate.expert_disabled = c.gate.token_disabled = c.gate.seed_offset = 1;
    c.gate.pad = 24, c.pad = 8, c.balance = 1;
    back_new(&b, &c, &r);
    good = b.d;
    BACK_REFUSED(d.gate.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    BACK_REFUSED(d.gate.num_experts = 0, MOE_ERR_RANGE, num_experts);
    BACK_REFUSED(d.gate.num_experts = MOE_MAX_EXPERTS + 1, MOE_ERR_RANGE, num_experts);
    BACK_REFUSED(d.gate.top_k = 0, MOE_ERR_RANGE, top_k);
    BACK_REFUSED(d.gate.top_k = 25, MOE_ERR_RANGE, top_k);
    BACK_REFUSED(d.gate.logits_dtype = 9, MOE_ERR_DTYPE, logits_dtype);
    BACK_REFUSED(d.gate.logits_stride = 23, MOE_ERR_STRIDE, logits_stride);
    BACK_REFUSED(d.gate.score = MOE_SCORE_PIONEER + 1, MOE_ERR_OPTION, score);
    BACK_REFUSED(d.gate.renormalize = 2, MOE_ERR_OPTION, renormalize);
    BACK_REFUSED(d.gate.scale = NAN, MOE_ERR_RANGE, scale);
    BACK_REFUSED(d.gate.temperature = -1, MOE_ERR_RANGE, temperature);
    BACK_REFUSED(d.gate.noise = NAN, MOE_ERR_RANGE, noise);
    BACK_REFUSED(d.gate.dropout = 1, MOE_ERR_RANGE, dropout);
    BACK_REFUSED(d.gate.threshold = 1, MOE_ERR_RANGE, threshold);
    BACK_REFUSED(d.gate.num_groups = 5, MOE_ERR_RANGE, num_groups);
    BACK_REFUSED((d.gate.num_groups = 4, d.gate.top_groups = 5), MOE_ERR_RANGE, top_groups);
    BACK_REFUSED(d.gate.whole_batch = 1, MOE_ERR_CONFLICT, expert_bias);
    BACK_REFUSED(d.gate.rank = -1, MOE_ERR_RANGE, rank);
    BACK_REFUSED(d.gate.rank = MOE_FAULT_MAX_RANK + 1, MOE_ERR_RANGE, rank);
    BACK_REFUSED(d.dlogits_dtype = 4, MOE_ERR_DTYPE, dlogits_dtype);
    BACK_REFUSED(d.dlogits_dtype = -1, MOE_ERR_DTYPE, dlogits_dtype);
    BACK_REFUSED(d.dlogits_stride = 23, MOE_ERR_STRIDE, dlogits_stride);
    BACK_REFUSED(d.dlogits_stride = -24, MOE_ERR_STRIDE, dlogits_stride);
    BACK_REFUSED(d.gate.logits = 0, MOE_ERR_NULL, logits);
    BACK_REFUSED(d.gate.ids = 0, MOE_ERR_NULL, ids);
    BACK_REFUSED(d.gate.weights = 0, MOE_ERR_NULL, weights);
    BACK_REFUSED(d.dlogits = 0, MOE_ERR_NULL, dlogits);
    BACK_REFUSED(d.gate.logits = AT(d.gate.logits, 2), MOE_ERR_ALIGN, logits);
    BACK_REFUSED(d.gate.ids = (int32_t*)AT(d.gate.ids, 2), MOE_ERR_ALIGN, ids);
    BACK_REFUSED(d.gate.weights = (float*)AT(d.gate.weights, 1), MOE_ERR_ALIGN, weights);
    BACK_REFUSED(d.gate.seed_offset = (const uint64_t*)AT(d.gate.seed_offset, 4), MOE_ERR_ALIGN,
                 seed_offset);
    BACK_REFUSED(d.gate.fault = (uint64_t*)AT(d.gate.fault, 4), MOE_ERR_ALIGN, fault);
    BACK_REFUSED(d.dweights = (const float*)AT(d.dweights, 2), MOE_ERR_ALIGN, dweights);
    BACK_REFUSED(d.balance_grad = (const float*)AT(d.balance_grad, 2), MOE_ERR_ALIGN, balance_grad);
    BACK_REFUSED(d.dlogits = AT(d.dlogits, 2), MOE_ERR_ALIGN, dlogits);
    BACK_REFUSED((d.dlogits_dtype = MOE_FP16, d.dlogits = AT(d.dlogits, 1)), MOE_ERR_ALIGN,
                 dlogits);
    BACK_REFUSED(d.dlogits = (void*)d.gate.logits, MOE_ERR_OVERLAP, dlogits); /* another stride */
    BACK_REFUSED(
        (d.dlogits = (void*)d.gate.logits, d.dlogits_stride = 48, d.dlogits_dtype = MOE_BF16),
        MOE_ERR_OVERLAP, dlogits);
    BACK_REFUSED((d.dlogits = AT(d.gate.logits, 4), d.dlogits_stride = 48), MOE_ERR_OVERLAP,
                 dlogits);
    BACK_REFUSED(d.dlogits = (void*)d.gate.ids, MOE_ERR_OVERLAP, dlogits);
    BACK_REFUSED(d.dlogits = (void*)d.gate.weights, MOE_ERR_OVERLAP, dlogits);
    BACK_REFUSED(d.dlogits = AT(d.gate.weights, 4 * 40 * 3 - 4), MOE_ERR_OVERLAP, dlogits);
    BACK_REFUSED(d.dlogits = (void*)d.dweights, MOE_ERR_OVERLAP, dlogits);
    BACK_REFUSED(d.dlogits = AT(d.balance_grad, 24 * 4), MOE_ERR_OVERLAP, dlogits);
    BACK_REFUSED(d.dlogits = DOWN_TO(d.gate.expert_disabled, 4), MOE_ERR_OVERLAP, dlogits);
    BACK_REFUSED(d.dlogits = DOWN_TO(d.gate.token_disabled, 4), MOE_ERR_OVERLAP, dlogits);
    BACK_REFUSED(d.dlogits = (void*)d.gate.seed_offset, MOE_ERR_OVERLAP, dlogits);
    BACK_REFUSED(d.gate.fault = (uint64_t*)UP_TO(d.dlogits, 8), MOE_ERR_OVERLAP, fault);
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.dlogits, 0), "a refused call wrote something");
    d = good; /* no tokens: no buffer is needed, nothing is written */
    d.gate.num_tokens = 0, d.gate.logits = 0, d.gate.ids = 0, d.gate.weights = 0, d.dlogits = 0;
    CHECK_STATUS(moe_gate_backward(&d, test_now.stream), MOE_OK);
    d = good; /* the gate's other outputs and its workspace are not used */
    d.gate.workspace = AT(d.dlogits, 1), d.gate.expert_count = (int32_t*)d.dlogits;
    d.gate.prob_sum = (float*)d.dlogits, d.gate.z_sum = (float*)d.dlogits;
    CHECK_STATUS(moe_gate_backward(&d, test_now.stream), MOE_OK);
    back_compare(&b, &c, 0, 0);
    back_free(&b);
}

static void gate_backward_refusals(void) { RUN(test_back_refusals); }

#endif
