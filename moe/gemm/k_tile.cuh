/* k_tile.cuh: the pipeline that computes one tile after another of a k-grouped GEMM. Called by
   k_grouped.cuh. A tile is tile_m rows and tile_n columns of one expert's C, summed over all rows
   of that expert that both A and B have.

   The ring, the steps and the epilogue are those of every tile (mainloop.cuh, steps.inl,
   epilogue.cuh). Both operands are mn-major: a step is tile_k rows of each, copied in 16-byte
   vectors. The index warps, two for each 32 rows of a step, resolve these rows: even warps those of
   A, odd warps those of B. The index warps read an index three steps before its copies and resolve
   the index two steps before them: no copy waits. Rows past an expert's last are zeros in both. */
#ifndef MOE_GEMM_K_TILE_CUH
#define MOE_GEMM_K_TILE_CUH

#include "args.h"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "schedule.cuh"

/* ---- the loader ---- */

#define MOEI_K_STEP 64 /* most rows of a step: tile_k of the largest tile */

/* In shared memory: the rows of A [0] and B [1] that the next steps copy. Step number n has entry
   n % 4: at least one barrier lies between the writes and the reads of an entry. A row is copied
   where both operands have it. */
typedef struct moei_k_shared {
    int64_t from[4][2][MOEI_K_STEP];       /* bytes from the operand's row 0; 0 for no row */
    uint32_t have[4][2][MOEI_K_STEP / 32]; /* bit i % 32 of word i / 32: row i exists */
} moei_k_shared;

/* The rows begin .. end - 1 that remain of the expert of tile number `tile`. */
typedef struct moei_k_rows {
    int32_t begin, end, tile;
} moei_k_rows;

/* What a thread copies next: one 16-byte vector of A and one of B, of some rows of each step. In an
   index warp each lane has one row of a step: it reads the index three steps before the copies, and
   resolves the row two steps before. */
typedef struct moei_k_loader {
    const char *a, *b;      /* address of the thread's vector in row 0 */
    int32_t a_keep, b_keep; /* bytes of the vector to copy: 16, or 0 past the last column */
    int32_t entry;          /* entry of the step to copy */
    moei_k_rows copy, look; /* rows of the step to copy; of the index to read */
    int32_t index, at;      /* index warps: index read for the step to resolve next; its row r */
    moei_k_shared* shared;
} moei_k_loader;

/* Moves to the block's next tile that has rows where no row of the current one remains. Returns
   true where p->tile changed. */
MOE_DEVICE bool moei_k_rows_next(moei_k_rows* p, const moei_k_schedule* s, const moe_gemm_shape f)
{
    bool moved = false;
    while (p->begin >= p->end && p->tile < s->num_tiles) {
        p->tile += (int)gridDim.x;
        moved = true;
        if (p->tile < s->num_tiles) {
            const moe_tile_position t = moei_k_schedule_tile(s, p->tile, f);
            p->begin = t.begin;
            p->end = t.end;
        }
    }
    return moved;
}

/* Index warps only: reads the index of the lane's row in the next step, of A in even warps and of B
   in odd ones. */
MOE_DEVICE void moei_k_read(moei_k_loader* p, const moe_k_grouped_gemm_args* d,
                            const moei_k_schedule* s, const moe_gemm_shape f)
{
    const int32_t* index = moe_warp() % 2 == 0 ? d->a_index : d->b_index;
    (void)moei_k_rows_next(&p->look, s, f);
    p->at = p->look.begin + moe_warp() / 2 * MOE_WARP_SIZE + moe_lane();
    p->index = p->at >= p->look.end ? -1 : index ? index[p->at] : p->at;
    p->look.begin += f.tile_k;
}

/* Returns true in the index warps. */
MOE_DEVICE bool moei_k_finds(const moe_gemm_shape f)
{
    return moe_warp() < f.tile_k / MOE_WARP_SIZE * 2;
}

/* Index warps: resolves the rows of the step with this entry from the index read before, then reads
   the index of the next step. A row outside its operand sets the fault word and is not summed. */
MOE_DEVICE void moei_k_find(moei_k_loader* p, const moe_k_grouped_gemm_args* d,
                            const moei_k_schedule* s, int entry, const moe_gemm_shape f)
{
    if (moei_k_finds(f)) {
        const int side = moe_warp() % 2, part = moe_warp() / 2;
        const int div = side == 0 ? d->a_div : d->b_div;
        int row = p->index;
        uint32_t have;
        if (div > 1 && row >= 0) row = row / div;
        if (row >= (side == 0 ? d->a_rows : d->b_rows) || row < -1) {
            moe_fault_raise(d->fault, MOE_FAULT_BAD_ROW, d->rank, p->at);
            row = -1;
        }
        have = __ballot_sync(MOE_FULL_WARP, row >= 0);
        if (moe_lane() == 0) p->shared->have[entry][side][part] = have;
        p->shared->from[entry][side][part * MOE_WARP_SIZE + moe_lane()] =
            row < 0 ? 0 : row * (side == 0 ? d->a_stride : d->b_stride) * 2;
        moei_k_read(p, d, s, f);
    }
}

