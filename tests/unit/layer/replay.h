/* replay.h: calls that must give the same bits: parts, prepared, runs, graphs, rows far apart.

     test_layer_parts      runs all parts in order: the bits of the layer, workspace included; each
                           part writes its own outputs alone
     test_layer_prepared   runs a prepared layer with other weight tables and other inputs: reads
                           both when it runs, and gives the bits of a call
     test_layer_same_bits  runs many times: the same bits
     test_layer_batch      runs some tokens alone: with batch_invariant the same bits
     test_layer_graph      launches a captured layer again with other inputs: the bits of a call
     test_layer_past_2_31  puts rows past 2^32 elements, of x, the residual or y, also y over x: the
                           bits of the same call on dense rows, workspace included */
#ifndef MOE_TESTS_LAYER_REPLAY_H
#define MOE_TESTS_LAYER_REPLAY_H

#include "tests/unit/layer/compare.h"

TEST_CALL(call_layer, moe_layer_forward, moe_layer_desc)

static moe_status call_parts(void* d, cudaStream_t stream)
{
    moe_layer_prepared p;
    MOE_TRY(moe_layer_prepare((const moe_layer_desc*)d, &p));
    for (int part = 0; part < MOE_LAYER_PARTS; ++part)
        MOE_TRY(moe_layer_run_part(&p, part, stream));
    return MOE_OK;
}

static void test_layer_parts(void)
{
    trand r = trand_new(10);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        layer_case c = normal_case(40, 64, 40, 8, 2);
        layer_bufs b;
        moe_layer_prepared p;
        void *y, *workspace;
        c.from = from;
        c.residual = RESIDUAL;
        c.shared = from == FROM_LOGITS ? 0 : 48;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        y = tbuf_copy(&b.y);
        workspace = tbuf_copy(&b.workspace);
        reset(&b, &c);
        CHECK_STATUS(call_parts(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.y, y) && tbuf_holds(&b.workspace, workspace), "from %d", from);
        compare(&b, &c);
        reset(&b, &c);
        CHECK_STATUS(moe_layer_prepare(&b.d, &p), MOE_OK);
        for (int part = 0; part < MOE_LAYER_PARTS; ++part) {
            CHECK(tbuf_holds(&b.y, 0), "before part %d", part);
            CHECK_STATUS(moe_layer_run_part(&p, part, test_now.stream), MOE_OK);
            if (part == MOE_LAYER_ROUTER || (part == MOE_LAYER_GATE && from == FROM_IDS))
                CHECK(tbuf_holds(&b.workspace, 0) == (from != FROM_ROUTER), "part %d", part);
        }
        CHECK(tbuf_holds(&b.y, y), "one by one");
        CHECK_STATUS(moe_layer_run_part(&p, -1, test_now.stream), MOE_STATUS(MOE_ERR_OPTION, part));
        CHECK_STATUS(moe_layer_run_part(&p, MOE_LAYER_PARTS, test_now.stream),
                     MOE_STATUS(MOE_ERR_OPTION, part));
        CHECK_STATUS(moe_layer_run_part(0, 0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_run(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_prepare(&b.d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        TFREE(y, workspace);
        bufs_free(&b);
    }
    CHECK(strcmp(moe_layer_part_name(MOE_LAYER_ROUTER), "router") == 0 &&
              strcmp(moe_layer_part_name(MOE_LAYER_SHARED_UP), "shared_up") == 0 &&
              strcmp(moe_layer_part_name(MOE_LAYER_SHARED_DOWN), "shared_down") == 0 &&
              strcmp(moe_layer_part_name(MOE_LAYER_COMBINE), "combine") == 0 &&
              strcmp(moe_layer_part_name(-1), "?") == 0 &&
              strcmp(moe_layer_part_name(MOE_LAYER_PARTS), "?") == 0,
          "names of the parts");
}

static void test_layer_prepared(void)
{
    trand r = trand_new(31);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        layer_case c = normal_case(33, 64, 40, 4, 2);
        layer_bufs b;
        moe_layer_prepared p;
        void *first, *y, *home[2];
        c.from = from;
        c.table = 1;
        c.shared = from == FROM_LOGITS ? 48 : 0;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_layer_prepare(&b.d, &p), MOE_OK);
        CHECK(untouched(&b, &c), "preparing runs nothing");
        CHECK_STATUS(moe_layer_run(&p, test_now.stream), MOE_OK);
        compare(&b, &c);
        first = tbuf_copy(&b.y);
        for (int i = 0; i < 2; ++i) { /* exchanges the matrices of experts 0 and 1 */
            tweights* w = i ? &b.mlp.w2 : &b.mlp.w1;
            void* entry[TWEIGHTS_MOST];
            home[i] = tbuf_copy(&w->table[0]);
            memcpy(entry, home[i], w->table[0].bytes);
            entry[0] = ((void**)home[i])[1];
            entry[1] = ((void**)home[i])[0];
            tbuf_put(&w->table[0], entry);
        }
        reset(&b, &c);
        CHECK_STATUS(moe_layer_run(&p, test_now.stream), MOE_OK);
        y = tbuf_copy(&b.y);
        CHECK(memcmp(y, first, b.y.bytes) != 0, "exchanged experts change nothing");
        reset(&b, &c);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.y, y), "a run gives other bits than a call");
        tbuf_put(&b.mlp.w1.table[0], home[0]);
        tbuf_put(&b.mlp.w2.table[0], home[1]);
        fill_inputs(&b, &c, &r);
        reset(&b, &c);
        CHECK_STATUS(moe_layer_run(&p, test_now.stream), MOE_OK);
        compare(&b, &c);
        TFREE(first, y, home[0], home[1]);
        bufs_free(&b);
    }
}

