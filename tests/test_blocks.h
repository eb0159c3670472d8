/* test_blocks.h: masks in all their forms, and matrices that are strided, packed or in parts behind
   a pointer table. test_product.h makes block-sparse products of them. Included after test.h. */
#ifndef MOE_TESTS_TEST_BLOCKS_H
#define MOE_TESTS_TEST_BLOCKS_H

#include "moe/block_sparse/desc.h"
#include "moe/ref/block_sparse.h"

#define TMATRIX_MOST 24 /* parts of a matrix */

enum { TFORM_BYTES, TFORM_BITS, TFORM_LIST };
enum {
    TPATTERN_RANDOM,
    TPATTERN_EMPTY,
    TPATTERN_FULL,
    TPATTERN_ONE,
    TPATTERN_LAST,
    TPATTERN_DIAGONAL
};
/* Normal numbers; whole ones, -2 .. 2; whole ones without 0. */
enum { TDRAW_NORMAL, TDRAW_INT, TDRAW_NONZERO };

/* ------------------------------------------------------------------ masks */

typedef struct tmask {
    int rows, columns, block_rows, block_columns, RB, CB;
    int count, max_blocks;
    uint8_t* present; /* [RB, CB] */
    int32_t* number;  /* [RB, CB] in row order, -1: masked out */
    int32_t *row_offset, *column_index, *column_offset, *row_index, *position; /* host copies */
    tbuf d_bytes, d_bits, d_row_offset, d_column_index, d_column_offset, d_row_index, d_position;
} tmask;

/* Puts all forms of `present` on the device. Bytes of present sparse blocks are any but 0. Bits
   past the last column are noise, list entries past the last sparse block poison. */
MOEI_UNUSED static void tmask_put(tmask* t, trand* r)
{
    const int words = (t->CB + 31) / 32;
    uint8_t* bytes = (uint8_t*)test_host(t->RB * t->CB);
    uint32_t* bits = (uint32_t*)test_host(t->RB * words * 4);
    moe_ref_block_sparse_bits(t->present, t->RB, t->CB, bits);
    t->count = (int)moe_ref_block_sparse_numbers(t->present, t->RB, t->CB, t->number);
    test_poison(t->column_index, (size_t)t->max_blocks * 4);
    test_poison(t->row_index, (size_t)t->max_blocks * 4);
    test_poison(t->position, (size_t)t->max_blocks * 4);
    (void)moe_ref_block_sparse_list(t->present, t->RB, t->CB, t->row_offset, t->column_index,
                                    t->column_offset, t->row_index, t->position);
    for (int i = 0; i < t->RB * t->CB; ++i)
        bytes[i] = t->present[i] ? (uint8_t)trand_int(r, 1, 255) : 0;
    for (int i = 0; i < t->RB && t->CB % 32; ++i)
        bits[i * words + words - 1] |= (uint32_t)trand_bits(r) << (t->CB % 32);
    tbuf_put(&t->d_bytes, bytes);
    tbuf_put(&t->d_bits, bits);
    tbuf_put(&t->d_row_offset, t->row_offset);
    tbuf_put(&t->d_column_index, t->column_index);
    tbuf_put(&t->d_column_offset, t->column_offset);
    tbuf_put(&t->d_row_index, t->row_index);
    tbuf_put(&t->d_position, t->position);
    free(bytes);
    free(bits);
}

/* percent: of the sparse blocks, where they are random. */
MOEI_UNUSED static void tmask_draw(tmask* t, int pattern, int percent, trand* r)
{
    const int n = t->RB * t->CB, one = n > 0 ? (int)trand_int(r, 0, n - 1) : 0;
    for (int i = 0; i < n; ++i) {
        const int row = i / t->CB, column = i % t->CB;
        const int most = t->RB > t->CB ? t->RB : t->CB;
        t->present[i] = pattern == TPATTERN_RANDOM     ? trand_int(r, 0, 99) < percent
                        : pattern == TPATTERN_FULL     ? 1
                        : pattern == TPATTERN_ONE      ? i == one
                        : pattern == TPATTERN_LAST     ? i == n - 1
                        : pattern == TPATTERN_DIAGONAL ? row * most / t->RB == column * most / t->CB
                                                       : 0;
    }
}

