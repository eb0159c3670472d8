/* tile.cuh: one tile of a block-sparse product, for all of sdd, dsd and dds.

   The host turns each of them into one form, C = X * Y with X [M, K] and Y [K, N] (plan.cuh): X is
   the sparse operand of dsd, of dds the transpose of it (and C is stored turned); of sdd, X and Y
   are the dense operands. What is sparse is then a list of blocks for each strip of M:

     dsd, dds   the blocks of X in a strip of M: which depths k are multiplied
     sdd        the blocks of C in a strip of M: which columns n stand side by side in the tile

   A block owns TM rows and TN columns of C. Its threads copy X and Y, KB deep at a time, into a
   ring of stages in shared memory with cp.async; its warps, WM x WN of the tile each, multiply what
   has arrived. A barrier a step, placed before the last products of a stage, whose pieces are in
   registers by then: behind it the next stage may be read and the one before may be refilled.

     stage  K along memory [rows][KB + 8], else [KB][rows + 8]   the 8 more spread rows over the
                                                                  banks

   Addresses come in two parts that are added: one of each 16 rows (or columns) of the tile, fixed,
   in shared memory, and one of each 16 deep, which the list names. So a tile can be put together
   from blocks anywhere, of 16 elements and more, and tables cost nothing where there are none.

   Several strips of blocks lower than TM share a tile. A block that one strip has and another has
   not, is not copied for the latter, and its products are left out. */
#ifndef MOE_BLOCK_SPARSE_TILE_CUH
#define MOE_BLOCK_SPARSE_TILE_CUH

#include "../base/copy.cuh"
#include "../base/fault.cuh"
#include "../gemm/epilogue.cuh"
#include "desc.h"

/* Rows of X, columns of Y, warps along each, stages, blocks a multiprocessor. Depth of a step: */
#define MOEI_BLOCK_DEPTH 32
#define MOEI_BLOCK_CHUNKS (MOEI_BLOCK_DEPTH / 16)

/* An operand, or C, with its axis along the strips of blocks and the other one. */
typedef struct moei_block_matrix {
    const char* base;
    const void* const* table; /* address of each strip of blocks along the shared axis; or null */
    int64_t stride;           /* elements between rows as they lie */
    int32_t major;            /* X, Y: moe_major; C: MOE_MAJOR_MN: stored turned */
} moei_block_matrix;

/* What a launch needs; made by plan.cuh. */
typedef struct moei_block_args {
    moei_block_matrix x, y, c;
    const int32_t *begin, *end; /* [strips] where each strip's blocks stand in the list */
    const int32_t* block;       /* number of each along the other axis */
    const int32_t* info;        /* of each: packed: its place; where strips are joined: bits,
                                       which of them have it; null: its number in the list */
    uint64_t* fault;
    int32_t m, n, k;
    int32_t sparse_c; /* sdd */
    int32_t packed;
    int32_t block_m, block_other; /* log2 of the block's height along M, width along K or N */
    int32_t strip_m;              /* rows of a strip of the list: a block's, or a tile's */
    int32_t others, max_blocks;   /* blocks along the other axis; entries of the list */
    int32_t tiles_m, tiles_n;
    int32_t c_dtype;
} moei_block_args;

/* What the threads of a block share beside the ring. Chunks are 16 rows, columns or depths. */
typedef struct moei_block_shared {
    uint64_t x[8], y[16]; /* address parts of the row chunks, of the column chunks */
    uint32_t have[16];    /* bits: the row chunks that a column chunk is multiplied with */
    uint32_t live[8];     /* the same of each chunk of each stage */
    uint32_t rows;        /* the same of the tile: those that C has */
} moei_block_shared;

/* Elements of a stage of `rows` rows, whichever way it lies. */
MOE_HOST_DEVICE int moei_block_stage(int rows)
{
    return rows > MOEI_BLOCK_DEPTH ? rows * (MOEI_BLOCK_DEPTH + 8) : MOEI_BLOCK_DEPTH * (rows + 8);
}

