/* case.h: a case of the layer's backward pass: a case of the layer (layer/case.h), what its gradients
   are asked for with, and how every result is compared with the references, each station on what the
   device's stations before it gave.

   normal_case    (layer/case.h) a case of the layer with usual fields
   bufs_begin     draws all inputs and makes all buffers
   run_both       forward and backward
   compare        compares all results of backward
   run_case       all of it */
#ifndef MOE_TESTS_LAYER_BACKWARD_CASE_H
#define MOE_TESTS_LAYER_BACKWARD_CASE_H

#include "tests/unit/layer/compare.h"

#include "moe/layer_backward.cuh"
#include "moe/ref/experts_backward.h"
#include "moe/ref/gate_backward.h"
#include "moe/ref/router_backward.h"

typedef struct grads_case {
    layer_case f;
    int grad_dtype, router_grad_dtype, accumulate, dx_accumulate, gather, recompute;
    int dx_is_dy;
    int balance; /* 1: with gradients of balance losses */
    int none;    /* 1: dx alone; 2: no dx */
    int dy_pad, dx_pad;
} grads_case;

typedef struct grads_bufs {
    layer_bufs f; /* its workspace serves both passes */
    tbuf dy, dx, saved, balance, drouter, dlogits, dweights, dw1, dw1_up, dw2, dbias1, dbias2;
    tbuf s_dw1, s_dw1_up, s_dw2, s_dbias1, s_dbias2, s_dweight;
    uint16_t *h_dy, *h_dx; /* h_dx: what dx holds before */
    float* h_balance;
    moe_gate_desc h_gate;   /* the gate's rules with addresses of the host, where there are some */
    int32_t* h_shared_slot; /* [T] slots of the shared expert, with disabled tokens; or null */
    moe_layer_backward_desc d;
    /* copies of what forward left, and of the workspace afterwards */
    char *kept, *recomputed, *workspace; /* recomputed: the workspace after this stage */
    moe_layer_view v;
    moe_layer_backward_view w;
} grads_bufs;

static grads_case grads_of(layer_case f)
{
    grads_case c = {};
    c.f = f;
    c.grad_dtype = MOE_FP32;
    return c;
}

static int up_rows(int activation, int I)
{
    return (activation == 0 || moe_activation_is_gated(activation) ? 2 : 1) * I;
}

static const char* grads_text(const grads_case* c)
{
    static char text[700];
    snprintf(
        text, sizeof text,
        "%s; grads %s %s accumulate=%d %d gather=%d recompute=%d in_place=%d balance=%d none=%d "
        "pads %d %d",
        case_text(&c->f), moe_dtype_name(c->grad_dtype), moe_dtype_name(c->router_grad_dtype),
        c->accumulate, c->dx_accumulate, c->gather, c->recompute, c->dx_is_dy, c->balance, c->none,
        c->dy_pad, c->dx_pad);
    return text;
}

/* Makes a gradient of n numbers. */
static tbuf grad_new(const char* name, int64_t n, int dtype)
{
    return tbuf_new(name, (size_t)(n * moe_dtype_bytes(dtype)), 16);
}

/* All outputs of backward but dx. */
#define GRADS(b)                                                                                   \
    TBUFS(&(b)->drouter, &(b)->dlogits, &(b)->dweights, &(b)->dw1, &(b)->dw1_up, &(b)->dw2,        \
          &(b)->dbias1, &(b)->dbias2)
#define SHARED_GRADS(b)                                                                            \
    TBUFS(&(b)->s_dw1, &(b)->s_dw1_up, &(b)->s_dw2, &(b)->s_dbias1, &(b)->s_dbias2, &(b)->s_dweight)

/* Puts everything that the calls write into its state before them. */
static void grads_reset(grads_bufs* b, const grads_case* c)
{
    tbuf* const adds[] = {&b->dw1,   &b->dw1_up,   &b->dw2,   &b->dbias1,   &b->dbias2,
                          &b->s_dw1, &b->s_dw1_up, &b->s_dw2, &b->s_dbias1, &b->s_dbias2};
    reset(&b->f, &c->f);
    tbufs_poison(GRADS(b)), tbufs_poison(SHARED_GRADS(b)), tbuf_poison(&b->saved);
    tbuf_put(&b->dy, b->h_dy);
    if (!c->dx_is_dy) tbuf_poison(&b->dx);
    if (c->dx_accumulate && !c->dx_is_dy) tbuf_put(&b->dx, b->h_dx);
    for (size_t i = 0; c->accumulate && i < sizeof adds / sizeof *adds; ++i)
        put_twos(adds[i], c->grad_dtype);
    if (c->accumulate)
        put_twos(&b->drouter, c->router_grad_dtype ? c->router_grad_dtype : c->f.router_dtype);
}

