/* cuda.cuh: the one includer of the CUDA runtime's headers, or of host/ where the kernels run on a
   CPU. Qualifiers, the launch macro, and what a launch must know of the device.

   A kernel takes exactly one struct by value and is launched through MOE_LAUNCH:

     typedef struct my_args { float* y; int32_t n; } my_args;
     MOE_KERNEL(256, 1) my_kernel(MOE_ARG(my_args) d) { ... }

     moe_launch_config c = moe_grid(num_blocks, 256, 0, stream);
     return MOE_LAUNCH(my_kernel, c, args);        // a moe_status

   or prepared once and run many times, where a run costs the host one call of the runtime:

     moe_launch l;
     MOE_TRY(MOE_PREPARE(&l, my_kernel, c));
     return MOE_RUN(&l, args, stream);

   Needs CUDA 12.0 or later for the cuda backend, C++14 for both. */
#ifndef MOE_BASE_CUDA_CUH
#define MOE_BASE_CUDA_CUH

#include "config.h"
#include "status.h"
#include "types.h"

#if MOE_ON_HOST

#if defined(__CUDACC__)
#error "moe: MOE_BACKEND=host is for a plain C++ compiler; leave it unset under nvcc"
#endif
#if defined(CUDART_VERSION)
#error "moe: the CPU backend replaces cuda_runtime.h; include .cuh from a .cu, or only .h files"
#endif
#include "../host/host.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

/* Static shared memory: one struct a kernel. */
#define MOE_SHARED(type, name) __shared__ type name
/* Dynamic shared memory, 128-byte aligned, as unsigned char*. The array has one name of its own:
   a name such as `shared` may have another type in the file that includes this. */
#define MOE_SHARED_DYNAMIC(name)                                                                  \
    extern __shared__ __align__(128) unsigned char moei_shared_dynamic[];                         \
    unsigned char* const name = moei_shared_dynamic
/* Stands in every polling loop; on the CPU it lets the thread waited for run. */
#define MOE_SPIN() ((void)0)
/* The address must be a multiple of `bytes`; the CPU looks. */
#define MOEI_ALIGNED(p, bytes) ((void)0)

#endif

/* Before a loop over literals: unroll it, so that its arrays stay in registers. */
#if MOE_ON_HOST
#define MOE_UNROLL
#define MOE_NO_UNROLL
#define MOE_UNROLL_8
#else
#define MOE_UNROLL _Pragma("unroll")
#define MOE_NO_UNROLL _Pragma("unroll 1") /* a loop whose registers are wanted elsewhere */
#define MOE_UNROLL_8 _Pragma("unroll 8")  /* a loop of loads: eight are under way at once */
#endif

#define MOE_DEVICE MOEI_UNUSED static __device__ __forceinline__
/* A body that many kernels are stamped from: inlined, so that its literals count; on the CPU
   compiled once, which is three times quicker. */
#if MOE_ON_HOST
#define MOE_DEVICE_BODY MOEI_UNUSED static __attribute__((noinline))
#else
#define MOE_DEVICE_BODY MOE_DEVICE
#endif
#define MOE_KERNEL(threads, min_blocks)                                                           \
    MOEI_UNUSED static __global__ void __launch_bounds__(threads, min_blocks)
#define MOE_ARG(type) const __grid_constant__ type

/* How to launch: filled by moe_grid, then adjusted. */
typedef struct moe_launch_config {
    dim3 grid, block;
    size_t smem; /* dynamic shared memory, bytes */
    cudaStream_t stream;
    int dependent; /* 1: may start before the kernel ahead of it has ended, and waits for it in
                      moe_pdl_wait; on devices and in code of 9.0 and later */
    int cluster;   /* blocks per cluster along x; 0 or 1: none */
} moe_launch_config;

MOE_HOST moe_launch_config moe_grid(int64_t blocks, int threads, size_t smem, cudaStream_t stream)
{
    moe_launch_config c;
    c.grid = dim3((unsigned)blocks, 1, 1);
    c.block = dim3((unsigned)threads, 1, 1);
    c.smem = smem;
    c.stream = stream;
    c.dependent = 0;
    c.cluster = 0;
    return c;
}

MOE_HOST moe_status moe_cuda_status(cudaError_t e)
{
    return e == cudaSuccess ? MOE_OK : (moe_status)(MOE_ERR_CUDA | ((int)e << 8));
}

/* Pass on what a CUDA call refused. */
#define MOE_TRY_CUDA(call) MOE_TRY(moe_cuda_status(call))

/* A launch with all but its stream settled, for the device that was current. */
typedef struct moe_launch {
    const void* kernel; /* null: nothing to launch */
    const char* name;   /* of the kernel; used on the CPU */
    size_t smem;
    uint32_t grid[3], block[3];
    int32_t dependent, cluster;
} moe_launch;

