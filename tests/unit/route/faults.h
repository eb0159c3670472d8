/* faults.h: ids and counts that are wrong, and the fault word.

   test_route_foreign_counts    counts that are not those of the ids write nothing outside
   test_route_bad_count_index   the slot that BAD_COUNT names
   test_route_changed_id        an id that changed after it was counted
   test_route_faults            the smallest bad slot, earlier faults, stop faults */
#ifndef MOE_TESTS_ROUTE_FAULTS_H
#define MOE_TESTS_ROUTE_FAULTS_H

#include "tests/unit/route/case.h"

/* Counts that are not those of the ids: nothing outside the outputs is written. */
static void test_route_foreign_counts(void)
{
    trand r = trand_new(12);
    for (int round = 0; round < 24; ++round) {
        route_case c = full_case(&r, (int)trand_int(&r, 1, 90), (int)trand_int(&r, 2, 40), 4);
        const int64_t n = c.E * moe_num_chunks(c.T);
        int32_t* chunk = (int32_t*)test_host(n * 4);
        route_bufs b;
        c.pattern = UNIFORM;
        c.counts = 1;
        if (round % 3) {
            c.rule = round % 3;
            c.capacity = (int)trand_int(&r, 1, 20);
            c.multiple = (int)trand_int(&r, 0, MOE_ROUTE_MAX_MULTIPLE);
        }
        case_new(&b, &c, &r);
        for (int64_t i = 0; i < n; ++i)
            chunk[i] = (int32_t)trand_int(&r, round % 2 ? INT32_MIN : 100, INT32_MAX);
        tbuf_put(&b.chunk, chunk);
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.chunk, chunk), "an input was written");
        CHECK(moe_fault_decode(tfault_word(&b.fault)).code == MOE_FAULT_BAD_COUNT);
        bufs_free(&b); /* checks the canaries */
        free(chunk);
    }
}

/* The slot that BAD_COUNT names, under every drop rule: the first slot of the first chunk whose
   counts are not its ids', or 0 where the counts give more rows than the slots fill. By position
   the capacity cuts the counts first. What the workspace held before does not matter: poison once,
   valid slots the next time. */
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
                route_case c = full_case(&r, T, E, K);
                int32_t chunk[3 * E];
                route_bufs b;
                c.pattern = DISTINCT; /* each expert in every chunk */
                c.counts = 1;
                c.rule = rule;
                c.capacity = rule ? 12 : 0;
                case_new(&b, &c, &r);
                CHECK(moe_num_chunks(T) == 3 && b.chunk.bytes == sizeof chunk);
                tbuf_get(&b.chunk, chunk);
                if (used) {
                    launch(&b, &c);
                    tfault_put(&b.fault, MOE_FAULT_NONE, 0);
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
            }
}

/* One id changed after it was counted: a fault, whatever the change does to the rows. */
static void test_route_changed_id(void)
{
    trand r = trand_new(13);
    for (int round = 0; round < 20; ++round) {
        const int E = round % 2 ? 5 : 1500;
        route_case c = full_case(&r, (int)trand_int(&r, 16, 90), E, 3);
        const int64_t slots = (int64_t)c.T * c.K, at = trand_int(&r, 0, slots - 1);
        const int64_t begin = at / c.K / 16 * 16 * c.K; /* of the chunk */
        route_bufs b;
        c.pattern = UNIFORM;
        c.counts = 1;
        c.multiple = round % 4 ? 0 : 16;
        c.capacity = round % 5 ? 0 : 7;
        case_new(&b, &c, &r);
        b.h_ids[at] = round % 3 ? (b.h_ids[at] + 1) % E : -1;
        tbuf_put(&b.ids, b.h_ids);
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_COUNT, begin);
        bufs_free(&b);
    }
}

/* The smallest bad slot wins. A stop fault stops every launch, those of capacity by weight too. */
static void test_route_faults(void)
{
    enum { T = 300, K = 4 };
    trand r = trand_new(6);
    route_case c = full_case(&r, T, 10, K);
    int32_t ids[T * K];
    float weights[T * K];
    c.pattern = UNIFORM;
    draw_slots(ids, weights, &c, &r);
    ids[777] = 10;
    ids[555] = -7;
    ids[1199] = 99;
    for (int n = 0; n < 4; ++n) {
        route_bufs b;
        c.counts = n % 2;
        c.rule = n / 2 ? MOE_DROP_BY_WEIGHT : 0;
        c.capacity = n / 2 ? 20 : 0;
        c.drops = n / 2;
        bufs_new(&b, &c, ids, weights);
        launch(&b, &c);
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_ID, 555);
        bufs_free(&b);
        bufs_new(&b, &c, ids, weights);
        tfault_put(&b.fault, MOE_FAULT_NAN_LOGIT, 9000); /* an earlier code stays */
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_NAN_LOGIT, 9000);
        tfault_put(&b.fault, MOE_FAULT_BAD_OFFSET, 1);
        tbufs_poison(TBUFS(OUTPUTS(&b)));
        CHECK_STATUS(moe_route(&b.d, test_now.stream), MOE_OK);
        CHECK(tbufs_untouched(TBUFS(OUTPUTS(&b))), "route ran on after a stop fault");
        CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 1);
        bufs_free(&b);
    }
}

static void route_faults(void)
{
    RUN(test_route_foreign_counts);
    RUN(test_route_bad_count_index);
    RUN(test_route_changed_id);
    RUN(test_route_faults);
}

#endif
