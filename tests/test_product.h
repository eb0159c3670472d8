/* test_product.h: block-sparse products: drawing a case, its operands, the call, and the comparison
   with the reference. Included after test.h. */
#ifndef MOE_TESTS_TEST_PRODUCT_H
#define MOE_TESTS_TEST_PRODUCT_H

#include "moe/block_sparse.cuh"
#include "test_blocks.h"

typedef struct tproduct_want {
    int op, m, n, k, a_transposed, b_transposed;
    int block_rows, block_columns, pattern, percent, room;
    int form, packed, zero_masked;
    int by_column;                 /* 1: a list has its column order where it is not read too */
    int a_pad, b_pad, c_pad;       /* stride - least; multiples of 8 */
    int a_table, b_table, c_table; /* 1: in parts; 2: in narrow ones */
    int none;                      /* percent of C's parts that are null */
    int dtype, c_dtype, draw, tile, fallback;
    int odd; /* 1: infinities and NaN among the dense operand's numbers */
} tproduct_want;

typedef struct tproduct {
    tproduct_want w;
    tmask mask;
    tmatrix a, b, c;
    tbuf fault, workspace;
    moe_block_sparse_desc d;
} tproduct;

MOEI_UNUSED static const char* tproduct_text(const tproduct_want* w)
{
    static const char* const op[] = {"?", "sdd", "dsd", "dds"};
    static const char* const form[] = {"bytes", "bits", "list"};
    static char text[400];
    snprintf(text, sizeof text,
             "%s m=%d n=%d k=%d%s%s %s -> %s blocks %dx%d pattern=%d %d%% %s%s%s pads %d %d %d "
             "tables %d %d %d draw=%d odd=%d tile=%d fallback=%d",
             op[w->op], w->m, w->n, w->k, w->a_transposed ? " A^T" : "",
             w->b_transposed ? " B^T" : "", moe_dtype_name(w->dtype), moe_dtype_name(w->c_dtype),
             w->block_rows, w->block_columns, w->pattern, w->percent, form[w->form],
             w->packed ? " packed" : "", w->zero_masked ? " zero" : "", w->a_pad, w->b_pad,
             w->c_pad, w->a_table, w->b_table, w->c_table, w->draw, w->odd, w->tile, w->fallback);
    return text;
}

/* Returns 1 where the operation reads the mask column after column. */
MOEI_UNUSED static int tproduct_by_column(const tproduct_want* w)
{
    return (w->op == MOE_BLOCK_SPARSE_DSD && w->a_transposed) ||
           (w->op == MOE_BLOCK_SPARSE_DDS && !w->b_transposed);
}

MOEI_UNUSED static int64_t tproduct_stride(const tmatrix* t)
{
    return !t->part_size && t->stride == t->columns && t->rows % 2 ? 0 : t->stride; /* 0 is dense */
}

/* Makes the workspace that the call asks for, and points the descriptor to it. */
MOEI_UNUSED static tbuf tproduct_workspace(moe_block_sparse_desc* d, size_t misalign)
{
    tbuf workspace;
    CHECK_STATUS(moe_block_sparse_workspace(d, &d->workspace_bytes), MOE_OK);
    workspace = tbuf_new("workspace", d->workspace_bytes, misalign);
    d->workspace = d->workspace_bytes ? workspace.p : (void*)0;
    return workspace;
}