/* Settles a launch: loads the kernel and gives it the shared memory it may need. */
#define MOE_PREPARE(launch, kernel, config)                                                       \
    moei_launch_prepare(launch, (const void*)(kernel), #kernel, &(config))

/* Queues a prepared launch on `stream`: one call of the runtime. */
#define MOE_RUN(launch, arg, stream) moei_launch_run(launch, &(arg), stream)

/* The body of a prepare call: `settle` fills in *p and returns a status. Where it refuses, or there is
   no descriptor, *p becomes empty, and its run queues nothing. */
#define MOE_RETURN_PREPARED(described, p, settle)                                                  \
    do {                                                                                           \
        moe_status moei_prepared = MOE_STATUS(MOE_ERR_NULL, desc);                                 \
        if (!(p)) return moei_prepared;                                                            \
        memset(p, 0, sizeof *(p));                                                                 \
        if (described) moei_prepared = (settle);                                                   \
        if (moei_prepared != MOE_OK) memset(p, 0, sizeof *(p));                                    \
        return moei_prepared;                                                                      \
    } while (0)

MOE_HOST moe_status moei_launch_prepare(moe_launch* l, const void* kernel, const char* name,
                                        const moe_launch_config* c)
{
    l->kernel = 0;
    l->name = name;
    l->smem = c->smem;
    l->grid[0] = c->grid.x, l->grid[1] = c->grid.y, l->grid[2] = c->grid.z;
    l->block[0] = c->block.x, l->block[1] = c->block.y, l->block[2] = c->block.z;
    l->dependent = c->dependent;
    l->cluster = c->cluster;
#if !MOE_ON_HOST
    {
        cudaFuncAttributes fa;
        MOE_TRY_CUDA(cudaFuncGetAttributes(&fa, kernel));
        if (c->smem > 32 * 1024) { /* a setting of each device: always the most there is, so that
                                      calls with more and with less can be queued side by side */
            int id = 0, most = 0;
            MOE_TRY_CUDA(cudaGetDevice(&id));
            MOE_TRY_CUDA(
                cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
            MOE_TRY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              most - (int)fa.sharedSizeBytes));
        }
        /* only code built for 9.0 has the instruction that waits */
        if (fa.binaryVersion < 90 || fa.ptxVersion < 90) l->dependent = 0;
    }
#endif
    l->kernel = kernel;
    return MOE_OK;
}

MOE_HOST dim3 moei_launch_dim(const uint32_t* n) { return dim3(n[0], n[1], n[2]); }

/* MOE_LAUNCH: both at once, on the config's stream. */
#if MOE_ON_HOST
/* The CPU backend copies the struct and queues the call on the stream. */
#define moei_launch_run(l, arg, stream)                                                            \
    ((l)->kernel                                                                                   \
         ? moe_cuda_status(moeh_launch(moei_launch_dim((l)->grid), moei_launch_dim((l)->block),    \
                                       (l)->smem, stream, moeh_bind_prepared((l)->kernel, *(arg)), \
                                       (l)->name, (l)->kernel, (l)->dependent != 0))               \
         : MOE_OK)
#define MOE_LAUNCH(kernel, config, arg)                                                            \
    moe_cuda_status(moeh_launch((config).grid, (config).block, (config).smem, (config).stream,     \
                                moeh_bind(kernel, arg), #kernel, (const void*)(kernel),            \
                                (config).dependent != 0))
#else
#define MOE_LAUNCH(kernel, config, arg) moei_launch_once((const void*)(kernel), &(config), &(arg))

MOE_HOST moe_status moei_launch_run(const moe_launch* l, const void* arg, cudaStream_t stream)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attr[2];
    void* args[1];
    if (!l->kernel) return MOE_OK;
    args[0] = (void*)arg;
    config.gridDim = moei_launch_dim(l->grid);
    config.blockDim = moei_launch_dim(l->block);
    config.dynamicSmemBytes = l->smem;
    config.stream = stream;
    config.attrs = attr;
    if (l->dependent) {
        attr[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (l->cluster > 1) {
        attr[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attr[config.numAttrs].val.clusterDim.x = (unsigned)l->cluster;
        attr[config.numAttrs].val.clusterDim.y = 1;
        attr[config.numAttrs++].val.clusterDim.z = 1;
    }
    return moe_cuda_status(cudaLaunchKernelExC(&config, l->kernel, args));
}

MOE_HOST moe_status moei_launch_once(const void* kernel, const moe_launch_config* c,
                                     const void* arg)
{
    moe_launch l;
    MOE_TRY(moei_launch_prepare(&l, kernel, "", c));
    return moei_launch_run(&l, arg, c->stream);
}
#endif

/* Every thread of a kernel launched with dependent = 1 calls it before it touches global memory:
   from here on, all earlier kernels of the stream have ended and what they wrote is visible. The
   CPU refuses a thread that ends without it. */
MOE_DEVICE void moe_pdl_wait(void)
{
#if MOE_ON_HOST
    moeh_pdl_wait();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

/* First statement of such a kernel: the next one's blocks may come in while this one's run, as far
   as there is room, and wait for its end in moe_pdl_wait. */
MOE_DEVICE void moe_pdl_trigger(void)
{
#if !MOE_ON_HOST && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/* What tile choice and persistent grids need of the current device. */
typedef struct moe_device {
    int sms;        /* multiprocessors */
    int smem_block; /* most dynamic shared memory a block may have, bytes */
    int smem_sm;    /* shared memory of one multiprocessor, bytes */
    int major;      /* compute capability */
} moe_device;

MOE_HOST moe_status moe_device_query(moe_device* d)
{
    int id = 0;
    MOE_TRY_CUDA(cudaGetDevice(&id));
    MOE_TRY_CUDA(cudaDeviceGetAttribute(&d->sms, cudaDevAttrMultiProcessorCount, id));
    MOE_TRY_CUDA(
        cudaDeviceGetAttribute(&d->smem_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
    MOE_TRY_CUDA(
        cudaDeviceGetAttribute(&d->smem_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id));
    MOE_TRY_CUDA(cudaDeviceGetAttribute(&d->major, cudaDevAttrComputeCapabilityMajor, id));
    return MOE_OK;
}

/* Loads one kernel now rather than at its first launch: under lazy loading a first launch
   synchronises, and can hang while another kernel spins. The CPU remembers which were loaded, for
   moeh_require_preload. */
MOE_HOST moe_status moe_preload_kernel(const void* kernel)
{
#if MOE_ON_HOST
    moeh_get().preloaded.insert(kernel);
    return MOE_OK;
#else
    cudaFuncAttributes fa;
    return moe_cuda_status(cudaFuncGetAttributes(&fa, kernel));
#endif
}

#endif
