/* peers.cuh: sets a group up: gives every rank the addresses of all regions (peers.h).

   The caller allocates one region a rank, all of the same size, with cudaMalloc. Ways to connect
   them:
     moe_peers_create_local  all ranks are in this process, one call for all of them. Several ranks
                             may share a GPU. GPUs reach each other by peer access.
     moe_peers_create_ipc    one process a rank, on one host, with CUDA IPC. Every rank calls it.
                             The caller brings an all-gather (MPI, a socket, a store, NCCL) for some
                             200 bytes a rank.
     moe_peers_create        the caller brings the addresses.
     moe_peers_create_nccl   NCCL's symmetric windows (nccl_window.cuh); memory of ncclMemAlloc.
   The first two check that every rank reaches every other, and name the first pair that does not.

   These calls allocate nothing, but synchronise the device. NVLink multicast is not used.

     int device[] = {0, 1};  void* region[2];            // region[r] on device[r]
     moe_peers peers[2];  moe_peers_pair pair;
     moe_status s = moe_peers_create_local(peers, 2, device, region, bytes, &pair);

   Ranks that share a GPU wait for each other's kernels, which the GPU must run at the same time.
   Set CUDA_DEVICE_MAX_CONNECTIONS=32 in the environment before the first CUDA call: streams of one
   hardware queue run one after the other.

   On the CPU backend one host thread drives all ranks: it queues the work of each on a stream of
   the rank's virtual device, and the kernels of all ranks advance while it waits for any stream. */
#ifndef MOE_EP_PEERS_CUH
#define MOE_EP_PEERS_CUH

#include <string.h>

#include "../base/check.h"
#include "../base/cuda.cuh"
#include "../fields.h"
#include "peers.h"

/* Two ranks: `from` does not reach the memory of `to`. Both -1: all ranks reach each other. */
typedef struct moe_peers_pair {
    int32_t from, to;
} moe_peers_pair;

/* Gathers `bytes` bytes of every rank in rank order at every rank: to[num_ranks][bytes]. Returns 0,
   or else the set-up fails. Called by every rank the same number of times with the same sizes. */
typedef int (*moe_peers_allgather)(void* context, const void* from, void* to, size_t bytes);

/* Refuses a group that cannot be. */
MOE_HOST moe_status moei_peers_check(int rank, int num_ranks, const void* region, uint64_t bytes)
{
    MOE_REQUIRE(num_ranks >= 1 && num_ranks <= MOE_PEERS_MAX_RANKS, MOE_ERR_RANGE, num_ranks);
    MOE_REQUIRE(rank >= 0 && rank < num_ranks, MOE_ERR_RANGE, rank);
    MOE_REQUIRE(region, MOE_ERR_NULL, region);
    MOE_REQUIRE(moei_aligned(region, 256), MOE_ERR_ALIGN, region);
    MOE_REQUIRE(bytes >= MOE_PEERS_HEADER, MOE_ERR_RANGE, region_bytes);
    return MOE_OK;
}

/* Fills in *p; all ranks are on host 0. */
MOE_HOST void moei_peers_fill(moe_peers* p, int rank, int num_ranks, void* const* address,
                              uint64_t bytes)
{
    memset(p, 0, sizeof *p);
    p->base = (char*)address[rank];
    p->bytes = bytes;
    p->rank = rank;
    p->num_ranks = num_ranks;
    p->ranks_on_device = 1;
    for (int r = 0; r < num_ranks; ++r) {
        p->id[r].local = r;
        p->table[r] = (char*)address[r];
    }
}

/* Writes a region's header: zeros and the table. Synchronises the current device. */
MOE_HOST moe_status moei_peers_write_header(void* region, void* const* address, int num_ranks)
{
    MOE_TRY_CUDA(cudaMemset(region, 0, MOE_PEERS_HEADER));
    MOE_TRY_CUDA(cudaMemcpy(region, (const void*)address, (size_t)num_ranks * sizeof *address,
                            cudaMemcpyHostToDevice));
    return moe_cuda_status(cudaDeviceSynchronize()); /* both may end later than the calls */
}

