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
     moe_num_chunks(T) E 4  chunk counts      (but with ids or replicas)
     what moe_gate_workspace says             0 for most
     what moe_route_workspace says            0 but with ids, replicas or capacity by weight
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

#include "base/check.h"
#include "combine.cuh"
#include "experts.cuh"
#include "fields.h"
#include "gate.cuh"
#include "layer/desc.h"
#include "route.cuh"
#include "router.cuh"

/* The stations' descriptors for one layer call. */
typedef struct moei_layer {
    moe_router_desc router;
    moe_gate_desc gate;
    moe_route_desc route;
    moe_experts_desc experts, shared;
    moe_combine_desc combine;
    int has_router, has_gate, has_shared;
} moei_layer;

/* Is every byte of it 0? */
MOE_HOST int moei_all_zero(const void* p, size_t bytes)
{
    for (size_t i = 0; i < bytes; ++i)
        if (((const unsigned char*)p)[i]) return 0;
    return 1;
}

/* Refuses sizes that the workspace depends on. */
MOE_HOST moe_status moei_layer_check_sizes(const moe_layer_desc* d)
{
    MOEI_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOEI_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                 num_experts);
    MOEI_REQUIRE(d->top_k >= 1 && d->top_k <= MOE_COMBINE_MAX_TOP_K, MOE_ERR_RANGE, top_k);
    MOEI_REQUIRE(d->ids || d->top_k <= d->num_experts, MOE_ERR_RANGE, top_k);
    MOEI_REQUIRE(d->hidden >= 1, MOE_ERR_RANGE, hidden);
    MOEI_REQUIRE(d->hidden % 8 == 0, MOE_ERR_MULTIPLE, hidden);
    MOEI_REQUIRE(d->intermediate >= 1, MOE_ERR_RANGE, intermediate);
    MOEI_REQUIRE(d->intermediate % 8 == 0, MOE_ERR_MULTIPLE, intermediate);
    MOEI_REQUIRE(d->rows_dtype == 0 || d->rows_dtype == MOE_FP32 ||
                     d->rows_dtype == (d->dtype ? d->dtype : MOE_BF16),
                 MOE_ERR_DTYPE, rows_dtype);
    MOEI_REQUIRE(d->shared.intermediate >= 0, MOE_ERR_RANGE, shared);
    MOEI_REQUIRE(d->shared.intermediate % 8 == 0, MOE_ERR_MULTIPLE, shared);
    MOEI_REQUIRE(d->shared.intermediate || moei_all_zero(&d->shared, sizeof d->shared),
                 MOE_ERR_CONFLICT, shared);
    MOEI_REQUIRE((uint64_t)d->num_tokens * (uint64_t)d->top_k <= 0x7fffffffu, MOE_ERR_RANGE,
                 num_tokens);
    return MOE_OK;
}

/* Gate and route with their options and sizes, all that their workspaces depend on. */
MOE_HOST moe_status moei_layer_options(const moe_layer_desc* d, moe_gate_desc* gate,
                                       moe_route_desc* route)
{
    const moe_gate_desc* g = &d->gate;
    const moe_route_desc* r = &d->route;
    MOEI_REQUIRE(!g->logits && !g->logits_stride && !g->logits_dtype && !g->ids && !g->weights &&
                     !g->chunk_count && !g->fault && !g->num_tokens && !g->num_experts &&
                     !g->top_k && !g->workspace && !g->workspace_bytes,
                 MOE_ERR_CONFLICT, gate);
    MOEI_REQUIRE(!d->ids || moei_all_zero(g, sizeof *g), MOE_ERR_CONFLICT, gate); /* none runs */
    MOEI_REQUIRE(!r->ids && !r->weights && !r->chunk_count && !r->expert_count &&
                     !r->expert_offset && !r->row_slot && !r->place && !r->fault &&
                     !r->num_tokens && !r->num_experts && !r->top_k && !r->place_kind &&
                     !r->workspace && !r->workspace_bytes,
                 MOE_ERR_CONFLICT, route);
    *gate = *g;
    gate->fault = d->fault;
    gate->num_tokens = d->num_tokens;
    gate->num_experts = d->num_experts;
    gate->top_k = d->top_k;
    *route = *r;
    route->fault = d->fault;
    route->num_tokens = d->num_tokens;
    route->num_experts = d->num_experts;
    route->top_k = d->top_k;
    return MOE_OK;
}

