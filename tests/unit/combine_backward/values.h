/* values.h: gradients against the reference.

   test_backward_shapes        H, K and T of lists, the other fields drawn
   test_backward_dtypes        all pairs of dtypes, table or not, in place or not
   test_backward_alignment     each address and stride misaligned alone
   test_backward_outputs       every subset of the outputs
   test_backward_nothing       all slots dropped, or all bad
   test_backward_by_hand       gradients of small whole numbers, written down
   test_backward_in_place      the bits of the same call with other buffers
   test_backward_one_array     one buffer without a table
   test_backward_weight_zero   rows of zeros; not where dy is not finite
   test_backward_nan           NaN stays in its token
   test_backward_differences   the reference against differences of the forward's reference */
#ifndef MOE_TESTS_COMBINE_BACKWARD_VALUES_H
#define MOE_TESTS_COMBINE_BACKWARD_VALUES_H

#include "tests/unit/combine_backward/case.h"

/* Every H with every K; the other fields are drawn. */
static void test_backward_shapes(void)
{
    static const int Hs[] = {1,   3,   4,    7,    8,    16,   31,   100,
                             128, 256, 1000, 1024, 2048, 2056, 4104, 8200};
    static const int Ks[] = {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 70};
    static const int Ts[] = {1, 2, 3, 31, 33};
    trand r = trand_new(1);
    for (size_t i = 0; i < sizeof Hs / sizeof *Hs; ++i)
        for (size_t j = 0; j < sizeof Ks / sizeof *Ks; ++j)
            for (int n = 0; n < (MOE_ON_HOST ? 2 : 6); ++n) {
                const int most = Hs[i] > 2000 ? 1 : Hs[i] > 500 ? 2 : 4;
                const int T = Ts[trand_int(&r, 0, MOE_ON_HOST ? most : 4)];
                const backward_case c = random_case(&r, T, Hs[i], Ks[j]);
                run_case(&c, &r);
            }
}

/* All pairs of dtypes, with table and without, in place and not, aligned and not. */
static void test_backward_dtypes(void)
{
    trand r = trand_new(2);
    for (int rows = MOE_FP32; rows <= MOE_BF16; ++rows)
        for (int dy = MOE_FP32; dy <= MOE_BF16; ++dy)
            for (int buffers = 0; buffers < 2; ++buffers)
                for (int in_place = 0; in_place < 2; ++in_place)
                    for (int at = 0; at < 2; ++at)
                        for (int odd = 0; odd < 2; ++odd) {
                            backward_case c = normal_case(9, odd ? 253 : 256, 8);
                            c.rows_dtype = rows;
                            c.dy_dtype = dy;
                            c.buffers = buffers ? 5 : 0;
                            c.rows = buffers ? 17 : 80;
                            c.row_at = c.drows_at = at;
                            c.in_place = in_place;
                            run_case(&c, &r);
                        }
}

/* Each address misaligned alone, by every remainder; strides too. */
static void test_backward_alignment(void)
{
    trand r = trand_new(3);
    for (int which = 0; which < 10; ++which)
        for (int by = 1; by <= 8; ++by)
            for (int dtypes = 0; dtypes < 4; ++dtypes) {
                backward_case c = normal_case(4, 64, 3);
                c.rows_dtype = dtypes & 1 ? MOE_FP32 : MOE_FP16;
                c.dy_dtype = dtypes & 2 ? MOE_FP32 : MOE_FP16;
                if (which == 0) c.row_at = by;
                if (which == 1) c.drows_at = by;
                if (which == 2) c.dy_at = by;
                if (which == 3) c.shared_at = by;
                if (which == 4) c.dshared_at = by;
                if (which == 5) c.row_pad = by;
                if (which == 6) c.drows_pad = by;
                if (which == 7) c.dy_pad = by;
                if (which == 8) c.shared_pad = by;
                if (which == 9) c.dshared_pad = by;
                run_case(&c, &r);
            }
}

