/* survive.h: a group that loses a rank, goes on without it, and takes it back. */
#ifndef MOE_TESTS_EP_SURVIVE_H
#define MOE_TESTS_EP_SURVIVE_H

#include "moe/ep/incomplete.cuh"
#include "moe/ep/survive.h"
#include "tests/unit/ep/layer.h"

/* What the ranks of a test agree by: the lost ones are known. */
typedef struct lay_agreement {
    moe_peers_set lost;
    moe_peers_set alive; /* of the last call */
    int calls, fails;
} lay_agreement;

static int lay_agree(void* context, const moe_peers_set* alive, moe_peers_set* agreed)
{
    lay_agreement* a = (lay_agreement*)context;
    ++a->calls;
    a->alive = *alive;
    for (int w = 0; w < MOE_PEERS_SET_WORDS; ++w)
        agreed->bits[w] = alive->bits[w] & ~a->lost.bits[w];
    return a->fails;
}

/* Numbers of the ranks that are left, and refusals. */
static void test_survivors(void)
{
    static moe_peers p;
    lay_agreement a;
    moe_peers_survivors s;
    memset(&p, 0, sizeof p);
    memset(&a, 0, sizeof a);
    p.num_ranks = 70, p.rank = 66;
    for (int r = 0; r < 70; r += 13) moe_peers_set_put(&a.lost, r, 1); /* 0, 13, 26, 39, 52, 65 */
    CHECK_STATUS(
        moe_peers_survive(&p, MOEI_FAULT_KEY(MOE_FAULT_PEER_LATE, 66, MOEI_PEERS_INDEX(39, 1, 0)),
                          lay_agree, &a, &s),
        MOE_OK);
    CHECK(a.calls == 1 && !moe_peers_set_has(&a.alive, 39) && moe_peers_set_has(&a.alive, 13) &&
              moe_peers_set_has(&a.alive, 69) && !moe_peers_set_has(&a.alive, 70),
          "what the callback is given");
    CHECK(s.num_ranks == 64 && s.rank == 60, "%d ranks, this one is %d", s.num_ranks, s.rank);
    for (int r = 0, n = 0; r < 70; ++r) {
        CHECK(s.new_rank[r] == (r % 13 ? n : -1), "rank %d is now %d", r, s.new_rank[r]);
        if (r % 13) CHECK(s.old_rank[n] == r, "rank %d was %d", n, s.old_rank[n]);
        n += r % 13 != 0;
    }
    CHECK_STATUS(moe_peers_survive(&p, 0, lay_agree, &a, &s), MOE_OK);
    CHECK(moe_peers_set_has(&a.alive, 39), "no fault: nothing is known against rank 39");
    CHECK_STATUS(moe_peers_survive(&p, 0, 0, &a, &s), MOE_STATUS(MOE_ERR_NULL, agree));
    CHECK_STATUS(moe_peers_survive(0, 0, lay_agree, &a, &s), MOE_STATUS(MOE_ERR_NULL, peers));
    a.fails = 1;
    CHECK_STATUS(moe_peers_survive(&p, 0, lay_agree, &a, &s), MOE_STATUS(MOE_ERR_DEVICE, agree));
    a.fails = 0;
    p.rank = 65;
    CHECK_STATUS(moe_peers_survive(&p, 0, lay_agree, &a, &s), MOE_STATUS(MOE_ERR_CONFLICT, rank));
    p.rank = 70;
    CHECK_STATUS(moe_peers_survive(&p, 0, lay_agree, &a, &s), MOE_STATUS(MOE_ERR_RANGE, peers));
}

