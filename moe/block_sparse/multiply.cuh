/* multiply.cuh: the steps of a block-sparse tile.

   gemm/mainloop.cuh has what a step is made of; load.cuh fills the ring, and one warp in turn makes
   the chunks of depth that the next steps copy (where.cuh). */
#ifndef MOE_BLOCK_SPARSE_MULTIPLY_CUH
#define MOE_BLOCK_SPARSE_MULTIPLY_CUH

#include "load.cuh"

/* Must some products of the tile be left out, some rows or depths not be read, or chunks be cut off? All
   threads of the block get one answer. Whole chunks past the edges of X and Y are not asked for:
   along the depth they are zero in both, else not stored. */
MOE_DEVICE bool moei_block_careful(const moei_block_args* d, const moei_block_where* t,
                                   const moei_block_shared* s)
{
    const int j = (int)threadIdx.x;
    const uint32_t rows = (1u << (t->rows + 15) / 16) - 1;
    if ((t->rows | t->columns | d->k) % 16 != 0 || s->rows != rows) return true;
    if (moei_block_depths_of(d, t)) return true;
    if (d->sparse_c)
        return __syncthreads_or(j < 16 && j * 16 < t->columns && (~s->have[j] & rows) != 0) != 0;
    return d->partial && d->partial[t->strip] != 0;
}

/* Multiplies all steps of a tile whose chunks are whole. The shape's majors are literals here: what
   the loop does beside loads and products is much of what keeps it from the tensor cores' rate. */
MOE_DEVICE void moei_block_multiply(const moei_block_args* d, moei_block_shared* s, uint16_t* stages,
                                    moei_mma_c acc[4][4], int steps, const moe_gemm_shape f)
{
    const int chunks = f.tk / 16, half = MOEI_WARP / chunks; /* of a step; steps */
    moei_block_copies o = moei_block_copies_begin(d, s, f);
    moei_ring r = moei_ring_of(stages, f);
    moei_mma_a a[2][4];
    moei_mma_b b[2][4];

    MOEI_NO_UNROLL
    for (int i = 0; i < f.stages - 1; ++i)
        moei_block_fill(&o, s, i, stages + i * r.elems, 0, 1, 0, f);
    moei_copy_wait(f.stages - 2);
    __syncthreads();
    moei_ring_fragments(a[0], b[0], &r, 0, 0, f);
    for (int step = 0; step < steps; ++step) {
        uint16_t* refill = moei_ring_refill(&r, f);
        /* each half of the chunks made is used up in turn: a warp makes the next */
        if (step % half == 0 && step > 0 && moei_warp() == step / half % (f.threads / MOEI_WARP))
            moei_block_chunks(d, &s->tile, s, (step / half + 1) * MOEI_WARP, 0, f.tm);
        /* no branch from here on: one run of products, with all else that is to do among them */
        MOEI_UNROLL
        for (int c = 0; c < chunks; ++c) {
            moei_ring_advance(a[!(c & 1)], b[!(c & 1)], &r, c, f);
            if (c < chunks - 1)
                moei_block_fill(&o, s, step + f.stages - 1, refill, c, chunks - 1, 0, f);
            moei_tile_products(acc, a[c & 1], b[c & 1], f);
        }
        r.slot = moei_ring_next(&r, f);
    }
}

/* The same of a tile at an edge, of strips joined that have not the same blocks, or with depths that
   do not count: chunks may be cut off, rows or depths not read, products left out. Compact rather
   than quick: the majors are no literals. */
MOE_DEVICE void moei_block_multiply_careful(const moei_block_args* d, moei_block_shared* s,
                                            uint16_t* stages, moei_mma_c acc[4][4], int steps,
                                            const moe_gemm_shape f)
{
    const int chunks = f.tk / 16, half = MOEI_WARP / chunks;
    const int warp_m = moei_warp() % f.warps_m, warp_n = moei_warp() / f.warps_m;
    moei_block_copies o = moei_block_copies_begin(d, s, f);
    moei_ring r = moei_ring_of(stages, f);
    uint32_t have = 0; /* bit j * 4 + i: the warp's piece (i, j) of C is wanted */
    moei_mma_a a[4];
    moei_mma_b b[4];

    MOEI_UNROLL
    for (int j = 0; j < f.wn / 16; ++j)
        have |= (s->have[warp_n * (f.wn / 16) + j] >> warp_m * (f.wm / 16) &
                 ((1u << (f.wm / 16)) - 1))
                << j * 4;
    for (int step = 1 - f.stages; step < steps; ++step) {
        if (step >= 0) {
            moei_copy_wait(f.stages - 2);
            __syncthreads();
            if (step % half == 0 && step > 0 &&
                moei_warp() == step / half % (f.threads / MOEI_WARP))
                moei_block_chunks(d, &s->tile, s, (step / half + 1) * MOEI_WARP, 1, f.tm);
        }
        moei_block_fill(&o, s, step + f.stages - 1,
                        step < 0 ? stages + (step + f.stages - 1) * r.elems
                                 : moei_ring_refill(&r, f),
                        0, 1, 1, f);
        if (step < 0) continue;
        MOEI_NO_UNROLL
        for (int c = 0; c < chunks; ++c) {
            const int number = (step * chunks + c) % (2 * MOEI_WARP);
            const uint32_t rows = s->chunk_x[number].rows >> warp_m * (f.wm / 16);
            const uint32_t live = have & (rows & ((1u << (f.wm / 16)) - 1)) * 0x1111u;
            if (live == 0) continue;
            moei_ring_fragments(a, b, &r, r.slot, c * 16, f);
            MOEI_UNROLL
            for (int i = 0; i < f.wm / 16; ++i) {
                MOEI_UNROLL
                for (int j = 0; j < f.wn / 16; ++j)
                    moei_mma_if(&acc[i][j], &a[i], &b[j], f.dtype,
                                (int)(live & (1u << (j * 4 + i))));
            }
        }
        r.slot = moei_ring_next(&r, f);
    }
}

#endif
