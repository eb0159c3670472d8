/* mma.h: intrinsics and fragments.

   test_mma  products of fragments, their layouts, intrinsics */
#ifndef MOE_TESTS_HOST_MMA_H
#define MOE_TESTS_HOST_MMA_H

#include "case.h"

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
        moei_mma_load_b(&fb, d.b, moei_mma_lane_b(16 * w, b_ld, d.b_major), 0, 16 * i, b_ld,
                        d.dtype, d.b_major);
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

#endif
