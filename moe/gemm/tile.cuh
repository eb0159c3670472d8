/* tile.cuh: the pipeline that computes one tile after another of a grouped GEMM.

   A block owns a tile of TM rows and TN columns of B. Its threads copy A and B, KB deep at a
   time, into a ring of stages in shared memory with cp.async; its warps, WM x WN of the tile
   each, multiply what has arrived. The ring runs on across tiles: while the warps finish one
   tile and store it, the first stages of the next are under way.

     stage  A  MOE_MAJOR_K [TM][KB + 8], MOE_MAJOR_MN [KB][TM + 8]   16-bit elements; the 8 more
            B  MOE_MAJOR_K [TN][KB + 8], MOE_MAJOR_MN [KB][TN + 8]   spread rows over the banks

   One barrier a step: it says that the stage to compute has arrived for everyone and that the
   stage to be refilled, computed one step before, is free.

   All shape parameters are literals in the stamped kernels, so that the accumulators
   stay in registers and the loops unroll. Gated activations with gate and up apart: the columns of
   a warp are half gate, half up, so that both meet in one warp's epilogue. */
#ifndef MOE_GEMM_TILE_CUH
#define MOE_GEMM_TILE_CUH

#include "../base/copy.cuh"
#include "desc.h"
#include "epilogue.cuh"
#include "mma.cuh"
#include "schedule.cuh"

/* Shapes of tiles: rows, columns of B, depth of a step, warps along rows and columns, stages.
   Threads * 8 / depth are 32, warp tiles at most 64 x 64. */
#define MOE_GEMM_SHAPE_128x256 128, 256, 64, 2, 4, 3
#define MOE_GEMM_SHAPE_128x128 128, 128, 32, 2, 2, 3
#define MOE_GEMM_SHAPE_32x128 32, 128, 64, 2, 4, 3
#define MOE_GEMM_SHAPE_64x64 64, 64, 32, 2, 2, 2

/* Elements of one stage of an operand `rows` wide. */
MOE_HOST_DEVICE int moei_stage_elems(int rows, int depth, int major)
{
    return major == MOE_MAJOR_MN ? depth * (rows + 8) : rows * (depth + 8);
}

/* Shared memory of a block, bytes: the ring, the epilogue's staging, then tile_start [E + 1]. */
MOE_HOST_DEVICE size_t moei_tile_smem(int tm, int tn, int kb, int stages, int warps, int wn,
                                      int a_major, int b_major, int num_experts)
{
    return (size_t)stages * 2 *
               (size_t)(moei_stage_elems(tm, kb, a_major) + moei_stage_elems(tn, kb, b_major)) +
           (size_t)warps * 16 * (size_t)(wn + 4) * 4 + ((size_t)num_experts + 1) * 4;
}

/* Where a thread's copies of the current tile come from. K-major operands are copied in passes
   of 32 rows; a thread has row r of each pass and one 16-byte piece of its depth. */
