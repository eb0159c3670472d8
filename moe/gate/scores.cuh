/* scores.cuh: what the gate with rules computes of a token's row in registers before it chooses:
   sums over the row, scores, merits, groups; and the sums of probabilities. Called by rules.cuh. An
   aligned group of lanes has the row. */
#ifndef MOE_GATE_SCORES_CUH
#define MOE_GATE_SCORES_CUH

#include "token.cuh"

/* Returns 1 / (one + 2^(shift - v * unit)) to a few ulp, where one is 2^shift: the sigmoid of v in
   units of `unit`, divided by 2^shift. For choosing (shift 0) and for sums. */
MOE_DEVICE float moei_gate_sigmoid_fast(float v, float unit, float one, float shift)
{
    return moei_reciprocal_fast(one + moei_exp2_fast(fmaf(v, -unit, shift)));
}

/* Returns whether one of a lane's logits may be NaN or infinite. The -inf of logits that the token
   does not see counts. */
MOE_DEVICE bool moei_gate_lane_odd(const float* v, const moei_gate_lanes w)
{
    float sum = v[0]; /* also infinite where finite ones are huge */
    MOE_UNROLL
    for (int j = 1; j < w.per_lane; ++j) sum += v[j];
    return (__float_as_uint(sum) & 0x7f800000u) == 0x7f800000u;
}

/* Returns whether one of a lane's logits is NaN. */
MOE_DEVICE bool moei_gate_lane_nan(const float* v, const moei_gate_lanes w)
{
    float nan = 0.0f;
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) nan += moei_is_nan(v[j]) ? v[j] : 0.0f;
    return moei_is_nan(nan);
}

/* Returns the sum of a token's exponentials e^(l - max) from its group of lanes. v: a lane's
   logits; max: the token's largest; both in units. The whole warp calls it. */
MOE_DEVICE float moei_gate_lane_exponentials(const float* v, float max,
                                             const moei_gate_units* units, const moei_gate_lanes w)
{
    const float shift = -(max * units->log2);
    float sum = 0.0f;
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) sum += moei_exp2_fast(fmaf(v[j], units->log2, shift));
    return moe_warp_sum(sum, w.lanes);
}

/* Returns the statistics of a token from its group of lanes. v: a lane's logits, -inf where the
   token does not see them; max: the token's largest; both in units. Sets `nan` for softmax scores
   alone, where the sum is NaN. The whole warp calls it.
     1. Sparsemax: search tau until no token of the warp changes it.
     2. Sigmoid: sum the probabilities, where prob_sum is given.
     3. Softmax of any kind: sum the exponentials; a NaN sum marks the token. */
MOE_DEVICE moei_gate_stats moei_gate_lane_stats(const moei_gate_args* d,
                                                const moei_gate_units* units, const float* v,
                                                float max, const moei_gate_lanes w)
{
    moei_gate_stats s;
    s.nan = false;
    s.max = max;
    s.sum = 0.0f;
    if (d->score == MOE_SCORE_SPARSEMAX) {
        const float whole = __fdiv_rn(1.0f, units->unit); /* what the scores sum up to, in units */
        moei_sparsemax search = moei_sparsemax_begin(whole);
        while (__any_sync(MOE_FULL_WARP, search.n < search.before)) {
            float part = 0.0f, above = 0.0f;
            MOE_UNROLL
            for (int j = 0; j < w.per_lane; ++j) {
                const float z = v[j] - s.max;
                const bool in = z > search.tau;
                part += in ? z : 0.0f;
                above += in ? 1.0f : 0.0f;
            }
            moei_sparsemax_step(&search, part, above, whole, w.lanes, 0);
        }
        s.sum = search.tau * units->unit;
    } else if (d->score == MOE_SCORE_SIGMOID) {
        if (d->prob_sum) {
            const float shift = units->log2 * moei_gate_sigmoid_shift(s.max);
            const float one = moei_exp2_fast(shift);
            MOE_UNROLL
            for (int j = 0; j < w.per_lane; ++j)
                s.sum += moei_gate_sigmoid_fast(v[j], units->log2, one, shift);
        }
        s.sum = moe_warp_sum(s.sum, w.lanes);
    } else {
        s.sum = moei_gate_lane_exponentials(v, s.max, units, w);
        s.nan = moei_is_nan(s.sum);
    }
    return s;
}

