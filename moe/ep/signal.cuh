/* signal.cuh: device functions between ranks: put, get, signal, wait, barrier. peers.h has the
   regions and the channels; barrier.cuh has the same as launches.

     moe_peer_address(&p, rank, offset)                 address in a peer's region
     moe_peer_put(&p, rank, offset, x, bytes, i, n)     copies to a peer's region
     moe_peer_get(&p, y, rank, offset, bytes, i, n)     copies from a peer's region
     moe_peer_signal(&p, rank, channel)                 tells one peer: what I stored is there
     moe_peer_wait(&p, rank, channel, tag)              waits for one peer's next signal
     moe_peer_arrive(&p, channel)                       tells all ranks
     moe_peer_barrier_wait(&p, channel, phase, tag)     waits until all ranks have arrived

   Order: moe_peer_put by many threads, a barrier of the thread block, then moe_peer_signal (or
   moe_peer_arrive) by one warp of the block. What was put before is visible to a peer after its
   wait (release and acquire, system scope). Threads other than the waiting warp see it after a
   barrier of their thread block.

   A wait never traps and never hangs. After peers.timeout_ns nanoseconds (the GPU's global timer)
   it raises PEER_LATE with the late rank, phase and tag in the fault word, tells all peers, and
   returns 0. A rank that stopped for any reason sends its fault word instead of arriving: its peers
   stop at once with that fault, and name the same rank. Where the fault word holds a stop fault
   already, nothing is signalled and no wait waits.

   Blocks that wait must leave room for all that they and their peers wait for: let few of a grid
   wait, or blocks whose places nothing of that needs (one block, where several ranks share a GPU).
   Under lazy loading preload every kernel first (preload.cuh). */
#ifndef MOE_EP_SIGNAL_CUH
#define MOE_EP_SIGNAL_CUH

#include "../base/copy_row.cuh"
#include "../base/fault.cuh"
#include "../base/flag.cuh"
#include "../base/warp.cuh"
#include "peers.h"

/* In place of moe_pdl_trigger, in a kernel of which one block waits for peers: waits is 1 in that
   block. Where ranks share the GPU, the next kernel of the stream starts only after the wait: its
   blocks, waiting themselves, could take the room that another rank's kernels need. */
MOE_DEVICE void moei_peer_pdl_trigger(const moe_peers_args* p, int waits)
{
    if (!p->shared || !waits) moe_pdl_trigger();
}

/* Returns this rank's header. */
MOE_DEVICE moe_peers_header* moei_peer_header(const moe_peers_args* p)
{
    return (moe_peers_header*)p->base;
}

/* Returns the address of `offset` in a rank's region. Any thread. rank: 0 .. W - 1. */
MOE_DEVICE char* moe_peer_address(const moe_peers_args* p, int rank, uint64_t offset)
{
    return p->table[rank] + offset;
}

/* Returns a rank's words of a channel. */
MOE_DEVICE moe_peers_channel* moei_peer_channel(const moe_peers_args* p, int rank, int channel)
{
    return ((moe_peers_header*)moe_peer_address(p, rank, 0))->channel + channel;
}

/* Returns the i-th rank that this rank turns to: i = 0 is the next one, W - 1 itself. Ranks that
   all go through their peers in this order write to different peers at any time. */
MOE_DEVICE int moe_peer_rotated(const moe_peers_args* p, int i)
{
    const int r = p->rank + 1 + i;
    return r < p->num_ranks ? r : r - p->num_ranks;
}

/* Copies `bytes`, even, from x to a rank's region. `threads` threads share the work, this one is
   number `thread`. Ends without a barrier. */
MOE_DEVICE void moe_peer_put(const moe_peers_args* p, int rank, uint64_t offset, const void* x,
                             int64_t bytes, int thread, int threads)
{
    moe_copy_row(moe_peer_address(p, rank, offset), x, bytes, thread, threads);
}

/* Copies `bytes`, even, from a rank's region to y; as moe_peer_put. */
MOE_DEVICE void moe_peer_get(const moe_peers_args* p, void* y, int rank, uint64_t offset,
                             int64_t bytes, int thread, int threads)
{
    moe_copy_row(y, moe_peer_address(p, rank, offset), bytes, thread, threads);
}

/* Sends this rank's fault word to all peers: they stop. One warp. */
MOE_DEVICE void moei_peer_notice(const moe_peers_args* p)
{
    const uint64_t word = moei_flag_load8(p->fault);
    MOE_NO_UNROLL
    for (int i = moe_lane(); i < p->num_ranks - 1; i += MOE_WARP_SIZE) {
        moe_peers_header* h = (moe_peers_header*)moe_peer_address(p, moe_peer_rotated(p, i), 0);
        moei_flag_store8(h->notice + p->rank, word);
    }
}

/* Returns 1 where a peer has sent its fault word, and takes the fault over. One warp; every lane
   gets the answer. */
