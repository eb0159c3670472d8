/* case.h: a case of moe_experts_backward: its sizes and options, its buffers, how they are drawn, and
   how every result is compared with the reference in double.

   normal_case, random_case   a case with usual fields; one whose fields are drawn
   bufs_new                   draws the inputs and makes the buffers
   compare                    compares all results
   run_case                   all of it */
#ifndef MOE_TESTS_EXPERTS_BACKWARD_CASE_H
#define MOE_TESTS_EXPERTS_BACKWARD_CASE_H

#include "tests/test.h"
#include "tests/test_weights.h"

#include "moe/experts_backward.cuh"
#include "moe/ref/experts_backward.h"
#include "tests/test_case.h"
#include "tests/test_case_rows.h"
#include "tests/test_mlp.h"
#include "tests/test_bound.h"

#define MOST_EXPERTS TWEIGHTS_MOST

typedef struct backward_case {
    int T, H, I, E, K;
    int dtype, rows_dtype, grad_dtype, gate_up;
    int activation; /* 0: SwiGLU */
    float alpha, limit;
    int bias2, unweighted;
    int major1, major2, table1, table2; /* of the weights, and of their gradients */
    int x_pad, dy_pad, row_pad, w_pad;  /* stride - dense, multiples of 8; w_pad of weights alone */
    int in_order;                       /* 1: no row_slot */
    int gathered;                       /* 1: x_rows and dy_rows are given */
    int own_dpre;                       /* 1: dpre has memory of its own */
    int accumulate, rows_accumulate, empty_experts;
    int num_rows; /* 0: T * K */
    int dropped;  /* percent of the slots */
    int none;     /* rows of row_slot made -1 */
    int one;      /* 1: everything on one expert */
    int left_out; /* bits: results that are not asked for, in the order of RESULTS */
    int tile, path;
    int no_workspace;
} backward_case;

/* The results, in the order of moe_ref_experts_grads_f64 without dpre and act. */
enum { ROWS, DW1, DW2, DBIAS1, DBIAS2, DWEIGHTS, RESULTS };

/* Gradients laid out as weights: one array or one buffer an expert. */
typedef struct grad_bufs {
    tbuf part[2][MOST_EXPERTS], table[2];
    moe_weight_grads d;
    int parts, both; /* buffers of each of the two; 1: ups have their own */
} grad_bufs;

typedef struct backward_bufs {
    tbuf x, dy, x_rows, dy_rows, pre, weights, row_weight, offset, row_slot, slot_row, rows;
    tbuf dbias1, dbias2, dweights, dpre, act, dot, fault, workspace;
    grad_bufs dw1, dw2;
    tmlp mlp;
    void *h_x, *h_dy, *h_pre;
    float *h_weights, *h_row_weight;
    int32_t h_offset[MOST_EXPERTS + 1], *h_row_slot, *h_slot_row;
    int num_rows; /* most */
    moe_experts_backward_desc d;
} backward_bufs;

static int gated(const backward_case* c)
{
    return c->activation == 0 || moe_activation_is_gated(c->activation);
}
static int width(const backward_case* c) { return gated(c) ? 2 * c->I : c->I; }
static int separate(const backward_case* c)
{
    return gated(c) && c->gate_up == MOE_GATE_UP_SEPARATE;
}

static const char* case_text(const backward_case* c)
{
    static char text[500];
    snprintf(
        text, sizeof text,
        "T=%d H=%d I=%d E=%d K=%d %s rows %s grads %s activation=%d (%g %g) gate_up=%d bias2=%d "
        "unweighted=%d major %d %d table %d %d pads %d %d %d %d in_order=%d gathered=%d "
        "own_dpre=%d accumulate=%d %d empty=%d num_rows=%d dropped=%d none=%d one=%d out=%x "
        "tile=%d path=%d no_workspace=%d",
        c->T, c->H, c->I, c->E, c->K, moe_dtype_name(c->dtype), moe_dtype_name(c->rows_dtype),
        moe_dtype_name(c->grad_dtype), c->activation, (double)c->alpha, (double)c->limit,
        c->gate_up, c->bias2, c->unweighted, c->major1, c->major2, c->table1, c->table2, c->x_pad,
        c->dy_pad, c->row_pad, c->w_pad, c->in_order, c->gathered, c->own_dpre, c->accumulate,
        c->rows_accumulate, c->empty_experts, c->num_rows, c->dropped, c->none, c->one, c->left_out,
        c->tile, c->path, c->no_workspace);
    return text;
}

