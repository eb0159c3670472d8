/* Gradients of the gate, in a captured graph, against a copy of as many bytes in the same run.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_gate_backward.cu -o bench_gate_backward

   Bytes of a token: ids, weights, dweights read, 12 K; dlogits written, 4 E; and 4 E of logits
   where the gradients depend on the whole row, else 4 K for the sigmoids of the choices. The copy
   reads half of these bytes and writes the other half. */
#include "bench.h"

#include "../moe/balance_loss.cuh"
#include "../moe/gate_backward.cuh"
#include "../moe/ref/ref.h"

enum { CALLS = 24, VERIFIED = 512 }; /* calls of a graph; tokens that are verified */

typedef struct job {
    moe_gate_backward_desc backward; /* backward.gate: the gate's call */
    moe_balance_loss_desc loss;
    bench_copy_args copy;
} job;

/* What a row of the table is about. */
typedef struct shape {
    int T, E, K, score, renormalize, balance, bias;
    const char* name;
} shape;

static void run_gate(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_gate(&((const job*)context)->backward.gate, stream));
}

static void run_backward(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_gate_backward(&((const job*)context)->backward, stream));
}

static void run_copy(void* context, cudaStream_t stream)
{
    bench_copy(&((job*)context)->copy, stream);
}

static int depends_on_row(const shape* s)
{
    return s->balance || (s->score == MOE_SCORE_SOFTMAX && !s->renormalize);
}

static double bytes_of(const shape* s)
{
    const double E = s->E, K = s->K;
    return s->T * (12 * K + 4 * E +
                   (depends_on_row(s)               ? 4 * E
                    : s->score == MOE_SCORE_SIGMOID ? 4 * K
                                                    : 0));
}

static job make_job(const shape* s, uint32_t seed, cudaStream_t stream)
{
    const size_t slots = (size_t)s->T * (size_t)s->K, E = (size_t)s->E;
    moe_gate_desc* g;
    job j;
    memset(&j, 0, sizeof j);
    g = &j.backward.gate;
    g->logits = bench_random((int64_t)s->T * s->E, MOE_FP32, 1.0f, seed);
    g->ids = (int32_t*)bench_alloc(slots * 4);
    g->weights = (float*)bench_alloc(slots * 4);
    g->score = s->score, g->renormalize = s->renormalize;
    g->num_tokens = s->T, g->num_experts = s->E, g->top_k = s->K;
    if (s->bias) g->expert_bias = (const float*)bench_random(s->E, MOE_FP32, 0.1f, 77);
    if (s->balance) {
        g->expert_count = (int32_t*)bench_alloc(E * 4);
        g->prob_sum = (float*)bench_alloc(E * 4);
        g->z_sum = (float*)bench_alloc(4);
    }
    BENCH_MOE(moe_gate_workspace(g, &g->workspace_bytes));
    if (g->workspace_bytes) g->workspace = bench_alloc(g->workspace_bytes);
    run_gate(&j, stream);
    if (s->balance) {
        j.loss.expert_count = g->expert_count;
        j.loss.prob_sum = g->prob_sum, j.loss.z_sum = g->z_sum;
        j.loss.balance_grad = (float*)bench_alloc(E * 4 + 4);
        j.loss.num_experts = s->E;
        j.loss.aux_coefficient = (float)s->T, j.loss.z_coefficient = (float)s->T; /* of O(1) */
        BENCH_MOE(moe_balance_loss(&j.loss, stream));
        j.backward.balance_grad = j.loss.balance_grad;
    }
    j.backward.dweights = (const float*)bench_random((int64_t)slots, MOE_FP32, 1.0f, seed + 1000);
    j.backward.dlogits = bench_alloc((size_t)s->T * E * 4);
    j.copy.bytes = (size_t)(bytes_of(s) / 2);
    j.copy.from = bench_random((int64_t)(j.copy.bytes / 4 + 1), MOE_FP32, 1.0f, seed);
    j.copy.to = bench_alloc(j.copy.bytes);
    return j;
}

static void free_job(job* j)
{
    moe_gate_desc* g = &j->backward.gate;
    cudaFree((void*)g->logits), cudaFree(g->ids), cudaFree(g->weights), cudaFree(g->workspace);
    cudaFree((void*)g->expert_bias), cudaFree(g->expert_count), cudaFree(g->prob_sum);
    cudaFree(g->z_sum), cudaFree(j->loss.balance_grad), cudaFree((void*)j->backward.dweights);
    cudaFree(j->backward.dlogits), cudaFree(j->copy.to), cudaFree(j->copy.from);
}

static void* host_copy(const void* device, size_t bytes)
{
    void* p = malloc(bytes);
    BENCH_CUDA(cudaMemcpy(p, device, bytes, cudaMemcpyDeviceToHost));
    return p;
}

