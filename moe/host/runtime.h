/* runtime.h: launches, and the subset of the cuda* API for memory and devices, with CUDA's names,
   signatures and error codes.

   Device memory is malloc'd to its exact size and filled with 0xFF bytes, so that a sanitizer
   guards it and an element nobody wrote is a NaN. Every virtual device may read the memory of
   every other. An asynchronous copy reads its source when its turn comes, as from pinned memory.
   cudaFree waits for all devices. After a failed run every call returns the error until
   moeh_reset, but memory is still freed. */
#ifndef MOE_HOST_RUNTIME_H
#define MOE_HOST_RUNTIME_H

#include <stdlib.h>

#include "sched.h"

typedef moeh_stream* cudaStream_t;
#define cudaStreamLegacy ((cudaStream_t)0x1)

typedef enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
} cudaMemcpyKind;

enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrUnifiedAddressing = 41,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrCooperativeLaunch = 95,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrMaxBlocksPerMultiprocessor = 106
};

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int warpSize, maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
    int major, minor, multiProcessorCount, maxThreadsPerMultiProcessor, maxBlocksPerMultiProcessor;
    int l2CacheSize, memoryBusWidth, regsPerBlock, unifiedAddressing, concurrentKernels;
};

struct cudaFuncAttributes {
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};

#define MOEH_MEMORY ((size_t)16 << 30) /* of one device */

/* ---- errors ---- */

/* Every call returns through here: what cudaGetLastError will say. */
inline cudaError_t moeh_note(cudaError_t e)
{
    if (e != cudaSuccess && e != cudaErrorNotReady) moeh_get().last = e;
    return e;
}

inline cudaError_t cudaPeekAtLastError()
{
    return moeh_get().sticky ? moeh_get().sticky : moeh_get().last;
}

inline cudaError_t cudaGetLastError()
{
    const cudaError_t e = cudaPeekAtLastError();
    moeh_get().last = cudaSuccess;
    return e;
}

/* ---- queues ---- */

/* The stream behind a handle; null: there is none such. */
inline moeh_stream* moeh_stream_of(cudaStream_t handle)
{
    moeh_sched& s = moeh_get();
    if (!handle || handle == cudaStreamLegacy) return s.device[s.current].streams[0].get();
    for (moeh_device& d : s.device)
        for (auto& stream : d.streams)
            if (stream.get() == handle && !stream->destroyed) return handle;
    return nullptr;
}

/* For calls that no capture allows: spoils the captures under way, if any, as CUDA does.
   `relaxed`: also those that permit such calls. Also refuses calls made by a kernel. */
inline cudaError_t moeh_unsafe()
{
    cudaError_t e = moeh_now() && moeh_now()->block ? cudaErrorNotPermitted : moeh_get().sticky;
    for (moeh_device& d : moeh_get().device)
        for (auto& stream : d.streams)
            if (stream->capture && !stream->capture->relaxed) {
                stream->capture->invalid = true;
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
        if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
        stream->capture->ops.push_back(std::move(op));
        return cudaSuccess;
    }
    if (stream == stream->device->streams[0].get())
        for (auto& other : stream->device->streams)
            if (other->blocking && other->capture) { /* the null stream would have to wait for it */
                other->capture->invalid = true;
                return cudaErrorStreamCaptureImplicit;
            }
    op.sequence = ++s.sequence;
    stream->queue.push_back(std::move(op));
    s.changed = true;
    return cudaSuccess;
}

inline cudaError_t moeh_queue_act(cudaStream_t handle, std::function<void()> act)
{
    moeh_op op;
    op.act = std::move(act);
    return moeh_queue(handle, std::move(op));
}

/* Does it on the null stream and waits until it is done. */
inline cudaError_t moeh_do_now(std::function<void()> act)
{
    bool done = false;
    cudaError_t e = moeh_unsafe();
    if (!e) e = moeh_queue_act(nullptr, [&] { act(); done = true; });
    return moeh_note(e ? e : moeh_host_wait([&] { return done; }));
}

/* The call of a kernel with a copy of its argument. */
template <class K, class A>
inline auto moeh_bind(K* kernel, const A& arg)
{
    return [kernel, arg] { kernel(arg); };
}

