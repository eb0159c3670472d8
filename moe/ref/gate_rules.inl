/* gate_rules.inl: the gate with rules for one type of number; gate_rules.h includes it twice. */

/* One token's row after the rules. */
typedef struct MOEI_REF(moe_ref_row) {
    MOEI_REAL logit[MOE_MAX_EXPERTS]; /* of the experts that the token sees */
    MOEI_REAL score[MOE_MAX_EXPERTS]; /* after softmax, sigmoid or sparsemax; 0 where not seen */
    MOEI_REAL merit[MOE_MAX_EXPERTS]; /* what selection compares */
    int seen[MOE_MAX_EXPERTS];        /* 0: the token does not see the expert */
    int open[MOE_MAX_EXPERTS];        /* 0: not seen, group not kept, merit NaN, or chosen
                                         already */
    MOEI_REAL tau;                    /* threshold of sparsemax */
    MOEI_REAL max;                    /* largest logit of a seen expert */
    int nan;                          /* 1: a seen logit is NaN */
} MOEI_REF(moe_ref_row);

/* Returns the standard normal number of token t and expert e, after Box and Muller. */
MOE_HOST MOEI_REAL MOEI_REF(moei_ref_normal)(const moe_gate_desc* d, int64_t t, int e)
{
    const moe_random4 r = moei_ref_words(d, t, e / 4, MOE_GATE_STREAM_NOISE);
    const uint32_t a = e & 2 ? r.z : r.x, b = e & 2 ? r.w : r.y;
    const double pi = 3.14159265358979323846;
    const double radius = sqrt(-2 * log(((double)a + 0.5) / 4294967296.0));
    const double angle = pi * (double)(int32_t)b / 2147483648.0;
    return (MOEI_REAL)(radius * (e & 1 ? sin(angle) : cos(angle)));
}

/* Reads a token's logits: fills in row->logit, seen and nan. */
MOE_HOST void MOEI_REF(moei_ref_read)(const moe_gate_desc* d, int64_t t,
                                      MOEI_REF(moe_ref_row) * row)
{
    const int dtype = d->logits_dtype ? d->logits_dtype : MOE_FP32;
    const int64_t stride = moei_ref_or(d->logits_stride, d->num_experts);
    row->nan = 0;
    for (int e = 0; e < d->num_experts; ++e) {
        MOEI_REAL l = MOEI_REF(moe_ref_load)(d->logits, t * stride + e, dtype);
        row->seen[e] = !(d->expert_disabled && d->expert_disabled[e]) &&
                       !(d->dropout > 0 && moei_ref_dropped(d, t, e));
        if (l == -(MOEI_REAL)INFINITY && d->score != MOE_SCORE_QUADRATIC &&
            d->score != MOE_SCORE_PIONEER)
            row->seen[e] = 0; /* not chosen, and score 0 */
        if (d->temperature != 0) l = l / d->temperature;
        if (d->noise != 0) l += d->noise * MOEI_REF(moei_ref_normal)(d, t, e);
        if (d->score == MOE_SCORE_QUADRATIC) l = l * l;
        if (d->score == MOE_SCORE_PIONEER)
            l = fabs(l) < MOE_GATE_MAX_COSINE ? (MOEI_REAL)(cos(l) * cos(l)) : (MOEI_REAL)NAN;
        row->logit[e] = l;
        if (row->seen[e] && l != l) row->nan = 1;
    }
}

/* Fills in row->score, max and tau. Top-k softmax is a softmax over all experts here, as are its
   probabilities. */
MOE_HOST void MOEI_REF(moei_ref_score)(const moe_gate_desc* d, MOEI_REF(moe_ref_row) * row)
{
    const int num_experts = d->num_experts;
    MOEI_REAL max = -(MOEI_REAL)INFINITY, sum = 0;
    for (int e = 0; e < num_experts; ++e)
        if (row->seen[e] && row->logit[e] > max) max = row->logit[e];
    row->tau = -1;
    row->max = max;
    if (d->score == MOE_SCORE_SPARSEMAX) { /* raises tau until the same experts stay above it */
        int above = num_experts + 1, before; /* more experts than E */
        do {
            MOEI_REAL part = 0;
            before = above;
            above = 0;
            for (int e = 0; e < num_experts; ++e) {
                const MOEI_REAL z = row->logit[e] == max ? 0 : row->logit[e] - max;
                if (row->seen[e] && z > row->tau) part += z, ++above;
            }
            if (above) row->tau = (part - 1) / above;
        } while (above < before && above);
    }
    for (int e = 0; e < num_experts; ++e) {
        const MOEI_REAL z = row->logit[e] == max ? 0 : row->logit[e] - max;
        if (!row->seen[e]) row->score[e] = 0;
        else if (d->score == MOE_SCORE_SIGMOID) row->score[e] = 1 / (1 + exp(-row->logit[e]));
        else if (d->score == MOE_SCORE_SPARSEMAX) row->score[e] = z > row->tau ? z - row->tau : 0;
        else row->score[e] = exp(z);
        sum += row->score[e];
    }
    if (d->score != MOE_SCORE_SIGMOID && d->score != MOE_SCORE_SPARSEMAX && sum > 0)
        for (int e = 0; e < num_experts; ++e) row->score[e] /= sum;
}

