/* test_ep_wire.cu: moe/base/fp8.cuh, and rows that travel in fp8: moe/ep/wire.cuh.

     nvcc -I. -arch=sm_90a tests/unit/test_ep_wire.cu -o test_ep_wire
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_ep_wire.cu -o test_ep_wire */
#include "tests/unit/ep/backward_case.h"

/* Every code is the number that its bits say; every float gets the nearest code. */
static void test_e4m3(void)
{
    trand q = trand_new(900);
    for (int c = 0; c < 256; ++c) {
        const int e = c >> 3 & 15, m = c & 7;
        const float v = moe_e4m3_to_f32((uint8_t)c);
        double want = e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
        if (c & 128) want = -want;
        if ((c & 127) == 127) {
            CHECK(v != v && moe_f32_to_e4m3(v) == 127, "NaN %d", c);
            continue;
        }
        CHECK(v == want && moe_f32_to_e4m3(v) == c, "code %d is %g", c, v);
    }
    for (int i = 0; i < 20000; ++i) {
        const float v = trand_normal(&q) * ldexpf(1, (int)trand_int(&q, -14, 9));
        const uint8_t got = moe_f32_to_e4m3(v);
        double best = 1e9, off = fabs((double)moe_e4m3_to_f32(got) - v);
        int even = 0;
        for (int c = 0; c < 127; ++c) {
            const double d = fabs((double)moe_e4m3_to_f32((uint8_t)c) - fabs((double)v));
            if (d < best) best = d, even = !(c & 1);
            else if (d == best) even |= !(c & 1) ? 2 : 0;
        }
        CHECK(off == best, "%g: %g from it, %g is nearest", v, off, best);
        if (even > 1) CHECK(!(got & 1), "%g is a tie: to even", v); /* two are as near */
        CHECK((got >> 7) == (v < 0 || 1 / v < 0), "the sign of %g", v);
    }
    CHECK(moe_f32_to_e4m3(INFINITY) == 0x7e && moe_f32_to_e4m3(-1e30f) == 0xfe, "the largest");
    CHECK(moe_f32_to_e4m3(-0.0f) == 0x80 && moe_f32_to_e4m3(1e-40f) == 0, "the smallest");
}

/* A row as it comes out of the wire. */
static void wire_round(uint16_t* y, const uint16_t* x, int H, int dtype)
{
    for (int g = 0; g < H; g += MOE_FP8_GROUP) {
        const int end = g + MOE_FP8_GROUP < H ? g + MOE_FP8_GROUP : H;
        float largest = 0, by, scale;
        for (int h = g; h < end; ++h) largest = fmaxf(largest, fabsf(moe_load(x, h, dtype)));
        by = largest < 1e-30f ? 0 : 448.0f / largest;
        scale = largest < 1e-30f ? 0 : largest / 448.0f;
        for (int h = g; h < end; ++h)
            moe_store(y, h, dtype,
                      moe_e4m3_to_f32(moe_f32_to_e4m3(moe_load(x, h, dtype) * by)) * scale);
    }
}

/* Compares what rank r has received with the senders' tokens: those of others as the wire rounds
   them, bit for bit, its own as they are. */
static void wire_check(const bk_job* j, int r)
{
    const lay_case* c = &j->o.c;
    const int64_t H = c->H;
    moe_ep_layer_desc d = j->ep[r].forward;
    moe_layer_view v;
    moe_ep_view ep;
    int64_t seen = 0;
    tgroup_use(&j->lay.g, r);
    CHECK_STATUS(moe_ep_layer_get_view(&d, &v, &ep), MOE_OK);
    uint16_t* x = (uint16_t*)lay_get(ep.recv_x, ep.num_x * H * 2);
    int32_t* token = (int32_t*)lay_get(ep.recv_token, (int64_t)c->W * ep.recv_tokens * 4);
    int32_t* slot = (int32_t*)lay_get(ep.row_slot, ep.num_rows * 4);
    uint16_t* want = (uint16_t*)test_host(H * 2);
    for (int64_t i = 0; i < ep.num_rows; ++i) {
        if (slot[i] < 0) continue;
        const int got = slot[i] / c->K, from = got / ep.recv_tokens;
        const uint16_t* own = x + (ep.in_order ? i : got) * H;
        int64_t first = 0;
        for (int s = 0; s < from; ++s) first += j->rank[s].T;
        const uint16_t* sent = (const uint16_t*)j->h_x + (first + token[got]) * H;
        if (from == r) memcpy(want, sent, (size_t)H * 2);
        else wire_round(want, sent, (int)H, c->dtype);
        ++seen;
        if (!CHECK(!memcmp(own, want, (size_t)H * 2), "rank %d: row %lld, of rank %d", r,
                   (long long)i, from))
            break;
    }
    CHECK(seen > 0, "rank %d received nothing", r);
    TFREE(x, token, slot, want);
}

