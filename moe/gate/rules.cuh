/* rules.cuh: the gate with rules: every score, temperature, noise, dropout, disabled experts and
   tokens, a bias for choosing, groups, a threshold, sums of probabilities; one pass over the
   logits. Called by the kernels of MOE_GATE_RULES_LIST and by moei_gate_any.

   As in plain.cuh a block has one chunk of tokens and an aligned group of lanes has one token's row
   in registers. Each rule is one pass over these registers, and adds no cost to the others. */
#ifndef MOE_GATE_RULES_CUH
#define MOE_GATE_RULES_CUH

#include "batch.cuh"
#include "scores.cuh"

/* Writes those of a lane's experts that have a bit in `picked` to pick, one after another. merits,
   a literal: 1 writes their merits u too. */
MOE_DEVICE void moei_gate_lane_pick(moei_gate_pick* pick, uint32_t picked, const float* v,
                                    const float* u, const moei_gate_lanes w, const int merits)
{
    MOE_UNROLL
    for (int j = 0; j < w.per_lane; ++j)
        if (picked >> j & 1) {
            pick->logit = v[j];
            pick->expert = moei_gate_expert(j, w);
            if (merits) pick->merit = u[j];
            ++pick;
        }
}

/* Puts a token's n picks, K or more, in order: by descending merit, equals by ascending expert.
   top: the K largest merits in order. merits: 0 where the logits are compared. The token's lanes
   share the picks; n = 0 does nothing. */
MOE_DEVICE void moei_gate_lane_order(moei_gate_pick* pick, bool merits, int n, const float* top,
                                     int top_k, const moei_gate_lanes w)
{
    const float* merit = merits ? &pick->merit : &pick->logit;
    const int step = (int)(sizeof *pick / sizeof *merit);
    uint16_t* order = moei_gate_order(pick, w.num_largest);
    bool tie = n > top_k;
    top_k = (int)moei_opaque(
        (uint64_t)top_k); /* else each k < K stays in a register since kth was found */
    MOE_UNROLL
    for (int k = 0; k < w.num_largest - 1; ++k) tie |= k + 1 < top_k && top[k] == top[k + 1];
    if (!tie) { /* a pick's rank is the number of larger ones in top */
        MOE_UNROLL
        for (int m = 0; m < 8; ++m) {
            const int c = m * w.lanes + w.rank;
            uint32_t larger = 0; /* a bit for each of top */
            if (m * w.lanes < w.num_largest && c < n) {
                const float own = merit[c * step];
                MOE_UNROLL
                for (int k = 0; k < w.num_largest; ++k)
                    larger = __funnelshift_l(__float_as_uint(own - top[k]), larger, 1);
                order[__popc(larger)] = (uint16_t)c;
            }
        }
    } else {
        MOE_NO_UNROLL
        for (int c = w.rank; c < n; c += w.lanes) {
            const float own = merit[c * step];
            const int e = pick[c].expert;
            int larger = 0;
            MOE_NO_UNROLL
            for (int o = 0; o < n; ++o) {
                const float other = merit[o * step];
                larger += other > own || (other == own && pick[o].expert < e);
            }
            if (larger < top_k) order[larger] = (uint16_t)c;
        }
    }
}

/* Writes a token's K choices from its picks in order, and counts them. Lane r has the choices r,
   r + lanes, ... `live`: the token has picks. The whole warp calls it.
     1. the logits of the lane's choices
     2. the largest logit of the chosen, where their own sum divides the weights
     3. weights; choices below the threshold, or with a sparsemax score of 0, become unused
     4. the sum that divides the weights; ids, weights and counts */
