/* exchange.h: what every rank receives, bit for bit, and the sums that come home. */
#ifndef MOE_TESTS_EP_EXCHANGE_H
#define MOE_TESTS_EP_EXCHANGE_H

#include "tests/unit/ep/case.h"

/* Returns how many of the first `bytes` bytes of a buffer's part from byte `from` on were written. */
static int64_t ep_written(const char* x, int64_t from, int64_t bytes)
{
    int64_t n = 0;
    for (int64_t b = 0; b < bytes; ++b)
        n += (unsigned char)x[from + b] != test_poison_byte((size_t)b);
    return n;
}

/* Checks rows and scales in expert order, bit for bit: those of each row's token; zeros where a row
   pads an expert; nothing past the last. row_slot: the reference's. */
static void ep_check_in_order(ep_job* j, int r, const int32_t* row_slot, int num_rows)
{
    const ep_case* c = &j->c;
    const ep_rank* k = j->rank + r;
    const int C = k->view.recv_tokens, S = c->num_scales;
    const int64_t row = (int64_t)c->H * moe_dtype_bytes(c->dtype);
    float* scales = (float*)ep_get(j, r, k->view.recv_scales, k->view.num_x * S * 4);
    char* x = (char*)ep_get(j, r, k->view.recv_x, k->view.num_x * row);
    char* zeros = (char*)test_host(row + S * 4);
    int64_t wrong = 0, strays = 0;
    memset(zeros, 0, (size_t)(row + S * 4));
    for (int64_t i = 0; i < k->view.num_x; ++i) {
        const char* want_x = zeros;
        const void* want_scales = zeros;
        if (i >= num_rows) {
            strays += ep_written(x, i * row, row);
            continue;
        }
        if (row_slot[i] >= 0) {
            const int64_t at = row_slot[i] / c->K;
            const ep_rank* home = j->rank + at / C;
            want_x = (const char*)home->x + k->want.recv_token[at] * row;
            want_scales = home->scales + (int64_t)k->want.recv_token[at] * S;
        }
        wrong += memcmp(x + i * row, want_x, (size_t)row) != 0;
        wrong += memcmp(scales + i * S, want_scales, (size_t)S * 4) != 0;
    }
    CHECK(wrong == 0, "rank %d: %lld rows in expert order are wrong", r, (long long)wrong);
    CHECK(strays == 0, "rank %d: %lld bytes past the last row were written", r, (long long)strays);
    TFREE(scales, x, zeros);
}

/* Checks the row maps of one rank against route's reference; returns the row of every received
   slot. */
static int32_t* ep_check_maps(ep_job* j, int r)
{
    const ep_case* c = &j->c;
    const ep_rank* k = j->rank + r;
    const int C = k->view.recv_tokens, P = ep_local(j, r) ? ep_local(j, r) : 1;
    const int64_t slots = (int64_t)c->W * C * c->K;
    int32_t* offset = (int32_t*)test_host((P + 1) * 4);
    int32_t* count = (int32_t*)test_host(P * 4);
    int32_t* row = (int32_t*)test_host(slots * 4);
    int32_t* row_slot = (int32_t*)test_host((int64_t)k->num_rows * 4);
    moe_place* place = (moe_place*)ep_get(j, r, k->view.recv_place, slots * 8);
    int32_t* got_offset = (int32_t*)ep_get(j, r, k->view.expert_offset, (P + 1) * 4);
    int32_t* got_slot = (int32_t*)ep_get(j, r, k->view.row_slot, (int64_t)k->num_rows * 4);
    moe_ref_route_desc ref;
    memset(&ref, 0, sizeof ref);
    ref.ids = k->want.recv_ids;
    ref.expert_count = count;
    ref.expert_offset = offset;
    ref.slot_row = row;
    ref.row_slot = row_slot;
    ref.num_tokens = c->W * C;
    ref.num_experts = P;
    ref.top_k = c->K;
    ref.max_rows = k->num_rows;
    ref.row_multiple = c->row_multiple;
    CHECK(moe_ref_route(&ref) == -1, "rank %d: the reference's rows fit", r);
    CHECK_INTS("expert_offset", got_offset, offset, P + 1);
    CHECK_INTS("row_slot", got_slot, row_slot, k->num_rows);
    for (int64_t i = 0; i < slots; ++i)
        if (row[i] != place[i].row || place[i].buffer != (row[i] < 0 ? -1 : 0)) {
            CHECK(0, "rank %d: place %lld is {%d, %d}, not row %d", r, (long long)i,
                  place[i].buffer, place[i].row, row[i]);
            break;
        }
    if (k->view.in_order) ep_check_in_order(j, r, row_slot, offset[P]);
    TFREE(offset, count, row_slot, place, got_offset, got_slot);
    return row;
}

