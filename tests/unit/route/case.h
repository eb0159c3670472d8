/* case.h: a case of route: how ids, weights and replicas are drawn, its buffers, and how all
   outputs are compared with the reference.

   random_case, draw_options   draw a case without options, then its options
   case_new, bufs_new          make the buffers: of drawn inputs, of given ones
   launch                      queues route and compares
   compare                     compares all outputs, and the fault word
   run_case                    all of it */
#ifndef MOE_TESTS_ROUTE_CASE_H
#define MOE_TESTS_ROUTE_CASE_H

#include "tests/test.h"
#include "tests/test_rows.h"

#include "moe/ref/route.h"
#include "moe/route.cuh"

/* What the ids look like. */
enum {
    UNIFORM,
    DISTINCT,   /* K different experts a token, where E allows it */
    ONE,        /* everything on one expert */
    SPARSE,     /* few experts are chosen, the others stay empty */
    DUPLICATES, /* a token names one expert several times */
    DROPPED,    /* half of the slots are -1 */
    ALL_DROPPED,
    BAD, /* some ids are outside -1 .. E-1 */
    PATTERNS
};

typedef struct route_case {
    int T, E, K, pattern, place_kind;
    int counts; /* 1: chunk_count is given */
    int bare;   /* 1: only the counts and the offsets are given, and no fault word */
    int multiple, capacity, rule; /* row_multiple, capacity, drop_rule */
    int replicas; /* 0: none, 1: in replica_expert, 2: their own numbers, 3: some out of range,
                     4: some experts have none, or one of -1 */
    int P;        /* physical experts, E without replicas */
    int drops;    /* 1: drop_count is given */
    int absent;   /* absent_replicas */
    int32_t *replica_offset, *replica_expert;
} route_case;

typedef struct route_bufs {
    tbuf ids, weights, chunk, count, offset, slot_row, row_slot, row_weight, place, workspace,
        fault, drops, replica_offset, replica_expert;
    int32_t* h_ids;   /* [T, K] host copies of the inputs */
    float* h_weights; /* [T, K] */
    int64_t rows;     /* of row_slot and row_weight */
    moe_route_desc d;
} route_bufs;

/* Bytes of one buffer in a workspace. */
#define CARVED(bytes) (((bytes) + 255) / 256 * 256)

static void fill_ids(int32_t* ids, const route_case* c, trand* r)
{
    const int64_t slots = (int64_t)c->T * c->K;
    const int one = (int)trand_int(r, 0, c->E - 1);
    for (int64_t s = 0; s < slots; ++s) {
        int64_t id = trand_int(r, 0, c->E - 1);
        const int64_t u = trand_int(r, 0, 99);
        if (c->pattern == DISTINCT) id = (one + s / c->K * 7 + s % c->K) % c->E;
        if (c->pattern == ONE) id = one;
        if (c->pattern == SPARSE) id = id % 5 * (c->E / 5 > 0 ? c->E / 5 : 1) % c->E;
        if (c->pattern == DUPLICATES && s % c->K && u < 60) id = ids[s - 1];
        if (c->pattern == DROPPED && u < 50) id = -1;
        if (c->pattern == ALL_DROPPED) id = -1;
        if (c->pattern == BAD) {
            if (u < 2) id = c->E;
            else if (u < 4) id = -2;
            else if (u < 5) id = INT32_MAX;
            else if (u < 6) id = INT32_MIN;
            else if (u < 8) id = -1;
        }
        ids[s] = (int32_t)id;
    }
}

/* Draws weights: all different, or with many equals, or with NaN, infinities and both zeros. */
static void fill_weights(float* weights, int64_t n, trand* r)
{
    static const float special[] = {NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-42f, 1.0f};
    const int kind = (int)trand_int(r, 0, 3);
    if (kind == 1) trand_fill_int(r, weights, n, MOE_FP32, -2, 2);
    else trand_fill_normal(r, weights, n, MOE_FP32);
    for (int64_t i = 0; i < n && kind > 1; ++i) {
        if (kind == 2) weights[i] = 1.0f + weights[i] * 1e-6f; /* equal but in the last bits */
        else if (trand_int(r, 0, 2) == 0) weights[i] = special[trand_int(r, 0, 7)];
    }
}

/* Draws ids as the pattern says, and normal weights. */
static void draw_slots(int32_t* ids, float* weights, const route_case* c, trand* r)
{
    fill_ids(ids, c, r);
    trand_fill_normal(r, weights, (int64_t)c->T * c->K, MOE_FP32);
}

/* Draws the replicas of a case. Each expert has at least one where P allows it. Kind 3 puts some
   numbers out of range; kind 4 gives some experts none, or -1, and nothing is out of range. */
