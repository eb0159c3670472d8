/* gate_backward.cuh: gradients by the logits of a gate: of its weights, the balance losses and the
   z-loss.

   For each token, with logits l of which the rules make l', scores s over the experts that the
   token sees, used choices C (ids >= 0), weights w and their gradients g = dweights:

     softmax, quadratic, pioneer   ds_k = scale g_k for k in C;  dl'_j = s_j (ds_j - sum_i s_i ds_i)
     top-k softmax; with           p = w / scale, a softmax over C:
     renormalize all softmaxes       dl'_k = w_k (g_k - sum over C of p_i g_i)
     sigmoid                       dl'_k = w_k (1 - s_k) g_k
       with renormalize            dl'_k = w_k (1 - s_k) (g_k - sum over C of p_i g_i)
     sparsemax                     dl'_j = ds_j - mean of ds over the support (s_j > 0), there alone
       with renormalize            ds_k = scale / (sum over C of s) (g_k - sum over C of p_i g_i)

   balance_grad adds two gradients, as moe_balance_loss writes them (balance_loss.cuh):
     [e]  of the balance losses by the probability of expert e, the term of prob_sum in gate.cuh:
          the score; of top-k softmax the softmax over all experts; of sigmoid s / sum of s
     [E]  the factor of the z-loss: dl'_j += balance_grad[E] lse softmax(l')_j, whatever the score;
          lse = log sum e^l' over the experts that the token sees
   Then dl = dl' / temperature; quadratic: times 2 q, pioneer: times -sin(2 q), q the logit after
   temperature and noise.

   In:   logits [T, E], ids and weights [T, K], as the gate took and wrote them; its rules
         dweights [T, K] fp32, balance_grad [E + 1] fp32, each optional
   Out:  dlogits [T, E] fp32, fp16 or bf16; every element is written. May be the logits themselves.

   What has no gradient: the choice of experts. Top-k, expert_bias, groups, dropout, threshold,
   whole_batch, disabled experts and tokens, and the noise count as constants. No straight-through
   estimator takes their place here (balance_loss.cuh has one, for the variance). Unused choices add nothing, whatever their weight and
   gradient. The ids of one token differ, as the gate writes them.
   Gradients are 0 of an expert that the token does not see, and of a logit of -inf. They are 0 for a
   whole token that is disabled, or that has a NaN logit (of an expert that it sees): the gate chose
   nothing for the token. Neither sets the fault word.
   A NaN in dweights of a used choice shows in that token's row alone.
   An id outside -1 .. E - 1 is unused and sets the fault word (BAD_ID).

   Infinities are limits. Logits of +inf share the softmax; the others have probability 0 and
   gradient 0. The z-loss of such a row is infinite, and so are its gradients by the logits of +inf;
   quadratic's 2 q is infinite likewise. A product of 0 and infinity counts as 0: no NaN comes of
   infinite logits. Gradients above 1e35 may come out infinite.

   Numerics: fp32 in a fixed order, rounded once to dlogits_dtype. Equal inputs give equal bits,
   whatever the other tokens hold. 1 - s of a sigmoid is computed without cancellation. The draws of
   noise and dropout are repeated from seed and seed_offset, which must hold what the gate found.

   Cost: one launch, no workspace. Reads ids, weights and dweights; the logits once, or where
   gradients depend on the choices alone (top-k softmax, sigmoid, renormalised softmax; no
   balance_grad) at most those of the choices. Rows stay in registers for E up to 1024, any K.
   Otherwise, and for rows with infinite, huge or NaN logits, a warp has the row in shared memory.
   dlogits moves as vectors of 4 elements where E and the stride are multiples of 4 and the address
   is aligned to a vector.
   Minimum architecture: sm_75.

     moe_gate_backward_desc b = {0};
     b.gate = g;                       // the descriptor of moe_gate
     b.dweights = dweights;            // from combine's backward pass
     b.balance_grad = balance_grad;    // from moe_balance_loss; or null
     b.dlogits = dlogits;
     moe_status s = moe_gate_backward(&b, stream);

   Sources: those of gate.cuh; sparsemax: Martins and Astudillo, arXiv 1602.02068; z-loss: ST-MoE,
   arXiv 2202.08906. */
#ifndef MOE_GATE_BACKWARD_CUH
#define MOE_GATE_BACKWARD_CUH