/* Fills in the descriptor of backward, with the sizes of `saved` and of the workspace. */
static void grads_describe(grads_bufs* b, const grads_case* c)
{
    const int gate = c->f.from != FROM_IDS, all = c->none != 1;
    const int separate = c->f.gate_up == MOE_GATE_UP_SEPARATE && up_rows(c->f.activation, 1) == 2;
    const int s_separate =
        c->f.shared_gate_up == MOE_GATE_UP_SEPARATE && up_rows(c->f.shared_activation, 1) == 2;
    moe_layer_backward_desc* d = &b->d;
    moe_layer_saved_list list;
    size_t forward, backward;
    b->f.d.recompute = c->recompute;
    CHECK_STATUS(moe_layer_saved(&b->f.d, &list), MOE_OK);
    b->saved = tbuf_new("saved", list.bytes, 0);
    b->f.d.saved = b->saved.p, b->f.d.saved_bytes = list.bytes;
    CHECK_STATUS(moe_layer_workspace(&b->f.d, &forward), MOE_OK);
    memset(d, 0, sizeof *d);
    d->layer = b->f.d;
    d->dy = b->dy.p, d->dy_stride = c->dy_pad ? c->f.H + c->dy_pad : 0;
    d->balance_grad = c->balance ? (const float*)b->balance.p : (const float*)0;
    if (c->none != 2) d->dx = c->dx_is_dy ? b->dy.p : b->dx.p;
    d->dx_stride = c->dx_is_dy ? d->dy_stride : c->dx_pad ? c->f.H + c->dx_pad : 0;
    d->grad_dtype = c->grad_dtype, d->router_grad_dtype = c->router_grad_dtype;
    d->accumulate = c->accumulate, d->dx_accumulate = c->dx_accumulate, d->gather = c->gather;
    if (all) {
        if (c->f.from == FROM_ROUTER) d->drouter = b->drouter.p;
        if (gate) d->dlogits = (float*)b->dlogits.p;
        d->dweights = (float*)b->dweights.p;
        d->dw1.base = b->dw1.p, d->dw2.base = b->dw2.p;
        d->dw1.up = separate ? b->dw1_up.p : (void*)0;
        d->dbias1 = b->dbias1.p, d->dbias2 = b->dbias2.p;
        if (c->f.shared) {
            d->shared.dw1.base = b->s_dw1.p, d->shared.dw2.base = b->s_dw2.p;
            d->shared.dw1.up = s_separate ? b->s_dw1_up.p : (void*)0;
            d->shared.dbias1 = b->s_dbias1.p, d->shared.dbias2 = b->s_dbias2.p;
            d->shared.dweight = (float*)b->s_dweight.p;
        }
    }
    CHECK_STATUS(moe_layer_backward_workspace(d, &backward), MOE_OK);
    tbuf_free(&b->f.workspace);
    b->f.workspace = tbuf_new("workspace", forward > backward ? forward : backward, 0);
    b->f.d.workspace = d->layer.workspace = b->f.workspace.p;
    b->f.d.workspace_bytes = d->layer.workspace_bytes = b->f.workspace.bytes;
}

