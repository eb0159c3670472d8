/* 03_own_kernel: a kernel of your own, built from device functions of the collection.

     nvcc -I. -O2 -arch=sm_90a samples/03_own_kernel/main.cu -o 03_own_kernel && ./03_own_kernel
     g++ -x c++ -std=c++14 -O2 -I. samples/03_own_kernel/main.cu -o 03_own_kernel && ./03_own_kernel

   A decoding step has few tokens, and they choose nearly every expert. So all experts compute all
   tokens, which reads the same weights and needs no route: row t of each buffer is token t. One
   kernel remains, for gate and combine.
   Copy step_kernel and make_step. The other functions time the step and compare it. */
#include "moe/combine.cuh" /* moe_combine_token */
#include "moe/gate.cuh"    /* moe_warp_top_k; moe_gate, to compare with */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { E = 16, K = 4, H = 2048, MOST_TOKENS = 64 };

typedef struct step_args {
    moe_combine_args combine; /* its pointer table has one buffer an expert */
    const float* logits;      /* [T, E] */
    int32_t* ids;             /* [T, K] out */
    float* weights;           /* [T, K] out: combine.weights */
    moe_place* place;         /* [T, K] out: combine.place */
} step_args;

typedef struct step_shared {
    float logit[E];
    int32_t ids[K];
    moe_combine_shared combine;
    moe_combine_source source[K];
} step_shared;

/* Computes a token in each thread block. The first warp chooses the experts, all warps add their
   rows. K is at most 32. */
MOE_KERNEL(256, 2) step_kernel(MOE_ARG(step_args) a)
{
    MOE_SHARED(step_shared, s);
    const int64_t t = blockIdx.x;
    const int lane = (int)threadIdx.x;
    if (lane < 32) {
        for (int e = lane; e < E; e += 32) s.logit[e] = a.logits[t * E + e];
        __syncwarp();
        moe_warp_top_k(s.ids, s.logit, E, K); /* -1 where only NaN remain */
        const int id = lane < K ? s.ids[lane] : -1, first = s.ids[0];
        const float w = id >= 0 ? expf(s.logit[id] - s.logit[first]) : 0.0f;
        float sum = w;
        for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        if (lane < K) {
            a.ids[t * K + lane] = id;
            a.weights[t * K + lane] = id >= 0 ? w / sum : 0.0f;
            a.place[t * K + lane].buffer = id;
            a.place[t * K + lane].row = id >= 0 ? (int32_t)t : -1;
        }
    }
    __syncthreads(); /* moe_combine_token reads place and weights */
    moe_combine_token(&a.combine, t, &s.combine, s.source, MOE_BF16);
}

/* Writes the places, between moe_gate and moe_combine. */
MOE_KERNEL(K, 1) place_kernel(MOE_ARG(step_args) a)
{
    moe_place* p = a.place + blockIdx.x * K + threadIdx.x;
    p->buffer = a.ids[blockIdx.x * K + threadIdx.x];
    p->row = (int32_t)blockIdx.x;
}

static void try_call(const char* what, moe_status s)
{
    char text[MOE_STATUS_TEXT];
    if (s == MOE_OK) return;
    fprintf(stderr, "03_own_kernel: %s: %s\n", what, moe_status_describe(s, text));
    exit(1);
}
#define MOE(call) try_call(#call, (call))
#define CUDA(call) try_call(#call, moe_cuda_status(call))

/* Returns device memory: a copy of `from`, or NaN where `from` is null. */
static void* device_new(size_t bytes, const void* from)
{
    void* p;
    CUDA(cudaMalloc(&p, bytes));
    CUDA(from ? cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice) : cudaMemset(p, 0xff, bytes));
    return p;
}

/* A step with its own outputs: arguments of step_kernel, and the descriptor for moe_combine. */
typedef struct one_step {
    step_args own;
    moe_combine_desc combine;
} one_step;

static one_step make_step(const float* logits, void* const* table, int tokens)
{
    one_step s = {};
    step_args* a = &s.own;
    moe_combine_desc* c = &s.combine;
    a->logits = logits;
    a->ids = (int32_t*)device_new(MOST_TOKENS * K * 4, 0);
    c->weights = a->weights = (float*)device_new(MOST_TOKENS * K * 4, 0);
    c->place = a->place = (moe_place*)device_new(MOST_TOKENS * K * sizeof(moe_place), 0);
    c->y = device_new(MOST_TOKENS * H * 4, 0);
    c->table = table, c->num_buffers = E;
    c->y_dtype = MOE_FP32;
    c->num_tokens = tokens;
    c->hidden = H, c->top_k = K;
    MOE(moe_combine_resolve(c, &a->combine)); /* the args, which device code takes */
    return s;
}

static void free_step(one_step* s)
{
    CUDA(cudaFree(s->own.ids)), CUDA(cudaFree(s->own.weights)), CUDA(cudaFree(s->own.place));
    CUDA(cudaFree(s->combine.y));
}

static void own_step(one_step* s)
{
    const moe_launch_config c = moe_grid(s->combine.num_tokens, 256, 0, 0);
    MOE(MOE_LAUNCH(step_kernel, c, s->own));
}

