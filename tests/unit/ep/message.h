/* message.h: the exchange in messages beside that over peer pointers: what every rank receives, and
   the same bits of y. The host carries the messages. */
#ifndef MOE_TESTS_EP_MESSAGE_H
#define MOE_TESTS_EP_MESSAGE_H

#include "moe/ep/message.cuh"
#include "tests/unit/ep/exchange.h"

/* One rank's exchange in messages. */
typedef struct msg_rank {
    moe_peers peers; /* rank and num_ranks alone */
    moe_ep_dispatch_desc d;
    moe_ep_combine_desc c;
    moe_ep_message_prepared p;
    moe_ep_message_view v;
    moe_ep_message_counts counts;
    tbuf work;
} msg_rank;

static void msg_put(ep_job* j, msg_rank* m)
{
    for (int r = 0; r < j->c.W; ++r) {
        ep_rank* k = j->rank + r;
        msg_rank* a = m + r;
        size_t bytes = 0;
        tgroup_use(&j->g, r);
        memset((void*)a, 0, sizeof *a);
        a->peers.rank = r, a->peers.num_ranks = j->c.W;
        a->d = k->dispatch;
        a->d.peers = &a->peers;
        a->d.buffers.dispatch_form = 0;
        a->d.counters = 0;
        CHECK_STATUS(moe_ep_message_workspace(&a->d, &bytes), MOE_OK);
        a->work = tbuf_new("workspace of messages", bytes, 0);
        a->d.workspace = a->work.p, a->d.workspace_bytes = bytes;
        a->c = k->combine;
        a->c.dispatch = &a->d;
        a->c.rows = k->d_rows.p;
        tbuf_put(&k->d_rows, k->rows);
        tbuf_poison(&k->d_y);
        CHECK_STATUS(moe_ep_message_prepare(&a->d, &a->c, &a->p), MOE_OK);
        CHECK_STATUS(moe_ep_message_get_view(&a->p, &a->v), MOE_OK);
        TEST_CUDA(cudaDeviceSynchronize());
    }
    TEST_CUDA(cudaSetDevice(0));
}

