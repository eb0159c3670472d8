/* case.h: one exchange: every rank's tokens, its buffers, the reference of what it receives, and
   the sums that its tokens must get. */
#ifndef MOE_TESTS_EP_CASE_H
#define MOE_TESTS_EP_CASE_H

static int ep_few_slots = 8192; /* most received slots that one thread block takes */
#define MOEI_EP_FEW_SLOTS ep_few_slots
static int ep_fuse_home = 1; /* may a combine reduce and add at home in one launch */
#define MOEI_EP_FUSE_HOME ep_fuse_home
#include "moe/ep/combine.cuh"
#include "moe/ref/exchange.h"
#include "moe/ref/route.h"
#include "tests/test_case.h"
#include "tests/test_group.h"

enum { EP_RANDOM, EP_ONE_RANK, EP_ONE_EXPERT, EP_EMPTY }; /* how ids are drawn */

typedef struct ep_case {
    int W, T, H, E, K;     /* T: most tokens of a rank */
    int dispatch, combine; /* forms; 0: the default */
    int dtype;
    int draw;
    int replicas;    /* 1: a table of random replicas */
    int recv_tokens; /* C; 0: T */
    int num_scales;
    int misalign; /* bytes that x is past a multiple of 256 */
    int same;     /* 1: all ranks have T tokens, no -1 */
    int fp32;     /* 1: rows and what a combine sends are fp32 */
    int pad;      /* elements between rows of x, residual, shared and y; > 0: with a shared row */
    int row_multiple;
} ep_case;

/* Pairs of forms are numbered: every dispatch with every combine. */
#define EP_PAIRS 12
static int ep_dispatch_of(int pair) { return MOE_EP_DEDUPLICATED + pair % 4; }
static int ep_combine_of(int pair) { return MOE_EP_REDUCED + pair / 4; }

static int ep_to_all(const ep_case* c)
{
    return c->dispatch == MOE_EP_ALL_GATHER || c->dispatch == MOE_EP_ALL_GATHER_COPY;
}

/* One rank's arrays, on the host and on its device. */
typedef struct ep_rank {
    int T;
    int32_t* ids;
    float *weights, *scales;
    void *x, *residual, *shared;
    float* shared_weight;
    int32_t* choice_offset;
    moe_ep_expert* choice;
    moe_ref_exchange_rank want;
    tbuf d_ids, d_weights, d_scales, d_x, d_residual, d_offset, d_choice, workspace, d_y, d_rows;
    tbuf d_shared, d_shared_weight, d_counters;
    moe_ep_dispatch_desc dispatch;
    moe_ep_combine_desc combine;
    moe_ep_view view;
    void* rows; /* what the experts made, host */
    int32_t num_rows;
} ep_rank;

typedef struct ep_job {
    ep_case c;
    tgroup g;
    ep_rank rank[TGROUP_MOST];
    int32_t* offset; /* replicas of all ranks */
    moe_ep_expert* replica;
    int P[TGROUP_MOST]; /* experts of each rank */
} ep_job;

/* The dtype of the experts' rows. */
static int ep_rows_dtype(const ep_case* c) { return c->fp32 ? MOE_FP32 : c->dtype; }

static int ep_local(const ep_job* j, int r)
{
    return j->c.replicas ? j->P[r] : moe_ep_owned(r, j->c.E, j->c.W);
}

/* Draws a table of replicas: every expert has 1 to 3, on any ranks. */
static void ep_draw_replicas(ep_job* j, trand* q)
{
    const int E = j->c.E, W = j->c.W;
    j->offset = (int32_t*)test_host((E + 1) * 4);
    j->replica = (moe_ep_expert*)test_host(E * 3 * 8);
    memset(j->P, 0, sizeof j->P);
    j->offset[0] = 0;
    for (int e = 0; e < E; ++e) {
        const int n = (int)trand_int(q, 1, 3);
        j->offset[e + 1] = j->offset[e] + n;
        for (int i = 0; i < n; ++i) {
            const int r = (int)trand_int(q, 0, W - 1);
            j->replica[j->offset[e] + i].rank = r;
            j->replica[j->offset[e] + i].expert = j->P[r]++;
        }
    }
}

