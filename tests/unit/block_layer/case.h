/* case.h: a case of the block layer: sizes and options, drawing of its inputs, device buffers, and
   calls of forward and backward. */
#ifndef MOE_TESTS_BLOCK_LAYER_CASE_H
#define MOE_TESTS_BLOCK_LAYER_CASE_H

#include "moe/block_layer.cuh"
#include "tests/test.h"
#include "tests/test_weights.h"

enum {
    DENSE = MOE_BLOCK_LAYER_DENSE,
    SPARSE = MOE_BLOCK_LAYER_SPARSE,
    BATCH = MOE_BLOCK_LAYER_BATCH
};

typedef struct layer_case {
    int form, T, H, I, E, K;
    int block, dtype, grad_dtype, activation;
    float alpha, limit;
    int max_experts;
    int table, pad;   /* of the weights; pad also of x, y, dy and dx, times 1, 2, 3, 4 */
    int unused, bad;  /* percent of ids that are -1, out of range */
    int experts;      /* only the first so many are chosen; 0: all */
    int one_expert;   /* 1: every slot has expert E - 1 */
    int own_act_grad; /* 1: the gradient by pre has memory of its own */
    int in_place;     /* 1: dx is dy */
    int tile;
} layer_case;

typedef struct layer_bufs {
    tbuf x, ids, weights, y, dy, dx, dw1, dw2, grad_expert, dweights, act_grad, saved, workspace;
    tbuf fault;
    tweights w1, w2;
    void *h_x, *h_dy;
    int32_t* h_ids;
    float* h_weights;
    int num_active, active[TWEIGHTS_MOST]; /* experts, ascending */
    moe_block_layer_desc d;
} layer_bufs;

/* ------------------------------------------------------------------ sizes and options */

static const char* case_text(const layer_case* c)
{
    static char text[400];
    static const char* const form[] = {"?", "dense", "sparse", "batch"};
    snprintf(text, sizeof text,
             "%s T=%d H=%d I=%d E=%d K=%d block=%d %s grads %s activation=%d (%g %g) max=%d "
             "table=%d pad=%d unused=%d bad=%d experts=%d one=%d own=%d in_place=%d tile=%d",
             form[c->form], c->T, c->H, c->I, c->E, c->K, c->block, moe_dtype_name(c->dtype),
             moe_dtype_name(c->grad_dtype), c->activation, (double)c->alpha, (double)c->limit,
             c->max_experts, c->table, c->pad, c->unused, c->bad, c->experts, c->one_expert,
             c->own_act_grad, c->in_place, c->tile);
    return text;
}

static layer_case normal_case(int form, int T, int H, int I, int E, int K)
{
    layer_case c;
    memset(&c, 0, sizeof c);
    c.form = form;
    c.T = T, c.H = H, c.I = I, c.E = E;
    c.K = form == DENSE ? 0 : K;
    c.block = 16;
    c.dtype = c.grad_dtype = test_half();
    return c;
}

static int gated(const layer_case* c)
{
    return c->activation == 0 || moe_activation_is_gated(c->activation);
}

/* Elements between rows, all of them different where a case has a pad. */
static int64_t x_stride(const layer_case* c) { return c->H + c->pad; }
static int64_t y_stride(const layer_case* c) { return c->H + 2 * c->pad; }
static int64_t dy_stride(const layer_case* c) { return c->H + 3 * c->pad; }
static int64_t dx_stride(const layer_case* c) { return c->H + (c->in_place ? 3 : 4) * c->pad; }

static size_t rows_bytes(const layer_case* c, int64_t stride)
{
    return (size_t)moe_extent(c->T, stride, c->H, c->dtype);
}

/* Rows of w1, entries of a token's weights, experts that dw1 and dw2 have room for. */
static int64_t up_rows(const layer_case* c) { return gated(c) ? 2 * c->I : c->I; }
static int64_t choices(const layer_case* c) { return c->form == DENSE ? c->E : c->K; }
static int grad_slots(const layer_case* c) { return c->max_experts ? c->max_experts : c->E; }