/* Queues a grid. Nothing runs before the host waits for something. */
template <class F>
inline cudaError_t moeh_launch(dim3 grid, dim3 block, size_t smem, cudaStream_t handle, F call,
                               const char* name)
{
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    const moeh_stream* const stream = moeh_stream_of(handle);
    if (!stream || stream->device->index != moeh_get().current)
        return moeh_note(cudaErrorInvalidResourceHandle);
    if (!block.x || !block.y || !block.z || block.x > 1024 || block.y > 1024 || block.z > 64 ||
        threads > 1024 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu ||
        grid.y > 65535 || grid.z > 65535)
        return moeh_note(cudaErrorInvalidConfiguration);
    if (smem > MOEH_SMEM_BLOCK) return moeh_note(cudaErrorInvalidValue);
    moeh_op op;
    op.act = std::move(call);
    op.grid = grid;
    op.block = block;
    op.smem = smem;
    op.name = name;
    return moeh_note(moeh_queue(handle, std::move(op)));
}

/* ---- memory ---- */

inline bool moeh_all_idle()
{
    for (moeh_device& d : moeh_get().device)
        for (auto& stream : d.streams)
            if (!stream->queue.empty()) return false;
    return true;
}

inline cudaError_t moeh_allocate(void** p, size_t bytes, int device)
{
    moeh_sched& s = moeh_get();
    const cudaError_t e = moeh_unsafe();
    if (!p) return moeh_note(cudaErrorInvalidValue);
    *p = nullptr;
    if (e) return moeh_note(e);
    if (!bytes) return cudaSuccess;
    if (device >= 0 && bytes > MOEH_MEMORY - s.device[device].allocated)
        return moeh_note(cudaErrorMemoryAllocation);
    *p = moeh_poisoned(bytes, 256);
    if (!*p) return moeh_note(cudaErrorMemoryAllocation);
    if (device >= 0) s.device[device].allocated += bytes;
    s.memory[~(uintptr_t)*p] = std::make_pair(bytes, device);
    return cudaSuccess;
}

inline cudaError_t moeh_release(void* p, bool on_device)
{
    moeh_sched& s = moeh_get();
    cudaError_t e;
    if (!p) return cudaSuccess;
    const auto known = s.memory.find(~(uintptr_t)p);
    if (known == s.memory.end() || (known->second.second >= 0) != on_device)
        return moeh_note(cudaErrorInvalidValue);
    e = moeh_unsafe();
    if (e == cudaErrorStreamCaptureUnsupported || e == cudaErrorNotPermitted) return moeh_note(e);
    e = moeh_host_wait(moeh_all_idle);
    if (on_device) s.device[known->second.second].allocated -= known->second.first;
    s.memory.erase(known);
    free(p);
    return moeh_note(e);
}

inline cudaError_t cudaMalloc(void** p, size_t bytes)
{
    return moeh_allocate(p, bytes, moeh_get().current);
}
inline cudaError_t cudaMallocHost(void** p, size_t bytes) { return moeh_allocate(p, bytes, -1); }
template <class T> inline cudaError_t cudaMalloc(T** p, size_t bytes)
{
    return cudaMalloc((void**)p, bytes);
}
template <class T> inline cudaError_t cudaMallocHost(T** p, size_t bytes)
{
    return cudaMallocHost((void**)p, bytes);
}
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };
template <class T> inline cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned)
{
    return cudaMallocHost((void**)p, bytes);
}
inline cudaError_t cudaFree(void* p) { return moeh_release(p, true); }
inline cudaError_t cudaFreeHost(void* p) { return moeh_release(p, false); }

inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total)
{
    *total = MOEH_MEMORY;
    *free_bytes = MOEH_MEMORY - moeh_get().device[moeh_get().current].allocated;
    return cudaSuccess;
}

inline void moeh_copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                           size_t bytes, size_t rows)
{
    for (size_t r = 0; bytes && r < rows; ++r)
        memmove((char*)to + r * to_pitch, (const char*)from + r * from_pitch, bytes);
}

inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from,
                                     size_t from_pitch, size_t bytes, size_t rows, cudaMemcpyKind,
                                     cudaStream_t stream = nullptr)
{
    if (to_pitch < bytes || from_pitch < bytes) return moeh_note(cudaErrorInvalidValue);
    if (bytes && rows && (!to || !from)) return moeh_note(cudaErrorInvalidValue);
    return moeh_note(moeh_queue_act(
        stream, [=] { moeh_copy_rows(to, to_pitch, from, from_pitch, bytes, rows); }));
}

