/* message.cuh: an exchange in messages, for ranks that do not reach each other's memory. This header
   packs and unpacks; a transport of the caller's moves the bytes. nccl.cuh is one by NCCL.

   A dispatch is one message for each other rank: a header, and a record for each token that goes
   there: row, ids, weights, scales, the token's number. Received rows stay in their messages: the
   experts read them there (view.x, view.x_stride). A combine is one row back for each slot, in slot
   order. The sums are those of combine.cuh on one GPU: the bits of MOE_EP_GATHERED.

   Descriptors are those of dispatch.cuh and combine.cuh. Of peers rank and num_ranks alone are read;
   of buffers the sizes. combine_form is 0 or MOE_EP_GATHERED, dispatch_form 0 or
   MOE_EP_DEDUPLICATED; combine.rows is the caller's, not null.

   Order of one exchange, on every rank; H is the host:
     moe_ep_message_run(&p, MOE_EP_MESSAGE_PACK, stream)
     transport: segments of MOE_EP_SEGMENT_HEADERS, sizes fixed
     moe_ep_message_read(&p, counts, stream)           H waits for the stream
     moe_ep_message_check(counts, W)                   a rank has stopped: all return here
     transport: segments of MOE_EP_SEGMENT_RECORDS
     moe_ep_message_run(&p, MOE_EP_MESSAGE_UNPACK, stream)
     experts.cuh on view.x, row maps of the view
     moe_ep_message_run(&p, MOE_EP_MESSAGE_PACK_ROWS, stream)
     transport: segments of MOE_EP_SEGMENT_ROWS and, once more, of MOE_EP_SEGMENT_HEADERS
     moe_ep_message_run(&p, MOE_EP_MESSAGE_SUM, stream)
   Segments are for moe_ep_message_segments; a rank's own is a copy in its memory.

   Bytes to each other rank: 16 and (H b + 8 K + 4 S + 4, rounded up to 16) for each token; back H r
   for each slot. Cost: 7 launches and a host wait; 3 and the combine's. Not in a graph: the host
   reads counts. Minimum architecture: sm_75.

   Source: an all-to-all of NCCL, as every MoE without peer memory has; here deduplicated, with one
   message a pair and no copy of received rows. */
#ifndef MOE_EP_MESSAGE_CUH
#define MOE_EP_MESSAGE_CUH

#include "combine.cuh"

/* The first 16 bytes of a message. */
typedef struct moe_ep_message_header {
    int32_t tokens, slots; /* of the sender's, for the receiver */
    uint64_t fault;        /* the sender's fault word */
} moe_ep_message_header;

/* What the host reads between the two halves of a dispatch; pinned memory is faster. */
typedef struct moe_ep_message_counts {
    moe_ep_message_header sent[MOE_PEERS_MAX_RANKS];     /* [W] to each rank */
    moe_ep_message_header received[MOE_PEERS_MAX_RANKS]; /* [W] from each rank */
} moe_ep_message_counts;

/* What goes to one rank and comes from it. */
typedef struct moe_ep_segment {
    const void* send;
    void* recv;
    size_t send_bytes, recv_bytes; /* may be 0 */
} moe_ep_segment;

typedef enum moe_ep_segment_kind {
    MOE_EP_SEGMENT_HEADERS,
    MOE_EP_SEGMENT_RECORDS,
    MOE_EP_SEGMENT_ROWS
} moe_ep_segment_kind;

typedef enum moe_ep_message_part {
    MOE_EP_MESSAGE_PACK,
    MOE_EP_MESSAGE_UNPACK,
    MOE_EP_MESSAGE_PACK_ROWS,
    MOE_EP_MESSAGE_SUM
} moe_ep_message_part;

