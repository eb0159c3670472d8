/* produce.cuh: the producer of the Hopper grouped GEMM: finds the block's tiles and fills stages. B
   arrives by tensor copies; so does A where its rows are in expert order. Gathered rows of A are
   copied 16 bytes at a time by all threads of the producer.

   The two blocks of a cluster compute pairs of tiles (order.cuh). Block 0 takes the next number
   from a counter in global memory, and sends it to block 1.

   Rows in order: one warp starts the copies, and a second one finds the next tile meanwhile.
   Gathered rows: all four warps copy. In the middle of a tile warp 0 finds the next one, and each
   thread loads row_index of one of its lines: the first copies of a tile can then start at once.
   Otherwise the ring would run empty between two tiles. */
#ifndef MOE_GEMM_WGMMA_PRODUCE_CUH
#define MOE_GEMM_WGMMA_PRODUCE_CUH

#include "../flags.cuh"
#include "ring.cuh"

#if MOEI_WGMMA_HERE

/* ---- the order of tiles; a whole warp calls these ---- */

/* Returns the number of the cluster's next pair, which follows `pair`. With a counter only lane 0 of
   block 0 gets it, the others get 0. */
MOE_DEVICE int moei_wgmma_take(const moei_wgmma_args* a, const moei_wgmma_tiles* w, int pair)
{
    const int clusters = (int)gridDim.x / 2;
    if (!a->ticket) return pair + clusters;
    return w->cluster_rank == 0 && moe_lane() == 0 ? clusters + atomicAdd(a->ticket, 1) : 0;
}

/* Returns the pair's number, which lane 0 of block 0 knows, to all lanes of both blocks. turn: the
   block's number of the tile, 1 or more. */
MOE_DEVICE int moei_wgmma_agree(const moei_wgmma_args* a, const moei_wgmma_tiles* w,
                                moei_wgmma_shared* s, int pair, int turn)
{
    const int entry = turn % MOEI_WGMMA_ENTRIES;
    if (!a->ticket) return pair;
    if (w->cluster_rank == 0) {
        if (moe_lane() == 0) moei_cluster_send(s->number + entry, pair, s->sent + entry, 1);
        return __shfl_sync(MOE_FULL_WARP, pair, 0);
    }
    if (moe_lane() == 0) moei_barrier_expect(s->sent + entry, 4);
    moei_barrier_wait(s->sent + entry, (turn - 1) / MOEI_WGMMA_ENTRIES & 1);
    return *(volatile int32_t*)(s->number + entry);
}

/* Returns where the operands of a tile lie. */
MOE_DEVICE moei_wgmma_matrices moei_wgmma_matrices_of(const moei_wgmma_args* a,
                                                      const moei_wgmma_tile* t)
{
    const moe_grouped_gemm_args* d = &a->d;
    const char* b = moei_weight_base(&d->b, t->expert) + t->origin * d->b.row_stride * 2;
    const char* up =
        d->c.gated == MOE_GATE_UP_SEPARATE ? moei_weight_up(&d->b, t->expert) : b + a->up;
    moei_wgmma_matrices m;
    m.a = (uint64_t)(t->origin * d->a_stride * 2);
    m.b[0] = (uint64_t)b - (uint64_t)d->a;
    m.b[1] = (uint64_t)up - (uint64_t)d->a;
    return m;
}

/* Writes the block's tile of a pair to its entry. Consumers read it once the first stage of the tile
   is full. The whole warp calls it. Returns false where there are no more tiles. */
MOE_DEVICE bool moei_wgmma_announce(const moei_wgmma_args* a, moei_wgmma_shared* s,
                                    const moei_wgmma_tiles* w, int pair, int turn)
{
    moei_wgmma_tile t = {};
    t.expert = -1;
    if (pair < w->pairs) {
        t = moei_wgmma_tile_of(&w->schedule, pair, w->cluster_rank, w->steps, w->m);
        t.from = moei_wgmma_matrices_of(a, &t);
        t.first = t.column * w->columns;
    }
    if (moe_lane() == 0) s->position[turn % MOEI_WGMMA_ENTRIES] = t;
    return t.expert >= 0;
}

