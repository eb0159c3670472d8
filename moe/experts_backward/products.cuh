/* products.cuh: the products of the experts' backward pass, from a checked descriptor. Host code.
   Called by experts_backward.cuh. */
#ifndef MOE_EXPERTS_BACKWARD_PRODUCTS_CUH
#define MOE_EXPERTS_BACKWARD_PRODUCTS_CUH

#include "../gemm/k_desc.h"
#include "check.cuh"
#include "sums.cuh"

/* One matrix of w1 for each expert and the columns of pre that it makes: all of them, or where gate
   and up are apart either. */
typedef struct moei_up_part {
    moe_weights w;           /* the matrices */
    moe_weight_grads grads;  /* of the same matrices */
    int64_t column, columns; /* of pre */
} moei_up_part;

/* The products of the stages. Those without a result are not prepared. */
typedef struct moei_experts_backward_products {
    moe_grouped_gemm_desc pre, rows[2];
    moe_k_grouped_gemm_desc dw2, dw1[2];
    moei_row_sums_args dbias1, dbias2;
    moei_dweights_args dweights;
    int32_t parts; /* 1 or 2: of w1 */
} moei_experts_backward_products;

/* Returns the weights as the transposed product reads them: k-major is mn-major there. Requires a
   checked major. */
MOE_HOST moe_weights moei_weights_transposed(const moe_weights* w)
{
    moe_weights t = *w;
    t.major = w->major == MOE_MAJOR_MN ? MOE_MAJOR_K : MOE_MAJOR_MN;
    return t;
}

/* Sets part i of w1. Requires checked options. */
MOE_HOST void moei_experts_backward_part(const moe_experts_backward_desc* d, int i, int parts,
                                         moei_up_part* p)
{
    const int64_t intermediate = d->intermediate, hidden = d->hidden;
    p->w = d->w1;
    p->grads = d->dw1;
    p->columns =
        moe_activation_is_gated(d->activation) && parts == 1 ? 2 * intermediate : intermediate;
    p->column = i * p->columns;
    p->w.up = 0, p->w.up_table = 0;
    p->grads.up = 0, p->grads.up_table = 0;
    if (parts == 1) return;
    if (d->gate_up == MOE_GATE_UP_SEPARATE) {
        if (i == 0) return;
        p->w.base = d->w1.up, p->w.table = d->w1.up_table;
        p->grads.base = d->dw1.up, p->grads.table = d->dw1.up_table;
        return;
    }
    { /* interleaved: every second row */
        const int64_t w = d->w1.row_stride ? d->w1.row_stride : hidden;
        const int64_t g = d->dw1.row_stride ? d->dw1.row_stride : hidden;
        const int64_t bytes = d->grad_dtype == MOE_FP32 ? 4 : 2;
        p->w.base = (const char*)d->w1.base + i * w * 2;
        p->w.row_stride = 2 * w;
        if (!p->w.expert_stride) p->w.expert_stride = 2 * intermediate * w;
        if (p->grads.base) p->grads.base = (char*)d->dw1.base + i * g * bytes;
        p->grads.row_stride = 2 * g;
        if (!p->grads.expert_stride) p->grads.expert_stride = 2 * intermediate * g;
    }
}

/* Fills in what the products of weights' gradients share. m and n: of k-major weights [m, n]; mn: the
   weights are mn-major, and so are their gradients [n, m]. a_rows, b_rows: the operands of m and n,
   in expert order, or null: gathered from a, b. */
