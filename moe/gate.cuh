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
         expert_count [E] and chunk_count [E, num_chunks] (layout.h), which saves route a launch

   Infinities are limits: +inf shares the whole softmax among its equals, -inf has weight 0 and
   is chosen last, a row of -inf counts as a row of equals. A row that holds a NaN selects
   nothing (ids -1, weights 0) and sets the fault word; no other token changes.
   Arithmetic is fp32 in a fixed order: equal inputs give equal bits.

   Cost: one read of the logits. One launch, and a memset if expert_count is wanted.
   Any E up to MOE_MAX_EXPERTS, any K up to E. The fast path has E <= 1024, K <= 32; tokens with
   equal logits at the top leave it, so logits rounded to 16 bits run slower than fp32.
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
#include "base/warp.cuh"
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
    int32_t* chunk_count;  /* [E, moe_num_chunks(T)] the same per chunk, for route; or null */
    uint64_t* fault;       /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;  /* T >= 0 */
    int32_t num_experts; /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;       /* K, 1 .. E */
    int32_t score;       /* moe_score; 0 = softmax */
    int32_t renormalize; /* 0 or 1 */
    float scale;         /* factor on the weights, finite; 0 = 1 */
} moe_gate_desc;

#define MOEI_GATE_THREADS 256

/* Chunks of a block: it has the tokens of several neighbouring ones, the last block maybe fewer. */
MOE_DEVICE int moei_gate_chunks(const moe_gate_desc* d)
{
    return (int)(((unsigned)moe_num_chunks(d->num_tokens) + gridDim.x - 1) / gridDim.x);
}

/* l - max, with the limits that the header promises: equal infinities differ by 0. */
MOE_DEVICE float moei_gate_below(float l, float max) { return l == max ? 0.0f : l - max; }

/* Clears the counts of a block's chunks, [chunks][E]; a barrier must follow. */
MOE_DEVICE void moei_gate_clear_counts(const moe_gate_desc* d, int* count)
{
    const int n = moei_gate_chunks(d) * d->num_experts;
    MOEI_NO_UNROLL
    for (int i = (int)threadIdx.x; i < n; i += MOEI_GATE_THREADS) count[i] = 0;
}

/* Writes the counts of a block's chunks, [chunks][E]; all threads, after a barrier. */
MOE_DEVICE void moei_gate_write_counts(const moe_gate_desc* d, const int* count, int chunks)
{
    const int E = d->num_experts;
    const int64_t num_chunks = moe_num_chunks(d->num_tokens);
    const int64_t first = (int64_t)blockIdx.x * chunks;
    if (first + chunks > num_chunks) chunks = (int)(num_chunks - first);
    MOEI_NO_UNROLL
    for (int e = (int)threadIdx.x; e < E; e += MOEI_GATE_THREADS) {
        int sum = 0, c = 0;
        MOEI_NO_UNROLL
        for (int i = 0; i < chunks; ++i) sum += count[i * E + e];
        if (d->expert_count && sum) atomicAdd(d->expert_count + e, sum);
        if (!d->chunk_count) continue;
        if ((((uintptr_t)d->chunk_count >> 2 | num_chunks | first) & 3) == 0) {
            MOEI_NO_UNROLL
            for (; c + 4 <= chunks; c += 4)
                *(int4*)(d->chunk_count + e * num_chunks + first + c) =
                    make_int4(count[c * E + e], count[c * E + E + e], count[c * E + 2 * E + e],
                              count[c * E + 3 * E + e]);
        }
        MOEI_NO_UNROLL
        for (; c < chunks; ++c) d->chunk_count[e * num_chunks + first + c] = count[c * E + e];
    }
}

/* The weight of one chosen logit before renormalisation and scale. `sum` is the softmax
   denominator; top-k softmax has it still to come, so it is passed as 1. */
