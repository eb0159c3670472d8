/* launch.h: base/cuda.cuh

   test_device         the device query
   test_launch_errors  a launch that fails returns a status */
#ifndef MOE_TESTS_BASE_LAUNCH_H
#define MOE_TESTS_BASE_LAUNCH_H

#include "tests/test.h"
#include "tests/unit/base/threads.h"

#include "moe/base/cuda.cuh"

static void test_device(void)
{
    moe_device d;
    moe_launch_config c = moe_grid(3, 64, 128, test_now.stream);
    memset(&d, 0, sizeof d);
    CHECK_STATUS(moe_device_query(&d), MOE_OK);
    CHECK(d.sms > 0 && d.smem_block >= 48 * 1024 && d.smem_sm >= d.smem_block && d.major >= 7,
          "%d SMs, %d and %d bytes, major %d", d.sms, d.smem_block, d.smem_sm, d.major);
    CHECK(c.grid.x == 3 && c.grid.y == 1 && c.grid.z == 1 && c.block.x == 64 && c.smem == 128);
    CHECK(c.dependent == 0 && c.cluster == 0 && c.stream == test_now.stream);
    CHECK_STATUS(moe_preload_kernel((const void*)scan_kernel), MOE_OK);
}

/* A launch that cannot be made comes back as a status and leaves the outputs alone; a pending
   error of the caller's own is not swallowed by a launch that works. */
static void test_launch_errors(void)
{
#if !MOE_ON_HOST
    tbuf word = tfault_new(0), stopped = tbuf_new("stopped", 2048 * 4, 0);
    moe_launch_config c = moe_grid(1, 2048, 0, test_now.stream);
    fault_args a;
    a.word = (uint64_t*)word.p;
    a.stopped = (int32_t*)stopped.p;
    a.code = MOE_FAULT_BAD_ID;
    a.n = 1;
    CHECK(moe_status_kind(MOE_LAUNCH(fault_kernel, c, a)) == MOE_ERR_CUDA, "2048 threads");
    (void)cudaGetLastError();
    CHECK(tbuf_holds(&stopped, 0), "outputs untouched");
    (void)cudaMemcpy(a.stopped, a.stopped, 4, (cudaMemcpyKind)99);
    CHECK(cudaPeekAtLastError() != cudaSuccess);
    c = moe_grid(1, 256, 0, test_now.stream);
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    CHECK(cudaGetLastError() != cudaSuccess, "the caller's pending error is still there");
    CHECK(tfault_word(&word) != 0);
    tbuf_free(&word);
    tbuf_free(&stopped);
#endif
}

static void base_launch(void)
{
    RUN(test_device);
    RUN(test_launch_errors);
}

#endif