static void bufs_begin(grads_bufs* b, const grads_case* c, trand* r)
{
    const layer_case* f = &c->f;
    const int64_t T = f->T, H = f->H, I = f->I, E = f->E, P = physical(f);
    const int64_t W = up_rows(f->activation, f->I), Is = f->shared ? f->shared : 8;
    const int64_t Ws = up_rows(f->shared_activation, (int)Is);
    const int router = c->router_grad_dtype ? c->router_grad_dtype : f->router_dtype;
    memset(b, 0, sizeof *b);
    bufs_new(&b->f, f, r);
    b->h_dy = (uint16_t*)trows_new(r, T, H + c->dy_pad, H, f->dtype, TFILL_NORMAL, 1);
    b->h_dx = (uint16_t*)trows_new(r, T, H + c->dx_pad, H, f->dtype, TFILL_NORMAL, 1);
    b->h_balance = (float*)trows_new(r, E + 1, 1, 1, MOE_FP32, TFILL_NORMAL, 0.5f);
    b->dy = tbuf_from("dy", b->h_dy, (size_t)moe_extent(T, H + c->dy_pad, H, f->dtype), 16);
    b->dx = tbuf_new("dx", (size_t)moe_extent(T, H + c->dx_pad, H, f->dtype), 16);
    b->balance = tbuf_from("balance_grad", b->h_balance, (size_t)(E + 1) * 4, 4);
    b->drouter = grad_new("drouter", E * H, router);
    b->dlogits = grad_new("dlogits", T * E, MOE_FP32);
    b->dweights = grad_new("dweights", T * f->K, MOE_FP32);
    b->dw1 = grad_new("dw1", P * W * H, c->grad_dtype);
    b->dw1_up = grad_new("dw1.up", P * I * H, c->grad_dtype);
    b->dw2 = grad_new("dw2", P * H * I, c->grad_dtype);
    b->dbias1 = grad_new("dbias1", P * W, c->grad_dtype);
    b->dbias2 = grad_new("dbias2", P * H, c->grad_dtype);
    b->s_dw1 = grad_new("shared.dw1", Ws * H, c->grad_dtype);
    b->s_dw1_up = grad_new("shared.dw1.up", Is * H, c->grad_dtype);
    b->s_dw2 = grad_new("shared.dw2", H * Is, c->grad_dtype);
    b->s_dbias1 = grad_new("shared.dbias1", Ws, c->grad_dtype);
    b->s_dbias2 = grad_new("shared.dbias2", H, c->grad_dtype);
    b->s_dweight = grad_new("shared.dweight", T, MOE_FP32);
    grads_describe(b, c);
    grads_reset(b, c);
}

static void bufs_end(grads_bufs* b)
{
    TFREE(b->kept, b->recomputed, b->workspace, b->h_dy, b->h_dx, b->h_balance);
    free(b->h_shared_slot);
    tbufs_free(TBUFS(&b->dy, &b->dx, &b->saved, &b->balance));
    tbufs_free(GRADS(b));
    tbufs_free(SHARED_GRADS(b));
    bufs_free(&b->f);
}

/* Runs forward; keeps copies of what it left. Then runs backward, and copies its workspace. */
static int run_both(grads_bufs* b, const grads_case* c)
{
    moe_layer_backward_prepared p;
    TFREE(b->kept, b->recomputed, b->workspace);
    b->kept = b->recomputed = b->workspace = 0;
    if (!CHECK_STATUS(moe_layer_forward(&b->f.d, test_now.stream), MOE_OK)) return 0;
    CHECK_STATUS(moe_layer_get_view(&b->f.d, &b->v), MOE_OK);
    CHECK_STATUS(moe_layer_backward_get_view(&b->d, &b->w), MOE_OK);
    b->kept = (char*)tbuf_copy(&b->saved);
    if (c->recompute) {
        if (!CHECK_STATUS(moe_layer_backward_prepare(&b->d, &p), MOE_OK)) return 0;
        moe_layer_backward_run_stage(&p, MOE_LAYER_BACKWARD_RECOMPUTE, test_now.stream);
        b->recomputed = (char*)tbuf_copy(&b->f.workspace);
    }
    if (!CHECK_STATUS(moe_layer_backward(&b->d, test_now.stream), MOE_OK)) return 0;
    b->workspace = (char*)tbuf_copy(&b->f.workspace);
    return 1;
}

/* Returns the host copy of a buffer in `saved` or in the workspace. */
static const void* in_saved(const grads_bufs* b, const void* at)
{
    return b->kept + ((const char*)at - (const char*)b->saved.p);
}
static const void* in_workspace(const grads_bufs* b, const void* at)
{
    return b->workspace + ((const char*)at - (const char*)b->f.workspace.p);
}

/* Compares dense numbers of a dtype with exact and ideal ones, all of which are added to `before`.
   terms: the most numbers that a sum has. */
static void check_grad(const char* what, const tbuf* buf, int dtype, const double* exact,
                       const double* ideal, double before, int64_t terms, int64_t n, int64_t cols)
{
    float* got = (float*)test_host(n * 4);
    double *want = (double*)test_host(n * 8), *rounded = (double*)test_host(n * 8);
    void* p = tbuf_copy(buf);
    int some = 0;
    for (int64_t i = 0; i < n; ++i) {
        got[i] = moe_load(p, i, dtype);
        want[i] = exact[i] + before;
        rounded[i] = test_rounded(ideal[i] + before, dtype);
        some |= exact[i] != 0;
    }
    if (some) CHECK_CLOSE_SUMS(what, got, want, rounded, terms, n / cols, cols);
    for (int64_t i = 0; i < n && !some; ++i)
        CHECK(got[i] == before, "%s: nothing adds to it", what);
    TFREE(got, want, rounded, p);
}

