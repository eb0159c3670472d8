/* experts_backward.cuh: gradients of the experts' MLP, from what the forward pass kept: x and the
   pre-activations.

   Forward, for row r of expert e, token t(r) = row_slot[r] / K, weight w(r):

     pre[r]  = w1_e x[t(r)] + bias1_e       act[r] = activation(pre[r])
     rows[r] = w2_e act[r] + bias2_e        y[t]   = sum over the rows of token t of w(r) rows[r]

   Backward, from dy, the gradient of a loss by y:

     d[r]     = dy[t(r)] w2_e                             not stored
     dpre[r]  = w(r) d[r] * derivative of activation      one product with a fused epilogue, which
     a[r]     = w(r) activation(pre[r])                   recomputes the activation
     dweights = <d[r], activation(pre[r])> + <dy[t(r)], bias2_e>      for the slot of row r
     dw2_e    = sum over rows of e of dy[t(r)]^T a[r]     dbias2_e = sum of w(r) dy[t(r)]
     dw1_e    = sum over rows of e of dpre[r]^T x[t(r)]   dbias1_e = sum of dpre[r]
     rows[r]  = dpre[r] w1_e                              then combine without weights: dx

   The gradient of a weight is <dy, rows[r]> = <dy w2, act>: rows are neither kept nor computed again.

   In:   x, dy [T, H], pre [R, 2I] (not gated [R, I]) as moe_experts wrote it, weights [T, K], w1, w2,
         route's expert_offset, row_slot and slot_row
   Out:  rows [R, H], dw1, dw2 (dtype or fp32, overwritten or added to), dbias1, dbias2, dweights
   Every activation of moe_activation; gate and up concatenated, interleaved or separate; weights
   k-major or mn-major, in one array or one pointer each; gradients are laid out as the weights.
   Interleaved or separate: two products each for dw1 and rows; the second adds to rows, which are
   rounded twice. dweights is null, or of the same slots as weights.

   Rows of dy and of x are gathered while they are loaded. With dy_rows (x_rows), which moe_permute
   writes, they are read in expert order: faster for wide experts, see docs/performance.md. One buffer
   [R, H] serves dy_rows, x_rows and rows in turn, where the stages run one at a time.

   A row whose row_slot is -1 adds nothing to any sum and has a gradient of zeros; its pre is not
   read. With dy_rows, pre of such a row is read, as forward wrote it. Rows that no expert owns are
   not read. A number that clamped SwiGLU clamps has gradient 0.

   Numerics: products in fp32; dpre, a and rows rounded once to their dtype; sums in a fixed order:
   equal inputs give equal bits. On wgmma d is rounded to 11 bits before it is used, so dweights has
   errors of 2^-11 of its terms (docs/numerics.md).
   Cost: 12 R H I flops (8 not gated), at most ten launches. Scratch: act [R, I], dot [R, I / 64]; dpre
   is written over pre unless it has memory of its own. Minimum architecture: sm_75 (fp16), sm_80
   (bf16).

     moe_experts_backward_desc b = {0};
     b.x = x;  b.dy = dy;  b.pre = pre;  b.weights = weights;  b.w1.base = w1;  b.w2.base = w2;
     b.expert_offset = offset;  b.row_slot = row_slot;  b.slot_row = slot_row;
     b.rows = rows;  b.dw1.base = dw1;  b.dw2.base = dw2;  b.dweights = dweights;
     b.act = act;  b.dot = dot;  b.grad_dtype = MOE_FP32;
     b.num_tokens = T;  b.hidden = H;  b.intermediate = I;  b.num_experts = E;  b.top_k = K;
     moe_status s = moe_experts_backward(&b, stream);

   Source: the backward pass that keeps x and pre alone, and takes dweights from the recomputed
   activation: SonicMoE, arXiv 2512.14080. */
#ifndef MOE_EXPERTS_BACKWARD_CUH
#define MOE_EXPERTS_BACKWARD_CUH

#include "experts_backward/check.cuh"
#include "experts_backward/products.cuh"
#include "gemm/grouped.cuh"
#include "gemm/grouped_gradient.cuh"
#include "gemm/k_grouped.cuh"
#include "preload.cuh"

