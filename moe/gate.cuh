/* gate.cuh: chooses K experts for each token and computes their weights.

   For each token t, from its row of logits l [E], scores s [E]:

     softmax (default)   s_e = exp(l_e) / sum_j exp(l_j)
     top-k softmax       s_e = exp(l_e) / sum over the K chosen of exp(l_j)
     sigmoid             s_e = 1 / (1 + exp(-l_e))
     sparsemax           s_e = max(l_e - tau, 0), sum_e s_e = 1
     quadratic           s_e = exp(l_e^2) / sum_j exp(l_j^2)
     pioneer             s_e = exp(cos(l_e)^2) / sum_j exp(cos(l_j)^2)

   Chooses the K experts of the largest scores, in descending order; equal scores by ascending
   expert. The weights are the scores of the chosen. `renormalize` divides them by their sum, then
   `scale` multiplies them.

   In:   logits [T, E] fp32, fp16 or bf16; rows are logits_stride elements apart
   Out:  ids [T, K] int32, weights [T, K] fp32
         Optional, in the same pass over the logits:
         expert_count [E] int32, chunk_count [num_chunks, E] int32 (layout.h; saves route a launch)
         prob_sum [E] fp32, for balance losses: sum over all tokens of each expert's probability.
         This is the score; of top-k softmax the softmax over all experts; of sigmoid the score
         divided by the sum of the token's scores.
         z_sum [1] fp32, for the z-loss: sum over all tokens of lse^2. lse = log sum_e exp(l_e) over
         the experts that the token sees, l after temperature, noise, square or cosine, whatever the
         score. A logit of +inf makes z_sum +inf.

   Rules. Each is disabled where its field is 0. They apply in this order:
     expert_disabled no token may choose these experts
     dropout         each token excludes each expert with this probability; a new draw for each pair
     temperature     l / temperature
     noise           + noise * n, n standard normal; a new draw for each token and expert
                     (draws: MOE_GATE_STREAM_NOISE in gate/desc.h; the same for the same seed)
     expert_bias     score + bias [E] chooses the experts; the weight remains the score
                     (top-k softmax: logit + bias chooses)
     num_groups,     the experts form groups, of which each token keeps top_groups: those with the
     top_groups      largest sums of their two best (score + bias; equal sums: the lower group)
     threshold       sigmoid: a choice with a smaller score is unused
     token_disabled  these tokens choose nothing and add to no count and no sum
     whole_batch     all tokens get the same K experts: those with the largest sums of logits over
                     all tokens. The sums take the logits as given; expert_disabled is the one other
                     rule for choosing. Each token's own scores give its weights.
   A token "sees" an expert that neither expert_disabled nor dropout excludes for the token.
   An unused choice has id -1 and weight 0. A choice is unused below the threshold, where its
   sparsemax score is 0, and where fewer than K experts are left.

   Infinities are limits. Logits of +inf share the whole softmax equally. A logit of -inf is no
   choice, as if the token did not see the expert. A row of -inf chooses nothing, without a fault,
   and adds to no sum.
   Exceptions: quadratic squares -inf to +inf; for pioneer -inf counts as NaN, as does every |l| of
   2^20 or more. Quadratic compares |l|, so logits whose squares overflow keep their order.
   whole_batch: a sum of -inf is no choice. +inf and -inf of one expert sum to NaN, which is no
   choice and sets the fault word (NAN_SUM). Finite logits have finite sums.
   A row with a NaN (of an expert that the token sees), or for pioneer with a logit of 2^20 or more,
   chooses nothing (ids -1, weights 0) and sets the fault word (NAN_LOGIT). No other token changes.
   An expert whose bias is NaN is not chosen; its group's sum does not include the expert.
   An expert whose bias is -inf is chosen last; its group's sum does not include the expert either.

   Numerics: fp32 in a fixed order. Equal inputs give equal bits.
   A temperature of softmax, sparsemax and (without groups) top-k softmax divides a logit's distance
   from the row's largest logit: a common offset of the row costs no precision.
   Without a bias the logits themselves are compared: rounding in exp never changes the choice of
   experts, but may change the choice of groups.

   Cost: one read of the logits (whole_batch: two). One launch; one more each for expert_count (a
   memset), whole_batch, and prob_sum or z_sum. Any E up to MOE_MAX_EXPERTS, any K up to E. Rows
   stay in registers for E up to 1024 and K up to 32; with rules for K up to 8 and groups of a
   multiple of 4 experts. Otherwise, and for rows with infinities, NaN or many equal logits at the
   top, a warp reads the row again for each choice.
   Minimum architecture: sm_75.

     moe_gate_desc g = {0};
     g.logits = logits;  g.ids = ids;  g.weights = weights;
     g.num_tokens = T;   g.num_experts = E;   g.top_k = K;
     moe_status s = moe_gate(&g, stream);

   For kernels of one's own: moe_warp_top_k (gate/top_k.cuh).

   Sources: softmax and top-k gating, noise: Shazeer et al., arXiv 1701.06538; sigmoid scores, bias,
   groups: DeepSeek-V3, arXiv 2412.19437; sparsemax: Martins and Astudillo, arXiv 1602.02068;
   z-loss: ST-MoE, arXiv 2202.08906. */
