/* tile.cuh: one tile of a block-sparse product, for all of sdd, dsd and dds.

   The host turns each of them into one form, C = X * Y with X [M, K] and Y [K, N] (plan.cuh): X is
   the sparse operand of dsd, of dds the transpose of it (and C is stored turned); of sdd, X and Y
   are the dense operands. What is sparse is then a list of blocks for each strip of M:

     dsd, dds   the blocks of X in a strip of M: which depths k are multiplied
     sdd        the blocks of C in a strip of M: which columns n stand side by side in the tile

   A block owns TM rows and TN columns of C. Its threads copy X and Y, KB deep at a time, into a
   ring of stages in shared memory with cp.async; its warps, WM x WN of the tile each, multiply what
   has arrived. A barrier a step, placed before the last products of a stage, whose pieces are in
   registers by then: behind it the next stage may be read and the one before may be refilled. Tiles
   that leave products out or cut pieces off wait at the step's start instead.

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

/* Depth of a step. */
#define MOEI_BLOCK_DEPTH 64
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
    const int32_t* info;        /* of each: packed: its place; where strips are joined: bits, which
                                   of them have it; null: its number in the list */
    const int32_t* partial;     /* [strips] 1: some block is not in all strips joined; or null */
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

/* One chunk of depth of an operand: where it lies, and who wants it. */
typedef struct moei_block_chunk {
    uint64_t at;   /* address part */
    int32_t count; /* depths that there are, 0 .. 16 */
    uint32_t rows; /* bits: the row chunks that are multiplied with it */
} moei_block_chunk;

/* Where a tile lies. */
typedef struct moei_block_where {
    int32_t row, strip, rows; /* first row in M, its strip, rows that there are */
    int32_t column, columns;  /* first column among those the strip has, columns that there are */
    int32_t begin, end;       /* the strip's list */
} moei_block_where;

