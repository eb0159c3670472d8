/* Gradients of the experts' products, compared with cuBLAS dense of the same flops.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_gradients.cu -lcublas -lcublasLt -o bench_gradients

   Of weights, through the k-grouped GEMM, in bf16 and in fp32. dW1 of SwiGLU: dpre [R, 2I] and the
   tokens; dW2: the gradient of y and act [R, I]. The rows of tokens, or of the gradient of y, are
   gathered by row_slot, or lie in expert order, where a copy has put them; the copy is timed too.

   Of pre-activations, through the grouped GEMM with the backward pass of SwiGLU as its epilogue:
   dpre [R, 2I] from the gradient of y, gathered or in expert order, W2 [E, H, I] and pre [R, 2I]; act
   [R, I] and dot are stored too. Of tokens: dx [R, H] from dpre and W1 [E, 2I, H], before the sum over
   a token's experts.

   Floor: the flops at cuBLAS's rate for one dense product of these sizes, in turn. */
#include "bench_blas.h"

#include "../moe/gemm/grouped.cuh"
#include "../moe/gemm/grouped_gradient.cuh"
#include "../moe/gemm/k_grouped.cuh"
#include "../moe/permute.cuh"

static void run_grouped(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_grouped_gemm_run((const moe_grouped_gemm_prepared*)context, stream));
}

static void run_permute(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_permute_run((const moe_permute_prepared*)context, stream));
}

static void run_k(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_k_grouped_gemm_run((const moe_k_grouped_gemm_prepared*)context, stream));
}

/* Compares some elements of some experts with sums in double, over the bound of fp32 sums. */
typedef struct check_args {
    moe_k_grouped_gemm_desc d;
    unsigned* worst;
} check_args;

MOE_KERNEL(256, 1) check_k(MOE_ARG(check_args) a)
{
    const moe_k_grouped_gemm_desc* d = &a.d;
    const int e = (int)(blockIdx.x * 37u % (unsigned)d->num_experts);
    const int i = (int)(blockIdx.x * 1009u % (unsigned)d->m);
    const int j = (int)((blockIdx.x * 7919u + threadIdx.x) % (unsigned)d->n);
    const int begin = d->expert_offset[e], end = d->expert_offset[e + 1];
    double sum = 0.0, size = 0.0, got, error;
    for (int r = begin; r < end; ++r) {
        const int64_t p = d->a_index ? d->a_index[r] / (d->a_div ? d->a_div : 1) : r;
        const int64_t q = d->b_index ? d->b_index[r] / (d->b_div ? d->b_div : 1) : r;
        const double v = (double)moe_load_f32(d->a, p * d->m + i, MOE_BF16) *
                         (double)moe_load_f32(d->b, q * d->n + j, MOE_BF16);
        sum += v;
        size += fabs(v);
    }
    got = moe_load_f32(d->c, ((int64_t)e * d->m + i) * d->n + j, d->c_dtype);
    error = fabs(got - sum) / (((end - begin) / 16.0 + 2.0) * 1.1920929e-7 * size +
                               (d->c_dtype == MOE_FP32 ? 0.0 : fabs(sum) * 0.00391) + 1e-30);
    atomicMax(a.worst, error <= 1e30 ? __float_as_uint((float)error) : 0x7f800000u);
}

/* Compares parts of dot of some rows, and the 64 columns of dpre and act of each, with sums in
   double. One thread a column. */
typedef struct gradient_args {
    moe_grouped_gemm_desc d;
    unsigned* worst;
} gradient_args;

typedef struct gradient_sums {
    double dot, bound; /* of the block's part */
} gradient_sums;

/* Returns |got - want| over the bound: `error` and the rounding to bf16. */
static __device__ float gradient_ratio(const void* p, int64_t at, double want, double error)
{
    const double bound = error + fabs(want) * 0.00391 + 1e-30;
    const double ratio = fabs((double)moe_load_f32(p, at, MOE_BF16) - want) / bound;
    return ratio <= 1e30 ? (float)ratio : INFINITY;
}

