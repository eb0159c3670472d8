/* The exchange between ranks, one a GPU: every dispatch and every combine beside plain peer copies
   and NCCL's own calls.
   nvcc -O3 -std=c++14 -I. -DBENCH_NCCL -arch=sm_90a bench/bench_ep.cu -lnccl -o bench_ep
     without -DBENCH_NCCL and -lnccl: without NCCL's rows
     ./bench_ep [--ranks W] [--shape T,H,E,K] [--small] [--sweep]
     --sweep: by message size, 16 tokens a rank to T, with random and with skewed routing

   Bytes are those that leave a GPU; local rows do not count. A barrier stands in every iteration
   and is part of the time; the slowest rank counts. */
#include "bench_group.h"

#include "../moe/ep/combine.cuh"
#include "../moe/ep/profile.h"
#include "../moe/permute.cuh"

#ifdef BENCH_NCCL
#include <nccl.h>
#define BENCH_NCCL_DO(call)                                                                        \
    do {                                                                                           \
        const ncclResult_t e_ = (call);                                                            \
        if (e_ != ncclSuccess) {                                                                   \
            fprintf(stderr, "%s: %s\n", #call, ncclGetErrorString(e_));                            \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)
#endif

typedef struct shape {
    int T, H, E, K;
} shape;

/* All ranks of one exchange. */
typedef struct job {
    shape s;
    int dispatch_form, combine_form;
    void* x[BENCH_MOST_RANKS];
    void* y[BENCH_MOST_RANKS];
    void* rows[BENCH_MOST_RANKS];
    int32_t* ids[BENCH_MOST_RANKS];
    float* weights[BENCH_MOST_RANKS];
    void* workspace[BENCH_MOST_RANKS];
    moe_ep_dispatch_desc dispatch[BENCH_MOST_RANKS];
    moe_ep_combine_desc combine[BENCH_MOST_RANKS];
    moe_ep_dispatch_prepared dispatch_p[BENCH_MOST_RANKS];
    moe_ep_combine_prepared combine_p[BENCH_MOST_RANKS];
    double sent_rows, slot_rows; /* of a rank to others: deduplicated; one a slot */
} job;

/* Returns the rows that leave a rank. */
static double dispatch_rows(const bench_group* g, const job* j)
{
    if (j->dispatch_form == MOE_EP_DEDUPLICATED) return j->sent_rows;
    return j->dispatch_form == MOE_EP_ALL_TO_ALL ? j->slot_rows : (double)(g->W - 1) * j->s.T;
}
static double combine_rows(const job* j)
{
    return j->combine_form == MOE_EP_GATHERED ? j->slot_rows : j->sent_rows;
}

/* Distinct experts for each token, from a hash; the skew doubles the share of the first ones. */
static void draw_ids(int32_t* ids, const shape* s, int rank, int skew)
{
    for (int t = 0; t < s->T; ++t)
        for (int k = 0; k < s->K; ++k) {
            uint32_t h = bench_hash((uint32_t)(t * s->K + k), (uint32_t)(rank * 977 + 5));
            for (;;) {
                int e = (int)(h % (uint32_t)s->E), again = 0;
                if (skew && (h >> 20 & 3) == 0) e = e * e / s->E;
                for (int q = 0; q < k; ++q) again |= ids[t * s->K + q] == e;
                ids[t * s->K + k] = e;
                if (!again) break;
                h = bench_hash(h, 77u);
            }
        }
}

/* Sets the buffers' sizes and forms. */
static void set_buffers(moe_ep_buffers* b, shape s, int W, int dispatch_form, int combine_form)
{
    b->dispatch_form = dispatch_form;
    b->combine_form = combine_form;
    b->max_tokens = s.T;
    b->hidden = s.H;
    b->num_experts = s.E;
    b->top_k = s.K;
    b->max_rows = (int64_t)W * s.T * s.K;
    if (b->max_rows > (int64_t)s.T * s.K * 5 / 4 + 4096)
        b->max_rows = (int64_t)s.T * s.K * 5 / 4 + 4096;
}

static void job_open(bench_group* g, job* j, shape s, int dispatch_form, int combine_form, int skew)
{
    int32_t* host = (int32_t*)malloc((size_t)s.T * (size_t)s.K * 4 + 1);
    memset(j, 0, sizeof *j);
    j->s = s;
    j->dispatch_form = dispatch_form;
    j->combine_form = combine_form;
    for (int r = 0; r < g->W; ++r) {
        moe_ep_dispatch_desc* d = j->dispatch + r;
        moe_ep_view v;
        size_t bytes;
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        draw_ids(host, &s, r, skew);
        for (int t = 0; r == 0 && t < s.T; ++t) {
            uint64_t ranks = 0;
            for (int k = 0; k < s.K; ++k) {
                const int o = moe_ep_owner(host[t * s.K + k], s.E, g->W);
                ranks |= 1ull << o;
                j->slot_rows += o != 0;
            }
            for (int o = 1; o < g->W; ++o) j->sent_rows += (double)(ranks >> o & 1);
        }
        j->x[r] = bench_random((int64_t)s.T * s.H, MOE_BF16, 1.0f, 3u + (uint32_t)r);
        j->y[r] = bench_alloc((size_t)s.T * (size_t)s.H * 2);
        j->ids[r] = (int32_t*)bench_alloc((size_t)s.T * (size_t)s.K * 4);
        j->weights[r] = (float*)bench_random((int64_t)s.T * s.K, MOE_FP32, 1.0f, 9u);
        BENCH_CUDA(
            cudaMemcpy(j->ids[r], host, (size_t)s.T * (size_t)s.K * 4, cudaMemcpyHostToDevice));
        d->peers = g->peers + r;
        d->x = j->x[r], d->ids = j->ids[r], d->weights = j->weights[r];
        d->fault = g->fault[r];
        d->num_tokens = s.T;
        d->side_stream = g->side[r];
        d->side_event[0] = g->side_event[r][0], d->side_event[1] = g->side_event[r][1];
        set_buffers(&d->buffers, s, g->W, dispatch_form, combine_form);
        BENCH_MOE(moe_ep_dispatch_workspace(d, &bytes));
        j->workspace[r] = bench_alloc(bytes);
        d->workspace = j->workspace[r], d->workspace_bytes = bytes;
        BENCH_MOE(moe_ep_dispatch_get_view(d, &v));
        if (combine_form != MOE_EP_GATHERED)
            j->rows[r] = bench_random(v.num_rows * s.H, MOE_BF16, 1.0f, 4u);
        j->combine[r].dispatch = d;
        j->combine[r].rows = j->rows[r];
        j->combine[r].weights = j->weights[r];
        j->combine[r].y = j->y[r];
        BENCH_MOE(moe_ep_dispatch_prepare(d, j->dispatch_p + r));
        BENCH_MOE(moe_ep_combine_prepare(j->combine + r, j->combine_p + r));
        BENCH_CUDA(cudaDeviceSynchronize()); /* the group's streams do not wait for the inputs */
    }
    free(host);
}

static void job_close(bench_group* g, job* j)
{
    bench_group_wait(g);
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_CUDA(cudaFree(j->x[r]));
        BENCH_CUDA(cudaFree(j->y[r]));
        BENCH_CUDA(cudaFree(j->rows[r]));
        BENCH_CUDA(cudaFree(j->ids[r]));
        BENCH_CUDA(cudaFree(j->weights[r]));
        BENCH_CUDA(cudaFree(j->workspace[r]));
    }
}

static void run_dispatch(void* context, bench_group* g)
{
    const job* j = (const job*)context;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_ep_dispatch_run(j->dispatch_p + r, g->stream[r]));
    }
}

