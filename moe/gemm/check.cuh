/* check.cuh: checks a grouped GEMM's descriptor (desc.h), and resolves it into the args of kernels
   (args.h). Host code. Called by prepare.cuh and router.cuh; moe_gemm_tile_resolve is for kernels
   of one's own. */
#ifndef MOE_GEMM_CHECK_CUH
#define MOE_GEMM_CHECK_CUH

#include "../activation.cuh"
#include "../base/check.h"
#include "../fields.h"
#include "args.h"

/* Returns the groups of rows that a product may have. */
MOE_HOST int64_t moei_gemm_groups(const moe_grouped_gemm_desc* d)
{
    return d->group ? d->num_groups : d->num_experts;
}

/* Returns 1 where B has gates and ups: with `gradient` pre has them instead. */
MOE_HOST int moei_gemm_gated(const moe_grouped_gemm_desc* d)
{
    return !d->gradient && moe_activation_is_gated(d->activation);
}

/* Returns the columns of pre, and those of C. */
MOE_HOST int64_t moei_gemm_pre_columns(const moe_grouped_gemm_desc* d)
{
    return moe_activation_is_gated(d->activation) ? 2 * (int64_t)d->n : d->n;
}

MOE_HOST int64_t moei_gemm_c_columns(const moe_grouped_gemm_desc* d)
{
    return d->gradient ? moei_gemm_pre_columns(d) : d->n;
}

/* Refuses options that a gradient lacks, and those of a gradient without one. Requires that each
   option by itself is checked. */
MOE_HOST moe_status moei_gemm_check_gradient(moe_grouped_gemm_desc* d)
{
    if (d->act_stride == 0) d->act_stride = d->n;
    MOE_REQUIRE(moei_stride_fits(d->act_stride, d->n, d->num_rows), MOE_ERR_STRIDE, act_stride);
    MOE_REQUIRE(d->act_stride % 8 == 0, MOE_ERR_ALIGN, act_stride);
    if (!d->gradient) {
        MOE_REQUIRE(!d->row_weight, MOE_ERR_CONFLICT, row_weight);
        MOE_REQUIRE(!d->act, MOE_ERR_CONFLICT, act);
        MOE_REQUIRE(!d->dot, MOE_ERR_CONFLICT, dot);
        return MOE_OK;
    }
    MOE_REQUIRE(!moe_activation_is_gated(d->activation) || d->gate_up == MOE_GATE_UP_CONCATENATED,
                MOE_ERR_CONFLICT, gate_up);
    MOE_REQUIRE(!d->bias, MOE_ERR_CONFLICT, bias);
    MOE_REQUIRE(!d->accumulate, MOE_ERR_CONFLICT, accumulate);
    MOE_REQUIRE(d->c_dtype == d->dtype, MOE_ERR_CONFLICT, c_dtype);
    MOE_REQUIRE(!d->c_table, MOE_ERR_CONFLICT, c_table);
    return MOE_OK;
}

