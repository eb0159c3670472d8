/* replay.h: exchanges one after the other without the host waiting, with new ids each time, with a
   rank that is late, from captured graphs, and very many. */
#ifndef MOE_TESTS_EP_REPLAY_H
#define MOE_TESTS_EP_REPLAY_H

#include "tests/unit/ep/case.h"
#include "tests/unit/ep/sleep.h"

/* In place of experts: writes row r of a rank = x of the row's token, times the number of the
   expert + 1 (of the group, by rank). in_order: x has the rows themselves. Then y[t] = residual[t] + sum over k of w (id + 1) x[t]. */
typedef struct ep_scale_args {
    const char* x;
    const int32_t* row_slot;
    const int32_t* expert_offset;
    uint64_t* fault;
    char* rows;
    int32_t P, H, K, first, dtype, in_order;
} ep_scale_args;

MOE_KERNEL(64, 1) ep_scale_rows(MOE_ARG(ep_scale_args) a)
{
    moe_pdl_wait();
    if (moe_fault_stopped(a.fault)) return;
    for (int e = 0; e < a.P; ++e)
        for (int r = a.expert_offset[e] + (int)blockIdx.x; r < a.expert_offset[e + 1];
             r += (int)gridDim.x)
            for (int h = (int)threadIdx.x; h < a.H; h += (int)blockDim.x) {
                const int64_t from = a.in_order ? r : a.row_slot[r] / a.K;
                const float v =
                    a.row_slot[r] < 0 ? 0.0f : moe_load_f32(a.x, from * a.H + h, a.dtype);
                moe_store_f32(a.rows, (int64_t)r * a.H + h, a.dtype, v * (float)(a.first + e + 1));
            }
}

/* Writes y of a rank into hash[0]: 64 bits in which every bit of y counts. */
typedef struct ep_hash_args {
    const uint16_t* y;
    uint64_t* hash;
    int64_t count;
} ep_hash_args;

MOE_KERNEL(256, 1) ep_hash(MOE_ARG(ep_hash_args) a)
{
    uint64_t sum = 0;
    for (int64_t i = threadIdx.x; i < a.count; i += blockDim.x)
        sum += ((uint64_t)a.y[i] + 1) * (0x9e3779b97f4a7c15ull * (uint64_t)(2 * i + 1));
    atomicAdd((unsigned long long*)a.hash, (unsigned long long)sum);
}

