/* k_gather.cuh: the producer of the k-grouped GEMM on Hopper where A's rows are gathered by index.

   A row is a depth here: 128 of its columns are copied to a line of both halves of a stage, 16 bytes
   at a time, by all threads of the producer. B's rows are in order and arrive by tensor copies. A
   row without an index is in no sum, and may hold NaN: in steps that have one, B is copied by the
   threads too, with zeros in its place.

   Indices are read for two steps at a time, 128 depths, two steps before they are needed, also
   where the next step is another tile's. A line's entry is its row's offset from A, in units of 16
   bytes, or MOEI_WGMMA_NO_ROW. */
#ifndef MOE_GEMM_WGMMA_K_GATHER_CUH
#define MOE_GEMM_WGMMA_K_GATHER_CUH

#include "produce.cuh"

#define MOEI_WGMMA_NO_ROW 0xffffffffu

#if MOEI_WGMMA_HERE

/* Returns whether the tile's sum has this depth. */
MOE_DEVICE bool moei_wgmma_has_depth(const moei_wgmma_tile* t, int depth)
{
    return depth >= 0 && depth < t->depth + t->steps * 64;
}

/* Returns the entry of row_index at a depth of the tile, -1 where it has none. */
MOE_DEVICE int moei_wgmma_depth_index(const moe_grouped_gemm_args* d, const moei_wgmma_tile* t,
                                      int depth)
{
    return moei_wgmma_has_depth(t, depth) ? d->row_index[t->origin + depth] : -1;
}

/* Sets where the thread copies a step's A from: one vector of eight lines. lines: where each one's
   row lies; vector: the thread's of a line's 16; line: its first one. Columns past the last are any
   columns, here and in B: their results are not stored. */
MOE_DEVICE void moei_wgmma_gather_depths(moei_wgmma_gather* g, const moe_grouped_gemm_args* d,
                                         const moei_wgmma_tile* t, const uint32_t lines[64],
                                         int vector, int line)
{
    const int column = t->row + vector * 8;
    const char* from = (const char*)d->a + (column < t->end ? column : 0) * (int64_t)2;
    g->keep = 0;
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const uint32_t at = lines[line + 8 * i];
        g->from[i] = from + (uint64_t)(at == MOEI_WGMMA_NO_ROW ? 0 : at) * 16;
        g->keep |= at != MOEI_WGMMA_NO_ROW ? 1u << i : 0;
    }
}

/* Starts the thread's copies of all of a stage's B, for this block alone. lines: those of A; depth:
   of the first line. */
MOE_DEVICE void moei_wgmma_copy_depths_b(unsigned char* stage, const moe_grouped_gemm_args* d,
                                         const moei_wgmma_tile* t, const uint32_t lines[64],
                                         int depth)
{
    const int vector = (int)threadIdx.x % 32;
    const int column = t->first + vector * 8;
    const char* from = (const char*)d->b.base + (column < d->n ? column : 0) * (int64_t)2;
    unsigned char* to = stage + 2 * MOEI_WGMMA_A_HALF + vector / 8 * (64 * 128);
    MOE_NO_UNROLL
    for (int line = (int)threadIdx.x / 32; line < 64; line += 4) {
        const bool keep = lines[line] != MOEI_WGMMA_NO_ROW;
        moei_copy16_async(
            to + line * 128 + ((vector % 8 ^ (line & 7)) << 4),
            from + (keep ? (int64_t)t->origin + depth + line : 0) * d->b.row_stride * 2,
            keep ? 16 : 0);
    }
}

/* Fills the ring's next stage, depths k .. k + 63 of a tile. lines: where each one's row of A lies;
   lacks: a depth of the sum has no row. All threads of the producer. */
