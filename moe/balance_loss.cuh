/* balance_loss.cuh: losses that keep experts equally used, their gradient, and the update of a bias
   that does so without a loss.

   moe_balance_loss, from the sums that moe_gate writes: c = expert_count, p = prob_sum [E]

     N = sum_e p_e: the tokens that take part    S = sum_e c_e: the slots in use
     f_e = c_e / S                               P_e = p_e / N

     auxiliary  aux_coefficient E sum_e f_e P_e             1 x the coefficient where f or P is even
     variance   variance_coefficient / E sum_e (f_e - 1/E)^2
     z          z_coefficient / N z_sum                     z_sum: sum over all tokens of lse^2

   The counts have no gradient. So the auxiliary loss takes f as constant. The variance depends on
   counts alone: its gradient is straight-through, P_e in place of f_e, at P = f. By any token's
   probability of expert e:

     balance_grad[e] = aux_coefficient E f_e / N + variance_coefficient 2/E (f_e - 1/E) / N
     balance_grad[E] = 2 z_coefficient / N, the factor of the z-loss: the gradient by lse over lse

   moe_balance_bias, after each step of training, for the gate's expert_bias:

     expert_bias[e] += bias_step sign(mean of c - c_e)

   In:   expert_count [E] int32, prob_sum [E] fp32, z_sum [1] fp32; the caller may have added up
         those of several ranks or calls
   Out:  loss [4] fp32, balance_grad [E + 1] fp32, for moe_gate_backward; each optional
         of moe_balance_bias: expert_bias [E] fp32, in place

   With N or S of 0 losses and gradients are 0. A loss whose coefficient is 0 is not computed: its
   entry is 0, and its inputs add nothing. NaN or infinity in prob_sum or z_sum gives NaN or
   infinity.

   Numerics: fp32 in a fixed order; counts are summed exactly. moe_balance_bias compares exactly.
   Equal inputs give equal bits.
   Cost: one launch of one thread block each; any E up to MOE_MAX_EXPERTS.
   Minimum architecture: sm_75.

     moe_balance_loss_desc b = {0};
     b.expert_count = expert_count;  b.prob_sum = prob_sum;  b.num_experts = E;   // of moe_gate
     b.aux_coefficient = 0.01f;
     b.loss = loss;  b.balance_grad = balance_grad;
     moe_status s = moe_balance_loss(&b, stream);

   Coefficients differ between sources: GShard's loss is a mean over experts, E^2 times smaller; where
   f_e is a count over tokens, as in several trainers, the loss is K times larger.

   Sources: auxiliary loss: GShard, arXiv 2006.16668, and Switch Transformer, arXiv 2101.03961;
   z-loss: ST-MoE, arXiv 2202.08906; bias: Wang et al., arXiv 2408.15664. */
#ifndef MOE_BALANCE_LOSS_CUH
#define MOE_BALANCE_LOSS_CUH

#include "base/block.cuh"
#include "base/check.h"
#include "base/fault.cuh"
#include "fields.h"
#include "layout.h"
#include "preload.cuh"

#define MOEI_BALANCE_THREADS 512

/* What moe_balance_loss takes. Pointers are device addresses, aligned to their elements. */
typedef struct moe_balance_loss_desc {
    /* in */
    const int32_t* expert_count; /* [E] slots that chose each expert, >= 0 */
    const float* prob_sum;       /* [E] sum over all tokens of each expert's probability */
    const float* z_sum; /* [1] sum over all tokens of lse^2; may be null without the z-loss */
    /* out */
    float* loss;         /* [4] auxiliary, variance, z, each times its coefficient; their sum; or
                            null */
    float* balance_grad; /* [E + 1] gradients for moe_gate_backward; or null */
    uint64_t* fault;     /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_experts;        /* E, 1 .. MOE_MAX_EXPERTS */
    float aux_coefficient;      /* factor on the auxiliary loss, finite; 0: no such loss */
    float variance_coefficient; /* factor on the variance of usage, finite; 0: no such loss */
    float z_coefficient;        /* factor on the z-loss, finite; 0: no such loss */
    int32_t rank;               /* rank that a fault reports, 0 .. MOE_FAULT_MAX_RANK */
} moe_balance_loss_desc;

/* What moe_balance_bias takes. Pointers are device addresses, aligned to their elements. */
typedef struct moe_balance_bias_desc {
    /* in */
    const int32_t* expert_count; /* [E] slots that chose each expert, >= 0 */
    /* in and out */
    float* expert_bias; /* [E] the gate's bias */
    uint64_t* fault;    /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_experts; /* E, 1 .. MOE_MAX_EXPERTS */
    float bias_step;     /* what is added or subtracted, finite; 0 = 1e-3 */
    int32_t rank;        /* rank that a fault reports, 0 .. MOE_FAULT_MAX_RANK */
} moe_balance_bias_desc;

/* Shared memory of both kernels. */
typedef struct moei_balance_shared {
    moe_block_scan_scratch scratch;
    int64_t count[MOE_WARP_SIZE]; /* slots that each warp counted */
} moei_balance_shared;

