/* group.h: the ranks of this process: one under a launcher, all of them otherwise. Connects them,
   makes what all of them have to wait for, and times what they do together. */
#ifndef MOE_SAMPLE_GROUP_H
#define MOE_SAMPLE_GROUP_H

#include "bootstrap.h"
#include "moe/ep/barrier.cuh"
#include "options.h"

#define MOST_PARTS 16 /* of a layer */

/* One rank of this process. */
typedef struct rank_state {
    int device;
    cudaStream_t stream, side; /* side: of copy engines */
    cudaEvent_t begin, end, side_event[2];
    void* region;
    uint64_t* fault;
    moe_peers peers;
} rank_state;

typedef struct group {
    int W, first, mine; /* ranks; this process has first .. first + mine - 1 */
    int launched;       /* 1: by a launcher, one process a rank */
    int devices;        /* GPUs in use by this process */
    bootstrap boot;
    rank_state rank[MOST_RANKS]; /* [mine] */
} group;

/* Returns the largest of the ranks' numbers: `own` is that of this process. */
static double group_max(group* g, double own)
{
    double all[BOOTSTRAP_MOST];
    if (!g->launched) return own;
    if (bootstrap_allgather(&g->boot, &own, all, sizeof own))
        quit(EXIT_WRONG_RESULT, "a process is gone");
    for (int r = 0; r < g->W; ++r) own = all[r] > own ? all[r] : own;
    return own;
}

static rank_state* group_use(group* g, int i)
{
    CUDA(cudaSetDevice(g->rank[i].device));
    return &g->rank[i];
}

/* Finds the ranks and their devices; connects nothing yet. */
static void group_begin(group* g, const options* o)
{
    int devices = 0, launched;
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0); /* for ranks that share a GPU */
    setenv("MOE_HOST_DEVICES", "4", 0);             /* virtual GPUs of the CPU backend */
    memset(g, 0, sizeof *g);
    launched = MOE_ON_HOST ? 0 : bootstrap_begin(&g->boot);
    if (launched < 0) quit(EXIT_WRONG_INPUT, "the processes do not find each other");
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("05_ep: no GPU\n");
        exit(EXIT_NO_DEVICE);
    }
    g->launched = launched;
    g->W = launched ? g->boot.ranks : o->ranks ? o->ranks : MOE_ON_HOST ? 4 : devices;
    if (!launched && g->W > MOST_RANKS) g->W = MOST_RANKS;
    g->first = launched ? g->boot.rank : 0;
    g->mine = launched ? 1 : g->W;
    for (int i = 0; i < g->mine; ++i) {
        rank_state* r = &g->rank[i];
        r->device = launched ? g->boot.local % devices : devices < g->W ? i * devices / g->W : i;
        CUDA(cudaSetDevice(r->device));
        CUDA(cudaStreamCreateWithFlags(&r->stream, cudaStreamNonBlocking));
        CUDA(cudaStreamCreateWithFlags(&r->side, cudaStreamNonBlocking));
        for (int n = 0; n < 2; ++n)
            CUDA(cudaEventCreateWithFlags(&r->side_event[n], cudaEventDisableTiming));
        CUDA(cudaEventCreate(&r->begin));
        CUDA(cudaEventCreate(&r->end));
        CUDA(cudaMalloc((void**)&r->fault, 8));
        CUDA(cudaMemset(r->fault, 0, 8));
        CUDA(cudaDeviceSynchronize());
        MOE(moe_preload()); /* no kernel is loaded while another one waits */
    }
    g->devices = launched || devices > g->W ? g->mine : devices;
}

/* Allocates a region of `bytes` for each rank and connects them. */
static void group_connect(group* g, uint64_t bytes)
{
    moe_peers_pair pair = {-1, -1};
    moe_status s;
    for (int i = 0; i < g->mine; ++i)
        if (cudaMalloc(&group_use(g, i)->region, bytes) != cudaSuccess)
            quit(EXIT_WRONG_INPUT, "this shape needs more memory than the device has");
    if (g->launched) {
        rank_state* r = group_use(g, 0);
        s = moe_peers_create_ipc(&r->peers, g->first, g->W, 0, r->region, bytes,
                                 bootstrap_allgather, &g->boot, &pair);
    } else {
        int device[MOST_RANKS];
        void* region[MOST_RANKS];
        moe_peers peers[MOST_RANKS];
        for (int i = 0; i < g->mine; ++i)
            device[i] = g->rank[i].device, region[i] = g->rank[i].region;
        s = moe_peers_create_local(peers, g->W, device, region, bytes, &pair);
        for (int i = 0; i < g->mine; ++i) g->rank[i].peers = peers[i];
    }
    if (pair.from >= 0)
        quit(EXIT_WRONG_INPUT, "rank %d does not reach the memory of rank %d", pair.from, pair.to);
    MOE(s);
}

