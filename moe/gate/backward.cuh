/* backward.cuh: gradients by a token's logits: of its weights, the balance losses and the z-loss
   (gate_backward.cuh). Called by the kernels of gate_backward.cuh.

   A group of lanes or a warp has a token. The row of gradients is built in shared memory, in two
   steps. First each lane writes the part that depends on the whole row, for its own experts. Then
   the lanes add what depends on the choices alone. */
#ifndef MOE_GATE_BACKWARD_IMPL_CUH
#define MOE_GATE_BACKWARD_IMPL_CUH

#include "scores.cuh"

/* The argument of the backward kernels: moe_gate_backward_desc with its defaults filled in. */
typedef struct moei_gate_backward_args {
    moei_gate_args gate;       /* of the gate's call; prob_sum: not null where balance_grad is */
    const float* dweights;     /* [T, K]; or null */
    const float* balance_grad; /* [E + 1]; or null */
    void* dlogits;             /* [T, E] dlogits_dtype */
    int64_t dlogits_stride;    /* elements between rows, >= E */
    int32_t dlogits_dtype;     /* moe_dtype, not 0 */
    int32_t has_row;           /* 1: gradients depend on the whole row, not on the choices alone */
} moei_gate_backward_args;

/* A choice of a token. */
typedef struct moei_gate_choice {
    int e;        /* expert; -1: unused */
    float weight; /* as the gate wrote it */
    float grad;   /* gradient by the weight */
} moei_gate_choice;

/* What a lane holds of its token. */
typedef struct moei_gate_back {
    int64_t t;              /* the token; where none is left, the last */
    bool exists, live;      /* the token exists; it is not disabled either: else gradients are 0 */
    int rank, width;        /* this lane's number among the token's lanes; their number */
    moei_gate_choice first; /* the token's choice `rank` */
    float dot;              /* sum over the used choices of weight * gradient */
    float mean;             /* subtracted from the gradients by renormalisation; else 0 */
    float factor;           /* sparsemax: gradient by a score / gradient by its weight */
    float all;              /* sparsemax: sum of the gradients by the scores of the chosen */
} moei_gate_back;

/* Returns x * y, or 0 where x is 0: the limit for an infinite y. */
MOE_DEVICE float moei_gate_times(float x, float y) { return x == 0.0f ? 0.0f : x * y; }

/* Returns x times the derivative of quadratic's square or pioneer's cosine at q. 2 q may overflow
   where the product does not. */
MOE_DEVICE float moei_gate_back_sloped(int score, float x, float q)
{
    if (score == MOE_SCORE_QUADRATIC) return moei_gate_times(2.0f * x, q);
    return moei_gate_times(x, moei_gate_slope(score, q));
}

/* Returns choice k of the token. An id out of range sets the fault word and is unused. */
MOE_DEVICE moei_gate_choice moei_gate_back_choice(const moei_gate_backward_args* a,
                                                  const moei_gate_back* o, int k)
{
    const moei_gate_args* d = &a->gate;
    moei_gate_choice c = {-1, 0.0f, 0.0f};
    if (o->live && k < d->top_k) {
        const int64_t slot = o->t * d->top_k + k;
        c.e = d->ids[slot];
        c.weight = d->weights[slot];
        if (a->dweights) c.grad = a->dweights[slot];
        if (c.e < -1 || c.e >= d->num_experts) {
            moe_fault_raise(d->fault, MOE_FAULT_BAD_ID, d->rank, slot);
            c.e = -1;
        }
    }
    return c;
}

/* Returns the begin of token t for lane `rank` of `width`, with its first choice. */
MOE_DEVICE moei_gate_back moei_gate_back_begin(const moei_gate_backward_args* a, int64_t t,
                                               int rank, const int width)
{
    const moei_gate_args* d = &a->gate;
    moei_gate_back o;
    o.exists = t < d->num_tokens;
    o.t = o.exists ? t : d->num_tokens - 1;
    o.live = o.exists && !(d->token_disabled && d->token_disabled[t]);
    o.rank = rank;
    o.width = width;
    o.dot = o.mean = o.all = 0.0f;
    o.factor = d->scale;
    o.first = moei_gate_back_choice(a, &o, rank);
    return o;
}