typedef struct moei_loader {
    const char* a[4]; /* A, MOE_MAJOR_K: address of the row of each pass; MN: [0] the column */
    const char* b[2]; /* B: address for even and for odd passes; MN: [0] the column */
    int32_t b_row[2]; /* B: row of C's columns that belongs to b[0], b[1] */
    int32_t a_keep;   /* A: bit i: pass i has a row; MN: bytes to copy */
    int32_t tile;     /* number of the tile */
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
MOE_DEVICE bool moei_gemm_halves(const moe_grouped_gemm_desc* d)
{
    return d->gate_up == MOE_GATE_UP_CONCATENATED || d->gate_up == MOE_GATE_UP_SEPARATE;
}

/* Points the loader at the first step of tile t, whose number is `index`. */
MOE_DEVICE void moei_loader_begin(moei_loader* p, moei_tile t, int index,
                                  const moe_grouped_gemm_desc* d, const int tm, const int tn,
                                  const int kb, const int wn, const int a_major, const int b_major)
{
    const int piece = (int)threadIdx.x % (kb / 8), r = (int)threadIdx.x / (kb / 8);
    const bool halves = moei_gemm_halves(d);
    const int64_t ld = d->b.row_stride;
    const char* weight = moei_weight_base(&d->b, t.expert);
    const char* up = d->gate_up == MOE_GATE_UP_SEPARATE ? moei_weight_up(&d->b, t.expert) : weight;
    const int column = t.column * (halves ? tn / 2 : tn); /* first of B's rows in each half */
    p->tile = index;
    p->k = 0;
    if (d->gate_up == MOE_GATE_UP_CONCATENATED)
        up += (int64_t)d->n * (b_major == MOE_MAJOR_K ? ld : 1) * 2;

    if (a_major == MOE_MAJOR_K) {
        p->a_keep = 0;
        MOEI_UNROLL
        for (int i = 0; i < tm / 32; ++i) {
            const int m = t.row + i * 32 + r;
            int row = -1;
            if (m < t.end) {
                row = d->row_index ? d->row_index[m] : m;
                if (row >= 0) row = row / d->row_div;
                if (row >= d->a_rows || row < -1) {
                    if (piece == 0) moei_fault_raise(d->fault, MOE_FAULT_BAD_ROW, 0, m);
                    row = -1;
                }
            }
            p->a_keep |= (row >= 0 ? 1 : 0) << i;
            p->a[i] = (const char*)d->a + ((row >= 0 ? row : 0) * d->a_stride + piece * 8) * 2;
        }
    } else {
        const int m = t.row + (int)threadIdx.x % (tm / 8) * 8;
        const int64_t left = d->a_rows - m;
        p->a_keep = left >= 8 ? 16 : left > 0 ? (int)left * 2 : 0;
        p->a[0] = (const char*)d->a +
                  ((int)threadIdx.x / (tm / 8) * d->a_stride + (left > 0 ? m : 0)) * 2;
    }

    if (b_major == MOE_MAJOR_K) {
        if (!halves) {
            p->b_row[0] = column + r;
            p->b_row[1] = column + 32 + r;
            p->b[0] = weight + (p->b_row[0] * ld + piece * 8) * 2;
            p->b[1] = p->b[0] + 32 * ld * 2;
        } else if (wn == 64) { /* even passes gate, odd passes up */
            p->b_row[0] = p->b_row[1] = column + r;
            p->b[0] = weight + (p->b_row[0] * ld + piece * 8) * 2;
            p->b[1] = up + (p->b_row[0] * ld + piece * 8) * 2;
        } else { /* wn == 32: each pass 16 rows of gate, 16 of up */
            p->b_row[0] = column + r % 16;
            p->b_row[1] = column + 16 + r % 16;
            p->b[0] = (r < 16 ? weight : up) + (p->b_row[0] * ld + piece * 8) * 2;
            p->b[1] = p->b[0] + 16 * ld * 2;
        }
    } else {
        const int j = (int)threadIdx.x % (tn / 8) * 8; /* column of the stage */
        const int in = j % wn, half = wn / 2;
        p->b_row[0] = !halves ? column + j : column + j / wn * half + in % half;
        p->b[0] = (halves && in >= half ? up : weight) +
                  ((int)threadIdx.x / (tn / 8) * ld + p->b_row[0]) * 2;
    }
}

/* Copies part `part` of `parts` (literals) of one step of A and B into a stage; after the last
   part the loader stands at the next step. */
MOE_DEVICE void moei_loader_copy(moei_loader* p, const moe_grouped_gemm_desc* d, uint16_t* sa,
                                 uint16_t* sb, const int part, const int parts, const int tm,
                                 const int tn, const int kb, const int threads, const int a_major,
                                 const int b_major)
{
    const int tid = (int)threadIdx.x, piece = tid % (kb / 8), r = tid / (kb / 8);
    const int depth = d->k - p->k; /* what is left of k */
    const bool halves = moei_gemm_halves(d);
    const int b_rows = d->gate_up == MOE_GATE_UP_INTERLEAVED ? 2 * d->n : d->n;

    if (a_major == MOE_MAJOR_K) {
        MOEI_UNROLL
        for (int i = part; i < tm / 32; i += parts) {
            moei_copy16_async(sa + (i * 32 + r) * (kb + 8) + piece * 8, p->a[i],
                              piece * 8 < depth && (p->a_keep >> i & 1) ? 16 : 0);
            p->a[i] += kb * 2;
        }
    } else {
        const int c = tid % (tm / 8), rows = threads / (tm / 8);
        MOEI_UNROLL
        for (int i = part; i < kb / rows; i += parts) {
            const int kr = i * rows + tid / (tm / 8);
            moei_copy16_async(sa + kr * (tm + 8) + c * 8, p->a[0] + i * rows * d->a_stride * 2,
                              kr < depth ? p->a_keep : 0);
        }
        if (part == parts - 1) p->a[0] += kb * d->a_stride * 2;
    }
    if (b_major == MOE_MAJOR_K) {
        const int step = halves ? 32 : 64; /* rows of B between two even passes */
        MOEI_UNROLL
        for (int i = part; i < tn / 32; i += parts) {
            const int row = p->b_row[i & 1] + (i >> 1) * step;
            moei_copy16_async(sb + (i * 32 + r) * (kb + 8) + piece * 8,
                              p->b[i & 1] + (i >> 1) * step * d->b.row_stride * 2,
                              row < b_rows && piece * 8 < depth ? 16 : 0);
        }
        if (part == parts - 1) {
            p->b[0] += kb * 2;
            p->b[1] += kb * 2;
        }
    } else {
        const int c = tid % (tn / 8), rows = threads / (tn / 8);
        MOEI_UNROLL
        for (int i = part; i < kb / rows; i += parts) {
            const int kr = i * rows + tid / (tn / 8);
            moei_copy16_async(sb + kr * (tn + 8) + c * 8, p->b[0] + i * rows * d->b.row_stride * 2,
                              kr < depth && p->b_row[0] < b_rows ? 16 : 0);
        }
        if (part == parts - 1) p->b[0] += kb * d->b.row_stride * 2;
    }
    if (part == parts - 1) p->k += kb;
}

/* Before a step is copied: on to the block's next tile, once the current one has been copied. Past
   the last tile k stays at the end: the copies that follow read nothing and write zeros, which
   nobody reads; so the steps have no branch, and every step closes one group of copies. */
MOE_DEVICE void moei_loader_advance(moei_loader* p, const moe_grouped_gemm_desc* d,
                                    const moei_schedule* s, int num_tiles, const int tm,
                                    const int tn, const int kb, const int wn, const int a_major,
                                    const int b_major)
{
    if (p->k >= d->k && p->tile < num_tiles) {
        p->tile += (int)gridDim.x;
        if (p->tile < num_tiles)
            moei_loader_begin(p, moei_schedule_tile(s, p->tile, tm), p->tile, d, tm, tn, kb, wn,
                              a_major, b_major);
    }
}

/* Pieces of A and B that a warp multiplies at depth k of a stage. */
MOE_DEVICE void moei_tile_fragments(moei_mma_a* a, moei_mma_b* b, const uint16_t* sa,
                                    const uint16_t* sb, int warp_m, int warp_n, const int k,
                                    const int tm, const int tn, const int kb, const int wm,
                                    const int wn, const int dtype, const int a_major,
                                    const int b_major)
{
    const int lda = a_major == MOE_MAJOR_K ? kb + 8 : tm + 8;
    const int ldb = b_major == MOE_MAJOR_K ? kb + 8 : tn + 8;
    MOEI_UNROLL
    for (int i = 0; i < wm / 16; ++i) {
        const int m = warp_m * wm + i * 16;
        moei_mma_load_a(&a[i], sa + (a_major == MOE_MAJOR_K ? m * lda + k : k * lda + m), lda,
                        dtype, a_major);
    }
    MOEI_UNROLL
    for (int j = 0; j < wn / 16; ++j) {
        const int n = warp_n * wn + j * 16;
        moei_mma_load_b(&b[j], sb + (b_major == MOE_MAJOR_K ? n * ldb + k : k * ldb + n), ldb,
                        dtype, b_major);
    }
}

MOE_DEVICE void moei_tile_zero(moei_mma_c acc[4][4], const int wm, const int wn)
{
    MOEI_UNROLL
    for (int i = 0; i < wm / 16; ++i)
        MOEI_UNROLL
        for (int j = 0; j < wn / 16; ++j) moei_mma_zero(&acc[i][j]);
}

/* One step of a warp: multiplies the stage that has arrived, while the loader's next step is copied
   to the one that is free. */
MOE_DEVICE void moei_tile_step(moei_mma_c acc[4][4], moei_loader* load,
                               const moe_grouped_gemm_desc* d, const uint16_t* stage,
                               uint16_t* refill, int warp_m, int warp_n, const int tm, const int tn,
                               const int kb, const int warps_m, const int warps_n, const int dtype,
                               const int a_major, const int b_major)
{
    const int wm = tm / warps_m, wn = tn / warps_n, a_elems = moei_stage_elems(tm, kb, a_major);
    moei_mma_a a[2][4];
    moei_mma_b b[2][4];
    moei_tile_fragments(a[0], b[0], stage, stage + a_elems, warp_m, warp_n, 0, tm, tn, kb, wm, wn,
                        dtype, a_major, b_major);
    MOEI_UNROLL
    for (int k = 0; k < kb; k += 16) { /* the next pieces and copies go out first */
        const int now = k / 16 & 1;
        if (k + 16 < kb)
            moei_tile_fragments(a[!now], b[!now], stage, stage + a_elems, warp_m, warp_n, k + 16,
                                tm, tn, kb, wm, wn, dtype, a_major, b_major);
        moei_loader_copy(load, d, refill, refill + a_elems, k / 16, kb / 16, tm, tn, kb,
                         warps_m * warps_n * 32, a_major, b_major);
        MOEI_UNROLL
        for (int m = 0; m < wm / 16; ++m) {
            MOEI_UNROLL
            for (int n = 0; n < wn / 16; ++n)
                moei_mma(&acc[m][n], &a[now][m], &b[now][n], dtype);
        }
    }
    moei_copy_commit();
}

/* Do the tables name an address, aligned to 16 bytes, for each expert that has rows? All threads of
   the block call it. Where they do not, the fault word is set. */
MOE_DEVICE bool moei_gemm_tables_good(const moe_grouped_gemm_desc* d, const moei_schedule* s)
{
    bool bad = false;
    if (!d->b.table && !d->b.up_table && !d->c_table) return true;
    for (int e = (int)threadIdx.x; e < d->num_experts; e += (int)blockDim.x) {
        const uintptr_t b = d->b.table ? (uintptr_t)d->b.table[e] : 16;
        const uintptr_t up = d->b.up_table ? (uintptr_t)d->b.up_table[e] : 16;
        const uintptr_t c = d->c_table ? (uintptr_t)d->c_table[e] : 16;
        if (moei_expert_end(s, e) > moei_expert_begin(s, e) &&
            (!b || !up || !c || ((b | up | c) & 15) != 0)) {
            bad = true;
            moei_fault_raise(d->fault, MOE_FAULT_BAD_TABLE, 0, e);
        }
    }
    return !__syncthreads_or(bad);
}

/* A block's life: tiles blockIdx.x, blockIdx.x + gridDim.x, ... */
MOE_DEVICE_BODY void moei_gemm_block(const moe_grouped_gemm_desc* d, unsigned char* shared,
                                     moei_block_scan_scratch* scratch, const int tm, const int tn,
                                     const int kb, const int warps_m, const int warps_n,
                                     const int stages, const int dtype, const int a_major,
                                     const int b_major)
{
    const int wm = tm / warps_m, wn = tn / warps_n, threads = warps_m * warps_n * 32;
    const int a_elems = moei_stage_elems(tm, kb, a_major),
              b_elems = moei_stage_elems(tn, kb, b_major);
    uint16_t* ring = (uint16_t*)shared;
    float* staging = (float*)(ring + stages * (a_elems + b_elems)) + moei_warp() * 16 * (wn + 4);
    const int warp_m = moei_warp() % warps_m, warp_n = moei_warp() / warps_m;
    const int steps = (d->k + kb - 1) / kb;
    const int columns = d->gate_up ? tn / 2 : tn; /* of C */
    moei_schedule s;
    moei_loader load;
    int num_tiles, step = 0; /* steps computed so far, which names the ring's stage */

    s.expert_offset = d->expert_offset;
    s.num_experts = d->num_experts;
    s.num_rows = d->num_rows;
    s.column_tiles = (d->n + columns - 1) / columns;
    s.row_align = a_major == MOE_MAJOR_MN ? 8 : 1;
    s.tile_start =
        (int*)((float*)(ring + stages * (a_elems + b_elems)) + warps_m * warps_n * 16 * (wn + 4));
    num_tiles = moei_schedule_build(&s, scratch, d->fault, tm);
    if ((int)blockIdx.x >= num_tiles || !moei_gemm_tables_good(d, &s)) return;

    moei_loader_begin(&load, moei_schedule_tile(&s, (int)blockIdx.x, tm), (int)blockIdx.x, d, tm,
                      tn, kb, wn, a_major, b_major);
    for (int i = 0; i < stages - 1; ++i) {
        uint16_t* stage = ring + i * (a_elems + b_elems);
        moei_loader_advance(&load, d, &s, num_tiles, tm, tn, kb, wn, a_major, b_major);
        moei_loader_copy(&load, d, stage, stage + a_elems, 0, 1, tm, tn, kb, threads, a_major,
                         b_major);
        moei_copy_commit();
    }

    for (int tile = (int)blockIdx.x; tile < num_tiles; tile += (int)gridDim.x) {
        moei_mma_c acc[4][4];
        moei_tile_zero(acc, wm, wn);
        for (int i = 0; i < steps; ++i, ++step) {
            const uint16_t* stage = ring + step % stages * (a_elems + b_elems);
            uint16_t* refill = ring + (step + stages - 1) % stages * (a_elems + b_elems);
            moei_copy_wait(stages - 2);
            __syncthreads();
            moei_loader_advance(&load, d, &s, num_tiles, tm, tn, kb, wn, a_major, b_major);
            moei_tile_step(acc, &load, d, stage, refill, warp_m, warp_n, tm, tn, kb, warps_m,
                           warps_n, dtype, a_major, b_major);
        }
        {
            const moei_tile t = moei_schedule_tile(&s, tile, tm);
            moei_epilogue_warp(d, &t, acc, staging, t.row + warp_m * wm,
                               t.column * columns + warp_n * (columns / warps_n), wm, wn);
        }
    }
    moei_copy_wait(0); /* the steps past the last tile */
}

/* Bytes of shared memory that moe_gemm_tile wants, for instance
   moe_gemm_tile_smem(MOE_GEMM_SHAPE_64x64, a_major, b_major). */
MOE_HOST_DEVICE size_t moe_gemm_tile_smem(int tm, int tn, int kb, int warps_m, int warps_n,
                                          int stages, int a_major, int b_major)
{
    return moei_tile_smem(tm, tn, kb, stages, warps_m * warps_n, tn / warps_n, a_major, b_major, 0);
}

/* Multiplies one tile by one block, through a ring of stages that moei_loader_copy fills: acc gets
   each warp's sums. On return no copy is under way; other warps may still read the ring. */
MOE_DEVICE void moei_tile_sum(moei_mma_c acc[4][4], const moe_grouped_gemm_desc* d,
                              const moei_tile t, uint16_t* ring, const int tm, const int tn,
                              const int kb, const int warps_m, const int warps_n, const int stages,
                              const int dtype, const int a_major, const int b_major)
{
    const int wm = tm / warps_m, wn = tn / warps_n, threads = warps_m * warps_n * 32;
    const int a_elems = moei_stage_elems(tm, kb, a_major);
    const int elems = a_elems + moei_stage_elems(tn, kb, b_major); /* of a stage */
    const int warp_m = moei_warp() % warps_m, warp_n = moei_warp() / warps_m;
    const int steps = (d->k + kb - 1) / kb;
    moei_loader load;
    moei_loader_begin(&load, t, 0, d, tm, tn, kb, wn, a_major, b_major);
    for (int i = 0; i < stages - 1; ++i) { /* past the end of k the copies read nothing */
        moei_loader_copy(&load, d, ring + i * elems, ring + i * elems + a_elems, 0, 1, tm, tn, kb,
                         threads, a_major, b_major);
        moei_copy_commit();
    }
    moei_tile_zero(acc, wm, wn);
    for (int i = 0; i < steps; ++i) {
        moei_copy_wait(stages - 2);
        __syncthreads();
        moei_tile_step(acc, &load, d, ring + i % stages * elems,
                       ring + (i + stages - 1) % stages * elems, warp_m, warp_n, tm, tn, kb,
                       warps_m, warps_n, dtype, a_major, b_major);
    }
    moei_copy_wait(0);
}

/* One tile of C for a kernel of one's own: rows row .. row + tm - 1 and the columns of tile number
   `column` along N (tn columns each, tn / 2 with a gated activation), with bias and activation;
   what lies past row `end` or column n is left alone. The expert's rows begin .. end lie at those
   rows of C, or from c_table[expert] on; of A they are row_index's, or themselves. Where a_major is
   MOE_MAJOR_MN, row is a multiple of 8.

   d is a descriptor that moe_gemm_tile_prepare (grouped.cuh) has filled in on the host; its offsets
   are not looked at, nor whether the fault word says stop; a row_index outside A sets that word.
   The shape (MOE_GEMM_SHAPE_*), dtype and majors are literals and the descriptor's own. All threads
   of a block of warps_m * warps_n warps call it together; `shared` has moe_gemm_tile_smem(...)
   bytes, 128-byte aligned, and may be used again afterwards. fp16 from sm_75, bf16 from sm_80.

     MOE_KERNEL(128, 1) mine(MOE_ARG(moe_grouped_gemm_desc) d)
     {
         MOE_SHARED_DYNAMIC(shared);
         moe_gemm_tile(&d, 0, 0, d.num_rows, blockIdx.x * 64, blockIdx.y, shared,
                       MOE_GEMM_SHAPE_64x64, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K);
     } */
MOE_DEVICE_BODY void moe_gemm_tile(const moe_grouped_gemm_desc* d, int expert, int begin, int end,
                                   int row, int column, unsigned char* shared, const int tm,
                                   const int tn, const int kb, const int warps_m, const int warps_n,
                                   const int stages, const int dtype, const int a_major,
                                   const int b_major)
{
    const int wm = tm / warps_m, wn = tn / warps_n, columns = d->gate_up ? tn / 2 : tn;
    const int elems = moei_stage_elems(tm, kb, a_major) + moei_stage_elems(tn, kb, b_major);
    const int warp_m = moei_warp() % warps_m, warp_n = moei_warp() / warps_m;
    uint16_t* ring = (uint16_t*)shared;
    const moei_tile t = {expert, begin, end, row, column};
    moei_mma_c acc[4][4];
    moei_tile_sum(acc, d, t, ring, tm, tn, kb, warps_m, warps_n, stages, dtype, a_major, b_major);
    moei_epilogue_warp(d, &t, acc, (float*)(ring + stages * elems) + moei_warp() * 16 * (wn + 4),
                       row + warp_m * wm, column * columns + warp_n * (columns / warps_n), wm, wn);
    __syncthreads();
}

#endif
