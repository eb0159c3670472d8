/* layer.cuh: the whole MoE layer on one GPU, x -> y.

     logits = x router^T            router.cuh
     ids, weights = gate(logits)    gate.cuh
     rows in expert order           route.cuh
     rows = experts(x)              experts.cuh, two launches
     y = residual + combine(rows)   combine.cuh

   In:   x [T, H], router [E, H], w1 [E, 2I, H], w2 [E, H, I], biases and residual where wanted
   Out:  y [T, H]; y may be x or the residual itself
   A caller that has logits of its own sets `logits` and no router; one that has ids and weights
   sets those and neither.

   A stop fault (base/fault.h) in the fault word keeps every later call from writing y until the
   caller clears the word. T = 0 is no error, but the workspace must be there.
   Nothing is allocated and nothing synchronised; the calls can be captured in a graph and the
   graph replayed with other inputs. Six launches at most. The same bits every run.

   Workspace, asked for by moe_layer_workspace (in bytes, each piece rounded up to 256):
     T E 4  logits        (unless given)      T K 4 + T K 4  ids, weights   (unless given)
     moe_num_chunks(T) E 4  chunk counts      E 4 + (E + 1) 4  counts, offsets
     T K 4  row_slot                          T K 8  places
     T K I 2  act                             T K H 2  rows
   moe_layer_get_view tells where each piece lies, for statistics or for a backward pass.

     moe_layer_desc l = {0};
     l.x = x;  l.router = router;  l.w1.base = w1;  l.w2.base = w2;  l.y = y;
     l.num_tokens = T;  l.hidden = H;  l.intermediate = I;  l.num_experts = E;  l.top_k = K;
     moe_layer_workspace(&l, &bytes);   l.workspace = ...;  l.workspace_bytes = bytes;
     moe_status s = moe_layer_forward(&l, stream); */
#ifndef MOE_LAYER_CUH
#define MOE_LAYER_CUH

#include "combine.cuh"
#include "experts.cuh"
#include "gate.cuh"
#include "route.cuh"
#include "router.cuh"

typedef struct moe_layer_desc {
    /* in */
    const void* x;           /* [T, H] dtype, 16-byte aligned */
    const void* router;      /* [E, H] router_dtype; or null with logits or ids */
    const float* logits;     /* [T, E] fp32 in place of the router; or null */
    const int32_t* ids;      /* [T, K] in place of router and gate, -1 = unused; or null */
    const float* weights;    /* [T, K] with ids */
    moe_weights w1;          /* [E, 2I, H] per gate_up, dtype */
    moe_weights w2;          /* [E, H, I] dtype */
    const void* bias1;       /* [E, 2I] dtype; or null */
    const void* bias2;       /* [E, H] dtype; or null */
    const void* residual;    /* [T, H] dtype added to y; or null */
    int64_t x_stride;        /* elements between rows; 0 = H; multiple of 8 */
    int64_t residual_stride; /* elements between rows; 0 = H */
    /* out */
    void* y;          /* [T, H] dtype */
    int64_t y_stride; /* elements between rows; 0 = H */
    uint64_t* fault;  /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;   /* T >= 0 */
    int32_t hidden;       /* H, multiple of 8 */
    int32_t intermediate; /* I, multiple of 8 */
    int32_t num_experts;  /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;        /* K, 1 .. MOE_COMBINE_MAX_TOP_K; at most E unless ids are given */
    int32_t dtype;        /* fp16 or bf16; 0 = bf16 */
    int32_t router_dtype; /* 0 = dtype */
    int32_t score;        /* moe_score; 0 = softmax; as the next two the gate's, 0 with ids */
    int32_t renormalize;  /* 0 or 1 */
    float scale;          /* factor on the weights; 0 = 1 */
    int32_t gate_up;      /* moe_gate_up; 0 = concatenated */
    int32_t tile;         /* moe_tile; 0 = chosen by shape and device */
    /* workspace */
    void* workspace; /* 256-byte aligned */
    size_t workspace_bytes;
} moe_layer_desc;

