/* values.h: results of moe_grouped_gemm, against the reference in double.

     test_gemm_tiles       runs every tile with both dtypes, both majors of B, none and SwiGLU, bias
                           and dtype of C
     test_gemm_rows        gives experts the numbers of rows that break things, on every tile
     test_gemm_tails       draws n and k that no tile divides; k = 8 is less than one product
     test_gemm_gather      takes rows of A by an index: with a divisor, rows of zeros, bad rows
     test_gemm_no_offset   leaves expert_offset null: all num_rows rows are the one expert's
     test_gemm_a_along_m   runs mn-major A, as gradients need it: experts begin and end anywhere in
                           a 16-byte vector
     test_gemm_accumulate  adds the product to what C holds, in fp32, and rounds once
     test_gemm_neighbours  lets C begin where A ends
     test_gemm_large       runs every tile, and the one that the header chooses, at sizes of many
                           tiles and bands, on a GPU */
#ifndef MOE_TESTS_GEMM_VALUES_H
#define MOE_TESTS_GEMM_VALUES_H

#include "tests/unit/gemm/run.h"

static void test_gemm_tiles(void)
{
    trand r = trand_new(3);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile)
        for (int i = 0; i < 4; ++i)
            for (int kind = 0; kind < 4; ++kind) /* none, SwiGLU three ways */
                for (int j = 0; j < 4; ++j) {
                    const int big = tile <= MOE_TILE_128x128;
                    const int one[] = {5, 0, big ? 130 : 34}, two[] = {big ? 20 : 66, 1};
                    gemm_case c = normal_case(3, one, 40, 72);
                    if ((j + kind + i) % 2) c = normal_case(2, two, 72, 136);
                    if (!MOE_ON_HOST && j == 3) c.n = 520;
                    c.tile = tile;
                    c.dtype = i & 1 ? MOE_FP16 : MOE_BF16;
                    c.b_major = i & 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
                    c.activation = kind ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
                    c.gate_up = kind ? kind : MOE_GATE_UP_CONCATENATED;
                    c.bias = j & 1;
                    c.c_dtype = j & 2 ? MOE_FP32 : c.dtype;
                    c.b_table = (int)trand_int(&r, 0, 1);
                    c.c_table = (int)trand_int(&r, 0, 1);
                    c.fill = kind == 0 && i == j ? TFILL_INT : TFILL_NORMAL;
                    run_case(&c, &r);
                }
}

static void test_gemm_rows(void)
{
    static const int counts[][9] = {{9, 0, 1, 63, 64, 65, 0, 127, 128}, /* [0] is E */
                                    {3, 129, 0, 31},
                                    {5, 33, 32, 1, 1, 1},
                                    {1, 127},
                                    {1, 1},
                                    {7, 0, 0, 150, 0, 0, 0, 0}, /* all on one expert */
                                    {6, 0, 0, 0, 0, 0, 200},
                                    {8, 200, 0, 0, 0, 0, 0, 0, 0},
                                    {4, 0, 0, 0, 0}};
    trand r = trand_new(4);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile)
        for (size_t i = 0; i < sizeof counts / sizeof *counts; ++i) {
            gemm_case c = normal_case(counts[i][0], counts[i] + 1, 48, 64);
            if (MOE_ON_HOST && tile == MOE_TILE_128x256 && i > 1 && i != 5) continue;
            randomise(&c, &r);
            if (MOE_ON_HOST) c.k = 8 * (int)trand_int(&r, 1, 9);
            c.tile = tile;
            run_case(&c, &r);
        }
}

