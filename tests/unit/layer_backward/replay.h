/* replay.h: calls that must give the same bits, and what must not spread.

     test_backward_stages    all stages in order: the bits of a call
     test_backward_bits      many times: the same bits; the two ways to gather: the same values
     test_backward_graph     forward and backward in one graph, replayed with other inputs
     test_backward_hashes    many steps with other inputs, twice: the same hash
     test_backward_padding   rows of padding that hold NaN change nothing
     test_backward_nan       a NaN in one token's dy stays with the token and its experts
     test_backward_stopped   after a stop fault nothing is written
     test_backward_no_tokens no tokens */
#ifndef MOE_TESTS_LAYER_BACKWARD_REPLAY_H
#define MOE_TESTS_LAYER_BACKWARD_REPLAY_H

#include "tests/unit/layer_backward/case.h"

/* A test_call of forward and backward; the context is a grads_bufs. */
static moe_status call_both(void* context, cudaStream_t stream)
{
    grads_bufs* b = (grads_bufs*)context;
    MOE_TRY(moe_layer_forward(&b->f.d, stream));
    return moe_layer_backward(&b->d, stream);
}

/* The same, backward stage by stage. */
static moe_status call_stages(void* context, cudaStream_t stream)
{
    grads_bufs* b = (grads_bufs*)context;
    moe_layer_backward_prepared p;
    MOE_TRY(moe_layer_forward(&b->f.d, stream));
    MOE_TRY(moe_layer_backward_prepare(&b->d, &p));
    for (int stage = 0; stage < MOE_LAYER_BACKWARD_STAGES; ++stage)
        MOE_TRY(moe_layer_backward_run_stage(&p, stage, stream));
    return MOE_OK;
}

static void test_backward_stages(void)
{
    trand r = trand_new(31);
    for (int i = 0; i < 3; ++i) {
        grads_case c = grads_of(normal_case(37, 64, 40, 5, 2));
        moe_layer_backward_prepared p;
        grads_bufs b;
        void *first[8], *shared[6], *dx;
        c.f.from = i, c.f.shared = 32, c.gather = 1 + i % 2, c.f.bias = c.f.shared_bias = 1;
        bufs_begin(&b, &c, &r);
        CHECK_STATUS(call_both(&b, test_now.stream), MOE_OK);
        tbufs_copy(GRADS(&b), first), tbufs_copy(SHARED_GRADS(&b), shared);
        dx = tbuf_copy(&b.dx);
        grads_reset(&b, &c);
        CHECK_STATUS(call_stages(&b, test_now.stream), MOE_OK);
        tbufs_same(GRADS(&b), first, "stages"), tbufs_same(SHARED_GRADS(&b), shared, "stages");
        CHECK(tbuf_holds(&b.dx, dx), "dx, by stages");
        CHECK_STATUS(moe_layer_backward_prepare(&b.d, &p), MOE_OK);
        CHECK_STATUS(moe_layer_backward_run_stage(&p, -1, test_now.stream),
                     MOE_STATUS(MOE_ERR_OPTION, stage));
        CHECK_STATUS(moe_layer_backward_run_stage(&p, MOE_LAYER_BACKWARD_STAGES, test_now.stream),
                     MOE_STATUS(MOE_ERR_OPTION, stage));
        CHECK_STATUS(moe_layer_backward_run_stage(0, 0, test_now.stream),
                     MOE_STATUS(MOE_ERR_NULL, desc));
        tbufs_free_copies(GRADS(&b), first), tbufs_free_copies(SHARED_GRADS(&b), shared);
        free(dx);
        bufs_end(&b);
    }
    CHECK(strcmp(moe_layer_backward_stage_name(MOE_LAYER_BACKWARD_RECOMPUTE), "recompute") == 0 &&
              strcmp(moe_layer_backward_stage_name(MOE_LAYER_BACKWARD_ROUTER), "router") == 0 &&
              strcmp(moe_layer_backward_stage_name(MOE_LAYER_BACKWARD_DW1), "dw1") == 0 &&
              strcmp(moe_layer_backward_stage_name(MOE_LAYER_BACKWARD_COMBINE), "combine") == 0 &&
              strcmp(moe_layer_backward_stage_name(-1), "?") == 0 &&
              strcmp(moe_layer_backward_stage_name(MOE_LAYER_BACKWARD_STAGES), "?") == 0,
          "names of the stages");
}

