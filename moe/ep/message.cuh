/* message.cuh: an exchange in messages, for ranks that do not reach each other's memory. This
   header packs and unpacks; a transport of the caller's moves the bytes. nccl.cuh is one by NCCL.

   A dispatch is one message for each other rank: a header, and a record for each token that goes
   there: row, ids, weights, scales, the token's number. Received rows stay in their messages: the
   experts read them there (view.x, view.x_stride). A combine brings back, as combine_form says:
     MOE_EP_REDUCED    a row for each token that a rank has got: the sum of its experts' rows
     MOE_EP_GATHERED   a row for each slot
   The bits of y are those of these forms over peer pointers.

   Descriptors are those of dispatch.cuh and combine.cuh. Of peers rank and num_ranks alone are
   read; of buffers the sizes and combine_form; dispatch_form is 0 or MOE_EP_DEDUPLICATED.
   combine.rows is the caller's in both forms.

   Order of one exchange, on every rank; H is the host:
     moe_ep_message_run(&p, MOE_EP_MESSAGE_PACK, stream)
     transport: segments of MOE_EP_SEGMENT_HEADERS, sizes fixed
     moe_ep_message_read(&p, counts, stream)           H waits for the stream
     moe_ep_message_check(counts, W)                   a rank has stopped: all end here, with
                                                       MOE_EP_MESSAGE_TAKE
     transport: segments of MOE_EP_SEGMENT_RECORDS
     moe_ep_message_run(&p, MOE_EP_MESSAGE_UNPACK, stream)
     experts.cuh on view.x, row maps of the view
     moe_ep_message_run(&p, MOE_EP_MESSAGE_PACK_ROWS, stream)
     transport: segments of MOE_EP_SEGMENT_ROWS and, once more, of MOE_EP_SEGMENT_HEADERS
     moe_ep_message_run(&p, MOE_EP_MESSAGE_SUM, stream)
   Segments are for moe_ep_message_segments; a rank's own is a copy in its memory.

   Bytes to each other rank: 16 and (H b + 8 K + 4 S + 4, rounded up to 16) for each token; back H r
   for each token or slot. Cost: 7 launches, gathered 12, 1 more past 1024 tokens, and a host wait;
   back 4. Not in a graph: the host reads counts. Minimum architecture: sm_75.

   Source: an all-to-all of NCCL, as every MoE without peer memory has; here deduplicated, with one
   message a pair and no copy of received rows. */
#ifndef MOE_EP_MESSAGE_CUH
#define MOE_EP_MESSAGE_CUH

#include "combine.cuh"
#include "pack.cuh"

