/* logit.cuh: the gate's rules for one logit: temperature, noise, square or cosine, and which
   experts a token sees (gate.cuh). Each is a function of token and expert alone. Called by
   token.cuh, rules.cuh and batch.cuh. */
#ifndef MOE_GATE_LOGIT_CUH
#define MOE_GATE_LOGIT_CUH

#include "../base/random.h"
#include "../base/warp.cuh"
#include "row.cuh"

/* Returns the seed of this launch: seed + *seed_offset. */
MOE_DEVICE uint64_t moei_gate_seed(const moei_gate_args* d)
{
    return d->seed + (d->seed_offset ? *d->seed_offset : 0);
}

/* Returns two independent standard normal numbers, made of two random words (Box and Muller). */
MOE_DEVICE float2 moei_gate_normal(uint32_t a, uint32_t b)
{
    const float u = ((float)a + 0.5f) * 2.3283064e-10f;           /* 2^-32: in (0, 1] */
    const float angle = (float)(int32_t)b * 1.46291807926716e-9f; /* pi 2^-31: -pi .. pi */
#if MOE_ON_HOST
    const float radius = sqrtf(fmaxf(-1.38629436f * log2f(u), 0.0f)); /* -2 ln u */
    return make_float2(radius * cosf(angle), radius * sinf(angle));
#else
    const float radius = __fsqrt_rn(fmaxf(-1.38629436f * __log2f(u), 0.0f));
    return make_float2(radius * __cosf(angle), radius * __sinf(angle));
#endif
}

/* Sets n [4] to the noise of token t and experts 4 quad .. 4 quad + 3, standard deviation 1. */
MOE_DEVICE void moei_gate_noise(float* n, uint64_t seed, int64_t t, int quad)
{
    const moe_random4 r =
        moe_random_words(seed, (uint32_t)quad, (uint32_t)t, MOE_GATE_STREAM_NOISE, 0);
    const float2 a = moei_gate_normal(r.x, r.y), b = moei_gate_normal(r.z, r.w);
    n[0] = a.x, n[1] = a.y, n[2] = b.x, n[3] = b.y;
}

/* Returns bits: bit i is set where dropout excludes expert 8 octet + i for token t. */
MOE_DEVICE uint32_t moei_gate_dropped(const moei_gate_args* d, uint64_t seed, int64_t t, int octet)
{
    const moe_random4 r =
        moe_random_words(seed, (uint32_t)octet, (uint32_t)t, MOE_GATE_STREAM_DROPOUT, 0);
    const uint32_t below = (uint32_t)moe_gate_dropout_steps(d->dropout), high = below << 16;
    return ((r.x & 0xffffu) < below ? 1u : 0u) | (r.x < high ? 2u : 0u) |
           ((r.y & 0xffffu) < below ? 4u : 0u) | (r.y < high ? 8u : 0u) |
           ((r.z & 0xffffu) < below ? 16u : 0u) | (r.z < high ? 32u : 0u) |
           ((r.w & 0xffffu) < below ? 64u : 0u) | (r.w < high ? 128u : 0u);
}

/* Returns cos(x)^2, to about 1e-6. NaN where |x| is MOE_GATE_MAX_COSINE or more, or x is NaN. */
MOE_DEVICE float moei_gate_cosine(float x)
{
    const float k = rintf(x * 0.318309886f); /* cos^2 has period pi, subtracted in two parts */
    const float r = fmaf(k, 8.74227766e-8f, fmaf(k, -3.14159274f, x));
#if MOE_ON_HOST
    const float c = cosf(r);
#else
    const float c = __cosf(r);
#endif
    return (__float_as_uint(x) & 0x7fffffffu) < __float_as_uint(MOE_GATE_MAX_COSINE)
               ? c * c
               : __uint_as_float(0x7fc00000u);
}

/* Returns the derivative of q^2 or cos(q)^2, the logit of quadratic or pioneer, by q. |q| of
   pioneer is below MOE_GATE_MAX_COSINE, to about 1e-6; else NaN. */