MOE_HOST void moei_experts_backward_dw(const moe_experts_backward_desc* d,
                                       const moe_weight_grads* grads, int mn,
                                       moe_k_grouped_gemm_desc* g)
{
    if (mn) { /* A and B change places */
        const moe_k_grouped_gemm_desc k = *g;
        g->a = k.b, g->b = k.a;
        g->a_stride = k.b_stride, g->b_stride = k.a_stride;
        g->a_rows = k.b_rows, g->b_rows = k.a_rows;
        g->a_index = k.b_index, g->b_index = k.a_index;
        g->a_div = k.b_div, g->b_div = k.a_div;
        g->m = k.n, g->n = k.m;
    }
    g->expert_offset = d->expert_offset;
    g->c = grads->base;
    g->c_table = grads->table;
    g->c_stride = grads->row_stride;
    g->c_expert_stride = grads->expert_stride;
    g->fault = d->fault;
    g->num_experts = d->num_experts;
    g->num_rows = d->num_rows;
    g->dtype = d->dtype;
    g->c_dtype = d->grad_dtype;
    g->accumulate = d->accumulate;
    g->empty_experts = d->empty_experts;
    g->tile = d->tile;
    g->path = d->path;
    g->grid_limit = d->grid_limit;
    g->rank = d->rank;
}

/* Sets the rows of one operand, k-grouped: `rows` in expert order where given, or row(r) of x. */
MOE_HOST void moei_experts_backward_operand(const moe_experts_backward_desc* d, const void* x,
                                            int64_t stride, const void* rows,
                                            moe_k_grouped_gemm_desc* g)
{
    g->b = rows ? rows : x;
    g->b_stride = rows ? d->hidden : stride;
    g->b_rows = rows || !d->row_slot ? d->num_rows : d->num_tokens;
    g->b_index = rows ? 0 : d->row_slot;
    g->b_div = rows || !d->row_slot ? 1 : d->top_k;
    g->n = d->hidden;
}

/* Sets the products that write rows: dpre, and rows from each part of w1. */
MOE_HOST void moei_experts_backward_row_products(const moe_experts_backward_desc* d,
                                                 moei_experts_backward_products* p)
{
    const int64_t width = moei_experts_backward_width(d);
    moe_grouped_gemm_desc g;
    memset(&g, 0, sizeof g);
    g.expert_offset = d->expert_offset;
    g.fault = d->fault;
    g.num_experts = d->num_experts;
    g.num_rows = d->num_rows;
    g.dtype = d->dtype;
    g.tile = d->tile;
    g.path = d->path;
    g.batch_invariant = d->batch_invariant;
    g.grid_limit = d->grid_limit;
    g.rank = d->rank;
    if (d->workspace) g.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;

    p->pre = g;
    p->pre.gradient = 1;
    p->pre.a = d->dy_rows ? d->dy_rows : d->dy;
    p->pre.a_stride = d->dy_rows ? d->hidden : d->dy_stride;
    p->pre.a_rows = d->dy_rows || !d->row_slot ? d->num_rows : d->num_tokens;
    p->pre.row_index = d->dy_rows ? 0 : d->row_slot;
    p->pre.row_div = d->dy_rows || !d->row_slot ? 1 : d->top_k;
    p->pre.row_weight = d->dy_rows && d->weights ? d->row_weight : d->weights;
    p->pre.b = moei_weights_transposed(&d->w2);
    p->pre.pre = d->pre;
    p->pre.c = d->dpre ? d->dpre : d->pre;
    p->pre.act = d->act;
    p->pre.dot = d->dot;
    p->pre.n = d->intermediate;
    p->pre.k = d->hidden;
    p->pre.activation = d->activation;
    p->pre.alpha = d->alpha;
    p->pre.limit = d->limit;
    p->pre.workspace = d->workspace;
    for (int i = 0; i < p->parts; ++i) {
        moei_up_part part;
        moei_experts_backward_part(d, i, p->parts, &part);
        p->rows[i] = g;
        p->rows[i].a = (const char*)p->pre.c + part.column * 2;
        p->rows[i].a_stride = width;
        p->rows[i].b = moei_weights_transposed(&part.w);
        p->rows[i].c = d->rows;
        p->rows[i].c_stride = d->row_stride;
        p->rows[i].c_dtype = d->rows_dtype;
        p->rows[i].accumulate = i || d->rows_accumulate;
        p->rows[i].n = d->hidden;
        p->rows[i].k = (int32_t)part.columns;
        if (d->workspace)
            p->rows[i].workspace = (char*)d->workspace + (1 + i) * MOE_GROUPED_GEMM_WORKSPACE;
    }
}

