/* hosts.cuh: an exchange over several hosts: between hosts in messages (message.cuh), within a host
   over peer pointers (dispatch.cuh, combine.cuh).

     There are M hosts of L ranks each. Rank (h, l) is rank l of host h.
     Its rail are the M ranks (0, l), (1, l), ...
     1. each token goes once to each host that has an expert of it, to the rank of the rail there
     2. there it is dispatched like a token of that host: once to each rank with an expert of it
     3. the host's sum of the token's rows comes to that rank
     4. the sums go home along the rail; y = residual + sums in ascending host + shared

   Experts: host h has P_h = moe_ep_owned(h, E, M), from moe_ep_first(h, E, M) on. Rank l of it has
   moe_ep_owned(l, P_h, L) of these. moe_ep_hosts_experts returns a rank's. E >= M. No replicas.

   Each host's sum is rounded to dtype. Equal inputs give equal bits for given M and L.

   Bytes between hosts, per rank: as of message.cuh with M ranks, one row a token in either
   direction. Within a host: as of dispatch.cuh, for M (C + 1) tokens of which those that came
   exist. Minimum architecture: sm_75.

     moe_ep_hosts_desc d = {0};
     d.dispatch.x = x;  ...                     // of this rank's tokens, as in dispatch.cuh
     d.dispatch.peers = &rail;                  // rank = h, num_ranks = M; nothing else is read
     d.combine.y = y;  d.combine.weights = ...; // as in combine.cuh; rows null
     d.near = &peers;                           // the group of this host's ranks
     d.rows = rows;                             // the experts' rows
     moe_ep_hosts_region(&d, L, &bytes);        // of each region of the host's group
     moe_ep_hosts_workspace(&d, &bytes);
     moe_ep_hosts_prepare(&d, &p);

   With NCCL (nccl.cuh):
     moe_nccl_hosts_dispatch(&p, comm, counts, stream);
     ... experts.cuh on p.view ...
     moe_nccl_hosts_combine(&p, comm, counts, stream);

   With another transport, in this order:
     message.cuh's steps on p.rail, up to MOE_EP_MESSAGE_UNPACK
     moe_ep_dispatch_run(&p.dispatch, stream)
     experts.cuh on p.view
     moe_ep_combine_run(&p.combine, stream)
     message.cuh's steps on p.rail from MOE_EP_MESSAGE_PACK_ROWS on */
#ifndef MOE_EP_HOSTS_CUH
#define MOE_EP_HOSTS_CUH

#include "message.cuh"

/* What an exchange over hosts takes. */
typedef struct moe_ep_hosts_desc {
    /* over hosts: of this rank's tokens; its workspace is that of both exchanges; no replicas,
       num_local 0, no counters */
    moe_ep_dispatch_desc dispatch;
    moe_ep_combine_desc combine; /* home; `dispatch` and rows null */
    const moe_peers* near;       /* the group of this host's ranks */
    const void* rows; /* of the experts; null where near_buffers.combine_form is gathered */
    /* of this host's exchange: region_offset, channel, forms, recv_tokens, max_rows, row_multiple,
       rows_dtype; else 0 */
    moe_ep_buffers near_buffers;
    void *side_stream, *side_event[2]; /* of this host's exchange, as in moe_ep_dispatch_desc */
    moe_ep_counters* counters;         /* likewise */
} moe_ep_hosts_desc;

/* A prepared exchange over hosts. */
typedef struct moe_ep_hosts_prepared {
    moe_ep_message_prepared rail;
    moe_ep_dispatch_prepared dispatch;
    moe_ep_combine_prepared combine;
    moe_ep_view view; /* of this host's exchange: what the experts run on */
} moe_ep_hosts_prepared;

/* Writes the first expert of rank `local` of a host, and the number of its experts. */
MOE_HOST void moe_ep_hosts_experts(int host, int num_hosts, int local, int num_local_ranks,
                                   int num_experts, int* first, int* count)
{
    const int here = moe_ep_owned(host, num_experts, num_hosts);
    *first = moe_ep_first(host, num_experts, num_hosts);
    *count = 0;
    if (here == 0) return;
    *first += moe_ep_first(local, here, num_local_ranks);
    *count = moe_ep_owned(local, here, num_local_ranks);
}

/* Fills in the sizes of this host's exchange. Requires d->dispatch.peers. */
MOE_HOST moe_status moei_ep_hosts_buffers(const moe_ep_hosts_desc* d, moe_ep_buffers* b)
{
    const moe_ep_buffers* far = &d->dispatch.buffers;
    const int32_t most = far->recv_tokens ? far->recv_tokens : far->max_tokens;
    *b = d->near_buffers;
    MOE_REQUIRE(!b->hidden && !b->num_experts && !b->top_k && !b->dtype && !b->num_scales &&
                    !b->max_tokens,
                MOE_ERR_CONFLICT, buffers);
    MOE_REQUIRE(d->dispatch.peers, MOE_ERR_NULL, peers);
    MOE_REQUIRE(
        d->dispatch.peers->num_ranks >= 1 && d->dispatch.peers->num_ranks <= MOE_PEERS_MAX_RANKS &&
            d->dispatch.peers->rank >= 0 && d->dispatch.peers->rank < d->dispatch.peers->num_ranks,
        MOE_ERR_RANGE, peers);
    MOE_REQUIRE(far->num_experts >= d->dispatch.peers->num_ranks, MOE_ERR_RANGE, num_experts);
    MOE_REQUIRE(most >= 0 && ((int64_t)most + 1) * d->dispatch.peers->num_ranks <= 0x7fffffff,
                MOE_ERR_RANGE, max_tokens);
    b->max_tokens = (most + 1) * d->dispatch.peers->num_ranks;
    b->hidden = far->hidden;
    b->num_experts =
        moe_ep_owned(d->dispatch.peers->rank, far->num_experts, d->dispatch.peers->num_ranks);
    b->top_k = far->top_k;
    b->dtype = far->dtype;
    b->num_scales = far->num_scales;
    return MOE_OK;
}

