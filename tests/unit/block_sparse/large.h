/* large.h: block-sparse products of many tiles, and of elements past 2^31 and 2^32.

     test_block_large           sizes of many tiles, on every tile and on the default; GPU only
     test_block_past_2_31       rows of A, B or C past 2^32 elements: the bits of the same call on
                                near ones
     test_block_many_past_2_31  a C of 4.4e9 elements, strided and packed; the packed one is then
                                an operand; GPU only */
#ifndef MOE_TESTS_BLOCK_SPARSE_LARGE_H
#define MOE_TESTS_BLOCK_SPARSE_LARGE_H

#include "tests/test.h"
#include "tests/test_product.h"

static void test_block_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(14);
    for (int tile = MOE_BLOCK_SPARSE_TILE_AUTO; tile <= MOE_BLOCK_SPARSE_TILE_64x64; ++tile)
        for (int i = 0; i < 6; ++i) {
            tproduct_want w = tproduct_drawn(tproduct_op(i), 700, 801, 650, &r);
            w.tile = tile;
            w.percent = 20;
            if (i % 2) w.pattern = TPATTERN_DIAGONAL; /* strips alike, and others between them */
            w.draw = TDRAW_NORMAL;
            tproduct_run(&w, &r);
        }
#endif
}

static void test_block_past_2_31(void)
{
    trand r = trand_new(15);
    if (!twide_possible(2)) return;
    for (int i = 0; i < 18; ++i) {
        const int far = i / 3 % 3;       /* which of A, B, C */
        const int rows = i < 9 ? 2 : 37; /* 2: a stride of 2^32; 37: a tile's rows far apart */
        tproduct_want w =
            tproduct_normal(tproduct_op(i), far == 0 ? rows : 40, 48, far == 1 ? rows : 56);
        tproduct p;
        tmatrix* t;
        twide wide;
        w.block_rows = w.block_columns = 16;
        w.by_column = 1;
        tproduct_new(&p, &w, &r);
        t = far == 0 ? &p.a : far == 1 ? &p.b : &p.c;
        if (tproduct_launch(&p) &&
            twide_new(&wide, "the far rows", t->rows, t->columns, t->dtype)) {
            char* dense = (char*)tbuf_copy(&t->part[0]); /* its rows lie close together */
            tproduct_compare(&p);
            if (far < 2) {
                char* near = (char*)tbuf_copy(&p.c.part[0]);
                twide_put(&wide, dense);
                if (far) p.d.b = wide.p, p.d.b_stride = wide.stride;
                else p.d.a = wide.p, p.d.a_stride = wide.stride;
                tmatrix_poison(&p.c);
                CHECK_STATUS(moe_block_sparse(&p.d, test_now.stream), MOE_OK);
                CHECK(tbuf_holds(&p.c.part[0], near), "far %d: %s", far, tproduct_text(&w));
                free(near);
            } else {
                p.d.c = wide.p;
                p.d.c_stride = wide.stride;
                CHECK_STATUS(moe_block_sparse(&p.d, test_now.stream), MOE_OK);
            }
            CHECK(twide_holds(&wide, dense), "far %d: %s", far, tproduct_text(&w));
            twide_free(&wide);
            free(dense);
        }
        tproduct_free(&p);
    }
}

#if !MOE_ON_HOST
/* Copies row y of a packed matrix of side * side sparse blocks from the device. */
static void packed_row(uint16_t* row, const char* packed, int64_t y, int side, int block)
{
    const int64_t at = (y / block * side * block + y % block) * block;
    TEST_CUDA(cudaMemcpy2D(row, (size_t)block * 2, packed + at * 2, (size_t)block * block * 2,
                           (size_t)block * 2, (size_t)side, cudaMemcpyDeviceToHost));
}

/* Checks products of the packed matrix S [n, n], of more than 2^32 elements: S as A of dsd and,
   transposed, as B of dds. d is the sdd that made S, and has the mask. Compares the first row, the
   last one and some others. */
static void check_far_operand(moe_block_sparse_desc d, const char* packed, int side, int block,
                              trand* r)
{
    enum { OTHER = 16, ROWS = 6 };
    const int n = side * block;
    double *exact = (double*)test_host(ROWS * OTHER * 8),
           *sum = (double*)test_host(ROWS * OTHER * 8);
    uint16_t *dense = (uint16_t*)test_host((int64_t)n * OTHER * 2),
             *row = (uint16_t*)test_host(n * 2);
    tbuf d_dense, workspace, c;
    trand_fill_normal(r, dense, (int64_t)n * OTHER, MOE_FP16);
    d_dense = tbuf_from("dense", dense, (size_t)n * OTHER * 2, 0);
    for (int dds = 0; dds < 2; ++dds) { /* dense: B [n, OTHER]; A [OTHER, n] */
        float got[ROWS * OTHER], *all;
        c = tbuf_new("c", (size_t)n * OTHER * 4, 0);
        d.op = dds ? MOE_BLOCK_SPARSE_DDS : MOE_BLOCK_SPARSE_DSD;
        d.a = dds ? d_dense.p : packed;
        d.b = dds ? packed : d_dense.p;
        d.c = c.p;
        d.m = dds ? OTHER : n, d.n = dds ? n : OTHER, d.k = n;
        d.b_transposed = dds;
        d.packed = 1;
        d.c_dtype = MOE_FP32;
        workspace = tproduct_workspace(&d, 0);
        CHECK_STATUS(moe_block_sparse(&d, test_now.stream), MOE_OK);
        TEST_CUDA(cudaDeviceSynchronize());
        all = (float*)tbuf_copy(&c);
        for (int i = 0; i < ROWS; ++i) {
            const int64_t y = i == 0 ? 0 : i == 1 ? n - 1 : trand_int(r, 0, n - 1);
            packed_row(row, packed, y, side, block);
            for (int j = 0; j < OTHER; ++j) {
                double e = 0, abs_sum = 0;
                for (int64_t k = 0; k < n; ++k) {
                    const double v =
                        (double)moe_load(row, k, MOE_FP16) *
                        moe_load(dense, dds ? j * (int64_t)n + k : k * OTHER + j, MOE_FP16);
                    e += v;
                    abs_sum += fabs(v);
                }
                exact[i * OTHER + j] = e;
                sum[i * OTHER + j] = abs_sum;
                got[i * OTHER + j] = all[dds ? j * (int64_t)n + y : y * OTHER + j];
            }
        }
        CHECK_CLOSE_SUM(dds ? "far B" : "far A", got, OTHER, exact, sum, n, ROWS, OTHER);
        free(all);
        tbuf_free(&workspace);
        tbuf_free(&c);
    }
    tbuf_free(&d_dense);
    free(exact), free(sum), free(dense), free(row);
}
#endif