MOE_DEVICE void moei_gate_lane_finish(const moei_gate_args* d, const moei_gate_units* units,
                                      int* count, int64_t t, bool live, moei_gate_pick* pick,
                                      const moei_gate_stats* s, const moei_gate_lanes w)
{
    const int top_k = d->top_k;
    const uint16_t* order = moei_gate_order(pick, w.num_largest);
    const bool softmax = moei_gate_is_softmax(d->score), own = moei_gate_own_sum(d);
    float weight[8], total = 0.0f, factor = d->scale, max = s->max, shift;
    int e[8];
    MOE_UNROLL
    for (int m = 0; m < 8; ++m) { /* 1.; weight holds the logits until 3. */
        const int k = m * w.lanes + w.rank;
        weight[m] = __uint_as_float(0xff800000u);
        e[m] = -1;
        if (m * w.lanes < w.num_largest && live && k < top_k) {
            const moei_gate_pick p = pick[order[k]];
            weight[m] = p.logit;
            e[m] = p.expert;
        }
    }
    if (own && d->score != MOE_SCORE_SPARSEMAX) { /* 2. */
        float most = weight[0];
        MOE_UNROLL
        for (int m = 1; m < 8; ++m) most = fmaxf(most, weight[m]);
        most = moe_warp_max(most, w.lanes);
        if (most >= -3.40282347e38f) max = most;
    }
    shift = -(max * units->log2);
    MOE_UNROLL /* 3. */
    for (int m = 0; m < 8; ++m)
        if (m * w.lanes < w.num_largest && e[m] >= 0) {
            const float v = weight[m];
            weight[m] = softmax ? moei_exp2_fast(own ? units->log2 * (v - max)
                                                     : fmaf(v, units->log2, shift))
                                : moei_gate_weight(d, units->unit, v, max, s->sum);
            if (!moei_gate_used(d, v * units->unit, weight[m])) {
                e[m] = -1;
                weight[m] = 0.0f;
            }
            total += weight[m];
        }
    if (own) total = moe_warp_sum(total, w.lanes); /* 4. */
    else total = softmax ? s->sum : 1.0f;
    if (total > 0.0f) factor = __fdiv_rn(factor, total);
    MOE_UNROLL
    for (int m = 0; m < 8; ++m) {
        const int k = m * w.lanes + w.rank;
        if (m * w.lanes < w.num_largest && live && k < top_k) {
            d->ids[t * top_k + k] = e[m];
            d->weights[t * top_k + k] = e[m] >= 0 ? weight[m] * factor : 0.0f;
            if (e[m] >= 0) atomicAdd(count + e[m], 1);
        }
    }
}

/* Returns the sum of n over the lanes of the group. Sets *before to the sum over the lanes before
   this one, modulo 2^16. The whole warp calls it. */
MOE_DEVICE int moei_gate_lane_count(int* before, int n, const moei_gate_lanes w)
{
    int sum = n;
    MOE_UNROLL
    for (int by = 1; by < w.lanes; by <<= 1) {
        const int other = __shfl_up_sync(MOE_FULL_WARP, sum, by, w.lanes);
        if (w.rank >= by) sum += other;
    }
    *before = (sum - n) & 0xffff;
    return __shfl_sync(MOE_FULL_WARP, sum, w.lanes - 1, w.lanes);
}

/* Sets top to the token's w.num_largest largest merits in order; returns the K-th. With whole_batch
   the merits are 0, -1, ... in the order of choice (batch.cuh). The whole warp calls it. */
MOE_DEVICE float moei_gate_lane_top(float* top, const float* u, const moei_gate_args* d,
                                    const moei_gate_lanes w)
{
    float kth = 0.0f;
    if (d->whole_batch) {
        MOE_UNROLL
        for (int k = 0; k < w.num_largest; ++k) top[k] = (float)-k;
    } else {
        moei_group_sort_largest(top, u, w.lanes, w.per_lane, w.num_largest);
    }
    MOE_UNROLL
    for (int k = 0; k < w.num_largest; ++k)
        if (k < d->top_k) kth = top[k];
    return kth;
}

/* Returns whether the token must be done again: its rounding errors are no longer small, it has a
   NaN, or fewer than K experts are left. largest, kth: of the merits. */
MOE_DEVICE bool moei_gate_lane_inexact(const moei_gate_stats* s, const moei_gate_units* units,
                                       float largest, float kth)
{
    return s->nan || !(fabsf(s->max * units->log2) < 1e8f) || !(fabsf(largest) < 1e8f) ||
           !(kth >= -3e38f);
}

/* Calls moei_gate_token for the token t of each lane whose `redo` is set, one after another. The
   whole warp calls it; prob and row are its own. */