/* Points the descriptor to mask and matrices, and makes room for what the call asks for. */
MOEI_UNUSED static void tproduct_describe(tproduct* p)
{
    const tproduct_want* w = &p->w;
    moe_block_sparse_desc* d = &p->d;
    memset(d, 0, sizeof *d);
    d->mask = tmask_view(&p->mask, w->form, w->by_column || tproduct_by_column(w),
                         w->by_column || w->packed);
    if (p->a.part_size) d->a_table = (const void* const*)p->a.table.p;
    else d->a = p->a.part[0].p;
    if (p->b.part_size) d->b_table = (const void* const*)p->b.table.p;
    else d->b = p->b.part[0].p;
    if (p->c.part_size) d->c_table = (void* const*)p->c.table.p;
    else d->c = p->c.part[0].p;
    d->a_stride = tproduct_stride(&p->a);
    d->b_stride = tproduct_stride(&p->b);
    d->c_stride = tproduct_stride(&p->c);
    d->fault = (uint64_t*)p->fault.p;
    d->rank = TEST_RANK;
    d->op = w->op;
    d->m = w->m, d->n = w->n, d->k = w->k;
    d->a_transposed = w->a_transposed, d->b_transposed = w->b_transposed;
    d->packed = w->packed, d->zero_masked = w->zero_masked;
    d->dtype = w->dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : w->dtype;
    d->c_dtype = w->c_dtype == w->dtype ? MOE_DTYPE_DEFAULT : w->c_dtype;
    d->choice.tile = w->tile;
    d->choice.fallback_tile = w->tile ? w->fallback : 0;
    p->workspace = tproduct_workspace(d, 16);
}

/* Parts behind a table; table: as in tproduct_want. */
MOEI_UNUSED static void tproduct_table(tmatrix_want* want, int table, int part_size, int by_column,
                                       const uint8_t* present)
{
    want->by_column = by_column;
    want->narrow = table == 2;
    if (!table) return;
    want->part_size = part_size;
    want->present = present;
}

/* Makes mask, matrices and numbers. Parts of the dense operands that no sparse block reads hold
   NaN, or are null. */
