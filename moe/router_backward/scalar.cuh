/* scalar.cuh: the router's backward products in fp32 multiply-adds, for any dtypes and shapes. Called
   by router_backward.cuh.

     C[i, j] = sum over s of A[i, s] B[s, j]       a step of s where A is 0 adds nothing */
#ifndef MOE_ROUTER_BACKWARD_SCALAR_CUH
#define MOE_ROUTER_BACKWARD_SCALAR_CUH

#include "../base/cuda.cuh"
#include "../base/fault.cuh"
#include "../base/numeric.cuh"

typedef struct moei_router_product_args {
    const float* a;         /* element (i, s) at i * a_row + s * a_depth */
    const void* b;          /* [k, n] b_dtype */
    void* c;                /* [m, n] c_dtype */
    uint64_t* fault;        /* [1] fault word; or null */
    int64_t a_row, a_depth; /* elements */
    int64_t b_stride, c_stride;
    int32_t m, n, k;
    int32_t b_dtype, c_dtype; /* moe_dtype */
    int32_t accumulate;       /* 1: adds to C */
} moei_router_product_args;

#define MOEI_ROUTER_PRODUCT_TILE 64
#define MOEI_ROUTER_PRODUCT_STEP 16 /* depths that are summed by themselves */

/* The padding avoids bank conflicts. */
typedef struct moei_router_product_shared {
    float a[MOEI_ROUTER_PRODUCT_STEP][MOEI_ROUTER_PRODUCT_TILE + 1]; /* 0 past the edges */
    float b[MOEI_ROUTER_PRODUCT_STEP][MOEI_ROUTER_PRODUCT_TILE + 1];
} moei_router_product_shared;

/* Loads 16 depths from s0 on of both operands. A barrier must follow. */
MOE_DEVICE void moei_router_product_load(const moei_router_product_args* d,
                                         moei_router_product_shared* s, int64_t i0, int64_t j0,
                                         int s0)
{
    const int tile = MOEI_ROUTER_PRODUCT_TILE;
    for (int x = (int)threadIdx.x; x < tile * MOEI_ROUTER_PRODUCT_STEP; x += 256) {
        const int r = x % tile, u = x / tile, depth = s0 + u;
        const bool in = depth < d->k;
        s->a[u][r] = in && i0 + r < d->m ? d->a[(i0 + r) * d->a_row + depth * d->a_depth] : 0.0f;
        s->b[u][r] = in && j0 + r < d->n
                         ? moe_load_f32(d->b, depth * d->b_stride + j0 + r, d->b_dtype)
                         : 0.0f;
    }
}

/* A block computes 64 x 64 elements; a thread owns 4 x 4, 16 rows and 16 columns apart. For each 16
   depths:
     1. Load both operands to shared memory. Barriers before and after.
     2. Multiply and add, ascending; add the sum of these depths to the thread's.
     3. At the end store. */
MOE_KERNEL(256, 2) moei_router_product(MOE_ARG(moei_router_product_args) d)
{
    MOE_SHARED(moei_router_product_shared, s);
    const int64_t columns = (d.n + MOEI_ROUTER_PRODUCT_TILE - 1) / MOEI_ROUTER_PRODUCT_TILE;
    const int64_t i0 = blockIdx.x / columns * MOEI_ROUTER_PRODUCT_TILE;
    const int64_t j0 = blockIdx.x % columns * MOEI_ROUTER_PRODUCT_TILE;
    const int tx = (int)threadIdx.x % 16, ty = (int)threadIdx.x / 16;
    float acc[4][4];

    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault)) return;
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) MOE_UNROLL
    for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
    for (int s0 = 0; s0 < d.k; s0 += MOEI_ROUTER_PRODUCT_STEP) {
        float part[4][4];
        __syncthreads(); /* 1. */
        moei_router_product_load(&d, &s, i0, j0, s0);
        __syncthreads();
        MOE_UNROLL
        for (int i = 0; i < 4; ++i) MOE_UNROLL
        for (int j = 0; j < 4; ++j) part[i][j] = 0.0f;
        MOE_UNROLL /* 2. */
        for (int u = 0; u < MOEI_ROUTER_PRODUCT_STEP; ++u) {
            MOE_UNROLL
            for (int i = 0; i < 4; ++i) MOE_UNROLL
            for (int j = 0; j < 4; ++j) {
                const float a = s.a[u][ty + 16 * i];
                part[i][j] = fmaf(a, a == 0.0f ? 0.0f : s.b[u][tx + 16 * j], part[i][j]);
            }
        }
        MOE_UNROLL
        for (int i = 0; i < 4; ++i) MOE_UNROLL
        for (int j = 0; j < 4; ++j) acc[i][j] += part[i][j];
    }
    MOE_UNROLL /* 3. */
    for (int i = 0; i < 4; ++i) MOE_UNROLL
    for (int j = 0; j < 4; ++j) {
        const int64_t row = i0 + ty + 16 * i, column = j0 + tx + 16 * j;
        const int64_t at = row * d.c_stride + column;
        if (row < d.m && column < d.n) {
            const float was = d.accumulate ? moe_load_f32(d.c, at, d.c_dtype) : 0.0f;
            moe_store_f32(d.c, at, d.c_dtype, acc[i][j] + was);
        }
    }
}

/* Prepares the launch. */
MOE_HOST moe_status moei_router_product_prepare(const moei_router_product_args* a, moe_launch* l)
{
    const int64_t tile = MOEI_ROUTER_PRODUCT_TILE;
    moe_launch_config c =
        moe_grid((a->m + tile - 1) / tile * ((a->n + tile - 1) / tile), 256, 0, 0);
    c.dependent = 1;
    if (a->m == 0) return MOE_OK;
    return MOE_PREPARE(l, moei_router_product, c);
}

#endif
