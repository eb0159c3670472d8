/* test_gemm.cu: the grouped GEMM of moe/gemm against its reference in double, and its schedule
   and its tensor-core pieces by themselves.

     nvcc -I. -arch=sm_90a tests/unit/test_gemm.cu -o test_gemm
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_gemm.cu -o test_gemm */
#include "tests/test.h"
#include "tests/test_weights.h"

/* All that grouped.cuh stamps by itself, and A read along M. */
#define MOE_GEMM_VARIANT_LIST(X, ...)                                                             \
    X(f16_kk, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                    \
    X(f16_kn, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)                                   \
    X(bf16_kk, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                   \
    X(bf16_kn, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)                                  \
    X(f16_nk, MOE_FP16, MOE_MAJOR_MN, MOE_MAJOR_K, __VA_ARGS__)                                   \
    X(f16_nn, MOE_FP16, MOE_MAJOR_MN, MOE_MAJOR_MN, __VA_ARGS__)                                  \
    X(bf16_nk, MOE_BF16, MOE_MAJOR_MN, MOE_MAJOR_K, __VA_ARGS__)                                  \
    X(bf16_nn, MOE_BF16, MOE_MAJOR_MN, MOE_MAJOR_MN, __VA_ARGS__)
#include "moe/gemm/grouped.cuh"
#include "moe/ref/experts.h"
#include "moe/ref/gemm.h"
#include "tests/test_bound.h"

#define MOST_EXPERTS TWEIGHTS_MOST

/* ------------------------------------------------------------------ the schedule */

typedef struct schedule_args {
    const int32_t* expert_offset;
    int32_t num_experts, num_rows, column_tiles, row_align, tile_rows, most;
    int32_t* num_tiles; /* [1] */
    moe_tile_position* tiles;   /* [most] */
    uint64_t* fault;
} schedule_args;

MOE_KERNEL(128, 1) schedule_kernel(MOE_ARG(schedule_args) d)
{
    MOE_SHARED(moe_block_scan_scratch, scratch);
    MOE_SHARED_DYNAMIC(shared);
    moei_schedule s;
    int count;
    s.groups.expert_offset = d.expert_offset;
    s.groups.num_experts = d.num_experts;
    s.groups.num_rows = d.num_rows;
    s.column_tiles = d.column_tiles;
    s.row_align = d.row_align;
    s.tile_start = (int*)shared;
    count = moei_schedule_build(&s, &scratch, d.fault, TEST_RANK, d.tile_rows);
    if (threadIdx.x == 0) *d.num_tiles = count;
    for (int i = (int)threadIdx.x; i < count && i < d.most; i += (int)blockDim.x)
        d.tiles[i] = moei_schedule_tile(&s, i, d.tile_rows);
}

/* Runs the schedule for these offsets; returns the number of tiles, and the tiles in *tiles. */
static int run_schedule(const int32_t* offset, int E, int rows, int columns, int align,
                        int tile_rows, int bad, moe_tile_position** tiles)
{
    const int most = (rows / tile_rows + 2 * E + 1) * columns;
    int32_t count;
    schedule_args a;
    moe_launch_config c = moe_grid(1, 128, ((size_t)E + 1) * 4, test_now.stream);
    tbuf bo, bn = tbuf_new("num_tiles", 4, 0), bf = tfault_new(0);
    tbuf bt = tbuf_new("tiles", (size_t)most * sizeof(moe_tile_position), 0);
    memset(&a, 0, sizeof a);
    memset(&bo, 0, sizeof bo);
    if (offset) {
        bo = tbuf_from("offset", offset, (size_t)E * 4 + 4, 4);
        a.expert_offset = (const int32_t*)bo.p;
    }
    a.num_experts = E;
    a.num_rows = rows;
    a.column_tiles = columns;
    a.row_align = align;
    a.tile_rows = tile_rows;
    a.most = most;
    a.num_tiles = (int32_t*)bn.p;
    a.tiles = (moe_tile_position*)bt.p;
    a.fault = (uint64_t*)bf.p;
    CHECK_STATUS(MOE_LAUNCH(schedule_kernel, c, a), MOE_OK);
    tbuf_get(&bn, &count);
    CHECK(count <= most, "%d tiles of %d", count, most);
    CHECK_FAULT(&bf, bad < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_OFFSET, bad < 0 ? 0 : bad);
    *tiles = (moe_tile_position*)tbuf_copy(&bt);
    if (bad >= 0) CHECK(tbuf_holds(&bt, 0), "tiles of offsets that make no sense");
    if (offset) tbuf_free(&bo);
    tbuf_free(&bn);
    tbuf_free(&bt);
    tbuf_free(&bf);
    return count;
}

/* Every tile of every expert stands exactly once, at its place in the walk: experts one after
   another, bands of row tiles within one, in a band all columns, rows fastest. */
static void check_schedule(const int32_t* offset, int E, int rows, int columns, int align,
                           int tile_rows)
{
    moe_tile_position* tiles;
    const int count = run_schedule(offset, E, rows, columns, align, tile_rows, -1, &tiles);
    int at = 0, wrong = 0;
    for (int e = 0; e < E; ++e) {
        const int begin = offset ? offset[e] : 0, end = offset ? offset[e + 1] : rows;
        const int first = begin / align * align;
        if (begin == end) continue;
        for (int band = first; band < end; band += MOEI_GEMM_BAND * tile_rows)
            for (int column = 0; column < columns; ++column)
                for (int i = 0; i < MOEI_GEMM_BAND && band + i * tile_rows < end; ++i, ++at) {
                    const moe_tile_position t = tiles[at < count ? at : 0];
                    wrong += at >= count || t.expert != e || t.begin != begin || t.end != end ||
                             t.row != band + i * tile_rows || t.column != column;
                }
    }
    CHECK(wrong == 0 && at == count, "E=%d columns=%d align=%d tile=%d: %d wrong, %d tiles, not %d",
          E, columns, align, tile_rows, wrong, count, at);
    free(tiles);
}

static void test_gemm_schedule(void)
{
    enum { MOST = 300 };
    static const int Es[] = {1, 2, 7, 64, 127, 129, MOST}, columns[] = {1, 3, 17};
    static const int tile_rows[] = {32, 64, 128}, sizes[] = {0, 0, 0, 1, 1, 7, 63, 64, 65, 127,
                                                             128, 129, 511, 512, 513, 2049, 4500};
    trand r = trand_new(1);
    for (size_t i = 0; i < sizeof Es / sizeof *Es; ++i)
        for (size_t j = 0; j < sizeof columns / sizeof *columns; ++j)
            for (size_t k = 0; k < sizeof tile_rows / sizeof *tile_rows; ++k)
                for (int align = 1; align <= 8; align += 7) {
                    const int E = Es[i];
                    int32_t offset[MOST + 1];
                    offset[0] = trand_int(&r, 0, 1) ? 0 : (int32_t)trand_int(&r, 1, 90);
                    for (int e = 0; e < E; ++e)
                        offset[e + 1] =
                            offset[e] + sizes[trand_int(&r, 0, sizeof sizes / sizeof *sizes -
                                                                   (E > 20 ? 3 : 1))];
                    check_schedule(offset, E, offset[E] + (int)trand_int(&r, 0, 3), columns[j],
                                   align, tile_rows[k]);
                }
    check_schedule(0, 1, 1000, 5, 1, 64); /* no offsets: all rows are the one expert's */
    check_schedule(0, 1, 1, 1, 8, 128);
    check_schedule(0, 1, 0, 3, 1, 64);
    {
        static const int32_t nothing[] = {0, 0, 0, 0}, all[] = {0, 0, 999, 999};
        check_schedule(nothing, 3, 50, 4, 1, 64);
        check_schedule(all, 3, 999, 4, 8, 32);
    }
}

static void test_gemm_schedule_bad(void)
{
    enum { E = 200 };
    static const int where[] = {0, 1, 60, 127, 128, 150, E - 1};
    int32_t offset[E + 1];
    moe_tile_position* tiles;
    for (size_t i = 0; i < sizeof where / sizeof *where; ++i)
        for (int how = 0; how < 3; ++how) {
            const int at = where[i]; /* the expert that is wrong */
            int first = at;
            for (int e = 0; e <= E; ++e) offset[e] = 3 * e + 5;
            if (how == 0) offset[at + 1] = offset[at] - 1;
            if (how == 1) {
                offset[at] = -1 - at;
                if (at > 0) first = at - 1; /* whose end it is */
            }
            if (how == 2) offset[at + 1] = 3 * E + 6;
            CHECK(run_schedule(offset, E, 3 * E + 5, 2, 1, 64, first, &tiles) == -1, "how=%d", how);
            free(tiles);
        }
    for (int e = 0; e <= E; ++e) offset[e] = 3 * e + 5;
    offset[E] = INT32_MAX;
    CHECK(run_schedule(offset, E, 3 * E + 5, 2, 8, 64, E - 1, &tiles) == -1, "far past the rows");
    free(tiles);
}

/* ------------------------------------------------------------------ tensor-core pieces */

typedef struct mma_args {
    const uint16_t* a; /* the stage of the piece, [32][MMA_LD] */
    const uint16_t* b;
    float* c; /* [16][20] */
    int32_t variant;
} mma_args;

#define MMA_K 32  /* two products deep */
#define MMA_LD 64 /* of a and b, swizzled; the rows of the piece are 16 to 31 */
#define MMA_ELEMS (MMA_K * MMA_LD)

/* One warp: c = a b, k 32, added to c once more, then stored. */
MOE_DEVICE void mma_warp(const mma_args* d, uint16_t* s, float* strip, const int dtype,
                         const int a_major, const int b_major)
{
    const int lane_a = moei_mma_lane_a(16, MMA_LD, a_major);
    const int lane_b = moei_mma_lane_b(16, MMA_LD, b_major);
    moei_mma_a a;
    moei_mma_b b;
    moei_mma_c c;
    for (int i = (int)threadIdx.x; i < MMA_ELEMS; i += 32) {
        s[i] = d->a[i];
        s[MMA_ELEMS + i] = d->b[i];
    }
    __syncwarp(MOE_FULL_WARP);
    moei_mma_zero(&c);
    for (int k = 0; k < MMA_K; k += 16) {
        moei_mma_load_a(&a, s, lane_a, 0, k, MMA_LD, dtype, a_major);
        moei_mma_load_b(&b, s + MMA_ELEMS, lane_b, 0, k, MMA_LD, dtype, b_major);
        moei_mma(&c, &a, &b, dtype);
    }
    moei_mma_store(strip, &c, 20);
    __syncwarp(MOE_FULL_WARP);
    for (int i = (int)threadIdx.x; i < 16 * 20; i += 32)
        if (i % 20 < 16) d->c[i] = strip[i];
}

#define MMA_LIST(X)                                                                               \
    X(0, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K)                                                      \
    X(1, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_MN)                                                     \
    X(2, MOE_FP16, MOE_MAJOR_MN, MOE_MAJOR_K)                                                     \
    X(3, MOE_FP16, MOE_MAJOR_MN, MOE_MAJOR_MN)                                                    \
    X(4, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K)                                                      \
    X(5, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN)                                                     \
    X(6, MOE_BF16, MOE_MAJOR_MN, MOE_MAJOR_K)                                                     \
    X(7, MOE_BF16, MOE_MAJOR_MN, MOE_MAJOR_MN)

MOE_KERNEL(32, 1) mma_kernel(MOE_ARG(mma_args) d)
{
    MOE_SHARED_DYNAMIC(shared);
    uint16_t* s = (uint16_t*)shared;
    float* strip = (float*)(s + 2 * MMA_ELEMS);
#define MMA_CASE(i, dtype, a_major, b_major)                                                      \
    if (d.variant == i) mma_warp(&d, s, strip, dtype, a_major, b_major);
    MMA_LIST(MMA_CASE)
#undef MMA_CASE
}

/* Where row i (or column) of the piece lies in its stage, at depth k. */
static int mma_at(int i, int k, int mn)
{
    return mn ? moei_swizzled(k, 16 + i, MMA_LD) : moei_swizzled(16 + i, k, MMA_LD);
}

static void test_gemm_mma(void)
{
    static const int variants[][3] = {
#define MMA_ROW(i, dtype, a_major, b_major) {dtype, a_major, b_major},
        MMA_LIST(MMA_ROW)
#undef MMA_ROW
    };
    trand r = trand_new(2);
    for (int v = 0; v < 8; ++v) {
        const int dtype = variants[v][0];
        const int a_mn = variants[v][1] == MOE_MAJOR_MN, b_mn = variants[v][2] == MOE_MAJOR_MN;
        uint16_t a[MMA_ELEMS], b[MMA_ELEMS];
        float got[16 * 20];
        int wrong = 0, nonzero = 0, written = 0;
        tbuf ba, bb, bc = tbuf_new("c", sizeof got, 0);
        mma_args args;
        moe_launch_config c = moe_grid(1, 32, MMA_ELEMS * 4 + 16 * 20 * 4, test_now.stream);
        if (test_gemm_status(dtype, MOE_TILE_AUTO) != MOE_OK) { /* no bf16 in this binary */
            tbuf_free(&bc);
            continue;
        }
        memset(a, 0xff, sizeof a); /* NaN wherever the piece is not */
        memset(b, 0xff, sizeof b);
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < MMA_K; ++k) {
                moe_store(a, mma_at(i, k, a_mn), dtype, (float)trand_int(&r, -9, 9));
                moe_store(b, mma_at(i, k, b_mn), dtype, (float)trand_int(&r, -9, 9));
            }
        ba = tbuf_from("a", a, sizeof a, 0);
        bb = tbuf_from("b", b, sizeof b, 0);
        args.a = (const uint16_t*)ba.p;
        args.b = (const uint16_t*)bb.p;
        args.c = (float*)bc.p;
        args.variant = v;
        CHECK_STATUS(MOE_LAUNCH(mma_kernel, c, args), MOE_OK);
        tbuf_get(&bc, got);
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 20; ++n) {
                float want = 0;
                for (int k = 0; k < MMA_K && n < 16; ++k)
                    want += moe_load(a, mma_at(m, k, a_mn), dtype) *
                            moe_load(b, mma_at(n, k, b_mn), dtype);
                if (n < 16) wrong += got[m * 20 + n] != want;
                else written += got[m * 20 + n] == got[m * 20 + n];
                nonzero += want != 0;
            }
        CHECK(wrong == 0 && written == 0 && nonzero > 200, "variant %d: %d of 256 are wrong", v,
              wrong);
        tbuf_free(&ba);
        tbuf_free(&bb);
        tbuf_free(&bc);
    }
}

