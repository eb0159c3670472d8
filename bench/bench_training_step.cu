/* A whole step of training, in one CUDA graph: the pointer table against cat + index_add.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_training_step.cu -o bench_training_step

     --shape T,H,I,E,K    bench_routing.h; without it 24576,16384,256,256,8
     --csv FILE, --reps N

   Both steps run forward, backward and plain SGD in bf16 over the same weights, with the same expert
   products. The loss is <y, dy> with a fixed dy.
     table      layer.cuh and layer_backward.cuh. Rows stay where a product wrote them
     cat        what a framework does with tensors: index_select copies tokens into expert order, each
                expert's rows are a tensor of its own, cat joins them, rows times weights, index_add.
                Backward: the copies of each of them. From forward to backward are kept: tokens in
                expert order, pre, act, cat

   Memory: what both hold at their peak, in buffers: weights and gradients, what is kept, what a pass
   needs. Of cat's rows [R, H] four are alive at one time, so four buffers serve them: what is no
   longer needed gives its place. Checked: y, dx and the gradients of the weights agree, by norm, within
   the roundings of cat's copies. */
#include "bench_routing.h"

#include "../moe/layer_backward.cuh"

/* Rows, elementwise: one thread block a row, 16-byte vectors. */
typedef struct rows_args {
    const uint16_t *a, *b; /* [.., H] */
    uint16_t* c;           /* [.., H] */
    const int32_t *offset, *row_slot, *slot_row;
    const float* weights;
    float* dweights;
    const void* const* table; /* [E] rows of each expert */
    int64_t n;
    int H, E, K, plus; /* plus: adds to c */
    float rate;
} rows_args;

static __device__ void load8(float* v, const uint16_t* p)
{
    moei_unpack_8(v, *(const uint4*)p, MOE_BF16);
}

static __device__ void store8(uint16_t* p, const float* v)
{
    *(uint4*)p = moei_pack_8(v, MOE_BF16);
}

/* cat: joins the experts' rows. */
MOE_KERNEL(256, 1) cat_rows(MOE_ARG(rows_args) a)
{
    const int r = (int)blockIdx.x;
    int lo = 0, hi = a.E;
    if (r >= a.offset[a.E]) return;
    while (hi - lo > 1) {
        const int mid = (lo + hi) / 2;
        if (a.offset[mid] <= r) lo = mid;
        else hi = mid;
    }
    const uint4* from =
        (const uint4*)((const uint16_t*)a.table[lo] + (int64_t)(r - a.offset[lo]) * a.H);
    for (int i = (int)threadIdx.x; i < a.H / 8; i += 256)
        ((uint4*)(a.c + (int64_t)r * a.H))[i] = from[i];
}

/* c = a times the row's weight: of cat, and of the gradient of the weighted rows. */
MOE_KERNEL(256, 1) weigh_rows(MOE_ARG(rows_args) a)
{
    const int64_t r = blockIdx.x;
    const int slot = a.row_slot[r];
    const float w = slot < 0 ? 0.0f : a.weights[slot];
    for (int i = (int)threadIdx.x * 8; i < a.H; i += 256 * 8) {
        float v[8];
        load8(v, a.a + r * a.H + i);
        for (int j = 0; j < 8; ++j) v[j] *= w;
        store8(a.c + r * a.H + i, v);
    }
}

/* index_add: the sum of a token's rows, to c. */
MOE_KERNEL(256, 1) add_rows(MOE_ARG(rows_args) a)
{
    const int64_t t = blockIdx.x;
    for (int i = (int)threadIdx.x * 8; i < a.H; i += 256 * 8) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0}, v[8];
        if (a.plus) load8(sum, a.c + t * a.H + i);
        for (int k = 0; k < a.K; ++k) {
            const int r = a.slot_row[t * a.K + k];
            if (r < 0) continue;
            load8(v, a.a + (int64_t)r * a.H + i);
            for (int j = 0; j < 8; ++j) sum[j] += v[j];
        }
        store8(a.c + t * a.H + i, sum);
    }
}

/* dweights[slot] = <a, b>: of the gradient of the weighted rows and of cat. */
MOE_KERNEL(256, 1) dot_rows(MOE_ARG(rows_args) a)
{
    __shared__ float part[8];
    const int64_t r = blockIdx.x;
    const int slot = a.row_slot[r];
    float sum = 0.0f;
    for (int i = (int)threadIdx.x * 8; i < a.H; i += 256 * 8) {
        float v[8], w[8];
        load8(v, a.a + r * a.H + i), load8(w, a.b + r * a.H + i);
        for (int j = 0; j < 8; ++j) sum += v[j] * w[j];
    }
    sum = moe_warp_sum(sum, 32);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0 || slot < 0) return;
    for (int i = 1; i < 8; ++i) sum += part[i];
    a.dweights[slot] = sum;
}

