/* test_ep_nccl.cu: moe/ep with NCCL: the exchange in messages, the exchange over hosts, the all-gather
   as bootstrap, and groups of symmetric windows. One process a rank, spread over the GPUs that there are; NCCL takes several
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

enum { MESSAGES, HOSTS, BOOTSTRAP, WINDOWS }; /* what a child does */
enum { LOCAL = 2 };                           /* HOSTS: ranks of a host */

#define CHILD_NCCL(call)                                                                           \
    do {                                                                                           \
        const ncclResult_t e_ = (call);                                                            \
        CHILD_CHECK(e_ == ncclSuccess, "%s", ncclGetErrorString(e_));                              \
    } while (0)

/* Sets NCCL's environment: this rank seems to be on host number `host`. */
static void pretend(int host)
{
    char name[32];
    snprintf(name, sizeof name, "node%d", host);
    setenv("NCCL_HOSTID", name, 1);
    setenv("NCCL_NVLS_ENABLE", "0", 1); /* no multicast */
    setenv("NCCL_IB_DISABLE", "1", 1);
    setenv("NCCL_SOCKET_IFNAME", "lo", 1);
}

/* Makes the communicator of this rank and every step-th one before and behind it. */
static ncclComm_t communicate(state* s, int step)
{
    const int rank = s->rank;
    ncclUniqueId id[MOST], own;
    ncclComm_t comm;
    memset(&own, 0, sizeof own);
    if (rank < step) CHILD_NCCL(ncclGetUniqueId(&own));
    CHILD_CHECK(!gather(&s->me, &own, id, sizeof own), "the meeting");
    CHILD_NCCL(ncclCommInitRank(&comm, s->me.ranks / step, id[rank % step], rank / step));
    return comm;
}