/* The gradient of w1, whose rows are gates and then ups, in the layout of the weights. */
static void check_dw1(const char* what, const tbuf* base, const tbuf* up, int dtype, int gate_up,
                      int is_gated, int major, const double* exact, const double* ideal,
                      double before, int64_t terms, int64_t E, int64_t W, int64_t H)
{
    const int separate = is_gated && gate_up == MOE_GATE_UP_SEPARATE;
    const int pairs = is_gated && gate_up == MOE_GATE_UP_INTERLEAVED;
    const int64_t rows = separate ? W / 2 : W;
    double *a = (double*)test_host(E * rows * H * 8), *b = (double*)test_host(E * rows * H * 8);
    for (int part = 0; part < 1 + separate; ++part) {
        for (int64_t e = 0; e < E; ++e)
            for (int64_t y = 0; y < rows; ++y)
                for (int64_t x = 0; x < H; ++x) {
                    const int64_t from = pairs ? y % 2 * (W / 2) + y / 2 : part * rows + y;
                    const int64_t to =
                        e * rows * H + (major == MOE_MAJOR_MN ? x * rows + y : y * H + x);
                    a[to] = exact[(e * W + from) * H + x];
                    b[to] = ideal[(e * W + from) * H + x];
                }
        check_grad(what, part ? up : base, dtype, a, b, before, terms, E * rows * H, H);
    }
    TFREE(a, b);
}

/* The reference's results for one MLP, exact and with rounded act and dpre. */
typedef struct mlp_ref {
    double *rows, *dw1, *dw2, *dbias1, *dbias2, *dweights, *dweights_size, *dweights_d;
    /* like rows: squares of what the roundings of dpre move a row by; sums of the absolutes of its
       products; what the first of two products gives */
    double *square, *size, *first;
} mlp_ref;

/* Significant bits of P on wgmma, where it is handed over in 16 bits (gemm/wgmma/gradient.cuh). */
enum { P_BITS = 11 };

/* Fills in square, size and first. dpre: exact. */
static void mlp_ref_sizes(mlp_ref* m, const moe_ref_experts_backward_desc* d, int W,
                          const double* dpre)
{
    const int H = d->hidden;
    for (int e = 0; e < d->num_experts; ++e)
        for (int64_t r = d->expert_offset[e]; r < d->expert_offset[e + 1]; ++r)
            for (int i = 0; i < W; ++i)
                for (int h = 0; h < H; ++h) {
                    const double w = moei_ref_up_weight_f64(d, e, W, i, h);
                    const double size = fabs(dpre[r * W + i]), once = tround(size, d->x_dtype);
                    const double p = d->d_bits ? ldexp(size, -d->d_bits) : 0;
                    m->square[r * H + h] += w * w * (once * once + p * p);
                    m->size[r * H + h] += fabs(w * dpre[r * W + i]);
                    if (i < W / 2) m->first[r * H + h] += w * dpre[r * W + i];
                }
}

static void mlp_ref_new(mlp_ref* m, const moe_ref_experts_backward_desc* d, int64_t slots, int W,
                        int act_dtype)
{
    const int64_t E = d->num_experts, H = d->hidden, I = d->intermediate;
    moe_ref_experts_backward_desc of = *d;
    moe_ref_experts_grads_f64 g = {};
    const size_t rows = (size_t)(d->expert_offset[E] * H) + 1;
    of.act_dtype = act_dtype;
    if (!act_dtype) of.d_bits = 0;
    g.rows = m->rows = (double*)calloc(rows, 8);
    m->square = (double*)calloc(rows, 8), m->size = (double*)calloc(rows, 8);
    m->first = (double*)calloc(rows, 8);
    g.dpre = (double*)calloc((size_t)(d->expert_offset[E] * W) + 1, 8);
    g.dw1 = m->dw1 = (double*)calloc((size_t)(E * W * H) + 1, 8);
    g.dw2 = m->dw2 = (double*)calloc((size_t)(E * H * I) + 1, 8);
    g.dbias1 = m->dbias1 = (double*)calloc((size_t)(E * W) + 1, 8);
    g.dbias2 = m->dbias2 = (double*)calloc((size_t)(E * H) + 1, 8);
    g.dweights = m->dweights = (double*)calloc((size_t)slots + 1, 8);
    g.dweights_size = m->dweights_size = (double*)calloc((size_t)slots + 1, 8);
    g.dweights_d = m->dweights_d = (double*)calloc((size_t)slots + 1, 8);
    CHECK(moe_ref_experts_backward_f64(&of, &g) == 0, "memory");
    if (!act_dtype) mlp_ref_sizes(m, d, W, g.dpre);
    free(g.dpre);
}

