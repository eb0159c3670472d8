/* faults.h: ranks that do not come, buffers that are too small, faults of one rank that stop all,
   descriptors that are refused. */
#ifndef MOE_TESTS_EP_FAULTS_H
#define MOE_TESTS_EP_FAULTS_H

#include "tests/unit/ep/exchange.h"

/* Does a rank's y still hold the poison? */
static int ep_untouched(ep_job* j, int r)
{
    int same;
    tgroup_use(&j->g, r);
    same = tbuf_holds(&j->rank[r].d_y, 0);
    TEST_CUDA(cudaSetDevice(0));
    return same;
}

/* Rank `late` does not come to the dispatch, or to the combine. The others name it, the phase and
   the tag, and write no y. */
static void ep_late(int pair, int T, int late, int phase)
{
    const ep_case c = {
        3, T, 16, 6, 2, ep_dispatch_of(pair), ep_combine_of(pair), MOE_BF16, EP_RANDOM, 0, 0, 0,
        0, 1, 0,  0, 0};
    static ep_job j;
    if (ep_new(&j, &c, 40)) {
        for (int r = 0; r < 3; ++r) j.g.peers[r].timeout_ns = 20000000;
        for (int part = MOE_PHASE_DISPATCH; part <= MOE_PHASE_COMBINE; ++part)
            for (int r = 0; r < 3; ++r) {
                if (r == late && part >= phase) continue;
                tgroup_use(&j.g, r);
                if (part == MOE_PHASE_DISPATCH)
                    CHECK_STATUS(moe_ep_dispatch(&j.rank[r].dispatch, j.g.stream[r]), MOE_OK);
                else CHECK_STATUS(moe_ep_combine(&j.rank[r].combine, j.g.stream[r]), MOE_OK);
                ep_vary();
            }
        tgroup_wait(&j.g);
        for (int r = 0; r < 3; ++r) {
            const moe_peers_late l = moe_peers_late_decode(tgroup_fault(&j.g, r));
            if (r == late) continue;
            CHECK(l.late == late && l.phase == phase && l.tag == 76 + phase,
                  "rank %d: late %d, phase %d, tag %d; expected %d, %d", r, l.late, l.phase, l.tag,
                  late, phase);
            CHECK(ep_untouched(&j, r), "rank %d wrote y", r);
        }
    }
    ep_free(&j);
}

static void test_late(void)
{
    for (int pair = 0; pair < EP_PAIRS; ++pair)
        for (int phase = MOE_PHASE_DISPATCH; phase <= MOE_PHASE_COMBINE; ++phase)
            for (int late = 0; late < 3; ++late) {
                if (MOE_ON_HOST && (pair + phase + late) % 3) continue;
                ep_late(pair, 12, late, phase);
                ep_late(pair, 4, late, phase);
            }
}

/* Rank 0 comes to a dispatch with some of its thread blocks alone: half of what it adds to either
   barrier. Rank 1 names it, in that dispatch, whichever kernels make its row maps. */
static void test_partly_late(void)
{
    const ep_case c = {2, 12, 16, 6, 2, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 1, 0, 0, 0};
    static ep_job j;
    for (int few = 0; few < 2; ++few) {
        if (ep_new(&j, &c, 46)) {
            const int channel = j.rank[1].dispatch.buffers.channel;
            moe_peers_channel* at = ((moe_peers_header*)j.g.peers[1].base)->channel + channel;
            const uint32_t sum[2] = {MOE_PEERS_UNIT / 2, MOE_PEERS_UNIT / 2}, from = MOE_PEERS_UNIT;
            moe_peers_late l;
            j.g.peers[1].timeout_ns = 20000000;
            tgroup_use(&j.g, 1);
            TEST_CUDA(cudaMemcpy(at->sum, sum, sizeof sum, cudaMemcpyHostToDevice));
            TEST_CUDA(cudaMemcpy(at->from, &from, sizeof from, cudaMemcpyHostToDevice));
            TEST_CUDA(cudaDeviceSynchronize());
            ep_few_slots = few ? 8192 : 0;
            CHECK_STATUS(moe_ep_dispatch(&j.rank[1].dispatch, j.g.stream[1]), MOE_OK);
            CHECK_STATUS(moe_ep_combine(&j.rank[1].combine, j.g.stream[1]), MOE_OK);
            tgroup_wait(&j.g);
            l = moe_peers_late_decode(tgroup_fault(&j.g, 1));
            CHECK(l.late == 0 && l.phase == MOE_PHASE_DISPATCH, "few %d: late %d, phase %d", few,
                  l.late, l.phase);
            CHECK(ep_untouched(&j, 1), "rank 1 wrote y");
        }
        ep_free(&j);
    }
}