/* Returns a case with bf16 where there is code for it, fp32 gradients and the small tile. */
static backward_case normal_case(int T, int H, int I, int E, int K)
{
    backward_case c = {};
    c.T = T, c.H = H, c.I = I, c.E = E, c.K = K;
    c.dtype = c.rows_dtype = test_half();
    c.grad_dtype = MOE_FP32;
    c.gate_up = MOE_GATE_UP_CONCATENATED;
    c.major1 = c.major2 = MOE_MAJOR_K;
    c.bias2 = 1;
    c.tile = MOE_TILE_64x64;
    return c;
}

static backward_case random_case(trand* r, int most_tokens)
{
    const int E = (int)trand_int(r, 1, 9);
    backward_case c =
        normal_case((int)trand_int(r, 0, most_tokens), 8 * (int)trand_int(r, 1, 12),
                    8 * (int)trand_int(r, 1, 12), E, (int)trand_int(r, 1, E < 4 ? E : 4));
    if (trand_int(r, 0, 1)) c.dtype = MOE_FP16;
    c.rows_dtype = trand_int(r, 0, 3) ? c.dtype : MOE_FP32;
    c.grad_dtype = trand_int(r, 0, 1) ? c.dtype : MOE_FP32;
    c.activation = (int)trand_int(r, MOE_ACTIVATION_NONE, MOE_ACTIVATION_RELU2);
    if (trand_int(r, 0, 2) == 0) c.activation = 0;
    if (c.activation == MOE_ACTIVATION_SWIGLU_CLAMPED) c.limit = 1.5f;
    c.gate_up = (int)trand_int(r, MOE_GATE_UP_CONCATENATED, MOE_GATE_UP_SEPARATE);
    c.major1 = (int)trand_int(r, MOE_MAJOR_K, MOE_MAJOR_MN);
    c.major2 = (int)trand_int(r, MOE_MAJOR_K, MOE_MAJOR_MN);
    c.table1 = (int)trand_int(r, 0, 1), c.table2 = (int)trand_int(r, 0, 1);
    if (c.gate_up == MOE_GATE_UP_INTERLEAVED) c.table1 = 0, c.major1 = MOE_MAJOR_K;
    c.bias2 = (int)trand_int(r, 0, 1), c.unweighted = trand_int(r, 0, 4) == 0;
    c.x_pad = 8 * (int)trand_int(r, 0, 1), c.dy_pad = 8 * (int)trand_int(r, 0, 2);
    c.row_pad = 8 * (int)trand_int(r, 0, 1), c.w_pad = 8 * (int)trand_int(r, 0, 1);
    c.in_order = trand_int(r, 0, 3) == 0;
    c.gathered = !c.in_order && trand_int(r, 0, 1);
    c.own_dpre = (int)trand_int(r, 0, 1);
    c.accumulate = (int)trand_int(r, 0, 1), c.rows_accumulate = (int)trand_int(r, 0, 1);
    c.empty_experts = (int)trand_int(r, 0, 1);
    c.dropped = (int)trand_int(r, 0, 2) * 20, c.one = trand_int(r, 0, 9) == 0;
    if (!c.in_order) c.none = (int)trand_int(r, 0, 3);
    if (c.T && trand_int(r, 0, 3) == 0) c.num_rows = c.T * c.K + (int)trand_int(r, 0, 40);
    if (trand_int(r, 0, 3) == 0) c.left_out = (int)trand_int(r, 0, 63);
    c.no_workspace = trand_int(r, 0, 4) == 0;
    c.tile = trand_int(r, 0, 1) ? MOE_TILE_AUTO : MOE_TILE_64x64;
    return c;
}