MOE_DEVICE void moei_wgmma_depths_step(const moei_wgmma_args* a, moei_wgmma_ring* r,
                                       const moei_wgmma_tiles* w, const moei_wgmma_tile* t, int k,
                                       const uint32_t lines[64], bool lacks, const moe_gemm_shape f)
{
    const int vector = (int)threadIdx.x % 16, line = (int)threadIdx.x / 16;
    const int line_at = vector / 8 * MOEI_WGMMA_A_HALF + line * 128 + ((vector % 8 ^ line) << 4);
    unsigned char* stage = r->stages + r->stage * MOEI_WGMMA_STAGE;
    uint64_t* full = r->s->full + r->stage;
    moei_wgmma_gather g;
    moei_wgmma_gather_depths(&g, &a->d, t, lines, vector,
                             line); /* before the wait: it takes long */
    moei_barrier_wait(r->s->empty + r->stage, r->parity ^ 1);
    if (threadIdx.x == 0) {
        moei_barrier_expect(full, lacks ? 0 : 2 * MOEI_WGMMA_B_HALF);
        if (!lacks) moei_wgmma_load_b(a, r, w, t, k, f.b_major);
    }
    __syncwarp(MOE_FULL_WARP);
    if (lacks) moei_wgmma_copy_depths_b(stage, &a->d, t, lines, k);
    moei_wgmma_copy_rows(stage + line_at, &g, 0, 8 * 128, 1, 0);
    moei_barrier_arrive_copies(full);
    moei_wgmma_next(r);
}

/* All threads of the producer. For each tile, and each two of its steps:
     1. resolve the index of the thread's depth; tell all threads
     2. read the index of the depth two steps on; before the last steps find the next tile for that
     3. fill the stages
   The two blocks of a shared pair have the same depths, so they agree on which steps lack a row. */
MOE_DEVICE void moei_wgmma_produce_depths(const moei_wgmma_args* a, moei_wgmma_ring r,
                                          const moei_wgmma_tiles* w, const moe_gemm_shape f)
{
    const moe_grouped_gemm_args* d = &a->d;
    const int thread = (int)threadIdx.x;
    int pair = (int)blockIdx.x / 2, index, parity = 0;
    moei_wgmma_tile t;
    if (moe_warp() == 0) moei_wgmma_announce(a, r.s, w, pair, 0);
    moei_named_barrier(1, 128);
    t = moei_wgmma_read(r.s, 0);
    index = t.expert < 0 ? -1 : moei_wgmma_depth_index(d, &t, t.depth + thread);
    for (int turn = 0; t.expert >= 0; ++turn) {
        int taken = 0;
        if (moe_warp() == 0) taken = moei_wgmma_take(a, w, pair); /* arrives meanwhile */
        for (int i = 0; i < t.steps; i += 2, parity ^= 1) {
            const int depth = t.depth + i * 64 + thread;
            const int row = moei_wgmma_row_at(d, t.origin + depth, index); /* 1. */
            const uint32_t lacks =
                __ballot_sync(MOE_FULL_WARP, row < 0 && moei_wgmma_has_depth(&t, depth));
            r.s->depth[parity][thread] =
                row < 0 ? MOEI_WGMMA_NO_ROW : (uint32_t)((uint64_t)row * (uint64_t)d->a_stride / 8);
            if (moe_lane() == 0) r.s->lacks[parity][moe_warp()] = lacks;
            if (i + 2 >= t.steps && moe_warp() == 0) { /* 2. */
                pair = moei_wgmma_agree(a, w, r.s, taken, turn + 1);
                moei_wgmma_announce(a, r.s, w, pair, turn + 1);
            }
            moei_named_barrier(1, 128);
            if (i + 2 < t.steps) {
                index = moei_wgmma_depth_index(d, &t, depth + 128);
            } else {
                const moei_wgmma_tile* next = r.s->position + (turn + 1) % MOEI_WGMMA_ENTRIES;
                index =
                    next->expert < 0 ? -1 : moei_wgmma_depth_index(d, next, next->depth + thread);
            }
            MOE_NO_UNROLL
            for (int j = 0; j < 2 && i + j < t.steps; ++j) { /* 3. */
                const uint32_t* some = r.s->lacks[parity] + 2 * j;
                moei_wgmma_depths_step(a, &r, w, &t, t.depth + (i + j) * 64,
                                       r.s->depth[parity] + 64 * j, (some[0] | some[1]) != 0, f);
            }
        }
        t = moei_wgmma_read(r.s, turn + 1);
    }
    moei_wgmma_gather_end(&r);
}

#endif
#endif