MOE_DEVICE float moei_gate_weight(float l, float max, float sum, int score)
{
    if (score == MOE_SCORE_SIGMOID) return __fdiv_rn(1.0f, 1.0f + moei_exp(-l));
    return __fdiv_rn(moei_exp(moei_gate_below(l, max)), sum);
}

/* Reads the logits at .. at + count of a row; past `own` they read as -inf. count is a literal. */
MOE_DEVICE void moei_gate_read(float* v, const moe_gate_desc* d, int64_t at, int own, bool wide,
                               const int count)
{
    if (wide && count % 8 == 0 && own >= count) {
        if (d->logits_dtype == MOE_FP32) {
            MOEI_UNROLL
            for (int j = 0; j < count; j += 4) {
                const float4 f = *(const float4*)((const float*)d->logits + at + j);
                v[j] = f.x, v[j + 1] = f.y, v[j + 2] = f.z, v[j + 3] = f.w;
            }
        } else {
            MOEI_UNROLL
            for (int j = 0; j < count; j += 8) {
                const uint4 u = *(const uint4*)((const uint16_t*)d->logits + at + j);
                const uint32_t w[4] = {u.x, u.y, u.z, u.w};
                MOEI_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float2 f = moei_unpack2(w[i], d->logits_dtype);
                    v[j + 2 * i] = f.x;
                    v[j + 2 * i + 1] = f.y;
                }
            }
        }
    } else {
        MOEI_UNROLL
        for (int j = 0; j < count; ++j)
            v[j] = j < own ? moei_load_f32(d->logits, at + j, d->logits_dtype)
                           : __uint_as_float(0xff800000u);
    }
}

/* Puts n numbers (a literal power of two) that first rise and then fall, or fall and then rise, into
   descending order. (Here and below loops have constant bounds and their conditions stand inside:
   only so are they unrolled before the arrays are given registers.) */
MOE_DEVICE void moei_sort_bitonic(float* s, const int n)
{
    MOEI_UNROLL
    for (int lh = 4; lh >= 0; --lh) {
        const int h = 1 << lh;
        MOEI_UNROLL
        for (int j = 0; j < 32; ++j)
            if (j < n && h < n && (j & h) == 0) {
                const float hi = fmaxf(s[j], s[j + h]), lo = fminf(s[j], s[j + h]);
                s[j] = hi;
                s[j + h] = lo;
            }
    }
}

/* s[0 .. keep) becomes the largest of s[0 .. n), in descending order; the rest is lost. n and keep
   are literal powers of two. Sorts runs of `keep`, then merges them two by two. */
