/* backward_case.h: forward and backward of the layer over ranks, and of one GPU that has all tokens
   and all experts; its own tests are test_layer_backward.cu. */
#ifndef MOE_TESTS_EP_BACKWARD_CASE_H
#define MOE_TESTS_EP_BACKWARD_CASE_H

#include "moe/ep/layer_backward.cuh"
#include "tests/unit/ep/layer_case.h"

/* Options of the backward pass. */
typedef struct bk_case {
    lay_case c;
    int redispatch, recompute, balance, in_place; /* in_place: dx is dy, and added to it */
    int count_rows, local_router, no_dx, fp32;    /* fp32: gradients of weights */
    int side; /* 1: redispatch on the side stream; 2: and overlap */
} bk_case;

/* One rank, or the one GPU. */
typedef struct bk_side {
    int T, P;
    tbuf x, y, dy, dx, saved, work, pre, drouter, dlogits, dweights, dw1, dw2, db1, db2, balance;
    tbuf s_dw1, s_dw2, ids, weights;
} bk_side;

typedef struct bk_job {
    bk_case o;
    lay_job lay;
    bk_side rank[TGROUP_MOST], one;
    void *h_x, *h_dy; /* of all ranks, in order */
    moe_ep_layer_backward_desc ep[TGROUP_MOST];
    moe_layer_backward_desc gpu;
} bk_job;

#define BK_SIDE_BUFFERS(s)                                                                         \
    TBUFS(&(s)->x, &(s)->y, &(s)->dy, &(s)->dx, &(s)->saved, &(s)->work, &(s)->pre, &(s)->drouter, \
          &(s)->dlogits, &(s)->dweights, &(s)->dw1, &(s)->dw2, &(s)->db1, &(s)->db2,               \
          &(s)->balance, &(s)->s_dw1, &(s)->s_dw2, &(s)->ids, &(s)->weights)
#define BK_GRADIENTS(s)                                                                            \
    TBUFS(&(s)->drouter, &(s)->dlogits, &(s)->dweights, &(s)->dw1, &(s)->dw2, &(s)->db1,           \
          &(s)->db2, &(s)->s_dw1, &(s)->s_dw2)

static int bk_grad(const bk_job* j) { return j->o.fp32 ? MOE_FP32 : j->o.c.dtype; }

/* Makes the buffers of T tokens and P experts; x and dy are those of all ranks from token `at` on. */
static void bk_put(bk_job* j, bk_side* s, int T, int P, int at)
{
    const lay_case* c = &j->o.c;
    const int64_t H = c->H, I = c->I, g = moe_dtype_bytes(bk_grad(j));
    float balance[257];
    s->T = T, s->P = P;
    s->x = tbuf_from("x", (char*)j->h_x + at * H * 2, (size_t)(T * H * 2), 0);
    s->dy = tbuf_from("dy", (char*)j->h_dy + at * H * 2, (size_t)(T * H * 2), 0);
    s->y = tbuf_new("y", (size_t)(T * H * 2), 0);
    if (!j->o.in_place) s->dx = tbuf_new("dx", (size_t)(T * H * 2), 0);
    if (!c->from_ids) {
        s->drouter = tbuf_new("drouter", (size_t)(c->E * H) * 4, 0);
        s->dlogits = tbuf_new("dlogits", (size_t)(T * c->E) * 4, 0);
    }
    s->dweights = tbuf_new("dweights", (size_t)(T * c->K) * 4, 0);
    s->dw1 = tbuf_new("dw1", (size_t)(P * 2 * I * H * g), 0);
    s->dw2 = tbuf_new("dw2", (size_t)(P * I * H * g), 0);
    if (c->bias) {
        s->db1 = tbuf_new("dbias1", (size_t)(P * 2 * I * g), 0);
        s->db2 = tbuf_new("dbias2", (size_t)(P * H * g), 0);
    }
    if (c->shared) {
        s->s_dw1 = tbuf_new("shared dw1", (size_t)(2 * c->shared * H * g), 0);
        s->s_dw2 = tbuf_new("shared dw2", (size_t)(c->shared * H * g), 0);
    }
    for (int e = 0; e <= c->E; ++e) balance[e] = 0.01f * (float)(e % 5 - 2);
    s->balance = tbuf_from("balance_grad", balance, (size_t)(c->E + 1) * 4, 0);
}

