/* bench_blas.h: the dense product that benches compare with, at the best speed of cuBLAS.

     C [m, n] = A [m, k] B [k, n], row-major, beta 0, accumulated in fp32

   bench_gemm_choose tries cublasGemmEx and every algorithm of cublasLt's heuristics, each with the
   same workspace (64 MiB by default). It verifies each against sums in double, drops those that are
   refused or wrong, times the others in turn and keeps the fastest.

     bench_blas blas = bench_blas_open(&s, 0);
     bench_gemm g = bench_gemm_bf16(&blas, m, n, k);      B as [n, k], as weights are stored
     g.a = a, g.b = b, g.c = c;
     bench_gemm_choose(&s, &g);                           copies of g may have other operands
     bench_call call = bench_one(bench_run_gemm, &g);

   Link with -lcublas -lcublasLt. */
#ifndef MOE_BENCH_BLAS_H
#define MOE_BENCH_BLAS_H

#include <cublasLt.h>
#include <cublas_v2.h>

#include "bench.h"

#define BENCH_CUBLAS(call)                                                                         \
    do {                                                                                           \
        const cublasStatus_t e_ = (call);                                                          \
        if (e_ != CUBLAS_STATUS_SUCCESS) {                                                         \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call,                          \
                    cublasGetStatusString(e_));                                                    \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

typedef struct bench_blas {
    cublasHandle_t handle;
    cublasLtHandle_t lt;
    void* workspace;
    size_t workspace_bytes;
} bench_blas;

/* Opens cuBLAS and cublasLt with one workspace. The handle stays on the bench's stream:
   cublasSetStream would reset the workspace. workspace_bytes: 0 = 64 MiB. */
static inline bench_blas bench_blas_open(bench_state* s, size_t workspace_bytes)
{
    bench_blas b;
    b.workspace_bytes = workspace_bytes ? workspace_bytes : (size_t)64 << 20;
    b.workspace = bench_alloc(b.workspace_bytes);
    BENCH_CUBLAS(cublasCreate(&b.handle));
    BENCH_CUBLAS(cublasLtCreate(&b.lt));
    BENCH_CUBLAS(cublasSetStream(b.handle, s->stream));
    BENCH_CUBLAS(cublasSetWorkspace(b.handle, b.workspace, b.workspace_bytes));
    return b;
}

static inline void bench_blas_close(bench_blas* b)
{
    BENCH_CUBLAS(cublasDestroy(b->handle));
    BENCH_CUBLAS(cublasLtDestroy(b->lt));
    BENCH_CUDA(cudaFree(b->workspace));
}

typedef struct bench_gemm {
    const bench_blas* blas;
    const void *a, *b; /* A: [m, k], transposed [k, m]; B: [k, n], transposed [n, k] */
    void* c;           /* [m, n] */
    int m, n, k, a_transposed, b_transposed;
    int in, out; /* moe_dtype of A and B, of C: bf16 or fp32 */
    cublasComputeType_t compute;
    int lt; /* cublasLt candidate, from 1; 0: cublasGemmEx */
    cublasLtMatmulAlgo_t algo;
    cublasLtMatmulDesc_t op;       /* of cublasLt, which is column-major: C^T = B^T A^T */
    cublasLtMatrixLayout_t lay[3]; /* B, A, C */
    char name[64];
} bench_gemm;

/* Returns a product of bf16 matrices, with B as [n, k]. */
static inline bench_gemm bench_gemm_bf16(const bench_blas* blas, int m, int n, int k)
{
    bench_gemm g;
    memset(&g, 0, sizeof g);
    g.blas = blas;
    g.m = m, g.n = n, g.k = k;
    g.b_transposed = 1;
    g.in = g.out = MOE_BF16;
    g.compute = CUBLAS_COMPUTE_32F;
    snprintf(g.name, sizeof g.name, "cublasGemmEx");
    return g;
}

static inline cudaDataType_t bench_blas_type(int dtype)
{
    return dtype == MOE_FP32 ? CUDA_R_32F : CUDA_R_16BF;
}

static inline cublasStatus_t bench_try_gemm(const bench_gemm* g, cudaStream_t stream)
{
    const float one = 1.0f, zero = 0.0f;
    const bench_blas* b = g->blas;
    const cudaDataType_t in = bench_blas_type(g->in);
    if (g->lt)
        return cublasLtMatmul(b->lt, g->op, &one, g->b, g->lay[0], g->a, g->lay[1], &zero, g->c,
                              g->lay[2], g->c, g->lay[2], &g->algo, b->workspace,
                              b->workspace_bytes, stream);
    return cublasGemmEx(b->handle, g->b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                        g->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, g->n, g->m, g->k, &one, g->b,
                        in, g->b_transposed ? g->k : g->n, g->a, in, g->a_transposed ? g->m : g->k,
                        &zero, g->c, bench_blas_type(g->out), g->n, g->compute,
                        CUBLAS_GEMM_DEFAULT);
}

static inline void bench_run_gemm(void* context, cudaStream_t stream)
{
    BENCH_CUBLAS(bench_try_gemm((const bench_gemm*)context, stream));
}

/* ---- verification ---- */

typedef struct bench_gemm_check {
    bench_gemm g;
    unsigned* worst; /* largest error over its bound */
} bench_gemm_check;

enum { BENCH_GEMM_SAMPLES = 4096 };

/* Compares sampled elements of C, one a warp, with sums in double. */
MOE_KERNEL(256, 1) bench_check_gemm_kernel(MOE_ARG(bench_gemm_check) a)
{
    const bench_gemm* g = &a.g;
    const int64_t m = g->m, n = g->n, k = g->k;
    const int lane = (int)threadIdx.x % 32;
    for (uint32_t u = blockIdx.x * 8u + threadIdx.x / 32u; u < BENCH_GEMM_SAMPLES;
         u += gridDim.x * 8u) {
        const int64_t i = bench_hash(u, 71u) % (unsigned)g->m;
        const int64_t j = bench_hash(u, 72u) % (unsigned)g->n;
        double want = 0.0, size = 0.0, bound;
        float ratio;
        for (int64_t l = lane; l < k; l += 32) {
            const double p =
                (double)moe_load_f32(g->a, g->a_transposed ? l * m + i : i * k + l, g->in) *
                moe_load_f32(g->b, g->b_transposed ? j * k + l : l * n + j, g->in);
            want += p;
            size += fabs(p);
        }
        for (int w = 16; w > 0; w >>= 1) {
            want += __shfl_xor_sync(MOE_FULL_WARP, want, w);
            size += __shfl_xor_sync(MOE_FULL_WARP, size, w);
        }
        bound = (double)(k / 16 + 2) * size / 8388608.0 + 1e-5;
        if (g->out == MOE_BF16) bound += fabs(want) / 256.0;
        if (g->compute == CUBLAS_COMPUTE_32F_FAST_TF32) bound += size / 1024.0; /* rounding of the
                                                                                   inputs */
        ratio = (float)(fabs(moe_load_f32(g->c, i * n + j, g->out) - want) / bound);
        if (lane == 0) atomicMax(a.worst, ratio <= 1e30f ? __float_as_uint(ratio) : 0x7f800000u);
    }
}

/* Returns the largest error over its bound among sampled elements of g's C. */
static inline float bench_check_gemm(bench_state* s, const bench_gemm* g)
{
    bench_gemm_check a;
    unsigned worst = 0;
    moe_launch_config l = moe_grid(BENCH_GEMM_SAMPLES / 8, 256, 0, s->stream);
    a.g = *g;
    BENCH_WORST(bench_check_gemm_kernel, l, a, worst);
    return moe_f32_from_bits(worst);
}

/* Runs g on a poisoned C. Returns 0 where g is refused or wrong. */
static inline int bench_gemm_holds(bench_state* s, const bench_gemm* g)
{
    float worst;
    cublasStatus_t status;
    BENCH_CUDA(cudaMemsetAsync(
        g->c, 0xff, (size_t)g->m * (size_t)g->n * (size_t)moe_dtype_bytes(g->out), s->stream));
    status = bench_try_gemm(g, s->stream);
    if (status == CUBLAS_STATUS_SUCCESS) {
        worst = bench_check_gemm(s, g);
        if (worst <= 1.0f) return 1;
        printf("  %s is left out: %g of its bound\n", g->name, worst);
    } else {
        printf("  %s is left out: %s\n", g->name, cublasGetStatusString(status));
    }
    return 0;
}

/* ---- choice ---- */

enum { BENCH_GEMM_MOST = 16 }; /* most candidates of cublasLt */

static inline cublasLtMatrixLayout_t bench_gemm_layout(int dtype, int rows, int columns)
{
    cublasLtMatrixLayout_t l;
    BENCH_CUBLAS(cublasLtMatrixLayoutCreate(&l, bench_blas_type(dtype), (uint64_t)rows,
                                            (uint64_t)columns, rows));
    return l;
}

/* Writes cublasGemmEx and the algorithms of cublasLt, in its order, to candidate. Returns their
   number. */
static inline int bench_gemm_candidates(const bench_gemm* g, bench_gemm* candidate)
{
    const cublasOperation_t op_b = g->b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                            op_a = g->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const size_t workspace = g->blas->workspace_bytes;
    cublasLtMatmulHeuristicResult_t found[BENCH_GEMM_MOST];
    cublasLtMatmulPreference_t wish;
    bench_gemm lt = *g;
    int count = 0, kept = 1;
    BENCH_CUBLAS(cublasLtMatmulDescCreate(&lt.op, g->compute, CUDA_R_32F));
    BENCH_CUBLAS(
        cublasLtMatmulDescSetAttribute(lt.op, CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof op_b));
    BENCH_CUBLAS(
        cublasLtMatmulDescSetAttribute(lt.op, CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof op_a));
    lt.lay[0] = g->b_transposed ? bench_gemm_layout(g->in, g->k, g->n)
                                : bench_gemm_layout(g->in, g->n, g->k);
    lt.lay[1] = g->a_transposed ? bench_gemm_layout(g->in, g->m, g->k)
                                : bench_gemm_layout(g->in, g->k, g->m);
    lt.lay[2] = bench_gemm_layout(g->out, g->n, g->m);
    BENCH_CUBLAS(cublasLtMatmulPreferenceCreate(&wish));
    BENCH_CUBLAS(cublasLtMatmulPreferenceSetAttribute(
        wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace));
    if (cublasLtMatmulAlgoGetHeuristic(g->blas->lt, lt.op, lt.lay[0], lt.lay[1], lt.lay[2],
                                       lt.lay[2], wish, BENCH_GEMM_MOST, found,
                                       &count) != CUBLAS_STATUS_SUCCESS)
        count = 0;
    BENCH_CUBLAS(cublasLtMatmulPreferenceDestroy(wish));
    candidate[0] = lt; /* cublasGemmEx; keeps the descriptors, so that they can be freed */
    for (int i = 0; i < count; ++i) {
        int id = -1;
        if (found[i].state != CUBLAS_STATUS_SUCCESS) continue;
        candidate[kept] = lt;
        candidate[kept].lt = i + 1;
        candidate[kept].algo = found[i].algo;
        BENCH_CUBLAS(cublasLtMatmulAlgoConfigGetAttribute(&found[i].algo, CUBLASLT_ALGO_CONFIG_ID,
                                                          &id, sizeof id, 0));
        snprintf(candidate[kept].name, sizeof candidate[kept].name,
                 "cublasLt %d of %d, algorithm %d", i + 1, count, id);
        ++kept;
    }
    return kept;
}

/* Replaces g by the fastest candidate that is right; exits where none is. */
static inline void bench_gemm_choose(bench_state* s, bench_gemm* g)
{
    bench_gemm candidate[BENCH_GEMM_MOST + 1];
    bench_call call[BENCH_GEMM_MOST + 1];
    bench_state quick = *s;
    const int found = bench_gemm_candidates(g, candidate);
    int count = 0, best = 0;
    quick.reps = 5;
    for (int i = 0; i < found; ++i)
        if (bench_gemm_holds(s, &candidate[i])) candidate[count++] = candidate[i];
    if (!count) {
        fprintf(stderr, "cuBLAS has no product that is right: m %d n %d k %d\n", g->m, g->n, g->k);
        exit(1);
    }
    for (int i = 0; i < count; ++i) call[i] = bench_one(bench_run_gemm, &candidate[i]);
    bench_alternate(&quick, call, count);
    for (int i = 0; i < count; ++i)
        if (call[i].ms < call[best].ms) best = i;
    printf("  cuBLAS %d x %d x %d %c%c: %s, %.4f ms", g->m, g->n, g->k, g->a_transposed ? 'T' : 'N',
           g->b_transposed ? 'T' : 'N', candidate[best].name, call[best].ms);
    if (best) printf("; %s %.4f ms", candidate[0].name, call[0].ms);
    printf("; %d ways\n", count);
    *g = candidate[best];
}

/* Called after the last use of a choice and of its copies. */
static inline void bench_gemm_free(bench_gemm* g)
{
    if (g->op) BENCH_CUBLAS(cublasLtMatmulDescDestroy(g->op));
    for (int i = 0; i < 3; ++i)
        if (g->lay[i]) BENCH_CUBLAS(cublasLtMatrixLayoutDestroy(g->lay[i]));
    g->op = 0;
    memset(g->lay, 0, sizeof g->lay);
}

/* Returns a chosen product with random operands of its own; bench_gemm_free_random frees all. */
static inline bench_gemm bench_gemm_random(bench_state* s, const bench_blas* blas, int m, int n,
                                           int k)
{
    bench_gemm g = bench_gemm_bf16(blas, m, n, k);
    g.a = bench_random((int64_t)m * k, MOE_BF16, 1.0f, 21);
    g.b = bench_random((int64_t)n * k, MOE_BF16, 1.0f / sqrtf((float)k), 22);
    g.c = bench_alloc((size_t)m * (size_t)n * 2);
    bench_gemm_choose(s, &g);
    return g;
}

static inline void bench_gemm_free_random(bench_gemm* g)
{
    bench_gemm_free(g);
    BENCH_CUDA(cudaFree((void*)g->a));
    BENCH_CUDA(cudaFree((void*)g->b));
    BENCH_CUDA(cudaFree(g->c));
}

/* Prints a row in TFLOPS; its ratio is cuBLAS's time over `ms`. */
static inline void bench_row_dense(bench_state* s, const char* what, double ms, double flops,
                                   double dense_ms)
{
    bench_row(s, what, ms, flops / ms * 1e-9, "TFLOPS", dense_ms / ms, "cuBLAS dense");
}

#endif
