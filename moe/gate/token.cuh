/* token.cuh: one token by one warp: any E and K, every rule, ties, infinities and NaN.

   Reads the row again for each pass and each choice: from shared memory where rules have changed
   the row, else the logits as given. Covers all cases, but slowly. Called by moei_gate_any, and by
   the kernels that hold rows in registers for the few tokens that those kernels cannot do. */
#ifndef MOE_GATE_TOKEN_CUH
#define MOE_GATE_TOKEN_CUH

#include "../base/warp.cuh"
#include "logit.cuh"

/* What a token's weights need of its whole row. */
typedef struct moei_gate_stats {
    float max; /* largest logit that the token sees, in units */
    float sum; /* of e^(l - max); sigmoid: of the scores / e^shift; sparsemax: tau - max */
    bool nan;  /* a logit is NaN: the token chooses nothing */
} moei_gate_stats;

#define MOEI_GATE_UNSEEN 0xffffffffu /* bits of a logit that the token does not see */
#define MOEI_GATE_MINUS 0xff800000u  /* bits of -inf, which is no choice */

/* Writes the logits of token t, after the rules, to row [E] in shared memory. Logits that the token
   does not see, and -inf, become MOEI_GATE_UNSEEN. Returns what the rules have subtracted from all
   logits. The whole warp; row is its own. */
MOE_DEVICE float moei_gate_fill_row(const moei_gate_args* d, float* row, int64_t t)
{
    const uint64_t seed = moei_gate_seed(d);
    float v, most = __uint_as_float(MOEI_GATE_MINUS);
    if (moei_gate_subtracts_largest(d)) {
        MOE_NO_UNROLL
        for (int e = moe_lane(); e < d->num_experts; e += MOE_WARP_SIZE)
            if (moei_gate_given(&v, d, seed, t, e)) most = fmaxf(most, v);
        most = moe_warp_max(most, MOE_WARP_SIZE);
    }
    if (!(fabsf(most) < __uint_as_float(0x7f800000u))) most = 0.0f;
    __syncwarp(MOE_FULL_WARP); /* the row of the token before has been read */
    MOE_NO_UNROLL
    for (int e = moe_lane(); e < d->num_experts; e += MOE_WARP_SIZE) {
        const bool seen = moei_gate_given(&v, d, seed, t, e);
        if (seen) v = moei_gate_logit(d, v, most, seed, t, e);
        if (!seen || __float_as_uint(v) == MOEI_GATE_MINUS) v = __uint_as_float(MOEI_GATE_UNSEEN);
        else if (moei_is_nan(v)) v = __uint_as_float(0x7fc00000u);
        row[e] = v;
    }
    __syncwarp(MOE_FULL_WARP);
    return most * d->inverse_temperature;
}

/* Loads the logit of expert e; returns false where the token does not see e or the logit is -inf.
   rules, a literal: 1 reads row, 0 the logits as given. */
MOE_DEVICE bool moei_gate_see(float* v, const moei_gate_args* d, const float* row, int64_t t, int e,
                              const int rules)
{
    if (rules) {
        *v = row[e];
        return __float_as_uint(*v) != MOEI_GATE_UNSEEN;
    }
    *v = moe_load_f32(d->logits, t * d->logits_stride + e, d->logits_dtype);
    return __float_as_uint(*v) != MOEI_GATE_MINUS;
}

/* Reads the row of token t and returns its statistics, the same in all lanes. The whole warp.
     1. max, and whether a logit is NaN
     2. sparsemax: tau
     3. other scores: the sum */
