/* layer.cuh: the whole MoE layer over several GPUs, x -> y: every rank brings its own tokens and
   has some of the experts.

     logits, ids, weights of this rank's tokens   router.cuh, gate.cuh; one router for all ranks
     tokens to the ranks of their experts         dispatch.cuh
     rows = experts(received tokens)              experts.cuh, this rank's P experts
     shared = expert(x), where given              at home, while the tokens travel
     y = residual + sum of the rows + shared      combine.cuh

   In:   x [T, H], router [E, H], w1 [P, 2I, H], w2 [P, H, I] of this rank's experts; biases alike
   Out:  y [T, H] of this rank's tokens
   T may differ from rank to rank, and be 0. Rank r has the experts of owner.h: without replicas its
   first one is moe_ep_first(r, E, W), and P = moe_ep_owned(r, E, W), which may be 0.

   The descriptor nests the layer's own (layer/desc.h). Fields there that this layer refuses by
   name, with MOE_ERR_CONFLICT: `route` but for row_multiple (replicas are fields here; capacity and
   drops are not offered over ranks), `gate.whole_batch` (chooses over all tokens, of which each
   rank has some), `rank` (it is peers.rank). The fault word is required.

   Numerics: those of layer.cuh; but for MOE_EP_GATHERED one more rounding of each rank's sum to
   rows_dtype. The form of dispatch changes no bit. With MOE_EP_GATHERED and batch_invariant y has
   the same bits for every W, but for rows in fp8 (buffers.wire_dtype). Equal inputs give equal bits.
   No call but moe_ep_layer_count allocates or synchronises. A graph of it can be replayed with other
   inputs. All ranks call it alike (but for T), in the same order as other exchanges of the same
   buffers.

   Training: with layer.saved the layer keeps what layer_backward.cuh needs (moe_ep_layer_saved lists
   it); the dispatch's workspace is its end. Without it nothing is kept. With count_rows the forward
   comes in two halves, and what it keeps has room for the rows that came:
     moe_ep_layer_begin on all ranks; moe_ep_layer_count; num_rows, pre; moe_ep_layer_finish

   Cost: the launches of the stations. With microbatch_tokens the exchange and the experts run once
   a micro-batch, and the host prepares each but the first when it queues it; replicas take turns
   within one. Memory of a rank: its own experts' weights; the
   region (desc.h); the workspace:
     the gate's and the shared expert's buffers, as in layer.cuh, of T tokens
     the dispatch's workspace (dispatch.cuh)
     max_rows I 2  act,   and but for MOE_EP_GATHERED  max_rows H r  rows
   With microbatch_tokens the last two lines and the region are of one micro-batch.

     moe_ep_layer_desc e = {0};
     e.layer.x = x;  e.layer.router = router;  e.layer.w1.base = w1;  e.layer.w2.base = w2;
     e.layer.y = y;  e.layer.fault = fault;  e.layer.num_tokens = T;  e.layer.hidden = H;
     e.layer.intermediate = I;  e.layer.num_experts = E;  e.layer.top_k = K;
     e.peers = &peers;  e.buffers.max_tokens = T_max;
     moe_ep_layer_region(&e, W, &region_bytes);       // before the group exists: sizes alone
     moe_ep_layer_workspace(&e, &bytes);  e.layer.workspace = ...;  e.layer.workspace_bytes = bytes;
     moe_status s = moe_ep_layer_forward(&e, stream); */
#ifndef MOE_EP_LAYER_CUH
#define MOE_EP_LAYER_CUH

#include "../layer.cuh"
#include "combine.cuh"
#include "layer_desc.h"

/* A descriptor that is being resolved: the layer's three phases, and the exchange's. */
typedef struct moei_ep_layer {
    moei_layer_options o;
    moe_layer_view v;
    moei_layer_stations l;
    moe_ep_dispatch_desc dispatch;
    moe_ep_combine_desc combine;
    moe_ep_view ep;
    moe_layer_saved_list saved;
    size_t workspace; /* bytes of the whole */
} moei_ep_layer;

