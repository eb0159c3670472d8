/* Gate and route, all outputs, in a captured graph.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_gate_route.cu -o bench_gate_route

   Floor: logits read once; ids, weights, slot_row, row_slot, row_weight and places written once,
   ids and weights read once more: T (4 E + 36 K) bytes at the copy rate, with fp32 logits. */
#include "bench.h"

#include "../moe/ref/ref.h"

typedef struct job {
    moe_gate_desc gate;
    moe_route_desc route;
} job;

static void run_both(void* context, cudaStream_t stream)
{
    const job* j = (const job*)context;
    BENCH_MOE(moe_gate(&j->gate, stream));
    BENCH_MOE(moe_route(&j->route, stream));
}

static void run_gate(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_gate(&((const job*)context)->gate, stream));
}

static void run_route(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_route(&((const job*)context)->route, stream));
}

static job make_job(int T, int E, int K, int dtype, int score, uint32_t seed, int hand_counts)
{
    job j;
    const size_t slots = (size_t)T * (size_t)K;
    memset(&j, 0, sizeof j);
    j.gate.logits = bench_random((int64_t)T * E, dtype, 1.0f, seed);
    j.gate.logits_dtype = dtype, j.gate.score = score, j.gate.renormalize = score == MOE_SCORE_SIGMOID;
    j.gate.ids = (int32_t*)bench_alloc(slots * 4);
    j.gate.weights = (float*)bench_alloc(slots * 4);
    j.gate.num_tokens = T, j.gate.num_experts = E, j.gate.top_k = K;
    j.route.ids = j.gate.ids;
    j.route.weights = j.gate.weights;
    j.route.expert_count = (int32_t*)bench_alloc((size_t)E * 4);
    j.route.expert_offset = (int32_t*)bench_alloc((size_t)E * 4 + 4);
    j.route.slot_row = (int32_t*)bench_alloc(slots * 4);
    j.route.row_slot = (int32_t*)bench_alloc(slots * 4);
    j.route.row_weight = (float*)bench_alloc(slots * 4);
    j.route.place = (moe_place*)bench_alloc(slots * 8);
    j.route.num_tokens = T, j.route.num_experts = E, j.route.top_k = K;
    j.route.workspace_bytes = (size_t)E * (size_t)moe_num_chunks(T) * 4;
    j.route.workspace = bench_alloc(j.route.workspace_bytes);
    if (hand_counts) {
        j.gate.chunk_count = (int32_t*)j.route.workspace;
        j.route.chunk_count = (int32_t*)j.route.workspace;
        j.route.workspace = 0;
    }
    return j;
}

static void free_job(job* j)
{
    cudaFree((void*)j->gate.logits), cudaFree(j->gate.ids), cudaFree(j->gate.weights);
    cudaFree(j->route.expert_count), cudaFree(j->route.expert_offset), cudaFree(j->route.slot_row);
    cudaFree(j->route.row_slot), cudaFree(j->route.row_weight), cudaFree(j->route.place);
    cudaFree(j->gate.chunk_count ? (void*)j->gate.chunk_count : j->route.workspace);
}

static void* host_copy(const void* device, size_t bytes)
{
    void* p = malloc(bytes);
    BENCH_CUDA(cudaMemcpy(p, device, bytes, cudaMemcpyDeviceToHost));
    return p;
}

