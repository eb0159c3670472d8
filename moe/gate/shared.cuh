/* shared.cuh: shared memory of a block of the gate with rules, and what the block writes of its
   chunk of tokens: counts and sums of probabilities. Called by rules.cuh and batch.cuh. */
#ifndef MOE_GATE_SHARED_CUH
#define MOE_GATE_SHARED_CUH

#include "row.cuh"

/* A chosen expert. One struct of 16 bytes, so that one address serves the stores of all fields. */
typedef struct moei_gate_pick {
    float logit; /* in units */
    int expert;  /* 0 .. E - 1 */
    float merit; /* what selection compared, where that is not the logit */
    float z;     /* of a token's first pick, with z_sum: lse^2 of the token */
} moei_gate_pick;

/* Returns the bytes of a token's picks: at most 2 num_largest picks, then order [num_largest]. */
MOE_HOST_DEVICE size_t moei_gate_picks_bytes(int num_largest)
{
    return ((size_t)num_largest * (2 * sizeof(moei_gate_pick) + sizeof(uint16_t)) + 7) / 8 * 8;
}
/* Returns a token's order [num_largest], behind its picks: pick order[k] is choice k. */
MOE_DEVICE uint16_t* moei_gate_order(moei_gate_pick* pick, const int num_largest)
{
    return (uint16_t*)(pick + 2 * num_largest);
}

/* Shared memory of a block, in this order. `tokens`: tokens in flight together. */
typedef struct moei_gate_shared {
    unsigned char* picks; /* [tokens][moei_gate_picks_bytes] picks and their order */
    int* count;           /* [E] choices of each expert in the chunk */
    float* bias;          /* [E] with a bias; with whole_batch the batch's merits */
    float2* best;         /* [tokens][E / 4] with groups: the two best of 4 experts */
    float* group;         /* [tokens][groups, a multiple of 4] with groups: their scores */
    float* row;           /* [warps][E] a token's logits, for moei_gate_token */
    float* prob;          /* [warps][E] with prob_sum: sums of probabilities */
    int32_t* chosen;      /* [K] with whole_batch: the batch's choices */
    float* z;             /* [warps] with z_sum: sums of lse^2 */
} moei_gate_shared;

/* Sets the addresses of *s from `base` on; returns the bytes. A null base only counts. */
MOE_HOST_DEVICE size_t moei_gate_carve(moei_gate_shared* s, unsigned char* base,
                                       const moei_gate_args* d, int warps, int tokens,
                                       int num_largest)
{
    const size_t num_experts =
        ((size_t)d->num_experts + 3) / 4 * 4; /* buffers begin at multiples of 16 */
    size_t at = 0;
    s->picks = base + at;
    at += ((size_t)tokens * moei_gate_picks_bytes(num_largest) + 15) / 16 * 16;
    s->count = (int*)(base + at);
    at += num_experts * 4;
    s->bias = (float*)(base + at);
    at += d->expert_bias || d->whole_batch ? num_experts * 4 : 0;
    s->best = (float2*)(base + at);
    at += d->num_groups > 1 ? (size_t)tokens * num_experts * 2 : 0;
    s->group = (float*)(base + at);
    at += d->num_groups > 1 ? (size_t)tokens * (size_t)((d->num_groups + 3) / 4 * 4) * 4 : 0;
    s->row = (float*)(base + at);
    at += (size_t)warps * num_experts * 4;
    s->prob = (float*)(base + at);
    at += d->prob_sum ? (size_t)warps * num_experts * 4 : 0;
    s->chosen = (int32_t*)(base + at);
    at += d->whole_batch ? (size_t)d->top_k * 4 : 0;
    s->z = (float*)(base + at);
    return at + (d->z_sum ? (size_t)warps * 4 : 0);
}

/* Returns the chunks' sums of probabilities in the workspace, [moe_num_chunks(T), E]. With
   whole_batch the chunks' sums of logits, of the same size, stand before them. */
MOE_HOST_DEVICE float* moei_gate_prob_part(const moei_gate_args* d)
{
    return (float*)d->workspace +
           (d->whole_batch ? moe_num_chunks(d->num_tokens) * d->num_experts : 0);
}

/* Returns the chunks' sums of lse^2 in the workspace, [moe_num_chunks(T)], behind those of the
   probabilities. */
MOE_HOST_DEVICE float* moei_gate_z_part(const moei_gate_args* d)
{
    return moei_gate_prob_part(d) +
           (d->prob_sum ? moe_num_chunks(d->num_tokens) * d->num_experts : 0);
}

/* Clears count, prob and z, and loads the bias. All threads; a barrier must follow. */
MOE_DEVICE void moei_gate_rules_begin(const moei_gate_args* d, const moei_gate_shared* s)
{
    const int num_experts = d->num_experts, warps = (int)blockDim.x / MOE_WARP_SIZE;
    MOE_NO_UNROLL
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x) {
        s->count[e] = 0;
        if (d->expert_bias) { /* with a NaN, a group would count its neighbour twice */
            const float b = d->expert_bias[e];
            s->bias[e] = moei_is_nan(b) ? __uint_as_float(0xff800000u) : b;
        }
    }
    MOE_NO_UNROLL
    for (int i = (int)threadIdx.x; d->prob_sum && i < warps * num_experts; i += (int)blockDim.x)
        s->prob[i] = 0.0f;
    if (d->z_sum && (int)threadIdx.x < warps) s->z[threadIdx.x] = 0.0f;
}

/* Writes the counts and the sums of probabilities and of lse^2 of a block's chunk. All threads;
   begins with a barrier. */
MOE_DEVICE void moei_gate_rules_end(const moei_gate_args* d, const moei_gate_shared* s)
{
    const int num_experts = d->num_experts, warps = (int)blockDim.x / MOE_WARP_SIZE;
    moei_gate_write_counts(d, s->count);
    MOE_NO_UNROLL
    for (int e = (int)threadIdx.x; d->prob_sum && e < num_experts; e += (int)blockDim.x) {
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w) sum += s->prob[w * num_experts + e];
        moei_gate_prob_part(d)[(int64_t)blockIdx.x * num_experts + e] = sum;
    }
    if (d->z_sum && threadIdx.x == 0) {
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w) sum += s->z[w];
        moei_gate_z_part(d)[blockIdx.x] = sum;
    }
}

#endif