/* Returns lse, the logarithm of the sum of e^l over the experts that a token sees. offset: what the
   rules have subtracted from all logits. The whole warp calls it. */
MOE_DEVICE float moei_gate_lane_lse(const float* v, float offset, const moei_gate_args* d,
                                    const moei_gate_units* units, const moei_gate_stats* s,
                                    const moei_gate_lanes w)
{
    const float sum =
        moei_gate_is_softmax(d->score) ? s->sum : moei_gate_lane_exponentials(v, s->max, units, w);
    return offset + fmaf(s->max, units->unit, moei_gate_log(sum));
}

/* Computes the scores u of a lane's logits v, to a few ulp, for choosing. sums, a literal: 1
   computes the probabilities instead; those of sigmoids over 2^shift and not divided by their sum
   yet. */
MOE_DEVICE void moei_gate_lane_scores(float* u, const float* v, const moei_gate_args* d,
                                      const moei_gate_units* units, const moei_gate_stats* s,
                                      const int sums, const moei_gate_lanes w)
{
    if (d->score == MOE_SCORE_SIGMOID) {
        const float shift = sums ? units->log2 * moei_gate_sigmoid_shift(s->max) : 0.0f;
        const float one = sums ? moei_exp2_fast(shift) : 1.0f;
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j)
            u[j] = moei_gate_sigmoid_fast(v[j], units->log2, one, shift);
    } else if (d->score == MOE_SCORE_SPARSEMAX) {
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j)
            u[j] = fmaxf(fmaf(v[j] - s->max, units->unit, -s->sum), 0.0f);
    } else {
        const float shift = -(s->max * units->log2), part = __fdiv_rn(1.0f, s->sum);
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j)
            u[j] = part * moei_exp2_fast(fmaf(v[j], units->log2, shift));
    }
}

/* Sets the merits u to -inf outside the token's top_groups best groups. Without a bias, sets the
   others to their logits v: scores have chosen the groups alone. best [E / 4] and group [groups]
   are this token's in shared memory. The whole warp calls it.
     1. Write the two largest merits of each 4 experts to `best`.
     2. Write the score of each group, the mean of its two largest, to `group`.
     3. Rank the groups; `kept` has a bit for each of the top_groups best.
     4. Set the merits of all other groups to -inf. */
MOE_DEVICE void moei_gate_lane_groups(float* u, const float* v, const moei_gate_args* d,
                                      float2* best, float* group, const moei_gate_lanes w)
{
    const int num_groups = d->num_groups, size = d->num_experts / num_groups;
    const float none = __uint_as_float(0xff800000u), per_group = __fdividef(1.0f, (float)size);
    uint32_t kept = 0;
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; j += 4) {
        const int e = moei_gate_expert(j, w);
        const float a = fmaxf(u[j], u[j + 1]), b = fminf(u[j], u[j + 1]);
        const float c = fmaxf(u[j + 2], u[j + 3]), f = fminf(u[j + 2], u[j + 3]);
        if (e < d->num_experts)
            best[e >> 2] = make_float2(fmaxf(a, c), fmaxf(fminf(a, c), fmaxf(b, f)));
    }
    __syncwarp(MOE_FULL_WARP); /* best is complete */
    for (int g = w.rank; g < num_groups; g += w.lanes) {
        float first = none, second = none;
        for (int i = g * (size >> 2); i < (g + 1) * (size >> 2); ++i) {
            const float2 two = best[i];
            second = fmaxf(fminf(first, two.x), fmaxf(second, two.y));
            first = fmaxf(first, two.x);
        }
        /* halves do not overflow */
        group[g] = 0.5f * first + (second > none ? 0.5f * second : 0.0f);
    }
    __syncwarp(MOE_FULL_WARP); /* group is complete */
    for (int g = w.rank; g < num_groups; g += w.lanes) {
        const float own = group[g];
        int ahead = 0;
        for (int i = 0; i < num_groups; ++i) ahead += group[i] > own || (group[i] == own && i < g);
        kept |= (ahead < d->top_groups ? 1u : 0u) << g;
    }
    for (int by = 1; by < w.lanes; by <<= 1) kept |= __shfl_xor_sync(MOE_FULL_WARP, kept, by);
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; j += 4) {
        const int g = (int)(((float)moei_gate_expert(j, w) + 0.5f) * per_group);
        const bool in = (kept >> (g & 31) & 1) != 0;
        MOE_UNROLL
        for (int i = 0; i < 4; ++i) u[j + i] = !in ? none : d->expert_bias ? u[j + i] : v[j + i];
    }
}

