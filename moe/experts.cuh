/* experts.cuh: the experts' MLP: two grouped GEMMs, with everything between them fused.

     up     act[r]  = activation(w1_e x[token(r)] + bias1_e)
     down   rows[r] = w2_e act[r] + bias2_e
            for every row r of expert e, token(r) = row_slot[r] / K

   Activations (formulas: moe_activation in layout.h). A gated one computes a column of act from a
   gate and an up, and w1 is [E, 2I, H]; for the others w1 is [E, I, H]:
     SwiGLU (default)  Mixtral, Qwen, DeepSeek      SiLU       MLPs with no gate
     SwiGLU clamped    gpt-oss (interleaved)        GELU       BERT, GPT-NeoX (erf)
     GEGLU             ModernBERT (erf)             GELU tanh  GPT-2
     GEGLU tanh        T5 1.1, Gemma, Grok-1        ReLU^2     Primer, Nemotron

   In:   x [T, H]; w1 [E, 2I, H] gate and up (concatenated, interleaved or separate) or [E, I, H];
         w2 [E, H, I]. The weights are read where they lie, through moe_weights (layout.h): one
         strided array or one pointer per expert, k-major or mn-major;
         expert_offset [E + 1] and row_slot [num_rows] from route
   Out:  rows [num_rows, H] in expert order, in one array or in one allocation per expert (table)
   H and I are multiples of 8. Rows of x are gathered while they are loaded: no permuted copy is
   made.

   Accumulation and activation in fp32; act is rounded to the dtype between the two products. Equal
   inputs give equal bits; with batch_invariant a row has the same bits in any batch.
   Cost: 6 * rows * H * I flops (4 where not gated), two launches, on the wgmma path after a memset
   of 32 bytes; scratch: act, num_rows * I elements. On Hopper (code of sm_90a) both run wgmma,
   except where there are few tiles (gemm/grouped.cuh). Minimum architecture: sm_75 (fp16), sm_80
   (bf16).

     moe_experts_desc m = {0};
     m.x = x;  m.w1.base = w1;  m.w2.base = w2;
     m.expert_offset = offset;  m.row_slot = row_slot;  m.act = act;  m.rows = rows;
     m.num_tokens = T;  m.hidden = H;  m.intermediate = I;  m.num_experts = E;  m.top_k = K;
     m.workspace = ws;  m.workspace_bytes = MOE_EXPERTS_WORKSPACE;          // may be left out
     moe_status s = moe_experts(&m, stream);

   Source: grouped GEMM with gathered rows and fused SwiGLU, as in SonicMoE, arXiv 2512.14080; gated
   activations after Shazeer, arXiv 2002.05202; ReLU^2 after Primer, arXiv 2109.08668. */
#ifndef MOE_EXPERTS_CUH
#define MOE_EXPERTS_CUH

#include "base/check.h"
#include "fields.h"
#include "gemm/grouped.cuh"