static void fill_replicas(route_case* c, trand* r)
{
    int at = 0;
    c->replica_offset = (int32_t*)test_host((c->E + 1) * 4);
    c->replica_expert = (int32_t*)test_host(c->P * 4);
    for (int e = 0; e < c->E; ++e) {
        const int spare = c->P - at - (c->E - 1 - e); /* the experts after e need one each */
        c->replica_offset[e] = at;
        if (spare > 0) at += 1 + (int)(trand_int(r, 0, 2) ? 0 : trand_int(r, 0, spare - 1));
    }
    c->replica_offset[c->E] = at;
    for (int i = 0; i < c->P; ++i) {
        const int j = (int)trand_int(r, 0, i);
        if (i != j) c->replica_expert[i] = c->replica_expert[j];
        c->replica_expert[j] = i;
    }
    if (c->replicas == 4) {
        const int32_t first = c->replica_offset[c->E / 2], end = c->replica_offset[c->E / 2 + 1];
        for (int e = c->E / 2 + 1; e <= c->E; ++e) c->replica_offset[e] -= end - first;
        for (int n = 0; n < 3; ++n) c->replica_expert[trand_int(r, 0, c->P - 1)] = -1;
    }
    if (c->replicas != 3) return;
    for (int n = 0; n < 3; ++n) {
        static const int32_t bad[] = {-1, INT32_MIN, INT32_MAX};
        c->replica_expert[trand_int(r, 0, c->P - 1)] = n ? bad[trand_int(r, 0, 2)] : c->P;
        c->replica_offset[trand_int(r, 0, c->E)] =
            trand_int(r, 0, 1) ? bad[trand_int(r, 0, 2)] : (int32_t)trand_int(r, 0, c->P + 1);
    }
}

/* Puts the counts of each chunk into chunk_count, as the gate leaves them. */
static void put_chunks(route_bufs* b, const route_case* c)
{
    const int64_t chunks = moe_num_chunks(c->T);
    int32_t* chunk = (int32_t*)test_host((int64_t)b->chunk.bytes);
    for (int64_t i = 0; i < c->E * chunks; ++i) chunk[i] = 0;
    for (int64_t s = 0; s < (int64_t)c->T * c->K; ++s)
        if (b->h_ids[s] >= 0 && b->h_ids[s] < c->E)
            ++chunk[s / c->K / moe_chunk_tokens(c->T) * c->E + b->h_ids[s]];
    tbuf_put(&b->chunk, chunk);
    free(chunk);
}

/* Copies n numbers of 4 bytes. */
static void* copy4(const void* from, size_t n)
{
    void* p = test_host((int64_t)n * 4);
    memcpy(p, from, n * 4);
    return p;
}

