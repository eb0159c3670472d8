/* plain.cuh: the gate without rules: softmax, top-k softmax and sigmoid of the logits as they are.

   A block has one chunk of tokens; an aligned group of lanes has one token's row in registers. */
#ifndef MOE_GATE_PLAIN_CUH
#define MOE_GATE_PLAIN_CUH

#include "token.cuh"

/* The ids of a token by its group, where logits that are not below the K-th are equal: n experts in
   `pick`, of which the K first in the order of descending logits and ascending indices count. */
MOE_DEVICE void moei_gate_ties(const moei_gate_args* d, int* count, int64_t t, const uint16_t* pick,
                               int n, int rank, const int lanes)
{
    const int64_t row = t * d->logits_stride;
    for (int c = rank; c < n; c += lanes) {
        const int e = pick[c];
        const uint32_t key = moei_ordered(moei_load_f32(d->logits, row + e, d->logits_dtype));
        int k = 0;
        for (int i = 0; i < n; ++i) {
            const uint32_t other =
                moei_ordered(moei_load_f32(d->logits, row + pick[i], d->logits_dtype));
            k += other > key || (other == key && pick[i] < e);
        }
        if (k < d->top_k) {
            d->ids[t * d->top_k + k] = e;
            atomicAdd(count + e, 1);
        }
    }
}

/* One block; each token is owned by an aligned group of `lanes` lanes with `per_lane` logits each.
   K <= depth. The three are literals.

   Once every lane has the token's largest logits in order, it knows which of its own are among the
   K (those not below the K-th) and, by counting the larger ones, at which rank. Where more than K
   are not below the K-th or two of the K are equal, moei_gate_ties finds the ranks; where 2 depth
   are not enough for them, where the largest is infinite or huge, the K-th -infinity or one is NaN,
   the token is done again by moei_gate_token. */