inline cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                size_t bytes, size_t rows, cudaMemcpyKind)
{
    if (to_pitch < bytes || from_pitch < bytes) return moeh_note(cudaErrorInvalidValue);
    if (bytes && rows && (!to || !from)) return moeh_note(cudaErrorInvalidValue);
    return moeh_do_now([=] { moeh_copy_rows(to, to_pitch, from, from_pitch, bytes, rows); });
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr)
{
    return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind)
{
    return cudaMemcpy2D(to, bytes, from, bytes, bytes, 1, kind);
}
inline cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                       cudaStream_t stream = nullptr)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}
inline cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t bytes)
{
    return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream = nullptr)
{
    if (bytes && !p) return moeh_note(cudaErrorInvalidValue);
    return moeh_note(moeh_queue_act(stream, [=] { if (bytes) memset(p, value, bytes); }));
}
inline cudaError_t cudaMemset(void* p, int value, size_t bytes)
{
    if (bytes && !p) return moeh_note(cudaErrorInvalidValue);
    return moeh_do_now([=] { if (bytes) memset(p, value, bytes); });
}

/* ---- devices ---- */

inline bool moeh_is_device(int id) { return id >= 0 && id < moeh_get().devices; }

inline cudaError_t cudaGetDeviceCount(int* n)
{
    *n = moeh_get().devices;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* id)
{
    *id = moeh_get().current;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int id)
{
    if (!moeh_is_device(id)) return moeh_note(cudaErrorInvalidDevice);
    moeh_get().current = id;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b)
{
    if (!moeh_is_device(a) || !moeh_is_device(b)) return moeh_note(cudaErrorInvalidDevice);
    *can = a != b;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned)
{
    return moeh_is_device(peer) && peer != moeh_get().current ? cudaSuccess
                                                              : moeh_note(cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceDisablePeerAccess(int) { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int id)
{
    *value = 0;
    if (!moeh_is_device(id)) return moeh_note(cudaErrorInvalidDevice);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = 32; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = MOEH_SMS; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = 32 << 20; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; return cudaSuccess;
    case cudaDevAttrUnifiedAddressing: *value = 1; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = MOEH_SMEM_SM; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = MOEH_SMEM_BLOCK; return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = MOEH_BLOCKS_PER_SM; return cudaSuccess;
    }
    return moeh_note(cudaErrorInvalidValue);
}

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int id)
{
    memset((void*)p, 0, sizeof *p);
    if (!moeh_is_device(id)) return moeh_note(cudaErrorInvalidDevice);
    strcpy(p->name, "CPU (moe/host)");
    p->totalGlobalMem = MOEH_MEMORY;
    p->sharedMemPerBlock = 48 * 1024;
    p->sharedMemPerBlockOptin = MOEH_SMEM_BLOCK;
    p->sharedMemPerMultiprocessor = MOEH_SMEM_SM;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = 8;
    p->multiProcessorCount = MOEH_SMS;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = MOEH_BLOCKS_PER_SM;
    p->l2CacheSize = 32 << 20;
    p->memoryBusWidth = 64;
    p->regsPerBlock = 65536;
    p->unifiedAddressing = p->concurrentKernels = 1;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceSynchronize()
{
    const cudaError_t e = moeh_unsafe();
    moeh_device& d = moeh_get().device[moeh_get().current];
    return moeh_note(e ? e : moeh_host_wait([&d] {
        for (auto& stream : d.streams)
            if (!stream->queue.empty()) return false;
        return true;
    }));
}

inline cudaError_t cudaDriverGetVersion(int* v)
{
    *v = 0;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* v)
{
    *v = 0;
    return cudaSuccess;
}

/* ---- kernels ---- */

template <class K> inline cudaError_t cudaFuncSetAttribute(K*, cudaFuncAttribute, int)
{
    return cudaSuccess;
}
template <class K> inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, K*)
{
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}
template <class K>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K*, int, size_t)
{
    *blocks = 1;
    return cudaSuccess;
}

#endif
