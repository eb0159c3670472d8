/* test_training.cu: a small model trained twice, with the pointer table and with cat + index_add.

     nvcc -I. -arch=sm_90a tests/unit/test_training.cu -o test_training
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_training.cu -o test_training

   The model is y = x + layer(x), the loss the mean square of y - target, the optimizer plain SGD. x is
   trained too, as an embedding is: the losses depend on dx.
     table   moe_layer_forward and moe_layer_backward
     cat     each expert's rows in an allocation of its own; cat copies them into one array, weighted
             rows are added to their tokens (index_add); backward through copies of dy, the gradients
             of rows added to their tokens' dx
     plain   cat with the gradients that differentiating it by hand gives: of a row w dy, rounded, and
             of a weight <dy, row>

     test_losses     table and cat add up the same numbers in the same order: equal bits in every step.
                     plain rounds otherwise: equal bits in the first step, whose gradients are within
                     1 % of their norm; within 5 % in the next ten, and at the end within 20 % in the
                     mean. Norms of gradients above zero
     test_balance    a balance loss evens out what a skewed router had made uneven */
#include "tests/test.h"

#include "moe/balance_loss.cuh"
#include "moe/layer_backward.cuh"
#include "tests/test_case.h"
#include "tests/test_weights.h"

enum { T = 96, H = 32, I = 24, E = 6, K = 2, R = T * K };
enum { ROUTER, W1, W2, X, PARAMS };
static const int64_t sizes[PARAMS] = {E * H, E * 2 * I* H, E* H* I, T* H};
static const float rates[PARAMS] = {0.1f, 1, 1, 1}; /* factors on the step */

/* One model and its training state. */
typedef struct model {
    tbuf value[PARAMS], master[PARAMS], grad[PARAMS]; /* 16-bit, fp32, fp32 */
    tbuf target, y, dy, loss, fault, saved, workspace;
    tbuf count, prob, balance_grad, balance_loss;
    moe_layer_desc layer;
    moe_layer_backward_desc backward;
    /* of cat */
    tbuf logits, ids, weights, expert_count, offset, row_slot, slot_row, row_weight, place;
    tbuf router_workspace, route_workspace, act, pre, part[E], table, cat, dcat, dweights, dlogits,
        back_act, dot, x_rows;
} model;

typedef struct step_args {
    const uint16_t *x, *target;
    uint16_t *y, *dy;
    float* loss;
    float *master, *grad;
    uint16_t* value;
    int64_t n;
    float rate;
    const void* const* table; /* [E] rows of each expert */
    const int32_t *offset, *row_slot, *slot_row;
    const float* weights;          /* [T, K] */
    uint16_t *cat, *dcat, *x_rows; /* [R, H] */
    float* dweights;               /* [T, K] */
    int32_t dtype, plain;          /* plain: 1: dcat is weighted, and dweights is written */
} step_args;

/* The loss, its gradient; one thread block. */
MOE_KERNEL(32, 1) square_loss(MOE_ARG(step_args) a)
{
    float sum = 0.0f;
    for (int i = (int)threadIdx.x; i < T * H; i += 32) {
        const float off = moe_half_to_f32(a.y[i], a.dtype) - moe_half_to_f32(a.target[i], a.dtype);
        sum += off * off;
        moe_store_f32(a.dy, i, a.dtype, off * (2.0f / (T * H)));
    }
    for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (threadIdx.x == 0) *a.loss = sum / (T * H);
}

MOE_KERNEL(128, 1) sgd(MOE_ARG(step_args) a)
{
    const int64_t i = (int64_t)blockIdx.x * 128 + threadIdx.x;
    if (i >= a.n) return;
    a.master[i] -= a.rate * a.grad[i];
    moe_store_f32(a.value, i, a.dtype, a.master[i]);
}

