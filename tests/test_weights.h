/* test_weights.h: the experts' weights in every form that moe_weights allows, on the device and
   beside it on the host, for the reference. Included after test.h. */
#ifndef MOE_TESTS_TEST_WEIGHTS_H
#define MOE_TESTS_TEST_WEIGHTS_H

#include "moe/layout.h"

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

#endif
