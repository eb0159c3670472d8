/* signals.h: owners of experts; put, get, signal, wait and barrier as launches. */
#ifndef MOE_TESTS_EP_SIGNALS_H
#define MOE_TESTS_EP_SIGNALS_H

#include "moe/ep/barrier.cuh"
#include "moe/ep/owner.h"
#include "tests/test_case.h"
#include "tests/test_group.h"

/* owner = floor(e W / E); a rank's experts are neighbours, and all are owned once. */
static void test_owner(void)
{
    for (int W = 1; W <= 20; ++W)
        for (int E = 1; E <= 40; ++E) {
            int bad = 0, at = 0;
            for (int r = 0; r < W; ++r) {
                const int first = moe_ep_first(r, E, W), n = moe_ep_owned(r, E, W);
                bad += n > 0 && first != at;
                for (int i = 0; i < n; ++i, ++at) bad += moe_ep_owner(at, E, W) != r;
            }
            CHECK(bad == 0 && at == E, "E=%d W=%d: %d wrong, %d owned", E, W, bad, at);
        }
    for (int e = 0; e < 4096; ++e)
        if (moe_ep_owner(e, 4096, 128) != (int64_t)e * 128 / 4096) CHECK(0, "expert %d", e);
}

/* A token takes a replica on its own rank, else on its host, else any of all. */
static void test_choose(void)
{
    const moe_rank id[] = {{0, 0}, {0, 1}, {1, 0}, {1, 1}};
    const int32_t offset[] = {0, 3, 5, 5, 6};
    const moe_ep_expert replica[] = {{0, 4}, {2, 1}, {2, 2}, {1, 7}, {3, 8}, {3, 9}};
    /* candidates of rank 0 and of rank 3 for the four experts */
    const int32_t want_offset[2][5] = {{0, 1, 2, 2, 3}, {0, 2, 3, 3, 4}};
    const moe_ep_expert want[2][4] = {{{0, 4}, {1, 7}, {3, 9}}, {{2, 1}, {2, 2}, {3, 8}, {3, 9}}};
    for (int i = 0; i < 2; ++i) {
        int32_t got_offset[5];
        moe_ep_expert got[6];
        CHECK_STATUS(moe_ep_choose(id, 4, i * 3, offset, replica, 4, got_offset, got), MOE_OK);
        CHECK_INTS("choice_offset", got_offset, want_offset[i], 5);
        CHECK(memcmp(got, want[i], (size_t)want_offset[i][4] * sizeof *got) == 0, "rank %d", i * 3);
    }
    {
        int32_t o[5];
        moe_ep_expert c[6];
        const int32_t down[] = {0, 3, 2, 5, 6}, late[] = {1, 3, 5, 5, 6};
        const moe_ep_expert far_rank[] = {{0, 4}, {2, 1}, {4, 2}, {1, 7}, {3, 8}, {3, 9}};
        CHECK_STATUS(moe_ep_choose(id, 4, 0, down, replica, 4, o, c),
                     MOE_STATUS(MOE_ERR_RANGE, replica));
        CHECK_STATUS(moe_ep_choose(id, 4, 0, late, replica, 4, o, c),
                     MOE_STATUS(MOE_ERR_RANGE, replica));
        CHECK_STATUS(moe_ep_choose(id, 4, 0, offset, far_rank, 4, o, c),
                     MOE_STATUS(MOE_ERR_RANGE, replica));
        CHECK_STATUS(moe_ep_choose(id, 4, 4, offset, replica, 4, o, c),
                     MOE_STATUS(MOE_ERR_RANGE, rank));
        CHECK_STATUS(moe_ep_choose(id, 4, 0, offset, 0, 4, o, c),
                     MOE_STATUS(MOE_ERR_NULL, replica));
    }
}

/* A descriptor of rank r for channel 7. */
static moe_peers_desc sig_desc(const tgroup* g, int r)
{
    moe_peers_desc d;
    memset(&d, 0, sizeof d);
    d.peers = g->peers + r;
    d.fault = g->fault[r];
    d.channel = 7;
    return d;
}

/* Every rank puts numbers into the next one's region and signals; waits for the one before; then
   gets what the next one holds. Many rounds without the host waiting; a barrier ends each, so that
   no rank overtakes. */
