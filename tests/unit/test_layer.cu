/* test_layer.cu: moe/layer.cuh against the references of its stations, in double.

     nvcc -I. -arch=sm_90a tests/unit/test_layer.cu -o test_layer
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_layer.cu -o test_layer */
#include "tests/test.h"
#include "tests/test_weights.h"

#define MOE_GEMM_VARIANT_LIST(X, ...)                                                             \
    X(f16_kk, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                    \
    X(bf16_kk, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                   \
    X(bf16_kn, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)
#include "moe/layer.cuh"
#include "moe/ref/layer.h"
#include "tests/test_bound.h"

enum { FROM_ROUTER, FROM_LOGITS, FROM_IDS };
enum { NO_RESIDUAL, RESIDUAL, RESIDUAL_IS_Y, RESIDUAL_IS_X };

typedef struct layer_case {
    int T, H, I, E, K;
    int dtype, router_dtype, gate_up, tile;
    int rows_dtype; /* as in the descriptor: 0 is dtype */
    int from; /* as above */
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
    int rules;    /* 1: the gate has other rules than the plain ones, set by the test */
    int sampled;     /* check y of every so many tokens; 0: all */
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
             c->T, c->H, c->I, c->E, c->K, moe_dtype_name(c->dtype), moe_dtype_name(c->router_dtype),
             c->from, c->score, c->renormalize, (double)c->scale, c->gate_up, c->bias, c->table,
             c->major, c->residual, c->y_is_x, c->x_pad, c->y_pad, c->residual_pad, c->unused, c->bad,
             c->nan_token, c->tile, c->activation, (double)c->alpha, (double)c->limit, c->shared,
             c->shared_weighted, c->shared_activation, c->shared_gate_up, c->shared_bias,
             c->row_multiple, c->capacity, c->drop_rule, c->replicas, c->absent, c->outputs,
             c->rules, c->rows_dtype);
    return text;
}

/* bf16 where there is code for it, the small tile. */
static layer_case normal_case(int T, int H, int I, int E, int K)
{
    layer_case c;
    memset(&c, 0, sizeof c);
    c.T = T;
    c.H = H;
    c.I = I;
    c.E = E;
    c.K = K;
    c.dtype = c.router_dtype = test_half();
    c.gate_up = MOE_GATE_UP_CONCATENATED;
    c.major = MOE_MAJOR_K;
    c.tile = MOE_TILE_64x64;
    return c;
}

/* Experts that have weights. */
static int physical(const layer_case* c) { return c->replicas ? c->replicas : c->E; }

/* The options of route. */
static moe_route_desc route_options(const layer_case* c)
{
    moe_route_desc r;
    memset(&r, 0, sizeof r);
    r.row_multiple = c->row_multiple;
    r.capacity = c->capacity;
    r.drop_rule = c->drop_rule;
    r.num_replicas = c->replicas;
    r.absent_replicas = c->absent;
    return r;
}

/* Rows at most, as route says. */
static int64_t rows_of(const layer_case* c)
{
    static const int32_t some = 0;
    moe_route_desc r = route_options(c);
    int64_t rows = -1;
    r.num_tokens = c->T;
    r.num_experts = c->E;
    r.top_k = c->K;
    if (c->replicas) r.replica_offset = &some;
    CHECK_STATUS(moe_route_max_rows(&r, &rows), MOE_OK);
    return rows;
}

/* What layer.cuh says the workspace holds. */
static size_t documented_bytes(const layer_case* c, const moe_layer_desc* d)
{
    const size_t T = (size_t)c->T, H = (size_t)c->H, I = (size_t)c->I, E = (size_t)c->E;
    const size_t K = (size_t)c->K, P = (size_t)physical(c), R = (size_t)rows_of(c);
    const size_t chunks = (size_t)moe_num_chunks((int64_t)T);
    size_t sum = 0;
#define PIECE(bytes) sum += ((bytes) + 255) / 256 * 256
    if (c->from == FROM_ROUTER) PIECE(T * E * 4);
    if (c->from != FROM_IDS) {
        PIECE(T * K * 4);
        PIECE(T * K * 4);
    }
    if (c->from != FROM_IDS && !c->replicas) PIECE(E * chunks * 4);
    if (d->gate.prob_sum || d->gate.whole_batch)
        PIECE((size_t)((d->gate.prob_sum != 0) + (d->gate.whole_batch != 0)) * chunks * E * 4);
    if (c->drop_rule == MOE_DROP_BY_WEIGHT) { /* as moe_route_workspace says */
        size_t route = c->from != FROM_IDS && !c->replicas ? 0 : P * chunks * 4;
        const size_t pieces[] = {P * 4, P * 4 + 4, T * K * 4, T * K * 4};
        for (int i = 0; i < 4; ++i) route = (route + 15) / 16 * 16 + pieces[i];
        PIECE(route);
    } else if (c->from == FROM_IDS || c->replicas) {
        PIECE(P * chunks * 4);
    }
    PIECE(P * 4);
    PIECE((P + 1) * 4);
    PIECE(R * 4);
    PIECE(T * K * 8);
    PIECE(R * I * 2);
    PIECE(R * H * (c->rows_dtype == MOE_FP32 ? 4 : 2));
    if (c->shared) {
        PIECE(T * (size_t)c->shared * 2);
        PIECE(T * H * (c->rows_dtype == MOE_FP32 ? 4 : 2));
    }
#undef PIECE
    return sum;
}

/* Fresh x, logits, ids and weights. */
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
        else if (u < c->unused + c->bad)
            b->h_ids[s] = u % 4 == 0   ? c->E
                          : u % 4 == 1 ? INT32_MAX
                          : u % 4 == 2 ? -2
                                       : INT32_MIN;
    }
    tbuf_put(&b->x, b->h_x);
    tbuf_put(&b->logits, b->h_logits);
    tbuf_put(&b->ids, b->h_ids);
    tbuf_put(&b->weights, b->h_weights);
}

/* Outputs as they are before a call. */
static void reset(layer_bufs* b, const layer_case* c)
{
    const uint64_t none = 0;
    tbuf_poison(&b->workspace);
    tbuf_poison(&b->gate_count);
    tbuf_poison(&b->drop_count);
    tbuf_poison(&b->slot_row);
    tbuf_poison(&b->row_weight);
    tbuf_put(&b->fault, &none);
    if (c->y_is_x) tbuf_put(&b->x, b->h_x);
    else if (c->residual == RESIDUAL_IS_Y) tbuf_put(&b->y, b->h_residual);
    else tbuf_poison(&b->y);
}

/* Every expert has a replica, some have more; where they are is shuffled. With `absent` the first has
   none, and one is elsewhere. */
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

static void bufs_new(layer_bufs* b, const layer_case* c, trand* r)
{
    const int64_t T = c->T, H = c->H, E = c->E, slots = T * c->K;
    const int64_t x_stride = H + c->x_pad, y_stride = H + (c->y_is_x ? c->x_pad : c->y_pad);
    const int64_t residual_stride = c->residual == RESIDUAL_IS_Y   ? y_stride
                                    : c->residual == RESIDUAL_IS_X ? x_stride
                                                                   : H + c->residual_pad;
    size_t bytes = 0;
    tmlp_want want;
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
    b->h_router = trows_new(r, E, H, H, c->router_dtype, TFILL_NORMAL, (float)(1.5 / sqrt((double)H)));
    b->router = tbuf_from("router", b->h_router, (size_t)(E * H * moe_dtype_bytes(c->router_dtype)), 16);
    memset(&want, 0, sizeof want);
    want.experts = physical(c);
    want.hidden = c->H;
    want.intermediate = c->I;
    want.dtype = c->dtype;
    want.activation = c->activation;
    want.gate_up = c->gate_up;
    want.major1 = want.major2 = c->major;
    want.table1 = want.table2 = c->table;
    tmlp_new(&b->mlp, &want, r);
    want.experts = 1;
    want.intermediate = c->shared ? c->shared : 8;
    want.activation = c->shared_activation;
    want.gate_up = c->shared_gate_up;
    tmlp_new(&b->shared, &want, r);
    b->h_shared_weight = (float*)test_host(T * 4);
    for (int64_t t = 0; t < T; ++t)
        b->h_shared_weight[t] = 0.1f + 0.9f * (float)trand_int(r, 0, 1000) / 1000;
    b->shared_weight = tbuf_from("shared_weight", b->h_shared_weight, (size_t)T * 4, 4);
    fill_replicas(b, c, r);
    b->h_residual = trows_new(r, T, residual_stride, H, c->dtype, TFILL_NORMAL, 1);
    b->residual = tbuf_from("residual", b->h_residual,
                            (size_t)moe_extent(T, residual_stride, H, c->dtype), 2);
    b->y = tbuf_new("y", (size_t)moe_extent(T, y_stride, H, c->dtype), 2);
    b->fault = tfault_new(0);

    b->d.x = b->x.p;
    b->d.router = c->from == FROM_ROUTER ? b->router.p : (const void*)0;
    b->d.logits = c->from == FROM_LOGITS ? (const float*)b->logits.p : (const float*)0;
    b->d.ids = c->from == FROM_IDS ? (const int32_t*)b->ids.p : (const int32_t*)0;
    b->d.weights = c->from == FROM_IDS ? (const float*)b->weights.p : (const float*)0;
    b->d.w1 = b->mlp.w1.d;
    b->d.w2 = b->mlp.w2.d;
    b->d.bias1 = c->bias ? b->mlp.bias1.p : (const void*)0;
    b->d.bias2 = c->bias ? b->mlp.bias2.p : (const void*)0;
    b->d.y = c->y_is_x ? b->x.p : b->y.p;
    b->d.residual = c->residual == NO_RESIDUAL     ? (const void*)0
                    : c->residual == RESIDUAL      ? b->residual.p
                    : c->residual == RESIDUAL_IS_X ? b->x.p
                                                   : b->d.y;
    b->d.x_stride = c->x_pad ? x_stride : 0;
    b->d.y_stride = y_stride == H ? 0 : y_stride;
    b->d.residual_stride = residual_stride == H ? 0 : residual_stride;
    b->d.fault = (uint64_t*)b->fault.p;
    b->d.rank = TEST_RANK;
    b->d.num_tokens = c->T;
    b->d.hidden = c->H;
    b->d.intermediate = c->I;
    b->d.num_experts = c->E;
    b->d.top_k = c->K;
    b->d.dtype = c->dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->dtype;
    b->d.rows_dtype = c->rows_dtype;
    b->d.router_dtype = c->router_dtype == c->dtype ? MOE_DTYPE_DEFAULT : c->router_dtype;
    if (c->from != FROM_IDS) { /* the gate's options: refused where none runs */
        b->d.gate.score = c->score;
        b->d.gate.renormalize = c->renormalize;
        b->d.gate.scale = c->scale;
    }
    b->d.route = route_options(c);
    if (c->replicas) {
        b->d.route.replica_offset = (const int32_t*)b->replica_offset.p;
        b->d.route.replica_expert = (const int32_t*)b->replica_expert.p;
    }
    b->gate_count = tbuf_new("gate.expert_count", (size_t)E * 4, 4);
    b->drop_count = tbuf_new("route.drop_count", (size_t)physical(c) * 4, 4);
    b->slot_row = tbuf_new("route.slot_row", (size_t)slots * 4, 4);
    b->row_weight = tbuf_new("route.row_weight", (size_t)rows_of(c) * 4, 4);
    if (c->outputs) {
        if (c->from != FROM_IDS) b->d.gate.expert_count = (int32_t*)b->gate_count.p;
        b->d.route.drop_count = (int32_t*)b->drop_count.p;
        b->d.route.slot_row = (int32_t*)b->slot_row.p;
        b->d.route.row_weight = (float*)b->row_weight.p;
    }
    b->d.activation = c->activation;
    b->d.alpha = c->alpha;
    b->d.limit = c->limit;
    if (c->shared) {
        b->d.shared.w1 = b->shared.w1.d;
        b->d.shared.w2 = b->shared.w2.d;
        b->d.shared.bias1 = c->shared_bias ? b->shared.bias1.p : (const void*)0;
        b->d.shared.bias2 = c->shared_bias ? b->shared.bias2.p : (const void*)0;
        b->d.shared.weight = c->shared_weighted ? (const float*)b->shared_weight.p : (const float*)0;
        b->d.shared.intermediate = c->shared;
        b->d.shared.activation = c->shared_activation;
        b->d.shared.gate_up = c->shared_gate_up;
    }
    b->d.gate_up = c->gate_up == MOE_GATE_UP_CONCATENATED ? MOE_GATE_UP_DEFAULT : c->gate_up;
    b->d.tile = c->tile;
    CHECK_STATUS(moe_layer_workspace(&b->d, &bytes), MOE_OK);
    CHECK(bytes == documented_bytes(c, &b->d), "%s: %zu bytes of workspace, not %zu", case_text(c), bytes,
          documented_bytes(c, &b->d));
    b->workspace = tbuf_new("workspace", bytes, 0);
    b->d.workspace = b->workspace.p;
    b->d.workspace_bytes = bytes;
    reset(b, c);
}