/* The descriptor. x, act, rows and all matrices of w1 and w2 are 16-byte aligned. */
typedef struct moe_experts_desc {
    /* in */
    const void* x;     /* [T, H] dtype; row_slot null: [num_rows, H] in expert order */
    int64_t x_stride;  /* elements between rows; 0 = H; multiple of 8 */
    moe_weights w1;    /* [E, 2I, H] dtype, laid out as gate_up says; not gated: [E, I, H] */
    moe_weights w2;    /* [E, H, I] dtype */
    const void* bias1; /* [E, 2I] or [E, I] dtype, ordered as w1's rows; or null */
    const void* bias2; /* [E, H] dtype; or null */
    const int32_t* expert_offset; /* [E + 1]; null with one expert: all num_rows rows */
    const int32_t* row_slot;      /* [num_rows] slot of each row, -1: a row of zeros; null: x is in
                                     expert order */
    /* scratch and out */
    void* act;          /* [num_rows, I] dtype, scratch: result of the first product */
    int64_t act_stride; /* elements between rows; 0 = I; multiple of 8 */
    void* pre;          /* [num_rows, 2I] or [num_rows, I] dtype, out: what the activation is applied
                           to, gates and then ups, for experts_backward.cuh; or null */
    void* rows;         /* [num_rows, H] rows_dtype; or null with a table */
    void* const* table; /* [E] device array: expert e's rows begin at table[e]; or null */
    int64_t row_stride; /* elements between rows; 0 = H; multiple of 8 */
    uint64_t* fault;    /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;   /* T >= 0, rows of x; with row_slot null used only where num_rows = 0 */
    int32_t num_rows;     /* upper bound of the rows, 0 .. MOE_GEMM_MAX_ROWS; 0 = T * K */
    int32_t hidden;       /* H, 8 .. 2^28; multiple of 8 */
    int32_t intermediate; /* I, 8 .. 2^28; multiple of 8 */
    int32_t num_experts;  /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;        /* K >= 1: token = slot / K; with row_slot null 0 is allowed */
    int32_t dtype;        /* of x, w1, w2, biases, act: fp16 or bf16; 0 = bf16 */
    int32_t rows_dtype;   /* of rows: dtype or fp32; 0 = dtype */
    int32_t activation;   /* moe_activation; 0 = SwiGLU */
    int32_t gate_up;      /* moe_gate_up; 0 = concatenated; used only by gated activations */
    float alpha, limit;   /* of the clamped SwiGLU, else 0: |alpha| < 2.3e38, 0 = 1.702; limit
                             finite and not negative, 0 = 7 */
    int32_t tile;         /* moe_tile of both products; 0 = chosen by shape and device */
    int32_t batch_invariant; /* as in gemm/desc.h, for both products, like the next */
    int32_t grid_limit;
    int32_t rank;         /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    /* workspace */
    void* workspace;        /* 16-byte aligned, for one call at a time; or null: slower on Hopper
                               where experts differ in rows (gemm/desc.h) */
    size_t workspace_bytes; /* bytes at workspace: MOE_EXPERTS_WORKSPACE or more */
} moe_experts_desc;

#define MOE_EXPERTS_WORKSPACE (2 * MOE_GROUPED_GEMM_WORKSPACE) /* bytes: of both products */

/* Returns the rows of w1's matrix for one column of act: 2 where it holds gate and up, else 1. With
   gate_up = 0 returns the rows of gate and up together, so the elements of bias1. Accepts any value
   of activation. */
MOE_HOST int moei_experts_up_rows(int activation, int gate_up)
{
    return (activation == 0 || moe_activation_is_gated(activation)) &&
                   gate_up != MOE_GATE_UP_SEPARATE
               ? 2
               : 1;
}

