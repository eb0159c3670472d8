/* case.h: a case of the layer: its sizes and options, its buffers, how they are drawn. */
#ifndef MOE_TESTS_LAYER_CASE_H
#define MOE_TESTS_LAYER_CASE_H

#include "tests/test.h"
#include "tests/test_weights.h"

#include "moe/layer.cuh"
#include "tests/test_case.h"
#include "tests/test_mlp.h"

enum { FROM_ROUTER, FROM_LOGITS, FROM_IDS };
enum { NO_RESIDUAL, RESIDUAL, RESIDUAL_IS_Y, RESIDUAL_IS_X };

typedef struct layer_case {
    int T, H, I, E, K;
    int dtype, router_dtype, gate_up, tile;
    int rows_dtype; /* as in the descriptor: 0 is dtype */
    int from;       /* as above */
    int score, renormalize;
    float scale;
    int bias, table, major; /* of the weights */
    int residual;           /* as above */
    int y_is_x;
    int x_pad, y_pad, residual_pad;
    int unused, bad; /* percent of given ids that are -1, out of range */
    int nan_token;   /* token with a NaN, + 1; 0: none */
    int activation;
    float alpha, limit;
    int shared, shared_weighted; /* width of the shared expert; 0: none. 1: with weights */
    int shared_activation, shared_gate_up, shared_bias;
    int row_multiple, capacity, drop_rule;
    int replicas; /* physical experts; 0: no replicas */
    int absent;   /* 1: an expert has no replica here, and one of another's is elsewhere */
    int outputs;  /* 1: all optional outputs of gate and route */
    int rules;    /* 1: the test gives the gate rules of its own */
    int sampled;  /* compares y of every so many tokens; 0: all */
} layer_case;

typedef struct layer_bufs {
    tbuf x, router, logits, ids, weights, residual, y, workspace, fault;
    tbuf shared_weight, replica_offset, replica_expert;
    tbuf gate_count, drop_count, slot_row, row_weight; /* optional outputs */
    tmlp mlp, shared;
    void *h_x, *h_router, *h_logits, *h_residual;
    int32_t *h_ids, *h_replica_offset, *h_replica_expert;
    float *h_weights, *h_shared_weight;
    moe_layer_desc d;
} layer_bufs;

static const char* case_text(const layer_case* c)
{
    static char text[500];
    snprintf(text, sizeof text,
             "T=%d H=%d I=%d E=%d K=%d %s router %s from=%d score=%d renormalize=%d scale=%g "
             "gate_up=%d bias=%d table=%d major=%d residual=%d y_is_x=%d pads %d %d %d unused=%d "
             "bad=%d nan=%d tile=%d activation=%d (%g %g) shared=%d (%d, %d, %d, %d) multiple=%d "
             "capacity=%d rule=%d replicas=%d absent=%d outputs=%d rules=%d rows_dtype=%d",
             c->T, c->H, c->I, c->E, c->K, moe_dtype_name(c->dtype),
             moe_dtype_name(c->router_dtype), c->from, c->score, c->renormalize, (double)c->scale,
             c->gate_up, c->bias, c->table, c->major, c->residual, c->y_is_x, c->x_pad, c->y_pad,
             c->residual_pad, c->unused, c->bad, c->nan_token, c->tile, c->activation,
             (double)c->alpha, (double)c->limit, c->shared, c->shared_weighted,
             c->shared_activation, c->shared_gate_up, c->shared_bias, c->row_multiple, c->capacity,
             c->drop_rule, c->replicas, c->absent, c->outputs, c->rules, c->rows_dtype);
    return text;
}

/* Returns a case with bf16 where there is code for it, and the small tile. */
static layer_case normal_case(int T, int H, int I, int E, int K)
{
    layer_case c = {};
    c.T = T, c.H = H, c.I = I, c.E = E, c.K = K;
    c.dtype = c.router_dtype = test_half();
    c.gate_up = MOE_GATE_UP_CONCATENATED;
    c.major = MOE_MAJOR_K;
    c.tile = MOE_TILE_64x64;
    return c;
}