/* Fills in the buffers that the descriptor asks for. Refuses what the layer itself has. */
MOE_HOST moe_status moei_ep_layer_buffers(const moe_ep_layer_desc* d, moe_ep_buffers* b)
{
    *b = d->buffers;
    MOE_REQUIRE(d->microbatch_tokens >= 0, MOE_ERR_RANGE, microbatch_tokens);
    if (d->microbatch_tokens && d->microbatch_tokens < b->max_tokens)
        b->max_tokens = d->microbatch_tokens;
    MOE_REQUIRE(!b->hidden && !b->num_experts && !b->top_k && !b->dtype && !b->rows_dtype &&
                    !b->row_multiple && !b->num_scales,
                MOE_ERR_CONFLICT, buffers);
    b->row_multiple = d->layer.route.row_multiple;
    b->hidden = d->layer.hidden;
    b->num_experts = d->layer.num_experts;
    b->top_k = d->layer.top_k;
    b->dtype = d->layer.dtype;
    b->rows_dtype = d->layer.rows_dtype;
    return MOE_OK;
}

/* Writes the bytes that every rank's region must have to *bytes; reads sizes and options. peers may
   be null. Errors: theirs; num_ranks. */
MOE_HOST moe_status moe_ep_layer_region(const moe_ep_layer_desc* desc, int num_ranks,
                                        uint64_t* bytes)
{
    moe_ep_buffers b;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    MOE_REQUIRE(num_ranks >= 1 && num_ranks <= MOE_PEERS_MAX_RANKS, MOE_ERR_RANGE, num_ranks);
    MOE_TRY(moei_ep_layer_buffers(desc, &b));
    return moe_ep_buffers_end(&b, num_ranks, bytes);
}

/* Refuses what this layer does not carry. */
MOE_HOST moe_status moei_ep_layer_check(const moe_ep_layer_desc* d)
{
    moe_route_desc route = d->layer.route;
    route.row_multiple = 0;
    MOE_REQUIRE(moei_all_zero(&route, sizeof route), MOE_ERR_CONFLICT, route);
    MOE_REQUIRE(!d->layer.gate.whole_batch, MOE_ERR_CONFLICT, gate);
    MOE_REQUIRE(!d->layer.rank, MOE_ERR_CONFLICT, rank);
    MOE_REQUIRE(!d->layer.saved || !d->microbatch_tokens, MOE_ERR_CONFLICT, saved);
    MOE_REQUIRE((d->redispatch_x | 1) == 1, MOE_ERR_OPTION, redispatch_x);
    MOE_REQUIRE((d->count_rows | 1) == 1, MOE_ERR_OPTION, count_rows);
    MOE_REQUIRE(!d->count_rows || !d->microbatch_tokens, MOE_ERR_CONFLICT, count_rows);
    MOE_REQUIRE(d->num_rows >= 0 && d->num_rows <= 0x7fffffff, MOE_ERR_RANGE, num_rows);
    MOE_REQUIRE(d->count_rows || !d->num_rows, MOE_ERR_CONFLICT, num_rows);
    MOE_REQUIRE((d->count_rows && !d->layer.recompute) || !d->pre, MOE_ERR_CONFLICT, pre);
    MOE_REQUIRE(moei_aligned(d->pre, 16), MOE_ERR_ALIGN, pre);
    MOE_REQUIRE(d->layer.dtype == 0 || d->layer.dtype == MOE_BF16 || d->layer.dtype == MOE_FP16,
                MOE_ERR_DTYPE, dtype);
    return MOE_OK;
}

