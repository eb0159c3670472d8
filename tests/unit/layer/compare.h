/* compare.h: a case of the layer against the references: station after station, each on what the
   device's station before it gave, and the whole layer at once. */
#ifndef MOE_TESTS_LAYER_COMPARE_H
#define MOE_TESTS_LAYER_COMPARE_H

#include "tests/unit/layer/case.h"

#include "moe/ref/layer.h"
#include "tests/test_bound.h"
#include "tests/test_case_rows.h"

/* What a run left on the device. */
typedef struct layer_result {
    moe_layer_view view;
    void* workspace;      /* a host copy */
    const int32_t* ids;   /* [T, K], of the gate or given */
    const float* weights; /* [T, K] */
    int32_t* went;        /* [T, K] physical expert of the slot's row; -1: dropped */
    float* y;             /* [T, H] */
} layer_result;

/* Returns where a station's output, at this device address, is in a host copy of the workspace. */
static const void* in_copy(const layer_bufs* b, const void* copy, const void* at)
{
    return (const char*)copy + ((const char*)at - (const char*)b->workspace.p);
}

/* Returns the residual as the host has it; null: none. */
static const void* residual_of(const layer_bufs* b, const layer_case* c, int64_t* stride)
{
    const int is_x = c->residual == RESIDUAL_IS_X || (c->residual == RESIDUAL_IS_Y && c->y_is_x);
    *stride = b->d.residual_stride ? b->d.residual_stride : c->H;
    if (c->residual == NO_RESIDUAL) return 0;
    return is_x ? b->h_x : b->h_residual;
}

/* Returns the shared expert's weights and options for a reference. */
static moe_ref_layer_shared ref_shared(const layer_bufs* b, const layer_case* c)
{
    moe_ref_layer_shared s = {};
    s.w1 = tweights_host(&b->shared.w1), s.w2 = tweights_host(&b->shared.w2);
    s.bias1 = c->shared_bias ? b->shared.h_bias1 : (void*)0;
    s.bias2 = c->shared_bias ? b->shared.h_bias2 : (void*)0;
    s.weight = c->shared_weighted ? b->h_shared_weight : (float*)0;
    s.intermediate = c->shared, s.activation = c->shared_activation, s.gate_up = c->shared_gate_up;
    return s;
}

/* Returns what the rows are rounded to. */
static int rows_dtype(const layer_case* c) { return c->rows_dtype ? c->rows_dtype : c->dtype; }

/* Computes the rows of an MLP, rounded to their dtype where e rounds act. Writes each element's
   bound where `bound` is not null; then e must round nothing. */
static void ref_rows(const layer_case* c, const moe_ref_experts_desc* e, double* rows,
                     double* bound)
{
    const int64_t R = e->expert_offset[e->num_experts];
    CHECK(moe_ref_experts_f64(e, rows, 0, 0) == 0, "memory");
    for (int64_t i = 0; i < R * c->H; ++i)
        rows[i] = moe_ref_round_f64(rows[i], e->act_dtype ? rows_dtype(c) : 0);
    if (bound) {
        double* act_bound = (double*)test_host(R * e->intermediate * 8);
        texperts_bound(e, c->dtype, rows_dtype(c), act_bound, bound);
        free(act_bound);
    }
}

/* Computes y [n, H] of the tokens pick[0 .. n - 1] from physical ids and weights [T, K]. Rounds act
   to `dtype` and rows to their own; dtype 0: rounds nothing. Where bound and size [n, H] are not
   null, writes each element's bound and the sum of its terms' absolutes. */