/* Lets device a read and write memory of device b. *can: 0 where the hardware does not. Leaves a as
   the current device. */
MOE_HOST moe_status moei_peers_enable(int a, int b, int* can)
{
    cudaError_t e;
    *can = 1;
    if (a == b) return MOE_OK;
    MOE_TRY_CUDA(cudaDeviceCanAccessPeer(can, a, b));
    if (!*can) return MOE_OK;
    MOE_TRY_CUDA(cudaSetDevice(a));
    e = cudaDeviceEnablePeerAccess(b, 0);
    if (e == cudaErrorPeerAccessAlreadyEnabled) {
        (void)cudaGetLastError(); /* takes the error back */
        return MOE_OK;
    }
    return moe_cuda_status(e);
}

/* Sets up all ranks of moe_peers_create_local; changes the current device. */
MOE_HOST moe_status moei_peers_connect(moe_peers* peers, int num_ranks, const int* device,
                                       void* const* region, uint64_t bytes, moe_peers_pair* pair)
{
    for (int a = 0; a < num_ranks; ++a)
        for (int b = 0; b < num_ranks; ++b) {
            int can;
            MOE_TRY(moei_peers_enable(device[a], device[b], &can));
            if (!can) {
                pair->from = a, pair->to = b;
                return MOE_STATUS(MOE_ERR_DEVICE, peers);
            }
        }
    for (int r = 0; r < num_ranks; ++r) {
        MOE_TRY_CUDA(cudaSetDevice(device[r]));
        MOE_TRY(moei_peers_write_header(region[r], region, num_ranks));
    }
    for (int r = 0; r < num_ranks; ++r) {
        moei_peers_fill(peers + r, r, num_ranks, region, bytes);
        peers[r].ranks_on_device = 0;
        for (int q = 0; q < num_ranks; ++q) peers[r].ranks_on_device += device[q] == device[r];
    }
    return MOE_OK;
}

/* Connects ranks of this process. peers [num_ranks]: filled in; device [num_ranks]: the device of
   each rank; region [num_ranks]: its memory, `bytes` each; pair: which ranks do not reach each
   other. Errors: MOE_ERR_DEVICE (peers) names *pair; null or misaligned regions, num_ranks,
   region_bytes. The current device stays. */
MOE_HOST moe_status moe_peers_create_local(moe_peers* peers, int num_ranks, const int* device,
                                           void* const* region, uint64_t bytes,
                                           moe_peers_pair* pair)
{
    int current = 0;
    moe_status s;
    MOE_REQUIRE(peers && device && region && pair, MOE_ERR_NULL, desc);
    pair->from = pair->to = -1;
    MOE_REQUIRE(num_ranks >= 1 && num_ranks <= MOE_PEERS_MAX_RANKS, MOE_ERR_RANGE, num_ranks);
    for (int r = 0; r < num_ranks; ++r) MOE_TRY(moei_peers_check(r, num_ranks, region[r], bytes));
    MOE_TRY_CUDA(cudaGetDevice(&current));
    s = moei_peers_connect(peers, num_ranks, device, region, bytes, pair);
    MOE_TRY_CUDA(cudaSetDevice(current));
    return s;
}

/* Fills in this rank's *peers from the addresses of all regions, as this rank's device addresses
   them: address [num_ranks] on the host, address[rank] is this rank's own. Does not check that
   they are reachable. The caller then sets what differs: peers->id where ranks are on several
   hosts, ranks_on_device where ranks share a GPU. Every rank must have returned from this call
   before any rank signals: the call clears the header. */
MOE_HOST moe_status moe_peers_create(moe_peers* peers, int rank, int num_ranks,
                                     void* const* address, uint64_t bytes)
{
    MOE_REQUIRE(peers && address, MOE_ERR_NULL, desc);
    MOE_REQUIRE(num_ranks >= 1 && num_ranks <= MOE_PEERS_MAX_RANKS, MOE_ERR_RANGE, num_ranks);
    for (int r = 0; r < num_ranks; ++r)
        MOE_TRY(moei_peers_check(rank, num_ranks, address[r], bytes));
    MOE_TRY(moei_peers_write_header(address[rank], address, num_ranks));
    moei_peers_fill(peers, rank, num_ranks, address, bytes);
    return MOE_OK;
}

