/* experts.inl: the expert MLP for one type of number; experts.h includes it twice. */

/* Returns v / (1 + e^u); 0 where e^u is infinite: the limit for v = -infinity. */
MOE_HOST MOEI_REAL MOEI_REF(moe_ref_logistic)(MOEI_REAL v, double u)
{
    const double e = exp(u);
    return isinf(e) ? 0 : (MOEI_REAL)(v / (1 + e));
}

/* Returns v sigma(v). */
MOE_HOST MOEI_REAL MOEI_REF(moe_ref_silu)(MOEI_REAL v) { return MOEI_REF(moe_ref_logistic)(v, -v); }

/* Returns Phi(v), the normal distribution function. */
MOE_HOST MOEI_REAL MOEI_REF(moe_ref_phi)(MOEI_REAL v)
{
    return (MOEI_REAL)(0.5 * erfc(-v * 0.70710678118654752440));
}

/* Returns v Phi(v). */
MOE_HOST MOEI_REAL MOEI_REF(moe_ref_gelu)(MOEI_REAL v)
{
    const MOEI_REAL phi = MOEI_REF(moe_ref_phi)(v);
    return phi == 0 ? 0 : v * phi;
}

/* Returns v (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3))) / 2, in a form without cancellation. */
MOE_HOST MOEI_REAL MOEI_REF(moe_ref_gelu_tanh)(MOEI_REAL v)
{
    return MOEI_REF(moe_ref_logistic)(v, -1.59576912160573071176 * (v + 0.044715 * v * v * v));
}

/* Returns one activation: from a gate v and its up, or from v alone. alpha and limit 0: the
   defaults. */
MOE_HOST MOEI_REAL MOEI_REF(moe_ref_activation)(int activation, MOEI_REAL v, MOEI_REAL up,
                                                float alpha, float limit)
{
    const MOEI_REAL most = limit != 0 ? limit : 7, a = alpha != 0 ? alpha : 1.702f;
    switch (activation) {
    case MOE_ACTIVATION_NONE: return v;
    case MOE_ACTIVATION_GEGLU: return MOEI_REF(moe_ref_gelu)(v) * up;
    case MOE_ACTIVATION_GEGLU_TANH: return MOEI_REF(moe_ref_gelu_tanh)(v) * up;
    case MOE_ACTIVATION_SWIGLU_CLAMPED:
        if (v > most) v = most;
        if (up > most) up = most;
        if (up < -most) up = -most;
        return MOEI_REF(moe_ref_logistic)(v, -a * v) * (up + 1);
    case MOE_ACTIVATION_SILU: return MOEI_REF(moe_ref_silu)(v);
    case MOE_ACTIVATION_GELU: return MOEI_REF(moe_ref_gelu)(v);
    case MOE_ACTIVATION_GELU_TANH: return MOEI_REF(moe_ref_gelu_tanh)(v);
    case MOE_ACTIVATION_RELU2: return v < 0 ? 0 : v * v;
    default: return MOEI_REF(moe_ref_silu)(v) * up;
    }
}

/* Writes a [R, I] from h [R, 2I], with gates and ups as gate_up says, or from h [R, I]. Where
   gate_up is separate, h holds I gates and then I ups, as in `concatenated`. */
MOE_HOST void MOEI_REF(moe_ref_activate)(const moe_ref_experts_desc* d, const MOEI_REAL* h,
                                         int64_t num_rows, MOEI_REAL* a)
{
    const int64_t intermediate = d->intermediate;
    const int activation = d->activation ? d->activation : MOE_ACTIVATION_SWIGLU;
    const int pairs = d->gate_up == MOE_GATE_UP_INTERLEAVED;
    for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t i = 0; i < intermediate; ++i) {
            MOEI_REAL v = h[r * intermediate + i], up = 0;
            if (moe_activation_is_gated(activation)) {
                v = h[r * 2 * intermediate + (pairs ? 2 * i : i)];
                up = h[r * 2 * intermediate + (pairs ? 2 * i + 1 : intermediate + i)];
            }
            v = MOEI_REF(moe_ref_activation)(activation, v, up, d->alpha, d->limit);
            a[r * intermediate + i] = MOEI_REF(moe_ref_round)(v, d->act_dtype);
        }
}