/* Shares the workspace out among gate, route and the view; both the size and the launch come from
   here. */
MOE_HOST moe_status moei_layer_carve(const moe_layer_desc* d, moe_gate_desc* gate,
                                     moe_route_desc* route, moe_layer_view* v, size_t* bytes)
{
    char* base = (char*)d->workspace;
    const uint64_t row_bytes = d->rows_dtype == MOE_FP32 ? 4 : 2;
    uint64_t T, K, E, P, R, slots;
    moe_route_desc checked; /* with its defaults */
    int gate_counts;        /* the gate leaves its chunk counts for route */
    *bytes = 0;
    MOEI_TRY(moei_layer_check_sizes(d));
    MOEI_TRY(moei_layer_options(d, gate, route));
    gate_counts = !d->ids && !route->replica_offset;
    memset(v, 0, sizeof *v);
    MOEI_TRY(moe_gate_workspace(gate, &gate->workspace_bytes));
    checked = *route;
    MOEI_TRY(moei_route_check_options(&checked));
    route->workspace_bytes = moei_route_carve_workspace(&checked, 0, gate_counts);
    MOEI_TRY(moe_route_max_rows(route, &v->num_rows));
    v->num_physical = route->num_replicas ? route->num_replicas : d->num_experts;
    T = (uint64_t)d->num_tokens, K = (uint64_t)d->top_k, E = (uint64_t)d->num_experts;
    P = (uint64_t)v->num_physical, R = (uint64_t)v->num_rows, slots = T * K;

    v->logits = (float*)d->logits;
    v->ids = (int32_t*)d->ids;
    v->weights = (float*)d->weights;
    if (!d->ids) {
        if (!d->logits) v->logits = (float*)moei_carve(base, bytes, T * E * 4);
        v->ids = (int32_t*)moei_carve(base, bytes, slots * 4);
        v->weights = (float*)moei_carve(base, bytes, slots * 4);
    }
    if (gate_counts)
        v->chunk_count =
            (int32_t*)moei_carve(base, bytes, E * (uint64_t)moe_num_chunks(d->num_tokens) * 4);
    if (gate->workspace_bytes)
        v->gate_workspace = moei_carve(base, bytes, gate->workspace_bytes);
    if (route->workspace_bytes)
        v->route_workspace = moei_carve(base, bytes, route->workspace_bytes);
    v->expert_count = (int32_t*)moei_carve(base, bytes, P * 4);
    v->expert_offset = (int32_t*)moei_carve(base, bytes, (P + 1) * 4);
    v->row_slot = (int32_t*)moei_carve(base, bytes, R * 4);
    v->place = (moe_place*)moei_carve(base, bytes, slots * 8);
    v->act = moei_carve(base, bytes, R * (uint64_t)d->intermediate * 2);
    v->rows = moei_carve(base, bytes, R * (uint64_t)d->hidden * row_bytes);
    if (d->shared.intermediate) {
        v->shared_act = moei_carve(base, bytes, T * (uint64_t)d->shared.intermediate * 2);
        v->shared_rows = moei_carve(base, bytes, T * (uint64_t)d->hidden * row_bytes);
    }
    gate->logits = v->logits;
    gate->ids = v->ids;
    gate->weights = v->weights;
    gate->chunk_count = v->chunk_count;
    gate->workspace = v->gate_workspace;
    route->ids = v->ids;
    if (route->row_weight || route->drop_rule == MOE_DROP_BY_WEIGHT) route->weights = v->weights;
    route->chunk_count = v->chunk_count;
    route->expert_count = v->expert_count;
    route->expert_offset = v->expert_offset;
    route->row_slot = v->row_slot;
    route->place = v->place;
    route->workspace = v->route_workspace;
    return MOE_OK;
}

