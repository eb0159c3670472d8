/* case.h: checks and the one argument struct of the CPU backend's tests. */
#ifndef MOE_TESTS_HOST_CASE_H
#define MOE_TESTS_HOST_CASE_H

#include "test_host.h"

static int failures;

#define CHECK(cond)                                                                               \
    do {                                                                                          \
        if (!(cond)) {                                                                            \
            ++failures;                                                                           \
            printf("%s:%d: seed %llu: %s\n", __FILE__, __LINE__,                                  \
                   (unsigned long long)moeh_get().seed, #cond);                                   \
        }                                                                                         \
    } while (0)
#define OK(call) CHECK((call) == cudaSuccess)

/* One argument struct serves every kernel of this file. */
typedef struct args {
    int* out;
    int* flag;
    const float* from;
    float* to;
    const uint16_t *a, *b;
    float* c;
    int n, option, dtype, a_major, b_major;
} args;

static args zero_args()
{
    args a;
    memset((void*)&a, 0, sizeof a);
    return a;
}

static int* ints(size_t n)
{
    int* p = nullptr;
    OK(cudaMalloc(&p, n * sizeof *p));
    OK(cudaMemset(p, 0, n * sizeof *p));
    return p;
}

#define RUN(kernel, blocks, threads, smem, a)                                                      \
    (MOE_LAUNCH(kernel, moe_grid(blocks, threads, smem, nullptr), a) ? cudaErrorInvalidValue       \
                                                                     : cudaDeviceSynchronize())

#endif