/* Where the pieces of the workspace lie; what the caller gave points to the caller's own. */
typedef struct moe_layer_view {
    float* logits;          /* [T, E]; null where ids were given */
    int32_t* ids;           /* [T, K] */
    float* weights;         /* [T, K] */
    int32_t* chunk_count;   /* [moe_num_chunks(T), E] */
    int32_t* expert_count;  /* [E] */
    int32_t* expert_offset; /* [E + 1] */
    int32_t* row_slot;      /* [T * K] */
    moe_place* place;       /* [T, K] */
    void* act;              /* [T * K, I] */
    void* rows;             /* [T * K, H] */
} moe_layer_view;

typedef enum moe_layer_stage {
    MOE_LAYER_ROUTER,
    MOE_LAYER_GATE,
    MOE_LAYER_ROUTE,
    MOE_LAYER_UP,
    MOE_LAYER_DOWN,
    MOE_LAYER_COMBINE,
    MOE_LAYER_STAGES
} moe_layer_stage;

MOE_HOST const char* moe_layer_stage_name(int stage)
{
    static const char* const name[] = {"router", "gate", "route", "up", "down", "combine"};
    return stage >= 0 && stage < MOE_LAYER_STAGES ? name[stage] : "?";
}

/* The stations' descriptors for one layer call. */
typedef struct moei_layer {
    moe_router_desc router;
    moe_gate_desc gate;
    moe_route_desc route;
    moe_experts_desc experts;
    moe_combine_desc combine;
    int has_router, has_gate;
} moei_layer;

/* The next piece of a workspace; with a null base only counts. */
MOE_HOST void* moei_carve(char* base, size_t* at, uint64_t bytes)
{
    void* p = base ? base + *at : (char*)0;
    *at += (size_t)((bytes + 255) / 256 * 256);
    return p;
}

/* Shares the workspace out; both the size and the launch come from here. */
MOE_HOST moe_status moei_layer_carve(const moe_layer_desc* d, moe_layer_view* v, size_t* bytes)
{
    char* base = (char*)d->workspace;
    uint64_t T, K, E, slots;
    *bytes = 0;
    MOEI_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOEI_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                 num_experts);
    MOEI_REQUIRE(d->top_k >= 1 && d->top_k <= MOE_COMBINE_MAX_TOP_K, MOE_ERR_RANGE, top_k);
    MOEI_REQUIRE(d->ids || d->top_k <= d->num_experts, MOE_ERR_RANGE, top_k);
    MOEI_REQUIRE(d->hidden >= 8 && d->hidden % 8 == 0, MOE_ERR_RANGE, hidden);
    MOEI_REQUIRE(d->intermediate >= 8 && d->intermediate % 8 == 0, MOE_ERR_RANGE, intermediate);
    T = (uint64_t)d->num_tokens, K = (uint64_t)d->top_k, E = (uint64_t)d->num_experts,
    slots = T * K;
    MOEI_REQUIRE(slots <= 0x7fffffffu, MOE_ERR_RANGE, num_tokens);
    v->logits = (float*)d->logits;
    v->ids = (int32_t*)d->ids;
    v->weights = (float*)d->weights;
    if (!d->ids) {
        if (!d->logits) v->logits = (float*)moei_carve(base, bytes, T * E * 4);
        v->ids = (int32_t*)moei_carve(base, bytes, slots * 4);
        v->weights = (float*)moei_carve(base, bytes, slots * 4);
    }
    v->chunk_count =
        (int32_t*)moei_carve(base, bytes, E * (uint64_t)moe_num_chunks((int64_t)T) * 4);
    v->expert_count = (int32_t*)moei_carve(base, bytes, E * 4);
    v->expert_offset = (int32_t*)moei_carve(base, bytes, (E + 1) * 4);
    v->row_slot = (int32_t*)moei_carve(base, bytes, slots * 4);
    v->place = (moe_place*)moei_carve(base, bytes, slots * 8);
    v->act = moei_carve(base, bytes, slots * (uint64_t)d->intermediate * 2);
    v->rows = moei_carve(base, bytes, slots * (uint64_t)d->hidden * 2);
    return MOE_OK;
}