static void ref_y(const layer_bufs* b, const layer_case* c, const int32_t* ids,
                  const float* weights, const int32_t* pick, int64_t n, int dtype, double* y,
                  double* bound, double* size)
{
    const int64_t K = c->K, H = c->H, P = physical(c), slots = n * K, x_stride = H + c->x_pad;
    uint16_t *x = (uint16_t*)test_host(n * H * 2), *residual = (uint16_t*)test_host(n * H * 2);
    int32_t *id = (int32_t*)test_host(slots * 4), *row_slot = (int32_t*)test_host(slots * 4);
    int32_t* offset = (int32_t*)test_host(P * 4 + 4);
    moe_place* place = (moe_place*)test_host(slots * 8);
    float *weight = (float*)test_host(slots * 4), *shared_weight = (float*)test_host(n * 4);
    double *rows = (double*)test_host(slots * H * 8), *shared = (double*)test_host(n * H * 8);
    double* row_bound = (double*)test_host(slots * H * 8);
    double* shared_bound = (double*)test_host(n * H * 8);
    int64_t residual_stride;
    const void* h_residual = residual_of(b, c, &residual_stride);
    moe_ref_experts_desc e = tmlp_ref(&b->mlp, c->dtype, c->bias, c->bias);
    moe_ref_combine_desc combine = {};
    for (int64_t i = 0; i < n; ++i) {
        memcpy(x + i * H, (const uint16_t*)b->h_x + pick[i] * x_stride, (size_t)H * 2);
        if (h_residual)
            memcpy(residual + i * H, (const uint16_t*)h_residual + pick[i] * residual_stride,
                   (size_t)H * 2);
        memcpy(id + i * K, ids + pick[i] * K, (size_t)K * 4);
        memcpy(weight + i * K, weights + pick[i] * K, (size_t)K * 4);
        shared_weight[i] = b->h_shared_weight[pick[i]];
    }
    tmlp_route(id, (int)n, (int)P, c->K, offset, row_slot, place);
    e.x = x, e.row_slot = row_slot, e.expert_offset = offset, e.act_dtype = dtype;
    e.activation = c->activation, e.alpha = c->alpha, e.limit = c->limit, e.gate_up = c->gate_up;
    e.num_experts = (int)P, e.top_k = c->K, e.hidden = c->H, e.intermediate = c->I;
    ref_rows(c, &e, rows, bound ? row_bound : (double*)0);
    if (c->shared) {
        const int32_t all[2] = {0, (int32_t)n};
        e = tmlp_ref(&b->shared, c->dtype, c->shared_bias, c->shared_bias);
        e.x = x, e.expert_offset = all, e.act_dtype = dtype;
        e.activation = c->shared_activation, e.gate_up = c->shared_gate_up;
        e.num_experts = 1, e.top_k = c->K, e.hidden = c->H, e.intermediate = c->shared;
        ref_rows(c, &e, shared, bound ? shared_bound : (double*)0);
    }
    combine.rows = rows, combine.rows_dtype = MOE_REF_REAL;
    combine.place = place, combine.weights = weight;
    combine.residual = h_residual ? residual : (void*)0, combine.residual_dtype = c->dtype;
    combine.shared = c->shared ? shared : (double*)0;
    combine.shared_weight = c->shared_weighted ? shared_weight : (float*)0;
    combine.num_tokens = (int)n, combine.hidden = c->H, combine.top_k = c->K;
    moe_ref_combine_f64(&combine, y, size);
    if (bound) { /* of the rows, weighted; of fp32 sums; of the rounding of y */
        double* moved = (double*)test_host(n * H * 8);
        combine.rows = row_bound, combine.residual = 0;
        combine.shared = c->shared ? shared_bound : (double*)0;
        moe_ref_combine_f64(&combine, moved, bound);
        for (int64_t i = 0; i < n * H; ++i) bound[i] += (c->K + 2) * ldexp(size[i] + bound[i], -23);
        trows_round_bound(bound, y, n * H, c->dtype);
        free(moved);
    }
    TFREE(x, residual, id, row_slot, offset, place, weight, shared_weight, rows, shared, row_bound,
          shared_bound);
}

/* Compares the router's logits with their exact sums; a NaN token's must be NaN. */
static void compare_logits(const layer_bufs* b, const layer_case* c, const float* logits)
{
    const int64_t T = c->T, E = c->E, H = c->H;
    const int32_t offset[2] = {0, c->T};
    double *exact = (double*)test_host(T * E * 8), *sum = (double*)test_host(T * E * 8);
    float* got = (float*)test_host(T * E * 4);
    moe_ref_gemm_desc g = {};
    g.a = b->h_x, g.a_stride = H + c->x_pad, g.a_dtype = c->dtype;
    g.b.base = b->h_router, g.b_dtype = c->router_dtype;
    g.expert_offset = offset, g.num_experts = 1, g.n = c->E, g.k = c->H;
    moe_ref_gemm_f64(&g, exact, sum);
    memcpy(got, logits, (size_t)(T * E) * 4);
    for (int64_t e = 0; e < E && c->nan_token; ++e) {
        const int64_t i = (c->nan_token - 1) * E + e;
        CHECK(got[i] != got[i], "the token's logits are NaN");
        got[i] = 0;
        exact[i] = sum[i] = 0;
    }
    CHECK_CLOSE_SUM("logits", got, E, exact, sum, c->H, T, E);
    TFREE(exact, sum, got);
}

