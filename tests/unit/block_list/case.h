/* case.h: a case of moe_block_sparse_list_build: a mask or a routing in host memory, the lists that
   the reference makes of it, device buffers; how sources are drawn, run and compared. */
#ifndef MOE_TESTS_BLOCK_LIST_CASE_H
#define MOE_TESTS_BLOCK_LIST_CASE_H

#include "moe/block_sparse/list.cuh"
#include "moe/ref/block_sparse.h"
#include "tests/test.h"

/* The arrays of a list, as in moe_block_sparse_mask. */
enum { ROW_OFFSET, COLUMN_INDEX, COLUMN_OFFSET, ROW_INDEX, POSITION, LISTS };

typedef struct tlist {
    moe_block_sparse_list_desc d; /* device pointers */
    int64_t RB, CB, count;        /* entries of the list: 0 after a stop fault */
    int64_t all;                  /* sparse blocks of the mask */
    moe_fault fault;
    tbuf source, list[LISTS], word, workspace;
    int32_t* want[LISTS];
} tlist;

static const int tlist_sizes[4] = {16, 32, 64, 128};

/* ------------------------------------------------------------------ buffers */

/* Returns the source and its bytes. */
static const void* tlist_source(const moe_block_sparse_list_desc* d, size_t* bytes)
{
    const size_t RB = (size_t)moe_block_sparse_count(d->rows, d->block_rows);
    const size_t CB = (size_t)moe_block_sparse_count(d->columns, d->block_columns);
    *bytes = d->bytes  ? RB * CB
             : d->bits ? RB * ((CB + 31) / 32) * 4
             : d->ids  ? (d->whole_batch ? 1 : (size_t)d->rows) * (size_t)d->top_k * 4
                       : ((size_t)d->num_experts + 1) * 4;
    return d->bytes  ? (const void*)d->bytes
           : d->bits ? (const void*)d->bits
           : d->ids  ? (const void*)d->ids
                     : (const void*)d->expert_offset;
}

/* Points the device descriptor to the source's copy. */
static void tlist_point(tlist* t, const moe_block_sparse_list_desc* host)
{
    if (host->bytes) t->d.bytes = (const uint8_t*)t->source.p;
    else if (host->bits) t->d.bits = (const uint32_t*)t->source.p;
    else if (host->ids) t->d.ids = (const int32_t*)t->source.p;
    else t->d.expert_offset = (const int32_t*)t->source.p;
}

/* Returns the entries of array i for so many sparse blocks. */
static int64_t tlist_entries(const tlist* t, int i, int64_t blocks)
{
    return i == ROW_OFFSET ? t->RB + 1 : i == COLUMN_OFFSET ? t->CB + 1 : blocks;
}

/* Fills in what the list of this host descriptor must be. */
static void tlist_expect(tlist* t, const moe_block_sparse_list_desc* host, int max_blocks)
{
    uint8_t* bytes = (uint8_t*)test_host(t->RB * t->CB);
    t->fault = moe_ref_block_sparse_bytes(host, bytes);
    t->all = 0;
    for (int64_t i = 0; i < t->RB * t->CB; ++i) t->all += bytes[i];
    if (max_blocks >= 0 && t->all > max_blocks && t->fault.code != MOE_FAULT_BAD_OFFSET) {
        t->fault.code = MOE_FAULT_NO_ROOM;
        t->fault.index = t->all;
        memset(bytes, 0, (size_t)(t->RB * t->CB));
    }
    t->count =
        moe_ref_block_sparse_list(bytes, t->RB, t->CB, t->want[ROW_OFFSET], t->want[COLUMN_INDEX],
                                  t->want[COLUMN_OFFSET], t->want[ROW_INDEX], t->want[POSITION]);
    free(bytes);
}

/* Makes array i with room for d.max_blocks sparse blocks. */
static void tlist_list_new(tlist* t, int i)
{
    static const char* const name[] = {"row_offset", "column_index", "column_offset", "row_index",
                                       "position"};
    t->list[i] = tbuf_new(name[i], (size_t)tlist_entries(t, i, t->d.max_blocks) * 4, 0);
}

/* Copies the source to the device; makes the rows' two arrays, the fault word and the workspace,
   and points the descriptor to them. The descriptor has all else. */
