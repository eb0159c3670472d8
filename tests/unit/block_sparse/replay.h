/* replay.h: the block-sparse product called again.

     test_block_same_bits  every run gives the same bits
     test_block_graph      a captured product, replayed with other masks and other numbers
     test_block_tune       the choice that tuning returns runs and is right */
#ifndef MOE_TESTS_BLOCK_SPARSE_REPLAY_H
#define MOE_TESTS_BLOCK_SPARSE_REPLAY_H

#include "tests/test.h"
#include "tests/test_product.h"

TEST_CALL(call_product, moe_block_sparse, moe_block_sparse_desc)

static void test_block_same_bits(void)
{
    trand r = trand_new(11);
    for (int i = 0; i < (MOE_ON_HOST ? 3 : 24); ++i) {
        tproduct_want w = tproduct_drawn(tproduct_op(i), 90, 100, 110, &r);
        tproduct p;
        if (!MOE_ON_HOST) w.m = w.n = w.k = 600;
        w.percent = 50;
        tproduct_new(&p, &w, &r);
        if (tproduct_launch(&p)) {
            test_same_bits("product", call_product, &p.d, TBUFS(&p.c.part[0]),
                           MOE_ON_HOST ? 20 : 100);
            tproduct_compare(&p);
        }
        tproduct_free(&p);
    }
}

static void test_block_graph(void)
{
    trand r = trand_new(12);
    for (int i = 0; i < 9; ++i) {
        const int size = i / 3 == 1 ? 150 : 75; /* 150: strips alike */
        tproduct_want w = tproduct_drawn(tproduct_op(i), size, size - 3, size - 5, &r);
        tproduct p;
        tgraph g;
        w.form = i / 3;
        w.packed = 0;
        w.room = -1;
        w.tile = i / 3 == 1 ? MOE_BLOCK_SPARSE_TILE_64x256 : MOE_BLOCK_SPARSE_TILE_AUTO;
        w.fallback = MOE_BLOCK_SPARSE_TILE_32x256;
        if (i / 3 == 1) w.block_rows = w.block_columns = 32;
        w.dtype = w.c_dtype = tproduct_half();
        tproduct_new(&p, &w, &r);
        if (tproduct_launch(&p))
            TEST_CUDA(cudaDeviceSynchronize()); /* its kernels are loaded now */
        tmatrix_poison(&p.c);
        if (tgraph_capture(&g, call_product, &p.d)) {
            CHECK(tmatrix_same(&p.c, 1), "capture itself runs nothing");
            for (int run = 0; run < 4; ++run) {
                tmask_draw(&p.mask,
                           run == 2   ? TPATTERN_EMPTY
                           : run == 3 ? TPATTERN_FULL
                                      : TPATTERN_RANDOM,
                           40, &r);
                tmask_put(&p.mask, &r);
                for (int s = 0; s < 2; ++s) { /* what is masked out now may have been present */
                    tmatrix* t = s ? &p.b : &p.a;
                    test_poison(t->host[0], t->part[0].bytes);
                    tmatrix_fill(t, TDRAW_NORMAL, 1, &r);
                }
                p.w.draw = TDRAW_NORMAL;
                tmatrix_poison(&p.c);
                tgraph_launch(&g);
                tproduct_compare(&p);
            }
            tgraph_free(&g);
        }
        tproduct_free(&p);
    }
}

/* tproduct_compare looks at the inputs too: tuning leaves them as they are. */
static void test_block_tune(void)
{
    trand r = trand_new(13);
    for (int i = 0; i < (MOE_ON_HOST ? 3 : 12); ++i) {
        tproduct_want w = tproduct_drawn(tproduct_op(i), 130, 120, 110, &r);
        tproduct p;
        w.tile = MOE_BLOCK_SPARSE_TILE_AUTO;
        w.zero_masked = 0;
        w.dtype = w.c_dtype = tproduct_half();
        tproduct_new(&p, &w, &r);
        memset(&p.d.choice, 0, sizeof p.d.choice);
        {
            moe_block_sparse_choice choice;
            test_poison(&choice, sizeof choice);
            CHECK_STATUS(moe_block_sparse_tune(&p.d, test_now.stream, &choice), MOE_OK);
            CHECK(choice.tile >= MOE_BLOCK_SPARSE_TILE_AUTO &&
                      choice.tile <= MOE_BLOCK_SPARSE_TILE_64x64 && choice.fallback_tile >= 0 &&
                      choice.fallback_tile <= MOE_BLOCK_SPARSE_TILE_64x64,
                  "tile %d, fallback %d", choice.tile, choice.fallback_tile);
            tmatrix_poison(&p.c);
            p.d.choice = choice;
            if (CHECK_STATUS(moe_block_sparse(&p.d, test_now.stream), MOE_OK)) tproduct_compare(&p);
        }
        tproduct_free(&p);
    }
}

static void block_sparse_replay(void)
{
    RUN(test_block_same_bits);
    RUN(test_block_graph);
    RUN(test_block_tune);
}

#endif
