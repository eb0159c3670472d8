/* gate.cuh: which experts each token goes to, and with what weight.

   For each token t, over its row of logits l [E]:

     softmax (default)   p_e = exp(l_e) / sum_j exp(l_j); the K largest; weight = p_e
     top-k softmax       the K largest l_e; weight = softmax over those K alone
     sigmoid             the K largest; weight = 1 / (1 + exp(-l_e))

   then, if `renormalize` is set, the K weights are divided by their sum, and last all are
   multiplied by `scale`. Choices stand in descending order; equal logits go to the lower
   index. Selection compares the logits themselves, so rounding in exp never changes it.

   In:   logits [T, E] fp32, fp16 or bf16, rows logits_stride apart
   Out:  ids [T, K] int32, weights [T, K] fp32, and in the same pass, where asked for,
         expert_count [E] and chunk_count [num_chunks, E] (layout.h), which saves route a launch

   Infinities are limits: +inf shares the whole softmax among its equals, -inf has weight 0 and
   is chosen last, a row of -inf counts as a row of equals. A row that holds a NaN selects
   nothing (ids -1, weights 0) and sets the fault word; no other token changes.
   Arithmetic is fp32 in a fixed order: equal inputs give equal bits.

   Cost: one read of the logits. One launch, and a memset if expert_count is wanted.
   Any E up to MOE_MAX_EXPERTS, any K up to E. Beyond E = 1024 or K = 32, and for rows of
   infinities, NaN or many equal logits at the top, a warp reads the row again for each choice.
   Minimum architecture: sm_75.

     moe_gate_desc g = {0};
     g.logits = logits;  g.ids = ids;  g.weights = weights;
     g.num_tokens = T;   g.num_experts = E;   g.top_k = K;
     moe_status s = moe_gate(&g, stream);

   Source: softmax and top-k gating after Shazeer et al., arXiv 1701.06538; sigmoid scores after
   DeepSeek-V3, arXiv 2412.19437. */
#ifndef MOE_GATE_CUH
#define MOE_GATE_CUH

#include "base/fault.cuh"
#include "base/numeric.cuh"
#include "base/sort.cuh"
#include "layout.h"

typedef enum moe_score {
    MOE_SCORE_DEFAULT = 0,  /* MOE_SCORE_SOFTMAX */
    MOE_SCORE_SOFTMAX,      /* softmax over all experts, then select */
    MOE_SCORE_TOPK_SOFTMAX, /* select, then softmax over the selected */
    MOE_SCORE_SIGMOID       /* sigmoid of each logit */
} moe_score;

typedef struct moe_gate_desc {
    /* in */
    const void* logits;    /* [T, E] logits_dtype */
    int64_t logits_stride; /* elements between rows; 0 = E */
    int32_t logits_dtype;  /* moe_dtype; 0 = fp32 */
    /* out */
    int32_t* ids;          /* [T, K] experts chosen, best first; -1 in a NaN row */
    float* weights;        /* [T, K] */
    int32_t* expert_count; /* [E] slots that chose each expert; or null; cleared first, always */
    int32_t* chunk_count;  /* [moe_num_chunks(T), E] the same per chunk, for route; or null */
    uint64_t* fault;       /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;  /* T >= 0 */
    int32_t num_experts; /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;       /* K, 1 .. E */
    int32_t score;       /* moe_score; 0 = softmax */
    int32_t renormalize; /* 0 or 1 */
    float scale;         /* factor on the weights, finite; 0 = 1 */
    void* workspace;     /* 16-byte aligned; null if moe_gate_workspace asks for 0 */
    size_t workspace_bytes;
} moe_gate_desc;

/* l - max, with the limits that the header promises: equal infinities differ by 0. */
MOE_DEVICE float moei_gate_below(float l, float max) { return l == max ? 0.0f : l - max; }

