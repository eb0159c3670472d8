/* Training of the layer over ranks, one a GPU: forward, backward and both, beside the local layer with
   the same tokens a GPU and all experts.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_ep_training.cu -o bench_ep_training
     ./bench_ep_training [--ranks W] [--thiek T,H,I,E,K] [--dispatch NAME] [--combine NAME]
                         [--redispatch] [--overlap] [--blocks N] [--fp8]    T tokens a rank
     --redispatch: x is dispatched again in the backward pass, beside its first products
     --overlap: dx is combined beside the gradients of weights, by at most N thread blocks
     --fp8: rows of x and of dy between ranks in fp8

   Checked first: dx and dweights of up to 256 tokens of each rank against those of the local layer. A
   barrier stands in every iteration and is part of all times; the slowest rank counts. TFLOPS are of
   a rank: forward 6 T K H I, backward 12, both 18, over the time. Gradients of weights in bf16. */
#include "bench_group.h"

#include <math.h>

#include "../moe/ep/layer_backward.cuh"
#include "../moe/ep/profile.cuh"

typedef struct shape {
    int T, H, I, E, K;
} shape;

typedef struct options {
    shape s;
    int dispatch, combine, redispatch, overlap, blocks, fp8;
} options;

#define MOST_BUFFERS 24

typedef struct job {
    options o;
    moe_ep_layer_backward_desc ep[BENCH_MOST_RANKS];
    moe_layer_backward_desc local[BENCH_MOST_RANKS];
    moe_ep_layer_prepared ep_forward[BENCH_MOST_RANKS];
    moe_ep_layer_backward_prepared ep_backward[BENCH_MOST_RANKS];
    moe_layer_prepared local_forward[BENCH_MOST_RANKS];
    moe_layer_backward_prepared local_backward[BENCH_MOST_RANKS];
    void* memory[BENCH_MOST_RANKS][MOST_BUFFERS];
    int used[BENCH_MOST_RANKS];
    int forward, backward; /* what run_* queue */
} job;

static void* keep(job* j, int r, void* p)
{
    j->memory[r][j->used[r]++] = p;
    return p;
}

