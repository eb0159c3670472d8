/* rules.cuh: the gate with rules: every score, temperature, noise, dropout, masks, a bias for
   selection, groups of experts, a threshold, sums of probabilities; one pass over the logits.

   As in plain.cuh a block has one chunk of tokens and an aligned group of lanes one token's row in
   registers; each rule is one step over them that the others' cost does not depend on. */
#ifndef MOE_GATE_RULES_CUH
#define MOE_GATE_RULES_CUH

#include "../base/copy.cuh"
#include "token.cuh"

/* A chosen expert: what selection compared, and its logit. */
typedef struct moei_gate_pick {
    float merit, logit;
} moei_gate_pick;

/* Shared memory of a block, in this order. `tokens` are under way together. */
typedef struct moei_gate_shared {
    float* prob;          /* [warps][E] where probabilities are summed */
    int* count;           /* [E] */
    float* bias;          /* [E] where there is a bias */
    moei_gate_pick* pick; /* [tokens][2 depth] */
    float2* best;         /* [tokens][E / 4] the two best of 4 experts, where there are groups */
    float* group;         /* [tokens][groups] their scores */
    uint16_t* expert;     /* [tokens][2 depth] expert of each pick */
} moei_gate_shared;

/* Shares the memory out; returns the bytes. */
MOE_HOST_DEVICE size_t moei_gate_carve(moei_gate_shared* s, unsigned char* base,
                                       const moe_gate_desc* d, int warps, int tokens, int depth)
{
    const size_t E = ((size_t)d->num_experts + 3) / 4 * 4; /* every piece at a multiple of 16 */
    size_t at = 0;
    s->prob = (float*)(base + at);
    at += d->prob_sum || d->whole_batch ? (size_t)warps * E * 4 : 0;
    s->count = (int*)(base + at);
    at += E * 4;
    s->bias = (float*)(base + at);
    at += d->expert_bias || d->whole_batch ? E * 4 : 0;
    s->pick = (moei_gate_pick*)(base + at);
    at += (size_t)tokens * 2 * (size_t)depth * 8;
    s->best = (float2*)(base + at);
    at += d->num_groups > 1 ? (size_t)tokens * E * 2 : 0;
    s->group = (float*)(base + at);
    at += d->num_groups > 1 ? (size_t)tokens * (size_t)((d->num_groups + 3) / 4 * 4) * 4 : 0;
    s->expert = (uint16_t*)(base + at);
    return at + (size_t)tokens * 2 * (size_t)depth * 2;
}

/* The chunks' sums of probabilities in the workspace, [moe_num_chunks(T), E]; before them, the sums of
   a whole batch's logits. */
MOE_HOST_DEVICE float* moei_gate_prob_part(const moe_gate_desc* d)
{
    return (float*)d->workspace +
           (d->whole_batch ? moe_num_chunks(d->num_tokens) * d->num_experts : 0);
}

/* Clears what the block adds to, and fetches the bias; a barrier must follow. */
MOE_DEVICE void moei_gate_rules_begin(const moe_gate_desc* d, const moei_gate_shared* s)
{
    const int E = d->num_experts, warps = (int)blockDim.x / MOEI_WARP;
    MOEI_NO_UNROLL
    for (int e = (int)threadIdx.x; e < E; e += (int)blockDim.x) {
        s->count[e] = 0;
        if (d->expert_bias) s->bias[e] = d->expert_bias[e];
    }
    MOEI_NO_UNROLL
    for (int i = (int)threadIdx.x; d->prob_sum && i < warps * E; i += (int)blockDim.x)
        s->prob[i] = 0.0f;
}

/* Writes the counts and the sums of probabilities of a block's chunk; all threads. */
MOE_DEVICE void moei_gate_rules_end(const moe_gate_desc* d, const moei_gate_shared* s)
{
    const int E = d->num_experts, warps = (int)blockDim.x / MOEI_WARP;
    moei_gate_write_counts(d, s->count);
    MOEI_NO_UNROLL
    for (int e = (int)threadIdx.x; d->prob_sum && e < E; e += (int)blockDim.x) {
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w) sum += s->prob[w * E + e];
        moei_gate_prob_part(d)[(int64_t)blockIdx.x * E + e] = sum;
    }
}

