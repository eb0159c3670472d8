/* train.h: training over ranks: forward and backward beside those of one GPU that has all tokens, what
   stays between the passes, and times. */
#ifndef MOE_SAMPLE_TRAIN_H
#define MOE_SAMPLE_TRAIN_H

#include "moe/ep/layer_backward.cuh"
#include "report.h"

/* A layer on one GPU, with its gradients. */
typedef struct local_train {
    moe_layer_backward_desc d;
    moe_layer_prepared forward;
    moe_layer_backward_prepared backward;
} local_train;

/* What one rank trains. */
typedef struct train_rank {
    int T, begin; /* its tokens; the first one's number */
    moe_ep_layer_backward_desc ep;
    moe_ep_layer_desc first_half; /* with CPU_sync_on_runtime */
    moe_ep_layer_prepared infer, forward;
    moe_ep_layer_backward_prepared backward;
    local_train all, own, one; /* all experts; as many as its own; all tokens: of number 0 */
    int64_t rows;              /* that came, with CPU_sync_on_runtime */
    int part;                  /* that run_train queues */
    int counts, backs;         /* forward in two halves; with backward */
} train_rank;

static void* device_memory(size_t bytes)
{
    void* p;
    if (cudaMalloc(&p, bytes + 16) != cudaSuccess)
        quit(EXIT_WRONG_INPUT, "this shape needs more memory than the device has");
    return p;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

/* Asks for all gradients: dw1 and dw2 of `experts` experts, in dtype; drouter in fp32. */
static void want_gradients(moe_layer_backward_desc* d, const options* o, int T, int experts,
                           int router_rows, const void* dy)
{
    const size_t matrix = (size_t)o->I * (size_t)o->H * 2;
    d->dy = dy;
    d->dx = device_memory((size_t)T * (size_t)o->H * 2);
    d->drouter = device_memory((size_t)router_rows * (size_t)o->H * 4);
    d->router_grad_dtype = MOE_FP32;
    if (!experts) return;
    d->dw1.base = device_memory((size_t)experts * 2 * matrix);
    d->dw2.base = device_memory((size_t)experts * matrix);
}

/* Prepares forward and backward of layer f on one GPU. */
static void train_local(local_train* l, const options* o, const moe_layer_desc* f, const void* dy)
{
    moe_layer_saved_list kept;
    size_t forward, backward;
    l->d.layer = *f;
    MOE(moe_layer_saved(&l->d.layer, &kept));
    l->d.layer.saved = device_memory(kept.bytes);
    l->d.layer.saved_bytes = kept.bytes;
    want_gradients(&l->d, o, f->num_tokens, f->num_experts, f->num_experts, dy);
    MOE(moe_layer_workspace(&l->d.layer, &forward));
    MOE(moe_layer_backward_workspace(&l->d, &backward));
    l->d.layer.workspace_bytes = larger(forward, backward);
    l->d.layer.workspace = device_memory(l->d.layer.workspace_bytes);
    MOE(moe_layer_prepare(&l->d.layer, &l->forward));
    MOE(moe_layer_backward_prepare(&l->d, &l->backward));
}

/* Gives both passes over ranks their workspace, and prepares them. */
static void prepare_train(train_rank* t)
{
    moe_layer_desc* l = &t->ep.forward.layer;
    size_t forward, backward;
    MOE(moe_ep_layer_workspace(&t->ep.forward, &forward));
    MOE(moe_ep_layer_backward_workspace(&t->ep, &backward));
    if (larger(forward, backward) > l->workspace_bytes) {
        if (l->workspace) CUDA(cudaFree(l->workspace));
        l->workspace_bytes = larger(forward, backward);
        l->workspace = device_memory(l->workspace_bytes);
    }
    if (t->ep.forward.count_rows && !t->ep.forward.num_rows) return; /* not counted yet */
    MOE(moe_ep_layer_prepare(&t->ep.forward, &t->forward));
    MOE(moe_ep_layer_backward_prepare(&t->ep, &t->backward));
}

/* Queues one part: the forward, in two halves where the host reads the row count, then the backward.
   All ranks of the process go through a part before the next one begins. */
static void run_train(void* ranks, group* g, int i)
{
    train_rank* t = (train_rank*)ranks + i;
    const train_rank* lead = (const train_rank*)ranks;
    cudaStream_t stream = g->rank[i].stream;
    int64_t rows;
    if (lead->part == 2) {
        if (lead->backs) MOE(moe_ep_layer_backward_run(&t->backward, stream));
    } else if (!lead->counts) {
        if (lead->part == 0) MOE(moe_ep_layer_run(&t->forward, stream));
    } else if (lead->part == 0) {
        MOE(moe_ep_layer_begin(&t->first_half, stream));
    } else {
        MOE(moe_ep_layer_count(&t->first_half, stream, &rows));
        if (rows != t->rows) quit(EXIT_WRONG_RESULT, "other rows: %lld", (long long)rows);
        MOE(moe_ep_layer_finish(&t->ep.forward, stream));
    }
}
static void run_infer(void* ranks, group* g, int i)
{
    MOE(moe_ep_layer_run(&((train_rank*)ranks)[i].infer, g->rank[i].stream));
}

/* Returns what a local layer queues: forward, and backward where the first rank says so. */
static void run_both(const local_train* l, const train_rank* lead, cudaStream_t stream)
{
    if (!l->d.layer.num_experts) return;
    MOE(moe_layer_run(&l->forward, stream));
    if (lead->backs) MOE(moe_layer_backward_run(&l->backward, stream));
}
static void run_all(void* t, group* g, int i)
{
    run_both(&((train_rank*)t)[i].all, (train_rank*)t, g->rank[i].stream);
}
static void run_own(void* t, group* g, int i)
{
    run_both(&((train_rank*)t)[i].own, (train_rank*)t, g->rank[i].stream);
}
static void run_whole(void* t, group* g, int i)
{
    if (g->first + i == 0) run_both(&((train_rank*)t)[0].one, (train_rank*)t, g->rank[0].stream);
}

/* What two arrays have been found to differ by, over all ranks of this process. */
typedef struct difference {
    double largest, sum, off, relative, count; /* of the reference; of the difference */
} difference;

/* Adds n elements of host memory; `want` is of one GPU. */
static void add_difference(difference* d, const void* want, const void* got, int64_t n, int dtype)
{
    double mean = 0;
    for (int64_t i = 0; i < n; ++i) mean += fabs(moe_load(want, i, dtype));
    d->sum += mean;
    mean = n ? 1e-3 * mean / (double)n + 1e-30 : 1;
    for (int64_t i = 0; i < n; ++i) {
        const double w = fabs(moe_load(want, i, dtype));
        const double e = fabs(moe_load(got, i, dtype) - moe_load(want, i, dtype));
        if (w > d->largest) d->largest = w;
        if (!(e <= d->off)) d->off = e == e ? e : INFINITY; /* a NaN is no small difference */
        d->relative += e / (w + mean);
    }
    d->count += (double)n;
}

/* Compares n elements of rank number i with those of one GPU from element `at` on. */
static void compare(group* g, int i, difference* d, const void* want, int64_t at, const void* got,
                    int64_t n, int dtype)
{
    const int64_t bytes = moe_dtype_bytes(dtype);
    void *a, *b;
    if (!n) return;
    (void)group_use(g, 0);
    a = host_copy((const char*)want + at * bytes, (size_t)(n * bytes));
    (void)group_use(g, i);
    b = host_copy(got, (size_t)(n * bytes));
    add_difference(d, a, b, n, dtype);
    free(a);
    free(b);
}

/* Prints one array's lines. Returns 1 where it is off by more than `most` of its largest element. */
static int print_difference(group* g, const char* name, const difference* d, double most)
{
    const double largest = group_max(g, d->largest), off = group_max(g, d->off);
    if (g->first == 0)
        printf("max abs ref value %-12s %14.6f\nmean abs ref value %-12s %13.6f\n"
               "max abs diff on %-12s %16.6f\nmean rel diff on %-12s %15.6f\n\n",
               name, largest, name, d->sum / d->count, name, off, name, d->relative / d->count);
    return !(off <= most * largest) || largest == 0;
}

/* Runs a step and compares o and all gradients with those of one GPU. Returns 1 where one is wrong. */
static int print_gradients(group* g, train_rank* t, const options* o)
{
    difference y = {}, dx = {}, drouter = {}, dw1 = {}, dw2 = {};
    const double unit = o->dtype == MOE_BF16 ? 1.0 / 128 : 1.0 / 1024;
    const moe_layer_backward_desc* one = &t[0].one.d;
    const int64_t w = (int64_t)o->I * o->H;
    int wrong = 0;
    t->backs = 1;
    run_both(&t[0].one, t, group_use(g, 0)->stream);
    for (t->part = 0; t->part < 3; ++t->part)
        for (int i = 0; i < g->mine; ++i) {
            (void)group_use(g, i);
            run_train(t, g, i);
        }
    group_wait(g, "training over ranks");
    for (int i = 0; i < g->mine; ++i) {
        const moe_ep_layer_backward_desc* e = &t[i].ep;
        const int first = moe_ep_first(g->first + i, o->E, g->W);
        const int own = moe_ep_owned(g->first + i, o->E, g->W);
        const int64_t at = (int64_t)t[i].begin * o->H, n = (int64_t)t[i].T * o->H;
        compare(g, i, &y, one->layer.y, at, e->forward.layer.y, n, o->dtype);
        compare(g, i, &dx, one->dx, at, e->grads.dx, n, o->dtype);
        compare(g, i, &drouter, one->drouter, 0, e->grads.drouter, (int64_t)o->E * o->H, MOE_FP32);
        compare(g, i, &dw1, one->dw1.base, first * 2 * w, e->grads.dw1.base, own * 2 * w, o->dtype);
        compare(g, i, &dw2, one->dw2.base, first * w, e->grads.dw2.base, own * w, o->dtype);
    }
    wrong |= print_difference(g, "o", &y, (g->W + 1) * unit);
    wrong |= print_difference(g, "dx", &dx, (g->W + 1) * unit);
    wrong |= print_difference(g, "drouter_w", &drouter, 1e-4);
    wrong |= print_difference(g, "dw1", &dw1, unit);
    wrong |= print_difference(g, "dw2", &dw2, unit);
    if (g->first == 0 && g->launched) printf("(means: rank 0)\n");
    return wrong;
}

/* Prints what stays from forward to backward, of rank 0. */
static void print_audit(const group* g, const train_rank* t, const options* o)
{
    moe_layer_saved_list kept;
    double total = 0;
    if (g->first) return;
    MOE(moe_ep_layer_saved(&t->ep.forward, &kept));
    printf("saved-activation cache audit (training, redispatch_x=%s, CPU_sync=%s)\n",
           o->redispatch ? "True" : "False", o->counts ? "True" : "False");
    for (int i = 0; i < kept.count; ++i) {
        const moe_layer_saved_item* s = kept.item + i;
        const int not_counted = !strcmp(s->name, "x") && !o->redispatch; /* recv_x is read */
        printf("  %-12s %12.3f MiB  shape=(%lld, %lld)%s\n", s->name, (double)s->bytes / 1048576,
               (long long)s->rows, (long long)s->columns,
               not_counted             ? "  the caller's; not counted"
               : !strcmp(s->name, "x") ? "  the caller's"
               : s->caller             ? "  in the region or the caller's"
                                       : "");
        if (!not_counted) total += (double)s->bytes;
    }
    printf("  %-12s %12.3f MiB\n\n", "total", total / 1048576);
}

/* Times forward and both passes of a call; backward is their difference. */
static void time_passes(group* g, train_rank* t, group_call call, int parts, const options* o,
                        double barrier, double ms[2])
{
    t->backs = 0;
    ms[0] = group_time(g, call, t, parts > 1 ? &t->part : 0, parts, o->repeat) - barrier;
    t->backs = 1;
    ms[1] = group_time(g, call, t, parts > 1 ? &t->part : 0, parts, o->repeat) - barrier - ms[0];
}

static void print_training_times(group* g, train_rank* t, const options* o)
{
    static const char* const pass[] = {"  fwd", "  bwd"};
    const double flops[2] = {6.0 * o->T / g->W * o->K * (double)o->H * o->I,
                             12.0 * o->T / g->W * o->K * (double)o->H * o->I};
    const double barrier = group_time(g, run_nothing, t, 0, 1, o->repeat);
    const int few = t[0].own.d.layer.num_experts;
    double infer, ep[2], all[2], own[2], one[2];
    infer = group_time(g, run_infer, t, 0, 1, o->repeat) - barrier;
    time_passes(g, t, run_train, 3, o, barrier, ep);
    time_passes(g, t, run_all, 1, o, barrier, all);
    time_passes(g, t, run_own, 1, o, barrier, own);
    time_passes(g, t, run_whole, 1, o, barrier, one);
    if (g->first) return;
    printf("EP throughput\n");
    print_rate("  EP fwd (inference mode)", infer, flops[0], g->W);
    print_rate("  EP fwd (training mode)", ep[0], flops[0], g->W);
    print_rate("  EP bwd (derived)", ep[1], flops[1], g->W);
    printf("per-rank baselines, T %d, E %d, K %d\n", t->T, o->E, o->K);
    for (int p = 0; p < 2; ++p) print_rate(pass[p], all[p], flops[p], 1);
    printf("per-rank baselines, T %d, E %d, K %d\n", t->T, few, t[0].own.d.layer.top_k);
    for (int p = 0; p < 2; ++p)
        print_rate(pass[p], own[p], flops[p] * t[0].own.d.layer.top_k / o->K, 1);
    printf("one GPU, T %d, E %d, K %d\n", o->T, o->E, o->K);
    for (int p = 0; p < 2; ++p) print_rate(pass[p], one[p], flops[p] * g->W, 1);
    printf("\nexposed network latency (EP over the local layer of T_local tokens)\n");
    for (int p = 0; p < 2; ++p)
        printf("%s  E %d: %.3f ms (%.1f%%)   E %d: %.3f ms (%.1f%%)\n", pass[p], o->E,
               ep[p] - all[p], 100 * (ep[p] - all[p]) / all[p], few, ep[p] - own[p],
               100 * (ep[p] - own[p]) / own[p]);
    printf("EP scaling (over one GPU with T %d)\n", o->T);
    for (int p = 0; p < 2; ++p)
        printf("%s  %.2f x (ideal %d x, %.1f%%)\n", pass[p], one[p] / ep[p], g->W,
               100 * one[p] / ep[p] / g->W);
    if (MOE_ON_HOST) printf("  the CPU shows that the kernels are right, not how fast they are\n");
    printf("\n");
}

/* With CPU_sync_on_runtime: one first half of all ranks tells the rows; pre is as large. */
static void count_train(group* g, train_rank* t)
{
    for (int i = 0; i < g->mine; ++i) {
        t[i].first_half = t[i].ep.forward;
        MOE(moe_ep_layer_begin(&t[i].first_half, group_use(g, i)->stream));
    }
    for (int i = 0; i < g->mine; ++i) {
        moe_ep_layer_desc* f = &t[i].ep.forward;
        MOE(moe_ep_layer_count(&t[i].first_half, group_use(g, i)->stream, &t[i].rows));
        f->num_rows = t[i].rows; /* at least 1 */
        f->pre = device_memory((size_t)t[i].rows * 4 * (size_t)f->layer.intermediate);
        prepare_train(&t[i]);
        t[i].first_half.layer.workspace = f->layer.workspace;
        t[i].first_half.layer.workspace_bytes = f->layer.workspace_bytes;
    }
    /* the exchange that was begun ends: dispatch and combine take turns; cudaMalloc and cudaFree are
       over, which may wait for a device */
    for (int i = 0; i < g->mine; ++i)
        MOE(moe_ep_layer_finish(&t[i].ep.forward, group_use(g, i)->stream));
    group_wait(g, "the first half of a forward");
}

#endif
