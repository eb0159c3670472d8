/* scatter.cuh: the rows of an all-to-all dispatch: a row for each slot, written where the owner's
   experts read it. Called by dispatch.cuh; push.cuh has sent the ids, receive.cuh has made the row
   maps of every rank from them.

     1. answers: every rank tells each slot's home the slot's row: place[t, k] = {rank, row}
     2. barrier n + 1: this rank's places are there
     3. rows: x[t] is loaded once and stored at place[t, k] of recv_x, for each slot
     4. barrier n + 2: the rows of all ranks are there

   The order of rows is that of the maps: no other form gives other rows. Rows that pad an expert
   are cleared by the rank that has them. */
#ifndef MOE_EP_SCATTER_CUH
#define MOE_EP_SCATTER_CUH

#include "push.cuh"

/* Writes zeros to the rows of recv_x that pad experts, and to their scales. All threads of the
   grid, an expert a block. */
MOE_DEVICE void moei_ep_clear_pads(const moei_ep_args* a)
{
    const int vectors = (int)(a->row_bytes / 16); /* H is a multiple of 8 */
    MOE_NO_UNROLL
    for (int e = (int)blockIdx.x; e < a->num_local; e += (int)gridDim.x) {
        const int64_t from = (int64_t)a->expert_offset[e] + a->expert_count[e];
        const int64_t upto = min((int64_t)a->expert_offset[e + 1], a->max_rows);
        uint4* x = (uint4*)(a->peers.base + a->at.recv_x);
        float* scales = (float*)(a->peers.base + a->at.recv_scales);
        for (int64_t i = from * vectors + threadIdx.x; i < upto * vectors; i += blockDim.x)
            x[i] = make_uint4(0, 0, 0, 0);
        for (int64_t i = from * a->num_scales + threadIdx.x; i < upto * a->num_scales;
             i += blockDim.x)
            scales[i] = 0.0f;
    }
}

/* Tells each token's home where the rows of its slots are: place[t, k] = {this rank, row}. A thread
   has a received slot at a time. MOE_EP_ALL_TO_ALL: the last block then waits for the answers of
   all ranks, barrier n + 1. */
MOE_KERNEL(256, 1) moei_ep_answer(MOE_ARG(moei_ep_args) a)
{
    const int num_ranks = a.peers.num_ranks, top_k = a.top_k;
    const int meets = a.dispatch_form == MOE_EP_ALL_TO_ALL;
    const int waits = meets && blockIdx.x == gridDim.x - 1;
    const char* own = a.peers.base;
    bool stopped;
    uint32_t n;
    moei_peer_pdl_trigger(&a.peers, waits);
    moe_pdl_wait();
    n = moei_peer_next(&a.peers, a.channel) + 1;
    stopped = moe_fault_stopped(a.peers.fault);
    if (meets && moe_warp() == 0 && !stopped) /* where no row maps were made, nothing has waited */
        stopped = !moei_peer_reach_timed(&a.peers, a.channel, n - 1, MOE_PHASE_DISPATCH, a.tag,
                                         blockIdx.x == 0 ? a.waited : 0);
    stopped = __syncthreads_or(stopped);
    for (int q = 0; q < num_ranks && !stopped; ++q) {
        const int from = moe_peer_rotated(&a.peers, q);
        const int slots = ((const int32_t*)(own + a.at.recv_count))[from] * top_k;
        const int64_t first = (int64_t)from * a.recv_tokens;
        moe_place* place = (moe_place*)moe_peer_address(&a.peers, from, a.at.place);
        for (int64_t j = blockIdx.x * blockDim.x + threadIdx.x; j < slots;
             j += gridDim.x * blockDim.x) {
            const int i = (int)j;
            moe_place p = a.recv_place[first * top_k + i];
            const int token = ((const int32_t*)(own + a.at.recv_token))[first + i / top_k];
            if (p.buffer < 0) continue; /* another rank's slot */
            p.buffer = a.peers.rank;
            place[(int64_t)token * top_k + i % top_k] = p;
        }
    }
    if (!meets) return;
    if (!stopped) moei_ep_clear_pads(&a);
    moei_ep_arrive(&a.peers, a.channel, n, stopped);
    if (waits && moe_warp() == 0)
        (void)moei_peer_reach_timed(&a.peers, a.channel, n, MOE_PHASE_DISPATCH, a.tag, a.waited);
}