/* cat: one array of all experts' rows. One thread block a row. */
MOE_KERNEL(H, 1) cat_rows(MOE_ARG(step_args) a)
{
    const int r = (int)blockIdx.x, h = (int)threadIdx.x;
    int e = 0;
    if (r >= a.offset[E]) return;
    while (a.offset[e + 1] <= r) ++e;
    a.cat[r * H + h] = ((const uint16_t*)a.table[e])[(r - a.offset[e]) * H + h];
}

/* index_add: a token's weighted rows, in slot order. One thread block a token. */
MOE_KERNEL(H, 1) index_add(MOE_ARG(step_args) a)
{
    const int t = (int)blockIdx.x, h = (int)threadIdx.x;
    float sum = moe_half_to_f32(a.x[t * H + h], a.dtype);
    for (int k = 0; k < K; ++k)
        sum = fmaf(a.weights[t * K + k],
                   moe_half_to_f32(a.cat[a.slot_row[t * K + k] * H + h], a.dtype), sum);
    moe_store_f32(a.y, t * H + h, a.dtype, sum);
}

/* Adds the gradients of a token's rows, in slot order, to what dx has: dy and the router's part. One
   thread block a token. */
MOE_KERNEL(H, 1) index_add_rows(MOE_ARG(step_args) a)
{
    const int t = (int)blockIdx.x, h = (int)threadIdx.x;
    float sum = moe_half_to_f32(a.dy[t * H + h], a.dtype);
    for (int k = 0; k < K; ++k)
        sum += moe_half_to_f32(a.cat[a.slot_row[t * K + k] * H + h], a.dtype);
    moe_store_f32(a.dy, t * H + h, a.dtype, sum);
}

/* The gradient of x in fp32, from dx. */
MOE_KERNEL(H, 1) widen(MOE_ARG(step_args) a)
{
    const int i = (int)(blockIdx.x * H + threadIdx.x);
    a.grad[i] = moe_half_to_f32(a.dy[i], a.dtype);
}

/* Copies of x and dy in the order of cat; plain: gradients of its rows, and of the weights. One thread block
   a row. */
MOE_KERNEL(H, 1) index_select(MOE_ARG(step_args) a)
{
    const int r = (int)blockIdx.x, h = (int)threadIdx.x;
    const int slot = r < a.offset[E] ? a.row_slot[r] : -1;
    float dy, dot;
    if (slot < 0) return;
    a.x_rows[r * H + h] = a.x[slot / K * H + h];
    dy = moe_half_to_f32(a.dy[slot / K * H + h], a.dtype);
    moe_store_f32(a.dcat, r * H + h, a.dtype, a.plain ? a.weights[slot] * dy : dy);
    if (!a.plain) return;
    dot = dy * moe_half_to_f32(a.cat[r * H + h], a.dtype);
    for (int d = 16; d > 0; d >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, d);
    if (h == 0) a.dweights[slot] = dot;
}

/* Fills in the descriptors of the layer. counts: the gate counts, for a balance loss. */
static void layer_new(model* m, int counts)
{
    moe_layer_saved_list list;
    moe_layer_desc* l = &m->layer;
    moe_layer_backward_desc* b = &m->backward;
    size_t forward, backward;
    l->num_tokens = T, l->hidden = H, l->intermediate = I, l->num_experts = E, l->top_k = K;
    l->dtype = test_half();
    l->x = l->residual = m->value[X].p, l->y = m->y.p, l->fault = (uint64_t*)m->fault.p;
    l->router = m->value[ROUTER].p, l->w1.base = m->value[W1].p, l->w2.base = m->value[W2].p;
    if (counts) l->gate.expert_count = (int32_t*)m->count.p, l->gate.prob_sum = (float*)m->prob.p;
    CHECK_STATUS(moe_layer_saved(l, &list), MOE_OK);
    m->saved = tbuf_new("saved", list.bytes, 0);
    l->saved = m->saved.p, l->saved_bytes = list.bytes;
    b->layer = *l;
    b->dy = m->dy.p, b->drouter = m->grad[ROUTER].p;
    if (!counts) b->dx = m->dy.p, b->dx_accumulate = 1; /* y has x itself */
    b->dw1.base = m->grad[W1].p, b->dw2.base = m->grad[W2].p;
    b->grad_dtype = b->router_grad_dtype = MOE_FP32;
    b->gather = MOE_LAYER_GATHER_FIRST; /* as cat has them */
    CHECK_STATUS(moe_layer_workspace(l, &forward), MOE_OK);
    CHECK_STATUS(moe_layer_backward_workspace(b, &backward), MOE_OK);
    m->workspace = tbuf_new("workspace", forward > backward ? forward : backward, 0);
    l->workspace = b->layer.workspace = m->workspace.p;
    l->workspace_bytes = b->layer.workspace_bytes = m->workspace.bytes;
}

