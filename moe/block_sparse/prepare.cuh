/* prepare.cuh: resolves a block-sparse descriptor into its kernels' arguments, for
   block_sparse.cuh: defaults and refusals, X and Y of the normal form (tile.cuh), the order in
   which the mask is walked, the workspace. */
#ifndef MOE_BLOCK_SPARSE_PREPARE_CUH
#define MOE_BLOCK_SPARSE_PREPARE_CUH

#include <string.h>

#include "../base/check.h"
#include "../fields.h"
#include "../gemm/variant.cuh"
#include "strips.cuh"
#include "tile.cuh"

#define MOEI_SPARSE_MOST (0x7fffffff - 511) /* largest m, n, k: one more tile fits in int */

/* Column tiles of an sdd strip that have a thread block each; the thread blocks go on with the
   tiles beyond them. A strip may have few entries and the host does not know how many: thread
   blocks for all possible tiles would mostly be idle. */
#define MOEI_SPARSE_SDD_TILES 32

/* The launches of a call with one tile shape. */
typedef struct moei_sparse_plan {
    moei_sparse_args args;
    moei_sparse_strips_args strips;
    int32_t num_strips; /* thread blocks of moei_sparse_strips; 0: the mask's own list is walked */
    int64_t tiles;      /* thread blocks of the product */
} moei_sparse_plan;

/* Checks the sizes and the form of the mask of the sparse matrix [rows, columns] as stored. */
MOE_HOST moe_status moei_sparse_check_mask(const moe_block_sparse_mask* m, int32_t rows,
                                           int32_t columns, int packed)
{
    const int list = m->row_offset || m->column_index || m->column_offset || m->row_index ||
                     m->position || m->max_blocks;
    MOE_REQUIRE(moe_block_sparse_size_offered(m->block_rows), MOE_ERR_RANGE, block_rows);
    MOE_REQUIRE(moe_block_sparse_size_offered(m->block_columns), MOE_ERR_RANGE, block_columns);
    MOE_REQUIRE(m->rows == rows && m->columns == columns, MOE_ERR_CONFLICT, mask);
    MOE_REQUIRE(m->bytes || m->bits || list, MOE_ERR_NULL, mask);
    MOE_REQUIRE((m->bytes != 0) + (m->bits != 0) + list == 1, MOE_ERR_CONFLICT, mask);
    MOE_REQUIRE(!packed || list, MOE_ERR_CONFLICT, packed);
    MOE_REQUIRE(m->max_blocks >= 0, MOE_ERR_RANGE, max_blocks);
    return MOE_OK;
}

/* Returns 1 where the product is transposed: the columns of C are the rows of its tiles. Holds for
   dds, and for sdd where sparse blocks are wider than high and the mask can be walked by
   columns. */
MOE_HOST int moei_sparse_transposed(const moe_block_sparse_desc* d)
{
    const moe_block_sparse_mask* m = &d->mask;
    if (d->op != MOE_BLOCK_SPARSE_SDD) return d->op == MOE_BLOCK_SPARSE_DDS;
    return m->block_columns > m->block_rows &&
           (m->bytes || m->bits ||
            (m->column_offset && m->row_index && (m->position || !d->packed)));
}

/* Returns 1 where the mask is walked by columns. */
MOE_HOST int moei_sparse_by_column(const moe_block_sparse_desc* d)
{
    return d->op == MOE_BLOCK_SPARSE_DSD   ? d->a_transposed
           : d->op == MOE_BLOCK_SPARSE_DDS ? !d->b_transposed
                                           : moei_sparse_transposed(d);
}

/* Extent of a sparse block along m, n and k, elements; meaningless along the axis of C or the
   operands that the mask lacks (k of sdd, n of dsd, m of dds). */
typedef struct moei_sparse_widths {
    int m, n, k;
} moei_sparse_widths;

/* Returns the extents for a checked descriptor. */
MOE_HOST moei_sparse_widths moei_sparse_block_widths(const moe_block_sparse_desc* d)
{
    const int dsd = d->op == MOE_BLOCK_SPARSE_DSD, dds = d->op == MOE_BLOCK_SPARSE_DDS;
    const int rows = d->mask.block_rows, columns = d->mask.block_columns;
    moei_sparse_widths w;
    w.m = dsd && d->a_transposed ? columns : rows;
    w.n = dds && d->b_transposed ? rows : columns;
    w.k = (dsd ? !d->a_transposed : d->b_transposed) ? columns : rows;
    return w;
}