static void bufs_free(layer_bufs* b)
{
    tbuf_free(&b->x);
    tbuf_free(&b->router);
    tbuf_free(&b->logits);
    tbuf_free(&b->ids);
    tbuf_free(&b->weights);
    tbuf_free(&b->residual);
    tbuf_free(&b->y);
    tbuf_free(&b->workspace);
    tbuf_free(&b->fault);
    tbuf_free(&b->shared_weight);
    tbuf_free(&b->replica_offset);
    tbuf_free(&b->replica_expert);
    tbuf_free(&b->gate_count);
    tbuf_free(&b->drop_count);
    tbuf_free(&b->slot_row);
    tbuf_free(&b->row_weight);
    tmlp_free(&b->mlp);
    tmlp_free(&b->shared);
    free(b->h_replica_offset);
    free(b->h_replica_expert);
    free(b->h_shared_weight);
    free(b->h_x);
    free(b->h_router);
    free(b->h_logits);
    free(b->h_ids);
    free(b->h_weights);
    free(b->h_residual);
}

/* The residual as the host has it; null: none. */
static const void* residual_of(const layer_bufs* b, const layer_case* c, int64_t* stride)
{
    *stride = b->d.residual_stride ? b->d.residual_stride : c->H;
    if (c->residual == NO_RESIDUAL) return 0;
    return c->residual == RESIDUAL_IS_X || (c->residual == RESIDUAL_IS_Y && c->y_is_x) ? b->h_x
                                                                                      : b->h_residual;
}

/* A station's output in the workspace's host copy. */
static const void* piece(const layer_bufs* b, const void* copy, const void* at)
{
    return (const char*)copy + ((const char*)at - (const char*)b->workspace.p);
}

/* The shared expert's weights and options for a reference. */
static moe_ref_layer_shared ref_shared(const layer_bufs* b, const layer_case* c)
{
    moe_ref_layer_shared s;
    memset(&s, 0, sizeof s);
    s.w1 = tweights_host(&b->shared.w1);
    s.w2 = tweights_host(&b->shared.w2);
    s.bias1 = c->shared_bias ? b->shared.h_bias1 : (void*)0;
    s.bias2 = c->shared_bias ? b->shared.h_bias2 : (void*)0;
    s.weight = c->shared_weighted ? b->h_shared_weight : (float*)0;
    s.intermediate = c->shared;
    s.activation = c->shared_activation;
    s.gate_up = c->shared_gate_up;
    return s;
}

/* What the rows are rounded to. */
static int rows_dtype(const layer_case* c) { return c->rows_dtype ? c->rows_dtype : c->dtype; }

/* y [n, H] of the tokens pick[0 .. n - 1], from given physical ids and weights [T, K]; act rounded to
   `dtype` and rows to their own, dtype 0: nothing rounded. bound and size [n, H] get each element's
   own bound and the sum of the terms' absolutes, or are null. */
static void ref_y(const layer_bufs* b, const layer_case* c, const int32_t* ids, const float* weights,
                  const int32_t* pick, int64_t n, int dtype, double* y, double* bound, double* size)
{
    const int64_t K = c->K, H = c->H, slots = n * K, x_stride = H + c->x_pad;
    uint16_t* x = (uint16_t*)test_host(n * H * 2);
    uint16_t* residual = (uint16_t*)test_host(n * H * 2);
    int32_t* id = (int32_t*)test_host(slots * 4);
    int32_t* row_slot = (int32_t*)test_host(slots * 4);
    int32_t* count = (int32_t*)test_host(physical(c) * 4);
    int32_t* offset = (int32_t*)test_host(physical(c) * 4 + 4);
    moe_place* place = (moe_place*)test_host(slots * 8);
    float* weight = (float*)test_host(slots * 4);
    float* shared_weight = (float*)test_host(n * 4);
    double* rows = (double*)test_host(slots * H * 8);
    double* shared = (double*)test_host(n * H * 8);
    double* row_bound = (double*)test_host(slots * H * 8);
    double* shared_bound = (double*)test_host(n * H * 8);
    double* act_bound = (double*)test_host((slots * c->I + n * c->shared) * 8); /* of either */
    int64_t residual_stride;
    const void* h_residual = residual_of(b, c, &residual_stride);
    moe_ref_route_desc route;
    moe_ref_experts_desc e;
    moe_ref_combine_desc combine;
    for (int64_t i = 0; i < n; ++i) {
        memcpy(x + i * H, (const uint16_t*)b->h_x + pick[i] * x_stride, (size_t)H * 2);
        if (h_residual)
            memcpy(residual + i * H, (const uint16_t*)h_residual + pick[i] * residual_stride,
                   (size_t)H * 2);
        memcpy(id + i * K, ids + pick[i] * K, (size_t)K * 4);
        memcpy(weight + i * K, weights + pick[i] * K, (size_t)K * 4);
        shared_weight[i] = b->h_shared_weight[pick[i]];
    }
    memset(&route, 0, sizeof route);
    route.ids = id;
    route.expert_count = count;
    route.expert_offset = offset;
    route.row_slot = row_slot;
    route.place = place;
    route.num_tokens = (int)n;
    route.num_experts = physical(c);
    route.top_k = c->K;
    moe_ref_route(&route);
    memset(&e, 0, sizeof e);
    e.x = x;
    e.row_slot = row_slot;
    e.expert_offset = offset;
    e.w1 = tweights_host(&b->mlp.w1);
    e.w2 = tweights_host(&b->mlp.w2);
    e.bias1 = c->bias ? b->mlp.h_bias1 : (void*)0;
    e.bias2 = c->bias ? b->mlp.h_bias2 : (void*)0;
    e.x_dtype = e.w_dtype = e.bias_dtype = c->dtype;
    e.act_dtype = dtype;
    e.activation = c->activation;
    e.alpha = c->alpha;
    e.limit = c->limit;
    e.gate_up = c->gate_up;
    e.num_experts = physical(c);
    e.top_k = c->K;
    e.hidden = c->H;
    e.intermediate = c->I;
    CHECK(moe_ref_experts_f64(&e, rows, 0, 0) == 0, "memory");
    if (bound) texperts_bound(&e, c->dtype, rows_dtype(c), act_bound, row_bound);
    for (int64_t i = 0; i < offset[physical(c)] * H; ++i) 
        rows[i] = moe_ref_round_f64(rows[i], dtype ? rows_dtype(c) : 0);
    if (c->shared) {
        const moe_ref_layer_shared s = ref_shared(b, c);
        const int32_t all[2] = {0, (int32_t)n};
        e.row_slot = 0;
        e.expert_offset = all;
        e.w1 = s.w1;
        e.w2 = s.w2;
        e.bias1 = s.bias1;
        e.bias2 = s.bias2;
        e.activation = s.activation;
        e.alpha = e.limit = 0;
        e.gate_up = s.gate_up;
        e.num_experts = 1;
        e.intermediate = s.intermediate;
        CHECK(moe_ref_experts_f64(&e, shared, 0, 0) == 0, "memory");
        if (bound) texperts_bound(&e, c->dtype, rows_dtype(c), act_bound, shared_bound);
        for (int64_t i = 0; i < n * H; ++i)
            shared[i] = moe_ref_round_f64(shared[i], dtype ? rows_dtype(c) : 0);
    }
    memset(&combine, 0, sizeof combine);
    combine.shared = c->shared ? shared : (double*)0;
    combine.shared_weight = c->shared_weighted ? shared_weight : (float*)0;
    combine.rows = rows;
    combine.rows_dtype = MOE_REF_REAL;
    combine.place = place;
    combine.weights = weight;
    combine.residual = h_residual ? residual : (void*)0;
    combine.residual_dtype = c->dtype;
    combine.num_tokens = (int)n;
    combine.hidden = c->H;
    combine.top_k = c->K;
    moe_ref_combine_f64(&combine, y, size);
    if (bound) { /* of the rows, weighted; of fp32 sums; of what is stored */
        double* moved = (double*)test_host(n * H * 8);
        combine.rows = row_bound;
        combine.shared = c->shared ? shared_bound : (double*)0;
        combine.residual = 0;
        moe_ref_combine_f64(&combine, moved, bound);
        for (int64_t i = 0; i < n * H; ++i) {
            bound[i] += (c->K + 2) * ldexp(size[i] + bound[i], -23);
            bound[i] += tround(fabs(y[i]) + bound[i], c->dtype);
        }
        free(moved);
    }
    free(row_bound);
    free(shared_bound);
    free(act_bound);
    free(x);
    free(residual);
    free(id);
    free(row_slot);
    free(count);
    free(offset);
    free(place);
    free(weight);
    free(shared_weight);
    free(rows);
    free(shared);
}

/* The router's logits against their exact sums; a NaN token's are NaN. */
static void compare_logits(const layer_bufs* b, const layer_case* c, const float* logits)
{
    const int64_t T = c->T, E = c->E, H = c->H;
    const int32_t offset[2] = {0, c->T};
    double* exact = (double*)test_host(T * E * 8);
    double* sum = (double*)test_host(T * E * 8);
    float* got = (float*)test_host(T * E * 4);
    moe_ref_gemm_desc g;
    memset(&g, 0, sizeof g);
    g.a = b->h_x;
    g.a_stride = H + c->x_pad;
    g.expert_offset = offset;
    g.b.base = b->h_router;
    g.a_dtype = c->dtype;
    g.b_dtype = c->router_dtype;
    g.num_experts = 1;
    g.n = c->E;
    g.k = c->H;
    moe_ref_gemm_f64(&g, exact, sum);
    memcpy(got, logits, (size_t)(T * E) * 4);
    for (int64_t e = 0; e < E && c->nan_token; ++e) {
        const int64_t i = (c->nan_token - 1) * E + e;
        CHECK(got[i] != got[i], "the token's logits are NaN");
        got[i] = 0;
        exact[i] = sum[i] = 0;
    }
    CHECK_CLOSE_SUM("logits", got, E, exact, sum, c->H, T, E);
    free(exact);
    free(sum);
    free(got);
}

/* The whole layer in double, against what came out, for the tokens whose choice no rounding of the
   logits can change. bound and size [T, H]: of y from the device's own ids and weights. */
static void compare_whole(const layer_bufs* b, const layer_case* c, const int32_t* ids,
                          const float* y, const double* bound, const double* size)
{
    const int64_t T = c->T, E = c->E, K = c->K, H = c->H;
    double* exact = (double*)test_host(T * H * 8);
    double* ideal = (double*)test_host(T * H * 8);
    double* weights = (double*)test_host(T * K * 8);
    double* logits = (double*)test_host(T * E * 8);
    double* each = (double*)test_host(T * H * 8);
    float* got = (float*)test_host(T * H * 4);
    int32_t* want = (int32_t*)test_host(T * K * 4);
    int64_t clear = 0, wrong = 0;
    moe_ref_layer_desc d;
    memset(&d, 0, sizeof d);
    d.x = b->h_x;
    d.router = b->h_router;
    d.logits = c->from == FROM_LOGITS ? b->h_logits : (void*)0;
    d.residual = residual_of(b, c, &d.residual_stride);
    d.w1 = tweights_host(&b->mlp.w1);
    d.w2 = tweights_host(&b->mlp.w2);
    d.bias1 = c->bias ? b->mlp.h_bias1 : (void*)0;
    d.bias2 = c->bias ? b->mlp.h_bias2 : (void*)0;
    d.x_stride = H + c->x_pad;
    d.x_dtype = d.w_dtype = d.residual_dtype = d.bias_dtype = c->dtype;
    d.router_dtype = c->router_dtype;
    d.num_tokens = c->T;
    d.num_experts = c->E;
    d.top_k = c->K;
    d.hidden = c->H;
    d.intermediate = c->I;
    d.score = c->score;
    d.renormalize = c->renormalize;
    d.scale = c->scale;
    d.activation = c->activation;
    d.alpha = c->alpha;
    d.limit = c->limit;
    d.gate_up = c->gate_up;
    if (c->shared) d.shared = ref_shared(b, c);
    d.route.row_multiple = c->row_multiple;
    d.route.num_replicas = c->replicas;
    d.route.absent_replicas = c->absent;
    if (c->replicas) {
        d.route.replica_offset = b->h_replica_offset;
        d.route.replica_expert = b->h_replica_expert;
    }
    CHECK(moe_ref_layer_f64(&d, exact, want, weights) == 0, "memory");
    d.act_dtype = c->dtype;
    d.rows_dtype = rows_dtype(c);
    CHECK(moe_ref_layer_f64(&d, ideal, 0, 0) == 0, "memory");
    if (c->from == FROM_LOGITS) {
        for (int64_t i = 0; i < T * E; ++i) logits[i] = ((const float*)b->h_logits)[i];
    } else {
        moe_ref_router_desc r;
        memset(&r, 0, sizeof r);
        r.x = b->h_x;
        r.w = b->h_router;
        r.x_stride = d.x_stride;
        r.x_dtype = c->dtype;
        r.w_dtype = c->router_dtype;
        r.num_tokens = c->T;
        r.num_experts = c->E;
        r.hidden = c->H;
        moe_ref_router_f64(&r, logits);
    }
    for (int64_t t = 0; t < T; ++t) {
        const double* l = logits + t * E;
        double closest = 1; /* of a chosen logit to any other */
        for (int64_t k = 0; k < K; ++k)
            for (int64_t e = 0; e < E; ++e)
                if (e != want[t * K + k] && fabs(l[want[t * K + k]] - l[e]) < closest)
                    closest = fabs(l[want[t * K + k]] - l[e]);
        if (closest < 1e-4) continue;
        wrong += memcmp(want + t * K, ids + t * K, (size_t)K * 4) != 0;
        memmove(exact + clear * H, exact + t * H, (size_t)H * 8);
        for (int64_t h = 0; h < H; ++h) {
            ideal[clear * H + h] = test_rounded(ideal[t * H + h], c->dtype);
            got[clear * H + h] = y[t * H + h];
            each[clear * H + h] = bound[t * H + h] + ldexp(size[t * H + h], -11); /* the weights' */
        }
        ++clear;
    }
    CHECK(wrong == 0, "%lld tokens go to other experts", (long long)wrong);
    CHECK(2 * clear >= T, "%lld of %lld tokens are clear", (long long)clear, (long long)T);
    CHECK_CLOSE("y of the whole layer", got, MOE_FP32, H, exact, ideal, clear, H);
    test_within("y of the whole layer", got, MOE_FP32, H, exact, each, 1, clear, H, __FILE__,
                __LINE__);
    free(each);
    free(exact);
    free(ideal);
    free(weights);
    free(logits);
    free(got);
    free(want);
}

