/* balance.h: the reference of moe/balance_loss.cuh, in double. C11 and C++14; no CUDA.

   Written as in the papers: f the share of the slots of each expert, P the mean probability. */
#ifndef MOE_REF_BALANCE_H
#define MOE_REF_BALANCE_H

#include <stdint.h>

#include "../base/config.h"

/* Sizes and coefficients of the balance losses. */
typedef struct moe_ref_balance_desc {
    int32_t num_experts;         /* E */
    double aux_coefficient;      /* factor on the auxiliary loss */
    double variance_coefficient; /* factor on the variance of usage */
    double z_coefficient;        /* factor on the z-loss */
} moe_ref_balance_desc;

/* Writes loss [4]: auxiliary, variance, z, their sum; and grad [E + 1]: the gradients by any
   token's probability of each expert, and the factor of the z-loss. Each may be null. Reads
   expert_count and prob_sum [E]; z_sum is the sum of lse^2. */
MOE_HOST void moe_ref_balance_loss_f64(const moe_ref_balance_desc* d, const int32_t* expert_count,
                                       const double* prob_sum, double z_sum, double* loss,
                                       double* grad)
{
    const int num_experts = d->num_experts;
    double tokens = 0, slots = 0, aux = 0, variance = 0;
    int none;
    for (int e = 0; e < num_experts; ++e) {
        tokens += prob_sum[e];
        slots += expert_count[e];
    }
    none = tokens == 0 || slots == 0;
    for (int e = 0; e < num_experts; ++e) {
        const double f = none ? 0 : expert_count[e] / slots,
                     mean_prob = none ? 0 : prob_sum[e] / tokens;
        const double mean = 1.0 / num_experts;
        aux += f * mean_prob;
        variance += (f - mean) * (f - mean);
        if (grad)
            grad[e] = none ? 0
                           : (d->aux_coefficient * num_experts * f +
                              d->variance_coefficient * 2 / num_experts * (f - mean)) /
                                 tokens;
    }
    if (grad) grad[num_experts] = none ? 0 : 2 * d->z_coefficient / tokens;
    if (!loss) return;
    loss[0] = none ? 0 : d->aux_coefficient * num_experts * aux;
    loss[1] = none ? 0 : d->variance_coefficient / num_experts * variance;
    loss[2] = none || d->z_coefficient == 0 ? 0 : d->z_coefficient / tokens * z_sum;
    loss[3] = loss[0] + loss[1] + loss[2];
}

/* Adds `step` to the bias of each expert that has fewer slots than the mean; subtracts it of each
   that has more. The bias and the sums are fp32, as the gate's bias is. */
MOE_HOST void moe_ref_balance_bias(int32_t num_experts, const int32_t* expert_count, float step,
                                   float* expert_bias)
{
    int64_t slots = 0;
    for (int e = 0; e < num_experts; ++e) slots += expert_count[e];
    for (int e = 0; e < num_experts; ++e) {
        const int64_t own = (int64_t)expert_count[e] * num_experts;
        if (own < slots) expert_bias[e] = expert_bias[e] + step;
        if (own > slots) expert_bias[e] = expert_bias[e] - step;
    }
}

#endif