static double* host_doubles(const float* device, int64_t n)
{
    float* f = (float*)host_copy(device, (size_t)n * 4);
    double* p = (double*)malloc((size_t)n * 8);
    for (int64_t i = 0; i < n; ++i) p[i] = (double)f[i];
    free(f);
    return p;
}

/* Checks every gradient of the first and the last tokens against the reference. Returns the number
   of wrong ones. */
static int verify(const job* j, cudaStream_t stream)
{
    const moe_gate_backward_desc* b = &j->backward;
    const int64_t T = b->gate.num_tokens, E = b->gate.num_experts, K = b->gate.top_k;
    const int64_t n = T < (int64_t)VERIFIED ? T : (int64_t)VERIFIED;
    int wrong = 0;
    BENCH_CUDA(cudaMemset(b->dlogits, 0xff, (size_t)(T * E) * 4)); /* NaN */
    run_backward((void*)j, stream);
    BENCH_CUDA(cudaStreamSynchronize(stream));
    for (int side = 0; side < 2; ++side) {
        const int64_t first = side ? T - n : 0;
        moe_gate_desc g = b->gate;
        int32_t* ids = (int32_t*)host_copy(b->gate.ids + first * K, (size_t)(n * K) * 4);
        double* dweights = host_doubles(b->dweights + first * K, n * K);
        double* balance = b->balance_grad ? host_doubles(b->balance_grad, E + 1) : 0;
        double* want = (double*)malloc((size_t)(n * E) * 8);
        float* got = (float*)host_copy((const float*)b->dlogits + first * E, (size_t)(n * E) * 4);
        void* logits = host_copy((const float*)b->gate.logits + first * E, (size_t)(n * E) * 4);
        g.logits = logits, g.num_tokens = (int32_t)n; /* no rule depends on a token's number */
        moe_ref_gate_backward_f64(&g, ids, dweights, balance, want);
        for (int64_t i = 0; i < n * E; ++i)
            wrong += !(fabs(got[i] - want[i]) < 2e-6 + 1e-5 * fabs(want[i]));
        free(ids), free(dweights), free(balance), free(want), free(got), free(logits);
    }
    return wrong;
}

/* Times gradients and copies in turn, each a graph over rotating buffers. Returns 1 where a result
   is wrong. */
static int time_shape(bench_state* s, const shape* p)
{
    job jobs[CALLS];
    void* context[CALLS];
    bench_call calls[2];
    char what[120];
    int failed;
    for (int c = 0; c < CALLS; ++c) {
        jobs[c] = make_job(p, (uint32_t)(10 + c), s->stream);
        context[c] = &jobs[c];
    }
    failed = verify(&jobs[0], s->stream) != 0;
    if (failed) fprintf(stderr, "wrong: T %d E %d K %d, %s\n", p->T, p->E, p->K, p->name);
    calls[0] = bench_graph(s, run_backward, context, CALLS);
    calls[1] = bench_graph(s, run_copy, context, CALLS);
    bench_alternate(s, calls, 2);
    snprintf(what, sizeof what, "T %d E %d K %d, %s", p->T, p->E, p->K, p->name);
    bench_row(s, what, calls[0].ms, bytes_of(p) / calls[0].ms * 1e-9, "TB/s",
              calls[1].ms / calls[0].ms, "copy");
    bench_row(s, "    a copy of as many bytes", calls[1].ms, bytes_of(p) / calls[1].ms * 1e-9,
              "TB/s", bytes_of(p) / s->copy_rate * 1e3 / calls[1].ms, "copy rate");
    bench_free_graph(&calls[0]), bench_free_graph(&calls[1]);
    for (int c = 0; c < CALLS; ++c) free_job(&jobs[c]);
    return failed;
}

int main(int argc, char** argv)
{
    static const shape shapes[] = {
        {32768, 128, 8, MOE_SCORE_SOFTMAX, 1, 0, 0, "softmax renormalised"},
        {32768, 128, 8, MOE_SCORE_SOFTMAX, 0, 0, 0, "softmax"},
        {32768, 128, 8, MOE_SCORE_SOFTMAX, 0, 1, 0, "softmax, balance and z"},
        {32768, 128, 8, MOE_SCORE_SIGMOID, 1, 0, 1, "sigmoid renormalised, bias"},
        {32768, 128, 8, MOE_SCORE_SIGMOID, 1, 1, 1, "the same, balance and z"},
        {8192, 256, 8, MOE_SCORE_SOFTMAX, 0, 1, 0, "softmax, balance and z"},
        {8192, 256, 8, MOE_SCORE_SOFTMAX, 1, 0, 0, "softmax renormalised"},
        {4096, 64, 6, MOE_SCORE_SOFTMAX, 0, 1, 0, "softmax, balance and z"},
        {4096, 64, 6, MOE_SCORE_SOFTMAX, 1, 0, 0, "softmax renormalised"}};
    bench_state s = bench_open(argc, argv, "gradients of the gate, fp32");
    int failures = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; ++i)
        failures += time_shape(&s, &shapes[i]);
    return bench_close(&s, failures);
}
