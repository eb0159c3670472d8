/* tokens.cuh: which tokens the shared expert's backward pass reads: all but the disabled ones, whose
   x and dy may hold anything. One launch of one thread a token. Called by layer_backward.cuh. */
#ifndef MOE_LAYER_TOKENS_CUH
#define MOE_LAYER_TOKENS_CUH

#include "../base/cuda.cuh"

#define MOEI_LAYER_TOKENS_THREADS 256

typedef struct moei_layer_tokens_args {
    const uint8_t* token_disabled; /* [T] not 0: disabled */
    int32_t* slot;                 /* [T] out: t, or -1 */
    int32_t num_tokens;            /* T */
} moei_layer_tokens_args;

MOE_KERNEL(MOEI_LAYER_TOKENS_THREADS, 1) moei_layer_tokens(MOE_ARG(moei_layer_tokens_args) a)
{
    const int t = (int)(blockIdx.x * MOEI_LAYER_TOKENS_THREADS + threadIdx.x);
    if (t < a.num_tokens) a.slot[t] = a.token_disabled[t] ? -1 : t;
}

#endif
