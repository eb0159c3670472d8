/* list.cuh: makes the list of a mask's present sparse blocks on the device, in row order and in
   column order.

   In:   one source, and the matrix's rows, columns and block sizes (desc.h):
           bytes [RB, CB]              a sparse block is present where its byte is not 0
           bits [RB, ceil(CB / 32)]    present where its bit is 1; bits past column CB - 1 are
                                       ignored
           ids [rows, top_k]           rows are tokens, columns belong to experts, columns /
                                       num_experts each: row r has all columns of its experts; -1:
                                       none
           ids [top_k], whole_batch    the same experts for all rows
           expert_offset [E + 1]       rows in expert order, as moe_route writes them: row r has the
                                       columns of the expert whose range contains r; rows past the
                                       last range have none
         With ids and expert_offset, a sparse block is present if any of its rows has any of its
         columns. A block row may have rows of several experts.
   Out:  row_offset [RB + 1], column_index [max_blocks]; optional: column_offset [CB + 1], row_index
         and position [max_blocks]; all as in moe_block_sparse_mask. Array elements past the last
         entry are not written.

   Faults: an id that is neither an expert nor -1 (BAD_ID, index: slot) counts as -1; everything
   else is right. Offsets that decrease or pass the last row (BAD_OFFSET, index: expert) give an
   empty list: all offsets are 0 and no entry is written. A mask of more than max_blocks sparse
   blocks (NO_ROOM, index: their number) gives an empty list too. After an earlier stop fault no
   output is written.

   The same mask gives the same list every run. Three launches, no synchronisation; a captured graph
   may be replayed with another mask. Minimum architecture: sm_75.

   Cost: bytes and bits are read once, expert_offset once for each block row, ids once for every
   1024 experts. The mask passes through the workspace as bits and as counts of 32 x 32 sparse
   blocks. The list is written once. With ids and expert_offset one bit represents all columns of an
   expert: only the list grows with the number of columns.

     moe_block_sparse_list_desc l = {0};
     l.expert_offset = expert_offset;  l.num_experts = E;        // or bytes, bits, ids
     l.rows = R;  l.columns = E * I;
     l.block_rows = 128;  l.block_columns = 64;
     l.row_offset = row_offset;  l.column_index = column_index;  l.max_blocks = max_blocks;
     moe_block_sparse_list_workspace(&l, &bytes);  l.workspace = ...;  l.workspace_bytes = bytes;
     moe_status s = moe_block_sparse_list_build(&l, stream);

   Source of the method: a compressed-row build by counting, over squares of 32 x 32 bits. Shuffles
   and ballots transpose a square, so one read of the mask gives both orders. */
#ifndef MOE_BLOCK_SPARSE_LIST_CUH
#define MOE_BLOCK_SPARSE_LIST_CUH

#include "../base/check.h"
#include "../fields.h"
#include "../preload.cuh"
#include "list_fill.cuh"