/* SGD: c -= rate a. */
MOE_KERNEL(256, 1) sgd(MOE_ARG(rows_args) a)
{
    const int64_t i = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 8;
    float v[8], g[8];
    if (i >= a.n) return;
    load8(v, a.c + i), load8(g, a.a + i);
    for (int j = 0; j < 8; ++j) v[j] -= a.rate * g[j];
    store8(a.c + i, v);
}

/* What both steps have, and each one's own. */
typedef struct step {
    bench_shape h;
    int64_t R;
    uint16_t *x, *y, *dy, *dx, *weight[3], *grad[3]; /* router, w1, w2 */
    int64_t numbers[3];
    size_t bytes; /* that this step holds */
    /* table */
    moe_layer_prepared forward;
    moe_layer_backward_prepared backward;
    /* cat */
    moe_router_prepared router;
    moe_gate_prepared gate;
    moe_route_prepared route;
    moe_permute_prepared select_x, select_dy;
    moe_experts_prepared experts;
    moe_experts_backward_prepared experts_backward;
    moe_gate_backward_prepared gate_backward;
    moe_router_backward_prepared router_backward;
    rows_args cat, weigh, add, dcat, dot, add_dx;
    cudaGraphExec_t exec;
} step;

static void* take(step* s, size_t bytes)
{
    s->bytes += (bytes + 511) / 512 * 512;
    return bench_alloc(bytes);
}

static void run_rows(void (*kernel)(rows_args), int64_t blocks, const rows_args* a,
                     cudaStream_t stream)
{
    void* args[] = {(void*)a};
    BENCH_CUDA(
        cudaLaunchKernel((const void*)kernel, dim3((unsigned)blocks), dim3(256), args, 0, stream));
}

static void update(const step* s, cudaStream_t stream)
{
    for (int i = 0; i < 3; ++i) {
        rows_args a;
        memset(&a, 0, sizeof a);
        a.a = s->grad[i], a.c = s->weight[i], a.n = s->numbers[i],
        a.rate = 1e-20f; /* both ways keep the same weights */
        run_rows(sgd, (a.n / 8 + 255) / 256, &a, stream);
    }
}

static void queue_table(void* context, cudaStream_t stream)
{
    const step* s = (const step*)context;
    BENCH_MOE(moe_layer_run(&s->forward, stream));
    BENCH_MOE(moe_layer_backward_run(&s->backward, stream));
    update(s, stream);
}

static void queue_cat(void* context, cudaStream_t stream)
{
    const step* s = (const step*)context;
    const moe_experts_backward_prepared* b = &s->experts_backward;
    BENCH_MOE(moe_router_run(&s->router, stream));
    BENCH_MOE(moe_gate_run(&s->gate, stream));
    BENCH_MOE(moe_route_run(&s->route, stream));
    BENCH_MOE(moe_permute_run(&s->select_x, stream));
    BENCH_MOE(moe_experts_run(&s->experts, stream));
    run_rows(cat_rows, s->R, &s->cat, stream);
    run_rows(weigh_rows, s->R, &s->weigh, stream);
    run_rows(add_rows, s->h.T, &s->add, stream);

    BENCH_MOE(moe_permute_run(&s->select_dy, stream));
    run_rows(weigh_rows, s->R, &s->dcat, stream);
    run_rows(dot_rows, s->R, &s->dot, stream);
    BENCH_MOE(moe_experts_backward_run(b, stream));
    BENCH_MOE(moe_gate_backward_run(&s->gate_backward, stream));
    BENCH_MOE(moe_router_backward_run(&s->router_backward, stream));
    run_rows(add_rows, s->h.T, &s->add_dx, stream);
    update(s, stream);
}

static void run_step(void* context, cudaStream_t stream)
{
    BENCH_CUDA(cudaGraphLaunch(((step*)context)->exec, stream));
}

