/* streams.h: streams, events, capture and graphs, with CUDA's names and signatures.

   A capture is one list of operations in the order of the calls. A stream that waits for an event
   recorded in a capture joins it, so forks and joins are right, but a replay runs the list one by
   one on one stream: branches of a graph that wait for each other while both run do not get on,
   and a fork that is never joined, which CUDA refuses, goes unnoticed.
   As in CUDA, an event recorded in a capture only orders it and is not recorded at replay. Calls
   that a capture forbids spoil it: EndCapture then returns cudaErrorStreamCaptureInvalidated. */
#ifndef MOE_HOST_STREAMS_H
#define MOE_HOST_STREAMS_H

#include <chrono>

#include "intrinsics.h"
#include "runtime.h"

typedef moeh_event* cudaEvent_t;
struct moeh_recorded {
    std::vector<moeh_op> ops;
};
typedef struct moeh_recorded* cudaGraph_t;
typedef struct moeh_instance : moeh_recorded {
}* cudaGraphExec_t;
typedef struct moeh_graph_node* cudaGraphNode_t;

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone,
    cudaStreamCaptureStatusActive,
    cudaStreamCaptureStatusInvalidated
};

/* ---- streams ---- */

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags)
{
    moeh_sched& s = moeh_get();
    if (!stream) return moeh_note(cudaErrorInvalidValue);
    *stream = nullptr;
    if (s.sticky) return moeh_note(s.sticky);
    *stream = moeh_new_stream(s.device[s.current], !(flags & cudaStreamNonBlocking));
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int)
{
    return cudaStreamCreateWithFlags(stream, flags);
}

/* What is still queued is done all the same; then the stream goes. */
inline cudaError_t cudaStreamDestroy(cudaStream_t handle)
{
    moeh_stream* const stream = moeh_stream_of(handle);
    if (!stream || !handle || handle == cudaStreamLegacy)
        return moeh_note(cudaErrorInvalidResourceHandle);
    stream->destroyed = true;
    stream->capture.reset();
    moeh_get().changed = true;
    if (stream->queue.empty()) {
        auto& all = stream->device->streams;
        for (size_t i = 0; i < all.size(); ++i)
            if (all[i].get() == stream) all.erase(all.begin() + (long)i);
    }
    return cudaSuccess;
}

/* Is all done that was queued? For the null stream: in all streams that it waits for. */
inline bool moeh_idle(const moeh_stream* stream)
{
    if (stream != stream->device->streams[0].get()) return stream->queue.empty();
    for (auto& other : stream->device->streams)
        if (other->blocking && !other->queue.empty()) return false;
    return true;
}

/* May the host ask about the stream now? Not while it captures. */
inline cudaError_t moeh_may_ask(moeh_stream* stream)
{
    if (moeh_get().sticky) return moeh_get().sticky;
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (!stream->capture) return cudaSuccess;
    stream->capture->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t handle)
{
    moeh_stream* const stream = moeh_stream_of(handle);
    const cudaError_t e = moeh_may_ask(stream);
    return moeh_note(e ? e : moeh_host_wait([stream] { return moeh_idle(stream); }));
}

inline cudaError_t moeh_query(std::function<bool()> done)
{
    if (moeh_now()->block) return cudaErrorNotPermitted;
    if (!done()) moeh_pump(moeh_get());
    return moeh_get().sticky ? moeh_get().sticky : done() ? cudaSuccess : cudaErrorNotReady;
}

/* Also makes some progress, so that a host that polls gets there. */
inline cudaError_t cudaStreamQuery(cudaStream_t handle)
{
    moeh_stream* const stream = moeh_stream_of(handle);
    const cudaError_t e = moeh_may_ask(stream);
    return moeh_note(e ? e : moeh_query([stream] { return moeh_idle(stream); }));
}

inline cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*fn)(void*), void* data)
{
    return moeh_note(moeh_queue_act(stream, [fn, data] { fn(data); }));
}

/* ---- events ---- */

inline std::shared_ptr<moeh_event> moeh_event_of(cudaEvent_t event)
{
    const auto known = moeh_get().events.find(event);
    return known == moeh_get().events.end() ? nullptr : known->second;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags)
{
    moeh_sched& s = moeh_get();
    if (!event) return moeh_note(cudaErrorInvalidValue);
    *event = nullptr;
    if (s.sticky) return moeh_note(s.sticky);
    std::shared_ptr<moeh_event> made = std::make_shared<moeh_event>();
    made->timing = !(flags & cudaEventDisableTiming);
    *event = made.get();
    s.events[made.get()] = made;
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event)
{
    return cudaEventCreateWithFlags(event, 0);
}

inline cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    return moeh_get().events.erase(event) ? cudaSuccess : moeh_note(cudaErrorInvalidResourceHandle);
}

inline cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle = nullptr)
{
    const std::shared_ptr<moeh_event> event = moeh_event_of(handle);
    moeh_stream* const stream = moeh_stream_of(stream_handle);
    if (!event || !stream) return moeh_note(cudaErrorInvalidResourceHandle);
    event->captured = stream->capture != nullptr;
    event->capture = stream->capture;
    if (event->captured) return cudaSuccess;
    const uint64_t ticket = ++event->tickets;
    const cudaError_t e = moeh_queue_act(stream_handle, [event, ticket] {
        event->pending.erase(ticket);
        event->at_ms = (double)clock64() * 1e-6;
    });
    if (!e) event->pending.insert(ticket);
    return moeh_note(e);
}

