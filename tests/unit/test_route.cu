/* test_route.cu: moe/route.cuh against its reference, and handed the counts of moe/gate.cuh.

     nvcc -I. -arch=sm_90a tests/unit/test_route.cu -o test_route
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_route.cu -o test_route */
#include "tests/test.h"

#include "moe/gate.cuh"
#include "moe/ref/route.h"
#include "moe/route.cuh"

/* What the ids look like. */
enum {
    UNIFORM,
    DISTINCT,   /* K different experts a token, where there are as many */
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
    int bare;   /* 1: only the counts and the offsets are wanted, and there is no fault word */
    int multiple, capacity, rule; /* row_multiple, capacity, drop_rule */
    int replicas; /* 0: none, 1: in replica_expert, 2: their own numbers, 3: some out of range,
                     4: some experts have none, or one of -1 */
    int P;        /* physical experts, E without replicas */
    int drops;    /* 1: drop_count is wanted */
    int absent;   /* absent_replicas */
    int32_t *replica_offset, *replica_expert;
} route_case;

typedef struct route_bufs {
    tbuf ids, weights, chunk, count, offset, slot_row, row_slot, row_weight, place, workspace,
        fault, drops, replica_offset, replica_expert;
    int64_t rows; /* of row_slot and row_weight */
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

/* Weights: all different, or with many equals, or with NaN, infinities and both zeros. */
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

/* The replicas of a case: each expert has at least one where there are enough, and with kind 3 some
   have numbers out of range; with kind 4 some have none, or -1, and nothing is out of range. */
static void fill_replicas(route_case* c, trand* r)
{
    int at = 0;
    c->replica_offset = (int32_t*)test_host((c->E + 1) * 4);
    c->replica_expert = (int32_t*)test_host(c->P * 4);
    for (int e = 0; e < c->E; ++e) {
        const int spare = c->P - at - (c->E - 1 - e); /* what the experts behind can do without */
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

/* The counts of each chunk, as the gate leaves them. */
static void count_chunks(int32_t* chunk, const int32_t* ids, const route_case* c)
{
    const int64_t chunks = moe_num_chunks(c->T);
    for (int64_t i = 0; i < c->E * chunks; ++i) chunk[i] = 0;
    for (int64_t s = 0; s < (int64_t)c->T * c->K; ++s)
        if (ids[s] >= 0 && ids[s] < c->E)
            ++chunk[s / c->K / moe_chunk_tokens(c->T) * c->E + ids[s]];
}

static void bufs_new(route_bufs* b, const route_case* c, const int32_t* ids, const float* weights)
{
    const size_t slots = (size_t)c->T * (size_t)c->K, P = (size_t)c->P;
    const size_t own = c->counts ? 0 : CARVED(P * (size_t)moe_num_chunks(c->T) * 4);
    size_t want = 0, expected = own;
    memset(&b->d, 0, sizeof b->d);
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
    if (c->replicas && c->replicas != 2)
        b->d.replica_expert = (const int32_t*)b->replica_expert.p;
    b->chunk = tbuf_new("chunk_count", P * (size_t)moe_num_chunks(c->T) * 4, 4);
    if (c->counts) {
        int32_t* chunk = (int32_t*)test_host((int64_t)b->chunk.bytes);
        count_chunks(chunk, ids, c);
        tbuf_put(&b->chunk, chunk);
        b->d.chunk_count = (int32_t*)b->chunk.p;
        free(chunk);
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

static void bufs_poison(route_bufs* b)
{
    tbuf_poison(&b->count);
    tbuf_poison(&b->offset);
    tbuf_poison(&b->slot_row);
    tbuf_poison(&b->row_slot);
    tbuf_poison(&b->row_weight);
    tbuf_poison(&b->place);
    tbuf_poison(&b->drops);
    tbuf_poison(&b->workspace);
}

/* Are all outputs as bufs_poison left them? */
static int bufs_untouched(const route_bufs* b)
{
    return tbuf_holds(&b->count, 0) && tbuf_holds(&b->offset, 0) && tbuf_holds(&b->slot_row, 0) &&
           tbuf_holds(&b->row_slot, 0) && tbuf_holds(&b->row_weight, 0) &&
           tbuf_holds(&b->place, 0) && tbuf_holds(&b->drops, 0) && tbuf_holds(&b->workspace, 0);
}

static void bufs_free(route_bufs* b)
{
    tbuf_free(&b->ids);
    tbuf_free(&b->weights);
    tbuf_free(&b->chunk);
    tbuf_free(&b->count);
    tbuf_free(&b->offset);
    tbuf_free(&b->slot_row);
    tbuf_free(&b->row_slot);
    tbuf_free(&b->row_weight);
    tbuf_free(&b->place);
    tbuf_free(&b->workspace);
    tbuf_free(&b->fault);
    tbuf_free(&b->drops);
    tbuf_free(&b->replica_offset);
    tbuf_free(&b->replica_expert);
}

static void compare_buffer(const tbuf* b, const void* want)
{
    void* got = tbuf_copy(b);
    CHECK_INTS(b->name, (const int32_t*)got, (const int32_t*)want, (int64_t)(b->bytes / 4));
    free(got);
}

static void compare(const route_bufs* b, const route_case* c, const int32_t* ids,
                    const float* weights)
{
    const int64_t slots = (int64_t)c->T * c->K;
    const int before = test_now.failures;
    moe_ref_route_desc r;
    int64_t bad, bad_replica;
    memset(&r, 0, sizeof r);
    r.ids = ids;
    r.weights = weights;
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
    compare_buffer(&b->count, r.expert_count);
    compare_buffer(&b->offset, r.expert_offset);
    if (c->drops) compare_buffer(&b->drops, r.drop_count);
    else CHECK(tbuf_holds(&b->drops, 0), "drop_count was not given");
    if (c->bare) {
        CHECK(tbuf_holds(&b->slot_row, 0) && tbuf_holds(&b->row_slot, 0) &&
                  tbuf_holds(&b->row_weight, 0) && tbuf_holds(&b->place, 0),
              "outputs that were not given");
        CHECK_FAULT(&b->fault, MOE_FAULT_NONE, 0);
    } else {
        compare_buffer(&b->slot_row, r.slot_row);
        compare_buffer(&b->row_slot, r.row_slot);
        compare_buffer(&b->row_weight, r.row_weight);
        compare_buffer(&b->place, r.place);
        if (bad < 0 && bad_replica >= 0)
            CHECK_FAULT(&b->fault, MOE_FAULT_BAD_REPLICA, bad_replica);
        else
            CHECK_FAULT(&b->fault, bad < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_ID, bad < 0 ? 0 : bad);
    }
    if (test_now.failures > before)
        printf("  in: T=%d E=%d K=%d pattern=%d place_kind=%d counts=%d bare=%d multiple=%d "
               "capacity=%d rule=%d replicas=%d P=%d drops=%d absent=%d\n",
               c->T, c->E, c->K, c->pattern, c->place_kind, c->counts, c->bare, c->multiple,
               c->capacity, c->rule, c->replicas, c->P, c->drops, c->absent);
    free(r.expert_count);
    free(r.expert_offset);
    free(r.drop_count);
    free(r.slot_row);
    free(r.row_slot);
    free(r.row_weight);
    free(r.place);
}

/* Draws the inputs of a case and makes its buffers. */
static void case_new(route_bufs* b, route_case* c, trand* r, int32_t** ids, float** weights)
{
    const int64_t slots = (int64_t)c->T * c->K;
    if (c->replicas) fill_replicas(c, r);
    *ids = (int32_t*)test_host(slots * 4);
    *weights = (float*)test_host(slots * 4);
    fill_ids(*ids, c, r);
    fill_weights(*weights, slots, r);
    bufs_new(b, c, *ids, *weights);
}

static void run_case(const route_case* wanted, trand* r)
{
    route_case own = *wanted, *c = &own;
    int32_t* ids;
    float* weights;
    route_bufs b;
    case_new(&b, c, r, &ids, &weights);
    CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
    compare(&b, c, ids, weights);
    CHECK(tbuf_holds(&b.ids, ids) && tbuf_holds(&b.weights, weights), "an input was written");
    if (c->replicas)
        CHECK(tbuf_holds(&b.replica_offset, c->replica_offset) &&
                  tbuf_holds(&b.replica_expert, c->replica_expert),
              "an input was written");
    bufs_free(&b);
    free(c->replica_offset);
    free(c->replica_expert);
    free(ids);
    free(weights);
}

/* No options. */
static route_case random_case(trand* r, int T, int E, int K)
{
    route_case c;
    memset(&c, 0, sizeof c);
    c.P = E;
    c.T = T;
    c.E = E;
    c.K = K;
    c.pattern = (int)trand_int(r, 0, PATTERNS - 1);
    c.place_kind = (int)trand_int(r, 0, 2);
    c.counts = (int)trand_int(r, 0, 1);
    c.bare = trand_int(r, 0, 7) == 0;
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
        if (trand_int(r, 0, 9) == 0) c->capacity = INT32_MAX;
        c->rule = (int)trand_int(r, 0, 2);
        if (trand_int(r, 0, 1)) c->rule = MOE_DROP_BY_WEIGHT;
    }
    c->replicas = (int)trand_int(r, 0, 4);
    if (c->replicas) {
        c->P = c->E + (int)trand_int(r, 0, c->E < 8 ? 8 : c->E / 2);
        if (trand_int(r, 0, 9) == 0) c->P = (int)trand_int(r, 1, c->E); /* some have none */
        if (c->P > MOE_MAX_EXPERTS) c->P = MOE_MAX_EXPERTS;
        c->counts = 0;
        c->absent = c->replicas == 4 || (c->replicas == 3 && trand_int(r, 0, 1));
    }
}

/* Every E of the list with every T of the list, the rest drawn. */
static void test_route_shapes(void)
{
    static const int Es[] = {1,   2,   3,   7,   8,   31,  32,  33,  64,  100,  128,
                             200, 255, 256, 257, 384, 513, 1000, 1024, 1500, 3000, 4096};
    static const int Ts[] = {0, 1, 2, 31, 32, 33, 63, 64, 65, 100};
    static const int Ks[] = {1, 2, 3, 4, 6, 7, 8, 9, 31, 32, 33, 40};
    trand r = trand_new(1);
    for (size_t i = 0; i < sizeof Es / sizeof *Es; ++i)
        for (size_t j = 0; j < sizeof Ts / sizeof *Ts; ++j)
            for (int n = 0; n < (Es[i] > 64 ? 1 : 3); ++n) {
                const route_case c = random_case(&r, Ts[j], Es[i], Ks[trand_int(&r, 0, 11)]);
                if (MOE_ON_HOST && Es[i] > 64 && (i + j) % (Es[i] > 384 ? 10 : 2)) continue;
                run_case(&c, &r);
            }
}

/* The same with all options drawn. */
static void test_route_options_shapes(void)
{
    static const int Es[] = {1, 2, 3, 7, 8, 31, 33, 64, 100, 128, 257, 384, 1000, 1500, 3000, 4096};
    static const int Ts[] = {0, 1, 2, 31, 32, 33, 64, 65, 100, 300};
    static const int Ks[] = {1, 2, 3, 4, 6, 7, 8, 9, 31, 32, 33, 40};
    trand r = trand_new(21);
    for (size_t i = 0; i < sizeof Es / sizeof *Es; ++i)
        for (size_t j = 0; j < sizeof Ts / sizeof *Ts; ++j)
            for (int n = 0; n < (Es[i] > 64 ? 1 : MOE_ON_HOST ? 2 : 4); ++n) {
                route_case c = random_case(&r, Ts[j], Es[i], Ks[trand_int(&r, 0, 11)]);
                draw_options(&c, &r);
                if (MOE_ON_HOST && Es[i] > 64 && (i + j) % (Es[i] > 384 ? 8 : 2)) continue;
                run_case(&c, &r);
            }
}

/* Every pattern with every place kind, with and without counts given, in small and odd shapes. */
static void test_route_patterns(void)
{
    static const int shape[][3] = {{33, 8, 2}, {70, 64, 8}, {129, 100, 3}, {45, 70, 33}, {1, 1, 1},
                                   {97, 3, 5}};
    trand r = trand_new(2);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; ++i)
        for (int pattern = 0; pattern < PATTERNS; ++pattern)
            for (int kind = 0; kind <= MOE_PLACE_BY_EXPERT; ++kind)
                for (int counts = 0; counts < 2; ++counts) {
                    route_case c = random_case(&r, shape[i][0], shape[i][1], shape[i][2]);
                    c.pattern = pattern;
                    c.place_kind = kind;
                    c.counts = counts;
                    c.bare = 0;
                    run_case(&c, &r);
                }
}

/* Every pattern with every drop rule, with and without replicas and padding. */
static void test_route_options_patterns(void)
{
    static const int shape[][3] = {{70, 16, 8}, {97, 40, 3}, {45, 3, 33}};
    trand r = trand_new(22);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; ++i)
        for (int pattern = 0; pattern < PATTERNS; ++pattern)
            for (int rule = 0; rule <= MOE_DROP_BY_WEIGHT; ++rule)
                for (int replicas = 0; replicas < 5; ++replicas)
                    for (int multiple = 0; multiple <= 8; multiple += 8) {
                        route_case c = random_case(&r, shape[i][0], shape[i][1], shape[i][2]);
                        const int average = c.T * c.K / c.E;
                        c.pattern = pattern;
                        c.capacity = rule ? average * (int)trand_int(&r, 2, 6) / 4 + 1 : 0;
                        c.rule = rule;
                        c.replicas = replicas;
                        c.absent = replicas == 4;
                        c.multiple = multiple;
                        c.drops = 1;
                        c.bare = 0;
                        if (replicas) c.P = c.E * 3 / 2 + 1, c.counts = 0;
                        run_case(&c, &r);
                    }
}

/* Capacity by weight where an expert has as many slots as its block takes in one round, one fewer
   or more, or several rounds: 512, 2048 and 4096 slots a round. */
static void test_route_long_lists(void)
{
    static const int shape[][3] = {{511, 20, 1},  {512, 20, 1},  {513, 20, 1}, {2100, 1000, 1},
                                   {2047, 20, 1}, {2048, 20, 1}, {683, 20, 3}, {431, 40, 10},
                                   {1024, 2, 4},  {4097, 2, 1},  {1300, 4, 7}};
    trand r = trand_new(25);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; ++i)
        for (int n = 0; n < 3; ++n) {
            route_case c = random_case(&r, shape[i][0], shape[i][1], shape[i][2]);
            const int slots = c.T * c.K;
            const int capacity[] = {1 + (int)trand_int(&r, 0, slots / 8),
                                    (int)trand_int(&r, slots / 8, slots), slots - 1};
            c.pattern = n == 1 ? DROPPED : ONE;
            c.capacity = capacity[n];
            c.rule = MOE_DROP_BY_WEIGHT;
            c.drops = 1;
            c.bare = 0;
            if (n == 1) c.E = c.P = 1 + c.E / 20, c.counts = 0;
            run_case(&c, &r);
        }
}

/* The drop rules where they are easily seen: one expert, chosen by every token. */
static void test_route_options_by_hand(void)
{
    enum { T = 5 };
    static const int32_t ids[T] = {0, 0, 0, 0, 0};
    static const float weights[T] = {0.5f, NAN, 0.25f, 0.5f, 0.75f};
    static const int32_t by_position[T] = {0, 1, 2, -1, -1}, by_weight[T] = {0, -1, -1, 1, 2};
    static const int32_t by_weight_1[T] = {-1, -1, -1, -1, 0}, by_weight_4[T] = {0, -1, 1, 2, 3};
    static const struct {
        int capacity, rule;
        const int32_t* want;
    } step[] = {{3, 0, by_position},
                {3, MOE_DROP_BY_POSITION, by_position},
                {3, MOE_DROP_BY_WEIGHT, by_weight},
                {1, MOE_DROP_BY_WEIGHT, by_weight_1},
                {4, MOE_DROP_BY_WEIGHT, by_weight_4}};
    trand r = trand_new(23);
    for (size_t i = 0; i < sizeof step / sizeof *step; ++i) {
        static const int32_t none[] = {-1, -1, -1, -1};
        route_case c = random_case(&r, T, 1, 1);
        route_bufs b;
        int32_t got[T], rows[8];
        c.bare = c.counts = 0;
        c.capacity = step[i].capacity;
        c.rule = step[i].rule;
        c.multiple = 4;
        bufs_new(&b, &c, ids, weights);
        CHECK(b.rows == 4, "%lld rows", (long long)b.rows);
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        tbuf_get(&b.slot_row, got);
        CHECK_INTS("slot_row by hand", got, step[i].want, T);
        tbuf_get(&b.row_slot, rows);
        CHECK_INTS("padding", rows + step[i].capacity, none, 4 - step[i].capacity);
        for (int s = 0; s < T; ++s) CHECK(got[s] < 0 || rows[got[s]] == s);
        compare(&b, &c, ids, weights);
        bufs_free(&b);
    }
}

/* The two pictures of docs/layouts.md, number by number. */
static void test_route_documented(void)
{
    enum { T = 3, K = 2, E = 3 };
    static const int32_t ids[] = {2, 0, 0, 1, 2, -1};
    static const float weights[] = {1, 2, 3, 4, 5, 6};
    static const struct {
        int multiple, capacity;
        int32_t count[E], offset[E + 1], drops[E], row_slot[6], slot_row[6], joined[12], split[12];
        float row_weight[6];
    } want[] = {{0,
                 0,
                 {2, 1, 2},
                 {0, 2, 3, 5},
                 {0, 0, 0},
                 {1, 2, 3, 0, 4, -1},
                 {3, 0, 1, 2, 4, -1},
                 {0, 3, 0, 0, 0, 1, 0, 2, 0, 4, -1, -1},
                 {2, 0, 0, 0, 0, 1, 1, 0, 2, 1, -1, -1},
                 {2, 3, 4, 1, 5, 0}},
                {2,
                 1,
                 {1, 1, 1},
                 {0, 2, 4, 6},
                 {1, 0, 1},
                 {1, -1, 3, -1, 0, -1},
                 {4, 0, -1, 2, -1, -1},
                 {0, 4, 0, 0, -1, -1, 0, 2, -1, -1, -1, -1},
                 {2, 0, 0, 0, -1, -1, 1, 0, -1, -1, -1, -1},
                 {2, 0, 4, 0, 1, 0}}};
    trand r = trand_new(28);
    for (int i = 0; i < 2; ++i)
        for (int split = 0; split < 2; ++split) {
            route_case c = random_case(&r, T, E, K);
            route_bufs b;
            c.bare = c.counts = 0;
            c.drops = 1;
            c.place_kind = split ? MOE_PLACE_BY_EXPERT : MOE_PLACE_JOINED;
            c.multiple = want[i].multiple;
            c.capacity = want[i].capacity;
            bufs_new(&b, &c, ids, weights);
            CHECK(b.rows == 6, "%lld rows", (long long)b.rows);
            CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
            compare_buffer(&b.count, want[i].count);
            compare_buffer(&b.offset, want[i].offset);
            compare_buffer(&b.drops, want[i].drops);
            compare_buffer(&b.row_slot, want[i].row_slot);
            compare_buffer(&b.slot_row, want[i].slot_row);
            compare_buffer(&b.place, split ? want[i].split : want[i].joined);
            compare_buffer(&b.row_weight, want[i].row_weight);
            compare(&b, &c, ids, weights);
            bufs_free(&b);
        }
}

/* Capacity by weight among numbers that order in an unusual way: both zeros are equal, numbers
   below the normal ones count, infinities are numbers, a NaN of either sign is less than all. */
static void test_route_special_weights(void)
{
    enum { T = 8 };
    static const int32_t ids[T] = {0, 0, 0, 0, 0, 0, 0, 0};
    static const float weights[T] = {NAN, -0.0f, 0.0f, -INFINITY, INFINITY, -NAN, 1e-42f, -1e-42f};
    static const int order[T] = {4, 6, 1, 2, 7, 3, 0, 5}; /* who stays first */
    trand r = trand_new(29);
    for (int capacity = 1; capacity <= T; ++capacity) {
        route_case c = random_case(&r, T, 1, 1);
        int32_t want[T];
        route_bufs b;
        int row = 0;
        for (int s = 0; s < T; ++s) {
            want[s] = -1;
            for (int i = 0; i < capacity; ++i)
                if (order[i] == s) want[s] = row++;
        }
        c.bare = c.counts = 0;
        c.capacity = capacity;
        c.rule = MOE_DROP_BY_WEIGHT;
        bufs_new(&b, &c, ids, weights);
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        compare_buffer(&b.slot_row, want);
        compare(&b, &c, ids, weights);
        bufs_free(&b);
    }
}

/* Experts that live elsewhere: 0 has an empty range, 2 one replica here and one elsewhere. With
   absent_replicas their slots are dropped like those of id -1 and no fault is set; without, the
   first of them is the fault's. A decreasing range and a number past P are faults in both. */
static void test_route_absent_replicas(void)
{
    enum { T = 4, SLOTS = 8, E = 3 };
    static const int32_t ids[SLOTS] = {1, -1, 0, 2, 2, 1, 1, 2};
    static const float weights[SLOTS] = {1, 2, 3, 4, 5, 6, 7, 8};
    static const int32_t offset[E + 1] = {0, 0, 1, 3}, expert[3] = {1, 0, -1};
    static const int32_t slot_row[SLOTS] = {1, -1, -1, -1, 0, 2, 3, -1};
    static const int32_t row_slot[SLOTS] = {4, 0, 5, 6, -1, -1, -1, -1};
    static const int32_t place[2 * SLOTS] = {1, 0, -1, -1, -1, -1, -1, -1,
                                             0, 0, 1,  1,  1,  2,  -1, -1};
    static const int32_t count[3] = {1, 3, 0}, starts[4] = {0, 1, 4, 4}, drops[3] = {0, 0, 0};
    trand r = trand_new(26);
    for (int n = 0; n < 6; ++n) {
        route_case c = random_case(&r, T, E, 2);
        int32_t own_offset[E + 1], own_expert[3];
        route_bufs b;
        memcpy(own_offset, offset, sizeof offset);
        memcpy(own_expert, expert, sizeof expert);
        if (n == 4) own_offset[0] = 1;  /* expert 0: 1 .. 0 */
        if (n == 5) own_expert[2] = -2; /* no more than a number that does not exist */
        c.bare = c.counts = 0;
        c.drops = 1;
        c.place_kind = MOE_PLACE_BY_EXPERT;
        c.replicas = 4;
        c.absent = n != 0;
        c.capacity = n == 2 || n == 3 ? 3 : 0;
        c.rule = n == 3 ? MOE_DROP_BY_WEIGHT : 0;
        c.replica_offset = own_offset;
        c.replica_expert = own_expert;
        bufs_new(&b, &c, ids, weights);
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c, ids, weights);
        if (n == 0 || n == 4) CHECK_FAULT(&b.fault, MOE_FAULT_BAD_REPLICA, 2);
        else if (n == 5) CHECK_FAULT(&b.fault, MOE_FAULT_BAD_REPLICA, 3);
        else CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        compare_buffer(&b.count, count);
        compare_buffer(&b.offset, starts);
        compare_buffer(&b.drops, drops);
        compare_buffer(&b.slot_row, slot_row);
        compare_buffer(&b.place, place);
        CHECK(b.rows == SLOTS, "%lld rows", (long long)b.rows);
        compare_buffer(&b.row_slot, row_slot);
        bufs_free(&b);
    }
}

