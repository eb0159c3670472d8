/* models.h: the settings of the models in README.md.

     test_layer_models  accepts each model at its own sizes, without buffers of that size, and
                        refuses it with one wrong field; runs small layers with the settings of
                        DeepSeek-V3 and gpt-oss */
#ifndef MOE_TESTS_LAYER_MODELS_H
#define MOE_TESTS_LAYER_MODELS_H

#include "tests/unit/layer/refusals.h"

#include "moe/ref/gate_rules.h"

enum { MIXTRAL, QWEN3, DEEPSEEK, GPT_OSS, MODELS };

/* Returns a model's layer for 64 tokens, with addresses of no buffer and without a workspace. */
static moe_layer_desc model_desc(int model)
{
    static const int size[MODELS][4] = {
        {4096, 14336, 8, 2}, {2048, 768, 128, 8}, {7168, 2048, 256, 8}, {2880, 2880, 128, 4}};
    char* at = TEST_FAR;
    moe_layer_desc d = {};
    const void** const address[] = {&d.x, &d.w1.base, &d.w2.base, (const void**)&d.y};
    for (size_t i = 0; i < sizeof address / sizeof *address; ++i)
        *address[i] = at += (int64_t)1 << 36; /* 64 GiB apart */
    d.num_tokens = 64, d.hidden = size[model][0], d.intermediate = size[model][1];
    d.num_experts = size[model][2], d.top_k = size[model][3];
    if (model == GPT_OSS) {
        d.logits = (const float*)(at += (int64_t)1 << 36);
        d.bias1 = at += (int64_t)1 << 36, d.bias2 = at += (int64_t)1 << 36;
        d.gate.score = MOE_SCORE_TOPK_SOFTMAX;
        d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED, d.gate_up = MOE_GATE_UP_INTERLEAVED;
        return d;
    }
    d.router = at += (int64_t)1 << 36;
    d.gate.renormalize = 1;
    if (model == DEEPSEEK) {
        d.gate.score = MOE_SCORE_SIGMOID, d.gate.scale = 2.5f;
        d.gate.expert_bias = (const float*)(at += (int64_t)1 << 36);
        d.gate.num_groups = 8, d.gate.top_groups = 4;
        d.shared.intermediate = 2048;
        d.shared.w1.base = at += (int64_t)1 << 36, d.shared.w2.base = at += (int64_t)1 << 36;
    }
    return d;
}

