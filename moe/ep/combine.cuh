/* combine.cuh: brings the experts' rows of each token home and sums them.

     y[t, :] = residual[t, :] + sum over k of weights[t, k] row(t, k)[:]
                              + shared_weight[t] shared[t, :]

   row(t, k) is the row of token t's slot k, on the rank that has the slot's expert. Three forms
   (buffers.combine_form, for the whole exchange), each behind any form of dispatch:

   MOE_EP_REDUCED, rank-deduplicated
     1. Each rank sums its own experts' rows of each token it received, weighted, and stores the sum
        in `partial` of the token's home: one row a token and rank.
     2. Barrier: all sums are there.
     3. The home adds the partial sums of all ranks in ascending rank: few tokens in the launch of
        1., of which then a block for each token waits; else in its own launch, and one block of 1.
        waits.
     Partial sums are rounded to rows_dtype. Equal inputs give equal bits for a given W. Results
     for two values of W differ by these roundings: at most W + 1 of them.
   MOE_EP_REDUCE_SCATTER
     The same sums and the same bits, but each rank stores them in its own region, and the home
     reads those of all ranks (combine.cuh, with the ranks' sums as its buffers).
   MOE_EP_GATHERED, all-to-all through the pointer table
     1. Barrier: all ranks have their rows.
     2. combine.cuh, with the ranks' rows as its buffers: each token reads its rows from all ranks.
     No staging. The sums are those of combine.cuh on one GPU: the same bits for every W where the
     experts' rows have the same bits (batch_invariant).

   In:   the dispatch's descriptor and buffers, rows [max_rows, H] (gathered: in the region)
   Out:  y [T, H] of this rank's tokens
   weights null: a sum without gate weights, for the gradient of x.

   Bytes that leave each GPU: gathered: one row for each slot of other ranks' tokens; else one row
   for each received token of another rank that has a slot here. Memory traffic: the experts' rows
   are read once; but for gathered, each partial sum is written and read once.
   Cost: 2 launches; 1, but for gathered, where a rank has the GPU for itself and no more tokens
   than half of the thread blocks that the GPU holds at a time (132 tokens on an H200). Minimum
   architecture: sm_75.

     moe_ep_combine_desc c = {0};
     c.dispatch = &d;  c.rows = rows;  c.weights = weights;  c.y = y;
     moe_status s = moe_ep_combine(&c, stream);

   Source: SonicMoE's rank-deduplicated combine and its all-to-all combine; here with one combine
   kernel for one GPU and for many. */
#ifndef MOE_EP_COMBINE_CUH
#define MOE_EP_COMBINE_CUH

#include "../combine.cuh"
#include "counters.cuh"
#include "dispatch.cuh"

#define MOEI_EP_REDUCE_THREADS 512
#define MOEI_EP_REDUCE_WARPS (MOEI_EP_REDUCE_THREADS / MOE_WARP_SIZE)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
#define MOEI_EP_REDUCE_RESIDENT 2 /* thread blocks a multiprocessor: 64 registers a thread */
#else
#define MOEI_EP_REDUCE_RESIDENT 1 /* elsewhere these do not suffice */
#endif

#ifndef MOEI_EP_FUSE_HOME
#define MOEI_EP_FUSE_HOME 1 /* 0: sums at home always in their own launch; a test may change it */
#endif

/* Shared memory of the reducing kernels. */
typedef struct moei_ep_reduce_shared {
    moe_combine_shared home;
    int token; /* that this block adds at home; none where it is not 0 .. T - 1 */
} moei_ep_reduce_shared;

