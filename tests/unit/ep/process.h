/* process.h: what tests with one process a rank share: how the processes start and meet, a rank's
   arrays, an exchange of whole numbers that is checked exactly. */
#ifndef MOE_TESTS_EP_PROCESS_H
#define MOE_TESTS_EP_PROCESS_H

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "moe/ep/combine.cuh"
#include "tests/test.h"

enum { MOST = 8, TOKENS = 50, HIDDEN = 64, EXPERTS = 10, TOP_K = 3, ROUNDS = 5 };

/* What the ranks meet in. */
typedef struct meeting {
    uint32_t came[16];
    char card[16][MOST][512];
    uint32_t votes; /* bit r: rank r goes on */
    uint32_t went;  /* ranks that have computed in the smaller group */
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
    int64_t stride; /* elements between rows of x */
    int32_t first, P;
} scale_args;

MOE_KERNEL(64, 1) scale_rows(MOE_ARG(scale_args) a)
{
    if (moe_fault_stopped(a.fault)) return;
    for (int e = 0; e < a.P; ++e)
        for (int r = a.expert_offset[e] + blockIdx.x; r < a.expert_offset[e + 1]; r += gridDim.x)
            moe_store_f32(
                a.rows, (int64_t)r * HIDDEN + threadIdx.x, MOE_BF16,
                moe_load_f32(a.x, a.row_slot[r] / TOP_K * a.stride + threadIdx.x, MOE_BF16) *
                    (float)(a.first + e + 1));
}

static int32_t id_of(int rank, int round, int i)
{
    return (i * 7 + rank * 3 + round * 5) % EXPERTS;
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

/* One rank's arrays, which serve all its groups. */
typedef struct state {
    member me;
    int rank; /* in the group of all */
    cudaStream_t stream;
    uint16_t *x, *y, host[TOKENS * HIDDEN];
    int32_t* ids;
    uint64_t* fault;
} state;

/* A group of this rank's: of all ranks, of those that are left, of all again. */
typedef struct party {
    moe_peers peers;
    void *region, *workspace;
    uint16_t* rows;
    moe_ep_dispatch_desc d;
    moe_ep_combine_desc c;
    moe_ep_view v;
} party;

/* Makes a rank's arrays on its device. path: of the meeting. */
static void begin(state* s, int rank, int ranks, const char* path)
{
    const int fd = open(path, O_RDWR);
    int devices = 0;
    s->rank = s->me.rank = rank, s->me.ranks = ranks;
    s->me.m = (meeting*)mmap(0, sizeof(meeting), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHILD_CHECK(s->me.m != (meeting*)MAP_FAILED, "no shared memory");
    CHILD_CHECK(cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0, "no device");
    TEST_CUDA(cudaSetDevice(rank * devices / ranks));
    TEST_CUDA(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    TEST_CUDA(cudaMalloc((void**)&s->x, sizeof s->host));
    TEST_CUDA(cudaMalloc((void**)&s->y, sizeof s->host));
    TEST_CUDA(cudaMalloc((void**)&s->ids, TOKENS * TOP_K * 4));
    TEST_CUDA(cudaMalloc((void**)&s->fault, 8));
    TEST_CUDA(cudaMemset(s->fault, 0, 8));
    CHILD_CHECK(moe_preload() == MOE_OK, "preload");
    for (int i = 0; i < TOKENS * HIDDEN; ++i) moe_store(s->host, i, MOE_BF16, (float)(i % 3 - 1));
    TEST_CUDA(cudaMemcpy(s->x, s->host, sizeof s->host, cudaMemcpyHostToDevice));
    TEST_CUDA(cudaDeviceSynchronize()); /* a copy may end after the call */
}

/* Fills in the sizes of a group of so many ranks; returns the bytes of a region. */
static uint64_t size_party(const state* s, party* p, int ranks)
{
    const int rank = s->rank;
    uint64_t bytes = 0;
    memset((void*)p, 0, sizeof *p);
    p->d.buffers.max_tokens = TOKENS, p->d.buffers.hidden = HIDDEN;
    p->d.buffers.num_experts = EXPERTS, p->d.buffers.top_k = TOP_K;
    p->d.buffers.max_rows = (int64_t)ranks * TOKENS * TOP_K;
    CHILD_CHECK(moe_ep_buffers_end(&p->d.buffers, ranks, &bytes) == MOE_OK, "buffers");
    return bytes;
}

/* Fills in what the descriptors have in all groups. */
static void describe(const state* s, party* p)
{
    p->d.peers = &p->peers, p->d.x = s->x, p->d.ids = s->ids, p->d.fault = s->fault;
    p->d.num_tokens = TOKENS, p->d.tag = 3;
    p->c.dispatch = &p->d, p->c.y = s->y, p->c.tag = 3;
}

/* Completes a connected group. */
static void furnish(const state* s, party* p)
{
    const int rank = s->rank;
    size_t work;
    p->peers.timeout_ns = 300000000;
    describe(s, p);
    CHILD_CHECK(moe_ep_dispatch_workspace(&p->d, &work) == MOE_OK, "workspace");
    TEST_CUDA(cudaMalloc(&p->workspace, work));
    p->d.workspace = p->workspace, p->d.workspace_bytes = work;
    CHILD_CHECK(moe_ep_dispatch_get_view(&p->d, &p->v) == MOE_OK, "view");
    TEST_CUDA(cudaMalloc((void**)&p->rows, (size_t)p->v.num_rows * HIDDEN * 2));
    p->c.rows = p->rows;
    TEST_CUDA(cudaDeviceSynchronize());
}

/* Puts the ids of a round onto the device: no expert of `without`, as from a gate that has it
   disabled. */
static void put_ids(const state* s, int round, const uint8_t* without, int32_t* list)
{
    for (int i = 0; i < TOKENS * TOP_K; ++i) {
        list[i] = id_of(s->rank, round, i);
        while (without && without[list[i]]) list[i] = (list[i] + 1) % EXPERTS;
    }
    TEST_CUDA(cudaMemcpy(s->ids, list, TOKENS * TOP_K * 4, cudaMemcpyHostToDevice));
    TEST_CUDA(cudaDeviceSynchronize());
}

/* Checks y exactly. */
static void check_y(state* s, int round, const int32_t* list)
{
    const int rank = s->rank;
    TEST_CUDA(cudaMemcpy(s->host, s->y, sizeof s->host, cudaMemcpyDeviceToHost));
    for (int i = 0; i < TOKENS * HIDDEN; ++i) {
        const int t = i / HIDDEN;
        int sum = 0;
        for (int k = 0; k < TOP_K; ++k) sum += list[t * TOP_K + k] + 1;
        CHILD_CHECK(moe_load(s->host, i, MOE_BF16) == (float)((i % 3 - 1) * sum),
                    "round %d, token %d: %g", round, t, moe_load(s->host, i, MOE_BF16));
    }
}

/* Starts a child. */
static pid_t start(int rank, int ranks, const char* path, int when, int how)
{
    const pid_t pid = vfork();
    if (pid == 0) {
        char number[4][12];
        const int value[4] = {rank, ranks, when, how};
        for (int i = 0; i < 4; ++i) snprintf(number[i], sizeof number[i], "%d", value[i]);
        execl("/proc/self/exe", test_now.argv[0], "--child", number[0], number[1], path, number[2],
              number[3], (char*)0);
        _exit(9);
    }
    return pid;
}

#endif