static void mlp_ref_free(mlp_ref* m)
{
    TFREE(m->rows, m->dw1, m->dw2, m->dbias1, m->dbias2, m->dweights, m->dweights_size);
    TFREE(m->square, m->size, m->first, m->dweights_d);
}

/* Describes the routed experts, or the shared one, to the reference. offset: of the shared one. */
static moe_ref_experts_backward_desc mlp_desc(const grads_bufs* b, const grads_case* c, int shared,
                                              const int32_t* offset)
{
    const layer_case* f = &c->f;
    const tmlp* m = shared ? &b->f.shared : &b->f.mlp;
    moe_ref_experts_backward_desc d = {};
    d.x = b->f.h_x, d.x_stride = f->H + f->x_pad;
    d.dy = b->h_dy, d.dy_stride = f->H + c->dy_pad;
    d.x_dtype = d.w_dtype = d.pre_dtype = f->dtype;
    d.w1 = tweights_host(&m->w1), d.w2 = tweights_host(&m->w2);
    d.bias2 = (shared ? f->shared_bias : f->bias) ? m->h_bias2 : (void*)0;
    d.num_tokens = f->T, d.top_k = f->K, d.hidden = f->H;
    d.intermediate = shared ? f->shared : f->I;
    d.num_experts = shared ? 1 : physical(f);
    d.activation = shared ? f->shared_activation : f->activation;
    d.gate_up = shared ? f->shared_gate_up : f->gate_up;
    if (!shared) d.alpha = f->alpha, d.limit = f->limit;
    if (c->recompute)
        d.pre = b->recomputed + ((const char*)(shared ? b->w.shared_pre : b->w.pre) -
                                 (const char*)b->f.workspace.p);
    else d.pre = in_saved(b, shared ? b->v.shared_pre : b->v.pre);
    if (shared) {
        d.weights = f->shared_weighted ? b->f.h_shared_weight : (float*)0;
        if (b->h_shared_slot) d.row_slot = b->h_shared_slot, d.top_k = 1;
        d.expert_offset = offset;
    } else {
        d.weights = f->from == FROM_IDS ? (const void*)b->f.h_weights : in_saved(b, b->v.weights);
        d.row_slot = (const int32_t*)in_saved(b, b->v.row_slot);
        d.expert_offset = (const int32_t*)in_saved(b, b->v.expert_offset);
    }
    return d;
}

/* Compares the gradients of weights and biases of one MLP. */
static void compare_mlp(const grads_bufs* b, const grads_case* c, int shared, const mlp_ref* exact,
                        const mlp_ref* ideal)
{
    const layer_case* f = &c->f;
    const int activation = shared ? f->shared_activation : f->activation;
    const int64_t E = shared ? 1 : physical(f), I = shared ? f->shared : f->I, H = f->H;
    const int64_t W = up_rows(activation, (int)I);
    const int gate_up = shared ? f->shared_gate_up : f->gate_up;
    const double before = c->accumulate ? 2 : 0;
    const int pairs = W > I && gate_up == MOE_GATE_UP_INTERLEAVED;
    const int64_t terms = shared ? f->T : (int64_t)f->T * f->K;
    double *a = (double*)test_host(E * H * I * 8), *w = (double*)test_host(E * H * I * 8);
    check_dw1(shared ? "shared.dw1" : "dw1", shared ? &b->s_dw1 : &b->dw1,
              shared ? &b->s_dw1_up : &b->dw1_up, c->grad_dtype, gate_up, W > I, f->major,
              exact->dw1, ideal->dw1, before, terms, E, W, H);
    for (int64_t i = 0; i < E * H * I; ++i) {
        const int64_t e = i / (H * I), y = i / I % H, x = i % I;
        const int64_t to = e * H * I + (f->major == MOE_MAJOR_MN ? x * H + y : y * I + x);
        a[to] = exact->dw2[i], w[to] = ideal->dw2[i];
    }
    check_grad(shared ? "shared.dw2" : "dw2", shared ? &b->s_dw2 : &b->dw2, c->grad_dtype, a, w,
               before, terms, E * H * I, I);
    for (int64_t i = 0; i < E * W; ++i) {
        const int64_t to = pairs ? i / W * W + i % W % I * 2 + i % W / I : i;
        a[to] = exact->dbias1[i], w[to] = ideal->dbias1[i];
    }
    check_grad(shared ? "shared.dbias1" : "dbias1", shared ? &b->s_dbias1 : &b->dbias1,
               c->grad_dtype, a, w, before, terms, E * W, W);
    check_grad(shared ? "shared.dbias2" : "dbias2", shared ? &b->s_dbias2 : &b->dbias2,
               c->grad_dtype, exact->dbias2, ideal->dbias2, before, terms, E * H, H);
    TFREE(a, w);
}

