/* Shows why cuBLAS's time for one dense product varies: workspace, algorithm, or clocks.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_blas.cu -lcublas -lcublasLt -o bench_blas

   Ways:  GemmEx, default    cublasSetStream before each call: cuBLAS has its own workspace
          GemmEx, 32 MiB     a workspace by cublasSetWorkspace
          Lt, first          the first algorithm of cublasLt's heuristics, 32 MiB
          best               as the benches choose (bench_blas.h), 32 MiB
   Loads: alone, waiting     L2 flushed, a call, the host waits for it
          alone, no gap      two seconds of calls, no flush, no wait
          20 ms pauses       the host sleeps before each flush and call
          ours in turn       in turn with this library's product of the same flops, L2 flushed, two
                             seconds; the last column is cuBLAS's time over ours

   A cell is the median of the second half of the calls: milliseconds, and the SM clock in MHz while
   the call ran. The clock is the cycles of each multiprocessor over the time, between two probes
   around the call. Ours is the grouped GEMM, experts of equal rows. bf16, beta 0, random data; NT:
   B as [n, k]. */
#include <unistd.h>

#include "bench_blas.h"

enum { WAITING, NO_GAP, PAUSES, IN_TURN, NUM_LOADS };
enum { DEFAULT, FIXED, FIRST, BEST, NUM_WAYS };

static const char* const load_name[] = {"alone, waiting", "alone, no gap", "20 ms pauses",
                                        "ours in turn"};
static const char* const way_name[] = {"GemmEx, default", "GemmEx, 32 MiB", "Lt, first", "best"};

enum { MOST_SMS = 256, MOST_CALLS = 1024 };

/* ---- SM clocks ---- */

typedef struct tick {
    uint64_t cycles, ns;
} tick;

typedef struct probe_args {
    tick* to; /* [MOST_SMS] */
} probe_args;

/* Runs more thread blocks than multiprocessors, so that each multiprocessor runs one. */
MOE_KERNEL(32, 1) probe_kernel(MOE_ARG(probe_args) a)
{
    unsigned sm;
    uint64_t ns;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    if (threadIdx.x == 0 && sm < MOST_SMS) {
        a.to[sm].cycles = (uint64_t)clock64();
        a.to[sm].ns = ns;
    }
}

static void probe(tick* to, cudaStream_t stream)
{
    probe_args a;
    moe_launch_config c = moe_grid(2 * MOST_SMS, 32, 0, stream);
    a.to = to;
    BENCH_MOE(MOE_LAUNCH(probe_kernel, c, a));
}

/* Returns the MHz between two probes, over the multiprocessors that both ran on; 0: none. */
static float clock_between(const tick* before, const tick* after)
{
    double cycles = 0.0, ns = 0.0;
    for (int i = 0; i < MOST_SMS; ++i)
        if (before[i].ns && after[i].ns > before[i].ns && after[i].cycles > before[i].cycles) {
            cycles += (double)(after[i].cycles - before[i].cycles);
            ns += (double)(after[i].ns - before[i].ns);
        }
    return ns > 0.0 ? (float)(cycles / ns * 1e3) : 0.0f;
}

/* ---- one cell ---- */

typedef struct cell {
    double ms, mhz, ours; /* ours: milliseconds of our product in the same rounds; 0: none */
} cell;

static double median(float* of, int count)
{
    qsort(of, (size_t)count, sizeof of[0], bench_compare_float);
    return of[count / 2];
}

/* Times `theirs`, or `ours` and `theirs` in turn, `rounds` times under one load. */
static cell measure(bench_state* s, bench_call ours, bench_call theirs, int load, int rounds)
{
    static float ms[2][MOST_CALLS], mhz[MOST_CALLS];
    static cudaEvent_t event[2][MOST_CALLS][2];
    const size_t ticks = (size_t)rounds * 2 * MOST_SMS;
    const int first = load == IN_TURN ? 0 : 1, half = rounds / 2;
    tick *device = (tick*)bench_alloc(ticks * sizeof(tick)),
         *host = (tick*)malloc(ticks * sizeof(tick));
    cell c;
    memset(&c, 0, sizeof c);
    BENCH_CUDA(cudaMemset(device, 0, ticks * sizeof(tick)));
    for (int i = first; i < 2; ++i)
        for (int r = 0; r < rounds; ++r)
            for (int j = 0; j < 2; ++j) BENCH_CUDA(cudaEventCreate(&event[i][r][j]));
    BENCH_CUDA(cudaDeviceSynchronize());
    for (int r = 0; r < rounds; ++r)
        for (int i = first; i < 2; ++i) {
            const bench_call* call = i ? &theirs : &ours;
            tick* to = device + (size_t)r * 2 * MOST_SMS;
            if (load == PAUSES) usleep(20000);
            if (load != NO_GAP)
                BENCH_CUDA(cudaMemsetAsync(s->flush, r & 255, s->flush_bytes, s->stream));
            if (i) probe(to, s->stream);
            BENCH_CUDA(cudaEventRecord(event[i][r][0], s->stream));
            call->fn(call->context, s->stream);
            BENCH_CUDA(cudaEventRecord(event[i][r][1], s->stream));
            if (i) probe(to + MOST_SMS, s->stream);
            if (load == WAITING || load == PAUSES) BENCH_CUDA(cudaStreamSynchronize(s->stream));
        }
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemcpy(host, device, ticks * sizeof(tick), cudaMemcpyDeviceToHost));
    for (int i = first; i < 2; ++i)
        for (int r = 0; r < rounds; ++r) {
            BENCH_CUDA(cudaEventElapsedTime(&ms[i][r], event[i][r][0], event[i][r][1]));
            for (int j = 0; j < 2; ++j) BENCH_CUDA(cudaEventDestroy(event[i][r][j]));
        }
    for (int r = 0; r < rounds; ++r) {
        const tick* before = host + (size_t)r * 2 * MOST_SMS;
        mhz[r] = clock_between(before, before + MOST_SMS);
    }
    c.ms = median(ms[1] + half, rounds - half);
    c.mhz = median(mhz + half, rounds - half);
    if (load == IN_TURN) c.ours = median(ms[0] + half, rounds - half);
    BENCH_CUDA(cudaFree(device));
    free(host);
    return c;
}

