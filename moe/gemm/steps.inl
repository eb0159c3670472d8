/* steps.inl: the steps of a tile whose loader is `name`; who includes it defines

     MOEI_LOADER          name, a type: what a thread copies next
     MOEI_LOADER_ARGS     what its products are described by
     MOEI_LOADER_TILES    what tells the block's next tiles
     name_copy            copies part `part` of `parts` of a step
     name_advance         before a step is copied, with tiles alone: what the copies need first, such as
                          the next tile's rows, if the current tile is copied; `step` of the tile is
                          multiplied meanwhile, before the first a negative one

   and names the two functions made here, MOEI_TILE_START and MOEI_TILE_STEPS. */

/* Fills the first stages - 1 stages of the ring, with tiles (or null) on into the block's next
   ones, and waits until the first has arrived for every warp. All threads of the block. */
MOE_DEVICE void MOEI_TILE_START(MOEI_LOADER* load, const moei_ring* r, const MOEI_LOADER_ARGS* d,
                                MOEI_LOADER_TILES* tiles, const moe_gemm_shape f)
{
    MOE_NO_UNROLL
    for (int i = 0; i < f.stages - 1; ++i) {
        uint16_t* stage = r->stages + i * r->elems;
        if (tiles) MOEI_JOIN(MOEI_LOADER, _advance)(load, d, tiles, i - (f.stages - 1), f);
        MOEI_JOIN(MOEI_LOADER, _copy)(load, d, stage, stage + f.tile_m * f.tile_k, 0, 1, f);
        moei_copy_commit();
    }
    moei_copy_wait(f.stages - 2);
    __syncthreads();
}

/* Multiplies `steps` steps of one tile, from the ring's stage on, which has arrived for every warp.
   Copies go on meanwhile: with tiles into the block's next ones, without (null) past the end of the
   depth, where they read nothing. On return the next stage has arrived for every warp. */
MOE_DEVICE void MOEI_TILE_STEPS(moei_mma_c acc[4][4], MOEI_LOADER* load, moei_ring* r,
                                const MOEI_LOADER_ARGS* d, MOEI_LOADER_TILES* tiles,
                                int steps, const moe_gemm_shape f)
{
    const int slices = moei_ring_slices(f);
    moei_ring_fragments g;
    moei_ring_load(&g, r, r->stage, 0, f);
    for (int i = 0; i < steps; ++i) {
        uint16_t* refill = moei_ring_refill(r, f);
        if (tiles) MOEI_JOIN(MOEI_LOADER, _advance)(load, d, tiles, i, f);
        MOE_UNROLL
        for (int c = 0; c < slices; ++c) {
            moei_ring_advance(&g, r, c, f);
            if (c < slices - 1) MOEI_JOIN(MOEI_LOADER, _copy)
            (load, d, refill, refill + f.tile_m * f.tile_k, c, slices - 1, f);
            if (c == slices - 2) moei_copy_commit();
            moei_tile_products(acc, g.a[c / f.terms & 1], g.b[c & 1], f);
        }
        r->stage = moei_ring_next(r, f);
    }
}
