/* layer_backward.cuh: gradients of the MoE layer over several GPUs (layer.cuh), from dy, the gradient
   of a loss by y, to dx and the gradients of all weights. The formulas are those of
   ../layer_backward.cuh, and so are its outputs and options (`grads`).

     rows of dy to the ranks of their experts    dispatch.cuh, with the forward's row maps
     dpre, act, dw2, dw1, biases, rows           experts_backward.cuh, this rank's P experts
     dweights of each slot to its token's home   weight_grads.cuh
     dlogits, drouter, the shared expert         at home
     drouter = sum over all ranks                all_reduce.cuh; local_router: this rank's part
     dx = router's and shared parts + the sum of a token's rows    combine.cuh, without weights

   In:   dy [T, H] of this rank's tokens; the descriptor of the forward, with layer.saved
   Out:  dx [T, H], dlogits [T, E], dweights [T, K] of this rank's tokens; dw1 [P, 2I, H],
         dw2 [P, H, I] and biases of its experts: over the tokens of all ranks; drouter [E, H],
         the same on all ranks
   Gradients of the shared expert are of this rank's tokens: add them up over ranks, as those of any
   weights that all ranks have; so are those of replicas (moe_ep_dispatch_desc.replica), each of its
   own tokens. balance_grad: from sums of usage over all ranks (all_reduce.cuh), which
   moe_balance_loss takes.

   What stays between the passes (moe_ep_layer_saved lists it): x of this rank's tokens; in
   layer.saved the pre-activations, routing tables and row maps; and recv_x, in the region. With
   redispatch_x the rows of x are not kept: backward dispatches x again, beside its first products
   where a side stream is given (on copy engines with MOE_EP_ALL_GATHER_COPY). Then one set of
   buffers serves the forwards of all layers; otherwise each layer has its own (region_offset; they
   may share channels).
   The buffers of gradients, another set and two arrays behind it, serve all layers. gradient_offset
   is past the forward's buffers of all layers, where each layer has its own.
   With overlap dx travels while dw2 and dw1 are computed: rows come first, then their combine on the
   side stream, and the products of weights beside it.
   With count_rows (layer.cuh) pre and this workspace have room for the rows that came, in place of
   max_rows: one host wait a forward.

   Region: that of the forward, and from gradient_offset on: the buffers of desc.h; max_tokens K 4
   for dweights; unless local_router 2 E H 4 for drouter; each rounded up to 256.
   Workspace: that of ../layer_backward.cuh, its rows those received, without dweights. With
   MOE_EP_GATHERED [R, H] rows is in the region, and the router's part stands alone. E H 4 unless
   local_router; with redispatch_x 128 W 4; with overlap the router's part, and R H 2 unless
   MOE_EP_ALL_TO_ALL.

   Numerics: those of ../layer_backward.cuh. With rows in fp8 (gradient_wire, wire_dtype) none of the
   equalities of bits below hold but the last. dx is rounded as y is in the forward: MOE_EP_GATHERED
   with batch_invariant gives the same bits for every W; the other forms round each rank's sum to
   rows_dtype. dw1, dw2 and biases have the bits of one GPU that has the tokens of all ranks in
   ascending order of ranks, where the same tiles are chosen. drouter: fp32 sums of each rank, added
   in ascending order, rounded once. Equal inputs give equal bits.

   All ranks call it alike, in the same order as other exchanges of the same buffers, with the same
   options. Each of dx and drouter is asked for on all ranks or on none. T and P may be 0; without
   tokens dx, dlogits and dweights may be null whatever other ranks ask for.
   Ends with a barrier of all ranks where drouter is summed. A stop fault of any rank before that
   barrier reaches the fault words of all ranks, and drouter stays as it was on all of them. An
   optimizer that reads its own word then leaves the parameters of all ranks alone. The other outputs
   may be written in part. A wait that ends at the last moment of its budget may stop one rank alone.
   No call allocates or synchronises. A graph of forward and backward can be replayed with other
   inputs.
   Cost: that of ../layer_backward.cuh; the launches of a dispatch without row maps (with
   redispatch_x of two), of a combine, and 5 more.
   Minimum architecture: sm_80 (bf16), sm_75 (fp16).

     moe_ep_layer_backward_desc b = {0};
     b.forward = e;                                        // as for moe_ep_layer_forward
     moe_ep_layer_backward_region(&b, W, &region_bytes);   // before the group exists: sizes alone
     moe_ep_layer_saved(&e, &kept);  e.layer.saved = ...;  e.layer.saved_bytes = kept.bytes;
     moe_ep_layer_workspace(&e, &forward);
     moe_ep_layer_backward_workspace(&b, &backward);
     e.layer.workspace = ...;  e.layer.workspace_bytes = ...;  // the larger one, for both passes
     moe_status s = moe_ep_layer_forward(&e, stream);
     b.forward = e;  b.grads.dy = dy;  b.grads.dx = dx;  b.grads.drouter = drouter;
     b.grads.dw1.base = dw1;  b.grads.dw2.base = dw2;
     s = moe_ep_layer_backward(&b, stream);

   Source of the method: SonicMoE's expert parallelism, which keeps x or its rows and the
   pre-activations alone. */