static int ep_draw_id(const ep_case* c, trand* q)
{
    if (!c->same && trand_int(q, 0, 11) == 0) return -1;
    if (c->draw == EP_ONE_EXPERT) return c->E / 2;
    if (c->draw == EP_ONE_RANK) {
        const int first = moe_ep_first(c->W - 1, c->E, c->W);
        return first < c->E ? (int)trand_int(q, first, c->E - 1) : c->E - 1;
    }
    return (int)trand_int(q, 0, c->E - 1);
}

/* Draws ids and weights anew; same sizes. */
static void ep_draw_slots(const ep_case* c, ep_rank* r, trand* q)
{
    for (int i = 0; i < r->T * c->K; ++i) {
        r->ids[i] = ep_draw_id(c, q);
        r->weights[i] = 0.25f + 0.5f * (float)trand_int(q, 0, 1000) / 1000.0f;
    }
}

static void ep_draw_rank(ep_job* j, int rank, trand* q)
{
    const ep_case* c = &j->c;
    ep_rank* r = j->rank + rank;
    const int elem = moe_dtype_bytes(c->dtype);
    r->T = c->same ? c->T : rank == 0 ? c->T : (int)trand_int(q, 0, c->T);
    if (c->draw == EP_EMPTY || (!c->same && rank == c->W - 1 && c->W > 1)) r->T = 0;
    r->ids = (int32_t*)test_host((int64_t)r->T * c->K * 4);
    r->weights = (float*)test_host((int64_t)r->T * c->K * 4);
    r->scales = (float*)test_host((int64_t)r->T * c->num_scales * 4);
    r->x = test_host((int64_t)r->T * c->H * elem);
    r->residual = test_host((int64_t)r->T * c->H * elem);
    ep_draw_slots(c, r, q);
    trand_fill_normal(q, r->scales, (int64_t)r->T * c->num_scales, MOE_FP32);
    trand_fill_normal(q, r->x, (int64_t)r->T * c->H, c->dtype);
    trand_fill_normal(q, r->residual, (int64_t)r->T * c->H, c->dtype);
    r->shared = test_host((int64_t)r->T * c->H * elem);
    r->shared_weight = (float*)test_host((int64_t)r->T * 4);
    trand_fill_normal(q, r->shared, (int64_t)r->T * c->H, c->dtype);
    trand_fill_normal(q, r->shared_weight, r->T, MOE_FP32);
    if (c->replicas) {
        r->choice_offset = (int32_t*)test_host((c->E + 1) * 4);
        r->choice = (moe_ep_expert*)test_host(j->offset[c->E] * 8);
        CHECK_STATUS(moe_ep_choose(j->g.peers[rank].id, c->W, rank, j->offset, j->replica, c->E,
                                   r->choice_offset, r->choice),
                     MOE_OK);
    }
}

static moe_ep_buffers ep_sizes(const ep_case* c)
{
    moe_ep_buffers b;
    memset(&b, 0, sizeof b);
    b.dispatch_form = c->dispatch;
    b.combine_form = c->combine;
    b.max_tokens = c->T;
    b.recv_tokens = c->recv_tokens;
    b.hidden = c->H;
    b.num_experts = c->E;
    b.top_k = c->K;
    b.dtype = c->dtype;
    b.rows_dtype = c->fp32 ? MOE_FP32 : 0;
    b.num_scales = c->num_scales;
    b.row_multiple = c->row_multiple;
    b.channel = 2;
    if (c->replicas) b.max_rows = (int64_t)c->W * (c->recv_tokens ? c->recv_tokens : c->T) * c->K;
    return b;
}