/* Returns the sum of expert_count [E] to every thread, exactly. All threads; ends with a barrier.
   */
MOE_DEVICE int64_t moei_balance_slots(const int32_t* expert_count, int num_experts,
                                      moei_balance_shared* s)
{
    int64_t sum = 0;
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x) sum += expert_count[e];
    for (int by = 16; by > 0; by >>= 1) {
        const uint32_t low = __shfl_xor_sync(MOE_FULL_WARP, (uint32_t)sum, by);
        const uint32_t high = __shfl_xor_sync(MOE_FULL_WARP, (uint32_t)((uint64_t)sum >> 32), by);
        sum += (int64_t)((uint64_t)high << 32 | low);
    }
    if (moe_lane() == 0) s->count[moe_warp()] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < (int)blockDim.x / MOE_WARP_SIZE; ++w) sum += s->count[w];
    __syncthreads();
    return sum;
}

/* What the threads share of a launch. */
typedef struct moei_balance_sums {
    float mean;          /* 1 / E */
    float per_token;     /* 1 / N; 0 where N or S is 0 */
    float slots;         /* S; 1 where S is 0 */
    float aux, variance; /* sum of f P; of (f - 1/E)^2 */
} moei_balance_sums;

/* Returns the sums over the experts; a thread has every blockDim.x-th. All threads. */
MOE_DEVICE moei_balance_sums moei_balance_sum(const moe_balance_loss_desc* d,
                                              moei_balance_shared* s)
{
    const int num_experts = d->num_experts;
    float tokens = 0.0f, aux = 0.0f, variance = 0.0f;
    int64_t slots;
    moei_balance_sums o;
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x) tokens += d->prob_sum[e];
    tokens = moe_block_sum(tokens, &s->scratch);
    slots = moei_balance_slots(d->expert_count, num_experts, s);
    o.mean = __fdiv_rn(1.0f, (float)num_experts);
    o.per_token = tokens == 0.0f || slots == 0 ? 0.0f : __fdiv_rn(1.0f, tokens);
    o.slots = slots == 0 ? 1.0f : (float)slots;
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x) {
        const float usage = __fdiv_rn((float)d->expert_count[e], o.slots);
        aux = fmaf(usage, d->prob_sum[e] * o.per_token, aux);
        variance = fmaf(usage - o.mean, usage - o.mean, variance);
    }
    o.aux = moe_block_sum(aux, &s->scratch);
    o.variance = moe_block_sum(variance, &s->scratch);
    return o;
}

/* Losses and gradients, one block. */
MOE_KERNEL(MOEI_BALANCE_THREADS, 1) moei_balance_loss(MOE_ARG(moe_balance_loss_desc) d)
{
    MOE_SHARED(moei_balance_shared, s);
    const int num_experts = d.num_experts;
    const float by_aux = d.aux_coefficient * (float)num_experts;
    moei_balance_sums o;
    bool some;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault)) return;
    o = moei_balance_sum(&d, &s);
    some = o.per_token != 0.0f;
    if (d.loss && threadIdx.x == 0) {
        const float aux = some && d.aux_coefficient != 0.0f ? by_aux * o.aux : 0.0f;
        const float variance = some && d.variance_coefficient != 0.0f
                                   ? d.variance_coefficient * o.mean * o.variance
                                   : 0.0f;
        const float z =
            some && d.z_coefficient != 0.0f ? d.z_coefficient * o.per_token * *d.z_sum : 0.0f;
        d.loss[0] = aux;
        d.loss[1] = variance;
        d.loss[2] = z;
        d.loss[3] = aux + variance + z;
    }
    if (!d.balance_grad) return;
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x) {
        const float usage = __fdiv_rn((float)d.expert_count[e], o.slots);
        const float grad =
            by_aux * usage + d.variance_coefficient * 2.0f * o.mean * (usage - o.mean);
        d.balance_grad[e] = some ? grad * o.per_token : 0.0f;
    }
    if (threadIdx.x == 0)
        d.balance_grad[num_experts] = some ? 2.0f * d.z_coefficient * o.per_token : 0.0f;
}

/* Updates the bias, one block. count * E against the sum of the counts: the same as count against
   their mean, without rounding. */
MOE_KERNEL(MOEI_BALANCE_THREADS, 1) moei_balance_bias(MOE_ARG(moe_balance_bias_desc) d)
{
    MOE_SHARED(moei_balance_shared, s);
    int64_t slots;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault)) return;
    slots = moei_balance_slots(d.expert_count, d.num_experts, &s);
    for (int e = (int)threadIdx.x; e < d.num_experts; e += (int)blockDim.x) {
        const int64_t own = (int64_t)d.expert_count[e] * d.num_experts;
        if (own != slots) d.expert_bias[e] += own < slots ? d.bias_step : -d.bias_step;
    }
}

