/* mma.h: fragments on the tensor cores: load, multiply, store.

     test_gemm_mma  multiplies fragments of whole numbers, which must be exact, for every dtype and
                    majors */
#ifndef MOE_TESTS_GEMM_MMA_H
#define MOE_TESTS_GEMM_MMA_H

#include "tests/test.h"
#include "tests/test_weights.h"

#include "moe/gemm/grouped.cuh"
#include "tests/test_case.h"

typedef struct mma_args {
    const uint16_t* a; /* [32][MMA_LD]: a stage, which has the fragment */
    const uint16_t* b;
    float* c; /* [16][20] */
    int32_t variant;
} mma_args;

#define MMA_K 32  /* two products along k */
#define MMA_LD 64 /* of a and b, swizzled; the fragment is in rows 16 to 31 */
#define MMA_ELEMS (MMA_K * MMA_LD)

/* Computes c = a b with one warp, the second half of k added to the first; stores c. */
MOE_DEVICE void mma_warp(const mma_args* d, uint16_t* s, float* staging, const int dtype,
                         const int a_major, const int b_major)
{
    const int lane_a = moei_mma_lane_a(16, MMA_LD, a_major);
    const int lane_b = moei_mma_lane_b(16, MMA_LD, b_major);
    moei_mma_a a;
    moei_mma_b b;
    moei_mma_c c;
    for (int i = (int)threadIdx.x; i < MMA_ELEMS; i += 32) {
        s[i] = d->a[i];
        s[MMA_ELEMS + i] = d->b[i];
    }
    __syncwarp(MOE_FULL_WARP);
    moei_mma_zero(&c);
    for (int k = 0; k < MMA_K; k += 16) {
        moei_mma_load_a(&a, s, lane_a, 0, k, MMA_LD, dtype, a_major);
        moei_mma_load_b(&b, s + MMA_ELEMS, lane_b, 0, k, MMA_LD, dtype, b_major);
        moei_mma(&c, &a, &b, dtype);
    }
    moei_mma_store(staging, &c, 20);
    __syncwarp(MOE_FULL_WARP);
    for (int i = (int)threadIdx.x; i < 16 * 20; i += 32)
        if (i % 20 < 16) d->c[i] = staging[i];
}

#define MMA_LIST(X)                                                                                \
    X(0, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K)                                                       \
    X(1, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_MN)                                                      \
    X(2, MOE_FP16, MOE_MAJOR_MN, MOE_MAJOR_K)                                                      \
    X(3, MOE_FP16, MOE_MAJOR_MN, MOE_MAJOR_MN)                                                     \
    X(4, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K)                                                       \
    X(5, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN)                                                      \
    X(6, MOE_BF16, MOE_MAJOR_MN, MOE_MAJOR_K)                                                      \
    X(7, MOE_BF16, MOE_MAJOR_MN, MOE_MAJOR_MN)

MOE_KERNEL(32, 1) mma_kernel(MOE_ARG(mma_args) d)
{
    MOE_SHARED_DYNAMIC(shared);
    uint16_t* s = (uint16_t*)shared;
    float* staging = (float*)(s + 2 * MMA_ELEMS);
#define MMA_CASE(i, dtype, a_major, b_major)                                                       \
    if (d.variant == i) mma_warp(&d, s, staging, dtype, a_major, b_major);
    MMA_LIST(MMA_CASE)
#undef MMA_CASE
}

/* Returns where row i (or column) of the fragment lies in its stage, at depth k. */
static int mma_at(int i, int k, int mn)
{
    return mn ? moei_swizzled(k, 16 + i, MMA_LD) : moei_swizzled(16 + i, k, MMA_LD);
}

static void test_gemm_mma(void)
{
    static const int variants[][3] = {
#define MMA_ROW(i, dtype, a_major, b_major) {dtype, a_major, b_major},
        MMA_LIST(MMA_ROW)
#undef MMA_ROW
    };
    trand r = trand_new(2);
    for (int v = 0; v < 8; ++v) {
        const int dtype = variants[v][0];
        const int a_mn = variants[v][1] == MOE_MAJOR_MN, b_mn = variants[v][2] == MOE_MAJOR_MN;
        uint16_t a[MMA_ELEMS], b[MMA_ELEMS];
        float got[16 * 20];
        int wrong = 0, nonzero = 0, written = 0;
        tbuf ba, bb, bc = tbuf_new("c", sizeof got, 0);
        mma_args args;
        moe_launch_config c = moe_grid(1, 32, MMA_ELEMS * 4 + 16 * 20 * 4, test_now.stream);
        if (test_gemm_status(dtype, MOE_TILE_AUTO) != MOE_OK) { /* no bf16 in this binary */
            tbuf_free(&bc);
            continue;
        }
        memset(a, 0xff, sizeof a); /* NaN outside the fragment */
        memset(b, 0xff, sizeof b);
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < MMA_K; ++k) {
                moe_store(a, mma_at(i, k, a_mn), dtype, (float)trand_int(&r, -9, 9));
                moe_store(b, mma_at(i, k, b_mn), dtype, (float)trand_int(&r, -9, 9));
            }
        ba = tbuf_from("a", a, sizeof a, 0);
        bb = tbuf_from("b", b, sizeof b, 0);
        args.a = (const uint16_t*)ba.p, args.b = (const uint16_t*)bb.p;
        args.c = (float*)bc.p, args.variant = v;
        CHECK_STATUS(MOE_LAUNCH(mma_kernel, c, args), MOE_OK);
        tbuf_get(&bc, got);
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 20; ++n) {
                float want = 0;
                for (int k = 0; k < MMA_K && n < 16; ++k)
                    want += moe_load(a, mma_at(m, k, a_mn), dtype) *
                            moe_load(b, mma_at(n, k, b_mn), dtype);
                if (n < 16) wrong += got[m * 20 + n] != want;
                else written += got[m * 20 + n] == got[m * 20 + n];
                nonzero += want != 0;
            }
        CHECK(wrong == 0 && written == 0 && nonzero > 200, "variant %d: %d of 256 are wrong", v,
              wrong);
        tbufs_free(TBUFS(&ba, &bb, &bc));
    }
}

static void gemm_mma(void) { RUN(test_gemm_mma); }

#endif