static void test_gemm_tails(void)
{
    static const int ns[] = {8, 24, 56, 64, 72, 136, 264}, ks[] = {8, 16, 24, 40, 72, 136, 200};
    static const int rows[] = {3, 20, 0, 41};
    trand r = trand_new(5);
    for (size_t i = 0; i < sizeof ns / sizeof *ns; ++i)
        for (size_t j = 0; j < sizeof ks / sizeof *ks; ++j)
            for (int n = 0; n < (MOE_ON_HOST ? 1 : 8); ++n) {
                gemm_case c = normal_case(4, rows, ns[i], ks[j]);
                if (MOE_ON_HOST) c.rows[3] = 0;
                randomise(&c, &r);
                c.tile = MOE_ON_HOST ? (int)trand_int(&r, MOE_TILE_32x128, MOE_TILE_64x64)
                                     : (int)trand_int(&r, MOE_TILE_128x256, MOE_TILE_64x64);
                run_case(&c, &r);
            }
}

static void test_gemm_gather(void)
{
    static const int rows[] = {17, 0, 70, 1, 40};
    trand r = trand_new(6);
    for (int i = 0; i < (MOE_ON_HOST ? 12 : 48); ++i) {
        gemm_case c = normal_case(5, rows, 40, 40);
        randomise(&c, &r);
        c.gather = i % 3 == 0 ? 1 : (int)trand_int(&r, 2, 9);
        c.a_rows = (int)trand_int(&r, 1, 90);
        c.none = i % 4 == 1 ? 20 : 0;
        c.bad = i % 4 >= 2 ? 10 : 0;
        if (i % 4 == 3) c.none = 10;
        c.tile = i % 12 == 7    ? MOE_TILE_128x256
                 : i % 12 == 11 ? MOE_TILE_128x128
                 : i & 1        ? MOE_TILE_32x128
                                : MOE_TILE_64x64;
        run_case(&c, &r);
    }
    { /* without an index, rows past A's end are bad ones too */
        gemm_case c = normal_case(5, rows, 40, 40);
        c.a_rows = 100;
        run_case(&c, &r);
    }
}

static void test_gemm_no_offset(void)
{
    static const int rows[] = {77};
    trand r = trand_new(7);
    for (int i = 0; i < 4; ++i) {
        gemm_case c = normal_case(1, rows, 72, 48);
        c.no_offset = 1;
        c.fill = i & 1;
        c.b_major = i & 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
        c.c_table = i == 3;
        run_case(&c, &r);
    }
}

static void test_gemm_a_along_m(void)
{
    static const int some[] = {3, 1, 0, 17, 8, 70, 5}, few[] = {131, 6};
    trand r = trand_new(8);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile)
        for (int i = 0; i < 8; ++i) {
            const int big = tile <= MOE_TILE_128x128;
            gemm_case c = big && i % 2 ? normal_case(2, few, 40, 72) : normal_case(7, some, 56, 40);
            if (MOE_ON_HOST && tile == MOE_TILE_128x256 && i >= 4) continue;
            if (MOE_ON_HOST && big && i % 2 == 0) c.E = 4;
            randomise(&c, &r);
            c.tile = tile;
            c.a_major = MOE_MAJOR_MN;
            c.dtype = i & 1 ? MOE_FP16 : MOE_BF16;
            c.c_dtype = i & 4 ? MOE_FP32 : c.dtype;
            c.b_major = i & 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
            c.fill = i % 3 == 0 ? TFILL_INT : TFILL_NORMAL;
            if (c.fill == TFILL_INT) c.activation = MOE_ACTIVATION_NONE;
            if (i == 5) { /* A ends within a 16-byte vector */
                c.lead = c.slack = 0;
                for (int e = 0; e < c.E; ++e) c.a_rows += c.rows[e];
            }
            run_case(&c, &r);
        }
}

