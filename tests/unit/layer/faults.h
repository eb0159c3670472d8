/* faults.h: data faults, stop faults, and calls without tokens.

     test_layer_nan        puts a NaN in one token: the token goes to no expert, the fault word
                           names the token, and no other row changes
     test_layer_stopped    runs after a stop fault: no station does anything
     test_layer_no_tokens  runs no tokens: nothing but a workspace is required */
#ifndef MOE_TESTS_LAYER_FAULTS_H
#define MOE_TESTS_LAYER_FAULTS_H

#include "tests/unit/layer/compare.h"

static void test_layer_nan(void)
{
    trand r = trand_new(6);
    for (int from = FROM_ROUTER; from <= FROM_LOGITS; ++from)
        for (int residual = NO_RESIDUAL; residual <= RESIDUAL; ++residual)
            for (int dtype = MOE_FP16; dtype <= MOE_BF16; ++dtype) {
                layer_case c = normal_case(41, 64, 40, 8, 2);
                c.from = from;
                c.residual = residual;
                c.dtype = c.router_dtype = dtype;
                c.nan_token = 1 + (int)trand_int(&r, 0, 40);
                run_case(&c, &r);
            }
    { /* a NaN in a token without experts changes no row */
        layer_case c = normal_case(41, 64, 40, 8, 2);
        layer_bufs b;
        uint16_t *with, *without;
        c.from = FROM_IDS;
        bufs_new(&b, &c, &r);
        b.h_ids[2 * 17] = b.h_ids[2 * 17 + 1] = -1;
        tbuf_put(&b.ids, b.h_ids);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        without = (uint16_t*)tbuf_copy(&b.y);
        moe_store(b.h_x, 17 * c.H + 3, c.dtype, NAN);
        b.h_ids[2 * 20] = b.h_ids[2 * 20 + 1] = 3; /* token 20 has a NaN and an expert */
        tbuf_put(&b.ids, b.h_ids);
        moe_store(b.h_x, 20 * c.H + 3, c.dtype, NAN);
        tbuf_put(&b.x, b.h_x);
        reset(&b, &c);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        with = (uint16_t*)tbuf_copy(&b.y);
        for (int t = 0; t < c.T; ++t)
            if (t != 20)
                CHECK(memcmp(with + t * c.H, without + t * c.H, (size_t)c.H * 2) == 0,
                      "token %d changed", t);
        CHECK(with[20 * c.H] != without[20 * c.H],
              "the token with a NaN and an expert is unchanged");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        TFREE(with, without);
        bufs_free(&b);
    }
}

static void test_layer_stopped(void)
{
    trand r = trand_new(7);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        layer_case c = normal_case(20, 64, 40, 4, 2);
        layer_bufs b;
        c.from = from;
        c.shared = 40;
        bufs_new(&b, &c, &r);
        tfault_put(&b.fault, MOE_FAULT_BAD_OFFSET, 5);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.workspace, 0), "after a stop fault");
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 5);
        bufs_free(&b);
    }
}

static void test_layer_no_tokens(void)
{
    trand r = trand_new(8);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        layer_case c = normal_case(0, 64, 40, 4, 2);
        c.from = from;
        c.shared = from == FROM_LOGITS ? 40 : 0;
        run_case(&c, &r);
    }
    { /* with a workspace alone */
        moe_layer_desc d = {};
        tbuf w;
        d.hidden = d.intermediate = 8, d.num_experts = d.top_k = 1;
        d.dtype = test_half();
        CHECK_STATUS(moe_layer_workspace(&d, &d.workspace_bytes), MOE_OK);
        w = tbuf_new("workspace", d.workspace_bytes, 0);
        d.workspace = w.p;
        CHECK_STATUS(moe_layer_forward(&d, test_now.stream), MOE_OK);
        tbuf_free(&w);
    }
}

static void layer_faults(void)
{
    RUN(test_layer_nan);
    RUN(test_layer_stopped);
    RUN(test_layer_no_tokens);
}

#endif