/* What moe_route_max_rows tells. */
static void test_route_max_rows(void)
{
    static const struct {
        int T, E, K, P, multiple, capacity;
        int64_t rows;
    } c[] = {{100, 8, 2, 0, 0, 0, 200},           {100, 8, 2, 0, 1, 0, 200},
             {100, 8, 2, 0, 16, 0, 320},          {100, 8, 2, 16, 16, 0, 432},
             {3, 64, 1, 0, 128, 0, 384},          {0, 64, 1, 0, 128, 0, 0},
             {100, 8, 2, 0, 0, 10, 80},           {100, 8, 2, 0, 0, 100, 200},
             {100, 8, 2, 0, 16, 10, 128},         {100, 8, 2, 0, 16, 17, 256},
             {1000, 2, 1, 0, 128, INT32_MAX, 1152}, {1 << 27, 1, 8, 0, 1, 1000, 1000}};
    for (size_t i = 0; i < sizeof c / sizeof *c; ++i) {
        int64_t rows = -1;
        moe_route_desc d;
        int32_t offset;
        memset(&d, 0, sizeof d);
        d.num_tokens = c[i].T;
        d.num_experts = c[i].E;
        d.top_k = c[i].K;
        d.num_replicas = c[i].P;
        if (c[i].P) d.replica_offset = &offset;
        d.row_multiple = c[i].multiple;
        d.capacity = c[i].capacity;
        CHECK_STATUS(moe_route_max_rows(&d, &rows), MOE_OK);
        CHECK(rows == c[i].rows, "%d: %lld rows, not %lld", (int)i, (long long)rows,
              (long long)c[i].rows);
    }
}