/* ------------------------------------------------------------------ inputs */

/* Draws ids and weights, and notes the active experts. */
static void fill_routing(layer_bufs* b, const layer_case* c, trand* r)
{
    const int64_t K = choices(c), experts = c->experts ? c->experts : c->E;
    int order[TWEIGHTS_MOST], seen[TWEIGHTS_MOST] = {0};
    for (int e = 0; e < c->E; ++e) order[e] = e;
    for (int i = (int)experts - 1; i > 0; --i) { /* batch: the first K are the batch's */
        const int j = (int)trand_int(r, 0, i), at = order[i];
        order[i] = order[j];
        order[j] = at;
    }
    for (int64_t t = 0; t < c->T; ++t)
        for (int64_t k = 0; k < K; ++k) {
            const int64_t s = t * K + k, u = trand_int(r, 0, 99);
            int e = (int)trand_int(r, 0, experts - 1);
            b->h_weights[s] = 0.1f + 0.9f * (float)trand_int(r, 0, 1000) / 1000;
            if (c->form == DENSE) e = (int)k;
            if (c->form == BATCH) e = order[(k + t) % K];
            if (c->one_expert && c->form != DENSE) e = c->E - 1;
            if (c->form != DENSE && u < c->unused) e = -1;
            else if (c->form != DENSE && u < c->unused + c->bad)
                e = u % 4 == 0 ? c->E : u % 4 == 1 ? INT32_MAX : u % 4 == 2 ? -2 : INT32_MIN;
            if (c->form != DENSE) b->h_ids[s] = e;
            if (e >= 0 && e < c->E) seen[e] = 1;
        }
    b->num_active = 0;
    for (int e = 0; e < c->E; ++e)
        if (seen[e]) b->active[b->num_active++] = e;
    tbuf_put(&b->weights, b->h_weights);
    if (c->form != DENSE) tbuf_put(&b->ids, b->h_ids);
}

/* First slot whose id is bad; -1: none. */
static int64_t first_bad(const layer_bufs* b, const layer_case* c)
{
    for (int64_t s = 0; c->form != DENSE && s < (int64_t)c->T * c->K; ++s)
        if (b->h_ids[s] < -1 || b->h_ids[s] >= c->E) return s;
    return -1;
}

/* Draws weights [E, n, k]: NaN, or a null entry of the table, where the expert is not active. */
static void fill_weights(tweights* w, const layer_bufs* b, const layer_case* c, int n, int k,
                         trand* r)
{
    tweights_want want;
    int active[TWEIGHTS_MOST] = {0};
    memset(&want, 0, sizeof want);
    want.experts = c->E, want.n = n, want.k = k;
    want.dtype = c->dtype;
    want.major = MOE_MAJOR_K;
    want.table = c->table;
    want.pad = c->pad;
    want.scale = (float)(1.5 / sqrt((double)k));
    tweights_new(w, &want, r);
    for (int i = 0; i < b->num_active; ++i) active[b->active[i]] = 1;
    if (c->table) {
        void** address = (void**)tbuf_copy(&w->table[0]);
        for (int e = 0; e < c->E; ++e)
            if (!active[e]) address[e] = 0;
        tbuf_put(&w->table[0], address);
        free(address);
    } else {
        const int64_t row = k + c->pad, matrix = row * n + c->pad;
        for (int e = 0; e < c->E; ++e)
            for (int64_t i = 0; i < n && !active[e]; ++i)
                test_poison((uint16_t*)w->host[0][0] + e * matrix + i * row, (size_t)k * 2);
        tbuf_put(&w->part[0][0], w->host[0][0]);
    }
}

/* ------------------------------------------------------------------ buffers */

/* All that backward writes. */
static tbufs layer_gradients(layer_bufs* b)
{
    return TBUFS(&b->dx, &b->dw1, &b->dw2, &b->dweights, &b->grad_expert);
}

/* All that forward and backward write; y is first. */
static tbufs layer_outputs(layer_bufs* b)
{
    return TBUFS(&b->y, &b->dx, &b->dw1, &b->dw2, &b->dweights, &b->grad_expert);
}

