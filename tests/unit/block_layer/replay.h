/* replay.h: the block layer called again, in part, and from a graph.

     test_same_bits_again  every run gives the same bits; one forward serves several backwards
     test_wanted           an output that is not asked for is not written, and changes no other
     test_graph            a graph replayed with other routing
     test_preload          kernels load before their first launch */
#ifndef MOE_TESTS_BLOCK_LAYER_REPLAY_H
#define MOE_TESTS_BLOCK_LAYER_REPLAY_H

#include "tests/unit/block_layer/compare.h"

static moe_status call_backward(void* context, cudaStream_t stream)
{
    return moe_block_layer_backward(&((layer_bufs*)context)->d, stream);
}

static void run_same_bits(layer_bufs* b, layer_case* c, trand* r)
{
    const int runs = MOE_ON_HOST ? 4 : 100;
    const tbufs out = layer_outputs(b), gradients = layer_gradients(b);
    void* first[6];
    (void)c, (void)r;
    test_same_bits("both", call_both, b, out, runs);
    tbufs_copy(out, first);
    test_same_bits("one forward, several backwards", call_backward, b, gradients, runs);
    tbufs_same(gradients, first + 1, "several backwards");
    b->d.act_grad = 0; /* over pre itself */
    reset(b);
    CHECK_STATUS(both(b), MOE_OK);
    tbufs_same(out, first, "a gradient over pre");
    tbufs_free_copies(out, first);
}

static void test_same_bits_again(void)
{
    layer_case c = normal_case(SPARSE, 37, 24, 32, 5, 2);
    c.own_act_grad = 1;
    each_form(14, c, run_same_bits);
}

/* Asks for one gradient at a time. */
static void run_wanted(layer_bufs* b, layer_case* c, trand* r)
{
    const tbufs out = TBUFS(&b->dx, &b->dw1, &b->dw2, &b->dweights);
    const moe_block_layer_desc d = b->d;
    void* all[4];
    (void)c, (void)r;
    CHECK_STATUS(both(b), MOE_OK);
    tbufs_copy(out, all);
    for (int i = 0; i < 4; ++i) {
        reset(b);
        if (i != 0) b->d.dx = 0;
        if (i != 1) b->d.dw1 = 0;
        if (i != 2) b->d.dw2 = 0;
        if (i != 3) b->d.dweights = 0;
        if (i != 1 && i != 2) b->d.grad_expert = 0;
        CHECK_STATUS(both(b), MOE_OK);
        for (int j = 0; j < 4; ++j)
            CHECK(tbuf_holds(out.at[j], i == j ? all[j] : 0), "%s, asked for %s", out.at[j]->name,
                  out.at[i]->name);
        b->d = d;
    }
    tbufs_free_copies(out, all);
}

static void test_wanted(void) { each_form(15, normal_case(SPARSE, 21, 24, 32, 4, 2), run_wanted); }

static void run_graph(layer_bufs* b, layer_case* c, trand* r)
{
    tgraph g;
    if (c->form != DENSE) { /* all experts get weights: each will be chosen in some replay */
        layer_case full = *c;
        layer_bufs other;
        full.form = DENSE;
        full.K = 0;
        bufs_new(&other, &full, r);
        same_inputs(b, &other);
        bufs_free(&other);
    }
    if (!tgraph_capture(&g, call_both, b)) return;
    for (int replay = 0; replay < 3; ++replay) {
        c->unused = replay == 1 ? 60 : 0;
        c->one_expert = replay == 2;
        fill_routing(b, c, r);
        reset(b);
        tgraph_launch(&g);
        TEST_CUDA(cudaDeviceSynchronize());
        check_results(b, c, 1);
        CHECK_FAULT(&b->fault, MOE_FAULT_NONE, 0);
    }
    tgraph_free(&g);
}

static void test_graph(void) { each_form(16, normal_case(SPARSE, 37, 24, 32, 5, 2), run_graph); }

static void test_preload(void) { CHECK_STATUS(moe_block_layer_preload(), MOE_OK); }

static void block_layer_replay(void)
{
    RUN(test_same_bits_again);
    RUN(test_wanted);
    RUN(test_graph);
    RUN(test_preload);
}

#endif
