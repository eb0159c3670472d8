/* combine.cuh: brings the experts' rows of each token home and sums them.

     y[t, :] = residual[t, :] + sum over k of weights[t, k] row(t, k)[:] + shared_weight[t] shared[t, :]

   row(t, k) is the row of token t's slot k, on the rank that has the slot's expert. Two forms
   (buffers.form, for the whole exchange):

   MOE_EP_REDUCED, rank-deduplicated
     1. Each rank sums its own experts' rows of each token it received, weighted, and stores the sum
        in `partial` of the token's home: one row a token and rank.
     2. Barrier.
     3. The home adds the partial sums of all ranks in ascending rank.
     Partial sums are rounded to rows_dtype. Equal inputs give equal bits for a given W. Across W
     results differ by these roundings: at most W + 1 of them.
   MOE_EP_GATHERED, all-to-all through the pointer table
     1. Barrier: all ranks have their rows.
     2. combine.cuh, with the ranks' rows as its buffers: each token reads its rows from all ranks.
     No staging. The sums are those of combine.cuh on one GPU: the same bits for every W where the
     experts' rows have the same bits (batch_invariant).

   In:   the dispatch's descriptor and buffers, rows [max_rows, H] (gathered: in the region)
   Out:  y [T, H] of this rank's tokens
   weights null: a sum without gate weights, for the gradient of x.

   Bytes that leave each GPU: reduced: one row for each received token of another rank; gathered: one
   row for each slot of other ranks' tokens. Memory traffic: the experts' rows are read once; reduced:
   each partial sum is written and read once.
   Cost: reduced: 3 launches; gathered: 2. Waits in one warp. Minimum architecture: sm_75.

     moe_ep_combine_desc c = {0};
     c.dispatch = &d;  c.rows = rows;  c.weights = weights;  c.y = y;
     moe_status s = moe_ep_combine(&c, stream);

   Source: SonicMoE's rank-deduplicated combine and its all-to-all combine; here with one combine
   kernel for one GPU and for many. */
#ifndef MOE_EP_COMBINE_CUH
#define MOE_EP_COMBINE_CUH

#include "../combine.cuh"
#include "dispatch.cuh"

/* The argument of the reducing kernels. */
typedef struct moei_ep_reduce_args {
    moe_peers_args peers;
    moe_combine_args sum;  /* over a sender's received tokens; place, weights: those of all senders */
    const int32_t* count;  /* [W] tokens of each sender */
    uint64_t partial;      /* offset in every region */
    int32_t recv_tokens;   /* C */
    int32_t channel, tag;  /* of the combine */
} moei_ep_reduce_args;

/* Reduces received tokens, one a block at a time. Neighbouring blocks have tokens of different
   senders: those of other ranks are bound by the link, this rank's own ones by memory. */
#define MOEI_EP_REDUCE(name, dtype)                                                                \
    MOE_KERNEL(MOEI_COMBINE_THREADS, MOEI_COMBINE_BLOCKS)                                          \
    moei_ep_reduce_##name(MOE_ARG(moei_ep_reduce_args) a)                                          \
    {                                                                                              \
        MOE_SHARED(moei_ep_reduce_shared, s);                                                      \
        MOE_SHARED_DYNAMIC(source); /* [moe_combine_sources] */                                    \
        moei_ep_reduce_body(&a, &s, (moe_combine_source*)source, dtype);                           \
    }

typedef struct moei_ep_reduce_shared {
    moe_combine_shared combine;
    int last;
} moei_ep_reduce_shared;

