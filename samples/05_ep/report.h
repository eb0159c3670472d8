/* report.h: what the sample prints: numerics, bytes, times. */
#ifndef MOE_SAMPLE_REPORT_H
#define MOE_SAMPLE_REPORT_H

#include <math.h>

#include "group.h"

/* The layers of one rank. */
typedef struct rank_layers {
    int T;
    moe_ep_layer_desc ep; /* over all ranks */
    moe_ep_layer_prepared ep_p;
    moe_layer_desc local, few, one; /* all experts; its own; all tokens, on rank 0 */
    moe_layer_prepared local_p, few_p, one_p;
    int part; /* that run_part queues */
} rank_layers;

static void run_ep(void* l, group* g, int i)
{
    MOE(moe_ep_layer_run(&((rank_layers*)l)[i].ep_p, g->rank[i].stream));
}
static void run_part(void* l, group* g, int i)
{
    MOE(moe_ep_layer_run_part(&((rank_layers*)l)[i].ep_p, ((rank_layers*)l)[0].part,
                              g->rank[i].stream));
}
static void run_local(void* l, group* g, int i)
{
    MOE(moe_layer_run(&((rank_layers*)l)[i].local_p, g->rank[i].stream));
}
static void run_few(void* l, group* g, int i)
{
    if (((rank_layers*)l)[i].few.num_experts)
        MOE(moe_layer_run(&((rank_layers*)l)[i].few_p, g->rank[i].stream));
}
static void run_one(void* l, group* g, int i)
{
    if (g->first + i == 0) MOE(moe_layer_run(&((rank_layers*)l)[i].one_p, g->rank[i].stream));
}
static void run_nothing(void* l, group* g, int i) { (void)l, (void)g, (void)i; }

static void print_header(const group* g, const options* o, const moe_ep_choice* c)
{
    struct cudaDeviceProp prop;
    if (g->first) return;
    CUDA(cudaGetDeviceProperties(&prop, g->rank[0].device));
    printf("moe %s: expert parallelism, W %d ranks %s, %s\n", MOE_VERSION_STRING, g->W,
           g->launched ? "in a process each" : "in one process",
           MOE_ON_HOST ? "on the CPU (moe/host)" : prop.name);
    if (!g->launched && !MOE_ON_HOST)
        printf("transport %s\n",
               g->devices > 1 ? "peer access between GPUs"
                              : "the memory of one GPU: this run exchanges nothing over a link");
    printf("shape     T %d (%d a rank), H %d, I %d, E %d (%d a rank), K %d, %s, SwiGLU, w1 gate "
           "rows then\n"
           "          up rows, no bias, softmax then top-k, renormalized\n"
           "forms     dispatch %s, combine %s\n\n",
           o->T, (o->T + g->W - 1) / g->W, o->H, o->I, o->E, (o->E + g->W - 1) / g->W, o->K,
           moe_dtype_name(o->dtype), moe_ep_dispatch_name(c->dispatch_form),
           moe_ep_combine_name(c->combine_form));
}

static void* host_copy(const void* p, size_t bytes)
{
    void* h = malloc(bytes + 1);
    if (!h) quit(EXIT_WRONG_RESULT, "out of memory");
    CUDA(cudaMemcpy(h, p, bytes, cudaMemcpyDeviceToHost));
    return h;
}

/* Compares y with that of one GPU, for the same tokens. Returns 1 where they differ by more than
   roundings: a token's y by more than (W + 1) units in the last place of its largest element. */
static int print_numerics(group* g, rank_layers* l, const options* o)
{
    double largest = 0, sum = 0, worst = 0, relative = 0, count = 0;
    int wrong = 0;
    for (int i = 0; i < g->mine; ++i) {
        rank_state* s = group_use(g, i);
        MOE(moe_layer_run(&l[i].local_p, s->stream));
        run_ep(l, g, i);
    }
    group_wait(g, "the layer over ranks");
    for (int i = 0; i < g->mine; ++i) {
        const size_t bytes = (size_t)l[i].T * (size_t)o->H * 2;
        const double unit = o->dtype == MOE_BF16 ? 1.0 / 128 : 1.0 / 1024;
        void *want, *got;
        (void)group_use(g, i);
        want = host_copy(l[i].local.y, bytes);
        got = host_copy(l[i].ep.layer.y, bytes);
        for (int t = 0; t < l[i].T; ++t) {
            double top = 0, off = 0;
            for (int h = 0; h < o->H; ++h) {
                const int64_t at = (int64_t)t * o->H + h;
                const double w = moe_load(want, at, o->dtype),
                             e = fabs(moe_load(got, at, o->dtype) - w);
                if (fabs(w) > top) top = fabs(w);
                if (!(e <= off)) off = e == e ? e : INFINITY; /* a NaN is no small difference */
                sum += fabs(w);
                relative += e / (fabs(w) + 1e-3);
                count += 1;
            }
            if (!(off <= (g->W + 1) * unit * top) || top == 0) wrong = 1;
            if (top > largest) largest = top;
            if (off > worst) worst = off;
        }
        free(want);
        free(got);
    }
    largest = group_max(g, largest);
    worst = group_max(g, worst);
    if (g->first == 0)
        printf("y of one GPU         largest %.6f, mean of |y| %.6f\n"
               "difference from it   largest %.6f, mean relative %.6f%s\n\n",
               largest, sum / count, worst, relative / count,
               g->launched ? " (means: rank 0)" : "");
    return wrong;
}