MOE_DEVICE void moei_sort_largest(float* s, const int n, const int keep)
{
    MOEI_UNROLL
    for (int lm = 1; lm <= 5; ++lm) { /* runs of m fall and rise in turn, until m is keep */
        MOEI_UNROLL
        for (int lh = 4; lh >= 0; --lh) {
            const int m = 1 << lm, h = 1 << lh;
            MOEI_UNROLL
            for (int j = 0; j < 32; ++j)
                if (j < n && h < m && m <= keep && m <= n && (j & h) == 0) {
                    const float hi = fmaxf(s[j], s[j + h]), lo = fminf(s[j], s[j + h]);
                    const bool rises = m < keep && (j & m) != 0;
                    s[j] = rises ? lo : hi;
                    s[j + h] = rises ? hi : lo;
                }
        }
    }
    MOEI_UNROLL
    for (int ls = 0; ls < 5; ++ls) { /* the runs left begin at multiples of keep << ls */
        MOEI_UNROLL
        for (int r = 0; r < 32; ++r)
            if (r % (keep << (ls + 1)) == 0 && r + (keep << ls) < n) {
                MOEI_UNROLL
                for (int j = 0; j < 16; ++j)
                    if (j < keep) s[r + j] = fmaxf(s[r + j], s[r + (keep << ls) + keep - 1 - j]);
                moei_sort_bitonic(s + r, keep);
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
            total += moei_gate_weight(moei_unordered(best), max, sum, score);
        if (moei_lane() == 0) {
            d->ids[t * K + k] = best_at;
            d->weights[t * K + k] = moei_unordered(best);
            atomicAdd(count + best_at, 1);
        }
    }
    __syncwarp(MOEI_FULL);
    total = moei_group_sum(total, MOEI_WARP); /* 32 short sums: a long one would round K times */
    for (int k = moei_lane(); k < K; k += MOEI_WARP) {
        float w = nan ? 0.0f : moei_gate_weight(d->weights[t * K + k], max, sum, score);
        if (total > 0.0f) w = __fdiv_rn(w, total);
        if (nan) d->ids[t * K + k] = -1;
        d->weights[t * K + k] = w * d->scale;
    }
    if (nan && moei_lane() == 0) moei_fault_raise(d->fault, MOE_FAULT_NAN_LOGIT, 0, t);
}

/* One block, a warp a token. count [chunks][E] is in shared memory. */
MOE_DEVICE void moei_gate_block_any(const moe_gate_desc* d, int* count)
{
    const int E = d->num_experts, chunks = moei_gate_chunks(d);
    __syncthreads();
    for (int i = moei_warp(); i < chunks * MOE_CHUNK_TOKENS; i += MOEI_GATE_THREADS / MOEI_WARP) {
        const int64_t t = (int64_t)blockIdx.x * chunks * MOE_CHUNK_TOKENS + i;
        if (t < d->num_tokens) moei_gate_token(d, count + i / MOE_CHUNK_TOKENS * E, t);
    }
    __syncthreads();
    moei_gate_write_counts(d, count, chunks);
}

/* One block; each token is owned by an aligned group of `lanes` lanes, and lane r of a group has the logits r * per_lane .. + per_lane. K <= depth. The three are literals.

   Each lane sorts the `depth` largest of its logits; the lists of the group are merged pairwise,
   keeping the `depth` largest, until every lane has the token's largest logits in order. Each lane
   then knows which of its own are among them (those not below the K-th) and, by counting the
   larger ones, at which rank. Where more than K are not below the K-th, where two of the K are
   equal, and where the largest is infinite or one is NaN, the token is done again by
   moei_gate_token. */
MOE_DEVICE_BODY void moei_gate_block(const moe_gate_desc* d, int* count, const int lanes,
                                const int per_lane, const int depth)
{
    const int E = d->num_experts, K = d->top_k, score = d->score, chunks = moei_gate_chunks(d);
    const int rank = moei_lane() & (lanes - 1), step = MOEI_GATE_THREADS / lanes;
    const int keep = per_lane < depth ? per_lane : depth; /* of a lane's logits */
    const int64_t first = (int64_t)blockIdx.x * chunks * MOE_CHUNK_TOKENS;
    const bool wide = (d->logits_stride % 8 == 0) && ((uintptr_t)d->logits % 16 == 0);
    const float infinity = __uint_as_float(0x7f800000u);
    uint16_t* pick = /* [tokens at a time][depth] experts chosen, in no order */
        (uint16_t*)(count + chunks * E) + threadIdx.x / lanes * depth;
    float v[32]; /* per_lane logits of the current token */
    int64_t t = first + threadIdx.x / lanes;

    /* each token's logits are fetched while the token before is finished */
    moei_gate_read(v, d, t < d->num_tokens ? t * d->logits_stride + (int64_t)rank * per_lane : 0,
                   t < d->num_tokens ? E - rank * per_lane : 0, wide, per_lane);
    __syncthreads();

    for (int i = (int)threadIdx.x / lanes; i < chunks * MOE_CHUNK_TOKENS; i += step, t += step) {
        const bool live = t < d->num_tokens, more = i + step < chunks * MOE_CHUNK_TOKENS;
        const int64_t ahead = more && t + step < d->num_tokens ? t + step : -1;
        int* chunk_count = count + i / MOE_CHUNK_TOKENS * E;
        float top[32]; /* this lane's largest in order, then the `depth` largest of the group */
        float picks[2] = {0.0f, 0.0f}; /* bit j % 16 of picks[j / 16]: v[j] is among the K */
        float kth = 0.0f, sum = 0.0f, total = 1.0f;
        uint32_t chosen; /* the same as bits of one word */
        int redo = 0, chosen_count, before;

        MOEI_UNROLL
        for (int j = 0; j < per_lane; ++j) top[j] = v[j];
        moei_sort_largest(top, per_lane, keep);
        MOEI_UNROLL
        for (int lw = 0; lw < 5; ++lw) {
            const int w = 1 << lw, have = keep << lw < depth ? keep << lw : depth;
            float other[32];
            if (w < lanes) {
                MOEI_UNROLL
                for (int j = 0; j < depth; ++j)
                    if (j < have) other[j] = __shfl_xor_sync(MOEI_FULL, top[j], w);
                MOEI_UNROLL
                for (int j = 0; j < depth; ++j)
                    if (j < have) {
                        if (have < depth) top[2 * have - 1 - j] = other[j]; /* all of both lists */
                        else top[j] = fmaxf(top[j], other[have - 1 - j]);   /* the larger half */
                    }
                moei_sort_bitonic(top, have < depth ? 2 * have : depth);
            }
        }

        if (score == MOE_SCORE_SOFTMAX) {
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j) sum += moei_exp2_fast(1.44269502f * (v[j] - top[0]));
        } else { /* only to find a NaN, as the softmax's sum does */
            MOEI_UNROLL
            for (int j = 0; j < per_lane; ++j) sum += moei_is_nan(v[j]) ? v[j] : 0.0f;
        }
        redo |= moei_is_nan(sum);
        sum = score == MOE_SCORE_SOFTMAX ? moei_group_sum(sum, lanes) : 1.0f;
        redo |= fabsf(top[0]) == infinity;
        MOEI_UNROLL
        for (int k = 0; k < depth; ++k) {
            if (k < K) kth = top[k];
            if (k + 1 < K && k + 1 < depth) redo |= top[k] == top[k + 1];
        }
        MOEI_UNROLL
        for (int j = 0; j < per_lane; ++j) /* summed as floats: that pipe is idle here */
            picks[j / 16] = fmaf(v[j] >= kth ? 1.0f : 0.0f, (float)(1 << j % 16), picks[j / 16]);
        chosen = (uint32_t)picks[0] | (uint32_t)picks[1] << 16;
        if (more)
            moei_gate_read(v, d, ahead >= 0 ? ahead * d->logits_stride + (int64_t)rank * per_lane : 0,
                           ahead >= 0 ? E - rank * per_lane : 0, wide, per_lane);
        before = chosen_count = __popc(chosen) | redo << 16; /* two sums in one */
        MOEI_UNROLL
        for (int w = 1; w < lanes; w <<= 1) {
            const int other = __shfl_up_sync(MOEI_FULL, before, w, lanes);
            if (rank >= w) before += other;
        }
        chosen_count = __shfl_sync(MOEI_FULL, before, lanes - 1, lanes);
        before = (before & 0xffff) - __popc(chosen);
        redo = live && chosen_count != K; /* a count over 16 bits says that one lane wants it */
        if (redo || !live) chosen = 0;

        { /* lane r weights the choices r, r + lanes, ... */
            float l[4] = {0.0f, 0.0f, 0.0f, 0.0f}, w[4];
            MOEI_UNROLL
            for (int k = 0; k < depth; ++k)
                if (rank == (k & (lanes - 1))) l[k / lanes & 3] = top[k];
            MOEI_UNROLL
            for (int s = 0; s < 4; ++s)
                w[s] = s * lanes < depth && s * lanes + rank < K
                           ? moei_gate_weight(l[s], top[0], sum, score)
                           : 0.0f;
            if (score == MOE_SCORE_TOPK_SOFTMAX || d->renormalize)
                total = moei_group_sum((w[0] + w[1]) + (w[2] + w[3]), lanes);
            MOEI_UNROLL
            for (int s = 0; s < 4; ++s)
                if (live && !redo && s * lanes < depth && s * lanes + rank < K)
                    d->weights[t * K + s * lanes + rank] =
                        (total > 0.0f && total != 1.0f ? __fdiv_rn(w[s], total) : w[s]) * d->scale;
        }
        while (chosen) { /* the chosen come together, so that each lane finishes as many of them */
            pick[before++] = (uint16_t)(rank * per_lane + __ffs((int)chosen) - 1);
            chosen &= chosen - 1;
        }
        __syncwarp(MOEI_FULL);
        if (live && !redo)
            for (int c = rank; c < K; c += lanes) {
                const int e = pick[c];
                const float l = moei_load_f32(d->logits, t * d->logits_stride + e, d->logits_dtype);
                int k = 0;
                MOEI_UNROLL
                for (int u = 0; u < depth; ++u) k += top[u] > l;
                d->ids[t * K + k] = e;
                atomicAdd(chunk_count + e, 1);
            }
        __syncwarp(MOEI_FULL);
        {
            uint32_t again = __ballot_sync(MOEI_FULL, redo && rank == 0);
            while (again) {
                const int from = __ffs((int)again) - 1;
                moei_gate_token(d, count + __shfl_sync(MOEI_FULL, i / MOE_CHUNK_TOKENS * E, from),
                                first + __shfl_sync(MOEI_FULL, i, from));
                again &= again - 1;
            }
        }
    }
    __syncthreads();
    moei_gate_write_counts(d, count, chunks);
}