/* Clears the counts of a block's chunk; a barrier must follow. */
MOE_DEVICE void moei_gate_clear_counts(const moe_gate_desc* d, int* count)
{
    MOEI_NO_UNROLL
    for (int e = (int)threadIdx.x; e < d->num_experts; e += (int)blockDim.x) count[e] = 0;
}

/* Writes the counts of a block's chunk; all threads. */
MOE_DEVICE void moei_gate_write_counts(const moe_gate_desc* d, const int* count)
{
    __syncthreads();
    MOEI_NO_UNROLL
    for (int e = (int)threadIdx.x; e < d->num_experts; e += (int)blockDim.x) {
        const int n = count[e];
        if (d->expert_count && n) atomicAdd(d->expert_count + e, n);
        if (d->chunk_count) d->chunk_count[(int64_t)blockIdx.x * d->num_experts + e] = n;
    }
}

/* The weight of one chosen logit before renormalisation and scale; max is the largest logit of the
   token, `sum` the softmax denominator; top-k softmax has it still to come, so it is passed as 1.
   Sigmoids that will be renormalised are all multiplied by e^-max where max is negative: they would
   underflow together. */
MOE_DEVICE float moei_gate_weight(const moe_gate_desc* d, float l, float max, float sum)
{
    if (d->score == MOE_SCORE_SIGMOID) {
        const float shift = d->renormalize && max < 0.0f && max >= -3e38f ? max : 0.0f;
        if (l >= 0.0f) return __fdiv_rn(1.0f, 1.0f + moei_exp(-l));
        return __fdiv_rn(moei_exp(moei_gate_below(l, shift)), 1.0f + moei_exp(l));
    }
    return __fdiv_rn(moei_exp(moei_gate_below(l, max)), sum);
}

/* Lane `rank` of a token's `lanes` lanes has the experts (i lanes + rank) 8 .. + 8, i = 0, 1, ...:
   where its j-th logit stands. */
MOE_DEVICE int moei_gate_expert(int j, int rank, const int lanes)
{
    return ((j >> 3) * lanes + rank) * 8 + (j & 7);
}

/* Reads a lane's logits of token t; past E they are -inf. `wide`: E and all addresses are multiples
   of 8 elements. lanes and per_lane are literals. */
MOE_DEVICE void moei_gate_read(float* v, const moe_gate_desc* d, int64_t t, int rank, bool wide,
                               const int lanes, const int per_lane)
{
    const int E = d->num_experts;
    const float none = __uint_as_float(0xff800000u);
    if (d->logits_dtype == MOE_FP32) {
        const float* row = (const float*)d->logits + t * d->logits_stride;
        if (wide && E == lanes * per_lane) {
            MOEI_UNROLL
            for (int j = 0; j < per_lane; j += 4) {
                const float4 f = *(const float4*)(row + moei_gate_expert(j, rank, lanes));
                v[j] = f.x, v[j + 1] = f.y, v[j + 2] = f.z, v[j + 3] = f.w;
            }
        } else if (wide) {
            MOEI_UNROLL
            for (int j = 0; j < per_lane; j += 4) {
                const int e = moei_gate_expert(j, rank, lanes);
                float4 f = make_float4(none, none, none, none);
                if (e < E) f = *(const float4*)(row + e);
                v[j] = f.x, v[j + 1] = f.y, v[j + 2] = f.z, v[j + 3] = f.w;
            }
        } else {
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j) {
                const int e = moei_gate_expert(j, rank, lanes);
                v[j] = e < E ? row[e] : none;
            }
        }
    } else {
        const uint32_t minus = d->logits_dtype == MOE_FP16 ? 0xfc00fc00u : 0xff80ff80u;
        const uint16_t* row = (const uint16_t*)d->logits + t * d->logits_stride;
        uint32_t u[16]; /* two logits each */
        MOEI_UNROLL
        for (int j = 0; j < per_lane; j += 8) {
            const int e = moei_gate_expert(j, rank, lanes);
            uint4 q = make_uint4(minus, minus, minus, minus);
            if (wide && e < E) q = *(const uint4*)(row + e);
            u[j / 2] = q.x, u[j / 2 + 1] = q.y, u[j / 2 + 2] = q.z, u[j / 2 + 3] = q.w;
        }
        MOEI_UNROLL
        for (int j = 0; j < per_lane; ++j) {
            const int e = moei_gate_expert(j, rank, lanes);
            uint16_t h = (uint16_t)(u[j / 2] >> (j % 2 * 16));
            if (!wide && e < E) h = row[e];
            v[j] = moei_half_to_f32(h, d->logits_dtype);
        }
    }
}

