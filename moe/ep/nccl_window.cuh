/* nccl_window.cuh: connects a group through NCCL's symmetric windows: a fourth way to peer
   pointers, where the ranks have a communicator and no CUDA IPC. NCCL 2.28 or later, C++17 (its
   device header), link with -lnccl. Empty on the CPU backend.

     void* region;  ncclMemAlloc(&region, bytes);          // on every rank, the same bytes
     ncclWindow_t window;  moe_peers peers;  moe_peers_pair pair;
     moe_status s = moe_peers_create_nccl(&peers, comm, region, bytes, stream, &window, &pair);
     ...
     moe_peers_close_nccl(comm, window);  ncclMemFree(region);

   The group is that of peers.cuh: all of dispatch.cuh, combine.cuh and layer.cuh run on it. NVLink
   multicast is not used; set NCCL_NVLS_ENABLE=0 where it must not even be set up. */
#ifndef MOE_EP_NCCL_WINDOW_CUH
#define MOE_EP_NCCL_WINDOW_CUH

#include "nccl.cuh"

#if !MOE_ON_HOST

#if defined(__GNUC__) /* NCCL's own header has parameters that it does not use */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#endif
#include <nccl_device.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

/* The argument of the kernel that asks for addresses. */
typedef struct moei_nccl_window_args {
    ncclWindow_t window;
    char** table; /* [W] out */
    char* own;    /* this rank's region, as the caller has it */
    int32_t rank, num_ranks;
} moei_nccl_window_args;

/* Writes the address of every rank's region. A thread has a rank. */
MOE_KERNEL(MOE_PEERS_MAX_RANKS, 1) moei_nccl_addresses(MOE_ARG(moei_nccl_window_args) a)
{
    const int r = (int)threadIdx.x;
    if (r < a.num_ranks)
        a.table[r] = r == a.rank ? a.own : (char*)ncclGetPeerPointer(a.window, 0, r);
}

/* Finds the first rank outside this one's team of load and store; -1: none. */
MOE_HOST int moei_nccl_outside(ncclComm_t comm, int num_ranks)
{
    const ncclTeam_t near = ncclTeamLsa(comm), all = ncclTeamWorld(comm);
    for (int r = 0; r < num_ranks; ++r)
        if (!ncclTeamRankIsMember(near, all, r)) return r;
    return -1;
}

/* Clears the header, fills in its table, and waits until all ranks have. address [W]: the table. */
MOE_HOST moe_status moei_nccl_connect(ncclComm_t comm, ncclWindow_t window, void* region, int rank,
                                      int num_ranks, cudaStream_t stream, void** address)
{
    char* spare = (char*)region + sizeof(moe_peers_header); /* past what the header uses */
    const moe_launch_config c = moe_grid(1, MOE_PEERS_MAX_RANKS, 0, stream);
    moei_nccl_window_args a;
    a.window = window;
    a.table = ((moe_peers_header*)region)->table;
    a.own = (char*)region;
    a.rank = rank, a.num_ranks = num_ranks;
    MOE_TRY_CUDA(cudaMemsetAsync(region, 0, MOE_PEERS_HEADER, stream));
    MOE_TRY(MOE_LAUNCH(moei_nccl_addresses, c, a));
    MOE_TRY_CUDA(cudaMemcpyAsync(address, a.table, (size_t)num_ranks * sizeof *address,
                                 cudaMemcpyDeviceToHost, stream));
    MOE_TRY(MOEI_NCCL(ncclAllGather(spare + rank, spare, 1, ncclUint8, comm, stream)));
    return moe_cuda_status(cudaStreamSynchronize(stream));
}

/* A compile error here: no room for the bytes by which ranks meet. */
typedef char moei_nccl_spare_fits[sizeof(moe_peers_header) + MOE_PEERS_MAX_RANKS <= MOE_PEERS_HEADER
                                      ? 1
                                      : -1];

/* Connects the ranks of a communicator; all of them call it. region: of ncclMemAlloc, `bytes` on
   every rank. Registers it: *window is for moe_peers_close_nccl. The communicator's device is
   current. Errors: those of moe_peers_create; MOE_ERR_DEVICE (nccl): NCCL refuses; MOE_ERR_DEVICE
   (peers): *pair does not reach each other. Nothing stays registered then. */
MOE_HOST moe_status moe_peers_create_nccl(moe_peers* peers, ncclComm_t comm, void* region,
                                          uint64_t bytes, cudaStream_t stream, ncclWindow_t* window,
                                          moe_peers_pair* pair)
{
    void* address[MOE_PEERS_MAX_RANKS];
    int rank, num_ranks;
    moe_status s;
    MOE_REQUIRE(peers && window && pair, MOE_ERR_NULL, desc);
    pair->from = pair->to = -1;
    MOE_TRY(MOEI_NCCL(ncclCommUserRank(comm, &rank)));
    MOE_TRY(MOEI_NCCL(ncclCommCount(comm, &num_ranks)));
    MOE_TRY(moei_peers_check(rank, num_ranks, region, bytes));
    MOE_TRY(
        MOEI_NCCL(ncclCommWindowRegister(comm, region, bytes, window, NCCL_WIN_COLL_SYMMETRIC)));
    MOE_REQUIRE(*window, MOE_ERR_DEVICE, nccl); /* symmetric memory is not supported */
    pair->to = moei_nccl_outside(comm, num_ranks);
    pair->from = pair->to < 0 ? -1 : rank;
    s = MOE_STATUS(MOE_ERR_DEVICE, peers);
    if (pair->to < 0)
        s = moei_nccl_connect(comm, *window, region, rank, num_ranks, stream, address);
    if (s != MOE_OK) {
        (void)ncclCommWindowDeregister(comm, *window);
        return s;
    }
    moei_peers_fill(peers, rank, num_ranks, address, bytes);
    return MOE_OK;
}

/* Ends the registration; all ranks call it, when no kernel of any rank uses the group. */
MOE_HOST moe_status moe_peers_close_nccl(ncclComm_t comm, ncclWindow_t window)
{
    MOE_TRY_CUDA(cudaDeviceSynchronize());
    return MOEI_NCCL(ncclCommWindowDeregister(comm, window));
}

#endif

#endif
