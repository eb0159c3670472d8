/* 05_ep: an expert-parallel layer: tokens and experts are spread over ranks.

     nvcc -I. -O2 -arch=sm_90a samples/05_ep/main.cu -o 05_ep && ./05_ep
     torchrun --no-python --nproc_per_node=8 ./05_ep        one process a rank; or mpirun, srun
     g++ -x c++ -std=c++14 -O2 -I. samples/05_ep/main.cu -o 05_ep && ./05_ep

   The last command builds for the CPU, where 4 virtual GPUs run. Copy make_rank, choose and the
   calls in main; group.h connects the ranks, bootstrap.h finds the processes of a launcher. */
#include "group.h"
#include "report.h"
#include "train.h"

typedef struct fill_args {
    void* p;
    int64_t first, count; /* elements, of one long sequence of numbers */
    float scale;
    uint32_t seed;
    int dtype;
} fill_args;

/* Fills in numbers from a hash of (seed, index): a rank can make any part of an array. */
MOE_KERNEL(256, 1) fill(MOE_ARG(fill_args) a)
{
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < a.count;
         i += (int64_t)gridDim.x * 256) {
        uint64_t h = ((uint64_t)(a.first + i) + 1) * 0x9e3779b97f4a7c15ull ^ a.seed * 0xd6e8feb8u;
        h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9ull;
        h ^= h >> 32;
        moe_store_f32(a.p, i, a.dtype,
                      ((float)(uint32_t)(h & 0xffff) / 32768.0f - 1.0f) * 1.73f * a.scale);
    }
}

/* Returns device memory with `count` elements of a sequence, from `first` on. */
static void* make(int64_t first, int64_t count, float scale, uint32_t seed, int dtype)
{
    fill_args a = {0, first, count, scale, seed, dtype};
    moe_launch_config c = moe_grid(MOE_ON_HOST ? 4 : 1024, 256, 0, 0);
    if (cudaMalloc(&a.p, (size_t)count * 2 + 16) != cudaSuccess)
        quit(EXIT_WRONG_INPUT, "this shape needs more memory than the device has");
    MOE(MOE_LAUNCH(fill, c, a));
    CUDA(cudaDeviceSynchronize());
    return a.p;
}

/* Returns a descriptor of `tokens` tokens over `experts` experts. */
static moe_layer_desc make_layer(const options* o, int tokens, int experts, uint64_t* fault)
{
    moe_layer_desc d = {};
    d.num_tokens = tokens;
    d.hidden = o->H, d.intermediate = o->I;
    d.num_experts = experts;
    d.top_k = o->K < experts ? o->K : experts;
    d.dtype = o->dtype;
    d.gate.renormalize = 1;
    d.fault = fault;
    return d;
}

static void give_workspace(moe_layer_desc* d)
{
    MOE(moe_layer_workspace(d, &d->workspace_bytes));
    if (cudaMalloc(&d->workspace, d->workspace_bytes) != cudaSuccess)
        quit(EXIT_WRONG_INPUT, "this shape needs more memory than the device has");
}

/* Makes the layers of rank r, on its device: the one over all ranks, and for comparison that of its
   tokens with all experts, with its own experts alone, and on rank 0 that of all tokens. */