MOE_DEVICE_BODY void moei_gate_block(const moei_gate_args* d, int* count, const int lanes,
                                     const int per_lane, const int depth)
{
    const int K = d->top_k, score = d->score;
    const moei_gate_lanes w = moei_gate_lanes_of(lanes, per_lane, depth);
    const int rank = w.rank, step = (int)blockDim.x / lanes;
    const int chunk = (int)moe_chunk_tokens(d->num_tokens);
    const int first = (int)blockIdx.x * chunk;
    const int tokens = d->num_tokens - first < chunk ? d->num_tokens - first : chunk;
    const bool wide =
        (d->logits_stride | d->num_experts) % 8 == 0 && (uintptr_t)d->logits % 16 == 0;
    const float log2e = 1.44269502f;
    uint16_t* pick = /* [tokens at a time][2 depth] experts chosen, in no order */
        (uint16_t*)(count + d->num_experts) + threadIdx.x / lanes * (2 * depth);
    const bool early = depth <= 8; /* registers are left to fetch the next token's logits */
    float next[32];
    int i = (int)threadIdx.x / lanes;

    if (early) moei_gate_read(next, d, first + (i < tokens ? i : 0), wide, w);
    __syncthreads();
    for (; __any_sync(MOEI_FULL, i < tokens); i += step) {
        const bool live = i < tokens;
        const int64_t t = first + (live ? i : 0);
        float v[32];   /* this lane's logits; where there is no token left, the first one's again */
        float top[32]; /* the token's largest, `depth` of them */
        float kth = 0.0f, sum = 0.0f, shift, factor;
        uint32_t chosen; /* bit j: v[j] is among the K */
        int redo = 0, chosen_count, before;
        bool tie = false;
        int expert[8];
        float logit[8], weight[8], part = 0.0f;
        bool mine[8];

        if (early) {
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j) v[j] = next[j];
            if (i + step < chunk) /* the same for the whole warp */
                moei_gate_read(next, d, first + (i + step < tokens ? i + step : 0), wide, w);
        } else {
            moei_gate_read(v, d, t, wide, w);
        }
        moei_group_sort_largest(top, v, lanes, per_lane, depth);
        shift = -(top[0] * log2e);
        if (score == MOE_SCORE_SOFTMAX) {
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j) sum += moei_exp2_fast(fmaf(v[j], log2e, shift));
        } else { /* only to find a NaN, as the softmax's sum does */
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j) sum += moei_is_nan(v[j]) ? v[j] : 0.0f;
        }
        redo |= moei_is_nan(sum);
        sum = score == MOE_SCORE_SOFTMAX ? moei_group_sum(sum, lanes) : 1.0f;
        redo |= !(fabsf(top[0]) < 1e8f); /* beyond, the rounding of `shift` may overflow 2^ */
        MOEI_UNROLL
        for (int k = 0; k < depth; ++k) {
            if (k < K) kth = top[k];
            if (k + 1 < K && k + 1 < depth) tie |= top[k] == top[k + 1];
        }
        redo |= !(kth >= -3e38f);
        chosen = moei_gate_not_below(v, kth, w);
        before = chosen_count = __popc(chosen) | redo << 16; /* two sums in one */
        MOEI_UNROLL
        for (int by = 1; by < lanes; by <<= 1) {
            const int other = __shfl_up_sync(MOEI_FULL, before, by, lanes);
            if (rank >= by) before += other;
        }
        chosen_count = __shfl_sync(MOEI_FULL, before, lanes - 1, lanes);
        before = (before & 0xffff) - __popc(chosen);
        /* a count over 16 bits says that one lane wants it */
        redo = live && (chosen_count < K || chosen_count > 2 * depth);
        tie |= chosen_count > K;
        if (redo || !live) chosen = 0;

        while (chosen) { /* the chosen come together, so that each lane finishes as many of them */
            const int j = 31 - __clz((int)chosen);
            pick[before++] = (uint16_t)moei_gate_expert(j, w);
            chosen ^= 1u << j;
        }
        __syncwarp(MOEI_FULL);
        MOEI_UNROLL
        for (int n = 0; n < 8; ++n) { /* lane r has the picks and the choices r, r + lanes, ... */
            const int c = n * lanes + rank;
            mine[n] = n * lanes < depth && c < K && live && !redo;
            expert[n] = mine[n] ? pick[c] : 0;
            logit[n] = mine[n] ? moei_load_f32(d->logits, t * d->logits_stride + expert[n],
                                               d->logits_dtype)
                               : 0.0f;
        }
        MOEI_UNROLL
        for (int n = 0; n < 8; ++n) {
            float l = 0.0f;
            MOEI_UNROLL
            for (int r = 0; r < 32; ++r)
                if (r < lanes && n * lanes + r < depth && rank == r) l = top[n * lanes + r];
            weight[n] = 0.0f;
            if (mine[n]) /* what is common to all, an error in `shift` too, cancels below */
                weight[n] = score == MOE_SCORE_SIGMOID ? moei_gate_weight(d, 1.0f, l, top[0], 1.0f)
                                                       : moei_exp2_fast(fmaf(l, log2e, shift));
            part += weight[n];
        }
        factor = d->scale;
        if (score == MOE_SCORE_TOPK_SOFTMAX || d->renormalize) sum = moei_group_sum(part, lanes);
        if (score != MOE_SCORE_SIGMOID) {
            factor = __fdiv_rn(factor, sum); /* sum >= 1, nearly: the largest adds 2^0 */
        } else if (d->renormalize) {
            MOEI_UNROLL
            for (int n = 0; n < 8; ++n)
                if (n * lanes < depth && sum > 0.0f) weight[n] = __fdiv_rn(weight[n], sum);
        }
        MOEI_UNROLL
        for (int n = 0; n < 8; ++n) {
            uint32_t larger = 0; /* a bit for each */
            MOEI_UNROLL
            for (int u = 0; u < depth; ++u)
                larger = __funnelshift_l(__float_as_uint(logit[n] - top[u]), larger, 1);
            if (mine[n]) d->weights[t * K + n * lanes + rank] = weight[n] * factor;
            if (mine[n] && !tie) {
                d->ids[t * K + __popc(larger)] = expert[n];
                atomicAdd(count + expert[n], 1);
            }
        }
        if (tie && live && !redo) moei_gate_ties(d, count, t, pick, chosen_count, rank, lanes);
        __syncwarp(MOEI_FULL);
        {
            uint32_t again = __ballot_sync(MOEI_FULL, redo && rank == 0);
            while (again) {
                const int from = __ffs((int)again) - 1;
                moei_gate_token(d, count, 0, 0, 0, first + __shfl_sync(MOEI_FULL, i, from), 0);
                again &= again - 1;
            }
        }
    }
    moei_gate_write_counts(d, count);
}

#endif