/* Sums weight * gradient over the token's used choices; sets the mean where their own sum divides
   the weights. The whole warp calls it. */
MOE_DEVICE void moei_gate_back_sum(const moei_gate_backward_args* a, moei_gate_back* o)
{
    float total = 0.0f, dot = 0.0f;
    moei_gate_choice c = o->first;
    MOE_NO_UNROLL
    for (int k = o->rank; k < a->gate.top_k; k += o->width) {
        if (k != o->rank) c = moei_gate_back_choice(a, o, k);
        if (c.e >= 0) {
            total += c.weight;
            dot = fmaf(c.weight, c.grad, dot);
        }
    }
    o->dot = moe_warp_sum(dot, o->width);
    if (moei_gate_own_sum(&a->gate)) {
        total = moe_warp_sum(total, o->width);
        o->mean = total != 0.0f ? __fdiv_rn(o->dot, total) : 0.0f;
    }
}

/* Sets factor and `all` of sparsemax. row [E] in shared memory: the token's logits in units, read
   with renormalisation alone. The whole warp calls it. */
MOE_DEVICE void moei_gate_back_sparsemax(const moei_gate_backward_args* a, moei_gate_back* o,
                                         const moei_gate_units* units, const moei_gate_stats* s,
                                         const float* row)
{
    const moei_gate_args* d = &a->gate;
    float scores = 0.0f, all = 0.0f;
    moei_gate_choice c = o->first;
    MOE_NO_UNROLL
    for (int k = o->rank; k < d->top_k; k += o->width) {
        if (k != o->rank) c = moei_gate_back_choice(a, o, k);
        if (c.e >= 0) {
            if (d->renormalize) scores += moei_gate_score(d, units->unit, row[c.e], s->max, s->sum);
            all += c.grad - o->mean;
        }
    }
    scores = moe_warp_sum(scores, o->width);
    if (scores > 0.0f) o->factor = __fdiv_rn(d->scale, scores);
    o->all = o->factor * moe_warp_sum(all, o->width);
}

/* Returns the part of the gradient by the logit of c's expert that depends on the choices alone.
   given, a literal: 1: by the logit as given; 0: after the rules. */
MOE_DEVICE float moei_gate_back_direct(const moei_gate_backward_args* a, const moei_gate_back* o,
                                       const moei_gate_choice* c, uint64_t seed, const int given)
{
    const moei_gate_args* d = &a->gate;
    float x = (c->grad - o->mean) * (d->score == MOE_SCORE_SPARSEMAX ? o->factor : c->weight);
    if (d->score == MOE_SCORE_SIGMOID || (given && d->score >= MOE_SCORE_QUADRATIC)) {
        float l = moe_load_f32(d->logits, o->t * d->logits_stride + c->e, d->logits_dtype);
        if (d->score == MOE_SCORE_SIGMOID) { /* 1 - sigmoid of l is the sigmoid of -l */
            l = moei_gate_logit(d, l, 0.0f, seed, o->t, c->e);
            x *= moei_gate_sigmoid(-l, 0.0f, moei_gate_units_of(d).unit);
        } else {
            l = moei_gate_divided(d, l, 0.0f, seed, o->t, c->e);
            x = moei_gate_back_sloped(d->score, x, l);
        }
    }
    return given ? x * d->inverse_temperature : x;
}

/* Adds what depends on the choices alone to the token's gradients out [E] in shared memory. given:
   as in moei_gate_back_direct. */
MOE_DEVICE void moei_gate_back_add(const moei_gate_backward_args* a, const moei_gate_back* o,
                                   float* out, const int given)
{
    const uint64_t seed = moei_gate_seed(&a->gate);
    moei_gate_choice c = o->first;
    MOE_NO_UNROLL
    for (int k = o->rank; k < a->gate.top_k; k += o->width) {
        if (k != o->rank) c = moei_gate_back_choice(a, o, k);
        if (c.e >= 0) out[c.e] += moei_gate_back_direct(a, o, &c, seed, given);
    }
}