/* Weights, gradients, tokens. */
static void open_step(step* s, const bench_shape* h)
{
    const int64_t H = h->H, I = h->I, E = h->E;
    const int64_t numbers[3] = {E * H, E * 2 * I * H, E * H * I};
    memset(s, 0, sizeof *s);
    s->h = *h, s->R = (int64_t)h->T * h->K;
    for (int i = 0; i < 3; ++i) {
        s->numbers[i] = numbers[i];
        s->weight[i] = (uint16_t*)bench_random(
            numbers[i], MOE_BF16, 1.0f / sqrtf((float)(i < 2 ? H : I)), (uint32_t)i + 2);
        s->grad[i] = (uint16_t*)take(s, (size_t)numbers[i] * 2);
        s->bytes += (size_t)numbers[i] * 2;
    }
    s->x = (uint16_t*)bench_random(h->T * H, MOE_BF16, 1.0f, 1);
    s->dy = (uint16_t*)bench_random(h->T * H, MOE_BF16, 1.0f, 5);
    s->y = (uint16_t*)take(s, (size_t)(h->T * H) * 2);
    s->dx = (uint16_t*)take(s, (size_t)(h->T * H) * 2);
    s->bytes += 2 * (size_t)(h->T * H) * 2;
}

static void open_table(step* s)
{
    moe_layer_desc l;
    moe_layer_backward_desc b;
    moe_layer_saved_list list;
    size_t backward;
    memset(&l, 0, sizeof l), memset(&b, 0, sizeof b);
    l.x = s->x, l.router = s->weight[0], l.w1.base = s->weight[1], l.w2.base = s->weight[2];
    l.y = s->y;
    l.num_tokens = s->h.T, l.hidden = s->h.H, l.intermediate = s->h.I, l.num_experts = s->h.E;
    l.top_k = s->h.K, l.gate.renormalize = 1;
    BENCH_MOE(moe_layer_saved(&l, &list));
    l.saved = take(s, list.bytes), l.saved_bytes = list.bytes;
    b.layer = l;
    b.dy = s->dy, b.dx = s->dx, b.drouter = s->grad[0];
    b.dw1.base = s->grad[1], b.dw2.base = s->grad[2];
    BENCH_MOE(moe_layer_workspace(&l, &l.workspace_bytes));
    BENCH_MOE(moe_layer_backward_workspace(&b, &backward));
    if (backward > l.workspace_bytes) l.workspace_bytes = backward;
    l.workspace = take(s, l.workspace_bytes);
    b.layer = l;
    BENCH_MOE(moe_layer_prepare(&l, &s->forward));
    BENCH_MOE(moe_layer_backward_prepare(&b, &s->backward));
}

/* The buffers of cat. Four rows [R, H] are alive in backward: x in expert order, cat, the gradient of
   the weighted rows and that of cat. The place of the third serves first the experts' rows, then the
   weighted rows, and last the gradient of x by rows. */
