/* bench.h: what every bench shares. Each bench verifies before it times.

   Time: after 50 ms of warm-up each repetition flushes L2 by writing a buffer of four times its
   size, then runs once between two events; the median counts. Launches of a few microseconds are
   timed as a captured graph of 24 calls over rotating inputs, divided by the calls: together they
   pass the L2, but for the smallest shapes, which stay in it.
   Ceilings are measured in the same run: device-to-device copy (bytes read + written) and, where
   a bench has one, its peer. Clocks and power are read with nvidia-smi while it runs.

   Output: a table on stdout, the same rows as CSV with --csv FILE. */
#ifndef MOE_BENCH_H
#define MOE_BENCH_H

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../moe/moe.cuh"

#define BENCH_CUDA(call)                                                                          \
    do {                                                                                          \
        const cudaError_t e_ = (call);                                                            \
        if (e_ != cudaSuccess) {                                                                  \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e_)); \
            exit(1);                                                                              \
        }                                                                                         \
    } while (0)

#define BENCH_MOE(call)                                                                           \
    do {                                                                                          \
        const moe_status s_ = (call);                                                             \
        char text_[MOE_STATUS_TEXT];                                                              \
        if (s_ != MOE_OK) {                                                                       \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call,                         \
                    moe_status_describe(s_, text_));                                              \
            exit(1);                                                                              \
        }                                                                                         \
    } while (0)

typedef void (*bench_fn)(void* context, cudaStream_t stream);

typedef struct bench_state {
    cudaStream_t stream;
    void* flush;
    size_t flush_bytes;
    FILE* csv;
    int reps;
    double copy_rate; /* bytes read + written per second */
} bench_state;

static void* bench_alloc(size_t bytes)
{
    void* p = 0;
    BENCH_CUDA(cudaMalloc(&p, bytes ? bytes : 1));
    return p;
}

/* Normal-ish values of standard deviation `scale`, from a hash of (seed, index). */
typedef struct bench_fill_args {
    void* p;
    int64_t count;
    float scale;
    int dtype;
    uint32_t seed;
} bench_fill_args;

static __host__ __device__ inline uint32_t bench_hash(uint32_t a, uint32_t b)
{
    uint32_t h = a * 0x9e3779b9u ^ (b + 0x7f4a7c15u);
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    return h ^ (h >> 16);
}

MOE_KERNEL(256, 1) bench_fill_kernel(MOE_ARG(bench_fill_args) d)
{
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < d.count; i += gridDim.x * 256ll) {
        const uint32_t h = bench_hash((uint32_t)i, bench_hash(d.seed, (uint32_t)(i >> 32)));
        const float u = (float)(h & 255u) + (float)(h >> 8 & 255u) + (float)(h >> 16 & 255u) +
                        (float)(h >> 24) - 510.5f +
                        (float)(bench_hash(h, d.seed) >> 8) * (1.0f / 16777216.0f); /* deviation 147.8 */
        moei_store_f32(d.p, i, d.dtype, u * (d.scale / 147.8f));
    }
}

/* A device buffer of random elements. */
static inline void* bench_random(int64_t count, int dtype, float scale, uint32_t seed)
{
    bench_fill_args a;
    moei_launch_config c = moei_grid(1320, 256, 0, 0);
    a.p = bench_alloc((size_t)count * (size_t)moe_dtype_bytes(dtype));
    a.count = count, a.scale = scale, a.dtype = dtype, a.seed = seed;
    BENCH_MOE(MOE_LAUNCH(bench_fill_kernel, c, a));
    return a.p;
}

static int bench_compare_float(const void* a, const void* b)
{
    const float x = *(const float*)a, y = *(const float*)b;
    return (x > y) - (x < y);
}

/* Median milliseconds of fn with a cold L2. */
static inline double bench_time(bench_state* s, bench_fn fn, void* context)
{
    float ms[256];
    cudaEvent_t begin, end;
    const int reps = s->reps < 256 ? s->reps : 256;
    BENCH_CUDA(cudaEventCreate(&begin));
    BENCH_CUDA(cudaEventCreate(&end));
    for (float spent = 0.0f; spent < 50.0f;) { /* the first calls run at the clocks of an idle GPU */
        BENCH_CUDA(cudaEventRecord(begin, s->stream));
        for (int i = 0; i < 8; ++i) {
            BENCH_CUDA(cudaMemsetAsync(s->flush, i, s->flush_bytes, s->stream));
            fn(context, s->stream);
        }
        BENCH_CUDA(cudaEventRecord(end, s->stream));
        BENCH_CUDA(cudaEventSynchronize(end));
        BENCH_CUDA(cudaEventElapsedTime(&ms[0], begin, end));
        spent += ms[0];
    }
    for (int i = 0; i < reps; ++i) {
        BENCH_CUDA(cudaMemsetAsync(s->flush, i & 255, s->flush_bytes, s->stream));
        BENCH_CUDA(cudaEventRecord(begin, s->stream));
        fn(context, s->stream);
        BENCH_CUDA(cudaEventRecord(end, s->stream));
        BENCH_CUDA(cudaEventSynchronize(end));
        BENCH_CUDA(cudaEventElapsedTime(&ms[i], begin, end));
    }
    BENCH_CUDA(cudaEventDestroy(begin));
    BENCH_CUDA(cudaEventDestroy(end));
    qsort(ms, (size_t)reps, sizeof ms[0], bench_compare_float);
    return ms[reps / 2];
}

