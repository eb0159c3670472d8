/* test_permute.cu: moe/permute.cuh against its reference, with maps of its own and with those of
   moe/route.cuh.

     nvcc -I. -arch=sm_90a tests/unit/test_permute.cu -o test_permute
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_permute.cu -o test_permute

   test_permute_shapes        rows of all lengths, vectors of every width
   test_permute_wide_tokens   many rows a token
   test_permute_empty         no tokens; no rows
   test_permute_foreign_maps  maps that contradict each other: in bounds, and a fault
   test_permute_refusals      every field, with its status
   test_permute_same_bits     the same bits over runs
   test_permute_graph         a captured call replayed with other maps
   test_permute_after_route   the maps of route, with all its options
   test_permute_wide_offsets  rows past 2^32 elements
   test_permute_large         large shapes, on a GPU */
#include "tests/test.h"
#include "tests/test_refusals.h"

#include "moe/permute.cuh"
#include "moe/ref/permute.h"
#include "moe/route.cuh"

typedef struct permute_case {
    int T, K, H, dtype;
    int back;           /* 1: unpermute */
    int by_token;       /* 1: permute is given slot_row */
    int bad;            /* 1: some entries are out of range */
    int pad;            /* rows without a slot, at the end and in between */
    int x_pad, y_pad;   /* elements between the rows */
    int x_off, y_off;   /* elements by which the first row is off a multiple of 256 bytes */
} permute_case;

typedef struct permute_bufs {
    int64_t slots, rows, x_rows, y_rows;
    int elem;
    int32_t *row_slot, *slot_row; /* host */
    char* x;
    tbuf bx, by, brow, bslot, fault;
    moe_permute_desc d;
} permute_bufs;

/* Maps that fit to each other: the slots in a random order among the rows, some of them dropped. */
static void fill_maps(permute_bufs* b, const permute_case* c, trand* r)
{
    int64_t* order = (int64_t*)test_host(b->rows * 8);
    int64_t used = 0;
    const int dropped = (int)trand_int(r, 0, 2) * 20; /* percent */
    for (int64_t i = 0; i < b->rows; ++i) {
        const int64_t j = trand_int(r, 0, i);
        order[i] = order[j];
        order[j] = i;
        b->row_slot[i] = -1;
    }
    for (int64_t s = 0; s < b->slots; ++s) {
        b->slot_row[s] = -1;
        if (trand_int(r, 0, 99) < dropped || used == b->rows) continue;
        b->slot_row[s] = (int32_t)order[used++];
        b->row_slot[b->slot_row[s]] = (int32_t)s;
    }
    free(order);
    if (!c->bad) return;
    for (int n = 0; n < 3; ++n) {
        const int32_t bad[] = {-2, INT32_MIN, INT32_MAX, (int32_t)b->rows, (int32_t)b->slots};
        if (c->back && b->slots)
            b->slot_row[trand_int(r, 0, b->slots - 1)] = bad[trand_int(r, 0, 3)];
        if (!c->back && b->rows) {
            const int64_t row = trand_int(r, 0, b->rows - 1);
            const int32_t slot = b->row_slot[row];
            if (slot >= 0 && slot < b->slots) b->slot_row[slot] = -1;
            b->row_slot[row] = bad[n ? trand_int(r, 0, 2) : 4];
        }
    }
}

