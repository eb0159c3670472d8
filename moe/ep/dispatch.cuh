/* dispatch.cuh: sends tokens to the ranks that have their experts, and sorts what was received by
   expert. Three forms (buffers.dispatch_form); the rows in expert order, and all results, are the
   same in each:

   MOE_EP_DEDUPLICATED   each token goes once to each rank that has an expert of it
     received row j of sender s:  recv_x[s C + j, :] = x of sender s [recv_token[s C + j], :]
       for the sender's tokens, in order, that chose an expert of this rank
   MOE_EP_ALL_GATHER     each token goes to every rank: j is the token's number. Copy engines can
                         move the rows, on a side stream: MOE_EP_ALL_GATHER_COPY
   MOE_EP_ALL_TO_ALL     a row for each slot, in the owner's expert order:
     recv_x[row, :] = x of the row's token,  row = recv_place of the slot

   recv_ids[s C + j, k] = this rank's expert of slot k, -1 where slot k is another rank's
   rows in expert order: route.cuh on recv_ids: expert_offset, row_slot, recv_place

   In:   x [T, H], ids [T, K] and weights [T, K] of this rank's tokens
   Out:  the buffers of desc.h: recv_* in this rank's region, the row maps in the workspace.
         experts.cuh runs on them: x = recv_x, expert_offset, top_k = K, num_rows; and row_slot, but
         null with MOE_EP_ALL_TO_ALL (view.in_order).

   T may differ from rank to rank, and be 0. All ranks call it, with the same buffers (desc.h). An
   id of -1 is no slot; a wrong id counts as -1 and sets BAD_ID. Nothing is exchanged with the host,
   and the host waits for nothing: counts, offsets and positions stay on the device. A graph of it
   can be replayed with other ids. Equal inputs give equal rows in equal order.

   A dispatch may be repeated with other rows, for instance with dO in a backward pass: the same ids
   give the same positions. The second descriptor has the first one's ids and workspace, and other
   buffers (another region_offset and channel); its parts MOE_EP_SEND and MOE_EP_RECEIVE run, with
   MOE_EP_GATHERED also MOE_EP_ANSWER. The row maps of the first dispatch stay valid.
   A micro-batch is a dispatch of its own: pointers to its first token, its num_tokens.

   Bytes that leave this GPU: rows of H b + 4 S, and 8 K + 4 for each token and rank that it goes
   to. Rows: of the T tokens, with balanced and distinct choices, W (1 - C(E - E / W, K) / C(E, K))
   each, this rank's own part included; all-gather W - 1; all-to-all one a slot of another rank. And
   8 for each slot received from other ranks where homes must know the rows: with MOE_EP_ALL_TO_ALL
   or MOE_EP_GATHERED. With MOE_EP_WIRE_FP8 (desc.h) H + 4 ceil(H / 128) in place of H b.
   Cost: 2 launches, 3 where the buffers have room for more than 8192 received slots (W C K); 1 more
   past 1024 tokens (not all-gather), 1 more with MOE_EP_GATHERED, 2 more with MOE_EP_ALL_TO_ALL,
   which also waits for all ranks once more; 1 more with MOE_EP_WIRE_FP8, 2 more of
   MOE_EP_ALL_GATHER_COPY. Pushes 16-byte vectors where x is aligned. Ids, weights
   and counts go first, and the row maps are made while the rows travel. The launches that make the
   maps wait for peers, one warp a thread block (signal.cuh). Minimum architecture: sm_75.

     moe_ep_dispatch_desc d = {0};
     d.peers = &peers;  d.x = x;  d.ids = ids;  d.weights = weights;  d.num_tokens = T;
     d.fault = fault;
     d.buffers.max_tokens = T;  d.buffers.hidden = H;      // the same on all ranks
     d.buffers.num_experts = E; d.buffers.top_k = K;
     moe_ep_buffers_end(&d.buffers, W, &bytes);            // bytes of each rank's region
     moe_ep_dispatch_workspace(&d, &bytes);  d.workspace = ...;  d.workspace_bytes = bytes;
     moe_status s = moe_ep_dispatch(&d, stream);

   Source: the three dispatches of SonicMoE's expert parallelism, the first one as in DeepEP too;
   here as plain stores to peer addresses, with positions that need no exchange of counts. */
