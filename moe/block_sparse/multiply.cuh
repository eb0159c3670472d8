/* multiply.cuh: the steps of a block-sparse tile.

   Threads copy X and Y, `deep` = 32 or 64 at a time, into a ring of stages in shared memory with
   cp.async; warps, wm x wn of the tile each, multiply what has arrived. A barrier a step, placed
   before the last products of a stage, whose pieces are in registers by then: behind it the next
   stage may be read and the one before may be refilled. */
#ifndef MOE_BLOCK_SPARSE_MULTIPLY_CUH
#define MOE_BLOCK_SPARSE_MULTIPLY_CUH

#include "load.cuh"

/* Must some products of the tile be left out, some rows or depths not be read, or chunks be cut
   off? All threads of the block get one answer. Whole chunks past the edges of X and Y are not asked for:
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

/* Multiplies all steps of a tile whose chunks are whole. x_major and y_major are literals: what the
   loop does beside loads and products is much of what keeps it from the tensor cores' rate. */
MOE_DEVICE void moei_block_multiply(const moei_block_args* d, moei_block_shared* s, uint16_t* ring,
                                    moei_mma_c acc[4][4], int steps, const int x_major,
                                    const int y_major, const int tm, const int tn, const int deep,
                                    const int warps_m, const int warps_n, const int stages,
                                    const int dtype)
{
    const moei_block_where* t = &s->tile;
    const int wm = tm / warps_m, wn = tn / warps_n, threads = warps_m * warps_n * 32;
    const int elems = (tm + tn) * deep;
    const int warp_m = moei_warp() % warps_m, warp_n = moei_warp() / warps_m;
    const int chunks = deep / 16, half = MOEI_WARP / chunks; /* of a step; steps */
    const int parts = chunks - 1; /* of a step's copies: one a chunk, but for the last */
    const int lane_x = moei_mma_lane_a(warp_m * wm, x_major == MOE_MAJOR_K ? deep : tm, x_major);
    const int lane_y = moei_mma_lane_b(warp_n * wn, y_major == MOE_MAJOR_K ? deep : tn, y_major);
    const moei_block_loader x =
        moei_block_loader_begin(&d->x, s->x, t->rows, s->rows, x_major, tm, deep, threads);
    const moei_block_loader y =
        moei_block_loader_begin(&d->y, s->y, t->columns, s->columns, y_major, tn, deep, threads);
    /* the thread's own, of the step to copy next */
    moei_block_chunk x_chunk = s->chunk_x[x.chunk], y_chunk = s->chunk_y[y.chunk];
    moei_mma_a a[2][4];
    moei_mma_b b[2][4];

    MOEI_NO_UNROLL
    for (int i = 0; i < stages - 1; ++i)
        moei_block_fill(s, &x, &y, &x_chunk, &y_chunk, i, ring + i * elems, 0, 1, 0, tm, tn, deep,
                        threads);
    moei_copy_wait(stages - 2);
    __syncthreads();
    moei_block_fragments(a[0], b[0], ring, lane_x, lane_y, 0, tm, tn, deep, wm, wn, dtype, x_major,
                         y_major);
    for (int step = 0, slot = 0; step < steps; ++step) {
        const int next = slot + 1 == stages ? 0 : slot + 1;
        uint16_t* refill = ring + (slot == 0 ? stages - 1 : slot - 1) * elems;
        /* each half of the chunks made is used up in turn: a warp makes the next */
        if (step % half == 0 && step > 0 && moei_warp() == step / half % (threads / MOEI_WARP))
            moei_block_chunks(d, t, s, (step / half + 1) * MOEI_WARP, 0, tm);
        /* no branch from here on: one run of products, with all else that is to do among them; the
           next pieces are read while these are multiplied */
        MOEI_UNROLL
        for (int c = 0; c < chunks; ++c) {
            const int last = c == chunks - 1;
            if (last) {
                moei_copy_wait(stages - 2);
                __syncthreads();
            }
            moei_block_fragments(a[!(c & 1)], b[!(c & 1)], ring + (last ? next : slot) * elems,
                                 lane_x, lane_y, last ? 0 : c * 16 + 16, tm, tn, deep, wm, wn,
                                 dtype, x_major, y_major);
            if (c < parts)
                moei_block_fill(s, &x, &y, &x_chunk, &y_chunk, step + stages - 1, refill, c, parts,
                                0, tm, tn, deep, threads);
            MOEI_UNROLL
            for (int i = 0; i < wm / 16; ++i) {
                MOEI_UNROLL
                for (int j = 0; j < wn / 16; ++j)
                    moei_mma(&acc[i][j], &a[c & 1][i], &b[c & 1][j], dtype);
            }
        }
        slot = next;
    }
}

