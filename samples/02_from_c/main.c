/* 02_from_c: a C11 program that runs an MoE layer. layer.cu is the only CUDA file.

     nvcc -I. -O2 -arch=sm_90a samples/02_from_c/main.c samples/02_from_c/layer.cu -o 02_from_c
     g++ -I. -O2 -x c samples/02_from_c/main.c -x c++ samples/02_from_c/layer.cu -o 02_from_c

   The first command builds for a GPU, the second for the CPU, without a CUDA toolkit.
   ./02_from_c [TOKENS] */
#include "layer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { H = 64, I = 32, E = 8, K = 2, MAX_TOKENS = 256 };

static uint16_t router[E * H], w1[E * 2 * I * H], w2[E * H * I];
static uint16_t x[MAX_TOKENS * H], y[MAX_TOKENS * H];

/* Fills n bf16 numbers from -size to size, the same in every run. */
static void fill(uint16_t* p, int n, float size)
{
    static uint32_t state = 1;
    for (int i = 0; i < n; ++i) {
        state = state * 1664525u + 1013904223u;
        p[i] = moe_f32_to_bf16(((float)(state >> 8) / 8388608.0f - 1.0f) * size);
    }
}

static double dot(const uint16_t* a, const uint16_t* b, int n)
{
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += (double)moe_bf16_to_f32(a[i]) * moe_bf16_to_f32(b[i]);
    return sum;
}

/* Computes the layer for one token: softmax over all experts, then the K largest, each a SwiGLU.
   Writes out [H]. */
static void reference(const uint16_t* token, double* out)
{
    double p[E], sum = 0, act[I];
    for (int e = 0; e < E; ++e) sum += p[e] = exp(dot(token, router + e * H, H));
    for (int h = 0; h < H; ++h) out[h] = 0;
    for (int k = 0; k < K; ++k) {
        int best = 0;
        for (int e = 1; e < E; ++e)
            if (p[e] > p[best]) best = e;
        for (int i = 0; i < I; ++i) {
            const uint16_t* gate = w1 + (best * 2 * I + i) * H;
            const double g = dot(token, gate, H);
            act[i] = g / (1 + exp(-g)) * dot(token, gate + I * H, H);
        }
        for (int h = 0; h < H; ++h) {
            double row = 0;
            for (int i = 0; i < I; ++i) row += act[i] * moe_bf16_to_f32(w2[(best * H + h) * I + i]);
            out[h] += p[best] / sum * row;
        }
        p[best] = 0;
    }
}

/* Ends the program where a call failed or refused a field. */
static void try_call(const char* what, moe_status s)
{
    char text[MOE_STATUS_TEXT];
    if (s == MOE_OK) return;
    fprintf(stderr, "02_from_c: %s: %s\n", what, moe_status_describe(s, text));
    exit(moe_status_kind(s) == MOE_ERR_CUDA ? 1 : 2);
}

int main(int argc, char** argv)
{
    const int tokens = argc > 1 ? atoi(argv[1]) : 100;
    double want[H], error = 0, largest = 0;
    layer_config c = {.hidden = H, .intermediate = I, .num_experts = E, .top_k = K};
    layer* l;

    if (!layer_backend()) {
        printf("skipped: built for a GPU, and there is none\n");
        return 77;
    }
    fill(router, E * H, 0.5f), fill(w1, E * 2 * I * H, 0.3f), fill(w2, E * H * I, 0.3f);
    fill(x, MAX_TOKENS * H, 1.0f);
    c.max_tokens = MAX_TOKENS;
    c.router = router, c.w1 = w1, c.w2 = w2;

    try_call("layer_create", layer_create(&c, &l));
    try_call("layer_run", layer_run(l, x, y, tokens));
    printf("moe %s, %s backend: %d tokens of %d numbers through %d of %d experts\n",
           MOE_VERSION_STRING, layer_backend(), tokens, H, K, E);
    printf("fault word: %s\n", layer_fault(l));
    layer_destroy(l);

    for (int t = 0; t < tokens; ++t) {
        reference(x + t * H, want);
        for (int h = 0; h < H; ++h) {
            const double e = fabs(moe_bf16_to_f32(y[t * H + h]) - want[h]);
            if (error == error && !(e <= error)) error = e; /* a NaN stays */
            if (fabs(want[h]) > largest) largest = fabs(want[h]);
        }
    }
    printf("largest error %.3g, values up to %.3g\n", error, largest);
    if (!(error <= 0.02 * largest)) {
        printf("FAILED: not what the reference in double precision says\n");
        return 1;
    }
    printf("PASSED: the layer is right\n");
    return 0;
}
