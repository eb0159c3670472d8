/* block_layer.inl: the layer forms for one type of number; block_layer.h includes it twice. */

/* What a loss changes by v and by up, per change of the activation: its two derivatives. */
MOE_HOST void MOEI_REF(moe_ref_activation_grad)(int activation, MOEI_REAL v, MOEI_REAL up,
                                                float alpha, float limit, MOEI_REAL* by_v,
                                                MOEI_REAL* by_up)
{
    const MOEI_REAL most = limit != 0 ? limit : 7, a = alpha != 0 ? alpha : 1.702f;
    const MOEI_REAL c = (MOEI_REAL)1.59576912160573071176; /* 2 sqrt(2 / pi) */
    MOEI_REAL value = v, slope = 1, s;                     /* of the activation of v alone */
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

/* Expert e's matrix [n, k], which may be of the reference's own numbers. */
MOE_HOST const void* MOEI_REF(moei_ref_block_layer_matrix)(const moe_weights* w, int dtype, int e,
                                                           int n, int k)
{
    if (dtype == MOE_REF_REAL) return (const MOEI_REAL*)w->base + (int64_t)e * n * k;
    return moei_ref_matrix(w->base, w->table, w, dtype, e, n, k);
}

/* y [T, H], dx [T, H], dw1 [E, 2I or I, H], dw2 [E, H, I], dweights [T, K]: each may be null. The
   gradients of experts that no slot names are 0. Returns 0, or -1 where memory ran out. */
MOE_HOST int MOEI_REF(moe_ref_block_layer)(const moe_ref_block_layer_desc* d, MOEI_REAL* y,
                                           MOEI_REAL* dx, MOEI_REAL* dw1, MOEI_REAL* dw2,
                                           MOEI_REAL* dweights)
{
    const int activation = d->activation ? d->activation : MOE_ACTIVATION_SWIGLU;
    const int I = d->intermediate, H = d->hidden, E = d->num_experts, K = d->top_k;
    const int gated = moe_activation_is_gated(activation), U = gated ? 2 * I : I;
    const int64_t x_stride = moei_ref_or(d->x_stride, H), dy_stride = moei_ref_or(d->dy_stride, H);
    const size_t size = sizeof(MOEI_REAL);
    MOEI_REAL* h = (MOEI_REAL*)malloc((size_t)(2 * U + 3 * I + 3 * H) * size);
    MOEI_REAL *dh = h + U, *f = dh + U, *a = f + I, *da = a + I, *x = da + I, *dy = x + H;
    MOEI_REAL* row = dy + H;
    if (!h) return -1;
    if (y) memset(y, 0, (size_t)d->num_tokens * (size_t)H * size);
    if (dx) memset(dx, 0, (size_t)d->num_tokens * (size_t)H * size);
    if (dw1) memset(dw1, 0, (size_t)E * (size_t)U * (size_t)H * size);
    if (dw2) memset(dw2, 0, (size_t)E * (size_t)H * (size_t)I * size);
    for (int64_t t = 0; t < d->num_tokens; ++t) {
        for (int j = 0; j < H; ++j) {
            x[j] = MOEI_REF(moe_ref_load)(d->x, t * x_stride + j, d->x_dtype);
            dy[j] = d->dy ? MOEI_REF(moe_ref_load)(d->dy, t * dy_stride + j, d->dy_dtype) : 0;
        }
        for (int k = 0; k < K; ++k) {
            const int e = d->ids ? d->ids[t * K + k] : k;
            const MOEI_REAL w = MOEI_REF(moe_ref_load)(d->weights, t * K + k, d->weights_dtype);
            const void *m1, *m2;
            MOEI_REAL sum = 0;
            if (dweights) dweights[t * K + k] = 0;
            if (e < 0 || e >= E) continue;
            m1 = MOEI_REF(moei_ref_block_layer_matrix)(&d->w1, d->w_dtype, e, U, H);
            m2 = MOEI_REF(moei_ref_block_layer_matrix)(&d->w2, d->w_dtype, e, H, I);
#define MOEI_W1(i, j)                                                                              \
    MOEI_REF(moe_ref_load)(m1, moei_ref_element(&d->w1, U, H, (i), (j)), d->w_dtype)
#define MOEI_W2(i, j)                                                                              \
    MOEI_REF(moe_ref_load)(m2, moei_ref_element(&d->w2, H, I, (i), (j)), d->w_dtype)
            for (int i = 0; i < U; ++i) {
                MOEI_REAL v = 0;
                for (int j = 0; j < H; ++j) v += MOEI_W1(i, j) * x[j];
                h[i] = MOEI_REF(moe_ref_round)(v, d->pre_dtype);
            }
            for (int i = 0; i < I; ++i) {
                f[i] = MOEI_REF(moe_ref_activation)(activation, h[i], gated ? h[I + i] : 0,
                                                    d->alpha, d->limit);
                a[i] = MOEI_REF(moe_ref_round)(f[i] * w, d->act_dtype);
            }
            for (int j = 0; j < H && y; ++j) {
                MOEI_REAL v = 0;
                for (int i = 0; i < I; ++i) v += MOEI_W2(j, i) * a[i];
                y[t * H + j] += MOEI_REF(moe_ref_round)(v, d->rows_dtype);
            }
            if (!d->dy) continue;
            for (int i = 0; i < I; ++i) {
                MOEI_REAL v = 0, by_v, by_up;
                for (int j = 0; j < H; ++j) v += MOEI_W2(j, i) * dy[j];
                da[i] = MOEI_REF(moe_ref_round)(v, d->act_dtype);
                MOEI_REF(moe_ref_activation_grad)
                (activation, h[i], gated ? h[I + i] : 0, d->alpha, d->limit, &by_v, &by_up);
                sum += da[i] * f[i];
                dh[i] = MOEI_REF(moe_ref_round)(w * da[i] * by_v, d->act_dtype);
                if (gated) dh[I + i] = MOEI_REF(moe_ref_round)(w * da[i] * by_up, d->act_dtype);
            }
            if (dweights) dweights[t * K + k] = sum;
            for (int j = 0; j < H && dw2; ++j)
                for (int i = 0; i < I; ++i) dw2[((int64_t)e * H + j) * I + i] += dy[j] * a[i];
            for (int i = 0; i < U && dw1; ++i)
                for (int j = 0; j < H; ++j) dw1[((int64_t)e * U + i) * H + j] += dh[i] * x[j];
            for (int j = 0; j < H; ++j) row[j] = 0;
            for (int i = 0; i < U && dx; ++i)
                for (int j = 0; j < H; ++j) row[j] += MOEI_W1(i, j) * dh[i];
            for (int j = 0; j < H && dx; ++j)
                dx[t * H + j] += MOEI_REF(moe_ref_round)(row[j], d->rows_dtype);
#undef MOEI_W1
#undef MOEI_W2
        }
    }
    free(h);
    return 0;
}
