/* plain.cuh: the gate without rules: softmax, top-k softmax and sigmoid of the logits as given.
   Called by the kernels of MOE_GATE_LIST.

   A block has one chunk of tokens. An aligned group of lanes has one token's row in registers. */
#ifndef MOE_GATE_PLAIN_CUH
#define MOE_GATE_PLAIN_CUH

#include "token.cuh"

/* Writes and counts the ids of token t where logits that are not below the K-th are equal. pick [n]
   has the experts of these logits. The first K of them are the choices, by descending logit, equals
   by ascending index. The lanes of the token's group call it; lane `rank` of `lanes` ranks every
   lanes-th pick. */
MOE_DEVICE void moei_gate_ties(const moei_gate_args* d, int* count, int64_t t, const uint16_t* pick,
                               int n, int rank, const int lanes)
{
    const int64_t row = t * d->logits_stride;
    for (int c = rank; c < n; c += lanes) {
        const int e = pick[c];
        const uint32_t key = moei_ordered(moe_load_f32(d->logits, row + e, d->logits_dtype));
        int k = 0;
        for (int i = 0; i < n; ++i) {
            const uint32_t other =
                moei_ordered(moe_load_f32(d->logits, row + pick[i], d->logits_dtype));
            k += other > key || (other == key && pick[i] < e);
        }
        if (k < d->top_k) {
            d->ids[t * d->top_k + k] = e;
            atomicAdd(count + e, 1);
        }
    }
}

/* What a lane holds of its group's token in one round. */
typedef struct moei_gate_round {
    int top_k, score;          /* of the descriptor: loaded once, not in every round */
    int64_t t;                 /* the token; where none is left, the block's first */
    bool live;                 /* the group has a token in this round */
    bool redo;                 /* moei_gate_token does the token again */
    bool tie;                  /* some logits that are not below kth are equal */
    float shift, sum;          /* -largest * log2(e); the softmax's denominator, else 1 */
    float kth;                 /* the K-th largest logit */
    uint32_t chosen;           /* bit j: the lane's j-th logit is not below kth */
    int before, all;           /* chosen by the lanes before; by the group */
    int expert[8];             /* of the group's picks rank, rank + lanes, ... below `picks` */
    float logit[8], weight[8]; /* of these experts; of choices rank, rank + lanes, ... */
    int picks;                 /* choices to write: K; 0 without a token, or where redo is set */
} moei_gate_round;

/* 3. of moei_gate_block: sets shift, sum, kth and tie. v: the lane's logits; top: the token's
   largest. Sets redo where the row has a NaN, where the largest logit is infinite or huge, and
   where the K-th is -inf. */
MOE_DEVICE void moei_gate_plain_sum(moei_gate_round* o, const float* v, const float* top,
                                    const moei_gate_lanes w)
{
    const int top_k = o->top_k;
    const float log2e = 1.44269502f;
    float sum = 0.0f;
    o->shift = -(top[0] * log2e);
    if (o->score == MOE_SCORE_SOFTMAX) {
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j) sum += moei_exp2_fast(fmaf(v[j], log2e, o->shift));
    } else { /* finds a NaN, as the softmax's sum does */
        MOE_UNROLL
        for (int j = 0; j < w.per_lane; ++j) sum += moei_is_nan(v[j]) ? v[j] : 0.0f;
    }
    o->redo = moei_is_nan(sum);
    o->sum = o->score == MOE_SCORE_SOFTMAX ? moe_warp_sum(sum, w.lanes) : 1.0f;
    o->redo |= !(fabsf(top[0]) < 1e8f); /* beyond, the rounding of `shift` may overflow exp2 */
    o->kth = 0.0f;
    o->tie = false;
    MOE_UNROLL
    for (int k = 0; k < w.num_largest; ++k) {
        if (k < top_k) o->kth = top[k];
        if (k + 1 < top_k && k + 1 < w.num_largest) o->tie |= top[k] == top[k + 1];
    }
    o->redo |= !(o->kth >= -3e38f);
}

/* 4. of moei_gate_block: finds which of the lane's logits are among the K, and how many the lanes
   before have. */