MOE_DEVICE void moei_gate_lane_again(const moei_gate_args* d, const moei_gate_shared* shared,
                                     float* prob, float* row, int t, bool redo)
{
    uint32_t again = __ballot_sync(MOE_FULL_WARP, redo);
    while (again) {
        const int from = __ffs((int)again) - 1;
        moei_gate_token(d, shared->count, prob, row, shared->z + moe_warp(), shared->chosen,
                        __shfl_sync(MOE_FULL_WARP, t, from), 1);
        __syncwarp(MOE_FULL_WARP);
        again &= again - 1;
    }
}

/* 1: registers are left to load the next token's logits while this one's are sorted. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define MOEI_GATE_EARLY 0
#else
#define MOEI_GATE_EARLY 1
#endif

/* Runs one block, which has one chunk. An aligned group of `lanes` lanes owns a token; a lane has
   `per_lane` of its logits. K <= num_largest. The three are literals. In a round each group does a
   token:

     1. load: its logits; where `early` already in the round before
     2. apply the rules of single logits; the largest logit
     3. sum over the row; find -inf and NaN
     4. merits: what selection compares; groups
     5. sort: the token's `num_largest` largest merits in order, of them the K-th
     6. choose: a lane's merits that are not below the K-th, and how many the lanes before have
     7. write: collects the picks in shared memory; their order, weights and ids
     8. sums of probabilities and of lse^2, which waits in the token's first pick since 3.
     9. again: moei_gate_token does the tokens that 1. to 8. cannot. More than 2 num_largest of
        their experts are not below the K-th, or they see fewer than K, or their logits are
        infinite, huge or NaN. */
