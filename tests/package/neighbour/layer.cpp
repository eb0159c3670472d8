/* layer.cpp: a tiny layer in a C++ program without CUDA: the CPU backend runs it. T 5, H 16, I 8,
   E 3, K 3, every number 1/4: with all experts chosen, y is the same for every token. */
#include <moe/layer.cuh>

#include <math.h>
#include <stdio.h>

enum { T = 5, H = 16, I = 8, E = 3, K = 3 };

static uint16_t x[T * H], router[E * H], w1[E * 2 * I * H], w2[E * H * I], y[T * H];

static void fill(uint16_t* p, int n)
{
    for (int i = 0; i < n; ++i) p[i] = moe_f32_to_bf16(0.25f);
}

int main()
{
    /* gate and up are both H/16 = 1, their product silu(1), y = I silu(1) / 4 */
    const double want = I * (1.0 / (1.0 + exp(-1.0))) / 4;
    moe_layer_desc d = {};
    char text[MOE_STATUS_TEXT];
    moe_status s;
    fill(x, T * H), fill(router, E * H), fill(w1, E * 2 * I * H), fill(w2, E * H * I);
    d.num_tokens = T, d.hidden = H, d.intermediate = I, d.num_experts = E, d.top_k = K;
    cudaMalloc((void**)&d.x, sizeof x), cudaMalloc((void**)&d.router, sizeof router);
    cudaMalloc((void**)&d.w1.base, sizeof w1), cudaMalloc((void**)&d.w2.base, sizeof w2);
    cudaMalloc(&d.y, sizeof y);
    cudaMemcpy((void*)d.x, x, sizeof x, cudaMemcpyHostToDevice);
    cudaMemcpy((void*)d.router, router, sizeof router, cudaMemcpyHostToDevice);
    cudaMemcpy((void*)d.w1.base, w1, sizeof w1, cudaMemcpyHostToDevice);
    cudaMemcpy((void*)d.w2.base, w2, sizeof w2, cudaMemcpyHostToDevice);
    s = moe_layer_workspace(&d, &d.workspace_bytes);
    cudaMalloc(&d.workspace, d.workspace_bytes);
    if (s == MOE_OK) s = moe_layer_forward(&d, 0);
    if (s != MOE_OK || cudaMemcpy(y, d.y, sizeof y, cudaMemcpyDeviceToHost) != cudaSuccess) {
        printf("FAILED: %s\n", moe_status_describe(s, text));
        return 1;
    }
    for (int i = 0; i < T * H; ++i)
        if (!(fabs(moe_bf16_to_f32(y[i]) - want) <= 0.02 * want)) {
            printf("FAILED: y[%d] is %g, expected %g\n", i, (double)moe_bf16_to_f32(y[i]), want);
            return 1;
        }
    printf("PASSED: y is %g everywhere, on the %s\n", want, MOE_ON_HOST ? "CPU" : "GPU");
    return 0;
}