MOE_DEVICE int moei_peer_noticed(const moe_peers_args* p)
{
    int stops = 0;
    MOE_NO_UNROLL
    for (int r = moe_lane(); r < p->num_ranks; r += MOE_WARP_SIZE) {
        const uint64_t word = moei_flag_load8(moei_peer_header(p)->notice + r);
        if (MOEI_FAULT_STOPS(word)) {
            atomicMax((unsigned long long*)p->fault, (unsigned long long)word);
            stops = 1;
        }
    }
    stops = __any_sync(MOE_FULL_WARP, stops);
    __syncwarp(MOE_FULL_WARP); /* the fault word is written */
    return stops;
}

#define MOEI_PEER_POLLS 16 /* polls of a word before the clock and the notices are read */

/* Polls a word of this rank until it is at least `least`, modulo 2^32. Returns 1; 0 where the fault
   word holds a stop fault, or a peer has sent one; -1 after `ns` nanoseconds. One warp. */
MOE_DEVICE int moei_peer_poll(const moe_peers_args* p, const uint32_t* word, uint32_t least,
                              uint64_t ns)
{
    const uint64_t begun = moei_nanoseconds();
    MOE_NO_UNROLL
    for (;;) {
        MOE_NO_UNROLL
        for (int i = 0; i < MOEI_PEER_POLLS; ++i) {
            const int came = (int32_t)(moei_flag_load(word) - least) >= 0;
            if (__any_sync(MOE_FULL_WARP, came)) {
                __syncwarp(MOE_FULL_WARP); /* what one lane has acquired, all lanes see */
                return 1;
            }
            MOE_SPIN();
        }
        if (__any_sync(MOE_FULL_WARP, moe_fault_stops(p->fault)) || moei_peer_noticed(p)) return 0;
        if (__any_sync(MOE_FULL_WARP, moei_nanoseconds() - begun > ns)) return -1;
    }
}

/* Raises PEER_LATE and tells the peers. One warp. */
MOE_DEVICE void moei_peer_raise(const moe_peers_args* p, int late, int phase, int tag)
{
    if (moe_lane() == 0)
        moe_fault_raise(p->fault, MOE_FAULT_PEER_LATE, p->rank, MOEI_PEERS_INDEX(late, phase, tag));
    __syncwarp(MOE_FULL_WARP); /* the word is written */
    moei_peer_notice(p);
}

/* Adds 1 to this rank's signals at a peer. One warp. After a stop fault sends that fault
   instead. */
MOE_DEVICE void moe_peer_signal(const moe_peers_args* p, int rank, int channel)
{
    if (__any_sync(MOE_FULL_WARP, moe_fault_stops(p->fault))) {
        moei_peer_notice(p);
        return;
    }
    if (moe_lane() == 0) moei_flag_add(moei_peer_channel(p, rank, channel)->from + p->rank, 1);
}

/* Waits for the next signal of a rank, in its order of sending. Returns 1, or 0 after a stop fault.
   One warp; one waiting warp a rank and channel at a time. */
MOE_DEVICE int moe_peer_wait(const moe_peers_args* p, int rank, int channel, int tag)
{
    moe_peers_channel* own = moei_peer_header(p)->channel + channel;
    const uint32_t next = own->taken[rank] + 1;
    int came;
    if (__any_sync(MOE_FULL_WARP, moe_fault_stops(p->fault))) return 0;
    came = moei_peer_poll(p, own->from + rank, next, p->timeout_ns);
    if (came < 0) moei_peer_raise(p, rank, MOE_PHASE_USER, tag);
    if (came <= 0) return 0;
    __syncwarp(MOE_FULL_WARP); /* all lanes have read taken */
    if (moe_lane() == 0) own->taken[rank] = next;
    __syncwarp(MOE_FULL_WARP); /* a later call of this warp reads taken */
    return 1;
}

/* Returns the number of the next barrier of a channel. The same until this rank has passed it. */
MOE_DEVICE uint32_t moei_peer_next(const moe_peers_args* p, int channel)
{
    return *(const volatile uint32_t*)&moei_peer_header(p)->channel[channel].epoch + 1;
}

/* Adds a share of this rank's MOE_PEERS_UNIT to barrier n at all ranks, after what the warp's
   thread block has stored before a barrier of the block. whole: 1 for the one share that also
   counts the rank as come. After a stop fault the whole one sends that fault instead: the barrier
   is never complete. One warp. */
MOE_DEVICE void moei_peer_add_share(const moe_peers_args* p, int channel, uint32_t n,
                                    uint32_t share, int whole)
{
    if (whole) {
        const bool stops = moe_fault_stops(p->fault); /* in flight with the load of the notices */
        const int noticed = moei_peer_noticed(p);
        if (__any_sync(MOE_FULL_WARP, stops || noticed)) {
            moei_peer_notice(p);
            return;
        }
    }
    MOE_NO_UNROLL
    for (int i = moe_lane(); i < p->num_ranks; i += MOE_WARP_SIZE) {
        moe_peers_channel* c = moei_peer_channel(p, moe_peer_rotated(p, i), channel);
        moei_flag_add(c->sum + (n & 1), share);
        moei_flag_add_relaxed(c->from + p->rank, share);
    }
}

/* Arrives at the next barrier of a channel: tells all ranks, this one included. After a stop fault
   sends that fault instead. One warp of the grid. moe_peer_barrier_wait follows, in this kernel or
   in a later one. */
