/* test_block_list.cu: moe_block_sparse_list_build against the reference, every entry of every list: all
   sources, ragged and empty masks, lists without room, bad input, graphs. */
#include "moe/block_sparse/list.cuh"
#include "moe/ref/block_sparse.h"
#include "tests/test.h"

/* What a list must be, and device buffers for it. */
typedef struct tlist {
    moe_block_sparse_list_desc d; /* device pointers */
    int64_t RB, CB, count; /* blocks that the list has: 0 after a stop fault */
    int64_t all;           /* blocks that the mask has */
    moe_fault fault;
    tbuf source, row_offset, column_index, column_offset, row_index, position, word, workspace;
    int32_t *row_offset_want, *column_index_want, *column_offset_want, *row_index_want,
        *position_want;
} tlist;

static const int tlist_sizes[4] = {16, 32, 64, 128};

/* The source's buffer and its bytes. */
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

static void tlist_point(tlist* t, const moe_block_sparse_list_desc* host)
{
    if (host->bytes) t->d.bytes = (const uint8_t*)t->source.p;
    else if (host->bits) t->d.bits = (const uint32_t*)t->source.p;
    else if (host->ids) t->d.ids = (const int32_t*)t->source.p;
    else t->d.expert_offset = (const int32_t*)t->source.p;
}

/* What the list of this host descriptor must be. */
static void tlist_expect(tlist* t, const moe_block_sparse_list_desc* host, int max_blocks)
{
    uint8_t* bytes = (uint8_t*)test_host(t->RB * t->CB);
    t->fault = moe_ref_block_bytes(host, bytes);
    t->all = 0;
    for (int64_t i = 0; i < t->RB * t->CB; ++i) t->all += bytes[i];
    if (max_blocks >= 0 && t->all > max_blocks && t->fault.code != MOE_FAULT_BAD_OFFSET) {
        t->fault.code = MOE_FAULT_NO_ROOM;
        t->fault.index = t->all;
        memset(bytes, 0, (size_t)(t->RB * t->CB));
    }
    t->count = moe_ref_block_list(bytes, t->RB, t->CB, t->row_offset_want, t->column_index_want,
                                  t->column_offset_want, t->row_index_want, t->position_want);
    free(bytes);
}

/* host has a source in host memory, and sizes. spare: entries beyond what the mask has, or missing;
   with several sources to come, most_blocks of them, else -1. */
static tlist tlist_new(const moe_block_sparse_list_desc* host, int columns, int64_t spare,
                       int64_t most_blocks, size_t misalign)
{
    tlist t;
    size_t bytes, workspace;
    const void* source = tlist_source(host, &bytes);
    int64_t entries;
    memset(&t, 0, sizeof t);
    t.d = *host;
    t.d.bytes = 0;
    t.d.bits = 0;
    t.d.ids = t.d.expert_offset = 0;
    t.RB = moe_block_sparse_count(host->rows, host->block_rows);
    t.CB = moe_block_sparse_count(host->columns, host->block_columns);
    t.row_offset_want = (int32_t*)test_host(t.RB * 4 + 4);
    t.column_offset_want = (int32_t*)test_host(t.CB * 4 + 4);
    t.column_index_want = (int32_t*)test_host(t.RB * t.CB * 4);
    t.row_index_want = (int32_t*)test_host(t.RB * t.CB * 4);
    t.position_want = (int32_t*)test_host(t.RB * t.CB * 4);
    tlist_expect(&t, host, -1);
    entries = most_blocks >= 0 ? most_blocks : t.all + spare;
    t.d.max_blocks = (int32_t)(entries > 0 ? entries : 0);
    tlist_expect(&t, host, t.d.max_blocks);

    t.source = tbuf_from("source", source, bytes, misalign);
    tlist_point(&t, host);
    entries = t.d.max_blocks;
    t.row_offset = tbuf_new("row_offset", (size_t)t.RB * 4 + 4, 0);
    t.column_index = tbuf_new("column_index", (size_t)entries * 4, 0);
    t.column_offset = tbuf_new("column_offset", (size_t)t.CB * 4 + 4, 0);
    t.row_index = tbuf_new("row_index", (size_t)entries * 4, 0);
    t.position = tbuf_new("position", (size_t)entries * 4, 0);
    t.word = tfault_new(0);
    t.d.row_offset = (int32_t*)t.row_offset.p;
    t.d.column_index = (int32_t*)t.column_index.p;
    if (columns) {
        t.d.column_offset = (int32_t*)t.column_offset.p;
        t.d.row_index = (int32_t*)t.row_index.p;
        t.d.position = (int32_t*)t.position.p;
    }
    t.d.fault = (uint64_t*)t.word.p;
    t.d.rank = TEST_RANK;
    CHECK_STATUS(moe_block_sparse_list_workspace(&t.d, &workspace), MOE_OK);
    t.workspace = tbuf_new("workspace", workspace, 0);
    t.d.workspace = t.workspace.p;
    t.d.workspace_bytes = workspace;
    return t;
}