#ifndef MOE_GATE_CUH
#define MOE_GATE_CUH

#include "base/check.h"
#include "fields.h"
#include "gate/check.h"
#include "gate/plain.cuh"
#include "gate/rules.cuh"
#include "preload.cuh"

/* Kernels that hold rows in registers: X(most experts, most choices, lanes a token, logits a lane).
   The first entry that fits is used; where none fits, the slower moei_gate_any. Predefine a list to
   compile fewer kernels. 512 threads a block let each thread have 128 registers.

   The sorting networks require powers of two: most choices, lanes (1 .. 32) and logits a lane
   (8 .. 32). Also logits a lane / 4 <= most choices <= 32; most choices <= 8 * lanes; most experts
   <= lanes * logits a lane. With rules also 32 <= lanes * logits a lane, and 32 .. 1024 threads, a
   multiple of 32. Any other entry does not compile. */
#define MOEI_GATE_THREADS 512
#ifndef MOE_GATE_LIST
#define MOE_GATE_LIST(X)                                                                           \
    X(64, 8, 4, 16) X(128, 8, 4, 32) X(256, 8, 8, 32) X(1024, 8, 32, 32) X(1024, 32, 32, 32)
#endif
/* Kernels with rules: X(as above, threads a block). */
#ifndef MOE_GATE_RULES_LIST
#define MOE_GATE_RULES_LIST(X) X(128, 8, 8, 16, 512) X(256, 8, 16, 16, 512) X(1024, 8, 32, 32, 256)
#endif
#define MOEI_GATE_ANY_THREADS 1024

#define MOEI_GATE_SORTS(most, num_largest, lanes, per_lane)                                        \
    (MOEI_GATE_POWER(lanes, 1, 32) && MOEI_GATE_POWER(per_lane, 8, 32) &&                          \
     MOEI_GATE_POWER(num_largest, (per_lane) / 4, 32) && (num_largest) <= 8 * (lanes) &&           \
     (most) >= 1 && (most) <= (lanes) * (per_lane))
#define MOEI_GATE_CHECK(most, num_largest, lanes, per_lane)                                        \
    static_assert(MOEI_GATE_SORTS(most, num_largest, lanes, per_lane),                             \
                  "MOE_GATE_LIST: an entry that the sorting networks cannot do (gate.cuh)");
MOE_GATE_LIST(MOEI_GATE_CHECK)
#undef MOEI_GATE_CHECK
#define MOEI_GATE_CHECK(most, num_largest, lanes, per_lane, threads)                               \
    static_assert(MOEI_GATE_SORTS(most, num_largest, lanes, per_lane) &&                           \
                      (lanes) * (per_lane) >= 32 && (threads) >= 32 && (threads) <= 1024 &&        \
                      (threads) % 32 == 0,                                                         \
                  "MOE_GATE_RULES_LIST: an entry that the kernels cannot do (gate.cuh)");
