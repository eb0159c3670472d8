/* streams.h: launches, streams, events, capture and graphs, with CUDA's names and signatures.

   A capture is one list of operations in the order of the calls. A stream that waits for an event
   recorded in a capture joins it, so forks and joins are right. A replay runs the list one
   operation after the other on one stream. Branches of a graph that wait for each other while both
   run therefore hang. A fork that is never joined, which CUDA refuses, is not detected. An event
   recorded in a capture is of use only there. A call that a capture forbids invalidates it:
   cudaStreamEndCapture then returns cudaErrorStreamCaptureInvalidated. */
#ifndef MOE_HOST_STREAMS_H
#define MOE_HOST_STREAMS_H

#include <chrono>

#include "sched.h"

struct moeh_mark { /* one recording of an event */
    bool reached;
    double at_ms;
    std::shared_ptr<moeh_graph> capture; /* the capture that holds it; or null */
};

typedef moeh_stream* cudaStream_t;
typedef struct moeh_event {
    std::shared_ptr<moeh_mark> mark; /* its last recording */
}* cudaEvent_t;
typedef moeh_graph *cudaGraph_t, *cudaGraphExec_t;

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };

/* Return the error of a failed run. An error that one call refuses is returned by that call
   alone. */
inline cudaError_t cudaPeekAtLastError() { return moeh_get().sticky; }
inline cudaError_t cudaGetLastError() { return moeh_get().sticky; }

/* ---- queues ---- */

/* Returns the stream behind a handle; null for a handle of no stream. */
inline moeh_stream* moeh_stream_of(cudaStream_t handle)
{
    moeh_sched& s = moeh_get();
    if (!handle) return s.streams[(size_t)s.current];
    for (moeh_stream* stream : s.streams)
        if (stream == handle && !stream->destroyed) return stream;
    return nullptr;
}

/* For calls that no capture allows: invalidates all open captures. Also refuses calls by a
   kernel. */
inline cudaError_t moeh_unsafe()
{
    moeh_sched& s = moeh_get();
    cudaError_t e = moeh_now()->block ? cudaErrorNotPermitted : s.sticky;
    for (moeh_stream* stream : s.streams)
        if (stream->capture) {
            stream->capture->open = false;
            e = cudaErrorStreamCaptureUnsupported;
        }
    return e;
}

/* Queues an operation, or records it where the stream is capturing. */
inline cudaError_t moeh_queue(cudaStream_t handle, moeh_op op)
{
    moeh_sched& s = moeh_get();
    moeh_stream* const stream = moeh_stream_of(handle);
    if (moeh_now()->block) return cudaErrorNotPermitted;
    if (s.sticky) return s.sticky;
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream->capture) {
        if (!stream->capture->open) return cudaErrorStreamCaptureInvalidated;
        stream->capture->ops.push_back(std::move(op));
        return cudaSuccess;
    }
    stream->queue.emplace_back(++s.calls, std::move(op));
    s.changed = true;
    return cudaSuccess;
}

/* Makes the host wait until the queues of the streams that `which` selects are empty. */
template <class Function> inline cudaError_t moeh_wait_for(Function which)
{
    return moeh_host_wait([which] {
        for (const moeh_stream* stream : moeh_get().streams)
            if (!stream->queue.empty() && which(stream)) return false;
        return true;
    });
}

/* Returns the call of a kernel with a copy of its argument. */
template <class Kernel, class Arg> inline auto moeh_bind(Kernel* kernel, const Arg& arg)
{
    return [kernel, arg] { kernel(arg); };
}

/* Does the same for a kernel of which only the address is known. */
template <class Arg> inline auto moeh_bind_prepared(const void* kernel, const Arg& arg)
{
    void (*const typed)(const Arg) = (void (*)(const Arg))kernel;
    return [typed, arg] { typed(arg); };
}

/* Queues a grid. No thread runs before the host waits for something. `kernel` is the kernel's
   address, for the check of preloading; null: not checked. cluster: blocks of a cluster along x; 0
   or 1: none. */
template <class Function>
inline cudaError_t moeh_launch(dim3 grid, dim3 block, size_t smem, cudaStream_t handle,
                               Function call, const char* name, const void* kernel = nullptr,
                               bool dependent = false, unsigned cluster = 1)
{
    moeh_sched& s = moeh_get();
    const moeh_stream* const stream = moeh_stream_of(handle);
    if (!stream || stream->device != s.current) return cudaErrorInvalidResourceHandle;
    const unsigned room = 2 * (smem + 1024) > MOEH_SMEM_SM ? MOEH_BLOCKS_PER_SM : 1;
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    const uint64_t total = (uint64_t)grid.x * grid.y * grid.z;
    if (!threads || threads > 1024 || block.z > 64 || !total || grid.x > 0x7fffffffu ||
        grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (!cluster) cluster = 1;
    if (grid.x % cluster || room * cluster > MOEH_SMS * MOEH_BLOCKS_PER_SM)
        return cudaErrorInvalidConfiguration;
    if (smem > MOEH_SMEM_BLOCK) return cudaErrorInvalidValue;
    if (s.preload_only && kernel) s.launched.insert(kernel);
    if (s.preload_only && kernel && !s.preloaded.count(kernel) && !s.sticky && !moeh_now()->block) {
        moeh_say("kernel %s: ", name);
        moeh_set_failed("launched, and moe_preload_kernel was never given it", nullptr);
        moeh_discard_all(s);
    }
    moeh_grid g = {call, name,    stream->device, grid, block, smem, dependent,
                   room, cluster, total,          0,    0,     0,    1};
    return moeh_queue(handle, [g]() mutable { return moeh_advance_grid(&g); });
}

/* ---- streams ---- */

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags)
{
    moeh_sched& s = moeh_get();
    const bool blocking = !(flags & cudaStreamNonBlocking);
    *stream = new moeh_stream{s.current, false, blocking, false, {}, nullptr};
    s.streams.push_back(*stream);
    return s.sticky;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithFlags(s, 0); }