static void open_cat(step* s)
{
    const bench_shape* h = &s->h;
    const int64_t R = s->R, H = h->H, I = h->I;
    const size_t wide = (size_t)(R * H) * 2;
    moe_router_desc router;
    moe_gate_desc gate;
    moe_route_desc route;
    moe_permute_desc select;
    moe_experts_desc e;
    moe_experts_backward_desc b;
    moe_gate_backward_desc gb;
    moe_router_backward_desc rb;
    void** table = (void**)malloc((size_t)h->E * sizeof(void*));
    uint16_t *xs = (uint16_t*)take(s, wide), *rows = (uint16_t*)take(s, wide);
    uint16_t *cat = (uint16_t*)take(s, wide), *dcat = (uint16_t*)take(s, wide);
    rows_args a;
    memset(&router, 0, sizeof router), memset(&gate, 0, sizeof gate);
    memset(&route, 0, sizeof route), memset(&select, 0, sizeof select);
    memset(&e, 0, sizeof e), memset(&b, 0, sizeof b), memset(&gb, 0, sizeof gb);
    memset(&rb, 0, sizeof rb), memset(&a, 0, sizeof a);

    router.x = s->x, router.router = s->weight[0];
    router.logits = (float*)take(s, (size_t)h->T * (size_t)h->E * 4);
    router.num_tokens = h->T, router.hidden = h->H, router.num_experts = h->E;
    gate.logits = router.logits, gate.renormalize = 1;
    gate.ids = (int32_t*)take(s, (size_t)R * 4), gate.weights = (float*)take(s, (size_t)R * 4);
    gate.num_tokens = h->T, gate.num_experts = h->E, gate.top_k = h->K;
    route.ids = gate.ids, route.weights = gate.weights;
    route.expert_count = (int32_t*)take(s, (size_t)h->E * 4);
    route.expert_offset = (int32_t*)take(s, (size_t)h->E * 4 + 4);
    route.row_slot = (int32_t*)take(s, (size_t)R * 4);
    route.slot_row = (int32_t*)take(s, (size_t)R * 4);
    route.num_tokens = h->T, route.num_experts = h->E, route.top_k = h->K;
    BENCH_MOE(moe_route_workspace(&route, &route.workspace_bytes));
    route.workspace = take(s, route.workspace_bytes);
    BENCH_MOE(moe_router_prepare(&router, &s->router));
    BENCH_MOE(moe_gate_prepare(&gate, &s->gate));
    BENCH_MOE(moe_route_prepare(&route, &s->route));

    /* a tensor for each expert's rows: their sizes are known on the host, as a framework knows them */
    BENCH_MOE(moe_router_run(&s->router, 0));
    BENCH_MOE(moe_gate_run(&s->gate, 0));
    BENCH_MOE(moe_route_run(&s->route, 0));
    BENCH_CUDA(cudaDeviceSynchronize());
    {
        int32_t* offset = (int32_t*)malloc((size_t)h->E * 4 + 4);
        BENCH_CUDA(
            cudaMemcpy(offset, route.expert_offset, (size_t)h->E * 4 + 4, cudaMemcpyDeviceToHost));
        for (int i = 0; i < h->E; ++i) table[i] = rows + (int64_t)offset[i] * H;
        free(offset);
    }
    a.table = (const void* const*)bench_upload(table, (size_t)h->E * sizeof(void*));
    free(table);

    select.x = s->x, select.row_slot = route.row_slot, select.slot_row = route.slot_row;
    select.y = xs, select.num_tokens = h->T, select.top_k = h->K, select.hidden = h->H;
    select.num_rows = R;
    BENCH_MOE(moe_permute_prepare(&select, &s->select_x));
    select.x = s->dy, select.y = rows;
    BENCH_MOE(moe_permute_prepare(&select, &s->select_dy));

    e.x = xs, e.w1.base = s->weight[1], e.w2.base = s->weight[2];
    e.expert_offset = route.expert_offset;
    e.act = take(s, (size_t)(R * I) * 2), e.pre = take(s, (size_t)(R * 2 * I) * 2);
    e.table = (void* const*)a.table;
    e.num_rows = (int32_t)R, e.hidden = h->H, e.intermediate = h->I, e.num_experts = h->E;
    e.workspace = take(s, MOE_EXPERTS_WORKSPACE), e.workspace_bytes = MOE_EXPERTS_WORKSPACE;
    BENCH_MOE(moe_experts_prepare(&e, &s->experts));

    a.H = h->H, a.E = h->E, a.K = h->K;
    a.offset = route.expert_offset, a.row_slot = route.row_slot, a.slot_row = route.slot_row;
    a.weights = gate.weights;
    s->cat = s->weigh = s->add = s->dcat = s->dot = s->add_dx = a;
    s->cat.c = cat;
    s->weigh.a = cat, s->weigh.c = rows;
    s->add.a = rows, s->add.c = s->y;
    s->dcat.a = rows, s->dcat.c = dcat;
    s->dot.a = rows, s->dot.b = cat;
    s->dot.dweights = (float*)take(s, (size_t)R * 4);
    s->add_dx.a = rows, s->add_dx.c = s->dx;
    s->add_dx.plus = 1; /* to the router's part */

    b.x = xs, b.dy = dcat, b.pre = e.pre, b.w1 = e.w1, b.w2 = e.w2;
    b.expert_offset = e.expert_offset, b.rows = rows;
    b.dw1.base = s->grad[1], b.dw2.base = s->grad[2];
    b.dpre = take(s, (size_t)(R * 2 * I) * 2), b.act = take(s, (size_t)(R * I) * 2);
    b.num_rows = (int32_t)R, b.hidden = h->H, b.intermediate = h->I, b.num_experts = h->E;
    b.workspace = take(s, MOE_EXPERTS_BACKWARD_WORKSPACE);
    b.workspace_bytes = MOE_EXPERTS_BACKWARD_WORKSPACE;
    BENCH_MOE(moe_experts_backward_prepare(&b, &s->experts_backward));

    gb.gate = gate, gb.dweights = s->dot.dweights;
    gb.dlogits = take(s, (size_t)h->T * (size_t)h->E * 4);
    BENCH_MOE(moe_gate_backward_prepare(&gb, &s->gate_backward));
    rb.x = s->x, rb.router = s->weight[0], rb.dlogits = (const float*)gb.dlogits;
    rb.dx = s->dx, rb.drouter = s->grad[0];
    rb.num_tokens = h->T, rb.hidden = h->H, rb.num_experts = h->E;
    BENCH_MOE(moe_router_backward_workspace(&rb, &rb.workspace_bytes));
    rb.workspace = take(s, rb.workspace_bytes);
    BENCH_MOE(moe_router_backward_prepare(&rb, &s->router_backward));
}