/* The argument of the reducing kernels. */
typedef struct moei_ep_reduce_args {
    moe_peers_args peers;
    moe_combine_args sum;  /* over received tokens; y is that of their homes */
    const int32_t* count;  /* [W] tokens of each sender */
    uint64_t partial;      /* offset in every region */
    const int32_t* ids;    /* [W C, K] where tokens without a slot here have come too; else null */
    int32_t keeps;         /* 1: sums stay in this rank's region; 0: they go to their homes */
    int32_t recv_tokens;   /* C */
    int32_t warps;         /* of a block that share a token */
    int32_t channel, tag;  /* of the combine */
    uint64_t* waited;      /* where waits are added up; or null */
    int32_t fused;         /* 1: this launch adds at home too */
    moe_combine_args home; /* fused: over this rank's tokens */
} moei_ep_reduce_args;

/* A slot as one lane has looked it up. */
typedef struct moei_ep_slot {
    moe_place place;
    float weight;
    const char* row; /* address of its row; null: none */
} moei_ep_slot;

/* Loads the place and the weight of slot k of received token t. */
MOE_DEVICE void moei_ep_load_slot(moei_ep_slot* s, const moe_combine_args* d, int64_t t, int k)
{
    const int64_t slot = t * d->top_k + k;
    s->place.buffer = -1;
    s->weight = 1.0f;
    if (k >= d->top_k) return;
    s->place.buffer = (int)moei_load4_early(&d->place[slot].buffer);
    s->place.row = (int)moei_load4_early(&d->place[slot].row);
    if (d->weights) s->weight = __uint_as_float(moei_load4_early(d->weights + slot));
}

/* Finds the row of a slot that has been loaded. */
MOE_DEVICE void moei_ep_find_row(moei_ep_slot* s, const moe_combine_args* d, int64_t t, int k)
{
    s->row = moei_combine_row_at(d, t * d->top_k + k, s->place);
}

/* Adds the rows of a warp's slots, in the order of the lanes, to acc: columns h .. of each, one
   vector. The loads of 8 rows are in flight together. One warp. */
MOE_DEVICE void moei_ep_add_rows(float* acc, const moei_ep_slot* own, int h, int hidden,
                                 const int dtype)
{
    const int width = dtype == MOE_FP32 ? 4 : 8;
    uint32_t loads = __ballot_sync(MOE_FULL_WARP, own->row != 0), adds = loads;
    while (adds) {
        uint4 raw[MOEI_COMBINE_GROUP];
        MOE_UNROLL
        for (int u = 0; u < MOEI_COMBINE_GROUP; ++u) {
            const int lane = loads ? __ffs((int)loads) - 1 : 0;
            const uint64_t at = (uint64_t)(uintptr_t)own->row;
            const uint32_t low = (uint32_t)__shfl_sync(MOE_FULL_WARP, (int)(uint32_t)at, lane);
            const uint32_t high =
                (uint32_t)__shfl_sync(MOE_FULL_WARP, (int)(uint32_t)(at >> 32), lane);
            const char* row = (const char*)(uintptr_t)((uint64_t)high << 32 | low);
            raw[u] = make_uint4(0, 0, 0, 0);
            if (loads && h < hidden) raw[u] = moei_load16(row + (int64_t)h * (16 / width));
            loads &= loads - 1;
        }
        MOE_UNROLL
        for (int u = 0; u < MOEI_COMBINE_GROUP; ++u) {
            const float w =
                __shfl_sync(MOE_FULL_WARP, own->weight, adds ? __ffs((int)adds) - 1 : 0);
            float v[8];
            moei_unpack_16(v, raw[u], dtype);
            MOE_UNROLL
            for (int i = 0; i < width; ++i) acc[i] = adds ? fmaf(w, v[i], acc[i]) : acc[i];
            adds &= adds - 1;
        }
    }
}

/* Sums the rows of received token t, weighted, and stores the columns of this warp's slices at y:
   slices of 32 vectors of 16 bytes, every `warps`-th from number `first` on. A lane has loaded a
   slot, own, and finds its row; then all lanes load a vector of each row. Rows are added in slot
   order. One warp. */