/* A prepared exchange in messages, for the device that was current. */
typedef struct moe_ep_message_prepared {
    moei_ep_message_args args;
    moe_launch count, push;                                     /* argument: args.pack */
    moe_launch owners, heads, collect, unpack, pack_rows, take; /* argument: args */
    moe_route_prepared slots, received, back; /* empty where not needed, like the next */
    moe_combine_prepared reduce, combine;
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
    MOE_REQUIRE(b->combine_form == 0 || b->combine_form == MOE_EP_REDUCED ||
                    b->combine_form == MOE_EP_GATHERED,
                MOE_ERR_OPTION, combine_form);
    MOE_REQUIRE(!d->counters, MOE_ERR_CONFLICT, counters); /* the host has the counts */
    MOE_REQUIRE(b->wire_dtype != MOE_EP_WIRE_FP8, MOE_ERR_DTYPE, wire_dtype);
    MOE_TRY(moei_ep_check_buffers(b, d->peers->num_ranks));
    MOE_REQUIRE((int64_t)d->peers->num_ranks * ((int64_t)b->recv_tokens + 1) * b->top_k <=
                    0x7fffffff,
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
    v->recv_ids = (int32_t*)moei_carve(base, bytes, slots * 4);
    v->recv_weights = (float*)moei_carve(base, bytes, slots * 4);
    v->recv_scales = (float*)moei_carve(base, bytes, tokens * (uint64_t)b->num_scales * 4);
    v->recv_token = (int32_t*)moei_carve(base, bytes, tokens * 4);
    v->recv_count = (int32_t*)moei_carve(base, bytes, num_ranks * 4);
    v->expert_count = (int32_t*)moei_carve(base, bytes, (local ? local : 1) * 4);
    v->expert_offset = (int32_t*)moei_carve(base, bytes, (local ? local : 1) * 4 + 4);
    v->row_slot = (int32_t*)moei_carve(base, bytes, (uint64_t)b->max_rows * 4);
    v->recv_place = (moe_place*)moei_carve(base, bytes, slots * 8);
    if (b->combine_form == MOE_EP_GATHERED) {
        v->back_send = (char*)moei_carve(base, bytes, slots * (uint64_t)a->back_bytes);
        v->back_recv = (char*)moei_carve(base, bytes, own * (uint64_t)a->back_bytes);
        v->place = (moe_place*)moei_carve(base, bytes, own * 8);
        v->rank_ids = (int32_t*)moei_carve(base, bytes, own * 4);
        v->slot_count = (int32_t*)moei_carve(base, bytes, num_ranks * 4);
        v->slot_offset = (int32_t*)moei_carve(base, bytes, num_ranks * 4 + 4);
        v->from_ids = (int32_t*)moei_carve(base, bytes, slots * 4);
        v->back_count = (int32_t*)moei_carve(base, bytes, num_ranks * 4);
        v->back_offset = (int32_t*)moei_carve(base, bytes, num_ranks * 4 + 4);
        v->back_slot = (int32_t*)moei_carve(base, bytes, slots * 4);
    } else {
        const uint64_t sums = num_ranks * (uint64_t)b->recv_tokens;
        v->partial = moei_carve(base, bytes, tokens * (uint64_t)a->back_bytes);
        v->back_recv = (char*)moei_carve(base, bytes, sums * (uint64_t)a->back_bytes);
        v->send_place =
            (moe_place*)moei_carve(base, bytes, (uint64_t)d->num_tokens * num_ranks * 8);
    }
    v->counts = (moe_ep_message_counts*)moei_carve(base, bytes, sizeof *v->counts);
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

/* Writes the bytes of workspace of an exchange in messages to *bytes. Reads peers, sizes and
   options, fault, and which of replicas are given. Errors: theirs. */
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

/* Prepares the route over received slots by expert. */
MOE_HOST moe_status moei_ep_message_prepare_received(const moe_ep_dispatch_desc* d,
                                                     moe_ep_message_prepared* p)
{
    const moe_ep_message_view* v = &p->args.v;
    moe_route_desc r;
    moei_ep_message_route(d, v, d->num_local ? d->num_local : 1, v->recv_ids, &r);
    r.row_multiple = d->buffers.row_multiple;
    r.max_rows = d->buffers.max_rows;
    r.expert_count = v->expert_count, r.expert_offset = v->expert_offset;
    r.row_slot = v->row_slot, r.place = v->recv_place;
    r.workspace = v->route_workspace;
    MOE_TRY(moe_route_workspace(&r, &r.workspace_bytes));
    return moe_route_prepare(&r, &p->received);
}

/* Prepares what the gathered form needs to number rows: this rank's slots by owner, received slots
   by sender. */
MOE_HOST moe_status moei_ep_message_prepare_slots(const moe_ep_dispatch_desc* d,
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
    moei_ep_message_route(d, v, num_ranks, v->from_ids, &r);
    r.expert_count = v->back_count, r.expert_offset = v->back_offset, r.row_slot = v->back_slot;
    r.workspace = v->route_workspace;
    MOE_TRY(moe_route_workspace(&r, &r.workspace_bytes));
    return moe_route_prepare(&r, &p->back);
}

/* Prepares this rank's sums for received tokens. */
MOE_HOST moe_status moei_ep_message_prepare_reduce(const moe_ep_dispatch_desc* d,
                                                   const moe_ep_combine_desc* c,
                                                   moe_ep_message_prepared* p)
{
    const moe_ep_message_view* v = &p->args.v;
    moe_combine_desc sum;
    memset(&sum, 0, sizeof sum);
    sum.rows = c->rows;
    sum.num_rows = v->num_rows;
    sum.place = v->recv_place;
    sum.weights = c->weights ? v->recv_weights : 0;
    sum.y = v->partial;
    sum.rows_dtype = sum.y_dtype = d->buffers.rows_dtype;
    sum.fault = d->fault;
    sum.rank = p->args.rank;
    sum.num_tokens = v->num_x;
    sum.hidden = d->buffers.hidden;
    sum.top_k = d->buffers.top_k;
    return moe_combine_prepare(&sum, &p->reduce);
}

/* Prepares the sums at home. outside: 1: view.partial is written elsewhere, there are no rows. */
MOE_HOST moe_status moei_ep_message_prepare_sums(const moe_ep_dispatch_desc* d,
                                                 const moe_ep_combine_desc* c, int outside,
                                                 moe_ep_message_prepared* p)
{
    const int gathers = d->buffers.combine_form == MOE_EP_GATHERED;
    moe_combine_desc home;
    MOE_REQUIRE(c->rows || outside || d->buffers.max_rows == 0, MOE_ERR_NULL, rows);
    MOE_REQUIRE(moei_aligned(c->rows, 16), MOE_ERR_ALIGN, rows);
    MOE_REQUIRE(!c->weights || c->weights == d->weights, MOE_ERR_CONFLICT, weights);
    memset(&home, 0, sizeof home);
    home.rows = p->args.v.back_recv;
    home.num_rows = gathers ? (int64_t)d->num_tokens * d->buffers.top_k
                            : (int64_t)p->args.num_ranks * d->buffers.recv_tokens;
    home.place = gathers ? p->args.v.place : p->args.v.send_place;
    home.weights = gathers ? c->weights : 0;
    home.top_k = gathers ? d->buffers.top_k : p->args.num_ranks;
    moei_ep_describe_home(d, c, &home);
    p->args.rows = (const char*)c->rows;
    p->has_combine = 1;
    if (!gathers && !outside) MOE_TRY(moei_ep_message_prepare_reduce(d, c, p));
    return moe_combine_prepare(&home, &p->combine);
}

/* Fills in *p, which is empty. outside: 1: no row maps and no sums here (hosts.cuh). */
MOE_HOST moe_status moei_ep_message_prepare(const moe_ep_dispatch_desc* desc,
                                            const moe_ep_combine_desc* combine, int outside,
                                            moe_ep_message_prepared* p)
{
    moe_ep_dispatch_desc d = *desc;
    moei_ep_message_args* a = &p->args;
    const moe_launch_config warp = moe_grid(1, 32, 0, 0);
    const moe_launch_config ranks = moe_grid(1, MOE_PEERS_MAX_RANKS, 0, 0);
    moe_launch_config c;
    moe_device device;
    moe_peers numbers;
    size_t bytes;
    MOE_TRY(moe_device_query(&device));
    MOE_TRY(moei_ep_message_options(&d, a));
    MOE_TRY(moei_ep_message_carve(&d, a, (char*)d.workspace, &a->v, &bytes));
    numbers = *d.peers;
    numbers.base = 0, numbers.bytes = 0; /* a region takes no part */
    d.peers = &numbers;
    MOE_REQUIRE(!d.row_weight, MOE_ERR_CONFLICT, row_weight);
    MOE_TRY(moei_ep_check_pointers(&d, 0, bytes));
    moei_ep_fill_args(&d, &a->pack);
    a->pack.combine_form = MOE_EP_REDUCED; /* no places of the peers' form */
    a->pack.send_place = a->v.send_place;
    a->pack.chunk_count = d.num_tokens > MOEI_EP_ONE_LAUNCH ? a->v.chunk_count : 0;
    for (int r = 0; r < a->num_ranks; ++r)
        a->pack.peers.table[r] = a->v.send + r * a->message_bytes;
    c = moe_grid(device.sms * 2, MOEI_EP_MESSAGE_THREADS, 0, 0);
    c.dependent = 1;
    if (a->v.rank_ids) MOE_TRY(MOE_PREPARE(&p->owners, moei_ep_message_owners, c));
    MOE_TRY(moei_ep_prepare_push(&a->pack, &p->count, &p->push));
    MOE_TRY(MOE_PREPARE(&p->heads, moei_ep_message_heads, ranks));
    MOE_TRY(MOE_PREPARE(&p->collect, moei_ep_message_collect, ranks));
    MOE_TRY(MOE_PREPARE(&p->unpack, moei_ep_message_unpack, c));
    c = moe_grid(device.sms * 8, MOEI_EP_MESSAGE_THREADS, 0, 0);
    c.dependent = 1;
    MOE_TRY(MOE_PREPARE(&p->pack_rows, moei_ep_message_pack_rows, c));
    MOE_TRY(MOE_PREPARE(&p->take, moei_ep_message_take, warp));
    if (a->v.rank_ids) MOE_TRY(moei_ep_message_prepare_slots(&d, p));
    if (!outside) MOE_TRY(moei_ep_message_prepare_received(&d, p));
    return combine ? moei_ep_message_prepare_sums(&d, combine, outside, p) : MOE_OK;
}

/* Prepares an exchange in messages. combine: null for a dispatch alone; its `dispatch` is not read.
   Errors: a status for each field that is not as documented. */
MOE_HOST moe_status moe_ep_message_prepare(const moe_ep_dispatch_desc* desc,
                                           const moe_ep_combine_desc* combine,
                                           moe_ep_message_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_ep_message_prepare(desc, combine, 0, p));
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
    case MOE_EP_MESSAGE_PACK_ROWS:
        MOE_TRY(moe_combine_run(&p->reduce, stream));
        return MOE_RUN(&p->pack_rows, p->args, stream);
    case MOE_EP_MESSAGE_SUM:
        MOE_REQUIRE(p->has_combine, MOE_ERR_CONFLICT, part);
        MOE_TRY(MOE_RUN(&p->take, p->args, stream));
        return moe_combine_run(&p->combine, stream);
    case MOE_EP_MESSAGE_TAKE: return MOE_RUN(&p->take, p->args, stream);
    default: return MOE_STATUS(MOE_ERR_OPTION, part);
    }
}

