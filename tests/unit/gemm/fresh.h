/* fresh.h: many calls in a row on fresh inputs, compared by hashes of their outputs: races of copies
   that a repeated input hides. */
#ifndef MOE_TESTS_GEMM_FRESH_H
#define MOE_TESTS_GEMM_FRESH_H

#include "tests/test.h"
#include "tests/test_case.h"

typedef struct fresh_args {
    uint16_t* a;                 /* [n] filled */
    const uint32_t* c;           /* [n] hashed; or null */
    unsigned long long* hash;    /* [1] */
    int64_t n;
    int32_t call, dtype;
} fresh_args;

/* Fills a with numbers of the call, or adds the hash of c, in any order, to *hash. */
MOE_KERNEL(256, 1) fresh_kernel(MOE_ARG(fresh_args) d)
{
    const int64_t first = (int64_t)blockIdx.x * 256 + threadIdx.x, step = (int64_t)gridDim.x * 256;
    unsigned long long sum = 0;
    for (int64_t i = first; i < d.n; i += step) {
        uint64_t x = (d.c ? d.c[i] : (uint64_t)d.call << 40) ^ (uint64_t)i * 0x9e3779b97f4a7c15ull;
        x = (x ^ x >> 31) * 0x7fb5d329728ea185ull;
        x = (x ^ x >> 27) * 0x81dadef4bc2dd44dull;
        if (d.c) sum += x ^ x >> 33;
        else d.a[i] = moe_f32_to_half((float)(int)(x >> 56) / 128.0f - 1.0f, d.dtype);
    }
    if (d.c) atomicAdd(d.hash, sum);
}

/* Queues the kernel that fills n elements at `a` for this call. */
static void fill_fresh(void* a, int64_t n, int call, int dtype, moe_launch_config l)
{
    fresh_args f = {};
    f.a = (uint16_t*)a;
    f.n = n;
    f.call = call;
    f.dtype = dtype;
    CHECK_STATUS(MOE_LAUNCH(fresh_kernel, l, f), MOE_OK);
}

/* Queues the kernel that adds the hash of a buffer to *hash. */
static void add_hash(const tbuf* buffer, unsigned long long* hash, moe_launch_config l)
{
    fresh_args f = {};
    f.c = (const uint32_t*)buffer->p;
    f.hash = hash;
    f.n = (int64_t)(buffer->bytes / 4);
    CHECK_STATUS(MOE_LAUNCH(fresh_kernel, l, f), MOE_OK);
}

/* Requires that two passes over the same inputs have the same hashes, and no two calls in a row. */
static void check_hashes(const unsigned long long* one, const unsigned long long* other, int calls)
{
    int differ = 0, repeated = 0;
    for (int i = 0; i < calls; ++i) {
        differ += one[i] != other[i];
        repeated += i > 0 && one[i] == one[i - 1];
    }
    CHECK(differ == 0 && repeated == 0, "%d of %d calls differ, %d are equal", differ, calls,
          repeated);
}

#endif
