/* layer_case.h: the layer over ranks and the layer on one GPU, with the same tokens of every rank.
   The one-GPU layer has all experts, the other one its own alone. */
#ifndef MOE_TESTS_EP_LAYER_CASE_H
#define MOE_TESTS_EP_LAYER_CASE_H

#include "moe/ep/layer.cuh"
#include "moe/ep/profile.cuh"
#include "moe/ref/exchange.h"
#include "tests/test_case.h"
#include "tests/test_group.h"
#include "tests/test_weights.h"

typedef struct lay_case {
    int W, T, H, I, E, K;
    int dispatch, form, dtype; /* form: of the combine */
    int shared;                /* width of a shared expert, 0: none */
    int replicas;              /* 1: expert e is on ranks e % W and (e + 1) % W */
    int row_multiple;
    int from_ids; /* 1: ids and weights are given */
    int parts;    /* 1: part by part */
    int bias;
    int profile;    /* 1: room for every form, and counters */
    int microbatch; /* microbatch_tokens */
} lay_case;

typedef struct lay_rank {
    int T, P;
    tbuf x, residual, y, y1, router, ids, weights, w1, w2, b1, b2, all_w1, all_w2, all_b1, all_b2;
    tbuf s1, s2, offset, choice, work, work1, counters;
    void* h_residual;
    int32_t* owner; /* [T, K] rank that computes a slot */
    moe_layer_desc one;
    moe_ep_layer_desc ep;
} lay_rank;

typedef struct lay_job {
    lay_case c;
    tgroup g;
    lay_rank rank[TGROUP_MOST];
    void *w1, *w2, *b1, *b2, *router, *s1, *s2; /* of all experts, host */
} lay_job;

static void* lay_draw(trand* q, int64_t n, int dtype, float scale)
{
    void* p = test_host(n * 2);
    for (int64_t i = 0; i < n; ++i) moe_store(p, i, dtype, trand_normal(q) * scale);
    return p;
}

/* Number of expert e, which is `which`-th replica, among those of its rank; replicas: in the order
   first all e with e % W = r, then all with (e + 1) % W = r. */
static moe_ep_expert lay_replica(const lay_case* c, int e, int which)
{
    moe_ep_expert x;
    int n = 0;
    x.rank = (e + which) % c->W;
    for (int w = 0; w <= which; ++w)
        for (int o = 0; o < (w == which ? e : c->E); ++o) n += (o + w) % c->W == x.rank;
    x.expert = n;
    return x;
}

/* Fills in `list` with the experts of rank r, in the order of its weights; returns their number. */
static int lay_experts(const lay_case* c, int r, int* list)
{
    int n = 0;
    if (c->replicas) {
        for (int w = 0; w < 2; ++w)
            for (int e = 0; e < c->E; ++e)
                if ((e + w) % c->W == r) list[n++] = e;
    } else {
        for (int e = 0; e < c->E; ++e)
            if (moe_ep_owner(e, c->E, c->W) == r) list[n++] = e;
    }
    return n;
}

/* A device copy of the matrices of some experts alone, canaries around it. */
static tbuf lay_weights(const char* name, const void* all, const int* list, int n, int64_t elems)
{
    char* own = (char*)test_host(n * elems * 2);
    tbuf b;
    for (int i = 0; i < n; ++i)
        memcpy(own + i * elems * 2, (const char*)all + list[i] * elems * 2, (size_t)elems * 2);
    b = tbuf_from(name, own, (size_t)(n * elems * 2), 0);
    free(own);
    return b;
}

/* Fills in what both descriptors have in common. */
static void lay_describe(const lay_job* j, int rank, moe_layer_desc* d)
{
    const lay_case* c = &j->c;
    const lay_rank* r = j->rank + rank;
    memset(d, 0, sizeof *d);
    d->x = r->x.p;
    d->residual = r->residual.p;
    d->num_tokens = r->T;
    d->hidden = c->H, d->intermediate = c->I, d->num_experts = c->E, d->top_k = c->K;
    d->dtype = c->dtype;
    d->batch_invariant = 1;
    d->fault = j->g.fault[rank];
    if (c->from_ids) {
        d->ids = (const int32_t*)r->ids.p;
        d->weights = (const float*)r->weights.p;
    } else {
        d->router = r->router.p;
        d->gate.renormalize = 1;
    }
    if (c->shared) {
        d->shared.w1.base = r->s1.p;
        d->shared.w2.base = r->s2.p;
        d->shared.intermediate = c->shared;
    }
}

