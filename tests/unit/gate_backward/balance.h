/* balance.h: balance losses and the update of the bias

   test_losses             against the reference in double, any E, each coefficient alone
   test_loss_limits        nothing chosen, no tokens, NaN, even usage
   test_reference_slope    the reference's gradients against finite differences of the losses
   test_bias               the bias, with counts that no float holds
   test_balance_chain      gate, losses, gradients in a captured graph; the same bits every run
   test_balance_refusals   each field of both: its status, outputs untouched */
#ifndef MOE_TESTS_GATE_BACKWARD_BALANCE_H
#define MOE_TESTS_GATE_BACKWARD_BALANCE_H

#include "tests/unit/gate_backward/case.h"

#include "moe/balance_loss.cuh"
#include "moe/ref/balance.h"

TEST_CALL(call_loss, moe_balance_loss, moe_balance_loss_desc)

/* The buffers of losses, and what the host put there. */
typedef struct loss_bufs {
    int32_t* count;
    float *prob, z;
    tbuf d_count, d_prob, d_z, loss, grad, fault;
    moe_balance_loss_desc d;
} loss_bufs;

static void loss_put(loss_bufs* b)
{
    tbuf_put(&b->d_count, b->count);
    tbuf_put(&b->d_prob, b->prob);
    tbuf_put(&b->d_z, &b->z);
}

static void loss_new(loss_bufs* b, int E, trand* r)
{
    memset(b, 0, sizeof *b);
    b->count = (int32_t*)test_host((int64_t)E * 4);
    b->prob = (float*)test_host((int64_t)E * 4);
    for (int e = 0; e < E; ++e) {
        b->count[e] = (int32_t)trand_int(r, 0, 1000);
        b->prob[e] = 60 + 20 * trand_normal(r);
    }
    b->count[0] += 1;
    b->z = 100 + 10 * trand_normal(r);
    b->d_count = tbuf_new("expert_count", (size_t)E * 4, 4);
    b->d_prob = tbuf_new("prob_sum", (size_t)E * 4, 8);
    b->d_z = tbuf_new("z_sum", 4, 12);
    b->loss = tbuf_new("loss", 16, 4);
    b->grad = tbuf_new("balance_grad", (size_t)E * 4 + 4, 4);
    b->fault = tfault_new(0);
    loss_put(b);
    b->d.expert_count = (const int32_t*)b->d_count.p;
    b->d.prob_sum = (const float*)b->d_prob.p;
    b->d.z_sum = (const float*)b->d_z.p;
    b->d.loss = (float*)b->loss.p;
    b->d.balance_grad = (float*)b->grad.p;
    b->d.fault = (uint64_t*)b->fault.p;
    b->d.num_experts = E;
    b->d.rank = TEST_RANK;
}

static void loss_free(loss_bufs* b)
{
    tbufs_free(TBUFS(&b->d_count, &b->d_prob, &b->d_z, &b->loss, &b->grad, &b->fault));
    free(b->count), free(b->prob);
}

/* Compares losses and gradients with the reference. */
static void loss_compare(const loss_bufs* b)
{
    const int E = b->d.num_experts;
    const moe_ref_balance_desc o = {E, (double)b->d.aux_coefficient,
                                    (double)b->d.variance_coefficient, (double)b->d.z_coefficient};
    double *prob = (double*)test_host((int64_t)E * 8),
           *grad = (double*)test_host((int64_t)E * 8 + 8);
    double loss[4], tokens = 0, slots = 0, step = 0, size;
    float *got = (float*)tbuf_copy(&b->loss), *got_grad = (float*)tbuf_copy(&b->grad);
    for (int e = 0; e < E; ++e) tokens += prob[e] = (double)b->prob[e];
    moe_ref_balance_loss_f64(&o, b->count, prob, (double)b->z, loss, grad);
    for (int e = 0; e < E; ++e) slots += b->count[e];
    for (int e = 0; e < E && slots > 0; ++e) /* what the rounding of f and 1 / E does to a square */
        step += fabs(o.variance_coefficient) / E * fabs(b->count[e] / slots - 1.0 / E) *
                (b->count[e] / slots + 1.0 / E) * 2.5e-7;
    for (int i = 0; i < 4; ++i)
        CHECK(fabs((double)got[i] - loss[i]) <=
                  (i % 2 ? step : 0) +
                      2e-6 *
                          (i == 3 ? fabs(loss[0]) + fabs(loss[1]) + fabs(loss[2]) : fabs(loss[i])),
              "E=%d loss %d: %.9g, not %.9g", E, i, (double)got[i], loss[i]);
    for (int e = 0; e <= E; ++e) {
        double usage = 0;
        if (e < E && slots > 0) usage = b->count[e] / slots;
        size = fabs(o.aux_coefficient) * E * usage +
               fabs(o.variance_coefficient) * 2 / E * (usage + 1.0 / E);
        CHECK(fabs((double)got_grad[e] - grad[e]) <=
                  2e-6 * (e < E ? (tokens > 0 ? size / tokens : 0) : fabs(grad[e])),
              "E=%d balance_grad %d: %.9g, not %.9g", E, e, (double)got_grad[e], grad[e]);
    }
    free(prob), free(grad), free(got), free(got_grad);
}

