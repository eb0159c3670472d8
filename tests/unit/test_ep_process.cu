/* test_ep_process.cu: moe/ep between processes with CUDA IPC: one process a rank, spread over the
   GPUs that there are. Also ranks that are killed or stopped: the others end in time and name them.
   On a GPU only.

     nvcc -I. -arch=sm_90a tests/unit/test_ep_process.cu -o test_ep_process

   The program starts itself once a rank: test_ep_process --child RANK RANKS FILE WHEN HOW. The
   ranks meet in a file in shared memory. */
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "moe/ep/combine.cuh"
#include "tests/test.h"

#if MOE_ON_HOST

static void test_processes(void) { test_leave_out("CUDA IPC, on a GPU only"); }

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_processes);
    return test_end();
}

#else

enum { MOST = 8, TOKENS = 50, HIDDEN = 64, EXPERTS = 10, TOP_K = 3, ROUNDS = 5 };
enum { NEVER, BEFORE_DISPATCH, BEFORE_COMBINE, IN_DISPATCH, IN_COMBINE }; /* when rank 1 goes */
enum { KILLED, STOPPED };

/* What the ranks meet in. */
typedef struct meeting {
    uint32_t came[16];
    char card[16][MOST][512];
} meeting;

typedef struct member {
    meeting* m;
    int rank, ranks, round;
} member;

/* moe_peers_allgather: through shared memory, for at most 30 s. */
static int gather(void* context, const void* from, void* to, size_t bytes)
{
    member* me = (member*)context;
    const int round = me->round++;
    const time_t begun = time(0);
    if (bytes > sizeof me->m->card[0][0] || round >= 16) return 1;
    memcpy(me->m->card[round][me->rank], from, bytes);
    __sync_synchronize();
    __sync_fetch_and_add(&me->m->came[round], 1u);
    while (__sync_fetch_and_add(&me->m->came[round], 0u) < (uint32_t)me->ranks) {
        if (time(0) - begun > 30) return 1;
        usleep(50);
    }
    for (int r = 0; r < me->ranks; ++r)
        memcpy((char*)to + (size_t)r * bytes, me->m->card[round][r], bytes);
    return 0;
}

/* In place of experts: row = the token's x times the number of the expert + 1. */
typedef struct scale_args {
    const uint16_t* x;
    const int32_t *row_slot, *expert_offset;
    uint16_t* rows;
    uint64_t* fault;
    int32_t first, P;
} scale_args;

MOE_KERNEL(64, 1) scale_rows(MOE_ARG(scale_args) a)
{
    if (moe_fault_stopped(a.fault)) return;
    for (int e = 0; e < a.P; ++e)
        for (int r = a.expert_offset[e] + blockIdx.x; r < a.expert_offset[e + 1]; r += gridDim.x)
            moe_store_f32(a.rows, (int64_t)r * HIDDEN + threadIdx.x, MOE_BF16,
                          moe_load_f32(a.x, (int64_t)(a.row_slot[r] / TOP_K) * HIDDEN + threadIdx.x,
                                       MOE_BF16) *
                              (float)(a.first + e + 1));
}

static int32_t id_of(int rank, int round, int i)
{
    return (i * 7 + rank * 3 + round * 5) % EXPERTS;
}

static void go(int how)
{
    if (how == KILLED) raise(SIGKILL);
    raise(SIGSTOP); /* until the parent kills this process */
}

/* Ends a child with a line of its own. */
#define CHILD_CHECK(cond, ...)                                                                     \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            printf("rank %d: %s ", rank, #cond);                                                   \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
            fflush(stdout);                                                                        \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