static void library_step(one_step* s)
{
    const moe_launch_config c = moe_grid(s->combine.num_tokens, K, 0, 0);
    moe_gate_desc g = {};
    g.logits = s->own.logits;
    g.ids = s->own.ids, g.weights = s->own.weights;
    g.num_tokens = s->combine.num_tokens;
    g.num_experts = E, g.top_k = K;
    g.score = MOE_SCORE_TOPK_SOFTMAX;
    MOE(moe_gate(&g, 0));
    MOE(MOE_LAUNCH(place_kernel, c, s->own));
    MOE(moe_combine(&s->combine, 0));
}

/* Returns the mean microseconds of a step. */
static float time_of(void (*step)(one_step*), one_step* s)
{
    const int runs = MOE_ON_HOST ? 1 : 500;
    cudaEvent_t begin, end;
    float ms;
    CUDA(cudaEventCreate(&begin)), CUDA(cudaEventCreate(&end));
    for (int i = -runs / 10; i < runs; ++i) { /* i < 0: not timed */
        if (i == 0) CUDA(cudaEventRecord(begin, 0));
        step(s);
    }
    CUDA(cudaEventRecord(end, 0));
    CUDA(cudaEventSynchronize(end));
    CUDA(cudaEventElapsedTime(&ms, begin, end));
    CUDA(cudaEventDestroy(begin)), CUDA(cudaEventDestroy(end));
    return ms * 1000.0f / (float)runs;
}

static float number(void) { return (float)(rand() % 4001 - 2000) / 1000.0f; } /* -2 .. 2 */

int main(int argc, char** argv)
{
    static float logits[MOST_TOKENS * E], y[2][MOST_TOKENS * H], weights[MOST_TOKENS * K];
    static uint16_t rows[MOST_TOKENS * H];
    static int32_t ids[2][MOST_TOKENS * K];
    const int tokens = argc > 1 ? atoi(argv[1]) : 8;
    void *table[E], **device_table;
    float *device_logits, error = 0, largest = 0, us[2];
    one_step step[2]; /* of step_kernel, of the collection */
    int devices = 0, others = 0;

    if (tokens < 1 || tokens > MOST_TOKENS)
        return fprintf(stderr, "03_own_kernel: 1 to %d tokens, please\n", MOST_TOKENS), 2;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: built for a GPU, and there is none\n");
        return 77;
    }
    for (int i = 0; i < tokens * E; ++i) logits[i] = number();
    device_logits = (float*)device_new(sizeof logits, logits);
    for (int e = 0; e < E; ++e) { /* each expert has its own buffer */
        for (int i = 0; i < tokens * H; ++i) rows[i] = moe_f32_to_bf16(number());
        table[e] = device_new(sizeof rows, rows);
    }
    device_table = (void**)device_new(sizeof table, table);

    for (int i = 0; i < 2; ++i) {
        step[i] = make_step(device_logits, device_table, tokens);
        us[i] = time_of(i ? library_step : own_step, &step[i]);
        CUDA(cudaMemcpy(y[i], step[i].combine.y, sizeof y[i], cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(ids[i], step[i].own.ids, sizeof ids[i], cudaMemcpyDeviceToHost));
    }
    CUDA(cudaMemcpy(weights, step[0].own.weights, sizeof weights, cudaMemcpyDeviceToHost));
    free_step(&step[0]), free_step(&step[1]);
    CUDA(cudaFree(device_logits)), CUDA(cudaFree(device_table));
    for (int e = 0; e < E; ++e) CUDA(cudaFree(table[e]));
    printf("%d tokens of %d numbers, %d of %d experts each, on the %s\n", tokens, H, K, E,
           MOE_ON_HOST ? "CPU" : "GPU");
    printf("token  expert x weight                              y[0]    collection's\n");
    for (int t = 0; t < tokens && t < 8; ++t) {
        printf("%5d", t);
        for (int k = 0; k < K; ++k) printf("  %2d x %.2f", ids[0][t * K + k], weights[t * K + k]);
        printf("  %8.4f  %8.4f\n", y[0][t * H], y[1][t * H]);
    }
    for (int i = 0; i < tokens * K; ++i) others += ids[0][i] != ids[1][i];
    for (int i = 0; i < tokens * H; ++i) {
        const float e = fabsf(y[0][i] - y[1][i]);
        if (error == error && !(e <= error)) error = e; /* a NaN stays */
        if (fabsf(y[1][i]) > largest) largest = fabsf(y[1][i]);
    }
    printf("%d of %d choices differ; largest difference of y %.2g, values up to %.3g\n", others,
           tokens * K, error, largest);
    if (!MOE_ON_HOST)
        printf("one kernel %.1f us, the collection's three launches %.1f us\n", us[0], us[1]);
    if (others || !(error <= 1e-5f) || !(largest > 0.5f)) {
        printf("FAILED: not what moe_gate and moe_combine give\n");
        return 1;
    }
    printf("PASSED: the same as moe_gate and moe_combine\n");
    return 0;
}