/* The most chunks there are, and chunks of more slots than a block has under way together. */
static void test_route_big_chunks(void)
{
    static const int shape[][3] = {{MOE_MAX_CHUNKS * 16, 3, 1}, {MOE_MAX_CHUNKS * 16 + 5, 3, 1},
                                   {40, 11, 300}, {16, 2000, 500}, {2300, 5, 70}};
    trand r = trand_new(3);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; ++i)
        for (int counts = 0; counts < 3; ++counts) {
            route_case c = random_case(&r, shape[i][0], shape[i][1], shape[i][2]);
            c.bare = 0;
            c.counts = counts == 1;
            c.pattern = counts ? DROPPED : UNIFORM;
            if (counts == 2) draw_options(&c, &r);
            run_case(&c, &r);
        }
}

/* Counts that are not those of the ids: nothing outside the outputs is written. */
static void test_route_foreign_counts(void)
{
    trand r = trand_new(12);
    for (int round = 0; round < 24; ++round) {
        route_case c = random_case(&r, (int)trand_int(&r, 1, 90), (int)trand_int(&r, 2, 40), 4);
        const int64_t n = c.E * moe_num_chunks(c.T);
        int32_t *ids, *chunk = (int32_t*)test_host(n * 4);
        float* weights;
        uint64_t word;
        route_bufs b;
        c.pattern = UNIFORM;
        c.counts = 1;
        c.bare = 0;
        if (round % 3) {
            c.rule = round % 3;
            c.capacity = (int)trand_int(&r, 1, 20);
            c.multiple = (int)trand_int(&r, 0, MOE_ROUTE_MAX_MULTIPLE);
        }
        case_new(&b, &c, &r, &ids, &weights);
        for (int64_t i = 0; i < n; ++i)
            chunk[i] = (int32_t)trand_int(&r, round % 2 ? INT32_MIN : 100, INT32_MAX);
        tbuf_put(&b.chunk, chunk);
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.chunk, chunk), "an input was written"); /* and the guards are checked */
        tbuf_get(&b.fault, &word);
        CHECK(moe_fault_decode(word).code == MOE_FAULT_BAD_COUNT);
        bufs_free(&b);
        free(ids), free(weights), free(chunk);
    }
}