/* Fills in what both passes are asked for; the forward's layer is apart. */
static void bk_ask(bk_job* j, bk_side* s, moe_layer_backward_desc* d)
{
    const bk_case* o = &j->o;
    d->dy = s->dy.p;
    if (!o->no_dx) d->dx = o->in_place ? s->dy.p : s->dx.p;
    d->dx_accumulate = o->in_place;
    d->grad_dtype = bk_grad(j);
    d->router_grad_dtype = MOE_FP32;
    d->dweights = (float*)s->dweights.p;
    if (!o->c.from_ids) {
        d->drouter = s->drouter.p;
        d->dlogits = (float*)s->dlogits.p;
        if (o->balance) d->balance_grad = (const float*)s->balance.p;
    }
    if (s->P) {
        d->dw1.base = s->dw1.p, d->dw2.base = s->dw2.p;
        if (o->c.bias) d->dbias1 = s->db1.p, d->dbias2 = s->db2.p;
    }
    if (o->c.shared) d->shared.dw1.base = s->s_dw1.p, d->shared.dw2.base = s->s_dw2.p;
}

static size_t bk_larger(size_t a, size_t b) { return a > b ? a : b; }

/* The one GPU: all tokens, all experts. */
static int bk_put_one(bk_job* j, int tokens)
{
    lay_rank* r = j->lay.rank;
    moe_layer_desc l = r->one;
    bk_side* s = &j->one;
    moe_layer_saved_list list;
    size_t forward, backward;
    tgroup_use(&j->lay.g, 0);
    bk_put(j, s, tokens, j->o.c.E, 0);
    l.x = s->x.p, l.y = s->y.p, l.residual = 0, l.num_tokens = tokens;
    l.workspace = 0, l.workspace_bytes = 0;
    l.recompute = j->o.recompute;
    if (j->o.c.from_ids) {
        int32_t* ids = (int32_t*)test_host((int64_t)tokens * j->o.c.K * 4);
        float* weights = (float*)test_host((int64_t)tokens * j->o.c.K * 4);
        int64_t at = 0;
        for (int q = 0; q < j->o.c.W; ++q) {
            tgroup_use(&j->lay.g, q);
            void *a = tbuf_copy(&j->lay.rank[q].ids), *b = tbuf_copy(&j->lay.rank[q].weights);
            const int64_t n = (int64_t)j->lay.rank[q].T * j->o.c.K;
            memcpy(ids + at, a, (size_t)n * 4), memcpy(weights + at, b, (size_t)n * 4);
            at += n;
            TFREE(a, b);
        }
        tgroup_use(&j->lay.g, 0);
        s->ids = tbuf_from("ids", ids, (size_t)at * 4, 0);
        s->weights = tbuf_from("weights", weights, (size_t)at * 4, 0);
        l.ids = (const int32_t*)s->ids.p, l.weights = (const float*)s->weights.p;
        TFREE(ids, weights);
    }
    if (!CHECK_STATUS(moe_layer_saved(&l, &list), MOE_OK)) return 0;
    s->saved = tbuf_new("saved of one GPU", list.bytes, 0);
    l.saved = s->saved.p, l.saved_bytes = list.bytes;
    j->gpu.layer = l;
    bk_ask(j, s, &j->gpu);
    if (!CHECK_STATUS(moe_layer_workspace(&l, &forward), MOE_OK) ||
        !CHECK_STATUS(moe_layer_backward_workspace(&j->gpu, &backward), MOE_OK))
        return 0;
    s->work = tbuf_new("workspace of one GPU", bk_larger(forward, backward), 0);
    j->gpu.layer.workspace = s->work.p, j->gpu.layer.workspace_bytes = s->work.bytes;
    return 1;
}

/* Makes `saved`, pre and the workspace of rank r, for as many rows as its descriptor has. */
static int bk_put_memory(bk_job* j, int r)
{
    moe_ep_layer_backward_desc* b = j->ep + r;
    moe_layer_desc* l = &b->forward.layer;
    bk_side* s = j->rank + r;
    size_t forward, backward;
    tgroup_use(&j->lay.g, r);
    if (s->work.base) tbuf_free(&s->work);
    if (!CHECK_STATUS(moe_ep_layer_workspace(&b->forward, &forward), MOE_OK) ||
        !CHECK_STATUS(moe_ep_layer_backward_workspace(b, &backward), MOE_OK))
        return 0;
    s->work = tbuf_new("workspace", bk_larger(forward, backward), 0);
    l->workspace = s->work.p, l->workspace_bytes = s->work.bytes;
    return 1;
}

