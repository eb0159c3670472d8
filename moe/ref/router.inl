/* router.inl: the router for one type of number; router.h includes it twice. */

/* Writes logits [T, E]. */
MOE_HOST void MOEI_REF(moe_ref_router)(const moe_ref_router_desc* d, MOEI_REAL* logits)
{
    const int64_t x_stride = moei_ref_or(d->x_stride, d->hidden);
    const int64_t w_stride = moei_ref_or(d->w_stride, d->hidden);
    for (int64_t t = 0; t < d->num_tokens; ++t)
        for (int e = 0; e < d->num_experts; ++e) {
            MOEI_REAL sum = 0;
            for (int h = 0; h < d->hidden; ++h)
                sum += MOEI_REF(moe_ref_load)(d->x, t * x_stride + h, d->x_dtype) *
                       MOEI_REF(moe_ref_load)(d->w, e * w_stride + h, d->w_dtype);
            logits[t * d->num_experts + e] = sum;
        }
}