#if MOE_ON_HOST

MOE_HOST moe_status moe_peers_create_ipc(moe_peers*, int, int, int, void*, uint64_t,
                                         moe_peers_allgather, void*, moe_peers_pair* pair)
{
    if (pair) pair->from = pair->to = -1;
    return MOE_STATUS(MOE_ERR_DEVICE, peers); /* the CPU backend has one process */
}
MOE_HOST moe_status moe_peers_close_ipc(const moe_peers*) { return MOE_OK; }

#else

/* What a rank tells the others. */
typedef struct moei_peers_card {
    cudaIpcMemHandle_t handle;
    uint64_t bus[2]; /* PCI address of its GPU, as text */
    uint64_t bytes;  /* of its region */
    int32_t host;
    moe_status status; /* of its set-up so far */
} moei_peers_card;

/* Opens all peers' regions: address [num_ranks]. *to: the first that this rank does not reach, else
   -1. */
MOE_HOST moe_status moei_peers_open(const moei_peers_card* card, int rank, int num_ranks,
                                    void** address, int32_t* to)
{
    *to = -1;
    for (int r = 0; r < num_ranks; ++r) {
        if (r == rank) continue;
        if (card[r].host != card[rank].host ||
            cudaIpcOpenMemHandle(&address[r], card[r].handle, cudaIpcMemLazyEnablePeerAccess) !=
                cudaSuccess) {
            (void)cudaGetLastError();
            address[r] = 0;
            if (*to < 0) *to = r;
        }
    }
    return *to < 0 ? MOE_OK : MOE_STATUS(MOE_ERR_DEVICE, peers);
}

/* Closes what moei_peers_open has opened. */
MOE_HOST void moei_peers_close(void* const* address, int rank, int num_ranks)
{
    for (int r = 0; r < num_ranks; ++r)
        if (r != rank && address[r]) (void)cudaIpcCloseMemHandle(address[r]);
}

/* Connects one process a rank with CUDA IPC. Every rank calls it with the current device of its
   region. region: memory of this rank, an allocation of cudaMalloc of its own (not a part of one).
   host: number of this rank's host, the same on all ranks of a host. allgather, context: see
   moe_peers_allgather. All ranks return the same status and pair. Errors: those of
   moe_peers_create; region_bytes (MOE_ERR_CONFLICT) where ranks differ in `bytes`; MOE_ERR_DEVICE
   (peers) where *pair does not reach each other, or (allgather) where the callback fails. */