static void msg_free(ep_job* j, msg_rank* m)
{
    for (int r = 0; r < j->c.W; ++r) {
        tgroup_use(&j->g, r);
        tbufs_free(TBUFS(&m[r].work));
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* Queues a part on all ranks and waits. */
static void msg_run(ep_job* j, msg_rank* m, int part)
{
    for (int r = 0; r < j->c.W; ++r) {
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_ep_message_run(&m[r].p, part, j->g.stream[r]), MOE_OK);
    }
    tgroup_wait(&j->g);
}

/* Carries all segments of a kind between n ranks of a group: number i is rank who[i] of it. */
static void msg_carry_among(const tgroup* g, const int* who, int n,
                            const moe_ep_message_prepared* const* p,
                            moe_ep_message_counts* const* counts, int kind)
{
    static moe_ep_segment s[TGROUP_MOST][MOE_PEERS_MAX_RANKS];
    for (int a = 0; a < n; ++a)
        CHECK_STATUS(moe_ep_message_segments(p[a], kind, counts[a], s[a]), MOE_OK);
    for (int a = 0; a < n; ++a)
        for (int b = 0; b < n; ++b) {
            void* host;
            if (!CHECK(s[a][b].send_bytes == s[b][a].recv_bytes, "from %d to %d: %d bytes, not %d",
                       a, b, (int)s[a][b].send_bytes, (int)s[b][a].recv_bytes))
                continue;
            if (!s[a][b].send_bytes) continue;
            host = test_host((int64_t)s[a][b].send_bytes);
            tgroup_use(g, who[a]);
            TEST_CUDA(cudaMemcpy(host, s[a][b].send, s[a][b].send_bytes, cudaMemcpyDeviceToHost));
            tgroup_use(g, who[b]);
            TEST_CUDA(cudaMemcpy(s[b][a].recv, host, s[b][a].recv_bytes, cudaMemcpyHostToDevice));
            TEST_CUDA(cudaDeviceSynchronize());
            free(host);
        }
    TEST_CUDA(cudaSetDevice(0));
}

/* Carries all segments of a kind between all ranks. */
static void msg_carry(ep_job* j, msg_rank* m, int kind)
{
    const moe_ep_message_prepared* p[TGROUP_MOST];
    moe_ep_message_counts* counts[TGROUP_MOST];
    int who[TGROUP_MOST];
    for (int r = 0; r < j->c.W; ++r) who[r] = r, p[r] = &m[r].p, counts[r] = &m[r].counts;
    msg_carry_among(&j->g, who, j->c.W, p, counts, kind);
}

/* Carries headers and reads them; the status of each rank's check must be `want`. */
static void msg_read(ep_job* j, msg_rank* m, moe_status want, uint64_t want_word)
{
    msg_carry(j, m, MOE_EP_SEGMENT_HEADERS);
    for (int r = 0; r < j->c.W; ++r) {
        uint64_t word = 1;
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_ep_message_read(&m[r].p, &m[r].counts, j->g.stream[r]), MOE_OK);
        TEST_CUDA(cudaStreamSynchronize(j->g.stream[r]));
        CHECK_STATUS(moe_ep_message_check(&m[r].counts, j->c.W, &word), want);
        CHECK(word == want_word, "rank %d: %llx", r, (unsigned long long)word);
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* Checks what rank r received, and its row maps, against the references. */
static void msg_check(ep_job* j, msg_rank* m, int r, const int32_t* rows)
{
    const ep_case* c = &j->c;
    const ep_rank* k = j->rank + r;
    const moe_ep_message_view* v = &m[r].v;
    const int W = c->W, K = c->K, S = c->num_scales, C = k->view.recv_tokens, D = C + 1;
    const int P = ep_local(j, r) ? ep_local(j, r) : 1;
    const int64_t row = (int64_t)c->H * moe_dtype_bytes(c->dtype);
    const int64_t step = v->x_stride * moe_dtype_bytes(c->dtype);
    int32_t* count = (int32_t*)ep_get(j, r, v->recv_count, W * 4);
    int32_t* token = (int32_t*)ep_get(j, r, v->recv_token, (int64_t)W * D * 4);
    int32_t* ids = (int32_t*)ep_get(j, r, v->recv_ids, (int64_t)W * D * K * 4);
    float* weights = (float*)ep_get(j, r, v->recv_weights, (int64_t)W * D * K * 4);
    float* scales = (float*)ep_get(j, r, v->recv_scales, (int64_t)W * D * S * 4);
    char* x = (char*)ep_get(j, r, v->x, (int64_t)(W * D - 1) * step);
    moe_place* place = (moe_place*)ep_get(j, r, v->recv_place, (int64_t)W * D * K * 8);
    int32_t* offset = (int32_t*)ep_get(j, r, v->expert_offset, (P + 1) * 4);
    int32_t* want_offset = (int32_t*)ep_get(j, r, k->view.expert_offset, (P + 1) * 4);
    int64_t wrong = 0;
    CHECK(v->num_x == W * D && m[r].v.num_local == ep_local(j, r), "sizes");
    CHECK_INTS("recv_count", count, k->want.recv_count, W);
    CHECK_INTS("expert_offset", offset, want_offset, P + 1);
    for (int s = 0; s < W; ++s)
        for (int i = 0; i < k->want.recv_count[s]; ++i) {
            const int64_t at = (int64_t)s * C + i, here = (int64_t)s * D + i;
            const int t = k->want.recv_token[at];
            wrong += token[here] != t;
            wrong += memcmp(ids + here * K, k->want.recv_ids + at * K, (size_t)K * 4) != 0;
            wrong += memcmp(weights + here * K, k->want.recv_weights + at * K, (size_t)K * 4) != 0;
            wrong += memcmp(x + here * step, (char*)j->rank[s].x + t * row, (size_t)row) != 0;
            wrong +=
                memcmp(scales + here * S, j->rank[s].scales + (int64_t)t * S, (size_t)S * 4) != 0;
            for (int n = 0; n < K; ++n) wrong += place[here * K + n].row != rows[at * K + n];
        }
    CHECK(wrong == 0, "rank %d: %lld parts of messages are wrong", r, (long long)wrong);
    TFREE(count, token, ids, weights, scales, x, place, offset, want_offset);
}

/* One exchange over peer pointers, and the same in messages, with and without weights. */
static void msg_compare(const ep_case* c, uint64_t salt)
{
    static ep_job j;
    static msg_rank m[TGROUP_MOST];
    int32_t* rows[TGROUP_MOST] = {0};
    trand q = trand_new(salt + 700);
    if (ep_new(&j, c, salt)) {
        ep_dispatch(&j);
        tgroup_wait(&j.g);
        for (int r = 0; r < c->W; ++r) rows[r] = ep_check_maps(&j, r);
        ep_fill_rows(&j, &q);
        for (int weighted = 1; weighted >= 0; --weighted) {
            void* y[TGROUP_MOST];
            for (int r = 0; r < c->W && !weighted; ++r) j.rank[r].combine.weights = 0;
            if (!weighted) ep_dispatch(&j);
            ep_combine(&j);
            tgroup_wait(&j.g);
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < c->W; ++r) {
                tgroup_use(&j.g, r);
                y[r] = tbuf_copy(&j.rank[r].d_y);
            }
            msg_put(&j, m);
            msg_run(&j, m, MOE_EP_MESSAGE_PACK);
            msg_read(&j, m, MOE_OK, 0);
            msg_carry(&j, m, MOE_EP_SEGMENT_RECORDS);
            msg_run(&j, m, MOE_EP_MESSAGE_UNPACK);
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < c->W; ++r) msg_check(&j, m, r, rows[r]);
            msg_run(&j, m, MOE_EP_MESSAGE_PACK_ROWS);
            msg_carry(&j, m, MOE_EP_SEGMENT_ROWS);
            msg_carry(&j, m, MOE_EP_SEGMENT_HEADERS);
            msg_run(&j, m, MOE_EP_MESSAGE_SUM);
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < c->W; ++r) {
                tgroup_use(&j.g, r);
                CHECK(tbuf_holds(&j.rank[r].d_y, y[r]), "rank %d: not the bits of peer pointers",
                      r);
                free(y[r]);
            }
            msg_free(&j, m);
        }
        for (int r = 0; r < c->W; ++r) free(rows[r]);
    }
    ep_free(&j);
}