/* Points the thread's copies at its columns of tile p->copy.tile. */
MOE_DEVICE void moei_k_loader_columns(moei_k_loader* p, const moe_k_grouped_gemm_args* d,
                                      const moei_k_schedule* s, const moe_gemm_shape f)
{
    if (p->copy.tile < s->num_tiles) {
        const moe_tile_position t = moei_k_schedule_tile(s, p->copy.tile, f);
        const int i = t.row + (int)threadIdx.x % (f.tile_m / 8) * 8;
        const int j = t.column + (int)threadIdx.x % (f.tile_n / 8) * 8;
        p->a = (const char*)d->a + (i < d->m ? i : 0) * 2;
        p->b = (const char*)d->b + (j < d->n ? j : 0) * 2;
        p->a_keep = i < d->m ? 16 : 0;
        p->b_keep = j < d->n ? 16 : 0;
    }
}

/* Begins with the block's first tile. All threads of the block call it. On return, after the
   barrier, the rows of the first two steps are resolved for every thread. */
MOE_DEVICE void moei_k_loader_begin(moei_k_loader* p, const moe_k_grouped_gemm_args* d,
                                    const moei_k_schedule* s, moei_k_shared* shared,
                                    const moe_gemm_shape f)
{
    const moe_tile_position t = moei_k_schedule_tile(s, (int)blockIdx.x, f);
    p->shared = shared;
    p->entry = 0;
    p->copy.begin = t.begin;
    p->copy.end = t.end;
    p->copy.tile = (int)blockIdx.x;
    p->look = p->copy;
    p->index = -1, p->at = 0;
    moei_k_loader_columns(p, d, s, f);
    if (moei_k_finds(f)) moei_k_read(p, d, s, f);
    moei_k_find(p, d, s, 0, f);
    moei_k_find(p, d, s, 1, f);
    __syncthreads();
}

/* Called before a step is copied (steps.inl): moves to the block's next tile where the current one
   is copied, and resolves the rows of the step after the next. */
MOE_DEVICE void moei_k_loader_advance(moei_k_loader* p, const moe_k_grouped_gemm_args* d,
                                      const moei_k_schedule* s, int step, const moe_gemm_shape f)
{
    (void)step;
    if (moei_k_rows_next(&p->copy, s, f)) moei_k_loader_columns(p, d, s, f);
    moei_k_find(p, d, s, (p->entry + 2) & 3, f);
}

/* Starts the copies of part `part` of `parts` of one operand's rows of a step. A row with
   bit 0 in `have` becomes zeros. width: columns of the operand's tile. */
MOE_DEVICE void moei_k_copy(const int64_t* from, const uint32_t* have, const char* vector, int keep,
                            uint16_t* stage, const int part, const int parts, const int width,
                            const moe_gemm_shape f)
{
    const int column = (int)threadIdx.x % (width / 8) * 8, line = (int)threadIdx.x / (width / 8);
    const int each = f.threads / (width / 8); /* lines of a pass: 32 or a divisor of 32 */
    MOE_UNROLL
    for (int i = part; i < f.tile_k / each; i += parts) {
        const uint32_t bits = have[i * each / 32] >> i * each % 32;
        moei_copy16_async(stage + moei_swizzled(i * each + line, column, width),
                          vector + from[i * each + line], bits >> line & 1 ? keep : 0);
    }
}

/* Starts the copies of part `part` of `parts` of a step of A and B to a stage, sa and sb: of the
   rows that both have. After the last part the loader points at the next step. */
MOE_DEVICE void moei_k_loader_copy(moei_k_loader* p, const moe_k_grouped_gemm_args* d, uint16_t* sa,
                                   uint16_t* sb, const int part, const int parts,
                                   const moe_gemm_shape f)
{
    const moei_k_shared* s = p->shared;
    uint32_t have[MOEI_K_STEP / 32];
    (void)d;
    MOE_UNROLL
    for (int i = 0; i < f.tile_k / 32; ++i)
        have[i] = s->have[p->entry][0][i] & s->have[p->entry][1][i];
    moei_k_copy(s->from[p->entry][0], have, p->a, p->a_keep, sa, part, parts, f.tile_m, f);
    moei_k_copy(s->from[p->entry][1], have, p->b, p->b_keep, sb, part, parts, f.tile_n, f);
    if (part < parts - 1) return;
    p->copy.begin += f.tile_k;
    p->entry = (p->entry + 1) & 3;
}