/* Refuses wrong fields of a model that has all its buffers. */
static void refuse_model(const moe_layer_desc* complete, int model)
{
    const moe_layer_desc good = *complete;
    moe_layer_desc d;
    size_t bytes;
    REFUSED(d.top_k = d.num_experts + 1, MOE_ERR_RANGE, top_k);
    CHECK_STATUS(moe_layer_workspace(&d, &bytes), MOE_STATUS(MOE_ERR_RANGE, top_k));
    REFUSED(d.hidden += 4, MOE_ERR_MULTIPLE, hidden);
    CHECK_STATUS(moe_layer_workspace(&d, &bytes), MOE_STATUS(MOE_ERR_MULTIPLE, hidden));
    REFUSED(d.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
    if (model == GPT_OSS) {
        REFUSED(d.router = d.x, MOE_ERR_CONFLICT, router);
        REFUSED_EACH(limit, MOE_ERR_RANGE, limit, -1, NAN);
        REFUSED(d.alpha = INFINITY, MOE_ERR_RANGE, alpha);
        REFUSED(d.gate_up = MOE_GATE_UP_SEPARATE, MOE_ERR_NULL, w1);
        REFUSED((d.activation = 0, d.limit = 7), MOE_ERR_CONFLICT, limit);
        return;
    }
    REFUSED(d.limit = 7, MOE_ERR_CONFLICT, limit);
    REFUSED(d.alpha = 1.702f, MOE_ERR_CONFLICT, alpha);
    REFUSED(d.router = 0, MOE_ERR_NULL, router);
    if (model != DEEPSEEK) {
        REFUSED(d.gate.threshold = 0.5f, MOE_ERR_CONFLICT, threshold);
        REFUSED(d.gate.top_groups = 2, MOE_ERR_RANGE, top_groups);
        return;
    }
    REFUSED_EACH(gate.num_groups, MOE_ERR_RANGE, num_groups, 7, 64);
    REFUSED(d.gate.top_groups = 9, MOE_ERR_RANGE, top_groups);
    REFUSED((d.top_k = 9, d.gate.num_groups = 32, d.gate.top_groups = 1), MOE_ERR_CONFLICT,
            top_groups); /* 8 experts to choose 9 from */
    REFUSED(d.gate.whole_batch = 1, MOE_ERR_CONFLICT, expert_bias);
    REFUSED(d.shared.intermediate = 0, MOE_ERR_CONFLICT, shared);
    REFUSED(d.shared.limit = 7, MOE_ERR_CONFLICT, shared);
}

/* Compares the gate of the layer's last run with the reference that has its rules, on the logits
   that the device has, but for tokens whose choice depends on rounding. */
static void compare_rules(const layer_bufs* b, const layer_case* c, const float* h_bias)
{
    const int T = c->T, K = c->K;
    int32_t* want_ids = (int32_t*)test_host(T * K * 4);
    double *want = (double*)test_host(T * K * 8), *margin = (double*)test_host(T * 8);
    void* copy = tbuf_copy(&b->workspace);
    moe_gate_desc g = b->d.gate;
    moe_layer_view v;
    int compared = 0;
    CHECK_STATUS(moe_layer_get_view(&b->d, &v), MOE_OK);
    g.logits = in_copy(b, copy, v.logits), g.expert_bias = h_bias;
    g.num_tokens = T, g.num_experts = c->E, g.top_k = K;
    moe_ref_gate_rules_f64(&g, want_ids, want, 0, 0, margin);
    for (int s = 0; s < T * K; ++s) {
        const float got = ((const float*)in_copy(b, copy, v.weights))[s];
        const int id = ((const int32_t*)in_copy(b, copy, v.ids))[s];
        if (margin[s / K] < 1e-5) continue;
        ++compared;
        CHECK(id == want_ids[s] && fabs(got - want[s]) <= 4e-6 * fabs(want[s]),
              "slot %d: expert %d, weight %.9g, not %d, %.9g", s, id, (double)got, want_ids[s],
              want[s]);
    }
    CHECK(compared > T * K / 2, "%d of %d slots were compared", compared, T * K);
    TFREE(want_ids, want, margin, copy);
}

/* Runs a small layer with the settings of DeepSeek-V3. */
static void run_deepseek(trand* r)
{
    enum { E = 32 };
    layer_case c = normal_case(37, 64, 40, E, 4);
    layer_bufs b;
    float h_bias[E];
    tbuf bias;
    for (int e = 0; e < E; ++e) h_bias[e] = trand_normal(r) * 0.2f;
    bias = tbuf_from("expert_bias", h_bias, sizeof h_bias, 4);
    c.score = MOE_SCORE_SIGMOID, c.renormalize = 1, c.scale = 2.5f;
    c.shared = 40;
    c.rules = 1;
    bufs_new(&b, &c, r);
    b.d.gate.expert_bias = (const float*)bias.p;
    b.d.gate.num_groups = 8, b.d.gate.top_groups = 4;
    fit_workspace(&b, &c);
    CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
    compare(&b, &c);
    compare_rules(&b, &c, h_bias);
    CHECK(tbuf_holds(&bias, h_bias), "expert_bias was written");
    tbuf_free(&bias);
    bufs_free(&b);
}

/* Runs a small layer with the settings of gpt-oss. */
static void run_gpt_oss(trand* r)
{
    layer_case c = normal_case(37, 64, 40, 16, 4);
    c.from = FROM_LOGITS;
    c.score = MOE_SCORE_TOPK_SOFTMAX;
    c.activation = MOE_ACTIVATION_SWIGLU_CLAMPED;
    c.gate_up = MOE_GATE_UP_INTERLEAVED;
    c.bias = 1;
    run_case(&c, r);
}

static void test_layer_models(void)
{
    trand r = trand_new(24);
    for (int model = 0; model < MODELS; ++model) {
        moe_layer_desc d = model_desc(model);
        moe_gemm_plan up, down;
        size_t bytes = 0;
        CHECK_STATUS(moe_layer_workspace(&d, &bytes), MOE_OK);
        CHECK(bytes > 0, "model %d: no workspace", model);
        d.workspace = TEST_FAR, d.workspace_bytes = bytes;
        CHECK_STATUS(moe_layer_plan(&d, &up, &down), test_gemm_status(MOE_BF16, MOE_TILE_AUTO));
        refuse_model(&d, model);
    }
    run_deepseek(&r);
    run_gpt_oss(&r);
}

static void layer_models(void) { RUN(test_layer_models); }

#endif
