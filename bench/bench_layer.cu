/* The whole layer, router to combine, and each of its parts.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_layer.cu -lcublas -lcublasLt -o bench_layer

     --shape T,H,I,E,K, --routing KIND    bench_routing.h; without both, also a shared expert and
                                          few tokens
     --csv FILE, --reps N

   Rate: the 6 T K H I flops of the experts over the layer's time. The peer is the sum of cuBLAS's
   two dense products with the same rows. Under `random` the router makes the logits. Under every
   other kind the logits are given and no router runs, so skewed layers are compared with the
   balanced one, given its logits likewise. All layers of a shape, their parts and cuBLAS are timed
   in turn. Also checked: the workspace has exactly the bytes of the formula in layer.cuh, a call
   takes no other device memory, and ids are those of the routing. */
#include "bench_blas.h"
#include "bench_routing.h"

static void run_layer(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_layer_run((const moe_layer_prepared*)context, stream));
}

typedef struct part_job {
    const moe_layer_prepared* layer;
    int part;
} part_job;

static void run_part(void* context, cudaStream_t stream)
{
    const part_job* j = (const part_job*)context;
    BENCH_MOE(moe_layer_run_part(j->layer, j->part, stream));
}

/* Computes token blockIdx.x * step from its own ids and weights, in double: once exactly, and once
   with act, rows and y rounded as the layer rounds them. worst[0]: largest error of y; worst[1]:
   largest error of that rounding; worst[2]: largest error of a router's logit over its bound. */
typedef struct check_args {
    moe_layer_desc l;
    moe_layer_view v;
    float* act; /* [blocks, 2, K * I + shared width]: exact, rounded */
    int step;
    unsigned* worst;
} check_args;

MOE_KERNEL(256, 1) check_layer(MOE_ARG(check_args) a)
{
    const int64_t H = a.l.hidden, I = a.l.intermediate, K = a.l.top_k;
    const int64_t E = a.l.num_experts, routed = a.l.router ? E : 0; /* logits to check */
    const int64_t S = a.l.shared.intermediate, acts = K * I + S;
    const int64_t t = (int64_t)blockIdx.x * a.step;
    float *act = a.act + (int64_t)blockIdx.x * 2 * acts, *act_rounded = act + acts;
    for (int64_t e = threadIdx.x; e < routed; e += 256) {
        double sum = 0.0, size = 0.0;
        for (int64_t h = 0; h < H; ++h) {
            const double p = (double)moe_load_f32(a.l.x, t * H + h, MOE_BF16) *
                             moe_load_f32(a.l.router, e * H + h, MOE_BF16);
            sum += p;
            size += fabs(p);
        }
        {
            const float ratio =
                (float)(fabs(a.v.logits[t * E + e] - sum) / ((H / 16 + 2) * size / 8388608.0));
            atomicMax(a.worst + 2, ratio <= 1e30f ? __float_as_uint(ratio) : 0x7f800000u);
        }
    }
    for (int64_t i = threadIdx.x; i < acts; i += 256) {
        const bool shared = i >= K * I; /* the shared expert's columns follow those of the others */
        const int64_t e = shared ? 0 : a.v.ids[t * K + i / I], n = shared ? i - K * I : i % I;
        const int64_t width = shared ? S : I;
        const void* w1 = shared ? a.l.shared.w1.base : a.l.w1.base;
        double gate = 0.0, up = 0.0;
        for (int64_t h = 0; h < H; ++h) {
            const double x = moe_load_f32(a.l.x, t * H + h, MOE_BF16);
            gate += x * moe_load_f32(w1, (e * 2 * width + n) * H + h, MOE_BF16);
            up += x * moe_load_f32(w1, (e * 2 * width + width + n) * H + h, MOE_BF16);
        }
        act[i] = (float)(gate / (1.0 + exp(-gate)) * up);
        act_rounded[i] = moe_half_to_f32(moe_f32_to_half(act[i], MOE_BF16), MOE_BF16);
    }
    __syncthreads();
    for (int64_t h = threadIdx.x; h < H; h += 256) {
        double y = 0.0, y_rounded = 0.0;
        float got, rounded;
        for (int64_t k = 0; k < K + (S > 0); ++k) {
            const int64_t e = k < K ? a.v.ids[t * K + k] : 0, width = k < K ? I : S;
            const void* w2 = k < K ? a.l.w2.base : a.l.shared.w2.base;
            const double weight = k < K ? a.v.weights[t * K + k] : 1.0f;
            double row = 0.0, row_rounded = 0.0;
            for (int64_t i = 0; i < width; ++i) {
                const double w = moe_load_f32(w2, (e * H + h) * width + i, MOE_BF16);
                row += act[k * I + i] * w;
                row_rounded += act_rounded[k * I + i] * w;
            }
            y += weight * row;
            y_rounded +=
                weight * moe_half_to_f32(moe_f32_to_half((float)row_rounded, MOE_BF16), MOE_BF16);
        }
        got = moe_load_f32(a.l.y, t * H + h, MOE_BF16);
        rounded = moe_half_to_f32(moe_f32_to_half((float)y_rounded, MOE_BF16), MOE_BF16);
        {
            const float error = (float)fabs(got - y);
            atomicMax(a.worst, error <= 1e30f ? __float_as_uint(error) : 0x7f800000u);
            atomicMax(a.worst + 1, __float_as_uint((float)fabs(rounded - y)));
        }
    }
}