/* Returns s with a product's own field replaced: of B by `weights`, of C by `out`. */
MOE_HOST moe_status moei_experts_backward_rename(moe_status s, int weights, int out)
{
    const int kind = moe_status_kind(s), field = moe_status_detail(s);
    int name = field;
    if (kind == MOE_OK || kind == MOE_ERR_CUDA) return s;
    if (field == MOE_FIELD_b || field == MOE_FIELD_b_stride || field == MOE_FIELD_b_major)
        name = weights;
    if (field == MOE_FIELD_c || field == MOE_FIELD_c_stride || field == MOE_FIELD_c_expert_stride)
        name = out;
    if (field == MOE_FIELD_m || field == MOE_FIELD_n || field == MOE_FIELD_k)
        name = MOE_FIELD_intermediate;
    return (moe_status)(kind | (name << 8));
}

/* All prepared stages: all but the stream is resolved, for the device that was current. Empty
   launches queue nothing. */
typedef struct moe_experts_backward_prepared {
    moe_grouped_gemm_prepared pre, rows[2];
    moe_k_grouped_gemm_prepared dw2, dw1[2];
    moei_row_sums_args dbias1, dbias2;
    moei_dweights_args dweights;
    moe_launch dbias1_launch, dbias2_launch, dweights_launch;
} moe_experts_backward_prepared;

/* Prepares the launch of a sum over rows. */
MOE_HOST moe_status moei_row_sums_prepare(const moei_row_sums_args* a, int num_experts,
                                          moe_launch* launch)
{
    moe_launch_config c = moe_grid((a->columns + MOEI_ROW_SUMS_COLUMNS - 1) / MOEI_ROW_SUMS_COLUMNS,
                                   MOEI_ROW_SUMS_THREADS, 0, 0);
    c.grid.y = (unsigned)num_experts;
    c.dependent = 1;
    return MOE_PREPARE(launch, moei_row_sums, c);
}

/* Prepares the launches of the kernels that sum. */
MOE_HOST moe_status moei_experts_backward_prepare_sums(const moe_experts_backward_desc* d,
                                                       moe_experts_backward_prepared* p)
{
    const int lanes = d->bias2 ? 32 : 4;
    moe_launch_config c = moe_grid((p->dweights.num_slots * lanes + MOEI_DWEIGHTS_THREADS - 1) /
                                       MOEI_DWEIGHTS_THREADS,
                                   MOEI_DWEIGHTS_THREADS, 0, 0);
    c.dependent = 1;
    if (d->dbias1) MOE_TRY(moei_row_sums_prepare(&p->dbias1, d->num_experts, &p->dbias1_launch));
    if (d->dbias2) MOE_TRY(moei_row_sums_prepare(&p->dbias2, d->num_experts, &p->dbias2_launch));
    if (!d->dweights) return MOE_OK;
    if (p->dweights.num_slots == 0) return MOE_OK;
    if (d->bias2) return MOE_PREPARE(&p->dweights_launch, moei_dweights_bias, c);
    return MOE_PREPARE(&p->dweights_launch, moei_dweights, c);
}

/* Prepares *p, which is empty, for an unchecked descriptor. */
MOE_HOST moe_status moei_experts_backward_prepare(const moe_experts_backward_desc* desc,
                                                  moe_experts_backward_prepared* p)
{
    moe_experts_backward_desc d = *desc;
    moei_experts_backward_products l;
    MOE_TRY(moei_experts_backward_check_options(&d));
    MOE_TRY(moei_experts_backward_check_buffers(&d));
    memset(&l, 0, sizeof l);
    l.parts = d.gate_up == MOE_GATE_UP_CONCATENATED ? 1 : 2;
    moei_experts_backward_row_products(&d, &l);
    moei_experts_backward_sum_products(&d, &l);
    moei_experts_backward_sums(&d, &l);
    p->dbias1 = l.dbias1;
    p->dbias2 = l.dbias2;
    p->dweights = l.dweights;
    MOE_TRY(moei_experts_backward_rename(moe_grouped_gemm_gradient_prepare(&l.pre, &p->pre),
                                         MOE_FIELD_w2, MOE_FIELD_pre));
    if (moei_grads_given(&d.dw2))
        MOE_TRY(moei_experts_backward_rename(moe_k_grouped_gemm_prepare(&l.dw2, &p->dw2),
                                             MOE_FIELD_dy, MOE_FIELD_dw2));
    for (int i = 0; i < l.parts; ++i) {
        if (moei_grads_given(&d.dw1))
            MOE_TRY(moei_experts_backward_rename(moe_k_grouped_gemm_prepare(&l.dw1[i], &p->dw1[i]),
                                                 MOE_FIELD_x, MOE_FIELD_dw1));
        if (d.rows)
            MOE_TRY(moei_experts_backward_rename(moe_grouped_gemm_prepare(&l.rows[i], &p->rows[i]),
                                                 MOE_FIELD_w1, MOE_FIELD_rows));
    }
    return moei_experts_backward_prepare_sums(&d, p);
}

