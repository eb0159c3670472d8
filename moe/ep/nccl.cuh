/* nccl.cuh: NCCL as the all-gather that connects a group, and as the transport of an exchange in
   messages (message.cuh), for ranks that do not reach each other's memory: other hosts, or GPUs
   without peer access. Link with -lnccl. Empty on the CPU backend.

   As bootstrap, where the ranks of one host connect over CUDA IPC:
     moe_nccl_bootstrap b = {comm, scratch, scratch_bytes, stream};
     moe_peers_create_ipc(&peers, rank, W, host, region, bytes, moe_nccl_allgather, &b, &pair);
   nccl_window.cuh connects a group without IPC.

   As transport; peers has rank and num_ranks of the communicator, nothing else:
     moe_ep_message_prepare(&dispatch, &combine, &p);             // as message.cuh says
     moe_status s = moe_nccl_dispatch(&p, comm, counts, stream);  // the host waits once, for counts
     ... experts.cuh on the view ...
     if (s == MOE_OK) s = moe_nccl_combine(&p, comm, counts, stream);

   Over several hosts whose ranks reach each other within a host: hosts.cuh's exchange, with
   moe_nccl_hosts_dispatch and moe_nccl_hosts_combine. rail is a communicator of the ranks with
   equal `local`, in the order of their hosts: ncclCommSplit(comm, local, host, &rail, 0).

   y has the bits of the form over peer pointers. Per rank the dispatch sends one message of 16
   bytes and one of rows, ids and weights to each other rank, the combine one of rows and one of 16
   bytes; each pair of them is one NCCL group. A rank with a stop fault sends empty messages:
   moe_nccl_dispatch returns fault (MOE_ERR_CONFLICT) on all ranks, whose fault words then hold that
   fault, and a combine leaves all y as they were. A rank that does not come at all is NCCL's to
   report: its own timeouts and aborts.

   Not in a CUDA graph. All ranks call these in the same order. */
#ifndef MOE_EP_NCCL_CUH
#define MOE_EP_NCCL_CUH

#include "hosts.cuh"

#if !MOE_ON_HOST

#include <nccl.h>

/* Returns a call's MOE_OK, or nccl (MOE_ERR_DEVICE). */
#define MOEI_NCCL(call) ((call) == ncclSuccess ? MOE_OK : MOE_STATUS(MOE_ERR_DEVICE, nccl))

/* The context of moe_nccl_allgather. */
typedef struct moe_nccl_bootstrap {
    ncclComm_t comm;
    void* scratch;        /* device memory of the communicator's device */
    size_t scratch_bytes; /* 256 (W + 1) or more */
    cudaStream_t stream;  /* the call waits for it */
} moe_nccl_bootstrap;

/* Is a moe_peers_allgather: gathers host memory through NCCL. Returns 0, or 1 where NCCL or CUDA
   fails, or the scratch memory is too small. */
MOE_HOST int moe_nccl_allgather(void* context, const void* from, void* to, size_t bytes)
{
    const moe_nccl_bootstrap* b = (const moe_nccl_bootstrap*)context;
    char* scratch = (char*)b->scratch;
    int num_ranks = 0;
    if (ncclCommCount(b->comm, &num_ranks) != ncclSuccess) return 1;
    if ((size_t)(num_ranks + 1) * bytes > b->scratch_bytes) return 1;
    if (cudaMemcpyAsync(scratch, from, bytes, cudaMemcpyHostToDevice, b->stream) != cudaSuccess)
        return 1;
    if (ncclAllGather(scratch, scratch + bytes, bytes, ncclUint8, b->comm, b->stream) !=
        ncclSuccess)
        return 1;
    if (cudaMemcpyAsync(to, scratch + bytes, (size_t)num_ranks * bytes, cudaMemcpyDeviceToHost,
                        b->stream) != cudaSuccess)
        return 1;
    return cudaStreamSynchronize(b->stream) != cudaSuccess;
}

/* Queues sends and receives of the segments of all ranks; the own one is a copy. Within a group. */
MOE_HOST moe_status moei_nccl_queue(ncclComm_t comm, const moe_ep_segment* segment, int rank,
                                    int num_ranks, cudaStream_t stream)
{
    for (int i = 1; i < num_ranks; ++i) { /* every rank begins with another one */
        const int to = (rank + i) % num_ranks, from = (rank + num_ranks - i) % num_ranks;
        if (segment[to].send_bytes)
            MOE_TRY(MOEI_NCCL(
                ncclSend(segment[to].send, segment[to].send_bytes, ncclUint8, to, comm, stream)));
        if (segment[from].recv_bytes)
            MOE_TRY(MOEI_NCCL(ncclRecv(segment[from].recv, segment[from].recv_bytes, ncclUint8,
                                       from, comm, stream)));
    }
    if (!segment[rank].send_bytes) return MOE_OK;
    return moe_cuda_status(cudaMemcpyAsync(segment[rank].recv, segment[rank].send,
                                           segment[rank].send_bytes, cudaMemcpyDeviceToDevice,
                                           stream));
}