MOE_HOST moe_status moe_peers_create_ipc(moe_peers* peers, int rank, int num_ranks, int host,
                                         void* region, uint64_t bytes,
                                         moe_peers_allgather allgather, void* context,
                                         moe_peers_pair* pair)
{
    moei_peers_card own, card[MOE_PEERS_MAX_RANKS];
    void* address[MOE_PEERS_MAX_RANKS] = {0};
    struct {
        moe_status status;
        int32_t to;
    } mine, all[MOE_PEERS_MAX_RANKS];
    int device = 0;
    MOE_REQUIRE(peers && allgather && pair, MOE_ERR_NULL, desc);
    pair->from = pair->to = -1;
    memset(&own, 0, sizeof own);
    own.bytes = bytes;
    own.host = host;
    own.status = moei_peers_check(rank, num_ranks, region, bytes);
    if (moe_status_detail(own.status) == MOE_FIELD_num_ranks ||
        moe_status_detail(own.status) == MOE_FIELD_rank)
        return own.status; /* the all-gather cannot run */
    if (own.status == MOE_OK) own.status = moe_cuda_status(cudaGetDevice(&device));
    if (own.status == MOE_OK)
        own.status = moe_cuda_status(cudaDeviceGetPCIBusId((char*)own.bus, sizeof own.bus, device));
    if (own.status == MOE_OK)
        own.status = moe_cuda_status(cudaIpcGetMemHandle(&own.handle, region));
    if (own.status == MOE_OK) /* before any peer can signal */
        own.status = moe_cuda_status(cudaMemset(region, 0, MOE_PEERS_HEADER));
    if (own.status == MOE_OK) own.status = moe_cuda_status(cudaDeviceSynchronize());
    MOE_REQUIRE(!allgather(context, &own, card, sizeof own), MOE_ERR_DEVICE, allgather);
    mine.status = MOE_OK;
    for (int r = 0; r < num_ranks && mine.status == MOE_OK; ++r) {
        mine.status = card[r].status;
        if (mine.status == MOE_OK && card[r].bytes != card[0].bytes)
            mine.status = MOE_STATUS(MOE_ERR_CONFLICT, region_bytes);
    }
    mine.to = -1;
    if (mine.status == MOE_OK) {
        address[rank] = region;
        mine.status = moei_peers_open(card, rank, num_ranks, address, &mine.to);
        if (mine.status == MOE_OK)
            mine.status = moe_cuda_status(cudaMemcpy(
                region, address, (size_t)num_ranks * sizeof *address, cudaMemcpyHostToDevice));
        if (mine.status == MOE_OK) mine.status = moe_cuda_status(cudaDeviceSynchronize());
    }
    if (allgather(context, &mine, all, sizeof mine)) { /* all tables are written */
        moei_peers_close(address, rank, num_ranks);
        return MOE_STATUS(MOE_ERR_DEVICE, allgather);
    }
    for (int r = 0; r < num_ranks; ++r)
        if (all[r].status != MOE_OK) {
            moei_peers_close(address, rank, num_ranks);
            if (all[r].to >= 0) pair->from = r, pair->to = all[r].to;
            return all[r].status;
        }
    moei_peers_fill(peers, rank, num_ranks, address, bytes);
    peers->ranks_on_device = 0;
    for (int r = 0; r < num_ranks; ++r) {
        peers->id[r].host = card[r].host;
        peers->id[r].local = 0;
        for (int q = 0; q < r; ++q) peers->id[r].local += card[q].host == card[r].host;
        peers->ranks_on_device +=
            card[r].host == host && card[r].bus[0] == own.bus[0] && card[r].bus[1] == own.bus[1];
    }
    return MOE_OK;
}

/* Closes the regions that moe_peers_create_ipc opened. No kernel of this rank may use them any
   more; a peer frees its region only after all ranks have closed. Synchronises the device. */
MOE_HOST moe_status moe_peers_close_ipc(const moe_peers* peers)
{
    MOE_REQUIRE(peers, MOE_ERR_NULL, peers);
    MOE_TRY_CUDA(cudaDeviceSynchronize());
    moei_peers_close((void* const*)peers->table, peers->rank, peers->num_ranks);
    return MOE_OK;
}

#endif

/* Fills in what kernels take; refuses a group that was not created, or a null fault word. */
MOE_HOST moe_status moei_peers_resolve(const moe_peers* p, uint64_t* fault, moe_peers_args* a)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, peers);
    MOE_REQUIRE(p->base && p->bytes >= MOE_PEERS_HEADER && p->num_ranks >= 1 &&
                    p->num_ranks <= MOE_PEERS_MAX_RANKS && p->rank >= 0 && p->rank < p->num_ranks &&
                    p->ranks_on_device >= 1,
                MOE_ERR_RANGE, peers);
    MOE_REQUIRE(fault, MOE_ERR_NULL, fault);
    MOE_REQUIRE(moei_aligned(fault, 8), MOE_ERR_ALIGN, fault);
    a->base = p->base;
    a->fault = fault;
    a->timeout_ns = p->timeout_ns ? p->timeout_ns : MOE_PEERS_TIMEOUT_NS;
    a->rank = p->rank;
    a->num_ranks = p->num_ranks;
    a->shared = p->ranks_on_device > 1;
    memcpy(a->table, p->table, sizeof a->table);
    return MOE_OK;
}

#endif