static int lay_put(lay_job* j, int rank, trand* q)
{
    const lay_case* c = &j->c;
    lay_rank* r = j->rank + rank;
    const int64_t H = c->H, I = c->I;
    int list[256], all[256];
    size_t bytes;
    tgroup_use(&j->g, rank);
    for (int e = 0; e < c->E; ++e) all[e] = e;
    r->P = lay_experts(c, rank, list);
    r->T = rank == 0 ? c->T : rank == c->W - 1 && c->W > 2 ? 0 : (int)trand_int(q, 0, c->T);
    {
        void* x = lay_draw(q, r->T * H, c->dtype, 1.0f);
        int32_t* ids = (int32_t*)test_host((int64_t)r->T * c->K * 4);
        float* weights = (float*)test_host((int64_t)r->T * c->K * 4);
        r->h_residual = lay_draw(q, r->T * H, c->dtype, 1.0f);
        for (int i = 0; i < r->T * c->K; ++i) {
            ids[i] = trand_int(q, 0, 9) ? (int)trand_int(q, 0, c->E - 1) : -1;
            weights[i] = 0.2f + 0.1f * (float)(i % 7);
        }
        r->x = tbuf_from("x", x, (size_t)(r->T * H * 2), 0);
        r->residual = tbuf_from("residual", r->h_residual, (size_t)(r->T * H * 2), 0);
        r->ids = tbuf_from("ids", ids, (size_t)(r->T * c->K) * 4, 0);
        r->weights = tbuf_from("weights", weights, (size_t)(r->T * c->K) * 4, 0);
        TFREE(x, ids, weights);
    }
    r->y = tbuf_new("y", (size_t)(r->T * H * 2), 0);
    r->y1 = tbuf_new("y of one GPU", (size_t)(r->T * H * 2), 0);
    r->router = tbuf_from("router", j->router, (size_t)(c->E * H * 2), 0);
    r->w1 = lay_weights("w1", j->w1, list, r->P, 2 * I * H);
    r->w2 = lay_weights("w2", j->w2, list, r->P, H * I);
    r->b1 = lay_weights("bias1", j->b1, list, r->P, 2 * I);
    r->b2 = lay_weights("bias2", j->b2, list, r->P, H);
    r->all_w1 = lay_weights("all w1", j->w1, all, c->E, 2 * I * H);
    r->all_w2 = lay_weights("all w2", j->w2, all, c->E, H * I);
    r->all_b1 = lay_weights("all bias1", j->b1, all, c->E, 2 * I);
    r->all_b2 = lay_weights("all bias2", j->b2, all, c->E, H);
    if (c->shared) {
        r->s1 = tbuf_from("shared w1", j->s1, (size_t)(2 * c->shared * H) * 2, 0);
        r->s2 = tbuf_from("shared w2", j->s2, (size_t)(H * c->shared) * 2, 0);
    }
    lay_describe(j, rank, &r->one);
    r->one.w1.base = r->all_w1.p, r->one.w2.base = r->all_w2.p;
    if (c->bias) r->one.bias1 = r->all_b1.p, r->one.bias2 = r->all_b2.p;
    r->one.y = r->y1.p;
    if (!CHECK_STATUS(moe_layer_workspace(&r->one, &bytes), MOE_OK)) return 0;
    r->work1 = tbuf_new("workspace of one GPU", bytes, 0);
    r->one.workspace = r->work1.p, r->one.workspace_bytes = bytes;

    memset(&r->ep, 0, sizeof r->ep);
    lay_describe(j, rank, &r->ep.layer);
    r->ep.layer.w1.base = r->P ? r->w1.p : 0, r->ep.layer.w2.base = r->P ? r->w2.p : 0;
    if (c->bias && r->P) r->ep.layer.bias1 = r->b1.p, r->ep.layer.bias2 = r->b2.p;
    r->ep.layer.y = r->y.p;
    r->ep.layer.route.row_multiple = c->row_multiple;
    r->ep.peers = j->g.peers + rank;
    r->ep.buffers.dispatch_form = c->dispatch;
    r->ep.buffers.combine_form = c->form;
    r->ep.side_stream = j->g.side[rank];
    r->ep.side_event[0] = j->g.side_event[rank][0];
    r->ep.side_event[1] = j->g.side_event[rank][1];
    r->ep.buffers.max_tokens = c->T;
    r->ep.microbatch_tokens = c->microbatch;
    r->ep.tag = 5;
    if (c->replicas) {
        int32_t* offset = (int32_t*)test_host((c->E + 1) * 4);
        moe_ep_expert* replica = (moe_ep_expert*)test_host(c->E * 2 * 8);
        int32_t* choice_offset = (int32_t*)test_host((c->E + 1) * 4);
        moe_ep_expert* choice = (moe_ep_expert*)test_host(c->E * 2 * 8);
        for (int e = 0; e <= c->E; ++e) offset[e] = 2 * e;
        for (int e = 0; e < c->E; ++e)
            for (int w = 0; w < 2; ++w) replica[2 * e + w] = lay_replica(c, e, w);
        CHECK_STATUS(moe_ep_choose(j->g.peers[rank].id, c->W, rank, offset, replica, c->E,
                                   choice_offset, choice),
                     MOE_OK);
        r->offset = tbuf_from("replica_offset", choice_offset, (size_t)(c->E + 1) * 4, 0);
        r->choice = tbuf_from("replica", choice, (size_t)choice_offset[c->E] * 8, 0);
        r->ep.replica_offset = (const int32_t*)r->offset.p;
        r->ep.replica = (const moe_ep_expert*)r->choice.p;
        r->ep.num_local = r->P;
        TFREE(offset, replica, choice_offset, choice);
    }
    if (c->profile) {
        r->counters = tbuf_new("counters", sizeof(moe_ep_counters), 0);
        r->ep.counters = (moe_ep_counters*)r->counters.p;
    }
    if (!CHECK_STATUS(c->profile ? moe_ep_profile_workspace(&r->ep, &bytes)
                                 : moe_ep_layer_workspace(&r->ep, &bytes),
                      MOE_OK))
        return 0;
    r->work = tbuf_new("workspace", bytes, 0);
    r->ep.layer.workspace = r->work.p, r->ep.layer.workspace_bytes = bytes;
    return 1;
}