/* Every subset of the outputs, in vectors and element by element, of 1, 8 and 9 rows. */
static void test_backward_outputs(void)
{
    static const int Ks[] = {1, 7, 8, 9};
    trand r = trand_new(4);
    for (int outputs = 1; outputs <= ALL_OUTPUTS; ++outputs)
        for (int i = 0; i < 4; ++i)
            for (int how = 0; how < 4; ++how) {
                backward_case c = normal_case(7, how & 1 ? 200 : 51, Ks[i]);
                c.outputs = outputs;
                c.rows_dtype = trand_dtype(&r);
                c.dy_dtype = trand_dtype(&r);
                c.unweighted = how == 1;
                c.shared_weighted = how != 2;
                c.in_place = how == 3;
                c.bad = how == 2 ? 20 : 0;
                run_case(&c, &r);
            }
}

/* All slots dropped: dweights 0 and no row. All slots bad: the same, and the first one is named. */
static void test_backward_nothing(void)
{
    trand r = trand_new(5);
    for (int dtype = MOE_FP32; dtype <= MOE_BF16; ++dtype)
        for (int H = 63; H <= 64; ++H)
            for (int outputs = ALL_OUTPUTS; outputs > 0; outputs -= DSHARED * 3)
                for (int bad = 0; bad < 2; ++bad) {
                    backward_case c = normal_case(6, H, 4);
                    c.rows_dtype = dtype;
                    c.outputs = outputs;
                    c.dropped = bad ? 0 : 100;
                    c.bad = bad ? 100 : 0;
                    run_case(&c, &r);
                }
}

/* Small whole numbers. A row of NaN that no slot names, slots of -1 with weights that are not
   finite, a token without any row. */
static void test_backward_by_hand(void)
{
    enum { T = 3, H = 2, K = 3 };
    static const float dy[] = {1, 2, -3, 4, 5, -6};
    static const float rows[] = {NAN, NAN, 10, 20, 100, 200}, other[] = {3, -3};
    static const moe_place place[] = {{0, 1},  {-1, -1}, {1, 0},  {0, 2},  {-1, 5},
                                      {-1, 0}, {-1, -1}, {-1, 7}, {-1, -1}};
    static const float weights[] = {2, NAN, -1, 0.5f, INFINITY, 4, NAN, INFINITY, NAN};
    static const float shared[] = {7, 8, 1, 2, 3, 4}, shared_weight[] = {1, -2, 10};
    static const float want_dweights[] = {50, 0, -3, 500, 0, 0, 0, 0, 0};
    static const float want_rows[] = {2, 4, -1.5f, 2}, want_other[] = {-1, -2};
    static const float want_dshared[] = {1, 2, 6, -8, 50, -60};
    static const float want_dshared_weight[] = {23, 5, -9};
    tbuf b0 = tbuf_from("rows", rows, sizeof rows, 0), b1 = tbuf_from("rows", other, 8, 0);
    tbuf d0 = tbuf_new("drows", sizeof rows, 0), d1 = tbuf_new("drows", 8, 0);
    void *address[] = {b0.p, b1.p}, *gradient[] = {d0.p, d1.p};
    tbuf bt = tbuf_from("table", address, sizeof address, 0);
    tbuf dt = tbuf_from("drows_table", gradient, sizeof gradient, 0);
    tbuf by = tbuf_from("dy", dy, sizeof dy, 0), bp = tbuf_from("place", place, sizeof place, 0);
    tbuf bw = tbuf_from("weights", weights, sizeof weights, 0);
    tbuf bs = tbuf_from("shared", shared, sizeof shared, 0);
    tbuf bsw = tbuf_from("shared_weight", shared_weight, sizeof shared_weight, 0);
    tbuf dw = tbuf_new("dweights", sizeof want_dweights, 0);
    tbuf ds = tbuf_new("dshared", sizeof want_dshared, 0);
    tbuf dsw = tbuf_new("dshared_weight", sizeof want_dshared_weight, 0), fault = tfault_new(0);
    moe_combine_backward_desc d;
    float* got;
    memset(&d, 0, sizeof d);
    d.dy = by.p;
    d.table = (const void* const*)bt.p;
    d.drows_table = (void* const*)dt.p;
    d.num_buffers = 2;
    d.place = (const moe_place*)bp.p;
    d.weights = (const float*)bw.p;
    d.shared = bs.p;
    d.shared_weight = (const float*)bsw.p;
    d.rows_dtype = MOE_FP32;
    d.dweights = (float*)dw.p;
    d.dshared = ds.p;
    d.dshared_weight = (float*)dsw.p;
    d.fault = (uint64_t*)fault.p;
    d.rank = TEST_RANK;
    d.num_tokens = T;
    d.hidden = H;
    d.top_k = K;
    CHECK_STATUS(moe_combine_backward(&d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&dw, want_dweights), "dweights");
    CHECK(tbuf_holds(&ds, want_dshared), "dshared");
    CHECK(tbuf_holds(&dsw, want_dshared_weight), "dshared_weight");
    CHECK(tbuf_holds(&d1, want_other), "the row of the other buffer");
    got = (float*)tbuf_copy(&d0);
    CHECK(memcmp(got + 2, want_rows, sizeof want_rows) == 0, "the rows of the first buffer");
    for (size_t i = 0; i < 8; ++i)
        CHECK(((unsigned char*)got)[i] == test_poison_byte(i), "the padding row was written");
    free(got);
    CHECK_FAULT(&fault, MOE_FAULT_NONE, 0);
    tbufs_free(
        TBUFS(&b0, &b1, &d0, &d1, &bt, &dt, &by, &bp, &bw, &bs, &bsw, &dw, &ds, &dsw, &fault));
}

