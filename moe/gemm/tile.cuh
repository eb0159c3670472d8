/* tile.cuh: the pipeline that computes one tile after another of a grouped GEMM.

   A block owns a tile of tile_m rows and tile_n columns of B: its steps are mainloop.cuh's. The ring of
   stages runs on across tiles: while the warps finish one tile and store it, the first stages of the
   next are under way.

   All shape parameters are literals in the stamped kernels, so that the accumulators
   stay in registers and the loops unroll. Gated activations with gate and up apart: the columns of
   a warp are half gate, half up, so that both meet in one warp's epilogue. */
#ifndef MOE_GEMM_TILE_CUH
#define MOE_GEMM_TILE_CUH

#include "args.h"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "schedule.cuh"

/* Where a thread's copies of the current tile come from. K-major operands are copied in passes
   of 32 rows; a thread has row r of each pass and one 16-byte vector of its depth. */
typedef struct moei_loader {
    const char* a[4]; /* A, MOE_MAJOR_K: address of the row of each pass; MN: [0] the column */
    const char* b[2]; /* B: address for even and for odd passes; MN: [0] the column */
    int32_t b_row[2]; /* B: row of B at b[0], b[1] */
    int32_t a_keep;   /* A: bit i: pass i has a row; MN: bytes to copy */
    int32_t tile;     /* number of the tile */
    int32_t turn;     /* how many tiles the block had before it */
    int32_t k;        /* first depth of the step to copy */
} moei_loader;

MOE_DEVICE const char* moei_weight_base(const moe_weights* w, int expert)
{
    if (w->table) return (const char*)w->table[expert];
    return (const char*)w->base + (int64_t)expert * w->expert_stride * 2;
}

MOE_DEVICE const char* moei_weight_up(const moe_weights* w, int expert)
{
    if (w->up_table) return (const char*)w->up_table[expert];
    return (const char*)w->up + (int64_t)expert * w->expert_stride * 2;
}

/* Do a tile's columns come from two places of B, half of them gates and half of them ups? */
MOE_DEVICE bool moei_gemm_halves(const moe_grouped_gemm_args* d)
{
    return d->c.gated == MOE_GATE_UP_CONCATENATED || d->c.gated == MOE_GATE_UP_SEPARATE;
}

/* Points the loader at the first step of tile t. */
MOE_DEVICE void moei_loader_begin(moei_loader* p, moe_tile_position t,
                                  const moe_grouped_gemm_args* d, const moe_gemm_shape f)
{
    const int vector = (int)threadIdx.x % (f.tile_k / 8), r = (int)threadIdx.x / (f.tile_k / 8);
    const bool halves = moei_gemm_halves(d);
    const int64_t ld = d->b.row_stride;
    const char* weight = moei_weight_base(&d->b, t.expert);
    const char* up = d->c.gated == MOE_GATE_UP_SEPARATE ? moei_weight_up(&d->b, t.expert) : weight;
    const int column =
        t.column * (halves ? f.tile_n / 2 : f.tile_n); /* first of B's rows in each half */
    p->k = 0;
    if (d->c.gated == MOE_GATE_UP_CONCATENATED)
        up += (int64_t)d->n * (f.b_major == MOE_MAJOR_K ? ld : 1) * 2;

    if (f.a_major == MOE_MAJOR_K) {
        int from[4]; /* all loads before the first use */
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
        const int m = t.row + (int)threadIdx.x % (f.tile_m / 8) * 8;
        const int64_t left = d->a_rows - m;
        p->a_keep = left >= 8 ? 16 : left > 0 ? (int)left * 2 : 0;
        p->a[0] = (const char*)d->a +
                  ((int)threadIdx.x / (f.tile_m / 8) * d->a_stride + (left > 0 ? m : 0)) * 2;
    }

    if (f.b_major == MOE_MAJOR_K) {
        if (!halves) {
            p->b_row[0] = column + r;
            p->b_row[1] = column + 32 + r;
            p->b[0] = weight + (p->b_row[0] * ld + vector * 8) * 2;
            p->b[1] = p->b[0] + 32 * ld * 2;
        } else if (f.wn == 64) { /* even passes gate, odd passes up */
            p->b_row[0] = p->b_row[1] = column + r;
            p->b[0] = weight + (p->b_row[0] * ld + vector * 8) * 2;
            p->b[1] = up + (p->b_row[0] * ld + vector * 8) * 2;
        } else { /* wn == 32: each pass 16 rows of gate, 16 of up */
            p->b_row[0] = column + r % 16;
            p->b_row[1] = column + 16 + r % 16;
            p->b[0] = (r < 16 ? weight : up) + (p->b_row[0] * ld + vector * 8) * 2;
            p->b[1] = p->b[0] + 16 * ld * 2;
        }
    } else {
        const int j = (int)threadIdx.x % (f.tile_n / 8) * 8; /* column of the stage */
        const int in = j % f.wn, half = f.wn / 2;
        p->b_row[0] = !halves ? column + j : column + j / f.wn * half + in % half;
        p->b[0] = (halves && in >= half ? up : weight) +
                  ((int)threadIdx.x / (f.tile_n / 8) * ld + p->b_row[0]) * 2;
    }
}

