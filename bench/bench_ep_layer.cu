/* The layer over ranks, one a GPU, beside the local layer with the same tokens a GPU and all
   experts. nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_ep_layer.cu -o bench_ep_layer
     ./bench_ep_layer [--ranks W] [--thiek T,H,I,E,K] [--choice]    T tokens a rank
     --choice: the profiler's choice beside the layer with every pair of forms

   A barrier stands in every iteration and is part of all times; the slowest rank counts. TFLOPS are
   of a rank: 6 T K H I over the time. */
#include "bench_group.h"

#include <math.h>
#include <time.h>

#include "../moe/ep/layer.cuh"
#include "../moe/ep/profile.cuh"

typedef struct shape {
    int T, H, I, E, K;
} shape;

typedef struct job {
    shape s;
    moe_ep_layer_desc ep[BENCH_MOST_RANKS];
    moe_layer_desc local[BENCH_MOST_RANKS];
    moe_ep_layer_prepared ep_p[BENCH_MOST_RANKS];
    moe_layer_prepared local_p[BENCH_MOST_RANKS];
    void* memory[BENCH_MOST_RANKS][16];
    int used[BENCH_MOST_RANKS];
    int part; /* that run_part queues */
} job;

static void* keep(job* j, int r, void* p)
{
    j->memory[r][j->used[r]++] = p;
    return p;
}

static void describe(const job* j, moe_layer_desc* d, const void* x, const void* router, void* y,
                     uint64_t* fault)
{
    memset(d, 0, sizeof *d);
    d->x = x, d->router = router, d->y = y, d->fault = fault;
    d->num_tokens = j->s.T, d->hidden = j->s.H, d->intermediate = j->s.I;
    d->num_experts = j->s.E, d->top_k = j->s.K;
    d->gate.renormalize = 1;
}

static void open_job(bench_group* g, job* j, shape s, int form)
{
    memset(j, 0, sizeof *j);
    j->s = s;
    for (int r = 0; r < g->W; ++r) {
        const int64_t w1 = (int64_t)2 * s.I * s.H, w2 = (int64_t)s.H * s.I;
        const int first = moe_ep_first(r, s.E, g->W);
        moe_ep_layer_desc* e = j->ep + r;
        void *x, *y, *router;
        char *all1, *all2;
        size_t bytes;
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        x = keep(j, r, bench_random((int64_t)s.T * s.H, MOE_BF16, 1.0f, 1u + (uint32_t)r));
        y = keep(j, r, bench_alloc((size_t)s.T * (size_t)s.H * 2));
        router = keep(j, r, bench_random((int64_t)s.E * s.H, MOE_BF16, 0.05f, 99u));
        all1 = (char*)keep(j, r, bench_random(s.E * w1, MOE_BF16, 0.02f, 7u));
        all2 = (char*)keep(j, r, bench_random(s.E * w2, MOE_BF16, 0.02f, 8u));
        describe(j, j->local + r, x, router, y, g->fault[r]);
        j->local[r].w1.base = all1, j->local[r].w2.base = all2;
        BENCH_MOE(moe_layer_workspace(j->local + r, &bytes));
        j->local[r].workspace = keep(j, r, bench_alloc(bytes));
        j->local[r].workspace_bytes = bytes;
        BENCH_MOE(moe_layer_prepare(j->local + r, j->local_p + r));
        describe(j, &e->layer, x, router, y, g->fault[r]);
        e->layer.w1.base = all1 + first * w1 * 2, e->layer.w2.base = all2 + first * w2 * 2;
        e->peers = g->peers + r;
        e->buffers.combine_form = form;
        e->buffers.max_tokens = s.T;
        e->side_stream = g->side[r];
        e->side_event[0] = g->side_event[r][0], e->side_event[1] = g->side_event[r][1];
        e->counters = (moe_ep_counters*)keep(j, r, bench_alloc(sizeof *e->counters));
        BENCH_MOE(moe_ep_profile_workspace(e, &bytes)); /* for every form */
        e->layer.workspace = keep(j, r, bench_alloc(bytes));
        e->layer.workspace_bytes = bytes;
        e->counters = 0; /* the profiler's alone */
        BENCH_MOE(moe_ep_layer_prepare(e, j->ep_p + r));
        j->memory[r][15] = bench_alloc((size_t)(s.T < 256 ? s.T : 256) * (size_t)s.H * 2);
    }
}

static void close_job(bench_group* g, job* j)
{
    bench_group_wait(g);
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        for (int i = 0; i < 16; ++i) BENCH_CUDA(cudaFree(j->memory[r][i]));
    }
}