/* Station after station, each on what the device's station before it gave. */
static void compare(const layer_bufs* b, const layer_case* c)
{
    const int before = test_now.failures;
    const int64_t T = c->T, E = c->E, K = c->K, H = c->H, slots = T * K;
    const int64_t y_stride = b->d.y_stride ? b->d.y_stride : H, step = c->sampled ? c->sampled : 1;
    const tbuf* y_buf = c->y_is_x ? &b->x : &b->y;
    void* copy = tbuf_copy(&b->workspace);
    uint16_t* y = (uint16_t*)tbuf_copy(y_buf);
    float *y_all = (float*)test_host(T * H * 4), *got = (float*)test_host(T * H * 4);
    int32_t *pick = (int32_t*)test_host(T * 4), *went = (int32_t*)test_host(slots * 4);
    const int32_t* ids = b->h_ids;
    const float* weights = b->h_weights;
    int64_t n = 0, bad = -1, gaps, residual_stride;
    const void* residual = residual_of(b, c, &residual_stride);
    moe_layer_view v;
    CHECK_STATUS(moe_layer_get_view(&b->d, &v), MOE_OK);
    for (int64_t t = 0; t < T; ++t) {
        for (int64_t h = 0; h < H; ++h) y_all[t * H + h] = moe_load(y, t * y_stride + h, c->dtype);
        if (t % step == 0) pick[n++] = (int32_t)t;
    }
    gaps = test_strays(y, (int64_t)y_buf->bytes, 2, y_stride, H, 0, T);
    CHECK(gaps == 0, "%lld bytes between the rows of y were written", (long long)gaps);

    if (c->from == FROM_ROUTER) {
        const float* logits = (const float*)piece(b, copy, v.logits);
        if (!c->sampled) compare_logits(b, c, logits);
    } else {
        CHECK(v.logits == b->d.logits, "the caller's own logits");
    }
    if (c->from != FROM_IDS) { /* the gate, on the logits that the device has */
        double* want = (double*)test_host(slots * 8);
        int32_t* want_ids = (int32_t*)test_host(slots * 4);
        moe_ref_gate_desc g;
        memset(&g, 0, sizeof g);
        g.logits = c->from == FROM_ROUTER ? piece(b, copy, v.logits) : b->h_logits;
        g.logits_dtype = MOE_FP32;
        g.num_tokens = c->T;
        g.num_experts = c->E;
        g.top_k = c->K;
        g.score = c->score;
        g.renormalize = c->renormalize;
        g.scale = c->scale;
        ids = (const int32_t*)piece(b, copy, v.ids);
        weights = (const float*)piece(b, copy, v.weights);
        if (!c->rules) {
            moe_ref_gate_f64(&g, want_ids, want, 0, 0);
            CHECK_INTS("ids", ids, want_ids, slots);
            CHECK_CLOSE_RELATIVE("weights", weights, MOE_FP32, K, want, 4e-6, T, K);
        }
        free(want);
        free(want_ids);
    } else {
        CHECK(v.ids == b->d.ids && v.weights == b->d.weights, "the caller's own choice");
    }
    { /* the route, exactly */
        const int64_t P = physical(c), R = rows_of(c);
        int32_t* count = (int32_t*)test_host(P * 4);
        int32_t* drops = (int32_t*)test_host(P * 4);
        int32_t* offset = (int32_t*)test_host(P * 4 + 4);
        int32_t* row_slot = (int32_t*)test_host(R * 4);
        int32_t* slot_row = (int32_t*)test_host(slots * 4);
        float* row_weight = (float*)test_host(R * 4);
        moe_place* place = (moe_place*)test_host(slots * 8);
        moe_ref_route_desc r;
        memset(&r, 0, sizeof r);
        r.ids = ids;
        r.weights = weights;
        r.expert_count = count;
        r.expert_offset = offset;
        r.drop_count = drops;
        r.slot_row = slot_row;
        r.row_slot = row_slot;
        r.row_weight = row_weight;
        r.place = place;
        r.num_tokens = c->T;
        r.num_experts = c->E;
        r.top_k = c->K;
        r.row_multiple = c->row_multiple;
        r.capacity = c->capacity;
        r.drop_rule = c->drop_rule;
        r.num_replicas = c->replicas;
        r.absent_replicas = c->absent;
        r.max_rows = R;
        if (c->replicas) {
            r.replica_offset = b->h_replica_offset;
            r.replica_expert = b->h_replica_expert;
        }
        bad = moe_ref_route(&r);
        CHECK(bad != -2 && v.num_rows == R && v.num_physical == P, "%lld rows, not %lld",
              (long long)v.num_rows, (long long)R);
        CHECK_INTS("expert_count", (const int32_t*)piece(b, copy, v.expert_count), count, P);
        CHECK_INTS("expert_offset", (const int32_t*)piece(b, copy, v.expert_offset), offset, P + 1);
        CHECK_INTS("row_slot", (const int32_t*)piece(b, copy, v.row_slot), row_slot, R);
        CHECK_INTS("place", (const int32_t*)piece(b, copy, v.place), (const int32_t*)place, slots * 2);
        if (c->outputs) {
            CHECK(tbuf_holds(&b->drop_count, drops) && tbuf_holds(&b->slot_row, slot_row) &&
                      tbuf_holds(&b->row_weight, row_weight),
                  "an optional output of route");
            memset(count, 0, (size_t)P * 4);
            for (int64_t k = 0; k < slots; ++k)
                if (ids[k] >= 0 && ids[k] < E) ++count[ids[k]];
            if (c->from != FROM_IDS)
                CHECK(tbuf_holds(&b->gate_count, count), "the gate's expert_count");
        } else {
            CHECK(tbuf_holds(&b->drop_count, 0) && tbuf_holds(&b->slot_row, 0) &&
                      tbuf_holds(&b->row_weight, 0) && tbuf_holds(&b->gate_count, 0),
                  "outputs nobody asked for");
        }
        for (int64_t k = 0; k < slots; ++k) { /* the physical expert that the slot's row belongs to */
            int e = 0;
            while (slot_row[k] >= 0 && offset[e + 1] <= slot_row[k]) ++e;
            went[k] = slot_row[k] < 0 ? -1 : e;
        }
        free(count);
        free(drops);
        free(offset);
        free(row_slot);
        free(slot_row);
        free(row_weight);
        free(place);
    }
    if (T > 0) { /* combine, on the device's own rows: its sums and one rounding */
        double* exact = (double*)test_host(T * H * 8);
        double* bound = (double*)test_host(T * H * 8);
        moe_ref_combine_desc d;
        memset(&d, 0, sizeof d);
        d.rows = piece(b, copy, v.rows);
        d.rows_dtype = rows_dtype(c);
        d.place = (const moe_place*)piece(b, copy, v.place);
        d.weights = weights;
        d.residual = residual;
        d.residual_stride = residual_stride;
        d.residual_dtype = c->dtype;
        d.shared = c->shared ? piece(b, copy, v.shared_rows) : (const void*)0;
        d.shared_weight = c->shared_weighted ? b->h_shared_weight : (float*)0;
        d.num_tokens = c->T;
        d.hidden = c->H;
        d.top_k = c->K;
        moe_ref_combine_f64(&d, exact, bound);
        for (int64_t i = 0; i < T * H; ++i) {
            bound[i] = (double)(K + 2) * ldexp(bound[i], -23);
            bound[i] += tround(fabs(exact[i]) + bound[i], c->dtype);
        }
        test_within("y from rows", y_all, MOE_FP32, H, exact, bound, 1, T, H, __FILE__, __LINE__);
        free(exact);
        free(bound);
    }
    if (T > 0) {
        double* exact = (double*)test_host(n * H * 8);
        double* ideal = (double*)test_host(n * H * 8);
        double* bound = (double*)test_host(n * H * 8);
        double* size = (double*)test_host(n * H * 8);
        int64_t wrong = 0;
        ref_y(b, c, went, weights, pick, n, 0, exact, bound, size);
        ref_y(b, c, went, weights, pick, n, c->dtype, ideal, 0, 0);
        for (int64_t i = 0; i < n; ++i) {
            int live = c->shared;
            for (int64_t k = 0; k < K; ++k) live |= went[pick[i] * K + k] >= 0;
            for (int64_t h = 0; h < H; ++h) {
                got[i * H + h] = y_all[pick[i] * H + h];
                ideal[i * H + h] = test_rounded(ideal[i * H + h], c->dtype);
                if (live) continue; /* the residual as it is, or 0 */
                wrong += got[i * H + h] != (residual ? moe_load(residual, pick[i] * residual_stride + h,
                                                                c->dtype)
                                                     : 0);
            }
        }
        CHECK(wrong == 0, "a token with no expert is its residual, or 0");
        CHECK_CLOSE("y", got, MOE_FP32, H, exact, ideal, n, H);
        test_within("y", got, MOE_FP32, H, exact, bound, 1, n, H, __FILE__, __LINE__);
        free(exact);
        free(ideal);
        if (c->from != FROM_IDS && !c->nan_token && !c->sampled && !c->capacity && !c->rules)
            compare_whole(b, c, ids, y_all, bound, size);
        free(bound);
        free(size);
    }
    if (c->nan_token && c->from != FROM_IDS) CHECK_FAULT(&b->fault, MOE_FAULT_NAN_LOGIT, c->nan_token - 1);
    else CHECK_FAULT(&b->fault, bad < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_ID, bad < 0 ? 0 : bad);
    CHECK((c->y_is_x || tbuf_holds(&b->x, b->h_x)) && tbuf_holds(&b->router, b->h_router) &&
              tbuf_holds(&b->logits, b->h_logits) && tbuf_holds(&b->ids, b->h_ids) &&
              tbuf_holds(&b->weights, b->h_weights) && tmlp_same(&b->mlp) &&
              tbuf_holds(&b->residual, b->h_residual) && tmlp_same(&b->shared) &&
              tbuf_holds(&b->shared_weight, b->h_shared_weight) &&
              tbuf_holds(&b->replica_offset, b->h_replica_offset) &&
              tbuf_holds(&b->replica_expert, b->h_replica_expert),
          "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    free(copy);
    free(y);
    free(y_all);
    free(got);
    free(pick);
    free(went);
}

/* Are y and the workspace as `reset` left them? */
static int untouched(const layer_bufs* b, const layer_case* c)
{
    const int y = c->y_is_x                      ? tbuf_holds(&b->x, b->h_x)
                  : c->residual == RESIDUAL_IS_Y ? tbuf_holds(&b->y, b->h_residual)
                                                 : tbuf_holds(&b->y, 0);
    return y && tbuf_holds(&b->workspace, 0);
}

/* Where this binary has no code for the case, the layer must be refused as documented. */
static void run_case(const layer_case* c, trand* r)
{
    const moe_status want = test_gemm_status(c->dtype, c->tile);
    layer_bufs b;
    bufs_new(&b, c, r);
    if (CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), want)) {
        if (want == MOE_OK) compare(&b, c);
        else CHECK(untouched(&b, c), "%s: refused, but an output was written", case_text(c));
    }
    bufs_free(&b);
}

