/* trainer.h: what a trainer has anyway: the end of the program where a call fails, device memory,
   AdamW, and the mean square loss with its gradient. */
#ifndef MOE_SAMPLE_TRAINER_H
#define MOE_SAMPLE_TRAINER_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "moe/base/numeric.cuh"

static void try_call(const char* what, moe_status s)
{
    char text[MOE_STATUS_TEXT];
    if (s == MOE_OK) return;
    fprintf(stderr, "09_backward: %s: %s\n", what, moe_status_describe(s, text));
    exit(1);
}
#define MOE(call) try_call(#call, (call))
#define CUDA(call) try_call(#call, moe_cuda_status(call))

static struct {
    void* at[64];
    int n;
} device_memory; /* all that the program holds */

/* Device memory of zeros. */
static void* device_new(size_t bytes)
{
    void** p = &device_memory.at[device_memory.n++];
    CUDA(cudaMalloc(p, bytes));
    CUDA(cudaMemset(*p, 0, bytes));
    return *p;
}

static void device_free_all(void)
{
    while (device_memory.n > 0) CUDA(cudaFree(device_memory.at[--device_memory.n]));
}

/* Returns a number between -1 and 1 from a small generator. */
static float draw(uint32_t* state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)(int32_t)*state * (1.0f / 2147483648.0f);
}

/* Device memory of n random bf16 numbers of this size; `same`, not null: as fp32 too. */
static uint16_t* random_new(int64_t n, float size, uint32_t* state, float* same)
{
    uint16_t *host = (uint16_t*)malloc((size_t)n * 2), *p = (uint16_t*)device_new((size_t)n * 2);
    float* fp32 = (float*)malloc((size_t)n * 4);
    for (int64_t i = 0; i < n; ++i)
        fp32[i] = moe_bf16_to_f32(host[i] = moe_f32_to_bf16(size * draw(state)));
    CUDA(cudaMemcpy(p, host, (size_t)n * 2, cudaMemcpyHostToDevice));
    if (same) CUDA(cudaMemcpy(same, fp32, (size_t)n * 4, cudaMemcpyHostToDevice));
    free(host), free(fp32);
    return p;
}

/* A tensor of weights, with what AdamW keeps of each number. */
typedef struct weights_args {
    float *master, *grad, *mean, *square; /* [n] */
    uint16_t* value;                      /* [n] bf16, what the layer reads */
    const float* bias;                    /* [2] 1 - beta1^step, 1 - beta2^step */
    int64_t n;
    float rate;
} weights_args;

/* AdamW with beta 0.9 and 0.99, decay 0.01: one thread a number. */
MOE_KERNEL(256, 1) adamw(MOE_ARG(weights_args) a)
{
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= a.n) return;
    const float g = a.grad[i];
    const float m = a.mean[i] = 0.9f * a.mean[i] + 0.1f * g;
    const float v = a.square[i] = 0.99f * a.square[i] + 0.01f * g * g;
    const float step = m / a.bias[0] / (sqrtf(v / a.bias[1]) + 1e-8f) + 0.01f * a.master[i];
    a.master[i] -= a.rate * step;
    moe_store_f32(a.value, i, MOE_BF16, a.master[i]);
}

typedef struct loss_args {
    const uint16_t *y, *target; /* [n] bf16 */
    uint16_t* dy;               /* [n] bf16 out: gradient of the loss */
    float* loss;                /* [1] out */
    float* bias;                /* [2] of AdamW: moved on by one step */
    int n;
} loss_args;

typedef struct loss_shared {
    float sum[256];
} loss_shared;

/* The loss and its gradient, by one thread block. */
MOE_KERNEL(256, 1) square_loss(MOE_ARG(loss_args) a)
{
    MOE_SHARED(loss_shared, s);
    const int thread = (int)threadIdx.x;
    float sum = 0.0f;
    for (int i = thread; i < a.n; i += 256) {
        const float off = moe_load_f32(a.y, i, MOE_BF16) - moe_load_f32(a.target, i, MOE_BF16);
        sum += off * off;
        moe_store_f32(a.dy, i, MOE_BF16, off * (2.0f / (float)a.n));
    }
    s.sum[thread] = sum;
    __syncthreads();
    if (thread != 0) return;
    for (int i = 1; i < 256; ++i) sum += s.sum[i];
    *a.loss = sum / (float)a.n;
    a.bias[0] = 1.0f - 0.9f * (1.0f - a.bias[0]);
    a.bias[1] = 1.0f - 0.99f * (1.0f - a.bias[1]);
}

static weights_args weights_new(int64_t n, float size, uint32_t* state, const float* bias)
{
    weights_args w;
    const size_t bytes = (size_t)n * 4;
    w.n = n, w.bias = bias, w.rate = 3e-3f;
    w.master = (float*)device_new(bytes), w.grad = (float*)device_new(bytes);
    w.mean = (float*)device_new(bytes), w.square = (float*)device_new(bytes);
    w.value = random_new(n, size, state, w.master);
    return w;
}

#endif