/* Returns the entry of the block's tile number `turn`. The shuffles tell the compiler that all lanes
   have one value: registers of the warp hold it; t.from is for the one that starts copies. The whole
   warp calls it. */
MOE_DEVICE moei_wgmma_tile moei_wgmma_read(const moei_wgmma_shared* s, int turn)
{
    const moei_wgmma_tile* at = s->position + turn % MOEI_WGMMA_ENTRIES;
    moei_wgmma_tile t;
    t.from = at->from;
    t.expert = __shfl_sync(MOE_FULL_WARP, at->expert, 0);
    t.begin = __shfl_sync(MOE_FULL_WARP, at->begin, 0);
    t.end = __shfl_sync(MOE_FULL_WARP, at->end, 0);
    t.row = __shfl_sync(MOE_FULL_WARP, at->row, 0);
    t.first = __shfl_sync(MOE_FULL_WARP, at->first, 0);
    t.column = at->column;
    t.shared = __shfl_sync(MOE_FULL_WARP, at->shared, 0);
    t.steps = __shfl_sync(MOE_FULL_WARP, at->steps, 0);
    t.origin = __shfl_sync(MOE_FULL_WARP, at->origin, 0);
    t.depth = __shfl_sync(MOE_FULL_WARP, at->depth, 0);
    return t;
}

/* ---- copies ---- */

/* Starts the copies of a stage's A, depths k .. k + 63, of the halves that have rows. One thread
   calls it. */
MOE_DEVICE void moei_wgmma_load_a(const moei_wgmma_args* a, unsigned char* stage,
                                  const moei_wgmma_tile* t, int k, uint64_t* full,
                                  const int a_major)
{
    const int rows = moei_wgmma_rows(t);
    for (int half = 0; half < 2; ++half)
        if (rows > half * 64) {
            const int row = t->row + half * 64;
            unsigned char* to = stage + half * MOEI_WGMMA_A_HALF;
            if (a_major == MOE_MAJOR_K) moei_tensor_load(to, &a->a, k, row, t->from.a, full);
            else moei_tensor_load(to, &a->a, row, k, t->from.a, full);
        }
}

/* Starts the copies of a stage's B, depths k .. k + 63: of both halves; where the pair shares B, of
   half number `cluster_rank`, for both blocks. One thread calls it. */
MOE_DEVICE void moei_wgmma_load_b(const moei_wgmma_args* a, const moei_wgmma_ring* r,
                                  const moei_wgmma_tiles* w, const moei_wgmma_tile* t, int k,
                                  const int b_major)
{
    unsigned char* b = r->stages + r->stage * MOEI_WGMMA_STAGE + 2 * MOEI_WGMMA_A_HALF;
    uint64_t* full = r->s->full + r->stage;
    for (int half = 0; half < 2; ++half, b += MOEI_WGMMA_B_HALF) {
        const int row = t->first + (half && !a->d.c.gated ? 128 : 0);
        const uint64_t at = t->from.b[half];
        if (t->shared && half != w->cluster_rank) continue;
        if (b_major == MOE_MAJOR_K) {
            if (t->shared) moei_tensor_load_both(b, &a->b, k, row, at, full);
            else moei_tensor_load(b, &a->b, k, row, at, full);
        } else { /* two boxes of 64 rows */
            if (t->shared) {
                moei_tensor_load_both(b, &a->b, row, k, at, full);
                moei_tensor_load_both(b + MOEI_WGMMA_B_HALF / 2, &a->b, row + 64, k, at, full);
            } else {
                moei_tensor_load(b, &a->b, row, k, at, full);
                moei_tensor_load(b + MOEI_WGMMA_B_HALF / 2, &a->b, row + 64, k, at, full);
            }
        }
    }
}

/* Waits until the rows of A of the tile have come. One thread of the producer calls it, always the
   same one. Requires d->ready. */
