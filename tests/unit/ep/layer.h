/* layer.h: the layer over ranks beside the layer on one GPU, which has its own tests: every rank
   runs both on its tokens. */
#ifndef MOE_TESTS_EP_LAYER_H
#define MOE_TESTS_EP_LAYER_H

#include "tests/unit/ep/layer_case.h"

static int lay_new(lay_job* j, const lay_case* c, uint64_t salt)
{
    return lay_new_region(j, c, salt, 0);
}

/* Queues the layer of all ranks. */
static void lay_run(lay_job* j)
{
    static moe_ep_layer_prepared p[TGROUP_MOST];
    for (int r = 0; r < j->c.W; ++r) {
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_ep_layer_prepare(&j->rank[r].ep, &p[r]), MOE_OK);
    }
    for (int part = 0; part < (j->c.parts ? MOE_EP_LAYER_PARTS : 1); ++part)
        for (int r = 0; r < j->c.W; ++r) {
            tgroup_use(&j->g, r);
            if (j->c.parts)
                CHECK_STATUS(moe_ep_layer_run_part(&p[r], part, j->g.stream[r]), MOE_OK);
            else CHECK_STATUS(moe_ep_layer_run(&p[r], j->g.stream[r]), MOE_OK);
        }
    TEST_CUDA(cudaSetDevice(0));
}

/* Checks y of rank r against the rows of the one-GPU layer: added up in double; and added up by
   rank with each rank's sum rounded. */
static void lay_check_reduced(lay_job* j, int r)
{
    const lay_case* c = &j->c;
    lay_rank* k = j->rank + r;
    const int64_t H = c->H;
    moe_layer_view v;
    tgroup_use(&j->g, r);
    if (!CHECK_STATUS(moe_layer_get_view(&k->one, &v), MOE_OK) || !k->T) return;
    char* rows = (char*)lay_get(v.rows, v.num_rows * H * 2);
    moe_place* place = (moe_place*)lay_get(v.place, (int64_t)k->T * c->K * 8);
    int32_t* ids = (int32_t*)lay_get(v.ids, (int64_t)k->T * c->K * 4);
    float* weights = (float*)lay_get(v.weights, (int64_t)k->T * c->K * 4);
    char* shared = c->shared ? (char*)lay_get(v.shared_rows, k->T * H * 2) : 0;
    void* y = tbuf_copy(&k->y);
    double *exact = tzeros(k->T * H), *ideal = tzeros(k->T * H), *part = tzeros(c->W);
    moe_ref_exchange_rank t;
    memset(&t, 0, sizeof t);
    t.ids = ids;
    if (c->replicas) {
        t.replica_offset = (const int32_t*)tbuf_copy(&k->offset);
        t.replica = (const moe_ep_expert*)tbuf_copy(&k->choice);
    }
    for (int64_t i = 0; i < k->T; ++i)
        for (int64_t h = 0; h < H; ++h) {
            double sum = moe_load(k->h_residual, i * H + h, c->dtype), rounded;
            for (int q = 0; q < c->W; ++q) part[q] = 0;
            for (int s = 0; s < c->K; ++s) {
                const moe_ep_expert e = moe_ref_target(&t, i * c->K + s, c->K, c->E, c->W);
                const moe_place p = place[i * c->K + s];
                if (e.rank >= 0)
                    part[e.rank] += (double)weights[i * c->K + s] *
                                    moe_load(rows, (int64_t)p.row * H + h, c->dtype);
            }
            rounded = sum;
            for (int q = 0; q < c->W; ++q) {
                sum += part[q];
                rounded += test_rounded(part[q], c->dtype);
            }
            if (shared) {
                sum += moe_load(shared, i * H + h, c->dtype);
                rounded += moe_load(shared, i * H + h, c->dtype);
            }
            exact[i * H + h] = sum;
            ideal[i * H + h] = test_rounded(rounded, c->dtype);
        }
    CHECK_CLOSE("y", y, c->dtype, H, exact, ideal, k->T, H);
    TFREE(rows, place, ids, weights, shared, y, exact, ideal, part, (void*)t.replica_offset,
          (void*)t.replica);
}