/* Copies part `part` of `parts` (literals) of one step of A and B into a stage; after the last
   part the loader stands at the next step. */
MOE_DEVICE void moei_loader_copy(moei_loader* p, const moe_grouped_gemm_args* d, uint16_t* sa,
                                 uint16_t* sb, const int part, const int parts,
                                 const moe_gemm_shape f)
{
    const int tid = (int)threadIdx.x, vector = tid % (f.tile_k / 8), r = tid / (f.tile_k / 8);
    const int depth = d->k - p->k;                    /* what is left of k */
    const int to = moei_swizzled(r, vector * 8, f.tile_k); /* 8 lines on the swizzle is the same */
    const bool halves = moei_gemm_halves(d);
    const int b_rows = d->c.gated == MOE_GATE_UP_INTERLEAVED ? 2 * d->n : d->n;

    if (f.a_major == MOE_MAJOR_K) {
        MOE_UNROLL
        for (int i = part; i < f.tile_m / 32; i += parts) {
            moei_copy16_async(sa + i * 32 * f.tile_k + to, p->a[i],
                              vector * 8 < depth && (p->a_keep >> i & 1) ? 16 : 0);
            p->a[i] += f.tile_k * 2;
        }
    } else {
        const int c = tid % (f.tile_m / 8), rows = f.threads / (f.tile_m / 8);
        MOE_UNROLL
        for (int i = part; i < f.tile_k / rows; i += parts) {
            const int kr = i * rows + tid / (f.tile_m / 8);
            moei_copy16_async(sa + moei_swizzled(kr, c * 8, f.tile_m),
                              p->a[0] + i * rows * d->a_stride * 2, kr < depth ? p->a_keep : 0);
        }
        if (part == parts - 1) p->a[0] += f.tile_k * d->a_stride * 2;
    }
    if (f.b_major == MOE_MAJOR_K) {
        const int step = halves ? 32 : 64; /* rows of B between two even passes */
        MOE_UNROLL
        for (int i = part; i < f.tile_n / 32; i += parts) {
            const int row = p->b_row[i & 1] + (i >> 1) * step;
            moei_copy16_async(sb + i * 32 * f.tile_k + to,
                              p->b[i & 1] + (i >> 1) * step * d->b.row_stride * 2,
                              row < b_rows && vector * 8 < depth ? 16 : 0);
        }
        if (part == parts - 1) {
            p->b[0] += f.tile_k * 2;
            p->b[1] += f.tile_k * 2;
        }
    } else {
        const int c = tid % (f.tile_n / 8), rows = f.threads / (f.tile_n / 8);
        MOE_UNROLL
        for (int i = part; i < f.tile_k / rows; i += parts) {
            const int kr = i * rows + tid / (f.tile_n / 8);
            moei_copy16_async(sb + moei_swizzled(kr, c * 8, f.tile_n),
                              p->b[0] + i * rows * d->b.row_stride * 2,
                              kr < depth && p->b_row[0] < b_rows ? 16 : 0);
        }
        if (part == parts - 1) p->b[0] += f.tile_k * d->b.row_stride * 2;
    }
    if (part == parts - 1) p->k += f.tile_k;
}

