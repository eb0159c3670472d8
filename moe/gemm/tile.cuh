/* tile.cuh: the pipeline that computes one tile after another of a grouped GEMM. Called by
   kernels.inl and router/ragged.cuh; moe_gemm_tile is for kernels of one's own.

   A block owns a tile of tile_m rows and tile_n columns, and computes it in the steps of
   mainloop.cuh. The ring continues over tiles: while the warps finish and store one tile, the
   copies of the next tile's first stages are in flight.

   All shape parameters are literals in the stamped kernels, so that the accumulators stay in
   registers and the loops unroll. Where gate and up are not interleaved, half of a warp's columns
   are gates and half are ups: one warp's epilogue has both. */
#ifndef MOE_GEMM_TILE_CUH
#define MOE_GEMM_TILE_CUH

#include "args.h"
#include "epilogue.cuh"
#include "flags.cuh"
#include "mainloop.cuh"
#include "schedule.cuh"

/* The source of a thread's copies of the current tile. K-major operands are copied in passes of 32
   rows: a thread copies row r of each pass, one 16-byte vector of the step's depths. Mn-major
   operands are copied in passes of several depths: a thread copies 8 rows at one depth of each. */
typedef struct moei_loader {
    const char* a[4]; /* A: k-major, the thread's vector in each pass; mn-major, in a[0] */
    const char* b[2]; /* B: k-major, its vector in even and in odd passes; mn-major, in b[0] */
    int32_t b_row[2]; /* row of B at b[0], b[1] */
    int32_t a_keep;   /* A: k-major, bit i: pass i has a row; mn-major, bytes to copy, 0 .. 16 */
    int32_t tile;     /* number of the tile */
    int32_t turn;     /* tiles of this block before that tile */
    int32_t k;        /* first depth of the step to copy next */
} moei_loader;

/* Returns true for a gated activation with gate and up not interleaved: half of a tile's columns
   are gates, and half are ups, which are copied from another address. */
MOE_DEVICE bool moei_gemm_halves(const moe_grouped_gemm_args* d)
{
    return d->c.gated == MOE_GATE_UP_CONCATENATED || d->c.gated == MOE_GATE_UP_SEPARATE;
}

/* Points the loader at the first step of tile t. All threads of the block call it.

   1. Address the expert's matrix and its ups; resolve the tile's first row of B.
   2. A: resolve the rows of the thread's passes through row_index (mn-major: its 8 rows). A row
      outside A sets the fault word and reads as zeros.
   3. B: resolve the thread's rows. With two halves each warp gets wn / 2 gates, then their ups. */
