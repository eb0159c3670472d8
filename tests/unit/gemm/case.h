/* case.h: a case of a grouped GEMM: its buffers, what they hold, the exact product. */
#ifndef MOE_TESTS_GEMM_CASE_H
#define MOE_TESTS_GEMM_CASE_H

#include "tests/test.h"
#include "tests/test_weights.h"

#include "moe/gemm/prepare.cuh"
#include "moe/ref/gemm.h"
#include "tests/test_bound.h"
#include "tests/test_case.h"
#include "tests/test_case_rows.h"

#define MOST_EXPERTS TWEIGHTS_MOST

typedef struct gemm_case {
    int E, n, k;
    int rows[MOST_EXPERTS]; /* of each expert */
    int lead, slack;        /* rows before the first expert's and after the last one's */
    int dtype, c_dtype, a_major, b_major;
    int activation, gate_up, bias; /* moe_activation, never 0 */
    int pre, pre_pad;              /* 1: stores what the activation is applied to */
    float alpha, limit;
    int gather;              /* row_div; 0: no row_index */
    int none, bad;           /* percent of the rows whose row_index is -1, out of range */
    int a_rows;              /* rows of A; 0: as many as are needed */
    int b_table, c_table;    /* an allocation an expert */
    int a_pad, b_pad, c_pad; /* stride - dense; multiples of 8 */
    int no_offset;           /* 1: no expert_offset */
    int fill;                /* TFILL_* */
    int tile;
    int path;        /* moe_gemm_path; 0: chosen */
    int no_ticket;   /* 1: no workspace */
    int groups;      /* entries of a list of groups that replaces the offsets; 0: none */
    int flags;       /* 1: counts in done, and waits for ready counters, which are high enough */
    int64_t sampled; /* compares every so many rows of an expert; 0: all */
} gemm_case;

typedef struct gemm_bufs {
    tbuf a, index, bias, offset, fault, workspace, pre, group, ready, done;
    tgrouped c;
    tweights b;
    void *h_a, *h_bias; /* h_a is k-major whatever the device's is */
    int32_t h_offset[MOST_EXPERTS + 1], *h_index;
    int num_rows;
    int64_t a_rows;
    moe_gemm_group list[MOST_EXPERTS]; /* [num_groups] the list of groups, if there is one */
    int num_groups;
    uint32_t *h_ready, *h_done; /* the counters before the call */
    moe_grouped_gemm_desc d;
} gemm_bufs;

static const char* case_text(const gemm_case* c)
{
    static char text[400];
    int at = snprintf(
        text, sizeof text,
        "n=%d k=%d %s -> %s A %s B %s activation=%d (%g %g) gate_up=%d bias=%d gather=%d a_rows=%d "
        "tables %d %d pads %d %d %d pre=%d fill=%d tile=%d path=%d lead=%d slack=%d groups=%d "
        "flags=%d E=%d:",
        c->n, c->k, moe_dtype_name(c->dtype), moe_dtype_name(c->c_dtype),
        c->a_major == MOE_MAJOR_MN ? "M" : "K", c->b_major == MOE_MAJOR_MN ? "N" : "K",
        c->activation, (double)c->alpha, (double)c->limit, c->gate_up, c->bias, c->gather,
        c->a_rows, c->b_table, c->c_table, c->a_pad, c->b_pad, c->c_pad, c->pre, c->fill, c->tile,
        c->path, c->lead, c->slack, c->groups, c->flags, c->E);
    for (int e = 0; e < c->E && at < (int)sizeof text - 12; ++e)
        at += snprintf(text + at, sizeof text - (size_t)at, " %d", c->rows[e]);
    return text;
}

/* Returns a case of E experts with these rows each: bf16 where there is code for it, everything
   k-major, the small tile. */
static gemm_case normal_case(int E, const int* rows, int n, int k)
{
    gemm_case c = {};
    c.E = E, c.n = n, c.k = k;
    for (int e = 0; e < E; ++e) c.rows[e] = rows[e];
    c.dtype = c.c_dtype = test_half();
    c.a_major = c.b_major = MOE_MAJOR_K;
    c.activation = MOE_ACTIVATION_NONE;
    c.gate_up = MOE_GATE_UP_CONCATENATED;
    c.tile = MOE_TILE_64x64;
    return c;
}

