/* all_reduce.cuh: adds arrays of all ranks up, over peer pointers: sums of usage, gradients of a
   router. For arrays of at most a few megabytes.

     to[i] = sum over the ranks r, ascending, of from[i] of rank r     on every rank
     accumulate: added to what `to` has

   In:   up to 4 arrays from [count], fp32 or int32; a count that is the same on all ranks
   Out:  to [count], fp32, fp16 or bf16 (int32 of int32); may be `from` itself
   Every rank copies its arrays into its own region, and reads those of all ranks there. The buffers
   have moe_ep_all_reduce_bytes bytes in every region, from region_offset on: two halves that calls
   use in turn, so that a rank may be one call ahead. All ranks call alike, in the same order.

   Numerics: fp32 in ascending rank, rounded once to to_dtype: all ranks have the same bits, and
   equal inputs give equal bits. int32 wraps at 2^31.
   A stop fault of any rank before the call keeps `to` of all ranks as it is. A wait that ends at the
   last moment of its budget may stop one rank alone.
   Cost: 2 launches and a barrier; (W - 1) 4 count bytes reach this GPU. Minimum architecture: sm_75.

     moe_ep_all_reduce_desc d = {0};
     d.peers = &peers;  d.fault = fault;  d.region_offset = offset;  d.channel = 8; // used by this alone
     d.array[0].from = prob_sum;      d.array[0].to = all_prob_sum;      d.array[0].count = E;
     d.array[1].from = expert_count;  d.array[1].to = all_expert_count;  d.array[1].count = E;
     d.array[1].integers = 1;
     moe_status s = moe_ep_all_reduce(&d, stream);         // then moe_balance_loss on the sums */
#ifndef MOE_EP_ALL_REDUCE_CUH
#define MOE_EP_ALL_REDUCE_CUH

#include "../base/copy.cuh"
#include "../base/numeric.cuh"
#include "../preload.cuh"
#include "peers.cuh"
#include "push.cuh"

#define MOE_EP_ALL_REDUCE_ARRAYS 4

/* One array. Device addresses. */
typedef struct moe_ep_all_reduce_array {
    const void* from;   /* [count] fp32, or int32 */
    void* to;           /* [count] to_dtype, or int32 */
    int64_t count;      /* >= 0; 0: no array */
    int32_t integers;   /* 1: both are int32; 0: floats */
    int32_t to_dtype;   /* moe_dtype; 0 = fp32; 0 of integers */
    int32_t accumulate; /* 1: adds to `to`; 0: overwrites */
} moe_ep_all_reduce_array;

/* What moe_ep_all_reduce takes. */
typedef struct moe_ep_all_reduce_desc {
    const moe_peers* peers;
    uint64_t* fault; /* [1] fault word, required */
    moe_ep_all_reduce_array array[MOE_EP_ALL_REDUCE_ARRAYS];
    uint64_t region_offset; /* in every region, a multiple of 256, MOE_PEERS_HEADER or more */
    int32_t channel;        /* of barriers, 0 .. MOE_PEERS_CHANNELS - 1 */
    int32_t tag;            /* reported where a rank is late, 0 .. 2^24 - 1 */
} moe_ep_all_reduce_desc;

/* The argument of both kernels. */
typedef struct moei_ep_all_reduce_args {
    moe_peers_args peers;
    moe_ep_all_reduce_array array[MOE_EP_ALL_REDUCE_ARRAYS];
    uint64_t at, half; /* offset of the buffers in every region; bytes of each of the two */
    int32_t channel, tag;
} moei_ep_all_reduce_args;

#define MOEI_EP_ALL_REDUCE_THREADS 256

/* Returns the bytes that an array has in a half. */
MOE_HOST_DEVICE uint64_t moei_ep_all_reduce_extent(const moe_ep_all_reduce_array* a)
{
    return ((uint64_t)a->count * 4 + 15) / 16 * 16;
}

/* Copies this rank's arrays into its region and arrives; the last block waits for all ranks. */
MOE_KERNEL(MOEI_EP_ALL_REDUCE_THREADS, 1)
moei_ep_all_reduce_send(MOE_ARG(moei_ep_all_reduce_args) a)
{
    const int waits = blockIdx.x == gridDim.x - 1;
    const int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int64_t step = (int64_t)gridDim.x * blockDim.x;
    uint32_t n;
    bool stopped;
    char* own;
    moei_peer_pdl_trigger(&a.peers, waits);
    moe_pdl_wait();
    n = moei_peer_next(&a.peers, a.channel);
    stopped = moe_fault_stopped(a.peers.fault);
    own = a.peers.base + a.at + (n & 1) * a.half;
    for (int i = 0; i < MOE_EP_ALL_REDUCE_ARRAYS && !stopped; ++i) {
        const uint32_t* from = (const uint32_t*)a.array[i].from;
        for (int64_t j = first; j < a.array[i].count; j += step) ((uint32_t*)own)[j] = from[j];
        own += moei_ep_all_reduce_extent(&a.array[i]);
    }
    moei_ep_arrive(&a.peers, a.channel, n, stopped);
    if (waits && moe_warp() == 0)
        (void)moei_peer_reach_pass(&a.peers, a.channel, n, MOE_PHASE_REDUCE, a.tag, 0);
}

