/* The router's product, bf16 and fp32 weights, compared with cuBLAS in bf16, TF32 and fp32.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_router.cu -lcublas -lcublasLt -o bench_router

   Floor: x and router read once, logits written once, at the rate of a device-to-device copy. An
   fp32 router is three bf16 products on tensor cores, so three times cuBLAS's bf16 time is a second
   floor. The bf16 split is also timed with either tile, whichever the plan chooses. All ways of a
   shape are timed in turn. Few tokens: a captured graph of 24 calls over as many copies of all
   operands. */
#include "bench_blas.h"

#define MOST_COPIES 24

enum { PLANNED, LARGE_TILE, SMALL_TILE };

typedef struct job {
    moe_router_desc d;
    int tile; /* PLANNED, LARGE_TILE or SMALL_TILE */
    bench_gemm dense; /* cuBLAS's product of the same operands */
} job;

static void run_router(void* context, cudaStream_t stream)
{
    const job* j = (const job*)context;
    if (j->tile == PLANNED) {
        BENCH_MOE(moe_router_logits(&j->d, stream));
    } else {
        moe_router_prepared p;
        BENCH_MOE(moe_router_prepare(&j->d, &p));
        if (p.path != MOE_ROUTER_BF16_SPLIT_LARGE && p.path != MOE_ROUTER_BF16_SPLIT_SMALL) exit(1);
        BENCH_MOE(moei_bf16_split_prepare(&p.gemm.launch, &p.args, j->tile == SMALL_TILE));
        BENCH_MOE(MOE_RUN(&p.gemm.launch, p.args, stream));
    }
}

static void run_dense(void* context, cudaStream_t stream)
{
    bench_run_gemm(&((job*)context)->dense, stream);
}

/* Compares logits of tokens 0, step, 2 step, ... with sums in double of the unrounded operands,
   over the bound of fp32 sums. */
typedef struct check_args {
    moe_router_desc d;
    int step;
    unsigned* worst;
} check_args;

MOE_KERNEL(256, 1) check_logits(MOE_ARG(check_args) a)
{
    const int64_t t = (int64_t)blockIdx.x * a.step, H = a.d.hidden;
    if (t >= a.d.num_tokens) return;
    for (int64_t e = threadIdx.x; e < a.d.num_experts; e += 256) {
        double want = 0.0, sum = 0.0;
        float ratio;
        for (int64_t h = 0; h < H; ++h) {
            const double v = (double)moe_load_f32(a.d.x, t * H + h, a.d.x_dtype) *
                             moe_load_f32(a.d.router, e * H + h, a.d.router_dtype);
            want += v;
            sum += fabs(v);
        }
        ratio = (float)(fabs(a.d.logits[t * a.d.num_experts + e] - want) /
                        (((double)H / 16 + 2) * sum / 8388608.0));
        atomicMax(a.worst, ratio <= 1e30f ? __float_as_uint(ratio) : 0x7f800000u);
    }
}

static float check(bench_state* s, const moe_router_desc* d)
{
    check_args a;
    unsigned worst = 0;
    moe_launch_config l = moe_grid(67, 256, 0, s->stream);
    a.d = *d;
    a.step = d->num_tokens / 67 + 1;
    BENCH_WORST(check_logits, l, a, worst);
    return moe_f32_from_bits(worst);
}

/* One way that is timed: dtypes of x and router; ours, or cuBLAS. */
typedef struct way {
    const char* name;
    int x_dtype, router_dtype, tile, cublas;
    cublasComputeType_t compute;
} way;

static const way ways[] = {
    {"bf16 x bf16", MOE_BF16, MOE_BF16, PLANNED, 0, CUBLAS_COMPUTE_32F},
    {"bf16 x fp32", MOE_BF16, MOE_FP32, PLANNED, 0, CUBLAS_COMPUTE_32F},
    {"bf16 x fp32, large tile", MOE_BF16, MOE_FP32, LARGE_TILE, 0, CUBLAS_COMPUTE_32F},
    {"bf16 x fp32, small tile", MOE_BF16, MOE_FP32, SMALL_TILE, 0, CUBLAS_COMPUTE_32F},
    {"fp16 x fp32", MOE_FP16, MOE_FP32, PLANNED, 0, CUBLAS_COMPUTE_32F},
    {"cuBLAS, bf16 x bf16", MOE_BF16, MOE_BF16, PLANNED, 1, CUBLAS_COMPUTE_32F},
    {"cuBLAS, TF32", MOE_FP32, MOE_FP32, PLANNED, 1, CUBLAS_COMPUTE_32F_FAST_TF32},
    {"cuBLAS, fp32", MOE_FP32, MOE_FP32, PLANNED, 1, CUBLAS_COMPUTE_32F},
};
enum { NUM_WAYS = sizeof ways / sizeof ways[0] };

/* One way at one shape: verified, and captured where tokens are few. */
typedef struct trial {
    job jobs[MOST_COPIES];
    int copies;
    char what[128];
} trial;

