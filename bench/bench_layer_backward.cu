/* Training of the whole layer: forward, backward, both in one CUDA graph, and each stage of both.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_layer_backward.cu -lcublas -lcublasLt \
        -o bench_layer_backward

     --shape T,H,I,E,K, --routing KIND    bench_routing.h
     --csv FILE, --reps N                 plot_stages.py draws the stages from FILE

   Rate: of forward the 6 T K H I flops of the experts, of backward 12, of both 18. The peer is the sum
   of cuBLAS's two dense products of the forward with the same rows: an ideal backward takes two of
   them, an ideal step three. Gradients of weights in bf16, in fp32 and added up in fp32 are timed
   apart, and rows gathered by the products or copied first. Everything of a shape is timed in turn.

   Checked first, against sums in double: dx and dweights of some tokens, elements of dw1, dw2 and
   drouter. Also: `saved` and the workspace have the documented bytes, and a step takes no other
   memory of the device. */
#include "bench_blas.h"
#include "bench_routing.h"

#include "../moe/layer_backward.cuh"

/* ---- what is run ---- */

enum { GRAD_BF16, GRAD_FP32, GRAD_ADDED, GRADS };
static const char* const grad_name[GRADS] = {"bf16", "fp32", "fp32, added up"};

/* A layer and its backward passes, one for each way. */
typedef struct training {
    moe_layer_desc l;
    moe_layer_backward_desc b[GRADS];
    moe_layer_prepared forward;
    moe_layer_backward_prepared backward[GRADS];
    moe_layer_backward_prepared other; /* the way to gather that was not chosen, bf16 */
    cudaGraphExec_t step[GRADS];
    size_t saved, forward_bytes, backward_bytes;
} training;

static void run_forward(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_layer_run(&((const training*)context)->forward, stream));
}

static void run_backward(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_layer_backward_run((const moe_layer_backward_prepared*)context, stream));
}

static void run_graph(void* context, cudaStream_t stream)
{
    BENCH_CUDA(cudaGraphLaunch((cudaGraphExec_t)context, stream));
}

/* A part of forward, or a stage of backward. */
typedef struct stage_job {
    const moe_layer_prepared* forward;           /* or null */
    const moe_layer_backward_prepared* backward; /* or null */
    int stage;
} stage_job;

static void run_stage(void* context, cudaStream_t stream)
{
    const stage_job* j = (const stage_job*)context;
    if (j->forward) BENCH_MOE(moe_layer_run_part(j->forward, j->stage, stream));
    else BENCH_MOE(moe_layer_backward_run_stage(j->backward, j->stage, stream));
}

enum { STAGES = MOE_LAYER_PARTS + MOE_LAYER_BACKWARD_STAGES };

/* Fills in the jobs of all stages, in the order of a step. */
static void list_stages(const training* m, stage_job* job)
{
    for (int i = 0; i < STAGES; ++i) {
        const int forward = i < MOE_LAYER_PARTS;
        job[i].forward = forward ? &m->forward : (const moe_layer_prepared*)0;
        job[i].backward = forward ? (const moe_layer_backward_prepared*)0 : &m->backward[GRAD_BF16];
        job[i].stage = forward ? i : i - MOE_LAYER_PARTS;
    }
}

/* ---- checks ---- */

/* Squares of errors and of exact numbers, for each result. */
enum { CHECK_DX, CHECK_DWEIGHTS, CHECK_DW1, CHECK_DW2, CHECK_DROUTER, CHECKS };
static const char* const check_name[CHECKS] = {"dx", "dweights", "dw1", "dw2", "drouter"};

typedef struct check_args {
    moe_layer_backward_desc b;
    moe_layer_view v;
    moe_layer_backward_view w;
    double* sums; /* [CHECKS, 2] */
    double* act;  /* [blocks, 3 I] scratch */
    int step;     /* tokens between those that are checked */
} check_args;

static __device__ double number(const void* p, int64_t at)
{
    return (double)moe_load_f32(p, at, MOE_BF16);
}

