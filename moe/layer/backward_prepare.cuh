/* backward_prepare.cuh: resolves a descriptor of the layer's backward pass, and checks it: what is
   computed, the view of its workspace, the stations' descriptors. Called by layer_backward.cuh. */
#ifndef MOE_LAYER_BACKWARD_PREPARE_CUH
#define MOE_LAYER_BACKWARD_PREPARE_CUH

#include "../experts_backward.cuh"
#include "../gate_backward.cuh"
#include "../permute.cuh"
#include "../router_backward.cuh"
#include "backward_desc.h"
#include "prepare.cuh"
#include "tokens.cuh"

#define MOEI_LAYER_GATHER_FROM 512 /* least I where gather_auto copies rows first, on wgmma */

/* Where the experts' backward pass has its rows. On one GPU the tokens' own; ep/layer_backward.cuh:
   those that this rank has received. Fields as in moe_experts_backward_desc. */
typedef struct moei_layer_backward_rows {
    const void *x, *dy;
    const float *weights, *row_weight;
    const int32_t *expert_offset, *row_slot, *slot_row;
    float* dweights;
    void* rows; /* null: in the workspace */
    int64_t x_stride, dy_stride;
    int32_t num_tokens;
    int32_t sums_drouter; /* 1: drouter is summed over ranks: fp32, overwritten */
    int32_t rows_first; /* 1: rows are computed before dw2 and dw1: copies have their own memory */
} moei_layer_backward_rows;

/* A descriptor that is being resolved. */
typedef struct moei_layer_backward {
    moei_layer_options o;       /* of the forward */
    moe_layer_view v;           /* of `saved` alone: its workspace is not the forward's any more */
    moei_layer_stations l;      /* of the forward; its experts' `up` computes pre again */
    moe_layer_saved_list saved; /* what the forward kept */
    moei_layer_backward_rows rows;
    moe_layer_backward_view w;
    size_t bytes;                                /* of the workspace */
    int32_t has_gate, has_router, has_shared_dx; /* 0 or 1: what is run */
    int32_t gathers;                             /* 1: copies of dy and x are made */
    moe_permute_desc gather_dy, gather_x;
    moe_experts_backward_desc experts, shared;
    moe_gate_backward_desc gate;
    moe_router_backward_desc router;
    moe_combine_desc combine;
} moei_layer_backward;