static void test_backward_bits(void)
{
    trand r = trand_new(32);
    for (int i = 0; i < 2; ++i) {
        grads_case c = grads_of(normal_case(70, 72, 56, 9, 3));
        grads_bufs b;
        c.f.shared = 24 + 16 * i, c.f.shared_weighted = i, c.f.bias = c.f.shared_bias = 1;
        c.gather = 1 + i, c.balance = 1;
        c.f.tile = MOE_TILE_AUTO;
        bufs_begin(&b, &c, &r);
        test_same_bits("backward", call_both, &b,
                       TBUFS(&b.dx, &b.drouter, &b.dlogits, &b.dweights, &b.dw1, &b.dw2, &b.dbias1,
                             &b.dbias2, &b.s_dw1, &b.s_dw2, &b.s_dbias1, &b.s_dbias2, &b.s_dweight),
                       MOE_ON_HOST ? 3 : 100);
        grads_reset(&b, &c);
        run_both(&b, &c);
        compare_grads(&b, &c);
        bufs_end(&b);
    }
}

static void test_backward_graph(void)
{
    trand r = trand_new(33);
    for (int i = 0; i < 3; ++i) {
        grads_case c = grads_of(normal_case(60, 64, 40, 7, 2));
        grads_bufs b;
        tgraph g;
        c.f.from = i, c.gather = 1 + i % 2, c.f.shared = i == 1 ? 24 : 0, c.recompute = i == 2;
        if (i < 2) c.f.tile = MOE_TILE_AUTO;
        bufs_begin(&b, &c, &r);
        CHECK_STATUS(call_both(&b, test_now.stream), MOE_OK);
        if (tgraph_capture(&g, call_both, &b)) {
            for (int run = 0; run < 3; ++run) {
                void *first[8], *dx;
                fill_inputs(&b.f, &c.f, &r);
                grads_reset(&b, &c);
                run_both(&b, &c);
                compare_grads(&b, &c);
                tbufs_copy(GRADS(&b), first);
                dx = tbuf_copy(&b.dx);
                grads_reset(&b, &c);
                tgraph_launch(&g);
                tbufs_same(GRADS(&b), first, "replayed");
                CHECK(tbuf_holds(&b.dx, dx), "dx, replayed");
                tbufs_free_copies(GRADS(&b), first);
                free(dx);
            }
            tgraph_free(&g);
        }
        bufs_end(&b);
    }
}

/* Returns the FNV-1a hash of buffers, begun with h. */
static uint64_t hashes_of(tbufs all, uint64_t h)
{
    for (int k = 0; all.at[k]; ++k) {
        unsigned char* p = (unsigned char*)tbuf_copy(all.at[k]);
        for (size_t i = 0; i < all.at[k]->bytes; ++i) h = (h ^ p[i]) * 0x100000001b3u;
        free(p);
    }
    return h;
}

static void test_backward_hashes(void)
{
    uint64_t hash[2];
    for (int turn = 0; turn < 2; ++turn) {
        trand r = trand_new(34);
        grads_case c = grads_of(normal_case(24, 32, 24, 5, 2));
        grads_bufs b;
        c.f.shared = 24, c.f.shared_weighted = 1, c.f.bias = c.f.shared_bias = 1;
        c.f.tile = MOE_TILE_AUTO;
        bufs_begin(&b, &c, &r);
        hash[turn] = 0xcbf29ce484222325u;
        for (int step = 0; step < (MOE_ON_HOST && !test_long() ? 20 : 1000); ++step) {
            fill_inputs(&b.f, &c.f, &r);
            grads_reset(&b, &c);
            CHECK_STATUS(call_both(&b, test_now.stream), MOE_OK);
            hash[turn] = hashes_of(TBUFS(&b.dx), hash[turn]);
            hash[turn] = hashes_of(GRADS(&b), hash[turn]);
            hash[turn] = hashes_of(SHARED_GRADS(&b), hash[turn]);
        }
        bufs_end(&b);
    }
    CHECK(hash[0] == hash[1], "other bits the second time");
}

static void test_backward_padding(void)
{
    trand r = trand_new(35);
    for (int gather = 1; gather <= 2; ++gather) {
        grads_case c = grads_of(normal_case(33, 64, 40, 5, 2));
        grads_bufs b;
        void *first[8], *dx;
        c.f.row_multiple = 16, c.f.capacity = 12, c.gather = gather;
        bufs_begin(&b, &c, &r);
        run_both(&b, &c);
        compare_grads(&b, &c);
        tbufs_copy(GRADS(&b), first);
        dx = tbuf_copy(&b.dx);
        grads_reset(&b, &c);
        CHECK_STATUS(moe_layer_forward(&b.f.d, test_now.stream), MOE_OK);
        { /* NaN in pre of rows past the last; with fused gathers in those of padding too */
            const int32_t* row_slot = (const int32_t*)in_saved(&b, b.v.row_slot);
            const int32_t* offset = (const int32_t*)in_saved(&b, b.v.expert_offset);
            const int64_t rows = rows_of(&c.f), W = up_rows(c.f.activation, c.f.I);
            char* saved = (char*)tbuf_copy(&b.saved);
            void* pre = saved + ((char*)b.v.pre - (char*)b.saved.p);
            for (int64_t m = 0; m < rows; ++m)
                for (int64_t j = 0; j < W; ++j)
                    if (m >= offset[c.f.E] || (gather == 1 && row_slot[m] < 0))
                        moe_store(pre, m * W + j, c.f.dtype, NAN);
            tbuf_put(&b.saved, saved);
            free(saved);
        }
        CHECK_STATUS(moe_layer_backward(&b.d, test_now.stream), MOE_OK);
        tbufs_same(GRADS(&b), first, "padding of NaN");
        CHECK(tbuf_holds(&b.dx, dx), "dx, with padding of NaN");
        tbufs_free_copies(GRADS(&b), first);
        free(dx);
        bufs_end(&b);
    }
}