static void test_layer_same_bits(void)
{
    trand r = trand_new(11);
    for (int i = 0; i < 2; ++i) {
        layer_case c = normal_case(70, 72, 56, 9, 3);
        layer_bufs b;
        c.tile = i ? MOE_TILE_32x128 : MOE_TILE_AUTO;
        c.residual = RESIDUAL;
        c.shared = i ? 40 : 0;
        c.row_multiple = i ? 16 : 0;
        bufs_new(&b, &c, &r);
        test_same_bits("layer", call_layer, &b.d, TBUFS(&b.y, &b.workspace), MOE_ON_HOST ? 3 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

static void test_layer_batch(void)
{
    static const int counts[] = {1, 17, 64};
    trand r = trand_new(16);
    for (int i = 0; i < (MOE_ON_HOST ? 4 : 24); ++i) {
        layer_case c = normal_case(220, 136, 264, 8, 3);
        const int first = (int)trand_int(&r, 0, 150), count = counts[i % 3];
        layer_bufs b;
        moe_layer_prepared all, some;
        char *want, *got;
        size_t at, bytes;
        c.tile = 0;
        c.router_dtype = i & 1 ? MOE_FP32 : c.dtype;
        c.shared = i % 4 < 2 ? 0 : 72;
        c.residual = i & 2 ? RESIDUAL : NO_RESIDUAL;
        bufs_new(&b, &c, &r);
        b.d.batch_invariant = 1;
        CHECK_STATUS(moe_layer_prepare(&b.d, &all), MOE_OK);
        CHECK_STATUS(moe_layer_run(&all, test_now.stream), MOE_OK);
        want = (char*)tbuf_copy(&b.y);
        bytes = (size_t)c.H * 2, at = (size_t)first * bytes;
        reset(&b, &c);
        b.d.x = (const char*)b.d.x + at;
        b.d.y = (char*)b.d.y + at;
        if (b.d.residual) b.d.residual = (const char*)b.d.residual + at;
        b.d.num_tokens = count;
        CHECK_STATUS(moe_layer_prepare(&b.d, &some), MOE_OK);
        CHECK(all.router.path == some.router.path &&
                  all.router.gemm.plan.tile == some.router.gemm.plan.tile,
              "router: paths %d %d", all.router.path, some.router.path);
        CHECK(all.experts.up.plan.tile == some.experts.up.plan.tile &&
                  all.experts.down.plan.tile == some.experts.down.plan.tile &&
                  all.shared.up.plan.tile == some.shared.up.plan.tile &&
                  all.shared.down.plan.tile == some.shared.down.plan.tile,
              "experts: other tiles");
        CHECK_STATUS(moe_layer_run(&some, test_now.stream), MOE_OK);
        got = (char*)tbuf_copy(&b.y);
        CHECK(memcmp(got + at, want + at, (size_t)count * bytes) == 0,
              "tokens %d .. %d have other bits: %s", first, first + count - 1, case_text(&c));
        TFREE(want, got);
        bufs_free(&b);
    }
}

static void test_layer_graph(void)
{
    trand r = trand_new(12);
    CHECK_STATUS(moe_layer_preload(), MOE_OK);
    for (int i = 0; i < 6; ++i) {
        const int from = i % 3; /* FROM_ROUTER .. FROM_IDS */
        layer_case c = normal_case(45, 64, 40, 6, 2);
        layer_bufs b;
        tgraph g;
        c.from = from;
        c.tile = i < 3 ? MOE_TILE_64x64 : MOE_TILE_128x256; /* on Hopper the wgmma path */
        if (test_gemm_status(c.dtype, c.tile) != MOE_OK) continue;
        c.y_is_x = from == FROM_LOGITS;
        c.shared = from == FROM_IDS ? 64 : 0; /* no token has a NaN then */
        c.shared_weighted = 1;
        c.capacity = from == FROM_IDS ? 9 : 0;
        bufs_new(&b, &c, &r);
        if (tgraph_capture(&g, call_layer, &b.d)) {
            CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.workspace, 0),
                  "capture itself runs nothing");
            for (int run = 0; run < 3; ++run) {
                void *y, *workspace;
                c.unused = 25 * run;
                c.nan_token = run == 2 ? 8 : 0;
                fill_inputs(&b, &c, &r);
                reset(&b, &c);
                if (from == FROM_IDS) c.nan_token = 0;
                if (from == FROM_IDS && run == 2) { /* a NaN would reach y */
                    moe_store(b.h_x, 7 * c.H + c.H / 2, c.dtype, 1);
                    tbuf_put(&b.x, b.h_x);
                    moe_store(b.h_logits, 7 * c.E + c.E - 1, MOE_FP32, 1);
                    tbuf_put(&b.logits, b.h_logits);
                }
                tgraph_launch(&g);
                compare(&b, &c);
                y = tbuf_copy(c.y_is_x ? &b.x : &b.y);
                workspace = tbuf_copy(&b.workspace);
                reset(&b, &c);
                CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
                CHECK(tbuf_holds(c.y_is_x ? &b.x : &b.y, y) && tbuf_holds(&b.workspace, workspace),
                      "run %d: a call gives other bits", run);
                TFREE(y, workspace);
            }
            tgraph_free(&g);
        }
        bufs_free(&b);
    }
}

static void test_layer_past_2_31(void)
{
    enum { X, RESIDUAL_ROWS, Y, Y_OVER_X };
    static const char* const name[] = {"x", "residual", "y", "y over x"};
    trand r = trand_new(17);
    for (int which = X; which <= Y_OVER_X; ++which) {
        layer_case c = normal_case(5, 64, 40, 8, 2);
        layer_bufs b;
        moe_layer_desc d;
        twide wide;
        void *y, *workspace;
        if (!twide_new(&wide, name[which], c.T, c.H, c.dtype)) continue;
        c.residual = RESIDUAL;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c);
        y = tbuf_copy(&b.y);
        workspace = tbuf_copy(&b.workspace);
        reset(&b, &c);
        d = b.d;
        if (which == X || which == Y_OVER_X) {
            d.x = wide.p, d.x_stride = wide.stride;
            twide_put(&wide, b.h_x);
        }
        if (which == RESIDUAL_ROWS) {
            d.residual = wide.p, d.residual_stride = wide.stride;
            twide_put(&wide, b.h_residual);
        }
        if (which >= Y) d.y = wide.p, d.y_stride = wide.stride;
        CHECK_STATUS(moe_layer_forward(&d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.workspace, workspace), "other bits in the workspace, wide %s",
              name[which]);
        if (which < Y) CHECK(tbuf_holds(&b.y, y), "other bits in y, wide %s", name[which]);
        twide_holds(&wide, which == X ? b.h_x : which == RESIDUAL_ROWS ? b.h_residual : y);
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        TFREE(y, workspace);
        twide_free(&wide);
        bufs_free(&b);
    }
}

static void layer_replay(void)
{
    RUN(test_layer_parts);
    RUN(test_layer_prepared);
    RUN(test_layer_same_bits);
    RUN(test_layer_batch);
    RUN(test_layer_graph);
    RUN(test_layer_past_2_31);
}

#endif
