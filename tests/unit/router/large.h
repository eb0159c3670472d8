/* large.h: large shapes, and rows past 2^32 elements. Included by test_router.cu after its cases.

   test_router_large      large shapes, on a GPU
   test_router_past_2_31  rows past 2^32 elements, every path and tile */
#ifndef MOE_TESTS_ROUTER_LARGE_H
#define MOE_TESTS_ROUTER_LARGE_H

static void test_router_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(8);
    static const struct {
        int T, H, E, x_dtype, router_dtype;
    } shape[] = {{4096, 2048, 256, MOE_FP16, MOE_FP16},  {4096, 7168, 256, MOE_BF16, MOE_BF16},
                 {1000, 2047, 161, MOE_FP16, MOE_FP32},  {1000, 2048, 161, MOE_FP16, MOE_FP32},
                 {9000, 2048, 60, MOE_BF16, MOE_BF16},   {20000, 2048, 130, MOE_FP16, MOE_FP16},
                 {40000, 2048, 250, MOE_BF16, MOE_FP32}, {64, 7168, 256, MOE_BF16, MOE_FP32}};
    for (int i = 0; i < (int)(sizeof shape / sizeof *shape); ++i) {
        router_case c = normal_case(shape[i].T, shape[i].H, shape[i].E);
        router_bufs b;
        c.x_dtype = shape[i].x_dtype;
        c.router_dtype = shape[i].router_dtype;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_router_logits(&b.d, test_now.stream), MOE_OK);
        compare_some(&b, &c, c.T > 100 ? c.T / 67 : 1);
        bufs_free(&b);
    }
#endif
}

/* Queues the product with the tile that the shape would choose, the large one or the small one. */
enum { CHOSEN, LARGE, SMALL };
static moe_status call_tile(const moe_router_desc* d, int way, int tile)
{
    if (tile == CHOSEN) return moe_router_logits(d, test_now.stream);
    return way == SPLIT ? call_split(*d, tile == SMALL) : call_ragged(*d, tile == SMALL);
}

/* Rows of x, of the router or of the logits that lie past 2^32 elements, on every path and with
   every tile: the bits of the same call on dense rows. The large tiles have more than one of each
   thread's rows, and two tiles along both sides. */
static void test_router_past_2_31(void)
{
    enum { X, ROUTER, LOGITS };
    static const char* const name[] = {"x", "router", "logits"};
    static const struct {
        int way, tile, T, E;
    } run[] = {{SCALAR, CHOSEN, 5, 8}, {GEMM, CHOSEN, 5, 8},      {SPLIT, LARGE, 260, 136},
               {SPLIT, SMALL, 35, 24}, {RAGGED, LARGE, 130, 136}, {RAGGED, SMALL, 67, 72}};
    trand r = trand_new(9);
    for (size_t i = 0; i < sizeof run / sizeof *run; ++i)
        for (int which = X; which <= LOGITS; ++which) {
            const int way = run[i].way, tile = run[i].tile;
            router_case c = case_of(way, run[i].T, 64, run[i].E);
            router_bufs b;
            moe_router_desc d;
            twide wide;
            void* want;
            if (MOE_ON_HOST && TWIDE_SPAN == 0 && c.T > 100) c.H = 16;
            if (wanted_way(&c) != way) continue; /* the binary lacks bf16 */
            if (way == SPLIT && !split_fits(tile == SMALL, c.x_dtype)) continue;
            if (!twide_new(&wide, name[which], which == ROUTER ? c.E : c.T,
                           which == LOGITS ? c.E : c.H,
                           which == LOGITS   ? MOE_FP32
                           : which == ROUTER ? c.router_dtype
                                             : c.x_dtype))
                continue;
            bufs_new(&b, &c, &r);
            CHECK_STATUS(call_tile(&b.d, way, tile), MOE_OK);
            compare_some(&b, &c, 1);
            want = tbuf_copy(&b.logits);
            tbuf_poison(&b.logits);
            d = b.d;
            if (which == X) {
                d.x = wide.p;
                d.x_stride = wide.stride;
                twide_put(&wide, b.h_x);
            } else if (which == ROUTER) {
                d.router = wide.p;
                d.router_stride = wide.stride;
                twide_put(&wide, b.h_router);
            } else {
                d.logits = (float*)wide.p;
                d.logits_stride = wide.stride;
            }
            check_path(&d, &c);
            CHECK_STATUS(call_tile(&d, way, tile), MOE_OK);
            if (which == LOGITS) twide_holds(&wide, want);
            else CHECK(tbuf_holds(&b.logits, want), "wide %s, way %d", name[which], way);
            twide_free(&wide);
            free(want);
            bufs_free(&b);
        }
}

static void router_large(void)
{
    RUN(test_router_large);
    RUN(test_router_past_2_31);
}

#endif