MOE_DEVICE void moei_loader_begin(moei_loader* p, moe_tile_position t,
                                  const moe_grouped_gemm_args* d, const moe_gemm_shape f)
{
    const int thread = moei_ring_thread();
    const int vector = thread % (f.tile_k / 8), r = thread / (f.tile_k / 8);
    const bool halves = moei_gemm_halves(d);
    const int64_t ld = d->b.row_stride;
    const char* weight = moei_weight_base(&d->b, t.expert);
    const char* up = d->c.gated == MOE_GATE_UP_SEPARATE ? moei_weight_up(&d->b, t.expert) : weight;
    const int column =
        t.column * (halves ? f.tile_n / 2 : f.tile_n); /* first row of B, in each half */
    p->k = 0;
    if (d->c.gated == MOE_GATE_UP_CONCATENATED)
        up += (int64_t)d->n * (f.b_major == MOE_MAJOR_K ? ld : 1) * 2;

    /* 2. A */
    if (f.a_major == MOE_MAJOR_K) {
        int from[4]; /* all loads of row_index are in flight before the first use */
        MOE_UNROLL
        for (int i = 0; i < f.tile_m / 32; ++i) {
            const int m = t.row + i * 32 + r;
            from[i] = m >= t.end ? -1 : d->row_index ? d->row_index[m] : m;
        }
        p->a_keep = 0;
        MOE_UNROLL
        for (int i = 0; i < f.tile_m / 32; ++i) {
            int row = from[i];
            if (d->row_div > 1 && row >= 0) row = row / d->row_div;
            if (row >= d->a_rows || row < -1) {
                if (vector == 0)
                    moe_fault_raise(d->fault, MOE_FAULT_BAD_ROW, d->rank, t.row + i * 32 + r);
                row = -1;
            }
            p->a_keep |= (row >= 0 ? 1 : 0) << i;
            p->a[i] = (const char*)d->a + ((row >= 0 ? row : 0) * d->a_stride + vector * 8) * 2;
        }
    } else {
        const int m = t.row + thread % (f.tile_m / 8) * 8;
        const int64_t left = d->a_rows - m;
        p->a_keep = left >= 8 ? 16 : left > 0 ? (int)left * 2 : 0;
        p->a[0] =
            (const char*)d->a + (thread / (f.tile_m / 8) * d->a_stride + (left > 0 ? m : 0)) * 2;
    }

    /* 3. B */
    if (f.b_major == MOE_MAJOR_K) {
        if (!halves) {
            p->b_row[0] = column + r;
            p->b_row[1] = column + 32 + r;
            p->b[0] = weight + (p->b_row[0] * ld + vector * 8) * 2;
            p->b[1] = p->b[0] + 32 * ld * 2;
        } else if (f.wn == 64) { /* even passes: 32 rows of gate; odd passes: of up */
            p->b_row[0] = p->b_row[1] = column + r;
            p->b[0] = weight + (p->b_row[0] * ld + vector * 8) * 2;
            p->b[1] = up + (p->b_row[0] * ld + vector * 8) * 2;
        } else { /* wn == 32: each pass: 16 rows of gate, 16 of up */
            p->b_row[0] = column + r % 16;
            p->b_row[1] = column + 16 + r % 16;
            p->b[0] = (r < 16 ? weight : up) + (p->b_row[0] * ld + vector * 8) * 2;
            p->b[1] = p->b[0] + 16 * ld * 2;
        }
    } else {
        const int j = thread % (f.tile_n / 8) * 8; /* element of a stage's line */
        const int in = j % f.wn, half = f.wn / 2;
        p->b_row[0] = !halves ? column + j : column + j / f.wn * half + in % half;
        p->b[0] =
            (halves && in >= half ? up : weight) + (thread / (f.tile_n / 8) * ld + p->b_row[0]) * 2;
    }
}

/* Starts the copies of part `part` of `parts` (literals) of one step of A and B to a stage, sa and
   sb. After the last part the loader points at the next step. All threads of the block call it.

   1. A: passes part, part + parts, ... Elements past the last row or depth become zeros.
   2. B: likewise.
   3. At the last part move on to the next step. */
MOE_DEVICE void moei_loader_copy(moei_loader* p, const moe_grouped_gemm_args* d, uint16_t* sa,
                                 uint16_t* sb, const int part, const int parts,
                                 const moe_gemm_shape f)
{
    const int tid = (int)threadIdx.x, vector = tid % (f.tile_k / 8), r = tid / (f.tile_k / 8);
    const int k_left = d->k - p->k;                        /* depths that remain */
    const int to = moei_swizzled(r, vector * 8, f.tile_k); /* the swizzle repeats every 8 lines */
    const bool halves = moei_gemm_halves(d);
    const int b_rows = d->c.gated == MOE_GATE_UP_INTERLEAVED ? 2 * d->n : d->n;

    /* 1. A */
    if (f.a_major == MOE_MAJOR_K) {
        MOE_UNROLL
        for (int i = part; i < f.tile_m / 32; i += parts) {
            moei_copy16_async(sa + i * 32 * f.tile_k + to, p->a[i],
                              vector * 8 < k_left && (p->a_keep >> i & 1) ? 16 : 0);
            p->a[i] += f.tile_k * 2;
        }
    } else {
        const int c = tid % (f.tile_m / 8), rows = f.threads / (f.tile_m / 8);
        MOE_UNROLL
        for (int i = part; i < f.tile_k / rows; i += parts) {
            const int kr = i * rows + tid / (f.tile_m / 8);
            moei_copy16_async(sa + moei_swizzled(kr, c * 8, f.tile_m),
                              p->a[0] + i * rows * d->a_stride * 2, kr < k_left ? p->a_keep : 0);
        }
        if (part == parts - 1) p->a[0] += f.tile_k * d->a_stride * 2;
    }
    /* 2. B */
    if (f.b_major == MOE_MAJOR_K) {
        const int step = halves ? 32 : 64; /* rows of B between passes i and i + 2 */
        MOE_UNROLL
        for (int i = part; i < f.tile_n / 32; i += parts) {
            const int row = p->b_row[i & 1] + (i >> 1) * step;
            moei_copy16_async(sb + i * 32 * f.tile_k + to,
                              p->b[i & 1] + (i >> 1) * step * d->b.row_stride * 2,
                              row < b_rows && vector * 8 < k_left ? 16 : 0);
        }
        if (part == parts - 1) {
            p->b[0] += f.tile_k * 2;
            p->b[1] += f.tile_k * 2;
        }
    } else {
        const int thread = moei_ring_thread(); /* anew: of tid the compiler would keep c and kr */
        const int c = thread % (f.tile_n / 8);
        const int rows = f.threads / (f.tile_n / 8);
        MOE_UNROLL
        for (int i = part; i < f.tile_k / rows; i += parts) {
            const int kr = i * rows + thread / (f.tile_n / 8);
            moei_copy16_async(sb + moei_swizzled(kr, c * 8, f.tile_n),
                              p->b[0] + i * rows * d->b.row_stride * 2,
                              kr < k_left && p->b_row[0] < b_rows ? 16 : 0);
        }
        if (part == parts - 1) p->b[0] += f.tile_k * d->b.row_stride * 2;
    }
    if (part == parts - 1) p->k += f.tile_k; /* 3. next step */
}

