/* test_ep_nccl.cu: moe/ep with NCCL: the exchange in messages, the all-gather as bootstrap, and groups
   of symmetric windows. One process a rank, spread over the GPUs that there are; NCCL takes several
   ranks of a GPU where each seems to be on a host of its own (NCCL_HOSTID). On a GPU only.

     nvcc -I. -std=c++17 -arch=sm_90a -DTEST_NCCL tests/unit/test_ep_nccl.cu -lnccl -o test_ep_nccl

   The program starts itself once a rank: test_ep_nccl --child RANK RANKS FILE HOW 0. */
#include "moe/ep/owner.h"
#include "tests/test.h"

#if MOE_ON_HOST || !defined(TEST_NCCL)

static void test_messages(void) { test_leave_out("NCCL, on a GPU only, with -DTEST_NCCL"); }

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_messages);
    return test_end();
}

#else

#include "moe/ep/nccl_window.cuh"
#include "tests/unit/ep/process.h"

enum { MESSAGES, BOOTSTRAP, WINDOWS }; /* what a child does */

#define CHILD_NCCL(call)                                                                           \
    do {                                                                                           \
        const ncclResult_t e_ = (call);                                                            \
        CHILD_CHECK(e_ == ncclSuccess, "%s", ncclGetErrorString(e_));                              \
    } while (0)

/* Makes the communicator of all ranks. own_hosts: 1: each rank seems to be on a host of its own. */
static ncclComm_t communicate(state* s, int own_hosts)
{
    const int rank = s->rank;
    ncclUniqueId id[MOST], own;
    ncclComm_t comm;
    char host[32];
    snprintf(host, sizeof host, "node%d", own_hosts ? rank : 0);
    setenv("NCCL_HOSTID", host, 1);
    setenv("NCCL_NVLS_ENABLE", "0", 1); /* no multicast */
    setenv("NCCL_IB_DISABLE", "1", 1);
    setenv("NCCL_SOCKET_IFNAME", "lo", 1);
    memset(&own, 0, sizeof own);
    if (rank == 0) CHILD_NCCL(ncclGetUniqueId(&own));
    CHILD_CHECK(!gather(&s->me, &own, id, sizeof own), "the meeting");
    CHILD_NCCL(ncclCommInitRank(&comm, s->me.ranks, id[0], rank));
    return comm;
}

/* Exchanges through NCCL alone, in a row, and a rank that stops. */
static void use_messages(state* s, party* p, ncclComm_t comm)
{
    const int rank = s->rank;
    static moe_ep_message_prepared m;
    const uint64_t fault = MOEI_FAULT_KEY(MOE_FAULT_BAD_TABLE, 1, 17);
    moe_ep_message_counts* counts;
    moe_ep_message_view v;
    size_t work;
    (void)size_party(s, p, s->me.ranks);
    p->peers.rank = rank, p->peers.num_ranks = s->me.ranks;
    describe(s, p);
    CHILD_CHECK(moe_ep_message_workspace(&p->d, &work) == MOE_OK, "workspace");
    TEST_CUDA(cudaMalloc(&p->workspace, work));
    TEST_CUDA(cudaMalloc((void**)&p->rows, (size_t)p->d.buffers.max_rows * HIDDEN * 2));
    TEST_CUDA(cudaMallocHost((void**)&counts, sizeof *counts));
    p->d.workspace = p->workspace, p->d.workspace_bytes = work;
    p->c.rows = p->rows;
    CHILD_CHECK(moe_ep_message_prepare(&p->d, &p->c, &m) == MOE_OK, "prepare");
    CHILD_CHECK(moe_ep_message_get_view(&m, &v) == MOE_OK, "view");
    for (int round = 0; round < ROUNDS + 1; ++round) {
        int32_t list[TOKENS * TOP_K];
        scale_args a = {(const uint16_t*)v.x,
                        v.row_slot,
                        v.expert_offset,
                        p->rows,
                        s->fault,
                        v.x_stride,
                        moe_ep_first(rank, EXPERTS, s->me.ranks),
                        v.num_local};
        moe_launch_config l = moe_grid(8, HIDDEN, 0, s->stream);
        const moe_status stopped = MOE_STATUS(MOE_ERR_CONFLICT, fault);
        put_ids(s, round, 0, list);
        if (round == ROUNDS && rank == 1)
            TEST_CUDA(cudaMemcpy(s->fault, &fault, 8, cudaMemcpyHostToDevice));
        TEST_CUDA(cudaDeviceSynchronize());
        const moe_status e = moe_nccl_dispatch(&m, comm, counts, s->stream);
        CHILD_CHECK(e == (round == ROUNDS ? stopped : MOE_OK), "round %d: status %x", round, e);
        if (e != MOE_OK) break;
        CHILD_CHECK(MOE_LAUNCH(scale_rows, l, a) == MOE_OK, "rows");
        CHILD_CHECK(moe_nccl_combine(&m, comm, counts, s->stream) == MOE_OK, "combine");
        TEST_CUDA(cudaStreamSynchronize(s->stream));
        check_y(s, round, list);
    }
    TEST_CUDA(cudaFreeHost(counts));
}

