/* runtime.h: the subset of the cuda* API for memory and devices, with CUDA's names, signatures and
   error codes.

   Device memory is malloc'd to its exact size, so that a sanitizer guards it. A new allocation is
   filled with poison: an unwritten element is a NaN. Every virtual device may read the memory of
   all others. An asynchronous copy reads its source when it runs, as from pinned memory. cudaFree
   waits for all devices. After a failed run every call returns the error until moeh_reset, but
   memory is still freed. */
#ifndef MOE_HOST_RUNTIME_H
#define MOE_HOST_RUNTIME_H

#include "streams.h"

/* ---- devices ---- */

inline cudaError_t moeh_check_device(int id)
{
    return id >= 0 && id < moeh_get().devices ? cudaSuccess : cudaErrorInvalidDevice;
}

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
    if (!moeh_check_device(id)) moeh_get().current = id;
    return moeh_check_device(id);
}

inline cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b)
{
    *can = a != b;
    return moeh_check_device(a) ? cudaErrorInvalidDevice : moeh_check_device(b);
}
inline cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned)
{
    return moeh_check_device(peer == moeh_get().current ? -1 : peer);
}
inline cudaError_t cudaDeviceDisablePeerAccess(int peer) { return moeh_check_device(peer); }

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int id)
{
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = MOEH_SMS; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = MOEH_SMEM_SM; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = MOEH_SMEM_BLOCK; break;
    }
    return moeh_check_device(id);
}

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
};

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int id)
{
    *p = cudaDeviceProp{"CPU (moe/host)", 8, 0, MOEH_SMS};
    return moeh_check_device(id);
}

inline cudaError_t cudaDeviceSynchronize()
{
    const cudaError_t e = moeh_unsafe();
    const int d = moeh_get().current;
    return e ? e : moeh_wait_for([d](const moeh_stream* stream) { return stream->device == d; });
}

/* ---- memory ---- */

#define MOEH_MEMORY ((size_t)16 << 30)

template <class Type> inline cudaError_t cudaMalloc(Type** p, size_t bytes)
{
    const cudaError_t e = moeh_unsafe();
    *p = nullptr;
    if (e || !bytes) return e;
    if (bytes <= MOEH_MEMORY) *p = (Type*)moeh_poisoned(bytes, 256);
    if (!*p) return cudaErrorMemoryAllocation;
    moeh_get().memory[(void*)*p] = bytes;
    moeh_get().taken += bytes;
    return cudaSuccess;
}

inline cudaError_t cudaFree(void* p)
{
    cudaError_t e = p ? moeh_unsafe() : cudaSuccess;
    if (!p || e != moeh_get().sticky) return e;
    e = moeh_wait_for([](const moeh_stream*) { return true; });
    moeh_get().taken -= moeh_get().memory[p];
    moeh_get().memory.erase(p);
    free(p);
    return e;
}

/* Reports what one allocation may take, less what is taken already. */
inline cudaError_t cudaMemGetInfo(size_t* available, size_t* total)
{
    *total = MOEH_MEMORY;
    *available = MOEH_MEMORY - std::min(MOEH_MEMORY, moeh_get().taken);
    return cudaSuccess;
}

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};

/* Calls `call`, which queues on the null stream, and waits for it; refuses during a capture. */
template <class Function> inline cudaError_t moeh_at_once(Function call)
{
    cudaError_t e = moeh_unsafe();
    if (!e) e = call();
    return e ? e : cudaStreamSynchronize(nullptr);
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream = nullptr)
{
    if (bytes && (!to || !from)) return cudaErrorInvalidValue;
    return moeh_queue(stream, [=] { return !bytes || memmove(to, from, bytes); });
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind)
{
    return moeh_at_once([=] { return cudaMemcpyAsync(to, from, bytes, kind); });
}
inline cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                       cudaStream_t stream = nullptr)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}

inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from,
                                     size_t from_pitch, size_t bytes, size_t rows,
                                     cudaMemcpyKind kind, cudaStream_t stream = nullptr)
{
    cudaError_t e = cudaSuccess;
    if (bytes > to_pitch || bytes > from_pitch) return cudaErrorInvalidValue;
    for (size_t r = 0; !e && r < rows; ++r)
        e = cudaMemcpyAsync((char*)to + r * to_pitch, (const char*)from + r * from_pitch, bytes,
                            kind, stream);
    return e;
}
inline cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                size_t bytes, size_t rows, cudaMemcpyKind kind)
{
    return moeh_at_once(
        [=] { return cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, rows, kind); });
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream = nullptr)
{
    if (bytes && !p) return cudaErrorInvalidValue;
    return moeh_queue(stream, [=] { return !bytes || memset(p, value, bytes); });
}
inline cudaError_t cudaMemset(void* p, int value, size_t bytes)
{
    return moeh_at_once([=] { return cudaMemsetAsync(p, value, bytes); });
}

#endif