/* What a group of lanes knows of its token's logits v, those that the token does not see being
   -infinity. lanes and per_lane are literals here and below. */
MOE_DEVICE moei_gate_stats moei_gate_lane_stats(const moe_gate_desc* d, const float* v,
                                                const int lanes, const int per_lane)
{
    moei_gate_stats s;
    float nan = 0.0f;
    s.max = v[0];
    s.sum = 0.0f;
    MOEI_UNROLL
    for (int j = 0; j < per_lane; ++j) {
        s.max = fmaxf(s.max, v[j]);
        nan += moei_is_nan(v[j]) ? 1.0f : 0.0f;
    }
    s.max = moei_group_max(s.max, lanes);
    if (d->score == MOE_SCORE_SPARSEMAX) { /* Michelot: tau from below, till none leaves */
        float n = 4096.0f, before = 4097.0f;
        s.sum = -1.0f;
        while (__any_sync(MOEI_FULL, n < before)) {
            const float floor = s.max + s.sum;
            float part = 0.0f, above = 0.0f;
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j) {
                const bool in = v[j] > floor;
                part += in ? v[j] - s.max : 0.0f;
                above += in ? 1.0f : 0.0f;
            }
            part = moei_group_sum(part, lanes);
            above = moei_group_sum(above, lanes);
            if (n < before) { /* else this token is done, and only goes along */
                before = n;
                n = above;
                if (n > 0.0f) s.sum = __fdividef(part - 1.0f, n);
            }
        }
    } else if (d->score == MOE_SCORE_SIGMOID) {
        if (d->prob_sum) {
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j)
                s.sum += __fdividef(1.0f, 1.0f + moei_exp2_fast(-1.44269502f * v[j]));
        }
        s.sum = moei_group_sum(s.sum, lanes);
    } else {
        const float shift = -(s.max * 1.44269502f);
        MOEI_UNROLL
        for (int j = 0; j < per_lane; ++j)
            s.sum += moei_exp2_fast(fmaf(v[j], 1.44269502f, shift));
        s.sum = moei_group_sum(s.sum, lanes);
    }
    s.nan = moei_group_sum(nan, lanes) > 0.0f;
    return s;
}

/* The scores of a lane's logits, quick: for selection and for sums. */
MOE_DEVICE void moei_gate_lane_scores(float* u, const float* v, const moe_gate_desc* d,
                                      const moei_gate_stats* s, const int per_lane)
{
    if (d->score == MOE_SCORE_SIGMOID) {
        MOEI_UNROLL
        for (int j = 0; j < per_lane; ++j)
            u[j] = __fdividef(1.0f, 1.0f + moei_exp2_fast(-1.44269502f * v[j]));
    } else if (d->score == MOE_SCORE_SPARSEMAX) {
        MOEI_UNROLL
        for (int j = 0; j < per_lane; ++j) u[j] = fmaxf(v[j] - s->max - s->sum, 0.0f);
    } else {
        const float shift = -(s->max * 1.44269502f), part = __fdiv_rn(1.0f, s->sum);
        MOEI_UNROLL
        for (int j = 0; j < per_lane; ++j)
            u[j] = part * moei_exp2_fast(fmaf(v[j], 1.44269502f, shift));
    }
}

/* Lets only the experts of the token's best groups stay: the others' merits become -infinity. best
   and group are this token's in shared memory. */
