/* The experts' MLP through the grouped GEMM, each product compared with cuBLAS dense of the same
   flops.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_experts.cu -lcublas -lcublasLt -o bench_experts

   Floor: 2 rows n k flops at cuBLAS's rate for one dense product of that shape, the four products
   in turn; for few tokens, the bytes of the weights at the copy rate. */
#include "bench_blas.h"

static void run_up(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_experts_up((const moe_experts_desc*)context, stream));
}

static void run_down(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_experts_down((const moe_experts_desc*)context, stream));
}

/* Compares rows 0, step, ... of both products with sums in double, over the bound of rounding. */
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
            const double x = moe_load_f32(d->x, t * H + h, MOE_BF16);
            gate += x * moe_load_f32(d->w1.base, (e * 2 * I + i) * H + h, MOE_BF16);
            up += x * moe_load_f32(d->w1.base, (e * 2 * I + I + i) * H + h, MOE_BF16);
        }
        check_one(a.worst, moe_load_f32(d->act, r * I + i, MOE_BF16), activation(d, gate, up));
    }
    for (int64_t h = threadIdx.x; h < H; h += 256) {
        double sum = 0.0;
        for (int64_t i = 0; i < I; ++i)
            sum += (double)moe_load_f32(d->act, r * I + i, MOE_BF16) *
                   moe_load_f32(d->w2.base, (e * H + h) * I + i, MOE_BF16);
        check_one(a.worst, moe_load_f32(d->rows, r * H + h, MOE_BF16), sum);
    }
}

static void run_shape(bench_state* s, const bench_blas* blas, int T, int H, int I, int E, int K,
                      int kind, int* failures)
{
    const int64_t rows = (int64_t)T * K;
    const double flops = 2.0 * (double)rows * H * I, touched = E < rows ? E : (double)rows;
    moe_experts_desc d;
    moe_gate_desc g;
    moe_route_desc r;
    moe_gemm_plan up, down;
    bench_call call[4]; /* up, down, cuBLAS's two */
    unsigned worst = 0;
    char what[112];
    const char* name = kind == MOE_ACTIVATION_GEGLU            ? " GEGLU"
                       : kind == MOE_ACTIVATION_SWIGLU_CLAMPED ? " SwiGLU clamped"
                                                               : "";
    check_args check;
    moe_launch_config l;
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
    d.activation = kind;
    d.workspace_bytes = MOE_EXPERTS_WORKSPACE;
    d.workspace = bench_alloc(d.workspace_bytes);
    BENCH_MOE(moe_experts_plan(&d, &up, &down));
    BENCH_CUDA(cudaMemset(d.act, 0xff, (size_t)rows * (size_t)I * 2));
    BENCH_CUDA(cudaMemset(d.rows, 0xff, (size_t)rows * (size_t)H * 2));
    BENCH_MOE(moe_experts(&d, s->stream));
    check.d = d;
    check.step = (int)(rows / 67 + 1);
    l = moe_grid(67, 256, 0, s->stream);
    BENCH_WORST(check_experts, l, check, worst);
    *failures += !(moe_f32_from_bits(worst) <= 1.0f);
    printf("T %d H %d I %d E %d K %d%s: worst error %.2f of its bound; path %s, tiles %dx%dx%d, %dx%dx%d\n",
           T, H, I, E, K, name, moe_f32_from_bits(worst), moe_gemm_path_name(up.path), up.tile_m, up.tile_n,
           up.tile_k, down.tile_m, down.tile_n, down.tile_k);

    call[0] = bench_one(run_up, &d);
    call[1] = bench_one(run_down, &d);
    if (rows / E >= 64) {
        bench_gemm dense_up = bench_gemm_random(s, blas, (int)rows, 2 * I, H);
        bench_gemm dense_down = bench_gemm_random(s, blas, (int)rows, H, I);
        double both, dense;
        call[2] = bench_one(bench_run_gemm, &dense_up);
        call[3] = bench_one(bench_run_gemm, &dense_down);
        bench_alternate(s, call, 4);
        bench_note_clocks(s, run_up, &d, call[0].ms);
        bench_note_clocks(s, bench_run_gemm, &dense_up, call[2].ms);
        bench_gemm_free_random(&dense_up), bench_gemm_free_random(&dense_down);
        both = call[0].ms + call[1].ms, dense = call[2].ms + call[3].ms;
        snprintf(what, sizeof what, "up   T %d H %d I %d E %d K %d%s", T, H, I, E, K, name);
        bench_row_dense(s, what, call[0].ms, 2 * flops, call[2].ms);
        snprintf(what, sizeof what, "down T %d H %d I %d E %d K %d", T, H, I, E, K);
        bench_row_dense(s, what, call[1].ms, flops, call[3].ms);
        bench_row_dense(s, "both", both, 3 * flops, dense);
        bench_row_dense(s, "cuBLAS dense, up", call[2].ms, 2 * flops, call[2].ms);
        bench_row_dense(s, "cuBLAS dense, down", call[3].ms, flops, call[3].ms);
        bench_row_dense(s, "cuBLAS dense, both", dense, 3 * flops, dense);
    } else {
        const double b_up = touched * 2 * I * H * 2, b_down = touched * H * I * 2;
        bench_alternate(s, call, 2);
        bench_note_clocks(s, run_up, &d, call[0].ms);
        snprintf(what, sizeof what, "up   T %d H %d I %d E %d K %d%s", T, H, I, E, K, name);
        bench_row(s, what, call[0].ms, b_up / call[0].ms * 1e-9, "TB/s",
                  b_up / s->copy_rate * 1e3 / call[0].ms, "weights at copy rate");
        snprintf(what, sizeof what, "down T %d H %d I %d E %d K %d", T, H, I, E, K);
        bench_row(s, what, call[1].ms, b_down / call[1].ms * 1e-9, "TB/s",
                  b_down / s->copy_rate * 1e3 / call[1].ms, "weights at copy rate");
    }
    cudaFree((void*)d.w1.base), cudaFree((void*)d.w2.base);
    cudaFree((void*)g.logits), cudaFree(g.ids), cudaFree(g.weights), cudaFree(r.expert_count);
    cudaFree(r.expert_offset), cudaFree(r.row_slot), cudaFree(r.workspace), cudaFree((void*)d.x);
    cudaFree(d.act), cudaFree(d.rows), cudaFree(d.workspace);
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, "expert MLP, bf16, SwiGLU where nothing else is said");
    bench_blas blas = bench_blas_open(&s, 0);
    int failures = 0;
    run_shape(&s, &blas, 32768, 4096, 1536, 128, 8, 0, &failures);
    run_shape(&s, &blas, 32768, 4096, 1536, 128, 8, MOE_ACTIVATION_GEGLU, &failures);
    run_shape(&s, &blas, 32768, 4096, 1536, 128, 8, MOE_ACTIVATION_SWIGLU_CLAMPED, &failures);
    run_shape(&s, &blas, 24576, 1536, 256, 128, 8, 0, &failures);
    run_shape(&s, &blas, 16384, 4096, 14336, 8, 2, 0, &failures);
    run_shape(&s, &blas, 8192, 7168, 2048, 256, 8, 0, &failures);
    run_shape(&s, &blas, 64, 7168, 2048, 256, 8, 0, &failures);
    run_shape(&s, &blas, 256, 4096, 1536, 128, 8, 0, &failures);
    bench_blas_close(&blas);
    return bench_close(&s, failures);
}
