/* bench.h: what all benches share. Each bench verifies before it times.

   Time: calls that are compared run in turn, A B A B ..., so that power and clocks are the same for
   each (bench_alternate). 50 ms of such rounds are warm-up; then each call counts with its median
   over --reps rounds. Before each call L2 is flushed: a buffer of four times its size is written.
   Each round begins with a pause on the GPU that is longer than the host takes to queue the round,
   so the GPU never waits for a launch. Calls of a few microseconds are timed as a captured graph of
   24 calls over rotating inputs; the time is divided by 24, and L2 is not flushed. Together the
   inputs exceed L2, except those of the smallest shapes, which stay in L2.

   Ceilings are measured in the same run: device-to-device copy (bytes read + written) and, where a
   bench has one, its peer. Clocks and power are read with nvidia-smi under load.

   Output: a table on stdout, the same rows as CSV with --csv FILE. */
#ifndef MOE_BENCH_H
#define MOE_BENCH_H

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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
    void* flush;      /* written before a call, to flush L2 */
    size_t flush_bytes;
    FILE* csv;        /* null: no CSV */
    int reps;         /* rounds that are timed */
    double copy_rate; /* bytes read + written per second */
} bench_state;

static void* bench_alloc(size_t bytes)
{
    void* p = 0;
    BENCH_CUDA(cudaMalloc(&p, bytes ? bytes : 1));
    return p;
}

/* Launches a kernel that stores its largest errors in args.worst, and copies them to `out`. */
#define BENCH_WORST(kernel, config, args, out)                                                     \
    do {                                                                                           \
        const cudaStream_t stream_ = (config).stream;                                              \
        (args).worst = (unsigned*)bench_alloc(sizeof(out));                                        \
        BENCH_CUDA(cudaMemsetAsync((args).worst, 0, sizeof(out), stream_));                        \
        BENCH_MOE(MOE_LAUNCH(kernel, config, args));                                               \
        BENCH_CUDA(cudaStreamSynchronize(stream_));                                                \
        BENCH_CUDA(cudaMemcpy(&(out), (args).worst, sizeof(out), cudaMemcpyDeviceToHost));         \
        BENCH_CUDA(cudaFree((args).worst));                                                        \
    } while (0)

/* Arguments of bench_fill_kernel: `count` elements at p, nearly normal, of standard deviation
   `scale`, from a hash of (seed, index). */
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
                        (float)(bench_hash(h, d.seed) >> 8) * (1.0f / 16777216.0f); /* deviation
                                                                                       147.8 */
        moe_store_f32(d.p, i, d.dtype, u * (d.scale / 147.8f));
    }
}

/* Returns a device buffer of random elements. */
static inline void* bench_random(int64_t count, int dtype, float scale, uint32_t seed)
{
    bench_fill_args a;
    moe_launch_config c = moe_grid(1320, 256, 0, 0);
    a.p = bench_alloc((size_t)count * (size_t)moe_dtype_bytes(dtype));
    a.count = count, a.scale = scale, a.dtype = dtype, a.seed = seed;
    BENCH_MOE(MOE_LAUNCH(bench_fill_kernel, c, a));
    return a.p;
}

static inline int bench_compare_float(const void* a, const void* b)
{
    const float x = *(const float*)a, y = *(const float*)b;
    return (x > y) - (x < y);
}

typedef struct bench_pause_args {
    uint64_t ns;
} bench_pause_args;

MOE_KERNEL(32, 1) bench_pause_kernel(MOE_ARG(bench_pause_args) a)
{
    uint64_t begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now - begin < a.ns);
}

/* Keeps the GPU busy with one warp for `ms` milliseconds, at most 2. */
static inline void bench_pause(double ms, cudaStream_t stream)
{
    bench_pause_args a;
    moe_launch_config c = moe_grid(1, 32, 0, stream);
    a.ns = (uint64_t)((ms < 2.0 ? ms : 2.0) * 1e6);
    BENCH_MOE(MOE_LAUNCH(bench_pause_kernel, c, a));
}

static inline double bench_host_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* A call to be timed: fn(context), or with repeats > 1 a captured graph of that many calls. */
typedef struct bench_call {
    bench_fn fn;
    void* context;
    int repeats;
    double ms; /* out: median of one call, milliseconds */
    cudaEvent_t begin, end;
} bench_call;

static inline bench_call bench_one(bench_fn fn, void* context)
{
    bench_call c;
    memset(&c, 0, sizeof c);
    c.fn = fn, c.context = context, c.repeats = 1;
    return c;
}

static inline void bench_launch_graph(void* context, cudaStream_t stream)
{
    BENCH_CUDA(cudaGraphLaunch((cudaGraphExec_t)context, stream));
}

/* Returns a graph of `calls` calls. Call i gets context i: rotating inputs keep L2 cold. The caller
   destroys the graph by bench_free_graph. */