/* A device copy of T rows of H elements, `pad` elements between them, which stay poison. */
static tbuf ep_rows_from(const ep_case* c, const char* name, const void* rows, int T, int misalign)
{
    const int64_t elem = moe_dtype_bytes(c->dtype), row = c->H * elem, pitch = row + c->pad * elem;
    char* padded = (char*)test_host(T * pitch);
    tbuf b;
    for (int t = 0; t < T; ++t)
        memcpy(padded + t * pitch, (const char*)rows + t * row, (size_t)row);
    b = tbuf_from(name, padded, (size_t)(T * pitch), (size_t)misalign);
    free(padded);
    return b;
}

/* Puts a rank's arrays onto its device and fills in its descriptors. */
static int ep_put_rank(ep_job* j, int rank)
{
    const ep_case* c = &j->c;
    ep_rank* r = j->rank + rank;
    const int64_t slots = (int64_t)r->T * c->K;
    const int elem = moe_dtype_bytes(c->dtype);
    moe_ep_dispatch_desc* d = &r->dispatch;
    size_t bytes;
    tgroup_use(&j->g, rank);
    memset(d, 0, sizeof *d);
    r->d_ids = tbuf_from("ids", r->ids, (size_t)slots * 4, 0);
    r->d_weights = tbuf_from("weights", r->weights, (size_t)slots * 4, 0);
    r->d_scales = tbuf_from("scales", r->scales, (size_t)r->T * (size_t)c->num_scales * 4, 0);
    r->d_x = ep_rows_from(c, "x", r->x, r->T, c->misalign);
    r->d_residual = ep_rows_from(c, "residual", r->residual, r->T, 0);
    r->d_shared = ep_rows_from(c, "shared", r->shared, r->T, 0);
    r->d_shared_weight = tbuf_from("shared_weight", r->shared_weight, (size_t)r->T * 4, 0);
    r->d_y = tbuf_new("y", (size_t)r->T * (size_t)((c->H + c->pad) * elem), 0);
    d->peers = j->g.peers + rank;
    d->x = r->d_x.p;
    d->scales = c->num_scales ? (const float*)r->d_scales.p : 0;
    d->ids = (const int32_t*)r->d_ids.p;
    d->weights = (const float*)r->d_weights.p;
    d->fault = j->g.fault[rank];
    {
        const moe_ep_counters zeros = {0, 0, 0, 0, 0, 0, 0, 0};
        r->d_counters = tbuf_from("counters", &zeros, sizeof zeros, 0);
    }
    if (!c->same) d->counters = (moe_ep_counters*)r->d_counters.p;
    d->num_tokens = r->T;
    d->num_local = c->replicas ? j->P[rank] : 0;
    d->tag = 77;
    d->side_stream = j->g.side[rank];
    d->side_event[0] = j->g.side_event[rank][0], d->side_event[1] = j->g.side_event[rank][1];
    d->buffers = ep_sizes(c);
    if (c->replicas) {
        r->d_offset = tbuf_from("replica_offset", r->choice_offset, (size_t)(c->E + 1) * 4, 0);
        r->d_choice = tbuf_from("replica", r->choice, (size_t)r->choice_offset[c->E] * 8, 0);
        d->replica_offset = (const int32_t*)r->d_offset.p;
        d->replica = (const moe_ep_expert*)r->d_choice.p;
    }
    if (!CHECK_STATUS(moe_ep_dispatch_workspace(d, &bytes), MOE_OK)) return 0;
    r->workspace = tbuf_new("workspace", bytes, 0);
    d->workspace = r->workspace.p;
    d->workspace_bytes = bytes;
    if (!CHECK_STATUS(moe_ep_dispatch_get_view(d, &r->view), MOE_OK)) return 0;
    r->num_rows = (int32_t)r->view.num_rows;
    r->rows = test_host((int64_t)r->num_rows * c->H * moe_dtype_bytes(ep_rows_dtype(c)));
    r->d_rows = tbuf_new(
        "rows", (size_t)r->num_rows * (size_t)(c->H * moe_dtype_bytes(ep_rows_dtype(c))), 0);
    memset(&r->combine, 0, sizeof r->combine);
    r->combine.dispatch = d;
    r->combine.rows = c->combine == MOE_EP_GATHERED ? 0 : r->d_rows.p;
    r->combine.weights = d->weights;
    r->combine.residual = r->d_residual.p;
    r->combine.y = r->d_y.p;
    if (c->pad) {
        d->x_stride = r->combine.residual_stride = r->combine.shared_stride = c->H + c->pad;
        r->combine.y_stride = c->H + c->pad;
        r->combine.shared = r->d_shared.p;
        r->combine.shared_weight = (const float*)r->d_shared_weight.p;
    }
    r->combine.tag = 78;
    return 1;
}

