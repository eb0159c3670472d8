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
    int32_t chained; /* 1: runs right behind the sending kernel, and works beside it; 0: runs behind
                        any kernel */
    int32_t receives; /* 1: waits for the rows too, and passes their barrier */
    uint64_t* waited; /* where waits are added up; or null */
} moei_ep_route_args;

/* Waits for the ids of all ranks: the first warp of each block. Returns 1, or 0 after a stop fault.
   All threads; ends with a barrier. */
MOE_DEVICE int moei_ep_wait_ids(const moei_ep_route_args* a)
{
    int came = 1;
    if (!a->chained) moe_pdl_wait();
    if (moe_warp() == 0)
        came = moei_peer_reach_timed(&a->peers, a->channel, moei_peer_next(&a->peers, a->channel),
                                     MOE_PHASE_DISPATCH, a->tag, blockIdx.x == 0 ? a->waited : 0);
    return !__syncthreads_or(!came);
}

/* Waits for the rows of all ranks. One warp of the grid. */
MOE_DEVICE void moei_ep_wait_rows(const moe_peers_args* p, int channel, int tag, uint64_t* waited)
{
    (void)moei_peer_reach_pass(p, channel, moei_peer_next(p, channel) + 1, MOE_PHASE_DISPATCH, tag,
                               waited);
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
    if (a.receives && came && moe_warp() == 0)
        moei_ep_wait_rows(&a.peers, a.channel, a.tag, a.waited);
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
    const int waits = a.receives && blockIdx.x == gridDim.x - 1;
    MOE_SHARED(moe_block_scan_scratch, scratch);
    MOE_SHARED_DYNAMIC(shared);
    moei_peer_pdl_trigger(&a.peers, waits);
    moei_route_place_chunk(&a.route, shared, &scratch, 1);
    if (waits && moe_warp() == 0) moei_ep_wait_rows(&a.peers, a.channel, a.tag, a.waited);
}

/* MOE_EP_ALL_GATHER_COPY: arrives at the barrier of rows, behind the copies. */
MOE_KERNEL(32, 1) moei_ep_copied(MOE_ARG(moei_ep_args) a)
{
    moei_peer_add_share(&a.peers, a.channel, moei_peer_next(&a.peers, a.channel) + 1,
                        MOE_PEERS_UNIT, 1);
}

/* Waits for the rows, in a launch of its own; and for the ids, which nothing has waited for where
   no row maps are made. */
MOE_KERNEL(32, 1) moei_ep_receive(MOE_ARG(moei_ep_args) a)
{
    moei_peer_pdl_trigger(&a.peers, 1);
    moe_pdl_wait();
    if (!moei_peer_reach_timed(&a.peers, a.channel, moei_peer_next(&a.peers, a.channel),
                               MOE_PHASE_DISPATCH, a.tag, a.waited))
        return;
    moei_ep_wait_rows(&a.peers, a.channel, a.tag, a.waited);
}

#endif
