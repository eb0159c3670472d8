/* block_sparse.h: the reference of sparse-block masks, their lists, and the block-sparse product.
   C11 and C++14; no CUDA.

     C [m, n] = A [m, k] * B [k, n], with one of the three sparse:
       sdd  C: an element of a masked-out sparse block is 0
       dsd  A: an element of a masked-out sparse block counts as 0 and is not read
       dds  B: as A of dsd

   C is written dense, whatever the storage of the sparse matrix; moe_ref_block_sparse_where returns
   the index of its elements in storage. Masks are bytes [RB, CB] here, of the sparse matrix as
   stored; moe_ref_block_sparse_bytes converts all other forms.

   Functions: moe_ref_block_sparse_f32 and moe_ref_block_sparse_f64. */
#ifndef MOE_REF_BLOCK_SPARSE_H
#define MOE_REF_BLOCK_SPARSE_H

#include <string.h>

#include "../block_sparse/desc.h"
#include "../faults.h"
#include "real.h"

typedef struct moe_ref_block_sparse_desc {
    const void* a;                      /* a_dtype, [m, k], transposed [k, m]; null with a table */
    const void* b;                      /* b_dtype, [k, n], transposed [n, k]; null with a table */
    const void* const* a_table;         /* host addresses, as in moe_block_sparse_desc; or null */
    const void* const* b_table;         /* the same of B */
    const uint8_t* mask;                /* [RB, CB] of the sparse matrix as stored, 0: masked out */
    int32_t op;                         /* moe_block_sparse_op */
    int32_t m, n, k;                    /* sizes of the product */
    int32_t block_rows, block_columns;  /* of a sparse block, elements */
    int64_t a_stride, b_stride;         /* elements between rows as stored; 0 = dense */
    int32_t a_transposed, b_transposed; /* 0 or 1 */
    int32_t packed;                     /* 1: A of dsd, B of dds is packed */
    int32_t a_dtype, b_dtype;           /* moe_dtype or MOE_REF_REAL */
} moe_ref_block_sparse_desc;

/* Writes number [RB, CB]: the number of each sparse block in row order, -1 where it is masked out.
   Returns the number of sparse blocks that are present. */
MOE_HOST int64_t moe_ref_block_sparse_numbers(const uint8_t* bytes, int64_t num_block_rows,
                                              int64_t num_block_columns, int32_t* number)
{
    int32_t count = 0;
    for (int64_t i = 0; i < num_block_rows * num_block_columns; ++i)
        number[i] = bytes[i] ? count++ : -1;
    return count;
}

/* Writes the list of a mask, as in moe_block_sparse_mask. column_offset, row_index and position are
   all null or all given. Returns the number of entries. */
MOE_HOST int64_t moe_ref_block_sparse_list(const uint8_t* bytes, int64_t num_block_rows,
                                           int64_t num_block_columns, int32_t* row_offset,
                                           int32_t* column_index, int32_t* column_offset,
                                           int32_t* row_index, int32_t* position)
{
    int32_t* number = (int32_t*)malloc((size_t)(num_block_rows * num_block_columns) * 4 + 4);
    const int64_t count =
        moe_ref_block_sparse_numbers(bytes, num_block_rows, num_block_columns, number);
    int32_t p = 0;
    for (int64_t i = 0; i < num_block_rows; ++i) {
        row_offset[i] = p;
        for (int64_t j = 0; j < num_block_columns; ++j)
            if (bytes[i * num_block_columns + j]) column_index[p++] = (int32_t)j;
    }
    row_offset[num_block_rows] = p;
    if (column_offset) {
        p = 0;
        for (int64_t j = 0; j < num_block_columns; ++j) {
            column_offset[j] = p;
            for (int64_t i = 0; i < num_block_rows; ++i)
                if (bytes[i * num_block_columns + j]) {
                    row_index[p] = (int32_t)i;
                    position[p++] = number[i * num_block_columns + j];
                }
        }
        column_offset[num_block_columns] = p;
    }
    free(number);
    return count;
}

/* Writes the bits [RB, ceil(CB / 32)] of a mask. Bits past the last column are 0. */
MOE_HOST void moe_ref_block_sparse_bits(const uint8_t* bytes, int64_t num_block_rows,
                                        int64_t num_block_columns, uint32_t* bits)
{
    const int64_t words = (num_block_columns + 31) / 32;
    memset(bits, 0, (size_t)(num_block_rows * words) * 4);
    for (int64_t i = 0; i < num_block_rows; ++i)
        for (int64_t j = 0; j < num_block_columns; ++j)
            if (bytes[i * num_block_columns + j]) bits[i * words + j / 32] |= 1u << (j % 32);
}

