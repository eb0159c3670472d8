/* layer.cuh: the whole MoE layer on one GPU, x -> y.

     logits = x router^T            router.cuh
     ids, weights = gate(logits)    gate.cuh, with all its rules
     rows in expert order           route.cuh, with replicas, padding and capacity
     rows = experts(x)              experts.cuh, two launches
     shared = expert(x)             the same with one expert for all tokens, if there is one
     y = residual + combine(rows) + weight shared    combine.cuh

   In:   x [T, H], router [E, H], w1 [P, 2I, H], w2 [P, H, I], biases and residual where wanted
   Out:  y [T, H]; y may be x or the residual itself
   A caller that has logits of its own sets `logits` and no router; one that has ids and weights
   sets those and neither. P, the experts that have weights, is E, or route.num_replicas with
   replicas; ids and everything before them count the E experts that the router knows.

   Options of gate and route stand in the nested descriptors; what the layer itself fills in there
   must be 0 (else: `gate` or `route`, contradicts another field). A shared expert (`shared`) costs
   two more launches and no copy: combine adds its rows last.

   A stop fault (base/fault.h) in the fault word keeps every later call from writing y until the
   caller clears the word. T = 0 is no error, but the workspace must be there.
   Nothing is allocated and nothing synchronised; the calls can be captured in a graph and the
   graph replayed with other inputs. Six launches, without options. The same bits every run.

   Workspace, asked for by moe_layer_workspace (in bytes, each piece rounded up to 256):
     T E 4  logits        (unless given)      T K 4 + T K 4  ids, weights   (unless given)
     moe_num_chunks(T) E 4  chunk counts      (except with ids or replicas)
     what moe_gate_workspace says             0 for most
     what moe_route_workspace says            0 except with ids, replicas or capacity by weight
     P 4 + (P + 1) 4  counts, offsets         R 4  row_slot         T K 8  places
     R I 2  act                               R H 2  rows, R H 4 with fp32 rows
     T Is 2 + T H 2 (fp32 rows: T H 4)  of the shared expert, where there is one, of width Is
   R, the rows, is T K, or what moe_route_max_rows says with options of route.
   moe_layer_get_view tells where each piece lies, for statistics or for a backward pass.

     moe_layer_desc l = {0};
     l.x = x;  l.router = router;  l.w1.base = w1;  l.w2.base = w2;  l.y = y;
     l.num_tokens = T;  l.hidden = H;  l.intermediate = I;  l.num_experts = E;  l.top_k = K;
     l.gate.renormalize = 1;
     moe_layer_workspace(&l, &bytes);   l.workspace = ...;  l.workspace_bytes = bytes;
     moe_status s = moe_layer_forward(&l, stream); */
#ifndef MOE_LAYER_CUH
#define MOE_LAYER_CUH

#include "layer/prepare.cuh"

/* Bytes of workspace for this layer: by sizes, options and by which of logits and ids are given.
   Errors: theirs. */
MOE_HOST moe_status moe_layer_workspace(const moe_layer_desc* desc, size_t* bytes)
{
    moe_layer_view v;
    moei_layer_options o;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    *bytes = 0;
    MOE_TRY(moei_layer_resolve(desc, &o));
    moei_layer_carve(desc, &o, 0, &v, bytes);
    return MOE_OK;
}

/* Where the pieces lie in the descriptor's workspace. */
MOE_HOST moe_status moe_layer_get_view(const moe_layer_desc* desc, moe_layer_view* view)
{
    size_t bytes;
    moei_layer_options o;
    MOE_REQUIRE(desc && view, MOE_ERR_NULL, desc);
    MOE_REQUIRE(desc->workspace, MOE_ERR_NULL, workspace);
    MOE_TRY(moei_layer_resolve(desc, &o));
    moei_layer_carve(desc, &o, desc->workspace, view, &bytes);
    return MOE_OK;
}

/* A layer with all but its stream settled, for the device that was current. */
typedef struct moe_layer_prepared {
    moe_router_prepared router; /* with logits or ids given it is not run */
    moe_gate_prepared gate;     /* with ids the same */
    moe_route_prepared route;
    moe_experts_prepared experts, shared; /* the shared expert where there is one */
    moe_combine_prepared combine;
    int32_t has_router, has_gate, has_shared;
} moe_layer_prepared;