static void test_messages(void)
{
    const ep_case list[] = {
        /* W, T, H, E, K, forms, dtype, draw, replicas, C, scales, misalign, same, fp32, pad, m */
        {1, 5, 16, 3, 2, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 0},
        {2, 37, 64, 8, 3, 0, 0, MOE_FP16, EP_RANDOM, 0, 0, 2, 0, 0, 0, 0, 8},
        {4, 20, 32, 7, 2, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 3, 2, 0, 0, 0, 0},
        {4, 12, 8, 2, 1, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 0},
        {4, 33, 40, 9, 4, 0, 0, MOE_FP32, EP_RANDOM, 1, 0, 1, 4, 0, 0, 0, 0},
        {8, 19, 24, 16, 4, 0, 0, MOE_FP16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 0},
        {4, 30, 16, 8, 2, 0, 0, MOE_BF16, EP_ONE_RANK, 0, 0, 0, 0, 0, 0, 0, 0},
        {3, 10, 16, 8, 2, 0, 0, MOE_BF16, EP_EMPTY, 0, 0, 0, 0, 0, 0, 0, 0},
        {2, 40, 16, 64, 40, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 0},
        {5, 64, 16, 20, 1, 0, 0, MOE_BF16, EP_RANDOM, 0, 40, 0, 0, 0, 0, 0, 0},
        {3, 20, 16, 8, 2, 0, 0, MOE_FP16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 8, 0},
        {3, 25, 24, 8, 3, 0, 0, MOE_FP16, EP_RANDOM, 1, 0, 0, 0, 0, 1, 0, 0},
        {2, 1500, 8, 6, 2, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 0},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; ++i)
        for (int form = MOE_EP_REDUCED; form <= MOE_EP_GATHERED; ++form) {
            ep_case c = list[i];
            c.combine = form;
            if (MOE_ON_HOST && (i + (size_t)form) % 2 && i > 3) continue;
            msg_compare(&c, 800 + i);
        }
}

/* A rank that stops, in either half, stops all, and no y is written. */
static void test_message_faults(void)
{
    const ep_case c = {3, 12, 16, 6, 2, 0, MOE_EP_GATHERED, MOE_BF16, EP_RANDOM, 0, 0,
                       0, 0,  1,  0, 0, 0};
    const uint64_t word = MOEI_FAULT_KEY(MOE_FAULT_BAD_TABLE, 1, 17);
    static ep_job j;
    static msg_rank m[TGROUP_MOST];
    for (int late = 0; late < 2; ++late) {
        if (ep_new(&j, &c, 820)) {
            msg_put(&j, m);
            if (!late) TEST_CUDA(cudaMemcpy(j.g.fault[1], &word, 8, cudaMemcpyHostToDevice));
            TEST_CUDA(cudaDeviceSynchronize());
            msg_run(&j, m, MOE_EP_MESSAGE_PACK);
            msg_read(&j, m, late ? MOE_OK : MOE_STATUS(MOE_ERR_CONFLICT, fault), late ? 0 : word);
            if (!late) msg_run(&j, m, MOE_EP_MESSAGE_TAKE);
            if (late) {
                msg_carry(&j, m, MOE_EP_SEGMENT_RECORDS);
                msg_run(&j, m, MOE_EP_MESSAGE_UNPACK);
                TEST_CUDA(cudaMemcpy(j.g.fault[1], &word, 8, cudaMemcpyHostToDevice));
                TEST_CUDA(cudaDeviceSynchronize());
                msg_run(&j, m, MOE_EP_MESSAGE_PACK_ROWS);
                msg_carry(&j, m, MOE_EP_SEGMENT_ROWS);
                msg_carry(&j, m, MOE_EP_SEGMENT_HEADERS);
                msg_run(&j, m, MOE_EP_MESSAGE_SUM);
            }
            for (int r = 0; r < 3; ++r) {
                CHECK(tgroup_fault(&j.g, r) == word, "rank %d: %llx", r,
                      (unsigned long long)tgroup_fault(&j.g, r));
                tgroup_use(&j.g, r);
                CHECK(tbuf_holds(&j.rank[r].d_y, 0), "rank %d wrote y", r);
            }
            TEST_CUDA(cudaSetDevice(0));
            msg_free(&j, m);
        }
        ep_free(&j);
    }
}