/* Dynamic shared memory of a block, bytes: the ring, which the epilogue uses again. */
MOE_HOST size_t moei_block_smem(int tm, int tn, int warps_m, int warps_n, int stages)
{
    const size_t ring = (size_t)stages * 2 * (size_t)(moei_block_stage(tm) + moei_block_stage(tn));
    const int wide = tm / warps_m > tn / warps_n ? tm / warps_m : tn / warps_n;
    const size_t strips = (size_t)warps_m * (size_t)warps_n * 16 * (size_t)(wide + 8) * 4;
    return ring > strips ? ring : strips;
}

/* Where a tile lies. */
typedef struct moei_block_where {
    int32_t row, strip, rows; /* first row in M, its strip, rows that there are */
    int32_t column, columns;  /* first column among those the strip has, columns that there are */
    int32_t begin, end;       /* the strip's list */
} moei_block_where;

#define MOEI_BLOCK_BAND 16 /* strips of tiles that share the columns they read */

MOE_DEVICE moei_block_where moei_block_find(const moei_block_args* d, int index, const int tm,
                                            const int tn)
{
    const int step = d->strip_m < tm ? d->strip_m : tm;
    const int band = index / (MOEI_BLOCK_BAND * d->tiles_n);
    const int in = index - band * MOEI_BLOCK_BAND * d->tiles_n;
    const int left = d->tiles_m - band * MOEI_BLOCK_BAND;
    const int height = left < MOEI_BLOCK_BAND ? left : MOEI_BLOCK_BAND;
    const int column = in / height;
    moei_block_where t;
    t.row = (band * MOEI_BLOCK_BAND + in - column * height) * step;
    t.strip = t.row / d->strip_m;
    t.rows = d->m - t.row < step ? d->m - t.row : step;
    t.column = column * tn;
    t.begin = d->begin[t.strip];
    t.end = d->end[t.strip];
    if (t.begin < 0 || t.end < t.begin || t.end > d->max_blocks) {
        moei_fault_raise(d->fault, MOE_FAULT_BAD_BLOCK, 0, t.begin);
        t.end = t.begin = 0;
    }
    t.columns = d->n - t.column;
    if (d->sparse_c) {
        const int last = t.end > t.begin ? d->block[t.end - 1] : -1;
        t.columns = ((t.end - t.begin) << d->block_other) - t.column;
        if (last == d->others - 1) t.columns -= (d->others << d->block_other) - d->n;
    }
    if (t.columns > tn) t.columns = tn;
    return t;
}

/* An entry of a strip's list: block < 0 where there is none. */
typedef struct moei_block_entry {
    int32_t block, info;
} moei_block_entry;

MOE_DEVICE moei_block_entry moei_block_read(const moei_block_args* d, const moei_block_where* t,
                                            int at)
{
    moei_block_entry e = {-1, 0};
    if (t->begin + at < t->end) {
        e.block = d->block[t->begin + at];
        e.info = d->info ? d->info[t->begin + at] : t->begin + at;
    }
    return e;
}

/* Is it in range, and behind the one before it? If not, it counts as none and the fault word is
   set. */
MOE_DEVICE void moei_block_test(const moei_block_args* d, const moei_block_where* t, int at,
                                int before, moei_block_entry* e)
{
    if (t->begin + at >= t->end) return;
    if ((uint32_t)e->block >= (uint32_t)d->others || e->block <= before ||
        (d->packed && (uint32_t)e->info >= (uint32_t)d->max_blocks)) {
        moei_fault_raise(d->fault, MOE_FAULT_BAD_BLOCK, 0, t->begin + at);
        e->block = -1;
    }
}

/* Bits of the row chunks that an entry is for. */
MOE_DEVICE uint32_t moei_block_rows(const moei_block_args* d, int info, const int tm)
{
    uint32_t rows = 0;
    if (d->strip_m >> d->block_m <= 1) return (1u << (tm / 16)) - 1;
    MOEI_UNROLL
    for (int i = 0; i < tm / 16; ++i) rows |= ((uint32_t)info >> (i * 16 >> d->block_m) & 1u) << i;
    return rows;
}

