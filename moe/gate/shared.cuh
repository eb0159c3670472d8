/* shared.cuh: what a block of the gate with rules has in shared memory, and what it leaves of its
   chunk of tokens: counts, and sums of probabilities. */
#ifndef MOE_GATE_SHARED_CUH
#define MOE_GATE_SHARED_CUH

#include "row.cuh"

/* A chosen expert. 16 bytes, so that one address serves the stores of all. */
typedef struct moei_gate_pick {
    float logit;
    int expert;
    float merit; /* what selection compared, where that is not the logit */
    int unused;
} moei_gate_pick;

/* A token's picks, at most 2 depth, and after them which are the choices, in order. */
MOE_HOST_DEVICE size_t moei_gate_picks_bytes(int depth)
{
    return ((size_t)depth * (2 * sizeof(moei_gate_pick) + sizeof(uint16_t)) + 7) / 8 * 8;
}
MOE_DEVICE uint16_t* moei_gate_order(moei_gate_pick* pick, const int depth)
{
    return (uint16_t*)(pick + 2 * depth);
}

/* Shared memory of a block, in this order. `tokens` are under way together. */
typedef struct moei_gate_shared {
    unsigned char* picks; /* [tokens][moei_gate_picks_bytes] */
    int* count;           /* [E] */
    float* bias;          /* [E] where there is a bias, or one choice for the batch */
    float2* best;         /* [tokens][E / 4] the two best of 4 experts, where there are groups */
    float* group;         /* [tokens][groups] their scores */
    float* row;           /* [warps][E] a token's logits, for those done one by one */
    float* prob;          /* [warps][E] where probabilities are summed */
    int32_t* chosen;      /* [K] the batch's choices, where there is one for all */
} moei_gate_shared;

/* Shares the memory out; returns the bytes. */
MOE_HOST_DEVICE size_t moei_gate_carve(moei_gate_shared* s, unsigned char* base,
                                       const moei_gate_args* d, int warps, int tokens, int depth)
{
    const size_t num_experts =
        ((size_t)d->num_experts + 3) / 4 * 4; /* every piece at a multiple of 16 */
    size_t at = 0;
    s->picks = base + at;
    at += ((size_t)tokens * moei_gate_picks_bytes(depth) + 15) / 16 * 16;
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
    return at + (d->whole_batch ? (size_t)d->top_k * 4 : 0);
}

/* The chunks' sums of probabilities in the workspace, [moe_num_chunks(T), E]; before them, the sums
   of a whole batch's logits. */
MOE_HOST_DEVICE float* moei_gate_prob_part(const moei_gate_args* d)
{
    return (float*)d->workspace +
           (d->whole_batch ? moe_num_chunks(d->num_tokens) * d->num_experts : 0);
}

/* Clears what the block adds to, and fetches the bias; a barrier must follow. */
MOE_DEVICE void moei_gate_rules_begin(const moei_gate_args* d, const moei_gate_shared* s)
{
    const int num_experts = d->num_experts, warps = (int)blockDim.x / MOE_WARP_SIZE;
    MOE_NO_UNROLL
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x) {
        s->count[e] = 0;
        if (d->expert_bias) { /* a NaN would count twice in its group */
            const float b = d->expert_bias[e];
            s->bias[e] = moei_is_nan(b) ? __uint_as_float(0xff800000u) : b;
        }
    }
    MOE_NO_UNROLL
    for (int i = (int)threadIdx.x; d->prob_sum && i < warps * num_experts; i += (int)blockDim.x)
        s->prob[i] = 0.0f;
}

/* Writes the counts and the sums of probabilities of a block's chunk; all threads. */
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
}

#endif