static void tlist_free(tlist* t)
{
    tbuf_free(&t->source);
    tbuf_free(&t->row_offset);
    tbuf_free(&t->column_index);
    tbuf_free(&t->column_offset);
    tbuf_free(&t->row_index);
    tbuf_free(&t->position);
    tbuf_free(&t->word);
    tbuf_free(&t->workspace);
    free(t->row_offset_want);
    free(t->column_index_want);
    free(t->column_offset_want);
    free(t->row_index_want);
    free(t->position_want);
}

/* The buffer must hold the wanted entries, and poison behind them. */
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
    const int columns = t->d.column_offset != 0;
    int same = tlist_same(&t->row_offset, t->row_offset_want, t->RB + 1);
    same &= tlist_same(&t->column_index, t->column_index_want, t->count);
    same &= tlist_same(&t->column_offset, t->column_offset_want, columns ? t->CB + 1 : 0);
    same &= tlist_same(&t->row_index, t->row_index_want, columns ? t->count : 0);
    same &= tlist_same(&t->position, t->position_want, columns ? t->count : 0);
    same &= CHECK_FAULT(&t->word, t->fault.code, t->fault.index);
    return CHECK(same, "%s: [%d, %d] in %d x %d, experts %d, top %d, room %d, mask has %lld", what,
                 t->d.rows, t->d.columns, t->d.block_rows, t->d.block_columns, t->d.num_experts,
                 t->d.top_k, t->d.max_blocks, (long long)t->all);
}

static void tlist_run(const moe_block_sparse_list_desc* host, int columns, int64_t spare,
                      size_t misalign, const char* what)
{
    tlist t = tlist_new(host, columns, spare, -1, misalign);
    if (CHECK_STATUS(moe_block_sparse_list_build(&t.d, test_now.stream), MOE_OK))
        tlist_check(&t, what);
    tlist_free(&t);
}

/* Rows and columns of elements with so many blocks, the last ones ragged. */
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

/* Any value but 0 says that a block is there. */
static uint8_t* tlist_bytes(trand* r, int64_t n, double density)
{
    uint8_t* bytes = (uint8_t*)test_host(n);
    for (int64_t i = 0; i < n; ++i) {
        const int in = (double)(trand_bits(r) >> 11) < density * 9007199254740992.0;
        bytes[i] = in ? (uint8_t)(1u << (trand_bits(r) & 7)) : 0;
    }
    return bytes;
}

/* Some rows and some columns without a block. */
static void tlist_clear_some(trand* r, uint8_t* bytes, int64_t RB, int64_t CB)
{
    for (int64_t i = 0; i < RB; ++i)
        if (trand_int(r, 0, 5) == 0) memset(bytes + i * CB, 0, (size_t)CB);
    for (int64_t j = 0; j < CB; ++j)
        for (int64_t i = trand_int(r, 0, 5) == 0 ? 0 : RB; i < RB; ++i) bytes[i * CB + j] = 0;
}

static const int tlist_shapes[][2] = {
    {0, 0},    {0, 5},     {5, 0},    {1, 1},    {1, 40},   {40, 1},   {2, 3},     {31, 31},
    {32, 32},  {33, 33},   {33, 96},  {20, 112}, {63, 65},  {64, 256}, {100, 129}, {7, 1024},
    {3, 1025}, {33, 2100}, {1, 5000}, {1024, 4}, {1025, 3}, {2100, 1}, {256, 256}};

static void tlist_masks(int bits)
{
    trand r = trand_new(bits ? 2 : 1);
    static const double density[] = {0, 0.01, 0.1, 0.5, 0.97, 1};
    for (int shape = 0; shape < (int)(sizeof tlist_shapes / sizeof tlist_shapes[0]); ++shape)
        for (int k = (int)trand_int(&r, 0, 3); k < 6; k += 3 + (int)trand_int(&r, 0, 2)) {
            const int64_t RB = tlist_shapes[shape][0], CB = tlist_shapes[shape][1];
            moe_block_sparse_list_desc d = tlist_shape(&r, RB, CB);
            uint8_t* bytes = tlist_bytes(&r, RB * CB, density[k]);
            uint32_t* words = (uint32_t*)test_host(RB * ((CB + 31) / 32) * 4);
            if (trand_int(&r, 0, 2) == 0) tlist_clear_some(&r, bytes, RB, CB);
            if (bits) {
                moe_ref_block_bits(bytes, RB, CB, words);
                for (int64_t i = 0; i < RB && CB % 32; ++i) /* what is past the last column */
                    words[(i + 1) * ((CB + 31) / 32) - 1] |= (uint32_t)trand_bits(&r) << (CB % 32);
                d.bits = words;
            } else {
                d.bytes = bytes;
            }
            tlist_run(&d, trand_int(&r, 0, 4) != 0, trand_int(&r, 0, 3) * 5,
                      bits ? (size_t)trand_int(&r, 0, 3) * 4 : (size_t)trand_int(&r, 0, 1) * 16,
                      bits ? "bits" : "bytes");
            if (!bits && RB < 300 && CB < 2000)
                tlist_run(&d, 1, 0, (size_t)trand_int(&r, 1, 15), "bytes, odd address");
            free(bytes);
            free(words);
        }
}