/* Static shared memory of a block. */
typedef struct moei_gemm_shared {
    moe_block_scan_scratch scan;
    moe_tile_position position[4]; /* of the block's tile number `turn` at turn % 4; the loader is
                                      at most stages - 1 = 2 tiles ahead of the warps */
    int32_t waits;                 /* of thread 0: as in moei_ready_wait */
    int32_t column_tiles;          /* the schedule's; read here, it takes no register meanwhile */
} moei_gemm_shared;

/* A block's tiles, for its loader and its warps. */
typedef struct moei_tiles {
    moei_schedule schedule;
    moei_gemm_shared* shared;
} moei_tiles;

/* Returns the number of tiles of all blocks. */
MOE_DEVICE int moei_tiles_count(const moei_tiles* s)
{
    return s->schedule.tile_start[s->schedule.groups.num_groups];
}

/* A tile's rows of C: row .. end - 1. */
typedef struct moei_tile_rows {
    int32_t row, end;
} moei_tile_rows;

MOE_DEVICE moei_tile_rows moei_tile_rows_of(const moe_tile_position* t, const moe_gemm_shape f)
{
    moei_tile_rows r;
    r.row = t->row > t->begin ? t->row : t->begin;
    r.end = t->end - t->row < f.tile_m ? t->end : t->row + f.tile_m;
    return r;
}

/* Waits until the rows of A of the tile have come, whose position thread 0 has written. All threads
   of the block call it. */
MOE_DEVICE void moei_loader_wait(const moe_grouped_gemm_args* d, moei_gemm_shared* s,
                                 const moe_tile_position* t, const moe_gemm_shape f)
{
    if (threadIdx.x == 0) {
        const moei_tile_rows r = moei_tile_rows_of(t, f);
        moei_ready_wait(d, &s->waits, r.row, r.end);
    }
    __syncthreads();
}

/* Points the loader at tile p->tile. On return the tile's rows of A have come. Thread 0 writes the
   tile's position for the epilogue; the barriers of the tile's steps make it visible. All
   threads of the block call it. */
MOE_DEVICE void moei_loader_tile(moei_loader* p, const moe_grouped_gemm_args* d,
                                 const moei_tiles* s, const moe_gemm_shape f)
{
    moei_schedule schedule = s->schedule;
    moe_tile_position t;
    schedule.column_tiles = s->shared->column_tiles;
    t = moei_schedule_tile(&schedule, p->tile, f.tile_m);
    if (threadIdx.x == 0) s->shared->position[p->turn & 3] = t;
    if (d->ready) moei_loader_wait(d, s->shared, s->shared->position + (p->turn & 3), f);
    moei_loader_begin(p, t, d, f);
}

/* Called before a step is copied: moves the loader to the block's next tile once the current one is
   copied. Past the last tile p->k stays at or above d->k: later copies read nothing and write zeros
   that no warp uses. So the steps have no branch, and every step commits one group of copies. */
MOE_DEVICE void moei_loader_advance(moei_loader* p, const moe_grouped_gemm_args* d,
                                    const moei_tiles* s, int step, const moe_gemm_shape f)
{
    (void)step;
    if (p->k >= d->k && p->tile < moei_tiles_count(s)) {
        p->tile += (int)gridDim.x;
        ++p->turn;
        if (p->tile < moei_tiles_count(s)) moei_loader_tile(p, d, s, f);
    }
}

