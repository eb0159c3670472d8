/* list_fill.cuh: the second and third launch of list.cuh. moei_sparse_list_sum makes prefix sums of
   the counts that list_mark.cuh left in the workspace; moei_sparse_list_fill writes the list. */
#ifndef MOE_BLOCK_SPARSE_LIST_FILL_CUH
#define MOE_BLOCK_SPARSE_LIST_FILL_CUH

#include "../base/block.cuh"
#include "list_mark.cuh"

/* Shared memory of the second launch. */
typedef struct moei_sparse_list_sum_shared {
    moe_block_scan_scratch scan;
    int part[32][33]; /* [warp][group of the word] bits in the warp's part of `above` */
} moei_sparse_list_sum_shared;

/* Sums the bits of 1024 block rows, one row a thread: row_start within the 1024, and row_sum.
   Called by the whole thread block. */
MOE_DEVICE void moei_sparse_list_sum_rows(const moei_sparse_list_args* a, int number,
                                          moei_sparse_list_sum_shared* s)
{
    const int row = number * MOEI_SPARSE_LIST_THREADS + (int)threadIdx.x;
    int n = 0, at, all;
    if (row < a->num_block_rows) {
        MOE_UNROLL_8
        for (int span = 0; span < a->spans; ++span)
            n += a->row_count[(int64_t)span * a->num_block_rows + row];
    }
    at = moe_block_exclusive_scan(n, &s->scan, &all);
    if (row < a->num_block_rows) a->row_start[row] = at;
    if (threadIdx.x == 0) a->row_sum[number] = all;
}

/* Sums the columns of word k: lane l has group l of the word, a warp ceil(tiles / 32) consecutive
   counts of each group. Replaces each count in `above` by the prefix sum of the counts before it;
   writes group_count, group_start and word_sum. Called by the whole thread block. */
MOE_DEVICE void moei_sparse_list_sum_columns(const moei_sparse_list_args* a, int k,
                                             moei_sparse_list_sum_shared* s)
{
    const int lane = moe_lane(), warp = moe_warp(), each = (a->tiles + 31) / 32;
    const int from = warp * each, upto = from + each < a->tiles ? from + each : a->tiles;
    const int64_t stride = (int64_t)a->words * 32;
    int32_t* above = a->above + (int64_t)k * 32 + lane;
    unsigned sum = 0, before = 0, all = 0; /* may wrap without room: the list is then empty */
    MOE_UNROLL_8
    for (int t = from; t < upto; ++t) sum += (unsigned)above[t * stride];
    /* barrier: a warp's prefix sum starts with the parts of all warps before it */
    s->part[warp][lane] = (int)sum;
    __syncthreads();
    for (int w = 0; w < 32; ++w) {
        const unsigned part = (unsigned)s->part[w][lane];
        all += part;
        before += w < warp ? part : 0;
    }
    for (int t = from; t < upto; t += 8) {
        int n[8];
        MOE_UNROLL
        for (int i = 0; i < 8; ++i) n[i] = t + i < upto ? above[(t + i) * stride] : 0;
        MOE_UNROLL
        for (int i = 0; i < 8; ++i) {
            if (t + i < upto) above[(t + i) * stride] = (int)before;
            before += (unsigned)n[i];
        }
    }
    if (warp == 0) {
        const int upto_lane = moe_warp_inclusive_scan((int)all);
        a->group_count[k * 32 + lane] = (int)all;
        a->group_start[k * 32 + lane] = (int)((unsigned)upto_lane - all);
        if (lane == 31) a->word_sum[k] = upto_lane;
    }
}

/* The first row_sums thread blocks sum 1024 block rows each; with a column order, one more thread
   block sums each word's columns. */
MOE_KERNEL(MOEI_SPARSE_LIST_THREADS, 1) moei_sparse_list_sum(MOE_ARG(moei_sparse_list_args) a)
{
    MOE_SHARED(moei_sparse_list_sum_shared, s);
    moe_pdl_trigger();
    moe_pdl_wait();
    if ((int)blockIdx.x < a.row_sums) moei_sparse_list_sum_rows(&a, (int)blockIdx.x, &s);
    else moei_sparse_list_sum_columns(&a, (int)blockIdx.x - a.row_sums, &s);
}

/* Shared memory of the third launch. */
typedef struct moei_sparse_list_fill_shared {
    uint32_t word[32][33]; /* [block row][word] of this thread block */
    int before[32][33];    /* [block row][word] bits of the mask before that word, in row order */
    int word_start[32];    /* bits of all groups in the words before, in column order */
    long long row_start;   /* bits of the rows before these 1024 */
    long long all;         /* bits of the mask */
    int bad_offset;        /* first expert with a bad offset, or -1 */
} moei_sparse_list_fill_shared;

/* Returns the sum of v over the warp, in every lane. */
MOE_DEVICE long long moei_sparse_list_warp_sum(long long v)
{
    for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(MOE_FULL_WARP, v, d);
    return v;
}

/* Adds up the sums of the second launch: warp 0 those of rows, warp 1 those of words, warp 2 finds
   the first bad offset. Called by the whole thread block; a barrier must follow. */
