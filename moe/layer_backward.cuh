/* layer_backward.cuh: gradients of the whole MoE layer (layer.cuh) on one GPU, from dy, the gradient of
   a loss by y, to dx and the gradients of all weights.

     dpre, act  from dy, w2 and the pre-activations      experts_backward.cuh
     dw2, dw1, biases, dweights                          the same
     dlogits    from dweights, and balance losses        gate_backward.cuh
     drouter, and dlogits router                         router_backward.cuh
     dx         = sum over a token's rows of dpre w1 + dlogits router + the shared expert's part
                                                         combine.cuh, without weights

   Forward and backward share one descriptor, with `saved`: forward keeps there what backward needs,
   and nothing else. moe_layer_saved lists what is kept, with shapes and bytes: x (the caller's own, 2
   T H bytes), the pre-activations (4 R I gated, 2 R I otherwise), and the routing tables: logits 4 T
   E, ids, weights and slot_row 12 T K, place 8 T K, row_slot and row_weight 8 R, offsets. Neither act
   nor the experts' rows nor gathered copies are kept: with R = T K and bf16 that is 2 T H + 4 T K I
   bytes and the tables. With `recompute` the pre-activations are not kept either: backward computes
   them again from x.

   The gradient of a weight of a slot is the inner product of the recomputed activation and the
   gradient by it, so the experts' rows are not needed. The gradient of the residual is dy itself;
   where the residual is x, set dx_accumulate and let dx hold dy before the call, or be dy.

   In:   dy [T, H]; the descriptor of the forward. Unchanged since then: x, weights, `saved`, and what of
         these is given: logits, ids, weights of slots, shared.weight, route.slot_row and row_weight,
         the gate's expert_disabled, token_disabled and seed_offset (move it after backward)
   Out:  dx, drouter, dlogits, dweights, dw1, dw2, dbias1, dbias2, those of the shared expert; each
         unless null. Gradients of weights in dtype or fp32, overwritten or added to (accumulate).
         dx may be dy. Otherwise no output may overlap another buffer of either pass
   `saved` serves one backward: the gradient by the pre-activations is written over them. With
   `recompute` a forward can serve several.

   The choice of experts has no gradient (gate_backward.cuh); noise and dropout are those of the
   forward. A slot without a row has dweights of 0. A padding row changes no sum, whatever it holds;
   nor does the x or dy of a token in gate.token_disabled, the shared expert's sums included. The dx of
   such a token is zeros, or as it is with dx_accumulate, though its y has the shared row.
   Options of the forward are followed: replicas, padding, capacity, shared expert, every activation,
   gate and up concatenated, interleaved or separate, tables of pointers.

   Memory: the workspace may be the forward's, if it has moe_layer_backward_workspace bytes. Its one
   [R, H] buffer serves copies of dy and of x, the router's operands and the rows' gradients in turn:
     192                                 counters of tiles
     max(R I, T Is) 2                    act
     max(R H 2 (fp32 rows: 4), router's) rows; with recompute and a shared expert max(R, T) H
     T K 4                               dweights, where dlogits are computed, unless given
     T E 4                               dlogits, the same
     R ceil(I / 64) 4                    parts of dweights, where these are computed
     T ceil(Is / 64) 4                   the same of shared.dweight
     T 4                                 with a shared expert and token_disabled
     R 2I 2 (R I 2 not gated), T 2Is 2   with recompute: the pre-activations
   each rounded up to 256.

   Rows of dy and x are gathered while products load them, or copied into expert order first, which is
   faster for wide experts on Hopper (`gather`; docs/performance.md).

   Numerics and errors are those of the stations. Equal inputs give equal bits. A stop fault leaves
   all outputs untouched. T = 0: gradients of weights are zeros, or as they are with accumulate.
   No call allocates or synchronises; the calls can be captured in a graph together with the forward,
   and replayed with other inputs. fp16 (sm_75) or bf16 (sm_80).
   Cost: 12 R H I flops (8 not gated) and the router's; 3 to 18 launches without a shared expert.

     moe_layer_desc l = {0};                     // as for moe_layer_forward
     moe_layer_saved_list kept;
     moe_layer_saved(&l, &kept);    l.saved = ...;      l.saved_bytes = kept.bytes;
     moe_layer_backward_desc b = {0};
     b.layer = l;  b.dy = dy;  b.dx = dx;  b.drouter = drouter;  b.dw1.base = dw1;  b.dw2.base = dw2;
     moe_layer_backward_workspace(&b, &backward);  moe_layer_workspace(&l, &forward);
     b.layer.workspace = l.workspace = ...;        // the larger one, for both
     b.layer.workspace_bytes = l.workspace_bytes = ...;
     moe_status s = moe_layer_forward(&l, stream);
     s = moe_layer_backward(&b, stream);

   Source of the method: SonicMoE, arXiv 2512.14080, which keeps x and the pre-activations alone. */
