/* seams.h: what lets other kernels and devices bring rows of A and take rows of C while a product
   runs: lists of groups, ready counters, done counters.

     test_seams_groups   lists that permute, cut and leave out rows, on every tile and path
     test_seams_flags    counts each row block exactly, and waits for no row block without rows:
                         experts of 0, 1, 63 .. 65, 127 .. 129, 191 .. 193 rows
     test_seams_watched  another kernel reads C while it is stored: no element is counted too early
     test_seams_bad      records the bad entry of a list, and writes nothing
     test_seams_missing  ends by the time limit, or by another kernel's stop fault, where rows do
                         not come, and counts nothing then
     test_seams_late     another kernel brings the rows while the product runs
     test_seams_chain    the done counters of a product are the ready counters of the next, which
                         begins after the first, or before it */
#ifndef MOE_TESTS_GEMM_SEAMS_H
#define MOE_TESTS_GEMM_SEAMS_H

#include "tests/unit/gemm/wgmma.h"

static const int seam_sizes[] = {0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193};

/* What the tests run: paths and tiles, rows of A in order or gathered. */
enum { SEAM_WGMMA, SEAM_WGMMA_GATHER, SEAM_LARGE, SEAM_SMALL, SEAM_FEW, SEAM_ALONG_M, SEAM_KINDS };

/* Returns a case of a kind with all but the sizes drawn; n = 0 where the kind does not run here. */
static gemm_case seam_case(int kind, int E, const int* rows, int n, int k, trand* r)
{
    static const int tile[] = {MOE_TILE_128x256, MOE_TILE_128x256, MOE_TILE_128x128,
                               MOE_TILE_64x64,   MOE_TILE_32x128,  MOE_TILE_64x64};
    gemm_case c = wgmma_case(E, rows, n, k, r);
    c.c_table = 0;
    c.gather = kind == SEAM_WGMMA_GATHER || kind == SEAM_FEW ? (int)trand_int(r, 1, 3) : 0;
    c.tile = tile[kind];
    if (kind > SEAM_WGMMA_GATHER) c.path = MOE_GEMM_PATH_WMMA;
    if (kind == SEAM_ALONG_M) c.a_major = MOE_MAJOR_MN;
    if (kind <= SEAM_WGMMA_GATHER && !wgmma_here()) c.n = 0;
    return c;
}

static void test_seams_groups(void)
{
    trand r = trand_new(51);
    for (int i = 0; i < SEAM_KINDS * (MOE_ON_HOST ? 4 : 24); ++i) {
        static const int ns[] = {8, 120, 128, 136, 264}, most[] = {5, 12, 40};
        int rows[7];
        gemm_case c;
        for (int e = 0; e < 7; ++e) rows[e] = seam_sizes[trand_int(&r, 0, 10)];
        c = seam_case(i % SEAM_KINDS, 7, rows, ns[trand_int(&r, 0, 4)],
                      8 * (int)trand_int(&r, 1, 20), &r);
        c.groups = most[trand_int(&r, 0, 2)];
        c.flags = (int)trand_int(&r, 0, 1);
        c.sampled = MOE_ON_HOST ? 7 : 3;
        if (c.n) run_case(&c, &r);
    }
}

static void test_seams_flags(void)
{
    trand r = trand_new(52);
    for (int i = 0; i < SEAM_KINDS * 4 * (MOE_ON_HOST ? 1 : 6); ++i) {
        const int how = i / SEAM_KINDS;
        int rows[5];
        gemm_case c;
        for (int e = 0; e < 5; ++e) rows[e] = seam_sizes[trand_int(&r, 0, 10)];
        c = seam_case(i % SEAM_KINDS, 5, rows, how & 1 ? 264 : 136, 8 * (int)trand_int(&r, 1, 20),
                      &r);
        c.c_dtype = how & 1 ? MOE_FP32 : c.dtype;
        c.activation = how & 2 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
        c.flags = 1;
        c.sampled = 11;
        if (c.n) run_case(&c, &r);
    }
    for (int i = 0; i < 2 && wgmma_here(); ++i) { /* short and long tiles: boxes, deferred stores */
        static const int rows[] = {300, 0, 129};
        gemm_case c = wgmma_case(3, rows, 520, i ? 584 : 512, &r);
        c.c_table = 0, c.c_dtype = c.dtype, c.flags = 1, c.sampled = 37;
        run_case(&c, &r);
    }
}