/* The same of a tile at an edge, of strips joined that have not the same blocks, or with depths
   that do not count: chunks may be cut off, rows or depths not read, products left out. Compact
   rather than quick. */
MOE_DEVICE void moei_block_multiply_careful(const moei_block_args* d, moei_block_shared* s,
                                            uint16_t* ring, moei_mma_c acc[4][4], int steps,
                                            const int tm, const int tn, const int deep,
                                            const int warps_m, const int warps_n, const int stages,
                                            const int dtype)
{
    const moei_block_where* t = &s->tile;
    const int wm = tm / warps_m, wn = tn / warps_n, threads = warps_m * warps_n * 32;
    const int elems = (tm + tn) * deep;
    const int warp_m = moei_warp() % warps_m, warp_n = moei_warp() / warps_m;
    const int chunks = deep / 16, half = MOEI_WARP / chunks;
    const int x_major = d->x.major, y_major = d->y.major;
    const int lane_x = moei_mma_lane_a(warp_m * wm, x_major == MOE_MAJOR_K ? deep : tm, x_major);
    const int lane_y = moei_mma_lane_b(warp_n * wn, y_major == MOE_MAJOR_K ? deep : tn, y_major);
    const moei_block_loader x =
        moei_block_loader_begin(&d->x, s->x, t->rows, s->rows, x_major, tm, deep, threads);
    const moei_block_loader y =
        moei_block_loader_begin(&d->y, s->y, t->columns, s->columns, y_major, tn, deep, threads);
    moei_block_chunk x_chunk = s->chunk_x[x.chunk], y_chunk = s->chunk_y[y.chunk];
    uint32_t have = 0; /* bit j * 4 + i: the warp's piece (i, j) of C is wanted */
    moei_mma_a a[4];
    moei_mma_b b[4];

    MOEI_UNROLL
    for (int j = 0; j < wn / 16; ++j)
        have |= (s->have[warp_n * (wn / 16) + j] >> warp_m * (wm / 16) & ((1u << (wm / 16)) - 1))
                << j * 4;
    for (int step = 1 - stages, slot = 0; step < steps; ++step) {
        if (step >= 0) {
            moei_copy_wait(stages - 2);
            __syncthreads();
            if (step % half == 0 && step > 0 && moei_warp() == step / half % (threads / MOEI_WARP))
                moei_block_chunks(d, t, s, (step / half + 1) * MOEI_WARP, 1, tm);
        }
        {
            const int to = slot == 0 ? stages - 1 : slot - 1;
            moei_block_fill(s, &x, &y, &x_chunk, &y_chunk, step + stages - 1,
                            ring + (step < 0 ? step + stages - 1 : to) * elems, 0, 1, 1, tm, tn,
                            deep, threads);
        }
        if (step < 0) continue;
        MOEI_NO_UNROLL
        for (int c = 0; c < chunks; ++c) {
            const int number = (step * chunks + c) % (2 * MOEI_WARP);
            const uint32_t rows = s->chunk_x[number].rows >> warp_m * (wm / 16);
            const uint32_t live = have & (rows & ((1u << (wm / 16)) - 1)) * 0x1111u;
            if (live == 0) continue;
            moei_block_fragments(a, b, ring + slot * elems, lane_x, lane_y, c * 16, tm, tn, deep,
                                 wm, wn, dtype, x_major, y_major);
            MOEI_UNROLL
            for (int i = 0; i < wm / 16; ++i) {
                MOEI_UNROLL
                for (int j = 0; j < wn / 16; ++j)
                    moei_mma_if(&acc[i][j], &a[i], &b[j], dtype, (int)(live & (1u << (j * 4 + i))));
            }
        }
        slot = slot + 1 == stages ? 0 : slot + 1;
    }
}

#endif