static void test_bytes(void) { tlist_masks(0); }
static void test_bits(void) { tlist_masks(1); }

/* One block, anywhere; and the last one, which is ragged. */
static void test_one_block(void)
{
    trand r = trand_new(3);
    for (int i = 0; i < 12; ++i) {
        const int64_t RB = trand_int(&r, 1, 70), CB = trand_int(&r, 1, 70);
        moe_block_sparse_list_desc d = tlist_shape(&r, RB, CB);
        uint8_t* bytes = tlist_bytes(&r, RB * CB, 0);
        bytes[i & 1 ? RB * CB - 1 : trand_int(&r, 0, RB * CB - 1)] = 0x80;
        d.bytes = bytes;
        tlist_run(&d, 1, 0, 0, "one block");
        free(bytes);
    }
}

/* A matrix [rows, experts * each columns]. */
static moe_block_sparse_list_desc tlist_routing(trand* r, int64_t rows, int experts, int each)
{
    moe_block_sparse_list_desc d = tlist_shape(r, 0, 0);
    d.rows = (int32_t)rows;
    d.columns = experts * each * d.block_columns;
    d.num_experts = experts;
    return d;
}

static const int tlist_experts[] = {1, 2, 5, 8, 31, 32, 33, 60, 64, 100, 256};
static const int tlist_rows[] = {0, 1, 15, 16, 17, 127, 128, 129, 500, 1000};

/* bad: per 10000 ids, so many out of range. */
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

static void test_ids(void)
{
    trand r = trand_new(4);
    for (int i = 0; i < 60; ++i) {
        const int experts = tlist_experts[i % 11], whole = i % 4 == 3;
        const int64_t rows = tlist_rows[trand_int(&r, 0, 9)];
        moe_block_sparse_list_desc d = tlist_routing(&r, rows, experts, (int)trand_int(&r, 1, 5));
        int32_t* ids;
        d.top_k = (int32_t)trand_int(&r, 1, experts < 12 ? experts : 12);
        if (i % 9 == 0) d.top_k = experts;
        if (i % 13 == 0) d.columns = 0; /* ids are looked at all the same */
        d.whole_batch = whole;
        ids = tlist_ids(&r, (whole ? 1 : rows) * d.top_k, experts, i % 3 == 1 ? 200 : 0);
        d.ids = ids;
        tlist_run(&d, i % 5 != 0, trand_int(&r, 0, 40), (size_t)trand_int(&r, 0, 3) * 4,
                  whole ? "ids of the batch" : "ids");
        free(ids);
    }
}

/* Offsets of `experts` ranges within `rows`; some experts have none, some rows no expert. */
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

static void test_offsets(void)
{
    trand r = trand_new(5);
    for (int i = 0; i < 60; ++i) {
        const int experts = tlist_experts[i % 11], rows = tlist_rows[trand_int(&r, 0, 9)];
        moe_block_sparse_list_desc d = tlist_routing(&r, rows, experts, (int)trand_int(&r, 1, 9));
        int32_t* offset = tlist_offsets(&r, rows, experts);
        d.expert_offset = offset;
        if (i % 13 == 0) d.columns = 0;
        tlist_run(&d, i % 5 != 0, trand_int(&r, 0, 40), (size_t)trand_int(&r, 0, 3) * 4, "offsets");
        { /* spoilt at one place or two; also where there are no rows */
            for (int k = i & 1; k < 2; ++k) {
                const int e = (int)trand_int(&r, 0, experts);
                static const int32_t odd[] = {-1, 0x7fffffff, (int32_t)0x80000000, 0};
                const int32_t v = odd[trand_int(&r, 0, 3)];
                offset[e] = v ? v : rows + 1;
            }
            tlist_run(&d, i % 5 != 0, 50, 0, "bad offsets");
        }
        free(offset);
    }
}