static void test_message_refusals(void)
{
    const ep_case c = {2, 8, 16, 6, 2, 0, MOE_EP_GATHERED, MOE_BF16, EP_RANDOM, 0, 0,
                       0, 0, 1,  0, 0, 0};
    static ep_job j;
    static msg_rank m[TGROUP_MOST];
    if (!ep_new(&j, &c, 830)) return;
    msg_put(&j, m);
    {
        moe_ep_dispatch_desc d;
        moe_ep_combine_desc k;
        static moe_ep_message_prepared p;
        moe_peers peers = m[0].peers;
        moe_ep_segment s[2];
#define MSG_REFUSED(change, kind, field)                                                           \
    do {                                                                                           \
        d = m[0].d, k = m[0].c, peers = m[0].peers;                                                \
        d.peers = &peers;                                                                          \
        change;                                                                                    \
        memset((void*)&p, 0xda, sizeof p);                                                         \
        CHECK_STATUS(moe_ep_message_prepare(&d, &k, &p), MOE_STATUS(kind, field));                 \
        test_empty(&p, sizeof p, __LINE__);                                                        \
    } while (0)
        MSG_REFUSED(d.peers = 0, MOE_ERR_NULL, peers);
        MSG_REFUSED(peers.num_ranks = 129, MOE_ERR_RANGE, peers);
        MSG_REFUSED(peers.rank = 2, MOE_ERR_RANGE, peers);
        MSG_REFUSED(d.fault = 0, MOE_ERR_NULL, fault);
        MSG_REFUSED(d.x = 0, MOE_ERR_NULL, x);
        MSG_REFUSED(d.ids = 0, MOE_ERR_NULL, ids);
        MSG_REFUSED(d.num_tokens = 9, MOE_ERR_RANGE, num_tokens);
        MSG_REFUSED(d.buffers.dispatch_form = MOE_EP_ALL_TO_ALL, MOE_ERR_OPTION, dispatch_form);
        MSG_REFUSED(d.buffers.combine_form = MOE_EP_REDUCE_SCATTER, MOE_ERR_OPTION, combine_form);
        MSG_REFUSED(d.workspace = 0, MOE_ERR_NULL, workspace);
        MSG_REFUSED(d.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
        MSG_REFUSED(d.counters = (moe_ep_counters*)TEST_FAR, MOE_ERR_CONFLICT, counters);
        MSG_REFUSED(k.rows = 0, MOE_ERR_NULL, rows);
        MSG_REFUSED((k.rows = 0, d.buffers.combine_form = MOE_EP_REDUCED), MOE_ERR_NULL, rows);
        MSG_REFUSED(k.y = 0, MOE_ERR_NULL, y);
        MSG_REFUSED(k.weights += 1, MOE_ERR_CONFLICT, weights);
#undef MSG_REFUSED
        CHECK_STATUS(moe_ep_message_prepare(&m[0].d, 0, &p), MOE_OK);
        CHECK_STATUS(moe_ep_message_run(&p, MOE_EP_MESSAGE_SUM, j.g.stream[0]),
                     MOE_STATUS(MOE_ERR_CONFLICT, part));
        CHECK_STATUS(moe_ep_message_run(&p, 5, j.g.stream[0]), MOE_STATUS(MOE_ERR_OPTION, part));
        CHECK_STATUS(moe_ep_message_segments(&p, MOE_EP_SEGMENT_ROWS, 0, s),
                     MOE_STATUS(MOE_ERR_NULL, counts));
        m[0].counts.received[1].tokens = c.T + 1;
        CHECK_STATUS(moe_ep_message_segments(&p, MOE_EP_SEGMENT_RECORDS, &m[0].counts, s),
                     MOE_STATUS(MOE_ERR_RANGE, recv_tokens));
        CHECK_STATUS(moe_ep_message_segments(&p, 3, &m[0].counts, s),
                     MOE_STATUS(MOE_ERR_OPTION, kind));
    }
    msg_free(&j, m);
    ep_free(&j);
}

static void ep_message(void)
{
    RUN(test_messages);
    RUN(test_message_faults);
    RUN(test_message_refusals);
}

#endif