/* Compares the logits, and the gate on the logits that the device has. Sets ids and weights. */
static void compare_gate(const layer_bufs* b, const layer_case* c, layer_result* res)
{
    const int64_t T = c->T, K = c->K, slots = T * K;
    const moe_layer_view* v = &res->view;
    double* want = (double*)test_host(slots * 8);
    int32_t* want_ids = (int32_t*)test_host(slots * 4);
    moe_ref_gate_desc g = {};
    g.logits = c->from == FROM_ROUTER ? in_copy(b, res->workspace, v->logits) : b->h_logits;
    g.logits_dtype = MOE_FP32, g.num_tokens = c->T, g.num_experts = c->E, g.top_k = c->K;
    g.score = c->score, g.renormalize = c->renormalize, g.scale = c->scale;
    res->ids = b->h_ids, res->weights = b->h_weights;
    if (c->from != FROM_ROUTER) CHECK(v->logits == b->d.logits, "the caller's own logits");
    else if (!c->sampled) compare_logits(b, c, (const float*)g.logits);
    if (c->from == FROM_IDS) {
        CHECK(v->ids == b->d.ids && v->weights == b->d.weights, "the caller's own choice");
    } else {
        res->ids = (const int32_t*)in_copy(b, res->workspace, v->ids);
        res->weights = (const float*)in_copy(b, res->workspace, v->weights);
        if (!c->rules) {
            moe_ref_gate_f64(&g, want_ids, want, 0, 0);
            CHECK_INTS("ids", res->ids, want_ids, slots);
            CHECK_CLOSE_RELATIVE("weights", res->weights, MOE_FP32, K, want, 4e-6, T, K);
        }
    }
    TFREE(want, want_ids);
}

/* Compares the route exactly, on the device's ids. Sets went. Returns the first slot with a bad id,
   or -1. */
static int64_t compare_route(const layer_bufs* b, const layer_case* c, layer_result* res)
{
    const int64_t slots = (int64_t)c->T * c->K, P = physical(c), R = rows_of(c);
    const moe_layer_view* v = &res->view;
    int32_t *count = (int32_t*)test_host(P * 4), *drops = (int32_t*)test_host(P * 4);
    int32_t* offset = (int32_t*)test_host(P * 4 + 4);
    int32_t *row_slot = (int32_t*)test_host(R * 4), *slot_row = (int32_t*)test_host(slots * 4);
    float* row_weight = (float*)test_host(R * 4);
    moe_place* place = (moe_place*)test_host(slots * 8);
    moe_ref_route_desc r = {};
    int64_t bad;
    r.ids = res->ids, r.weights = res->weights;
    r.expert_count = count, r.expert_offset = offset, r.drop_count = drops;
    r.slot_row = slot_row, r.row_slot = row_slot, r.row_weight = row_weight, r.place = place;
    r.num_tokens = c->T, r.num_experts = c->E, r.top_k = c->K, r.max_rows = R;
    r.row_multiple = c->row_multiple, r.capacity = c->capacity, r.drop_rule = c->drop_rule;
    r.num_replicas = c->replicas, r.absent_replicas = c->absent;
    r.replica_offset = c->replicas ? b->h_replica_offset : (int32_t*)0;
    r.replica_expert = c->replicas ? b->h_replica_expert : (int32_t*)0;
    bad = moe_ref_route(&r);
    CHECK(bad != -2 && v->num_rows == R && v->num_physical == P, "%lld rows, not %lld",
          (long long)v->num_rows, (long long)R);
#define HELD(name) (const int32_t*)in_copy(b, res->workspace, v->name)
    CHECK_INTS("expert_count", HELD(expert_count), count, P);
    CHECK_INTS("expert_offset", HELD(expert_offset), offset, P + 1);
    CHECK_INTS("row_slot", HELD(row_slot), row_slot, R);
    CHECK_INTS("place", HELD(place), (const int32_t*)place, slots * 2);
#undef HELD
    if (c->outputs) {
        CHECK(tbuf_holds(&b->drop_count, drops) && tbuf_holds(&b->slot_row, slot_row) &&
                  tbuf_holds(&b->row_weight, row_weight),
              "an optional output of route");
        memset(count, 0, (size_t)P * 4);
        for (int64_t k = 0; k < slots; ++k)
            if (res->ids[k] >= 0 && res->ids[k] < c->E) ++count[res->ids[k]];
        if (c->from != FROM_IDS)
            CHECK(tbuf_holds(&b->gate_count, count), "the gate's expert_count");
    } else {
        CHECK(tbuf_holds(&b->drop_count, 0) && tbuf_holds(&b->slot_row, 0) &&
                  tbuf_holds(&b->row_weight, 0) && tbuf_holds(&b->gate_count, 0),
              "outputs that the descriptor does not name");
    }
    for (int64_t k = 0; k < slots; ++k) {
        int e = 0;
        while (slot_row[k] >= 0 && offset[e + 1] <= slot_row[k]) ++e;
        res->went[k] = slot_row[k] < 0 ? -1 : e;
    }
    TFREE(count, drops, offset, row_slot, slot_row, row_weight, place);
    return bad;
}