static bench_call prepare(bench_state* s, const bench_blas* blas, const way* w, int T, int H, int E,
                          trial* t, int* failures)
{
    const bench_fn run = w->cublas ? run_dense : run_router;
    void* context[MOST_COPIES];
    int path = 0;
    memset(t, 0, sizeof *t);
    t->copies = T <= 1024 ? MOST_COPIES : 1;
    for (int i = 0; i < t->copies; ++i) {
        job* j = &t->jobs[i];
        j->d.x = bench_random((int64_t)T * H, w->x_dtype, 1.0f, (uint32_t)(2 * i + 1));
        j->d.router = bench_random((int64_t)E * H, w->router_dtype, 0.02f, (uint32_t)(2 * i + 2));
        j->d.logits = (float*)bench_alloc((size_t)T * (size_t)E * 4);
        j->d.x_dtype = w->x_dtype, j->d.router_dtype = w->router_dtype;
        j->d.num_tokens = T, j->d.hidden = H, j->d.num_experts = E;
        j->tile = w->tile;
        if (w->cublas) { /* logits [T, E] = x [T, H] router [E, H]^T in fp32; one choice for all
                            copies */
            j->dense = i ? t->jobs[0].dense : bench_gemm_bf16(blas, T, E, H);
            j->dense.in = w->x_dtype, j->dense.out = MOE_FP32;
            j->dense.compute = w->compute;
            j->dense.a = j->d.x, j->dense.b = j->d.router, j->dense.c = j->d.logits;
            if (i == 0) bench_gemm_choose(s, &j->dense);
        }
        context[i] = j;
    }
    if (w->cublas) {
        snprintf(t->what, sizeof t->what, "%s", w->name);
    } else {
        float worst;
        BENCH_CUDA(cudaMemset(t->jobs[0].d.logits, 0xff, (size_t)T * (size_t)E * 4));
        run(&t->jobs[0], s->stream);
        worst = check(s, &t->jobs[0].d);
        *failures += !(worst <= 1.0f);
        BENCH_MOE(moe_router_plan(&t->jobs[0].d, &path));
        snprintf(t->what, sizeof t->what, "%s%s%s, error %.2f of bound", w->name,
                 w->tile != PLANNED ? "" : ": ",
                 w->tile != PLANNED ? "" : moe_router_path_name(path), worst);
    }
    return t->copies > 1 ? bench_graph(s, run, context, t->copies) : bench_one(run, &t->jobs[0]);
}

static void release(bench_call* call, trial* t)
{
    if (t->copies > 1) bench_free_graph(call);
    bench_gemm_free(&t->jobs[0].dense);
    for (int i = 0; i < t->copies; ++i) {
        cudaFree((void*)t->jobs[i].d.x), cudaFree((void*)t->jobs[i].d.router);
        cudaFree(t->jobs[i].d.logits);
    }
}

static void run_shape(bench_state* s, const bench_blas* blas, int T, int H, int E, int* failures)
{
    static trial trials[NUM_WAYS];
    bench_call call[NUM_WAYS];
    printf("T %d H %d E %d\n", T, H, E);
    if (s->csv) fprintf(s->csv, "\"T %d H %d E %d\"\n", T, H, E);
    for (int i = 0; i < NUM_WAYS; ++i)
        call[i] = prepare(s, blas, &ways[i], T, H, E, &trials[i], failures);
    bench_alternate(s, call, NUM_WAYS);
    for (int i = 0; i < NUM_WAYS; ++i) {
        const double bytes = (double)T * H * moe_dtype_bytes(ways[i].x_dtype) +
                             (double)E * H * moe_dtype_bytes(ways[i].router_dtype) +
                             (double)T * E * 4;
        bench_row(s, trials[i].what, call[i].ms, 2.0 * T * H * E / call[i].ms * 1e-9, "TFLOPS",
                  bytes / s->copy_rate * 1e3 / call[i].ms, "floor, bytes at copy rate");
    }
    printf("  bf16 x fp32 takes %.2f times cuBLAS's bf16, %.2f of its TF32, %.3f of its fp32\n",
           call[1].ms / call[5].ms, call[1].ms / call[6].ms, call[1].ms / call[7].ms);
    for (int i = 0; i < NUM_WAYS; ++i) release(&call[i], &trials[i]);
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv,
                               MOE_ROUTER_BF16_TERMS == 2 ? "router, fp32 weights as two terms"
                                                          : "router, fp32 weights as three terms");
    bench_blas blas = bench_blas_open(&s, 0);
    int failures = 0;
    run_shape(&s, &blas, 32768, 4096, 128, &failures);
    run_shape(&s, &blas, 8192, 7168, 256, &failures);
    run_shape(&s, &blas, 1024, 7168, 256, &failures);
    run_shape(&s, &blas, 64, 7168, 256, &failures);
    run_shape(&s, &blas, 32768, 2048, 60, &failures); /* E is no multiple of 8 */
    bench_blas_close(&blas);
    return bench_close(&s, failures);
}
