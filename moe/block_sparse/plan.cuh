/* plan.cuh: from a block-sparse descriptor to what its kernels take: defaults and refusals, which
   operand is X and which Y (tile.cuh), which order of the mask is walked, the workspace. */
#ifndef MOE_BLOCK_SPARSE_PLAN_CUH
#define MOE_BLOCK_SPARSE_PLAN_CUH

#include <string.h>

#include "../base/check.h"
#include "../fields.h"
#include "../gemm/variant.cuh"
#include "strips.cuh"
#include "tile.cuh"

#define MOEI_BLOCK_MOST (0x7fffffff - 511) /* m, n, k: a tile past them still counts */

/* Tiles of a strip of sdd that have a thread block each; it goes on with those beyond them. A strip
   may have few of its blocks, the host does not know how many, and blocks for all would mostly be
   idle. */
#define MOEI_BLOCK_SDD_TILES 32

/* What a call will run. */
typedef struct moei_block_plan {
    moei_block_args args;
    moei_strips_args strips; /* num_strips 0: the mask's own list is walked */
    int32_t num_strips;
    int64_t tiles;
} moei_block_plan;

/* Sizes and form of the mask of the sparse matrix [rows, columns]. */
MOE_HOST moe_status moei_block_check_mask(const moe_block_mask* m, int32_t rows, int32_t columns,
                                          int packed)
{
    const int list = m->row_offset || m->column_index || m->column_offset || m->row_index ||
                     m->position || m->max_blocks;
    MOEI_REQUIRE(moei_block_size_offered(m->block_rows), MOE_ERR_RANGE, block_rows);
    MOEI_REQUIRE(moei_block_size_offered(m->block_columns), MOE_ERR_RANGE, block_columns);
    MOEI_REQUIRE(m->rows == rows && m->columns == columns, MOE_ERR_CONFLICT, mask);
    MOEI_REQUIRE(m->bytes || m->bits || list, MOE_ERR_NULL, mask);
    MOEI_REQUIRE((m->bytes != 0) + (m->bits != 0) + list == 1, MOE_ERR_CONFLICT, mask);
    MOEI_REQUIRE(!packed || list, MOE_ERR_CONFLICT, packed);
    MOEI_REQUIRE(m->max_blocks >= 0, MOE_ERR_RANGE, max_blocks);
    return MOE_OK;
}

/* Is the product turned: are the columns of C the rows of its tiles? Those of dds are; those of sdd
   where its blocks are wider than high and the mask can be walked by columns. */
MOE_HOST int moei_block_turned(const moe_block_sparse_desc* d)
{
    const moe_block_mask* m = &d->mask;
    if (d->op != MOE_BLOCK_SDD) return d->op == MOE_BLOCK_DDS;
    return m->block_columns > m->block_rows &&
           (m->bytes || m->bits ||
            (m->column_offset && m->row_index && (m->position || !d->packed)));
}

/* Is the mask walked by columns? */
MOE_HOST int moei_block_by_column(const moe_block_sparse_desc* d)
{
    return d->op == MOE_BLOCK_DSD   ? d->a_transposed
           : d->op == MOE_BLOCK_DDS ? !d->b_transposed
                                    : moei_block_turned(d);
}

/* Widths of a strip along m, n and k, as far as the mask has blocks there. */
typedef struct moei_block_widths {
    int m, n, k;
} moei_block_widths;

MOE_HOST moei_block_widths moei_block_strip_widths(const moe_block_sparse_desc* d)
{
    const int dsd = d->op == MOE_BLOCK_DSD, dds = d->op == MOE_BLOCK_DDS;
    const int rows = d->mask.block_rows, columns = d->mask.block_columns;
    moei_block_widths w;
    w.m = dsd && d->a_transposed ? columns : rows;
    w.n = dds && d->b_transposed ? rows : columns;
    w.k = (dsd ? !d->a_transposed : d->b_transposed) ? columns : rows;
    return w;
}

