/* args.h: arguments of the router's own kernels: the descriptor, checked and resolved. router.cuh
   fills them in. C11 and C++14. */
#ifndef MOE_ROUTER_ARGS_H
#define MOE_ROUTER_ARGS_H

#include "../base/types.h"

typedef struct moei_router_args {
    const void* x;   /* [T, H] x_dtype */
    const void* w;   /* [E, H] w_dtype */
    float* logits;   /* [T, E] */
    uint64_t* fault; /* [1] fault word; or null */
    int64_t x_stride, w_stride, logits_stride; /* elements between rows */
    int32_t x_dtype, w_dtype;                  /* MOE_FP32, MOE_FP16 or MOE_BF16 */
    int32_t num_tokens, hidden, num_experts;   /* T, H, E */
} moei_router_args;

#endif