/* Every score, renormalised or not, scaled or not, through the router and from given logits. */
static void test_layer_gates(void)
{
    trand r = trand_new(1);
    for (int score = 0; score <= MOE_SCORE_SIGMOID; ++score)
        for (int i = 0; i < 8; ++i) {
            layer_case c = normal_case(37, 64, 40, 7, 3);
            c.score = score;
            c.renormalize = i & 1;
            c.scale = i & 2 ? 2.5f : 0;
            c.from = i & 4 ? FROM_LOGITS : FROM_ROUTER;
            c.dtype = c.router_dtype = trand_int(&r, 0, 1) ? MOE_FP16 : MOE_BF16;
            run_case(&c, &r);
        }
}

/* Every activation of the experts, and of a shared expert beside them. */
static void test_layer_activations(void)
{
    trand r = trand_new(19);
    for (int kind = MOE_ACTIVATION_NONE; kind <= MOE_ACTIVATION_RELU2; ++kind)
        for (int i = 0; i < 2; ++i) {
            layer_case c = normal_case(25, 64, 40, 6, 2);
            c.activation = kind;
            c.gate_up = (int)trand_int(&r, MOE_GATE_UP_CONCATENATED, MOE_GATE_UP_SEPARATE);
            c.bias = i;
            c.from = (int)trand_int(&r, FROM_ROUTER, FROM_IDS);
            if (kind == MOE_ACTIVATION_SWIGLU_CLAMPED && i) c.alpha = 1.25f, c.limit = 0.5f;
            if (i) {
                c.shared = 32;
                c.shared_activation = (int)trand_int(&r, 0, MOE_ACTIVATION_RELU2);
                c.shared_gate_up = (int)trand_int(&r, 0, MOE_GATE_UP_SEPARATE);
            }
            run_case(&c, &r);
        }
}

/* A shared expert of every form, weighted or not, with every residual and y over x. */
static void test_layer_shared(void)
{
    trand r = trand_new(20);
    for (int weighted = 0; weighted < 2; ++weighted)
        for (int residual = NO_RESIDUAL; residual <= RESIDUAL_IS_X; ++residual)
            for (int i = 0; i < 3; ++i) {
                layer_case c = normal_case(33, 72, 40, 5, 2);
                c.from = i;
                c.residual = residual;
                c.y_is_x = i == 1;
                c.shared = 8 * (int)trand_int(&r, 1, 12);
                c.shared_weighted = weighted;
                c.shared_gate_up = i + 1;
                c.shared_bias = (int)trand_int(&r, 0, 1);
                c.dtype = c.router_dtype = i == 2 ? MOE_FP16 : MOE_BF16;
                c.x_pad = residual == RESIDUAL ? 8 : 0;
                c.unused = i == 2 ? 60 : 0; /* some tokens have the shared expert alone */
                run_case(&c, &r);
            }
}

/* fp32 rows between the experts and combine, with both dtypes and the shared expert. */
static void test_layer_rows_dtype(void)
{
    trand r = trand_new(23);
    for (int i = 0; i < 8; ++i) {
        layer_case c = normal_case(29, 72, 40, 5, 2);
        c.from = i % 3;
        c.dtype = c.router_dtype = i & 1 ? MOE_FP16 : MOE_BF16;
        c.rows_dtype = i < 6 ? MOE_FP32 : c.dtype; /* dtype may be said aloud */
        c.shared = i & 2 ? 24 : 0;
        c.shared_weighted = i & 1;
        c.residual = (int)trand_int(&r, NO_RESIDUAL, RESIDUAL);
        c.row_multiple = i & 4 ? 16 : 0;
        run_case(&c, &r);
    }
    for (int wide = 0; wide < 2; ++wide) { /* rows past what fp16 holds, that their weight makes fit */
        layer_case c = normal_case(5, 16, 8, 1, 1);
        layer_bufs b;
        char* y;
        c.dtype = c.router_dtype = MOE_FP16;
        c.from = FROM_IDS;
        c.bias = 1;
        c.rows_dtype = wide ? MOE_FP32 : 0;
        bufs_new(&b, &c, &r);
        for (int i = 0; i < c.H * c.I; ++i) moe_store(b.mlp.w2.host[0][0], i, c.dtype, 18.0f);
        tbuf_put(&b.mlp.w2.part[0][0], b.mlp.w2.host[0][0]);
        memset(b.mlp.h_bias2, 0, b.mlp.bias2.bytes);
        tbuf_put(&b.mlp.bias2, b.mlp.h_bias2);
        memset(b.h_x, 0, b.x.bytes);
        tbuf_put(&b.x, b.h_x);
        for (int i = 0; i < 2 * c.I; ++i) /* act is 1250 = 50 * 25 */
            moe_store(b.mlp.h_bias1, i, c.dtype, i < c.I ? 50.0f : 25.0f);
        tbuf_put(&b.mlp.bias1, b.mlp.h_bias1);
        for (int t = 0; t < c.T; ++t) b.h_ids[t] = 0, b.h_weights[t] = 0.03f;
        tbuf_put(&b.ids, b.h_ids);
        tbuf_put(&b.weights, b.h_weights);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        y = (char*)tbuf_copy(&b.y);
        for (int i = 0; i < c.T * c.H; ++i) {
            const float got = moe_load(y, i, c.dtype); /* rows of 8 * 18 * 1250 = 1.8e5 */
            CHECK(wide ? got >= 5396 && got <= 5404 : isinf(got), "y is %g", (double)got);
        }
        free(y);
        bufs_free(&b);
    }
}

/* Route's options: padding, capacity by position and by weight, replicas, each and together, with
   all optional outputs of both stations. */
static void test_layer_route_options(void)
{
    trand r = trand_new(21);
    for (int i = 0; i < 24; ++i) {
        layer_case c = normal_case(47, 64, 40, 6, i % 5 == 4 ? 3 : 2);
        c.from = i % 3;
        c.row_multiple = i & 1 ? (int)trand_int(&r, 2, 70) : 0;
        c.capacity = i & 2 ? (int)trand_int(&r, 1, 20) : 0;
        c.drop_rule = c.capacity ? (int)trand_int(&r, 0, MOE_DROP_BY_WEIGHT) : 0;
        c.replicas = i & 4 ? 6 + (int)trand_int(&r, 0, 5) : 0;
        c.absent = c.replicas ? i >> 3 & 1 : 0;
        c.outputs = i & 8 ? 1 : 0;
        c.bias = (int)trand_int(&r, 0, 1); /* rows of padding are not zero then */
        c.residual = (int)trand_int(&r, NO_RESIDUAL, RESIDUAL);
        c.shared = i % 7 == 0 ? 24 : 0;
        c.unused = 10;
        run_case(&c, &r);
    }
}

/* A workspace of the size that the descriptor has come to want. */
static void fit_workspace(layer_bufs* b, const layer_case* c)
{
    size_t bytes = 0;
    tbuf_free(&b->workspace);
    CHECK_STATUS(moe_layer_workspace(&b->d, &bytes), MOE_OK);
    CHECK(bytes == documented_bytes(c, &b->d), "%zu bytes, not %zu", bytes,
          documented_bytes(c, &b->d));
    b->workspace = tbuf_new("workspace", bytes, 0);
    b->d.workspace = b->workspace.p;
    b->d.workspace_bytes = bytes;
}

/* The gate's rules reach the gate: the choice is what moe_gate gives for the same logits with the
   same options, bit for bit, and the rest of the layer follows it. */
static void test_layer_gate_rules(void)
{
    enum { T = 39, E = 8, K = 2, RULES = 12 };
    trand r = trand_new(22);
    for (int rule = 0; rule < RULES; ++rule)
        for (int from = FROM_ROUTER; from <= FROM_LOGITS; ++from) {
            layer_case c = normal_case(T, 64, 40, E, K);
            layer_bufs b;
            moe_layer_view v;
            moe_gate_desc g;
            float bias[E];
            uint8_t expert_disabled[E] = {0, 1, 0, 0, 0, 0, 1, 0}, token_disabled[T];
            tbuf b_bias, b_expert, b_token, b_prob = tbuf_new("prob_sum", E * 4, 4);
            tbuf ids = tbuf_new("ids", T * K * 4, 0), weights = tbuf_new("weights", T * K * 4, 0);
            tbuf prob = tbuf_new("prob_sum", E * 4, 4), space;
            size_t bytes = 0;
            c.rules = c.outputs = 1;
            c.from = from;
            c.replicas = rule % 4 == 3 ? E + 2 : 0;
            for (int e = 0; e < E; ++e) bias[e] = trand_normal(&r) * 0.2f;
            for (int t = 0; t < T; ++t) token_disabled[t] = trand_int(&r, 0, 3) == 0;
            b_bias = tbuf_from("expert_bias", bias, sizeof bias, 4);
            b_expert = tbuf_from("expert_disabled", expert_disabled, sizeof expert_disabled, 1);
            b_token = tbuf_from("token_disabled", token_disabled, sizeof token_disabled, 1);
            bufs_new(&b, &c, &r);
            memset(&g, 0, sizeof g);
            g.expert_count = b.d.gate.expert_count;
            switch (rule) {
            case 0: g.score = MOE_SCORE_SPARSEMAX; break;
            case 1: g.score = MOE_SCORE_QUADRATIC, g.renormalize = 1; break;
            case 2: g.score = MOE_SCORE_PIONEER; break;
            case 3: g.score = MOE_SCORE_SIGMOID, g.threshold = 0.6f; break;
            case 4: g.score = MOE_SCORE_SIGMOID, g.expert_bias = (const float*)b_bias.p; break;
            case 5: g.num_groups = 4, g.top_groups = 1; break;
            case 6: g.temperature = 0.5f; break;
            case 7: g.noise = 1, g.seed = 12345; break;
            case 8: g.dropout = 0.4f, g.seed = 99; break;
            case 9: g.expert_disabled = (const uint8_t*)b_expert.p; break;
            case 10: g.token_disabled = (const uint8_t*)b_token.p; break;
            default: g.whole_batch = 1;
            }
            g.prob_sum = rule & 1 ? (float*)b_prob.p : (float*)0;
            b.d.gate = g;
            fit_workspace(&b, &c);
            CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
            compare(&b, &c);
            CHECK_STATUS(moe_layer_get_view(&b.d, &v), MOE_OK);
            g.logits = v.logits;
            g.ids = (int32_t*)ids.p;
            g.weights = (float*)weights.p;
            g.expert_count = 0;
            if (g.prob_sum) g.prob_sum = (float*)prob.p;
            g.num_tokens = T;
            g.num_experts = E;
            g.top_k = K;
            CHECK_STATUS(moe_gate_workspace(&g, &bytes), MOE_OK);
            space = tbuf_new("workspace", bytes, 0);
            g.workspace = space.p;
            g.workspace_bytes = bytes;
            CHECK_STATUS(moe_gate(&g, test_now.stream), MOE_OK);
            {
                void *want_ids = tbuf_copy(&ids), *want_weights = tbuf_copy(&weights);
                void *copy = tbuf_copy(&b.workspace), *want_prob = tbuf_copy(&prob);
                moe_ref_gate_desc plain; /* the rule is seen in what comes out */
                int32_t other[T * K];
                double other_weights[T * K], most = 0;
                CHECK(memcmp(piece(&b, copy, v.ids), want_ids, T * K * 4) == 0 &&
                          memcmp(piece(&b, copy, v.weights), want_weights, T * K * 4) == 0 &&
                          tbuf_holds(&b_prob, want_prob),
                      "rule %d has not reached the gate", rule);
                memset(&plain, 0, sizeof plain);
                plain.logits = from == FROM_ROUTER ? piece(&b, copy, v.logits) : b.h_logits;
                plain.logits_dtype = MOE_FP32;
                plain.num_tokens = T;
                plain.num_experts = E;
                plain.top_k = K;
                moe_ref_gate_f64(&plain, other, other_weights, 0, 0);
                for (int k = 0; k < T * K; ++k)
                    if (fabs(other_weights[k] - ((float*)want_weights)[k]) > most)
                        most = fabs(other_weights[k] - ((float*)want_weights)[k]);
                CHECK(most > 1e-3 || memcmp(other, want_ids, sizeof other) != 0,
                      "rule %d changes nothing", rule);
                free(want_ids);
                free(want_weights);
                free(want_prob);
                free(copy);
            }
            tbuf_free(&b_bias);
            tbuf_free(&b_expert);
            tbuf_free(&b_token);
            tbuf_free(&b_prob);
            tbuf_free(&ids);
            tbuf_free(&weights);
            tbuf_free(&prob);
            tbuf_free(&space);
            bufs_free(&b);
        }
}