MOE_DEVICE void moei_ep_reduce_token(const moe_combine_args* d, int64_t t, moei_ep_slot own,
                                     char* y, int first, int warps, const int dtype)
{
    const int width = dtype == MOE_FP32 ? 4 : 8, span = warps * MOE_WARP_SIZE * width;
    moei_ep_find_row(&own, d, t, moe_lane());
    MOE_NO_UNROLL
    for (int h0 = first * MOE_WARP_SIZE * width; h0 < d->hidden; h0 += span) {
        const int h = h0 + moe_lane() * width;
        float acc[8];
        MOE_UNROLL
        for (int i = 0; i < width; ++i) acc[i] = 0.0f;
        MOE_NO_UNROLL
        for (int k0 = 0; k0 < d->top_k; k0 += MOE_WARP_SIZE) {
            if (d->top_k > MOE_WARP_SIZE) {
                moei_ep_load_slot(&own, d, t, k0 + moe_lane());
                moei_ep_find_row(&own, d, t, k0 + moe_lane());
            }
            moei_ep_add_rows(acc, &own, h, d->hidden, dtype);
        }
        if (h < d->hidden) moei_store_some(y + (int64_t)h * (16 / width), acc, dtype, width);
    }
}

/* Adds at home, in the launch that reduces. The last T blocks that have reduced wait for the sums
   of all ranks, and add those of a token each; the others end, which frees places for blocks that
   have not started. A block looks up its rows while it waits. All threads of every block. */
MOE_DEVICE_BODY void moei_ep_add_home(const moei_ep_reduce_args* a, moei_ep_reduce_shared* shared,
                                      moe_combine_source* source, const int dtype)
{
    const int tokens = a->home.num_tokens;
    int t, came = 1;
    if (threadIdx.x == 0)
        shared->token = (int)moei_peer_turn(&a->peers, a->channel) - (int)gridDim.x + tokens;
    __syncthreads(); /* token is written */
    t = shared->token;
    if (t < 0 || t >= tokens) return; /* past T: turns of a call that was late */
    moei_combine_look_up(&a->home, t, &shared->home, source);
    if (moe_warp() == 0)
        came = moei_peer_reach_timed(&a->peers, a->channel, moei_peer_next(&a->peers, a->channel),
                                     MOE_PHASE_COMBINE, a->tag, t == 0 ? a->waited : 0);
    if (__syncthreads_or(!came)) return;
    moei_combine_sum(&a->home, t, &shared->home, source, dtype);
    if (threadIdx.x == 0) moei_peer_leave(&a->peers, a->channel, (uint32_t)tokens);
}

/* Returns the i-th received token in the order of the reduction: those of all senders in turn. */
MOE_DEVICE int64_t moei_ep_reduced(const moei_ep_reduce_args* a, int i)
{
    const int j = i / a->peers.num_ranks;
    return (int64_t)moe_peer_rotated(&a->peers, i - j * a->peers.num_ranks) * a->recv_tokens + j;
}

/* Has received token t a slot of this rank? Its home reads no other sums. One warp. */
MOE_DEVICE int moei_ep_has_slot(const moei_ep_reduce_args* a, int64_t t)
{
    int has = !a->ids;
    MOE_NO_UNROLL
    for (int k0 = 0; k0 < a->sum.top_k && !has; k0 += MOE_WARP_SIZE) {
        const int k = k0 + moe_lane();
        has = __any_sync(MOE_FULL_WARP, k < a->sum.top_k && a->ids[t * a->sum.top_k + k] >= 0);
    }
    return has;
}

/* Returns the address of the sum of number j of the tokens that rank `from` sent. */
MOE_DEVICE char* moei_ep_sum_address(const moei_ep_reduce_args* a, int from, int j)
{
    const int holder = a->keeps ? a->peers.rank : from, sender = a->keeps ? from : a->peers.rank;
    return moe_peer_address(&a->peers, holder, a->partial) +
           ((int64_t)sender * a->recv_tokens + j) * a->sum.y_pitch;
}