static __device__ void compare(double* sums, int what, double got, double want)
{
    atomicAdd(sums + 2 * what, (got - want) * (got - want));
    atomicAdd(sums + 2 * what + 1, want * want);
}

/* Writes to act [3 I] the gradients by gates, those by ups, and the activations, of token t and expert
   e, all with weight w in the first two. Returns this thread's part of the gradient of the weight. */
static __device__ double pre_of(const check_args* a, double* act, int64_t t, int64_t e, double w)
{
    const moe_layer_desc* l = &a->b.layer;
    const int64_t H = l->hidden, I = l->intermediate;
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < I; i += blockDim.x) {
        double v = 0.0, u = 0.0, p = 0.0, sigma;
        for (int64_t h = 0; h < H; ++h) {
            const double x = number(l->x, t * H + h);
            v += x * number(l->w1.base, (e * 2 * I + i) * H + h);
            u += x * number(l->w1.base, (e * 2 * I + I + i) * H + h);
            p += number(a->b.dy, t * H + h) * number(l->w2.base, (e * H + h) * I + i);
        }
        sigma = 1.0 / (1.0 + exp(-v));
        act[i] = w * p * u * sigma * (1.0 + v * (1.0 - sigma));
        act[I + i] = w * p * v * sigma;
        act[2 * I + i] = v * sigma * u;
        sum += p * v * sigma * u;
    }
    return sum;
}

/* dx and dweights of token blockIdx.x * step. */
MOE_KERNEL(256, 1) check_token(MOE_ARG(check_args) a)
{
    const moe_layer_desc* l = &a.b.layer;
    const int64_t H = l->hidden, I = l->intermediate, K = l->top_k, E = l->num_experts;
    const int64_t t = (int64_t)blockIdx.x * a.step;
    double* act = a.act + (int64_t)blockIdx.x * 3 * I;
    double dx[64]; /* H / 256 */
    __shared__ double dot;
    for (int i = 0; i < 64; ++i) dx[i] = 0.0;
    for (int64_t k = 0; k < K; ++k) {
        const int64_t e = a.v.ids[t * K + k];
        double part;
        __syncthreads();
        if (threadIdx.x == 0) dot = 0.0;
        __syncthreads();
        part = pre_of(&a, act, t, e, a.v.weights[t * K + k]);
        atomicAdd(&dot, part);
        __syncthreads();
        if (threadIdx.x == 0) compare(a.sums, CHECK_DWEIGHTS, a.w.dweights[t * K + k], dot);
        for (int64_t h = threadIdx.x, n = 0; h < H; h += 256, ++n)
            for (int64_t i = 0; i < I; ++i)
                dx[n] += act[i] * number(l->w1.base, (e * 2 * I + i) * H + h) +
                         act[I + i] * number(l->w1.base, (e * 2 * I + I + i) * H + h);
    }
    for (int64_t h = threadIdx.x, n = 0; h < H; h += 256, ++n) {
        for (int64_t e = 0; e < E && a.b.drouter; ++e)
            dx[n] += a.w.dlogits[t * E + e] * number(l->router, e * H + h);
        compare(a.sums, CHECK_DX, number(a.b.dx, t * H + h), dx[n]);
    }
}

/* One element of dw1, one of dw2, one of drouter: a block each triple. A thread has every 256th row of
   the expert, or every 256th token. grad: moe_dtype of dw1 and dw2. */