MOE_DEVICE moei_gate_stats moei_gate_row_stats(const moei_gate_args* d, const float* row, int64_t t,
                                               const int rules)
{
    const int num_experts = d->num_experts;
    const bool sigmoid = d->score == MOE_SCORE_SIGMOID;
    const bool squared = rules && d->score == MOE_SCORE_QUADRATIC;
    moei_gate_stats s;
    float v, max = __uint_as_float(MOEI_GATE_MINUS), sum = 0.0f, shift, one, log2;
    bool nan = false;
    MOE_NO_UNROLL /* 1. max */
    for (int e = moe_lane(); e < num_experts; e += MOE_WARP_SIZE)
        if (moei_gate_see(&v, d, row, t, e, rules)) {
            nan = nan || moei_is_nan(v);
            if (moei_ordered(v) > moei_ordered(max)) max = v;
        }
    s.nan = __any_sync(MOE_FULL_WARP, nan) != 0;
    s.max = moe_warp_max(max, MOE_WARP_SIZE);
    if (rules && d->score == MOE_SCORE_SPARSEMAX) { /* 2. tau */
        const float unit = moei_gate_units_of(d).unit;
        moei_sparsemax search = moei_sparsemax_begin(1.0f);
        while (search.n < search.before && !s.nan) {
            float part = 0.0f, above = 0.0f;
            MOE_NO_UNROLL
            for (int e = moe_lane(); e < num_experts; e += MOE_WARP_SIZE)
                if (moei_gate_see(&v, d, row, t, e, rules)) {
                    const float z = moei_gate_below(v, s.max) * unit;
                    if (z > search.tau) part += z, above += 1.0f;
                }
            moei_sparsemax_step(&search, part, above, 1.0f, MOE_WARP_SIZE, 1);
        }
        s.sum = search.tau;
        return s;
    }
    shift = moei_gate_sigmoid_shift(s.max); /* 3. sum */
    log2 = rules ? moei_gate_units_of(d).log2 : 1.44269502f;
    one = moei_exp2_fast(log2 * shift);
    MOE_NO_UNROLL
    for (int e = moe_lane(); e < num_experts; e += MOE_WARP_SIZE)
        if (moei_gate_see(&v, d, row, t, e, rules)) {
            const float below = sigmoid ? shift - v : moei_gate_exponent(v, s.max, squared);
            const float x = moei_exp2_fast(log2 * below);
            sum += sigmoid ? __fdiv_rn(1.0f, one + x) : x;
        }
    s.sum = moe_warp_sum(sum, MOE_WARP_SIZE);
    return s;
}

/* Returns the sum of e^(l - max) over the experts that a token sees. The whole warp. */
MOE_DEVICE float moei_gate_row_exponentials(const moei_gate_args* d, const float* row,
                                            const moei_gate_stats* s)
{
    const float log2 = moei_gate_units_of(d).log2;
    float sum = 0.0f, v;
    if (moei_gate_is_softmax(d->score)) return s->sum;
    MOE_NO_UNROLL
    for (int e = moe_lane(); e < d->num_experts; e += MOE_WARP_SIZE)
        if (moei_gate_see(&v, d, row, 0, e, 1))
            sum += moei_exp2_fast(log2 * moei_gate_below(v, s->max));
    return moe_warp_sum(sum, MOE_WARP_SIZE);
}

/* Returns lse, the logarithm of the sum of e^l over the experts that a token sees; -inf where the
   token sees none. offset: as moei_gate_fill_row returns. The whole warp. */
MOE_DEVICE float moei_gate_row_lse(const moei_gate_args* d, const float* row, float offset,
                                   const moei_gate_stats* s)
{
    const float sum = moei_gate_row_exponentials(d, row, s);
    const float most =
        d->score == MOE_SCORE_QUADRATIC ? s->max * s->max : s->max * moei_gate_units_of(d).unit;
    return sum > 0.0f ? offset + most + moei_gate_log(sum) : __uint_as_float(MOEI_GATE_MINUS);
}

/* Adds lse^2 of a token to *z, of shared memory. A token that sees no expert adds nothing. The
   whole warp. */
MOE_DEVICE void moei_gate_add_z(const moei_gate_args* d, float* z, const float* row, float offset,
                                const moei_gate_stats* s)
{
    const float lse = moei_gate_row_lse(d, row, offset, s);
    if (moe_lane() == 0 && __float_as_uint(lse) != MOEI_GATE_MINUS) *z += lse * lse;
}

/* Returns the probability of an expert with logit v: the score over the sum of all scores. */
MOE_DEVICE float moei_gate_probability(const moei_gate_args* d, float v, const moei_gate_stats* s)
{
    const float unit = moei_gate_units_of(d).unit;
    if (d->score != MOE_SCORE_SIGMOID) return moei_gate_score(d, unit, v, s->max, s->sum);
    v = moei_gate_sigmoid(v, moei_gate_sigmoid_shift(s->max), unit);
    return s->sum > 0.0f ? __fdiv_rn(v, s->sum) : v;
}

/* Returns the merit of expert e with logit v: the logit; with a bias the score + the bias. Where
   `groups`, to compare groups: the score without a bias too. Top-k softmax: the logit as score. */
MOE_DEVICE float moei_gate_merit(const moei_gate_args* d, float v, int e, const moei_gate_stats* s,
                                 bool groups)
{
    if ((d->expert_bias || groups) && d->score != MOE_SCORE_TOPK_SOFTMAX)
        v = moei_gate_score(d, moei_gate_units_of(d).unit, v, s->max, s->sum);
    return d->expert_bias ? v + d->expert_bias[e] : v;
}