/* Tables of a smaller group: by ownership, and from a table; twice. */
static void test_shrunk_tables(void)
{
    static const int32_t offset[] = {0, 2, 3, 3, 5};
    static const moe_ep_expert replica[] = {{0, 0}, {1, 4}, {2, 1}, {2, 0}, {0, 3}};
    static const int32_t want_offset[] = {0, 1, 2, 2, 3};
    static const moe_ep_expert want[] = {{0, 4}, {1, 1}, {1, 0}};
    static moe_peers p;
    lay_agreement a;
    moe_peers_survivors s;
    int32_t o[8], o2[8];
    moe_ep_expert r[8], r2[8];
    uint8_t off[8];
    memset(&p, 0, sizeof p);
    memset(&a, 0, sizeof a);
    p.num_ranks = 3, p.rank = 2;
    moe_peers_set_put(&a.lost, 0, 1);
    CHECK_STATUS(moe_peers_survive(&p, 0, lay_agree, &a, &s), MOE_OK);
    CHECK_STATUS(moe_ep_shrink(&s, 3, offset, replica, 4, o, r, off), MOE_OK);
    CHECK_INTS("offset", o, want_offset, 5);
    CHECK_INTS("replica", (int32_t*)r, (const int32_t*)want, 6);
    CHECK(!off[0] && !off[1] && off[2] && !off[3], "an expert without a replica is disabled");
    CHECK_STATUS(moe_ep_shrink(&s, 3, 0, 0, 7, o, r, off), MOE_OK); /* 0 1 2 | 3 4 | 5 6 */
    CHECK(off[0] && off[1] && off[2] && !off[3] && !off[6], "the experts of rank 0");
    CHECK(o[7] == 4 && r[0].rank == 0 && r[0].expert == 0 && r[3].rank == 1 && r[3].expert == 1,
          "the others");
    p.num_ranks = 2, p.rank = 1; /* the next loss, of what was rank 1 */
    CHECK_STATUS(moe_peers_survive(&p, 0, lay_agree, &a, &s), MOE_OK);
    CHECK_STATUS(moe_ep_shrink(&s, 2, o, r, 7, o2, r2, off), MOE_OK);
    CHECK(o2[7] == 2 && r2[0].rank == 0 && r2[0].expert == 0 && off[3] && off[4] && !off[5],
          "two losses");
    CHECK_STATUS(moe_ep_shrink(&s, 2, o, 0, 7, o2, r2, off), MOE_STATUS(MOE_ERR_CONFLICT, replica));
    CHECK_STATUS(moe_ep_shrink(&s, 1, o, r, 7, o2, r2, off), MOE_STATUS(MOE_ERR_RANGE, replica));
    CHECK_STATUS(moe_ep_shrink(&s, 2, o, r, 0, o2, r2, off),
                 MOE_STATUS(MOE_ERR_RANGE, num_experts));
    CHECK_STATUS(moe_ep_shrink(&s, 0, o, r, 7, o2, r2, off), MOE_STATUS(MOE_ERR_RANGE, num_ranks));
    CHECK_STATUS(moe_ep_shrink(0, 2, o, r, 7, o2, r2, off), MOE_STATUS(MOE_ERR_NULL, peers));
    CHECK_STATUS(moe_ep_shrink(&s, 2, o, r, 7, 0, r2, off), MOE_STATUS(MOE_ERR_NULL, replica));
    o[3] = 9;
    CHECK_STATUS(moe_ep_shrink(&s, 2, o, r, 7, o2, r2, off), MOE_STATUS(MOE_ERR_RANGE, replica));
}

