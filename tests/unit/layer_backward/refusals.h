/* refusals.h: bad descriptors of the layer's training: each field has its own status, and nothing is
   written.

     test_backward_refusals  of backward
     test_forward_refusals   of forward's fields for training */
#ifndef MOE_TESTS_LAYER_BACKWARD_REFUSALS_H
#define MOE_TESTS_LAYER_BACKWARD_REFUSALS_H

#include "tests/unit/layer_backward/case.h"

TEST_REFUSED(backward_refused, moe_layer_backward, moe_layer_backward_prepare, moe_layer_backward)
TEST_REFUSED(forward_refused, moe_layer_forward, moe_layer_prepare, moe_layer)

static void test_backward_refusals(void)
{
    trand r = trand_new(51);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
#define refused backward_refused
        grads_case c = grads_of(normal_case(20, 64, 40, 4, 2));
        grads_bufs b;
        moe_layer_backward_desc good, d;
        void* saved;
        c.f.from = from, c.f.shared = 24, c.f.shared_weighted = 1, c.balance = from != FROM_IDS;
        bufs_begin(&b, &c, &r);
        CHECK_STATUS(moe_layer_forward(&b.f.d, test_now.stream), MOE_OK);
        saved = tbuf_copy(&b.saved);
        good = b.d;
        REFUSED(d.layer.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
        REFUSED(d.layer.hidden = 60, MOE_ERR_MULTIPLE, hidden);
        REFUSED(d.layer.intermediate = 0, MOE_ERR_RANGE, intermediate);
        REFUSED(d.layer.num_experts = 0, MOE_ERR_RANGE, num_experts);
        REFUSED(d.layer.top_k = 0, MOE_ERR_RANGE, top_k);
        REFUSED_EACH(layer.dtype, MOE_ERR_DTYPE, dtype, MOE_FP32, 4, -1);
        REFUSED_EACH(layer.recompute, MOE_ERR_OPTION, recompute, 2, -1);
        REFUSED_EACH(grad_dtype, MOE_ERR_DTYPE, grad_dtype, 4, -1,
                     test_half() == MOE_FP16 ? MOE_BF16 : MOE_FP16);
        REFUSED_EACH(router_grad_dtype, MOE_ERR_DTYPE, router_grad_dtype, 4, -1);
        REFUSED_EACH(accumulate, MOE_ERR_OPTION, accumulate, 2, -1);
        REFUSED_EACH(dx_accumulate, MOE_ERR_OPTION, dx_accumulate, 2, -1);
        REFUSED_EACH(empty_experts, MOE_ERR_OPTION, empty_experts, 2, -1);
        REFUSED_EACH(gather, MOE_ERR_OPTION, gather, 3, -1);
        REFUSED_EACH(dy_stride, MOE_ERR_STRIDE, dy_stride, 56, -64);
        REFUSED(d.dy_stride = 68, MOE_ERR_ALIGN, dy_stride);
        REFUSED_EACH(dx_stride, MOE_ERR_STRIDE, dx_stride, 56, -64);
        REFUSED(d.dx_stride = 68, MOE_ERR_ALIGN, dx_stride);
        if (from != FROM_ROUTER) REFUSED(d.drouter = b.drouter.p, MOE_ERR_CONFLICT, drouter);
        if (from == FROM_IDS) {
            REFUSED(d.dlogits = (float*)b.dlogits.p, MOE_ERR_CONFLICT, dlogits);
            REFUSED(d.balance_grad = (float*)b.balance.p, MOE_ERR_CONFLICT, balance_grad);
        } else {
            REFUSED(d.dlogits = (float*)AT(d.dlogits, 2), MOE_ERR_ALIGN, dlogits);
            REFUSED(d.balance_grad = (float*)AT(d.balance_grad, 2), MOE_ERR_ALIGN, balance_grad);
            if (from == FROM_LOGITS)
                REFUSED((d.dlogits = 0, d.balance_grad = (float*)b.balance.p), MOE_ERR_CONFLICT,
                        balance_grad);
        }
        REFUSED(d.layer.x = 0, MOE_ERR_NULL, x);
        REFUSED(d.dy = 0, MOE_ERR_NULL, dy);
        REFUSED(d.layer.saved = 0, MOE_ERR_NULL, saved);
        REFUSED(d.layer.workspace = 0, MOE_ERR_NULL, workspace);
        REFUSED(d.layer.w2.base = 0, MOE_ERR_NULL, w2);
        REFUSED(d.layer.w1.base = 0, MOE_ERR_NULL, w1);
        REFUSED(d.layer.shared.w2.base = 0, MOE_ERR_NULL, shared);
        REFUSED(d.dy = AT(d.dy, 8), MOE_ERR_ALIGN, dy);
        REFUSED(d.dx = AT(d.dx, 8), MOE_ERR_ALIGN, dx);
        REFUSED(d.layer.saved = AT(d.layer.saved, 16), MOE_ERR_ALIGN, saved);
        REFUSED(d.layer.workspace = AT(d.layer.workspace, 16), MOE_ERR_ALIGN, workspace);
        REFUSED(d.dweights = (float*)AT(d.dweights, 2), MOE_ERR_ALIGN, dweights);
        REFUSED(d.dw1.base = AT(d.dw1.base, 8), MOE_ERR_ALIGN, dw1);
        REFUSED(d.dw2.base = AT(d.dw2.base, 8), MOE_ERR_ALIGN, dw2);
        REFUSED(d.dbias1 = AT(d.dbias1, 2), MOE_ERR_ALIGN, dbias1);
        REFUSED(d.dbias2 = AT(d.dbias2, 2), MOE_ERR_ALIGN, dbias2);
        REFUSED(d.shared.dw1.base = AT(d.shared.dw1.base, 8), MOE_ERR_ALIGN, shared);
        REFUSED(d.shared.dw2.row_stride = 8, MOE_ERR_STRIDE, shared);
        REFUSED(d.shared.dweight = (float*)AT(d.shared.dweight, 2), MOE_ERR_ALIGN, shared);
        REFUSED(d.dw1.row_stride = 8, MOE_ERR_STRIDE, dw1);
        REFUSED(d.dw2.row_stride = 8, MOE_ERR_STRIDE, dw2);
        REFUSED(d.dw1.up = b.dw1_up.p, MOE_ERR_CONFLICT, dw1);
        REFUSED((d.dx = (void*)d.dy, d.dx_stride = 72, d.dy_stride = 64), MOE_ERR_OVERLAP, dx);
        REFUSED(d.dx = (void*)d.layer.x, MOE_ERR_OVERLAP, dx);
        REFUSED(d.dw2.base = d.dw1.base, MOE_ERR_OVERLAP, dw2);
        /* outputs over what a later stage, or the next step, reads */
        REFUSED(d.dx = (void*)d.layer.w1.base, MOE_ERR_OVERLAP, dx);
        REFUSED(d.dx = (void*)d.layer.w2.base, MOE_ERR_OVERLAP, dx);
        REFUSED(d.dw1.base = (void*)d.layer.w1.base, MOE_ERR_OVERLAP, dw1);
        REFUSED(d.dw1.base = (void*)d.layer.shared.w2.base, MOE_ERR_OVERLAP, dw1);
        REFUSED(d.dw2.base = (void*)d.layer.w2.base, MOE_ERR_OVERLAP, dw2);
        REFUSED(d.shared.dw1.base = (void*)d.layer.w1.base, MOE_ERR_OVERLAP, shared);
        REFUSED(d.shared.dw2.base = (void*)d.layer.shared.w2.base, MOE_ERR_OVERLAP, shared);
        REFUSED(d.dweights = (float*)d.layer.shared.weight, MOE_ERR_OVERLAP, dweights);
        if (from == FROM_ROUTER) {
            REFUSED(d.dweights = (float*)DOWN_TO(d.layer.router, 4), MOE_ERR_OVERLAP, dweights);
            REFUSED(d.dw1.base = DOWN_TO(d.layer.router, 16), MOE_ERR_OVERLAP, dw1);
            REFUSED(d.dlogits = (float*)d.layer.w1.base, MOE_ERR_OVERLAP, dlogits);
            REFUSED(d.drouter = (void*)d.layer.w1.base, MOE_ERR_OVERLAP, drouter);
        } else if (from == FROM_IDS) {
            REFUSED(d.dweights = (float*)d.layer.weights, MOE_ERR_OVERLAP, dweights);
        } else {
            REFUSED(d.dlogits = (float*)d.layer.logits, MOE_ERR_OVERLAP, dlogits);
        }
        REFUSED(d.dw1.base = d.layer.saved, MOE_ERR_OVERLAP, dw1);
        REFUSED(d.layer.workspace = d.layer.saved, MOE_ERR_OVERLAP, workspace);
        REFUSED(--d.layer.saved_bytes, MOE_ERR_WORKSPACE, saved_bytes);
        REFUSED(d.layer.workspace_bytes = 4096, MOE_ERR_WORKSPACE, workspace_bytes);
        REFUSED(d.layer.tile = 99, MOE_ERR_OPTION, tile);
        REFUSED_EACH(layer.rank, MOE_ERR_RANGE, rank, -1, MOE_FAULT_MAX_RANK + 1);
        REFUSED(d.layer.fault = (uint64_t*)AT(d.layer.fault, 4), MOE_ERR_ALIGN, fault);
        CHECK_STATUS(moe_layer_backward(0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_backward_prepare(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_backward_run(0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_backward_workspace(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_backward_get_view(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK(tbufs_untouched(GRADS(&b)) && tbufs_untouched(SHARED_GRADS(&b)) &&
                  tbuf_holds(&b.dx, 0) && tbuf_holds(&b.saved, saved),
              "outputs of refused calls");
        free(saved);
        bufs_end(&b);
#undef refused
    }
    { /* without a shared expert its gradients are refused */
        grads_case c = grads_of(normal_case(20, 64, 40, 4, 2));
        grads_bufs b;
        bufs_begin(&b, &c, &r);
        b.d.shared.dw2.base = b.s_dw2.p;
        CHECK_STATUS(moe_layer_backward(&b.d, test_now.stream),
                     MOE_STATUS(MOE_ERR_CONFLICT, shared));
        bufs_end(&b);
    }
}

static void test_forward_refusals(void)
{
#define refused forward_refused
    trand r = trand_new(52);
    grads_case c = grads_of(normal_case(20, 64, 40, 4, 2));
    grads_bufs b;
    moe_layer_desc good, d;
    bufs_begin(&b, &c, &r);
    good = b.f.d;
    REFUSED_EACH(recompute, MOE_ERR_OPTION, recompute, 2, -1);
    REFUSED(d.saved = AT(d.saved, 16), MOE_ERR_ALIGN, saved);
    REFUSED(--d.saved_bytes, MOE_ERR_WORKSPACE, saved_bytes);
    REFUSED(d.saved = d.workspace, MOE_ERR_OVERLAP, saved);
    REFUSED(d.y = (void*)d.x, MOE_ERR_OVERLAP, y); /* backward reads x */
    CHECK(tbuf_holds(&b.f.y, 0) && tbuf_holds(&b.saved, 0), "outputs of refused calls");
    bufs_end(&b);
#undef refused
}

static void layer_backward_refusals(void)
{
    RUN(test_backward_refusals);
    RUN(test_forward_refusals);
}

#endif
