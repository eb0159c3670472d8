/* by_hand.h: routings small enough to write down, number by number.

   test_route_options_by_hand   the drop rules, with one expert
   test_route_documented        the two pictures of docs/layouts.md
   test_route_special_weights   capacity by weight among zeros, infinities and NaN
   test_route_absent_replicas   experts with no replica, or one that is not here
   test_route_max_rows          what moe_route_max_rows returns
   test_route_rank              moe_route_rank in a kernel of the test */
#ifndef MOE_TESTS_ROUTE_BY_HAND_H
#define MOE_TESTS_ROUTE_BY_HAND_H

#include "tests/unit/route/case.h"

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
        route_case c = full_case(&r, T, 1, 1);
        route_bufs b;
        int32_t got[T], rows[8];
        c.capacity = step[i].capacity;
        c.rule = step[i].rule;
        c.multiple = 4;
        bufs_new(&b, &c, ids, weights);
        CHECK(b.rows == 4, "%lld rows", (long long)b.rows);
        launch(&b, &c);
        tbuf_get(&b.slot_row, got);
        CHECK_INTS("slot_row by hand", got, step[i].want, T);
        tbuf_get(&b.row_slot, rows);
        CHECK_INTS("padding", rows + step[i].capacity, none, 4 - step[i].capacity);
        for (int s = 0; s < T; ++s) CHECK(got[s] < 0 || rows[got[s]] == s);
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
            route_case c = full_case(&r, T, E, K);
            route_bufs b;
            c.drops = 1;
            c.place_kind = split ? MOE_PLACE_BY_EXPERT : MOE_PLACE_JOINED;
            c.multiple = want[i].multiple;
            c.capacity = want[i].capacity;
            bufs_new(&b, &c, ids, weights);
            CHECK(b.rows == 6, "%lld rows", (long long)b.rows);
            launch(&b, &c);
            tbuf_compare(&b.count, want[i].count);
            tbuf_compare(&b.offset, want[i].offset);
            tbuf_compare(&b.drops, want[i].drops);
            tbuf_compare(&b.row_slot, want[i].row_slot);
            tbuf_compare(&b.slot_row, want[i].slot_row);
            tbuf_compare(&b.place, split ? want[i].split : want[i].joined);
            tbuf_compare(&b.row_weight, want[i].row_weight);
            bufs_free(&b);
        }
}

/* Capacity by weight among numbers that order in an unusual way. Both zeros are equal, numbers
   below the normal ones count, infinities are numbers, a NaN of either sign is less than all. */
static void test_route_special_weights(void)
{
    enum { T = 8 };
    static const int32_t ids[T] = {0, 0, 0, 0, 0, 0, 0, 0};
    static const float weights[T] = {NAN, -0.0f, 0.0f, -INFINITY, INFINITY, -NAN, 1e-42f, -1e-42f};
    static const int order[T] = {4, 6, 1, 2, 7, 3, 0, 5}; /* the slots, largest weight first */
    trand r = trand_new(29);
    for (int capacity = 1; capacity <= T; ++capacity) {
        route_case c = full_case(&r, T, 1, 1);
        int32_t want[T];
        route_bufs b;
        int row = 0;
        for (int s = 0; s < T; ++s) {
            want[s] = -1;
            for (int i = 0; i < capacity; ++i)
                if (order[i] == s) want[s] = row++;
        }
        c.capacity = capacity;
        c.rule = MOE_DROP_BY_WEIGHT;
        bufs_new(&b, &c, ids, weights);
        launch(&b, &c);
        tbuf_compare(&b.slot_row, want);
        bufs_free(&b);
    }
}

/* Experts that are elsewhere: 0 has an empty range, 2 one replica here and one elsewhere. With
   absent_replicas their slots are dropped like those of id -1 and no fault is set; without, the
   fault names the first of them. A decreasing range and a number past P are faults in both. */
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
        route_case c = full_case(&r, T, E, 2);
        int32_t own_offset[E + 1], own_expert[3];
        route_bufs b;
        memcpy(own_offset, offset, sizeof offset);
        memcpy(own_expert, expert, sizeof expert);
        if (n == 4) own_offset[0] = 1;  /* expert 0: 1 .. 0 */
        if (n == 5) own_expert[2] = -2; /* a number that does not exist */
        c.drops = 1;
        c.place_kind = MOE_PLACE_BY_EXPERT;
        c.replicas = 4;
        c.absent = n != 0;
        c.capacity = n == 2 || n == 3 ? 3 : 0;
        c.rule = n == 3 ? MOE_DROP_BY_WEIGHT : 0;
        c.replica_offset = own_offset;
        c.replica_expert = own_expert;
        bufs_new(&b, &c, ids, weights);
        launch(&b, &c);
        if (n == 0 || n == 4) CHECK_FAULT(&b.fault, MOE_FAULT_BAD_REPLICA, 2);
        else if (n == 5) CHECK_FAULT(&b.fault, MOE_FAULT_BAD_REPLICA, 3);
        else CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        tbuf_compare(&b.count, count);
        tbuf_compare(&b.offset, starts);
        tbuf_compare(&b.drops, drops);
        tbuf_compare(&b.slot_row, slot_row);
        tbuf_compare(&b.place, place);
        CHECK(b.rows == SLOTS, "%lld rows", (long long)b.rows);
        tbuf_compare(&b.row_slot, row_slot);
        bufs_free(&b);
    }
}

/* What moe_route_max_rows returns. */
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

/* moe_route_rank in a kernel of the test: the rank of each of a warp's choices among those of its
   expert. */
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
            if (expert[n] < 0 && trand_one_in(&r, 4)) expert[n] = INT32_MIN;
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
        tbuf_compare(&br, rank);
        tbuf_compare(&bc, count);
        tbufs_free(TBUFS(&be, &br, &bc));
    }
}

static void route_by_hand(void)
{
    RUN(test_route_options_by_hand);
    RUN(test_route_documented);
    RUN(test_route_special_weights);
    RUN(test_route_absent_replicas);
    RUN(test_route_max_rows);
    RUN(test_route_rank);
}

#endif