/* Rank 0 has a stop fault and queues combine after combine. None of them adds up to an arrival:
   rank 1 stops with that fault, and writes no y. */
static void test_stopped_again(void)
{
    const ep_case c = {2, 3, 4096, 6, 2, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 1, 0, 0, 0};
    const uint64_t word = MOEI_FAULT_KEY(MOE_FAULT_BAD_TABLE, 0, 17);
    static ep_job j;
    for (int fused = 0; fused < 2; ++fused) {
        if (ep_new(&j, &c, 47)) {
            ep_dispatch(&j);
            tgroup_wait(&j.g);
            TEST_CUDA(cudaMemcpy(j.g.fault[0], &word, 8, cudaMemcpyHostToDevice));
            ep_fuse_home = fused;
            for (int i = 0; i < 9; ++i) {
                tgroup_use(&j.g, i == 8);
                CHECK_STATUS(moe_ep_combine(&j.rank[i == 8].combine, j.g.stream[i == 8]), MOE_OK);
                tgroup_wait(&j.g);
            }
            for (int r = 0; r < 2; ++r) {
                CHECK(tgroup_fault(&j.g, r) == word, "rank %d: %llx", r,
                      (unsigned long long)tgroup_fault(&j.g, r));
                CHECK(ep_untouched(&j, r), "rank %d wrote y", r);
            }
        }
        ep_free(&j);
    }
}

/* A stop fault of one rank, from its own kernels, stops all with that very fault, long before the
   time is over. */