/* room: of the list, beyond the present sparse blocks; -1: for all sparse blocks. */
MOEI_UNUSED static void tmask_new(tmask* t, int rows, int columns, int block_rows,
                                  int block_columns, int pattern, int percent, int room, trand* r)
{
    int all, count = 0;
    memset(t, 0, sizeof *t);
    t->rows = rows, t->columns = columns;
    t->block_rows = block_rows, t->block_columns = block_columns;
    t->RB = moe_block_sparse_count(rows, block_rows);
    t->CB = moe_block_sparse_count(columns, block_columns);
    all = t->RB * t->CB;
    t->present = (uint8_t*)test_host(all);
    t->number = (int32_t*)test_host(all * 4);
    tmask_draw(t, pattern, percent, r);
    for (int i = 0; i < all; ++i) count += t->present[i];
    t->max_blocks = room < 0 ? all : count + room;
    t->row_offset = (int32_t*)test_host(t->RB * 4 + 4);
    t->column_offset = (int32_t*)test_host(t->CB * 4 + 4);
    t->column_index = (int32_t*)test_host(t->max_blocks * 4);
    t->row_index = (int32_t*)test_host(t->max_blocks * 4);
    t->position = (int32_t*)test_host(t->max_blocks * 4);
    t->d_bytes = tbuf_new("mask bytes", (size_t)all, 1);
    t->d_bits = tbuf_new("mask bits", (size_t)(t->RB * ((t->CB + 31) / 32)) * 4, 4);
    t->d_row_offset = tbuf_new("row_offset", (size_t)t->RB * 4 + 4, 4);
    t->d_column_offset = tbuf_new("column_offset", (size_t)t->CB * 4 + 4, 4);
    t->d_column_index = tbuf_new("column_index", (size_t)t->max_blocks * 4, 4);
    t->d_row_index = tbuf_new("row_index", (size_t)t->max_blocks * 4, 4);
    t->d_position = tbuf_new("position", (size_t)t->max_blocks * 4, 4);
    tmask_put(t, r);
}

MOEI_UNUSED static void tmask_free(tmask* t)
{
    tbufs_free(TBUFS(&t->d_bytes, &t->d_bits, &t->d_row_offset, &t->d_column_index,
                     &t->d_column_offset, &t->d_row_index, &t->d_position));
    free(t->present), free(t->number), free(t->row_offset), free(t->column_offset);
    free(t->column_index), free(t->row_index), free(t->position);
}

/* by_column: the list has its column order too; position: and the numbers of its entries. */
MOEI_UNUSED static moe_block_sparse_mask tmask_view(const tmask* t, int form, int by_column,
                                                    int position)
{
    moe_block_sparse_mask m;
    memset(&m, 0, sizeof m);
    m.rows = t->rows, m.columns = t->columns;
    m.block_rows = t->block_rows, m.block_columns = t->block_columns;
    if (form == TFORM_BYTES) m.bytes = (const uint8_t*)t->d_bytes.p;
    if (form == TFORM_BITS) m.bits = (const uint32_t*)t->d_bits.p;
    if (form == TFORM_LIST) {
        m.row_offset = (const int32_t*)t->d_row_offset.p;
        m.column_index = (const int32_t*)t->d_column_index.p;
        m.max_blocks = t->max_blocks;
    }
    if (form == TFORM_LIST && by_column) {
        m.column_offset = (const int32_t*)t->d_column_offset.p;
        m.row_index = (const int32_t*)t->d_row_index.p;
    }
    if (form == TFORM_LIST && by_column && position) m.position = (const int32_t*)t->d_position.p;
    return m;
}

/* Returns 1 where block row i, or with by_column block column i, has a present sparse block. */
MOEI_UNUSED static int tmask_any(const tmask* t, int i, int by_column)
{
    int any = 0;
    for (int j = 0; j < (by_column ? t->RB : t->CB); ++j)
        any |= t->present[by_column ? j * t->CB + i : i * t->CB + j];
    return any;
}

/* ------------------------------------------------------------------ matrices */

/* A matrix as it lies. All that is no element is NaN: gaps between rows, masked-out sparse
   blocks. */
typedef struct tmatrix {
    int rows, columns, dtype;
    int64_t stride;       /* elements between rows; 0: packed */
    const tmask* mask;    /* of the sparse one; else null */
    int part_size, by_column; /* parts of part_size rows or columns each; 0: in one part */
    int parts;
    tbuf part[TMATRIX_MOST], table; /* device; a null part has no buffer */
    void* host[TMATRIX_MOST];       /* what was put there */
} tmatrix;

/* Returns where element (i, j) lies in its part; -1: nowhere. */
MOEI_UNUSED static int64_t tmatrix_at(const tmatrix* t, int i, int j, int* part)
{
    *part = !t->part_size ? 0 : (t->by_column ? j : i) / t->part_size;
    if (t->mask)
        return moe_ref_block_sparse_where(t->mask->number, t->mask->CB, t->mask->block_rows,
                                          t->mask->block_columns, t->stride, i, j);
    if (!t->host[*part]) return -1;
    if (t->part_size && t->by_column) j %= t->part_size;
    else if (t->part_size) i %= t->part_size;
    return i * t->stride + j;
}

typedef struct tmatrix_want {
    const char* name;
    int rows, columns, dtype, pad;
    const tmask* mask; /* of the sparse one */
    int packed;
    int part_size, by_column;
    int narrow;             /* 1: parts by column have rows no further apart than they need */
    const uint8_t* present; /* [parts] 0: the entry is null; or null: no entry is */
} tmatrix_want;

