/* gemm_gradient.inl: the backward pass through an activation for one type of number;
   gemm_gradient.h includes it twice. */

/* Returns w of row r. Sets *read to 0 where the row has no row of a, else to 1. */
MOE_HOST MOEI_REAL MOEI_REF(moei_ref_row_weight)(const moe_ref_gemm_gradient_desc* d, int64_t r,
                                                 int* read)
{
    const moe_ref_gemm_desc* g = &d->product;
    const int64_t index = g->row_index ? g->row_index[r] : r;
    const int64_t row = g->row_index && g->row_div > 1 ? index / g->row_div : index;
    *read = !g->row_index || (index >= 0 && !(g->a_rows && row >= g->a_rows));
    if (!*read) return 0;
    return d->row_weight ? (MOEI_REAL)d->row_weight[index] : 1;
}

/* Writes p and p_abs [R, n], as moe_ref_gemm does, c [R, n], gated [R, 2n], act [R, n] and
   dot [R, ceil(n / 64)]. */
MOE_HOST void MOEI_REF(moe_ref_gemm_gradient)(const moe_ref_gemm_gradient_desc* d, MOEI_REAL* p,
                                              MOEI_REAL* p_abs, MOEI_REAL* c, MOEI_REAL* act,
                                              MOEI_REAL* dot)
{
    const moe_ref_gemm_desc* g = &d->product;
    const int gated = moe_activation_is_gated(d->activation), n = g->n, parts = (n + 63) / 64;
    const int64_t columns = gated ? 2 * n : n, stride = moei_ref_or(d->pre_stride, columns);
    MOEI_REF(moe_ref_gemm)(g, p, p_abs);
    for (int64_t r = g->expert_offset[0]; r < g->expert_offset[g->num_experts]; ++r) {
        int read;
        const MOEI_REAL w = MOEI_REF(moei_ref_row_weight)(d, r, &read);
        for (int i = 0; i < parts; ++i) dot[r * parts + i] = 0;
        for (int j = 0; j < n; ++j) {
            const int64_t at = r * stride + j;
            const MOEI_REAL v = read ? MOEI_REF(moe_ref_load)(d->pre, at, d->pre_dtype) : 0;
            const MOEI_REAL u =
                read && gated ? MOEI_REF(moe_ref_load)(d->pre, at + n, d->pre_dtype) : 0;
            const MOEI_REAL a =
                MOEI_REF(moe_ref_activation)(d->activation, v, u, d->alpha, d->limit);
            MOEI_REAL by_v, by_u;
            MOEI_REF(moe_ref_activation_grad)
            (d->activation, v, u, d->alpha, d->limit, &by_v, &by_u);
            c[r * columns + j] = w * p[r * n + j] * by_v;
            if (gated) c[r * columns + n + j] = w * p[r * n + j] * by_u;
            act[r * n + j] = w * a;
            dot[r * parts + j / 64] += p[r * n + j] * a;
        }
    }
}
