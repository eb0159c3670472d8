/* layer.h: an MoE layer for a C program, in host memory. layer.cu defines the functions. C11. */
#ifndef SAMPLE_LAYER_H
#define SAMPLE_LAYER_H

#include "moe/moe.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct layer layer; /* owns the weights, the workspace and the buffers on the device */

typedef struct layer_config {
    int32_t hidden, intermediate; /* H, I */
    int32_t num_experts, top_k;   /* E, K */
    int32_t max_tokens;           /* largest num_tokens of layer_run */
    const uint16_t* router;       /* [E, H] bf16 */
    const uint16_t* w1;           /* [E, 2I, H] bf16; of each expert I rows of gate, I rows of up */
    const uint16_t* w2;           /* [E, H, I] bf16 */
} layer_config;

/* Returns "cuda" or "host", null without a GPU. */
const char* layer_backend(void);

/* Writes a new layer to *l, null after an error. Copies the weights to the device. */
moe_status layer_create(const layer_config* config, layer** l);

/* Computes y [T, H] from x [T, H], both bf16. T, num_tokens, is at most max_tokens. Waits until y
   is complete. */
moe_status layer_run(layer* l, const uint16_t* x, uint16_t* y, int32_t num_tokens);

/* Returns the text of the fault word after the last layer_run: "no fault" without a fault. */
const char* layer_fault(const layer* l);

void layer_destroy(layer* l); /* l may be null */

#ifdef __cplusplus
}
#endif

#endif