/* Where the choice comes from, with all forms of weights, and both dtypes. */
static void test_layer_entries(void)
{
    trand r = trand_new(2);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from)
        for (int gate_up = MOE_GATE_UP_CONCATENATED; gate_up <= MOE_GATE_UP_SEPARATE; ++gate_up)
            for (int i = 0; i < 4; ++i) {
                layer_case c = normal_case(33, 72, 56, 8, 2);
                c.from = from;
                c.gate_up = gate_up;
                c.dtype = i & 1 ? MOE_FP16 : MOE_BF16;
                c.router_dtype = i == 3 ? MOE_FP32 : c.dtype;
                c.bias = i >> 1;
                c.table = (i + gate_up) & 1;
                c.major = i == 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
                c.tile = i ? MOE_TILE_32x128 : MOE_TILE_AUTO;
                run_case(&c, &r);
            }
}

static void test_layer_shapes(void)
{
    static const int shapes[][5] = {{1, 64, 40, 4, 2},  {2, 8, 8, 1, 1},   {3, 24, 16, 5, 5},
                                    {31, 40, 72, 64, 2}, {65, 64, 32, 3, 1}, {33, 136, 24, 6, 6},
                                    {97, 16, 24, 2, 1}};
    trand r = trand_new(3);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; ++i)
        for (int j = 0; j < (MOE_ON_HOST ? 2 : 8); ++j) {
            const int* s = shapes[i];
            layer_case c = normal_case(s[0], s[1], s[2], s[3], s[4]);
            c.from = j == 0 ? FROM_ROUTER : (int)trand_int(&r, FROM_ROUTER, FROM_IDS);
            c.bias = (int)trand_int(&r, 0, 1);
            c.gate_up = (int)trand_int(&r, MOE_GATE_UP_CONCATENATED, MOE_GATE_UP_SEPARATE);
            c.residual = (int)trand_int(&r, NO_RESIDUAL, RESIDUAL_IS_X);
            c.score = (int)trand_int(&r, MOE_SCORE_SOFTMAX, MOE_SCORE_SIGMOID);
            c.x_pad = 8 * (int)trand_int(&r, 0, 2);
            c.y_pad = trand_int(&r, 0, 1) ? 0 : (int)trand_int(&r, 1, 9);
            c.residual_pad = trand_int(&r, 0, 1) ? 0 : (int)trand_int(&r, 1, 9);
            run_case(&c, &r);
        }
}

/* Given ids: some unused, some twice in a token, some out of range, more of them than experts. */
static void test_layer_ids(void)
{
    trand r = trand_new(4);
    for (int i = 0; i < 8; ++i) {
        layer_case c = normal_case(50, 40, 32, i & 1 ? 3 : 9, i & 1 ? 5 : 3);
        c.from = FROM_IDS;
        c.unused = i & 2 ? 40 : 0;
        c.bad = i & 4 ? 20 : 0;
        c.residual = i % 3 ? RESIDUAL : NO_RESIDUAL;
        c.bias = i & 1;
        run_case(&c, &r);
    }
    for (int residual = NO_RESIDUAL; residual <= RESIDUAL; ++residual) { /* nobody goes anywhere */
        layer_case c = normal_case(20, 40, 32, 4, 2);
        layer_bufs b;
        void* want;
        c.from = FROM_IDS;
        c.unused = 100;
        c.residual = residual;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        want = calloc(1, b.y.bytes);
        CHECK(tbuf_holds(&b.y, residual ? b.h_residual : want), "y");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        free(want);
        bufs_free(&b);
    }
}

/* y in a place of its own, over x, over the residual, over both; strides of all of them. */
static void test_layer_residual(void)
{
    trand r = trand_new(5);
    for (int residual = NO_RESIDUAL; residual <= RESIDUAL_IS_X; ++residual)
        for (int y_is_x = 0; y_is_x < 2; ++y_is_x)
            for (int pads = 0; pads < 2; ++pads) {
                layer_case c = normal_case(35, 48, 40, 5, 2);
                c.residual = residual;
                c.y_is_x = y_is_x;
                c.x_pad = pads ? 16 : 0;
                c.y_pad = pads ? 5 : 0;
                c.residual_pad = pads ? 3 : 0;
                run_case(&c, &r);
            }
}

/* A NaN in one token: it goes nowhere, the fault word names it, and no other row changes. */
static void test_layer_nan(void)
{
    trand r = trand_new(6);
    for (int from = FROM_ROUTER; from <= FROM_LOGITS; ++from)
        for (int residual = NO_RESIDUAL; residual <= RESIDUAL; ++residual)
            for (int dtype = MOE_FP16; dtype <= MOE_BF16; ++dtype) {
                layer_case c = normal_case(41, 64, 40, 8, 2);
                c.from = from;
                c.residual = residual;
                c.dtype = c.router_dtype = dtype;
                c.nan_token = 1 + (int)trand_int(&r, 0, 40);
                run_case(&c, &r);
            }
    { /* the other rows have the bits that they have without it, where the token goes nowhere */
        layer_case c = normal_case(41, 64, 40, 8, 2);
        layer_bufs b;
        uint16_t *with, *without;
        c.from = FROM_IDS;
        bufs_new(&b, &c, &r);
        b.h_ids[2 * 17] = b.h_ids[2 * 17 + 1] = -1;
        tbuf_put(&b.ids, b.h_ids);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        without = (uint16_t*)tbuf_copy(&b.y);
        moe_store(b.h_x, 17 * c.H + 3, c.dtype, NAN);
        b.h_ids[2 * 20] = b.h_ids[2 * 20 + 1] = 3; /* and one NaN token that does go somewhere */
        tbuf_put(&b.ids, b.h_ids);
        moe_store(b.h_x, 20 * c.H + 3, c.dtype, NAN);
        tbuf_put(&b.x, b.h_x);
        reset(&b, &c);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        with = (uint16_t*)tbuf_copy(&b.y);
        for (int t = 0; t < c.T; ++t)
            if (t != 20)
                CHECK(memcmp(with + t * c.H, without + t * c.H, (size_t)c.H * 2) == 0,
                      "token %d changed", t);
        CHECK(with[20 * c.H] != without[20 * c.H], "the token with a NaN has one");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        free(with);
        free(without);
        bufs_free(&b);
    }
}

/* An earlier kernel's stop fault: no station does anything. */
static void test_layer_stopped(void)
{
    trand r = trand_new(7);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        const uint64_t stop = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 5);
        layer_case c = normal_case(20, 64, 40, 4, 2);
        layer_bufs b;
        c.from = from;
        c.shared = 40;
        bufs_new(&b, &c, &r);
        tbuf_put(&b.fault, &stop);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.workspace, 0), "after a stop fault");
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 5);
        bufs_free(&b);
    }
}

static void test_layer_no_tokens(void)
{
    trand r = trand_new(8);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        layer_case c = normal_case(0, 64, 40, 4, 2);
        c.from = from;
        c.shared = from == FROM_LOGITS ? 40 : 0;
        run_case(&c, &r);
    }
    { /* and nothing but a workspace is needed */
        size_t bytes;
        moe_layer_desc d;
        tbuf w;
        memset(&d, 0, sizeof d);
        d.hidden = d.intermediate = 8;
        d.num_experts = d.top_k = 1;
        d.dtype = test_half();
        CHECK_STATUS(moe_layer_workspace(&d, &bytes), MOE_OK);
        w = tbuf_new("workspace", bytes, 0);
        d.workspace = w.p;
        d.workspace_bytes = bytes;
        CHECK_STATUS(moe_layer_forward(&d, test_now.stream), MOE_OK);
        tbuf_free(&w);
    }
}

