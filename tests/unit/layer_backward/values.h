/* values.h: results of the backward pass: where the routing comes from, gates, activations, shared
   experts, layouts, options of route, results that are left out. */
#ifndef MOE_TESTS_LAYER_BACKWARD_VALUES_H
#define MOE_TESTS_LAYER_BACKWARD_VALUES_H

#include "tests/unit/layer_backward/case.h"

/* Where the routing comes from, with each kind of sum for dx. */
static void test_backward_sources(void)
{
    trand r = trand_new(1);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from)
        for (int shared = 0; shared <= 40; shared += 40)
            for (int i = 0; i < 4; ++i) {
                grads_case c = grads_of(normal_case(33, 64, 40, 6, 2));
                c.f.from = from, c.f.shared = shared, c.f.bias = i % 2, c.f.shared_bias = i % 2;
                c.f.renormalize = from != FROM_IDS && i % 2;
                c.f.shared_weighted = i / 2, c.f.unused = from == FROM_IDS ? 20 : 0;
                c.dx_accumulate = i == 1 || i == 2, c.dx_is_dy = i == 2, c.accumulate = i == 3;
                c.gather = 1 + i % 2;
                c.balance = from != FROM_IDS && i == 3;
                run_grads(&c, &r);
            }
}

static void test_backward_random(void)
{
    trand r = trand_new(2);
    for (int i = 0; i < (test_long() ? 80 : 30); ++i) {
        const int E = (int)trand_int(&r, 1, 9);
        grads_case c = grads_of(
            normal_case((int)trand_int(&r, 0, 40), 8 * (int)trand_int(&r, 2, 12),
                        8 * (int)trand_int(&r, 1, 10), E, (int)trand_int(&r, 1, E < 4 ? E : 4)));
        layer_case* f = &c.f;
        f->from = (int)trand_int(&r, FROM_ROUTER, FROM_IDS);
        if (trand_int(&r, 0, 1)) f->dtype = f->router_dtype = MOE_FP16;
        if (trand_int(&r, 0, 2) == 0) f->router_dtype = MOE_FP32;
        f->rows_dtype = trand_int(&r, 0, 3) ? 0 : MOE_FP32;
        if (trand_int(&r, 0, 1)) f->tile = MOE_TILE_AUTO; /* Hopper's path, where it runs */
        f->activation = (int)trand_int(&r, 0, MOE_ACTIVATION_RELU2);
        f->gate_up = (int)trand_int(&r, MOE_GATE_UP_CONCATENATED, MOE_GATE_UP_SEPARATE);
        f->major = f->gate_up == MOE_GATE_UP_INTERLEAVED ? MOE_MAJOR_K : (int)trand_int(&r, 1, 2);
        f->bias = (int)trand_int(&r, 0, 1);
        f->x_pad = 8 * (int)trand_int(&r, 0, 1);
        if (f->from != FROM_IDS) {
            f->score = (int)trand_int(&r, 0, MOE_SCORE_SPARSEMAX);
            f->renormalize = (int)trand_int(&r, 0, 1);
            f->scale = trand_int(&r, 0, 1) ? 1.5f : 0;
            c.balance = (int)trand_int(&r, 0, 1);
        } else {
            f->unused = (int)trand_int(&r, 0, 30);
        }
        if (trand_int(&r, 0, 1)) {
            f->shared = 8 * (int)trand_int(&r, 1, 8);
            f->shared_weighted = (int)trand_int(&r, 0, 1),
            f->shared_bias = (int)trand_int(&r, 0, 1);
            f->shared_activation = (int)trand_int(&r, 0, MOE_ACTIVATION_RELU2);
            if (f->shared_activation == MOE_ACTIVATION_SWIGLU_CLAMPED) f->shared_activation = 0;
            f->shared_gate_up =
                f->major == MOE_MAJOR_MN ? MOE_GATE_UP_SEPARATE : (int)trand_int(&r, 1, 3);
        }
        if (trand_int(&r, 0, 2) == 0) f->row_multiple = 8;
        if (trand_int(&r, 0, 2) == 0)
            f->capacity = 5, f->drop_rule = trand_int(&r, 0, 1) ? MOE_DROP_BY_WEIGHT : 0;
        f->outputs = trand_int(&r, 0, 3) == 0;
        if (trand_int(&r, 0, 3) == 0 && f->from != FROM_IDS) f->replicas = E + 3;
        c.grad_dtype = trand_int(&r, 0, 1) ? MOE_FP32 : f->dtype;
        c.router_grad_dtype = trand_int(&r, 0, 1) ? MOE_FP32 : 0;
        c.accumulate = (int)trand_int(&r, 0, 1), c.dx_accumulate = (int)trand_int(&r, 0, 1);
        c.dx_is_dy = trand_int(&r, 0, 3) == 0;
        c.gather = (int)trand_int(&r, 0, 2);
        c.none = trand_int(&r, 0, 3) ? 0 : (int)trand_int(&r, 1, 2);
        c.dy_pad = 8 * (int)trand_int(&r, 0, 1), c.dx_pad = 8 * (int)trand_int(&r, 0, 1);
        if (f->from == FROM_LOGITS && c.none == 1) c.balance = 0; /* refused without dlogits */
        run_grads(&c, &r);
    }
}

/* Wide experts, whose rows are copied first where the path is Hopper's. */
static void test_backward_wide(void)
{
    trand r = trand_new(4);
    for (int i = 0; i < 2; ++i) {
        grads_case c = grads_of(normal_case(MOE_ON_HOST ? 12 : 90, 40, 520, 3, 2));
        c.f.tile = MOE_TILE_AUTO, c.f.bias = 1, c.recompute = i, c.f.shared = i ? 24 : 0;
        run_grads(&c, &r);
    }
}

/* The forward pass with `saved`: the results of a forward alone. */
static void test_backward_forward(void)
{
    trand r = trand_new(3);
    for (int i = 0; i < 6; ++i) {
        grads_case c = grads_of(normal_case(33, 64, 40, 6, 2));
        grads_bufs b;
        void* y;
        c.f.from = i % 3, c.f.shared = i / 3 ? 32 : 0, c.f.bias = i % 2, c.recompute = i == 4;
        bufs_begin(&b, &c, &r);
        CHECK_STATUS(moe_layer_forward(&b.f.d, test_now.stream), MOE_OK);
        y = tbuf_copy(&b.f.y);
        b.f.d.saved = 0, b.f.d.saved_bytes = 0, b.f.d.recompute = 0;
        fit_workspace(&b.f, &c.f);
        reset(&b.f, &c.f);
        CHECK_STATUS(moe_layer_forward(&b.f.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.f.y, y), "saving changes y");
        free(y);
        compare(&b.f, &c.f);
        bufs_end(&b);
    }
}

static void layer_backward_values(void)
{
    RUN(test_backward_forward);
    RUN(test_backward_sources);
    RUN(test_backward_random);
    RUN(test_backward_wide);
}

#endif
