/* bench_group.h: times what all ranks of a group do together: one rank a GPU, or several on one by
   option. A barrier stands before every call, and the slowest rank counts. */
#ifndef MOE_BENCH_GROUP_H
#define MOE_BENCH_GROUP_H

#include "bench.h"

#include "../moe/ep/barrier.cuh"

#define BENCH_MOST_RANKS 16
#define BENCH_BARRIER_CHANNEL (MOE_PEERS_CHANNELS - 1)

typedef struct bench_group {
    int W, devices, reps;
    int device[BENCH_MOST_RANKS];
    void* region[BENCH_MOST_RANKS];
    uint64_t bytes;
    moe_peers peers[BENCH_MOST_RANKS];
    uint64_t* fault[BENCH_MOST_RANKS];
    cudaStream_t stream[BENCH_MOST_RANKS], side[BENCH_MOST_RANKS];
    cudaEvent_t side_event[BENCH_MOST_RANKS][2];
    cudaEvent_t begin[BENCH_MOST_RANKS], end[BENCH_MOST_RANKS];
} bench_group;

/* Queues the call of all ranks; fn sets the device itself where it queues. */
typedef void (*bench_group_fn)(void* context, bench_group* g);

MOEI_UNUSED static void bench_group_open(bench_group* g, int W, uint64_t bytes)
{
    moe_peers_pair pair;
    memset(g, 0, sizeof *g);
    BENCH_CUDA(cudaGetDeviceCount(&g->devices));
    if (g->devices > W) g->devices = W;
    g->W = W;
    g->bytes = bytes;
    g->reps = 20;
    for (int r = 0; r < W; ++r) {
        g->device[r] = r * g->devices / W;
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        g->region[r] = bench_alloc(bytes);
        BENCH_CUDA(cudaMemset(g->region[r], 0, bytes));
        g->fault[r] = (uint64_t*)bench_alloc(8);
        BENCH_CUDA(cudaMemset(g->fault[r], 0, 8));
        BENCH_CUDA(cudaStreamCreateWithFlags(&g->stream[r], cudaStreamNonBlocking));
        BENCH_CUDA(cudaStreamCreateWithFlags(&g->side[r], cudaStreamNonBlocking));
        for (int i = 0; i < 2; ++i)
            BENCH_CUDA(cudaEventCreateWithFlags(&g->side_event[r][i], cudaEventDisableTiming));
        BENCH_CUDA(cudaEventCreate(&g->begin[r]));
        BENCH_CUDA(cudaEventCreate(&g->end[r]));
    }
    BENCH_MOE(moe_peers_create_local(g->peers, W, g->device, g->region, bytes, &pair));
}

MOEI_UNUSED static void bench_group_wait(bench_group* g)
{
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_CUDA(cudaStreamSynchronize(g->stream[r]));
    }
}

/* Ends the program where a rank has met a fault. */
MOEI_UNUSED static void bench_group_check(bench_group* g, const char* what)
{
    bench_group_wait(g);
    for (int r = 0; r < g->W; ++r) {
        uint64_t word;
        moe_fault f;
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_CUDA(cudaMemcpy(&word, g->fault[r], 8, cudaMemcpyDeviceToHost));
        f = moe_fault_decode(word);
        if (!f.code) continue;
        printf("VERIFY FAILED: %s: rank %d: %s, index %llx\n", what, r, moe_fault_text(f.code),
               (unsigned long long)f.index);
        exit(1);
    }
}

MOEI_UNUSED static void bench_group_barrier(bench_group* g)
{
    for (int r = 0; r < g->W; ++r) {
        moe_peers_desc d;
        memset(&d, 0, sizeof d);
        d.peers = g->peers + r;
        d.fault = g->fault[r];
        d.channel = BENCH_BARRIER_CHANNEL;
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_peers_barrier(&d, g->stream[r]));
    }
}

/* Returns the median milliseconds of one call, barrier included. graph: calls in one captured graph
   a rank; 0: each call is queued by itself. */