/* A dense matrix in one part; pad: stride - least. */
MOEI_UNUSED static tmatrix_want tmatrix_dense(const char* name, int rows, int columns, int dtype,
                                              int pad)
{
    tmatrix_want w;
    memset(&w, 0, sizeof w);
    w.name = name;
    w.rows = rows, w.columns = columns;
    w.dtype = dtype;
    w.pad = pad;
    return w;
}

/* Makes it the sparse matrix of this mask; mask null: the matrix stays dense. */
MOEI_UNUSED static void tmatrix_sparse(tmatrix_want* w, const tmask* mask, int packed)
{
    w->mask = mask;
    w->packed = mask && packed;
}

MOEI_UNUSED static void tmatrix_new(tmatrix* t, const tmatrix_want* w)
{
    const int elem = moe_dtype_bytes(w->dtype), along = w->by_column ? w->columns : w->rows;
    const int width = w->part_size && w->by_column && w->narrow && w->part_size < w->columns
                          ? w->part_size
                          : w->columns;
    memset(t, 0, sizeof *t);
    t->rows = w->rows, t->columns = w->columns, t->dtype = w->dtype;
    t->mask = w->mask;
    t->part_size = w->part_size, t->by_column = w->by_column;
    t->stride = w->packed ? 0 : (width + 7) / 8 * 8 + w->pad;
    t->parts = w->part_size ? moe_block_sparse_count(along, w->part_size) : 1;
    if (t->parts > TMATRIX_MOST) {
        printf("%d parts are too many\n", t->parts);
        exit(1);
    }
    for (int s = 0; s < t->parts; ++s) {
        const int left = along - s * w->part_size, here = left < w->part_size ? left : w->part_size;
        const int rows = w->part_size && !w->by_column ? here : w->rows;
        const int columns = w->part_size && w->by_column ? here : w->columns;
        size_t bytes = (size_t)moe_extent(rows, t->stride, columns, w->dtype);
        if (w->packed)
            bytes = (size_t)elem * (size_t)w->mask->max_blocks *
                    (size_t)(w->mask->block_rows * w->mask->block_columns);
        if (w->present && !w->present[s]) continue;
        t->part[s] = tbuf_new(w->name, bytes, 16 * (size_t)(s % 3));
        t->host[s] = test_host((int64_t)bytes);
    }
    if (w->part_size) {
        void* address[TMATRIX_MOST];
        for (int s = 0; s < t->parts; ++s) address[s] = t->part[s].p;
        t->table = tbuf_from("table", address, (size_t)t->parts * sizeof(void*), 8);
    }
}

MOEI_UNUSED static void tmatrix_free(tmatrix* t)
{
    for (int s = 0; s < t->parts; ++s) {
        if (t->host[s]) tbuf_free(&t->part[s]);
        free(t->host[s]);
    }
    if (t->part_size) tbuf_free(&t->table);
}

MOEI_UNUSED static void tmatrix_put(tmatrix* t)
{
    for (int s = 0; s < t->parts; ++s)
        if (t->host[s]) tbuf_put(&t->part[s], t->host[s]);
}

MOEI_UNUSED static void tmatrix_poison(tmatrix* t)
{
    for (int s = 0; s < t->parts; ++s)
        if (t->host[s]) tbuf_poison(&t->part[s]);
}

/* Draws the elements and puts them on the device. */
MOEI_UNUSED static void tmatrix_fill(tmatrix* t, int draw, float scale, trand* r)
{
    for (int i = 0; i < t->rows; ++i)
        for (int j = 0; j < t->columns; ++j) {
            int part;
            const int64_t at = tmatrix_at(t, i, j, &part);
            const int whole = (int)trand_int(r, -2, 2);
            float v = draw == TDRAW_NORMAL ? trand_normal(r) * scale : (float)whole;
            if (draw == TDRAW_NONZERO && whole == 0) v = 1;
            if (at >= 0) moe_store(t->host[part], at, t->dtype, v);
        }
    tmatrix_put(t);
}

/* Sets the elements of rows, or with by_column of columns, begin .. end to v. */
MOEI_UNUSED static void tmatrix_set(tmatrix* t, int by_column, int begin, int end, float v)
{
    for (int i = by_column ? 0 : begin; i < (by_column ? t->rows : end) && i < t->rows; ++i)
        for (int j = by_column ? begin : 0; j < (by_column ? end : t->columns) && j < t->columns;
             ++j) {
            int part;
            const int64_t at = tmatrix_at(t, i, j, &part);
            if (at >= 0) moe_store(t->host[part], at, t->dtype, v);
        }
}

/* Returns 1 where the device still holds what was put there; with `poison`, the poison. */
MOEI_UNUSED static int tmatrix_same(const tmatrix* t, int poison)
{
    int same = 1;
    for (int s = 0; s < t->parts; ++s)
        if (t->host[s]) same &= tbuf_holds(&t->part[s], poison ? (const void*)0 : t->host[s]);
    return same;
}

#endif