static void tlist_device_new(tlist* t, const moe_block_sparse_list_desc* host, size_t misalign)
{
    size_t bytes;
    const void* source = tlist_source(host, &bytes);
    t->source = tbuf_from("source", source, bytes, misalign);
    tlist_point(t, host);
    tlist_list_new(t, ROW_OFFSET);
    tlist_list_new(t, COLUMN_INDEX);
    t->word = tfault_new(0);
    t->d.row_offset = (int32_t*)t->list[ROW_OFFSET].p;
    t->d.column_index = (int32_t*)t->list[COLUMN_INDEX].p;
    t->d.fault = (uint64_t*)t->word.p;
    t->d.rank = TEST_RANK;
    CHECK_STATUS(moe_block_sparse_list_workspace(&t->d, &t->d.workspace_bytes), MOE_OK);
    t->workspace = tbuf_new("workspace", t->d.workspace_bytes, 0);
    t->d.workspace = t->workspace.p;
}

/* host: sizes, and a source in host memory. columns: 0 asks for the rows' arrays alone. spare:
   room beyond the mask's sparse blocks; negative: so many have none. most_blocks: the room, where
   other sources follow; else -1. */
static tlist tlist_new(const moe_block_sparse_list_desc* host, int columns, int64_t spare,
                       int64_t most_blocks, size_t misalign)
{
    tlist t;
    int64_t entries;
    memset(&t, 0, sizeof t);
    t.d = *host;
    t.d.bytes = 0;
    t.d.bits = 0;
    t.d.ids = t.d.expert_offset = 0;
    t.RB = moe_block_sparse_count(host->rows, host->block_rows);
    t.CB = moe_block_sparse_count(host->columns, host->block_columns);
    for (int i = 0; i < LISTS; ++i)
        t.want[i] = (int32_t*)test_host(tlist_entries(&t, i, t.RB * t.CB) * 4);
    tlist_expect(&t, host, -1);
    entries = most_blocks >= 0 ? most_blocks : t.all + spare;
    t.d.max_blocks = (int32_t)(entries > 0 ? entries : 0);
    tlist_expect(&t, host, t.d.max_blocks);
    for (int i = COLUMN_OFFSET; i < LISTS; ++i) tlist_list_new(&t, i);
    if (columns) {
        t.d.column_offset = (int32_t*)t.list[COLUMN_OFFSET].p;
        t.d.row_index = (int32_t*)t.list[ROW_INDEX].p;
        t.d.position = (int32_t*)t.list[POSITION].p;
    }
    tlist_device_new(&t, host, misalign);
    return t;
}

static void tlist_poison(tlist* t)
{
    for (int i = 0; i < LISTS; ++i) tbuf_poison(&t->list[i]);
}

/* Checks that no array was written. */
static void tlist_check_untouched(const tlist* t)
{
    for (int i = 0; i < LISTS; ++i)
        CHECK(tbuf_holds(&t->list[i], 0), "%s was written", t->list[i].name);
}

static void tlist_free(tlist* t)
{
    tbuf_free(&t->source);
    tbuf_free(&t->word);
    tbuf_free(&t->workspace);
    for (int i = 0; i < LISTS; ++i) {
        if (t->list[i].base) tbuf_free(&t->list[i]);
        free(t->want[i]);
    }
}

/* ------------------------------------------------------------------ comparison */

/* The buffer must hold these entries, and poison behind them. */
static int tlist_same(const tbuf* b, const int32_t* want, int64_t n)
{
    int32_t* got = (int32_t*)tbuf_copy(b);
    int same = CHECK_INTS(b->name, got, want, n);
    same &= CHECK(test_strays(got, (int64_t)b->bytes, 4, 1, 1, 0, n) == 0,
                  "%s was written past its %lld entries", b->name, (long long)n);
    free(got);
    return same;
}

static int tlist_check(const tlist* t, const char* what)
{
    int same = 1;
    for (int i = 0; i < LISTS; ++i) {
        const int asked_for = i < COLUMN_OFFSET || t->d.column_offset != 0;
        same &= tlist_same(&t->list[i], t->want[i], asked_for ? tlist_entries(t, i, t->count) : 0);
    }
    same &= CHECK_FAULT(&t->word, t->fault.code, t->fault.index);
    return CHECK(same, "%s: [%d, %d] in %d x %d, experts %d, top %d, room %d, mask has %lld", what,
                 t->d.rows, t->d.columns, t->d.block_rows, t->d.block_columns, t->d.num_experts,
                 t->d.top_k, t->d.max_blocks, (long long)t->all);
}

