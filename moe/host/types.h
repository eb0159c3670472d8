/* types.h: CUDA's dim3, vector types and error codes, with CUDA's names and values.

   The vector types may alias any type, since kernels copy rows of every dtype as uint4. A plain
   struct would let the compiler reorder such loads and stores. */
#ifndef MOE_HOST_TYPES_H
#define MOE_HOST_TYPES_H

#include <stddef.h>
#include <stdint.h>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
};

#define MOEH_VECTORS(type, name)                                                                  \
    struct __attribute__((may_alias, aligned(8))) name##2 {                                       \
        type x, y;                                                                                \
    };                                                                                            \
    struct __attribute__((may_alias, aligned(16))) name##4 {                                      \
        type x, y, z, w;                                                                          \
    };                                                                                            \
    inline name##2 make_##name##2(type x, type y) { return name##2{x, y}; }                       \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return name##4{x, y, z, w}; }
MOEH_VECTORS(unsigned, uint)
MOEH_VECTORS(float, float)
#undef MOEH_VECTORS

/* name, CUDA's value, text */
#define MOEH_ERRORS(X)                                                                            \
    X(cudaSuccess, 0, "no error")                                                                 \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                               \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                              \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                         \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                      \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                             \
    X(cudaErrorNotReady, 600, "device not ready")                                                 \
    X(cudaErrorPeerAccessAlreadyEnabled, 704, "peer access is already enabled")                   \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                  \
    X(cudaErrorNotPermitted, 800, "operation not permitted")                                      \
    X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing") \
    X(cudaErrorStreamCaptureInvalidated, 901, "capture spoiled by an earlier error")              \
    X(cudaErrorStreamCaptureUnmatched, 903, "capture was not begun on this stream")

enum cudaError {
#define MOEH_ERROR_ENUM(name, value, text) name = value,
    MOEH_ERRORS(MOEH_ERROR_ENUM)
#undef MOEH_ERROR_ENUM
};
typedef enum cudaError cudaError_t;

inline const char* cudaGetErrorString(cudaError_t e)
{
    switch (e) {
#define MOEH_ERROR_TEXT(name, value, text) case name: return text;
        MOEH_ERRORS(MOEH_ERROR_TEXT)
#undef MOEH_ERROR_TEXT
    }
    return "unrecognized error code";
}

#endif