/* Refuses what moe_balance_loss_desc does not allow. */
MOE_HOST moe_status moei_balance_loss_check(const moe_balance_loss_desc* d)
{
    const uint64_t num_experts = (uint64_t)d->num_experts;
    const moe_buffer b[] = {
        {d->expert_count, num_experts * 4, 4, MOE_BUFFER_REQUIRED, MOE_FIELD_expert_count},
        {d->prob_sum, num_experts * 4, 4, MOE_BUFFER_REQUIRED, MOE_FIELD_prob_sum},
        {d->z_sum, 4, 4, d->z_coefficient != 0.0f ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ,
         MOE_FIELD_z_sum},
        {d->loss, 16, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_loss},
        {d->balance_grad, num_experts * 4 + 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_balance_grad},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(moei_f32_is_finite(d->aux_coefficient), MOE_ERR_RANGE, aux_coefficient);
    MOE_REQUIRE(moei_f32_is_finite(d->variance_coefficient), MOE_ERR_RANGE, variance_coefficient);
    MOE_REQUIRE(moei_f32_is_finite(d->z_coefficient), MOE_ERR_RANGE, z_coefficient);
    MOEI_REQUIRE_RANK(d);
    return moe_check_buffers(b, (int)(sizeof b / sizeof b[0]));
}

/* Refuses what moe_balance_bias_desc does not allow; fills in the default. */
MOE_HOST moe_status moei_balance_bias_check(moe_balance_bias_desc* d)
{
    const uint64_t num_experts = (uint64_t)d->num_experts;
    const moe_buffer b[] = {
        {d->expert_count, num_experts * 4, 4, MOE_BUFFER_REQUIRED, MOE_FIELD_expert_count},
        {d->expert_bias, num_experts * 4, 4, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_expert_bias},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(moei_f32_is_finite(d->bias_step), MOE_ERR_RANGE, bias_step);
    if (d->bias_step == 0.0f) d->bias_step = 1e-3f;
    MOEI_REQUIRE_RANK(d);
    return moe_check_buffers(b, (int)(sizeof b / sizeof b[0]));
}

/* Prepared losses; a prepared update: all but the stream, for the device that was current. */
typedef struct moe_balance_loss_prepared {
    moe_balance_loss_desc args; /* with its defaults filled in */
    moe_launch launch;
} moe_balance_loss_prepared;
typedef struct moe_balance_bias_prepared {
    moe_balance_bias_desc args; /* with its defaults filled in */
    moe_launch launch;
} moe_balance_bias_prepared;

/* Returns the launch configuration of both: one block, a thread an expert where that fits. */
MOE_HOST moe_launch_config moei_balance_grid(int num_experts)
{
    const int warps = (num_experts + 31) / 32, most = MOEI_BALANCE_THREADS / 32;
    moe_launch_config c = moe_grid(1, (warps < most ? warps : most) * 32, 0, 0);
    c.dependent = 1;
    return c;
}

/* Fill in *p, which is all zeros. */
MOE_HOST moe_status moei_balance_loss_prepare(const moe_balance_loss_desc* desc,
                                              moe_balance_loss_prepared* p)
{
    moe_launch_config c;
    p->args = *desc;
    MOE_TRY(moei_balance_loss_check(&p->args));
    c = moei_balance_grid(desc->num_experts);
    return MOE_PREPARE(&p->launch, moei_balance_loss, c);
}
MOE_HOST moe_status moei_balance_bias_prepare(const moe_balance_bias_desc* desc,
                                              moe_balance_bias_prepared* p)
{
    moe_launch_config c;
    p->args = *desc;
    MOE_TRY(moei_balance_bias_check(&p->args));
    c = moei_balance_grid(desc->num_experts);
    return MOE_PREPARE(&p->launch, moei_balance_bias, c);
}

/* Prepare the losses or an update, which their run queues any number of times. Errors: every field,
   by its name. */
MOE_HOST moe_status moe_balance_loss_prepare(const moe_balance_loss_desc* desc,
                                             moe_balance_loss_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_balance_loss_prepare(desc, p));
}
MOE_HOST moe_status moe_balance_bias_prepare(const moe_balance_bias_desc* desc,
                                             moe_balance_bias_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_balance_bias_prepare(desc, p));
}

/* Queue what is prepared on `stream`. */
MOE_HOST moe_status moe_balance_loss_run(const moe_balance_loss_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    return MOE_RUN(&p->launch, p->args, stream);
}
MOE_HOST moe_status moe_balance_bias_run(const moe_balance_bias_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    return MOE_RUN(&p->launch, p->args, stream);
}

/* Prepare and run. Queue nothing where a field is refused. */
MOE_HOST moe_status moe_balance_loss(const moe_balance_loss_desc* desc, cudaStream_t stream)
{
    moe_balance_loss_prepared p;
    MOE_TRY(moe_balance_loss_prepare(desc, &p));
    return moe_balance_loss_run(&p, stream);
}
MOE_HOST moe_status moe_balance_bias(const moe_balance_bias_desc* desc, cudaStream_t stream)
{
    moe_balance_bias_prepared p;
    MOE_TRY(moe_balance_bias_prepare(desc, &p));
    return moe_balance_bias_run(&p, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_balance_loss_preload(void)
{
    MOE_TRY(moe_preload_kernel((const void*)moei_balance_loss));
    return moe_preload_kernel((const void*)moei_balance_bias);
}

MOEI_PRELOAD_INCLUDED(balance_loss)

#endif
