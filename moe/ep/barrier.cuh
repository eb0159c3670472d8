/* barrier.cuh: put, get, signal, wait and barrier between ranks as launches. signal.cuh has the
   same as device functions and says what a wait does when a rank does not come.

     moe_peers_put      copies `bytes` from `buffer` to offset `offset` of a peer's region
     moe_peers_get      copies `bytes` from a peer's region to `buffer`
     moe_peers_signal   tells one peer that what this stream has put is there
     moe_peers_wait     waits for the next signal of one peer
     moe_peers_barrier  arrives at all ranks and waits for all of them

   Each is one launch; a copy has up to 32 thread blocks, all others have one. All can be captured
   in a graph.

     moe_peers_desc d = {0};
     d.peers = &peers;  d.fault = fault;  d.peer = 1;  d.channel = 8;
     d.buffer = x;  d.offset = MOE_PEERS_HEADER;  d.bytes = n;
     moe_status s = moe_peers_put(&d, stream);
     if (s == MOE_OK) s = moe_peers_signal(&d, stream);     // on rank 1: moe_peers_wait

   Minimum architecture: sm_75. */
#ifndef MOE_EP_BARRIER_CUH
#define MOE_EP_BARRIER_CUH

#include "../preload.cuh"
#include "peers.cuh"
#include "signal.cuh"

/* What these calls take. A barrier uses peers, fault, channel and tag alone. */
typedef struct moe_peers_desc {
    const moe_peers* peers; /* this rank's group */
    uint64_t* fault;        /* [1] fault word of this rank, required */
    void* buffer;           /* [bytes] put: read; get: written; device address */
    uint64_t offset;        /* in the peer's region, MOE_PEERS_HEADER or more; even */
    uint64_t bytes;         /* even; 0: nothing is copied */
    int32_t peer;           /* rank, 0 .. W - 1 */
    int32_t channel;        /* 0 .. MOE_PEERS_CHANNELS - 1, of one use (peers.h) */
    int32_t tag;            /* reported where a rank is late, 0 .. 2^24 - 1 */
} moe_peers_desc;

/* The argument of the kernels. */
typedef struct moei_peers_op {
    moe_peers_args peers;
    char* buffer;
    uint64_t offset, bytes;
    int32_t peer, channel, tag;
    int32_t kind; /* moei_peers_kind */
} moei_peers_op;

enum { MOEI_PEERS_PUT, MOEI_PEERS_GET, MOEI_PEERS_SIGNAL, MOEI_PEERS_WAIT, MOEI_PEERS_BARRIER };

#define MOEI_PEERS_THREADS 512
#define MOEI_PEERS_BLOCKS 32      /* of a copy: reach the rate of the link */
#define MOEI_PEERS_SLICE 16384ull /* bytes that a thread block copies at a time */

/* Copies slices of 16 KB. */
MOE_KERNEL(MOEI_PEERS_THREADS, 1) moei_peers_copy(MOE_ARG(moei_peers_op) d)
{
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.peers.fault)) return;
    for (uint64_t at = blockIdx.x * MOEI_PEERS_SLICE; at < d.bytes;
         at += gridDim.x * MOEI_PEERS_SLICE) {
        const uint64_t left = d.bytes - at;
        const int64_t n = (int64_t)(left < MOEI_PEERS_SLICE ? left : MOEI_PEERS_SLICE);
        if (d.kind == MOEI_PEERS_PUT)
            moe_peer_put(&d.peers, d.peer, d.offset + at, d.buffer + at, n, (int)threadIdx.x,
                         (int)blockDim.x);
        else
            moe_peer_get(&d.peers, d.buffer + at, d.peer, d.offset + at, n, (int)threadIdx.x,
                         (int)blockDim.x);
    }
}

/* One warp signals, waits, or both. */
MOE_KERNEL(32, 1) moei_peers_sync(MOE_ARG(moei_peers_op) d)
{
    moei_peer_pdl_trigger(&d.peers, d.kind != MOEI_PEERS_SIGNAL);
    moe_pdl_wait();
    if (d.kind == MOEI_PEERS_SIGNAL) {
        moe_peer_signal(&d.peers, d.peer, d.channel);
    } else if (d.kind == MOEI_PEERS_WAIT) {
        (void)moe_peer_wait(&d.peers, d.peer, d.channel, d.tag);
    } else {
        moe_peer_arrive(&d.peers, d.channel);
        (void)moe_peer_barrier_wait(&d.peers, d.channel, MOE_PHASE_USER, d.tag);
    }
}

