/* replay.h: stages, same bits, graphs, faults.

     test_stages     all stages in order: the bits of a call; one [num_rows, H] buffer for dy_rows,
                     x_rows and rows, filled between the stages
     test_bits       many times: the same bits
     test_graph      a graph replayed with other rows and weights
     test_bad_rows   slots out of range set the fault word, and count as none
     test_stopped    after a stop fault nothing is written
     test_nan        NaN in one row's dy stays with its expert and its row */
#ifndef MOE_TESTS_EXPERTS_BACKWARD_REPLAY_H
#define MOE_TESTS_EXPERTS_BACKWARD_REPLAY_H

#include "tests/unit/experts_backward/case.h"

TEST_CALL(run_backward, moe_experts_backward, moe_experts_backward_desc)

#define ALL_RESULTS(b)                                                                             \
    TBUFS(&(b)->rows, &(b)->dbias1, &(b)->dbias2, &(b)->dweights, &(b)->dw1.part[0][0],            \
          &(b)->dw2.part[0][0])

static void test_stages(void)
{
    trand r = trand_new(11);
    for (int i = 0; i < 3; ++i) {
        backward_case c = normal_case(40, 64, 40, 5, 2);
        moe_experts_backward_prepared p;
        backward_bufs b;
        void* first[6];
        c.gathered = i > 0;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_experts_backward(&b.d, test_now.stream), MOE_OK);
        tbufs_copy(ALL_RESULTS(&b), first);
        reset(&b, &c);
        if (i == 2) b.d.dy_rows = b.d.x_rows = b.d.rows; /* bf16 rows: of the same size */
        CHECK_STATUS(moe_experts_backward_prepare(&b.d, &p), MOE_OK);
        for (int stage = 0; stage < MOE_EXPERTS_BACKWARD_STAGES; ++stage) {
            const tbuf* from = stage < MOE_EXPERTS_BACKWARD_DWEIGHTS ? &b.dy_rows : &b.x_rows;
            if (i == 2 && stage < MOE_EXPERTS_BACKWARD_ROWS)
                TEST_CUDA(cudaMemcpyAsync(b.rows.p, from->p, from->bytes, cudaMemcpyDeviceToDevice,
                                          test_now.stream));
            CHECK_STATUS(moe_experts_backward_run_stage(&p, stage, test_now.stream), MOE_OK);
        }
        tbufs_same(ALL_RESULTS(&b), first, "stages");
        CHECK_STATUS(moe_experts_backward_run_stage(&p, MOE_EXPERTS_BACKWARD_STAGES, 0),
                     MOE_STATUS(MOE_ERR_OPTION, stage));
        CHECK_STATUS(moe_experts_backward_run_stage(&p, -1, 0), MOE_STATUS(MOE_ERR_OPTION, stage));
        CHECK_STATUS(moe_experts_backward_run_stage(0, 0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        tbufs_free_copies(ALL_RESULTS(&b), first);
        bufs_free(&b);
    }
}

static void test_bits(void)
{
    trand r = trand_new(12);
    for (int i = 0; i < 3; ++i) {
        backward_case c = normal_case(130, 72, 136, 5, 2);
        backward_bufs b;
        c.tile = MOE_TILE_AUTO, c.gathered = i == 1, c.in_order = i == 2, c.own_dpre = 1;
        bufs_new(&b, &c, &r);
        test_same_bits("experts_backward", run_backward, &b.d, ALL_RESULTS(&b),
                       MOE_ON_HOST ? 3 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

static void test_graph(void)
{
    trand r = trand_new(13);
    backward_case c = normal_case(60, 48, 40, 6, 2);
    backward_bufs b;
    tgraph g;
    bufs_new(&b, &c, &r);
    if (tgraph_capture(&g, run_backward, &b.d)) {
        for (int i = 0; i < 4; ++i) {
            const int64_t slots = (int64_t)c.T * c.K;
            c.one = i == 2, c.dropped = i * 15;
            fill_routing(&b, &c, &r);
            for (int64_t s = 0; s < slots; ++s) b.h_weights[s] = trand_normal(&r);
            tbuf_put(&b.weights, b.h_weights);
            tbuf_put(&b.offset, b.h_offset);
            tbuf_put(&b.row_slot, b.h_row_slot), tbuf_put(&b.slot_row, b.h_slot_row);
            reset(&b, &c);
            tgraph_launch(&g);
            compare(&b, &c);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
}

static void test_bad_rows(void)
{
    trand r = trand_new(14);
    for (int i = 0; i < 6; ++i) {
        backward_case c = normal_case(30, 48, 40, 4, 2);
        const int bad = (int)trand_int(&r, 0, 59);
        backward_bufs b;
        uint64_t word;
        int32_t slot;
        bufs_new(&b, &c, &r);
        slot = b.h_row_slot[bad];
        b.h_row_slot[bad] = test_out_of_range(i, 60);
        if (b.h_row_slot[bad] == -1) b.h_row_slot[bad] = -9;
        b.h_slot_row[slot] = -1;
        tbuf_put(&b.row_slot, b.h_row_slot), tbuf_put(&b.slot_row, b.h_slot_row);
        CHECK_STATUS(moe_experts_backward(&b.d, test_now.stream), MOE_OK);
        word = tfault_word(&b.fault);
        CHECK(word == MOEI_FAULT_KEY(MOE_FAULT_BAD_ROW, TEST_RANK, bad), "fault %llx, row %d",
              (unsigned long long)word, bad);
        tfault_put(&b.fault, MOE_FAULT_NONE, 0);
        b.h_row_slot[bad] = -1; /* for the reference */
        compare(&b, &c);
        bufs_free(&b);
    }
}

static void test_stopped(void)
{
    trand r = trand_new(15);
    for (int in_order = 0; in_order < 2; ++in_order) {
        backward_case c = normal_case(30, 48, 40, 4, 2);
        backward_bufs b;
        c.in_order = in_order;
        bufs_new(&b, &c, &r);
        tfault_put(&b.fault, MOE_FAULT_BAD_OFFSET, 3);
        CHECK_STATUS(moe_experts_backward(&b.d, test_now.stream), MOE_OK);
        CHECK(tbufs_untouched(ALL_RESULTS(&b)) && tbuf_holds(&b.pre, b.h_pre) &&
                  tbufs_untouched(TBUFS(&b.act, &b.dot)),
              "after a stop fault");
        bufs_free(&b);
    }
}

static void test_nan(void)
{
    trand r = trand_new(16);
    backward_case c = normal_case(40, 48, 40, 8, 1);
    backward_bufs b;
    float* dw2;
    uint16_t* rows;
    int token = 17, e = 0;
    bufs_new(&b, &c, &r);
    while (b.h_offset[e + 1] <= b.h_slot_row[token]) ++e;
    moe_store(b.h_dy, (int64_t)token * c.H + 3, c.dtype, NAN);
    tbuf_put(&b.dy, b.h_dy);
    CHECK_STATUS(moe_experts_backward(&b.d, test_now.stream), MOE_OK);
    dw2 = (float*)tbuf_copy(&b.dw2.part[0][0]);
    rows = (uint16_t*)tbuf_copy(&b.rows);
    for (int64_t i = 0; i < (int64_t)c.E * c.H * c.I; ++i)
        if (i / (c.H * c.I) != e) CHECK(dw2[i] == dw2[i], "dw2 of expert %lld", (long long)i);
    for (int64_t i = 0; i < (int64_t)b.h_offset[c.E] * c.H; ++i) {
        const float v = moe_load(rows, i, c.dtype);
        CHECK((v != v) == (i / c.H == b.h_slot_row[token]), "row %lld", (long long)(i / c.H));
    }
    TFREE(dw2, rows);
    bufs_free(&b);
}

static void experts_backward_replay(void)
{
    RUN(test_stages);
    RUN(test_bits);
    RUN(test_graph);
    RUN(test_bad_rows);
    RUN(test_stopped);
    RUN(test_nan);
}

#endif