/* Waits for all ranks of this process; ends the program where one met a fault. */
static void group_wait(group* g, const char* what)
{
    for (int i = 0; i < g->mine; ++i) CUDA(cudaStreamSynchronize(group_use(g, i)->stream));
    for (int i = 0; i < g->mine; ++i) {
        uint64_t word;
        moe_fault f;
        CUDA(cudaMemcpy(&word, group_use(g, i)->fault, 8, cudaMemcpyDeviceToHost));
        f = moe_fault_decode(word);
        if (moe_peers_late_decode(word).late >= 0)
            quit(EXIT_WRONG_RESULT, "%s: rank %d waited for rank %d in vain", what, f.rank,
                 moe_peers_late_decode(word).late);
        if (f.code)
            quit(EXIT_WRONG_RESULT, "%s: rank %d: %s", what, f.rank, moe_fault_text(f.code));
    }
}

/* Queues something of rank number i of this process. */
typedef void (*group_call)(void* context, group* g, int i);

/* Queues a barrier of all ranks, for those of this process. */
static void group_barrier(group* g)
{
    for (int i = 0; i < g->mine; ++i) {
        rank_state* r = group_use(g, i);
        moe_peers_desc b;
        memset(&b, 0, sizeof b);
        b.peers = &r->peers, b.fault = r->fault, b.channel = 8;
        MOE(moe_peers_barrier(&b, r->stream));
    }
}

/* Returns the milliseconds of a call of all ranks, of the slowest one: mean of `repeat` runs, with
   a barrier before each, which counts. A call of several parts reads its number from *part: all
   ranks have queued a part before the next one. */
static double group_time(group* g, group_call call, void* context, int* part, int parts, int repeat)
{
    double slowest = 0;
    for (int n = -1; n < repeat; ++n) { /* the first one is not timed */
        group_barrier(g);
        for (int i = 0; i < g->mine && n == 0; ++i)
            CUDA(cudaEventRecord(g->rank[i].begin, group_use(g, i)->stream));
        for (int p = 0; p < parts; ++p) {
            if (part) *part = p;
            for (int i = 0; i < g->mine; ++i) {
                (void)group_use(g, i);
                call(context, g, i);
            }
        }
    }
    for (int i = 0; i < g->mine; ++i)
        CUDA(cudaEventRecord(g->rank[i].end, group_use(g, i)->stream));
    group_wait(g, "timing");
    for (int i = 0; i < g->mine; ++i) {
        float ms = 0;
        CUDA(cudaEventElapsedTime(&ms, g->rank[i].begin, g->rank[i].end));
        if (ms / (float)repeat > slowest) slowest = ms / (float)repeat;
    }
    return group_max(g, slowest);
}

/* Writes the milliseconds of each of `parts` calls that follow each other to ms: of the slowest
   rank, mean of `repeat` runs, each after a barrier. part: where the call reads its number. */
static void group_time_parts(group* g, group_call call, void* context, int* part, int parts,
                             int repeat, double* ms)
{
    cudaEvent_t at[MOST_RANKS][MOST_PARTS + 1];
    double sum[MOST_RANKS][MOST_PARTS] = {{0}};
    for (int i = 0; i < g->mine; ++i)
        for (int p = 0; p <= parts; ++p) {
            (void)group_use(g, i);
            CUDA(cudaEventCreate(&at[i][p]));
        }
    for (int n = -1; n < repeat; ++n) {
        group_barrier(g);
        for (*part = 0; *part < parts; ++*part)
            for (int i = 0; i < g->mine; ++i) {
                CUDA(cudaEventRecord(at[i][*part], group_use(g, i)->stream));
                call(context, g, i);
            }
        for (int i = 0; i < g->mine; ++i)
            CUDA(cudaEventRecord(at[i][parts], group_use(g, i)->stream));
        group_wait(g, "timing");
        for (int i = 0; i < g->mine; ++i)
            for (int p = 0; n >= 0 && p < parts; ++p) {
                float one = 0;
                CUDA(cudaEventElapsedTime(&one, at[i][p], at[i][p + 1]));
                sum[i][p] += one / (float)repeat;
            }
    }
    for (int p = 0; p < parts; ++p) {
        ms[p] = 0;
        for (int i = 0; i < g->mine; ++i) ms[p] = sum[i][p] > ms[p] ? sum[i][p] : ms[p];
        ms[p] = group_max(g, ms[p]);
    }
    for (int i = 0; i < g->mine; ++i)
        for (int p = 0; p <= parts; ++p) CUDA(cudaEventDestroy(at[i][p]));
}

#endif