/* Writes y [R, H], R = expert_offset[E]. act [R, I] gets a, rounded, and h [R, 2I] or [R, I] the
   output of the first product; both may be null. Returns 0, or -1 where memory ran out. */
MOE_HOST int MOEI_REF(moe_ref_experts)(const moe_ref_experts_desc* d, MOEI_REAL* y, MOEI_REAL* act,
                                       MOEI_REAL* h)
{
    const int64_t num_rows = d->expert_offset[d->num_experts], intermediate = d->intermediate,
                  hidden = d->hidden;
    MOEI_REAL* pre =
        h ? h : (MOEI_REAL*)malloc((size_t)(num_rows * 2 * intermediate + 1) * sizeof(MOEI_REAL));
    MOEI_REAL* a =
        act ? act : (MOEI_REAL*)malloc((size_t)(num_rows * intermediate + 1) * sizeof(MOEI_REAL));
    MOEI_REAL* half = (MOEI_REAL*)malloc((size_t)(num_rows * intermediate + 1) * sizeof(MOEI_REAL));
    const int ok = pre && a && half;
    const int gated = d->activation == 0 || moe_activation_is_gated(d->activation);
    if (ok) {
        moe_ref_gemm_desc g;
        memset(&g, 0, sizeof g);
        g.a = d->x;
        g.a_dtype = d->x_dtype;
        g.a_stride = moei_ref_or(d->x_stride, hidden);
        g.row_index = d->row_slot;
        g.row_div = d->row_slot ? d->top_k : 1;
        g.expert_offset = d->expert_offset;
        g.b = d->w1;
        g.b_dtype = d->w_dtype;
        g.bias = d->bias1;
        g.bias_dtype = d->bias_dtype;
        g.bias_stride = gated ? 2 * intermediate : intermediate;
        g.num_experts = d->num_experts;
        g.k = (int)hidden;
        if (gated && d->gate_up == MOE_GATE_UP_SEPARATE) {
            g.n = (int)intermediate;
            for (g.use_up = 0; g.use_up < 2; ++g.use_up) {
                const int bytes = moe_dtype_bytes(d->bias_dtype ? d->bias_dtype : MOE_FP32);
                if (d->bias1) g.bias = (const char*)d->bias1 + g.use_up * intermediate * bytes;
                MOEI_REF(moe_ref_gemm)(&g, half, 0);
                for (int64_t r = 0; r < num_rows; ++r)
                    for (int64_t i = 0; i < intermediate; ++i)
                        pre[r * 2 * intermediate + g.use_up * intermediate + i] =
                            half[r * intermediate + i];
            }
        } else {
            g.n = (int)(gated ? 2 * intermediate : intermediate);
            MOEI_REF(moe_ref_gemm)(&g, pre, 0);
        }
        MOEI_REF(moe_ref_activate)(d, pre, num_rows, a);
        {
            moe_ref_gemm_desc out;
            memset(&out, 0, sizeof out);
            out.a = a;
            out.a_dtype = MOE_REF_REAL;
            out.expert_offset = d->expert_offset;
            out.b = d->w2;
            out.b_dtype = d->w_dtype;
            out.bias = d->bias2;
            out.bias_dtype = d->bias_dtype;
            out.num_experts = d->num_experts;
            out.n = (int)hidden;
            out.k = (int)intermediate;
            MOEI_REF(moe_ref_gemm)(&out, y, 0);
        }
    }
    if (!h) free(pre);
    if (!act) free(a);
    free(half);
    return ok ? 0 : -1;
}
