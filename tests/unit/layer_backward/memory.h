/* memory.h: what stays between the passes, and what both take.

     test_backward_saved      the list of what is kept adds up to `saved`, and has the documented bytes
     test_backward_workspace  the workspace has the documented bytes
     test_backward_kept       everything but what is kept is poison between the passes: no difference
     test_backward_recompute  pre-activations that are computed again: the same bits, also twice
     test_backward_allocator  a step takes from the allocator what the audit says, and no more */
#ifndef MOE_TESTS_LAYER_BACKWARD_MEMORY_H
#define MOE_TESTS_LAYER_BACKWARD_MEMORY_H

#include "tests/unit/layer_backward/case.h"

/* Returns the bytes of `saved` that layer_backward.cuh documents. */
static size_t documented_saved(const layer_case* f, int recompute)
{
    const size_t T = (size_t)f->T, K = (size_t)f->K, E = (size_t)f->E, R = (size_t)rows_of(f);
    const size_t W = (size_t)up_rows(f->activation, f->I), P = (size_t)physical(f);
    size_t sum = f->from == FROM_ROUTER ? carved(T * E * 4) : 0;
    if (f->from != FROM_IDS) sum += 2 * carved(T * K * 4);
    sum += carved((P + 1) * 4) + 2 * carved(R * 4) + carved(T * K * 4) + carved(T * K * 8);
    if (f->outputs) sum -= carved(R * 4) + carved(T * K * 4); /* the caller's own */
    if (!recompute) sum += carved(R * W * 2);
    if (!recompute && f->shared)
        sum += carved(T * (size_t)up_rows(f->shared_activation, f->shared) * 2);
    return sum;
}