/* Adds the probabilities p of a warp's tokens, one a group of lanes, to the warp's own prob [E] in
   shared memory. Each exchange halves the number of tokens: a lane passes one half of its experts
   to its partner and adds up the other half. Ends with __syncwarp. */
MOE_DEVICE void moei_gate_lane_add(float* p, float* prob, int num_experts, const moei_gate_lanes w)
{
    int from = 0;
    MOE_UNROLL
    for (int s = 0; s < 5; ++s) {
        const int by = 16 >> s, half = w.per_lane >> (s + 1);
        if (by >= w.lanes && half > 0) {
            const bool upper = (moe_lane() & by) != 0;
            MOE_UNROLL
            for (int j = 0; j < 16; ++j)
                if (j < half) {
                    const float pass = upper ? p[j] : p[j + half];
                    const float keep = upper ? p[j + half] : p[j];
                    p[j] = keep + __shfl_xor_sync(MOE_FULL_WARP, pass, by);
                }
            from += upper ? half : 0;
        }
    }
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j)
        if (j < w.per_lane * w.lanes / 32) {
            const int e = moei_gate_expert(from + j, w);
            if (e < num_experts) prob[e] += p[j];
        }
    __syncwarp(MOE_FULL_WARP);
}

/* Finds -inf and NaN among a lane's logits v. Adds the -inf ones to *unseen: a score or a bias
   would make a choice of them. Returns whether moei_gate_token must do the token again: a logit is
   NaN, or, where `overflows`, a seen logit is -inf, which may have been finite. */
MOE_DEVICE bool moei_gate_lane_minus(uint32_t* unseen, const float* v, bool overflows,
                                     const moei_gate_lanes w)
{
    uint32_t minus = 0;
    bool again;
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j)
        minus |= __float_as_uint(v[j]) == MOEI_GATE_MINUS ? 1u << j : 0u;
    again = moei_gate_lane_nan(v, w) || (overflows && (minus & ~*unseen) != 0);
    *unseen |= minus;
    return again;
}

/* Sets u to the merits, which selection compares, before groups. bias [E] in shared memory: the
   bias, or with whole_batch the batch's merits, which alone count then. */
MOE_DEVICE void moei_gate_lane_merits(float* u, const float* v, uint32_t unseen,
                                      const moei_gate_args* d, const moei_gate_units* units,
                                      const moei_gate_stats* s, const float* bias,
                                      const moei_gate_lanes w)
{
    /* scores choose the groups, and with a bias the experts */
    const bool scores = (d->expert_bias || d->num_groups > 1) && d->score != MOE_SCORE_TOPK_SOFTMAX;
    const bool biased = d->expert_bias || d->whole_batch;
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) u[j] = v[j];
    if (scores) moei_gate_lane_scores(u, v, d, units, s, 0, w);
    if (biased) {
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j) {
            const int e = moei_gate_expert(j, w);
            u[j] = (d->whole_batch ? 0.0f : u[j]) + (e < d->num_experts ? bias[e] : 0.0f);
        }
    }
    if ((scores || biased) && unseen) {
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j)
            if (unseen >> j & 1) u[j] = __uint_as_float(0xff800000u);
    }
}

/* Adds the probabilities of a token's logits v to the warp's own prob [E], where `in`. The whole
   warp calls it. */
MOE_DEVICE void moei_gate_lane_probabilities(float* prob, const float* v, uint32_t unseen, bool in,
                                             const moei_gate_args* d, const moei_gate_units* units,
                                             const moei_gate_stats* s, const moei_gate_lanes w)
{
    const float part = d->score != MOE_SCORE_SIGMOID ? 1.0f
                       : s->sum > 0.0f               ? __fdividef(1.0f, s->sum)
                                                     : 0.0f;
    float p[32];
    moei_gate_lane_scores(p, v, d, units, s, 1, w);
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) p[j] = in && !(unseen >> j & 1) ? p[j] * part : 0.0f;
    moei_gate_lane_add(p, prob, d->num_experts, w);
}

#endif
