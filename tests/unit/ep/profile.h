/* profile.h: a choice of forms as text, and measured: the same on all ranks, and a layer that uses
   it is right. */
#ifndef MOE_TESTS_EP_PROFILE_H
#define MOE_TESTS_EP_PROFILE_H

#include "tests/unit/ep/layer.h"

static void test_choice_text(void)
{
    const char* const bad[] = {"dispatch",
                               "dispatch x",
                               "combine reduced twice",
                               "hello",
                               "dispatch_time default ms 1 up 1 GB/s 1",
                               "shape ranks 2",
                               "combine_time reduced ms x GB/s 1",
                               "shape ranks 2 tokens 1 hidden 8 experts 2 top_k 1 dtype int"};
    char text[MOE_EP_CHOICE_TEXT], again[MOE_EP_CHOICE_TEXT];
    moe_ep_choice c, d;
    moe_ep_buffers b;
    int32_t line = -1;
    size_t n;
    memset(&c, 0, sizeof c);
    c.dispatch_form = MOE_EP_ALL_GATHER_COPY, c.combine_form = MOE_EP_REDUCE_SCATTER;
    c.num_ranks = 128, c.max_tokens = 0x7fffffff, c.hidden = 1 << 28;
    c.num_experts = 4096, c.top_k = 2048, c.dtype = MOE_FP16;
    for (int f = 1; f < MOE_EP_DISPATCH_FORMS; ++f) {
        c.dispatch_ms[f] = 123456.25 * f, c.up_ms[f] = 1.5 / f, c.dispatch_rate[f] = 99999.125;
        if (f < MOE_EP_COMBINE_FORMS) c.combine_ms[f] = 0.25 * f, c.combine_rate[f] = 340.5;
    }
    n = moe_ep_choice_write(&c, text, sizeof text);
    CHECK(n < sizeof text && strlen(text) == n, "%d bytes", (int)n);
    CHECK_STATUS(moe_ep_choice_read(&d, text, &line), MOE_OK);
    CHECK(line == 0, "line %d", line);
    CHECK(moe_ep_choice_write(&d, again, sizeof again) == n && !strcmp(text, again), "%s%s", text,
          again);
    CHECK(d.dispatch_ms[2] == c.dispatch_ms[2] && d.dtype == c.dtype && d.top_k == c.top_k &&
              d.combine_rate[3] == c.combine_rate[3],
          "numbers");
    for (size_t room = 0; room < 40; ++room) { /* what does not fit is cut off */
        memset(again, 'x', sizeof again);
        CHECK(moe_ep_choice_write(&c, again, room) == n, "the length does not depend on the room");
        CHECK(again[room] == 'x' &&
                  (room == 0 || (again[room - 1] == 0 && !strncmp(again, text, room - 1))),
              "room %d", (int)room);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; ++i) {
        snprintf(again, sizeof again,
                 "# made by hand\n\n dispatch  all-to-all \n%s\ncombine gathered", bad[i]);
        d = c;
        CHECK_STATUS(moe_ep_choice_read(&d, again, &line), MOE_STATUS(MOE_ERR_OPTION, choice));
        CHECK(line == 4, "%s: line %d", bad[i], line);
        CHECK(!memcmp(&d, &c, sizeof c), "a refused text changed the choice");
    }
    memset(again, 'a', 300);
    again[300] = 0;
    CHECK_STATUS(moe_ep_choice_read(&d, again, 0), MOE_STATUS(MOE_ERR_OPTION, choice));
    CHECK_STATUS(moe_ep_choice_read(&d, " dispatch  all-to-all \n#\ncombine gathered", 0), MOE_OK);
    memset(&b, 0, sizeof b);
    CHECK_STATUS(moe_ep_choice_apply(&d, &b), MOE_OK);
    CHECK(b.dispatch_form == MOE_EP_ALL_TO_ALL && b.combine_form == MOE_EP_GATHERED, "forms");
    d.combine_form = 4;
    CHECK_STATUS(moe_ep_choice_apply(&d, &b), MOE_STATUS(MOE_ERR_OPTION, combine_form));
    d.dispatch_form = -1;
    CHECK_STATUS(moe_ep_choice_apply(&d, &b), MOE_STATUS(MOE_ERR_OPTION, dispatch_form));
    CHECK_STATUS(moe_ep_choice_apply(0, &b), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK(b.dispatch_form == MOE_EP_ALL_TO_ALL, "a refused choice was applied");
    n = moe_ep_choice_table(&c, text, sizeof text);
    CHECK(n < sizeof text && strstr(text, "winner all-gather-copy\ncombine:") &&
              strstr(text, "winner reduce-scatter\n"),
          "%s", text);
}

/* What moe_peers_allgather does in a group of one. */
static int lay_alone(void* calls, const void* from, void* to, size_t bytes)
{
    ++*(int*)calls;
    memcpy(to, from, bytes);
    return 0;
}
/* The same, but the other ranks have failed from call number `at` on. */
typedef struct lay_other {
    int calls, at;
} lay_other;
static int lay_fails(void* context, const void* from, void* to, size_t bytes)
{
    lay_other* o = (lay_other*)context;
    memcpy(to, from, bytes);
    if (++o->calls >= o->at) ((double*)to)[bytes / 8 - 1] = 1;
    return 0;
}
static int lay_broken(void* calls, const void* from, void* to, size_t bytes)
{
    (void)lay_alone(calls, from, to, bytes);
    return *(int*)calls > 1;
}

static void test_profile(void)
{
    static lay_job j;
    static moe_ep_profile_rank rank[TGROUP_MOST];
    for (int W = 1; W <= 4; W += W) {
        const lay_case c = {W, 10, 64, 40, 7, 2, 0, 0, test_half(), 0, 0, 0, 0, 0, 1, 1, 0};
        moe_ep_profile_desc d;
        moe_ep_choice choice;
        int calls = 0;
        if (lay_new(&j, &c, 500)) {
            memset(&d, 0, sizeof d);
            memset(rank, 0, sizeof rank);
            for (int r = 0; r < W; ++r) {
                rank[r].layer = &j.rank[r].ep;
                rank[r].stream = j.g.stream[r];
                rank[r].device = j.g.device[r];
                tgroup_use(&j.g, r);
                TEST_CUDA(cudaMemset(j.rank[r].ep.counters, 0, sizeof(moe_ep_counters)));
                TEST_CUDA(cudaDeviceSynchronize());
            }
            TEST_CUDA(cudaSetDevice(0));
            d.rank = rank;
            d.num_mine = W;
            if (W == 1) d.allgather = lay_alone, d.context = &calls;
            CHECK_STATUS(moe_ep_profile(&d, &choice), MOE_OK);
            tgroup_clean(&j.g, __LINE__);
            CHECK((calls > 0) == (W == 1), "%d calls of the all-gather", calls);
            CHECK(choice.num_ranks == W && choice.max_tokens == 10 && choice.hidden == 64 &&
                      choice.num_experts == 7 && choice.top_k == 2 && choice.dtype == c.dtype,
                  "the shape");
            for (int f = 1; f < MOE_EP_DISPATCH_FORMS; ++f) {
                CHECK(choice.dispatch_ms[f] > 0, "dispatch %d", f);
                CHECK((choice.dispatch_rate[f] > 0) == (W > 1), "rate of dispatch %d", f);
                CHECK(choice.dispatch_ms[f] + choice.up_ms[f] >=
                              choice.dispatch_ms[choice.dispatch_form] +
                                  choice.up_ms[choice.dispatch_form] - 1e-9 ||
                          choice.up_ms[f] == 0 || choice.up_ms[choice.dispatch_form] == 0,
                      "dispatch %d is faster than %d", f, choice.dispatch_form);
            }
            for (int f = 1; f < MOE_EP_COMBINE_FORMS; ++f)
                CHECK(choice.combine_ms[f] >= choice.combine_ms[choice.combine_form] &&
                          choice.combine_ms[f] > 0,
                      "combine %d", f);
            for (int r = 0; r < W; ++r) { /* the layer takes it */
                CHECK_STATUS(moe_ep_choice_apply(&choice, &j.rank[r].ep.buffers), MOE_OK);
                tgroup_use(&j.g, r);
                tbuf_poison(&j.rank[r].y);
                CHECK_STATUS(moe_layer_forward(&j.rank[r].one, j.g.stream[r]), MOE_OK);
            }
            lay_run(&j);
            tgroup_wait(&j.g);
            for (int r = 0; r < W; ++r) lay_check_reduced(&j, r);
            if (W == 1) {
                calls = 0;
                d.allgather = lay_broken;
                CHECK_STATUS(moe_ep_profile(&d, &choice), MOE_STATUS(MOE_ERR_DEVICE, allgather));
                d.allgather = lay_fails;
                for (int at = 1; at < 9; ++at) { /* this rank goes on to the next call, and ends */
                    lay_other o = {0, at};
                    d.context = &o;
                    CHECK_STATUS(moe_ep_profile(&d, &choice), MOE_STATUS(MOE_ERR_CONFLICT, peers));
                    CHECK(o.calls == at, "call %d of %d", o.calls, at);
                    CHECK(choice.combine_ms[1] == 0 && choice.num_ranks == 0, "a choice is left");
                    tgroup_wait(&j.g);
                }
                { /* what this rank alone is refused, it tells the others */
                    moe_ep_layer_desc wrong = j.rank[0].ep;
                    wrong.layer.x = 0;
                    rank[0].layer = &wrong;
                    calls = 0;
                    d.allgather = lay_alone, d.context = &calls;
                    CHECK_STATUS(moe_ep_profile(&d, &choice), MOE_STATUS(MOE_ERR_NULL, x));
                    CHECK(calls == 2, "%d calls of the all-gather", calls);
                    rank[0].layer = &j.rank[0].ep;
                }
                d.allgather = 0;
            }
            d.num_mine = W + 1;
            CHECK_STATUS(moe_ep_profile(&d, &choice), MOE_STATUS(MOE_ERR_RANGE, num_mine));
            d.num_mine = 0;
            CHECK_STATUS(moe_ep_profile(&d, &choice), MOE_STATUS(MOE_ERR_RANGE, num_mine));
            d.num_mine = W;
            { /* little room: the forms that fit */
                moe_ep_layer_desc small[TGROUP_MOST];
                for (int r = 0; r < W; ++r) {
                    size_t bytes;
                    small[r] = j.rank[r].ep;
                    small[r].side_stream = 0;
                    small[r].buffers.dispatch_form = MOE_EP_ALL_TO_ALL;
                    small[r].buffers.combine_form = MOE_EP_GATHERED;
                    CHECK_STATUS(moe_ep_layer_workspace(&small[r], &bytes), MOE_OK);
                    small[r].layer.workspace_bytes = bytes;
                    rank[r].layer = &small[r];
                }
                CHECK_STATUS(moe_ep_profile(&d, &choice), MOE_OK);
                CHECK(choice.combine_form == MOE_EP_GATHERED, "combine %d", choice.combine_form);
                CHECK(choice.combine_ms[MOE_EP_REDUCED] == 0 &&
                          choice.dispatch_ms[MOE_EP_ALL_GATHER_COPY] == 0 &&
                          choice.dispatch_ms[MOE_EP_ALL_TO_ALL] > 0,
                      "forms without room");
                small[0].layer.x = 0;
                CHECK_STATUS(moe_ep_profile(&d, &choice), MOE_STATUS(MOE_ERR_NULL, x));
            }
        }
        lay_free(&j);
    }
}

static void ep_profile(void)
{
    RUN(test_choice_text);
    RUN(test_profile);
}

#endif
