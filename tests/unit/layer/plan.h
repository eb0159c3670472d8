/* plan.h: the workspace, the plan, and what an old binary refuses.

     test_layer_workspace  checks the size for any shape, that buffers follow one another, and the
                           refusals of a bad workspace
     test_layer_plan       checks that the plan is that of the experts, not the shared expert's
     test_layer_old_code   requires that plan, preparing and the layer refuse alike a dtype or tile
                           that this binary lacks, and run those that it has */
#ifndef MOE_TESTS_LAYER_PLAN_H
#define MOE_TESTS_LAYER_PLAN_H

#include "tests/unit/layer/compare.h"

static void test_layer_workspace(void)
{
    trand r = trand_new(9);
    for (int i = 0; i < 200; ++i) {
        layer_case c = normal_case((int)trand_int(&r, 0, 300), 8 * (int)trand_int(&r, 1, 40),
                                   8 * (int)trand_int(&r, 1, 40), (int)trand_int(&r, 1, 300), 1);
        moe_layer_desc d = {};
        moe_layer_view v = {};
        size_t bytes = 0;
        c.K = (int)trand_int(&r, 1, c.E < 9 ? c.E : 9);
        c.from = i % 3;
        d.num_tokens = c.T, d.num_experts = c.E, d.top_k = c.K;
        d.hidden = c.H, d.intermediate = c.I;
        if (c.from == FROM_LOGITS) d.logits = (const float*)256;
        if (c.from == FROM_IDS) d.ids = (const int32_t*)256, d.weights = (const float*)512;
        CHECK_STATUS(moe_layer_workspace(&d, &bytes), MOE_OK);
        CHECK(bytes == documented_bytes(&c, &d), "%zu bytes, not %zu", bytes,
              documented_bytes(&c, &d));
        d.workspace = (void*)((uintptr_t)1 << 40);
        CHECK_STATUS(moe_layer_get_view(&d, &v), MOE_OK);
        {
            const void* const chunk = c.from == FROM_IDS ? v.route_workspace : (void*)v.chunk_count;
            const void* const counts = chunk ? chunk : v.expert_count; /* null without tokens */
            const size_t slots = (size_t)c.T * (size_t)c.K, E = (size_t)c.E;
            const size_t chunks = (size_t)moe_num_chunks(c.T);
            const size_t act = slots * (size_t)c.I * 2, rows = slots * (size_t)c.H * 2;
            const struct {
                const void* p;
                size_t bytes;
            } part[] = {{v.expert_offset, E * 4 + 4},
                        {v.row_slot, slots * 4},
                        {v.place, slots * 8},
                        {counts, E * chunks * 4},
                        {v.expert_count, E * 4},
                        {v.act, act},
                        {v.rows, rows},
                        {(char*)d.workspace + bytes, 0}};
            for (int k = 0; k < 7; ++k)
                CHECK((uintptr_t)part[k].p % 256 == 0 &&
                          (char*)part[k].p + part[k].bytes <= (char*)part[k + 1].p,
                      "buffer %d", k);
            CHECK(c.from == FROM_IDS || ((char*)v.ids + slots * 4 <= (char*)v.weights &&
                                         (char*)v.weights + slots * 4 <= (char*)v.expert_offset),
                  "ids and weights");
            CHECK(c.from != FROM_ROUTER || v.logits == d.workspace, "logits come first");
        }
    }
    {
        layer_case c = normal_case(20, 64, 40, 4, 2);
        layer_bufs b;
        size_t bytes;
        moe_layer_view v;
        moe_layer_desc d;
        bufs_new(&b, &c, &r);
        d = b.d;
        d.workspace_bytes -= 1;
        CHECK_STATUS(moe_layer_forward(&d, test_now.stream),
                     MOE_STATUS(MOE_ERR_WORKSPACE, workspace_bytes));
        d.workspace = 0;
        CHECK_STATUS(moe_layer_get_view(&d, &v), MOE_STATUS(MOE_ERR_NULL, workspace));
        CHECK_STATUS(moe_layer_get_view(0, &v), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_get_view(&b.d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_workspace(0, &bytes), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_workspace(&b.d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK(tbuf_holds(&b.y, 0), "a refused call wrote y");
        bufs_free(&b);
    }
}

static void test_layer_plan(void)
{
    trand r = trand_new(13);
    layer_case c = normal_case(40, 64, 40, 4, 2);
    layer_bufs b;
    moe_gemm_plan p[2];
    test_poison(p, sizeof p);
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_layer_plan(&b.d, p, p + 1), MOE_OK);
    for (int i = 0; i < 2; ++i) test_plan(&p[i], c.dtype, MOE_TILE_64x64);
    CHECK_PLAN_NULL(moe_layer_plan, &b.d);
    bufs_free(&b);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) { /* with a shared expert */
        moe_gemm_plan plain[2], alone[2];
        moe_experts_desc e = {};
        moe_layer_view v;
        c = normal_case(40, 64, 40, 4, 2);
        c.from = from;
        c.tile = MOE_TILE_AUTO;
        c.shared = 200;
        c.rows_dtype = from == FROM_IDS ? MOE_FP32 : 0;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_layer_plan(&b.d, p, p + 1), MOE_OK);
        CHECK_STATUS(moe_layer_get_view(&b.d, &v), MOE_OK);
        e.x = b.d.x, e.w1 = b.d.w1, e.w2 = b.d.w2;
        e.expert_offset = v.expert_offset, e.row_slot = v.row_slot;
        e.act = v.act, e.rows = v.rows;
        e.num_tokens = c.T, e.num_experts = c.E, e.top_k = c.K;
        e.hidden = c.H, e.intermediate = c.I;
        e.dtype = c.dtype, e.rows_dtype = c.rows_dtype;
        CHECK_STATUS(moe_experts_plan(&e, plain, plain + 1), MOE_OK);
        e.w1 = b.d.shared.w1, e.w2 = b.d.shared.w2;
        e.expert_offset = e.row_slot = 0;
        e.act = v.shared_act, e.rows = v.shared_rows;
        e.num_rows = c.T, e.num_tokens = e.top_k = 0, e.num_experts = 1;
        e.intermediate = c.shared;
        CHECK_STATUS(moe_experts_plan(&e, alone, alone + 1), MOE_OK);
        for (int i = 0; i < 2; ++i) {
            test_plan(&p[i], c.dtype, MOE_TILE_AUTO);
            CHECK(p[i].path == plain[i].path && p[i].tile == plain[i].tile &&
                      p[i].blocks == plain[i].blocks && p[i].smem == plain[i].smem,
                  "product %d: tile %d, %d blocks, not %d, %d", i, p[i].tile, p[i].blocks,
                  plain[i].tile, plain[i].blocks);
            CHECK(plain[i].smem != alone[i].smem || plain[i].tile != alone[i].tile,
                  "the shared expert's plan is the same, so this shows nothing");
        }
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK(untouched(&b, &c), "a plan runs nothing");
        bufs_free(&b);
    }
}

static void test_layer_old_code(void)
{
    trand r = trand_new(18);
    for (int dtype = MOE_FP16; dtype <= MOE_BF16; ++dtype)
        for (int tile = MOE_TILE_AUTO; tile <= MOE_TILE_64x64; ++tile)
            for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
                const moe_status want = test_gemm_status(dtype, tile);
                layer_case c = normal_case(20, 64, 40, 4, 2);
                layer_bufs b;
                moe_gemm_plan up, down;
                moe_layer_prepared p;
                c.dtype = c.router_dtype = dtype;
                c.tile = tile;
                c.from = from;
                bufs_new(&b, &c, &r);
                CHECK_STATUS(moe_layer_plan(&b.d, &up, &down), want);
                CHECK_STATUS(moe_layer_prepare(&b.d, &p), want);
                if (want != MOE_OK) CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), want);
                CHECK(untouched(&b, &c), "%s: an output was written", case_text(&c));
                bufs_free(&b);
                run_case(&c, &r);
            }
}

static void layer_plan(void)
{
    RUN(test_layer_workspace);
    RUN(test_layer_plan);
    RUN(test_layer_old_code);
}

#endif