/* Returns the larger one. */
MOE_HOST uint64_t moei_larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* Refuses options that are out of range or contradict each other. */
MOE_HOST moe_status moei_layer_backward_check_options(const moe_layer_backward_desc* d,
                                                      const moei_layer_options* o)
{
    const int dtype = d->layer.dtype ? d->layer.dtype : MOE_BF16;
    const int router_dtype = d->layer.router_dtype ? d->layer.router_dtype : dtype;
    const int64_t num_tokens = d->layer.num_tokens, hidden = d->layer.hidden;
    MOE_REQUIRE(dtype == MOE_BF16 || dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    MOE_REQUIRE(!d->grad_dtype || d->grad_dtype == dtype || d->grad_dtype == MOE_FP32,
                MOE_ERR_DTYPE, grad_dtype);
    MOE_REQUIRE(!d->router_grad_dtype || d->router_grad_dtype == router_dtype ||
                    d->router_grad_dtype == MOE_FP32,
                MOE_ERR_DTYPE, router_grad_dtype);
    MOE_REQUIRE((d->accumulate | 1) == 1, MOE_ERR_OPTION, accumulate);
    MOE_REQUIRE((d->dx_accumulate | 1) == 1, MOE_ERR_OPTION, dx_accumulate);
    MOE_REQUIRE((d->empty_experts | 1) == 1, MOE_ERR_OPTION, empty_experts);
    MOE_REQUIRE(d->gather >= 0 && d->gather <= MOE_LAYER_GATHER_FIRST, MOE_ERR_OPTION, gather);
    MOE_REQUIRE(!d->dy_stride || moei_stride_fits(d->dy_stride, hidden, num_tokens), MOE_ERR_STRIDE,
                dy_stride);
    MOE_REQUIRE(d->dy_stride % 8 == 0, MOE_ERR_ALIGN, dy_stride);
    MOE_REQUIRE(!d->dx_stride || moei_stride_fits(d->dx_stride, hidden, num_tokens), MOE_ERR_STRIDE,
                dx_stride);
    MOE_REQUIRE(d->dx_stride % 8 == 0, MOE_ERR_ALIGN, dx_stride);
    MOE_REQUIRE(o->has_router || !d->drouter, MOE_ERR_CONFLICT, drouter);
    MOE_REQUIRE(o->has_gate || !d->dlogits, MOE_ERR_CONFLICT, dlogits);
    MOE_REQUIRE(o->has_gate || !d->balance_grad, MOE_ERR_CONFLICT, balance_grad);
    MOE_REQUIRE(o->has_shared || moei_all_zero(&d->shared, sizeof d->shared), MOE_ERR_CONFLICT,
                shared);
    return MOE_OK;
}

/* Sets the router's part, but for buffers of the workspace. */
MOE_HOST void moei_layer_backward_router(const moe_layer_backward_desc* d, moei_layer_backward* b)
{
    const moe_layer_desc* f = &d->layer;
    memset(&b->router, 0, sizeof b->router);
    b->router.x = f->x;
    b->router.router = f->router;
    b->router.x_stride = f->x_stride;
    b->router.x_dtype = f->dtype;
    b->router.router_dtype = f->router_dtype;
    b->router.dx = d->dx;
    b->router.dx_stride = d->dx_stride;
    b->router.drouter = d->drouter;
    b->router.grad_dtype = d->router_grad_dtype;
    b->router.fault = f->fault;
    b->router.num_tokens = f->num_tokens;
    b->router.hidden = f->hidden;
    b->router.num_experts = f->num_experts;
    b->router.dx_accumulate = d->dx_accumulate;
    b->router.accumulate = d->accumulate;
    if (b->rows.sums_drouter) {
        b->router.grad_dtype = MOE_FP32;
        b->router.accumulate = 0;
    }
    b->router.rank = f->rank;
}

/* Fills in the view of the workspace at `base` and b->bytes; a null base only counts. Requires
   b->router. `rows` serves in turn: copies of dy, the router's workspace, copies of x, gradients. */
MOE_HOST moe_status moei_layer_backward_carve(const moe_layer_backward_desc* d, char* base,
                                              moei_layer_backward* b)
{
    const moe_layer_desc* f = &d->layer;
    const uint64_t tokens = (uint64_t)f->num_tokens, rows = (uint64_t)b->o.num_rows;
    const uint64_t intermediate = (uint64_t)f->intermediate;
    const uint64_t shared = b->o.has_shared ? (uint64_t)f->shared.intermediate : 0;
    const uint64_t width = intermediate * (uint64_t)moei_experts_up_rows(f->activation, 0);
    const uint64_t shared_width = shared * (uint64_t)moei_experts_up_rows(f->shared.activation, 0);
    moe_layer_backward_view* w = &b->w;
    const uint64_t row_bytes = f->rows_dtype == MOE_FP32 ? 4 : 2;
    const uint64_t copies = f->recompute && shared ? moei_larger(rows, tokens) : rows;
    size_t router = 0;
    b->bytes = 0;
    memset(w, 0, sizeof *w);
    if (b->has_router) MOE_TRY(moe_router_backward_workspace(&b->router, &router));
    w->experts_workspace = moei_carve(base, &b->bytes, 2 * MOE_EXPERTS_BACKWARD_WORKSPACE);
    w->act = moei_carve(base, &b->bytes, moei_larger(rows * intermediate, tokens * shared) * 2);
    if (b->rows.rows) {
        w->rows = b->rows.rows;
        w->router_workspace = moei_carve(base, &b->bytes, router);
    } else {
        w->rows = moei_carve(base, &b->bytes,
                             moei_larger(copies * (uint64_t)f->hidden * row_bytes, router));
        w->router_workspace = w->rows;
    }
    w->copies = w->rows;
    if (b->rows.rows_first) {
        if (!b->rows.rows) w->router_workspace = moei_carve(base, &b->bytes, router);
        if (b->rows.row_slot)
            w->copies = moei_carve(base, &b->bytes, rows * (uint64_t)f->hidden * 2);
    }
    w->dweights = d->dweights;
    w->dlogits = d->dlogits;
    if (b->has_gate && !w->dweights && !b->o.elsewhere)
        w->dweights = (float*)moei_carve(base, &b->bytes, tokens * (uint64_t)f->top_k * 4);
    if (b->has_gate && !w->dlogits)
        w->dlogits = (float*)moei_carve(base, &b->bytes, tokens * (uint64_t)f->num_experts * 4);
    if (b->has_gate || d->dweights || b->o.elsewhere) /* elsewhere: for other ranks' tokens */
        w->dot = (float*)moei_carve(base, &b->bytes, rows * ((intermediate + 63) / 64) * 4);
    if (d->shared.dweight)
        w->shared_dot = (float*)moei_carve(base, &b->bytes, tokens * ((shared + 63) / 64) * 4);
    if (shared && f->gate.token_disabled)
        w->shared_slot = (int32_t*)moei_carve(base, &b->bytes, tokens * 4);
    w->pre = b->v.pre;
    w->shared_pre = b->v.shared_pre;
    if (f->recompute) {
        w->pre = moei_carve(base, &b->bytes, rows * width * 2);
        if (shared) w->shared_pre = moei_carve(base, &b->bytes, tokens * shared_width * 2);
    }
    return MOE_OK;
}

/* Sets the backward pass of the routed experts. */
MOE_HOST void moei_layer_backward_experts(const moe_layer_backward_desc* d, moei_layer_backward* b)
{
    const moe_layer_desc* f = &d->layer;
    const moei_layer_backward_rows* r = &b->rows;
    moe_experts_backward_desc* e = &b->experts;
    memset(e, 0, sizeof *e);
    e->x = r->x;
    e->x_stride = r->x_stride;
    e->dy = r->dy;
    e->dy_stride = r->dy_stride;
    e->x_rows = b->gathers ? b->w.copies : 0;
    e->dy_rows = b->gathers ? b->w.copies : 0;
    e->pre = b->w.pre;
    e->weights = r->weights;
    e->row_weight = r->row_weight;
    e->w1 = f->w1;
    e->w2 = f->w2;
    e->bias2 = f->bias2;
    e->expert_offset = r->expert_offset;
    e->row_slot = r->row_slot;
    e->slot_row = r->slot_row;
    e->rows = d->dx ? b->w.rows : 0;
    e->dw1 = d->dw1;
    e->dw2 = d->dw2;
    e->dbias1 = d->dbias1;
    e->dbias2 = d->dbias2;
    e->dweights = r->dweights;
    e->act = b->w.act;
    e->dot = b->w.dot;
    e->fault = f->fault;
    e->num_tokens = r->num_tokens;
    e->num_rows = (int32_t)b->o.num_rows;
    e->hidden = f->hidden;
    e->intermediate = f->intermediate;
    e->num_experts = b->o.num_physical;
    e->top_k = f->top_k;
    e->dtype = f->dtype;
    e->rows_dtype = f->rows_dtype;
    e->grad_dtype = d->grad_dtype;
    e->activation = f->activation;
    e->gate_up = f->gate_up;
    e->alpha = f->alpha;
    e->limit = f->limit;
    e->accumulate = d->accumulate;
    e->empty_experts = d->empty_experts;
    e->tile = f->tile;
    e->batch_invariant = f->batch_invariant;
    e->rank = f->rank;
    e->workspace = b->w.experts_workspace;
    e->workspace_bytes = MOE_EXPERTS_BACKWARD_WORKSPACE;
}

/* Sets the backward pass of the shared expert, whose rows are the tokens; none of a disabled one. */
MOE_HOST void moei_layer_backward_shared(const moe_layer_backward_desc* d, moei_layer_backward* b)
{
    const moe_layer_desc* f = &d->layer;
    moe_experts_backward_desc* e = &b->shared;
    memset(e, 0, sizeof *e);
    e->x = f->x;
    e->x_stride = f->x_stride;
    e->dy = d->dy;
    e->dy_stride = d->dy_stride;
    e->pre = b->w.shared_pre;
    e->weights = f->shared.weight;
    if (b->w.shared_slot) { /* rows are slots: one for each token */
        e->row_slot = e->slot_row = b->w.shared_slot;
        e->num_tokens = f->num_tokens, e->top_k = 1;
    }
    e->w1 = f->shared.w1;
    e->w2 = f->shared.w2;
    e->bias2 = f->shared.bias2;
    e->rows = d->dx;
    e->row_stride = d->dx_stride;
    e->rows_accumulate = d->dx_accumulate || (b->has_router && d->dx);
    e->dw1 = d->shared.dw1;
    e->dw2 = d->shared.dw2;
    e->dbias1 = d->shared.dbias1;
    e->dbias2 = d->shared.dbias2;
    e->dweights = d->shared.dweight;
    e->act = b->w.act;
    e->dot = b->w.shared_dot;
    e->fault = f->fault;
    e->num_rows = f->num_tokens;
    e->hidden = f->hidden;
    e->intermediate = f->shared.intermediate;
    e->num_experts = 1;
    e->dtype = f->dtype;
    e->grad_dtype = d->grad_dtype;
    e->activation = f->shared.activation;
    e->gate_up = f->shared.gate_up;
    e->alpha = f->shared.alpha;
    e->limit = f->shared.limit;
    e->accumulate = d->accumulate;
    e->tile = f->tile;
    e->batch_invariant = f->batch_invariant;
    e->rank = f->rank;
    e->workspace = (char*)b->w.experts_workspace + MOE_EXPERTS_BACKWARD_WORKSPACE;
    e->workspace_bytes = MOE_EXPERTS_BACKWARD_WORKSPACE;
}

/* Sets the copies in expert order, and the sum that ends dx. */
MOE_HOST void moei_layer_backward_moves(const moe_layer_backward_desc* d, moei_layer_backward* b)
{
    const moe_layer_desc* f = &d->layer;
    const moei_layer_backward_rows* r = &b->rows;
    const int dtype = f->dtype ? f->dtype : MOE_BF16;
    moe_permute_desc* p = &b->gather_dy;
    moe_combine_desc* c = &b->combine;
    memset(p, 0, sizeof *p);
    p->x = r->dy;
    p->x_stride = r->dy_stride;
    p->row_slot = r->row_slot;
    p->slot_row = r->slot_row;
    p->dtype = dtype;
    p->y = b->w.copies;
    p->fault = f->fault;
    p->num_tokens = r->num_tokens;
    p->top_k = f->top_k;
    p->hidden = f->hidden;
    p->rank = f->rank;
    p->num_rows = b->o.num_rows;
    b->gather_x = *p;
    b->gather_x.x = r->x;
    b->gather_x.x_stride = r->x_stride;

    memset(c, 0, sizeof *c);
    c->rows = b->w.rows;
    c->place = b->v.place;
    c->residual = d->dx_accumulate || b->has_router || b->o.has_shared ? d->dx : 0;
    c->residual_stride = d->dx_stride;
    c->rows_dtype = f->rows_dtype ? f->rows_dtype : dtype;
    c->y = d->dx;
    c->y_stride = d->dx_stride;
    c->y_dtype = dtype;
    c->fault = f->fault;
    c->num_tokens = f->num_tokens;
    c->hidden = f->hidden;
    c->top_k = f->top_k;
    c->num_rows = b->o.num_rows;
    c->rank = f->rank;
}

/* Fills in all stations' descriptors. */
MOE_HOST void moei_layer_backward_describe(const moe_layer_backward_desc* d, moei_layer_backward* b)
{
    moei_layer_backward_experts(d, b);
    moei_layer_backward_shared(d, b);
    moei_layer_backward_moves(d, b);
    memset(&b->gate, 0, sizeof b->gate);
    b->gate.gate = b->l.gate;
    b->gate.dweights = b->w.dweights;
    b->gate.balance_grad = d->balance_grad;
    b->gate.dlogits = b->w.dlogits;
    b->router.dlogits = b->w.dlogits;
    b->router.workspace = b->w.router_workspace;
    b->router.workspace_bytes = (size_t)-1 / 2; /* carved as it asked */
}

/* Fills in the rest of *b, which has b->o and, where the rows are elsewhere, b->rows. */
MOE_HOST moe_status moei_layer_backward_fill(const moe_layer_backward_desc* d, char* base,
                                             moei_layer_backward* b)
{
    const moe_layer_desc* f = &d->layer;
    size_t bytes = 0;
    MOE_TRY(moei_layer_backward_check_options(d, &b->o));
    b->has_router = b->o.has_router && (d->dx || d->drouter);
    b->has_gate = b->o.has_gate && (b->has_router || d->dlogits);
    /* the losses would change no gradient; a frozen router has none */
    MOE_REQUIRE(!d->balance_grad || b->has_gate || b->o.has_router, MOE_ERR_CONFLICT, balance_grad);
    moei_layer_list_saved(f, &b->o, &b->saved);
    moei_layer_given(f, &b->o, &b->v);
    moei_layer_carve_saved(f, &b->o, (char*)f->saved, 1, &b->v, &bytes, 0);
    moei_layer_backward_router(d, b);
    MOE_TRY(moei_layer_backward_carve(d, base, b));
    { /* what the forward's stations take, with pre where it is computed again */
        moe_layer_view v = b->v;
        v.pre = b->w.pre;
        v.shared_pre = b->w.shared_pre;
        v.act = v.shared_act = b->w.act;
        v.rows = v.shared_rows = b->w.rows;
        v.experts_workspace = b->w.experts_workspace;
        moei_layer_describe(f, &b->o, &v, &b->l);
    }
    return MOE_OK;
}

/* Fills in *b, all but the check of buffers. base: the workspace, or null to count its bytes. */
MOE_HOST moe_status moei_layer_backward_resolve(const moe_layer_backward_desc* d, char* base,
                                                moei_layer_backward* b)
{
    const moe_layer_desc* f = &d->layer;
    moei_layer_backward_rows* r = &b->rows;
    memset(b, 0, sizeof *b);
    MOE_TRY(moei_layer_resolve(f, &b->o));
    MOE_TRY(moei_layer_backward_fill(d, base, b));
    r->x = f->x;
    r->x_stride = f->x_stride;
    r->dy = d->dy;
    r->dy_stride = d->dy_stride;
    r->weights = b->v.weights;
    r->row_weight = b->v.row_weight;
    r->expert_offset = b->v.expert_offset;
    r->row_slot = b->v.row_slot;
    r->slot_row = b->v.slot_row;
    r->dweights = b->w.dweights;
    r->num_tokens = f->num_tokens;
    return MOE_OK;
}

/* Refuses buffers of the caller's that are absent, misaligned or overlap; dx may be dy. No output
   may overlap what either pass reads. Requires checked options. */
MOE_HOST moe_status moei_layer_backward_check_buffers(const moe_layer_backward_desc* d,
                                                      const moei_layer_backward* b)
{
    const moe_layer_desc* f = &d->layer;
    const moe_layer_backward_shared* s = &d->shared;
    const int64_t tokens = f->num_tokens, hidden = f->hidden, intermediate = f->intermediate;
    const int64_t experts = b->o.num_physical, Is = f->shared.intermediate;
    const int dtype = f->dtype ? f->dtype : MOE_BF16;
    const int grad = d->grad_dtype ? d->grad_dtype : dtype;
    const int router_dtype = f->router_dtype ? f->router_dtype : dtype;
    const int router_grad = d->router_grad_dtype ? d->router_grad_dtype : router_dtype;
    const int64_t dy_stride = d->dy_stride ? d->dy_stride : hidden;
    const int64_t dx_stride = d->dx_stride ? d->dx_stride : hidden;
    const int64_t x_stride = f->x_stride ? f->x_stride : hidden;
    const int64_t up = moei_experts_up_rows(f->activation, 0) * intermediate;
    const int64_t s_up = moei_experts_up_rows(f->shared.activation, 0) * Is;
    const int64_t m = moei_experts_up_rows(f->activation, f->gate_up) * intermediate;
    const int64_t s_m = moei_experts_up_rows(f->shared.activation, f->shared.gate_up) * Is;
    const int in_place = d->dx == d->dy && dx_stride == dy_stride;
    const uint64_t slots = (uint64_t)tokens * (uint64_t)f->top_k;
    const uint64_t dw1 = moei_grads_extent(&d->dw1, f->w1.major, experts, m, hidden, grad);
    const uint64_t s_dw1 = moei_grads_extent(&s->dw1, f->shared.w1.major, 1, s_m, hidden, grad);
    const uint32_t bytes = (uint32_t)moe_dtype_bytes(grad);
    const int written = MOE_BUFFER_WRITTEN, required = MOE_BUFFER_REQUIRED;
    moe_buffer all[MOEI_LAYER_INPUTS + 21];
    const moe_buffer own[21] = {
        {f->x, moe_extent(tokens, x_stride, hidden, dtype), 16, required, MOE_FIELD_x},
        {d->dy, in_place ? 0 : moe_extent(tokens, dy_stride, hidden, dtype), 16, required,
         MOE_FIELD_dy},
        {d->balance_grad, (uint64_t)(f->num_experts + 1) * 4, 4, MOE_BUFFER_READ,
         MOE_FIELD_balance_grad},
        {d->dx, moe_extent(tokens, dx_stride, hidden, dtype), 16, written, MOE_FIELD_dx},
        {d->dlogits, (uint64_t)tokens * (uint64_t)f->num_experts * 4, 4, written,
         MOE_FIELD_dlogits},
        {d->dweights, slots * 4, 4, written, MOE_FIELD_dweights},
        {s->dweight, (uint64_t)tokens * 4, 4, written, MOE_FIELD_shared},
        /* from here on checked without tokens too */
        {f->saved, f->saved_bytes < b->saved.bytes ? f->saved_bytes : b->saved.bytes, 256,
         required | written, MOE_FIELD_saved},
        {f->workspace, f->workspace_bytes < b->bytes ? f->workspace_bytes : b->bytes, 256,
         required | written, MOE_FIELD_workspace},
        {d->drouter,
         (uint64_t)f->num_experts * (uint64_t)hidden * (uint64_t)moe_dtype_bytes(router_grad),
         (uint32_t)moe_dtype_bytes(router_grad), written, MOE_FIELD_drouter},
        {d->dw1.base, dw1, 16, written, MOE_FIELD_dw1},
        {d->dw1.up, m < up ? dw1 : 0, 16, written, MOE_FIELD_dw1},
        {d->dw2.base, moei_grads_extent(&d->dw2, f->w2.major, experts, hidden, intermediate, grad),
         16, written, MOE_FIELD_dw2},
        {d->dbias1, (uint64_t)(experts * up) * bytes, bytes, written, MOE_FIELD_dbias1},
        {d->dbias2, (uint64_t)(experts * hidden) * bytes, bytes, written, MOE_FIELD_dbias2},
        {s->dw1.base, s_dw1, 16, written, MOE_FIELD_shared},
        {s->dw1.up, s_m < s_up ? s_dw1 : 0, 16, written, MOE_FIELD_shared},
        {s->dw2.base, moei_grads_extent(&s->dw2, f->shared.w2.major, 1, hidden, Is, grad), 16,
         written, MOE_FIELD_shared},
        {s->dbias1, (uint64_t)s_up * bytes, bytes, written, MOE_FIELD_shared},
        {s->dbias2, (uint64_t)hidden * bytes, bytes, written, MOE_FIELD_shared},
        {f->fault, 8, 8, written, MOE_FIELD_fault}};
    moei_layer_inputs(f, experts, all);
    memcpy(all + MOEI_LAYER_INPUTS, own, sizeof own);
    if (tokens == 0) MOE_TRY(moe_check_buffers(own + 7, 21 - 7));
    else MOE_TRY(moe_check_buffers(all, MOEI_LAYER_INPUTS + 21));
    MOE_REQUIRE(f->saved_bytes >= b->saved.bytes, MOE_ERR_WORKSPACE, saved_bytes);
    MOE_REQUIRE(f->workspace_bytes >= b->bytes, MOE_ERR_WORKSPACE, workspace_bytes);
    return MOE_OK;
}

/* Renames a refused field of the shared expert's backward pass to `shared`. */
MOE_HOST moe_status moei_layer_backward_rename_shared(moe_status s)
{
    const int kind = moe_status_kind(s), field = moe_status_detail(s);
    if (kind == MOE_OK || kind == MOE_ERR_CUDA) return s;
    if (field == MOE_FIELD_dw1 || field == MOE_FIELD_dw2 || field == MOE_FIELD_dbias1 ||
        field == MOE_FIELD_dbias2 || field == MOE_FIELD_dweights)
        return (moe_status)(kind | (MOE_FIELD_shared << 8));
    return moei_layer_rename_shared(s);
}

#endif
