/* grids.h: several grids at one time.

   test_grids  grids and devices that poll one another; a barrier of the grid */
#ifndef MOE_TESTS_HOST_GRIDS_H
#define MOE_TESTS_HOST_GRIDS_H

#include "case.h"

/* ---- several grids ---- */

/* Block b of this device and of the other hand a number back and forth. */
MOE_KERNEL(64, 1) ping_pong(MOE_ARG(args) d)
{
    volatile int* const word = d.flag + blockIdx.x;
    for (int round = 0; round < d.n; ++round) {
        if (threadIdx.x == 0) {
            while (*word != 2 * round + d.option) MOE_SPIN();
            __threadfence_system();
            *word = 2 * round + d.option + 1;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) atomicAdd(d.out, 1);
}

/* A barrier of the whole grid. */
MOE_KERNEL(32, 1) grid_barrier(MOE_ARG(args) d)
{
    if (threadIdx.x == 0) {
        atomicAdd(d.flag, 1);
        moeh_wait_until([&] { return *(volatile int*)d.flag >= (int)gridDim.x; });
    }
    __syncthreads();
    if (threadIdx.x == 31) atomicAdd(d.out, d.flag[0]);
}

/* Warp 0 polls by meeting itself, with no MOE_SPIN, for what warp 1 will write. */
MOE_KERNEL(64, 1) meets_itself(MOE_ARG(args) d)
{
    if (threadIdx.x < 32) {
        while (!__any_sync(MOE_FULL_WARP, *(volatile int*)d.flag)) {}
    } else {
        for (int i = 0; i < 10; ++i) MOE_SPIN();
        *(volatile int*)d.flag = 1;
    }
}

MOE_KERNEL(32, 1) which_block(MOE_ARG(args) d)
{
    const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    d.out[b * 24 + t] += (int)(b * 24 + t);
    if (t == 0) d.flag[atomicAdd(&d.flag[60], 1)] = (int)b;
}

static void test_grids()
{
    args a = zero_args();
    cudaStream_t s0, s1;
    int id = 0, n = 0;
    moeh_get().devices = 2;
    OK(cudaGetDeviceCount(&n));
    CHECK(n == 2);
    a.flag = ints(8);
    a.out = ints(1);
    OK(cudaStreamCreateWithFlags(&s0, cudaStreamNonBlocking));
    OK(cudaSetDevice(1));
    OK(cudaStreamCreate(&s1));
    a.n = 100;
    a.option = 1; /* answers */
    CHECK(!MOE_LAUNCH(ping_pong, moe_grid(8, 64, 0, s1), a));
    OK(cudaSetDevice(0));
    CHECK(moe_status_detail(MOE_LAUNCH(ping_pong, moe_grid(8, 64, 0, s1), a)) ==
          cudaErrorInvalidResourceHandle);
    CHECK(cudaGetLastError() == cudaSuccess); /* refused, nothing more */
    a.option = 0; /* asks */
    CHECK(!MOE_LAUNCH(ping_pong, moe_grid(8, 64, 0, s0), a));
    CHECK(*a.out == 0); /* nothing runs before the host waits */
    OK(cudaStreamSynchronize(s0));
    OK(cudaStreamSynchronize(s1));
    CHECK(*a.out == 16 && a.flag[7] == 200);
    OK(cudaSetDevice(1));
    OK(cudaGetDevice(&id));
    CHECK(id == 1 && cudaSetDevice(2) == cudaErrorInvalidDevice);

    /* device 1 fetches what device 0 has made */
    int* fetched;
    cudaEvent_t made;
    OK(cudaMalloc(&fetched, sizeof(int)));
    OK(cudaDeviceCanAccessPeer(&n, 1, 0));
    CHECK(n == 1);
    OK(cudaDeviceEnablePeerAccess(0, 0));
    OK(cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
    OK(cudaMemsetAsync(a.flag, 3, sizeof(int), s0));
    OK(cudaEventRecord(made, s0));
    OK(cudaStreamWaitEvent(s1, made, 0));
    OK(cudaMemcpyPeerAsync(fetched, 1, a.flag, 0, sizeof(int), s1));
    OK(cudaStreamSynchronize(s1));
    CHECK(*fetched == 0x03030303);
    OK(cudaEventDestroy(made));
    OK(cudaFree(fetched));
    OK(cudaStreamDestroy(s1));
    OK(cudaSetDevice(0));
    OK(cudaStreamDestroy(s0));
    CHECK(cudaStreamSynchronize(s0) == cudaErrorInvalidResourceHandle);
    moeh_get().devices = 1;

    /* a grid that fits meets; one that does not is found out, not hung */
    *a.out = a.flag[0] = 0;
    OK(RUN(grid_barrier, 8, 32, 0, a));
    CHECK(*a.out == 64);
    *a.out = a.flag[0] = 0;
    OK(RUN(grid_barrier, 4, 32, 200000, a));
    CHECK(*a.out == 16);
    a.flag[0] = 0;
    OK(RUN(meets_itself, 3, 64, 0, a));
    const uint64_t limit = moeh_get().spin_limit;
    moeh_get().spin_limit = 20000;
    a.flag[0] = 0;
    CHECK(RUN(grid_barrier, 9, 32, 0, a) == cudaErrorLaunchFailure);
    CHECK(strstr(moeh_report(), "MOE_SPIN") && strstr(moeh_report(), "kernel grid_barrier: block"));
    moeh_reset();
    a.flag[0] = 0;
    CHECK(RUN(grid_barrier, 5, 32, 200000, a) == cudaErrorLaunchFailure);
    moeh_reset();
    moeh_get().spin_limit = limit;
    OK(cudaFree(a.out));
    OK(cudaFree(a.flag));

    /* every thread of every block once, more blocks than are alive at a time */
    moe_launch_config c = moe_grid(5, 1, 0, nullptr);
    const uint64_t seed = moeh_get().seed;
    a.out = ints(60 * 24);
    a.flag = ints(61);
    c.grid = dim3(5, 4, 3);
    c.block = dim3(4, 3, 2);
    for (uint64_t i = 0; i < 3; ++i) {
        int moved = 0;
        moeh_set_seed(i);
        OK(cudaMemset(a.out, 0, 60 * 24 * sizeof(int)));
        OK(cudaMemset(a.flag, 0, 61 * sizeof(int)));
        CHECK(!MOE_LAUNCH(which_block, c, a));
        OK(cudaDeviceSynchronize());
        for (int j = 0; j < 60 * 24; ++j) CHECK(a.out[j] == j);
        for (int j = 0; j < 60; ++j) moved += a.flag[j] != j;
        CHECK(i ? moved > 10 : moved == 0);
    }
    moeh_set_seed(seed);
    CHECK(moeh_launch(dim3(0), dim3(1), 0, 0, [] {}, "") == cudaErrorInvalidConfiguration);
    CHECK(moeh_launch(dim3(1), dim3(1025), 0, 0, [] {}, "") == cudaErrorInvalidConfiguration);
    CHECK(moeh_launch(dim3(1), dim3(1), 232449, 0, [] {}, "") == cudaErrorInvalidValue);
    OK(cudaFree(a.out));
    OK(cudaFree(a.flag));
}

#endif