/* Makes a model; equal seeds make equal models. skew: how much the router prefers expert 0 for what
   tokens have in common. */
static void model_new(model* m, trand* r, float skew)
{
    static const float scale[PARAMS] = {0.2f, 0.25f, 0.3f};
    const int dtype = test_half();
    void *x = trows_new(r, T, H, H, dtype, TFILL_NORMAL, 1), *target;
    float mean[H];
    memset(m, 0, sizeof *m);
    for (int t = 0; t < T; ++t) /* all tokens have something in common */
        for (int h = 0; h < H; ++h) {
            mean[h] = (float)(h % 3 - 1);
            moe_store(x, t * H + h, dtype, moe_load(x, t * H + h, dtype) + mean[h]);
        }
    target = trows_new(r, T, H, H, dtype, TFILL_NORMAL, 1);
    m->target = tbuf_from("target", target, T * H * 2, 16);
    for (int i = 0; i < PARAMS; ++i) {
        void* value = i == X ? x : trows_new(r, sizes[i], 1, 1, dtype, TFILL_NORMAL, scale[i]);
        float* master = (float*)test_host(sizes[i] * 4);
        for (int64_t k = 0; k < sizes[i]; ++k) {
            master[k] = moe_load(value, k, dtype) + (i == ROUTER && k < H ? skew * mean[k] : 0);
            moe_store(value, k, dtype, master[k]);
        }
        m->value[i] = tbuf_from("parameters", value, (size_t)sizes[i] * 2, 16);
        m->master[i] = tbuf_from("masters", master, (size_t)sizes[i] * 4, 16);
        m->grad[i] = tbuf_new("gradients", (size_t)sizes[i] * 4, 16);
        TFREE(value, master);
    }
    m->y = tbuf_new("y", T * H * 2, 16), m->dy = tbuf_new("dy", T * H * 2, 16);
    m->loss = tbuf_from("loss", &scale[0], 4, 4), m->fault = tfault_new(0);
    m->count = tbuf_new("expert_count", E * 4, 4), m->prob = tbuf_new("prob_sum", E * 4, 4);
    m->balance_grad = tbuf_new("balance_grad", (E + 1) * 4, 4);
    m->balance_loss = tbuf_new("balance loss", 16, 4);
    layer_new(m, skew != 0);
    free(target);
}