/* Returns the number of physical experts: those that have weights. */
static int physical(const layer_case* c) { return c->replicas ? c->replicas : c->E; }

/* Returns the options of route, without its buffers. */
static moe_route_desc route_options(const layer_case* c)
{
    moe_route_desc r = {};
    r.row_multiple = c->row_multiple, r.capacity = c->capacity, r.drop_rule = c->drop_rule;
    r.num_replicas = c->replicas, r.absent_replicas = c->absent;
    return r;
}

/* Sets one of the gate's rules. The buffers are for the rules that read one. */
static void set_rule(moe_gate_desc* g, int rule, const tbuf* bias, const tbuf* expert_disabled,
                     const tbuf* token_disabled)
{
    switch (rule) {
    case 0: g->score = MOE_SCORE_SPARSEMAX; break;
    case 1: g->score = MOE_SCORE_QUADRATIC, g->renormalize = 1; break;
    case 2: g->score = MOE_SCORE_PIONEER; break;
    case 3: g->score = MOE_SCORE_SIGMOID, g->threshold = 0.6f; break;
    case 4: g->score = MOE_SCORE_SIGMOID, g->expert_bias = (const float*)bias->p; break;
    case 5: g->num_groups = 4, g->top_groups = 1; break;
    case 6: g->temperature = 0.5f; break;
    case 7: g->noise = 1, g->seed = 12345; break;
    case 8: g->dropout = 0.4f, g->seed = 99; break;
    case 9: g->expert_disabled = (const uint8_t*)expert_disabled->p; break;
    case 10: g->token_disabled = (const uint8_t*)token_disabled->p; break;
    default: g->whole_batch = 1;
    }
}

/* Returns the most rows that there may be, as route says. */
static int64_t rows_of(const layer_case* c)
{
    static const int32_t some = 0;
    moe_route_desc r = route_options(c);
    int64_t rows = -1;
    r.num_tokens = c->T, r.num_experts = c->E, r.top_k = c->K;
    if (c->replicas) r.replica_offset = &some;
    CHECK_STATUS(moe_route_max_rows(&r, &rows), MOE_OK);
    return rows;
}

/* Returns the bytes that a buffer takes in a workspace. */
static size_t carved(size_t bytes) { return (bytes + 255) / 256 * 256; }

/* Returns the bytes that layer.cuh says the workspace has. */
static size_t documented_bytes(const layer_case* c, const moe_layer_desc* d)
{
    const size_t T = (size_t)c->T, H = (size_t)c->H, I = (size_t)c->I, E = (size_t)c->E;
    const size_t K = (size_t)c->K, P = (size_t)physical(c), R = (size_t)rows_of(c);
    const size_t chunks = (size_t)moe_num_chunks((int64_t)T), shared = (size_t)c->shared;
    const size_t row = H * (c->rows_dtype == MOE_FP32 ? 4 : 2);
    const size_t gate_sums = (d->gate.prob_sum != 0) + (d->gate.whole_batch != 0);
    size_t sum = c->from == FROM_ROUTER ? carved(T * E * 4) : 0;
    if (c->from != FROM_IDS) sum += 2 * carved(T * K * 4); /* ids, weights */
    sum += carved(gate_sums * chunks * E * 4 + (d->gate.z_sum ? chunks * 4 : 0));
    sum += carved(P * chunks * 4); /* counts, of the gate or in route's workspace */
    if (c->drop_rule == MOE_DROP_BY_WEIGHT)
        sum += carved(P * 4) + carved(P * 4 + 4) + 2 * carved(T * K * 4);
    sum += carved(P * 4) + carved((P + 1) * 4) + carved(R * 4) + carved(T * K * 8);
    sum += carved(2 * MOE_EXPERTS_WORKSPACE) + carved(R * I * 2) + carved(R * row);
    if (c->shared) sum += carved(T * shared * 2) + carved(T * row);
    return sum;
}