/* Lowers *margin to |a - b|, unless that is 0. */
MOE_HOST void MOEI_REF(moei_ref_near)(MOEI_REAL* margin, MOEI_REAL a, MOEI_REAL b)
{
    const MOEI_REAL gap = a > b ? a - b : b - a;
    if (gap > 0 && gap < *margin) *margin = gap;
}

/* Lowers *margin for two experts a and b of equal merit: to 0 where another precision may tell them
   apart. Equal logits and biases stay equal; so do scores of 0, with sparsemax while both are below
   tau. */
MOE_HOST void MOEI_REF(moei_ref_tie)(const moe_gate_desc* d, const MOEI_REF(moe_ref_row) * row,
                                     int a, int b, MOEI_REAL* margin)
{
    const int bias = !d->expert_bias || d->expert_bias[a] == d->expert_bias[b];
    if (bias && row->logit[a] == row->logit[b]) return;
    if (bias && row->score[a] == 0 && row->score[b] == 0 && d->score != MOE_SCORE_TOPK_SOFTMAX) {
        if (d->score != MOE_SCORE_SPARSEMAX) return;
        if (row->logit[a] - row->max < row->tau && row->logit[b] - row->max < row->tau) {
            MOEI_REF(moei_ref_near)(margin, row->logit[a] - row->max, row->tau);
            MOEI_REF(moei_ref_near)(margin, row->logit[b] - row->max, row->tau);
            return;
        }
    }
    *margin = 0;
}

/* Fills in row->merit and open: merits, and the experts that the groups leave open. */
MOE_HOST void MOEI_REF(moei_ref_merit)(const moe_gate_desc* d, MOEI_REF(moe_ref_row) * row,
                                       MOEI_REAL* margin)
{
    const int num_experts = d->num_experts, num_groups = d->num_groups ? d->num_groups : 1,
              size = num_experts / num_groups;
    const int keep = d->top_groups ? d->top_groups : num_groups;
    const int scores = d->score != MOE_SCORE_TOPK_SOFTMAX;
    MOEI_REAL group[MOE_GATE_MAX_GROUPS];
    int two[MOE_GATE_MAX_GROUPS][2]; /* the two best of a group, -1: none */
    for (int e = 0; e < num_experts; ++e) { /* first the merits that groups are compared by */
        row->merit[e] = scores ? row->score[e] : row->logit[e];
        if (d->expert_bias) row->merit[e] += d->expert_bias[e];
        row->open[e] = row->seen[e] && row->merit[e] == row->merit[e]; /* a NaN is never chosen */
    }
    for (int g = 0; g < num_groups; ++g) {
        int best = -1, second = -1;
        for (int e = g * size; e < (g + 1) * size; ++e) {
            if (!row->open[e]) continue;
            if (best < 0 || row->merit[e] > row->merit[best]) second = best, best = e;
            else if (second < 0 || row->merit[e] > row->merit[second]) second = e;
        }
        group[g] = best < 0 ? -(MOEI_REAL)INFINITY : row->merit[best];
        if (second >= 0 && !(row->merit[second] > -(MOEI_REAL)INFINITY)) second = -1;
        if (second >= 0) group[g] += row->merit[second];
        two[g][0] = best, two[g][1] = second;
    }
    for (int e = 0; e < num_experts && !d->expert_bias; ++e) row->merit[e] = row->logit[e];
    for (int g = 0; g < num_groups && keep < num_groups; ++g) {
        int ahead = 0;
        for (int i = 0; i < num_groups; ++i)
            ahead += group[i] > group[g] || (group[i] == group[g] && i < g);
        for (int i = 0; i < num_groups; ++i) {
            MOEI_REF(moei_ref_near)(margin, group[g], group[i]);
            if (i == g || group[i] != group[g]) continue;
            for (int n = 0; n < 2; ++n) { /* sums that another rounding may tell apart */
                if (two[g][n] >= 0 && two[i][n] >= 0 &&
                    row->merit[two[g][n]] == row->merit[two[i][n]])
                    MOEI_REF(moei_ref_tie)(d, row, two[g][n], two[i][n], margin);
                else if (two[g][n] >= 0 || two[i][n] >= 0) *margin = 0;
            }
        }
        for (int e = g * size; e < (g + 1) * size && ahead >= keep; ++e) row->open[e] = 0;
    }
}