/* Draws a routing: offsets, row_slot and slot_row. */
static void fill_routing(backward_bufs* b, const backward_case* c, trand* r)
{
    const int slots = c->T * c->K;
    int32_t* ids = (int32_t*)test_host(slots * 4);
    int32_t* row_slot = (int32_t*)test_host(slots * 4);
    const int one = (int)trand_int(r, 0, c->E - 1);
    for (int s = 0; s < slots; ++s) {
        ids[s] = c->one ? one : (int32_t)trand_int(r, 0, c->E - 1);
        if ((int)trand_int(r, 0, 99) < c->dropped) ids[s] = -1;
        b->h_slot_row[s] = -1;
    }
    tmlp_route(ids, c->T, c->E, c->K, b->h_offset, row_slot, 0);
    for (int m = 0; m < b->num_rows; ++m)
        b->h_row_slot[m] = m < b->h_offset[c->E] ? row_slot[m] : -1;
    for (int i = 0; i < c->none && b->h_offset[c->E] > 0; ++i)
        b->h_row_slot[trand_int(r, 0, b->h_offset[c->E] - 1)] = -1;
    for (int m = 0; m < b->h_offset[c->E]; ++m)
        if (b->h_row_slot[m] >= 0) b->h_slot_row[b->h_row_slot[m]] = m;
    TFREE(ids, row_slot);
}

/* Returns a [rows, H] buffer of the rows of x in expert order, zeros where there is none. */
static tbuf rows_of(const backward_bufs* b, const backward_case* c, const char* name, const void* x,
                    int64_t stride)
{
    uint16_t* rows = (uint16_t*)calloc((size_t)b->num_rows * (size_t)c->H + 1, 2);
    tbuf buf;
    for (int m = 0; m < b->num_rows; ++m)
        if (b->h_row_slot[m] >= 0)
            memcpy(rows + (int64_t)m * c->H, (const uint16_t*)x + b->h_row_slot[m] / c->K * stride,
                   (size_t)c->H * 2);
    buf = tbuf_from(name, rows, (size_t)b->num_rows * (size_t)c->H * 2, 16);
    free(rows);
    return buf;
}

/* Makes gradients of matrices [n, k] of the weights, dense; NaN, or 2 to add to. */
static void grads_new(grad_bufs* g, const backward_case* c, int both, int table, int64_t n,
                      int64_t k)
{
    const size_t matrix = (size_t)(n * k * moe_dtype_bytes(c->grad_dtype));
    void* address[MOST_EXPERTS];
    memset(g, 0, sizeof *g);
    g->parts = table ? c->E : 1, g->both = both;
    for (int up = 0; up < 1 + both; ++up) {
        for (int i = 0; i < g->parts; ++i) {
            g->part[up][i] = tbuf_new("gradients", table ? matrix : matrix * (size_t)c->E, 16);
            address[i] = g->part[up][i].p;
        }
        if (table) g->table[up] = tbuf_from("table", address, (size_t)c->E * sizeof(void*), 8);
    }
    g->d.base = table ? (void*)0 : g->part[0][0].p;
    g->d.up = table || !both ? (void*)0 : g->part[1][0].p;
    g->d.table = (void* const*)g->table[0].p;
    g->d.up_table = (void* const*)g->table[1].p;
}

static void grads_free(grad_bufs* g)
{
    for (int up = 0; up < 1 + g->both; ++up) {
        for (int i = 0; i < g->parts; ++i) tbuf_free(&g->part[up][i]);
        if (g->table[up].p) tbuf_free(&g->table[up]);
    }
}

/* Puts back what a run has overwritten: outputs to poison, or to 2 where they are added to; pre. */
static void reset(backward_bufs* b, const backward_case* c)
{
    grad_bufs* const g[] = {&b->dw1, &b->dw2};
    tbufs_poison(TBUFS(&b->rows, &b->dbias1, &b->dbias2, &b->dweights, &b->dpre, &b->act, &b->dot));
    tbuf_put(&b->pre, b->h_pre);
    for (int i = 0; i < 2; ++i)
        for (int up = 0; up < 1 + g[i]->both; ++up)
            for (int e = 0; e < g[i]->parts; ++e) {
                tbuf_poison(&g[i]->part[up][e]);
                if (c->accumulate) put_twos(&g[i]->part[up][e], c->grad_dtype);
            }
    if (c->accumulate) put_twos(&b->dbias1, c->grad_dtype), put_twos(&b->dbias2, c->grad_dtype);
    if (c->rows_accumulate) put_twos(&b->rows, c->rows_dtype);
    tfault_put(&b->fault, MOE_FAULT_NONE, 0);
}