/* Checks the counts, tokens, ids and weights that rank r received, and beside them what came of the
   rows and scales where tokens travel once. all: 0 where a sender stopped: some rows may not have
   come. */
static void ep_check_received(ep_job* j, int r, int all)
{
    const ep_case* c = &j->c;
    const ep_rank* k = j->rank + r;
    const int C = k->view.recv_tokens, W = c->W, K = c->K, S = c->num_scales;
    const int64_t row = (int64_t)c->H * moe_dtype_bytes(c->dtype);
    int32_t* count = (int32_t*)ep_get(j, r, k->view.recv_count, W * 4);
    int32_t* token = (int32_t*)ep_get(j, r, k->view.recv_token, (int64_t)W * C * 4);
    int32_t* ids = (int32_t*)ep_get(j, r, k->view.recv_ids, (int64_t)W * C * K * 4);
    float* weights = (float*)ep_get(j, r, k->view.recv_weights, (int64_t)W * C * K * 4);
    float* scales = (float*)ep_get(j, r, k->view.recv_scales, k->view.num_x * S * 4);
    char* x = (char*)ep_get(j, r, k->view.recv_x, k->view.num_x * row);
    int64_t wrong = 0, strays = 0;
    CHECK(k->view.in_order == (c->dispatch == MOE_EP_ALL_TO_ALL), "order %d", k->view.in_order);
    if (all || c->dispatch != MOE_EP_ALL_GATHER_COPY) /* see below */
        CHECK_INTS("recv_count", count, k->want.recv_count, W);
    for (int s = 0; s < W; ++s)
        for (int i = 0; i < C; ++i) {
            const int64_t at = (int64_t)s * C + i;
            const int t = k->want.recv_token[at];
            const int64_t written = k->view.in_order ? 1 : ep_written(x, at * row, row);
            if (t < 0 && !k->view.in_order) strays += written;
            if (t < 0 || (!all && (!written || k->view.in_order))) continue;
            if (all || c->dispatch != MOE_EP_ALL_GATHER_COPY) { /* copies come without it */
                wrong += token[at] != t;
                wrong += memcmp(ids + at * K, k->want.recv_ids + at * K, (size_t)K * 4) != 0;
                wrong +=
                    memcmp(weights + at * K, k->want.recv_weights + at * K, (size_t)K * 4) != 0;
                wrong += k->view.in_order
                             ? 0
                             : memcmp(scales + at * S, j->rank[s].scales + (int64_t)t * S,
                                      (size_t)S * 4) != 0;
            }
            if (k->view.in_order) continue;
            wrong += memcmp(x + at * row, (char*)j->rank[s].x + t * row, (size_t)row) != 0;
        }
    CHECK(wrong == 0, "rank %d: %lld rows or parts of them are wrong", r, (long long)wrong);
    CHECK(strays == 0, "rank %d: %lld bytes past the received rows were written", r,
          (long long)strays);
    TFREE(count, token, ids, weights, scales, x);
}