/* Where BAD_COUNT points, under every drop rule: to the first slot of the first chunk whose counts
   are not its ids', or to 0 where the counts give more rows than there are slots; by position the
   capacity cuts them first. Not to what the workspace held before: that is poison once, and valid
   slots the next time. */
static void test_route_bad_count_index(void)
{
    enum { T = 40, E = 4, K = 2 }; /* chunks of 16 tokens: from slots 0, 32, 64 on */
    static const struct {
        int chunk, add; /* that much to expert 0, as much less to expert 2 */
        int index, by_position;
    } step[] = {
        {0, 1, 0, 0}, {1, 1, 32, 32}, {1, -1, 32, 32}, {2, 1, 64, 64}, {2, INT32_MAX, 0, 64}};
    trand r = trand_new(27);
    for (size_t i = 0; i < sizeof step / sizeof *step; ++i)
        for (int rule = 0; rule <= MOE_DROP_BY_WEIGHT; ++rule)
            for (int used = 0; used < 2; ++used) { /* 1: the workspace of a call before */
                const uint64_t none = 0;
                route_case c = random_case(&r, T, E, K);
                int32_t* ids;
                int32_t chunk[3 * E];
                float* weights;
                route_bufs b;
                c.pattern = DISTINCT; /* each expert in every chunk */
                c.counts = 1;
                c.bare = 0;
                c.rule = rule;
                c.capacity = rule ? 12 : 0;
                case_new(&b, &c, &r, &ids, &weights);
                CHECK(moe_num_chunks(T) == 3 && b.chunk.bytes == sizeof chunk);
                tbuf_get(&b.chunk, chunk);
                if (used) {
                    CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
                    compare(&b, &c, ids, weights);
                    tbuf_put(&b.fault, &none);
                }
                chunk[step[i].chunk * E] =
                    (int32_t)((unsigned)chunk[step[i].chunk * E] + (unsigned)step[i].add);
                if (step[i].add < INT32_MAX) chunk[step[i].chunk * E + 2] -= step[i].add;
                tbuf_put(&b.chunk, chunk);
                CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
                if (!CHECK_FAULT(&b.fault, MOE_FAULT_BAD_COUNT,
                                 rule == MOE_DROP_BY_POSITION ? step[i].by_position
                                                              : step[i].index))
                    printf("  in: step %d, rule %d, used %d\n", (int)i, rule, used);
                bufs_free(&b);
                free(ids), free(weights);
            }
}