/* Returns the bytes of one buffer of a workspace: a multiple of 256. */
static uint64_t rounded(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

/* A layer under one routing, and its parts. */
typedef struct routed_layer {
    int routing;
    moe_layer_desc l;
    moe_layer_prepared p;
    part_job part[MOE_LAYER_PARTS];
    int parts;
    bench_call* call; /* [1 + parts]: the layer, its parts */
} routed_layer;

/* Gives r->l its logits or router, its output and its workspace. Returns the ids [T, K] that the
   gate has to choose, which the caller frees; null under random. */
static int32_t* route_layer(routed_layer* r, const bench_shape* h)
{
    moe_layer_desc* l = &r->l;
    int32_t* ids = 0;
    if (r->routing == BENCH_RANDOM) {
        l->router = bench_random((int64_t)h->E * h->H, MOE_BF16, 1.0f / sqrtf((float)h->H), 2);
    } else {
        ids = bench_routing_ids(h, r->routing);
        l->logits = bench_routing_logits(h, ids);
    }
    l->y = bench_alloc((size_t)h->T * (size_t)h->H * 2);
    BENCH_MOE(moe_layer_workspace(l, &l->workspace_bytes));
    l->workspace = bench_alloc(l->workspace_bytes);
    return ids;
}

/* Returns the bytes of workspace by the formula of layer.cuh. */
static uint64_t workspace_formula(const moe_layer_desc* l)
{
    const uint64_t T = (uint64_t)l->num_tokens, H = (uint64_t)l->hidden,
                   E = (uint64_t)l->num_experts;
    const uint64_t S = (uint64_t)l->shared.intermediate, slots = T * (uint64_t)l->top_k;
    return (l->logits ? 0 : rounded(T * E * 4)) + 2 * rounded(slots * 4) +
           rounded(E * (uint64_t)moe_num_chunks(l->num_tokens) * 4) + rounded(E * 4) +
           rounded(E * 4 + 4) + rounded(slots * 4) + rounded(slots * 8) +
           rounded(2 * MOE_EXPERTS_WORKSPACE) + rounded(slots * (uint64_t)l->intermediate * 2) +
           rounded(slots * H * 2) + (S ? rounded(T * S * 2) + rounded(T * H * 2) : 0);
}

/* Prepares and verifies a layer; r->l is filled in but for its routing. */
static void open_layer(bench_state* s, routed_layer* r, const bench_shape* h, int* failures)
{
    const int S = r->l.shared.intermediate;
    const size_t slots = (size_t)h->T * (size_t)h->K;
    int32_t *wanted = route_layer(r, h), *chosen = (int32_t*)malloc(slots * 4);
    check_args check;
    unsigned worst[3];
    size_t free_before, free_after, total;
    moe_launch_config c = moe_grid(16, 256, 0, s->stream);
    float error, bound, logit;
    int ids_differ;
    *failures += r->l.workspace_bytes != workspace_formula(&r->l);
    BENCH_CUDA(cudaMemset(r->l.workspace, 0xff, r->l.workspace_bytes));
    BENCH_CUDA(cudaMemset(r->l.y, 0xff, (size_t)h->T * (size_t)h->H * 2));
    BENCH_MOE(moe_preload());
    BENCH_CUDA(cudaMemGetInfo(&free_before, &total));
    BENCH_MOE(moe_layer_prepare(&r->l, &r->p));
    BENCH_MOE(moe_layer_run(&r->p, s->stream));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemGetInfo(&free_after, &total));
    *failures += free_after != free_before;

    check.l = r->l;
    BENCH_MOE(moe_layer_get_view(&r->l, &check.v));
    check.step = h->T / 16;
    check.act = (float*)bench_alloc(16 * 2 * ((size_t)h->K * (size_t)h->I + (size_t)S) * 4);
    BENCH_WORST(check_layer, c, check, worst);
    BENCH_CUDA(cudaFree(check.act));
    BENCH_CUDA(cudaMemcpy(chosen, check.v.ids, slots * 4, cudaMemcpyDeviceToHost));
    ids_differ = wanted && memcmp(chosen, wanted, slots * 4);
    free(wanted), free(chosen);
    error = moe_f32_from_bits(worst[0]), bound = 2 * moe_f32_from_bits(worst[1]) + 1e-5f;
    logit = moe_f32_from_bits(worst[2]);
    *failures += !(error <= bound) || !(logit <= 1.0f) || ids_differ;
    printf("T %d H %d I %d E %d K %d shared %d %s%s: error %.2g (bound %.2g), logits %.2f of "
           "theirs; workspace %.2f GiB = the formula's, other memory %lld bytes; tiles %dx%d, "
           "%dx%d\n",
           h->T, h->H, h->I, h->E, h->K, S, bench_routing_name[r->routing],
           ids_differ ? ", other ids" : "", error, bound, logit,
           (double)r->l.workspace_bytes / (1 << 30), (long long)(free_before - free_after),
           r->p.experts.up.plan.tile_m, r->p.experts.up.plan.tile_n, r->p.experts.down.plan.tile_m,
           r->p.experts.down.plan.tile_n);
}

