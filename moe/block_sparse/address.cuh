/* address.cuh: addresses of a block-sparse tile: the arguments of a launch, the tile of a thread
   block, the address parts of its slices. Called by tile.cuh, load.cuh, multiply.cuh and store.cuh.

   X, Y, m, k, n, block rows and block columns are those of the normal form (tile.cuh).

   An address is the sum of two parts. Each slice of rows (or columns) of the tile has a fixed part,
   in shared memory. Each slice of depth has a part too; the list names these slices. So a tile may
   consist of sparse blocks anywhere, of 16 elements and more. Null tables cost nothing. */
#ifndef MOE_BLOCK_SPARSE_ADDRESS_CUH
#define MOE_BLOCK_SPARSE_ADDRESS_CUH

#include "../base/fault.cuh"
#include "../base/warp.cuh"
#include "../faults.h"
#include "../layout.h"
#include "desc.h"

/* An operand or C in the normal form: its address and its contiguous axis. */
typedef struct moei_sparse_matrix {
    const char* base;         /* first element; null with a table */
    const void* const* table; /* address of each block row (Y: of each block column); or null */
    int64_t stride;           /* elements between rows as stored */
    int32_t major;            /* X, Y: moe_major; C: MOE_MAJOR_MN: stored transposed */
} moei_sparse_matrix;

/* Arguments of a product's kernel, made by prepare.cuh. */
typedef struct moei_sparse_args {
    moei_sparse_matrix x, y, c;
    const int32_t *begin, *end; /* [strips] first entry of each strip, and the one after its last */
    const int32_t* block;       /* [max_blocks] block column of each entry */
    const int32_t* info;        /* [max_blocks] packed: the entry's number in row order; where block
                                   rows are joined: bits, the block rows that have the entry; null:
                                   the entry's own number */
    const int32_t* partial;     /* [strips] 1: some joined block row lacks an entry; or null */
    const int32_t* share;       /* [ceil(m / 2^share_m)] `partial` of the two plans: tiles run where
                                   the entry is share_of; null: all run */
    uint64_t* fault;            /* [1] fault word; or null */
    int32_t m, n, k;            /* elements, of the normal form */
    int32_t sparse_c;           /* 1: sdd; 0: dsd or dds */
    int32_t packed;             /* 1: the sparse matrix is packed; 0: strided */
    int32_t block_m, block_other; /* log2 of a sparse block's extent along m; along k (sdd: n) */
    int32_t strip_m;              /* rows of a strip: of all its block rows */
    int32_t others, max_blocks;   /* block columns; entries of the list */
    int32_t tiles_m, tiles_n;     /* tiles along m and n that have a thread block */
    int32_t share_m, share_of;    /* of share: log2 of its rows; 0 or 1 */
    int32_t c_dtype;              /* moe_dtype of C */
    int32_t rank;                 /* reported with a fault */
    moe_block_sparse_depths depths;
} moei_sparse_args;

/* One slice of depth of an operand. */
typedef struct moei_sparse_slice {
    uint64_t at;   /* address part, bytes */
    int32_t count; /* depths inside the matrix, 0 .. 16 */
    uint32_t rows; /* X: bits, the row slices that this slice multiplies; Y: bits, the depths that
                      count, read where Y is mn-major */
} moei_sparse_slice;

/* The position of a tile, in elements of the normal form. */
typedef struct moei_sparse_position {
    int32_t row, strip, rows; /* first row, number of its strip, rows inside the matrix */
    int32_t column, columns;  /* first column (sdd: in the strip's entries); columns, 0: no tile */
    int32_t begin, end;       /* the strip's entries */
} moei_sparse_position;

/* Shared memory of a thread block, without the ring. A slice is 16 rows, columns or depths. */
typedef struct moei_sparse_shared {
    moei_sparse_position tile;
    int32_t index; /* not used */
    moei_sparse_slice slice_x[2 * MOE_WARP_SIZE],
        slice_y[2 * MOE_WARP_SIZE]; /* next slices of depth, in a ring; a warp makes 32 at a time */
    uint64_t x[8], y[16];           /* address parts of row slices, of column slices */
    uint32_t have[16];              /* bits: the row slices that a column slice multiplies */
    uint32_t rows;                  /* bits: the row slices of the tile that are computed */
    uint32_t columns;               /* bits: the column slices of the tile that are computed */
} moei_sparse_shared;

/* Rows of a band: its tiles run together, so that they read the same columns of Y from L2. */
#define MOEI_SPARSE_BAND 2048