/* Gradients that replace the rows have the bits of gradients elsewhere, and so have the dots. */
static void test_backward_in_place(void)
{
    trand r = trand_new(6);
    for (int i = 0; i < 8; ++i) {
        backward_case c = normal_case(20, i & 1 ? 203 : 1032, i & 2 ? 8 : 11);
        backward_bufs b;
        void *drows, *dweights, *dshared, *dshared_weight;
        c.buffers = i & 4 ? 0 : 1; /* one buffer, reached in both ways */
        c.rows = c.T * c.K;
        c.dropped = 0; /* no padding row, which would differ */
        bufs_new(&b, &c, &r);
        launch(&b, &c);
        drows = tbuf_copy(&b.drow[0]), dweights = tbuf_copy(&b.dweights);
        dshared = tbuf_copy(&b.dshared), dshared_weight = tbuf_copy(&b.dshared_weight);
        put(&b);
        c.in_place = 1;
        describe(&b, &c);
        launch(&b, &c);
        CHECK(tbuf_holds(&b.buffer[0], drows), "drows in place");
        CHECK(tbuf_holds(&b.dweights, dweights), "dweights, drows in place");
        CHECK(tbuf_holds(&b.shared, dshared), "dshared in place");
        CHECK(tbuf_holds(&b.dshared_weight, dshared_weight), "dshared_weight, in place");
        free(drows), free(dweights), free(dshared), free(dshared_weight);
        bufs_free(&b);
    }
}

/* One buffer without a table: place.buffer 0 is that buffer, and 1 is outside. */
static void test_backward_one_array(void)
{
    trand r = trand_new(7);
    for (int num_buffers = 0; num_buffers < 2; ++num_buffers) {
        backward_case c = normal_case(20, 72, 4);
        backward_bufs b;
        c.buffers = 0;
        c.rows = 83;
        bufs_new(&b, &c, &r);
        b.h_place[11].buffer = 1;
        b.h_weights[11] = NAN;
        put(&b);
        b.d.num_buffers = num_buffers;
        launch(&b, &c);
        bufs_free(&b);
    }
}

/* A weight of 0 writes zeros, and NaN where dy is not finite. */
static void test_backward_weight_zero(void)
{
    enum { T = 2, H = 64 };
    trand r = trand_new(8);
    for (int narrow = 0; narrow < 2; ++narrow) {
        backward_case c = normal_case(T, H - narrow, 3);
        backward_bufs b;
        uint16_t* got;
        int64_t zeros = 0, rows = 0;
        c.buffers = 0;
        c.rows = 6;
        c.dropped = 0;
        bufs_new(&b, &c, &r);
        memset(b.h_weights, 0, T * 3 * 4);
        moe_store(b.h_dy, c.H + 5, MOE_BF16, INFINITY);
        moe_store(b.h_dy, c.H + 7, MOE_BF16, NAN);
        put(&b);
        tbuf_put(&b.dy, b.h_dy);
        CHECK_STATUS(moe_combine_backward(&b.d, test_now.stream), MOE_OK);
        got = (uint16_t*)tbuf_copy(&b.drow[0]);
        for (int s = 0; s < T * 3; ++s)
            for (int h = 0; h < c.H; ++h) {
                const float v = moe_bf16_to_f32(got[b.h_place[s].row * c.H + h]);
                zeros += v == 0;
                rows += s / 3 == 1 && (h == 5 || h == 7) && v != v;
            }
        CHECK(zeros == T * 3 * c.H - 6 && rows == 6, "%lld zeros, %lld NaN", (long long)zeros,
              (long long)rows);
        free(got);
        bufs_free(&b);
    }
}