/* Writes the calls of a layer and its parts to r->call. Returns their number. */
static int layer_calls(routed_layer* r)
{
    const int shared = r->l.shared.intermediate > 0;
    r->call[0] = bench_one(run_layer, &r->p);
    for (int part = 0; part < MOE_LAYER_PARTS; ++part) {
        part_job* j = &r->part[r->parts];
        if (part == MOE_LAYER_ROUTER && !r->l.router) continue;
        if (!shared && (part == MOE_LAYER_SHARED_UP || part == MOE_LAYER_SHARED_DOWN)) continue;
        j->layer = &r->p, j->part = part;
        r->call[1 + r->parts++] = bench_one(run_part, j);
    }
    return 1 + r->parts;
}

/* Prints the rows of a layer and of its parts. dense_ms: 0 without cuBLAS; balanced_ms: of the
   balanced layer, used by skewed ones. */
static void print_layer(bench_state* s, const routed_layer* r, const bench_shape* h,
                        double dense_ms, double balanced_ms)
{
    const int S = r->l.shared.intermediate;
    const double slots = (double)h->T * h->K, ms = r->call[0].ms;
    const double flops = 6.0 * slots * h->H * h->I, shared_flops = 6.0 * (double)h->T * h->H * S;
    char what[96], shared[24] = "";
    if (S) snprintf(shared, sizeof shared, " shared %d", S);
    snprintf(what, sizeof what, "layer T %d H %d I %d E %d K %d%s %s", h->T, h->H, h->I, h->E, h->K,
             shared, bench_routing_name[r->routing]);
    if (dense_ms > 0) bench_row_dense(s, what, ms, flops, dense_ms);
    else bench_row(s, what, ms, (flops + shared_flops) / ms * 1e-9, "TFLOPS", 1.0, "the layer");
    if (r->routing >= BENCH_FIRST_SKEWED)
        bench_row(s, "    rate per useful FLOP", ms, flops / ms * 1e-9, "TFLOPS", balanced_ms / ms,
                  "balanced");
    for (int i = 0; i < r->parts; ++i) {
        const int part = r->part[i].part;
        const double part_ms = r->call[1 + i].ms;
        snprintf(what, sizeof what, "    %s", moe_layer_part_name(part));
        bench_row(s, what, part_ms,
                  part == MOE_LAYER_UP            ? flops * 2 / 3 / part_ms * 1e-9
                  : part == MOE_LAYER_DOWN        ? flops / 3 / part_ms * 1e-9
                  : part == MOE_LAYER_SHARED_UP   ? shared_flops * 2 / 3 / part_ms * 1e-9
                  : part == MOE_LAYER_SHARED_DOWN ? shared_flops / 3 / part_ms * 1e-9
                  : part == MOE_LAYER_ROUTER      ? 2.0 * h->T * h->H * h->E / part_ms * 1e-9
                  : part == MOE_LAYER_COMBINE
                      ? (slots + h->T * (S ? 2.0 : 1.0)) * h->H * 2 / part_ms * 1e-9
                  : part == MOE_LAYER_GATE
                      ? (double)h->T * (4.0 * h->E + 8.0 * h->K) / part_ms * 1e-9
                      : (double)h->T * 16.0 * h->K / part_ms * 1e-9,
                  part != MOE_LAYER_GATE && part != MOE_LAYER_ROUTE && part != MOE_LAYER_COMBINE
                      ? "TFLOPS"
                      : "TB/s",
                  part_ms / ms, "the layer");
    }
}