/* Compares the gradients of the weights of slots. bits: of P, or 0. */
static void compare_dweights(const char* what, const tbuf* buf, const mlp_ref* m, int64_t n,
                             int terms, int bits)
{
    float* got = (float*)tbuf_copy(buf);
    double* bound = (double*)test_host(n * 8);
    int64_t some = 0;
    for (int64_t i = 0; i < n; ++i) {
        some += m->dweights[i] != 0;
        bound[i] =
            tsum_error(m->dweights_size[i], terms) + (bits ? ldexp(m->dweights_d[i], -bits) : 0);
    }
    CHECK_WITHIN(what, got, MOE_FP32, 1, m->dweights, bound, n, 1, some < 16);
    TFREE(got, bound);
}

/* Returns the products that make the gradients of rows. */
static int row_parts(int activation, int gate_up)
{
    return up_rows(activation, 1) == 2 && gate_up > MOE_GATE_UP_CONCATENATED ? 2 : 1;
}

/* Returns the squares of what rounding moves where a row's gradient is added to `before` and stored. */
static double stored(double before, const mlp_ref* m, int64_t at, int parts, int dtype)
{
    const double first = tround(fabs(before + m->first[at]), dtype);
    const double all = tround(fabs(before + m->rows[at]), dtype);
    return (parts == 2 ? first * first : 0) + all * all;
}

/* Adds up dx [T, H]: what dx held, the router's part, the shared expert's, the rows of each token. What
   is stored on the way is rounded: the router's and the shared expert's sum, each row; twice by two
   products. bound [T, H]: 3.5 times the root of the squares of what each rounding may move, six
   standard deviations; sums in fp32; the last rounding. */
static void ref_dx(const grads_bufs* b, const grads_case* c, const mlp_ref* m, const mlp_ref* s,
                   const double* router, const double* router_size, double* dx, double* bound)
{
    const layer_case* f = &c->f;
    const int64_t T = f->T, H = f->H, K = f->K;
    const int32_t* slot_row = f->outputs ? (int32_t*)tbuf_copy(&b->f.slot_row)
                                         : (const int32_t*)in_saved(b, b->v.slot_row);
    const int parts = row_parts(f->activation, f->gate_up);
    const int s_parts = row_parts(f->shared_activation, f->shared_gate_up);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t h = 0; h < H; ++h) {
            const int64_t at = t * H + h;
            double v = 0, square = 0, size, once;
            if (c->dx_accumulate)
                v = c->dx_is_dy ? moe_load(b->h_dy, t * (H + c->dy_pad) + h, f->dtype)
                                : moe_load(b->h_dx, t * (H + c->dx_pad) + h, f->dtype);
            size = fabs(v);
            if (router) {
                v += router[at], size += router_size[at];
                once = tround(fabs(v), f->dtype), square += once * once;
            }
            if (f->shared) {
                square += s->square[at] + stored(v, s, at, s_parts, f->dtype);
                v += s->rows[at], size += s->size[at];
            }
            for (int64_t k = 0; k < K; ++k) {
                const int64_t row = slot_row[t * K + k] * H + h;
                if (slot_row[t * K + k] < 0) continue;
                square += m->square[row] + stored(0, m, row, parts, rows_dtype(f));
                v += m->rows[row], size += m->size[row];
            }
            dx[at] = v;
            bound[at] = 3.5 * sqrt(square) + ldexp(size, -16);
            bound[at] += tround(fabs(v) + bound[at], f->dtype);
        }
    if (f->outputs) free((void*)slot_row);
}

/* Returns 1 where each token has one weight, which is 1 whatever the logits: without balance losses
   their gradients are zero, but for rounding. */
static int constant_weights(const grads_case* c)
{
    return c->f.K == 1 && c->f.renormalize && !c->balance;
}

