/* variant.cuh: the table of compiled tensor-core kernels. What is in it can be chosen, launched and
   preloaded; what the current device can run of it, moei_variant_runs tells.

     static const moei_variant table[] = {
         {(const void*)my_kernel, "my_kernel", MOE_GEMM_PATH_WMMA,
          MOEI_SHAPE_INIT(MOE_GEMM_SHAPE_64x64, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K),
          tile, blocks_sm, MOEI_RING_BYTES(1, MOE_GEMM_SHAPE_64x64), 80, MOEI_CODE_ANY},
         MOEI_VARIANT_END};

   The kernel's body stands behind MOEI_CODE_HERE with the same two versions. */
#ifndef MOE_GEMM_VARIANT_CUH
#define MOE_GEMM_VARIANT_CUH

#include "../base/cuda.cuh"
#include "desc.h"
#include "shape.h"

typedef struct moei_variant {
    const void* kernel;
    const char* name;
    int32_t path;        /* moe_gemm_path */
    moe_gemm_shape shape;
    int32_t tile;        /* the client's number of the shape */
    int32_t blocks_sm;   /* blocks a multiprocessor, at most */
    uint32_t smem;       /* dynamic shared memory of a block, bytes; what grows with a product is
                            `more` of the functions below */
    int32_t least, most; /* versions of code (80 is sm_80) that have a body */
} moei_variant;

#define MOEI_VARIANT_END {0, 0, 0, MOEI_SHAPE_INIT(0, 0, 0, 1, 1, 0, 0, 0, 0), 0, 0, 0, 0, 0}

#define MOEI_CODE_ANY 9999   /* no upper bound */
#define MOEI_CODE_NEVER 9999 /* as the least one: no code has a body */

/* Does the code that is being compiled have a body for versions least .. most? */
#if MOE_ON_HOST || !defined(__CUDA_ARCH__)
#define MOEI_CODE_HERE(least, most) 1
#else
#define MOEI_CODE_HERE(least, most) (__CUDA_ARCH__ >= (least)*10 && __CUDA_ARCH__ < (most)*10 + 10)
#endif

/* Tells whether a block's shared memory fits and this binary holds a body of the kernel for the
   current device: code built for less than the device (no -arch, say) may lack it. The CPU runs all
   that any code has. */
MOE_HOST moe_status moei_variant_runs(const moei_variant* v, const moe_device* dev, size_t more,
                                      int* runs)
{
    size_t smem = v->smem + more;
    *runs = v->least != MOEI_CODE_NEVER;
#if !MOE_ON_HOST
    {
        cudaFuncAttributes fa;
        MOE_TRY_CUDA(cudaFuncGetAttributes(&fa, v->kernel));
        *runs = fa.ptxVersion >= v->least && fa.ptxVersion <= v->most;
        smem += fa.sharedSizeBytes;
    }
#endif
    *runs = *runs && smem <= (size_t)dev->smem_block;
    return MOE_OK;
}

/* The first entry with this tile, dtype and majors; null where the table has none. */
MOE_HOST const moei_variant* moei_variant_find(const moei_variant* table, int tile, int dtype,
                                               int a_major, int b_major)
{
    for (; table->kernel; ++table)
        if (table->tile == tile && table->shape.dtype == dtype &&
            table->shape.a_major == a_major && table->shape.b_major == b_major)
            return table;
    return 0;
}

/* Settles a launch of `blocks` blocks, which may start before the kernel ahead has ended: every kernel
   of a table calls moe_pdl_wait. */
MOE_HOST moe_status moei_variant_prepare(moe_launch* l, const moei_variant* v, int64_t blocks,
                                         size_t more)
{
    moe_launch_config c = moe_grid(blocks, v->shape.threads, v->smem + more, 0);
    c.dependent = 1;
    return moei_launch_prepare(l, v->kernel, v->name, &c);
}

/* Most tiles of persistent blocks: a tile number and the blocks of a launch do not overflow. */
#define MOEI_VARIANT_MAX_TILES (0x7fffffff - 65535)

/* What a launch of persistent blocks will run: as many as the device holds at one time, at most one
   for each of `tiles`. */
MOE_HOST moe_gemm_plan moei_variant_plan(const moei_variant* v, const moe_device* dev,
                                         int64_t tiles, size_t more)
{
    const size_t smem = v->smem + more;
    int64_t per_sm = (int64_t)((size_t)dev->smem_sm / (smem + 1024));
    moe_gemm_plan p;
    if (per_sm > v->blocks_sm) per_sm = v->blocks_sm;
    if (per_sm < 1) per_sm = 1;
    p.path = MOE_ON_HOST ? MOE_GEMM_PATH_HOST : v->path;
    p.tile = v->tile;
    p.tile_m = v->shape.tile_m;
    p.tile_n = v->shape.tile_n;
    p.tile_k = v->shape.tile_k;
    p.stages = v->shape.stages;
    p.threads = v->shape.threads;
    p.blocks = (int32_t)(tiles < per_sm * dev->sms ? tiles : per_sm * dev->sms);
    p.smem = smem;
    return p;
}

/* Loads all kernels of a table now. */
MOE_HOST moe_status moei_variant_preload(const moei_variant* table)
{
    for (; table->kernel; ++table) MOE_TRY(moe_preload_kernel(table->kernel));
    return MOE_OK;
}

#endif