/* Reduces received tokens and stores their sums, at their homes or here. A block has tokens of all
   senders in turn: sums for other ranks are bound by the link, those for this rank's own tokens by
   memory. Warps work alone. The slots of a warp's first token are loaded along with the counts. */
MOE_DEVICE_BODY void moei_ep_reduce_body(const moei_ep_reduce_args* a,
                                         moei_ep_reduce_shared* shared, moe_combine_source* source,
                                         const int dtype)
{
    const int num_ranks = a->peers.num_ranks, groups = MOEI_EP_REDUCE_WARPS / a->warps;
    const int group = moe_warp() / a->warps, first = moe_warp() - group * a->warps;
    const int waits = !a->fused && blockIdx.x == gridDim.x - 1;
    int i = group < groups ? (int)blockIdx.x * groups + group : a->sum.num_tokens;
    int most = 0; /* tokens of one sender */
    moei_ep_slot own = {{-1, -1}, 0.0f, 0};
    uint32_t n;
    bool stopped;
    moe_pdl_wait();
    n = moei_peer_next(&a->peers, a->channel);
    moei_peer_pdl_trigger(&a->peers, waits);
    if (i < a->sum.num_tokens) moei_ep_load_slot(&own, &a->sum, moei_ep_reduced(a, i), moe_lane());
    MOE_NO_UNROLL
    for (int r = moe_lane(); r < num_ranks; r += MOE_WARP_SIZE) most = max(most, a->count[r]);
    stopped = moe_fault_stopped(a->peers.fault); /* its load is in flight with those above */
    most = (int)moe_warp_max_u32((uint32_t)most);
    most = stopped ? 0 : min(most * num_ranks, a->sum.num_tokens);
    MOE_NO_UNROLL
    while (i < most) {
        const int j = i / num_ranks, from = moe_peer_rotated(&a->peers, i - j * num_ranks);
        if (j < a->count[from] && moei_ep_has_slot(a, moei_ep_reduced(a, i)))
            moei_ep_reduce_token(&a->sum, moei_ep_reduced(a, i), own,
                                 moei_ep_sum_address(a, from, j), first, a->warps, dtype);
        i += (int)gridDim.x * groups;
        if (i < most) moei_ep_load_slot(&own, &a->sum, moei_ep_reduced(a, i), moe_lane());
    }
    moei_ep_arrive(&a->peers, a->channel, n, stopped);
    if (a->fused && !stopped) moei_ep_add_home(a, shared, source, dtype);
    if (waits && moe_warp() == 0)
        (void)moei_peer_reach_pass(&a->peers, a->channel, n, MOE_PHASE_COMBINE, a->tag, a->waited);
}

/* For one dtype of rows. */
#define MOEI_EP_REDUCE(name, dtype)                                                                \
    MOE_KERNEL(MOEI_EP_REDUCE_THREADS, MOEI_EP_REDUCE_RESIDENT)                                    \
    moei_ep_reduce_##name(MOE_ARG(moei_ep_reduce_args) a)                                          \
    {                                                                                              \
        MOE_SHARED(moei_ep_reduce_shared, shared);                                                 \
        MOE_SHARED_DYNAMIC(source); /* fused: [moe_combine_sources(&a.home)] */                    \
        moei_ep_reduce_body(&a, &shared, (moe_combine_source*)source, dtype);                      \
    }
MOEI_COMBINE_LIST(MOEI_EP_REDUCE)
#undef MOEI_EP_REDUCE

/* Gathered: tells all ranks that this one's rows are there, and waits for theirs. */
MOE_KERNEL(32, 1) moei_ep_meet(MOE_ARG(moei_ep_reduce_args) a)
{
    moei_peer_pdl_trigger(&a.peers, 1);
    moe_pdl_wait();
    moe_peer_arrive(&a.peers, a.channel);
    (void)moei_peer_reach_pass(&a.peers, a.channel, moei_peer_next(&a.peers, a.channel),
                               MOE_PHASE_COMBINE, a.tag, a.waited);
}

