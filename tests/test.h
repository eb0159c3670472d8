/* test.h: the harness of the unit tests. One source runs on a GPU and on the CPU backend:

     nvcc -I. -arch=sm_90a tests/unit/test_gate.cu -o test_gate
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_gate.cu -o test_gate

   A test is a void function; main lists them:

     static void test_sum(void)
     {
         trand r = trand_new(1);                    // numbers of the run's seed
         tbuf x = tbuf_new("x", n * 4, 0);          // device memory, poisoned, canaries around it
         ...
         if (!CHECK(s == MOE_OK, "n=%d", n)) return;
         tbuf_free(&x);                             // checks the canaries
     }
     int main(int argc, char** argv)
     {
         test_begin(argc, argv);
         RUN(test_sum);
         return test_end();
     }

   A test that makes no check is skipped, not passed: it lacks the memory, or the CPU would take
   too long; "skipped NAME (why)". Exit code 0: all that ran passed, 1: one failed, 77: no device,
   or all were skipped (CTest's SKIP_RETURN_CODE). An argument names the tests to run, by any part of
   the name; "-PART" leaves out those whose name has PART.
     MOE_TEST_SEED=<n>    seed of the inputs, else a fresh one. A failure prints it.
     MOE_TEST_REPS=<n>    runs every test n times, each time with the next seed
     MOE_TEST_VERBOSE=1   prints what the comparisons found

   test_buffer.h has device memory, repeated runs and graphs, test_compare.h the comparisons. */
#ifndef MOE_TESTS_TEST_H
#define MOE_TESTS_TEST_H

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "moe/base/cuda.cuh"
#include "moe/faults.h"
#include "moe/fields.h"

#define TEST_SKIPPED 77
#define TEST_MOST_MESSAGES 12 /* of one test; the rest is only counted */

typedef struct test_state {
    const char* name;  /* test that runs */
    uint64_t seed;     /* of this run of it */
    uint64_t base_seed;
    int reps, verbose;
    int failures;      /* failed checks of the test that runs */
    int64_t checks;    /* all checks so far */
    char left_out[96]; /* why the test that runs left something out, or "" */
    int passed, failed, skipped; /* tests */
    int argc;
    char** argv;
    struct {
        const char* name;
        double seconds;
    } slowest[5];
    cudaStream_t stream; /* the tests' stream: not the default one, so that a launch which
                            ignores its stream argument is not ordered by accident */
} test_state;

static test_state test_now;

/* Counts a check; prints place, condition and message where it failed. Returns the condition. */
MOEI_UNUSED static int test_check(int ok, const char* file, int line, const char* cond,
                                  const char* format, ...)
{
    ++test_now.checks;
    if (ok) return 1;
    if (++test_now.failures <= TEST_MOST_MESSAGES) {
        va_list args;
        printf("%s:%d: %s: %s", file, line, test_now.name ? test_now.name : "?", cond);
        va_start(args, format);
        vprintf(format, args);
        va_end(args);
        printf("\n");
    } else if (test_now.failures == TEST_MOST_MESSAGES + 1) {
        printf("%s: more failures follow, not printed\n", test_now.name);
    }
    fflush(stdout);
    return 0;
}