static void capture(bench_state* s, step* of, bench_fn queue)
{
    cudaGraph_t graph;
    queue(of, s->stream); /* loads all kernels */
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeGlobal));
    queue(of, s->stream);
    BENCH_CUDA(cudaStreamEndCapture(s->stream, &graph));
    BENCH_CUDA(cudaGraphInstantiate(&of->exec, graph, 0));
}

/* The results of a step that both ways have: y, dx, and the gradients' first numbers. */
enum { RESULTS = 5 };
static const char* const result_name[RESULTS] = {"y", "dx", "drouter", "dw1", "dw2"};

static int64_t result_size(const step* s, int which)
{
    const int64_t n = which < 2 ? (int64_t)s->h.T * s->h.H : s->numbers[which - 2];
    return n < (1 << 24) ? n : 1 << 24;
}

/* Runs a step and copies its results to the host. */
static void run_results(bench_state* state, step* s, uint16_t** out)
{
    for (int i = 0; i < 3; ++i) BENCH_CUDA(cudaMemset(s->grad[i], 0xff, (size_t)s->numbers[i] * 2));
    BENCH_CUDA(cudaMemset(s->y, 0xff, (size_t)s->h.T * (size_t)s->h.H * 2));
    BENCH_CUDA(cudaMemset(s->dx, 0xff, (size_t)s->h.T * (size_t)s->h.H * 2));
    run_step(s, state->stream);
    BENCH_CUDA(cudaStreamSynchronize(state->stream));
    for (int i = 0; i < RESULTS; ++i) {
        const uint16_t* p = i == 0 ? s->y : i == 1 ? s->dx : s->grad[i - 2];
        const size_t bytes = (size_t)result_size(s, i) * 2;
        out[i] = (uint16_t*)malloc(bytes);
        BENCH_CUDA(cudaMemcpy(out[i], p, bytes, cudaMemcpyDeviceToHost));
    }
}

/* Returns the root of the squares of a - b over those of a, of n bf16 numbers. */
static double difference(const uint16_t* a, const uint16_t* b, int64_t n)
{
    double off = 0, size = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double v = moe_bf16_to_f32(a[i]), w = moe_bf16_to_f32(b[i]);
        off += (v - w) * (v - w), size += v * v;
    }
    return sqrt(off / size); /* NaN where all are 0 */
}

int main(int argc, char** argv)
{
    static const bench_shape seed = {24576, 16384, 256, 256, 8};
    bench_runs runs;
    bench_state s = bench_open_runs(argc, argv, "a step of training, bf16, SwiGLU", &runs);
    int failures = 0;
    if (runs.listed) runs.count = 1, runs.shape[0] = seed;
    for (int i = 0; i < runs.count; ++i) {
        const bench_shape* h = &runs.shape[i];
        step* table = (step*)calloc(2, sizeof(step));
        step* cat = table + 1;
        bench_call call[2];
        uint16_t* result[2][RESULTS];
        char what[96];
        open_step(table, h);
        *cat = *table; /* the same weights, gradients and tokens: timed in turn */
        cat->y = (uint16_t*)bench_alloc((size_t)h->T * (size_t)h->H * 2);
        cat->dx = (uint16_t*)bench_alloc((size_t)h->T * (size_t)h->H * 2);
        open_table(table), open_cat(cat);
        capture(&s, table, queue_table), capture(&s, cat, queue_cat);
        run_results(&s, table, result[0]), run_results(&s, cat, result[1]);
        printf("T %d H %d I %d E %d K %d: differences:", h->T, h->H, h->I, h->E, h->K);
        for (int j = 0; j < RESULTS; ++j) {
            const double off = difference(result[1][j], result[0][j], result_size(table, j));
            printf(" %s %.2g", result_name[j], off);
            failures += !(off < (j ? 0.02 : 0.01));
            free(result[0][j]), free(result[1][j]);
        }
        printf("\n");
        call[0] = bench_one(run_step, table), call[1] = bench_one(run_step, cat);
        bench_alternate(&s, call, 2);
        for (int k = 0; k < 2; ++k) {
            snprintf(what, sizeof what, "%s", k ? "cat + index_add" : "pointer table");
            bench_row(&s, what, call[k].ms, (double)table[k].bytes * 1e-9, "GB peak",
                      call[k].ms / call[1].ms, "cat");
        }
        printf("  saved: %.2f ms, %.2f GB\n", call[1].ms - call[0].ms,
               ((double)cat->bytes - (double)table->bytes) * 1e-9);
        free(table); /* buffers stay until the program ends: one shape a run */
    }
    return bench_close(&s, failures);
}