/* Compares the first sparse block of C, the last one and some others. */
static void test_block_many_past_2_31(void)
{
#if !MOE_ON_HOST
    enum { BLOCK = 128, SIDE = 520, K = 16, N = SIDE * BLOCK, COUNT = SIDE * SIDE }; /* 4.4e9 */
    static double exact[BLOCK * BLOCK], sum[BLOCK * BLOCK];
    static uint16_t got[BLOCK * BLOCK];
    trand r = trand_new(16);
    const size_t bytes = (size_t)COUNT * BLOCK * BLOCK * 2;
    int32_t *rows = (int32_t*)test_host(SIDE * 4 + 4), *columns = (int32_t*)test_host(COUNT * 4);
    uint16_t *a = (uint16_t*)test_host(N * K * 2), *b = (uint16_t*)test_host(N * K * 2);
    char* c;
    tbuf d_a, d_b, d_rows, d_columns, fault, workspace;
    moe_block_sparse_desc d;
    if (test_has_memory(bytes)) {
        fault = tfault_new(0);
        for (int i = 0; i <= SIDE; ++i) rows[i] = i * SIDE;
        for (int i = 0; i < COUNT; ++i) columns[i] = i % SIDE;
        trand_fill_normal(&r, a, N * K, MOE_FP16);
        trand_fill_normal(&r, b, N * K, MOE_FP16);
        d_a = tbuf_from("a", a, N * K * 2, 0);
        d_b = tbuf_from("b", b, N * K * 2, 0);
        d_rows = tbuf_from("row_offset", rows, SIDE * 4 + 4, 0);
        d_columns = tbuf_from("column_index", columns, COUNT * 4, 0);
        TEST_CUDA(cudaMalloc((void**)&c, bytes));
        memset(&d, 0, sizeof d);
        d.op = MOE_BLOCK_SPARSE_SDD;
        d.a = d_a.p;
        d.b = d_b.p;
        d.c = c;
        d.m = d.n = d.mask.rows = d.mask.columns = N;
        d.k = K;
        d.b_transposed = 1;
        d.dtype = MOE_FP16;
        d.fault = (uint64_t*)fault.p;
        d.rank = TEST_RANK;
        d.mask.row_offset = (const int32_t*)d_rows.p;
        d.mask.column_index = (const int32_t*)d_columns.p;
        d.mask.block_rows = d.mask.block_columns = BLOCK;
        d.mask.max_blocks = COUNT;
        for (int packed = 0; packed < 2; ++packed) {
            d.packed = packed;
            workspace = tproduct_workspace(&d, 0);
            test_poison_device(c, (size_t)bytes);
            TEST_CUDA(cudaDeviceSynchronize());
            CHECK_STATUS(moe_block_sparse(&d, test_now.stream), MOE_OK);
            TEST_CUDA(cudaDeviceSynchronize());
            for (int i = 0; i < 40; ++i) {
                const int64_t p = i == 0 ? 0 : i == 1 ? COUNT - 1 : trand_int(&r, 0, COUNT - 1);
                const int64_t y = p / SIDE * BLOCK, x = p % SIDE * BLOCK;
                const int64_t at = packed ? p * BLOCK * BLOCK : y * N + x;
                for (int e = 0; e < BLOCK * BLOCK; ++e) {
                    exact[e] = sum[e] = 0;
                    for (int k = 0; k < K; ++k) {
                        const double v = (double)moe_load(a, (y + e / BLOCK) * K + k, MOE_FP16) *
                                         moe_load(b, (x + e % BLOCK) * K + k, MOE_FP16);
                        exact[e] += v;
                        sum[e] += fabs(v);
                    }
                }
                TEST_CUDA(cudaMemcpy2D(got, BLOCK * 2, c + at * 2, (packed ? BLOCK : N) * 2,
                                       BLOCK * 2, BLOCK, cudaMemcpyDeviceToHost));
                CHECK_CLOSE("block", got, MOE_FP16, BLOCK, exact, 0, BLOCK, BLOCK);
            }
            tbuf_free(&workspace);
            if (packed) check_far_operand(d, c, SIDE, BLOCK, &r);
            CHECK_FAULT(&fault, MOE_FAULT_NONE, 0);
        }
        TEST_CUDA(cudaFree(c));
        tbufs_free(TBUFS(&d_a, &d_b, &d_rows, &d_columns, &fault));
    }
    free(rows), free(columns), free(a), free(b);
#endif
}

static void block_sparse_large(void)
{
    RUN(test_block_large);
    RUN(test_block_past_2_31);
    RUN(test_block_many_past_2_31);
}

#endif