MOE_DEVICE void moei_wgmma_wait_rows(const moe_grouped_gemm_args* d, moei_wgmma_shared* s,
                                     const moei_wgmma_tile* t)
{
    moei_ready_wait(d, &s->waits, t->row, t->row + moei_wgmma_rows(t));
}

/* ---- rows in order ---- */

/* Finds the block's tiles, one ahead of moei_wgmma_produce; one warp. */
MOE_DEVICE void moei_wgmma_find_tiles(const moei_wgmma_args* a, moei_wgmma_shared* s,
                                      const moei_wgmma_tiles* w)
{
    int pair = (int)blockIdx.x / 2;
    bool more = true;
    for (int turn = 0; more; ++turn) {
        if (turn > 0) {
            moei_barrier_wait(&s->taken, (turn - 1) & 1);
            pair = moei_wgmma_agree(a, w, s, moei_wgmma_take(a, w, pair), turn);
        }
        more = moei_wgmma_announce(a, s, w, pair, turn);
        __syncwarp(MOE_FULL_WARP); /* all lanes have seen the phases, which may end now */
        if (moe_lane() == 0) moei_barrier_arrive(&s->posted);
    }
}

/* One warp, one lane of which starts the copies. For each tile waits until its rows of A have come.
   For each of its steps:
     1. wait until the stage is empty
     2. tell `full` how many bytes it will get, start the copies
   The next tile is read before the last step, where that does not hold up the first ones. At the
   end passes one stage without bytes: the consumers find that there is no tile. */
MOE_DEVICE void moei_wgmma_produce(const moei_wgmma_args* a, moei_wgmma_ring r,
                                   const moei_wgmma_tiles* w, const moe_gemm_shape f)
{
    const bool starts = moei_elect();
    moei_wgmma_tile t;
    moei_barrier_wait(&r.s->posted, 0);
    t = moei_wgmma_read(r.s, 0);
    for (int turn = 0; t.expert >= 0; ++turn) {
        const int look = t.steps > 2 ? t.steps - 1 : t.steps;
        moei_wgmma_tile next;
        int halves;
        if (starts) moei_barrier_arrive(&r.s->taken);
        halves = (moei_wgmma_rows(&t) + 63) / 64;
        if (starts && !w->m && halves &&
            t.row + moei_wgmma_rows(&t) > a->d.a_rows) /* these rows are zeros */
            moe_fault_raise(a->d.fault, MOE_FAULT_BAD_ROW, a->d.rank,
                            t.row < a->d.a_rows ? (int)a->d.a_rows : t.row);
        if (f.a_major == MOE_MAJOR_K && a->d.ready && starts) {
            moei_wgmma_wait_rows(&a->d, r.s, &t);
            moei_tensor_sees_global();
        }
        for (int i = 0;; ++i) {
            unsigned char* stage = r.stages + r.stage * MOEI_WGMMA_STAGE;
            uint64_t* full = r.s->full + r.stage;
            if (i == look) {
                moei_barrier_wait(&r.s->posted, (turn + 1) & 1);
                next = moei_wgmma_read(r.s, turn + 1);
            }
            if (i == t.steps) break;
            moei_barrier_wait(r.s->empty + r.stage, r.parity ^ 1); /* 1. */
            if (starts) {                                          /* 2. */
                moei_barrier_expect(full, 2 * MOEI_WGMMA_B_HALF + halves * MOEI_WGMMA_A_HALF);
                moei_wgmma_load_a(a, stage, &t, t.depth + i * 64, full, f.a_major);
                moei_wgmma_load_b(a, &r, w, &t, t.depth + i * 64, f.b_major);
            }
            __syncwarp(MOE_FULL_WARP);
            moei_wgmma_next(&r);
        }
        t = next;
    }
    moei_barrier_wait(r.s->empty + r.stage, r.parity ^ 1);
    if (starts) moei_barrier_arrive(r.s->full + r.stage);
}

/* ---- gathered rows ---- */

