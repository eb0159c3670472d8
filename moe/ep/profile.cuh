/* profile.cuh: times every dispatch and every combine of a layer on the group, shape and routing at
   hand, and picks the fastest.

     moe_ep_choice choice;
     moe_ep_profile_rank me = {0};
     me.layer = &layer;  me.device = device;  me.stream = stream;   // the whole descriptor
     moe_ep_profile_desc d = {0};
     d.rank = &me;  d.num_mine = 1;  d.allgather = gather;  d.context = ...;   // as for a group
     moe_status s = moe_ep_profile(&d, &choice);    // on all ranks; the same choice on all
     moe_ep_choice_apply(&choice, &layer.buffers);  // then prepare the layer

   What it measures, each in a CUDA graph of several calls with a barrier of all ranks before each
   call; the slowest rank counts:
     dispatch_ms  the dispatch with its row maps
     up_ms        the experts' first product behind it: rows in order are faster than gathered ones
     combine_ms   the combine
   The dispatch with the least dispatch_ms + up_ms wins, and the combine with the least combine_ms.
   Rates need layer.counters, which it clears and uses.

   A form is left out where some rank's workspace or the region is too small for it, and
   MOE_EP_ALL_GATHER_COPY where layer.side_stream is null. moe_ep_profile_region and
   moe_ep_profile_workspace return bytes that suffice for all.

   The streams are not the default stream, which cannot be captured. Preload the kernels first
   (moe_preload): under lazy loading a first launch may wait for kernels that wait for it.

   Runs the layer: y is written. Allocates nothing but events and graphs, which it destroys again;
   synchronises the streams. About a second. Minimum architecture: sm_75. */
#ifndef MOE_EP_PROFILE_CUH
#define MOE_EP_PROFILE_CUH

#include "barrier.cuh"
#include "layer.cuh"
#include "profile.h"

/* One rank of this process. */
typedef struct moe_ep_profile_rank {
    const moe_ep_layer_desc* layer; /* its forms are not read */
    cudaStream_t stream;
    int32_t device; /* of the stream */
    /* scratch of the call */
    moe_ep_layer_prepared prepared;
    cudaEvent_t event[2];
    cudaGraphExec_t graph;
} moe_ep_profile_rank;

/* What moe_ep_profile takes. */
typedef struct moe_ep_profile_desc {
    moe_ep_profile_rank* rank;     /* [num_mine] in rank order */
    moe_peers_allgather allgather; /* null: all ranks are in this process */
    void* context;                 /* of allgather */
    int32_t num_mine;              /* W without allgather, else 1 */
    int32_t channel;               /* of its barriers; 0 = the layer's channel + 2 */
} moe_ep_profile_desc;

#define MOEI_EP_PROFILE_MS 30.0 /* of one timed graph, about */
#define MOEI_EP_PROFILE_CALLS 20
#define MOEI_EP_PROFILE_GRAPHS 3 /* timed; the median counts */

/* What one call is. */
enum { MOEI_EP_PROFILE_DISPATCH, MOEI_EP_PROFILE_UP, MOEI_EP_PROFILE_COMBINE };

/* Returns the layer of a rank with these forms. */
MOE_HOST moe_ep_layer_desc moei_ep_profile_layer(const moe_ep_layer_desc* layer, int dispatch_form,
                                                 int combine_form)
{
    moe_ep_layer_desc d = *layer;
    d.buffers.dispatch_form = dispatch_form;
    d.buffers.combine_form = combine_form;
    return d;
}

/* Writes the bytes of a region that has room for every form to *bytes; as moe_ep_layer_region. */
MOE_HOST moe_status moe_ep_profile_region(const moe_ep_layer_desc* layer, int num_ranks,
                                          uint64_t* bytes)
{
    MOE_REQUIRE(layer && bytes, MOE_ERR_NULL, desc);
    *bytes = 0;
    for (int f = 1; f < MOE_EP_DISPATCH_FORMS; ++f)
        for (int c = 1; c < MOE_EP_COMBINE_FORMS; ++c) {
            const moe_ep_layer_desc d = moei_ep_profile_layer(layer, f, c);
            uint64_t one;
            MOE_TRY(moe_ep_layer_region(&d, num_ranks, &one));
            if (one > *bytes) *bytes = one;
        }
    return MOE_OK;
}

