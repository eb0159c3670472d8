/* values.h: the block-sparse product against its reference: what it computes, and what it leaves
   as it was.

     test_block_forms          all operations, transposes, dtypes of A, B and C, forms of the mask
     test_block_sizes          all pairs of sparse block sizes
     test_block_edges          m, n, k that no sparse block and no tile divides
     test_block_many           masks of many sparse blocks: more than a word of bits a row
     test_block_patterns       no sparse block, all, one, the ragged last one, the diagonal
     test_block_tables         dense matrices in parts behind pointer tables, some of C's null
     test_block_narrow_tables  the same, parts of columns with rows as close together as they fit
     test_block_odd_numbers    infinities and NaN reach only what the mask leads them to
     test_block_nothing        m, n or k of 0 */
#ifndef MOE_TESTS_BLOCK_SPARSE_VALUES_H
#define MOE_TESTS_BLOCK_SPARSE_VALUES_H

#include "tests/test.h"
#include "tests/test_product.h"

static void test_block_forms(void)
{
    trand r = trand_new(1);
    for (int i = 0; i < 3 * 4 * 4 * 3 * (MOE_ON_HOST ? 1 : 8); ++i) {
        tproduct_want w = tproduct_drawn(tproduct_op(i), tproduct_size(&r), tproduct_size(&r),
                                         tproduct_size(&r), &r);
        tproduct_transposes(&w, i / 3);
        w.dtype = i / 12 % 2 ? MOE_FP16 : MOE_BF16;
        w.c_dtype = i / 24 % 2 ? MOE_FP32 : w.dtype;
        tproduct_form(&w, i / 48 % 3);
        tproduct_run(&w, &r);
    }
}

static void test_block_sizes(void)
{
    trand r = trand_new(2);
    for (int i = 0; i < 3 * 16 * (MOE_ON_HOST ? 2 : 8); ++i) {
        const int rows = 16 << (i / 3 % 4), columns = 16 << (i / 12 % 4);
        const int large = rows > 64 || columns > 64; /* more than one sparse block each way */
        tproduct_want w = tproduct_drawn(tproduct_op(i), large ? 150 : 90, large ? 136 : 105,
                                         large ? 140 : 98, &r);
        w.block_rows = rows;
        w.block_columns = columns;
        tproduct_run(&w, &r);
    }
}

/* Takes one of m, n, k from `sizes`, draws the others. */
static void test_block_edges(void)
{
    static const int sizes[] = {1, 7, 8, 9, 127, 129, 200, 255, 257};
    trand r = trand_new(3);
    for (int i = 0; i < 9 * 3 * 3 * (MOE_ON_HOST ? 1 : 8); ++i) {
        int size[3] = {tproduct_size(&r), tproduct_size(&r), tproduct_size(&r)};
        tproduct_want w;
        size[i / 9 % 3] = sizes[i % 9];
        w = tproduct_drawn(tproduct_op(i / 27), size[0], size[1], size[2], &r);
        if (i % 2) w.pattern = TPATTERN_FULL;
        tproduct_run(&w, &r);
    }
}

/* Takes one of m, n, k so large that a row of the mask is more than a word of bits, and more than
   is gathered at once. */
static void test_block_many(void)
{
    trand r = trand_new(18);
    for (int i = 0; i < 3 * 3 * (MOE_ON_HOST ? 2 : 6); ++i) {
        const int most = i / 9 % 2 ? 16 * 1100 + 3 : 16 * 70 - 5;
        int size[3] = {20, 24, 17};
        tproduct_want w;
        size[i / 3 % 3] = most;
        w = tproduct_drawn(tproduct_op(i), size[0], size[1], size[2], &r);
        w.block_rows = w.block_columns = 16;
        w.form = w.packed ? TFORM_LIST : (i + i / 9) % 3;
        w.percent = 30;
        tproduct_run(&w, &r);
    }
}

static void test_block_patterns(void)
{
    trand r = trand_new(4);
    for (int pattern = TPATTERN_EMPTY; pattern <= TPATTERN_DIAGONAL; ++pattern)
        for (int i = 0; i < 9 * (MOE_ON_HOST ? 1 : 8); ++i) {
            tproduct_want w = tproduct_drawn(tproduct_op(i), 131, 75, 118, &r);
            w.pattern = pattern;
            tproduct_form(&w, i / 3 % 3);
            if (pattern == TPATTERN_LAST && i % 2) w.block_rows = w.block_columns = 128;
            tproduct_run(&w, &r);
        }
}

/* most 2: parts of columns may be narrow too. Their rows lie as close together as they fit, as
   those of matrices that share nothing but a table. */
static void run_tables(trand* r, int most)
{
    for (int i = 0; i < 3 * 4 * (MOE_ON_HOST ? 4 : 16); ++i) {
        tproduct_want w =
            tproduct_drawn(tproduct_op(i), tproduct_size(r), tproduct_size(r), tproduct_size(r), r);
        tproduct_transposes(&w, i / 3);
        w.none = i / 12 % 2 ? 30 : 0;
        w.percent /= 2; /* leaves parts that no sparse block reads */
        if (w.op != MOE_BLOCK_SPARSE_DSD) w.a_table = (int)trand_int(r, most - 1, most);
        if (w.op != MOE_BLOCK_SPARSE_DDS) w.b_table = (int)trand_int(r, most - 1, most);
        if (w.op != MOE_BLOCK_SPARSE_SDD) w.c_table = (int)trand_int(r, most - 1, most);
        tproduct_run(&w, r);
    }
}

static void test_block_tables(void)
{
    trand r = trand_new(5);
    run_tables(&r, 1);
}

static void test_block_narrow_tables(void)
{
    trand r = trand_new(17);
    run_tables(&r, 2);
}

/* Shows that a masked-out sparse block is not multiplied as zeros. The sparse blocks are small
   enough to share a tile. */
static void test_block_odd_numbers(void)
{
    trand r = trand_new(6);
    for (int i = 0; i < 3 * 5 * (MOE_ON_HOST ? 2 : 12); ++i) {
        tproduct_want w = tproduct_drawn(tproduct_op(i), 133, 140, 137, &r);
        w.tile = i / 3 % 5;
        w.percent = 40;
        w.draw = TDRAW_NONZERO;
        w.odd = 1;
        w.block_rows = 16 << trand_int(&r, 0, 2);
        w.block_columns = 16 << trand_int(&r, 0, 2);
        if (i % 5 == 4) w.pattern = TPATTERN_DIAGONAL;
        tproduct_run(&w, &r);
    }
}

/* With k = 0 the elements of C are zeros. */
static void test_block_nothing(void)
{
    trand r = trand_new(7);
    for (int i = 0; i < 3 * 7 * 3; ++i) {
        const int zero = 1 + i / 3 % 7; /* which of m, n, k are 0 */
        tproduct_want w = tproduct_drawn(tproduct_op(i), zero & 1 ? 0 : 45, zero & 2 ? 0 : 40,
                                         zero & 4 ? 0 : 35, &r);
        tproduct_form(&w, i / 21);
        tproduct_run(&w, &r);
    }
}

static void block_sparse_values(void)
{
    RUN(test_block_forms);
    RUN(test_block_sizes);
    RUN(test_block_edges);
    RUN(test_block_many);
    RUN(test_block_patterns);
    RUN(test_block_tables);
    RUN(test_block_narrow_tables);
    RUN(test_block_odd_numbers);
    RUN(test_block_nothing);
}

#endif
