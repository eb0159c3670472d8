/* gate_backward.inl: gradients of the gate for one type of number; gate_backward.h includes it
   twice. */

/* Adds to grad [E] the gradients by a token's logits after the rules, of its weights: id, g [K]:
   its choices and the gradients by their weights. */
MOE_HOST void MOEI_REF(moei_ref_weights_grad)(const moe_gate_desc* d,
                                              const MOEI_REF(moe_ref_row) * row, const int32_t* id,
                                              const MOEI_REAL* g, MOEI_REAL* grad)
{
    const int num_experts = d->num_experts, top_k = d->top_k;
    const MOEI_REAL scale = d->scale != 0 ? d->scale : 1;
    const int own = d->renormalize || d->score == MOE_SCORE_TOPK_SOFTMAX;
    const int softmax = d->score != MOE_SCORE_SIGMOID && d->score != MOE_SCORE_SPARSEMAX;
    MOEI_REAL* by_score = (MOEI_REAL*)calloc((size_t)num_experts, sizeof *by_score);
    MOEI_REAL most = -(MOEI_REAL)INFINITY, total = 0, mean = 0, dot = 0, support = 0;
    for (int k = 0; k < top_k; ++k)
        if (id[k] >= 0 && row->logit[id[k]] > most) most = row->logit[id[k]];
    if (d->score == MOE_SCORE_SIGMOID && most > 0) most = 0;
    for (int pass = 0; pass < 3; ++pass) /* total, mean, gradients: of the chosen alone */
        for (int k = 0; k < top_k; ++k) {
            const int e = id[k];
            MOEI_REAL u, l; /* score over a factor that the chosen share */
            if (e < 0) continue;
            l = row->logit[e];
            u = d->score == MOE_SCORE_SPARSEMAX ? row->score[e]
                : d->score == MOE_SCORE_SIGMOID ? 1 / (exp(most) + exp(most - l))
                                                : exp(l == most ? 0 : l - most);
            if (pass == 0) total += u;
            if (pass == 1 && own && total > 0) mean += u / total * g[k];
            if (pass < 2) continue;
            if (softmax && own) grad[e] += u / total * scale * (g[k] - mean);
            else if (d->score == MOE_SCORE_SIGMOID)
                grad[e] += (own ? u / total : row->score[e]) * scale * (g[k] - mean) / (1 + exp(l));
            else by_score[e] += (own ? 1 / total : 1) * scale * (g[k] - mean);
        }
    for (int e = 0; e < num_experts; ++e) {
        dot += (d->score == MOE_SCORE_SPARSEMAX ? row->score[e] > 0 : row->score[e]) * by_score[e];
        support += row->score[e] > 0;
    }
    for (int e = 0; e < num_experts; ++e) {
        if (d->score == MOE_SCORE_SPARSEMAX && row->score[e] > 0)
            grad[e] += by_score[e] - dot / support;
        if (softmax && row->score[e] > 0) grad[e] += row->score[e] * (by_score[e] - dot);
    }
    free(by_score);
}

/* Adds to grad [E] the gradients by a token's logits after the rules, of the balance losses and the
   z-loss. */
MOE_HOST void MOEI_REF(moei_ref_balance_grad)(const moe_gate_desc* d,
                                              const MOEI_REF(moe_ref_row) * row,
                                              const MOEI_REAL* balance_grad, MOEI_REAL* grad)
{
    const int num_experts = d->num_experts;
    const int sigmoid = d->score == MOE_SCORE_SIGMOID, sparsemax = d->score == MOE_SCORE_SPARSEMAX;
    const MOEI_REAL shift = row->max < 0 ? row->max : 0;
    MOEI_REAL sum = 0, scores = 0, dot = 0, support = 0;
    for (int e = 0; e < num_experts && sigmoid; ++e)
        if (row->seen[e]) scores += 1 / (exp(shift) + exp(shift - row->logit[e]));
    for (int pass = 0; pass < 2; ++pass) /* what the row shares, then each expert's own */
        for (int e = 0; e < num_experts; ++e) {
            const MOEI_REAL l = row->logit[e], c = balance_grad[e];
            MOEI_REAL p = row->score[e];
            if (!row->seen[e]) continue;
            if (sigmoid) p = 1 / (exp(shift) + exp(shift - l)) / scores;
            if (!(p > 0)) continue;
            if (pass == 0) {
                dot += sparsemax ? c : p * c;
                support += 1;
            } else if (sparsemax) {
                grad[e] += c - dot / support;
            } else {
                grad[e] += p * (c - dot) * (sigmoid ? 1 / (1 + exp(l)) : 1);
            }
        }
    for (int pass = 0; pass < 2; ++pass) /* the z-loss: the sum of e^(l - max), then gradients */
        for (int e = 0; e < num_experts; ++e) {
            const MOEI_REAL l = row->logit[e];
            const MOEI_REAL u = row->seen[e] ? exp(l == row->max ? 0 : l - row->max) : 0;
            if (pass == 0) sum += u;
            else if (u > 0 && balance_grad[num_experts] != 0)
                grad[e] += balance_grad[num_experts] * (row->max + log(sum)) * (u / sum);
        }
}

/* Writes dlogits [T, E]. ids [T, K]: the choices, -1 where unused; dweights [T, K] and balance_grad
   [E + 1]: gradients, which may be null.
   1. For each token: reads the logits, computes scores; a NaN or a disabled token has gradients 0.
   2. Adds up the gradients by the logits after the rules.
   3. Multiplies by the derivatives of square, cosine and temperature. */
MOE_HOST void MOEI_REF(moe_ref_gate_backward)(const moe_gate_desc* d, const int32_t* ids,
                                              const MOEI_REAL* dweights,
                                              const MOEI_REAL* balance_grad, MOEI_REAL* dlogits)
{
    const int num_experts = d->num_experts;
    const int dtype = d->logits_dtype ? d->logits_dtype : MOE_FP32;
    const int64_t stride = moei_ref_or(d->logits_stride, num_experts);
    MOEI_REF(moe_ref_row)* row = (MOEI_REF(moe_ref_row)*)malloc(sizeof *row);
    for (int64_t t = 0; t < d->num_tokens; ++t) {
        MOEI_REAL* grad = dlogits + t * num_experts;
        for (int e = 0; e < num_experts; ++e) grad[e] = 0;
        MOEI_REF(moei_ref_read)(d, t, row);
        if (row->nan || (d->token_disabled && d->token_disabled[t])) continue;
        MOEI_REF(moei_ref_score)(d, row);
        if (dweights) MOEI_REF(moei_ref_weights_grad)
        (d, row, ids + t * d->top_k, dweights + t * d->top_k, grad);
        if (balance_grad) MOEI_REF(moei_ref_balance_grad)(d, row, balance_grad, grad);
        for (int e = 0; e < num_experts; ++e) {
            MOEI_REAL q = MOEI_REF(moe_ref_load)(d->logits, t * stride + e, dtype);
            if (!row->seen[e] || grad[e] == 0) continue;
            if (d->temperature != 0) q = q / d->temperature;
            if (d->noise != 0) q += d->noise * MOEI_REF(moei_ref_normal)(d, t, e);
            if (d->score == MOE_SCORE_QUADRATIC) grad[e] *= 2 * q;
            if (d->score == MOE_SCORE_PIONEER) grad[e] *= -sin(2 * q);
            if (d->temperature != 0) grad[e] /= d->temperature;
        }
    }
    free(row);
}
