/* Expert MLP through the grouped GEMM, each product beside cuBLAS dense of the same FLOPs.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_experts.cu -lcublas -o bench_experts

   Floor: 2 rows n k flops at cuBLAS's rate for one dense product of that shape; for few tokens,
   the bytes of the weights at the copy rate. */
#include <cublas_v2.h>

#include "bench.h"

#define BENCH_CUBLAS(call)                                                                        \
    do {                                                                                          \
        if ((call) != CUBLAS_STATUS_SUCCESS) {                                                    \
            fprintf(stderr, "%s:%d: %s failed\n", __FILE__, __LINE__, #call);                     \
            exit(1);                                                                              \
        }                                                                                         \
    } while (0)

static void run_up(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_experts_up((const moe_experts_desc*)context, stream));
}

static void run_down(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_experts_down((const moe_experts_desc*)context, stream));
}

typedef struct dense_job {
    cublasHandle_t handle;
    const void *a, *b;
    void* c;
    int m, n, k;
} dense_job;

/* C [m, n] = A [m, k] B [n, k]^T, bf16 with fp32 accumulation. */
static void run_dense(void* context, cudaStream_t stream)
{
    const dense_job* j = (const dense_job*)context;
    const float one = 1.0f, zero = 0.0f;
    BENCH_CUBLAS(cublasSetStream(j->handle, stream));
    BENCH_CUBLAS(cublasGemmEx(j->handle, CUBLAS_OP_T, CUBLAS_OP_N, j->n, j->m, j->k, &one, j->b,
                              CUDA_R_16BF, j->k, j->a, CUDA_R_16BF, j->k, &zero, j->c, CUDA_R_16BF,
                              j->n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

static double time_dense(bench_state* s, int m, int n, int k)
{
    dense_job j;
    double ms;
    BENCH_CUBLAS(cublasCreate(&j.handle));
    j.m = m, j.n = n, j.k = k;
    j.a = bench_random((int64_t)m * k, MOE_BF16, 1.0f, 21);
    j.b = bench_random((int64_t)n * k, MOE_BF16, 0.02f, 22);
    j.c = bench_alloc((size_t)m * (size_t)n * 2);
    ms = bench_time(s, run_dense, &j);
    bench_note_clocks(s, run_dense, &j, ms);
    cudaFree((void*)j.a), cudaFree((void*)j.b), cudaFree(j.c);
    BENCH_CUBLAS(cublasDestroy(j.handle));
    return ms;
}

/* Rows 0, step, ... of both products against double sums, over the bound that rounding allows. */
typedef struct check_args {
    moe_experts_desc d;
    int step;
    unsigned* worst;
} check_args;

MOE_DEVICE double activation(const moe_experts_desc* d, double gate, double up)
{
    if (d->activation == MOE_ACTIVATION_GEGLU) return 0.5 * gate * erfc(-gate * sqrt(0.5)) * up;
    if (d->activation == MOE_ACTIVATION_SWIGLU_CLAMPED) {
        const double g = gate > 7.0 ? 7.0 : gate, u = up > 7.0 ? 7.0 : up < -7.0 ? -7.0 : up;
        return g / (1.0 + exp(-1.702 * g)) * (u + 1.0);
    }
    return gate / (1.0 + exp(-gate)) * up;
}

MOE_DEVICE void check_one(unsigned* worst, float got, double want)
{
    const float ratio = (float)(fabs(got - want) / (2.0 * fabs(want) / 256.0 + 1e-4));
    atomicMax(worst, ratio <= 1e30f ? __float_as_uint(ratio) : 0x7f800000u);
}

MOE_KERNEL(256, 1) check_experts(MOE_ARG(check_args) a)
{
    const moe_experts_desc* d = &a.d;
    const int64_t r = (int64_t)blockIdx.x * a.step, H = d->hidden, I = d->intermediate;
    int e = 0;
    int64_t t;
    if (r >= d->expert_offset[d->num_experts]) return;
    while (d->expert_offset[e + 1] <= r) ++e;
    t = d->row_slot[r] / d->top_k;
    for (int64_t i = threadIdx.x; i < I; i += 256) {
        double gate = 0.0, up = 0.0;
        for (int64_t h = 0; h < H; ++h) {
            const double x = moei_load_f32(d->x, t * H + h, MOE_BF16);
            gate += x * moei_load_f32(d->w1.base, (e * 2 * I + i) * H + h, MOE_BF16);
            up += x * moei_load_f32(d->w1.base, (e * 2 * I + I + i) * H + h, MOE_BF16);
        }
        check_one(a.worst, moei_load_f32(d->act, r * I + i, MOE_BF16), activation(d, gate, up));
    }
    for (int64_t h = threadIdx.x; h < H; h += 256) {
        double sum = 0.0;
        for (int64_t i = 0; i < I; ++i)
            sum += (double)moei_load_f32(d->act, r * I + i, MOE_BF16) *
                   moei_load_f32(d->w2.base, (e * H + h) * I + i, MOE_BF16);
        check_one(a.worst, moei_load_f32(d->rows, r * H + h, MOE_BF16), sum);
    }
}

static void run_shape(bench_state* s, int T, int H, int I, int E, int K, int tile, int kind,
                      int* failures)
{
    const int64_t rows = (int64_t)T * K;
    const double flops = 2.0 * (double)rows * H * I, touched = E < rows ? E : (double)rows;
    moe_experts_desc d;
    moe_gate_desc g;
    moe_route_desc r;
    moe_gemm_plan up, down;
    double ms_up, ms_down, dense_up, dense_down;
    unsigned worst = 0;
    char what[112];
    const char* name = kind == MOE_ACTIVATION_GEGLU            ? " GEGLU"
                       : kind == MOE_ACTIVATION_SWIGLU_CLAMPED ? " SwiGLU clamped"
                                                               : "";
    check_args check;
    moei_launch_config l;
    memset(&d, 0, sizeof d), memset(&g, 0, sizeof g), memset(&r, 0, sizeof r);

    g.logits = bench_random((int64_t)T * E, MOE_FP32, 1.0f, 9);
    g.ids = (int32_t*)bench_alloc((size_t)rows * 4);
    g.weights = (float*)bench_alloc((size_t)rows * 4);
    g.num_tokens = T, g.num_experts = E, g.top_k = K;
    r.ids = g.ids;
    r.expert_count = (int32_t*)bench_alloc((size_t)E * 4);
    r.expert_offset = (int32_t*)bench_alloc((size_t)E * 4 + 4);
    r.row_slot = (int32_t*)bench_alloc((size_t)rows * 4);
    r.num_tokens = T, r.num_experts = E, r.top_k = K;
    BENCH_MOE(moe_route_workspace(&r, &r.workspace_bytes));
    r.workspace = bench_alloc(r.workspace_bytes);
    BENCH_MOE(moe_gate(&g, s->stream));
    BENCH_MOE(moe_route(&r, s->stream));

    d.x = bench_random((int64_t)T * H, MOE_BF16, 1.0f, 1);
    d.w1.base = bench_random((int64_t)E * 2 * I * H, MOE_BF16, 1.0f / sqrtf((float)H), 2);
    d.w2.base = bench_random((int64_t)E * H * I, MOE_BF16, 1.0f / sqrtf((float)I), 3);
    d.expert_offset = r.expert_offset;
    d.row_slot = r.row_slot;
    d.act = bench_alloc((size_t)rows * (size_t)I * 2);
    d.rows = bench_alloc((size_t)rows * (size_t)H * 2);
    d.num_tokens = T, d.hidden = H, d.intermediate = I, d.num_experts = E, d.top_k = K;
    d.tile = tile;
    d.activation = kind;
    BENCH_MOE(moe_experts_plan(&d, &up, &down));
    BENCH_CUDA(cudaMemset(d.act, 0xff, (size_t)rows * (size_t)I * 2));
    BENCH_CUDA(cudaMemset(d.rows, 0xff, (size_t)rows * (size_t)H * 2));
    BENCH_MOE(moe_experts(&d, s->stream));
    check.d = d;
    check.step = (int)(rows / 67 + 1);
    check.worst = (unsigned*)bench_alloc(4);
    BENCH_CUDA(cudaMemset(check.worst, 0, 4));
    l = moei_grid(67, 256, 0, s->stream);
    BENCH_MOE(MOE_LAUNCH(check_experts, l, check));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemcpy(&worst, check.worst, 4, cudaMemcpyDeviceToHost));
    *failures += !(moe_f32_from_bits(worst) <= 1.0f);
    printf("T %d H %d I %d E %d K %d%s: worst error %.2f of its bound; path %s, tiles %dx%dx%d, %dx%dx%d\n",
           T, H, I, E, K, name, moe_f32_from_bits(worst), moe_gemm_path_name(up.path), up.tile_m, up.tile_n,
           up.tile_k, down.tile_m, down.tile_n, down.tile_k);

    ms_up = bench_time(s, run_up, &d);
    bench_note_clocks(s, run_up, &d, ms_up);
    ms_down = bench_time(s, run_down, &d);
    cudaFree((void*)d.w1.base), cudaFree((void*)d.w2.base);
    snprintf(what, sizeof what, "up   T %d H %d I %d E %d K %d%s", T, H, I, E, K, name);
    if (rows / E >= 64) {
        dense_up = time_dense(s, (int)rows, 2 * I, H);
        dense_down = time_dense(s, (int)rows, H, I);
        bench_row(s, what, ms_up, 2 * flops / ms_up * 1e-9, "TFLOPS", dense_up / ms_up, "cuBLAS dense");
        snprintf(what, sizeof what, "down T %d H %d I %d E %d K %d", T, H, I, E, K);
        bench_row(s, what, ms_down, flops / ms_down * 1e-9, "TFLOPS", dense_down / ms_down,
                  "cuBLAS dense");
        bench_row(s, "both", ms_up + ms_down, 3 * flops / (ms_up + ms_down) * 1e-9, "TFLOPS",
                  (dense_up + dense_down) / (ms_up + ms_down), "cuBLAS dense");
        bench_row(s, "cuBLAS dense, both", dense_up + dense_down,
                  3 * flops / (dense_up + dense_down) * 1e-9, "TFLOPS", 1.0, "cuBLAS dense");
    } else {
        const double b_up = touched * 2 * I * H * 2, b_down = touched * H * I * 2;
        bench_row(s, what, ms_up, b_up / ms_up * 1e-9, "TB/s", b_up / s->copy_rate * 1e3 / ms_up,
                  "weights at copy rate");
        snprintf(what, sizeof what, "down T %d H %d I %d E %d K %d", T, H, I, E, K);
        bench_row(s, what, ms_down, b_down / ms_down * 1e-9, "TB/s",
                  b_down / s->copy_rate * 1e3 / ms_down, "weights at copy rate");
    }
    cudaFree((void*)g.logits), cudaFree(g.ids), cudaFree(g.weights), cudaFree(r.expert_count);
    cudaFree(r.expert_offset), cudaFree(r.row_slot), cudaFree(r.workspace), cudaFree((void*)d.x);
    cudaFree(d.act), cudaFree(d.rows), cudaFree(check.worst);
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, "expert MLP, bf16, SwiGLU where nothing else is said");
    int failures = 0;
    run_shape(&s, 32768, 4096, 1536, 128, 8, MOE_TILE_AUTO, 0, &failures);
    run_shape(&s, 32768, 4096, 1536, 128, 8, MOE_TILE_AUTO, MOE_ACTIVATION_GEGLU, &failures);
    run_shape(&s, 32768, 4096, 1536, 128, 8, MOE_TILE_AUTO, MOE_ACTIVATION_SWIGLU_CLAMPED, &failures);
    run_shape(&s, 24576, 1536, 256, 128, 8, MOE_TILE_AUTO, 0, &failures);
    run_shape(&s, 16384, 4096, 14336, 8, 2, MOE_TILE_AUTO, 0, &failures);
    run_shape(&s, 8192, 7168, 2048, 256, 8, MOE_TILE_AUTO, 0, &failures);
    run_shape(&s, 64, 7168, 2048, 256, 8, MOE_TILE_AUTO, 0, &failures);
    run_shape(&s, 256, 4096, 1536, 128, 8, MOE_TILE_AUTO, 0, &failures);
    return bench_close(&s, failures);
}
