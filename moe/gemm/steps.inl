/* steps.inl: the pipeline over the steps of a tile, for one loader (mainloop.cuh says how a step
   goes). tile.cuh, k_tile.cuh, router/large.cuh and block_sparse/multiply.cuh each include it once.
   Before the #include a file defines

     MOEI_LOADER          `name`, the type of the loader: what a thread copies next
     MOEI_LOADER_ARGS     the type of the kernel's args
     MOEI_LOADER_TILES    the type that holds the block's next tiles
     MOEI_TILE_START, MOEI_TILE_STEPS   the names of the two functions defined here
     name_copy            copies part `part` of `parts` of a step
     name_advance         called before a step is copied, where tiles is not null. Prepares what the
                          copies need, such as the next tile's rows once the current tile is
                          copied. Step number `step` of the tile is multiplied meanwhile; none
                          yet where `step` is negative */

/* Fills the first stages - 1 stages of the ring and waits until the first has arrived for every
   warp. With tiles not null, copies continue into the block's next tiles. All threads of the block
   call it. */
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

/* Adds `steps` steps of one tile to acc, from stage r->stage on. All threads of the block call it.
   Requires that this stage has arrived for every warp; on return the next one has. Copies of later
   steps are in flight meanwhile and on return: with tiles, of the block's next tiles; with tiles
   null, past the last depth, where they read nothing. */
MOE_DEVICE void MOEI_TILE_STEPS(moei_mma_c acc[4][4], MOEI_LOADER* load, moei_ring* r,
                                const MOEI_LOADER_ARGS* d, MOEI_LOADER_TILES* tiles,
                                int steps, const moe_gemm_shape f)
{
    const int products = moei_ring_products(f);
    moei_ring_fragments g;
    moei_ring_load(&g, r, r->stage, 0, f);
    for (int i = 0; i < steps; ++i) {
        uint16_t* refill = moei_ring_refill(r, f);
        if (tiles) MOEI_JOIN(MOEI_LOADER, _advance)(load, d, tiles, i, f);
        MOE_UNROLL
        for (int c = 0; c < products; ++c) {
            moei_ring_advance(&g, r, c, f);
            if (c < products - 1) MOEI_JOIN(MOEI_LOADER, _copy)
            (load, d, refill, refill + f.tile_m * f.tile_k, c, products - 1, f);
            if (c == products - 2) moei_copy_commit();
            moei_tile_products(acc, g.a[c / f.terms & 1], g.b[c & 1], f);
        }
        r->stage = moei_ring_next(r, f);
    }
}
