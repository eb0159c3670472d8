/* config.h: version and backend. C11 and C++14; includes nothing.

   MOE_BACKEND chooses where the kernels run:
     cuda   on a GPU, compiled by nvcc (the default when nvcc compiles the file)
     host   on the CPU, compiled by any C++ compiler, with no CUDA toolkit
            (the default otherwise; -DMOE_BACKEND=host makes it explicit)
   Both compile the same kernel source. */
#ifndef MOE_BASE_CONFIG_H
#define MOE_BASE_CONFIG_H

#define MOE_VERSION_MAJOR 0
#define MOE_VERSION_MINOR 1
#define MOE_VERSION_PATCH 0
#define MOE_VERSION (MOE_VERSION_MAJOR * 10000 + MOE_VERSION_MINOR * 100 + MOE_VERSION_PATCH)
#define MOE_VERSION_STRING "0.1.0"

/* MOE_BACKEND is a bare word, so that a build file can write -DMOE_BACKEND=host. */
#define MOEI_BACKEND_IS_host 1
#define MOEI_BACKEND_IS_cuda 0
#define MOEI_BACKEND_KNOWN_host 1
#define MOEI_BACKEND_KNOWN_cuda 1
#define MOEI_JOIN2(a, b) a##b
#define MOEI_JOIN(a, b) MOEI_JOIN2(a, b)
#define MOEI_QUOTE2(...) #__VA_ARGS__
#define MOEI_QUOTE(...) MOEI_QUOTE2(__VA_ARGS__)

#ifndef MOE_BACKEND
#if defined(__CUDACC__)
#define MOE_BACKEND cuda
#else
#define MOE_BACKEND host
#endif
#endif

#if !MOEI_JOIN(MOEI_BACKEND_KNOWN_, MOE_BACKEND)
#error "moe: MOE_BACKEND is host or cuda"
#endif

/* 1 where the kernels of this translation unit run on the CPU. */
#define MOE_ON_HOST MOEI_JOIN(MOEI_BACKEND_IS_, MOE_BACKEND)

/* Marks functions of a header that a file may not call: no warning. */
#if defined(__GNUC__) || defined(__clang__)
#define MOEI_UNUSED __attribute__((unused))
#else
#define MOEI_UNUSED
#endif

/* Qualifiers of host functions, in .h and .cuh alike. */
#define MOE_HOST MOEI_UNUSED static inline

/* Qualifiers of functions of a .h that kernels call too. */
#if defined(__CUDACC__)
#define MOE_HOST_DEVICE MOEI_UNUSED static __host__ __device__ inline
#else
#define MOE_HOST_DEVICE MOE_HOST
#endif

/* Returns the version of these headers, MOE_VERSION. */
MOE_HOST int moe_version(void) { return MOE_VERSION; }

#endif