static int is_gated(const gemm_case* c) { return moe_activation_is_gated(c->activation); }

static int has_pre(const gemm_case* c)
{
    return c->pre && (c->activation != MOE_ACTIVATION_NONE || c->c_dtype == c->dtype);
}

/* Columns of pre. */
static int pre_columns(const gemm_case* c) { return is_gated(c) ? 2 * c->n : c->n; }

/* Returns the row of A that row m takes; -1: zeros, -2: zeros and a fault. */
static int64_t a_row_of(const gemm_bufs* b, const gemm_case* c, int m)
{
    int64_t row = c->gather ? b->h_index[m] : m;
    if (row == -1) return -1;
    if (row < 0) return -2;
    if (c->gather) row /= c->gather;
    return row < b->a_rows ? row : -2;
}

/* Returns group i: an entry of the list, or an expert's rows. */
static moe_gemm_group group_of(const gemm_bufs* b, int i)
{
    return b->d.group ? b->list[i] : moe_gemm_group{i, b->h_offset[i], b->h_offset[i + 1]};
}

/* Returns whether a group has row m. */
static int has_row(const gemm_bufs* b, int m)
{
    for (int i = 0; i < b->num_groups; ++i)
        if (m >= group_of(b, i).begin && m < group_of(b, i).end) return 1;
    return 0;
}

/* Sets the groups: each expert's rows, or a list: all rows cut at the experts' borders and
   elsewhere, each part some expert's or left out, some groups without rows, in any order. */
static void groups_new(gemm_bufs* b, const gemm_case* c, trand* r)
{
    b->num_groups = c->groups ? c->groups : c->E;
    for (int e = 0, i = 0; i < c->groups; ++e) {
        int at = e < c->E ? b->h_offset[e] : (int)trand_int(r, 0, b->num_rows);
        const int end = e < c->E ? b->h_offset[e + 1] : at;
        do {
            const int to = at < end && trand_int(r, 0, 2) == 0 ? (int)trand_int(r, at, end) : end;
            if (trand_int(r, 0, 5)) /* else left out */
                b->list[i++] = moe_gemm_group{(int)trand_int(r, 0, c->E - 1), at, to};
            at = to;
        } while (at < end && i < c->groups);
    }
    for (int i = c->groups - 1; i > 0; --i) {
        const int j = (int)trand_int(r, 0, i);
        const moe_gemm_group other = b->list[j];
        b->list[j] = b->list[i];
        b->list[i] = other;
    }
    if (!c->groups) return;
    b->group = tbuf_from("group", b->list, (size_t)c->groups * sizeof(moe_gemm_group), 4);
    b->d.group = (const moe_gemm_group*)b->group.p;
    b->d.num_groups = c->groups;
}

/* Returns the row blocks. */
static int row_blocks(const gemm_bufs* b)
{
    return (b->num_rows + MOE_GEMM_ROW_BLOCK - 1) / MOE_GEMM_ROW_BLOCK;
}

/* Returns the rows of a row block that a group has. */
static int rows_of_block(const gemm_bufs* b, int block)
{
    int rows = 0;
    for (int i = 0; i < b->num_groups; ++i) {
        const int begin = group_of(b, i).begin, end = group_of(b, i).end;
        const int first = block * MOE_GEMM_ROW_BLOCK, last = first + MOE_GEMM_ROW_BLOCK;
        const int from = begin > first ? begin : first, to = end < last ? end : last;
        rows += to > from ? to - from : 0;
    }
    return rows;
}

