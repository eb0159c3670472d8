/* block_layer.inl: the layer forms for one type of number; block_layer.h includes it twice. */

/* Writes the derivatives of an activation by v and by up to *by_v and *by_up. alpha and limit 0:
   the defaults. */
MOE_HOST void MOEI_REF(moe_ref_activation_grad)(int activation, MOEI_REAL v, MOEI_REAL up,
                                                float alpha, float limit, MOEI_REAL* by_v,
                                                MOEI_REAL* by_up)
{
    const MOEI_REAL most = limit != 0 ? limit : 7, a = alpha != 0 ? alpha : 1.702f;
    const MOEI_REAL c = (MOEI_REAL)1.59576912160573071176; /* 2 sqrt(2 / pi) */
    MOEI_REAL value = v, slope = 1, s;                     /* activation of v alone, and its
                                                              derivative */
    switch (activation) {
    case MOE_ACTIVATION_NONE: break;
    case MOE_ACTIVATION_GELU:
    case MOE_ACTIVATION_GEGLU:
        s = MOEI_REF(moe_ref_phi)(v);
        value = v * s;
        slope = (MOEI_REAL)(s + v * exp(-0.5 * v * v) * 0.39894228040143267794);
        break;
    case MOE_ACTIVATION_GELU_TANH:
    case MOE_ACTIVATION_GEGLU_TANH:
        s = (MOEI_REAL)(1 / (1 + exp(-c * (v + 0.044715 * v * v * v))));
        value = v * s;
        slope = (MOEI_REAL)(s + v * s * (1 - s) * c * (1 + 3 * 0.044715 * v * v));
        break;
    case MOE_ACTIVATION_RELU2:
        value = v > 0 ? v * v : 0;
        slope = v > 0 ? 2 * v : 0;
        break;
    case MOE_ACTIVATION_SWIGLU_CLAMPED:
        s = v > most ? most : v;
        value = (MOEI_REAL)(1 / (1 + exp(-a * s)));
        slope = v > most ? 0 : value * (1 + a * s * (1 - value));
        value *= s;
        break;
    default:
        s = (MOEI_REAL)(1 / (1 + exp(-v)));
        value = v * s;
        slope = s * (1 + v * (1 - s));
        break;
    }
    *by_v = slope;
    *by_up = 0;
    if (activation == MOE_ACTIVATION_SWIGLU_CLAMPED) {
        *by_up = up > most || up < -most ? 0 : value;
        *by_v *= (up > most ? most : up < -most ? -most : up) + 1;
    } else if (moe_activation_is_gated(activation)) {
        *by_up = value;
        *by_v *= up;
    }
}

/* Returns the address of expert e's matrix [n, k]; with MOE_REF_REAL dense, at base. */
MOE_HOST const void* MOEI_REF(moei_ref_block_layer_matrix)(const moe_weights* w, int dtype, int e,
                                                           int n, int k)
{
    if (dtype == MOE_REF_REAL) return (const MOEI_REAL*)w->base + (int64_t)e * n * k;
    return moei_ref_matrix(w->base, w->table, w, dtype, e, n, k);
}

/* Writes y [T, H], dx [T, H], dw1 [E, 2I or I, H], dw2 [E, H, I], dweights [T, K]; each may be
   null. The gradients of experts that no slot names are 0. Returns 0, or -1 where memory ran
   out. */
