/* receive.cuh: the receiving half of a dispatch: waits for ids and for rows, and gives every
   received slot its row in expert order. Called by dispatch.cuh; push.cuh is the other half. */
#ifndef MOE_EP_RECEIVE_CUH
#define MOE_EP_RECEIVE_CUH

#include "few.cuh"
#include "push.cuh"

/* The argument of the kernels that make the row maps: those of route.cuh behind a wait. */
typedef struct moei_ep_route_args {
    moe_peers_args peers;
    moei_route_args route; /* over received tokens */
    int32_t channel, tag;
    int32_t chained; /* 1: runs right behind the sending kernel: works beside it, and waits for the
                        rows too. 0: runs behind any kernel, waits for ids alone */
} moei_ep_route_args;

/* Waits for the ids of all ranks: the first warp of each block. Returns 1, or 0 after a stop fault.
   All threads; ends with a barrier. */
MOE_DEVICE int moei_ep_wait_ids(const moei_ep_route_args* a)
{
    int came = 1;
    if (!a->chained) moe_pdl_wait();
    if (moe_warp() == 0)
        came = moei_peer_reach(&a->peers, a->channel, moei_peer_next(&a->peers, a->channel),
                               MOE_PHASE_DISPATCH, a->tag);
    return !__syncthreads_or(!came);
}

/* Waits for the rows of all ranks. One warp of the grid. */
MOE_DEVICE void moei_ep_wait_rows(const moe_peers_args* p, int channel, int tag)
{
    const uint32_t n = moei_peer_next(p, channel) + 1;
    if (moei_peer_reach(p, channel, n, MOE_PHASE_DISPATCH, tag)) moei_peer_pass(p, channel, n);
}

/* Few received slots: all in one launch of one block. While it waits it runs once
   without slots. */
MOE_KERNEL(MOEI_EP_FEW_THREADS, 1) moei_ep_route_few(MOE_ARG(moei_ep_route_args) a)
{
    MOE_SHARED(moe_block_scan_scratch, scratch);
    MOE_SHARED_DYNAMIC(shared);
    moei_ep_few f;
    int came = 1;
    moei_peer_pdl_trigger(&a.peers, 1);
    moei_ep_few_begin(&f, &a.route.d, shared);
    __syncthreads();
    MOE_NO_UNROLL
    for (int empty = a.chained; empty >= 0; --empty) {
        if (!empty) came = moei_ep_wait_ids(&a);
        if (came) moei_ep_few_place(&a.route, &f, &scratch, empty);
    }
    if (a.chained && came && moe_warp() == 0) moei_ep_wait_rows(&a.peers, a.channel, a.tag);
    moe_pdl_wait();
}

/* Counting of received slots. Where ranks share the GPU the sending kernel has waited for the ids
   already: no block waits here. */
MOE_KERNEL(MOEI_ROUTE_THREADS, 1) moei_ep_count_received(MOE_ARG(moei_ep_route_args) a)
{
    MOE_SHARED_DYNAMIC(shared);
    moe_pdl_trigger();
    moei_route_clear_count(&a.route.d, (int*)shared);
    if (moei_ep_wait_ids(&a)) moei_route_count_chunk(&a.route.d, (int*)shared, 1);
    moe_pdl_wait();
}

/* Placing of received slots. */
MOE_KERNEL(MOEI_ROUTE_THREADS, 1) moei_ep_place_received(MOE_ARG(moei_ep_route_args) a)
{
    const int waits = a.chained && blockIdx.x == gridDim.x - 1;
    MOE_SHARED(moe_block_scan_scratch, scratch);
    MOE_SHARED_DYNAMIC(shared);
    moei_peer_pdl_trigger(&a.peers, waits);
    moei_route_place_chunk(&a.route, shared, &scratch, 1);
    if (waits && moe_warp() == 0) moei_ep_wait_rows(&a.peers, a.channel, a.tag);
}

/* Waits for the rows, in a launch of its own. */
MOE_KERNEL(32, 1) moei_ep_receive(MOE_ARG(moei_ep_args) a)
{
    moei_peer_pdl_trigger(&a.peers, 1);
    moe_pdl_wait();
    moei_ep_wait_rows(&a.peers, a.channel, a.tag);
}

/* Tells each token's home where its rows will be: place[t, k] = {this rank, row}. A thread has a
   received slot at a time. */
MOE_KERNEL(256, 1) moei_ep_answer(MOE_ARG(moei_ep_args) a)
{
    const int num_ranks = a.peers.num_ranks, top_k = a.top_k;
    const char* own = a.peers.base;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.peers.fault)) return;
    for (int q = 0; q < num_ranks; ++q) {
        const int from = moe_peer_rotated(&a.peers, q);
        const int n = ((const int32_t*)(own + a.at.recv_count))[from] * top_k;
        const int64_t first = (int64_t)from * a.recv_tokens;
        moe_place* place = (moe_place*)moe_peer_address(&a.peers, from, a.at.place);
        for (int64_t j = blockIdx.x * blockDim.x + threadIdx.x; j < n;
             j += gridDim.x * blockDim.x) {
            const int i = (int)j;
            moe_place p = a.recv_place[first * top_k + i];
            const int token = ((const int32_t*)(own + a.at.recv_token))[first + i / top_k];
            if (p.buffer < 0) continue; /* another rank's slot */
            p.buffer = a.peers.rank;
            place[(int64_t)token * top_k + i % top_k] = p;
        }
    }
}

#endif