/* Fills in *p, which is empty. */
MOE_HOST moe_status moei_layer_prepare(const moe_layer_desc* desc, moe_layer_prepared* p)
{
    moei_layer_options o;
    moei_layer_stations l;
    moe_layer_view v;
    size_t bytes;
    MOE_TRY(moei_layer_resolve(desc, &o));
    moei_layer_carve(desc, &o, desc->workspace, &v, &bytes);
    moei_layer_describe(desc, &o, &v, &l);
    MOE_TRY(moei_layer_check_options(desc, &o, &l));
    MOE_TRY(moei_layer_check_buffers(desc, &v, bytes)); /* the caller's own fields come first */
    p->has_router = o.has_router;
    p->has_gate = o.has_gate;
    p->has_shared = o.has_shared;
    if (o.has_router) MOE_TRY(moe_router_prepare(&l.router, &p->router));
    if (o.has_gate) MOE_TRY(moe_gate_prepare(&l.gate, &p->gate));
    MOE_TRY(moe_route_prepare(&l.route, &p->route));
    MOE_TRY(moe_experts_prepare(&l.experts, &p->experts));
    if (o.has_shared) MOE_TRY(moei_layer_rename_shared(moe_experts_prepare(&l.shared, &p->shared)));
    return moe_combine_prepare(&l.combine, &p->combine);
}

/* Settles a layer: moe_layer_run queues it any number of times. Keeps the addresses of weight tables,
   not their entries: experts may move between runs. Errors: every field as documented above, each with
   its own status. T = 0 is no error. */
MOE_HOST moe_status moe_layer_prepare(const moe_layer_desc* desc, moe_layer_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_layer_prepare(desc, p));
}

/* Queues one stage of a prepared layer on `stream`: for timing, or to put work of one's own between
   stages. All stages in order are moe_layer_run. */
MOE_HOST moe_status moe_layer_run_stage(const moe_layer_prepared* p, int stage, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    switch (stage) {
    case MOE_LAYER_ROUTER: return p->has_router ? moe_router_run(&p->router, stream) : MOE_OK;
    case MOE_LAYER_GATE: return p->has_gate ? moe_gate_run(&p->gate, stream) : MOE_OK;
    case MOE_LAYER_ROUTE: return moe_route_run(&p->route, stream);
    case MOE_LAYER_UP: return moe_grouped_gemm_run(&p->experts.up, stream);
    case MOE_LAYER_DOWN: return moe_grouped_gemm_run(&p->experts.down, stream);
    case MOE_LAYER_SHARED_UP:
        return p->has_shared ? moe_grouped_gemm_run(&p->shared.up, stream) : MOE_OK;
    case MOE_LAYER_SHARED_DOWN:
        return p->has_shared ? moe_grouped_gemm_run(&p->shared.down, stream) : MOE_OK;
    case MOE_LAYER_COMBINE: return moe_combine_run(&p->combine, stream);
    default: return MOE_STATUS(MOE_ERR_OPTION, stage);
    }
}

/* Queues a prepared layer on `stream`. */
MOE_HOST moe_status moe_layer_run(const moe_layer_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    for (int stage = 0; stage < MOE_LAYER_STAGES; ++stage)
        MOE_TRY(moe_layer_run_stage(p, stage, stream));
    return MOE_OK;
}

/* Prepares and runs. Nothing is queued where a field is refused, and y is untouched. */
MOE_HOST moe_status moe_layer_forward(const moe_layer_desc* desc, cudaStream_t stream)
{
    moe_layer_prepared p;
    MOE_TRY(moe_layer_prepare(desc, &p));
    return moe_layer_run(&p, stream);
}

/* Which path and tiles the experts of this layer run on the current device. */
MOE_HOST moe_status moe_layer_plan(const moe_layer_desc* desc, moe_gemm_plan* up,
                                   moe_gemm_plan* down)
{
    moe_layer_prepared p;
    MOE_REQUIRE(desc && up && down, MOE_ERR_NULL, desc);
    MOE_TRY(moe_layer_prepare(desc, &p));
    *up = p.experts.up.plan;
    *down = p.experts.down.plan;
    return MOE_OK;
}

/* Loads every kernel of this translation unit that a layer may run now, before anything spins on
   the GPU: a first launch under lazy loading synchronises. */
MOE_HOST moe_status moe_layer_preload(void)
{
    MOE_TRY(moe_router_preload());
    MOE_TRY(moe_gate_preload());
    MOE_TRY(moe_route_preload());
    MOE_TRY(moe_grouped_gemm_preload());
    return moe_combine_preload();
}

#endif
