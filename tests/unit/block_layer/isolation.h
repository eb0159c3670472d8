/* isolation.h: a token changes nothing of tokens and experts that have nothing to do with it, even
   if its numbers are infinite or NaN.

     test_lacking_one  two tokens, one without an expert: the other's results are those of it alone
     test_lacking      tokens that lack an expert: its gradients and other tokens keep their bits */
#ifndef MOE_TESTS_BLOCK_LAYER_ISOLATION_H
#define MOE_TESTS_BLOCK_LAYER_ISOLATION_H

#include "tests/unit/block_layer/case.h"

enum { ODD_X_ROW, ODD_X_NAN, ODD_X_INF, ODD_DY_ROW, ODD_DY_INF, ODD_BOTH, ODD_LARGE, ODD_KINDS };

/* Puts numbers that are not finite, or overflow fp16 on their way, into token t's x, dy or both. */
static void make_odd(layer_bufs* b, const layer_case* c, int64_t t, int kind, trand* r)
{
    const int64_t at = trand_int(r, 0, c->H - 1);
    for (int64_t j = 0; j < c->H; ++j) {
        const int64_t x = t * x_stride(c) + j, dy = t * dy_stride(c) + j;
        if (kind == ODD_X_ROW || kind == ODD_BOTH) moe_store(b->h_x, x, c->dtype, NAN);
        if (kind == ODD_X_NAN && j == at) moe_store(b->h_x, x, c->dtype, NAN);
        if (kind == ODD_X_INF && j == at) moe_store(b->h_x, x, c->dtype, -INFINITY);
        if (kind == ODD_DY_ROW || kind == ODD_BOTH) moe_store(b->h_dy, dy, c->dtype, NAN);
        if (kind == ODD_DY_INF && j == at) moe_store(b->h_dy, dy, c->dtype, INFINITY);
        if (kind == ODD_LARGE) moe_store(b->h_x, x, c->dtype, j % 2 ? 6e4f : -6e4f);
    }
}

/* All that holds numbers: y, dx, dweights by tokens, dw1, dw2 by experts. */
static tbufs number_outputs(layer_bufs* b)
{
    return TBUFS(&b->y, &b->dx, &b->dweights, &b->dw1, &b->dw2);
}

static void test_lacking_one(void)
{
    trand r = trand_new(20);
    for (int i = 0; i < 2 * ODD_KINDS; ++i) {
        layer_case c = normal_case(BATCH, 2, 8, 16, 1, 1), alone = c;
        const int kind = i % ODD_KINDS;
        layer_bufs b, one;
        alone.T = 1;
        c.dtype = c.grad_dtype = alone.dtype = alone.grad_dtype = i % 2 ? MOE_FP16 : test_half();
        bufs_new(&b, &c, &r);
        bufs_new(&one, &alone, &r);
        b.h_ids[0] = 0, b.h_ids[1] = -1;
        b.h_weights[0] = one.h_weights[0] = 1;
        b.h_weights[1] = i % 3 == 2 ? NAN : 0;
        make_odd(&b, &c, 1, kind, &r);
        memcpy(one.h_x, b.h_x, one.x.bytes);
        memcpy(one.h_dy, b.h_dy, one.dy.bytes);
        tbuf_put(&b.x, b.h_x);
        tbuf_put(&b.ids, b.h_ids);
        tbuf_put(&b.weights, b.h_weights);
        reset(&b);
        tbuf_put(&one.x, one.h_x);
        tbuf_put(&one.weights, one.h_weights);
        tbuf_put(&one.w1.part[0][0], b.w1.host[0][0]);
        tbuf_put(&one.w2.part[0][0], b.w2.host[0][0]);
        reset(&one);
        CHECK_STATUS(both(&b), MOE_OK);
        CHECK_STATUS(both(&one), MOE_OK);
        {
            const tbufs two_tokens = number_outputs(&b), one_token = number_outputs(&one);
            for (int j = 0; j < 5; ++j) {
                const tbuf *mine = two_tokens.at[j], *want = one_token.at[j];
                char *got = (char*)tbuf_copy(mine), *first = (char*)tbuf_copy(want);
                CHECK(memcmp(got, first, want->bytes) == 0, "kind %d: %s of token 0", kind,
                      mine->name);
                CHECK(!all_zero(first, want->bytes), "%s shows nothing", mine->name);
                CHECK(all_zero(got + want->bytes, mine->bytes - want->bytes),
                      "kind %d: %s of token 1", kind, mine->name);
                free(got), free(first);
            }
        }
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        bufs_free(&b);
        bufs_free(&one);
    }
}

static int has_expert(const layer_bufs* b, const layer_case* c, int64_t t, int e)
{
    int has = 0;
    for (int k = 0; k < c->K; ++k) has |= b->h_ids[t * c->K + k] == e;
    return has;
}

/* Makes odd some tokens that lack one expert. All other tokens, and the gradients of all experts
   that no odd token has, keep their bits. An odd token without any expert gets zeros. */