/* Writes the token's gradients out [E], 16-byte aligned in shared memory, to dlogits. Neighbouring
   lanes write neighbouring vectors. per_lane, a literal: most experts / lanes, or 0: any number. */
MOE_DEVICE void moei_gate_back_store(const moei_gate_backward_args* a, const moei_gate_back* o,
                                     const float* out, const int per_lane)
{
    const int num_experts = a->gate.num_experts, dtype = a->dlogits_dtype;
    const int bytes = dtype == MOE_FP32 ? 4 : 2;
    const int64_t row = o->t * a->dlogits_stride;
    char* to = (char*)a->dlogits + row * bytes;
    float v[4];
    if (!o->exists) return;
    if ((num_experts | a->dlogits_stride) % 4 != 0 || (uintptr_t)a->dlogits % (4 * bytes) != 0) {
        MOE_NO_UNROLL
        for (int e = o->rank; e < num_experts; e += o->width)
            moe_store_f32(a->dlogits, row + e, dtype, out[e]);
    } else if (per_lane) {
        MOE_UNROLL
        for (int j = 0; j < per_lane; j += 4) {
            const int e = j * o->width + o->rank * 4;
            if (e < num_experts) {
                moei_load_4(v, out + e);
                moei_store_some(to + e * bytes, v, dtype, 4);
            }
        }
    } else {
        for (int e = o->rank * 4; e < num_experts; e += o->width * 4) {
            moei_load_4(v, out + e);
            moei_store_some(to + e * bytes, v, dtype, 4);
        }
    }
}

/* ---- a token by one warp: any E, infinities, NaN ---- */

/* Writes out [E]: the part of the gradients, by the logits after the rules, that depends on the
   whole row. row [E]: the token's logits; s: its statistics; offset: as moei_gate_fill_row returns.
   Infinite logits are limits. The whole warp.
     1. the gradient by lse, of the z-loss
     2. what all experts of the row share, q
     3. each expert's own */
MOE_DEVICE void moei_gate_back_row(const moei_gate_backward_args* a, const moei_gate_back* o,
                                   const moei_gate_stats* s, float offset, const float* row,
                                   float* out)
{
    const moei_gate_args* d = &a->gate;
    const int num_experts = d->num_experts, score = d->score;
    const bool softmax = moei_gate_is_softmax(score), sparsemax = score == MOE_SCORE_SPARSEMAX;
    const float unit = moei_gate_units_of(d).unit;
    const float by_z = a->balance_grad ? a->balance_grad[num_experts] : 0.0f;
    float dot = 0.0f, n = 0.0f, z = 0.0f, sum = 1.0f, q, v;
    if (by_z != 0.0f) { /* 1. */
        sum = moei_gate_row_exponentials(d, row, s);
        z = by_z * moei_gate_row_lse(d, row, offset, s);
    }
    MOE_NO_UNROLL /* 2. */
    for (int e = moe_lane(); e < num_experts; e += MOE_WARP_SIZE)
        if (moei_gate_see(&v, d, row, 0, e, 1)) {
            const float p = moei_gate_probability(d, v, s);
            const float c = a->balance_grad ? a->balance_grad[e] : 0.0f;
            if (p > 0.0f) dot = fmaf(sparsemax ? 1.0f : p, c, dot), n += 1.0f;
        }
    dot = moe_warp_sum(dot, MOE_WARP_SIZE);
    n = moe_warp_sum(n, MOE_WARP_SIZE);
    q = softmax ? z - dot - (moei_gate_own_sum(d) ? 0.0f : o->dot) : -dot;
    if (sparsemax) q = __fdiv_rn(-dot - o->all, n);
    MOE_NO_UNROLL /* 3. */
    for (int e = moe_lane(); e < num_experts; e += MOE_WARP_SIZE) {
        float x = 0.0f;
        if (moei_gate_see(&v, d, row, 0, e, 1)) {
            const float p = moei_gate_probability(d, v, s);
            const float c = a->balance_grad ? a->balance_grad[e] : 0.0f;
            if (p > 0.0f) x = sparsemax ? c + q : p * (c + q);
            if (score == MOE_SCORE_SIGMOID) x *= moei_gate_sigmoid(-v, 0.0f, unit);
            if (!softmax && by_z != 0.0f)
                x += moei_gate_times(__fdiv_rn(moe_exp(moei_gate_below(v, s->max) * unit), sum), z);
        }
        out[e] = x;
    }
}

