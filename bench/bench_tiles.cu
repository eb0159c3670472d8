/* Tiles and paths of the grouped GEMM, and the choice that the rule makes among them.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_tiles.cu -lcublas -lcublasLt -o bench_tiles

   For each shape all tiles that take it run in turn, with SwiGLU and with none; "chosen" is what
   tile 0 and path 0 run (moei_gemm_suits), "regret" its time over the best one's. Shapes with an
   even number fitted the rule; the others show how it does elsewhere. Before they are timed all
   results are compared with those of the smallest tile: one sum in another order.

   Rows are drawn at random for each expert, as a router without skew gives them. "One matrix": the
   products of a router, whose n is the number of experts; results are fp32. */
#include "bench_blas.h"

#include "../moe/gemm/grouped.cuh"

typedef struct tile_shape {
    int E, rows, n, k; /* rows: of an expert, on average; gated: n is the inner size */
} tile_shape;

enum { WAYS = 5 };
static const struct {
    int path, tile;
    const char* name;
} way_of[WAYS] = {{MOE_GEMM_PATH_WGMMA, MOE_TILE_128x256, "wgmma"},
                  {MOE_GEMM_PATH_WMMA, MOE_TILE_128x256, "128x256"},
                  {MOE_GEMM_PATH_WMMA, MOE_TILE_128x128, "128x128"},
                  {MOE_GEMM_PATH_WMMA, MOE_TILE_32x128, "32x128"},
                  {MOE_GEMM_PATH_WMMA, MOE_TILE_64x64, "64x64"}};

static void run_product(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_grouped_gemm_run((const moe_grouped_gemm_prepared*)context, stream));
}

/* The largest difference of two arrays over 2^-6 of the sum of their magnitudes and 1. */
typedef struct differ_args {
    const void *x, *y;
    int64_t count;
    int32_t dtype;
    unsigned* worst;
} differ_args;

MOE_KERNEL(256, 1) differ(MOE_ARG(differ_args) a)
{
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < a.count; i += gridDim.x * 256ll) {
        const float x = moe_load_f32(a.x, i, a.dtype), y = moe_load_f32(a.y, i, a.dtype);
        const float error = fabsf(x - y) * 64.0f / (fabsf(x) + fabsf(y) + 1.0f);
        atomicMax(a.worst, error <= 1e30f ? __float_as_uint(error) : 0x7f800000u);
    }
}

/* Runs one shape; returns the regret, negative where a result is wrong. The largest difference of
   NaN is infinite, so results that are not stored show. */