/* Fills in the descriptor. */
static void describe(backward_bufs* b, const backward_case* c)
{
    moe_experts_backward_desc* d = &b->d;
    memset(d, 0, sizeof *d);
    d->x = b->x.p, d->x_stride = c->x_pad ? c->H + c->x_pad : 0;
    d->dy = b->dy.p, d->dy_stride = c->dy_pad ? c->H + c->dy_pad : 0;
    d->x_rows = c->gathered ? b->x_rows.p : (void*)0;
    d->dy_rows = c->gathered ? b->dy_rows.p : (void*)0;
    d->pre = b->pre.p;
    d->weights = c->unweighted ? (const float*)0 : (const float*)b->weights.p;
    d->row_weight = (const float*)b->row_weight.p;
    d->w1 = b->mlp.w1.d, d->w2 = b->mlp.w2.d;
    d->bias2 = c->bias2 ? b->mlp.bias2.p : (const void*)0;
    d->expert_offset = (const int32_t*)b->offset.p;
    d->row_slot = c->in_order ? (const int32_t*)0 : (const int32_t*)b->row_slot.p;
    d->slot_row = (const int32_t*)b->slot_row.p;
    d->rows = b->rows.p, d->row_stride = c->row_pad ? c->H + c->row_pad : 0;
    d->dw1 = b->dw1.d, d->dw2 = b->dw2.d;
    d->dbias1 = b->dbias1.p, d->dbias2 = b->dbias2.p;
    d->dweights = (float*)b->dweights.p;
    d->dpre = c->own_dpre ? b->dpre.p : (void*)0;
    d->act = b->act.p, d->dot = (float*)b->dot.p;
    d->fault = (uint64_t*)b->fault.p, d->rank = TEST_RANK;
    d->num_tokens = c->T, d->num_rows = c->num_rows, d->top_k = c->K;
    if (c->in_order) d->num_tokens = 0, d->top_k = 0, d->num_rows = b->num_rows;
    d->hidden = c->H, d->intermediate = c->I, d->num_experts = c->E;
    d->dtype = c->dtype, d->rows_dtype = c->rows_dtype, d->grad_dtype = c->grad_dtype;
    d->activation = c->activation, d->gate_up = c->gate_up, d->alpha = c->alpha,
    d->limit = c->limit;
    d->accumulate = c->accumulate, d->rows_accumulate = c->rows_accumulate;
    d->empty_experts = c->empty_experts;
    d->tile = c->tile, d->path = c->path;
    if (!c->no_workspace)
        d->workspace = b->workspace.p, d->workspace_bytes = MOE_EXPERTS_BACKWARD_WORKSPACE;
    if (c->left_out >> ROWS & 1) d->rows = 0;
    if (c->left_out >> DW1 & 1) memset(&d->dw1, 0, sizeof d->dw1);
    if (c->left_out >> DW2 & 1) memset(&d->dw2, 0, sizeof d->dw2);
    if (c->left_out >> DBIAS1 & 1) d->dbias1 = 0;
    if (c->left_out >> DBIAS2 & 1) d->dbias2 = 0;
    if (c->left_out >> DWEIGHTS & 1) d->dweights = 0;
}

