/* faults.h: what the kernels of moe_grouped_gemm find wrong, and calls with nothing to do.

     test_gemm_bad_offsets  records the first expert with a bad offset, and writes nothing
     test_gemm_bad_tables   records the expert whose address is null or misaligned, in each table,
                            and writes nothing; ignores addresses of experts without rows
     test_gemm_stopped      does nothing after a stop fault, everything after a data fault
     test_gemm_no_rows      accepts no rows, with null buffers

   The first three run the smallest tile and the largest, which on Hopper takes the wgmma path. */
#ifndef MOE_TESTS_GEMM_FAULTS_H
#define MOE_TESTS_GEMM_FAULTS_H

#include "tests/unit/gemm/run.h"

static const int fault_tiles[] = {MOE_TILE_64x64, MOE_TILE_128x256};

static void test_gemm_bad_offsets(void)
{
    static const int rows[] = {10, 20, 30, 5}, first[] = {1, 3, 0, 1};
    trand r = trand_new(9);
    for (int how = 0; how < 4; ++how)
        for (int i = 0; i < 4; ++i) {
            gemm_case c = normal_case(4, rows, 72, 40);
            gemm_bufs b;
            int32_t offset[5];
            c.c_table = i & 1;
            c.tile = fault_tiles[i / 2];
            if (test_gemm_status(c.dtype, c.tile) != MOE_OK) continue;
            bufs_new(&b, &c, &r);
            memcpy(offset, b.h_offset, sizeof offset);
            if (how == 0) offset[2] = 9;  /* expert 1 ends before it begins */
            if (how == 1) offset[4] = 66; /* past num_rows */
            if (how == 2) offset[0] = -1;
            if (how == 3) offset[2] = INT32_MIN;
            tbuf_put(&b.offset, offset);
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            CHECK(tgrouped_untouched(&b.c), "how=%d", how);
            CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, first[how]);
            b.d.fault = 0; /* writes nothing without a fault word either */
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            CHECK(tgrouped_untouched(&b.c), "without a fault word, how=%d", how);
            bufs_free(&b);
        }
}

static void test_gemm_bad_tables(void)
{
    enum { OF_B, OF_UP, OF_C, N = 72, K = 40, BAD = 2 };
    enum { IS_NULL, IS_OFF_BY_8, IS_OFF_BY_2, IS_GOOD };
    static const int rows[] = {10, 0, 30, 5};
    trand r = trand_new(19);
    for (int of = OF_B; of <= OF_C; ++of)
        for (int i = of == OF_UP ? 2 : 0; i < 4; ++i)
            for (int how = IS_NULL; how <= IS_GOOD; ++how) {
                const int separate = i / 2;
                gemm_case c = normal_case(4, rows, N, K);
                gemm_bufs b;
                char* at[4];
                tbuf table;
                c.activation = separate ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
                c.gate_up = separate ? MOE_GATE_UP_SEPARATE : MOE_GATE_UP_CONCATENATED;
                c.tile = fault_tiles[i % 2];
                if (test_gemm_status(c.dtype, c.tile) != MOE_OK) continue;
                bufs_new(&b, &c, &r);
                for (int e = 0; e < 4; ++e)
                    at[e] = of == OF_C
                                ? (char*)b.d.c + b.h_offset[e] * N * 2
                                : (char*)(of == OF_UP ? b.d.b.up : b.d.b.base) + e * N * K * 2;
                if (how == IS_NULL) at[BAD] = 0;
                if (how == IS_OFF_BY_8) at[BAD] += 8;
                if (how == IS_OFF_BY_2) at[BAD] += 2;
                at[1] = (char*)1; /* has no rows */
                table = tbuf_from("table", at, sizeof at, 0);
                if (of == OF_B) {
                    b.d.b.table = (const void* const*)table.p, b.d.b.base = 0;
                } else if (of == OF_UP) {
                    b.d.b.up_table = (const void* const*)table.p, b.d.b.up = 0;
                } else {
                    b.d.c_table = (void* const*)table.p, b.d.c = 0;
                }
                CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
                if (how == IS_GOOD) {
                    compare(&b, &c);
                } else {
                    CHECK(tgrouped_untouched(&b.c), "table %d, how=%d", of, how);
                    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_TABLE, BAD);
                }
                tbuf_free(&table);
                bufs_free(&b);
            }
}

static void test_gemm_stopped(void)
{
    static const int rows[] = {10, 20};
    trand r = trand_new(10);
    for (int i = 0; i < 2; ++i) {
        gemm_case c = normal_case(2, rows, 72, 40);
        gemm_bufs b;
        c.tile = fault_tiles[i];
        if (test_gemm_status(c.dtype, c.tile) != MOE_OK) continue;
        bufs_new(&b, &c, &r);
        tfault_put(&b.fault, MOE_FAULT_BAD_OFFSET, 7);
        CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        CHECK(tgrouped_untouched(&b.c), "after a stop fault");
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 7);
        tfault_put(&b.fault, MOE_FAULT_BAD_ID, 3);
        CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_ID, 3);
        tfault_put(&b.fault, MOE_FAULT_NONE, 0);
        compare(&b, &c);
        bufs_free(&b);
    }
}

static void test_gemm_no_rows(void)
{
    moe_grouped_gemm_desc d = {};
    moe_gemm_plan p = {};
    d.num_experts = 1, d.n = d.k = 8;
    d.dtype = test_half();
    CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_OK);
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
    d.n = 12;
    CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_STATUS(MOE_ERR_MULTIPLE, n));
}

static void gemm_faults(void)
{
    RUN(test_gemm_bad_offsets);
    RUN(test_gemm_bad_tables);
    RUN(test_gemm_stopped);
    RUN(test_gemm_no_rows);
}

#endif