MOE_KERNEL(64, 1) check_gradient(MOE_ARG(gradient_args) a)
{
    MOE_SHARED(gradient_sums, all);
    const moe_grouped_gemm_desc* d = &a.d;
    const int r = (int)(blockIdx.x * 7919u % (unsigned)d->num_rows);
    const int part = (int)(blockIdx.x * 37u % (unsigned)(d->n / 64));
    const int j = part * 64 + (int)threadIdx.x, slot = d->row_index[r];
    const int64_t token = slot / d->row_div, row = (int64_t)r * 2 * d->n;
    const double v = moe_load_f32(d->pre, row + j, MOE_BF16);
    const double u = moe_load_f32(d->pre, row + d->n + j, MOE_BF16);
    const double w = d->row_weight[slot], sigma = 1.0 / (1.0 + exp(-v)), silu = v * sigma;
    const double dv = u * sigma * (1.0 + v * (1.0 - sigma));
    double p = 0.0, size = 0.0, error;
    float worst;
    int e = 0;
    while (d->expert_offset[e + 1] <= r) ++e;
    for (int i = 0; i < d->k; ++i) {
        const double x =
            (double)moe_load_f32(d->a, token * d->k + i, MOE_BF16) *
            (double)moe_load_f32(d->b.base, ((int64_t)e * d->k + i) * d->n + j, MOE_BF16);
        p += x;
        size += fabs(x);
    }
    error = (d->k / 16.0 + 2.0) * 1.1920929e-7 * size + fabs(p) / 2000; /* wgmma rounds p */
    worst = gradient_ratio(d->c, row + j, w * p * dv, fabs(w * dv) * error);
    worst =
        fmaxf(worst, gradient_ratio(d->c, row + d->n + j, w * p * silu, fabs(w * silu) * error));
    worst = fmaxf(worst, gradient_ratio(d->act, (int64_t)r * d->n + j, w * silu * u,
                                        4e-6 * fabs(w * silu * u)));
    if (threadIdx.x == 0) all.dot = all.bound = 0.0;
    __syncthreads();
    atomicAdd(&all.dot, p * silu * u);
    atomicAdd(&all.bound, fabs(silu * u) * (error + 64 * 1.1920929e-7 * fabs(p)));
    __syncthreads();
    if (threadIdx.x == 0) {
        const double got = d->dot[(int64_t)r * (d->n / 64) + part];
        const double ratio = fabs(got - all.dot) / (all.bound + 1e-30);
        worst = fmaxf(worst, ratio <= 1e30 ? (float)ratio : INFINITY);
    }
    atomicMax(a.worst, __float_as_uint(worst));
}

/* A routing of random tokens, and what the products share. */
typedef struct sizes {
    int T, H, I, E, K;
    int64_t R;
    int32_t *offset, *row_slot, *slot_row;
    float *weights, *row_weight; /* [T, K], [R] */
    void* workspace;
} sizes;

static sizes route_shape(bench_state* s, int T, int H, int I, int E, int K)
{
    sizes z;
    moe_gate_desc g;
    moe_route_desc r;
    memset(&g, 0, sizeof g), memset(&r, 0, sizeof r);
    z.T = T, z.H = H, z.I = I, z.E = E, z.K = K, z.R = (int64_t)T * K;
    z.offset = (int32_t*)bench_alloc((size_t)E * 4 + 4);
    z.row_slot = (int32_t*)bench_alloc((size_t)z.R * 4);
    z.slot_row = (int32_t*)bench_alloc((size_t)z.R * 4);
    z.weights = (float*)bench_alloc((size_t)z.R * 4);
    z.row_weight = (float*)bench_alloc((size_t)z.R * 4);
    z.workspace = bench_alloc(MOE_GROUPED_GEMM_WORKSPACE);
    g.logits = (float*)bench_random((int64_t)T * E, MOE_FP32, 1.0f, 9);
    g.ids = (int32_t*)bench_alloc((size_t)z.R * 4);
    g.weights = z.weights;
    g.num_tokens = T, g.num_experts = E, g.top_k = K;
    r.ids = g.ids;
    r.expert_count = (int32_t*)bench_alloc((size_t)E * 4);
    r.expert_offset = z.offset, r.row_slot = z.row_slot;
    r.weights = z.weights, r.slot_row = z.slot_row, r.row_weight = z.row_weight;
    r.num_tokens = T, r.num_experts = E, r.top_k = K;
    BENCH_MOE(moe_route_workspace(&r, &r.workspace_bytes));
    r.workspace = bench_alloc(r.workspace_bytes);
    BENCH_MOE(moe_gate(&g, s->stream));
    BENCH_MOE(moe_route(&r, s->stream));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    cudaFree((void*)g.logits), cudaFree(g.ids), cudaFree(r.expert_count), cudaFree(r.workspace);
    return z;
}

/* Times `run` and cuBLAS dense [m, k] x [k, n] in turn; prints both. */
static void compare_dense(bench_state* s, bench_blas* blas, const sizes* z, const char* name,
                          void (*run)(void*, cudaStream_t), void* prepared, int m, int n, int k)
{
    const double flops = 2.0 * (double)m * n * k;
    bench_gemm dense = bench_gemm_random(s, blas, m, n, k);
    bench_call call[2];
    char what[96];
    call[0] = bench_one(run, prepared);
    call[1] = bench_one(bench_run_gemm, &dense);
    bench_alternate(s, call, 2);
    bench_gemm_free_random(&dense);
    snprintf(what, sizeof what, "%s T %d H %d I %d E %d K %d", name, z->T, z->H, z->I, z->E, z->K);
    bench_row_dense(s, what, call[0].ms, flops, call[1].ms);
    bench_row_dense(s, "cuBLAS dense", call[1].ms, flops, call[1].ms);
}