static void run_send(void* context, bench_group* g) /* rows alone: no row maps */
{
    const job* j = (const job*)context;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_ep_dispatch_run_part(j->dispatch_p + r, MOE_EP_SEND, g->stream[r]));
        BENCH_MOE(moe_ep_dispatch_run_part(j->dispatch_p + r, MOE_EP_RECEIVE, g->stream[r]));
    }
}

static void run_combine(void* context, bench_group* g)
{
    const job* j = (const job*)context;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_ep_combine_run(j->combine_p + r, g->stream[r]));
    }
}

static void run_reduce(void* context, bench_group* g)
{
    const job* j = (const job*)context;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(MOE_RUN(&j->combine_p[r].reduce, j->combine_p[r].args, g->stream[r]));
    }
}

static void run_home(void* context, bench_group* g)
{
    const job* j = (const job*)context;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_combine_run(&j->combine_p[r].combine, g->stream[r]));
    }
}

static void run_both(void* context, bench_group* g)
{
    run_dispatch(context, g);
    run_combine(context, g);
}

static void run_nothing(void* context, bench_group* g)
{
    (void)context;
    (void)g;
}

/* Compares received rows with the tokens they are copies of, in the senders' own memory. */
typedef struct check_args {
    const uint4* x[BENCH_MOST_RANKS]; /* of each rank */
    const uint4* recv_x;
    const int32_t *recv_token, *recv_count;
    const int32_t* row_slot; /* where recv_x is in expert order; else null */
    int64_t num_rows;
    int32_t recv_tokens, vectors, top_k;
    unsigned* worst; /* vectors that differ */
} check_args;