/* Refuses sizes and options that the header does not offer, and fills in the defaults. */
MOE_HOST moe_status moei_gemm_check_options(moe_grouped_gemm_desc* d)
{
    const int gated = moei_gemm_gated(d);
    const int64_t pre_columns = moei_gemm_pre_columns(d), c_columns = moei_gemm_c_columns(d);
    int64_t b_rows, b_cols;
    MOE_REQUIRE((d->gradient | 1) == 1, MOE_ERR_OPTION, gradient);
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(d->num_rows >= 0 && d->num_rows <= MOE_GEMM_MAX_ROWS, MOE_ERR_RANGE, num_rows);
    MOE_REQUIRE(d->n >= 1 && d->n <= (1 << 28), MOE_ERR_RANGE, n);
    MOE_REQUIRE(d->n % 8 == 0, MOE_ERR_MULTIPLE, n);
    MOE_REQUIRE(d->k >= 1 && d->k <= (1 << 28), MOE_ERR_RANGE, k);
    MOE_REQUIRE(d->k % 8 == 0, MOE_ERR_MULTIPLE, k);
    if (d->dtype == 0) d->dtype = MOE_BF16;
    MOE_REQUIRE(d->dtype == MOE_BF16 || d->dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    if (d->c_dtype == 0) d->c_dtype = d->dtype;
    MOE_REQUIRE(d->c_dtype == d->dtype || d->c_dtype == MOE_FP32, MOE_ERR_DTYPE, c_dtype);
    if (d->activation == 0) d->activation = MOE_ACTIVATION_NONE;
    MOE_TRY(moei_activation_check(d->activation, &d->alpha, &d->limit));
    if (d->gate_up == 0) d->gate_up = MOE_GATE_UP_CONCATENATED;
    MOE_REQUIRE(d->gate_up >= 0 && d->gate_up <= MOE_GATE_UP_SEPARATE, MOE_ERR_OPTION, gate_up);
    MOE_REQUIRE((gated && d->gate_up == MOE_GATE_UP_SEPARATE) || (!d->b.up && !d->b.up_table),
                MOE_ERR_CONFLICT, b);
    if (d->a_major == 0) d->a_major = MOE_MAJOR_K;
    MOE_REQUIRE(d->a_major == MOE_MAJOR_K || d->a_major == MOE_MAJOR_MN, MOE_ERR_OPTION, a_major);
    if (d->b.major == 0) d->b.major = MOE_MAJOR_K;
    MOE_REQUIRE(d->b.major == MOE_MAJOR_K || d->b.major == MOE_MAJOR_MN, MOE_ERR_OPTION, b_major);
    MOE_REQUIRE((d->accumulate | 1) == 1, MOE_ERR_OPTION, accumulate);
    MOEI_REQUIRE_RANK(d);
    if (d->row_div == 0) d->row_div = 1;
    MOE_REQUIRE(d->row_div >= 1, MOE_ERR_RANGE, row_div);
    MOE_REQUIRE(d->tile >= 0 && d->tile <= MOE_TILE_64x64, MOE_ERR_OPTION, tile);
    MOE_REQUIRE(d->path >= 0 && d->path <= MOE_GEMM_PATH_WGMMA, MOE_ERR_OPTION, path);
    MOE_REQUIRE((d->batch_invariant | 1) == 1, MOE_ERR_OPTION, batch_invariant);
    MOE_REQUIRE(d->grid_limit >= 0, MOE_ERR_RANGE, grid_limit);
    MOE_REQUIRE(!d->workspace || d->workspace_bytes >= MOE_GROUPED_GEMM_WORKSPACE,
                MOE_ERR_WORKSPACE, workspace_bytes);
    MOE_TRY(moei_gemm_check_gradient(d));

    MOE_REQUIRE(d->a_rows >= 0 && d->a_rows <= MOE_GEMM_MAX_ROWS, MOE_ERR_RANGE, a_rows);
    if (d->a_rows == 0) d->a_rows = d->num_rows;
    {
        const int64_t inner = d->a_major == MOE_MAJOR_K ? d->k : d->a_rows;
        const int64_t outer = d->a_major == MOE_MAJOR_K ? d->a_rows : d->k;
        if (d->a_stride == 0) d->a_stride = inner;
        MOE_REQUIRE(moei_stride_fits(d->a_stride, inner, outer), MOE_ERR_STRIDE, a_stride);
        MOE_REQUIRE(d->a_stride % 8 == 0, MOE_ERR_ALIGN, a_stride);
    }
    b_rows = (int64_t)d->n * (gated && d->gate_up != MOE_GATE_UP_SEPARATE ? 2 : 1);
    b_cols = d->b.major == MOE_MAJOR_K ? d->k : b_rows;
    if (d->b.major == MOE_MAJOR_MN) b_rows = d->k;
    if (d->b.row_stride == 0) d->b.row_stride = b_cols;
    MOE_REQUIRE(moei_stride_fits(d->b.row_stride, b_cols, b_rows), MOE_ERR_STRIDE, b_stride);
    MOE_REQUIRE(d->b.row_stride % 8 == 0, MOE_ERR_ALIGN, b_stride);
    if (d->b.expert_stride == 0) d->b.expert_stride = d->b.row_stride * b_rows;
    MOE_REQUIRE(moei_stride_fits(d->b.expert_stride, d->num_experts > 1, d->num_experts),
                MOE_ERR_STRIDE, b_stride);
    MOE_REQUIRE(d->b.expert_stride % 8 == 0, MOE_ERR_ALIGN, b_stride);
    if (d->c_stride == 0) d->c_stride = c_columns;
    MOE_REQUIRE(moei_stride_fits(d->c_stride, c_columns, d->num_rows), MOE_ERR_STRIDE, c_stride);
    MOE_REQUIRE(d->c_stride % 8 == 0, MOE_ERR_ALIGN, c_stride);

    if (d->pre_stride == 0) d->pre_stride = pre_columns;
    MOE_REQUIRE(moei_stride_fits(d->pre_stride, pre_columns, d->num_rows), MOE_ERR_STRIDE,
                pre_stride);
    MOE_REQUIRE(d->pre_stride % 8 == 0, MOE_ERR_ALIGN, pre_stride);
    MOE_REQUIRE(!d->pre || d->activation != MOE_ACTIVATION_NONE || d->c_dtype == d->dtype,
                MOE_ERR_CONFLICT, pre); /* C is the same in more bits */

    if (d->group || d->num_groups) {
        MOE_REQUIRE(d->num_groups >= 1 && d->num_groups <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                    num_groups);
        MOE_REQUIRE(!d->expert_offset, MOE_ERR_CONFLICT, group);
        MOE_REQUIRE(!d->c_table, MOE_ERR_CONFLICT, c_table);
    }
    if (d->ready_timeout_ms == 0) d->ready_timeout_ms = 10000;
    MOE_REQUIRE(!d->done || d->n < 1 << 27, MOE_ERR_RANGE, n);

    MOE_REQUIRE(!(d->row_index && d->a_major == MOE_MAJOR_MN), MOE_ERR_CONFLICT, row_index);
    MOE_REQUIRE(!(d->c && d->c_table), MOE_ERR_CONFLICT, c);
    MOE_REQUIRE(!(d->b.base && d->b.table), MOE_ERR_CONFLICT, b);
    MOE_REQUIRE(!(d->b.up && d->b.up_table), MOE_ERR_CONFLICT, b);
    return MOE_OK;
}

/* Returns the bytes of row_weight that a checked product may read. */
MOE_HOST uint64_t moei_gemm_weight_bytes(const moe_grouped_gemm_desc* d)
{
    const int64_t most = (int64_t)1 << 31, indices = d->a_rows * d->row_div;
    return (uint64_t)(!d->row_index ? d->num_rows : indices < most ? indices : most) * 4;
}

/* Refuses buffers that are absent, misaligned or overlap. Requires checked options. */
MOE_HOST moe_status moei_gemm_check_buffers(const moe_grouped_gemm_desc* d)
{
    const int64_t num_experts = d->num_experts, num_rows = d->num_rows, n = d->n, k = d->k;
    const int gated = moei_gemm_gated(d);
    const int separate = gated && d->gate_up == MOE_GATE_UP_SEPARATE;
    const int64_t all_n = gated ? 2 * n : n; /* rows of gate and up */
    const uint64_t matrices = moei_weight_extent(&d->b, num_experts, separate ? n : all_n, k);
    const uint64_t table = (uint64_t)num_experts * 8;
    const int in_place = d->gradient && d->pre == d->c && d->pre_stride == d->c_stride;
    const uint64_t flags =
        (uint64_t)(num_rows + MOE_GEMM_ROW_BLOCK - 1) / MOE_GEMM_ROW_BLOCK * sizeof(uint32_t);
    const moe_buffer b[] = {
        {d->a,
         d->a_major == MOE_MAJOR_K ? moe_extent(d->a_rows, d->a_stride, k, d->dtype)
                                   : moe_extent(k, d->a_stride, d->a_rows, d->dtype),
         16, MOE_BUFFER_REQUIRED, MOE_FIELD_a},
        {d->b.base, matrices, 16, d->b.table ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED, MOE_FIELD_b},
        {d->b.up, matrices, 16, separate && !d->b.up_table ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ,
         MOE_FIELD_b},
        {d->b.table, table, 8, MOE_BUFFER_READ, MOE_FIELD_b},
        {d->b.up_table, table, 8, MOE_BUFFER_READ, MOE_FIELD_b},
        {d->bias, (uint64_t)(num_experts * all_n) * 2, 2, MOE_BUFFER_READ, MOE_FIELD_bias},
        {d->row_index, (uint64_t)num_rows * 4, 4, MOE_BUFFER_READ, MOE_FIELD_row_index},
        {d->c_table, table, 8, MOE_BUFFER_READ, MOE_FIELD_c},
        {d->c, moe_extent(num_rows, d->c_stride, moei_gemm_c_columns(d), d->c_dtype), 16,
         d->c_table ? MOE_BUFFER_WRITTEN : MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_c},
        {in_place ? 0 : d->pre, /* else it is C, of as many columns of the same dtype */
         in_place ? 0 : moe_extent(num_rows, d->pre_stride, moei_gemm_pre_columns(d), d->dtype), 16,
         d->gradient ? MOE_BUFFER_REQUIRED : MOE_BUFFER_WRITTEN, MOE_FIELD_pre},
        {d->row_weight, moei_gemm_weight_bytes(d), 4, MOE_BUFFER_READ, MOE_FIELD_row_weight},
        {d->act, moe_extent(num_rows, d->act_stride, n, d->dtype), 16, MOE_BUFFER_WRITTEN,
         MOE_FIELD_act},
        {d->dot, (uint64_t)(num_rows * ((n + 63) / 64)) * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_dot},
        {d->ready, flags, 4, MOE_BUFFER_READ, MOE_FIELD_ready},
        {d->done, flags, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_done},
        {d->group, (uint64_t)d->num_groups * sizeof(moe_gemm_group), 4, MOE_BUFFER_REQUIRED,
         MOE_FIELD_group},
        {d->expert_offset, (uint64_t)num_experts * 4 + 4, 4,
         num_experts > 1 && !d->group ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ,
         MOE_FIELD_expert_offset},
        {d->workspace, MOE_GROUPED_GEMM_WORKSPACE, 16, MOE_BUFFER_WRITTEN, MOE_FIELD_workspace},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    const int count = (int)(sizeof b / sizeof b[0]);
    if (num_rows == 0) /* groups or offsets, workspace and fault word alone */
        return moe_check_buffers(b + count - 4, 4);
    return moe_check_buffers(b, count);
}

/* Checks options and buffers, and fills in the defaults: of a gradient, or of a forward product. */
MOE_HOST moe_status moei_gemm_check(moe_grouped_gemm_desc* d, int gradient)
{
    MOE_REQUIRE(d->gradient != !gradient, MOE_ERR_CONFLICT, gradient);
    MOE_TRY(moei_gemm_check_options(d));
    return moei_gemm_check_buffers(d);
}

/* Returns the kernel's args for a checked descriptor. */
MOE_HOST moe_grouped_gemm_args moei_gemm_args_of(const moe_grouped_gemm_desc* d)
{
    moe_grouped_gemm_args a;
    memset(&a, 0, sizeof a);
    a.a = d->a;
    a.row_index = d->row_index;
    a.expert_offset = d->expert_offset;
    a.b = d->b;
    a.c.base = d->c;
    a.c.table = d->c_table;
    a.c.stride = d->c_stride;
    a.c.bias = d->bias;
    a.c.dtype = d->c_dtype;
    a.c.bias_dtype = d->dtype;
    a.c.activation = d->activation;
    a.c.gated = moei_gemm_gated(d) ? d->gate_up : 0;
    a.c.accumulate = d->accumulate;
    a.c.alpha = d->alpha;
    a.c.limit = d->limit;
    a.c.pre = d->pre;
    a.c.pre_stride = d->pre_stride;
    a.fault = d->fault;
    a.a_stride = d->a_stride;
    a.a_rows = d->a_rows;
    a.num_experts = d->num_experts;
    a.num_rows = d->num_rows;
    a.n = d->n;
    a.k = d->k;
    a.row_div = d->row_div;
    a.rank = d->rank;
    a.group = d->group;
    a.num_groups = d->num_groups;
    a.ready = d->ready;
    a.ready_value = d->ready_value;
    a.ready_timeout_ms = d->ready_timeout_ms;
    a.done = d->done;
    a.gradient.row_weight = d->row_weight;
    a.gradient.act = d->act;
    a.gradient.act_stride = d->act_stride;
    a.gradient.hand = (uint16_t*)(d->act ? d->act : d->c);
    a.gradient.hand_stride = d->act ? d->act_stride : d->c_stride;
    a.gradient.dot = d->dot;
    a.gradient.gated = d->gradient && moe_activation_is_gated(d->activation);
    return a;
}

/* moe_gemm_tile_resolve, and with `gradient` moe_gemm_tile_gradient_resolve. */
MOE_HOST moe_status moei_gemm_tile_resolve(const moe_grouped_gemm_desc* desc, int gradient,
                                           moe_grouped_gemm_args* args)
{
    moe_grouped_gemm_desc d;
    MOE_REQUIRE(desc && args, MOE_ERR_NULL, desc);
    d = *desc;
    MOE_TRY(moei_gemm_check(&d, gradient));
    MOE_REQUIRE(!d.ready, MOE_ERR_CONFLICT, ready);
    MOE_REQUIRE(!d.done, MOE_ERR_CONFLICT, done);
    *args = moei_gemm_args_of(&d);
    return MOE_OK;
}

/* Checks a descriptor and resolves it into the args of moe_gemm_tile (tile.cuh), for a kernel of
   one's own. Errors: refused fields as of moe_grouped_gemm; MOE_ERR_CONFLICT for ready and done,
   which moe_gemm_tile does not heed; *args is then unchanged. */
MOE_HOST moe_status moe_gemm_tile_resolve(const moe_grouped_gemm_desc* desc,
                                          moe_grouped_gemm_args* args)
{
    return moei_gemm_tile_resolve(desc, 0, args);
}

/* The same for moe_gemm_tile_gradient, with errors as of moe_grouped_gemm_gradient. */
MOE_HOST moe_status moe_gemm_tile_gradient_resolve(const moe_grouped_gemm_desc* desc,
                                                   moe_grouped_gemm_args* args)
{
    return moei_gemm_tile_resolve(desc, 1, args);
}

#endif