/* Exchanges through NCCL alone, in a row, and a rank that stops. */
static void use_messages(state* s, party* p, ncclComm_t comm, int form)
{
    const int rank = s->rank;
    static moe_ep_message_prepared m;
    const uint64_t fault = MOEI_FAULT_KEY(MOE_FAULT_BAD_TABLE, 1, 17);
    moe_ep_message_counts* counts;
    moe_ep_message_view v;
    size_t work;
    (void)size_party(s, p, s->me.ranks);
    p->peers.rank = rank, p->peers.num_ranks = s->me.ranks;
    p->d.buffers.combine_form = form;
    describe(s, p);
    CHILD_CHECK(moe_ep_message_workspace(&p->d, &work) == MOE_OK, "workspace");
    TEST_CUDA(cudaMalloc(&p->workspace, work));
    TEST_CUDA(cudaMalloc((void**)&p->rows, (size_t)p->d.buffers.max_rows * HIDDEN * 2));
    TEST_CUDA(cudaMallocHost((void**)&counts, sizeof *counts));
    p->d.workspace = p->workspace, p->d.workspace_bytes = work;
    p->c.rows = p->rows;
    CHILD_CHECK(moe_ep_message_prepare(&p->d, &p->c, &m) == MOE_OK, "prepare");
    CHILD_CHECK(moe_ep_message_get_view(&m, &v) == MOE_OK, "view");
    for (int round = 0; round < (form == MOE_EP_GATHERED ? ROUNDS + 1 : ROUNDS); ++round) {
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

/* Exchanges over hosts of LOCAL ranks in a row: IPC within a host, NCCL between hosts. */
static void use_hosts(state* s, party* p, ncclComm_t rail)
{
    const int rank = s->rank, host = rank / LOCAL, hosts = s->me.ranks / LOCAL;
    static moe_ep_hosts_prepared h;
    moe_ep_hosts_desc d;
    moe_ep_message_counts* counts;
    moe_peers far;
    moe_peers_pair pair;
    uint64_t bytes;
    size_t work;
    int first, own;
    member local = s->me;
    memset((void*)&d, 0, sizeof d);
    memset((void*)&far, 0, sizeof far);
    far.rank = host, far.num_ranks = hosts;
    (void)size_party(s, p, hosts);
    describe(s, p);
    d.dispatch = p->d;
    d.dispatch.peers = &far;
    d.dispatch.buffers.max_rows = 0;
    d.combine.y = s->y;
    CHILD_CHECK(moe_ep_hosts_region(&d, LOCAL, &bytes) == MOE_OK, "region");
    TEST_CUDA(cudaMalloc(&p->region, bytes));
    local.rank = rank % LOCAL, local.ranks = LOCAL, local.round = 4 + 2 * host;
    CHILD_CHECK(moe_peers_create_ipc(&p->peers, rank % LOCAL, LOCAL, host, p->region, bytes, gather,
                                     &local, &pair) == MOE_OK,
                "the host's group: %d, %d", pair.from, pair.to);
    p->peers.ranks_on_device = s->me.ranks; /* those of other hosts may be on this GPU too */
    d.near = &p->peers;
    CHILD_CHECK(moe_ep_hosts_workspace(&d, &work) == MOE_OK, "workspace");
    TEST_CUDA(cudaMalloc(&p->workspace, work));
    TEST_CUDA(
        cudaMalloc((void**)&p->rows, (size_t)(hosts * (TOKENS + 1) * LOCAL * TOP_K * HIDDEN) * 2));
    TEST_CUDA(cudaMallocHost((void**)&counts, sizeof *counts));
    d.dispatch.workspace = p->workspace, d.dispatch.workspace_bytes = work;
    d.rows = p->rows;
    CHILD_CHECK(moe_ep_hosts_prepare(&d, &h) == MOE_OK, "prepare");
    moe_ep_hosts_experts(host, hosts, rank % LOCAL, LOCAL, EXPERTS, &first, &own);
    CHILD_CHECK(h.view.num_local == own, "%d experts", own);
    for (int round = 0; round < ROUNDS; ++round) {
        int32_t list[TOKENS * TOP_K];
        scale_args a = {(const uint16_t*)h.view.recv_x,
                        h.view.row_slot,
                        h.view.expert_offset,
                        p->rows,
                        s->fault,
                        HIDDEN,
                        first,
                        own};
        moe_launch_config l = moe_grid(8, HIDDEN, 0, s->stream);
        put_ids(s, round, 0, list);
        CHILD_CHECK(moe_nccl_hosts_dispatch(&h, rail, counts, s->stream) == MOE_OK, "dispatch");
        CHILD_CHECK(MOE_LAUNCH(scale_rows, l, a) == MOE_OK, "rows");
        CHILD_CHECK(moe_nccl_hosts_combine(&h, rail, counts, s->stream) == MOE_OK, "combine");
        TEST_CUDA(cudaStreamSynchronize(s->stream));
        check_y(s, round, list);
    }
    TEST_CUDA(cudaFreeHost(counts));
    CHILD_CHECK(!gather(&s->me, &rank, s->host, 4), "the last meeting");
    CHILD_CHECK(moe_peers_close_ipc(&p->peers) == MOE_OK, "close");
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
    pretend(how == WINDOWS ? 0 : how == HOSTS ? rank / LOCAL : rank);
    comm = communicate(&s, how == HOSTS ? LOCAL : 1);
    if (how == MESSAGES) {
        use_messages(&s, &p, comm, MOE_EP_REDUCED);
        use_messages(&s, &p, comm, MOE_EP_GATHERED); /* ends with a rank that stops */
    } else if (how == HOSTS) {
        use_hosts(&s, &p, comm);
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
        for (int i = 0; i < 4; ++i) { /* what one rank is refused, all ranks return */
            const int wrong = rank == i % 3;
            void* const region = wrong && i == 2 ? 0 : p.region;
            const uint64_t some = wrong && i < 2    ? bytes - 256 * (uint64_t)(i + 1)
                                  : wrong && i == 3 ? 256
                                                    : bytes;
            const moe_status want = i < 2    ? MOE_STATUS(MOE_ERR_CONFLICT, region_bytes)
                                    : i == 2 ? MOE_STATUS(MOE_ERR_NULL, region)
                                             : MOE_STATUS(MOE_ERR_RANGE, region_bytes);
            ncclWindow_t window;
            CHILD_CHECK(moe_peers_create_nccl(&p.peers, comm, region, some, s.stream, &window,
                                              &pair) == want,
                        "refusal %d", i);
        }
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

static void test_hosts(void) { processes(2 * LOCAL, HOSTS); }

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
    RUN(test_hosts);
    RUN(test_bootstrap);
    RUN(test_windows);
    return test_end();
}

#endif