MOE_DEVICE_BODY void moei_ep_reduce_body(const moei_ep_reduce_args* a, moei_ep_reduce_shared* s,
                                         moe_combine_source* source, const int dtype)
{
    const unsigned num_ranks = (unsigned)a->peers.num_ranks;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (!moe_fault_stopped(a->peers.fault)) {
        const int from = moe_peer_rotated(&a->peers, (int)(blockIdx.x % num_ranks));
        const int n = a->count[from];
        const int64_t first = (int64_t)from * a->recv_tokens * a->sum.top_k;
        moe_combine_args d = a->sum;
        d.place += first;
        if (d.weights) d.weights += first;
        d.y = moe_peer_address(&a->peers, from, a->partial) +
              (int64_t)a->peers.rank * a->recv_tokens * d.y_pitch;
        for (int j = (int)(blockIdx.x / num_ranks); j < n; j += (int)(gridDim.x / num_ranks)) {
            moe_combine_token(&d, j, &s->combine, source, dtype);
            __syncthreads(); /* source is read */
        }
    }
    moei_ep_finish(&a->peers, a->channel, &s->last);
}

MOEI_COMBINE_LIST(MOEI_EP_REDUCE)
#undef MOEI_EP_REDUCE

/* Reduced: waits for the partial sums of all ranks. Gathered: tells all ranks that this one's rows
   are there, and waits for theirs. */
MOE_KERNEL(32, 1) moei_ep_meet(MOE_ARG(moei_ep_reduce_args) a)
{
    moe_pdl_trigger();
    moe_pdl_wait();
    if (!a.count) moe_peer_arrive(&a.peers, a.channel);
    (void)moe_peer_barrier_wait(&a.peers, a.channel, MOE_PHASE_COMBINE, a.tag);
}

/* A prepared combine: all but its stream, for the device that was current. */
typedef struct moe_ep_combine_prepared {
    moei_ep_reduce_args args;
    moe_launch reduce, meet;
    moe_combine_prepared combine;
} moe_ep_combine_prepared;

