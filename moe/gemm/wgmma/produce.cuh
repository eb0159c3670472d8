/* produce.cuh: the producer of the Hopper grouped GEMM: takes tiles and fills stages. B arrives by
   tensor copies; so does A where its rows are in expert order. Gathered rows of A are copied 16
   bytes at a time by all threads of the producer. */
#ifndef MOE_GEMM_WGMMA_PRODUCE_CUH
#define MOE_GEMM_WGMMA_PRODUCE_CUH

#include "ring.cuh"

#if MOEI_WGMMA_HERE

/* Returns the number of the block's next tile. */
MOE_DEVICE int moei_wgmma_take(const moei_wgmma_args* a, int tile)
{
    return (int)gridDim.x + (a->ticket ? atomicAdd(a->ticket, 1) : tile);
}

/* Writes the position of tile number `tile`, the block's number `turn`, for all roles. Consumers
   read the position once the first stage of the tile is full. */
MOE_DEVICE moe_tile_position moei_wgmma_announce(moei_wgmma_shared* s, const moei_wgmma_tiles* w,
                                                 int tile, int turn)
{
    moe_tile_position t = {-1, 0, 0, 0, 0};
    if (tile < w->count) t = moei_schedule_tile(&w->schedule, tile, 128, 1);
    s->position[turn & 7] = t;
    return t;
}

/* Starts the copies of B for depths k .. k + 63. One thread calls it. */
MOE_DEVICE void moei_wgmma_load_b(const moei_wgmma_args* a, const moei_wgmma_ring* r,
                                  const moei_wgmma_tiles* w, const moe_tile_position* t, int k)
{
    unsigned char* b = r->stages + r->stage * MOEI_WGMMA_STAGE + 2 * MOEI_WGMMA_HALF;
    uint64_t* full = r->s->full + r->stage;
    const int row = t->column * w->columns;
    moei_tensor_load_of(b, &a->b[0], k, row, t->expert, full);
    moei_tensor_load_of(b + MOEI_WGMMA_B, &a->b[1], k, a->d.c.gated ? row : row + 128, t->expert,
                        full);
}

/* The producer where A is in expert order; one thread. For each tile, and each of its steps:
     1. wait until the stage is empty
     2. tell `full` how many bytes it will get, start the copies
   At the end passes one stage without bytes: the consumers find that there is no tile. */
MOE_DEVICE void moei_wgmma_produce(const moei_wgmma_args* a, moei_wgmma_ring r,
                                   const moei_wgmma_tiles* w)
{
    int tile = (int)blockIdx.x;
    for (int turn = 0;; ++turn) {
        const moe_tile_position t = moei_wgmma_announce(r.s, w, tile, turn);
        int halves, next;
        if (t.expert < 0) break;
        halves = (moei_wgmma_rows(&t) + 63) / 64;
        if (t.row + moei_wgmma_rows(&t) > a->d.a_rows) /* these rows are zeros */
            moe_fault_raise(a->d.fault, MOE_FAULT_BAD_ROW, a->d.rank,
                            t.row < a->d.a_rows ? (int)a->d.a_rows : t.row);
        next = moei_wgmma_take(a, tile); /* arrives while the tile is copied */
        for (int i = 0; i < w->steps; ++i) {
            unsigned char* stage = r.stages + r.stage * MOEI_WGMMA_STAGE;
            uint64_t* full = r.s->full + r.stage;
            moei_barrier_wait(r.s->empty + r.stage, r.parity ^ 1);                  /* 1. */
            moei_barrier_expect(full, 2 * MOEI_WGMMA_B + halves * MOEI_WGMMA_HALF); /* 2. */
            moei_tensor_load(stage, &a->a, i * 64, t.row, full);
            if (halves > 1)
                moei_tensor_load(stage + MOEI_WGMMA_HALF, &a->a, i * 64, t.row + 64, full);
            moei_wgmma_load_b(a, &r, w, &t, i * 64);
            moei_wgmma_next(&r);
        }
        tile = next;
    }
    moei_barrier_wait(r.s->empty + r.stage, r.parity ^ 1);
    moei_barrier_arrive(r.s->full + r.stage);
}

