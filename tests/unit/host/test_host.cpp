/* test_host.cpp: the CPU backend itself, feature by feature.

     g++ -std=c++14 -O2 -Wall -Wextra test_host.cpp test_host_tu2.cpp -o test_host && ./test_host

   Also to be run with -fsanitize=address,undefined, with clang++, with -DMOEH_UCONTEXT, and with
   MOE_HOST_SEED set. Prints a line for each failure; returns how many there were. */
#include "test_host.h"

static int failures;

#define CHECK(cond)                                                                               \
    do {                                                                                          \
        if (!(cond)) {                                                                            \
            ++failures;                                                                           \
            printf("%s:%d: seed %llu: %s\n", __FILE__, __LINE__,                                  \
                   (unsigned long long)moeh_get().seed, #cond);                                   \
        }                                                                                         \
    } while (0)
#define OK(call) CHECK((call) == cudaSuccess)

/* One argument struct serves every kernel of this file. */
typedef struct args {
    int* out;
    int* flag;
    const float* from;
    float* to;
    const uint16_t *a, *b;
    float* c;
    int n, option, dtype, a_major, b_major;
} args;

static args zero_args()
{
    args a;
    memset((void*)&a, 0, sizeof a);
    return a;
}

static int* ints(size_t n)
{
    int* p = nullptr;
    OK(cudaMalloc(&p, n * sizeof *p));
    OK(cudaMemset(p, 0, n * sizeof *p));
    return p;
}

#define RUN(kernel, blocks, threads, smem, a)                                                      \
    (MOE_LAUNCH(kernel, moe_grid(blocks, threads, smem, nullptr), a) ? cudaErrorInvalidValue       \
                                                                     : cudaDeviceSynchronize())

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

/* ---- shared memory and asynchronous copies ---- */

MOE_KERNEL(32, 1) shared_poison(MOE_ARG(args) d)
{
    MOE_SHARED(two_ints, s);
    MOE_SHARED(two_ints, other);
    MOE_SHARED_DYNAMIC(bytes);
    const int t = (int)threadIdx.x;
    WANT(s.v[t] < -1 && s.total == s.v[t] && &s != &other); /* as an integer it is not -1 */
    for (int i = t; i < d.n; i += 32) WANT(bytes[i] == moeh_poison_byte((size_t)i));
    WANT((uintptr_t)bytes % 128 == 0 && (uintptr_t)&s % 16 == 0);
    __syncthreads();
    s.v[t] = (int)blockIdx.x;
    for (int i = t; i < d.n; i += 32) bytes[i] = (unsigned char)blockIdx.x;
    __syncthreads();
    WANT(s.v[31 - t] == (int)blockIdx.x && other.v[t] < -1);
    for (int i = t; i < d.n; i += 32) WANT(bytes[d.n - 1 - i] == (unsigned char)blockIdx.x);
}

/* Two stages of 128 floats. Option 1: never waits for the second; 2: nor for one in no closed group,
   which no wait covers. Before the call, `to` holds what the second stage brings. */
MOE_KERNEL(32, 1) copies(MOE_ARG(args) d)
{
    MOE_SHARED_DYNAMIC(bytes);
    float* const s = (float*)bytes;
    const int t = (int)threadIdx.x;
    moeh_copy_async(s + 4 * t, d.from + 4 * t, 16, 16);
    moeh_copy_commit();
    moeh_copy_async(s + 128 + 4 * t, d.from + 128 + 4 * t, 16, t < 16 ? 16 : t == 16 ? 8 : 0);
    moeh_copy_commit();
    if (d.option == 2) moeh_copy_async(s + 256 + 4 * t, d.from, 16, 16); /* in no closed group */
    WANT(moei_is_nan(s[4 * t]));
    moeh_copy_wait(1);
    WANT(s[4 * t + 3] == d.from[4 * t + 3] && moei_is_nan(s[128 + 4 * t]));
    if (d.option != 1) moeh_copy_wait(0);
    WANT(d.option == 1 ? moei_is_nan(s[128 + 4 * t]) : s[128 + 4 * t] == d.to[128 + 4 * t]);
    __syncthreads();
    for (int i = t; i < 384; i += 32) d.to[i] = s[i];
}

static void test_shared()
{
    args a = zero_args();
    float *from, *to;
    a.out = ints(1);
    for (a.n = 0; a.n < 5000; a.n += 1237) {
        OK(RUN(shared_poison, 20, 32, (size_t)a.n, a));
        CHECK(a.out[0] == 0);
    }
    OK(cudaMalloc(&from, 256 * 4));
    OK(cudaMalloc((void**)&to, 384 * 4));
    for (int i = 0; i < 256; ++i) from[i] = (float)i;
    a.from = from;
    a.to = to;
    for (a.option = 0; a.option < 3; ++a.option) {
        for (int i = 128; i < 256; ++i) to[i] = i < 194 ? (float)i : 0.0f;
        const cudaError_t e = RUN(copies, 1, 32, 384 * 4, a);
        CHECK(a.out[0] == 0);
        CHECK(e == (a.option ? cudaErrorLaunchFailure : cudaSuccess));
        if (a.option) CHECK(strstr(moeh_report(), "ends with asynchronous copies"));
        moeh_reset();
        if (a.option) continue;
        for (int i = 0; i < 128; ++i) CHECK(to[i] == (float)i);
        for (int i = 128; i < 256; ++i) CHECK(to[i] == (i < 194 ? (float)i : 0.0f));
        for (int i = 256; i < 384; ++i) CHECK(to[i] != to[i]);
    }
    OK(cudaFree(from));
    OK(cudaFree(to));
    OK(cudaFree(a.out));
}

/* ---- misuse that a GPU would punish with other means ---- */

/* option: which threads leave before they have waited. 0: none, 1: one thread, 2: all */
MOE_KERNEL(64, 1) follows(MOE_ARG(args) d)
{
    moe_pdl_trigger();
    if (d.option == 2 || (d.option == 1 && threadIdx.x == 33)) return;
    moe_pdl_wait();
    if (threadIdx.x == 0) d.out[0] += 1;
}

/* option: which of them; n: bytes off the place that would do */
MOE_KERNEL(1, 1) moves(MOE_ARG(args) d)
{
    MOE_SHARED_DYNAMIC(shared);
    char* const p = (char*)d.out + d.n;
    const uint4 v = make_uint4(0, 0, 0, 0);
    if (d.option == 0) atomicAdd((int*)p, 1);
    if (d.option == 1) atomicMax((unsigned long long*)p, 1ull);
    if (d.option == 2) atomicCAS((unsigned long long*)p, 0ull, 1ull);
    if (d.option == 3) moei_add16_atomic(p, v, MOE_BF16);
    if (d.option == 4) moei_add4_atomic(p, 0, MOE_FP16);
    if (d.option == 5) moei_add2_atomic((uint16_t*)p, 0, MOE_FP16);
    if (d.option == 6) moei_store16(p, v);
    if (d.option == 7) moei_store16(p, moei_load16(p));
    if (d.option == 8) (void)moei_load16_once(p);
    if (d.option == 9) (void)moei_load8_once(p);
    if (d.option == 10) (void)moei_load4_early(p);
    if (d.option == 11) moei_copy16_async(shared, p, 16);
    if (d.option == 12) moei_copy16_async(shared + d.n, d.out, 16);
    if (d.option == 13) moei_copy16_async(shared, p, 0); /* not read */
    moei_copy_commit();
    moei_copy_wait(0);
}

static void test_misuse()
{
    static const int aligned[] = {4, 8, 8, 16, 4, 2, 16, 16, 16, 8, 4, 16, 16, 1};
    args a = zero_args();
    moe_launch_config c = moe_grid(3, 64, 0, nullptr);
    a.out = ints(32);
    for (int dependent = 0; dependent < 2; ++dependent)
        for (a.option = 0; a.option < 3; ++a.option) {
            const int bad = dependent && a.option;
            c.dependent = dependent;
            CHECK(!MOE_LAUNCH(follows, c, a));
            CHECK(cudaDeviceSynchronize() == (bad ? cudaErrorLaunchFailure : cudaSuccess));
            if (bad)
                CHECK(strstr(moeh_report(), "ends without moe_pdl_wait") &&
                      strstr(moeh_report(), "kernel follows: block ("));
            if (bad && a.option == 1) CHECK(strstr(moeh_report(), "thread (33,0,0)"));
            moeh_reset();
        }
    CHECK(a.out[0] >= 9);

    for (a.option = 0; a.option < 14; ++a.option)
        for (a.n = 0; a.n <= 16; ++a.n) {
            const int bad = a.n % aligned[a.option];
            CHECK(RUN(moves, 1, 1, 64, a) == (bad ? cudaErrorLaunchFailure : cudaSuccess));
            if (bad) CHECK(strstr(moeh_report(), "misaligned address"));
            moeh_reset();
        }

    a.option = 0;
    OK(cudaDeviceSynchronize());
    CHECK(!moe_preload_kernel((const void*)follows));
    moeh_require_preload(1);
    OK(RUN(follows, 1, 64, 0, a));
    OK(RUN(follows, 1, 64, 0, a));
    CHECK(moe_status_detail(MOE_LAUNCH(moves, moe_grid(1, 1, 64, 0), a)) == cudaErrorLaunchFailure);
    CHECK(
        strstr(moeh_report(), "kernel moves: launched, and moe_preload_kernel was never given it"));
    moeh_reset();
    CHECK(RUN(moves, 1, 1, 64, a) != cudaSuccess); /* a reset does not forget the wish */
    moeh_reset();
    moeh_require_preload(0);
    a.n = 0;
    OK(RUN(moves, 1, 1, 64, a));
    OK(cudaFree(a.out));
}

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

/* ---- streams, events, graphs ---- */

MOE_KERNEL(32, 1) times_ten_plus(MOE_ARG(args) d)
{
    for (int i = 0; i < 3; ++i) __syncthreads();
    if (threadIdx.x == 0) d.out[0] = d.out[0] * 10 + d.n;
}

static void step(int* out, int n, cudaStream_t s)
{
    args a = zero_args();
    a.out = out;
    a.n = n;
    CHECK(!MOE_LAUNCH(times_ten_plus, moe_grid(1, 32, 0, s), a));
}

static void test_streams()
{
    int* const out = ints(4);
    cudaStream_t s, t, apart;
    cudaEvent_t e, f;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    float ms = -1;
    int host = 0;
    OK(cudaStreamCreate(&s));
    OK(cudaStreamCreateWithFlags(&t, 0));
    OK(cudaStreamCreateWithFlags(&apart, cudaStreamNonBlocking));
    OK(cudaEventCreate(&e));
    OK(cudaEventCreateWithFlags(&f, 0));

    /* the null stream orders; an event orders */
    step(out, 1, s);
    step(out, 2, nullptr);
    step(out, 3, t);
    OK(cudaEventRecord(e, t));
    OK(cudaStreamWaitEvent(apart, e, 0));
    step(out, 4, apart);
    OK(cudaEventRecord(f, apart));
    OK(cudaStreamWaitEvent(s, f));
    step(out, 5, s);
    CHECK(cudaEventElapsedTime(&ms, e, f) == cudaErrorNotReady);
    OK(cudaMemcpy(&host, out, 4, cudaMemcpyDeviceToHost));
    CHECK(host == 12345);
    OK(cudaEventElapsedTime(&ms, e, f));
    CHECK(ms >= 0 && ms < 10000);
    step(out, 0, apart);
    CHECK(out[0] == 12345);
    OK(cudaEventRecord(e, apart));
    OK(cudaEventSynchronize(e));
    CHECK(out[0] == 123450);

    /* what a non-blocking stream holds is not waited for by the null stream */
    out[0] = 0;
    step(out, 7, apart);
    OK(cudaMemset(out + 1, 0, 4));
    OK(cudaStreamSynchronize(apart));
    CHECK(out[0] == 7);

    /* capture a fork and a join; replay */
    OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    OK(cudaMemsetAsync(out, 0, 4, s));
    step(out, 1, s);
    OK(cudaEventRecord(e, s));
    OK(cudaStreamWaitEvent(t, e, 0));
    step(out, 2, t);
    OK(cudaEventRecord(f, t));
    OK(cudaStreamWaitEvent(s, f, 0));
    step(out, 3, s);
    OK(cudaMemcpyAsync(out + 1, out, 4, cudaMemcpyDeviceToDevice, s));
    OK(cudaStreamEndCapture(s, &graph));
    CHECK(out[0] == 7);
    OK(cudaGraphInstantiate(&exec, graph, 0));
    OK(cudaGraphDestroy(graph));
    for (int i = 0; i < 3; ++i) {
        out[1] = 0;
        OK(cudaGraphLaunch(exec, s));
        OK(cudaStreamSynchronize(s));
        CHECK(out[1] == 123);
    }
    OK(cudaGraphLaunch(exec, s));
    OK(cudaGraphLaunch(exec, s));
    OK(cudaGraphExecDestroy(exec)); /* both are still queued */
    OK(cudaDeviceSynchronize());
    CHECK(out[1] == 123);

    /* what a capture forbids spoils it */
    void* p;
    OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    CHECK(cudaStreamSynchronize(s) == cudaErrorStreamCaptureUnsupported);
    CHECK(cudaStreamEndCapture(s, &graph) == cudaErrorStreamCaptureInvalidated && !graph);
    OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    CHECK(cudaMalloc(&p, 4) == cudaErrorStreamCaptureUnsupported);
    CHECK(cudaStreamEndCapture(s, &graph) == cudaErrorStreamCaptureInvalidated);

    /* a destroyed stream still does its work */
    out[0] = 0;
    step(out, 9, apart);
    OK(cudaStreamDestroy(apart));
    OK(cudaDeviceSynchronize());
    CHECK(out[0] == 9);

    CHECK(tu2_scheduler() == &moeh_get());
    int* const doubled = ints(64);
    tu2_launch(doubled, s);
    OK(cudaStreamSynchronize(s));
    for (int i = 0; i < 64; ++i) CHECK(doubled[i] == 2 * i);

    OK(cudaFree(doubled));
    OK(cudaFree(out));
    OK(cudaEventDestroy(e));
    OK(cudaEventDestroy(f));
    OK(cudaStreamDestroy(s));
    OK(cudaStreamDestroy(t));
}

/* ---- memory and devices ---- */

static void test_memory()
{
    size_t available = 0, total = 0;
    unsigned char* p;
    cudaDeviceProp prop;
    moe_device d;
    OK(cudaMemGetInfo(&available, &total));
    OK(cudaMalloc(&p, 1001));
    CHECK(available && (uintptr_t)p % 256 == 0 && p[0] == moeh_poison_byte(0) && p[999] == moeh_poison_byte(999));
    OK(cudaMemset(p, 0, 1001));
    OK(cudaMemset(p + 10, 5, 6));
    OK(cudaMemcpy2D(p + 100, 50, p + 8, 10, 10, 2, cudaMemcpyDeviceToDevice));
    CHECK(p[101] == 0 && p[102] == 5 && p[107] == 5 && p[108] == 0 && p[150] == 0);
    CHECK(cudaMemcpy2D(p, 1, p, 1, 2, 2, cudaMemcpyDeviceToDevice) == cudaErrorInvalidValue);
    OK(cudaFree(p));
    OK(cudaFree(nullptr));
    CHECK(cudaMalloc(&p, total + 1) == cudaErrorMemoryAllocation && !p);
    OK(cudaGetDeviceProperties(&prop, 0));
    CHECK(prop.major == 8 && prop.multiProcessorCount == 4);
    CHECK(moe_device_query(&d) == MOE_OK && d.sms == 4 && d.major == 8 && d.smem_block == 232448);
    CHECK(!strcmp(cudaGetErrorString(cudaErrorNotReady), "device not ready"));
}

/* ---- intrinsics ---- */

MOE_KERNEL(1, 1) intrinsics(MOE_ARG(args) d)
{
    int i = 5;
    unsigned u = 7;
    unsigned long long q = 1;
    float f = 1.5f;
    double g = 2.5;
    WANT(atomicAdd(&i, -3) == 5 && i == 2);
    WANT(atomicMax(&i, 9) == 2 && atomicMin(&i, -4) == 9 && i == -4);
    WANT(atomicAdd(&u, ~0u) == 7 && u == 6);
    WANT(atomicOr(&u, 9u) == 6 && atomicAnd(&u, 3u) == 15 && u == 3);
    WANT(atomicCAS(&u, 3u, 8u) == 3 && atomicCAS(&u, 3u, 1u) == 8);
    WANT(atomicExch(&u, 2u) == 8 && u == 2);
    WANT(atomicMax(&q, 1ull << 40) == 1 && atomicAdd(&q, 1ull) == 1ull << 40);
    WANT(atomicAdd(&f, 1.0f) == 1.5f && f == 2.5f && atomicAdd(&g, 0.5) == 2.5 && g == 3.0);
    WANT(__popc(0xf0f0u) == 8 && __ffs(0) == 0 && __ffs(8) == 4);
    WANT(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0);
    WANT(__funnelshift_l(0x80000000u, 0x12345678u, 4) == 0x23456788u);
    WANT(__float_as_uint(1.0f) == 0x3f800000u && __int_as_float(0x40000000) == 2.0f);
    WANT(min(3, 4u) == 3u && max(-1, 4u) == ~0u && min((int64_t)-5, (int64_t)4) == -5);
    WANT(min(1ll, -1ll) == -1 && __fdividef(1.0f, 4.0f) == 0.25f && __fdiv_rn(1, 4) == 0.25f);
    WANT(moe_exp(0.0f) == 1.0f && moei_load16(&(const uint4&)make_uint4(1, 2, 3, 4)).w == 4);
    moeh_wait_until([&] { return ++i > 0; });
}

/* ---- fragments ---- */

/* c [16, 16 * n] += a [16, 16 * option] * b by n warps; a and b lie as in a stage. */
MOE_KERNEL(64, 1) product(MOE_ARG(args) d)
{
    const int w = moe_warp(), k = 16 * d.option, n = 16 * d.n;
    moei_mma_a fa;
    moei_mma_b fb;
    moei_mma_c fc, fd;
    moei_mma_zero(&fc);
    moei_mma_zero(&fd);
    for (int i = 0; i < d.option; ++i) {
        const bool am = d.a_major == MOE_MAJOR_MN, bm = d.b_major == MOE_MAJOR_MN;
        const int a_ld = am ? 32 : k, b_ld = bm ? n : k;
        moei_mma_load_a(&fa, d.a, moei_mma_lane_a(0, a_ld, d.a_major), 0, 16 * i, a_ld, d.dtype,
                        d.a_major);
        moei_mma_load_b(&fb, d.b, moei_mma_lane_b(16 * w, b_ld, d.b_major), 0, 16 * i, b_ld, d.dtype,
                        d.b_major);
        moei_mma(i & 1 ? &fd : &fc, &fa, &fb, d.dtype);
    }
    for (int i = 0; i < MOEI_MMA_C_ELEMS; ++i) fc.x[i] += fd.x[i];
    moei_mma_store(d.c + 16 * w, &fc, n);
}

static void test_mma()
{
    enum { K = 64, N = 32 };
    const uint64_t seed = moeh_get().seed;
    uint16_t *a, *b;
    float* c;
    int* out = ints(1);
    args d = zero_args();
    OK(cudaMalloc(&a, 32 * K * 2 + 64));
    OK(cudaMalloc(&b, K * N * 2));
    OK(cudaMalloc(&c, 16 * N * 4));
    d.out = out;
    OK(RUN(intrinsics, 1, 1, 0, d));
    CHECK(out[0] == 0);
    if (out[0]) printf("  line %d\n", out[0]);
    d.a = a;
    d.b = b;
    d.c = c;
    d.n = 2;
    d.option = K / 16;
    for (int v = 0; v < 16; ++v) {
        moeh_set_seed(v < 8 ? 0 : 100 + (uint64_t)v);
        d.dtype = v & 1 ? MOE_FP16 : MOE_BF16;
        d.a_major = v & 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
        d.b_major = v & 4 ? MOE_MAJOR_MN : MOE_MAJOR_K;
        int A[16][K], B[K][N];
        for (int m = 0; m < 16; ++m)
            for (int k = 0; k < K; ++k) {
                A[m][k] = (m * 7 + k * 3 + v) % 17 - 8;
                moe_store(a, v & 2 ? moei_swizzled(k, m, 32) : moei_swizzled(m, k, K), d.dtype,
                          (float)A[m][k]);
            }
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < N; ++n) {
                B[k][n] = (k * 5 + n * 11 + v) % 13 - 6;
                moe_store(b, v & 4 ? moei_swizzled(k, n, N) : moei_swizzled(n, k, K), d.dtype,
                          (float)B[k][n]);
            }
        OK(cudaMemset(c, 0xff, 16 * N * 4));
        OK(RUN(product, 1, 64, 0, d));
        int wrong = 0;
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < N; ++n) {
                int sum = 0;
                for (int k = 0; k < K; ++k) sum += A[m][k] * B[k][n];
                wrong += c[m * N + n] != (float)sum;
            }
        CHECK(wrong == 0);
    }
    d.a = a + 1;
    CHECK(RUN(product, 1, 64, 0, d) == cudaErrorLaunchFailure);
    CHECK(strstr(moeh_report(), "32-byte aligned"));
    moeh_reset();
    d.a = a;
    CHECK(RUN(product, 1, 48, 0, d) == cudaErrorLaunchFailure); /* a warp that is not whole */
    moeh_reset();
    moeh_set_seed(seed);
    OK(cudaFree(a));
    OK(cudaFree(b));
    OK(cudaFree(c));
    OK(cudaFree(out));
}

int main()
{
    const uint64_t seeds[] = {moeh_get().seed, 1, 77, 123456789012345ull};
    for (uint64_t seed : seeds) {
        moeh_set_seed(seed);
        test_barriers();
        test_warps();
        test_shared();
        test_misuse();
        test_grids();
        test_streams();
        test_memory();
        test_mma();
    }
    OK(cudaDeviceSynchronize());
    printf(failures ? "%d failures\n" : "host: all passed\n", failures);
    return failures != 0;
}