MOE_DEVICE void moei_gate_lane_groups(float* u, const moe_gate_desc* d, float2* best, float* group,
                                      int rank, const int lanes, const int per_lane)
{
    const int G = d->num_groups, size = d->num_experts / G;
    const float none = __uint_as_float(0xff800000u), per_group = __fdividef(1.0f, (float)size);
    uint32_t kept = 0;
    MOEI_UNROLL
    for (int j = 0; j < per_lane; j += 4) {
        const int e = moei_gate_expert(j, rank, lanes);
        const float a = fmaxf(u[j], u[j + 1]), b = fminf(u[j], u[j + 1]);
        const float c = fmaxf(u[j + 2], u[j + 3]), f = fminf(u[j + 2], u[j + 3]);
        if (e < d->num_experts)
            best[e >> 2] = make_float2(fmaxf(a, c), fmaxf(fminf(a, c), fmaxf(b, f)));
    }
    __syncwarp(MOEI_FULL);
    for (int g = rank; g < G; g += lanes) {
        float first = none, second = none;
        for (int i = g * (size >> 2); i < (g + 1) * (size >> 2); ++i) {
            const float2 v = best[i];
            second = fmaxf(fminf(first, v.x), fmaxf(second, v.y));
            first = fmaxf(first, v.x);
        }
        group[g] = second > none ? first + second : first;
    }
    __syncwarp(MOEI_FULL);
    for (int g = rank; g < G; g += lanes) {
        const float own = group[g];
        int ahead = 0;
        for (int i = 0; i < G; ++i) ahead += group[i] > own || (group[i] == own && i < g);
        kept |= (ahead < d->top_groups ? 1u : 0u) << g;
    }
    for (int w = 1; w < lanes; w <<= 1) kept |= __shfl_xor_sync(MOEI_FULL, kept, w);
    MOEI_UNROLL
    for (int j = 0; j < per_lane; j += 4) {
        const int g = (int)(((float)moei_gate_expert(j, rank, lanes) + 0.5f) * per_group);
        if (!(kept >> (g & 31) & 1)) {
            MOEI_UNROLL
            for (int i = 0; i < 4; ++i) u[j + i] = none;
        }
    }
}

/* Adds the probabilities p of a warp's tokens, one a group of lanes, to the warp's own prob [E]. Each
   step halves the tokens: a lane passes on one half of its experts and adds up the other. */
MOE_DEVICE void moei_gate_lane_add(float* p, float* prob, int E, int rank, const int lanes,
                                   const int per_lane)
{
    int from = 0;
    MOEI_UNROLL
    for (int s = 0; s < 5; ++s) {
        const int w = 16 >> s, half = per_lane >> (s + 1);
        if (w >= lanes && half > 0) {
            const bool upper = (moei_lane() & w) != 0;
            MOEI_UNROLL
            for (int j = 0; j < 16; ++j)
                if (j < half) {
                    const float pass = upper ? p[j] : p[j + half];
                    const float keep = upper ? p[j + half] : p[j];
                    p[j] = keep + __shfl_xor_sync(MOEI_FULL, pass, w);
                }
            from += upper ? half : 0;
        }
    }
    MOEI_UNROLL
    for (int j = 0; j < per_lane; ++j)
        if (j < per_lane * lanes / 32) {
            const int e = moei_gate_expert(from + j, rank, lanes);
            if (e < E) prob[e] += p[j];
        }
    __syncwarp(MOEI_FULL);
}

/* One block; a token is owned by an aligned group of `lanes` lanes with `per_lane` logits each.
   K <= depth. The token's largest merits in order tell each lane which of its own are among the K;
   those meet in shared memory, where each finds its rank. A token of which more than 2 depth experts
   are not below the K-th, or that sees fewer than K, or whose logits are infinite, huge or NaN, is
   done again by moei_gate_token. */