/* Writes the bytes of workspace that suffice for every form to *bytes; as moe_ep_layer_workspace.
   */
MOE_HOST moe_status moe_ep_profile_workspace(const moe_ep_layer_desc* layer, size_t* bytes)
{
    MOE_REQUIRE(layer && bytes, MOE_ERR_NULL, desc);
    *bytes = 0;
    for (int f = 1; f < MOE_EP_ALL_GATHER_COPY; ++f) /* the next one needs what all-gather needs */
        for (int c = 1; c < MOE_EP_COMBINE_FORMS; ++c) {
            const moe_ep_layer_desc d = moei_ep_profile_layer(layer, f, c);
            size_t one;
            MOE_TRY(moe_ep_layer_workspace(&d, &one));
            if (one > *bytes) *bytes = one;
        }
    return MOE_OK;
}

/* Replaces *v by its largest value of all ranks. s: what this rank has met so far. A rank that fails
   comes here too: no other one waits for it in vain. Errors: s; peers (MOE_ERR_CONFLICT): another
   rank has failed. */
MOE_HOST moe_status moei_ep_profile_max(const moe_ep_profile_desc* d, moe_status s, double* v)
{
    const double own[2] = {*v, s == MOE_OK ? 0.0 : 1.0};
    double all[MOE_PEERS_MAX_RANKS][2];
    int failed = 0;
    if (!d->allgather) return s;
    if (d->allgather(d->context, own, all, sizeof own))
        return s != MOE_OK ? s : MOE_STATUS(MOE_ERR_DEVICE, allgather);
    for (int r = 0; r < d->rank[0].layer->peers->num_ranks; ++r) {
        if (all[r][0] > *v) *v = all[r][0];
        failed |= all[r][1] != 0;
    }
    return s == MOE_OK && failed ? MOE_STATUS(MOE_ERR_CONFLICT, peers) : s;
}

/* Waits for the ranks of this process, and agrees on s as moei_ep_profile_max. Errors: fault
   (MOE_ERR_CONFLICT), the same on all ranks, where a rank's fault word is set; those of CUDA. */
MOE_HOST moe_status moei_ep_profile_wait(const moe_ep_profile_desc* d, moe_status s)
{
    double worst = 0;
    for (int i = 0; i < d->num_mine; ++i) {
        uint64_t word = 0;
        cudaError_t e = cudaSetDevice(d->rank[i].device);
        if (e == cudaSuccess) e = cudaStreamSynchronize(d->rank[i].stream);
        if (e == cudaSuccess)
            e = cudaMemcpy(&word, d->rank[i].layer->layer.fault, 8, cudaMemcpyDeviceToHost);
        if (word) worst = 1;
        if (s == MOE_OK) s = moe_cuda_status(e);
    }
    s = moei_ep_profile_max(d, s, &worst);
    MOE_REQUIRE(worst == 0, MOE_ERR_CONFLICT, fault);
    return s;
}

/* Prepares all ranks for two forms. *fits: 0 where some rank has no room for them. Errors: those of
   the layer; peers (MOE_ERR_CONFLICT): another rank's layer was refused. */
MOE_HOST moe_status moei_ep_profile_prepare(const moe_ep_profile_desc* d, int dispatch_form,
                                            int combine_form, int* fits)
{
    double worst = 0; /* 1: no room */
    moe_status refused = MOE_OK;
    for (int i = 0; i < d->num_mine; ++i) {
        moe_ep_profile_rank* r = d->rank + i;
        const moe_ep_layer_desc layer =
            moei_ep_profile_layer(r->layer, dispatch_form, combine_form);
        moe_status s = moe_cuda_status(cudaSetDevice(r->device));
        if (s == MOE_OK) s = moe_ep_layer_prepare(&layer, &r->prepared);
        if (s == MOE_OK && moei_ep_to_all(&r->prepared.dispatch.args) &&
            r->prepared.dispatch.args.num_tokens > r->prepared.dispatch.args.recv_tokens)
            s = MOE_STATUS(MOE_ERR_RANGE, region_bytes); /* every token would need room */
        if (s == MOE_OK) continue;
        if (s == MOE_STATUS(MOE_ERR_NULL, side_stream) ||
            s == MOE_STATUS(MOE_ERR_WORKSPACE, workspace_bytes) ||
            s == MOE_STATUS(MOE_ERR_RANGE, region_bytes)) {
            worst = 1;
        } else {
            refused = s;
        }
    }
    refused = moei_ep_profile_max(d, refused, &worst);
    *fits = worst == 0;
    return refused;
}