/* Checks y of rank r. rows: those of all ranks' received slots. */
static void ep_check_sums(ep_job* j, int32_t* const* rows, int r, int weighted)
{
    const ep_case* c = &j->c;
    const ep_rank* k = j->rank + r;
    const int H = c->H, K = c->K, W = c->W;
    double* exact = tzeros((int64_t)k->T * H);
    double* ideal = tzeros((int64_t)k->T * H);
    double* part = tzeros((int64_t)W * H);
    void* y = tbuf_copy(&k->d_y);
    for (int t = 0; t < k->T; ++t) {
        char sent[TGROUP_MOST] = {0};
        for (int i = 0; i < W * H; ++i) part[i] = 0;
        for (int s = 0; s < K; ++s) {
            const ep_slot f = ep_find(j, rows, r, (int64_t)t * K + s);
            const double w = weighted ? k->weights[t * K + s] : 1.0;
            if (f.rank < 0 || f.row < 0) continue;
            sent[f.rank] = 1;
            for (int h = 0; h < H; ++h)
                part[f.rank * H + h] +=
                    w * moe_load(j->rank[f.rank].rows, (int64_t)f.row * H + h, ep_rows_dtype(c));
        }
        for (int h = 0; h < H; ++h) {
            double sum = moe_load(k->residual, (int64_t)t * H + h, c->dtype), rounded = sum;
            if (c->pad) {
                const double one =
                    k->shared_weight[t] * (double)moe_load(k->shared, (int64_t)t * H + h, c->dtype);
                sum += one;
                rounded += one;
            }
            for (int d = 0; d < W; ++d) {
                sum += part[d * H + h];
                rounded += sent[d] && c->combine != MOE_EP_GATHERED
                               ? test_rounded(part[d * H + h], ep_rows_dtype(c))
                               : part[d * H + h];
            }
            exact[(int64_t)t * H + h] = sum;
            ideal[(int64_t)t * H + h] = test_rounded(rounded, c->dtype);
        }
    }
    if (k->T) CHECK_CLOSE("y", y, c->dtype, H + c->pad, exact, ideal, k->T, H);
    CHECK(test_strays(y, (int64_t)k->d_y.bytes, moe_dtype_bytes(c->dtype), H + c->pad, H, 0,
                      k->T) == 0,
          "between the rows of y");
    TFREE(exact, ideal, part, y);
}

/* Checks the counters of rank r after so many exchanges, counted slot by slot from the ids. */
static void ep_check_counters(ep_job* j, int r, uint64_t calls)
{
    const ep_case* c = &j->c;
    const int scatters = c->dispatch == MOE_EP_ALL_TO_ALL, gathers = c->combine == MOE_EP_GATHERED;
    const uint64_t row =
        (uint64_t)c->H * (uint64_t)moe_dtype_bytes(c->dtype) + (uint64_t)c->num_scales * 4;
    const uint64_t sum = (uint64_t)c->H * (uint64_t)moe_dtype_bytes(ep_rows_dtype(c));
    const int P = ep_local(j, r) ? ep_local(j, r) : 1;
    moe_ep_counters* got = (moe_ep_counters*)tbuf_copy(&j->rank[r].d_counters);
    int32_t* offset = (int32_t*)ep_get(j, r, j->rank[r].view.expert_offset, (P + 1) * 4);
    uint64_t out[2] = {0, 0}, in[2] = {0, 0}; /* tokens, slots */
    uint64_t sent, bytes, back;
    for (int s = 0; s < c->W; ++s)
        for (int t = 0; t < j->rank[s].T; ++t)
            for (int d = 0; d < c->W; ++d) {
                uint64_t slots = 0;
                for (int k = 0; k < c->K; ++k)
                    slots +=
                        moe_ref_target(&j->rank[s].want, (int64_t)t * c->K + k, c->K, c->E, c->W)
                            .rank == d;
                if (s == d) continue;
                if (s == r) out[0] += slots > 0, out[1] += slots;
                if (d == r) in[0] += slots > 0, in[1] += slots;
            }
    if (ep_to_all(c)) out[0] = (uint64_t)j->rank[r].T * (uint64_t)(c->W - 1);
    sent = scatters ? out[1] : out[0];
    bytes = sent * row + out[0] * (uint64_t)(8 * c->K + 4) + (scatters || gathers ? in[1] * 8 : 0);
    back = gathers ? in[1] : in[0];
    CHECK(got->calls == calls, "rank %d: %d calls", r, (int)got->calls);
    CHECK(got->sent_rows == calls * sent && got->sent_bytes == calls * bytes,
          "rank %d sent %lld rows, %lld bytes; expected %lld, %lld", r, (long long)got->sent_rows,
          (long long)got->sent_bytes, (long long)(calls * sent), (long long)(calls * bytes));
    CHECK(got->return_rows == calls * back && got->return_bytes == calls * back * sum,
          "rank %d returned %lld rows; expected %lld", r, (long long)got->return_rows,
          (long long)(calls * back));
    CHECK(got->expert_rows == (ep_local(j, r) ? calls * (uint64_t)offset[P] : 0),
          "rank %d: %lld rows of experts", r, (long long)got->expert_rows);
    CHECK((got->dispatch_wait_ns > 0 || c->W == 1) && got->dispatch_wait_ns < 10000000000ull &&
              got->combine_wait_ns < 10000000000ull,
          "rank %d: waits of %lld and %lld ns", r, (long long)got->dispatch_wait_ns,
          (long long)got->combine_wait_ns);
    TFREE(got, offset);
}