/* One id was changed after it was counted: told, whatever the change does to the rows. */
static void test_route_changed_id(void)
{
    trand r = trand_new(13);
    for (int round = 0; round < 20; ++round) {
        const int E = round % 2 ? 5 : 1500;
        route_case c = random_case(&r, (int)trand_int(&r, 16, 90), E, 3);
        const int64_t slots = (int64_t)c.T * c.K, at = trand_int(&r, 0, slots - 1);
        const int64_t begin = at / c.K / 16 * 16 * c.K; /* of the chunk */
        int32_t* ids;
        float* weights;
        route_bufs b;
        c.pattern = UNIFORM;
        c.counts = 1;
        c.bare = 0;
        c.multiple = round % 4 ? 0 : 16;
        c.capacity = round % 5 ? 0 : 7;
        case_new(&b, &c, &r, &ids, &weights);
        ids[at] = round % 3 ? (ids[at] + 1) % E : -1;
        tbuf_put(&b.ids, ids);
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_COUNT, begin);
        bufs_free(&b);
        free(ids), free(weights);
    }
}

/* K equal to E and beyond it: a token may name an expert again and again. */
static void test_route_wide_tokens(void)
{
    static const int EK[][2] = {{1, 5}, {4, 4}, {33, 33}, {8, 100}, {60, 1000}};
    trand r = trand_new(4);
    for (size_t i = 0; i < sizeof EK / sizeof *EK; ++i)
        for (int pattern = 0; pattern < PATTERNS; ++pattern) {
            route_case c = random_case(&r, 37, EK[i][0], EK[i][1]);
            c.pattern = pattern;
            run_case(&c, &r);
        }
}

/* One output at a time: each is optional. */
static void test_route_optional_outputs(void)
{
    trand r = trand_new(5);
    route_case c = random_case(&r, 41, 12, 3);
    int32_t* ids = (int32_t*)test_host(41 * 3 * 4);
    float* weights = (float*)test_host(41 * 3 * 4);
    c.pattern = DROPPED;
    c.bare = 0;
    fill_ids(ids, &c, &r);
    trand_fill_normal(&r, weights, 41 * 3, MOE_FP32);
    for (int only = 0; only < 4; ++only) {
        route_bufs b;
        moe_route_desc d;
        bufs_new(&b, &c, ids, weights);
        d = b.d;
        d.fault = 0;
        if (only != 0) d.slot_row = 0;
        if (only != 1) d.row_slot = 0;
        if (only != 2) d.row_weight = 0;
        if (only != 2) d.weights = 0;
        if (only != 3) d.place = 0;
        CHECK_STATUS(moe_route(&d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.slot_row, 0) == (only != 0), "slot_row, %d", only);
        CHECK(tbuf_holds(&b.row_slot, 0) == (only != 1), "row_slot, %d", only);
        CHECK(tbuf_holds(&b.row_weight, 0) == (only != 2), "row_weight, %d", only);
        CHECK(tbuf_holds(&b.place, 0) == (only != 3), "place, %d", only);
        if (c.counts) { /* the scan has overwritten them */
            int32_t* chunk = (int32_t*)test_host((int64_t)b.chunk.bytes);
            count_chunks(chunk, ids, &c);
            tbuf_put(&b.chunk, chunk);
            free(chunk);
        }
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c, ids, weights);
        bufs_free(&b);
    }
    free(ids);
    free(weights);
}

/* The smallest bad slot wins; a stop fault stops every launch, those of a capacity by weight too. */
static void test_route_faults(void)
{
    trand r = trand_new(6);
    route_case c = random_case(&r, 300, 10, 4);
    int32_t* ids = (int32_t*)test_host(1200 * 4);
    float* weights = (float*)test_host(1200 * 4);
    c.pattern = UNIFORM;
    c.counts = 0;
    c.bare = 0;
    fill_ids(ids, &c, &r);
    trand_fill_normal(&r, weights, 1200, MOE_FP32);
    ids[777] = 10;
    ids[555] = -7;
    ids[1199] = 99;
    for (int n = 0; n < 4; ++n) {
        uint64_t word;
        route_bufs b;
        c.counts = n % 2;
        c.rule = n / 2 ? MOE_DROP_BY_WEIGHT : 0;
        c.capacity = n / 2 ? 20 : 0;
        c.drops = n / 2;
        bufs_new(&b, &c, ids, weights);
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_ID, 555);
        compare(&b, &c, ids, weights);
        bufs_free(&b);
        bufs_new(&b, &c, ids, weights);
        word = MOEI_FAULT_KEY(MOE_FAULT_NAN_LOGIT, TEST_RANK, 9000); /* an earlier code stays */
        tbuf_put(&b.fault, &word);
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_NAN_LOGIT, 9000);
        word = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 1);
        tbuf_put(&b.fault, &word);
        bufs_poison(&b);
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        CHECK(bufs_untouched(&b), "route ran on after a stop fault");
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 1);
        bufs_free(&b);
    }
    free(ids);
    free(weights);
}