MOE_KERNEL(256, 1) check_kernel(MOE_ARG(check_args) a)
{
    const int s = (int)blockIdx.y;
    const int64_t n = a.row_slot ? a.num_rows : a.recv_count[s];
    for (int64_t j = blockIdx.x; j < n; j += gridDim.x) {
        const int64_t row = a.row_slot ? j : (int64_t)s * a.recv_tokens + j;
        const int64_t at = a.row_slot ? a.row_slot[j] / a.top_k : row; /* of recv_token */
        if (at / a.recv_tokens != s || (a.row_slot && a.row_slot[j] < 0)) continue;
        for (int i = (int)threadIdx.x; i < a.vectors; i += 256) {
            const uint4 u = a.recv_x[row * a.vectors + i];
            const uint4 v = a.x[s][(int64_t)a.recv_token[at] * a.vectors + i];
            if (u.x != v.x || u.y != v.y || u.z != v.z || u.w != v.w) atomicAdd(a.worst, 1u);
        }
    }
}

/* Ends the program where a dispatch has not copied the rows, or their number is not right. */
static void verify(bench_group* g, job* j)
{
    run_dispatch(j, g);
    bench_group_check(g, "dispatch");
    for (int r = 0; r < g->W; ++r) {
        moe_launch_config c = moe_grid(256, 256, 0, g->stream[r]);
        check_args a;
        moe_ep_view v;
        unsigned wrong;
        int32_t count[BENCH_MOST_RANKS];
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_ep_dispatch_get_view(j->dispatch + r, &v));
        for (int q = 0; q < g->W; ++q) a.x[q] = (const uint4*)j->x[q];
        a.recv_x = (const uint4*)v.recv_x;
        a.recv_token = v.recv_token, a.recv_count = v.recv_count;
        a.row_slot = v.in_order ? v.row_slot : 0;
        a.num_rows = v.num_rows;
        a.recv_tokens = v.recv_tokens ? v.recv_tokens : 1;
        a.vectors = j->s.H / 8, a.top_k = j->s.K;
        c.grid.y = (unsigned)g->W;
        BENCH_WORST(check_kernel, c, a, wrong);
        BENCH_CUDA(cudaMemcpy(count, v.recv_count, (size_t)g->W * 4, cudaMemcpyDeviceToHost));
        if (wrong || (r > 0 && j->s.T && count[0] == 0)) {
            printf("VERIFY FAILED: rank %d: %u vectors differ, %d rows of rank 0\n", r, wrong,
                   count[0]);
            exit(1);
        }
    }
    run_combine(j, g);
    bench_group_check(g, "combine");
}

/* A plain copy: every rank pushes to, or pulls from, the next one. */
typedef struct copy_args {
    const uint4* from;
    uint4* to;
    int64_t vectors;
} copy_args;

