/* experts_backward.inl: the experts' backward pass for one type of number; experts_backward.h includes
   it twice. */

/* The results; each may be null. Rows of no expert are not written. */
typedef struct MOEI_REF(moe_ref_experts_grads) {
    MOEI_REAL *dpre, *act, *rows;      /* [R, 2I or I], [R, I], [R, H] */
    MOEI_REAL *dw1, *dw2;              /* [E, 2I or I, H], [E, H, I] */
    MOEI_REAL *dbias1, *dbias2;        /* [E, 2I or I], [E, H] */
    MOEI_REAL* dweights;               /* [T, K], without row_slot [R] */
    MOEI_REAL *dweights_size, *dweights_d; /* the same: sums of the absolutes of its products; of the
                                              absolutes of d . activation alone */
} MOEI_REF(moe_ref_experts_grads);

/* Returns element (i, j) of expert e's w1, whose rows are numbered gates, then ups. */
MOE_HOST MOEI_REAL MOEI_REF(moei_ref_up_weight)(const moe_ref_experts_backward_desc* d, int e,
                                                int width, int i, int j)
{
    const int intermediate = d->intermediate, gated = width > intermediate, up = i >= intermediate;
    if (d->w_dtype == MOE_REF_REAL) /* dense and concatenated */
        return ((const MOEI_REAL*)d->w1.base)[((int64_t)e * width + i) * d->hidden + j];
    if (gated && d->gate_up == MOE_GATE_UP_SEPARATE) {
        const void* m = moei_ref_matrix(up ? d->w1.up : d->w1.base,
                                        up ? d->w1.up_table : d->w1.table, &d->w1, d->w_dtype, e,
                                        intermediate, d->hidden);
        return MOEI_REF(moe_ref_load)(
            m, moei_ref_element(&d->w1, intermediate, d->hidden, i % intermediate, j), d->w_dtype);
    }
    if (gated && d->gate_up == MOE_GATE_UP_INTERLEAVED)
        i = up ? 2 * (i - intermediate) + 1 : 2 * i;
    return MOEI_REF(moe_ref_load)(
        moei_ref_matrix(d->w1.base, d->w1.table, &d->w1, d->w_dtype, e, width, d->hidden),
        moei_ref_element(&d->w1, width, d->hidden, i, j), d->w_dtype);
}

/* Returns element (i, j) of expert e's w2. */
MOE_HOST MOEI_REAL MOEI_REF(moei_ref_down_weight)(const moe_ref_experts_backward_desc* d, int e,
                                                  int i, int j)
{
    if (d->w_dtype == MOE_REF_REAL)
        return ((const MOEI_REAL*)d->w2
                    .base)[((int64_t)e * d->hidden + i) * d->intermediate + j];
    return MOEI_REF(moe_ref_load)(moei_ref_matrix(d->w2.base, d->w2.table, &d->w2, d->w_dtype, e,
                                                  d->hidden, d->intermediate),
                                  moei_ref_element(&d->w2, d->hidden, d->intermediate, i, j),
                                  d->w_dtype);
}

/* Returns v rounded to so many significant bits; 0: v. */
MOE_HOST MOEI_REAL MOEI_REF(moei_ref_bits)(MOEI_REAL v, int bits)
{
    int exponent;
    const double m = frexp((double)v, &exponent);
    return bits ? (MOEI_REAL)ldexp(rint(ldexp(m, bits)), exponent - bits) : v;
}

/* One row: fills in act, dpre (2I), and returns the gradient of the weight; size [2]: the sum
   of the absolutes of its products, and that of d . activation. slot: -1: none. */
MOE_HOST MOEI_REAL MOEI_REF(moei_ref_experts_backward_row)(
    const moe_ref_experts_backward_desc* d, int e, int64_t r, int64_t slot, const MOEI_REAL* dy,
    MOEI_REAL* act, MOEI_REAL* dpre, MOEI_REAL* size)
{
    const int activation = d->activation ? d->activation : MOE_ACTIVATION_SWIGLU;
    const int gated = moe_activation_is_gated(activation), n = d->intermediate;
    const int64_t width = gated ? 2 * n : n;
    const int weights_dtype = d->weights_dtype ? d->weights_dtype : MOE_FP32;
    const MOEI_REAL w =
        d->weights && slot >= 0 ? MOEI_REF(moe_ref_load)(d->weights, slot, weights_dtype) : 1;
    MOEI_REAL sum = 0;
    size[0] = size[1] = 0;
    for (int i = 0; i < n; ++i) {
        MOEI_REAL v = 0, up = 0, by, by_v, by_up, p = 0, p_size = 0;
        if (slot < 0) {
            act[i] = dpre[i] = 0;
            if (gated) dpre[n + i] = 0;
            continue;
        }
        for (int j = 0; j < d->hidden; ++j) {
            const MOEI_REAL one = MOEI_REF(moei_ref_down_weight)(d, e, j, i) * dy[j];
            p += one, p_size += one < 0 ? -one : one;
        }
        p = MOEI_REF(moei_ref_bits)(p, d->d_bits);
        v = MOEI_REF(moe_ref_load)(d->pre, r * width + i, d->pre_dtype);
        if (gated) up = MOEI_REF(moe_ref_load)(d->pre, r * width + n + i, d->pre_dtype);
        by = MOEI_REF(moe_ref_activation)(activation, v, up, d->alpha, d->limit);
        MOEI_REF(moe_ref_activation_grad)(activation, v, up, d->alpha, d->limit, &by_v, &by_up);
        sum += p * by;
        size[0] += p_size * (by < 0 ? -by : by);
        size[1] += p * by < 0 ? -(p * by) : p * by;
        act[i] = MOEI_REF(moe_ref_round)(w * by, d->act_dtype);
        dpre[i] = MOEI_REF(moe_ref_round)(w * p * by_v, d->act_dtype);
        if (gated) dpre[n + i] = MOEI_REF(moe_ref_round)(w * p * by_up, d->act_dtype);
    }
    for (int j = 0; j < d->hidden && d->bias2 && slot >= 0; ++j) {
        const MOEI_REAL one =
            dy[j] * MOEI_REF(moe_ref_load)(d->bias2, (int64_t)e * d->hidden + j, d->w_dtype);
        sum += one, size[0] += one < 0 ? -one : one;
    }
    return sum;
}