/* Token t by one warp, any E and K, ties, infinities and NaN included: reads the row again for each
   choice and takes the best of what comes after the choice before, in the order of descending
   logits and ascending indices. The choices wait as raw logits in d->weights. */
MOE_DEVICE void moei_gate_token(const moe_gate_desc* d, int* count, int64_t t)
{
    const int E = d->num_experts, K = d->top_k, score = d->score, dtype = d->logits_dtype;
    const int64_t row = t * d->logits_stride;
    uint32_t last = MOEI_FULL;
    int last_at = -1;
    float max = 0.0f, sum = 1.0f, total = 0.0f;
    bool nan = false;
    for (int k = 0; k < K; ++k) {
        uint32_t best = 0;
        int best_at = 0;
        for (int e = moei_lane(); e < E; e += MOEI_WARP) {
            const float v = moei_load_f32(d->logits, row + e, dtype);
            const uint32_t key = moei_ordered(v);
            nan = nan || moei_is_nan(v);
            if ((key < last || (key == last && e > last_at)) && key > best) {
                best = key;
                best_at = e;
            }
        }
        for (int w = 16; w > 0; w >>= 1) {
            const uint32_t other = __shfl_xor_sync(MOEI_FULL, best, w);
            const int other_at = __shfl_xor_sync(MOEI_FULL, best_at, w);
            if (other > best || (other == best && other_at < best_at)) {
                best = other;
                best_at = other_at;
            }
        }
        last = best;
        last_at = best_at;
        if (k == 0) {
            nan = __any_sync(MOEI_FULL, nan) != 0;
            if (nan) break;
            max = moei_unordered(best);
            if (score == MOE_SCORE_SOFTMAX) {
                sum = 0.0f;
                for (int e = moei_lane(); e < E; e += MOEI_WARP)
                    sum += moei_exp2_fast(
                        1.44269502f *
                        moei_gate_below(moei_load_f32(d->logits, row + e, dtype), max));
                sum = moei_group_sum(sum, MOEI_WARP);
            }
        }
        if ((score == MOE_SCORE_TOPK_SOFTMAX || d->renormalize) && k % MOEI_WARP == moei_lane())
            total += moei_gate_weight(d, moei_unordered(best), max, sum);
        if (moei_lane() == 0) {
            d->ids[t * K + k] = best_at;
            d->weights[t * K + k] = moei_unordered(best);
            atomicAdd(count + best_at, 1);
        }
    }
    __syncwarp(MOEI_FULL);
    total = moei_group_sum(total, MOEI_WARP); /* 32 short sums: a long one would round K times */
    for (int k = moei_lane(); k < K; k += MOEI_WARP) {
        float w = nan ? 0.0f : moei_gate_weight(d, d->weights[t * K + k], max, sum);
        if (total > 0.0f) w = __fdiv_rn(w, total);
        if (nan) d->ids[t * K + k] = -1;
        d->weights[t * K + k] = w * d->scale;
    }
    if (nan && moei_lane() == 0) moei_fault_raise(d->fault, MOE_FAULT_NAN_LOGIT, 0, t);
}