/* Without rows the offsets are looked at all the same; the index is the expert whose range it is. */
static void test_offsets_without_rows(void)
{
    static const struct {
        int32_t offset[4];
        int bad;
    } cases[] = {{{0, 0, 0, 0}, -1}, {{0, 0, 0, 1}, 2},  {{0, 0, 1, 0}, 1},
                 {{0, 1, 0, 0}, 0},  {{1, 0, 0, 0}, 0},  {{-1, 0, 0, 0}, 0},
                 {{0, -1, 0, 0}, 0}, {{0, 0, -1, 0}, 1}, {{0, 0, 0, -1}, 2}};
    trand r = trand_new(14);
    for (size_t i = 0; i < 2 * sizeof cases / sizeof cases[0]; ++i) {
        moe_block_sparse_list_desc d = tlist_routing(&r, 0, 3, 2);
        tlist t;
        d.expert_offset = cases[i / 2].offset;
        t = tlist_new(&d, (int)(i & 1), 4, -1, 0);
        CHECK(t.fault.code == (cases[i / 2].bad < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_OFFSET) &&
                  (cases[i / 2].bad < 0 || t.fault.index == cases[i / 2].bad),
              "the reference: \"%s\" at %lld", moe_fault_text(t.fault.code),
              (long long)t.fault.index);
        CHECK_STATUS(moe_block_sparse_list_build(&t.d, test_now.stream), MOE_OK);
        tlist_check(&t, "offsets without rows");
        tlist_free(&t);
    }
}

/* More than 1024 experts: several spans of words. */
static void test_many_experts(void)
{
    trand r = trand_new(6);
    for (int i = 0; i < 4; ++i) {
        const int experts = i & 1 ? 4096 : 1500;
        moe_block_sparse_list_desc d = tlist_routing(&r, 300, experts, i & 1 ? 1 : 3);
        int32_t* source;
        if (i < 2) {
            d.top_k = 6;
            d.ids = source = tlist_ids(&r, (int64_t)d.rows * d.top_k, experts, i ? 0 : 20);
        } else {
            d.expert_offset = source = tlist_offsets(&r, d.rows, experts);
            if (i == 3) source[experts - 7] = d.rows + 9, source[experts - 3] = -9;
        }
        tlist_run(&d, 1, 0, 0, "many experts");
        free(source);
    }
}

static void test_no_room(void)
{
    trand r = trand_new(7);
    for (int i = 0; i < 12; ++i) {
        moe_block_sparse_list_desc d = tlist_shape(&r, trand_int(&r, 1, 80), trand_int(&r, 1, 80));
        uint8_t* bytes = 0;
        int32_t* ids = 0;
        if (i % 2) {
            d = tlist_routing(&r, 200, 40, 3);
            d.top_k = 3;
            d.ids = ids = tlist_ids(&r, 600, 40, i % 4 == 1 ? 100 : 0);
        } else {
            bytes = tlist_bytes(&r,
                                (int64_t)moe_block_sparse_count(d.rows, d.block_rows) *
                                    moe_block_sparse_count(d.columns, d.block_columns),
                                0.7);
            bytes[0] = 1;
            d.bytes = bytes;
        }
        tlist_run(&d, i % 3 != 0, -1, 0, "one entry short");
        tlist_run(&d, i % 3 != 0, -0x40000000, 0, "no entry");
        tlist_run(&d, i % 3 != 0, 0, 0, "just enough");
        free(bytes);
        free(ids);
    }
}