/* Checks every id and every row against the reference. Returns the number of wrong ones. */
static int verify(const job* j, cudaStream_t stream)
{
    const int T = j->gate.num_tokens, E = j->gate.num_experts, K = j->gate.top_k;
    const size_t slots = (size_t)T * (size_t)K;
    const size_t logit_bytes =
        (size_t)T * (size_t)E * (size_t)moe_dtype_bytes(j->gate.logits_dtype);
    int32_t* want_ids = (int32_t*)malloc(slots * 4);
    double* want_weights = (double*)malloc(slots * 8);
    int32_t* next = (int32_t*)calloc((size_t)E + 1, 4);
    moe_ref_gate_desc want;
    void* logits;
    int32_t *ids, *row_slot;
    float* weights;
    int wrong = 0;
    BENCH_CUDA(cudaMemset(j->gate.ids, 0x55, slots * 4));
    BENCH_CUDA(cudaMemset(j->gate.weights, 0xff, slots * 4)); /* NaN */
    BENCH_CUDA(cudaMemset(j->route.row_slot, 0xff, slots * 4));
    run_both((void*)j, stream);
    BENCH_CUDA(cudaStreamSynchronize(stream));
    logits = host_copy(j->gate.logits, logit_bytes);
    ids = (int32_t*)host_copy(j->gate.ids, slots * 4);
    weights = (float*)host_copy(j->gate.weights, slots * 4);
    row_slot = (int32_t*)host_copy(j->route.row_slot, slots * 4);
    memset(&want, 0, sizeof want);
    want.logits = logits;
    want.logits_dtype = j->gate.logits_dtype;
    want.score = j->gate.score, want.renormalize = j->gate.renormalize;
    want.num_tokens = T, want.num_experts = E, want.top_k = K;
    moe_ref_gate_f64(&want, want_ids, want_weights, 0, 0);
    for (size_t s = 0; s < slots; ++s) {
        wrong += ids[s] != want_ids[s] || !(fabs(weights[s] - want_weights[s]) < 1e-6);
        next[want_ids[s] + 1]++;
    }
    for (int e = 0; e < E; ++e) next[e + 1] += next[e];
    for (size_t s = 0; s < slots; ++s) wrong += row_slot[next[want_ids[s]]++] != (int32_t)s;
    free(logits), free(ids), free(row_slot), free(want_ids), free(want_weights), free(weights);
    free(next);
    return wrong;
}

/* The rules, one at a time, as set_rule sets them in a job of make_job. */
enum {
    RULE_NONE, RULE_SPARSEMAX, RULE_QUADRATIC, RULE_PIONEER, RULE_THRESHOLD, RULE_GROUPS, RULE_BIAS,
    RULE_DEEPSEEK, RULE_TEMPERATURE, RULE_NOISE, RULE_DROPOUT, RULE_EXPERT_DISABLED, RULE_TOKEN_DISABLED,
    RULE_WHOLE_BATCH, RULE_PROB_SUM, RULES
};
static const char* const rule_name[] = {
    "no rule", "sparsemax", "quadratic", "pioneer", "sigmoid, threshold 0.5", "sigmoid, 4 of 8 groups",
    "bias", "sigmoid, bias, 4 of 8 groups, renormalised", "temperature", "noise", "dropout",
    "experts off", "tokens off", "whole batch", "sums of probabilities"};

static void set_rule(job* j, int rule)
{
    moe_gate_desc* g = &j->gate;
    const int E = g->num_experts;
    size_t bytes = 0;
    switch (rule) {
    case RULE_SPARSEMAX: g->score = MOE_SCORE_SPARSEMAX; break;
    case RULE_QUADRATIC: g->score = MOE_SCORE_QUADRATIC; break;
    case RULE_PIONEER: g->score = MOE_SCORE_PIONEER; break;
    case RULE_THRESHOLD: g->score = MOE_SCORE_SIGMOID, g->threshold = 0.5f; break;
    case RULE_TEMPERATURE: g->temperature = 0.8f; break;
    case RULE_NOISE: g->noise = 1, g->seed = 5; break;
    case RULE_DROPOUT: g->dropout = 0.1f, g->seed = 5; break;
    case RULE_WHOLE_BATCH: g->whole_batch = 1; break;
    case RULE_PROB_SUM: g->prob_sum = (float*)bench_alloc((size_t)E * 4); break;
    case RULE_DEEPSEEK: g->renormalize = 1; break;
    default: break;
    }
    if (rule == RULE_GROUPS || rule == RULE_DEEPSEEK)
        g->score = MOE_SCORE_SIGMOID, g->num_groups = 8, g->top_groups = 4;
    if (rule == RULE_BIAS || rule == RULE_DEEPSEEK)
        g->expert_bias = (const float*)bench_random(E, MOE_FP32, 0.1f, 77);
    if (rule == RULE_EXPERT_DISABLED || rule == RULE_TOKEN_DISABLED) {
        const int n = rule == RULE_EXPERT_DISABLED ? E : g->num_tokens;
        uint8_t* off = (uint8_t*)bench_alloc((size_t)n);
        BENCH_CUDA(cudaMemset(off, 0, (size_t)n));
        BENCH_CUDA(cudaMemset2D(off, 16, 1, 1, (size_t)n / 16)); /* every sixteenth */
        if (rule == RULE_EXPERT_DISABLED) g->expert_disabled = off;
        else g->token_disabled = off;
    }
    BENCH_MOE(moe_gate_workspace(g, &bytes));
    g->workspace = bytes ? bench_alloc(bytes) : 0;
    g->workspace_bytes = bytes;
}

