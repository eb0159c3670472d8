/* router_backward.inl: the router's gradients for one type of number; router_backward.h includes it
   twice. */

/* Writes dx [T, H] and drouter [E, H]; and, where they are not null, the sums of their terms'
   absolutes. Each may be null. */
MOE_HOST void MOEI_REF(moe_ref_router_backward)(const moe_ref_router_backward_desc* d,
                                                MOEI_REAL* dx, MOEI_REAL* drouter,
                                                MOEI_REAL* dx_size, MOEI_REAL* drouter_size)
{
    const moe_ref_router_desc* f = &d->forward;
    const int64_t num_tokens = f->num_tokens, num_experts = f->num_experts, hidden = f->hidden;
    const int dtype = d->dlogits_dtype ? d->dlogits_dtype : MOE_FP32;
    for (int64_t i = 0; i < num_tokens * hidden; ++i) {
        if (dx) dx[i] = 0;
        if (dx_size) dx_size[i] = 0;
    }
    for (int64_t i = 0; i < num_experts * hidden; ++i) {
        if (drouter) drouter[i] = 0;
        if (drouter_size) drouter_size[i] = 0;
    }
    for (int64_t t = 0; t < num_tokens; ++t)
        for (int64_t e = 0; e < num_experts; ++e) {
            const MOEI_REAL g = MOEI_REF(moe_ref_load)(
                d->dlogits, t * moei_ref_or(d->dlogits_stride, num_experts) + e, dtype);
            for (int64_t h = 0; h < hidden; ++h) {
                MOEI_REAL v;
                if (dx) {
                    v = g * MOEI_REF(moe_ref_load)(
                                f->w, e * moei_ref_or(f->w_stride, hidden) + h, f->w_dtype);
                    dx[t * hidden + h] += v;
                    if (dx_size) dx_size[t * hidden + h] += v < 0 ? -v : v;
                }
                if (drouter && g != 0) {
                    v = g * MOEI_REF(moe_ref_load)(
                                f->x, t * moei_ref_or(f->x_stride, hidden) + h, f->x_dtype);
                    drouter[e * hidden + h] += v;
                    if (drouter_size) drouter_size[e * hidden + h] += v < 0 ? -v : v;
                }
            }
        }
}