/* Makes counters that are high enough where a row block has rows, and elsewhere are not. */
static void flags_new(gemm_bufs* b, const gemm_case* c, trand* r)
{
    const int blocks = row_blocks(b);
    const uint32_t value = (uint32_t)trand_int(r, -3, 3);
    b->h_ready = (uint32_t*)test_host(blocks * 4 + 4);
    b->h_done = (uint32_t*)test_host(blocks * 4 + 4);
    for (int i = 0; i < blocks; ++i) {
        b->h_ready[i] = value + (uint32_t)(rows_of_block(b, i) ? trand_int(r, 0, 2) : -1);
        b->h_done[i] = (uint32_t)trand_int(r, -9, 9);
    }
    b->ready = tbuf_from("ready", b->h_ready, (size_t)blocks * 4, 4);
    b->done = tbuf_from("done", b->h_done, (size_t)blocks * 4, 4);
    if (!c->flags) return;
    b->d.ready = (const uint32_t*)b->ready.p, b->d.done = (uint32_t*)b->done.p;
    b->d.ready_value = value, b->d.ready_timeout_ms = MOE_ON_HOST ? 1 : 1000;
}

/* Draws A, and stores it in the case's major. */
static void a_new(gemm_bufs* b, const gemm_case* c, trand* r)
{
    const int mn = c->a_major == MOE_MAJOR_MN;
    const int64_t rows = mn ? c->k : b->a_rows, cols = mn ? b->a_rows : c->k;
    const int64_t stride = (mn ? (cols + 7) / 8 * 8 : cols) + c->a_pad;
    const int64_t bytes = moe_extent(rows, stride, cols, c->dtype);
    uint16_t* h = (uint16_t*)test_host(rows * stride * 2);
    b->h_a = trows_new(r, b->a_rows, c->k, c->k, c->dtype, c->fill, 1);
    for (int64_t i = 0; i < b->a_rows; ++i)
        for (int64_t k = 0; k < c->k; ++k)
            h[mn ? k * stride + i : i * stride + k] = ((const uint16_t*)b->h_a)[i * c->k + k];
    b->a = tbuf_from("a", h, (size_t)bytes, 16);
    b->d.a = b->a.p, b->d.a_stride = mn || c->a_pad ? stride : 0;
    free(h);
}

/* Draws row_index: -1 where no expert's row is. */
static void index_new(gemm_bufs* b, const gemm_case* c, trand* r)
{
    const int64_t end = b->a_rows * (c->gather ? c->gather : 1);
    b->h_index = (int32_t*)test_host(b->num_rows * 4);
    for (int m = c->lead; m < b->h_offset[c->E]; ++m) {
        const int64_t u = trand_int(r, 0, 99);
        b->h_index[m] = (int32_t)trand_int(r, 0, end - 1);
        if (u < c->none) b->h_index[m] = -1;
        else if (u < c->none + c->bad || !has_row(b, m))
            b->h_index[m] = test_out_of_range(trand_int(r, 0, 3), end);
    }
    b->index = tbuf_from("row_index", b->h_index, (size_t)b->num_rows * 4, 4);
}