/* Queues the prepared layer on the ranks of this process, with counters of zeros. */
MOE_HOST moe_status moei_ep_profile_layers(const moe_ep_profile_desc* d)
{
    for (int i = 0; i < d->num_mine; ++i) {
        moe_ep_profile_rank* r = d->rank + i;
        MOE_TRY_CUDA(cudaSetDevice(r->device));
        if (r->layer->counters)
            MOE_TRY_CUDA(
                cudaMemsetAsync(r->layer->counters, 0, sizeof *r->layer->counters, r->stream));
        MOE_TRY(moe_ep_layer_run(&r->prepared, r->stream));
    }
    return MOE_OK;
}

/* Reads what the busiest rank of this process has sent; as moei_ep_profile_once. */
MOE_HOST moe_status moei_ep_profile_bytes(const moe_ep_profile_desc* d, double* bytes)
{
    for (int i = 0; i < d->num_mine; ++i) {
        moe_ep_counters c;
        if (!d->rank[i].layer->counters) continue;
        MOE_TRY_CUDA(cudaSetDevice(d->rank[i].device));
        MOE_TRY_CUDA(cudaMemcpy(&c, d->rank[i].layer->counters, sizeof c, cudaMemcpyDeviceToHost));
        if (!c.calls) continue;
        c.sent_bytes /= c.calls, c.return_bytes /= c.calls; /* of one micro-batch */
        if ((double)c.sent_bytes > bytes[0]) bytes[0] = (double)c.sent_bytes;
        if ((double)c.return_bytes > bytes[1]) bytes[1] = (double)c.return_bytes;
    }
    return MOE_OK;
}

/* Runs the prepared layer once on all ranks, and writes the bytes that leave the busiest one in a
   dispatch and in a combine to bytes[0] and bytes[1]; 0 without counters. */
MOE_HOST moe_status moei_ep_profile_once(const moe_ep_profile_desc* d, double* bytes)
{
    bytes[0] = bytes[1] = 0;
    MOE_TRY(moei_ep_profile_wait(d, moei_ep_profile_layers(d)));
    MOE_TRY(moei_ep_profile_max(d, moei_ep_profile_bytes(d, bytes), bytes));
    return moei_ep_profile_max(d, MOE_OK, bytes + 1);
}

/* Queues a barrier of rank number i. */
MOE_HOST moe_status moei_ep_profile_barrier(const moe_ep_profile_desc* d, int i)
{
    const moe_ep_layer_desc* layer = d->rank[i].layer;
    moe_peers_desc b;
    memset(&b, 0, sizeof b);
    b.peers = layer->peers;
    b.fault = layer->layer.fault;
    b.channel = d->channel ? d->channel : layer->buffers.channel + 2;
    b.tag = layer->tag;
    return moe_peers_barrier(&b, d->rank[i].stream);
}

/* Queues one call of rank number i, behind a barrier. */
MOE_HOST moe_status moei_ep_profile_call(const moe_ep_profile_desc* d, int i, int what)
{
    const moe_ep_profile_rank* r = d->rank + i;
    MOE_TRY(moei_ep_profile_barrier(d, i));
    if (what == MOEI_EP_PROFILE_COMBINE) return moe_ep_combine_run(&r->prepared.combine, r->stream);
    MOE_TRY(moe_ep_dispatch_run(&r->prepared.dispatch, r->stream));
    if (what == MOEI_EP_PROFILE_DISPATCH) return MOE_OK;
    return moei_ep_layer_run_part(&r->prepared, MOE_EP_LAYER_UP, 0, r->stream);
}