/* The size is the documented one for any shape, and the pieces lie in it one behind another. */
static void test_layer_workspace(void)
{
    trand r = trand_new(9);
    for (int i = 0; i < 200; ++i) {
        layer_case c = normal_case((int)trand_int(&r, 0, 300), 8 * (int)trand_int(&r, 1, 40),
                                   8 * (int)trand_int(&r, 1, 40), (int)trand_int(&r, 1, 300), 1);
        moe_layer_desc d;
        moe_layer_view v;
        size_t bytes = 0;
        c.K = (int)trand_int(&r, 1, c.E < 9 ? c.E : 9);
        c.from = i % 3;
        memset(&d, 0, sizeof d);
        d.num_tokens = c.T;
        d.hidden = c.H;
        d.intermediate = c.I;
        d.num_experts = c.E;
        d.top_k = c.K;
        if (c.from == FROM_LOGITS) d.logits = (const float*)256;
        if (c.from == FROM_IDS) d.ids = (const int32_t*)256, d.weights = (const float*)512;
        CHECK_STATUS(moe_layer_workspace(&d, &bytes), MOE_OK);
        CHECK(bytes == documented_bytes(&c, &d), "%zu bytes, not %zu", bytes,
              documented_bytes(&c, &d));
        d.workspace = (void*)((uintptr_t)1 << 40);
        CHECK_STATUS(moe_layer_get_view(&d, &v), MOE_OK);
        {
            const char* at[] = {(char*)(c.from == FROM_IDS ? v.route_workspace : v.chunk_count),
                                (char*)v.expert_count, (char*)v.expert_offset, (char*)v.row_slot,
                                (char*)v.place, (char*)v.act, (char*)v.rows,
                                (char*)d.workspace + bytes};
            const size_t slots = (size_t)c.T * (size_t)c.K, E = (size_t)c.E;
            const size_t size[] = {E * (size_t)moe_num_chunks(c.T) * 4, E * 4, E * 4 + 4, slots * 4,
                                   slots * 8, slots * (size_t)c.I * 2, slots * (size_t)c.H * 2};
            for (int k = 0; k < 7; ++k)
                CHECK((uintptr_t)at[k] % 256 == 0 && at[k] + size[k] <= at[k + 1], "piece %d", k);
            CHECK(c.from == FROM_IDS || ((char*)v.ids + slots * 4 <= (char*)v.weights &&
                                         (char*)v.weights + slots * 4 <= at[0]),
                  "ids and weights");
            CHECK(c.from != FROM_ROUTER || v.logits == d.workspace, "logits come first");
        }
    }
    {
        layer_case c = normal_case(20, 64, 40, 4, 2);
        layer_bufs b;
        size_t bytes;
        moe_layer_view v;
        moe_layer_desc d;
        bufs_new(&b, &c, &r);
        d = b.d;
        d.workspace_bytes -= 1;
        CHECK_STATUS(moe_layer_forward(&d, test_now.stream),
                     MOE_STATUS(MOE_ERR_WORKSPACE, workspace_bytes));
        d.workspace = 0;
        CHECK_STATUS(moe_layer_get_view(&d, &v), MOE_STATUS(MOE_ERR_NULL, workspace));
        CHECK_STATUS(moe_layer_get_view(0, &v), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_get_view(&b.d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_workspace(0, &bytes), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_workspace(&b.d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK(tbuf_holds(&b.y, 0), "a refused call wrote y");
        bufs_free(&b);
    }
}

static moe_status call_layer(void* d, cudaStream_t stream)
{
    return moe_layer_forward((const moe_layer_desc*)d, stream);
}

static moe_status call_stages(void* d, cudaStream_t stream)
{
    moe_layer_prepared p;
    MOE_TRY(moe_layer_prepare((const moe_layer_desc*)d, &p));
    for (int stage = 0; stage < MOE_LAYER_STAGES; ++stage)
        MOE_TRY(moe_layer_run_stage(&p, stage, stream));
    return MOE_OK;
}

/* All stages in order are the layer, bit for bit, workspace included; a stage does its own part
   and no other. */
static void test_layer_stages(void)
{
    trand r = trand_new(10);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        layer_case c = normal_case(40, 64, 40, 8, 2);
        layer_bufs b;
        moe_layer_prepared p;
        void *y, *workspace;
        c.from = from;
        c.residual = RESIDUAL;
        c.shared = from == FROM_LOGITS ? 0 : 48;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        y = tbuf_copy(&b.y);
        workspace = tbuf_copy(&b.workspace);
        reset(&b, &c);
        CHECK_STATUS(call_stages(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.y, y) && tbuf_holds(&b.workspace, workspace), "from %d", from);
        compare(&b, &c);
        reset(&b, &c);
        CHECK_STATUS(moe_layer_prepare(&b.d, &p), MOE_OK);
        for (int stage = 0; stage < MOE_LAYER_STAGES; ++stage) {
            CHECK(tbuf_holds(&b.y, 0), "before stage %d", stage);
            CHECK_STATUS(moe_layer_run_stage(&p, stage, test_now.stream), MOE_OK);
            if (stage == MOE_LAYER_ROUTER || (stage == MOE_LAYER_GATE && from == FROM_IDS))
                CHECK(tbuf_holds(&b.workspace, 0) == (from != FROM_ROUTER), "stage %d", stage);
        }
        CHECK(tbuf_holds(&b.y, y), "one by one");
        CHECK_STATUS(moe_layer_run_stage(&p, -1, test_now.stream), MOE_STATUS(MOE_ERR_OPTION, stage));
        CHECK_STATUS(moe_layer_run_stage(&p, MOE_LAYER_STAGES, test_now.stream),
                     MOE_STATUS(MOE_ERR_OPTION, stage));
        CHECK_STATUS(moe_layer_run_stage(0, 0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_run(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_layer_prepare(&b.d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        free(y);
        free(workspace);
        bufs_free(&b);
    }
    CHECK(strcmp(moe_layer_stage_name(MOE_LAYER_ROUTER), "router") == 0 &&
              strcmp(moe_layer_stage_name(MOE_LAYER_SHARED_UP), "shared_up") == 0 &&
              strcmp(moe_layer_stage_name(MOE_LAYER_SHARED_DOWN), "shared_down") == 0 &&
              strcmp(moe_layer_stage_name(MOE_LAYER_COMBINE), "combine") == 0 &&
              strcmp(moe_layer_stage_name(-1), "?") == 0 &&
              strcmp(moe_layer_stage_name(MOE_LAYER_STAGES), "?") == 0,
          "names of the stages");
}

static void test_layer_same_bits(void)
{
    trand r = trand_new(11);
    for (int i = 0; i < 2; ++i) {
        layer_case c = normal_case(70, 72, 56, 9, 3);
        layer_bufs b;
        tbuf* out[2];
        c.tile = i ? MOE_TILE_32x128 : MOE_TILE_AUTO;
        c.residual = RESIDUAL;
        c.shared = i ? 40 : 0;
        c.row_multiple = i ? 16 : 0;
        bufs_new(&b, &c, &r);
        out[0] = &b.y;
        out[1] = &b.workspace;
        test_same_bits("layer", call_layer, &b.d, out, 2, MOE_ON_HOST ? 3 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* A captured layer, launched again with other inputs and so other routing: what a call gives. */
static void test_layer_graph(void)
{
    trand r = trand_new(12);
    CHECK_STATUS(moe_layer_preload(), MOE_OK);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        layer_case c = normal_case(45, 64, 40, 6, 2);
        layer_bufs b;
        tgraph g;
        c.from = from;
        c.y_is_x = from == FROM_LOGITS;
        c.shared = from == FROM_IDS ? 64 : 0; /* where no token with a NaN comes by */
        c.shared_weighted = 1;
        c.capacity = from == FROM_IDS ? 9 : 0;
        bufs_new(&b, &c, &r);
        if (tgraph_capture(&g, call_layer, &b.d)) {
            CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.workspace, 0), "capture itself runs nothing");
            for (int run = 0; run < 3; ++run) {
                void *y, *workspace;
                c.unused = 25 * run;
                c.nan_token = run == 2 ? 8 : 0;
                fill_inputs(&b, &c, &r);
                reset(&b, &c);
                if (from == FROM_IDS) c.nan_token = 0;
                if (from == FROM_IDS && run == 2) { /* a NaN would reach y */
                    moe_store(b.h_x, 7 * c.H + c.H / 2, c.dtype, 1);
                    tbuf_put(&b.x, b.h_x);
                    moe_store(b.h_logits, 7 * c.E + c.E - 1, MOE_FP32, 1);
                    tbuf_put(&b.logits, b.h_logits);
                }
                tgraph_launch(&g);
                compare(&b, &c);
                y = tbuf_copy(c.y_is_x ? &b.x : &b.y);
                workspace = tbuf_copy(&b.workspace);
                reset(&b, &c);
                CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
                CHECK(tbuf_holds(c.y_is_x ? &b.x : &b.y, y) && tbuf_holds(&b.workspace, workspace),
                      "run %d: a call gives other bits", run);
                free(y);
                free(workspace);
            }
            tgraph_free(&g);
        }
        bufs_free(&b);
    }
}

static void test_layer_plan(void)
{
    trand r = trand_new(13);
    layer_case c = normal_case(40, 64, 40, 4, 2);
    layer_bufs b;
    moe_gemm_plan p[2];
    test_poison(p, sizeof p);
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_layer_plan(&b.d, p, p + 1), MOE_OK);
    for (int i = 0; i < 2; ++i) test_plan(&p[i], c.dtype, MOE_TILE_64x64);
    CHECK_STATUS(moe_layer_plan(0, p, p), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_layer_plan(&b.d, 0, p), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_layer_plan(&b.d, p, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    bufs_free(&b);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) { /* with a shared expert: of the others */
        moe_gemm_plan plain[2], alone[2];
        moe_experts_desc e;
        moe_layer_view v;
        c = normal_case(40, 64, 40, 4, 2);
        c.from = from;
        c.tile = MOE_TILE_AUTO;
        c.shared = 200;
        c.rows_dtype = from == FROM_IDS ? MOE_FP32 : 0;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_layer_plan(&b.d, p, p + 1), MOE_OK);
        CHECK_STATUS(moe_layer_get_view(&b.d, &v), MOE_OK);
        memset(&e, 0, sizeof e);
        e.x = b.d.x;
        e.w1 = b.d.w1;
        e.w2 = b.d.w2;
        e.expert_offset = v.expert_offset;
        e.row_slot = v.row_slot;
        e.act = v.act;
        e.rows = v.rows;
        e.num_tokens = c.T;
        e.hidden = c.H;
        e.intermediate = c.I;
        e.num_experts = c.E;
        e.top_k = c.K;
        e.dtype = c.dtype;
        e.rows_dtype = c.rows_dtype;
        CHECK_STATUS(moe_experts_plan(&e, plain, plain + 1), MOE_OK);
        e.w1 = b.d.shared.w1;
        e.w2 = b.d.shared.w2;
        e.expert_offset = e.row_slot = 0;
        e.act = v.shared_act;
        e.rows = v.shared_rows;
        e.num_rows = c.T;
        e.num_tokens = 0;
        e.intermediate = c.shared;
        e.num_experts = 1;
        e.top_k = 0;
        CHECK_STATUS(moe_experts_plan(&e, alone, alone + 1), MOE_OK);
        for (int i = 0; i < 2; ++i) {
            test_plan(&p[i], c.dtype, MOE_TILE_AUTO);
            CHECK(p[i].path == plain[i].path && p[i].tile == plain[i].tile &&
                      p[i].blocks == plain[i].blocks && p[i].smem == plain[i].smem,
                  "product %d: tile %d, %d blocks, not %d, %d", i, p[i].tile, p[i].blocks,
                  plain[i].tile, plain[i].blocks);
            CHECK(plain[i].smem != alone[i].smem || plain[i].tile != alone[i].tile,
                  "the shared expert's plan is the same, so this shows nothing");
        }
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK(untouched(&b, &c), "a plan runs nothing");
        bufs_free(&b);
    }
}

/* A prepared layer reads its weight tables, and all else on the device, when it runs: entries that
   change places between runs count, and so do other inputs. Its runs are bit for bit what calls are. */
static void test_layer_prepared(void)
{
    trand r = trand_new(31);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        layer_case c = normal_case(33, 64, 40, 4, 2);
        layer_bufs b;
        moe_layer_prepared p;
        void *first, *y, *home[2];
        c.from = from;
        c.table = 1;
        c.shared = from == FROM_LOGITS ? 48 : 0;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_layer_prepare(&b.d, &p), MOE_OK);
        CHECK(untouched(&b, &c), "preparing runs nothing");
        CHECK_STATUS(moe_layer_run(&p, test_now.stream), MOE_OK);
        compare(&b, &c);
        first = tbuf_copy(&b.y);
        for (int i = 0; i < 2; ++i) { /* expert 0's matrices for expert 1, and the other way round */
            tweights* w = i ? &b.mlp.w2 : &b.mlp.w1;
            void* entry[TWEIGHTS_MOST];
            home[i] = tbuf_copy(&w->table[0]);
            memcpy(entry, home[i], w->table[0].bytes);
            entry[0] = ((void**)home[i])[1];
            entry[1] = ((void**)home[i])[0];
            tbuf_put(&w->table[0], entry);
        }
        reset(&b, &c);
        CHECK_STATUS(moe_layer_run(&p, test_now.stream), MOE_OK);
        y = tbuf_copy(&b.y);
        CHECK(memcmp(y, first, b.y.bytes) != 0, "moved experts change nothing");
        reset(&b, &c);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.y, y), "a run is not what the call is");
        tbuf_put(&b.mlp.w1.table[0], home[0]);
        tbuf_put(&b.mlp.w2.table[0], home[1]);
        fill_inputs(&b, &c, &r);
        reset(&b, &c);
        CHECK_STATUS(moe_layer_run(&p, test_now.stream), MOE_OK);
        compare(&b, &c);
        free(first), free(y), free(home[0]), free(home[1]);
        bufs_free(&b);
    }
}

/* The plan, preparing and the layer must refuse it alike. Where the plan does not, nothing runs. */
static void refused(const moe_layer_desc* d, moe_status want, int line)
{
    moe_gemm_plan up, down;
    moe_layer_prepared p;
    const moe_status s = moe_layer_plan(d, &up, &down);
    test_status(s, want, __FILE__, line, "moe_layer_plan");
    if (s == MOE_OK) return;
    test_status(moe_layer_forward(d, test_now.stream), want, __FILE__, line, "moe_layer_forward");
    test_poison(&p, sizeof p);
    test_status(moe_layer_prepare(d, &p), want, __FILE__, line, "moe_layer_prepare");
    test_empty(&p, sizeof p, line);
}

/* Each wrong field is refused with its own kind and field, and nothing is queued. */
static void test_layer_refusals(void)
{
    char* const far = (char*)((uintptr_t)1 << 44); /* from all buffers; nothing is launched */
    trand r = trand_new(14);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        enum { T = 20, H = 64, I = 40, E = 4, K = 2 };
        layer_case c = normal_case(T, H, I, E, K);
        layer_bufs b;
        moe_layer_desc good, d;
        c.from = from;
        c.bias = 1;
        c.residual = RESIDUAL;
        c.shared = 24;
        c.shared_weighted = c.shared_bias = 1;
        bufs_new(&b, &c, &r);
        good = b.d;
        CHECK_STATUS(moe_layer_forward(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
        REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
        REFUSED((d.num_tokens = INT32_MAX), MOE_ERR_RANGE, num_tokens);
        REFUSED(d.hidden = 0, MOE_ERR_RANGE, hidden);
        REFUSED(d.hidden = -64, MOE_ERR_RANGE, hidden);
        REFUSED(d.hidden = 60, MOE_ERR_MULTIPLE, hidden);
        REFUSED(d.intermediate = 0, MOE_ERR_RANGE, intermediate);
        REFUSED(d.intermediate = -8, MOE_ERR_RANGE, intermediate);
        REFUSED(d.intermediate = 36, MOE_ERR_MULTIPLE, intermediate);
        REFUSED(d.num_experts = 0, MOE_ERR_RANGE, num_experts);
        REFUSED(d.num_experts = -1, MOE_ERR_RANGE, num_experts);
        REFUSED(d.num_experts = MOE_MAX_EXPERTS + 1, MOE_ERR_RANGE, num_experts);
        REFUSED(d.top_k = 0, MOE_ERR_RANGE, top_k);
        REFUSED(d.top_k = -1, MOE_ERR_RANGE, top_k);
        REFUSED(d.top_k = MOE_COMBINE_MAX_TOP_K + 1, MOE_ERR_RANGE, top_k);
        if (from != FROM_IDS) {
            REFUSED(d.top_k = E + 1, MOE_ERR_RANGE, top_k);
            REFUSED(d.gate.score = 99, MOE_ERR_OPTION, score);
            REFUSED(d.gate.score = -1, MOE_ERR_OPTION, score);
        } else {
            REFUSED(d.gate.score = MOE_SCORE_SIGMOID, MOE_ERR_CONFLICT, gate); /* none runs */
            REFUSED(d.gate.renormalize = 1, MOE_ERR_CONFLICT, gate);
            REFUSED(d.gate.scale = 2.5f, MOE_ERR_CONFLICT, gate);
            REFUSED(d.gate.whole_batch = 1, MOE_ERR_CONFLICT, gate);
            REFUSED(d.gate.expert_count = (int32_t*)b.gate_count.p, MOE_ERR_CONFLICT, gate);
        }
        if (from != FROM_IDS) {
            REFUSED(d.gate.renormalize = 2, MOE_ERR_OPTION, renormalize);
            REFUSED(d.gate.renormalize = -1, MOE_ERR_OPTION, renormalize);
            REFUSED(d.gate.scale = INFINITY, MOE_ERR_RANGE, scale);
            REFUSED(d.gate.scale = NAN, MOE_ERR_RANGE, scale);
            REFUSED(d.weights = (const float*)b.weights.p, MOE_ERR_CONFLICT, weights);
        }
        REFUSED(d.dtype = MOE_FP32, MOE_ERR_DTYPE, dtype);
        REFUSED(d.dtype = 4, MOE_ERR_DTYPE, dtype);
        REFUSED(d.dtype = -1, MOE_ERR_DTYPE, dtype);
        REFUSED(d.rows_dtype = test_half() == MOE_FP16 ? MOE_BF16 : MOE_FP16, MOE_ERR_DTYPE,
                rows_dtype);
        REFUSED(d.rows_dtype = 4, MOE_ERR_DTYPE, rows_dtype);
        /* what the layer fills in itself */
        REFUSED(d.gate.logits = b.logits.p, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.logits_stride = E, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.logits_dtype = MOE_FP32, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.ids = (int32_t*)b.ids.p, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.weights = (float*)b.weights.p, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.chunk_count = (int32_t*)b.gate_count.p, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.rank = 1, MOE_ERR_CONFLICT, gate);
        REFUSED(d.route.rank = 1, MOE_ERR_CONFLICT, route);
        REFUSED(d.gate.fault = d.fault, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.num_tokens = T, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.num_experts = E, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.top_k = K, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.workspace = b.y.p, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.workspace_bytes = 4, MOE_ERR_CONFLICT, gate);
        REFUSED(d.route.ids = (const int32_t*)b.ids.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.weights = (const float*)b.weights.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.chunk_count = (int32_t*)b.gate_count.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.expert_count = (int32_t*)b.gate_count.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.expert_offset = (int32_t*)b.gate_count.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.row_slot = (int32_t*)b.slot_row.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.place = (moe_place*)b.y.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.fault = d.fault, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.num_tokens = T, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.num_experts = E, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.top_k = K, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.place_kind = MOE_PLACE_BY_EXPERT, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.workspace = b.y.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.workspace_bytes = 4, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.row_multiple = -1, MOE_ERR_RANGE, row_multiple);
        REFUSED(d.route.capacity = -1, MOE_ERR_RANGE, capacity);
        REFUSED(d.route.drop_rule = MOE_DROP_BY_WEIGHT, MOE_ERR_CONFLICT, drop_rule);
        REFUSED(d.route.num_replicas = E + 1, MOE_ERR_CONFLICT, num_replicas);
        REFUSED(d.route.slot_row = (int32_t*)AT(b.slot_row.p, 2), MOE_ERR_ALIGN, slot_row);
        REFUSED(d.activation = MOE_ACTIVATION_RELU2 + 1, MOE_ERR_OPTION, activation);
        REFUSED(d.activation = -1, MOE_ERR_OPTION, activation);
        REFUSED(d.alpha = 1, MOE_ERR_CONFLICT, alpha);
        REFUSED(d.limit = 1, MOE_ERR_CONFLICT, limit);
        REFUSED((d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED, d.limit = NAN), MOE_ERR_RANGE, limit);
        /* the shared expert: its fields are one here */
        REFUSED(d.shared.intermediate = -8, MOE_ERR_RANGE, shared);
        REFUSED(d.shared.intermediate = 12, MOE_ERR_MULTIPLE, shared);
        REFUSED(d.shared.intermediate = 0, MOE_ERR_CONFLICT, shared);
        REFUSED(d.shared.w1.base = 0, MOE_ERR_NULL, shared);
        REFUSED(d.shared.w2.base = 0, MOE_ERR_NULL, shared);
        REFUSED(d.shared.w1.base = AT(d.shared.w1.base, 8), MOE_ERR_ALIGN, shared);
        REFUSED(d.shared.w2.row_stride = 8, MOE_ERR_STRIDE, shared);
        REFUSED(d.shared.bias1 = AT(b.shared.bias1.p, 1), MOE_ERR_ALIGN, shared);
        REFUSED(d.shared.activation = -1, MOE_ERR_OPTION, shared);
        REFUSED(d.shared.gate_up = 9, MOE_ERR_OPTION, shared);
        REFUSED(d.shared.alpha = 1, MOE_ERR_CONFLICT, shared);
        REFUSED(d.shared.limit = 1, MOE_ERR_CONFLICT, shared);
        REFUSED(d.shared.weight = (const float*)AT(b.shared_weight.p, 2), MOE_ERR_ALIGN,
                shared_weight);
        REFUSED(d.gate_up = 4, MOE_ERR_OPTION, gate_up);
        REFUSED(d.gate_up = -1, MOE_ERR_OPTION, gate_up);
        REFUSED(d.tile = 99, MOE_ERR_OPTION, tile);
        REFUSED(d.tile = -1, MOE_ERR_OPTION, tile);
        /* not before a kernel is chosen: the stations ahead have been prepared */
        REFUSED((d.tile = MOE_TILE_128x256, d.w1.major = MOE_MAJOR_MN), MOE_ERR_CONFLICT, tile);
        REFUSED(d.x_stride = 56, MOE_ERR_STRIDE, x_stride);
        REFUSED(d.x_stride = -64, MOE_ERR_STRIDE, x_stride);
        REFUSED(d.x_stride = 68, MOE_ERR_ALIGN, x_stride);
        REFUSED(d.y_stride = 63, MOE_ERR_STRIDE, y_stride);
        REFUSED(d.y_stride = -64, MOE_ERR_STRIDE, y_stride);
        REFUSED(d.residual_stride = 63, MOE_ERR_STRIDE, residual_stride);
        REFUSED(d.residual_stride = -64, MOE_ERR_STRIDE, residual_stride);
        REFUSED(d.w1.major = 3, MOE_ERR_OPTION, w1);
        REFUSED(d.w2.major = 3, MOE_ERR_OPTION, w2);
        REFUSED(d.w1.row_stride = 56, MOE_ERR_STRIDE, w1);
        REFUSED(d.w2.row_stride = 32, MOE_ERR_STRIDE, w2);
        REFUSED(d.w1.expert_stride = 4, MOE_ERR_ALIGN, w1);
        REFUSED(d.w2.expert_stride = -8, MOE_ERR_STRIDE, w2);
        REFUSED(d.w1.base = 0, MOE_ERR_NULL, w1);
        REFUSED(d.w2.base = 0, MOE_ERR_NULL, w2);
        REFUSED(d.gate_up = MOE_GATE_UP_SEPARATE, MOE_ERR_NULL, w1);
        REFUSED(d.w1.base = AT(d.w1.base, 8), MOE_ERR_ALIGN, w1);
        REFUSED(d.w2.base = AT(d.w2.base, 8), MOE_ERR_ALIGN, w2);
        REFUSED(d.w1.table = (const void* const*)b.router.p, MOE_ERR_CONFLICT, w1);
        REFUSED(d.w2.table = (const void* const*)b.router.p, MOE_ERR_CONFLICT, w2);
        REFUSED((d.w1.base = 0, d.w1.table = (const void* const*)AT(far, 4)), MOE_ERR_ALIGN, w1);
        REFUSED((d.w2.base = 0, d.w2.table = (const void* const*)AT(far, 4)), MOE_ERR_ALIGN, w2);
        REFUSED((d.gate_up = MOE_GATE_UP_SEPARATE, d.w1.up = AT(d.w1.base, 8)), MOE_ERR_ALIGN, w1);
        REFUSED((d.gate_up = MOE_GATE_UP_SEPARATE, d.w1.up_table = (const void* const*)AT(far, 4)),
                MOE_ERR_ALIGN, w1);
        REFUSED((d.shared.w1.base = 0, d.shared.w1.table = (const void* const*)AT(far, 4)),
                MOE_ERR_ALIGN, shared);
        REFUSED((d.shared.w2.base = 0, d.shared.w2.table = (const void* const*)AT(far, 4)),
                MOE_ERR_ALIGN, shared);
        REFUSED(d.shared.gate_up = MOE_GATE_UP_SEPARATE, MOE_ERR_NULL, shared);
        REFUSED(d.shared.bias2 = AT(d.shared.bias2, 1), MOE_ERR_ALIGN, shared);
        REFUSED(d.route.replica_offset = (const int32_t*)AT(far, 2), MOE_ERR_ALIGN, replica_offset);
        REFUSED((d.route.replica_offset = (const int32_t*)far,
                 d.route.replica_expert = (const int32_t*)AT(far, 2)),
                MOE_ERR_ALIGN, replica_expert);
        REFUSED(d.route.drop_count = (int32_t*)AT(far, 2), MOE_ERR_ALIGN, drop_count);
        REFUSED(d.route.row_weight = (float*)AT(far, 2), MOE_ERR_ALIGN, row_weight);
        if (from != FROM_IDS) {
            REFUSED(d.gate.expert_bias = (const float*)AT(far, 2), MOE_ERR_ALIGN, expert_bias);
            REFUSED((d.gate.seed_offset = (const uint64_t*)AT(far, 4), d.gate.noise = 1),
                    MOE_ERR_ALIGN, seed_offset);
            REFUSED(d.gate.expert_count = (int32_t*)AT(far, 2), MOE_ERR_ALIGN, expert_count);
        }
        REFUSED(d.bias1 = AT(d.bias1, 1), MOE_ERR_ALIGN, bias1);
        REFUSED(d.bias2 = AT(d.bias2, 1), MOE_ERR_ALIGN, bias2);
        REFUSED(d.x = 0, MOE_ERR_NULL, x);
        REFUSED(d.x = AT(d.x, 8), MOE_ERR_ALIGN, x);
        REFUSED(d.x = AT(d.x, 1), MOE_ERR_ALIGN, x);
        REFUSED(d.y = 0, MOE_ERR_NULL, y);
        REFUSED(d.y = AT(d.y, 1), MOE_ERR_ALIGN, y);
        REFUSED(d.residual = AT(d.residual, 1), MOE_ERR_ALIGN, residual);
        REFUSED(d.rank = -1, MOE_ERR_RANGE, rank);
        REFUSED(d.rank = MOE_FAULT_MAX_RANK + 1, MOE_ERR_RANGE, rank);
        REFUSED(d.fault = (uint64_t*)AT(d.fault, 4), MOE_ERR_ALIGN, fault);
        REFUSED(d.workspace = 0, MOE_ERR_NULL, workspace);
        REFUSED(d.workspace = AT(d.workspace, 128), MOE_ERR_ALIGN, workspace);
        REFUSED(d.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
        REFUSED(d.workspace_bytes = 0, MOE_ERR_WORKSPACE, workspace_bytes);
        REFUSED((d.workspace_bytes -= 256, d.fault = (uint64_t*)AT(d.workspace, d.workspace_bytes)),
                MOE_ERR_WORKSPACE, workspace_bytes); /* where it ends, too early */
        REFUSED((d.num_tokens = 0, d.workspace = 0), MOE_ERR_NULL, workspace);
        REFUSED((d.num_tokens = 0, d.workspace = AT(d.workspace, 128)), MOE_ERR_ALIGN, workspace);
        REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
        if (from == FROM_ROUTER) {
            REFUSED(d.router = 0, MOE_ERR_NULL, router);
            REFUSED(d.router = AT(d.router, 1), MOE_ERR_ALIGN, router);
            REFUSED(d.router_dtype = 4, MOE_ERR_DTYPE, router_dtype);
            REFUSED(d.router_dtype = -1, MOE_ERR_DTYPE, router_dtype);
            REFUSED(d.logits = (const float*)b.logits.p, MOE_ERR_CONFLICT, router);
            REFUSED((d.ids = (const int32_t*)b.ids.p, d.weights = (const float*)b.weights.p),
                    MOE_ERR_CONFLICT, router);
        } else if (from == FROM_LOGITS) {
            REFUSED(d.logits = (const float*)AT(d.logits, 2), MOE_ERR_ALIGN, logits);
            REFUSED((d.ids = (const int32_t*)b.ids.p, d.weights = (const float*)b.weights.p),
                    MOE_ERR_CONFLICT, logits);
        } else {
            REFUSED(d.weights = 0, MOE_ERR_NULL, weights);
            REFUSED(d.ids = (const int32_t*)AT(d.ids, 2), MOE_ERR_ALIGN, ids);
            REFUSED(d.weights = (const float*)AT(d.weights, 2), MOE_ERR_ALIGN, weights);
        }
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.workspace, 0), "a refused call wrote an output");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        CHECK_STATUS(moe_layer_forward(&good, test_now.stream), MOE_OK);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* y, the fault word and the workspace may lie on nothing else; the status names them. */
static void test_layer_overlaps(void)
{
    trand r = trand_new(15);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        enum { T = 20, H = 64, I = 40, E = 4, K = 2 };
        layer_case c = normal_case(T, H, I, E, K);
        layer_bufs b;
        moe_layer_desc good, d;
        tbuf table, arena, prob = tbuf_new("prob_sum", E * 4, 4);
        void* address[E];
        c.from = from;
        c.bias = 1;
        c.residual = RESIDUAL;
        c.router_dtype = MOE_FP32;
        c.shared = 24;
        c.shared_weighted = c.shared_bias = c.outputs = 1;
        c.replicas = E;
        bufs_new(&b, &c, &r);
        if (from != FROM_IDS) { /* which takes workspace */
            b.d.gate.prob_sum = (float*)prob.p;
            fit_workspace(&b, &c);
        }
        arena = tbuf_new("arena", b.workspace.bytes + 65536, 0); /* a workspace and any input */
        for (int e = 0; e < E; ++e) address[e] = b.mlp.w1.part[0][0].p;
        table = tbuf_from("table", address, sizeof address, 0);
        good = b.d;
        good.fault = 0; /* y may reach past the end of what it lies on */
        REFUSED(d.y = AT(d.x, 16), MOE_ERR_OVERLAP, y);
        REFUSED((d.y = (void*)d.x, d.y_stride = 72), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.residual, 16), MOE_ERR_OVERLAP, y);
        REFUSED((d.y = (void*)d.residual, d.y_stride = 72), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.w1.base, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.w1.base, E * 2 * I * H * 2 - 16), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.w2.base, E * I * H * 2 - 16), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.bias1, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.bias2, MOE_ERR_OVERLAP, y);
        REFUSED((d.w2.base = 0, d.w2.table = (const void* const*)table.p, d.y = table.p),
                MOE_ERR_OVERLAP, y);
        if (from == FROM_ROUTER) {
            REFUSED(d.y = (void*)d.router, MOE_ERR_OVERLAP, y);
            REFUSED(d.y = AT(d.router, E * H * 4 - 16), MOE_ERR_OVERLAP, y);
        } else if (from == FROM_LOGITS) {
            REFUSED(d.y = (void*)d.logits, MOE_ERR_OVERLAP, y);
        } else {
            REFUSED(d.y = (void*)d.ids, MOE_ERR_OVERLAP, y);
            REFUSED(d.y = (void*)d.weights, MOE_ERR_OVERLAP, y);
        }
        REFUSED(d.y = (void*)d.shared.w1.base, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.shared.w1.base, 2 * 24 * H * 2 - 16), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.shared.w2.base, 24 * H * 2 - 16), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.shared.bias1, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.shared.bias2, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.shared.weight, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.route.replica_offset, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.route.replica_expert, MOE_ERR_OVERLAP, y);
        REFUSED(d.route.slot_row = (int32_t*)DOWN_TO(AT(d.y, 64), 4), MOE_ERR_OVERLAP, slot_row);
        REFUSED(d.route.row_weight = (float*)d.x, MOE_ERR_OVERLAP, row_weight);
        REFUSED(d.route.row_weight = (float*)AT(d.workspace, 512), MOE_ERR_OVERLAP, row_weight);
        REFUSED(d.route.drop_count = (int32_t*)d.w1.base, MOE_ERR_OVERLAP, drop_count);
        if (from != FROM_IDS) {
            REFUSED(d.gate.expert_bias = (const float*)DOWN_TO(AT(d.y, 8), 4), MOE_ERR_OVERLAP, y);
            REFUSED(d.gate.expert_disabled = (const uint8_t*)d.y, MOE_ERR_OVERLAP, y);
            REFUSED(d.gate.token_disabled = (const uint8_t*)d.y, MOE_ERR_OVERLAP, y);
            REFUSED(d.gate.expert_count = (int32_t*)d.shared.w1.base, MOE_ERR_OVERLAP,
                    expert_count);
#define OVER(p) REFUSED(d.gate.prob_sum = (float*)DOWN_TO(p, 4), MOE_ERR_OVERLAP, prob_sum)
            OVER(d.x);
            OVER(d.y);
            OVER(AT(d.y, 64));
            OVER(d.residual);
            OVER(from == FROM_ROUTER ? d.router : d.logits);
            OVER(d.w1.base);
            OVER(d.w2.base);
            OVER(d.bias1);
            OVER(AT(d.bias1, E * I * 2)); /* a bias of an up */
            OVER(d.bias2);
            OVER(d.shared.w1.base);
            OVER(d.shared.w2.base);
            OVER(d.shared.bias1);
            OVER(d.shared.bias2);
            OVER(d.shared.weight);
            OVER(d.route.replica_offset);
            OVER(d.route.replica_expert);
            OVER(d.workspace);
            OVER(AT(d.workspace, d.workspace_bytes - 4));
            REFUSED((d.fault = b.d.fault, d.gate.prob_sum = (float*)b.d.fault), MOE_ERR_OVERLAP,
                    prob_sum);
            OVER(d.gate.expert_count);
#undef OVER
            REFUSED(d.route.drop_count = (int32_t*)d.gate.prob_sum, MOE_ERR_OVERLAP, drop_count);
            REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)d.workspace), MOE_ERR_OVERLAP, fault);
            REFUSED(d.route.slot_row = (int32_t*)d.gate.prob_sum, MOE_ERR_OVERLAP, slot_row);
            REFUSED(d.route.row_weight = (float*)AT(d.gate.prob_sum, 4 * E - 4), MOE_ERR_OVERLAP,
                    row_weight);
            REFUSED(d.gate.expert_bias = d.gate.prob_sum, MOE_ERR_OVERLAP, prob_sum);
            REFUSED(d.gate.expert_disabled = (const uint8_t*)AT(d.gate.prob_sum, 4 * E - 1),
                    MOE_ERR_OVERLAP, prob_sum);
        }
        { /* at addresses far from all others: nothing is launched */
            char* const far = (char*)((uintptr_t)1 << 44);
            REFUSED((d.y = far, d.bias1 = far - E * 2 * I * 2 + 2), MOE_ERR_OVERLAP, y);
            REFUSED((d.y = far, d.shared.bias1 = far - 2 * 24 * 2 + 2), MOE_ERR_OVERLAP, y);
            REFUSED((d.x = far, d.x_stride = 72, d.y = far + (T - 1) * 72 * 2 + 126),
                    MOE_ERR_OVERLAP, y);
            REFUSED((d.residual = far, d.residual_stride = 71, d.y = far + (T - 1) * 71 * 2 + 126),
                    MOE_ERR_OVERLAP, y);
            REFUSED((d.residual = far, d.residual_stride = 71,
                     d.route.drop_count = (int32_t*)(far + (T - 1) * 71 * 2 + 126)),
                    MOE_ERR_OVERLAP, drop_count);
            REFUSED((d.y = far, d.y_stride = 71,
                     d.route.drop_count = (int32_t*)(far + (T - 1) * 71 * 2 + 126)),
                    MOE_ERR_OVERLAP, drop_count);
        }
        good.fault = b.d.fault;
        REFUSED(d.fault = (uint64_t*)d.x, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.shared.w1.base, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.y, 8), 8), MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.residual, 8), 8), MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.w1.base, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.w2.base, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.bias1, 8), 8), MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.bias2, 8), 8), MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.workspace, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)AT(d.workspace, d.workspace_bytes - 8), MOE_ERR_OVERLAP, fault);
        if (from == FROM_ROUTER) {
            REFUSED(d.fault = (uint64_t*)d.router, MOE_ERR_OVERLAP, fault);
        } else if (from == FROM_LOGITS) {
            REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.logits, 8), 8), MOE_ERR_OVERLAP, fault);
        } else {
            REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.ids, 8), 8), MOE_ERR_OVERLAP, fault);
            REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.weights, 8), 8), MOE_ERR_OVERLAP, fault);
        }
        for (int end = 0; end < 2; ++end) { /* an input over its first or its last bytes */
            void* const at = AT(arena.p, end ? good.workspace_bytes - 256 : 0);
            good.workspace = arena.p;
            REFUSED(d.x = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.y = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.residual = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.w1.base = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.w2.base = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.bias1 = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.bias2 = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.shared.w1.base = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.shared.w2.base = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.shared.weight = (const float*)at, MOE_ERR_OVERLAP, workspace);
            if (from == FROM_ROUTER) {
                REFUSED(d.router = at, MOE_ERR_OVERLAP, workspace);
            } else if (from == FROM_LOGITS) {
                REFUSED(d.logits = (const float*)at, MOE_ERR_OVERLAP, workspace);
            } else {
                REFUSED(d.ids = (const int32_t*)at, MOE_ERR_OVERLAP, workspace);
                REFUSED(d.weights = (const float*)at, MOE_ERR_OVERLAP, workspace);
            }
            good.workspace = b.workspace.p;
        }
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.workspace, 0), "a refused call wrote an output");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        CHECK_STATUS(moe_layer_forward(&good, test_now.stream), MOE_OK);
        compare(&b, &c);
        CHECK(tbuf_holds(&arena, 0), "or there");
        tbuf_free(&arena);
        tbuf_free(&prob);
        tbuf_free(&table);
        bufs_free(&b);
    }
}