MOE_KERNEL(1024, 1) copy_kernel(MOE_ARG(copy_args) a)
{
    const int64_t step = (int64_t)gridDim.x * 1024;
    int64_t i = blockIdx.x * 1024ll + threadIdx.x;
    for (; i + 3 * step < a.vectors; i += 4 * step) {
        const uint4 v0 = a.from[i], v1 = a.from[i + step], v2 = a.from[i + 2 * step],
                    v3 = a.from[i + 3 * step];
        a.to[i] = v0, a.to[i + step] = v1, a.to[i + 2 * step] = v2, a.to[i + 3 * step] = v3;
    }
    for (; i < a.vectors; i += step) a.to[i] = a.from[i];
}

typedef struct copy_job {
    int64_t bytes;
    int blocks, pull;
    void* local[BENCH_MOST_RANKS];
} copy_job;

static void run_copy(void* context, bench_group* g)
{
    const copy_job* j = (const copy_job*)context;
    for (int r = 0; r < g->W; ++r) {
        char* peer = (char*)g->region[(r + 1) % g->W] + MOE_PEERS_HEADER;
        moe_launch_config c = moe_grid(j->blocks, 1024, 0, g->stream[r]);
        copy_args a;
        a.from = (const uint4*)(j->pull ? peer : j->local[r]);
        a.to = (uint4*)(j->pull ? j->local[r] : peer);
        a.vectors = j->bytes / 16;
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(MOE_LAUNCH(copy_kernel, c, a));
    }
}

/* Returns the best rate of a plain copy in one direction, bytes a second. */
static double best_copy(bench_group* g, int64_t bytes, int pull)
{
    static const int blocks[] = {16, 24, 32, 64};
    copy_job j;
    double best = 0;
    j.bytes = bytes;
    j.pull = pull;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        j.local[r] = bench_alloc((size_t)bytes);
        BENCH_CUDA(cudaMemset(j.local[r], 1, (size_t)bytes));
    }
    for (int i = 0; i < 4; ++i) {
        double ms;
        j.blocks = blocks[i];
        ms = bench_group_time(g, run_copy, &j, 0);
        printf("  plain %s, %3d blocks %9.4f ms %7.1f GB/s\n", pull ? "pull" : "push", blocks[i],
               ms, (double)bytes / ms * 1e-6);
        if ((double)bytes / ms * 1e3 > best) best = (double)bytes / ms * 1e3;
    }
    for (int r = 0; r < g->W; ++r) BENCH_CUDA(cudaFree(j.local[r]));
    return best;
}

#ifdef BENCH_NCCL
typedef struct nccl_job {
    ncclComm_t comm[BENCH_MOST_RANKS];
    void *from[BENCH_MOST_RANKS], *to[BENCH_MOST_RANKS];
    size_t each; /* elements for each peer */
} nccl_job;

/* All-to-all of T K rows, evenly. */
static void run_nccl(void* context, bench_group* g)
{
    const nccl_job* j = (const nccl_job*)context;
    BENCH_NCCL_DO(ncclGroupStart());
    for (int r = 0; r < g->W; ++r)
        for (int p = 0; p < g->W; ++p) {
            BENCH_NCCL_DO(ncclSend((char*)j->from[r] + (size_t)p * j->each * 2, j->each,
                                   ncclBfloat16, p, j->comm[r], g->stream[r]));
            BENCH_NCCL_DO(ncclRecv((char*)j->to[r] + (size_t)p * j->each * 2, j->each, ncclBfloat16,
                                   p, j->comm[r], g->stream[r]));
        }
    BENCH_NCCL_DO(ncclGroupEnd());
}