/* Makes a stream whose kernels run beside those of others. */
static cudaStream_t seam_stream(void)
{
    cudaStream_t s;
    TEST_CUDA(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    return s;
}

typedef struct watch_args {
    const uint32_t* done;
    const unsigned char* c; /* row 0 of C; poison before the product */
    int32_t* early;         /* [1] 0; gets 1 more each time that less is stored than is counted */
    uint32_t start, all;    /* of the counter; what the product adds */
    int32_t row, rows, n, stride, bytes; /* rows of the row block; bytes of an element */
} watch_args;

/* Reads the counter of a row block, and then how many elements are stored. One warp. */
MOE_KERNEL(32, 1) watch_kernel(MOE_ARG(watch_args) d)
{
    const uint64_t begun = moei_nanoseconds(), most = MOE_ON_HOST ? 100000000 : 2000000000;
    uint32_t counted = 0;
    bool late = false;
    while (counted < d.all && !late) {
        int stored = 0;
        uint32_t mine = 0;
        if (moe_lane() == 0) {
            mine = moei_flag_load(d.done) - d.start;
            late = moei_nanoseconds() - begun > most;
        }
        counted = __shfl_sync(MOE_FULL_WARP, mine, 0);
        late = __shfl_sync(MOE_FULL_WARP, (int)late, 0) != 0;
        for (int i = moe_lane(); i < d.rows * d.n; i += 32) {
            const int64_t at = (int64_t)(d.row + i / d.n) * d.stride + i % d.n;
            stored += *(const volatile uint16_t*)(d.c + (at + 1) * d.bytes - 2) != 0xffda;
        }
        stored = moe_warp_inclusive_scan(stored);
        if (moe_lane() == 31 && stored < (int)counted * 8) atomicAdd(d.early, 1);
        MOE_SPIN();
    }
}

static void test_seams_watched(void)
{
    trand r = trand_new(57);
    const cudaStream_t mine = seam_stream(), other = seam_stream();
#if MOE_ON_HOST
    const uint64_t seed = moeh_get().seed;
#endif
    CHECK_STATUS(moe_preload_kernel((const void*)watch_kernel), MOE_OK);
    CHECK_STATUS(moe_grouped_gemm_preload(), MOE_OK);
    for (int i = 0; i < SEAM_ALONG_M * (MOE_ON_HOST ? 12 : 100); ++i) {
        const int rows[] = {(int)trand_int(&r, 1, 140), (int)trand_int(&r, 1, 140)};
        gemm_case c = seam_case(i % SEAM_ALONG_M, 2, rows, i & 1 ? 264 : 136, i % 3 ? 8 : 328, &r);
        watch_args a = {};
        const moe_launch_config l = moe_grid(1, 32, 0, other);
        const int32_t zero = 0;
        gemm_bufs b;
        tbuf early = tbuf_from("early", &zero, 4, 0);
        int block;
        if (!c.n) continue;
        c.flags = 1, c.fill = TFILL_NORMAL, c.lead = c.slack = 0, c.sampled = 11;
        bufs_new(&b, &c, &r);
        block = (int)trand_int(&r, 0, row_blocks(&b) - 1);
        b.d.grid_limit = 2; /* leaves room for the other kernel */
        a.done = (const uint32_t*)b.done.p + block;
        a.c = (const unsigned char*)b.d.c;
        a.early = (int32_t*)early.p;
        a.start = b.h_done[block];
        a.row = block * MOE_GEMM_ROW_BLOCK, a.rows = rows_of_block(&b, block);
        a.n = c.n, a.stride = c.n + c.c_pad, a.bytes = moe_dtype_bytes(c.c_dtype);
        a.all = (uint32_t)(a.rows * (c.n / 8));
        TEST_CUDA(cudaDeviceSynchronize());
#if MOE_ON_HOST
        moeh_set_seed((uint64_t)i + 1); /* orders in which the kernels take turns */
#endif
        CHECK_STATUS(MOE_LAUNCH(watch_kernel, l, a), MOE_OK);
        CHECK_STATUS(moe_grouped_gemm(&b.d, mine), MOE_OK);
        CHECK(tbuf_holds(&early, &zero), "elements were counted before they were stored");
        compare(&b, &c);
        tbufs_free(TBUFS(&early));
        bufs_free(&b);
    }
#if MOE_ON_HOST
    moeh_set_seed(seed);
#endif
    TEST_CUDA(cudaStreamDestroy(mine));
    TEST_CUDA(cudaStreamDestroy(other));
}

static void test_seams_bad(void)
{
    static const int rows[] = {10, 20, 30};
    trand r = trand_new(53);
    for (int how = 0; how < 6; ++how)
        for (int i = 0; i < 2; ++i) {
            gemm_case c = normal_case(3, rows, 72, 40);
            gemm_bufs b;
            moe_gemm_group list[200];
            const int bad = how * 37; /* the entry */
            c.tile = fault_tiles[i];
            if (test_gemm_status(c.dtype, c.tile) != MOE_OK) continue;
            c.flags = 1;
            bufs_new(&b, &c, &r);
            for (int g = 0; g < 200; ++g) list[g] = moe_gemm_group{g % 3, g % 60, g % 60};
            list[7] = moe_gemm_group{1, 0, 60};
            list[bad] = how == 0   ? moe_gemm_group{3, 5, 9}
                        : how == 1 ? moe_gemm_group{-1, 5, 5}
                        : how == 2 ? moe_gemm_group{0, -1, 4}
                        : how == 3 ? moe_gemm_group{2, 9, 8}
                        : how == 4 ? moe_gemm_group{2, 50, 61}
                                   : moe_gemm_group{INT32_MAX, INT32_MIN, INT32_MAX};
            b.group = tbuf_from("group", list, sizeof list, 0);
            b.d.expert_offset = 0;
            b.d.group = (const moe_gemm_group*)b.group.p, b.d.num_groups = 200;
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            CHECK(tgrouped_untouched(&b.c) && tbuf_holds(&b.done, b.h_done), "how=%d", how);
            CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, bad);
            bufs_free(&b);
        }
    { /* groups that overlap: more tiles than can be counted; no buffer but the list is read */
        static moe_gemm_group all[MOE_MAX_EXPERTS];
        moe_grouped_gemm_desc d = {};
        tbuf fault = tfault_new(0), group;
        for (int g = 0; g < MOE_MAX_EXPERTS; ++g) all[g] = moe_gemm_group{0, 0, 1 << 20};
        group = tbuf_from("group", all, sizeof all, 0);
        d.a = TEST_FAR, d.b.base = TEST_FAR + ((int64_t)1 << 36);
        d.c = TEST_FAR + ((int64_t)1 << 37);
        d.num_experts = 1, d.num_rows = 1 << 20, d.n = 2056, d.k = 8;
        d.group = (const moe_gemm_group*)group.p, d.num_groups = MOE_MAX_EXPERTS;
        d.dtype = test_half(), d.tile = MOE_TILE_64x64;
        d.fault = (uint64_t*)fault.p, d.rank = TEST_RANK;
        CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_OK);
        CHECK_FAULT(&fault, MOE_FAULT_BAD_OFFSET, MOE_MAX_EXPERTS);
        tbufs_free(TBUFS(&fault, &group));
    }
}

