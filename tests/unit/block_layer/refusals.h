/* refusals.h: descriptors that the block layer refuses.

     test_refusals         each wrong field is refused with its own kind and field by the calls
                           that look at it; nothing is written
     test_strided_overlap  overlaps with the last row of x, y, dy, dx and with the last matrix */
#ifndef MOE_TESTS_BLOCK_LAYER_REFUSALS_H
#define MOE_TESTS_BLOCK_LAYER_REFUSALS_H

#include "tests/test_refusals.h"
#include "tests/unit/block_layer/case.h"

static layer_bufs* refused_bufs; /* nothing may write its outputs and scratch */

enum { FORWARD = 1, BACKWARD = 2, SIZES = 4 };

TEST_REFUSED(forward_call_refuses, moe_block_layer_forward, moe_block_layer_prepare_forward,
             moe_block_layer)
TEST_REFUSED(backward_call_refuses, moe_block_layer_backward, moe_block_layer_prepare_backward,
             moe_block_layer)

/* Checks that those calls refuse the descriptor with this status, and write nothing. */
static void refused_by(const moe_block_layer_desc* d, moe_status want, const trefusal* at,
                       int calls)
{
    layer_bufs* b = refused_bufs;
    moe_block_layer_bytes bytes;
    if (calls & FORWARD) forward_call_refuses(d, want, at);
    if (calls & BACKWARD) backward_call_refuses(d, want, at);
    if (calls & SIZES) CHECK_STATUS_AT(at, moe_block_layer_sizes(d, &bytes), want);
    CHECK(tbufs_untouched(layer_outputs(b)) && tbuf_holds(&b->saved, 0) &&
              tbuf_holds(&b->workspace, 0),
          "line %d: written", at->line);
}

/* Defines a function that REFUSED_BY calls. */
#define REFUSED_CALLS(name, calls)                                                                 \
    static void name(const moe_block_layer_desc* d, moe_status want, const trefusal* at)           \
    {                                                                                              \
        refused_by(d, want, at, calls);                                                            \
    }
REFUSED_CALLS(refused, FORWARD | BACKWARD | SIZES)
REFUSED_CALLS(forward_refuses, FORWARD)
REFUSED_CALLS(backward_refuses, BACKWARD)
REFUSED_CALLS(both_refuse, FORWARD | BACKWARD)