static void test_losses(void)
{
    static const int experts[] = {1, 2, 3, 31, 32, 33, 128, 511, 512, 513, 1500, 4096};
    trand r = trand_new(71);
    for (int i = 0; i < 12; ++i)
        for (int n = 0; n < 8; ++n) {
            loss_bufs b;
            loss_new(&b, experts[i], &r);
            b.d.aux_coefficient = n & 1 ? 0.75f : 0.0f;
            b.d.variance_coefficient = n & 2 ? 50.0f : 0.0f;
            b.d.z_coefficient = n & 4 ? 0.25f : 0.0f;
            if (!(n & 4)) b.d.z_sum = 0;
            CHECK_STATUS(moe_balance_loss(&b.d, test_now.stream), MOE_OK);
            loss_compare(&b);
            if (n == 7) { /* each output alone */
                void *loss = tbuf_copy(&b.loss), *grad = tbuf_copy(&b.grad);
                tbufs_poison(TBUFS(&b.loss, &b.grad));
                b.d.balance_grad = 0;
                CHECK_STATUS(moe_balance_loss(&b.d, test_now.stream), MOE_OK);
                CHECK(tbuf_holds(&b.loss, loss) && tbuf_holds(&b.grad, 0), "loss alone");
                tbufs_poison(TBUFS(&b.loss, &b.grad));
                b.d.balance_grad = (float*)b.grad.p, b.d.loss = 0;
                CHECK_STATUS(moe_balance_loss(&b.d, test_now.stream), MOE_OK);
                CHECK(tbuf_holds(&b.loss, 0) && tbuf_holds(&b.grad, grad), "balance_grad alone");
                free(loss), free(grad);
            }
            loss_free(&b);
        }
}

static void test_loss_limits(void)
{
    enum { E = 40 };
    trand r = trand_new(72);
    for (int n = 0; n < 6; ++n) {
        loss_bufs b;
        float got[4], grad[E + 1], zeros[E + 1];
        memset(zeros, 0, sizeof zeros);
        loss_new(&b, E, &r);
        b.d.aux_coefficient = 2.0f, b.d.variance_coefficient = 3.0f, b.d.z_coefficient = 0.5f;
        for (int e = 0; e < E; ++e) {
            if (n == 0 || n == 2) b.count[e] = 0;
            if (n == 1 || n == 2) b.prob[e] = 0;
            if (n == 3) b.count[e] = 1 << 30, b.prob[e] = 1; /* even; a sum of 2^35 */
        }
        if (n == 4) b.prob[7] = NAN;
        if (n == 5) b.z = NAN;
        loss_put(&b);
        CHECK_STATUS(moe_balance_loss(&b.d, test_now.stream), MOE_OK);
        tbuf_get(&b.loss, got);
        tbuf_get(&b.grad, grad);
        if (n < 3)
            CHECK(tbuf_holds(&b.loss, zeros) && tbuf_holds(&b.grad, zeros), "case %d: not zeros",
                  n);
        if (n == 3) {
            CHECK(fabsf(got[0] - 2) < 1e-5f && fabsf(got[1]) < 1e-12f, "even: %g, %g",
                  (double)got[0], (double)got[1]);
            loss_compare(&b);
        }
        if (n == 4)
            CHECK(got[0] != got[0] && grad[3] != grad[3], "a NaN in prob_sum does not show");
        if (n == 5)
            CHECK(got[2] != got[2] && got[3] != got[3] && got[0] == got[0] && grad[3] == grad[3],
                  "a NaN in z_sum shows in the z-loss alone");
        loss_free(&b);
    }
}