/* Queues a copy of all headers to *counts, on the host. The caller waits for the stream. */
MOE_HOST moe_status moe_ep_message_read(const moe_ep_message_prepared* p,
                                        moe_ep_message_counts* counts, cudaStream_t stream)
{
    MOE_REQUIRE(p && counts, MOE_ERR_NULL, desc);
    MOE_TRY(MOE_RUN(&p->collect, p->args, stream));
    return moe_cuda_status(
        cudaMemcpyAsync(counts, p->args.v.counts, sizeof *counts, cudaMemcpyDeviceToHost, stream));
}

/* Returns fault (MOE_ERR_CONFLICT) where some rank sends nothing because of a stop fault: the same
   on all ranks. *word, where not null: the largest such fault word. */
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
        MOE_REQUIRE(kind == MOE_EP_SEGMENT_HEADERS ||
                        (counts->received[r].tokens >= 0 &&
                         counts->received[r].tokens < a->records && counts->sent[r].slots >= 0),
                    MOE_ERR_RANGE, recv_tokens); /* ranks differ in buffers */
        s->send = a->v.send + r * a->message_bytes;
        s->recv = a->v.recv + r * a->message_bytes;
        s->send_bytes = s->recv_bytes = sizeof(moe_ep_message_header);
        if (kind == MOE_EP_SEGMENT_RECORDS) {
            s->send = (const char*)s->send + a->record_bytes;
            s->recv = (char*)s->recv + a->record_bytes;
            s->send_bytes = (size_t)counts->sent[r].tokens * (size_t)a->record_bytes;
            s->recv_bytes = (size_t)counts->received[r].tokens * (size_t)a->record_bytes;
        } else if (kind == MOE_EP_SEGMENT_ROWS && a->v.partial) { /* back: what came goes out */
            s->send = (const char*)a->v.partial + r * a->records * a->back_bytes;
            s->recv = a->v.back_recv + r * (a->records - 1) * a->back_bytes;
            s->send_bytes = (size_t)counts->received[r].tokens * (size_t)a->back_bytes;
            s->recv_bytes = (size_t)counts->sent[r].tokens * (size_t)a->back_bytes;
        } else if (kind == MOE_EP_SEGMENT_ROWS) {
            s->send_bytes = (size_t)counts->received[r].slots * (size_t)a->back_bytes;
            s->recv_bytes = (size_t)counts->sent[r].slots * (size_t)a->back_bytes;
            s->send = a->v.back_send + out;
            s->recv = a->v.back_recv + in;
            out += s->send_bytes, in += s->recv_bytes;
        }
    }
    return MOE_OK;
}

/* Loads the kernels of pack.cuh now rather than at their first launch; the others have calls of
   their own. */
MOE_HOST moe_status moe_ep_message_preload(void)
{
    const void* const kernel[] = {
        (const void*)moei_ep_message_owners,    (const void*)moei_ep_message_heads,
        (const void*)moei_ep_message_collect,   (const void*)moei_ep_message_unpack,
        (const void*)moei_ep_message_pack_rows, (const void*)moei_ep_message_take};
    for (size_t i = 0; i < sizeof kernel / sizeof kernel[0]; ++i)
        MOE_TRY(moe_preload_kernel(kernel[i]));
    return MOE_OK;
}

MOEI_PRELOAD_INCLUDED(ep_message)

#endif