MOE_DEVICE_BODY void moei_gate_rules_block(const moei_gate_args* d, const moei_gate_shared* shared,
                                           const int lanes, const int per_lane,
                                           const int num_largest)
{
    const moei_gate_lanes w = moei_gate_lanes_of(lanes, per_lane, num_largest);
    const int num_experts = d->num_experts, top_k = d->top_k, step = (int)blockDim.x / lanes;
    const int own = (int)threadIdx.x / lanes; /* this group's number among the tokens in flight */
    const int chunk = (int)moe_chunk_tokens(d->num_tokens);
    const int first = (int)blockIdx.x * chunk;
    const int tokens = d->num_tokens - first < chunk ? d->num_tokens - first : chunk;
    const bool wide =
        (d->logits_stride | d->num_experts) % 8 == 0 && (uintptr_t)d->logits % 16 == 0;
    const bool judged = d->expert_bias || d->num_groups > 1; /* merits are not the logits alone */
    const bool merits = judged || d->whole_batch;            /* 0: selection compares the logits */
    const moei_gate_units units = moei_gate_units_of(d);
    /* a finite logit may become -inf; moei_gate_token tells the two apart */
    const bool overflows =
        moei_gate_multiplies(d) && (d->inverse_temperature != 1.0f || d->noise > 1e28f);
    const bool early = per_lane <= 16 && MOEI_GATE_EARLY;
    const uint64_t seed = moei_gate_seed(d);
    moei_gate_pick* pick =
        (moei_gate_pick*)(shared->picks + (size_t)own * moei_gate_picks_bytes(num_largest));
    float* prob = shared->prob + moe_warp() * num_experts;
    float* row = shared->row + moe_warp() * num_experts;
    uint32_t off = 0; /* bit j: the lane's j-th expert is disabled, or past E */
    float next[32];

    MOE_UNROLL
    for (int j = 0; j < 32; ++j) next[j] = 0.0f;
    MOE_UNROLL
    for (int j = 0; j < per_lane; ++j) {
        const int e = moei_gate_expert(j, w);
        if (e >= num_experts || (d->expert_disabled && d->expert_disabled[e])) off |= 1u << j;
    }
    if (d->whole_batch) moei_gate_batch_choose(d, shared);
    __syncthreads(); /* shared memory is ready: counts, sums, bias or the batch's choices */
    /* with early loads, the round before the first only loads */
    for (int i = early ? own - step : own; __any_sync(MOE_FULL_WARP, i < tokens); i += step) {
        const int64_t t = first + (i >= 0 && i < tokens ? i : 0);
        const bool masked = i >= 0 && i < tokens && d->token_disabled && d->token_disabled[t];
        const bool live = i < tokens && !masked;
        float v[32];   /* this lane's logits; of the block's first token where none is left */
        float u[32];   /* merits of v */
        float top[32]; /* the token's `num_largest` largest merits, in order */
        float kth, max, offset;
        uint32_t unseen = off, picked;
        int n, before;
        bool redo;
        moei_gate_stats s;

        if (early) { /* 1. load */
            MOE_UNROLL
            for (int j = 0; j < per_lane; ++j) v[j] = next[j];
            if (i + step < chunk) /* uniform in the warp, as is i < 0 */
                moei_gate_read(next, d, first + (i + step < tokens ? i + step : 0), wide, w);
            if (i < 0) continue;
        } else {
            moei_gate_read(v, d, t, wide, w);
        }
        max = moei_gate_logits(v, &unseen, &offset, 0, d, seed, t, w); /* 2. apply */
        s = moei_gate_lane_stats(d, &units, v, max, w);                /* 3. sum */
        if (d->z_sum) {
            const float lse = moei_gate_lane_lse(v, offset, d, &units, &s, w);
            if (w.rank == 0) pick->z = lse * lse;
        }
        if ((judged || !moei_gate_is_softmax(d->score)) && moei_gate_lane_odd(v, w))
            s.nan = moei_gate_lane_minus(&unseen, v, overflows, w);
        moei_gate_lane_merits(u, v, unseen, d, &units, &s, shared->bias, w); /* 4. merits */
        if (d->num_groups > 1)
            moei_gate_lane_groups(u, v, d, shared->best + own * (num_experts >> 2),
                                  shared->group + own * ((d->num_groups + 3) / 4 * 4), w);
        kth = moei_gate_lane_top(top, u, d, w); /* 5. sort */
        picked = moei_gate_not_below(u, kth, w); /* 6. choose */
        redo = moei_gate_lane_inexact(&s, &units, top[0], kth);
        n = moei_gate_lane_count(&before, __popc(picked) | (redo ? 1 << 16 : 0), w);
        redo =
            live && (n < top_k || n > 2 * num_largest); /* 2^16 or more: some lane has set redo */
        if (redo || !live) n = 0;
        if (n == 0) picked = 0;
        if (merits) moei_gate_lane_pick(pick + before, picked, v, u, w, 1); /* 7. write */
        else moei_gate_lane_pick(pick + before, picked, v, u, w, 0);
        __syncwarp(MOE_FULL_WARP); /* the picks of all lanes are written */
        moei_gate_lane_order(pick, merits, n, top, top_k, w);
        __syncwarp(MOE_FULL_WARP); /* and their order */
        moei_gate_lane_finish(d, &units, shared->count, t, n > 0, pick, &s, w);
        if (masked) moei_gate_unused(d, t, w.rank, lanes);
        if (d->prob_sum) /* 8. probabilities */
            moei_gate_lane_probabilities(prob, v, unseen, live && !redo, d, &units, &s, w);
        if (d->z_sum) {
            const float z = moe_warp_sum(live && !redo && w.rank == 0 ? pick->z : 0.0f, 32);
            if (moe_lane() == 0) shared->z[moe_warp()] += z;
        }
        moei_gate_lane_again(d, shared, prob, row, first + i, redo && w.rank == 0); /* 9. */
    }
    moei_gate_rules_end(d, shared);
}

/* Runs one block of moei_gate_any: one chunk, a warp a token. */
MOE_DEVICE void moei_gate_any_block(const moei_gate_args* d, const moei_gate_shared* shared)
{
    const int chunk = (int)moe_chunk_tokens(d->num_tokens), first = (int)blockIdx.x * chunk;
    const int tokens = d->num_tokens - first < chunk ? d->num_tokens - first : chunk;
    float* prob = shared->prob + moe_warp() * d->num_experts;
    float* row = shared->row + moe_warp() * d->num_experts;
    if (d->whole_batch) moei_gate_batch_choose(d, shared);
    __syncthreads();
    for (int i = moe_warp(); i < tokens; i += (int)blockDim.x / MOE_WARP_SIZE) {
        const int t = first + i;
        if (d->token_disabled && d->token_disabled[t])
            moei_gate_unused(d, t, moe_lane(), MOE_WARP_SIZE);
        else
            moei_gate_token(d, shared->count, prob, row, shared->z + moe_warp(), shared->chosen, t,
                            1);
    }
    moei_gate_rules_end(d, shared);
}

#endif