#include "base/check.h"
#include "fields.h"
#include "gate/backward.cuh"
#include "gate/check.h"
#include "preload.cuh"

/* Kernels that hold rows in registers: X(most experts, lanes a token, logits a lane, threads a
   block, least blocks a multiprocessor). The first entry that fits is used; where none fits, the
   slower moei_gate_backward_any. Predefine a list to compile fewer kernels. Lanes (4 .. 32) and
   logits a lane (8 .. 32) are powers of two; most experts <= lanes * logits a lane; 32 .. 1024
   threads, a multiple of 32. */
#ifndef MOE_GATE_BACKWARD_LIST
#define MOE_GATE_BACKWARD_LIST(X)                                                                  \
    X(128, 8, 16, 128, 6) X(256, 8, 32, 128, 4) X(1024, 32, 32, 128, 1)
#endif
#define MOEI_GATE_BACKWARD_ANY_THREADS 256

#define MOEI_GATE_BACKWARD_CHECK(most, lanes, per_lane, threads, blocks)                           \
    static_assert(MOEI_GATE_POWER(lanes, 4, 32) && MOEI_GATE_POWER(per_lane, 8, 32) &&             \
                      (most) >= 1 && (most) <= (lanes) * (per_lane) && (threads) >= 32 &&          \
                      (threads) <= 1024 && (threads) % 32 == 0 && (blocks) >= 1,                   \
                  "MOE_GATE_BACKWARD_LIST: an entry that the kernels cannot do");
MOE_GATE_BACKWARD_LIST(MOEI_GATE_BACKWARD_CHECK)
#undef MOEI_GATE_BACKWARD_CHECK

/* What moe_gate_backward takes. Pointers are device addresses, aligned to their elements. */
typedef struct moe_gate_backward_desc {
    /* in */
    moe_gate_desc gate;    /* of moe_gate's call: logits, rules, sizes; ids and weights, which are
                                  read here; fault and rank. Other outputs, workspace: not used */
    const float* dweights; /* [T, K] gradient by the weights; null: zeros */
    const float* balance_grad; /* [E + 1] [e]: gradient of the balance losses by any token's
                                  probability of expert e; [E]: factor of the z-loss; null: zeros */
    /* out */
    void* dlogits; /* [T, E] dlogits_dtype; may be the logits, of the same dtype and stride */
    int64_t dlogits_stride; /* elements between rows, >= E; 0 = E */
    int32_t dlogits_dtype;  /* moe_dtype; 0 = fp32 */
} moe_gate_backward_desc;

/* Gradients that depend on the whole row; those that depend on the choices alone. Dynamic shared
   memory: as moei_gate_back_block says. */
#define MOEI_GATE_BACKWARD_KERNEL(most, lanes, per_lane, threads, blocks)                          \
    MOE_KERNEL(threads, blocks) moei_gate_backward_##most(MOE_ARG(moei_gate_backward_args) d)      \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(memory);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (moe_fault_stopped(d.gate.fault)) return;                                               \
        moei_gate_back_block(&d, (float*)memory, 1, lanes, per_lane);                              \
    }                                                                                              \
    MOE_KERNEL(threads, blocks)                                                                    \
    moei_gate_backward_choices_##most(MOE_ARG(moei_gate_backward_args) d)                          \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(memory);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (moe_fault_stopped(d.gate.fault)) return;                                               \
        moei_gate_back_block(&d, (float*)memory, 0, lanes, per_lane);                              \
    }
MOE_GATE_BACKWARD_LIST(MOEI_GATE_BACKWARD_KERNEL)
#undef MOEI_GATE_BACKWARD_KERNEL

/* Returns the floats of a row in shared memory: num_experts, rounded up to 16 bytes. */
MOE_HOST_DEVICE int moei_gate_backward_row(int num_experts) { return (num_experts + 3) / 4 * 4; }

/* Gradients for every other E, a warp a token. Dynamic shared memory: [warps][2][row] floats. */
MOE_KERNEL(MOEI_GATE_BACKWARD_ANY_THREADS, 1)
moei_gate_backward_any(MOE_ARG(moei_gate_backward_args) d)
{
    MOE_SHARED_DYNAMIC(memory);
    const int row = moei_gate_backward_row(d.gate.num_experts);
    const int64_t t = (int64_t)blockIdx.x * (blockDim.x / MOE_WARP_SIZE) + moe_warp();
    float* own = (float*)memory + moe_warp() * 2 * row;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.gate.fault) || t >= d.gate.num_tokens) return;
    moei_gate_back_token(&d, own, own + row, t);
}