/* Draws x, logits, ids and weights. */
static void fill_inputs(layer_bufs* b, const layer_case* c, trand* r)
{
    const int64_t x_stride = c->H + c->x_pad, slots = (int64_t)c->T * c->K;
    for (int64_t t = 0; t < c->T; ++t)
        for (int h = 0; h < c->H; ++h)
            moe_store(b->h_x, t * x_stride + h, c->dtype, trand_normal(r));
    trand_fill_normal(r, b->h_logits, (int64_t)c->T * c->E, MOE_FP32);
    if (c->nan_token) {
        const int64_t t = c->nan_token - 1;
        moe_store(b->h_x, t * x_stride + c->H / 2, c->dtype, NAN);
        moe_store(b->h_logits, t * c->E + c->E - 1, MOE_FP32, NAN);
    }
    for (int64_t s = 0; s < slots; ++s) {
        const int64_t u = trand_int(r, 0, 99);
        b->h_weights[s] = 0.1f + 0.9f * (float)trand_int(r, 0, 1000) / 1000;
        b->h_ids[s] = (int32_t)trand_int(r, 0, c->E - 1);
        if (u < c->unused) b->h_ids[s] = -1;
        else if (u < c->unused + c->bad) b->h_ids[s] = test_out_of_range(u, c->E);
    }
    tbuf_put(&b->x, b->h_x), tbuf_put(&b->logits, b->h_logits);
    tbuf_put(&b->ids, b->h_ids), tbuf_put(&b->weights, b->h_weights);
}

/* Puts everything that a call writes into its state before the call. */
static void reset(layer_bufs* b, const layer_case* c)
{
    tbufs_poison(
        TBUFS(&b->workspace, &b->gate_count, &b->drop_count, &b->slot_row, &b->row_weight));
    tfault_put(&b->fault, MOE_FAULT_NONE, 0);
    if (c->y_is_x) tbuf_put(&b->x, b->h_x);
    else if (c->residual == RESIDUAL_IS_Y) tbuf_put(&b->y, b->h_residual);
    else tbuf_poison(&b->y);
}

/* Draws replicas: one or more of each expert, at shuffled places. With `absent` the first expert
   has none, and one replica is elsewhere. */
static void fill_replicas(layer_bufs* b, const layer_case* c, trand* r)
{
    const int P = physical(c);
    b->h_replica_offset = (int32_t*)test_host(c->E * 4 + 4);
    b->h_replica_expert = (int32_t*)test_host(P * 4);
    for (int e = 0; e <= c->E; ++e) b->h_replica_offset[e] = e;
    for (int more = P - c->E; more > 0; --more)
        for (int e = (int)trand_int(r, 1, c->E); e <= c->E; ++e) ++b->h_replica_offset[e];
    for (int i = 0; i < P; ++i) b->h_replica_expert[i] = i;
    for (int i = P - 1; i > 0; --i) {
        const int j = (int)trand_int(r, 0, i), at = b->h_replica_expert[i];
        b->h_replica_expert[i] = b->h_replica_expert[j];
        b->h_replica_expert[j] = at;
    }
    if (c->absent) {
        b->h_replica_offset[1] = 0;
        b->h_replica_expert[trand_int(r, 0, P - 1)] = -1;
    }
    b->replica_offset = tbuf_from("replica_offset", b->h_replica_offset, (size_t)c->E * 4 + 4, 4);
    b->replica_expert = tbuf_from("replica_expert", b->h_replica_expert, (size_t)P * 4, 4);
}

/* Makes a workspace of the size that the descriptor takes, which must be the documented one. */
static void workspace_new(layer_bufs* b, const layer_case* c)
{
    size_t bytes = 0;
    CHECK_STATUS(moe_layer_workspace(&b->d, &bytes), MOE_OK);
    CHECK(bytes == documented_bytes(c, &b->d), "%s: %zu bytes of workspace, not %zu", case_text(c),
          bytes, documented_bytes(c, &b->d));
    b->workspace = tbuf_new("workspace", bytes, 0);
    b->d.workspace = b->workspace.p, b->d.workspace_bytes = bytes;
}