/* Bytes of workspace for this layer: by sizes, options and by which of logits and ids are given.
   Errors: theirs. */
MOE_HOST moe_status moe_layer_workspace(const moe_layer_desc* desc, size_t* bytes)
{
    moe_layer_view v;
    moe_layer_desc d;
    moe_gate_desc gate;
    moe_route_desc route;
    MOEI_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    d = *desc;
    d.workspace = 0;
    return moei_layer_carve(&d, &gate, &route, &v, bytes);
}

/* Where the pieces lie in the descriptor's workspace. */
MOE_HOST moe_status moe_layer_get_view(const moe_layer_desc* desc, moe_layer_view* view)
{
    size_t bytes;
    moe_gate_desc gate;
    moe_route_desc route;
    MOEI_REQUIRE(desc && view, MOE_ERR_NULL, desc);
    MOEI_REQUIRE(desc->workspace, MOE_ERR_NULL, workspace);
    return moei_layer_carve(desc, &gate, &route, view, &bytes);
}

/* A field of the shared expert's own is called `shared` here. */
MOE_HOST moe_status moei_layer_rename_shared(moe_status s)
{
    static const int16_t own[] = {MOE_FIELD_w1,         MOE_FIELD_w2,         MOE_FIELD_bias1,
                                  MOE_FIELD_bias2,      MOE_FIELD_activation, MOE_FIELD_alpha,
                                  MOE_FIELD_limit,      MOE_FIELD_gate_up,
                                  MOE_FIELD_intermediate};
    const int kind = moe_status_kind(s);
    if (kind == MOE_OK || kind == MOE_ERR_CUDA) return s;
    for (size_t i = 0; i < sizeof own / sizeof own[0]; ++i)
        if (moe_status_detail(s) == own[i]) return (moe_status)(kind | (MOE_FIELD_shared << 8));
    return s;
}

/* Refuses options that the header does not offer, the stations' among them. Route's have been
   checked with its workspace. */
MOE_HOST moe_status moei_layer_check_options(const moe_layer_desc* d, const moei_layer* l)
{
    const int64_t T = d->num_tokens, H = d->hidden;
    moe_router_desc router = l->router;
    moe_gate_desc gate = l->gate;
    moe_grouped_gemm_desc up, down;
    MOEI_REQUIRE(l->experts.dtype == MOE_BF16 || l->experts.dtype == MOE_FP16, MOE_ERR_DTYPE,
                 dtype);
    MOEI_REQUIRE(d->router_dtype == 0 || moe_dtype_bytes(d->router_dtype), MOE_ERR_DTYPE,
                 router_dtype);
    if (d->ids) {
        MOEI_REQUIRE(!d->logits, MOE_ERR_CONFLICT, logits);
        MOEI_REQUIRE(!d->router, MOE_ERR_CONFLICT, router);
    } else {
        MOEI_REQUIRE(!d->weights, MOE_ERR_CONFLICT, weights);
        MOEI_REQUIRE(!(d->logits && d->router), MOE_ERR_CONFLICT, router);
    }
    MOEI_REQUIRE(!d->y_stride || moei_stride_fits(d->y_stride, H, T), MOE_ERR_STRIDE, y_stride);
    MOEI_REQUIRE(!d->residual_stride || moei_stride_fits(d->residual_stride, H, T), MOE_ERR_STRIDE,
                 residual_stride);
    if (l->has_router) MOEI_TRY(moei_router_check_options(&router));
    if (l->has_gate) MOEI_TRY(moei_gate_check_options(&gate));
    MOEI_TRY(moei_experts_check_options(&l->experts, &up, &down));
    if (!l->has_shared) return MOE_OK;
    return moei_layer_rename_shared(moei_experts_check_options(&l->shared, &up, &down));
}