MOEI_UNUSED static void tproduct_new(tproduct* p, const tproduct_want* w, trand* r)
{
    const int sdd = w->op == MOE_BLOCK_SPARSE_SDD, dsd = w->op == MOE_BLOCK_SPARSE_DSD,
              dds = w->op == MOE_BLOCK_SPARSE_DDS;
    const int a_rows = w->a_transposed ? w->k : w->m, a_columns = w->a_transposed ? w->m : w->k;
    const int b_rows = w->b_transposed ? w->n : w->k, b_columns = w->b_transposed ? w->k : w->n;
    /* whether what the dense matrix shares with the sparse one runs along the mask's columns */
    const int a_side = dds && w->b_transposed, b_side = sdd || (dsd && !w->a_transposed);
    const int c_side = dsd ? w->a_transposed : !w->b_transposed;
    const int size[2] = {w->block_rows, w->block_columns};
    const float scale = (float)(1 / sqrt(sqrt((double)(w->k > 0 ? w->k : 1))));
    uint8_t present[3][TMATRIX_MOST];
    tmatrix_want want;
    memset(p, 0, sizeof *p);
    p->w = *w;
    tmask_new(&p->mask,
              sdd   ? w->m
              : dsd ? a_rows
                    : b_rows,
              sdd   ? w->n
              : dsd ? a_columns
                    : b_columns,
              w->block_rows, w->block_columns, w->pattern, w->percent, w->room, r);
    for (int i = 0; i < TMATRIX_MOST; ++i) {
        const int null = (int)trand_int(r, 0, 1);
        present[0][i] =
            !null || (i < (a_side ? p->mask.CB : p->mask.RB) && tmask_any(&p->mask, i, a_side));
        present[1][i] =
            !null || (i < (b_side ? p->mask.CB : p->mask.RB) && tmask_any(&p->mask, i, b_side));
        present[2][i] = trand_int(r, 0, 99) >= w->none;
    }
    want = tmatrix_dense("a", a_rows, a_columns, w->dtype, w->a_pad);
    tmatrix_sparse(&want, dsd ? &p->mask : (const tmask*)0, w->packed);
    tproduct_table(&want, w->a_table, size[a_side], sdd ? w->a_transposed : !w->a_transposed,
                   present[0]);
    tmatrix_new(&p->a, &want);
    want = tmatrix_dense("b", b_rows, b_columns, w->dtype, w->b_pad);
    tmatrix_sparse(&want, dds ? &p->mask : (const tmask*)0, w->packed);
    tproduct_table(&want, w->b_table, size[b_side], sdd ? !w->b_transposed : w->b_transposed,
                   present[1]);
    tmatrix_new(&p->b, &want);
    want = tmatrix_dense("c", w->m, w->n, w->c_dtype, w->c_pad);
    tmatrix_sparse(&want, sdd ? &p->mask : (const tmask*)0, w->packed);
    tproduct_table(&want, w->c_table, size[c_side], dds, present[2]);
    tmatrix_new(&p->c, &want);

    tmatrix_fill(&p->a, w->draw, scale, r);
    tmatrix_fill(&p->b, w->draw, scale, r);
    for (int i = 0; i < p->mask.RB; ++i)
        if (!tmask_any(&p->mask, i, 0)) {
            if (!dsd && !a_side)
                tmatrix_set(&p->a, sdd ? w->a_transposed : !w->a_transposed, i * size[0],
                            (i + 1) * size[0], NAN);
            if (dsd && !b_side)
                tmatrix_set(&p->b, w->b_transposed, i * size[0], (i + 1) * size[0], NAN);
        }
    for (int i = 0; i < p->mask.CB; ++i)
        if (!tmask_any(&p->mask, i, 1)) {
            if (!dds && b_side)
                tmatrix_set(&p->b, sdd ? !w->b_transposed : w->b_transposed, i * size[1],
                            (i + 1) * size[1], NAN);
            if (dds && a_side)
                tmatrix_set(&p->a, !w->a_transposed, i * size[1], (i + 1) * size[1], NAN);
        }
    for (int i = 0; i < 6 && w->odd; ++i) { /* they may reach only what the mask leads them to */
        tmatrix* t = dsd ? &p->b : &p->a;
        int part;
        const int64_t at = tmatrix_at(t, (int)trand_int(r, 0, t->rows - 1),
                                      (int)trand_int(r, 0, t->columns - 1), &part);
        if (at >= 0)
            moe_store(t->host[part], at, t->dtype, i % 3 ? i & 1 ? INFINITY : -INFINITY : NAN);
    }
    tmatrix_put(&p->a);
    tmatrix_put(&p->b);
    p->fault = tfault_new(0);
    tproduct_describe(p);
}

MOEI_UNUSED static void tproduct_free(tproduct* p)
{
    tmatrix_free(&p->a);
    tmatrix_free(&p->b);
    tmatrix_free(&p->c);
    tmask_free(&p->mask);
    tbuf_free(&p->fault);
    tbuf_free(&p->workspace);
}

/* Returns 1 where the inputs are what they were. */
MOEI_UNUSED static int tproduct_inputs_same(const tproduct* p)
{
    const tmask* t = &p->mask;
    return tmatrix_same(&p->a, 0) && tmatrix_same(&p->b, 0) &&
           tbuf_holds(&t->d_row_offset, t->row_offset) &&
           tbuf_holds(&t->d_column_index, t->column_index) &&
           tbuf_holds(&t->d_column_offset, t->column_offset) &&
           tbuf_holds(&t->d_row_index, t->row_index) && tbuf_holds(&t->d_position, t->position);
}

/* The exact product [m, n] and sum |a b|, by the reference. */
MOEI_UNUSED static void tproduct_exact(const tproduct* p, double* exact, double* sum)
{
    const tproduct_want* w = &p->w;
    moe_ref_block_sparse_desc r;
    memset(&r, 0, sizeof r);
    if (p->a.part_size) r.a_table = (const void* const*)p->a.host;
    else r.a = p->a.host[0];
    if (p->b.part_size) r.b_table = (const void* const*)p->b.host;
    else r.b = p->b.host[0];
    r.mask = p->mask.present;
    r.op = w->op;
    r.m = w->m, r.n = w->n, r.k = w->k;
    r.block_rows = w->block_rows, r.block_columns = w->block_columns;
    r.a_stride = p->a.stride, r.b_stride = p->b.stride;
    r.a_transposed = w->a_transposed, r.b_transposed = w->b_transposed;
    r.packed = w->packed;
    r.a_dtype = r.b_dtype = w->dtype;
    moe_ref_block_sparse_f64(&r, exact, sum);
}