/* Bytes of workspace for this layer: by the sizes and by which of logits and ids are given. */
MOE_HOST moe_status moe_layer_workspace(const moe_layer_desc* desc, size_t* bytes)
{
    moe_layer_view v;
    moe_layer_desc d;
    MOEI_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    d = *desc;
    d.workspace = 0;
    return moei_layer_carve(&d, &v, bytes);
}

/* Where the pieces lie in the descriptor's workspace. */
MOE_HOST moe_status moe_layer_get_view(const moe_layer_desc* desc, moe_layer_view* view)
{
    size_t bytes;
    MOEI_REQUIRE(desc && view, MOE_ERR_NULL, desc);
    MOEI_REQUIRE(desc->workspace, MOE_ERR_NULL, workspace);
    return moei_layer_carve(desc, view, &bytes);
}

/* Every station's own check. */
MOE_HOST moe_status moei_layer_check_stations(const moei_layer* l)
{
    moe_router_desc router = l->router;
    moe_gate_desc gate = l->gate;
    moe_route_desc route = l->route;
    moe_combine_desc combine = l->combine;
    moe_grouped_gemm_desc g, up, down;
    int gemm;
    if (l->has_router) MOEI_TRY(moei_router_check(&router, &g, &gemm));
    if (l->has_gate) MOEI_TRY(moei_gate_check(&gate));
    else route.chunk_count = (int32_t*)route.workspace;
    MOEI_TRY(moei_route_check(&route));
    MOEI_TRY(moei_experts_check(&l->experts, &up, &down));
    return moei_combine_check(&combine);
}

/* y, the workspace and the fault word lie on nothing else; but y may be x or the residual. */
MOE_HOST moe_status moei_layer_check_overlap(const moe_layer_desc* d, size_t workspace)
{
    const int64_t T = d->num_tokens, H = d->hidden, I = d->intermediate, E = d->num_experts;
    const int dtype = d->dtype ? d->dtype : MOE_BF16;
    const int64_t x_stride = d->x_stride ? d->x_stride : H,
                  y_stride = d->y_stride ? d->y_stride : H;
    const int64_t residual_stride = d->residual_stride ? d->residual_stride : H;
    const uint64_t slots = (uint64_t)T * (uint64_t)d->top_k;
    const uint64_t w1 =
        moei_weight_extent(&d->w1, E, d->gate_up == MOE_GATE_UP_SEPARATE ? I : 2 * I, H);
    const moei_range r[] = {{d->router,
                             moei_extent(E, H, H, d->router_dtype ? d->router_dtype : dtype),
                             MOE_FIELD_router},
                            {d->logits, (uint64_t)T * (uint64_t)E * 4, MOE_FIELD_logits},
                            {d->ids, slots * 4, MOE_FIELD_ids},
                            {d->weights, slots * 4, MOE_FIELD_weights},
                            {d->w1.base, w1, MOE_FIELD_w1},
                            {d->w1.up, w1, MOE_FIELD_w1},
                            {d->w1.table, (uint64_t)E * 8, MOE_FIELD_w1},
                            {d->w1.up_table, (uint64_t)E * 8, MOE_FIELD_w1},
                            {d->w2.base, moei_weight_extent(&d->w2, E, H, I), MOE_FIELD_w2},
                            {d->w2.table, (uint64_t)E * 8, MOE_FIELD_w2},
                            {d->bias1, (uint64_t)(E * 2 * I) * 2, MOE_FIELD_bias1},
                            {d->bias2, (uint64_t)(E * H) * 2, MOE_FIELD_bias2},
                            {d->residual == d->y && residual_stride == y_stride ? 0 : d->residual,
                             moei_extent(T, residual_stride, H, dtype), MOE_FIELD_residual},
                            {d->x == d->y && x_stride == y_stride ? 0 : d->x,
                             moei_extent(T, x_stride, H, dtype), MOE_FIELD_x},
                            {d->y, moei_extent(T, y_stride, H, dtype), MOE_FIELD_y},
                            {d->workspace, workspace, MOE_FIELD_workspace},
                            {d->fault, 8, MOE_FIELD_fault}};
    return T > 0 ? moei_disjoint(r, 14, 17) : MOE_OK;
}