/* Poisons outputs and scratch, puts dy again and clears the fault word. */
static void reset(layer_bufs* b)
{
    const uint64_t none = 0;
    tbufs_poison(layer_outputs(b));
    tbufs_poison(TBUFS(&b->act_grad, &b->saved, &b->workspace));
    tbuf_put(&b->dy, b->h_dy);
    tbuf_put(&b->fault, &none);
}

/* Makes the memory that the descriptor's sizes ask for. Returns their bytes. */
static moe_block_layer_bytes memory_new(moe_block_layer_desc* d, tbuf* saved, tbuf* workspace)
{
    moe_block_layer_bytes bytes;
    CHECK_STATUS(moe_block_layer_sizes(d, &bytes), MOE_OK);
    *saved = tbuf_new("saved", bytes.saved, 0);
    *workspace =
        tbuf_new("workspace", bytes.forward > bytes.backward ? bytes.forward : bytes.backward, 0);
    d->saved = saved->p;
    d->saved_bytes = bytes.saved;
    d->workspace = workspace->p;
    d->workspace_bytes = workspace->bytes;
    return bytes;
}

/* Fills in all of the descriptor but `saved`, the workspace and act_grad. */
static void describe(layer_bufs* b, const layer_case* c)
{
    moe_block_layer_desc* d = &b->d;
    d->x = b->x.p;
    d->ids = c->form == DENSE ? (const int32_t*)0 : (const int32_t*)b->ids.p;
    d->weights = (const float*)b->weights.p;
    d->w1 = b->w1.d, d->w2 = b->w2.d;
    d->y = b->y.p;
    d->dy = b->dy.p;
    d->dx = c->in_place ? b->dy.p : b->dx.p;
    d->dw1 = b->dw1.p, d->dw2 = b->dw2.p;
    d->grad_expert = (int32_t*)b->grad_expert.p;
    d->dweights = (float*)b->dweights.p;
    d->x_stride = c->pad ? x_stride(c) : 0;
    d->y_stride = c->pad ? y_stride(c) : 0;
    d->dy_stride = c->pad ? dy_stride(c) : 0;
    d->dx_stride = c->pad ? dx_stride(c) : 0;
    d->fault = (uint64_t*)b->fault.p;
    d->rank = TEST_RANK;
    d->form = c->form;
    d->num_tokens = c->T, d->hidden = c->H, d->intermediate = c->I;
    d->num_experts = c->E, d->top_k = c->K, d->max_experts = c->max_experts;
    d->block = c->block == 128 ? 0 : c->block;
    d->dtype = c->dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->dtype;
    d->grad_dtype = c->grad_dtype == c->dtype ? MOE_DTYPE_DEFAULT : c->grad_dtype;
    d->activation = c->activation, d->alpha = c->alpha, d->limit = c->limit;
    d->choice.tile = c->tile;
}

static void bufs_new(layer_bufs* b, const layer_case* c, trand* r)
{
    const int64_t T = c->T, H = c->H, I = c->I, K = choices(c), U = up_rows(c);
    const size_t slots = (size_t)grad_slots(c), grad = (size_t)moe_dtype_bytes(c->grad_dtype);
    moe_block_layer_bytes bytes;
    memset(b, 0, sizeof *b);
    b->h_x = trows_new(r, T, x_stride(c), H, c->dtype, TFILL_NORMAL, 1);
    b->h_dy = trows_new(r, T, dy_stride(c), H, c->dtype, TFILL_NORMAL, 1);
    b->h_ids = (int32_t*)test_host(T * K * 4);
    b->h_weights = (float*)test_host(T * K * 4);
    b->x = tbuf_from("x", b->h_x, rows_bytes(c, x_stride(c)), 16);
    b->dy = tbuf_from("dy", b->h_dy, rows_bytes(c, dy_stride(c)), 16);
    b->ids = tbuf_new("ids", c->form == DENSE ? 0 : (size_t)(T * K) * 4, 4);
    b->weights = tbuf_new("weights", (size_t)(T * K) * 4, 4);
    fill_routing(b, c, r);
    fill_weights(&b->w1, b, c, (int)U, (int)H, r);
    fill_weights(&b->w2, b, c, (int)H, (int)I, r);
    b->y = tbuf_new("y", rows_bytes(c, y_stride(c)), 16);
    b->dx = tbuf_new("dx", c->in_place ? 0 : rows_bytes(c, dx_stride(c)), 16);
    b->dw1 = tbuf_new("dw1", slots * (size_t)(U * H) * grad, 16);
    b->dw2 = tbuf_new("dw2", slots * (size_t)(H * I) * grad, 16);
    b->grad_expert = tbuf_new("grad_expert", slots * 4, 4);
    b->dweights = tbuf_new("dweights", (size_t)(T * K) * 4, 4);
    b->fault = tfault_new(0);
    describe(b, c);
    bytes = memory_new(&b->d, &b->saved, &b->workspace);
    b->act_grad = tbuf_new("act_grad", c->own_act_grad ? bytes.act_grad : 0, 16);
    if (c->own_act_grad) b->d.act_grad = b->act_grad.p;
    reset(b);
}