/* More than 2^31 possible blocks, of which few are there: rows of blocks by experts of many. */
static void test_huge(void)
{
    const int experts = 4096, each = 16384, top_k = 2, RB = 64;
    const int64_t CB = (int64_t)experts * each;
    trand r = trand_new(8);
    tlist t;
    moe_block_sparse_list_desc* d = &t.d;
    int32_t* ids = (int32_t*)test_host(RB * 16 * top_k * 4);
    int64_t at = 0;
    size_t workspace;
    memset(&t, 0, sizeof t);
    d->block_rows = d->block_columns = 16;
    d->rows = RB * 16;
    d->columns = (int32_t)(CB * 16);
    d->num_experts = experts;
    d->top_k = top_k;
    d->max_blocks = 8 * each;
    CHECK((int64_t)RB * CB > 0x7fffffff);
    memset(ids, 0xff, (size_t)(RB * 16 * top_k) * 4); /* -1: unused */
    t.row_offset_want = (int32_t*)test_host(RB * 4 + 4);
    t.column_index_want = (int32_t*)test_host((int64_t)d->max_blocks * 4);
    for (int i = 0; i < RB; ++i) {
        t.row_offset_want[i] = (int32_t)at;
        if (i % 9 == 8 || i == RB - 1) {
            const int e = i == RB - 1 ? experts - 1 : (int)trand_int(&r, 0, experts - 1);
            ids[(i * 16 + trand_int(&r, 0, 15)) * top_k + 1] = e;
            for (int c = 0; c < each; ++c) t.column_index_want[at++] = e * each + c;
        }
    }
    t.row_offset_want[RB] = (int32_t)at;
    t.source = tbuf_from("ids", ids, (size_t)(RB * 16 * top_k) * 4, 0);
    t.row_offset = tbuf_new("row_offset", RB * 4 + 4, 0);
    t.column_index = tbuf_new("column_index", (size_t)d->max_blocks * 4, 0);
    t.word = tfault_new(0);
    d->ids = (const int32_t*)t.source.p;
    d->row_offset = (int32_t*)t.row_offset.p;
    d->column_index = (int32_t*)t.column_index.p;
    d->fault = (uint64_t*)t.word.p;
    d->rank = TEST_RANK;
    CHECK_STATUS(moe_block_sparse_list_workspace(d, &workspace), MOE_OK);
    t.workspace = tbuf_new("workspace", workspace, 0);
    d->workspace = t.workspace.p;
    d->workspace_bytes = workspace;
    CHECK(at == d->max_blocks);
    CHECK_STATUS(moe_block_sparse_list_build(d, test_now.stream), MOE_OK);
    tlist_same(&t.row_offset, t.row_offset_want, RB + 1);
    tlist_same(&t.column_index, t.column_index_want, at);
    CHECK_FAULT(&t.word, MOE_FAULT_NONE, 0);
    { /* every expert in every row: the number does not fit 32 bits */
        const int64_t all = (int64_t)RB * experts;
        int32_t* more = (int32_t*)test_host(all * 16 * 4);
        tbuf source;
        for (int64_t i = 0; i < all * 16; ++i) more[i] = (int32_t)(i % experts);
        source = tbuf_from("ids", more, (size_t)all * 16 * 4, 0);
        d->ids = (const int32_t*)source.p;
        d->top_k = experts;
        memset(t.row_offset_want, 0, RB * 4 + 4);
        tbuf_poison(&t.row_offset);
        tbuf_poison(&t.column_index);
        CHECK_STATUS(moe_block_sparse_list_build(d, test_now.stream), MOE_OK);
        tlist_same(&t.row_offset, t.row_offset_want, RB + 1);
        tlist_same(&t.column_index, 0, 0);
        CHECK_FAULT(&t.word, MOE_FAULT_NO_ROOM, all * each);
        tbuf_free(&source);
        free(more);
    }
    tbuf_free(&t.source);
    tbuf_free(&t.row_offset);
    tbuf_free(&t.column_index);
    tbuf_free(&t.word);
    tbuf_free(&t.workspace);
    free(t.row_offset_want);
    free(t.column_index_want);
    free(ids);
}

/* The largest masks that are common; on the CPU smaller ones. */
static void test_large(void)
{
    trand r = trand_new(9);
    const int64_t RB = MOE_ON_HOST ? 1056 : 16384, CB = MOE_ON_HOST ? 1056 : 4096;
    const int64_t rows = MOE_ON_HOST ? 4096 : 262144;
    for (int i = MOE_ON_HOST; i < 2; ++i) {
        moe_block_sparse_list_desc d = tlist_shape(&r, RB, CB);
        uint8_t* bytes = tlist_bytes(&r, RB * CB, 0.1);
        d.bytes = bytes;
        tlist_run(&d, 1, 0, i ? 0 : 1, "large");
        free(bytes);
    }
    {
        moe_block_sparse_list_desc d = tlist_routing(&r, rows, 256, 4);
        int32_t* ids = tlist_ids(&r, rows * 8, 256, 0);
        d.top_k = 8;
        d.ids = ids;
        tlist_run(&d, 1, 0, 0, "many ids");
        free(ids);
    }
}

static moe_status tlist_call(void* context, cudaStream_t stream)
{
    return moe_block_sparse_list_build((const moe_block_sparse_list_desc*)context, stream);
}

static void test_repeats(void)
{
    trand r = trand_new(10);
    moe_block_sparse_list_desc d = tlist_shape(&r, 150, 90);
    uint8_t* bytes = tlist_bytes(&r, 150 * 90, 0.3);
    tlist t;
    tbuf* out[5];
    d.bytes = bytes;
    t = tlist_new(&d, 1, 0, -1, 0);
    out[0] = &t.row_offset;
    out[1] = &t.column_index;
    out[2] = &t.column_offset;
    out[3] = &t.row_index;
    out[4] = &t.position;
    test_same_bits("list", tlist_call, &t.d, out, 5, MOE_ON_HOST ? 10 : 100);
    tlist_check(&t, "after many runs");
    tlist_free(&t);
    free(bytes);
}

