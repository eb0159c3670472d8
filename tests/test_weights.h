/* test_weights.h: what the tests of the grouped GEMM and of the stations built on it share: the
   experts' weights in every form that moe_weights allows, on the device and beside it on the host,
   for the reference; what code this binary holds; what every plan must say. Included after
   test.h. */
#ifndef MOE_TESTS_TEST_WEIGHTS_H
#define MOE_TESTS_TEST_WEIGHTS_H

#include "moe/base/cuda.cuh"
#include "moe/gemm/desc.h"
#include "moe/layout.h"

#include "tests/test_refusals.h"

#define TWEIGHTS_MOST 80 /* experts with an allocation each */

/* How the numbers of a buffer are drawn. */
enum { TFILL_NORMAL, TFILL_INT };

/* Experts' matrices [n, k] as wanted. */
typedef struct tweights_want {
    int experts, n, k, dtype;
    int major;    /* moe_major */
    int table;    /* 1: an allocation an expert, reached through a table; 0: one block */
    int separate; /* 1: a second matrix beside the first, the up projection */
    int pad;      /* row stride - dense, elements; also added to the expert stride */
    int fill;     /* TFILL_* */
    float scale;  /* factor on normal numbers */
} tweights_want;

typedef struct tweights {
    moe_weights d, h; /* device addresses; host addresses */
    int parts;        /* buffers of each of the two */
    tbuf part[2][TWEIGHTS_MOST], table[2];
    void* host[2][TWEIGHTS_MOST];
} tweights;

/* What rounding a number of at most this size to the dtype may change it by. */
MOEI_UNUSED static double tround(double size, int dtype)
{
    if (dtype == MOE_FP32) return ldexp(size, -24);
    return dtype == MOE_FP16 ? ldexp(size, -11) + ldexp(1, -25) : ldexp(size, -8);
}

/* One number as `fill` says. */
MOEI_UNUSED static float tweights_draw(trand* r, int fill, float scale)
{
    return fill == TFILL_INT ? (float)trand_int(r, -2, 2) : trand_normal(r) * scale;
}

MOEI_UNUSED static void tweights_new(tweights* w, const tweights_want* want, trand* r)
{
    const int mn = want->major == MOE_MAJOR_MN;
    const int64_t rows = mn ? want->k : want->n, cols = mn ? want->n : want->k;
    const int64_t row = cols + want->pad, matrix = row * rows + want->pad;
    memset(w, 0, sizeof *w);
    w->parts = want->table ? want->experts : 1;
    for (int up = 0; up < (want->separate ? 2 : 1); ++up) {
        const int of_part = want->table ? 1 : want->experts;
        const int64_t elems = (of_part - 1) * matrix + (rows - 1) * row + cols;
        void* address[TWEIGHTS_MOST];
        for (int i = 0; i < w->parts; ++i) {
            void* p = test_host(elems * 2); /* NaN in the gaps */
            for (int e = 0; e < of_part; ++e)
                for (int64_t y = 0; y < rows; ++y)
                    for (int64_t x = 0; x < cols; ++x)
                        moe_store(p, e * matrix + y * row + x, want->dtype,
                                  tweights_draw(r, want->fill, want->scale));
            w->host[up][i] = p;
            w->part[up][i] = tbuf_from("weights", p, (size_t)elems * 2, 16 * (size_t)(i % 3));
            address[i] = w->part[up][i].p;
        }
        if (want->table) {
            w->table[up] = tbuf_from("weight table", address, (size_t)w->parts * sizeof(void*), 8);
            if (up) {
                w->d.up_table = (const void* const*)w->table[up].p;
                w->h.up_table = (const void* const*)w->host[up];
            } else {
                w->d.table = (const void* const*)w->table[up].p;
                w->h.table = (const void* const*)w->host[up];
            }
        } else if (up) {
            w->d.up = w->part[up][0].p;
            w->h.up = w->host[up][0];
        } else {
            w->d.base = w->part[up][0].p;
            w->h.base = w->host[up][0];
        }
    }
    if (want->pad) {
        w->d.row_stride = row;
        w->d.expert_stride = want->table ? 0 : matrix;
    }
    w->d.major = want->major == MOE_MAJOR_K && want->pad == 0 ? 0 : want->major; /* 0 is K */
    w->h.row_stride = w->d.row_stride;
    w->h.expert_stride = w->d.expert_stride;
    w->h.major = w->d.major;
}

