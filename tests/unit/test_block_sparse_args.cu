/* test_block_sparse_args.cu: what the block-sparse product refuses, and what it does with bad lists
   and tables.

     nvcc -I. -arch=sm_90a tests/unit/test_block_sparse_args.cu -o test_block_sparse_args
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_block_sparse_args.cu -o test_block_sparse_args

     test_block_bad_lists        bad entries, offsets, numbers of a list: the fault, no stray write
     test_block_ragged_not_last  the ragged sparse block before its strip's last entry
     test_block_bad_tables       a null or misaligned entry of A's or B's table: the fault
     test_block_bad_c_table      a misaligned entry of C's table: the fault
     test_block_stopped          after a stop fault a call writes nothing, after a data fault all
     test_block_refusals         each wrong field is refused with its own kind and field
     test_block_empty            m, n or k of 0: which addresses are needed
     test_block_mask_sizes       a mask of another matrix is refused by its sizes
     test_block_packed_nothing   a packed matrix without sparse blocks needs no address */
#include "tests/test.h"
#include "tests/test_weights.h"
#include "tests/test_product.h"

/* Sets the fault word. */
static void put_fault(tproduct* p, uint64_t word) { tbuf_put(&p->fault, &word); }

/* Calls the product, C poison before. */
static void call_poisoned(tproduct* p)
{
    tmatrix_poison(&p->c);
    CHECK_STATUS(moe_block_sparse(&p->d, test_now.stream), MOE_OK);
}

/* ------------------------------------------------------------------ bad lists */

/* Checks that nothing outside C's elements was written. */
static void check_in_bounds(const tproduct* p, const char* what)
{
    const tmatrix* t = &p->c;
    const int elem = moe_dtype_bytes(p->w.c_dtype);
    int64_t strays = 0;
    char* all = (char*)tbuf_copy(&t->part[0]);
    if (!t->stride) { /* packed: each byte is an element's; canaries show strays */
        free(all);
        return;
    }
    for (int i = 0; i < t->rows; ++i)
        test_poison(all + i * t->stride * elem, (size_t)(t->columns * elem));
    strays = test_strays(all, (int64_t)t->part[0].bytes, 1, (int64_t)t->part[0].bytes, 0, 0, 0);
    CHECK(strays == 0, "%s: %lld bytes outside C, %s", what, (long long)strays,
          tproduct_text(&p->w));
    free(all);
}

/* Calls with a bad list: the call ends, the fault names an entry of first .. last (-1: any),
   nothing outside C is written, and a later call with the word writes nothing. Calls again without
   a fault word. */
static void check_bad_list(tproduct* p, const char* what, int first, int last)
{
    moe_fault f;
    put_fault(p, 0);
    call_poisoned(p);
    f = moe_fault_decode(tfault_word(&p->fault));
    CHECK(f.code == MOE_FAULT_BAD_SPARSE_BLOCK && f.rank == TEST_RANK,
          "%s: fault \"%s\" at %lld: %s", what, moe_fault_text(f.code), (long long)f.index,
          tproduct_text(&p->w));
    CHECK(first < 0 || (f.index >= first && f.index <= last), "%s: entry %lld, not %d .. %d: %s",
          what, (long long)f.index, first, last, tproduct_text(&p->w));
    check_in_bounds(p, what);
    CHECK(tproduct_inputs_same(p), "%s: an input was written", what);
    call_poisoned(p);
    CHECK(tmatrix_same(&p->c, 1), "%s: a later call with the word wrote: %s", what,
          tproduct_text(&p->w));
    p->d.fault = 0;
    CHECK_STATUS(moe_block_sparse(&p->d, test_now.stream), MOE_OK);
    check_in_bounds(p, what);
    p->d.fault = (uint64_t*)p->fault.p;
}