/* REFUSED, by forward, by backward, by both of them. */
#define REFUSED_FORWARD(change, kind, field)                                                       \
    REFUSED_BY(forward_refuses, change, #change, kind, field)
#define REFUSED_BACKWARD(change, kind, field)                                                      \
    REFUSED_BY(backward_refuses, change, #change, kind, field)
#define REFUSED_BOTH(change, kind, field) REFUSED_BY(both_refuse, change, #change, kind, field)

static void test_refusals(void)
{
    trand r = trand_new(19);
    layer_case c = normal_case(SPARSE, 37, 24, 32, 5, 2);
    layer_bufs b;
    moe_block_layer_desc d, good;
    moe_block_layer_bytes bytes;
    c.own_act_grad = 1;
    bufs_new(&b, &c, &r);
    refused_bufs = &b;
    good = b.d;
    CHECK_STATUS(moe_block_layer_forward(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_layer_backward(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_layer_sizes(0, &bytes), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_layer_sizes(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_block_layer_sizes(&good, &bytes), MOE_OK);

    REFUSED_EACH(form, MOE_ERR_OPTION, form, 0, 4);
    REFUSED_EACH(num_tokens, MOE_ERR_RANGE, num_tokens, -1, INT32_MAX);
    REFUSED(d.num_tokens = INT32_MAX / 2 - 100, MOE_ERR_RANGE, num_tokens);
    REFUSED(d.hidden = 0, MOE_ERR_RANGE, hidden);
    REFUSED(d.hidden = 20, MOE_ERR_MULTIPLE, hidden);
    REFUSED(d.hidden = INT32_MAX - 7, MOE_ERR_RANGE, hidden);
    REFUSED(d.intermediate = 0, MOE_ERR_RANGE, intermediate);
    REFUSED(d.intermediate = 24, MOE_ERR_MULTIPLE, intermediate);
    REFUSED(d.intermediate = INT32_MAX - 15, MOE_ERR_RANGE, intermediate);
    REFUSED(d.intermediate = 1 << 28, MOE_ERR_RANGE, intermediate); /* columns of all experts */
    REFUSED_NUM_EXPERTS();
    REFUSED_EACH(top_k, MOE_ERR_RANGE, top_k, 0, MOE_COMBINE_MAX_TOP_K + 1);
    REFUSED_EACH(max_experts, MOE_ERR_RANGE, max_experts, -1, 6);
    REFUSED_EACH(block, MOE_ERR_OPTION, block, 8, 48);
    REFUSED_EACH(dtype, MOE_ERR_DTYPE, dtype, MOE_FP32, 9);
    REFUSED(d.dtype = MOE_FP16; d.grad_dtype = MOE_BF16, MOE_ERR_DTYPE, grad_dtype);
    REFUSED(d.grad_dtype = 9, MOE_ERR_DTYPE, grad_dtype);
    REFUSED_EACH(activation, MOE_ERR_OPTION, activation, -1, MOE_ACTIVATION_RELU2 + 1);
    REFUSED(d.alpha = 1, MOE_ERR_CONFLICT, alpha);
    REFUSED(d.limit = 1, MOE_ERR_CONFLICT, limit);
    REFUSED(d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED; d.alpha = INFINITY, MOE_ERR_RANGE, alpha);
    REFUSED(d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED; d.limit = -1, MOE_ERR_RANGE, limit);
    REFUSED(d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED; d.limit = NAN, MOE_ERR_RANGE, limit);
    REFUSED(d.x_stride = 16, MOE_ERR_STRIDE, x_stride);
    REFUSED(d.y_stride = 16, MOE_ERR_STRIDE, y_stride);
    REFUSED(d.dy_stride = 16, MOE_ERR_STRIDE, dy_stride);
    REFUSED(d.dx_stride = 16, MOE_ERR_STRIDE, dx_stride);
    REFUSED(d.x_stride = 28, MOE_ERR_ALIGN, x_stride);
    REFUSED(d.y_stride = 28, MOE_ERR_ALIGN, y_stride);
    REFUSED(d.dy_stride = 28, MOE_ERR_ALIGN, dy_stride);
    REFUSED(d.dx_stride = 28, MOE_ERR_ALIGN, dx_stride);
    REFUSED(d.w1.row_stride = 16, MOE_ERR_STRIDE, w1);
    REFUSED(d.w2.row_stride = 16, MOE_ERR_STRIDE, w2);
    REFUSED(d.w1.row_stride = 28, MOE_ERR_ALIGN, w1);
    REFUSED(d.w2.expert_stride = 12, MOE_ERR_ALIGN, w2);
    REFUSED(d.w1.expert_stride = -8, MOE_ERR_STRIDE, w1);
    REFUSED(d.w1.major = MOE_MAJOR_MN, MOE_ERR_OPTION, w1);
    REFUSED(d.w2.major = 7, MOE_ERR_OPTION, w2);
    REFUSED(d.w1.up = d.x, MOE_ERR_CONFLICT, w1);
    REFUSED(d.w2.up = d.x, MOE_ERR_CONFLICT, w2);
    REFUSED(d.w1.table = (const void* const*)d.x, MOE_ERR_CONFLICT, w1);
    REFUSED(d.w2.table = (const void* const*)d.x, MOE_ERR_CONFLICT, w2);
    REFUSED(d.form = MOE_BLOCK_LAYER_DENSE; d.ids = 0, MOE_ERR_CONFLICT, top_k);
    REFUSED(d.form = MOE_BLOCK_LAYER_DENSE; d.top_k = 0, MOE_ERR_CONFLICT, ids);
    REFUSED_BOTH(d.choice.tile = 99, MOE_ERR_OPTION, choice);

    REFUSED_BOTH(d.x = 0, MOE_ERR_NULL, x);
    REFUSED_BOTH(d.ids = 0, MOE_ERR_NULL, ids);
    REFUSED_BOTH(d.weights = 0, MOE_ERR_NULL, weights);
    REFUSED_BOTH(d.w1.base = 0, MOE_ERR_NULL, w1);
    REFUSED_BOTH(d.w2.base = 0, MOE_ERR_NULL, w2);
    REFUSED_FORWARD(d.y = 0, MOE_ERR_NULL, y);
    REFUSED_BACKWARD(d.dy = 0, MOE_ERR_NULL, dy);
    REFUSED_BACKWARD(d.dy = 0; d.dx = 0, MOE_ERR_NULL, dy);
    REFUSED_BACKWARD(d.grad_expert = 0, MOE_ERR_NULL, grad_expert);
    REFUSED_BACKWARD(d.dw1 = d.dw2 = 0, MOE_ERR_CONFLICT, grad_expert);
    REFUSED_BOTH(d.saved = 0, MOE_ERR_NULL, saved);
    REFUSED_BOTH(d.workspace = 0, MOE_ERR_NULL, workspace);
    REFUSED_BOTH(d.saved = 0; d.saved_bytes = 0, MOE_ERR_NULL, saved);
    REFUSED_BOTH(d.workspace = 0; d.workspace_bytes = 0, MOE_ERR_NULL, workspace);
    REFUSED_BOTH(d.saved_bytes = bytes.saved - 1, MOE_ERR_WORKSPACE, saved_bytes);
    REFUSED_FORWARD(d.workspace_bytes = bytes.forward - 1, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED_BACKWARD(d.workspace_bytes = bytes.backward - 1, MOE_ERR_WORKSPACE, workspace_bytes);

    REFUSED_BOTH(d.x = AT(d.x, 8), MOE_ERR_ALIGN, x);
    REFUSED_BOTH(d.ids = (const int32_t*)AT(d.ids, 2), MOE_ERR_ALIGN, ids);
    REFUSED_BOTH(d.weights = (const float*)AT(d.weights, 2), MOE_ERR_ALIGN, weights);
    REFUSED_BOTH(d.w1.base = AT(d.w1.base, 8), MOE_ERR_ALIGN, w1);
    REFUSED_BOTH(d.w2.base = AT(d.w2.base, 8), MOE_ERR_ALIGN, w2);
    REFUSED_BOTH(d.w1.base = 0; d.w1.table = (const void* const*)AT(d.x, 4), MOE_ERR_ALIGN, w1);
    REFUSED_BOTH(d.w2.base = 0; d.w2.table = (const void* const*)AT(d.x, 4), MOE_ERR_ALIGN, w2);
    REFUSED_BACKWARD(d.dy = d.dx = AT(d.dx, 8), MOE_ERR_ALIGN, dy);
    REFUSED_BOTH(d.saved = AT(d.saved, 16), MOE_ERR_ALIGN, saved);
    REFUSED_BOTH(d.workspace = AT(d.workspace, 16), MOE_ERR_ALIGN, workspace);
    REFUSED_BOTH(d.rank = -1, MOE_ERR_RANGE, rank);
    REFUSED_BOTH(d.rank = MOE_FAULT_MAX_RANK + 1, MOE_ERR_RANGE, rank);
    REFUSED_BOTH(d.fault = (uint64_t*)AT(d.fault, 4), MOE_ERR_ALIGN, fault);
    REFUSED_FORWARD(d.y = AT(d.y, 8), MOE_ERR_ALIGN, y);
    REFUSED_BACKWARD(d.dy = AT(d.dy, 8), MOE_ERR_ALIGN, dy);
    REFUSED_BACKWARD(d.dx = AT(d.dx, 8), MOE_ERR_ALIGN, dx);
    REFUSED_BACKWARD(d.dw1 = AT(d.dw1, 8), MOE_ERR_ALIGN, dw1);
    REFUSED_BACKWARD(d.dw2 = AT(d.dw2, 8), MOE_ERR_ALIGN, dw2);
    REFUSED_BACKWARD(d.dweights = (float*)AT(d.dweights, 2), MOE_ERR_ALIGN, dweights);
    REFUSED_BACKWARD(d.grad_expert = (int32_t*)AT(d.grad_expert, 2), MOE_ERR_ALIGN, grad_expert);
    REFUSED_BACKWARD(d.act_grad = AT(d.act_grad, 8), MOE_ERR_ALIGN, act_grad);

    REFUSED_FORWARD(d.y = (void*)d.x, MOE_ERR_OVERLAP, y);
    REFUSED_FORWARD(d.y = (void*)d.w2.base, MOE_ERR_OVERLAP, y);
    REFUSED_FORWARD(d.w1.base = 0; d.w1.table = (const void* const*)d.y, MOE_ERR_OVERLAP, y);
    REFUSED_BACKWARD(d.w2.base = 0; d.w2.table = (const void* const*)d.dw2, MOE_ERR_OVERLAP, dw2);
    REFUSED_BOTH(d.saved = UP_TO(d.x, 256), MOE_ERR_OVERLAP, saved);
    REFUSED_BOTH(d.fault = (uint64_t*)UP_TO(d.ids, 8), MOE_ERR_OVERLAP, fault);
    REFUSED_BOTH(d.fault = (uint64_t*)UP_TO(d.weights, 8), MOE_ERR_OVERLAP, fault);
    REFUSED_BOTH(d.fault = (uint64_t*)d.workspace, MOE_ERR_OVERLAP, fault);
    REFUSED_BACKWARD(d.dx = (void*)d.x, MOE_ERR_OVERLAP, dx);
    REFUSED_BACKWARD(d.dx = (void*)d.dy; d.dx_stride = 32, MOE_ERR_OVERLAP, dx);
    REFUSED_BACKWARD(d.dw2 = d.dw1, MOE_ERR_OVERLAP, dw2);
    REFUSED_BACKWARD(d.dw1 = (void*)d.w1.base, MOE_ERR_OVERLAP, dw1);
    REFUSED_BACKWARD(d.dweights = (float*)d.weights, MOE_ERR_OVERLAP, dweights);
    REFUSED_BACKWARD(d.grad_expert = (int32_t*)d.ids, MOE_ERR_OVERLAP, grad_expert);
    REFUSED_BACKWARD(d.act_grad = d.dw2, MOE_ERR_OVERLAP, act_grad);
    REFUSED_BOTH(d.workspace = d.saved;
                 d.workspace_bytes = d.saved_bytes << 8, MOE_ERR_OVERLAP, workspace);
    REFUSED_BOTH(d.fault = (uint64_t*)d.saved, MOE_ERR_OVERLAP, fault);
    bufs_free(&b);
}

/* With rows further apart than they are long the last one lies behind T * H elements. What is
   written must not overlap that row either, nor the last expert's matrices. */
static void run_strided_overlap(layer_bufs* b, layer_case* c, trand* r)
{
    const moe_block_layer_desc good = b->d;
    const int64_t last = c->T - 1, behind = (c->pad + 8) * 2;
    char *x = (char*)good.x + last * x_stride(c) * 2, *y = (char*)good.y + last * y_stride(c) * 2;
    char* dy = (char*)good.dy + last * dy_stride(c) * 2;
    char* dx = (char*)good.dx + last * dx_stride(c) * 2;
    char* w1 = (char*)good.w1.base + b->w1.part[0][0].bytes - behind;
    char* w2 = (char*)good.w2.base + b->w2.part[0][0].bytes - behind;
    moe_block_layer_desc d;
    (void)r;
    refused_bufs = b;
    REFUSED_BOTH(d.fault = (uint64_t*)x, MOE_ERR_OVERLAP, fault);
    REFUSED_BOTH(d.fault = (uint64_t*)(x + 40), MOE_ERR_OVERLAP, fault);
    REFUSED_BOTH(d.fault = (uint64_t*)w1, MOE_ERR_OVERLAP, fault);
    REFUSED_BOTH(d.fault = (uint64_t*)w2, MOE_ERR_OVERLAP, fault);
    REFUSED_FORWARD(d.fault = (uint64_t*)y, MOE_ERR_OVERLAP, fault);
    REFUSED_FORWARD(d.fault = (uint64_t*)(y + 40), MOE_ERR_OVERLAP, fault);
    REFUSED_FORWARD(d.y = x + 32, MOE_ERR_OVERLAP, y);
    REFUSED_BACKWARD(d.fault = (uint64_t*)(dy + 40), MOE_ERR_OVERLAP, fault);
    REFUSED_BACKWARD(d.fault = (uint64_t*)(dx + 40), MOE_ERR_OVERLAP, fault);
    REFUSED_BACKWARD(d.dx = x + 32, MOE_ERR_OVERLAP, dx);
    REFUSED_BACKWARD(d.dx = dy + 32, MOE_ERR_OVERLAP, dx);
    REFUSED_BACKWARD(d.dw1 = x + 32, MOE_ERR_OVERLAP, dw1);
    REFUSED_BACKWARD(d.dw1 = dy + 32, MOE_ERR_OVERLAP, dw1);
    REFUSED_BACKWARD(d.dw1 = dx + 32, MOE_ERR_OVERLAP, dw1);
    REFUSED_BACKWARD(d.dw2 = x + 32, MOE_ERR_OVERLAP, dw2);
    REFUSED_BACKWARD(d.dw2 = dy + 32, MOE_ERR_OVERLAP, dw2);
    REFUSED_BACKWARD(d.dw2 = dx + 32, MOE_ERR_OVERLAP, dw2);
    REFUSED_BACKWARD(d.dweights = (float*)(x + 44), MOE_ERR_OVERLAP, dweights);
    REFUSED_BACKWARD(d.dweights = (float*)(dy + 44), MOE_ERR_OVERLAP, dweights);
    REFUSED_BACKWARD(d.dweights = (float*)(dx + 44), MOE_ERR_OVERLAP, dweights);
    REFUSED_BACKWARD(d.grad_expert = (int32_t*)(dy + 44), MOE_ERR_OVERLAP, grad_expert);
    REFUSED_BACKWARD(d.grad_expert = (int32_t*)(dx + 44), MOE_ERR_OVERLAP, grad_expert);
    REFUSED_BACKWARD(d.act_grad = dy + 32, MOE_ERR_OVERLAP, act_grad);
    REFUSED_BACKWARD(d.act_grad = dx + 32, MOE_ERR_OVERLAP, act_grad);
    CHECK_STATUS(both(b), MOE_OK);
}

static void test_strided_overlap(void)
{
    layer_case c = normal_case(SPARSE, 3, 24, 16, 3, 2);
    c.pad = 32;
    each_form(22, c, run_strided_overlap);
}

static void block_layer_refusals(void)
{
    RUN(test_refusals);
    RUN(test_strided_overlap);
}

#endif
