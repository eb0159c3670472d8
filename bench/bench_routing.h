/* bench_routing.h: shapes and routings that a bench of experts takes as flags, and the dense
   products that it compares with.

     --shape T,H,I,E,K   sizes as in docs/glossary.md
     --routing KIND      how slots choose their experts

   Both may be repeated: each shape is run under each routing. A shape without a routing is run
   under `random`, a routing without a shape at the first shape of bench_listed. Without both, all
   listed shapes are run under `random`, the first also under every other kind.

   Kinds of routing; a token's K experts are distinct, and no slot is dropped:
     random      every expert is as likely as any other
     balanced    slot s has rank s mod E: counts differ by one at most, and the tokens of an expert
                 lie all over T
     zipf        rank r is drawn with a chance proportional to 1 / (r + 1)
     same        every token has the ranks 0 .. K - 1
     half        random among the ranks 0 .. (E - 1) / 2: the other experts are empty
   Rank r is expert r * step mod E, step coprime to E: full experts are spread over all.

   All kinds have the same useful FLOPs, 6 T K H I, so a ratio of rates is a ratio of times. The
   last three are compared with `balanced`, which is then run too. */
#ifndef MOE_BENCH_ROUTING_H
#define MOE_BENCH_ROUTING_H

#include "bench_blas.h"

enum {
    BENCH_RANDOM,
    BENCH_BALANCED,
    BENCH_ZIPF,
    BENCH_SAME,
    BENCH_HALF,
    BENCH_ROUTINGS,
    BENCH_FIRST_SKEWED = BENCH_ZIPF,
    BENCH_SHAPES = 16 /* most shapes of a run */
};

static const char* const bench_routing_name[BENCH_ROUTINGS] = {"random", "balanced", "zipf", "same",
                                                               "half"};

typedef struct bench_shape {
    int T, H, I, E, K;
} bench_shape;

static const bench_shape bench_listed[] = {
    {32768, 4096, 1536, 128, 8}, {24576, 1536, 256, 128, 8}, {16384, 4096, 14336, 8, 2},
    {8192, 7168, 2048, 256, 8},  {8192, 2048, 768, 128, 8},  {32768, 2048, 768, 128, 8},
    {8192, 4096, 14336, 8, 2},   {8192, 2048, 512, 512, 10}, {8192, 2880, 2880, 128, 4},
};

/* What a bench is to run. */
typedef struct bench_runs {
    bench_shape shape[BENCH_SHAPES];
    unsigned routings[BENCH_SHAPES]; /* of each shape: bit r is set for routing r */
    int count;
    int listed; /* 1: no flag chose a shape or a routing */
} bench_runs;

/* ---- flags ---- */

/* Returns 1 where `text` is a shape; sets *h. */
static inline int bench_parse_shape(const char* text, bench_shape* h)
{
    char rest;
    return sscanf(text, "%d,%d,%d,%d,%d%c", &h->T, &h->H, &h->I, &h->E, &h->K, &rest) == 5 &&
           h->T > 0 && h->H > 0 && h->I > 0 && h->K > 0 && h->K <= h->E &&
           h->E <= MOE_MAX_EXPERTS && (int64_t)h->T * h->K <= INT32_MAX;
}

/* Returns the routing of that name, -1 for a name that is none. */
static inline int bench_parse_routing(const char* text)
{
    for (int r = 0; r < BENCH_ROUTINGS; ++r)
        if (!strcmp(text, bench_routing_name[r])) return r;
    return -1;
}

static inline void bench_usage_runs(const char* name)
{
    fprintf(stderr,
            "usage: %s [--shape T,H,I,E,K]... [--routing random|balanced|zipf|same|half]... "
            "[--csv FILE] [--reps N]\n  K <= E; half: K <= (E + 1) / 2\n",
            name);
    exit(2);
}

/* Opens the bench as bench_open does, and sets *runs by the flags of this header. */
static inline bench_state bench_open_runs(int argc, char** argv, const char* title,
                                          bench_runs* runs)
{
    char* other[5] = {argv[0]}; /* the flags of bench_open, each at most once */
    int others = 1, r;
    unsigned routings = 0;
    memset(runs, 0, sizeof *runs);
    for (int i = 1; i < argc; i += 2) {
        const char* flag = argv[i];
        if (i + 1 == argc) bench_usage_runs(argv[0]);
        if (!strcmp(flag, "--shape")) {
            if (runs->count == BENCH_SHAPES ||
                !bench_parse_shape(argv[i + 1], &runs->shape[runs->count++]))
                bench_usage_runs(argv[0]);
        } else if (!strcmp(flag, "--routing")) {
            r = bench_parse_routing(argv[i + 1]);
            if (r < 0) bench_usage_runs(argv[0]);
            routings |= 1u << r;
        } else if ((!strcmp(flag, "--csv") || !strcmp(flag, "--reps")) && others < 5) {
            other[others++] = argv[i], other[others++] = argv[i + 1];
        } else bench_usage_runs(argv[0]);
    }
    runs->listed = !runs->count && !routings;
    if (runs->listed) {
        runs->count = (int)(sizeof bench_listed / sizeof bench_listed[0]);
        memcpy(runs->shape, bench_listed, sizeof bench_listed);
    } else if (!runs->count) {
        runs->count = 1;
        runs->shape[0] = bench_listed[0];
    }
    if (!routings) routings = 1u << BENCH_RANDOM;
    if (routings >> BENCH_FIRST_SKEWED) routings |= 1u << BENCH_BALANCED;
    for (int i = 0; i < runs->count; ++i) {
        const bench_shape* h = &runs->shape[i];
        runs->routings[i] = runs->listed && i == 0 ? (1u << BENCH_ROUTINGS) - 1 : routings;
        if ((runs->routings[i] >> BENCH_HALF & 1) && h->K > (h->E + 1) / 2)
            bench_usage_runs(argv[0]);
    }
    return bench_open(others, other, title);
}

