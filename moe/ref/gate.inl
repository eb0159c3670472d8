/* gate.inl: the gate for one type of number; gate.h includes it twice. */

/* Returns l - max; 0 for equal infinities. */
MOE_HOST MOEI_REAL MOEI_REF(moei_ref_below)(MOEI_REAL l, MOEI_REAL max)
{
    return l == max ? 0 : l - max;
}

/* Writes ids and weights [T, K]; expert_count [E] and chunk_count [moe_num_chunks(T), E], which may
   be null. Returns the first token whose row holds a NaN, or -1. */
MOE_HOST int64_t MOEI_REF(moe_ref_gate)(const moe_ref_gate_desc* d, int32_t* ids,
                                        MOEI_REAL* weights, int32_t* expert_count,
                                        int32_t* chunk_count)
{
    const int num_experts = d->num_experts, top_k = d->top_k;
    const int64_t stride = moei_ref_or(d->logits_stride, num_experts);
    const int64_t chunks = moe_num_chunks(d->num_tokens);
    int64_t first_nan = -1;
    if (expert_count)
        for (int e = 0; e < num_experts; ++e) expert_count[e] = 0;
    if (chunk_count)
        for (int64_t i = 0; i < num_experts * chunks; ++i) chunk_count[i] = 0;

    for (int64_t t = 0; t < d->num_tokens; ++t) {
        int32_t* id = ids + t * top_k;
        MOEI_REAL* weight = weights + t * top_k;
        MOEI_REAL max = 0, sum = 0, total = 0;
        int has_nan = 0;
#define MOEI_LOGIT(e) MOEI_REF(moe_ref_load)(d->logits, t * stride + (e), d->logits_dtype)
        for (int e = 0; e < num_experts; ++e)
            if (MOEI_LOGIT(e) != MOEI_LOGIT(e)) has_nan = 1;
        if (has_nan) {
            for (int k = 0; k < top_k; ++k) {
                id[k] = -1;
                weight[k] = 0;
            }
            if (first_nan < 0) first_nan = t;
            continue;
        }

        /* each choice is the best of the experts that are ordered after the choice before */
        for (int k = 0; k < top_k; ++k) {
            int best = -1;
            for (int e = 0; e < num_experts; ++e) {
                const MOEI_REAL l = MOEI_LOGIT(e);
                const int left =
                    k == 0 || (id[k - 1] >= 0 && (l < MOEI_LOGIT(id[k - 1]) ||
                                                  (l == MOEI_LOGIT(id[k - 1]) && e > id[k - 1])));
                if (left && l > -(MOEI_REAL)INFINITY && (best < 0 || l > MOEI_LOGIT(best)))
                    best = e;
            }
            id[k] = best;
        }

        if (id[0] >= 0) max = MOEI_LOGIT(id[0]);
        if (d->score == MOE_SCORE_TOPK_SOFTMAX)
            for (int k = 0; k < top_k && id[k] >= 0; ++k)
                sum += exp(MOEI_REF(moei_ref_below)(MOEI_LOGIT(id[k]), max));
        else
            for (int e = 0; e < num_experts; ++e)
                sum += exp(MOEI_REF(moei_ref_below)(MOEI_LOGIT(e), max));
        for (int k = 0; k < top_k; ++k) {
            const MOEI_REAL l = id[k] >= 0 ? MOEI_LOGIT(id[k]) : 0;
            if (id[k] < 0) weight[k] = 0;
            else
                weight[k] = d->score == MOE_SCORE_SIGMOID
                                ? 1 / (1 + exp(-l))
                                : exp(MOEI_REF(moei_ref_below)(l, max)) / sum;
            total += weight[k];
        }
        for (int k = 0; k < top_k; ++k) {
            if (d->renormalize && total > 0) weight[k] /= total;
            if (d->scale != 0) weight[k] *= d->scale;
            if (id[k] < 0) continue;
            if (expert_count) ++expert_count[id[k]];
            if (chunk_count)
                ++chunk_count[t / moe_chunk_tokens(d->num_tokens) * num_experts + id[k]];
        }
#undef MOEI_LOGIT
    }
    return first_nan;
}