static void sig_ring(int W, int64_t bytes)
{
    enum { ROUNDS = 6 };
    tgroup g;
    tbuf from[TGROUP_MOST], got[TGROUP_MOST];
    const int64_t words = bytes / 2;
    if (!tgroup_new(&g, W, MOE_PEERS_HEADER + (uint64_t)bytes + 256)) return;
    for (int r = 0; r < W; ++r) {
        uint16_t* x = (uint16_t*)test_host(ROUNDS * bytes);
        tgroup_use(&g, r);
        CHECK_STATUS(moe_preload(), MOE_OK);
        for (int64_t i = 0; i < ROUNDS * words; ++i)
            x[i] = (uint16_t)(trand_mix((uint64_t)(r * 1000003 + i)));
        from[r] = tbuf_from("from", x, (size_t)(ROUNDS * bytes), 0);
        got[r] = tbuf_new("got", (size_t)(ROUNDS * bytes), 0);
        free(x);
    }
    for (int n = 0; n < ROUNDS; ++n)
        for (int r = 0; r < W; ++r) {
            moe_peers_desc d = sig_desc(&g, r), b = sig_desc(&g, r);
            tgroup_use(&g, r);
            d.peer = (r + 1) % W;
            d.offset = MOE_PEERS_HEADER;
            d.bytes = (uint64_t)bytes;
            d.buffer = (char*)from[r].p + n * bytes;
            CHECK_STATUS(moe_peers_put(&d, g.stream[r]), MOE_OK);
            CHECK_STATUS(moe_peers_signal(&d, g.stream[r]), MOE_OK);
            d.peer = (r + W - 1) % W;
            CHECK_STATUS(moe_peers_wait(&d, g.stream[r]), MOE_OK);
            b.channel = 8;
            CHECK_STATUS(moe_peers_barrier(&b, g.stream[r]), MOE_OK);
            d.peer = (r + 1) % W; /* what this rank has put there, back */
            d.buffer = (char*)got[r].p + n * bytes;
            CHECK_STATUS(moe_peers_get(&d, g.stream[r]), MOE_OK);
            CHECK_STATUS(moe_peers_barrier(&b, g.stream[r]), MOE_OK);
        }
    tgroup_wait(&g);
    tgroup_clean(&g, __LINE__);
    for (int r = 0; r < W; ++r) {
        char* x;
        tgroup_use(&g, r);
        x = (char*)tbuf_copy(&from[r]);
        CHECK(tbuf_holds(&got[r], x), "W=%d, %lld bytes: rank %d", W, (long long)bytes, r);
        {
            char* last = (char*)test_host(bytes); /* from the rank before */
            TEST_CUDA(cudaMemcpy(last, (char*)g.memory[r] + MOE_PEERS_HEADER, (size_t)bytes,
                                 cudaMemcpyDeviceToHost));
            free(x);
            tgroup_use(&g, (r + W - 1) % W);
            x = (char*)tbuf_copy(&from[(r + W - 1) % W]);
            CHECK(memcmp(last, x + (ROUNDS - 1) * bytes, (size_t)bytes) == 0, "rank %d", r);
            free(last);
        }
        free(x);
    }
    for (int r = 0; r < W; ++r) {
        tgroup_use(&g, r);
        tbufs_free(TBUFS(&from[r], &got[r]));
    }
    tgroup_free(&g);
}

static void test_ring(void)
{
    sig_ring(1, 64);
    sig_ring(2, 50000);
    sig_ring(3, 2);
    sig_ring(8, 16386);
}

/* A barrier that one rank does not reach: the others name the rank and end; later calls do
   nothing. */