/* Returns whether a chosen expert is used. v: its logit after the rules, not in units. */
MOE_DEVICE bool moei_gate_used(const moei_gate_args* d, float v, float weight)
{
    return d->score == MOE_SCORE_SPARSEMAX ? weight > 0.0f
                                           : d->score != MOE_SCORE_SIGMOID || v >= d->least_logit;
}

/* Returns bits: bit g is set where the token may choose from group g. Compares half the sums of
   each group's two best merits; equals by ascending group. Lane g has group g. The whole warp. */
MOE_DEVICE uint32_t moei_gate_groups(const moei_gate_args* d, const float* row,
                                     const moei_gate_stats* s)
{
    const int num_groups = d->num_groups, size = d->num_experts / num_groups, g = moe_lane();
    const float none = __uint_as_float(0xff800000u);
    float best = none, second = none, v;
    int ahead = 0;
    MOE_NO_UNROLL
    for (int e = g * size; g < num_groups && e < (g + 1) * size; ++e)
        if (moei_gate_see(&v, d, row, 0, e, 1)) {
            v = moei_gate_merit(d, v, e, s, true);
            if (moei_is_nan(v)) continue; /* a NaN merit is not chosen */
            second = fmaxf(second, fminf(best, v));
            best = fmaxf(best, v);
        }
    best = 0.5f * best + (second > none ? 0.5f * second : 0.0f); /* halves do not overflow */
    for (int i = 0; i < num_groups; ++i) {
        const float other = __shfl_sync(MOE_FULL_WARP, best, i);
        ahead += other > best || (other == best && i < g);
    }
    return __ballot_sync(MOE_FULL_WARP, g < num_groups && ahead < d->top_groups);
}

/* Adds a token's probabilities to prob [E] in shared memory, which is this warp's own. */
MOE_DEVICE void moei_gate_add_probabilities(const moei_gate_args* d, float* prob, const float* row,
                                            const moei_gate_stats* s)
{
    float v;
    MOE_NO_UNROLL
    for (int e = moe_lane(); e < d->num_experts; e += MOE_WARP_SIZE)
        if (moei_gate_see(&v, d, row, 0, e, 1)) prob[e] += moei_gate_probability(d, v, s);
}

/* Writes unused choices of token t, id -1 and weight 0: first, first + step, ... */
MOE_DEVICE void moei_gate_unused(const moei_gate_args* d, int64_t t, int first, int step)
{
    for (int k = first; k < d->top_k; k += step) {
        d->ids[t * d->top_k + k] = -1;
        d->weights[t * d->top_k + k] = 0.0f;
    }
}

/* Returns whether the weights of the chosen are divided by their own sum. A factor that they share
   then cancels, so exponents are taken relative to the largest logit of the chosen, not of the row.
   A bias, groups or the whole batch may choose logits far below the row's largest. */
MOE_DEVICE bool moei_gate_own_sum(const moei_gate_args* d)
{
    return d->score == MOE_SCORE_TOPK_SOFTMAX || d->renormalize != 0;
}

/* Replaces the logits of the chosen in d->weights by weights, and counts the experts used. The
   whole warp; ids and weights that the warp wrote must be visible to all its lanes. */
MOE_DEVICE void moei_gate_finish(const moei_gate_args* d, int* count, int64_t t,
                                 const moei_gate_stats* s, const int rules)
{
    const int top_k = d->top_k;
    const bool own = moei_gate_own_sum(d);
    const float unit = rules ? moei_gate_units_of(d).unit : 1.0f;
    const float sum = own && d->score != MOE_SCORE_SPARSEMAX ? 1.0f : s->sum;
    int32_t* ids = d->ids + t * top_k;
    float *weights = d->weights + t * top_k, total = 0.0f, max = s->max;
    if (own && d->score != MOE_SCORE_SPARSEMAX) {
        float most = __uint_as_float(0xff800000u);
        for (int k = moe_lane(); k < top_k; k += MOE_WARP_SIZE)
            if (ids[k] >= 0) most = fmaxf(most, weights[k]);
        most = moe_warp_max(most, MOE_WARP_SIZE);
        if (most > __uint_as_float(MOEI_GATE_MINUS)) max = most;
    }
    for (int k = moe_lane(); k < top_k; k += MOE_WARP_SIZE)
        if (ids[k] >= 0) {
            const float w = moei_gate_weight(d, unit, weights[k], max, sum);
            const bool used = !rules || moei_gate_used(d, weights[k] * unit, w);
            if (used) total += w;
            if (used) atomicAdd(count + ids[k], 1);
            else ids[k] = -1;
            weights[k] = used ? w : 0.0f;
        }
    total = own ? moe_warp_sum(total, MOE_WARP_SIZE) /* short sums: one long sum rounds K times */
                : 0.0f;
    for (int k = moe_lane(); k < top_k; k += MOE_WARP_SIZE)
        weights[k] = (total > 0.0f ? __fdiv_rn(weights[k], total) : weights[k]) * d->scale;
}