static void describe(const shape* s, moe_layer_desc* d, const void* x, const void* router, void* y,
                     uint64_t* fault)
{
    memset(d, 0, sizeof *d);
    d->x = x, d->router = router, d->y = y, d->fault = fault;
    d->num_tokens = s->T, d->hidden = s->H, d->intermediate = s->I;
    d->num_experts = s->E, d->top_k = s->K;
    d->gate.renormalize = 1;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

/* Makes the local layer of rank r. */
static void open_local(job* j, bench_group* g, int r, const void* x, const void* dy, char* w1,
                       char* w2, void* router)
{
    const shape* s = &j->o.s;
    moe_layer_backward_desc* b = j->local + r;
    moe_layer_saved_list kept;
    size_t forward, backward;
    memset(b, 0, sizeof *b);
    describe(s, &b->layer, x, router, keep(j, r, bench_alloc((size_t)s->T * (size_t)s->H * 2)),
             g->fault[r]);
    b->layer.w1.base = w1, b->layer.w2.base = w2;
    BENCH_MOE(moe_layer_saved(&b->layer, &kept));
    b->layer.saved = keep(j, r, bench_alloc(kept.bytes)), b->layer.saved_bytes = kept.bytes;
    b->dy = dy;
    b->dx = keep(j, r, bench_alloc((size_t)s->T * (size_t)s->H * 2));
    b->dweights = (float*)keep(j, r, bench_alloc((size_t)s->T * (size_t)s->K * 4));
    b->drouter = keep(j, r, bench_alloc((size_t)s->E * (size_t)s->H * 4));
    b->router_grad_dtype = MOE_FP32;
    b->dw1.base = keep(j, r, bench_alloc((size_t)s->E * 2 * (size_t)s->I * (size_t)s->H * 2));
    b->dw2.base = keep(j, r, bench_alloc((size_t)s->E * (size_t)s->I * (size_t)s->H * 2));
    BENCH_MOE(moe_layer_workspace(&b->layer, &forward));
    BENCH_MOE(moe_layer_backward_workspace(b, &backward));
    b->layer.workspace_bytes = larger(forward, backward);
    b->layer.workspace = keep(j, r, bench_alloc(b->layer.workspace_bytes));
    BENCH_MOE(moe_layer_prepare(&b->layer, j->local_forward + r));
    BENCH_MOE(moe_layer_backward_prepare(b, j->local_backward + r));
}

static void open_job(bench_group* g, job* j, const options* o)
{
    const shape s = o->s;
    memset(j, 0, sizeof *j);
    j->o = *o;
    for (int r = 0; r < g->W; ++r) {
        const int64_t w1 = (int64_t)2 * s.I * s.H, w2 = (int64_t)s.H * s.I,
                      rows = (int64_t)s.T * s.H;
        const int first = moe_ep_first(r, s.E, g->W), own = moe_ep_owned(r, s.E, g->W);
        moe_ep_layer_backward_desc* b = j->ep + r;
        moe_layer_desc* e = &b->forward.layer;
        moe_layer_saved_list kept;
        size_t forward, backward;
        void *x, *dy, *router;
        char *all1, *all2;
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        x = keep(j, r, bench_random(rows, MOE_BF16, 1.0f, 1u + (uint32_t)r));
        dy = keep(j, r, bench_random(rows, MOE_BF16, 1.0f, 51u + (uint32_t)r));
        router = keep(j, r, bench_random((int64_t)s.E * s.H, MOE_BF16, 0.05f, 99u));
        all1 = (char*)keep(j, r, bench_random(s.E * w1, MOE_BF16, 0.02f, 7u));
        all2 = (char*)keep(j, r, bench_random(s.E * w2, MOE_BF16, 0.02f, 8u));
        open_local(j, g, r, x, dy, all1, all2, router);
        describe(&s, e, x, router, j->local[r].layer.y, g->fault[r]);
        e->w1.base = all1 + first * w1 * 2, e->w2.base = all2 + first * w2 * 2;
        b->forward.peers = g->peers + r;
        b->forward.buffers.dispatch_form = o->dispatch;
        b->forward.buffers.combine_form = o->combine;
        b->forward.buffers.max_tokens = s.T;
        b->forward.redispatch_x = o->redispatch;
        b->overlap = o->overlap;
        b->overlap_blocks = o->overlap ? o->blocks : 0;
        if (o->fp8) b->forward.buffers.wire_dtype = b->gradient_wire = MOE_EP_WIRE_FP8;
        b->forward.side_stream = g->side[r];
        b->forward.side_event[0] = g->side_event[r][0];
        b->forward.side_event[1] = g->side_event[r][1];
        b->grads = j->local[r];
        memset(&b->grads.layer, 0, sizeof b->grads.layer);
        b->grads.dx = keep(j, r, bench_alloc((size_t)rows * 2));
        b->grads.dweights = (float*)keep(j, r, bench_alloc((size_t)s.T * (size_t)s.K * 4));
        b->grads.dw1.base = keep(j, r, bench_alloc((size_t)(own * w1 * 2)));
        b->grads.dw2.base = keep(j, r, bench_alloc((size_t)(own * w2 * 2)));
        BENCH_MOE(moe_ep_layer_saved(&b->forward, &kept));
        e->saved = keep(j, r, bench_alloc(kept.bytes)), e->saved_bytes = kept.bytes;
        BENCH_MOE(moe_ep_layer_workspace(&b->forward, &forward));
        BENCH_MOE(moe_ep_layer_backward_workspace(b, &backward));
        e->workspace_bytes = larger(forward, backward);
        e->workspace = keep(j, r, bench_alloc(e->workspace_bytes));
        BENCH_MOE(moe_ep_layer_prepare(&b->forward, j->ep_forward + r));
        BENCH_MOE(moe_ep_layer_backward_prepare(b, j->ep_backward + r));
    }
}

static void close_job(bench_group* g, job* j)
{
    bench_group_wait(g);
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        for (int i = 0; i < j->used[r]; ++i) BENCH_CUDA(cudaFree(j->memory[r][i]));
    }
}