#ifndef MOE_LAYER_BACKWARD_CUH
#define MOE_LAYER_BACKWARD_CUH

#include "layer.cuh"
#include "layer/backward_prepare.cuh"

/* Writes the bytes of workspace of this backward pass to *bytes. Reads sizes, options, and which
   outputs, logits and ids are given. Errors: those of sizes and options. */
MOE_HOST moe_status moe_layer_backward_workspace(const moe_layer_backward_desc* desc, size_t* bytes)
{
    moei_layer_backward b;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    *bytes = 0;
    MOE_TRY(moei_layer_backward_resolve(desc, 0, &b));
    *bytes = b.bytes;
    return MOE_OK;
}

/* Writes the addresses of the buffers in the descriptor's workspace to *view. Errors: as of
   moe_layer_backward_workspace, and a null workspace. */
MOE_HOST moe_status moe_layer_backward_get_view(const moe_layer_backward_desc* desc,
                                                moe_layer_backward_view* view)
{
    moei_layer_backward b;
    MOE_REQUIRE(desc && view, MOE_ERR_NULL, desc);
    MOE_REQUIRE(desc->layer.workspace, MOE_ERR_NULL, workspace);
    MOE_TRY(moei_layer_backward_resolve(desc, (char*)desc->layer.workspace, &b));
    *view = b.w;
    return MOE_OK;
}

/* A prepared backward pass: all but its stream, for the device that was current. */
typedef struct moe_layer_backward_prepared {
    moe_experts_prepared recompute, shared_recompute; /* their `up` alone is run */
    moe_permute_prepared gather_dy, gather_x;
    moe_experts_backward_prepared experts, shared;
    moe_gate_backward_prepared gate;
    moe_router_backward_prepared router;
    moe_combine_prepared combine;
    moei_layer_tokens_args tokens;
    moe_launch tokens_launch; /* empty without disabled tokens */
    int32_t recomputes, gathers, has_shared, has_gate, has_router, has_dx; /* what is run */
} moe_layer_backward_prepared;

/* Prepares the experts' backward pass, with copies in expert order where they are faster. */
MOE_HOST moe_status moei_layer_backward_prepare_experts(const moe_layer_backward_desc* d,
                                                        moei_layer_backward* b,
                                                        moe_layer_backward_prepared* p)
{
    b->gathers = d->gather == MOE_LAYER_GATHER_FIRST && b->rows.row_slot;
    moei_layer_backward_describe(d, b);
    MOE_TRY(moe_experts_backward_prepare(&b->experts, &p->experts));
    if (d->gather || d->layer.intermediate < MOEI_LAYER_GATHER_FROM || !b->rows.row_slot ||
        p->experts.pre.plan.path != MOE_GEMM_PATH_WGMMA)
        return MOE_OK;
    b->gathers = 1;
    moei_layer_backward_describe(d, b);
    return moe_experts_backward_prepare(&b->experts, &p->experts);
}

/* Prepares all stages but COMBINE of a resolved descriptor. with_experts: 0: no rows reach this GPU's
   experts. */