#ifndef MOE_EP_LAYER_BACKWARD_CUH
#define MOE_EP_LAYER_BACKWARD_CUH

#include "../layer_backward.cuh"
#include "all_reduce.cuh"
#include "barrier.cuh"
#include "layer.cuh"
#include "weight_grads.cuh"

#define MOEI_EP_OVERLAP_BLOCKS 24

/* Where the buffers of gradients are, in every region. */
typedef struct moei_ep_gradient_layout {
    moe_ep_buffers buffers; /* of rows of dy and of dx */
    uint64_t dweights, reduce, end;
    int32_t channel; /* of dweights and of drouter */
} moei_ep_gradient_layout;

/* A descriptor that is being resolved. */
typedef struct moei_ep_layer_backward {
    moei_ep_layer e; /* the forward's, its workspace apart */
    moei_ep_gradient_layout at;
    moe_layer_backward_desc home; /* grads, with the forward's layer */
    moei_layer_backward b;
    moe_ep_dispatch_desc dy, x;
    moe_ep_combine_desc combine;
    moe_ep_view view; /* of dy's dispatch */
    float* drouter;   /* [E, H] this rank's part; null: not summed */
    int32_t* chunk_count;
} moei_ep_layer_backward;

/* Describes the all-reduce of drouter, but for the arrays' addresses. */
MOE_HOST void moei_ep_describe_drouter(const moe_ep_layer_backward_desc* d,
                                       const moei_ep_gradient_layout* at, moe_ep_all_reduce_desc* r)
{
    const moe_layer_desc* f = &d->forward.layer;
    memset(r, 0, sizeof *r);
    if (!d->local_router) r->array[0].count = (int64_t)f->num_experts * f->hidden;
    r->array[0].to_dtype = d->grads.router_grad_dtype ? d->grads.router_grad_dtype
                           : f->router_dtype          ? f->router_dtype
                           : f->dtype                 ? f->dtype
                                                      : MOE_BF16;
    r->array[0].accumulate = d->grads.accumulate;
    r->peers = d->forward.peers;
    r->fault = f->fault;
    r->region_offset = at->reduce;
    r->channel = at->channel;
    r->tag = d->forward.tag;
}