static void run_local(void* context, bench_group* g)
{
    const job* j = (const job*)context;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        if (j->forward) BENCH_MOE(moe_layer_run(j->local_forward + r, g->stream[r]));
        if (j->backward) BENCH_MOE(moe_layer_backward_run(j->local_backward + r, g->stream[r]));
    }
}

static void run_ep(void* context, bench_group* g)
{
    const job* j = (const job*)context;
    for (int pass = 0; pass < 2; ++pass)
        for (int r = 0; r < g->W; ++r) {
            BENCH_CUDA(cudaSetDevice(g->device[r]));
            if (pass == 0 && j->forward)
                BENCH_MOE(moe_ep_layer_run(j->ep_forward + r, g->stream[r]));
            if (pass == 1 && j->backward)
                BENCH_MOE(moe_ep_layer_backward_run(j->ep_backward + r, g->stream[r]));
        }
}

/* Returns how far two arrays differ, over the largest element of the first; infinity where that is
   0. */
static double off(const void* want, const void* got, int64_t n, int dtype)
{
    const int64_t bytes = n * moe_dtype_bytes(dtype);
    char *a = (char*)malloc((size_t)bytes), *b = (char*)malloc((size_t)bytes);
    double most = 0, top = 0;
    BENCH_CUDA(cudaMemcpy(a, want, (size_t)bytes, cudaMemcpyDeviceToHost));
    BENCH_CUDA(cudaMemcpy(b, got, (size_t)bytes, cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < n; ++i) {
        const double w = moe_load(a, i, dtype), e = fabs(moe_load(b, i, dtype) - w);
        if (fabs(w) > top) top = fabs(w);
        if (!(e <= most)) most = e == e ? e : INFINITY;
    }
    free(a);
    free(b);
    return top > 0 ? most / top : INFINITY;
}

/* Ends the program where gradients differ from the local layer's by more than roundings. */
static void verify(job* j, bench_group* g)
{
    const int tokens = j->o.s.T < 256 ? j->o.s.T : 256;
    j->forward = j->backward = 1;
    run_local(j, g);
    bench_group_check(g, "local");
    run_ep(j, g);
    bench_group_check(g, "over ranks");
    for (int r = 0; r < g->W; ++r) {
        double dx, dweights;
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        dx = off(j->local[r].dx, j->ep[r].grads.dx, (int64_t)tokens * j->o.s.H, MOE_BF16);
        dweights = off(j->local[r].dweights, j->ep[r].grads.dweights, (int64_t)tokens * j->o.s.K,
                       MOE_FP32);
        /* fp8: an element is within 2^-4 of itself */
        if (dx <= (j->o.fp8 ? 1.0 / 16 : 1.0 / 32) && dweights <= (j->o.fp8 ? 1.0 / 16 : 1.0 / 256))
            continue;
        printf("VERIFY FAILED: rank %d: dx differs by %g, dweights by %g of the largest\n", r, dx,
               dweights);
        exit(1);
    }
}

static void run_forward(void* context, bench_group* g)
{
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_ep_layer_run(((const job*)context)->ep_forward + r, g->stream[r]));
    }
}

static void run_stage(void* context, bench_group* g, int r, int stage)
{
    BENCH_MOE(moe_ep_layer_backward_run_stage(((const job*)context)->ep_backward + r, stage,
                                              g->stream[r]));
}

static void bench_options(bench_group* g, const options* o)
{
    static job j;
    static const char* const name[] = {"forward", "backward", "both"};
    const shape s = o->s;
    printf("T %d a rank, H %d, I %d, E %d, K %d, W %d, %s, %s%s%s%s\n", s.T, s.H, s.I, s.E, s.K,
           g->W, moe_ep_dispatch_name(o->dispatch), moe_ep_combine_name(o->combine),
           o->redispatch ? ", x dispatched again" : "", o->overlap ? ", overlap" : "",
           o->fp8 ? ", fp8" : "");
    open_job(g, &j, o);
    verify(&j, g);
    for (int what = 0; what < 3; ++what) {
        const double flops = (what == 0   ? 6.0
                              : what == 1 ? 12.0
                                          : 18.0) *
                             s.T * s.K * (double)s.H * s.I;
        double local, ep;
        j.forward = what != 1, j.backward = what != 0;
        local = bench_group_time(g, run_local, &j, 4);
        ep = bench_group_time(g, run_ep, &j, 4);
        local = 0.5 * (local + bench_group_time(g, run_local, &j, 4));
        printf(
            "  %-8s local %8.4f ms %6.1f TFLOPS   over ranks %8.4f ms %6.1f TFLOPS  ratio %.3f\n",
            name[what], local, flops / local * 1e-9, ep, flops / ep * 1e-9, local / ep);
    }
    printf("  backward, ms:");
    bench_group_print_parts(g, run_forward, run_stage, &j, MOE_EP_BACKWARD_STAGES,
                            moe_ep_layer_backward_stage_name);
    fflush(stdout);
    close_job(g, &j);
}

