/* plan.h: what the block layer lays out.

     test_no_tokens  T = 0: no expert is active, no memory is needed
     test_sizes      the memory that block_layer.cuh promises
     test_active     the active experts in the memory that forward leaves; -1 elsewhere */
#ifndef MOE_TESTS_BLOCK_LAYER_PLAN_H
#define MOE_TESTS_BLOCK_LAYER_PLAN_H

#include "tests/unit/block_layer/case.h"

static void run_no_tokens(layer_bufs* b, layer_case* c, trand* r)
{
    const int32_t none[5] = {-1, -1, -1, -1, -1};
    moe_block_layer_desc* d = &b->d;
    moe_block_layer_bytes bytes;
    (void)c, (void)r;
    CHECK_STATUS(moe_block_layer_sizes(d, &bytes), MOE_OK);
    CHECK(bytes.saved == 0 && bytes.forward == 0 && bytes.backward == 0 && bytes.act_grad == 0,
          "no memory for nothing");
    CHECK_STATUS(both(b), MOE_OK);
    CHECK_FAULT(&b->fault, MOE_FAULT_NONE, 0);
    CHECK(tbuf_holds(&b->dw1, 0) && tbuf_holds(&b->dw2, 0), "written");
    CHECK(tbuf_holds(&b->grad_expert, none), "grad_expert");
    d->grad_expert = 0;
    CHECK_STATUS(moe_block_layer_backward(d, test_now.stream),
                 MOE_STATUS(MOE_ERR_NULL, grad_expert));
    d->grad_expert = (int32_t*)b->grad_expert.p;
    d->x = d->dy = d->w1.base = d->w2.base = 0; /* they are not read */
    d->w1.table = d->w2.table = 0;
    d->y = d->dx = 0;
    d->ids = 0;
    d->weights = 0;
    d->saved = d->workspace = (void*)16; /* nor is memory touched */
    CHECK_STATUS(both(b), MOE_OK);
}

static void test_no_tokens(void)
{
    each_form(18, normal_case(SPARSE, 0, 24, 32, 5, 2), run_no_tokens);
}

static void test_sizes(void)
{
    for (int form = DENSE; form <= BATCH; ++form)
        for (int block = 16; block <= 128; block *= 2) {
            const int T = 1000, H = 64, I = 256, E = 16, K = 4;
            moe_block_layer_desc d;
            moe_block_layer_bytes bytes;
            double rows;
            memset(&d, 0, sizeof d);
            d.form = form;
            d.num_tokens = T, d.hidden = H, d.intermediate = I, d.num_experts = E;
            d.top_k = form == DENSE ? 0 : K;
            d.block = block;
            CHECK_STATUS(moe_block_layer_sizes(&d, &bytes), MOE_OK);
            rows = form == SPARSE ? (T * K + E * (block - 1)) / block * block
                                  : (T + block - 1) / block * block * (form == DENSE ? E : K);
            CHECK((double)bytes.act_grad == rows * 2 * I * 2, "%zu", bytes.act_grad);
            CHECK((double)bytes.saved >= rows * 2 * I * 2 &&
                      (double)bytes.saved <= rows * 2 * I * 2 * (1 + 24.0 / block / block) + 131072,
                  "form %d, block %d: saved %zu of %g", form, block, bytes.saved, rows * 2 * I * 2);
            rows = rows * I * 2 + (form == SPARSE ? rows * H * 2 : 0);
            CHECK((double)bytes.forward >= rows && (double)bytes.forward <= rows + 131072,
                  "%zu of %g", bytes.forward, rows);
            CHECK((double)bytes.backward >= rows && (double)bytes.backward <= rows + 131072,
                  "%zu of %g", bytes.backward, rows);
        }
}

/* Entries past the last active expert, and those of experts without a token, are -1, written over
   whatever was there. */
static void test_active(void)
{
    trand r = trand_new(23);
    for (int i = 0; i < 3 * 4; ++i) {
        layer_case c = normal_case(DENSE + i % 3, 20, 16, 16, i < 6 ? 7 : 300, 3);
        layer_bufs b;
        moei_block_layer l;
        int32_t active[TWEIGHTS_MOST], index[TWEIGHTS_MOST], got[TWEIGHTS_MOST];
        if (c.E > TWEIGHTS_MOST) c.E = TWEIGHTS_MOST;
        c.unused = 20 + 80 * (i / 3 % 2);
        bufs_new(&b, &c, &r);
        if (i / 3 % 2) { /* zeros would be experts */
            char* zeros = (char*)test_host((int64_t)b.saved.bytes);
            memset(zeros, 0, b.saved.bytes);
            tbuf_put(&b.saved, zeros);
            free(zeros);
        }
        for (int e = 0; e < c.E; ++e) active[e] = index[e] = -1;
        for (int k = 0; k < b.num_active; ++k) {
            active[k] = b.active[k];
            index[b.active[k]] = k;
        }
        CHECK_STATUS(moe_block_layer_forward(&b.d, test_now.stream), MOE_OK);
        CHECK_STATUS(moei_block_layer_plan(&b.d, &l), MOE_OK);
        TEST_CUDA(cudaDeviceSynchronize());
        TEST_CUDA(cudaMemcpy(got, l.active.active, (size_t)c.E * 4, cudaMemcpyDeviceToHost));
        CHECK_INTS("active", got, active, c.E);
        TEST_CUDA(cudaMemcpy(got, l.active.active_index, (size_t)c.E * 4, cudaMemcpyDeviceToHost));
        CHECK_INTS("active_index", got, index, c.E);
        TEST_CUDA(cudaMemcpy(got, l.active.count, 4, cudaMemcpyDeviceToHost));
        CHECK(got[0] == b.num_active, "%d are active, not %d", got[0], b.num_active);
        bufs_free(&b);
    }
}

static void block_layer_plan(void)
{
    RUN(test_no_tokens);
    RUN(test_sizes);
    RUN(test_active);
}

#endif