/* Lets the experts read what was received. */
MOE_HOST void moei_ep_layer_receives(const moe_ep_view* ep, moe_experts_desc* x)
{
    x->x = ep->recv_x;
    x->x_stride = 0;
    x->num_tokens = (int32_t)ep->num_x;
    x->expert_offset = ep->expert_offset;
    x->row_slot = ep->in_order ? 0 : ep->row_slot;
    if (ep->num_local == 0) x->num_experts = 1; /* its options are checked */
}

/* Lists what the layer keeps: the home's part, the row maps (`part` bytes), received rows. Returns
   the address of the row maps in layer.saved; null without it. */
MOE_HOST void* moei_ep_layer_list_saved(const moe_ep_layer_desc* d, const moe_layer_desc* home,
                                        size_t part, moei_ep_layer* e)
{
    const moe_layer_saved_item row_maps = {"row maps", (int64_t)part, 1, 1, 0, 0};
    const moe_layer_saved_item recv_x = {"recv_x", e->ep.num_x, home->hidden, 2, 0, 0};
    void *maps = 0, *x = e->ep.recv_x;
    moei_layer_list_saved(home, &e->o, &e->saved);
    moei_layer_keep(&e->saved, (char*)d->layer.saved, &e->saved.bytes, &maps, &row_maps);
    if (!d->redispatch_x) moei_layer_keep(&e->saved, 0, &e->saved.bytes, &x, &recv_x);
    return maps;
}

/* Fills in *e, all but the check of buffers. base: the workspace, or null to count its bytes. */
MOE_HOST moe_status moei_ep_layer_resolve(const moe_ep_layer_desc* d, char* base, moei_ep_layer* e)
{
    moe_layer_desc home = d->layer;
    moei_ep_args args;
    size_t bytes, part;
    memset(e, 0, sizeof *e);
    MOE_TRY(moei_ep_layer_check(d));
    MOE_REQUIRE(d->peers, MOE_ERR_NULL, peers);
    home.route.row_multiple = 0; /* those rows are not T K ones */
    home.rank = d->peers->rank;
    MOE_TRY(moei_layer_resolve(&home, &e->o));

    e->dispatch.peers = d->peers;
    e->dispatch.x = d->layer.x;
    e->dispatch.x_stride = d->layer.x_stride;
    e->dispatch.replica_offset = d->replica_offset;
    e->dispatch.replica = d->replica;
    e->dispatch.fault = d->layer.fault;
    e->dispatch.num_local = d->num_local;
    e->dispatch.tag = d->tag;
    e->dispatch.counters = d->counters;
    e->dispatch.side_stream = d->side_stream;
    e->dispatch.side_event[0] = d->side_event[0], e->dispatch.side_event[1] = d->side_event[1];
    MOE_TRY(moei_ep_layer_buffers(d, &e->dispatch.buffers));
    MOE_REQUIRE(d->layer.num_tokens <= d->buffers.max_tokens, MOE_ERR_RANGE, num_tokens);
    e->dispatch.num_tokens = d->layer.num_tokens; /* of the first micro-batch */
    if (d->layer.num_tokens > e->dispatch.buffers.max_tokens)
        e->dispatch.num_tokens = e->dispatch.buffers.max_tokens;
    memset(&args, 0, sizeof args);
    MOE_TRY(moei_ep_check_options(&e->dispatch, &args));
    MOE_TRY(moei_ep_carve(&e->dispatch, &args, 0, &e->ep, &part));

    MOE_REQUIRE(d->num_rows <= 1 || d->num_rows <= e->ep.num_rows, MOE_ERR_RANGE, num_rows);
    e->o.elsewhere = 1;
    e->o.num_rows = d->count_rows ? d->num_rows : e->ep.num_rows;
    e->o.table_rows = e->ep.num_rows;
    e->o.num_physical = e->ep.num_local;
    e->o.pre = d->pre;
    moei_layer_carve(&home, &e->o, base, &e->v, &bytes);
    e->dispatch.workspace = moei_ep_layer_list_saved(d, &home, part, e);
    if (!d->layer.saved) e->dispatch.workspace = moei_carve(base, &bytes, part);
    e->dispatch.workspace_bytes = part;
    MOE_TRY(moei_ep_carve(&e->dispatch, &args, (char*)e->dispatch.workspace, &e->ep, &part));
    e->v.expert_count = e->ep.expert_count;
    e->v.expert_offset = e->ep.expert_offset;
    e->v.row_slot = e->ep.row_slot;
    e->v.place = e->ep.recv_place;
    e->v.rows = e->ep.rows;
    if (e->dispatch.buffers.combine_form != MOE_EP_GATHERED)
        e->v.rows = moei_carve(base, &bytes,
                               (uint64_t)e->o.num_rows * (uint64_t)home.hidden *
                                   (uint64_t)moe_dtype_bytes(e->dispatch.buffers.rows_dtype));
    e->workspace = bytes;

    moei_layer_describe(&home, &e->o, &e->v, &e->l);
    moei_ep_layer_receives(&e->ep, &e->l.experts);
    e->dispatch.ids = e->v.ids;
    e->dispatch.weights = e->v.weights;
    if (d->layer.saved) e->dispatch.row_weight = e->v.row_weight;
    e->combine.dispatch = &e->dispatch;
    e->combine.rows = e->dispatch.buffers.combine_form == MOE_EP_GATHERED ? 0 : e->v.rows;
    e->combine.weights = e->v.weights;
    e->combine.residual = e->l.combine.residual;
    e->combine.residual_stride = e->l.combine.residual_stride;
    e->combine.shared = e->l.combine.shared;
    e->combine.shared_weight = e->l.combine.shared_weight;
    e->combine.y = e->l.combine.y;
    e->combine.y_stride = e->l.combine.y_stride;
    e->combine.tag = d->tag;
    return MOE_OK;
}