/* Checks the sizes of a->d and derives the kernels' sizes. */
MOE_HOST moe_status moei_sparse_list_sizes(moei_sparse_list_args* a)
{
    const moe_block_sparse_list_desc* d = &a->d;
    MOE_REQUIRE(d->rows >= 0, MOE_ERR_RANGE, rows);
    MOE_REQUIRE(d->columns >= 0, MOE_ERR_RANGE, columns);
    MOE_REQUIRE(moe_block_sparse_size_offered(d->block_rows), MOE_ERR_RANGE, block_rows);
    MOE_REQUIRE(moe_block_sparse_size_offered(d->block_columns), MOE_ERR_RANGE, block_columns);
    MOE_REQUIRE(d->num_experts >= 0 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    a->num_block_rows = moe_block_sparse_count(d->rows, d->block_rows);
    a->num_block_columns = moe_block_sparse_count(d->columns, d->block_columns);
    if (d->num_experts) {
        MOE_REQUIRE(d->columns % d->num_experts == 0, MOE_ERR_CONFLICT, num_experts);
        MOE_REQUIRE(d->columns / d->num_experts % d->block_columns == 0, MOE_ERR_CONFLICT,
                    num_experts);
        a->groups = d->num_experts;
        a->each = a->num_block_columns / d->num_experts;
    } else {
        MOE_REQUIRE((int64_t)a->num_block_rows * a->num_block_columns <= 0x7fffffff, MOE_ERR_RANGE,
                    columns);
        a->groups = a->num_block_columns;
        a->each = 1;
    }
    a->words = (a->groups + 31) / 32;
    a->spans = a->words > 32 ? (a->words + 31) / 32 : 1;
    a->tiles = a->num_block_rows > 32 ? (a->num_block_rows + 31) / 32 : 1;
    a->row_sums = a->num_block_rows > 1024 ? (a->num_block_rows + 1023) / 1024 : 1;
    return MOE_OK;
}

/* Carves the workspace of a->d (null: sizes alone) into the kernels' buffers; returns its bytes. */
MOE_HOST size_t moei_sparse_list_carve_workspace(moei_sparse_list_args* a)
{
    char* base = (char*)a->d.workspace;
    const int64_t rows = a->num_block_rows, words = a->words, groups = words * 32;
    size_t at = 0;
    a->stopped = (int32_t*)moei_carve(base, &at, 4);
    a->bad_offset = (int32_t*)moei_carve(base, &at, (uint64_t)a->spans * 4);
    a->word = (uint32_t*)moei_carve(base, &at, (uint64_t)(rows * words) * 4);
    a->row_count = (int32_t*)moei_carve(base, &at, (uint64_t)(rows * a->spans) * 4);
    a->row_start = (int32_t*)moei_carve(base, &at, (uint64_t)rows * 4);
    a->row_sum = (int32_t*)moei_carve(base, &at, (uint64_t)a->row_sums * 4);
    a->above = (int32_t*)moei_carve(base, &at, (uint64_t)(a->tiles * groups) * 4);
    a->group_count = (int32_t*)moei_carve(base, &at, (uint64_t)groups * 4);
    a->group_start = (int32_t*)moei_carve(base, &at, (uint64_t)groups * 4);
    a->word_sum = (int32_t*)moei_carve(base, &at, (uint64_t)words * 4);
    return at;
}

/* Returns in *bytes the workspace of moe_block_sparse_list_build: about 1/4 byte for each of the
   RB * CB sparse blocks, or, with num_experts, for each pair of a block row and an expert. Reads
   the sizes alone; errors: a size that is refused. */
MOE_HOST moe_status moe_block_sparse_list_workspace(const moe_block_sparse_list_desc* desc,
                                                    size_t* bytes)
{
    moei_sparse_list_args a;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    memset(&a, 0, sizeof a);
    a.d = *desc;
    a.d.workspace = 0;
    MOE_TRY(moei_sparse_list_sizes(&a));
    *bytes = moei_sparse_list_carve_workspace(&a);
    return MOE_OK;
}

/* Checks the sizes, that at most one source is given, and the fields of that source. Derives the
   kernels' sizes. */
MOE_HOST moe_status moei_sparse_list_check_options(moei_sparse_list_args* a)
{
    const moe_block_sparse_list_desc* d = &a->d;
    const int routing = d->ids || d->expert_offset, mask = d->bytes || d->bits;
    MOE_TRY(moei_sparse_list_sizes(a));
    MOE_REQUIRE(!d->bits || !d->bytes, MOE_ERR_CONFLICT, bits);
    MOE_REQUIRE(!d->ids || !mask, MOE_ERR_CONFLICT, ids);
    MOE_REQUIRE(!d->expert_offset || (!d->ids && !mask), MOE_ERR_CONFLICT, expert_offset);
    MOE_REQUIRE(!mask || d->num_experts == 0, MOE_ERR_CONFLICT, num_experts);
    MOE_REQUIRE(!routing || d->num_experts > 0, MOE_ERR_RANGE, num_experts);
    MOE_REQUIRE(!d->ids || (d->top_k >= 1 && d->top_k <= MOE_MAX_EXPERTS), MOE_ERR_RANGE, top_k);
    MOE_REQUIRE(d->top_k == 0 || d->ids || (!routing && !mask), MOE_ERR_CONFLICT, top_k);
    MOE_REQUIRE((d->whole_batch | 1) == 1, MOE_ERR_OPTION, whole_batch);
    MOE_REQUIRE(!d->whole_batch || d->ids || (!routing && !mask), MOE_ERR_CONFLICT, whole_batch);
    MOEI_REQUIRE_RANK(d);
    MOE_REQUIRE(d->max_blocks >= 0, MOE_ERR_RANGE, max_blocks);
    return MOE_OK;
}

/* Refuses buffers that are null, misaligned or overlap. Requires checked options; `workspace`:
   bytes that the workspace must have. A source is required unless RB or CB is 0. */
MOE_HOST moe_status moei_sparse_list_check_buffers(const moei_sparse_list_args* a, size_t workspace)
{
    const moe_block_sparse_list_desc* d = &a->d;
    const uint64_t num_block_rows = (uint64_t)a->num_block_rows,
                   num_block_columns = (uint64_t)a->num_block_columns,
                   num_experts = (uint64_t)d->num_experts;
    const uint64_t tokens = d->whole_batch ? d->rows > 0 : (uint64_t)d->rows;
    const uint64_t entries = (uint64_t)d->max_blocks * 4;
    const int by_rows = MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN;
    const int by_columns =
        d->column_offset || d->row_index || d->position ? by_rows : (int)MOE_BUFFER_WRITTEN;
    const moe_buffer b[] = {
        {d->bytes, num_block_rows * num_block_columns, 1,
         d->bits || d->ids || d->expert_offset ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED,
         MOE_FIELD_bytes},
        {d->bits, num_block_rows * (uint64_t)a->words * 4, 4, MOE_BUFFER_READ, MOE_FIELD_bits},
        {d->ids, tokens * (uint64_t)d->top_k * 4, 4, MOE_BUFFER_READ, MOE_FIELD_ids},
        {d->expert_offset, num_experts * 4 + 4, 4, MOE_BUFFER_READ, MOE_FIELD_expert_offset},
        {d->row_offset, num_block_rows * 4 + 4, 4, by_rows, MOE_FIELD_row_offset},
        {d->column_index, entries, 4, by_rows, MOE_FIELD_column_index},
        {d->column_offset, num_block_columns * 4 + 4, 4, by_columns, MOE_FIELD_column_offset},
        {d->row_index, entries, 4, by_columns, MOE_FIELD_row_index},
        {d->position, entries, 4, by_columns, MOE_FIELD_position},
        {d->workspace, workspace, 16, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_workspace},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    MOE_TRY(moe_check_buffers(b, (int)(sizeof b / sizeof b[0])));
    MOE_REQUIRE(d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE, workspace_bytes);
    return MOE_OK;
}

/* Checks options and buffers, derives the kernels' sizes, carves the workspace. */
MOE_HOST moe_status moei_sparse_list_check(moei_sparse_list_args* a)
{
    MOE_TRY(moei_sparse_list_check_options(a));
    return moei_sparse_list_check_buffers(a, moei_sparse_list_carve_workspace(a));
}

/* The prepared making of a list: everything but the stream, for the device that was current. */
typedef struct moe_block_sparse_list_prepared {
    moei_sparse_list_args args; /* of all three launches */
    moe_launch mark, sum, fill; /* in this order */
} moe_block_sparse_list_prepared;

/* Fills in *p, which is all zero. */
MOE_HOST moe_status moei_sparse_list_prepare(const moe_block_sparse_list_desc* desc,
                                             moe_block_sparse_list_prepared* p)
{
    moei_sparse_list_args* a;
    moe_launch_config c;
    a = &p->args;
    a->d = *desc;
    MOE_TRY(moei_sparse_list_check(a));
    a->wide_bytes = a->num_block_columns % 16 == 0 && moei_aligned(a->d.bytes, 16);
    c = moe_grid((int64_t)a->tiles * a->spans, MOEI_SPARSE_LIST_THREADS, 0, 0);
    c.dependent = 1;
    MOE_TRY(MOE_PREPARE(&p->mark, moei_sparse_list_mark, c));
    MOE_TRY(MOE_PREPARE(&p->fill, moei_sparse_list_fill, c));
    c.grid.x = (unsigned)(a->row_sums + (a->d.column_offset ? a->words : 0));
    return MOE_PREPARE(&p->sum, moei_sparse_list_sum, c);
}

/* Prepares the making of a list; moe_block_sparse_list_run queues the launches any number of times.
   Errors: every field as documented above and in desc.h, each with its own status. Of columns also:
   more than 2^31 - 1 sparse blocks in bytes or bits. Of num_experts: the columns do not divide into
   experts, or an expert's columns into sparse blocks. No source is required where RB or CB is 0. */
MOE_HOST moe_status moe_block_sparse_list_prepare(const moe_block_sparse_list_desc* desc,
                                                  moe_block_sparse_list_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_sparse_list_prepare(desc, p));
}

/* Queues a prepared list on `stream`: three launches. */
MOE_HOST moe_status moe_block_sparse_list_run(const moe_block_sparse_list_prepared* p,
                                              cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(MOE_RUN(&p->mark, p->args, stream));
    MOE_TRY(MOE_RUN(&p->sum, p->args, stream));
    return MOE_RUN(&p->fill, p->args, stream);
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_block_sparse_list_build(const moe_block_sparse_list_desc* desc,
                                                cudaStream_t stream)
{
    moe_block_sparse_list_prepared p;
    MOE_TRY(moe_block_sparse_list_prepare(desc, &p));
    return moe_block_sparse_list_run(&p, stream);
}

/* Loads this header's kernels now, for the current device. */
MOE_HOST moe_status moe_block_sparse_list_preload(void)
{
    MOE_TRY(moe_preload_kernel((const void*)moei_sparse_list_mark));
    MOE_TRY(moe_preload_kernel((const void*)moei_sparse_list_sum));
    return moe_preload_kernel((const void*)moei_sparse_list_fill);
}

MOEI_PRELOAD_INCLUDED(block_sparse_list)

#endif
