/* Weight gradients through the k-grouped GEMM, compared with cuBLAS dense of the same flops.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_k_gemm.cu -lcublas -lcublasLt -o bench_k_gemm

   dW1 of SwiGLU: dact [R, 2I] and the tokens gathered by row_slot. dW2: the gathered gradient of y
   and act [R, I]. "in order": dW1 with tokens [R, H] already in expert order. All are written in
   fp32. Floor: 2 R m n flops at cuBLAS's rate for one dense product of [m, R] and [R, n], in
   turn. */
#include "bench_blas.h"

#include "../moe/gemm/k_grouped.cuh"

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
    got = moe_load_f32(d->c, ((int64_t)e * d->m + i) * d->n + j, MOE_FP32);
    error = fabs(got - sum) / (((end - begin) / 16.0 + 2.0) * 1.1920929e-7 * size + 1e-30);
    atomicMax(a.worst, error <= 1e30 ? __float_as_uint((float)error) : 0x7f800000u);
}

static void run_shape(bench_state* s, bench_blas* blas, int T, int H, int I, int E, int K,
                      int* failures)
{
    const int64_t R = (int64_t)T * K;
    void* workspace = bench_alloc(MOE_GROUPED_GEMM_WORKSPACE);
    moe_gate_desc g;
    moe_route_desc r;
    int32_t* offset = (int32_t*)bench_alloc((size_t)E * 4 + 4);
    int32_t* row_slot = (int32_t*)bench_alloc((size_t)R * 4);
    memset(&g, 0, sizeof g), memset(&r, 0, sizeof r);
    g.logits = (float*)bench_random((int64_t)T * E, MOE_FP32, 1.0f, 9);
    g.ids = (int32_t*)bench_alloc((size_t)R * 4);
    g.weights = (float*)bench_alloc((size_t)R * 4);
    g.num_tokens = T, g.num_experts = E, g.top_k = K;
    r.ids = g.ids;
    r.expert_count = (int32_t*)bench_alloc((size_t)E * 4);
    r.expert_offset = offset, r.row_slot = row_slot;
    r.num_tokens = T, r.num_experts = E, r.top_k = K;
    BENCH_MOE(moe_route_workspace(&r, &r.workspace_bytes));
    r.workspace = bench_alloc(r.workspace_bytes);
    BENCH_MOE(moe_gate(&g, s->stream));
    BENCH_MOE(moe_route(&r, s->stream));
    for (int of = 0; of < 3; ++of) {
        static const char* const names[] = {"dW1", "dW2", "dW1 in order"};
        moe_k_grouped_gemm_desc d;
        moe_k_grouped_gemm_prepared p;
        check_args check;
        moe_launch_config c = moe_grid(64, 256, 0, s->stream);
        bench_call call[2];
        unsigned worst;
        char what[96];
        memset(&d, 0, sizeof d);
        d.m = of == 1 ? H : 2 * I, d.n = of == 1 ? I : H;
        d.a = bench_random((of == 1 ? T : R) * d.m, MOE_BF16, 1.0f, 1);
        d.b = bench_random((of == 0 ? T : R) * d.n, MOE_BF16, 1.0f, 2);
        if (of == 0) d.b_index = row_slot, d.b_div = K, d.b_rows = T;
        if (of == 1) d.a_index = row_slot, d.a_div = K, d.a_rows = T;
        d.expert_offset = offset;
        d.workspace = workspace, d.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
        d.c = bench_alloc((size_t)E * (size_t)d.m * (size_t)d.n * 4);
        d.c_dtype = MOE_FP32;
        d.num_experts = E, d.num_rows = (int32_t)R;
        BENCH_CUDA(cudaMemset(d.c, 0xff, (size_t)E * (size_t)d.m * (size_t)d.n * 4));
        BENCH_MOE(moe_k_grouped_gemm_prepare(&d, &p));
        BENCH_MOE(moe_k_grouped_gemm_run(&p, s->stream));
        check.d = d;
        BENCH_WORST(check_k, c, check, worst);
        *failures += !(moe_f32_from_bits(worst) <= 1.0f);
        printf("%s T %d H %d I %d E %d K %d: worst error %.2f of its bound; %s, tile %dx%dx%d\n",
               names[of], T, H, I, E, K, moe_f32_from_bits(worst), moe_gemm_path_name(p.plan.path),
               p.plan.tile_m, p.plan.tile_n, p.plan.tile_k);
        {
            bench_gemm dense = bench_gemm_random(s, blas, d.m, d.n, (int)R);
            call[0] = bench_one(run_k, &p);
            call[1] = bench_one(bench_run_gemm, &dense);
            bench_alternate(s, call, 2);
            bench_gemm_free_random(&dense);
        }
        snprintf(what, sizeof what, "%s T %d H %d I %d E %d K %d", names[of], T, H, I, E, K);
        bench_row_dense(s, what, call[0].ms, 2.0 * (double)R * d.m * d.n, call[1].ms);
        bench_row_dense(s, "cuBLAS dense", call[1].ms, 2.0 * (double)R * d.m * d.n, call[1].ms);
        cudaFree((void*)d.a), cudaFree((void*)d.b), cudaFree(d.c);
    }
    cudaFree((void*)g.logits), cudaFree(g.ids), cudaFree(g.weights), cudaFree(r.expert_count);
    cudaFree(offset), cudaFree(row_slot), cudaFree(r.workspace), cudaFree(workspace);
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, "gradients of experts' weights, bf16");
    bench_blas blas = bench_blas_open(&s, 0);
    int failures = 0;
    run_shape(&s, &blas, 32768, 4096, 1536, 128, 8, &failures);
    run_shape(&s, &blas, 24576, 1536, 256, 128, 8, &failures);
    run_shape(&s, &blas, 16384, 4096, 14336, 8, 2, &failures);
    bench_blas_close(&blas);
    return bench_close(&s, failures);
}
