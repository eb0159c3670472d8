/* agree.h: the forms of the block layer against one another.

     test_batch_of_all_is_dense  a batch that has all experts gives the dense form's bits
     test_forms_agree            one routing in all three forms gives about the same numbers */
#ifndef MOE_TESTS_BLOCK_LAYER_AGREE_H
#define MOE_TESTS_BLOCK_LAYER_AGREE_H

#include "tests/unit/block_layer/case.h"

static void test_batch_of_all_is_dense(void)
{
    trand r = trand_new(12);
    for (int i = 0; i < 3; ++i) {
        layer_case dense = normal_case(DENSE, i == 0 ? 37 : 16 + i, 24, 32, 5, 0), batch = dense;
        layer_bufs a, b;
        dense.activation = batch.activation = i == 1 ? MOE_ACTIVATION_GELU_TANH : 0;
        dense.block = batch.block = i == 2 ? 32 : 16;
        batch.form = BATCH;
        batch.K = batch.E;
        bufs_new(&a, &dense, &r);
        bufs_new(&b, &batch, &r);
        same_inputs(&b, &a);
        for (int s = 0; s < batch.T * batch.K; ++s)
            b.h_weights[s] = a.h_weights[s / batch.K * batch.E + b.h_ids[s]];
        tbuf_put(&b.weights, b.h_weights);
        CHECK_STATUS(both(&a), MOE_OK);
        CHECK_STATUS(both(&b), MOE_OK);
        {
            const tbufs one = TBUFS(&a.y, &a.dx, &a.dw1, &a.dw2, &a.grad_expert);
            const tbufs two = TBUFS(&b.y, &b.dx, &b.dw1, &b.dw2, &b.grad_expert);
            float *da = (float*)tbuf_copy(&a.dweights), *db = (float*)tbuf_copy(&b.dweights);
            int bad = 0;
            for (int j = 0; j < 5; ++j) {
                void* got = tbuf_copy(one.at[j]);
                CHECK(tbuf_holds(two.at[j], got), "%s differs", one.at[j]->name);
                CHECK(!tbuf_holds(one.at[j], 0), "%s is not written", one.at[j]->name);
                free(got);
            }
            for (int s = 0; s < batch.T * batch.K; ++s)
                bad += memcmp(&db[s], &da[s / batch.K * batch.E + b.h_ids[s]], 4) != 0;
            CHECK(bad == 0, "%d of dweights differ", bad);
            free(da), free(db);
        }
        bufs_free(&a);
        bufs_free(&b);
    }
}

/* Checks that two buffers differ by at most a fiftieth of their largest number. */
static void check_agree(const tbuf* a, const tbuf* b, int dtype)
{
    void *x = tbuf_copy(a), *y = tbuf_copy(b);
    double most = 0, apart = 0;
    for (int64_t i = 0; i < (int64_t)a->bytes / moe_dtype_bytes(dtype); ++i) {
        const double v = moe_load(x, i, dtype), d = fabs(v - moe_load(y, i, dtype));
        if (fabs(v) > most) most = fabs(v);
        if (!(d <= apart)) apart = d;
    }
    CHECK(most > 0.1 && apart <= most / 50, "%s: %g apart of %g", a->name, apart, most);
    free(x), free(y);
}

/* The dense form has weights of 0 where the other two have no slot. */
static void test_forms_agree(void)
{
    trand r = trand_new(13);
    layer_case batch = normal_case(BATCH, 45, 24, 32, 5, 3), sparse = batch, dense = batch;
    layer_bufs a, b, c;
    sparse.form = SPARSE;
    dense.form = DENSE;
    dense.K = 0;
    batch.grad_dtype = sparse.grad_dtype = dense.grad_dtype = MOE_FP32;
    bufs_new(&c, &dense, &r); /* has the weights of all experts */
    bufs_new(&a, &batch, &r);
    bufs_new(&b, &sparse, &r);
    same_inputs(&a, &c);
    same_inputs(&b, &c);
    memcpy(b.h_ids, a.h_ids, a.ids.bytes);
    memcpy(b.h_weights, a.h_weights, a.weights.bytes);
    memset(c.h_weights, 0, c.weights.bytes);
    for (int s = 0; s < batch.T * batch.K; ++s)
        c.h_weights[s / batch.K * batch.E + a.h_ids[s]] = a.h_weights[s];
    tbuf_put(&b.ids, b.h_ids);
    tbuf_put(&b.weights, b.h_weights);
    tbuf_put(&c.weights, c.h_weights);
    CHECK_STATUS(both(&a), MOE_OK);
    CHECK_STATUS(both(&b), MOE_OK);
    CHECK_STATUS(both(&c), MOE_OK);
    check_agree(&a.y, &b.y, batch.dtype);
    check_agree(&a.y, &c.y, batch.dtype);
    check_agree(&a.dx, &b.dx, batch.dtype);
    check_agree(&a.dx, &c.dx, batch.dtype);
    check_agree(&a.dweights, &b.dweights, MOE_FP32);
    {
        const int64_t m1 = up_rows(&batch) * batch.H, m2 = (int64_t)batch.H * batch.I;
        for (int i = 0; i < a.num_active; ++i)
            for (int j = 0; j < 2; ++j) { /* matrix i; of the dense form the expert's own */
                const size_t bytes = (size_t)(j ? m2 : m1) * 4;
                tbuf p = j ? a.dw2 : a.dw1, q = j ? b.dw2 : b.dw1, s = j ? c.dw2 : c.dw1;
                p.p = (char*)p.p + (size_t)i * bytes;
                q.p = (char*)q.p + (size_t)i * bytes;
                s.p = (char*)s.p + (size_t)a.active[i] * bytes;
                p.bytes = q.bytes = s.bytes = bytes;
                check_agree(&p, &q, MOE_FP32);
                check_agree(&p, &s, MOE_FP32);
            }
    }
    bufs_free(&a);
    bufs_free(&b);
    bufs_free(&c);
}

static void block_layer_agree(void)
{
    RUN(test_batch_of_all_is_dense);
    RUN(test_forms_agree);
}

#endif
