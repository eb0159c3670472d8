/* rules.h: every rule of the gate and every form of the weights' gradients reaches its station.

     test_backward_rules     each rule of the gate, noise and dropout drawn with a seed_offset, disabled
                             tokens whose x and dy are NaN
     test_backward_tables    one pointer for each expert's gradient: the bits of one array
     test_backward_empty     gradients of experts without rows are left as they are */
#ifndef MOE_TESTS_LAYER_BACKWARD_RULES_H
#define MOE_TESTS_LAYER_BACKWARD_RULES_H

#include "tests/unit/layer_backward/case.h"

/* Makes the tokens that are disabled NaN, in x and in dy. */
static void put_nan_tokens(grads_bufs* b, const grads_case* c, const uint8_t* token_disabled)
{
    const int64_t T = c->f.T, H = c->f.H;
    for (int64_t i = 0; i < T * H; ++i) {
        if (!token_disabled[i / H]) continue;
        moe_store(b->f.h_x, i, c->f.dtype, NAN);
        moe_store(b->h_dy, i, c->f.dtype, NAN);
    }
    tbuf_put(&b->f.x, b->f.h_x), tbuf_put(&b->dy, b->h_dy);
    b->h_shared_slot = (int32_t*)test_host(T * 4);
    for (int32_t t = 0; t < T; ++t) b->h_shared_slot[t] = token_disabled[t] ? -1 : t;
}

static void test_backward_rules(void)
{
    enum { T = 39, E = 8, K = 2, RULES = 13, OF_TOKENS = 10, SEEDED = 12 };
    static const uint8_t off[E] = {0, 1, 0, 0, 0, 0, 1, 0};
    static const uint64_t offset = 3;
    trand r = trand_new(41);
    for (int rule = 0; rule < RULES; ++rule)
        for (int from = FROM_ROUTER; from <= FROM_LOGITS; ++from) {
            grads_case c = grads_of(normal_case(T, 64, 40, E, K));
            grads_bufs b;
            float h_bias[E];
            uint8_t token_disabled[T];
            tbuf bias, expert, token, seed_offset;
            c.f.rules = 1, c.f.from = from, c.balance = rule % 2 == from;
            c.f.shared = 24, c.f.shared_bias = 1, c.f.shared_weighted = from, c.f.bias = 1;
            c.recompute = rule % 3 == 2;
            for (int e = 0; e < E; ++e) h_bias[e] = trand_normal(&r) * 0.2f;
            for (int t = 0; t < T; ++t) token_disabled[t] = trand_int(&r, 0, 3) == 0;
            token_disabled[T / 2] = 1;
            bias = tbuf_from("expert_bias", h_bias, sizeof h_bias, 4);
            expert = tbuf_from("expert_disabled", off, sizeof off, 1);
            token = tbuf_from("token_disabled", token_disabled, sizeof token_disabled, 1);
            seed_offset = tbuf_from("seed_offset", &offset, sizeof offset, 8);
            bufs_begin(&b, &c, &r);
            if (rule == SEEDED) {
                b.f.d.gate.noise = 0.5f, b.f.d.gate.dropout = 0.3f, b.f.d.gate.seed = 5;
                b.f.d.gate.seed_offset = (const uint64_t*)seed_offset.p;
            } else {
                set_rule(&b.f.d.gate, rule, &bias, &expert, &token);
            }
            b.h_gate = b.f.d.gate; /* the same, with addresses of the host */
            if (b.h_gate.expert_bias) b.h_gate.expert_bias = h_bias;
            if (b.h_gate.expert_disabled) b.h_gate.expert_disabled = off;
            if (b.h_gate.token_disabled) b.h_gate.token_disabled = token_disabled;
            if (b.h_gate.seed_offset) b.h_gate.seed_offset = &offset;
            tbuf_free(&b.saved);
            grads_describe(&b, &c); /* a rule may need a workspace */
            grads_reset(&b, &c);
            if (rule == OF_TOKENS) put_nan_tokens(&b, &c, token_disabled);
            if (run_both(&b, &c)) compare_grads(&b, &c);
            else printf("  in: rule %d: %s\n", rule, grads_text(&c));
            bufs_end(&b);
            tbufs_free(TBUFS(&bias, &expert, &token, &seed_offset));
        }
}

