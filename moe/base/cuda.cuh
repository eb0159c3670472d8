/* cuda.cuh: qualifiers, launch macros and device queries of all kernels. The only file that
   includes the CUDA runtime's headers, or host/ where the kernels run on a CPU.

   A kernel takes exactly one struct by value and is launched through MOE_LAUNCH:

     typedef struct my_args { float* y; int32_t n; } my_args;
     MOE_KERNEL(256, 1) my_kernel(MOE_ARG(my_args) d) { ... }

     moe_launch_config c = moe_grid(num_blocks, 256, 0, stream);
     return MOE_LAUNCH(my_kernel, c, args);        // a moe_status

   A launch can also be prepared once and run many times; a run costs the host one runtime call:

     moe_launch l;
     MOE_TRY(MOE_PREPARE(&l, my_kernel, c));
     return MOE_RUN(&l, args, stream);

   Requires CUDA 12.0 or later for the cuda backend, C++14 for both. */
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

/* Declares static shared memory: one struct a kernel. */
#define MOE_SHARED(type, name) __shared__ type name
/* Declares dynamic shared memory as unsigned char*, 128-byte aligned. The array has a name of its
   own: a name such as `shared` may have another type in the file that includes this one. */
#define MOE_SHARED_DYNAMIC(name)                                                                  \
    extern __shared__ __align__(128) unsigned char moei_shared_dynamic[];                         \
    unsigned char* const name = moei_shared_dynamic
/* Stands in every polling loop; on the CPU lets the other threads run. */
#define MOE_SPIN() ((void)0)
/* Requires that `p` is a multiple of `bytes`; checked on the CPU alone. */
#define MOEI_ALIGNED(p, bytes) ((void)0)

#endif

/* MOE_UNROLL stands before a loop with literal bounds and unrolls it, so that its arrays stay in
   registers. */
#if MOE_ON_HOST
#define MOE_UNROLL
#define MOE_NO_UNROLL
#define MOE_UNROLL_8
#else
#define MOE_UNROLL _Pragma("unroll")
#define MOE_NO_UNROLL _Pragma("unroll 1") /* keeps a loop rolled: other code needs the registers */
#define MOE_UNROLL_8 _Pragma("unroll 8")  /* for a loop of loads: eight are in flight at once */
#endif

/* Device function, always inlined. */
#define MOE_DEVICE MOEI_UNUSED static __device__ __forceinline__
/* Body that many kernels instantiate with literal arguments. Inlined on a GPU, so that the literals
   are folded; compiled once on the CPU, which compiles three times faster. */
#if MOE_ON_HOST
#define MOE_DEVICE_BODY MOEI_UNUSED static __attribute__((noinline))
#else
#define MOE_DEVICE_BODY MOE_DEVICE
#endif
/* MOE_KERNEL(threads, min_blocks) declares a kernel, MOE_ARG(type) its one argument. */
#define MOE_KERNEL(threads, min_blocks)                                                           \
    MOEI_UNUSED static __global__ void __launch_bounds__(threads, min_blocks)
#define MOE_ARG(type) const __grid_constant__ type

/* Launch configuration: filled in by moe_grid, then adjusted. */
typedef struct moe_launch_config {
    dim3 grid, block;    /* thread blocks; threads of each */
    size_t smem;         /* dynamic shared memory, bytes; 0: none */
    cudaStream_t stream; /* null: the default stream */
    int dependent;       /* 1: programmatic dependent launch. The grid may start before the kernel
                            ahead of it has ended, and waits for that kernel in moe_pdl_wait. Has an
                            effect on devices and in code of compute capability 9.0 and later. 0:
                            starts after that kernel */
    int cluster;         /* thread blocks per cluster along x; 0 or 1: none */
} moe_launch_config;

/* Returns the configuration of `blocks` thread blocks of `threads` threads, both along x, with smem
   bytes of dynamic shared memory; neither dependent nor with clusters. */
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

/* Returns MOE_OK, or MOE_ERR_CUDA with e as its detail. */
MOE_HOST moe_status moe_cuda_status(cudaError_t e)
{
    return e == cudaSuccess ? MOE_OK : (moe_status)(MOE_ERR_CUDA | ((int)e << 8));
}

/* Returns from a launch helper with the error of a CUDA call, if there was one. */
#define MOE_TRY_CUDA(call) MOE_TRY(moe_cuda_status(call))

/* A prepared launch: all but its stream, for the device that was current. */
typedef struct moe_launch {
    const void* kernel;         /* address of the kernel; null: nothing to launch */
    const char* name;           /* of the kernel; used on the CPU */
    size_t smem;                /* dynamic shared memory, bytes */
    uint32_t grid[3], block[3]; /* x, y, z */
    int32_t dependent, cluster; /* as in moe_launch_config */
} moe_launch;

/* Prepares a launch: loads the kernel, allows it the shared memory it may need, fills in *launch.
   Returns MOE_OK or MOE_ERR_CUDA. */