/* ------------------------------------------------------------------ activations */

typedef struct activation_args {
    const float *v, *up; /* [n] */
    float* out;          /* [n] */
    int32_t n;           /* multiple of 8 */
    moe_grouped_gemm_args d;
} activation_args;

MOE_KERNEL(64, 1) activation_kernel(MOE_ARG(activation_args) a)
{
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x) * 8; i < a.n;
         i += (int)(gridDim.x * blockDim.x) * 8) {
        float v[8], up[8];
        MOE_UNROLL
        for (int x = 0; x < 8; ++x) {
            v[x] = a.v[i + x];
            up[x] = a.up[i + x];
        }
        {
            const moei_activation act =
                moei_activation_of(a.d.c.activation, a.d.c.alpha, a.d.c.limit);
            moei_activate_8(v, up, &act, a.d.c.gated != 0);
        }
        MOE_UNROLL
        for (int x = 0; x < 8; ++x) a.out[i + x] = v[x];
    }
}

/* The activations by themselves, on numbers of every size, infinities and NaN: relative to the exact
   result some ulp and an ulp of the exponent, where sigma and Phi are no subnormal numbers. */
static void test_gemm_activations_alone(void)
{
    enum { N = 4096 };
    static const float special[] = {0,     -0.0f, INFINITY, -INFINITY, 3e38f, -3e38f, 1e30f, -1e30f,
                                    1e19f, -1e19f, 2e19f, -2e19f, 1e4f, -1e4f, 127, -127,
                                    88,    -88,   15,   -15,   14.9f, -14.9f, 1e-30f, -1e-30f,
                                    1e-40f, -1e-40f, NAN, 7, -7, 6.9f, -6.9f, 12.8f};
    trand r = trand_new(20);
    float v[N], up[N], got[N];
    for (int i = 0; i < N; ++i) {
        const float size = (float)exp2((double)trand_int(&r, -20, 6));
        v[i] = i < 32 ? special[i] : trand_normal(&r) * (i & 1 ? 4 : size);
        up[i] = i < 32 ? 1 : trand_normal(&r) * (i & 1 ? 4 : size);
    }
    for (int kind = MOE_ACTIVATION_GEGLU; kind <= MOE_ACTIVATION_RELU2; ++kind)
        for (int option = 0; option < (kind == MOE_ACTIVATION_SWIGLU_CLAMPED ? 3 : 1); ++option) {
            tbuf bv = tbuf_from("v", v, sizeof v, 0), bu = tbuf_from("up", up, sizeof up, 0);
            tbuf bo = tbuf_new("out", sizeof got, 0);
            moe_launch_config c = moe_grid(3, 64, 0, test_now.stream);
            moe_grouped_gemm_desc d;
            activation_args a;
            double worst = 0;
            memset(&a, 0, sizeof a);
            a.v = (const float*)bv.p;
            a.up = (const float*)bu.p;
            a.out = (float*)bo.p;
            a.n = N;
            memset(&d, 0, sizeof d);
            d.num_experts = 1;
            d.n = d.k = 8;
            d.dtype = MOE_FP16;
            d.activation = kind;
            if (option) {
                d.alpha = option == 1 ? 1.0f : -0.01f;
                d.limit = option == 1 ? 3.0f : 1e30f;
            }
            CHECK_STATUS(moe_gemm_tile_resolve(&d, &a.d), MOE_OK);
            CHECK_STATUS(MOE_LAUNCH(activation_kernel, c, a), MOE_OK);
            tbuf_get(&bo, got);
            for (int i = 0; i < N; ++i) {
                const double alpha = fabs(a.d.c.alpha), at = fmin(fabs(v[i]), 1000);
                const double ulps = 16 + alpha * at + (at < 15 ? 2 * at * at : 450);
                double want = moe_ref_activation_f64(kind, v[i], up[i], a.d.c.alpha, a.d.c.limit);
                if (v[i] == -INFINITY) want = option == 2 ? v[i] : 0; /* alpha < 0: no bound */
                if (v[i] != v[i]) {
                    CHECK(got[i] != got[i], "activation %d: NaN becomes %g", kind, (double)got[i]);
                    continue;
                }
                if (fabs(want) >= 3.4e38) { /* the result, or on the way there */
                    CHECK(got[i] == (want > 0 ? INFINITY : -INFINITY) ||
                              fabs(got[i] - want) <= 1e-4 * fabs(want),
                          "activation %d of %g is %g", kind, (double)v[i], (double)got[i]);
                    continue;
                }
                {
                    const double error = fabs(got[i] - want);
                    const double bound = ldexp(ulps, -23) * fabs(want) +
                                         ldexp(at * (fabs(up[i]) + 1) + 1, -126);
                    if (!(error <= bound))
                        CHECK(0, "activation %d (%d) of %.9g, %.9g: %.9g, not %.9g", kind, option,
                              (double)v[i], (double)up[i], (double)got[i], want);
                    if (error / bound > worst) worst = error / bound;
                }
            }
            if (test_now.verbose) printf("  activation %d: %.2f of the bound\n", kind, worst);
            tbuf_free(&bv);
            tbuf_free(&bu);
            tbuf_free(&bo);
        }
}

/* ------------------------------------------------------------------ the grouped GEMM */

typedef struct gemm_case {
    int E, n, k;
    int rows[MOST_EXPERTS]; /* of each expert */
    int lead, slack;        /* rows before the first expert's and after the last one's */
    int dtype, c_dtype, a_major, b_major;
    int activation, gate_up, bias; /* moe_activation, never 0 */
    float alpha, limit;
    int gather;           /* row_div; 0: no row_index */
    int none, bad;        /* percent of the rows whose row_index is -1, out of range */
    int a_rows;           /* rows of A; 0: as many as are needed */
    int b_table, c_table; /* an allocation an expert */
    int a_pad, b_pad, c_pad; /* stride - dense; multiples of 8 */
    int no_offset;        /* 1: no expert_offset */
    int fill;             /* TFILL_* */
    int tile;
    int64_t sampled; /* check every so many rows only; 0: all */
} gemm_case;

typedef struct gemm_bufs {
    tbuf a, index, bias, offset, c, c_table, part[MOST_EXPERTS], fault;
    tweights b;
    void *h_a, *h_bias; /* h_a is K-major whatever the device's is */
    int32_t h_offset[MOST_EXPERTS + 1], *h_index;
    int num_rows;
    int64_t a_rows;
    moe_grouped_gemm_desc d;
} gemm_bufs;

static const char* case_text(const gemm_case* c)
{
    static char text[400];
    int at = snprintf(
        text, sizeof text,
        "n=%d k=%d %s -> %s A %s B %s activation=%d (%g %g) gate_up=%d bias=%d gather=%d a_rows=%d tables %d "
        "%d pads %d %d %d fill=%d tile=%d lead=%d slack=%d E=%d:",
        c->n, c->k, moe_dtype_name(c->dtype), moe_dtype_name(c->c_dtype),
        c->a_major == MOE_MAJOR_MN ? "M" : "K", c->b_major == MOE_MAJOR_MN ? "N" : "K", c->activation,
        (double)c->alpha, (double)c->limit, c->gate_up, c->bias, c->gather, c->a_rows, c->b_table, c->c_table, c->a_pad, c->b_pad,
        c->c_pad, c->fill, c->tile, c->lead, c->slack, c->E);
    for (int e = 0; e < c->E && at < (int)sizeof text - 12; ++e)
        at += snprintf(text + at, sizeof text - (size_t)at, " %d", c->rows[e]);
    return text;
}

static int is_gated(const gemm_case* c) { return moe_activation_is_gated(c->activation); }

/* Row of A that row m takes; -1: zeros, -2: zeros and a fault. */
static int64_t a_row_of(const gemm_bufs* b, const gemm_case* c, int m)
{
    int64_t row = c->gather ? b->h_index[m] : m;
    if (row == -1) return -1;
    if (row < 0) return -2;
    if (c->gather) row /= c->gather;
    return row < b->a_rows ? row : -2;
}