/* A prepared combine: all but its stream, for the device that was current. */
typedef struct moe_ep_combine_prepared {
    moei_ep_reduce_args args;
    moe_launch reduce, meet;      /* one of them, by form */
    moe_combine_prepared combine; /* empty where `reduce` adds at home */
    moei_ep_args counted;         /* with counters */
    moe_launch tally;             /* likewise; argument: counted */
} moe_ep_combine_prepared;

/* Sets the grid of a prepared reduction, and whether it adds at home. max_blocks: 0: any. */
MOE_HOST moe_status moei_ep_size_reduce(moei_ep_reduce_args* a, int max_blocks, moe_launch* reduce)
{
    const int num_ranks = a->peers.num_ranks, groups = MOEI_EP_REDUCE_WARPS / a->warps;
    moe_device device;
    int resident;
    int64_t blocks = (int64_t)num_ranks * a->recv_tokens / groups + 1, places;
    MOE_TRY(moe_device_query(&device));
    MOE_TRY(moe_resident_blocks(reduce, &resident));
    places = (int64_t)device.sms * resident;
    if (max_blocks && places > max_blocks) places = max_blocks;
    if (blocks > places)
        blocks = places > num_ranks ? (places - 1) / num_ranks * num_ranks + 1 : places;
    /* half of the places: the others serve blocks of this grid and other kernels meanwhile */
    a->fused = MOEI_EP_FUSE_HOME && !a->peers.shared && a->home.num_tokens > 0 &&
               a->home.num_tokens <= places / 2;
    if (a->fused) {
        reduce->smem = (size_t)moe_combine_sources(&a->home) * sizeof(moe_combine_source);
        if (blocks < a->home.num_tokens) blocks = a->home.num_tokens;
    }
    reduce->grid[0] = (uint32_t)(blocks > 1 ? blocks : 1);
    return MOE_OK;
}