#define MOEI_LOADER moei_loader
#define MOEI_LOADER_ARGS moe_grouped_gemm_args
#define MOEI_LOADER_TILES const moei_tiles
#define MOEI_TILE_START moei_tile_start
#define MOEI_TILE_STEPS moei_tile_steps
#include "steps.inl"
#undef MOEI_LOADER
#undef MOEI_LOADER_ARGS
#undef MOEI_LOADER_TILES
#undef MOEI_TILE_START
#undef MOEI_TILE_STEPS

/* Counts the tile's part of C, which all warps have stored. columns: of C in a tile. All threads of
   the block call it. */
MOE_DEVICE void moei_tile_count(const moe_grouped_gemm_args* d, const moe_tile_position* t,
                                int columns, const moe_gemm_shape f)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        const moei_tile_rows r = moei_tile_rows_of(t, f);
        const int left = d->n - t->column * columns;
        moei_done_count(d, r.row, r.end, left < columns ? left : columns);
    }
}

/* Stores the sums of tile t. gradient, a literal: 1: by the epilogue of a gradient; 0: of a forward
   product. All threads of the block call it. staging: of the calling warp. */
MOE_DEVICE void moei_tile_store(const moe_grouped_gemm_args* d, const moe_tile_position* t,
                                moei_mma_c acc[4][4], float* staging, const int gradient,
                                const moe_gemm_shape f)
{
    const int warp_m = moe_warp() % f.warps_m, warp_n = moe_warp() / f.warps_m;
    const int columns = d->c.gated ? f.tile_n / 2 : f.tile_n; /* of C in a tile */
    const int row = t->row + warp_m * f.wm;
    const int column = t->column * columns + warp_n * (columns / f.warps_n);
    if (gradient) moei_epilogue_gradient(d, t, acc, staging, row, column, f);
    else moei_epilogue_warp(&d->c, d->n, t, acc, staging, row, column, f);
}

/* Computes tiles blockIdx.x, blockIdx.x + gridDim.x, ... of all experts. All threads of the block
   call it. `shared` holds the ring, the staging of each warp, then tile_start.
     1. Build the schedule from the groups; return where it is bad or has no tile for this block.
     2. Start the copies of the first tile's stages.
     3. For each tile: run its steps, which also start the copies of the next tile; read the tile's
        position, which thread 0 wrote to shared memory before a barrier of the steps; store, and
        count what is stored.
     4. Wait for the copies past the last tile. */
MOE_DEVICE_BODY void moei_gemm_block(const moe_grouped_gemm_args* d, unsigned char* shared,
                                     moei_gemm_shared* s, const int gradient,
                                     const moe_gemm_shape f)
{
    const int elems = (f.tile_m + f.tile_n) * f.tile_k; /* elements of a stage */
    uint16_t* ring = (uint16_t*)shared;
    float* staging = (float*)(ring + f.stages * elems) + moe_warp() * moei_staging_floats(f.wn);
    const int columns = d->c.gated ? f.tile_n / 2 : f.tile_n; /* columns of C in a tile */
    const int steps = (d->k + f.tile_k - 1) / f.tile_k;
    moei_ring r = moei_ring_of(ring, f);
    moei_tiles tiles;
    moei_schedule* schedule = &tiles.schedule;
    moei_loader load;

    schedule->groups = moei_groups_of(d);
    schedule->column_tiles = (d->n + columns - 1) / columns;
    schedule->row_align = f.a_major == MOE_MAJOR_MN ? 8 : 1;
    schedule->tile_start = (int*)((float*)(ring + f.stages * elems) +
                                  f.warps_m * f.warps_n * moei_staging_floats(f.wn));
    tiles.shared = s;
    if (threadIdx.x == 0) s->waits = 1, s->column_tiles = schedule->column_tiles;
    if ((int)blockIdx.x >=
            moei_schedule_build(schedule, &s->scan, d->fault, d->rank, f.tile_m, 0, 0) ||
        !moei_gemm_tables_good(d, &schedule->groups, 0))
        return;

    load.tile = (int)blockIdx.x;
    load.turn = 0;
    moei_loader_tile(&load, d, &tiles, f);
    moei_tile_start(&load, &r, d, &tiles, f);
    for (int turn = 0; (int)(blockIdx.x + turn * gridDim.x) < moei_tiles_count(&tiles); ++turn) {
        moei_mma_c acc[4][4];
        moe_tile_position t;
        moei_tile_zero(acc, f);
        moei_tile_steps(acc, &load, &r, d, &tiles, steps, f);
        t = s->position[turn & 3];
        moei_tile_store(d, &t, acc, staging, gradient, f);
        if (d->done) moei_tile_count(d, s->position + (turn & 3), columns, f);
    }
    moei_copy_wait(0); /* copies of the steps past the last tile */
}

