/* block_sparse.inl: the block-sparse product for one type of number; block_sparse.h includes it
   twice. */

/* Returns an operand [rows, columns], or its transpose, as dense numbers. Masked-out elements, and
   those of null table entries, are 0. The caller frees the result. */
MOE_HOST MOEI_REAL* MOEI_REF(moei_ref_block_dense)(const moei_ref_block_operand* o, int64_t rows,
                                                   int64_t columns, int transposed)
{
    MOEI_REAL* dense = (MOEI_REAL*)malloc((size_t)(rows * columns) * sizeof(MOEI_REAL) + 1);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            int64_t at;
            const void* p =
                transposed ? moei_ref_block_find(o, j, i, &at) : moei_ref_block_find(o, i, j, &at);
            dense[i * columns + j] = p ? MOEI_REF(moe_ref_load)(p, at, o->dtype) : 0;
        }
    return dense;
}

/* Writes c [m, n], dense. abs_sum [m, n], for error bounds, gets sum |a * b|, or is null. Both are
   0 in the masked-out sparse blocks of sdd. */
MOE_HOST void MOEI_REF(moe_ref_block_sparse)(const moe_ref_block_sparse_desc* d, MOEI_REAL* c,
                                             MOEI_REAL* abs_sum)
{
    const int64_t m = d->m, n = d->n, k = d->k, step = 16; /* divides all block sizes */
    moei_ref_block_plan plan = moei_ref_block_begin(d);
    MOEI_REAL* a = MOEI_REF(moei_ref_block_dense)(&plan.a, m, k, d->a_transposed);
    MOEI_REAL* b = MOEI_REF(moei_ref_block_dense)(&plan.b, n, k, !d->b_transposed); /* as [n, k] */
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
            MOEI_REAL sum = 0, sum_abs = 0;
            for (int64_t from = 0; from < k; from += step) {
                const int64_t upto = from + step < k ? from + step : k;
                if (!moei_ref_block_wanted(d, &plan, i, j, from)) continue;
                for (int64_t l = from; l < upto; ++l) {
                    const MOEI_REAL p = a[i * k + l] * b[j * k + l];
                    sum += p;
                    sum_abs += p < 0 ? -p : p;
                }
            }
            c[i * n + j] = sum;
            if (abs_sum) abs_sum[i * n + j] = sum_abs;
        }
    free(a);
    free(b);
    free(plan.number);
}