/* Loads the kernels of these tests on all devices: none is loaded while another one waits. */
static void ep_load(const ep_job* j)
{
    for (int r = 0; r < j->c.W; ++r) {
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_preload_kernel((const void*)ep_scale_rows), MOE_OK);
        CHECK_STATUS(moe_preload_kernel((const void*)ep_sleep), MOE_OK);
        CHECK_STATUS(moe_preload_kernel((const void*)ep_hash), MOE_OK);
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* One exchange of all ranks with ids from `ids`, weights 1 / 8 each, result to `y`; rank `late`
   sleeps first. */
static void ep_queue(ep_job* j, int32_t* const* ids, void* const* y, int late)
{
    const ep_case* c = &j->c;
    for (int r = 0; r < c->W; ++r) {
        ep_rank* k = j->rank + r;
        moe_ep_dispatch_desc d = k->dispatch;
        moe_ep_combine_desc m = k->combine; /* without weights */
        moe_launch_config l = moe_grid(4, 64, 0, j->g.stream[r]);
        ep_scale_args s;
        tgroup_use(&j->g, r);
        if (r == late) ep_sleep_on(j->g.stream[r], 300000);
        d.ids = ids[r];
        m.dispatch = &d;
        m.y = y[r];
        ep_vary();
        CHECK_STATUS(moe_ep_dispatch(&d, j->g.stream[r]), MOE_OK);
        s.x = (const char*)k->view.recv_x;
        s.row_slot = k->view.row_slot;
        s.expert_offset = k->view.expert_offset;
        s.fault = d.fault;
        s.in_order = k->view.in_order;
        s.rows = (char*)(c->combine == MOE_EP_GATHERED ? k->view.rows : k->d_rows.p);
        s.P = ep_local(j, r);
        s.H = c->H, s.K = c->K, s.dtype = c->dtype;
        s.first = moe_ep_first(r, c->E, c->W);
        l.dependent = 1;
        CHECK_STATUS(MOE_LAUNCH(ep_scale_rows, l, s), MOE_OK);
        CHECK_STATUS(moe_ep_combine(&m, j->g.stream[r]), MOE_OK);
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* Checks y of rank r, a host copy, for these ids, exactly: small whole numbers. */
static int ep_exact(const ep_job* j, int r, const int32_t* ids, const void* y)
{
    const ep_case* c = &j->c;
    const ep_rank* k = j->rank + r;
    for (int t = 0; t < k->T; ++t) {
        int sum = 0;
        for (int s = 0; s < c->K; ++s) sum += ids[t * c->K + s] + 1;
        for (int h = 0; h < c->H; ++h) {
            const float want = moe_load(k->x, (int64_t)t * c->H + h, c->dtype) * (float)sum;
            if (moe_load(y, (int64_t)t * c->H + h, c->dtype) != want)
                return CHECK(0, "rank %d, token %d, column %d: %g, not %g", r, t, h,
                             moe_load(y, (int64_t)t * c->H + h, c->dtype), want);
        }
    }
    return 1;
}

/* Sets all ranks' x to small whole numbers, no residual, no weights. */
static void ep_whole_numbers(ep_job* j, trand* q)
{
    ep_load(j);
    for (int r = 0; r < j->c.W; ++r) {
        ep_rank* k = j->rank + r;
        trand_fill_int(q, k->x, (int64_t)k->T * j->c.H, j->c.dtype, -1, 1);
        tgroup_use(&j->g, r);
        tbuf_put(&k->d_x, k->x);
        k->combine.residual = 0;
        k->combine.weights = 0;
    }
    TEST_CUDA(cudaSetDevice(0));
}

enum { EP_ROUNDS = 12 };

/* Rounds of one job: ids and results of each. */
typedef struct ep_rounds {
    int32_t* ids[EP_ROUNDS][TGROUP_MOST]; /* host */
    int32_t* d_ids[EP_ROUNDS][TGROUP_MOST];
    void* y[EP_ROUNDS][TGROUP_MOST];
    int rounds;
} ep_rounds;

static void ep_rounds_new(ep_job* j, ep_rounds* a, int rounds, trand* q)
{
    a->rounds = rounds;
    for (int n = 0; n < rounds; ++n)
        for (int r = 0; r < j->c.W; ++r) {
            const size_t bytes = (size_t)j->rank[r].T * (size_t)j->c.K * 4;
            a->ids[n][r] = (int32_t*)test_host((int64_t)bytes);
            for (size_t i = 0; i < bytes / 4; ++i) a->ids[n][r][i] = ep_draw_id(&j->c, q);
            tgroup_use(&j->g, r);
            TEST_CUDA(cudaMalloc((void**)&a->d_ids[n][r], bytes + 4));
            if (bytes)
                TEST_CUDA(cudaMemcpy(a->d_ids[n][r], a->ids[n][r], bytes, cudaMemcpyHostToDevice));
            TEST_CUDA(cudaMalloc(&a->y[n][r], j->rank[r].d_y.bytes + 4));
            TEST_CUDA(cudaDeviceSynchronize());
        }
    TEST_CUDA(cudaSetDevice(0));
}

static void ep_rounds_free(ep_job* j, ep_rounds* a, int check)
{
    tgroup_wait(&j->g);
    for (int n = 0; n < a->rounds; ++n)
        for (int r = 0; r < j->c.W; ++r) {
            void* y = ep_get(j, r, a->y[n][r], (int64_t)j->rank[r].d_y.bytes);
            if (check) (void)ep_exact(j, r, a->ids[n][r], y);
            tgroup_use(&j->g, r);
            TEST_CUDA(cudaFree(a->d_ids[n][r]));
            TEST_CUDA(cudaFree(a->y[n][r]));
            TFREE(y, a->ids[n][r]);
        }
    TEST_CUDA(cudaSetDevice(0));
}

/* Twelve exchanges in a row, other ids each time, in round n rank n late, no host sync. On the
   CPU four. */
static void test_back_to_back(void)
{
    const int rounds = MOE_ON_HOST ? 4 : EP_ROUNDS;
    static const int ranks[] = {2, 3, 4, 8, 16};
    static ep_job j;
    for (int pair = 0; pair < EP_PAIRS; ++pair)
        for (int i = 0; i < (int)(sizeof ranks / sizeof ranks[0]); ++i) {
            const int dtype = i % 2 ? MOE_FP16 : MOE_BF16, T = i ? 21 : 4;
            const ep_case c = {ranks[i],
                               T,
                               16,
                               18,
                               3,
                               ep_dispatch_of(pair),
                               ep_combine_of(pair),
                               dtype,
                               EP_RANDOM,
                               0,
                               0,
                               0,
                               0,
                               0,
                               0,
                               0,
                               0};
            trand q = trand_new(60 + (uint64_t)i);
            if (MOE_ON_HOST && i > 1 && (pair + i) % 6) continue;
            if (ep_new(&j, &c, 61 + (uint64_t)i)) {
                static ep_rounds a;
                ep_whole_numbers(&j, &q);
                ep_rounds_new(&j, &a, rounds, &q);
                for (int n = 0; n < rounds; ++n) ep_queue(&j, a.d_ids[n], a.y[n], n < c.W ? n : -1);
                tgroup_wait(&j.g);
                tgroup_clean(&j.g, __LINE__);
                ep_rounds_free(&j, &a, 1);
            }
            ep_free(&j);
        }
}

/* Graphs of one exchange, one a rank, replayed with other ids in the same buffer. */
static void test_graph(void)
{
    static ep_job j;
    for (int i = 0; i < 2 * EP_PAIRS; ++i) { /* the last: few enough tokens for one launch */
        const int pair = i % EP_PAIRS, few = i >= EP_PAIRS;
        const int W = few ? 2 : 4, T = few ? 4 : 19;
        const ep_case c = {
            W, T, 16, 7, 2, ep_dispatch_of(pair), ep_combine_of(pair), MOE_BF16, EP_RANDOM, 0, 0, 0,
            0, 0, 0,  0, 0};
        trand q = trand_new(70);
        if (ep_new(&j, &c, 71)) {
            static ep_rounds a;
            cudaGraphExec_t exec[4];
            cudaGraph_t graph[4];
            int32_t* ids[TGROUP_MOST];
            void* y[TGROUP_MOST];
            ep_whole_numbers(&j, &q);
            ep_rounds_new(&j, &a, 6, &q);
            for (int r = 0; r < W; ++r) {
                ids[r] = (int32_t*)j.rank[r].d_ids.p;
                y[r] = j.rank[r].d_y.p;
                tgroup_use(&j.g, r);
                TEST_CUDA(cudaStreamBeginCapture(j.g.stream[r], cudaStreamCaptureModeThreadLocal));
            }
            ep_queue(&j, ids, y, -1);
            for (int r = 0; r < W; ++r) {
                tgroup_use(&j.g, r);
                TEST_CUDA(cudaStreamEndCapture(j.g.stream[r], &graph[r]));
            }
            for (int r = 0; r < W; ++r) {
                tgroup_use(&j.g, r);
                TEST_CUDA(cudaGraphInstantiate(&exec[r], graph[r], 0));
                TEST_CUDA(cudaGraphDestroy(graph[r]));
            }
            for (int n = 0; n < 6; ++n)
                for (int r = 0; r < W; ++r) {
                    const size_t bytes = (size_t)j.rank[r].T * (size_t)c.K * 4;
                    const size_t rows = j.rank[r].d_y.bytes;
                    tgroup_use(&j.g, r);
                    if (bytes)
                        TEST_CUDA(cudaMemcpyAsync(ids[r], a.d_ids[n][r], bytes,
                                                  cudaMemcpyDeviceToDevice, j.g.stream[r]));
                    TEST_CUDA(cudaGraphLaunch(exec[r], j.g.stream[r]));
                    if (rows)
                        TEST_CUDA(cudaMemcpyAsync(a.y[n][r], y[r], rows, cudaMemcpyDeviceToDevice,
                                                  j.g.stream[r]));
                }
            tgroup_wait(&j.g);
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < W; ++r) TEST_CUDA(cudaGraphExecDestroy(exec[r]));
            ep_rounds_free(&j, &a, 1);
        }
        ep_free(&j);
    }
}

/* Very many exchanges, ids of twelve rounds in turn: a hash of each y must be that of the round. On
   the CPU fewer. */
static void test_many_times(void)
{
    const int times = MOE_ON_HOST ? test_long() ? 120 : 14 : test_long() ? 10000 : 120;
    static ep_job j;
    for (int i = 0; i < EP_PAIRS + 1; ++i) { /* the last: few enough tokens for one launch */
        const int pair = i % EP_PAIRS, few = i == EP_PAIRS;
        const int W = few ? 2 : 4, T = few ? 4 : 24;
        const ep_case c = {W,
                           T,
                           64,
                           16,
                           4,
                           ep_dispatch_of(pair),
                           ep_combine_of(pair),
                           MOE_BF16,
                           EP_RANDOM,
                           0,
                           0,
                           0,
                           0,
                           1,
                           0,
                           0,
                           0};
        if (MOE_ON_HOST && pair % 5 && pair != 3) continue; /* each form once */
        trand q = trand_new(80);
        if (ep_new(&j, &c, 81)) {
            static ep_rounds a;
            uint64_t* hash[TGROUP_MOST];
            int64_t bad = 0;
            ep_load(&j);
            ep_rounds_new(&j, &a, EP_ROUNDS, &q);
            for (int r = 0; r < c.W; ++r) {
                tgroup_use(&j.g, r);
                TEST_CUDA(cudaMalloc((void**)&hash[r], (size_t)times * 8));
                TEST_CUDA(cudaMemset(hash[r], 0, (size_t)times * 8));
                TEST_CUDA(cudaDeviceSynchronize());
            }
            for (int n = 0; n < times; ++n) {
                ep_queue(&j, a.d_ids[n % EP_ROUNDS], a.y[n % EP_ROUNDS], -1);
                for (int r = 0; r < c.W; ++r) {
                    moe_launch_config l = moe_grid(1, 256, 0, j.g.stream[r]);
                    ep_hash_args h;
                    tgroup_use(&j.g, r);
                    h.y = (const uint16_t*)a.y[n % EP_ROUNDS][r];
                    h.hash = hash[r] + n;
                    h.count = (int64_t)j.rank[r].d_y.bytes / 2;
                    CHECK_STATUS(MOE_LAUNCH(ep_hash, l, h), MOE_OK);
                }
                if (n % 100 == 99) tgroup_wait(&j.g); /* the queues of launches are not endless */
            }
            tgroup_wait(&j.g);
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < c.W; ++r) {
                uint64_t* h = (uint64_t*)ep_get(&j, r, hash[r], (int64_t)times * 8);
                for (int n = 0; n < times; ++n) bad += h[n] != h[n % EP_ROUNDS];
                CHECK(h[0] != h[1] && h[0] != 0, "rounds differ");
                tgroup_use(&j.g, r);
                TEST_CUDA(cudaFree(hash[r]));
                free(h);
            }
            CHECK(bad == 0, "%lld of %d results differ from the first of their round",
                  (long long)bad, times * c.W);
            ep_rounds_free(&j, &a, 0);
        }
        ep_free(&j);
    }
}

/* The handle of a dispatch serves again, as in a backward pass: other rows, the same ids, into
   other buffers; the row maps are those of the first. */
static void test_again(void)
{
    static ep_job j;
    for (int pair = 0; pair < EP_PAIRS; ++pair) {
        const ep_case c = {3,
                           17,
                           16,
                           8,
                           2,
                           ep_dispatch_of(pair),
                           ep_combine_of(pair),
                           MOE_BF16,
                           EP_RANDOM,
                           0,
                           0,
                           0,
                           0,
                           1,
                           0,
                           0,
                           0};
        trand q = trand_new(90);
        moe_ep_buffers b = ep_sizes(&c);
        uint64_t first_end = 0, end = 0;
        CHECK_STATUS(moe_ep_buffers_end(&b, c.W, &first_end), MOE_OK);
        b.region_offset = first_end;
        CHECK_STATUS(moe_ep_buffers_end(&b, c.W, &end), MOE_OK);
        if (ep_new(&j, &c, 91)) {
            void* bigger[TGROUP_MOST];
            moe_peers_pair missing;
            ep_whole_numbers(&j, &q);
            for (int r = 0; r < c.W; ++r) { /* regions with room for both */
                tgroup_use(&j.g, r);
                TEST_CUDA(cudaMalloc(&bigger[r], end));
                TEST_CUDA(cudaFree(j.g.memory[r]));
                j.g.memory[r] = bigger[r];
            }
            CHECK_STATUS(moe_peers_create_local(j.g.peers, c.W, j.g.device, bigger, end, &missing),
                         MOE_OK);
            ep_dispatch(&j);
            tgroup_wait(&j.g);
            for (int r = 0; r < c.W; ++r) { /* dO in place of x */
                tgroup_use(&j.g, r);
                trand_fill_int(&q, j.rank[r].x, (int64_t)j.rank[r].T * c.H, c.dtype, -1, 1);
                tbuf_put(&j.rank[r].d_x, j.rank[r].x);
            }
            for (int r = 0; r < c.W; ++r) {
                ep_rank* k = j.rank + r;
                static moe_ep_dispatch_desc again[TGROUP_MOST];
                moe_ep_dispatch_prepared p;
                moe_ep_view v;
                moe_launch_config l = moe_grid(4, 64, 0, j.g.stream[r]);
                ep_scale_args s;
                memset(&v, 0, sizeof v);
                tgroup_use(&j.g, r);
                again[r] = k->dispatch;
                again[r].buffers.region_offset = first_end;
                again[r].buffers.channel += 2;
                CHECK_STATUS(moe_ep_dispatch_get_view(&again[r], &v), MOE_OK);
                CHECK_STATUS(moe_ep_dispatch_prepare(&again[r], &p), MOE_OK);
                CHECK_STATUS(moe_ep_dispatch_run_part(&p, MOE_EP_SEND, j.g.stream[r]), MOE_OK);
                CHECK_STATUS(moe_ep_dispatch_run_part(&p, MOE_EP_RECEIVE, j.g.stream[r]), MOE_OK);
                CHECK_STATUS(moe_ep_dispatch_run_part(&p, MOE_EP_ANSWER, j.g.stream[r]), MOE_OK);
                s.x = (const char*)v.recv_x;
                s.row_slot = k->view.row_slot, s.expert_offset = k->view.expert_offset;
                s.fault = k->dispatch.fault;
                s.in_order = v.in_order;
                s.rows = (char*)(c.combine == MOE_EP_GATHERED ? v.rows : k->d_rows.p);
                s.P = ep_local(&j, r), s.first = moe_ep_first(r, c.E, c.W);
                s.H = c.H, s.K = c.K, s.dtype = c.dtype;
                l.dependent = 1;
                CHECK_STATUS(MOE_LAUNCH(ep_scale_rows, l, s), MOE_OK);
                k->combine.dispatch = &again[r];
                CHECK_STATUS(moe_ep_combine(&k->combine, j.g.stream[r]), MOE_OK);
            }
            tgroup_wait(&j.g);
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < c.W; ++r) {
                void* y;
                tgroup_use(&j.g, r);
                y = tbuf_copy(&j.rank[r].d_y);
                (void)ep_exact(&j, r, j.rank[r].ids, y);
                free(y);
            }
        }
        ep_free(&j);
    }
}