/* What the threads of a block share beside the ring. Chunks are 16 rows, columns or depths. */
typedef struct moei_block_shared {
    moei_block_where tile;
    moei_block_chunk chunk_x[2 * MOEI_WARP], chunk_y[2 * MOEI_WARP]; /* the next chunks of depth; a
                                                                        warp makes 32 at a time */
    uint64_t x[8], y[16]; /* address parts of the row chunks, column chunks */
    uint32_t have[16];    /* bits: the row chunks that a column chunk is multiplied with */
    uint32_t rows;        /* the same of the tile: those that C has */
    uint32_t columns;     /* bits: the column chunks of the tile that are there */
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
    const bool last = t->begin + at + 1 == t->end; /* a ragged block is the last one */
    if (t->begin + at >= t->end) return;
    if ((uint32_t)e->block >= (uint32_t)d->others || e->block <= before ||
        (e->block == d->others - 1 && !last) ||
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
                const uint64_t strip = (uint64_t)(uintptr_t)d->x.table[row >> d->block_m];
                p = strip + (uint64_t)((row & ((1 << d->block_m) - 1)) * step);
                there = strip != 0 && strip % 16 == 0; /* a fault only if a block wants it: below */
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
            const bool follows = at > 0 && t->begin + at < t->end;
            const int before = follows ? d->block[t->begin + at - 1] : -1;
            moei_block_test(d, t, at, before, &e);
            p = (uint64_t)(uintptr_t)d->y.base;
            have = 0;
            if (e.block >= 0 && j * 16 < t->columns) {
                have = moei_block_rows(d, e.info, tm);
                for (int i = 0; i < tm / 16 && d->x.table; ++i)
                    if ((have >> i & 1) && i * 16 < t->rows)
                        (void)moei_block_strip(d, &d->x, (t->row + i * 16) >> d->block_m);
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
        if (have) atomicOr(&s->columns, 1u << j);
    }
}

/* A warp makes the 32 chunks from chunk number `first` on, one a lane. */
MOE_DEVICE void moei_block_chunks(const moei_block_args* d, const moei_block_where* t,
                                  moei_block_shared* s, int first, const int tm)
{
    const int number = first + moei_lane(), depth = number * 16;
    const int64_t x_step = moei_block_step(&d->x, MOE_MAJOR_MN);
    const int64_t y_step = moei_block_step(&d->y, MOE_MAJOR_MN);
    moei_block_chunk x, y;
    int64_t k = depth; /* in the matrix */
    x.at = y.at = 0;
    x.rows = s->rows;
    if (!d->sparse_c) {
        const int at = depth >> d->block_other, in = depth & ((1 << d->block_other) - 1);
        moei_block_entry e = moei_block_read(d, t, at);
        const bool follows = at > 0 && t->begin + at < t->end;
        moei_block_test(d, t, at, follows ? d->block[t->begin + at - 1] : -1, &e);
        x.rows &= moei_block_rows(d, e.info, tm);
        k = e.block * ((int64_t)1 << d->block_other) + in;
        if (e.block < 0) {
            k = d->k;
        } else if (d->y.table) {
            const uint64_t strip = moei_block_strip(d, &d->y, e.block);
            y.at = strip - (uint64_t)((k - in) * y_step);
            if (strip == 0) k = d->k;
        }
        if (d->packed && k < d->k)
            x.at = ((uint64_t)(uint32_t)e.info << (d->block_m + d->block_other)) * 2 +
                   (uint64_t)((in - k) * x_step);
    }
    x.at += (uint64_t)(k * x_step);
    y.at += (uint64_t)(k * y_step);
    x.count = y.count = k >= d->k ? 0 : d->k - k < 16 ? (int)(d->k - k) : 16;
    if (x.count == 0) x.rows = 0;
    y.rows = s->columns;
    s->chunk_x[number % (2 * MOEI_WARP)] = x;
    s->chunk_y[number % (2 * MOEI_WARP)] = y;
}

/* A thread's part in the copies of one operand, the same in all steps: one piece, 8 elements, of
   each of a few lines that follow one another. Along K lines are rows, along MN depths; either
   way the thread's lines lie in one chunk of rows and one chunk of depth, and are `stride` apart. So
   the copies have no branch: only the numbers here say which way the operand lies. */
typedef struct moei_block_loader {
    uint64_t from;  /* address part of the chunk of rows, and of the piece in both chunks */
    int64_t stride; /* bytes between lines */
    int32_t to, ld; /* place in a stage, elements to the next line */
    int32_t chunk;  /* chunk of depth */
    int32_t row;    /* chunk of rows */
    int32_t first;  /* depth of the piece, or of the first line, in its chunk */
    int32_t each;   /* lines for each depth of the chunk behind `first`; K: all */
    int32_t lines;  /* that there are */
    int32_t ragged; /* pieces may be cut off: the extent along memory is no multiple of 8 */
} moei_block_loader;

/* `width` rows of a tile, of which `here` are there; `chunk` are their address parts. */
MOE_DEVICE moei_block_loader moei_block_loader_begin(const moei_block_matrix* x,
                                                     const uint64_t* chunk, int depth, int here,
                                                     const int width, const int threads)
{
    const int along = x->major == MOE_MAJOR_K, tid = (int)threadIdx.x;
    const int pieces = along ? MOEI_BLOCK_DEPTH / 8 : width / 8,
              lines = width * MOEI_BLOCK_DEPTH / 8 / threads;
    const int line = tid / pieces * lines, piece = tid % pieces; /* its first line */
    int left;
    moei_block_loader l;
    l.row = along ? line / 16 : piece / 2;
    l.chunk = along ? piece / 2 : line / 16;
    l.first = along ? piece % 2 * 8 : line % 16;
    l.each = along ? lines : 1;
    left = along ? here - line : piece * 8 < here ? lines : 0;
    l.lines = left < lines ? left : lines;
    l.stride = x->stride * 2;
    l.from = chunk[l.row] + (uint64_t)(line % 16 * l.stride + piece % 2 * 16);
    l.ld = (along ? MOEI_BLOCK_DEPTH : width) + 8;
    l.to = line * l.ld + piece * 8;
    l.ragged = (along ? depth : here) % 8 != 0;
    return l;
}

/* Copies one step of an operand into a stage, the thread's part; `c` is the thread's chunk of depth
   of that step. `masked`, a literal: only if its rows want it. */
MOE_DEVICE void moei_block_copy(const moei_block_loader* l, uint16_t* stage, moei_block_chunk c,
                                const int width, const int threads, const int masked)
{
    const int deep = (c.count - l->first) * l->each;
    int lines = deep < l->lines ? deep : l->lines;
    uint64_t from = l->from + c.at;
    if (masked && !(c.rows >> l->row & 1)) lines = 0;
    stage += l->to;
    MOEI_UNROLL
    for (int i = 0; i < width * MOEI_BLOCK_DEPTH / 8 / threads; ++i) {
        moei_copy16_async(stage + i * l->ld, (const void*)(uintptr_t)from, i < lines ? 16 : 0);
        from += (uint64_t)l->stride;
    }
}

/* The whole step where pieces may be cut off, for matrices whose extent along memory is no multiple
   of 8. */
MOE_DEVICE void moei_block_copy_ragged(const moei_block_matrix* x, uint16_t* stage,
                                       const uint64_t* chunk, const moei_block_chunk* p, int here,
                                       const int width, const int threads)
{
    const int along = x->major == MOE_MAJOR_K;
    const int pieces = along ? MOEI_BLOCK_DEPTH / 8 : width / 8;
    MOEI_NO_UNROLL
    for (int u = (int)threadIdx.x; u < width * MOEI_BLOCK_DEPTH / 8; u += threads) {
        const int line = u / pieces, piece = u % pieces * 8;
        const int row = along ? line : piece, k = along ? piece : line; /* first of the piece */
        const moei_block_chunk* c = p + k / 16;
        const int left = along ? c->count - k % 16 : here - row;
        const bool wanted = row < here && k % 16 < c->count && (c->rows >> row / 16 & 1);
        moei_copy16_async(
            stage + line * ((along ? MOEI_BLOCK_DEPTH : width) + 8) + piece,
            (const void*)(uintptr_t)(chunk[row / 16] + c->at +
                                     (uint64_t)(line % 16 * x->stride * 2 + piece % 16 * 2)),
            !wanted    ? 0
            : left < 8 ? left * 2
                       : 16);
    }
}

/* Copies step `step` of a tile into a stage; closes a group of copies. x_chunk and y_chunk are the
   thread's chunks of that step, and become those of the next: read long before they are needed.
   `careful`, a literal: some rows may not want it, pieces may be cut off. */
MOE_DEVICE void moei_block_fill(const moei_block_args* d, const moei_block_where* t,
                                const moei_block_shared* s, const moei_block_loader* x,
                                const moei_block_loader* y, moei_block_chunk* x_chunk,
                                moei_block_chunk* y_chunk, int step, uint16_t* stage,
                                const int careful, const int tm, const int tn, const int threads)
{
    const int first = step * MOEI_BLOCK_CHUNKS % (2 * MOEI_WARP);
    const int next = (step + 1) * MOEI_BLOCK_CHUNKS % (2 * MOEI_WARP);
    uint16_t* stage_y = stage + moei_block_stage(tm);
    if (careful && (x->ragged || y->ragged)) {
        moei_block_copy_ragged(&d->x, stage, s->x, s->chunk_x + first, t->rows, tm, threads);
        moei_block_copy_ragged(&d->y, stage_y, s->y, s->chunk_y + first, t->columns, tn, threads);
    } else {
        moei_block_copy(x, stage, *x_chunk, tm, threads, careful);
        moei_block_copy(y, stage_y, *y_chunk, tn, threads, careful);
        *x_chunk = s->chunk_x[next + x->chunk];
        *y_chunk = s->chunk_y[next + y->chunk];
    }
    moei_copy_commit();
}

/* Pieces that a warp multiplies at depth k of a stage; sx and sy are its first rows and columns
   there, lane_x and lane_y from moei_mma_lane_a and _b. */
MOE_DEVICE void moei_block_fragments(moei_mma_a* a, moei_mma_b* b, const uint16_t* sx,
                                     const uint16_t* sy, int lane_x, int lane_y, const int k,
                                     const int tm, const int tn, const int wm, const int wn,
                                     const int dtype, const int x_major, const int y_major)
{
    const int ld = MOEI_BLOCK_DEPTH + 8;
    if (x_major == MOE_MAJOR_K) {
        MOEI_UNROLL
        for (int i = 0; i < wm / 16; ++i)
            moei_mma_load_a_at(&a[i], sx + i * 16 * ld + k, lane_x, ld, dtype, MOE_MAJOR_K);
    } else {
        MOEI_UNROLL
        for (int i = 0; i < wm / 16; ++i)
            moei_mma_load_a_at(&a[i], sx + k * (tm + 8) + i * 16, lane_x, tm + 8, dtype,
                               MOE_MAJOR_MN);
    }
    if (y_major == MOE_MAJOR_K) {
        MOEI_UNROLL
        for (int j = 0; j < wn / 16; ++j)
            moei_mma_load_b_at(&b[j], sy + j * 16 * ld + k, lane_y, ld, dtype, MOE_MAJOR_K);
    } else {
        MOEI_UNROLL
        for (int j = 0; j < wn / 16; ++j)
            moei_mma_load_b_at(&b[j], sy + k * (tn + 8) + j * 16, lane_y, tn + 8, dtype,
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
                at = e.info * ((int64_t)bytes << (d->block_m + d->block_other)) + in * step;
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

/* Must some products of the tile be left out, some rows not be read, or pieces be cut off? All
   threads of the block get one answer. What is past the edges of X and Y is not asked for: it is
   zero in both along the depth, and else not stored. */
MOE_DEVICE bool moei_block_careful(const moei_block_args* d, const moei_block_where* t,
                                   const moei_block_shared* s)
{
    const int j = (int)threadIdx.x;
    const uint32_t rows = (1u << (t->rows + 15) / 16) - 1;
    const bool ragged_x = (d->x.major == MOE_MAJOR_K ? d->k : t->rows) % 8 != 0;
    const bool ragged_y = (d->y.major == MOE_MAJOR_K ? d->k : t->columns) % 8 != 0;
    if (ragged_x || ragged_y || s->rows != rows) return true;
    if (d->sparse_c)
        return __syncthreads_or(j < 16 && j * 16 < t->columns && (~s->have[j] & rows) != 0) != 0;
    return d->partial && d->partial[t->strip] != 0;
}

/* Multiplies all steps of a tile. `careful`, a literal: some may be partial. */
MOE_DEVICE void moei_block_multiply(const moei_block_args* d, const moei_block_where* t,
                                    moei_block_shared* s, uint16_t* ring, moei_mma_c acc[4][4],
                                    int steps, const int careful, const int tm, const int tn,
                                    const int warps_m, const int warps_n, const int stages,
                                    const int dtype)
{
    const int wm = tm / warps_m, wn = tn / warps_n, threads = warps_m * warps_n * 32;
    const int x_elems = moei_block_stage(tm), elems = x_elems + moei_block_stage(tn);
    const int warp_m = moei_warp() % warps_m, warp_n = moei_warp() / warps_m;
    const int half = MOEI_WARP / MOEI_BLOCK_CHUNKS; /* steps */
    const int x_major = d->x.major, y_major = d->y.major, deep = MOEI_BLOCK_DEPTH + 8;
    const int lane_x = moei_mma_lane_a(x_major == MOE_MAJOR_K ? deep : tm + 8, x_major);
    const int lane_y = moei_mma_lane_b(y_major == MOE_MAJOR_K ? deep : tn + 8, y_major);
    const moei_block_loader load_x =
        moei_block_loader_begin(&d->x, s->x, d->k, t->rows, tm, threads);
    const moei_block_loader load_y =
        moei_block_loader_begin(&d->y, s->y, d->k, t->columns, tn, threads);
    const uint16_t* my_x = ring + warp_m * wm * (x_major == MOE_MAJOR_K ? deep : 1);
    const uint16_t* my_y = ring + x_elems + warp_n * wn * (y_major == MOE_MAJOR_K ? deep : 1);
    uint32_t fixed = 0;                /* bit j * 4 + i: the warp's piece (i, j) of C is wanted */
    moei_block_chunk x_chunk, y_chunk; /* the thread's own, of the step to copy next */
    moei_mma_a a[2][4];
    moei_mma_b b[2][4];

    MOEI_UNROLL
    for (int j = 0; j < wn / 16; ++j)
        fixed |= (s->have[warp_n * (wn / 16) + j] >> warp_m * (wm / 16) & ((1u << (wm / 16)) - 1))
                 << j * 4;
    x_chunk = s->chunk_x[load_x.chunk];
    y_chunk = s->chunk_y[load_y.chunk];
    for (int i = 0; i < stages - 1; ++i)
        moei_block_fill(d, t, s, &load_x, &load_y, &x_chunk, &y_chunk, i, ring + i * elems, careful,
                        tm, tn, threads);
    if (!careful) {
        moei_copy_wait(stages - 2);
        __syncthreads();
        moei_block_fragments(a[0], b[0], my_x, my_y, lane_x, lane_y, 0, tm, tn, wm, wn, dtype,
                             x_major, y_major);
    }
    for (int step = 0, slot = 0; step < steps; ++step) {
        const int next = slot + 1 == stages ? 0 : slot + 1;
        uint16_t* refill = ring + (slot == 0 ? stages - 1 : slot - 1) * elems;
        if (careful) {
            moei_copy_wait(stages - 2);
            __syncthreads();
        }
        /* each half of the chunks made is used up in turn: a warp makes the next */
        if (step % half == 0 && step > 0 && moei_warp() == step / half % (threads / MOEI_WARP))
            moei_block_chunks(d, t, s, (step / half + 1) * MOEI_WARP, tm);
        if (careful)
            moei_block_fill(d, t, s, &load_x, &load_y, &x_chunk, &y_chunk, step + stages - 1,
                            refill, careful, tm, tn, threads);
        MOEI_UNROLL
        for (int c = 0; c < MOEI_BLOCK_CHUNKS; ++c) {
            if (!careful) { /* no branch from here on: one run of products, with all else that is to
                               do among them; the next pieces are read while these are multiplied */
                const int last = c == MOEI_BLOCK_CHUNKS - 1, at = (last ? next : slot) * elems;
                if (last) {
                    moei_copy_wait(stages - 2);
                    __syncthreads();
                }
                moei_block_fragments(a[!(c & 1)], b[!(c & 1)], my_x + at, my_y + at, lane_x, lane_y,
                                     last ? 0 : c * 16 + 16, tm, tn, wm, wn, dtype, x_major,
                                     y_major);
                if (c == 0)
                    moei_block_fill(d, t, s, &load_x, &load_y, &x_chunk, &y_chunk,
                                    step + stages - 1, refill, careful, tm, tn, threads);
                MOEI_UNROLL
                for (int i = 0; i < wm / 16; ++i) {
                    MOEI_UNROLL
                    for (int j = 0; j < wn / 16; ++j)
                        moei_mma(&acc[i][j], &a[c & 1][i], &b[c & 1][j], dtype);
                }
            } else {
                const int number = (step * MOEI_BLOCK_CHUNKS + c) % (2 * MOEI_WARP);
                const uint32_t rows = s->chunk_x[number].rows >> warp_m * (wm / 16);
                const uint32_t live = fixed & (rows & ((1u << (wm / 16)) - 1)) * 0x1111u;
                if (live) {
                    moei_block_fragments(a[0], b[0], my_x + slot * elems, my_y + slot * elems,
                                         lane_x, lane_y, c * 16, tm, tn, wm, wn, dtype, x_major,
                                         y_major);
                    MOEI_UNROLL
                    for (int i = 0; i < wm / 16; ++i) {
                        MOEI_UNROLL
                        for (int j = 0; j < wn / 16; ++j)
                            moei_mma_if(&acc[i][j], &a[0][i], &b[0][j], dtype,
                                        (int)(live & (1u << (j * 4 + i))));
                    }
                }
            }
        }
        slot = next;
    }
}

/* A block's life. */
MOE_DEVICE_BODY void moei_block_tile(const moei_block_args* d, unsigned char* shared,
                                     moei_block_shared* s, const int tm, const int tn,
                                     const int warps_m, const int warps_n, const int stages,
                                     const int dtype)
{
    const int wm = tm / warps_m, wn = tn / warps_n;
    const moei_block_where* t = &s->tile; /* there, so that it takes no registers */
    int steps;
    moei_mma_c acc[4][4];

    if (threadIdx.x == 0) {
        s->tile = moei_block_find(d, (int)blockIdx.x, tm, tn);
        s->rows = s->columns = 0;
    }
    __syncthreads();
    if (t->columns <= 0) return;
    moei_block_address(d, t, s, tm, tn);
    __syncthreads();
    if (s->rows == 0) return;
    steps = d->sparse_c ? d->k : (t->end - t->begin) << d->block_other;
    steps = (steps + MOEI_BLOCK_DEPTH - 1) / MOEI_BLOCK_DEPTH;
    if (moei_warp() < 2) moei_block_chunks(d, t, s, moei_warp() * MOEI_WARP, tm);
    __syncthreads();
    MOEI_UNROLL
    for (int i = 0; i < wm / 16; ++i) {
        MOEI_UNROLL
        for (int j = 0; j < wn / 16; ++j) moei_mma_zero(&acc[i][j]);
    }
    if (moei_block_careful(d, t, s))
        moei_block_multiply(d, t, s, (uint16_t*)shared, acc, steps, 1, tm, tn, warps_m, warps_n,
                            stages, dtype);
    else
        moei_block_multiply(d, t, s, (uint16_t*)shared, acc, steps, 0, tm, tn, warps_m, warps_n,
                            stages, dtype);
    moei_copy_wait(0);
    __syncthreads();
    moei_block_address_c(d, t, s, tm, tn);
    __syncthreads();
    {
        const int wide = wm > wn ? wm : wn;
        const int warp_m = moei_warp() % warps_m, warp_n = moei_warp() / warps_m;
        float* strip = (float*)shared + moei_warp() * 16 * (wide + 8);
        if (d->c.major == MOE_MAJOR_MN)
            moei_block_store(d, t, s, acc, strip, warp_m, warp_n, wm, wn, 1);
        else moei_block_store(d, t, s, acc, strip, warp_m, warp_n, wm, wn, 0);
    }
}

#endif