static void test_barrier_late(void)
{
    tgroup g;
    if (!tgroup_new(&g, 3, MOE_PEERS_HEADER + 256)) return;
    for (int r = 0; r < 3; ++r) {
        tgroup_use(&g, r);
        CHECK_STATUS(moe_preload(), MOE_OK);
        g.peers[r].timeout_ns = 20000000;
    }
    for (int n = 0; n < 2; ++n)
        for (int r = 0; r < 3; ++r) {
            moe_peers_desc d = sig_desc(&g, r);
            tgroup_use(&g, r);
            d.tag = 40 + n;
            if (n == 0 || r != 1) CHECK_STATUS(moe_peers_barrier(&d, g.stream[r]), MOE_OK);
        }
    tgroup_wait(&g);
    for (int r = 0; r < 3; r += 2) {
        const moe_peers_late l = moe_peers_late_decode(tgroup_fault(&g, r));
        CHECK(l.late == 1 && l.phase == MOE_PHASE_USER && l.tag == 41 &&
                  (l.rank == 0 || l.rank == 2),
              "rank %d: late %d, phase %d, tag %d, seen by %d", r, l.late, l.phase, l.tag, l.rank);
    }
    CHECK(moe_peers_late_decode(tgroup_fault(&g, 1)).late == -1, "rank 1 has not waited");
    { /* the rank that comes too late sees the notice, and stops with the same fault */
        moe_peers_desc d = sig_desc(&g, 1);
        tgroup_use(&g, 1);
        CHECK_STATUS(moe_peers_barrier(&d, g.stream[1]), MOE_OK);
        tgroup_wait(&g);
        CHECK(moe_peers_late_decode(tgroup_fault(&g, 1)).late == 1, "the notice is taken over");
    }
    { /* after a stop fault nothing is copied, and no wait waits */
        tbuf b;
        moe_peers_desc d = sig_desc(&g, 0);
        tgroup_use(&g, 0);
        b = tbuf_new("buffer", 64, 0);
        d.peer = 1, d.offset = MOE_PEERS_HEADER, d.bytes = 64, d.buffer = b.p;
        CHECK_STATUS(moe_peers_get(&d, g.stream[0]), MOE_OK);
        CHECK_STATUS(moe_peers_wait(&d, g.stream[0]), MOE_OK);
        tgroup_wait(&g);
        CHECK(tbuf_holds(&b, 0), "a copy after a stop fault");
        tgroup_use(&g, 0);
        tbuf_free(&b);
    }
    tgroup_free(&g);
}

/* Rank 1 is one barrier ahead, rank 2 has not come: rank 0 must not take the one for the other. The
   words are written by hand. The group is of addresses that the caller brings. */
static void test_barrier_ahead(void)
{
    tgroup g;
    moe_peers_desc d;
    moe_peers_late l;
    moe_peers_header h;
    if (!tgroup_new(&g, 3, MOE_PEERS_HEADER + 256)) return;
    CHECK_STATUS(moe_peers_create(&g.peers[0], 0, 3, g.memory, g.bytes), MOE_OK);
    CHECK(g.peers[0].rank == 0 && g.peers[0].num_ranks == 3 && g.peers[0].table[2] == g.memory[2],
          "the group");
    TEST_CUDA(cudaMemcpy(&h, g.memory[0], sizeof h, cudaMemcpyDeviceToHost));
    CHECK(h.table[1] == g.memory[1], "the table in the region");
    h.channel[7].sum[0] = h.channel[7].sum[1] = MOE_PEERS_UNIT;
    h.channel[7].from[1] = 2 * MOE_PEERS_UNIT;
    TEST_CUDA(cudaMemcpy(g.memory[0], &h, sizeof h, cudaMemcpyHostToDevice));
    TEST_CUDA(cudaDeviceSynchronize());
    g.peers[0].timeout_ns = 20000000;
    g.peers[0].ranks_on_device = 3;
    d = sig_desc(&g, 0);
    tgroup_use(&g, 0);
    CHECK_STATUS(moe_preload(), MOE_OK);
    CHECK_STATUS(moe_peers_barrier(&d, g.stream[0]), MOE_OK);
    tgroup_wait(&g);
    l = moe_peers_late_decode(tgroup_fault(&g, 0));
    CHECK(l.late == 2, "late %d", l.late);
    tgroup_free(&g);
}

/* A signal that does not come. */
static void test_signal_late(void)
{
    tgroup g;
    moe_peers_desc d;
    moe_peers_late l;
    if (!tgroup_new(&g, 2, MOE_PEERS_HEADER + 256)) return;
    g.peers[0].timeout_ns = 20000000;
    d = sig_desc(&g, 0);
    d.peer = 1, d.tag = 9;
    tgroup_use(&g, 0);
    CHECK_STATUS(moe_preload(), MOE_OK);
    CHECK_STATUS(moe_peers_wait(&d, g.stream[0]), MOE_OK);
    tgroup_wait(&g);
    l = moe_peers_late_decode(tgroup_fault(&g, 0));
    CHECK(l.late == 1 && l.phase == MOE_PHASE_USER && l.tag == 9 && l.rank == 0, "late %d tag %d",
          l.late, l.tag);
    tgroup_free(&g);
}