/* Spoils one entry at a time, in the order that the operation walks. */
static void test_block_bad_lists(void)
{
    trand r = trand_new(1);
    for (int i = 0; i < 3 * 4 * (MOE_ON_HOST ? 2 : 12); ++i) {
        tproduct_want w = tproduct_drawn(tproduct_op(i), 100, 90, 110, &r);
        tproduct p;
        tproduct_transposes(&w, i / 3);
        w.block_rows = 16 << trand_int(&r, 0, 1);
        w.block_columns = 16 << trand_int(&r, 0, 1);
        w.percent = 70;
        w.form = TFORM_LIST;
        w.packed = (int)trand_int(&r, 0, 1);
        w.zero_masked = 0;
        w.dtype = w.c_dtype = tproduct_half();
        w.by_column = (int)trand_int(&r, 0, 1); /* then sdd may walk either order */
        tproduct_new(&p, &w, &r);
        if (tproduct_launch(&p)) {
            tmask* t = &p.mask;
            const int by_column = moei_sparse_by_column(&p.d), strips = by_column ? t->CB : t->RB;
            const int others = by_column ? t->RB : t->CB;
            int32_t* offset = by_column ? t->column_offset : t->row_offset;
            int32_t* index = by_column ? t->row_index : t->column_index;
            tbuf* d_offset = by_column ? &t->d_column_offset : &t->d_row_offset;
            tbuf* d_index = by_column ? &t->d_row_index : &t->d_column_index;
            tproduct_compare(&p); /* what is spoilt below was right */
            for (int how = 0; how < 11; ++how) {
                static const char* const name[] = {
                    "past the last",   "far past it",       "negative",   "far negative",
                    "twice",           "not ascending",     "decreasing", "past the room",
                    "negative offset", "far past the room", "number"};
                int strip = (int)trand_int(&r, 0, strips - 1), at, saved[2], first, last;
                int32_t* spoilt = index;
                tbuf* d_spoilt = d_index;
                for (int l = 0; l < strips && offset[strip + 1] - offset[strip] < 2; ++l)
                    strip = (strip + 1) % strips;
                if (offset[strip + 1] - offset[strip] < 2) break; /* no two in any strip */
                at = (int)trand_int(&r, offset[strip] + 1, offset[strip + 1] - 1);
                if (how >= 6) spoilt = offset, d_spoilt = d_offset, at = strip + 1;
                if (how == 10) spoilt = t->position, d_spoilt = &t->d_position, at = offset[strip];
                if (how == 10 && (!by_column || !w.packed)) continue; /* numbers are not read */
                saved[0] = spoilt[at];
                saved[1] = spoilt[at - (at > 0)];
                if (how == 0) spoilt[at] = others;
                if (how == 1) spoilt[at] = INT32_MAX;
                if (how == 2) spoilt[at] = -1;
                if (how == 3) spoilt[at] = INT32_MIN;
                if (how == 4) spoilt[at] = spoilt[at - 1];
                if (how == 5) spoilt[at] = saved[1], spoilt[at - 1] = saved[0];
                if (how == 6) spoilt[at] = offset[strip] - 1;
                if (how == 7) spoilt[at] = t->max_blocks + 1;
                if (how == 8) spoilt[at] = -1;
                if (how == 9) spoilt[at] = INT32_MAX;
                if (how == 10) spoilt[at] = trand_int(&r, 0, 1) ? -1 : t->max_blocks;
                tbuf_put(d_spoilt, spoilt);
                first = last = how < 6 || how == 10 ? at : -1; /* of offsets, one of two strips' */
                if (how < 2 && w.op == MOE_BLOCK_SPARSE_SDD)
                    last = at + 1; /* the entry after it may be in the next tile */
                if (how == 5 && saved[0] == others - 1)
                    first = at - 1; /* the ragged one, not last */
                check_bad_list(&p, name[how], first, last);
                spoilt[at - (at > 0)] = saved[1];
                spoilt[at] = saved[0];
                tbuf_put(d_spoilt, spoilt);
            }
            put_fault(&p, 0);
            call_poisoned(&p);
            tproduct_compare(&p); /* and it is right again */
        }
        tproduct_free(&p);
    }
}

/* Puts the ragged sparse block, which is the last of all, before the last entry of its strip: twice
   there, or before another one. Each strip, each operation, packed and not. Where strips are
   joined, or a tile of sdd looks at its own columns alone, the fault may name the entry after. */