/* Converts the gradients out [E] by the logits after the rules to those by the logits as given. The
   sums are complete: an infinite slope multiplies them, not their terms. The whole warp. */
MOE_DEVICE void moei_gate_back_given(const moei_gate_backward_args* a, const moei_gate_back* o,
                                     float* out)
{
    const moei_gate_args* d = &a->gate;
    const uint64_t seed = moei_gate_seed(d);
    MOE_NO_UNROLL
    for (int e = moe_lane(); e < d->num_experts; e += MOE_WARP_SIZE) {
        float x = out[e];
        if (d->score >= MOE_SCORE_QUADRATIC) {
            float v = moe_load_f32(d->logits, o->t * d->logits_stride + e, d->logits_dtype);
            v = moei_gate_divided(d, v, 0.0f, seed, o->t, e);
            x = moei_gate_back_sloped(d->score, x, v);
        }
        out[e] = x * d->inverse_temperature;
    }
}

/* Computes the gradients of token t. The whole warp. out and row [E] are the warp's own, in shared
   memory, 16-byte aligned. */
MOE_DEVICE void moei_gate_back_token(const moei_gate_backward_args* a, float* out, float* row,
                                     int64_t t)
{
    const moei_gate_args* d = &a->gate;
    const moei_gate_units units = moei_gate_units_of(d);
    moei_gate_back o = moei_gate_back_begin(a, t, moe_lane(), MOE_WARP_SIZE);
    moei_gate_stats s = {0.0f, 0.0f, false};
    float offset = 0.0f;
    if (a->has_row && o.live) {
        offset = moei_gate_fill_row(d, row, t);
        s = moei_gate_row_stats(d, row, t, 1);
        if (s.nan) { /* the gate chose nothing */
            o.live = false;
            o.first.e = -1;
        }
    }
    moei_gate_back_sum(a, &o);
    if (a->has_row && o.live) {
        if (d->score == MOE_SCORE_SPARSEMAX) moei_gate_back_sparsemax(a, &o, &units, &s, row);
        moei_gate_back_row(a, &o, &s, offset, row, out);
    } else {
        MOE_NO_UNROLL
        for (int e = moe_lane(); e < d->num_experts; e += MOE_WARP_SIZE) out[e] = 0.0f;
    }
    __syncwarp(MOE_FULL_WARP); /* out holds the row's part */
    if (a->has_row) {
        moei_gate_back_add(a, &o, out, 0);
        __syncwarp(MOE_FULL_WARP); /* and the choices' */
        moei_gate_back_given(a, &o, out);
    } else {
        moei_gate_back_add(a, &o, out, 1);
    }
    __syncwarp(MOE_FULL_WARP); /* out is complete */
    moei_gate_back_store(a, &o, out, 0);
    __syncwarp(MOE_FULL_WARP); /* out and row may be written again */
}

/* ---- a token by a group of lanes, its row in registers ---- */

/* Loads the gradients c [4] of the balance losses by the probabilities of experts e .. e + 3; 0
   past E, and where `from` is null. */