inline cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned = 0)
{
    const std::shared_ptr<moeh_event> event = moeh_event_of(event_handle);
    moeh_stream* const stream = moeh_stream_of(handle);
    if (!event || !stream) return moeh_note(cudaErrorInvalidResourceHandle);
    const std::shared_ptr<moeh_capture> capture = event->capture.lock();
    if (event->captured && !capture) return moeh_note(cudaErrorCapturedEvent);
    if (capture && stream == stream->device->streams[0].get()) {
        capture->invalid = true;
        return moeh_note(cudaErrorStreamCaptureImplicit);
    }
    if (capture && !stream->capture) stream->capture = capture; /* a fork: joins the capture */
    if (stream->capture != capture) {
        stream->capture->invalid = true;
        return moeh_note(cudaErrorStreamCaptureIsolation);
    }
    const uint64_t ticket = event->tickets;
    if (capture || !event->pending.count(ticket)) return moeh_get().sticky;
    moeh_op op;
    op.event_done = [event, ticket] { return !event->pending.count(ticket); };
    return moeh_note(moeh_queue(handle, std::move(op)));
}

inline cudaError_t moeh_may_ask(const moeh_event* event)
{
    if (moeh_get().sticky) return moeh_get().sticky;
    return !event ? cudaErrorInvalidResourceHandle
                  : event->captured ? cudaErrorCapturedEvent : cudaSuccess;
}

inline cudaError_t cudaEventSynchronize(cudaEvent_t handle)
{
    const std::shared_ptr<moeh_event> event = moeh_event_of(handle);
    const cudaError_t e = moeh_may_ask(event.get());
    return moeh_note(e ? e : moeh_host_wait([event] { return event->pending.empty(); }));
}

inline cudaError_t cudaEventQuery(cudaEvent_t handle)
{
    const std::shared_ptr<moeh_event> event = moeh_event_of(handle);
    const cudaError_t e = moeh_may_ask(event.get());
    return moeh_note(e ? e : moeh_query([event] { return event->pending.empty(); }));
}

/* Time on the host's clock between the moments at which the two events were reached. */
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end)
{
    const std::shared_ptr<moeh_event> a = moeh_event_of(start), b = moeh_event_of(end);
    if (moeh_get().sticky) return moeh_get().sticky;
    if (!a || !b || !a->timing || !b->timing || !a->tickets || !b->tickets)
        return moeh_note(cudaErrorInvalidResourceHandle);
    if (!a->pending.empty() || !b->pending.empty()) return cudaErrorNotReady;
    *ms = (float)(b->at_ms - a->at_ms);
    return cudaSuccess;
}

/* ---- capture and graphs ---- */

inline cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode)
{
    moeh_stream* const stream = moeh_stream_of(handle);
    if (!stream) return moeh_note(cudaErrorInvalidResourceHandle);
    if (stream == stream->device->streams[0].get() || stream->capture)
        return moeh_note(cudaErrorStreamCaptureUnsupported);
    stream->capture = std::make_shared<moeh_capture>();
    stream->capture->relaxed = mode == cudaStreamCaptureModeRelaxed;
    stream->capture_origin = true;
    return cudaSuccess;
}

inline cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph)
{
    moeh_stream* const stream = moeh_stream_of(handle);
    *graph = nullptr;
    if (!stream) return moeh_note(cudaErrorInvalidResourceHandle);
    if (!stream->capture || !stream->capture_origin)
        return moeh_note(cudaErrorStreamCaptureUnmatched);
    const std::shared_ptr<moeh_capture> capture = stream->capture;
    stream->capture_origin = false;
    for (moeh_device& d : moeh_get().device)
        for (auto& other : d.streams)
            if (other->capture == capture) other->capture.reset();
    if (capture->invalid) return moeh_note(cudaErrorStreamCaptureInvalidated);
    *graph = new moeh_recorded();
    (*graph)->ops = capture->ops;
    return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status)
{
    const moeh_stream* const stream = moeh_stream_of(handle);
    if (!stream) return moeh_note(cudaErrorInvalidResourceHandle);
    *status = !stream->capture ? cudaStreamCaptureStatusNone
                               : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                                          : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                        unsigned long long = 0)
{
    if (exec) *exec = nullptr;
    if (!exec || !graph) return moeh_note(cudaErrorInvalidValue);
    *exec = new moeh_instance();
    (*exec)->ops = graph->ops;
    return cudaSuccess;
}

inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    cudaError_t e = exec ? moeh_get().sticky : cudaErrorInvalidValue;
    for (size_t i = 0; !e && i < exec->ops.size(); ++i) e = moeh_queue(stream, exec->ops[i]);
    return moeh_note(e);
}

inline cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return moeh_get().sticky; }

/* How many operations a graph has; `nodes` must be null. */
inline cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count)
{
    if (!graph || nodes || !count) return moeh_note(cudaErrorInvalidValue);
    *count = graph->ops.size();
    return cudaSuccess;
}

inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

#endif