MOE_GATE_RULES_LIST(MOEI_GATE_CHECK)
#undef MOEI_GATE_CHECK

/* Gate without rules, one block a chunk. Dynamic shared memory: count [E], then the picks. */
#define MOEI_GATE_KERNEL(most, num_largest, lanes, per_lane)                                       \
    MOE_KERNEL(MOEI_GATE_THREADS, 1) moei_gate_##most##_##num_largest(MOE_ARG(moei_gate_args) d)   \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(count);                                                                 \
        moe_pdl_trigger();                                                                         \
        moei_gate_clear_counts(&d, (int*)count);                                                   \
        moe_pdl_wait();                                                                            \
        if (!moe_fault_stopped(d.fault))                                                           \
            moei_gate_block(&d, (int*)count, lanes, per_lane, num_largest);                        \
    }
MOE_GATE_LIST(MOEI_GATE_KERNEL)
#undef MOEI_GATE_KERNEL

/* Gate with rules, one block a chunk. Dynamic shared memory: moei_gate_carve. */
#define MOEI_GATE_RULES_KERNEL(most, num_largest, lanes, per_lane, threads)                        \
    MOE_KERNEL(threads, 1) moei_gate_rules_##most##_##num_largest(MOE_ARG(moei_gate_args) d)       \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(memory);                                                                \
        moei_gate_shared s;                                                                        \
        moe_pdl_trigger();                                                                         \
        moei_gate_carve(&s, memory, &d, (int)blockDim.x / 32, (int)blockDim.x / lanes,             \
                        num_largest);                                                              \
        moe_pdl_wait();                                                                            \
        if (moe_fault_stopped(d.fault)) return;                                                    \
        moei_gate_rules_begin(&d, &s);                                                             \
        moei_gate_rules_block(&d, &s, lanes, per_lane, num_largest);                               \
    }
MOE_GATE_RULES_LIST(MOEI_GATE_RULES_KERNEL)
#undef MOEI_GATE_RULES_KERNEL

/* Gate for all that no list entry fits: one block a chunk, one warp a token. */
MOE_KERNEL(MOEI_GATE_ANY_THREADS, 1) moei_gate_any(MOE_ARG(moei_gate_args) d)
{
    MOE_SHARED_DYNAMIC(memory);
    moei_gate_shared s;
    moe_pdl_trigger();
    moei_gate_carve(&s, memory, &d, (int)blockDim.x / 32, 0, 0);
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault)) return;
    moei_gate_rules_begin(&d, &s);
    moei_gate_any_block(&d, &s);
}

/* whole_batch: sums each chunk's logits into the workspace, one block a chunk. */
MOE_KERNEL(MOEI_GATE_ANY_THREADS, 1) moei_gate_batch_sum(MOE_ARG(moei_gate_args) d)
{
    MOE_SHARED_DYNAMIC(memory);
    moe_pdl_trigger();
    moe_pdl_wait();
    if (!moe_fault_stopped(d.fault)) moei_gate_batch_sum_block(&d, (float*)memory);
}

/* Shared memory of moei_gate_sum_chunks. */
typedef struct moei_gate_chunk_sums {
    float sum[32][MOE_WARP_SIZE]; /* [warp][expert of the block] */
} moei_gate_chunk_sums;

/* Computes prob_sum [E] and z_sum from the chunks' sums. A block has 32 columns, one a lane: E
   experts, then lse^2. Warp w adds chunks w, w + 32, ... */
