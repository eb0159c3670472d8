/* threads.h: barriers and warps.

   test_barriers  threads that meet, leave, and race without a barrier
   test_warps     shuffles, votes, masks in flight */
#ifndef MOE_TESTS_HOST_THREADS_H
#define MOE_TESTS_HOST_THREADS_H

#include "case.h"

/* ---- barriers ---- */

typedef struct two_ints {
    int v[1024];
    int total;
} two_ints;

/* Threads leave one by one; the others go on meeting. */
MOE_KERNEL(256, 1) leave_early(MOE_ARG(args) d)
{
    MOE_SHARED(two_ints, s);
    const int t = (int)threadIdx.x;
    if (t == 0) s.total = 0;
    __syncthreads();
    for (int round = 0; round < 8; ++round) {
        if (t >= 256 - 32 * round - round) return;
        atomicAdd(&s.total, 1);
        __syncthreads();
        if (t == 0) d.out[round] = s.total;
        __syncthreads();
    }
}

MOE_KERNEL(64, 1) votes(MOE_ARG(args) d)
{
    const int t = (int)threadIdx.x;
    const int any = __syncthreads_or(t == 63), none = __syncthreads_or(0);
    d.out[t] = 2 * any + none;
}

MOE_KERNEL(32, 1) diverges(MOE_ARG(args) d)
{
    if ((int)threadIdx.x == 5) __syncwarp(0x30u);
    __syncthreads();
    d.out[0] = 1;
}

/* Reads a neighbour's value; without the barrier that is a race. */
MOE_KERNEL(128, 1) neighbour(MOE_ARG(args) d)
{
    MOE_SHARED(two_ints, s);
    const int t = (int)threadIdx.x;
    s.v[t] = -1;
    __syncthreads();
    s.v[t] = t;
    if (d.option) __syncthreads();
    d.out[t] = s.v[(t + 127) % 128];
}

static void test_barriers()
{
    args a = zero_args();
    a.out = ints(256);
    OK(RUN(leave_early, 3, 256, 0, a));
    for (int r = 0, want = 0; r < 8; ++r) {
        want += 256 - 33 * r;
        CHECK(a.out[r] == want);
    }
    OK(RUN(votes, 1, 64, 0, a));
    for (int t = 0; t < 64; ++t) CHECK(a.out[t] == 2);

    CHECK(RUN(diverges, 1, 32, 0, a) == cudaErrorLaunchFailure);
    CHECK(strstr(moeh_report(), "kernel diverges: block (0,0,0): 31 of 32 live threads wait at "
                                "__syncthreads; thread 5 waits in __syncwarp with mask "
                                "0x00000030"));
    for (int i = 0; i < 2; ++i) CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
    CHECK(RUN(votes, 1, 64, 0, a) != cudaSuccess);
    CHECK(cudaMemset(a.out, 0, 4) == cudaErrorLaunchFailure);
    moeh_reset();
    CHECK(moeh_report()[0] == 0 && cudaGetLastError() == cudaSuccess);
    OK(RUN(votes, 1, 64, 0, a));

    const uint64_t seed = moeh_get().seed;
    int wrong = 0;
    for (uint64_t i = 1; i <= 8; ++i) {
        moeh_set_seed(i);
        a.option = 1;
        OK(RUN(neighbour, 1, 128, 0, a));
        for (int t = 0; t < 128; ++t) CHECK(a.out[t] == (t + 127) % 128);
        a.option = 0;
        OK(RUN(neighbour, 1, 128, 0, a));
        for (int t = 0; t < 128; ++t) wrong += a.out[t] != (t + 127) % 128;
    }
    CHECK(wrong > 8); /* the missing barrier shows */
    moeh_set_seed(seed);
    OK(cudaFree(a.out));
}

/* ---- warps ---- */

/* Each lane checks all it gets; the first wrong thing is left in out. */
#define WANT(cond)                                                                                \
    do {                                                                                          \
        if (!(cond)) atomicCAS(d.out, 0, __LINE__);                                               \
    } while (0)