/* Address of strip `block` of a matrix with a table, 0 after a fault. */
MOE_DEVICE uint64_t moei_block_strip(const moei_block_args* d, const moei_block_matrix* x,
                                     int block)
{
    const uint64_t p = (uint64_t)(uintptr_t)x->table[block];
    if (p != 0 && p % 16 == 0) return p;
    moei_fault_raise(d->fault, MOE_FAULT_BAD_TABLE, 0, block);
    return 0;
}

/* Bytes between rows of the tile, and between depths, of 16-bit elements as they lie. */
MOE_DEVICE int64_t moei_block_step(const moei_block_matrix* x, const int major)
{
    return x->major == major ? x->stride * 2 : 2;
}

/* Fills the address parts of the chunks of X and Y and the bits that go with them. */
MOE_DEVICE void moei_block_address(const moei_block_args* d, const moei_block_where* t,
                                   moei_block_shared* s, const int tm, const int tn)
{
    const int tid = (int)threadIdx.x;
    if (tid < tm / 16) {
        const int row = t->row + tid * 16, in = row - t->strip * d->strip_m;
        const int64_t step = moei_block_step(&d->x, MOE_MAJOR_K);
        bool there = tid * 16 < t->rows;
        uint64_t p = (uint64_t)(uintptr_t)d->x.base + (uint64_t)((d->packed ? in : row) * step);
        if (d->sparse_c) {
            p = (uint64_t)(uintptr_t)d->x.base + (uint64_t)(row * step);
            if (d->x.table && there) {
                const uint64_t strip = moei_block_strip(d, &d->x, row >> d->block_m);
                p = strip + (uint64_t)((row & ((1 << d->block_m) - 1)) * step);
                there = strip != 0;
            }
        } else if (d->c.table && there) {
            there = d->c.table[row >> d->block_m] != 0;
        }
        s->x[tid] = p;
        if (there) atomicOr(&s->rows, 1u << tid);
    }
    if (tid >= 32 && tid < 32 + tn / 16) { /* another warp */
        const int j = tid - 32, column = t->column + j * 16;
        const int64_t step = moei_block_step(&d->y, MOE_MAJOR_K);
        uint64_t p = (uint64_t)(uintptr_t)d->y.base + (uint64_t)(column * step);
        uint32_t have = j * 16 < t->columns ? (1u << (tm / 16)) - 1 : 0;
        if (d->sparse_c) {
            const int at = column >> d->block_other, in = column & ((1 << d->block_other) - 1);
            moei_block_entry e = moei_block_read(d, t, at);
            const int before = at > 0 && e.block >= 0 ? d->block[t->begin + at - 1] : -1;
            moei_block_test(d, t, at, before, &e);
            p = (uint64_t)(uintptr_t)d->y.base;
            have = 0;
            if (e.block >= 0 && j * 16 < t->columns) {
                have = moei_block_rows(d, e.info, tm);
                p += (uint64_t)((e.block * ((int64_t)1 << d->block_other) + in) * step);
                if (d->y.table) {
                    p = moei_block_strip(d, &d->y, e.block);
                    if (p == 0) have = 0;
                    p += (uint64_t)(in * step);
                }
            }
        } else if (d->y.table) {
            p = (uint64_t)(column * step);
        }
        s->y[j] = p;
        s->have[j] = have;
    }
}

/* What a step is made of: where each of its chunks of depth lies, and how much of it there is. */
typedef struct moei_block_depth {
    uint64_t x[MOEI_BLOCK_CHUNKS], y[MOEI_BLOCK_CHUNKS]; /* address parts */
    int32_t count[MOEI_BLOCK_CHUNKS];                    /* depths that there are, 0 .. 16 */
    uint32_t rows[MOEI_BLOCK_CHUNKS];                    /* bits: row chunks that have it */
} moei_block_depth;

/* A walk along the depth of a tile. */
typedef struct moei_block_walk {
    int32_t depth; /* of the step to copy, in the tile's own count */
    int32_t block; /* entry that it lies in */
    int32_t info;
    int32_t before;                            /* the block of the last good entry */
    moei_block_entry ahead[MOEI_BLOCK_CHUNKS]; /* entries read before they are needed */
} moei_block_walk;

