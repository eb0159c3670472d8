/* dispatch.cuh: sends tokens to the ranks that have their experts, each token once per rank, and
   sorts what was received by expert.

     received row j of sender s:  recv_x[s C + j, :] = x of sender s [recv_token[s C + j], :]
       for the sender's tokens, in order, that chose an expert of this rank
     recv_ids[s C + j, k] = this rank's expert of slot k, -1 where slot k is another rank's
     rows in expert order: route.cuh on recv_ids: expert_offset, row_slot, recv_place

   In:   x [T, H], ids [T, K] and weights [T, K] of this rank's tokens
   Out:  the buffers of desc.h: recv_* in this rank's region, the row maps in the workspace.
         experts.cuh runs on them: x = recv_x, row_slot, expert_offset, top_k = K, num_rows.

   T may differ from rank to rank, and be 0. All ranks call it, with the same buffers (desc.h). An
   id of -1 is no slot; a wrong id counts as -1 and sets BAD_ID. Nothing is exchanged with the host,
   and the host waits for nothing: counts, offsets and positions stay on the device. A graph of it
   can be replayed with other ids. Equal inputs give equal rows in equal order.

   A dispatch may be repeated with other rows, for instance with dO in a backward pass: the same ids
   give the same positions. The second descriptor has the first one's ids and workspace, and other
   buffers (another region_offset and channel); its parts MOE_EP_SEND and MOE_EP_RECEIVE run, with
   MOE_EP_GATHERED also MOE_EP_ANSWER. The row maps of the first dispatch stay valid.
   A chunk of tokens is a dispatch of its own: pointers to its first token, its num_tokens.

   Bytes that leave this GPU: (H b + 8 K + 4 S + 4) for each token and other rank that it goes to,
   and with MOE_EP_GATHERED 8 for each slot received from other ranks. With balanced, distinct
   choices a token goes to W (1 - C(E - E / W, K) / C(E, K)) ranks, its own included.
   Cost: 2 launches, 3 where the buffers have room for more than 8192 received slots (W C K); 1 more
   past 1024 tokens, 1 more with MOE_EP_GATHERED. Pushes 16-byte vectors where x is aligned. Ids,
   weights and counts go first, and the row maps are made while the rows travel. The launches that
   make the maps wait for peers, one warp a thread block (signal.cuh). Minimum architecture: sm_75.

     moe_ep_dispatch_desc d = {0};
     d.peers = &peers;  d.x = x;  d.ids = ids;  d.weights = weights;  d.num_tokens = T;
     d.fault = fault;
     d.buffers.max_tokens = T;  d.buffers.hidden = H;      // the same on all ranks
     d.buffers.num_experts = E; d.buffers.top_k = K;
     moe_ep_buffers_end(&d.buffers, W, &bytes);            // bytes of each rank's region
     moe_ep_dispatch_workspace(&d, &bytes);  d.workspace = ...;  d.workspace_bytes = bytes;
     moe_status s = moe_ep_dispatch(&d, stream);

   Source: rank-deduplicated dispatch, as in SonicMoE's expert parallelism and DeepEP; here as plain
   stores to peer addresses, with positions that need no exchange of counts. */
#ifndef MOE_EP_DISPATCH_CUH
#define MOE_EP_DISPATCH_CUH

#include "../route.cuh"
#include "peers.cuh"
#include "receive.cuh"

/* Returns `at` rounded up to 256 and advances it by `bytes`. */
MOE_HOST uint64_t moei_ep_take(uint64_t* at, uint64_t bytes)
{
    const uint64_t here = (*at + 255) / 256 * 256;
    *at = here + bytes;
    return here;
}