/* Makes the buffers of a case with these ids and weights. */
static void bufs_new(route_bufs* b, const route_case* c, const int32_t* ids, const float* weights)
{
    const size_t slots = (size_t)c->T * (size_t)c->K, P = (size_t)c->P;
    const size_t own = c->counts ? 0 : CARVED(P * (size_t)moe_num_chunks(c->T) * 4);
    size_t want = 0, expected = own;
    memset(&b->d, 0, sizeof b->d);
    b->h_ids = (int32_t*)copy4(ids, slots);
    b->h_weights = (float*)copy4(weights, slots);
    b->d.num_tokens = c->T;
    b->d.num_experts = c->E;
    b->d.top_k = c->K;
    b->d.place_kind = c->place_kind;
    b->d.row_multiple = c->multiple;
    b->d.capacity = c->capacity;
    b->d.drop_rule = c->rule;
    b->d.absent_replicas = c->absent;
    if (c->replicas) b->d.num_replicas = c->P;
    b->replica_offset =
        tbuf_from("replica_offset", c->replica_offset, c->replicas ? (size_t)c->E * 4 + 4 : 0, 4);
    b->replica_expert = tbuf_from("replica_expert", c->replica_expert, c->replicas ? P * 4 : 0, 4);
    if (c->replicas) b->d.replica_offset = (const int32_t*)b->replica_offset.p;
    if (c->replicas && c->replicas != 2) b->d.replica_expert = (const int32_t*)b->replica_expert.p;
    b->chunk = tbuf_new("chunk_count", P * (size_t)moe_num_chunks(c->T) * 4, 4);
    if (c->counts) {
        put_chunks(b, c);
        b->d.chunk_count = (int32_t*)b->chunk.p;
    }
    CHECK_STATUS(moe_route_workspace(&b->d, &want), MOE_OK);
    if (c->rule == MOE_DROP_BY_WEIGHT)
        expected = own + CARVED(P * 4) + CARVED(P * 4 + 4) + 2 * CARVED(slots * 4);
    CHECK(want == expected, "workspace of %zu bytes, expected %zu", want, expected);
    CHECK_STATUS(moe_route_max_rows(&b->d, &b->rows), MOE_OK);
    b->ids = tbuf_from("ids", ids, slots * 4, 4);
    b->weights = tbuf_from("weights", weights, slots * 4, 8);
    b->count = tbuf_new("expert_count", P * 4, 4);
    b->offset = tbuf_new("expert_offset", P * 4 + 4, 12);
    b->drops = tbuf_new("drop_count", P * 4, 8);
    b->slot_row = tbuf_new("slot_row", slots * 4, 4);
    b->row_slot = tbuf_new("row_slot", (size_t)b->rows * 4, 0);
    b->row_weight = tbuf_new("row_weight", (size_t)b->rows * 4, 4);
    b->place = tbuf_new("place", slots * 8, 8);
    b->workspace = tbuf_new("workspace", want, 16);
    b->fault = tfault_new(0);
    b->d.ids = (const int32_t*)b->ids.p;
    b->d.expert_count = (int32_t*)b->count.p;
    b->d.expert_offset = (int32_t*)b->offset.p;
    if (c->drops) b->d.drop_count = (int32_t*)b->drops.p;
    if (!c->bare || c->rule == MOE_DROP_BY_WEIGHT) b->d.weights = (const float*)b->weights.p;
    if (!c->bare) {
        b->d.slot_row = (int32_t*)b->slot_row.p;
        b->d.row_slot = (int32_t*)b->row_slot.p;
        b->d.row_weight = (float*)b->row_weight.p;
        b->d.place = (moe_place*)b->place.p;
        b->d.fault = (uint64_t*)b->fault.p;
        b->d.rank = TEST_RANK;
    }
    b->d.workspace = want ? b->workspace.p : 0;
    b->d.workspace_bytes = want;
}

/* The outputs and the workspace, for TBUFS. */
#define OUTPUTS(b)                                                                                 \
    &(b)->count, &(b)->offset, &(b)->slot_row, &(b)->row_slot, &(b)->row_weight, &(b)->place,      \
        &(b)->workspace, &(b)->drops

static void bufs_free(route_bufs* b)
{
    tbufs_free(TBUFS(OUTPUTS(b), &b->ids, &b->weights, &b->chunk, &b->fault, &b->replica_offset,
                     &b->replica_expert));
    free(b->h_ids);
    free(b->h_weights);
}

/* Compares all outputs and the fault word with the reference. */
static void compare(const route_bufs* b, const route_case* c)
{
    const int64_t slots = (int64_t)c->T * c->K;
    const int before = test_now.failures;
    moe_ref_route_desc r;
    int64_t bad, bad_replica;
    memset(&r, 0, sizeof r);
    r.ids = b->h_ids;
    r.weights = b->h_weights;
    r.expert_count = (int32_t*)test_host(c->P * 4);
    r.expert_offset = (int32_t*)test_host(c->P * 4 + 4);
    r.drop_count = (int32_t*)test_host(c->P * 4);
    r.slot_row = (int32_t*)test_host(slots * 4);
    r.row_slot = (int32_t*)test_host(b->rows * 4);
    r.row_weight = (float*)test_host(b->rows * 4);
    r.place = (moe_place*)test_host(slots * 8);
    r.num_tokens = c->T;
    r.num_experts = c->E;
    r.top_k = c->K;
    r.place_kind = c->place_kind;
    r.row_multiple = c->multiple;
    r.capacity = c->capacity;
    r.drop_rule = c->rule;
    r.max_rows = b->rows;
    r.bad_replica = &bad_replica;
    r.absent_replicas = c->absent;
    if (c->replicas) {
        r.num_replicas = c->P;
        r.replica_offset = c->replica_offset;
        r.replica_expert = c->replicas == 2 ? 0 : c->replica_expert;
    }
    bad = moe_ref_route(&r);
    CHECK(bad != -2, "the rows pass moe_route_max_rows, %lld", (long long)b->rows);
    tbuf_compare(&b->count, r.expert_count);
    tbuf_compare(&b->offset, r.expert_offset);
    if (c->drops) tbuf_compare(&b->drops, r.drop_count);
    else CHECK(tbuf_holds(&b->drops, 0), "drop_count was not given");
    if (c->bare) {
        CHECK(tbuf_holds(&b->slot_row, 0) && tbuf_holds(&b->row_slot, 0) &&
                  tbuf_holds(&b->row_weight, 0) && tbuf_holds(&b->place, 0),
              "outputs that were not given");
        CHECK_FAULT(&b->fault, MOE_FAULT_NONE, 0);
    } else {
        tbuf_compare(&b->slot_row, r.slot_row);
        tbuf_compare(&b->row_slot, r.row_slot);
        tbuf_compare(&b->row_weight, r.row_weight);
        tbuf_compare(&b->place, r.place);
        if (bad < 0 && bad_replica >= 0) CHECK_FAULT(&b->fault, MOE_FAULT_BAD_REPLICA, bad_replica);
        else CHECK_FAULT_AT(&b->fault, MOE_FAULT_BAD_ID, bad);
    }
    if (test_now.failures > before)
        printf("  in: T=%d E=%d K=%d pattern=%d place_kind=%d counts=%d bare=%d multiple=%d "
               "capacity=%d rule=%d replicas=%d P=%d drops=%d absent=%d\n",
               c->T, c->E, c->K, c->pattern, c->place_kind, c->counts, c->bare, c->multiple,
               c->capacity, c->rule, c->replicas, c->P, c->drops, c->absent);
    free(r.expert_count), free(r.expert_offset), free(r.drop_count), free(r.slot_row);
    free(r.row_slot), free(r.row_weight), free(r.place);
}