static void bufs_new(backward_bufs* b, const backward_case* c, trand* r)
{
    const int64_t x_stride = c->H + c->x_pad, dy_stride = c->H + c->dy_pad;
    const int64_t H = c->H, I = c->I, E = c->E, W = width(c), slots = (int64_t)c->T * c->K;
    const size_t grad = (size_t)moe_dtype_bytes(c->grad_dtype);
    int64_t rows, x_rows, weights;
    tmlp_want want = tmlp_sizes(c->E, c->H, c->I, c->dtype, c->activation, c->gate_up);
    memset(b, 0, sizeof *b);
    rows = b->num_rows = c->num_rows ? c->num_rows : c->T * c->K;
    b->h_row_slot = (int32_t*)test_host(rows * 4);
    b->h_slot_row = (int32_t*)test_host(slots * 4);
    fill_routing(b, c, r);
    x_rows = c->in_order ? rows : c->T;
    weights = c->in_order ? rows : slots;
    b->h_x = trows_new(r, x_rows, x_stride, H, c->dtype, TFILL_NORMAL, 1);
    b->h_dy = trows_new(r, x_rows, dy_stride, H, c->dtype, TFILL_NORMAL, 1);
    b->h_pre = trows_new(r, rows, W, W, c->dtype, TFILL_NORMAL, 1.5f);
    b->h_weights = (float*)trows_new(r, weights, 1, 1, MOE_FP32, TFILL_NORMAL, 1);
    b->h_row_weight = (float*)test_host(rows * 4);
    for (int64_t m = 0; m < rows && !c->in_order; ++m)
        b->h_row_weight[m] = b->h_row_slot[m] < 0 ? 0.0f : b->h_weights[b->h_row_slot[m]];
    b->x = tbuf_from("x", b->h_x, (size_t)moe_extent(x_rows, x_stride, H, c->dtype), 16);
    b->dy = tbuf_from("dy", b->h_dy, (size_t)moe_extent(x_rows, dy_stride, H, c->dtype), 16);
    b->pre = tbuf_from("pre", b->h_pre, (size_t)(rows * W) * 2, 16);
    b->weights = tbuf_from("weights", b->h_weights, (size_t)weights * 4, 4);
    b->row_weight = tbuf_from("row_weight", b->h_row_weight, (size_t)rows * 4, 4);
    if (c->gathered) {
        b->x_rows = rows_of(b, c, "x_rows", b->h_x, x_stride);
        b->dy_rows = rows_of(b, c, "dy_rows", b->h_dy, dy_stride);
    }
    b->offset = tbuf_from("offset", b->h_offset, (size_t)E * 4 + 4, 4);
    b->row_slot = tbuf_from("row_slot", b->h_row_slot, (size_t)rows * 4, 4);
    b->slot_row = tbuf_from("slot_row", b->h_slot_row, (size_t)slots * 4, 4);
    want.major1 = c->major1, want.major2 = c->major2;
    want.table1 = c->table1, want.table2 = c->table2;
    want.pad = c->w_pad;
    tmlp_new(&b->mlp, &want, r);
    grads_new(&b->dw1, c, separate(c), c->table1, separate(c) ? I : W, H);
    grads_new(&b->dw2, c, 0, c->table2, H, I);
    b->rows = tbuf_new("rows", (size_t)moe_extent(rows, H + c->row_pad, H, c->rows_dtype), 16);
    b->dbias1 = tbuf_new("dbias1", (size_t)(E * W) * grad, 4);
    b->dbias2 = tbuf_new("dbias2", (size_t)(E * H) * grad, 4);
    b->dweights = tbuf_new("dweights", (size_t)weights * 4, 4);
    b->dpre = tbuf_new("dpre", (size_t)(rows * W) * 2, 16);
    b->act = tbuf_new("act", (size_t)(rows * I) * 2, 16);
    b->dot = tbuf_new("dot", (size_t)(rows * ((I + 63) / 64)) * 4, 4);
    b->workspace = tbuf_new("workspace", MOE_EXPERTS_BACKWARD_WORKSPACE, 16);
    b->fault = tfault_new(0);
    describe(b, c);
    reset(b, c);
}

static void bufs_free(backward_bufs* b)
{
    tbufs_free(
        TBUFS(&b->x, &b->dy, &b->pre, &b->weights, &b->row_weight, &b->offset, &b->row_slot));
    tbufs_free(TBUFS(&b->slot_row, &b->rows, &b->dbias1, &b->dbias2, &b->dweights, &b->dpre));
    tbufs_free(TBUFS(&b->act, &b->dot, &b->fault, &b->workspace));
    if (b->x_rows.p) tbufs_free(TBUFS(&b->x_rows, &b->dy_rows));
    grads_free(&b->dw1), grads_free(&b->dw2);
    tmlp_free(&b->mlp);
    TFREE(b->h_x, b->h_dy, b->h_pre, b->h_weights, b->h_row_weight, b->h_row_slot, b->h_slot_row);
}