/* Rank r, whose first token is number `at` of all. */
static int bk_put_rank(bk_job* j, int r, int at)
{
    lay_rank* k = j->lay.rank + r;
    bk_side* s = j->rank + r;
    moe_ep_layer_backward_desc* b = j->ep + r;
    moe_layer_saved_list list;
    tgroup_use(&j->lay.g, r);
    bk_put(j, s, k->T, k->P, at);
    memset(b, 0, sizeof *b);
    b->forward = k->ep;
    b->forward.layer.x = s->x.p, b->forward.layer.y = s->y.p, b->forward.layer.residual = 0;
    b->forward.layer.recompute = j->o.recompute;
    b->forward.layer.workspace = 0, b->forward.layer.workspace_bytes = 0;
    b->forward.redispatch_x = j->o.redispatch;
    b->forward.count_rows = j->o.count_rows;
    b->local_router = j->o.local_router;
    b->overlap = j->o.side == 2;
    b->overlap_blocks = b->overlap ? j->o.redispatch * 3 : 0;
    if (!j->o.side && j->o.c.dispatch != MOE_EP_ALL_GATHER_COPY) b->forward.side_stream = 0;
    bk_ask(j, s, &b->grads);
    if (!CHECK_STATUS(moe_ep_layer_saved(&b->forward, &list), MOE_OK)) return 0;
    s->saved = tbuf_new("saved", list.bytes, 0);
    b->forward.layer.saved = s->saved.p, b->forward.layer.saved_bytes = list.bytes;
    return bk_put_memory(j, r);
}

/* Makes both layers; the regions have `bytes` bytes, 0: what they need. */
static int bk_new_region(bk_job* j, const bk_case* o, uint64_t salt, uint64_t bytes)
{
    trand q = trand_new(salt + 7);
    moe_ep_layer_backward_desc sizes;
    int tokens = 0, at = 0, ok = 1;
    memset(j, 0, sizeof *j);
    j->o = *o;
    memset(&sizes, 0, sizeof sizes);
    sizes.forward = lay_sizes(&o->c);
    sizes.local_router = o->local_router;
    if (!bytes && !CHECK_STATUS(moe_ep_layer_backward_region(&sizes, o->c.W, &bytes), MOE_OK))
        return 0;
    if (!lay_new_region(&j->lay, &o->c, salt, bytes)) return 0;
    for (int r = 0; r < o->c.W; ++r) tokens += j->lay.rank[r].T;
    j->h_x = lay_draw(&q, (int64_t)tokens * o->c.H, o->c.dtype, 1.0f);
    j->h_dy = lay_draw(&q, (int64_t)tokens * o->c.H, o->c.dtype, 1.0f);
    ok = bk_put_one(j, tokens);
    for (int r = 0; r < o->c.W && ok; ++r) {
        ok = bk_put_rank(j, r, at);
        at += j->lay.rank[r].T;
    }
    TEST_CUDA(cudaSetDevice(0));
    return ok;
}

static int bk_new(bk_job* j, const bk_case* o, uint64_t salt)
{
    return bk_new_region(j, o, salt, 0);
}

static void bk_free(bk_job* j)
{
    if (!j->lay.g.W) return;
    tgroup_wait(&j->lay.g);
    for (int r = 0; r < j->o.c.W; ++r) {
        tgroup_use(&j->lay.g, r);
        tbufs_free(BK_SIDE_BUFFERS(&j->rank[r]));
    }
    tgroup_use(&j->lay.g, 0);
    tbufs_free(BK_SIDE_BUFFERS(&j->one));
    lay_free(&j->lay);
    TFREE(j->h_x, j->h_dy);
}