MOE_KERNEL(96, 1) shuffles(MOE_ARG(args) d)
{
    const int t = (int)threadIdx.x, lane = t & 31, base = t - lane;
    for (int w = 1; w <= 32; w *= 2) {
        const int in = lane & (w - 1), seg = t - in;
        for (int i = 0; i < 32; ++i) {
            WANT(__shfl_sync(MOE_FULL_WARP, t, i, w) == seg + (i & (w - 1)));
            WANT(__shfl_up_sync(MOE_FULL_WARP, t, (unsigned)i, w) == (in - i >= 0 ? t - i : t));
            WANT(__shfl_down_sync(MOE_FULL_WARP, t, (unsigned)i, w) == (in + i < w ? t + i : t));
            if (i < w) WANT(__shfl_xor_sync(MOE_FULL_WARP, t, i, w) == base + (lane ^ i));
        }
    }
    WANT(__shfl_sync(MOE_FULL_WARP, (unsigned)t, 3) == (unsigned)(base + 3));
    WANT(__shfl_sync(MOE_FULL_WARP, 0x100000000ll * t, 3) == 0x100000000ll * (base + 3));
    WANT(__shfl_sync(MOE_FULL_WARP, 0x100000000ull * t, 3) == 0x100000000ull * (base + 3));
    WANT(__shfl_sync(MOE_FULL_WARP, (int64_t)t << 40, 31) == (int64_t)(base + 31) << 40);
    WANT(__shfl_xor_sync(MOE_FULL_WARP, 0.5f * t, 1) == 0.5f * (t ^ 1));
    WANT(__shfl_xor_sync(MOE_FULL_WARP, 0.25 * t, 16) == 0.25 * (t ^ 16));
    WANT(__ballot_sync(MOE_FULL_WARP, lane % 3 == 0) == 0x49249249u);
    WANT(__any_sync(MOE_FULL_WARP, lane == 7) && !__any_sync(MOE_FULL_WARP, 0));
    WANT(__all_sync(MOE_FULL_WARP, lane + 1) && !__all_sync(MOE_FULL_WARP, lane));
    WANT(__match_any_sync(MOE_FULL_WARP, lane % 4) == 0x11111111u << lane % 4);
    WANT(__match_any_sync(MOE_FULL_WARP, (uint64_t)(lane % 8) << 32) == 0x01010101u << lane % 8);
    WANT(__reduce_add_sync(MOE_FULL_WARP, lane - 16) == -16);
    WANT(__reduce_min_sync(MOE_FULL_WARP, lane - 16) == -16);
    WANT(__reduce_max_sync(MOE_FULL_WARP, -lane) == 0);
    WANT(__reduce_add_sync(MOE_FULL_WARP, 0x80000000u + (unsigned)lane) == 496u);
    WANT(__reduce_min_sync(MOE_FULL_WARP, ~(unsigned)lane) == ~31u);
    WANT(__reduce_max_sync(MOE_FULL_WARP, ~(unsigned)lane) == ~0u);
    WANT(__reduce_or_sync(MOE_FULL_WARP, 1u << lane) == MOE_FULL_WARP);
    WANT(__reduce_and_sync(MOE_FULL_WARP, ~(lane == 9 ? 8u : 0u)) == ~8u);
}

/* Several masks in flight, halves that run at their own pace, a lane outside the mask. */
MOE_KERNEL(64, 1) masks(MOE_ARG(args) d)
{
    const int lane = (int)threadIdx.x & 31;
    const unsigned half = lane < 10 ? 0x3ffu : ~0x3ffu, odd = lane & 1 ? 0xaaaaaaaau : 0x55555555u;
    int sum = lane;
    for (int i = 0; i < (lane < 10 ? 50 : 7); ++i) {
        sum = __reduce_add_sync(half, 1);
        WANT(sum == (lane < 10 ? 10 : 22));
        if (lane == 3) __syncwarp(8u);
    }
    WANT(__ballot_sync(odd, 1) == odd);
    WANT((unsigned)__shfl_xor_sync(odd, lane, 1) == 0xffffffffu);
    if (lane < 16) {
        WANT(__shfl_sync(0xffffu, lane, 15) == 15);
        return;
    }
    WANT(__match_any_sync(0xffff0000u, lane / 20) == (lane < 20 ? 0x000f0000u : 0xfff00000u));
}

MOE_KERNEL(32, 1) names_ended(MOE_ARG(args) d)
{
    const int lane = (int)threadIdx.x;
    if (d.option == 0 && lane == 4) return;
    if (d.option == 1) __syncwarp(lane == 2 ? 1u : MOE_FULL_WARP);
    if (d.option == 2 && lane & 1) (void)__ballot_sync(MOE_FULL_WARP, 1);
    if (d.option == 2 && !(lane & 1)) (void)__shfl_sync(MOE_FULL_WARP, 1, 0);
    __syncwarp();
}

MOE_KERNEL(256, 1) scans(MOE_ARG(args) d)
{
    MOE_SHARED(moe_block_scan_scratch, s);
    const int t = (int)threadIdx.x;
    int total;
    for (int i = 0; i < 3; ++i) {
        WANT(moe_block_exclusive_scan(t + i, &s, &total) == t * (t - 1) / 2 + t * i);
        WANT(total == 255 * 128 + 256 * i);
    }
    WANT(moe_warp_sum((float)(t & 7), 8) == 28.0f);
    WANT(moe_warp_max((float)t, 32) == (float)(t | 31));
}

static void test_warps()
{
    static const char* const text[] = {"ended", "leaves it out", "another warp intrinsic"};
    args a = zero_args();
    a.out = ints(1);
    OK(RUN(shuffles, 2, 96, 0, a));
    CHECK(a.out[0] == 0);
    OK(RUN(masks, 9, 64, 0, a));
    CHECK(a.out[0] == 0);
    OK(RUN(scans, 9, 256, 0, a));
    CHECK(a.out[0] == 0);
    if (a.out[0]) printf("  line %d\n", a.out[0]);
    for (a.option = 0; a.option < 3; ++a.option) {
        CHECK(RUN(names_ended, 1, 32, 0, a) == cudaErrorLaunchFailure);
        CHECK(strstr(moeh_report(), text[a.option]) ||
              (a.option == 0 && strstr(moeh_report(), "ends while")));
        moeh_reset();
    }
    OK(cudaFree(a.out));
}

#endif