/* Addresses in the workspace. C' = C + 1: a message has room for its header and C records. */
typedef struct moe_ep_message_view {
    const void* x;         /* received rows: token j of sender s is row s C' + j */
    int64_t x_stride;      /* elements between rows */
    int32_t num_x;         /* W C', num_tokens of the experts */
    int32_t num_local;     /* P */
    int64_t num_rows;      /* max_rows */
    int32_t* recv_ids;     /* [W C', K] */
    float* recv_weights;   /* [W C', K] */
    float* recv_scales;    /* [W C', S] */
    int32_t* recv_token;   /* [W C'] */
    int32_t* recv_count;   /* [W] */
    int32_t* expert_count; /* [P], like the next three: as in moe_ep_view */
    int32_t* expert_offset;
    int32_t* row_slot;
    moe_place* recv_place;
    moe_place* place; /* [T, K] row of back_recv of each of this rank's slots */
    /* messages and scratch */
    char *send, *recv;           /* [W][C'] records */
    char *back_send, *back_recv; /* rows for other ranks' slots; rows of this rank's slots */
    int32_t *rank_ids, *slot_count, *slot_offset;             /* [T, K] owner of each slot; [W] */
    int32_t *from_ids, *back_count, *back_offset, *back_slot; /* [W C', K] sender; [W] */
    int32_t* chunk_count;
    void* route_workspace;
} moe_ep_message_view;

/* The argument of the kernels here. */
typedef struct moei_ep_message_args {
    moei_ep_args pack; /* of the sending kernels, over messages in this rank's memory */
    moe_ep_message_view v;
    moei_ep_layout at;                               /* of a received message */
    const char* rows;                                /* of the experts */
    int64_t message_bytes, record_bytes, back_bytes; /* back: of a row */
    int32_t rank, num_ranks, records;                /* C' */
} moei_ep_message_args;

#define MOEI_EP_MESSAGE_THREADS 256

/* Writes the owner of each of this rank's slots. A thread has a slot at a time. */
MOE_KERNEL(MOEI_EP_MESSAGE_THREADS, 1) moei_ep_message_owners(MOE_ARG(moei_ep_message_args) a)
{
    const int slots = a.pack.num_tokens * a.pack.top_k;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.pack.peers.fault)) return;
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < slots;
         i += gridDim.x * blockDim.x) {
        const int t = (int)i / a.pack.top_k, k = (int)i % a.pack.top_k;
        a.v.rank_ids[i] = moei_ep_target(&a.pack, t, k, a.pack.ids[i]).rank;
    }
}

/* Completes the headers: slots and the fault word; no tokens after a stop fault. One block, a rank a
   thread. */
MOE_KERNEL(MOE_PEERS_MAX_RANKS, 1) moei_ep_message_heads(MOE_ARG(moei_ep_message_args) a)
{
    const int d = (int)threadIdx.x;
    bool stops;
    moe_pdl_trigger();
    moe_pdl_wait();
    stops = moe_fault_stopped(a.pack.peers.fault);
    if (d >= a.num_ranks) return;
    moe_ep_message_header* h = (moe_ep_message_header*)(a.v.send + d * a.message_bytes);
    h->slots = stops ? 0 : a.v.slot_count[d];
    if (stops) h->tokens = 0;
    h->fault = *(const volatile uint64_t*)a.pack.peers.fault;
}

/* Takes ids, weights, scales and numbers out of the received messages, and notes the sender of each
   slot. An expert past P counts as -1 and sets BAD_ID. A warp has a token at a time. */