MOE_KERNEL(256, 1) check_weight(MOE_ARG(check_args) a)
{
    const moe_layer_desc* l = &a.b.layer;
    const int64_t H = l->hidden, I = l->intermediate, K = l->top_k, E = l->num_experts;
    const int64_t e = blockIdx.x * 37u % (unsigned)E, i = blockIdx.x * 1009u % (unsigned)I;
    const int64_t h = blockIdx.x * 7919u % (unsigned)H;
    const int dtype = a.b.grad_dtype;
    double dw1 = 0.0, dw2 = 0.0, router = 0.0;
    __shared__ double all[3];
    if (threadIdx.x < 3) all[threadIdx.x] = 0.0;
    __syncthreads();
    for (int64_t r = a.v.expert_offset[e] + threadIdx.x; r < a.v.expert_offset[e + 1]; r += 256) {
        const int64_t slot = a.v.row_slot[r], t = slot / K;
        const double w = a.v.weights[slot];
        double v = 0.0, u = 0.0, p = 0.0, sigma;
        for (int64_t j = 0; j < H; ++j) {
            const double x = number(l->x, t * H + j);
            v += x * number(l->w1.base, (e * 2 * I + i) * H + j);
            u += x * number(l->w1.base, (e * 2 * I + I + i) * H + j);
            p += number(a.b.dy, t * H + j) * number(l->w2.base, (e * H + j) * I + i);
        }
        sigma = 1.0 / (1.0 + exp(-v));
        dw1 += w * p * u * sigma * (1.0 + v * (1.0 - sigma)) * number(l->x, t * H + h);
        dw2 += number(a.b.dy, t * H + h) * w * v * sigma * u;
    }
    for (int64_t t = threadIdx.x; t < l->num_tokens && a.b.drouter; t += 256)
        router += (double)a.w.dlogits[t * E + e] * number(l->x, t * H + h);
    atomicAdd(all, dw1), atomicAdd(all + 1, dw2), atomicAdd(all + 2, router);
    __syncthreads();
    if (threadIdx.x > 0) return;
    compare(a.sums, CHECK_DW1, moe_load_f32(a.b.dw1.base, (e * 2 * I + i) * H + h, dtype), all[0]);
    compare(a.sums, CHECK_DW2, moe_load_f32(a.b.dw2.base, (e * H + h) * I + i, dtype), all[1]);
    if (a.b.drouter)
        compare(a.sums, CHECK_DROUTER, moe_load_f32(a.b.drouter, e * H + h, MOE_FP32), all[2]);
}

/* Checks the results of one backward pass; returns the number of those that are wrong. */
static int check_backward(bench_state* s, const moe_layer_backward_desc* b)
{
    const int blocks = 16;
    check_args a;
    double sums[CHECKS][2];
    moe_launch_config c = moe_grid(blocks, 256, 0, s->stream);
    int wrong = 0;
    memset(&a, 0, sizeof a);
    a.b = *b;
    a.step = b->layer.num_tokens / blocks;
    BENCH_MOE(moe_layer_get_view(&b->layer, &a.v));
    BENCH_MOE(moe_layer_backward_get_view(b, &a.w));
    a.sums = (double*)bench_alloc(sizeof sums);
    a.act = (double*)bench_alloc((size_t)blocks * 3 * (size_t)b->layer.intermediate * 8);
    BENCH_CUDA(cudaMemset(a.sums, 0, sizeof sums));
    BENCH_MOE(MOE_LAUNCH(check_token, c, a));
    c = moe_grid(64, 256, 0, s->stream);
    BENCH_MOE(MOE_LAUNCH(check_weight, c, a));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemcpy(sums, a.sums, sizeof sums, cudaMemcpyDeviceToHost));
    printf("  relative errors:");
    for (int i = 0; i < CHECKS; ++i) {
        const double error = sqrt(sums[i][0] / (sums[i][1] + 1e-300));
        if (i == CHECK_DROUTER && !b->drouter) continue;
        printf(" %s %.2g", check_name[i], error);
        wrong += !(error < 0.01) || !(sums[i][1] > 0);
    }
    printf("\n");
    cudaFree(a.sums), cudaFree(a.act);
    return wrong;
}

/* ---- a shape ---- */

