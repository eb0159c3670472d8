/* test_host_tu2.cpp: the second file of test_host.cpp; shares its scheduler. */
#include "test_host.h"

typedef struct tu2_args {
    int* out;
} tu2_args;

MOE_KERNEL(64, 1) tu2_kernel(MOE_ARG(tu2_args) d) { d.out[threadIdx.x] = 2 * (int)threadIdx.x; }

void* tu2_scheduler() { return &moeh_get(); }

void tu2_launch(int* out, cudaStream_t stream)
{
    tu2_args a = {out};
    (void)MOE_LAUNCH(tu2_kernel, moe_grid(1, 64, 0, stream), a);
}