static void bufs_free(layer_bufs* b)
{
    tbufs_free(layer_outputs(b));
    tbufs_free(TBUFS(&b->x, &b->ids, &b->weights, &b->dy, &b->saved, &b->workspace, &b->fault,
                     &b->act_grad));
    tweights_free(&b->w1);
    tweights_free(&b->w2);
    free(b->h_x), free(b->h_dy), free(b->h_ids), free(b->h_weights);
}

/* Gives `to` x, dy, w1 and w2 of another case of the same sizes. */
static void same_inputs(layer_bufs* to, const layer_bufs* from)
{
    tbuf* device[] = {&to->x, &to->w1.part[0][0], &to->w2.part[0][0]};
    void* host[] = {to->h_x, to->w1.host[0][0], to->w2.host[0][0]};
    const void* source[] = {from->h_x, from->w1.host[0][0], from->w2.host[0][0]};
    for (int i = 0; i < 3; ++i) {
        memcpy(host[i], source[i], device[i]->bytes);
        tbuf_put(device[i], host[i]);
    }
    memcpy(to->h_dy, from->h_dy, from->dy.bytes);
    reset(to);
}

static int all_zero(const void* p, size_t bytes)
{
    int zero = 1;
    for (size_t i = 0; i < bytes; ++i) zero &= ((const unsigned char*)p)[i] == 0;
    return zero;
}

/* Returns 1 where a number is infinite or NaN. */
static int any_odd(const char* p, int64_t n, int dtype)
{
    int odd = 0;
    for (int64_t i = 0; i < n; ++i) odd |= !isfinite(moe_load(p, i, dtype));
    return odd;
}

/* ------------------------------------------------------------------ calls */

/* Calls forward and backward. Poisons the workspace between them, so that backward cannot read what
   forward left there. */
static moe_status both(layer_bufs* b)
{
    moe_status s = moe_block_layer_forward(&b->d, test_now.stream);
    if (s != MOE_OK) return s;
    tbuf_poison(&b->workspace);
    return moe_block_layer_backward(&b->d, test_now.stream);
}

/* The same without the poison: a test_call. */
static moe_status call_both(void* context, cudaStream_t stream)
{
    layer_bufs* b = (layer_bufs*)context;
    const moe_status s = moe_block_layer_forward(&b->d, stream);
    return s == MOE_OK ? moe_block_layer_backward(&b->d, stream) : s;
}

/* Runs a part of a test on a case of each form; K is that of sparse and batch. */
static void each_form(uint64_t salt, layer_case any,
                      void (*run)(layer_bufs* b, layer_case* c, trand* r))
{
    trand r = trand_new(salt);
    for (int form = DENSE; form <= BATCH; ++form) {
        layer_case c = any;
        layer_bufs b;
        c.form = form;
        if (form == DENSE) c.K = 0;
        bufs_new(&b, &c, &r);
        run(&b, &c, &r);
        bufs_free(&b);
    }
}

#endif