/* dW1, or dW2 where `second`; rows in expert order, or one operand gathered; in dtype. Returns 1 where
   a result is wrong. */
static int run_weights(bench_state* s, bench_blas* blas, const sizes* z, int second, int in_order,
                       int dtype)
{
    char name[48];
    moe_k_grouped_gemm_desc d;
    moe_k_grouped_gemm_prepared p;
    check_args check;
    moe_launch_config c = moe_grid(64, 256, 0, s->stream);
    size_t c_bytes;
    unsigned worst;
    memset(&d, 0, sizeof d);
    d.m = second ? z->H : 2 * z->I, d.n = second ? z->I : z->H;
    d.a = bench_random((second && !in_order ? z->T : z->R) * d.m, MOE_BF16, 1.0f, 1);
    d.b = bench_random((!second && !in_order ? z->T : z->R) * d.n, MOE_BF16, 1.0f, 2);
    if (!in_order && !second) d.b_index = z->row_slot, d.b_div = z->K, d.b_rows = z->T;
    if (!in_order && second) d.a_index = z->row_slot, d.a_div = z->K, d.a_rows = z->T;
    d.expert_offset = z->offset;
    d.workspace = z->workspace, d.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
    c_bytes = (size_t)z->E * (size_t)d.m * (size_t)d.n * (size_t)moe_dtype_bytes(dtype);
    d.c = bench_alloc(c_bytes);
    d.c_dtype = dtype;
    d.num_experts = z->E, d.num_rows = (int32_t)z->R;
    BENCH_CUDA(cudaMemset(d.c, 0xff, c_bytes));
    BENCH_MOE(moe_k_grouped_gemm_prepare(&d, &p));
    BENCH_MOE(moe_k_grouped_gemm_run(&p, s->stream));
    check.d = d;
    BENCH_WORST(check_k, c, check, worst);
    snprintf(name, sizeof name, "dW%d %s, %s", 1 + second, in_order ? "in order" : "gathered",
             moe_dtype_name(dtype));
    printf("%s: worst error %.2f of its bound; %s, tile %dx%dx%d\n", name, moe_f32_from_bits(worst),
           moe_gemm_path_name(p.plan.path), p.plan.tile_m, p.plan.tile_n, p.plan.tile_k);
    compare_dense(s, blas, z, name, run_k, &p, d.m, d.n, (int)z->R);
    cudaFree((void*)d.a), cudaFree((void*)d.b), cudaFree(d.c);
    return !(moe_f32_from_bits(worst) <= 1.0f);
}

/* Returns the gradient of y in expert order: a copy of rows of dy. Times the copy. */
static void* copy_rows(bench_state* s, const sizes* z, const void* dy)
{
    moe_permute_desc d;
    moe_permute_prepared p;
    bench_call call;
    const double bytes = ((double)z->R + z->T) * z->H * 2;
    memset(&d, 0, sizeof d);
    d.x = dy, d.row_slot = z->row_slot, d.slot_row = z->slot_row;
    d.y = bench_alloc((size_t)z->R * (size_t)z->H * 2);
    d.num_tokens = z->T, d.top_k = z->K, d.hidden = z->H, d.num_rows = z->R;
    BENCH_MOE(moe_permute_prepare(&d, &p));
    call = bench_one(run_permute, &p);
    bench_alternate(s, &call, 1);
    bench_row(s, "copy of rows in expert order", call.ms, bytes / call.ms * 1e-9, "TB/s",
              bytes / call.ms * 1e3 / s->copy_rate, "the copy rate");
    return d.y;
}

/* dpre, from rows of dy gathered or in expert order, C apart from pre or over pre. Returns 1 where a
   result is wrong. */