/* The reference's view: host addresses. A moved tweights has its tables elsewhere, so ask. */
MOEI_UNUSED static moe_weights tweights_host(const tweights* w)
{
    moe_weights h = w->h;
    if (h.table) h.table = (const void* const*)w->host[0];
    if (h.up_table) h.up_table = (const void* const*)w->host[1];
    return h;
}

/* Are the device's copies what they were? */
MOEI_UNUSED static int tweights_same(const tweights* w)
{
    int same = 1;
    for (int up = 0; up < 2; ++up)
        for (int i = 0; i < w->parts; ++i)
            if (w->host[up][i]) same &= tbuf_holds(&w->part[up][i], w->host[up][i]);
    return same;
}

MOEI_UNUSED static void tweights_free(tweights* w)
{
    for (int up = 0; up < 2; ++up) {
        for (int i = 0; i < w->parts; ++i) {
            if (!w->host[up][i]) continue;
            tbuf_free(&w->part[up][i]);
            free(w->host[up][i]);
        }
        if (w->table[up].p) tbuf_free(&w->table[up]);
    }
}

/* A [rows, cols] array `stride` elements a row, NaN in the gaps between the rows. */
MOEI_UNUSED static void* trows_new(trand* r, int64_t rows, int64_t stride, int64_t cols, int dtype,
                                   int fill, float scale)
{
    void* p = test_host(rows * stride * 4);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j)
            moe_store(p, i * stride + j, dtype, tweights_draw(r, fill, scale));
    return p;
}

/* The parameters of an MLP: w1 and w2 as activation and gate_up say, and a bias for each. */
typedef struct tmlp_want {
    int experts, hidden, intermediate, dtype;
    int activation, gate_up; /* 0: SwiGLU, concatenated */
    int major1, major2, table1, table2; /* of the two weights, as in tweights_want */
    int pad;
} tmlp_want;

typedef struct tmlp {
    tweights w1, w2;
    tbuf bias1, bias2;
    void *h_bias1, *h_bias2;
} tmlp;

MOEI_UNUSED static void tmlp_new(tmlp* m, const tmlp_want* want, trand* r)
{
    const int64_t E = want->experts, H = want->hidden, I = want->intermediate;
    const int gated = want->activation == 0 || moe_activation_is_gated(want->activation);
    const int64_t columns = gated ? 2 * I : I; /* of bias1 */
    tweights_want w;
    memset(&w, 0, sizeof w);
    w.experts = want->experts;
    w.dtype = want->dtype;
    w.pad = want->pad;
    w.separate = gated && want->gate_up == MOE_GATE_UP_SEPARATE;
    w.n = gated && !w.separate ? 2 * want->intermediate : want->intermediate;
    w.k = want->hidden;
    w.major = want->major1;
    w.table = want->table1;
    w.scale = (float)(1.5 / sqrt((double)H));
    tweights_new(&m->w1, &w, r);
    w.separate = 0;
    w.n = want->hidden;
    w.k = want->intermediate;
    w.major = want->major2;
    w.table = want->table2;
    w.scale = (float)(1.5 / sqrt((double)I));
    tweights_new(&m->w2, &w, r);
    m->h_bias1 = trows_new(r, E, columns, columns, want->dtype, TFILL_NORMAL, 0.5f);
    m->h_bias2 = trows_new(r, E, H, H, want->dtype, TFILL_NORMAL, 0.5f);
    m->bias1 = tbuf_from("bias1", m->h_bias1, (size_t)(E * columns) * 2, 2);
    m->bias2 = tbuf_from("bias2", m->h_bias2, (size_t)(E * H) * 2, 2);
}