/* Makes the workspace anew, for a descriptor that the test has changed. */
static void fit_workspace(layer_bufs* b, const layer_case* c)
{
    tbuf_free(&b->workspace);
    workspace_new(b, c);
}

/* Fills in the descriptor, but for the workspace. */
static void fill_desc(layer_bufs* b, const layer_case* c)
{
    moe_layer_desc* const d = &b->d;
    const int gate = c->from != FROM_IDS, shared = c->shared != 0;
    d->x = b->x.p, d->y = c->y_is_x ? b->x.p : b->y.p;
    d->router = c->from == FROM_ROUTER ? b->router.p : (const void*)0;
    d->logits = c->from == FROM_LOGITS ? (const float*)b->logits.p : (const float*)0;
    d->ids = c->from == FROM_IDS ? (const int32_t*)b->ids.p : (const int32_t*)0;
    d->weights = c->from == FROM_IDS ? (const float*)b->weights.p : (const float*)0;
    d->w1 = b->mlp.w1.d, d->w2 = b->mlp.w2.d;
    d->bias1 = c->bias ? b->mlp.bias1.p : (const void*)0;
    d->bias2 = c->bias ? b->mlp.bias2.p : (const void*)0;
    d->residual = c->residual == NO_RESIDUAL     ? (const void*)0
                  : c->residual == RESIDUAL      ? b->residual.p
                  : c->residual == RESIDUAL_IS_X ? b->x.p
                                                 : d->y;
    d->fault = (uint64_t*)b->fault.p, d->rank = TEST_RANK;
    d->num_tokens = c->T, d->num_experts = c->E, d->top_k = c->K;
    d->hidden = c->H, d->intermediate = c->I;
    d->dtype = c->dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->dtype;
    d->rows_dtype = c->rows_dtype;
    d->router_dtype = c->router_dtype == c->dtype ? MOE_DTYPE_DEFAULT : c->router_dtype;
    d->gate_up = c->gate_up == MOE_GATE_UP_CONCATENATED ? MOE_GATE_UP_DEFAULT : c->gate_up;
    d->activation = c->activation, d->alpha = c->alpha, d->limit = c->limit, d->tile = c->tile;
    if (gate) /* its options are refused where none runs */
        d->gate.score = c->score, d->gate.renormalize = c->renormalize, d->gate.scale = c->scale;
    d->route = route_options(c);
    if (c->replicas) {
        d->route.replica_offset = (const int32_t*)b->replica_offset.p;
        d->route.replica_expert = (const int32_t*)b->replica_expert.p;
    }
    if (c->outputs) {
        if (gate) d->gate.expert_count = (int32_t*)b->gate_count.p;
        d->route.drop_count = (int32_t*)b->drop_count.p;
        d->route.slot_row = (int32_t*)b->slot_row.p;
        d->route.row_weight = (float*)b->row_weight.p;
    }
    if (shared) {
        d->shared.w1 = b->shared.w1.d, d->shared.w2 = b->shared.w2.d;
        d->shared.bias1 = c->shared_bias ? b->shared.bias1.p : (const void*)0;
        d->shared.bias2 = c->shared_bias ? b->shared.bias2.p : (const void*)0;
        d->shared.weight = c->shared_weighted ? (const float*)b->shared_weight.p : (const float*)0;
        d->shared.intermediate = c->shared;
        d->shared.activation = c->shared_activation, d->shared.gate_up = c->shared_gate_up;
    }
}

