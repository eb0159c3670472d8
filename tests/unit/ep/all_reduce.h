/* all_reduce.h: sums over ranks beside plain sums in the same order. */
#ifndef MOE_TESTS_EP_ALL_REDUCE_H
#define MOE_TESTS_EP_ALL_REDUCE_H

#include "moe/ep/all_reduce.cuh"
#include "tests/test_case.h"
#include "tests/test_group.h"
#include "tests/unit/ep/sleep.h"

#define AR_COUNTS                                                                                  \
    {                                                                                              \
        5, 0, 1023, 4096                                                                           \
    }

typedef struct ar_job {
    tgroup g;
    tbuf from[TGROUP_MOST][4], to[TGROUP_MOST][4];
    uint32_t* host[TGROUP_MOST][4];
    moe_ep_all_reduce_desc d[TGROUP_MOST];
} ar_job;

/* Array 2 is of integers, array 3 is rounded to bf16; array 0 is in place. */
static int ar_new(ar_job* j, int W, trand* q)
{
    static const int count[] = AR_COUNTS;
    moe_ep_all_reduce_desc d;
    uint64_t bytes = 0;
    memset(j, 0, sizeof *j);
    memset(&d, 0, sizeof d);
    for (int i = 0; i < 4; ++i) d.array[i].count = count[i];
    d.array[2].integers = 1;
    d.array[3].to_dtype = MOE_BF16;
    d.array[3].accumulate = 1;
    d.region_offset = MOE_PEERS_HEADER + 512;
    d.channel = 10;
    if (!CHECK_STATUS(moe_ep_all_reduce_bytes(&d, &bytes), MOE_OK)) return 0;
    if (!tgroup_new(&j->g, W, d.region_offset + bytes)) return 0;
    for (int r = 0; r < W; ++r) {
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_preload(), MOE_OK);
        j->d[r] = d;
        j->d[r].peers = j->g.peers + r;
        j->d[r].fault = j->g.fault[r];
        for (int i = 0; i < 4; ++i) {
            const int64_t n = count[i];
            j->host[r][i] = (uint32_t*)test_host(n * 4);
            for (int64_t k = 0; k < n; ++k) {
                const float v = trand_normal(q);
                j->host[r][i][k] = (uint32_t)trand_int(q, -1000000000, 1000000000);
                if (i != 2) memcpy(j->host[r][i] + k, &v, 4);
            }
            j->from[r][i] = tbuf_from("from", j->host[r][i], (size_t)n * 4, 0);
            j->to[r][i] = tbuf_new("to", (size_t)(n * (i == 3 ? 2 : 4)), 0);
            j->d[r].array[i].from = j->from[r][i].p;
            j->d[r].array[i].to = i ? j->to[r][i].p : j->from[r][i].p;
        }
    }
    return 1;
}

static void ar_free(ar_job* j)
{
    if (!j->g.W) return;
    tgroup_wait(&j->g);
    for (int r = 0; r < j->g.W; ++r) {
        tgroup_use(&j->g, r);
        for (int i = 0; i < 4; ++i) {
            tbufs_free(TBUFS(&j->from[r][i], &j->to[r][i]));
            free(j->host[r][i]);
        }
    }
    tgroup_free(&j->g);
}

/* Puts the inputs, and 1 into what is added to. */
static void ar_reset(ar_job* j)
{
    uint16_t one[4096];
    for (int k = 0; k < 4096; ++k) one[k] = 0x3f80;
    for (int r = 0; r < j->g.W; ++r) {
        tgroup_use(&j->g, r);
        for (int i = 0; i < 3; ++i) tbuf_poison(&j->to[r][i]);
        tbuf_put(&j->from[r][0], j->host[r][0]);
        tbuf_put(&j->to[r][3], one);
    }
}