MOE_DEVICE float moei_gate_slope(int score, float q)
{
    const float k = rintf(q * 0.318309886f); /* sin(2q) has period pi too */
    const float r = fmaf(k, 8.74227766e-8f, fmaf(k, -3.14159274f, q));
    if (score == MOE_SCORE_QUADRATIC) return 2.0f * q;
#if MOE_ON_HOST
    return -sinf(2.0f * r);
#else
    return -__sinf(2.0f * r);
#endif
}

/* Returns the logarithm of sum, 1 or more, to an absolute 3e-7. */
MOE_DEVICE float moei_gate_log(float sum)
{
#if MOE_ON_HOST
    return 0.693147182f * log2f(sum);
#else
    return 0.693147182f * __log2f(sum);
#endif
}

/* Returns whether noise, a square, a cosine or a logit's bias follows the temperature. The logits
   are multiplied by 1 / temperature then. */
MOE_DEVICE bool moei_gate_multiplies(const moei_gate_args* d)
{
    return d->noise > 0.0f || d->score == MOE_SCORE_QUADRATIC || d->score == MOE_SCORE_PIONEER ||
           (d->score == MOE_SCORE_TOPK_SOFTMAX && d->expert_bias);
}

/* Returns whether the row's largest logit is subtracted before a temperature is multiplied in:
   where a common offset changes neither choice nor weight. Of top-k softmax with groups it may
   change the choice: a group of one expert counts an offset once, other groups count it twice. */
MOE_DEVICE bool moei_gate_subtracts_largest(const moei_gate_args* d)
{
    return d->inverse_temperature != 1.0f && moei_gate_multiplies(d) &&
           (d->score == MOE_SCORE_SOFTMAX || d->score == MOE_SCORE_SPARSEMAX ||
            (d->score == MOE_SCORE_TOPK_SOFTMAX && d->num_groups == 1));
}

/* Loads the logit as given; returns false where token t does not see expert e. */
MOE_DEVICE bool moei_gate_given(float* out, const moei_gate_args* d, uint64_t seed, int64_t t,
                                int e)
{
    if (d->expert_disabled && d->expert_disabled[e]) return false;
    if (d->dropout > 0.0f && (moei_gate_dropped(d, seed, t, e >> 3) >> (e & 7) & 1)) return false;
    *out = moe_load_f32(d->logits, t * d->logits_stride + e, d->logits_dtype);
    return true;
}

/* Returns v, or the finite number nearest to v where v has overflowed; NaN stays NaN. */
MOE_DEVICE float moei_gate_bounded(float v)
{
    return moei_is_nan(v) ? v : fminf(fmaxf(v, -3.40282347e38f), 3.40282347e38f);
}

/* How kernels hold a token's logits: `unit` times a held value is the logit after the rules. A
   temperature alone is the unit: it costs nothing, rounds no offset and keeps the order. */
typedef struct moei_gate_units {
    float unit, log2; /* log2: unit * log2(e), for powers of two */
} moei_gate_units;

/* Returns the units of this launch. */
MOE_DEVICE moei_gate_units moei_gate_units_of(const moei_gate_args* d)
{
    moei_gate_units u;
    u.unit = moei_gate_multiplies(d) ? 1.0f : d->inverse_temperature;
    u.log2 = 1.44269502f * u.unit;
    return u;
}

/* Returns the given logit v of token t and expert e, less `most`, after temperature and noise,
   where moei_gate_multiplies. Finite logits stay finite. */
MOE_DEVICE float moei_gate_divided(const moei_gate_args* d, float v, float most, uint64_t seed,
                                   int64_t t, int e)
{
    const bool finite = (__float_as_uint(v) & 0x7f800000u) != 0x7f800000u;
    v = (v - most) * d->inverse_temperature;
    if (finite) v = moei_gate_bounded(v);
    if (d->noise > 0.0f) {
        float n[4];
        moei_gate_noise(n, seed, t, e >> 2);
        v = fmaf(d->noise, (e & 2) ? ((e & 1) ? n[3] : n[2]) : ((e & 1) ? n[1] : n[0]), v);
        if (finite) v = moei_gate_bounded(v);
    }
    return v;
}

/* Returns the given logit v of token t and expert e, less `most`, after the rules, in units.
   Returns v itself where the temperature is the unit. Finite logits stay finite. Quadratic: returns
   |l|, which has the order of l^2. */