/* Fills in what each rank must receive. */
static void ep_expect(ep_job* j)
{
    const ep_case* c = &j->c;
    const int C = c->recv_tokens ? c->recv_tokens : c->T;
    moe_ref_exchange_rank all[TGROUP_MOST];
    for (int r = 0; r < c->W; ++r) {
        ep_rank* k = j->rank + r;
        moe_ref_exchange_rank* w = all + r;
        if (k->want.recv_ids)
            TFREE(k->want.recv_count, k->want.recv_token, k->want.recv_ids, k->want.recv_weights);
        memset(w, 0, sizeof *w);
        w->ids = k->ids, w->weights = k->weights, w->num_tokens = k->T;
        w->replica_offset = k->choice_offset, w->replica = k->choice;
        w->recv_count = (int32_t*)test_host(c->W * 4);
        w->recv_token = (int32_t*)test_host((int64_t)c->W * C * 4);
        w->recv_ids = (int32_t*)test_host((int64_t)c->W * C * c->K * 4);
        w->recv_weights = (float*)test_host((int64_t)c->W * C * c->K * 4);
    }
    moe_ref_exchange(all, c->W, c->E, c->K, C, ep_to_all(c));
    for (int r = 0; r < c->W; ++r) j->rank[r].want = all[r];
}

/* Draws a case and puts it onto the devices. Returns 0 where it cannot run. */
static int ep_new(ep_job* j, const ep_case* c, uint64_t salt)
{
    trand q = trand_new(salt);
    moe_ep_buffers b = ep_sizes(c);
    uint64_t bytes = 0;
    int ok = 1;
    memset(j, 0, sizeof *j);
    j->c = *c;
    if (!CHECK_STATUS(moe_ep_buffers_end(&b, c->W, &bytes), MOE_OK)) return 0;
    if (!tgroup_new(&j->g, c->W, bytes)) return 0;
    for (int r = 0; r < c->W; ++r) { /* no kernel is loaded while another one waits */
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_preload(), MOE_OK);
    }
    if (c->replicas) ep_draw_replicas(j, &q);
    for (int r = 0; r < c->W; ++r) ep_draw_rank(j, r, &q);
    ep_expect(j);
    for (int r = 0; r < c->W && ok; ++r) ok = ep_put_rank(j, r);
    TEST_CUDA(cudaSetDevice(0));
    return ok;
}

static void ep_free(ep_job* j)
{
    tgroup_wait(&j->g);
    for (int r = 0; r < j->c.W; ++r) {
        ep_rank* k = j->rank + r;
        tgroup_use(&j->g, r);
        tbufs_free(TBUFS(&k->d_ids, &k->d_weights, &k->d_scales, &k->d_x, &k->d_residual,
                         &k->d_offset, &k->d_choice, &k->workspace, &k->d_y, &k->d_rows));
        tbufs_free(TBUFS(&k->d_shared, &k->d_shared_weight, &k->d_counters));
        TFREE(k->shared, k->shared_weight);
        TFREE(k->ids, k->weights, k->scales, k->x, k->residual, k->choice_offset, k->choice,
              k->want.recv_count, k->want.recv_token, k->want.recv_ids, k->want.recv_weights,
              k->rows);
    }
    TFREE(j->offset, j->replica);
    tgroup_free(&j->g);
}