/* Writes the bytes of workspace of this rank's layer to *bytes. Reads sizes, options, peers, fault,
   and which of logits, ids and replicas are given. Errors: theirs. */
MOE_HOST moe_status moe_ep_layer_workspace(const moe_ep_layer_desc* desc, size_t* bytes)
{
    moei_ep_layer e;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    *bytes = 0;
    MOE_TRY(moei_ep_layer_resolve(desc, 0, &e));
    *bytes = e.workspace;
    return MOE_OK;
}

/* Lists what stays from a forward with layer.saved to its backward: x; the received rows, in the
   region, unless redispatch_x; in layer.saved logits, ids, weights, row_weight, pre-activations and
   the dispatch's row maps. list->bytes is what layer.saved_bytes must be. Reads what
   moe_ep_layer_workspace reads. Errors: theirs. */
MOE_HOST moe_status moe_ep_layer_saved(const moe_ep_layer_desc* desc, moe_layer_saved_list* list)
{
    moei_ep_layer e;
    MOE_REQUIRE(desc && list, MOE_ERR_NULL, desc);
    memset(list, 0, sizeof *list);
    MOE_TRY(moei_ep_layer_resolve(desc, 0, &e));
    *list = e.saved;
    return MOE_OK;
}

/* Writes the addresses of the layer's buffers to *view and of the exchange's to *ep; `rows` and the
   row maps are those of received tokens. Errors: as of moe_ep_layer_workspace, a null workspace. */
MOE_HOST moe_status moe_ep_layer_get_view(const moe_ep_layer_desc* desc, moe_layer_view* view,
                                          moe_ep_view* ep)
{
    moei_ep_layer e;
    MOE_REQUIRE(desc && view && ep, MOE_ERR_NULL, desc);
    MOE_REQUIRE(desc->layer.workspace, MOE_ERR_NULL, workspace);
    MOE_TRY(moei_ep_layer_resolve(desc, (char*)desc->layer.workspace, &e));
    *view = e.v;
    *ep = e.ep;
    return MOE_OK;
}