MOE_DEVICE void moei_sparse_list_totals(const moei_sparse_list_args* a, int tile, int span,
                                        moei_sparse_list_fill_shared* s)
{
    const int lane = moe_lane();
    if (moe_warp() == 0) {
        long long before = 0, all = 0;
        MOE_UNROLL_8
        for (int i = lane; i < a->row_sums; i += MOE_WARP_SIZE) {
            const int n = a->row_sum[i];
            all += n;
            before += i < tile / 32 ? n : 0;
        }
        before = moei_sparse_list_warp_sum(before);
        all = moei_sparse_list_warp_sum(all);
        if (lane == 0) s->row_start = before, s->all = all;
    } else if (moe_warp() == 1 && a->d.column_offset) {
        const int k = span * 32 + lane, own = k < a->words ? a->word_sum[k] : 0;
        unsigned before = 0;
        MOE_UNROLL_8
        for (int i = lane; i < span * 32; i += MOE_WARP_SIZE) before += (unsigned)a->word_sum[i];
        before = (unsigned)moei_sparse_list_warp_sum(before);
        s->word_start[lane] =
            (int)(before + (unsigned)moe_warp_inclusive_scan(own) - (unsigned)own);
    } else if (moe_warp() == 2) { /* one bit is one expert: at most 4 spans */
        const int bad = a->d.expert_offset && lane < a->spans ? a->bad_offset[lane] : -1;
        const uint32_t spans = __ballot_sync(MOE_FULL_WARP, bad >= 0);
        const int first = __shfl_sync(MOE_FULL_WARP, bad, spans ? __ffs((int)spans) - 1 : 0);
        if (lane == 0) s->bad_offset = first;
    }
}

/* Returns the position of set bit number n (from 0); undefined where word has at most n set
   bits. */
MOE_DEVICE int moei_sparse_list_nth_bit(uint32_t word, int n)
{
    int at = 0;
    MOE_UNROLL
    for (int half = 16; half > 0; half >>= 1) {
        const int below = __popc(word >> at & ((1u << half) - 1u));
        if (n >= below) {
            n -= below;
            at += half;
        }
    }
    return at;
}

/* Writes one block row's part of column_index. Called by a whole warp; lane k passes word k of the
   span and the number of the mask's bits before that word. */
MOE_DEVICE void moei_sparse_list_fill_row(const moei_sparse_list_args* a, int span, uint32_t word,
                                          int before)
{
    const unsigned each = (unsigned)a->each;
    MOE_NO_UNROLL
    for (uint32_t left = __ballot_sync(MOE_FULL_WARP, word != 0); left; left &= left - 1u) {
        const int k = __ffs((int)left) - 1;
        const uint32_t bits = __shfl_sync(MOE_FULL_WARP, word, k);
        const unsigned first = (unsigned)(span * MOEI_SPARSE_LIST_SPAN + k * 32);
        unsigned at = (unsigned)__shfl_sync(MOE_FULL_WARP, before, k) * each;
        if (each == 1) {
            at += (unsigned)__popc(bits & ((1u << moe_lane()) - 1u));
            if (bits >> moe_lane() & 1u) a->d.column_index[at] = (int)first + moe_lane();
        } else {
            const unsigned n = (unsigned)__popc(bits) * each;
            const int bit = moei_sparse_list_nth_bit(bits, moe_lane());
            MOE_NO_UNROLL
            for (unsigned from = 0; from < n; from += MOE_WARP_SIZE) {
                const unsigned i = from + (unsigned)moe_lane(), g = i / each;
                const unsigned group =
                    first + (unsigned)__shfl_sync(MOE_FULL_WARP, bit, (int)(g & 31));
                if (i < n) a->d.column_index[at + i] = (int)(group * each + i - g * each);
            }
        }
    }
}

/* Writes the column offsets of a span (empty: zeros). Called by the thread blocks with `tile` 0. */
MOE_DEVICE void moei_sparse_list_fill_offsets(const moei_sparse_list_args* a, int span, bool empty,
                                              const moei_sparse_list_fill_shared* s)
{
    const int first = span * MOEI_SPARSE_LIST_SPAN;
    const int left = a->groups - first;
    const int groups = left < MOEI_SPARSE_LIST_SPAN ? left : MOEI_SPARSE_LIST_SPAN;
    const unsigned each = (unsigned)a->each, columns = (unsigned)groups * each;
    for (unsigned i = threadIdx.x; i < columns; i += MOEI_SPARSE_LIST_THREADS) {
        const unsigned g = i / each, c = i - g * each;
        const unsigned start =
            (unsigned)a->group_start[first + (int)g] + (unsigned)s->word_start[g / 32];
        const unsigned at = start * each + c * (unsigned)a->group_count[first + (int)g];
        a->d.column_offset[(unsigned)first * each + i] = empty ? 0 : (int)at;
    }
}

/* Writes the part of row_index and position of this thread block's 32 block rows. A warp has one
   word of the span, or some bits of one word where the span has fewer than 32; lanes are block
   rows. */
