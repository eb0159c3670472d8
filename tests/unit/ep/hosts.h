/* hosts.h: exchanges over several hosts, in one process: a group of peers a host, and the messages
   between hosts carried by the test. Whole numbers, checked exactly. */
#ifndef MOE_TESTS_EP_HOSTS_H
#define MOE_TESTS_EP_HOSTS_H

#include "moe/ep/hosts.cuh"
#include "tests/unit/ep/message.h"
#include "tests/unit/ep/replay.h"

typedef struct hosts_case {
    int M, L;       /* hosts, ranks of each */
    int T, H, E, K; /* T: most tokens of a rank */
    int dispatch, combine;
    int recv_tokens; /* of a rank from one of another host; 0: T */
} hosts_case;

/* One rank. */
typedef struct hosts_rank {
    int host, local, T, first, P;
    moe_peers rail, near; /* rail: numbers alone */
    void* region;
    moe_ep_hosts_desc d;
    moe_ep_hosts_prepared p;
    moe_ep_message_counts counts;
    tbuf x, ids, residual, y, rows, work, counters;
    void *h_x, *h_residual;
    int32_t* h_ids;
} hosts_rank;

typedef struct hosts_job {
    hosts_case c;
    tgroup g; /* devices, streams, fault words */
    hosts_rank rank[TGROUP_MOST];
} hosts_job;

/* Fills in a rank's sizes and numbers. */
static void hosts_describe(hosts_job* j, int r)
{
    const hosts_case* c = &j->c;
    hosts_rank* k = j->rank + r;
    moe_ep_hosts_desc* d = &k->d;
    memset((void*)d, 0, sizeof *d);
    k->host = r / c->L, k->local = r % c->L;
    memset(&k->rail, 0, sizeof k->rail);
    k->rail.rank = k->host, k->rail.num_ranks = c->M;
    moe_ep_hosts_experts(k->host, c->M, k->local, c->L, c->E, &k->first, &k->P);
    d->dispatch.peers = &k->rail;
    d->dispatch.fault = j->g.fault[r];
    d->dispatch.buffers.max_tokens = c->T;
    d->dispatch.buffers.recv_tokens = c->recv_tokens;
    d->dispatch.buffers.hidden = c->H;
    d->dispatch.buffers.num_experts = c->E;
    d->dispatch.buffers.top_k = c->K;
    d->dispatch.tag = 7;
    d->near_buffers.dispatch_form = c->dispatch;
    d->near_buffers.combine_form = c->combine;
    d->near_buffers.channel = 2;
    d->side_stream = j->g.side[r];
    d->side_event[0] = j->g.side_event[r][0], d->side_event[1] = j->g.side_event[r][1];
}

/* Connects the ranks of each host. */
static int hosts_connect(hosts_job* j)
{
    const hosts_case* c = &j->c;
    for (int h = 0; h < c->M; ++h) {
        const int first = h * c->L;
        moe_peers near[TGROUP_MOST];
        void* region[TGROUP_MOST];
        moe_peers_pair pair;
        uint64_t bytes = 0;
        if (!CHECK_STATUS(moe_ep_hosts_region(&j->rank[first].d, c->L, &bytes), MOE_OK)) return 0;
        for (int l = 0; l < c->L; ++l) {
            tgroup_use(&j->g, first + l);
            TEST_CUDA(cudaMalloc(&region[l], bytes));
            test_poison_device(region[l], bytes);
            TEST_CUDA(cudaDeviceSynchronize());
            j->rank[first + l].region = region[l];
        }
        if (!CHECK_STATUS(
                moe_peers_create_local(near, c->L, j->g.device + first, region, bytes, &pair),
                MOE_OK))
            return 0;
        for (int l = 0; l < c->L; ++l) {
            j->rank[first + l].near = near[l];
            /* ranks of other hosts of the test may share this one's device too */
            j->rank[first + l].near.ranks_on_device = j->g.peers[first + l].ranks_on_device;
            j->rank[first + l].d.near = &j->rank[first + l].near;
        }
    }
    return 1;
}