static void make_rank(rank_layers* l, const options* o, const group* g, int r, rank_state* s)
{
    const int64_t H = o->H, I = o->I, w1 = 2 * I * H, w2 = H * I;
    const int begin = (int)((int64_t)o->T * r / g->W), end = (int)((int64_t)o->T * (r + 1) / g->W);
    const int first = moe_ep_first(r, o->E, g->W), own = moe_ep_owned(r, o->E, g->W);
    l->T = end - begin;
    l->ep.layer = make_layer(o, l->T, o->E, s->fault);
    l->ep.layer.x = make(begin * H, l->T * H, 1.0f, 1, o->dtype);
    l->ep.layer.router = make(0, o->E * H, 0.05f, 2, o->dtype); /* the same on all ranks */
    l->ep.layer.w1.base = make(first * w1, own * w1, 0.04f, 3, o->dtype); /* its own experts */
    l->ep.layer.w2.base = make(first * w2, own * w2, 0.04f, 4, o->dtype);
    l->ep.layer.y = make(0, l->T * H, 0.0f, 5, o->dtype);
    l->ep.peers = &s->peers;
    l->ep.buffers.max_tokens = (o->T + g->W - 1) / g->W;
    l->ep.side_stream = s->side;
    l->ep.side_event[0] = s->side_event[0], l->ep.side_event[1] = s->side_event[1];
    CUDA(cudaMalloc((void**)&l->ep.counters, sizeof *l->ep.counters));
    MOE(moe_ep_profile_workspace(&l->ep, &l->ep.layer.workspace_bytes)); /* for any forms */
    if (cudaMalloc(&l->ep.layer.workspace, l->ep.layer.workspace_bytes) != cudaSuccess)
        quit(EXIT_WRONG_INPUT, "this shape needs more memory than the device has");

    l->local = make_layer(o, l->T, o->E, s->fault);
    l->local.x = l->ep.layer.x;
    l->local.router = l->ep.layer.router;
    l->local.w1.base = make(0, o->E * w1, 0.04f, 3, o->dtype);
    l->local.w2.base = make(0, o->E * w2, 0.04f, 4, o->dtype);
    l->local.y = make(0, l->T * H, 0.0f, 5, o->dtype);
    give_workspace(&l->local);
    MOE(moe_layer_prepare(&l->local, &l->local_p));
    if (own) {
        l->few = make_layer(o, l->T, own, s->fault);
        l->few.x = l->ep.layer.x, l->few.router = l->ep.layer.router;
        l->few.w1.base = l->ep.layer.w1.base, l->few.w2.base = l->ep.layer.w2.base;
        l->few.y = make(0, l->T * H, 0.0f, 5, o->dtype);
        give_workspace(&l->few);
        MOE(moe_layer_prepare(&l->few, &l->few_p));
    }
    if (r) return;
    l->one = make_layer(o, o->T, o->E, s->fault);
    l->one.x = make(0, o->T * H, 1.0f, 1, o->dtype);
    l->one.router = l->local.router, l->one.w1 = l->local.w1, l->one.w2 = l->local.w2;
    l->one.y = make(0, o->T * H, 0.0f, 5, o->dtype);
    give_workspace(&l->one);
    MOE(moe_layer_prepare(&l->one, &l->one_p));
}

/* Reads a choice from a file: rank 0, for all. Returns 0 where there is no such file. */
static int read_choice(group* g, const char* name, moe_ep_choice* c)
{
    static struct {
        moe_ep_choice choice;
        int found; /* -1: no choice, 0: no file, 1: read */
        int line;
    } own, all[BOOTSTRAP_MOST];
    char text[MOE_EP_CHOICE_TEXT] = "";
    FILE* f = g->first ? 0 : fopen(name, "r");
    if (f) {
        text[fread(text, 1, sizeof text - 1, f)] = 0;
        fclose(f);
        own.found = moe_ep_choice_read(&own.choice, text, &own.line) == MOE_OK ? 1 : -1;
    }
    all[0] = own;
    if (g->launched && bootstrap_allgather(&g->boot, &own, all, sizeof own))
        quit(EXIT_WRONG_RESULT, "a process is gone");
    if (all[0].found < 0)
        quit(EXIT_WRONG_INPUT, "%s, line %d: says nothing about a choice", name, all[0].line);
    *c = all[0].choice;
    return all[0].found;
}

/* Sets *c to the options' forms, those of a file, or those that are fastest here. */
static void choose(group* g, rank_layers* l, const options* o, moe_ep_choice* c)
{
    static moe_ep_profile_rank rank[MOST_RANKS];
    moe_ep_profile_desc d = {};
    char text[MOE_EP_CHOICE_TEXT];
    *c = o->choice;
    if (c->dispatch_form || c->combine_form) return;
    if (o->file && read_choice(g, o->file, c)) return;
    for (int i = 0; i < g->mine; ++i) {
        rank[i].layer = &l[i].ep;
        rank[i].stream = g->rank[i].stream, rank[i].device = g->rank[i].device;
    }
    d.rank = rank, d.num_mine = g->mine;
    if (g->launched) d.allgather = bootstrap_allgather, d.context = &g->boot;
    MOE(moe_ep_profile(&d, c));
    moe_ep_choice_table(c, text, sizeof text);
    if (g->first == 0) printf("%s\n", text);
    if (g->first == 0 && o->file) {
        FILE* f = fopen(o->file, "w");
        moe_ep_choice_write(c, text, sizeof text);
        if (!f || fputs(text, f) < 0 || fclose(f))
            quit(EXIT_WRONG_INPUT, "%s: cannot be written", o->file);
    }
}

/* Makes what rank r trains, from its layers of make_rank: the step over ranks with the chosen forms,
   and the local ones. */