/* Runs both passes and keeps dw1 and dw2. */
static void run_and_keep(grads_bufs* b, const grads_case* c, void** dw)
{
    grads_reset(b, c);
    run_both(b, c);
    dw[0] = tbuf_copy(&b->dw1), dw[1] = tbuf_copy(&b->dw2);
}

/* Returns device memory of E addresses: base, base + each, ... */
static tbuf addresses(const char* name, const tbuf* base, int E, size_t each)
{
    void** at = (void**)test_host(E * (int64_t)sizeof(void*));
    tbuf table;
    for (int e = 0; e < E; ++e) at[e] = (char*)base->p + (size_t)e * each;
    table = tbuf_from(name, at, (size_t)E * sizeof(void*), 8);
    free(at);
    return table;
}

static void test_backward_tables(void)
{
    enum { E = 5, H = 64, I = 40 };
    trand r = trand_new(42);
    grads_case c = grads_of(normal_case(33, H, I, E, 2));
    grads_bufs b;
    tbuf table[2];
    void *base[2], *got[2];
    bufs_begin(&b, &c, &r);
    run_and_keep(&b, &c, base);
    table[0] = addresses("dw1.table", &b.dw1, E, (size_t)2 * I * H * 4);
    table[1] = addresses("dw2.table", &b.dw2, E, (size_t)H * I * 4);
    b.d.dw1.base = b.d.dw2.base = 0;
    b.d.dw1.table = (void* const*)table[0].p, b.d.dw2.table = (void* const*)table[1].p;
    run_and_keep(&b, &c, got);
    compare_grads(&b, &c);
    CHECK(memcmp(base[0], got[0], b.dw1.bytes) == 0 && memcmp(base[1], got[1], b.dw2.bytes) == 0,
          "gradients by a table have other bits");
    TFREE(base[0], base[1], got[0], got[1]);
    tbufs_free(TBUFS(&table[0], &table[1]));
    bufs_end(&b);
}

static void test_backward_empty(void)
{
    enum { E = 9, H = 64, I = 40 };
    trand r = trand_new(43);
    for (int accumulate = 0; accumulate < 2; ++accumulate) {
        grads_case c = grads_of(normal_case(3, H, I, E, 2));
        grads_bufs b;
        void *zeros[2], *left[2], *dbias;
        int empty = 0;
        c.f.bias = 1, c.accumulate = accumulate;
        bufs_begin(&b, &c, &r);
        run_and_keep(&b, &c, zeros);
        compare_grads(&b, &c);
        b.d.empty_experts = 1;
        run_and_keep(&b, &c, left);
        dbias = tbuf_copy(&b.dbias1);
        {
            const int32_t* offset = (const int32_t*)in_saved(&b, b.v.expert_offset);
            for (int e = 0; e < E; ++e) {
                const size_t bytes[2] = {(size_t)2 * I * H * 4, (size_t)H * I * 4};
                const int none = offset[e + 1] == offset[e];
                empty += none;
                for (int i = 0; i < 2; ++i) {
                    const float* was = (const float*)((char*)zeros[i] + (size_t)e * bytes[i]);
                    const float* is = (const float*)((char*)left[i] + (size_t)e * bytes[i]);
                    if (!none) CHECK(memcmp(was, is, bytes[i]) == 0, "expert %d has other bits", e);
                    else if (accumulate) CHECK(was[0] == 2 && is[0] == 2, "expert %d: added to", e);
                    else CHECK(was[0] == 0 && is[0] != is[0], "expert %d is not left", e);
                }
                if (none && !accumulate)
                    CHECK(((float*)dbias)[e * 2 * I] != ((float*)dbias)[e * 2 * I],
                          "dbias1 of expert %d is not left", e);
            }
        }
        CHECK(empty > 0, "every expert has rows");
        TFREE(zeros[0], zeros[1], left[0], left[1], dbias);
        bufs_end(&b);
    }
}

static void layer_backward_rules(void)
{
    RUN(test_backward_rules);
    RUN(test_backward_tables);
    RUN(test_backward_empty);
}

#endif