static void test_block_ragged_not_last(void)
{
    trand r = trand_new(7);
    for (int i = 0; i < 3 * 2 * 2; ++i) {
        tproduct_want w = tproduct_normal(tproduct_op(i), 75, 85, 69);
        tproduct p;
        w.block_rows = w.block_columns = 32; /* 3 of them, ragged each way */
        w.form = TFORM_LIST;
        w.pattern = TPATTERN_FULL;
        w.packed = i / 3 % 2;
        w.by_column = 1;
        w.tile = i / 6 ? MOE_BLOCK_SPARSE_TILE_32x256 : MOE_BLOCK_SPARSE_TILE_AUTO;
        tproduct_new(&p, &w, &r);
        if (tproduct_launch(&p)) {
            tmask* t = &p.mask;
            const int by_column = moei_sparse_by_column(&p.d);
            int32_t* index = by_column ? t->row_index : t->column_index;
            tbuf* d_index = by_column ? &t->d_row_index : &t->d_column_index;
            tproduct_compare(&p);
            for (int strip = 0; strip < 3; ++strip)
                for (int twice = 0; twice < 2; ++twice) {
                    const int at = strip * 3 + 1; /* its last entry but one */
                    index[at] = 2;
                    index[at + 1] = twice ? 2 : 1;
                    tbuf_put(d_index, index);
                    check_bad_list(&p, twice ? "ragged twice" : "ragged before the last", at,
                                   at + !(w.op != MOE_BLOCK_SPARSE_SDD && (w.packed || w.tile)));
                    index[at] = 1;
                    index[at + 1] = 2;
                    tbuf_put(d_index, index);
                }
        }
        tproduct_free(&p);
    }
}

/* Calls with this address as entry `at` of a matrix's table: the fault names the entry. */
static void check_bad_table(tproduct* p, tmatrix* t, int at, void* bad)
{
    void* address[TMATRIX_MOST];
    moe_fault f;
    tbuf_get(&t->table, address);
    address[at] = bad;
    tbuf_put(&t->table, address);
    call_poisoned(p);
    f = moe_fault_decode(tfault_word(&p->fault));
    CHECK(f.code == MOE_FAULT_BAD_TABLE && f.index == at, "fault \"%s\" at %lld, not %d: %s",
          moe_fault_text(f.code), (long long)f.index, at, tproduct_text(&p->w));
}

/* A part of A or B that a sparse block reads must have an address, 16-byte aligned. */
static void test_block_bad_tables(void)
{
    static const int ops[] = {MOE_BLOCK_SPARSE_SDD, MOE_BLOCK_SPARSE_SDD, MOE_BLOCK_SPARSE_DSD,
                              MOE_BLOCK_SPARSE_DDS};
    trand r = trand_new(2);
    for (int i = 0; i < 4 * 4; ++i) {
        const int of_a = i % 4 == 0 || i % 4 == 3;
        tproduct_want w = tproduct_drawn(ops[i % 4], 100, 90, 110, &r);
        tproduct p;
        w.pattern = TPATTERN_FULL;
        w.dtype = w.c_dtype = tproduct_half();
        w.tile = MOE_BLOCK_SPARSE_TILE_AUTO;
        w.a_table = of_a;
        w.b_table = !of_a;
        tproduct_new(&p, &w, &r);
        if (tproduct_launch(&p)) {
            tmatrix* t = of_a ? &p.a : &p.b;
            const int at = (int)trand_int(&r, 0, t->parts - 1);
            tproduct_compare(&p);
            check_bad_table(&p, t, at, i / 4 % 2 ? AT(t->part[at].p, 8) : (void*)0);
            check_in_bounds(&p, "table");
            call_poisoned(&p);
            CHECK(tmatrix_same(&p.c, 1), "a later call with the word wrote");
        }
        tproduct_free(&p);
    }
}

/* A part of C may have no address, but one must be aligned. */
static void test_block_bad_c_table(void)
{
    trand r = trand_new(5);
    for (int i = 0; i < 2 * 3; ++i) {
        tproduct_want w =
            tproduct_drawn(i % 2 ? MOE_BLOCK_SPARSE_DSD : MOE_BLOCK_SPARSE_DDS, 100, 90, 110, &r);
        tproduct p;
        w.dtype = w.c_dtype = tproduct_half();
        w.tile = i / 2 % 2 ? MOE_BLOCK_SPARSE_TILE_AUTO : MOE_BLOCK_SPARSE_TILE_64x64;
        w.c_table = 1;
        tproduct_new(&p, &w, &r);
        if (tproduct_launch(&p)) {
            const int at = (int)trand_int(&r, 0, p.c.parts - 1);
            tproduct_compare(&p);
            check_bad_table(&p, &p.c, at, AT(p.c.part[at].p, 8));
        }
        tproduct_free(&p);
    }
}