/* Checks everything and fills in the stations' descriptors. */
MOE_HOST moe_status moei_layer_prepare(const moe_layer_desc* d, moei_layer* l)
{
    moe_layer_view v;
    size_t bytes;
    const int dtype = d->dtype ? d->dtype : MOE_BF16;
    MOEI_TRY(moei_layer_carve(d, &v, &bytes));
    MOEI_REQUIRE(dtype == MOE_BF16 || dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    MOEI_REQUIRE(d->router_dtype == 0 || moe_dtype_bytes(d->router_dtype), MOE_ERR_DTYPE,
                 router_dtype);
    MOEI_REQUIRE(d->workspace, MOE_ERR_NULL, workspace);
    MOEI_REQUIRE(moei_aligned(d->workspace, 256), MOE_ERR_ALIGN, workspace);
    MOEI_REQUIRE(d->workspace_bytes >= bytes, MOE_ERR_WORKSPACE, workspace_bytes);
    memset(l, 0, sizeof *l);
    l->has_gate = !d->ids;
    l->has_router = !d->ids && !d->logits;
    if (d->ids) {
        MOEI_REQUIRE(!d->logits, MOE_ERR_CONFLICT, logits);
        MOEI_REQUIRE(!d->router, MOE_ERR_CONFLICT, router);
        MOEI_REQUIRE(d->weights || d->num_tokens == 0, MOE_ERR_NULL, weights);
        MOEI_REQUIRE(d->score == 0, MOE_ERR_CONFLICT, score); /* no gate runs */
        MOEI_REQUIRE(d->renormalize == 0, MOE_ERR_CONFLICT, renormalize);
        MOEI_REQUIRE(d->scale == 0.0f, MOE_ERR_CONFLICT, scale);
    } else {
        MOEI_REQUIRE(!d->weights, MOE_ERR_CONFLICT, weights);
        MOEI_REQUIRE(!(d->logits && d->router), MOE_ERR_CONFLICT, router);
    }

    l->router.x = d->x;
    l->router.router = d->router;
    l->router.x_stride = d->x_stride;
    l->router.x_dtype = dtype;
    l->router.router_dtype = d->router_dtype;
    l->router.logits = v.logits;
    l->router.fault = d->fault;
    l->router.num_tokens = d->num_tokens;
    l->router.hidden = d->hidden;
    l->router.num_experts = d->num_experts;

    l->gate.logits = v.logits;
    l->gate.ids = v.ids;
    l->gate.weights = v.weights;
    l->gate.chunk_count = v.chunk_count;
    l->gate.fault = d->fault;
    l->gate.num_tokens = d->num_tokens;
    l->gate.num_experts = d->num_experts;
    l->gate.top_k = d->top_k;
    l->gate.score = d->score;
    l->gate.renormalize = d->renormalize;
    l->gate.scale = d->scale;

    l->route.ids = v.ids;
    if (l->has_gate) l->route.chunk_count = v.chunk_count;
    else l->route.workspace = v.chunk_count;
    l->route.workspace_bytes = (size_t)d->num_experts * (size_t)moe_num_chunks(d->num_tokens) * 4;
    l->route.expert_count = v.expert_count;
    l->route.expert_offset = v.expert_offset;
    l->route.row_slot = v.row_slot;
    l->route.place = v.place;
    l->route.fault = d->fault;
    l->route.num_tokens = d->num_tokens;
    l->route.num_experts = d->num_experts;
    l->route.top_k = d->top_k;

    l->experts.x = d->x;
    l->experts.x_stride = d->x_stride;
    l->experts.w1 = d->w1;
    l->experts.w2 = d->w2;
    l->experts.bias1 = d->bias1;
    l->experts.bias2 = d->bias2;
    l->experts.expert_offset = v.expert_offset;
    l->experts.row_slot = v.row_slot;
    l->experts.act = v.act;
    l->experts.rows = v.rows;
    l->experts.fault = d->fault;
    l->experts.num_tokens = d->num_tokens;
    l->experts.hidden = d->hidden;
    l->experts.intermediate = d->intermediate;
    l->experts.num_experts = d->num_experts;
    l->experts.top_k = d->top_k;
    l->experts.dtype = dtype;
    l->experts.gate_up = d->gate_up;
    l->experts.tile = d->tile;

    l->combine.rows = v.rows;
    l->combine.place = v.place;
    l->combine.weights = v.weights;
    l->combine.residual = d->residual;
    l->combine.residual_stride = d->residual_stride;
    l->combine.rows_dtype = dtype;
    l->combine.y = d->y;
    l->combine.y_stride = d->y_stride;
    l->combine.fault = d->fault;
    l->combine.num_tokens = d->num_tokens;
    l->combine.hidden = d->hidden;
    l->combine.top_k = d->top_k;
    l->combine.num_rows = (int64_t)d->num_tokens * d->top_k;
    {
        const moe_status s = moei_layer_check_stations(l);
        if (s != MOE_OK && moe_status_kind(s) != MOE_ERR_OVERLAP) return s;
        MOEI_TRY(moei_layer_check_overlap(d, bytes)); /* in the caller's own fields, first */
        return s;
    }
}

MOE_HOST moe_status moei_layer_queue(const moei_layer* l, int stage, cudaStream_t stream)
{
    switch (stage) {
    case MOE_LAYER_ROUTER: return l->has_router ? moe_router_logits(&l->router, stream) : MOE_OK;
    case MOE_LAYER_GATE: return l->has_gate ? moe_gate(&l->gate, stream) : MOE_OK;
    case MOE_LAYER_ROUTE: return moe_route(&l->route, stream);
    case MOE_LAYER_UP: return moe_experts_up(&l->experts, stream);
    case MOE_LAYER_DOWN: return moe_experts_down(&l->experts, stream);
    default: return moe_combine(&l->combine, stream);
    }
}

/* Queues one stage on `stream`: for timing, or to put work of one's own between stages. All
   stages in order are moe_layer_forward. */
MOE_HOST moe_status moe_layer_run_stage(const moe_layer_desc* desc, int stage, cudaStream_t stream)
{
    moei_layer l;
    MOEI_REQUIRE(desc, MOE_ERR_NULL, desc);
    MOEI_REQUIRE(stage >= 0 && stage < MOE_LAYER_STAGES, MOE_ERR_OPTION, stage);
    MOEI_TRY(moei_layer_prepare(desc, &l));
    return moei_layer_queue(&l, stage, stream);
}

/* Queues the layer on `stream`. Errors: every field as documented above, each with its own status;
   nothing is queued then and y is untouched. T = 0 is no error. */
MOE_HOST moe_status moe_layer_forward(const moe_layer_desc* desc, cudaStream_t stream)
{
    moei_layer l;
    MOEI_REQUIRE(desc, MOE_ERR_NULL, desc);
    MOEI_TRY(moei_layer_prepare(desc, &l));
    for (int stage = 0; stage < MOE_LAYER_STAGES; ++stage)
        MOEI_TRY(moei_layer_queue(&l, stage, stream));
    return MOE_OK;
}

/* Which path and tiles the experts of this layer run on the current device. */
MOE_HOST moe_status moe_layer_plan(const moe_layer_desc* desc, moe_gemm_plan* up,
                                   moe_gemm_plan* down)
{
    moei_layer l;
    MOEI_REQUIRE(desc && up && down, MOE_ERR_NULL, desc);
    MOEI_TRY(moei_layer_prepare(desc, &l));
    return moe_experts_plan(&l.experts, up, down);
}

/* Loads every kernel of this translation unit's stations now, before anything spins on the GPU: a
   first launch under lazy loading synchronises. */
MOE_HOST moe_status moe_preload(void)
{
    MOEI_TRY(moe_router_preload());
    MOEI_TRY(moe_gate_preload());
    MOEI_TRY(moe_route_preload());
    MOEI_TRY(moe_grouped_gemm_preload());
    return moe_combine_preload();
}

#endif