/* One exchange, from dispatch to sums. */
static void ep_run(const ep_case* c, uint64_t salt)
{
    static ep_job j;
    int32_t* rows[TGROUP_MOST] = {0};
    trand q = trand_new(salt + 500);
    if (ep_new(&j, c, salt)) {
        ep_dispatch(&j);
        tgroup_wait(&j.g);
        if (tgroup_clean(&j.g, __LINE__)) {
            for (int r = 0; r < c->W; ++r) {
                ep_check_received(&j, r, 1);
                rows[r] = ep_check_maps(&j, r);
            }
            ep_fill_rows(&j, &q);
            ep_combine(&j);
            tgroup_wait(&j.g);
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < c->W; ++r) ep_check_sums(&j, rows, r, 1);
            for (int r = 0; r < c->W; ++r) j.rank[r].combine.weights = 0;
            ep_dispatch(&j); /* score-less, as for a gradient of x; the same rows */
            ep_combine(&j);
            tgroup_wait(&j.g);
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < c->W; ++r) ep_check_sums(&j, rows, r, 0);
            for (int r = 0; r < c->W && !c->same && !c->recv_tokens; ++r) {
                tgroup_use(&j.g, r);
                ep_check_counters(&j, r, 2);
            }
            TEST_CUDA(cudaSetDevice(0));
        }
        for (int r = 0; r < c->W; ++r) free(rows[r]);
    }
    ep_free(&j);
}

/* Every shape with every dispatch and one combine each, in turn; where tests are long, with every
   combine. */
static void test_shapes(void)
{
    const ep_case list[] = {
        /* W, T, H, E, K, forms, dtype, draw, replicas, C, scales, misalign, same, fp32, pad, m */
        {1, 5, 16, 3, 2, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 0},
        {2, 37, 64, 8, 3, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 0},
        {2, 37, 64, 8, 3, 0, 0, MOE_FP16, EP_RANDOM, 0, 0, 2, 0, 0, 0, 0, 8}, /* padded experts */
        {4, 20, 32, 7, 2, 0, 0, MOE_FP16, EP_RANDOM, 0, 0, 3, 0, 0, 0, 0, 0}, /* E 7 on W 4 */
        {4, 20, 32, 7, 2, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 2, 0, 0, 0, 0},
        {4, 12, 8, 2, 2, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 0}, /* E 2 on W 4 */
        {4, 12, 8, 2, 1, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 4},
        {4, 33, 40, 9, 4, 0, 0, MOE_FP32, EP_RANDOM, 1, 0, 0, 4, 0, 0, 0, 0},
        {4, 33, 40, 9, 4, 0, 0, MOE_BF16, EP_RANDOM, 1, 0, 0, 0, 0, 0, 0, 0},
        {8, 19, 24, 16, 4, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 1, 0, 0, 0, 0, 0},
        {16, 9, 16, 32, 6, 0, 0, MOE_FP16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 0},
        {4, 30, 16, 8, 2, 0, 0, MOE_BF16, EP_ONE_RANK, 0, 0, 0, 0, 0, 0, 0, 0},
        {4, 30, 16, 8, 2, 0, 0, MOE_BF16, EP_ONE_EXPERT, 0, 0, 0, 0, 0, 0, 0, 0},
        {3, 0, 16, 8, 2, 0, 0, MOE_BF16, EP_EMPTY, 0, 0, 0, 0, 0, 0, 0, 0},
        {3, 10, 16, 8, 2, 0, 0, MOE_BF16, EP_EMPTY, 0, 0, 0, 0, 0, 0, 0, 0},
        {2, 1, 8, 4, 1, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 1, 0, 0, 0},
        {2, 40, 16, 64, 40, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 0, 0}, /* K past a warp */
        {3, 20, 16, 8, 2, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 24, 0},  /* strides */
        {3, 20, 16, 8, 2, 0, 0, MOE_FP16, EP_RANDOM, 0, 0, 0, 0, 0, 0, 8, 0},
        {3, 25, 24, 8, 3, 0, 0, MOE_BF16, EP_RANDOM, 0, 0, 0, 0, 0, 1, 0, 0}, /* fp32 rows */
        {3, 25, 24, 8, 3, 0, 0, MOE_FP16, EP_RANDOM, 1, 0, 0, 0, 0, 1, 0, 0},
    };
    for (int i = 0; i < (int)(sizeof list / sizeof list[0]); ++i)
        for (int pair = 0; pair < EP_PAIRS; ++pair) {
            ep_case c = list[i];
            if (!test_long() && (pair + i) % 3) continue;
            c.dispatch = ep_dispatch_of(pair), c.combine = ep_combine_of(pair);
            ep_run(&c, 100 + (uint64_t)i);
        }
}