/* Returns the open expert of the largest merit, of equal ones the smallest index; -1: none is
   open. */
MOE_HOST int MOEI_REF(moei_ref_best)(const MOEI_REF(moe_ref_row) * row, int num_experts)
{
    int best = -1;
    for (int e = 0; e < num_experts; ++e)
        if (row->open[e] && (best < 0 || row->merit[e] > row->merit[best])) best = e;
    return best;
}

/* Returns lse, the logarithm of the sum of e^l over the experts that a token sees; -infinity where
   the token sees none. row->max is filled in. */
MOE_HOST MOEI_REAL MOEI_REF(moei_ref_lse)(const MOEI_REF(moe_ref_row) * row, int num_experts)
{
    MOEI_REAL sum = 0;
    for (int e = 0; e < num_experts; ++e)
        if (row->seen[e]) sum += exp(row->logit[e] == row->max ? 0 : row->logit[e] - row->max);
    return sum > 0 ? row->max + (MOEI_REAL)log(sum) : -(MOEI_REAL)INFINITY;
}

/* Writes ids and weights [T, K]; prob_sum [E], z_sum [1] and margin [T], which may be null. margin
   is the smallest difference that decided a token's choices: an implementation whose rounding
   errors are larger may choose otherwise. With whole_batch the differences are divided by 1 + the
   sum over the tokens of the mean absolute logit.

   1. whole_batch: sums the logits over the tokens and chooses for the batch.
   2. For each token: reads the logits, computes scores and merits, adds to prob_sum and z_sum.
   3. Chooses the K largest merits, then drops those below the threshold or, with sparsemax, of
      score 0.
   4. Renormalizes and scales the weights. */