MOE_DEVICE void moei_sparse_list_fill_columns(const moei_sparse_list_args* a, int tile, int span,
                                              const moei_sparse_list_fill_shared* s)
{
    const int lane = moe_lane(), left = a->words - span * 32;
    const int words = left < 1 ? 1 : left < 32 ? left : 32;
    const int share_log2 = __clz(words - 1) - 27; /* log2 of the warps that share one word */
    const int k = moe_warp() >> share_log2, bits = 32 >> share_log2;
    const int first = (moe_warp() & ((1 << share_log2) - 1)) * bits;
    const unsigned each = (unsigned)a->each;
    if (span * 32 + k < a->words) {
        const uint32_t word = s->word[lane][k];
        const int group = (span * 32 + k) * 32 + lane;
        const unsigned start = (unsigned)a->group_start[group] + (unsigned)s->word_start[k];
        const unsigned above = (unsigned)a->above[(int64_t)tile * a->words * 32 + group];
        const unsigned entry = start * each + above; /* the lane's group: first entry */
        const int count = a->group_count[group];
        unsigned number = (unsigned)s->before[lane][k];
        number += (unsigned)__popc(word & ((1u << first) - 1u));
        MOE_NO_UNROLL
        for (int b = first; b < first + bits; ++b) {
            const bool here = word >> b & 1u;
            const uint32_t rows = __ballot_sync(MOE_FULL_WARP, here);
            const unsigned step = (unsigned)__shfl_sync(MOE_FULL_WARP, count, b);
            unsigned at = __shfl_sync(MOE_FULL_WARP, entry, b);
            if (here) {
                at += (unsigned)__popc(rows & ((1u << lane) - 1u));
                for (unsigned c = 0; c < each; ++c, at += step) {
                    a->d.row_index[at] = tile * 32 + lane;
                    a->d.position[at] = (int)(number * each + c);
                }
                ++number;
            }
        }
    }
}

/* A thread block has the 32 block rows and the span that it had in the first launch; warp r has
   block row r.
     1. Load the row's words, one a lane, and count the row's bits in the spans before.
     2. Add up the totals. Barrier: every warp reads them.
     3. Write row offsets, the last offsets, the fault, and column offsets. An empty list ends here.
     4. Write the block row's part of the row order.
     5. Write the column order. Barrier: a warp reads the words of all 32 block rows. */
MOE_KERNEL(MOEI_SPARSE_LIST_THREADS, 1) moei_sparse_list_fill(MOE_ARG(moei_sparse_list_args) a)
{
    MOE_SHARED(moei_sparse_list_fill_shared, s);
    const int tile = (int)(blockIdx.x / (unsigned)a.spans);
    const int span = (int)(blockIdx.x % (unsigned)a.spans);
    const int lane = moe_lane(), warp = moe_warp(), row = tile * 32 + warp;
    uint32_t word = 0;
    long long all;
    unsigned before = 0;
    bool empty;

    moe_pdl_trigger();
    moe_pdl_wait();
    if (*a.stopped) return;
    /* 1. words */
    if (row < a.num_block_rows) {
        if (span * 32 + lane < a.words) word = a.word[(int64_t)row * a.words + span * 32 + lane];
        for (int i = lane; i < span; i += MOE_WARP_SIZE)
            before += (unsigned)a.row_count[(int64_t)i * a.num_block_rows + row];
        if (lane == 0) before += (unsigned)a.row_start[row];
        before = (unsigned)moei_sparse_list_warp_sum(before);
    }
    /* 2. totals */
    moei_sparse_list_totals(&a, tile, span, &s);
    __syncthreads();
    all = s.all * a.each;
    empty = s.bad_offset >= 0 || all > a.d.max_blocks;
    before += (unsigned)s.row_start;
    /* 3. offsets and faults */
    if (row < a.num_block_rows && span == 0 && lane == 0)
        a.d.row_offset[row] = empty ? 0 : (int)(before * (unsigned)a.each);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        a.d.row_offset[a.num_block_rows] = empty ? 0 : (int)all;
        if (a.d.column_offset) a.d.column_offset[a.num_block_columns] = empty ? 0 : (int)all;
        if (s.bad_offset >= 0)
            moe_fault_raise(a.d.fault, MOE_FAULT_BAD_OFFSET, a.d.rank, s.bad_offset);
        else if (empty) moe_fault_raise(a.d.fault, MOE_FAULT_NO_ROOM, a.d.rank, all);
    }
    if (tile == 0 && a.d.column_offset) moei_sparse_list_fill_offsets(&a, span, empty, &s);
    if (empty) return;

    /* 4. row order */
    before += (unsigned)moe_warp_inclusive_scan(__popc(word)) - (unsigned)__popc(word);
    s.word[warp][lane] = word;
    s.before[warp][lane] = (int)before;
    moei_sparse_list_fill_row(&a, span, word, (int)before);
    /* 5. column order */
    if (!a.d.column_offset) return;
    __syncthreads();
    moei_sparse_list_fill_columns(&a, tile, span, &s);
}

#endif
