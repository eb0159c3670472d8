/* Route with each of its options compared with plain route, all outputs, in a captured graph.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_route_options.cu -o bench_route_options

   First every route counts by itself (replicas cannot take the gate's counts): plain route is two
   launches, capacity by weight three. Then gate and route together, compared with plain gate and
   route; the gate passes its counts to route where the option allows it. */
#include "bench.h"

#include "../moe/ref/ref.h"

typedef struct job {
    moe_gate_desc gate;
    moe_route_desc route;
} job;

typedef struct option {
    const char* what;
    int multiple, rule, replicas;
} option;

static void run_route(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_route(&((const job*)context)->route, stream));
}

static void run_both(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_gate(&((const job*)context)->gate, stream));
    run_route(context, stream);
}

/* Returns gate and plain route of some logits; outputs have room for every option. */
static job make_job(int T, int E, int K, uint32_t seed)
{
    const size_t slots = (size_t)T * (size_t)K, most = slots + (size_t)E * 2 * 128;
    job j;
    memset(&j, 0, sizeof j);
    j.gate.logits = bench_random((int64_t)T * E, MOE_FP32, 1.0f, seed);
    j.gate.ids = (int32_t*)bench_alloc(slots * 4);
    j.gate.weights = (float*)bench_alloc(slots * 4);
    j.gate.num_tokens = T, j.gate.num_experts = E, j.gate.top_k = K;
    j.route.ids = j.gate.ids;
    j.route.weights = j.gate.weights;
    j.route.expert_count = (int32_t*)bench_alloc((size_t)E * 2 * 4);
    j.route.expert_offset = (int32_t*)bench_alloc((size_t)E * 2 * 4 + 4);
    j.route.drop_count = (int32_t*)bench_alloc((size_t)E * 2 * 4);
    j.route.slot_row = (int32_t*)bench_alloc(slots * 4);
    j.route.row_slot = (int32_t*)bench_alloc(most * 4);
    j.route.row_weight = (float*)bench_alloc(most * 4);
    j.route.place = (moe_place*)bench_alloc(slots * 8);
    j.route.num_tokens = T, j.route.num_experts = E, j.route.top_k = K;
    j.route.workspace_bytes = (size_t)E * 2 * MOE_MAX_CHUNKS * 4 + (size_t)E * 16 + slots * 8 + 64;
    j.route.workspace = bench_alloc(j.route.workspace_bytes);
    return j;
}

static void free_job(job* j)
{
    cudaFree((void*)j->gate.logits), cudaFree(j->gate.ids), cudaFree(j->gate.weights);
    cudaFree(j->route.expert_count), cudaFree(j->route.expert_offset);
    cudaFree(j->route.drop_count), cudaFree(j->route.slot_row), cudaFree(j->route.row_slot);
    cudaFree(j->route.row_weight), cudaFree(j->route.place), cudaFree(j->route.workspace);
}

/* Returns the route of a job with an option. */
static moe_route_desc with(const job* j, const option* o, const int32_t* replica_offset)
{
    moe_route_desc d = j->route;
    if (!o->rule) d.drop_count = 0;
    d.row_multiple = o->multiple;
    d.drop_rule = o->rule;
    d.capacity = o->rule ? (int32_t)((int64_t)d.num_tokens * d.top_k / d.num_experts) : 0;
    if (o->replicas) d.replica_offset = replica_offset, d.num_replicas = d.num_experts * 2;
    return d;
}

/* Checks every map against the reference. Returns the number of wrong ones. */
static int verify(const moe_route_desc* d, const int32_t* replica_offset, cudaStream_t stream)
{
    const size_t slots = (size_t)d->num_tokens * (size_t)d->top_k;
    const int P = d->num_replicas ? d->num_replicas : d->num_experts;
    int64_t rows;
    moe_ref_route_desc r;
    int32_t *ids = (int32_t*)malloc(slots * 4), *got;
    float* weights = (float*)malloc(slots * 4);
    int wrong = 0;
    memset(&r, 0, sizeof r);
    BENCH_MOE(moe_route_max_rows(d, &rows));
    BENCH_MOE(moe_route(d, stream));
    BENCH_CUDA(cudaStreamSynchronize(stream));
    BENCH_CUDA(cudaMemcpy(ids, d->ids, slots * 4, cudaMemcpyDeviceToHost));
    BENCH_CUDA(cudaMemcpy(weights, d->weights, slots * 4, cudaMemcpyDeviceToHost));
    got = (int32_t*)malloc(((size_t)rows + (size_t)P + 1) * 4);
    r.ids = ids, r.weights = weights;
    r.replica_offset = d->replica_offset ? replica_offset : 0;
    r.num_replicas = d->num_replicas, r.row_multiple = d->row_multiple;
    r.capacity = d->capacity, r.drop_rule = d->drop_rule, r.max_rows = rows;
    r.num_tokens = d->num_tokens, r.num_experts = d->num_experts, r.top_k = d->top_k;
    r.expert_count = (int32_t*)malloc((size_t)P * 4);
    r.expert_offset = (int32_t*)malloc((size_t)P * 4 + 4);
    r.row_slot = (int32_t*)malloc((size_t)rows * 4);
    r.row_weight = (float*)malloc((size_t)rows * 4);
    r.slot_row = (int32_t*)malloc(slots * 4);
    wrong += moe_ref_route(&r) != -1;
#define SAME(field, count)                                                                        \
    BENCH_CUDA(cudaMemcpy(got, d->field, (count) * 4, cudaMemcpyDeviceToHost));                   \
    wrong += memcmp(got, r.field, (count) * 4) != 0
    SAME(expert_count, (size_t)P);
    SAME(expert_offset, (size_t)P + 1);
    SAME(row_slot, (size_t)rows);
    SAME(row_weight, (size_t)rows);
    free(got);
    got = (int32_t*)malloc(slots * 4);
    SAME(slot_row, slots);
    free(ids), free(weights), free(got), free(r.expert_count), free(r.expert_offset);
    free(r.row_slot), free(r.row_weight), free(r.slot_row);
    return wrong;
}