/* Checks a descriptor and queues one call. */
MOE_HOST moe_status moei_peers_call(const moe_peers_desc* d, int kind, cudaStream_t stream)
{
    const int copies = kind == MOEI_PEERS_PUT || kind == MOEI_PEERS_GET;
    moei_peers_op a;
    moe_launch_config c = moe_grid(1, 32, 0, stream);
    MOE_REQUIRE(d, MOE_ERR_NULL, desc);
    memset(&a, 0, sizeof a);
    MOE_TRY(moei_peers_resolve(d->peers, d->fault, &a.peers));
    MOE_REQUIRE(kind == MOEI_PEERS_BARRIER || (d->peer >= 0 && d->peer < d->peers->num_ranks),
                MOE_ERR_RANGE, peer);
    MOE_REQUIRE(copies || (d->channel >= 0 && d->channel < MOE_PEERS_CHANNELS), MOE_ERR_RANGE,
                channel);
    MOE_REQUIRE(d->tag >= 0 && d->tag < 1 << 24, MOE_ERR_RANGE, tag);
    a.peer = d->peer;
    a.channel = d->channel;
    a.tag = d->tag;
    a.kind = kind;
    c.dependent = 1;
    if (!copies) return MOE_LAUNCH(moei_peers_sync, c, a);
    MOE_REQUIRE(d->bytes % 2 == 0 && d->bytes <= d->peers->bytes, MOE_ERR_RANGE, bytes);
    MOE_REQUIRE(d->offset >= MOE_PEERS_HEADER && d->offset <= d->peers->bytes - d->bytes,
                MOE_ERR_RANGE, offset);
    MOE_REQUIRE(d->offset % 2 == 0, MOE_ERR_ALIGN, offset);
    MOE_REQUIRE(d->buffer || !d->bytes, MOE_ERR_NULL, buffer);
    MOE_REQUIRE(moei_aligned(d->buffer, 2), MOE_ERR_ALIGN, buffer);
    if (!d->bytes) return MOE_OK;
    a.buffer = (char*)d->buffer;
    a.offset = d->offset;
    a.bytes = d->bytes;
    {
        const uint64_t slices = (d->bytes + MOEI_PEERS_SLICE - 1) / MOEI_PEERS_SLICE;
        c.grid.x = (unsigned)(slices < MOEI_PEERS_BLOCKS ? slices : MOEI_PEERS_BLOCKS);
        c.block.x = MOEI_PEERS_THREADS;
    }
    return MOE_LAUNCH(moei_peers_copy, c, a);
}

/* Queue one call each on `stream`. Errors: a status for each field that is not as documented. */
MOE_HOST moe_status moe_peers_put(const moe_peers_desc* desc, cudaStream_t stream)
{
    return moei_peers_call(desc, MOEI_PEERS_PUT, stream);
}
MOE_HOST moe_status moe_peers_get(const moe_peers_desc* desc, cudaStream_t stream)
{
    return moei_peers_call(desc, MOEI_PEERS_GET, stream);
}
MOE_HOST moe_status moe_peers_signal(const moe_peers_desc* desc, cudaStream_t stream)
{
    return moei_peers_call(desc, MOEI_PEERS_SIGNAL, stream);
}
MOE_HOST moe_status moe_peers_wait(const moe_peers_desc* desc, cudaStream_t stream)
{
    return moei_peers_call(desc, MOEI_PEERS_WAIT, stream);
}
MOE_HOST moe_status moe_peers_barrier(const moe_peers_desc* desc, cudaStream_t stream)
{
    return moei_peers_call(desc, MOEI_PEERS_BARRIER, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_peers_preload(void)
{
    MOE_TRY(moe_preload_kernel((const void*)moei_peers_copy));
    return moe_preload_kernel((const void*)moei_peers_sync);
}

MOEI_PRELOAD_INCLUDED(peers)

#endif
