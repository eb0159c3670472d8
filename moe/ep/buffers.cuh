/* buffers.cuh: what a dispatch's descriptor means: checks, defaults, where each buffer is in the
   region (desc.h) and in the workspace. Called by dispatch.cuh and combine.cuh.

     moe_ep_buffers_end(&buffers, W, &bytes)      bytes of each rank's region
     moe_ep_dispatch_workspace(&desc, &bytes)     bytes of workspace
     moe_ep_dispatch_get_view(&desc, &view)       addresses of all buffers */
#ifndef MOE_EP_BUFFERS_CUH
#define MOE_EP_BUFFERS_CUH

#include "../route.cuh"
#include "peers.cuh"
#include "push.cuh"

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
    if (b->dispatch_form == 0) b->dispatch_form = MOE_EP_DEDUPLICATED;
    MOE_REQUIRE(b->dispatch_form >= MOE_EP_DEDUPLICATED &&
                    b->dispatch_form <= MOE_EP_ALL_GATHER_COPY,
                MOE_ERR_OPTION, dispatch_form);
    if (b->combine_form == 0) b->combine_form = MOE_EP_REDUCED;
    MOE_REQUIRE(b->combine_form >= MOE_EP_REDUCED && b->combine_form <= MOE_EP_REDUCE_SCATTER,
                MOE_ERR_OPTION, combine_form);
    MOE_REQUIRE(b->hidden >= 8 && b->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(b->hidden % 8 == 0, MOE_ERR_MULTIPLE, hidden);
    MOE_REQUIRE(b->num_experts >= 1 && b->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(b->top_k >= 1 && b->top_k <= 2048, MOE_ERR_RANGE, top_k); /* of combine */
    if (b->dtype == 0) b->dtype = MOE_BF16;
    MOE_REQUIRE(moe_dtype_bytes(b->dtype), MOE_ERR_DTYPE, dtype);
    if (b->rows_dtype == 0) b->rows_dtype = b->dtype;
    MOE_REQUIRE(moe_dtype_bytes(b->rows_dtype), MOE_ERR_DTYPE, rows_dtype);
    MOE_REQUIRE(b->wire_dtype == 0 || b->wire_dtype == b->dtype ||
                    (b->wire_dtype == MOE_EP_WIRE_FP8 && b->dtype != MOE_FP32),
                MOE_ERR_DTYPE, wire_dtype);
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

/* Returns the rows of recv_x. Requires checked buffers, here and below. */
MOE_HOST int64_t moei_ep_num_x(const moe_ep_buffers* b, int num_ranks)
{
    return b->dispatch_form == MOE_EP_ALL_TO_ALL ? b->max_rows
                                                 : (int64_t)num_ranks * b->recv_tokens;
}

/* Must a home know where the rows of its slots are? */
MOE_HOST int moei_ep_has_place(const moe_ep_buffers* b)
{
    return moei_ep_forms_answer(b->dispatch_form, b->combine_form);
}

/* Fills in the layout. */
MOE_HOST void moei_ep_lay_out(const moe_ep_buffers* b, int num_ranks, moei_ep_layout* at)
{
    const uint64_t rows = (uint64_t)num_ranks * (uint64_t)b->recv_tokens;
    const uint64_t hidden = (uint64_t)b->hidden, top_k = (uint64_t)b->top_k;
    const uint64_t row_bytes = hidden * (uint64_t)moe_dtype_bytes(b->rows_dtype);
    const uint64_t num_x = (uint64_t)moei_ep_num_x(b, num_ranks);
    memset(at, 0, sizeof *at);
    at->end = b->region_offset;
    at->recv_x = moei_ep_take(&at->end, num_x * hidden * (uint64_t)moe_dtype_bytes(b->dtype));
    at->recv_scales = moei_ep_take(&at->end, num_x * (uint64_t)b->num_scales * 4);
    if (b->wire_dtype == MOE_EP_WIRE_FP8) {
        at->wire = moei_ep_take(&at->end, num_x * hidden);
        at->wire_scales =
            moei_ep_take(&at->end, num_x * ((hidden + MOE_FP8_GROUP - 1) / MOE_FP8_GROUP) * 4);
    }
    at->recv_ids = moei_ep_take(&at->end, rows * top_k * 4);
    at->recv_weights = moei_ep_take(&at->end, rows * top_k * 4);
    at->recv_token = moei_ep_take(&at->end, rows * 4);
    at->recv_count = moei_ep_take(&at->end, (uint64_t)num_ranks * 4);
    if (b->combine_form != MOE_EP_GATHERED) at->partial = moei_ep_take(&at->end, rows * row_bytes);
    if (moei_ep_has_place(b))
        at->place = moei_ep_take(&at->end, (uint64_t)b->max_tokens * top_k * 8);
    if (b->combine_form == MOE_EP_GATHERED)
        at->rows = moei_ep_take(&at->end, (uint64_t)b->max_rows * row_bytes);
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

/* Refuses what a call of these checked buffers cannot be; fills in the defaults. */
MOE_HOST moe_status moei_ep_check_call(moe_ep_dispatch_desc* d)
{
    const moe_ep_buffers* b = &d->buffers;
    MOE_REQUIRE(d->num_tokens >= 0 && d->num_tokens <= b->max_tokens, MOE_ERR_RANGE, num_tokens);
    if (d->x_stride == 0) d->x_stride = b->hidden;
    MOE_REQUIRE(moei_stride_fits(d->x_stride, b->hidden, d->num_tokens), MOE_ERR_STRIDE, x_stride);
    MOE_REQUIRE(b->wire_dtype != MOE_EP_WIRE_FP8 || d->x_stride % 8 == 0, MOE_ERR_ALIGN, x_stride);
    MOE_REQUIRE(d->tag >= 0 && d->tag < 1 << 24, MOE_ERR_RANGE, tag);
    MOE_REQUIRE(d->max_blocks >= 0 && d->max_blocks <= MOEI_EP_MAX_CHUNKS, MOE_ERR_RANGE,
                max_blocks);
    MOE_REQUIRE(!d->replica_offset == !d->replica, MOE_ERR_CONFLICT, replica);
    MOE_REQUIRE(b->num_scales || !d->scales, MOE_ERR_CONFLICT, scales);
    MOE_REQUIRE(d->num_local >= 0 && d->num_local <= MOE_MAX_EXPERTS, MOE_ERR_RANGE, num_local);
    if (!d->replica_offset) {
        const int owned = moe_ep_owned(d->peers->rank, b->num_experts, d->peers->num_ranks);
        MOE_REQUIRE(!d->num_local || d->num_local == owned, MOE_ERR_CONFLICT, num_local);
        d->num_local = owned;
    }
    return MOE_OK;
}

/* Refuses sizes and options; fills in the defaults. */
MOE_HOST moe_status moei_ep_check_options(moe_ep_dispatch_desc* d, moei_ep_args* a)
{
    const moe_ep_buffers* b = &d->buffers;
    MOE_TRY(moei_peers_resolve(d->peers, d->fault, &a->peers));
    MOE_TRY(moei_ep_check_buffers(&d->buffers, d->peers->num_ranks));
    moei_ep_lay_out(b, d->peers->num_ranks, &a->at);
    moei_ep_set_steps(&a->at, d->peers->rank, b->recv_tokens, b->top_k, b->num_scales,
                      (int64_t)b->hidden * moe_dtype_bytes(b->dtype));
    MOE_REQUIRE(a->at.end <= d->peers->bytes, MOE_ERR_RANGE, region_bytes);
    MOE_TRY(moei_ep_check_call(d));
    if (b->dispatch_form == MOE_EP_ALL_GATHER_COPY) {
        MOE_REQUIRE(d->side_stream, MOE_ERR_NULL, side_stream);
        MOE_REQUIRE(d->side_event[0] && d->side_event[1], MOE_ERR_NULL, side_event);
        MOE_REQUIRE(d->side_event[0] != d->side_event[1], MOE_ERR_CONFLICT, side_event);
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
    v->num_x = moei_ep_num_x(b, a->peers.num_ranks);
    v->in_order = b->dispatch_form == MOE_EP_ALL_TO_ALL;
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
    if (b->combine_form != MOE_EP_GATHERED) {
        v->partial = own + a->at.partial;
        v->send_place =
            (moe_place*)moei_carve(base, bytes, (uint64_t)d->num_tokens * num_ranks * 8);
    } else {
        v->rows = own + a->at.rows;
    }
    if (moei_ep_has_place(b)) v->place = (moe_place*)(own + a->at.place);
    if (b->combine_form != MOE_EP_REDUCED)
        v->rows_table = (void**)moei_carve(base, bytes, num_ranks * 8);
    v->route_workspace = moei_carve(base, bytes, route);
    return MOE_OK;
}

/* Writes the bytes of workspace of a dispatch to *bytes, each buffer rounded up to 256:
   128 W 4, P 4, (P + 1) 4, max_rows 4, W C K 8, the bytes of moe_route_workspace for W C tokens;
   T W 8 unless gathered; W 8 unless reduced. Reads peers, sizes and options, fault, and which of
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
   options. num_rows: rows in expert order. */
MOE_HOST moe_status moei_ep_check_pointers(const moe_ep_dispatch_desc* d, int64_t num_rows,
                                           size_t workspace)
{
    const moe_ep_buffers* b = &d->buffers;
    const uint64_t slots = (uint64_t)d->num_tokens * (uint64_t)b->top_k;
    const uint32_t align = b->wire_dtype == MOE_EP_WIRE_FP8 ? 16 : b->dtype == MOE_FP32 ? 4 : 2;
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
        {d->counters, sizeof *d->counters, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_counters},
        {d->row_weight, (uint64_t)num_rows * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_row_weight},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    MOE_REQUIRE(!d->workspace || d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE,
                workspace_bytes);
    return moe_check_buffers(list, (int)(sizeof list / sizeof list[0]));
}

/* Fills in what kernels take of a checked descriptor: all but peers, layout and the view. */
MOE_HOST void moei_ep_fill_args(const moe_ep_dispatch_desc* d, moei_ep_args* a)
{
    const moe_ep_buffers* b = &d->buffers;
    const int64_t most = d->max_blocks ? d->max_blocks : MOEI_EP_MAX_CHUNKS;
    const int64_t blocks = d->num_tokens < most ? d->num_tokens : most;
    a->x = (const char*)d->x;
    a->scales = d->scales;
    a->ids = d->ids;
    a->weights = d->weights;
    a->replica_offset = d->replica_offset;
    a->replica = d->replica;
    a->dispatch_form = b->dispatch_form;
    a->combine_form = b->combine_form;
    a->max_rows = b->max_rows;
    a->sum_bytes = (int64_t)b->hidden * moe_dtype_bytes(b->rows_dtype);
    a->counters = d->counters;
    a->waited = d->counters ? &d->counters->dispatch_wait_ns : 0;
    a->num_local = d->num_local;
    a->x_pitch = d->x_stride * moe_dtype_bytes(b->dtype);
    a->row_bytes = (int64_t)b->hidden * moe_dtype_bytes(b->dtype);
    a->num_tokens = d->num_tokens;
    a->num_experts = b->num_experts;
    a->top_k = b->top_k;
    a->recv_tokens = b->recv_tokens;
    a->num_scales = b->num_scales;
    a->dtype = b->dtype;
    a->wire_fp8 = b->wire_dtype == MOE_EP_WIRE_FP8;
    a->chunk_tokens = blocks ? (int32_t)((d->num_tokens + blocks - 1) / blocks) : 1;
    a->channel = b->channel;
    a->tag = d->tag;
}

/* Checks a descriptor, fills in its defaults, the kernels' argument and the view. */
MOE_HOST moe_status moei_ep_resolve(moe_ep_dispatch_desc* d, moei_ep_args* a, moe_ep_view* v)
{
    const moe_ep_buffers* b = &d->buffers;
    size_t bytes;
    memset(a, 0, sizeof *a);
    MOE_TRY(moei_ep_check_options(d, a));
    MOE_TRY(moei_ep_carve(d, a, (char*)d->workspace, v, &bytes));
    MOE_TRY(moei_ep_check_pointers(d, v->num_rows, bytes));
    moei_ep_fill_args(d, a);
    a->chunk_count = d->num_tokens > MOEI_EP_ONE_LAUNCH && !moei_ep_to_all(a) ? v->chunk_count : 0;
    a->send_place = v->send_place;
    a->recv_place = v->recv_place;
    a->row_slot = v->row_slot;
    a->expert_count = v->expert_count;
    a->expert_offset = v->expert_offset;
    a->rows_table = v->rows_table;
    a->table_at = a->at.rows;
    if (b->combine_form == MOE_EP_REDUCE_SCATTER) /* the sums for this rank */
        a->table_at = a->at.partial +
                      (uint64_t)a->peers.rank * (uint64_t)b->recv_tokens * (uint64_t)a->sum_bytes;
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

#endif