static inline bench_call bench_graph(bench_state* s, bench_fn fn, void** context, int calls)
{
    bench_call c;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    BENCH_CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) fn(context[i], s->stream);
    BENCH_CUDA(cudaStreamEndCapture(s->stream, &graph));
    BENCH_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    BENCH_CUDA(cudaGraphDestroy(graph));
    c = bench_one(bench_launch_graph, exec);
    c.repeats = calls;
    return c;
}

static inline void bench_free_graph(bench_call* c)
{
    BENCH_CUDA(cudaGraphExecDestroy((cudaGraphExec_t)c->context));
}

/* Runs one round: a pause of `pause` milliseconds, then each call once. Returns the milliseconds
   that the host took to queue the round. */
static inline double bench_round(bench_state* s, bench_call* calls, int count, double pause)
{
    const double began = bench_host_ms();
    double queued;
    bench_pause(pause, s->stream);
    for (int i = 0; i < count; ++i) {
        if (calls[i].repeats == 1)
            BENCH_CUDA(cudaMemsetAsync(s->flush, i & 255, s->flush_bytes, s->stream));
        BENCH_CUDA(cudaEventRecord(calls[i].begin, s->stream));
        calls[i].fn(calls[i].context, s->stream);
        BENCH_CUDA(cudaEventRecord(calls[i].end, s->stream));
    }
    queued = bench_host_ms() - began;
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    return queued;
}

/* Sets calls[i].ms to the median milliseconds of each call, with a cold L2. The calls run in turn,
   all on the GPU in the same state, so calls[i].ms / calls[j].ms is their ratio. */
static inline void bench_alternate(bench_state* s, bench_call* calls, int count)
{
    float* ms = (float*)malloc((size_t)count * (size_t)s->reps * sizeof(float));
    double pause = 0.0, began;
    for (int i = 0; i < count; ++i) {
        BENCH_CUDA(cudaEventCreate(&calls[i].begin));
        BENCH_CUDA(cudaEventCreate(&calls[i].end));
    }
    bench_round(s, calls, count, 0.0); /* loads what a first launch loads */
    began = bench_host_ms();
    /* Warm-up: an idle GPU has lower clocks. */
    do {
        const double queued = bench_round(s, calls, count, 0.0);
        if (pause == 0.0 || queued < pause) pause = queued;
    } while (bench_host_ms() - began < 50.0);
    for (int r = 0; r < s->reps; ++r) {
        bench_round(s, calls, count, 1.5 * pause + 0.01);
        for (int i = 0; i < count; ++i)
            BENCH_CUDA(cudaEventElapsedTime(&ms[i * s->reps + r], calls[i].begin, calls[i].end));
    }
    for (int i = 0; i < count; ++i) {
        float* own = ms + i * s->reps;
        qsort(own, (size_t)s->reps, sizeof own[0], bench_compare_float);
        calls[i].ms = own[s->reps / 2] / calls[i].repeats;
        BENCH_CUDA(cudaEventDestroy(calls[i].begin));
        BENCH_CUDA(cudaEventDestroy(calls[i].end));
    }
    free(ms);
}

/* Returns the median milliseconds of fn alone. */
static inline double bench_time(bench_state* s, bench_fn fn, void* context)
{
    bench_call c = bench_one(fn, context);
    bench_alternate(s, &c, 1);
    return c.ms;
}

/* Returns the median milliseconds of one of `calls` calls in a captured graph. */
static inline double bench_time_graph(bench_state* s, bench_fn fn, void** context, int calls)
{
    bench_call c = bench_graph(s, fn, context, calls);
    bench_alternate(s, &c, 1);
    bench_free_graph(&c);
    return c.ms;
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

/* Opens the bench: device, flags, the copy ceiling. Exits with 77 without a GPU. */
MOEI_UNUSED static bench_state bench_open(int argc, char** argv, const char* title)
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

/* Prints SM clock in MHz and power in W, from nvidia-smi while `fn` runs for about a second. */
MOEI_UNUSED static void bench_note_clocks(bench_state* s, bench_fn fn, void* context, double ms)
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

/* Prints one row: `what`, milliseconds, a rate with its unit, share of the ceiling or ratio to a
   peer. */
MOEI_UNUSED static void bench_row(bench_state* s, const char* what, double ms, double rate, const char* unit,
                      double share, const char* of)
{
    printf("  %-58s %9.4f ms %9.2f %-7s %6.3f of %s\n", what, ms, rate, unit, share, of);
    if (s->csv) fprintf(s->csv, "\"%s\",%.6f,%.4f,%s,%.4f,\"%s\"\n", what, ms, rate, unit, share, of);
    fflush(stdout);
}

MOEI_UNUSED static int bench_close(bench_state* s, int failures)
{
    if (s->csv) fclose(s->csv);
    if (failures) printf("VERIFY FAILED: %d\n", failures);
    return failures != 0;
}

#endif