/* Stores a piece of token t's row at the place of each of its slots, and with the first piece the
   token's scales. A lane looks up the place of a slot. The whole warp. */
MOE_DEVICE void moei_ep_store_slots(const uint4* v, const moei_ep_args* a, int t, int64_t from,
                                    const int width, const int fp8)
{
    const moe_place* place =
        (const moe_place*)(a->peers.base + a->at.place) + (int64_t)t * a->top_k;
    const int64_t at = from + moe_lane() * width;
    moei_ep_fp8 f;
    if (fp8) moei_ep_encode(&f, v, a, from);
    MOE_NO_UNROLL
    for (int k0 = 0; k0 < a->top_k; k0 += MOE_WARP_SIZE) {
        const int upto = min(a->top_k - k0, MOE_WARP_SIZE);
        moe_place own = {-1, -1};
        if (moe_lane() < upto) {
            own.buffer = (int)moei_load4_early(&place[k0 + moe_lane()].buffer);
            own.row = (int)moei_load4_early(&place[k0 + moe_lane()].row);
        }
        MOE_NO_UNROLL
        for (int k = 0; k < upto; ++k) {
            const int d = __shfl_sync(MOE_FULL_WARP, own.buffer, k);
            const int row = __shfl_sync(MOE_FULL_WARP, own.row, k);
            if (d < 0) continue;
            char* y = moe_peer_address(&a->peers, d, a->at.recv_x) + row * a->row_bytes;
            float* scales = (float*)moe_peer_address(&a->peers, d, a->at.recv_scales) +
                            (int64_t)row * a->num_scales;
            if (fp8 && d != a->peers.rank) {
                moei_ep_store_fp8(&f, a, d, row, from);
            } else {
                MOE_UNROLL
                for (int u = 0; u < MOEI_EP_VECTORS; ++u)
                    if (at + u * MOE_WARP_SIZE * width < a->row_bytes)
                        moei_store_vector(y + at + u * MOE_WARP_SIZE * width, v[u], width);
            }
            if (from == 0) MOE_NO_UNROLL
            for (int c = moe_lane(); c < a->num_scales; c += MOE_WARP_SIZE)
                scales[c] = a->scales[(int64_t)t * a->num_scales + c];
        }
    }
}

/* Sends the rows of all slots. A block has a chunk of tokens, a warp a piece of a row at a time.
   The last block waits for the rows of all ranks, barrier n + 2, and passes it. */
MOE_DEVICE_BODY void moei_ep_scatter_chunk(const moei_ep_args* a, const int width, const int fp8)
{
    const int begin = (int)blockIdx.x * a->chunk_tokens;
    const int tokens = min(a->chunk_tokens, a->num_tokens - begin);
    const int piece = MOE_WARP_SIZE * MOEI_EP_VECTORS * width;
    const int pieces = (int)((a->row_bytes + piece - 1) / piece);
    const int last = blockIdx.x == gridDim.x - 1;
    uint32_t n;
    bool stopped;
    moei_peer_pdl_trigger(&a->peers, last);
    moe_pdl_wait();
    stopped = moe_fault_stopped(a->peers.fault);
    n = moei_peer_next(&a->peers, a->channel) + 2;
    MOE_NO_UNROLL
    for (int64_t j = moe_warp(); j < (int64_t)tokens * pieces && !stopped; j += MOEI_EP_WARPS) {
        const int t = begin + (int)(j / pieces);
        const int64_t from = j % pieces * piece;
        uint4 v[MOEI_EP_VECTORS];
        moei_ep_load(v, a, t, from, width);
        moei_ep_store_slots(v, a, t, from, width, fp8);
    }
    moei_ep_arrive(&a->peers, a->channel, n, stopped);
    if (last && moe_warp() == 0)
        (void)moei_peer_reach_pass(&a->peers, a->channel, n, MOE_PHASE_DISPATCH, a->tag, a->waited);
}

#define MOEI_EP_SCATTER(name, width, fp8)                                                          \
    MOE_KERNEL(MOEI_EP_THREADS, 1) moei_ep_scatter_##name(MOE_ARG(moei_ep_args) a)                 \
    {                                                                                              \
        moei_ep_scatter_chunk(&a, width, fp8);                                                     \
    }
MOEI_EP_WIDTHS(MOEI_EP_SCATTER)
#undef MOEI_EP_SCATTER

#endif