/* One rank: exchanges in a row; in round 2 rank 1 goes. Returns 0 where all was as it should be. */
static int child(int rank, int ranks, const char* path, int when, int how)
{
    const int fd = open(path, O_RDWR);
    member me = {0, rank, ranks, 0};
    int devices = 0;
    uint64_t bytes, *fault;
    void *region, *workspace;
    uint16_t *x, *y, *rows, host[TOKENS * HIDDEN];
    int32_t* ids;
    moe_peers peers;
    moe_peers_pair pair;
    moe_ep_dispatch_desc d;
    moe_ep_combine_desc c;
    moe_ep_view v;
    size_t work;
    cudaStream_t stream;
    me.m = (meeting*)mmap(0, sizeof(meeting), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHILD_CHECK(me.m != (meeting*)MAP_FAILED, "no shared memory");
    CHILD_CHECK(cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0, "no device");
    TEST_CUDA(cudaSetDevice(rank * devices / ranks));
    TEST_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    memset(&d, 0, sizeof d);
    d.buffers.max_tokens = TOKENS, d.buffers.hidden = HIDDEN;
    d.buffers.num_experts = EXPERTS, d.buffers.top_k = TOP_K;
    CHILD_CHECK(moe_ep_buffers_end(&d.buffers, ranks, &bytes) == MOE_OK, "buffers");
    TEST_CUDA(cudaMalloc(&region, bytes));
    TEST_CUDA(cudaMalloc((void**)&x, sizeof host));
    TEST_CUDA(cudaMalloc((void**)&y, sizeof host));
    TEST_CUDA(cudaMalloc((void**)&ids, TOKENS * TOP_K * 4));
    TEST_CUDA(cudaMalloc((void**)&fault, 8));
    TEST_CUDA(cudaMemset(fault, 0, 8));
    CHILD_CHECK(moe_preload() == MOE_OK, "preload");
    {
        const moe_status s =
            moe_peers_create_ipc(&peers, rank, ranks, 0, region, bytes, gather, &me, &pair);
        char text[MOE_STATUS_TEXT];
        CHILD_CHECK(s == MOE_OK, "%s: rank %d, rank %d", moe_status_describe(s, text), pair.from,
                    pair.to);
    }
    CHILD_CHECK(peers.ranks_on_device == (ranks + devices - 1) / devices || ranks % devices,
                "%d ranks on this device", peers.ranks_on_device);
    peers.timeout_ns = 300000000;
    for (int i = 0; i < TOKENS * HIDDEN; ++i) moe_store(host, i, MOE_BF16, (float)(i % 3 - 1));
    TEST_CUDA(cudaMemcpy(x, host, sizeof host, cudaMemcpyHostToDevice));
    TEST_CUDA(cudaDeviceSynchronize()); /* a copy may end after the call */
    d.peers = &peers, d.x = x, d.ids = ids, d.fault = fault, d.num_tokens = TOKENS, d.tag = 3;
    CHILD_CHECK(moe_ep_dispatch_workspace(&d, &work) == MOE_OK, "workspace");
    TEST_CUDA(cudaMalloc(&workspace, work));
    d.workspace = workspace, d.workspace_bytes = work;
    CHILD_CHECK(moe_ep_dispatch_get_view(&d, &v) == MOE_OK, "view");
    TEST_CUDA(cudaMalloc((void**)&rows, (size_t)v.num_rows * HIDDEN * 2));
    memset(&c, 0, sizeof c);
    c.dispatch = &d, c.rows = rows, c.y = y, c.tag = 3;
    for (int round = 0; round < ROUNDS; ++round) {
        const int goes = rank == 1 && when != NEVER && round == 2;
        int32_t list[TOKENS * TOP_K];
        scale_args s = {
            (const uint16_t*)v.recv_x,          v.row_slot, v.expert_offset, rows, fault,
            moe_ep_first(rank, EXPERTS, ranks), v.num_local};
        moe_launch_config l = moe_grid(8, HIDDEN, 0, stream);
        struct timespec t0, t1;
        uint64_t word;
        for (int i = 0; i < TOKENS * TOP_K; ++i) list[i] = id_of(rank, round, i);
        TEST_CUDA(cudaMemcpy(ids, list, sizeof list, cudaMemcpyHostToDevice));
        TEST_CUDA(cudaDeviceSynchronize());
        if (goes && when == BEFORE_DISPATCH) go(how);
        timespec_get(&t0, TIME_UTC);
        CHILD_CHECK(moe_ep_dispatch(&d, stream) == MOE_OK, "dispatch");
        if (goes && when == IN_DISPATCH) go(how); /* its kernels may be running */
        CHILD_CHECK(MOE_LAUNCH(scale_rows, l, s) == MOE_OK, "rows");
        if (goes && when == BEFORE_COMBINE) {
            TEST_CUDA(cudaStreamSynchronize(stream));
            go(how);
        }
        CHILD_CHECK(moe_ep_combine(&c, stream) == MOE_OK, "combine");
        if (goes && when == IN_COMBINE) go(how);
        TEST_CUDA(cudaStreamSynchronize(stream));
        timespec_get(&t1, TIME_UTC);
        TEST_CUDA(cudaMemcpy(&word, fault, 8, cudaMemcpyDeviceToHost));
        if (word) { /* the rank that is gone, in time; and this process and its memory still work */
            const moe_peers_late late = moe_peers_late_decode(word);
            const double ms =
                (double)(t1.tv_sec - t0.tv_sec) * 1e3 + (double)(t1.tv_nsec - t0.tv_nsec) * 1e-6;
            CHILD_CHECK(when != NEVER && round >= 2, "round %d: a fault, %llx", round,
                        (unsigned long long)word);
            CHILD_CHECK(late.late == 1 && late.tag == 3, "late %d, phase %d, tag %d", late.late,
                        late.phase, late.tag);
            CHILD_CHECK(when > BEFORE_COMBINE ||
                            late.phase == (when == BEFORE_DISPATCH ? MOE_PHASE_DISPATCH
                                                                   : MOE_PHASE_COMBINE),
                        "phase %d", late.phase);
            CHILD_CHECK(ms < 300 + 700, "%.0f ms", ms);
            TEST_CUDA(cudaMemcpy(y, host, sizeof host, cudaMemcpyHostToDevice));
            TEST_CUDA(cudaDeviceSynchronize());
            return 0;
        }
        TEST_CUDA(cudaMemcpy(host, y, sizeof host, cudaMemcpyDeviceToHost));
        for (int i = 0; i < TOKENS * HIDDEN; ++i) {
            const int t = i / HIDDEN;
            int sum = 0;
            for (int k = 0; k < TOP_K; ++k) sum += list[t * TOP_K + k] + 1;
            CHILD_CHECK(moe_load(host, i, MOE_BF16) == (float)((i % 3 - 1) * sum),
                        "round %d, token %d: %g", round, t, moe_load(host, i, MOE_BF16));
        }
    }
    CHILD_CHECK(when == NEVER, "rank 1 went and nothing showed");
    CHILD_CHECK(!gather(&me, &rank, host, 4), "the last meeting"); /* nobody frees too early */
    CHILD_CHECK(moe_peers_close_ipc(&peers) == MOE_OK, "close");
    CHILD_CHECK(!gather(&me, &rank, host, 4), "closed");
    TEST_CUDA(cudaFree(region));
    return 0;
}

/* Starts `ranks` children and waits; rank 1 goes at `when`. */
static void processes(int ranks, int when, int how)
{
    char path[] = "/dev/shm/moe_ep_XXXXXX";
    const int fd = mkstemp(path);
    pid_t pid[MOST];
    if (!CHECK(fd >= 0 && ftruncate(fd, sizeof(meeting)) == 0, "no shared memory")) return;
    fflush(stdout);
    for (int r = 0; r < ranks; ++r) {
        pid[r] = vfork();
        if (pid[r] == 0) {
            char number[4][12];
            const int value[4] = {r, ranks, when, how};
            for (int i = 0; i < 4; ++i) snprintf(number[i], sizeof number[i], "%d", value[i]);
            execl("/proc/self/exe", test_now.argv[0], "--child", number[0], number[1], path,
                  number[2], number[3], (char*)0);
            _exit(9);
        }
    }
    for (int r = ranks - 1; r >= 0; --r) {
        int status = 0;
        if (r == 1 && when != NEVER) continue;
        waitpid(pid[r], &status, 0);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0,
              "%d ranks, rank 1 goes at %d (%d): rank %d: status %x", ranks, when, how, r, status);
    }
    if (when != NEVER) {
        kill(pid[1], SIGKILL);
        waitpid(pid[1], 0, 0);
    }
    close(fd);
    unlink(path);
}

static void test_processes(void)
{
    processes(2, NEVER, 0);
    processes(4, NEVER, 0);
}

static void test_killed(void)
{
    for (int when = BEFORE_DISPATCH; when <= IN_COMBINE; ++when) processes(4, when, KILLED);
}

static void test_stopped(void)
{
    for (int when = BEFORE_DISPATCH; when <= BEFORE_COMBINE; ++when) processes(4, when, STOPPED);
}

int main(int argc, char** argv)
{
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    if (argc == 7 && !strcmp(argv[1], "--child"))
        return child(atoi(argv[2]), atoi(argv[3]), argv[4], atoi(argv[5]), atoi(argv[6]));
    test_begin(argc, argv);
    RUN(test_processes);
    RUN(test_killed);
    RUN(test_stopped);
    return test_end();
}

#endif