/* Every field, wrong in every way: its own status, and nothing is written. */
static void test_route_refusals(void)
{
    trand r = trand_new(7);
    route_case c = random_case(&r, 40, 10, 4);
    int32_t* ids = (int32_t*)test_host(160 * 4);
    float* weights = (float*)test_host(160 * 4);
    route_bufs b;
    tbuf b_extra;
    int32_t* extra;
    moe_route_desc good, d;
    size_t bytes = 12345;
    c.pattern = DROPPED;
    c.counts = 0;
    c.bare = 0;
    fill_ids(ids, &c, &r);
    trand_fill_normal(&r, weights, 160, MOE_FP32);
    bufs_new(&b, &c, ids, weights);
    b_extra = tbuf_new("extra", 64 * 4, 0);
    extra = (int32_t*)b_extra.p;
    good = b.d;
#define REFUSED(change, kind, field)                                                              \
    d = good;                                                                                     \
    change;                                                                                       \
    CHECK_STATUS(moe_route(&d, test_now.stream), MOE_STATUS(kind, field));                        \
    CHECK_REFUSED(moe_route_prepared, moe_route_prepare, &d, MOE_STATUS(kind, field))
#define AT(type, p, bytes) ((type*)((char*)(p) + (bytes)))
    CHECK_STATUS(moe_route(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED((d.num_tokens = 1 << 29, d.chunk_count = (int32_t*)b.chunk.p), MOE_ERR_RANGE,
            num_tokens);
    REFUSED(d.num_experts = 0, MOE_ERR_RANGE, num_experts);
    REFUSED(d.num_experts = -1, MOE_ERR_RANGE, num_experts);
    REFUSED(d.num_experts = MOE_MAX_EXPERTS + 1, MOE_ERR_RANGE, num_experts);
    REFUSED(d.top_k = 0, MOE_ERR_RANGE, top_k);
    REFUSED(d.top_k = -4, MOE_ERR_RANGE, top_k);
    REFUSED(d.place_kind = 3, MOE_ERR_OPTION, place_kind);
    REFUSED(d.place_kind = -1, MOE_ERR_OPTION, place_kind);
    REFUSED(d.ids = 0, MOE_ERR_NULL, ids);
    REFUSED(d.weights = 0, MOE_ERR_NULL, weights);
    REFUSED(d.expert_count = 0, MOE_ERR_NULL, expert_count);
    REFUSED(d.expert_offset = 0, MOE_ERR_NULL, expert_offset);
    REFUSED(d.workspace = 0, MOE_ERR_NULL, workspace);
    REFUSED(d.workspace_bytes = 0, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.ids = AT(int32_t, d.ids, 2), MOE_ERR_ALIGN, ids);
    REFUSED(d.weights = AT(float, d.weights, 1), MOE_ERR_ALIGN, weights);
    REFUSED(d.chunk_count = AT(int32_t, b.chunk.p, 2), MOE_ERR_ALIGN, chunk_count);
    REFUSED(d.expert_count = AT(int32_t, d.expert_count, 2), MOE_ERR_ALIGN, expert_count);
    REFUSED(d.expert_offset = AT(int32_t, d.expert_offset, 3), MOE_ERR_ALIGN, expert_offset);
    REFUSED(d.slot_row = AT(int32_t, d.slot_row, 2), MOE_ERR_ALIGN, slot_row);
    REFUSED(d.row_slot = AT(int32_t, d.row_slot, 2), MOE_ERR_ALIGN, row_slot);
    REFUSED(d.row_weight = AT(float, d.row_weight, 2), MOE_ERR_ALIGN, row_weight);
    REFUSED(d.place = AT(moe_place, d.place, 4), MOE_ERR_ALIGN, place);
    REFUSED(d.workspace = AT(void, d.workspace, 8), MOE_ERR_ALIGN, workspace);
    REFUSED(d.rank = -1, MOE_ERR_RANGE, rank);
    REFUSED(d.rank = MOE_FAULT_MAX_RANK + 1, MOE_ERR_RANGE, rank);
    REFUSED(d.fault = AT(uint64_t, d.fault, 4), MOE_ERR_ALIGN, fault);
    REFUSED(d.workspace = (void*)((uintptr_t)((char*)b.ids.p + 16) & ~(uintptr_t)15),
            MOE_ERR_OVERLAP, workspace);
    REFUSED(d.chunk_count = (int32_t*)b.ids.p, MOE_ERR_OVERLAP, chunk_count);
    REFUSED((d.chunk_count = (int32_t*)b.chunk.p, d.slot_row = d.chunk_count), MOE_ERR_OVERLAP,
            slot_row);
    REFUSED(d.expert_count = (int32_t*)b.ids.p, MOE_ERR_OVERLAP, expert_count);
    REFUSED(d.expert_count = (int32_t*)d.workspace, MOE_ERR_OVERLAP, expert_count);
    REFUSED(d.expert_offset = d.expert_count + 9, MOE_ERR_OVERLAP, expert_offset);
    REFUSED(d.expert_offset = d.expert_count - 10, MOE_ERR_OVERLAP, expert_offset);
    REFUSED(d.slot_row = (int32_t*)b.ids.p, MOE_ERR_OVERLAP, slot_row);
    REFUSED(d.row_slot = d.slot_row, MOE_ERR_OVERLAP, row_slot);
    REFUSED(d.row_weight = (float*)b.weights.p, MOE_ERR_OVERLAP, row_weight);
    REFUSED(d.row_weight = (float*)d.row_slot + 159, MOE_ERR_OVERLAP, row_weight);
    REFUSED(d.place = (moe_place*)b.weights.p, MOE_ERR_OVERLAP, place);
    REFUSED(d.fault = (uint64_t*)b.place.p, MOE_ERR_OVERLAP, fault);
    REFUSED(d.row_multiple = -1, MOE_ERR_RANGE, row_multiple);
    REFUSED(d.row_multiple = MOE_ROUTE_MAX_MULTIPLE + 1, MOE_ERR_RANGE, row_multiple);
    REFUSED((d.num_tokens = INT32_MAX, d.top_k = 1, d.row_multiple = 2), MOE_ERR_RANGE,
            row_multiple);
    REFUSED(d.capacity = -1, MOE_ERR_RANGE, capacity);
    REFUSED((d.capacity = 5, d.drop_rule = 3), MOE_ERR_OPTION, drop_rule);
    REFUSED((d.capacity = 5, d.drop_rule = -1), MOE_ERR_OPTION, drop_rule);
    REFUSED(d.drop_rule = MOE_DROP_BY_POSITION, MOE_ERR_CONFLICT, drop_rule);
    REFUSED(d.drop_rule = MOE_DROP_BY_WEIGHT, MOE_ERR_CONFLICT, drop_rule);
    REFUSED((d.capacity = 5, d.drop_rule = MOE_DROP_BY_WEIGHT), MOE_ERR_WORKSPACE,
            workspace_bytes);
    REFUSED(d.num_replicas = 11, MOE_ERR_CONFLICT, num_replicas);
    REFUSED(d.replica_expert = extra, MOE_ERR_CONFLICT, replica_expert);
    REFUSED((d.replica_offset = extra, d.num_replicas = -1), MOE_ERR_RANGE, num_replicas);
    REFUSED((d.replica_offset = extra, d.absent_replicas = 2), MOE_ERR_OPTION, absent_replicas);
    REFUSED((d.replica_offset = extra, d.absent_replicas = -1), MOE_ERR_OPTION, absent_replicas);
    REFUSED(d.absent_replicas = 1, MOE_ERR_CONFLICT, absent_replicas);
    REFUSED((d.replica_offset = extra, d.num_replicas = MOE_MAX_EXPERTS + 1), MOE_ERR_RANGE,
            num_replicas);
    REFUSED((d.replica_offset = extra, d.chunk_count = (int32_t*)b.chunk.p), MOE_ERR_CONFLICT,
            chunk_count);
    REFUSED(d.replica_offset = AT(int32_t, extra, 2), MOE_ERR_ALIGN, replica_offset);
    REFUSED((d.replica_offset = extra, d.replica_expert = AT(int32_t, extra, 1)), MOE_ERR_ALIGN,
            replica_expert);
    REFUSED(d.drop_count = AT(int32_t, b.drops.p, 2), MOE_ERR_ALIGN, drop_count);
    REFUSED(d.drop_count = d.expert_count, MOE_ERR_OVERLAP, drop_count);
    REFUSED(d.drop_count = (int32_t*)d.workspace, MOE_ERR_OVERLAP, drop_count);
    REFUSED((d.replica_offset = extra, d.drop_count = extra + 10), MOE_ERR_OVERLAP, drop_count);
    REFUSED((d.replica_offset = extra, d.replica_expert = extra + 16, d.slot_row = extra + 25),
            MOE_ERR_OVERLAP, slot_row);
    REFUSED((d.row_multiple = 4, d.row_weight = (float*)d.row_slot + 160), MOE_ERR_OVERLAP,
            row_weight);
    { /* by weight: with a workspace that is large enough, but weights are needed for it */
        tbuf large = tbuf_new("large workspace", 1 << 16, 16);
        REFUSED((d.capacity = 5, d.drop_rule = MOE_DROP_BY_WEIGHT, d.workspace = large.p,
                 d.workspace_bytes = large.bytes, d.weights = 0, d.row_weight = 0),
                MOE_ERR_NULL, weights);
        CHECK_STATUS(moe_route_workspace(&d, &bytes), MOE_OK);
        REFUSED((d.capacity = 5, d.drop_rule = MOE_DROP_BY_WEIGHT, d.workspace = large.p,
                 d.workspace_bytes = bytes - 1),
                MOE_ERR_WORKSPACE, workspace_bytes);
        REFUSED((d.capacity = 5, d.drop_rule = MOE_DROP_BY_WEIGHT, d.workspace = large.p,
                 d.workspace_bytes = bytes, d.place = AT(moe_place, large.p, bytes / 8 * 8 - 8)),
                MOE_ERR_OVERLAP, place);
        /* one that is too small, right before another buffer, overlaps nothing */
        REFUSED(
            (d.workspace = large.p, d.workspace_bytes = 16, d.fault = AT(uint64_t, large.p, 16)),
            MOE_ERR_WORKSPACE, workspace_bytes);
        REFUSED((d.workspace = large.p, d.fault = AT(uint64_t, large.p, 16)), MOE_ERR_OVERLAP,
                fault);
        REFUSED((d.workspace = 0, d.workspace_bytes = 0), MOE_ERR_NULL, workspace);
        CHECK(tbuf_holds(&large, 0), "a refused call wrote to its workspace");
        tbuf_free(&large);
        bytes = 12345;
    }
    {
        int64_t rows = 777;
        CHECK_STATUS(moe_route_max_rows(0, &rows), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_route_max_rows(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        d = good;
        d.top_k = 0;
        CHECK_STATUS(moe_route_max_rows(&d, &rows), MOE_STATUS(MOE_ERR_RANGE, top_k));
        d = good;
        d.place_kind = 3;
        CHECK_STATUS(moe_route_max_rows(&d, &rows), MOE_STATUS(MOE_ERR_OPTION, place_kind));
        CHECK_STATUS(moe_route_workspace(&d, &bytes), MOE_STATUS(MOE_ERR_OPTION, place_kind));
        d = good;
        d.num_tokens = INT32_MAX;
        d.top_k = 1;
        d.row_multiple = 2;
        CHECK_STATUS(moe_route_max_rows(&d, &rows), MOE_STATUS(MOE_ERR_RANGE, row_multiple));
        CHECK(rows == 777, "a refused question gives no answer");
    }
    CHECK_STATUS(moe_route_workspace(0, &bytes), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_route_workspace(&good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    d = good;
    d.num_experts = 0;
    CHECK_STATUS(moe_route_workspace(&d, &bytes), MOE_STATUS(MOE_ERR_RANGE, num_experts));
    d = good;
    d.num_tokens = -5;
    CHECK_STATUS(moe_route_workspace(&d, &bytes), MOE_STATUS(MOE_ERR_RANGE, num_tokens));
    CHECK(bytes == 12345, "a refused question gives no answer");
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(bufs_untouched(&b) && tbuf_holds(&b.chunk, 0), "a refused call wrote something");
    CHECK(tbuf_holds(&b.ids, ids) && tbuf_holds(&b.weights, weights), "or to an input");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    CHECK(tbuf_holds(&b_extra, 0), "a refused call wrote something");
    CHECK_STATUS(moe_route(&good, test_now.stream), MOE_OK);
    compare(&b, &c, ids, weights);
    bufs_free(&b);
    tbuf_free(&b_extra);
    free(ids);
    free(weights);
}

static moe_status call_route(void* d, cudaStream_t stream)
{
    return moe_route((const moe_route_desc*)d, stream);
}

static void test_route_same_bits(void)
{
    static const int shape[][3] = {{200, 128, 8}, {65, 300, 4}, {100, 5, 33}};
    trand r = trand_new(8);
    for (int i = 0; i < 9; ++i) { /* without options, by position, by weight */
        route_case c = random_case(&r, shape[i % 3][0], shape[i % 3][1], shape[i % 3][2]);
        int32_t* ids;
        float* weights;
        route_bufs b;
        tbuf* out[8];
        c.pattern = DUPLICATES;
        c.counts = 0;
        c.bare = 0;
        c.drops = 1;
        if (i >= 3) {
            c.rule = i / 3;
            c.capacity = c.T * c.K / c.E + 1;
            c.multiple = 8;
        }
        case_new(&b, &c, &r, &ids, &weights);
        out[0] = &b.count;
        out[1] = &b.offset;
        out[2] = &b.slot_row;
        out[3] = &b.row_slot;
        out[4] = &b.row_weight;
        out[5] = &b.place;
        out[6] = &b.workspace;
        out[7] = &b.drops;
        test_same_bits("route", call_route, &b.d, out, 8, MOE_ON_HOST ? 4 : 100);
        compare(&b, &c, ids, weights);
        bufs_free(&b);
        free(ids);
        free(weights);
    }
}

/* Gate and route in one chain, the gate's counts handed over. */
typedef struct chain {
    moe_gate_desc gate;
    moe_route_desc route;
} chain;

static moe_status call_chain(void* context, cudaStream_t stream)
{
    const chain* c = (const chain*)context;
    MOE_TRY(moe_gate(&c->gate, stream));
    return moe_route(&c->route, stream);
}

/* The chain in a graph that is launched again with other logits: the routing is the one that
   the reference finds from the gate's ids, and the same as without the gate's counts. */
static void test_route_after_gate(void)
{
    static const int shape[][3] = {{97, 64, 8}, {64, 7, 2}, {33, 300, 4}, {40, 50, 40}};
    trand r = trand_new(9);
    for (int i = 0; i < 4; ++i) {
        route_case c = random_case(&r, shape[i][0], shape[i][1], shape[i][2]);
        const int64_t slots = (int64_t)c.T * c.K, n = (int64_t)c.T * c.E;
        int32_t* ids = (int32_t*)test_host(slots * 4);
        float* weights = (float*)test_host(slots * 4);
        float* logits = (float*)test_host(n * 4);
        tbuf bl = tbuf_new("logits", (size_t)n * 4, 0);
        route_bufs b, alone;
        chain both;
        tgraph g;
        c.pattern = UNIFORM;
        c.counts = 1;
        c.bare = 0;
        fill_ids(ids, &c, &r);
        bufs_new(&b, &c, ids, weights);
        memset(&both.gate, 0, sizeof both.gate);
        both.gate.logits = bl.p;
        both.gate.ids = (int32_t*)b.ids.p;
        both.gate.weights = (float*)b.weights.p;
        both.gate.chunk_count = (int32_t*)b.chunk.p;
        both.gate.fault = (uint64_t*)b.fault.p;
        both.gate.rank = TEST_RANK;
        both.gate.num_tokens = c.T;
        both.gate.num_experts = c.E;
        both.gate.top_k = c.K;
        both.route = b.d;
        CHECK_STATUS(moe_gate_preload(), MOE_OK);
        CHECK_STATUS(moe_route_preload(), MOE_OK);
        if (tgraph_capture(&g, call_chain, &both)) {
            for (int run = 0; run < 3; ++run) {
                trand_fill_normal(&r, logits, n, MOE_FP32);
                tbuf_put(&bl, logits);
                bufs_poison(&b);
                tbuf_poison(&b.ids);
                tbuf_poison(&b.chunk);
                tgraph_launch(&g);
                tbuf_get(&b.ids, ids);
                tbuf_get(&b.weights, weights);
                for (int64_t s = 0; s < slots; ++s) CHECK(ids[s] >= 0 && ids[s] < c.E);
                compare(&b, &c, ids, weights);
                c.counts = 0;
                bufs_new(&alone, &c, ids, weights);
                CHECK_STATUS(moe_route(&alone.d, test_now.stream), MOE_OK);
                compare(&alone, &c, ids, weights);
                bufs_free(&alone);
                c.counts = 1;
            }
            tgraph_free(&g);
        }
        bufs_free(&b);
        tbuf_free(&bl);
        free(ids);
        free(weights);
        free(logits);
    }
}

/* A captured route, launched again with other ids. */
static void graph_case(int rule, int replicas)
{
    trand r = trand_new(10);
    route_case c = random_case(&r, 90, 40, 6);
    int32_t* ids = (int32_t*)test_host(540 * 4);
    float* weights = (float*)test_host(540 * 4);
    const uint64_t no_fault = 0;
    route_bufs b;
    tgraph g;
    c.counts = 0;
    c.bare = 0;
    c.drops = 1;
    c.rule = rule;
    c.capacity = rule ? 14 : 0;
    c.multiple = rule ? 4 : 0;
    c.replicas = replicas;
    if (replicas) {
        c.P = 50;
        fill_replicas(&c, &r);
    }
    fill_ids(ids, &c, &r);
    bufs_new(&b, &c, ids, weights);
    if (tgraph_capture(&g, call_route, &b.d)) {
        CHECK(bufs_untouched(&b), "capture itself runs nothing");
        for (c.pattern = 0; c.pattern < PATTERNS; ++c.pattern) {
            fill_ids(ids, &c, &r);
            trand_fill_normal(&r, weights, 540, MOE_FP32);
            tbuf_put(&b.ids, ids);
            tbuf_put(&b.weights, weights);
            tbuf_put(&b.fault, &no_fault);
            bufs_poison(&b);
            tgraph_launch(&g);
            compare(&b, &c, ids, weights);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
    free(c.replica_offset);
    free(c.replica_expert);
    free(ids);
    free(weights);
}

static void test_route_graph(void)
{
    for (int rule = 0; rule <= MOE_DROP_BY_WEIGHT; ++rule) graph_case(rule, rule);
}

/* The inner step, from a kernel of someone else: where each of a warp's choices stands among those
   of its expert. */
typedef struct rank_args {
    const int32_t* expert; /* [n] */
    int32_t* rank;         /* [n] */
    int32_t* count;        /* [n] */
    int32_t num_experts;
} rank_args;

MOE_KERNEL(128, 1) rank_in_warp(MOE_ARG(rank_args) d)
{
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    int count;
    d.rank[i] = moe_route_rank(d.expert[i], d.num_experts, &count);
    d.count[i] = count;
}

static void test_route_rank(void)
{
    static const int Es[] = {1, 2, 3, 31, 32, 33, 127, 128, 4096, 1 << 30};
    enum { N = 384 };
    trand r = trand_new(24);
    for (size_t i = 0; i < sizeof Es / sizeof *Es; ++i) {
        int32_t expert[N], rank[N], count[N];
        const int few = (int)trand_int(&r, 0, 1); /* only some of the experts */
        tbuf be, br = tbuf_new("rank", sizeof rank, 4), bc = tbuf_new("count", sizeof count, 4);
        moe_launch_config c = moe_grid(N / 128, 128, 0, test_now.stream);
        rank_args a;
        for (int n = 0; n < N; ++n) {
            const int last = few && Es[i] > 4 ? 3 : Es[i] - 1;
            expert[n] = (int32_t)(trand_int(&r, 0, 4) ? Es[i] - 1 - trand_int(&r, 0, last) : -1);
            if (expert[n] < 0 && trand_int(&r, 0, 3) == 0) expert[n] = INT32_MIN;
        }
        be = tbuf_from("expert", expert, sizeof expert, 4);
        a.expert = (const int32_t*)be.p;
        a.rank = (int32_t*)br.p;
        a.count = (int32_t*)bc.p;
        a.num_experts = Es[i];
        CHECK_STATUS(MOE_LAUNCH(rank_in_warp, c, a), MOE_OK);
        for (int n = 0; n < N; ++n) {
            rank[n] = count[n] = 0;
            for (int j = n / 32 * 32; j < n / 32 * 32 + 32 && expert[n] >= 0; ++j) {
                count[n] += expert[j] == expert[n];
                rank[n] += expert[j] == expert[n] && j < n;
            }
        }
        compare_buffer(&br, rank);
        compare_buffer(&bc, count);
        tbuf_free(&be);
        tbuf_free(&br);
        tbuf_free(&bc);
    }
}

static void test_route_large(void)
{
#if !MOE_ON_HOST
    static const int shape[][3] = {
        {32768, 128, 8}, {8192, 256, 8},  {100003, 8, 2},
        {20000, 4096, 1}, {300000, 60, 6}, {32769, 512, 10}};
    trand r = trand_new(11);
    for (int i = 0; i < 6; ++i)
        for (int counts = 0; counts < 5; ++counts) {
            route_case c = random_case(&r, shape[i][0], shape[i][1], shape[i][2]);
            c.counts = counts == 1;
            c.bare = 0;
            if (counts > 1) draw_options(&c, &r);
            run_case(&c, &r);
        }
#endif
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_route_shapes);
    RUN(test_route_patterns);
    RUN(test_route_options_shapes);
    RUN(test_route_options_patterns);
    RUN(test_route_long_lists);
    RUN(test_route_options_by_hand);
    RUN(test_route_documented);
    RUN(test_route_special_weights);
    RUN(test_route_absent_replicas);
    RUN(test_route_max_rows);
    RUN(test_route_rank);
    RUN(test_route_big_chunks);
    RUN(test_route_foreign_counts);
    RUN(test_route_bad_count_index);
    RUN(test_route_changed_id);
    RUN(test_route_wide_tokens);
    RUN(test_route_optional_outputs);
    RUN(test_route_faults);
    RUN(test_route_refusals);
    RUN(test_route_same_bits);
    RUN(test_route_after_gate);
    RUN(test_route_graph);
    RUN(test_route_large);
    return test_end();
}