/* Refuses sizes and options that are out of range; fills in the defaults. */
MOE_HOST moe_status moei_ep_check_buffers(moe_ep_buffers* b, int num_ranks)
{
    if (b->region_offset == 0) b->region_offset = MOE_PEERS_HEADER;
    MOE_REQUIRE(b->region_offset >= MOE_PEERS_HEADER && b->region_offset % 256 == 0, MOE_ERR_RANGE,
                region_offset);
    MOE_REQUIRE(b->channel >= 0 && b->channel + 1 < MOE_PEERS_CHANNELS, MOE_ERR_RANGE, channel);
    if (b->form == 0) b->form = MOE_EP_REDUCED;
    MOE_REQUIRE(b->form == MOE_EP_REDUCED || b->form == MOE_EP_GATHERED, MOE_ERR_OPTION, form);
    MOE_REQUIRE(b->hidden >= 8 && b->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(b->hidden % 8 == 0, MOE_ERR_MULTIPLE, hidden);
    MOE_REQUIRE(b->num_experts >= 1 && b->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(b->top_k >= 1 && b->top_k <= 2048, MOE_ERR_RANGE, top_k); /* of combine */
    if (b->dtype == 0) b->dtype = MOE_BF16;
    MOE_REQUIRE(moe_dtype_bytes(b->dtype), MOE_ERR_DTYPE, dtype);
    if (b->rows_dtype == 0) b->rows_dtype = b->dtype;
    MOE_REQUIRE(moe_dtype_bytes(b->rows_dtype), MOE_ERR_DTYPE, rows_dtype);
    MOE_REQUIRE(b->wire_dtype == 0 || b->wire_dtype == b->dtype, MOE_ERR_DTYPE, wire_dtype);
    if (b->row_multiple == 0) b->row_multiple = 1;
    MOE_REQUIRE(b->row_multiple >= 1 && b->row_multiple <= MOE_ROUTE_MAX_MULTIPLE, MOE_ERR_RANGE,
                row_multiple);
    MOE_REQUIRE(b->num_scales >= 0 && b->num_scales <= 4096, MOE_ERR_RANGE, num_scales);
    MOE_REQUIRE(b->max_tokens >= 0, MOE_ERR_RANGE, max_tokens);
    if (b->recv_tokens == 0) b->recv_tokens = b->max_tokens;
    MOE_REQUIRE(b->recv_tokens >= 0 && b->recv_tokens <= b->max_tokens, MOE_ERR_RANGE, recv_tokens);
    MOE_REQUIRE((int64_t)num_ranks * b->recv_tokens * b->top_k <= 0x7fffffff &&
                    (int64_t)b->max_tokens * b->top_k <= 0x7fffffff,
                MOE_ERR_RANGE, max_tokens);
    MOE_REQUIRE(b->max_rows >= 0 && b->max_rows <= 0x7fffffff, MOE_ERR_RANGE, max_rows);
    if (b->max_rows == 0) {
        const int64_t slots = (int64_t)num_ranks * b->recv_tokens * b->top_k;
        const int64_t padded = slots < b->num_experts ? slots : b->num_experts;
        b->max_rows = slots + padded * (b->row_multiple - 1);
        MOE_REQUIRE(b->max_rows <= 0x7fffffff, MOE_ERR_RANGE, row_multiple);
    }
    return MOE_OK;
}

/* Fills in the layout. Requires checked buffers. */
MOE_HOST void moei_ep_lay_out(const moe_ep_buffers* b, int num_ranks, moei_ep_layout* at)
{
    const uint64_t rows = (uint64_t)num_ranks * (uint64_t)b->recv_tokens;
    const uint64_t hidden = (uint64_t)b->hidden, top_k = (uint64_t)b->top_k;
    const uint64_t row_bytes = hidden * (uint64_t)moe_dtype_bytes(b->rows_dtype);
    memset(at, 0, sizeof *at);
    at->end = b->region_offset;
    at->recv_x = moei_ep_take(&at->end, rows * hidden * (uint64_t)moe_dtype_bytes(b->dtype));
    at->recv_scales = moei_ep_take(&at->end, rows * (uint64_t)b->num_scales * 4);
    at->recv_ids = moei_ep_take(&at->end, rows * top_k * 4);
    at->recv_weights = moei_ep_take(&at->end, rows * top_k * 4);
    at->recv_token = moei_ep_take(&at->end, rows * 4);
    at->recv_count = moei_ep_take(&at->end, (uint64_t)num_ranks * 4);
    if (b->form == MOE_EP_REDUCED) {
        at->partial = moei_ep_take(&at->end, rows * row_bytes);
    } else {
        at->place = moei_ep_take(&at->end, (uint64_t)b->max_tokens * top_k * 8);
        at->rows = moei_ep_take(&at->end, (uint64_t)b->max_rows * row_bytes);
    }
    at->end = (at->end + 255) / 256 * 256;
}

/* Writes the offset of the first byte after these buffers to *end: a region of so many bytes holds
   them; another exchange may begin there. Errors: the fields of `buffers`; num_ranks. */
MOE_HOST moe_status moe_ep_buffers_end(const moe_ep_buffers* buffers, int num_ranks, uint64_t* end)
{
    moe_ep_buffers b;
    moei_ep_layout at;
    MOE_REQUIRE(buffers && end, MOE_ERR_NULL, desc);
    MOE_REQUIRE(num_ranks >= 1 && num_ranks <= MOE_PEERS_MAX_RANKS, MOE_ERR_RANGE, num_ranks);
    b = *buffers;
    MOE_TRY(moei_ep_check_buffers(&b, num_ranks));
    moei_ep_lay_out(&b, num_ranks, &at);
    *end = at.end;
    return MOE_OK;
}

/* Refuses sizes and options; fills in the defaults. */
MOE_HOST moe_status moei_ep_check_options(moe_ep_dispatch_desc* d, moei_ep_args* a)
{
    const moe_ep_buffers* b = &d->buffers;
    MOE_TRY(moei_peers_resolve(d->peers, d->fault, &a->peers));
    MOE_TRY(moei_ep_check_buffers(&d->buffers, d->peers->num_ranks));
    moei_ep_lay_out(b, d->peers->num_ranks, &a->at);
    MOE_REQUIRE(a->at.end <= d->peers->bytes, MOE_ERR_RANGE, region_bytes);
    MOE_REQUIRE(d->num_tokens >= 0 && d->num_tokens <= b->max_tokens, MOE_ERR_RANGE, num_tokens);
    if (d->x_stride == 0) d->x_stride = b->hidden;
    MOE_REQUIRE(moei_stride_fits(d->x_stride, b->hidden, d->num_tokens), MOE_ERR_STRIDE, x_stride);
    MOE_REQUIRE(d->tag >= 0 && d->tag < 1 << 24, MOE_ERR_RANGE, tag);
    MOE_REQUIRE(!d->replica_offset == !d->replica, MOE_ERR_CONFLICT, replica);
    MOE_REQUIRE(b->num_scales || !d->scales, MOE_ERR_CONFLICT, scales);
    MOE_REQUIRE(d->num_local >= 0 && d->num_local <= MOE_MAX_EXPERTS, MOE_ERR_RANGE, num_local);
    if (!d->replica_offset) {
        const int owned = moe_ep_owned(a->peers.rank, b->num_experts, a->peers.num_ranks);
        MOE_REQUIRE(!d->num_local || d->num_local == owned, MOE_ERR_CONFLICT, num_local);
        d->num_local = owned;
    }
    return MOE_OK;
}

/* Fills in route's descriptor for what was received; of buffers only ids and part_count. */
MOE_HOST void moei_ep_describe_route(const moe_ep_dispatch_desc* d, const moei_ep_args* a,
                                     moe_route_desc* r)
{
    const moe_ep_buffers* b = &d->buffers;
    memset(r, 0, sizeof *r);
    r->ids = (const int32_t*)(a->peers.base + a->at.recv_ids);
    r->part_count = (const int32_t*)(a->peers.base + a->at.recv_count);
    r->num_parts = a->peers.num_ranks;
    r->num_tokens = a->peers.num_ranks * b->recv_tokens;
    r->num_experts = d->num_local ? d->num_local : 1;
    if (d->num_local == 0) /* no expert: one without a replica, by the zeros of a channel */
        r->replica_offset = (const int32_t*)((moe_peers_header*)a->peers.base)->channel[0].zeros;
    r->top_k = b->top_k;
    r->row_multiple = b->row_multiple;
    r->max_rows = b->max_rows;
    r->fault = d->fault;
    r->rank = a->peers.rank;
}

/* Fills in the view of the workspace at `base` and of the region, and *bytes of workspace. */
MOE_HOST moe_status moei_ep_carve(const moe_ep_dispatch_desc* d, const moei_ep_args* a, char* base,
                                  moe_ep_view* v, size_t* bytes)
{
    const moe_ep_buffers* b = &d->buffers;
    const uint64_t num_ranks = (uint64_t)a->peers.num_ranks, local = (uint64_t)d->num_local;
    const uint64_t slots = num_ranks * (uint64_t)b->recv_tokens * (uint64_t)b->top_k;
    char* own = a->peers.base;
    moe_route_desc r;
    size_t route;
    memset(v, 0, sizeof *v);
    moei_ep_describe_route(d, a, &r);
    MOE_TRY(moe_route_workspace(&r, &route));
    v->recv_tokens = b->recv_tokens;
    v->num_local = d->num_local;
    MOE_TRY(moe_route_max_rows(&r, &v->num_rows));
    v->recv_x = own + a->at.recv_x;
    if (b->num_scales) v->recv_scales = (float*)(own + a->at.recv_scales);
    v->recv_ids = (int32_t*)(own + a->at.recv_ids);
    v->recv_weights = (float*)(own + a->at.recv_weights);
    v->recv_token = (int32_t*)(own + a->at.recv_token);
    v->recv_count = (int32_t*)(own + a->at.recv_count);
    *bytes = 0;
    v->chunk_count = (int32_t*)moei_carve(base, bytes, MOEI_EP_MAX_CHUNKS * num_ranks * 4);
    v->expert_count = (int32_t*)moei_carve(base, bytes, (local ? local : 1) * 4);
    v->expert_offset = (int32_t*)moei_carve(base, bytes, (local ? local : 1) * 4 + 4);
    v->row_slot = (int32_t*)moei_carve(base, bytes, (uint64_t)v->num_rows * 4);
    v->recv_place = (moe_place*)moei_carve(base, bytes, slots * 8);
    if (b->form == MOE_EP_REDUCED) {
        v->partial = own + a->at.partial;
        v->send_place =
            (moe_place*)moei_carve(base, bytes, (uint64_t)d->num_tokens * num_ranks * 8);
    } else {
        v->place = (moe_place*)(own + a->at.place);
        v->rows = own + a->at.rows;
        v->rows_table = (void**)moei_carve(base, bytes, num_ranks * 8);
    }
    v->route_workspace = moei_carve(base, bytes, route);
    return MOE_OK;
}

/* Writes the bytes of workspace of a dispatch to *bytes, each buffer rounded up to 256:
   128 W 4, P 4, (P + 1) 4, max_rows 4, W C K 8, the bytes of moe_route_workspace for W C tokens;
   and T W 8 (reduced) or W 8 (gathered). Reads peers, sizes and options, fault, and which of
   replicas are given. */
MOE_HOST moe_status moe_ep_dispatch_workspace(const moe_ep_dispatch_desc* desc, size_t* bytes)
{
    moe_ep_dispatch_desc d;
    moei_ep_args a;
    moe_ep_view v;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    d = *desc;
    memset(&a, 0, sizeof a);
    MOE_TRY(moei_ep_check_options(&d, &a));
    return moei_ep_carve(&d, &a, 0, &v, bytes);
}

/* Refuses buffers of the caller's that are missing, misaligned or overlap. Requires checked
   options. */
MOE_HOST moe_status moei_ep_check_pointers(const moe_ep_dispatch_desc* d, size_t workspace)
{
    const moe_ep_buffers* b = &d->buffers;
    const uint64_t slots = (uint64_t)d->num_tokens * (uint64_t)b->top_k;
    const uint32_t align = b->dtype == MOE_FP32 ? 4 : 2;
    const moe_buffer list[] = {
        {d->x, moe_extent(d->num_tokens, d->x_stride, b->hidden, b->dtype), align,
         MOE_BUFFER_REQUIRED, MOE_FIELD_x},
        {d->scales, (uint64_t)d->num_tokens * (uint64_t)b->num_scales * 4, 4, MOE_BUFFER_REQUIRED,
         MOE_FIELD_scales},
        {d->ids, slots * 4, 4, MOE_BUFFER_REQUIRED, MOE_FIELD_ids},
        {d->weights, slots * 4, 4, MOE_BUFFER_READ, MOE_FIELD_weights},
        {d->replica_offset, (uint64_t)b->num_experts * 4 + 4, 4, MOE_BUFFER_READ,
         MOE_FIELD_replica_offset},
        {d->replica, 8, 4, MOE_BUFFER_READ, MOE_FIELD_replica},
        {d->peers->base, d->peers->bytes, 256, MOE_BUFFER_WRITTEN, MOE_FIELD_region},
        {d->workspace, workspace, 256, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_workspace},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    MOE_REQUIRE(!d->workspace || d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE,
                workspace_bytes);
    return moe_check_buffers(list, (int)(sizeof list / sizeof list[0]));
}

/* Checks a descriptor, fills in its defaults, the kernels' argument and the view. */
MOE_HOST moe_status moei_ep_resolve(moe_ep_dispatch_desc* d, moei_ep_args* a, moe_ep_view* v)
{
    const moe_ep_buffers* b = &d->buffers;
    int64_t blocks;
    size_t bytes;
    memset(a, 0, sizeof *a);
    MOE_TRY(moei_ep_check_options(d, a));
    MOE_TRY(moei_ep_carve(d, a, (char*)d->workspace, v, &bytes));
    MOE_TRY(moei_ep_check_pointers(d, bytes));
    a->x = (const char*)d->x;
    a->scales = d->scales;
    a->ids = d->ids;
    a->weights = d->weights;
    a->replica_offset = d->replica_offset;
    a->replica = d->replica;
    a->chunk_count = d->num_tokens > MOEI_EP_ONE_LAUNCH ? v->chunk_count : 0;
    a->send_place = v->send_place;
    a->recv_place = v->recv_place;
    a->rows_table = v->rows_table;
    a->x_pitch = d->x_stride * moe_dtype_bytes(b->dtype);
    a->row_bytes = (int64_t)b->hidden * moe_dtype_bytes(b->dtype);
    a->num_tokens = d->num_tokens;
    a->num_experts = b->num_experts;
    a->top_k = b->top_k;
    a->recv_tokens = b->recv_tokens;
    a->num_scales = b->num_scales;
    blocks = d->num_tokens < MOEI_EP_MAX_CHUNKS ? d->num_tokens : MOEI_EP_MAX_CHUNKS;
    a->chunk_tokens = blocks ? (int32_t)((d->num_tokens + blocks - 1) / blocks) : 1;
    a->channel = b->channel;
    a->tag = d->tag;
    return MOE_OK;
}

/* Writes the addresses of this rank's buffers to *view. Errors: as of moe_ep_dispatch_prepare. */
MOE_HOST moe_status moe_ep_dispatch_get_view(const moe_ep_dispatch_desc* desc, moe_ep_view* view)
{
    moe_ep_dispatch_desc d;
    moei_ep_args a;
    moe_ep_view v;
    MOE_REQUIRE(desc && view, MOE_ERR_NULL, desc);
    d = *desc;
    MOE_TRY(moei_ep_resolve(&d, &a, &v));
    *view = v;
    return MOE_OK;
}

/* A prepared dispatch: all but its stream, for the device that was current. */
typedef struct moe_ep_dispatch_prepared {
    moei_ep_args args;
    moei_ep_route_args route;
    /* empty where not needed */
    moe_launch count, push, receive, answer;              /* argument: args */
    moe_launch route_few, count_received, place_received; /* argument: route */
} moe_ep_dispatch_prepared;

/* Prepares the sending kernels. */
MOE_HOST moe_status moei_ep_prepare_send(moe_ep_dispatch_prepared* p)
{
    const moei_ep_args* a = &p->args;
    const int64_t chunks = (a->num_tokens + a->chunk_tokens - 1) / a->chunk_tokens;
    const uint64_t all = (uint64_t)(uintptr_t)a->x | (uint64_t)a->x_pitch | (uint64_t)a->row_bytes;
    const size_t shared = moei_ep_shared_bytes(a->peers.num_ranks);
    moe_launch_config c = moe_grid(chunks, MOEI_EP_THREADS, shared, 0);
    c.dependent = 1;
    if (a->chunk_count) MOE_TRY(MOE_PREPARE(&p->count, moei_ep_count, c));
    c = moe_grid(chunks + 1, MOEI_EP_THREADS, shared, 0); /* the last block has no chunk */
    c.dependent = 1;
    if (all % 16 == 0) return MOE_PREPARE(&p->push, moei_ep_push_16, c);
    if (all % 4 == 0) return MOE_PREPARE(&p->push, moei_ep_push_4, c);
    return MOE_PREPARE(&p->push, moei_ep_push_2, c);
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
    r.workspace = v->route_workspace;
    MOE_TRY(moe_route_workspace(&r, &r.workspace_bytes));
    MOE_TRY(moei_route_resolve(&r, &a->route));
    a->peers = p->args.peers;
    a->channel = p->args.channel;
    a->tag = p->args.tag;
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
    MOE_TRY(MOE_PREPARE(&p->receive, moei_ep_receive, c));
    return d.buffers.form == MOE_EP_GATHERED ? moei_ep_prepare_answer(&d, p) : MOE_OK;
}

/* Prepares a dispatch, which moe_ep_dispatch_run queues any number of times. Errors: a status for
   each field that is not as documented; region_bytes: the region is too small for the buffers. */
MOE_HOST moe_status moe_ep_dispatch_prepare(const moe_ep_dispatch_desc* desc,
                                            moe_ep_dispatch_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_ep_dispatch_prepare(desc, p));
}

/* Queues the launches of one part. */
MOE_HOST moe_status moei_ep_run_part(const moe_ep_dispatch_prepared* p, int part, int chained,
                                     cudaStream_t stream)
{
    moei_ep_route_args route;
    switch (part) {
    case MOE_EP_SEND:
        MOE_TRY(MOE_RUN(&p->count, p->args, stream));
        return MOE_RUN(&p->push, p->args, stream);
    case MOE_EP_ROUTE:
        route = p->route;
        route.chained = chained;
        MOE_TRY(MOE_RUN(&p->route_few, route, stream));
        MOE_TRY(MOE_RUN(&p->count_received, route, stream));
        return MOE_RUN(&p->place_received, route, stream);
    case MOE_EP_RECEIVE: return MOE_RUN(&p->receive, p->args, stream);
    case MOE_EP_ANSWER: return MOE_RUN(&p->answer, p->args, stream);
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
    return moei_ep_run_part(p, part, 0, stream);
}

/* Queues a prepared dispatch on `stream`. */
MOE_HOST moe_status moe_ep_dispatch_run(const moe_ep_dispatch_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(moei_ep_run_part(p, MOE_EP_SEND, 1, stream));
    MOE_TRY(moei_ep_run_part(p, MOE_EP_ROUTE, 1, stream)); /* receives the rows too */
    return moei_ep_run_part(p, MOE_EP_ANSWER, 1, stream);
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
        (const void*)moei_ep_count,          (const void*)moei_ep_push_16,
        (const void*)moei_ep_push_4,         (const void*)moei_ep_push_2,
        (const void*)moei_ep_route_few,      (const void*)moei_ep_count_received,
        (const void*)moei_ep_place_received, (const void*)moei_ep_receive,
        (const void*)moei_ep_answer};
    for (size_t i = 0; i < sizeof kernel / sizeof kernel[0]; ++i)
        MOE_TRY(moe_preload_kernel(kernel[i]));
    return MOE_OK;
}

MOEI_PRELOAD_INCLUDED(ep_dispatch)

#endif