/* Checks the stride of an operand [rows, columns] as stored and fills in its default. `width`:
   columns of a buffer where a table divides the rows, else 0. `packed`: the stride must be 0. */
MOE_HOST moe_status moei_sparse_check_stride(int64_t* stride, int64_t rows, int64_t columns,
                                             int width, int packed, int field)
{
    if (packed) return *stride == 0 ? MOE_OK : (moe_status)(MOE_ERR_CONFLICT | (field << 8));
    if (*stride == 0) *stride = columns;
    if (!moei_stride_fits(*stride, width && width < columns ? width : columns, rows) ||
        *stride / 8 > 0x7fffffff) /* loads count in 16-byte vectors */
        return (moe_status)(MOE_ERR_STRIDE | (field << 8));
    return *stride % 8 == 0 ? MOE_OK : (moe_status)(MOE_ERR_ALIGN | (field << 8));
}

/* Checks the strides and fills in their defaults; refuses tables where they are not offered. A
   table that divides the stored rows lets rows be as short as one entry's columns. */
MOE_HOST moe_status moei_sparse_check_strides(moe_block_sparse_desc* d)
{
    const int sdd = d->op == MOE_BLOCK_SPARSE_SDD, dsd = d->op == MOE_BLOCK_SPARSE_DSD,
              dds = d->op == MOE_BLOCK_SPARSE_DDS;
    const int a_rows = d->a_transposed ? d->k : d->m, a_columns = d->a_transposed ? d->m : d->k;
    const int b_rows = d->b_transposed ? d->n : d->k, b_columns = d->b_transposed ? d->k : d->n;
    const moei_sparse_widths width = moei_sparse_block_widths(d);
    const int a_side_by_side = d->a_table && d->a_transposed == sdd; /* divides stored rows */
    const int b_side_by_side = d->b_table && d->b_transposed != sdd;
    MOE_REQUIRE(!d->a_table || !dsd, MOE_ERR_CONFLICT, a_table);
    MOE_REQUIRE(!d->b_table || !dds, MOE_ERR_CONFLICT, b_table);
    MOE_REQUIRE(!d->c_table || !sdd, MOE_ERR_CONFLICT, c_table);
    MOE_TRY(moei_sparse_check_stride(&d->a_stride, a_rows, a_columns,
                                     !a_side_by_side ? 0
                                     : sdd           ? width.m
                                                     : width.k,
                                     dsd && d->packed, MOE_FIELD_a_stride));
    MOE_TRY(moei_sparse_check_stride(&d->b_stride, b_rows, b_columns,
                                     !b_side_by_side ? 0
                                     : sdd           ? width.n
                                                     : width.k,
                                     dds && d->packed, MOE_FIELD_b_stride));
    return moei_sparse_check_stride(&d->c_stride, d->m, d->n, d->c_table && dds ? width.n : 0,
                                    sdd && d->packed, MOE_FIELD_c_stride);
}

/* Refuses sizes and options that the header does not offer, and fills in their defaults. Of
   pointers reads only which are null: they give the form of the mask, its order, and the tables. */