MOE_KERNEL(MOEI_EP_MESSAGE_THREADS, 1) moei_ep_message_unpack(MOE_ARG(moei_ep_message_args) a)
{
    const int top_k = a.pack.top_k, num_scales = a.pack.num_scales;
    const int warps = (int)(gridDim.x * blockDim.x) / MOE_WARP_SIZE;
    const int first = (int)(blockIdx.x * blockDim.x) / MOE_WARP_SIZE + moe_warp();
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.pack.peers.fault)) return;
    for (int s = first; s < a.num_ranks && moe_lane() == 0; s += warps)
        a.v.recv_count[s] =
            min(((const moe_ep_message_header*)(a.v.recv + s * a.message_bytes))->tokens,
                a.records - 1);
    for (int i = first; i < a.num_ranks * a.records; i += warps) {
        const int s = i / a.records, j = i % a.records;
        const char* message = a.v.recv + s * a.message_bytes;
        const int32_t* ids = (const int32_t*)(message + a.at.recv_ids + j * a.at.ids_step);
        const float* weights = (const float*)(message + a.at.recv_weights + j * a.at.weights_step);
        const float* scales = (const float*)(message + a.at.recv_scales + j * a.at.scales_step);
        if (j >= ((const moe_ep_message_header*)message)->tokens || j >= a.records - 1) continue;
        for (int k = moe_lane(); k < top_k; k += MOE_WARP_SIZE) {
            const int64_t slot = (int64_t)i * top_k + k;
            int id = ids[k];
            a.v.from_ids[slot] = id < 0 ? -1 : s; /* a row goes back, whatever the expert */
            if (id >= a.v.num_local) {
                moe_fault_raise(a.pack.peers.fault, MOE_FAULT_BAD_ID, a.rank, slot);
                id = -1;
            }
            a.v.recv_ids[slot] = id;
            a.v.recv_weights[slot] = weights[k];
        }
        for (int c = moe_lane(); c < num_scales; c += MOE_WARP_SIZE)
            a.v.recv_scales[(int64_t)i * num_scales + c] = scales[c];
        if (moe_lane() == 0)
            a.v.recv_token[i] = *(const int32_t*)(message + a.at.recv_token + j * a.at.token_step);
    }
}

/* Packs the experts' rows in the order of the senders' slots, zeros for a slot without a row; renews
   the fault words of the headers. A block has a row at a time. */
MOE_KERNEL(MOEI_EP_MESSAGE_THREADS, 1) moei_ep_message_pack_rows(MOE_ARG(moei_ep_message_args) a)
{
    const int d = (int)threadIdx.x;
    bool stops;
    moe_pdl_trigger();
    moe_pdl_wait();
    stops = moe_fault_stopped(a.pack.peers.fault);
    if (blockIdx.x == 0 && d < a.num_ranks)
        ((moe_ep_message_header*)(a.v.send + d * a.message_bytes))->fault =
            *(const volatile uint64_t*)a.pack.peers.fault;
    if (stops) return;
    for (int b = (int)blockIdx.x; b < a.v.back_offset[a.num_ranks]; b += (int)gridDim.x) {
        const int row = a.v.recv_place[a.v.back_slot[b]].row;
        char* to = a.v.back_send + b * a.back_bytes;
        if (row >= 0)
            moe_copy_row(to, a.rows + row * a.back_bytes, a.back_bytes, d, (int)blockDim.x);
        else
            for (int64_t i = d; i < a.back_bytes / 16; i += blockDim.x)
                ((uint4*)to)[i] = make_uint4(0, 0, 0, 0);
    }
}

/* Takes over a stop fault of any rank. One warp. */
MOE_KERNEL(32, 1) moei_ep_message_take(MOE_ARG(moei_ep_message_args) a)
{
    moe_pdl_trigger();
    moe_pdl_wait();
    for (int s = moe_lane(); s < a.num_ranks; s += MOE_WARP_SIZE) {
        const uint64_t word =
            ((const moe_ep_message_header*)(a.v.recv + s * a.message_bytes))->fault;
        if (MOEI_FAULT_STOPS(word))
            atomicMax((unsigned long long*)a.pack.peers.fault, (unsigned long long)word);
    }
}

/* A prepared exchange in messages, for the device that was current. */
typedef struct moe_ep_message_prepared {
    moei_ep_message_args args;
    moe_launch owners, count, push, heads, unpack, pack_rows, take; /* count, push: args.pack */
    moe_route_prepared slots, received, back;
    moe_combine_prepared combine;
    int32_t has_combine;
} moe_ep_message_prepared;