/* Compares y with the exact sums of the device's own rows, rounded once. */
static void compare_combine(const layer_bufs* b, const layer_case* c, const layer_result* res)
{
    const int64_t T = c->T, H = c->H;
    const moe_layer_view* v = &res->view;
    double *exact = (double*)test_host(T * H * 8), *bound = (double*)test_host(T * H * 8);
    moe_ref_combine_desc d = {};
    d.rows = in_copy(b, res->workspace, v->rows), d.rows_dtype = rows_dtype(c);
    d.place = (const moe_place*)in_copy(b, res->workspace, v->place), d.weights = res->weights;
    d.residual = residual_of(b, c, &d.residual_stride), d.residual_dtype = c->dtype;
    d.shared = c->shared ? in_copy(b, res->workspace, v->shared_rows) : (const void*)0;
    d.shared_weight = c->shared_weighted ? b->h_shared_weight : (float*)0;
    d.num_tokens = c->T, d.hidden = c->H, d.top_k = c->K;
    moe_ref_combine_f64(&d, exact, bound);
    for (int64_t i = 0; i < T * H; ++i) bound[i] = (double)(c->K + 2) * ldexp(bound[i], -23);
    trows_round_bound(bound, exact, T * H, c->dtype);
    test_within("y from rows", res->y, MOE_FP32, H, exact, bound, 1, T, H, __FILE__, __LINE__);
    TFREE(exact, bound);
}

