/* tiles.h: the block-sparse product gives the same bits on every tile.

     test_block_full_is_dense  under a full mask, whatever the operation, the size of the sparse
                               blocks, the form and the storage
     test_block_tiles_agree    under any mask, for all tiles and all forms */
#ifndef MOE_TESTS_BLOCK_SPARSE_TILES_H
#define MOE_TESTS_BLOCK_SPARSE_TILES_H

#include "tests/test.h"
#include "tests/test_product.h"

/* Returns C of the product as dense rows. */
static char* dense_bits(const tproduct* p)
{
    const int elem = moe_dtype_bytes(p->w.c_dtype);
    char* rows = (char*)test_host((int64_t)p->w.m * p->w.n * elem);
    char* all = (char*)tbuf_copy(&p->c.part[0]);
    for (int i = 0; i < p->w.m; ++i)
        for (int j = 0; j < p->w.n; ++j) {
            int part;
            const int64_t at = tmatrix_at(&p->c, i, j, &part);
            if (at >= 0)
                memcpy(rows + ((int64_t)i * p->w.n + j) * elem, all + at * elem, (size_t)elem);
        }
    free(all);
    return rows;
}

/* Copies the numbers of one matrix into another of the same sizes, however they lie. */
static void copy_numbers(tmatrix* to, const tmatrix* from)
{
    for (int i = 0; i < to->rows; ++i)
        for (int j = 0; j < to->columns; ++j) {
            int part, from_part;
            const int64_t at = tmatrix_at(to, i, j, &part), x = tmatrix_at(from, i, j, &from_part);
            ((uint16_t*)to->host[part])[at] = ((const uint16_t*)from->host[from_part])[x];
        }
    tmatrix_put(to);
}

/* Under a full mask all three operations are the dense product. */
static void test_block_full_is_dense(void)
{
    trand r = trand_new(8);
    for (int i = 0; i < (MOE_ON_HOST ? 4 : 24); ++i) {
        const int m = i ? tproduct_size(&r) : 150, n = i ? tproduct_size(&r) : 136,
                  k = i ? tproduct_size(&r) : 200;
        tproduct first; /* its numbers are those of all others */
        char* want = 0;
        tproduct_want w = tproduct_normal(MOE_BLOCK_SPARSE_SDD, m, n, k);
        w.a_transposed = i & 1;
        w.b_transposed = i / 2 & 1;
        w.pattern = TPATTERN_FULL;
        w.c_dtype = i & 1 ? MOE_FP32 : w.dtype;
        w.tile = MOE_BLOCK_SPARSE_TILE_64x64;
        tproduct_new(&first, &w, &r);
        if (tproduct_launch(&first)) {
            tproduct_compare(&first);
            want = dense_bits(&first);
        }
        for (int tile = MOE_BLOCK_SPARSE_TILE_128x256; tile <= MOE_BLOCK_SPARSE_TILE_64x64 && want;
             ++tile)
            for (int op = MOE_BLOCK_SPARSE_SDD; op <= MOE_BLOCK_SPARSE_DDS; ++op) {
                tproduct p;
                tproduct_randomise(&w, &r);
                w.op = op;
                w.dtype = first.w.dtype;
                w.c_dtype = first.w.c_dtype;
                w.a_transposed = first.w.a_transposed;
                w.b_transposed = first.w.b_transposed;
                w.zero_masked = 0;
                w.draw = TDRAW_NORMAL;
                w.tile = tile;
                tproduct_new(&p, &w, &r);
                copy_numbers(&p.a, &first.a);
                copy_numbers(&p.b, &first.b);
                if (tproduct_launch(&p)) {
                    char* got = dense_bits(&p);
                    CHECK(memcmp(got, want,
                                 (size_t)m * (size_t)n * (size_t)moe_dtype_bytes(w.c_dtype)) == 0,
                          "other bits: %s", tproduct_text(&w));
                    free(got);
                }
                tproduct_free(&p);
            }
        free(want);
        tproduct_free(&first);
    }
}

static void test_block_tiles_agree(void)
{
    trand r = trand_new(9);
    for (int i = 0; i < 3 * 4 * (MOE_ON_HOST ? 1 : 8); ++i) {
        tproduct_want w = tproduct_drawn(tproduct_op(i), 130, 140, 135, &r);
        tproduct p;
        char* want = 0;
        w.dtype = w.c_dtype = tproduct_half();
        w.packed = 0;
        w.by_column = 1;
        w.draw = TDRAW_NORMAL;
        w.form = TFORM_LIST;
        tproduct_new(&p, &w, &r);
        for (int tile = MOE_BLOCK_SPARSE_TILE_AUTO; tile <= MOE_BLOCK_SPARSE_TILE_64x64; ++tile)
            for (int form = TFORM_BYTES; form <= TFORM_LIST; ++form) {
                char* got;
                p.w.form = form;
                p.w.tile = tile;
                p.w.fallback = form == tile % 3 ? MOE_BLOCK_SPARSE_TILE_32x256 : 0;
                tbuf_free(&p.workspace);
                tproduct_describe(&p);
                tmatrix_poison(&p.c);
                if (!tproduct_launch(&p)) continue;
                if (form == tile % 3) tproduct_compare(&p);
                got = (char*)tbuf_copy(&p.c.part[0]);
                CHECK(!want || memcmp(got, want, p.c.part[0].bytes) == 0, "other bits: %s",
                      tproduct_text(&p.w));
                if (want) free(got);
                else want = got;
            }
        free(want);
        tproduct_free(&p);
    }
}

static void block_sparse_tiles(void)
{
    RUN(test_block_full_is_dense);
    RUN(test_block_tiles_agree);
}

#endif