static void lay_compare(const lay_case* c, uint64_t salt)
{
    static lay_job j;
    if (lay_new(&j, c, salt)) {
        for (int r = 0; r < c->W; ++r) {
            tgroup_use(&j.g, r);
            CHECK_STATUS(moe_layer_forward(&j.rank[r].one, j.g.stream[r]), MOE_OK);
        }
        lay_run(&j);
        tgroup_wait(&j.g);
        tgroup_clean(&j.g, __LINE__);
        for (int r = 0; r < c->W; ++r) {
            void* one;
            tgroup_use(&j.g, r);
            one = tbuf_copy(&j.rank[r].y1);
            if (c->form == MOE_EP_GATHERED)
                CHECK(tbuf_holds(&j.rank[r].y, one), "W=%d rank %d: not the bits of one GPU", c->W,
                      r);
            else lay_check_reduced(&j, r);
            free(one);
        }
    }
    lay_free(&j);
}

static void test_forward(void)
{
    const lay_case list[] = {
        /* W, T, H, I, E, K, dispatch, combine, dtype, shared, replicas, multiple, from_ids, parts, bias */
        {1, 9, 64, 40, 5, 2, 0, MOE_EP_REDUCED, 0, 0, 0, 0, 0, 0, 0, 0, 0},
        {1, 9, 64, 40, 5, 2, 0, MOE_EP_GATHERED, 1, 0, 0, 0, 0, 0, 0, 0, 0},
        {2, 30, 64, 40, 8, 3, 0, MOE_EP_REDUCED, 0, 0, 0, 0, 0, 0, 1, 0, 0},
        {2, 30, 64, 40, 8, 3, 0, MOE_EP_GATHERED, 0, 0, 0, 0, 0, 0, 1, 0, 0},
        {4, 12, 64, 40, 7, 2, 0, MOE_EP_REDUCED, 1, 24, 0, 0, 0, 0, 0, 0,
         0}, /* E 7 on W 4, shared */
        {4, 12, 64, 40, 7, 2, 0, MOE_EP_GATHERED, 0, 24, 0, 0, 0, 1, 1, 0, 0},
        {4, 12, 64, 40, 2, 2, 0, MOE_EP_REDUCED, 0, 0, 0, 0, 0, 1, 0, 0, 0}, /* E 2 on W 4 */
        {4, 12, 64, 40, 2, 2, 0, MOE_EP_GATHERED, 1, 0, 0, 0, 0, 0, 0, 0, 0},
        {3, 15, 64, 40, 6, 3, 0, MOE_EP_REDUCED, 0, 0, 1, 0, 1, 0, 0, 0,
         0}, /* replicas, ids given */
        {3, 15, 64, 40, 6, 3, 0, MOE_EP_GATHERED, 0, 0, 1, 8, 0, 0, 0, 0,
         0}, /* replicas, padded rows */
        {8, 8, 64, 40, 16, 4, 0, MOE_EP_GATHERED, 0, 0, 0, 0, 1, 0, 0, 0, 0},
        {8, 8, 64, 40, 16, 4, 0, MOE_EP_REDUCED, 0, 0, 0, 8, 1, 0, 0, 0, 0},
        {4, 13, 64, 40, 7, 2, 0, MOE_EP_REDUCED, 0, 24, 0, 0, 0, 0, 1, 0, 4}, /* micro-batches */
        {4, 13, 64, 40, 7, 2, 0, MOE_EP_GATHERED, 0, 24, 0, 8, 1, 0, 1, 0, 6},
        {2, 30, 64, 40, 8, 3, 0, MOE_EP_GATHERED, 1, 0, 0, 0, 0, 0, 0, 0, 1},
        {2, 30, 64, 40, 8, 3, 0, MOE_EP_REDUCED, 1, 0, 0, 0, 0, 0, 0, 0, 64},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; ++i) {
        lay_case c = list[i];
        c.dtype = lay_half(c.dtype);
        for (c.dispatch = MOE_EP_DEDUPLICATED; c.dispatch <= MOE_EP_ALL_GATHER_COPY; ++c.dispatch) {
            if (MOE_ON_HOST && c.dispatch > 1 && c.dispatch != 2 + (int)i % 3) continue;
            if (c.form != MOE_EP_GATHERED)
                c.form = c.dispatch % 2 ? MOE_EP_REDUCED : MOE_EP_REDUCE_SCATTER;
            lay_compare(&c, 300 + i);
        }
    }
}