/* Exchanges over peer pointers in a row. */
static void use_peers(state* s, party* p)
{
    const int rank = s->rank;
    furnish(s, p);
    for (int round = 0; round < ROUNDS; ++round) {
        int32_t list[TOKENS * TOP_K];
        scale_args a = {(const uint16_t*)p->v.recv_x,
                        p->v.row_slot,
                        p->v.expert_offset,
                        p->rows,
                        s->fault,
                        HIDDEN,
                        moe_ep_first(rank, EXPERTS, s->me.ranks),
                        p->v.num_local};
        moe_launch_config l = moe_grid(8, HIDDEN, 0, s->stream);
        uint64_t word;
        put_ids(s, round, 0, list);
        CHILD_CHECK(moe_ep_dispatch(&p->d, s->stream) == MOE_OK, "dispatch");
        CHILD_CHECK(MOE_LAUNCH(scale_rows, l, a) == MOE_OK, "rows");
        CHILD_CHECK(moe_ep_combine(&p->c, s->stream) == MOE_OK, "combine");
        TEST_CUDA(cudaStreamSynchronize(s->stream));
        TEST_CUDA(cudaMemcpy(&word, s->fault, 8, cudaMemcpyDeviceToHost));
        CHILD_CHECK(word == 0, "a fault, %llx", (unsigned long long)word);
        check_y(s, round, list);
    }
}

static int child(int rank, int ranks, const char* path, int how)
{
    static state s;
    static party p;
    moe_peers_pair pair = {-1, -1};
    ncclComm_t comm;
    char text[MOE_STATUS_TEXT];
    begin(&s, rank, ranks, path);
    comm = communicate(&s, how != WINDOWS);
    if (how == MESSAGES) {
        use_messages(&s, &p, comm);
    } else if (how == BOOTSTRAP) {
        const uint64_t bytes = size_party(&s, &p, ranks);
        moe_nccl_bootstrap b = {comm, 0, 4096 * 9, s.stream};
        TEST_CUDA(cudaMalloc(&p.region, bytes));
        TEST_CUDA(cudaMalloc(&b.scratch, b.scratch_bytes));
        const moe_status e = moe_peers_create_ipc(&p.peers, rank, ranks, 0, p.region, bytes,
                                                  moe_nccl_allgather, &b, &pair);
        CHILD_CHECK(e == MOE_OK, "%s, rank %d, rank %d", moe_status_describe(e, text), pair.from,
                    pair.to);
        use_peers(&s, &p);
        b.scratch_bytes = 16;
        CHILD_CHECK(moe_nccl_allgather(&b, s.host, s.host, 16) == 1, "too little scratch memory");
        CHILD_CHECK(!gather(&s.me, &rank, s.host, 4), "the last meeting");
        CHILD_CHECK(moe_peers_close_ipc(&p.peers) == MOE_OK, "close");
    } else {
        const uint64_t bytes = (size_party(&s, &p, ranks) + 4095) / 4096 * 4096;
        ncclWindow_t window;
        CHILD_NCCL(ncclMemAlloc(&p.region, bytes));
        const moe_status e =
            moe_peers_create_nccl(&p.peers, comm, p.region, bytes, s.stream, &window, &pair);
        CHILD_CHECK(e == MOE_OK, "%s, rank %d, rank %d", moe_status_describe(e, text), pair.from,
                    pair.to);
        use_peers(&s, &p);
        CHILD_CHECK(moe_peers_close_nccl(comm, window) == MOE_OK, "close");
        CHILD_NCCL(ncclMemFree(p.region));
    }
    CHILD_CHECK(!gather(&s.me, &rank, s.host, 4), "closed");
    CHILD_NCCL(ncclCommDestroy(comm));
    return 0;
}

static void processes(int ranks, int how)
{
    char path[] = "/dev/shm/moe_ep_XXXXXX";
    const int fd = mkstemp(path);
    pid_t pid[MOST];
    if (!CHECK(fd >= 0 && ftruncate(fd, sizeof(meeting)) == 0, "no shared memory")) return;
    fflush(stdout);
    for (int r = 0; r < ranks; ++r) pid[r] = start(r, ranks, path, how, 0);
    for (int r = ranks - 1; r >= 0; --r) {
        int status = 0;
        waitpid(pid[r], &status, 0);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%d ranks (%d): rank %d: status %x",
              ranks, how, r, status);
    }
    close(fd);
    unlink(path);
}

static int devices(void)
{
    int n = 0;
    TEST_CUDA(cudaGetDeviceCount(&n));
    return n;
}

static void test_messages(void)
{
    processes(2, MESSAGES);
    processes(4, MESSAGES);
}

static void test_bootstrap(void) { processes(3, BOOTSTRAP); }

static void test_windows(void)
{
    processes(devices() < MOST ? devices() : MOST, WINDOWS); /* NCCL takes one rank a GPU here */
    if (devices() == 1) printf("  one rank: no peer's window is tested\n");
}

int main(int argc, char** argv)
{
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    if (argc == 7 && !strcmp(argv[1], "--child"))
        return child(atoi(argv[2]), atoi(argv[3]), argv[4], atoi(argv[5]));
    test_begin(argc, argv);
    RUN(test_messages);
    RUN(test_bootstrap);
    RUN(test_windows);
    return test_end();
}

#endif