/* Fills in offsets and steps of a message, for the sending kernels: those of record 0. */
MOE_HOST void moei_ep_message_lay_out(const moe_ep_buffers* b, moei_ep_layout* at, int64_t* record)
{
    const uint64_t row = (uint64_t)b->hidden * (uint64_t)moe_dtype_bytes(b->dtype);
    const uint64_t slots = (uint64_t)b->top_k * 4;
    memset(at, 0, sizeof *at);
    at->recv_ids = row;
    at->recv_weights = at->recv_ids + slots;
    at->recv_scales = at->recv_weights + slots;
    at->recv_token = at->recv_scales + (uint64_t)b->num_scales * 4;
    *record = (int64_t)((at->recv_token + 4 + 15) / 16 * 16);
    at->recv_x += (uint64_t)*record; /* behind the header, which takes a record's place */
    at->recv_ids += (uint64_t)*record;
    at->recv_weights += (uint64_t)*record;
    at->recv_scales += (uint64_t)*record;
    at->recv_token += (uint64_t)*record;
    at->x_step = at->ids_step = at->weights_step = at->scales_step = at->token_step = *record;
}

/* Fills in the descriptor of the route over received slots. */
MOE_HOST void moei_ep_message_route(const moe_ep_dispatch_desc* d, const moe_ep_message_view* v,
                                    int num_experts, const int32_t* ids, moe_route_desc* r)
{
    memset(r, 0, sizeof *r);
    r->ids = ids;
    r->part_count = v->recv_count ? v->recv_count : (const int32_t*)d->fault; /* to count bytes */
    r->num_parts = d->peers->num_ranks;
    r->num_tokens = v->num_x;
    r->num_experts = num_experts;
    r->top_k = d->buffers.top_k;
    r->fault = d->fault;
    r->rank = d->peers->rank;
}

/* Checks sizes and options; fills in the defaults, and all of *a but addresses. */
MOE_HOST moe_status moei_ep_message_options(moe_ep_dispatch_desc* d, moei_ep_message_args* a)
{
    moe_ep_buffers* b = &d->buffers;
    moei_ep_args* p = &a->pack;
    MOE_REQUIRE(d->peers, MOE_ERR_NULL, peers);
    MOE_REQUIRE(d->peers->num_ranks >= 1 && d->peers->num_ranks <= MOE_PEERS_MAX_RANKS &&
                    d->peers->rank >= 0 && d->peers->rank < d->peers->num_ranks,
                MOE_ERR_RANGE, peers);
    MOE_REQUIRE(d->fault, MOE_ERR_NULL, fault);
    MOE_REQUIRE(moei_aligned(d->fault, 8), MOE_ERR_ALIGN, fault);
    MOE_REQUIRE(b->dispatch_form == 0 || b->dispatch_form == MOE_EP_DEDUPLICATED, MOE_ERR_OPTION,
                dispatch_form);
    MOE_REQUIRE(b->combine_form == 0 || b->combine_form == MOE_EP_GATHERED, MOE_ERR_OPTION,
                combine_form);
    MOE_TRY(moei_ep_check_buffers(b, d->peers->num_ranks));
    MOE_REQUIRE((int64_t)d->peers->num_ranks * (b->recv_tokens + 1) * b->top_k <= 0x7fffffff,
                MOE_ERR_RANGE, max_tokens);
    MOE_TRY(moei_ep_check_call(d));
    moei_ep_message_lay_out(b, &p->at, &a->record_bytes);
    a->at = p->at;
    a->rank = d->peers->rank;
    a->num_ranks = d->peers->num_ranks;
    a->records = b->recv_tokens + 1;
    a->message_bytes = a->records * a->record_bytes;
    a->back_bytes = (int64_t)b->hidden * moe_dtype_bytes(b->rows_dtype);
    p->peers.fault = d->fault;
    p->peers.rank = a->rank;
    p->peers.num_ranks = a->num_ranks;
    p->packs = 1;
    return MOE_OK;
}