/* Counts the bytes of a token's gradients that two runs have different. */
static int64_t differences(const backward_bufs* b, const backward_case* c, int64_t t, void** one,
                           void** two)
{
    const int64_t row = c->H * moe_dtype_bytes(c->rows_dtype), K = c->K;
    int64_t n = memcmp((char*)one[1] + t * K * 4, (char*)two[1] + t * K * 4, (size_t)(K * 4)) != 0;
    for (int64_t s = t * K; s < t * K + K; ++s)
        if (b->h_place[s].buffer == 0)
            n += memcmp((char*)one[0] + b->h_place[s].row * row,
                        (char*)two[0] + b->h_place[s].row * row, (size_t)row) != 0;
    n += memcmp((char*)one[2] + t * row, (char*)two[2] + t * row, (size_t)row) != 0;
    return n + (memcmp((char*)one[3] + t * 4, (char*)two[3] + t * 4, 4) != 0);
}

/* NaN and infinity in one token's dy, or in one of its rows, change no bit of another token. In a
   row they change that slot's dweights alone. */
static void test_backward_nan(void)
{
    trand r = trand_new(9);
    for (int how = 0; how < 8; ++how) {
        backward_case c = normal_case(9, how & 4 ? 250 : 256, how & 2 ? 3 : 9);
        const int64_t token = 4, slot = token * c.K + 1;
        backward_bufs b;
        void *one[4], *two[4];
        const float* dots;
        c.buffers = 0;
        c.rows = c.T * c.K;
        c.dropped = 0;
        bufs_new(&b, &c, &r);
        launch(&b, &c);
        tbufs_copy(TBUFS(&b.drow[0], &b.dweights, &b.dshared, &b.dshared_weight), one);
        if (how & 1) moe_store(b.h_dy, token * c.H + 17, MOE_BF16, how & 2 ? NAN : INFINITY);
        else moe_store(b.row[0], b.h_place[slot].row * (int64_t)c.H + 99, MOE_BF16, NAN);
        put(&b);
        tbuf_put(&b.dy, b.h_dy);
        CHECK_STATUS(moe_combine_backward(&b.d, test_now.stream), MOE_OK);
        tbufs_copy(TBUFS(&b.drow[0], &b.dweights, &b.dshared, &b.dshared_weight), two);
        for (int64_t t = 0; t < c.T; ++t)
            CHECK((differences(&b, &c, t, one, two) != 0) == (t == token), "token %lld, how %d",
                  (long long)t, how);
        dots = (const float*)two[1];
        for (int64_t s = token * c.K; s < (token + 1) * c.K; ++s) {
            const int finite = fabsf(dots[s]) < 1e30f;
            CHECK(finite == (!(how & 1) && s != slot), "dweights of slot %lld", (long long)s);
        }
        if (!(how & 1))
            CHECK(memcmp(one[0], two[0], b.drow[0].bytes) == 0, "a row of NaN changed gradients");
        tbufs_free_copies(TBUFS(&b.drow[0], &b.dweights, &b.dshared, &b.dshared_weight), one);
        tbufs_free_copies(TBUFS(&b.drow[0], &b.dweights, &b.dshared, &b.dshared_weight), two);
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        bufs_free(&b);
    }
}

/* Returns the loss sum of dy * y, with y from the forward's reference. */
static double loss(const moe_ref_combine_desc* f, const double* dy)
{
    const int64_t n = (int64_t)f->num_tokens * f->hidden;
    double* y = (double*)test_host(n * 8);
    double sum = 0;
    moe_ref_combine_f64(f, y, 0);
    for (int64_t i = 0; i < n; ++i) sum += dy[i] * y[i];
    free(y);
    return sum;
}