/* Prepares the reduction of what this rank's experts made. */
MOE_HOST moe_status moei_ep_prepare_reduce(const moe_ep_dispatch_desc* d, const moe_ep_view* v,
                                           const moe_ep_combine_desc* c, moe_ep_combine_prepared* p)
{
    const moe_ep_buffers* b = &d->buffers;
    moei_ep_reduce_args* a = &p->args;
    moe_combine_desc sum;
    moe_combine_prepared as_one; /* for its threads */
    moe_launch_config g;
    moe_device device;
    int64_t most, blocks = (int64_t)a->peers.num_ranks * b->recv_tokens;
    memset(&sum, 0, sizeof sum);
    sum.rows = c->rows;
    sum.num_rows = v->num_rows;
    sum.place = v->recv_place;
    sum.weights = c->weights ? v->recv_weights : 0;
    sum.y = v->partial;
    sum.rows_dtype = b->rows_dtype;
    sum.fault = d->fault;
    sum.rank = a->peers.rank;
    sum.num_tokens = a->peers.num_ranks * b->recv_tokens;
    sum.hidden = b->hidden;
    sum.top_k = b->top_k;
    if (sum.num_rows == 0) { /* no rank sends anything */
        sum.rows = v->partial;
        sum.num_tokens = 0;
    }
    MOE_TRY(moe_combine_prepare(&sum, &as_one));
    a->sum = as_one.args;
    a->count = v->recv_count;
    MOE_TRY(moe_device_query(&device));
    most = (int64_t)device.sms * MOEI_COMBINE_BLOCKS;
    if (blocks > most) blocks = most / a->peers.num_ranks * a->peers.num_ranks;
    if (blocks < a->peers.num_ranks) blocks = a->peers.num_ranks;
    g = moe_grid(blocks, as_one.launch.block[0] ? (int)as_one.launch.block[0] : 32,
                 as_one.launch.smem, 0);
    g.dependent = 1;
#define MOEI_EP_REDUCE_CASE(name, dtype)                                                           \
    if (b->rows_dtype == dtype) return MOE_PREPARE(&p->reduce, moei_ep_reduce_##name, g);
    MOEI_COMBINE_LIST(MOEI_EP_REDUCE_CASE)
#undef MOEI_EP_REDUCE_CASE
    return MOE_STATUS(MOE_ERR_DTYPE, rows_dtype);
}

/* Fills in *p, which is empty. */
MOE_HOST moe_status moei_ep_combine_prepare(const moe_ep_combine_desc* c,
                                            moe_ep_combine_prepared* p)
{
    moe_ep_dispatch_desc d;
    moei_ep_args dispatch;
    moe_ep_view v;
    moe_combine_desc home;
    moe_launch_config g = moe_grid(1, 32, 0, 0);
    MOE_REQUIRE(c->dispatch, MOE_ERR_NULL, dispatch);
    MOE_REQUIRE(c->tag >= 0 && c->tag < 1 << 24, MOE_ERR_RANGE, tag);
    d = *c->dispatch;
    MOE_TRY(moei_ep_resolve(&d, &dispatch, &v));
    p->args.peers = dispatch.peers;
    p->args.partial = dispatch.at.partial;
    p->args.recv_tokens = d.buffers.recv_tokens;
    p->args.channel = d.buffers.channel + 1;
    p->args.tag = c->tag;
    memset(&home, 0, sizeof home);
    if (d.buffers.form == MOE_EP_REDUCED) {
        MOE_REQUIRE(c->rows || v.num_rows == 0, MOE_ERR_NULL, rows);
        MOE_TRY(moei_ep_prepare_reduce(&d, &v, c, p));
        home.rows = v.partial;
        home.place = v.send_place;
        home.top_k = d.peers->num_ranks;
        home.num_rows = (int64_t)d.peers->num_ranks * d.buffers.recv_tokens;
    } else {
        MOE_REQUIRE(!c->rows, MOE_ERR_CONFLICT, rows);
        home.table = (const void* const*)v.rows_table;
        home.num_buffers = d.peers->num_ranks;
        home.place = v.place;
        home.weights = c->weights;
        home.top_k = d.buffers.top_k;
        home.num_rows = d.buffers.max_rows;
    }
    home.residual = c->residual;
    home.residual_stride = c->residual_stride;
    home.shared = c->shared;
    home.shared_stride = c->shared_stride;
    home.shared_weight = c->shared_weight;
    home.rows_dtype = d.buffers.rows_dtype;
    home.y_dtype = d.buffers.dtype;
    home.y = c->y;
    home.y_stride = c->y_stride;
    home.fault = d.fault;
    home.rank = d.peers->rank;
    home.num_tokens = d.num_tokens;
    home.hidden = d.buffers.hidden;
    g.dependent = 1;
    MOE_TRY(MOE_PREPARE(&p->meet, moei_ep_meet, g));
    return moe_combine_prepare(&home, &p->combine);
}

/* Prepares a combine, which moe_ep_combine_run queues any number of times. Errors: a status for each
   field that is not as documented, those of the dispatch included. */
MOE_HOST moe_status moe_ep_combine_prepare(const moe_ep_combine_desc* desc,
                                           moe_ep_combine_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_ep_combine_prepare(desc, p));
}

/* Queues a prepared combine on `stream`. */
MOE_HOST moe_status moe_ep_combine_run(const moe_ep_combine_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(MOE_RUN(&p->reduce, p->args, stream));
    MOE_TRY(MOE_RUN(&p->meet, p->args, stream));
    return moe_combine_run(&p->combine, stream);
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_ep_combine(const moe_ep_combine_desc* desc, cudaStream_t stream)
{
    moe_ep_combine_prepared p;
    MOE_TRY(moe_ep_combine_prepare(desc, &p));
    return moe_ep_combine_run(&p, stream);
}

/* Loads this header's kernels, and combine's, now rather than at their first launch. */
MOE_HOST moe_status moe_ep_combine_preload(void)
{
#define MOEI_EP_REDUCE_LOAD(name, dtype)                                                           \
    MOE_TRY(moe_preload_kernel((const void*)moei_ep_reduce_##name));
    MOEI_COMBINE_LIST(MOEI_EP_REDUCE_LOAD)
#undef MOEI_EP_REDUCE_LOAD
    MOE_TRY(moe_preload_kernel((const void*)moei_ep_meet));
    return moe_combine_preload();
}

MOEI_PRELOAD_INCLUDED(ep_combine)

#endif