static void test_gemm_accumulate(void)
{
    static const int rows[] = {40, 0, 70};
    trand r = trand_new(32);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile)
        for (int kind = 0; kind < 3; ++kind) {
            gemm_case c = normal_case(3, rows, tile == MOE_TILE_128x256 ? 264 : 72, 136);
            gemm_bufs b;
            const int64_t size = 110 * c.n;
            tbuf exact;
            float* v;
            char* got;
            int64_t wrong = 0, at = 0;
            c.tile = tile;
            c.activation = kind ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
            c.gate_up = kind == 2 ? MOE_GATE_UP_INTERLEAVED : MOE_GATE_UP_CONCATENATED;
            if (test_gemm_status(c.dtype, tile) != MOE_OK) continue;
            bufs_new(&b, &c, &r);
            exact = tbuf_new("exact", (size_t)size * 4, 16);
            {
                moe_grouped_gemm_desc d = b.d;
                d.c = exact.p, d.c_dtype = MOE_FP32;
                CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_OK);
                v = (float*)tbuf_copy(&exact);
                d.accumulate = 1;
                CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_OK);
                got = (char*)tbuf_copy(&exact);
                for (int64_t i = 0; i < size; ++i) wrong += ((float*)got)[i] != 2 * v[i];
                CHECK(wrong == 0, "fp32: %lld are not twice the product, kind %d", (long long)wrong,
                      kind);
                free(got);
            }
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            b.d.accumulate = 1;
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            got = (char*)tbuf_copy(&b.c.all);
            for (int64_t i = 0; i < size; ++i) {
                const float sum = (float)test_rounded(v[i], c.dtype) + v[i];
                if (moe_load(got, i, c.dtype) != (float)test_rounded(sum, c.dtype)) ++wrong, at = i;
            }
            CHECK(wrong == 0, "%s: %lld are wrong, the last at %lld, kind %d",
                  moe_dtype_name(c.dtype), (long long)wrong, (long long)at, kind);
            TFREE(v, got);
            tbuf_free(&exact);
            bufs_free(&b);
        }
}

static void test_gemm_neighbours(void)
{
    enum { ROWS = 20, N = 64, K = 40 };
    static const int rows[] = {ROWS};
    trand r = trand_new(15);
    gemm_case c = normal_case(1, rows, N, K);
    gemm_bufs b;
    char* both = (char*)test_host(ROWS * K * 2 + ROWS * N * 2);
    tbuf joined;
    bufs_new(&b, &c, &r);
    memcpy(both, b.h_a, ROWS * K * 2);
    joined = tbuf_from("a and c", both, ROWS * K * 2 + ROWS * N * 2, 0);
    b.d.a = joined.p, b.d.c = (char*)joined.p + ROWS * K * 2;
    CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
    {
        char* got = (char*)tbuf_copy(&joined);
        CHECK(memcmp(got, b.h_a, ROWS * K * 2) == 0, "A was written");
        tbuf_put(&b.c.all, got + ROWS * K * 2);
        compare(&b, &c);
        free(got);
    }
    free(both);
    tbuf_free(&joined);
    bufs_free(&b);
}

static void test_gemm_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(14);
    for (int tile = MOE_TILE_AUTO; tile <= MOE_TILE_64x64; ++tile)
        for (int i = 0; i < 4; ++i) {
            const int none[] = {0};
            gemm_case c = normal_case(1, none, i & 1 ? 1032 : 2048, i & 1 ? 1000 : 1024);
            c.E = i & 1 ? 37 : 8;
            for (int e = 0; e < c.E; ++e)
                c.rows[e] = e == 3 ? 2700 : (int)trand_int(&r, 0, i & 1 ? 90 : 700);
            c.tile = tile;
            c.gather = i == 1 ? 0 : 4;
            c.a_rows = c.gather ? 3000 : 0;
            c.dtype = c.c_dtype = i & 2 ? MOE_FP16 : MOE_BF16;
            if (i == 3) c.c_dtype = MOE_FP32;
            c.activation = i == 0 || i == 3 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
            c.b_major = i == 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
            c.bias = i & 1;
            c.sampled = 251;
            run_case(&c, &r);
        }
#endif
}

static void gemm_values(void)
{
    RUN(test_gemm_tiles);
    RUN(test_gemm_rows);
    RUN(test_gemm_tails);
    RUN(test_gemm_gather);
    RUN(test_gemm_no_offset);
    RUN(test_gemm_a_along_m);
    RUN(test_gemm_accumulate);
    RUN(test_gemm_neighbours);
    RUN(test_gemm_large);
}

#endif