/* most experts, most choices, lanes a token, logits a lane, blocks a multiprocessor: the first that
   fits is taken. */
#define MOEI_GATE_LIST(X)                                                                         \
    X(32, 8, 8, 4, 4) X(32, 32, 8, 4, 2) X(64, 8, 8, 8, 4) X(64, 32, 8, 8, 2)                     \
    X(128, 8, 8, 16, 4) X(128, 32, 8, 16, 2) X(256, 8, 16, 16, 4) X(256, 32, 16, 16, 2)           \
    X(512, 8, 32, 16, 4) X(512, 32, 32, 16, 2) X(1024, 8, 32, 32, 2) X(1024, 32, 32, 32, 2)

#define MOEI_GATE_KERNEL(most, depth, lanes, per_lane, blocks)                                    \
    MOE_KERNEL(MOEI_GATE_THREADS, blocks) moei_gate_##most##_##depth(MOE_ARG(moe_gate_desc) d)         \
    {                                                                                             \
        MOE_SHARED_DYNAMIC(count);                                                                \
        moei_let_next_start();                                                                    \
        moei_gate_clear_counts(&d, (int*)count);                                                  \
        moei_wait_for_previous();                                                                 \
        if (!moei_fault_stopped(d.fault))                                                         \
            moei_gate_block(&d, (int*)count, lanes, per_lane, depth);                             \
    }