MOE_DEVICE void moei_gate_back_balance(float* c, const float* from, int num_experts, int e)
{
    c[0] = c[1] = c[2] = c[3] = 0.0f;
    if (!from) return;
    if ((uintptr_t)from % 16 == 0 && num_experts % 4 == 0) {
        if (e < num_experts) moei_load_4(c, from + e);
    } else {
        MOE_UNROLL
        for (int i = 0; i < 4; ++i)
            if (e + i < num_experts) c[i] = from[e + i];
    }
}

/* Replaces a lane's logits v by e^(v - from), both in units. Returns the sum over the token's lanes.
   The whole warp calls it. */
MOE_DEVICE float moei_gate_back_lane_exponentials(float* v, float from,
                                                  const moei_gate_units* units,
                                                  const moei_gate_lanes w)
{
    const float shift = -(from * units->log2);
    float sum = 0.0f;
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) {
        v[j] = moei_exp2_fast(fmaf(v[j], units->log2, shift));
        sum += v[j];
    }
    return moe_warp_sum(sum, w.lanes);
}

/* The three below turn what v has of a lane's logits into the gradients by these logits. sum: the
   token's sum of exponentials; z: the gradient of the z-loss by lse. An expert of probability 0 gets
   no gradient by probabilities, also where another one's is NaN. The whole warp calls them. */

/* Softmax of any kind. v: exponentials. */
MOE_DEVICE void moei_gate_back_lane_softmax(float* v, const moei_gate_backward_args* a,
                                            const moei_gate_back* o, float sum, float z,
                                            const moei_gate_lanes w)
{
    const moei_gate_args* d = &a->gate;
    const float part = __fdiv_rn(1.0f, sum);
    float q = z - (moei_gate_own_sum(d) ? 0.0f : o->dot);
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) v[j] *= part;
    if (a->balance_grad) {
        float c[32], dot = 0.0f;
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; j += 4)
            moei_gate_back_balance(c + j, a->balance_grad, d->num_experts, moei_gate_expert(j, w));
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j) dot = fmaf(v[j], c[j], dot);
        q -= moe_warp_sum(dot, w.lanes);
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j) v[j] = v[j] > 0.0f ? v[j] * (c[j] + q) : 0.0f;
    } else {
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j) v[j] = v[j] > 0.0f ? v[j] * q : 0.0f;
    }
}

/* Sigmoid. v times factor: exponentials x. The score is x / (1 + x), and 1 less the score is
   1 / (1 + x): nothing cancels. sum and z: of v, as sums and products with factor may leave fp32. */
MOE_DEVICE void moei_gate_back_lane_sigmoid(float* v, const moei_gate_backward_args* a,
                                            float factor, float sum, float z,
                                            const moei_gate_lanes w)
{
    const int num_experts = a->gate.num_experts;
    const float* again = (const float*)moei_opaque((uintptr_t)a->balance_grad);
    float u[32], c[4], scores = 0.0f, dot = 0.0f, part;
    z = __fdiv_rn(z, sum);
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) {
        if (j % 4 == 0)
            moei_gate_back_balance(c, a->balance_grad, num_experts, moei_gate_expert(j, w));
        u[j] = moei_reciprocal_fast(fmaf(v[j], factor, 1.0f));
        scores = fmaf(v[j], u[j], scores);
        dot = fmaf(v[j] * u[j], c[j % 4], dot);
    }
    scores = moe_warp_sum(scores, w.lanes);
    part = scores > 0.0f ? __fdiv_rn(1.0f, scores) : 1.0f;
    dot = part * moe_warp_sum(dot, w.lanes);
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) {
        const float p = v[j] * part * u[j]; /* v u again would be kept */
        if (j % 4 == 0)                     /* loaded again: the registers are needed in between */
            moei_gate_back_balance(c, again, num_experts, moei_gate_expert(j, w));
        v[j] = fmaf(z, v[j], p > 0.0f ? p * (c[j % 4] - dot) * u[j] : 0.0f);
    }
}