/* Queues route and compares. */
static void launch(const route_bufs* b, const route_case* c)
{
    CHECK_STATUS(moe_route(&b->d, test_now.stream), MOE_OK);
    compare(b, c);
}

/* Draws the inputs of a case and makes its buffers. */
static void case_new(route_bufs* b, route_case* c, trand* r)
{
    const int64_t slots = (int64_t)c->T * c->K;
    int32_t* ids = (int32_t*)test_host(slots * 4);
    float* weights = (float*)test_host(slots * 4);
    if (c->replicas) fill_replicas(c, r);
    fill_ids(ids, c, r);
    fill_weights(weights, slots, r);
    bufs_new(b, c, ids, weights);
    free(ids), free(weights);
}

/* Draws, runs and compares a case. */
static void run_case(const route_case* given, trand* r)
{
    route_case c = *given;
    route_bufs b;
    case_new(&b, &c, r);
    launch(&b, &c);
    CHECK(tbuf_holds(&b.ids, b.h_ids) && tbuf_holds(&b.weights, b.h_weights),
          "an input was written");
    if (c.replicas)
        CHECK(tbuf_holds(&b.replica_offset, c.replica_offset) &&
                  tbuf_holds(&b.replica_expert, c.replica_expert),
              "an input was written");
    bufs_free(&b);
    free(c.replica_offset), free(c.replica_expert);
}

/* Draws a case without options. */
static route_case random_case(trand* r, int T, int E, int K)
{
    route_case c;
    memset(&c, 0, sizeof c);
    c.T = T, c.E = c.P = E, c.K = K;
    c.pattern = (int)trand_int(r, 0, PATTERNS - 1);
    c.place_kind = (int)trand_int(r, 0, 2);
    c.counts = (int)trand_int(r, 0, 1);
    c.bare = trand_one_in(r, 8);
    return c;
}

/* Draws a case whose outputs are all given, without options and without chunk_count. */
static route_case full_case(trand* r, int T, int E, int K)
{
    route_case c = random_case(r, T, E, K);
    c.bare = c.counts = 0;
    return c;
}

/* Draws the options of a case. */
static void draw_options(route_case* c, trand* r)
{
    static const int multiple[] = {0, 0, 1, 2, 3, 8, 16, 100, 128, MOE_ROUTE_MAX_MULTIPLE};
    const int average = (int)((int64_t)c->T * c->K / c->E);
    c->multiple = multiple[trand_int(r, 0, 9)];
    c->drops = (int)trand_int(r, 0, 1);
    if (trand_int(r, 0, 3)) {
        c->capacity = (int)trand_int(r, 1, average < 1 ? 2 : 2 * average);
        if (trand_one_in(r, 10)) c->capacity = INT32_MAX;
        c->rule = (int)trand_int(r, 0, 2);
        if (trand_int(r, 0, 1)) c->rule = MOE_DROP_BY_WEIGHT;
    }
    c->replicas = (int)trand_int(r, 0, 4);
    if (c->replicas) {
        c->P = c->E + (int)trand_int(r, 0, c->E < 8 ? 8 : c->E / 2);
        if (trand_one_in(r, 10)) c->P = (int)trand_int(r, 1, c->E); /* some have none */
        if (c->P > MOE_MAX_EXPERTS) c->P = MOE_MAX_EXPERTS;
        c->counts = 0;
        c->absent = c->replicas == 4 || (c->replicas == 3 && trand_int(r, 0, 1));
    }
}

#endif
