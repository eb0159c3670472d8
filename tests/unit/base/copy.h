/* copy.h: base/copy.cuh

   test_async_copy  a ring of asynchronous copies */
#ifndef MOE_TESTS_BASE_COPY_H
#define MOE_TESTS_BASE_COPY_H

#include "tests/test.h"

#include "moe/base/copy.cuh"

#define COPY_THREADS 64
#define COPY_STAGES 3

typedef struct copy_args {
    const uint4* in; /* [steps, threads] */
    uint4* out;      /* [steps, threads] through shared memory, shifted by one thread */
    uint4* once;     /* [steps, threads] through registers */
    int32_t steps;
} copy_args;

typedef struct copy_stages {
    uint4 at[COPY_STAGES][COPY_THREADS];
} copy_stages;

/* A ring of stages: step s + 2 is under way while step s is read. A vector copies 0, 2, ... 16
   bytes and has zeros behind them. */
MOE_KERNEL(COPY_THREADS, 1) copy_kernel(MOE_ARG(copy_args) d)
{
    MOE_SHARED(copy_stages, stage);
    const int i = (int)threadIdx.x, next = (i + 1) % COPY_THREADS;
    for (int s = 0; s < COPY_STAGES - 1; ++s) {
        const int at = s * COPY_THREADS + i;
        if (s < d.steps) moei_copy16_async(&stage.at[s][i], d.in + at, at % 9 * 2);
        moei_copy_commit();
    }
    for (int s = 0; s < d.steps; ++s) {
        const int ahead = s + COPY_STAGES - 1, at = ahead * COPY_THREADS + i;
        moei_copy_wait(COPY_STAGES - 2);
        __syncthreads();
        if (ahead < d.steps)
            moei_copy16_async(&stage.at[ahead % COPY_STAGES][i], d.in + at, at % 9 * 2);
        moei_copy_commit();
        moei_store16(d.out + s * COPY_THREADS + i, stage.at[s % COPY_STAGES][next]);
        moei_store16(d.once + s * COPY_THREADS + i, moei_load16(d.in + s * COPY_THREADS + i));
    }
}

static void test_async_copy(void)
{
    static const int steps[] = {1, 2, 3, 4, 17};
    trand r = trand_new(4);
    for (int v = 0; v < 5; ++v) {
        const int n = steps[v] * COPY_THREADS;
        uint32_t *in = (uint32_t*)test_host(n * 16), *out, *once;
        moe_launch_config c = moe_grid(1, COPY_THREADS, 0, test_now.stream);
        copy_args a;
        tbuf bi, bo = tbuf_new("out", (size_t)n * 16, 0), bp = tbuf_new("once", (size_t)n * 16, 0);
        for (int i = 0; i < n * 4; ++i) in[i] = (uint32_t)trand_bits(&r) | 1u;
        bi = tbuf_from("in", in, (size_t)n * 16, 0);
        a.in = (const uint4*)bi.p;
        a.out = (uint4*)bo.p;
        a.once = (uint4*)bp.p;
        a.steps = steps[v];
        CHECK_STATUS(MOE_LAUNCH(copy_kernel, c, a), MOE_OK);
        out = (uint32_t*)tbuf_copy(&bo);
        once = (uint32_t*)tbuf_copy(&bp);
        for (int i = 0; i < n; ++i) {
            const int from = i / COPY_THREADS * COPY_THREADS + (i + 1) % COPY_THREADS;
            const int bytes = from % 9 * 2;
            unsigned char want[16];
            memset(want, 0, 16);
            memcpy(want, in + 4 * from, (size_t)bytes);
            CHECK(memcmp(want, out + 4 * i, 16) == 0, "steps=%d vector %d, %d bytes", steps[v], i,
                  bytes);
        }
        CHECK(memcmp(once, in, (size_t)n * 16) == 0, "steps=%d: plain copies", steps[v]);
        free(in);
        free(out);
        free(once);
        tbuf_free(&bi);
        tbuf_free(&bo);
        tbuf_free(&bp);
    }
}

static void base_copy(void)
{
    RUN(test_async_copy);
}

#endif
