/* gradients.h: gradients of a block-sparse product: block-sparse products with the same mask.

     test_block_gradients  dA and dB of all operations and transposes against sums of products */
#ifndef MOE_TESTS_BLOCK_SPARSE_GRADIENTS_H
#define MOE_TESTS_BLOCK_SPARSE_GRADIENTS_H

#include "tests/test.h"
#include "tests/test_product.h"

/* dA and dB, each as it lies, from G = dC [m, n]. A^ is A as its flag says, so A^ = A^T^T.

     C = A B       sdd: G has C's mask           dsd: A has the mask         dds: B has the mask
     dA [m, k]     dsd  G  * B^T                 sdd  G * B^T                dds  G * B^T
     dA^T [k, m]   dds  B  * G^T                 sdd  B * G^T                dsd  B * G^T
     dB [k, n]     dds  A^T * G                  dsd  A^T * G                sdd  A^T * G
     dB^T [n, k]   dsd  G^T * A                  dds  G^T * A                sdd  G^T * A

   The second and the fourth are of an operand that lies transposed. The mask is the same each time:
   that of the sparse matrix as it lies. */
enum { BY_A, BY_A_TRANSPOSED, BY_B, BY_B_TRANSPOSED };
static const int gradient_op[4][3] = {
    {MOE_BLOCK_SPARSE_DSD, MOE_BLOCK_SPARSE_SDD, MOE_BLOCK_SPARSE_DDS},
    {MOE_BLOCK_SPARSE_DDS, MOE_BLOCK_SPARSE_SDD, MOE_BLOCK_SPARSE_DSD},
    {MOE_BLOCK_SPARSE_DDS, MOE_BLOCK_SPARSE_DSD, MOE_BLOCK_SPARSE_SDD},
    {MOE_BLOCK_SPARSE_DSD, MOE_BLOCK_SPARSE_DDS, MOE_BLOCK_SPARSE_SDD}};

/* Gradients in double as the operands lie, and sums of absolute values. A present element of the
   sparse matrix adds A(i, l) B(l, j) to element (i, j) of the forward product. That gives
   dA(i, l) += G(i, j) B(l, j) and dB(l, j) += A(i, l) G(i, j). */
typedef struct gradients {
    double *a, *a_sum, *b, *b_sum;
} gradients;

static double number_of(const tmatrix* t, int i, int j, int transposed)
{
    int part;
    const int64_t at = transposed ? tmatrix_at(t, j, i, &part) : tmatrix_at(t, i, j, &part);
    return at < 0 ? 0 : moe_load(t->host[part], at, t->dtype);
}

static gradients gradients_new(const tproduct* f, const tmatrix* g)
{
    const tproduct_want* w = &f->w;
    const tmask* t = &f->mask;
    gradients d = {tzeros(w->m * w->k), tzeros(w->m * w->k), tzeros(w->k * w->n),
                   tzeros(w->k * w->n)};
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
                if (!t->present[y / t->block_rows * t->CB + x / t->block_columns]) continue;
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

/* Runs X Y with these operands, which stay the caller's, and compares it with exact and sum. The
   product is the gradient by f's operand `like`, and lies as that one does. */
static void gradient_call(const tproduct* f, const tmatrix* like, int gradient, int m, int n, int k,
                          const tmatrix* x, int x_transposed, const tmatrix* y, int y_transposed,
                          double* exact, double* sum)
{
    tproduct p = *f;
    tmatrix_want want =
        tmatrix_dense("gradient", like->rows, like->columns, f->w.c_dtype, f->w.c_pad);
    tmatrix_sparse(&want, like->mask, f->w.packed);
    p.w.op = gradient_op[gradient][f->w.op - MOE_BLOCK_SPARSE_SDD];
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

static void test_block_gradients(void)
{
    trand r = trand_new(10);
    for (int i = 0; i < 3 * 4 * (MOE_ON_HOST ? 2 : 8); ++i) {
        const int op = tproduct_op(i);
        tproduct_want w =
            tproduct_drawn(op, (int)trand_int(&r, 20, 100), (int)trand_int(&r, 20, 100),
                           (int)trand_int(&r, 20, 100), &r);
        const int m = w.m, n = w.n, k = w.k;
        tproduct f;
        tmatrix g;
        tmatrix_want want;
        gradients d;
        tproduct_transposes(&w, i / 3);
        w.block_rows = 16 << trand_int(&r, 0, 2);
        w.block_columns = 16 << trand_int(&r, 0, 2);
        w.by_column = 1;
        w.zero_masked = 0;
        tproduct_new(&f, &w, &r);
        tmatrix_fill(&f.a, TDRAW_NORMAL, 1, &r); /* overwrites the NaN that nothing reads */
        tmatrix_fill(&f.b, TDRAW_NORMAL, 1, &r);
        f.w.draw = TDRAW_NORMAL;
        want = tmatrix_dense("g", m, n, w.dtype, 8);
        tmatrix_sparse(&want, op == MOE_BLOCK_SPARSE_SDD ? &f.mask : (const tmask*)0, w.packed);
        tmatrix_new(&g, &want);
        tmatrix_fill(&g, TDRAW_NORMAL, 1, &r);
        d = gradients_new(&f, &g);
        if (w.a_transposed)
            gradient_call(&f, &f.a, BY_A_TRANSPOSED, k, m, n, &f.b, w.b_transposed, &g, 1, d.a,
                          d.a_sum);
        else gradient_call(&f, &f.a, BY_A, m, k, n, &g, 0, &f.b, !w.b_transposed, d.a, d.a_sum);
        if (w.b_transposed)
            gradient_call(&f, &f.b, BY_B_TRANSPOSED, n, k, m, &g, 1, &f.a, w.a_transposed, d.b,
                          d.b_sum);
        else gradient_call(&f, &f.b, BY_B, k, n, m, &f.a, !w.a_transposed, &g, 0, d.b, d.b_sum);
        free(d.a), free(d.a_sum), free(d.b), free(d.b_sum);
        tmatrix_free(&g);
        tproduct_free(&f);
    }
}

static void block_sparse_gradients(void) { RUN(test_block_gradients); }

#endif