/* Writes the bytes that the regions of a host with so many ranks must have to *bytes. Reads
   dispatch.peers and the sizes of both buffers. Errors: theirs; num_experts: below the hosts. */
MOE_HOST moe_status moe_ep_hosts_region(const moe_ep_hosts_desc* desc, int num_local_ranks,
                                        uint64_t* bytes)
{
    moe_ep_buffers b;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    MOE_TRY(moei_ep_hosts_buffers(desc, &b));
    return moe_ep_buffers_end(&b, num_local_ranks, bytes);
}

/* Fills in both descriptors of this host's exchange from the messages' view; the workspace begins
   at `base`, null to count its bytes. */
MOE_HOST moe_status moei_ep_hosts_describe(const moe_ep_hosts_desc* d, const moe_ep_message_view* v,
                                           moe_ep_dispatch_desc* near, moe_ep_combine_desc* back)
{
    memset(near, 0, sizeof *near);
    memset(back, 0, sizeof *back);
    MOE_TRY(moei_ep_hosts_buffers(d, &near->buffers));
    near->peers = d->near;
    near->x = v->x;
    near->x_stride = v->x_stride;
    near->scales = d->dispatch.buffers.num_scales ? v->recv_scales : 0;
    near->ids = v->recv_ids;
    near->weights = v->recv_weights;
    near->fault = d->dispatch.fault;
    near->counters = d->counters;
    near->num_tokens = v->num_x;
    near->tag = d->dispatch.tag;
    near->side_stream = d->side_stream;
    near->side_event[0] = d->side_event[0], near->side_event[1] = d->side_event[1];
    back->dispatch = near;
    back->rows = d->rows;
    back->weights = d->combine.weights ? near->weights : 0;
    back->y = v->partial;
    back->tag = d->combine.tag;
    return MOE_OK;
}

/* Carves both workspaces at `base`: the messages' at its begin, this host's at *near. */
MOE_HOST moe_status moei_ep_hosts_carve(const moe_ep_hosts_desc* d, char* base, size_t* far,
                                        size_t* near, size_t* bytes)
{
    moe_ep_dispatch_desc rail = d->dispatch, host;
    moe_ep_combine_desc back;
    moei_ep_message_args a;
    moe_ep_message_view v;
    MOE_REQUIRE(!rail.replica_offset && !rail.replica, MOE_ERR_CONFLICT, replica);
    MOE_REQUIRE(!rail.num_local, MOE_ERR_CONFLICT, num_local);
    MOE_REQUIRE(rail.buffers.combine_form == 0 || rail.buffers.combine_form == MOE_EP_REDUCED,
                MOE_ERR_OPTION, combine_form);
    MOE_REQUIRE(!rail.buffers.rows_dtype || rail.buffers.rows_dtype == rail.buffers.dtype,
                MOE_ERR_DTYPE, rows_dtype);
    memset(&a, 0, sizeof a);
    MOE_TRY(moei_ep_message_options(&rail, &a));
    MOE_TRY(moei_ep_message_carve(&rail, &a, base, &v, far));
    MOE_TRY(moei_ep_hosts_describe(d, &v, &host, &back));
    MOE_TRY(moe_ep_dispatch_workspace(&host, near));
    *bytes = 0;
    (void)moei_carve(base, bytes, *far);
    (void)moei_carve(base, bytes, *near);
    return MOE_OK;
}

/* Writes the bytes of workspace to *bytes. Reads sizes, options, both groups and the fault word.
   Errors: theirs. */
MOE_HOST moe_status moe_ep_hosts_workspace(const moe_ep_hosts_desc* desc, size_t* bytes)
{
    size_t far, near;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    *bytes = 0;
    return moei_ep_hosts_carve(desc, 0, &far, &near, bytes);
}

/* Fills in *p, which is empty. */
MOE_HOST moe_status moei_ep_hosts_prepare(const moe_ep_hosts_desc* d, moe_ep_hosts_prepared* p)
{
    moe_ep_dispatch_desc rail = d->dispatch, host;
    moe_ep_combine_desc home = d->combine, back;
    size_t far, near, bytes;
    MOE_REQUIRE(!home.dispatch, MOE_ERR_CONFLICT, dispatch);
    MOE_REQUIRE(!home.rows, MOE_ERR_CONFLICT, rows);
    MOE_TRY(moei_ep_hosts_carve(d, (char*)rail.workspace, &far, &near, &bytes));
    MOE_REQUIRE(rail.workspace, MOE_ERR_NULL, workspace);
    MOE_REQUIRE(rail.workspace_bytes >= bytes, MOE_ERR_WORKSPACE, workspace_bytes);
    rail.workspace_bytes = far;
    MOE_TRY(moei_ep_message_prepare(&rail, &home, 1, &p->rail));
    MOE_TRY(moei_ep_hosts_describe(d, &p->rail.args.v, &host, &back));
    bytes = far;
    host.workspace = moei_carve((char*)rail.workspace, &bytes, near);
    host.workspace_bytes = near;
    MOE_TRY(moe_ep_dispatch_prepare(&host, &p->dispatch));
    MOE_TRY(moe_ep_dispatch_get_view(&host, &p->view));
    return moe_ep_combine_prepare(&back, &p->combine);
}

/* Prepares an exchange over hosts. Errors: a status for each field that is not as documented. */
MOE_HOST moe_status moe_ep_hosts_prepare(const moe_ep_hosts_desc* desc, moe_ep_hosts_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_ep_hosts_prepare(desc, p));
}

#endif