/* Checks the sizes and fills in the descriptors of the two products. */
MOE_HOST moe_status moei_experts_gemms(const moe_experts_desc* d, moe_grouped_gemm_desc* up,
                                       moe_grouped_gemm_desc* down)
{
    int64_t num_rows = d->num_rows;
    MOE_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->top_k >= 1 || (d->top_k == 0 && !d->row_slot), MOE_ERR_RANGE, top_k);
    MOE_REQUIRE(d->num_rows >= 0, MOE_ERR_RANGE, num_rows);
    if (num_rows == 0) num_rows = (int64_t)d->num_tokens * d->top_k;
    MOE_REQUIRE(num_rows <= 0x7fffffff, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->hidden >= 1, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(d->hidden % 8 == 0, MOE_ERR_MULTIPLE, hidden);
    MOE_REQUIRE(d->intermediate >= 1, MOE_ERR_RANGE, intermediate);
    MOE_REQUIRE(d->intermediate % 8 == 0, MOE_ERR_MULTIPLE, intermediate);
    MOE_REQUIRE(!d->row_slot || d->num_tokens > 0 || num_rows == 0, MOE_ERR_RANGE, num_tokens);
    memset(up, 0, sizeof *up);
    up->a = d->x;
    up->a_stride = d->x_stride ? d->x_stride : d->hidden;
    up->a_rows = d->row_slot ? d->num_tokens : num_rows;
    up->row_index = d->row_slot;
    up->row_div = d->row_slot ? d->top_k : 1;
    up->b = d->w1;
    up->bias = d->bias1;
    up->expert_offset = d->expert_offset;
    up->c = d->act;
    up->c_stride = d->act_stride ? d->act_stride : d->intermediate;
    up->pre = d->pre;
    up->fault = d->fault;
    up->num_experts = d->num_experts;
    up->num_rows = (int32_t)num_rows;
    up->n = d->intermediate;
    up->k = d->hidden;
    up->dtype = d->dtype;
    up->activation = d->activation ? d->activation : MOE_ACTIVATION_SWIGLU;
    up->gate_up = d->gate_up;
    up->alpha = d->alpha;
    up->limit = d->limit;
    up->tile = d->tile;
    up->batch_invariant = d->batch_invariant;
    up->grid_limit = d->grid_limit;
    up->rank = d->rank;
    MOE_REQUIRE(!d->workspace || d->workspace_bytes >= MOE_EXPERTS_WORKSPACE, MOE_ERR_WORKSPACE,
                workspace_bytes);
    if (d->workspace) {
        up->workspace = d->workspace;
        up->workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
    }

    memset(down, 0, sizeof *down);
    down->a = d->act;
    down->a_stride = up->c_stride;
    down->a_rows = num_rows;
    down->b = d->w2;
    down->bias = d->bias2;
    down->expert_offset = d->expert_offset;
    down->c = d->rows;
    down->c_table = d->table;
    down->c_stride = d->row_stride ? d->row_stride : d->hidden;
    down->fault = d->fault;
    down->num_experts = d->num_experts;
    down->num_rows = (int32_t)num_rows;
    down->n = d->hidden;
    down->k = d->intermediate;
    down->dtype = d->dtype;
    down->c_dtype = d->rows_dtype;
    down->tile = d->tile;
    down->batch_invariant = d->batch_invariant;
    down->grid_limit = d->grid_limit;
    down->rank = d->rank;
    if (d->workspace) {
        down->workspace = (char*)d->workspace + MOE_GROUPED_GEMM_WORKSPACE;
        down->workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
    }
    return MOE_OK;
}

/* Returns s with the grouped GEMM's field replaced by the field of moe_experts_desc. */
MOE_HOST moe_status moei_experts_rename(moe_status s, int is_up)
{
    static const int16_t name[][3] = {
        /* field of gemm/desc.h; of moe_experts_desc for up; for down */
        {MOE_FIELD_a, MOE_FIELD_x, MOE_FIELD_act},
        {MOE_FIELD_a_stride, MOE_FIELD_x_stride, MOE_FIELD_act_stride},
        {MOE_FIELD_a_major, MOE_FIELD_dtype, MOE_FIELD_dtype}, /* no variant has k-major A */
        {MOE_FIELD_b, MOE_FIELD_w1, MOE_FIELD_w2},
        {MOE_FIELD_b_stride, MOE_FIELD_w1, MOE_FIELD_w2},
        {MOE_FIELD_b_major, MOE_FIELD_w1, MOE_FIELD_w2},
        {MOE_FIELD_bias, MOE_FIELD_bias1, MOE_FIELD_bias2},
        {MOE_FIELD_c, MOE_FIELD_act, MOE_FIELD_rows},
        {MOE_FIELD_c_stride, MOE_FIELD_act_stride, MOE_FIELD_row_stride},
        {MOE_FIELD_c_dtype, MOE_FIELD_dtype, MOE_FIELD_rows_dtype},
        {MOE_FIELD_row_index, MOE_FIELD_row_slot, MOE_FIELD_row_slot},
        {MOE_FIELD_n, MOE_FIELD_intermediate, MOE_FIELD_hidden},
        {MOE_FIELD_k, MOE_FIELD_hidden, MOE_FIELD_intermediate}};
    const int kind = moe_status_kind(s);
    if (kind == MOE_OK || kind == MOE_ERR_CUDA) return s;
    for (size_t i = 0; i < sizeof name / sizeof name[0]; ++i)
        if (moe_status_detail(s) == name[i][0])
            return (moe_status)(kind | (name[i][is_up ? 1 : 2] << 8));
    return s;
}