/* A thread's part of a tile's rows: vector `vector` of each line of rows line, line + 16, ... */
typedef struct moei_wgmma_gather {
    uint32_t from[8]; /* the row of A, in 16-byte vectors from A's first */
    int keep;         /* bit i: row i exists; others are zeros */
    int vector, line;
} moei_wgmma_gather;

/* Finds the rows of a tile. A row_index outside A sets the fault word and gives zeros. */
MOE_DEVICE void moei_wgmma_find_rows(moei_wgmma_gather* g, const moe_grouped_gemm_args* d,
                                     const moe_tile_position* t)
{
    const uint32_t vectors = (uint32_t)(d->a_stride / 8);
    const int rows = moei_wgmma_rows(t);
    int row[8]; /* all loads of row_index are in flight before the first use */
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const int m = i * 16 + g->line;
        row[i] = m < rows ? d->row_index[t->row + m] : -1;
    }
    g->keep = 0;
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const int from = row[i] < 0 ? row[i] : (int)((uint32_t)row[i] / (uint32_t)d->row_div);
        const bool in = from >= 0 && from < d->a_rows;
        if (from != -1 && !in && g->vector == 0)
            moe_fault_raise(d->fault, MOE_FAULT_BAD_ROW, d->rank, t->row + i * 16 + g->line);
        g->from[i] = in ? (uint32_t)from * vectors : 0;
        g->keep |= in ? 1 << i : 0;
    }
}

/* The producer where rows of A are gathered; all its threads. As moei_wgmma_produce; the arrivals
   of a stage are B's, and one of each thread when its copies of A are complete. */
MOE_DEVICE void moei_wgmma_produce_gathered(const moei_wgmma_args* a, moei_wgmma_ring r,
                                            const moei_wgmma_tiles* w)
{
    const moe_grouped_gemm_args* d = &a->d;
    const int thread = (int)threadIdx.x % 128;
    moei_wgmma_gather g;
    int tile = (int)blockIdx.x, to;
    g.vector = thread % 8, g.line = thread / 8;
    to = g.line * 128 + ((g.vector ^ (g.line & 7)) << 4);
    for (int turn = 0;; ++turn) {
        moe_tile_position t;
        if (thread == 0) {
            moei_wgmma_announce(r.s, w, tile, turn);
            if (tile < w->count) tile = moei_wgmma_take(a, tile);
        }
        moei_named_barrier(1, 128);
        t = r.s->position[turn & 7];
        if (t.expert < 0) break;
        moei_wgmma_find_rows(&g, d, &t);
        for (int i = 0; i < w->steps; ++i) {
            unsigned char* stage = r.stages + r.stage * MOEI_WGMMA_STAGE + to;
            uint64_t* full = r.s->full + r.stage;
            const int k = i * 64 + g.vector * 8, keep = k < d->k ? g.keep : 0;
            const char* from = (const char*)d->a + (int64_t)k * 2;
            moei_barrier_wait(r.s->empty + r.stage, r.parity ^ 1);
            if (thread == 0) {
                moei_barrier_expect(full, 2 * MOEI_WGMMA_B);
                moei_wgmma_load_b(a, &r, w, &t, i * 64);
            }
            MOE_UNROLL
            for (int j = 0; j < 8; ++j)
                moei_copy16_async(stage + j * 16 * 128, from + (int64_t)g.from[j] * 16,
                                  (keep >> j & 1) * 16);
            moei_barrier_arrive_copies(full);
            moei_wgmma_next(&r);
        }
    }
    moei_barrier_wait(r.s->empty + r.stage, r.parity ^ 1);
    if (thread == 0) moei_barrier_expect(r.s->full + r.stage, 0);
    moei_barrier_arrive_copies(r.s->full + r.stage);
}

#endif
#endif