/* Adds to the mask the sparse blocks of row r in expert e's columns. */
MOE_HOST void moei_ref_block_add(const moe_block_sparse_list_desc* d, int64_t r, int e,
                                 uint8_t* bytes)
{
    const int64_t num_block_columns = moe_block_sparse_count(d->columns, d->block_columns);
    const int64_t each = d->columns / d->num_experts / d->block_columns;
    for (int64_t j = e * each; j < (e + 1) * each; ++j)
        bytes[r / d->block_rows * num_block_columns + j] = 1;
}

/* Writes bytes [RB, CB], each 0 or 1, from the source that the descriptor gives. The descriptor
   has host pointers here. Reads its sources and sizes alone. Returns the fault of the source,
   code 0 if none: a bad id is skipped, after a bad offset no sparse block is added. */
MOE_HOST moe_fault moe_ref_block_sparse_bytes(const moe_block_sparse_list_desc* d, uint8_t* bytes)
{
    const int64_t num_block_rows = moe_block_sparse_count(d->rows, d->block_rows);
    const int64_t num_block_columns = moe_block_sparse_count(d->columns, d->block_columns);
    const int64_t words = (num_block_columns + 31) / 32;
    const int64_t slots = (d->whole_batch ? d->rows > 0 : d->rows) * (int64_t)d->top_k;
    moe_fault fault = {MOE_FAULT_NONE, 0, 0};
    memset(bytes, 0, (size_t)(num_block_rows * num_block_columns));
    for (int64_t i = 0; d->bytes && i < num_block_rows * num_block_columns; ++i)
        bytes[i] = d->bytes[i] != 0;
    for (int64_t i = 0; d->bits && i < num_block_rows; ++i)
        for (int64_t j = 0; j < num_block_columns; ++j)
            bytes[i * num_block_columns + j] = d->bits[i * words + j / 32] >> (j % 32) & 1;
    for (int64_t slot = 0; d->ids && slot < slots; ++slot) {
        const int e = d->ids[slot];
        if (e >= 0 && e < d->num_experts) {
            if (d->whole_batch)
                for (int64_t r = 0; r < d->rows; ++r) moei_ref_block_add(d, r, e, bytes);
            else moei_ref_block_add(d, slot / d->top_k, e, bytes);
        } else if (e != -1 && fault.code == MOE_FAULT_NONE) {
            fault.code = MOE_FAULT_BAD_ID;
            fault.index = slot;
        }
    }
    if (d->expert_offset) {
        int32_t before = 0;
        for (int e = 0; e < d->num_experts; ++e) {
            const int32_t from = d->expert_offset[e], to = d->expert_offset[e + 1];
            if (from < before || to < from || to > d->rows) {
                fault.code = MOE_FAULT_BAD_OFFSET;
                fault.index = e;
                return fault;
            }
            before = from;
        }
        for (int e = 0; e < d->num_experts; ++e)
            for (int64_t r = d->expert_offset[e]; r < d->expert_offset[e + 1]; ++r)
                moei_ref_block_add(d, r, e, bytes);
    }
    return fault;
}

/* Returns the index of element (i, j) of a sparse matrix as stored, with CB sparse blocks in a
   block row; -1 where it is masked out. number: from moe_ref_block_sparse_numbers; stride: of a
   strided matrix, 0 = packed. */
MOE_HOST int64_t moe_ref_block_sparse_where(const int32_t* number, int64_t num_block_columns,
                                            int block_rows, int block_columns, int64_t stride,
                                            int64_t i, int64_t j)
{
    const int64_t p = number[i / block_rows * num_block_columns + j / block_columns];
    if (p < 0) return -1;
    if (stride) return i * stride + j;
    return (p * block_rows + i % block_rows) * block_columns + j % block_columns;
}

/* One operand, A or B, as stored: element (i, j) of [rows, columns]. */
typedef struct moei_ref_block_operand {
    const void* p;                     /* the operand; null with a table */
    const void* const* table;          /* address of every `table_step` rows or columns; or null */
    const int32_t* number;             /* [RB, CB] of the sparse operand; else null */
    int64_t num_block_columns, stride; /* CB; elements between rows, 0 = packed */
    int block_rows, block_columns, table_step, by_column, dtype; /* elements; moe_dtype */
} moei_ref_block_operand;