static void test_group_refusals(void)
{
    tgroup g;
    moe_peers p;
    moe_peers_pair pair;
    moe_peers_desc d, ok;
    void* two[2];
    if (!tgroup_new(&g, 2, MOE_PEERS_HEADER + 256)) return;
    two[0] = g.memory[0], two[1] = (char*)g.memory[1] + 8;
    CHECK_STATUS(moe_peers_create_local(&p, 0, g.device, g.memory, g.bytes, &pair),
                 MOE_STATUS(MOE_ERR_RANGE, num_ranks));
    CHECK_STATUS(
        moe_peers_create_local(&p, MOE_PEERS_MAX_RANKS + 1, g.device, g.memory, g.bytes, &pair),
        MOE_STATUS(MOE_ERR_RANGE, num_ranks));
    CHECK_STATUS(moe_peers_create_local(0, 2, g.device, g.memory, g.bytes, &pair),
                 MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_peers_create_local(&p, 2, g.device, two, g.bytes, &pair),
                 MOE_STATUS(MOE_ERR_ALIGN, region));
    CHECK_STATUS(moe_peers_create_local(&p, 2, g.device, g.memory, MOE_PEERS_HEADER - 1, &pair),
                 MOE_STATUS(MOE_ERR_RANGE, region_bytes));
    CHECK_STATUS(moe_peers_create(&p, 2, 2, g.memory, g.bytes), MOE_STATUS(MOE_ERR_RANGE, rank));
    two[1] = 0;
    CHECK_STATUS(moe_peers_create(&p, 0, 2, two, g.bytes), MOE_STATUS(MOE_ERR_NULL, region));
    ok = sig_desc(&g, 0);
    ok.offset = MOE_PEERS_HEADER, ok.bytes = 256, ok.buffer = g.memory[1];
#define REFUSED_BY(call, change, status)                                                           \
    do {                                                                                           \
        d = ok;                                                                                    \
        change;                                                                                    \
        CHECK_STATUS(call(&d, g.stream[0]), status);                                               \
    } while (0)
    REFUSED_BY(moe_peers_put, d.peers = 0, MOE_STATUS(MOE_ERR_NULL, peers));
    REFUSED_BY(moe_peers_put, d.fault = 0, MOE_STATUS(MOE_ERR_NULL, fault));
    REFUSED_BY(moe_peers_put, d.peer = 2, MOE_STATUS(MOE_ERR_RANGE, peer));
    REFUSED_BY(moe_peers_get, d.offset = 128, MOE_STATUS(MOE_ERR_RANGE, offset));
    REFUSED_BY(moe_peers_get, d.offset += 2, MOE_STATUS(MOE_ERR_RANGE, offset));
    REFUSED_BY(moe_peers_get, d.bytes = 3, MOE_STATUS(MOE_ERR_RANGE, bytes));
    REFUSED_BY(moe_peers_get, (d.bytes = 2, d.offset += 1), MOE_STATUS(MOE_ERR_ALIGN, offset));
    REFUSED_BY(moe_peers_get, d.buffer = 0, MOE_STATUS(MOE_ERR_NULL, buffer));
    REFUSED_BY(moe_peers_wait, d.channel = MOE_PEERS_CHANNELS, MOE_STATUS(MOE_ERR_RANGE, channel));
    REFUSED_BY(moe_peers_barrier, d.channel = -1, MOE_STATUS(MOE_ERR_RANGE, channel));
    REFUSED_BY(moe_peers_barrier, d.tag = 1 << 24, MOE_STATUS(MOE_ERR_RANGE, tag));
#undef REFUSED_BY
    tgroup_free(&g);
}

static void ep_signals(void)
{
    RUN(test_owner);
    RUN(test_choose);
    RUN(test_ring);
    RUN(test_barrier_late);
    RUN(test_barrier_ahead);
    RUN(test_signal_late);
    RUN(test_group_refusals);
}

#endif