MOE_DEVICE void moe_peer_arrive(const moe_peers_args* p, int channel)
{
    moei_peer_add_share(p, channel, moei_peer_next(p, channel), MOE_PEERS_UNIT, 1);
    __syncwarp(MOE_FULL_WARP); /* all lanes have read the epoch */
}

/* Returns the first rank that has not added all of its units of barriers 1 .. n; W where all have.
   One warp. */
MOE_DEVICE int moei_peer_find_late(const moe_peers_args* p, int channel, uint32_t n)
{
    const moe_peers_channel* own = moei_peer_header(p)->channel + channel;
    int late = p->num_ranks;
    MOE_NO_UNROLL
    for (int r = moe_lane(); r < p->num_ranks; r += MOE_WARP_SIZE)
        if ((int32_t)(moei_flag_load(own->from + r) - n * MOE_PEERS_UNIT) < 0 && r < late) late = r;
    MOE_NO_UNROLL
    for (int d = MOE_WARP_SIZE >> 1; d > 0; d >>= 1)
        late = min(late, __shfl_xor_sync(MOE_FULL_WARP, late, d));
    return late;
}

/* Waits until all ranks have arrived at barrier n of a channel, without passing it. Returns 1, or 0
   after a stop fault. One warp; warps of several blocks may wait at a time. Some thread blocks of a
   rank may be at barrier n + 1 already: its total may then reach that of n although shares of n are
   missing. Those are missing at n + 1 too: its total stays below that of n + 1. */
MOE_DEVICE int moei_peer_reach(const moe_peers_args* p, int channel, uint32_t n, int phase, int tag)
{
    moe_peers_channel* own = moei_peer_header(p)->channel + channel;
    const uint32_t all = (uint32_t)p->num_ranks * MOE_PEERS_UNIT * ((n + 1) >> 1);
    int came = moei_peer_poll(p, own->sum + (n & 1), all, p->timeout_ns), late;
    if (came >= 0) return came;
    late = moei_peer_find_late(p, channel, n);
    if (late == p->num_ranks) { /* the last came at this moment, or is partly at n + 1 */
        came = moei_peer_poll(p, own->sum + (n & 1), all, p->timeout_ns / 16);
        if (came >= 0) return came;
        late = moei_peer_find_late(p, channel, n + 1);
    }
    moei_peer_raise(p, min(late, p->num_ranks - 1), phase, tag);
    return 0;
}

/* Waits as moei_peer_reach does, and adds the nanoseconds that it took to *waited, where not null.
   One warp. */
MOE_DEVICE int moei_peer_reach_timed(const moe_peers_args* p, int channel, uint32_t n, int phase,
                                     int tag, uint64_t* waited)
{
    const uint64_t begun = moei_nanoseconds();
    const int came = moei_peer_reach(p, channel, n, phase, tag);
    if (came && waited && moe_lane() == 0)
        atomicAdd((unsigned long long*)waited, (unsigned long long)(moei_nanoseconds() - begun));
    return came;
}

/* Passes barrier n of a channel, and those before it: the next one is n + 1. One warp of the grid,
   when no other warp of this rank waits for them. */
MOE_DEVICE void moei_peer_pass(const moe_peers_args* p, int channel, uint32_t n)
{
    if (moe_lane() == 0) moei_peer_header(p)->channel[channel].epoch = n;
    __syncwarp(MOE_FULL_WARP); /* a later call of this warp reads the epoch */
}

/* Waits as moei_peer_reach_timed does, and passes barrier n. Returns 1, or 0 after a stop fault.
   One warp of the grid. */
MOE_DEVICE int moei_peer_reach_pass(const moe_peers_args* p, int channel, uint32_t n, int phase,
                                    int tag, uint64_t* waited)
{
    const int came = moei_peer_reach_timed(p, channel, n, phase, tag, waited);
    if (came) moei_peer_pass(p, channel, n);
    return came;
}

/* Returns the calling block's number among those of its grid that have called: 0, 1, ... One thread
   of each block; moei_peer_leave follows. */
MOE_DEVICE uint32_t moei_peer_turn(const moe_peers_args* p, int channel)
{
    return atomicAdd(&moei_peer_header(p)->channel[channel].turns, 1u);
}

/* Passes the next barrier of a channel when `blocks` blocks of a grid have reached it: the last of
   them to call does. One thread of each of these blocks. */
MOE_DEVICE void moei_peer_leave(const moe_peers_args* p, int channel, uint32_t blocks)
{
    moe_peers_channel* own = moei_peer_header(p)->channel + channel;
    if (atomicAdd(&own->left, 1u) != blocks - 1) return;
    own->turns = own->left = 0;
    own->epoch += 1;
}

/* Waits until all ranks have arrived at the next barrier of a channel, and passes it. Returns 1, or
   0 after a stop fault. One warp of the grid. */
MOE_DEVICE int moe_peer_barrier_wait(const moe_peers_args* p, int channel, int phase, int tag)
{
    return moei_peer_reach_pass(p, channel, moei_peer_next(p, channel), phase, tag, 0);
}

#endif