/* The list of incomplete tokens beside a plain loop. */
static void test_incomplete(void)
{
    static const int shape[][3] = {{0, 4, 2}, {1, 4, 1}, {33, 7, 3}, {1025, 9, 2}, {5000, 64, 4}};
    trand q = trand_new(600);
    for (int i = 0; i < 5; ++i) {
        const int T = shape[i][0], E = shape[i][1], K = shape[i][2];
        int32_t* ids = (int32_t*)test_host((int64_t)T * K * 4);
        int32_t* want = (int32_t*)test_host((int64_t)T * 4);
        uint8_t disabled[64];
        moe_ep_incomplete_desc d;
        tbuf b_ids, b_disabled, b_token, b_count;
        int32_t n = 0, *got, *count;
        for (int e = 0; e < E; ++e) disabled[e] = (uint8_t)(e % 4 == 1 ? 255 : 0);
        for (int j = 0; j < T * K; ++j) ids[j] = (int32_t)trand_int(&q, -2, E + 1);
        for (int t = 0; t < T; ++t) {
            int lacks = 0;
            for (int k = 0; k < K; ++k) {
                const int id = ids[t * K + k];
                lacks |= id >= 0 && id < E && disabled[id];
            }
            if (lacks) want[n++] = t;
        }
        b_ids = tbuf_from("ids", ids, (size_t)(T * K) * 4, 0);
        b_disabled = tbuf_from("disabled", disabled, (size_t)E, 0);
        b_token = tbuf_new("token", (size_t)T * 4, 0);
        b_count = tbuf_new("count", 4, 0);
        memset(&d, 0, sizeof d);
        d.ids = (const int32_t*)b_ids.p, d.disabled = (const uint8_t*)b_disabled.p;
        d.token = (int32_t*)b_token.p, d.count = (int32_t*)b_count.p;
        d.num_tokens = T, d.num_experts = E, d.top_k = K;
        CHECK_STATUS(moe_ep_incomplete(&d, 0), MOE_OK);
        TEST_CUDA(cudaDeviceSynchronize());
        got = (int32_t*)tbuf_copy(&b_token), count = (int32_t*)tbuf_copy(&b_count);
        CHECK(*count == n, "%d tokens, not %d", *count, n);
        if (*count == n) CHECK_INTS("tokens", got, want, n);
        for (int j = n; j < T; ++j) want[j] = got[j]; /* poison, by the check below */
        CHECK(test_strays(got, (int64_t)T * 4, 4, T ? T : 1, n, 0, 1) == 0, "past the list");
        d.count = 0;
        CHECK_STATUS(moe_ep_incomplete(&d, 0), MOE_STATUS(MOE_ERR_NULL, count));
        d.count = (int32_t*)b_count.p, d.disabled = 0;
        CHECK_STATUS(moe_ep_incomplete(&d, 0), MOE_STATUS(MOE_ERR_NULL, expert_disabled));
        d.disabled = (const uint8_t*)b_disabled.p, d.top_k = 0;
        CHECK_STATUS(moe_ep_incomplete(&d, 0), MOE_STATUS(MOE_ERR_RANGE, top_k));
        d.top_k = K, d.num_experts = 0;
        CHECK_STATUS(moe_ep_incomplete(&d, 0), MOE_STATUS(MOE_ERR_RANGE, num_experts));
        d.num_experts = E, d.num_tokens = -1;
        CHECK_STATUS(moe_ep_incomplete(&d, 0), MOE_STATUS(MOE_ERR_RANGE, num_tokens));
        tbufs_free(TBUFS(&b_ids, &b_disabled, &b_token, &b_count));
        TFREE(ids, want, got, count);
    }
}

/* A smaller or a new group of some ranks of a job: peers and regions. */
typedef struct lay_next {
    int W, old[TGROUP_MOST];
    moe_peers peers[TGROUP_MOST];
    void* region[TGROUP_MOST];
} lay_next;

/* Makes a group of new memory for the ranks next->old[0 .. W - 1]. */
static void lay_connect(const lay_job* j, lay_next* next, const moe_ep_layer_desc* layer)
{
    int device[TGROUP_MOST];
    moe_peers_pair pair;
    uint64_t bytes = 0;
    CHECK_STATUS(moe_ep_layer_region(layer, next->W, &bytes), MOE_OK);
    for (int n = 0; n < next->W; ++n) {
        device[n] = j->g.device[next->old[n]];
        tgroup_use(&j->g, next->old[n]);
        TEST_CUDA(cudaMalloc(&next->region[n], bytes));
        test_poison_device(next->region[n], bytes);
        TEST_CUDA(cudaMemset(j->g.fault[next->old[n]], 0, 8));
        TEST_CUDA(cudaDeviceSynchronize());
    }
    CHECK_STATUS(moe_peers_create_local(next->peers, next->W, device, next->region, bytes, &pair),
                 MOE_OK);
}