/* Sparsemax. v: logits, of statistics s. All experts of the support count alike. */
MOE_DEVICE void moei_gate_back_lane_sparsemax(float* v, const moei_gate_backward_args* a,
                                              const moei_gate_back* o, const moei_gate_units* units,
                                              const moei_gate_stats* s, float sum, float z,
                                              const moei_gate_lanes w)
{
    const int num_experts = a->gate.num_experts;
    const float shift = -(s->max * units->log2);
    const float* again = (const float*)moei_opaque((uintptr_t)a->balance_grad);
    float c[4], dot = 0.0f, n = 0.0f, q;
    uint32_t support = 0;
    z = __fdiv_rn(z, sum);
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) {
        if (j % 4 == 0)
            moei_gate_back_balance(c, a->balance_grad, num_experts, moei_gate_expert(j, w));
        if (fmaf(v[j] - s->max, units->unit, -s->sum) > 0.0f) {
            support |= 1u << j;
            dot += c[j % 4];
        }
    }
    n = moe_warp_sum((float)__popc(support), w.lanes);
    q = __fdiv_rn(-moe_warp_sum(dot, w.lanes) - o->all, n);
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) {
        if (j % 4 == 0) moei_gate_back_balance(c, again, num_experts, moei_gate_expert(j, w));
        v[j] = (support >> j & 1 ? c[j % 4] + q : 0.0f) +
               (z != 0.0f ? z * moei_exp2_fast(fmaf(v[j], units->log2, shift)) : 0.0f);
    }
}

/* Replaces a lane's logits v, as loaded, by the part of the gradients that depends on the whole
   row. Sets o's sums. Returns whether moei_gate_back_token must do the token: a logit is NaN,
   infinite or huge. aside [E] in shared memory is the token's own. The whole warp calls it.
     1. rules; aside gets the slopes of squares and cosines
     2. sums over the choices
     3. exponentials or other statistics of the row; sparsemax: sums that may read the row from aside
     4. gradients by the logits after the rules
     5. gradients by the logits as given */
MOE_DEVICE bool moei_gate_back_lane(float* v, const moei_gate_backward_args* a, moei_gate_back* o,
                                    float* aside, const moei_gate_lanes w)
{
    const moei_gate_args* d = &a->gate;
    const moei_gate_units units = moei_gate_units_of(d);
    const int num_experts = d->num_experts, score = d->score;
    const float by_z = a->balance_grad ? a->balance_grad[num_experts] : 0.0f;
    float max, offset, sum, z = 0.0f;
    uint32_t unseen = 0;
    bool again;
    if (d->expert_disabled) { /* 1. */
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j) {
            const int e = moei_gate_expert(j, w);
            if (e < num_experts && d->expert_disabled[e]) unseen |= 1u << j;
        }
    }
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j)
        if (moei_gate_expert(j, w) >= num_experts) unseen |= 1u << j;
    max = moei_gate_logits(v, &unseen, &offset, aside, d, moei_gate_seed(d), o->t, w);
    again = !(fabsf(max * units.log2) < 1e8f);
    moei_gate_back_sum(a, o); /* 2. */
    if (score == MOE_SCORE_SPARSEMAX) {
        const moei_gate_stats s = moei_gate_lane_stats(d, &units, v, max, w); /* 3. */
        if (moei_gate_lane_odd(v, w)) again |= moei_gate_lane_nan(v, w);
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; j += 4)
            if (d->renormalize) moei_store_4(aside + moei_gate_expert(j, w), v + j);
        __syncwarp(MOE_FULL_WARP); /* aside holds the row */
        moei_gate_back_sparsemax(a, o, &units, &s, aside);
        sum = by_z != 0.0f ? moei_gate_lane_exponentials(v, max, &units, w) : 1.0f;
        if (by_z != 0.0f) z = by_z * (offset + fmaf(max, units.unit, moei_gate_log(sum)));
        moei_gate_back_lane_sparsemax(v, a, o, &units, &s, sum, z, w); /* 4. */
    } else {
        const bool softmax = moei_gate_is_softmax(score);
        const float from = softmax ? max : fminf(max, 0.0f);
        if (!softmax) again |= !(max * units.log2 < 60.0f); /* sums and z / sum are numbers */
        sum = moei_gate_back_lane_exponentials(v, from, &units, w); /* 3. */
        again |= moei_is_nan(sum);
        if (by_z != 0.0f) z = by_z * (offset + fmaf(from, units.unit, moei_gate_log(sum)));
        if (softmax) moei_gate_back_lane_softmax(v, a, o, sum, z, w); /* 4. */
        else moei_gate_back_lane_sigmoid(v, a, moei_exp2_fast(from * units.log2), sum, z, w);
    }
    if (score >= MOE_SCORE_QUADRATIC) { /* 5. */
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; j += 4) {
            float slope[4];
            moei_load_4(slope, aside + moei_gate_expert(j, w));
            MOE_UNROLL
            for (int i = 0; i < 4; ++i) v[j + i] = moei_gate_times(v[j + i], slope[i]);
        }
    }
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j) v[j] = o->live ? v[j] * d->inverse_temperature : 0.0f;
    return again && o->live;
}

