/* large.h: the block layer's buffers past 2^31 and 2^32 elements.

     test_block_layer_past_2_31  rows of x, y, dy, dx and matrices of w1, w2 past 2^32 elements: the
                                 bits of the same call on near ones
     test_gradients_of_copies    many experts that share their matrices: dw1 and dw2 repeat
     test_gradients_past_2_31    the same, dw1 and dw2 past 2^32 elements */
#ifndef MOE_TESTS_BLOCK_LAYER_LARGE_H
#define MOE_TESTS_BLOCK_LAYER_LARGE_H

#include "tests/unit/block_layer/case.h"

/* Takes two far buffers at a time, 8 GiB each. */
static void test_block_layer_past_2_31(void)
{
    static const char* const name[2][2] = {{"x", "y"}, {"dy", "dx"}};
    trand r = trand_new(24);
    if (!twide_possible(2)) return;
    for (int i = 0; i < 3 * 3; ++i) {
        layer_case c = normal_case(DENSE + i / 3, 37, 24, 32, 5, 2);
        const int weights = i % 3 == 2;
        const int64_t m1 = up_rows(&c) * c.H, m2 = (int64_t)c.H * c.I;
        layer_bufs b;
        const tbufs out = layer_outputs(&b);
        void* near[6];
        twide wide[2] = {};
        c.own_act_grad = 1;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(both(&b), MOE_OK);
        tbufs_copy(out, near);
        reset(&b);
        if (twide_new(&wide[0], weights ? "w1" : name[i % 3][0], weights ? c.E : c.T,
                      weights ? m1 : c.H, c.dtype)) {
            if (twide_new(&wide[1], weights ? "w2" : name[i % 3][1], weights ? c.E : c.T,
                          weights ? m2 : c.H, c.dtype)) {
                const void* first = weights ? b.w1.host[0][0] : i % 3 ? b.h_dy : b.h_x;
                twide_put(&wide[0], first);
                if (weights) twide_put(&wide[1], b.w2.host[0][0]);
                if (i % 3 == 0) {
                    b.d.x = wide[0].p, b.d.x_stride = wide[0].stride;
                    b.d.y = wide[1].p, b.d.y_stride = wide[1].stride;
                } else if (i % 3 == 1) {
                    b.d.dy = wide[0].p, b.d.dy_stride = wide[0].stride;
                    b.d.dx = wide[1].p, b.d.dx_stride = wide[1].stride;
                } else {
                    b.d.w1.base = wide[0].p, b.d.w1.expert_stride = wide[0].stride;
                    b.d.w2.base = wide[1].p, b.d.w2.expert_stride = wide[1].stride;
                }
                CHECK_STATUS(both(&b), MOE_OK);
                for (int j = 0; j < 6; ++j)
                    if (weights || j != i % 3)
                        CHECK(tbuf_holds(out.at[j], near[j]), "other bits in %s, form %d, far %s",
                              out.at[j]->name, c.form, wide[0].name);
                CHECK(twide_holds(&wide[0], first), "an input was written");
                twide_holds(&wide[1], weights ? b.w2.host[0][0] : near[i % 3]);
                CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
                twide_free(&wide[1]);
            }
            twide_free(&wide[0]);
        }
        tbufs_free_copies(out, near);
        bufs_free(&b);
    }
}

/* Compares dw1 and dw2 of many experts, a token each, with those of a layer of 4 experts. All
   experts share their matrices, and tokens repeat after 4. far: 4096 experts, whose dw1 and dw2
   pass 2^32 elements. Weights [T, E] and [T, K] cannot get there: act has at least 16 times as many
   elements, in one list. */
