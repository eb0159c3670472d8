/* prepare.cuh: resolves a layer's descriptor in three phases, and checks it: 1. options and sizes,
   2. the view of its workspace, 3. the stations' descriptors. Called by layer.cuh. */
#ifndef MOE_LAYER_PREPARE_CUH
#define MOE_LAYER_PREPARE_CUH

#include <string.h>

#include "../base/check.h"
#include "../combine.cuh"
#include "../experts.cuh"
#include "../fields.h"
#include "../gate.cuh"
#include "../route.cuh"
#include "../router.cuh"
#include "desc.h"

/* Result of phase 1: options and sizes; of buffers only whether they are given. */
typedef struct moei_layer_options {
    moe_gate_desc gate;                       /* the caller's, with sizes, fault word, rank,
                                                 workspace_bytes */
    moe_route_desc route;                     /* the same of route */
    int64_t num_rows;                         /* R, the most rows */
    int64_t table_rows;                       /* entries of row_slot and row_weight: R, or more */
    int32_t num_physical;                     /* P, experts that have weights */
    int32_t has_router, has_gate, has_shared; /* 0 or 1: what is run */
    int32_t gate_counts;                      /* 1: the gate writes its chunk counts for route */
    int32_t elsewhere; /* 1: route's results and the rows are not in this workspace: ep/layer.cuh */
    void* pre;         /* the caller's memory for the pre-activations; null: in `saved` */
} moei_layer_options;

/* Result of phase 3: the stations' descriptors. Phase 2 fills in moe_layer_view. */
typedef struct moei_layer_stations {
    moe_router_desc router;
    moe_gate_desc gate;
    moe_route_desc route;
    moe_experts_desc experts, shared;
    moe_combine_desc combine;
} moei_layer_stations;

/* Returns 1 where every byte is 0. */
MOE_HOST int moei_all_zero(const void* p, size_t bytes)
{
    for (size_t i = 0; i < bytes; ++i)
        if (((const unsigned char*)p)[i]) return 0;
    return 1;
}