/* Median milliseconds of one of `calls` calls in a captured graph; call i gets context i, so that
   rotating inputs keep the L2 cold. */
static inline double bench_time_graph(bench_state* s, bench_fn fn, void** context, int calls)
{
    float ms[256];
    cudaEvent_t begin, end;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    const int reps = s->reps < 256 ? s->reps : 256;
    BENCH_CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) fn(context[i], s->stream);
    BENCH_CUDA(cudaStreamEndCapture(s->stream, &graph));
    BENCH_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    BENCH_CUDA(cudaEventCreate(&begin));
    BENCH_CUDA(cudaEventCreate(&end));
    BENCH_CUDA(cudaGraphLaunch(exec, s->stream));
    for (int i = 0; i < reps; ++i) {
        BENCH_CUDA(cudaEventRecord(begin, s->stream));
        BENCH_CUDA(cudaGraphLaunch(exec, s->stream));
        BENCH_CUDA(cudaEventRecord(end, s->stream));
        BENCH_CUDA(cudaEventSynchronize(end));
        BENCH_CUDA(cudaEventElapsedTime(&ms[i], begin, end));
    }
    BENCH_CUDA(cudaGraphExecDestroy(exec));
    BENCH_CUDA(cudaGraphDestroy(graph));
    qsort(ms, (size_t)reps, sizeof ms[0], bench_compare_float);
    return ms[reps / 2] / calls;
}

typedef struct bench_copy_args {
    void *to, *from;
    size_t bytes;
} bench_copy_args;

static void bench_copy(void* context, cudaStream_t stream)
{
    const bench_copy_args* c = (const bench_copy_args*)context;
    BENCH_CUDA(cudaMemcpyAsync(c->to, c->from, c->bytes, cudaMemcpyDeviceToDevice, stream));
}

/* Opens the bench: device, flags, the copy ceiling. Exits 77 where there is no GPU. */
static bench_state bench_open(int argc, char** argv, const char* title)
{
    bench_state s;
    struct cudaDeviceProp prop;
    int devices = 0;
    bench_copy_args c;
    memset(&s, 0, sizeof s);
    s.reps = 30;
    for (int i = 1; i < argc; ++i) {
        if (!strcmp(argv[i], "--csv") && i + 1 < argc) {
            s.csv = fopen(argv[++i], "w");
            if (s.csv) fprintf(s.csv, "what,ms,rate,unit,share,of\n");
        } else if (!strcmp(argv[i], "--reps") && i + 1 < argc) s.reps = atoi(argv[++i]);
        else {
            fprintf(stderr, "usage: %s [--csv FILE] [--reps N]\n", argv[0]);
            exit(2);
        }
    }
    if (s.reps < 1) s.reps = 1;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("%s: no GPU, skipped\n", title);
        exit(77);
    }
    BENCH_CUDA(cudaGetDeviceProperties(&prop, 0));
    BENCH_CUDA(cudaStreamCreate(&s.stream));
    s.flush_bytes = (size_t)prop.l2CacheSize * 4;
    s.flush = bench_alloc(s.flush_bytes);
    c.bytes = (size_t)2 << 30;
    c.to = bench_alloc(c.bytes);
    c.from = bench_random((int64_t)(c.bytes / 2), MOE_BF16, 1.0f, 1);
    BENCH_CUDA(cudaDeviceSynchronize());
    s.copy_rate = 2.0 * (double)c.bytes / (bench_time(&s, bench_copy, &c) * 1e-3);
    BENCH_CUDA(cudaFree(c.to));
    BENCH_CUDA(cudaFree(c.from));
    printf("%s: %s, %d multiprocessors, moe %s; copy %.2f TB/s read + written\n", title, prop.name,
           prop.multiProcessorCount, MOE_VERSION_STRING, s.copy_rate * 1e-12);
    return s;
}

/* SM clock in MHz and power in W, as nvidia-smi sees them under `fn`, called for about a second. */
static void bench_note_clocks(bench_state* s, bench_fn fn, void* context, double ms)
{
    char line[128] = "";
    FILE* p;
    const int calls = ms > 0 && ms < 1000 ? (int)(1000 / ms) : 1;
    for (int i = 0; i < (calls < 1000 ? calls : 1000); ++i) fn(context, s->stream);
    p = popen("nvidia-smi --query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits -i 0 "
                    "2>/dev/null", "r");
    if (p && fgets(line, sizeof line, p)) {
        line[strcspn(line, "\n")] = 0;
        printf("  under load: SM MHz, W = %s\n", line);
        if (s->csv) fprintf(s->csv, "\"clocks.sm MHz, power.draw W\",%s\n", line);
    }
    if (p) pclose(p);
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
}

/* One row: what, milliseconds, a rate with its unit, share of the ceiling or ratio to a peer. */
static void bench_row(bench_state* s, const char* what, double ms, double rate, const char* unit,
                      double share, const char* of)
{
    printf("  %-58s %9.4f ms %9.2f %-7s %6.3f of %s\n", what, ms, rate, unit, share, of);
    if (s->csv) fprintf(s->csv, "\"%s\",%.6f,%.4f,%s,%.4f,\"%s\"\n", what, ms, rate, unit, share, of);
    fflush(stdout);
}

static int bench_close(bench_state* s, int failures)
{
    if (s->csv) fclose(s->csv);
    if (failures) printf("VERIFY FAILED: %d\n", failures);
    return failures != 0;
}

#endif