MOE_KERNEL(1024, 1) moei_gate_sum_chunks(MOE_ARG(moei_gate_args) d)
{
    MOE_SHARED(moei_gate_chunk_sums, s);
    const int e = (int)blockIdx.x * MOE_WARP_SIZE + moe_lane(), num_experts = d.num_experts;
    const int chunks = (int)moe_num_chunks(d.num_tokens);
    float* to = e == num_experts ? d.z_sum : d.prob_sum && e < num_experts ? d.prob_sum + e : 0;
    float sum = 0.0f;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault)) return;
    if (to) {
        const float* part = e < num_experts ? moei_gate_prob_part(&d) + e : moei_gate_z_part(&d);
        const int step = e < num_experts ? num_experts : 1; /* from chunk to chunk */
        MOE_UNROLL
        for (int i = 0; i < MOE_MAX_CHUNKS / 32; ++i) {
            const int c = i * 32 + moe_warp();
            if (c < chunks) sum += part[(int64_t)c * step];
        }
    }
    s.sum[moe_warp()][moe_lane()] = sum;
    __syncthreads();
    if (moe_warp() == 0 && to) {
        sum = 0.0f;
        MOE_UNROLL
        for (int w = 0; w < 32; ++w) sum += s.sum[w][moe_lane()];
        *to = sum;
    }
}

/* Returns the bytes of workspace. Requires checked sizes. */
MOE_HOST uint64_t moei_gate_workspace(const moe_gate_desc* d)
{
    const uint64_t rows = (d->prob_sum ? 1u : 0u) + (d->whole_batch ? 1u : 0u);
    return (uint64_t)moe_num_chunks(d->num_tokens) * 4 *
           ((uint64_t)d->num_experts * rows + (d->z_sum ? 1u : 0u));
}