/* Carves the workspace at `base`: *v and *bytes. */
MOE_HOST moe_status moei_ep_message_carve(const moe_ep_dispatch_desc* d,
                                          const moei_ep_message_args* a, char* base,
                                          moe_ep_message_view* v, size_t* bytes)
{
    const moe_ep_buffers* b = &d->buffers;
    const uint64_t num_ranks = (uint64_t)a->num_ranks, local = (uint64_t)d->num_local;
    const uint64_t own = (uint64_t)d->num_tokens * (uint64_t)b->top_k;
    const uint64_t messages = num_ranks * (uint64_t)a->message_bytes;
    const uint64_t tokens = num_ranks * (uint64_t)a->records;
    const uint64_t slots = tokens * (uint64_t)b->top_k;
    moe_route_desc r;
    size_t one, route = 0;
    memset(v, 0, sizeof *v);
    v->num_local = d->num_local;
    v->num_x = (int32_t)tokens;
    v->num_rows = b->max_rows;
    v->x_stride = a->record_bytes / moe_dtype_bytes(b->dtype);
    *bytes = 0;
    v->send = (char*)moei_carve(base, bytes, messages);
    v->recv = (char*)moei_carve(base, bytes, messages);
    v->x = v->recv + a->record_bytes;
    v->back_send = (char*)moei_carve(base, bytes, slots * (uint64_t)a->back_bytes);
    v->back_recv = (char*)moei_carve(base, bytes, own * (uint64_t)a->back_bytes);
    v->recv_ids = (int32_t*)moei_carve(base, bytes, slots * 4);
    v->recv_weights = (float*)moei_carve(base, bytes, slots * 4);
    v->recv_scales = (float*)moei_carve(base, bytes, tokens * (uint64_t)b->num_scales * 4);
    v->recv_token = (int32_t*)moei_carve(base, bytes, tokens * 4);
    v->recv_count = (int32_t*)moei_carve(base, bytes, num_ranks * 4);
    v->expert_count = (int32_t*)moei_carve(base, bytes, (local ? local : 1) * 4);
    v->expert_offset = (int32_t*)moei_carve(base, bytes, (local ? local : 1) * 4 + 4);
    v->row_slot = (int32_t*)moei_carve(base, bytes, (uint64_t)b->max_rows * 4);
    v->recv_place = (moe_place*)moei_carve(base, bytes, slots * 8);
    v->place = (moe_place*)moei_carve(base, bytes, own * 8);
    v->rank_ids = (int32_t*)moei_carve(base, bytes, own * 4);
    v->slot_count = (int32_t*)moei_carve(base, bytes, num_ranks * 4);
    v->slot_offset = (int32_t*)moei_carve(base, bytes, num_ranks * 4 + 4);
    v->from_ids = (int32_t*)moei_carve(base, bytes, slots * 4);
    v->back_count = (int32_t*)moei_carve(base, bytes, num_ranks * 4);
    v->back_offset = (int32_t*)moei_carve(base, bytes, num_ranks * 4 + 4);
    v->back_slot = (int32_t*)moei_carve(base, bytes, slots * 4);
    v->chunk_count = (int32_t*)moei_carve(base, bytes, MOEI_EP_MAX_CHUNKS * num_ranks * 4);
    for (int i = 0; i < 3; ++i) { /* the three routes use it in turn */
        moei_ep_message_route(d, v, i == 1 && local ? d->num_local : a->num_ranks, v->recv_ids, &r);
        if (i == 0) r.part_count = 0, r.num_parts = 0, r.num_tokens = d->num_tokens;
        if (i == 1) r.row_multiple = b->row_multiple, r.max_rows = b->max_rows;
        MOE_TRY(moe_route_workspace(&r, &one));
        if (one > route) route = one;
    }
    v->route_workspace = moei_carve(base, bytes, route);
    return MOE_OK;
}

/* Writes the bytes of workspace of an exchange in messages to *bytes. Reads peers, sizes and options,
   fault, and which of replicas are given. Errors: theirs. */
MOE_HOST moe_status moe_ep_message_workspace(const moe_ep_dispatch_desc* desc, size_t* bytes)
{
    moe_ep_dispatch_desc d;
    moei_ep_message_args a;
    moe_ep_message_view v;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    d = *desc;
    memset(&a, 0, sizeof a);
    MOE_TRY(moei_ep_message_options(&d, &a));
    return moei_ep_message_carve(&d, &a, 0, &v, bytes);
}

