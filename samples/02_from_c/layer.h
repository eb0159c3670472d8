/* layer.h: an MoE layer for a C program: what layer.cu offers. C11; host memory in and out. */
#ifndef SAMPLE_LAYER_H
#define SAMPLE_LAYER_H

#include "moe/moe.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct layer layer; /* weights, workspace and buffers on the device */

typedef struct layer_config {
    int32_t hidden, intermediate; /* H, I */
    int32_t num_experts, top_k;   /* E, K */
    int32_t max_tokens;           /* the most that layer_run will be given */
    const uint16_t* router;       /* [E, H] bf16 */
    const uint16_t* w1;           /* [E, 2I, H] bf16: gate rows, then up rows */
    const uint16_t* w2;           /* [E, H, I] bf16 */
} layer_config;

/* "cuda" or "host"; null where this was built for a GPU and there is none. */
const char* layer_backend(void);

/* Copies the weights to the device. On an error *l is null. */
moe_status layer_create(const layer_config* config, layer** l);

/* y [T, H] = the layer of x [T, H], bf16, T <= max_tokens. Returns when y is there. */
moe_status layer_run(layer* l, const uint16_t* x, uint16_t* y, int32_t num_tokens);

/* The words of the fault word after layer_run: "no fault" where all was well. */
const char* layer_fault(const layer* l);

void layer_destroy(layer* l); /* null is fine */

#ifdef __cplusplus
}
#endif

#endif