/* routings: bits of bench_routing.h; S: width of the shared expert, 0: none. */
static void run_shape(bench_state* s, const bench_blas* blas, const bench_shape* h,
                      unsigned routings, int S, int* failures)
{
    const int with_dense = !S && bench_dense_applies(h);
    routed_layer layer[BENCH_ROUTINGS];
    bench_gemm dense[2];
    bench_call call[BENCH_ROUTINGS * (1 + MOE_LAYER_PARTS) + 2];
    int layers = 0, calls = 0;
    double dense_ms = 0.0, balanced_ms = 0.0;
    moe_layer_desc l;
    memset(&l, 0, sizeof l);
    l.x = bench_random((int64_t)h->T * h->H, MOE_BF16, 1.0f, 1);
    l.w1.base =
        bench_random((int64_t)h->E * 2 * h->I * h->H, MOE_BF16, 1.0f / sqrtf((float)h->H), 3);
    l.w2.base = bench_random((int64_t)h->E * h->H * h->I, MOE_BF16, 1.0f / sqrtf((float)h->I), 4);
    l.num_tokens = h->T, l.hidden = h->H, l.intermediate = h->I, l.num_experts = h->E,
    l.top_k = h->K;
    l.gate.renormalize = 1;
    if (S) {
        l.shared.w1.base =
            bench_random((int64_t)2 * S * h->H, MOE_BF16, 1.0f / sqrtf((float)h->H), 5);
        l.shared.w2.base = bench_random((int64_t)h->H * S, MOE_BF16, 1.0f / sqrtf((float)S), 6);
        l.shared.intermediate = S;
    }
    for (int routing = 0; routing < BENCH_ROUTINGS; ++routing) {
        routed_layer* r = &layer[layers];
        if (!(routings >> routing & 1)) continue;
        memset(r, 0, sizeof *r);
        r->routing = routing, r->l = l, r->call = &call[calls];
        open_layer(s, r, h, failures);
        calls += layer_calls(r);
        ++layers;
    }
    if (with_dense) bench_dense_open(s, blas, h, dense, &call[calls]);
    bench_alternate(s, call, calls + 2 * with_dense);
    bench_note_clocks(s, run_layer, &layer[0].p, layer[0].call[0].ms);
    if (with_dense) dense_ms = call[calls].ms + call[calls + 1].ms;
    for (int i = 0; i < layers; ++i)
        if (layer[i].routing == BENCH_BALANCED) balanced_ms = layer[i].call[0].ms;
    for (int i = 0; i < layers; ++i) print_layer(s, &layer[i], h, dense_ms, balanced_ms);
    if (with_dense) {
        bench_dense_rows(s, &call[calls], 6.0 * h->T * h->K * h->H * h->I);
        bench_gemm_free_random(&dense[0]), bench_gemm_free_random(&dense[1]);
    }
    for (int i = 0; i < layers; ++i) {
        const moe_layer_desc* own = &layer[i].l;
        cudaFree((void*)own->router), cudaFree((void*)own->logits);
        cudaFree(own->y), cudaFree(own->workspace);
    }
    cudaFree((void*)l.x), cudaFree((void*)l.w1.base), cudaFree((void*)l.w2.base);
    cudaFree((void*)l.shared.w1.base), cudaFree((void*)l.shared.w2.base);
}

int main(int argc, char** argv)
{
    static const bench_shape few[] = {{256, 4096, 1536, 128, 8}, {64, 7168, 2048, 256, 8}};
    static const bench_shape deepseek_v3 = {8192, 7168, 2048, 256, 8};
    bench_runs runs;
    bench_state s = bench_open_runs(argc, argv, "MoE layer, bf16, SwiGLU", &runs);
    bench_blas blas = bench_blas_open(&s, 0);
    int failures = 0;
    for (int i = 0; i < runs.count; ++i)
        run_shape(&s, &blas, &runs.shape[i], runs.routings[i], 0, &failures);
    if (runs.listed) {
        run_shape(&s, &blas, &deepseek_v3, 1u << BENCH_RANDOM, 2048, &failures);
        for (int i = 0; i < 2; ++i) run_shape(&s, &blas, &few[i], 1u << BENCH_RANDOM, 0, &failures);
    }
    bench_blas_close(&blas);
    return bench_close(&s, failures);
}