static void free_rule(job* j)
{
    cudaFree(j->gate.prob_sum), cudaFree((void*)j->gate.expert_bias), cudaFree(j->gate.workspace);
    cudaFree((void*)j->gate.expert_disabled), cudaFree((void*)j->gate.token_disabled);
}

/* Checks ids and weights of the first tokens (whole_batch: of all) against the reference. Skips
   tokens whose choice depends on fp32 rounding, at most half of them. The least margin is smaller
   for whole_batch, whose margins are relative to the sum of absolute logits, and for squared
   cosines. */
static int verify_rule(const job* j, cudaStream_t stream)
{
    moe_gate_desc d = j->gate;
    const double least_margin = d.whole_batch || d.score == MOE_SCORE_PIONEER ? 1e-6 : 3e-5;
    const int K = d.top_k;
    const int T = d.whole_batch || d.num_tokens < 2048 ? d.num_tokens : 2048;
    const size_t slots = (size_t)T * (size_t)K, E = (size_t)d.num_experts;
    int32_t *ids, *want = (int32_t*)malloc(slots * 4);
    float* got;
    double *weights = (double*)malloc(slots * 8), *margin = (double*)malloc((size_t)T * 8);
    int wrong = 0, compared = 0;
    BENCH_CUDA(cudaMemset(d.ids, 0x55, (size_t)d.num_tokens * (size_t)K * 4));
    BENCH_CUDA(cudaMemset(d.weights, 0xff, (size_t)d.num_tokens * (size_t)K * 4)); /* NaN */
    run_both((void*)j, stream);
    BENCH_CUDA(cudaStreamSynchronize(stream));
    ids = (int32_t*)host_copy(d.ids, slots * 4);
    got = (float*)host_copy(d.weights, slots * 4);
    d.num_tokens = T;
    d.logits = host_copy(d.logits, (size_t)T * E * 4);
    if (d.expert_bias) d.expert_bias = (const float*)host_copy(d.expert_bias, E * 4);
    if (d.expert_disabled) d.expert_disabled = (const uint8_t*)host_copy(d.expert_disabled, E);
    if (d.token_disabled) d.token_disabled = (const uint8_t*)host_copy(d.token_disabled, (size_t)T);
    moe_ref_gate_rules_f64(&d, want, weights, 0, 0, margin);
    for (int t = 0; t < T; ++t) {
        if (!(margin[t] >= least_margin)) continue;
        ++compared;
        for (size_t i = (size_t)t * (size_t)K; i < (size_t)(t + 1) * (size_t)K; ++i)
            wrong += ids[i] != want[i] || !(fabs(got[i] - weights[i]) < 3e-5);
    }
    wrong += compared < T / 2;
    free((void*)d.logits), free(ids), free(want), free(got), free(weights), free(margin);
    if (d.expert_bias) free((void*)d.expert_bias);
    if (d.expert_disabled) free((void*)d.expert_disabled);
    if (d.token_disabled) free((void*)d.token_disabled);
    return wrong;
}

/* Compares each rule with the plain gate: gate + route, and the gate alone. Returns the number of
   wrong ones. */
static int time_rules(bench_state* s, int T, int E, int K)
{
    enum { CALLS = 24 };
    double plain = 0;
    int failures = 0;
    for (int rule = 0; rule < RULES; ++rule) {
        job jobs[CALLS];
        void* context[CALLS];
        char what[120];
        double both, gate;
        for (int c = 0; c < CALLS; ++c) {
            jobs[c] = make_job(T, E, K, MOE_FP32, MOE_SCORE_SOFTMAX, (uint32_t)(10 + c), 1);
            set_rule(&jobs[c], rule);
            context[c] = &jobs[c];
        }
        if (verify_rule(&jobs[0], s->stream)) {
            ++failures;
            fprintf(stderr, "wrong: T %d E %d K %d, %s\n", T, E, K, rule_name[rule]);
        }
        both = bench_time_graph(s, run_both, context, CALLS);
        gate = bench_time_graph(s, run_gate, context, CALLS);
        if (rule == RULE_NONE) plain = both;
        snprintf(what, sizeof what, "T %d E %d K %d, %s", T, E, K, rule_name[rule]);
        bench_row(s, what, both, gate * 1e3, "us gate", both / plain, "plain");
        for (int c = 0; c < CALLS; ++c) free_rule(&jobs[c]), free_job(&jobs[c]);
    }
    return failures;
}