/* Prepares the three routes. */
MOE_HOST moe_status moei_ep_message_prepare_routes(const moe_ep_dispatch_desc* d,
                                                   moe_ep_message_prepared* p)
{
    const moe_ep_message_view* v = &p->args.v;
    const int num_ranks = p->args.num_ranks;
    moe_route_desc r;
    moei_ep_message_route(d, v, num_ranks, v->rank_ids, &r);
    r.part_count = 0, r.num_parts = 0;
    r.num_tokens = d->num_tokens;
    r.expert_count = v->slot_count, r.expert_offset = v->slot_offset, r.place = v->place;
    r.workspace = v->route_workspace;
    MOE_TRY(moe_route_workspace(&r, &r.workspace_bytes));
    MOE_TRY(moe_route_prepare(&r, &p->slots));
    moei_ep_message_route(d, v, d->num_local ? d->num_local : 1, v->recv_ids, &r);
    r.row_multiple = d->buffers.row_multiple;
    r.max_rows = d->buffers.max_rows;
    r.expert_count = v->expert_count, r.expert_offset = v->expert_offset;
    r.row_slot = v->row_slot, r.place = v->recv_place;
    r.workspace = v->route_workspace;
    MOE_TRY(moe_route_workspace(&r, &r.workspace_bytes));
    MOE_TRY(moe_route_prepare(&r, &p->received));
    moei_ep_message_route(d, v, num_ranks, v->from_ids, &r);
    r.expert_count = v->back_count, r.expert_offset = v->back_offset, r.row_slot = v->back_slot;
    r.workspace = v->route_workspace;
    MOE_TRY(moe_route_workspace(&r, &r.workspace_bytes));
    return moe_route_prepare(&r, &p->back);
}

/* Prepares the sums at home. */
MOE_HOST moe_status moei_ep_message_prepare_sums(const moe_ep_dispatch_desc* d,
                                                 const moe_ep_combine_desc* c,
                                                 moe_ep_message_prepared* p)
{
    moe_combine_desc home;
    MOE_REQUIRE(c->rows || d->buffers.max_rows == 0, MOE_ERR_NULL, rows);
    MOE_REQUIRE(moei_aligned(c->rows, 16), MOE_ERR_ALIGN, rows);
    MOE_REQUIRE(!c->weights || c->weights == d->weights, MOE_ERR_CONFLICT, weights);
    memset(&home, 0, sizeof home);
    home.rows = p->args.v.back_recv;
    home.num_rows = (int64_t)d->num_tokens * d->buffers.top_k;
    home.place = p->args.v.place;
    home.weights = c->weights;
    home.top_k = d->buffers.top_k;
    moei_ep_describe_home(d, c, &home);
    p->args.rows = (const char*)c->rows;
    p->has_combine = 1;
    return moe_combine_prepare(&home, &p->combine);
}