static void bufs_new(permute_bufs* b, const permute_case* c, trand* r)
{
    int64_t x_stride, y_stride;
    memset(b, 0, sizeof *b);
    b->elem = moe_dtype_bytes(c->dtype);
    b->slots = (int64_t)c->T * c->K;
    b->rows = b->slots + c->pad;
    b->x_rows = c->back ? b->rows : c->T;
    b->y_rows = c->back ? b->slots : b->rows;
    b->row_slot = (int32_t*)test_host(b->rows * 4);
    b->slot_row = (int32_t*)test_host(b->slots * 4);
    fill_maps(b, c, r);
    x_stride = c->H + c->x_pad;
    y_stride = c->H + c->y_pad;
    b->x = (char*)test_host(b->x_rows * x_stride * b->elem);
    for (int64_t i = 0; i < b->x_rows * x_stride * b->elem; ++i) /* any bits, but no zeros */
        b->x[i] = (char)trand_int(r, 1, 255);
    b->bx = tbuf_from("x", b->x, (size_t)(b->x_rows * x_stride * b->elem),
                      (size_t)(c->x_off * b->elem));
    b->by = tbuf_new("y", (size_t)(b->y_rows * y_stride * b->elem), (size_t)(c->y_off * b->elem));
    b->brow = tbuf_from("row_slot", b->row_slot, (size_t)b->rows * 4, 4);
    b->bslot = tbuf_from("slot_row", b->slot_row, (size_t)b->slots * 4, 4);
    b->fault = tfault_new(0);
    b->d.x = b->bx.p;
    b->d.y = b->by.p;
    if (!c->back) b->d.row_slot = (const int32_t*)b->brow.p;
    if (c->back || c->by_token) b->d.slot_row = (const int32_t*)b->bslot.p;
    b->d.x_stride = c->x_pad ? x_stride : 0;
    b->d.y_stride = c->y_pad ? y_stride : 0;
    b->d.dtype = c->dtype;
    b->d.fault = (uint64_t*)b->fault.p;
    b->d.rank = TEST_RANK;
    b->d.num_tokens = c->T;
    b->d.top_k = c->K;
    b->d.hidden = c->H;
    b->d.num_rows = b->rows;
}

static void bufs_free(permute_bufs* b)
{
    tbuf_free(&b->bx);
    tbuf_free(&b->by);
    tbuf_free(&b->brow);
    tbuf_free(&b->bslot);
    tbuf_free(&b->fault);
    free(b->row_slot);
    free(b->slot_row);
    free(b->x);
}

/* All bytes of y, those between the rows included, and the fault. */
static void compare(const permute_bufs* b, const permute_case* c)
{
    const int64_t row = (int64_t)c->H * b->elem, pitch = (int64_t)(c->H + c->y_pad) * b->elem;
    unsigned char* want = (unsigned char*)test_host((int64_t)b->by.bytes);
    unsigned char* got = (unsigned char*)tbuf_copy(&b->by);
    const int before = test_now.failures;
    int64_t bad_rows = 0, first = 0, bad;
    moe_ref_permute_desc r;
    memset(&r, 0, sizeof r);
    r.x = b->x;
    r.index = c->back ? b->slot_row : b->row_slot;
    r.y = want;
    r.count = b->y_rows;
    r.limit = c->back ? b->rows : b->slots;
    r.div = c->back ? 1 : c->K;
    r.row_bytes = row;
    r.x_bytes = (int64_t)(c->H + c->x_pad) * b->elem;
    r.y_bytes = pitch;
    bad = moe_ref_permute(&r);
    for (int64_t i = 0; i < b->y_rows; ++i)
        if (memcmp(got + i * pitch, want + i * pitch, (size_t)pitch) != 0 && bad_rows++ == 0)
            first = i;
    CHECK(bad_rows == 0, "%lld of %lld rows differ, the first is %lld", (long long)bad_rows,
          (long long)b->y_rows, (long long)first);
    CHECK_FAULT(&b->fault, bad < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_ROW, bad < 0 ? 0 : bad);
    CHECK(tbuf_holds(&b->bx, b->x) && tbuf_holds(&b->brow, b->row_slot) &&
              tbuf_holds(&b->bslot, b->slot_row),
          "an input was written");
    if (test_now.failures > before)
        printf("  in: T=%d K=%d H=%d dtype=%d back=%d by_token=%d bad=%d pad=%d strides +%d +%d "
               "offsets %d %d\n",
               c->T, c->K, c->H, c->dtype, c->back, c->by_token, c->bad, c->pad, c->x_pad,
               c->y_pad, c->x_off, c->y_off);
    free(want);
    free(got);
}

TEST_CALL(call_permute, moe_permute, moe_permute_desc)

TEST_CALL(call_unpermute, moe_unpermute, moe_permute_desc)

static void run_case(const permute_case* c, trand* r)
{
    permute_bufs b;
    bufs_new(&b, c, r);
    CHECK_STATUS((c->back ? call_unpermute : call_permute)(&b.d, test_now.stream), MOE_OK);
    compare(&b, c);
    bufs_free(&b);
}

