/* shared.h: shared memory, asynchronous copies, misuse.

   test_shared  poison, stages, waits for copies
   test_misuse  what a GPU would punish in another way is reported */
#ifndef MOE_TESTS_HOST_SHARED_H
#define MOE_TESTS_HOST_SHARED_H

#include "case.h"

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

#endif