/* Checks the L2 norm of the difference: what rounding alone makes of it, and what fp32 sums add. */
MOEI_UNUSED static void tproduct_norm(const float* got, const double* exact, const double* bound,
                                      int c_dtype, int64_t n)
{
    double error = 0, ideal = 0, sums = 0, size = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double e = got[i] - exact[i];
        const double rounding =
            c_dtype == MOE_FP32 ? 0 : test_rounded(exact[i], c_dtype) - exact[i];
        error += e * e;
        ideal += rounding * rounding;
        sums += bound[i] * bound[i];
        size += exact[i] * exact[i];
    }
    CHECK(sqrt(error) <= 1.1 * sqrt(ideal) + (n > 256 ? 0.5 : 1) * sqrt(sums),
          "L2 norm of the difference %.3g, of rounding %.3g, of the fp32 sums' bounds %.3g, of C "
          "%.3g",
          sqrt(error), sqrt(ideal), sqrt(sums), sqrt(size));
}

/* Compares all that C's buffers hold with these numbers [m, n]: the product where C has elements,
   zeros where they were asked for, else the poison. Overwrites exact and sum. */
MOEI_UNUSED static void tproduct_compare_to(const tproduct* p, double* exact, double* sum)
{
    const tproduct_want* w = &p->w;
    const tmatrix* t = &p->c;
    const int before = test_now.failures, elem = moe_dtype_bytes(w->c_dtype);
    const int64_t n = (int64_t)w->m * w->n;
    int64_t wrong = 0, strays = 0, nonzero = 0, count = 0, odd = 0, special = 0, not_zero = 0;
    float* got = (float*)test_host(n * 4);
    char* all[TMATRIX_MOST];
    for (int s = 0; s < t->parts; ++s)
        all[s] = t->host[s] ? (char*)tbuf_copy(&t->part[s]) : (char*)0;
    for (int64_t x = 0; x < n; ++x) {
        const int i = (int)(x / w->n), j = (int)(x % w->n);
        int part;
        int64_t at = tmatrix_at(t, i, j, &part);
        got[x] = 0;
        if (at < 0) exact[x] = sum[x] = 0;
        if (at < 0 && w->op == MOE_BLOCK_SPARSE_SDD &&
            w->zero_masked) { /* zeros, and no minus sign */
            at = i * t->stride + j;
            for (int b = 0; b < elem; ++b) not_zero += all[part][at * elem + b] != 0;
            test_poison(all[part] + at * elem, (size_t)elem);
        } else if (at >= 0) {
            got[x] = moe_load(all[part], at, w->c_dtype);
            test_poison(all[part] + at * elem, (size_t)elem);
            ++count;
            nonzero += exact[x] != 0;
            if (!isfinite(exact[x])) {
                ++special;
                odd += isnan(exact[x]) ? !isnan(got[x]) : !(got[x] == exact[x]);
                got[x] = 0;
                exact[x] = sum[x] = 0;
            }
            if (sum[x] == 0) wrong += got[x] != 0;
        }
    }
    for (int s = 0; s < t->parts; ++s) {
        if (all[s])
            strays += test_strays(all[s], (int64_t)t->part[s].bytes, 1, (int64_t)t->part[s].bytes,
                                  0, 0, 0);
        free(all[s]);
    }
    CHECK(strays == 0, "%lld bytes outside C were written", (long long)strays);
    CHECK(not_zero == 0, "%lld bytes of masked-out blocks are not zero", (long long)not_zero);
    CHECK(wrong == 0, "%lld elements without a product are not zero", (long long)wrong);
    CHECK(odd == 0, "%lld elements are not the infinity or NaN that they must be", (long long)odd);
    if (w->draw != TDRAW_NORMAL) { /* exact sums, rounded once */
        for (int64_t i = 0; i < n; ++i) wrong += !(got[i] == test_rounded(exact[i], w->c_dtype));
        CHECK(wrong == 0, "%lld of %lld are not the exact sum", (long long)wrong, (long long)count);
        CHECK(count < 256 || 2 * special <= count, "mostly infinities and NaN: that shows nothing");
    } else if (nonzero > 0) {
        double* bound = (double*)test_host(n * 8);
        double* ideal = (double*)test_host(n * 8);
        for (int64_t i = 0; i < n; ++i) {
            bound[i] = (w->k / 16.0 + 2) * ldexp(1, -23) * sum[i];
            ideal[i] = test_rounded(exact[i], w->c_dtype);
        }
        tproduct_norm(got, exact, bound, w->c_dtype, n);
        if (w->c_dtype != MOE_FP32 && nonzero >= 64) /* fewer may all be about zero */
            CHECK_CLOSE("c", got, MOE_FP32, w->n, exact, ideal, w->m, w->n);
        for (int64_t i = 0; i < n && w->c_dtype != MOE_FP32; ++i) /* each element by itself */
            bound[i] = bound[i] +
                       ldexp(fabs(exact[i]) + bound[i], w->c_dtype == MOE_BF16 ? -8 : -11) +
                       ldexp(1, -25);
        test_within("c", got, MOE_FP32, w->n, exact, bound, 1, w->m, w->n, __FILE__, __LINE__);
        free(bound);
        free(ideal);
    }
    CHECK_FAULT(&p->fault, MOE_FAULT_NONE, 0);
    CHECK(tproduct_inputs_same(p), "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", tproduct_text(w));
    free(got);
}