/* Chooses and weighs for token t. The whole warp. count, prob, row [E] and z are in shared memory;
   prob (with prob_sum), row and z (with z_sum) are this warp's own. rules is a literal; 0 uses
   neither these nor chosen.
     1. the row after the rules, and its statistics; a NaN: the token chooses nothing; lse^2
     2. whole_batch: the choices are chosen [K]
     3. else each choice is the best merit that follows the choice before, by descending merit,
        equals by ascending expert. d->weights holds the logits of the chosen
     4. weights and counts; probabilities */
MOE_DEVICE void moei_gate_token(const moei_gate_args* d, int* count, float* prob, float* row,
                                float* z, const int32_t* chosen, int t, const int rules)
{
    const int num_experts = d->num_experts, top_k = d->top_k;
    const int group = rules ? num_experts / d->num_groups : num_experts;
    uint32_t last = MOE_FULL_WARP, groups = MOE_FULL_WARP;
    int last_at = -1;
    float offset = 0.0f;
    moei_gate_stats s;
    if (rules) offset = moei_gate_fill_row(d, row, t); /* 1. */
    s = moei_gate_row_stats(d, row, t, rules);
    if (s.nan) {
        moei_gate_unused(d, t, moe_lane(), MOE_WARP_SIZE);
        if (moe_lane() == 0) moe_fault_raise(d->fault, MOE_FAULT_NAN_LOGIT, d->rank, (uint32_t)t);
        return;
    }
    if (rules && d->z_sum) moei_gate_add_z(d, z, row, offset, &s);
    if (rules && d->whole_batch) { /* 2. */
        for (int k = moe_lane(); k < top_k; k += MOE_WARP_SIZE) {
            float v = 0.0f;
            const bool seen = chosen[k] >= 0 && moei_gate_see(&v, d, row, t, chosen[k], 1);
            d->ids[(int64_t)t * top_k + k] = seen ? chosen[k] : -1;
            d->weights[(int64_t)t * top_k + k] = seen ? v : 0.0f;
        }
    }
    if (rules && d->num_groups > 1) groups = moei_gate_groups(d, row, &s); /* 3. */
    MOE_NO_UNROLL
    for (int k = 0; k < top_k && !(rules && d->whole_batch); ++k) {
        uint32_t best = 0;
        int best_at = num_experts;
        float v, best_v = 0.0f;
        MOE_NO_UNROLL
        for (int e = moe_lane(); e < num_experts; e += MOE_WARP_SIZE) {
            if (rules && !(groups >> (e / group) & 1)) continue;
            if (moei_gate_see(&v, d, row, t, e, rules)) {
                const float merit = rules ? moei_gate_merit(d, v, e, &s, false) : v;
                const uint32_t key = moei_is_nan(merit) ? 0 : moei_ordered(merit);
                if ((key < last || (key == last && e > last_at)) && key > best) {
                    best = key;
                    best_at = e;
                    best_v = v;
                }
            }
        }
        for (int w = 16; w > 0; w >>= 1) {
            const uint32_t other = __shfl_xor_sync(MOE_FULL_WARP, best, w);
            const int other_at = __shfl_xor_sync(MOE_FULL_WARP, best_at, w);
            const float other_v = __shfl_xor_sync(MOE_FULL_WARP, best_v, w);
            if (other > best || (other == best && other_at < best_at)) {
                best = other;
                best_at = other_at;
                best_v = other_v;
            }
        }
        if (best_at == num_experts) { /* no expert is left */
            moei_gate_unused(d, t, k + moe_lane(), MOE_WARP_SIZE);
            break;
        }
        last = best;
        last_at = best_at;
        if (moe_lane() == 0) {
            d->ids[(int64_t)t * top_k + k] = best_at;
            d->weights[(int64_t)t * top_k + k] = best_v;
        }
    }
    __syncwarp(MOE_FULL_WARP); /* 4.; the lanes read ids and weights that other lanes wrote */
    moei_gate_finish(d, count, t, &s, rules);
    if (rules && d->prob_sum) moei_gate_add_probabilities(d, prob, row, &s);
}

#endif