/* Queues a rank's layer, all parts up to `upto`. */
static void lay_run_some(const lay_job* j, const moe_ep_layer_desc* layer, int r, int upto)
{
    static moe_ep_layer_prepared p;
    tgroup_use(&j->g, r);
    CHECK_STATUS(moe_ep_layer_prepare(layer, &p), MOE_OK);
    if (upto == MOE_EP_LAYER_PARTS) {
        CHECK_STATUS(moe_ep_layer_run(&p, j->g.stream[r]), MOE_OK);
        return;
    }
    for (int part = 0; part < upto; ++part)
        CHECK_STATUS(moe_ep_layer_run_part(&p, part, j->g.stream[r]), MOE_OK);
}

/* Checks y of rank r beside the layer of one GPU, whose gate is the same. */
static void lay_check(lay_job* j, int r)
{
    void* one;
    tgroup_use(&j->g, r);
    one = tbuf_copy(&j->rank[r].y1);
    if (j->c.form == MOE_EP_GATHERED)
        CHECK(tbuf_holds(&j->rank[r].y, one), "rank %d: not the bits of one GPU", r);
    else lay_check_reduced(j, r);
    free(one);
}

/* Checks the list of tokens of rank r that had chosen a disabled expert in the call that stopped. */
static void lay_check_incomplete(lay_job* j, int r, const uint8_t* disabled)
{
    const lay_case* c = &j->c;
    lay_rank* k = j->rank + r;
    moe_layer_view v = {};
    moe_ep_view e = {};
    moe_ep_incomplete_desc d;
    int32_t *ids, *got, *count, n = 0, wrong = 0;
    tbuf b_disabled, token, number;
    tgroup_use(&j->g, r);
    if (!CHECK_STATUS(moe_ep_layer_get_view(&k->ep, &v, &e), MOE_OK)) return;
    b_disabled = tbuf_from("disabled", disabled, (size_t)c->E, 0);
    token = tbuf_new("token", (size_t)k->T * 4, 0), number = tbuf_new("count", 4, 0);
    memset(&d, 0, sizeof d);
    d.ids = v.ids, d.disabled = (const uint8_t*)b_disabled.p;
    d.token = (int32_t*)token.p, d.count = (int32_t*)number.p;
    d.num_tokens = k->T, d.num_experts = c->E, d.top_k = c->K;
    CHECK_STATUS(moe_ep_incomplete(&d, j->g.stream[r]), MOE_OK);
    TEST_CUDA(cudaStreamSynchronize(j->g.stream[r]));
    ids = (int32_t*)lay_get(v.ids, (int64_t)k->T * c->K * 4);
    got = (int32_t*)tbuf_copy(&token), count = (int32_t*)tbuf_copy(&number);
    for (int t = 0; t < k->T; ++t) {
        int lacks = 0;
        for (int s = 0; s < c->K; ++s)
            lacks |= ids[t * c->K + s] >= 0 && disabled[ids[t * c->K + s]];
        if (lacks) wrong += n >= *count || got[n] != t, ++n;
    }
    CHECK(wrong == 0 && *count == n, "rank %d: %d incomplete tokens, not %d", r, *count, n);
    tbufs_free(TBUFS(&b_disabled, &token, &number));
    TFREE(ids, got, count);
}

/* Lets all ranks but `lost` find out who is left, and go on: tables, a new group, and the layer again
   with the lost experts disabled. The lost rank wakes up meanwhile, and goes on with `upto`. */