/* Returns the tile that thread block `index` has in a round: `tiles_n` column tiles further along
   its strip each round. columns = 0: no tile. A strip with bad offsets raises BAD_SPARSE_BLOCK and
   counts as empty. Called by one thread. */
MOE_DEVICE moei_sparse_position moei_sparse_find(const moei_sparse_args* d, int index, int round,
                                                 const int tile_m, const int tile_n)
{
    const int step = d->strip_m < tile_m ? d->strip_m : tile_m;
    const int most = MOEI_SPARSE_BAND / step, band = index / (most * d->tiles_n);
    const int in = index - band * most * d->tiles_n, left = d->tiles_m - band * most;
    const int height = left < most ? left : most;
    const int column = in / height;
    const int64_t at = ((int64_t)round * d->tiles_n + column) * tile_n;
    int there; /* columns of the strip */
    moei_sparse_position t;
    t.row = (band * most + in - column * height) * step;
    t.strip = t.row / d->strip_m;
    t.rows = d->m - t.row < step ? d->m - t.row : step;
    t.column = t.columns = 0;
    t.begin = t.end = 0;
    if (d->share && d->share[t.row >> d->share_m] != d->share_of) return t;
    t.begin = d->begin[t.strip];
    t.end = d->end[t.strip];
    if (t.begin < 0 || t.end < t.begin || t.end > d->max_blocks || t.end - t.begin > d->others) {
        moe_fault_raise(d->fault, MOE_FAULT_BAD_SPARSE_BLOCK, d->rank, t.begin);
        t.end = t.begin = 0;
    }
    there = d->n;
    if (d->sparse_c) {
        const int last = t.end > t.begin ? d->block[t.end - 1] : -1;
        there = (t.end - t.begin) << d->block_other;
        if (last == d->others - 1) there -= (d->others << d->block_other) - d->n;
    }
    if (at < there) {
        t.column = (int)at;
        t.columns = there - t.column < tile_n ? there - t.column : tile_n;
    }
    return t;
}

/* An entry of a strip. */
typedef struct moei_sparse_entry {
    int32_t block, info; /* block column, -1: no entry; as in moei_sparse_args */
} moei_sparse_entry;

/* Returns entry number `at` of the tile's strip; e.block is -1 past its end. */
MOE_DEVICE moei_sparse_entry moei_sparse_read(const moei_sparse_args* d,
                                              const moei_sparse_position* t, int at)
{
    moei_sparse_entry e = {-1, 0};
    if (t->begin + at < t->end) {
        e.block = d->block[t->begin + at];
        e.info = d->info ? d->info[t->begin + at] : t->begin + at;
    }
    return e;
}

/* Sets e->block to -1 and raises BAD_SPARSE_BLOCK where entry `at` is out of range, or does not
   ascend from `before`, the block column of the entry before (-1: none). */
MOE_DEVICE void moei_sparse_check_entry(const moei_sparse_args* d, const moei_sparse_position* t,
                                        int at, int before, moei_sparse_entry* e)
{
    const bool last = t->begin + at + 1 == t->end; /* a ragged entry must be the last */
    if (t->begin + at >= t->end) return;
    if ((uint32_t)e->block >= (uint32_t)d->others || e->block <= before ||
        (e->block == d->others - 1 && !last) ||
        (d->packed && (uint32_t)e->info >= (uint32_t)d->max_blocks)) {
        moe_fault_raise(d->fault, MOE_FAULT_BAD_SPARSE_BLOCK, d->rank, t->begin + at);
        e->block = -1;
    }
}

/* Returns the bits of the tile's row slices whose block row has an entry with this info. */
MOE_DEVICE uint32_t moei_sparse_rows(const moei_sparse_args* d, int info, const int tile_m)
{
    uint32_t rows = 0;
    if (d->strip_m >> d->block_m <= 1) return (1u << (tile_m / 16)) - 1;
    MOE_UNROLL
    for (int i = 0; i < tile_m / 16; ++i)
        rows |= ((uint32_t)info >> (i * 16 >> d->block_m) & 1u) << i;
    return rows;
}

/* Returns table entry `block` of x; raises BAD_TABLE and returns 0 where the entry is null or
   misaligned. */
MOE_DEVICE uint64_t moei_sparse_table_address(const moei_sparse_args* d,
                                              const moei_sparse_matrix* x, int block)
{
    const uint64_t p = (uint64_t)(uintptr_t)x->table[block];
    if (p != 0 && p % 16 == 0) return p;
    moe_fault_raise(d->fault, MOE_FAULT_BAD_TABLE, d->rank, block);
    return 0;
}