/* Puts a rank's arrays onto its device. */
static int hosts_put(hosts_job* j, int r, trand* q)
{
    const hosts_case* c = &j->c;
    hosts_rank* k = j->rank + r;
    moe_ep_hosts_desc* d = &k->d;
    const moe_ep_counters zeros = {0, 0, 0, 0, 0, 0, 0, 0};
    size_t bytes = 0;
    tgroup_use(&j->g, r);
    k->T = r == 0 ? c->T : r == c->M * c->L - 1 && r ? 0 : (int)trand_int(q, 0, c->T);
    k->h_x = test_host((int64_t)k->T * c->H * 2),
    k->h_residual = test_host((int64_t)k->T * c->H * 2);
    k->h_ids = (int32_t*)test_host((int64_t)k->T * c->K * 4);
    trand_fill_int(q, k->h_x, (int64_t)k->T * c->H, MOE_BF16, -1, 1);
    trand_fill_int(q, k->h_residual, (int64_t)k->T * c->H, MOE_BF16, -2, 2);
    for (int i = 0; i < k->T * c->K; ++i) k->h_ids[i] = (int32_t)trand_int(q, -1, c->E - 1);
    k->x = tbuf_from("x", k->h_x, (size_t)(k->T * c->H * 2), 0);
    k->residual = tbuf_from("residual", k->h_residual, (size_t)(k->T * c->H * 2), 0);
    k->ids = tbuf_from("ids", k->h_ids, (size_t)(k->T * c->K) * 4, 0);
    k->y = tbuf_new("y", (size_t)(k->T * c->H * 2), 0);
    k->counters = tbuf_from("counters", &zeros, sizeof zeros, 0);
    d->dispatch.x = k->x.p, d->dispatch.ids = (const int32_t*)k->ids.p;
    d->dispatch.num_tokens = k->T;
    d->combine.residual = k->residual.p, d->combine.y = k->y.p;
    d->counters = (moe_ep_counters*)k->counters.p;
    if (!CHECK_STATUS(moe_ep_hosts_workspace(d, &bytes), MOE_OK)) return 0;
    k->work = tbuf_new("workspace", bytes, 0);
    d->dispatch.workspace = k->work.p, d->dispatch.workspace_bytes = bytes;
    k->rows = tbuf_new("rows", (size_t)(c->M * (c->T + 1) * c->L * c->K * c->H) * 2, 0);
    d->rows = c->combine == MOE_EP_GATHERED ? 0 : k->rows.p;
    if (!CHECK_STATUS(moe_ep_hosts_prepare(d, &k->p), MOE_OK)) return 0;
    CHECK(k->p.view.num_local == k->P, "rank %d: %d experts", r, k->p.view.num_local);
    TEST_CUDA(cudaDeviceSynchronize());
    return 1;
}

/* Carries the segments of a kind along all rails. */
static void hosts_carry(hosts_job* j, int kind)
{
    for (int l = 0; l < j->c.L; ++l) {
        const moe_ep_message_prepared* p[TGROUP_MOST];
        moe_ep_message_counts* counts[TGROUP_MOST];
        int who[TGROUP_MOST];
        for (int h = 0; h < j->c.M; ++h) {
            who[h] = h * j->c.L + l;
            p[h] = &j->rank[who[h]].p.rail;
            counts[h] = &j->rank[who[h]].counts;
        }
        msg_carry_among(&j->g, who, j->c.M, p, counts, kind);
    }
}

/* Queues a part of the messages on all ranks and waits. */
static void hosts_part(hosts_job* j, int part)
{
    for (int r = 0; r < j->g.W; ++r) {
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_ep_message_run(&j->rank[r].p.rail, part, j->g.stream[r]), MOE_OK);
    }
    tgroup_wait(&j->g);
}

/* Queues what happens within the hosts: dispatch, rows, combine; waits. */
static void hosts_near(hosts_job* j)
{
    const hosts_case* c = &j->c;
    for (int r = 0; r < j->g.W; ++r) {
        hosts_rank* k = j->rank + r;
        const moe_ep_view* v = &k->p.view;
        moe_launch_config l = moe_grid(4, 64, 0, j->g.stream[r]);
        ep_scale_args s;
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_ep_dispatch_run(&k->p.dispatch, j->g.stream[r]), MOE_OK);
        s.x = (const char*)v->recv_x, s.row_slot = v->row_slot, s.expert_offset = v->expert_offset;
        s.fault = j->g.fault[r];
        s.rows = (char*)(c->combine == MOE_EP_GATHERED ? v->rows : k->rows.p);
        s.P = k->P, s.first = k->first, s.H = c->H, s.K = c->K, s.dtype = MOE_BF16;
        s.in_order = v->in_order;
        l.dependent = 1;
        CHECK_STATUS(MOE_LAUNCH(ep_scale_rows, l, s), MOE_OK);
        CHECK_STATUS(moe_ep_combine_run(&k->p.combine, j->g.stream[r]), MOE_OK);
    }
    tgroup_wait(&j->g);
}