/* The reference's results: exact, and with rounded act and dpre. */
typedef struct backward_ref {
    double* all[2][RESULTS];
    double *dweights_size, *dweights_d; /* sums of the absolutes of what dweights adds */
    int64_t size[RESULTS];
    int64_t terms; /* the most numbers that a sum has */
} backward_ref;

/* Significant bits of P on wgmma, where it is handed over in 16 bits (gemm/wgmma/gradient.cuh). */
enum { P_BITS = 11 };

/* Returns P_BITS where the device's product of this call runs on wgmma, else 0. */
static int p_bits(const backward_bufs* b)
{
    moe_experts_backward_prepared p;
    const moe_status s = moe_experts_backward_prepare(&b->d, &p);
    return s == MOE_OK && p.pre.plan.path == MOE_GEMM_PATH_WGMMA ? P_BITS : 0;
}

static void ref_new(backward_ref* f, const backward_bufs* b, const backward_case* c)
{
    const int64_t R = b->h_offset[c->E], H = c->H, I = c->I, E = c->E, W = width(c);
    const int64_t sizes[RESULTS] = {R * H, E * W * H, E * H * I,
                                    E * W, E * H,     c->in_order ? R : (int64_t)c->T * c->K};
    f->terms = R > W ? R : W;
    f->dweights_size = (double*)calloc((size_t)sizes[DWEIGHTS] + 1, 8);
    f->dweights_d = (double*)calloc((size_t)sizes[DWEIGHTS] + 1, 8);
    for (int rounded = 0; rounded < 2; ++rounded) {
        moe_ref_experts_backward_desc d = {};
        moe_ref_experts_grads_f64 g = {};
        for (int i = 0; i < RESULTS; ++i) {
            f->size[i] = sizes[i];
            f->all[rounded][i] = (double*)calloc((size_t)sizes[i] + 1, 8);
        }
        d.x = b->h_x, d.dy = b->h_dy, d.pre = b->h_pre;
        d.weights = c->unweighted ? (float*)0 : b->h_weights;
        d.row_slot = c->in_order ? (int32_t*)0 : b->h_row_slot;
        d.expert_offset = b->h_offset;
        d.w1 = tweights_host(&b->mlp.w1), d.w2 = tweights_host(&b->mlp.w2);
        d.bias2 = c->bias2 ? b->mlp.h_bias2 : (void*)0;
        d.x_stride = c->H + c->x_pad, d.dy_stride = c->H + c->dy_pad;
        d.x_dtype = d.w_dtype = d.pre_dtype = c->dtype;
        d.act_dtype = rounded ? c->dtype : 0;
        d.d_bits = rounded ? p_bits(b) : 0;
        d.activation = c->activation, d.gate_up = c->gate_up, d.alpha = c->alpha,
        d.limit = c->limit;
        d.num_tokens = c->T, d.num_experts = c->E, d.top_k = c->K;
        d.hidden = c->H, d.intermediate = c->I;
        g.rows = f->all[rounded][ROWS];
        g.dw1 = f->all[rounded][DW1], g.dw2 = f->all[rounded][DW2];
        g.dbias1 = f->all[rounded][DBIAS1], g.dbias2 = f->all[rounded][DBIAS2];
        g.dweights = f->all[rounded][DWEIGHTS], g.dweights_size = f->dweights_size;
        g.dweights_d = f->dweights_d;
        CHECK(moe_ref_experts_backward_f64(&d, &g) == 0, "memory");
    }
}

static void ref_free(backward_ref* f)
{
    for (int i = 0; i < RESULTS; ++i) TFREE(f->all[0][i], f->all[1][i]);
    TFREE(f->dweights_size, f->dweights_d);
}

/* Compares one result, dense in got. before: what the result is added to. Two rounds: of the two
   products of a w1 in two parts. */
