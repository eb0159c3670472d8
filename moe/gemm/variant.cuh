/* variant.cuh: a table of compiled tensor-core kernels, the variants. Host code chooses, launches
   and preloads variants of a table; moei_variant_runs tells which the current device can run. Used
   by prepare.cuh, k_grouped.cuh, router.cuh, router/ragged.cuh and block_sparse.cuh.

     static const moei_variant table[] = {
         {(const void*)my_kernel, "my_kernel", MOE_GEMM_PATH_WMMA, MOEI_VARIANT_ANY_ROWS, 1,
          MOEI_SHAPE_INIT(MOE_GEMM_SHAPE_64x64, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K),
          tile, blocks_sm, MOEI_RING_BYTES(1, MOE_GEMM_SHAPE_64x64), 80, MOEI_CODE_ANY},
         MOEI_VARIANT_END};

   The kernel's body is compiled under MOEI_CODE_HERE(least, most), the versions of its entry. */
#ifndef MOE_GEMM_VARIANT_CUH
#define MOE_GEMM_VARIANT_CUH

#include "../base/cuda.cuh"
#include "desc.h"
#include "shape.h"

/* The rows of A that a variant reads. */
typedef enum moei_variant_rows {
    MOEI_VARIANT_ANY_ROWS = 0,
    MOEI_VARIANT_IN_ORDER, /* row r is row r of A */
    MOEI_VARIANT_GATHERED  /* through row_index */
} moei_variant_rows;

/* One entry of a table; MOEI_VARIANT_END ends the table. */
typedef struct moei_variant {
    const void* kernel;  /* null: end of the table */
    const char* name;    /* of the kernel */
    int32_t path;        /* moe_gemm_path */
    int32_t rows;        /* moei_variant_rows */
    int32_t cluster;     /* thread blocks of a cluster; 1: none */
    moe_gemm_shape shape;
    int32_t tile;        /* number of the shape in the table's own numbering */
    int32_t blocks_sm;   /* most thread blocks of a multiprocessor */
    uint32_t smem;       /* dynamic shared memory of a block, bytes. `more` of the functions below
                            adds the bytes that depend on the product */
    int32_t least, most; /* the code of these versions (80 is sm_80) has a body */
} moei_variant;

#define MOEI_VARIANT_END                                                                           \
    {                                                                                              \
        0, 0, 0, 0, 1, MOEI_SHAPE_INIT(0, 0, 0, 1, 1, 0, 0, 0, 0), 0, 0, 0, 0, 0                   \
    }

#define MOEI_CODE_ANY 9999   /* as `most`: no upper bound */
#define MOEI_CODE_NEVER 9999 /* as `least`: no code has a body */

/* 1 where the code being compiled is of versions least .. most, and in all host passes. */
#if MOE_ON_HOST || !defined(__CUDA_ARCH__)
#define MOEI_CODE_HERE(least, most) 1
#else
#define MOEI_CODE_HERE(least, most) (__CUDA_ARCH__ >= (least)*10 && __CUDA_ARCH__ < (most)*10 + 10)
#endif

/* Sets *runs to 1 where the current device runs the variant, else to 0. The variant runs where a
   block's shared memory fits and this binary has a body of the kernel for the device. A binary
   built for an older architecture (without -arch, for example) may lack the body. The CPU backend
   runs every variant that has a body in any version. */
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
        /* only bodies of sm_90a have static shared memory on this path; sm_90 has the same version */
        if (v->path == MOE_GEMM_PATH_WGMMA) *runs = *runs && fa.sharedSizeBytes >= 512;
        smem += fa.sharedSizeBytes;
    }
#endif
    *runs = *runs && smem <= (size_t)dev->smem_block;
    return MOE_OK;
}

/* Returns the first entry with this tile, dtype and majors; null where the table has none. */
MOE_HOST const moei_variant* moei_variant_find(const moei_variant* table, int tile, int dtype,
                                               int a_major, int b_major)
{
    for (; table->kernel; ++table)
        if (table->tile == tile && table->shape.dtype == dtype &&
            table->shape.a_major == a_major && table->shape.b_major == b_major)
            return table;
    return 0;
}

/* Prepares a programmatic dependent launch of `blocks` thread blocks. Requires that every kernel of
   a table calls moe_pdl_wait: its blocks may start before the previous kernel has ended. */
MOE_HOST moe_status moei_variant_prepare(moe_launch* l, const moei_variant* v, int64_t blocks,
                                         size_t more)
{
    moe_launch_config c = moe_grid(blocks, v->shape.threads, v->smem + more, 0);
    c.dependent = 1;
    c.cluster = v->cluster;
    return moei_launch_prepare(l, v->kernel, v->name, &c);
}

/* Most tiles of persistent blocks: a tile number plus the grid size does not overflow int32_t. */
#define MOEI_VARIANT_MAX_TILES (0x7fffffff - 65535)

/* Returns the plan of a launch of persistent blocks. The grid has as many blocks as the device holds
   at one time by shared memory, in whole clusters, but at most one for each of `tiles`, and at most
   `limit` where that is not 0. Requires that a cluster is within the limit. */
MOE_HOST moe_gemm_plan moei_variant_plan(const moei_variant* v, const moe_device* dev,
                                         int64_t tiles, size_t more, int limit)
{
    const size_t smem = v->smem + more;
    int64_t per_sm = (int64_t)((size_t)dev->smem_sm / (smem + 1024));
    moe_gemm_plan p;
    if (per_sm > v->blocks_sm) per_sm = v->blocks_sm;
    if (per_sm < 1) per_sm = 1;
    p.path = v->path;
    p.tile = v->tile;
    p.tile_m = v->shape.tile_m;
    p.tile_n = v->shape.tile_n;
    p.tile_k = v->shape.tile_k;
    p.stages = v->shape.stages;
    p.threads = v->shape.threads;
    p.blocks = (int32_t)(tiles < per_sm * dev->sms ? tiles : per_sm * dev->sms);
    if (limit && p.blocks > limit) p.blocks = limit;
    p.blocks = p.blocks < v->cluster ? v->cluster : p.blocks - p.blocks % v->cluster;
    p.smem = smem;
    return p;
}

/* Loads all kernels of a table, before their first launch. */
MOE_HOST moe_status moei_variant_preload(const moei_variant* table)
{
    for (; table->kernel; ++table) MOE_TRY(moe_preload_kernel(table->kernel));
    return MOE_OK;
}

#endif
