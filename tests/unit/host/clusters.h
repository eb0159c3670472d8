/* clusters.h: blocks that start together and see each other's shared memory.

   test_clusters  shared memory of the other blocks, static and dynamic; the cluster's barrier, also
                  where threads end before it; barriers (mbarrier) of another block; a tensor copy
                  into both; misuse */
#ifndef MOE_TESTS_HOST_CLUSTERS_H
#define MOE_TESTS_HOST_CLUSTERS_H

#include "case.h"

#include "../../../moe/gemm/wgmma/ptx.cuh"

typedef struct cluster_shared {
    uint64_t bar;
    int32_t word, number;
} cluster_shared;

/* Each block of a cluster of n writes its rank into the next one, statically and dynamically. option
   1: threads from 40 on end first. */
MOE_KERNEL(64, 1) ring_of_blocks(MOE_ARG(args) d)
{
    MOE_SHARED(cluster_shared, s);
    MOE_SHARED_DYNAMIC(shared);
    const int rank = moei_cluster_rank(), next = (rank + 1) % d.n;
    moeh_block* other;
    if (d.option == 1 && threadIdx.x >= 40) return;
    moei_cluster_sync();
    other = moeh_cluster_block((unsigned)next);
    if (threadIdx.x == 0) *(int32_t*)moeh_cluster_address(&s.word, other) = rank;
    ((unsigned char*)moeh_cluster_address(shared, other))[threadIdx.x] = (unsigned char)(rank + 1);
    moei_cluster_sync();
    if (threadIdx.x == 0) d.out[blockIdx.x] = s.word * 1000 + shared[0] + shared[39];
    moei_cluster_sync();
}

/* Block 0 sends a number to block 1, which waits for it. option 1: block 0 names a block that has
   ended; 2: one that there is not; 3: shared memory that is none. */
MOE_KERNEL(32, 1) sends(MOE_ARG(args) d)
{
    MOE_SHARED(cluster_shared, s);
    const int rank = moei_cluster_rank();
    if (threadIdx.x == 0) moei_barrier_init(&s.bar, 1);
    moei_cluster_sync();
    if (rank == 0 && threadIdx.x == 0 && !d.option) moei_cluster_send(&s.number, 77, &s.bar, 1);
    if (rank == 1 && threadIdx.x == 0 && !d.option) {
        moei_barrier_expect(&s.bar, 4);
        moei_barrier_wait(&s.bar, 0);
        d.out[0] = s.number;
    }
    if (rank == 1) return;
    if (d.option == 1)
        while (moeh_now()->block->cluster->block[1]) MOE_SPIN();
    if (d.option == 1 && threadIdx.x == 0) moei_barrier_arrive_at(&s.bar, 1);
    if (d.option == 2 && threadIdx.x == 0) moei_barrier_arrive_at(&s.bar, 2);
    if (d.option == 3 && threadIdx.x == 0) moei_barrier_arrive_at((uint64_t*)d.out, 0);
}

/* Block 1 copies a box into both blocks. */
MOE_KERNEL(32, 1) copies_to_both(MOE_ARG(args) d)
{
    MOE_SHARED(cluster_shared, s);
    MOE_SHARED_DYNAMIC(shared);
    unsigned char* const box = shared + (1024 - (uintptr_t)shared % 1024);
    const int rank = moei_cluster_rank();
    if (threadIdx.x == 0) moei_barrier_init(&s.bar, 1);
    moei_cluster_sync();
    if (threadIdx.x == 0) {
        if (rank == 1)
            moei_tensor_load_both(box, (const moei_tensor_map*)(const void*)d.from, 0, 0, 0,
                                  &s.bar);
        moei_barrier_expect(&s.bar, 128);
        moei_barrier_wait(&s.bar, 0);
        d.out[rank] = *(const uint16_t*)(const void*)(box + 2);
    }
    moei_cluster_sync();
}

static void test_clusters()
{
    static const char* const why[] = {"", "that has ended", "cluster does not have", "has not"};
    args a = zero_args();
    moe_launch_config c = moe_grid(24, 64, 96, nullptr);
    a.out = ints(24);
    for (a.option = 0; a.option < 2; ++a.option)
        for (a.n = 1; a.n <= 8; a.n *= 2) {
            c.cluster = a.n;
            CHECK(!MOE_LAUNCH(ring_of_blocks, c, a));
            OK(cudaDeviceSynchronize());
            for (int i = 0; i < 24; ++i) {
                const int before = (i % a.n + a.n - 1) % a.n;
                CHECK(a.out[i] == before * 1000 + 2 * (before + 1));
            }
        }
    c = moe_grid(2, 32, 0, nullptr);
    c.cluster = 2;
    for (a.option = 0; a.option < 4; ++a.option) {
        CHECK(!MOE_LAUNCH(sends, c, a));
        CHECK(cudaDeviceSynchronize() == (a.option ? cudaErrorLaunchFailure : cudaSuccess));
        if (a.option) CHECK(strstr(moeh_report(), why[a.option]));
        moeh_reset();
        CHECK(a.out[0] == 77);
    }
    {
        alignas(16) uint16_t row[64] = {5, 6, 7};
        moei_tensor_map* map = nullptr;
        moei_tensor t;
        memset(&t, 0, sizeof t);
        t.base = row, t.columns = 64, t.rows = t.box_rows = 1;
        t.row_stride = 64, t.dtype = MOE_BF16;
        OK(cudaMalloc(&map, sizeof *map));
        CHECK(moei_tensor_encode(map, &t) == MOE_OK);
        a.from = (const float*)(const void*)map;
        c.smem = 2048;
        CHECK(!MOE_LAUNCH(copies_to_both, c, a));
        OK(cudaDeviceSynchronize());
        CHECK(a.out[0] == 6 && a.out[1] == 6);
        OK(cudaFree(map));
        c.smem = 0;
    }
    c.grid = dim3(3);
    CHECK(moe_status_detail(MOE_LAUNCH(sends, c, a)) == cudaErrorInvalidConfiguration);
    c.grid = dim3(32), c.cluster = 16; /* more than the device holds at one time */
    CHECK(moe_status_detail(MOE_LAUNCH(sends, c, a)) == cudaErrorInvalidConfiguration);
    OK(cudaFree(a.out));
}

#endif
