/* list.cuh: which blocks a mask has, row after row and column after column, made on the device.

   In:   one source, and the matrix's rows, columns and block sizes (desc.h):
           bytes [RB, CB]              a block is there where its byte is not 0
           bits [RB, ceil(CB / 32)]    the same by bits; those past the last column do not count
           ids [rows, top_k]           rows of tokens, columns of experts, columns / num_experts
                                       each: row r has all columns of its experts; -1 is none
           ids [top_k], whole_batch    the same experts for all rows
           expert_offset [E + 1]       rows in expert order, as moe_route gives them: row r has
                                       the columns of the expert whose range it is in; rows
                                       past the last range have none
         With ids and expert_offset, a block is there if any of its rows has any of its columns. A
         block-row may lie in the ranges of several experts.
   Out:  row_offset [RB + 1], column_index [max_blocks], and by wish column_offset [CB + 1],
         row_index and position [max_blocks], as in moe_block_sparse_mask. Entries past the last block
         are not written.

   Faults: an id that is neither an expert nor -1 (BAD_ID, index: slot) counts as -1, the rest is
   right. Offsets that decrease or pass the last row (BAD_OFFSET, index: expert), and a mask of more
   than max_blocks blocks (NO_ROOM, index: how many), give an empty list: offsets of 0 and nothing
   else. After an earlier stop fault nothing is written.

   The same mask gives the same list every time. Three launches, no synchronisation; a captured
   graph may be replayed with another mask. Traffic: the source once (ids, and offsets for each
   block-row, once for every 1024 experts), the mask as bits and as counts of 32 x 32 blocks through
   the workspace, the lists once. With ids and expert_offset a bit stands for all columns of an
   expert, so nothing but the lists has their size. Minimum architecture: sm_75.

     moe_block_sparse_list_desc l = {0};
     l.expert_offset = expert_offset;  l.num_experts = E;        // or bytes, bits, ids
     l.rows = R;  l.columns = E * I;
     l.block_rows = 128;  l.block_columns = 64;
     l.row_offset = row_offset;  l.column_index = column_index;  l.max_blocks = max_blocks;
     moe_block_sparse_list_workspace(&l, &bytes);  l.workspace = ...;  l.workspace_bytes = bytes;
     moe_status s = moe_block_sparse_list_build(&l, stream);

   Source: a compressed-row build by counting, over tiles of 32 x 32 bits; a tile is transposed over by
   ballots, so both orders come from one reading of the mask. */
#ifndef MOE_BLOCK_SPARSE_LIST_CUH
#define MOE_BLOCK_SPARSE_LIST_CUH

#include "../base/check.h"
#include "../fields.h"
#include "../preload.cuh"
#include "list_fill.cuh"

/* Checks the sizes and derives the kernels' ones. */
MOE_HOST moe_status moei_sparse_list_sizes(moei_sparse_list_args* a)
{
    const moe_block_sparse_list_desc* d = &a->d;
    MOE_REQUIRE(d->rows >= 0, MOE_ERR_RANGE, rows);
    MOE_REQUIRE(d->columns >= 0, MOE_ERR_RANGE, columns);
    MOE_REQUIRE(moei_sparse_size_offered(d->block_rows), MOE_ERR_RANGE, block_rows);
    MOE_REQUIRE(moei_sparse_size_offered(d->block_columns), MOE_ERR_RANGE, block_columns);
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

/* Shares the workspace out; returns its bytes. */
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

/* Bytes of workspace that moe_block_sparse_list_build wants: about 1/4 byte for each block that a mask of
   bytes or bits could have, or, with num_experts, for each pair of a block-row and an expert.
   Reads the sizes; errors: theirs. */
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

/* Sizes; one source at most, and the fields that go with it; derives the kernels' sizes. */
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

/* Refuses buffers that are absent, misaligned or overlap, of a descriptor whose options are checked
   and which wants so much workspace. There is a source unless there is no block to ask it for. */
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

/* Refuses what the header does not offer, derives the kernels' sizes, shares the workspace out. */
MOE_HOST moe_status moei_sparse_list_check(moei_sparse_list_args* a)
{
    MOE_TRY(moei_sparse_list_check_options(a));
    return moei_sparse_list_check_buffers(a, moei_sparse_list_carve_workspace(a));
}

/* The making of a list with all but its stream settled, for the device that was current. */
typedef struct moe_block_sparse_list_prepared {
    moei_sparse_list_args args;
    moe_launch mark, sum, fill;
} moe_block_sparse_list_prepared;

/* Fills in *p, which is empty. */
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

/* Settles the making of the list: moe_block_sparse_list_run queues it any number of times. Errors: every
   field as documented above and in desc.h, each with its own status. Also columns: more than 2^31 - 1
   blocks, of bytes or bits. num_experts: the columns do not divide into experts, or the experts'
   columns into blocks. Without rows or columns no source is needed. */
MOE_HOST moe_status moe_block_sparse_list_prepare(const moe_block_sparse_list_desc* desc,
                                                  moe_block_sparse_list_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_sparse_list_prepare(desc, p));
}

/* Queues the prepared making of a list on `stream`. */
MOE_HOST moe_status moe_block_sparse_list_run(const moe_block_sparse_list_prepared* p,
                                              cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(MOE_RUN(&p->mark, p->args, stream));
    MOE_TRY(MOE_RUN(&p->sum, p->args, stream));
    return MOE_RUN(&p->fill, p->args, stream);
}

/* Prepares and runs. Nothing is queued where a field is refused. */
MOE_HOST moe_status moe_block_sparse_list_build(const moe_block_sparse_list_desc* desc,
                                                cudaStream_t stream)
{
    moe_block_sparse_list_prepared p;
    MOE_TRY(moe_block_sparse_list_prepare(desc, &p));
    return moe_block_sparse_list_run(&p, stream);
}

/* Loads this header's kernels now. */
MOE_HOST moe_status moe_block_sparse_list_preload(void)
{
    MOE_TRY(moe_preload_kernel((const void*)moei_sparse_list_mark));
    MOE_TRY(moe_preload_kernel((const void*)moei_sparse_list_sum));
    return moe_preload_kernel((const void*)moei_sparse_list_fill);
}

MOEI_PRELOAD_INCLUDED(block_sparse_list)

#endif
