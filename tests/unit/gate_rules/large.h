/* large.h: large shapes, on a GPU

   test_large  many tokens */
#ifndef MOE_TESTS_GATE_RULES_LARGE_H
#define MOE_TESTS_GATE_RULES_LARGE_H

#include "tests/unit/gate_rules/case.h"

static void test_large(void)
{
#if !MOE_ON_HOST
    static const int big[][3] = {{32768, 128, 8}, {8192, 256, 8}, {3001, 512, 10}, {2000, 4096, 8}};
    trand r = trand_new(13);
    for (int i = 0; i < 4; ++i)
        for (int n = 0; n < 3; ++n) {
            rules_case c = plain_case(big[i][0], big[i][1], big[i][2]);
            c.options.score = n == 1 ? MOE_SCORE_SIGMOID : n == 2 ? MOE_SCORE_SPARSEMAX : 0;
            c.options.noise = n == 0 ? 1.0f : 0.0f;
            c.options.whole_batch = n == 2;
            c.bias = n == 1;
            c.options.num_groups = n == 1 ? 8 : 0;
            c.options.top_groups = n == 1 ? 4 : 0;
            c.prob = 1;
            run_case(&c, &r);
        }
#endif
}

static void gate_rules_large(void)
{
    RUN(test_large);
}

#endif
