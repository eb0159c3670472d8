/* faults.h: what the block layer does with bad inputs that only the device sees.

     test_no_room        more active experts than dw1 and dw2 have room for
     test_batch_of_many  a batch whose tokens have more experts than K in all
     test_bad_table      a null or misaligned entry of a table of weights
     test_stop_faults    after a stop fault neither call writes */
#ifndef MOE_TESTS_BLOCK_LAYER_FAULTS_H
#define MOE_TESTS_BLOCK_LAYER_FAULTS_H

#include "tests/unit/block_layer/compare.h"

static void run_no_room(layer_bufs* b, layer_case* c, trand* r)
{
    const tbufs gradients = layer_gradients(b);
    int32_t* got;
    (void)r;
    CHECK_STATUS(both(b), MOE_OK);
    check_results(b, c, 0);
    CHECK_FAULT(&b->fault, MOE_FAULT_NO_ROOM, b->num_active);
    CHECK(b->num_active > 2, "%d experts", b->num_active);
    CHECK(tbufs_untouched(gradients), "form %d: written", c->form);
    reset(b); /* gradients of x and of weights alone take no room */
    b->d.dw1 = b->d.dw2 = 0;
    b->d.grad_expert = 0;
    CHECK_STATUS(both(b), MOE_OK);
    CHECK_FAULT(&b->fault, MOE_FAULT_NONE, 0);
    CHECK(!tbuf_holds(&b->dx, 0) && !tbuf_holds(&b->dweights, 0), "not written");
    reset(b); /* without a fault word: the first experts, within bounds */
    b->d.dw1 = b->dw1.p;
    b->d.dw2 = b->dw2.p;
    b->d.grad_expert = (int32_t*)b->grad_expert.p;
    b->d.fault = 0;
    CHECK_STATUS(both(b), MOE_OK);
    got = (int32_t*)tbuf_copy(&b->grad_expert);
    CHECK_INTS("grad_expert", got, b->active, 2);
    free(got);
}

static void test_no_room(void)
{
    layer_case c = normal_case(SPARSE, 40, 24, 32, 5, 3);
    c.max_experts = 2;
    each_form(9, c, run_no_room);
}

static void test_batch_of_many(void)
{
    trand r = trand_new(10);
    layer_case c = normal_case(BATCH, 20, 24, 32, 6, 2);
    layer_bufs b;
    const tbufs out = layer_outputs(&b);
    bufs_new(&b, &c, &r);
    for (int s = 0; s < c.T * c.K; ++s) b.h_ids[s] = s % 5;
    tbuf_put(&b.ids, b.h_ids);
    CHECK_STATUS(both(&b), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_NO_ROOM, 5);
    CHECK(tbufs_untouched(out), "written");
    b.d.fault = 0; /* without a fault word: within bounds */
    CHECK_STATUS(both(&b), MOE_OK);
    bufs_free(&b);
}

static void test_bad_table(void)
{
    trand r = trand_new(11);
    for (int second = 0; second < 2; ++second) {
        layer_case c = normal_case(SPARSE, 30, 24, 32, 4, 2);
        layer_bufs b;
        tbuf* table = second ? &b.w2.table[0] : &b.w1.table[0];
        void** address;
        c.table = 1;
        bufs_new(&b, &c, &r);
        address = (void**)tbuf_copy(table);
        address[b.active[1]] = second ? (char*)address[b.active[1]] + 8 : 0;
        tbuf_put(table, address);
        CHECK_STATUS(both(&b), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_TABLE, b.active[1]);
        CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.dx, 0) && tbuf_holds(&b.dw1, 0), "written");
        free(address);
        bufs_free(&b);
    }
}

static void run_stopped(layer_bufs* b, layer_case* c, trand* r)
{
    const uint64_t word = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 7);
    const tbufs gradients = layer_gradients(b);
    (void)r;
    for (int after = 0; after < 2; ++after) { /* before forward, before backward */
        reset(b);
        if (after) CHECK_STATUS(moe_block_layer_forward(&b->d, test_now.stream), MOE_OK);
        TEST_CUDA(cudaDeviceSynchronize());
        tbuf_put(&b->fault, &word);
        if (!after) CHECK_STATUS(moe_block_layer_forward(&b->d, test_now.stream), MOE_OK);
        CHECK_STATUS(moe_block_layer_backward(&b->d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b->y, 0) == !after, "y");
        CHECK(tbufs_untouched(gradients), "form %d: written", c->form);
        CHECK_FAULT(&b->fault, MOE_FAULT_BAD_OFFSET, 7);
    }
}

static void test_stop_faults(void)
{
    each_form(17, normal_case(SPARSE, 37, 24, 32, 5, 2), run_stopped);
}

static void block_layer_faults(void)
{
    RUN(test_no_room);
    RUN(test_batch_of_many);
    RUN(test_bad_table);
    RUN(test_stop_faults);
}

#endif