/* Returns the bytes between neighbours of a 16-bit operand: between rows (or columns) of the tile
   for `major` MOE_MAJOR_K, between depths for MOE_MAJOR_MN. */
MOE_DEVICE int64_t moei_sparse_step(const moei_sparse_matrix* x, const int major)
{
    return x->major == major ? x->stride * 2 : 2;
}

/* Writes the address parts of the slices of X and Y and their bits: s->x, s->y, s->rows,
   s->columns, s->have. Requires s->rows = s->columns = 0. Called by the whole thread block;
   barriers before and after are the caller's.
     1. Row slices, one a thread of warp 0. sdd: through X's table; dsd, dds: C's table is checked.
     2. Column slices, one a thread of warp 1. sdd: of the strip's entries; else `column` itself. */
MOE_DEVICE void moei_sparse_address(const moei_sparse_args* d, const moei_sparse_position* t,
                                    moei_sparse_shared* s, const int tile_m, const int tile_n)
{
    const int tid = (int)threadIdx.x;
    /* 1. row slices */
    if (tid < tile_m / 16) {
        const int row = t->row + tid * 16, in = row - t->strip * d->strip_m;
        const int64_t step = moei_sparse_step(&d->x, MOE_MAJOR_K);
        bool there = tid * 16 < t->rows;
        uint64_t p = (uint64_t)(uintptr_t)d->x.base + (uint64_t)((d->packed ? in : row) * step);
        if (d->sparse_c) {
            p = (uint64_t)(uintptr_t)d->x.base + (uint64_t)(row * step);
            if (d->x.table && there) {
                const uint64_t at = (uint64_t)(uintptr_t)d->x.table[row >> d->block_m];
                p = at + (uint64_t)((row & ((1 << d->block_m) - 1)) * step);
                there = at != 0 && at % 16 == 0; /* BAD_TABLE is raised in step 2 */
            }
        } else if (d->c.table && there) {
            there = d->c.table[row >> d->block_m] != 0 &&
                    moei_sparse_table_address(d, &d->c, row >> d->block_m) != 0;
        }
        s->x[tid] = p;
        if (there) atomicOr(&s->rows, 1u << tid);
    }
    if (tid >= 32 && tid < 32 + tile_n / 16) { /* 2. column slices: another warp */
        const int j = tid - 32, column = t->column + j * 16;
        const int64_t step = moei_sparse_step(&d->y, MOE_MAJOR_K);
        uint64_t p = (uint64_t)(uintptr_t)d->y.base + (uint64_t)(column * step);
        uint32_t have = j * 16 < t->columns ? (1u << (tile_m / 16)) - 1 : 0;
        if (d->sparse_c) {
            const int at = column >> d->block_other, in = column & ((1 << d->block_other) - 1);
            moei_sparse_entry e = moei_sparse_read(d, t, at);
            const bool follows = at > 0 && t->begin + at < t->end;
            const int before = follows ? d->block[t->begin + at - 1] : -1;
            moei_sparse_check_entry(d, t, at, before, &e);
            p = (uint64_t)(uintptr_t)d->y.base;
            have = 0;
            if (e.block >= 0 && j * 16 < t->columns) {
                have = moei_sparse_rows(d, e.info, tile_m);
                for (int i = 0; i < tile_m / 16 && d->x.table; ++i)
                    if ((have >> i & 1) && i * 16 < t->rows)
                        (void)moei_sparse_table_address(d, &d->x, (t->row + i * 16) >> d->block_m);
                p += (uint64_t)((e.block * ((int64_t)1 << d->block_other) + in) * step);
                if (d->y.table) {
                    p = moei_sparse_table_address(d, &d->y, e.block);
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

/* Returns the row of depths.keep for the tile's strip; null: all depths count. */
MOE_DEVICE const uint8_t* moei_sparse_depths_of(const moei_sparse_args* d,
                                                const moei_sparse_position* t)
{
    const int32_t filter = d->depths.filter ? d->depths.filter[t->strip / d->depths.strips] : 0;
    return filter > 0 ? d->depths.keep + (filter - 1) * d->depths.stride : (const uint8_t*)0;
}

/* Returns the bits of the 16 depths from k on that count. */
MOE_DEVICE uint32_t moei_sparse_depth_bits(const moei_sparse_args* d, const moei_sparse_position* t,
                                           int64_t k)
{
    const uint8_t* there = moei_sparse_depths_of(d, t);
    uint32_t bits = 0;
    if (!there) return 0xffff;
    MOE_NO_UNROLL
    for (int i = 0; i < 16; ++i) bits |= (there[k + i] != 0 ? 1u : 0u) << i;
    return bits;
}

/* Writes slices of depth number first .. first + 31, one a lane, to slice_x and slice_y. Called by
   a whole warp. predicated, a literal: 0: all depths count.
     1. dsd, dds: read and check the entry of the lane's depths; k: their depth in the matrix. An entry
        that is bad or absent gets k = d->k, which reads nothing.
     2. Count the depths inside the matrix, 0 .. 16.
     3. Add the address parts, set the bits, write both slices. */
MOE_DEVICE void moei_sparse_slices(const moei_sparse_args* d, const moei_sparse_position* t,
                                   moei_sparse_shared* s, int first, const int predicated,
                                   const int tile_m)
{
    const int number = first + moe_lane(), depth = number * 16;
    const int64_t x_step = moei_sparse_step(&d->x, MOE_MAJOR_MN);
    const int64_t y_step = moei_sparse_step(&d->y, MOE_MAJOR_MN);
    moei_sparse_slice x, y;
    int64_t k = depth; /* depth in the matrix */
    x.at = y.at = 0;
    x.rows = s->rows;
    if (!d->sparse_c) {
        const int at = depth >> d->block_other, in = depth & ((1 << d->block_other) - 1);
        moei_sparse_entry e = moei_sparse_read(d, t, at);
        const bool follows = at > 0 && t->begin + at < t->end;
        moei_sparse_check_entry(d, t, at, follows ? d->block[t->begin + at - 1] : -1, &e);
        x.rows &= moei_sparse_rows(d, e.info, tile_m);
        k = e.block * ((int64_t)1 << d->block_other) + in;
        if (e.block < 0) {
            k = d->k;
        } else if (d->y.table) {
            const uint64_t address = moei_sparse_table_address(d, &d->y, e.block);
            y.at = address - (uint64_t)((k - in) * y_step);
            if (address == 0) k = d->k;
        }
        if (d->packed && k < d->k)
            x.at = ((uint64_t)(uint32_t)e.info << (d->block_m + d->block_other)) * 2 +
                   (uint64_t)((in - k) * x_step);
    }
    x.count = y.count = k >= d->k ? 0 : d->k - k < 16 ? (int)(d->k - k) : 16;
    if (x.count == 0) { /* no byte is read, but the address must be aligned */
        x.rows = 0;
        k = 0;
    }
    x.at += (uint64_t)(k * x_step);
    y.at += (uint64_t)(k * y_step);
    y.rows = 0xffff;
    if (predicated && d->depths.filter && y.count > 0) y.rows = moei_sparse_depth_bits(d, t, k);
    s->slice_x[number % (2 * MOE_WARP_SIZE)] = x;
    s->slice_y[number % (2 * MOE_WARP_SIZE)] = y;
}

/* Writes the address parts of the slices of C over those of X and Y: s->x, s->y. Called by the
   whole thread block after a barrier: no thread reads X or Y any more. */
MOE_DEVICE void moei_sparse_address_c(const moei_sparse_args* d, const moei_sparse_position* t,
                                      moei_sparse_shared* s, const int tile_m, const int tile_n)
{
    const int tid = (int)threadIdx.x, bytes = (d->c_dtype == MOE_FP32 ? 4 : 2);
    if (tid < tile_m / 16) {
        const int64_t step = d->c.major == MOE_MAJOR_MN ? bytes : d->c.stride * bytes;
        const int row = t->row + tid * 16, in = row & ((1 << d->block_m) - 1);
        uint64_t p = (uint64_t)(uintptr_t)d->c.base;
        if (d->c.table)
            p = (s->rows >> tid & 1) ? (uint64_t)(uintptr_t)d->c.table[row >> d->block_m] : 0;
        s->x[tid] = p + (uint64_t)((d->c.table || (d->sparse_c && d->packed) ? in : row) * step);
    }
    if (tid >= 32 && tid < 32 + tile_n / 16) {
        const int64_t step = d->c.major == MOE_MAJOR_MN ? d->c.stride * bytes : bytes;
        const int column = t->column + (tid - 32) * 16;
        int64_t at = column * step;
        if (d->sparse_c) {
            const int in = column & ((1 << d->block_other) - 1);
            const moei_sparse_entry e = moei_sparse_read(d, t, column >> d->block_other);
            at = (e.block * ((int64_t)1 << d->block_other) + in) * step;
            if (d->packed)
                at = e.info * ((int64_t)bytes << (d->block_m + d->block_other)) + in * step;
        }
        s->y[tid - 32] = (uint64_t)at;
    }
}

#endif