/* Differences by the probabilities of one token: N stays. The variance is that of P, at P = f. */
static void test_reference_slope(void)
{
    enum { E = 6 };
    trand r = trand_new(73);
    for (int kind = 0; kind < 2; ++kind) {
        const moe_ref_balance_desc o = {E, kind == 0 ? 1.25 : 0, kind == 1 ? 30.0 : 0, 0};
        int32_t count[E];
        double prob[E], grad[E + 1], tokens = 90, slots = 0, h = 1e-4;
        for (int e = 0; e < E; ++e) slots += count[e] = (int32_t)trand_int(&r, 1, 50);
        for (int e = 0; e < E; ++e) prob[e] = tokens * count[e] / slots;
        moe_ref_balance_loss_f64(&o, count, prob, 0, 0, grad);
        for (int e = 0; e < E; ++e) {
            double loss[2] = {0, 0};
            for (int side = 0; side < 2; ++side)
                for (int i = 0; i < E; ++i) {
                    const double P = (prob[i] + (i == e ? (side ? h : -h) : 0)) / tokens;
                    const double f = count[i] / slots;
                    loss[side] += kind == 0
                                      ? o.aux_coefficient * E * f * P
                                      : o.variance_coefficient / E * (P - 1.0 / E) * (P - 1.0 / E);
                }
            CHECK(fabs((loss[1] - loss[0]) / (2 * h) - grad[e]) < 1e-9 + 1e-7 * fabs(grad[e]),
                  "loss %d expert %d: %.9g, not %.9g", kind, e, grad[e],
                  (loss[1] - loss[0]) / (2 * h));
        }
    }
}

static void test_bias(void)
{
    static const int experts[] = {1, 2, 7, 64, 700, 4096};
    trand r = trand_new(74);
    for (int i = 0; i < 6; ++i)
        for (int n = 0; n < 3; ++n) {
            const int E = experts[i];
            int32_t* count = (int32_t*)test_host((int64_t)E * 4);
            float* bias = (float*)test_host((int64_t)E * 4);
            moe_balance_bias_desc d;
            tbuf d_count, d_bias, fault = tfault_new(0);
            for (int e = 0; e < E; ++e) {
                count[e] = n == 0 ? (int32_t)trand_int(&r, 0, 9) : n == 1 ? 5 : 2147483000;
                bias[e] = trand_normal(&r);
            }
            if (n == 2) count[E / 2] += 1; /* above a mean that no float tells from it */
            d_count = tbuf_from("expert_count", count, (size_t)E * 4, 4);
            d_bias = tbuf_from("expert_bias", bias, (size_t)E * 4, 4);
            memset(&d, 0, sizeof d);
            d.expert_count = (const int32_t*)d_count.p;
            d.expert_bias = (float*)d_bias.p;
            d.fault = (uint64_t*)fault.p;
            d.num_experts = E;
            d.bias_step = n == 2 ? 0.25f : 0.0f;
            CHECK_STATUS(moe_balance_bias(&d, test_now.stream), MOE_OK);
            moe_ref_balance_bias(E, count, n == 2 ? 0.25f : 1e-3f, bias);
            CHECK(tbuf_holds(&d_bias, bias), "E=%d, counts %d", E, n);
            tbufs_free(TBUFS(&d_count, &d_bias, &fault));
            free(count), free(bias);
        }
}

/* Gate, losses and gradients, one after the other. */
typedef struct balance_chain {
    moe_gate_desc gate;
    moe_balance_loss_desc loss;
    moe_gate_backward_desc backward;
} balance_chain;

static moe_status call_balance_chain(void* context, cudaStream_t stream)
{
    const balance_chain* c = (const balance_chain*)context;
    MOE_TRY(moe_gate(&c->gate, stream));
    MOE_TRY(moe_balance_loss(&c->loss, stream));
    return moe_gate_backward(&c->backward, stream);
}