static void make_train(train_rank* t, const rank_layers* l, const options* o, const group* g, int r)
{
    const int own = moe_ep_owned(r, o->E, g->W);
    const void* dy;
    moe_layer_saved_list kept;
    t->T = l->T;
    t->begin = (int)((int64_t)o->T * r / g->W);
    t->counts = o->counts;
    t->infer = l->ep_p;
    t->ep.forward = l->ep;
    t->ep.forward.counters = 0;
    t->ep.forward.layer.workspace = 0; /* that one is the inference layer's */
    t->ep.forward.layer.workspace_bytes = 0;
    t->ep.forward.redispatch_x = o->redispatch;
    t->ep.forward.count_rows = o->counts;
    dy = make((int64_t)t->begin * o->H, (int64_t)l->T * o->H, 1.0f, 6, o->dtype);
    want_gradients(&t->ep.grads, o, l->T, own, o->E, dy);
    MOE(moe_ep_layer_saved(&t->ep.forward, &kept));
    t->ep.forward.layer.saved = device_memory(kept.bytes);
    t->ep.forward.layer.saved_bytes = kept.bytes;
    prepare_train(t);
    train_local(&t->all, o, &l->local, dy);
    if (own) train_local(&t->own, o, &l->few, dy);
}

/* Makes the one GPU of a process: all tokens and experts. */
static void make_whole(train_rank* t, const rank_layers* l, const options* o)
{
    moe_layer_desc d = l->local;
    d.num_tokens = o->T;
    d.x = make(0, (int64_t)o->T * o->H, 1.0f, 1, o->dtype);
    d.y = make(0, (int64_t)o->T * o->H, 0.0f, 5, o->dtype);
    d.workspace = 0;
    train_local(&t->one, o, &d, make(0, (int64_t)o->T * o->H, 1.0f, 6, o->dtype));
}

/* Trains: compares a step with one GPU's and prints what it keeps and takes. Returns 1 where it is
   wrong. */
static int train(group* g, const rank_layers* l, const options* o)
{
    static train_rank t[MOST_RANKS];
    int wrong;
    for (int i = 0; i < g->mine; ++i) {
        (void)group_use(g, i);
        make_train(&t[i], &l[i], o, g, g->first + i);
    }
    (void)group_use(g, 0);
    make_whole(&t[0], &l[0], o);
    if (o->counts) count_train(g, t);
    wrong = print_gradients(g, t, o);
    print_audit(g, t, o);
    print_training_times(g, t, o);
    return wrong;
}

int main(int argc, char** argv)
{
    static group g;
    static rank_layers l[MOST_RANKS];
    const options o = read_options(argc, argv);
    moe_ep_layer_backward_desc training = {};
    moe_ep_layer_desc sizes = {};
    moe_ep_choice choice;
    uint64_t region;
    int wrong;
    group_begin(&g, &o);
    sizes.layer = make_layer(&o, 0, o.E, 0);
    sizes.buffers.max_tokens = (o.T + g.W - 1) / g.W;
    MOE(moe_ep_profile_region(&sizes, g.W, &region)); /* for any forms */
    for (int form = 1; form < MOE_EP_DISPATCH_FORMS * MOE_EP_COMBINE_FORMS && o.train; ++form) {
        uint64_t bytes;
        training.forward = sizes;
        training.forward.buffers.dispatch_form = form / MOE_EP_COMBINE_FORMS;
        training.forward.buffers.combine_form = form % MOE_EP_COMBINE_FORMS;
        MOE(moe_ep_layer_backward_region(&training, g.W, &bytes));
        if (bytes > region) region = bytes;
    }
    group_connect(&g, region);
    for (int i = 0; i < g.mine; ++i) make_rank(&l[i], &o, &g, g.first + i, group_use(&g, i));
    choose(&g, l, &o, &choice);
    for (int i = 0; i < g.mine; ++i) {
        CUDA(cudaSetDevice(g.rank[i].device));
        CUDA(cudaMemset(l[i].ep.counters, 0, sizeof *l[i].ep.counters));
        CUDA(cudaDeviceSynchronize());
        MOE(moe_ep_choice_apply(&choice, &l[i].ep.buffers));
        MOE(moe_ep_layer_prepare(&l[i].ep, &l[i].ep_p));
    }
    print_header(&g, &o, &choice);
    if (o.train) {
        wrong = train(&g, l, &o);
    } else {
        wrong = print_numerics(&g, l, &o);
        print_bytes(&g, l, &o, region);
        print_times(&g, l, &o);
    }
    wrong = (int)group_max(&g, wrong);
    if (g.first == 0 && o.train) puts(wrong ? "FAILED: gradients are wrong" : "PASS");
    else if (g.first == 0) puts(wrong ? "FAILED: y is wrong" : "PASSED: y is that of one GPU");
    if (g.launched) (void)moe_peers_close_ipc(&g.rank[0].peers);
    (void)group_max(&g, 0); /* no process frees what another one uses */
    return wrong ? EXIT_WRONG_RESULT : 0;
}