MOEI_UNUSED static void tproduct_compare(const tproduct* p)
{
    double* exact = (double*)test_host((int64_t)p->w.m * p->w.n * 8);
    double* sum = (double*)test_host((int64_t)p->w.m * p->w.n * 8);
    tproduct_exact(p, exact, sum);
    tproduct_compare_to(p, exact, sum);
    free(exact);
    free(sum);
}

/* Queues the product. Returns 0 where the device, or this binary's code for it, has no such tile or
   dtype: then C is untouched. fp16 runs everywhere, on the tile that the header chooses and on the
   smallest. */
MOEI_UNUSED static int tproduct_launch(const tproduct* p)
{
    const int everywhere =
        MOE_ON_HOST ||
        (p->w.dtype == MOE_FP16 &&
         (p->w.tile == 0 || (p->w.tile == MOE_BLOCK_SPARSE_TILE_64x64 && p->w.fallback == 0)));
    const moe_status s = moe_block_sparse(&p->d, test_now.stream);
    if (!everywhere && moe_status_kind(s) == MOE_ERR_DEVICE) {
        CHECK(tmatrix_same(&p->c, 1), "%s: refused, but C was written", tproduct_text(&p->w));
        return 0;
    }
    if (CHECK_STATUS(s, MOE_OK)) return 1;
    printf("  in: %s\n", tproduct_text(&p->w));
    return 0;
}

MOEI_UNUSED static void tproduct_run(const tproduct_want* w, trand* r)
{
    tproduct p;
    tproduct_new(&p, w, r);
    if (tproduct_launch(&p)) tproduct_compare(&p);
    tproduct_free(&p);
}

/* Returns bf16 where this binary has code for it, else fp16. */
MOEI_UNUSED static int tproduct_half(void)
{
    moe_device dev;
    int runs = 0;
    return moei_sparse_check_dtype(MOE_BF16) == MOE_OK && moe_device_query(&dev) == MOE_OK &&
                   moei_variant_runs(moei_sparse_variant(MOE_BLOCK_SPARSE_TILE_64x64, MOE_BF16),
                                     &dev, 0, &runs) == MOE_OK &&
                   runs
               ? MOE_BF16
               : MOE_FP16;
}