/* CHECK(cond) or CHECK(cond, "format", ...): worth 1 where the condition holds, else 0. */
#define CHECK(cond, ...)                                                                          \
    test_check(!!(cond), __FILE__, __LINE__, #cond, " " __VA_ARGS__)

MOEI_UNUSED static int test_status(moe_status got, moe_status want, const char* file, int line,
                                   const char* call)
{
    char a[MOE_STATUS_TEXT], b[MOE_STATUS_TEXT];
    return test_check(got == want, file, line, call, ": got \"%s\", expected \"%s\"",
                      moe_status_describe(got, a), moe_status_describe(want, b));
}

/* Compares the whole status: kind and field. */
#define CHECK_STATUS(call, expected) test_status((call), (expected), __FILE__, __LINE__, #call)

/* Ends the program where a CUDA call fails. */
#define TEST_CUDA(call) test_cuda((call), __FILE__, __LINE__, #call)
MOEI_UNUSED static void test_cuda(cudaError_t e, const char* file, int line, const char* call)
{
    if (e == cudaSuccess) return;
    printf("%s:%d: %s: %s: CUDA error %d (seed %llu)\n", file, line,
           test_now.name ? test_now.name : "?", call, (int)e, (unsigned long long)test_now.seed);
    fflush(stdout);
    exit(1);
}

MOEI_UNUSED static void test_begin(int argc, char** argv)
{
    const char* seed = getenv("MOE_TEST_SEED");
    const char* reps = getenv("MOE_TEST_REPS");
    int devices = 0;
    test_now.argc = argc;
    test_now.argv = argv;
    test_now.base_seed = seed ? strtoull(seed, 0, 10) : (uint64_t)time(0);
    test_now.reps = reps && atoi(reps) > 0 ? atoi(reps) : 1;
    test_now.verbose = getenv("MOE_TEST_VERBOSE") != 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: no CUDA device\n");
        exit(TEST_SKIPPED);
    }
    TEST_CUDA(cudaStreamCreateWithFlags(&test_now.stream, cudaStreamNonBlocking));
}

/* Prints next to the name of the running test what the test leaves out, and why. A test without any
   check counts as skipped. */
MOEI_UNUSED static void test_leave_out(const char* format, ...)
{
    va_list args;
    if (test_now.left_out[0]) return; /* the first reason is shown */
    va_start(args, format);
    vsnprintf(test_now.left_out, sizeof test_now.left_out, format, args);
    va_end(args);
}

/* Returns 1 where long tests run: on a GPU, and on the CPU with MOE_TEST_FULL, as in the preset full. */
MOEI_UNUSED static int test_long(void) { return !MOE_ON_HOST || getenv("MOE_TEST_FULL") != 0; }

/* Returns 1 where the program's arguments select the test `name`. */
MOEI_UNUSED static int test_selected(const char* name)
{
    int named = 0, given = 0;
    for (int i = 1; i < test_now.argc; ++i) {
        const char* part = test_now.argv[i];
        if (part[0] == '-') {
            if (strstr(name, part + 1)) return 0;
        } else {
            given = 1;
            named |= strstr(name, part) != 0;
        }
    }
    return named || !given;
}

/* Keeps the slowest tests, longest first. */
MOEI_UNUSED static void test_time(const char* name, double seconds)
{
    const int n = (int)(sizeof test_now.slowest / sizeof test_now.slowest[0]);
    int i = n - 1;
    if (seconds <= test_now.slowest[i].seconds) return;
    for (; i > 0 && seconds > test_now.slowest[i - 1].seconds; --i)
        test_now.slowest[i] = test_now.slowest[i - 1];
    test_now.slowest[i].name = name;
    test_now.slowest[i].seconds = seconds;
}

#define RUN(test) test_run(test, #test)
MOEI_UNUSED static void test_run(void (*test)(void), const char* name)
{
    if (!test_selected(name)) return;
    for (int rep = 0; rep < test_now.reps; ++rep) {
        const int64_t checks = test_now.checks;
        struct timespec a, b;
        timespec_get(&a, TIME_UTC);
        test_now.name = name;
        test_now.seed = test_now.base_seed + (uint64_t)rep;
        test_now.failures = 0;
        test_now.left_out[0] = 0;
        test();
        TEST_CUDA(cudaDeviceSynchronize());
        timespec_get(&b, TIME_UTC);
        test_time(name, (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec));
        if (test_now.failures) {
            ++test_now.failed;
            printf("FAILED %s: %d checks; MOE_TEST_SEED=%llu repeats it\n", name,
                   test_now.failures, (unsigned long long)test_now.seed);
        } else if (test_now.checks == checks) {
            ++test_now.skipped;
            printf("skipped %s (%s)\n", name,
                   test_now.left_out[0] ? test_now.left_out
                   : MOE_ON_HOST        ? "on a GPU only"
                                        : "no check was made");
        } else {
            ++test_now.passed;
            printf("passed %s (%.2f s)%s%s\n", name,
                   (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec),
                   test_now.left_out[0] ? ", in part: " : "", test_now.left_out);
        }
        fflush(stdout);
    }
}

