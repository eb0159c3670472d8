/* replay.h: calls that must give the same bits: halves, runs, graphs, rows far apart.

     test_experts_halves     runs the two products one by one: the bits of moe_experts
     test_experts_same_bits  runs many times: the same bits
     test_experts_graph      launches a captured MLP again with other routings
     test_experts_batch      plans the same tiles for few rows as for many with batch_invariant, and
                             without it others
     test_experts_large      runs 4096 tokens on 64 experts, on a GPU
     test_experts_past_2_31  puts rows past 2^32 elements, of x, act, the output or one expert's
                             output: the bits of the same call on dense rows */
#ifndef MOE_TESTS_EXPERTS_REPLAY_H
#define MOE_TESTS_EXPERTS_REPLAY_H

#include "tests/unit/experts/case.h"

TEST_CALL(call_experts, moe_experts, moe_experts_desc)

static void test_experts_halves(void)
{
    trand r = trand_new(8);
    experts_case c = normal_case(30, 72, 56, 4, 2);
    experts_bufs b;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_experts_up(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_experts_down(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_experts_up(&b.d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b.rows.all, 0) && !tbuf_holds(&b.act, 0), "up writes act alone");
    {
        void* act = tbuf_copy(&b.act);
        void* rows;
        CHECK_STATUS(moe_experts_down(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.act, act), "down writes rows alone");
        compare(&b, &c);
        rows = tbuf_copy(&b.rows.all);
        tbufs_poison(TBUFS(&b.act, &b.rows.all));
        CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.act, act) && tbuf_holds(&b.rows.all, rows), "both at once");
        TFREE(act, rows);
    }
    bufs_free(&b);
}

static void test_experts_same_bits(void)
{
    trand r = trand_new(12);
    for (int i = 0; i < 2; ++i) {
        experts_case c = normal_case(45, 72, 136, 5, 2);
        experts_bufs b;
        c.tile = i ? MOE_TILE_32x128 : MOE_TILE_AUTO;
        c.rows_dtype = i ? MOE_FP32 : c.dtype;
        bufs_new(&b, &c, &r);
        test_same_bits("experts", call_experts, &b.d, TBUFS(&b.act, &b.rows.all),
                       MOE_ON_HOST ? 3 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

static void test_experts_graph(void)
{
    trand r = trand_new(13);
    for (int i = 0; i < 2; ++i) { /* on Hopper the largest tile takes the wgmma path */
        experts_case c = normal_case(33, 72, 56, 6, 3);
        experts_bufs b;
        tgraph g;
        c.tile = i ? MOE_TILE_128x256 : MOE_TILE_64x64;
        if (test_gemm_status(c.dtype, c.tile) != MOE_OK) continue;
        bufs_new(&b, &c, &r);
        if (tgraph_capture(&g, call_experts, &b.d)) {
            CHECK(untouched(&b), "capture itself runs nothing");
            for (int run = 0; run < 3; ++run) {
                c.dropped = 30 * run;
                c.one = run == 2;
                fill_rows(&b, &c, &r);
                tbuf_put(&b.offset, b.h_offset);
                tbuf_put(&b.row_slot, b.h_row_slot);
                tbufs_poison(TBUFS(&b.act, &b.rows.all));
                tgraph_launch(&g);
                compare(&b, &c);
            }
            tgraph_free(&g);
        }
        bufs_free(&b);
    }
}

static void test_experts_batch(void)
{
    trand r = trand_new(14);
    for (int i = 0; i < 2; ++i) {
        experts_case c = normal_case(2000, 264, 264, 4, 2);
        experts_bufs b;
        moe_gemm_plan up[2], down[2];
        c.tile = 0;
        bufs_new(&b, &c, &r);
        b.d.batch_invariant = i;
        for (int few = 0; few < 2; ++few) {
            b.d.num_rows = few ? 1 : 0;
            CHECK_STATUS(moe_experts_plan(&b.d, &up[few], &down[few]), MOE_OK);
        }
        CHECK(!i || (up[0].tile == up[1].tile && down[0].tile == down[1].tile),
              "tiles %d %d, %d %d", up[0].tile, up[1].tile, down[0].tile, down[1].tile);
        CHECK(i || (up[0].tile != up[1].tile && down[0].tile != down[1].tile),
              "few rows take the tile of many: this test shows nothing");
        bufs_free(&b);
    }
}

static void test_experts_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(14);
    for (int i = 0; i < 3; ++i) {
        experts_case c = normal_case(i == 2 ? 64 : 4096, 1024, 512, 64, 8);
        c.dtype = c.rows_dtype = i == 1 ? MOE_FP16 : MOE_BF16;
        c.gate_up = i + 1;
        c.bias1 = c.bias2 = i == 1;
        c.out_table = i == 0;
        c.tile = MOE_TILE_AUTO;
        c.sampled = i == 2 ? 5 : 211;
        run_case(&c, &r);
    }
#endif
}

static void test_experts_past_2_31(void)
{
    enum { X, ACT, ROWS, TABLE };
    static const char* const name[] = {"x", "act", "rows", "an expert's rows"};
    trand r = trand_new(15);
    for (int which = X; which <= TABLE; ++which) {
        experts_case c = normal_case(5, 72, 56, 3, 2);
        experts_bufs b;
        moe_experts_desc d;
        twide wide;
        tbuf* out = &b.rows.all;
        void *act, *rows;
        if (!twide_new(&wide, name[which], which == X ? c.T : c.T * c.K, which == ACT ? c.I : c.H,
                       c.dtype))
            continue;
        c.out_table = c.one = which == TABLE;
        bufs_new(&b, &c, &r);
        for (int e = 0; e < c.E && c.one; ++e) /* the expert that has all rows */
            if (b.h_offset[e + 1] > b.h_offset[e]) out = &b.rows.part[e];
        CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c);
        act = tbuf_copy(&b.act);
        rows = tbuf_copy(out);
        tbufs_poison(TBUFS(&b.act, out));
        d = b.d;
        if (which == X) {
            d.x = wide.p, d.x_stride = wide.stride;
            twide_put(&wide, b.h_x);
        } else if (which == ACT) {
            d.act = wide.p, d.act_stride = wide.stride;
        } else {
            void* address[MOST_EXPERTS];
            for (int e = 0; e < c.E; ++e) address[e] = wide.p;
            if (which == ROWS) d.rows = wide.p;
            else tbuf_put(&b.rows.table, address);
            d.row_stride = wide.stride;
        }
        CHECK_STATUS(moe_experts(&d, test_now.stream), MOE_OK);
        if (which == ACT) twide_holds(&wide, act);
        else CHECK(tbuf_holds(&b.act, act), "other bits in act, wide %s", name[which]);
        if (which >= ROWS) twide_holds(&wide, rows);
        else CHECK(tbuf_holds(out, rows), "other bits in rows, wide %s", name[which]);
        if (which == X) CHECK(twide_holds(&wide, b.h_x), "x was written");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        TFREE(act, rows);
        twide_free(&wide);
        bufs_free(&b);
    }
}

static void experts_replay(void)
{
    RUN(test_experts_halves);
    RUN(test_experts_same_bits);
    RUN(test_experts_graph);
    RUN(test_experts_batch);
    RUN(test_experts_large);
    RUN(test_experts_past_2_31);
}

#endif
