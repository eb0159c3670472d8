/* backward_faults.h: refusals of the backward pass over ranks, and a rank that stops before each
   stage. */
#ifndef MOE_TESTS_EP_BACKWARD_FAULTS_H
#define MOE_TESTS_EP_BACKWARD_FAULTS_H

#include "tests/unit/ep/backward_case.h"

/* What is missing or contradicts is refused by name; nothing is written. */
static void test_backward_refusals(void)
{
    const bk_case o = {{2, 8, 64, 40, 6, 2, 0, MOE_EP_REDUCED, test_half(), 0, 0, 0, 0, 0, 0, 0, 0},
                       1,
                       0,
                       0,
                       0,
                       0,
                       0,
                       0,
                       1,
                       0};
    static bk_job j;
    static moe_ep_layer_backward_prepared p;
    if (!bk_new(&j, &o, 760)) return;
    const moe_ep_layer_backward_desc ok = j.ep[0];
    moe_ep_layer_backward_desc d;
    moe_layer_saved_list kept;
    int64_t rows;
    tgroup_use(&j.lay.g, 0);
#define BK_REFUSED(change, kind, field)                                                            \
    do {                                                                                           \
        d = ok;                                                                                    \
        change;                                                                                    \
        memset((void*)&p, 0xda, sizeof p);                                                         \
        CHECK_STATUS(moe_ep_layer_backward_prepare(&d, &p), MOE_STATUS(kind, field));              \
        test_empty(&p, sizeof p, __LINE__);                                                        \
    } while (0)
    BK_REFUSED(d.grads.layer.hidden = 64, MOE_ERR_CONFLICT, grads);
    BK_REFUSED(d.grads.dy = 0, MOE_ERR_NULL, dy);
    BK_REFUSED(d.grads.dx = (char*)d.grads.dx + 2, MOE_ERR_ALIGN, dx);
    BK_REFUSED(d.grads.dx = (void*)d.forward.layer.x, MOE_ERR_OVERLAP, dx);
    BK_REFUSED(d.grads.grad_dtype = 9, MOE_ERR_DTYPE, grad_dtype);
    BK_REFUSED(d.grads.accumulate = 2, MOE_ERR_OPTION, accumulate);
    BK_REFUSED(d.forward.peers = 0, MOE_ERR_NULL, peers);
    BK_REFUSED(d.forward.layer.fault = 0, MOE_ERR_NULL, fault);
    BK_REFUSED(d.forward.layer.saved = 0, MOE_ERR_NULL, saved);
    BK_REFUSED(d.forward.layer.saved_bytes -= 1, MOE_ERR_WORKSPACE, saved_bytes);
    BK_REFUSED(d.forward.layer.workspace = 0, MOE_ERR_NULL, workspace);
    BK_REFUSED(d.forward.layer.workspace_bytes = 256, MOE_ERR_WORKSPACE, workspace_bytes);
    BK_REFUSED(d.forward.redispatch_x = 2, MOE_ERR_OPTION, redispatch_x);
    BK_REFUSED(d.forward.num_rows = 4, MOE_ERR_CONFLICT, num_rows);
    BK_REFUSED(d.forward.pre = (void*)TEST_FAR, MOE_ERR_CONFLICT, pre);
    BK_REFUSED((d.forward.count_rows = 1, d.forward.num_rows = 4), MOE_ERR_NULL, pre);
    BK_REFUSED((d.forward.count_rows = 1, d.forward.num_rows = 4,
                d.forward.pre = (char*)d.forward.layer.workspace + 256),
               MOE_ERR_OVERLAP, pre);
    BK_REFUSED(
        (d.forward.count_rows = 1, d.forward.num_rows = 1000, d.forward.pre = (void*)TEST_FAR),
        MOE_ERR_RANGE, num_rows);
    BK_REFUSED(d.forward.count_rows = 1, MOE_ERR_CONFLICT, count_rows);
    BK_REFUSED((d.forward.side_stream = j.lay.g.side[0], d.forward.side_event[1] = 0), MOE_ERR_NULL,
               side_event);
    BK_REFUSED((d.overlap = 1, d.forward.side_stream = 0), MOE_ERR_NULL, side_stream);
    BK_REFUSED(d.overlap = 2, MOE_ERR_OPTION, overlap);
    BK_REFUSED(d.overlap_blocks = 4, MOE_ERR_CONFLICT, overlap);
    BK_REFUSED((d.overlap = 1, d.overlap_blocks = 129, d.forward.side_stream = j.lay.g.side[0]),
               MOE_ERR_RANGE, overlap_blocks);
    BK_REFUSED(d.grads.dy_stride = 32, MOE_ERR_STRIDE, dy_stride);
    BK_REFUSED(d.gradient_offset = MOE_PEERS_HEADER, MOE_ERR_OVERLAP, gradient_offset);
    BK_REFUSED(d.gradient_offset = 256, MOE_ERR_RANGE, gradient_offset);
    BK_REFUSED(d.forward.microbatch_tokens = 4, MOE_ERR_CONFLICT, microbatch_tokens);
    BK_REFUSED(d.gradient_offset = 100, MOE_ERR_RANGE, gradient_offset);
    BK_REFUSED(d.gradient_offset = 1 << 30, MOE_ERR_RANGE, region_bytes);
    BK_REFUSED(d.gradient_channel = 1, MOE_ERR_RANGE, gradient_channel);
    BK_REFUSED(d.gradient_channel = 9, MOE_ERR_RANGE, gradient_channel);
    BK_REFUSED(d.local_router = 2, MOE_ERR_OPTION, local_router);
#undef BK_REFUSED
    CHECK_STATUS(moe_ep_layer_backward_prepare(0, &p), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_ep_layer_backward_run(0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_ep_layer_saved(0, &kept), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_ep_layer_count(&ok.forward, 0, &rows),
                 MOE_STATUS(MOE_ERR_CONFLICT, count_rows));
    CHECK_STATUS(moe_ep_layer_begin(&ok.forward, 0), MOE_STATUS(MOE_ERR_CONFLICT, count_rows));
    CHECK_STATUS(moe_ep_layer_finish(&ok.forward, 0), MOE_STATUS(MOE_ERR_CONFLICT, count_rows));
    for (int r = 0; r < 2; ++r) {
        tgroup_use(&j.lay.g, r);
        CHECK(tbufs_untouched(BK_GRADIENTS(&j.rank[r])) && tbuf_holds(&j.rank[r].dx, 0),
              "a refused call wrote gradients");
    }
    TEST_CUDA(cudaSetDevice(0));
    bk_free(&j);
}

/* Rank 1 does nothing from some stage on: all others end with the same fault, which names it, and
   drouter, the last result, is as it was on every rank. Stages after which no rank waits any more
   stop nobody. */
static void test_backward_stopped(void)
{
    static bk_job j;
    static moe_ep_layer_backward_prepared p[3];
    const bk_case o = {{3, 8, 64, 40, 6, 2, 0, MOE_EP_REDUCED, test_half(), 0, 0, 0, 0, 0, 0, 0, 0},
                       1,
                       0,
                       0,
                       0,
                       0,
                       0,
                       0,
                       1,
                       0};
    for (int upto = 0; upto < MOE_EP_BACKWARD_STAGES; ++upto) {
        uint64_t word[3];
        if (MOE_ON_HOST && upto % 3) continue;
        if (!bk_new(&j, &o, 770)) continue;
        for (int r = 0; r < 3; ++r) {
            tgroup_use(&j.lay.g, r);
            j.lay.g.peers[r].timeout_ns = MOE_ON_HOST ? 300000000 : 50000000;
            CHECK_STATUS(moe_ep_layer_forward(&j.ep[r].forward, j.lay.g.stream[r]), MOE_OK);
            CHECK_STATUS(moe_ep_layer_backward_prepare(&j.ep[r], &p[r]), MOE_OK);
        }
        tgroup_wait(&j.lay.g);
        for (int stage = 0; stage < MOE_EP_BACKWARD_STAGES; ++stage)
            for (int r = 0; r < 3; ++r) {
                tgroup_use(&j.lay.g, r);
                if (r != 1 || stage < upto)
                    CHECK_STATUS(moe_ep_layer_backward_run_stage(&p[r], stage, j.lay.g.stream[r]),
                                 MOE_OK);
            }
        tgroup_wait(&j.lay.g);
        for (int r = 0; r < 3; ++r) {
            tgroup_use(&j.lay.g, r);
            word[r] = tgroup_fault(&j.lay.g, r);
            CHECK(tbuf_holds(&j.rank[r].drouter, 0), "stage %d: rank %d wrote drouter", upto, r);
        }
        CHECK(moe_peers_late_decode(word[0]).late == 1 && moe_peers_late_decode(word[2]).late == 1,
              "stage %d: %llx %llx", upto, (unsigned long long)word[0],
              (unsigned long long)word[2]);
        if (upto != MOE_EP_BACKWARD_DROUTER) /* at the last barrier both may give up at a time */
            CHECK(word[0] == word[2], "stage %d: other faults", upto);
        TEST_CUDA(cudaSetDevice(0));
        bk_free(&j);
    }
}

/* A rank that has met a stop fault of its own: all ranks have that fault after the step. */
static void test_backward_fault(void)
{
    static bk_job j;
    const bk_case o = {
        {3, 8, 64, 40, 6, 2, 0, MOE_EP_GATHERED, test_half(), 0, 0, 0, 0, 0, 0, 0, 0},
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        0};
    const uint64_t own = MOEI_FAULT_KEY(MOE_FAULT_ROWS_FULL, 1, 77);
    if (bk_new(&j, &o, 780)) {
        for (int r = 0; r < 3; ++r) {
            tgroup_use(&j.lay.g, r);
            CHECK_STATUS(moe_ep_layer_forward(&j.ep[r].forward, j.lay.g.stream[r]), MOE_OK);
        }
        tgroup_wait(&j.lay.g);
        tgroup_use(&j.lay.g, 1);
        TEST_CUDA(cudaMemcpy(j.lay.g.fault[1], &own, 8, cudaMemcpyHostToDevice));
        for (int r = 0; r < 3; ++r) {
            tgroup_use(&j.lay.g, r);
            CHECK_STATUS(moe_ep_layer_backward(&j.ep[r], j.lay.g.stream[r]), MOE_OK);
        }
        tgroup_wait(&j.lay.g);
        for (int r = 0; r < 3; ++r) {
            tgroup_use(&j.lay.g, r);
            CHECK(tgroup_fault(&j.lay.g, r) == own, "rank %d has another fault", r);
            CHECK(tbufs_untouched(BK_GRADIENTS(&j.rank[r])) && tbuf_holds(&j.rank[r].dx, 0),
                  "rank %d wrote gradients", r);
        }
        TEST_CUDA(cudaSetDevice(0));
    }
    bk_free(&j);
}

static void ep_backward_faults(void)
{
    RUN(test_backward_refusals);
    RUN(test_backward_stopped);
    RUN(test_backward_fault);
}

#endif