/* One block, a warp a token. count [E] is in shared memory. */
MOE_DEVICE void moei_gate_block_any(const moe_gate_desc* d, int* count)
{
    const int64_t chunk = moe_chunk_tokens(d->num_tokens), first = blockIdx.x * chunk;
    const int64_t end = first + chunk < d->num_tokens ? first + chunk : d->num_tokens;
    __syncthreads();
    for (int64_t t = first + moei_warp(); t < end; t += blockDim.x / MOEI_WARP)
        moei_gate_token(d, count, t);
    moei_gate_write_counts(d, count);
}

/* The ids of a token by its group, where logits that are not below the K-th are equal: n experts in
   `pick`, of which the K first in the order of descending logits and ascending indices count. */
MOE_DEVICE void moei_gate_ties(const moe_gate_desc* d, int* count, int64_t t, const uint16_t* pick,
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
MOE_DEVICE_BODY void moei_gate_block(const moe_gate_desc* d, int* count, const int lanes,
                                     const int per_lane, const int depth)
{
    const int K = d->top_k, score = d->score;
    const int rank = moei_lane() & (lanes - 1), step = (int)blockDim.x / lanes;
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

    if (early) moei_gate_read(next, d, first + (i < tokens ? i : 0), rank, wide, lanes, per_lane);
    __syncthreads();
    for (; __any_sync(MOEI_FULL, i < tokens); i += step) {
        const bool live = i < tokens;
        const int64_t t = first + (live ? i : 0);
        float v[32];   /* this lane's logits; where there is no token left, the first one's again */
        float top[32]; /* the token's largest, `depth` of them */
        float kth = 0.0f, sum = 0.0f, shift, factor;
        uint32_t chosen = 0; /* bit j: v[j] is among the K */
        int redo = 0, chosen_count, before;
        bool tie = false;
        int expert[8];
        float logit[8], weight[8], part = 0.0f;
        bool mine[8];

        if (early) {
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j) v[j] = next[j];
            if (i + step < chunk) /* the same for the whole warp */
                moei_gate_read(next, d, first + (i + step < tokens ? i + step : 0), rank, wide,
                               lanes, per_lane);
        } else {
            moei_gate_read(v, d, t, rank, wide, lanes, per_lane);
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
        if (kth == 0.0f) kth = __uint_as_float(0x80000000u); /* -0 - +0 is negative */
        MOEI_UNROLL
        for (int j = 31; j >= 0; --j) /* bit j is the sign of a difference, 0 where v[j] >= kth */
            if (j < per_lane) chosen = __funnelshift_l(__float_as_uint(v[j] - kth), chosen, 1);
        chosen = ~chosen & (MOEI_FULL >> (32 - per_lane));
        before = chosen_count = __popc(chosen) | redo << 16; /* two sums in one */
        MOEI_UNROLL
        for (int w = 1; w < lanes; w <<= 1) {
            const int other = __shfl_up_sync(MOEI_FULL, before, w, lanes);
            if (rank >= w) before += other;
        }
        chosen_count = __shfl_sync(MOEI_FULL, before, lanes - 1, lanes);
        before = (before & 0xffff) - __popc(chosen);
        /* a count over 16 bits says that one lane wants it */
        redo = live && (chosen_count < K || chosen_count > 2 * depth);
        tie |= chosen_count > K;
        if (redo || !live) chosen = 0;

        while (chosen) { /* the chosen come together, so that each lane finishes as many of them */
            const int j = 31 - __clz((int)chosen);
            pick[before++] = (uint16_t)moei_gate_expert(j, rank, lanes);
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
                weight[n] = score == MOE_SCORE_SIGMOID ? moei_gate_weight(d, l, top[0], 1.0f)
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
                moei_gate_token(d, count, first + __shfl_sync(MOEI_FULL, i, from));
                again &= again - 1;
            }
        }
    }
    moei_gate_write_counts(d, count);
}

/* most experts, most choices, lanes a token, logits a lane: the first that fits is taken. Predefine
   the list to compile fewer; what none fits runs, slower, by moei_gate_any. 512 threads, so that
   each may have 128 registers. */