/* Returns the bytes of shared memory that moe_gemm_tile needs. */
MOE_HOST_DEVICE size_t moe_gemm_tile_smem(const moe_gemm_shape f)
{
    return moei_ring_bytes(f) + moei_staging_bytes(f);
}

/* Computes the sums of one tile t in acc, through the ring of stages. All threads of the block call
   it. On return no copy is in flight, but other warps may still read the ring. */
MOE_DEVICE void moei_tile_sum(moei_mma_c acc[4][4], const moe_grouped_gemm_args* d,
                              const moe_tile_position t, uint16_t* ring, const moe_gemm_shape f)
{
    moei_ring r = moei_ring_of(ring, f);
    moei_loader load;
    moei_loader_begin(&load, t, d, f);
    moei_tile_start(&load, &r, d, 0, f);
    moei_tile_zero(acc, f);
    moei_tile_steps(acc, &load, &r, d, 0, (d->k + f.tile_k - 1) / f.tile_k, f);
    moei_copy_wait(0);
}

/* moe_gemm_tile and moe_gemm_tile_gradient; gradient, a literal, tells which. */
MOE_DEVICE void moei_gemm_tile(const moe_grouped_gemm_args* d, const moe_tile_position t,
                               unsigned char* shared, const int gradient, const moe_gemm_shape f)
{
    const int elems = (f.tile_m + f.tile_n) * f.tile_k;
    uint16_t* ring = (uint16_t*)shared;
    float* staging = (float*)(ring + f.stages * elems) + moe_warp() * moei_staging_floats(f.wn);
    moei_mma_c acc[4][4];
    moei_tile_sum(acc, d, t, ring, f);
    moei_tile_store(d, &t, acc, staging, gradient, f);
    __syncthreads();
}

/* Computes one tile of C, with bias and activation, in a kernel of one's own: rows t.row .. t.row +
   tile_m - 1 and the columns of column tile t.column. A column tile has tile_n columns, tile_n / 2
   with a gated activation. Rows outside t.begin .. t.end - 1 and columns from n on are not stored.

   t.begin .. t.end - 1 are the expert's rows: these rows of C, or those from c_table[t.expert] on.
   Their rows of A come from row_index, or have the same numbers. Where a_major is MOE_MAJOR_MN,
   t.row is a multiple of 8.

   d: args that moe_gemm_tile_resolve (check.cuh) fills in from a descriptor on the host. The
   function does not read the offsets or a list of groups, and does not test the fault word for a
   stop fault. A row_index outside A sets the fault word.
   shared: moe_gemm_tile_smem(f) bytes, 128-byte aligned; may be used again after the call.
   f: literals, with the dtype and majors of the descriptor.

   All threads of a block of f.threads call it together. fp16 from sm_75, bf16 from sm_80.

     MOE_KERNEL(128, 1) mine(MOE_ARG(moe_grouped_gemm_args) d)
     {
         MOE_SHARED_DYNAMIC(shared);
         const moe_tile_position t = {0, 0, d.num_rows, (int)blockIdx.x * 64, (int)blockIdx.y};
         moe_gemm_tile(&d, t, shared, moe_gemm_shape_of(MOE_GEMM_SHAPE_64x64, MOE_BF16,
                                                        MOE_MAJOR_K, MOE_MAJOR_K));
     } */
MOE_DEVICE_BODY void moe_gemm_tile(const moe_grouped_gemm_args* d, const moe_tile_position t,
                                   unsigned char* shared, const moe_gemm_shape f)
{
    moei_gemm_tile(d, t, shared, 0, f);
}

/* As moe_gemm_tile, for args of moe_gemm_tile_gradient_resolve: computes one tile of the backward
   pass through an activation (grouped_gradient.cuh). A column tile has tile_n columns of P. */
MOE_DEVICE_BODY void moe_gemm_tile_gradient(const moe_grouped_gemm_args* d,
                                            const moe_tile_position t, unsigned char* shared,
                                            const moe_gemm_shape f)
{
    moei_gemm_tile(d, t, shared, 1, f);
}

#endif