#ifndef MOE_EP_DISPATCH_CUH
#define MOE_EP_DISPATCH_CUH

#include "buffers.cuh"
#include "receive.cuh"
#include "scatter.cuh"
#include "wire.cuh"

/* A prepared dispatch: all but its stream, for the device that was current. */
typedef struct moe_ep_dispatch_prepared {
    moei_ep_args args;
    moei_ep_route_args route;
    /* empty where not needed */
    moe_launch count, push, copied, receive, answer, scatter, decode, encode; /* argument: args */
    moe_launch route_few, count_received, place_received;                     /* argument: route */
    void *side_stream, *side_event[2]; /* MOE_EP_ALL_GATHER_COPY */
} moe_ep_dispatch_prepared;

/* Prepares the kernels of fp8 rows. */
MOE_HOST moe_status moei_ep_prepare_wire(moe_ep_dispatch_prepared* p)
{
    const moei_ep_args* a = &p->args;
    const int warps = MOEI_EP_DECODE_THREADS / MOE_WARP_SIZE;
    const int64_t rows = a->dispatch_form == MOE_EP_ALL_TO_ALL
                             ? a->max_rows
                             : (int64_t)a->peers.num_ranks * a->recv_tokens;
    moe_device device;
    moe_launch_config c;
    int64_t blocks = (rows + warps - 1) / warps;
    MOE_TRY(moe_device_query(&device));
    if (blocks > device.sms * 8) blocks = device.sms * 8;
    c = moe_grid(blocks > 1 ? blocks : 1, MOEI_EP_DECODE_THREADS, 0, 0);
    c.dependent = 1;
    MOE_TRY(MOE_PREPARE(&p->decode, moei_ep_decode, c));
    if (a->dispatch_form != MOE_EP_ALL_GATHER_COPY) return MOE_OK;
    return MOE_PREPARE(&p->encode, moei_ep_encode_own, c);
}

/* Prepares what sends tokens and rows. */
MOE_HOST moe_status moei_ep_prepare_send(moe_ep_dispatch_prepared* p)
{
    const moei_ep_args* a = &p->args;
    const int64_t chunks = moei_ep_chunks(a);
    const int width = moei_ep_width(a);
    moe_launch_config rows = moe_grid(chunks > 1 ? chunks : 1, MOEI_EP_THREADS, 0, 0);
    const moe_launch_config one = moe_grid(1, 32, 0, 0);
    rows.dependent = 1;
    MOE_TRY(moei_ep_prepare_push(a, &p->count, &p->push));
    if (a->wire_fp8) MOE_TRY(moei_ep_prepare_wire(p));
    if (a->dispatch_form == MOE_EP_ALL_GATHER_COPY)
        return MOE_PREPARE(&p->copied, moei_ep_copied, one);
    if (a->dispatch_form != MOE_EP_ALL_TO_ALL) return MOE_OK;
    if (a->wire_fp8) return MOE_PREPARE(&p->scatter, moei_ep_scatter_fp8, rows);
    if (width == 16) return MOE_PREPARE(&p->scatter, moei_ep_scatter_16, rows);
    if (width == 4) return MOE_PREPARE(&p->scatter, moei_ep_scatter_4, rows);
    return MOE_PREPARE(&p->scatter, moei_ep_scatter_2, rows);
}