static void test_seams_missing(void)
{
    static const int rows[] = {100, 300};
    trand r = trand_new(54);
    const cudaStream_t other = seam_stream();
    CHECK_STATUS(moe_preload_kernel((const void*)raise_kernel), MOE_OK);
    for (int i = 0; i < SEAM_KINDS * 3; ++i) {
        gemm_case c = seam_case(i % SEAM_KINDS, 2, rows, 136, 72, &r);
        const int how = i / SEAM_KINDS;
        uint32_t done[4];
        uint64_t word;
        gemm_bufs b;
        if (!c.n) continue;
        c.lead = c.slack = 0, c.flags = 1;
        bufs_new(&b, &c, &r);
        b.h_ready[1] = b.d.ready_value - 1;
        tbuf_put(&b.ready, b.h_ready);
        b.d.grid_limit = 2; /* leaves room for the other kernel */
        if (how == 1) b.d.fault = 0;
        if (how == 2) { /* another kernel ends the wait */
            const raise_args a = {(uint64_t*)b.fault.p, MOE_ON_HOST ? 300 : 20000};
            const moe_launch_config l = moe_grid(1, 32, 0, other);
            b.d.ready_timeout_ms = 0;
            TEST_CUDA(cudaDeviceSynchronize());
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            CHECK_STATUS(MOE_LAUNCH(raise_kernel, l, a), MOE_OK);
            CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 1);
        } else {
            b.d.ready_timeout_ms = 1;
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        }
        word = tfault_word(&b.fault);
        if (how == 0) {
            const moe_fault f = moe_fault_decode(word);
            CHECK(f.code == MOE_FAULT_NOT_READY && f.rank == TEST_RANK && f.index / 128 == 1,
                  "got \"%s\" at %lld", moe_fault_text(f.code), (long long)f.index);
        }
        tbuf_get(&b.done, done);
        CHECK(how == 1 ? word == 0 : done[1] == b.h_done[1],
              "kind %d: rows that did not come were counted", i % SEAM_KINDS);
        bufs_free(&b);
    }
    TEST_CUDA(cudaStreamDestroy(other));
}