/* A prepared layer: all but its stream, for the device that was current. */
typedef struct moe_ep_layer_prepared {
    moe_layer_prepared home; /* router, gate, experts, shared; route and combine are empty */
    moe_ep_dispatch_prepared dispatch; /* of the first micro-batch, like the next */
    moe_ep_combine_prepared combine;
    /* from which the other micro-batches are prepared when they run */
    moe_ep_dispatch_desc first_dispatch;
    moe_ep_combine_desc first_combine;
    int32_t num_tokens, num_microbatches; /* of this rank; of every rank */
} moe_ep_layer_prepared;

/* Refuses the caller's pre-activations where they are missing or overlap other memory. */
MOE_HOST moe_status moei_ep_layer_check_pre(const moe_ep_layer_desc* d, size_t workspace,
                                            size_t saved)
{
    const uint64_t width =
        (uint64_t)moei_experts_up_rows(d->layer.activation, 0) * (uint64_t)d->layer.intermediate;
    const moe_buffer list[] = {
        {d->pre, (uint64_t)d->num_rows * width * 2, 16,
         MOE_BUFFER_WRITTEN | (d->layer.recompute || !d->count_rows ? 0 : MOE_BUFFER_REQUIRED),
         MOE_FIELD_pre},
        {d->layer.workspace, workspace, 256, MOE_BUFFER_READ, MOE_FIELD_workspace},
        {d->layer.saved, saved, 256, MOE_BUFFER_READ, MOE_FIELD_saved},
        {d->peers->base, d->peers->bytes, 256, MOE_BUFFER_READ, MOE_FIELD_region}};
    return moe_check_buffers(list, (int)(sizeof list / sizeof list[0]));
}

/* Fills in *p, which is empty. */
MOE_HOST moe_status moei_ep_layer_prepare(const moe_ep_layer_desc* desc, moe_ep_layer_prepared* p)
{
    moei_ep_layer e;
    moe_layer_desc home = desc->layer;
    moe_layer_prepared* h = &p->home;
    MOE_TRY(moei_ep_layer_resolve(desc, (char*)desc->layer.workspace, &e));
    home.route.row_multiple = 0;
    MOE_TRY(moei_layer_check_options(&home, &e.o, &e.l));
    MOE_TRY(moei_layer_check_buffers(&home, &e.v, e.workspace, e.saved.bytes));
    MOE_REQUIRE(!desc->count_rows || desc->layer.saved, MOE_ERR_NULL, saved);
    MOE_TRY(moei_ep_layer_check_pre(desc, e.workspace, e.saved.bytes));
    h->has_router = e.o.has_router;
    h->has_gate = e.o.has_gate;
    h->has_shared = e.o.has_shared;
    if (h->has_router) MOE_TRY(moe_router_prepare(&e.l.router, &h->router));
    if (h->has_gate) MOE_TRY(moe_gate_prepare(&e.l.gate, &h->gate));
    if (h->has_shared)
        MOE_TRY(moei_layer_rename_shared(moe_experts_prepare(&e.l.shared, &h->shared)));
    if (e.ep.num_local && e.o.num_rows) MOE_TRY(moe_experts_prepare(&e.l.experts, &h->experts));
    else h->experts.workspace = e.l.experts.workspace;
    MOE_TRY(moe_ep_dispatch_prepare(&e.dispatch, &p->dispatch));
    MOE_TRY(moe_ep_combine_prepare(&e.combine, &p->combine));
    p->first_dispatch = e.dispatch;
    p->first_combine = e.combine;
    p->num_tokens = desc->layer.num_tokens;
    p->num_microbatches = 1;
    if (e.dispatch.buffers.max_tokens > 0)
        p->num_microbatches = (desc->buffers.max_tokens - 1) / e.dispatch.buffers.max_tokens + 1;
    return MOE_OK;
}

/* Returns the address of row number `at` of an array, null where there is none; stride 0: width. */
MOE_HOST const void* moei_ep_layer_at(const void* p, int at, int64_t stride, int32_t width,
                                      int dtype)
{
    return p ? (const char*)p + at * (stride ? stride : width) * moe_dtype_bytes(dtype) : 0;
}