/* Adds what cat needs. */
static void cat_new(model* m)
{
    moe_route_desc d = {};
    moe_router_backward_desc back = {};
    void* address[E];
    size_t bytes = 0;
    d.num_tokens = T, d.num_experts = E, d.top_k = K;
    CHECK_STATUS(moe_route_workspace(&d, &bytes), MOE_OK);
    m->route_workspace = tbuf_new("route", bytes, 16);
    back.x_dtype = test_half(), back.drouter = m->grad[ROUTER].p, back.dx = m->dy.p;
    back.num_tokens = T, back.hidden = H, back.num_experts = E;
    CHECK_STATUS(moe_router_backward_workspace(&back, &bytes), MOE_OK);
    m->logits = tbuf_new("logits", T * E * 4, 16), m->dlogits = tbuf_new("dlogits", T * E * 4, 16);
    m->ids = tbuf_new("ids", R * 4, 4), m->weights = tbuf_new("weights", R * 4, 4);
    m->expert_count = tbuf_new("counts", E * 4, 4), m->offset = tbuf_new("offset", E * 4 + 4, 4);
    m->row_slot = tbuf_new("row_slot", R * 4, 4), m->slot_row = tbuf_new("slot_row", R * 4, 4);
    m->row_weight = tbuf_new("row_weight", R * 4, 4), m->place = tbuf_new("place", R * 8, 8);
    m->act = tbuf_new("act", R * I * 2, 16), m->pre = tbuf_new("pre", R * 2 * I * 2, 16);
    m->back_act = tbuf_new("act", R * I * 2, 16);
    for (int e = 0; e < E; ++e) {
        m->part[e] = tbuf_new("rows", R * H * 2, 16);
        address[e] = m->part[e].p;
    }
    m->table = tbuf_from("table", address, sizeof address, 8);
    m->cat = tbuf_new("cat", R * H * 2, 16), m->dcat = tbuf_new("dcat", R * H * 2, 16);
    m->dweights = tbuf_new("dweights", R * 4, 4), m->dot = tbuf_new("dot", R * 4, 4);
    m->x_rows = tbuf_new("x_rows", R * H * 2, 16);
    m->router_workspace = tbuf_new("router", bytes, 0);
}

static void model_free(model* m, int cat)
{
    for (int i = 0; i < PARAMS; ++i) tbufs_free(TBUFS(&m->value[i], &m->master[i], &m->grad[i]));
    tbufs_free(TBUFS(&m->target, &m->y, &m->dy, &m->loss, &m->fault, &m->saved));
    tbufs_free(TBUFS(&m->workspace, &m->count, &m->prob, &m->balance_grad, &m->balance_loss));
    if (!cat) return;
    for (int e = 0; e < E; ++e) tbuf_free(&m->part[e]);
    tbufs_free(TBUFS(&m->logits, &m->ids, &m->weights, &m->expert_count, &m->offset, &m->row_slot));
    tbufs_free(TBUFS(&m->slot_row, &m->row_weight, &m->place, &m->route_workspace, &m->act));
    tbufs_free(TBUFS(&m->pre, &m->table, &m->cat, &m->dcat, &m->dweights, &m->dlogits));
    tbufs_free(TBUFS(&m->back_act, &m->dot, &m->x_rows, &m->router_workspace));
}

static step_args args_of(const model* m)
{
    step_args a = {};
    a.x = (const uint16_t*)m->value[X].p, a.target = (const uint16_t*)m->target.p;
    a.y = (uint16_t*)m->y.p, a.dy = (uint16_t*)m->dy.p, a.loss = (float*)m->loss.p;
    a.table = (const void* const*)m->table.p, a.offset = (const int32_t*)m->offset.p;
    a.row_slot = (const int32_t*)m->row_slot.p, a.slot_row = (const int32_t*)m->slot_row.p;
    a.weights = (const float*)m->weights.p, a.dweights = (float*)m->dweights.p;
    a.cat = (uint16_t*)m->cat.p, a.dcat = (uint16_t*)m->dcat.p;
    a.x_rows = (uint16_t*)m->x_rows.p;
    a.dtype = test_half();
    return a;
}