typedef struct bring_args {
    char* a;              /* rows of A, row_bytes each, written */
    const char* from;     /* the same rows */
    const int32_t* index; /* [num_rows] row of A of each row of C; -1: none */
    uint32_t* ready;      /* [row blocks] gets 1 more */
    int32_t num_rows, row_bytes, delay, backward;
} bring_args;

/* Brings the rows of A of one row block of C after another. */
MOE_KERNEL(128, 1) bring_kernel(MOE_ARG(bring_args) d)
{
    const int blocks = (d.num_rows + MOE_GEMM_ROW_BLOCK - 1) / MOE_GEMM_ROW_BLOCK;
    for (int i = 0; i < blocks; ++i) {
        const int block = d.backward ? blocks - 1 - i : i, first = block * MOE_GEMM_ROW_BLOCK;
        const uint64_t begun = moei_nanoseconds();
        while (moei_nanoseconds() - begun < (uint64_t)d.delay * 1000) MOE_SPIN();
        for (int m = first; m < first + MOE_GEMM_ROW_BLOCK && m < d.num_rows; ++m)
            for (int j = (int)threadIdx.x * 2; j < d.row_bytes && d.index[m] >= 0; j += 256) {
                const int64_t at = (int64_t)d.index[m] * d.row_bytes + j;
                *(volatile uint16_t*)(d.a + at) = *(const uint16_t*)(d.from + at);
            }
        __syncthreads();
        if (threadIdx.x == 0) moei_flag_add(d.ready + block, 1);
    }
}

static void test_seams_late(void)
{
    static const int rows[] = {100, 0, 257, 65};
    trand r = trand_new(55);
    const cudaStream_t mine = seam_stream(), other = seam_stream();
    CHECK_STATUS(moe_preload_kernel((const void*)bring_kernel), MOE_OK);
    CHECK_STATUS(moe_grouped_gemm_preload(), MOE_OK);
    for (int i = 0; i < SEAM_ALONG_M * 2 * (MOE_ON_HOST ? 1 : 6); ++i) {
        gemm_case c = seam_case(i % SEAM_ALONG_M, 4, rows, 136, 72, &r);
        const int from_end = i / SEAM_ALONG_M & 1;
        bring_args a = {};
        const moe_launch_config l = moe_grid(1, 128, 0, other);
        gemm_bufs b;
        int32_t* at;
        tbuf from, index;
        void* host;
        if (!c.n) continue;
        c.flags = 1, c.sampled = MOE_ON_HOST ? 5 : 1;
        c.a_pad = 0, c.a_rows = c.gather ? 200 : 0;
        c.groups = from_end ? 12 : 0;
        bufs_new(&b, &c, &r);
        at = (int32_t*)test_host(b.num_rows * 4);
        for (int m = 0; m < b.num_rows; ++m)
            at[m] = has_row(&b, m) ? (int32_t)a_row_of(&b, &c, m) : -1;
        index = tbuf_from("row of A", at, (size_t)b.num_rows * 4, 0);
        host = tbuf_copy(&b.a);
        from = tbuf_from("from", host, b.a.bytes, 0);
        tbuf_poison(&b.a);
        for (int j = 0; j < row_blocks(&b); ++j) b.h_ready[j] = b.d.ready_value - 1;
        tbuf_put(&b.ready, b.h_ready);
        b.d.grid_limit = 2; /* leaves room for the other kernel */
        b.d.ready_timeout_ms = 5000;
        a.a = (char*)b.a.p, a.from = (const char*)from.p, a.index = (const int32_t*)index.p;
        a.ready = (uint32_t*)b.ready.p;
        a.num_rows = b.num_rows, a.row_bytes = c.k * 2, a.backward = from_end;
        a.delay = MOE_ON_HOST ? 300 : 20;
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK_STATUS(moe_grouped_gemm(&b.d, mine), MOE_OK);
        CHECK_STATUS(MOE_LAUNCH(bring_kernel, l, a), MOE_OK);
        for (int j = 0; j < row_blocks(&b); ++j) ++b.h_ready[j];
        compare(&b, &c);
        TFREE(at, host);
        tbufs_free(TBUFS(&from, &index));
        bufs_free(&b);
    }
    TEST_CUDA(cudaStreamDestroy(mine));
    TEST_CUDA(cudaStreamDestroy(other));
}

