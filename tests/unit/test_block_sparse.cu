/* test_block_sparse.cu: the block-sparse product against its reference in double: what it computes,
   and what it leaves alone. What it refuses: test_block_sparse_args.cu.

     nvcc -I. -arch=sm_90a tests/unit/test_block_sparse.cu -o test_block_sparse
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_block_sparse.cu -o test_block_sparse */
#include "tests/test.h"
#include "tests/test_product.h"

static const int ops[] = {MOE_BLOCK_SPARSE_SDD, MOE_BLOCK_SPARSE_DSD, MOE_BLOCK_SPARSE_DDS};

/* Rather more often small than large: below a block, about one, and some of them. */
static int draw_size(trand* r)
{
    static const int sizes[] = {1,  7,  8,  15, 16,  17,  31,  33,  40, 63,
                                64, 65, 72, 96, 127, 128, 129, 136, 200};
    return sizes[trand_int(r, 0, (int)(sizeof sizes / sizeof *sizes) - 1)];
}

/* All operations with all transposes, both dtypes, both dtypes of C, all forms of the mask. */
static void test_block_forms(void)
{
    trand r = trand_new(1);
    for (int i = 0; i < 3 * 4 * 4 * 3 * (MOE_ON_HOST ? 1 : 8); ++i) {
        tproduct_want w = tproduct_normal(ops[i % 3], draw_size(&r), draw_size(&r), draw_size(&r));
        tproduct_randomise(&w, &r);
        w.a_transposed = i / 3 % 2;
        w.b_transposed = i / 6 % 2;
        w.dtype = i / 12 % 2 ? MOE_FP16 : MOE_BF16;
        w.c_dtype = i / 24 % 2 ? MOE_FP32 : w.dtype;
        w.form = i / 48 % 3;
        w.packed = w.packed && w.form == TFORM_LIST;
        tproduct_run(&w, &r);
    }
}

/* All pairs of block sizes. */
static void test_block_sizes(void)
{
    trand r = trand_new(2);
    for (int i = 0; i < 3 * 16 * (MOE_ON_HOST ? 2 : 8); ++i) {
        const int rows = 16 << (i / 3 % 4), columns = 16 << (i / 12 % 4);
        const int large = rows > 64 || columns > 64; /* more than one block each way */
        tproduct_want w =
            tproduct_normal(ops[i % 3], large ? 150 : 90, large ? 136 : 105, large ? 140 : 98);
        tproduct_randomise(&w, &r);
        w.block_rows = rows;
        w.block_columns = columns;
        tproduct_run(&w, &r);
    }
}

/* Sizes that no block and no tile divides; one of m, n, k at a time. */
static void test_block_edges(void)
{
    static const int sizes[] = {1, 7, 8, 9, 127, 129, 200, 255, 257};
    trand r = trand_new(3);
    for (int i = 0; i < 9 * 3 * 3 * (MOE_ON_HOST ? 1 : 8); ++i) {
        int size[3] = {draw_size(&r), draw_size(&r), draw_size(&r)};
        tproduct_want w;
        size[i / 9 % 3] = sizes[i % 9];
        w = tproduct_normal(ops[i / 27 % 3], size[0], size[1], size[2]);
        tproduct_randomise(&w, &r);
        if (i % 2) w.pattern = TPATTERN_FULL;
        tproduct_run(&w, &r);
    }
}

/* Masks of many blocks: more than a word of bits in a row, more than are gathered at once. */
static void test_block_many(void)
{
    trand r = trand_new(18);
    for (int i = 0; i < 3 * 3 * (MOE_ON_HOST ? 2 : 6); ++i) {
        const int most = i / 9 % 2 ? 16 * 1100 + 3 : 16 * 70 - 5;
        int size[3] = {20, 24, 17};
        tproduct_want w;
        size[i / 3 % 3] = most;
        w = tproduct_normal(ops[i % 3], size[0], size[1], size[2]);
        tproduct_randomise(&w, &r);
        w.block_rows = w.block_columns = 16;
        w.form = w.packed ? TFORM_LIST : (i + i / 9) % 3;
        w.percent = 30;
        tproduct_run(&w, &r);
    }
}

/* No block, all, one, the last one, which is ragged, and the diagonal ones. */
static void test_block_patterns(void)
{
    trand r = trand_new(4);
    for (int pattern = TPATTERN_EMPTY; pattern <= TPATTERN_DIAGONAL; ++pattern)
        for (int i = 0; i < 9 * (MOE_ON_HOST ? 1 : 8); ++i) {
            tproduct_want w = tproduct_normal(ops[i % 3], 131, 75, 118);
            tproduct_randomise(&w, &r);
            w.pattern = pattern;
            w.form = i / 3 % 3;
            w.packed = w.packed && w.form == TFORM_LIST;
            if (pattern == TPATTERN_LAST && i % 2) w.block_rows = w.block_columns = 128;
            tproduct_run(&w, &r);
        }
}