/* Adds elements 4 j .. 4 j + 3 of all ranks' copies at offset `at` of their regions. */
MOE_DEVICE void moei_ep_all_reduce_add(const moei_ep_all_reduce_args* a,
                                       const moe_ep_all_reduce_array* array, uint64_t at, int64_t j)
{
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int32_t whole[4] = {0, 0, 0, 0};
    MOE_NO_UNROLL
    for (int r0 = 0; r0 < a->peers.num_ranks; r0 += 4) {
        uint4 raw[4]; /* four loads are in flight */
        MOE_UNROLL
        for (int u = 0; u < 4; ++u) {
            raw[u] = make_uint4(0, 0, 0, 0);
            if (r0 + u < a->peers.num_ranks)
                raw[u] = moei_load16(moe_peer_address(&a->peers, r0 + u, at) + j * 16);
        }
        MOE_UNROLL
        for (int u = 0; u < 4; ++u) {
            const uint32_t v[4] = {raw[u].x, raw[u].y, raw[u].z, raw[u].w};
            if (r0 + u >= a->peers.num_ranks) break;
            MOE_UNROLL
            for (int i = 0; i < 4; ++i) {
                whole[i] = (int32_t)((uint32_t)whole[i] + v[i]);
                sum[i] += __uint_as_float(v[i]);
            }
        }
    }
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int64_t to = 4 * j + i;
        if (to >= array->count) break;
        if (array->integers) {
            int32_t* p = (int32_t*)array->to + to;
            *p = array->accumulate ? (int32_t)((uint32_t)*p + (uint32_t)whole[i]) : whole[i];
        } else {
            const float before =
                array->accumulate ? moe_load_f32(array->to, to, array->to_dtype) : 0.0f;
            moe_store_f32(array->to, to, array->to_dtype,
                          array->accumulate ? before + sum[i] : sum[i]);
        }
    }
}

/* Adds up the arrays of all ranks. A thread has 4 elements at a time. */
MOE_KERNEL(MOEI_EP_ALL_REDUCE_THREADS, 1) moei_ep_all_reduce_sum(MOE_ARG(moei_ep_all_reduce_args) a)
{
    uint64_t at;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.peers.fault)) return;
    at = a.at + ((moei_peer_next(&a.peers, a.channel) - 1) & 1) * a.half;
    for (int i = 0; i < MOE_EP_ALL_REDUCE_ARRAYS; ++i) {
        const int64_t vectors = (a.array[i].count + 3) / 4;
        for (int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; j < vectors;
             j += (int64_t)gridDim.x * blockDim.x)
            moei_ep_all_reduce_add(&a, a.array + i, at, j);
        at += moei_ep_all_reduce_extent(&a.array[i]);
    }
}

/* Refuses arrays that are not as documented; fills in the defaults and *half. */
MOE_HOST moe_status moei_ep_all_reduce_check(moe_ep_all_reduce_array* array, uint64_t* half)
{
    *half = 0;
    for (int i = 0; i < MOE_EP_ALL_REDUCE_ARRAYS; ++i) {
        moe_ep_all_reduce_array* a = array + i;
        MOE_REQUIRE(a->count >= 0 && a->count <= (int64_t)1 << 40, MOE_ERR_RANGE, count);
        MOE_REQUIRE((a->integers | 1) == 1, MOE_ERR_OPTION, integers);
        MOE_REQUIRE((a->accumulate | 1) == 1, MOE_ERR_OPTION, accumulate);
        MOE_REQUIRE(!a->integers || !a->to_dtype, MOE_ERR_CONFLICT, dtype);
        if (!a->to_dtype) a->to_dtype = MOE_FP32; /* as large as an int32 */
        MOE_REQUIRE(moe_dtype_bytes(a->to_dtype), MOE_ERR_DTYPE, dtype);
        *half += moei_ep_all_reduce_extent(a);
    }
    *half = (*half + 255) / 256 * 256;
    return MOE_OK;
}

/* Writes the bytes of the buffers in every region to *bytes. Reads the counts of the arrays. */
MOE_HOST moe_status moe_ep_all_reduce_bytes(const moe_ep_all_reduce_desc* desc, uint64_t* bytes)
{
    moe_ep_all_reduce_array array[MOE_EP_ALL_REDUCE_ARRAYS];
    uint64_t half;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    memcpy(array, desc->array, sizeof array);
    MOE_TRY(moei_ep_all_reduce_check(array, &half));
    *bytes = half * 2;
    return MOE_OK;
}

