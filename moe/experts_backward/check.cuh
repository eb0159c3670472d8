/* check.cuh: checks a descriptor of the experts' backward pass (desc.h). Host code. Called by
   experts_backward.cuh. */
#ifndef MOE_EXPERTS_BACKWARD_CHECK_CUH
#define MOE_EXPERTS_BACKWARD_CHECK_CUH

#include <string.h>

#include "../activation.cuh"
#include "../base/check.h"
#include "../fields.h"
#include "desc.h"

/* Returns 1 where a gradient of weights is asked for. */
MOE_HOST int moei_grads_given(const moe_weight_grads* g)
{
    return g->base || g->table || g->up || g->up_table;
}

/* Returns the columns of pre: those of gate and up together, or I. */
MOE_HOST int64_t moei_experts_backward_width(const moe_experts_backward_desc* d)
{
    return moe_activation_is_gated(d->activation) ? 2 * (int64_t)d->intermediate : d->intermediate;
}

/* Refuses sizes and options that the header does not offer, and fills in the defaults. */
MOE_HOST moe_status moei_experts_backward_check_options(moe_experts_backward_desc* d)
{
    int64_t num_rows = d->num_rows;
    int gated;
    MOE_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->top_k >= 1 || (d->top_k == 0 && !d->row_slot), MOE_ERR_RANGE, top_k);
    MOE_REQUIRE(num_rows >= 0, MOE_ERR_RANGE, num_rows);
    if (num_rows == 0) num_rows = (int64_t)d->num_tokens * d->top_k;
    MOE_REQUIRE(num_rows <= MOE_GEMM_MAX_ROWS - 256, MOE_ERR_RANGE, num_rows);
    d->num_rows = (int32_t)num_rows;
    if (!d->row_slot) d->top_k = 1; /* slots are rows */
    MOE_REQUIRE((int64_t)d->num_tokens * d->top_k <= 0x7fffffff, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(!d->row_slot || d->num_tokens > 0 || num_rows == 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(d->hidden >= 1 && d->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(d->hidden % 8 == 0, MOE_ERR_MULTIPLE, hidden);
    MOE_REQUIRE(d->intermediate >= 1 && d->intermediate <= 1 << 27, MOE_ERR_RANGE, intermediate);
    MOE_REQUIRE(d->intermediate % 8 == 0, MOE_ERR_MULTIPLE, intermediate);
    if (d->dtype == 0) d->dtype = MOE_BF16;
    MOE_REQUIRE(d->dtype == MOE_BF16 || d->dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    if (d->rows_dtype == 0) d->rows_dtype = d->dtype;
    MOE_REQUIRE(d->rows_dtype == d->dtype || d->rows_dtype == MOE_FP32, MOE_ERR_DTYPE, rows_dtype);
    if (d->grad_dtype == 0) d->grad_dtype = d->dtype;
    MOE_REQUIRE(d->grad_dtype == d->dtype || d->grad_dtype == MOE_FP32, MOE_ERR_DTYPE, grad_dtype);
    if (d->activation == 0) d->activation = MOE_ACTIVATION_SWIGLU;
    MOE_TRY(moei_activation_check(d->activation, &d->alpha, &d->limit));
    gated = moe_activation_is_gated(d->activation);
    if (d->gate_up == 0) d->gate_up = MOE_GATE_UP_CONCATENATED;
    MOE_REQUIRE(d->gate_up >= 0 && d->gate_up <= MOE_GATE_UP_SEPARATE, MOE_ERR_OPTION, gate_up);
    if (!gated) d->gate_up = MOE_GATE_UP_CONCATENATED;
    if (d->gate_up == MOE_GATE_UP_INTERLEAVED)
        MOE_REQUIRE(!d->w1.table && !d->dw1.table && d->w1.major != MOE_MAJOR_MN, MOE_ERR_CONFLICT,
                    gate_up);
    if (d->w1.major == 0) d->w1.major = MOE_MAJOR_K;
    MOE_REQUIRE(d->w1.major == MOE_MAJOR_K || d->w1.major == MOE_MAJOR_MN, MOE_ERR_OPTION, w1);
    if (d->w2.major == 0) d->w2.major = MOE_MAJOR_K;
    MOE_REQUIRE(d->w2.major == MOE_MAJOR_K || d->w2.major == MOE_MAJOR_MN, MOE_ERR_OPTION, w2);
    MOE_REQUIRE(d->gate_up == MOE_GATE_UP_SEPARATE || (!d->w1.up && !d->w1.up_table),
                MOE_ERR_CONFLICT, w1);
    MOE_REQUIRE(d->gate_up == MOE_GATE_UP_SEPARATE || (!d->dw1.up && !d->dw1.up_table),
                MOE_ERR_CONFLICT, dw1);
    MOE_REQUIRE(!d->w2.up && !d->w2.up_table, MOE_ERR_CONFLICT, w2);
    MOE_REQUIRE(!d->dw2.up && !d->dw2.up_table, MOE_ERR_CONFLICT, dw2);
    MOE_REQUIRE((d->accumulate | 1) == 1, MOE_ERR_OPTION, accumulate);
    MOE_REQUIRE((d->empty_experts | 1) == 1, MOE_ERR_OPTION, empty_experts);
    if (d->x_stride == 0) d->x_stride = d->hidden;
    if (d->dy_stride == 0) d->dy_stride = d->hidden;
    {
        const int64_t rows = d->row_slot ? d->num_tokens : d->num_rows;
        MOE_REQUIRE(moei_stride_fits(d->x_stride, d->hidden, rows), MOE_ERR_STRIDE, x_stride);
        MOE_REQUIRE(d->x_stride % 8 == 0, MOE_ERR_ALIGN, x_stride);
        MOE_REQUIRE(moei_stride_fits(d->dy_stride, d->hidden, rows), MOE_ERR_STRIDE, dy_stride);
        MOE_REQUIRE(d->dy_stride % 8 == 0, MOE_ERR_ALIGN, dy_stride);
    }
    if (d->row_stride == 0) d->row_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->row_stride, d->hidden, d->num_rows), MOE_ERR_STRIDE,
                row_stride);
    MOE_REQUIRE(d->row_stride % 8 == 0, MOE_ERR_ALIGN, row_stride);
    MOE_REQUIRE((d->rows_accumulate | 1) == 1, MOE_ERR_OPTION, rows_accumulate);
    MOE_REQUIRE(d->row_slot || (!d->x_rows && !d->dy_rows), MOE_ERR_CONFLICT, row_slot);
    MOE_REQUIRE(!d->workspace || d->workspace_bytes >= MOE_EXPERTS_BACKWARD_WORKSPACE,
                MOE_ERR_WORKSPACE, workspace_bytes);
    MOEI_REQUIRE_RANK(d);
    return MOE_OK;
}

/* Returns the bytes of gradients laid out as weights [experts, n, k]. */
MOE_HOST uint64_t moei_grads_extent(const moe_weight_grads* g, int major, int64_t experts,
                                    int64_t n, int64_t k, int dtype)
{
    moe_weights w;
    memset(&w, 0, sizeof w);
    w.expert_stride = g->expert_stride;
    w.row_stride = g->row_stride;
    w.major = major;
    return moei_weight_extent(&w, experts, n, k) * (dtype == MOE_FP32 ? 2u : 1u);
}

/* Refuses buffers that are absent, misaligned or overlap. Requires checked options. */
MOE_HOST moe_status moei_experts_backward_check_buffers(const moe_experts_backward_desc* d)
{
    const int64_t hidden = d->hidden, intermediate = d->intermediate, experts = d->num_experts;
    const int64_t num_rows = d->num_rows, width = moei_experts_backward_width(d);
    const int64_t matrix = d->gate_up == MOE_GATE_UP_SEPARATE ? intermediate : width;
    const int64_t from = d->row_slot ? d->num_tokens : num_rows; /* rows of x and dy */
    const uint64_t slots = (uint64_t)from * (uint64_t)d->top_k, table = (uint64_t)experts * 8;
    const uint64_t rows = (uint64_t)(num_rows * hidden), grad = d->grad_dtype == MOE_FP32 ? 4 : 2;
    const uint64_t pre = (uint64_t)(num_rows * width) * 2;
    const uint64_t w1 = moei_weight_extent(&d->w1, experts, matrix, hidden);
    const uint64_t dw1 =
        moei_grads_extent(&d->dw1, d->w1.major, experts, matrix, hidden, d->grad_dtype);
    const uint64_t dw2 =
        moei_grads_extent(&d->dw2, d->w2.major, experts, hidden, intermediate, d->grad_dtype);
    const int wants_w1 = d->rows != 0, separate = d->gate_up == MOE_GATE_UP_SEPARATE;
    const int required = MOE_BUFFER_REQUIRED, written = MOE_BUFFER_WRITTEN;
    const moe_buffer b[] = {
        {d->x, moe_extent(from, d->x_stride, hidden, d->dtype), 16,
         moei_grads_given(&d->dw1) && !d->x_rows ? required : MOE_BUFFER_READ, MOE_FIELD_x},
        {d->dy, d->dy == d->rows ? 0 : moe_extent(from, d->dy_stride, hidden, d->dtype), 16,
         required, MOE_FIELD_dy},
        {d->x_rows, d->x_rows == d->rows || d->x_rows == d->dy_rows ? 0 : rows * 2, 16,
         MOE_BUFFER_READ, MOE_FIELD_x_rows},
        {d->dy_rows, d->dy_rows == d->rows ? 0 : rows * 2, 16, MOE_BUFFER_READ, MOE_FIELD_dy_rows},
        {d->weights, slots * 4, 4, MOE_BUFFER_READ, MOE_FIELD_weights},
        {d->row_weight, (uint64_t)num_rows * 4, 4,
         d->dy_rows && d->weights ? required : MOE_BUFFER_READ, MOE_FIELD_row_weight},
        {d->w1.base, w1, 16, wants_w1 && !d->w1.table ? required : MOE_BUFFER_READ, MOE_FIELD_w1},
        {d->w1.up, w1, 16, wants_w1 && separate && !d->w1.up_table ? required : MOE_BUFFER_READ,
         MOE_FIELD_w1},
        {d->w1.table, table, 8, MOE_BUFFER_READ, MOE_FIELD_w1},
        {d->w1.up_table, table, 8, MOE_BUFFER_READ, MOE_FIELD_w1},
        {d->w2.base, moei_weight_extent(&d->w2, experts, hidden, intermediate), 16,
         d->w2.table ? MOE_BUFFER_READ : required, MOE_FIELD_w2},
        {d->w2.table, table, 8, MOE_BUFFER_READ, MOE_FIELD_w2},
        {d->bias2, (uint64_t)(experts * hidden) * 2, 2, MOE_BUFFER_READ, MOE_FIELD_bias2},
        {d->row_slot, (uint64_t)num_rows * 4, 4, MOE_BUFFER_READ, MOE_FIELD_row_slot},
        {d->slot_row, slots * 4, 4, d->dweights && d->row_slot ? required : MOE_BUFFER_READ,
         MOE_FIELD_slot_row},
        {d->dw1.table, table, 8, MOE_BUFFER_READ, MOE_FIELD_dw1},
        {d->dw1.up_table, table, 8, MOE_BUFFER_READ, MOE_FIELD_dw1},
        {d->dw2.table, table, 8, MOE_BUFFER_READ, MOE_FIELD_dw2},
        {d->pre, pre, 16, required | (d->dpre ? MOE_BUFFER_READ : written), MOE_FIELD_pre},
        {d->rows, moe_extent(num_rows, d->row_stride, hidden, d->rows_dtype), 16, written,
         MOE_FIELD_rows},
        {d->dweights, slots * 4, 4, written, MOE_FIELD_dweights},
        {d->dpre, pre, 16, written, MOE_FIELD_dpre},
        {d->act, (uint64_t)(num_rows * intermediate) * 2, 16,
         moei_grads_given(&d->dw2) ? required | written : written, MOE_FIELD_act},
        {d->dot, (uint64_t)(num_rows * ((intermediate + 63) / 64)) * 4, 4,
         d->dweights ? required | written : written, MOE_FIELD_dot},
        {d->expert_offset, (uint64_t)experts * 4 + 4, 4, experts > 1 ? required : MOE_BUFFER_READ,
         MOE_FIELD_expert_offset},
        {d->dw1.base, dw1, 16, written, MOE_FIELD_dw1},
        {d->dw1.up, dw1, 16,
         written | (separate && (d->dw1.base || d->dw1.table) && !d->dw1.up_table ? required : 0),
         MOE_FIELD_dw1},
        {d->dw2.base, dw2, 16, written, MOE_FIELD_dw2},
        {d->dbias1, (uint64_t)(experts * width) * grad, (uint32_t)grad, written, MOE_FIELD_dbias1},
        {d->dbias2, (uint64_t)(experts * hidden) * grad, (uint32_t)grad, written, MOE_FIELD_dbias2},
        {d->workspace, MOE_EXPERTS_BACKWARD_WORKSPACE, 16, written, MOE_FIELD_workspace},
        {d->fault, 8, 8, written, MOE_FIELD_fault}};
    const int count = (int)(sizeof b / sizeof b[0]), always = 8;
    if (num_rows == 0) /* offsets, gradients of weights, workspace and fault word alone */
        return moe_check_buffers(b + count - always, always);
    return moe_check_buffers(b, count);
}

#endif