static void check_result(const char* what, const float* got, const backward_ref* f, int result,
                         double before, int dtype, int rounds, int64_t cols)
{
    const int64_t n = f->size[result];
    int some = 0; /* 1: some number is not 0 */
    double* exact = (double*)test_host(n * 8);
    double* ideal = (double*)test_host(n * 8);
    for (int64_t i = 0; i < n; ++i) {
        exact[i] = f->all[0][result][i] + before;
        ideal[i] = f->all[1][result][i] + before;
        for (int k = 0; k < rounds; ++k) { /* the second moves the number by another half ulp */
            const double v = test_rounded(ideal[i], dtype);
            ideal[i] = k == 0 ? v : v + (v - exact[i]);
        }
    }
    for (int64_t i = 0; i < n && !some; ++i) some = f->all[0][result][i] != 0;
    if (some) CHECK_CLOSE_SUMS(what, got, exact, ideal, f->terms, n / cols, cols);
    for (int64_t i = 0; i < n && !some; ++i) CHECK(got[i] == before, "%s: no row has a slot", what);
    TFREE(exact, ideal);
}

/* Reads a gradient laid out as weights into got [E, rows, cols], gates then ups; returns what is left
   of poison. */
static void get_grads(const grad_bufs* g, const backward_case* c, int major, int pairs,
                      int64_t rows, int64_t cols, float* got)
{
    const int64_t each = g->both ? rows / 2 : rows;
    for (int up = 0; up < 1 + g->both; ++up)
        for (int i = 0; i < g->parts; ++i) {
            void* p = tbuf_copy(&g->part[up][i]);
            const int64_t first = g->parts == 1 ? 0 : i, last = g->parts == 1 ? c->E : i + 1;
            for (int64_t e = first; e < last; ++e)
                for (int64_t y = 0; y < each; ++y)
                    for (int64_t x = 0; x < cols; ++x) {
                        const int64_t in = (e - first) * each * cols +
                                           (major == MOE_MAJOR_MN ? x * each + y : y * cols + x);
                        const int64_t row = pairs ? y % 2 * (rows / 2) + y / 2 : up * each + y;
                        got[(e * rows + row) * cols + x] = moe_load(p, in, c->grad_dtype);
                    }
            free(p);
        }
}

/* Checks that the gradients of experts without rows are what the options say, and gives them the
   reference's 0 for the comparison. */
static void check_empty(const backward_bufs* b, const backward_case* c, float* got, int64_t each)
{
    for (int e = 0; e < c->E; ++e) {
        if (b->h_offset[e + 1] > b->h_offset[e]) continue;
        for (int64_t i = e * each; i < (e + 1) * each; ++i) {
            if (c->accumulate) CHECK(got[i] == 2, "an expert without rows, added to");
            else if (c->empty_experts) CHECK(got[i] != got[i], "an expert without rows, left");
            else CHECK(got[i] == 0, "an expert without rows");
            got[i] = c->accumulate ? 2.0f : 0.0f;
        }
    }
}

/* Compares gradients of weights. */
static void compare_grads(const char* what, const grad_bufs* g, const backward_bufs* b,
                          const backward_case* c, const backward_ref* f, int result, int major,
                          int pairs)
{
    const int64_t rows = result == DW1 ? width(c) : c->H, cols = result == DW1 ? c->H : c->I;
    float* got = (float*)test_host(f->size[result] * 4);
    get_grads(g, c, major, pairs, rows, cols, got);
    check_empty(b, c, got, rows * cols);
    if (b->h_offset[c->E] > 0)
        check_result(what, got, f, result, c->accumulate ? 2 : 0, c->grad_dtype, 1, cols);
    free(got);
}

/* Compares a bias's gradient. pairs: gates and ups alternate. */
static void compare_bias(const char* what, const tbuf* buf, const backward_bufs* b,
                         const backward_case* c, const backward_ref* f, int result, int pairs)
{
    const int64_t cols = result == DBIAS1 ? width(c) : c->H;
    float* got = (float*)test_host(f->size[result] * 4);
    void* p = tbuf_copy(buf);
    for (int64_t i = 0; i < f->size[result]; ++i) {
        const int64_t e = i / cols, j = i % cols;
        const int64_t to = pairs ? j % 2 * (cols / 2) + j / 2 : j;
        got[e * cols + to] = moe_load(p, i, c->grad_dtype);
    }
    check_empty(b, c, got, cols);
    if (b->h_offset[c->E] > 0)
        check_result(what, got, f, result, c->accumulate ? 2 : 0, c->grad_dtype, 1, cols);
    TFREE(got, p);
}