static void test_backward_saved(void)
{
    trand r = trand_new(21);
    for (int i = 0; i < 12; ++i) {
        grads_case c = grads_of(normal_case(40, 64, 48, 6, 2));
        moe_layer_saved_list list;
        grads_bufs b;
        size_t sum = 0;
        uint64_t pre = 0, x = 0;
        c.f.from = i % 3, c.f.shared = i / 3 % 2 ? 32 : 0, c.recompute = i / 6;
        c.f.outputs = i % 4 == 3, c.f.row_multiple = i % 5 == 4 ? 16 : 0;
        if (i % 4 == 1) c.f.activation = MOE_ACTIVATION_GELU;
        bufs_begin(&b, &c, &r);
        CHECK_STATUS(moe_layer_saved(&b.f.d, &list), MOE_OK);
        for (int k = 0; k < list.count; ++k) {
            const moe_layer_saved_item* at = list.item + k;
            const uint64_t bytes = (uint64_t)(at->rows * at->columns * at->element);
            CHECK(at->bytes == (at->caller ? bytes : carved(bytes)), "%s: %llu bytes", at->name,
                  (unsigned long long)at->bytes);
            if (!at->caller) sum += at->bytes;
            if (strcmp(at->name, "pre") == 0) pre = bytes;
            if (strcmp(at->name, "x") == 0) x = bytes;
        }
        CHECK(sum == list.bytes && list.bytes == documented_saved(&c.f, c.recompute),
              "%zu bytes, listed %zu, documented %zu: %s", list.bytes, sum,
              documented_saved(&c.f, c.recompute), grads_text(&c));
        CHECK(x == (uint64_t)(2 * c.f.T * c.f.H), "x: %llu", (unsigned long long)x);
        CHECK(pre == (c.recompute ? 0
                                  : (uint64_t)(2 * rows_of(&c.f) * up_rows(c.f.activation, c.f.I))),
              "pre: %llu", (unsigned long long)pre);
        CHECK_STATUS(moe_layer_saved(0, &list), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_saved(&b.f.d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        bufs_end(&b);
    }
}

/* Returns the bytes of workspace that layer_backward.cuh documents, but for the router's. */
static size_t documented_backward(const grads_case* c)
{
    const layer_case* f = &c->f;
    const size_t T = (size_t)f->T, H = (size_t)f->H, I = (size_t)f->I, K = (size_t)f->K;
    const size_t E = (size_t)f->E, R = (size_t)rows_of(f), Is = (size_t)f->shared;
    const size_t row = f->rows_dtype == MOE_FP32 ? 4 : 2, act = R * I > T * Is ? R * I : T * Is;
    const size_t rows = c->recompute && f->shared && T > R ? T : R;
    const int gate = f->from == FROM_ROUTER || (f->from == FROM_LOGITS && c->none != 1);
    size_t sum = carved(192) + carved(act * 2) + carved(rows * H * row);
    if (c->none == 1 && gate) sum += carved(T * K * 4) + carved(T * E * 4);
    if (gate || c->none != 1) sum += carved(R * ((I + 63) / 64) * 4);
    if (f->shared && c->none != 1) sum += carved(T * ((Is + 63) / 64) * 4);
    if (c->recompute) {
        sum += carved(R * (size_t)up_rows(f->activation, f->I) * 2);
        if (f->shared) sum += carved(T * (size_t)up_rows(f->shared_activation, f->shared) * 2);
    }
    return sum;
}

static void test_backward_workspace(void)
{
    trand r = trand_new(22);
    for (int i = 0; i < 16; ++i) {
        /* rows enough for what the router keeps there */
        grads_case c = grads_of(normal_case(200, 256, 136, 4, 4));
        grads_bufs b;
        size_t bytes;
        c.f.from = i % 3, c.f.shared = i / 4 % 2 ? 72 : 0, c.recompute = i / 8;
        c.none = i % 2, c.f.rows_dtype = i % 5 == 4 ? MOE_FP32 : 0;
        bufs_begin(&b, &c, &r);
        CHECK_STATUS(moe_layer_backward_workspace(&b.d, &bytes), MOE_OK);
        CHECK(bytes == documented_backward(&c), "%zu bytes, not %zu: %s", bytes,
              documented_backward(&c), grads_text(&c));
        bufs_end(&b);
    }
}

static void test_backward_kept(void)
{
    trand r = trand_new(23);
    for (int i = 0; i < 6; ++i) {
        grads_case c = grads_of(normal_case(35, 64, 40, 5, 2));
        grads_bufs b;
        void* dx;
        c.f.from = i % 3, c.f.shared = i / 3 ? 24 : 0, c.recompute = i % 2, c.gather = 1 + i % 2;
        bufs_begin(&b, &c, &r);
        run_both(&b, &c);
        compare_grads(&b, &c);
        dx = tbuf_copy(&b.dx);
        grads_reset(&b, &c);
        CHECK_STATUS(moe_layer_forward(&b.f.d, test_now.stream), MOE_OK);
        TEST_CUDA(cudaStreamSynchronize(test_now.stream));
        tbufs_poison(TBUFS(&b.f.workspace, &b.f.y));
        CHECK_STATUS(moe_layer_backward(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.dx, dx), "backward has read what is not kept");
        free(dx);
        bufs_end(&b);
    }
}

static void test_backward_recompute(void)
{
    trand r = trand_new(24);
    for (int i = 0; i < 4; ++i) {
        grads_case c = grads_of(normal_case(45, 64, 40, 5, 2));
        grads_bufs b;
        void* first[8];
        void* dx;
        c.f.from = i % 3, c.f.bias = 1, c.gather = 1 + i % 2;
        if (i % 2) c.f.tile = MOE_TILE_AUTO;
        bufs_begin(&b, &c, &r);
        run_both(&b, &c);
        tbufs_copy(GRADS(&b), first);
        dx = tbuf_copy(&b.dx);
        tbuf_free(&b.saved);
        c.recompute = 1;
        grads_describe(&b, &c);
        grads_reset(&b, &c);
        run_both(&b, &c);
        compare_grads(&b, &c);
        tbufs_same(GRADS(&b), first, "recomputed");
        CHECK(tbuf_holds(&b.dx, dx), "dx, recomputed");
        tbufs_poison(GRADS(&b)), tbuf_poison(&b.dx); /* the forward serves another backward */
        CHECK_STATUS(moe_layer_backward(&b.d, test_now.stream), MOE_OK);
        tbufs_same(GRADS(&b), first, "recomputed again");
        CHECK(tbuf_holds(&b.dx, dx), "dx, recomputed again");
        tbufs_free_copies(GRADS(&b), first);
        free(dx);
        bufs_end(&b);
    }
}

/* Allocates what a step of training needs of the layer, by the audit: `saved` and one workspace; runs
   both passes and requires that nothing else was taken from the device. */
static void test_backward_allocator(void)
{
    trand r = trand_new(25);
    grads_case c = grads_of(normal_case(MOE_ON_HOST ? 200 : 8192, MOE_ON_HOST ? 64 : 1024,
                                        MOE_ON_HOST ? 40 : 512, 8, 2));
    grads_bufs b;
    moe_layer_saved_list list;
    const size_t near = MOE_ON_HOST ? 0 : 8u << 20;
    size_t forward, backward, workspace, before, after, all;
    void *saved, *scratch;
    bufs_begin(&b, &c, &r);
    CHECK_STATUS(moe_layer_forward(&b.f.d, test_now.stream), MOE_OK); /* all kernels are loaded */
    CHECK_STATUS(moe_layer_backward(&b.d, test_now.stream), MOE_OK);
    TEST_CUDA(cudaStreamSynchronize(test_now.stream));
    CHECK_STATUS(moe_layer_saved(&b.f.d, &list), MOE_OK);
    CHECK_STATUS(moe_layer_workspace(&b.f.d, &forward), MOE_OK);
    CHECK_STATUS(moe_layer_backward_workspace(&b.d, &backward), MOE_OK);
    workspace = forward > backward ? forward : backward;
    TEST_CUDA(cudaMemGetInfo(&before, &all));
    TEST_CUDA(cudaMalloc(&saved, list.bytes));
    TEST_CUDA(cudaMalloc(&scratch, workspace));
    b.f.d.saved = b.d.layer.saved = saved;
    b.f.d.workspace = b.d.layer.workspace = scratch;
    b.f.d.workspace_bytes = b.d.layer.workspace_bytes = workspace;
    grads_reset(&b, &c);
    CHECK_STATUS(moe_layer_forward(&b.f.d, test_now.stream), MOE_OK);
    CHECK_STATUS(moe_layer_backward(&b.d, test_now.stream), MOE_OK);
    TEST_CUDA(cudaStreamSynchronize(test_now.stream));
    TEST_CUDA(cudaMemGetInfo(&after, &all));
    /* a GPU gives memory in units of its own */
    CHECK(before - after + near >= list.bytes + workspace &&
              before - after <= list.bytes + workspace + near,
          "a step took %zu bytes, the audit says %zu", before - after, list.bytes + workspace);
    CHECK(!tbuf_holds(&b.dx, 0), "dx was written");
    TEST_CUDA(cudaFree(saved));
    TEST_CUDA(cudaFree(scratch));
    bufs_end(&b);
}

static void layer_backward_memory(void)
{
    RUN(test_backward_saved);
    RUN(test_backward_workspace);
    RUN(test_backward_kept);
    RUN(test_backward_recompute);
    RUN(test_backward_allocator);
}

#endif