/* Runs one block: an aligned group of `lanes` lanes has a token, a lane `per_lane` of its experts.
   has_row: that of a. The three are literals. memory: [warps][1 + has_row][32 * per_lane] floats of
   shared memory.
     1. load: the token's first choices; its row where gradients depend on the row
     2. the row's part of the gradients, to shared memory
     3. add the choices' part
     4. write dlogits
     5. again: moei_gate_back_token does tokens of NaN, infinite and huge logits */
MOE_DEVICE_BODY void moei_gate_back_block(const moei_gate_backward_args* a, float* memory,
                                          const int has_row, const int lanes, const int per_lane)
{
    const moei_gate_args* d = &a->gate;
    const moei_gate_lanes w = moei_gate_lanes_of(lanes, per_lane, 8);
    const int64_t first = (int64_t)blockIdx.x * (blockDim.x / lanes);
    const bool wide =
        (d->logits_stride | d->num_experts) % 8 == 0 && (uintptr_t)d->logits % 16 == 0;
    float* own = memory + moe_warp() * ((1 + has_row) * 32 * per_lane); /* this warp's */
    float* out = own + moe_lane() / lanes * (lanes * per_lane);
    float v[32];
    uint32_t again = 0;
    bool redo = false;
    moei_gate_back o = moei_gate_back_begin(a, first + threadIdx.x / lanes, w.rank, lanes); /* 1. */
    if (has_row) {
        moei_gate_read(v, d, o.t, wide, w);
        redo = moei_gate_back_lane(v, a, &o, out + 32 * per_lane, w); /* 2. */
        again = __ballot_sync(MOE_FULL_WARP, redo);
        redo = (again >> (moe_lane() - w.rank) & (MOE_FULL_WARP >> (32 - lanes))) != 0;
        again = __ballot_sync(MOE_FULL_WARP, redo && w.rank == 0);
        MOE_UNROLL
        for (int j = 0; j < per_lane; j += 4) moei_store_4(out + moei_gate_expert(j, w), v + j);
    } else {
        v[0] = v[1] = v[2] = v[3] = 0.0f;
        MOE_UNROLL
        for (int j = 0; j < per_lane; j += 4) moei_store_4(out + j * lanes + w.rank * 4, v);
        moei_gate_back_sum(a, &o);
    }
    __syncwarp(MOE_FULL_WARP);                             /* out holds the row's part */
    moei_gate_back_add(a, &o, out, 1);                     /* 3. */
    __syncwarp(MOE_FULL_WARP);                             /* and the choices' */
    if (!redo) moei_gate_back_store(a, &o, out, per_lane); /* 4. */
    if (!has_row) return;
    __syncwarp(MOE_FULL_WARP); /* out may be written again */
    while (again) {            /* 5. */
        const int from = __ffs((int)again) - 1;
        moei_gate_back_token(a, own, own + 32 * per_lane,
                             first + (moe_warp() * MOE_WARP_SIZE + from) / lanes);
        again &= again - 1;
    }
}

#endif