/* All-gather and reduce-scatter of the `each` elements of every rank. */
static void run_gather(void* context, bench_group* g)
{
    const nccl_job* j = (const nccl_job*)context;
    BENCH_NCCL_DO(ncclGroupStart());
    for (int r = 0; r < g->W; ++r)
        BENCH_NCCL_DO(
            ncclAllGather(j->from[r], j->to[r], j->each, ncclBfloat16, j->comm[r], g->stream[r]));
    BENCH_NCCL_DO(ncclGroupEnd());
}
static void run_reduce_scatter(void* context, bench_group* g)
{
    const nccl_job* j = (const nccl_job*)context;
    BENCH_NCCL_DO(ncclGroupStart());
    for (int r = 0; r < g->W; ++r)
        BENCH_NCCL_DO(ncclReduceScatter(j->to[r], j->from[r], j->each, ncclBfloat16, ncclSum,
                                        j->comm[r], g->stream[r]));
    BENCH_NCCL_DO(ncclGroupEnd());
}
#endif

#ifdef BENCH_NCCL
/* What a user of NCCL does before the experts: rows into expert order, counts to the host, all-to-
   all of the rows that each rank has for each other. */
typedef struct path_job {
    moe_route_prepared route[BENCH_MOST_RANKS];
    moe_permute_prepared permute[BENCH_MOST_RANKS];
    int32_t *d_offset[BENCH_MOST_RANKS], *offset[BENCH_MOST_RANKS]; /* [E + 1], device and host */
    char *from[BENCH_MOST_RANKS], *to[BENCH_MOST_RANKS];
    shape s;
    ncclComm_t* comm;
} path_job;

static void run_path(void* context, bench_group* g)
{
    const path_job* p = (const path_job*)context;
    const size_t row = (size_t)p->s.H;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_MOE(moe_route_run(p->route + r, g->stream[r]));
        BENCH_MOE(moe_permute_run(p->permute + r, g->stream[r]));
        BENCH_CUDA(cudaMemcpyAsync(p->offset[r], p->d_offset[r], (size_t)(p->s.E + 1) * 4,
                                   cudaMemcpyDeviceToHost, g->stream[r]));
    }
    bench_group_wait(g); /* the host reads the counts */
    BENCH_NCCL_DO(ncclGroupStart());
    for (int r = 0; r < g->W; ++r) {
        size_t at = 0;
        for (int q = 0; q < g->W;
             ++q) { /* rank r sends q's experts' rows, and gets its own from q */
            const int32_t* own = p->offset[r];
            const int32_t* other = p->offset[q];
            const int a = moe_ep_first(q, p->s.E, g->W), b = moe_ep_first(q + 1, p->s.E, g->W);
            const int c = moe_ep_first(r, p->s.E, g->W), d = moe_ep_first(r + 1, p->s.E, g->W);
            const size_t in = (size_t)(other[d] - other[c]);
            BENCH_NCCL_DO(ncclSend(p->from[r] + (size_t)own[a] * row * 2,
                                   (size_t)(own[b] - own[a]) * row, ncclBfloat16, q, p->comm[r],
                                   g->stream[r]));
            BENCH_NCCL_DO(ncclRecv(p->to[r] + at * row * 2, in * row, ncclBfloat16, q, p->comm[r],
                                   g->stream[r]));
            at += in;
        }
    }
    BENCH_NCCL_DO(ncclGroupEnd());
}

/* Returns the milliseconds of that path, with the ids of a job. */
static double nccl_path(bench_group* g, const job* e, ncclComm_t* comm)
{
    static path_job p;
    const shape s = e->s;
    const size_t slots = (size_t)s.T * (size_t)s.K;
    double ms;
    memset(&p, 0, sizeof p);
    p.s = s, p.comm = comm;
    for (int r = 0; r < g->W; ++r) {
        moe_route_desc d;
        moe_permute_desc m;
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        memset(&d, 0, sizeof d);
        d.ids = e->ids[r];
        d.num_tokens = s.T, d.num_experts = s.E, d.top_k = s.K;
        d.expert_count = (int32_t*)bench_alloc((size_t)s.E * 4);
        d.expert_offset = p.d_offset[r] = (int32_t*)bench_alloc((size_t)(s.E + 1) * 4);
        d.row_slot = (int32_t*)bench_alloc(slots * 4);
        d.slot_row = (int32_t*)bench_alloc(slots * 4);
        BENCH_MOE(moe_route_workspace(&d, &d.workspace_bytes));
        d.workspace = bench_alloc(d.workspace_bytes);
        BENCH_MOE(moe_route_prepare(&d, p.route + r));
        BENCH_CUDA(cudaMallocHost((void**)&p.offset[r], (size_t)(s.E + 1) * 4));
        p.from[r] = (char*)bench_alloc(slots * (size_t)s.H * 2);
        p.to[r] = (char*)bench_alloc(slots * (size_t)s.H * 3); /* more may come than go */
        memset(&m, 0, sizeof m);
        m.x = e->x[r], m.y = p.from[r], m.row_slot = d.row_slot, m.slot_row = d.slot_row;
        m.num_tokens = s.T, m.top_k = s.K, m.hidden = s.H, m.num_rows = (int64_t)slots;
        BENCH_MOE(moe_permute_prepare(&m, p.permute + r));
    }
    ms = bench_group_time(g, run_path, &p, 0);
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_CUDA(cudaFree(p.from[r]));
        BENCH_CUDA(cudaFree(p.to[r]));
        BENCH_CUDA(cudaFreeHost(p.offset[r]));
    }
    return ms;
}

