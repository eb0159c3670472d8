/* layer.cuh: the whole MoE layer on one GPU, x -> y.

     logits = x router^T            router.cuh
     ids, weights = gate(logits)    gate.cuh, with all its rules
     rows in expert order           route.cuh, with replicas, padding and capacity
     rows = experts(x)              experts.cuh, two launches
     shared = expert(x)             one expert for all tokens, where a shared expert is given
     y = residual + combine(rows) + weight shared    combine.cuh

   In:   x [T, H], router [E, H], w1 [P, 2I, H], w2 [P, H, I]; optional biases and residual
   Out:  y [T, H]; y may be x or the residual itself; with `saved` not x, which backward reads

   `logits` replaces the router: the caller sets one of the two. `ids` with `weights` replaces
   router and gate: the caller sets neither router nor logits. P, the number of experts with
   weights, is E, or route.num_replicas with replicas. ids and everything before them count the E
   experts that the router knows.

   Options of gate and route are fields of the nested descriptors. What the layer itself fills in
   there must be 0 (else: `gate` or `route`, contradicts another field).

   A stop fault (base/fault.h) in the fault word keeps every later call from writing y until the
   caller clears the word. T = 0 is no error, but the workspace must be given.

   fp16 (sm_75) or bf16 (sm_80). Numerics and sources are those of the stations. Equal inputs give
   equal bits. No call allocates or synchronises. The calls can be captured in a graph, and the
   graph replayed with other inputs.

   Cost: six launches without options. A shared expert costs two more launches and no copy: combine
   adds its rows last. With products on the wgmma path a memset of 64 bytes comes first.

   Workspace, as moe_layer_workspace returns it (in bytes, each buffer rounded up to 256):
     T E 4  logits        (unless given)      T K 4 + T K 4  ids, weights   (unless given)
     (P + 1) 4  offsets   R 4  row_slot       T K 8  places
     moe_num_chunks(T) E 4  chunk counts      (except with ids or replicas)
     bytes of moe_gate_workspace              0 for most options
     bytes of moe_route_workspace             0 except with ids, replicas or capacity by weight
     P 4  counts
     2 MOE_EXPERTS_WORKSPACE  the experts'   R I 2  act
     R H 2  rows, R H 4 with fp32 rows
     T Is 2 + T H 2 (fp32 rows: T H 4)  of the shared expert, if given, of width Is
   R, the rows, is T K, or the value of moe_route_max_rows with options of route. With `saved` the
   first two lines are there and not in the workspace.

   Training: with `saved` the layer keeps what layer_backward.cuh needs; moe_layer_saved lists it.

   moe_layer_get_view returns the address of each buffer, for statistics, say.

     moe_layer_desc l = {0};
     l.x = x;  l.router = router;  l.w1.base = w1;  l.w2.base = w2;  l.y = y;
     l.num_tokens = T;  l.hidden = H;  l.intermediate = I;  l.num_experts = E;  l.top_k = K;
     l.gate.renormalize = 1;
     moe_layer_workspace(&l, &bytes);   l.workspace = ...;  l.workspace_bytes = bytes;
     moe_status s = moe_layer_forward(&l, stream); */
#ifndef MOE_LAYER_CUH
#define MOE_LAYER_CUH

#include "layer/prepare.cuh"

/* Writes the bytes of workspace of this layer to *bytes. Reads sizes, options, and which of logits,
   ids and saved are given. Errors: those of sizes and options. */
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

/* Lists what stays from a forward with `saved` to its backward: x and, in `saved` or given by the
   caller, the routing tables and pre-activations. Reads what moe_layer_workspace reads. list->bytes
   is what saved_bytes must be. Errors: those of sizes and options. */
MOE_HOST moe_status moe_layer_saved(const moe_layer_desc* desc, moe_layer_saved_list* list)
{
    moei_layer_options o;
    MOE_REQUIRE(desc && list, MOE_ERR_NULL, desc);
    memset(list, 0, sizeof *list);
    MOE_TRY(moei_layer_resolve(desc, &o));
    moei_layer_list_saved(desc, &o, list);
    return MOE_OK;
}

/* Writes the addresses of the buffers in the descriptor's workspace to *view. Errors: as of
   moe_layer_workspace, and a null workspace. */
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

/* A prepared layer: all but its stream, for the device that was current. */
typedef struct moe_layer_prepared {
    moe_router_prepared router; /* not run where logits or ids are given */
    moe_gate_prepared gate;     /* not run where ids are given */
    moe_route_prepared route;
    moe_experts_prepared experts, shared; /* shared: the shared expert, where given */
    moe_combine_prepared combine;
    int32_t has_router, has_gate, has_shared; /* 0 or 1: what is run */
} moe_layer_prepared;