static void run_shape(bench_state* s, int T, int E, int K, int* failures)
{
    enum { CALLS = 24 };
    static const option options[] = {
        {"plain", 0, 0, 0},
        {"rows padded to 128", 128, 0, 0},
        {"capacity T K / E by position", 0, MOE_DROP_BY_POSITION, 0},
        {"capacity T K / E by weight", 0, MOE_DROP_BY_WEIGHT, 0},
        {"two replicas of each expert", 0, 0, 1},
        {"replicas, by weight, padded to 128", 128, MOE_DROP_BY_WEIGHT, 1}};
    const double bytes = (double)T * K * 32.0;
    job base[CALLS], jobs[CALLS];
    void* context[CALLS];
    int32_t* offset = (int32_t*)malloc((size_t)E * 4 + 4);
    int32_t* replica_offset = (int32_t*)bench_alloc((size_t)E * 4 + 4);
    double plain = 0, plain_both = 0, ms;
    char what[96];
    for (int e = 0; e <= E; ++e) offset[e] = 2 * e;
    BENCH_CUDA(cudaMemcpy(replica_offset, offset, (size_t)E * 4 + 4, cudaMemcpyHostToDevice));
    for (int c = 0; c < CALLS; ++c) {
        base[c] = make_job(T, E, K, (uint32_t)(10 + c));
        BENCH_MOE(moe_gate(&base[c].gate, s->stream));
    }
    for (size_t i = 0; i < sizeof options / sizeof options[0]; ++i) {
        const option* o = &options[i];
        for (int c = 0; c < CALLS; ++c) {
            jobs[c] = base[c];
            jobs[c].route = with(&base[c], o, replica_offset);
            context[c] = &jobs[c];
        }
        *failures += verify(&jobs[0].route, offset, s->stream) != 0;
        ms = bench_time_graph(s, run_route, context, CALLS);
        if (i == 0) plain = ms;
        snprintf(what, sizeof what, "T %d E %d K %d  route, %s", T, E, K, o->what);
        bench_row(s, what, ms, bytes / ms * 1e-9, "TB/s", ms / plain, "plain route's time");
    }
    for (size_t i = 0; i < sizeof options / sizeof options[0]; ++i) {
        const option* o = &options[i];
        for (int c = 0; c < CALLS; ++c) {
            jobs[c] = base[c];
            jobs[c].route = with(&base[c], o, replica_offset);
            if (!o->replicas) { /* the gate's counts follow the part of the workspace that route
                                   uses */
                int32_t* count = (int32_t*)((char*)base[c].route.workspace +
                                            base[c].route.workspace_bytes -
                                            (size_t)E * (size_t)moe_num_chunks(T) * 4);
                jobs[c].gate.chunk_count = count;
                jobs[c].route.chunk_count = count;
            }
            context[c] = &jobs[c];
        }
        run_both(&jobs[0], s->stream);
        *failures += verify(&jobs[0].route, offset, s->stream) != 0;
        ms = bench_time_graph(s, run_both, context, CALLS);
        if (i == 0) plain_both = ms;
        if (i == 0) bench_note_clocks(s, run_both, &jobs[0], ms);
        snprintf(what, sizeof what, "T %d E %d K %d  gate + route, %s", T, E, K, o->what);
        bench_row(s, what, ms, bytes / ms * 1e-9, "TB/s", ms / plain_both, "plain gate + route");
    }
    for (int c = 0; c < CALLS; ++c) free_job(&base[c]);
    cudaFree(replica_offset);
    free(offset);
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, "route with its options");
    int failures = 0;
    run_shape(&s, 32768, 128, 8, &failures);
    run_shape(&s, 8192, 256, 8, &failures);
    return bench_close(&s, failures);
}