static nccl_job j;

static ncclComm_t* nccl_comm(void) { return j.comm; }

static void nccl_open(bench_group* g)
{
    static int open;
    if (!open) BENCH_NCCL_DO(ncclCommInitAll(j.comm, g->W, g->device));
    open = 1;
}
#endif

/* Exchanges while NCCL all-reduces on other streams: neither must stop the other. */
static void beside_nccl(bench_group* g, shape s)
{
#ifdef BENCH_NCCL
    enum { CALLS = 300 };
    static job e;
    cudaStream_t other[BENCH_MOST_RANKS];
    float* sum[BENCH_MOST_RANKS];
    const size_t count = 1 << 20;
    if (g->devices < g->W) return; /* NCCL takes one rank a GPU */
    nccl_open(g);
    job_open(g, &e, s, MOE_EP_DEDUPLICATED, MOE_EP_REDUCED, 0);
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_CUDA(cudaStreamCreateWithFlags(&other[r], cudaStreamNonBlocking));
        sum[r] = (float*)bench_alloc(count * 4);
        BENCH_CUDA(cudaMemset(sum[r], 0, count * 4));
    }
    for (int i = 0; i < CALLS; ++i) {
        BENCH_NCCL_DO(ncclGroupStart());
        for (int r = 0; r < g->W; ++r)
            BENCH_NCCL_DO(
                ncclAllReduce(sum[r], sum[r], count, ncclFloat, ncclSum, j.comm[r], other[r]));
        BENCH_NCCL_DO(ncclGroupEnd());
        run_both(&e, g);
    }
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        BENCH_CUDA(cudaStreamSynchronize(other[r]));
        BENCH_CUDA(cudaStreamDestroy(other[r]));
        BENCH_CUDA(cudaFree(sum[r]));
    }
    bench_group_check(g, "beside NCCL");
    printf("  %d exchanges while NCCL all-reduces on other streams: no fault\n", CALLS);
    job_close(g, &e);
#else
    (void)g, (void)s;
#endif
}

enum { NCCL_ALL_TO_ALL, NCCL_ALL_GATHER, NCCL_REDUCE_SCATTER };

/* Returns the milliseconds of a call of NCCL's: all-to-all of T K rows, all-gather or reduce-scatter
   of T rows a rank; 0 without NCCL, or where ranks share a GPU. */
static double nccl_time(bench_group* g, shape s, int call, int graph)
{
#ifdef BENCH_NCCL
    double ms;
    if (g->devices < g->W) return 0;
    nccl_open(g);
    j.each = (size_t)s.T * (size_t)s.H;
    if (call == NCCL_ALL_TO_ALL) j.each = j.each * (size_t)s.K / (size_t)g->W;
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaSetDevice(g->device[r]));
        j.from[r] = bench_alloc(j.each * (size_t)g->W * 2);
        j.to[r] = bench_alloc(j.each * (size_t)g->W * 2);
    }
    ms = bench_group_time(g,
                          call == NCCL_ALL_TO_ALL   ? run_nccl
                          : call == NCCL_ALL_GATHER ? run_gather
                                                    : run_reduce_scatter,
                          &j, graph);
    for (int r = 0; r < g->W; ++r) {
        BENCH_CUDA(cudaFree(j.from[r]));
        BENCH_CUDA(cudaFree(j.to[r]));
    }
    return ms;