static int run_pre(bench_state* s, bench_blas* blas, const sizes* z, moe_grouped_gemm_desc d,
                   int in_order)
{
    moe_grouped_gemm_prepared p;
    gradient_args check;
    moe_launch_config c = moe_grid(256, 64, 0, s->stream);
    const char* const name = in_order ? "dpre in order" : "dpre gathered";
    unsigned worst;
    void* rows = 0;
    check.d = d; /* gathered: the same results */
    if (in_order) {
        rows = copy_rows(s, z, d.a);
        d.a = rows, d.row_index = 0, d.row_div = 0, d.a_rows = 0;
        d.row_weight = z->row_weight;
    }
    BENCH_CUDA(cudaMemset(d.c, 0xff, (size_t)z->R * 2 * (size_t)z->I * 2)); /* NaN */
    BENCH_CUDA(cudaMemset(d.act, 0xff, (size_t)z->R * (size_t)z->I * 2));
    BENCH_CUDA(cudaMemset(d.dot, 0xff, (size_t)z->R * (size_t)(z->I / 64) * 4));
    BENCH_MOE(moe_grouped_gemm_gradient_prepare(&d, &p));
    BENCH_MOE(moe_grouped_gemm_run(&p, s->stream));
    BENCH_WORST(check_gradient, c, check, worst);
    printf("%s: worst error %.2f of its bound; %s, tile %dx%dx%d\n", name, moe_f32_from_bits(worst),
           moe_gemm_path_name(p.plan.path), p.plan.tile_m, p.plan.tile_n, p.plan.tile_k);
    compare_dense(s, blas, z, name, run_grouped, &p, (int)z->R, z->I, z->H);
    cudaFree(rows);
    return !(moe_f32_from_bits(worst) <= 1.0f);
}

/* dpre both ways, then dx from it. Returns the number of wrong results. */
static int run_rows(bench_state* s, bench_blas* blas, const sizes* z)
{
    moe_grouped_gemm_desc d, x;
    moe_grouped_gemm_prepared px;
    int failures = 0;
    memset(&d, 0, sizeof d);
    d.gradient = 1, d.activation = MOE_ACTIVATION_SWIGLU;
    d.a = bench_random((int64_t)z->T * z->H, MOE_BF16, 1.0f, 3);
    d.row_index = z->row_slot, d.row_div = z->K, d.a_rows = z->T;
    d.b.base = bench_random((int64_t)z->E * z->H * z->I, MOE_BF16, 0.02f, 4);
    d.b.major = MOE_MAJOR_MN;
    d.pre = bench_random(z->R * 2 * z->I, MOE_BF16, 1.0f, 5);
    d.row_weight = z->weights;
    d.c = bench_alloc((size_t)z->R * 2 * (size_t)z->I * 2);
    d.act = bench_alloc((size_t)z->R * (size_t)z->I * 2);
    d.dot = (float*)bench_alloc((size_t)z->R * (size_t)(z->I / 64) * 4);
    d.expert_offset = z->offset, d.num_experts = z->E, d.num_rows = (int32_t)z->R;
    d.n = z->I, d.k = z->H;
    d.workspace = z->workspace, d.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
    for (int in_order = 0; in_order < 2; ++in_order) failures += run_pre(s, blas, z, d, in_order);
    memset(&x, 0, sizeof x);
    x.a = d.c;
    x.b.base = bench_random((int64_t)z->E * 2 * z->I * z->H, MOE_BF16, 0.02f, 6);
    x.b.major = MOE_MAJOR_MN;
    x.c = bench_alloc((size_t)z->R * (size_t)z->H * 2);
    x.expert_offset = z->offset, x.num_experts = z->E, x.num_rows = (int32_t)z->R;
    x.n = z->H, x.k = 2 * z->I;
    x.workspace = z->workspace, x.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
    BENCH_MOE(moe_grouped_gemm_prepare(&x, &px));
    compare_dense(s, blas, z, "dx", run_grouped, &px, (int)z->R, z->H, 2 * z->I);
    cudaFree((void*)d.a), cudaFree((void*)d.b.base), cudaFree(d.pre), cudaFree(d.c);
    cudaFree(d.act), cudaFree(d.dot), cudaFree((void*)x.b.base), cudaFree(x.c);
    return failures;
}

static int run_shape(bench_state* s, bench_blas* blas, int T, int H, int I, int E, int K)
{
    const sizes z = route_shape(s, T, H, I, E, K);
    int failures = run_rows(s, blas, &z);
    for (int i = 0; i < 8; ++i)
        failures += run_weights(s, blas, &z, i % 2, i / 2 % 2, i / 4 ? MOE_FP32 : MOE_BF16);
    cudaFree(z.offset), cudaFree(z.row_slot), cudaFree(z.weights), cudaFree(z.workspace);
    cudaFree(z.slot_row), cudaFree(z.row_weight);
    return failures;
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, "gradients of the experts' products, bf16");
    bench_blas blas = bench_blas_open(&s, 0);
    int failures = 0;
    failures += run_shape(&s, &blas, 32768, 4096, 1536, 128, 8);
    failures += run_shape(&s, &blas, 24576, 1536, 256, 128, 8);
    failures += run_shape(&s, &blas, 16384, 4096, 14336, 8, 2);
    bench_blas_close(&blas);
    return bench_close(&s, failures);
}