/* Lays the buffers of gradients out. */
MOE_HOST moe_status moei_ep_gradient_lay_out(const moe_ep_layer_backward_desc* d, int num_ranks,
                                             moei_ep_gradient_layout* at)
{
    moe_ep_all_reduce_desc r;
    uint64_t bytes, reduce, first; /* bytes: end of the forward's buffers; first: their begin */
    moe_ep_buffers* b = &at->buffers;
    memset(at, 0, sizeof *at);
    MOE_REQUIRE((d->local_router | 1) == 1, MOE_ERR_OPTION, local_router);
    MOE_REQUIRE(d->gradient_offset % 256 == 0, MOE_ERR_RANGE, gradient_offset);
    MOE_REQUIRE(d->gradient_wire == 0 || d->gradient_wire == MOE_EP_WIRE_FP8, MOE_ERR_DTYPE,
                gradient_wire);
    MOE_TRY(moei_ep_layer_buffers(&d->forward, b));
    MOE_TRY(moe_ep_buffers_end(b, num_ranks, &bytes));
    b->wire_dtype = d->gradient_wire;
    MOE_REQUIRE(d->gradient_channel >= 0 &&
                    (d->gradient_channel == 0 || d->gradient_channel > b->channel + 1 ||
                     d->gradient_channel + 2 < b->channel),
                MOE_ERR_RANGE, gradient_channel);
    b->channel = d->gradient_channel ? d->gradient_channel : b->channel + 2;
    MOE_REQUIRE(b->channel + 2 < MOE_PEERS_CHANNELS, MOE_ERR_RANGE, gradient_channel);
    first = b->region_offset ? b->region_offset : MOE_PEERS_HEADER;
    b->region_offset = d->gradient_offset ? d->gradient_offset : bytes;
    MOE_REQUIRE(b->region_offset >= MOE_PEERS_HEADER, MOE_ERR_RANGE, gradient_offset);
    MOE_TRY(moe_ep_buffers_end(b, num_ranks, &at->end));
    at->channel = b->channel + 2;
    at->dweights = moei_ep_take(&at->end, (uint64_t)b->max_tokens * (uint64_t)b->top_k * 4);
    at->reduce = (at->end + 255) / 256 * 256;
    moei_ep_describe_drouter(d, at, &r);
    MOE_TRY(moe_ep_all_reduce_bytes(&r, &reduce));
    at->end = at->reduce + reduce;
    MOE_REQUIRE(b->region_offset >= bytes || at->end <= first, MOE_ERR_OVERLAP, gradient_offset);
    return MOE_OK;
}

/* Writes the bytes that every rank's region must have for both passes to *bytes; reads sizes and
   options. forward.peers may be null. Errors: theirs; num_ranks. */
MOE_HOST moe_status moe_ep_layer_backward_region(const moe_ep_layer_backward_desc* desc,
                                                 int num_ranks, uint64_t* bytes)
{
    moei_ep_gradient_layout at;
    uint64_t forward;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    MOE_TRY(moe_ep_layer_region(&desc->forward, num_ranks, &forward));
    MOE_TRY(moei_ep_gradient_lay_out(desc, num_ranks, &at));
    *bytes = forward > at.end ? forward : at.end;
    return MOE_OK;
}

/* Sets where the experts have their rows: x where the forward received it, dy in the buffers of
   gradients. */
MOE_HOST void moei_ep_backward_rows(const moe_ep_layer_backward_desc* d, moei_ep_layer_backward* w)
{
    moei_layer_backward_rows* r = &w->b.rows;
    const moe_ep_view* ep = &w->e.ep;
    r->x = ep->recv_x;
    r->dy = w->view.recv_x;
    r->weights = ep->in_order ? w->e.v.row_weight : w->view.recv_weights;
    r->row_weight = w->e.v.row_weight;
    r->expert_offset = ep->expert_offset;
    r->row_slot = ep->in_order ? 0 : ep->row_slot;
    r->num_tokens = (int32_t)ep->num_x;
    r->rows = w->view.rows; /* gathered */
    r->sums_drouter = d->grads.drouter && !d->local_router;
    r->rows_first = d->overlap;
}

/* Fills in the exchanges' descriptors, but for dx's rows. */
MOE_HOST void moei_ep_backward_exchanges(const moe_ep_layer_backward_desc* d,
                                         moei_ep_layer_backward* w)
{
    w->x = w->e.dispatch; /* the same rows as in the forward */
    w->x.counters = 0;
    w->x.row_weight = 0;
    w->dy = w->e.dispatch;
    w->dy.row_weight = 0;
    w->dy.x = d->grads.dy;
    w->dy.x_stride = d->grads.dy_stride;
    w->dy.buffers = w->at.buffers;
    memset(&w->combine, 0, sizeof w->combine);
    w->combine.dispatch = &w->dy;
    w->combine.y = w->home.dx;
    w->combine.y_stride = d->grads.dx_stride;
    w->combine.tag = d->forward.tag;
    if (!d->overlap) return;
    w->x.max_blocks = d->overlap_blocks ? d->overlap_blocks : MOEI_EP_OVERLAP_BLOCKS;
    w->combine.max_blocks = d->overlap_blocks; /* few are slow: each waits for memory */
}

