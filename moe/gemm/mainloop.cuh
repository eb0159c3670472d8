/* mainloop.cuh: the parts of a step of every tensor-core tile: shared memory to registers to
   mma.sync. steps.inl joins them into the pipeline; block_sparse/ and router/ use them too.

   A ring of stages; each stage holds A, then the terms of B. Lines are swizzled (swizzle.h):

     A  MOE_MAJOR_K [tile_m][tile_k], MOE_MAJOR_MN [tile_k][tile_m]   16-bit elements
     B  MOE_MAJOR_K [tile_n][tile_k], MOE_MAJOR_MN [tile_k][tile_n]   one such matrix a term

   A loader fills the stages, stages - 1 steps ahead. Each warp multiplies its warp tile, wm x wn,
   from the stage that has arrived. A step has tile_k / 16 slices of depth. Each slice has one
   product a term, the last term first: small numbers are added where sums are small.

   For each product: load the fragments of the next product, start a part of the copies (not at the
   last product), multiply. Each step has one barrier, before its last product. After the barrier
   the next stage has arrived for every warp. The stage of this step may be refilled: the warps have
   its last fragments in registers. */
#ifndef MOE_GEMM_MAINLOOP_CUH
#define MOE_GEMM_MAINLOOP_CUH

#include "../base/copy.cuh"
#include "mma.cuh"
#include "shape.h"

/* A warp's position in the ring. */
typedef struct moei_ring {
    uint16_t* stages;   /* [stages][elems] in shared memory */
    int elems;          /* 16-bit elements of a stage */
    int stage;          /* stage to multiply next, 0 .. stages - 1 */
    int lane_a, lane_b; /* moei_mma_lane_a, moei_mma_lane_b of the warp's rows and columns */
} moei_ring;

/* Returns the thread's number. On all targets but sm_90 the asm volatile reads %tid.x anew at each
   call. Otherwise what follows from the number, such as lane_a and lane_b of all majors in a kernel
   with loops for several, would take registers all the time, and spill. */
MOE_DEVICE int moei_ring_thread(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 10 != 90
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return (int)(thread & 1023); /* not negative, to the compiler */
#else
    return (int)threadIdx.x;
#endif
}

/* Returns the calling warp's position at the beginning of a ring. */
MOE_DEVICE moei_ring moei_ring_of(uint16_t* stages, const moe_gemm_shape f)
{
    const int warp = moei_ring_thread() / MOE_WARP_SIZE, warp_m = warp % f.warps_m,
              warp_n = warp / f.warps_m;
    moei_ring r;
    r.stages = stages;
    r.elems = moei_stage_elems(f);
    r.stage = 0;
    r.lane_a =
        moei_mma_lane_a(warp_m * f.wm, f.a_major == MOE_MAJOR_K ? f.tile_k : f.tile_m, f.a_major);
    r.lane_b =
        moei_mma_lane_b(warp_n * f.wn, f.b_major == MOE_MAJOR_K ? f.tile_k : f.tile_n, f.b_major);
    return r;
}

/* Returns the number of the stage after r->stage. */
MOE_DEVICE int moei_ring_next(const moei_ring* r, const moe_gemm_shape f)
{
    return r->stage + 1 == f.stages ? 0 : r->stage + 1;
}

/* Returns the address of the stage to refill: the stage of the step before. */
MOE_DEVICE uint16_t* moei_ring_refill(const moei_ring* r, const moe_gemm_shape f)
{
    return r->stages + (r->stage == 0 ? f.stages - 1 : r->stage - 1) * r->elems;
}

/* Loads a warp's wm / 16 fragments of A at depths k .. k + 15 of stage `stage`. */
MOE_DEVICE void moei_ring_load_a(moei_mma_a* a, const moei_ring* r, int stage, int k,
                                 const moe_gemm_shape f)
{
    const uint16_t* s = r->stages + stage * r->elems;
    if (f.a_major == MOE_MAJOR_K) {
        MOE_UNROLL
        for (int i = 0; i < f.wm / 16; ++i)
            moei_mma_load_a(&a[i], s, r->lane_a, i * 16, k, f.tile_k, f.dtype, MOE_MAJOR_K);
    } else {
        MOE_UNROLL
        for (int i = 0; i < f.wm / 16; ++i)
            moei_mma_load_a(&a[i], s, r->lane_a, i * 16, k, f.tile_m, f.dtype, MOE_MAJOR_MN);
    }
}