MOE_DEVICE float moei_gate_logit(const moei_gate_args* d, float v, float most, uint64_t seed,
                                 int64_t t, int e)
{
    if (!moei_gate_multiplies(d)) return v;
    v = moei_gate_divided(d, v, most, seed, t, e);
    if (d->score == MOE_SCORE_QUADRATIC) v = fabsf(v);
    if (d->score == MOE_SCORE_PIONEER) v = moei_gate_cosine(v);
    return v;
}

/* Sets a lane's logits v to -inf where the token does not see them: bit j of `unseen` is v[j]'s. */
MOE_DEVICE void moei_gate_lane_hide(float* v, uint32_t unseen, const moei_gate_lanes w)
{
    if (!unseen) return;
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j)
        if (unseen >> j & 1) v[j] = __uint_as_float(0xff800000u);
}

/* Returns the largest of a token's logits; v has those of one lane. The whole warp calls it. */
MOE_DEVICE float moei_gate_lane_max(const float* v, const moei_gate_lanes w)
{
    float max = v[0];
    MOE_UNROLL
    for (int j = 1; j < w.per_lane; ++j) max = fmaxf(max, v[j]);
    return moe_warp_max(max, w.lanes);
}

/* Writes the slopes of a lane's logits v, before they are squared or their cosines taken, to slope
   [E] in shared memory. */
MOE_DEVICE void moei_gate_lane_slopes(float* slope, const float* v, int score,
                                      const moei_gate_lanes w)
{
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; j += 4) {
        float s[4];
        MOE_UNROLL
        for (int i = 0; i < 4; ++i) s[i] = moei_gate_slope(score, v[j + i]);
        moei_store_4(slope + moei_gate_expert(j, w), s);
    }
}

/* Applies the rules to a lane's loaded logits v of token t, in units; returns the token's largest.
   Bit j of *unseen: the token does not see v[j], which becomes -inf; dropout adds bits. Sets
   *offset to what the rules have subtracted from all logits. slope, a literal null for the gate:
   where quadratic and pioneer write their slopes. The whole warp calls it. */
MOE_DEVICE float moei_gate_logits(float* v, uint32_t* unseen, float* offset, float* slope,
                                  const moei_gate_args* d, uint64_t seed, int64_t t,
                                  const moei_gate_lanes w)
{
    *offset = 0.0f;
    if (d->dropout > 0.0f) {
        const uint64_t here = moei_opaque(seed);
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; j += 8)
            *unseen |= moei_gate_dropped(d, here, t, moei_gate_expert(j, w) >> 3) << j;
    }
    moei_gate_lane_hide(v, *unseen, w);
    if (moei_gate_multiplies(d)) {
        if (d->inverse_temperature != 1.0f) {
            const float most = moei_gate_subtracts_largest(d) ? moei_gate_lane_max(v, w) : 0.0f;
            *offset = most * d->inverse_temperature;
            MOE_UNROLL
            for (int j = 0; j < w.per_lane; ++j) v[j] = (v[j] - most) * d->inverse_temperature;
        }
        if (d->noise > 0.0f) {
            const uint64_t here =
                moei_opaque(seed); /* else the twenty keys of its rounds stay in registers */
            MOE_UNROLL
            for (int j = 0; j < w.per_lane; j += 4) {
                float n[4];
                moei_gate_noise(n, here, t, moei_gate_expert(j, w) >> 2);
                MOE_UNROLL
                for (int i = 0; i < 4; ++i) v[j + i] = fmaf(d->noise, n[i], v[j + i]);
            }
        }
        if (slope && d->score >= MOE_SCORE_QUADRATIC) moei_gate_lane_slopes(slope, v, d->score, w);
        if (d->score == MOE_SCORE_QUADRATIC) {
            MOE_UNROLL
            for (int j = 0; j < w.per_lane; ++j) v[j] = v[j] * v[j];
        } else if (d->score == MOE_SCORE_PIONEER) {
            MOE_UNROLL
            for (int j = 0; j < w.per_lane; ++j) v[j] = moei_gate_cosine(v[j]);
        }
        moei_gate_lane_hide(v, *unseen, w); /* squares and cosines of -inf are not -inf */
    }
    return moei_gate_lane_max(v, w);
}

#endif