MOE_DEVICE void moei_gate_plain_choose(moei_gate_round* o, const float* v, const moei_gate_lanes w)
{
    int before, all;
    o->chosen = moei_gate_not_below(v, o->kth, w);
    before = __popc(o->chosen) | (int)o->redo << 16; /* two sums in one word */
    MOE_UNROLL
    for (int by = 1; by < w.lanes; by <<= 1) {
        const int other = __shfl_up_sync(MOE_FULL_WARP, before, by, w.lanes);
        if (w.rank >= by) before += other;
    }
    all = __shfl_sync(MOE_FULL_WARP, before, w.lanes - 1, w.lanes);
    o->before = (before & 0xffff) - __popc(o->chosen);
    /* a sum of 2^16 or more: some lane has set redo */
    o->redo = o->live && (all < o->top_k || all > 2 * w.num_largest);
    o->tie |= all > o->top_k;
    o->all = all;
    o->picks = o->redo || !o->live ? 0 : o->top_k;
    if (o->picks == 0) o->chosen = 0;
}

/* 5. of moei_gate_block: collects the chosen experts in `pick`, so that the lanes finish equally
   many. Lane r has the picks and the choices r, r + lanes, ... */
MOE_DEVICE void moei_gate_plain_pick(moei_gate_round* o, const moei_gate_args* d, uint16_t* pick,
                                     const moei_gate_lanes w)
{
    while (o->chosen) {
        const int j = 31 - __clz((int)o->chosen);
        pick[o->before++] = (uint16_t)moei_gate_expert(j, w);
        o->chosen ^= 1u << j;
    }
    __syncwarp(MOE_FULL_WARP); /* lanes read the picks of other lanes */
    MOE_UNROLL
    for (int n = 0; n < 8; ++n) {
        const int c = n * w.lanes + w.rank;
        const bool mine = n * w.lanes < w.num_largest && c < o->picks;
        o->expert[n] = mine ? pick[c] : 0;
        o->logit[n] =
            mine ? moe_load_f32(d->logits, o->t * d->logits_stride + o->expert[n], d->logits_dtype)
                 : 0.0f;
    }
}

/* 6. of moei_gate_block: computes the weights of the lane's choices. */
MOE_DEVICE void moei_gate_plain_weigh(moei_gate_round* o, const moei_gate_args* d, const float* top,
                                      const moei_gate_lanes w)
{
    const int score = o->score;
    const float log2e = 1.44269502f;
    float sum = o->sum, part = 0.0f, factor = d->scale;
    MOE_UNROLL
    for (int n = 0; n < 8; ++n) {
        float l = 0.0f;
        MOE_UNROLL
        for (int r = 0; r < 32; ++r)
            if (r < w.lanes && n * w.lanes + r < w.num_largest && w.rank == r)
                l = top[n * w.lanes + r];
        o->weight[n] = 0.0f;
        /* a factor that all weights share, also from an error in `shift`, cancels below */
        if (n * w.lanes < w.num_largest && n * w.lanes + w.rank < o->picks)
            o->weight[n] = score == MOE_SCORE_SIGMOID ? moei_gate_weight(d, 1.0f, l, top[0], 1.0f)
                                                      : moei_exp2_fast(fmaf(l, log2e, o->shift));
        part += o->weight[n];
    }
    if (score == MOE_SCORE_TOPK_SOFTMAX || d->renormalize) sum = moe_warp_sum(part, w.lanes);
    if (score != MOE_SCORE_SIGMOID) {
        factor = __fdiv_rn(factor, sum); /* sum is nearly 1 or more: the largest adds 2^0 */
    } else if (d->renormalize) {
        MOE_UNROLL
        for (int n = 0; n < 8; ++n)
            if (n * w.lanes < w.num_largest && sum > 0.0f)
                o->weight[n] = __fdiv_rn(o->weight[n], sum);
    }
    MOE_UNROLL
    for (int n = 0; n < 8; ++n) o->weight[n] *= factor;
}

/* 7. of moei_gate_block: writes the weights in order, and each pick's expert at its rank, which is
   the number of larger logits. */