/* A thread's part of a tile's rows: one vector of each line of rows line, line + 16, ... */
typedef struct moei_wgmma_gather {
    const char* from[8]; /* the vector of the next step in row line + 16 i of the tile */
    unsigned keep;       /* bit i: row line + 16 i is not a row of zeros */
    bool whole;          /* the warp has no row of zeros */
} moei_wgmma_gather;

/* Returns the row of A of entry r of row_index, which is `index`; -1 for a row of zeros. An index
   outside A sets the fault word and gives -1. */
MOE_DEVICE int moei_wgmma_row_at(const moe_grouped_gemm_args* d, int r, int index)
{
    const int row = index < 0 ? -1 : (int)((uint32_t)index / (uint32_t)d->row_div);
    if (row < d->a_rows && index >= -1) return row;
    moe_fault_raise(d->fault, MOE_FAULT_BAD_ROW, d->rank, r);
    return -1;
}

/* Returns the row of A of line m of a tile. Lines past the tile's last row are any row: their
   results are not stored. */
MOE_DEVICE int moei_wgmma_row_of(const moe_grouped_gemm_args* d, const moei_wgmma_tile* t, int m)
{
    if (m >= moei_wgmma_rows(t)) return 0;
    return moei_wgmma_row_at(d, t->row + m, d->row_index[t->row + m]);
}

/* Sets where the thread copies from. row: of A, of each line of the tile; line: the thread's first
   one; vector: 0 .. 7. The whole warp calls it. */
MOE_DEVICE void moei_wgmma_gather_from(moei_wgmma_gather* g, const moe_grouped_gemm_args* d,
                                       const int32_t row[MOEI_WGMMA_ROWS], int line, int vector)
{
    g->keep = 0;
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const int from = row[i * 16 + line];
        g->from[i] = (const char*)d->a + ((from < 0 ? 0 : from) * d->a_stride + vector * 8) * 2;
        g->keep |= from < 0 ? 0 : 1u << i;
    }
    g->whole = __all_sync(MOE_FULL_WARP, g->keep == 255) != 0;
}

/* Starts the thread's copies of a step, `ahead`, a literal, after that of g->from. apart, a literal:
   bytes from line to line; depths: of A from the thread's vector on; whole, a literal: no zeros,
   fewer instructions. */
MOE_DEVICE void moei_wgmma_copy_rows(unsigned char* to, const moei_wgmma_gather* g, const int ahead,
                                     const int apart, int depths, const int whole)
{
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const char* from = g->from[i] + ahead * 128;
        if (whole) moei_copy16_whole_async(to + i * apart, from);
        else moei_copy16_async(to + i * apart, from, depths > 0 && (g->keep >> i & 1) ? 16 : 0);
    }
}

/* Fills the ring's next stage: step i of a tile, `ahead` after that of g->from; whole, a literal: no
   zeros. line_at: bytes of the thread's first vector in the stage. All threads of the producer. */
MOE_DEVICE void moei_wgmma_gather_step(const moei_wgmma_args* a, moei_wgmma_ring* r,
                                       const moei_wgmma_tiles* w, const moei_wgmma_tile* t,
                                       const moei_wgmma_gather* g, int i, int line_at,
                                       const int ahead, const int whole, const moe_gemm_shape f)
{
    const int depths = a->d.k - i * 64 - (int)threadIdx.x % 8 * 8;
    uint64_t* full = r->s->full + r->stage;
    moei_barrier_wait(r->s->empty + r->stage, r->parity ^ 1);
    if (threadIdx.x == 0) {
        moei_barrier_expect(full, 2 * MOEI_WGMMA_B_HALF);
        moei_wgmma_load_b(a, r, w, t, i * 64, f.b_major);
    }
    __syncwarp(MOE_FULL_WARP);
    moei_wgmma_copy_rows(r->stages + r->stage * MOEI_WGMMA_STAGE + line_at, g, ahead, 16 * 128,
                         depths, whole);
    moei_barrier_arrive_copies(full);
    moei_wgmma_next(r);
}

/* Copies steps i .. end - 1 of a tile, and advances *g by them; returns end. whole: the first steps
   that have neither rows of zeros nor depths past k. All threads of the producer. */