/* Queues the exchange and the experts of micro-batch number `batch`, 1 or more. */
MOE_HOST moe_status moei_ep_layer_run_microbatch(const moe_ep_layer_prepared* p, int batch,
                                                 cudaStream_t stream)
{
    moe_ep_dispatch_desc d = p->first_dispatch;
    moe_ep_combine_desc c = p->first_combine;
    const moe_ep_buffers* b = &d.buffers;
    const int64_t begin = (int64_t)batch * b->max_tokens;
    const int at = begin < p->num_tokens ? (int)begin : p->num_tokens, left = p->num_tokens - at;
    const int dtype = b->dtype ? b->dtype : MOE_BF16;
    const int rows_dtype = b->rows_dtype ? b->rows_dtype : dtype;
    moe_ep_dispatch_prepared dispatch;
    moe_ep_combine_prepared combine;
    d.num_tokens = left < b->max_tokens ? left : b->max_tokens;
    d.x = moei_ep_layer_at(d.x, at, d.x_stride, b->hidden, dtype);
    d.ids = (const int32_t*)moei_ep_layer_at(d.ids, at, 0, b->top_k, MOE_FP32);
    d.weights = (const float*)moei_ep_layer_at(d.weights, at, 0, b->top_k, MOE_FP32);
    c.dispatch = &d;
    c.weights = d.weights;
    c.residual = moei_ep_layer_at(c.residual, at, c.residual_stride, b->hidden, dtype);
    c.shared = moei_ep_layer_at(c.shared, at, c.shared_stride, b->hidden, rows_dtype);
    c.shared_weight = (const float*)moei_ep_layer_at(c.shared_weight, at, 0, 1, MOE_FP32);
    c.y = (void*)moei_ep_layer_at(c.y, at, c.y_stride, b->hidden, dtype);
    MOE_TRY(moe_ep_dispatch_prepare(&d, &dispatch));
    MOE_TRY(moe_ep_combine_prepare(&c, &combine));
    MOE_TRY(moe_ep_dispatch_run(&dispatch, stream));
    MOE_TRY(moei_layer_run_part(&p->home, MOE_LAYER_UP, 0, stream));
    MOE_TRY(moei_layer_run_part(&p->home, MOE_LAYER_DOWN, 0, stream));
    return moe_ep_combine_run(&combine, stream);
}

/* Fills in *p, which is empty; refuses a layer whose rows are still to be counted. */
MOE_HOST moe_status moei_ep_layer_prepare_counted(const moe_ep_layer_desc* desc,
                                                  moe_ep_layer_prepared* p)
{
    MOE_REQUIRE(!desc->count_rows || desc->num_rows, MOE_ERR_CONFLICT, count_rows);
    return moei_ep_layer_prepare(desc, p);
}

/* Prepares a layer: moe_ep_layer_run queues it any number of times. Errors: a status for each field
   that is not as documented; count_rows (MOE_ERR_CONFLICT): the rows are not counted yet. T = 0 is
   no error. */
MOE_HOST moe_status moe_ep_layer_prepare(const moe_ep_layer_desc* desc, moe_ep_layer_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_ep_layer_prepare_counted(desc, p));
}