#define MOE_PREPARE(launch, kernel, config)                                                       \
    moei_launch_prepare(launch, (const void*)(kernel), #kernel, &(config))

/* Queues a prepared launch on `stream`: one runtime call. */
#define MOE_RUN(launch, arg, stream) moei_launch_run(launch, &(arg), stream)

/* The body of a prepare call. Its last argument is an expression that fills in *p and returns a
   status. Where that status is a refusal, or the descriptor is null (`described` is 0), *p becomes
   empty, and its run queues nothing. Returns MOE_ERR_NULL of `desc` where p or the descriptor is
   null. */
#define MOE_RETURN_PREPARED(described, p, prepare)                                                 \
    do {                                                                                           \
        moe_status moei_prepared = MOE_STATUS(MOE_ERR_NULL, desc);                                 \
        if (!(p)) return moei_prepared;                                                            \
        memset(p, 0, sizeof *(p));                                                                 \
        if (described) moei_prepared = (prepare);                                                  \
        if (moei_prepared != MOE_OK) memset(p, 0, sizeof *(p));                                    \
        return moei_prepared;                                                                      \
    } while (0)

/* Fills in *l from the kernel and *c; the function behind MOE_PREPARE. */
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
        if (c->smem > 32 * 1024) {
            /* the limit is a setting of the kernel on each device: always the device's maximum, so
               that launches with more and with less can be queued concurrently */
            int id = 0, most = 0;
            MOE_TRY_CUDA(cudaGetDevice(&id));
            MOE_TRY_CUDA(
                cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
            MOE_TRY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              most - (int)fa.sharedSizeBytes));
        }
        /* only code built for 9.0 or later has the instruction that waits */
        if (fa.binaryVersion < 90 || fa.ptxVersion < 90) l->dependent = 0;
    }
#endif
    l->kernel = kernel;
    return MOE_OK;
}

/* Returns three extents as a dim3. */
MOE_HOST dim3 moei_launch_dim(const uint32_t* n) { return dim3(n[0], n[1], n[2]); }

/* MOE_LAUNCH(kernel, config, arg) prepares and queues at once, on the stream of `config`. */
#if MOE_ON_HOST
/* The CPU backend copies the struct and queues the call on the stream. */
#define moei_launch_run(l, arg, stream)                                                            \
    ((l)->kernel ? moe_cuda_status(moeh_launch(                                                    \
                       moei_launch_dim((l)->grid), moei_launch_dim((l)->block), (l)->smem, stream, \
                       moeh_bind_prepared((l)->kernel, *(arg)), (l)->name, (l)->kernel,            \
                       (l)->dependent != 0, (unsigned)(l)->cluster))                               \
                 : MOE_OK)
#define MOE_LAUNCH(kernel, config, arg)                                                            \
    moe_cuda_status(moeh_launch((config).grid, (config).block, (config).smem, (config).stream,     \
                                moeh_bind(kernel, arg), #kernel, (const void*)(kernel),            \
                                (config).dependent != 0, (unsigned)(config).cluster))
#else
#define MOE_LAUNCH(kernel, config, arg) moei_launch_once((const void*)(kernel), &(config), &(arg))

/* Queues *l on `stream` with the struct at `arg`. */
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

/* Prepares and queues in one call. */
MOE_HOST moe_status moei_launch_once(const void* kernel, const moe_launch_config* c,
                                     const void* arg)
{
    moe_launch l;
    MOE_TRY(moei_launch_prepare(&l, kernel, "", c));
    return moei_launch_run(&l, arg, c->stream);
}
#endif

/* Waits until all earlier kernels of the stream have ended and their writes are visible. Every
   thread of a kernel launched with dependent = 1 calls moe_pdl_wait, before its first access to
   what an earlier kernel reads or writes. A kernel that waits for words in memory instead calls it
   at its end, so that kernels behind it wait for both. The CPU fails a run in which a thread ends
   without the call. */
MOE_DEVICE void moe_pdl_wait(void)
{
#if MOE_ON_HOST
    moeh_pdl_wait();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

/* First statement of such a kernel; after moe_pdl_wait where the next kernel works before its own
   wait. Lets the thread blocks of the next kernel start while this one runs, as far as
   multiprocessors have room; they wait for this kernel's end in moe_pdl_wait. */
MOE_DEVICE void moe_pdl_trigger(void)
{
#if !MOE_ON_HOST && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/* What tile choice and persistent grids need of the current device. */
typedef struct moe_device {
    int sms;        /* number of multiprocessors */
    int smem_block; /* most dynamic shared memory of a thread block, bytes */
    int smem_sm;    /* shared memory of one multiprocessor, bytes */
    int major;      /* compute capability, its major number */
} moe_device;

/* Fills in *d for the current device. Returns MOE_OK or MOE_ERR_CUDA. */
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

/* Loads one kernel before its first launch. Under lazy loading a first launch synchronises, and can
   hang while another kernel spins. The CPU records the kernel for moeh_require_preload. */
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

/* Writes the number of thread blocks of a launch that a multiprocessor holds at a time to *n. */
MOE_HOST moe_status moe_resident_blocks(const moe_launch* l, int* n)
{
#if MOE_ON_HOST
    (void)l;
    *n = MOEH_BLOCKS_PER_SM;
    return MOE_OK;
#else
    return moe_cuda_status(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        n, l->kernel, (int)l->block[0], l->smem));
#endif
}

#endif