static moe_status tlist_call(void* context, cudaStream_t stream)
{
    return moe_block_sparse_list_build((const moe_block_sparse_list_desc*)context, stream);
}

static void tlist_run(const moe_block_sparse_list_desc* host, int columns, int64_t spare,
                      size_t misalign, const char* what)
{
    tlist t = tlist_new(host, columns, spare, -1, misalign);
    if (CHECK_STATUS(moe_block_sparse_list_build(&t.d, test_now.stream), MOE_OK))
        tlist_check(&t, what);
    tlist_free(&t);
}

/* ------------------------------------------------------------------ sources */

/* Returns sizes that have so many sparse blocks, the last ones ragged. */
static moe_block_sparse_list_desc tlist_shape(trand* r, int64_t RB, int64_t CB)
{
    moe_block_sparse_list_desc d;
    memset(&d, 0, sizeof d);
    d.block_rows = tlist_sizes[trand_int(r, 0, 3)];
    d.block_columns = tlist_sizes[trand_int(r, 0, 3)];
    d.rows = (int32_t)(RB * d.block_rows - (RB ? trand_int(r, 0, d.block_rows - 1) : 0));
    d.columns = (int32_t)(CB * d.block_columns - (CB ? trand_int(r, 0, d.block_columns - 1) : 0));
    return d;
}

/* Draws a mask; any value but 0 says that a sparse block is present. */
static uint8_t* tlist_bytes(trand* r, int64_t n, double density)
{
    uint8_t* bytes = (uint8_t*)test_host(n);
    for (int64_t i = 0; i < n; ++i) {
        const int in = (double)(trand_bits(r) >> 11) < density * 9007199254740992.0;
        bytes[i] = in ? (uint8_t)(1u << (trand_bits(r) & 7)) : 0;
    }
    return bytes;
}

/* Returns sizes [rows, experts * each block columns]. */
static moe_block_sparse_list_desc tlist_routing(trand* r, int64_t rows, int experts, int each)
{
    moe_block_sparse_list_desc d = tlist_shape(r, 0, 0);
    d.rows = (int32_t)rows;
    d.columns = experts * each * d.block_columns;
    d.num_experts = experts;
    return d;
}

/* Draws n ids, `bad` of 10000 out of range. */
static int32_t* tlist_ids(trand* r, int64_t n, int experts, int bad)
{
    int32_t* ids = (int32_t*)test_host(n * 4);
    const int none = (int)trand_int(r, 0, 3) * 300, one = trand_int(r, 0, 4) == 0;
    const int few = (int)trand_int(r, 0, experts - 1);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t draw = trand_int(r, 0, 999);
        ids[i] = (int32_t)(one ? few : trand_int(r, 0, experts - 1));
        if (draw < none) ids[i] = -1;
        if (trand_int(r, 0, 9999) < bad) {
            static const int32_t odd[] = {-2, 0x7fffffff, (int32_t)0x80000000, 0};
            const int k = (int)trand_int(r, 0, 3);
            ids[i] = odd[k] ? odd[k] : experts;
        }
    }
    return ids;
}

/* Draws offsets of `experts` ranges within `rows`. Some experts have no rows, some rows no
   expert. */
static int32_t* tlist_offsets(trand* r, int rows, int experts)
{
    int32_t* offset = (int32_t*)test_host((int64_t)experts * 4 + 4);
    const int used = trand_int(r, 0, 2) ? rows : (int)trand_int(r, 0, rows);
    const int kind = (int)trand_int(r, 0, 3), one = (int)trand_int(r, 0, experts - 1);
    int at = kind == 3 ? (int)trand_int(r, 0, used) : 0;
    for (int e = 0; e < experts; ++e) {
        const int left = used - at, fair = 2 * left / (experts - e);
        offset[e] = at;
        if (kind == 0) at += e == one ? left : 0; /* all rows on one expert */
        else if (trand_int(r, 0, 3)) at += (int)trand_int(r, 0, fair < left ? fair : left);
    }
    offset[experts] = at;
    return offset;
}

#endif