#else
    (void)g, (void)s, (void)call, (void)graph;
    return 0;
#endif
}

static void row(const char* what, double ms, double bytes, double best, const char* of)
{
    printf("  %-44s %9.4f ms %7.1f GB/s  %6.3f of %s\n", what, ms, bytes / ms * 1e-6,
           best > 0 ? bytes / ms * 1e3 / best : 0.0, of);
    fflush(stdout);
}

/* Every dispatch, beside a plain push. */
static void bench_dispatches(bench_group* g, job* j, shape s, double push, int graph, int skew)
{
    const double row_bytes = s.H * 2.0;
    const double nccl = skew ? 0 : nccl_time(g, s, NCCL_ALL_TO_ALL, graph);
    const double gather = skew ? 0 : nccl_time(g, s, NCCL_ALL_GATHER, graph);
    for (int form = MOE_EP_DEDUPLICATED; form <= MOE_EP_ALL_GATHER_COPY; ++form) {
        char name[64];
        double ms;
        job_open(g, j, s, form, MOE_EP_REDUCED, skew);
        verify(g, j);
        if (form == MOE_EP_DEDUPLICATED)
            row("dispatch, rows alone", bench_group_time(g, run_send, j, graph),
                j->sent_rows * row_bytes, push, "a plain push");
        ms = bench_group_time(g, run_dispatch, j, graph);
        snprintf(name, sizeof name, "dispatch, %s", moe_ep_dispatch_name(form));
        row(name, ms, dispatch_rows(g, j) * row_bytes, push, "a plain push");
        if (nccl > 0 && form <= MOE_EP_ALL_TO_ALL)
            printf("    / NCCL all-to-all %.3f\n", ms / nccl);
        if (gather > 0 && form > MOE_EP_ALL_TO_ALL)
            printf("    / NCCL all-gather %.3f\n", ms / gather);
#ifdef BENCH_NCCL
        if (nccl > 0 && form == MOE_EP_DEDUPLICATED && !graph) {
            const double path = nccl_path(g, j, nccl_comm());
            printf("    permute, counts to host, NCCL all-to-all %.4f ms; dispatch / this %.3f\n",
                   path, ms / path);
        }
#endif
        job_close(g, j);
    }
    if (nccl > 0)
        row("NCCL all-to-all of T K rows", nccl, (double)s.T * s.K * (g->W - 1) / g->W * row_bytes,
            push, "a plain push");
    if (gather > 0)
        row("NCCL all-gather of T rows", gather, (double)s.T * (g->W - 1) * row_bytes, push,
            "a plain push");
}

/* Every combine, beside a plain copy in its direction. */
static void bench_combines(bench_group* g, job* j, shape s, double push, double pull, int graph,
                           int skew)
{
    const double row_bytes = s.H * 2.0;
    const double scatter = skew ? 0 : nccl_time(g, s, NCCL_REDUCE_SCATTER, graph);
    double reduce = 0;
    for (int form = MOE_EP_REDUCED; form <= MOE_EP_REDUCE_SCATTER; ++form) {
        const int pushes = form == MOE_EP_REDUCED;
        char name[64];
        double ms;
        job_open(g, j, s, MOE_EP_DEDUPLICATED, form, skew);
        verify(g, j);
        ms = bench_group_time(g, run_combine, j, graph);
        snprintf(name, sizeof name, "combine, %s", moe_ep_combine_name(form));
        row(name, ms, combine_rows(j) * row_bytes, pushes ? push : pull,
            pushes ? "a plain push" : "a plain pull");
        if (form != MOE_EP_GATHERED && !j->combine_p[0].args.fused) {
            reduce = bench_group_time(g, run_reduce, j, graph);
            printf("    of it: reduce %.4f, home %.4f ms\n", reduce,
                   bench_group_time(g, run_home, j, graph));
        }
        if (form == MOE_EP_REDUCE_SCATTER && scatter > 0 && reduce > 0)
            printf("    / (the local reduce and NCCL reduce-scatter) %.3f\n",
                   ms / (reduce + scatter));
        if (form == MOE_EP_REDUCED)
            printf("    barrier alone %.4f ms; dispatch and combine, one barrier: %.4f ms\n",
                   bench_group_time(g, run_nothing, 0, graph),
                   bench_group_time(g, run_both, j, graph));
        job_close(g, j);
    }
    if (scatter > 0)
        row("NCCL reduce-scatter of T rows", scatter, (double)s.T * (g->W - 1) * row_bytes, push,
            "a plain push");
}