/* Sets *c to one thread block for all received slots. Returns 1; 0 where they are too many. */
MOE_HOST int moei_ep_few_grid(moe_launch_config* c, const moe_route_desc* d)
{
    const int64_t slots = (int64_t)d->num_tokens * d->top_k;
    moe_device device;
    int threads = 256;
    size_t smem;
    if (slots < 1 || slots > MOEI_EP_FEW_SLOTS || moe_device_query(&device) != MOE_OK) return 0;
    while (threads < slots && threads < MOEI_EP_FEW_THREADS) threads *= 2;
    smem = moei_ep_few_bytes(d->num_replicas, (int)slots, threads);
    if (smem + 1024 > (size_t)device.smem_block) return 0;
    *c = moe_grid(1, threads, smem, 0);
    c->dependent = 1;
    return 1;
}

/* Prepares the kernels that make the row maps. */
MOE_HOST moe_status moei_ep_prepare_route(const moe_ep_dispatch_desc* d, const moe_ep_view* v,
                                          moe_ep_dispatch_prepared* p)
{
    moei_ep_route_args* a = &p->route;
    moe_route_desc r;
    moe_launch_config c;
    moei_ep_describe_route(d, &p->args, &r);
    r.expert_count = v->expert_count;
    r.expert_offset = v->expert_offset;
    r.row_slot = v->row_slot;
    r.place = v->recv_place;
    r.row_weight = d->row_weight;
    if (r.row_weight) r.weights = v->recv_weights;
    r.workspace = v->route_workspace;
    MOE_TRY(moe_route_workspace(&r, &r.workspace_bytes));
    MOE_TRY(moei_route_resolve(&r, &a->route));
    a->peers = p->args.peers;
    a->channel = p->args.channel;
    a->tag = p->args.tag;
    a->waited = p->args.waited;
    if (moei_ep_few_grid(&c, &a->route.d)) return MOE_PREPARE(&p->route_few, moei_ep_route_few, c);
    if (r.num_tokens) {
        MOE_TRY(moei_route_grid(&c, &a->route.d, 0));
        MOE_TRY(MOE_PREPARE(&p->count_received, moei_ep_count_received, c));
    }
    MOE_TRY(moei_route_grid(&c, &a->route.d, 1));
    return MOE_PREPARE(&p->place_received, moei_ep_place_received, c);
}

/* Prepares the kernel that tells the homes where their rows are. */
MOE_HOST moe_status moei_ep_prepare_answer(const moe_ep_dispatch_desc* d,
                                           moe_ep_dispatch_prepared* p)
{
    const int64_t slots = (int64_t)d->buffers.recv_tokens * d->buffers.top_k;
    int64_t blocks = (slots + 255) / 256;
    moe_device device;
    moe_launch_config c;
    MOE_TRY(moe_device_query(&device));
    if (blocks > device.sms * 2) blocks = device.sms * 2;
    c = moe_grid(blocks > 1 ? blocks : 1, 256, 0, 0);
    c.dependent = 1;
    return MOE_PREPARE(&p->answer, moei_ep_answer, c);
}

/* Fills in *p, which is empty. */
MOE_HOST moe_status moei_ep_dispatch_prepare(const moe_ep_dispatch_desc* desc,
                                             moe_ep_dispatch_prepared* p)
{
    moe_ep_dispatch_desc d = *desc;
    moe_ep_view v;
    moe_launch_config c = moe_grid(1, 32, 0, 0);
    MOE_TRY(moei_ep_resolve(&d, &p->args, &v));
    MOE_TRY(moei_ep_prepare_send(p));
    MOE_TRY(moei_ep_prepare_route(&d, &v, p));
    c.dependent = 1;
    p->side_stream = d.side_stream;
    p->side_event[0] = d.side_event[0], p->side_event[1] = d.side_event[1];
    MOE_TRY(MOE_PREPARE(&p->receive, moei_ep_receive, c));
    return moei_ep_has_place(&d.buffers) ? moei_ep_prepare_answer(&d, p) : MOE_OK;
}

/* Prepares a dispatch, which moe_ep_dispatch_run queues any number of times. Errors: a status for
   each field that is not as documented; region_bytes: the region is too small for the buffers. */