MOE_HOST void MOEI_REF(moe_ref_gate_rules)(const moe_gate_desc* d, int32_t* ids, MOEI_REAL* weights,
                                           MOEI_REAL* prob_sum, MOEI_REAL* z_sum, MOEI_REAL* margin)
{
    const int num_experts = d->num_experts, top_k = d->top_k;
    MOEI_REF(moe_ref_row)* row = (MOEI_REF(moe_ref_row)*)malloc(sizeof *row);
    int32_t* batch = (int32_t*)malloc((size_t)top_k * 4);
    MOEI_REAL batch_margin = 1e30f;
    if (d->whole_batch) {
        const int dtype = d->logits_dtype ? d->logits_dtype : MOE_FP32;
        const int64_t stride = moei_ref_or(d->logits_stride, num_experts);
        MOEI_REF(moe_ref_row)* sum = (MOEI_REF(moe_ref_row)*)calloc(1, sizeof *sum);
        MOEI_REAL size = 0, last = 0;
        int last_at = -1;
        for (int64_t t = 0; t < d->num_tokens; ++t) {
            MOEI_REF(moei_ref_read)(d, t, row);
            if (row->nan || (d->token_disabled && d->token_disabled[t])) continue;
            for (int e = 0; e < num_experts; ++e) {
                const MOEI_REAL l = MOEI_REF(moe_ref_load)(d->logits, t * stride + e, dtype);
                sum->merit[e] += l;
                size += (l < 0 ? -l : l) / num_experts;
            }
        }
        for (int e = 0; e < num_experts;
             ++e) /* neither -infinity nor NaN is chosen */
            sum->open[e] = !(d->expert_disabled && d->expert_disabled[e]) &&
                           sum->merit[e] > -(MOEI_REAL)INFINITY;
        for (int k = 0, more = 1; more; ++k) { /* K choices and those equal to the K-th */
            const int e = MOEI_REF(moei_ref_best)(sum, num_experts);
            if (k < top_k) batch[k] = e;
            more = k < top_k || (e >= 0 && sum->merit[e] / (size + 1) == last);
            if (e < 0) continue;
            if (k > 0) MOEI_REF(moei_ref_near)(&batch_margin, last, sum->merit[e] / (size + 1));
            if (k > 0 && last == sum->merit[e] / (size + 1)) /* a tie only of equal logits */
                for (int64_t t = 0; t < d->num_tokens; ++t)
                    if (MOEI_REF(moe_ref_load)(d->logits, t * stride + e, dtype) !=
                        MOEI_REF(moe_ref_load)(d->logits, t * stride + last_at, dtype))
                        batch_margin = 0;
            last = sum->merit[e] / (size + 1);
            last_at = e;
            sum->open[e] = 0;
        }
        free(sum);
    }
    for (int e = 0; prob_sum && e < num_experts; ++e) prob_sum[e] = 0;
    if (z_sum) *z_sum = 0;
    for (int64_t t = 0; t < d->num_tokens; ++t) {
        MOEI_REAL near = batch_margin, total = 0, last = 0;
        int32_t* id = ids + t * top_k;
        MOEI_REAL* weight = weights + t * top_k;
        MOEI_REAL scores = 0, shift, lse;
        int last_at = -1;
        for (int k = 0; k < top_k; ++k) id[k] = -1, weight[k] = 0;
        if (margin) margin[t] = near;
        MOEI_REF(moei_ref_read)(d, t, row);
        if (row->nan || (d->token_disabled && d->token_disabled[t])) continue;
        MOEI_REF(moei_ref_score)(d, row);
        MOEI_REF(moei_ref_merit)(d, row, &near);
        lse = MOEI_REF(moei_ref_lse)(row, num_experts);
        if (z_sum && lse > -(MOEI_REAL)INFINITY) *z_sum += lse * lse;
        shift = row->max < 0 ? row->max : 0; /* scales sigmoids that would all underflow */
        for (int e = 0; e < num_experts; ++e)
            if (row->seen[e]) scores += 1 / (exp(shift) + exp(shift - row->logit[e]));
        for (int e = 0; prob_sum && e < num_experts; ++e)
            if (row->seen[e])
                prob_sum[e] += d->score == MOE_SCORE_SIGMOID
                                   ? 1 / (exp(shift) + exp(shift - row->logit[e])) / scores
                                   : row->score[e];
        for (int k = 0, more = 1; more; ++k) { /* K choices and those equal to the K-th */
            const int own = MOEI_REF(moei_ref_best)(row, num_experts);
            const int e = d->whole_batch ? (k < top_k ? batch[k] : -1) : own;
            int used;
            more = k < top_k || (e >= 0 && row->merit[e] == last);
            if (e < 0 || !row->seen[e]) continue;
            if (k > 0 && !d->whole_batch) {
                MOEI_REF(moei_ref_near)(&near, last, row->merit[e]);
                if (last == row->merit[e] && d->expert_bias)
                    MOEI_REF(moei_ref_tie)(d, row, last_at, e, &near);
            }
            last = row->merit[e];
            last_at = e;
            row->open[e] = 0;
            if (k >= top_k) continue;
            used = d->score != MOE_SCORE_SPARSEMAX || row->score[e] > 0;
            if (d->score == MOE_SCORE_SPARSEMAX) {
                MOEI_REF(moei_ref_near)(&near, row->logit[e] - row->max, row->tau);
                if (row->logit[e] - row->max == row->tau) near = 0; /* at the threshold */
            }
            if (d->threshold > 0) {
                const double at = log((double)d->threshold / (1 - (double)d->threshold));
                used = row->logit[e] >= at;
                MOEI_REF(moei_ref_near)(&near, row->logit[e], (MOEI_REAL)at);
            }
            if (!used) continue;
            id[k] = e;
            weight[k] = row->score[e];
            total += weight[k];
        }
        if ((d->renormalize || d->score == MOE_SCORE_TOPK_SOFTMAX) &&
            d->score != MOE_SCORE_SPARSEMAX) { /* even the largest chosen score may underflow */
            const int sigmoid = d->score == MOE_SCORE_SIGMOID;
            MOEI_REAL most = -(MOEI_REAL)INFINITY;
            for (int k = 0; k < top_k; ++k)
                if (id[k] >= 0 && row->logit[id[k]] > most) most = row->logit[id[k]];
            if (sigmoid && most > 0) most = 0;
            total = 0;
            for (int k = 0; k < top_k; ++k) {
                const MOEI_REAL l = id[k] >= 0 ? row->logit[id[k]] : 0;
                if (id[k] >= 0)
                    weight[k] =
                        sigmoid ? 1 / (exp(most) + exp(most - l)) : exp(l == most ? 0 : l - most);
                total += weight[k];
            }
        }
        for (int k = 0; k < top_k; ++k) {
            if ((d->renormalize || d->score == MOE_SCORE_TOPK_SOFTMAX) && total > 0)
                weight[k] /= total;
            if (d->scale != 0) weight[k] *= d->scale;
        }
        if (margin) margin[t] = near;
    }
    free(row);
    free(batch);
}
