/* row.cuh: a token's row of logits: which lane holds which logits, their loads, scores, weights and
   counts. Called by the gate's other headers. */
#ifndef MOE_GATE_ROW_CUH
#define MOE_GATE_ROW_CUH

#include "../base/fault.cuh"
#include "../base/numeric.cuh"
#include "../base/sort.cuh"
#include "../faults.h"
#include "args.h"

/* Returns l - max with the limits of gate.cuh: equal infinities differ by 0. */
MOE_DEVICE float moei_gate_below(float l, float max) { return l == max ? 0.0f : l - max; }

/* Returns the shift of a row's sigmoids, which are divided by e^shift before they are summed: the
   row's largest logit where that is negative and finite, so that not all underflow; else 0. */
MOE_DEVICE float moei_gate_sigmoid_shift(float max)
{
    return max < 0.0f && max >= -3.40282347e38f ? max : 0.0f;
}

/* Clears count [E] of a block's chunk. All threads; a barrier must follow. */
MOE_DEVICE void moei_gate_clear_counts(const moei_gate_args* d, int* count)
{
    MOE_NO_UNROLL
    for (int e = (int)threadIdx.x; e < d->num_experts; e += (int)blockDim.x) count[e] = 0;
}

/* Writes count [E] of a block's chunk to expert_count and chunk_count. All threads; begins with a
   barrier. */
MOE_DEVICE void moei_gate_write_counts(const moei_gate_args* d, const int* count)
{
    __syncthreads();
    MOE_NO_UNROLL
    for (int e = (int)threadIdx.x; e < d->num_experts; e += (int)blockDim.x) {
        const int n = count[e];
        if (d->expert_count && n) atomicAdd(d->expert_count + e, n);
        if (d->chunk_count) d->chunk_count[(int64_t)blockIdx.x * d->num_experts + e] = n;
    }
}

/* Returns whether the score is a softmax, of the logits, their squares or their cosines. */
MOE_DEVICE bool moei_gate_is_softmax(int score)
{
    return score != MOE_SCORE_SIGMOID && score != MOE_SCORE_SPARSEMAX;
}

/* Returns 1 / (1 + e^-l), times e^-shift where l is negative. `unit` is a factor on l and shift. */
MOE_DEVICE float moei_gate_sigmoid(float l, float shift, float unit)
{
    if (l >= 0.0f) return __fdiv_rn(1.0f, 1.0f + moe_exp(-l * unit));
    return __fdiv_rn(moe_exp(moei_gate_below(l, shift) * unit), 1.0f + moe_exp(l * unit));
}

/* Returns l's exponent less that of the token's largest: l - max, or l^2 - max^2 where `squared`.
   Squared: l and max are absolute values, as moei_gate_token holds them, which do not overflow. */
MOE_DEVICE float moei_gate_exponent(float l, float max, bool squared)
{
    const float below = moei_gate_below(l, max);
    return squared && below != 0.0f ? below * (l + max) : below;
}

/* Michelot's search for sparsemax's tau: raises tau until no logit falls below. */
typedef struct moei_sparsemax {
    float tau;       /* tau less the largest logit */
    float n, before; /* logits above tau in the last iteration; in the one before */
} moei_sparsemax;

/* Returns the begin of a search. whole: what the scores sum up to. */
MOE_DEVICE moei_sparsemax moei_sparsemax_begin(float whole)
{
    const moei_sparsemax s = {-whole, 1e6f, 2e6f}; /* more than any row has */
    return s;
}

/* Runs one iteration. sum, above: sum and number of this lane's logits above tau. Adds both over
   `width` lanes; the whole warp calls it. exact, a literal: 1 rounds the division, 0
   approximates. */
MOE_DEVICE void moei_sparsemax_step(moei_sparsemax* s, float sum, float above, float whole,
                                    const int width, const int exact)
{
    sum = moe_warp_sum(sum, width);
    above = moe_warp_sum(above, width);
    if (s->n < s->before) { /* else the search has ended, and the lane only joins the sums */
        s->before = s->n;
        s->n = above;
        if (above > 0.0f)
            s->tau = exact ? __fdiv_rn(sum - whole, above) : __fdividef(sum - whole, above);
    }
}

/* Returns the score of one logit l, for moei_gate_token. max: the token's largest logit. sum: the
   softmax's denominator, or sparsemax's tau - max. `unit` is a factor on l and max. */
MOE_DEVICE float moei_gate_score(const moei_gate_args* d, float unit, float l, float max, float sum)
{
    const float below = moei_gate_exponent(l, max, d->score == MOE_SCORE_QUADRATIC);
    if (d->score == MOE_SCORE_SIGMOID) return moei_gate_sigmoid(l, 0.0f, unit);
    if (d->score == MOE_SCORE_SPARSEMAX) return fmaxf(below * unit - sum, 0.0f);
    return __fdiv_rn(moe_exp(below * unit), sum);
}