/* Returns the norm of a - b of all ranks, and adds that of b to *all. */
static double wire_off(const void* a, const void* b, int64_t n, int dtype, double* all)
{
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double w = moe_load(b, i, dtype), e = moe_load(a, i, dtype) - w;
        sum += e * e;
        *all += w * w;
    }
    return sum;
}

/* Copies y or dx of all ranks, one after the other. */
static void* wire_collect(const bk_job* j, int dx)
{
    const int64_t row = (int64_t)j->o.c.H * 2;
    char* all = (char*)test_host(j->one.T * row);
    int64_t at = 0;
    for (int r = 0; r < j->o.c.W; ++r) {
        void* own;
        tgroup_use(&j->lay.g, r);
        own = tbuf_copy(dx ? &j->rank[r].dx : &j->rank[r].y);
        memcpy(all + at * row, own, (size_t)(j->rank[r].T * row));
        at += j->rank[r].T;
        free(own);
    }
    TEST_CUDA(cudaSetDevice(0));
    return all;
}

/* Sets what travels in fp8. */
static void wire_use(bk_job* j, int x, int dy)
{
    for (int r = 0; r < j->o.c.W; ++r) {
        j->ep[r].forward.buffers.wire_dtype = x ? MOE_EP_WIRE_FP8 : 0;
        j->ep[r].gradient_wire = dy ? MOE_EP_WIRE_FP8 : 0;
        tgroup_use(&j->lay.g, r);
        (void)bk_put_memory(j, r);
    }
}

/* Runs a step and compares with one GPU's: y of rounded x, dx of rounded dy. */
static void wire_step(bk_job* j, const void* y0, const void* dx0, double y_alone, double dx_alone,
                      int x, int dy)
{
    const int64_t n = (int64_t)j->one.T * j->o.c.H;
    double all = 0, y_off, dx_off;
    void *y, *dx;
    wire_use(j, x, dy);
    bk_reset(j);
    bk_run(j);
    tgroup_wait(&j->lay.g);
    tgroup_clean(&j->lay.g, __LINE__);
    y = wire_collect(j, 0), dx = wire_collect(j, 1);
    y_off = wire_off(y, y0, n, j->o.c.dtype, &all);
    dx_off = wire_off(dx, dx0, n, j->o.c.dtype, &all);
    if (x) {
        CHECK(y_off > 0 && y_off < 4 * y_alone, "y is off by %g, rounded rows alone by %g",
              sqrt(y_off), sqrt(y_alone));
        for (int r = 0; r < j->o.c.W; ++r) wire_check(j, r);
    } else {
        CHECK(y_off == 0, "y has other bits");
    }
    if (dy)
        CHECK(dx_off > 0 && dx_off < 4 * dx_alone, "dx is off by %g, rounded rows alone by %g",
              sqrt(dx_off), sqrt(dx_alone));
    TFREE(y, dx);
}

/* fp8 rows of x, of dy, of both, in every form: the rows are those that fp8 gives; the errors of y
   and dx stay below twice those of rounding the rows of one GPU. */