/* Sets the products that sum over rows: gradients of weights. */
MOE_HOST void moei_experts_backward_sum_products(const moe_experts_backward_desc* d,
                                                 moei_experts_backward_products* p)
{
    const int64_t width = moei_experts_backward_width(d);
    moe_k_grouped_gemm_desc g;
    memset(&g, 0, sizeof g);
    if (d->workspace) g.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;

    p->dw2 = g; /* act against dy; k-major weights are [H, I]: they change places */
    p->dw2.a = d->act;
    p->dw2.a_stride = d->intermediate;
    p->dw2.a_rows = d->num_rows;
    p->dw2.m = d->intermediate;
    moei_experts_backward_operand(d, d->dy, d->dy_stride, d->dy_rows, &p->dw2);
    moei_experts_backward_dw(d, &d->dw2, d->w2.major == MOE_MAJOR_K, &p->dw2);
    if (d->workspace) p->dw2.workspace = (char*)d->workspace + 3 * MOE_GROUPED_GEMM_WORKSPACE;
    for (int i = 0; i < p->parts; ++i) {
        moei_up_part part;
        moei_experts_backward_part(d, i, p->parts, &part);
        p->dw1[i] = g; /* dpre against x; k-major weights are [2I, H] */
        p->dw1[i].a = (const char*)p->pre.c + part.column * 2;
        p->dw1[i].a_stride = width;
        p->dw1[i].a_rows = d->num_rows;
        p->dw1[i].m = (int32_t)part.columns;
        moei_experts_backward_operand(d, d->x, d->x_stride, d->x_rows, &p->dw1[i]);
        moei_experts_backward_dw(d, &part.grads, d->w1.major == MOE_MAJOR_MN, &p->dw1[i]);
        if (d->workspace)
            p->dw1[i].workspace = (char*)d->workspace + (4 + i) * MOE_GROUPED_GEMM_WORKSPACE;
    }
}

/* Sets the args of the kernels that sum: biases and weights of slots. */
MOE_HOST void moei_experts_backward_sums(const moe_experts_backward_desc* d,
                                         moei_experts_backward_products* p)
{
    const int64_t width = moei_experts_backward_width(d);
    moei_row_sums_args* const b1 = &p->dbias1;
    moei_row_sums_args* const b2 = &p->dbias2;
    moei_dweights_args* const w = &p->dweights;
    memset(b1, 0, sizeof *b1);
    b1->expert_offset = d->expert_offset;
    b1->fault = d->fault;
    b1->num_rows = d->num_rows;
    b1->top_k = d->top_k;
    b1->dtype = d->dtype;
    b1->out_dtype = d->grad_dtype;
    b1->accumulate = d->accumulate;
    b1->skip_empty = d->empty_experts;
    *b2 = *b1;
    b1->src = p->pre.c;
    b1->out = d->dbias1;
    b1->stride = width;
    b1->src_rows = d->num_rows;
    b1->columns = (int32_t)width;
    b1->pairs = d->gate_up == MOE_GATE_UP_INTERLEAVED ? d->intermediate : 0;
    b2->src = d->dy;
    b2->row_slot = d->row_slot;
    b2->weight = d->weights;
    b2->out = d->dbias2;
    b2->stride = d->dy_stride;
    b2->src_rows = d->row_slot ? d->num_tokens : d->num_rows;
    b2->columns = d->hidden;

    memset(w, 0, sizeof *w);
    w->dot = d->dot;
    w->bias2 = d->bias2;
    w->dy = d->dy;
    w->expert_offset = d->expert_offset;
    w->slot_row = d->row_slot ? d->slot_row : 0;
    w->dweights = d->dweights;
    w->fault = d->fault;
    w->dy_stride = d->dy_stride;
    w->num_slots = (int64_t)(d->row_slot ? d->num_tokens : d->num_rows) * d->top_k;
    w->num_rows = d->num_rows;
    w->parts = (d->intermediate + 63) / 64;
    w->num_experts = d->num_experts;
    w->hidden = d->hidden;
    w->top_k = d->top_k;
    w->dtype = d->dtype;
}

#endif
