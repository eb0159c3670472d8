/* k_gemm.inl: the k-grouped GEMM for one type of number; k_gemm.h includes it twice. */

/* Writes c [E, m, n]. abs_sum [E, m, n], for error bounds, gets sum |a * b|, or is null. */
MOE_HOST void MOEI_REF(moe_ref_k_gemm)(const moe_ref_k_gemm_desc* d, MOEI_REAL* c,
                                       MOEI_REAL* abs_sum)
{
    const int64_t a_stride = moei_ref_or(d->a_stride, d->m);
    const int64_t b_stride = moei_ref_or(d->b_stride, d->n);
    for (int e = 0; e < d->num_experts; ++e)
        for (int i = 0; i < d->m; ++i)
            for (int j = 0; j < d->n; ++j) {
                const int64_t at = ((int64_t)e * d->m + i) * d->n + j;
                MOEI_REAL sum = 0, sum_abs = 0;
                for (int64_t r = d->expert_offset[e]; r < d->expert_offset[e + 1]; ++r) {
                    const int64_t p = moei_ref_k_row(d->a_index, r, d->a_div, d->a_rows);
                    const int64_t q = moei_ref_k_row(d->b_index, r, d->b_div, d->b_rows);
                    MOEI_REAL v, w;
                    if (p < 0 || q < 0) continue;
                    v = MOEI_REF(moe_ref_load)(d->a, p * a_stride + i, d->dtype);
                    w = MOEI_REF(moe_ref_load)(d->b, q * b_stride + j, d->dtype);
                    sum += v * w;
                    sum_abs += v * w < 0 ? -(v * w) : v * w;
                }
                c[at] = sum;
                if (abs_sum) abs_sum[at] = sum_abs;
            }
}