/* Prepares the reduction of what this rank's experts made, and the sums of `home`. */
MOE_HOST moe_status moei_ep_prepare_reduce(const moe_ep_dispatch_desc* d, const moe_ep_view* v,
                                           const moe_ep_combine_desc* c,
                                           const moe_combine_desc* home, moe_ep_combine_prepared* p)
{
    const moe_ep_buffers* b = &d->buffers;
    moei_ep_reduce_args* a = &p->args;
    moe_combine_desc sum;
    moe_launch_config g = moe_grid(1, MOEI_EP_REDUCE_THREADS, 0, 0);
    const int width = b->rows_dtype == MOE_FP32 ? 4 : 8;
    const int slices = (b->hidden / width + MOE_WARP_SIZE - 1) / MOE_WARP_SIZE;
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
    MOE_TRY(moe_combine_resolve(&sum, &a->sum));
    MOE_TRY(moe_combine_resolve(home, &a->home));
    a->count = v->recv_count;
    a->ids = moei_ep_form_to_all(b->dispatch_form) ? v->recv_ids : 0;
    a->warps = slices < MOEI_EP_REDUCE_WARPS ? slices : MOEI_EP_REDUCE_WARPS;
    g.dependent = 1;
#define MOEI_EP_REDUCE_CASE(name, dtype)                                                           \
    if (b->rows_dtype == dtype) MOE_TRY(MOE_PREPARE(&p->reduce, moei_ep_reduce_##name, g));
    MOEI_COMBINE_LIST(MOEI_EP_REDUCE_CASE)
#undef MOEI_EP_REDUCE_CASE
    MOE_TRY(moei_ep_size_reduce(a, c->max_blocks, &p->reduce));
    return a->fused ? MOE_OK : moe_combine_prepare(home, &p->combine);
}

/* Fills in what the sums at home have in all forms. */
MOE_HOST void moei_ep_describe_home(const moe_ep_dispatch_desc* d, const moe_ep_combine_desc* c,
                                    moe_combine_desc* home)
{
    home->residual = c->residual;
    home->residual_stride = c->residual_stride;
    home->shared = c->shared;
    home->shared_stride = c->shared_stride;
    home->shared_weight = c->shared_weight;
    home->rows_dtype = d->buffers.rows_dtype;
    home->y_dtype = d->buffers.dtype;
    home->y = c->y;
    home->y_stride = c->y_stride;
    home->fault = d->fault;
    home->rank = d->peers->rank;
    home->num_tokens = d->num_tokens;
    home->hidden = d->buffers.hidden;
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
    MOE_REQUIRE(c->max_blocks >= 0, MOE_ERR_RANGE, max_blocks);
    d = *c->dispatch;
    MOE_REQUIRE(!c->weights || c->weights == d.weights, MOE_ERR_CONFLICT, weights);
    MOE_TRY(moei_ep_resolve(&d, &dispatch, &v));
    p->args.peers = dispatch.peers;
    p->args.partial = dispatch.at.partial;
    p->args.recv_tokens = d.buffers.recv_tokens;
    p->args.channel = d.buffers.channel + 1;
    p->args.tag = c->tag;
    if (d.counters) {
        p->args.waited = &d.counters->combine_wait_ns;
        p->counted = dispatch;
        MOE_TRY(moei_ep_prepare_tally(&dispatch, &p->tally));
    }
    memset(&home, 0, sizeof home);
    if (d.buffers.combine_form != MOE_EP_REDUCED) {
        home.table = (const void* const*)v.rows_table;
        home.num_buffers = d.peers->num_ranks;
    }
    if (d.buffers.combine_form != MOE_EP_GATHERED) {
        MOE_REQUIRE(c->rows || v.num_rows == 0, MOE_ERR_NULL, rows);
        MOE_REQUIRE(moei_aligned(c->rows, 16), MOE_ERR_ALIGN, rows);
        home.place = v.send_place;
        home.top_k = d.peers->num_ranks;
        home.num_rows = d.buffers.recv_tokens; /* of one rank */
    }
    if (d.buffers.combine_form == MOE_EP_REDUCED) {
        home.rows = v.partial;
        home.num_rows *= d.peers->num_ranks;
    }
    if (d.buffers.combine_form == MOE_EP_GATHERED) {
        MOE_REQUIRE(!c->rows, MOE_ERR_CONFLICT, rows);
        home.place = v.place;
        home.weights = c->weights;
        home.top_k = d.buffers.top_k;
        home.num_rows = d.buffers.max_rows;
    }
    moei_ep_describe_home(&d, c, &home);
    p->args.keeps = d.buffers.combine_form == MOE_EP_REDUCE_SCATTER;
    if (d.buffers.combine_form != MOE_EP_GATHERED)
        return moei_ep_prepare_reduce(&d, &v, c, &home, p);
    g.dependent = 1;
    MOE_TRY(MOE_PREPARE(&p->meet, moei_ep_meet, g));
    return moe_combine_prepare(&home, &p->combine);
}

/* Prepares a combine, which moe_ep_combine_run queues any number of times. Errors: a status for
   each field that is not as documented, those of the dispatch included. */
MOE_HOST moe_status moe_ep_combine_prepare(const moe_ep_combine_desc* desc,
                                           moe_ep_combine_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_ep_combine_prepare(desc, p));
}

/* Queues a prepared combine on `stream`. */
MOE_HOST moe_status moe_ep_combine_run(const moe_ep_combine_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(MOE_RUN(&p->tally, p->counted, stream));
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
    MOE_TRY(moe_preload_kernel((const void*)moei_ep_tally));
    return moe_combine_preload();
}

MOEI_PRELOAD_INCLUDED(ep_combine)

#endif