#define MOEI_GATE_THREADS 512
#ifndef MOE_GATE_LIST
#define MOE_GATE_LIST(X)                                                                          \
    X(32, 8, 4, 8) X(32, 32, 4, 8) X(64, 8, 4, 16) X(64, 32, 4, 16) X(128, 8, 4, 32)              \
    X(128, 32, 4, 32) X(256, 8, 8, 32) X(256, 32, 8, 32) X(512, 8, 16, 32) X(512, 32, 16, 32)     \
    X(1024, 8, 32, 32) X(1024, 32, 32, 32)
#endif
#define MOEI_GATE_ANY_THREADS 1024

#define MOEI_GATE_KERNEL(most, depth, lanes, per_lane)                                             \
    MOE_KERNEL(MOEI_GATE_THREADS, 1) moei_gate_##most##_##depth(MOE_ARG(moe_gate_desc) d)          \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(count);                                                                 \
        moei_let_next_start();                                                                     \
        moei_gate_clear_counts(&d, (int*)count);                                                   \
        moei_wait_for_previous();                                                                  \
        if (!moei_fault_stopped(d.fault))                                                          \
            moei_gate_block(&d, (int*)count, lanes, per_lane, depth);                              \
    }
MOE_GATE_LIST(MOEI_GATE_KERNEL)
#undef MOEI_GATE_KERNEL

MOE_KERNEL(MOEI_GATE_ANY_THREADS, 1) moei_gate_any(MOE_ARG(moe_gate_desc) d)
{
    MOE_SHARED_DYNAMIC(count);
    moei_let_next_start();
    moei_gate_clear_counts(&d, (int*)count);
    moei_wait_for_previous();
    if (!moei_fault_stopped(d.fault)) moei_gate_block_any(&d, (int*)count);
}

/* Refuses what the header does not offer, and fills in the defaults. */
MOE_HOST moe_status moei_gate_check(moe_gate_desc* d)
{
    const uint64_t slots =
        (uint64_t)(d->num_tokens > 0 ? d->num_tokens : 0) * (uint64_t)(d->top_k > 0 ? d->top_k : 0);
    MOEI_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOEI_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                 num_experts);
    MOEI_REQUIRE(d->top_k >= 1 && d->top_k <= d->num_experts, MOE_ERR_RANGE, top_k);
    if (d->logits_dtype == 0) d->logits_dtype = MOE_FP32;
    MOEI_REQUIRE(moe_dtype_bytes(d->logits_dtype), MOE_ERR_DTYPE, logits_dtype);
    if (d->logits_stride == 0) d->logits_stride = d->num_experts;
    MOEI_REQUIRE(moei_stride_fits(d->logits_stride, d->num_experts, d->num_tokens), MOE_ERR_STRIDE,
                 logits_stride);
    if (d->score == 0) d->score = MOE_SCORE_SOFTMAX;
    MOEI_REQUIRE(d->score >= 0 && d->score <= MOE_SCORE_SIGMOID, MOE_ERR_OPTION, score);
    MOEI_REQUIRE(d->renormalize == 0 || d->renormalize == 1, MOE_ERR_OPTION, renormalize);
    MOEI_REQUIRE((moe_f32_bits(d->scale) & 0x7f800000u) != 0x7f800000u, MOE_ERR_RANGE, scale);
    if (d->scale == 0.0f) d->scale = 1.0f;
    MOEI_REQUIRE(moei_aligned(d->fault, 8), MOE_ERR_ALIGN, fault);
    MOEI_REQUIRE(moei_aligned(d->expert_count, 4), MOE_ERR_ALIGN, expert_count);
    MOEI_REQUIRE(d->logits || slots == 0, MOE_ERR_NULL, logits);
    MOEI_REQUIRE(d->ids || slots == 0, MOE_ERR_NULL, ids);
    MOEI_REQUIRE(d->weights || slots == 0, MOE_ERR_NULL, weights);
    MOEI_REQUIRE(moei_aligned(d->logits, (uintptr_t)moe_dtype_bytes(d->logits_dtype)),
                 MOE_ERR_ALIGN, logits);
    MOEI_REQUIRE(moei_aligned(d->ids, 4), MOE_ERR_ALIGN, ids);
    MOEI_REQUIRE(moei_aligned(d->weights, 4), MOE_ERR_ALIGN, weights);
    MOEI_REQUIRE(moei_aligned(d->chunk_count, 4), MOE_ERR_ALIGN, chunk_count);
    {
        const moei_range r[] = {
            {d->logits,
             moei_extent(d->num_tokens, d->logits_stride, d->num_experts, d->logits_dtype),
             MOE_FIELD_logits},
            {d->ids, slots * 4, MOE_FIELD_ids},
            {d->weights, slots * 4, MOE_FIELD_weights},
            {d->expert_count, (uint64_t)d->num_experts * 4, MOE_FIELD_expert_count},
            {d->chunk_count, (uint64_t)d->num_experts * (uint64_t)moe_num_chunks(d->num_tokens) * 4,
             MOE_FIELD_chunk_count},
            {d->fault, 8, MOE_FIELD_fault}};
        return moei_disjoint(r, 1, 6);
    }
}