MOE_DEVICE_BODY void moei_gate_rules_block(const moe_gate_desc* d, const moei_gate_shared* shared,
                                           const int lanes, const int per_lane, const int depth)
{
    const int E = d->num_experts, K = d->top_k;
    const int rank = moei_lane() & (lanes - 1), step = (int)blockDim.x / lanes;
    const int own = (int)threadIdx.x / lanes; /* of the tokens under way */
    const int chunk = (int)moe_chunk_tokens(d->num_tokens);
    const int first = (int)blockIdx.x * chunk;
    const int tokens = d->num_tokens - first < chunk ? d->num_tokens - first : chunk;
    const bool wide =
        (d->logits_stride | d->num_experts) % 8 == 0 && (uintptr_t)d->logits % 16 == 0;
    const bool grouped = d->num_groups > 1 && d->top_groups < d->num_groups;
    const bool by_score = moei_gate_by_score(d);
    const uint64_t seed = moei_gate_seed(d);
    moei_gate_pick* pick = shared->pick + own * (2 * depth);
    uint16_t* expert = shared->expert + own * (2 * depth);
    float* prob = shared->prob + moei_warp() * E;
    uint32_t off = 0; /* of this lane's experts, for all tokens */

    MOEI_UNROLL
    for (int j = 0; j < per_lane; ++j) {
        const int e = moei_gate_expert(j, rank, lanes);
        if (e >= E || (d->expert_off && d->expert_off[e])) off |= 1u << j;
    }
    __syncthreads();
    for (int i = own; __any_sync(MOEI_FULL, i < tokens); i += step) {
        const int64_t t = first + (i < tokens ? i : 0);
        const bool masked = i < tokens && d->token_off && d->token_off[t];
        const bool live = i < tokens && !masked;
        float v[32];   /* this lane's logits; where there is no token left, the first one's again */
        float u[32];   /* what selection compares */
        float top[32]; /* the token's largest u, `depth` of them */
        float kth = 0.0f, total = 0.0f;
        uint32_t unseen = off;
        int n = 0, before, at;
        bool redo;
        moei_gate_stats s;

        moei_gate_read(v, d, t, rank, wide, lanes, per_lane);
        moei_gate_logits(v, &unseen, d, seed, t, rank, lanes, per_lane);
        s = moei_gate_lane_stats(d, v, lanes, per_lane);
        MOEI_UNROLL
        for (int j = 0; j < per_lane; ++j) u[j] = v[j];
        if (by_score) moei_gate_lane_scores(u, v, d, &s, per_lane);
        if (d->expert_bias) {
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j) {
                const int e = moei_gate_expert(j, rank, lanes);
                u[j] += e < E ? shared->bias[e] : 0.0f;
            }
        }
        MOEI_UNROLL
        for (int j = 0; j < per_lane; ++j)
            if (unseen >> j & 1) u[j] = __uint_as_float(0xff800000u);
        if (grouped)
            moei_gate_lane_groups(u, d, shared->best + own * (E >> 2),
                                  shared->group + own * ((d->num_groups + 3) / 4 * 4), rank, lanes,
                                  per_lane);
        moei_group_sort_largest(top, u, lanes, per_lane, depth);
        MOEI_UNROLL
        for (int k = 0; k < depth; ++k)
            if (k < K) kth = top[k];
        /* beyond, rounding is no longer small; and each of the K must be there */
        redo = s.nan || !(fabsf(s.max) < 1e8f) || !(fabsf(top[0]) < 1e8f) || !(kth >= -3e38f);
        MOEI_UNROLL
        for (int j = 0; j < per_lane; ++j) n += u[j] >= kth ? 1 : 0;
        at = n;
        MOEI_UNROLL
        for (int w = 1; w < lanes; w <<= 1) {
            const int other = __shfl_up_sync(MOEI_FULL, at, w, lanes);
            if (rank >= w) at += other;
        }
        before = at - n;
        n = __shfl_sync(MOEI_FULL, at, lanes - 1, lanes);
        redo = live && (redo || n < K || n > 2 * depth);
        if (redo || !live) n = 0;
        if (n > 0) {
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j)
                if (u[j] >= kth) {
                    pick[before].merit = u[j];
                    pick[before].logit = v[j];
                    expert[before++] = (uint16_t)moei_gate_expert(j, rank, lanes);
                }
        }
        __syncwarp(MOEI_FULL);
        { /* a lane has the picks rank, rank + lanes, ... */
            float weight[16];
            int place[16];
            MOEI_UNROLL
            for (int m = 0; m < 16; ++m)
                if (m < 2 * depth / lanes || m == 0) {
                    const int c = m * lanes + rank;
                    place[m] = K;
                    weight[m] = 0.0f;
                    if (c < n) {
                        const moei_gate_pick mine = pick[c];
                        const int e = expert[c];
                        int larger = 0;
                        MOEI_NO_UNROLL
                        for (int o = 0; o < n; ++o)
                            larger += pick[o].merit > mine.merit ||
                                      (pick[o].merit == mine.merit && expert[o] < e);
                        if (larger < K) {
                            weight[m] = moei_gate_weight(
                                d, mine.logit, s.max,
                                d->score == MOE_SCORE_TOPK_SOFTMAX ? 1.0f : s.sum);
                            place[m] = larger | (moei_gate_used(d, mine.logit, weight[m]) ? 0 : 256);
                            if (place[m] & 256) weight[m] = 0.0f;
                            total += weight[m];
                        }
                    }
                }
            total = moei_group_sum(total, lanes);
            if (d->score != MOE_SCORE_TOPK_SOFTMAX && !d->renormalize) total = 0.0f;
            MOEI_UNROLL
            for (int m = 0; m < 16; ++m)
                if ((m < 2 * depth / lanes || m == 0) && place[m] != K) {
                    const int e = expert[m * lanes + rank];
                    const int64_t slot = t * K + (place[m] & 255);
                    const bool used = place[m] < 256;
                    const float w = total > 0.0f ? __fdiv_rn(weight[m], total) : weight[m];
                    d->ids[slot] = used ? e : -1;
                    d->weights[slot] = w * d->scale;
                    if (used) atomicAdd(shared->count + e, 1);
                }
        }
        if (masked) moei_gate_unused(d, t, rank, lanes);
        if (d->prob_sum) {
            if (d->score == MOE_SCORE_SIGMOID) total = s.sum > 0.0f ? __fdiv_rn(1.0f, s.sum) : 0.0f;
            else total = 1.0f;
            if (!by_score || d->expert_bias || grouped) moei_gate_lane_scores(u, v, d, &s, per_lane);
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j)
                u[j] = !live || redo || (unseen >> j & 1) ? 0.0f : u[j] * total;
            moei_gate_lane_add(u, prob, E, rank, lanes, per_lane);
        }
        __syncwarp(MOEI_FULL);
        {
            uint32_t again = __ballot_sync(MOEI_FULL, redo && rank == 0);
            while (again) {
                const int from = __ffs((int)again) - 1;
                moei_gate_token(d, shared->count, d->prob_sum ? prob : (float*)0,
                                first + __shfl_sync(MOEI_FULL, i, from), 1);
                __syncwarp(MOEI_FULL);
                again &= again - 1;
            }
        }
    }
    moei_gate_rules_end(d, shared);
}

/* One block, a warp a token. */
MOE_DEVICE void moei_gate_any_block(const moe_gate_desc* d, const moei_gate_shared* shared)
{
    const int64_t chunk = moe_chunk_tokens(d->num_tokens), first = blockIdx.x * chunk;
    const int64_t end = first + chunk < d->num_tokens ? first + chunk : d->num_tokens;
    float* prob = d->prob_sum ? shared->prob + moei_warp() * d->num_experts : (float*)0;
    __syncthreads();
    for (int64_t t = first + moei_warp(); t < end; t += blockDim.x / MOEI_WARP) {
        if (d->token_off && d->token_off[t]) moei_gate_unused(d, t, moei_lane(), MOEI_WARP);
        else moei_gate_token(d, shared->count, prob, t, 1);
    }
    moei_gate_rules_end(d, shared);
}

#endif
