/* combine.inl: the combine for one type of number; combine.h includes it twice. */

/* Writes y [T, H]. abs_sum [T, H], for error bounds, gets the sum of the terms' absolute values, or
   is null. Returns the first slot whose place is out of range, or -1. */
MOE_HOST int64_t MOEI_REF(moe_ref_combine)(const moe_ref_combine_desc* d, MOEI_REAL* y,
                                           MOEI_REAL* abs_sum)
{
    const int64_t hidden = d->hidden, row_stride = moei_ref_or(d->row_stride, hidden);
    const int64_t residual_stride = moei_ref_or(d->residual_stride, hidden);
    const int weights_dtype = d->weights_dtype ? d->weights_dtype : MOE_FP32;
    const int buffers = d->table ? d->num_buffers : 1;
    int64_t first_bad = -1;
    for (int64_t t = 0; t < d->num_tokens; ++t) {
        for (int64_t h = 0; h < hidden; ++h) {
            MOEI_REAL v = 0;
            if (d->residual)
                v = MOEI_REF(moe_ref_load)(d->residual, t * residual_stride + h, d->residual_dtype);
            y[t * hidden + h] = v;
            if (abs_sum) abs_sum[t * hidden + h] = v < 0 ? -v : v;
        }
        for (int k = 0; k < d->top_k; ++k) {
            const int64_t slot = t * d->top_k + k;
            const moe_place p = d->place[slot];
            const void* rows;
            MOEI_REAL weight = 1;
            if (p.buffer == -1) continue;
            if (p.buffer < 0 || p.buffer >= buffers || p.row < 0 ||
                (d->num_rows && p.row >= d->num_rows)) {
                if (first_bad < 0) first_bad = slot;
                continue;
            }
            rows = d->table ? d->table[p.buffer] : d->rows;
            if (d->weights) weight = MOEI_REF(moe_ref_load)(d->weights, slot, weights_dtype);
            for (int64_t h = 0; h < hidden; ++h) {
                const MOEI_REAL v =
                    weight * MOEI_REF(moe_ref_load)(rows, p.row * row_stride + h, d->rows_dtype);
                y[t * hidden + h] += v;
                if (abs_sum) abs_sum[t * hidden + h] += v < 0 ? -v : v;
            }
        }
        for (int64_t h = 0; h < hidden && d->shared; ++h) {
            const MOEI_REAL weight = d->shared_weight ? d->shared_weight[t] : 1;
            const MOEI_REAL v =
                weight * MOEI_REF(moe_ref_load)(d->shared,
                                                t * moei_ref_or(d->shared_stride, hidden) + h,
                                                d->rows_dtype);
            y[t * hidden + h] += v;
            if (abs_sum) abs_sum[t * hidden + h] += v < 0 ? -v : v;
        }
    }
    return first_bad;
}