MOE_HOST moe_status moe_ep_dispatch_prepare(const moe_ep_dispatch_desc* desc,
                                            moe_ep_dispatch_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_ep_dispatch_prepare(desc, p));
}

/* MOE_EP_ALL_GATHER_COPY: queues the copies of this rank's rows to all ranks on the side stream,
   behind what `stream` has so far, then this rank's arrival at the barrier of rows. */
MOE_HOST moe_status moei_ep_copy_rows(const moe_ep_dispatch_prepared* p, cudaStream_t stream)
{
    const moei_ep_args* a = &p->args;
    const int tokens = a->num_tokens < a->recv_tokens ? a->num_tokens : a->recv_tokens;
    const size_t row = (size_t)a->row_bytes;
    const int64_t first = (int64_t)a->peers.rank * a->recv_tokens, hidden = a->row_bytes / 2;
    const int64_t groups = (hidden + MOE_FP8_GROUP - 1) / MOE_FP8_GROUP;
    cudaStream_t side = (cudaStream_t)p->side_stream;
    MOE_TRY(MOE_RUN(&p->encode, *a, stream));
    MOE_TRY_CUDA(cudaEventRecord((cudaEvent_t)p->side_event[0], stream));
    MOE_TRY_CUDA(cudaStreamWaitEvent(side, (cudaEvent_t)p->side_event[0], 0));
    for (int i = 1; i <= a->peers.num_ranks && tokens; ++i) { /* its own last */
        const int d = (a->peers.rank + i) % a->peers.num_ranks;
        char* to = a->peers.table[d] + a->at.recv_x + first * a->row_bytes;
        if (a->wire_fp8 && d != a->peers.rank) {
            const uint64_t at = a->at.wire + (uint64_t)(first * hidden);
            const uint64_t scales = a->at.wire_scales + (uint64_t)(first * groups) * 4;
            MOE_TRY_CUDA(cudaMemcpyAsync(a->peers.table[d] + at, a->peers.base + at,
                                         (size_t)(tokens * hidden), cudaMemcpyDefault, side));
            MOE_TRY_CUDA(cudaMemcpyAsync(a->peers.table[d] + scales, a->peers.base + scales,
                                         (size_t)(tokens * groups) * 4, cudaMemcpyDefault, side));
            continue;
        }
        if (a->x_pitch == a->row_bytes)
            MOE_TRY_CUDA(cudaMemcpyAsync(to, a->x, (size_t)tokens * row, cudaMemcpyDefault, side));
        else
            MOE_TRY_CUDA(cudaMemcpy2DAsync(to, row, a->x, (size_t)a->x_pitch, row, (size_t)tokens,
                                           cudaMemcpyDefault, side));
    }
    MOE_TRY(MOE_RUN(&p->copied, p->args, side));
    return moe_cuda_status(cudaEventRecord((cudaEvent_t)p->side_event[1], side));
}

/* Lets `stream` wait for the side stream, where there is one. */
MOE_HOST moe_status moei_ep_join(const moe_ep_dispatch_prepared* p, cudaStream_t stream)
{
    if (!p->copied.kernel) return MOE_OK;
    return moe_cuda_status(cudaStreamWaitEvent(stream, (cudaEvent_t)p->side_event[1], 0));
}

/* Queues the launches of MOE_EP_ROUTE. chained, receives: as in moei_ep_route_args. */
MOE_HOST moe_status moei_ep_run_route(const moe_ep_dispatch_prepared* p, int chained, int receives,
                                      cudaStream_t stream)
{
    moei_ep_route_args route = p->route;
    route.chained = chained;
    route.receives = receives;
    MOE_TRY(MOE_RUN(&p->route_few, route, stream));
    MOE_TRY(MOE_RUN(&p->count_received, route, stream));
    return MOE_RUN(&p->place_received, route, stream);
}