static void bufs_new(gemm_bufs* b, const gemm_case* c, trand* r)
{
    const int gated = is_gated(c), separate = gated && c->gate_up == MOE_GATE_UP_SEPARATE;
    const int b_n = c->n * (gated && !separate ? 2 : 1), c_bytes = moe_dtype_bytes(c->c_dtype);
    const int64_t c_stride = c->n + c->c_pad;
    const float scale = (float)(1 / sqrt((double)c->k));
    tweights_want want;
    void* h;
    memset(b, 0, sizeof *b);
    b->h_offset[0] = c->lead;
    for (int e = 0; e < c->E; ++e) b->h_offset[e + 1] = b->h_offset[e] + c->rows[e];
    b->num_rows = b->h_offset[c->E] + c->slack;
    b->a_rows = c->a_rows ? c->a_rows : b->num_rows;
    if (c->a_major == MOE_MAJOR_MN && !c->a_rows) b->a_rows = (b->a_rows + 7) / 8 * 8;

    b->h_a = trows_new(r, b->a_rows, c->k, c->k, c->dtype, c->fill, 1);
    if (c->a_major == MOE_MAJOR_MN) { /* [k, a_rows] */
        const int64_t stride = (b->a_rows + 7) / 8 * 8 + c->a_pad;
        h = test_host(c->k * stride * 2);
        for (int k = 0; k < c->k; ++k)
            for (int64_t i = 0; i < b->a_rows; ++i)
                ((uint16_t*)h)[k * stride + i] = ((const uint16_t*)b->h_a)[i * c->k + k];
        b->a = tbuf_from("a", h, (size_t)moe_extent(c->k, stride, b->a_rows, c->dtype), 16);
        b->d.a_stride = stride;
    } else {
        const int64_t stride = c->k + c->a_pad;
        h = test_host(b->a_rows * stride * 2);
        for (int64_t i = 0; i < b->a_rows; ++i)
            memcpy((uint16_t*)h + i * stride, (const uint16_t*)b->h_a + i * c->k, (size_t)c->k * 2);
        b->a = tbuf_from("a", h, (size_t)moe_extent(b->a_rows, stride, c->k, c->dtype), 16);
        b->d.a_stride = c->a_pad ? stride : 0;
    }
    free(h);

    b->h_index = (int32_t*)test_host(b->num_rows * 4); /* -1 where no expert's row is */
    for (int m = c->lead; m < b->h_offset[c->E]; ++m) {
        const int div = c->gather ? c->gather : 1;
        const int64_t u = trand_int(r, 0, 99);
        b->h_index[m] = (int32_t)trand_int(r, 0, b->a_rows * div - 1);
        if (u < c->none) {
            b->h_index[m] = -1;
        } else if (u < c->none + c->bad) {
            const int64_t how = trand_int(r, 0, 3);
            b->h_index[m] = how == 0   ? (int32_t)(b->a_rows * div)
                            : how == 1 ? INT32_MAX
                            : how == 2 ? -2
                                       : INT32_MIN;
        }
    }
    b->index = tbuf_from("row_index", b->h_index, (size_t)b->num_rows * 4, 4);

    memset(&want, 0, sizeof want);
    want.experts = c->E;
    want.n = b_n;
    want.k = c->k;
    want.dtype = c->dtype;
    want.major = c->b_major;
    want.table = c->b_table;
    want.separate = separate;
    want.pad = c->b_pad;
    want.fill = c->fill;
    want.scale = scale;
    tweights_new(&b->b, &want, r);
    b->h_bias = trows_new(r, c->E, c->n * (gated ? 2 : 1), c->n * (gated ? 2 : 1), c->dtype,
                          c->fill, 1);
    b->bias = tbuf_from("bias", b->h_bias, (size_t)(c->E * c->n * (gated ? 4 : 2)), 2);
    b->offset = tbuf_from("offset", b->h_offset, (size_t)c->E * 4 + 4, 4);
    if (c->c_table) {
        void* address[MOST_EXPERTS];
        for (int e = 0; e < c->E; ++e) {
            b->part[e] = tbuf_new("part of c", (size_t)(c->rows[e] * c_stride * c_bytes),
                                  16 * (size_t)(e % 3));
            address[e] = b->part[e].p;
        }
        b->c_table = tbuf_from("c_table", address, (size_t)c->E * sizeof(void*), 8);
        b->d.c_table = (void* const*)b->c_table.p;
    } else {
        b->c = tbuf_new("c", (size_t)(b->num_rows * c_stride * c_bytes), 16);
        b->d.c = b->c.p;
    }
    b->fault = tfault_new(0);
    b->d.a = b->a.p;
    b->d.a_rows = c->a_rows || c->a_major == MOE_MAJOR_MN ? b->a_rows : 0;
    b->d.row_index = c->gather ? (const int32_t*)b->index.p : (const int32_t*)0;
    b->d.row_div = c->gather == 1 ? 0 : c->gather;
    b->d.b = b->b.d;
    b->d.bias = c->bias ? b->bias.p : (const void*)0;
    b->d.expert_offset = c->no_offset ? (const int32_t*)0 : (const int32_t*)b->offset.p;
    b->d.c_stride = c->c_pad ? c_stride : 0;
    b->d.fault = (uint64_t*)b->fault.p;
    b->d.rank = TEST_RANK;
    b->d.num_experts = c->E;
    b->d.num_rows = b->num_rows;
    b->d.n = c->n;
    b->d.k = c->k;
    b->d.dtype = c->dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->dtype;
    b->d.c_dtype = c->c_dtype == c->dtype ? MOE_DTYPE_DEFAULT : c->c_dtype;
    b->d.a_major = c->a_major == MOE_MAJOR_MN ? MOE_MAJOR_MN : MOE_MAJOR_DEFAULT;
    b->d.activation = c->activation == MOE_ACTIVATION_NONE ? MOE_ACTIVATION_DEFAULT : c->activation;
    b->d.alpha = c->alpha;
    b->d.limit = c->limit;
    b->d.gate_up = c->gate_up == MOE_GATE_UP_CONCATENATED ? MOE_GATE_UP_DEFAULT : c->gate_up;
    b->d.tile = c->tile;
    if (c->tile == MOE_TILE_128x256 && (c->a_major == MOE_MAJOR_MN || c->b_major == MOE_MAJOR_MN))
        b->d.tile = MOE_TILE_128x128; /* the largest tile reads along K only */
}

static void bufs_free(gemm_bufs* b)
{
    tbuf_free(&b->a);
    tbuf_free(&b->index);
    tbuf_free(&b->bias);
    tbuf_free(&b->offset);
    if (b->c.p) tbuf_free(&b->c);
    if (b->c_table.p) tbuf_free(&b->c_table);
    for (int e = 0; e < MOST_EXPERTS; ++e)
        if (b->part[e].p) tbuf_free(&b->part[e]);
    tbuf_free(&b->fault);
    tweights_free(&b->b);
    free(b->h_a);
    free(b->h_bias);
    free(b->h_index);
}

/* Is all of C still the poison? */
static int untouched(const gemm_bufs* b, const gemm_case* c)
{
    int same = 1;
    for (int e = 0; e < c->E && c->c_table; ++e) same &= tbuf_holds(&b->part[e], 0);
    return c->c_table ? same : tbuf_holds(&b->c, 0);
}

/* The exact product of `count` rows [count, n], and sum |a b|. use_up: of the up matrices. `pick`
   names the rows, `offset` the first of each expert's among them. */
static void exact_product(const gemm_bufs* b, const gemm_case* c, const int32_t* pick,
                          const int32_t* offset, int n, int bias_stride, int bias_at, int use_up,
                          double* exact, double* sum)
{
    const int64_t count = offset[c->E];
    double* a = (double*)test_host(count * c->k * 8);
    moe_ref_gemm_desc r;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t from = a_row_of(b, c, pick[i]);
        for (int k = 0; k < c->k; ++k)
            a[i * c->k + k] = from >= 0 ? moe_load(b->h_a, from * c->k + k, c->dtype) : 0;
    }
    memset(&r, 0, sizeof r);
    r.a = a;
    r.a_dtype = MOE_REF_REAL;
    r.expert_offset = offset;
    r.b = tweights_host(&b->b);
    r.b_dtype = c->dtype;
    r.bias = c->bias ? (const uint16_t*)b->h_bias + bias_at : (const void*)0;
    r.bias_dtype = c->dtype;
    r.bias_stride = bias_stride;
    r.num_experts = c->E;
    r.n = n;
    r.k = c->k;
    r.use_up = use_up;
    moe_ref_gemm_f64(&r, exact, sum);
    free(a);
}

static double activation_of(const gemm_case* c, double v, double up)
{
    return moe_ref_activation_f64(c->activation, v, up, c->alpha, c->limit);
}