/* Makes a graph of `calls` calls for rank number i. */
MOE_HOST moe_status moei_ep_profile_capture(const moe_ep_profile_desc* d, int i, int what,
                                            int calls)
{
    moe_ep_profile_rank* r = d->rank + i;
    cudaGraph_t graph = 0;
    cudaError_t e;
    moe_status s = MOE_OK;
    MOE_TRY_CUDA(cudaSetDevice(r->device));
    MOE_TRY_CUDA(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
    for (int n = 0; n < calls && s == MOE_OK; ++n) s = moei_ep_profile_call(d, i, what);
    e = cudaStreamEndCapture(r->stream, &graph);
    if (s == MOE_OK && e == cudaSuccess) e = cudaGraphInstantiate(&r->graph, graph, 0);
    if (graph) (void)cudaGraphDestroy(graph);
    return s != MOE_OK ? s : moe_cuda_status(e);
}

/* Destroys the graphs of this process. */
MOE_HOST void moei_ep_profile_drop(const moe_ep_profile_desc* d)
{
    for (int i = 0; i < d->num_mine; ++i) {
        if (d->rank[i].graph) (void)cudaGraphExecDestroy(d->rank[i].graph);
        d->rank[i].graph = 0;
    }
}

/* Launches the graphs of this process, each behind a barrier and between two events. */
MOE_HOST moe_status moei_ep_profile_launch(const moe_ep_profile_desc* d)
{
    for (int i = 0; i < d->num_mine; ++i) {
        moe_ep_profile_rank* r = d->rank + i;
        MOE_TRY_CUDA(cudaSetDevice(r->device));
        MOE_TRY(moei_ep_profile_barrier(d, i));
        MOE_TRY_CUDA(cudaEventRecord(r->event[0], r->stream));
        MOE_TRY_CUDA(cudaGraphLaunch(r->graph, r->stream));
        MOE_TRY_CUDA(cudaEventRecord(r->event[1], r->stream));
    }
    return MOE_OK;
}

/* Writes the milliseconds of a launch of all ranks' graphs to *ms: of the slowest rank. s: of their
   capture; nothing is launched where that failed. */
MOE_HOST moe_status moei_ep_profile_graphs(const moe_ep_profile_desc* d, moe_status s, double* ms)
{
    *ms = 0;
    MOE_TRY(moei_ep_profile_max(d, s, ms)); /* a rank without a graph comes to no barrier */
    MOE_TRY(moei_ep_profile_wait(d, moei_ep_profile_launch(d)));
    for (int i = 0; i < d->num_mine && s == MOE_OK; ++i) {
        float one = 0;
        s = moe_cuda_status(cudaEventElapsedTime(&one, d->rank[i].event[0], d->rank[i].event[1]));
        if (one > *ms) *ms = one;
    }
    return moei_ep_profile_max(d, s, ms);
}

/* Writes the milliseconds of one call to *ms. */
MOE_HOST moe_status moei_ep_profile_time(const moe_ep_profile_desc* d, int what, double* ms)
{
    double t[MOEI_EP_PROFILE_GRAPHS];
    int calls = 1;
    for (int pass = 0; pass < 2; ++pass) { /* the first finds how many calls fill the time */
        moe_status s = MOE_OK;
        for (int i = 0; i < d->num_mine && s == MOE_OK; ++i)
            s = moei_ep_profile_capture(d, i, what, calls);
        for (int n = 0; n < (pass ? MOEI_EP_PROFILE_GRAPHS : 1); ++n) {
            int at = n;
            double one;
            MOE_TRY(moei_ep_profile_graphs(d, s, &one));
            for (; at > 0 && t[at - 1] > one; --at) t[at] = t[at - 1]; /* sorted */
            t[at] = one;
        }
        moei_ep_profile_drop(d);
        if (pass) break;
        calls = t[0] * MOEI_EP_PROFILE_CALLS > MOEI_EP_PROFILE_MS ? (int)(MOEI_EP_PROFILE_MS / t[0])
                                                                  : MOEI_EP_PROFILE_CALLS;
        if (calls < 1) calls = 1;
    }
    *ms = t[MOEI_EP_PROFILE_GRAPHS / 2] / calls;
    return MOE_OK;
}

/* Times all forms; the ranks have events. */
MOE_HOST moe_status moei_ep_profile_forms(const moe_ep_profile_desc* d, moe_ep_choice* c)
{
    double bytes[2], both, best = 0;
    int fits, first = MOE_EP_REDUCED; /* a combine that goes with every dispatch */
    for (int f = MOE_EP_REDUCED; f < MOE_EP_COMBINE_FORMS; ++f) {
        MOE_TRY(moei_ep_profile_prepare(d, MOE_EP_DEDUPLICATED, f, &fits));
        if (!fits) continue;
        MOE_TRY(moei_ep_profile_once(d, bytes));
        MOE_TRY(moei_ep_profile_time(d, MOEI_EP_PROFILE_COMBINE, &c->combine_ms[f]));
        c->combine_rate[f] = bytes[1] / c->combine_ms[f] * 1e-6;
        if (!c->combine_form || c->combine_ms[f] < c->combine_ms[c->combine_form])
            c->combine_form = f;
    }
    if (c->combine_form) first = c->combine_form;
    for (int f = MOE_EP_DEDUPLICATED; f < MOE_EP_DISPATCH_FORMS; ++f) {
        MOE_TRY(moei_ep_profile_prepare(d, f, first, &fits));
        if (!fits) continue;
        MOE_TRY(moei_ep_profile_once(d, bytes));
        MOE_TRY(moei_ep_profile_time(d, MOEI_EP_PROFILE_DISPATCH, &c->dispatch_ms[f]));
        MOE_TRY(moei_ep_profile_time(d, MOEI_EP_PROFILE_UP, &both));
        c->up_ms[f] = both > c->dispatch_ms[f] ? both - c->dispatch_ms[f] : 0;
        c->dispatch_rate[f] = bytes[0] / c->dispatch_ms[f] * 1e-6;
        if (!c->dispatch_form || both < best) best = both, c->dispatch_form = f;
    }
    MOE_REQUIRE(c->dispatch_form && c->combine_form, MOE_ERR_RANGE, region_bytes);
    return MOE_OK;
}

/* Measures, and fills in *choice; on all ranks. Errors: those of the layer; num_mine; channel;
   region_bytes (MOE_ERR_RANGE): no form has room; fault (MOE_ERR_CONFLICT): a rank met a fault;
   peers (MOE_ERR_CONFLICT): another rank was refused something, or failed; allgather
   (MOE_ERR_DEVICE). *choice is zeros then. All ranks return together, but for null pointers and
   num_mine, with which a rank returns at once. The current device stays. */
MOE_HOST moe_status moe_ep_profile(const moe_ep_profile_desc* desc, moe_ep_choice* choice)
{
    const moe_ep_layer_desc* layer;
    moe_status s = MOE_OK;
    double begins = 0;
    int current = 0;
    MOE_REQUIRE(desc && choice && desc->rank, MOE_ERR_NULL, desc);
    memset(choice, 0, sizeof *choice);
    MOE_REQUIRE(desc->num_mine >= 1, MOE_ERR_RANGE, num_mine);
    for (int i = 0; i < desc->num_mine; ++i) {
        layer = desc->rank[i].layer;
        MOE_REQUIRE(layer, MOE_ERR_NULL, desc);
        MOE_REQUIRE(layer->peers, MOE_ERR_NULL, peers);
        MOE_REQUIRE(layer->layer.fault, MOE_ERR_NULL, fault);
        MOE_REQUIRE(desc->num_mine == (desc->allgather ? 1 : layer->peers->num_ranks),
                    MOE_ERR_RANGE, num_mine);
        desc->rank[i].graph = 0;
        desc->rank[i].event[0] = desc->rank[i].event[1] = 0;
    }
    layer = desc->rank[0].layer;
    choice->num_ranks = layer->peers->num_ranks;
    choice->max_tokens = layer->buffers.max_tokens;
    choice->hidden = layer->layer.hidden;
    choice->num_experts = layer->layer.num_experts;
    choice->top_k = layer->layer.top_k;
    choice->dtype = layer->layer.dtype ? layer->layer.dtype : MOE_BF16;
    s = moe_cuda_status(cudaGetDevice(&current));
    for (int i = 0; i < desc->num_mine && s == MOE_OK; ++i) {
        s = moe_cuda_status(cudaSetDevice(desc->rank[i].device));
        for (int n = 0; n < 2 && s == MOE_OK; ++n)
            s = moe_cuda_status(cudaEventCreate(&desc->rank[i].event[n]));
    }
    s = moei_ep_profile_max(desc, s, &begins);
    if (s == MOE_OK) s = moei_ep_profile_forms(desc, choice);
    moei_ep_profile_drop(desc);
    for (int i = 0; i < desc->num_mine; ++i)
        for (int n = 0; n < 2; ++n)
            if (desc->rank[i].event[n]) (void)cudaEventDestroy(desc->rank[i].event[n]);
    MOE_TRY_CUDA(cudaSetDevice(current));
    if (s != MOE_OK) memset(choice, 0, sizeof *choice);
    return s;
}

#endif