MOE_HOST moe_status moei_layer_backward_prepare_stages(const moe_layer_backward_desc* desc,
                                                       moei_layer_backward* b, int with_experts,
                                                       moe_layer_backward_prepared* p)
{
    MOE_TRY(moei_layer_check_options(&desc->layer, &b->o, &b->l));
    /* before the stations check: a refusal names the caller's own field */
    MOE_TRY(moei_layer_backward_check_buffers(desc, b));
    if (with_experts) MOE_TRY(moei_layer_backward_prepare_experts(desc, b, p));
    else moei_layer_backward_describe(desc, b);
    p->recomputes = desc->layer.recompute;
    p->gathers = b->gathers;
    p->has_shared = b->o.has_shared;
    p->has_gate = b->has_gate;
    p->has_router = b->has_router;
    p->has_dx = desc->dx != 0;
    if (p->recomputes && with_experts) MOE_TRY(moe_experts_prepare(&b->l.experts, &p->recompute));
    if (p->gathers) {
        MOE_TRY(moe_permute_prepare(&b->gather_dy, &p->gather_dy));
        MOE_TRY(moe_permute_prepare(&b->gather_x, &p->gather_x));
    }
    if (p->has_shared) {
        if (p->recomputes)
            MOE_TRY(
                moei_layer_rename_shared(moe_experts_prepare(&b->l.shared, &p->shared_recompute)));
        MOE_TRY(moei_layer_backward_rename_shared(
            moe_experts_backward_prepare(&b->shared, &p->shared)));
    }
    if (b->w.shared_slot && desc->layer.num_tokens > 0) {
        const moe_launch_config c =
            moe_grid(((int64_t)desc->layer.num_tokens + MOEI_LAYER_TOKENS_THREADS - 1) /
                         MOEI_LAYER_TOKENS_THREADS,
                     MOEI_LAYER_TOKENS_THREADS, 0, 0);
        p->tokens.token_disabled = desc->layer.gate.token_disabled;
        p->tokens.slot = b->w.shared_slot;
        p->tokens.num_tokens = desc->layer.num_tokens;
        MOE_TRY(MOE_PREPARE(&p->tokens_launch, moei_layer_tokens, c));
    }
    if (p->has_gate) MOE_TRY(moe_gate_backward_prepare(&b->gate, &p->gate));
    return p->has_router ? moe_router_backward_prepare(&b->router, &p->router) : MOE_OK;
}

/* Fills in *p, which is empty. */
MOE_HOST moe_status moei_layer_backward_prepare(const moe_layer_backward_desc* desc,
                                                moe_layer_backward_prepared* p)
{
    moei_layer_backward b;
    MOE_TRY(moei_layer_backward_resolve(desc, (char*)desc->layer.workspace, &b));
    MOE_TRY(moei_layer_backward_prepare_stages(desc, &b, 1, p));
    return p->has_dx ? moe_combine_prepare(&b.combine, &p->combine) : MOE_OK;
}

/* Prepares a backward pass: moe_layer_backward_run queues it any number of times. Keeps the addresses
   of weight tables, not their entries. Errors: each field that is not as documented, with a status of
   its own. */
MOE_HOST moe_status moe_layer_backward_prepare(const moe_layer_backward_desc* desc,
                                               moe_layer_backward_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_layer_backward_prepare(desc, p));
}

/* Queues one stage of a prepared backward pass on `stream`; `stage` is a moe_layer_backward_stage.
   For timing, or for work of the caller's between two stages: weights' gradients are complete after
   DW2 and DW1, say, and may be reduced over ranks while the next stages run. All stages in order are
   moe_layer_backward_run; no other order is allowed. */
