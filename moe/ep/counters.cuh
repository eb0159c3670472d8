/* counters.cuh: adds what one exchange has cost to a rank's counters (moe_ep_counters), for
   monitoring and for balancing. Called by combine.cuh, ahead of its own launches: after those,
   peers may write the ids of the next exchange.

   Rows come from the ids: those of this rank's tokens say what it sent, the received ones what it
   returned. The kernels that wait add their waits themselves (moei_peer_reach_timed).
   Reads T K + W C K ids: a few microseconds. */
#ifndef MOE_EP_COUNTERS_CUH
#define MOE_EP_COUNTERS_CUH

#include "push.cuh"

/* Rows of a rank's exchange. */
typedef struct moei_ep_tallies {
    int tokens_out,
        slots_out;           /* this rank's tokens at other ranks, once a rank; their slots there */
    int tokens_in, slots_in; /* other ranks' tokens with a slot here; their slots here */
} moei_ep_tallies;

/* Adds own token t. */
MOE_DEVICE void moei_ep_tally_out(moei_ep_tallies* n, const moei_ep_args* a, int t)
{
    uint32_t to[MOE_PEERS_MAX_RANKS / 32] = {0}; /* bit r: goes to rank r */
    MOE_NO_UNROLL
    for (int k = 0; k < a->top_k; ++k) {
        const int r = moei_ep_target(a, t, k, a->ids[(int64_t)t * a->top_k + k]).rank;
        if (r < 0 || r == a->peers.rank) continue;
        n->slots_out += 1;
        MOE_UNROLL
        for (int w = 0; w < MOE_PEERS_MAX_RANKS / 32; ++w)
            to[w] |= r >> 5 == w ? 1u << (r & 31) : 0;
    }
    MOE_UNROLL
    for (int w = 0; w < MOE_PEERS_MAX_RANKS / 32; ++w) n->tokens_out += __popc(to[w]);
}

/* Adds number i of the tokens that have room here. */
MOE_DEVICE void moei_ep_tally_in(moei_ep_tallies* n, const moei_ep_args* a, int i)
{
    const int from = i / a->recv_tokens, j = i - from * a->recv_tokens;
    const int32_t* ids = (const int32_t*)(a->peers.base + a->at.recv_ids) + (int64_t)i * a->top_k;
    const int before = n->slots_in;
    if (from == a->peers.rank || j >= ((const int32_t*)(a->peers.base + a->at.recv_count))[from])
        return;
    MOE_NO_UNROLL
    for (int k = 0; k < a->top_k; ++k) n->slots_in += ids[k] >= 0;
    n->tokens_in += n->slots_in != before;
}

/* Adds v of all lanes to a word. One warp. */
MOE_DEVICE void moei_ep_count_up(uint64_t* word, uint64_t v)
{
    MOE_NO_UNROLL
    for (int d = MOE_WARP_SIZE >> 1; d > 0; d >>= 1) v += __shfl_xor_sync(MOE_FULL_WARP, v, d);
    if (moe_lane() == 0 && v) atomicAdd((unsigned long long*)word, (unsigned long long)v);
}

/* A thread has a token at a time. */
MOE_KERNEL(256, 1) moei_ep_tally(MOE_ARG(moei_ep_args) a)
{
    const int first = (int)(blockIdx.x * blockDim.x + threadIdx.x), num_ranks = a.peers.num_ranks;
    const int step = (int)(gridDim.x * blockDim.x);
    const uint64_t about = (uint64_t)a.top_k * 8 + 4; /* bytes of a token's ids, weights, number */
    const uint64_t hidden = (uint64_t)a.row_bytes / 2;
    const uint64_t row_bytes = !a.wire_fp8
                                   ? (uint64_t)a.row_bytes
                                   : hidden + (hidden + MOE_FP8_GROUP - 1) / MOE_FP8_GROUP * 4;
    moei_ep_tallies n = {0, 0, 0, 0};
    uint64_t rows, tokens, bytes, back;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.peers.fault)) return;
    for (int t = first; t < a.num_tokens; t += step) moei_ep_tally_out(&n, &a, t);
    for (int i = first; i < num_ranks * a.recv_tokens; i += step) moei_ep_tally_in(&n, &a, i);
    tokens = (uint64_t)n.tokens_out;
    if (moei_ep_to_all(&a)) /* each token once to each other rank */
        tokens = first == 0 ? (uint64_t)a.num_tokens * (uint64_t)(num_ranks - 1) : 0;
    rows = a.dispatch_form == MOE_EP_ALL_TO_ALL ? (uint64_t)n.slots_out : tokens;
    bytes = rows * (row_bytes + (uint64_t)a.num_scales * 4) + tokens * about;
    if (moei_ep_forms_answer(a.dispatch_form, a.combine_form))
        bytes += (uint64_t)n.slots_in * 8; /* answers */
    back = (uint64_t)(a.combine_form == MOE_EP_GATHERED ? n.slots_in : n.tokens_in);
    moei_ep_count_up(&a.counters->sent_rows, rows);
    moei_ep_count_up(&a.counters->sent_bytes, bytes);
    moei_ep_count_up(&a.counters->return_rows, back);
    moei_ep_count_up(&a.counters->return_bytes, back * (uint64_t)a.sum_bytes);
    if (first != 0) return;
    a.counters->calls += 1;
    if (a.num_local) a.counters->expert_rows += (uint64_t)a.expert_offset[a.num_local];
}

/* Prepares the tally of a resolved dispatch. */
MOE_HOST moe_status moei_ep_prepare_tally(const moei_ep_args* a, moe_launch* tally)
{
    const int64_t in = (int64_t)a->peers.num_ranks * a->recv_tokens;
    const int64_t most = in > a->num_tokens ? in : a->num_tokens;
    moe_device device;
    moe_launch_config c;
    MOE_TRY(moe_device_query(&device));
    c = moe_grid(most / 256 < device.sms ? most / 256 + 1 : device.sms, 256, 0, 0);
    c.dependent = 1;
    return MOE_PREPARE(tally, moei_ep_tally, c);
}

#endif