/* Refuses buffers that are missing, misaligned or overlapping. Requires checked options. */
MOE_HOST moe_status moei_gate_check_buffers(const moe_gate_desc* d)
{
    const uint64_t num_tokens = (uint64_t)d->num_tokens, num_experts = (uint64_t)d->num_experts;
    const uint64_t slots = num_tokens * (uint64_t)d->top_k, workspace = moei_gate_workspace(d);
    const moe_buffer b[] = {
        {d->logits, moe_extent(d->num_tokens, d->logits_stride, d->num_experts, d->logits_dtype),
         (uint32_t)moe_dtype_bytes(d->logits_dtype), MOE_BUFFER_REQUIRED, MOE_FIELD_logits},
        {d->expert_bias, num_experts * 4, 4, MOE_BUFFER_READ, MOE_FIELD_expert_bias},
        {d->expert_disabled, num_experts, 1, MOE_BUFFER_READ, MOE_FIELD_expert_disabled},
        {d->token_disabled, num_tokens, 1, MOE_BUFFER_READ, MOE_FIELD_token_disabled},
        {d->seed_offset, 8, 8, MOE_BUFFER_READ, MOE_FIELD_seed_offset},
        {d->ids, slots * 4, 4, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_ids},
        {d->weights, slots * 4, 4, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_weights},
        {d->expert_count, num_experts * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_expert_count},
        {d->chunk_count, num_experts * (uint64_t)moe_num_chunks(d->num_tokens) * 4, 4,
         MOE_BUFFER_WRITTEN, MOE_FIELD_chunk_count},
        {d->prob_sum, num_experts * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_prob_sum},
        {d->z_sum, 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_z_sum},
        {d->workspace, workspace, 16, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_workspace},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    MOE_REQUIRE(!d->workspace || d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE,
                workspace_bytes);
    return moe_check_buffers(b, (int)(sizeof b / sizeof b[0]));
}

/* Refuses what moe_gate_desc does not allow; fills in the defaults. */
MOE_HOST moe_status moei_gate_check(moe_gate_desc* d)
{
    MOE_TRY(moei_gate_check_options(d));
    return moei_gate_check_buffers(d);
}

/* Returns not 0 where a checked descriptor asks for more than softmax, top-k softmax or sigmoid of
   the logits. */
MOE_HOST int moei_gate_has_rules(const moe_gate_desc* d)
{
    return d->score > MOE_SCORE_SIGMOID || d->temperature != 1.0f || d->noise > 0.0f ||
           d->dropout > 0.0f || d->threshold > 0.0f || d->expert_bias || d->expert_disabled ||
           d->token_disabled || d->num_groups > 1 || d->prob_sum || d->z_sum || d->whole_batch;
}

/* Sets c->block.x, at most `threads`, and c->smem so that a block's shared memory fits the device.
   lanes: lanes a token. 0: a warp a token, which needs no picks in shared memory. Refuses
   num_experts (MOE_ERR_DEVICE) where one warp does not fit. */
MOE_HOST moe_status moei_gate_fit(moe_launch_config* c, const moei_gate_args* a, int threads,
                                  int lanes, int num_largest)
{
    const int64_t wanted = moe_chunk_tokens(a->num_tokens) * (lanes ? lanes : MOE_WARP_SIZE);
    moei_gate_shared s;
    moe_device device;
    MOE_TRY(moe_device_query(&device));
    if (threads > wanted) threads = (int)((wanted + 31) / 32 * 32);
    for (;; threads = (threads / 2 + 31) / 32 * 32) {
        c->smem = moei_gate_carve(&s, 0, a, threads / 32, lanes ? threads / lanes : 0, num_largest);
        if (c->smem <= (size_t)device.smem_block || threads <= 32) break;
    }
    c->block.x = (unsigned)threads;
    MOE_REQUIRE(c->smem <= (size_t)device.smem_block, MOE_ERR_DEVICE, num_experts);
    return MOE_OK;
}

/* A prepared gate: all but the stream, for the device that was current in prepare. */
typedef struct moe_gate_prepared {
    moei_gate_args args;
    moe_launch sum_batch; /* each launch is empty where the options do not need it */
    moe_launch choose;
    moe_launch sum_chunks;
} moe_gate_prepared;

/* Prepares the launch that chooses and weighs: the first list entry that fits, else
   moei_gate_any. */
MOE_HOST moe_status moei_gate_prepare_choice(const moe_gate_desc* d, moe_gate_prepared* p)
{
    const moei_gate_args* a = &p->args;
    const int64_t chunk = moe_chunk_tokens(d->num_tokens);
    moe_launch_config c = moe_grid(moe_num_chunks(d->num_tokens), 0, (size_t)d->num_experts * 4, 0);
    c.dependent = 1;
    (void)chunk; /* unused where MOE_GATE_LIST is empty */
    if (!moei_gate_has_rules(d)) {
#define MOEI_GATE_CASE(most, num_largest, lanes, per_lane)                                         \
    if (d->top_k <= num_largest && d->num_experts <= most) {                                       \
        c.block.x = (unsigned)(chunk * lanes < MOEI_GATE_THREADS ? (chunk * lanes + 31) / 32 * 32  \
                                                                 : MOEI_GATE_THREADS);             \
        c.smem += c.block.x / lanes * num_largest * 4;                                             \
        return MOE_PREPARE(&p->choose, moei_gate_##most##_##num_largest, c);                       \
    }
        MOE_GATE_LIST(MOEI_GATE_CASE)
#undef MOEI_GATE_CASE
    } else if (d->num_groups == 1 || d->num_experts / d->num_groups % 4 == 0) {
#define MOEI_GATE_RULES_CASE(most, num_largest, lanes, per_lane, threads)                          \
    if (d->top_k <= num_largest && d->num_experts <= most) {                                       \
        MOE_TRY(moei_gate_fit(&c, a, threads, lanes, num_largest));                                \
        return MOE_PREPARE(&p->choose, moei_gate_rules_##most##_##num_largest, c);                 \
    }
        MOE_GATE_RULES_LIST(MOEI_GATE_RULES_CASE)
#undef MOEI_GATE_RULES_CASE
    }
    MOE_TRY(moei_gate_fit(&c, a, MOEI_GATE_ANY_THREADS, 0, 0));
    return MOE_PREPARE(&p->choose, moei_gate_any, c);
}

/* Sets *bytes to the workspace that moe_gate needs: moe_num_chunks(T) * E * 4 each for prob_sum and
   for whole_batch, moe_num_chunks(T) * 4 for z_sum, else 0. Reads num_tokens, num_experts and those
   three alone. Errors: those sizes out of range; MOE_ERR_NULL where desc or bytes is null. */
MOE_HOST moe_status moe_gate_workspace(const moe_gate_desc* desc, size_t* bytes)
{
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    MOE_TRY(moei_gate_check_sizes(desc));
    *bytes = (size_t)moei_gate_workspace(desc);
    return MOE_OK;
}

/* Fills in *p, which is all zeros. */
MOE_HOST moe_status moei_gate_prepare(const moe_gate_desc* desc, moe_gate_prepared* p)
{
    moe_gate_desc d;
    moe_launch_config c = moe_grid(1, 32, 0, 0);
    d = *desc;
    MOE_TRY(moei_gate_check(&d));
    p->args = moei_gate_resolve(&d);
    c.dependent = 1;
    if (moei_gate_has_rules(&d))
        MOE_TRY(moei_gate_fit(&c, &p->args, MOE_WARP_SIZE, 0, 0)); /* for T = 0 too */
    if (d.num_tokens == 0) return MOE_OK;
    if (d.whole_batch) {
        c.grid.x = (unsigned)moe_num_chunks(d.num_tokens);
        MOE_TRY(moei_gate_fit(&c, &p->args, MOEI_GATE_ANY_THREADS, 0, 0));
        MOE_TRY(MOE_PREPARE(&p->sum_batch, moei_gate_batch_sum, c));
    }
    MOE_TRY(moei_gate_prepare_choice(&d, p));
    if (!d.prob_sum && !d.z_sum) return MOE_OK;
    c.grid.x = (unsigned)(d.num_experts + (d.z_sum ? 1 : 0) + 31) / 32;
    c.block.x = 1024;
    c.smem = 0;
    return MOE_PREPARE(&p->sum_chunks, moei_gate_sum_chunks, c);
}

/* Prepares a gate, which moe_gate_run queues any number of times. Errors: a status for each field
   of moe_gate_desc that is not as documented; MOE_ERR_DEVICE (num_experts) where the rules need
   more shared memory than a block of the device has. */
MOE_HOST moe_status moe_gate_prepare(const moe_gate_desc* desc, moe_gate_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_gate_prepare(desc, p));
}

/* Queues a prepared gate on `stream`. T = 0 only clears expert_count, prob_sum and z_sum. */
MOE_HOST moe_status moe_gate_run(const moe_gate_prepared* p, cudaStream_t stream)
{
    const moei_gate_args* a;
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    a = &p->args;
    if (a->expert_count)
        MOE_TRY_CUDA(cudaMemsetAsync(a->expert_count, 0, (size_t)a->num_experts * 4, stream));
    if (a->prob_sum && a->num_tokens == 0)
        MOE_TRY_CUDA(cudaMemsetAsync(a->prob_sum, 0, (size_t)a->num_experts * 4, stream));
    if (a->z_sum && a->num_tokens == 0) MOE_TRY_CUDA(cudaMemsetAsync(a->z_sum, 0, 4, stream));
    MOE_TRY(MOE_RUN(&p->sum_batch, *a, stream));
    MOE_TRY(MOE_RUN(&p->choose, *a, stream));
    return MOE_RUN(&p->sum_chunks, *a, stream);
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_gate(const moe_gate_desc* desc, cudaStream_t stream)
{
    moe_gate_prepared p;
    MOE_TRY(moe_gate_prepare(desc, &p));
    return moe_gate_run(&p, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_gate_preload(void)
{
#define MOEI_GATE_LOAD(most, num_largest, ...)                                                     \
    MOE_TRY(moe_preload_kernel((const void*)moei_gate_##most##_##num_largest));
#define MOEI_GATE_RULES_LOAD(most, num_largest, ...)                                               \
    MOE_TRY(moe_preload_kernel((const void*)moei_gate_rules_##most##_##num_largest));
    MOE_GATE_LIST(MOEI_GATE_LOAD)
    MOE_GATE_RULES_LIST(MOEI_GATE_RULES_LOAD)
#undef MOEI_GATE_LOAD
#undef MOEI_GATE_RULES_LOAD
    MOE_TRY(moe_preload_kernel((const void*)moei_gate_any));
    MOE_TRY(moe_preload_kernel((const void*)moei_gate_batch_sum));
    return moe_preload_kernel((const void*)moei_gate_sum_chunks);
}

MOEI_PRELOAD_INCLUDED(gate)

#endif