/* Loads a warp's wn / 16 fragments of term `term` of B at depths k .. k + 15 of stage `stage`. */
MOE_DEVICE void moei_ring_load_b(moei_mma_b* b, const moei_ring* r, int stage, int k, int term,
                                 const moe_gemm_shape f)
{
    const uint16_t* s = r->stages + stage * r->elems + (f.tile_m + term * f.tile_n) * f.tile_k;
    if (f.b_major == MOE_MAJOR_K) {
        MOE_UNROLL
        for (int j = 0; j < f.wn / 16; ++j)
            moei_mma_load_b(&b[j], s, r->lane_b, j * 16, k, f.tile_k, f.dtype, MOE_MAJOR_K);
    } else {
        MOE_UNROLL
        for (int j = 0; j < f.wn / 16; ++j)
            moei_mma_load_b(&b[j], s, r->lane_b, j * 16, k, f.tile_n, f.dtype, MOE_MAJOR_MN);
    }
}

/* A warp's fragments of this product and the next, double-buffered. */
typedef struct moei_ring_fragments {
    moei_mma_a a[2][4]; /* of product c in a[c / terms % 2]: all terms share A */
    moei_mma_b b[2][4]; /* of product c in b[c % 2] */
} moei_ring_fragments;

/* Returns the products of a step: slices times terms. Requires that tile_k / 16 is even:
   otherwise the first fragments of a step would overwrite fragments in use. */
MOE_HOST_DEVICE int moei_ring_products(const moe_gemm_shape f) { return f.tile_k / 16 * f.terms; }

/* Loads the fragments of product c of stage `stage`; those of A only at the first term. c is a
   literal. */
MOE_DEVICE void moei_ring_load(moei_ring_fragments* g, const moei_ring* r, int stage, const int c,
                               const moe_gemm_shape f)
{
    const int slice = c / f.terms;
    if (c % f.terms == 0) moei_ring_load_a(g->a[slice & 1], r, stage, slice * 16, f);
    moei_ring_load_b(g->b[c & 1], r, stage, slice * 16, f.terms - 1 - c % f.terms, f);
}

/* Loads the fragments of the next product. Called before product c of a step. At the last product
   all threads of the block call moei_ring_advance: the barrier first waits until the next stage has
   arrived for every warp. */
MOE_DEVICE void moei_ring_advance(moei_ring_fragments* g, const moei_ring* r, const int c,
                                  const moe_gemm_shape f)
{
    const int last = c == moei_ring_products(f) - 1;
    if (last) {
        moei_copy_wait(f.stages - 2);
        __syncthreads();
    }
    moei_ring_load(g, r, last ? moei_ring_next(r, f) : r->stage, last ? 0 : c + 1, f);
}

/* Sets a warp's accumulators to 0. */
MOE_DEVICE void moei_tile_zero(moei_mma_c acc[4][4], const moe_gemm_shape f)
{
    MOE_UNROLL
    for (int i = 0; i < f.wm / 16; ++i) MOE_UNROLL
    for (int j = 0; j < f.wn / 16; ++j) moei_mma_zero(&acc[i][j]);
}

/* Adds one product: the fragments of a slice and of one term, to a warp's accumulators. */
MOE_DEVICE void moei_tile_products(moei_mma_c acc[4][4], const moei_mma_a* a, const moei_mma_b* b,
                                   const moe_gemm_shape f)
{
    MOE_UNROLL
    for (int i = 0; i < f.wm / 16; ++i) {
        MOE_UNROLL
        for (int j = 0; j < f.wn / 16; ++j) moei_mma(&acc[i][j], &a[i], &b[j], f.dtype);
    }
}

#endif