/* Marks the stream as destroyed; its queued operations still run first. */
inline cudaError_t cudaStreamDestroy(cudaStream_t handle)
{
    moeh_stream* const stream = moeh_stream_of(handle);
    if (!stream || stream->null) return cudaErrorInvalidResourceHandle;
    stream->destroyed = true;
    stream->capture.reset();
    moeh_get().changed = true;
    return cudaSuccess;
}

/* Waits for a stream; for the null stream, also for the streams that it waits for. */
inline cudaError_t cudaStreamSynchronize(cudaStream_t handle)
{
    const moeh_stream* const a = moeh_stream_of(handle);
    if (!a) return cudaErrorInvalidResourceHandle;
    if (a->capture) return moeh_unsafe();
    return moeh_wait_for([a](const moeh_stream* b) {
        return a == b || (a->null && b->blocking && a->device == b->device);
    });
}

/* ---- events ---- */

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned)
{
    *event = new moeh_event();
    return moeh_get().sticky;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }

inline cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return event ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle = nullptr)
{
    moeh_stream* const stream = moeh_stream_of(handle);
    if (!event || !stream) return cudaErrorInvalidResourceHandle;
    const std::shared_ptr<moeh_mark> mark(new moeh_mark{false, 0, stream->capture});
    const cudaError_t e = moeh_queue(handle, [mark] {
        const auto now = std::chrono::steady_clock::now().time_since_epoch();
        mark->at_ms = std::chrono::duration<double, std::milli>(now).count();
        return mark->reached = true;
    });
    if (!e) event->mark = mark;
    return e;
}

inline cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned = 0)
{
    moeh_stream* const stream = moeh_stream_of(handle);
    if (!event || !stream) return cudaErrorInvalidResourceHandle;
    const std::shared_ptr<moeh_mark> mark = event->mark;
    if (!mark) return cudaSuccess; /* never recorded */
    const std::shared_ptr<moeh_graph> capture = mark->capture;
    if (capture && capture->open && !stream->capture && !stream->null)
        stream->capture = capture; /* a fork: joins the capture */
    if (stream->capture != capture) return cudaErrorStreamCaptureUnsupported;
    return moeh_queue(handle, [mark] { return mark->reached; });
}

inline cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    if (!event) return cudaErrorInvalidResourceHandle;
    const std::shared_ptr<moeh_mark> mark = event->mark;
    if (mark && mark->capture) return cudaErrorStreamCaptureUnsupported;
    return moeh_host_wait([mark] { return !mark || mark->reached; });
}

/* Writes the time between the two events to *ms, on the host's clock. */
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b)
{
    if (moeh_get().sticky) return moeh_get().sticky;
    if (!a || !b || !a->mark || !b->mark) return cudaErrorInvalidResourceHandle;
    if (!a->mark->reached || !b->mark->reached) return cudaErrorNotReady;
    *ms = (float)(b->mark->at_ms - a->mark->at_ms);
    return cudaSuccess;
}

/* ---- capture and graphs ---- */

inline cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode)
{
    moeh_stream* const stream = moeh_stream_of(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream->null || stream->capture) return cudaErrorStreamCaptureUnsupported;
    stream->capture.reset(new moeh_graph{{}, stream, true});
    return cudaSuccess;
}

inline cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph)
{
    moeh_stream* const stream = moeh_stream_of(handle);
    *graph = nullptr;
    if (!stream || !stream->capture || stream->capture->origin != stream)
        return cudaErrorStreamCaptureUnmatched;
    const std::shared_ptr<moeh_graph> capture = stream->capture;
    for (moeh_stream* other : moeh_get().streams)
        if (other->capture == capture) other->capture.reset();
    moeh_graph made = std::move(*capture); /* moved out, since its operations may refer to it */
    capture->open = false;
    if (!made.open) return cudaErrorStreamCaptureInvalidated;
    *graph = new moeh_graph(std::move(made));
    return cudaSuccess;
}

inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned = 0)
{
    *exec = new moeh_graph(*graph);
    return cudaSuccess;
}

inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    cudaError_t e = moeh_get().sticky;
    for (size_t i = 0; !e && i < exec->ops.size(); ++i) e = moeh_queue(stream, exec->ops[i]);
    return e;
}

inline cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return cudaGraphDestroy(exec); }

#endif
