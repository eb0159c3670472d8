/* gemm.inl: the grouped GEMM for one type of number; gemm.h includes it twice. */

/* Writes c [R, n]. abs_sum [R, n], for error bounds, gets |bias| + sum |a * b|, or is null. */
MOE_HOST void MOEI_REF(moe_ref_gemm)(const moe_ref_gemm_desc* d, MOEI_REAL* c, MOEI_REAL* abs_sum)
{
    const int columns = d->n, depths = d->k;
    const int64_t a_stride = moei_ref_or(d->a_stride, depths);
    const int64_t bias_stride = moei_ref_or(d->bias_stride, columns);
    const int bias_dtype = d->bias_dtype ? d->bias_dtype : MOE_FP32;
    for (int i = 0; i < (d->group ? d->num_groups : d->num_experts); ++i) {
        const int e = d->group ? d->group[i].expert : i;
        const int64_t begin = d->group ? d->group[i].begin : d->expert_offset[i];
        const int64_t end = d->group ? d->group[i].end : d->expert_offset[i + 1];
        const void* b =
            moei_ref_matrix(d->use_up ? d->b.up : d->b.base, d->use_up ? d->b.up_table : d->b.table,
                            &d->b, d->b_dtype, e, columns, depths);
        for (int64_t r = begin; r < end; ++r) {
            int64_t from = d->row_index ? d->row_index[r] : r;
            if (from >= 0 && d->row_div > 1) from /= d->row_div;
            if (d->a_rows && from >= d->a_rows) from = -1;
            for (int n = 0; n < columns; ++n) {
                MOEI_REAL sum = 0, sum_abs = 0;
                if (d->bias) sum = MOEI_REF(moe_ref_load)(d->bias, e * bias_stride + n, bias_dtype);
                sum_abs = sum < 0 ? -sum : sum;
                for (int k = 0; k < depths && from >= 0; ++k) {
                    const MOEI_REAL p =
                        MOEI_REF(moe_ref_load)(d->a, from * a_stride + k, d->a_dtype) *
                        MOEI_REF(moe_ref_load)(b, moei_ref_element(&d->b, columns, depths, n, k),
                                               d->b_dtype);
                    sum += p;
                    sum_abs += p < 0 ? -p : p;
                }
                c[r * columns + n] = sum;
                if (abs_sum) abs_sum[r * columns + n] = sum_abs;
            }
        }
    }
}
