/* multiply.cuh: the steps of a block-sparse tile, for tile.cuh.

   gemm/mainloop.cuh has the parts of a step; load.cuh fills the ring. One warp in turn makes the
   slices of depth that the next steps copy (address.cuh). */
#ifndef MOE_BLOCK_SPARSE_MULTIPLY_CUH
#define MOE_BLOCK_SPARSE_MULTIPLY_CUH

#include "load.cuh"

/* Returns true where the tile must be predicated: products, rows or depths are skipped, or slices
   are cut off. Called by the whole thread block, whose threads get one answer. Whole slices past
   the edges of X and Y need no predicates: along k they are zero in both, else they are not
   stored. */
MOE_DEVICE bool moei_sparse_needs_predicates(const moei_sparse_args* d,
                                             const moei_sparse_position* t,
                                             const moei_sparse_shared* s)
{
    const int j = (int)threadIdx.x;
    const uint32_t rows = (1u << (t->rows + 15) / 16) - 1;
    if ((t->rows | t->columns | d->k) % 16 != 0 || s->rows != rows) return true;
    if (moei_sparse_depths_of(d, t)) return true;
    if (d->sparse_c)
        return __syncthreads_or(j < 16 && j * 16 < t->columns && (~s->have[j] & rows) != 0) != 0;
    return d->partial && d->partial[t->strip] != 0;
}

/* ---- the loader of tiles whose slices are whole, for steps.inl ---- */

/* Advances the copies. `tiles` is not read: steps.inl calls this function where tiles is not null.
   The loader's own address is passed, which the compiler knows not to be null. */
MOE_DEVICE void moei_sparse_copies_advance(moei_sparse_copies* o, const moei_sparse_args* d,
                                           const moei_sparse_copies* tiles, int step,
                                           const moe_gemm_shape f)
{
    (void)tiles;
    moei_sparse_advance(o, d, step, 0, f);
}

/* Copies a part of a step. */
MOE_DEVICE void moei_sparse_copies_copy(moei_sparse_copies* o, const moei_sparse_args* d,
                                        uint16_t* sx, uint16_t* sy, const int part, const int parts,
                                        const moe_gemm_shape f)
{
    (void)d;
    moei_sparse_fill(o, sx, sy, part, parts, 0, f);
}

#define MOEI_LOADER moei_sparse_copies
#define MOEI_LOADER_ARGS moei_sparse_args
#define MOEI_LOADER_TILES const moei_sparse_copies
#define MOEI_TILE_START moei_sparse_start
#define MOEI_TILE_STEPS moei_sparse_steps
#include "../gemm/steps.inl"
#undef MOEI_LOADER
#undef MOEI_LOADER_ARGS
#undef MOEI_LOADER_TILES
#undef MOEI_TILE_START
#undef MOEI_TILE_STEPS

/* Multiplies all steps of a tile whose slices are whole. Called by the whole thread block. The
   shape's majors are literals: the loop's instructions other than loads and products are much of
   its distance from the tensor cores' rate. */
MOE_DEVICE void moei_sparse_multiply(const moei_sparse_args* d, moei_sparse_shared* s,
                                     uint16_t* stages, moei_mma_c acc[4][4], int steps,
                                     const moe_gemm_shape f)
{
    moei_sparse_copies o = moei_sparse_copies_begin(d, s, f);
    moei_ring r = moei_ring_of(stages, f);
    moei_sparse_start(&o, &r, d, &o, f);
    moei_sparse_steps(acc, &o, &r, d, &o, steps, f);
}

/* Multiplies all steps of a predicated tile: at an edge, of joined block rows that differ, or
   with excluded depths. Called by the whole thread block. Compact rather than fast: the majors
   are no literals.
     1. Collect the bits of the warp's fragments of C that are computed.
     2. For each step: wait until its stage has arrived for every warp (barrier; behind it the stage
        multiplied before may be refilled), then queue the copies of step + stages - 1.
     3. Multiply the step's slices; skip slices and fragments that no sparse block needs. */
MOE_DEVICE void moei_sparse_multiply_predicated(const moei_sparse_args* d, moei_sparse_shared* s,
                                                uint16_t* stages, moei_mma_c acc[4][4], int steps,
                                                const moe_gemm_shape f)
{
    const int slices = f.tile_k / 16;
    const int warp_m = moe_warp() % f.warps_m, warp_n = moe_warp() / f.warps_m;
    moei_sparse_copies o = moei_sparse_copies_begin(d, s, f);
    moei_ring r = moei_ring_of(stages, f);
    uint32_t have = 0; /* bit j * 4 + i: the warp's fragment (i, j) of C is computed */
    moei_mma_a a[4];
    moei_mma_b b[4];

    /* 1. fragments */
    MOE_UNROLL
    for (int j = 0; j < f.wn / 16; ++j)
        have |= (s->have[warp_n * (f.wn / 16) + j] >> warp_m * (f.wm / 16) &
                 ((1u << (f.wm / 16)) - 1))
                << j * 4;
    for (int step = 1 - f.stages; step < steps; ++step) {
        /* 2. copies */
        uint16_t* refill;
        if (step >= 0) {
            moei_copy_wait(f.stages - 2);
            __syncthreads();
        }
        moei_sparse_advance(&o, d, step, 1, f);
        refill = step < 0 ? stages + (step + f.stages - 1) * r.elems : moei_ring_refill(&r, f);
        moei_sparse_fill(&o, refill, refill + f.tile_m * f.tile_k, 0, 1, 1, f);
        moei_copy_commit();
        if (step < 0) continue;
        /* 3. products */
        MOE_NO_UNROLL
        for (int c = 0; c < slices; ++c) {
            const int number = (step * slices + c) % (2 * MOE_WARP_SIZE);
            const uint32_t rows = s->slice_x[number].rows >> warp_m * (f.wm / 16);
            const uint32_t live = have & (rows & ((1u << (f.wm / 16)) - 1)) * 0x1111u;
            if (live == 0) continue;
            moei_ring_load_a(a, &r, r.stage, c * 16, f);
            moei_ring_load_b(b, &r, r.stage, c * 16, 0, f);
            MOE_UNROLL
            for (int i = 0; i < f.wm / 16; ++i) {
                MOE_UNROLL
                for (int j = 0; j < f.wn / 16; ++j)
                    moei_mma_if(&acc[i][j], &a[i], &b[j], f.dtype,
                                (int)(live & (1u << (j * 4 + i))));
            }
        }
        r.stage = moei_ring_next(&r, f);
    }
}

#endif