MOEI_UNUSED static int test_end(void)
{
    TEST_CUDA(cudaStreamDestroy(test_now.stream));
    printf("slowest:");
    for (int i = 0; i < 5 && test_now.slowest[i].name; ++i)
        printf(" %s %.2f s", test_now.slowest[i].name, test_now.slowest[i].seconds);
    printf("\n%lld checks\n%d passed, %d failed, %d skipped\n", (long long)test_now.checks,
           test_now.passed, test_now.failed, test_now.skipped);
    if (test_now.skipped && !test_now.passed && !test_now.failed) return TEST_SKIPPED;
    return test_now.failed || !test_now.passed ? 1 : 0;
}

/* Numbers that depend on nothing but the seed, the salt and how many were drawn before. */
typedef struct trand {
    uint64_t key, at;
} trand;

MOEI_UNUSED static uint64_t trand_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

MOEI_UNUSED static trand trand_new(uint64_t salt)
{
    trand r;
    r.key = trand_mix(test_now.seed ^ trand_mix(salt));
    r.at = 0;
    return r;
}

MOEI_UNUSED static uint64_t trand_bits(trand* r) { return trand_mix(r->key + r->at++); }

/* lo .. hi, both possible */
MOEI_UNUSED static int64_t trand_int(trand* r, int64_t lo, int64_t hi)
{
    return lo + (int64_t)(trand_bits(r) % (uint64_t)(hi - lo + 1));
}

/* Mean 0, variance 1, within 3.5: four uniform numbers added. */
MOEI_UNUSED static float trand_normal(trand* r)
{
    const uint64_t b = trand_bits(r);
    const double sum = (double)(b & 0xffff) + (double)((b >> 16) & 0xffff) +
                       (double)((b >> 32) & 0xffff) + (double)(b >> 48);
    return (float)((sum / 65535.0 - 2.0) * 1.7320508);
}

MOEI_UNUSED static void trand_fill_normal(trand* r, void* p, int64_t n, int dtype)
{
    for (int64_t i = 0; i < n; ++i) moe_store(p, i, dtype, trand_normal(r));
}

/* Draws whole numbers lo .. hi: their sums are exact, and many are equal. */
MOEI_UNUSED static void trand_fill_int(trand* r, void* p, int64_t n, int dtype, int lo, int hi)
{
    for (int64_t i = 0; i < n; ++i) moe_store(p, i, dtype, (float)trand_int(r, lo, hi));
}

/* What memory holds before a test writes it: NaN in fp32, fp16, bf16 and double, and in integers a
   negative number that is not -1. Buffers begin at an even i. */
MOEI_UNUSED static unsigned char test_poison_byte(size_t i) { return (i & 1) ? 0xff : 0xda; }

MOEI_UNUSED static void test_poison(void* p, size_t bytes)
{
    for (size_t i = 0; i < bytes; ++i) ((unsigned char*)p)[i] = test_poison_byte(i);
}

/* A prepared struct that was refused, poison before, must be empty: its run queues nothing. */
MOEI_UNUSED static void test_empty(const void* prepared, size_t bytes, int line)
{
    size_t kept = 0;
    for (size_t i = 0; i < bytes; ++i) kept += ((const unsigned char*)prepared)[i] != 0;
    CHECK(kept == 0, "line %d: %d bytes of a refused struct are not 0", line, (int)kept);
}

/* Host memory full of poison. At least one byte, so that the pointer is never null. */
MOEI_UNUSED static void* test_host(int64_t bytes)
{
    void* p = bytes < 0 ? 0 : malloc((size_t)bytes + 1);
    if (!p) {
        printf("out of host memory\n");
        exit(1);
    }
    test_poison(p, (size_t)bytes + 1);
    return p;
}

/* Returns n zeros in host memory. */
MOEI_UNUSED static double* tzeros(int64_t n)
{
    double* p = (double*)test_host(n * 8);
    for (int64_t i = 0; i < n; ++i) p[i] = 0;
    return p;
}

#include "test_buffer.h"
#include "test_compare.h"

#endif
