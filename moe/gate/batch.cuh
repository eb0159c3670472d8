/* batch.cuh: one selection for a whole batch. A launch sums the logits of each expert over all tokens,
   by chunk; in the next every block adds up the chunks, selects the K experts with the largest sums,
   and weighs them for each of its chunk's tokens by the token's own logits. */
#ifndef MOE_GATE_BATCH_CUH
#define MOE_GATE_BATCH_CUH

#include "rules.cuh"

/* Launch 1, one block, a warp a token: the chunk's sums into the workspace. sum [warps][E] is in
   shared memory. Tokens that are switched off or hold a NaN do not count. */
MOE_DEVICE void moei_gate_batch_sum_block(const moe_gate_desc* d, float* sum)
{
    const int64_t chunk = moe_chunk_tokens(d->num_tokens), first = blockIdx.x * chunk;
    const int64_t end = first + chunk < d->num_tokens ? first + chunk : d->num_tokens;
    const int E = d->num_experts, warps = (int)blockDim.x / MOEI_WARP;
    float* own = sum + moei_warp() * E;
    for (int e = moei_lane(); e < E; e += MOEI_WARP) own[e] = 0.0f;
    for (int64_t t = first + moei_warp(); t < end; t += warps) {
        const int64_t row = t * d->logits_stride;
        bool nan = d->token_off && d->token_off[t];
        float v;
        for (int e = moei_lane(); e < E; e += MOEI_WARP)
            nan = nan || (moei_gate_logit(&v, d, 0, t, e) && moei_is_nan(v));
        if (__any_sync(MOEI_FULL, nan)) continue;
        for (int e = moei_lane(); e < E; e += MOEI_WARP)
            own[e] += moei_load_f32(d->logits, row + e, d->logits_dtype);
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < E; e += (int)blockDim.x) {
        float all = 0.0f;
        for (int w = 0; w < warps; ++w) all += sum[w * E + e];
        ((float*)d->workspace)[(int64_t)blockIdx.x * E + e] = all;
    }
}

/* row [E] becomes the sums over all chunks, NaN where the expert is switched off; part [warps][E] is
   scratch. Every block gets the same. Ends with a barrier. */
MOE_DEVICE void moei_gate_batch_row(const moe_gate_desc* d, float* row, float* part)
{
    const int E = d->num_experts, warps = (int)blockDim.x / MOEI_WARP, chunks = (int)gridDim.x;
    const int tiles = (E + MOEI_WARP - 1) / MOEI_WARP;
    const int parts = warps > tiles ? warps / tiles : 1;
    for (int u = moei_warp(); u < tiles * parts; u += warps) {
        const int e = u % tiles * MOEI_WARP + moei_lane();
        float sum = 0.0f;
        if (e < E) {
            MOEI_UNROLL_8
            for (int c = u / tiles; c < chunks; c += parts)
                sum += ((const float*)d->workspace)[(int64_t)c * E + e];
            part[u / tiles * E + e] = sum;
        }
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < E; e += (int)blockDim.x) {
        float sum = 0.0f;
        for (int p = 0; p < parts; ++p) sum += part[p * E + e];
        row[e] = d->expert_off && d->expert_off[e] ? __uint_as_float(0x7fc00000u) : sum;
    }
    __syncthreads();
}

/* Shared memory of the launch that sums chunks. */
typedef struct moei_gate_chunk_sums {
    float sum[8][MOEI_WARP];
} moei_gate_chunk_sums;

/* Launch 2, one block, a warp a token. shared->bias is the row of sums here, shared->prob also its
   scratch; chosen [K] is in shared memory. */
MOE_DEVICE void moei_gate_batch_block(const moe_gate_desc* d, const moei_gate_shared* shared,
                                      int32_t* chosen)
{
    const int64_t chunk = moe_chunk_tokens(d->num_tokens), first = blockIdx.x * chunk;
    const int64_t end = first + chunk < d->num_tokens ? first + chunk : d->num_tokens;
    const int E = d->num_experts, K = d->top_k, warps = (int)blockDim.x / MOEI_WARP;
    float* prob = shared->prob + moei_warp() * E;
    moei_gate_batch_row(d, shared->bias, shared->prob);
    for (int e = moei_lane(); e < E; e += MOEI_WARP) prob[e] = 0.0f;
    for (int e = (int)threadIdx.x; e < E; e += (int)blockDim.x) shared->count[e] = 0;
    if (moei_warp() == 0) moe_warp_top_k(chosen, shared->bias, E, K);
    __syncthreads();
    for (int64_t t = first + moei_warp(); t < end; t += warps) {
        moei_gate_stats s;
        if (d->token_off && d->token_off[t]) {
            moei_gate_unused(d, t, moei_lane(), MOEI_WARP);
            continue;
        }
        s = moei_gate_row_stats(d, 0, t, 1);
        if (s.nan) {
            moei_gate_unused(d, t, moei_lane(), MOEI_WARP);
            if (moei_lane() == 0) moei_fault_raise(d->fault, MOE_FAULT_NAN_LOGIT, 0, t);
            continue;
        }
        for (int k = moei_lane(); k < K; k += MOEI_WARP) {
            float v = 0.0f;
            if (chosen[k] >= 0) moei_gate_logit(&v, d, 0, t, chosen[k]);
            d->ids[t * K + k] = chosen[k];
            d->weights[t * K + k] = v;
        }
        __syncwarp(MOEI_FULL);
        moei_gate_finish(d, shared->count, t, &s, 1);
        if (d->prob_sum) moei_gate_add_probabilities(d, prob, 0, t, &s);
    }
    moei_gate_rules_end(d, shared);
}

#endif