/* ---- routings ---- */

/* Returns a number near 5/8 E that is coprime to E. */
static inline int bench_routing_step(int E)
{
    for (int step = E * 5 / 8;; ++step) {
        int a = E, b = step;
        while (b) {
            const int rest = a % b;
            a = b, b = rest;
        }
        if (a == 1) return step;
    }
}

/* Returns the first rank r with sum[r] > at. */
static inline int bench_find_rank(const double* sum, double at)
{
    int r = 0;
    while (sum[r] <= at) ++r;
    return r;
}

/* Returns the ids [T, K] of a routing, in memory of the host; the caller frees them. */
static inline int32_t* bench_routing_ids(const bench_shape* h, int routing)
{
    const int E = h->E, K = h->K, step = bench_routing_step(E);
    const int64_t slots = (int64_t)h->T * K;
    int32_t* ids = (int32_t*)malloc((size_t)slots * sizeof(int32_t));
    double* sum = (double*)malloc((size_t)E * sizeof(double)); /* [E] of the chances up to a rank */
    double total = 0.0;
    for (int r = 0; r < E; ++r) {
        if (routing == BENCH_ZIPF) total += 1.0 / (r + 1);
        else if (routing != BENCH_HALF || r < (E + 1) / 2) total += 1.0;
        sum[r] = total;
    }
    for (int64_t s = 0; s < slots; ++s) { /* ids hold ranks at first */
        const int64_t first = s / K * K;  /* slot of the token */
        uint32_t draw = 0;
        int taken = 1;
        if (routing == BENCH_BALANCED) ids[s] = (int32_t)(s % E), taken = 0;
        if (routing == BENCH_SAME) ids[s] = (int32_t)(s % K), taken = 0;
        while (taken) {
            ids[s] = bench_find_rank(sum, bench_hash((uint32_t)s, draw++) / 4294967296.0 * total);
            taken = 0;
            for (int64_t other = first; other < s; ++other) taken |= ids[other] == ids[s];
        }
    }
    for (int64_t s = 0; s < slots; ++s) ids[s] = (int32_t)((int64_t)ids[s] * step % E);
    free(sum);
    return ids;
}

/* Returns a copy on the device. */
static inline void* bench_upload(const void* from, size_t bytes)
{
    void* p = bench_alloc(bytes);
    BENCH_CUDA(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice));
    return p;
}

/* Returns logits [T, E] on the device under which a gate chooses ids, in their order. */
static inline float* bench_routing_logits(const bench_shape* h, const int32_t* ids)
{
    const size_t count = (size_t)h->T * (size_t)h->E;
    float *logits = (float*)malloc(count * sizeof(float)), *p;
    for (size_t i = 0; i < count; ++i) logits[i] = -8.0f;
    for (int64_t s = 0; s < (int64_t)h->T * h->K; ++s)
        logits[s / h->K * h->E + ids[s]] = 1.0f - (float)(s % h->K) / (float)h->K;
    p = (float*)bench_upload(logits, count * sizeof(float));
    free(logits);
    return p;
}

/* ---- dense products ---- */

/* Returns 1 where an expert has rows enough, 64, for dense products to be the peer. With fewer the
   bytes of the weights bound the time. */
static inline int bench_dense_applies(const bench_shape* h)
{
    return (int64_t)h->T * h->K / h->E >= 64;
}

/* Chooses the two dense products with the rows of a shape: dense[0] is [T K, H] x [H, 2I],
   dense[1] [T K, I] x [I, H]. Sets call[0] and call[1]. */
static inline void bench_dense_open(bench_state* s, const bench_blas* blas, const bench_shape* h,
                                    bench_gemm* dense, bench_call* call)
{
    dense[0] = bench_gemm_random(s, blas, h->T * h->K, 2 * h->I, h->H);
    dense[1] = bench_gemm_random(s, blas, h->T * h->K, h->H, h->I);
    for (int i = 0; i < 2; ++i) call[i] = bench_one(bench_run_gemm, &dense[i]);
}

/* Prints the rows of the two products, timed as call[0] and call[1]; flops: of both. */
static inline void bench_dense_rows(bench_state* s, const bench_call* call, double flops)
{
    const double up = call[0].ms, down = call[1].ms;
    bench_row_dense(s, "cuBLAS dense, up", up, flops * 2 / 3, up);
    bench_row_dense(s, "cuBLAS dense, down", down, flops / 3, down);
    bench_row_dense(s, "cuBLAS dense, both", up + down, flops, up + down);
}

#endif