/* Compares everything that was asked for; what was not must be untouched. */
static void compare(const backward_bufs* b, const backward_case* c)
{
    const int before = test_now.failures;
    const int pairs = gated(c) && c->gate_up == MOE_GATE_UP_INTERLEAVED;
    const int64_t R = b->h_offset[c->E], stride = c->H + c->row_pad;
    backward_ref f;
    ref_new(&f, b, c);
    if (!(c->left_out >> ROWS & 1)) {
        float* got = (float*)test_host(R * c->H * 4);
        void* p = tbuf_copy(&b->rows);
        for (int64_t i = 0; i < R * c->H; ++i)
            got[i] = moe_load(p, i / c->H * stride + i % c->H, c->rows_dtype);
        check_result("rows", got, &f, ROWS, c->rows_accumulate ? 2 : 0, c->rows_dtype,
                     pairs || separate(c) ? 2 : 1, c->H);
        if (!c->rows_accumulate)
            CHECK(test_strays(p, (int64_t)b->rows.bytes, moe_dtype_bytes(c->rows_dtype), stride,
                              c->H, 0, R) == 0,
                  "written outside the rows");
        TFREE(got, p);
    } else {
        CHECK(c->rows_accumulate || tbuf_holds(&b->rows, 0), "rows were not asked for");
    }
    if (!(c->left_out >> DW1 & 1)) compare_grads("dw1", &b->dw1, b, c, &f, DW1, c->major1, pairs);
    if (!(c->left_out >> DW2 & 1)) compare_grads("dw2", &b->dw2, b, c, &f, DW2, c->major2, 0);
    if (!(c->left_out >> DBIAS1 & 1)) compare_bias("dbias1", &b->dbias1, b, c, &f, DBIAS1, pairs);
    if (!(c->left_out >> DBIAS2 & 1)) compare_bias("dbias2", &b->dbias2, b, c, &f, DBIAS2, 0);
    if (!(c->left_out >> DWEIGHTS & 1)) {
        float* got = (float*)tbuf_copy(&b->dweights);
        const int64_t n = c->in_order ? R : f.size[DWEIGHTS];
        double* bound = (double*)test_host(n * 8);
        const int bits = p_bits(b);
        int live = 0; /* slots that have a row */
        for (int64_t i = 0; i < n; ++i)
            bound[i] = tsum_error(f.dweights_size[i], c->I + c->H) +
                       (bits ? ldexp(f.dweights_d[i], -bits) : 0);
        for (int64_t i = 0; i < n; ++i)
            if (!c->in_order && b->h_slot_row[i] < 0) CHECK(got[i] == 0, "a slot without a row");
            else ++live;
        CHECK_WITHIN("dweights", got, MOE_FP32, 1, f.all[0][DWEIGHTS], bound, n, 1, live < 16);
        for (int64_t i = R; i < b->num_rows && c->in_order; ++i)
            CHECK(got[i] == 0, "past the last row");
        TFREE(got, bound);
    }
    CHECK_FAULT(&b->fault, MOE_FAULT_NONE, 0);
    CHECK(tbuf_holds(&b->x, b->h_x) && tbuf_holds(&b->dy, b->h_dy) && tmlp_same(&b->mlp),
          "an input was written");
    CHECK(!c->own_dpre || tbuf_holds(&b->pre, b->h_pre), "pre was written");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    ref_free(&f);
}

static void run_case(const backward_case* c, trand* r)
{
    backward_bufs b;
    moe_experts_backward_prepared p;
    bufs_new(&b, c, r);
    if (c->path && moe_experts_backward_prepare(&b.d, &p) == MOE_STATUS(MOE_ERR_DEVICE, path))
        test_leave_out("no wgmma here");
    else if (CHECK_STATUS(moe_experts_backward(&b.d, test_now.stream), MOE_OK)) compare(&b, c);
    else printf("  in: %s\n", case_text(c));
    bufs_free(&b);
}

#endif