static void run_lacking(const layer_case* c, int kind, trand* r)
{
    const int64_t T = c->T, H = c->H, grad = moe_dtype_bytes(c->grad_dtype);
    const int64_t m1 = up_rows(c) * H * grad, m2 = H * c->I * grad;
    const int failures = test_now.failures;
    layer_bufs b;
    const tbufs out = number_outputs(&b);
    char *before[5], *after[5], *odd = (char*)test_host(T);
    int lacked, lacking = 0, kept = 0;
    bufs_new(&b, c, r);
    lacked = b.active[trand_int(r, 0, b.num_active - 1)];
    memset(odd, 0, (size_t)T);
    for (int64_t t = T - 1; t >= 0; --t) { /* the last one, and some */
        int none = 1;
        if (has_expert(&b, c, t, lacked) || (lacking && trand_int(r, 0, 5) > 0)) continue;
        for (int e = 0; e < c->E; ++e) none &= !has_expert(&b, c, t, e);
        odd[t] = (char)(none ? 2 : 1);
        ++lacking;
    }
    CHECK_STATUS(both(&b), MOE_OK);
    tbufs_copy(out, (void**)before);
    for (int64_t t = 0; t < T; ++t)
        if (odd[t]) make_odd(&b, c, t, kind, r);
    tbuf_put(&b.x, b.h_x);
    reset(&b);
    CHECK_STATUS(both(&b), MOE_OK);
    tbufs_copy(out, (void**)after);
    for (int64_t t = 0; t < T; ++t)
        for (int j = 0; j < 3; ++j) { /* y, dx, dweights */
            const int64_t row = j < 2 ? H * 2 : c->K * 4;
            const int64_t at = t * (j == 0 ? y_stride(c) * 2 : j == 1 ? dx_stride(c) * 2 : row);
            static const char* const name[] = {"y", "dx", "dweights"};
            if (odd[t] == 2)
                CHECK(all_zero(after[j] + at, (size_t)row), "%s of token %d, which has no expert",
                      name[j], (int)t);
            else if (!odd[t])
                CHECK(memcmp(after[j] + at, before[j] + at, (size_t)row) == 0,
                      "%s of token %d, which is as it was", name[j], (int)t);
            else if (j == 0 && (kind <= ODD_X_NAN || kind == ODD_BOTH))
                CHECK(any_odd(after[j] + at, H, c->dtype), "y of token %d hides what x holds",
                      (int)t);
            else if (j == 1 && kind <= ODD_BOTH && kind != ODD_X_INF)
                CHECK(any_odd(after[j] + at, H, c->dtype), "dx of token %d hides it", (int)t);
        }
    for (int i = 0; i < b.num_active; ++i) {
        int has = 0;
        for (int64_t t = 0; t < T; ++t) has |= odd[t] && has_expert(&b, c, t, b.active[i]);
        if (has && kind < ODD_LARGE && kind != ODD_X_INF) {
            CHECK(any_odd(after[3] + i * m1, m1 / grad, c->grad_dtype), "dw1 hides it");
            CHECK(any_odd(after[4] + i * m2, m2 / grad, c->grad_dtype), "dw2 hides it");
        } else if (!has) {
            CHECK(memcmp(after[3] + i * m1, before[3] + i * m1, (size_t)m1) == 0,
                  "dw1 of expert %d, which no odd token has", b.active[i]);
            CHECK(memcmp(after[4] + i * m2, before[4] + i * m2, (size_t)m2) == 0,
                  "dw2 of expert %d, which no odd token has", b.active[i]);
            ++kept;
        }
    }
    if (c->form == BATCH) { /* whatever the workspace held before: 3 could be a gradient slot */
        int32_t* threes = (int32_t*)test_host((int64_t)b.workspace.bytes);
        for (size_t i = 0; i < b.workspace.bytes / 4; ++i) threes[i] = 3;
        reset(&b);
        CHECK_STATUS(moe_block_layer_forward(&b.d, test_now.stream), MOE_OK);
        tbuf_put(&b.workspace, threes);
        CHECK_STATUS(moe_block_layer_backward(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.dw1, after[3]) && tbuf_holds(&b.dw2, after[4]),
              "dw1 or dw2 depends on what the workspace held");
        free(threes);
    }
    CHECK(lacking > 0 && kept > 0, "%d tokens lack expert %d: shows nothing", lacking, lacked);
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    if (test_now.failures > failures) printf("  in %s, kind %d\n", case_text(c), kind);
    tbufs_free_copies(out, (void**)before);
    tbufs_free_copies(out, (void**)after);
    free(odd);
    bufs_free(&b);
}

static void test_lacking(void)
{
    static const int blocks[] = {16, 16, 32, 64, 128};
    trand r = trand_new(21);
    for (int form = SPARSE; form <= BATCH; ++form)
        for (int i = 0; i < (!MOE_ON_HOST ? 4 : form == BATCH ? 2 : 1) * ODD_KINDS; ++i) {
            const int block = blocks[i % 5];
            layer_case c =
                normal_case(form, 45 + i, i % 4 == 1 && block < 64 ? 264 : 40, block, 6, 3);
            c.block = block;
            c.unused = 45;
            c.dtype = c.grad_dtype = i % 2 ? MOE_FP16 : test_half();
            if (i % 3 == 1) c.grad_dtype = MOE_FP32;
            c.pad = i % 3 == 2 ? 8 : 0;
            c.table = i % 4 == 2;
            c.own_act_grad = i % 2;
            c.activation = i % 3 == 0 ? MOE_ACTIVATION_GELU : 0;
            c.tile = i % 7 == 3 ? MOE_BLOCK_SPARSE_TILE_64x64 : 0;
            run_lacking(&c, i % ODD_KINDS, &r);
        }
}

static void block_layer_isolation(void)
{
    RUN(test_lacking_one);
    RUN(test_lacking);
}

#endif
