/* everything.h: what both files of the link test include, and what one asks of the other.

     nvcc -I. -arch=sm_90a tests/link/main.cu tests/link/other.cu -o link && ./link
     g++ -x c++ -std=c++14 -O2 -I. tests/link/main.cu tests/link/other.cu -o link && ./link */
#ifndef MOE_TESTS_LINK_EVERYTHING_H
#define MOE_TESTS_LINK_EVERYTHING_H

#ifdef LINK_ONE_VARIANT /* few kernels, to save time */
#define MOE_GATE_LIST(X) X(32, 8, 4, 8)
#define MOE_GATE_RULES_LIST(X)
#define MOE_GEMM_VARIANT_LIST(X, ...) X(bf16_kk, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)
#define MOE_K_GEMM_DTYPE_LIST(X) X(bf16, MOE_BF16)
#define MOE_BLOCK_SPARSE_DTYPE_LIST(X) X(bf16, MOE_BF16)
#endif
#include "moe/moe.h"
#include "moe/moe.cuh"
#include "moe/balance_loss.cuh"
#include "moe/combine_backward.cuh"
#include "moe/ep/layer_backward.cuh"
#include "moe/ref/ref.h"

#include <stdio.h>

/* A layer small enough to see through: T 5, H 16, I 8, E 3, K 2. */
enum { LINK_T = 5, LINK_H = 16, LINK_I = 8, LINK_E = 3, LINK_K = 2 };

/* Runs the layer with the kernels of its own file; y [T, H] as floats. */
typedef moe_status (*link_run)(float* y);
moe_status link_run_main(float* y);
moe_status link_run_other(float* y);

/* The body of both, so that each file uses its own copy of everything. */
static moe_status link_layer(float* y)
{
    enum {
        X = LINK_T * LINK_H,
        R = LINK_E * LINK_H,
        W1 = LINK_E * 2 * LINK_I * LINK_H,
        W2 = LINK_E * LINK_H * LINK_I
    };
    static uint16_t host[X + R + W1 + W2];
    uint16_t *device = 0, *out = 0;
    moe_layer_desc d;
    moe_status s = MOE_OK;
    memset(&d, 0, sizeof d);
    for (int i = 0; i < X + R + W1 + W2; ++i)
        host[i] = moe_f32_to_bf16((float)((i * 37) % 29 - 14) / 16.0f);
    d.num_tokens = LINK_T, d.hidden = LINK_H, d.intermediate = LINK_I;
    d.num_experts = LINK_E, d.top_k = LINK_K;
    MOE_TRY(moe_preload());
    MOE_TRY(moe_layer_workspace(&d, &d.workspace_bytes));
    MOE_TRY_CUDA(cudaMalloc((void**)&device, sizeof host));
    MOE_TRY_CUDA(cudaMalloc((void**)&out, X * 2));
    MOE_TRY_CUDA(cudaMalloc(&d.workspace, d.workspace_bytes));
    MOE_TRY_CUDA(cudaMemcpy(device, host, sizeof host, cudaMemcpyHostToDevice));
    d.x = device, d.router = device + X, d.w1.base = device + X + R;
    d.w2.base = device + X + R + W1, d.y = out;
    s = moe_layer_forward(&d, 0);
    MOE_TRY_CUDA(cudaMemcpy(host, out, X * 2, cudaMemcpyDeviceToHost));
    for (int i = 0; i < X; ++i) y[i] = moe_bf16_to_f32(host[i]);
    MOE_TRY_CUDA(cudaFree(device));
    MOE_TRY_CUDA(cudaFree(out));
    MOE_TRY_CUDA(cudaFree(d.workspace));
    return s;
}

#endif
