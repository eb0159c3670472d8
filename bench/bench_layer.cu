/* The whole layer, router to combine, and each of its parts.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_layer.cu -o bench_layer

   Rate: the 6 T K H I flops of the experts over the layer's time. Layer and parts are timed in
   turn. Also checked: the workspace has exactly the bytes of the formula in layer.cuh, and a call
   takes no other device memory. */
#include "bench.h"

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
   largest error of that rounding; worst[2]: largest error of a logit over its bound. */
typedef struct check_args {
    moe_layer_desc l;
    moe_layer_view v;
    float* act; /* [blocks, 2, K * I + shared width]: exact, rounded */
    int step;
    unsigned* worst;
} check_args;

MOE_KERNEL(256, 1) check_layer(MOE_ARG(check_args) a)
{
    const int64_t H = a.l.hidden, I = a.l.intermediate, K = a.l.top_k, E = a.l.num_experts;
    const int64_t S = a.l.shared.intermediate, acts = K * I + S;
    const int64_t t = (int64_t)blockIdx.x * a.step;
    float *act = a.act + (int64_t)blockIdx.x * 2 * acts, *act_rounded = act + acts;
    for (int64_t e = threadIdx.x; e < E; e += 256) {
        double sum = 0.0, size = 0.0;
        for (int64_t h = 0; h < H; ++h) {
            const double p = (double)moe_load_f32(a.l.x, t * H + h, MOE_BF16) *
                             moe_load_f32(a.l.router, e * H + h, MOE_BF16);
            sum += p;
            size += fabs(p);
        }
        {
            const float ratio = (float)(fabs(a.v.logits[t * E + e] - sum) /
                                        ((H / 16 + 2) * size / 8388608.0));
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

/* S: width of the shared expert; 0: none. */
static void run_shape(bench_state* s, int T, int H, int I, int E, int K, int S, int* failures)
{
    const uint64_t slots = (uint64_t)T * (uint64_t)K;
    const double flops = 6.0 * (double)slots * H * I, shared_flops = 6.0 * (double)T * H * S;
    const uint64_t formula =
        rounded((uint64_t)T * (uint64_t)E * 4) + 2 * rounded(slots * 4) +
        rounded((uint64_t)E * (uint64_t)moe_num_chunks(T) * 4) + rounded((uint64_t)E * 4) +
        rounded((uint64_t)E * 4 + 4) + rounded(slots * 4) + rounded(slots * 8) +
        rounded(2 * MOE_EXPERTS_WORKSPACE) + rounded(slots * (uint64_t)I * 2) +
        rounded(slots * (uint64_t)H * 2) +
        (S ? rounded((uint64_t)T * (uint64_t)S * 2) + rounded((uint64_t)T * (uint64_t)H * 2) : 0);
    moe_layer_desc l;
    moe_layer_prepared p;
    check_args check;
    unsigned worst[3];
    size_t free_before, free_after, total;
    char what[96];
    bench_call call[1 + MOE_LAYER_PARTS];
    part_job job[1 + MOE_LAYER_PARTS];
    int calls = 1;
    double ms;
    moe_launch_config c = moe_grid(16, 256, 0, s->stream);
    memset(&l, 0, sizeof l);
    l.x = bench_random((int64_t)T * H, MOE_BF16, 1.0f, 1);
    l.router = bench_random((int64_t)E * H, MOE_BF16, 1.0f / sqrtf((float)H), 2);
    l.w1.base = bench_random((int64_t)E * 2 * I * H, MOE_BF16, 1.0f / sqrtf((float)H), 3);
    l.w2.base = bench_random((int64_t)E * H * I, MOE_BF16, 1.0f / sqrtf((float)I), 4);
    l.y = bench_alloc((size_t)T * (size_t)H * 2);
    l.num_tokens = T, l.hidden = H, l.intermediate = I, l.num_experts = E, l.top_k = K;
    l.gate.renormalize = 1;
    if (S) {
        l.shared.w1.base = bench_random((int64_t)2 * S * H, MOE_BF16, 1.0f / sqrtf((float)H), 5);
        l.shared.w2.base = bench_random((int64_t)H * S, MOE_BF16, 1.0f / sqrtf((float)S), 6);
        l.shared.intermediate = S;
    }
    BENCH_MOE(moe_layer_workspace(&l, &l.workspace_bytes));
    *failures += l.workspace_bytes != formula;
    l.workspace = bench_alloc(l.workspace_bytes);
    BENCH_CUDA(cudaMemset(l.workspace, 0xff, l.workspace_bytes));
    BENCH_CUDA(cudaMemset(l.y, 0xff, (size_t)T * (size_t)H * 2));
    BENCH_MOE(moe_preload());
    BENCH_CUDA(cudaMemGetInfo(&free_before, &total));
    BENCH_MOE(moe_layer_prepare(&l, &p));
    BENCH_MOE(moe_layer_run(&p, s->stream));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemGetInfo(&free_after, &total));
    *failures += free_after != free_before;

    check.l = l;
    BENCH_MOE(moe_layer_get_view(&l, &check.v));
    check.step = T / 16;
    check.act = (float*)bench_alloc(16 * 2 * ((size_t)K * (size_t)I + (size_t)S) * 4);
    BENCH_WORST(check_layer, c, check, worst);
    {
        const float error = moe_f32_from_bits(worst[0]), bound = 2 * moe_f32_from_bits(worst[1]) + 1e-5f;
        const float logit = moe_f32_from_bits(worst[2]);
        *failures += !(error <= bound) || !(logit <= 1.0f);
        printf("T %d H %d I %d E %d K %d shared %d: error %.2g (bound %.2g), logits %.2f of theirs; workspace %.2f GiB "
               "= the formula's, other memory %lld bytes; tiles %dx%d, %dx%d\n",
               T, H, I, E, K, S, error, bound, logit, (double)l.workspace_bytes / (1 << 30),
               (long long)(free_before - free_after), p.experts.up.plan.tile_m,
               p.experts.up.plan.tile_n, p.experts.down.plan.tile_m, p.experts.down.plan.tile_n);
    }
    call[0] = bench_one(run_layer, &p);
    for (int part = 0; part < MOE_LAYER_PARTS; ++part) {
        if (!S && (part == MOE_LAYER_SHARED_UP || part == MOE_LAYER_SHARED_DOWN)) continue;
        job[calls].layer = &p;
        job[calls].part = part;
        call[calls] = bench_one(run_part, &job[calls]);
        ++calls;
    }
    bench_alternate(s, call, calls);
    ms = call[0].ms;
    snprintf(what, sizeof what, "layer T %d H %d I %d E %d K %d", T, H, I, E, K);
    if (S) snprintf(what + strlen(what), sizeof what - strlen(what), " shared %d", S);
    bench_row(s, what, ms, (flops + shared_flops) / ms * 1e-9, "TFLOPS", 1.0, "the layer");
    bench_note_clocks(s, run_layer, &p, ms);
    for (int i = 1; i < calls; ++i) {
        const int part = job[i].part;
        const double part_ms = call[i].ms;
        snprintf(what, sizeof what, "    %s", moe_layer_part_name(part));
        bench_row(s, what, part_ms,
                  part == MOE_LAYER_UP            ? flops * 2 / 3 / part_ms * 1e-9
                  : part == MOE_LAYER_DOWN        ? flops / 3 / part_ms * 1e-9
                  : part == MOE_LAYER_SHARED_UP   ? shared_flops * 2 / 3 / part_ms * 1e-9
                  : part == MOE_LAYER_SHARED_DOWN ? shared_flops / 3 / part_ms * 1e-9
                  : part == MOE_LAYER_ROUTER      ? 2.0 * T * H * E / part_ms * 1e-9
                  : part == MOE_LAYER_COMBINE
                      ? ((double)slots + T * (S ? 2.0 : 1.0)) * H * 2 / part_ms * 1e-9
                  : part == MOE_LAYER_GATE ? (double)T * (4.0 * E + 8.0 * K) / part_ms * 1e-9
                                           : (double)T * 16.0 * K / part_ms * 1e-9,
                  part != MOE_LAYER_GATE && part != MOE_LAYER_ROUTE && part != MOE_LAYER_COMBINE
                      ? "TFLOPS"
                      : "TB/s",
                  part_ms / ms, "the layer");
    }
    cudaFree((void*)l.x), cudaFree((void*)l.router), cudaFree((void*)l.w1.base);
    cudaFree((void*)l.shared.w1.base), cudaFree((void*)l.shared.w2.base);
    cudaFree((void*)l.w2.base), cudaFree(l.y), cudaFree(l.workspace), cudaFree(check.act);
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, "MoE layer, bf16, SwiGLU");
    int failures = 0;
    run_shape(&s, 32768, 4096, 1536, 128, 8, 0, &failures);
    run_shape(&s, 24576, 1536, 256, 128, 8, 0, &failures);
    run_shape(&s, 16384, 4096, 14336, 8, 2, 0, &failures);
    run_shape(&s, 8192, 7168, 2048, 256, 8, 0, &failures);
    run_shape(&s, 8192, 7168, 2048, 256, 8, 2048, &failures); /* DeepSeek-V3's shared expert */
    run_shape(&s, 256, 4096, 1536, 128, 8, 0, &failures);
    run_shape(&s, 64, 7168, 2048, 256, 8, 0, &failures);
    return bench_close(&s, failures);
}