/* Stride of one operand [rows, columns] as it lies, `strip` wide strips of it anywhere, or 0;
   `packed`: it has none. */
MOE_HOST moe_status moei_block_check_stride(int64_t* stride, int64_t rows, int64_t columns,
                                            int strip, int packed, int field)
{
    if (packed) return *stride == 0 ? MOE_OK : (moe_status)(MOE_ERR_CONFLICT | (field << 8));
    if (*stride == 0) *stride = columns;
    if (!moei_stride_fits(*stride, strip && strip < columns ? strip : columns, rows) ||
        *stride / 8 > 0x7fffffff) /* loads count in pieces of 8 */
        return (moe_status)(MOE_ERR_STRIDE | (field << 8));
    return *stride % 8 == 0 ? MOE_OK : (moe_status)(MOE_ERR_ALIGN | (field << 8));
}

/* Strides, and tables where they are offered. A table whose strips lie side by side lets rows be as
   short as a strip. */
MOE_HOST moe_status moei_block_check_strides(moe_block_sparse_desc* d)
{
    const int sdd = d->op == MOE_BLOCK_SDD, dsd = d->op == MOE_BLOCK_DSD,
              dds = d->op == MOE_BLOCK_DDS;
    const int a_rows = d->a_transposed ? d->k : d->m, a_columns = d->a_transposed ? d->m : d->k;
    const int b_rows = d->b_transposed ? d->n : d->k, b_columns = d->b_transposed ? d->k : d->n;
    const moei_block_widths strip = moei_block_strip_widths(d);
    const int a_beside = d->a_table && d->a_transposed == sdd; /* strips side by side */
    const int b_beside = d->b_table && d->b_transposed != sdd;
    MOEI_REQUIRE(!d->a_table || !dsd, MOE_ERR_CONFLICT, a_table);
    MOEI_REQUIRE(!d->b_table || !dds, MOE_ERR_CONFLICT, b_table);
    MOEI_REQUIRE(!d->c_table || !sdd, MOE_ERR_CONFLICT, c_table);
    MOEI_TRY(moei_block_check_stride(&d->a_stride, a_rows, a_columns,
                                     !a_beside ? 0
                                     : sdd     ? strip.m
                                               : strip.k,
                                     dsd && d->packed, MOE_FIELD_a_stride));
    MOEI_TRY(moei_block_check_stride(&d->b_stride, b_rows, b_columns,
                                     !b_beside ? 0
                                     : sdd     ? strip.n
                                               : strip.k,
                                     dds && d->packed, MOE_FIELD_b_stride));
    return moei_block_check_stride(&d->c_stride, d->m, d->n, d->c_table && dds ? strip.n : 0,
                                   sdd && d->packed, MOE_FIELD_c_stride);
}

/* Refuses sizes and options that the header does not offer, and fills in their defaults. Asks only
   which pointers there are: they tell the mask's form, its order, and tables. */