/* What the layer does not carry, and what is missing, is refused by name; y stays as it was. */
static void test_layer_refusals(void)
{
    const lay_case c = {2, 8, 64, 40, 6, 2, 0, MOE_EP_REDUCED, test_half(), 0, 0, 0, 0, 0, 0, 0, 0};
    static lay_job j;
    if (!lay_new(&j, &c, 390)) return;
    const moe_ep_layer_desc ok = j.rank[0].ep;
    moe_ep_layer_desc d;
    moe_ep_layer_prepared p;
    tgroup_use(&j.g, 0);
#define LAY_REFUSED(change, kind, field)                                                           \
    do {                                                                                           \
        d = ok;                                                                                    \
        change;                                                                                    \
        memset((void*)&p, 0xda, sizeof p);                                                         \
        CHECK_STATUS(moe_ep_layer_prepare(&d, &p), MOE_STATUS(kind, field));                       \
        test_empty(&p, sizeof p, __LINE__);                                                        \
    } while (0)
    LAY_REFUSED(d.layer.route.capacity = 4, MOE_ERR_CONFLICT, route);
    LAY_REFUSED(d.layer.route.replica_offset = (const int32_t*)TEST_FAR, MOE_ERR_CONFLICT, route);
    LAY_REFUSED(d.layer.route.slot_row = (int32_t*)TEST_FAR, MOE_ERR_CONFLICT, route);
    LAY_REFUSED(d.layer.gate.whole_batch = 1, MOE_ERR_CONFLICT, gate);
    LAY_REFUSED(d.layer.rank = 1, MOE_ERR_CONFLICT, rank);
    LAY_REFUSED(d.peers = 0, MOE_ERR_NULL, peers);
    LAY_REFUSED(d.layer.fault = 0, MOE_ERR_NULL, fault);
    LAY_REFUSED(d.layer.x = 0, MOE_ERR_NULL, x);
    LAY_REFUSED(d.layer.w1.base = 0, MOE_ERR_NULL, w1);
    LAY_REFUSED(d.layer.router = 0, MOE_ERR_NULL, router);
    LAY_REFUSED(d.layer.y = 0, MOE_ERR_NULL, y);
    LAY_REFUSED(d.layer.dtype = MOE_FP32, MOE_ERR_DTYPE, dtype);
    LAY_REFUSED(d.layer.num_tokens = 9, MOE_ERR_RANGE, num_tokens);
    LAY_REFUSED(d.layer.hidden = 60, MOE_ERR_MULTIPLE, hidden);
    LAY_REFUSED(d.layer.top_k = 7, MOE_ERR_RANGE, top_k);
    LAY_REFUSED(d.buffers.combine_form = 9, MOE_ERR_OPTION, combine_form);
    LAY_REFUSED(d.buffers.dispatch_form = 9, MOE_ERR_OPTION, dispatch_form);
    LAY_REFUSED(d.microbatch_tokens = -1, MOE_ERR_RANGE, microbatch_tokens);
    LAY_REFUSED((d.microbatch_tokens = 3, d.layer.num_tokens = 9), MOE_ERR_RANGE, num_tokens);
    LAY_REFUSED(d.buffers.hidden = 64, MOE_ERR_CONFLICT, buffers);
    LAY_REFUSED(d.buffers.num_scales = 1, MOE_ERR_CONFLICT, buffers);
    LAY_REFUSED(d.buffers.max_tokens = 4000, MOE_ERR_RANGE, region_bytes);
    LAY_REFUSED(d.layer.workspace = 0, MOE_ERR_NULL, workspace);
    LAY_REFUSED(d.layer.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
#undef LAY_REFUSED
    for (int r = 0; r < 2; ++r) {
        tgroup_use(&j.g, r);
        CHECK(tbuf_holds(&j.rank[r].y, 0), "a refused call wrote y");
    }
    TEST_CUDA(cudaSetDevice(0));
    lay_free(&j);
}

/* The layer as a graph, one a rank, replayed with other tokens; and the same bits each time. */
static void test_layer_graph(void)
{
    static lay_job j;
    for (int pair = 0; pair < 12; ++pair) {
        const int dispatch = MOE_EP_DEDUPLICATED + pair % 4, form = MOE_EP_REDUCED + pair / 4;
        const lay_case c = {4,  10, 64, 40, 7, 2, dispatch, form, test_half(),
                            16, 0,  0,  0,  0, 1, 0,        0};
        trand q = trand_new(395);
        if (MOE_ON_HOST && pair % 5 && pair != 3) continue; /* each form once */
        if (lay_new(&j, &c, 396)) {
            cudaGraph_t graph[4];
            cudaGraphExec_t exec[4];
            for (int r = 0; r < 4; ++r) {
                tgroup_use(&j.g, r);
                TEST_CUDA(cudaStreamBeginCapture(j.g.stream[r], cudaStreamCaptureModeThreadLocal));
            }
            lay_run(&j);
            for (int r = 0; r < 4; ++r) {
                tgroup_use(&j.g, r);
                TEST_CUDA(cudaStreamEndCapture(j.g.stream[r], &graph[r]));
            }
            for (int r = 0; r < 4; ++r) {
                tgroup_use(&j.g, r);
                TEST_CUDA(cudaGraphInstantiate(&exec[r], graph[r], 0));
                TEST_CUDA(cudaGraphDestroy(graph[r]));
            }
            for (int n = 0; n < 3; ++n) {
                void* first[4];
                for (int r = 0; r < 4; ++r) {
                    void* x = lay_draw(&q, (int64_t)j.rank[r].T * c.H, c.dtype, 1.0f);
                    tgroup_use(&j.g, r);
                    tbuf_put(&j.rank[r].x, x);
                    free(x);
                    CHECK_STATUS(moe_layer_forward(&j.rank[r].one, j.g.stream[r]), MOE_OK);
                }
                for (int again = 0; again < 2; ++again) {
                    for (int r = 0; r < 4; ++r) {
                        tgroup_use(&j.g, r);
                        tbuf_poison(&j.rank[r].y);
                    }
                    for (int r = 0; r < 4; ++r) {
                        tgroup_use(&j.g, r);
                        TEST_CUDA(cudaGraphLaunch(exec[r], j.g.stream[r]));
                    }
                    tgroup_wait(&j.g);
                    for (int r = 0; r < 4; ++r) {
                        tgroup_use(&j.g, r);
                        if (again)
                            CHECK(tbuf_holds(&j.rank[r].y, first[r]), "other bits, rank %d", r);
                        else first[r] = tbuf_copy(&j.rank[r].y);
                    }
                }
                tgroup_clean(&j.g, __LINE__);
                for (int r = 0; r < 4; ++r) {
                    void* one;
                    tgroup_use(&j.g, r);
                    one = tbuf_copy(&j.rank[r].y1);
                    if (form == MOE_EP_GATHERED)
                        CHECK(tbuf_holds(&j.rank[r].y, one), "replay %d, rank %d", n, r);
                    else lay_check_reduced(&j, r);
                    TFREE(one, first[r]);
                }
            }
            for (int r = 0; r < 4; ++r) TEST_CUDA(cudaGraphExecDestroy(exec[r]));
        }
        lay_free(&j);
    }
}

static void ep_layer(void)
{
    RUN(test_forward);
    RUN(test_layer_refusals);
    RUN(test_layer_graph);
}

#endif