/* Bytes of workspace that moe_gate wants; 0 for most. */
MOE_HOST moe_status moe_gate_workspace(const moe_gate_desc* desc, size_t* bytes)
{
    MOEI_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    *bytes = 0;
    return MOE_OK;
}

/* Queues the gate on `stream`. Errors: every field of the descriptor as documented above, each
   with its own status; nothing is queued then. T = 0 only clears expert_count. */
MOE_HOST moe_status moe_gate(const moe_gate_desc* desc, cudaStream_t stream)
{
    moe_gate_desc d;
    moei_launch_config c;
    int64_t chunk;
    MOEI_REQUIRE(desc, MOE_ERR_NULL, desc);
    d = *desc;
    MOEI_TRY(moei_gate_check(&d));
    if (d.expert_count)
        MOEI_TRY_CUDA(cudaMemsetAsync(d.expert_count, 0, (size_t)d.num_experts * 4, stream));
    if (d.num_tokens == 0) return MOE_OK;
    chunk = moe_chunk_tokens(d.num_tokens);
    c = moei_grid(moe_num_chunks(d.num_tokens), 0, (size_t)d.num_experts * 4, stream);
    c.dependent = 1;
#define MOEI_GATE_CASE(most, depth, lanes, per_lane)                                               \
    if (d.top_k <= depth && d.num_experts <= most) {                                               \
        c.block.x =                                                                                \
            (unsigned)(chunk * lanes < MOEI_GATE_THREADS ? chunk * lanes : MOEI_GATE_THREADS);     \
        c.smem += c.block.x / lanes * depth * 4;                                                   \
        return MOE_LAUNCH(moei_gate_##most##_##depth, c, d);                                       \
    }
    MOE_GATE_LIST(MOEI_GATE_CASE)
#undef MOEI_GATE_CASE
    c.block.x = chunk * MOEI_WARP < MOEI_GATE_ANY_THREADS ? (unsigned)(chunk * MOEI_WARP)
                                                          : MOEI_GATE_ANY_THREADS;
    return MOE_LAUNCH(moei_gate_any, c, d);
}

/* Loads this header's kernels now. */
MOE_HOST moe_status moe_gate_preload(void)
{
#define MOEI_GATE_LOAD(most, depth, lanes, per_lane)                                               \
    MOEI_TRY(moei_preload((const void*)moei_gate_##most##_##depth));
    MOE_GATE_LIST(MOEI_GATE_LOAD)
#undef MOEI_GATE_LOAD
    return moei_preload((const void*)moei_gate_any);
}

#endif
