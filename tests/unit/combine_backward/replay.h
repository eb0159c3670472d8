/* replay.h: combine_backward launched again: the same bits, a captured graph.

   test_backward_same_bits   the same bits every run
   test_backward_graph       a captured call launched again with other places and buffers */
#ifndef MOE_TESTS_COMBINE_BACKWARD_REPLAY_H
#define MOE_TESTS_COMBINE_BACKWARD_REPLAY_H

#include "tests/unit/combine_backward/case.h"

TEST_CALL(call_backward, moe_combine_backward, moe_combine_backward_desc)

static void test_backward_same_bits(void)
{
    trand r = trand_new(20);
    for (int i = 0; i < 4; ++i) {
        backward_case c = normal_case(25, i & 1 ? 250 : 2056, i & 2 ? 8 : 33);
        backward_bufs b;
        c.buffers = 3;
        c.rows = c.T * c.K / 3 + 2;
        bufs_new(&b, &c, &r);
        test_same_bits(
            "combine_backward", call_backward, &b.d,
            TBUFS(&b.drow[0], &b.drow[1], &b.drow[2], &b.dweights, &b.dshared, &b.dshared_weight),
            MOE_ON_HOST && !test_long() ? 5 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* A captured call, launched again with other places, weights and rows, and with other buffers in
   the tables. */
static void test_backward_graph(void)
{
    trand r = trand_new(21);
    for (int in_place = 0; in_place < 2; ++in_place) {
        backward_case c = normal_case(33, 200, 6);
        backward_bufs b;
        tgraph g;
        c.in_place = in_place;
        bufs_new(&b, &c, &r);
        if (tgraph_capture(&g, call_backward, &b.d)) {
            CHECK(tbuf_holds(&b.dweights, 0), "capture itself runs nothing");
            for (int run = 0; run < 4; ++run) {
                const tbuf buffer = b.buffer[run], drow = b.drow[run];
                void *address[MOST_BUFFERS], *gradient[MOST_BUFFERS];
                b.buffer[run] = b.buffer[6]; /* two entries change places */
                b.buffer[6] = buffer;
                b.drow[run] = b.drow[6];
                b.drow[6] = drow;
                for (int i = 0; i < b.count; ++i) {
                    address[i] = b.buffer[i].p;
                    gradient[i] = b.drow[i].p;
                }
                c.bad = run == 2 ? 10 : 0;
                fill(&b, &c, &r);
                tbuf_put(&b.table, address);
                tbuf_put(&b.drows_table, gradient);
                trand_fill_normal(&r, b.h_shared, (int64_t)c.T * c.H, c.rows_dtype);
                for (int64_t i = 0; i < (int64_t)c.T * c.H; ++i) /* no dot of about zero */
                    moe_store(b.h_shared, i, c.rows_dtype,
                              moe_load(b.h_shared, i, c.rows_dtype) + 0.5f);
                put(&b);
                tgraph_launch(&g);
                compare(&b, &c);
            }
            tgraph_free(&g);
        }
        bufs_free(&b);
    }
}

static void combine_backward_replay(void)
{
    RUN(test_backward_same_bits);
    RUN(test_backward_graph);
}

#endif