/* Are the device's copies what they were? */
MOEI_UNUSED static int tmlp_same(const tmlp* m)
{
    return tweights_same(&m->w1) && tweights_same(&m->w2) && tbuf_holds(&m->bias1, m->h_bias1) &&
           tbuf_holds(&m->bias2, m->h_bias2);
}

MOEI_UNUSED static void tmlp_free(tmlp* m)
{
    tweights_free(&m->w1);
    tweights_free(&m->w2);
    tbuf_free(&m->bias1);
    tbuf_free(&m->bias2);
    free(m->h_bias1);
    free(m->h_bias2);
}

/* What the GEMM must answer to this dtype and tile on this device: MOE_OK, or the refusal where the
   device cannot, or where this binary was compiled for too little (-arch=sm_75, say) to hold the
   code: bf16 begins with sm_80; the largest tile is compiled for sm_90 up to below sm_120. */
#if !MOE_ON_HOST
typedef struct tcode_args {
    int32_t nothing;
} tcode_args;
MOE_KERNEL(32, 1) tcode_kernel(MOE_ARG(tcode_args) d) { (void)d; }
#endif

MOEI_UNUSED static moe_status test_gemm_status(int dtype, int tile)
{
#if !MOE_ON_HOST
    static const int kib[] = {0, 200, 68, 82, 0}; /* of shared memory: each tile takes more */
    const moe_status no_dtype = MOE_STATUS(MOE_ERR_DEVICE, dtype);
    const moe_status no_tile = MOE_STATUS(MOE_ERR_DEVICE, tile);
    cudaFuncAttributes code; /* one compilation for all kernels of a file */
    moe_device dev;
    TEST_CUDA(cudaFuncGetAttributes(&code, (const void*)tcode_kernel));
    CHECK_STATUS(moe_device_query(&dev), MOE_OK);
    if (dtype == MOE_BF16 && dev.major < 8) return no_dtype;
    if (dtype == MOE_BF16 && code.ptxVersion < 80) return tile ? no_tile : no_dtype;
    if (tile == MOE_TILE_128x256 && (code.ptxVersion < 90 || code.ptxVersion >= 120))
        return no_tile;
    if (dev.smem_block < kib[tile] * 1024) return no_tile;
#else
    (void)dtype;
    (void)tile;
#endif
    return MOE_OK;
}

/* The dtype of the tests that are not about dtypes: bf16, or fp16 where only that runs. */
MOEI_UNUSED static int test_half(void)
{
    return test_gemm_status(MOE_BF16, MOE_TILE_AUTO) == MOE_OK ? MOE_BF16 : MOE_FP16;
}

/* A plan for a product that asked for this tile: it names that tile, or where the header chooses
   one that this binary can run, and resources that the device has. */
MOEI_UNUSED static void test_plan(const moe_gemm_plan* p, int dtype, int tile)
{
    moe_device dev;
    CHECK_STATUS(moe_device_query(&dev), MOE_OK);
    CHECK(p->path == MOE_GEMM_PATH_WMMA ||
              (p->path == MOE_GEMM_PATH_WGMMA && p->tile == MOE_TILE_128x256),
          "path %d, tile %d", p->path, p->tile);
    if (!CHECK(p->tile >= MOE_TILE_128x256 && p->tile <= MOE_TILE_64x64 &&
                   (tile == MOE_TILE_AUTO || p->tile == tile),
               "tile %d, not %d", p->tile, tile))
        return;
    CHECK_STATUS(test_gemm_status(dtype, p->tile), MOE_OK);
    CHECK(p->tile_m >= 16 && p->tile_m <= 256 && p->tile_n >= 16 && p->tile_n <= 256 &&
              p->tile_k >= 16 && p->stages >= 2 && p->threads >= 32 && p->threads <= 1024 &&
              p->threads % 32 == 0,
          "tile %d: %d x %d x %d, %d stages, %d threads", p->tile, p->tile_m, p->tile_n, p->tile_k,
          p->stages, p->threads);
    CHECK(p->smem > 0 && p->smem <= (size_t)dev.smem_block, "%zu bytes", p->smem);
    CHECK(p->blocks >= 1 && p->blocks <= dev.sms * 32, "%d blocks", p->blocks);
}

#endif