static void run_gradients(int far)
{
    const int E = far ? 4096 : 12, H = far ? 1024 : 32, I = far ? 1040 : 48;
    const int64_t matrix = (int64_t)H * I, most = (int64_t)E * matrix * 2;
    trand r = trand_new(25);
    layer_case small = normal_case(SPARSE, 4, H, I, 4, 1);
    layer_bufs b;
    moe_block_layer_desc d;
    char *x, *dy, *near[2], *got;
    int32_t* ids;
    float* weights;
    void** address[2];
    if (far && !test_has_memory(2 * (size_t)most + ((size_t)4 << 30))) return;
    small.activation = MOE_ACTIVATION_GELU;
    bufs_new(&b, &small, &r);
    for (int e = 0; e < 4; ++e) b.h_ids[e] = e;
    trand_fill_normal(&r, b.w1.host[0][0], matrix, small.dtype);
    trand_fill_normal(&r, b.w2.host[0][0], matrix, small.dtype);
    for (int e = 1; e < 4; ++e) { /* one expert's matrices for all */
        memcpy((char*)b.w1.host[0][0] + e * matrix * 2, b.w1.host[0][0], (size_t)matrix * 2);
        memcpy((char*)b.w2.host[0][0] + e * matrix * 2, b.w2.host[0][0], (size_t)matrix * 2);
    }
    tbuf_put(&b.w1.part[0][0], b.w1.host[0][0]);
    tbuf_put(&b.w2.part[0][0], b.w2.host[0][0]);
    tbuf_put(&b.ids, b.h_ids);
    b.d.max_experts = 0;
    CHECK_STATUS(both(&b), MOE_OK);
    near[0] = (char*)tbuf_copy(&b.dw1);
    near[1] = (char*)tbuf_copy(&b.dw2);

    x = (char*)test_host((int64_t)E * H * 2);
    dy = (char*)test_host((int64_t)E * H * 2);
    ids = (int32_t*)test_host((int64_t)E * 4);
    weights = (float*)test_host((int64_t)E * 4);
    for (int i = 0; i < 2; ++i) address[i] = (void**)test_host((int64_t)E * 8);
    for (int e = 0; e < E; ++e) {
        memcpy(x + (int64_t)e * H * 2, (char*)b.h_x + e % 4 * H * 2, (size_t)H * 2);
        memcpy(dy + (int64_t)e * H * 2, (char*)b.h_dy + e % 4 * H * 2, (size_t)H * 2);
        ids[e] = e;
        weights[e] = b.h_weights[e % 4];
        address[0][e] = b.w1.part[0][0].p;
        address[1][e] = b.w2.part[0][0].p;
    }
    {
        tbuf d_x = tbuf_from("x", x, (size_t)E * (size_t)H * 2, 0);
        tbuf d_dy = tbuf_from("dy", dy, (size_t)E * (size_t)H * 2, 0);
        tbuf d_y = tbuf_new("y", (size_t)E * (size_t)H * 2, 0);
        tbuf d_ids = tbuf_from("ids", ids, (size_t)E * 4, 0);
        tbuf d_weights = tbuf_from("weights", weights, (size_t)E * 4, 0);
        tbuf w1 = tbuf_from("w1 table", address[0], (size_t)E * 8, 0);
        tbuf w2 = tbuf_from("w2 table", address[1], (size_t)E * 8, 0);
        tbuf slots = tbuf_new("grad_expert", (size_t)E * 4, 0);
        tbuf dw[2], saved, workspace;
        d = b.d;
        d.num_tokens = d.num_experts = E;
        d.x = d_x.p, d.dy = d_dy.p, d.y = d_y.p, d.dx = 0, d.dweights = 0;
        d.ids = (const int32_t*)d_ids.p, d.weights = (const float*)d_weights.p;
        d.w1.base = d.w2.base = 0;
        d.w1.table = (const void* const*)w1.p, d.w2.table = (const void* const*)w2.p;
        d.grad_expert = (int32_t*)slots.p;
        (void)memory_new(&d, &saved, &workspace);
        for (int i = 0; i < 2; ++i) dw[i] = tbuf_new(i ? "dw2" : "dw1", (size_t)most, 0);
        d.dw1 = dw[0].p, d.dw2 = dw[1].p;
        CHECK(!far || (int64_t)(E - 1) * matrix > (int64_t)1 << 32, "not far");
        CHECK_STATUS(moe_block_layer_forward(&d, test_now.stream), MOE_OK);
        CHECK_STATUS(moe_block_layer_backward(&d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        got = (char*)test_host(matrix * 2);
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 12; ++j) { /* the first four, four in the middle, the last four */
                const int e = (j < 4 ? 0 : j < 8 ? E / 2 - 2 : E - 4) + j % 4;
                TEST_CUDA(cudaMemcpy(got, (char*)dw[i].p + (int64_t)e * matrix * 2,
                                     (size_t)matrix * 2, cudaMemcpyDeviceToHost));
                CHECK(memcmp(got, near[i] + e % 4 * matrix * 2, (size_t)matrix * 2) == 0,
                      "%s of expert %d", dw[i].name, e);
                CHECK(any_odd(got, matrix, small.dtype) == 0 && !all_zero(got, (size_t)matrix * 2),
                      "%s of expert %d shows nothing", dw[i].name, e);
            }
        free(got);
        tbufs_free(TBUFS(&dw[0], &dw[1], &saved, &workspace, &slots, &w1, &w2, &d_x, &d_dy, &d_y,
                         &d_ids, &d_weights));
    }
    for (int i = 0; i < 2; ++i) free(near[i]), free(address[i]);
    free(x), free(dy), free(ids), free(weights);
    bufs_free(&b);
}

static void test_gradients_of_copies(void) { run_gradients(0); }

static void test_gradients_past_2_31(void)
{
    if (twide_possible(2)) run_gradients(1);
}

static void block_layer_large(void)
{
    RUN(test_block_layer_past_2_31);
    RUN(test_gradients_of_copies);
    RUN(test_gradients_past_2_31);
}

#endif