/* A graph replayed with other masks and with other routing; one of them has no room. */
static void test_graph(void)
{
    trand r = trand_new(11);
    for (int routed = 0; routed < 3; ++routed) {
        const int RB = 50, CB = 75, experts = 25;
        moe_block_sparse_list_desc d = tlist_shape(&r, RB, CB);
        void* source[4];
        tlist t;
        tgraph g;
        for (int i = 0; i < 4; ++i)
            source[i] = routed == 0   ? (void*)tlist_bytes(&r, RB * CB, 0.1 + 0.2 * i)
                        : routed == 1 ? (void*)tlist_ids(&r, 800, experts, 0)
                                      : (void*)tlist_offsets(&r, 400, experts);
        if (routed) d = tlist_routing(&r, 400, experts, 3);
        if (routed == 1) d.top_k = 2;
        for (int i = 0; i < 4; ++i) {
            if (routed == 0) d.bytes = (const uint8_t*)source[i];
            else if (routed == 1) d.ids = (const int32_t*)source[i];
            else d.expert_offset = (const int32_t*)source[i];
            if (i == 0) {
                t = tlist_new(&d, 1, 0, routed == 0 ? RB * CB * 6 / 10 : RB * CB, 0);
                if (!tgraph_capture(&g, tlist_call, &t.d)) return;
            }
            tbuf_put(&t.source, source[i]);
            tlist_expect(&t, &d, t.d.max_blocks);
            tbuf_poison(&t.row_offset);
            tbuf_poison(&t.column_index);
            tbuf_poison(&t.column_offset);
            tbuf_poison(&t.row_index);
            tbuf_poison(&t.position);
            tgraph_launch(&g);
            tlist_check(&t, "replayed");
        }
        tgraph_free(&g);
        tlist_free(&t);
        for (int i = 0; i < 4; ++i) free(source[i]);
    }
}

/* After a stop fault nothing is written; a data fault stops nothing; no fault word is all right. */
static void test_stop_fault(void)
{
    trand r = trand_new(12);
    static const int codes[] = {MOE_FAULT_BAD_OFFSET, MOE_FAULT_BAD_TABLE, MOE_FAULT_BAD_BLOCK,
                                MOE_FAULT_NO_ROOM,    MOE_FAULT_NAN_LOGIT, MOE_FAULT_BAD_ID};
    for (int i = 0; i < 12; ++i) {
        const int stops = codes[i / 2] <= MOE_FAULT_LAST_STOP;
        moe_block_sparse_list_desc d = tlist_routing(&r, 300, 30, 2);
        int32_t* source = i & 1 ? tlist_ids(&r, 600, 30, 0) : tlist_offsets(&r, 300, 30);
        uint64_t word = MOEI_FAULT_KEY(codes[i / 2], TEST_RANK, 77);
        tlist t;
        if (i & 1) d.ids = source, d.top_k = 2;
        else d.expert_offset = source;
        t = tlist_new(&d, 1, 0, -1, 0);
        tbuf_put(&t.word, &word);
        CHECK_STATUS(moe_block_sparse_list_build(&t.d, test_now.stream), MOE_OK);
        if (stops) {
            CHECK(tbuf_holds(&t.row_offset, 0) && tbuf_holds(&t.column_offset, 0));
            CHECK(tbuf_holds(&t.column_index, 0) && tbuf_holds(&t.row_index, 0));
            CHECK(tbuf_holds(&t.position, 0));
            CHECK_FAULT(&t.word, codes[i / 2], 77);
        } else {
            t.fault.code = codes[i / 2];
            t.fault.index = 77;
            tlist_check(&t, "after a data fault");
        }
        tlist_free(&t);
        free(source);
    }
    for (int i = 0; i < 3; ++i) { /* without a word the list is empty where it must be */
        moe_block_sparse_list_desc d = tlist_routing(&r, 300, 30, 2);
        int32_t* source = tlist_offsets(&r, 300, 30);
        tlist t;
        d.expert_offset = source;
        if (i == 1) source[9] = -5;
        else source[0] = 0, source[1] = source[1] > 0 ? source[1] : 0, source[30] = 300;
        t = tlist_new(&d, 1, i == 2 ? -1 : 0, -1, 0);
        t.d.fault = 0;
        CHECK_STATUS(moe_block_sparse_list_build(&t.d, test_now.stream), MOE_OK);
        t.fault.code = MOE_FAULT_NONE;
        t.fault.index = 0;
        tlist_check(&t, "no fault word");
        tlist_free(&t);
        free(source);
    }
}