/* Fills in *w, all but the check of buffers. base: the workspace, or null to count its bytes. */
MOE_HOST moe_status moei_ep_layer_backward_resolve(const moe_ep_layer_backward_desc* d, char* base,
                                                   moei_ep_layer_backward* w)
{
    const moe_ep_layer_desc* f = &d->forward;
    moei_ep_args args;
    size_t bytes;
    memset(w, 0, sizeof *w);
    MOE_REQUIRE(moei_all_zero(&d->grads.layer, sizeof d->grads.layer), MOE_ERR_CONFLICT, grads);
    MOE_REQUIRE(!f->microbatch_tokens, MOE_ERR_CONFLICT, microbatch_tokens);
    MOE_REQUIRE(f->buffers.max_tokens > 0, MOE_ERR_RANGE, max_tokens);
    MOE_REQUIRE((d->overlap | 1) == 1, MOE_ERR_OPTION, overlap);
    MOE_REQUIRE(!d->overlap || f->side_stream, MOE_ERR_NULL, side_stream);
    MOE_REQUIRE(!d->overlap || (f->side_event[0] && f->side_event[1]), MOE_ERR_NULL, side_event);
    MOE_REQUIRE(d->overlap || !d->overlap_blocks, MOE_ERR_CONFLICT, overlap);
    MOE_REQUIRE(d->overlap_blocks >= 0 && d->overlap_blocks <= MOEI_EP_MAX_CHUNKS, MOE_ERR_RANGE,
                overlap_blocks);
    MOE_TRY(moei_ep_layer_resolve(f, 0, &w->e));
    MOE_TRY(moei_ep_gradient_lay_out(d, f->peers->num_ranks, &w->at));
    MOE_REQUIRE(w->at.end <= f->peers->bytes, MOE_ERR_RANGE, region_bytes);
    w->home = d->grads;
    w->home.layer = f->layer;
    w->home.layer.route.row_multiple = 0;
    w->home.layer.rank = f->peers->rank;
    if (f->layer.num_tokens == 0 && !w->home.dx) w->home.dx = f->peers->base; /* not accessed */
    /* before the dispatch's own check: names dy_stride, not x_stride */
    MOE_TRY(moei_layer_backward_check_options(&w->home, &w->e.o));
    moei_ep_backward_exchanges(d, w);
    memset(&args, 0, sizeof args);
    MOE_TRY(moei_ep_check_options(&w->dy, &args));
    MOE_TRY(moei_ep_carve(&w->dy, &args, (char*)w->dy.workspace, &w->view, &bytes));
    w->b.o = w->e.o;
    moei_ep_backward_rows(d, w);
    MOE_TRY(moei_layer_backward_fill(&w->home, base, &w->b));
    moei_ep_layer_receives(&w->e.ep, &w->b.l.experts);
    w->b.saved.bytes = w->e.saved.bytes;
    if (w->b.rows.sums_drouter)
        w->drouter = (float*)moei_carve(
            base, &w->b.bytes, (uint64_t)f->layer.num_experts * (uint64_t)f->layer.hidden * 4);
    if (f->redispatch_x)
        w->chunk_count = (int32_t*)moei_carve(
            base, &w->b.bytes, MOEI_EP_MAX_CHUNKS * (uint64_t)f->peers->num_ranks * 4);
    if (w->drouter) w->b.router.drouter = w->drouter;
    /* the gate reads what peers have stored in the region */
    w->b.w.dweights = (float*)(f->peers->base + w->at.dweights);
    if (w->at.buffers.combine_form != MOE_EP_GATHERED) w->combine.rows = w->b.w.rows;
    if (d->grads.dx_accumulate || w->b.has_router || w->b.o.has_shared) {
        w->combine.residual = w->home.dx;
        w->combine.residual_stride = d->grads.dx_stride;
    }
    return MOE_OK;
}

/* Writes the bytes of workspace of this backward pass to *bytes. Reads sizes, options, peers, fault,
   and which outputs, logits, ids and replicas are given. Errors: theirs. */
MOE_HOST moe_status moe_ep_layer_backward_workspace(const moe_ep_layer_backward_desc* desc,
                                                    size_t* bytes)
{
    moei_ep_layer_backward w;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    *bytes = 0;
    MOE_TRY(moei_ep_layer_backward_resolve(desc, 0, &w));
    *bytes = w.b.bytes;
    return MOE_OK;
}