/* Every station's own check. */
MOE_HOST moe_status moei_layer_check_stations(const moei_layer* l)
{
    moe_router_desc router = l->router;
    moe_gate_desc gate = l->gate;
    moe_route_desc route = l->route;
    moe_combine_desc combine = l->combine;
    moe_grouped_gemm_desc g, up, down;
    int path;
    if (l->has_router) MOEI_TRY(moei_router_check(&router, &g, &path));
    if (l->has_gate) MOEI_TRY(moei_gate_check(&gate));
    MOEI_TRY(moei_route_check(&route));
    MOEI_TRY(moei_experts_check(&l->experts, &up, &down));
    if (l->has_shared)
        MOEI_TRY(moei_layer_rename_shared(moei_experts_check(&l->shared, &up, &down)));
    return moei_combine_check(&combine);
}

/* Refuses the caller's buffers that are absent, misaligned or overlap; but y may be x or the
   residual. Options have been checked. */
MOE_HOST moe_status moei_layer_check_buffers(const moe_layer_desc* d, const moe_layer_view* v,
                                             size_t workspace)
{
    const moe_layer_shared* s = &d->shared;
    const int64_t T = d->num_tokens, H = d->hidden, I = d->intermediate, E = d->num_experts;
    const int64_t P = v->num_physical, Is = s->intermediate;
    const int dtype = d->dtype ? d->dtype : MOE_BF16;
    const int router_dtype = d->router_dtype ? d->router_dtype : dtype;
    const int64_t x_stride = d->x_stride ? d->x_stride : H,
                  y_stride = d->y_stride ? d->y_stride : H;
    const int64_t residual_stride = d->residual_stride ? d->residual_stride : H;
    const uint64_t slots = (uint64_t)T * (uint64_t)d->top_k, rows = (uint64_t)v->num_rows;
    const uint64_t table = (uint64_t)P * 8;
    const int64_t matrices = moei_experts_up_rows(d->activation, 0); /* gate and up, or one */
    const int64_t s_matrices = moei_experts_up_rows(s->activation, 0);
    const int64_t together = moei_experts_up_rows(d->activation, d->gate_up); /* of them in base */
    const int64_t s_together = moei_experts_up_rows(s->activation, s->gate_up);
    const uint64_t w1 = moei_weight_extent(&d->w1, P, I * together, H);
    const uint64_t s_w1 = moei_weight_extent(&s->w1, 1, Is * s_together, H);
    const int x_is_y = d->x == d->y && x_stride == y_stride;
    const int residual_is_y = d->residual == d->y && residual_stride == y_stride;
    const moei_buffer always[] = {
        /* without tokens, too; of a workspace too small what there is */
        {d->workspace,
         d->workspace && d->workspace_bytes < workspace ? d->workspace_bytes : workspace, 256,
         MOEI_REQUIRED | MOEI_WRITTEN, MOE_FIELD_workspace},
        {d->fault, 8, 8, MOEI_WRITTEN, MOE_FIELD_fault}};
    const moei_buffer b[] = {
        {d->router, moei_extent(E, H, H, router_dtype), (uint32_t)moe_dtype_bytes(router_dtype),
         d->ids || d->logits ? MOEI_READ : MOEI_REQUIRED, MOE_FIELD_router},
        {d->logits, (uint64_t)T * (uint64_t)E * 4, 4, MOEI_READ, MOE_FIELD_logits},
        {d->ids, slots * 4, 4, MOEI_READ, MOE_FIELD_ids},
        {d->weights, slots * 4, 4, d->ids ? MOEI_REQUIRED : MOEI_READ, MOE_FIELD_weights},
        {d->w1.base, w1, 16, d->w1.table ? MOEI_READ : MOEI_REQUIRED, MOE_FIELD_w1},
        {d->w1.up, w1, 16, together < matrices && !d->w1.up_table ? MOEI_REQUIRED : MOEI_READ,
         MOE_FIELD_w1},
        {d->w1.table, table, 8, MOEI_READ, MOE_FIELD_w1},
        {d->w1.up_table, table, 8, MOEI_READ, MOE_FIELD_w1},
        {d->w2.base, moei_weight_extent(&d->w2, P, H, I), 16,
         d->w2.table ? MOEI_READ : MOEI_REQUIRED, MOE_FIELD_w2},
        {d->w2.table, table, 8, MOEI_READ, MOE_FIELD_w2},
        {d->bias1, (uint64_t)(P * matrices * I) * 2, 2, MOEI_READ, MOE_FIELD_bias1},
        {d->bias2, (uint64_t)(P * H) * 2, 2, MOEI_READ, MOE_FIELD_bias2},
        {s->w1.base, s_w1, 16, s->w1.table ? MOEI_READ : MOEI_REQUIRED, MOE_FIELD_shared},
        {s->w1.up, s_w1, 16, s_together < s_matrices && !s->w1.up_table ? MOEI_REQUIRED : MOEI_READ,
         MOE_FIELD_shared},
        {s->w1.table, 8, 8, MOEI_READ, MOE_FIELD_shared},
        {s->w1.up_table, 8, 8, MOEI_READ, MOE_FIELD_shared},
        {s->w2.base, moei_weight_extent(&s->w2, 1, H, Is), 16,
         s->w2.table ? MOEI_READ : MOEI_REQUIRED, MOE_FIELD_shared},
        {s->w2.table, 8, 8, MOEI_READ, MOE_FIELD_shared},
        {s->bias1, (uint64_t)(s_matrices * Is) * 2, 2, MOEI_READ, MOE_FIELD_shared},
        {s->bias2, (uint64_t)H * 2, 2, MOEI_READ, MOE_FIELD_shared},
        {s->weight, (uint64_t)T * 4, 4, MOEI_READ, MOE_FIELD_shared_weight},
        {d->gate.expert_bias, (uint64_t)E * 4, 4, MOEI_READ, MOE_FIELD_expert_bias},
        {d->gate.expert_off, (uint64_t)E, 1, MOEI_READ, MOE_FIELD_expert_off},
        {d->gate.token_off, (uint64_t)T, 1, MOEI_READ, MOE_FIELD_token_off},
        {d->gate.seed_offset, 8, 8, MOEI_READ, MOE_FIELD_seed_offset},
        {d->route.replica_offset, (uint64_t)E * 4 + 4, 4, MOEI_READ, MOE_FIELD_replica_offset},
        {d->route.replica_expert, (uint64_t)P * 4, 4, MOEI_READ, MOE_FIELD_replica_expert},
        {d->residual, residual_is_y ? 0 : moei_extent(T, residual_stride, H, dtype), 2, MOEI_READ,
         MOE_FIELD_residual},
        {d->x, x_is_y ? 0 : moei_extent(T, x_stride, H, dtype), 16, MOEI_REQUIRED, MOE_FIELD_x},
        {d->y, moei_extent(T, y_stride, H, dtype), 2, MOEI_REQUIRED | MOEI_WRITTEN, MOE_FIELD_y},
        always[0],
        always[1],
        {d->gate.expert_count, (uint64_t)E * 4, 4, MOEI_WRITTEN, MOE_FIELD_expert_count},
        {d->gate.prob_sum, (uint64_t)E * 4, 4, MOEI_WRITTEN, MOE_FIELD_prob_sum},
        {d->route.drop_count, (uint64_t)P * 4, 4, MOEI_WRITTEN, MOE_FIELD_drop_count},
        {d->route.slot_row, slots * 4, 4, MOEI_WRITTEN, MOE_FIELD_slot_row},
        {d->route.row_weight, rows * 4, 4, MOEI_WRITTEN, MOE_FIELD_row_weight}};
    if (T == 0) MOEI_TRY(moei_check_buffers(always, 2));
    else MOEI_TRY(moei_check_buffers(b, (int)(sizeof b / sizeof b[0])));
    MOEI_REQUIRE(d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE, workspace_bytes);
    return MOE_OK;
}

