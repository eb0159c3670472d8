/* batch.cuh: one choice of experts for all tokens (whole_batch). Launch 1 sums each expert's logits
   over the tokens of each chunk. In launch 2, the gate's own kernel, every block adds up the
   chunks' sums and chooses the K experts of the largest sums. The block then weighs them for its
   chunk's tokens, by each token's own logits. Called by rules.cuh and gate.cuh. */
#ifndef MOE_GATE_BATCH_CUH
#define MOE_GATE_BATCH_CUH

#include "shared.cuh"
#include "token.cuh"
#include "top_k.cuh"

#define MOEI_GATE_BATCH_UNIT 2.3283064e-10f /* 2^-32: sums of finite logits stay finite */

/* Sums the logits of tokens first .. end, a warp a token, into sum [warps][E] in shared memory.
   Each warp writes its own row. Skips tokens that are disabled or hold a NaN, or a logit that
   counts as one. A barrier must follow. */
MOE_DEVICE void moei_gate_batch_sum_tokens(const moei_gate_args* d, float* sum, int64_t first,
                                           int64_t end)
{
    const int num_experts = d->num_experts;
    float* own = sum + moe_warp() * num_experts;
    for (int e = moe_lane(); e < num_experts; e += MOE_WARP_SIZE) own[e] = 0.0f;
    for (int64_t t = first + moe_warp(); t < end; t += blockDim.x / MOE_WARP_SIZE) {
        bool nan = d->token_disabled && d->token_disabled[t];
        float v;
        for (int e = moe_lane(); e < num_experts; e += MOE_WARP_SIZE)
            nan = nan || (moei_gate_given(&v, d, 0, t, e) &&
                          moei_is_nan(moei_gate_logit(d, v, 0.0f, 0, t, e)));
        if (__any_sync(MOE_FULL_WARP, nan)) continue;
        for (int e = moe_lane(); e < num_experts; e += MOE_WARP_SIZE)
            own[e] = fmaf(moe_load_f32(d->logits, t * d->logits_stride + e, d->logits_dtype),
                          MOEI_GATE_BATCH_UNIT, own[e]);
    }
}

/* Returns the sum of expert e's logits over the tokens first, first + step, ... below end, but for
   disabled ones. Sets *odd where one of the logits counts as NaN, or may. dtype is a literal. */
MOE_DEVICE float moei_gate_batch_column(bool* odd, const moei_gate_args* d, int e, int64_t first,
                                        int64_t end, int step, const int dtype)
{
    float all = 0.0f;
    MOE_UNROLL_8
    for (int64_t t = first; t < end; t += step) {
        const float v = moe_load_f32(d->logits, t * d->logits_stride + e, dtype);
        const bool in = !d->token_disabled || !d->token_disabled[t];
        *odd |= in && !(fabsf(v) < MOE_GATE_MAX_COSINE);
        all = fmaf(in ? v : 0.0f, MOEI_GATE_BATCH_UNIT, all);
    }
    return all;
}

/* Launch 1, one block a chunk: writes the chunk's sums [E] to the workspace. sum [warps][E] is in
   shared memory. A thread sums one expert over every rows-th token. Where such a sum meets a NaN,
   an infinity or a huge logit, the tokens are summed again one by one. */