static void test_spreading(void)
{
    static ep_job j;
    for (int i = 0; i < 2 * EP_PAIRS; ++i) {
        const int phase = i < EP_PAIRS ? MOE_PHASE_DISPATCH : MOE_PHASE_COMBINE;
        const int T = i % 3 ? 4 : 12;
        const ep_case c = {3,
                           T,
                           16,
                           6,
                           2,
                           ep_dispatch_of(i % EP_PAIRS),
                           ep_combine_of(i % EP_PAIRS),
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
        const uint64_t word = MOEI_FAULT_KEY(MOE_FAULT_BAD_TABLE, 1, 17);
        if (ep_new(&j, &c, 41)) {
            for (int r = 0; r < 3; ++r) j.g.peers[r].timeout_ns = 60000000000ull;
            if (phase == MOE_PHASE_COMBINE) {
                ep_dispatch(&j);
                tgroup_wait(&j.g);
            }
            TEST_CUDA(cudaMemcpy(j.g.fault[1], &word, 8, cudaMemcpyHostToDevice));
            tgroup_wait(&j.g);
            if (phase == MOE_PHASE_DISPATCH) ep_dispatch(&j);
            ep_combine(&j);
            tgroup_wait(&j.g);
            for (int r = 0; r < 3; ++r) {
                CHECK(tgroup_fault(&j.g, r) == word, "phase %d, rank %d: %llx", phase, r,
                      (unsigned long long)tgroup_fault(&j.g, r));
                CHECK(ep_untouched(&j, r), "rank %d wrote y", r);
            }
        }
        ep_free(&j);
    }
}

/* Buffers that are too small: all ranks stop with ROWS_FULL; nothing is written out of bounds. */
static void test_full(void)
{
    static ep_job j;
    for (int pair = 0; pair < EP_PAIRS; ++pair) {
        const ep_case c = {2,
                           40,
                           16,
                           4,
                           2,
                           ep_dispatch_of(pair),
                           ep_combine_of(pair),
                           MOE_BF16,
                           EP_ONE_RANK,
                           0,
                           10,
                           0,
                           0,
                           1,
                           0,
                           0,
                           0};
        if (ep_new(&j, &c,
                   42)) { /* every token goes to rank 1, which has room for 10 of each rank */
            ep_dispatch(&j);
            ep_combine(&j);
            tgroup_wait(&j.g);
            for (int r = 0; r < 2; ++r) {
                const moe_fault f = moe_fault_decode(tgroup_fault(&j.g, r));
                CHECK(f.code == MOE_FAULT_ROWS_FULL && f.index == 40, "rank %d: %s at %lld", r,
                      moe_fault_text(f.code), (long long)f.index);
                ep_check_received(&j, r, 0); /* of rows that fit, and nothing beside them */
                CHECK(ep_untouched(&j, r), "rank %d wrote y", r);
            }
        }
        ep_free(&j);
        { /* rows in expert order: 160 come to rank 1 */
            ep_case big = c;
            big.recv_tokens = 0;
            if (ep_new(&j, &big, 43)) {
                for (int r = 0; r < 2; ++r) {
                    size_t bytes;
                    j.rank[r].dispatch.buffers.max_rows = 100;
                    CHECK_STATUS(moe_ep_dispatch_workspace(&j.rank[r].dispatch, &bytes), MOE_OK);
                    CHECK(bytes < j.rank[r].workspace.bytes, "fewer rows need less");
                }
                ep_dispatch(&j);
                ep_combine(&j);
                tgroup_wait(&j.g);
                for (int r = 0; r < 2; ++r) {
                    const moe_fault f = moe_fault_decode(tgroup_fault(&j.g, r));
                    CHECK(f.code == MOE_FAULT_ROWS_FULL && f.index == 160 && f.rank == 1,
                          "rank %d: %s at %lld", r, moe_fault_text(f.code), (long long)f.index);
                    CHECK(ep_untouched(&j, r), "rank %d wrote y", r);
                }
            }
            ep_free(&j);
        }
    }
}

/* Ids that are no expert: those slots count as -1, the fault word says so, all else is right. */
static void test_bad_ids(void)
{
    static ep_job j;
    for (int dispatch = MOE_EP_DEDUPLICATED; dispatch <= MOE_EP_ALL_GATHER_COPY; ++dispatch) {
        const ep_case c = {2, 20, 16, 6, 2, dispatch, MOE_EP_GATHERED, MOE_BF16, EP_RANDOM, 0, 0,
                           0, 0,  1,  0, 0, 0};
        if (ep_new(&j, &c, 44)) {
            int32_t* ids = j.rank[1].ids;
            ids[7] = 6, ids[11] = -2;
            tgroup_use(&j.g, 1);
            tbuf_put(&j.rank[1].d_ids, ids);
            ids[7] = ids[11] = -1;
            ep_expect(&j);
            ep_dispatch(&j);
            tgroup_wait(&j.g);
            CHECK(tgroup_fault(&j.g, 0) == 0, "rank 0 has no fault");
            CHECK(tgroup_fault(&j.g, 1) == MOEI_FAULT_KEY(MOE_FAULT_BAD_ID, 1, 7),
                  "the first bad slot");
            for (int r = 0; r < 2; ++r) {
                int32_t* count = (int32_t*)ep_get(&j, r, j.rank[r].view.recv_count, 8);
                CHECK_INTS("recv_count", count, j.rank[r].want.recv_count, 2);
                free(count);
            }
        }
        ep_free(&j);
    }
}

static void test_refusals(void)
{
    const ep_case c = {2, 8, 16, 6, 2, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 1, 0, 0, 0};
    static ep_job j;
    if (!ep_new(&j, &c, 45)) return;
    const moe_ep_dispatch_desc ok = j.rank[0].dispatch;
    moe_ep_combine_desc cok = j.rank[0].combine;
    moe_ep_dispatch_desc d;
    moe_ep_combine_desc k;
    moe_ep_dispatch_prepared p;
    moe_ep_combine_prepared q;
    tgroup_use(&j.g, 0);
#define EP_REFUSED(change, kind, field)                                                            \
    do {                                                                                           \
        d = ok;                                                                                    \
        change;                                                                                    \
        memset((void*)&p, 0xda, sizeof p);                                                         \
        CHECK_STATUS(moe_ep_dispatch_prepare(&d, &p), MOE_STATUS(kind, field));                    \
        test_empty(&p, sizeof p, __LINE__);                                                        \
        k = cok;                                                                                   \
        k.dispatch = &d;                                                                           \
        CHECK_STATUS(moe_ep_combine_prepare(&k, &q), MOE_STATUS(kind, field));                     \
    } while (0)
    EP_REFUSED(d.peers = 0, MOE_ERR_NULL, peers);
    EP_REFUSED(d.fault = 0, MOE_ERR_NULL, fault);
    EP_REFUSED(d.x = 0, MOE_ERR_NULL, x);
    EP_REFUSED(d.x = (char*)d.x + 1, MOE_ERR_ALIGN, x);
    EP_REFUSED(d.ids = 0, MOE_ERR_NULL, ids);
    EP_REFUSED(d.x_stride = 8, MOE_ERR_STRIDE, x_stride);
    EP_REFUSED(d.num_tokens = 9, MOE_ERR_RANGE, num_tokens);
    EP_REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    EP_REFUSED(d.tag = -1, MOE_ERR_RANGE, tag);
    EP_REFUSED(d.num_local = 1, MOE_ERR_CONFLICT, num_local);
    EP_REFUSED(d.num_local = -1, MOE_ERR_RANGE, num_local);
    EP_REFUSED(d.replica = (const moe_ep_expert*)TEST_FAR, MOE_ERR_CONFLICT, replica);
    EP_REFUSED(d.scales = (const float*)TEST_FAR, MOE_ERR_CONFLICT, scales);
    EP_REFUSED(d.buffers.num_scales = 4097, MOE_ERR_RANGE, num_scales);
    EP_REFUSED(d.buffers.region_offset = 256, MOE_ERR_RANGE, region_offset);
    EP_REFUSED(d.buffers.region_offset = MOE_PEERS_HEADER + 8, MOE_ERR_RANGE, region_offset);
    EP_REFUSED(d.buffers.region_offset = MOE_PEERS_HEADER + 256, MOE_ERR_RANGE, region_bytes);
    EP_REFUSED(d.buffers.channel = MOE_PEERS_CHANNELS - 1, MOE_ERR_RANGE, channel);
    EP_REFUSED(d.buffers.combine_form = 4, MOE_ERR_OPTION, combine_form);
    EP_REFUSED(d.buffers.combine_form = -1, MOE_ERR_OPTION, combine_form);
    EP_REFUSED(d.buffers.dispatch_form = 5, MOE_ERR_OPTION, dispatch_form);
    EP_REFUSED(d.buffers.dispatch_form = -1, MOE_ERR_OPTION, dispatch_form);
    EP_REFUSED((d.buffers.dispatch_form = MOE_EP_ALL_GATHER_COPY, d.side_stream = 0), MOE_ERR_NULL,
               side_stream);
    EP_REFUSED((d.buffers.dispatch_form = MOE_EP_ALL_GATHER_COPY, d.side_event[1] = 0),
               MOE_ERR_NULL, side_event);
    EP_REFUSED(
        (d.buffers.dispatch_form = MOE_EP_ALL_GATHER_COPY, d.side_event[1] = d.side_event[0]),
        MOE_ERR_CONFLICT, side_event);
    EP_REFUSED(d.buffers.max_tokens = -1, MOE_ERR_RANGE, max_tokens);
    EP_REFUSED(d.buffers.recv_tokens = 9, MOE_ERR_RANGE, recv_tokens);
    EP_REFUSED(d.buffers.max_rows = -1, MOE_ERR_RANGE, max_rows);
    EP_REFUSED(d.buffers.hidden = 0, MOE_ERR_RANGE, hidden);
    EP_REFUSED(d.buffers.hidden = 20, MOE_ERR_MULTIPLE, hidden);
    EP_REFUSED(d.buffers.num_experts = 0, MOE_ERR_RANGE, num_experts);
    EP_REFUSED(d.buffers.top_k = 0, MOE_ERR_RANGE, top_k);
    EP_REFUSED(d.buffers.dtype = 9, MOE_ERR_DTYPE, dtype);
    EP_REFUSED(d.buffers.rows_dtype = 9, MOE_ERR_DTYPE, rows_dtype);
    EP_REFUSED(d.workspace = 0, MOE_ERR_NULL, workspace);
    EP_REFUSED(d.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
    EP_REFUSED(d.buffers.row_multiple = -1, MOE_ERR_RANGE, row_multiple);
    EP_REFUSED(d.buffers.wire_dtype = MOE_FP32, MOE_ERR_DTYPE, wire_dtype);
#undef EP_REFUSED
#define EP_REFUSED(change, kind, field)                                                            \
    do {                                                                                           \
        k = cok;                                                                                   \
        change;                                                                                    \
        memset((void*)&q, 0xda, sizeof q);                                                         \
        CHECK_STATUS(moe_ep_combine_prepare(&k, &q), MOE_STATUS(kind, field));                     \
        test_empty(&q, sizeof q, __LINE__);                                                        \
    } while (0)
    EP_REFUSED(k.dispatch = 0, MOE_ERR_NULL, dispatch);
    EP_REFUSED(k.rows = 0, MOE_ERR_NULL, rows);
    EP_REFUSED(k.rows = (char*)k.rows + 8, MOE_ERR_ALIGN, rows);
    EP_REFUSED(k.y = 0, MOE_ERR_NULL, y);
    EP_REFUSED(k.weights += 1, MOE_ERR_CONFLICT, weights);
    EP_REFUSED(k.y_stride = 8, MOE_ERR_STRIDE, y_stride);
    EP_REFUSED(k.tag = 1 << 24, MOE_ERR_RANGE, tag);
#undef EP_REFUSED
    for (int r = 0; r < 2; ++r) CHECK(ep_untouched(&j, r), "a refused call wrote y");
    ep_free(&j);
}

static void ep_faults(void)
{
    RUN(test_late);
    RUN(test_partly_late);
    RUN(test_stopped_again);
    RUN(test_spreading);
    RUN(test_full);
    RUN(test_bad_ids);
    RUN(test_refusals);
}

#endif