MOE_HOST int MOEI_REF(moe_ref_block_layer)(const moe_ref_block_layer_desc* d, MOEI_REAL* y,
                                           MOEI_REAL* dx, MOEI_REAL* dw1, MOEI_REAL* dw2,
                                           MOEI_REAL* dweights)
{
    const int activation = d->activation ? d->activation : MOE_ACTIVATION_SWIGLU;
    const int intermediate = d->intermediate, hidden = d->hidden, num_experts = d->num_experts,
              top_k = d->top_k;
    const int gated = moe_activation_is_gated(activation),
              up_width = gated ? 2 * intermediate : intermediate;
    const int64_t x_stride = moei_ref_or(d->x_stride, hidden),
                  dy_stride = moei_ref_or(d->dy_stride, hidden);
    const size_t size = sizeof(MOEI_REAL);
    MOEI_REAL* h =
        (MOEI_REAL*)malloc((size_t)(2 * up_width + 3 * intermediate + 3 * hidden) * size);
    MOEI_REAL *dh = h + up_width, *f = dh + up_width, *a = f + intermediate, *da = a + intermediate,
              *x = da + intermediate, *dy = x + hidden;
    MOEI_REAL* row = dy + hidden;
    if (!h) return -1;
    if (y) memset(y, 0, (size_t)d->num_tokens * (size_t)hidden * size);
    if (dx) memset(dx, 0, (size_t)d->num_tokens * (size_t)hidden * size);
    if (dw1) memset(dw1, 0, (size_t)num_experts * (size_t)up_width * (size_t)hidden * size);
    if (dw2) memset(dw2, 0, (size_t)num_experts * (size_t)hidden * (size_t)intermediate * size);
    for (int64_t t = 0; t < d->num_tokens; ++t) {
        for (int j = 0; j < hidden; ++j) {
            x[j] = MOEI_REF(moe_ref_load)(d->x, t * x_stride + j, d->x_dtype);
            dy[j] = d->dy ? MOEI_REF(moe_ref_load)(d->dy, t * dy_stride + j, d->dy_dtype) : 0;
        }
        for (int k = 0; k < top_k; ++k) {
            const int e = d->ids ? d->ids[t * top_k + k] : k;
            const MOEI_REAL w = MOEI_REF(moe_ref_load)(d->weights, t * top_k + k, d->weights_dtype);
            const void *m1, *m2;
            MOEI_REAL sum = 0;
            if (dweights) dweights[t * top_k + k] = 0;
            if (e < 0 || e >= num_experts) continue;
            m1 = MOEI_REF(moei_ref_block_layer_matrix)(&d->w1, d->w_dtype, e, up_width, hidden);
            m2 = MOEI_REF(moei_ref_block_layer_matrix)(&d->w2, d->w_dtype, e, hidden, intermediate);
#define MOEI_W1(i, j)                                                                              \
    MOEI_REF(moe_ref_load)(m1, moei_ref_element(&d->w1, up_width, hidden, (i), (j)), d->w_dtype)
#define MOEI_W2(i, j)                                                                              \
    MOEI_REF(moe_ref_load)(m2, moei_ref_element(&d->w2, hidden, intermediate, (i), (j)), d->w_dtype)
            for (int i = 0; i < up_width; ++i) {
                MOEI_REAL v = 0;
                for (int j = 0; j < hidden; ++j) v += MOEI_W1(i, j) * x[j];
                h[i] = MOEI_REF(moe_ref_round)(v, d->pre_dtype);
            }
            for (int i = 0; i < intermediate; ++i) {
                f[i] = MOEI_REF(moe_ref_activation)(
                    activation, h[i], gated ? h[intermediate + i] : 0, d->alpha, d->limit);
                a[i] = MOEI_REF(moe_ref_round)(f[i] * w, d->act_dtype);
            }
            for (int j = 0; j < hidden && y; ++j) {
                MOEI_REAL v = 0;
                for (int i = 0; i < intermediate; ++i) v += MOEI_W2(j, i) * a[i];
                y[t * hidden + j] += MOEI_REF(moe_ref_round)(v, d->rows_dtype);
            }
            if (!d->dy) continue;
            for (int i = 0; i < intermediate; ++i) {
                MOEI_REAL v = 0, by_v, by_up;
                for (int j = 0; j < hidden; ++j) v += MOEI_W2(j, i) * dy[j];
                da[i] = MOEI_REF(moe_ref_round)(v, d->act_dtype);
                MOEI_REF(moe_ref_activation_grad)
                (activation, h[i], gated ? h[intermediate + i] : 0, d->alpha, d->limit, &by_v,
                 &by_up);
                sum += da[i] * f[i];
                dh[i] = MOEI_REF(moe_ref_round)(w * da[i] * by_v, d->act_dtype);
                if (gated)
                    dh[intermediate + i] = MOEI_REF(moe_ref_round)(w * da[i] * by_up, d->act_dtype);
            }
            if (dweights) dweights[t * top_k + k] = sum;
            for (int j = 0; j < hidden && dw2; ++j)
                for (int i = 0; i < intermediate; ++i)
                    dw2[((int64_t)e * hidden + j) * intermediate + i] += dy[j] * a[i];
            for (int i = 0; i < up_width && dw1; ++i)
                for (int j = 0; j < hidden; ++j)
                    dw1[((int64_t)e * up_width + i) * hidden + j] += dh[i] * x[j];
            for (int j = 0; j < hidden; ++j) row[j] = 0;
            for (int i = 0; i < up_width && dx; ++i)
                for (int j = 0; j < hidden; ++j) row[j] += MOEI_W1(i, j) * dh[i];
            for (int j = 0; j < hidden && dx; ++j)
                dx[t * hidden + j] += MOEI_REF(moe_ref_round)(row[j], d->rows_dtype);
#undef MOEI_W1
#undef MOEI_W2
        }
    }
    free(h);
    return 0;
}