/* Returns the weight of one chosen logit before renormalisation and scale. Top-k softmax passes
   sum = 1, since its sum is taken later. Sigmoids to be renormalised are all multiplied by e^-max
   where max is negative: they would underflow together. */
MOE_DEVICE float moei_gate_weight(const moei_gate_args* d, float unit, float l, float max,
                                  float sum)
{
    if (d->score == MOE_SCORE_SIGMOID && d->renormalize)
        return moei_gate_sigmoid(l, moei_gate_sigmoid_shift(max), unit);
    return moei_gate_score(d, unit, l, max, sum);
}

/* How registers hold rows: an aligned group of `lanes` lanes has a token, per_lane logits a lane.
   The group finds the num_largest largest. The three are literals. */
typedef struct moei_gate_lanes {
    int lanes;       /* lanes a token: 1, 2, 4 .. 32 */
    int per_lane;    /* logits a lane: 8, 16 or 32 */
    int num_largest; /* 2, 4 .. 32, at least K */
    int rank;        /* this lane's number in its group, 0 .. lanes - 1 */
} moei_gate_lanes;

/* Returns how this lane holds rows. */
MOE_DEVICE moei_gate_lanes moei_gate_lanes_of(const int lanes, const int per_lane,
                                              const int num_largest)
{
    const moei_gate_lanes w = {lanes, per_lane, num_largest, moe_lane() & (lanes - 1)};
    return w;
}

/* Returns the expert of a lane's j-th logit. A lane has runs of 8 experts, which begin at
   (i * lanes + rank) * 8 for i = 0, 1, ... */
MOE_DEVICE int moei_gate_expert(int j, const moei_gate_lanes w)
{
    return ((j >> 3) * w.lanes + w.rank) * 8 + (j & 7);
}

/* Returns bits: bit j is set where v[j] is not below kth, which is finite. */
MOE_DEVICE uint32_t moei_gate_not_below(const float* v, float kth, const moei_gate_lanes w)
{
    uint32_t below = 0;
    if (kth == 0.0f) kth = __uint_as_float(0x80000000u); /* -0 - +0 is -0, whose sign bit is set */
    MOE_UNROLL
    for (int j = 31; j >= 0; --j) /* the sign bit of each difference */
        if (j < w.per_lane) below = __funnelshift_l(__float_as_uint(v[j] - kth), below, 1);
    return ~below & (MOE_FULL_WARP >> (32 - w.per_lane));
}

/* Loads a lane's logits of token t; those past E become -inf. wide: E and the stride are multiples
   of 8 and the base is 16-byte aligned, so loads are 16-byte vectors.
     1. fp32: vectors; vectors predicated on E; or single logits
     2. 16 bits: vectors predicated on E, or single logits; then the conversion to fp32 */
MOE_DEVICE void moei_gate_read(float* v, const moei_gate_args* d, int64_t t, bool wide,
                               const moei_gate_lanes w)
{
    const int num_experts = d->num_experts;
    const float none = __uint_as_float(0xff800000u);
    if (d->logits_dtype == MOE_FP32) { /* 1. */
        const float* row = (const float*)d->logits + t * d->logits_stride;
        if (wide && num_experts == w.lanes * w.per_lane) {
            MOE_UNROLL
            for (int j = 0; j < w.per_lane; j += 4) {
                const float4 f = *(const float4*)(row + moei_gate_expert(j, w));
                v[j] = f.x, v[j + 1] = f.y, v[j + 2] = f.z, v[j + 3] = f.w;
            }
        } else if (wide) {
            MOE_UNROLL
            for (int j = 0; j < w.per_lane; j += 4) {
                const int e = moei_gate_expert(j, w);
                float4 f = make_float4(none, none, none, none);
                if (e < num_experts) f = *(const float4*)(row + e);
                v[j] = f.x, v[j + 1] = f.y, v[j + 2] = f.z, v[j + 3] = f.w;
            }
        } else {
            MOE_UNROLL
            for (int j = 0; j < w.per_lane; ++j) {
                const int e = moei_gate_expert(j, w);
                v[j] = e < num_experts ? row[e] : none;
            }
        }
    } else { /* 2. */
        const uint32_t minus = d->logits_dtype == MOE_FP16 ? 0xfc00fc00u : 0xff80ff80u;
        const uint16_t* row = (const uint16_t*)d->logits + t * d->logits_stride;
        uint32_t u[16]; /* two logits a word */
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; j += 8) {
            const int e = moei_gate_expert(j, w);
            uint4 q = make_uint4(minus, minus, minus, minus);
            if (wide && e < num_experts) q = *(const uint4*)(row + e);
            u[j / 2] = q.x, u[j / 2 + 1] = q.y, u[j / 2 + 2] = q.z, u[j / 2 + 3] = q.w;
        }
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j) {
            const int e = moei_gate_expert(j, w);
            uint16_t h = (uint16_t)(u[j / 2] >> (j % 2 * 16));
            if (!wide && e < num_experts) h = row[e];
            v[j] = moe_half_to_f32(h, d->logits_dtype);
        }
    }
}

#endif
