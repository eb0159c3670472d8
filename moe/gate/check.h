/* check.h: what a gate's descriptor may hold, its defaults, and the kernels' arguments that it
   becomes. For the gate and its gradients. C11 and C++14. */
#ifndef MOE_GATE_CHECK_H
#define MOE_GATE_CHECK_H

#include <math.h>

#include "../fields.h"
#include "args.h"

/* Returns 1, in a list of kernels, for a power of two from `least` to `most`. */
#define MOEI_GATE_POWER(n, least, most) ((n) >= (least) && (n) <= (most) && ((n) & ((n)-1)) == 0)

/* Refuses sizes out of range, of those that moe_gate_workspace reads. */
MOE_HOST moe_status moei_gate_check_sizes(const moe_gate_desc* d)
{
    MOE_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    return MOE_OK;
}

/* Refuses sizes and options that are out of range or contradict each other; fills in the
   defaults. */
MOE_HOST moe_status moei_gate_check_options(moe_gate_desc* d)
{
    MOE_TRY(moei_gate_check_sizes(d));
    MOE_REQUIRE(d->top_k >= 1 && d->top_k <= d->num_experts, MOE_ERR_RANGE, top_k);
    if (d->logits_dtype == 0) d->logits_dtype = MOE_FP32;
    MOE_REQUIRE(moe_dtype_bytes(d->logits_dtype), MOE_ERR_DTYPE, logits_dtype);
    if (d->logits_stride == 0) d->logits_stride = d->num_experts;
    MOE_REQUIRE(moei_stride_fits(d->logits_stride, d->num_experts, d->num_tokens), MOE_ERR_STRIDE,
                logits_stride);
    if (d->score == 0) d->score = MOE_SCORE_SOFTMAX;
    MOE_REQUIRE(d->score >= 0 && d->score <= MOE_SCORE_PIONEER, MOE_ERR_OPTION, score);
    MOE_REQUIRE(d->renormalize == 0 || d->renormalize == 1, MOE_ERR_OPTION, renormalize);
    MOE_REQUIRE(moei_f32_is_finite(d->scale), MOE_ERR_RANGE, scale);
    if (d->scale == 0.0f) d->scale = 1.0f;
    if (d->temperature == 0.0f) d->temperature = 1.0f;
    MOE_REQUIRE(moei_f32_is_finite(d->temperature) && d->temperature >= 1e-30f &&
                    d->temperature <= 1e30f,
                MOE_ERR_RANGE, temperature);
    MOE_REQUIRE(moei_f32_is_finite(d->noise) && d->noise >= 0.0f, MOE_ERR_RANGE, noise);
    MOE_REQUIRE(d->dropout >= 0.0f && d->dropout < 1.0f, MOE_ERR_RANGE, dropout);
    MOE_REQUIRE(d->threshold >= 0.0f && d->threshold < 1.0f, MOE_ERR_RANGE, threshold);
    MOE_REQUIRE(d->threshold == 0.0f || d->score == MOE_SCORE_SIGMOID, MOE_ERR_CONFLICT, threshold);
    if (d->num_groups == 0) d->num_groups = 1;
    MOE_REQUIRE(d->num_groups >= 1 && d->num_groups <= MOE_GATE_MAX_GROUPS &&
                    d->num_experts % d->num_groups == 0,
                MOE_ERR_RANGE, num_groups);
    if (d->top_groups == 0) d->top_groups = d->num_groups;
    MOE_REQUIRE(d->top_groups >= 1 && d->top_groups <= d->num_groups, MOE_ERR_RANGE, top_groups);
    MOE_REQUIRE(d->top_k <= d->num_experts / d->num_groups * d->top_groups, MOE_ERR_CONFLICT,
                top_groups);
    if (d->top_groups == d->num_groups) d->num_groups = d->top_groups = 1; /* all groups: no rule */
    MOEI_REQUIRE_RANK(d);
    MOE_REQUIRE(d->whole_batch == 0 || d->whole_batch == 1, MOE_ERR_OPTION, whole_batch);
    if (d->whole_batch) { /* refuses rules that a choice by sums over all tokens does not apply */
        MOE_REQUIRE(d->noise == 0.0f, MOE_ERR_CONFLICT, noise);
        MOE_REQUIRE(d->dropout == 0.0f, MOE_ERR_CONFLICT, dropout);
        MOE_REQUIRE(d->threshold == 0.0f, MOE_ERR_CONFLICT, threshold);
        MOE_REQUIRE(!d->expert_bias, MOE_ERR_CONFLICT, expert_bias);
        MOE_REQUIRE(d->num_groups == 1, MOE_ERR_CONFLICT, num_groups);
    }
    return MOE_OK;
}

/* Returns the kernels' arguments, from a checked descriptor. */
MOE_HOST moei_gate_args moei_gate_resolve(const moe_gate_desc* d)
{
    moei_gate_args a;
    a.logits = d->logits;
    a.expert_bias = d->expert_bias;
    a.expert_disabled = d->expert_disabled;
    a.token_disabled = d->token_disabled;
    a.seed_offset = d->seed_offset;
    a.logits_stride = d->logits_stride;
    a.ids = d->ids;
    a.weights = d->weights;
    a.expert_count = d->expert_count;
    a.chunk_count = d->chunk_count;
    a.prob_sum = d->prob_sum;
    a.z_sum = d->z_sum;
    a.fault = d->fault;
    a.workspace = d->workspace;
    a.seed = d->seed;
    a.logits_dtype = d->logits_dtype;
    a.num_tokens = d->num_tokens;
    a.num_experts = d->num_experts;
    a.top_k = d->top_k;
    a.score = d->score;
    a.renormalize = d->renormalize;
    a.scale = d->scale;
    a.noise = d->noise;
    a.dropout = d->dropout;
    a.num_groups = d->num_groups;
    a.top_groups = d->top_groups;
    a.whole_batch = d->whole_batch;
    a.rank = d->rank;
    a.inverse_temperature = 1.0f / d->temperature;
    a.least_logit = d->threshold == 0.0f
                        ? moe_f32_from_bits(0xff800000u)
                        : (float)log((double)d->threshold / (1.0 - (double)d->threshold));
    return a;
}

#endif