static void run_local(void* context, bench_group* g)
{
    const job* j = (const job*)context;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_layer_run(j->local_p + r, g->stream[r]));
    }
}

static void run_ep(void* context, bench_group* g)
{
    const job* j = (const job*)context;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_ep_layer_run(j->ep_p + r, g->stream[r]));
    }
}

static void run_local_part(void* context, bench_group* g)
{
    const job* j = (const job*)context;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_layer_run_part(j->local_p + r, j->part, g->stream[r]));
    }
}

static void run_part(void* context, bench_group* g, int r, int part)
{
    BENCH_MOE(moe_ep_layer_run_part(((const job*)context)->ep_p + r, part, g->stream[r]));
}

/* Ends the program where y of the two layers differs by more than roundings. */
static void verify(job* j, bench_group* g)
{
    const int tokens = j->s.T < 256 ? j->s.T : 256, H = j->s.H;
    uint16_t* y[2];
    run_local(j, g);
    bench_group_check(g, "local");
    for (int i = 0; i < 2; ++i) y[i] = (uint16_t*)malloc((size_t)tokens * (size_t)H * 2);
    for (int pass = 0; pass < 2; ++pass)
        for (int r = 0; r < g->W; ++r) {
            BENCH_CUDA(cudaSetDevice(g->device[r]));
            if (pass == 0) { /* both write one y: keep the local one */
                BENCH_CUDA(cudaMemcpy(j->memory[r][15], j->local[r].y,
                                      (size_t)tokens * (size_t)H * 2, cudaMemcpyDeviceToDevice));
            } else {
                double top = 0, off = 0;
                BENCH_CUDA(cudaMemcpy(y[0], j->memory[r][15], (size_t)tokens * (size_t)H * 2,
                                      cudaMemcpyDeviceToHost));
                BENCH_CUDA(cudaMemcpy(y[1], j->local[r].y, (size_t)tokens * (size_t)H * 2,
                                      cudaMemcpyDeviceToHost));
                for (int64_t i = 0; i < (int64_t)tokens * H; ++i) {
                    const double w = moe_bf16_to_f32(y[0][i]),
                                 e = fabs(moe_bf16_to_f32(y[1][i]) - w);
                    if (fabs(w) > top) top = fabs(w);
                    if (!(e <= off)) off = e == e ? e : INFINITY;
                }
                if (!(off <= top / 32) || top == 0) {
                    printf("VERIFY FAILED: rank %d: y differs by %g, largest %g\n", r, off, top);
                    exit(1);
                }
            }
            if (pass == 0)
                BENCH_CUDA(cudaMemset(j->local[r].y, 0xff, (size_t)tokens * (size_t)H * 2));
            BENCH_CUDA(cudaDeviceSynchronize());
            if (pass == 0 && r == g->W - 1) {
                run_ep(j, g);
                bench_group_check(g, "over ranks");
            }
        }
    free(y[0]);
    free(y[1]);
}

static void run_nothing(void* context, bench_group* g)
{
    (void)context;
    (void)g;
}

static void bench_shape(bench_group* g, shape s)
{
    static job j;
    const double flops = 6.0 * s.T * s.K * (double)s.H * s.I;
    printf("T %d a rank, H %d, I %d, E %d, K %d, W %d\n", s.T, s.H, s.I, s.E, s.K, g->W);
    for (int form = MOE_EP_REDUCED; form <= MOE_EP_GATHERED; ++form) {
        double local, ep, again, barrier;
        open_job(g, &j, s, form);
        verify(&j, g);
        barrier = bench_group_time(g, run_nothing, &j, 4);
        local = bench_group_time(g, run_local, &j, 4);
        ep = bench_group_time(g, run_ep, &j, 4);
        again = bench_group_time(g, run_local, &j, 4);
        local = 0.5 * (local + again);
        printf(
            "  %-8s local %8.4f ms %6.1f TFLOPS   over ranks %8.4f ms %6.1f TFLOPS  ratio %.3f\n",
            form == MOE_EP_REDUCED ? "reduced" : "gathered", local, flops / local * 1e-9, ep,
            flops / ep * 1e-9, local / ep);
        printf("    parts, ms:");
        bench_group_print_parts(g, 0, run_part, &j, MOE_EP_LAYER_PARTS, moe_ep_layer_part_name);
        printf("    local, less a barrier of %.4f:", barrier);
        for (j.part = 0; j.part < MOE_LAYER_PARTS; ++j.part)
            printf(" %s %.4f", moe_layer_part_name(j.part),
                   bench_group_time(g, run_local_part, &j, 4) - barrier);
        printf("\n");
        fflush(stdout);
        close_job(g, &j);
    }
}

