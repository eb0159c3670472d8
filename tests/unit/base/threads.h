/* threads.h: base/warp.cuh, base/block.cuh

   test_scans  scans and sums of a warp and of a thread block */
#ifndef MOE_TESTS_BASE_THREADS_H
#define MOE_TESTS_BASE_THREADS_H

#include "tests/test.h"

#include "moe/base/block.cuh"
#include "moe/base/warp.cuh"

typedef struct scan_args {
    const int32_t* in; /* [blockDim] */
    int32_t* out;      /* [3, blockDim]: two scans with one scratch, and the total */
    int32_t* warp;     /* [blockDim] inclusive scan of each warp */
    float* sum;        /* [6, blockDim] groups of 2, 4, 8, 16, 32 lanes, and the block */
    float* max;        /* [5, blockDim] */
} scan_args;

MOE_KERNEL(1024, 1) scan_kernel(MOE_ARG(scan_args) d)
{
    MOE_SHARED(moe_block_scan_scratch, scratch);
    const int i = (int)threadIdx.x, n = (int)blockDim.x, v = d.in[i];
    int total, total2;
    const int first = moe_block_exclusive_scan(v, &scratch, &total);
    d.out[i] = first;
    d.out[n + i] = moe_block_exclusive_scan(first, &scratch, &total2);
    d.out[2 * n + i] = total;
    d.warp[i] = moe_warp_inclusive_scan(v);
    for (int w = 0; w < 5; ++w) {
        d.sum[w * n + i] = moe_warp_sum((float)v, 2 << w);
        d.max[w * n + i] = moe_warp_max((float)v, 2 << w);
    }
    d.sum[5 * n + i] = moe_block_sum((float)v, &scratch);
}

static void test_scans(void)
{
    trand r = trand_new(3);
    for (int n = 32; n <= 1024; n += 32) {
        int32_t *in = (int32_t*)test_host(n * 4), *out, *warp;
        float *sum, *max;
        int at = 0, at2 = 0, total = 0;
        scan_args a;
        moe_launch_config c = moe_grid(1, n, 0, test_now.stream);
        tbuf bi, bo = tbuf_new("out", (size_t)n * 12, 0), bw = tbuf_new("warp", (size_t)n * 4, 0);
        tbuf bs = tbuf_new("sum", (size_t)n * 24, 0), bm = tbuf_new("max", (size_t)n * 20, 0);
        for (int i = 0; i < n; ++i) total += in[i] = (int32_t)trand_int(&r, -1000, 1000);
        bi = tbuf_from("in", in, (size_t)n * 4, 0);
        a.in = (const int32_t*)bi.p;
        a.out = (int32_t*)bo.p;
        a.warp = (int32_t*)bw.p;
        a.sum = (float*)bs.p;
        a.max = (float*)bm.p;
        CHECK_STATUS(MOE_LAUNCH(scan_kernel, c, a), MOE_OK);
        out = (int32_t*)tbuf_copy(&bo);
        warp = (int32_t*)tbuf_copy(&bw);
        sum = (float*)tbuf_copy(&bs);
        max = (float*)tbuf_copy(&bm);
        for (int i = 0; i < n; ++i) {
            int in_warp = 0;
            for (int j = i & ~31; j <= i; ++j) in_warp += in[j];
            CHECK(out[i] == at, "n=%d thread %d: %d, not %d", n, i, out[i], at);
            CHECK(out[n + i] == at2, "n=%d thread %d, second scan", n, i);
            CHECK(out[2 * n + i] == total, "n=%d thread %d: total", n, i);
            CHECK(warp[i] == in_warp, "n=%d thread %d: scan of the warp", n, i);
            CHECK(sum[5 * n + i] == (float)total, "n=%d thread %d: sum of the block", n, i);
            at2 += at;
            at += in[i];
            for (int w = 0; w < 5; ++w) {
                const int width = 2 << w, begin = i / width * width;
                float s = 0, m = (float)in[begin];
                for (int j = begin; j < begin + width; ++j) {
                    s += (float)in[j];
                    m = (float)in[j] > m ? (float)in[j] : m;
                }
                CHECK(sum[w * n + i] == s, "n=%d thread %d: sum of %d", n, i, width);
                CHECK(max[w * n + i] == m, "n=%d thread %d: maximum of %d", n, i, width);
            }
        }
        free(in);
        free(out);
        free(warp);
        free(sum);
        free(max);
        tbuf_free(&bi);
        tbuf_free(&bo);
        tbuf_free(&bw);
        tbuf_free(&bs);
        tbuf_free(&bm);
    }
}

static void base_threads(void)
{
    RUN(test_scans);
}

#endif