MOE_HOST moe_status moei_block_check_options(moe_block_sparse_desc* d)
{
    const int sdd = d->op == MOE_BLOCK_SDD, dsd = d->op == MOE_BLOCK_DSD,
              dds = d->op == MOE_BLOCK_DDS;
    const int a_rows = d->a_transposed ? d->k : d->m, a_columns = d->a_transposed ? d->m : d->k;
    const int b_rows = d->b_transposed ? d->n : d->k, b_columns = d->b_transposed ? d->k : d->n;
    MOEI_REQUIRE(sdd || dsd || dds, MOE_ERR_OPTION, op);
    MOEI_REQUIRE(d->m >= 0 && d->m <= MOEI_BLOCK_MOST, MOE_ERR_RANGE, m);
    MOEI_REQUIRE(d->n >= 0 && d->n <= MOEI_BLOCK_MOST, MOE_ERR_RANGE, n);
    MOEI_REQUIRE(d->k >= 0 && d->k <= MOEI_BLOCK_MOST, MOE_ERR_RANGE, k);
    MOEI_REQUIRE((d->a_transposed | 1) == 1, MOE_ERR_OPTION, a_transposed);
    MOEI_REQUIRE((d->b_transposed | 1) == 1, MOE_ERR_OPTION, b_transposed);
    MOEI_REQUIRE((d->packed | 1) == 1, MOE_ERR_OPTION, packed);
    MOEI_REQUIRE((d->zero_masked | 1) == 1, MOE_ERR_OPTION, zero_masked);
    MOEI_REQUIRE(!d->zero_masked || (sdd && !d->packed), MOE_ERR_CONFLICT, zero_masked);
    MOEI_REQUIRE(d->choice.tile >= 0 && d->choice.tile <= MOE_BLOCK_TILE_64x64 &&
                     d->choice.rest >= 0 && d->choice.rest <= MOE_BLOCK_TILE_64x64,
                 MOE_ERR_OPTION, choice);
    MOEI_REQUIRE(d->choice.rest == 0 || d->choice.tile, MOE_ERR_OPTION, choice);
    MOEI_REQUIRE_RANK(d);
    if (d->dtype == 0) d->dtype = MOE_BF16;
    MOEI_REQUIRE(d->dtype == MOE_BF16 || d->dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    if (d->c_dtype == 0) d->c_dtype = d->dtype;
    MOEI_REQUIRE(d->c_dtype == d->dtype || d->c_dtype == MOE_FP32, MOE_ERR_DTYPE, c_dtype);
    MOEI_TRY(moei_block_check_mask(&d->mask,
                                   dsd   ? a_rows
                                   : dds ? b_rows
                                         : d->m,
                                   dsd   ? a_columns
                                   : dds ? b_columns
                                         : d->n,
                                   d->packed));
    MOEI_TRY(moei_block_check_strides(d));
    MOEI_REQUIRE(!(d->a && d->a_table), MOE_ERR_CONFLICT, a);
    MOEI_REQUIRE(!(d->b && d->b_table), MOE_ERR_CONFLICT, b);
    MOEI_REQUIRE(!(d->c && d->c_table), MOE_ERR_CONFLICT, c);
    return MOE_OK;
}

/* Refuses buffers that are absent, misaligned or overlap, of a descriptor whose options are checked
   and which wants so much workspace. Where C is empty only the mask has to be there. */
MOE_HOST moe_status moei_block_check_buffers(const moe_block_sparse_desc* d, size_t workspace)
{
    const int sdd = d->op == MOE_BLOCK_SDD, dsd = d->op == MOE_BLOCK_DSD,
              dds = d->op == MOE_BLOCK_DDS;
    const int a_rows = d->a_transposed ? d->k : d->m, a_columns = d->a_transposed ? d->m : d->k;
    const int b_rows = d->b_transposed ? d->n : d->k, b_columns = d->b_transposed ? d->k : d->n;
    const moe_block_mask* m = &d->mask;
    const moei_block_widths strip = moei_block_strip_widths(d);
    const uint64_t strips_m = (uint64_t)moe_num_blocks(d->m, strip.m) * 8;
    const uint64_t strips_n = (uint64_t)moe_num_blocks(d->n, strip.n) * 8;
    const uint64_t strips_k = (uint64_t)moe_num_blocks(d->k, strip.k) * 8;
    const uint64_t rb = (uint64_t)moe_num_blocks(m->rows, m->block_rows);
    const uint64_t cb = (uint64_t)moe_num_blocks(m->columns, m->block_columns);
    const uint64_t entries = (uint64_t)m->max_blocks * 4;
    const uint64_t area = (uint64_t)m->max_blocks * (uint64_t)(m->block_rows * m->block_columns);
    const int runs = d->m > 0 && d->n > 0, written = runs ? MOEI_WRITTEN : MOEI_READ;
    const int list = !m->bytes && !m->bits, by_column = moei_block_by_column(d);
    /* the order that is walked, and for zeros that by rows */
    const int by_rows = list && (!by_column || d->zero_masked) ? MOEI_REQUIRED : MOEI_READ;
    const int by_columns = list && by_column ? MOEI_REQUIRED : MOEI_READ;
    const moei_buffer b[] = {
        {d->a, dsd && d->packed ? area * 2 : moei_extent(a_rows, d->a_stride, a_columns, d->dtype),
         16, runs && d->k && !d->a_table ? MOEI_REQUIRED : MOEI_READ, MOE_FIELD_a},
        {d->b, dds && d->packed ? area * 2 : moei_extent(b_rows, d->b_stride, b_columns, d->dtype),
         16, runs && d->k && !d->b_table ? MOEI_REQUIRED : MOEI_READ, MOE_FIELD_b},
        {d->a_table, sdd ? strips_m : strips_k, 8, MOEI_READ, MOE_FIELD_a_table},
        {d->b_table, sdd ? strips_n : strips_k, 8, MOEI_READ, MOE_FIELD_b_table},
        {d->c_table, dsd ? strips_m : strips_n, 8, MOEI_READ, MOE_FIELD_c_table},
        {m->bytes, rb * cb, 1, MOEI_READ, MOE_FIELD_bytes},
        {m->bits, rb * ((cb + 31) / 32) * 4, 4, MOEI_READ, MOE_FIELD_bits},
        {m->row_offset, rb * 4 + 4, 4, by_rows, MOE_FIELD_row_offset},
        {m->column_index, entries, 4, by_rows, MOE_FIELD_column_index},
        {m->column_offset, cb * 4 + 4, 4, by_columns, MOE_FIELD_column_offset},
        {m->row_index, entries, 4, by_columns, MOE_FIELD_row_index},
        {m->position, entries, 4, d->packed ? by_columns : 0, MOE_FIELD_position},
        {d->c,
         sdd && d->packed ? area * (d->c_dtype == MOE_FP32 ? 4 : 2)
                          : moei_extent(d->m, d->c_stride, d->n, d->c_dtype),
         16, (runs && !d->c_table ? MOEI_REQUIRED : MOEI_READ) | written, MOE_FIELD_c},
        {d->workspace, d->workspace_bytes > workspace ? d->workspace_bytes : workspace, 16,
         (workspace ? MOEI_REQUIRED : MOEI_READ) | written, MOE_FIELD_workspace},
        {d->fault, 8, 8, written, MOE_FIELD_fault}};
    MOEI_TRY(moei_check_buffers(b, (int)(sizeof b / sizeof b[0])));
    MOEI_REQUIRE(d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE, workspace_bytes);
    return MOE_OK;
}

/* Fills in the defaults and refuses what the header does not offer. */
MOE_HOST moe_status moei_block_check(moe_block_sparse_desc* d, size_t workspace)
{
    MOEI_TRY(moei_block_check_options(d));
    return moei_block_check_buffers(d, workspace);
}

MOE_HOST moei_block_matrix moei_block_operand(const void* base, const void* const* table,
                                              int64_t stride, int k_along)
{
    moei_block_matrix x;
    x.base = (const char*)base;
    x.table = table;
    x.stride = stride;
    x.major = k_along ? MOE_MAJOR_K : MOE_MAJOR_MN;
    return x;
}

MOE_HOST int moei_block_log2(int n)
{
    int l = 0;
    while (n >> l > 1) ++l;
    return l;
}

/* Strips of blocks that a tile shape joins. */
MOE_HOST int moei_block_join(const moe_block_sparse_desc* d, const moei_variant* t)
{
    const int height = moei_block_by_column(d) ? d->mask.block_columns : d->mask.block_rows;
    return d->packed || height >= t->shape.tm ? 1 : t->shape.tm / height;
}

/* What a checked descriptor runs with one tile shape; its workspace begins at workspace_bytes
   behind `base`, and is added there. `first`: the plan whose rest this one runs; or null. */
MOE_HOST moe_status moei_block_plan_tile(const moe_block_sparse_desc* d, const moei_variant* t,
                                         char* base, size_t* workspace_bytes,
                                         moei_block_plan* first, moei_block_plan* p)
{
    const moe_block_mask* m = &d->mask;
    const int turned = moei_block_turned(d), by_column = moei_block_by_column(d);
    const int sdd = d->op == MOE_BLOCK_SDD, list = !m->bytes && !m->bits;
    const int height = by_column ? m->block_columns : m->block_rows;
    const int width = by_column ? m->block_rows : m->block_columns;
    const int lines = moe_num_blocks(by_column ? m->columns : m->rows, height);
    const int join = moei_block_join(d, t);
    const int32_t *offset = by_column ? m->column_offset : m->row_offset,
                  *index = by_column ? m->row_index : m->column_index;
    moei_block_args* a = &p->args;
    moei_strips_args* s = &p->strips;
    const moei_block_matrix am = moei_block_operand(
        d->a, d->a_table, d->op == MOE_BLOCK_DSD && d->packed ? m->block_columns : d->a_stride,
        !d->a_transposed);
    const moei_block_matrix bm = moei_block_operand(
        d->b, d->b_table, d->op == MOE_BLOCK_DDS && d->packed ? m->block_columns : d->b_stride,
        d->b_transposed);
    int64_t entries;
    memset(p, 0, sizeof *p);
    a->x = turned ? bm : am;
    a->y = turned ? am : bm;
    a->c = moei_block_operand(d->c, (const void* const*)d->c_table,
                              sdd && d->packed ? m->block_columns : d->c_stride, !turned);
    a->fault = d->fault;
    a->rank = d->rank;
    a->m = turned ? d->n : d->m;
    a->n = turned ? d->m : d->n;
    a->k = d->k;
    a->sparse_c = sdd;
    a->packed = d->packed;
    a->block_m = moei_block_log2(height);
    a->block_other = moei_block_log2(width);
    a->strip_m = height * join;
    a->others = moe_num_blocks(by_column ? m->rows : m->columns, width);
    a->c_dtype = d->c_dtype;
    a->depths = d->depths;
    {
        const int64_t step = a->strip_m < t->shape.tm ? a->strip_m : t->shape.tm;
        const int64_t columns = sdd ? (int64_t)a->others * width : a->n;
        a->tiles_m = (int32_t)((a->m + step - 1) / step);
        a->tiles_n = (int32_t)((columns + t->shape.tn - 1) / t->shape.tn);
        if (sdd && a->tiles_n > MOEI_BLOCK_SDD_TILES) a->tiles_n = MOEI_BLOCK_SDD_TILES;
        p->tiles = (int64_t)a->tiles_m * a->tiles_n;
        MOEI_REQUIRE(p->tiles + (int64_t)a->tiles_n * MOEI_BLOCK_BAND <= 0x7fffffff, MOE_ERR_RANGE,
                     m);
    }
    if (first) {
        first->args.share = a->share = first->args.partial;
        first->args.share_m = a->share_m = moei_block_log2(first->args.strip_m);
        a->share_of = 1;
    }
    if (list && join == 1) { /* as it is */
        a->begin = offset;
        a->end = offset + 1;
        a->block = index;
        a->info = d->packed && by_column ? m->position : 0;
        a->max_blocks = m->max_blocks;
        return MOE_OK;
    }
    p->num_strips = (lines + join - 1) / join;
    entries = list ? m->max_blocks : (int64_t)p->num_strips * a->others;
    MOEI_REQUIRE(entries <= 0x7fffffff, MOE_ERR_RANGE, mask);
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
    s->lines = lines;
    s->others = a->others;
    s->join = join;
    s->by_column = by_column;
    s->words = (moe_num_blocks(m->columns, m->block_columns) + 31) / 32;
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
