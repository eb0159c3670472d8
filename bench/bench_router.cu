/* The router's product, bf16 and fp32 weights, beside cuBLAS in bf16, TF32 and fp32.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_router.cu -lcublas -o bench_router

   Floor: x and router read once, logits written once, at the rate of a device-to-device copy. An
   fp32 router is three bf16 products on tensor cores: cuBLAS's bf16 time three times is the other
   floor. The split product is also timed with either tile, whichever the plan chooses.
   Few tokens: a captured graph of 24 calls over as many copies of all operands. */
#include <cublas_v2.h>

#include "bench.h"

#define BENCH_CUBLAS(call)                                                                        \
    do {                                                                                          \
        if ((call) != CUBLAS_STATUS_SUCCESS) {                                                    \
            fprintf(stderr, "%s:%d: %s failed\n", __FILE__, __LINE__, #call);                     \
            exit(1);                                                                              \
        }                                                                                         \
    } while (0)

#define MOST_COPIES 24

enum { PLANNED, LARGE_TILE, SMALL_TILE };

typedef struct job {
    moe_router_desc d;
    int tile; /* as above */
    cublasHandle_t handle;
    cublasComputeType_t compute;
} job;

static void run_router(void* context, cudaStream_t stream)
{
    const job* j = (const job*)context;
    if (j->tile == PLANNED) {
        BENCH_MOE(moe_router_logits(&j->d, stream));
    } else {
        moe_router_desc d = j->d;
        moe_grouped_gemm_desc g;
        moei_split_args a;
        int path;
        BENCH_MOE(moei_router_check(&d, &g, &path));
        a = moei_router_split_args(&d);
        BENCH_MOE(moei_split_launch(&a, j->tile == SMALL_TILE, stream));
    }
}

/* logits [T, E] = x [T, H] router [E, H]^T, fp32 out. */
static void run_cublas(void* context, cudaStream_t stream)
{
    const job* j = (const job*)context;
    const float one = 1.0f, zero = 0.0f;
    const int T = j->d.num_tokens, H = j->d.hidden, E = j->d.num_experts;
    const cudaDataType_t type = j->d.x_dtype == MOE_FP32 ? CUDA_R_32F : CUDA_R_16BF;
    BENCH_CUBLAS(cublasSetStream(j->handle, stream));
    BENCH_CUBLAS(cublasGemmEx(j->handle, CUBLAS_OP_T, CUBLAS_OP_N, E, T, H, &one, j->d.router, type,
                              H, j->d.x, type, H, &zero, j->d.logits, CUDA_R_32F, E, j->compute,
                              CUBLAS_GEMM_DEFAULT));
}

/* Logits of tokens 0, step, 2 step, ... against double sums of the operands as they are, over the
   house bound of fp32 sums. */
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
            const double v = (double)moei_load_f32(a.d.x, t * H + h, a.d.x_dtype) *
                             moei_load_f32(a.d.router, e * H + h, a.d.router_dtype);
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
    moei_launch_config l = moei_grid(67, 256, 0, s->stream);
    a.d = *d;
    a.step = d->num_tokens / 67 + 1;
    a.worst = (unsigned*)bench_alloc(4);
    BENCH_CUDA(cudaMemset(a.worst, 0, 4));
    BENCH_MOE(MOE_LAUNCH(check_logits, l, a));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemcpy(&worst, a.worst, 4, cudaMemcpyDeviceToHost));
    cudaFree(a.worst);
    return moe_f32_from_bits(worst);
}

/* What is timed: dtypes of x and router; ours, or cuBLAS. */
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

static double run_way(bench_state* s, const way* w, int T, int H, int E, cublasHandle_t handle,
                      int* failures)
{
    const int copies = T <= 1024 ? MOST_COPIES : 1;
    const double bytes = (double)T * H * moe_dtype_bytes(w->x_dtype) +
                         (double)E * H * moe_dtype_bytes(w->router_dtype) + (double)T * E * 4;
    const bench_fn run = w->cublas ? run_cublas : run_router;
    job jobs[MOST_COPIES];
    void* context[MOST_COPIES];
    char what[128];
    float worst;
    double ms;
    int path = 0;
    for (int i = 0; i < copies; ++i) {
        job* j = &jobs[i];
        memset(j, 0, sizeof *j);
        j->d.x = bench_random((int64_t)T * H, w->x_dtype, 1.0f, (uint32_t)(2 * i + 1));
        j->d.router = bench_random((int64_t)E * H, w->router_dtype, 0.02f, (uint32_t)(2 * i + 2));
        j->d.logits = (float*)bench_alloc((size_t)T * (size_t)E * 4);
        j->d.x_dtype = w->x_dtype, j->d.router_dtype = w->router_dtype;
        j->d.num_tokens = T, j->d.hidden = H, j->d.num_experts = E;
        j->tile = w->tile;
        j->handle = handle;
        j->compute = w->compute;
        context[i] = j;
    }
    BENCH_CUDA(cudaMemset(jobs[0].d.logits, 0xff, (size_t)T * (size_t)E * 4));
    run(&jobs[0], s->stream);
    worst = check(s, &jobs[0].d);
    if (!w->cublas) {
        BENCH_MOE(moe_router_plan(&jobs[0].d, &path));
        *failures += !(worst <= 1.0f);
    }
    ms = copies > 1 ? bench_time_graph(s, run, context, copies) : bench_time(s, run, &jobs[0]);
    snprintf(what, sizeof what, "%s%s%s, error %.2f of bound", w->name,
             w->cublas || w->tile != PLANNED ? "" : ": ",
             w->cublas || w->tile != PLANNED ? "" : moe_router_path_name(path), worst);
    bench_row(s, what, ms, 2.0 * T * H * E / ms * 1e-9, "TFLOPS", bytes / s->copy_rate * 1e3 / ms,
              "floor, bytes at copy rate");
    for (int i = 0; i < copies; ++i) {
        cudaFree((void*)jobs[i].d.x), cudaFree((void*)jobs[i].d.router);
        cudaFree(jobs[i].d.logits);
    }
    return ms;
}

static void run_shape(bench_state* s, int T, int H, int E, cublasHandle_t handle, int* failures)
{
    double ms[sizeof ways / sizeof *ways];
    printf("T %d H %d E %d\n", T, H, E);
    if (s->csv) fprintf(s->csv, "\"T %d H %d E %d\"\n", T, H, E);
    for (size_t i = 0; i < sizeof ways / sizeof *ways; ++i)
        ms[i] = run_way(s, &ways[i], T, H, E, handle, failures);
    printf("  bf16 x fp32 takes %.2f times cuBLAS's bf16, %.2f of its TF32, %.3f of its fp32\n",
           ms[1] / ms[5], ms[1] / ms[6], ms[1] / ms[7]);
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, MOE_ROUTER_SPLIT_TERMS == 2
                                               ? "router, fp32 weights as two terms"
                                               : "router, fp32 weights as three terms");
    cublasHandle_t handle;
    int failures = 0;
    BENCH_CUBLAS(cublasCreate(&handle));
    run_shape(&s, 32768, 4096, 128, handle, &failures);
    run_shape(&s, 8192, 7168, 256, handle, &failures);
    run_shape(&s, 1024, 7168, 256, handle, &failures);
    run_shape(&s, 64, 7168, 256, handle, &failures);
    run_shape(&s, 32768, 2048, 60, handle, &failures); /* E no multiple of 8 */
    BENCH_CUBLAS(cublasDestroy(handle));
    return bench_close(&s, failures);
}