/* Everything that C holds, against the reference; and that nothing else was written. */
static void compare(const gemm_bufs* b, const gemm_case* c)
{
    const int before = test_now.failures, gated = is_gated(c), n = c->n;
    const int plain = c->activation == MOE_ACTIVATION_NONE;
    const int c_bytes = moe_dtype_bytes(c->c_dtype), b_n = gated ? 2 * n : n;
    const int64_t c_stride = n + c->c_pad;
    const int64_t step = c->sampled ? c->sampled : 1;
    int32_t *pick = (int32_t*)test_host(b->num_rows * 4), offset[MOST_EXPERTS + 1];
    int64_t count = 0, bad = -1, written = 0, wrong = 0, nonzero = 0;
    double *raw, *raw_sum, *exact, *bound;
    float* got;
    char* all = c->c_table ? (char*)0 : (char*)tbuf_copy(&b->c);

    for (int e = 0; e < c->E; ++e) {
        offset[e] = (int32_t)count;
        for (int m = b->h_offset[e]; m < b->h_offset[e + 1]; ++m) {
            if (bad < 0 && a_row_of(b, c, m) == -2) bad = m;
            if ((m - b->h_offset[e]) % step == 0) pick[count++] = m;
        }
    }
    offset[c->E] = (int32_t)count;
    raw = (double*)test_host(count * b_n * 8);
    raw_sum = (double*)test_host(count * b_n * 8);
    exact = (double*)test_host(count * n * 8);
    bound = (double*)test_host(count * n * 8);
    got = (float*)test_host(count * n * 4);

    if (gated && c->gate_up == MOE_GATE_UP_SEPARATE) { /* gates, then ups: beside each other */
        double* half = (double*)test_host(count * n * 8);
        double* half_sum = (double*)test_host(count * n * 8);
        for (int up = 0; up < 2; ++up) {
            exact_product(b, c, pick, offset, n, b_n, up * n, up, half, half_sum);
            for (int64_t i = 0; i < count; ++i) {
                memcpy(raw + i * b_n + up * n, half + i * n, (size_t)n * 8);
                memcpy(raw_sum + i * b_n + up * n, half_sum + i * n, (size_t)n * 8);
            }
        }
        free(half);
        free(half_sum);
    } else {
        exact_product(b, c, pick, offset, b_n, b_n, 0, 0, raw, raw_sum);
    }

    for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < n; ++j) {
            const int pairs = c->gate_up == MOE_GATE_UP_INTERLEAVED;
            const int64_t g = i * b_n + (gated && pairs ? 2 * j : j);
            const int64_t u = gated ? i * b_n + (pairs ? 2 * j + 1 : n + j) : g;
            exact[i * n + j] = activation_of(c, raw[g], raw[u]);
            bound[i * n + j] =
                tactivation_error(c->activation, c->alpha, c->limit, raw[g], raw[u],
                                  tsum_error(raw_sum[g], c->k), tsum_error(raw_sum[u], c->k));
        }

    for (int e = 0; e < c->E; ++e) {
        char* part = c->c_table ? (char*)tbuf_copy(&b->part[e]) : (char*)0;
        for (int64_t i = offset[e]; i < offset[e + 1]; ++i) {
            const int64_t at = c->c_table ? pick[i] - b->h_offset[e] : pick[i];
            for (int j = 0; j < n; ++j)
                got[i * n + j] = moe_load(part ? part : all, at * c_stride + j, c->c_dtype);
        }
        if (part)
            written += test_strays(part, (int64_t)b->part[e].bytes, c_bytes, c_stride, n, 0,
                                   c->rows[e]);
        free(part);
    }
    if (all)
        written += test_strays(all, (int64_t)b->c.bytes, c_bytes, c_stride, n, b->h_offset[0],
                               b->h_offset[c->E]);
    CHECK(written == 0, "%lld bytes that are nobody's were written", (long long)written);

    if (c->fill == TFILL_INT && plain) { /* exact sums, rounded once */
        for (int64_t i = 0; i < count * n; ++i) {
            wrong += !(got[i] == test_rounded(exact[i], c->c_dtype));
            nonzero += exact[i] != 0;
        }
        CHECK(wrong == 0, "%lld of %lld are not the exact sum", (long long)wrong,
              (long long)(count * n));
        if (count > 0 && c->none + c->bad == 0)
            CHECK(4 * nonzero > count * n, "mostly zeros show nothing");
    } else if (count > 0) {
        if (c->c_dtype == MOE_FP32)
            test_within("c", got, MOE_FP32, n, exact, bound, 1, count, n, __FILE__, __LINE__);
        else { /* got was widened to fp32; the ideal is rounded to c's dtype */
            double* ideal = (double*)test_host(count * n * 8);
            for (int64_t i = 0; i < count * n; ++i) ideal[i] = test_rounded(exact[i], c->c_dtype);
            CHECK_CLOSE("c", got, MOE_FP32, n, exact, ideal, count, n);
            for (int64_t i = 0; i < count * n; ++i) /* each element by itself */
                bound[i] += tround(fabs(exact[i]) + bound[i], c->c_dtype);
            test_within("c", got, MOE_FP32, n, exact, bound, 1, count, n, __FILE__, __LINE__);
            free(ideal);
        }
    }
    if (!c->bias) /* rows of zeros give zeros, exactly, whatever the activation */
        for (int64_t i = 0; i < count; ++i)
            for (int j = 0; j < n && a_row_of(b, c, pick[i]) < 0; ++j) wrong += got[i * n + j] != 0;
    CHECK(wrong == 0, "rows without a row of A");
    CHECK_FAULT(&b->fault, bad < 0 ? MOE_FAULT_NONE : MOE_FAULT_BAD_ROW, bad < 0 ? 0 : bad);
    CHECK(tweights_same(&b->b) && tbuf_holds(&b->offset, b->h_offset) &&
              tbuf_holds(&b->bias, b->h_bias) && tbuf_holds(&b->index, b->h_index),
          "an input was written");
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    free(pick);
    free(raw);
    free(raw_sum);
    free(exact);
    free(bound);
    free(got);
    free(all);
}

/* Queues it; 0 where this binary has no code for it, and then it must be refused as documented. */
static int launch(const gemm_bufs* b, const gemm_case* c)
{
    const moe_status want = test_gemm_status(c->dtype, b->d.tile);
    if (!CHECK_STATUS(moe_grouped_gemm(&b->d, test_now.stream), want)) return 0;
    if (want != MOE_OK) CHECK(untouched(b, c), "%s: refused, but C was written", case_text(c));
    return want == MOE_OK;
}

static void run_case(const gemm_case* c, trand* r)
{
    gemm_bufs b;
    bufs_new(&b, c, r);
    if (launch(&b, c)) compare(&b, c);
    bufs_free(&b);
}

/* E experts with these rows each; bf16 where there is code for it, weights as checkpoints have
   them, the small tile. */
static gemm_case normal_case(int E, const int* rows, int n, int k)
{
    gemm_case c;
    memset(&c, 0, sizeof c);
    c.E = E;
    c.n = n;
    c.k = k;
    for (int e = 0; e < E; ++e) c.rows[e] = rows[e];
    c.dtype = c.c_dtype = test_half();
    c.a_major = c.b_major = MOE_MAJOR_K;
    c.activation = MOE_ACTIVATION_NONE;
    c.gate_up = MOE_GATE_UP_CONCATENATED;
    c.tile = MOE_TILE_64x64;
    return c;
}

/* Draws dtypes, majors, activation, pads, tables and the sort of numbers. */
static void randomise(gemm_case* c, trand* r)
{
    c->dtype = trand_int(r, 0, 1) ? MOE_FP16 : MOE_BF16;
    c->c_dtype = trand_int(r, 0, 1) ? MOE_FP32 : c->dtype;
    c->b_major = (int)trand_int(r, MOE_MAJOR_K, MOE_MAJOR_MN);
    c->activation = (int)trand_int(r, MOE_ACTIVATION_NONE, MOE_ACTIVATION_RELU2);
    if (trand_int(r, 0, 2) == 0) c->activation = MOE_ACTIVATION_SWIGLU;
    if (trand_int(r, 0, 2) == 0) c->activation = MOE_ACTIVATION_NONE;
    c->gate_up = (int)trand_int(r, MOE_GATE_UP_CONCATENATED, MOE_GATE_UP_SEPARATE);
    c->bias = (int)trand_int(r, 0, 1);
    c->b_table = (int)trand_int(r, 0, 1);
    c->c_table = (int)trand_int(r, 0, 1);
    c->a_pad = 8 * (int)trand_int(r, 0, 2);
    c->b_pad = 8 * (int)trand_int(r, 0, 2);
    c->c_pad = 8 * (int)trand_int(r, 0, 2);
    c->fill = (int)trand_int(r, TFILL_NORMAL, TFILL_INT);
    c->lead = trand_int(r, 0, 2) ? 0 : (int)trand_int(r, 1, 9);
    c->slack = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 70);
}

/* Every tile with both dtypes, both majors of B, none and SwiGLU, bias and dtype of C. */
static void test_gemm_tiles(void)
{
    trand r = trand_new(3);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile)
        for (int i = 0; i < 4; ++i)
            for (int kind = 0; kind < 4; ++kind) /* none, SwiGLU three ways */
                for (int j = 0; j < 4; ++j) {
                    const int big = tile <= MOE_TILE_128x128;
                    const int one[] = {5, 0, big ? 130 : 34}, two[] = {big ? 20 : 66, 1};
                    gemm_case c = normal_case(3, one, 40, 72);
                    if ((j + kind + i) % 2) c = normal_case(2, two, 72, 136);
                    if (!MOE_ON_HOST && j == 3) c.n = 520;
                    c.tile = tile;
                    c.dtype = i & 1 ? MOE_FP16 : MOE_BF16;
                    c.b_major = i & 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
                    c.activation = kind ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
                    c.gate_up = kind ? kind : MOE_GATE_UP_CONCATENATED;
                    c.bias = j & 1;
                    c.c_dtype = j & 2 ? MOE_FP32 : c.dtype;
                    c.b_table = (int)trand_int(&r, 0, 1);
                    c.c_table = (int)trand_int(&r, 0, 1);
                    c.fill = kind == 0 && i == j ? TFILL_INT : TFILL_NORMAL;
                    run_case(&c, &r);
                }
}

/* Every activation in every layout of gate and up, with biases and without, in both dtypes of C. */
static void test_gemm_activations(void)
{
    static const int rows[] = {33, 0, 40};
    trand r = trand_new(21);
    for (int kind = MOE_ACTIVATION_NONE; kind <= MOE_ACTIVATION_RELU2; ++kind)
        for (int gate_up = MOE_GATE_UP_CONCATENATED; gate_up <= MOE_GATE_UP_SEPARATE; ++gate_up)
            for (int i = 0; i < 4; ++i) {
                gemm_case c = normal_case(3, rows, 72, 40);
                if (!moe_activation_is_gated(kind) && gate_up != MOE_GATE_UP_CONCATENATED) continue;
                c.activation = kind;
                c.gate_up = gate_up;
                c.bias = i & 1;
                c.c_dtype = i & 2 ? MOE_FP32 : c.dtype;
                c.b_major = trand_int(&r, 0, 1) ? MOE_MAJOR_MN : MOE_MAJOR_K;
                c.tile = (int)trand_int(&r, MOE_TILE_128x128, MOE_TILE_64x64);
                if (kind == MOE_ACTIVATION_SWIGLU_CLAMPED && i) {
                    c.alpha = i == 1 ? 0.5f : i == 2 ? 0 : -2.0f;
                    c.limit = i == 1 ? 0 : 0.5f; /* some gates and ups are beyond it */
                }
                run_case(&c, &r);
            }
}

/* The numbers of rows that break things, on each tile. */
static void test_gemm_rows(void)
{
    static const int counts[][9] = {{9, 0, 1, 63, 64, 65, 0, 127, 128}, /* [0] is E */
                                    {3, 129, 0, 31},
                                    {5, 33, 32, 1, 1, 1},
                                    {1, 127},
                                    {1, 1},
                                    {7, 0, 0, 150, 0, 0, 0, 0}, /* all on one expert */
                                    {6, 0, 0, 0, 0, 0, 200},
                                    {8, 200, 0, 0, 0, 0, 0, 0, 0},
                                    {4, 0, 0, 0, 0}};
    trand r = trand_new(4);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile)
        for (size_t i = 0; i < sizeof counts / sizeof *counts; ++i) {
            gemm_case c = normal_case(counts[i][0], counts[i] + 1, 48, 64);
            if (MOE_ON_HOST && tile == MOE_TILE_128x256 && i > 1 && i != 5) continue;
            randomise(&c, &r);
            if (MOE_ON_HOST) c.k = 8 * (int)trand_int(&r, 1, 9);
            c.tile = tile;
            run_case(&c, &r);
        }
}

/* n and k that no tile divides; k = 8 is less than one product. */
static void test_gemm_tails(void)
{
    static const int ns[] = {8, 24, 56, 64, 72, 136, 264}, ks[] = {8, 16, 24, 40, 72, 136, 200};
    static const int rows[] = {3, 20, 0, 41};
    trand r = trand_new(5);
    for (size_t i = 0; i < sizeof ns / sizeof *ns; ++i)
        for (size_t j = 0; j < sizeof ks / sizeof *ks; ++j)
            for (int n = 0; n < (MOE_ON_HOST ? 1 : 8); ++n) {
                gemm_case c = normal_case(4, rows, ns[i], ks[j]);
                if (MOE_ON_HOST) c.rows[3] = 0;
                randomise(&c, &r);
                c.tile = MOE_ON_HOST ? (int)trand_int(&r, MOE_TILE_32x128, MOE_TILE_64x64)
                                     : (int)trand_int(&r, MOE_TILE_128x256, MOE_TILE_64x64);
                run_case(&c, &r);
            }
}