static permute_case random_case(trand* r, int T, int K, int H)
{
    permute_case c;
    c.T = T;
    c.K = K;
    c.H = H;
    c.dtype = (int)trand_int(r, MOE_FP32, MOE_BF16);
    c.back = (int)trand_int(r, 0, 2) == 0;
    c.by_token = (int)trand_int(r, 0, 1);
    c.bad = trand_int(r, 0, 3) == 0;
    c.pad = (int)(trand_int(r, 0, 1) ? trand_int(r, 0, T + 3) : 0);
    c.x_pad = c.y_pad = c.x_off = c.y_off = 0;
    if (trand_int(r, 0, 1)) c.x_pad = (int)trand_int(r, 0, 9);
    if (trand_int(r, 0, 1)) c.y_pad = (int)trand_int(r, 0, 9);
    if (trand_int(r, 0, 1)) c.x_off = (int)trand_int(r, 0, 8);
    if (trand_int(r, 0, 1)) c.y_off = (int)trand_int(r, 0, 8);
    return c;
}

/* Rows of all lengths: less than a vector, several rows in a block, one, several columns; each with
   vectors of every width. */
static void test_permute_shapes(void)
{
    static const int Hs[] = {1,   2,   3,   4,    5,    7,    8,    9,    16,   24,   31,
                             32,  40,  64,  100,  120,  128,  250,  256,  257,  520,  768,
                             1000, 1024, 1032, 1536, 2048, 2056, 2999, 4096, 4104, 6000};
    static const int Ts[] = {1, 2, 3, 4, 5, 17, 64};
    static const int Ks[] = {1, 2, 3, 4, 8, 9};
    trand r = trand_new(1);
    for (size_t i = 0; i < sizeof Hs / sizeof *Hs; ++i)
        for (int n = 0; n < (Hs[i] > 512 ? 4 : 8); ++n) {
            const int T = Ts[trand_int(&r, 0, Hs[i] > 512 ? 5 : 6)];
            permute_case c = random_case(&r, T, Ks[trand_int(&r, 0, 5)], Hs[i]);
            if (n % 4 == 0) c.x_pad = c.y_pad = c.x_off = c.y_off = 0; /* the widest */
            run_case(&c, &r);
        }
}

/* Many rows of a token, more than are looked up at once, and K of one. */
static void test_permute_wide_tokens(void)
{
    static const int TKH[][3] = {{3, 100, 8}, {2, 3000, 4}, {1, 4096, 1}, {5, 33, 300}, {300, 1, 8},
                                 {1, 600, 2056}};
    trand r = trand_new(2);
    for (size_t i = 0; i < sizeof TKH / sizeof *TKH; ++i)
        for (int n = 0; n < 3; ++n) {
            permute_case c = random_case(&r, TKH[i][0], TKH[i][1], TKH[i][2]);
            c.back = n == 2;
            c.by_token = n == 0;
            run_case(&c, &r);
        }
}