static void test_seams_chain(void)
{
    static const int rows[] = {65, 200, 1, 128};
    trand r = trand_new(56);
    const cudaStream_t stream[] = {seam_stream(), seam_stream()};
    CHECK_STATUS(moe_grouped_gemm_preload(), MOE_OK);
    for (int i = 0; i < SEAM_ALONG_M * 2 * (MOE_ON_HOST ? 1 : 20); ++i) {
        const int kind = i % SEAM_ALONG_M, before = i / SEAM_ALONG_M & 1;
        gemm_case up = seam_case(kind, 4, rows, 136, 72, &r);
        gemm_case down = seam_case(kind, 4, rows, 72, 136, &r);
        gemm_bufs b, to;
        if (!up.n) continue;
        up.dtype = up.c_dtype = down.dtype;
        up.c_pad = up.lead = up.slack = down.lead = down.slack = down.gather = 0;
        up.fill = down.fill = TFILL_NORMAL;
        if (kind == SEAM_WGMMA_GATHER) down.gather = 1;
        up.flags = down.flags = 1, up.sampled = down.sampled = 7;
        bufs_new(&b, &up, &r);
        bufs_new(&to, &down, &r);
        for (int m = 0; m < to.num_rows; ++m) to.h_index[m] = m;
        tbuf_put(&to.index, to.h_index);
        for (int j = 0; j < row_blocks(&b); ++j)
            b.h_done[j] = (uint32_t)((128 - rows_of_block(&b, j)) * (up.n / 8));
        tbuf_put(&b.done, b.h_done);
        to.d.a = b.d.c, to.d.a_stride = 0;
        to.d.ready = b.d.done, to.d.ready_value = 128 * 136 / 8;
        b.d.grid_limit = to.d.grid_limit = before ? 2 : 0; /* both run at one time */
        to.d.ready_timeout_ms = before ? 5000 : 1;
        TEST_CUDA(cudaDeviceSynchronize());
        if (before) CHECK_STATUS(moe_grouped_gemm(&to.d, stream[1]), MOE_OK);
        CHECK_STATUS(moe_grouped_gemm(&b.d, stream[0]), MOE_OK);
        if (!before) CHECK_STATUS(moe_grouped_gemm(&to.d, stream[0]), MOE_OK);
        compare(&b, &up);
        free(to.h_a);
        to.h_a = tbuf_copy(&b.c.all);
        compare(&to, &down);
        bufs_free(&b);
        bufs_free(&to);
    }
    for (int i = 0; i < 2; ++i) TEST_CUDA(cudaStreamDestroy(stream[i]));
}

static void gemm_seams(void)
{
    RUN(test_seams_groups);
    RUN(test_seams_flags);
    RUN(test_seams_watched);
    RUN(test_seams_bad);
    RUN(test_seams_missing);
    RUN(test_seams_late);
    RUN(test_seams_chain);
}

#endif