/* Queues the launches of one part. */
MOE_HOST moe_status moei_ep_run_part(const moe_ep_dispatch_prepared* p, int part,
                                     cudaStream_t stream)
{
    const int scatters = p->args.dispatch_form == MOE_EP_ALL_TO_ALL;
    switch (part) {
    case MOE_EP_SEND:
        if (p->copied.kernel) MOE_TRY(moei_ep_copy_rows(p, stream));
        MOE_TRY(MOE_RUN(&p->count, p->args, stream));
        return MOE_RUN(&p->push, p->args, stream);
    case MOE_EP_ROUTE: return moei_ep_run_route(p, 0, 0, stream);
    case MOE_EP_RECEIVE:
        if (!scatters) {
            MOE_TRY(MOE_RUN(&p->receive, p->args, stream));
            MOE_TRY(moei_ep_join(p, stream));
            return MOE_RUN(&p->decode, p->args, stream);
        }
        MOE_TRY(MOE_RUN(&p->answer, p->args, stream));
        MOE_TRY(MOE_RUN(&p->scatter, p->args, stream));
        return MOE_RUN(&p->decode, p->args, stream);
    case MOE_EP_ANSWER: return scatters ? MOE_OK : MOE_RUN(&p->answer, p->args, stream);
    default: return MOE_STATUS(MOE_ERR_OPTION, part);
    }
}

/* Queues one part of a prepared dispatch on `stream`; `part` is a moe_ep_part. In their order:
   MOE_EP_RECEIVE passes the barrier that MOE_EP_ROUTE waits for. MOE_EP_ROUTE may be left out. Each
   MOE_EP_SEND is followed by one MOE_EP_RECEIVE, before the next. */
MOE_HOST moe_status moe_ep_dispatch_run_part(const moe_ep_dispatch_prepared* p, int part,
                                             cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    return moei_ep_run_part(p, part, stream);
}

/* Queues a prepared dispatch on `stream`. */
MOE_HOST moe_status moe_ep_dispatch_run(const moe_ep_dispatch_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(moei_ep_run_part(p, MOE_EP_SEND, stream));
    if (p->scatter.kernel) {
        MOE_TRY(moei_ep_run_route(p, 1, 0, stream));
        return moei_ep_run_part(p, MOE_EP_RECEIVE, stream);
    }
    MOE_TRY(moei_ep_run_route(p, 1, 1, stream));
    MOE_TRY(moei_ep_join(p, stream));
    MOE_TRY(MOE_RUN(&p->decode, p->args, stream));
    return moei_ep_run_part(p, MOE_EP_ANSWER, stream);
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_ep_dispatch(const moe_ep_dispatch_desc* desc, cudaStream_t stream)
{
    moe_ep_dispatch_prepared p;
    MOE_TRY(moe_ep_dispatch_prepare(desc, &p));
    return moe_ep_dispatch_run(&p, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_ep_dispatch_preload(void)
{
    const void* const kernel[] = {
        (const void*)moei_ep_count,          (const void*)moei_ep_route_few,
        (const void*)moei_ep_count_received, (const void*)moei_ep_place_received,
        (const void*)moei_ep_receive,        (const void*)moei_ep_answer,
        (const void*)moei_ep_copied,         (const void*)moei_ep_decode,
        (const void*)moei_ep_encode_own};
    for (size_t i = 0; i < sizeof kernel / sizeof kernel[0]; ++i)
        MOE_TRY(moe_preload_kernel(kernel[i]));
#define MOEI_EP_LOAD(name, width, fp8)                                                             \
    MOE_TRY(moe_preload_kernel((const void*)moei_ep_push_##name));                                 \
    MOE_TRY(moe_preload_kernel((const void*)moei_ep_scatter_##name));
    MOEI_EP_WIDTHS(MOEI_EP_LOAD)
#undef MOEI_EP_LOAD
    return MOE_OK;
}

MOEI_PRELOAD_INCLUDED(ep_dispatch)

#endif