MOE_DEVICE void moei_block_look_ahead(const moei_block_args* d, const moei_block_where* t,
                                      moei_block_walk* w)
{
    MOEI_UNROLL
    for (int c = 0; c < MOEI_BLOCK_CHUNKS; ++c) {
        const int depth = w->depth + c * 16;
        if ((depth & ((1 << d->block_other) - 1)) == 0)
            w->ahead[c] = moei_block_read(d, t, depth >> d->block_other);
    }
}

/* The next step; the walk moves on. */
MOE_DEVICE void moei_block_next(const moei_block_args* d, const moei_block_where* t,
                                moei_block_walk* w, moei_block_depth* p, uint32_t tile_rows,
                                const int tm)
{
    MOEI_UNROLL
    for (int c = 0; c < MOEI_BLOCK_CHUNKS; ++c) {
        const int depth = w->depth + c * 16;
        const int64_t x_step = moei_block_step(&d->x, MOE_MAJOR_MN);
        const int64_t y_step = moei_block_step(&d->y, MOE_MAJOR_MN);
        int64_t k = depth;
        p->rows[c] = tile_rows;
        p->x[c] = p->y[c] = 0;
        if (!d->sparse_c) {
            const int in = depth & ((1 << d->block_other) - 1);
            if (in == 0) {
                moei_block_entry e = w->ahead[c];
                moei_block_test(d, t, depth >> d->block_other, w->before, &e);
                w->block = e.block;
                w->info = e.info;
                if (e.block >= 0) w->before = e.block;
            }
            k = w->block * ((int64_t)1 << d->block_other) + in;
            p->rows[c] &= moei_block_rows(d, w->info, tm);
            if (w->block < 0) {
                k = d->k;
            } else if (d->y.table) {
                const uint64_t strip = moei_block_strip(d, &d->y, w->block);
                p->y[c] = strip - (uint64_t)((k - in) * y_step);
                if (strip == 0) k = d->k;
            }
            if (d->packed)
                p->x[c] = ((uint64_t)(uint32_t)w->info << (d->block_m + d->block_other)) * 2 +
                          (uint64_t)((in - k) * x_step);
        }
        p->x[c] += (uint64_t)(k * x_step);
        p->y[c] += (uint64_t)(k * y_step);
        p->count[c] = k >= d->k ? 0 : d->k - k < 16 ? (int)(d->k - k) : 16;
        if (p->count[c] == 0) p->rows[c] = 0;
    }
    w->depth += MOEI_BLOCK_DEPTH;
    if (!d->sparse_c) moei_block_look_ahead(d, t, w);
}

/* Copies one step of an operand, `width` rows of a tile of which `here` are there, into a stage.
   `at`, `count` and `rows` are those of its chunks of depth. */