/* No tokens: permute writes zeros; no rows: unpermute does, and a slot with a row is a fault. */
static void test_permute_empty(void)
{
    trand r = trand_new(3);
    for (int n = 0; n < 8; ++n) {
        permute_case c = random_case(&r, 0, 4, 40);
        permute_bufs b;
        c.bad = 0;
        c.pad = n < 4 ? 9 : 0;
        c.back = 0;
        run_case(&c, &r);
        c.back = 1;
        run_case(&c, &r);
        c.T = 6;
        c.pad = -24; /* no rows */
        bufs_new(&b, &c, &r);
        for (int64_t s = 0; s < b.slots; ++s) b.slot_row[s] = -1;
        if (n & 1) b.slot_row[n] = n - 1;
        tbuf_put(&b.bslot, b.slot_row);
        CHECK_STATUS(moe_unpermute(&b.d, test_now.stream), MOE_OK);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* Maps that contradict each other: in bounds, every row written once, and the fault says so. */
static void test_permute_foreign_maps(void)
{
    trand r = trand_new(4);
    for (int n = 0; n < 20; ++n) {
        permute_case c = random_case(&r, (int)trand_int(&r, 2, 40), 4, (int)trand_int(&r, 1, 80));
        permute_bufs b;
        unsigned char* got;
        int64_t first = -1;
        c.back = c.bad = 0;
        c.by_token = 1;
        c.y_pad = 0;
        bufs_new(&b, &c, &r);
        for (int i = 0; i < 5; ++i) {
            const int32_t any[] = {(int32_t)trand_int(&r, 0, b.rows - 1), -1, -2, INT32_MAX,
                                   (int32_t)b.rows};
            b.slot_row[trand_int(&r, 0, b.slots - 1)] = any[trand_int(&r, 0, 4)];
        }
        tbuf_put(&b.bslot, b.slot_row);
        CHECK_STATUS(moe_permute(&b.d, test_now.stream), MOE_OK);
        got = (unsigned char*)tbuf_copy(&b.by);
        for (int64_t i = 0; i < b.rows; ++i) { /* a row whose slot is mapped elsewhere is zeros */
            const int64_t row = (int64_t)c.H * b.elem;
            const int32_t s = b.row_slot[i];
            const char* from = b.x + s / c.K * (int64_t)(c.H + c.x_pad) * b.elem;
            const int fits = s >= 0 && b.slot_row[s] == (int32_t)i;
            int64_t zeros = 0;
            for (int64_t j = 0; j < row; ++j) zeros += got[i * row + j] == 0;
            CHECK(fits ? memcmp(got + i * row, from, (size_t)row) == 0 : zeros == row, "row %lld",
                  (long long)i);
            if (s >= 0 && !fits && first < 0) first = i;
        }
        for (int64_t s = 0; s < b.slots; ++s) {
            const int32_t row = b.slot_row[s];
            const int in = row >= 0 && row < b.rows;
            if (row == -1 || (in && b.row_slot[row] == (int32_t)s)) continue;
            if (first < 0 || (in ? row : s) < first) first = in ? row : s;
        }
        CHECK_FAULT(&b.fault, first < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_ROW,
                    first < 0 ? 0 : first);
        free(got);
        bufs_free(&b);
    }
}

TEST_REFUSED(permute_refuses, moe_permute, moe_permute_prepare, moe_permute)
TEST_REFUSED(unpermute_refuses, moe_unpermute, moe_unpermute_prepare, moe_permute)

/* Every field, wrong in every way: its own status, and nothing is written. */
static void test_permute_refusals(void)
{
    trand r = trand_new(5);
    permute_case c = random_case(&r, 10, 4, 24);
    c.bad = c.pad = c.x_pad = c.y_pad = c.x_off = c.y_off = 0;
    c.dtype = MOE_FP32;
    for (c.back = 0; c.back < 2; ++c.back) {
        permute_bufs b;
        moe_permute_desc good, d;
        const test_call call = c.back ? call_unpermute : call_permute;
        void (*const refused)(const moe_permute_desc*, moe_status, const trefusal*) =
            c.back ? unpermute_refuses : permute_refuses;
        c.by_token = 1;
        bufs_new(&b, &c, &r);
        good = b.d;
        CHECK_STATUS(call(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
        REFUSED_EACH(num_tokens, MOE_ERR_RANGE, num_tokens, -1, 1 << 29);
        REFUSED_EACH(top_k, MOE_ERR_RANGE, top_k, 0, MOE_MAX_EXPERTS + 1);
        REFUSED_EACH(hidden, MOE_ERR_RANGE, hidden, 0, (1 << 28) + 1);
        REFUSED_EACH(num_rows, MOE_ERR_RANGE, num_rows, -1, (int64_t)1 << 31);
        REFUSED_EACH(dtype, MOE_ERR_DTYPE, dtype, 4, -1);
        REFUSED_EACH(x_stride, MOE_ERR_STRIDE, x_stride, 23, (int64_t)1 << 60);
        REFUSED_EACH(y_stride, MOE_ERR_STRIDE, y_stride, 23, -24);
        REFUSED(d.x = 0, MOE_ERR_NULL, x);
        REFUSED(d.y = 0, MOE_ERR_NULL, y);
        if (c.back) {
            REFUSED(d.slot_row = 0, MOE_ERR_NULL, slot_row);
            REFUSED(d.row_slot = (int32_t*)1, MOE_ERR_ALIGN, row_slot); /* though it is not read */
        } else {
            REFUSED(d.row_slot = 0, MOE_ERR_NULL, row_slot);
            REFUSED(d.row_slot = (int32_t*)AT(d.row_slot, 2), MOE_ERR_ALIGN, row_slot);
            REFUSED(d.y = (void*)d.row_slot, MOE_ERR_OVERLAP, y);
        }
        REFUSED(d.x = AT(d.x, 2), MOE_ERR_ALIGN, x);
        REFUSED(d.y = AT(d.y, 1), MOE_ERR_ALIGN, y);
        REFUSED(d.slot_row = (int32_t*)AT(d.slot_row, 1), MOE_ERR_ALIGN, slot_row);
        REFUSED_RANK_AND_FAULT();
        REFUSED(d.y = (void*)d.x, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.x, b.bx.bytes - 4), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.slot_row, MOE_ERR_OVERLAP, y);
        REFUSED(d.fault = (uint64_t*)d.y, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.x, MOE_ERR_OVERLAP, fault);
        REFUSED(d.slot_row = (int32_t*)d.fault, MOE_ERR_OVERLAP, fault);
        REFUSED((d.num_tokens = 0, d.num_rows = 0, d.fault = (uint64_t*)AT(d.fault, 4)),
                MOE_ERR_ALIGN, fault);
        { /* rows further apart than H: another buffer in the last of them */
            tbuf big = tbuf_new("big", 44 * 32 * 4, 0);
            char *p = (char*)big.p, *end_x = p + ((b.x_rows - 1) * 32 + 24) * 4,
                 *end_y = p + ((b.y_rows - 1) * 32 + 24) * 4;
            REFUSED((d.x = p, d.x_stride = 32, d.y = end_x - 4), MOE_ERR_OVERLAP, y);
            REFUSED((d.x = p, d.x_stride = 32, d.fault = (uint64_t*)(end_x - 8)), MOE_ERR_OVERLAP,
                    fault);
            REFUSED((d.y = p, d.y_stride = 32, d.x = end_y - 4), MOE_ERR_OVERLAP, y);
            REFUSED((d.y = p, d.y_stride = 32, d.fault = (uint64_t*)(end_y - 8)), MOE_ERR_OVERLAP,
                    fault);
            REFUSED((d.y = p, d.y_stride = 32, d.slot_row = (int32_t*)(end_y - 4)), MOE_ERR_OVERLAP,
                    y);
            if (!c.back)
                REFUSED((d.y = p, d.y_stride = 32, d.row_slot = (int32_t*)(end_y - 4)),
                        MOE_ERR_OVERLAP, y);
            CHECK(tbuf_holds(&big, 0), "a refused call wrote something");
            tbuf_free(&big);
        }
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK(tbuf_holds(&b.by, 0), "a refused call wrote something");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        { /* a stop fault stops it */
            const uint64_t word = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 1), none = 0;
            tbuf_put(&b.fault, &word);
            CHECK_STATUS(call(&good, test_now.stream), MOE_OK);
            CHECK(tbuf_holds(&b.by, 0), "it ran on after a stop fault");
            CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 1);
            tbuf_put(&b.fault, &none);
        }
        CHECK_STATUS(call(&good, test_now.stream), MOE_OK);
        compare(&b, &c);
        bufs_free(&b);
    }
}

static void test_permute_same_bits(void)
{
    trand r = trand_new(6);
    for (int n = 0; n < 3; ++n) {
        permute_case c = random_case(&r, 50, 8, 264);
        permute_bufs b;
        c.back = n == 2;
        c.by_token = n;
        bufs_new(&b, &c, &r);
        test_same_bits("permute", c.back ? call_unpermute : call_permute, &b.d, TBUFS(&b.by),
                       MOE_ON_HOST ? 4 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* A captured call, launched again with other maps. */
static void test_permute_graph(void)
{
    trand r = trand_new(7);
    for (int n = 0; n < 3; ++n) {
        permute_case c = random_case(&r, 40, 6, 100);
        const uint64_t no_fault = 0;
        permute_bufs b;
        tgraph g;
        c.back = n == 2;
        c.by_token = n;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_permute_preload(), MOE_OK);
        if (tgraph_capture(&g, c.back ? call_unpermute : call_permute, &b.d)) {
            CHECK(tbuf_holds(&b.by, 0), "capture itself runs nothing");
            for (int run = 0; run < 4; ++run) {
                fill_maps(&b, &c, &r);
                tbuf_put(&b.brow, b.row_slot);
                tbuf_put(&b.bslot, b.slot_row);
                tbuf_put(&b.fault, &no_fault);
                tbuf_poison(&b.by);
                tgraph_launch(&g);
                compare(&b, &c);
            }
            tgraph_free(&g);
        }
        bufs_free(&b);
    }
}

/* Route with all its options, permute with and without slot_row, unpermute: each slot that kept a
   row has its token again, the others zeros. */
static void test_permute_after_route(void)
{
    enum { T = 70, E = 9, K = 4, H = 72 };
    trand r = trand_new(8);
    for (int n = 0; n < 6; ++n) {
        int32_t ids[T * K], slot_row[T * K];
        float weights[T * K];
        uint16_t x[T * H], back[T * K * H];
        tbuf bids, bw, bx, brow, bslot, bcount, boffset, bspace, by, by2, bback, fault;
        moe_route_desc d;
        moe_permute_desc p;
        int64_t rows = 0;
        size_t bytes = 0;
        int64_t dropped = 0;
        memset(&d, 0, sizeof d);
        memset(&p, 0, sizeof p);
        for (int i = 0; i < T * K; ++i) ids[i] = (int32_t)trand_int(&r, -1, E - 1);
        trand_fill_normal(&r, weights, T * K, MOE_FP32);
        for (int i = 0; i < T * H; ++i) x[i] = (uint16_t)trand_int(&r, 1, 65535);
        d.num_tokens = T, d.num_experts = E, d.top_k = K;
        d.row_multiple = n % 2 ? 16 : 0;
        d.drop_rule = n / 2;
        d.capacity = n / 2 ? 30 : 0;
        CHECK_STATUS(moe_route_max_rows(&d, &rows), MOE_OK);
        CHECK_STATUS(moe_route_workspace(&d, &bytes), MOE_OK);
        bids = tbuf_from("ids", ids, sizeof ids, 0);
        bw = tbuf_from("weights", weights, sizeof weights, 0);
        bx = tbuf_from("x", x, sizeof x, 0);
        brow = tbuf_new("row_slot", (size_t)rows * 4, 0);
        bslot = tbuf_new("slot_row", sizeof slot_row, 0);
        bcount = tbuf_new("count", E * 4, 0);
        boffset = tbuf_new("offset", E * 4 + 4, 0);
        bspace = tbuf_new("workspace", bytes, 0);
        by = tbuf_new("y", (size_t)rows * H * 2, 0);
        by2 = tbuf_new("y by row", (size_t)rows * H * 2, 0);
        bback = tbuf_new("unpermuted", sizeof back, 0);
        fault = tfault_new(0);
        d.ids = (const int32_t*)bids.p;
        d.weights = (const float*)bw.p;
        d.expert_count = (int32_t*)bcount.p;
        d.expert_offset = (int32_t*)boffset.p;
        d.row_slot = (int32_t*)brow.p;
        d.slot_row = (int32_t*)bslot.p;
        d.workspace = bspace.p;
        d.workspace_bytes = bytes;
        d.fault = p.fault = (uint64_t*)fault.p;
        d.rank = p.rank = TEST_RANK;
        p.x = bx.p;
        p.y = by.p;
        p.row_slot = d.row_slot;
        p.slot_row = d.slot_row;
        p.num_tokens = T, p.top_k = K, p.hidden = H, p.num_rows = rows;
        CHECK_STATUS(moe_route(&d, test_now.stream), MOE_OK);
        CHECK_STATUS(moe_permute(&p, test_now.stream), MOE_OK);
        p.y = by2.p;
        p.slot_row = 0;
        CHECK_STATUS(moe_permute(&p, test_now.stream), MOE_OK);
        p.x = by.p;
        p.y = bback.p;
        p.slot_row = d.slot_row;
        CHECK_STATUS(moe_unpermute(&p, test_now.stream), MOE_OK);
        tbuf_get(&bslot, slot_row);
        tbuf_get(&bback, back);
        for (int s = 0; s < T * K; ++s) {
            int64_t wrong = 0;
            for (int h = 0; h < H; ++h)
                wrong += back[s * H + h] != (slot_row[s] < 0 ? 0 : x[s / K * H + h]);
            CHECK(wrong == 0, "slot %d, row %d", s, slot_row[s]);
            dropped += slot_row[s] < 0;
        }
        CHECK(dropped > 0 && dropped < T * K, "%lld are dropped", (long long)dropped);
        {
            void* y = tbuf_copy(&by);
            CHECK(tbuf_holds(&by2, y), "permute by token and by row differ");
            free(y);
        }
        CHECK_FAULT(&fault, MOE_FAULT_NONE, 0);
        tbuf_free(&bids), tbuf_free(&bw), tbuf_free(&bx), tbuf_free(&brow), tbuf_free(&bslot);
        tbuf_free(&bcount), tbuf_free(&boffset), tbuf_free(&bspace), tbuf_free(&by);
        tbuf_free(&by2), tbuf_free(&bback), tbuf_free(&fault);
    }
}

/* Rows whose offsets need more than 32 bits, read and written. */
static void test_permute_wide_offsets(void)
{
    enum { T = 3, K = 2, H = 40, R = T * K };
    static const int32_t row_slot[R] = {4, 0, 2, 5, 3, 1}, slot_row[R] = {1, 5, 2, 4, 0, 3};
    trand r = trand_new(9);
    uint16_t x[R * H], want[R * H];
    tbuf brow, bslot;
    if (!twide_possible(2)) return;
    brow = tbuf_from("row_slot", row_slot, sizeof row_slot, 0);
    bslot = tbuf_from("slot_row", slot_row, sizeof slot_row, 0);
    for (int i = 0; i < R * H; ++i) x[i] = (uint16_t)trand_int(&r, 1, 65535);
    for (int n = 0; n < 6; ++n) { /* x far apart, then y; by token, by row, back */
        const int far_x = n < 3, kind = n % 3, x_rows = kind == 2 ? R : T;
        moe_permute_desc p;
        twide w;
        tbuf near_rows;
        memset(&p, 0, sizeof p);
        if (!twide_new(&w, far_x ? "x" : "y", far_x ? x_rows : R, H, MOE_BF16)) break;
        p.num_tokens = T, p.top_k = K, p.hidden = H, p.num_rows = R;
        p.row_slot = (const int32_t*)brow.p;
        if (kind != 1) p.slot_row = (const int32_t*)bslot.p;
        near_rows = tbuf_new("near rows", sizeof want, 0);
        if (!far_x) tbuf_put(&near_rows, x);
        if (far_x) twide_put(&w, x);
        p.x = far_x ? w.p : near_rows.p;
        p.y = far_x ? near_rows.p : w.p;
        p.x_stride = far_x ? w.stride : 0;
        p.y_stride = far_x ? 0 : w.stride;
        CHECK_STATUS((kind == 2 ? moe_unpermute : moe_permute)(&p, test_now.stream), MOE_OK);
        for (int i = 0; i < R; ++i)
            memcpy(want + i * H, x + (kind == 2 ? slot_row[i] : row_slot[i] / K) * H, H * 2);
        if (far_x) CHECK(tbuf_holds(&near_rows, want), "kind %d", kind);
        else twide_holds(&w, want);
        tbuf_free(&near_rows);
        twide_free(&w);
    }
    tbuf_free(&brow);
    tbuf_free(&bslot);
}

static void test_permute_large(void)
{
#if !MOE_ON_HOST
    static const int TKH[][3] = {
        {4096, 8, 4096}, {2000, 6, 1536}, {1024, 8, 16384}, {100000, 2, 31}};
    trand r = trand_new(10);
    for (int i = 0; i < 4; ++i)
        for (int n = 0; n < 3; ++n) {
            permute_case c = random_case(&r, TKH[i][0], TKH[i][1], TKH[i][2]);
            c.back = n == 2;
            c.by_token = n;
            run_case(&c, &r);
        }
#endif
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_permute_shapes);
    RUN(test_permute_wide_tokens);
    RUN(test_permute_empty);
    RUN(test_permute_foreign_maps);
    RUN(test_permute_refusals);
    RUN(test_permute_same_bits);
    RUN(test_permute_graph);
    RUN(test_permute_after_route);
    RUN(test_permute_wide_offsets);
    RUN(test_permute_large);
    return test_end();
}
