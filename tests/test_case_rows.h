/* test_case_rows.h: rows in expert order: how they are shared out among experts, and the output
   rows of a product, in one buffer or in an allocation an expert. */
#ifndef MOE_TESTS_TEST_CASE_ROWS_H
#define MOE_TESTS_TEST_CASE_ROWS_H

#include "tests/test_case.h"
#include "tests/test_weights.h"

/* Draws how many of `most` rows each expert has. Writes rows [E] and offset [E + 1] behind
   offset[0], which stays. */
MOEI_UNUSED static void trows_share(int E, int most, int* rows, int32_t* offset, trand* r)
{
    for (int e = 0, left = most; e < E; ++e) {
        rows[e] = (int)trand_int(r, 0, left);
        left -= rows[e];
        offset[e + 1] = offset[e] + rows[e];
    }
}

/* Picks every `step`-th row of each expert. Writes pick, and first [E + 1]: where an expert's rows
   begin in pick. Returns how many there are. */
MOEI_UNUSED static int64_t trows_pick(int E, const int32_t* offset, int64_t step, int32_t* pick,
                                      int32_t* first)
{
    int64_t n = 0;
    for (int e = 0; e < E; ++e) {
        first[e] = (int32_t)n;
        for (int64_t m = offset[e]; m < offset[e + 1]; m += step) pick[n++] = (int32_t)m;
    }
    first[E] = (int32_t)n;
    return n;
}

/* Adds to each bound what rounding to the dtype adds, for a number that is off by the bound. */
MOEI_UNUSED static void trows_round_bound(double* bound, const double* exact, int64_t n, int dtype)
{
    for (int64_t i = 0; i < n; ++i) bound[i] += tround(fabs(exact[i]) + bound[i], dtype);
}

/* The rows that a product writes: `all`, or `part` of each expert behind `table`. */
typedef struct tgrouped {
    tbuf all, part[TWEIGHTS_MOST], table;
    int experts, by_expert, dtype;
    int64_t cols, stride;  /* elements */
    const int32_t* offset; /* [experts + 1], on the host: the caller's, read at each call */
} tgrouped;

/* num_rows: of `all`, at least offset[experts]. */
MOEI_UNUSED static void tgrouped_new(tgrouped* g, const char* name, int by_expert, int experts,
                                     const int32_t* offset, int64_t num_rows, int64_t cols,
                                     int64_t stride, int dtype)
{
    const int64_t pitch = stride * moe_dtype_bytes(dtype);
    void* address[TWEIGHTS_MOST];
    memset(g, 0, sizeof *g);
    g->experts = experts, g->by_expert = by_expert, g->dtype = dtype;
    g->cols = cols, g->stride = stride, g->offset = offset;
    if (!by_expert) {
        g->all = tbuf_new(name, (size_t)(num_rows * pitch), 16);
        return;
    }
    for (int e = 0; e < experts; ++e) {
        const int64_t rows = offset[e + 1] - offset[e];
        g->part[e] = tbuf_new(name, (size_t)(rows * pitch), 16 * (size_t)(e % 3));
        address[e] = g->part[e].p;
    }
    g->table = tbuf_from("table", address, (size_t)experts * sizeof(void*), 8);
}

MOEI_UNUSED static void tgrouped_free(tgrouped* g)
{
    tbufs_free(TBUFS(&g->all, &g->table));
    for (int e = 0; e < g->experts; ++e) tbufs_free(TBUFS(&g->part[e]));
}

MOEI_UNUSED static void tgrouped_poison(tgrouped* g)
{
    if (!g->by_expert) tbuf_poison(&g->all);
    for (int e = 0; e < g->experts && g->by_expert; ++e) tbuf_poison(&g->part[e]);
}

/* Is every byte still the poison? */
MOEI_UNUSED static int tgrouped_untouched(const tgrouped* g)
{
    int same = g->by_expert || tbuf_holds(&g->all, 0);
    for (int e = 0; e < g->experts && g->by_expert; ++e) same &= tbuf_holds(&g->part[e], 0);
    return same;
}

/* Reads the rows that trows_pick picked into got [first[experts], cols]. Returns how many bytes
   were written outside the experts' rows. */
MOEI_UNUSED static int64_t tgrouped_get(const tgrouped* g, const int32_t* pick,
                                        const int32_t* first, float* got)
{
    const int32_t *offset = g->offset, end = offset[g->experts];
    const int elem = moe_dtype_bytes(g->dtype);
    char* all = g->by_expert ? (char*)0 : (char*)tbuf_copy(&g->all);
    int64_t strays = 0;
    if (all)
        strays = test_strays(all, (int64_t)g->all.bytes, elem, g->stride, g->cols, offset[0], end);
    for (int e = 0; e < g->experts; ++e) {
        char* part = all ? (char*)0 : (char*)tbuf_copy(&g->part[e]);
        for (int64_t i = first[e]; i < first[e + 1]; ++i) {
            const int64_t at = (part ? pick[i] - offset[e] : pick[i]) * g->stride;
            for (int64_t j = 0; j < g->cols; ++j)
                got[i * g->cols + j] = moe_load(part ? part : all, at + j, g->dtype);
        }
        if (part)
            strays += test_strays(part, (int64_t)g->part[e].bytes, elem, g->stride, g->cols, 0,
                                  offset[e + 1] - offset[e]);
        free(part);
    }
    free(all);
    return strays;
}

#endif