static double run_shape(bench_state* s, const tile_shape* h, int gated, int c_dtype)
{
    const int64_t rows = (int64_t)h->E * h->rows;
    const int64_t b_rows = (int64_t)h->n * (gated ? 2 : 1);
    const size_t c_bytes = (size_t)(rows * h->n) * (size_t)moe_dtype_bytes(c_dtype);
    int32_t* offset = (int32_t*)calloc((size_t)h->E + 1, 4);
    moe_grouped_gemm_desc d;
    moe_grouped_gemm_prepared p[WAYS], chosen;
    bench_call call[WAYS];
    int of[WAYS], count = 0, pick = 0, best = 0;
    void* first = bench_alloc(c_bytes);
    double regret;
    for (int64_t r = 0; r < rows; ++r) ++offset[bench_hash((uint32_t)r, 5) % (uint32_t)h->E + 1];
    for (int e = 0; e < h->E; ++e) offset[e + 1] += offset[e];
    memset(&d, 0, sizeof d);
    d.a = bench_random(rows * h->k, MOE_BF16, 1.0f, 1);
    d.b.base = bench_random(h->E * b_rows * h->k, MOE_BF16, 0.05f, 2);
    d.c = bench_alloc(c_bytes);
    d.expert_offset = (const int32_t*)bench_alloc((size_t)h->E * 4 + 4);
    BENCH_CUDA(
        cudaMemcpy((void*)d.expert_offset, offset, (size_t)h->E * 4 + 4, cudaMemcpyHostToDevice));
    d.num_experts = h->E, d.num_rows = (int32_t)rows, d.n = h->n, d.k = h->k;
    d.c_dtype = c_dtype;
    d.activation = gated ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
    d.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
    d.workspace = bench_alloc(d.workspace_bytes);
    BENCH_MOE(moe_grouped_gemm_prepare(&d, &chosen));
    for (int i = WAYS - 1; i >= 0; --i) {
        d.path = way_of[i].path, d.tile = way_of[i].tile;
        if (moe_grouped_gemm_prepare(&d, &p[count]) != MOE_OK) continue;
        if (p[count].plan.path == chosen.plan.path && p[count].plan.tile == chosen.plan.tile)
            pick = count;
        BENCH_CUDA(cudaMemsetAsync(d.c, 0xff, c_bytes, s->stream)); /* NaN */
        BENCH_MOE(moe_grouped_gemm_run(&p[count], s->stream));
        if (count == 0) {
            BENCH_CUDA(cudaMemcpyAsync(first, d.c, c_bytes, cudaMemcpyDeviceToDevice, s->stream));
        } else {
            const moe_launch_config c = moe_grid(1320, 256, 0, s->stream);
            differ_args a = {first, d.c, rows * h->n, c_dtype, 0};
            unsigned worst;
            BENCH_WORST(differ, c, a, worst);
            if (!(moe_f32_from_bits(worst) <= 1.0f)) {
                printf("  %s differs: %g\n", way_of[i].name, (double)moe_f32_from_bits(worst));
                return -1.0;
            }
        }
        call[count] = bench_one(run_product, &p[count]);
        of[count++] = i;
    }
    bench_alternate(s, call, count);
    for (int i = 0; i < count; ++i)
        if (call[i].ms < call[best].ms) best = i;
    regret = call[pick].ms / call[best].ms;
    printf("  %4d experts x %4d rows, n %5d%s k %5d:", h->E, h->rows, h->n, gated ? " gated" : "",
           h->k);
    for (int i = count - 1; i >= 0; --i) printf("  %s %.4f", way_of[of[i]].name, call[i].ms);
    printf(" ms; chosen %s, regret %.3f\n", way_of[of[pick]].name, regret);
    cudaFree((void*)d.a), cudaFree((void*)d.b.base), cudaFree(d.c), cudaFree(d.workspace);
    cudaFree((void*)d.expert_offset), cudaFree(first), free(offset);
    return regret;
}

/* Regrets of the shapes that fitted the rule, [0], and of the others, [1]. */
typedef struct regrets {
    double sum[2], worst[2];
    int number, count[2];
} regrets;

/* Runs one shape and adds its regret. Returns 0 where a result is wrong. */
static int add_shape(bench_state* s, regrets* g, tile_shape h, int gated, int c_dtype)
{
    const int held = g->number++ & 1;
    const double regret = run_shape(s, &h, gated, c_dtype);
    g->sum[held] += regret, ++g->count[held];
    g->worst[held] = regret > g->worst[held] ? regret : g->worst[held];
    return regret >= 0;
}

static void print_regrets(const regrets* g, const char* of)
{
    for (int held = 0; held < 2; ++held)
        printf("%s, %s: mean regret %.3f, worst %.3f of %d shapes\n", of,
               held ? "others" : "fitted", g->sum[held] / g->count[held], g->worst[held],
               g->count[held]);
}

int main(int argc, char** argv)
{
    static const int sizes[][2] = {
        {1536, 4096}, {256, 1536}, {2048, 7168}, {768, 2048}, {512, 2048}};
    static const int rows[] = {4, 16, 32, 48, 64, 96, 128, 160, 192, 256};
    static const int tokens[] = {16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    static const int outputs[] = {8, 64, 128, 256, 512}, depths[] = {1536, 2048, 4096, 7168};
    static const int experts[] = {128, 32, 8};
    bench_state s = bench_open(argc, argv, "tiles of the grouped GEMM, bf16");
    regrets layers = {}, routers = {};
    int good = 1;
    for (int e = 0; e < 3 && good; ++e)
        for (int r = 0; r < 10 && good; ++r) {
            const int i = (layers.number * 3 + layers.number / 10) % 5;
            const int gated = layers.number / 2 & 1; /* the down product has n and k swapped */
            const tile_shape h = {experts[e], rows[r], sizes[i][!gated], sizes[i][gated]};
            good = add_shape(&s, &layers, h, gated, MOE_BF16);
        }
    for (int t = 0; t < 11 && good; ++t)
        for (int n = 0; n < 5 && good; ++n) {
            const tile_shape h = {1, tokens[t], outputs[n], depths[(t * 3 + n) % 4]};
            good = add_shape(&s, &routers, h, 0, MOE_FP32);
        }
    print_regrets(&layers, "experts");
    print_regrets(&routers, "one matrix");
    return bench_close(&s, !good);
}