/* ---- products ---- */

/* The way with cuBLAS's own workspace: sets the stream before every call. */
static void run_default(void* context, cudaStream_t stream)
{
    const bench_gemm* g = (const bench_gemm*)context;
    BENCH_CUBLAS(cublasSetStream(g->blas->handle, stream));
    bench_run_gemm(context, stream);
}

static void run_ours(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_grouped_gemm((const moe_grouped_gemm_desc*)context, stream));
}

typedef struct shape {
    const char* name;
    int m, n, k, experts, b_transposed;
} shape;

/* Verifies the rows of the first, a middle and the last expert. */
static int verify_ours(bench_state* s, const shape* p, const bench_gemm* g,
                       moe_grouped_gemm_desc* d)
{
    const int64_t rows = p->m / p->experts;
    float worst = 0.0f;
    BENCH_CUDA(cudaMemset(d->c, 0xff, (size_t)p->m * (size_t)p->n * 2));
    run_ours(d, s->stream);
    for (int i = 0; i < 3; ++i) {
        const int64_t e = (int64_t)i * (p->experts - 1) / 2;
        bench_gemm part = *g;
        float one;
        part.m = (int)rows;
        part.a = (const char*)g->a + e * rows * p->k * 2;
        part.b = (const char*)d->b.base + e * p->n * p->k * 2;
        part.c = (char*)d->c + e * rows * p->n * 2;
        one = bench_check_gemm(s, &part);
        if (!(one <= worst)) worst = one;
    }
    printf("  ours: worst error %.2f of its bound\n", worst);
    return worst <= 1.0f;
}

static void print_row(bench_state* s, const shape* p, const char* name, const cell* cells)
{
    printf("  %-16s", name);
    for (int l = 0; l < NUM_LOADS; ++l) {
        printf(" %9.4f @ %4.0f", cells[l].ms, cells[l].mhz);
        if (s->csv)
            fprintf(s->csv, "\"%s; %s; %s\",%.6f,%.1f,MHz,%.4f,\"our time\"\n", p->name, name,
                    load_name[l], cells[l].ms, cells[l].mhz,
                    cells[l].ours > 0 ? cells[l].ms / cells[l].ours : 0.0);
    }
    printf(" %7.3f\n", cells[IN_TURN].ms / cells[IN_TURN].ours);
    fflush(stdout);
}