/* Rows of A picked by an index, with a divisor, with rows of zeros and with bad ones. */
static void test_gemm_gather(void)
{
    static const int rows[] = {17, 0, 70, 1, 40};
    trand r = trand_new(6);
    for (int i = 0; i < (MOE_ON_HOST ? 12 : 48); ++i) {
        gemm_case c = normal_case(5, rows, 40, 40);
        randomise(&c, &r);
        c.gather = i % 3 == 0 ? 1 : (int)trand_int(&r, 2, 9);
        c.a_rows = (int)trand_int(&r, 1, 90);
        c.none = i % 4 == 1 ? 20 : 0;
        c.bad = i % 4 >= 2 ? 10 : 0;
        if (i % 4 == 3) c.none = 10;
        c.tile = i % 12 == 7   ? MOE_TILE_128x256
                 : i % 12 == 11 ? MOE_TILE_128x128
                 : i & 1        ? MOE_TILE_32x128
                                : MOE_TILE_64x64;
        run_case(&c, &r);
    }
    { /* without an index, rows past A's end are bad ones too */
        gemm_case c = normal_case(5, rows, 40, 40);
        c.a_rows = 100;
        run_case(&c, &r);
    }
}

/* One expert needs no offsets: all num_rows rows are its own. */
static void test_gemm_no_offset(void)
{
    static const int rows[] = {77};
    trand r = trand_new(7);
    for (int i = 0; i < 4; ++i) {
        gemm_case c = normal_case(1, rows, 72, 48);
        c.no_offset = 1;
        c.fill = i & 1;
        c.b_major = i & 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
        c.c_table = i == 3;
        run_case(&c, &r);
    }
}

/* A read along M, as gradients need it: experts begin and end anywhere in a piece of 8 rows. */
static void test_gemm_a_along_m(void)
{
    static const int some[] = {3, 1, 0, 17, 8, 70, 5}, few[] = {131, 6};
    trand r = trand_new(8);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile)
        for (int i = 0; i < 8; ++i) {
            const int big = tile <= MOE_TILE_128x128;
            gemm_case c = big && i % 2 ? normal_case(2, few, 40, 72) : normal_case(7, some, 56, 40);
            if (MOE_ON_HOST && tile == MOE_TILE_128x256 && i >= 4) continue;
            if (MOE_ON_HOST && big && i % 2 == 0) c.E = 4;
            randomise(&c, &r);
            c.tile = tile;
            c.a_major = MOE_MAJOR_MN;
            c.dtype = i & 1 ? MOE_FP16 : MOE_BF16;
            c.c_dtype = i & 4 ? MOE_FP32 : c.dtype;
            c.b_major = i & 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
            c.fill = i % 3 == 0 ? TFILL_INT : TFILL_NORMAL;
            if (c.fill == TFILL_INT) c.activation = MOE_ACTIVATION_NONE;
            if (i == 5) { /* A ends within a piece of 8 */
                c.lead = c.slack = 0;
                for (int e = 0; e < c.E; ++e) c.a_rows += c.rows[e];
            }
            run_case(&c, &r);
        }
}

/* Offsets that make no sense: a fault that names the first such expert, and nothing is written. */
static void test_gemm_bad_offsets(void)
{
    static const int rows[] = {10, 20, 30, 5};
    trand r = trand_new(9);
    for (int how = 0; how < 4; ++how)
        for (int table = 0; table < 2; ++table) {
            gemm_case c = normal_case(4, rows, 72, 40);
            gemm_bufs b;
            int32_t offset[5];
            c.c_table = table;
            bufs_new(&b, &c, &r);
            memcpy(offset, b.h_offset, sizeof offset);
            if (how == 0) offset[2] = 9;  /* expert 1 ends before it begins */
            if (how == 1) offset[4] = 66; /* past num_rows */
            if (how == 2) offset[0] = -1;
            if (how == 3) offset[2] = INT32_MIN;
            tbuf_put(&b.offset, offset);
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            CHECK(untouched(&b, &c), "how=%d", how);
            CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, how == 0 ? 1 : how == 1 ? 3 : how == 2 ? 0 : 1);
            b.d.fault = 0; /* nobody to tell: still nothing is written */
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            CHECK(untouched(&b, &c), "without a fault word, how=%d", how);
            bufs_free(&b);
        }
}

/* A null or misaligned address of an expert that has rows, in each of the tables: a fault that names
   the expert, and nothing is written. That of an expert without rows is not looked at. */
static void test_gemm_bad_tables(void)
{
    enum { OF_B, OF_UP, OF_C, N = 72, K = 40, BAD = 2 };
    enum { IS_NULL, IS_OFF_BY_8, IS_OFF_BY_2, IS_GOOD };
    static const int rows[] = {10, 0, 30, 5};
    trand r = trand_new(19);
    for (int of = OF_B; of <= OF_C; ++of)
        for (int separate = of == OF_UP; separate < 2; ++separate)
            for (int how = IS_NULL; how <= IS_GOOD; ++how) {
                gemm_case c = normal_case(4, rows, N, K);
                gemm_bufs b;
                char* at[4];
                tbuf table;
                c.activation = separate ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
                c.gate_up = separate ? MOE_GATE_UP_SEPARATE : MOE_GATE_UP_CONCATENATED;
                bufs_new(&b, &c, &r);
                for (int e = 0; e < 4; ++e)
                    at[e] = of == OF_C ? (char*)b.d.c + b.h_offset[e] * N * 2
                                       : (char*)(of == OF_UP ? b.d.b.up : b.d.b.base) + e * N * K * 2;
                if (how == IS_NULL) at[BAD] = 0;
                if (how == IS_OFF_BY_8) at[BAD] += 8;
                if (how == IS_OFF_BY_2) at[BAD] += 2;
                at[1] = (char*)1; /* has no rows */
                table = tbuf_from("table", at, sizeof at, 0);
                if (of == OF_B) {
                    b.d.b.table = (const void* const*)table.p;
                    b.d.b.base = 0;
                } else if (of == OF_UP) {
                    b.d.b.up_table = (const void* const*)table.p;
                    b.d.b.up = 0;
                } else {
                    b.d.c_table = (void* const*)table.p;
                    b.d.c = 0;
                }
                CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
                if (how == IS_GOOD) {
                    compare(&b, &c);
                } else {
                    CHECK(untouched(&b, &c), "table %d, how=%d", of, how);
                    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_TABLE, BAD);
                }
                tbuf_free(&table);
                bufs_free(&b);
            }
}

/* A stop fault of an earlier kernel: nothing happens. A data fault: everything does. */
static void test_gemm_stopped(void)
{
    static const int rows[] = {10, 20};
    trand r = trand_new(10);
    gemm_case c = normal_case(2, rows, 72, 40);
    gemm_bufs b;
    uint64_t word = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 7);
    bufs_new(&b, &c, &r);
    tbuf_put(&b.fault, &word);
    CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
    CHECK(untouched(&b, &c), "after a stop fault");
    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 7);
    word = MOEI_FAULT_KEY(MOE_FAULT_BAD_ID, TEST_RANK, 3);
    tbuf_put(&b.fault, &word);
    CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_ID, 3);
    word = 0;
    tbuf_put(&b.fault, &word);
    compare(&b, &c);
    bufs_free(&b);
}

/* No rows is no error, and needs no buffers. */
static void test_gemm_no_rows(void)
{
    moe_grouped_gemm_desc d;
    moe_gemm_plan p = {};
    memset(&d, 0, sizeof d);
    d.num_experts = 1;
    d.n = d.k = 8;
    d.dtype = test_half();
    CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_OK);
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
    d.n = 12;
    CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_STATUS(MOE_ERR_MULTIPLE, n));
}

/* What the plan says is what a launch takes, and it is sane for any shape. */
static void test_gemm_plan(void)
{
    static const int sizes[] = {8, 72, 512, 7168}, Es[] = {1, 7, 256, MOE_MAX_EXPERTS};
    static const int rows[] = {0, 1, 100, 8192, 1000000};
    for (int i = 0; i < 4 * 4 * 5 * 2 * 5 * 2; ++i) {
        const int tile = i / 160 % 5;
        moe_grouped_gemm_desc d;
        moe_gemm_plan p = {};
        moe_status want;
        test_poison(&p, sizeof p);
        memset(&d, 0, sizeof d);
        d.n = sizes[i % 4];
        d.k = 64;
        d.num_experts = Es[i / 4 % 4];
        d.num_rows = rows[i / 16 % 5];
        d.activation = i / 80 % 2 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
        d.tile = tile;
        d.a = d.b.base = d.c = (void*)(uintptr_t)4096; /* addresses only, nothing runs */
        d.b.base = (void*)((uintptr_t)1 << 44);
        d.c = (void*)((uintptr_t)1 << 45);
        d.expert_offset = (const int32_t*)((uintptr_t)1 << 46);
        d.dtype = i / 800 ? MOE_FP16 : MOE_BF16;
        want = test_gemm_status(d.dtype, tile);
        if (CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), want) && want == MOE_OK)
            test_plan(&p, d.dtype, tile);
    }
    {
        static const int m[] = {0, 128, 128, 32, 64}, n[] = {0, 256, 128, 128, 64};
        for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile) {
            moe_grouped_gemm_desc d;
            moe_gemm_plan p = {};
            memset(&d, 0, sizeof d);
            d.num_experts = 1;
            d.n = d.k = 8;
            d.tile = tile;
            d.dtype = MOE_FP16;
            if (test_gemm_status(MOE_FP16, tile) != MOE_OK) continue;
            CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
            CHECK(p.tile_m == m[tile] && p.tile_n == n[tile], "the name says %dx%d", m[tile], n[tile]);
        }
        CHECK_STATUS(moe_grouped_gemm_plan(0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    }
    CHECK(strcmp(moe_gemm_path_name(MOE_GEMM_PATH_WMMA), "wmma") == 0 &&
              strcmp(moe_gemm_path_name(MOE_GEMM_PATH_HOST), "host") == 0 &&
              strcmp(moe_gemm_path_name(99), "none") == 0,
          "names of the paths");
}

/* The plan and the launch must refuse it alike. Where the plan does not, nothing is launched, since
   that would read and write anywhere. */
static void refused(const moe_grouped_gemm_desc* d, moe_status want, int line)
{
    moe_gemm_plan p = {};
    moe_grouped_gemm_prepared prepared;
    const moe_status s = moe_grouped_gemm_plan(d, &p);
    test_status(s, want, __FILE__, line, "moe_grouped_gemm_plan");
    if (s == MOE_OK) return;
    test_status(moe_grouped_gemm(d, test_now.stream), want, __FILE__, line, "moe_grouped_gemm");
    test_poison(&prepared, sizeof prepared);
    test_status(moe_grouped_gemm_prepare(d, &prepared), want, __FILE__, line,
                "moe_grouped_gemm_prepare");
    test_empty(&prepared, sizeof prepared, line);
}