static void test_layer_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(16);
    for (int i = 0; i < 3; ++i) {
        layer_case c = normal_case(i == 2 ? 32 : 4096, 1024, 512, 64, 8);
        c.dtype = c.router_dtype = i == 1 ? MOE_FP16 : MOE_BF16;
        c.gate_up = i + 1;
        c.residual = i == 0 ? RESIDUAL : NO_RESIDUAL;
        c.score = i + 1;
        c.renormalize = i == 1;
        c.tile = MOE_TILE_AUTO;
        c.sampled = i == 2 ? 3 : 201;
        run_case(&c, &r);
    }
#endif
}

/* Rows of x, of the residual or of y, alone or over x, that lie past 2^32 elements: the bits of the
   same call on dense ones, workspace included. */
static void test_layer_past_2_31(void)
{
    enum { X, RESIDUAL_ROWS, Y, Y_OVER_X };
    static const char* const name[] = {"x", "residual", "y", "y over x"};
    trand r = trand_new(17);
    for (int which = X; which <= Y_OVER_X; ++which) {
        layer_case c = normal_case(5, 64, 40, 8, 2);
        layer_bufs b;
        moe_layer_desc d;
        twide wide;
        void *y, *workspace;
        if (!twide_new(&wide, name[which], c.T, c.H, c.dtype)) continue;
        c.residual = RESIDUAL;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c);
        y = tbuf_copy(&b.y);
        workspace = tbuf_copy(&b.workspace);
        reset(&b, &c);
        d = b.d;
        if (which == X || which == Y_OVER_X) {
            d.x = wide.p;
            d.x_stride = wide.stride;
            twide_put(&wide, b.h_x);
        }
        if (which == RESIDUAL_ROWS) {
            d.residual = wide.p;
            d.residual_stride = wide.stride;
            twide_put(&wide, b.h_residual);
        }
        if (which >= Y) {
            d.y = wide.p;
            d.y_stride = wide.stride;
        }
        CHECK_STATUS(moe_layer_forward(&d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.workspace, workspace), "other bits on the way, wide %s", name[which]);
        if (which < Y) CHECK(tbuf_holds(&b.y, y), "other bits in y, wide %s", name[which]);
        twide_holds(&wide, which == X ? b.h_x : which == RESIDUAL_ROWS ? b.h_residual : y);
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        free(y);
        free(workspace);
        twide_free(&wide);
        bufs_free(&b);
    }
}