/* Computes the whole layer in double: y, and y taken through the dtypes; ids and logits. */
static void ref_whole(const layer_bufs* b, const layer_case* c, double* exact, double* ideal,
                      int32_t* ids, double* logits)
{
    const int64_t T = c->T, E = c->E;
    const moe_ref_experts_desc mlp = tmlp_ref(&b->mlp, c->dtype, c->bias, c->bias);
    double* weights = (double*)test_host(T * c->K * 8);
    moe_ref_layer_desc d = {};
    d.x = b->h_x, d.x_stride = c->H + c->x_pad;
    d.router = b->h_router, d.router_dtype = c->router_dtype;
    d.logits = c->from == FROM_LOGITS ? b->h_logits : (void*)0;
    d.residual = residual_of(b, c, &d.residual_stride);
    d.w1 = mlp.w1, d.w2 = mlp.w2, d.bias1 = mlp.bias1, d.bias2 = mlp.bias2;
    d.x_dtype = d.w_dtype = d.residual_dtype = d.bias_dtype = c->dtype;
    d.num_tokens = c->T, d.num_experts = c->E, d.top_k = c->K;
    d.hidden = c->H, d.intermediate = c->I;
    d.score = c->score, d.renormalize = c->renormalize, d.scale = c->scale;
    d.activation = c->activation, d.alpha = c->alpha, d.limit = c->limit, d.gate_up = c->gate_up;
    if (c->shared) d.shared = ref_shared(b, c);
    d.route.row_multiple = c->row_multiple;
    d.route.num_replicas = c->replicas, d.route.absent_replicas = c->absent;
    d.route.replica_offset = c->replicas ? b->h_replica_offset : (int32_t*)0;
    d.route.replica_expert = c->replicas ? b->h_replica_expert : (int32_t*)0;
    CHECK(moe_ref_layer_f64(&d, exact, ids, weights) == 0, "memory");
    d.act_dtype = c->dtype, d.rows_dtype = rows_dtype(c);
    CHECK(moe_ref_layer_f64(&d, ideal, 0, 0) == 0, "memory");
    if (c->from == FROM_LOGITS) {
        for (int64_t i = 0; i < T * E; ++i) logits[i] = ((const float*)b->h_logits)[i];
    } else {
        moe_ref_router_desc r = {};
        r.x = b->h_x, r.x_stride = d.x_stride, r.x_dtype = c->dtype;
        r.w = b->h_router, r.w_dtype = c->router_dtype;
        r.num_tokens = c->T, r.num_experts = c->E, r.hidden = c->H;
        moe_ref_router_f64(&r, logits);
    }
    free(weights);
}

/* Compares y with the whole layer in double, for the tokens whose choice no rounding of the logits
   can change. bound and size [T, H]: of y from the device's own ids and weights. */
static void compare_whole(const layer_bufs* b, const layer_case* c, const layer_result* res,
                          const double* bound, const double* size)
{
    const int64_t T = c->T, E = c->E, K = c->K, H = c->H;
    double *exact = (double*)test_host(T * H * 8), *ideal = (double*)test_host(T * H * 8);
    double *logits = (double*)test_host(T * E * 8), *each = (double*)test_host(T * H * 8);
    float* got = (float*)test_host(T * H * 4);
    int32_t* want = (int32_t*)test_host(T * K * 4);
    int64_t clear = 0, wrong = 0;
    ref_whole(b, c, exact, ideal, want, logits);
    for (int64_t t = 0; t < T; ++t) {
        const double* l = logits + t * E;
        double closest = 1; /* of a chosen logit to any other */
        for (int64_t k = 0; k < K; ++k)
            for (int64_t e = 0; e < E; ++e)
                if (e != want[t * K + k] && fabs(l[want[t * K + k]] - l[e]) < closest)
                    closest = fabs(l[want[t * K + k]] - l[e]);
        if (closest < 1e-4) continue;
        wrong += memcmp(want + t * K, res->ids + t * K, (size_t)K * 4) != 0;
        memmove(exact + clear * H, exact + t * H, (size_t)H * 8);
        for (int64_t h = 0; h < H; ++h) {
            ideal[clear * H + h] = test_rounded(ideal[t * H + h], c->dtype);
            got[clear * H + h] = res->y[t * H + h];
            each[clear * H + h] = bound[t * H + h] + ldexp(size[t * H + h], -11); /* of weights */
        }
        ++clear;
    }
    CHECK(wrong == 0, "%lld tokens go to other experts", (long long)wrong);
    CHECK(2 * clear >= T, "%lld of %lld tokens are clear", (long long)clear, (long long)T);
    CHECK_CLOSE_BOTH("y of the whole layer", got, exact, ideal, each, clear, H);
    TFREE(exact, ideal, logits, each, got, want);
}

/* Compares y with the experts and combine in double, on the device's own choice; for every so many
   tokens where the case says so. */