/* A block's tiles: what its loader and its warps know of them. */
typedef struct moei_tiles {
    moei_schedule schedule;
    moe_tile_position* position; /* [4] shared: of tile `turn` at turn % 4; the loader is at most
                                    stages - 1 = 2 tiles ahead of the warps */
    int num_tiles;
} moei_tiles;

/* Points the loader at tile p->tile, whose position is written for the warps. */
MOE_DEVICE void moei_loader_tile(moei_loader* p, const moe_grouped_gemm_args* d,
                                 const moei_tiles* s, const moe_gemm_shape f)
{
    const moe_tile_position t = moei_schedule_tile(&s->schedule, p->tile, f.tile_m);
    if (threadIdx.x == 0) s->position[p->turn & 3] = t;
    moei_loader_begin(p, t, d, f);
}

/* Before a step is copied: on to the block's next tile, once the current one has been copied. Past
   the last tile k stays at the end: the copies that follow read nothing and write zeros, which
   nobody reads; so the steps have no branch, and every step closes one group of copies. */
MOE_DEVICE void moei_loader_advance(moei_loader* p, const moe_grouped_gemm_args* d,
                                    const moei_tiles* s, int step, const moe_gemm_shape f)
{
    (void)step;
    if (p->k >= d->k && p->tile < s->num_tiles) {
        p->tile += (int)gridDim.x;
        ++p->turn;
        if (p->tile < s->num_tiles) moei_loader_tile(p, d, s, f);
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

/* Do the tables name an address, aligned to 16 bytes, for each expert that has rows? All threads of
   the block call it. Where they do not, the fault word is set. */
MOE_DEVICE bool moei_gemm_tables_good(const moe_grouped_gemm_args* d, const moei_groups* g)
{
    bool bad = false;
    if (!d->b.table && !d->b.up_table && !d->c.table) return true;
    for (int e = (int)threadIdx.x; e < d->num_experts; e += (int)blockDim.x) {
        const uintptr_t b = d->b.table ? (uintptr_t)d->b.table[e] : 16;
        const uintptr_t up = d->b.up_table ? (uintptr_t)d->b.up_table[e] : 16;
        const uintptr_t c = d->c.table ? (uintptr_t)d->c.table[e] : 16;
        if (moei_expert_end(g, e) > moei_expert_begin(g, e) &&
            (!b || !up || !c || ((b | up | c) & 15) != 0)) {
            bad = true;
            moe_fault_raise(d->fault, MOE_FAULT_BAD_TABLE, d->rank, e);
        }
    }
    return !__syncthreads_or(bad);
}

/* Static shared memory of a block. */
typedef struct moei_gemm_shared {
    moe_block_scan_scratch scan;
    moe_tile_position position[4];
} moei_gemm_shared;

/* A block's life: tiles blockIdx.x, blockIdx.x + gridDim.x, ... In `shared` lie the ring, the warps'
   strips, then tile_start [E + 1]. */
MOE_DEVICE_BODY void moei_gemm_block(const moe_grouped_gemm_args* d, unsigned char* shared,
                                     moei_gemm_shared* s, const moe_gemm_shape f)
{
    const int elems = (f.tile_m + f.tile_n) * f.tile_k; /* of a stage */
    uint16_t* ring = (uint16_t*)shared;
    float* staging = (float*)(ring + f.stages * elems) + moe_warp() * moei_staging_floats(f.wn);
    const int warp_m = moe_warp() % f.warps_m, warp_n = moe_warp() / f.warps_m;
    const int columns = d->c.gated ? f.tile_n / 2 : f.tile_n; /* of C */
    const int steps = (d->k + f.tile_k - 1) / f.tile_k;
    moei_ring r = moei_ring_of(ring, f);
    moei_tiles tiles;
    moei_schedule* schedule = &tiles.schedule;
    moei_loader load;
    int turn = 0;

    schedule->groups.expert_offset = d->expert_offset;
    schedule->groups.num_experts = d->num_experts;
    schedule->groups.num_rows = d->num_rows;
    schedule->column_tiles = (d->n + columns - 1) / columns;
    schedule->row_align = f.a_major == MOE_MAJOR_MN ? 8 : 1;
    schedule->tile_start = (int*)((float*)(ring + f.stages * elems) +
                                  f.warps_m * f.warps_n * moei_staging_floats(f.wn));
    tiles.position = s->position;
    tiles.num_tiles = moei_schedule_build(schedule, &s->scan, d->fault, d->rank, f.tile_m);
    if ((int)blockIdx.x >= tiles.num_tiles || !moei_gemm_tables_good(d, &schedule->groups)) return;

    load.tile = (int)blockIdx.x;
    load.turn = 0;
    moei_loader_tile(&load, d, &tiles, f);
    moei_tile_start(&load, &r, d, &tiles, f);
    for (int tile = (int)blockIdx.x; tile < tiles.num_tiles; tile += (int)gridDim.x) {
        moei_mma_c acc[4][4];
        moe_tile_position t;
        moei_tile_zero(acc, f);
        moei_tile_steps(acc, &load, &r, d, &tiles, steps, f);
        t = s->position[turn++ & 3];
        moei_epilogue_warp(&d->c, d->n, &t, acc, staging, t.row + warp_m * f.wm,
                           t.column * columns + warp_n * (columns / f.warps_n), f);
    }
    moei_copy_wait(0); /* the steps past the last tile */
}

/* Bytes of shared memory that moe_gemm_tile needs. */
MOE_HOST_DEVICE size_t moe_gemm_tile_smem(const moe_gemm_shape f)
{
    return moei_ring_bytes(f) + moei_staging_bytes(f);
}

/* Multiplies one tile by one block, through a ring of stages that moei_loader_copy fills: acc gets
   each warp's sums. On return no copy is under way; other warps may still read the ring. */
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

/* One tile of C for a kernel of one's own: rows row .. row + tile_m - 1 and the columns of tile number
   `column` along N (tile_n columns each, tile_n / 2 with a gated activation), with bias and activation;
   what lies past row `end` or column n is left alone. The expert's rows begin .. end lie at those
   rows of C, or from c_table[expert] on; of A they are row_index's, or themselves. Where a_major is
   MOE_MAJOR_MN, row is a multiple of 8.

   d is what moe_gemm_tile_resolve (grouped.cuh) has made of a descriptor on the host; its offsets
   are not looked at, nor whether the fault word says stop; a row_index outside A sets that word.
   The shape's members are literals, dtype and majors those of the descriptor. All threads of a block of
   f.threads call it together; `shared` has moe_gemm_tile_smem(f) bytes, 128-byte aligned, and may be
   used again afterwards. fp16 from sm_75, bf16 from sm_80.

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
    const int columns = d->c.gated ? f.tile_n / 2 : f.tile_n;
    const int elems = (f.tile_m + f.tile_n) * f.tile_k;
    const int warp_m = moe_warp() % f.warps_m, warp_n = moe_warp() / f.warps_m;
    uint16_t* ring = (uint16_t*)shared;
    float* staging = (float*)(ring + f.stages * elems) + moe_warp() * moei_staging_floats(f.wn);
    moei_mma_c acc[4][4];
    moei_tile_sum(acc, d, t, ring, f);
    moei_epilogue_warp(&d->c, d->n, &t, acc, staging, t.row + warp_m * f.wm,
                       t.column * columns + warp_n * (columns / f.warps_n), f);
    __syncthreads();
}

#endif