/* Compares drouter by the bound of fp32 sums and its rounding. size: sums of absolutes. */
static void compare_drouter(const grads_bufs* b, const grads_case* c, double* exact, double* size)
{
    const int dtype = c->router_grad_dtype ? c->router_grad_dtype : c->f.router_dtype;
    const int64_t n = (int64_t)c->f.E * c->f.H;
    const double split = c->f.dtype == MOE_BF16 ? ldexp(1, -16) : 0; /* router_backward.cuh */
    void* got = tbuf_copy(&b->drouter);
    int some = 0;
    for (int64_t i = 0; i < n; ++i) {
        exact[i] += c->accumulate ? 2 : 0;
        size[i] = (c->f.T / 16.0 + 2) * ldexp(size[i] + fabs(exact[i]), -23) + split * size[i] +
                  2 * tround(fabs(exact[i]), dtype);
        some |= exact[i] != 0;
    }
    CHECK_WITHIN("drouter", got, dtype, c->f.H, exact, size, c->f.E, c->f.H,
                 !some || constant_weights(c));
    free(got);
}

/* Compares dlogits [T, E] by the size of a token's gradients and logits: a score's derivatives add
   products of both. */
static void compare_dlogits(const grads_bufs* b, const grads_case* c, const float* logits,
                            const double* dweights, const float* got, const double* want)
{
    const int64_t T = c->f.T, E = c->f.E, K = c->f.K;
    double* bound = (double*)test_host(T * E * 8);
    int64_t some = 0;
    for (int64_t t = 0; t < T; ++t) {
        double size = 0, largest = 0;
        for (int64_t k = 0; k < K; ++k) size += fabs(dweights[t * K + k]);
        for (int64_t e = 0; e <= E && c->balance; ++e)
            size += fabs((double)b->h_balance[e]) / (double)E;
        for (int64_t e = 0; e < E; ++e) largest = fmax(largest, fabs((double)logits[t * E + e]));
        for (int64_t e = 0; e < E; ++e) {
            bound[t * E + e] = ldexp(size * (1 + largest), -20) + 1e-30;
            some += want[t * E + e] != 0;
        }
    }
    CHECK_WITHIN("dlogits", got, MOE_FP32, E, want, bound, T, E, some < 16 || constant_weights(c));
    free(bound);
}

/* Compares dlogits, drouter, and fills in the router's part of dx and its size; each on what the
   device gave before. */
static void compare_router(const grads_bufs* b, const grads_case* c, double* router,
                           double* router_size)
{
    const layer_case* f = &c->f;
    const int64_t T = f->T, E = f->E, H = f->H;
    const float* dweights = b->d.dweights ? (float*)tbuf_copy(&b->dweights)
                                          : (const float*)in_workspace(b, b->w.dweights);
    const float* dlogits =
        b->d.dlogits ? (float*)tbuf_copy(&b->dlogits) : (const float*)in_workspace(b, b->w.dlogits);
    double *want = (double*)test_host(T * E * 8), *drouter = (double*)test_host(E * H * 8);
    double* size = (double*)test_host(E * H * 8);
    double *g = (double*)test_host(T * f->K * 8), *loss = (double*)test_host(E * 8 + 8);
    const void* logits = f->from == FROM_LOGITS ? b->f.h_logits : in_saved(b, b->v.logits);
    moe_ref_router_backward_desc r = {};
    moe_gate_desc gate = c->f.rules ? b->h_gate : b->d.layer.gate;
    gate.logits = logits, gate.logits_dtype = MOE_FP32;
    gate.num_tokens = f->T, gate.num_experts = f->E, gate.top_k = f->K;
    for (int64_t i = 0; i < T * f->K; ++i) g[i] = dweights[i];
    for (int64_t i = 0; i <= E; ++i) loss[i] = b->h_balance[i];
    moe_ref_gate_backward_f64(&gate, (const int32_t*)in_saved(b, b->v.ids), g,
                              c->balance ? loss : (double*)0, want);
    compare_dlogits(b, c, (const float*)logits, g, dlogits, want);
    if (f->from == FROM_ROUTER) {
        r.forward.x = b->f.h_x, r.forward.x_stride = H + f->x_pad, r.forward.x_dtype = f->dtype;
        r.forward.w = b->f.h_router, r.forward.w_dtype = f->router_dtype;
        r.forward.num_tokens = f->T, r.forward.num_experts = f->E, r.forward.hidden = f->H;
        r.dlogits = dlogits;
        moe_ref_router_backward_f64(&r, router, drouter, router_size, size);
        if (b->d.drouter) compare_drouter(b, c, drouter, size);
    }
    if (b->d.dweights) free((void*)dweights);
    if (b->d.dlogits) free((void*)dlogits);
    TFREE(want, drouter, size, g, loss);
}