static void bufs_new(gemm_bufs* b, const gemm_case* c, trand* r)
{
    const int gated = is_gated(c), separate = gated && c->gate_up == MOE_GATE_UP_SEPARATE;
    const int columns = c->n * (gated ? 2 : 1); /* of the bias */
    const int64_t c_stride = c->n + c->c_pad;
    tweights_want want = {};
    memset(b, 0, sizeof *b);
    b->h_offset[0] = c->lead;
    for (int e = 0; e < c->E; ++e) b->h_offset[e + 1] = b->h_offset[e] + c->rows[e];
    b->num_rows = b->h_offset[c->E] + c->slack;
    b->a_rows = c->a_rows ? c->a_rows : b->num_rows;
    if (c->a_major == MOE_MAJOR_MN && !c->a_rows) b->a_rows = (b->a_rows + 7) / 8 * 8;
    groups_new(b, c, r);
    flags_new(b, c, r);
    a_new(b, c, r);
    index_new(b, c, r);
    want.experts = c->E, want.n = separate ? c->n : columns, want.k = c->k;
    want.dtype = c->dtype, want.major = c->b_major, want.table = c->b_table;
    want.separate = separate, want.pad = c->b_pad, want.fill = c->fill;
    want.scale = (float)(1 / sqrt((double)c->k));
    tweights_new(&b->b, &want, r);
    b->h_bias = trows_new(r, c->E, columns, columns, c->dtype, c->fill, 1);
    b->bias = tbuf_from("bias", b->h_bias, (size_t)(c->E * columns) * 2, 2);
    b->offset = tbuf_from("offset", b->h_offset, (size_t)c->E * 4 + 4, 4);
    tgrouped_new(&b->c, "c", c->c_table, c->E, b->h_offset, b->num_rows, c->n, c_stride,
                 c->c_dtype);
    b->fault = tfault_new(0);
    b->pre = tbuf_new(
        "pre",
        (size_t)moe_extent(b->num_rows, pre_columns(c) + c->pre_pad, pre_columns(c), c->dtype), 16);
    if (has_pre(c)) {
        b->d.pre = b->pre.p;
        b->d.pre_stride = c->pre_pad ? pre_columns(c) + c->pre_pad : 0;
    }

    b->d.a_rows = c->a_rows || c->a_major == MOE_MAJOR_MN ? b->a_rows : 0;
    b->d.a_major = c->a_major == MOE_MAJOR_MN ? MOE_MAJOR_MN : MOE_MAJOR_DEFAULT;
    b->d.row_index = c->gather ? (const int32_t*)b->index.p : (const int32_t*)0;
    b->d.row_div = c->gather == 1 ? 0 : c->gather;
    b->d.b = b->b.d, b->d.bias = c->bias ? b->bias.p : (const void*)0;
    b->d.expert_offset =
        c->no_offset || c->groups ? (const int32_t*)0 : (const int32_t*)b->offset.p;
    b->d.c = b->c.all.p, b->d.c_table = (void* const*)b->c.table.p;
    b->d.c_stride = c->c_pad ? c_stride : 0;
    b->workspace = tbuf_new("workspace", MOE_GROUPED_GEMM_WORKSPACE, 0);
    b->d.fault = (uint64_t*)b->fault.p, b->d.rank = TEST_RANK;
    b->d.num_experts = c->E, b->d.num_rows = b->num_rows, b->d.n = c->n, b->d.k = c->k;
    b->d.dtype = c->dtype == MOE_BF16 ? MOE_DTYPE_DEFAULT : c->dtype;
    b->d.c_dtype = c->c_dtype == c->dtype ? MOE_DTYPE_DEFAULT : c->c_dtype;
    b->d.activation = c->activation == MOE_ACTIVATION_NONE ? MOE_ACTIVATION_DEFAULT : c->activation;
    b->d.alpha = c->alpha, b->d.limit = c->limit;
    b->d.gate_up = c->gate_up == MOE_GATE_UP_CONCATENATED ? MOE_GATE_UP_DEFAULT : c->gate_up;
    b->d.tile = c->tile, b->d.path = c->path;
    if (!c->no_ticket) {
        b->d.workspace = b->workspace.p;
        b->d.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
    }
    if (c->tile == MOE_TILE_128x256 && c->path != MOE_GEMM_PATH_WGMMA &&
        (c->a_major == MOE_MAJOR_MN || c->b_major == MOE_MAJOR_MN))
        b->d.tile = MOE_TILE_128x128; /* the largest tile is k-major only */
}

static void bufs_free(gemm_bufs* b)
{
    tbufs_free(TBUFS(&b->a, &b->index, &b->bias, &b->offset, &b->fault, &b->workspace, &b->pre,
                     &b->group, &b->ready, &b->done));
    tgrouped_free(&b->c);
    tweights_free(&b->b);
    TFREE(b->h_a, b->h_bias, b->h_index, b->h_ready, b->h_done);
}

/* Requires that the counters have grown by what a call stores, or have not where there are none. */
static void compare_flags(const gemm_bufs* b, const gemm_case* c)
{
    uint32_t* done = (uint32_t*)tbuf_copy(&b->done);
    for (int i = 0; i < row_blocks(b); ++i) {
        const uint32_t want = c->flags ? (uint32_t)(rows_of_block(b, i) * (c->n / 8)) : 0;
        CHECK(done[i] - b->h_done[i] == want, "row block %d: %u were counted, not %u", i,
              done[i] - b->h_done[i], want);
    }
    free(done);
    CHECK(tbuf_holds(&b->ready, b->h_ready), "ready was written");
}

#endif