MOE_HOST moe_status moe_layer_backward_run_stage(const moe_layer_backward_prepared* p, int stage,
                                                 cudaStream_t stream)
{
    const moe_experts_backward_prepared *e, *s;
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    e = &p->experts, s = &p->shared;
    switch (stage) {
    case MOE_LAYER_BACKWARD_RECOMPUTE:
        if (!p->recomputes) return MOE_OK;
        MOE_TRY(moe_grouped_gemm_run(&p->recompute.up, stream));
        return p->has_shared ? moe_grouped_gemm_run(&p->shared_recompute.up, stream) : MOE_OK;
    case MOE_LAYER_BACKWARD_GATHER_DY:
        return p->gathers ? moe_permute_run(&p->gather_dy, stream) : MOE_OK;
    case MOE_LAYER_BACKWARD_GATHER_X:
        return p->gathers ? moe_permute_run(&p->gather_x, stream) : MOE_OK;
    case MOE_LAYER_BACKWARD_GATE:
        return p->has_gate ? moe_gate_backward_run(&p->gate, stream) : MOE_OK;
    case MOE_LAYER_BACKWARD_ROUTER:
        return p->has_router ? moe_router_backward_run(&p->router, stream) : MOE_OK;
    case MOE_LAYER_BACKWARD_COMBINE:
        return p->has_dx ? moe_combine_run(&p->combine, stream) : MOE_OK;
    case MOE_LAYER_BACKWARD_SHARED_PRE: /* empty without a shared expert, as are its other stages */
        MOE_TRY(MOE_RUN(&p->tokens_launch, p->tokens, stream));
        return moe_experts_backward_run_stage(s, MOE_EXPERTS_BACKWARD_PRE, stream);
#define MOEI_LAYER_BACKWARD_EXPERTS(layer, own, prepared)                                          \
    case MOE_LAYER_BACKWARD_##layer:                                                               \
        return moe_experts_backward_run_stage(prepared, MOE_EXPERTS_BACKWARD_##own, stream);
        MOEI_LAYER_BACKWARD_EXPERTS(PRE, PRE, e)
        MOEI_LAYER_BACKWARD_EXPERTS(DW2, DW2, e)
        MOEI_LAYER_BACKWARD_EXPERTS(DBIAS2, DBIAS2, e)
        MOEI_LAYER_BACKWARD_EXPERTS(DWEIGHTS, DWEIGHTS, e)
        MOEI_LAYER_BACKWARD_EXPERTS(DW1, DW1, e)
        MOEI_LAYER_BACKWARD_EXPERTS(DBIAS1, DBIAS1, e)
        MOEI_LAYER_BACKWARD_EXPERTS(ROWS, ROWS, e)
        MOEI_LAYER_BACKWARD_EXPERTS(SHARED_DW2, DW2, s)
        MOEI_LAYER_BACKWARD_EXPERTS(SHARED_DBIAS2, DBIAS2, s)
        MOEI_LAYER_BACKWARD_EXPERTS(SHARED_DWEIGHT, DWEIGHTS, s)
        MOEI_LAYER_BACKWARD_EXPERTS(SHARED_DW1, DW1, s)
        MOEI_LAYER_BACKWARD_EXPERTS(SHARED_DBIAS1, DBIAS1, s)
        MOEI_LAYER_BACKWARD_EXPERTS(SHARED_ROWS, ROWS, s)
#undef MOEI_LAYER_BACKWARD_EXPERTS
    default: return MOE_STATUS(MOE_ERR_OPTION, stage);
    }
}

/* Queues a prepared backward pass on `stream`. Refuses a null p. */
MOE_HOST moe_status moe_layer_backward_run(const moe_layer_backward_prepared* p,
                                           cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    for (int stage = 0; stage < MOE_LAYER_BACKWARD_STAGES; ++stage)
        MOE_TRY(moe_layer_backward_run_stage(p, stage, stream));
    return MOE_OK;
}

/* Prepares and runs. Where a field is refused, nothing is queued and no output is written. */
MOE_HOST moe_status moe_layer_backward(const moe_layer_backward_desc* desc, cudaStream_t stream)
{
    moe_layer_backward_prepared p;
    MOE_TRY(moe_layer_backward_prepare(desc, &p));
    return moe_layer_backward_run(&p, stream);
}

/* Loads every kernel of this translation unit that a backward pass may run, the forward's included. */
MOE_HOST moe_status moe_layer_backward_preload(void)
{
    MOE_TRY(moe_layer_preload());
    MOE_TRY(moe_grouped_gemm_gradient_preload());
    MOE_TRY(moe_k_grouped_gemm_preload());
    MOE_TRY(moe_permute_preload());
    MOE_TRY(moe_gate_backward_preload());
    MOE_TRY(moe_router_backward_preload());
    MOE_TRY(moe_experts_backward_preload());
    return moe_preload_kernel((const void*)moei_layer_tokens);
}

MOEI_PRELOAD_INCLUDED(layer_backward)

#endif
