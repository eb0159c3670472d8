/* host.h: the CPU backend. A plain C++14 compiler, on a machine with no CUDA toolkit, compiles the
   kernels of this library and runs them. Only base/cuda.cuh includes it, where MOE_ON_HOST is 1.

   Method: every CUDA thread is a fiber with a stack of its own (fiber.h). One OS thread runs the
   fibers one at a time, and switches only where a thread waits: at a barrier, a warp intrinsic or
   MOE_SPIN (sched.h). So a run is deterministic and atomics are plain arithmetic. A seed
   (MOE_HOST_SEED, moeh_set_seed) reorders threads, warps and blocks, which makes a missing barrier
   visible. A launch is only queued; work runs while the host waits in a cuda* call. Several virtual
   devices (MOE_HOST_DEVICES) share the one scheduler.

   Refused: what sched.h lists, as a GPU would or more strictly. MOE_HOST_PRELOAD=1 or
   moeh_require_preload(1) also refuses launches of kernels that moe_preload_kernel was not given.

   Not shown: missing fences, bank conflicts, speed, the rounding of tensor cores, a race between
   two threads that no barrier or warp intrinsic separates in either order. A polling loop without
   MOE_SPIN() hangs. All cuda* calls must come from one OS thread.

   Files      types.h       dim3, vector types, error codes
              fiber.h       stacks and the context switch
              state.h       threads, warps, blocks, grids, streams, devices, as data
              sched.h       which thread runs next, and the report when none can
              block.h       barrier, MOE_SPIN, shared memory, asynchronous copies of a thread
              warp.h        shuffles, votes, reductions
              intrinsics.h  atomics, bit and float intrinsics, min and max
              streams.h     launches, streams, events and graphs of the cuda* API
              runtime.h     memory and devices of the cuda* API
              mma.h         16x16x16 products of fragments; included by gemm/mma.cuh
              hopper.h      mbarrier, tensor copies, wgmma; included by gemm/wgmma/ptx.cuh

   Only this folder uses templates and std::. Any number of files of one program may include it: all
   state is reached from one function-local static. */
#ifndef MOE_HOST_HOST_H
#define MOE_HOST_HOST_H

#if !defined(__cplusplus) || __cplusplus < 201402L
#error "moe: the CPU backend needs C++14"
#endif

/* A user's macros of these names would break the C++ library's headers. */
#pragma push_macro("min")
#pragma push_macro("max")
#undef min
#undef max

#include "../base/config.h"
#include "types.h"
#include "fiber.h"
#include "sched.h"
#include "block.h"
#include "warp.h"
#include "intrinsics.h"
#include "runtime.h"

#pragma pop_macro("min")
#pragma pop_macro("max")

/* Defined after the system headers, so that these names do not meet theirs. */
#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

#define threadIdx (moeh_now()->tid)
#define blockIdx (moeh_now()->block->index)
#define blockDim (moeh_now()->block->grid->block)
#define gridDim (moeh_now()->block->grid->grid)

/* Declares shared memory of the block, poisoned when the block first reaches the declaration. Each
   declaration in the source is one object. */
#define MOE_SHARED(type, name)                                                                    \
    static char moeh_site_##name;                                                                 \
    type& name = *(type*)moeh_shared(&moeh_site_##name, sizeof(type))
#define MOE_SHARED_DYNAMIC(name) unsigned char* name = moeh_now()->block->dynamic
#define MOE_SPIN() moeh_spin()
#define MOEI_ALIGNED(p, bytes) moeh_check_aligned(p, bytes, "moves data at a misaligned address")

#endif