/* Puts what is written, and dy, into its state before the passes. */
static void bk_reset(bk_job* j)
{
    int at = 0;
    for (int r = 0; r < j->o.c.W; ++r) {
        tgroup_use(&j->lay.g, r);
        tbufs_poison(BK_GRADIENTS(&j->rank[r]));
        if (!j->o.in_place) tbuf_poison(&j->rank[r].dx);
        tbuf_poison(&j->rank[r].y);
        tbuf_put(&j->rank[r].dy, (char*)j->h_dy + (int64_t)at * j->o.c.H * 2);
        at += j->rank[r].T;
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* With count_rows: the first half of every rank, then room for as many rows as came. */
static void bk_count(bk_job* j)
{
    const lay_case* c = &j->o.c;
    for (int r = 0; r < c->W; ++r) {
        tgroup_use(&j->lay.g, r);
        CHECK_STATUS(moe_ep_layer_begin(&j->ep[r].forward, j->lay.g.stream[r]), MOE_OK);
    }
    tgroup_wait(&j->lay.g);
    for (int r = 0; r < c->W; ++r) {
        moe_ep_layer_desc* f = &j->ep[r].forward;
        int64_t rows;
        tgroup_use(&j->lay.g, r);
        CHECK_STATUS(moe_ep_layer_count(f, j->lay.g.stream[r], &rows), MOE_OK);
        f->num_rows = rows;
        if (!j->o.recompute) {
            j->rank[r].pre = tbuf_new("pre", (size_t)(rows * 2 * c->I * 2), 0);
            f->pre = j->rank[r].pre.p;
        }
        bk_put_memory(j, r);
    }
}

/* Queues forward and backward of all ranks. */
static void bk_run(bk_job* j)
{
    static moe_ep_layer_prepared f[TGROUP_MOST];
    static moe_ep_layer_backward_prepared b[TGROUP_MOST];
    const int W = j->o.c.W;
    if (j->o.count_rows) bk_count(j);
    for (int r = 0; r < W; ++r) {
        tgroup_use(&j->lay.g, r);
        if (!j->o.count_rows) CHECK_STATUS(moe_ep_layer_prepare(&j->ep[r].forward, &f[r]), MOE_OK);
        CHECK_STATUS(moe_ep_layer_backward_prepare(&j->ep[r], &b[r]), MOE_OK);
    }
    for (int r = 0; r < W; ++r) {
        tgroup_use(&j->lay.g, r);
        if (j->o.count_rows)
            CHECK_STATUS(moe_ep_layer_finish(&j->ep[r].forward, j->lay.g.stream[r]), MOE_OK);
        else CHECK_STATUS(moe_ep_layer_run(&f[r], j->lay.g.stream[r]), MOE_OK);
    }
    for (int stage = 0; stage < (j->o.c.parts ? MOE_EP_BACKWARD_STAGES : 1); ++stage)
        for (int r = 0; r < W; ++r) {
            tgroup_use(&j->lay.g, r);
            CHECK_STATUS(j->o.c.parts
                             ? moe_ep_layer_backward_run_stage(&b[r], stage, j->lay.g.stream[r])
                             : moe_ep_layer_backward_run(&b[r], j->lay.g.stream[r]),
                         MOE_OK);
        }
    TEST_CUDA(cudaSetDevice(0));
}

/* Forward and backward of the one GPU. */
static void bk_run_one(bk_job* j)
{
    cudaStream_t stream = j->lay.g.stream[0];
    tgroup_use(&j->lay.g, 0);
    CHECK_STATUS(moe_layer_forward(&j->gpu.layer, stream), MOE_OK);
    CHECK_STATUS(moe_layer_backward(&j->gpu, stream), MOE_OK);
    tgroup_wait(&j->lay.g);
}

/* Compares n elements of a rank with those of the one GPU from `at` on: the same bits. */
static void bk_same(const bk_job* j, int r, const tbuf* own, const tbuf* one, int64_t at)
{
    char *a, *b;
    if (!own->bytes) return;
    tgroup_use(&j->lay.g, r);
    a = (char*)tbuf_copy(own);
    tgroup_use(&j->lay.g, 0);
    b = (char*)tbuf_copy(one);
    CHECK(!memcmp(a, b + at, own->bytes), "W=%d rank %d: %s: not the bits of one GPU", j->o.c.W, r,
          own->name);
    TFREE(a, b);
}

/* Compares dx of rank r, whose first token is number `at`: the other forms round each rank's sum of
   a token's rows. */
static void bk_check_dx(const bk_job* j, int r, int at)
{
    const lay_case* c = &j->o.c;
    const tbuf *own = j->o.in_place ? &j->rank[r].dy : &j->rank[r].dx,
               *one = j->o.in_place ? &j->one.dy : &j->one.dx;
    const int64_t H = c->H;
    const double u = c->dtype == MOE_BF16 ? ldexp(1, -8) : ldexp(1, -11);
    const double least = c->dtype == MOE_BF16 ? 1e-30 : ldexp(1, -24); /* fp16: subnormals */
    moe_layer_backward_view w = {};
    moe_layer_view v;
    moe_ref_exchange_rank t;
    void *a, *b;
    char* rows;
    moe_place* place;
    int32_t* ids;
    double worst = 0;
    if (c->form == MOE_EP_GATHERED) {
        bk_same(j, r, own, one, (int64_t)at * H * 2);
        return;
    }
    if (!j->rank[r].T) return;
    memset(&t, 0, sizeof t);
    tgroup_use(&j->lay.g, r);
    a = tbuf_copy(own);
    if (c->replicas) {
        t.replica_offset = (const int32_t*)tbuf_copy(&j->lay.rank[r].offset);
        t.replica = (const moe_ep_expert*)tbuf_copy(&j->lay.rank[r].choice);
    }
    tgroup_use(&j->lay.g, 0);
    b = tbuf_copy(one);
    CHECK_STATUS(moe_layer_backward_get_view(&j->gpu, &w), MOE_OK);
    {
        moei_layer_backward resolved;
        CHECK_STATUS(moei_layer_backward_resolve(&j->gpu, (char*)j->gpu.layer.workspace, &resolved),
                     MOE_OK);
        v = resolved.v;
    }
    rows = (char*)lay_get(w.rows, (int64_t)j->one.T * c->K * H * 2);
    place = (moe_place*)lay_get(v.place, (int64_t)j->one.T * c->K * 8);
    ids = (int32_t*)lay_get(v.ids, (int64_t)j->one.T * c->K * 4);
    t.ids = ids + (int64_t)at * c->K;
    for (int64_t i = 0; i < j->rank[r].T; ++i)
        for (int64_t h = 0; h < H; ++h) {
            const double got = moe_load(a, i * H + h, c->dtype);
            const double want = moe_load(b, (at + i) * H + h, c->dtype);
            double part[TGROUP_MOST] = {0}, bound = 2 * u * fabs(want);
            for (int s = 0; s < c->K; ++s) {
                const moe_ep_expert e = moe_ref_target(&t, i * c->K + s, c->K, c->E, c->W);
                const int row = place[(at + i) * c->K + s].row;
                if (e.rank >= 0) part[e.rank] += moe_load(rows, row * H + h, c->dtype);
            }
            for (int q = 0; q < c->W; ++q) bound += u * fabs(part[q]);
            bound = bound * 1.01 + least * c->W + 1e-7;
            worst = fmax(worst, fabs(got - want) / bound);
        }
    CHECK(worst <= 1, "W=%d rank %d: dx is off by %g of its bound", c->W, r, worst);
    TFREE(a, b, rows, place, ids, (void*)t.replica_offset, (void*)t.replica);
}

/* Compares drouter of rank r with that of one GPU: sums in another order. Bound: fp32 sums over the
   tokens of products dlogits x. */
static void bk_check_drouter(const bk_job* j, int r)
{
    const lay_case* c = &j->o.c;
    const int64_t H = c->H, n = c->E * H;
    float *own, *one, *dlogits;
    double worst = 0;
    if (c->from_ids || j->o.local_router) return;
    tgroup_use(&j->lay.g, r);
    own = (float*)tbuf_copy(&j->rank[r].drouter);
    tgroup_use(&j->lay.g, 0);
    one = (float*)tbuf_copy(&j->one.drouter);
    dlogits = (float*)tbuf_copy(&j->one.dlogits);
    for (int64_t i = 0; i < n; ++i) {
        double sum = 0, bound;
        for (int64_t t = 0; t < j->one.T; ++t)
            sum +=
                fabs((double)dlogits[t * c->E + i / H] * moe_load(j->h_x, t * H + i % H, c->dtype));
        bound = sum * ((j->one.T + c->W) / 16.0 + 8) * ldexp(1, -22) + 1e-7;
        worst = fmax(worst, fabs((double)own[i] - one[i]) / bound);
    }
    CHECK(worst <= 1, "W=%d rank %d: drouter is off by %g of its bound", c->W, r, worst);
    TFREE(own, one, dlogits);
}

/* Compares the gradients of rank r's experts. */
static void bk_check_experts(const bk_job* j, int r)
{
    const lay_case* c = &j->o.c;
    const int64_t g = moe_dtype_bytes(bk_grad(j)), w = (int64_t)c->I * c->H * g;
    const int first = moe_ep_first(r, c->E, c->W);
    const bk_side *own = j->rank + r, *one = &j->one;
    if (c->replicas || !own->P) return;
    bk_same(j, r, &own->dw1, &one->dw1, first * 2 * w);
    bk_same(j, r, &own->dw2, &one->dw2, first * w);
    bk_same(j, r, &own->db1, &one->db1, first * 2 * c->I * g);
    bk_same(j, r, &own->db2, &one->db2, first * c->H * g);
}

/* Compares fp32 gradients of which each rank has a part with those of one GPU: `sum` is the parts'
   sum. */
static void bk_check_sum(const bk_job* j, const char* what, const double* sum, const tbuf* one,
                         int64_t n)
{
    float* want;
    double worst = 0, largest = 0;
    tgroup_use(&j->lay.g, 0);
    want = (float*)tbuf_copy(one);
    for (int64_t i = 0; i < n; ++i) {
        worst = fmax(worst, fabs(sum[i] - want[i]));
        largest = fmax(largest, fabs(want[i]));
    }
    CHECK(largest > 0 && worst <= 1e-5 * largest, "%s: the ranks' sum is off by %g of %g", what,
          worst, largest);
    free(want);
}

/* Replicas of an expert, and the shared expert: gradients of all ranks add up. Requires fp32. */
static void bk_check_parts(const bk_job* j)
{
    const lay_case* c = &j->o.c;
    const int64_t n = (int64_t)c->I * c->H, shared = (int64_t)c->shared * c->H;
    double *sum = tzeros(c->E * n), *up = tzeros(2 * shared), *down = tzeros(shared);
    for (int r = 0; r < c->W; ++r) {
        const bk_side* s = j->rank + r;
        int list[256];
        const int P = lay_experts(c, r, list);
        float *dw2, *s_dw1 = 0, *s_dw2 = 0;
        tgroup_use(&j->lay.g, r);
        dw2 = (float*)tbuf_copy(&s->dw2);
        if (shared) s_dw1 = (float*)tbuf_copy(&s->s_dw1), s_dw2 = (float*)tbuf_copy(&s->s_dw2);
        for (int p = 0; p < P; ++p)
            for (int64_t i = 0; i < n; ++i) sum[list[p] * n + i] += dw2[p * n + i];
        for (int64_t i = 0; i < 2 * shared; ++i) up[i] += s_dw1[i];
        for (int64_t i = 0; i < shared; ++i) down[i] += s_dw2[i];
        TFREE(dw2, s_dw1, s_dw2);
    }
    bk_check_sum(j, "dw2", sum, &j->one.dw2, c->E * n);
    if (shared) bk_check_sum(j, "shared dw1", up, &j->one.s_dw1, 2 * shared);
    if (shared) bk_check_sum(j, "shared dw2", down, &j->one.s_dw2, shared);
    TFREE(sum, up, down);
}

/* Compares all that the ranks have with the one GPU's. */
static void bk_check(bk_job* j)
{
    const lay_case* c = &j->o.c;
    int at = 0;
    for (int r = 0; r < c->W; ++r) {
        const bk_side *own = j->rank + r, *one = &j->one;
        const int64_t H = c->H;
        if (c->form == MOE_EP_GATHERED) bk_same(j, r, &own->y, &one->y, at * H * 2);
        if (!j->o.no_dx) bk_check_dx(j, r, at);
        bk_same(j, r, &own->dweights, &one->dweights, (int64_t)at * c->K * 4);
        if (!c->from_ids) bk_same(j, r, &own->dlogits, &one->dlogits, (int64_t)at * c->E * 4);
        bk_check_drouter(j, r);
        bk_check_experts(j, r);
        at += own->T;
    }
    if (!c->from_ids && !j->o.local_router)
        for (int r = 1; r < c->W; ++r) bk_same(j, r, &j->rank[r].drouter, &j->rank[0].drouter, 0);
    if (j->o.fp32) bk_check_parts(j);
    TEST_CUDA(cudaSetDevice(0));
}

#endif