/* Fills in *p, which is empty. Called by moe_layer_prepare alone. */
MOE_HOST moe_status moei_layer_prepare(const moe_layer_desc* desc, moe_layer_prepared* p)
{
    moei_layer_options o;
    moei_layer_stations l;
    moe_layer_view v;
    moe_layer_saved_list saved;
    size_t bytes;
    MOE_TRY(moei_layer_resolve(desc, &o));
    MOE_TRY(moe_layer_saved(desc, &saved));
    moei_layer_carve(desc, &o, desc->workspace, &v, &bytes);
    moei_layer_describe(desc, &o, &v, &l);
    MOE_TRY(moei_layer_check_options(desc, &o, &l));
    /* before the stations check: a refusal names the caller's own field */
    MOE_TRY(moei_layer_check_buffers(desc, &v, bytes, saved.bytes));
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

/* Prepares a layer: moe_layer_run queues it any number of times. Keeps the addresses of weight
   tables, not their entries: experts may move between runs. T = 0 is no error. Errors: each field
   of moe_layer_desc outside its documented range, with a status of its own. */
MOE_HOST moe_status moe_layer_prepare(const moe_layer_desc* desc, moe_layer_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_layer_prepare(desc, p));
}

/* Queues one part of a prepared layer. cleared: the experts' counters of tiles are 0. */
MOE_HOST moe_status moei_layer_run_part(const moe_layer_prepared* p, int part, int cleared,
                                        cudaStream_t stream)
{
    moe_status (*const product)(const moe_grouped_gemm_prepared*, cudaStream_t) =
        cleared ? moei_gemm_run_cleared : moe_grouped_gemm_run;
    switch (part) {
    case MOE_LAYER_ROUTER: return p->has_router ? moe_router_run(&p->router, stream) : MOE_OK;
    case MOE_LAYER_GATE: return p->has_gate ? moe_gate_run(&p->gate, stream) : MOE_OK;
    case MOE_LAYER_ROUTE: return moe_route_run(&p->route, stream);
    case MOE_LAYER_UP: return product(&p->experts.up, stream);
    case MOE_LAYER_DOWN: return product(&p->experts.down, stream);
    case MOE_LAYER_SHARED_UP: return p->has_shared ? product(&p->shared.up, stream) : MOE_OK;
    case MOE_LAYER_SHARED_DOWN: return p->has_shared ? product(&p->shared.down, stream) : MOE_OK;
    case MOE_LAYER_COMBINE: return moe_combine_run(&p->combine, stream);
    default: return MOE_STATUS(MOE_ERR_OPTION, part);
    }
}

/* Queues one part of a prepared layer on `stream`; `part` is a moe_layer_part. For timing, or for
   work of the caller's between two parts. All parts in order are moe_layer_run. */
MOE_HOST moe_status moe_layer_run_part(const moe_layer_prepared* p, int part, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    return moei_layer_run_part(p, part, 0, stream);
}

/* Queues a prepared layer on `stream`. The counters of all products are cleared first, so that
   nothing stands between two kernels: each may start while the one before it ends. */
MOE_HOST moe_status moe_layer_run(const moe_layer_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    if (moei_experts_count(&p->experts) || (p->has_shared && moei_experts_count(&p->shared)))
        MOE_TRY_CUDA(cudaMemsetAsync(p->experts.workspace, 0, 2 * MOE_EXPERTS_WORKSPACE, stream));
    for (int part = 0; part < MOE_LAYER_PARTS; ++part)
        MOE_TRY(moei_layer_run_part(p, part, 1, stream));
    return MOE_OK;
}

/* Prepares and runs. Where a field is refused, nothing is queued and y is untouched. */
MOE_HOST moe_status moe_layer_forward(const moe_layer_desc* desc, cudaStream_t stream)
{
    moe_layer_prepared p;
    MOE_TRY(moe_layer_prepare(desc, &p));
    return moe_layer_run(&p, stream);
}

/* Writes the path and the tiles of this layer's experts on the current device to *up and *down. */
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

/* Loads every kernel of this translation unit that a layer may run. Call before any kernel spins on
   the GPU: under lazy loading a first launch synchronises. */
MOE_HOST moe_status moe_layer_preload(void)
{
    MOE_TRY(moe_router_preload());
    MOE_TRY(moe_gate_preload());
    MOE_TRY(moe_route_preload());
    MOE_TRY(moe_grouped_gemm_preload());
    return moe_combine_preload();
}

#endif