static void test_wire(void)
{
    static bk_job j;
    for (int form = MOE_EP_DEDUPLICATED; form <= MOE_EP_ALL_GATHER_COPY; ++form) {
        const bk_case o = {{3, 9, 264, 40, 6, 2, form, MOE_EP_GATHERED,
                            form % 2 ? MOE_BF16 : test_half(), 0, 0,
                            form == MOE_EP_ALL_TO_ALL ? 8 : 0, 1, 0, 0, 0, 0},
                           form % 2,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0,
                           1,
                           form == MOE_EP_DEDUPLICATED};
        moe_ep_layer_backward_desc sizes;
        uint64_t bytes = 0;
        memset(&sizes, 0, sizeof sizes);
        sizes.forward = lay_sizes(&o.c);
        sizes.forward.buffers.wire_dtype = sizes.gradient_wire = MOE_EP_WIRE_FP8;
        CHECK_STATUS(moe_ep_layer_backward_region(&sizes, o.c.W, &bytes), MOE_OK);
        if (bk_new_region(&j, &o, 910, bytes)) {
            const int64_t n = (int64_t)j.one.T * o.c.H;
            void *y0, *dx0, *y1, *dx1;
            uint16_t* rounded = (uint16_t*)test_host(n * 2);
            double all = 0, y_alone, dx_alone;
            bk_run_one(&j);
            y0 = tbuf_copy(&j.one.y), dx0 = tbuf_copy(&j.one.dx);
            for (int t = 0; t < j.one.T; ++t)
                wire_round(rounded + (int64_t)t * o.c.H, (uint16_t*)j.h_x + (int64_t)t * o.c.H,
                           o.c.H, o.c.dtype);
            tbuf_put(&j.one.x, rounded);
            bk_run_one(&j);
            y1 = tbuf_copy(&j.one.y);
            tbuf_put(&j.one.x, j.h_x);
            for (int t = 0; t < j.one.T; ++t)
                wire_round(rounded + (int64_t)t * o.c.H, (uint16_t*)j.h_dy + (int64_t)t * o.c.H,
                           o.c.H, o.c.dtype);
            tbuf_put(&j.one.dy, rounded);
            bk_run_one(&j);
            dx1 = tbuf_copy(&j.one.dx);
            y_alone = wire_off(y1, y0, n, o.c.dtype, &all);
            dx_alone = wire_off(dx1, dx0, n, o.c.dtype, &all);
            CHECK(y_alone > 0 && dx_alone > 0 && y_alone < all / 100, "rounding changes something");
            wire_step(&j, y0, dx0, y_alone, dx_alone, 1, 0);
            wire_step(&j, y0, dx0, y_alone, dx_alone, 0, 1);
            wire_step(&j, y0, dx0, y_alone, dx_alone, 1, 1);
            TFREE(y0, dx0, y1, dx1, rounded);
        }
        bk_free(&j);
    }
}

/* What fp8 rows cannot be is refused by name. */
static void test_wire_refusals(void)
{
    const bk_case o = {{2, 8, 64, 40, 6, 2, 0, MOE_EP_REDUCED, test_half(), 0, 0, 0, 0, 0, 0, 0, 0},
                       0,
                       0,
                       0,
                       0,
                       0,
                       0,
                       0,
                       1,
                       0};
    static bk_job j;
    static moe_ep_layer_backward_prepared p;
    moe_ep_dispatch_desc d;
    moe_ep_buffers b;
    uint64_t end;
    memset(&b, 0, sizeof b);
    b.max_tokens = 8, b.hidden = 64, b.num_experts = 4, b.top_k = 2;
    b.dtype = MOE_FP32, b.wire_dtype = MOE_EP_WIRE_FP8;
    CHECK_STATUS(moe_ep_buffers_end(&b, 2, &end), MOE_STATUS(MOE_ERR_DTYPE, wire_dtype));
    if (bk_new(&j, &o, 920)) {
        moe_ep_layer_backward_desc e = j.ep[0];
        tgroup_use(&j.lay.g, 0);
        e.gradient_wire = 1;
        CHECK_STATUS(moe_ep_layer_backward_prepare(&e, &p),
                     MOE_STATUS(MOE_ERR_DTYPE, gradient_wire));
        e = j.ep[0];
        e.forward.buffers.wire_dtype = MOE_EP_WIRE_FP8; /* the region has no room for it */
        CHECK_STATUS(moe_ep_layer_backward_prepare(&e, &p),
                     MOE_STATUS(MOE_ERR_RANGE, region_bytes));
        memset(&d, 0, sizeof d);
        d.peers = j.lay.g.peers, d.fault = j.lay.g.fault[0];
        d.x = j.rank[0].x.p, d.x_stride = 68;
        d.num_tokens = 1, d.ids = (const int32_t*)j.rank[0].dweights.p;
        d.buffers = b, d.buffers.dtype = MOE_BF16;
        {
            size_t workspace;
            CHECK_STATUS(moe_ep_dispatch_workspace(&d, &workspace),
                         MOE_STATUS(MOE_ERR_ALIGN, x_stride));
        }
        TEST_CUDA(cudaSetDevice(0));
    }
    bk_free(&j);
}

int main(int argc, char** argv)
{
    tgroup_begin();
    test_begin(argc, argv);
    RUN(test_e4m3);
    RUN(test_wire);
    RUN(test_wire_refusals);
    return test_end();
}