MOEI_GATE_LIST(MOEI_GATE_KERNEL)
#undef MOEI_GATE_KERNEL

MOE_KERNEL(MOEI_GATE_THREADS, 2) moei_gate_any(MOE_ARG(moe_gate_desc) d)
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
    const uint64_t slots = (uint64_t)(d->num_tokens > 0 ? d->num_tokens : 0) *
                           (uint64_t)(d->top_k > 0 ? d->top_k : 0);
    MOEI_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOEI_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                 num_experts);
    MOEI_REQUIRE(d->top_k >= 1 && d->top_k <= d->num_experts, MOE_ERR_RANGE, top_k);
    if (d->logits_dtype == 0) d->logits_dtype = MOE_FP32;
    MOEI_REQUIRE(moe_dtype_bytes(d->logits_dtype), MOE_ERR_DTYPE, logits_dtype);
    if (d->logits_stride == 0) d->logits_stride = d->num_experts;
    MOEI_REQUIRE(d->logits_stride >= d->num_experts, MOE_ERR_STRIDE, logits_stride);
    if (d->score == 0) d->score = MOE_SCORE_SOFTMAX;
    MOEI_REQUIRE(d->score >= 0 && d->score <= MOE_SCORE_SIGMOID, MOE_ERR_OPTION, score);
    MOEI_REQUIRE(d->renormalize == 0 || d->renormalize == 1, MOE_ERR_OPTION, renormalize);
    MOEI_REQUIRE((moe_f32_bits(d->scale) & 0x7f800000u) != 0x7f800000u, MOE_ERR_RANGE, scale);
    if (d->scale == 0.0f) d->scale = 1.0f;
    MOEI_REQUIRE(moei_aligned(d->fault, 8), MOE_ERR_ALIGN, fault);
    MOEI_REQUIRE(moei_aligned(d->expert_count, 4), MOE_ERR_ALIGN, expert_count);
    if (d->num_tokens == 0) return MOE_OK;
    MOEI_REQUIRE(d->logits, MOE_ERR_NULL, logits);
    MOEI_REQUIRE(d->ids, MOE_ERR_NULL, ids);
    MOEI_REQUIRE(d->weights, MOE_ERR_NULL, weights);
    MOEI_REQUIRE(moei_aligned(d->logits, (uintptr_t)moe_dtype_bytes(d->logits_dtype)), MOE_ERR_ALIGN,
                 logits);
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