static void bufs_new(layer_bufs* b, const layer_case* c, trand* r)
{
    const int64_t T = c->T, H = c->H, E = c->E, slots = T * c->K;
    const int64_t x_stride = H + c->x_pad, y_stride = H + (c->y_is_x ? c->x_pad : c->y_pad);
    const int64_t residual_stride = c->residual == RESIDUAL_IS_Y   ? y_stride
                                    : c->residual == RESIDUAL_IS_X ? x_stride
                                                                   : H + c->residual_pad;
    const int shared = c->shared ? c->shared : 8;
    const float scale = (float)(1.5 / sqrt((double)H)); /* of the router's weights */
    tmlp_want want = tmlp_sizes(physical(c), c->H, c->I, c->dtype, c->activation, c->gate_up);
    tmlp_want want_shared =
        tmlp_sizes(1, c->H, shared, c->dtype, c->shared_activation, c->shared_gate_up);
    memset(b, 0, sizeof *b);
    b->h_x = test_host(T * x_stride * 2);
    b->h_logits = test_host(T * E * 4);
    b->h_ids = (int32_t*)test_host(slots * 4);
    b->h_weights = (float*)test_host(slots * 4);
    b->x = tbuf_new("x", (size_t)moe_extent(T, x_stride, H, c->dtype), 16);
    b->logits = tbuf_new("logits", (size_t)(T * E * 4), 4);
    b->ids = tbuf_new("ids", (size_t)slots * 4, 4);
    b->weights = tbuf_new("weights", (size_t)slots * 4, 4);
    fill_inputs(b, c, r);
    b->h_router = trows_new(r, E, H, H, c->router_dtype, TFILL_NORMAL, scale);
    b->router =
        tbuf_from("router", b->h_router, (size_t)(E * H * moe_dtype_bytes(c->router_dtype)), 16);
    want.major1 = want.major2 = want_shared.major1 = want_shared.major2 = c->major;
    want.table1 = want.table2 = want_shared.table1 = want_shared.table2 = c->table;
    tmlp_new(&b->mlp, &want, r);
    tmlp_new(&b->shared, &want_shared, r);
    b->h_shared_weight = (float*)test_host(T * 4);
    for (int64_t t = 0; t < T; ++t)
        b->h_shared_weight[t] = 0.1f + 0.9f * (float)trand_int(r, 0, 1000) / 1000;
    b->shared_weight = tbuf_from("shared_weight", b->h_shared_weight, (size_t)T * 4, 4);
    fill_replicas(b, c, r);
    b->h_residual = trows_new(r, T, residual_stride, H, c->dtype, TFILL_NORMAL, 1);
    b->residual = tbuf_from("residual", b->h_residual,
                            (size_t)moe_extent(T, residual_stride, H, c->dtype), 2);
    b->y = tbuf_new("y", (size_t)moe_extent(T, y_stride, H, c->dtype), 2);
    b->gate_count = tbuf_new("gate.expert_count", (size_t)E * 4, 4);
    b->drop_count = tbuf_new("route.drop_count", (size_t)physical(c) * 4, 4);
    b->slot_row = tbuf_new("route.slot_row", (size_t)slots * 4, 4);
    b->row_weight = tbuf_new("route.row_weight", (size_t)rows_of(c) * 4, 4);
    b->fault = tfault_new(0);
    fill_desc(b, c);
    b->d.x_stride = c->x_pad ? x_stride : 0;
    b->d.y_stride = y_stride == H ? 0 : y_stride;
    b->d.residual_stride = residual_stride == H ? 0 : residual_stride;
    workspace_new(b, c);
    reset(b, c);
}

static void bufs_free(layer_bufs* b)
{
    tbufs_free(TBUFS(&b->x, &b->router, &b->logits, &b->ids, &b->weights, &b->residual, &b->y,
                     &b->workspace, &b->fault, &b->shared_weight, &b->replica_offset,
                     &b->replica_expert, &b->gate_count, &b->drop_count, &b->slot_row,
                     &b->row_weight));
    tmlp_free(&b->mlp);
    tmlp_free(&b->shared);
    TFREE(b->h_x, b->h_router, b->h_logits, b->h_residual, b->h_ids, b->h_weights,
          b->h_shared_weight, b->h_replica_offset, b->h_replica_expert);
}

/* Are y and the workspace as `reset` left them? */
static int untouched(const layer_bufs* b, const layer_case* c)
{
    const int y = c->y_is_x                      ? tbuf_holds(&b->x, b->h_x)
                  : c->residual == RESIDUAL_IS_Y ? tbuf_holds(&b->y, b->h_residual)
                                                 : tbuf_holds(&b->y, 0);
    return y && tbuf_holds(&b->workspace, 0);
}

#endif