/* Refuses sizes and options that the header does not offer. Fills in both descriptors, with their
   defaults. */
MOE_HOST moe_status moei_experts_check_options(const moe_experts_desc* d, moe_grouped_gemm_desc* up,
                                               moe_grouped_gemm_desc* down)
{
    MOE_TRY(moei_experts_gemms(d, up, down));
    MOE_TRY(moei_experts_rename(moei_gemm_check_options(up), 1));
    return moei_experts_rename(moei_gemm_check_options(down), 0);
}

/* Refuses buffers that are absent, misaligned or overlap, of both products together: one may write
   a buffer that the other reads. Requires checked options. */
MOE_HOST moe_status moei_experts_check_buffers(const moe_grouped_gemm_desc* up,
                                               const moe_grouped_gemm_desc* down)
{
    const int64_t num_experts = up->num_experts, num_rows = up->num_rows, hidden = up->k,
                  intermediate = up->n;
    const int gated = moe_activation_is_gated(up->activation);
    const int separate = gated && up->gate_up == MOE_GATE_UP_SEPARATE;
    const int64_t all_I = gated ? 2 * intermediate : intermediate; /* rows of gate and up */
    const uint64_t w1 =
        moei_weight_extent(&up->b, num_experts, separate ? intermediate : all_I, hidden);
    const uint64_t table = (uint64_t)num_experts * 8;
    const moe_buffer b[] = {
        {up->a, moe_extent(up->a_rows, up->a_stride, hidden, up->dtype), 16, MOE_BUFFER_REQUIRED,
         MOE_FIELD_x},
        {up->b.base, w1, 16, up->b.table ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED, MOE_FIELD_w1},
        {up->b.up, w1, 16, separate && !up->b.up_table ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ,
         MOE_FIELD_w1},
        {up->b.table, table, 8, MOE_BUFFER_READ, MOE_FIELD_w1},
        {up->b.up_table, table, 8, MOE_BUFFER_READ, MOE_FIELD_w1},
        {down->b.base, moei_weight_extent(&down->b, num_experts, hidden, intermediate), 16,
         down->b.table ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED, MOE_FIELD_w2},
        {down->b.table, table, 8, MOE_BUFFER_READ, MOE_FIELD_w2},
        {up->bias, (uint64_t)(num_experts * all_I) * 2, 2, MOE_BUFFER_READ, MOE_FIELD_bias1},
        {down->bias, (uint64_t)(num_experts * hidden) * 2, 2, MOE_BUFFER_READ, MOE_FIELD_bias2},
        {up->row_index, (uint64_t)num_rows * 4, 4, MOE_BUFFER_READ, MOE_FIELD_row_slot},
        {down->c_table, table, 8, MOE_BUFFER_READ, MOE_FIELD_rows},
        {up->c, moe_extent(num_rows, up->c_stride, intermediate, up->dtype), 16,
         MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_act},
        {up->pre, moe_extent(num_rows, up->pre_stride, all_I, up->dtype), 16, MOE_BUFFER_WRITTEN,
         MOE_FIELD_pre},
        {down->c, moe_extent(num_rows, down->c_stride, hidden, down->c_dtype), 16,
         down->c_table ? MOE_BUFFER_WRITTEN : MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_rows},
        {up->expert_offset, (uint64_t)num_experts * 4 + 4, 4,
         num_experts > 1 ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_expert_offset},
        {up->workspace, MOE_EXPERTS_WORKSPACE, 16, MOE_BUFFER_WRITTEN, MOE_FIELD_workspace},
        {up->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    const int count = (int)(sizeof b / sizeof b[0]);
    if (num_rows == 0) /* offsets, workspace and fault word alone */
        return moe_check_buffers(b + count - 3, 3);
    return moe_check_buffers(b, count);
}

/* Both prepared products: all but the stream is resolved, for the device that was current. */
typedef struct moe_experts_prepared {
    moe_grouped_gemm_prepared up, down; /* x -> act, act -> rows; each can be run alone */
    void* workspace;                    /* of the descriptor */
} moe_experts_prepared;

/* Prepares *p, which is empty, for an unchecked descriptor. */
MOE_HOST moe_status moei_experts_prepare(const moe_experts_desc* desc, moe_experts_prepared* p)
{
    moe_grouped_gemm_desc up, down;
    MOE_TRY(moei_experts_check_options(desc, &up, &down));
    MOE_TRY(moei_experts_rename(moei_gemm_prepare(moei_gemm_variants, &up, &p->up), 1));
    MOE_TRY(moei_experts_rename(moei_gemm_prepare(moei_gemm_variants, &down, &p->down), 0));
    p->workspace = desc->workspace;
    return moei_experts_check_buffers(&up, &down);
}

/* Prepares both products; moe_experts_run queues them any number of times. *p keeps the addresses
   of tables, not their entries. Errors: each field that is not as documented above, with its own
   status; MOE_ERR_DEVICE and MOE_ERR_NOT_COMPILED as of moe_grouped_gemm_prepare. 0 rows are no
   error. On an error *p is empty. */
MOE_HOST moe_status moe_experts_prepare(const moe_experts_desc* desc, moe_experts_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_experts_prepare(desc, p));
}

/* Queues both prepared products, whose counters of tiles are 0. */
MOE_HOST moe_status moei_experts_run_cleared(const moe_experts_prepared* p, cudaStream_t stream)
{
    MOE_TRY(moei_gemm_run_cleared(&p->up, stream));
    return moei_gemm_run_cleared(&p->down, stream);
}

/* Returns 1 where one of the products has a counter of tiles. */
MOE_HOST int moei_experts_count(const moe_experts_prepared* p)
{
    return p->up.args.ticket || p->down.args.ticket;
}

/* Queues both prepared products on `stream`. Refuses a null p. */
MOE_HOST moe_status moe_experts_run(const moe_experts_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    if (moei_experts_count(p)) /* one call: nothing stands between the two kernels */
        MOE_TRY_CUDA(cudaMemsetAsync(p->workspace, 0, MOE_EXPERTS_WORKSPACE, stream));
    return moei_experts_run_cleared(p, stream);
}

/* Prepares both, runs the up product alone: x -> act. */
MOE_HOST moe_status moe_experts_up(const moe_experts_desc* desc, cudaStream_t stream)
{
    moe_experts_prepared p;
    MOE_TRY(moe_experts_prepare(desc, &p));
    return moe_grouped_gemm_run(&p.up, stream);
}

/* Prepares both, runs the down product alone: act -> rows. */
MOE_HOST moe_status moe_experts_down(const moe_experts_desc* desc, cudaStream_t stream)
{
    moe_experts_prepared p;
    MOE_TRY(moe_experts_prepare(desc, &p));
    return moe_grouped_gemm_run(&p.down, stream);
}

/* Prepares and runs. Nothing is queued where a field is refused. */
MOE_HOST moe_status moe_experts(const moe_experts_desc* desc, cudaStream_t stream)
{
    moe_experts_prepared p;
    MOE_TRY(moe_experts_prepare(desc, &p));
    return moe_experts_run(&p, stream);
}

/* Sets *up and *down to the kernels and grids of moe_experts on the current device. Errors as of
   moe_experts_prepare. */
MOE_HOST moe_status moe_experts_plan(const moe_experts_desc* desc, moe_gemm_plan* up,
                                     moe_gemm_plan* down)
{
    moe_experts_prepared p;
    MOE_REQUIRE(desc && up && down, MOE_ERR_NULL, desc);
    MOE_TRY(moe_experts_prepare(desc, &p));
    *up = p.up.plan;
    *down = p.down.plan;
    return MOE_OK;
}

#endif