/* Prepares all stages; moe_experts_backward_run queues them any number of times. *p keeps the
   addresses of tables, not their entries. Errors: each field that is not as documented, with its own
   status; MOE_ERR_DEVICE and MOE_ERR_NOT_COMPILED as of moe_grouped_gemm_prepare. 0 rows are no
   error. On an error *p is empty. */
MOE_HOST moe_status moe_experts_backward_prepare(const moe_experts_backward_desc* desc,
                                                 moe_experts_backward_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_experts_backward_prepare(desc, p));
}

/* Queues one prepared stage, a moe_experts_backward_stage, on `stream`. Stages are called in the order
   of the enum; a stage whose result was not asked for queues nothing. The caller may queue work of
   his own between two stages. */
MOE_HOST moe_status moe_experts_backward_run_stage(const moe_experts_backward_prepared* p,
                                                   int stage, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    switch (stage) {
    case MOE_EXPERTS_BACKWARD_PRE: return moe_grouped_gemm_run(&p->pre, stream);
    case MOE_EXPERTS_BACKWARD_DW2: return moe_k_grouped_gemm_run(&p->dw2, stream);
    case MOE_EXPERTS_BACKWARD_DBIAS2: return MOE_RUN(&p->dbias2_launch, p->dbias2, stream);
    case MOE_EXPERTS_BACKWARD_DWEIGHTS: return MOE_RUN(&p->dweights_launch, p->dweights, stream);
    case MOE_EXPERTS_BACKWARD_DW1:
        MOE_TRY(moe_k_grouped_gemm_run(&p->dw1[0], stream));
        return moe_k_grouped_gemm_run(&p->dw1[1], stream);
    case MOE_EXPERTS_BACKWARD_DBIAS1: return MOE_RUN(&p->dbias1_launch, p->dbias1, stream);
    case MOE_EXPERTS_BACKWARD_ROWS:
        MOE_TRY(moe_grouped_gemm_run(&p->rows[0], stream));
        return moe_grouped_gemm_run(&p->rows[1], stream);
    default: return MOE_STATUS(MOE_ERR_OPTION, stage);
    }
}

/* Queues all prepared stages on `stream`. With dy_rows and x_rows both must be there before. Refuses
   a null p. */
MOE_HOST moe_status moe_experts_backward_run(const moe_experts_backward_prepared* p,
                                             cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    for (int stage = 0; stage < MOE_EXPERTS_BACKWARD_STAGES; ++stage)
        MOE_TRY(moe_experts_backward_run_stage(p, stage, stream));
    return MOE_OK;
}

/* Prepares and runs. Nothing is queued where a field is refused. */
MOE_HOST moe_status moe_experts_backward(const moe_experts_backward_desc* desc, cudaStream_t stream)
{
    moe_experts_backward_prepared p;
    MOE_TRY(moe_experts_backward_prepare(desc, &p));
    return moe_experts_backward_run(&p, stream);
}

/* Loads the kernels that this header adds to those of its products, before their first launch. */
MOE_HOST moe_status moe_experts_backward_preload(void)
{
    MOE_TRY(moe_preload_kernel((const void*)moei_row_sums));
    MOE_TRY(moe_preload_kernel((const void*)moei_dweights));
    return moe_preload_kernel((const void*)moei_dweights_bias);
}

MOEI_PRELOAD_INCLUDED(experts_backward)

#endif