MOE_DEVICE void moei_block_copy(const moei_block_matrix* x, uint16_t* stage, const uint64_t* chunk,
                                const uint64_t* at, const int32_t* count, const uint32_t* rows,
                                int here, const int width, const int threads)
{
    const int tid = (int)threadIdx.x;
    if (x->major == MOE_MAJOR_K) {
        const int pieces = MOEI_BLOCK_DEPTH / 8, r = tid / pieces, piece = tid % pieces;
        const int each = threads / pieces; /* rows of a pass */
        const bool second = piece >= 2;
        const uint64_t from =
            (second ? at[1] : at[0]) + (uint64_t)(r % 16 * x->stride * 2 + piece % 2 * 16);
        const uint32_t want = second ? rows[1] : rows[0];
        const int left = ((second ? count[1] : count[0]) - piece % 2 * 8) * 2;
        const int bytes = left > 16 ? 16 : left > 0 ? left : 0;
        uint16_t* to = stage + r * (MOEI_BLOCK_DEPTH + 8) + piece * 8;
        MOEI_UNROLL
        for (int i = 0; i < width / each; ++i) {
            const int row = i * each + r;
            moei_copy16_async(to + i * each * (MOEI_BLOCK_DEPTH + 8),
                              (const void*)(uintptr_t)(chunk[row / 16] + from),
                              row < here && (want >> row / 16 & 1) ? bytes : 0);
        }
    } else {
        const int pieces = width / 8, r = tid / pieces, piece = tid % pieces;
        const int each = threads / pieces; /* depths of a pass */
        const int left = (here - piece * 8) * 2;
        const int bytes = left > 16 ? 16 : left > 0 ? left : 0;
        const uint64_t from =
            chunk[piece / 2] + (uint64_t)(r % 16 * x->stride * 2 + piece % 2 * 16);
        uint16_t* to = stage + r * (width + 8) + piece * 8;
        MOEI_UNROLL
        for (int i = 0; i < MOEI_BLOCK_DEPTH / each; ++i) {
            const int k = i * each; /* first depth of the pass; a pass of 32 has both chunks */
            const bool second = each > 16 ? r >= 16 : k >= 16;
            moei_copy16_async(to + k * (width + 8),
                              (const void*)(uintptr_t)(from + (second ? at[1] : at[0]) +
                                                       (uint64_t)(k % 16 * x->stride * 2)),
                              k % 16 + r % 16 < (second ? count[1] : count[0]) &&
                                      ((second ? rows[1] : rows[0]) >> piece / 2 & 1)
                                  ? bytes
                                  : 0);
        }
    }
}

/* Pieces that a warp multiplies at depth k of a stage. */
MOE_DEVICE void moei_block_fragments(moei_mma_a* a, moei_mma_b* b, const moei_block_args* d,
                                     const uint16_t* sx, const uint16_t* sy, int warp_m, int warp_n,
                                     const int k, const int tm, const int tn, const int wm,
                                     const int wn, const int dtype)
{
    const int ld = MOEI_BLOCK_DEPTH + 8;
    if (d->x.major == MOE_MAJOR_K) {
        MOEI_UNROLL
        for (int i = 0; i < wm / 16; ++i)
            moei_mma_load_a(&a[i], sx + (warp_m * wm + i * 16) * ld + k, ld, dtype, MOE_MAJOR_K);
    } else {
        MOEI_UNROLL
        for (int i = 0; i < wm / 16; ++i)
            moei_mma_load_a(&a[i], sx + k * (tm + 8) + warp_m * wm + i * 16, tm + 8, dtype,
                            MOE_MAJOR_MN);
    }
    if (d->y.major == MOE_MAJOR_K) {
        MOEI_UNROLL
        for (int j = 0; j < wn / 16; ++j)
            moei_mma_load_b(&b[j], sy + (warp_n * wn + j * 16) * ld + k, ld, dtype, MOE_MAJOR_K);
    } else {
        MOEI_UNROLL
        for (int j = 0; j < wn / 16; ++j)
            moei_mma_load_b(&b[j], sy + k * (tn + 8) + warp_n * wn + j * 16, tn + 8, dtype,
                            MOE_MAJOR_MN);
    }
}

/* Address parts of the chunks of C, in place of those of X and Y. */
MOE_DEVICE void moei_block_address_c(const moei_block_args* d, const moei_block_where* t,
                                     moei_block_shared* s, const int tm, const int tn)
{
    const int tid = (int)threadIdx.x, bytes = (d->c_dtype == MOE_FP32 ? 4 : 2);
    if (tid < tm / 16) {
        const int64_t step = d->c.major == MOE_MAJOR_MN ? bytes : d->c.stride * bytes;
        const int row = t->row + tid * 16, in = row & ((1 << d->block_m) - 1);
        uint64_t p = (uint64_t)(uintptr_t)d->c.base;
        if (d->c.table)
            p = (s->rows >> tid & 1) ? (uint64_t)(uintptr_t)d->c.table[row >> d->block_m] : 0;
        s->x[tid] = p + (uint64_t)((d->c.table || (d->sparse_c && d->packed) ? in : row) * step);
    }
    if (tid >= 32 && tid < 32 + tn / 16) {
        const int64_t step = d->c.major == MOE_MAJOR_MN ? d->c.stride * bytes : bytes;
        const int column = t->column + (tid - 32) * 16;
        int64_t at = column * step;
        if (d->sparse_c) {
            const int in = column & ((1 << d->block_other) - 1);
            const moei_block_entry e = moei_block_read(d, t, column >> d->block_other);
            at = (e.block * ((int64_t)1 << d->block_other) + in) * step;
            if (d->packed)
                at = ((int64_t)e.info << (d->block_m + d->block_other)) * bytes + in * step;
        }
        s->y[tid - 32] = (uint64_t)at;
    }
}

