/* The experts' MLP through the grouped GEMM, each product compared with cuBLAS dense of the same
   flops.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_experts.cu -lcublas -lcublasLt -o bench_experts

     --shape T,H,I,E,K, --routing KIND    bench_routing.h; without both, also other activations and
                                          few tokens
     --csv FILE, --reps N

   Floor: 2 rows n k flops at cuBLAS's rate for one dense product of that shape, all products of a
   shape in turn; for few tokens, the bytes of the weights at the copy rate. Each routing has ids of
   its own, which route turns into rows before anything is timed. */
#include "bench_blas.h"
#include "bench_routing.h"

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

/* The experts under one routing. */
typedef struct routed_experts {
    int routing, touched; /* experts that have rows */
    moe_experts_desc d;
    moe_route_desc r;
    bench_call* call; /* [2]: up, down */
} routed_experts;

/* Routes the ids of e->routing: sets e->r, e->touched and the rows in e->d. */
static void route_experts(bench_state* s, routed_experts* e, const bench_shape* h)
{
    const size_t slots = (size_t)h->T * (size_t)h->K;
    moe_route_desc* r = &e->r;
    int32_t *ids = bench_routing_ids(h, e->routing),
            *count = (int32_t*)malloc((size_t)h->E * sizeof(int32_t));
    r->ids = (int32_t*)bench_upload(ids, slots * 4);
    r->expert_count = (int32_t*)bench_alloc((size_t)h->E * 4);
    r->expert_offset = (int32_t*)bench_alloc((size_t)h->E * 4 + 4);
    r->row_slot = (int32_t*)bench_alloc(slots * 4);
    r->num_tokens = h->T, r->num_experts = h->E, r->top_k = h->K;
    BENCH_MOE(moe_route_workspace(r, &r->workspace_bytes));
    r->workspace = bench_alloc(r->workspace_bytes);
    BENCH_MOE(moe_route(r, s->stream));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemcpy(count, r->expert_count, (size_t)h->E * 4, cudaMemcpyDeviceToHost));
    for (int i = 0; i < h->E; ++i) e->touched += count[i] > 0;
    free(ids), free(count);
    e->d.expert_offset = r->expert_offset;
    e->d.row_slot = r->row_slot;
}

/* Returns what follows the shape in a row's name. */
static const char* activation_name(int activation)
{
    return activation == MOE_ACTIVATION_GEGLU            ? " GEGLU"
           : activation == MOE_ACTIVATION_SWIGLU_CLAMPED ? " SwiGLU clamped"
                                                         : "";
}

/* Routes and verifies; e->d is filled in but for what its routing decides. */
static void open_experts(bench_state* s, routed_experts* e, const bench_shape* h, int* failures)
{
    const size_t rows = (size_t)h->T * (size_t)h->K;
    moe_experts_desc* d = &e->d;
    moe_gemm_plan up, down;
    unsigned worst = 0;
    check_args check;
    moe_launch_config l = moe_grid(67, 256, 0, s->stream);
    route_experts(s, e, h);
    d->act = bench_alloc(rows * (size_t)h->I * 2);
    d->rows = bench_alloc(rows * (size_t)h->H * 2);
    d->workspace_bytes = MOE_EXPERTS_WORKSPACE;
    d->workspace = bench_alloc(d->workspace_bytes);
    BENCH_MOE(moe_experts_plan(d, &up, &down));
    BENCH_CUDA(cudaMemset(d->act, 0xff, rows * (size_t)h->I * 2));
    BENCH_CUDA(cudaMemset(d->rows, 0xff, rows * (size_t)h->H * 2));
    BENCH_MOE(moe_experts(d, s->stream));
    check.d = *d;
    check.step = (int)(rows / 67 + 1);
    BENCH_WORST(check_experts, l, check, worst);
    *failures += !(moe_f32_from_bits(worst) <= 1.0f);
    printf("T %d H %d I %d E %d K %d %s%s: %d experts have rows; worst error %.2f of its bound; "
           "path %s, tiles %dx%dx%d, %dx%dx%d\n",
           h->T, h->H, h->I, h->E, h->K, bench_routing_name[e->routing],
           activation_name(d->activation), e->touched, moe_f32_from_bits(worst),
           moe_gemm_path_name(up.path), up.tile_m, up.tile_n, up.tile_k, down.tile_m, down.tile_n,
           down.tile_k);
}

static void close_experts(routed_experts* e)
{
    cudaFree((void*)e->r.ids), cudaFree(e->r.expert_count), cudaFree(e->r.expert_offset);
    cudaFree(e->r.row_slot), cudaFree(e->r.workspace);
    cudaFree(e->d.act), cudaFree(e->d.rows), cudaFree(e->d.workspace);
}

/* Prints the rows of one routing. dense: cuBLAS's two calls, null for few tokens, where the peer is
   the copy rate; balanced_ms: of both products, used by skewed routings. */