static uint64_t rounded(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

/* Returns the bytes that layer_backward.cuh documents for `saved`. */
static uint64_t saved_formula(const moe_layer_desc* l)
{
    const uint64_t T = (uint64_t)l->num_tokens, E = (uint64_t)l->num_experts;
    const uint64_t R = T * (uint64_t)l->top_k;
    return (l->logits ? 0 : rounded(T * E * 4)) + 5 * rounded(R * 4) + rounded(R * 8) +
           rounded(E * 4 + 4) + rounded(R * 2 * (uint64_t)l->intermediate * 2);
}

/* Prepares all passes of a shape in one workspace. */
static void open_training(bench_state* s, training* m, const bench_shape* h, int routing)
{
    const int64_t T = h->T, H = h->H, I = h->I, E = h->E;
    moe_layer_desc* l = &m->l;
    moe_layer_saved_list list;
    moe_layer_backward_desc b;
    memset(m, 0, sizeof *m);
    l->x = bench_random(T * H, MOE_BF16, 1.0f, 1);
    l->w1.base = bench_random(E * 2 * I * H, MOE_BF16, 1.0f / sqrtf((float)H), 3);
    l->w2.base = bench_random(E * H * I, MOE_BF16, 1.0f / sqrtf((float)I), 4);
    l->y = bench_alloc((size_t)(T * H) * 2);
    l->num_tokens = h->T, l->hidden = h->H, l->intermediate = h->I, l->num_experts = h->E;
    l->top_k = h->K;
    l->gate.renormalize = 1;
    if (routing == BENCH_RANDOM) {
        l->router = bench_random(E * H, MOE_BF16, 1.0f / sqrtf((float)H), 2);
    } else {
        int32_t* ids = bench_routing_ids(h, routing);
        l->logits = bench_routing_logits(h, ids);
        free(ids);
    }
    BENCH_MOE(moe_layer_saved(l, &list));
    m->saved = l->saved_bytes = list.bytes;
    l->saved = bench_alloc(list.bytes);
    memset(&b, 0, sizeof b);
    b.layer = *l;
    b.dy = bench_random(T * H, MOE_BF16, 1.0f, 5);
    b.dx = bench_alloc((size_t)(T * H) * 2);
    if (l->router) b.drouter = bench_alloc((size_t)(E * H) * 4);
    else b.dlogits = (float*)bench_alloc((size_t)(T * E) * 4);
    b.router_grad_dtype = MOE_FP32;
    b.dw1.base = bench_alloc((size_t)(E * 2 * I * H) * 4);
    b.dw2.base = bench_alloc((size_t)(E * H * I) * 4);
    BENCH_MOE(moe_layer_workspace(l, &m->forward_bytes));
    BENCH_MOE(moe_layer_backward_workspace(&b, &m->backward_bytes));
    l->workspace_bytes =
        m->forward_bytes > m->backward_bytes ? m->forward_bytes : m->backward_bytes;
    l->workspace = bench_alloc(l->workspace_bytes);
    b.layer = *l;
    BENCH_MOE(moe_layer_backward_preload());
    BENCH_MOE(moe_layer_prepare(l, &m->forward));
    for (int way = 0; way < GRADS; ++way) {
        m->b[way] = b;
        m->b[way].grad_dtype = way == GRAD_BF16 ? MOE_BF16 : MOE_FP32;
        m->b[way].accumulate = way == GRAD_ADDED;
        BENCH_MOE(moe_layer_backward_prepare(&m->b[way], &m->backward[way]));
    }
    b.grad_dtype = MOE_BF16;
    b.gather = m->backward[0].gathers ? MOE_LAYER_GATHER_FUSED : MOE_LAYER_GATHER_FIRST;
    BENCH_MOE(moe_layer_backward_prepare(&b, &m->other));
    for (int way = 0; way < GRADS; ++way) {
        cudaGraph_t graph;
        BENCH_CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeGlobal));
        run_forward(m, s->stream);
        run_backward(&m->backward[way], s->stream);
        BENCH_CUDA(cudaStreamEndCapture(s->stream, &graph));
        BENCH_CUDA(cudaGraphInstantiate(&m->step[way], graph, 0));
        BENCH_CUDA(cudaGraphDestroy(graph));
    }
}