/* Checks everything and fills in the stations' descriptors. */
MOE_HOST moe_status moei_layer_prepare(const moe_layer_desc* d, moei_layer* l)
{
    moe_layer_view v;
    size_t bytes;
    const int dtype = d->dtype ? d->dtype : MOE_BF16;
    memset(l, 0, sizeof *l);
    MOEI_TRY(moei_layer_carve(d, &l->gate, &l->route, &v, &bytes));
    l->has_gate = !d->ids;
    l->has_router = !d->ids && !d->logits;
    l->has_shared = d->shared.intermediate > 0;

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
    l->experts.num_rows = (int32_t)v.num_rows;
    l->experts.hidden = d->hidden;
    l->experts.intermediate = d->intermediate;
    l->experts.num_experts = v.num_physical;
    l->experts.top_k = d->top_k;
    l->experts.dtype = dtype;
    l->experts.rows_dtype = d->rows_dtype;
    l->experts.activation = d->activation;
    l->experts.gate_up = d->gate_up;
    l->experts.alpha = d->alpha;
    l->experts.limit = d->limit;
    l->experts.tile = d->tile;

    l->shared.x = d->x; /* its rows are the tokens */
    l->shared.x_stride = d->x_stride;
    l->shared.w1 = d->shared.w1;
    l->shared.w2 = d->shared.w2;
    l->shared.bias1 = d->shared.bias1;
    l->shared.bias2 = d->shared.bias2;
    l->shared.act = v.shared_act;
    l->shared.rows = v.shared_rows;
    l->shared.fault = d->fault;
    l->shared.num_rows = d->num_tokens;
    l->shared.hidden = d->hidden;
    l->shared.intermediate = d->shared.intermediate;
    l->shared.num_experts = 1;
    l->shared.dtype = dtype;
    l->shared.rows_dtype = d->rows_dtype;
    l->shared.activation = d->shared.activation;
    l->shared.gate_up = d->shared.gate_up;
    l->shared.alpha = d->shared.alpha;
    l->shared.limit = d->shared.limit;
    l->shared.tile = d->tile;

    l->combine.rows = v.rows;
    l->combine.place = v.place;
    l->combine.weights = v.weights;
    l->combine.residual = d->residual;
    l->combine.residual_stride = d->residual_stride;
    l->combine.shared = v.shared_rows;
    l->combine.shared_weight = d->shared.weight;
    l->combine.rows_dtype = d->rows_dtype ? d->rows_dtype : dtype;
    l->combine.y_dtype = dtype;
    l->combine.y = d->y;
    l->combine.y_stride = d->y_stride;
    l->combine.fault = d->fault;
    l->combine.num_tokens = d->num_tokens;
    l->combine.hidden = d->hidden;
    l->combine.top_k = d->top_k;
    l->combine.num_rows = v.num_rows;
    MOEI_TRY(moei_layer_check_options(d, l));
    MOEI_TRY(moei_layer_check_buffers(d, &v, bytes)); /* the caller's own fields come first */
    return moei_layer_check_stations(l);
}