/* Dense matrices in pieces, some of C's null. most 2: also pieces of columns whose rows lie as
   close together as they fit, as those of matrices that share nothing but a table. */
static void run_tables(trand* r, int most)
{
    for (int i = 0; i < 3 * 4 * (MOE_ON_HOST ? 4 : 16); ++i) {
        tproduct_want w = tproduct_normal(ops[i % 3], draw_size(r), draw_size(r), draw_size(r));
        tproduct_randomise(&w, r);
        w.a_transposed = i / 3 % 2;
        w.b_transposed = i / 6 % 2;
        w.none = i / 12 % 2 ? 30 : 0;
        w.percent /= 2; /* pieces that no block wants */
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

/* Infinities and NaN of the dense operand reach only what the mask leads them to: a block that is
   masked out is not multiplied as zeros. Blocks small enough to share a tile. */
static void test_block_odd_numbers(void)
{
    trand r = trand_new(6);
    for (int i = 0; i < 3 * 5 * (MOE_ON_HOST ? 2 : 12); ++i) {
        tproduct_want w = tproduct_normal(ops[i % 3], 133, 140, 137);
        tproduct_randomise(&w, &r);
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

/* No rows, columns or depth: without depth C is zeros where it is there. */
static void test_block_nothing(void)
{
    trand r = trand_new(7);
    for (int i = 0; i < 3 * 7 * 3; ++i) {
        const int zero = 1 + i / 3 % 7; /* which of m, n, k are 0 */
        tproduct_want w =
            tproduct_normal(ops[i % 3], zero & 1 ? 0 : 45, zero & 2 ? 0 : 40, zero & 4 ? 0 : 35);
        tproduct_randomise(&w, &r);
        w.form = i / 21;
        w.packed = w.packed && w.form == TFORM_LIST;
        tproduct_run(&w, &r);
    }
}

/* ------------------------------------------------------------------ tiles */

/* C of the product as dense rows. */
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

/* Under a full mask all three operations are the dense product: on every tile the same bits,
   whatever the blocks, the mask's form and the storage. */
static void test_block_full_is_dense(void)
{
    trand r = trand_new(8);
    for (int i = 0; i < (MOE_ON_HOST ? 4 : 24); ++i) {
        const int m = i ? draw_size(&r) : 150, n = i ? draw_size(&r) : 136,
                  k = i ? draw_size(&r) : 200;
        tproduct first; /* whose numbers all others have */
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

/* With blocks missing too all tiles and forms give the same bits. */
static void test_block_tiles_agree(void)
{
    trand r = trand_new(9);
    for (int i = 0; i < 3 * 4 * (MOE_ON_HOST ? 1 : 8); ++i) {
        tproduct_want w = tproduct_normal(ops[i % 3], 130, 140, 135);
        tproduct p;
        char* want = 0;
        tproduct_randomise(&w, &r);
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
                p.w.rest = form == tile % 3 ? MOE_BLOCK_SPARSE_TILE_32x256 : 0;
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

/* ------------------------------------------------------------------ gradients */

/* One term of the forward product, element (i, j) += A(i, l) B(l, j), is there if the sparse matrix
   is there; so it gives dA(i, l) += G(i, j) B(l, j) and dB(l, j) += A(i, l) G(i, j), G the gradient
   of C. That, term by term, in double: a and b as they lie, sums of absolute values beside them. */
typedef struct gradients {
    double *a, *a_sum, *b, *b_sum;
} gradients;

static double number_of(const tmatrix* t, int i, int j, int transposed)
{
    int part;
    const int64_t at = transposed ? tmatrix_at(t, j, i, &part) : tmatrix_at(t, i, j, &part);
    return at < 0 ? 0 : moe_load(t->host[part], at, t->dtype);
}

static double* zeros(int64_t n)
{
    double* p = (double*)test_host(n * 8);
    for (int64_t i = 0; i < n; ++i) p[i] = 0;
    return p;
}

static gradients gradients_new(const tproduct* f, const tmatrix* g)
{
    const tproduct_want* w = &f->w;
    const tmask* t = &f->mask;
    gradients d = {zeros(w->m * w->k), zeros(w->m * w->k), zeros(w->k * w->n), zeros(w->k * w->n)};
    for (int i = 0; i < w->m; ++i)
        for (int l = 0; l < w->k; ++l)
            for (int j = 0; j < w->n; ++j) {
                const int y = w->op == MOE_BLOCK_SPARSE_SDD   ? i
                              : w->op == MOE_BLOCK_SPARSE_DSD ? (w->a_transposed ? l : i)
                                                              : (w->b_transposed ? j : l);
                const int x = w->op == MOE_BLOCK_SPARSE_SDD   ? j
                              : w->op == MOE_BLOCK_SPARSE_DSD ? (w->a_transposed ? i : l)
                                                              : (w->b_transposed ? l : j);
                const int at_a = w->a_transposed ? l * w->m + i : i * w->k + l;
                const int at_b = w->b_transposed ? j * w->k + l : l * w->n + j;
                double a, b, c;
                if (!t->there[y / t->block_rows * t->CB + x / t->block_columns]) continue;
                a = number_of(&f->a, i, l, w->a_transposed);
                b = number_of(&f->b, l, j, w->b_transposed);
                c = number_of(g, i, j, 0);
                d.a[at_a] += c * b;
                d.a_sum[at_a] += fabs(c * b);
                d.b[at_b] += a * c;
                d.b_sum[at_b] += fabs(a * c);
            }
    return d;
}

/* C = X Y with these operands, all of them borrowed, against exact and sum; C has the sizes and the
   place of `like`, whose gradient it is. */
static void gradient_call(const tproduct* f, const tmatrix* like, int op, int m, int n, int k,
                          const tmatrix* x, int x_transposed, const tmatrix* y, int y_transposed,
                          double* exact, double* sum)
{
    tproduct p = *f;
    tmatrix_want want;
    memset(&want, 0, sizeof want);
    want.name = "gradient";
    want.rows = like->rows;
    want.columns = like->columns;
    want.dtype = f->w.c_dtype;
    want.mask = like->mask;
    want.packed = like->mask && f->w.packed;
    want.pad = f->w.c_pad;
    p.w.op = op;
    p.w.m = m;
    p.w.n = n;
    p.w.k = k;
    p.w.a_transposed = x_transposed;
    p.w.b_transposed = y_transposed;
    p.w.zero_masked = 0;
    p.a = *x;
    p.b = *y;
    tmatrix_new(&p.c, &want);
    p.fault = tfault_new(0);
    tproduct_describe(&p);
    if (tproduct_launch(&p)) tproduct_compare_to(&p, exact, sum);
    tmatrix_free(&p.c);
    tbuf_free(&p.fault);
    tbuf_free(&p.workspace);
}

/* dA and dB, each as it lies, from G = dC [m, n]. A^ is A as its flag says, so A^ = A^T^T.

     C = A B       sdd: G has C's mask           dsd: A has the mask         dds: B has the mask
     dA [m, k]     dsd  G  * B^T                 sdd  G * B^T                dds  G * B^T
     dA^T [k, m]   dds  B  * G^T                 sdd  B * G^T                dsd  B * G^T
     dB [k, n]     dds  A^T * G                  dsd  A^T * G                sdd  A^T * G
     dB^T [n, k]   dsd  G^T * A                  dds  G^T * A                sdd  G^T * A

   the second and the fourth for an operand that lies transposed. The mask is the same each time:
   that of the sparse matrix as it lies. */
static void test_block_gradients(void)
{
    trand r = trand_new(10);
    for (int i = 0; i < 3 * 4 * (MOE_ON_HOST ? 2 : 8); ++i) {
        const int op = ops[i % 3];
        tproduct_want w = tproduct_normal(op, (int)trand_int(&r, 20, 100),
                                          (int)trand_int(&r, 20, 100), (int)trand_int(&r, 20, 100));
        const int m = w.m, n = w.n, k = w.k;
        tproduct f;
        tmatrix g;
        tmatrix_want want;
        gradients d;
        tproduct_randomise(&w, &r);
        w.a_transposed = i / 3 % 2;
        w.b_transposed = i / 6 % 2;
        w.block_rows = 16 << trand_int(&r, 0, 2);
        w.block_columns = 16 << trand_int(&r, 0, 2);
        w.by_column = 1;
        w.zero_masked = 0;
        tproduct_new(&f, &w, &r);
        tmatrix_fill(&f.a, TDRAW_NORMAL, 1,
                     &r); /* all of it: dA of sdd needs no mask, but dB does */
        tmatrix_fill(&f.b, TDRAW_NORMAL, 1, &r);
        f.w.draw = TDRAW_NORMAL;
        memset(&want, 0, sizeof want);
        want.name = "g";
        want.rows = m;
        want.columns = n;
        want.dtype = w.dtype;
        want.pad = 8;
        want.mask = op == MOE_BLOCK_SPARSE_SDD ? &f.mask : (const tmask*)0;
        want.packed = op == MOE_BLOCK_SPARSE_SDD && w.packed;
        tmatrix_new(&g, &want);
        tmatrix_fill(&g, TDRAW_NORMAL, 1, &r);
        d = gradients_new(&f, &g);
        if (w.a_transposed)
            gradient_call(&f, &f.a,
                          op == MOE_BLOCK_SPARSE_SDD   ? MOE_BLOCK_SPARSE_DDS
                          : op == MOE_BLOCK_SPARSE_DSD ? MOE_BLOCK_SPARSE_SDD
                                                       : MOE_BLOCK_SPARSE_DSD,
                          k, m, n, &f.b, w.b_transposed, &g, 1, d.a, d.a_sum);
        else
            gradient_call(&f, &f.a,
                          op == MOE_BLOCK_SPARSE_SDD   ? MOE_BLOCK_SPARSE_DSD
                          : op == MOE_BLOCK_SPARSE_DSD ? MOE_BLOCK_SPARSE_SDD
                                                       : MOE_BLOCK_SPARSE_DDS,
                          m, k, n, &g, 0, &f.b, !w.b_transposed, d.a, d.a_sum);
        if (w.b_transposed)
            gradient_call(&f, &f.b,
                          op == MOE_BLOCK_SPARSE_SDD   ? MOE_BLOCK_SPARSE_DSD
                          : op == MOE_BLOCK_SPARSE_DSD ? MOE_BLOCK_SPARSE_DDS
                                                       : MOE_BLOCK_SPARSE_SDD,
                          n, k, m, &g, 1, &f.a, w.a_transposed, d.b, d.b_sum);
        else
            gradient_call(&f, &f.b,
                          op == MOE_BLOCK_SPARSE_SDD   ? MOE_BLOCK_SPARSE_DDS
                          : op == MOE_BLOCK_SPARSE_DSD ? MOE_BLOCK_SPARSE_DSD
                                                       : MOE_BLOCK_SPARSE_SDD,
                          k, n, m, &f.a, !w.a_transposed, &g, 0, d.b, d.b_sum);
        free(d.a);
        free(d.a_sum);
        free(d.b);
        free(d.b_sum);
        tmatrix_free(&g);
        tproduct_free(&f);
    }
}

/* ------------------------------------------------------------------ many times, and large */

static moe_status call_product(void* d, cudaStream_t stream)
{
    return moe_block_sparse((const moe_block_sparse_desc*)d, stream);
}

static void test_block_same_bits(void)
{
    trand r = trand_new(11);
    for (int i = 0; i < (MOE_ON_HOST ? 3 : 24); ++i) {
        tproduct_want w = tproduct_normal(ops[i % 3], 90, 100, 110);
        tproduct p;
        tbuf* out[1];
        tproduct_randomise(&w, &r);
        if (!MOE_ON_HOST) w.m = w.n = w.k = 600;
        w.percent = 50;
        tproduct_new(&p, &w, &r);
        if (tproduct_launch(&p)) {
            out[0] = &p.c.part[0];
            test_same_bits("product", call_product, &p.d, out, 1, MOE_ON_HOST ? 20 : 100);
            tproduct_compare(&p);
        }
        tproduct_free(&p);
    }
}

/* A captured product, launched again with other masks and other numbers. */
static void test_block_graph(void)
{
    trand r = trand_new(12);
    for (int i = 0; i < 9; ++i) {
        const int size = i / 3 == 1 ? 150 : 75; /* strips alike in one run, and not in the next */
        tproduct_want w = tproduct_normal(ops[i % 3], size, size - 3, size - 5);
        tproduct p;
        tgraph g;
        tproduct_randomise(&w, &r);
        w.form = i / 3;
        w.packed = 0;
        w.room = -1;
        w.tile = i / 3 == 1 ? MOE_BLOCK_SPARSE_TILE_64x256 : MOE_BLOCK_SPARSE_TILE_AUTO;
        w.rest = MOE_BLOCK_SPARSE_TILE_32x256;
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
                for (int s = 0; s < 2; ++s) { /* what is masked out now may have been there */
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

/* What the tuning call returns runs and is right; it leaves the inputs alone. */
static void test_block_tune(void)
{
    trand r = trand_new(13);
    for (int i = 0; i < (MOE_ON_HOST ? 3 : 12); ++i) {
        tproduct_want w = tproduct_normal(ops[i % 3], 130, 120, 110);
        tproduct p;
        tproduct_randomise(&w, &r);
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
                  "tile %d, rest %d", choice.tile, choice.fallback_tile);
            tmatrix_poison(&p.c);
            p.d.choice = choice;
            if (CHECK_STATUS(moe_block_sparse(&p.d, test_now.stream), MOE_OK)) tproduct_compare(&p);
        }
        tproduct_free(&p);
    }
}

/* Sizes at which tiles are many, on every tile and on the one that the header chooses. */
static void test_block_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(14);
    for (int tile = MOE_BLOCK_SPARSE_TILE_AUTO; tile <= MOE_BLOCK_SPARSE_TILE_64x64; ++tile)
        for (int i = 0; i < 6; ++i) {
            tproduct_want w = tproduct_normal(ops[i % 3], 700, 801, 650);
            tproduct_randomise(&w, &r);
            w.tile = tile;
            w.percent = 20;
            if (i % 2) w.pattern = TPATTERN_DIAGONAL; /* strips alike, and others between them */
            w.draw = TDRAW_NORMAL;
            tproduct_run(&w, &r);
        }
#endif
}

/* Rows of A, of B, of C that lie past 2^32 elements: the bits of the same call on near ones. */
static void test_block_past_2_31(void)
{
    trand r = trand_new(15);
    if (!twide_possible(2)) return;
    for (int i = 0; i < 18; ++i) {
        const int far = i / 3 % 3; /* which of A, B, C */
        const int rows =
            i < 9 ? 2 : 37; /* two: a stride of 2^32; more: lines of a copy far apart */
        tproduct_want w =
            tproduct_normal(ops[i % 3], far == 0 ? rows : 40, 48, far == 1 ? rows : 56);
        tproduct p;
        tmatrix* t;
        twide wide;
        w.block_rows = w.block_columns = 16;
        w.by_column = 1;
        tproduct_new(&p, &w, &r);
        t = far == 0 ? &p.a : far == 1 ? &p.b : &p.c;
        if (tproduct_launch(&p) &&
            twide_new(&wide, "the far rows", t->rows, t->columns, t->dtype)) {
            char* dense = (char*)tbuf_copy(&t->part[0]); /* whose rows lie close together */
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
/* Row y of a packed matrix of side * side blocks, from the device. */
static void packed_row(uint16_t* row, const char* packed, int64_t y, int side, int block)
{
    const int64_t at = (y / block * side * block + y % block) * block;
    TEST_CUDA(cudaMemcpy2D(row, (size_t)block * 2, packed + at * 2, (size_t)block * block * 2,
                           (size_t)block * 2, (size_t)side, cudaMemcpyDeviceToHost));
}

/* The packed matrix S [n, n] of more than 2^32 elements as A of dsd and, transposed, as B of dds: d
   is the sdd that made it, and has the mask. Rows here and there, the first and the last among
   them. */
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
        CHECK_STATUS(moe_block_sparse_workspace(&d, &d.workspace_bytes), MOE_OK);
        workspace = tbuf_new("workspace", d.workspace_bytes, 0);
        d.workspace = d.workspace_bytes ? workspace.p : (void*)0;
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

/* A C of more than 2^31 elements, packed and strided: blocks here and there, the first and the last
   among them. The packed one, 4.4e9 elements, is then an operand. */
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
            CHECK_STATUS(moe_block_sparse_workspace(&d, &d.workspace_bytes), MOE_OK);
            workspace = tbuf_new("workspace", d.workspace_bytes, 0);
            d.workspace = d.workspace_bytes ? workspace.p : (void*)0;
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
        tbuf_free(&d_a);
        tbuf_free(&d_b);
        tbuf_free(&d_rows);
        tbuf_free(&d_columns);
        tbuf_free(&fault);
    }
    free(rows);
    free(columns);
    free(a);
    free(b);
#endif
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_block_forms);
    RUN(test_block_sizes);
    RUN(test_block_edges);
    RUN(test_block_many);
    RUN(test_block_patterns);
    RUN(test_block_tables);
    RUN(test_block_narrow_tables);
    RUN(test_block_odd_numbers);
    RUN(test_block_nothing);
    RUN(test_block_full_is_dense);
    RUN(test_block_tiles_agree);
    RUN(test_block_gradients);
    RUN(test_block_same_bits);
    RUN(test_block_graph);
    RUN(test_block_tune);
    RUN(test_block_large);
    RUN(test_block_past_2_31);
    RUN(test_block_many_past_2_31);
    return test_end();
}