MOE_DEVICE void moei_gate_plain_write(const moei_gate_round* o, const moei_gate_args* d, int* count,
                                      const uint16_t* pick, const float* top,
                                      const moei_gate_lanes w)
{
    const int top_k = o->top_k;
    MOE_UNROLL
    for (int n = 0; n < 8; ++n) {
        uint32_t larger = 0; /* a bit for each of top */
        MOE_UNROLL
        for (int u = 0; u < w.num_largest; ++u)
            larger = __funnelshift_l(__float_as_uint(o->logit[n] - top[u]), larger, 1);
        const bool mine = n * w.lanes < w.num_largest && n * w.lanes + w.rank < o->picks;
        if (mine) d->weights[o->t * top_k + n * w.lanes + w.rank] = o->weight[n];
        if (mine && !o->tie) {
            d->ids[o->t * top_k + __popc(larger)] = o->expert[n];
            atomicAdd(count + o->expert[n], 1);
        }
    }
    if (o->tie && o->live && !o->redo)
        moei_gate_ties(d, count, o->t, pick, o->all, w.rank, w.lanes);
    __syncwarp(MOE_FULL_WARP); /* pick has been read: the next round writes it again */
}

/* Runs one block, which has one chunk. An aligned group of `lanes` lanes owns a token; a lane has
   `per_lane` of its logits. K <= num_largest. The three are literals. count [E] is in shared
   memory; the picks follow count. In a round each group does one token:

     1. load: its logits; with num_largest <= 8 already in the round before
     2. sort: every lane has the token's `num_largest` largest logits, in order
     3. sum
     4. choose: a lane finds which of its logits are among the K: those not below the K-th
     5. pick: the chosen experts, one after another in shared memory
     6. weigh
     7. write: ids at their ranks, the numbers of larger logits. moei_gate_ties finds the ranks
        where more than K are not below the K-th, or two of the K are equal
     8. again: moei_gate_token does the token again where 2 num_largest picks do not hold all equal
        logits, and where 3. says so */
MOE_DEVICE_BODY void moei_gate_block(const moei_gate_args* d, int* count, const int lanes,
                                     const int per_lane, const int num_largest)
{
    const moei_gate_lanes w = moei_gate_lanes_of(lanes, per_lane, num_largest);
    const int top_k = d->top_k, score = d->score;
    const int step = (int)blockDim.x / lanes;
    const int chunk = (int)moe_chunk_tokens(d->num_tokens);
    const int first = (int)blockIdx.x * chunk;
    const int tokens = d->num_tokens - first < chunk ? d->num_tokens - first : chunk;
    const bool wide =
        (d->logits_stride | d->num_experts) % 8 == 0 && (uintptr_t)d->logits % 16 == 0;
    uint16_t* pick = /* [tokens in flight][2 num_largest] experts chosen, in no order */
        (uint16_t*)(count + d->num_experts) + threadIdx.x / lanes * (2 * num_largest);
    const bool early = num_largest <= 8; /* registers are left to load the next token's logits */
    float next[32];
    int i = (int)threadIdx.x / lanes;

    if (early) moei_gate_read(next, d, first + (i < tokens ? i : 0), wide, w);
    __syncthreads(); /* count is clear */
    for (; __any_sync(MOE_FULL_WARP, i < tokens); i += step) {
        float v[32];   /* this lane's logits; of the block's first token where none is left */
        float top[32]; /* the token's `num_largest` largest, in order */
        moei_gate_round o;
        o.top_k = top_k, o.score = score;
        o.live = i < tokens;
        o.t = first + (o.live ? i : 0);
        if (early) { /* 1. load */
            MOE_UNROLL
            for (int j = 0; j < per_lane; ++j) v[j] = next[j];
            if (i + step < chunk) /* uniform in the warp, for lanes >= 2 */
                moei_gate_read(next, d, first + (i + step < tokens ? i + step : 0), wide, w);
        } else {
            moei_gate_read(v, d, o.t, wide, w);
        }
        moei_group_sort_largest(top, v, lanes, per_lane, num_largest); /* 2. sort */
        moei_gate_plain_sum(&o, v, top, w);
        moei_gate_plain_choose(&o, v, w);
        moei_gate_plain_pick(&o, d, pick, w);
        moei_gate_plain_weigh(&o, d, top, w);
        moei_gate_plain_write(&o, d, count, pick, top, w);
        { /* 8. again: the whole warp does one token after another */
            uint32_t again = __ballot_sync(MOE_FULL_WARP, o.redo && w.rank == 0);
            while (again) {
                const int from = __ffs((int)again) - 1;
                moei_gate_token(d, count, 0, 0, 0, 0, first + __shfl_sync(MOE_FULL_WARP, i, from),
                                0);
                again &= again - 1;
            }
        }
    }
    moei_gate_write_counts(d, count);
}

#endif