/* A prepared backward pass: all but its stream, for the device that was current. */
typedef struct moe_ep_layer_backward_prepared {
    moe_layer_backward_prepared home; /* its combine is empty */
    moe_ep_dispatch_prepared dy, x;
    moe_ep_combine_prepared combine;
    moe_ep_all_reduce_prepared reduce;
    moei_ep_weight_grads_prepared grads;
    moe_peers peers;
    moe_peers_desc barrier;
    int32_t combine_channel;
    void* dweights; /* in the region, cleared first */
    size_t dweights_bytes;
    void *side_stream, *side_event[2];
    int32_t redispatches, beside; /* beside: x travels on the side stream as a whole */
    int32_t overlaps;             /* the combine runs on the side stream */
    int32_t has_drouter;
} moe_ep_layer_backward_prepared;

/* Prepares what brings gradients of gate weights home. Requires p->home. */
MOE_HOST moe_status moei_ep_backward_prepare_grads(const moe_ep_layer_backward_desc* d,
                                                   const moei_ep_layer_backward* w,
                                                   moe_ep_layer_backward_prepared* p)
{
    moei_ep_weight_grads_args* a = &p->grads.args;
    MOE_TRY(moei_peers_resolve(d->forward.peers, d->forward.layer.fault, &a->peers));
    a->sum = p->home.experts.dweights; /* empty where this rank has no rows */
    a->sum.top_k = d->forward.layer.top_k;
    a->row_slot = w->e.ep.row_slot;
    a->recv_token = w->view.recv_token;
    a->at = w->at.dweights;
    a->dweights = d->grads.dweights;
    a->num_slots = (int64_t)d->forward.layer.num_tokens * d->forward.layer.top_k;
    a->num_local = w->e.o.num_rows ? w->e.ep.num_local : 0;
    a->recv_tokens =
        w->at.buffers.recv_tokens ? w->at.buffers.recv_tokens : w->at.buffers.max_tokens;
    a->max_tokens = w->at.buffers.max_tokens;
    a->in_order = w->e.ep.in_order;
    a->channel = w->at.channel;
    a->tag = d->forward.tag;
    return moei_ep_weight_grads_prepare(&p->grads);
}

/* Prepares the second dispatch of x. It leaves what the dispatch of dy writes in the row maps alone,
   for the two may run at the same time. */
MOE_HOST moe_status moei_ep_backward_prepare_x(const moei_ep_layer_backward* w,
                                               moe_ep_layer_backward_prepared* p)
{
    MOE_TRY(moe_ep_dispatch_prepare(&w->x, &p->x));
    p->x.args.send_place = 0;
    p->x.args.rows_table = 0;
    if (p->x.args.chunk_count) p->x.args.chunk_count = w->chunk_count;
    p->redispatches = 1;
    p->beside = w->x.side_stream && p->x.args.dispatch_form != MOE_EP_ALL_GATHER_COPY;
    if (!p->beside) return MOE_OK;
    MOE_REQUIRE(w->x.side_event[0] && w->x.side_event[1], MOE_ERR_NULL, side_event);
    /* two exchanges at a time: as where ranks share a GPU, none starts before its waits are over */
    p->x.args.peers.shared = 1;
    p->x.decode.dependent = 0;
    return MOE_OK;
}

