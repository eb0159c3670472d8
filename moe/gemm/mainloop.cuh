/* mainloop.cuh: what the steps of every tensor-core tile are made of: shared memory to registers to
   mma.sync.

   A ring of stages, A and then B's terms each, lines swizzled (swizzle.h):

     A  MOE_MAJOR_K [tile_m][tile_k], MOE_MAJOR_MN [tile_k][tile_m]   16-bit elements
     B  MOE_MAJOR_K [tile_n][tile_k], MOE_MAJOR_MN [tile_k][tile_n]   terms of them, one after another

   A loader fills stages, stages - 1 steps ahead; warps, wm x wn of the tile each, multiply what has
   arrived. A step is tile_k / 16 slices of depth, each times terms, the last term first: small numbers
   are added where sums are small. Before a slice's products the fragments of the next slice are
   loaded. Before all slices' but the last a part of the copies goes out. One barrier a step, before
   the last slice's products: behind it the next stage has arrived for every warp, and the stage
   multiplied before may be refilled. */
#ifndef MOE_GEMM_MAINLOOP_CUH
#define MOE_GEMM_MAINLOOP_CUH

#include "../base/copy.cuh"
#include "mma.cuh"
#include "shape.h"

/* Where a warp stands in the ring. */
typedef struct moei_ring {
    uint16_t* stages;
    int elems;          /* of a stage */
    int stage;          /* stage to multiply next */
    int lane_a, lane_b; /* moei_mma_lane_a, moei_mma_lane_b */
} moei_ring;

/* The warp's number. On all but sm_90 it is read anew each time: a kernel with loops for several majors would
   otherwise compute the lanes' places of all of them first, and spill. */
MOE_DEVICE int moei_ring_warp(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 10 != 90
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return (int)(thread / MOE_WARP_SIZE);
#else
    return moe_warp();
#endif
}

MOE_DEVICE moei_ring moei_ring_of(uint16_t* stages, const moe_gemm_shape f)
{
    const int warp = moei_ring_warp(), warp_m = warp % f.warps_m, warp_n = warp / f.warps_m;
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

MOE_DEVICE int moei_ring_next(const moei_ring* r, const moe_gemm_shape f)
{
    return r->stage + 1 == f.stages ? 0 : r->stage + 1;
}

/* The stage to refill: the one multiplied before. */
MOE_DEVICE uint16_t* moei_ring_refill(const moei_ring* r, const moe_gemm_shape f)
{
    return r->stages + (r->stage == 0 ? f.stages - 1 : r->stage - 1) * r->elems;
}

/* Loads the fragments of A that a warp multiplies at depth k of stage `stage`. */
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

/* The same of a term of B. */
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

/* Fragments of this slice and the next. */
typedef struct moei_ring_fragments {
    moei_mma_a a[2][4]; /* of depth number d at d % 2 */
    moei_mma_b b[2][4]; /* of slice number c at c % 2 */
} moei_ring_fragments;

/* Chunks of a step. tile_k / 16 is even, or fragments would take the places of those in use. */
MOE_HOST_DEVICE int moei_ring_slices(const moe_gemm_shape f) { return f.tile_k / 16 * f.terms; }

/* Loads what slice c of stage `stage` multiplies and the slice before did not; c is a literal. */
MOE_DEVICE void moei_ring_load(moei_ring_fragments* g, const moei_ring* r, int stage, const int c,
                               const moe_gemm_shape f)
{
    const int depth = c / f.terms;
    if (c % f.terms == 0) moei_ring_load_a(g->a[depth & 1], r, stage, depth * 16, f);
    moei_ring_load_b(g->b[c & 1], r, stage, depth * 16, f.terms - 1 - c % f.terms, f);
}

/* Before the products of slice c of a step: at the last slice waits until the next stage has arrived
   for every warp, all threads of the block; then loads the fragments that come after the slice's. */
MOE_DEVICE void moei_ring_advance(moei_ring_fragments* g, const moei_ring* r, const int c,
                                  const moe_gemm_shape f)
{
    const int last = c == moei_ring_slices(f) - 1;
    if (last) {
        moei_copy_wait(f.stages - 2);
        __syncthreads();
    }
    moei_ring_load(g, r, last ? moei_ring_next(r, f) : r->stage, last ? 0 : c + 1, f);
}

MOE_DEVICE void moei_tile_zero(moei_mma_c acc[4][4], const moe_gemm_shape f)
{
    MOE_UNROLL
    for (int i = 0; i < f.wm / 16; ++i) MOE_UNROLL
    for (int j = 0; j < f.wn / 16; ++j) moei_mma_zero(&acc[i][j]);
}

/* Adds the products of the fragments to a warp's accumulators. */
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