/* Fewer tokens for a rank than tokens: C below T. */
static void test_few_received(void)
{
    for (int combine = MOE_EP_REDUCED; combine <= MOE_EP_REDUCE_SCATTER; ++combine)
        for (int dispatch = MOE_EP_DEDUPLICATED; dispatch <= MOE_EP_ALL_TO_ALL; ++dispatch) {
            const ep_case c = {5, 64, 16, 20, 1, dispatch, combine, MOE_BF16, EP_RANDOM,
                               0, 40, 0,  0,  0, 0,        0,       0};
            ep_run(&c, 6);
        }
}

/* More tokens than one launch counts: chunks of many tokens, rounds of them. */
static void test_many_tokens(void)
{
    for (int pair = 0; pair < EP_PAIRS; pair += !MOE_ON_HOST ? 1 : 5) { /* each dispatch, combine */
        const ep_case c = {2,
                           1500,
                           8,
                           6,
                           2,
                           ep_dispatch_of(pair),
                           ep_combine_of(pair),
                           MOE_BF16,
                           EP_RANDOM,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0};
        ep_run(&c, 7 + (uint64_t)pair);
    }
}

/* The form of dispatch changes no bit of y; nor does it whether ranks keep their sums. */
static void test_same_bits(void)
{
    static ep_job j;
    void* first[2][TGROUP_MOST] = {{0}};
    for (int pair = 0; pair < EP_PAIRS; ++pair) {
        const ep_case c = {4,
                           23,
                           24,
                           9,
                           4,
                           ep_dispatch_of(pair),
                           ep_combine_of(pair),
                           MOE_BF16,
                           EP_RANDOM,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0,
                           0};
        const int kind = c.combine == MOE_EP_GATHERED;
        trand q = trand_new(9);
        if (ep_new(&j, &c, 8)) {
            ep_dispatch(&j);
            tgroup_wait(&j.g);
            ep_fill_rows(&j, &q);
            ep_combine(&j);
            tgroup_wait(&j.g);
            tgroup_clean(&j.g, __LINE__);
            for (int r = 0; r < c.W; ++r) {
                tgroup_use(&j.g, r);
                if (!first[kind][r]) first[kind][r] = tbuf_copy(&j.rank[r].d_y);
                else
                    CHECK(tbuf_holds(&j.rank[r].d_y, first[kind][r]),
                          "pair %d, rank %d: other bits", pair, r);
            }
            TEST_CUDA(cudaSetDevice(0));
        }
        ep_free(&j);
    }
    for (int r = 0; r < 4; ++r) TFREE(first[0][r], first[1][r]);
}

static void ep_exchange(void)
{
    RUN(test_shapes);
    RUN(test_few_received);
    RUN(test_many_tokens);
    RUN(test_same_bits);
}

#endif