/* Refuses sizes and options of the gate and of dlogits; fills in the defaults. */
MOE_HOST moe_status moei_gate_backward_check_options(moe_gate_backward_desc* d)
{
    MOE_TRY(moei_gate_check_options(&d->gate));
    if (d->dlogits_dtype == 0) d->dlogits_dtype = MOE_FP32;
    MOE_REQUIRE(moe_dtype_bytes(d->dlogits_dtype), MOE_ERR_DTYPE, dlogits_dtype);
    if (d->dlogits_stride == 0) d->dlogits_stride = d->gate.num_experts;
    MOE_REQUIRE(moei_stride_fits(d->dlogits_stride, d->gate.num_experts, d->gate.num_tokens),
                MOE_ERR_STRIDE, dlogits_stride);
    return MOE_OK;
}

/* Refuses buffers that are missing, misaligned or overlapping. Requires checked options. */
MOE_HOST moe_status moei_gate_backward_check_buffers(const moe_gate_backward_desc* d)
{
    const moe_gate_desc* g = &d->gate;
    const uint64_t num_tokens = (uint64_t)g->num_tokens, num_experts = (uint64_t)g->num_experts;
    const uint64_t slots = num_tokens * (uint64_t)g->top_k;
    const int in_place = d->dlogits && g->logits == d->dlogits &&
                         g->logits_dtype == d->dlogits_dtype &&
                         g->logits_stride == d->dlogits_stride;
    const moe_buffer b[] = {
        {g->logits,
         in_place ? 0
                  : moe_extent(g->num_tokens, g->logits_stride, g->num_experts, g->logits_dtype),
         (uint32_t)moe_dtype_bytes(g->logits_dtype), MOE_BUFFER_REQUIRED, MOE_FIELD_logits},
        {g->expert_disabled, num_experts, 1, MOE_BUFFER_READ, MOE_FIELD_expert_disabled},
        {g->token_disabled, num_tokens, 1, MOE_BUFFER_READ, MOE_FIELD_token_disabled},
        {g->seed_offset, 8, 8, MOE_BUFFER_READ, MOE_FIELD_seed_offset},
        {g->ids, slots * 4, 4, MOE_BUFFER_REQUIRED, MOE_FIELD_ids},
        {g->weights, slots * 4, 4, MOE_BUFFER_REQUIRED, MOE_FIELD_weights},
        {d->dweights, slots * 4, 4, MOE_BUFFER_READ, MOE_FIELD_dweights},
        {d->balance_grad, num_experts * 4 + 4, 4, MOE_BUFFER_READ, MOE_FIELD_balance_grad},
        {d->dlogits, moe_extent(g->num_tokens, d->dlogits_stride, g->num_experts, d->dlogits_dtype),
         (uint32_t)moe_dtype_bytes(d->dlogits_dtype), MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_dlogits},
        {g->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    return moe_check_buffers(b, (int)(sizeof b / sizeof b[0]));
}

/* Returns the kernels' arguments, from a checked descriptor. */
MOE_HOST moei_gate_backward_args moei_gate_backward_resolve(const moe_gate_backward_desc* d)
{
    const int score = d->gate.score;
    const int by_row = /* a weight depends on the whole row */
        score == MOE_SCORE_SPARSEMAX ||
        ((score == MOE_SCORE_SOFTMAX || score >= MOE_SCORE_QUADRATIC) && !d->gate.renormalize);
    moei_gate_backward_args a;
    a.gate = moei_gate_resolve(&d->gate);
    a.gate.prob_sum =
        (float*)(uintptr_t)d->balance_grad; /* its value is not used, but whether null */
    a.dweights = d->dweights;
    a.balance_grad = d->balance_grad;
    a.dlogits = d->dlogits;
    a.dlogits_stride = d->dlogits_stride;
    a.dlogits_dtype = d->dlogits_dtype;
    a.has_row = d->balance_grad || (d->dweights && by_row);
    return a;
}

/* Prepared gradients: all but the stream, for the device that was current in prepare. */
typedef struct moe_gate_backward_prepared {
    moei_gate_backward_args args;
    moe_launch launch; /* empty where T = 0 */
} moe_gate_backward_prepared;

/* Prepares the general kernel: as many warps a block as shared memory allows. */
MOE_HOST moe_status moei_gate_backward_prepare_any(moe_gate_backward_prepared* p)
{
    const size_t warp = (size_t)moei_gate_backward_row(p->args.gate.num_experts) * 2 * 4;
    int threads = MOEI_GATE_BACKWARD_ANY_THREADS;
    moe_launch_config c;
    moe_device device;
    MOE_TRY(moe_device_query(&device));
    while (threads > MOE_WARP_SIZE && warp * (size_t)threads / 32 > (size_t)device.smem_block)
        threads /= 2;
    MOE_REQUIRE(warp <= (size_t)device.smem_block, MOE_ERR_DEVICE, num_experts);
    c = moe_grid(((int64_t)p->args.gate.num_tokens + threads / 32 - 1) / (threads / 32), threads,
                 warp * (size_t)threads / 32, 0);
    c.dependent = 1;
    return MOE_PREPARE(&p->launch, moei_gate_backward_any, c);
}

/* Fills in *p, which is all zeros. */
MOE_HOST moe_status moei_gate_backward_prepare(const moe_gate_backward_desc* desc,
                                               moe_gate_backward_prepared* p)
{
    moe_gate_backward_desc d = *desc;
    MOE_TRY(moei_gate_backward_check_options(&d));
    MOE_TRY(moei_gate_backward_check_buffers(&d));
    p->args = moei_gate_backward_resolve(&d);
    if (d.gate.num_tokens == 0) return MOE_OK;
#define MOEI_GATE_BACKWARD_CASE(most, lanes, per_lane, threads, blocks)                            \
    if (d.gate.num_experts <= most) {                                                              \
        const int tokens = threads / lanes; /* of a block */                                       \
        moe_launch_config c =                                                                      \
            moe_grid(((int64_t)d.gate.num_tokens + tokens - 1) / tokens, threads,                  \
                     (size_t)(threads / 32 * (1 + p->args.has_row) * (32 * per_lane) * 4), 0);     \
        c.dependent = 1;                                                                           \
        return p->args.has_row ? MOE_PREPARE(&p->launch, moei_gate_backward_##most, c)             \
                               : MOE_PREPARE(&p->launch, moei_gate_backward_choices_##most, c);    \
    }
    MOE_GATE_BACKWARD_LIST(MOEI_GATE_BACKWARD_CASE)
#undef MOEI_GATE_BACKWARD_CASE
    return moei_gate_backward_prepare_any(p);
}

/* Prepares gradients, which moe_gate_backward_run queues any number of times. Errors: a status for
   each field of moe_gate_backward_desc and its gate that is not as documented; MOE_ERR_DEVICE
   (num_experts) where a block of the device has too little shared memory. */
MOE_HOST moe_status moe_gate_backward_prepare(const moe_gate_backward_desc* desc,
                                              moe_gate_backward_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_gate_backward_prepare(desc, p));
}

/* Queues prepared gradients on `stream`. T = 0 queues nothing. */
MOE_HOST moe_status moe_gate_backward_run(const moe_gate_backward_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    return MOE_RUN(&p->launch, p->args, stream);
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_gate_backward(const moe_gate_backward_desc* desc, cudaStream_t stream)
{
    moe_gate_backward_prepared p;
    MOE_TRY(moe_gate_backward_prepare(desc, &p));
    return moe_gate_backward_run(&p, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_gate_backward_preload(void)
{
#define MOEI_GATE_BACKWARD_LOAD(most, ...)                                                         \
    MOE_TRY(moe_preload_kernel((const void*)moei_gate_backward_##most));                           \
    MOE_TRY(moe_preload_kernel((const void*)moei_gate_backward_choices_##most));
    MOE_GATE_BACKWARD_LIST(MOEI_GATE_BACKWARD_LOAD)
#undef MOEI_GATE_BACKWARD_LOAD
    return moe_preload_kernel((const void*)moei_gate_backward_any);
}

MOEI_PRELOAD_INCLUDED(gate_backward)

#endif