/* Prints what one exchange has sent, by the counters, and the memory of a rank: those of the rank
   with most. */
static void print_bytes(group* g, const rank_layers* l, const options* o, uint64_t region)
{
    double most[5] = {0}, weights, all;
    for (int i = 0; i < g->mine; ++i) {
        moe_ep_counters* c;
        (void)group_use(g, i);
        c = (moe_ep_counters*)host_copy(l[i].ep.counters, sizeof *c);
        const double own[5] = {(double)c->sent_rows, (double)c->sent_bytes, (double)c->return_rows,
                               (double)c->return_bytes, (double)c->expert_rows};
        for (int n = 0; n < 5; ++n)
            if (own[n] / (double)c->calls > most[n]) most[n] = own[n] / (double)c->calls;
        free(c);
    }
    for (int n = 0; n < 5; ++n) most[n] = group_max(g, most[n]);
    weights = 6.0 * moe_ep_owned(0, o->E, g->W) * o->H * (double)o->I; /* rank 0's */
    all = 6.0 * o->E * o->H * (double)o->I;
    if (g->first) return;
    printf("dispatch  %.0f rows leave a rank, %.3f MiB; combine %.0f rows, %.3f MiB\n", most[0],
           most[1] / 1048576, most[2], most[3] / 1048576);
    printf("experts   %.0f rows of a rank\n", most[4]);
    printf("memory    %.3f MiB region, %.3f MiB workspace, %.3f of %.3f MiB of expert weights\n\n",
           (double)region / 1048576, (double)l[0].ep.layer.workspace_bytes / 1048576,
           weights / 1048576, all / 1048576);
}

/* Prints one line: milliseconds and TFLOPS. */
static void print_rate(const char* what, double ms, double flops, int ranks)
{
    printf("%-44s %9.3f ms %8.2f TFLOPS a rank", what, ms, flops / ms * 1e-9);
    if (ranks > 1) printf(", %.2f net", flops * ranks / ms * 1e-9);
    printf("\n");
}

/* Prints the layer's time, beside the local layers and one GPU with all tokens, and a bar a
   part. */
static void print_times(group* g, rank_layers* l, const options* o)
{
    const double flops = 6.0 * o->T / g->W * o->K * (double)o->H * o->I;
    double part[MOE_EP_LAYER_PARTS], most = 0;
    const double barrier = group_time(g, run_nothing, l, 0, 1, o->repeat);
    const double ep = group_time(g, run_ep, l, 0, 1, o->repeat) - barrier;
    const double local = group_time(g, run_local, l, 0, 1, o->repeat) - barrier;
    const double few = group_time(g, run_few, l, 0, 1, o->repeat) - barrier;
    const double one = group_time(g, run_one, l, 0, 1, o->repeat) - barrier;
    group_time_parts(g, run_part, l, &l[0].part, MOE_EP_LAYER_PARTS, o->repeat, part);
    for (int p = 0; p < MOE_EP_LAYER_PARTS; ++p) most = part[p] > most ? part[p] : most;
    if (g->first) return;
    print_rate("over ranks", ep, flops, g->W);
    print_rate("local, the rank's tokens, all experts", local, flops, 1);
    print_rate("local, the rank's tokens, its own experts", few, flops * l[0].few.top_k / o->K, 1);
    print_rate("one GPU, all tokens", one, flops * g->W, 1);
    printf("exposed time %.3f ms over the local layer with all experts (%.1f%%), %.3f ms over that "
           "with\n"
           "its own (%.1f%%)\n",
           ep - local, 100 * (ep - local) / local, ep - few, 100 * (ep - few) / few);
    printf("scaling %.2f x over one GPU, of %d: %.1f%%\n\n", one / ep, g->W, 100 * one / ep / g->W);
    for (int p = 0; p < MOE_EP_LAYER_PARTS; ++p) {
        const int bar = most > 0 ? (int)(40 * part[p] / most + 0.5) : 0;
        printf("  %-12s %9.4f ms ", moe_ep_layer_part_name(p), part[p] > 0 ? part[p] : 0);
        for (int i = 0; i < bar; ++i) putchar('#');
        putchar('\n');
    }
    if (MOE_ON_HOST) printf("  the CPU shows that the kernels are right, not how fast they are\n");
    printf("\n");
}

#endif