static void bench_shape(bench_group* g, shape s, double push, double pull, int graph, int skew)
{
    job* j = (job*)malloc(sizeof *j);
    printf("T %d a rank, H %d, E %d, K %d, W %d%s%s\n", s.T, s.H, s.E, s.K, g->W,
           graph ? ", in a graph" : "", skew ? ", skewed" : "");
    bench_dispatches(g, j, s, push, graph, skew);
    bench_combines(g, j, s, push, pull, graph, skew);
    free(j);
}

int main(int argc, char** argv)
{
    static bench_group g;
    shape s = {32768, 4096, 128, 8};
    const shape small = {128, 7168, 256, 8}, empty = {0, 7168, 256, 8};
    int W = 0, only_small = 0, sweep = 0;
    double push, pull;
    moe_ep_buffers b;
    uint64_t bytes;
    struct cudaDeviceProp prop;
    for (int i = 1; i < argc; ++i) {
        if (!strcmp(argv[i], "--ranks") && i + 1 < argc) W = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--small")) only_small = 1;
        else if (!strcmp(argv[i], "--sweep")) sweep = 1;
        else if (!strcmp(argv[i], "--shape") && i + 1 < argc &&
                 sscanf(argv[++i], "%d,%d,%d,%d", &s.T, &s.H, &s.E, &s.K) == 4) {
        } else {
            fprintf(stderr, "usage: %s [--ranks W] [--shape T,H,E,K] [--small] [--sweep]\n",
                    argv[0]);
            return 2;
        }
    }
    {
        int devices = 0;
        setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1); /* for ranks that share a GPU */
        if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
            printf("no GPU, skipped\n");
            return 77;
        }
        if (W == 0) W = devices;
    }
    memset(&b, 0, sizeof b);
    set_buffers(&b, s, W, MOE_EP_ALL_TO_ALL, MOE_EP_GATHERED); /* the pair with the most bytes */
    BENCH_MOE(moe_ep_buffers_end(&b, W, &bytes));
    bench_group_open(&g, W, bytes);
    for (int r = 0; r < g.W; ++r) {
        BENCH_CUDA(cudaSetDevice(g.device[r]));
        BENCH_MOE(moe_preload());
    }
    BENCH_CUDA(cudaGetDeviceProperties(&prop, 0));
    printf("%d ranks on %d x %s\n", g.W, g.devices, prop.name);
    push = best_copy(&g, (int64_t)s.T * s.H * 2, 0);
    pull = best_copy(&g, (int64_t)s.T * s.H * 2, 1);
    if (sweep) {
        for (int T = 16; T <= s.T; T *= 4)
            for (int skew = 0; skew < 2; ++skew) {
                const shape one = {T, s.H, s.E, s.K};
                bench_shape(&g, one, push, pull, T <= 1024 ? 20 : 0, skew);
            }
        return 0;
    }
    {
        const shape beside = {4096, s.H, s.E, s.K};
        beside_nccl(&g, beside);
    }
    if (!only_small) bench_shape(&g, s, push, pull, 0, 0);
    if (!only_small) bench_shape(&g, s, push, pull, 0, 1);
    bench_shape(&g, small, push, pull, 20, 0);
    bench_shape(&g, empty, push, pull, 20, 0);
    return 0;
}