static void compare_y(const layer_bufs* b, const layer_case* c, const layer_result* res)
{
    const int64_t T = c->T, K = c->K, H = c->H, step = c->sampled ? c->sampled : 1;
    const int64_t n = (T + step - 1) / step;
    int32_t* pick = (int32_t*)test_host(n * 4);
    double *exact = (double*)test_host(n * H * 8), *ideal = (double*)test_host(n * H * 8);
    double *bound = (double*)test_host(n * H * 8), *size = (double*)test_host(n * H * 8);
    float* got = (float*)test_host(n * H * 4);
    int64_t wrong = 0, stride;
    const void* residual = residual_of(b, c, &stride);
    for (int64_t i = 0; i < n; ++i) pick[i] = (int32_t)(i * step);
    ref_y(b, c, res->went, res->weights, pick, n, 0, exact, bound, size);
    ref_y(b, c, res->went, res->weights, pick, n, c->dtype, ideal, 0, 0);
    test_round_all(ideal, ideal, n * H, c->dtype);
    for (int64_t i = 0; i < n; ++i) {
        int live = c->shared;
        for (int64_t k = 0; k < K; ++k) live |= res->went[pick[i] * K + k] >= 0;
        for (int64_t h = 0; h < H; ++h) {
            const float alone = residual ? moe_load(residual, pick[i] * stride + h, c->dtype) : 0;
            got[i * H + h] = res->y[pick[i] * H + h];
            wrong += !live && got[i * H + h] != alone;
        }
    }
    CHECK(wrong == 0, "a token with no expert is its residual, or 0");
    CHECK_CLOSE_BOTH("y", got, exact, ideal, bound, n, H);
    if (c->from != FROM_IDS && !c->nan_token && !c->sampled && !c->capacity && !c->rules)
        compare_whole(b, c, res, bound, size);
    TFREE(pick, exact, ideal, bound, size, got);
}

/* Were the inputs left as they are on the host? */
static int inputs_same(const layer_bufs* b, const layer_case* c)
{
    return (c->y_is_x || tbuf_holds(&b->x, b->h_x)) && tbuf_holds(&b->router, b->h_router) &&
           tbuf_holds(&b->logits, b->h_logits) && tbuf_holds(&b->ids, b->h_ids) &&
           tbuf_holds(&b->weights, b->h_weights) && tmlp_same(&b->mlp) && tmlp_same(&b->shared) &&
           tbuf_holds(&b->residual, b->h_residual) &&
           tbuf_holds(&b->shared_weight, b->h_shared_weight) &&
           tbuf_holds(&b->replica_offset, b->h_replica_offset) &&
           tbuf_holds(&b->replica_expert, b->h_replica_expert);
}

/* Compares what a run left, station after station. */
static void compare(const layer_bufs* b, const layer_case* c)
{
    const int before = test_now.failures, nan = c->nan_token && c->from != FROM_IDS;
    const int64_t T = c->T, H = c->H, y_stride = b->d.y_stride ? b->d.y_stride : H;
    const tbuf* y_buf = c->y_is_x ? &b->x : &b->y;
    void* y = tbuf_copy(y_buf);
    const int64_t gaps = test_strays(y, (int64_t)y_buf->bytes, 2, y_stride, H, 0, T);
    layer_result res = {};
    int64_t bad;
    res.workspace = tbuf_copy(&b->workspace);
    res.went = (int32_t*)test_host(T * c->K * 4);
    res.y = (float*)test_host(T * H * 4);
    CHECK_STATUS(moe_layer_get_view(&b->d, &res.view), MOE_OK);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t h = 0; h < H; ++h) res.y[t * H + h] = moe_load(y, t * y_stride + h, c->dtype);
    CHECK(gaps == 0, "%lld bytes between the rows of y were written", (long long)gaps);
    compare_gate(b, c, &res);
    bad = compare_route(b, c, &res);
    if (T > 0) compare_combine(b, c, &res);
    if (T > 0) compare_y(b, c, &res);
    CHECK_FAULT_AT(&b->fault, nan ? MOE_FAULT_NAN_LOGIT : MOE_FAULT_BAD_ID,
                   nan ? c->nan_token - 1 : bad);
    CHECK(inputs_same(b, c), "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    TFREE(y, res.workspace, res.went, res.y);
}

/* Runs and compares a case whose buffers the test has changed, and frees them. */
MOEI_UNUSED static void run_bufs(layer_bufs* b, const layer_case* c)
{
    CHECK_STATUS(moe_layer_forward(&b->d, test_now.stream), MOE_OK);
    compare(b, c);
    bufs_free(b);
}

/* Draws, runs and compares a case. Requires its refusal where this binary has no code for it. */
MOEI_UNUSED static void run_case(const layer_case* c, trand* r)
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

#endif
