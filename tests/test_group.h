/* test_group.h: a group of ranks in one process, spread over the devices that there are, and how a
   test waits for all of them. Ranks that share a device are no test of peer access: the transport
   is printed. */
#ifndef MOE_TESTS_TEST_GROUP_H
#define MOE_TESTS_TEST_GROUP_H

#include "moe/ep/peers.cuh"
#include "tests/test.h"

#define TGROUP_MOST 16

typedef struct tgroup {
    int W, devices;
    int device[TGROUP_MOST];
    uint64_t bytes;
    void* memory[TGROUP_MOST]; /* regions */
    moe_peers peers[TGROUP_MOST];
    uint64_t* fault[TGROUP_MOST];
    cudaStream_t stream[TGROUP_MOST], side[TGROUP_MOST];
    cudaEvent_t side_event[TGROUP_MOST][2];
} tgroup;

/* First statement of main: ranks that share a GPU need queues of their own. */
MOEI_UNUSED static void tgroup_begin(void) { setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1); }

/* Returns the number of devices that a test may use. */
MOEI_UNUSED static int tgroup_devices(void)
{
    int n = 0;
#if MOE_ON_HOST
    if (moeh_get().devices == 1) moeh_get().devices = 8;
#endif
    TEST_CUDA(cudaGetDeviceCount(&n));
    return n;
}

/* Makes rank r's device the current one. */
MOEI_UNUSED static void tgroup_use(const tgroup* g, int r)
{
    TEST_CUDA(cudaSetDevice(g->device[r]));
}

/* A group whose regions have `bytes` bytes, all poison but the headers. Returns 0 where ranks do
   not reach each other. */
MOEI_UNUSED static int tgroup_new(tgroup* g, int W, uint64_t bytes)
{
    const int devices = tgroup_devices();
    static int said[TGROUP_MOST + 1];
    moe_peers_pair pair;
    moe_status s;
    memset(g, 0, sizeof *g);
    g->W = W;
    g->devices = devices < W ? devices : W;
    g->bytes = bytes;
    for (int r = 0; r < W; ++r) {
        g->device[r] = r * g->devices / W;
        tgroup_use(g, r);
        TEST_CUDA(cudaMalloc(&g->memory[r], bytes));
        test_poison_device(g->memory[r], bytes);
        TEST_CUDA(cudaMalloc((void**)&g->fault[r], 8));
        TEST_CUDA(cudaMemset(g->fault[r], 0, 8));
        TEST_CUDA(cudaDeviceSynchronize());
        TEST_CUDA(cudaStreamCreateWithFlags(&g->stream[r], cudaStreamNonBlocking));
        TEST_CUDA(cudaStreamCreateWithFlags(&g->side[r], cudaStreamNonBlocking));
        for (int i = 0; i < 2; ++i)
            TEST_CUDA(cudaEventCreateWithFlags(&g->side_event[r][i], cudaEventDisableTiming));
    }
    TEST_CUDA(cudaSetDevice(0));
    s = moe_peers_create_local(g->peers, W, g->device, g->memory, bytes, &pair);
    if (s != MOE_OK && pair.from >= 0) {
        test_leave_out("rank %d does not reach rank %d", pair.from, pair.to);
        return 0;
    }
    if (!said[W]++)
        printf("  %d ranks on %d device%s: %s\n", W, g->devices, g->devices > 1 ? "s" : "",
               MOE_ON_HOST      ? "the CPU's memory"
               : g->devices > 1 ? "peer access"
                                : "one GPU's own memory, no peer is tested");
    return CHECK_STATUS(s, MOE_OK);
}

/* Waits for all ranks. */
MOEI_UNUSED static void tgroup_wait(const tgroup* g)
{
    for (int r = 0; r < g->W; ++r) {
        tgroup_use(g, r);
        TEST_CUDA(cudaDeviceSynchronize());
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* Returns the fault word of rank r. */
MOEI_UNUSED static uint64_t tgroup_fault(const tgroup* g, int r)
{
    uint64_t word;
    TEST_CUDA(cudaMemcpy(&word, g->fault[r], 8, cudaMemcpyDeviceToHost));
    return word;
}

/* Checks that no rank has met a fault. */
MOEI_UNUSED static int tgroup_clean(const tgroup* g, int line)
{
    int ok = 1;
    for (int r = 0; r < g->W; ++r) {
        const moe_fault f = moe_fault_decode(tgroup_fault(g, r));
        ok &= CHECK(f.code == 0, "line %d: rank %d: %s at %lld of rank %d", line, r,
                    moe_fault_text(f.code), (long long)f.index, f.rank);
    }
    return ok;
}

MOEI_UNUSED static void tgroup_free(tgroup* g)
{
    tgroup_wait(g);
    for (int r = 0; r < g->W; ++r) {
        tgroup_use(g, r);
        TEST_CUDA(cudaStreamDestroy(g->stream[r]));
        TEST_CUDA(cudaStreamDestroy(g->side[r]));
        for (int i = 0; i < 2; ++i) TEST_CUDA(cudaEventDestroy(g->side_event[r][i]));
        TEST_CUDA(cudaFree(g->memory[r]));
        TEST_CUDA(cudaFree(g->fault[r]));
    }
    TEST_CUDA(cudaSetDevice(0));
}

#endif