/* Fills in *p, which is empty. */
MOE_HOST moe_status moei_ep_message_prepare(const moe_ep_dispatch_desc* desc,
                                            const moe_ep_combine_desc* combine,
                                            moe_ep_message_prepared* p)
{
    moe_ep_dispatch_desc d = *desc;
    moei_ep_message_args* a = &p->args;
    const moe_launch_config warp = moe_grid(1, 32, 0, 0);
    const moe_launch_config ranks = moe_grid(1, MOE_PEERS_MAX_RANKS, 0, 0);
    moe_launch_config c;
    moe_device device;
    size_t bytes;
    MOE_TRY(moe_device_query(&device));
    MOE_TRY(moei_ep_message_options(&d, a));
    MOE_TRY(moei_ep_message_carve(&d, a, (char*)d.workspace, &a->v, &bytes));
    MOE_TRY(moei_ep_check_pointers(&d, bytes));
    moei_ep_fill_args(&d, &a->pack);
    a->pack.combine_form = MOE_EP_REDUCED; /* no places of the peers' form */
    a->pack.chunk_count = d.num_tokens > MOEI_EP_ONE_LAUNCH ? a->v.chunk_count : 0;
    for (int r = 0; r < a->num_ranks; ++r)
        a->pack.peers.table[r] = a->v.send + r * a->message_bytes;
    c = moe_grid(device.sms * 2, MOEI_EP_MESSAGE_THREADS, 0, 0);
    c.dependent = 1;
    MOE_TRY(MOE_PREPARE(&p->owners, moei_ep_message_owners, c));
    MOE_TRY(moei_ep_prepare_push(&a->pack, &p->count, &p->push));
    MOE_TRY(MOE_PREPARE(&p->heads, moei_ep_message_heads, ranks));
    MOE_TRY(MOE_PREPARE(&p->unpack, moei_ep_message_unpack, c));
    c = moe_grid(device.sms * 8, MOEI_EP_MESSAGE_THREADS, 0, 0);
    c.dependent = 1;
    MOE_TRY(MOE_PREPARE(&p->pack_rows, moei_ep_message_pack_rows, c));
    MOE_TRY(MOE_PREPARE(&p->take, moei_ep_message_take, warp));
    MOE_TRY(moei_ep_message_prepare_routes(&d, p));
    return combine ? moei_ep_message_prepare_sums(&d, combine, p) : MOE_OK;
}

/* Prepares an exchange in messages. combine: null for a dispatch alone; its `dispatch` is not read.
   Errors: a status for each field that is not as documented. */
MOE_HOST moe_status moe_ep_message_prepare(const moe_ep_dispatch_desc* desc,
                                           const moe_ep_combine_desc* combine,
                                           moe_ep_message_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_ep_message_prepare(desc, combine, p));
}

/* Writes the addresses of the workspace to *view. */
MOE_HOST moe_status moe_ep_message_get_view(const moe_ep_message_prepared* p,
                                            moe_ep_message_view* view)
{
    MOE_REQUIRE(p && view, MOE_ERR_NULL, desc);
    *view = p->args.v;
    return MOE_OK;
}

/* Queues one part on `stream`. */
MOE_HOST moe_status moe_ep_message_run(const moe_ep_message_prepared* p, int part,
                                       cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    switch (part) {
    case MOE_EP_MESSAGE_PACK:
        MOE_TRY(MOE_RUN(&p->owners, p->args, stream));
        MOE_TRY(moe_route_run(&p->slots, stream));
        MOE_TRY(MOE_RUN(&p->count, p->args.pack, stream));
        MOE_TRY(MOE_RUN(&p->push, p->args.pack, stream));
        return MOE_RUN(&p->heads, p->args, stream);
    case MOE_EP_MESSAGE_UNPACK:
        MOE_TRY(MOE_RUN(&p->unpack, p->args, stream));
        MOE_TRY(moe_route_run(&p->received, stream));
        return moe_route_run(&p->back, stream);
    case MOE_EP_MESSAGE_PACK_ROWS: return MOE_RUN(&p->pack_rows, p->args, stream);
    case MOE_EP_MESSAGE_SUM:
        MOE_REQUIRE(p->has_combine, MOE_ERR_CONFLICT, part);
        MOE_TRY(MOE_RUN(&p->take, p->args, stream));
        return moe_combine_run(&p->combine, stream);
    default: return MOE_STATUS(MOE_ERR_OPTION, part);
    }
}

/* Queues copies of the headers to *counts, on the host. The caller waits for the stream. */
MOE_HOST moe_status moe_ep_message_read(const moe_ep_message_prepared* p,
                                        moe_ep_message_counts* counts, cudaStream_t stream)
{
    const size_t size = sizeof(moe_ep_message_header);
    MOE_REQUIRE(p && counts, MOE_ERR_NULL, desc);
    MOE_TRY_CUDA(cudaMemcpy2DAsync(counts->sent, size, p->args.v.send,
                                   (size_t)p->args.message_bytes, size, (size_t)p->args.num_ranks,
                                   cudaMemcpyDeviceToHost, stream));
    return moe_cuda_status(
        cudaMemcpy2DAsync(counts->received, size, p->args.v.recv, (size_t)p->args.message_bytes,
                          size, (size_t)p->args.num_ranks, cudaMemcpyDeviceToHost, stream));
}