static void test_balance_chain(void)
{
    trand r = trand_new(75);
    back_case c = back_plain(60, 20, 3);
    balance_chain chain;
    back_bufs b;
    loss_bufs l;
    tgraph g;
    c.gate.prob = c.gate.z = c.balance = c.by_z = 1;
    c.gate.token_disabled = 1;
    back_new(&b, &c, &r);
    loss_new(&l, c.gate.E, &r);
    l.d.expert_count = b.gate.device.expert_count;
    l.d.prob_sum = b.gate.device.prob_sum;
    l.d.z_sum = b.gate.device.z_sum;
    l.d.balance_grad = (float*)b.d_losses.p;
    l.d.aux_coefficient = 0.5f, l.d.variance_coefficient = 4.0f, l.d.z_coefficient = 0.1f;
    chain.gate = b.gate.device, chain.loss = l.d, chain.backward = b.d;
    test_same_bits("chain", call_balance_chain, &chain, TBUFS(&b.dlogits, &l.loss, &b.d_losses),
                   MOE_ON_HOST ? 3 : 100);
    if (tgraph_capture(&g, call_balance_chain, &chain)) {
        for (int n = 0; n < 3; ++n) {
            double tokens = 0;
            float* sums;
            fill(&b.gate, &c.gate, &r);
            put(&b.gate);
            for (int s = 0; s < c.gate.T * c.gate.K; ++s) b.dweights[s] = trand_normal(&r);
            tbuf_put(&b.d_dweights, b.dweights);
            tbufs_poison(TBUFS(&b.dlogits, &l.loss, &b.d_losses));
            tgraph_launch(&g);
            tbuf_get(&b.d_losses, b.losses);
            tbuf_get(&b.gate.count, l.count);
            tbuf_get(&b.gate.z, &l.z);
            sums = (float*)tbuf_copy(&b.gate.prob);
            memcpy(l.prob, sums, (size_t)c.gate.E * 4);
            tbuf_put(&l.grad, b.losses);
            loss_compare(&l);
            back_compare(&b, &c, 0, 0);
            for (int e = 0; e < c.gate.E; ++e) tokens += (double)sums[e];
            for (int t = 0; t < c.gate.T; ++t) tokens -= b.gate.token_disabled[t] == 0;
            CHECK(fabs(tokens) < 1e-3, "the probabilities of a token sum to 1: %g are left",
                  tokens);
            free(sums);
        }
        tgraph_free(&g);
    }
    loss_free(&l);
    back_free(&b);
}

TEST_REFUSED(refused_loss, moe_balance_loss, moe_balance_loss_prepare, moe_balance_loss)
TEST_REFUSED(refused_bias, moe_balance_bias, moe_balance_bias_prepare, moe_balance_bias)