/* Queues one part. cleared: the experts' counters of tiles are 0. */
MOE_HOST moe_status moei_ep_layer_run_part(const moe_ep_layer_prepared* p, int part, int cleared,
                                           cudaStream_t stream)
{
    const moe_layer_prepared* h = &p->home;
    switch (part) {
    case MOE_EP_LAYER_ROUTER: return moei_layer_run_part(h, MOE_LAYER_ROUTER, cleared, stream);
    case MOE_EP_LAYER_GATE: return moei_layer_run_part(h, MOE_LAYER_GATE, cleared, stream);
    case MOE_EP_LAYER_SEND: return moe_ep_dispatch_run_part(&p->dispatch, MOE_EP_SEND, stream);
    case MOE_EP_LAYER_SHARED_UP:
        return moei_layer_run_part(h, MOE_LAYER_SHARED_UP, cleared, stream);
    case MOE_EP_LAYER_SHARED_DOWN:
        return moei_layer_run_part(h, MOE_LAYER_SHARED_DOWN, cleared, stream);
    case MOE_EP_LAYER_ROUTE: return moe_ep_dispatch_run_part(&p->dispatch, MOE_EP_ROUTE, stream);
    case MOE_EP_LAYER_RECEIVE:
        return moe_ep_dispatch_run_part(&p->dispatch, MOE_EP_RECEIVE, stream);
    case MOE_EP_LAYER_ANSWER: return moe_ep_dispatch_run_part(&p->dispatch, MOE_EP_ANSWER, stream);
    case MOE_EP_LAYER_UP: return moei_layer_run_part(h, MOE_LAYER_UP, cleared, stream);
    case MOE_EP_LAYER_DOWN: return moei_layer_run_part(h, MOE_LAYER_DOWN, cleared, stream);
    case MOE_EP_LAYER_COMBINE: return moe_ep_combine_run(&p->combine, stream);
    default: return MOE_STATUS(MOE_ERR_OPTION, part);
    }
}

/* Queues one part of a prepared layer on `stream`; `part` is a moe_ep_layer_part. For timing, or
   for work of the caller's between two parts. All parts in order give what moe_ep_layer_run gives;
   none of send, route, receive and combine is queued alone. Errors: microbatch_tokens
   (MOE_ERR_CONFLICT): a layer of several micro-batches has no parts. */
MOE_HOST moe_status moe_ep_layer_run_part(const moe_ep_layer_prepared* p, int part,
                                          cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_REQUIRE(p->num_microbatches <= 1, MOE_ERR_CONFLICT, microbatch_tokens);
    return moei_ep_layer_run_part(p, part, 0, stream);
}

/* Queues a prepared layer on `stream`. */
MOE_HOST moe_status moe_ep_layer_run(const moe_ep_layer_prepared* p, cudaStream_t stream)
{
    const moe_layer_prepared* h;
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    h = &p->home;
    if (moei_experts_count(&h->experts) || (h->has_shared && moei_experts_count(&h->shared)))
        MOE_TRY_CUDA(cudaMemsetAsync(h->experts.workspace, 0, 2 * MOE_EXPERTS_WORKSPACE, stream));
    MOE_TRY(moei_ep_layer_run_part(p, MOE_EP_LAYER_ROUTER, 1, stream));
    MOE_TRY(moei_ep_layer_run_part(p, MOE_EP_LAYER_GATE, 1, stream));
    if (h->has_shared) { /* the shared expert while the tokens travel */
        for (int part = MOE_EP_LAYER_SEND; part <= MOE_EP_LAYER_ANSWER; ++part)
            MOE_TRY(moei_ep_layer_run_part(p, part, 1, stream));
    } else {
        MOE_TRY(moe_ep_dispatch_run(&p->dispatch, stream));
    }
    for (int part = MOE_EP_LAYER_UP; part < MOE_EP_LAYER_PARTS; ++part)
        MOE_TRY(moei_ep_layer_run_part(p, part, 1, stream));
    for (int batch = 1; batch < p->num_microbatches; ++batch)
        MOE_TRY(moei_ep_layer_run_microbatch(p, batch, stream));
    return MOE_OK;
}

/* Is a part of the half that moe_ep_layer_finish queues? The shared expert is: its rows are in the
   workspace. */
MOE_HOST int moei_ep_layer_in_finish(int part)
{
    return part >= MOE_EP_LAYER_UP || part == MOE_EP_LAYER_SHARED_UP ||
           part == MOE_EP_LAYER_SHARED_DOWN;
}

