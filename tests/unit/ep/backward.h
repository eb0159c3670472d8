/* backward.h: gradients of the layer over ranks: shapes, forms, options, graphs, steps in a row. */
#ifndef MOE_TESTS_EP_BACKWARD_H
#define MOE_TESTS_EP_BACKWARD_H

#include "tests/unit/ep/backward_case.h"
#include "tests/unit/ep/sleep.h"

/* Both layers, and the comparison. */
static void bk_compare(const bk_case* o, uint64_t salt)
{
    static bk_job j;
    if (bk_new(&j, o, salt)) {
        bk_run_one(&j);
        bk_run(&j);
        tgroup_wait(&j.lay.g);
        if (tgroup_clean(&j.lay.g, __LINE__)) bk_check(&j);
    }
    bk_free(&j);
}

static void test_backward(void)
{
    const bk_case list[] = {
        /* W, T, H, I, E, K, dispatch, combine, dtype, shared, replicas, multiple, from_ids, parts,
           bias, profile, microbatch; redispatch, recompute, balance, in_place, count_rows,
           local_router, no_dx, fp32, side */
        {{1, 9, 64, 40, 5, 2, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0, 0, 0, 0, 0, 0, 0, 1, 0},
        {{2, 12, 64, 40, 8, 3, 0, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0}, 0, 0, 1, 0, 0, 0, 0, 0, 0},
        {{2, 12, 64, 40, 8, 3, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0}, 1, 0, 0, 1, 0, 0, 0, 1, 2},
        {{4, 10, 64, 40, 7, 2, 0, 2, 0, 24, 0, 0, 0, 0, 1, 0, 0}, 1, 1, 1, 0, 0, 0, 0, 1, 0},
        {{4, 10, 64, 40, 7, 2, 0, 1, 0, 24, 0, 0, 0, 1, 0, 0, 0}, 0, 0, 0, 1, 1, 0, 0, 1, 0},
        {{4, 10, 64, 40, 2, 2, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0}, 1, 0, 0, 0, 0, 1, 0, 0, 2},
        {{3, 11, 64, 40, 6, 3, 0, 2, 0, 0, 1, 0, 1, 0, 0, 0, 0}, 0, 0, 0, 0, 1, 0, 0, 1, 0},
        {{3, 11, 64, 40, 6, 3, 0, 1, 0, 0, 1, 8, 0, 0, 1, 0, 0}, 0, 0, 1, 0, 0, 0, 0, 1, 2},
        {{2, 12, 64, 136, 6, 2, 0, 2, 0, 0, 0, 8, 0, 0, 0, 0, 0}, 1, 1, 0, 0, 1, 0, 1, 1, 1},
        {{8, 6, 64, 40, 16, 4, 0, 1, 0, 0, 0, 8, 1, 0, 0, 0, 0}, 1, 0, 0, 0, 0, 0, 0, 0, 0},
        {{16, 5, 64, 40, 16, 2, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0}, 0, 0, 1, 0, 0, 0, 0, 1, 2},
        {{4, 10, 64, 40, 7, 2, 0, 1, 0, 24, 0, 0, 0, 0, 1, 0, 0}, 0, 1, 1, 0, 0, 0, 0, 1, 2},
        {{2, 12, 64, 136, 6, 2, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0}, 1, 0, 0, 0, 0, 0, 0, 1, 2},
        {{2, 2600, 64, 40, 8, 2, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0}, 1, 0, 0, 0, 0, 0, 0, 1, 1},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; ++i) {
        bk_case o = list[i];
        lay_case* c = &o.c;
        if (MOE_ON_HOST && c->T > 100 && !test_long()) continue;
        c->dtype = lay_half(c->dtype);
        for (c->dispatch = MOE_EP_DEDUPLICATED; c->dispatch <= MOE_EP_ALL_GATHER_COPY;
             ++c->dispatch) {
            if (MOE_ON_HOST && c->dispatch != 1 + (int)i % 4) continue;
            if (c->form != MOE_EP_GATHERED)
                c->form = c->dispatch % 2 ? MOE_EP_REDUCED : MOE_EP_REDUCE_SCATTER;
            bk_compare(&o, 700 + i);
        }
    }
}

/* Hash of all that a step has written on all ranks. */
static uint64_t bk_hash(const bk_job* j)
{
    uint64_t hash = 14695981039346656037ull;
    for (int r = 0; r < j->o.c.W; ++r) {
        const bk_side* s = j->rank + r;
        const tbuf* all[] = {&s->y,   &s->dx,  &s->dlogits, &s->dweights,
                             &s->dw1, &s->dw2, &s->drouter, &s->s_dw1};
        tgroup_use(&j->lay.g, r);
        for (size_t i = 0; i < sizeof all / sizeof all[0]; ++i) {
            unsigned char* p;
            if (!all[i]->bytes) continue;
            p = (unsigned char*)tbuf_copy(all[i]);
            for (size_t k = 0; k < all[i]->bytes; ++k) hash = (hash ^ p[k]) * 1099511628211ull;
            free(p);
        }
    }
    TEST_CUDA(cudaSetDevice(0));
    return hash;
}

/* A forward and a backward as one graph a rank, replayed with other inputs: those of one GPU, and the
   same bits each time. */
static void test_backward_graph(void)
{
    static bk_job j;
    for (int pair = 0; pair < 12; ++pair) {
        const bk_case o = {{4, 8, 64, 40, 7, 2, MOE_EP_DEDUPLICATED + pair % 4,
                            MOE_EP_REDUCED + pair / 4, test_half(), 16, 0, 0, 0, 0, 1, 0, 0},
                           pair % 2,
                           pair % 3 == 1,
                           1,
                           0,
                           0,
                           0,
                           0,
                           1,
                           pair % 4 == 1 ? 1 : pair / 2 % 2 * 2};
        if (MOE_ON_HOST && pair % 5) continue; /* each form once */
        if (bk_new(&j, &o, 720)) {
            cudaGraph_t graph[4];
            cudaGraphExec_t exec[4];
            trand q = trand_new(721);
            for (int r = 0; r < 4; ++r) {
                tgroup_use(&j.lay.g, r);
                TEST_CUDA(
                    cudaStreamBeginCapture(j.lay.g.stream[r], cudaStreamCaptureModeThreadLocal));
            }
            bk_run(&j);
            for (int r = 0; r < 4; ++r) {
                tgroup_use(&j.lay.g, r);
                TEST_CUDA(cudaStreamEndCapture(j.lay.g.stream[r], &graph[r]));
            }
            for (int r = 0; r < 4; ++r) {
                tgroup_use(&j.lay.g, r);
                TEST_CUDA(cudaGraphInstantiate(&exec[r], graph[r], 0));
                TEST_CUDA(cudaGraphDestroy(graph[r]));
            }
            for (int n = 0; n < 2; ++n) {
                uint64_t first = 0;
                int at = 0;
                TFREE(j.h_x);
                j.h_x = lay_draw(&q, (int64_t)j.one.T * 64, o.c.dtype, 1.0f);
                tgroup_use(&j.lay.g, 0);
                tbuf_put(&j.one.x, j.h_x);
                for (int r = 0; r < 4; ++r) {
                    tgroup_use(&j.lay.g, r);
                    tbuf_put(&j.rank[r].x, (char*)j.h_x + at * 64 * 2);
                    at += j.rank[r].T;
                }
                bk_run_one(&j);
                for (int again = 0; again < 2; ++again) {
                    bk_reset(&j);
                    for (int r = 0; r < 4; ++r) {
                        tgroup_use(&j.lay.g, r);
                        TEST_CUDA(cudaGraphLaunch(exec[r], j.lay.g.stream[r]));
                    }
                    tgroup_wait(&j.lay.g);
                    if (again) CHECK(bk_hash(&j) == first, "replay %d: other bits", n);
                    first = bk_hash(&j);
                }
                if (tgroup_clean(&j.lay.g, __LINE__)) bk_check(&j);
            }
            for (int r = 0; r < 4; ++r) TEST_CUDA(cudaGraphExecDestroy(exec[r]));
        }
        bk_free(&j);
    }
}

/* Two layers that share all buffers of the exchange, forward 0, 1, backward 1, 0, several steps
   without a host wait, before each call another rank late: the bits of one step at a time. */
static void test_backward_layers(void)
{
    static bk_job j;
    static moe_ep_layer_desc forward[2][4];
    static moe_ep_layer_backward_desc backward[2][4];
    static tbuf saved[4], y[4], dx[4];
    for (int form = MOE_EP_REDUCED; form <= MOE_EP_REDUCE_SCATTER; ++form) {
        const bk_case o = {{4, 9, 64, 40, 6, 2, MOE_EP_DEDUPLICATED + form % 3, form, test_half(),
                            0, 0, 0, 0, 0, 0, 0, 0},
                           1,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0,
                           1,
                           form == MOE_EP_REDUCED ? 1 : 2};
        uint64_t first = 0;
        if (MOE_ON_HOST && form == MOE_EP_GATHERED) continue;
        if (!bk_new(&j, &o, 730)) continue;
        for (int r = 0; r < 4; ++r) {
            bk_side* s = j.rank + r;
            tgroup_use(&j.lay.g, r);
            saved[r] = tbuf_new("saved of layer 1", s->saved.bytes, 0);
            y[r] = tbuf_new("y of layer 1", s->y.bytes, 0);
            dx[r] = tbuf_new("dx of layer 1", s->dx.bytes, 0);
            forward[0][r] = forward[1][r] = j.ep[r].forward;
            forward[1][r].layer.x = s->y.p, forward[1][r].layer.y = y[r].p;
            forward[1][r].layer.saved = saved[r].p;
            backward[0][r] = backward[1][r] = j.ep[r];
            backward[1][r].forward = forward[1][r];
            backward[1][r].grads.dx = dx[r].p;
            backward[0][r].grads.dy = dx[r].p;
            backward[1][r].grads.dw1.base = backward[1][r].grads.dw2.base =
                0; /* of layer 0 alone */
            backward[1][r].grads.drouter = 0;
            backward[1][r].grads.dlogits = backward[1][r].grads.dweights = 0;
            CHECK_STATUS(moe_preload_kernel((const void*)ep_sleep), MOE_OK);
        }
        for (int step = 0; step < 6; ++step) {
            const int waits = step < 2; /* steps 0 and 1: after each call */
            if (step < 3) bk_reset(&j);
            for (int call = 0; call < 4; ++call) {
                for (int r = 0; r < 4; ++r) {
                    tgroup_use(&j.lay.g, r);
                    if (!waits && (step + call) % 4 == r)
                        ep_sleep_on(j.lay.g.stream[r], MOE_ON_HOST ? 1000000 : 300000);
                    CHECK_STATUS(
                        call < 2 ? moe_ep_layer_forward(&forward[call][r], j.lay.g.stream[r])
                                 : moe_ep_layer_backward(&backward[3 - call][r], j.lay.g.stream[r]),
                        MOE_OK);
                }
                if (waits) tgroup_wait(&j.lay.g);
            }
            if (step == 0 || step == 1 || step == 5) {
                tgroup_wait(&j.lay.g);
                if (step) CHECK(bk_hash(&j) == first, "step %d: other bits", step);
                first = bk_hash(&j);
            }
        }
        tgroup_clean(&j.lay.g, __LINE__);
        for (int r = 0; r < 4; ++r) {
            tgroup_use(&j.lay.g, r);
            tbufs_free(TBUFS(&saved[r], &y[r], &dx[r]));
        }
        bk_free(&j);
    }
}

/* With count_rows, ranks whose experts got no rows: their gradients are zeros. */
static void test_backward_no_rows(void)
{
    static bk_job j;
    const bk_case o = {{3, 8, 64, 40, 6, 2, 0, MOE_EP_REDUCED, test_half(), 0, 0, 0, 1, 0, 1, 0, 0},
                       0,
                       0,
                       0,
                       0,
                       1,
                       0,
                       0,
                       1,
                       0};
    if (bk_new(&j, &o, 732)) {
        for (int r = 0; r < 3; ++r) { /* all on expert 0, of rank 0 */
            int32_t* ids = (int32_t*)test_host((int64_t)j.rank[r].T * 2 * 4);
            for (int i = 0; i < j.rank[r].T * 2; ++i) ids[i] = i % 2 ? -1 : 0;
            tgroup_use(&j.lay.g, r);
            tbuf_put(&j.lay.rank[r].ids, ids);
            free(ids);
        }
        bk_run(&j);
        tgroup_wait(&j.lay.g);
        tgroup_clean(&j.lay.g, __LINE__);
        for (int r = 0; r < 3; ++r) {
            const tbuf* all[] = {&j.rank[r].dw1, &j.rank[r].dw2, &j.rank[r].db1, &j.rank[r].db2};
            tgroup_use(&j.lay.g, r);
            CHECK(j.ep[r].forward.num_rows >= 1 && (r == 0) == (j.ep[r].forward.num_rows > 1),
                  "rank %d counts %lld rows", r, (long long)j.ep[r].forward.num_rows);
            for (int i = 0; i < 4; ++i) {
                float* g = (float*)tbuf_copy(all[i]);
                int other = 0;
                for (size_t k = 0; k < all[i]->bytes / 4; ++k) other += g[k] != 0;
                CHECK(!other == (r > 0), "rank %d: %s has %d numbers that are not 0", r,
                      all[i]->name, other);
                free(g);
            }
        }
    }
    bk_free(&j);
}

/* A rank without tokens may give no addresses of its tokens' gradients, whatever the others ask for. */
static void test_backward_no_tokens(void)
{
    static bk_job j;
    for (int asks = 0; asks < 3; ++asks) { /* all; without dx; weights' gradients alone */
        const bk_case o = {
            {3, 8, 64, 40, 6, 2, 0, MOE_EP_REDUCED, test_half(), 0, 0, 0, asks == 2, 0, 0, 0, 0},
            1,
            0,
            0,
            0,
            0,
            0,
            asks > 0,
            1,
            2};
        if (bk_new(&j, &o, 733 + (uint64_t)asks)) {
            moe_layer_backward_desc* g = &j.ep[2].grads;
            CHECK(j.rank[2].T == 0, "the last rank has tokens");
            g->dy = g->dx = 0;
            g->dlogits = g->dweights = 0;
            for (int r = 0; r < 2 && asks == 2; ++r) j.ep[r].grads.dweights = 0;
            bk_run_one(&j);
            for (int step = 0; step < 2; ++step) bk_run(&j);
            tgroup_wait(&j.lay.g);
            tgroup_clean(&j.lay.g, __LINE__);
            for (int r = 0; r < 3; ++r) bk_check_experts(&j, r);
            if (asks < 2) bk_check(&j);
        }
        bk_free(&j);
    }
}

/* Two layers with buffers of their own, without redispatch, on the same channels; and without dx or
   drouter, where no combine and no sum keeps a fast rank back. A rank is late before each call. */
static void test_backward_own_buffers(void)
{
    static bk_job j;
    static moe_ep_layer_backward_desc layer[2][3];
    static tbuf saved[3];
    for (int way = 0; way < 4; ++way) {
        const bk_case o = {{3, 8, 64, 40, 6, 2, way == 1 ? MOE_EP_ALL_TO_ALL : MOE_EP_DEDUPLICATED,
                            MOE_EP_REDUCED, test_half(), 0, 0, 0, way > 1, 0, 0, 0, 0},
                           0,
                           0,
                           0,
                           0,
                           0,
                           0,
                           way == 2,
                           1,
                           way == 3 ? 2 : 0};
        moe_ep_layer_backward_desc sizes;
        uint64_t forward = 0, bytes = 0, first = 0;
        memset(&sizes, 0, sizeof sizes);
        sizes.forward = lay_sizes(&o.c);
        CHECK_STATUS(moe_ep_layer_region(&sizes.forward, 3, &forward), MOE_OK);
        sizes.forward.buffers.region_offset = forward; /* of layer 1 */
        CHECK_STATUS(moe_ep_layer_backward_region(&sizes, 3, &bytes), MOE_OK);
        if (!bk_new_region(&j, &o, 736 + (uint64_t)way, bytes)) continue;
        for (int r = 0; r < 3; ++r) {
            moe_ep_layer_backward_desc* b = &layer[1][r];
            uint64_t end = 0;
            tgroup_use(&j.lay.g, r);
            saved[r] = tbuf_new("saved of layer 1", j.rank[r].saved.bytes, 0);
            layer[0][r] = layer[1][r] = j.ep[r];
            b->forward.layer.saved = saved[r].p;
            b->forward.buffers.region_offset = forward;
            CHECK_STATUS(moe_ep_layer_region(&b->forward, 3, &end), MOE_OK);
            layer[0][r].gradient_offset = b->gradient_offset = end; /* behind both */
            layer[0][r].gradient_channel = b->gradient_channel = 5;
            CHECK_STATUS(moe_preload_kernel((const void*)ep_sleep), MOE_OK);
        }
        for (int step = 0; step < 5; ++step) {
            const int waits = step == 0;
            if (waits) bk_reset(&j);
            for (int call = 0; call < 4; ++call) {
                for (int r = 0; r < 3; ++r) {
                    tgroup_use(&j.lay.g, r);
                    if (!waits && (step + call) % 3 == r)
                        ep_sleep_on(j.lay.g.stream[r], MOE_ON_HOST ? 1000000 : 200000);
                    CHECK_STATUS(
                        call < 2 ? moe_ep_layer_forward(&layer[call][r].forward, j.lay.g.stream[r])
                                 : moe_ep_layer_backward(&layer[3 - call][r], j.lay.g.stream[r]),
                        MOE_OK);
                }
                if (waits) tgroup_wait(&j.lay.g);
            }
            if (step % 4) continue;
            tgroup_wait(&j.lay.g);
            if (step) CHECK(bk_hash(&j) == first, "way %d, step %d: other bits", way, step);
            first = bk_hash(&j);
        }
        tgroup_clean(&j.lay.g, __LINE__);
        bk_run_one(&j);
        for (int r = 0; r < 3; ++r) bk_check_experts(&j, r);
        for (int r = 0; r < 3; ++r) {
            tgroup_use(&j.lay.g, r);
            tbuf_free(&saved[r]);
        }
        bk_free(&j);
    }
}

/* Many steps with the same inputs: one hash. */
static void test_backward_steps(void)
{
    static bk_job j;
    const int steps = MOE_ON_HOST ? 6 : test_long() ? 10000 : 200;
    const bk_case o = {{2, 9, 64, 40, 6, 2, 0, MOE_EP_REDUCED, test_half(), 0, 0, 0, 0, 0, 0, 0, 0},
                       1,
                       0,
                       0,
                       0,
                       0,
                       0,
                       0,
                       1,
                       1};
    uint64_t first = 0;
    if (bk_new(&j, &o, 740))
        for (int step = 0; step < steps; ++step) {
            bk_run(&j);
            if (step % 50 && step != steps - 1) continue;
            tgroup_wait(&j.lay.g);
            if (step && !CHECK(bk_hash(&j) == first, "step %d: other bits", step)) break;
            first = bk_hash(&j);
            if (!tgroup_clean(&j.lay.g, __LINE__)) break;
        }
    bk_free(&j);
}

/* What is kept, by name, and its bytes. */
static void test_backward_saved(void)
{
    static bk_job j;
    const bk_case o = {
        {2, 12, 64, 40, 8, 3, 0, MOE_EP_REDUCED, test_half(), 0, 0, 0, 0, 0, 0, 0, 0},
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0};
    if (bk_new(&j, &o, 750)) {
        moe_ep_layer_desc d = j.ep[0].forward;
        moe_layer_saved_list kept;
        size_t in_saved = 0;
        int recv_x = 0, pre = 0;
        CHECK_STATUS(moe_ep_layer_saved(&d, &kept), MOE_OK);
        for (int i = 0; i < kept.count; ++i) {
            const moe_layer_saved_item* s = kept.item + i;
            if (!s->caller) in_saved += (size_t)s->bytes;
            recv_x |= !strcmp(s->name, "recv_x") && s->rows == 2 * 12 && s->caller;
            pre |= !strcmp(s->name, "pre") && s->rows == 2 * 12 * 3 && s->columns == 80;
        }
        CHECK(in_saved == kept.bytes && recv_x && pre, "the list of what is kept");
        d.redispatch_x = 1;
        CHECK_STATUS(moe_ep_layer_saved(&d, &kept), MOE_OK);
        for (int i = 0; i < kept.count; ++i) CHECK(strcmp(kept.item[i].name, "recv_x"), "recv_x");
        d.layer.recompute = 1;
        CHECK_STATUS(moe_ep_layer_saved(&d, &kept), MOE_OK);
        CHECK(kept.bytes < in_saved, "without pre-activations");
    }
    bk_free(&j);
}

static void ep_backward(void)
{
    RUN(test_backward);
    RUN(test_backward_graph);
    RUN(test_backward_layers);
    RUN(test_backward_no_rows);
    RUN(test_backward_no_tokens);
    RUN(test_backward_own_buffers);
    RUN(test_backward_steps);
    RUN(test_backward_saved);
}

#endif