static void close_training(training* m)
{
    const moe_layer_backward_desc* b = &m->b[0];
    for (int way = 0; way < GRADS; ++way) BENCH_CUDA(cudaGraphExecDestroy(m->step[way]));
    cudaFree((void*)m->l.x), cudaFree((void*)m->l.router), cudaFree((void*)m->l.logits);
    cudaFree((void*)m->l.w1.base), cudaFree((void*)m->l.w2.base), cudaFree(m->l.y);
    cudaFree(m->l.saved), cudaFree(m->l.workspace), cudaFree((void*)b->dy), cudaFree(b->dx);
    cudaFree(b->drouter), cudaFree(b->dlogits);
    cudaFree(b->dw1.base), cudaFree(b->dw2.base);
}

/* Runs and checks each way; returns the number of wrong results. */
static int check_training(bench_state* s, training* m)
{
    size_t free_before, free_after, total;
    int failures = 0;
    BENCH_CUDA(cudaMemGetInfo(&free_before, &total));
    for (int way = 0; way < GRADS; ++way) {
        const size_t numbers =
            (size_t)m->l.num_experts * (size_t)m->l.intermediate * (size_t)m->l.hidden;
        BENCH_CUDA(cudaMemset(m->l.workspace, 0xff, m->l.workspace_bytes));
        BENCH_CUDA(cudaMemset(m->b[way].dw1.base, way == GRAD_ADDED ? 0 : 0xff, numbers * 8));
        BENCH_CUDA(cudaMemset(m->b[way].dw2.base, way == GRAD_ADDED ? 0 : 0xff, numbers * 4));
        if (m->b[way].drouter)
            BENCH_CUDA(cudaMemset(m->b[way].drouter, way == GRAD_ADDED ? 0 : 0xff,
                                  (size_t)m->l.num_experts * (size_t)m->l.hidden * 4));
        run_graph(m->step[way], s->stream);
        BENCH_CUDA(cudaStreamSynchronize(s->stream));
        failures += check_backward(s, &m->b[way]);
    }
    BENCH_CUDA(cudaMemGetInfo(&free_after, &total));
    failures += m->saved != saved_formula(&m->l) || free_after != free_before;
    printf("  kept: x %.1f MB, saved %.1f MB (the formula's); workspace %.1f MB forward, %.1f MB "
           "backward; other memory %lld bytes; rows %s\n",
           (double)m->l.num_tokens * m->l.hidden * 2e-6, (double)m->saved * 1e-6,
           (double)m->forward_bytes * 1e-6, (double)m->backward_bytes * 1e-6,
           (long long)(free_before - free_after),
           m->backward[0].gathers ? "copied first" : "gathered by the products");
    return failures;
}

/* Returns the stage's part of the flops of a forward pass. */
static double stage_share(const stage_job* j)
{
    const int s = j->stage;
    if (j->forward) return s == MOE_LAYER_UP ? 2.0 / 3 : s == MOE_LAYER_DOWN ? 1.0 / 3 : 0.0;
    if (s == MOE_LAYER_BACKWARD_PRE || s == MOE_LAYER_BACKWARD_DW2) return 1.0 / 3;
    if (s == MOE_LAYER_BACKWARD_DW1 || s == MOE_LAYER_BACKWARD_ROWS) return 2.0 / 3;
    return 0.0;
}

/* Prints the row of a stage; none for one with nothing to do. */
static void print_stage(bench_state* s, const stage_job* j, double ms, double flops, double step_ms)
{
    char what[96];
    if (ms < 0.0005) return;
    snprintf(what, sizeof what, "    %s, %s", j->forward ? "forward" : "backward",
             j->forward ? moe_layer_part_name(j->stage) : moe_layer_backward_stage_name(j->stage));
    bench_row(s, what, ms, stage_share(j) * flops / ms * 1e-9, "TFLOPS", ms / step_ms,
              "forward + backward");
}

static void print_rate(bench_state* s, const char* what, double ms, double flops, double dense_ms)
{
    bench_row(s, what, ms, flops / ms * 1e-9, "TFLOPS", dense_ms > 0 ? ms / dense_ms : 0,
              "cuBLAS's forward (time)");
}