MOE_HOST moe_status moei_sparse_check_options(moe_block_sparse_desc* d)
{
    const int sdd = d->op == MOE_BLOCK_SPARSE_SDD, dsd = d->op == MOE_BLOCK_SPARSE_DSD,
              dds = d->op == MOE_BLOCK_SPARSE_DDS;
    const int a_rows = d->a_transposed ? d->k : d->m, a_columns = d->a_transposed ? d->m : d->k;
    const int b_rows = d->b_transposed ? d->n : d->k, b_columns = d->b_transposed ? d->k : d->n;
    MOE_REQUIRE(sdd || dsd || dds, MOE_ERR_OPTION, op);
    MOE_REQUIRE(d->m >= 0 && d->m <= MOEI_SPARSE_MOST, MOE_ERR_RANGE, m);
    MOE_REQUIRE(d->n >= 0 && d->n <= MOEI_SPARSE_MOST, MOE_ERR_RANGE, n);
    MOE_REQUIRE(d->k >= 0 && d->k <= MOEI_SPARSE_MOST, MOE_ERR_RANGE, k);
    MOE_REQUIRE((d->a_transposed | 1) == 1, MOE_ERR_OPTION, a_transposed);
    MOE_REQUIRE((d->b_transposed | 1) == 1, MOE_ERR_OPTION, b_transposed);
    MOE_REQUIRE((d->packed | 1) == 1, MOE_ERR_OPTION, packed);
    MOE_REQUIRE((d->zero_masked | 1) == 1, MOE_ERR_OPTION, zero_masked);
    MOE_REQUIRE(!d->zero_masked || (sdd && !d->packed), MOE_ERR_CONFLICT, zero_masked);
    MOE_REQUIRE(d->choice.tile >= 0 && d->choice.tile <= MOE_BLOCK_SPARSE_TILE_64x64 &&
                    d->choice.fallback_tile >= 0 &&
                    d->choice.fallback_tile <= MOE_BLOCK_SPARSE_TILE_64x64,
                MOE_ERR_OPTION, choice);
    MOE_REQUIRE(d->choice.fallback_tile == 0 || d->choice.tile, MOE_ERR_OPTION, choice);
    MOEI_REQUIRE_RANK(d);
    if (d->dtype == 0) d->dtype = MOE_BF16;
    MOE_REQUIRE(d->dtype == MOE_BF16 || d->dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    if (d->c_dtype == 0) d->c_dtype = d->dtype;
    MOE_REQUIRE(d->c_dtype == d->dtype || d->c_dtype == MOE_FP32, MOE_ERR_DTYPE, c_dtype);
    MOE_TRY(moei_sparse_check_mask(&d->mask,
                                   dsd   ? a_rows
                                   : dds ? b_rows
                                         : d->m,
                                   dsd   ? a_columns
                                   : dds ? b_columns
                                         : d->n,
                                   d->packed));
    MOE_TRY(moei_sparse_check_strides(d));
    MOE_REQUIRE(!(d->a && d->a_table), MOE_ERR_CONFLICT, a);
    MOE_REQUIRE(!(d->b && d->b_table), MOE_ERR_CONFLICT, b);
    MOE_REQUIRE(!(d->c && d->c_table), MOE_ERR_CONFLICT, c);
    return MOE_OK;
}

/* Refuses buffers that are null, misaligned or overlap. Requires checked options; `workspace`:
   bytes that the workspace must have. Where C is empty, only the mask is required. */
MOE_HOST moe_status moei_sparse_check_buffers(const moe_block_sparse_desc* d, size_t workspace)
{
    const int sdd = d->op == MOE_BLOCK_SPARSE_SDD, dsd = d->op == MOE_BLOCK_SPARSE_DSD,
              dds = d->op == MOE_BLOCK_SPARSE_DDS;
    const int a_rows = d->a_transposed ? d->k : d->m, a_columns = d->a_transposed ? d->m : d->k;
    const int b_rows = d->b_transposed ? d->n : d->k, b_columns = d->b_transposed ? d->k : d->n;
    const moe_block_sparse_mask* m = &d->mask;
    const moei_sparse_widths width = moei_sparse_block_widths(d);
    const uint64_t blocks_m = (uint64_t)moe_block_sparse_count(d->m, width.m) * 8;
    const uint64_t blocks_n = (uint64_t)moe_block_sparse_count(d->n, width.n) * 8;
    const uint64_t blocks_k = (uint64_t)moe_block_sparse_count(d->k, width.k) * 8;
    const uint64_t rb = (uint64_t)moe_block_sparse_count(m->rows, m->block_rows);
    const uint64_t cb = (uint64_t)moe_block_sparse_count(m->columns, m->block_columns);
    const uint64_t entries = (uint64_t)m->max_blocks * 4;
    const uint64_t area = (uint64_t)m->max_blocks * (uint64_t)(m->block_rows * m->block_columns);
    const int runs = d->m > 0 && d->n > 0, written = runs ? MOE_BUFFER_WRITTEN : MOE_BUFFER_READ;
    const int list = !m->bytes && !m->bits, by_column = moei_sparse_by_column(d);
    /* required: the order that is walked, and for zero_masked the row order */
    const int by_rows =
        list && (!by_column || d->zero_masked) ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ;
    const int by_columns = list && by_column ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ;
    const moe_buffer b[] = {
        {d->a, dsd && d->packed ? area * 2 : moe_extent(a_rows, d->a_stride, a_columns, d->dtype),
         16, runs && d->k && !d->a_table ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_a},
        {d->b, dds && d->packed ? area * 2 : moe_extent(b_rows, d->b_stride, b_columns, d->dtype),
         16, runs && d->k && !d->b_table ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_b},
        {d->a_table, sdd ? blocks_m : blocks_k, 8, MOE_BUFFER_READ, MOE_FIELD_a_table},
        {d->b_table, sdd ? blocks_n : blocks_k, 8, MOE_BUFFER_READ, MOE_FIELD_b_table},
        {d->c_table, dsd ? blocks_m : blocks_n, 8, MOE_BUFFER_READ, MOE_FIELD_c_table},
        {m->bytes, rb * cb, 1, MOE_BUFFER_READ, MOE_FIELD_bytes},
        {m->bits, rb * ((cb + 31) / 32) * 4, 4, MOE_BUFFER_READ, MOE_FIELD_bits},
        {m->row_offset, rb * 4 + 4, 4, by_rows, MOE_FIELD_row_offset},
        {m->column_index, entries, 4, by_rows, MOE_FIELD_column_index},
        {m->column_offset, cb * 4 + 4, 4, by_columns, MOE_FIELD_column_offset},
        {m->row_index, entries, 4, by_columns, MOE_FIELD_row_index},
        {m->position, entries, 4, d->packed ? by_columns : 0, MOE_FIELD_position},
        {d->c,
         sdd && d->packed ? area * (d->c_dtype == MOE_FP32 ? 4 : 2)
                          : moe_extent(d->m, d->c_stride, d->n, d->c_dtype),
         16, (runs && !d->c_table ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ) | written, MOE_FIELD_c},
        {d->workspace, d->workspace_bytes > workspace ? d->workspace_bytes : workspace, 16,
         (workspace ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ) | written, MOE_FIELD_workspace},
        {d->fault, 8, 8, written, MOE_FIELD_fault}};
    MOE_TRY(moe_check_buffers(b, (int)(sizeof b / sizeof b[0])));
    MOE_REQUIRE(d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE, workspace_bytes);
    return MOE_OK;
}

/* Checks options and buffers, and fills in the defaults. */
MOE_HOST moe_status moei_sparse_check(moe_block_sparse_desc* d, size_t workspace)
{
    MOE_TRY(moei_sparse_check_options(d));
    return moei_sparse_check_buffers(d, workspace);
}

/* Returns a matrix of the normal form; k_along: 1: k-major (C: not transposed). */
MOE_HOST moei_sparse_matrix moei_sparse_operand(const void* base, const void* const* table,
                                                int64_t stride, int k_along)
{
    moei_sparse_matrix x;
    x.base = (const char*)base;
    x.table = table;
    x.stride = stride;
    x.major = k_along ? MOE_MAJOR_K : MOE_MAJOR_MN;
    return x;
}

/* Returns log2 of n, a power of two. */
MOE_HOST int moei_sparse_log2(int n)
{
    int l = 0;
    while (n >> l > 1) ++l;
    return l;
}

/* Returns the number of block rows (walked by columns: block columns) that a strip joins for a tile
   shape. */
MOE_HOST int moei_sparse_join(const moe_block_sparse_desc* d, const moei_variant* t)
{
    const int height = moei_sparse_by_column(d) ? d->mask.block_columns : d->mask.block_rows;
    return d->packed || height >= t->shape.tile_m ? 1 : t->shape.tile_m / height;
}

/* Resolves a checked descriptor for one tile shape into *p. Carves the workspace from `base` +
   *workspace_bytes on and adds its bytes. `first`: the plan whose partial strips this plan
   computes; or null.
     1. Resolve X, Y, C and the sizes of the normal form.
     2. Count tiles and thread blocks.
     3. Divide the strips between the two plans.
     4. Walk a list without joined block rows as given, or
     5. Prepare the kernel that makes the strips. */
MOE_HOST moe_status moei_sparse_plan_tile(const moe_block_sparse_desc* d, const moei_variant* t,
                                          char* base, size_t* workspace_bytes,
                                          moei_sparse_plan* first, moei_sparse_plan* p)
{
    const moe_block_sparse_mask* m = &d->mask;
    const int transposed = moei_sparse_transposed(d), by_column = moei_sparse_by_column(d);
    const int sdd = d->op == MOE_BLOCK_SPARSE_SDD, list = !m->bytes && !m->bits;
    const int height = by_column ? m->block_columns : m->block_rows;
    const int width = by_column ? m->block_rows : m->block_columns;
    const int num_block_rows = moe_block_sparse_count(by_column ? m->columns : m->rows, height);
    const int join = moei_sparse_join(d, t);
    const int32_t *offset = by_column ? m->column_offset : m->row_offset,
                  *index = by_column ? m->row_index : m->column_index;
    moei_sparse_args* a = &p->args;
    moei_sparse_strips_args* s = &p->strips;
    const moei_sparse_matrix am = moei_sparse_operand(
        d->a, d->a_table,
        d->op == MOE_BLOCK_SPARSE_DSD && d->packed ? m->block_columns : d->a_stride,
        !d->a_transposed);
    const moei_sparse_matrix bm = moei_sparse_operand(
        d->b, d->b_table,
        d->op == MOE_BLOCK_SPARSE_DDS && d->packed ? m->block_columns : d->b_stride,
        d->b_transposed);
    int64_t entries;
    /* 1. normal form */
    memset(p, 0, sizeof *p);
    a->x = transposed ? bm : am;
    a->y = transposed ? am : bm;
    a->c = moei_sparse_operand(d->c, (const void* const*)d->c_table,
                               sdd && d->packed ? m->block_columns : d->c_stride, !transposed);
    a->fault = d->fault;
    a->rank = d->rank;
    a->m = transposed ? d->n : d->m;
    a->n = transposed ? d->m : d->n;
    a->k = d->k;
    a->sparse_c = sdd;
    a->packed = d->packed;
    a->block_m = moei_sparse_log2(height);
    a->block_other = moei_sparse_log2(width);
    a->strip_m = height * join;
    a->others = moe_block_sparse_count(by_column ? m->rows : m->columns, width);
    a->c_dtype = d->c_dtype;
    a->depths = d->depths;
    {
        /* 2. tiles */
        const int64_t step = a->strip_m < t->shape.tile_m ? a->strip_m : t->shape.tile_m;
        const int64_t columns = sdd ? (int64_t)a->others * width : a->n;
        a->tiles_m = (int32_t)((a->m + step - 1) / step);
        a->tiles_n = (int32_t)((columns + t->shape.tile_n - 1) / t->shape.tile_n);
        if (sdd && a->tiles_n > MOEI_SPARSE_SDD_TILES) a->tiles_n = MOEI_SPARSE_SDD_TILES;
        p->tiles = (int64_t)a->tiles_m * a->tiles_n;
        MOE_REQUIRE(p->tiles + (int64_t)a->tiles_n * MOEI_SPARSE_BAND <= 0x7fffffff, MOE_ERR_RANGE,
                    m);
    }
    if (first) {
        /* 3. strips of the two plans */
        first->args.share = a->share = first->args.partial;
        first->args.share_m = a->share_m = moei_sparse_log2(first->args.strip_m);
        a->share_of = 1;
    }
    if (list && join == 1) { /* 4. as given */
        a->begin = offset;
        a->end = offset + 1;
        a->block = index;
        a->info = d->packed && by_column ? m->position : 0;
        a->max_blocks = m->max_blocks;
        return MOE_OK;
    }
    /* 5. strips */
    p->num_strips = (num_block_rows + join - 1) / join;
    entries = list ? m->max_blocks : (int64_t)p->num_strips * a->others;
    MOE_REQUIRE(entries <= 0x7fffffff, MOE_ERR_RANGE, mask);
    s->bytes = m->bytes;
    s->bits = m->bits;
    s->offset = offset;
    s->index = index;
    s->begin = (int32_t*)moei_carve(base, workspace_bytes, (uint64_t)p->num_strips * 4);
    s->end = (int32_t*)moei_carve(base, workspace_bytes, (uint64_t)p->num_strips * 4);
    s->partial = (int32_t*)moei_carve(base, workspace_bytes, (uint64_t)p->num_strips * 4);
    s->block = (int32_t*)moei_carve(base, workspace_bytes, (uint64_t)entries * 4);
    s->info = (int32_t*)moei_carve(base, workspace_bytes, (uint64_t)entries * 4);
    s->fault = d->fault;
    s->rank = d->rank;
    s->num_block_rows = num_block_rows;
    s->others = a->others;
    s->join = join;
    s->by_column = by_column;
    s->words = (moe_block_sparse_count(m->columns, m->block_columns) + 31) / 32;
    s->max_blocks = m->max_blocks;
    s->only = a->share;
    s->ratio = first ? first->args.strip_m / a->strip_m : 1;
    a->begin = s->begin;
    a->end = s->end;
    a->block = s->block;
    a->info = join > 1 ? s->info : 0;
    a->partial = join > 1 ? s->partial : 0;
    a->max_blocks = (int32_t)entries;
    return MOE_OK;
}

#endif