/* Fills in *p, which is empty. */
MOE_HOST moe_status moei_ep_layer_backward_prepare(const moe_ep_layer_backward_desc* d,
                                                   moe_ep_layer_backward_prepared* p)
{
    moei_ep_layer_backward w;
    const moe_layer_desc* f = &d->forward.layer;
    MOE_TRY(moei_ep_layer_backward_resolve(d, (char*)f->workspace, &w));
    MOE_REQUIRE(!d->forward.count_rows || d->forward.num_rows, MOE_ERR_CONFLICT, count_rows);
    MOE_TRY(moei_ep_layer_check_pre(&d->forward, w.b.bytes, w.e.saved.bytes));
    MOE_TRY(moei_layer_backward_prepare_stages(
        &w.home, &w.b, w.e.ep.num_local > 0 && w.e.o.num_rows > 0, &p->home));
    MOE_TRY(moe_ep_dispatch_prepare(&w.dy, &p->dy));
    p->side_stream = w.x.side_stream;
    p->side_event[0] = w.x.side_event[0], p->side_event[1] = w.x.side_event[1];
    p->overlaps = d->overlap;
    if (d->forward.redispatch_x) MOE_TRY(moei_ep_backward_prepare_x(&w, p));
    if (p->home.has_dx) MOE_TRY(moe_ep_combine_prepare(&w.combine, &p->combine));
    MOE_TRY(moei_ep_backward_prepare_grads(d, &w, p));
    p->dweights = w.b.w.dweights;
    p->dweights_bytes = (size_t)f->num_tokens * (size_t)f->top_k * 4;
    p->has_drouter = w.drouter != 0;
    if (p->has_drouter) {
        moe_ep_all_reduce_desc r;
        moei_ep_describe_drouter(d, &w.at, &r);
        r.array[0].from = w.drouter;
        r.array[0].to = d->grads.drouter;
        MOE_TRY(moe_ep_all_reduce_prepare(&r, &p->reduce));
    }
    p->peers = *d->forward.peers;
    p->barrier.fault = f->fault;
    p->combine_channel = w.at.buffers.channel + 1; /* the gradients' own one is the next */
    p->barrier.tag = d->forward.tag;
    return MOE_OK;
}

/* Prepares a backward pass, which moe_ep_layer_backward_run queues any number of times. Errors: a
   status for each field that is not as documented; region_bytes: the region is too small. */
MOE_HOST moe_status moe_ep_layer_backward_prepare(const moe_ep_layer_backward_desc* desc,
                                                  moe_ep_layer_backward_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_ep_layer_backward_prepare(desc, p));
}

/* Lets the side stream wait for what `stream` has so far. */
MOE_HOST moe_status moei_ep_backward_fork(const moe_ep_layer_backward_prepared* p,
                                          cudaStream_t stream)
{
    MOE_TRY_CUDA(cudaEventRecord((cudaEvent_t)p->side_event[0], stream));
    return moe_cuda_status(
        cudaStreamWaitEvent((cudaStream_t)p->side_stream, (cudaEvent_t)p->side_event[0], 0));
}

/* Queues the second dispatch of x: on the side stream, or its first half on `stream`. */
MOE_HOST moe_status moei_ep_backward_send_x(const moe_ep_layer_backward_prepared* p,
                                            cudaStream_t stream)
{
    cudaStream_t side = (cudaStream_t)p->side_stream;
    if (!p->redispatches) return MOE_OK;
    if (!p->beside) return moe_ep_dispatch_run_part(&p->x, MOE_EP_SEND, stream);
    MOE_TRY(moei_ep_backward_fork(p, stream));
    MOE_TRY(moe_ep_dispatch_run_part(&p->x, MOE_EP_SEND, side));
    MOE_TRY(moe_ep_dispatch_run_part(&p->x, MOE_EP_RECEIVE, side));
    return moe_cuda_status(cudaEventRecord((cudaEvent_t)p->side_event[1], side));
}

/* Lets `stream` wait for it, once: with recompute before that, else before the rows are read. */
MOE_HOST moe_status moei_ep_backward_receive_x(const moe_ep_layer_backward_prepared* p,
                                               int recomputes, cudaStream_t stream)
{
    if (!p->redispatches || recomputes != p->home.recomputes) return MOE_OK;
    if (!p->beside) return moe_ep_dispatch_run_part(&p->x, MOE_EP_RECEIVE, stream);
    return moe_cuda_status(cudaStreamWaitEvent(stream, (cudaEvent_t)p->side_event[1], 0));
}

/* Queues stages first .. last of the home's pass. */
MOE_HOST moe_status moei_ep_backward_home(const moe_ep_layer_backward_prepared* p, int first,
                                          int last, cudaStream_t stream)
{
    for (int stage = first; stage <= last; ++stage)
        MOE_TRY(moe_layer_backward_run_stage(&p->home, stage, stream));
    return MOE_OK;
}

/* Queues a barrier: the next dispatch may not come before all ranks have read this one's rows. */
MOE_HOST moe_status moei_ep_backward_meet(const moe_ep_layer_backward_prepared* p, int channel,
                                          cudaStream_t stream)
{
    moe_peers_desc barrier = p->barrier;
    barrier.peers = &p->peers;
    barrier.channel = channel;
    return moe_peers_barrier(&barrier, stream);
}