static void ar_run(ar_job* j)
{
    for (int r = 0; r < j->g.W; ++r) {
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_ep_all_reduce(&j->d[r], j->g.stream[r]), MOE_OK);
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* Compares every rank's sums with plain ones, in ascending rank. */
static void ar_check(const ar_job* j)
{
    static const int count[] = AR_COUNTS;
    const int W = j->g.W;
    for (int i = 0; i < 4; ++i) {
        const int64_t n = count[i];
        uint32_t* want = (uint32_t*)test_host(n * 4);
        for (int64_t k = 0; k < n; ++k) {
            float sum = 0, v;
            uint32_t whole = 0;
            for (int r = 0; r < W; ++r) {
                memcpy(&v, j->host[r][i] + k, 4);
                sum += i == 2 ? 0 : v;
                whole += j->host[r][i][k];
            }
            if (i == 3) sum = 1.0f + sum, moe_store(want, k, MOE_BF16, sum);
            else if (i == 2) want[k] = whole;
            else memcpy(want + k, &sum, 4);
        }
        for (int r = 0; r < W; ++r) {
            tgroup_use(&j->g, r);
            CHECK(tbuf_holds(i ? &j->to[r][i] : &j->from[r][0], want), "W=%d rank %d array %d", W,
                  r, i);
        }
        free(want);
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* Calls in a row without a host wait, each with other numbers of array 3 and with another rank late;
   the sums of each are kept. */
static void ar_in_a_row(ar_job* j)
{
    enum { CALLS = 12, COUNT = 1000 };
    const int W = j->g.W;
    float* kept[TGROUP_MOST];
    for (int r = 0; r < W; ++r) {
        tgroup_use(&j->g, r);
        CHECK_STATUS(moe_preload_kernel((const void*)ep_sleep), MOE_OK);
        TEST_CUDA(cudaMalloc((void**)&kept[r], CALLS * COUNT * 4));
    }
    for (int n = 0; n < CALLS; ++n)
        for (int r = 0; r < W; ++r) {
            moe_ep_all_reduce_desc d = j->d[r];
            memset(d.array, 0, sizeof d.array);
            d.array[0].from = (const float*)j->from[r][3].p + 256 * (n % 12);
            d.array[0].to = kept[r] + n * COUNT;
            d.array[0].count = COUNT;
            tgroup_use(&j->g, r);
            if (n % W == r) ep_sleep_on(j->g.stream[r], MOE_ON_HOST ? 200000 : 100000);
            CHECK_STATUS(moe_ep_all_reduce(&d, j->g.stream[r]), MOE_OK);
        }
    tgroup_wait(&j->g);
    for (int r = 0; r < W; ++r) {
        float* got = (float*)test_host(CALLS * COUNT * 4);
        int wrong = 0;
        tgroup_use(&j->g, r);
        TEST_CUDA(cudaMemcpy(got, kept[r], CALLS * COUNT * 4, cudaMemcpyDeviceToHost));
        for (int n = 0; n < CALLS; ++n)
            for (int i = 0; i < COUNT; ++i) {
                float sum = 0, v;
                for (int q = 0; q < W; ++q) {
                    memcpy(&v, j->host[q][3] + 256 * (n % 12) + i, 4);
                    sum += v;
                }
                wrong += got[n * COUNT + i] != sum;
            }
        CHECK(!wrong, "W=%d rank %d: %d sums of calls in a row are wrong", W, r, wrong);
        TEST_CUDA(cudaFree(kept[r]));
        free(got);
    }
    TEST_CUDA(cudaSetDevice(0));
}

/* Sums over 1 to 16 ranks, and calls in a row without a host wait. */
static void test_all_reduce(void)
{
    static const int ranks[] = {1, 2, 3, 8, 16};
    static ar_job j;
    trand q = trand_new(800);
    for (int w = 0; w < 5; ++w) {
        if (ar_new(&j, ranks[w], &q)) {
            for (int n = 0; n < 3; ++n) {
                ar_reset(&j);
                ar_run(&j);
                tgroup_wait(&j.g);
                ar_check(&j);
            }
            ar_reset(&j);
            ar_in_a_row(&j);
            tgroup_clean(&j.g, __LINE__);
        }
        ar_free(&j);
    }
}

/* A rank that does not come: the others' sums stay as they were, and their fault names it. */
static void test_all_reduce_late(void)
{
    static ar_job j;
    trand q = trand_new(801);
    if (ar_new(&j, 3, &q)) {
        ar_reset(&j);
        for (int r = 0; r < 3; r += 2) {
            j.g.peers[r].timeout_ns = MOE_ON_HOST ? 300000000 : 20000000;
            tgroup_use(&j.g, r);
            CHECK_STATUS(moe_ep_all_reduce(&j.d[r], j.g.stream[r]), MOE_OK);
        }
        tgroup_wait(&j.g);
        for (int r = 0; r < 3; r += 2) {
            const moe_peers_late late = moe_peers_late_decode(tgroup_fault(&j.g, r));
            tgroup_use(&j.g, r);
            CHECK(late.late == 1 && late.phase == MOE_PHASE_REDUCE, "rank %d: %d, phase %d", r,
                  late.late, late.phase);
            CHECK(tbuf_holds(&j.to[r][2], 0), "rank %d wrote sums", r);
        }
        TEST_CUDA(cudaSetDevice(0));
    }
    ar_free(&j);
}

/* Refusals by name. */
static void test_all_reduce_refusals(void)
{
    static ar_job j;
    trand q = trand_new(802);
    moe_ep_all_reduce_prepared p;
    uint64_t bytes = 0;
    if (!ar_new(&j, 2, &q)) return;
    const moe_ep_all_reduce_desc ok = j.d[0];
    moe_ep_all_reduce_desc d;
#define AR_REFUSED(change, kind, field)                                                            \
    do {                                                                                           \
        d = ok;                                                                                    \
        change;                                                                                    \
        memset((void*)&p, 0xda, sizeof p);                                                         \
        CHECK_STATUS(moe_ep_all_reduce_prepare(&d, &p), MOE_STATUS(kind, field));                  \
        test_empty(&p, sizeof p, __LINE__);                                                        \
    } while (0)
    AR_REFUSED(d.peers = 0, MOE_ERR_NULL, peers);
    AR_REFUSED(d.fault = 0, MOE_ERR_NULL, fault);
    AR_REFUSED(d.array[0].count = -1, MOE_ERR_RANGE, count);
    AR_REFUSED(d.array[1].integers = 2, MOE_ERR_OPTION, integers);
    AR_REFUSED(d.array[1].accumulate = 2, MOE_ERR_OPTION, accumulate);
    AR_REFUSED(d.array[2].to_dtype = MOE_FP32, MOE_ERR_CONFLICT, dtype);
    AR_REFUSED(d.array[3].to_dtype = 9, MOE_ERR_DTYPE, dtype);
    AR_REFUSED(d.array[3].from = 0, MOE_ERR_NULL, from);
    AR_REFUSED(d.array[3].to = 0, MOE_ERR_NULL, to);
    AR_REFUSED(d.array[3].to = (void*)d.array[3].from, MOE_ERR_OVERLAP, to);
    AR_REFUSED(d.array[2].to = (char*)d.array[2].from + 4, MOE_ERR_OVERLAP, to);
    AR_REFUSED(d.region_offset = 256, MOE_ERR_RANGE, region_offset);
    AR_REFUSED(d.region_offset += 256, MOE_ERR_RANGE, region_bytes);
    AR_REFUSED(d.channel = MOE_PEERS_CHANNELS, MOE_ERR_RANGE, channel);
    AR_REFUSED(d.tag = -1, MOE_ERR_RANGE, tag);
#undef AR_REFUSED
    CHECK_STATUS(moe_ep_all_reduce_bytes(0, &bytes), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_ep_all_reduce_run(0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    ar_free(&j);
}

static void ep_all_reduce(void)
{
    RUN(test_all_reduce);
    RUN(test_all_reduce_late);
    RUN(test_all_reduce_refusals);
}

#endif