/* Queues the parts of one half. */
MOE_HOST moe_status moei_ep_layer_run_half(const moe_ep_layer_desc* desc, int finish,
                                           cudaStream_t stream)
{
    moe_ep_layer_prepared p;
    memset(&p, 0, sizeof p);
    MOE_TRY(moei_ep_layer_prepare(desc, &p));
    for (int part = 0; part < MOE_EP_LAYER_PARTS; ++part)
        if (moei_ep_layer_in_finish(part) == finish)
            MOE_TRY(moei_ep_layer_run_part(&p, part, 0, stream));
    return MOE_OK;
}

/* With count_rows, the first half of a forward: queues router, gate and dispatch; num_rows and pre
   are 0. The workspace serves this half alone: the second one may have another. */
MOE_HOST moe_status moe_ep_layer_begin(const moe_ep_layer_desc* desc, cudaStream_t stream)
{
    MOE_REQUIRE(desc, MOE_ERR_NULL, desc);
    MOE_REQUIRE(desc->count_rows && !desc->num_rows, MOE_ERR_CONFLICT, count_rows);
    return moei_ep_layer_run_half(desc, 0, stream);
}

/* Synchronises `stream` and writes the rows of this rank's experts, padding included, to *num_rows:
   1 or more, also where there are none. Not for graphs. */
MOE_HOST moe_status moe_ep_layer_count(const moe_ep_layer_desc* desc, cudaStream_t stream,
                                       int64_t* num_rows)
{
    moei_ep_layer e;
    int32_t rows = 0;
    uint64_t fault = 0;
    MOE_REQUIRE(desc && num_rows, MOE_ERR_NULL, desc);
    *num_rows = 1;
    MOE_REQUIRE(desc->count_rows && !desc->num_rows, MOE_ERR_CONFLICT, count_rows);
    MOE_REQUIRE(desc->layer.saved, MOE_ERR_NULL, saved);
    MOE_TRY(moei_ep_layer_resolve(desc, 0, &e));
    MOE_TRY_CUDA(cudaMemcpyAsync(&fault, desc->layer.fault, 8, cudaMemcpyDeviceToHost, stream));
    MOE_TRY_CUDA(cudaMemcpyAsync(&rows, e.ep.expert_offset + e.ep.num_local, 4,
                                 cudaMemcpyDeviceToHost, stream));
    MOE_TRY_CUDA(cudaStreamSynchronize(stream));
    if (!MOEI_FAULT_STOPS(fault) && e.ep.num_local && rows > 1) *num_rows = rows;
    return MOE_OK;
}

/* With count_rows, the second half of a forward: queues experts and combine; num_rows and pre are
   set, and the workspace has what moe_ep_layer_workspace asks for with them. Where ranks share a GPU
   nothing may synchronise it (cudaFree does) between the first and the last rank's call. */
MOE_HOST moe_status moe_ep_layer_finish(const moe_ep_layer_desc* desc, cudaStream_t stream)
{
    MOE_REQUIRE(desc, MOE_ERR_NULL, desc);
    MOE_REQUIRE(desc->count_rows && desc->num_rows, MOE_ERR_CONFLICT, count_rows);
    return moei_ep_layer_run_half(desc, 1, stream);
}

/* Prepares and runs. Where a field is refused, nothing is queued and y is untouched. */
MOE_HOST moe_status moe_ep_layer_forward(const moe_ep_layer_desc* desc, cudaStream_t stream)
{
    moe_ep_layer_prepared p;
    MOE_TRY(moe_ep_layer_prepare(desc, &p));
    return moe_ep_layer_run(&p, stream);
}

/* Loads every kernel of this translation unit that such a layer may run. */
MOE_HOST moe_status moe_ep_layer_preload(void)
{
    MOE_TRY(moe_layer_preload());
    MOE_TRY(moe_ep_dispatch_preload());
    return moe_ep_combine_preload();
}

#endif