static void run_shape(bench_state* s, const shape* p, const bench_blas* fixed,
                      const bench_blas* own, int* failures)
{
    bench_gemm way[NUM_WAYS], candidate[BENCH_GEMM_MOST + 1];
    cell cells[NUM_WAYS][NUM_LOADS];
    int32_t offset[MOE_MAX_EXPERTS + 1];
    moe_grouped_gemm_desc d;
    bench_call ours = bench_one(run_ours, &d), both[2];
    int ways, has[NUM_WAYS] = {1, 1, 0, 1};
    printf("%s: %d x %d x %d N%c, ours over %d experts\n", p->name, p->m, p->n, p->k,
           p->b_transposed ? 'T' : 'N', p->experts);

    memset(&d, 0, sizeof d);
    for (int e = 0; e <= p->experts; ++e) offset[e] = p->m / p->experts * e;
    d.a = bench_random((int64_t)p->m * p->k, MOE_BF16, 1.0f, 21);
    d.b.base =
        bench_random((int64_t)p->experts * p->n * p->k, MOE_BF16, 1.0f / sqrtf((float)p->k), 22);
    d.b.major = p->b_transposed ? MOE_MAJOR_K : MOE_MAJOR_MN;
    d.c = bench_alloc((size_t)p->m * (size_t)p->n * 2);
    d.num_experts = p->experts, d.num_rows = p->m, d.n = p->n, d.k = p->k;
    d.expert_offset = (int32_t*)bench_alloc(sizeof offset);
    BENCH_CUDA(cudaMemcpy((void*)d.expert_offset, offset, sizeof offset, cudaMemcpyHostToDevice));

    way[BEST] = bench_gemm_bf16(fixed, p->m, p->n, p->k);
    way[BEST].b_transposed = p->b_transposed;
    way[BEST].a = d.a, way[BEST].b = d.b.base; /* of the first expert */
    way[BEST].c = bench_alloc((size_t)p->m * (size_t)p->n * 2);
    *failures += !verify_ours(s, p, &way[BEST], &d);
    way[DEFAULT] = way[FIXED] = way[FIRST] = way[BEST];
    way[DEFAULT].blas = own;
    ways = bench_gemm_candidates(&way[FIRST], candidate);
    if (ways > 1) way[FIRST] = candidate[1];
    has[FIRST] = ways > 1 && bench_gemm_holds(s, &way[FIRST]);
    bench_gemm_choose(s, &way[BEST]);
    for (int w = DEFAULT; w <= FIXED; ++w)
        if (!bench_gemm_holds(s, &way[w])) ++*failures, has[w] = 0;

    both[0] = ours, both[1] = bench_one(bench_run_gemm, &way[BEST]);
    bench_alternate(s, both, 2);
    printf("  %-16s", "ms @ SM MHz");
    for (int l = 0; l < NUM_LOADS; ++l) printf(" %16s", load_name[l]);
    printf(" %7s\n", "of ours");
    for (int w = 0; w < NUM_WAYS; ++w) {
        const bench_call theirs = bench_one(w == DEFAULT ? run_default : bench_run_gemm, &way[w]);
        if (!has[w]) continue;
        for (int l = 0; l < NUM_LOADS; ++l) {
            const double each = both[1].ms + (l == IN_TURN ? both[0].ms : 0.0);
            const int rounds = l == WAITING || l == PAUSES ? 60 : (int)(2000.0 / each) + 1;
            cells[w][l] = measure(s, ours, theirs, l, rounds < MOST_CALLS ? rounds : MOST_CALLS);
        }
        print_row(s, p, way_name[w], cells[w]);
    }
    bench_row(s, "bench_alternate: ours", both[0].ms,
              2.0 * p->m * p->n * (double)p->k / both[0].ms * 1e-9, "TFLOPS",
              both[1].ms / both[0].ms, "cuBLAS dense");
    if (has[DEFAULT] && has[FIXED])
        printf("  workspace: default takes %.3f of the time with 32 MiB\n",
               cells[DEFAULT][NO_GAP].ms / cells[FIXED][NO_GAP].ms);
    if (has[FIXED])
        printf("  algorithm: GemmEx takes %.3f of the best way's time\n",
               cells[FIXED][NO_GAP].ms / cells[BEST][NO_GAP].ms);
    printf("  load: no gap takes %.3f of the time with pauses; in cycles %.3f\n",
           cells[BEST][NO_GAP].ms / cells[BEST][PAUSES].ms,
           cells[BEST][NO_GAP].ms * cells[BEST][NO_GAP].mhz /
               (cells[BEST][PAUSES].ms * cells[BEST][PAUSES].mhz));
    bench_note_clocks(s, bench_run_gemm, &way[BEST], both[1].ms);

    bench_gemm_free(&candidate[0]);
    bench_gemm_free(&way[BEST]);
    cudaFree((void*)d.a), cudaFree((void*)d.b.base), cudaFree(d.c), cudaFree(way[BEST].c);
    cudaFree((void*)d.expert_offset);
}

int main(int argc, char** argv)
{
    static const shape shapes[] = {
        {"8192^3, weights as [n, k]", 8192, 8192, 8192, 1, 1},
        {"8192^3, plain", 8192, 8192, 8192, 1, 0},
        {"up of 32768, 4096, 1536, 128, 8", 262144, 3072, 4096, 128, 1},
        {"down of 32768, 4096, 1536, 128, 8", 262144, 4096, 1536, 128, 1},
    };
    bench_state s = bench_open(argc, argv, "cuBLAS dense under several loads, bf16");
    bench_blas fixed = bench_blas_open(&s, (size_t)32 << 20), own = fixed;
    int failures = 0, version = 0;
    BENCH_CUBLAS(cublasCreate(&own.handle)); /* without a workspace of ours */
    BENCH_CUBLAS(cublasSetStream(own.handle, s.stream));
    BENCH_CUBLAS(cublasGetVersion(own.handle, &version));
    printf("cuBLAS %d, cublasLt %d\n", version, (int)cublasLtGetVersion());
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; ++i)
        run_shape(&s, &shapes[i], &fixed, &own, &failures);
    BENCH_CUBLAS(cublasDestroy(own.handle));
    bench_blas_close(&fixed);
    return bench_close(&s, failures);
}