/* Writes all results that are asked for. Returns 0, or -1 where memory ran out. */
MOE_HOST int MOEI_REF(moe_ref_experts_backward)(const moe_ref_experts_backward_desc* d,
                                                const MOEI_REF(moe_ref_experts_grads) * g)
{
    const int activation = d->activation ? d->activation : MOE_ACTIVATION_SWIGLU;
    const int hidden = d->hidden, n = d->intermediate;
    const int width = moe_activation_is_gated(activation) ? 2 * n : n;
    const int64_t num_rows = d->expert_offset[d->num_experts], num_experts = d->num_experts;
    const int64_t slots = d->row_slot ? (int64_t)d->num_tokens * d->top_k : num_rows;
    const int weights_dtype = d->weights_dtype ? d->weights_dtype : MOE_FP32;
    const size_t bytes = sizeof(MOEI_REAL);
    MOEI_REAL* x = (MOEI_REAL*)malloc((size_t)(2 * hidden + width + n) * bytes);
    MOEI_REAL *dy = x + hidden, *dpre = dy + hidden, *act = dpre + width;
    if (!x) return -1;
    if (g->dw1) memset(g->dw1, 0, (size_t)(num_experts * width * hidden) * bytes);
    if (g->dw2) memset(g->dw2, 0, (size_t)(num_experts * hidden * n) * bytes);
    if (g->dbias1) memset(g->dbias1, 0, (size_t)(num_experts * width) * bytes);
    if (g->dbias2) memset(g->dbias2, 0, (size_t)(num_experts * hidden) * bytes);
    if (g->dweights) memset(g->dweights, 0, (size_t)slots * bytes);
    if (g->dweights_size) memset(g->dweights_size, 0, (size_t)slots * bytes);
    if (g->dweights_d) memset(g->dweights_d, 0, (size_t)slots * bytes);
    for (int e = 0; e < d->num_experts; ++e)
        for (int64_t r = d->expert_offset[e]; r < d->expert_offset[e + 1]; ++r) {
            int64_t slot = d->row_slot ? d->row_slot[r] : r, t;
            MOEI_REAL w, sum, size[2];
            if (slot < 0 || slot >= slots) slot = -1;
            t = d->row_slot ? slot / d->top_k : slot;
            for (int j = 0; j < hidden; ++j) {
                const int64_t at = slot < 0 ? 0 : t;
                x[j] = d->x && slot >= 0
                           ? MOEI_REF(moe_ref_load)(
                                 d->x, at * moei_ref_or(d->x_stride, hidden) + j, d->x_dtype)
                           : 0;
                dy[j] = slot >= 0 ? MOEI_REF(moe_ref_load)(
                                        d->dy, at * moei_ref_or(d->dy_stride, hidden) + j,
                                        d->x_dtype)
                                  : 0;
            }
            sum = MOEI_REF(moei_ref_experts_backward_row)(d, e, r, slot, dy, act, dpre, size);
            w = d->weights && slot >= 0
                    ? MOEI_REF(moe_ref_load)(d->weights, slot, weights_dtype)
                    : 1;
            if (g->dweights && slot >= 0) g->dweights[slot] = sum;
            if (g->dweights_size && slot >= 0) g->dweights_size[slot] = size[0];
            if (g->dweights_d && slot >= 0) g->dweights_d[slot] = size[1];
            for (int i = 0; i < n && g->act; ++i) g->act[r * n + i] = act[i];
            for (int i = 0; i < width && g->dpre; ++i) g->dpre[r * width + i] = dpre[i];
            for (int i = 0; i < width && g->dbias1; ++i) g->dbias1[e * width + i] += dpre[i];
            for (int j = 0; j < hidden && g->dbias2; ++j)
                g->dbias2[(int64_t)e * hidden + j] += w * dy[j];
            for (int j = 0; j < hidden && g->rows; ++j) {
                MOEI_REAL v = 0;
                for (int i = 0; i < width; ++i)
                    v += MOEI_REF(moei_ref_up_weight)(d, e, width, i, j) * dpre[i];
                g->rows[r * hidden + j] = v;
            }
            for (int i = 0; i < width && g->dw1; ++i)
                for (int j = 0; j < hidden; ++j)
                    g->dw1[((int64_t)e * width + i) * hidden + j] += dpre[i] * x[j];
            for (int j = 0; j < hidden && g->dw2; ++j)
                for (int i = 0; i < n; ++i)
                    g->dw2[((int64_t)e * hidden + j) * n + i] += dy[j] * act[i];
        }
    free(x);
    return 0;
}