static void test_backward_nan(void)
{
    trand r = trand_new(36);
    for (int gather = 1; gather <= 2; ++gather) {
        grads_case c = grads_of(normal_case(33, 64, 40, 9, 1));
        grads_bufs b;
        uint16_t *first, *dx;
        float *dw2, *dw2_first;
        const int32_t* ids;
        c.gather = gather, c.f.from = FROM_IDS;
        bufs_begin(&b, &c, &r);
        run_both(&b, &c);
        first = (uint16_t*)tbuf_copy(&b.dx);
        dw2_first = (float*)tbuf_copy(&b.dw2);
        ids = b.f.h_ids;
        moe_store(b.h_dy, 20 * (c.f.H + c.dy_pad) + 5, c.f.dtype, NAN);
        grads_reset(&b, &c);
        CHECK_STATUS(call_both(&b, test_now.stream), MOE_OK);
        dx = (uint16_t*)tbuf_copy(&b.dx);
        dw2 = (float*)tbuf_copy(&b.dw2);
        for (int t = 0; t < c.f.T; ++t)
            CHECK((memcmp(dx + t * c.f.H, first + t * c.f.H, (size_t)c.f.H * 2) == 0) == (t != 20),
                  "dx of token %d", t);
        for (int e = 0; e < c.f.E; ++e) {
            const int64_t one = c.f.H * c.f.I;
            CHECK((memcmp(dw2 + e * one, dw2_first + e * one, (size_t)one * 4) == 0) ==
                      (e != ids[20]),
                  "dw2 of expert %d", e);
        }
        CHECK_FAULT(&b.f.fault, MOE_FAULT_NONE, 0);
        TFREE(first, dx, dw2, dw2_first);
        bufs_end(&b);
    }
}

static void test_backward_stopped(void)
{
    trand r = trand_new(37);
    for (int i = 0; i < 4; ++i) {
        grads_case c = grads_of(normal_case(20, 64, 40, 4, 2));
        grads_bufs b;
        void* saved;
        c.f.from = i % 3, c.f.shared = 40, c.gather = 1 + i % 2, c.recompute = i == 3;
        bufs_begin(&b, &c, &r);
        CHECK_STATUS(moe_layer_forward(&b.f.d, test_now.stream), MOE_OK);
        saved = tbuf_copy(&b.saved);
        tbuf_poison(&b.f.workspace);
        tfault_put(&b.f.fault, MOE_FAULT_BAD_OFFSET, 5);
        CHECK_STATUS(moe_layer_backward(&b.d, test_now.stream), MOE_OK);
        CHECK(tbufs_untouched(GRADS(&b)) && tbufs_untouched(SHARED_GRADS(&b)) &&
                  tbuf_holds(&b.dx, 0) && tbuf_holds(&b.saved, saved),
              "after a stop fault");
        CHECK_FAULT(&b.f.fault, MOE_FAULT_BAD_OFFSET, 5);
        free(saved);
        bufs_end(&b);
    }
}

static void test_backward_no_tokens(void)
{
    trand r = trand_new(38);
    for (int i = 0; i < 6; ++i) {
        grads_case c = grads_of(normal_case(0, 64, 40, 4, 2));
        c.f.from = i % 3, c.f.shared = i % 2 ? 40 : 0, c.accumulate = i / 3;
        run_grads(&c, &r);
        if (c.f.from != FROM_IDS && c.f.shared) { /* a shared expert, and disabled tokens */
            grads_bufs b;
            bufs_begin(&b, &c, &r);
            b.f.d.gate.token_disabled = (const uint8_t*)b.f.x.p;
            tbuf_free(&b.saved);
            grads_describe(&b, &c);
            CHECK_STATUS(call_both(&b, test_now.stream), MOE_OK);
            bufs_end(&b);
        }
    }
}

static void layer_backward_replay(void)
{
    RUN(test_backward_stages);
    RUN(test_backward_bits);
    RUN(test_backward_graph);
    RUN(test_backward_hashes);
    RUN(test_backward_padding);
    RUN(test_backward_nan);
    RUN(test_backward_stopped);
    RUN(test_backward_no_tokens);
}

#endif
