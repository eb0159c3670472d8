/* test_refusals.h: a table of descriptors that are refused. Included after test.h.

     TEST_REFUSED(refused, moe_gate, moe_gate_prepare, moe_gate)
     ...
         moe_gate_desc good = b.d, d;
         REFUSED((d.num_groups = 4, d.top_groups = 5), MOE_ERR_RANGE, top_groups);
         REFUSED_EACH(hidden, MOE_ERR_RANGE, hidden, 0, -64);
         REFUSED_NUM_EXPERTS();
         REFUSED_RANK_AND_FAULT(); */
#ifndef MOE_TESTS_TEST_REFUSALS_H
#define MOE_TESTS_TEST_REFUSALS_H

#include "tests/test.h"

/* A line of the table: where it stands, and the change that is refused. */
typedef struct trefusal {
    const char* file;
    int line;
    const char* change;
} trefusal;

/* Requires this status of a call, and names the table's line and change where it is not. */
#define CHECK_STATUS_AT(at, call, want) test_status_at((at), (call), (want), #call)
MOEI_UNUSED static int test_status_at(const trefusal* at, moe_status got, moe_status want,
                                      const char* call)
{
    char text[400];
    snprintf(text, sizeof text, "%s after %s", call, at->change);
    return test_status(got, want, at->file, at->line, text);
}

/* Defines `name`, which requires that a call and its prepare refuse d alike, that the prepared
   struct, poison before, is empty, and that running it queues nothing. */
#define TEST_REFUSED(name, call, prepare, type)                                                    \
    static void name(const type##_desc* d, moe_status want, const trefusal* at)                    \
    {                                                                                              \
        type##_prepared p;                                                                         \
        CHECK_STATUS_AT(at, call(d, test_now.stream), want);                                       \
        test_poison(&p, sizeof p);                                                                 \
        CHECK_STATUS_AT(at, prepare(d, &p), want);                                                 \
        test_empty(&p, sizeof p, at->line);                                                        \
        CHECK_STATUS_AT(at, type##_run(&p, test_now.stream), MOE_OK);                              \
    }

/* The test's descriptor `good`, with this change, is refused with this kind and field by all calls
   that the test's own function `refused` makes with it. Leaves the descriptor in `d`. */
#define REFUSED(change, kind, field) REFUSED_BY(refused, change, #change, kind, field)
#define REFUSED_BY(function, change, text, kind, field)                                            \
    do {                                                                                           \
        const trefusal at_ = {__FILE__, __LINE__, text};                                           \
        d = good;                                                                                  \
        change;                                                                                    \
        function(&d, MOE_STATUS(kind, field), &at_);                                               \
    } while (0)

/* REFUSED, for each of these values of a member. */
#define REFUSED_EACH(member, kind, field, ...)                                                     \
    do {                                                                                           \
        const decltype(d.member) values_[] = {__VA_ARGS__};                                        \
        for (size_t i_ = 0; i_ < sizeof values_ / sizeof *values_; ++i_) {                         \
            char text_[200];                                                                       \
            snprintf(text_, sizeof text_, "%s = value %d of (%s)", #member, (int)i_,               \
                     #__VA_ARGS__);                                                                \
            REFUSED_BY(refused, d.member = values_[i_], text_, kind, field);                       \
        }                                                                                          \
    } while (0)

/* What the stations refuse alike. */
#define REFUSED_NUM_EXPERTS()                                                                      \
    REFUSED_EACH(num_experts, MOE_ERR_RANGE, num_experts, 0, -1, MOE_MAX_EXPERTS + 1)
#define REFUSED_RANK_AND_FAULT()                                                                   \
    do {                                                                                           \
        REFUSED_EACH(rank, MOE_ERR_RANGE, rank, -1, MOE_FAULT_MAX_RANK + 1);                       \
        REFUSED(d.fault = (uint64_t*)AT(d.fault, 4), MOE_ERR_ALIGN, fault);                        \
    } while (0)

#define AT(p, bytes) ((void*)((char*)(p) + (bytes)))
#define DOWN_TO(p, bytes) ((void*)((uintptr_t)(p) & ~(uintptr_t)((bytes)-1)))
/* The first multiple of `bytes` that is not below p. */
#define UP_TO(p, bytes) AT(p, -(uintptr_t)(p) % (bytes))

#endif