static void test_refusals(void)
{
    trand r = trand_new(13);
    moe_block_sparse_list_desc base = tlist_shape(&r, 40, 50),
                               routed = tlist_routing(&r, 100, 10, 2), d;
    uint8_t* bytes = tlist_bytes(&r, 40 * 50, 0.5);
    int32_t* ids = tlist_ids(&r, 200, 10, 0);
    tlist t, u;
    size_t n;
    base.bytes = bytes;
    routed.ids = ids;
    routed.top_k = 2;
    t = tlist_new(&base, 1, 0, -1, 0);
    u = tlist_new(&routed, 1, 0, -1, 0);
#define REFUSE(from, kind, field, ...)                                                             \
    do {                                                                                           \
        d = (from).d;                                                                              \
        __VA_ARGS__;                                                                               \
        CHECK_STATUS(moe_block_sparse_list_build(&d, test_now.stream),                             \
                     MOE_STATUS(MOE_ERR_##kind, field));                                           \
    } while (0)
    CHECK_STATUS(moe_block_sparse_list_build(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_sparse_list_workspace(0, &n), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_sparse_list_workspace(&t.d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    d = t.d;
    d.block_rows = 48;
    CHECK_STATUS(moe_block_sparse_list_workspace(&d, &n), MOE_STATUS(MOE_ERR_RANGE, block_rows));
    memset(&d, 0, sizeof d);
    d.rows = t.d.rows, d.columns = t.d.columns;
    d.block_rows = t.d.block_rows, d.block_columns = t.d.block_columns;
    CHECK_STATUS(moe_block_sparse_list_workspace(&d, &n), MOE_OK); /* no address is needed */
    CHECK(n == t.d.workspace_bytes, "%zu bytes, with addresses %zu", n, t.d.workspace_bytes);
    REFUSE(t, RANGE, rows, d.rows = -1);
    REFUSE(t, RANGE, columns, d.columns = -1);
    REFUSE(t, RANGE, columns, d.rows = d.columns = 0x7fffffff; d.block_rows = d.block_columns = 16);
    REFUSE(t, RANGE, block_rows, d.block_rows = 0);
    REFUSE(t, RANGE, block_rows, d.block_rows = 256);
    REFUSE(t, RANGE, block_columns, d.block_columns = 8);
    REFUSE(t, RANGE, max_blocks, d.max_blocks = -1);
    REFUSE(t, NULL, bytes, d.bytes = 0);
    REFUSE(u, NULL, bytes, d.ids = 0);
    REFUSE(t, CONFLICT, bits, d.bits = (const uint32_t*)u.source.p);
    REFUSE(t, CONFLICT, ids, d.ids = u.d.ids);
    REFUSE(t, CONFLICT, expert_offset, d.expert_offset = u.d.ids);
    REFUSE(u, CONFLICT, expert_offset, d.expert_offset = u.d.ids);
    REFUSE(t, CONFLICT, num_experts, d.columns = 3 * d.block_columns; d.num_experts = 3);
    REFUSE(u, RANGE, num_experts, d.num_experts = 0);
    REFUSE(u, RANGE, num_experts, d.num_experts = -1);
    REFUSE(u, RANGE, num_experts, d.num_experts = MOE_MAX_EXPERTS + 1);
    REFUSE(u, CONFLICT, num_experts, d.num_experts = 11);
    REFUSE(u, CONFLICT, num_experts, d.num_experts = 40; d.columns = 40 * (d.block_columns / 2));
    REFUSE(u, RANGE, top_k, d.top_k = 0);
    REFUSE(u, RANGE, top_k, d.top_k = MOE_MAX_EXPERTS + 1);
    REFUSE(t, CONFLICT, top_k, d.top_k = 1);
    REFUSE(u, CONFLICT, top_k, d.expert_offset = d.ids; d.ids = 0);
    REFUSE(u, OPTION, whole_batch, d.whole_batch = 2);
    REFUSE(t, CONFLICT, whole_batch, d.whole_batch = 1);
    REFUSE(t, NULL, row_offset, d.row_offset = 0);
    REFUSE(t, NULL, column_index, d.column_index = 0);
    REFUSE(t, NULL, column_offset, d.column_offset = 0);
    REFUSE(t, NULL, row_index, d.row_index = 0);
    REFUSE(t, NULL, position, d.position = 0);
    REFUSE(t, NULL, workspace, d.workspace = 0);
    REFUSE(t, NULL, workspace, d.workspace = 0; d.workspace_bytes = 0);
    REFUSE(t, NULL, column_offset, d.column_offset = d.row_index = 0);
    REFUSE(t, NULL, row_index, d.row_index = d.position = 0);
    REFUSE(t, WORKSPACE, workspace_bytes, --d.workspace_bytes);
#define SHIFT(type, p, by) ((type*)((char*)(p) + (by)))
    REFUSE(t, ALIGN, bits, d.bytes = 0; d.bits = SHIFT(const uint32_t, t.source.p, 2));
    REFUSE(u, ALIGN, ids, d.ids = SHIFT(const int32_t, d.ids, 2));
    REFUSE(u, ALIGN, expert_offset, d.expert_offset = SHIFT(const int32_t, d.ids, 1); d.ids = 0;
           d.top_k = 0);
    REFUSE(t, ALIGN, row_offset, d.row_offset = SHIFT(int32_t, d.row_offset, 2));
    REFUSE(t, ALIGN, column_index, d.column_index = SHIFT(int32_t, d.column_index, 1));
    REFUSE(t, ALIGN, column_offset, d.column_offset = SHIFT(int32_t, d.column_offset, 3));
    REFUSE(t, ALIGN, row_index, d.row_index = SHIFT(int32_t, d.row_index, 2));
    REFUSE(t, ALIGN, position, d.position = SHIFT(int32_t, d.position, 2));
    REFUSE(t, ALIGN, workspace, d.workspace = SHIFT(void, d.workspace, 8));
    REFUSE(t, RANGE, rank, d.rank = -1);
    REFUSE(t, RANGE, rank, d.rank = MOE_FAULT_MAX_RANK + 1);
    REFUSE(t, ALIGN, fault, d.fault = SHIFT(uint64_t, d.fault, 4));
    REFUSE(t, OVERLAP, row_offset, d.row_offset = SHIFT(int32_t, d.bytes, 1600));
    REFUSE(u, OVERLAP, row_offset, d.row_offset = SHIFT(int32_t, d.ids, 796));
    REFUSE(t, OVERLAP, row_offset, d.bits = (const uint32_t*)d.bytes; d.bytes = 0;
           d.row_offset = SHIFT(int32_t, d.bits, 40 * 2 * 4 - 4));
    REFUSE(u, OVERLAP, column_index, d.expert_offset = d.ids; d.ids = 0; d.top_k = 0;
           d.column_index = SHIFT(int32_t, d.expert_offset, 40));
    REFUSE(t, OVERLAP, column_index, d.column_index = d.row_offset + 40);
    REFUSE(t, OVERLAP, column_offset, d.column_offset = d.column_index);
    REFUSE(t, OVERLAP, row_index, d.row_index = d.column_index + d.max_blocks - 1);
    REFUSE(t, OVERLAP, position, d.position = d.column_offset + 50);
    REFUSE(t, OVERLAP, position, d.position = d.row_index + d.max_blocks - 1);
    REFUSE(t, OVERLAP, position, d.position = d.column_index - (d.max_blocks - 1));
    REFUSE(t, OVERLAP, fault, d.fault = SHIFT(uint64_t, d.position, (d.max_blocks - 2) / 2 * 8));
    REFUSE(t, OVERLAP, workspace, d.workspace = SHIFT(void, d.position, 0));
    REFUSE(t, OVERLAP, workspace, d.workspace = SHIFT(void, (uintptr_t)d.bytes & ~15ull, 1024));
    REFUSE(t, OVERLAP, fault, d.fault = SHIFT(uint64_t, d.workspace, 64));
#undef SHIFT
#undef REFUSE
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&t.row_offset, 0) && tbuf_holds(&t.column_index, 0));
    CHECK(tbuf_holds(&t.column_offset, 0) && tbuf_holds(&t.row_index, 0));
    CHECK(tbuf_holds(&t.position, 0) && tbuf_holds(&t.workspace, 0));
    CHECK(tbuf_holds(&u.row_offset, 0) && tbuf_holds(&u.column_index, 0));
    CHECK_FAULT(&t.word, MOE_FAULT_NONE, 0);
    CHECK_STATUS(moe_block_sparse_list_build(&t.d, test_now.stream), MOE_OK); /* as it was */
    tlist_check(&t, "after refusals");
    CHECK_STATUS(moe_block_sparse_list_build(&u.d, test_now.stream), MOE_OK);
    tlist_check(&u, "after refusals");
    CHECK_STATUS(moe_block_sparse_list_preload(), MOE_OK);
    tlist_free(&t);
    tlist_free(&u);
    free(bytes);
    free(ids);
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_bytes);
    RUN(test_bits);
    RUN(test_one_block);
    RUN(test_ids);
    RUN(test_offsets);
    RUN(test_offsets_without_rows);
    RUN(test_many_experts);
    RUN(test_no_room);
    RUN(test_huge);
    RUN(test_large);
    RUN(test_repeats);
    RUN(test_graph);
    RUN(test_stop_fault);
    RUN(test_refusals);
    return test_end();
}