/* Returns the loss's derivative by *p. The loss is linear in *p, so the step may be large. */
static double derivative(const moe_ref_combine_desc* f, const double* dy, double* p)
{
    const double was = *p;
    double up, down;
    *p = was + 0.5;
    up = loss(f, dy);
    *p = was - 0.5;
    down = loss(f, dy);
    *p = was;
    return up - down;
}

/* Requires that n gradients are the derivatives of the loss by p[0 .. n). Returns the largest. */
static double compare_derivatives(const char* what, const moe_ref_combine_desc* f, const double* dy,
                                  double* p, const double* gradient, int64_t n)
{
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double want = derivative(f, dy, p + i);
        CHECK(fabs(want - gradient[i]) <= 1e-10, "%s[%lld]: %.12g, not %.12g", what, (long long)i,
              gradient[i], want);
        if (fabs(want) > largest) largest = fabs(want);
    }
    return largest;
}

/* The reference of the gradients against differences of the forward's reference, all in double. */
static void test_backward_differences(void)
{
    enum { T = 4, H = 5, K = 3, R = 14, SLOTS = T * K };
    trand r = trand_new(10);
    double rows[R * H], weights[SLOTS], shared[T * H], dy[T * H], residual[T * H];
    double drows[SLOTS * H], dweights[2 * SLOTS], dshared[T * H], dshared_weight[2 * T];
    double largest = 0;
    float shared_weight[T];
    moe_place place[SLOTS];
    moe_ref_combine_backward_desc d;
    for (int i = 0; i < R * H; ++i) rows[i] = trand_normal(&r);
    for (int i = 0; i < T * H; ++i) {
        shared[i] = trand_normal(&r);
        residual[i] = trand_normal(&r);
        dy[i] = trand_normal(&r);
    }
    for (int i = 0; i < T; ++i) shared_weight[i] = trand_normal(&r);
    for (int s = 0; s < SLOTS; ++s) {
        weights[s] = trand_normal(&r);
        place[s].buffer = s == 5 ? -1 : 0;
        place[s].row = (s * 5 + 3) % R; /* all different */
    }
    memset(&d, 0, sizeof d);
    d.forward.rows = rows;
    d.forward.place = place;
    d.forward.weights = weights;
    d.forward.residual = residual;
    d.forward.shared = shared;
    d.forward.shared_weight = shared_weight;
    d.forward.rows_dtype = d.forward.weights_dtype = d.forward.residual_dtype = MOE_REF_REAL;
    d.forward.num_tokens = T;
    d.forward.hidden = H;
    d.forward.top_k = K;
    d.dy = dy;
    d.dy_dtype = MOE_REF_REAL;
    CHECK(moe_ref_combine_backward_f64(&d, drows, dweights, dshared, dshared_weight) == -1);
    CHECK(compare_derivatives("dweights", &d.forward, dy, weights, dweights, SLOTS) > 0.1);
    CHECK(compare_derivatives("dshared", &d.forward, dy, shared, dshared, T * H) > 0.1);
    CHECK(compare_derivatives("the residual", &d.forward, dy, residual, dy, T * H) > 0.1);
    for (int s = 0; s < SLOTS; ++s) {
        double* row = rows + place[s].row * H;
        if (place[s].buffer == 0)
            largest =
                fmax(largest, compare_derivatives("drows", &d.forward, dy, row, drows + s * H, H));
    }
    CHECK(largest > 0.1);
    for (int t = 0; t < T; ++t) { /* a factor of the reference is float: halves are exact enough */
        const float was = shared_weight[t];
        double up, down;
        shared_weight[t] = was + 0.5f, up = loss(&d.forward, dy);
        shared_weight[t] = was - 0.5f, down = loss(&d.forward, dy);
        shared_weight[t] = was;
        CHECK(fabs(up - down - dshared_weight[t]) <= 1e-5, "dshared_weight[%d]: %g, not %g", t,
              dshared_weight[t], up - down);
    }
}

static void combine_backward_values(void)
{
    RUN(test_backward_shapes);
    RUN(test_backward_dtypes);
    RUN(test_backward_alignment);
    RUN(test_backward_outputs);
    RUN(test_backward_nothing);
    RUN(test_backward_by_hand);
    RUN(test_backward_in_place);
    RUN(test_backward_one_array);
    RUN(test_backward_weight_zero);
    RUN(test_backward_nan);
    RUN(test_backward_differences);
}

#endif