MOEI_UNUSED static double bench_group_time(bench_group* g, bench_group_fn fn, void* context,
                                           int graph)
{
    cudaGraphExec_t exec[BENCH_MOST_RANKS];
    const int calls = graph ? graph : 5;
    float* ms = (float*)malloc((size_t)g->reps * sizeof(float));
    double median;
    fn(context, g);
    bench_group_check(g, "first call");
    if (graph) {
        for (int r = 0; r < g->W; ++r) {
            BENCH_CUDA(cudaSetDevice(g->device[r]));
            BENCH_CUDA(cudaStreamBeginCapture(g->stream[r], cudaStreamCaptureModeRelaxed));
        }
        for (int i = 0; i < calls; ++i) {
            bench_group_barrier(g);
            fn(context, g);
        }
        for (int r = 0; r < g->W; ++r) {
            cudaGraph_t made;
            BENCH_CUDA(cudaSetDevice(g->device[r]));
            BENCH_CUDA(cudaStreamEndCapture(g->stream[r], &made));
            BENCH_CUDA(cudaGraphInstantiate(&exec[r], made, 0));
            BENCH_CUDA(cudaGraphDestroy(made));
        }
    }
    for (int i = -3; i < g->reps; ++i) {
        float slowest = 0;
        bench_group_barrier(g);
        for (int r = 0; r < g->W; ++r) {
            BENCH_CUDA(cudaSetDevice(g->device[r]));
            BENCH_CUDA(cudaEventRecord(g->begin[r], g->stream[r]));
        }
        if (graph) {
            for (int r = 0; r < g->W; ++r) {
                BENCH_CUDA(cudaSetDevice(g->device[r]));
                BENCH_CUDA(cudaGraphLaunch(exec[r], g->stream[r]));
            }
        } else {
            for (int c = 0; c < calls; ++c) {
                bench_group_barrier(g);
                fn(context, g);
            }
        }
        for (int r = 0; r < g->W; ++r) {
            BENCH_CUDA(cudaSetDevice(g->device[r]));
            BENCH_CUDA(cudaEventRecord(g->end[r], g->stream[r]));
        }
        bench_group_wait(g);
        for (int r = 0; r < g->W; ++r) {
            float one;
            BENCH_CUDA(cudaEventElapsedTime(&one, g->begin[r], g->end[r]));
            if (one > slowest) slowest = one;
        }
        if (i >= 0) ms[i] = slowest / (float)calls;
    }
    bench_group_check(g, "timed calls");
    for (int r = 0; graph && r < g->W; ++r) BENCH_CUDA(cudaGraphExecDestroy(exec[r]));
    qsort(ms, (size_t)g->reps, sizeof ms[0], bench_compare_float);
    median = ms[g->reps / 2];
    free(ms);
    return median;
}

#define BENCH_MOST_PARTS 32

/* Queues part `part` of rank r, whose device is current. */
typedef void (*bench_group_part_fn)(void* context, bench_group* g, int r, int part);

/* Prints the milliseconds of parts that follow each other: of the slowest rank, mean of `reps` runs,
   each behind `before` (or null) and a barrier. A part below 0.1 us is left out. */
MOEI_UNUSED static void bench_group_print_parts(bench_group* g, bench_group_fn before,
                                                bench_group_part_fn part, void* context, int parts,
                                                const char* (*name)(int))
{
    static cudaEvent_t at[BENCH_MOST_RANKS][BENCH_MOST_PARTS + 1];
    double sum[BENCH_MOST_RANKS][BENCH_MOST_PARTS] = {{0}};
    for (int r = 0; r < g->W; ++r)
        for (int p = 0; p <= parts; ++p) {
            BENCH_CUDA(cudaSetDevice(g->device[r]));
            BENCH_CUDA(cudaEventCreate(&at[r][p]));
        }
    for (int n = -1; n < g->reps; ++n) {
        if (before) before(context, g);
        bench_group_barrier(g);
        for (int p = 0; p <= parts; ++p)
            for (int r = 0; r < g->W; ++r) {
                BENCH_CUDA(cudaSetDevice(g->device[r]));
                BENCH_CUDA(cudaEventRecord(at[r][p], g->stream[r]));
                if (p < parts) part(context, g, r, p);
            }
        bench_group_wait(g);
        for (int r = 0; n >= 0 && r < g->W; ++r)
            for (int p = 0; p < parts; ++p) {
                float ms;
                BENCH_CUDA(cudaEventElapsedTime(&ms, at[r][p], at[r][p + 1]));
                sum[r][p] += ms / (float)g->reps;
            }
    }
    for (int p = 0; p < parts; ++p) {
        double most = 0;
        for (int r = 0; r < g->W; ++r) most = sum[r][p] > most ? sum[r][p] : most;
        if (most >= 1e-4) printf(" %s %.4f", name(p), most);
    }
    printf("\n");
    for (int r = 0; r < g->W; ++r)
        for (int p = 0; p <= parts; ++p) {
            BENCH_CUDA(cudaSetDevice(g->device[r]));
            BENCH_CUDA(cudaEventDestroy(at[r][p]));
        }
}

#endif