static void lay_go_on(lay_job* j, int lost, int done)
{
    const int W = j->c.W, E = j->c.E;
    lay_agreement a;
    lay_next next;
    moe_peers_survivors s = {};
    moe_ep_layer_desc layer[TGROUP_MOST];
    int32_t* offset = (int32_t*)test_host((E + 1) * 4);
    int32_t* choice_offset = (int32_t*)test_host((E + 1) * 4);
    moe_ep_expert* replica = (moe_ep_expert*)test_host(E * 8);
    moe_ep_expert* choice = (moe_ep_expert*)test_host(E * 8);
    uint8_t* disabled = (uint8_t*)test_host(E);
    tbuf b_disabled[TGROUP_MOST], work[TGROUP_MOST];
    memset(&a, 0, sizeof a);
    moe_peers_set_put(&a.lost, lost, 1);
    for (int r = 0; r < W; ++r) {
        const uint64_t word = tgroup_fault(&j->g, r);
        if (r == lost) continue;
        CHECK(moe_peers_late_decode(word).late == lost, "rank %d names %d", r,
              moe_peers_late_decode(word).late);
        CHECK_STATUS(moe_peers_survive(j->g.peers + r, word, lay_agree, &a, &s), MOE_OK);
        CHECK(!moe_peers_set_has(&a.alive, lost), "rank %d knows who is lost", r);
        CHECK(s.num_ranks == W - 1 && s.old_rank[s.rank] == r, "rank %d is now %d", r, s.rank);
    }
    CHECK_STATUS(moe_ep_shrink(&s, W, 0, 0, E, offset, replica, disabled), MOE_OK);
    next.W = s.num_ranks;
    for (int n = 0; n < next.W; ++n) {
        next.old[n] = s.old_rank[n];
        lay_check_incomplete(j, next.old[n], disabled);
        layer[n] = j->rank[next.old[n]].ep;
        layer[n].replica_offset = (const int32_t*)TEST_FAR; /* sizes alone */
    }
    lay_connect(j, &next, &layer[0]);
    j->c.W = next.W, j->c.replicas = 1;
    for (int n = 0; n < next.W; ++n) {
        lay_rank* k = j->rank + next.old[n];
        size_t bytes = 0;
        tgroup_use(&j->g, next.old[n]);
        CHECK_STATUS(
            moe_ep_choose(next.peers[n].id, next.W, n, offset, replica, E, choice_offset, choice),
            MOE_OK);
        k->offset = tbuf_from("replica_offset", choice_offset, (size_t)(E + 1) * 4, 0);
        k->choice = tbuf_from("replica", choice, (size_t)choice_offset[E] * 8 + 8, 0);
        b_disabled[n] = tbuf_from("disabled", disabled, (size_t)E, 0);
        layer[n].peers = next.peers + n;
        layer[n].replica_offset = (const int32_t*)k->offset.p;
        layer[n].replica = (const moe_ep_expert*)k->choice.p;
        layer[n].num_local = k->P;
        layer[n].layer.gate.expert_disabled = (const uint8_t*)b_disabled[n].p;
        k->one.gate.expert_disabled = (const uint8_t*)b_disabled[n].p;
        CHECK_STATUS(moe_ep_layer_workspace(&layer[n], &bytes), MOE_OK);
        work[n] = tbuf_new("workspace", bytes, 0);
        layer[n].layer.workspace = work[n].p, layer[n].layer.workspace_bytes = bytes;
        tbuf_poison(&k->y);
        CHECK_STATUS(moe_layer_forward(&k->one, j->g.stream[next.old[n]]), MOE_OK);
    }
    for (int n = 0; n < next.W; ++n) lay_run_some(j, &layer[n], next.old[n], MOE_EP_LAYER_PARTS);
    tgroup_use(&j->g, lost); /* wakes up, and writes to the regions that it knows */
    {
        static moe_ep_layer_prepared p;
        CHECK_STATUS(moe_ep_layer_prepare(&j->rank[lost].ep, &p), MOE_OK);
        for (int part = done; part < MOE_EP_LAYER_PARTS; ++part)
            CHECK_STATUS(moe_ep_layer_run_part(&p, part, j->g.stream[lost]), MOE_OK);
    }
    tgroup_wait(&j->g);
    for (int n = 0; n < next.W; ++n) {
        CHECK(tgroup_fault(&j->g, next.old[n]) == 0, "rank %d: a fault", next.old[n]);
        lay_check(j, next.old[n]);
    }
    {
        const uint64_t word = tgroup_fault(&j->g, lost);
        CHECK(moe_peers_late_decode(word).late == lost, "the lost rank learns that it is: %llx",
              (unsigned long long)word);
        CHECK_STATUS(moe_peers_survive(j->g.peers + lost, word, lay_agree, &a, &s),
                     MOE_STATUS(MOE_ERR_CONFLICT, rank));
    }
    j->c.W = W, j->c.replicas = 0;
    for (int n = 0; n < next.W; ++n) {
        lay_rank* k = j->rank + next.old[n];
        tgroup_use(&j->g, next.old[n]);
        k->one.gate.expert_disabled = 0;
        tbufs_free(TBUFS(&k->offset, &k->choice, &b_disabled[n], &work[n]));
        memset(&k->offset, 0, sizeof k->offset);
        memset(&k->choice, 0, sizeof k->choice);
        TEST_CUDA(cudaFree(next.region[n]));
    }
    TFREE(offset, choice_offset, replica, choice, disabled);
}