#define MOEI_LOADER moei_k_loader
#define MOEI_LOADER_ARGS moe_k_grouped_gemm_args
#define MOEI_LOADER_TILES const moei_k_schedule
#define MOEI_TILE_START moei_k_tile_start
#define MOEI_TILE_STEPS moei_k_tile_steps
#include "steps.inl"
#undef MOEI_LOADER
#undef MOEI_LOADER_ARGS
#undef MOEI_LOADER_TILES
#undef MOEI_TILE_START
#undef MOEI_TILE_STEPS

/* ---- the kernel ---- */

/* Returns true where the offsets are in order and within num_rows, and c.table, if any, holds an
   address, 16-byte aligned, for each expert. Otherwise sets the fault word. All threads of the
   block call it. */
MOE_DEVICE bool moei_k_good(const moe_k_grouped_gemm_args* d, const moei_groups* g)
{
    bool bad = false;
    for (int e = (int)threadIdx.x; e < d->num_experts; e += (int)blockDim.x) {
        const uintptr_t c = d->c.table ? (uintptr_t)d->c.table[e] : 16;
        bad |= !moei_group_good(g, e, d->fault, d->rank);
        if (!c || (c & 15) != 0) {
            bad = true;
            moe_fault_raise(d->fault, MOE_FAULT_BAD_TABLE, d->rank, e);
        }
    }
    return !__syncthreads_or(bad);
}

/* Returns the output of one expert: its C, with rows from 0 on. bias, activation and gated are
   literals here, so that the compiler keeps only the store of the sums. */
MOE_DEVICE moe_gemm_output moei_k_output(const moe_k_grouped_gemm_args* d, int expert)
{
    moe_gemm_output c = d->c;
    c.base = c.table ? c.table[expert] : (char*)c.base + expert * d->c_expert_bytes;
    c.table = 0;
    c.bias = 0;
    c.activation = MOE_ACTIVATION_NONE;
    c.gated = 0;
    return c;
}

/* Computes tiles blockIdx.x, blockIdx.x + gridDim.x, ... of all experts; the sums of an expert
   without rows are 0, and are not stored with skip_empty. All threads of the block call it.
   `shared` holds the ring, then each warp's staging. */
MOE_DEVICE_BODY void moei_k_block(const moe_k_grouped_gemm_args* d, unsigned char* shared,
                                  moei_k_shared* s, const moe_gemm_shape f)
{
    uint16_t* ring = (uint16_t*)shared;
    float* staging = (float*)(ring + f.stages * (f.tile_m + f.tile_n) * f.tile_k) +
                     moe_warp() * moei_staging_floats(f.wn);
    const int warp_m = moe_warp() % f.warps_m, warp_n = moe_warp() / f.warps_m;
    const moei_groups groups = {d->expert_offset, d->num_experts, d->num_rows, 0, d->num_experts};
    moei_ring r = moei_ring_of(ring, f);
    moei_k_schedule tiles;
    moei_k_loader load;

    if (!moei_k_good(d, &groups)) return;
    tiles = moei_k_schedule_of(groups, d->m, d->n, f);
    if ((int)blockIdx.x >= tiles.num_tiles) return;
    moei_k_loader_begin(&load, d, &tiles, s, f);
    moei_k_tile_start(&load, &r, d, &tiles, f);
    for (int tile = (int)blockIdx.x; tile < tiles.num_tiles; tile += (int)gridDim.x) {
        const moe_tile_position t = moei_k_schedule_tile(&tiles, tile, f);
        const moe_gemm_output c = moei_k_output(d, t.expert);
        moe_tile_position whole = t; /* for the epilogue begin .. end are rows of C: 0 .. m */
        moei_mma_c acc[4][4];
        if (d->skip_empty && t.end == t.begin) continue;
        moei_tile_zero(acc, f);
        if (t.end > t.begin)
            moei_k_tile_steps(acc, &load, &r, d, &tiles,
                              (t.end - t.begin + f.tile_k - 1) / f.tile_k, f);
        whole.begin = 0;
        whole.end = d->m;
        moei_epilogue_warp(&c, d->n, &whole, acc, staging, t.row + warp_m * f.wm,
                           t.column + warp_n * f.wn, f);
    }
    moei_copy_wait(0); /* copies of the steps past the last tile */
}

#endif