MOE_DEVICE int moei_wgmma_gather_steps(const moei_wgmma_args* a, moei_wgmma_ring* r,
                                       const moei_wgmma_tiles* w, const moei_wgmma_tile* t,
                                       moei_wgmma_gather* g, int i, int end, int whole, int line_at,
                                       const moe_gemm_shape f)
{
    MOE_NO_UNROLL
    for (; i + 4 <= end && i + 4 <= whole; i += 4) {
        MOE_UNROLL
        for (int ahead = 0; ahead < 4; ++ahead)
            moei_wgmma_gather_step(a, r, w, t, g, i + ahead, line_at, ahead, 1, f);
        MOE_UNROLL
        for (int j = 0; j < 8; ++j) g->from[j] += 4 * 128;
    }
    MOE_NO_UNROLL
    for (; i < end; ++i) {
        moei_wgmma_gather_step(a, r, w, t, g, i, line_at, 0, 0, f);
        MOE_UNROLL
        for (int j = 0; j < 8; ++j) g->from[j] += 128;
    }
    return end;
}

/* Passes one stage without bytes: the consumers find that there is no tile. All threads of the
   producer. */
MOE_DEVICE void moei_wgmma_gather_end(const moei_wgmma_ring* r)
{
    moei_barrier_wait(r->s->empty + r->stage, r->parity ^ 1);
    if (threadIdx.x == 0) moei_barrier_expect(r->s->full + r->stage, 0);
    moei_barrier_arrive_copies(r->s->full + r->stage);
}

/* All threads of the producer. As moei_wgmma_produce; thread 0 waits for rows of A. The arrivals of
   a stage are B's, and one of each thread when its copies of A are complete. */
MOE_DEVICE void moei_wgmma_produce_gathered(const moei_wgmma_args* a, moei_wgmma_ring r,
                                            const moei_wgmma_tiles* w, const moe_gemm_shape f)
{
    const moe_grouped_gemm_args* d = &a->d;
    const int thread = (int)threadIdx.x, vector = thread % 8, line = thread / 8;
    const int line_at = line * 128 + ((vector ^ (line & 7)) << 4);
    const int middle = w->steps < 8 ? w->steps : w->steps / 2 & ~3;
    int pair = (int)blockIdx.x / 2, row;
    moei_wgmma_tile t;
    if (moe_warp() == 0) moei_wgmma_announce(a, r.s, w, pair, 0);
    moei_named_barrier(1, 128);
    t = moei_wgmma_read(r.s, 0);
    row = moei_wgmma_row_of(d, &t, thread);
    for (int turn = 0; t.expert >= 0; ++turn) {
        moei_wgmma_gather g;
        int next = 0, i = 0, whole;
        r.s->row[turn & 1][thread] = row;
        if (d->ready) {
            if (thread == 0) moei_wgmma_wait_rows(d, r.s, &t);
            __syncwarp(MOE_FULL_WARP);
        }
        moei_named_barrier(1, 128);
        if (moe_warp() == 0) next = moei_wgmma_take(a, w, pair); /* arrives meanwhile */
        moei_wgmma_gather_from(&g, d, r.s->row[turn & 1], line, vector);
        whole = g.whole ? d->k / 64 : 0;
        MOE_NO_UNROLL
        for (int end = middle;;
             end = w->steps) { /* twice: the loop above stands in the code once */
            i = moei_wgmma_gather_steps(a, &r, w, &t, &g, i, end, whole, line_at, f);
            if (next < 0) break;
            if (moe_warp() == 0) {
                pair = moei_wgmma_agree(a, w, r.s, next, turn + 1);
                moei_wgmma_announce(a, r.s, w, pair, turn + 1);
            }
            next = -1;
            moei_named_barrier(1, 128);
            row = moei_wgmma_row_of(d, r.s->position + (turn + 1) % MOEI_WGMMA_ENTRIES, thread);
        }
        t = moei_wgmma_read(r.s, turn + 1);
    }
    moei_wgmma_gather_end(&r);
}

#endif
#endif