/* Returns the buffer of element (i, j) and its index *at there; null where it is masked out. */
MOE_HOST const void* moei_ref_block_find(const moei_ref_block_operand* o, int64_t i, int64_t j,
                                         int64_t* at)
{
    *at = i * o->stride + j;
    if (o->number) {
        *at = moe_ref_block_sparse_where(o->number, o->num_block_columns, o->block_rows,
                                         o->block_columns, o->stride, i, j);
        return *at < 0 ? (const void*)0 : o->p;
    }
    if (!o->table) return o->p;
    if (o->by_column) {
        *at = i * o->stride + j % o->table_step;
        return o->table[j / o->table_step];
    }
    *at = i % o->table_step * o->stride + j;
    return o->table[i / o->table_step];
}

/* What both operands and the mask resolve to, before a product is computed. */
typedef struct moei_ref_block_plan {
    moei_ref_block_operand a, b;
    int64_t num_block_columns; /* CB */
    int32_t* number;           /* [RB, CB]; the caller frees it */
} moei_ref_block_plan;

/* Resolves a descriptor. */
MOE_HOST moei_ref_block_plan moei_ref_block_begin(const moe_ref_block_sparse_desc* d)
{
    const int32_t a_rows = d->a_transposed ? d->k : d->m, a_columns = d->a_transposed ? d->m : d->k;
    const int32_t b_rows = d->b_transposed ? d->n : d->k, b_columns = d->b_transposed ? d->k : d->n;
    int32_t rows = d->m, columns = d->n; /* of the sparse matrix as stored */
    int64_t num_block_rows;
    moei_ref_block_plan p;
    memset(&p, 0, sizeof p);
    p.a.p = d->a;
    p.a.table = d->a_table;
    p.a.dtype = d->a_dtype;
    p.a.stride = moei_ref_or(d->a_stride, a_columns);
    p.b.p = d->b;
    p.b.table = d->b_table;
    p.b.dtype = d->b_dtype;
    p.b.stride = moei_ref_or(d->b_stride, b_columns);
    if (d->op == MOE_BLOCK_SPARSE_DSD) rows = a_rows, columns = a_columns;
    if (d->op == MOE_BLOCK_SPARSE_DDS) rows = b_rows, columns = b_columns;
    num_block_rows = moe_block_sparse_count(rows, d->block_rows);
    p.num_block_columns = moe_block_sparse_count(columns, d->block_columns);
    p.number = (int32_t*)malloc((size_t)(num_block_rows * p.num_block_columns) * 4 + 4);
    (void)moe_ref_block_sparse_numbers(d->mask, num_block_rows, p.num_block_columns, p.number);
    p.a.num_block_columns = p.b.num_block_columns = p.num_block_columns;
    p.a.block_rows = p.b.block_rows = d->block_rows;
    p.a.block_columns = p.b.block_columns = d->block_columns;
    if (d->op == MOE_BLOCK_SPARSE_SDD) { /* A's table runs along m, B's along n */
        p.a.table_step = d->block_rows;
        p.a.by_column = d->a_transposed;
        p.b.table_step = d->block_columns;
        p.b.by_column = !d->b_transposed;
    } else if (d->op == MOE_BLOCK_SPARSE_DSD) { /* B's table runs along k */
        p.a.number = p.number;
        if (d->packed) p.a.stride = 0;
        p.b.table_step = d->a_transposed ? d->block_rows : d->block_columns;
        p.b.by_column = d->b_transposed;
    } else { /* A's table runs along k */
        p.b.number = p.number;
        if (d->packed) p.b.stride = 0;
        p.a.table_step = d->b_transposed ? d->block_columns : d->block_rows;
        p.a.by_column = !d->a_transposed;
    }
    return p;
}

/* Returns 1 where the sparse block that decides over A [i, l] * B [l, j] is present. */
MOE_HOST int moei_ref_block_wanted(const moe_ref_block_sparse_desc* d, const moei_ref_block_plan* p,
                                   int64_t i, int64_t j, int64_t l)
{
    int64_t row = i, column = j;
    if (d->op == MOE_BLOCK_SPARSE_DSD)
        row = d->a_transposed ? l : i, column = d->a_transposed ? i : l;
    if (d->op == MOE_BLOCK_SPARSE_DDS)
        row = d->b_transposed ? j : l, column = d->b_transposed ? l : j;
    return p->number[row / d->block_rows * p->num_block_columns + column / d->block_columns] >= 0;
}

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "block_sparse.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "block_sparse.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
