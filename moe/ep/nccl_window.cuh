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

/* What a rank tells the others on its way. */
typedef struct moei_nccl_card {
    uint64_t bytes; /* of its region */
    moe_status status;
    int32_t to; /* first rank that it does not reach; -1 */
} moei_nccl_card;

/* Gathers the cards of all ranks. Returns the first status that is not MOE_OK, and sets *pair where
   that rank does not reach another: the same on all ranks. Errors: region_bytes (MOE_ERR_CONFLICT)
   where ranks differ in bytes; nccl (MOE_ERR_DEVICE). */
MOE_HOST moe_status moei_nccl_agree(moe_nccl_bootstrap* b, int num_ranks, const moei_nccl_card* own,
                                    moe_peers_pair* pair)
{
    moei_nccl_card card[MOE_PEERS_MAX_RANKS];
    MOE_REQUIRE(!moe_nccl_allgather(b, own, card, sizeof *own), MOE_ERR_DEVICE, nccl);
    for (int r = 0; r < num_ranks; ++r) {
        if (card[r].status != MOE_OK && card[r].to >= 0) pair->from = r, pair->to = card[r].to;
        if (card[r].status != MOE_OK) return card[r].status;
    }
    for (int r = 0; r < num_ranks; ++r)
        MOE_REQUIRE(card[r].bytes == card[0].bytes, MOE_ERR_CONFLICT, region_bytes);
    return MOE_OK;
}

/* Clears the header and fills in its table. address [W]: the table. */
MOE_HOST moe_status moei_nccl_connect(ncclWindow_t window, void* region, int rank, int num_ranks,
                                      cudaStream_t stream, void** address)
{
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
    return moe_cuda_status(cudaStreamSynchronize(stream));
}

/* Connects the ranks, which tell each other of errors through *b. *own: bytes and status of this
   rank. *window is null where nothing is registered. */
MOE_HOST moe_status moei_nccl_register(moe_nccl_bootstrap* b, moei_nccl_card* own, void* region,
                                       int rank, int num_ranks, void** address,
                                       ncclWindow_t* window, moe_peers_pair* pair)
{
    *window = 0;
    MOE_TRY(moei_nccl_agree(b, num_ranks, own, pair));
    own->status = MOEI_NCCL(
        ncclCommWindowRegister(b->comm, region, own->bytes, window, NCCL_WIN_COLL_SYMMETRIC));
    if (own->status == MOE_OK && !*window) /* symmetric memory is not supported */
        own->status = MOE_STATUS(MOE_ERR_DEVICE, nccl);
    if (own->status == MOE_OK) {
        own->to = moei_nccl_outside(b->comm, num_ranks);
        if (own->to >= 0) own->status = MOE_STATUS(MOE_ERR_DEVICE, peers);
    }
    MOE_TRY(moei_nccl_agree(b, num_ranks, own, pair));
    own->status = moei_nccl_connect(*window, region, rank, num_ranks, b->stream, address);
    return moei_nccl_agree(b, num_ranks, own, pair); /* all headers are written */
}

/* Connects the ranks of a communicator; all of them call it. region: of ncclMemAlloc, `bytes` on
   every rank. Registers it: *window is for moe_peers_close_nccl. The communicator's device is
   current. All ranks return the same status and pair, but where a pointer is null, NCCL refuses the
   communicator or CUDA has no memory: then a rank returns at once. Errors: those of
   moe_peers_create; region_bytes (MOE_ERR_CONFLICT) where ranks differ in `bytes`; MOE_ERR_DEVICE
   (nccl): NCCL refuses; MOE_ERR_DEVICE (peers): *pair does not reach each other. Nothing stays
   registered then. */
MOE_HOST moe_status moe_peers_create_nccl(moe_peers* peers, ncclComm_t comm, void* region,
                                          uint64_t bytes, cudaStream_t stream, ncclWindow_t* window,
                                          moe_peers_pair* pair)
{
    void* address[MOE_PEERS_MAX_RANKS];
    int rank, num_ranks;
    moei_nccl_card own = {bytes, MOE_OK, -1};
    moe_nccl_bootstrap b = {comm, 0, 0, stream};
    moe_status s;
    MOE_REQUIRE(peers && window && pair, MOE_ERR_NULL, desc);
    pair->from = pair->to = -1;
    MOE_TRY(MOEI_NCCL(ncclCommUserRank(comm, &rank)));
    MOE_TRY(MOEI_NCCL(ncclCommCount(comm, &num_ranks)));
    MOE_REQUIRE(num_ranks <= MOE_PEERS_MAX_RANKS, MOE_ERR_RANGE, num_ranks);
    own.status = moei_peers_check(rank, num_ranks, region, bytes);
    b.scratch_bytes = sizeof own * (size_t)(num_ranks + 1);
    MOE_TRY_CUDA(cudaMalloc(&b.scratch, b.scratch_bytes));
    s = moei_nccl_register(&b, &own, region, rank, num_ranks, address, window, pair);
    (void)cudaFree(b.scratch);
    if (s == MOE_OK) {
        moei_peers_fill(peers, rank, num_ranks, address, bytes);
    } else if (*window) {
        (void)ncclCommWindowDeregister(comm, *window);
        *window = 0;
    }
    return s;
}

/* Ends the registration; all ranks call it, when no kernel of any rank uses the group. */
MOE_HOST moe_status moe_peers_close_nccl(ncclComm_t comm, ncclWindow_t window)
{
    MOE_TRY_CUDA(cudaDeviceSynchronize());
    return MOEI_NCCL(ncclCommWindowDeregister(comm, window));
}

#endif

#endif