int main(int argc, char** argv)
{
    static const struct {
        int T, E, K, dtype, score;
        const char* note;
    } shape[] = {{32768, 128, 8, MOE_FP32, MOE_SCORE_SOFTMAX, ""},
                 {8192, 256, 8, MOE_FP32, MOE_SCORE_SOFTMAX, ""},
                 {8192, 256, 8, MOE_FP32, MOE_SCORE_SIGMOID, ", sigmoid"},
                 {32768, 128, 8, MOE_BF16, MOE_SCORE_SOFTMAX, ", bf16"},
                 {16384, 8, 2, MOE_FP32, MOE_SCORE_SOFTMAX, ""},
                 {131072, 128, 8, MOE_FP32, MOE_SCORE_SOFTMAX, ""},
                 {4096, 1024, 8, MOE_FP32, MOE_SCORE_SOFTMAX, ""},
                 {64, 256, 8, MOE_FP32, MOE_SCORE_SOFTMAX, ""}};
    bench_state s = bench_open(argc, argv, "gate + route, softmax of fp32 logits where nothing is said");
    int failures = 0;
    for (size_t i = 0; i < sizeof shape / sizeof shape[0]; ++i) {
        enum { CALLS = 24 };
        const int T = shape[i].T, E = shape[i].E, K = shape[i].K, dtype = shape[i].dtype;
        const double gate_bytes = (double)T * ((double)moe_dtype_bytes(dtype) * E + 8.0 * K);
        const double route_bytes = (double)T * 28.0 * K;
        job jobs[CALLS];
        void* context[CALLS];
        char what[96];
        double ms;
        for (int c = 0; c < CALLS; ++c) {
            jobs[c] = make_job(T, E, K, dtype, shape[i].score, (uint32_t)(10 + c), 1);
            context[c] = &jobs[c];
        }
        failures += verify(&jobs[0], s.stream) != 0;
        ms = bench_time_graph(&s, run_both, context, CALLS);
        snprintf(what, sizeof what, "T %d E %d K %d%s  gate + route", T, E, K, shape[i].note);
        bench_row(&s, what, ms, (gate_bytes + route_bytes) / ms * 1e-9, "TB/s",
                  (gate_bytes + route_bytes) / s.copy_rate * 1e3 / ms, "floor");
        if (i == 0) bench_note_clocks(&s, run_both, &jobs[0], ms);
        ms = bench_time_graph(&s, run_gate, context, CALLS);
        bench_row(&s, "    gate alone", ms, gate_bytes / ms * 1e-9, "TB/s",
                  gate_bytes / s.copy_rate * 1e3 / ms, "floor");
        ms = bench_time_graph(&s, run_route, context, CALLS);
        bench_row(&s, "    route alone, with the gate's counts", ms, route_bytes / ms * 1e-9, "TB/s",
                  route_bytes / s.copy_rate * 1e3 / ms, "floor");
        for (int c = 0; c < CALLS; ++c) {
            free_job(&jobs[c]);
            jobs[c] = make_job(T, E, K, dtype, shape[i].score, (uint32_t)(10 + c), 0);
            run_gate(&jobs[c], s.stream);
        }
        ms = bench_time_graph(&s, run_route, context, CALLS);
        bench_row(&s, "    route alone, counting itself", ms, (route_bytes + 4.0 * T * K) / ms * 1e-9,
                  "TB/s", (route_bytes + 4.0 * T * K) / s.copy_rate * 1e3 / ms, "floor");
        for (int c = 0; c < CALLS; ++c) free_job(&jobs[c]);
    }
    failures += time_rules(&s, 32768, 128, 8);
    failures += time_rules(&s, 8192, 256, 8);
    return bench_close(&s, failures);
}