int main(int argc, char** argv)
{
    static bench_group g;
    options o, list[2];
    int count = 2, W = 0, devices = 0;
    uint64_t most = 0;
    struct cudaDeviceProp prop;
    memset(&o, 0, sizeof o);
    o.dispatch = MOE_EP_DEDUPLICATED, o.combine = MOE_EP_REDUCED;
    for (int i = 1; i < argc; ++i) {
        const char* value = i + 1 < argc ? argv[i + 1] : "";
        const int is[3] = {!strcmp(argv[i], "--redispatch"), !strcmp(argv[i], "--overlap"),
                           !strcmp(argv[i], "--fp8")};
        o.redispatch |= is[0], o.overlap |= is[1], o.fp8 |= is[2];
        if (is[0] || is[1] || is[2]) continue;
        if (!strcmp(argv[i], "--ranks")) W = atoi(value);
        else if (!strcmp(argv[i], "--thiek") &&
                 sscanf(value, "%d,%d,%d,%d,%d", &o.s.T, &o.s.H, &o.s.I, &o.s.E, &o.s.K) == 5)
            count = 1;
        else if (!strcmp(argv[i], "--blocks")) o.blocks = atoi(value);
        else if (!strcmp(argv[i], "--dispatch") && moe_ep_dispatch_named(value) > 0)
            o.dispatch = moe_ep_dispatch_named(value);
        else if (!strcmp(argv[i], "--combine") && moe_ep_combine_named(value) > 0)
            o.combine = moe_ep_combine_named(value);
        else {
            fprintf(stderr,
                    "usage: %s [--ranks W] [--thiek T,H,I,E,K] [--dispatch NAME] [--combine NAME] "
                    "[--redispatch] [--overlap] [--blocks N] [--fp8]\n",
                    argv[0]);
            return 2;
        }
        ++i;
    }
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1); /* for ranks that share a GPU */
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("no GPU, skipped\n");
        return 77;
    }
    if (W == 0) W = devices;
    list[0] = list[1] = o;
    if (count == 2) {
        const shape usual[2] = {{8192, 2048, 768, 128, 8}, {8192, 4096, 14336, 8, 2}};
        list[0].s = usual[0], list[1].s = usual[1];
    }
    for (int i = 0; i < count; ++i) {
        moe_ep_layer_backward_desc d;
        uint64_t bytes;
        memset(&d, 0, sizeof d);
        d.forward.layer.hidden = list[i].s.H, d.forward.layer.num_experts = list[i].s.E;
        d.forward.layer.top_k = list[i].s.K;
        d.forward.buffers.dispatch_form = o.dispatch, d.forward.buffers.combine_form = o.combine;
        d.forward.buffers.max_tokens = list[i].s.T;
        if (o.fp8) d.forward.buffers.wire_dtype = d.gradient_wire = MOE_EP_WIRE_FP8;
        BENCH_MOE(moe_ep_layer_backward_region(&d, W, &bytes));
        if (bytes > most) most = bytes;
    }
    bench_group_open(&g, W, most);
    for (int r = 0; r < g.W; ++r) {
        BENCH_CUDA(cudaSetDevice(g.device[r]));
        BENCH_MOE(moe_preload());
    }
    BENCH_CUDA(cudaGetDeviceProperties(&prop, 0));
    printf("%d ranks on %d x %s\n", g.W, g.devices, prop.name);
    for (int i = 0; i < count; ++i) bench_options(&g, &list[i]);
    return 0;
}