static void print_experts(bench_state* s, const routed_experts* e, const bench_shape* h,
                          const bench_call* dense, double balanced_ms)
{
    const double flops = 2.0 * (double)h->T * h->K * h->H * h->I; /* of the down product */
    const double ms[2] = {e->call[0].ms, e->call[1].ms}, both = ms[0] + ms[1];
    for (int i = 0; i < 2; ++i) {
        const double bytes = (double)e->touched * (i ? 1 : 2) * h->I * h->H * 2; /* of weights */
        char what[112];
        snprintf(what, sizeof what, "%s T %d H %d I %d E %d K %d %s%s", i ? "down" : "up  ", h->T,
                 h->H, h->I, h->E, h->K, bench_routing_name[e->routing],
                 activation_name(e->d.activation));
        if (dense) bench_row_dense(s, what, ms[i], (i ? 1 : 2) * flops, dense[i].ms);
        else
            bench_row(s, what, ms[i], bytes / ms[i] * 1e-9, "TB/s",
                      bytes / s->copy_rate * 1e3 / ms[i], "weights at copy rate");
    }
    if (dense) bench_row_dense(s, "both", both, 3 * flops, dense[0].ms + dense[1].ms);
    if (e->routing >= BENCH_FIRST_SKEWED)
        bench_row(s, "both, rate per useful FLOP", both, 3 * flops / both * 1e-9, "TFLOPS",
                  balanced_ms / both, "balanced");
}

/* routings: bits of bench_routing.h. */
static void run_shape(bench_state* s, const bench_blas* blas, const bench_shape* h,
                      unsigned routings, int activation, int* failures)
{
    const int with_dense = bench_dense_applies(h);
    routed_experts experts[BENCH_ROUTINGS];
    bench_gemm dense[2];
    bench_call call[2 * BENCH_ROUTINGS + 2], *peer = 0;
    int kinds = 0, calls;
    double balanced_ms = 0.0;
    moe_experts_desc d;
    memset(&d, 0, sizeof d);
    d.x = bench_random((int64_t)h->T * h->H, MOE_BF16, 1.0f, 1);
    d.w1.base =
        bench_random((int64_t)h->E * 2 * h->I * h->H, MOE_BF16, 1.0f / sqrtf((float)h->H), 2);
    d.w2.base = bench_random((int64_t)h->E * h->H * h->I, MOE_BF16, 1.0f / sqrtf((float)h->I), 3);
    d.num_tokens = h->T, d.hidden = h->H, d.intermediate = h->I, d.num_experts = h->E,
    d.top_k = h->K;
    d.activation = activation;
    for (int routing = 0; routing < BENCH_ROUTINGS; ++routing) {
        routed_experts* e = &experts[kinds];
        if (!(routings >> routing & 1)) continue;
        memset(e, 0, sizeof *e);
        e->routing = routing, e->d = d, e->call = &call[2 * kinds];
        open_experts(s, e, h, failures);
        e->call[0] = bench_one(run_up, &e->d);
        e->call[1] = bench_one(run_down, &e->d);
        ++kinds;
    }
    calls = 2 * kinds;
    if (with_dense) {
        peer = &call[calls];
        bench_dense_open(s, blas, h, dense, peer);
        calls += 2;
    }
    bench_alternate(s, call, calls);
    bench_note_clocks(s, run_up, &experts[0].d, call[0].ms);
    if (with_dense) bench_note_clocks(s, bench_run_gemm, &dense[0], peer[0].ms);
    for (int i = 0; i < kinds; ++i)
        if (experts[i].routing == BENCH_BALANCED)
            balanced_ms = experts[i].call[0].ms + experts[i].call[1].ms;
    for (int i = 0; i < kinds; ++i) {
        print_experts(s, &experts[i], h, peer, balanced_ms);
        close_experts(&experts[i]);
    }
    if (with_dense) {
        bench_dense_rows(s, peer, 6.0 * h->T * h->K * h->H * h->I);
        bench_gemm_free_random(&dense[0]), bench_gemm_free_random(&dense[1]);
    }
    cudaFree((void*)d.x), cudaFree((void*)d.w1.base), cudaFree((void*)d.w2.base);
}

int main(int argc, char** argv)
{
    static const bench_shape few[] = {{64, 7168, 2048, 256, 8}, {256, 4096, 1536, 128, 8}};
    const unsigned random = 1u << BENCH_RANDOM;
    bench_runs runs;
    bench_state s =
        bench_open_runs(argc, argv, "expert MLP, bf16, SwiGLU where nothing else is said", &runs);
    bench_blas blas = bench_blas_open(&s, 0);
    int failures = 0;
    for (int i = 0; i < runs.count; ++i)
        run_shape(&s, &blas, &runs.shape[i], runs.routings[i], 0, &failures);
    if (runs.listed) {
        run_shape(&s, &blas, &bench_listed[0], random, MOE_ACTIVATION_GEGLU, &failures);
        run_shape(&s, &blas, &bench_listed[0], random, MOE_ACTIVATION_SWIGLU_CLAMPED, &failures);
        for (int i = 0; i < 2; ++i) run_shape(&s, &blas, &few[i], random, 0, &failures);
    }
    bench_blas_close(&blas);
    return bench_close(&s, failures);
}