/* Sparse blocks of 32 x 32, half of them present; a mask of bytes; strided matrices in one part. */
MOEI_UNUSED static tproduct_want tproduct_normal(int op, int m, int n, int k)
{
    tproduct_want w;
    memset(&w, 0, sizeof w);
    w.op = op;
    w.m = m, w.n = n, w.k = k;
    w.block_rows = w.block_columns = 32;
    w.percent = 50;
    w.dtype = w.c_dtype = tproduct_half();
    return w;
}

/* Draws all but the sizes. */
MOEI_UNUSED static void tproduct_randomise(tproduct_want* w, trand* r)
{
    w->dtype = trand_int(r, 0, 1) ? MOE_FP16 : MOE_BF16;
    w->c_dtype = trand_int(r, 0, 1) ? MOE_FP32 : w->dtype;
    w->a_transposed = (int)trand_int(r, 0, 1);
    w->b_transposed = (int)trand_int(r, 0, 1);
    w->block_rows = 16 << trand_int(r, 0, 3);
    w->block_columns = 16 << trand_int(r, 0, 3);
    w->percent = (int)trand_int(r, 10, 90);
    w->room = trand_int(r, 0, 2) ? 0 : trand_int(r, 0, 1) ? -1 : 3;
    w->form = (int)trand_int(r, TFORM_BYTES, TFORM_LIST);
    w->packed = w->form == TFORM_LIST && trand_int(r, 0, 2) > 0;
    w->by_column = (int)trand_int(r, 0, 1);
    w->zero_masked = w->op == MOE_BLOCK_SPARSE_SDD && !w->packed && trand_int(r, 0, 1);
    w->a_pad = 8 * (int)trand_int(r, 0, 2);
    w->b_pad = 8 * (int)trand_int(r, 0, 2);
    w->c_pad = 8 * (int)trand_int(r, 0, 2);
    w->draw = trand_int(r, 0, 3) ? TDRAW_NORMAL : TDRAW_INT;
    w->tile = (int)trand_int(r, MOE_BLOCK_SPARSE_TILE_AUTO, MOE_BLOCK_SPARSE_TILE_64x64);
    w->fallback = (int)trand_int(r, 0, MOE_BLOCK_SPARSE_TILE_64x64);
}

/* Returns the sizes with all else drawn. */
MOEI_UNUSED static tproduct_want tproduct_drawn(int op, int m, int n, int k, trand* r)
{
    tproduct_want w = tproduct_normal(op, m, n, k);
    tproduct_randomise(&w, r);
    return w;
}

/* Draws a size: below a sparse block, about one, and some of them; small ones more often. */
MOEI_UNUSED static int tproduct_size(trand* r)
{
    static const int sizes[] = {1,  7,  8,  15, 16,  17,  31,  33,  40, 63,
                                64, 65, 72, 96, 127, 128, 129, 136, 200};
    return sizes[trand_int(r, 0, (int)(sizeof sizes / sizeof *sizes) - 1)];
}

/* Returns the operation of case i: all three in turn. */
MOEI_UNUSED static int tproduct_op(int i) { return MOE_BLOCK_SPARSE_SDD + i % 3; }

/* Sets the transposes of case i: all four pairs in turn. */
MOEI_UNUSED static void tproduct_transposes(tproduct_want* w, int i)
{
    w->a_transposed = i % 2;
    w->b_transposed = i / 2 % 2;
}

/* Sets the mask's form. Only a list may be packed. */
MOEI_UNUSED static void tproduct_form(tproduct_want* w, int form)
{
    w->form = form;
    w->packed = w->packed && form == TFORM_LIST;
}

#endif