/* The profiler's time and choice, and the layer's time with every pair of forms. */
static void bench_choice(bench_group* g, shape s)
{
    static job j;
    static moe_ep_profile_rank rank[BENCH_MOST_RANKS];
    static moe_ep_layer_desc layer[BENCH_MOST_RANKS];
    moe_ep_profile_desc d;
    moe_ep_choice c;
    struct timespec t0, t1;
    char text[MOE_EP_CHOICE_TEXT];
    double best = 0, chosen = 0;
    printf("T %d a rank, H %d, I %d, E %d, K %d, W %d\n", s.T, s.H, s.I, s.E, s.K, g->W);
    open_job(g, &j, s, MOE_EP_REDUCED);
    memset(&d, 0, sizeof d);
    d.rank = rank, d.num_mine = g->W;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_CUDA(cudaDeviceSynchronize());
        layer[r] = j.ep[r];
        layer[r].counters = (moe_ep_counters*)bench_alloc(sizeof *layer[r].counters);
        rank[r].layer = &layer[r], rank[r].stream = g->stream[r], rank[r].device = g->device[r];
    }
    timespec_get(&t0, TIME_UTC);
    BENCH_MOE(moe_ep_profile(&d, &c));
    timespec_get(&t1, TIME_UTC);
    moe_ep_choice_table(&c, text, sizeof text);
    printf("%s  in %.2f s\n", text,
           (double)(t1.tv_sec - t0.tv_sec) + 1e-9 * (double)(t1.tv_nsec - t0.tv_nsec));
    for (int f = 1; f < MOE_EP_DISPATCH_FORMS; ++f)
        for (int b = 1; b < MOE_EP_COMBINE_FORMS; ++b) {
            double ms;
            for (int r = 0; r < g->W; ++r) {
                BENCH_CUDA(cudaSetDevice(g->device[r]));
                j.ep[r].buffers.dispatch_form = f, j.ep[r].buffers.combine_form = b;
                BENCH_MOE(moe_ep_layer_prepare(j.ep + r, j.ep_p + r));
            }
            ms = bench_group_time(g, run_ep, &j, 4);
            printf("  %-16s %-16s %9.4f ms\n", moe_ep_dispatch_name(f), moe_ep_combine_name(b), ms);
            if (best == 0 || ms < best) best = ms;
            if (f == c.dispatch_form && b == c.combine_form) chosen = ms;
        }
    printf("  the choice / the best pair %.3f\n", chosen / best);
    fflush(stdout);
    for (int r = 0; r < g->W; ++r) BENCH_CUDA(cudaFree(layer[r].counters));
    close_job(g, &j);
}

int main(int argc, char** argv)
{
    static bench_group g;
    shape list[2] = {{8192, 2048, 768, 128, 8}, {8192, 4096, 14336, 8, 2}};
    int count = 2, W = 0, devices = 0, choice = 0;
    uint64_t most = 0;
    struct cudaDeviceProp prop;
    for (int i = 1; i < argc; ++i) {
        if (!strcmp(argv[i], "--ranks") && i + 1 < argc) W = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--thiek") && i + 1 < argc &&
                 sscanf(argv[++i], "%d,%d,%d,%d,%d", &list[0].T, &list[0].H, &list[0].I, &list[0].E,
                        &list[0].K) == 5) {
            count = 1;
        } else if (!strcmp(argv[i], "--choice")) {
            choice = 1;
        } else {
            fprintf(stderr, "usage: %s [--ranks W] [--thiek T,H,I,E,K] [--choice]\n", argv[0]);
            return 2;
        }
    }
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1); /* for ranks that share a GPU */
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("no GPU, skipped\n");
        return 77;
    }
    if (W == 0) W = devices;
    for (int i = 0; i < count; ++i) {
        moe_ep_layer_desc d;
        uint64_t bytes;
        memset(&d, 0, sizeof d);
        d.layer.hidden = list[i].H, d.layer.num_experts = list[i].E, d.layer.top_k = list[i].K;
        d.buffers.max_tokens = list[i].T;
        BENCH_MOE(moe_ep_profile_region(&d, W, &bytes));
        if (bytes > most) most = bytes;
    }
    bench_group_open(&g, W, most);
    for (int r = 0; r < g.W; ++r) {
        BENCH_CUDA(cudaSetDevice(g.device[r]));
        BENCH_MOE(moe_preload());
    }
    BENCH_CUDA(cudaGetDeviceProperties(&prop, 0));
    printf("%d ranks on %d x %s\n", g.W, g.devices, prop.name);
    for (int i = 0; i < count; ++i)
        if (choice) bench_choice(&g, list[i]);
        else bench_shape(&g, list[i]);
    return 0;
}