static void test_balance_refusals(void)
{
    enum { E = 24 };
    const uint64_t stop = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 4);
    trand r = trand_new(76);
    loss_bufs b;
    tbuf bias;
    loss_new(&b, E, &r);
    b.d.aux_coefficient = b.d.variance_coefficient = b.d.z_coefficient = 0.5f;
    bias = tbuf_new("expert_bias", E * 4, 4);
    {
        moe_balance_loss_desc good = b.d, d;
#define LOSS_REFUSED(change, kind, field) REFUSED_BY(refused_loss, change, #change, kind, field)
        LOSS_REFUSED(d.num_experts = 0, MOE_ERR_RANGE, num_experts);
        LOSS_REFUSED(d.num_experts = MOE_MAX_EXPERTS + 1, MOE_ERR_RANGE, num_experts);
        LOSS_REFUSED(d.aux_coefficient = NAN, MOE_ERR_RANGE, aux_coefficient);
        LOSS_REFUSED(d.aux_coefficient = INFINITY, MOE_ERR_RANGE, aux_coefficient);
        LOSS_REFUSED(d.variance_coefficient = -INFINITY, MOE_ERR_RANGE, variance_coefficient);
        LOSS_REFUSED(d.z_coefficient = NAN, MOE_ERR_RANGE, z_coefficient);
        LOSS_REFUSED(d.rank = -1, MOE_ERR_RANGE, rank);
        LOSS_REFUSED(d.rank = MOE_FAULT_MAX_RANK + 1, MOE_ERR_RANGE, rank);
        LOSS_REFUSED(d.expert_count = 0, MOE_ERR_NULL, expert_count);
        LOSS_REFUSED(d.prob_sum = 0, MOE_ERR_NULL, prob_sum);
        LOSS_REFUSED(d.z_sum = 0, MOE_ERR_NULL, z_sum);
        LOSS_REFUSED(d.expert_count = (const int32_t*)AT(d.expert_count, 2), MOE_ERR_ALIGN,
                     expert_count);
        LOSS_REFUSED(d.prob_sum = (const float*)AT(d.prob_sum, 2), MOE_ERR_ALIGN, prob_sum);
        LOSS_REFUSED(d.z_sum = (const float*)AT(d.z_sum, 2), MOE_ERR_ALIGN, z_sum);
        LOSS_REFUSED(d.loss = (float*)AT(d.loss, 2), MOE_ERR_ALIGN, loss);
        LOSS_REFUSED(d.balance_grad = (float*)AT(d.balance_grad, 2), MOE_ERR_ALIGN, balance_grad);
        LOSS_REFUSED(d.fault = (uint64_t*)AT(d.fault, 4), MOE_ERR_ALIGN, fault);
        LOSS_REFUSED(d.loss = (float*)d.z_sum, MOE_ERR_OVERLAP, loss);
        LOSS_REFUSED(d.loss = d.balance_grad + E, MOE_ERR_OVERLAP, balance_grad);
        LOSS_REFUSED(d.balance_grad = (float*)d.prob_sum, MOE_ERR_OVERLAP, balance_grad);
        LOSS_REFUSED(d.balance_grad = (float*)d.expert_count, MOE_ERR_OVERLAP, balance_grad);
    }
    {
        moe_balance_bias_desc good, d;
        memset(&good, 0, sizeof good);
        good.expert_count = b.d.expert_count, good.expert_bias = (float*)bias.p;
        good.fault = b.d.fault, good.num_experts = E, good.rank = TEST_RANK;
#define BIAS_REFUSED(change, kind, field) REFUSED_BY(refused_bias, change, #change, kind, field)
        BIAS_REFUSED(d.num_experts = 0, MOE_ERR_RANGE, num_experts);
        BIAS_REFUSED(d.num_experts = MOE_MAX_EXPERTS + 1, MOE_ERR_RANGE, num_experts);
        BIAS_REFUSED(d.bias_step = NAN, MOE_ERR_RANGE, bias_step);
        BIAS_REFUSED(d.bias_step = INFINITY, MOE_ERR_RANGE, bias_step);
        BIAS_REFUSED(d.rank = -1, MOE_ERR_RANGE, rank);
        BIAS_REFUSED(d.expert_count = 0, MOE_ERR_NULL, expert_count);
        BIAS_REFUSED(d.expert_bias = 0, MOE_ERR_NULL, expert_bias);
        BIAS_REFUSED(d.expert_count = (const int32_t*)AT(d.expert_count, 2), MOE_ERR_ALIGN,
                     expert_count);
        BIAS_REFUSED(d.expert_bias = (float*)AT(d.expert_bias, 2), MOE_ERR_ALIGN, expert_bias);
        BIAS_REFUSED(d.fault = (uint64_t*)AT(d.fault, 4), MOE_ERR_ALIGN, fault);
        BIAS_REFUSED(d.expert_bias = (float*)d.expert_count, MOE_ERR_OVERLAP, expert_bias);
        tbuf_put(&b.fault, &stop); /* nothing runs on after a stop fault */
        CHECK_STATUS(moe_balance_bias(&good, test_now.stream), MOE_OK);
        CHECK_STATUS(moe_balance_loss(&b.d, test_now.stream), MOE_OK);
    }
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.loss, 0) && tbuf_holds(&b.grad, 0) && tbuf_holds(&bias, 0),
          "a refused or stopped call wrote something");
    tbuf_free(&bias);
    loss_free(&b);
}

static void gate_backward_balance(void)
{
    RUN(test_losses);
    RUN(test_loss_limits);
    RUN(test_reference_slope);
    RUN(test_bias);
    RUN(test_balance_chain);
    RUN(test_balance_refusals);
}

#endif