static void test_block_stopped(void)
{
    trand r = trand_new(3);
    for (int i = 0; i < 9; ++i) {
        const int code = i & 1 ? MOE_FAULT_NO_ROOM : MOE_FAULT_BAD_OFFSET;
        tproduct_want w = tproduct_drawn(tproduct_op(i), 50, 60, 70, &r);
        tproduct p;
        tproduct_form(&w, i / 3);
        w.dtype = w.c_dtype = tproduct_half();
        w.tile = MOE_BLOCK_SPARSE_TILE_AUTO;
        tproduct_new(&p, &w, &r);
        put_fault(&p, MOEI_FAULT_KEY(code, TEST_RANK, 7));
        CHECK_STATUS(moe_block_sparse(&p.d, test_now.stream), MOE_OK);
        CHECK(tmatrix_same(&p.c, 1), "after a stop fault: %s", tproduct_text(&w));
        CHECK_FAULT(&p.fault, code, 7);
        put_fault(&p, MOEI_FAULT_KEY(MOE_FAULT_BAD_ID, TEST_RANK, 3));
        CHECK_STATUS(moe_block_sparse(&p.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&p.fault, MOE_FAULT_BAD_ID, 3);
        put_fault(&p, 0);
        tproduct_compare(&p);
        tproduct_free(&p);
    }
}

/* ------------------------------------------------------------------ refusals */

TEST_REFUSED(calls_refuse, moe_block_sparse, moe_block_sparse_prepare, moe_block_sparse)

static void refused(const moe_block_sparse_desc* d, moe_status want, const trefusal* at)
{
    moe_block_sparse_choice choice;
    memset(&choice, 0x5a, sizeof choice);
    calls_refuse(d, want, at);
    if (want != MOE_STATUS(MOE_ERR_OPTION, choice)) /* tuning looks at no choice */
        CHECK_STATUS_AT(at, moe_block_sparse_tune(d, test_now.stream, &choice), want);
    CHECK(choice.tile == 0x5a5a5a5a, "line %d: refused, but a choice was made", at->line);
}

/* Nothing is queued by a refused call, and the right descriptor still runs. */
static void test_block_refusals(void)
{
    trand r = trand_new(4);
    for (int op = MOE_BLOCK_SPARSE_SDD; op <= MOE_BLOCK_SPARSE_DDS; ++op) {
        const int sdd = op == MOE_BLOCK_SPARSE_SDD, dsd = op == MOE_BLOCK_SPARSE_DSD;
        const int dds = op == MOE_BLOCK_SPARSE_DDS;
        tproduct_want w = tproduct_normal(op, 96, 64, 80);
        tproduct p;
        moe_block_sparse_desc good, d;
        size_t bytes, needed;
        tbuf table;
        void* address[8];
        w.form = TFORM_LIST;
        w.packed = 0;
        w.by_column = 1;
        w.percent = 60;
        w.room = 2;
        tproduct_new(&p, &w, &r);
        good = p.d;
        good.choice.tile = MOE_BLOCK_SPARSE_TILE_64x64; /* p's workspace has room for any tile */
        CHECK_STATUS(moe_block_sparse_workspace(&good, &needed), MOE_OK);
        for (int i = 0; i < 8; ++i) address[i] = AT(p.c.part[0].p, i * 16);
        table = tbuf_from("table", address, sizeof address, 0);
        CHECK_STATUS(moe_block_sparse(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_block_sparse_workspace(0, &bytes), MOE_STATUS(MOE_ERR_NULL, desc));
        REFUSED_EACH(op, MOE_ERR_OPTION, op, 0, 4, -1);
        REFUSED(d.m = -1, MOE_ERR_RANGE, m);
        REFUSED(d.n = -1, MOE_ERR_RANGE, n);
        REFUSED(d.k = -1, MOE_ERR_RANGE, k);
        REFUSED_EACH(dtype, MOE_ERR_DTYPE, dtype, MOE_FP32, 4, -1);
        REFUSED((d.dtype = MOE_BF16, d.c_dtype = MOE_FP16), MOE_ERR_DTYPE, c_dtype);
        REFUSED((d.dtype = MOE_FP16, d.c_dtype = MOE_BF16), MOE_ERR_DTYPE, c_dtype);
        REFUSED(d.c_dtype = 4, MOE_ERR_DTYPE, c_dtype);
        REFUSED(d.a_transposed = 2, MOE_ERR_OPTION, a_transposed);
        REFUSED(d.b_transposed = -1, MOE_ERR_OPTION, b_transposed);
        REFUSED(d.packed = 2, MOE_ERR_OPTION, packed);
        REFUSED(d.zero_masked = 2, MOE_ERR_OPTION, zero_masked);
        REFUSED_EACH(choice.tile, MOE_ERR_OPTION, choice, -1, MOE_BLOCK_SPARSE_TILE_64x64 + 1);
        REFUSED_EACH(choice.fallback_tile, MOE_ERR_OPTION, choice, -1,
                     MOE_BLOCK_SPARSE_TILE_64x64 + 1);
        REFUSED((d.choice.tile = 0, d.choice.fallback_tile = MOE_BLOCK_SPARSE_TILE_32x256),
                MOE_ERR_OPTION, choice);
        if (!sdd) REFUSED(d.zero_masked = 1, MOE_ERR_CONFLICT, zero_masked);
        if (sdd)
            REFUSED((d.zero_masked = 1, d.packed = 1, d.c_stride = 0), MOE_ERR_CONFLICT,
                    zero_masked);
        /* the mask */
        REFUSED(d.mask.rows += 1, MOE_ERR_CONFLICT, mask);
        REFUSED(d.mask.columns -= 1, MOE_ERR_CONFLICT, mask);
        REFUSED(d.mask.rows = -1, MOE_ERR_CONFLICT, mask);
        REFUSED_EACH(mask.block_rows, MOE_ERR_RANGE, block_rows, 0, 48, 256);
        REFUSED_EACH(mask.block_columns, MOE_ERR_RANGE, block_columns, 8, -16);
        REFUSED(d.mask.max_blocks = -1, MOE_ERR_RANGE, max_blocks);
        REFUSED((d.mask.row_offset = 0, d.mask.column_index = 0, d.mask.column_offset = 0,
                 d.mask.row_index = 0, d.mask.position = 0, d.mask.max_blocks = 0),
                MOE_ERR_NULL, mask);
        REFUSED(d.mask.bytes = (const uint8_t*)p.mask.d_bytes.p, MOE_ERR_CONFLICT, mask);
        REFUSED(d.mask.bits = (const uint32_t*)p.mask.d_bits.p, MOE_ERR_CONFLICT, mask);
        if (tproduct_by_column(&w)) {
            REFUSED(d.mask.column_offset = 0, MOE_ERR_NULL, column_offset);
            REFUSED(d.mask.row_index = 0, MOE_ERR_NULL, row_index);
            REFUSED((d.packed = 1, d.a_stride = d.b_stride = 0, d.mask.position = 0), MOE_ERR_NULL,
                    position);
        } else {
            REFUSED(d.mask.row_offset = 0, MOE_ERR_NULL, row_offset);
            REFUSED(d.mask.column_index = 0, MOE_ERR_NULL, column_index);
        }
        REFUSED((d.packed = 1, d.mask = tmask_view(&p.mask, TFORM_BYTES, 0, 0)), MOE_ERR_CONFLICT,
                packed);
        REFUSED((d.packed = 1, d.mask = tmask_view(&p.mask, TFORM_BITS, 0, 0)), MOE_ERR_CONFLICT,
                packed);
        /* strides */
        REFUSED(d.a_stride = 72, MOE_ERR_STRIDE, a_stride);
        REFUSED(d.a_stride = 84, MOE_ERR_ALIGN, a_stride);
        REFUSED(d.a_stride = -80, MOE_ERR_STRIDE, a_stride);
        REFUSED(d.b_stride = 56, MOE_ERR_STRIDE, b_stride);
        REFUSED(d.b_stride = 68, MOE_ERR_ALIGN, b_stride);
        REFUSED(d.c_stride = 56, MOE_ERR_STRIDE, c_stride);
        REFUSED(d.c_stride = 66, MOE_ERR_ALIGN, c_stride);
        REFUSED_EACH(a_stride, MOE_ERR_STRIDE, a_stride, (int64_t)1 << 61, (int64_t)1 << 34);
        REFUSED(d.b_stride = (int64_t)1 << 34, MOE_ERR_STRIDE, b_stride);
        if (sdd) REFUSED((d.packed = 1, d.c_stride = 64), MOE_ERR_CONFLICT, c_stride);
        if (dsd) REFUSED((d.packed = 1, d.a_stride = 80), MOE_ERR_CONFLICT, a_stride);
        if (dds) REFUSED((d.packed = 1, d.b_stride = 64), MOE_ERR_CONFLICT, b_stride);
        /* addresses */
        REFUSED(d.a = 0, MOE_ERR_NULL, a);
        REFUSED(d.b = 0, MOE_ERR_NULL, b);
        REFUSED(d.c = 0, MOE_ERR_NULL, c);
        REFUSED(d.a = AT(d.a, 8), MOE_ERR_ALIGN, a);
        REFUSED(d.b = AT(d.b, 8), MOE_ERR_ALIGN, b);
        REFUSED(d.c = AT(d.c, 8), MOE_ERR_ALIGN, c);
        REFUSED_RANK_AND_FAULT();
        /* walked by columns; the zeros are by rows */
        if (sdd)
            REFUSED((d.zero_masked = 1, d.mask.block_rows = 16, d.mask.block_columns = 32,
                     d.mask.column_index = 0),
                    MOE_ERR_NULL, column_index);
        if (sdd)
            REFUSED((d.zero_masked = 1, d.mask.block_rows = 16, d.mask.block_columns = 32,
                     d.mask.row_offset = 0),
                    MOE_ERR_NULL, row_offset);
        if (needed) {
            REFUSED(d.workspace = 0, MOE_ERR_NULL, workspace);
            REFUSED((d.workspace = 0, d.workspace_bytes = 0), MOE_ERR_NULL, workspace);
            REFUSED(d.workspace = DOWN_TO(d.mask.row_offset, 16), MOE_ERR_OVERLAP, workspace);
            REFUSED(d.fault = (uint64_t*)d.workspace, MOE_ERR_OVERLAP, fault);
            if (!sdd)
                REFUSED((d.c = 0, d.c_table = (void* const*)d.workspace), MOE_ERR_OVERLAP,
                        workspace);
            REFUSED(d.workspace = AT(d.workspace, 8), MOE_ERR_ALIGN, workspace);
            REFUSED(d.workspace_bytes = needed - 1, MOE_ERR_WORKSPACE, workspace_bytes);
            REFUSED(d.workspace = (void*)d.a, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.workspace = (void*)d.c, MOE_ERR_OVERLAP, workspace);
        }
        REFUSED(d.mask.row_offset = (const int32_t*)AT(d.mask.row_offset, 2), MOE_ERR_ALIGN,
                row_offset);
        REFUSED(d.mask.column_index = (const int32_t*)AT(d.mask.column_index, 1), MOE_ERR_ALIGN,
                column_index);
        REFUSED(d.mask.column_offset = (const int32_t*)AT(d.mask.column_offset, 2), MOE_ERR_ALIGN,
                column_offset);
        REFUSED(d.mask.row_index = (const int32_t*)AT(d.mask.row_index, 3), MOE_ERR_ALIGN,
                row_index);
        REFUSED(d.mask.position = (const int32_t*)AT(d.mask.position, 2), MOE_ERR_ALIGN, position);
        REFUSED((d.mask = tmask_view(&p.mask, TFORM_BITS, 0, 0),
                 d.mask.bits = (const uint32_t*)AT(d.mask.bits, 2)),
                MOE_ERR_ALIGN, bits);
        /* tables */
        if (!dsd)
            REFUSED((d.a = 0, d.a_table = (const void* const*)AT(table.p, 4)), MOE_ERR_ALIGN,
                    a_table);
        if (!dds)
            REFUSED((d.b = 0, d.b_table = (const void* const*)AT(table.p, 4)), MOE_ERR_ALIGN,
                    b_table);
        if (!sdd)
            REFUSED((d.c = 0, d.c_table = (void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, c_table);
        if (dsd)
            REFUSED((d.a = 0, d.a_table = (const void* const*)table.p), MOE_ERR_CONFLICT, a_table);
        if (!dsd) REFUSED(d.a_table = (const void* const*)table.p, MOE_ERR_CONFLICT, a);
        if (dds)
            REFUSED((d.b = 0, d.b_table = (const void* const*)table.p), MOE_ERR_CONFLICT, b_table);
        if (!dds) REFUSED(d.b_table = (const void* const*)table.p, MOE_ERR_CONFLICT, b);
        if (sdd) REFUSED((d.c = 0, d.c_table = (void* const*)table.p), MOE_ERR_CONFLICT, c_table);
        if (!sdd) REFUSED(d.c_table = (void* const*)table.p, MOE_ERR_CONFLICT, c);
        /* what is written lies apart from all that is read */
        REFUSED(d.c = (void*)d.a, MOE_ERR_OVERLAP, c);
        REFUSED(d.c = AT(d.a, 96 * 80 * 2 - 16), MOE_ERR_OVERLAP, c);
        REFUSED(d.c = (void*)d.b, MOE_ERR_OVERLAP, c);
        REFUSED(d.c = AT(d.b, 80 * 64 * 2 - 16), MOE_ERR_OVERLAP, c);
        REFUSED(d.c = DOWN_TO(tproduct_by_column(&w) ? d.mask.row_index : d.mask.column_index, 16),
                MOE_ERR_OVERLAP, c);
        REFUSED(d.c = DOWN_TO(d.mask.row_offset, 16), MOE_ERR_OVERLAP, c);
        REFUSED(d.c = DOWN_TO(d.mask.column_index, 16), MOE_ERR_OVERLAP, c);
        REFUSED(d.c = DOWN_TO(d.mask.column_offset, 16), MOE_ERR_OVERLAP, c);
        REFUSED(d.c = DOWN_TO(d.mask.row_index, 16), MOE_ERR_OVERLAP, c);
        REFUSED(d.c = DOWN_TO(d.mask.position, 16), MOE_ERR_OVERLAP, c);
        REFUSED(d.c = DOWN_TO(d.mask.position + d.mask.max_blocks - 1, 16), MOE_ERR_OVERLAP, c);
        REFUSED((d.mask = tmask_view(&p.mask, TFORM_BYTES, 0, 0), d.c = DOWN_TO(d.mask.bytes, 16)),
                MOE_ERR_OVERLAP, c);
        REFUSED((d.mask = tmask_view(&p.mask, TFORM_BITS, 0, 0), d.c = DOWN_TO(d.mask.bits, 16)),
                MOE_ERR_OVERLAP, c);
        if (!dsd)
            REFUSED((d.a = 0, d.a_table = (const void* const*)AT(d.c, 64)), MOE_ERR_OVERLAP, c);
        if (!dds)
            REFUSED((d.b = 0, d.b_table = (const void* const*)AT(d.c, 64)), MOE_ERR_OVERLAP, c);
        if (!sdd) REFUSED((d.c = 0, d.c_table = (void* const*)d.fault), MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)DOWN_TO(d.mask.row_offset, 8), MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.a, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.c, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.c, 96 * 64 * 2 - 1), 8), MOE_ERR_OVERLAP, fault);
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK(tmatrix_same(&p.c, 1), "a refused call wrote c");
        CHECK(tproduct_inputs_same(&p) && tbuf_holds(&table, address),
              "a refused call wrote an input");
        CHECK_FAULT(&p.fault, MOE_FAULT_NONE, 0);
        CHECK_STATUS(moe_block_sparse(&good, test_now.stream), MOE_OK);
        tproduct_compare(&p);
        d = good; /* the query needs no address */
        d.a = d.b = 0;
        d.c = d.workspace = 0;
        d.mask.row_offset = d.mask.column_index = d.mask.column_offset = d.mask.row_index = 0;
        d.mask.position = 0;
        CHECK_STATUS(moe_block_sparse_workspace(&d, &bytes), MOE_OK);
        CHECK(bytes == needed, "%zu bytes, with addresses %zu", bytes, needed);
        CHECK_STATUS(moe_block_sparse_tune(&good, test_now.stream, 0),
                     MOE_STATUS(MOE_ERR_NULL, desc));
        tbuf_free(&table);
        tproduct_free(&p);
    }
}

/* Where C is empty nothing is read or written, and only the mask needs an address; with k = 0, C
   too. All addresses must be aligned. */
static void test_block_empty(void)
{
    trand r = trand_new(8);
    for (int i = 0; i < 3 * 3; ++i) {
        const int zero = i / 3; /* which of m, n, k is 0 */
        int by_column;
        tproduct_want w = tproduct_normal(tproduct_op(i), zero == 0 ? 0 : 40, zero == 1 ? 0 : 56,
                                          zero == 2 ? 0 : 72);
        tproduct p;
        moe_block_sparse_desc good, d;
        w.form = TFORM_LIST;
        tproduct_new(&p, &w, &r);
        good = p.d;
        good.a = good.b = 0;
        if (zero < 2) good.c = good.workspace = 0;
        CHECK_STATUS(moe_block_sparse(&good, test_now.stream), MOE_OK);
        if (zero == 2) {
            REFUSED(d.c = 0, MOE_ERR_NULL, c);
            REFUSED(d.fault = (uint64_t*)d.c, MOE_ERR_OVERLAP, fault);
        } else {
            d = good;
            d.a = d.c = (void*)d.fault;
            CHECK_STATUS(moe_block_sparse(&d, test_now.stream), MOE_OK);
        }
        REFUSED(d.a = (void*)8, MOE_ERR_ALIGN, a);
        by_column = tproduct_by_column(&w);
        if (by_column) REFUSED(d.mask.column_offset = 0, MOE_ERR_NULL, column_offset);
        if (!by_column) REFUSED(d.mask.row_offset = 0, MOE_ERR_NULL, row_offset);
        tproduct_free(&p);
    }
}

/* Tries masks of bytes and bits, every operation and transpose. A mask of the right sizes runs. */
static void test_block_mask_sizes(void)
{
    trand r = trand_new(5);
    for (int i = 0; i < 3 * 4; ++i) {
        tproduct_want w = tproduct_normal(tproduct_op(i), 40, 50, 60);
        tproduct p;
        moe_block_sparse_desc good, d;
        tproduct_transposes(&w, i / 3);
        w.form = i % 2 ? TFORM_BYTES : TFORM_BITS;
        tproduct_new(&p, &w, &r);
        good = p.d;
        REFUSED((d.mask.rows = good.mask.columns, d.mask.columns = good.mask.rows),
                MOE_ERR_CONFLICT, mask);
        REFUSED(d.mask.rows -= 1, MOE_ERR_CONFLICT, mask);
        REFUSED(d.mask.columns += 1, MOE_ERR_CONFLICT, mask);
        CHECK(tmatrix_same(&p.c, 1), "a refused call wrote c");
        CHECK_STATUS(moe_block_sparse(&good, test_now.stream), MOE_OK);
        tproduct_compare(&p);
        tproduct_free(&p);
    }
}

/* The other matrices need their addresses. */
static void test_block_packed_nothing(void)
{
    trand r = trand_new(6);
    for (int i = 0; i < 3 * 4; ++i) {
        tproduct_want w = tproduct_normal(tproduct_op(i), 40, 56, 72);
        const int sdd = w.op == MOE_BLOCK_SPARSE_SDD, dsd = w.op == MOE_BLOCK_SPARSE_DSD;
        const int dds = w.op == MOE_BLOCK_SPARSE_DDS;
        tproduct p;
        moe_block_sparse_desc good, d;
        tproduct_transposes(&w, i / 3);
        w.form = TFORM_LIST;
        w.packed = 1;
        w.pattern = TPATTERN_EMPTY;
        tproduct_new(&p, &w, &r);
        good = p.d;
        CHECK(good.mask.max_blocks == 0, "%d blocks", good.mask.max_blocks);
        if (sdd) good.c = 0;
        else if (dsd) good.a = 0;
        else good.b = 0;
        if (!dsd) REFUSED(d.a = 0, MOE_ERR_NULL, a);
        if (!dds) REFUSED(d.b = 0, MOE_ERR_NULL, b);
        if (!sdd) REFUSED(d.c = 0, MOE_ERR_NULL, c);
        CHECK(tmatrix_same(&p.c, 1), "a refused call wrote c");
        CHECK_STATUS(moe_block_sparse(&good, test_now.stream), MOE_OK);
        tproduct_compare(&p);
        tproduct_free(&p);
    }
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_block_bad_lists);
    RUN(test_block_ragged_not_last);
    RUN(test_block_bad_tables);
    RUN(test_block_bad_c_table);
    RUN(test_block_stopped);
    RUN(test_block_refusals);
    RUN(test_block_empty);
    RUN(test_block_mask_sizes);
    RUN(test_block_packed_nothing);
    return test_end();
}