/* A rank that sleeps before the dispatch, or before the combine, shows in that wait of the others, and
   in no other one; its own waits are shorter. */
static void test_waits(void)
{
    static const uint64_t ns = MOE_ON_HOST ? 300000000 : 60000000;
    static ep_job j;
    for (int i = 0; i < 2 * EP_PAIRS; ++i) {
        const int pair = i % EP_PAIRS, phase = i / EP_PAIRS;
        const ep_case c = {3,
                           i % 2 ? 4 : 40,
                           16,
                           8,
                           2,
                           ep_dispatch_of(pair),
                           ep_combine_of(pair),
                           MOE_BF16,
                           EP_RANDOM,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0};
        if (MOE_ON_HOST && pair % 5 && pair != 3) continue; /* each form once */
        if (ep_new(&j, &c, 95)) {
            ep_load(&j);
            for (int part = 0; part < 2; ++part) {
                for (int r = 0; r < 3; ++r) {
                    tgroup_use(&j.g, r);
                    if (r == 1 && part == phase) ep_sleep_on(j.g.stream[r], ns);
                    ep_vary();
                    CHECK_STATUS(part ? moe_ep_combine(&j.rank[r].combine, j.g.stream[r])
                                      : moe_ep_dispatch(&j.rank[r].dispatch, j.g.stream[r]),
                                 MOE_OK);
                }
                tgroup_wait(&j.g);
            }
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < 3; ++r) {
                moe_ep_counters* k;
                uint64_t slept, other;
                tgroup_use(&j.g, r);
                k = (moe_ep_counters*)tbuf_copy(&j.rank[r].d_counters);
                slept = phase ? k->combine_wait_ns : k->dispatch_wait_ns;
                other = phase ? k->dispatch_wait_ns : k->combine_wait_ns;
                CHECK(r == 1 ? slept < ns / 2 : slept > ns / 2, "pair %d, rank %d waits %lld ns",
                      pair, r, (long long)slept);
                CHECK(other < ns / 2, "pair %d, rank %d: the other wait, %lld ns", pair, r,
                      (long long)other);
                free(k);
            }
            TEST_CUDA(cudaSetDevice(0));
        }
        ep_free(&j);
    }
}

static void ep_replay(void)
{
    RUN(test_again);
    RUN(test_back_to_back);
    RUN(test_graph);
    RUN(test_waits);
    RUN(test_many_times);
}

#endif
