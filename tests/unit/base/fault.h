/* fault.h: base/fault.h, base/fault.cuh, faults.h

   test_fault_order  codes, texts, which fault is kept
   test_fault_raise  faults of many threads */
#ifndef MOE_TESTS_BASE_FAULT_H
#define MOE_TESTS_BASE_FAULT_H

#include "tests/test.h"

#include "moe/base/fault.cuh"

static void test_fault_order(void)
{
    static const int64_t index[] = {0, 1, 2, 1000, 0x7fffffff, 0x80000000ll, 0xfffffffffffll};
    static const int rank[] = {0, 1, 7, 4095};
    uint64_t before = ~(uint64_t)0;
    static const int codes[] = {
#define CODE(name, code, text) code,
        MOEI_FAULT_LIST(CODE)
#undef CODE
    };
    const int num_codes = (int)(sizeof codes / sizeof codes[0]);
    for (int c = 1; c < num_codes; ++c)
        for (int r = 0; r < 4; ++r)
            for (int i = 0; i < 7; ++i) {
                const int code = codes[c];
                const uint64_t word = MOEI_FAULT_KEY(code, rank[r], index[i]);
                const moe_fault f = moe_fault_decode(word);
                CHECK(word != 0 && word < before, "code, rank, index is the order");
                CHECK(f.code == code && f.rank == rank[r] && f.index == index[i]);
                CHECK(MOEI_FAULT_STOPS(word) == (code <= MOE_FAULT_LAST_STOP), "code %d", code);
                before = word;
            }
    CHECK(moe_fault_decode(0).code == MOE_FAULT_NONE && !MOEI_FAULT_STOPS((uint64_t)0));
    CHECK((int)MOE_FAULT_NO_ROOM <= (int)MOE_FAULT_LAST_STOP &&
          (int)MOE_FAULT_LAST_STOP < (int)MOE_FAULT_NAN_LOGIT);
    for (int c = 0; c < num_codes; ++c) {
        CHECK(moe_fault_text(codes[c])[0] != 0);
        CHECK(strcmp(moe_fault_text(codes[c]), "unknown fault") != 0, "code %d", codes[c]);
        for (int other = 0; other < c; ++other)
            CHECK(codes[other] < codes[c] &&
                  strcmp(moe_fault_text(codes[c]), moe_fault_text(codes[other])) != 0);
    }
    CHECK(strcmp(moe_fault_text(-1), "unknown fault") == 0);
    CHECK(strcmp(moe_fault_text(MOE_FAULT_LAST_STOP), "unknown fault") == 0);
}

typedef struct fault_args {
    uint64_t* word;
    int32_t* stopped; /* [threads of the grid] */
    int64_t index;
    int32_t code, rank;
    int32_t n; /* threads that raise, each with another index; the last of them has `index` */
} fault_args;

MOE_KERNEL(256, 1) fault_kernel(MOE_ARG(fault_args) d)
{
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    d.stopped[i] = moe_fault_stopped(d.word);
    if (i < d.n) moe_fault_raise(d.word, d.code, d.rank, d.index + (d.n - 1 - i));
}

static void test_fault_raise(void)
{
    tbuf word = tfault_new(0), stopped = tbuf_new("stopped", 4 * 256 * 4, 0);
    int32_t* got = 0;
    moe_launch_config c = moe_grid(4, 256, 0, test_now.stream);
    fault_args a;
    a.word = (uint64_t*)word.p;
    a.stopped = (int32_t*)stopped.p;
    a.code = MOE_FAULT_BAD_ID;
    a.rank = 3;
    a.index = 5;
    a.n = 1000;
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    CHECK(tfault_word(&word) == MOEI_FAULT_KEY(MOE_FAULT_BAD_ID, 3, 5), "the smallest index wins");
    a.code = MOE_FAULT_BAD_PLACE; /* a later code does not replace it */
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    CHECK(tfault_word(&word) == MOEI_FAULT_KEY(MOE_FAULT_BAD_ID, 3, 5), "sticky");
    got = (int32_t*)tbuf_copy(&stopped);
    for (int i = 0; i < 4 * 256; ++i) CHECK(got[i] == 0, "a data fault stops nothing");
    free(got);
    a.code = MOE_FAULT_BAD_OFFSET;
    a.n = 1;
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    CHECK(tfault_word(&word) == MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, 3, 5), "an earlier code does");
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    got = (int32_t*)tbuf_copy(&stopped);
    for (int i = 0; i < 4 * 256; ++i) CHECK(got[i] == 1, "thread %d did not see the stop", i);
    free(got);
    for (int i = 0; i < 2 * 4 * 6; ++i) { /* every part of the key */
        static const int32_t ranks[] = {0, 1, 3000, MOE_FAULT_MAX_RANK};
        static const int64_t indices[] = {0, 1, 0xffffffff, 0x100000000, 0xfffffffffff, -1};
        const uint64_t none = 0;
        tbuf_put(&word, &none);
        a.code = i % 2 ? MOE_FAULT_NAN_LOGIT : MOE_FAULT_NO_ROOM;
        a.rank = ranks[i / 2 % 4];
        a.index = indices[i / 8];
        CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
        CHECK(tfault_word(&word) == MOEI_FAULT_KEY(a.code, a.rank, a.index),
              "code %d rank %d index %lld", a.code, a.rank, (long long)a.index);
    }
    a.word = 0; /* no word: nothing is raised, nothing stops */
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    got = (int32_t*)tbuf_copy(&stopped);
    for (int i = 0; i < 4 * 256; ++i) CHECK(got[i] == 0);
    free(got);
    tbuf_free(&word);
    tbuf_free(&stopped);
}

static void base_fault(void)
{
    RUN(test_fault_order);
    RUN(test_fault_raise);
}

#endif
