/* values.h: route's outputs against its reference, over drawn cases.

   test_route_shapes            E, T and K of lists, without options
   test_route_patterns          every pattern of ids with every place kind
   test_route_options_shapes    E, T and K of lists, all options drawn
   test_route_options_patterns  every pattern with every drop rule, replicas, padding
   test_route_long_lists        capacity by weight where an expert has many slots
   test_route_big_chunks        the most chunks, and chunks of many slots
   test_route_wide_tokens       K equal to E and above
   test_route_optional_outputs  one output at a time
   test_route_large             sizes of models, on a GPU only */
#ifndef MOE_TESTS_ROUTE_VALUES_H
#define MOE_TESTS_ROUTE_VALUES_H

#include "tests/unit/route/case.h"

/* Every E of the list with every T of the list; the other fields are drawn. */
static void test_route_shapes(void)
{
    static const int Es[] = {1,   2,   3,   7,   8,   31,  32,   33,   64,   100,  128,
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
    static const int shape[][3] = {{33, 8, 2},   {70, 64, 8}, {129, 100, 3},
                                   {45, 70, 33}, {1, 1, 1},   {97, 3, 5}};
    trand r = trand_new(2);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; ++i)
        for (int pattern = 0; pattern < PATTERNS; ++pattern)
            for (int kind = 0; kind <= MOE_PLACE_BY_EXPERT; ++kind)
                for (int counts = 0; counts < 2; ++counts) {
                    route_case c = full_case(&r, shape[i][0], shape[i][1], shape[i][2]);
                    c.pattern = pattern;
                    c.place_kind = kind;
                    c.counts = counts;
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

/* The most chunks that route has, and chunks of more slots than a block handles at a time. */
static void test_route_big_chunks(void)
{
    static const int shape[][3] = {{MOE_MAX_CHUNKS * 16, 3, 1},
                                   {MOE_MAX_CHUNKS * 16 + 5, 3, 1},
                                   {40, 11, 300},
                                   {16, 2000, 500},
                                   {2300, 5, 70}};
    trand r = trand_new(3);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; ++i)
        for (int counts = 0; counts < 3; ++counts) {
            route_case c = full_case(&r, shape[i][0], shape[i][1], shape[i][2]);
            c.counts = counts == 1;
            c.pattern = counts ? DROPPED : UNIFORM;
            if (counts == 2) draw_options(&c, &r);
            run_case(&c, &r);
        }
}

/* K equal to E and above: a token may name an expert again and again. */
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
    enum { T = 41, K = 3 };
    trand r = trand_new(5);
    route_case c = random_case(&r, T, 12, K);
    int32_t ids[T * K];
    float weights[T * K];
    c.pattern = DROPPED;
    c.bare = 0;
    draw_slots(ids, weights, &c, &r);
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
        if (c.counts) put_chunks(&b, &c); /* the scan has overwritten them */
        launch(&b, &c);
        bufs_free(&b);
    }
}

static void test_route_large(void)
{
#if !MOE_ON_HOST
    static const int shape[][3] = {{32768, 128, 8},  {8192, 256, 8},  {100003, 8, 2},
                                   {20000, 4096, 1}, {300000, 60, 6}, {32769, 512, 10}};
    trand r = trand_new(11);
    for (int i = 0; i < 6; ++i)
        for (int counts = 0; counts < 5; ++counts) {
            route_case c = full_case(&r, shape[i][0], shape[i][1], shape[i][2]);
            c.counts = counts == 1;
            if (counts > 1) draw_options(&c, &r);
            run_case(&c, &r);
        }
#endif
}

static void route_values(void)
{
    RUN(test_route_shapes);
    RUN(test_route_patterns);
    RUN(test_route_options_shapes);
    RUN(test_route_options_patterns);
    RUN(test_route_long_lists);
    RUN(test_route_big_chunks);
    RUN(test_route_wide_tokens);
    RUN(test_route_optional_outputs);
    RUN(test_route_large);
}

#endif
