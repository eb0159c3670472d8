/* combine_backward.inl: the gradients of combine for one type of number; combine_backward.h
   includes it twice. */

/* Returns the dot of token t's dy with H elements of rows_dtype from `first` on. abs_sum, unless
   null, gets the sum of the products' absolute values. */
MOE_HOST MOEI_REAL MOEI_REF(moei_ref_combine_dot)(const moe_ref_combine_backward_desc* d, int64_t t,
                                                  const void* rows, int64_t first,
                                                  MOEI_REAL* abs_sum)
{
    const int64_t hidden = d->forward.hidden, dy = t * moei_ref_or(d->dy_stride, hidden);
    MOEI_REAL sum = 0;
    if (abs_sum) *abs_sum = 0;
    for (int64_t h = 0; h < hidden; ++h) {
        const MOEI_REAL v = MOEI_REF(moe_ref_load)(d->dy, dy + h, d->dy_dtype) *
                            MOEI_REF(moe_ref_load)(rows, first + h, d->forward.rows_dtype);
        sum += v;
        if (abs_sum) *abs_sum += v < 0 ? -v : v;
    }
    return sum;
}

/* Writes `weight` times token t's dy to `to` [H]. */
MOE_HOST void MOEI_REF(moei_ref_combine_scale)(const moe_ref_combine_backward_desc* d, int64_t t,
                                               MOEI_REAL weight, MOEI_REAL* to)
{
    const int64_t hidden = d->forward.hidden, dy = t * moei_ref_or(d->dy_stride, hidden);
    for (int64_t h = 0; h < hidden; ++h)
        to[h] = weight * MOEI_REF(moe_ref_load)(d->dy, dy + h, d->dy_dtype);
}

/* Writes drows [T, K, H], dweights [T, K], dshared [T, H] and dshared_weight [T], each unless null.
   dweights and dshared_weight have the sums of their products' absolute values, for error bounds,
   after them: [2, T, K] and [2, T]. Returns the first slot whose place is out of range, or -1. */
MOE_HOST int64_t MOEI_REF(moe_ref_combine_backward)(const moe_ref_combine_backward_desc* d,
                                                    MOEI_REAL* drows, MOEI_REAL* dweights,
                                                    MOEI_REAL* dshared, MOEI_REAL* dshared_weight)
{
    const moe_ref_combine_desc* f = &d->forward;
    const int64_t hidden = f->hidden, tokens = f->num_tokens, slots = tokens * f->top_k;
    const int64_t row_stride = moei_ref_or(f->row_stride, hidden);
    const int weights_dtype = f->weights_dtype ? f->weights_dtype : MOE_FP32;
    const int buffers = f->num_buffers > 0 ? f->num_buffers : 1;
    int64_t first_bad = -1;
    for (int64_t slot = 0; slot < slots; ++slot) {
        const moe_place p = f->place[slot];
        const int64_t t = slot / f->top_k;
        const int bad = p.buffer != -1 && (p.buffer < 0 || p.buffer >= buffers || p.row < 0 ||
                                           (f->num_rows && p.row >= f->num_rows));
        if (bad && first_bad < 0) first_bad = slot;
        if (bad || p.buffer == -1) {
            for (int64_t h = 0; h < hidden && drows; ++h) drows[slot * hidden + h] = 0;
            if (dweights) dweights[slot] = dweights[slots + slot] = 0;
            continue;
        }
        if (drows) MOEI_REF(moei_ref_combine_scale)
        (d, t, f->weights ? MOEI_REF(moe_ref_load)(f->weights, slot, weights_dtype) : (MOEI_REAL)1,
         drows + slot * hidden);
        if (dweights)
            dweights[slot] =
                MOEI_REF(moei_ref_combine_dot)(d, t, f->table ? f->table[p.buffer] : f->rows,
                                               p.row * row_stride, dweights + slots + slot);
    }
    for (int64_t t = 0; t < tokens; ++t) {
        if (dshared) MOEI_REF(moei_ref_combine_scale)
        (d, t, f->shared_weight ? f->shared_weight[t] : (MOEI_REAL)1, dshared + t * hidden);
        if (dshared_weight)
            dshared_weight[t] = MOEI_REF(moei_ref_combine_dot)(
                d, t, f->shared, t * moei_ref_or(f->shared_stride, hidden),
                dshared_weight + tokens + t);
    }
    return first_bad;
}