/* A warp stores its wm x wn accumulators, 16 rows (turned: columns) at a time through a strip of
   shared memory [16][inner + 8], 8 neighbours in C a lane. */
MOE_DEVICE void moei_block_store(const moei_block_args* d, const moei_block_where* t,
                                 const moei_block_shared* s, moei_mma_c acc[4][4], float* strip,
                                 int warp_m, int warp_n, const int wm, const int wn,
                                 const int turned)
{
    const int outer = turned ? wn : wm, inner = turned ? wm : wn, ld = inner + 8;
    const int bytes = (d->c_dtype == MOE_FP32 ? 4 : 2);
    MOEI_NO_UNROLL
    for (int o = 0; o < outer / 16; ++o) {
        MOEI_UNROLL
        for (int i = 0; i < wm / 16; ++i) {
            MOEI_UNROLL
            for (int j = 0; j < wn / 16; ++j) {
                if (!turned && i == o) moei_mma_store(strip + j * 16, &acc[i][j], ld);
                if (turned && j == o) moei_mma_store_turned(strip + i * 16, &acc[i][j], ld);
            }
        }
        __syncwarp(MOEI_FULL);
        for (int u = moei_lane(); u < 16 * (inner / 8); u += MOEI_WARP) {
            const int r = u / (inner / 8), g = u % (inner / 8) * 8;
            const int m = warp_m * wm + (turned ? g : o * 16 + r);
            const int n = warp_n * wn + (turned ? o * 16 + r : g);
            const int left = turned ? t->rows - m : t->columns - n;
            if (m < t->rows && n < t->columns && (s->have[n / 16] & s->rows) >> m / 16 & 1) {
                char* to = (char*)(uintptr_t)(s->x[m / 16] + s->y[n / 16]) +
                           (r * d->c.stride + g % 16) * bytes;
                if (left >= 8) {
                    float v[8];
                    MOEI_UNROLL
                    for (int x = 0; x < 8; ++x) v[x] = strip[r * ld + g + x];
                    moei_epilogue_store8(to, v, d->c_dtype);
                } else {
                    for (int x = 0; x < left; ++x)
                        moei_store_f32(to, x, d->c_dtype, strip[r * ld + g + x]);
                }
            }
        }
        __syncwarp(MOEI_FULL);
    }
}

