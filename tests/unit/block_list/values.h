/* values.h: block lists against the reference, every entry of every list.

     test_bytes                 masks of bytes: all shapes and densities, any address
     test_bits                  masks of bits, noise past the last column
     test_one_block             one sparse block anywhere, or the ragged last one alone
     test_ids                   ids of rows or of the whole batch, some -1 or out of range
     test_offsets               expert offsets; then the same ones, spoilt
     test_offsets_without_rows  offsets of no rows: checked, with the fault's index
     test_many_experts          more than 1024 experts
     test_no_room               a list with no entry, one too few, just enough */
#ifndef MOE_TESTS_BLOCK_LIST_VALUES_H
#define MOE_TESTS_BLOCK_LIST_VALUES_H

#include "tests/unit/block_list/case.h"

/* Empties some block rows and some block columns. */
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
                moe_ref_block_sparse_bits(bytes, RB, CB, words);
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

static const int tlist_experts[] = {1, 2, 5, 8, 31, 32, 33, 60, 64, 100, 256};
static const int tlist_rows[] = {0, 1, 15, 16, 17, 127, 128, 129, 500, 1000};

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
        if (i % 13 == 0) d.columns = 0; /* ids are checked all the same */
        d.whole_batch = whole;
        ids = tlist_ids(&r, (whole ? 1 : rows) * d.top_k, experts, i % 3 == 1 ? 200 : 0);
        d.ids = ids;
        tlist_run(&d, i % 5 != 0, trand_int(&r, 0, 40), (size_t)trand_int(&r, 0, 3) * 4,
                  whole ? "ids of the batch" : "ids");
        free(ids);
    }
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
        { /* spoilt at one entry or two; also with no rows */
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

/* bad: the expert whose range is wrong, -1 for none. */
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

/* Takes several spans of words: one span has 1024 experts. */
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

static void block_list_values(void)
{
    RUN(test_bytes);
    RUN(test_bits);
    RUN(test_one_block);
    RUN(test_ids);
    RUN(test_offsets);
    RUN(test_offsets_without_rows);
    RUN(test_many_experts);
    RUN(test_no_room);
}

#endif
