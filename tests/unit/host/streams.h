/* streams.h: streams, events, graphs, memory.

   test_streams  order of streams, events, captures, replays
   test_memory   cudaMalloc and copies, devices */
#ifndef MOE_TESTS_HOST_STREAMS_H
#define MOE_TESTS_HOST_STREAMS_H

#include "case.h"

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
    CHECK(available && (uintptr_t)p % 256 == 0 && p[0] == moeh_poison_byte(0) &&
          p[999] == moeh_poison_byte(999));
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

#endif