static void run_kernel(const char* name, moe_status s) { CHECK(s == MOE_OK, "%s", name); }
#define LAUNCH(kernel, blocks, threads, args)                                                      \
    do {                                                                                           \
        const moe_launch_config c_ = moe_grid(blocks, threads, 0, test_now.stream);                \
        run_kernel(#kernel, MOE_LAUNCH(kernel, c_, args));                                         \
    } while (0)

/* Takes one step of SGD, and returns the loss before it. Writes the gradients' norms. */
static float finish(model* m, float rate, double norm[PARAMS])
{
    float loss;
    for (int i = 0; i < PARAMS - !m->backward.dx; ++i) {
        step_args a = args_of(m);
        float* grad;
        a.master = (float*)m->master[i].p, a.grad = (float*)m->grad[i].p;
        a.value = (uint16_t*)m->value[i].p, a.n = sizes[i], a.rate = rate * rates[i];
        if (i == X) LAUNCH(widen, T, H, a);
        grad = (float*)tbuf_copy(&m->grad[i]);
        norm[i] = 0;
        for (int64_t k = 0; k < sizes[i]; ++k) norm[i] += (double)grad[k] * grad[k];
        free(grad);
        LAUNCH(sgd, (sizes[i] + 127) / 128, 128, a);
    }
    TEST_CUDA(cudaStreamSynchronize(test_now.stream));
    tbuf_get(&m->loss, &loss);
    return loss;
}

/* One step with the pointer table. */
static float step_table(model* m, float rate, double norm[PARAMS])
{
    const step_args a = args_of(m);
    CHECK_STATUS(moe_layer_forward(&m->layer, test_now.stream), MOE_OK);
    LAUNCH(square_loss, 1, 32, a);
    CHECK_STATUS(moe_layer_backward(&m->backward, test_now.stream), MOE_OK);
    return finish(m, rate, norm);
}

/* The experts, their rows in an allocation each. */
static moe_experts_desc cat_experts(const model* m)
{
    moe_experts_desc d = {};
    d.x = m->value[X].p, d.w1.base = m->value[W1].p, d.w2.base = m->value[W2].p;
    d.expert_offset = (const int32_t*)m->offset.p, d.row_slot = (const int32_t*)m->row_slot.p;
    d.act = m->act.p, d.pre = m->pre.p, d.table = (void* const*)m->table.p;
    d.num_tokens = T, d.hidden = H, d.intermediate = I, d.num_experts = E, d.top_k = K;
    d.dtype = test_half();
    return d;
}

/* One step with cat and index_add; plain as above. */
static float step_cat(model* m, int plain, float rate, double norm[PARAMS])
{
    step_args a = args_of(m);
    const moe_experts_desc experts = cat_experts(m);
    moe_router_desc router = {};
    moe_gate_desc gate = {};
    moe_route_desc route = {};
    moe_experts_backward_desc back = {};
    moe_gate_backward_desc gate_back = {};
    moe_router_backward_desc router_back = {};
    a.plain = plain;
    router.x = m->value[X].p, router.router = m->value[ROUTER].p,
    router.logits = (float*)m->logits.p;
    router.x_dtype = test_half(), router.num_tokens = T, router.hidden = H, router.num_experts = E;
    gate.logits = m->logits.p, gate.ids = (int32_t*)m->ids.p, gate.weights = (float*)m->weights.p;
    gate.num_tokens = T, gate.num_experts = E, gate.top_k = K;
    route.ids = gate.ids, route.weights = gate.weights;
    route.expert_count = (int32_t*)m->expert_count.p, route.expert_offset = (int32_t*)m->offset.p;
    route.row_slot = (int32_t*)m->row_slot.p, route.slot_row = (int32_t*)m->slot_row.p;
    route.row_weight = (float*)m->row_weight.p, route.place = (moe_place*)m->place.p;
    route.num_tokens = T, route.num_experts = E, route.top_k = K;
    route.workspace = m->route_workspace.p, route.workspace_bytes = m->route_workspace.bytes;
    CHECK_STATUS(moe_router_logits(&router, test_now.stream), MOE_OK);
    CHECK_STATUS(moe_gate(&gate, test_now.stream), MOE_OK);
    CHECK_STATUS(moe_route(&route, test_now.stream), MOE_OK);
    CHECK_STATUS(moe_experts(&experts, test_now.stream), MOE_OK);
    LAUNCH(cat_rows, R, H, a);
    LAUNCH(index_add, T, H, a);
    LAUNCH(square_loss, 1, 32, a);

    LAUNCH(index_select, R, H, a);
    back.x = m->value[X].p, back.dy = m->dy.p, back.dy_rows = m->dcat.p, back.x_rows = m->x_rows.p,
    back.pre = m->pre.p;
    back.w1 = experts.w1, back.w2 = experts.w2;
    back.expert_offset = experts.expert_offset, back.row_slot = experts.row_slot;
    back.rows = m->cat.p, back.dw1.base = m->grad[W1].p, back.dw2.base = m->grad[W2].p,
    back.act = m->back_act.p;
    back.num_tokens = T, back.hidden = H, back.intermediate = I, back.num_experts = E;
    back.top_k = K, back.dtype = test_half(), back.grad_dtype = MOE_FP32;
    if (!plain) { /* weights in the products, and their gradients from the activations */
        back.weights = gate.weights, back.row_weight = route.row_weight;
        back.slot_row = route.slot_row, back.dweights = (float*)m->dweights.p;
        back.dot = (float*)m->dot.p;
    }
    gate_back.gate = gate, gate_back.dweights = (const float*)m->dweights.p;
    gate_back.dlogits = m->dlogits.p;
    router_back.x = m->value[X].p, router_back.dlogits = (const float*)m->dlogits.p;
    router_back.x_dtype = test_half(), router_back.drouter = m->grad[ROUTER].p;
    router_back.grad_dtype = MOE_FP32;
    router_back.router = m->value[ROUTER].p, router_back.dx = m->dy.p;
    router_back.dx_accumulate = 1;
    router_back.num_tokens = T, router_back.hidden = H, router_back.num_experts = E;
    router_back.workspace = m->router_workspace.p;
    router_back.workspace_bytes = m->router_workspace.bytes;
    CHECK_STATUS(moe_experts_backward(&back, test_now.stream), MOE_OK);
    CHECK_STATUS(moe_gate_backward(&gate_back, test_now.stream), MOE_OK);
    CHECK_STATUS(moe_router_backward(&router_back, test_now.stream), MOE_OK);
    LAUNCH(index_add_rows, T, H, a);
    return finish(m, rate, norm);
}

/* Returns the norm of the difference of two models' gradients of one weight, over the norm of the
   first one's. */
static double grad_distance(const model* a, const model* b, int weight)
{
    float *x = (float*)tbuf_copy(&a->grad[weight]), *y = (float*)tbuf_copy(&b->grad[weight]);
    double off = 0, sum = 0;
    for (int64_t k = 0; k < sizes[weight]; ++k) {
        off += ((double)x[k] - y[k]) * ((double)x[k] - y[k]);
        sum += (double)x[k] * x[k];
    }
    TFREE(x, y);
    return sqrt(off / sum);
}

static void test_losses(void)
{
    enum { TABLE, CAT, PLAIN, MODELS };
    const int steps = MOE_ON_HOST && !test_long() ? 60 : 300;
    const float rate = 0.5f; /* with 1 rounding grows from step to step, and models part */
    model m[MODELS];
    float first = 0, last[MODELS] = {};
    double tail[MODELS] = {};
    for (int k = 0; k < MODELS; ++k) {
        trand r = trand_new(1);
        model_new(m + k, &r, 0);
        if (k) cat_new(m + k);
    }
    for (int i = 0; i < steps && !test_now.failures; ++i) {
        double norm[MODELS][PARAMS];
        last[TABLE] = step_table(m + TABLE, rate, norm[TABLE]);
        last[CAT] = step_cat(m + CAT, 0, rate, norm[CAT]);
        last[PLAIN] = step_cat(m + PLAIN, 1, rate, norm[PLAIN]);
        if (i == 0) first = last[TABLE];
        CHECK(last[TABLE] == last[CAT], "step %d: losses %.9g and, with cat, %.9g", i,
              (double)last[TABLE], (double)last[CAT]);
        CHECK(i > 10 || fabsf(last[PLAIN] - last[TABLE]) <= (i ? 0.05f * last[TABLE] : 0.0f),
              "step %d: losses %.9g and, plain, %.9g", i, (double)last[TABLE], (double)last[PLAIN]);
        for (int w = 0; i == 0 && w < PARAMS; ++w) {
            const double distance = grad_distance(m + TABLE, m + PLAIN, w);
            if (test_now.verbose) printf("  plain gradient %d: %g\n", w, distance);
            CHECK(distance <= 0.01, "plain gradient %d: a distance of %g", w, distance);
        }
        for (int k = 0; k < MODELS; ++k) {
            if (i >= steps - 20) tail[k] += last[k] / 20;
            for (int w = 0; w < PARAMS; ++w)
                CHECK(norm[k][w] > 0 && norm[k][w] < INFINITY, "step %d: norm of gradient %d: %g",
                      i, w, norm[k][w]);
        }
    }
    if (test_now.verbose)
        printf("  loss %g -> %g, plain %g\n", (double)first, tail[TABLE], tail[PLAIN]);
    CHECK(tail[TABLE] < 0.5 * first, "the loss went from %g to %g", (double)first, tail[TABLE]);
    CHECK(fabs(tail[PLAIN] - tail[TABLE]) <= 0.2 * tail[TABLE], "at the end %g and, plain, %g",
          tail[TABLE], tail[PLAIN]);
    for (int k = 0; k < MODELS; ++k) {
        CHECK_FAULT(&m[k].fault, MOE_FAULT_NONE, 0);
        model_free(m + k, k > 0);
    }
}

/* Returns the largest share of the slots that one expert has. */
static double busiest(const model* m)
{
    int32_t count[E], most = 0;
    tbuf_get(&m->count, count);
    for (int e = 0; e < E; ++e) most = count[e] > most ? count[e] : most;
    return (double)most / R;
}

static void test_balance(void)
{
    trand r = trand_new(2);
    model m;
    moe_balance_loss_desc loss = {};
    float value[4], first = 0;
    double before = 0, after;
    model_new(&m, &r, 0.1f);
    loss.expert_count = (const int32_t*)m.count.p, loss.prob_sum = (const float*)m.prob.p;
    loss.balance_grad = (float*)m.balance_grad.p, loss.loss = (float*)m.balance_loss.p;
    loss.num_experts = E, loss.aux_coefficient = loss.variance_coefficient = 1;
    m.backward.balance_grad = (const float*)m.balance_grad.p;
    TEST_CUDA(cudaMemset(m.dy.p, 0, m.dy.bytes)); /* no other loss */
    for (int i = 0; i < 80; ++i) {
        double norm[PARAMS];
        CHECK_STATUS(moe_layer_forward(&m.layer, test_now.stream), MOE_OK);
        CHECK_STATUS(moe_balance_loss(&loss, test_now.stream), MOE_OK);
        CHECK_STATUS(moe_layer_backward(&m.backward, test_now.stream), MOE_OK);
        finish(&m, 0.2f, norm);
        tbuf_get(&m.balance_loss, value);
        if (i == 0) before = busiest(&m), first = value[3];
        CHECK(norm[ROUTER] > 0 && norm[W1] == 0, "norms of gradients: %g, %g", norm[ROUTER],
              norm[W1]);
    }
    after = busiest(&m);
    if (test_now.verbose)
        printf("  busiest %g -> %g, loss %g -> %g\n", before, after, (double)first,
               (double)value[3]);
    CHECK(value[3] < first && after < 0.8 * before, "the busiest expert: %g of the slots, then %g",
          before, after);
    model_free(&m, 0);
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_losses);
    RUN(test_balance);
    return test_end();
}