/* A binary may hold no bf16 for the device (built for sm_75) or not the largest tile (built for
   sm_80): plan, layer and every stage alone say so alike and queue nothing. What it holds runs. */
static void test_layer_old_code(void)
{
    trand r = trand_new(18);
    for (int dtype = MOE_FP16; dtype <= MOE_BF16; ++dtype)
        for (int tile = MOE_TILE_AUTO; tile <= MOE_TILE_64x64; ++tile)
            for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
                const moe_status want = test_gemm_status(dtype, tile);
                layer_case c = normal_case(20, 64, 40, 4, 2);
                layer_bufs b;
                moe_gemm_plan up, down;
                moe_layer_prepared p;
                c.dtype = c.router_dtype = dtype;
                c.tile = tile;
                c.from = from;
                bufs_new(&b, &c, &r);
                CHECK_STATUS(moe_layer_plan(&b.d, &up, &down), want);
                CHECK_STATUS(moe_layer_prepare(&b.d, &p), want);
                if (want != MOE_OK) CHECK_STATUS(moe_layer_forward(&b.d, test_now.stream), want);
                CHECK(untouched(&b, &c), "%s: an output was written", case_text(&c));
                bufs_free(&b);
                run_case(&c, &r);
            }
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_layer_gates);
    RUN(test_layer_activations);
    RUN(test_layer_shared);
    RUN(test_layer_rows_dtype);
    RUN(test_layer_route_options);
    RUN(test_layer_gate_rules);
    RUN(test_layer_entries);
    RUN(test_layer_shapes);
    RUN(test_layer_ids);
    RUN(test_layer_residual);
    RUN(test_layer_nan);
    RUN(test_layer_stopped);
    RUN(test_layer_no_tokens);
    RUN(test_layer_workspace);
    RUN(test_layer_stages);
    RUN(test_layer_prepared);
    RUN(test_layer_same_bits);
    RUN(test_layer_graph);
    RUN(test_layer_plan);
    RUN(test_layer_refusals);
    RUN(test_layer_overlaps);
    RUN(test_layer_large);
    RUN(test_layer_past_2_31);
    RUN(test_layer_old_code);
    return test_end();
}