/* What the bytes of a region depend on. */
static moe_ep_layer_desc lay_sizes(const lay_case* c)
{
    moe_ep_layer_desc d;
    memset(&d, 0, sizeof d);
    d.layer.hidden = c->H, d.layer.num_experts = c->E, d.layer.top_k = c->K;
    d.layer.dtype = c->dtype;
    d.buffers.dispatch_form = c->dispatch, d.buffers.combine_form = c->form;
    d.buffers.max_tokens = c->T;
    d.microbatch_tokens = c->microbatch;
    d.layer.route.row_multiple = c->row_multiple;
    d.replica_offset = c->replicas ? (const int32_t*)TEST_FAR : 0;
    return d;
}

/* Makes a job whose regions have `bytes` bytes; 0: what the forward needs. */
static int lay_new_region(lay_job* j, const lay_case* c, uint64_t salt, uint64_t bytes)
{
    trand q = trand_new(salt);
    const moe_ep_layer_desc d = lay_sizes(c);
    int ok = 1;
    memset(j, 0, sizeof *j);
    j->c = *c;
    if (!bytes && !CHECK_STATUS(c->profile ? moe_ep_profile_region(&d, c->W, &bytes)
                                           : moe_ep_layer_region(&d, c->W, &bytes),
                                MOE_OK))
        return 0;
    if (!tgroup_new(&j->g, c->W, bytes)) return 0;
    for (int r = 0; r < c->W; ++r) { /* no kernel is loaded while another one waits */
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_preload(), MOE_OK);
    }
    j->w1 = lay_draw(&q, (int64_t)c->E * 2 * c->I * c->H, c->dtype, 0.2f);
    j->w2 = lay_draw(&q, (int64_t)c->E * c->H * c->I, c->dtype, 0.2f);
    j->b1 = lay_draw(&q, (int64_t)c->E * 2 * c->I, c->dtype, 0.5f);
    j->b2 = lay_draw(&q, (int64_t)c->E * c->H, c->dtype, 0.5f);
    j->router = lay_draw(&q, (int64_t)c->E * c->H, c->dtype, 0.3f);
    j->s1 = lay_draw(&q, (int64_t)2 * c->shared * c->H, c->dtype, 0.2f);
    j->s2 = lay_draw(&q, (int64_t)c->H * c->shared, c->dtype, 0.2f);
    for (int r = 0; r < c->W && ok; ++r) ok = lay_put(j, r, &q);
    TEST_CUDA(cudaSetDevice(0));
    return ok;
}

static void lay_free(lay_job* j)
{
    tgroup_wait(&j->g);
    for (int r = 0; r < j->c.W; ++r) {
        lay_rank* k = j->rank + r;
        tgroup_use(&j->g, r);
        tbufs_free(TBUFS(&k->x, &k->residual, &k->y, &k->y1, &k->router, &k->ids, &k->weights,
                         &k->w1, &k->w2, &k->b1, &k->b2, &k->work, &k->work1));
        tbufs_free(TBUFS(&k->counters));
        tbufs_free(TBUFS(&k->all_w1, &k->all_w2, &k->all_b1, &k->all_b2, &k->s1, &k->s2, &k->offset,
                         &k->choice));
        TFREE(k->h_residual);
    }
    TFREE(j->w1, j->w2, j->b1, j->b2, j->router, j->s1, j->s2);
    tgroup_free(&j->g);
}

/* Copies device memory of rank r, which is the current device's. */
static void* lay_get(const void* p, int64_t bytes)
{
    void* host = test_host(bytes);
    if (bytes) TEST_CUDA(cudaMemcpy(host, p, (size_t)bytes, cudaMemcpyDeviceToHost));
    return host;
}

MOEI_UNUSED static int lay_half(int i) { return i % 2 ? MOE_FP16 : test_half(); }

#endif