/* Each wrong field is refused with its own kind and field, and nothing is queued. */
static void test_gemm_refusals(void)
{
    static const int rows[] = {12, 9, 20};
    trand r = trand_new(11);
    gemm_case c = normal_case(3, rows, 64, 40);
    gemm_bufs b;
    moe_grouped_gemm_desc good, d;
    tbuf table;
    void* address[3];
    c.gather = 2;
    c.a_rows = 30;
    c.bias = 1;
    c.activation = MOE_ACTIVATION_SWIGLU;
    c.gate_up = MOE_GATE_UP_SEPARATE;
    bufs_new(&b, &c, &r);
    for (int e = 0; e < 3; ++e) address[e] = (char*)b.c.p + e * 12 * 128;
    table = tbuf_from("table", address, sizeof address, 0);
    good = b.d;
    CHECK_STATUS(moe_grouped_gemm(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.num_experts = 0, MOE_ERR_RANGE, num_experts);
    REFUSED(d.num_experts = -1, MOE_ERR_RANGE, num_experts);
    REFUSED(d.num_experts = MOE_MAX_EXPERTS + 1, MOE_ERR_RANGE, num_experts);
    REFUSED(d.num_rows = -1, MOE_ERR_RANGE, num_rows);
    REFUSED(d.num_rows = MOE_GEMM_MAX_ROWS + 1, MOE_ERR_RANGE, num_rows);
    REFUSED(d.n = 0, MOE_ERR_RANGE, n);
    REFUSED(d.n = -8, MOE_ERR_RANGE, n);
    REFUSED(d.n = 68, MOE_ERR_MULTIPLE, n);
    REFUSED(d.n = (1 << 28) + 8, MOE_ERR_RANGE, n);
    REFUSED(d.k = 0, MOE_ERR_RANGE, k);
    REFUSED(d.k = -8, MOE_ERR_RANGE, k);
    REFUSED(d.k = 36, MOE_ERR_MULTIPLE, k);
    REFUSED(d.dtype = MOE_FP32, MOE_ERR_DTYPE, dtype);
    REFUSED(d.dtype = -1, MOE_ERR_DTYPE, dtype);
    REFUSED(d.dtype = 4, MOE_ERR_DTYPE, dtype);
    REFUSED((d.dtype = MOE_BF16, d.c_dtype = MOE_FP16), MOE_ERR_DTYPE, c_dtype);
    REFUSED(d.c_dtype = 4, MOE_ERR_DTYPE, c_dtype);
    REFUSED(d.c_dtype = -1, MOE_ERR_DTYPE, c_dtype);
    REFUSED((d.dtype = MOE_FP16, d.c_dtype = MOE_BF16), MOE_ERR_DTYPE, c_dtype);
    REFUSED(d.activation = MOE_ACTIVATION_RELU2 + 1, MOE_ERR_OPTION, activation);
    REFUSED(d.activation = -1, MOE_ERR_OPTION, activation);
    REFUSED(d.alpha = 1.702f, MOE_ERR_CONFLICT, alpha);
    REFUSED(d.alpha = NAN, MOE_ERR_CONFLICT, alpha);
    REFUSED(d.limit = 7, MOE_ERR_CONFLICT, limit);
#define CLAMPED d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED
    REFUSED((CLAMPED, d.alpha = INFINITY), MOE_ERR_RANGE, alpha);
    REFUSED((CLAMPED, d.alpha = -INFINITY), MOE_ERR_RANGE, alpha);
    REFUSED((CLAMPED, d.alpha = NAN), MOE_ERR_RANGE, alpha);
    REFUSED((CLAMPED, d.limit = INFINITY), MOE_ERR_RANGE, limit);
    REFUSED((CLAMPED, d.limit = NAN), MOE_ERR_RANGE, limit);
    REFUSED((CLAMPED, d.limit = -1), MOE_ERR_RANGE, limit);
    REFUSED((CLAMPED, d.limit = -1e-40f), MOE_ERR_RANGE, limit);
    REFUSED(d.activation = MOE_ACTIVATION_GELU, MOE_ERR_CONFLICT, b); /* a second matrix */
    REFUSED(d.gate_up = 4, MOE_ERR_OPTION, gate_up);
    REFUSED(d.gate_up = -1, MOE_ERR_OPTION, gate_up);
    REFUSED(d.a_major = 3, MOE_ERR_OPTION, a_major);
    REFUSED(d.a_major = -1, MOE_ERR_OPTION, a_major);
    REFUSED(d.b.major = 3, MOE_ERR_OPTION, b_major);
    REFUSED(d.b.major = -1, MOE_ERR_OPTION, b_major);
    REFUSED(d.row_div = -1, MOE_ERR_RANGE, row_div);
    REFUSED(d.tile = MOE_TILE_64x64 + 1, MOE_ERR_OPTION, tile);
    REFUSED(d.tile = -1, MOE_ERR_OPTION, tile);
    REFUSED((d.tile = MOE_TILE_128x256, d.b.major = MOE_MAJOR_MN), MOE_ERR_CONFLICT, tile);
    REFUSED(d.a_rows = -1, MOE_ERR_RANGE, a_rows);
    REFUSED(d.a_rows = (int64_t)1 << 31, MOE_ERR_RANGE, a_rows);
    REFUSED(d.a_stride = 32, MOE_ERR_STRIDE, a_stride);
    REFUSED(d.a_stride = -40, MOE_ERR_STRIDE, a_stride);
    REFUSED(d.a_stride = 44, MOE_ERR_ALIGN, a_stride);
    REFUSED((d.a_major = MOE_MAJOR_MN, d.row_index = 0), MOE_ERR_ALIGN, a_stride); /* 30 rows */
    REFUSED((d.a_major = MOE_MAJOR_MN, d.row_index = 0, d.a_stride = 24), MOE_ERR_STRIDE, a_stride);
    REFUSED(d.b.row_stride = 32, MOE_ERR_STRIDE, b_stride);
    REFUSED(d.b.row_stride = -40, MOE_ERR_STRIDE, b_stride);
    REFUSED(d.b.row_stride = (int64_t)1 << 60, MOE_ERR_STRIDE, b_stride);
    REFUSED(d.b.expert_stride = (int64_t)1 << 60, MOE_ERR_STRIDE, b_stride);
    REFUSED(d.b.row_stride = 44, MOE_ERR_ALIGN, b_stride);
    REFUSED((d.b.major = MOE_MAJOR_MN, d.b.row_stride = 56), MOE_ERR_STRIDE, b_stride);
    REFUSED((d.b.major = MOE_MAJOR_MN, d.gate_up = 0, d.b.up = 0, d.b.row_stride = 64),
            MOE_ERR_STRIDE, b_stride);
    REFUSED(d.b.expert_stride = -64, MOE_ERR_STRIDE, b_stride);
    REFUSED(d.b.expert_stride = 64 * 40 + 4, MOE_ERR_ALIGN, b_stride);
    REFUSED(d.c_stride = 56, MOE_ERR_STRIDE, c_stride);
    REFUSED(d.c_stride = -64, MOE_ERR_STRIDE, c_stride);
    REFUSED(d.c_stride = INT64_MAX - 7, MOE_ERR_STRIDE, c_stride);
    REFUSED(d.c_stride = 68, MOE_ERR_ALIGN, c_stride);
    REFUSED((d.a_major = MOE_MAJOR_MN, d.a_rows = 32), MOE_ERR_CONFLICT, row_index);
    REFUSED(d.c_table = (void* const*)table.p, MOE_ERR_CONFLICT, c);
    REFUSED(d.b.table = (const void* const*)table.p, MOE_ERR_CONFLICT, b);
    REFUSED(d.b.up_table = (const void* const*)table.p, MOE_ERR_CONFLICT, b);
    REFUSED(d.a = 0, MOE_ERR_NULL, a);
    REFUSED(d.b.base = 0, MOE_ERR_NULL, b);
    REFUSED(d.b.up = 0, MOE_ERR_NULL, b);
    REFUSED(d.c = 0, MOE_ERR_NULL, c);
    REFUSED(d.expert_offset = 0, MOE_ERR_NULL, expert_offset);
    REFUSED(d.a = AT(d.a, 8), MOE_ERR_ALIGN, a);
    REFUSED(d.b.base = AT(d.b.base, 8), MOE_ERR_ALIGN, b);
    REFUSED(d.b.up = AT(d.b.up, 8), MOE_ERR_ALIGN, b);
    REFUSED((d.b.base = 0, d.b.table = (const void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, b);
    REFUSED((d.b.up = 0, d.b.up_table = (const void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, b);
    REFUSED(d.c = AT(d.c, 8), MOE_ERR_ALIGN, c);
    REFUSED((d.c = 0, d.c_table = (void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, c);
    REFUSED(d.row_index = (const int32_t*)AT(d.row_index, 2), MOE_ERR_ALIGN, row_index);
    REFUSED(d.bias = AT(d.bias, 1), MOE_ERR_ALIGN, bias);
    REFUSED(d.expert_offset = (const int32_t*)AT(d.expert_offset, 2), MOE_ERR_ALIGN, expert_offset);
    REFUSED(d.accumulate = 2, MOE_ERR_OPTION, accumulate);
    REFUSED(d.rank = -1, MOE_ERR_RANGE, rank);
    REFUSED(d.rank = MOE_FAULT_MAX_RANK + 1, MOE_ERR_RANGE, rank);
    REFUSED(d.fault = (uint64_t*)AT(d.fault, 4), MOE_ERR_ALIGN, fault);
    REFUSED(d.c = (void*)d.a, MOE_ERR_OVERLAP, c);
    REFUSED(d.c = AT(d.a, 30 * 40 * 2 - 16), MOE_ERR_OVERLAP, c); /* its last 16 bytes */
    REFUSED(d.c = (void*)d.b.base, MOE_ERR_OVERLAP, c);
    REFUSED(d.c = AT(d.b.base, 3 * 64 * 40 * 2 - 16), MOE_ERR_OVERLAP, c);
    REFUSED(d.c = (void*)d.b.up, MOE_ERR_OVERLAP, c);
    REFUSED(d.c = (void*)((uintptr_t)AT(d.bias, 3 * 2 * 64 * 2 - 2) & ~(uintptr_t)15),
            MOE_ERR_OVERLAP, c);
    REFUSED(d.c = (void*)((uintptr_t)AT(d.row_index, 40 * 4) & ~(uintptr_t)15), MOE_ERR_OVERLAP, c);
    REFUSED(d.c = (void*)((uintptr_t)d.expert_offset & ~(uintptr_t)15), MOE_ERR_OVERLAP, c);
    REFUSED(d.fault = (uint64_t*)d.a, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.b.base, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.b.up, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)((uintptr_t)d.bias & ~(uintptr_t)7), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)((uintptr_t)d.row_index & ~(uintptr_t)7), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)((uintptr_t)d.expert_offset & ~(uintptr_t)7), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)AT(d.c, 41 * 64 * 2 - 8), MOE_ERR_OVERLAP, fault);
    { /* last rows of strided buffers, at addresses far from all others: nothing is launched */
        char* const far = (char*)((uintptr_t)1 << 44);
        moe_gemm_plan p = {};
        REFUSED((d.a = far, d.a_stride = 48, d.c = far + 29 * 48 * 2 + 64), MOE_ERR_OVERLAP, c);
        d.c = far + 29 * 48 * 2 + 80; /* where A ends */
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        REFUSED((d.row_index = 0, d.a_major = MOE_MAJOR_MN, d.a = far, d.a_stride = 48,
                 d.c = far + 39 * 48 * 2 + 48),
                MOE_ERR_OVERLAP, c);
        d.c = far + 39 * 48 * 2 + 64; /* 30 of A's columns, and the next multiple of 16 bytes */
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        for (int up = 0; up < 2; ++up) { /* 64 rows an expert, 56 apart, experts 4096 apart */
            const int64_t end = (2 * 4096 + 63 * 56 + 40) * 2;
            REFUSED((d.b.row_stride = 56, d.b.expert_stride = 4096,
                     d.b.base = up ? far + (1 << 20) : far, d.b.up = up ? far : far + (1 << 20),
                     d.c = far + end - 16),
                    MOE_ERR_OVERLAP, c);
            d.c = far + end;
            CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        }
        REFUSED((d.c = far, d.c_stride = 80, d.a = far + (40 * 80 + 56) * 2), MOE_ERR_OVERLAP, c);
        REFUSED((d.c = far, d.c_stride = 80, d.fault = (uint64_t*)(far + (40 * 80 + 60) * 2)),
                MOE_ERR_OVERLAP, fault);
        REFUSED((d.c_dtype = MOE_FP32, d.c = far, d.c_stride = 80,
                 d.fault = (uint64_t*)(far + (40 * 80 + 62) * 4)),
                MOE_ERR_OVERLAP, fault);
        d.fault = (uint64_t*)(far + (40 * 80 + 64) * 4); /* where C ends */
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        REFUSED((d.bias = far, d.c = far + 3 * 2 * 64 * 2 - 16), MOE_ERR_OVERLAP, c);
    }
    { /* without rows nothing but the offsets must be there */
        moe_gemm_plan p = {};
        REFUSED((d.num_rows = 0, d.expert_offset = 0), MOE_ERR_NULL, expert_offset);
        REFUSED((d.num_rows = 0, d.expert_offset = (const int32_t*)AT(d.expert_offset, 2)),
                MOE_ERR_ALIGN, expert_offset);
        REFUSED((d.num_rows = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
        d = good;
        d.num_rows = 0;
        d.a = d.b.base = d.b.up = d.c = 0;
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        d.c = (void*)good.a; /* of which nothing is read or written */
        d.a = good.a;
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
    }
    /* the tables are read while C and the fault word are written */
    REFUSED((d.b.base = 0, d.b.table = (const void* const*)AT(d.c, 64)), MOE_ERR_OVERLAP, c);
    REFUSED((d.b.up = 0, d.b.up_table = (const void* const*)AT(d.c, 64)), MOE_ERR_OVERLAP, c);
    REFUSED((d.b.base = 0, d.b.table = (const void* const*)d.fault), MOE_ERR_OVERLAP, fault);
    REFUSED((d.c = 0, d.c_table = (void* const*)d.fault), MOE_ERR_OVERLAP, fault);
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.c, 0), "a refused call wrote c");
    CHECK(tweights_same(&b.b) && tbuf_holds(&b.bias, b.h_bias), "or an input");
    CHECK(tbuf_holds(&table, address), "or a table");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    CHECK_STATUS(moe_grouped_gemm(&good, test_now.stream), MOE_OK);
    compare(&b, &c);
    tbuf_free(&table);
    bufs_free(&b);
}

/* The table says of each kernel what its launch will take. */
static void test_gemm_table(void)
{
    int rows = 0;
    for (const moei_variant* v = moei_gemm_variants; v->kernel; ++v, ++rows) {
        const moe_gemm_shape f = v->shape;
        CHECK(v->smem == moei_ring_bytes(f) + moei_staging_bytes(f) &&
                  v->path == MOE_GEMM_PATH_WMMA,
              "%s: %d bytes, path %d", v->name, (int)v->smem, v->path);
        CHECK(f.threads == 32 * f.warps_m * f.warps_n && f.wm * f.warps_m == f.tile_m &&
                  f.wn * f.warps_n == f.tile_n && f.threads * 8 / f.tile_k == 32,
              "%s: a shape that does not fit together", v->name);
        CHECK(moei_variant_find(moei_gemm_variants, v->tile, f.dtype, f.a_major, f.b_major) == v,
              "%s: another kernel has its place", v->name);
    }
    CHECK(rows > 0 && rows % 4 == 0, "%d kernels", rows);
}

/* A kernel of one's own that computes whole products tile by tile: a block an expert, which reads the
   offsets itself. */
#define OWN_LIST(X)                                                                               \
    X(64x64, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K)                                                  \
    X(64x64, MOE_BF16, MOE_MAJOR_MN, MOE_MAJOR_MN)                                                \
    X(32x128, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN)                                                \
    X(64x64, MOE_FP16, MOE_MAJOR_MN, MOE_MAJOR_K)  

typedef struct own_args {
    moe_grouped_gemm_args d;
    int32_t tile, dtype, a_major, b_major, tile_rows, column_tiles;
} own_args;

MOE_KERNEL(256, 1) own_kernel(MOE_ARG(own_args) a)
{
    MOE_SHARED_DYNAMIC(shared);
    const int e = (int)blockIdx.x;
    const int begin = a.d.expert_offset[e], end = a.d.expert_offset[e + 1];
    const int first = a.a_major == MOE_MAJOR_MN ? begin / 8 * 8 : begin;
    for (int row = first; begin < end && row < end; row += a.tile_rows)
        for (int column = 0; column < a.column_tiles; ++column) {
            const moe_tile_position t = {e, begin, end, row, column};
#define OWN_TILE(name, dt, am, bm)                                                                \
    if (a.tile == MOE_TILE_##name && a.dtype == dt && a.a_major == am && a.b_major == bm &&       \
        MOEI_CODE_HERE(dt == MOE_BF16 ? 80 : 75, MOEI_CODE_ANY))                                  \
        moe_gemm_tile(&a.d, t, shared, moe_gemm_shape_of(MOE_GEMM_SHAPE_##name, dt, am, bm));
            OWN_LIST(OWN_TILE)
#undef OWN_TILE
        }
}

static void test_gemm_own_kernel(void)
{
    static const struct {
        int tile, dtype, a_major, b_major;
    } variant[] = {
#define OWN_ROW(name, dt, am, bm) {MOE_TILE_##name, dt, am, bm},
        OWN_LIST(OWN_ROW)
#undef OWN_ROW
    };
    static const int some[] = {70, 0, 9, 33};
    trand r = trand_new(22);
    for (int v = 0; v < 4; ++v)
        for (int i = 0; i < 6; ++i) {
            gemm_case c = normal_case(4, some, i & 1 ? 72 : 136, i & 2 ? 40 : 136);
            gemm_bufs b;
            own_args a;
            moe_gemm_plan p = {};
            moe_launch_config l;
            if (test_gemm_status(variant[v].dtype, variant[v].tile) != MOE_OK) continue;
            randomise(&c, &r);
            c.tile = variant[v].tile;
            c.dtype = variant[v].dtype;
            c.a_major = variant[v].a_major;
            c.b_major = variant[v].b_major;
            c.c_dtype = i & 1 ? MOE_FP32 : c.dtype;
            if (i >= 4 && c.a_major == MOE_MAJOR_K) {
                c.gather = 3;
                c.a_rows = 50;
                c.none = c.bad = 10;
            }
            bufs_new(&b, &c, &r);
            memset(&a, 0, sizeof a);
            CHECK_STATUS(moe_gemm_tile_resolve(&b.d, &a.d), MOE_OK);
            CHECK_STATUS(moe_grouped_gemm_plan(&b.d, &p), MOE_OK);
            a.tile = c.tile;
            a.dtype = c.dtype;
            a.a_major = c.a_major;
            a.b_major = c.b_major;
            a.tile_rows = p.tile_m;
            a.column_tiles = (c.n + p.tile_n - 1) / p.tile_n;
            if (is_gated(&c)) a.column_tiles = (2 * c.n + p.tile_n - 1) / p.tile_n;
#define OWN_SMEM(name, dt, am, bm)                                                                 \
    if (c.tile == MOE_TILE_##name && c.a_major == am && c.b_major == bm)                           \
        l = moe_grid(c.E, p.threads,                                                               \
                     moe_gemm_tile_smem(moe_gemm_shape_of(MOE_GEMM_SHAPE_##name, dt, am, bm)),     \
                     test_now.stream);
            OWN_LIST(OWN_SMEM)
#undef OWN_SMEM
            CHECK_STATUS(MOE_LAUNCH(own_kernel, l, a), MOE_OK);
            compare(&b, &c);
            bufs_free(&b);
        }
    {
        moe_grouped_gemm_desc d;
        moe_grouped_gemm_args a, was;
        memset(&d, 0, sizeof d);
        memset(&a, 0xab, sizeof a);
        was = a;
        CHECK_STATUS(moe_gemm_tile_resolve(0, &a), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_gemm_tile_resolve(&d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_gemm_tile_resolve(&d, &a), MOE_STATUS(MOE_ERR_RANGE, num_experts));
        CHECK(!memcmp(&a, &was, sizeof a), "a refused descriptor filled in arguments");
    }
}

/* C may begin where A ends. */
static void test_gemm_neighbours(void)
{
    enum { ROWS = 20, N = 64, K = 40 };
    static const int rows[] = {ROWS};
    trand r = trand_new(15);
    gemm_case c = normal_case(1, rows, N, K);
    gemm_bufs b;
    char* both = (char*)test_host(ROWS * K * 2 + ROWS * N * 2);
    tbuf joined;
    bufs_new(&b, &c, &r);
    memcpy(both, b.h_a, ROWS * K * 2);
    joined = tbuf_from("a and c", both, ROWS * K * 2 + ROWS * N * 2, 0);
    b.d.a = joined.p;
    b.d.c = (char*)joined.p + ROWS * K * 2;
    CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
    {
        char* got = (char*)tbuf_copy(&joined);
        CHECK(memcmp(got, b.h_a, ROWS * K * 2) == 0, "A was written");
        tbuf_put(&b.c, got + ROWS * K * 2);
        compare(&b, &c);
        free(got);
    }
    free(both);
    tbuf_free(&joined);
    bufs_free(&b);
}

static moe_status call_gemm(void* d, cudaStream_t stream)
{
    return moe_grouped_gemm((const moe_grouped_gemm_desc*)d, stream);
}

static void test_gemm_same_bits(void)
{
    static const int rows[] = {40, 0, 70};
    trand r = trand_new(12);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile) {
        gemm_case c = normal_case(3, rows, 72, 136);
        gemm_bufs b;
        tbuf* out[1];
        c.tile = tile;
        c.activation = tile & 1 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
        c.c_dtype = MOE_FP32;
        if (test_gemm_status(c.dtype, tile) != MOE_OK) continue;
        bufs_new(&b, &c, &r);
        out[0] = &b.c;
        test_same_bits("gemm", call_gemm, &b.d, out, 1, MOE_ON_HOST ? 2 : 100);
        compare(&b, &c);
        bufs_free(&b);
    }
}

/* accumulate: the product is added to what C holds, in fp32, and rounded once. */
static void test_gemm_accumulate(void)
{
    static const int rows[] = {40, 0, 70};
    trand r = trand_new(32);
    for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile)
        for (int kind = 0; kind < 3; ++kind) {
            gemm_case c = normal_case(3, rows, 72, 136);
            gemm_bufs b;
            const int64_t size = 110 * 72;
            tbuf exact;
            float* v;
            char* got;
            int64_t wrong = 0, at = 0;
            c.tile = tile;
            c.activation = kind ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
            c.gate_up = kind == 2 ? MOE_GATE_UP_INTERLEAVED : MOE_GATE_UP_CONCATENATED;
            if (test_gemm_status(c.dtype, tile) != MOE_OK) continue;
            bufs_new(&b, &c, &r);
            exact = tbuf_new("exact", (size_t)size * 4, 16);
            {
                moe_grouped_gemm_desc d = b.d;
                d.c = exact.p;
                d.c_dtype = MOE_FP32;
                CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_OK);
                v = (float*)tbuf_copy(&exact);
                d.accumulate = 1;
                CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_OK);
                got = (char*)tbuf_copy(&exact);
                for (int64_t i = 0; i < size; ++i) wrong += ((float*)got)[i] != 2 * v[i];
                CHECK(wrong == 0, "fp32: %lld are not the double, kind %d", (long long)wrong, kind);
                free(got);
            }
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            b.d.accumulate = 1;
            CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
            got = (char*)tbuf_copy(&b.c);
            for (int64_t i = 0; i < size; ++i) {
                const float sum = (float)test_rounded(v[i], c.dtype) + v[i];
                if (moe_load(got, i, c.dtype) != (float)test_rounded(sum, c.dtype)) ++wrong, at = i;
            }
            CHECK(wrong == 0, "%s: %lld are wrong, the last at %lld, kind %d",
                  moe_dtype_name(c.dtype), (long long)wrong, (long long)at, kind);
            free(v), free(got);
            tbuf_free(&exact);
            bufs_free(&b);
        }
}

/* A captured product, launched again with other offsets, other rows and other inputs. */
static void test_gemm_graph(void)
{
    static const int rows[] = {30, 10, 0, 25};
    trand r = trand_new(13);
    gemm_case c = normal_case(4, rows, 72, 72);
    gemm_bufs b;
    tgraph g;
    c.gather = 3;
    c.a_rows = 25;
    bufs_new(&b, &c, &r);
    CHECK_STATUS(moe_grouped_gemm_preload(), MOE_OK);
    if (tgraph_capture(&g, call_gemm, &b.d)) {
        CHECK(untouched(&b, &c), "capture itself runs nothing");
        for (int run = 0; run < 3; ++run) {
            for (int e = 0, left = b.num_rows; e < 4; ++e) {
                c.rows[e] = run == 0 ? rows[e] : (int)trand_int(&r, 0, left);
                left -= c.rows[e];
                b.h_offset[e + 1] = b.h_offset[e] + c.rows[e];
            }
            for (int m = 0; m < b.num_rows; ++m) b.h_index[m] = (int32_t)trand_int(&r, 0, 74);
            if (run == 2) b.h_index[b.h_offset[4] - 1] = 75;
            tbuf_put(&b.offset, b.h_offset);
            tbuf_put(&b.index, b.h_index);
            tbuf_poison(&b.c);
            tgraph_launch(&g);
            compare(&b, &c);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
}

/* Every tile, and the one that the header chooses, at sizes where tiles and bands are many. */
static void test_gemm_large(void)
{
#if !MOE_ON_HOST
    trand r = trand_new(14);
    for (int tile = MOE_TILE_AUTO; tile <= MOE_TILE_64x64; ++tile)
        for (int i = 0; i < 4; ++i) {
            const int none[] = {0};
            gemm_case c = normal_case(1, none, i & 1 ? 1032 : 2048, i & 1 ? 1000 : 1024);
            c.E = i & 1 ? 37 : 8;
            for (int e = 0; e < c.E; ++e)
                c.rows[e] = e == 3 ? 2700 : (int)trand_int(&r, 0, i & 1 ? 90 : 700);
            c.tile = tile;
            c.gather = i == 1 ? 0 : 4;
            c.a_rows = c.gather ? 3000 : 0;
            c.dtype = c.c_dtype = i & 2 ? MOE_FP16 : MOE_BF16;
            if (i == 3) c.c_dtype = MOE_FP32;
            c.activation = i == 0 || i == 3 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
            c.b_major = i == 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
            c.bias = i & 1;
            c.sampled = 251;
            run_case(&c, &r);
        }
#endif
}

/* What lies far apart: rows of A; experts of B, or each expert's gate and up; rows of B, gates and
   ups of one matrix; rows of C. A and B may lie along M and N, C behind a table. */
enum { A_FAR, A_GATHERED, A_ALONG_M, B_EXPERTS, B_UP, B_ROWS, B_HALVES, B_ALONG_N, C_FAR, C_TABLE };

static gemm_case far_case(int what)
{
    static const int some[] = {3, 0, 2, 1, 2}, one[] = {8};
    const int rows_of_b = what == B_ROWS || what == B_HALVES || what == B_ALONG_N;
    gemm_case c = normal_case(rows_of_b ? 1 : 5, rows_of_b ? one : some, 24, 40);
    if (what == A_GATHERED) c.gather = 2, c.a_rows = 5;
    if (what == A_ALONG_M) c.a_major = MOE_MAJOR_MN;
    if (what == B_UP || what == B_HALVES) c.activation = MOE_ACTIVATION_SWIGLU;
    if (what == B_UP) c.gate_up = MOE_GATE_UP_SEPARATE;
    if (what == B_ROWS) c.n = 72; /* more than the rows that a loader takes at once */
    if (what == B_ALONG_N) c.b_major = MOE_MAJOR_MN;
    if (what == C_TABLE) c.c_table = 1;
    return c;
}

/* Lays `wide` out for it and points d there; returns what its rows are to hold. Null: no memory. */
static void* far_new(twide* wide, tbuf* table, moe_grouped_gemm_desc* d, const gemm_bufs* b,
                     const gemm_case* c, int what)
{
    const int64_t matrix = c->n * c->k; /* elements of one of B's */
    const int64_t count = what == A_ALONG_M || what == B_ALONG_N ? c->k
                          : what <= A_GATHERED                   ? b->a_rows
                          : what <= B_UP                         ? c->E
                          : what == B_ROWS                       ? c->n
                          : what == B_HALVES                     ? 2 * c->n
                                                                 : b->num_rows;
    const int64_t cols = what == A_ALONG_M    ? b->a_rows
                         : what == B_EXPERTS  ? matrix
                         : what == B_UP       ? 2 * matrix
                         : what >= B_ALONG_N  ? c->n
                                              : c->k;
    char* dense;
    if (!twide_new(wide, "the far rows", count, cols, c->dtype)) return 0;
    if (what <= A_ALONG_M) {
        dense = (char*)tbuf_copy(&b->a);
        d->a = wide->p;
        d->a_stride = wide->stride;
    } else if (what < C_FAR) {
        const char *gate = (const char*)b->b.host[0][0], *up = (const char*)b->b.host[1][0];
        dense = (char*)test_host(count * cols * 2);
        if (!up) memcpy(dense, gate, (size_t)(count * cols * 2));
        for (int e = 0; e < c->E && up; ++e) { /* an expert's gate, and behind it its up */
            memcpy(dense + e * matrix * 4, gate + e * matrix * 2, (size_t)matrix * 2);
            memcpy(dense + e * matrix * 4 + matrix * 2, up + e * matrix * 2, (size_t)matrix * 2);
        }
        d->b.base = wide->p;
        if (up) d->b.up = wide->p + matrix * 2;
        if (what <= B_UP) d->b.expert_stride = wide->stride;
        else d->b.row_stride = wide->stride;
    } else {
        void* address[MOST_EXPERTS];
        dense = (char*)test_host(count * cols * 2);
        d->c_stride = wide->stride;
        if (what == C_FAR) {
            d->c = wide->p;
        } else {
            for (int e = 0; e < c->E; ++e)
                address[e] = wide->p + b->h_offset[e] * wide->stride * wide->elem;
            *table = tbuf_from("c_table", address, (size_t)c->E * sizeof(void*), 0);
            d->c_table = (void* const*)table->p;
        }
    }
    return dense;
}

/* All rows of a dense C, wherever the case has them. */
static char* all_rows(const gemm_bufs* b, const gemm_case* c)
{
    const int64_t row = c->n * moe_dtype_bytes(c->c_dtype);
    char* rows = (char*)(c->c_table ? test_host(b->num_rows * row) : tbuf_copy(&b->c));
    for (int e = 0; e < c->E && c->c_table; ++e) tbuf_get(&b->part[e], rows + b->h_offset[e] * row);
    return rows;
}

/* Rows or experts that lie past 2^32 elements: on every tile the bits of the same call on dense
   ones. */
static void test_gemm_past_2_31(void)
{
    trand r = trand_new(16);
    if (!twide_possible(2)) return;
    for (int what = A_FAR; what <= C_TABLE; ++what) {
        const gemm_case c = far_case(what);
        gemm_bufs b;
        moe_grouped_gemm_desc d;
        tbuf table;
        twide wide;
        void* dense;
        memset(&table, 0, sizeof table);
        bufs_new(&b, &c, &r);
        d = b.d;
        dense = far_new(&wide, &table, &d, &b, &c, what);
        for (int tile = MOE_TILE_64x64; tile >= MOE_TILE_128x256 && dense; --tile) {
            char* want;
            if (tile == MOE_TILE_128x256 && (what == A_ALONG_M || what == B_ALONG_N)) continue;
            d.tile = b.d.tile = tile;
            if (!c.c_table) tbuf_poison(&b.c);
            for (int e = 0; e < c.E && c.c_table; ++e) tbuf_poison(&b.part[e]);
            if (!launch(&b, &c)) continue;
            compare(&b, &c);
            want = all_rows(&b, &c);
            if (!c.c_table) tbuf_poison(&b.c);
            twide_poison(&wide);
            if (what < C_FAR) twide_put(&wide, dense);
            CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), MOE_OK);
            if (what < C_FAR) CHECK(tbuf_holds(&b.c, want), "far %d, tile %d", what, tile);
            CHECK(twide_holds(&wide, what < C_FAR ? dense : want), "far %d, tile %d", what, tile);
            CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
            free(want);
        }
        if (dense) twide_free(&wide);
        if (table.p) tbuf_free(&table);
        free(dense);
        bufs_free(&b);
    }
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_gemm_schedule);
    RUN(test_gemm_schedule_bad);
    RUN(test_gemm_mma);
    RUN(test_gemm_activations_alone);
    RUN(test_gemm_tiles);
    RUN(test_gemm_activations);
    RUN(test_gemm_rows);
    RUN(test_gemm_tails);
    RUN(test_gemm_gather);
    RUN(test_gemm_no_offset);
    RUN(test_gemm_a_along_m);
    RUN(test_gemm_bad_offsets);
    RUN(test_gemm_bad_tables);
    RUN(test_gemm_stopped);
    RUN(test_gemm_no_rows);
    RUN(test_gemm_plan);
    RUN(test_gemm_refusals);
    RUN(test_gemm_table);
    RUN(test_gemm_own_kernel);
    RUN(test_gemm_neighbours);
    RUN(test_gemm_same_bits);
    RUN(test_gemm_accumulate);
    RUN(test_gemm_graph);
    RUN(test_gemm_large);
    RUN(test_gemm_past_2_31);
    return test_end();
}