/* Carries the segments of `kinds`, one or two, in one NCCL group. */
MOE_HOST moe_status moei_nccl_carry(const moe_ep_message_prepared* p, ncclComm_t comm,
                                    const int* kinds, int num_kinds,
                                    const moe_ep_message_counts* counts, cudaStream_t stream)
{
    moe_ep_segment segment[MOE_PEERS_MAX_RANKS];
    moe_status s;
    ncclResult_t e;
    MOE_TRY(MOEI_NCCL(ncclGroupStart()));
    s = MOE_OK;
    for (int i = 0; i < num_kinds && s == MOE_OK; ++i) {
        s = moe_ep_message_segments(p, kinds[i], counts, segment);
        if (s == MOE_OK)
            s = moei_nccl_queue(comm, segment, p->args.rank, p->args.num_ranks, stream);
    }
    e = ncclGroupEnd();
    return s != MOE_OK ? s : MOEI_NCCL(e);
}

/* Refuses a communicator that is not the prepared exchange's. */
MOE_HOST moe_status moei_nccl_check(const moe_ep_message_prepared* p, ncclComm_t comm,
                                    const moe_ep_message_counts* counts)
{
    int rank, num_ranks;
    MOE_REQUIRE(p && counts, MOE_ERR_NULL, desc);
    MOE_TRY(MOEI_NCCL(ncclCommUserRank(comm, &rank)));
    MOE_TRY(MOEI_NCCL(ncclCommCount(comm, &num_ranks)));
    MOE_REQUIRE(rank == p->args.rank && num_ranks == p->args.num_ranks, MOE_ERR_CONFLICT, peers);
    return MOE_OK;
}

/* Sends tokens to the ranks of their experts, and makes the row maps. The host waits for `stream`
   in between. counts: host memory, pinned for speed, kept until the combine. Errors: peers
   (MOE_ERR_CONFLICT): another communicator; nccl (MOE_ERR_DEVICE); fault (MOE_ERR_CONFLICT): some
   rank has a stop fault, all ranks return it; those of CUDA. */
MOE_HOST moe_status moe_nccl_dispatch(const moe_ep_message_prepared* p, ncclComm_t comm,
                                      moe_ep_message_counts* counts, cudaStream_t stream)
{
    static const int headers = MOE_EP_SEGMENT_HEADERS, records = MOE_EP_SEGMENT_RECORDS;
    moe_status s;
    MOE_TRY(moei_nccl_check(p, comm, counts));
    MOE_TRY(moe_ep_message_run(p, MOE_EP_MESSAGE_PACK, stream));
    MOE_TRY(moei_nccl_carry(p, comm, &headers, 1, 0, stream));
    MOE_TRY(moe_ep_message_read(p, counts, stream));
    MOE_TRY_CUDA(cudaStreamSynchronize(stream));
    s = moe_ep_message_check(counts, p->args.num_ranks, 0);
    if (s != MOE_OK) {
        MOE_TRY(moe_ep_message_run(p, MOE_EP_MESSAGE_TAKE, stream));
        return s;
    }
    MOE_TRY(moei_nccl_carry(p, comm, &records, 1, counts, stream));
    return moe_ep_message_run(p, MOE_EP_MESSAGE_UNPACK, stream);
}

/* Brings the experts' rows home and sums them. The host waits for nothing. Errors: as of
   moe_nccl_dispatch. */
MOE_HOST moe_status moe_nccl_combine(const moe_ep_message_prepared* p, ncclComm_t comm,
                                     const moe_ep_message_counts* counts, cudaStream_t stream)
{
    static const int kinds[] = {MOE_EP_SEGMENT_ROWS, MOE_EP_SEGMENT_HEADERS};
    MOE_TRY(moei_nccl_check(p, comm, counts));
    MOE_TRY(moe_ep_message_run(p, MOE_EP_MESSAGE_PACK_ROWS, stream));
    MOE_TRY(moei_nccl_carry(p, comm, kinds, 2, counts, stream));
    return moe_ep_message_run(p, MOE_EP_MESSAGE_SUM, stream);
}

/* The same over hosts: between hosts through the rail, then within this one. Errors: as of
   moe_nccl_dispatch; after a fault the ranks of this host stop too. */
MOE_HOST moe_status moe_nccl_hosts_dispatch(const moe_ep_hosts_prepared* p, ncclComm_t rail,
                                            moe_ep_message_counts* counts, cudaStream_t stream)
{
    moe_status s;
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    s = moe_nccl_dispatch(&p->rail, rail, counts, stream);
    if (s != MOE_OK && s != MOE_STATUS(MOE_ERR_CONFLICT, fault)) return s;
    MOE_TRY(moe_ep_dispatch_run(&p->dispatch, stream)); /* with a fault: tells this host's ranks */
    return s;
}

/* Brings the rows home: sums within this host, then of all hosts. */
MOE_HOST moe_status moe_nccl_hosts_combine(const moe_ep_hosts_prepared* p, ncclComm_t rail,
                                           const moe_ep_message_counts* counts, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(moe_ep_combine_run(&p->combine, stream));
    return moe_nccl_combine(&p->rail, rail, counts, stream);
}

#endif

#endif
