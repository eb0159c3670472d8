/* refusals.h: bad descriptors: each field has its own status, and nothing is written. */
#ifndef MOE_TESTS_EXPERTS_BACKWARD_REFUSALS_H
#define MOE_TESTS_EXPERTS_BACKWARD_REFUSALS_H

#include "tests/unit/experts_backward/replay.h"

TEST_REFUSED(refused, moe_experts_backward, moe_experts_backward_prepare, moe_experts_backward)

static void test_refused(void)
{
    trand r = trand_new(21);
    backward_case c = normal_case(20, 64, 40, 4, 2);
    backward_bufs b;
    moe_experts_backward_desc good, d;
    c.gathered = 1, c.own_dpre = 1;
    bufs_new(&b, &c, &r);
    good = b.d;
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED(d.num_tokens = INT32_MAX, MOE_ERR_RANGE, num_rows);
    REFUSED((d.num_tokens = INT32_MAX, d.num_rows = 40), MOE_ERR_RANGE, num_tokens);
    REFUSED_EACH(top_k, MOE_ERR_RANGE, top_k, 0, -1);
    REFUSED_EACH(num_rows, MOE_ERR_RANGE, num_rows, -1, INT32_MAX);
    REFUSED_EACH(hidden, MOE_ERR_RANGE, hidden, 0, -64, (1 << 28) + 8);
    REFUSED(d.hidden = 60, MOE_ERR_MULTIPLE, hidden);
    REFUSED_EACH(intermediate, MOE_ERR_RANGE, intermediate, 0, -8, (1 << 27) + 8);
    REFUSED(d.intermediate = 36, MOE_ERR_MULTIPLE, intermediate);
    REFUSED_NUM_EXPERTS();
    REFUSED_EACH(dtype, MOE_ERR_DTYPE, dtype, MOE_FP32, 4, -1);
    REFUSED_EACH(rows_dtype, MOE_ERR_DTYPE, rows_dtype, 4, -1);
    REFUSED_EACH(grad_dtype, MOE_ERR_DTYPE, grad_dtype, 4, -1);
    REFUSED_EACH(gate_up, MOE_ERR_OPTION, gate_up, 4, -1);
    REFUSED_EACH(activation, MOE_ERR_OPTION, activation, MOE_ACTIVATION_RELU2 + 1, -1);
    REFUSED_EACH(alpha, MOE_ERR_CONFLICT, alpha, 1, 1.702f);
    REFUSED_EACH(limit, MOE_ERR_CONFLICT, limit, 1, 7);
    REFUSED_EACH(accumulate, MOE_ERR_OPTION, accumulate, 2, -1);
    REFUSED_EACH(rows_accumulate, MOE_ERR_OPTION, rows_accumulate, 2, -1);
    REFUSED_EACH(empty_experts, MOE_ERR_OPTION, empty_experts, 2, -1);
    REFUSED_EACH(tile, MOE_ERR_OPTION, tile, 99, -1);
    REFUSED_EACH(path, MOE_ERR_OPTION, path, 9, -1);
    REFUSED_EACH(batch_invariant, MOE_ERR_OPTION, batch_invariant, 2, -1);
    REFUSED(d.grid_limit = -1, MOE_ERR_RANGE, grid_limit);
    REFUSED_EACH(w1.major, MOE_ERR_OPTION, w1, 3, -1);
    REFUSED_EACH(w2.major, MOE_ERR_OPTION, w2, 3, -1);
    REFUSED(d.w1.up = d.w1.base, MOE_ERR_CONFLICT, w1);
    REFUSED(d.w2.up = d.w1.base, MOE_ERR_CONFLICT, w2);
    REFUSED(d.dw1.up = d.dw1.base, MOE_ERR_CONFLICT, dw1);
    REFUSED(d.dw2.up = d.dw1.base, MOE_ERR_CONFLICT, dw2);
    REFUSED((d.gate_up = MOE_GATE_UP_INTERLEAVED, d.w1.major = MOE_MAJOR_MN), MOE_ERR_CONFLICT,
            gate_up);
    REFUSED((d.gate_up = MOE_GATE_UP_INTERLEAVED, d.w1.table = (const void* const*)b.offset.p,
             d.w1.base = 0),
            MOE_ERR_CONFLICT, gate_up);
    REFUSED(d.gate_up = MOE_GATE_UP_SEPARATE, MOE_ERR_NULL, w1);
    REFUSED_EACH(x_stride, MOE_ERR_STRIDE, x_stride, 56, -64);
    REFUSED(d.x_stride = 68, MOE_ERR_ALIGN, x_stride);
    REFUSED_EACH(dy_stride, MOE_ERR_STRIDE, dy_stride, 56, -64);
    REFUSED(d.dy_stride = 68, MOE_ERR_ALIGN, dy_stride);
    REFUSED_EACH(row_stride, MOE_ERR_STRIDE, row_stride, 56, -64);
    REFUSED(d.row_stride = 68, MOE_ERR_ALIGN, row_stride);
    REFUSED(d.w1.row_stride = 56, MOE_ERR_STRIDE, w1);
    REFUSED(d.w2.row_stride = 32, MOE_ERR_STRIDE, w2);
    REFUSED(d.dw1.row_stride = 56, MOE_ERR_STRIDE, dw1);
    REFUSED(d.dw2.row_stride = 32, MOE_ERR_STRIDE, dw2);
    REFUSED(d.row_slot = 0, MOE_ERR_CONFLICT, row_slot);
    REFUSED((d.x_rows = 0, d.x = 0), MOE_ERR_NULL, x);
    REFUSED(d.dy = 0, MOE_ERR_NULL, dy);
    REFUSED(d.pre = 0, MOE_ERR_NULL, pre);
    REFUSED(d.row_weight = 0, MOE_ERR_NULL, row_weight);
    REFUSED(d.w1.base = 0, MOE_ERR_NULL, w1);
    REFUSED(d.w2.base = 0, MOE_ERR_NULL, w2);
    REFUSED(d.slot_row = 0, MOE_ERR_NULL, slot_row);
    REFUSED(d.expert_offset = 0, MOE_ERR_NULL, expert_offset);
    REFUSED(d.act = 0, MOE_ERR_NULL, act);
    REFUSED(d.dot = 0, MOE_ERR_NULL, dot);
    REFUSED(d.x = AT(d.x, 8), MOE_ERR_ALIGN, x);
    REFUSED(d.dy = AT(d.dy, 8), MOE_ERR_ALIGN, dy);
    REFUSED(d.x_rows = AT(d.x_rows, 8), MOE_ERR_ALIGN, x_rows);
    REFUSED(d.dy_rows = AT(d.dy_rows, 8), MOE_ERR_ALIGN, dy_rows);
    REFUSED(d.pre = AT(d.pre, 8), MOE_ERR_ALIGN, pre);
    REFUSED(d.weights = (const float*)AT(d.weights, 2), MOE_ERR_ALIGN, weights);
    REFUSED(d.bias2 = AT(d.bias2, 1), MOE_ERR_ALIGN, bias2);
    REFUSED(d.rows = AT(d.rows, 8), MOE_ERR_ALIGN, rows);
    REFUSED(d.dw1.base = AT(d.dw1.base, 8), MOE_ERR_ALIGN, dw1);
    REFUSED(d.dw2.base = AT(d.dw2.base, 8), MOE_ERR_ALIGN, dw2);
    REFUSED(d.dbias1 = AT(d.dbias1, 2), MOE_ERR_ALIGN, dbias1);
    REFUSED(d.dbias2 = AT(d.dbias2, 2), MOE_ERR_ALIGN, dbias2);
    REFUSED(d.dweights = (float*)AT(d.dweights, 2), MOE_ERR_ALIGN, dweights);
    REFUSED(d.dpre = AT(d.dpre, 8), MOE_ERR_ALIGN, dpre);
    REFUSED(d.act = AT(d.act, 8), MOE_ERR_ALIGN, act);
    REFUSED(d.dot = (float*)AT(d.dot, 2), MOE_ERR_ALIGN, dot);
    REFUSED(d.rows = (void*)d.x, MOE_ERR_OVERLAP, rows);
    REFUSED(d.rows = AT(d.dy_rows, 64), MOE_ERR_OVERLAP, rows);
    REFUSED(d.dpre = AT(d.pre, 16), MOE_ERR_OVERLAP, dpre);
    REFUSED(d.dw1.base = (void*)d.w1.base, MOE_ERR_OVERLAP, dw1);
    REFUSED(d.dw2.base = (void*)d.dw1.base, MOE_ERR_OVERLAP, dw2);
    REFUSED(d.dweights = (float*)d.weights, MOE_ERR_OVERLAP, dweights);
    REFUSED(d.workspace = AT(d.workspace, 8), MOE_ERR_ALIGN, workspace);
    REFUSED(--d.workspace_bytes, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED_RANK_AND_FAULT();
    CHECK_STATUS(moe_experts_backward(0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_experts_backward_prepare(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_experts_backward_run(0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK(tbufs_untouched(ALL_RESULTS(&b)) && tbufs_untouched(TBUFS(&b.dpre, &b.act, &b.dot)),
          "outputs of refused calls");
    bufs_free(&b);
}

static void experts_backward_refusals(void) { RUN(test_refused); }

#endif