MOE_DEVICE void moei_gate_batch_sum_block(const moei_gate_args* d, float* sum)
{
    const int64_t chunk = moe_chunk_tokens(d->num_tokens), first = blockIdx.x * chunk;
    const int64_t end = first + chunk < d->num_tokens ? first + chunk : d->num_tokens;
    const int num_experts = d->num_experts, warps = (int)blockDim.x / MOE_WARP_SIZE;
    const int fit = (int)blockDim.x / num_experts, most = fit < warps ? fit : warps;
    int rows = most > 1 ? most : 1; /* of `sum`: tokens in flight together */
    bool odd = false;
    for (int i = (int)threadIdx.x; i < rows * num_experts; i += (int)blockDim.x) {
        const int e = i % num_experts;
        const int64_t from = first + i / num_experts;
        if (d->logits_dtype == MOE_FP32)
            sum[i] = moei_gate_batch_column(&odd, d, e, from, end, rows, MOE_FP32);
        else if (d->logits_dtype == MOE_FP16)
            sum[i] = moei_gate_batch_column(&odd, d, e, from, end, rows, MOE_FP16);
        else sum[i] = moei_gate_batch_column(&odd, d, e, from, end, rows, MOE_BF16);
    }
    if (__syncthreads_or(odd)) {
        rows = warps;
        moei_gate_batch_sum_tokens(d, sum, first, end);
        __syncthreads();
    }
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x) {
        float all = 0.0f;
        for (int r = 0; r < rows; ++r) all += sum[r * num_experts + e];
        ((float*)d->workspace)[(int64_t)blockIdx.x * num_experts + e] = all;
    }
}

/* Writes row [E]: each expert's sum over all chunks. NaN marks an expert that is no choice: it is
   disabled, its sum is -inf, or the sum is of both infinities, which raises NAN_SUM. part
   [warps][E] is scratch; both are in shared memory. A thread has 4 experts (1 where E is not a
   multiple of 4) of every parts-th chunk. Every block gets the same sums. All threads; ends with a
   barrier. */
MOE_DEVICE void moei_gate_batch_row(const moei_gate_args* d, float* row, float* part)
{
    const int num_experts = d->num_experts, warps = (int)blockDim.x / MOE_WARP_SIZE,
              chunks = (int)gridDim.x;
    const int width = num_experts % 4 == 0 ? 4 : 1, columns = num_experts / width;
    const int fit = (int)blockDim.x / columns, most = fit < warps ? fit : warps;
    const int parts = most > 1 ? most : 1;
    const float* sums = (const float*)d->workspace;
    for (int i = (int)threadIdx.x; i < parts * columns; i += (int)blockDim.x) {
        const int e = i % columns * width;
        if (width == 4) {
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            MOE_UNROLL_8
            for (int c = i / columns; c < chunks; c += parts) {
                const float4 v = *(const float4*)(sums + (int64_t)c * num_experts + e);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            *(float4*)(part + i / columns * num_experts + e) = sum;
        } else {
            float sum = 0.0f;
            MOE_UNROLL_8
            for (int c = i / columns; c < chunks; c += parts)
                sum += sums[(int64_t)c * num_experts + e];
            part[i] = sum;
        }
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x) {
        const bool off = d->expert_disabled && d->expert_disabled[e];
        float sum = 0.0f;
        for (int p = 0; p < parts; ++p) sum += part[p * num_experts + e];
        if (!off && moei_is_nan(sum)) moe_fault_raise(d->fault, MOE_FAULT_NAN_SUM, d->rank, e);
        row[e] =
            off || __float_as_uint(sum) == MOEI_GATE_MINUS ? __uint_as_float(0x7fc00000u) : sum;
    }
    __syncthreads();
}

/* Sets shared->chosen [K] to the batch's choices, -1 where no expert is left. Sets shared->bias [E]
   to merits that make every token choose them in this order: -k for choice k, else -inf. All
   threads; a barrier must follow. */
MOE_DEVICE void moei_gate_batch_choose(const moei_gate_args* d, const moei_gate_shared* shared)
{
    const int num_experts = d->num_experts, top_k = d->top_k;
    moei_gate_batch_row(d, shared->bias, shared->row);
    if (moe_warp() == 0) moe_warp_top_k(shared->chosen, shared->bias, num_experts, top_k);
    __syncthreads();
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x)
        shared->bias[e] = __uint_as_float(0xff800000u);
    __syncthreads();
    for (int k = (int)threadIdx.x; k < top_k; k += (int)blockDim.x)
        if (shared->chosen[k] >= 0) shared->bias[shared->chosen[k]] = (float)-k;
}

#endif