/* A block's life. */
MOE_DEVICE_BODY void moei_block_tile(const moei_block_args* d, unsigned char* shared,
                                     moei_block_shared* s, const int tm, const int tn,
                                     const int warps_m, const int warps_n, const int stages,
                                     const int dtype)
{
    const int wm = tm / warps_m, wn = tn / warps_n, threads = warps_m * warps_n * 32;
    const int x_elems = moei_block_stage(tm), elems = x_elems + moei_block_stage(tn);
    const int warp_m = moei_warp() % warps_m, warp_n = moei_warp() / warps_m;
    const moei_block_where t = moei_block_find(d, (int)blockIdx.x, tm, tn);
    const uint32_t all[MOEI_BLOCK_CHUNKS] = {0xffffffffu, 0xffffffffu};
    uint16_t* ring = (uint16_t*)shared;
    uint32_t fixed = 0; /* bit j * 4 + i: the warp's piece (i, j) of C is wanted */
    int steps;
    moei_block_walk w;
    moei_block_depth p;
    moei_mma_c acc[4][4];
    moei_mma_a a[2][4];
    moei_mma_b b[2][4];

    if (t.columns <= 0) return;
    if (threadIdx.x == 0) s->rows = 0;
    __syncthreads();
    moei_block_address(d, &t, s, tm, tn);
    __syncthreads();
    if (s->rows == 0) return;
    steps = d->sparse_c ? d->k : (t.end - t.begin) << d->block_other;
    steps = (steps + MOEI_BLOCK_DEPTH - 1) / MOEI_BLOCK_DEPTH;
    MOEI_UNROLL
    for (int j = 0; j < wn / 16; ++j)
        fixed |= (s->have[warp_n * (wn / 16) + j] >> warp_m * (wm / 16) & ((1u << (wm / 16)) - 1))
                 << j * 4;

    w.depth = 0;
    w.block = w.before = -1;
    w.info = 0;
    if (!d->sparse_c) moei_block_look_ahead(d, &t, &w);
#define MOEI_BLOCK_STEP(slot)                                                                      \
    do {                                                                                           \
        uint16_t* stage = ring + (slot)*elems;                                                     \
        moei_block_next(d, &t, &w, &p, s->rows, tm);                                               \
        if (threadIdx.x == 0) {                                                                    \
            s->live[(slot)*2] = p.rows[0];                                                         \
            s->live[(slot)*2 + 1] = p.rows[1];                                                     \
        }                                                                                          \
        moei_block_copy(&d->x, stage, s->x, p.x, p.count, p.rows, t.rows, tm, threads);            \
        moei_block_copy(&d->y, stage + x_elems, s->y, p.y, p.count, all, t.columns, tn, threads);  \
        moei_copy_commit();                                                                        \
    } while (0)
    for (int i = 0; i < stages - 1; ++i) MOEI_BLOCK_STEP(i);
    MOEI_UNROLL
    for (int i = 0; i < wm / 16; ++i) MOEI_UNROLL
    for (int j = 0; j < wn / 16; ++j) moei_mma_zero(&acc[i][j]);
    moei_copy_wait(stages - 2);
    __syncthreads();
    moei_block_fragments(a[0], b[0], d, ring, ring + x_elems, warp_m, warp_n, 0, tm, tn, wm, wn,
                         dtype);
    for (int step = 0, slot = 0; step < steps; ++step) {
        const int next = slot + 1 == stages ? 0 : slot + 1;
        MOEI_UNROLL
        for (int c = 0; c < MOEI_BLOCK_CHUNKS; ++c) {
            const int last = c == MOEI_BLOCK_CHUNKS - 1;
            const uint16_t* stage = ring + (last ? next : slot) * elems;
            const uint32_t live =
                fixed &
                (s->live[slot * 2 + c] >> warp_m * (wm / 16) & ((1u << (wm / 16)) - 1)) * 0x1111u;
            if (last) {
                moei_copy_wait(stages - 2);
                __syncthreads();
            }
            moei_block_fragments(a[!(c & 1)], b[!(c & 1)], d, stage, stage + x_elems, warp_m,
                                 warp_n, last ? 0 : c * 16 + 16, tm, tn, wm, wn, dtype);
            if (c == 0) MOEI_BLOCK_STEP(slot == 0 ? stages - 1 : slot - 1);
            MOEI_UNROLL
            for (int i = 0; i < wm / 16; ++i) {
                MOEI_UNROLL
                for (int j = 0; j < wn / 16; ++j)
                    moei_mma_if(&acc[i][j], &a[c & 1][i], &b[c & 1][j], dtype,
                                (int)(live & (1u << (j * 4 + i))));
            }
        }
        slot = next;
    }
#undef MOEI_BLOCK_STEP
    moei_copy_wait(0);
    __syncthreads();
    moei_block_address_c(d, &t, s, tm, tn);
    __syncthreads();
    {
        const int wide = wm > wn ? wm : wn;
        float* strip = (float*)shared + moei_warp() * 16 * (wide + 8);
        if (d->c.major == MOE_MAJOR_MN)
            moei_block_store(d, &t, s, acc, strip, warp_m, warp_n, wm, wn, 1);
        else moei_block_store(d, &t, s, acc, strip, warp_m, warp_n, wm, wn, 0);
    }
}

#endif