/* Compares all results. Outputs that were not asked for must be untouched. */
static void compare_grads(grads_bufs* b, const grads_case* c)
{
    const layer_case* f = &c->f;
    const int64_t T = f->T, H = f->H, slots = T * f->K;
    const int32_t all[2] = {0, f->T};
    const int before = test_now.failures, W = up_rows(f->activation, f->I);
    const int gate = f->from != FROM_IDS, router = f->from == FROM_ROUTER;
    moe_ref_experts_backward_desc d = mlp_desc(b, c, 0, 0);
    double *by_router = (double*)calloc((size_t)(T * H) + 1, 8),
           *router_size = (double*)calloc((size_t)(T * H) + 1, 8);
    mlp_ref m[2], s[2] = {};
    moe_layer_backward_prepared run;
    int bits, s_bits;
    CHECK_STATUS(moe_layer_backward_prepare(&b->d, &run), MOE_OK);
    bits = run.experts.pre.plan.path == MOE_GEMM_PATH_WGMMA ? P_BITS : 0;
    s_bits = run.shared.pre.plan.path == MOE_GEMM_PATH_WGMMA ? P_BITS : 0;
    d.d_bits = bits;
    for (int i = 0; i < 2; ++i) mlp_ref_new(m + i, &d, slots, W, i ? f->dtype : 0);
    if (f->shared) {
        d = mlp_desc(b, c, 1, all);
        d.d_bits = s_bits;
        for (int i = 0; i < 2; ++i)
            mlp_ref_new(s + i, &d, T, up_rows(f->shared_activation, f->shared), i ? f->dtype : 0);
    }
    if (c->none != 1) {
        compare_dweights("dweights", &b->dweights, m, slots, f->I + f->H, bits);
        compare_mlp(b, c, 0, m, m + 1);
        if (f->shared) {
            compare_dweights("shared.dweight", &b->s_dweight, s, T, f->shared + f->H, s_bits);
            compare_mlp(b, c, 1, s, s + 1);
        }
    } else {
        CHECK(c->accumulate || (tbufs_untouched(GRADS(b)) && tbufs_untouched(SHARED_GRADS(b))),
              "results that were not asked for");
    }
    if (gate && (router || b->d.dlogits)) compare_router(b, c, by_router, router_size);
    if (c->none != 2) {
        double *exact = (double*)test_host(T * H * 8), *bound = (double*)test_host(T * H * 8);
        float* got = (float*)test_host(T * H * 4);
        void* p = tbuf_copy(c->dx_is_dy ? &b->dy : &b->dx);
        const int64_t stride = H + (c->dx_is_dy ? c->dy_pad : c->dx_pad);
        for (int64_t i = 0; i < T * H; ++i) got[i] = moe_load(p, i / H * stride + i % H, f->dtype);
        int some = 0; /* one token may have no row */
        ref_dx(b, c, m, s, router ? by_router : (double*)0, router_size, exact, bound);
        for (int64_t i = 0; i < T * H; ++i) some |= exact[i] != 0;
        CHECK_WITHIN("dx", got, MOE_FP32, H, exact, bound, T, H, !some);
        TFREE(exact, bound, got, p);
    } else {
        CHECK(c->dx_accumulate || tbuf_holds(&b->dx, 0), "dx was not asked for");
    }
    CHECK_FAULT(&b->f.fault, MOE_FAULT_NONE, 0);
    CHECK(c->dx_is_dy || tbuf_holds(&b->dy, b->h_dy), "dy was written");
    CHECK(tmlp_same(&b->f.mlp) && tbuf_holds(&b->f.router, b->f.h_router), "weights were written");
    if (test_now.failures > before) printf("  in: %s\n", grads_text(c));
    for (int i = 0; i < 2; ++i) mlp_ref_free(m + i), mlp_ref_free(s + i);
    TFREE(by_router, router_size);
}

static void run_grads(const grads_case* c, trand* r)
{
    grads_bufs b;
    bufs_begin(&b, c, r);
    if (run_both(&b, c)) compare_grads(&b, c);
    else printf("  in: %s\n", grads_text(c));
    bufs_end(&b);
}

#endif