/* All ranks again, in new memory, the lost one too. */
static void lay_join_again(lay_job* j)
{
    lay_next next;
    next.W = j->c.W;
    for (int r = 0; r < j->c.W; ++r) next.old[r] = r;
    lay_connect(j, &next, &j->rank[0].ep);
    for (int r = 0; r < j->c.W; ++r) {
        tgroup_use(&j->g, r);
        j->rank[r].ep.peers = next.peers + r;
        tbuf_poison(&j->rank[r].y);
        CHECK_STATUS(moe_layer_forward(&j->rank[r].one, j->g.stream[r]), MOE_OK);
    }
    lay_run(j);
    tgroup_wait(&j->g);
    tgroup_clean(&j->g, __LINE__);
    for (int r = 0; r < j->c.W; ++r) {
        lay_check(j, r);
        tgroup_use(&j->g, r);
        TEST_CUDA(cudaFree(next.region[r]));
    }
}

/* A rank is lost in each phase, while more layers are queued; the others go on without it; it wakes
   up, and comes back. */
static void test_shrink(void)
{
    static const int phase[] = {0,
                                MOE_EP_LAYER_SEND,
                                MOE_EP_LAYER_ROUTE,
                                MOE_EP_LAYER_RECEIVE,
                                MOE_EP_LAYER_UP,
                                MOE_EP_LAYER_COMBINE};
    static lay_job j;
    for (int i = 0; i < 12; ++i) {
        const int pair = i, lost = i % 4, done = phase[i % 6];
        const lay_case c = {4, 12, 64, 40, 7, 2, 1 + pair % 4, 1 + pair / 4, test_half(), 16, 0,
                            0, 0,  0,  1,  0, 0};
        if (lay_new(&j, &c, 610)) {
            for (int r = 0; r < 4; ++r) j.g.peers[r].timeout_ns = 30000000;
            lay_run(&j); /* all is well */
            tgroup_wait(&j.g);
            tgroup_clean(&j.g, __LINE__);
            for (int n = 0; n < 3; ++n)
                for (int r = 0; r < 4; ++r) {
                    if (r == lost && n > 1) continue;
                    lay_run_some(&j, &j.rank[r].ep, r,
                                 r == lost && n == 1 ? done : MOE_EP_LAYER_PARTS);
                }
            tgroup_wait(&j.g);
            lay_go_on(&j, lost, done);
            lay_join_again(&j);
        }
        lay_free(&j);
    }
}

static void ep_survive(void)
{
    RUN(test_survivors);
    RUN(test_shrunk_tables);
    RUN(test_incomplete);
    RUN(test_shrink);
}

#endif