/* A prepared all-reduce: all but its stream, for the device that was current. */
typedef struct moe_ep_all_reduce_prepared {
    moei_ep_all_reduce_args args;
    moe_launch send, sum;
} moe_ep_all_reduce_prepared;

/* Fills in *p, which is empty. */
MOE_HOST moe_status moei_ep_all_reduce_prepare(const moe_ep_all_reduce_desc* d,
                                               moe_ep_all_reduce_prepared* p)
{
    moei_ep_all_reduce_args* a = &p->args;
    moe_buffer list[2 * MOE_EP_ALL_REDUCE_ARRAYS + 2];
    moe_device device;
    moe_launch_config c;
    int64_t most = 0, blocks;
    int count = 0;
    MOE_TRY(moei_peers_resolve(d->peers, d->fault, &a->peers));
    memcpy(a->array, d->array, sizeof a->array);
    MOE_TRY(moei_ep_all_reduce_check(a->array, &a->half));
    MOE_REQUIRE(d->region_offset >= MOE_PEERS_HEADER && d->region_offset % 256 == 0, MOE_ERR_RANGE,
                region_offset);
    MOE_REQUIRE(d->region_offset <= d->peers->bytes &&
                    a->half * 2 <= d->peers->bytes - d->region_offset,
                MOE_ERR_RANGE, region_bytes);
    MOE_REQUIRE(d->channel >= 0 && d->channel < MOE_PEERS_CHANNELS, MOE_ERR_RANGE, channel);
    MOE_REQUIRE(d->tag >= 0 && d->tag < 1 << 24, MOE_ERR_RANGE, tag);
    a->at = d->region_offset;
    a->channel = d->channel;
    a->tag = d->tag;
    for (int i = 0; i < MOE_EP_ALL_REDUCE_ARRAYS; ++i) {
        const moe_ep_all_reduce_array* r = a->array + i;
        const uint64_t bytes = (uint64_t)r->count * (uint64_t)moe_dtype_bytes(r->to_dtype);
        const moe_buffer from = {r->from, r->from == r->to ? 0 : (uint64_t)r->count * 4, 4,
                                 r->count ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_from};
        const moe_buffer to = {r->to, bytes, (uint32_t)moe_dtype_bytes(r->to_dtype),
                               MOE_BUFFER_WRITTEN | (r->count ? MOE_BUFFER_REQUIRED : 0),
                               MOE_FIELD_to};
        MOE_REQUIRE(r->from != r->to || r->to_dtype == MOE_FP32, MOE_ERR_OVERLAP, to);
        list[count++] = from, list[count++] = to;
        if (r->count > most) most = r->count;
    }
    {
        const moe_buffer region = {d->peers->base, d->peers->bytes, 256, MOE_BUFFER_WRITTEN,
                                   MOE_FIELD_region};
        const moe_buffer fault = {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault};
        list[count++] = region, list[count++] = fault;
    }
    MOE_TRY(moe_check_buffers(list, count));
    MOE_TRY(moe_device_query(&device));
    blocks = (most / 4 + MOEI_EP_ALL_REDUCE_THREADS - 1) / MOEI_EP_ALL_REDUCE_THREADS;
    if (blocks > device.sms * 2) blocks = device.sms * 2;
    c = moe_grid(blocks > 1 ? blocks : 1, MOEI_EP_ALL_REDUCE_THREADS, 0, 0);
    c.dependent = 1;
    MOE_TRY(MOE_PREPARE(&p->send, moei_ep_all_reduce_send, c));
    return MOE_PREPARE(&p->sum, moei_ep_all_reduce_sum, c);
}

/* Prepares an all-reduce, which moe_ep_all_reduce_run queues any number of times. Errors: a status
   for each field that is not as documented; region_bytes: the buffers do not fit. */
MOE_HOST moe_status moe_ep_all_reduce_prepare(const moe_ep_all_reduce_desc* desc,
                                              moe_ep_all_reduce_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_ep_all_reduce_prepare(desc, p));
}

/* Queues a prepared all-reduce on `stream`. */
MOE_HOST moe_status moe_ep_all_reduce_run(const moe_ep_all_reduce_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(MOE_RUN(&p->send, p->args, stream));
    return MOE_RUN(&p->sum, p->args, stream);
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_ep_all_reduce(const moe_ep_all_reduce_desc* desc, cudaStream_t stream)
{
    moe_ep_all_reduce_prepared p;
    MOE_TRY(moe_ep_all_reduce_prepare(desc, &p));
    return moe_ep_all_reduce_run(&p, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_ep_all_reduce_preload(void)
{
    MOE_TRY(moe_preload_kernel((const void*)moei_ep_all_reduce_send));
    return moe_preload_kernel((const void*)moei_ep_all_reduce_sum);
}

MOEI_PRELOAD_INCLUDED(ep_all_reduce)

#endif