/* Reads and checks the headers on all ranks. */
static void hosts_read(hosts_job* j, int stopped)
{
    hosts_carry(j, MOE_EP_SEGMENT_HEADERS);
    for (int r = 0; r < j->g.W; ++r) {
        hosts_rank* k = j->rank + r;
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_ep_message_read(&k->p.rail, &k->counts, j->g.stream[r]), MOE_OK);
        TEST_CUDA(cudaStreamSynchronize(j->g.stream[r]));
        CHECK_STATUS(moe_ep_message_check(&k->counts, j->c.M, 0),
                     stopped == k->local ? MOE_STATUS(MOE_ERR_CONFLICT, fault) : MOE_OK);
    }
    TEST_CUDA(cudaSetDevice(0));
}

static int hosts_new(hosts_job* j, const hosts_case* c, uint64_t salt)
{
    trand q = trand_new(salt);
    int ok = 1;
    memset((void*)j, 0, sizeof *j);
    j->c = *c;
    if (!tgroup_new(&j->g, c->M * c->L, MOE_PEERS_HEADER)) return 0;
    for (int r = 0; r < j->g.W; ++r) {
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_preload(), MOE_OK);
        CHECK_STATUS(moe_preload_kernel((const void*)ep_scale_rows), MOE_OK);
        hosts_describe(j, r);
    }
    ok = hosts_connect(j);
    for (int r = 0; r < j->g.W && ok; ++r) ok = hosts_put(j, r, &q);
    TEST_CUDA(cudaSetDevice(0));
    return ok;
}

static void hosts_free(hosts_job* j)
{
    tgroup_wait(&j->g);
    for (int r = 0; r < j->g.W; ++r) {
        hosts_rank* k = j->rank + r;
        tgroup_use(&j->g, r);
        tbufs_free(TBUFS(&k->x, &k->ids, &k->residual, &k->y, &k->rows, &k->work, &k->counters));
        TFREE(k->h_x, k->h_residual, k->h_ids);
        TEST_CUDA(cudaFree(k->region));
    }
    tgroup_free(&j->g);
}

/* Checks y of rank r: residual + sum over its slots of (id + 1) x. */
static void hosts_check(hosts_job* j, int r)
{
    const hosts_case* c = &j->c;
    hosts_rank* k = j->rank + r;
    void* y;
    int64_t wrong = 0;
    tgroup_use(&j->g, r);
    y = tbuf_copy(&k->y);
    for (int t = 0; t < k->T; ++t) {
        int sum = 0;
        for (int s = 0; s < c->K; ++s) sum += k->h_ids[t * c->K + s] + 1;
        for (int h = 0; h < c->H; ++h) {
            const int64_t at = (int64_t)t * c->H + h;
            wrong += moe_load(y, at, MOE_BF16) != moe_load(k->h_residual, at, MOE_BF16) +
                                                      (float)sum * moe_load(k->h_x, at, MOE_BF16);
        }
    }
    CHECK(wrong == 0, "rank %d: %lld elements of y are wrong", r, (long long)wrong);
    free(y);
}

static void hosts_run(const hosts_case* c, uint64_t salt)
{
    static hosts_job j;
    if (hosts_new(&j, c, salt))
        for (int round = 0; round < 2; ++round) {
            for (int r = 0; r < j.g.W; ++r) {
                tgroup_use(&j.g, r);
                tbuf_poison(&j.rank[r].y);
            }
            hosts_part(&j, MOE_EP_MESSAGE_PACK);
            hosts_read(&j, -1);
            hosts_carry(&j, MOE_EP_SEGMENT_RECORDS);
            hosts_part(&j, MOE_EP_MESSAGE_UNPACK);
            hosts_near(&j);
            hosts_part(&j, MOE_EP_MESSAGE_PACK_ROWS);
            hosts_carry(&j, MOE_EP_SEGMENT_ROWS);
            hosts_carry(&j, MOE_EP_SEGMENT_HEADERS);
            hosts_part(&j, MOE_EP_MESSAGE_SUM);
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < j.g.W; ++r) hosts_check(&j, r);
        }
    hosts_free(&j);
}

static void test_hosts(void)
{
    static const int shape[][6] = {/* M, L, T, E, K, C */
                                   {2, 2, 21, 9, 3, 0},  {3, 2, 13, 7, 2, 0}, {2, 1, 17, 4, 2, 0},
                                   {1, 3, 11, 5, 3, 0},  {4, 4, 9, 18, 4, 0}, {2, 3, 40, 12, 1, 30},
                                   {2, 2, 1100, 8, 2, 0}};
    for (int i = 0; i < 7; ++i)
        for (int pair = 0; pair < EP_PAIRS; ++pair) {
            const hosts_case c = {
                shape[i][0], shape[i][1],          shape[i][2],         16,         shape[i][3],
                shape[i][4], ep_dispatch_of(pair), ep_combine_of(pair), shape[i][5]};
            if (MOE_ON_HOST && (i == 6 ? pair : (i + pair) % (i ? 6 : 3))) continue;
            hosts_run(&c, 900 + (uint64_t)i);
        }
}