MOE_HOST moe_status moei_layer_queue(const moei_layer* l, int stage, cudaStream_t stream)
{
    switch (stage) {
    case MOE_LAYER_ROUTER: return l->has_router ? moe_router_logits(&l->router, stream) : MOE_OK;
    case MOE_LAYER_GATE: return l->has_gate ? moe_gate(&l->gate, stream) : MOE_OK;
    case MOE_LAYER_ROUTE: return moe_route(&l->route, stream);
    case MOE_LAYER_UP: return moe_experts_up(&l->experts, stream);
    case MOE_LAYER_DOWN: return moe_experts_down(&l->experts, stream);
    case MOE_LAYER_SHARED_UP: return l->has_shared ? moe_experts_up(&l->shared, stream) : MOE_OK;
    case MOE_LAYER_SHARED_DOWN:
        return l->has_shared ? moe_experts_down(&l->shared, stream) : MOE_OK;
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

/* Loads every kernel of this translation unit that a layer may run now, before anything spins on
   the GPU: a first launch under lazy loading synchronises. */
MOE_HOST moe_status moe_layer_preload(void)
{
    MOEI_TRY(moe_router_preload());
    MOEI_TRY(moe_gate_preload());
    MOEI_TRY(moe_route_preload());
    MOEI_TRY(moe_grouped_gemm_preload());
    return moe_combine_preload();
}

#endif