/* Lets the next dispatch take few slots by one thread block, or by those for many, and the next
   combine add few tokens at home in the launch that reduces, or in another: now the one, now the
   other. */
static void ep_vary(void)
{
    static uint64_t calls;
    const uint64_t bits = trand_mix(++calls);
    ep_few_slots = bits & 1 ? 8192 : 0;
    ep_fuse_home = (int)(bits >> 1 & 1);
}

/* Queues a dispatch of every rank. */
static void ep_dispatch(ep_job* j)
{
    for (int r = 0; r < j->c.W; ++r) {
        tgroup_use(&j->g, r);
        ep_vary();
        CHECK_STATUS(moe_ep_dispatch(&j->rank[r].dispatch, j->g.stream[r]), MOE_OK);
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* Queues a combine of every rank. */
static void ep_combine(ep_job* j)
{
    for (int r = 0; r < j->c.W; ++r) {
        const int T = j->rank[r].T;
        moe_ep_combine_prepared p;
        tgroup_use(&j->g, r);
        ep_vary();
        CHECK_STATUS(moe_ep_combine_prepare(&j->rank[r].combine, &p), MOE_OK);
        if (T <= 4)
            CHECK(p.args.fused == (ep_fuse_home && j->c.combine != MOE_EP_GATHERED && T > 0 &&
                                   !p.args.peers.shared),
                  "rank %d: one launch %d", r, p.args.fused);
        CHECK_STATUS(moe_ep_combine_run(&p, j->g.stream[r]), MOE_OK);
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* A copy of device memory of rank r. */
static void* ep_get(const ep_job* j, int r, const void* p, int64_t bytes)
{
    void* host = test_host(bytes);
    tgroup_use(&j->g, r);
    TEST_CUDA(cudaDeviceSynchronize());
    if (bytes) TEST_CUDA(cudaMemcpy(host, p, (size_t)bytes, cudaMemcpyDeviceToHost));
    TEST_CUDA(cudaSetDevice(0));
    return host;
}

/* Fills the rows of every rank's experts with numbers, as an MLP would have. */
static void ep_fill_rows(ep_job* j, trand* q)
{
    const int dtype = ep_rows_dtype(&j->c), elem = moe_dtype_bytes(dtype);
    for (int r = 0; r < j->c.W; ++r) {
        ep_rank* k = j->rank + r;
        const int64_t bytes = (int64_t)k->num_rows * j->c.H * elem;
        trand_fill_normal(q, k->rows, (int64_t)k->num_rows * j->c.H, dtype);
        tgroup_use(&j->g, r);
        TEST_CUDA(cudaDeviceSynchronize());
        if (bytes)
            TEST_CUDA(cudaMemcpy(j->c.combine == MOE_EP_GATHERED ? k->view.rows : k->d_rows.p,
                                 k->rows, (size_t)bytes, cudaMemcpyHostToDevice));
        TEST_CUDA(cudaDeviceSynchronize());
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* What a slot adds to its token, and the rank that adds it: row of rank e.rank, -1: none. */
typedef struct ep_slot {
    int rank, row;
} ep_slot;

/* Finds the row of every slot of rank r by counting, from the references of all ranks. rows:
   [W][W C, K] row of each received slot. */
static ep_slot ep_find(const ep_job* j, int32_t* const* rows, int r, int64_t slot)
{
    const ep_case* c = &j->c;
    const int C = c->recv_tokens ? c->recv_tokens : c->T;
    const moe_ep_expert e = moe_ref_target(&j->rank[r].want, slot, c->K, c->E, c->W);
    ep_slot s = {-1, -1};
    if (e.rank < 0) return s;
    const moe_ref_exchange_rank* w = &j->rank[e.rank].want;
    for (int64_t i = (int64_t)r * C; i < (int64_t)r * C + w->recv_count[r]; ++i)
        if (w->recv_token[i] == slot / c->K) {
            s.rank = e.rank;
            s.row = rows[e.rank][i * c->K + slot % c->K];
        }
    return s;
}

#endif