/* Queues the gate on `stream`. Errors: every field of the descriptor as documented above, each
   with its own status; nothing is queued then. T = 0 only clears expert_count. */
MOE_HOST moe_status moe_gate(const moe_gate_desc* desc, cudaStream_t stream)
{
    moe_gate_desc d;
    moei_launch_config c;
    int chunks;
    MOEI_REQUIRE(desc, MOE_ERR_NULL, desc);
    d = *desc;
    MOEI_TRY(moei_gate_check(&d));
    if (d.expert_count)
        MOEI_TRY_CUDA(cudaMemsetAsync(d.expert_count, 0, (size_t)d.num_experts * 4, stream));
    if (d.num_tokens == 0) return MOE_OK;
    chunks = (d.num_tokens >= 32768 ? 64 : d.num_tokens >= 16384 ? 32 : 16) / MOE_CHUNK_TOKENS;
    while (chunks > 1 && (size_t)chunks * (size_t)d.num_experts * 4 > 32 * 1024) chunks /= 2;
    c = moei_grid((moe_num_chunks(d.num_tokens) + chunks - 1) / chunks, MOEI_GATE_THREADS,
                  (size_t)d.num_experts * (size_t)chunks * 4, stream);
    c.dependent = 1;
#define MOEI_GATE_CASE(most, depth, lanes, per_lane, blocks)                                      \
    if (d.top_k <= depth && d.num_experts <= most) {                                              \
        c.smem += MOEI_GATE_THREADS / lanes * depth * 2;                                          \
        return MOE_LAUNCH(moei_gate_##most##_##depth, c, d);                                      \
    }
    MOEI_GATE_LIST(MOEI_GATE_CASE)
#undef MOEI_GATE_CASE
    return MOE_LAUNCH(moei_gate_any, c, d);
}

/* Loads this header's kernels now. */
MOE_HOST moe_status moe_gate_preload(void)
{
#define MOEI_GATE_LOAD(most, depth, lanes, per_lane, blocks)                                      \
    MOEI_TRY(moei_preload((const void*)moei_gate_##most##_##depth));
    MOEI_GATE_LIST(MOEI_GATE_LOAD)
#undef MOEI_GATE_LOAD
    return moei_preload((const void*)moei_gate_any);
}

#endif