/* Runs both dense products three times: as long as a step, and so at the same clock. */
static void run_dense_step(void* context, cudaStream_t stream)
{
    bench_gemm* dense = (bench_gemm*)context;
    for (int i = 0; i < 6; ++i) bench_run_gemm(&dense[i % 2], stream);
}

static void run_shape(bench_state* s, const bench_blas* blas, const bench_shape* h, int routing,
                      int* failures)
{
    const int with_dense = bench_dense_applies(h);
    const double flops = 6.0 * (double)h->T * h->K * h->H * h->I;
    training m;
    bench_gemm dense[2];
    bench_call call[2 * GRADS + 5 + STAGES];
    stage_job job[STAGES];
    int n = 0, first_stage, steps, backwards;
    double dense_ms = 0.0;
    char what[96];
    printf("T %d H %d I %d E %d K %d %s\n", h->T, h->H, h->I, h->E, h->K,
           bench_routing_name[routing]);
    if (s->csv)
        fprintf(s->csv, "\"T %d H %d I %d E %d K %d %s\"\n", h->T, h->H, h->I, h->E, h->K,
                bench_routing_name[routing]);
    open_training(s, &m, h, routing);
    *failures += check_training(s, &m);
    call[n++] = bench_one(run_forward, &m);
    backwards = n;
    for (int way = 0; way < GRADS; ++way) call[n++] = bench_one(run_backward, &m.backward[way]);
    call[n++] = bench_one(run_backward, &m.other);
    steps = n;
    for (int way = 0; way < GRADS; ++way) call[n++] = bench_one(run_graph, m.step[way]);
    first_stage = n;
    list_stages(&m, job);
    for (int i = 0; i < STAGES; ++i) call[n++] = bench_one(run_stage, &job[i]);
    if (with_dense) bench_dense_open(s, blas, h, dense, &call[n]);
    if (with_dense) call[n + 2] = bench_one(run_dense_step, dense);
    bench_alternate(s, call, n + 3 * with_dense);
    if (with_dense) dense_ms = call[n].ms + call[n + 1].ms;
    print_rate(s, "forward, saving", call[0].ms, flops, dense_ms);
    for (int way = 0; way < GRADS; ++way) {
        snprintf(what, sizeof what, "backward, gradients %s", grad_name[way]);
        print_rate(s, what, call[backwards + way].ms, 2 * flops, dense_ms);
    }
    snprintf(what, sizeof what, "backward, bf16, rows %s",
             m.other.gathers ? "copied first" : "gathered by the products");
    print_rate(s, what, call[backwards + GRADS].ms, 2 * flops, dense_ms);
    for (int way = 0; way < GRADS; ++way) {
        snprintf(what, sizeof what, "forward + backward in a graph, %s", grad_name[way]);
        print_rate(s, what, call[steps + way].ms, 3 * flops, dense_ms);
    }
    for (int i = 0; i < STAGES; ++i)
        print_stage(s, &job[i], call[first_stage + i].ms, flops, call[steps].ms);
    if (with_dense) {
        bench_dense_rows(s, &call[n], flops);
        print_rate(s, "cuBLAS dense, both three times", call[n + 2].ms, 3 * flops, dense_ms);
        bench_gemm_free_random(&dense[0]), bench_gemm_free_random(&dense[1]);
    }
    close_training(&m);
}

int main(int argc, char** argv)
{
    bench_runs runs;
    bench_state s = bench_open_runs(argc, argv, "MoE layer, training, bf16, SwiGLU", &runs);
    bench_blas blas = bench_blas_open(&s, 0);
    int failures = 0;
    for (int i = 0; i < runs.count; ++i)
        for (int routing = 0; routing < BENCH_ROUTINGS; ++routing)
            if (runs.routings[i] >> routing & 1)
                run_shape(&s, &blas, &runs.shape[i], routing, &failures);
    bench_blas_close(&blas);
    return bench_close(&s, failures);
}