/* A rank that stops: its rail's ranks end with its fault, and their hosts' ranks with them. */
static void test_hosts_stop(void)
{
    const hosts_case c = {2, 2, 9, 16, 6, 2, 0, 0, 0};
    const uint64_t word = MOEI_FAULT_KEY(MOE_FAULT_BAD_TABLE, 1, 17);
    static hosts_job j;
    if (hosts_new(&j, &c, 950)) {
        tgroup_use(&j.g, 1); /* host 0, local 1 */
        TEST_CUDA(cudaMemcpy(j.g.fault[1], &word, 8, cudaMemcpyHostToDevice));
        TEST_CUDA(cudaDeviceSynchronize());
        hosts_part(&j, MOE_EP_MESSAGE_PACK);
        hosts_read(&j, 1);
        for (int r = 0; r < 4; ++r) {
            const int part = j.rank[r].local == 1 ? MOE_EP_MESSAGE_TAKE : MOE_EP_MESSAGE_UNPACK;
            tgroup_use(&j.g, r);
            CHECK_STATUS(moe_ep_message_run(&j.rank[r].p.rail, part, j.g.stream[r]), MOE_OK);
        }
        tgroup_wait(&j.g);
        hosts_near(&j);
        for (int r = 0; r < 4; ++r) {
            CHECK(tgroup_fault(&j.g, r) == word, "rank %d: %llx", r,
                  (unsigned long long)tgroup_fault(&j.g, r));
            tgroup_use(&j.g, r);
            CHECK(tbuf_holds(&j.rank[r].y, 0), "rank %d wrote y", r);
        }
    }
    hosts_free(&j);
}

static void test_hosts_refusals(void)
{
    const hosts_case c = {2, 2, 9, 16, 6, 2, 0, 0, 0};
    static hosts_job j;
    static moe_ep_hosts_prepared p;
    if (hosts_new(&j, &c, 960)) {
        moe_ep_hosts_desc d;
        tgroup_use(&j.g, 0);
#define HOSTS_REFUSED(change, kind, field)                                                         \
    do {                                                                                           \
        d = j.rank[0].d;                                                                           \
        change;                                                                                    \
        memset((void*)&p, 0xda, sizeof p);                                                         \
        CHECK_STATUS(moe_ep_hosts_prepare(&d, &p), MOE_STATUS(kind, field));                       \
        test_empty(&p, sizeof p, __LINE__);                                                        \
    } while (0)
        HOSTS_REFUSED(d.dispatch.peers = 0, MOE_ERR_NULL, peers);
        HOSTS_REFUSED(d.near = 0, MOE_ERR_NULL, peers);
        HOSTS_REFUSED(d.dispatch.x = 0, MOE_ERR_NULL, x);
        HOSTS_REFUSED(d.dispatch.num_local = 1, MOE_ERR_CONFLICT, num_local);
        HOSTS_REFUSED(d.dispatch.replica = (const moe_ep_expert*)TEST_FAR, MOE_ERR_CONFLICT,
                      replica);
        HOSTS_REFUSED(d.dispatch.buffers.num_experts = 1, MOE_ERR_RANGE, num_experts);
        HOSTS_REFUSED(d.dispatch.buffers.combine_form = MOE_EP_GATHERED, MOE_ERR_OPTION,
                      combine_form);
        HOSTS_REFUSED(d.dispatch.buffers.rows_dtype = MOE_FP32, MOE_ERR_DTYPE, rows_dtype);
        HOSTS_REFUSED(d.near_buffers.hidden = 16, MOE_ERR_CONFLICT, buffers);
        HOSTS_REFUSED(d.near_buffers.combine_form = 9, MOE_ERR_OPTION, combine_form);
        HOSTS_REFUSED(d.combine.rows = (const void*)TEST_FAR, MOE_ERR_CONFLICT, rows);
        HOSTS_REFUSED(d.combine.dispatch = &d.dispatch, MOE_ERR_CONFLICT, dispatch);
        HOSTS_REFUSED(d.combine.y = 0, MOE_ERR_NULL, y);
        HOSTS_REFUSED(d.rows = 0, MOE_ERR_NULL, rows);
        HOSTS_REFUSED(d.dispatch.workspace = 0, MOE_ERR_NULL, workspace);
        HOSTS_REFUSED(d.dispatch.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
#undef HOSTS_REFUSED
    }
    hosts_free(&j);
}

static void ep_hosts(void)
{
    RUN(test_hosts);
    RUN(test_hosts_stop);
    RUN(test_hosts_refusals);
}

#endif
