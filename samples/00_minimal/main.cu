/* 00_minimal: one layer of an MoE model, from x to y. On a GPU, or on a CPU without CUDA:

     nvcc -I. -arch=sm_90a samples/00_minimal/main.cu -o minimal && ./minimal
     g++ -x c++ -std=c++14 -O2 -I. samples/00_minimal/main.cu -o minimal && ./minimal */
#include "moe/layer.cuh"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { T = 8, H = 64, I = 32, E = 4, K = 2 }; /* tokens, hidden, intermediate, experts, top-k */

static uint16_t x[T * H], router[E * H], w1[E * 2 * I * H], w2[E * H * I], y[T * H]; /* bf16 */

static void check(moe_status s)
{
    char text[MOE_STATUS_TEXT];
    if (s == MOE_OK) return;
    printf("FAILED: %s\n", moe_status_describe(s, text));
    exit(1);
}

static void* to_device(const void* host, size_t bytes)
{
    void* p = 0;
    check(moe_cuda_status(cudaMalloc(&p, bytes)));
    check(moe_cuda_status(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice)));
    return p;
}

int main(void)
{
    moe_layer_desc layer = {}; /* zero means default: bf16, softmax over all experts, SwiGLU */
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("no GPU: skipped\n");
        return 77;
    }

    /* Numbers that are easy to follow: logits 0, 1, 2, 3 for every token; gate = up = 1. */
    for (int i = 0; i < T * H; ++i) x[i] = moe_f32_to_bf16(0.125f);
    for (int i = 0; i < E * H; ++i) router[i] = moe_f32_to_bf16(0.125f * (float)(i / H));
    for (int i = 0; i < E * 2 * I * H; ++i) w1[i] = moe_f32_to_bf16(0.125f);
    for (int i = 0; i < E * H * I; ++i) w2[i] = moe_f32_to_bf16((float)(i / (H * I) + 1) / I);

    layer.num_tokens = T;
    layer.hidden = H;
    layer.intermediate = I;
    layer.num_experts = E;
    layer.top_k = K;
    layer.gate.renormalize = 1; /* the K weights sum to 1 */
    layer.x = to_device(x, sizeof x);
    layer.router = to_device(router, sizeof router);
    layer.w1.base = to_device(w1, sizeof w1); /* [E, 2I, H]: gate rows, then up rows */
    layer.w2.base = to_device(w2, sizeof w2); /* [E, H, I] */
    layer.y = to_device(y, sizeof y);
    check(moe_layer_workspace(&layer, &layer.workspace_bytes));
    check(moe_cuda_status(cudaMalloc(&layer.workspace, layer.workspace_bytes)));
    check(moe_layer_forward(&layer, 0)); /* queued on stream 0 */
    check(moe_cuda_status(cudaMemcpy(y, layer.y, sizeof y, cudaMemcpyDeviceToHost)));

    /* Experts 3 and 2 are chosen with weights p = sigma(1) and 1 - p; expert e gives (e + 1) p. */
    const float p = 1 / (1 + expf(-1));
    const float want = p * (4 * p + 3 * (1 - p));
    const float got = moe_bf16_to_f32(y[0]);
    void* const all[] = {(void*)layer.x,       (void*)layer.router, (void*)layer.w1.base,
                         (void*)layer.w2.base, layer.y,             layer.workspace};
    for (int i = 0; i < 6; ++i) cudaFree(all[i]);
    printf("y[0] = %.3f, by hand %.3f\n", (double)got, (double)want);
    return fabsf(got - want) < 0.02f ? 0 : 1;
}