/* Queues one stage of a prepared backward pass on `stream`; `stage` is a
   moe_ep_layer_backward_stage. For timing, or for work of the caller's between two stages. All
   stages in order give what moe_ep_layer_backward_run gives, without overlap; no other order is
   allowed. */
MOE_HOST moe_status moe_ep_layer_backward_run_stage(const moe_ep_layer_backward_prepared* p,
                                                    int stage, cudaStream_t stream)
{
    const moe_layer_backward_prepared* h;
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    h = &p->home;
    switch (stage) {
    case MOE_EP_BACKWARD_SEND_X: return moei_ep_backward_send_x(p, stream);
    case MOE_EP_BACKWARD_SEND_DY:
        if (p->dweights_bytes) /* before peers can see this rank's arrival */
            MOE_TRY_CUDA(cudaMemsetAsync(p->dweights, 0, p->dweights_bytes, stream));
        return moe_ep_dispatch_run_part(&p->dy, MOE_EP_SEND, stream);
    case MOE_EP_BACKWARD_SHARED:
        if (h->has_shared && h->recomputes)
            MOE_TRY(moe_grouped_gemm_run(&h->shared_recompute.up, stream));
        return moei_ep_backward_home(p, MOE_LAYER_BACKWARD_SHARED_PRE,
                                     MOE_LAYER_BACKWARD_SHARED_DWEIGHT, stream);
    case MOE_EP_BACKWARD_RECEIVE:
        MOE_TRY(moe_ep_dispatch_run_part(&p->dy, MOE_EP_RECEIVE, stream));
        return moe_ep_dispatch_run_part(&p->dy, MOE_EP_ANSWER, stream);
    case MOE_EP_BACKWARD_RECOMPUTE:
        MOE_TRY(moei_ep_backward_receive_x(p, 1, stream));
        return h->recomputes ? moe_grouped_gemm_run(&h->recompute.up, stream) : MOE_OK;
    case MOE_EP_BACKWARD_SEND_DWEIGHTS: return MOE_RUN(&p->grads.send, p->grads.args, stream);
    case MOE_EP_BACKWARD_RECEIVE_DWEIGHTS:
        MOE_TRY(MOE_RUN(&p->grads.wait, p->grads.args, stream));
        return MOE_RUN(&p->grads.copy, p->grads.args, stream);
    case MOE_EP_BACKWARD_SHARED_DX:
        return moei_ep_backward_home(p, MOE_LAYER_BACKWARD_SHARED_DW1,
                                     MOE_LAYER_BACKWARD_SHARED_ROWS, stream);
    case MOE_EP_BACKWARD_RECEIVE_X: return moei_ep_backward_receive_x(p, 0, stream);
    case MOE_EP_BACKWARD_COMBINE: /* without dx a barrier in its place */
        if (!h->has_dx) return moei_ep_backward_meet(p, p->combine_channel, stream);
        return moe_ep_combine_run(&p->combine, stream);
    case MOE_EP_BACKWARD_DROUTER:
        return p->has_drouter ? moe_ep_all_reduce_run(&p->reduce, stream) : MOE_OK;
#define MOEI_EP_BACKWARD_HOME(name)                                                                \
    case MOE_EP_BACKWARD_##name:                                                                   \
        return moe_layer_backward_run_stage(h, MOE_LAYER_BACKWARD_##name, stream);
        MOEI_EP_BACKWARD_HOME(GATHER_DY)
        MOEI_EP_BACKWARD_HOME(PRE)
        MOEI_EP_BACKWARD_HOME(DW2)
        MOEI_EP_BACKWARD_HOME(DBIAS2)
        MOEI_EP_BACKWARD_HOME(GATE)
        MOEI_EP_BACKWARD_HOME(ROUTER)
        MOEI_EP_BACKWARD_HOME(GATHER_X)
        MOEI_EP_BACKWARD_HOME(DW1)
        MOEI_EP_BACKWARD_HOME(DBIAS1)
        MOEI_EP_BACKWARD_HOME(ROWS)
#undef MOEI_EP_BACKWARD_HOME
    default: return MOE_STATUS(MOE_ERR_OPTION, stage);
    }
}

/* Queues the pass with overlap: rows and dx before dw2 and dw1, the combine on the side stream. */
MOE_HOST moe_status moei_ep_backward_run_overlapped(const moe_ep_layer_backward_prepared* p,
                                                    cudaStream_t stream)
{
    static const unsigned char before[] = {
        MOE_EP_BACKWARD_SEND_DY,   MOE_EP_BACKWARD_SHARED,
        MOE_EP_BACKWARD_RECEIVE,   MOE_EP_BACKWARD_SEND_X,
        MOE_EP_BACKWARD_RECOMPUTE, MOE_EP_BACKWARD_GATHER_DY,
        MOE_EP_BACKWARD_PRE,       MOE_EP_BACKWARD_SEND_DWEIGHTS,
        MOE_EP_BACKWARD_ROWS,      MOE_EP_BACKWARD_RECEIVE_DWEIGHTS,
        MOE_EP_BACKWARD_GATE,      MOE_EP_BACKWARD_ROUTER,
        MOE_EP_BACKWARD_SHARED_DX, MOE_EP_BACKWARD_RECEIVE_X};
    static const unsigned char beside[] = {MOE_EP_BACKWARD_DW2, MOE_EP_BACKWARD_DBIAS2,
                                           MOE_EP_BACKWARD_GATHER_X, MOE_EP_BACKWARD_DW1,
                                           MOE_EP_BACKWARD_DBIAS1};
    for (size_t i = 0; i < sizeof before; ++i)
        MOE_TRY(moe_ep_layer_backward_run_stage(p, before[i], stream));
    MOE_TRY(moei_ep_backward_fork(p, stream));
    MOE_TRY(
        moe_ep_layer_backward_run_stage(p, MOE_EP_BACKWARD_COMBINE, (cudaStream_t)p->side_stream));
    MOE_TRY_CUDA(cudaEventRecord((cudaEvent_t)p->side_event[1], (cudaStream_t)p->side_stream));
    for (size_t i = 0; i < sizeof beside; ++i)
        MOE_TRY(moe_ep_layer_backward_run_stage(p, beside[i], stream));
    MOE_TRY_CUDA(cudaStreamWaitEvent(stream, (cudaEvent_t)p->side_event[1], 0));
    /* the combine's barrier did not wait for the products that read received rows: this one does */
    if (!p->has_drouter) return moei_ep_backward_meet(p, p->combine_channel + 1, stream);
    return moe_ep_layer_backward_run_stage(p, MOE_EP_BACKWARD_DROUTER, stream);
}

/* Queues a prepared backward pass on `stream`. Refuses a null p. */
MOE_HOST moe_status moe_ep_layer_backward_run(const moe_ep_layer_backward_prepared* p,
                                              cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    if (p->overlaps) return moei_ep_backward_run_overlapped(p, stream);
    for (int stage = 0; stage < MOE_EP_BACKWARD_STAGES; ++stage)
        MOE_TRY(moe_ep_layer_backward_run_stage(p, stage, stream));
    return MOE_OK;
}

/* Prepares and runs. Where a field is refused, nothing is queued and no output is written. */
MOE_HOST moe_status moe_ep_layer_backward(const moe_ep_layer_backward_desc* desc,
                                          cudaStream_t stream)
{
    moe_ep_layer_backward_prepared p;
    MOE_TRY(moe_ep_layer_backward_prepare(desc, &p));
    return moe_ep_layer_backward_run(&p, stream);
}

/* Loads every kernel of this translation unit that a backward pass may run, the forward's included. */
MOE_HOST moe_status moe_ep_layer_backward_preload(void)
{
    MOE_TRY(moe_ep_layer_preload());
    MOE_TRY(moe_layer_backward_preload());
    MOE_TRY(moe_ep_all_reduce_preload());
    MOE_TRY(moe_peers_preload());
    MOE_TRY(moe_preload_kernel((const void*)moei_ep_weight_grads));
    MOE_TRY(moe_preload_kernel((const void*)moei_ep_weight_grads_bias));
    MOE_TRY(moe_preload_kernel((const void*)moei_ep_weight_grads_wait));
    return moe_preload_kernel((const void*)moei_ep_weight_grads_copy);
}

MOEI_PRELOAD_INCLUDED(ep_layer_backward)

#endif