/* Returns fault (MOE_ERR_CONFLICT) where some rank sends nothing because of a stop fault: the same on
   all ranks. *word, where not null: the largest such fault word. */
MOE_HOST moe_status moe_ep_message_check(const moe_ep_message_counts* counts, int num_ranks,
                                         uint64_t* word)
{
    uint64_t worst = 0;
    MOE_REQUIRE(counts, MOE_ERR_NULL, desc);
    for (int r = 0; r < num_ranks; ++r)
        if (MOEI_FAULT_STOPS(counts->received[r].fault) && counts->received[r].fault > worst)
            worst = counts->received[r].fault;
    if (word) *word = worst;
    MOE_REQUIRE(!worst, MOE_ERR_CONFLICT, fault);
    return MOE_OK;
}

/* Fills in segment [W]: what this rank sends to each rank and receives from it; the own entry is a
   copy. kind: moe_ep_segment_kind. counts: after the host's wait; null for the headers. */
MOE_HOST moe_status moe_ep_message_segments(const moe_ep_message_prepared* p, int kind,
                                            const moe_ep_message_counts* counts,
                                            moe_ep_segment* segment)
{
    const moei_ep_message_args* a;
    size_t out = 0, in = 0;
    MOE_REQUIRE(p && segment, MOE_ERR_NULL, desc);
    MOE_REQUIRE(kind == MOE_EP_SEGMENT_HEADERS || counts, MOE_ERR_NULL, counts);
    MOE_REQUIRE(kind >= MOE_EP_SEGMENT_HEADERS && kind <= MOE_EP_SEGMENT_ROWS, MOE_ERR_OPTION,
                kind);
    a = &p->args;
    for (int r = 0; r < a->num_ranks; ++r) {
        moe_ep_segment* s = segment + r;
        s->send = a->v.send + r * a->message_bytes;
        s->recv = a->v.recv + r * a->message_bytes;
        s->send_bytes = s->recv_bytes = sizeof(moe_ep_message_header);
        if (kind == MOE_EP_SEGMENT_RECORDS) {
            s->send = (const char*)s->send + a->record_bytes;
            s->recv = (char*)s->recv + a->record_bytes;
            s->send_bytes = (size_t)counts->sent[r].tokens * (size_t)a->record_bytes;
            s->recv_bytes = (size_t)counts->received[r].tokens * (size_t)a->record_bytes;
        } else if (kind == MOE_EP_SEGMENT_ROWS) { /* back: slots that came go out */
            s->send_bytes = (size_t)counts->received[r].slots * (size_t)a->back_bytes;
            s->recv_bytes = (size_t)counts->sent[r].slots * (size_t)a->back_bytes;
            s->send = a->v.back_send + out;
            s->recv = a->v.back_recv + in;
            out += s->send_bytes, in += s->recv_bytes;
        }
    }
    return MOE_OK;
}

/* Loads this header's kernels now rather than at their first launch; those of the stations have
   calls of their own. */
MOE_HOST moe_status moe_ep_message_preload(void)
{
    const void* const kernel[] = {
        (const void*)moei_ep_message_owners, (const void*)moei_ep_message_heads,
        (const void*)moei_ep_message_unpack, (const void*)moei_ep_message_pack_rows,
        (const void*)moei_ep_message_take,   (const void*)moei_ep_count,
        (const void*)moei_ep_push_16,        (const void*)moei_ep_push_4,
        (const void*)moei_ep_push_2};
    for (size_t i = 0; i < sizeof kernel / sizeof kernel[0]; ++i)
        MOE_TRY(moe_preload_kernel(kernel[i]));
    return MOE_OK;
}

MOEI_PRELOAD_INCLUDED(ep_message)

#endif