/* Refuses sizes that the workspace depends on. */
MOE_HOST moe_status moei_layer_check_sizes(const moe_layer_desc* d)
{
    MOE_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(d->top_k >= 1 && d->top_k <= MOE_COMBINE_MAX_TOP_K, MOE_ERR_RANGE, top_k);
    MOE_REQUIRE(d->ids || d->top_k <= d->num_experts, MOE_ERR_RANGE, top_k);
    MOEI_REQUIRE_RANK(d);
    MOE_REQUIRE(d->hidden >= 1, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(d->hidden % 8 == 0, MOE_ERR_MULTIPLE, hidden);
    MOE_REQUIRE(d->intermediate >= 1, MOE_ERR_RANGE, intermediate);
    MOE_REQUIRE(d->intermediate % 8 == 0, MOE_ERR_MULTIPLE, intermediate);
    MOE_REQUIRE(d->rows_dtype == 0 || d->rows_dtype == MOE_FP32 ||
                    d->rows_dtype == (d->dtype ? d->dtype : MOE_BF16),
                MOE_ERR_DTYPE, rows_dtype);
    MOE_REQUIRE(d->shared.intermediate >= 0, MOE_ERR_RANGE, shared);
    MOE_REQUIRE(d->shared.intermediate % 8 == 0, MOE_ERR_MULTIPLE, shared);
    MOE_REQUIRE(d->shared.intermediate || moei_all_zero(&d->shared, sizeof d->shared),
                MOE_ERR_CONFLICT, shared);
    MOE_REQUIRE((d->recompute | 1) == 1, MOE_ERR_OPTION, recompute);
    MOE_REQUIRE((uint64_t)d->num_tokens * (uint64_t)d->top_k <= 0x7fffffffu, MOE_ERR_RANGE,
                num_tokens);
    return MOE_OK;
}

/* Phase 1: refuses sizes and nested options that the workspace depends on, and resolves them. */
MOE_HOST moe_status moei_layer_resolve(const moe_layer_desc* d, moei_layer_options* o)
{
    const moe_gate_desc* g = &d->gate;
    const moe_route_desc* r = &d->route;
    moe_route_desc checked; /* r with its defaults filled in */
    MOE_TRY(moei_layer_check_sizes(d));
    MOE_REQUIRE(!g->logits && !g->logits_stride && !g->logits_dtype && !g->ids && !g->weights &&
                    !g->chunk_count && !g->fault && !g->rank && !g->num_tokens && !g->num_experts &&
                    !g->top_k && !g->workspace && !g->workspace_bytes,
                MOE_ERR_CONFLICT, gate);
    MOE_REQUIRE(!d->ids || moei_all_zero(g, sizeof *g), MOE_ERR_CONFLICT, gate); /* no gate runs */
    MOE_REQUIRE(!r->ids && !r->weights && !r->chunk_count && !r->expert_count &&
                    !r->expert_offset && !r->row_slot && !r->place && !r->fault && !r->rank &&
                    !r->num_tokens && !r->num_experts && !r->top_k && !r->place_kind &&
                    !r->workspace && !r->workspace_bytes,
                MOE_ERR_CONFLICT, route);
    o->gate = *g;
    o->gate.fault = d->fault;
    o->gate.rank = d->rank;
    o->gate.num_tokens = d->num_tokens;
    o->gate.num_experts = d->num_experts;
    o->gate.top_k = d->top_k;
    o->route = *r;
    o->route.fault = d->fault;
    o->route.rank = d->rank;
    o->route.num_tokens = d->num_tokens;
    o->route.num_experts = d->num_experts;
    o->route.top_k = d->top_k;
    o->has_gate = !d->ids;
    o->has_router = !d->ids && !d->logits;
    o->has_shared = d->shared.intermediate > 0;
    o->gate_counts = !d->ids && !r->replica_offset;
    o->elsewhere = 0;
    o->pre = 0;
    MOE_TRY(moe_gate_workspace(&o->gate, &o->gate.workspace_bytes));
    checked = o->route;
    MOE_TRY(moei_route_check_options(&checked));
    o->route.workspace_bytes = moei_route_carve_workspace(&checked, 0, o->gate_counts);
    o->num_rows = o->table_rows = moei_route_row_bound(&checked);
    o->num_physical = checked.num_replicas;
    return MOE_OK;
}

/* Adds a buffer that backward reads: of the caller's where *where is not null, else carved from
   `base`. A null list only carves. */
MOE_HOST void moei_layer_keep(moe_layer_saved_list* list, char* base, size_t* bytes, void** where,
                              const moe_layer_saved_item* item)
{
    moe_layer_saved_item kept = *item;
    const size_t before = *bytes;
    kept.caller = *where != 0;
    kept.bytes = (uint64_t)kept.rows * (uint64_t)kept.columns * (uint64_t)kept.element;
    if (!kept.caller) {
        *where = moei_carve(base, bytes, kept.bytes);
        kept.bytes = *bytes - before;
    }
    if (list) list->item[list->count++] = kept;
}

/* Carves what a backward pass needs beside x: first what a forward alone has too. keep: 1: all of
   it, 0: that alone. */
MOE_HOST void moei_layer_carve_saved(const moe_layer_desc* d, const moei_layer_options* o,
                                     char* base, int keep, moe_layer_view* v, size_t* bytes,
                                     moe_layer_saved_list* list)
{
    const int64_t slots = (int64_t)d->num_tokens * d->top_k, rows = o->table_rows;
    const int64_t num_tokens = d->num_tokens, num_experts = d->num_experts;
    const int64_t width = moei_experts_up_rows(d->activation, 0) * (int64_t)d->intermediate;
    const int64_t shared =
        moei_experts_up_rows(d->shared.activation, 0) * (int64_t)d->shared.intermediate;
    const struct {
        void** where;
        int used;
        moe_layer_saved_item item;
    } b[] = {
        {(void**)&v->logits, o->has_gate, {"logits", num_tokens, num_experts, 4, 0, 0}},
        {(void**)&v->ids, 1, {"ids", num_tokens, d->top_k, 4, 0, 0}},
        {(void**)&v->weights, 1, {"weights", num_tokens, d->top_k, 4, 0, 0}},
        {(void**)&v->expert_offset,
         !o->elsewhere,
         {"expert_offset", 1, o->num_physical + 1, 4, 0, 0}},
        {(void**)&v->row_slot, !o->elsewhere, {"row_slot", rows, 1, 4, 0, 0}},
        {(void**)&v->place, !o->elsewhere, {"place", slots, 1, 8, 0, 0}},
        {(void**)&v->slot_row, keep && !o->elsewhere, {"slot_row", num_tokens, d->top_k, 4, 0, 0}},
        {(void**)&v->row_weight, keep, {"row_weight", rows, 1, 4, 0, 0}},
        {&v->pre, keep && !d->recompute, {"pre", o->num_rows, width, 2, 0, 0}},
        {&v->shared_pre,
         keep && !d->recompute && o->has_shared,
         {"shared_pre", num_tokens, shared, 2, 0, 0}}};
    for (size_t i = 0; i < sizeof b / sizeof b[0]; ++i)
        if (b[i].used) moei_layer_keep(list, base, bytes, b[i].where, &b[i].item);
}

/* Sets the view's buffers that the caller gave, and its sizes; all others are null. */
MOE_HOST void moei_layer_given(const moe_layer_desc* d, const moei_layer_options* o,
                               moe_layer_view* v)
{
    memset(v, 0, sizeof *v);
    v->num_rows = o->num_rows;
    v->num_physical = o->num_physical;
    v->logits = (float*)d->logits;
    v->ids = (int32_t*)d->ids;
    v->weights = (float*)d->weights;
    v->slot_row = d->route.slot_row;
    v->row_weight = d->route.row_weight;
    v->pre = o->pre;
}

/* Lists what a layer keeps for its backward pass. *list is empty; list->bytes counts `saved`. */
MOE_HOST void moei_layer_list_saved(const moe_layer_desc* d, const moei_layer_options* o,
                                    moe_layer_saved_list* list)
{
    moe_layer_view v;
    moei_layer_given(d, o, &v);
    list->item[0].name = "x";
    list->item[0].rows = d->num_tokens;
    list->item[0].columns = d->hidden;
    list->item[0].element = 2;
    list->item[0].caller = 1;
    list->item[0].bytes = (uint64_t)d->num_tokens * (uint64_t)d->hidden * 2;
    list->count = 1;
    moei_layer_carve_saved(d, o, 0, 1, &v, &list->bytes, list);
}

/* Phase 2: fills in the view of the workspace at `base` and *bytes, and of `saved`, where given;
   with a null base only counts the bytes. */
MOE_HOST void moei_layer_carve(const moe_layer_desc* d, const moei_layer_options* o, void* base,
                               moe_layer_view* v, size_t* bytes)
{
    char* const p = (char*)base;
    const uint64_t row_bytes = d->rows_dtype == MOE_FP32 ? 4 : 2;
    const uint64_t num_tokens = (uint64_t)d->num_tokens, num_experts = (uint64_t)d->num_experts;
    const uint64_t num_replicas = (uint64_t)o->num_physical, num_rows = (uint64_t)o->num_rows;
    size_t saved = 0;
    *bytes = 0;
    moei_layer_given(d, o, v);
    if (d->saved) moei_layer_carve_saved(d, o, (char*)d->saved, 1, v, &saved, 0);
    else moei_layer_carve_saved(d, o, p, 0, v, bytes, 0);
    if (o->gate_counts && !o->elsewhere)
        v->chunk_count = (int32_t*)moei_carve(
            p, bytes, num_experts * (uint64_t)moe_num_chunks(d->num_tokens) * 4);
    if (o->gate.workspace_bytes) v->gate_workspace = moei_carve(p, bytes, o->gate.workspace_bytes);
    if (!o->elsewhere) {
        if (o->route.workspace_bytes)
            v->route_workspace = moei_carve(p, bytes, o->route.workspace_bytes);
        v->expert_count = (int32_t*)moei_carve(p, bytes, num_replicas * 4);
    }
    v->experts_workspace = moei_carve(p, bytes, 2 * MOE_EXPERTS_WORKSPACE);
    v->act = moei_carve(p, bytes, num_rows * (uint64_t)d->intermediate * 2);
    if (!o->elsewhere) v->rows = moei_carve(p, bytes, num_rows * (uint64_t)d->hidden * row_bytes);
    if (o->has_shared) {
        v->shared_act = moei_carve(p, bytes, num_tokens * (uint64_t)d->shared.intermediate * 2);
        v->shared_rows = moei_carve(p, bytes, num_tokens * (uint64_t)d->hidden * row_bytes);
    }
}

/* Renames a refused field of the shared expert to `shared`, its name in the layer's descriptor. */
MOE_HOST moe_status moei_layer_rename_shared(moe_status s)
{
    static const int16_t own[] = {MOE_FIELD_w1,    MOE_FIELD_w2,         MOE_FIELD_bias1,
                                  MOE_FIELD_bias2, MOE_FIELD_activation, MOE_FIELD_alpha,
                                  MOE_FIELD_limit, MOE_FIELD_gate_up,    MOE_FIELD_intermediate};
    const int kind = moe_status_kind(s);
    if (kind == MOE_OK || kind == MOE_ERR_CUDA) return s;
    for (size_t i = 0; i < sizeof own / sizeof own[0]; ++i)
        if (moe_status_detail(s) == own[i]) return (moe_status)(kind | (MOE_FIELD_shared << 8));
    return s;
}

/* Refuses options that the header does not offer, those of the stations included. Those of route
   were checked with its workspace. */
MOE_HOST moe_status moei_layer_check_options(const moe_layer_desc* d, const moei_layer_options* o,
                                             const moei_layer_stations* l)
{
    const int64_t num_tokens = d->num_tokens, hidden = d->hidden;
    moe_router_desc router = l->router;
    moe_gate_desc gate = l->gate;
    moe_grouped_gemm_desc up, down;
    MOE_REQUIRE(l->experts.dtype == MOE_BF16 || l->experts.dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    MOE_REQUIRE(d->router_dtype == 0 || moe_dtype_bytes(d->router_dtype), MOE_ERR_DTYPE,
                router_dtype);
    if (d->ids) {
        MOE_REQUIRE(!d->logits, MOE_ERR_CONFLICT, logits);
        MOE_REQUIRE(!d->router, MOE_ERR_CONFLICT, router);
    } else {
        MOE_REQUIRE(!d->weights, MOE_ERR_CONFLICT, weights);
        MOE_REQUIRE(!(d->logits && d->router), MOE_ERR_CONFLICT, router);
    }
    MOE_REQUIRE(!d->y_stride || moei_stride_fits(d->y_stride, hidden, num_tokens), MOE_ERR_STRIDE,
                y_stride);
    MOE_REQUIRE(!d->residual_stride || moei_stride_fits(d->residual_stride, hidden, num_tokens),
                MOE_ERR_STRIDE, residual_stride);
    if (o->has_router) MOE_TRY(moei_router_check_options(&router));
    if (o->has_gate) MOE_TRY(moei_gate_check_options(&gate));
    MOE_TRY(moei_experts_check_options(&l->experts, &up, &down));
    if (!o->has_shared) return MOE_OK;
    return moei_layer_rename_shared(moei_experts_check_options(&l->shared, &up, &down));
}

enum { MOEI_LAYER_INPUTS = 27 };

/* Writes to b [MOEI_LAYER_INPUTS] what forward and backward read of the caller's buffers, but for x
   and residual. Requires checked options. */
MOE_HOST void moei_layer_inputs(const moe_layer_desc* d, int64_t num_replicas, moe_buffer* b)
{
    const moe_layer_shared* s = &d->shared;
    const int64_t num_tokens = d->num_tokens, hidden = d->hidden, intermediate = d->intermediate,
                  num_experts = d->num_experts, Is = s->intermediate;
    const int dtype = d->dtype ? d->dtype : MOE_BF16;
    const int router_dtype = d->router_dtype ? d->router_dtype : dtype;
    const uint64_t slots = (uint64_t)num_tokens * (uint64_t)d->top_k;
    const uint64_t table = (uint64_t)num_replicas * 8;
    const int64_t matrices = moei_experts_up_rows(d->activation, 0); /* gate and up: 2; or 1 */
    const int64_t s_matrices = moei_experts_up_rows(s->activation, 0);
    const int64_t together = moei_experts_up_rows(d->activation, d->gate_up); /* of those in base */
    const int64_t s_together = moei_experts_up_rows(s->activation, s->gate_up);
    const uint64_t w1 = moei_weight_extent(&d->w1, num_replicas, intermediate * together, hidden);
    const uint64_t s_w1 = moei_weight_extent(&s->w1, 1, Is * s_together, hidden);
    const moe_buffer inputs[MOEI_LAYER_INPUTS] = {
        {d->router, moe_extent(num_experts, hidden, hidden, router_dtype),
         (uint32_t)moe_dtype_bytes(router_dtype),
         d->ids || d->logits ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED, MOE_FIELD_router},
        {d->logits, (uint64_t)num_tokens * (uint64_t)num_experts * 4, 4, MOE_BUFFER_READ,
         MOE_FIELD_logits},
        {d->ids, slots * 4, 4, MOE_BUFFER_READ, MOE_FIELD_ids},
        {d->weights, slots * 4, 4, d->ids ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ,
         MOE_FIELD_weights},
        {d->w1.base, w1, 16, d->w1.table ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED, MOE_FIELD_w1},
        {d->w1.up, w1, 16,
         together < matrices && !d->w1.up_table ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ,
         MOE_FIELD_w1},
        {d->w1.table, table, 8, MOE_BUFFER_READ, MOE_FIELD_w1},
        {d->w1.up_table, table, 8, MOE_BUFFER_READ, MOE_FIELD_w1},
        {d->w2.base, moei_weight_extent(&d->w2, num_replicas, hidden, intermediate), 16,
         d->w2.table ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED, MOE_FIELD_w2},
        {d->w2.table, table, 8, MOE_BUFFER_READ, MOE_FIELD_w2},
        {d->bias1, (uint64_t)(num_replicas * matrices * intermediate) * 2, 2, MOE_BUFFER_READ,
         MOE_FIELD_bias1},
        {d->bias2, (uint64_t)(num_replicas * hidden) * 2, 2, MOE_BUFFER_READ, MOE_FIELD_bias2},
        {s->w1.base, s_w1, 16, s->w1.table ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED,
         MOE_FIELD_shared},
        {s->w1.up, s_w1, 16,
         s_together < s_matrices && !s->w1.up_table ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ,
         MOE_FIELD_shared},
        {s->w1.table, 8, 8, MOE_BUFFER_READ, MOE_FIELD_shared},
        {s->w1.up_table, 8, 8, MOE_BUFFER_READ, MOE_FIELD_shared},
        {s->w2.base, moei_weight_extent(&s->w2, 1, hidden, Is), 16,
         s->w2.table ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED, MOE_FIELD_shared},
        {s->w2.table, 8, 8, MOE_BUFFER_READ, MOE_FIELD_shared},
        {s->bias1, (uint64_t)(s_matrices * Is) * 2, 2, MOE_BUFFER_READ, MOE_FIELD_shared},
        {s->bias2, (uint64_t)hidden * 2, 2, MOE_BUFFER_READ, MOE_FIELD_shared},
        {s->weight, (uint64_t)num_tokens * 4, 4, MOE_BUFFER_READ, MOE_FIELD_shared_weight},
        {d->gate.expert_bias, (uint64_t)num_experts * 4, 4, MOE_BUFFER_READ, MOE_FIELD_expert_bias},
        {d->gate.expert_disabled, (uint64_t)num_experts, 1, MOE_BUFFER_READ,
         MOE_FIELD_expert_disabled},
        {d->gate.token_disabled, (uint64_t)num_tokens, 1, MOE_BUFFER_READ,
         MOE_FIELD_token_disabled},
        {d->gate.seed_offset, 8, 8, MOE_BUFFER_READ, MOE_FIELD_seed_offset},
        {d->route.replica_offset, (uint64_t)num_experts * 4 + 4, 4, MOE_BUFFER_READ,
         MOE_FIELD_replica_offset},
        {d->route.replica_expert, (uint64_t)num_replicas * 4, 4, MOE_BUFFER_READ,
         MOE_FIELD_replica_expert}};
    memcpy(b, inputs, sizeof inputs);
}

/* Refuses buffers of the caller's that are absent, misaligned or overlap. y may be x or the
   residual; with `saved` it is not x, which backward reads. Requires checked options. workspace,
   saved: the bytes that these must have. */
MOE_HOST moe_status moei_layer_check_buffers(const moe_layer_desc* d, const moe_layer_view* v,
                                             size_t workspace, size_t saved)
{
    const int64_t num_tokens = d->num_tokens, hidden = d->hidden, num_experts = d->num_experts;
    const int dtype = d->dtype ? d->dtype : MOE_BF16;
    const int64_t x_stride = d->x_stride ? d->x_stride : hidden,
                  y_stride = d->y_stride ? d->y_stride : hidden;
    const int64_t residual_stride = d->residual_stride ? d->residual_stride : hidden;
    const uint64_t slots = (uint64_t)num_tokens * (uint64_t)d->top_k, rows = (uint64_t)v->num_rows;
    const int x_is_y = d->x == d->y && x_stride == y_stride && !d->saved;
    const int residual_is_y = d->residual == d->y && residual_stride == y_stride;
    const moe_buffer always[] = {
        /* checked without tokens too; a workspace that is too small counts with the bytes it has */
        {d->workspace,
         d->workspace && d->workspace_bytes < workspace ? d->workspace_bytes : workspace, 256,
         MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_workspace},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    moe_buffer b[MOEI_LAYER_INPUTS + 12];
    const moe_buffer others[12] = {
        {d->residual, residual_is_y ? 0 : moe_extent(num_tokens, residual_stride, hidden, dtype), 2,
         MOE_BUFFER_READ, MOE_FIELD_residual},
        {d->x, x_is_y ? 0 : moe_extent(num_tokens, x_stride, hidden, dtype), 16,
         MOE_BUFFER_REQUIRED, MOE_FIELD_x},
        {d->y, moe_extent(num_tokens, y_stride, hidden, dtype), 2,
         MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_y},
        always[0],
        always[1],
        {d->gate.expert_count, (uint64_t)num_experts * 4, 4, MOE_BUFFER_WRITTEN,
         MOE_FIELD_expert_count},
        {d->gate.prob_sum, (uint64_t)num_experts * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_prob_sum},
        {d->gate.z_sum, 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_z_sum},
        {d->route.drop_count, (uint64_t)v->num_physical * 4, 4, MOE_BUFFER_WRITTEN,
         MOE_FIELD_drop_count},
        {d->route.slot_row, slots * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_slot_row},
        {d->route.row_weight, rows * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_row_weight},
        {d->saved, d->saved_bytes < saved ? d->saved_bytes : saved, 256, MOE_BUFFER_WRITTEN,
         MOE_FIELD_saved}};
    moei_layer_inputs(d, v->num_physical, b);
    memcpy(b + MOEI_LAYER_INPUTS, others, sizeof others);
    if (num_tokens == 0) MOE_TRY(moe_check_buffers(always, 2));
    else MOE_TRY(moe_check_buffers(b, MOEI_LAYER_INPUTS + 12));
    MOE_REQUIRE(d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE, workspace_bytes);
    MOE_REQUIRE(!d->saved || d->saved_bytes >= saved, MOE_ERR_WORKSPACE, saved_bytes);
    return MOE_OK;
}

/* Phase 3: fills in the stations' descriptors. */
MOE_HOST void moei_layer_describe(const moe_layer_desc* d, const moei_layer_options* o,
                                  const moe_layer_view* v, moei_layer_stations* l)
{
    const int dtype = d->dtype ? d->dtype : MOE_BF16;
    memset(l, 0, sizeof *l);
    l->router.x = d->x;
    l->router.router = d->router;
    l->router.x_stride = d->x_stride;
    l->router.x_dtype = dtype;
    l->router.router_dtype = d->router_dtype;
    l->router.logits = v->logits;
    l->router.fault = d->fault;
    l->router.rank = d->rank;
    l->router.num_tokens = d->num_tokens;
    l->router.hidden = d->hidden;
    l->router.num_experts = d->num_experts;
    l->router.batch_invariant = d->batch_invariant;

    l->gate = o->gate;
    l->gate.logits = v->logits;
    l->gate.ids = v->ids;
    l->gate.weights = v->weights;
    l->gate.chunk_count = v->chunk_count;
    l->gate.workspace = v->gate_workspace;

    l->route = o->route;
    l->route.ids = v->ids;
    if (v->row_weight || d->route.drop_rule == MOE_DROP_BY_WEIGHT) l->route.weights = v->weights;
    l->route.chunk_count = v->chunk_count;
    l->route.expert_count = v->expert_count;
    l->route.expert_offset = v->expert_offset;
    l->route.row_slot = v->row_slot;
    l->route.slot_row = v->slot_row;
    l->route.row_weight = v->row_weight;
    l->route.place = v->place;
    l->route.workspace = v->route_workspace;

    l->experts.x = d->x;
    l->experts.x_stride = d->x_stride;
    l->experts.w1 = d->w1;
    l->experts.w2 = d->w2;
    l->experts.bias1 = d->bias1;
    l->experts.bias2 = d->bias2;
    l->experts.expert_offset = v->expert_offset;
    l->experts.row_slot = v->row_slot;
    l->experts.act = v->act;
    l->experts.pre = v->pre;
    l->experts.rows = v->rows;
    l->experts.fault = d->fault;
    l->experts.rank = d->rank;
    l->experts.num_tokens = d->num_tokens;
    l->experts.num_rows = (int32_t)v->num_rows;
    l->experts.hidden = d->hidden;
    l->experts.intermediate = d->intermediate;
    l->experts.num_experts = v->num_physical;
    l->experts.top_k = d->top_k;
    l->experts.dtype = dtype;
    l->experts.rows_dtype = d->rows_dtype;
    l->experts.activation = d->activation;
    l->experts.gate_up = d->gate_up;
    l->experts.alpha = d->alpha;
    l->experts.limit = d->limit;
    l->experts.tile = d->tile;
    l->experts.batch_invariant = d->batch_invariant;
    l->experts.workspace = v->experts_workspace;
    l->experts.workspace_bytes = MOE_EXPERTS_WORKSPACE;

    l->shared.x = d->x; /* its rows are the tokens */
    l->shared.x_stride = d->x_stride;
    l->shared.w1 = d->shared.w1;
    l->shared.w2 = d->shared.w2;
    l->shared.bias1 = d->shared.bias1;
    l->shared.bias2 = d->shared.bias2;
    l->shared.act = v->shared_act;
    l->shared.pre = v->shared_pre;
    l->shared.rows = v->shared_rows;
    l->shared.fault = d->fault;
    l->shared.rank = d->rank;
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
    l->shared.batch_invariant = d->batch_invariant;
    l->shared.workspace = (char*)v->experts_workspace + MOE_EXPERTS_WORKSPACE;
    l->shared.workspace_bytes = MOE_EXPERTS_WORKSPACE;

    l->combine.rows = v->rows;
    l->combine.place = v->place;
    l->combine.weights = v->weights;
    l->combine.residual = d->residual;
    l->combine.residual_stride = d->residual_stride;
    l->combine.shared = v->shared_rows;
    l->combine.shared_weight = d->shared.weight;
    l->combine.rows_dtype = d->rows_dtype ? d->rows_dtype : dtype;
    l->combine.y_dtype = dtype;
    l->combine.y = d->y;
    l->combine.y_stride = d->y_stride;
    l->combine.fault = d->fault;
    l->combine.rank = d->rank;
    l->combine.num_tokens = d->num_tokens;
    l->combine.hidden = d->hidden;
    l->combine.top_k = d->top_k;
    l->combine.num_rows = v->num_rows;
}

#endif
