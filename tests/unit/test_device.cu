/* test_device.cu: kernels as a user writes them, from the stations' device functions: several of
   them in one kernel, against naive loops on the host. Each kernel says which headers it needs; the
   functions by themselves are in their stations' tests.

     nvcc -I. -arch=sm_90a tests/unit/test_device.cu -o test_device && ./test_device
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_device.cu -o test_device && ./test_device

   test_device_gate_and_sum     moe_warp_top_k, then moe_combine_token
   test_device_down_projection  moe_gemm_tile, then moe_add_row_atomic
   test_device_sort_and_copy    moe_route_rank, then moe_copy_row
   test_device_copy_row         rows of every length and alignment
   test_device_noisy_choice     moe_random_words, then moe_warp_top_k */

#include "moe/base/random.h"
#include "moe/combine.cuh"
#include "moe/combine_scatter.cuh"
#include "moe/gate/top_k.cuh"
#include "moe/gemm/check.cuh"
#include "moe/gemm/tile.cuh"
#include "moe/permute.cuh"
#include "moe/route/rank.cuh"

#include "tests/test.h"

/* ---- choose, weigh and sum up: moe/gate/top_k.cuh, moe/combine.cuh ---- */

#define STEP_MAX_E 200
#define STEP_MAX_K 40
#define STEP_WARPS 3

typedef struct step_args {
    moe_combine_args d;  /* one_warp: place [T, E], where every expert's row of every token is;
                            else place [T, K], made by the kernel, which all_place serves */
    const float* logits; /* [T, E] */
    const moe_place* all_place; /* [T, E] */
    int32_t* ids;               /* [T, K] out */
    float* weights;             /* [T, K] out */
    moe_place* place;           /* [T, K] out, of a block a token */
    int32_t num_experts, top_k;
} step_args;

typedef struct step_row {
    float logit[STEP_MAX_E];
    float weight[STEP_MAX_K];
    int32_t ids[STEP_MAX_K];
} step_row;

/* One warp: the row's choices and their softmax, to shared memory and to a's outputs. */
static __device__ void step_choose(const step_args* a, step_row* s, int64_t t)
{
    const int E = a->num_experts, K = a->top_k, lane = (int)threadIdx.x % 32;
    float sum = 0.0f;
    __syncwarp(); /* the token before has been used */
    for (int e = lane; e < E; e += 32) s->logit[e] = a->logits[t * E + e];
    __syncwarp();
    moe_warp_top_k(s->ids, s->logit, E, K);
    for (int k = lane; k < K; k += 32) {
        const int id = s->ids[k];
        s->weight[k] = id >= 0 ? expf(s->logit[id] - s->logit[s->ids[0]]) : 0.0f;
    }
    __syncwarp();
    for (int k = 0; k < K; ++k) sum += s->weight[k]; /* every lane all of them, in order */
    __syncwarp();
    for (int k = lane; k < K; k += 32) {
        const float w = sum > 0.0f ? s->weight[k] / sum : 0.0f;
        s->weight[k] = w;
        a->weights[t * K + k] = w;
        a->ids[t * K + k] = s->ids[k];
    }
    __syncwarp();
}

typedef struct step_rows {
    step_row of[STEP_WARPS];
} step_rows;

/* A warp a token, several warps a block; a warp sums its token's rows itself. */
MOE_KERNEL(STEP_WARPS * 32, 1) step_warp_kernel(MOE_ARG(step_args) a)
{
    MOE_SHARED(step_rows, rows);
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    step_row* s = &rows.of[warp];
    for (int64_t t = (int64_t)blockIdx.x * STEP_WARPS + warp; t < a.d.num_tokens;
         t += (int64_t)gridDim.x * STEP_WARPS) {
        step_choose(&a, s, t);
        for (int h = lane; h < a.d.hidden; h += 32) {
            float sum = 0.0f;
            for (int k = 0; k < a.top_k; ++k) {
                const char* row = s->ids[k] < 0
                                      ? (const char*)0
                                      : moe_combine_row(&a.d, t * a.num_experts + s->ids[k]);
                if (row) sum += s->weight[k] * moe_load_f32(row, h, a.d.rows_dtype);
            }
            moe_store_f32((char*)a.d.y + t * a.d.y_pitch, h, a.d.y_dtype, sum);
        }
    }
}

typedef struct step_shared {
    step_row row;
    moe_combine_shared combine;
    moe_combine_source source[STEP_MAX_K];
} step_shared;

/* A block a token; its first warp chooses and says where the rows are, then all sum up. */
MOE_KERNEL(128, 1) step_block_kernel(MOE_ARG(step_args) a)
{
    MOE_SHARED(step_shared, s);
    const int64_t t = blockIdx.x;
    const int K = a.top_k;
    if (threadIdx.x < 32) {
        const moe_place nowhere = {-1, -1};
        step_choose(&a, &s.row, t);
        for (int k = (int)threadIdx.x; k < K; k += 32)
            a.place[t * K + k] =
                s.row.ids[k] < 0 ? nowhere : a.all_place[t * a.num_experts + s.row.ids[k]];
    }
    __syncthreads();
    if (a.d.rows_dtype == MOE_FP32) moe_combine_token(&a.d, t, &s.combine, s.source, MOE_FP32);
    else moe_combine_token(&a.d, t, &s.combine, s.source, MOE_BF16);
}

typedef struct step_case {
    int T, H, E, K, rows_dtype, y_dtype;
} step_case;

/* The K largest, equals by ascending index, NaN never; -1 where there are no more. */
static void naive_top_k(int32_t* ids, const float* v, int E, int K)
{
    char* taken = (char*)test_host(E);
    memset(taken, 0, (size_t)E);
    for (int k = 0; k < K; ++k) {
        int best = -1;
        for (int e = 0; e < E; ++e)
            if (v[e] == v[e] && !taken[e] && (best < 0 || v[e] > v[best])) best = e;
        ids[k] = best;
        if (best >= 0) taken[best] = 1;
    }
    free(taken);
}

static moe_status step_launch(void* context, cudaStream_t stream)
{
    const step_args a = *(const step_args*)context;
    const moe_launch_config c = a.place ? moe_grid(a.d.num_tokens, 128, 0, stream)
                                        : moe_grid(2, STEP_WARPS * 32, 0, stream);
    if (a.place) return MOE_LAUNCH(step_block_kernel, c, a);
    return MOE_LAUNCH(step_warp_kernel, c, a);
}

static void step_try(const step_case* c, trand* r, int by_block)
{
    const int T = c->T, H = c->H, E = c->E, K = c->K, bytes = moe_dtype_bytes(c->rows_dtype);
    float* logits = (float*)test_host((int64_t)T * E * 4);
    moe_place* place = (moe_place*)test_host((int64_t)T * E * 8);
    void** table = (void**)test_host(E * (int64_t)sizeof(void*));
    char* rows = (char*)test_host((int64_t)E * T * H * bytes);
    int32_t* want_ids = (int32_t*)test_host((int64_t)T * K * 4);
    double *exact = (double*)test_host((int64_t)T * H * 8), *w = (double*)test_host(K * 8);
    tbuf *buffer = (tbuf*)test_host(E * (int64_t)sizeof(tbuf)), in, where, addresses, ids, weights;
    tbuf places, y;
    moe_combine_desc d;
    step_args a;
    float* got_weights;
    void* got;
    memset(exact, 0, (size_t)T * H * 8);
    memset(&a, 0, sizeof a);
    /* logits with equals and NaN; token t's row of expert e lies in buffer e, at any row */
    for (int i = 0; i < T * E; ++i) {
        logits[i] = i / E % 3 ? trand_normal(r) : (float)trand_int(r, -3, 3);
        if (i / E == T - 1 || trand_int(r, 0, 60) == 0) logits[i] = NAN;
    }
    trand_fill_normal(r, rows, (int64_t)E * T * H, c->rows_dtype);
    for (int e = 0; e < E; ++e) {
        const int turn = (int)trand_int(r, 0, T - 1);
        buffer[e] =
            tbuf_from("rows", rows + (int64_t)e * T * H * bytes, (size_t)(T * H * bytes), 0);
        table[e] = buffer[e].p;
        for (int t = 0; t < T; ++t) {
            place[t * E + e].buffer = trand_int(r, 0, 20) ? e : -1; /* some have no row */
            place[t * E + e].row = place[t * E + e].buffer < 0 ? -1 : (t + turn) % T;
        }
    }
    in = tbuf_from("logits", logits, (size_t)(T * E * 4), 0);
    where = tbuf_from("place", place, (size_t)(T * E * 8), 0);
    addresses = tbuf_from("table", table, (size_t)E * sizeof(void*), 0);
    ids = tbuf_new("ids", (size_t)(T * K * 4), 0);
    weights = tbuf_new("weights", (size_t)(T * K * 4), 0);
    places = tbuf_new("places", (size_t)(T * K * 8), 0);
    y = tbuf_new("y", (size_t)(T * H * moe_dtype_bytes(c->y_dtype)), 0);

    a.logits = (const float*)in.p;
    a.all_place = (const moe_place*)where.p;
    a.ids = (int32_t*)ids.p;
    a.weights = (float*)weights.p;
    a.place = by_block ? (moe_place*)places.p : 0;
    a.num_experts = E;
    a.top_k = K;
    memset(&d, 0, sizeof d);
    d.table = (const void* const*)addresses.p;
    d.num_buffers = E;
    d.num_rows = T;
    d.place = by_block ? a.place : a.all_place;
    d.weights = by_block ? a.weights : 0;
    d.top_k = by_block ? K : E;
    d.rows_dtype = c->rows_dtype;
    d.y = y.p;
    d.y_dtype = c->y_dtype;
    d.num_tokens = T;
    d.hidden = H;
    CHECK_STATUS(moe_combine_resolve(&d, &a.d), MOE_OK);
    test_same_bits(by_block ? "block" : "warp", step_launch, &a, TBUFS(&ids, &weights, &y), 3);

    got = tbuf_copy(&y);
    got_weights = (float*)tbuf_copy(&weights);
    for (int t = 0; t < T; ++t) {
        const int32_t* id = want_ids + t * K;
        double sum = 0;
        naive_top_k(want_ids + t * K, logits + t * E, E, K);
        for (int k = 0; k < K; ++k) {
            w[k] = id[k] < 0 ? 0 : exp((double)logits[t * E + id[k]] - logits[t * E + id[0]]);
            sum += w[k];
        }
        for (int k = 0; k < K; ++k) {
            const double weight = sum > 0 ? w[k] / sum : 0;
            const moe_place p = id[k] < 0 ? place[0] : place[t * E + id[k]];
            CHECK(fabs(got_weights[t * K + k] - weight) <= 1e-5, "weight %d of token %d", k, t);
            for (int h = 0; h < H && id[k] >= 0 && p.buffer >= 0; ++h)
                exact[t * H + h] +=
                    weight * moe_load(rows, ((int64_t)p.buffer * T + p.row) * H + h, c->rows_dtype);
        }
    }
    CHECK(tbuf_holds(&ids, want_ids), "ids, E %d K %d", E, K);
    CHECK_CLOSE("y", got, c->y_dtype, H, exact, 0, T, H);
    free(got), free(got_weights), free(logits), free(place), free(table), free(rows);
    free(want_ids), free(exact), free(w);
    for (int e = 0; e < E; ++e) tbuf_free(&buffer[e]);
    free(buffer);
    tbuf_free(&in), tbuf_free(&where), tbuf_free(&addresses), tbuf_free(&ids), tbuf_free(&weights);
    tbuf_free(&places), tbuf_free(&y);
}

static void test_device_gate_and_sum(void)
{
    static const step_case cases[] = {{7, 64, 8, 2, MOE_BF16, MOE_FP32},
                                      {5, 37, 200, 40, MOE_BF16, MOE_BF16},
                                      {13, 129, 33, 8, MOE_FP32, MOE_FP32},
                                      {9, 256, 4, 4, MOE_FP32, MOE_BF16},
                                      {7, 8, 3, 1, MOE_BF16, MOE_FP32}};
    trand r = trand_new(1);
    for (int i = 0; i < 5; ++i)
        for (int by_block = 0; by_block < 2; ++by_block) step_try(&cases[i], &r, by_block);
}

/* ---- a down projection in one launch: moe/gemm/tile.cuh, moe/combine_scatter.cuh ---- */

typedef struct down_args {
    moe_grouped_gemm_args d; /* c [R, N] fp32: room for the tiles; num_experts, offsets, weights */
    const int32_t* row_token;
    const float* row_weight;
    float* y; /* [T, N], added to */
} down_args;

#define DOWN_SHAPE moe_gemm_shape_of(MOE_GEMM_SHAPE_64x64, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K)

/* A block makes one tile of 64 x 64 and adds its rows to their tokens. Grid: columns x rows x
   experts. */
MOE_KERNEL(128, 1) down_kernel(MOE_ARG(down_args) a)
{
    MOE_SHARED_DYNAMIC(shared);
    const int e = (int)blockIdx.z, column = (int)blockIdx.x * 64;
    const int begin = a.d.expert_offset[e], end = a.d.expert_offset[e + 1];
    const int row = begin + (int)blockIdx.y * 64;
    const moe_tile_position t = {e, begin, end, row, (int)blockIdx.x};
    const float* c = (const float*)a.d.c.base;
    if (row >= end) return;
    moe_gemm_tile(&a.d, t, shared, DOWN_SHAPE);
    __syncthreads(); /* the tile is in c */
    for (int i = row + (int)threadIdx.x / 32; i < end && i < row + 64; i += 4)
        moe_add_row_atomic(a.y + (int64_t)a.row_token[i] * a.d.n + column, MOE_FP32,
                           c + i * a.d.c.stride + column, MOE_FP32, a.row_weight[i],
                           min(64, a.d.n - column), (int)threadIdx.x % 32, 32);
}

static void down_try(trand* r, int T, int K, int E, int H, int I, int one_expert)
{
    const int R = T * K;
    int32_t* token = (int32_t*)test_host(R * 4);
    int32_t* offset = (int32_t*)test_host((E + 1) * 4);
    float *weight = (float*)test_host(R * 4), *start = (float*)test_host((int64_t)T * H * 4), *got;
    uint16_t* act = (uint16_t*)test_host((int64_t)R * I * 2);
    uint16_t* w2 = (uint16_t*)test_host((int64_t)E * H * I * 2);
    double* exact = (double*)test_host((int64_t)T * H * 8);
    double* sum = (double*)test_host((int64_t)T * H * 8);
    tbuf tokens, offsets, weights, a_buf, b_buf, c_buf, y;
    moe_grouped_gemm_desc d;
    down_args a;
    moe_launch_config l;
    int most = 0, busiest = 0;
    /* rows in expert order, some experts without; which token a row belongs to is anything */
    offset[0] = 0;
    for (int e = 1; e < E; ++e)
        offset[e] = one_expert ? (e > E / 2 ? R : 0) : (int)trand_int(r, offset[e - 1], R);
    offset[E] = R;
    for (int e = 0; e < E; ++e)
        if (offset[e + 1] - offset[e] > most) most = offset[e + 1] - offset[e];
    for (int i = 0; i < R; ++i) {
        token[i] = (int32_t)trand_int(r, 0, T - 1);
        weight[i] = trand_normal(r);
    }
    trand_fill_normal(r, act, (int64_t)R * I, MOE_FP16);
    trand_fill_normal(r, w2, (int64_t)E * H * I, MOE_FP16);
    trand_fill_normal(r, start, (int64_t)T * H, MOE_FP32); /* a residual */
    tokens = tbuf_from("row_token", token, (size_t)R * 4, 0);
    offsets = tbuf_from("offset", offset, (size_t)(E + 1) * 4, 0);
    weights = tbuf_from("row_weight", weight, (size_t)R * 4, 0);
    a_buf = tbuf_from("a", act, (size_t)R * I * 2, 0);
    b_buf = tbuf_from("b", w2, (size_t)E * H * I * 2, 0);
    c_buf = tbuf_new("c", (size_t)R * H * 4, 0);
    y = tbuf_from("y", start, (size_t)T * H * 4, 0);

    memset(&a, 0, sizeof a);
    memset(&d, 0, sizeof d);
    d.a = a_buf.p;
    d.b.base = b_buf.p;
    d.expert_offset = (const int32_t*)offsets.p;
    d.c = c_buf.p;
    d.num_experts = E;
    d.num_rows = R;
    d.n = H;
    d.k = I;
    d.dtype = MOE_FP16;
    d.c_dtype = MOE_FP32;
    a.row_token = (const int32_t*)tokens.p;
    a.row_weight = (const float*)weights.p;
    a.y = (float*)y.p;
    CHECK_STATUS(moe_gemm_tile_resolve(&d, &a.d), MOE_OK);
    l = moe_grid((H + 63) / 64, 128, moe_gemm_tile_smem(DOWN_SHAPE), test_now.stream);
    l.grid.y = (unsigned)(most + 63) / 64;
    l.grid.z = (unsigned)E;
    CHECK_STATUS(MOE_LAUNCH(down_kernel, l, a), MOE_OK);

    for (int i = 0; i < T * H; ++i) sum[i] = fabs(exact[i] = start[i]);
    for (int e = 0; e < E; ++e)
        for (int i = offset[e]; i < offset[e + 1]; ++i)
            for (int n = 0; n < H; ++n)
                for (int k = 0; k < I; ++k) {
                    const double p = (double)weight[i] * moe_fp16_to_f32(act[(int64_t)i * I + k]) *
                                     moe_fp16_to_f32(w2[((int64_t)e * H + n) * I + k]);
                    exact[(int64_t)token[i] * H + n] += p;
                    sum[(int64_t)token[i] * H + n] += fabs(p);
                }
    got = (float*)tbuf_copy(&y);
    for (int t = 0; t < T; ++t) {
        int n = 0;
        for (int i = 0; i < R; ++i) n += token[i] == t;
        if (n > busiest) busiest = n;
    }
    /* a sum over k, a product, and as many additions as a token has rows */
    CHECK_CLOSE_SUM("y", got, H, exact, sum, I + 16 * (busiest + 1), T, H);
    free(got), free(token), free(offset), free(weight), free(act), free(w2), free(start);
    free(exact), free(sum);
    tbuf_free(&tokens), tbuf_free(&offsets), tbuf_free(&weights), tbuf_free(&a_buf);
    tbuf_free(&b_buf), tbuf_free(&c_buf), tbuf_free(&y);
}

static void test_device_down_projection(void)
{
    trand r = trand_new(2);
    down_try(&r, 20, 3, 5, 136, 40, 0);
    down_try(&r, 1, 1, 1, 8, 8, 0);
    down_try(&r, 33, 4, 3, 64, 72, 1); /* all rows at one expert: three tiles of rows */
    down_try(&r, 9, 2, 16, 72, 136, 0);
}

/* ---- tokens into expert order in one block: moe/route/rank.cuh, moe/permute.cuh ---- */

#define SORT_MAX_E 64

typedef struct sort_args {
    const int32_t* ids; /* [slots] -1: none */
    const uint16_t* x;  /* [slots / top_k, H] */
    int32_t* offset;    /* [E + 1] out */
    int32_t* slot_row;  /* [slots] out, -1 where there is no id */
    uint16_t* rows;     /* [slots, H] out: tokens in expert order, then zeros */
    int32_t slots, top_k, num_experts, hidden;
} sort_args;

typedef struct sort_shared {
    int32_t next[SORT_MAX_E]; /* first counts, then where an expert's next row goes */
    int32_t rows;
} sort_shared;

/* One block: its first warp sorts the slots, 32 at a time, then every warp copies rows. */
MOE_KERNEL(128, 1) sort_kernel(MOE_ARG(sort_args) a)
{
    MOE_SHARED(sort_shared, s);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, E = a.num_experts;
    if (warp == 0) {
        for (int e = lane; e < E; e += 32) s.next[e] = 0;
        __syncwarp();
        for (int pass = 0; pass < 2; ++pass) {
            for (int first = 0; first < a.slots; first += 32) {
                const int slot = first + lane, id = slot < a.slots ? a.ids[slot] : -1;
                int count;
                const int rank = moe_route_rank(id, E, &count);
                if (pass == 1 && slot < a.slots) a.slot_row[slot] = id < 0 ? -1 : s.next[id] + rank;
                __syncwarp();
                if (id >= 0 && rank + 1 == count) s.next[id] += count;
                __syncwarp();
            }
            if (pass == 0 && lane == 0) {
                int before = 0;
                for (int e = 0; e < E; ++e) {
                    const int n = s.next[e];
                    a.offset[e] = s.next[e] = before;
                    before += n;
                }
                a.offset[E] = s.rows = before;
            }
            __syncwarp();
        }
    }
    __syncthreads();
    for (int slot = warp; slot < a.slots; slot += 4)
        if (a.slot_row[slot] >= 0)
            moe_copy_row(a.rows + (int64_t)a.slot_row[slot] * a.hidden,
                         a.x + (int64_t)(slot / a.top_k) * a.hidden, (int64_t)a.hidden * 2, lane,
                         32);
    for (int row = s.rows + warp; row < a.slots; row += 4)
        moe_copy_row(a.rows + (int64_t)row * a.hidden, 0, (int64_t)a.hidden * 2, lane, 32);
}

static void sort_try(trand* r, int T, int K, int E, int H, int fullest)
{
    const int slots = T * K;
    int32_t* ids = (int32_t*)test_host(slots * 4);
    int32_t *offset = (int32_t*)test_host((E + 1) * 4), *slot_row = (int32_t*)test_host(slots * 4);
    uint16_t* x = (uint16_t*)test_host((int64_t)T * H * 2);
    uint16_t* rows = (uint16_t*)test_host((int64_t)slots * H * 2);
    tbuf ids_buf, x_buf, offsets, row_buf, out;
    sort_args a;
    const moe_launch_config l = moe_grid(1, 128, 0, test_now.stream);
    int row = 0;
    for (int i = 0; i < slots; ++i)
        ids[i] = trand_int(r, 0, 9) == 0 ? -1 : fullest ? E - 1 : (int32_t)trand_int(r, 0, E - 1);
    trand_fill_normal(r, x, (int64_t)T * H, MOE_BF16);
    memset(rows, 0, (size_t)slots * H * 2);
    memset(slot_row, 0xff, (size_t)slots * 4);
    for (int e = 0; e < E; ++e) {
        offset[e] = row;
        for (int i = 0; i < slots; ++i)
            if (ids[i] == e) {
                memcpy(rows + (int64_t)row * H, x + (int64_t)(i / K) * H, (size_t)H * 2);
                slot_row[i] = row++;
            }
    }
    offset[E] = row;
    ids_buf = tbuf_from("ids", ids, (size_t)slots * 4, 0);
    x_buf = tbuf_from("x", x, (size_t)T * H * 2, 0);
    offsets = tbuf_new("offset", (size_t)(E + 1) * 4, 0);
    row_buf = tbuf_new("slot_row", (size_t)slots * 4, 0);
    out = tbuf_new("rows", (size_t)slots * H * 2, 0);
    a.ids = (const int32_t*)ids_buf.p;
    a.x = (const uint16_t*)x_buf.p;
    a.offset = (int32_t*)offsets.p;
    a.slot_row = (int32_t*)row_buf.p;
    a.rows = (uint16_t*)out.p;
    a.slots = slots;
    a.top_k = K;
    a.num_experts = E;
    a.hidden = H;
    CHECK_STATUS(MOE_LAUNCH(sort_kernel, l, a), MOE_OK);
    CHECK(tbuf_holds(&offsets, offset), "offsets, T %d K %d E %d", T, K, E);
    CHECK(tbuf_holds(&row_buf, slot_row), "slot_row, T %d K %d E %d", T, K, E);
    CHECK(tbuf_holds(&out, rows), "rows, T %d K %d E %d", T, K, E);
    free(ids), free(offset), free(slot_row), free(x), free(rows);
    tbuf_free(&ids_buf), tbuf_free(&x_buf), tbuf_free(&offsets), tbuf_free(&row_buf);
    tbuf_free(&out);
}

static void test_device_sort_and_copy(void)
{
    trand r = trand_new(3);
    sort_try(&r, 16, 2, 8, 64, 0); /* the 32 slots of one warp */
    sort_try(&r, 1, 1, 1, 1, 0);
    sort_try(&r, 5, 3, 64, 37, 0);
    sort_try(&r, 70, 3, 7, 72, 0);
    sort_try(&r, 40, 1, 5, 1030, 1); /* all at one expert */
}

/* ---- moe_copy_row with every alignment and length: moe/base/copy_row.cuh ---- */

#define COPY_LENGTHS 12
#define COPY_SPAN 2600 /* bytes of one copy's part of y */

typedef struct copy_args {
    const char* x;
    char* y;
    int32_t length[COPY_LENGTHS];
    int32_t x_at, y_at; /* bytes past a multiple of 16 */
} copy_args;

/* Even blocks copy, odd ones clear; the first 4 of the lengths by a warp, the others by the block. */
MOE_KERNEL(96, 1) copy_kernel(MOE_ARG(copy_args) a)
{
    const int i = (int)blockIdx.x / 2;
    const char* x = blockIdx.x % 2 ? (const char*)0 : a.x + a.x_at;
    char* y = a.y + (int64_t)blockIdx.x * COPY_SPAN + a.y_at;
    if (i >= 4) moe_copy_row(y, x, a.length[i], (int)threadIdx.x, (int)blockDim.x);
    else if (threadIdx.x < 32) moe_copy_row(y, x, a.length[i], (int)threadIdx.x, 32);
}

static void test_device_copy_row(void)
{
    static const int32_t length[COPY_LENGTHS] = {0,  2,  30,   514,  14,   16,
                                                 18, 66, 1536, 1550, 2056, 2560};
    trand r = trand_new(4);
    char* x = (char*)test_host(COPY_SPAN);
    char* want = (char*)test_host(2 * COPY_LENGTHS * COPY_SPAN);
    tbuf from, to = tbuf_new("y", 2 * COPY_LENGTHS * COPY_SPAN, 0);
    const moe_launch_config l = moe_grid(2 * COPY_LENGTHS, 96, 0, test_now.stream);
    copy_args a;
    for (int i = 0; i < COPY_SPAN; ++i) x[i] = (char)trand_int(&r, 1, 254);
    from = tbuf_from("x", x, COPY_SPAN, 0);
    memset(&a, 0, sizeof a);
    memcpy(a.length, length, sizeof length);
    a.x = (const char*)from.p;
    a.y = (char*)to.p;
    for (a.x_at = 0; a.x_at < 16; a.x_at += 2)
        for (a.y_at = 0; a.y_at < 16; a.y_at += a.x_at == 0 || a.x_at == 8 ? 2 : 8) {
            test_poison(want, 2 * COPY_LENGTHS * COPY_SPAN);
            for (int i = 0; i < COPY_LENGTHS; ++i) {
                memcpy(want + 2 * i * COPY_SPAN + a.y_at, x + a.x_at, (size_t)length[i]);
                memset(want + (2 * i + 1) * COPY_SPAN + a.y_at, 0, (size_t)length[i]);
            }
            tbuf_poison(&to);
            CHECK_STATUS(MOE_LAUNCH(copy_kernel, l, a), MOE_OK);
            CHECK(tbuf_holds(&to, want), "x %d, y %d past a multiple of 16", a.x_at, a.y_at);
        }
    free(x), free(want);
    tbuf_free(&from), tbuf_free(&to);
}

/* ---- a choice with noise: moe/base/random.h, moe/gate/top_k.cuh ---- */

#define NOISY_MAX_E 160

typedef struct noisy_args {
    const float* logits;
    int32_t* ids;
    uint64_t seed;
    int32_t num_experts, top_k;
} noisy_args;

typedef struct noisy_shared {
    float merit[NOISY_MAX_E];
} noisy_shared;

/* 0, 1 / 256, ... 15 / 16: exact, so that host and device add up the same. */
MOE_HOST_DEVICE float noisy_noise(uint64_t seed, int t, int e)
{
    return (float)(moe_random_words(seed, (uint32_t)e, (uint32_t)t, 7, 0).y >> 24) / 256.0f;
}

MOE_KERNEL(32, 1) noisy_kernel(MOE_ARG(noisy_args) a)
{
    MOE_SHARED(noisy_shared, s);
    const int t = (int)blockIdx.x, E = a.num_experts;
    for (int e = (int)threadIdx.x; e < E; e += 32)
        s.merit[e] = a.logits[(int64_t)t * E + e] + noisy_noise(a.seed, t, e);
    __syncwarp();
    moe_warp_top_k(a.ids + (int64_t)t * a.top_k, s.merit, E, a.top_k);
}

static void test_device_noisy_choice(void)
{
    enum { T = 30, E = 160, K = 9 };
    trand r = trand_new(5);
    float* logits = (float*)test_host(T * E * 4);
    int32_t* want[2];
    float merit[E];
    int same = 0;
    tbuf in, ids = tbuf_new("ids", T * K * 4, 0);
    noisy_args a;
    const moe_launch_config l = moe_grid(T, 32, 0, test_now.stream);
    for (int i = 0; i < T * E; ++i) logits[i] = (float)trand_int(&r, -8, 8) / 16.0f;
    in = tbuf_from("logits", logits, T * E * 4, 0);
    a.logits = (const float*)in.p;
    a.ids = (int32_t*)ids.p;
    a.num_experts = E;
    a.top_k = K;
    for (int run = 0; run < 2; ++run) { /* another seed chooses others */
        want[run] = (int32_t*)test_host(T * K * 4);
        a.seed = trand_bits(&r);
        for (int t = 0; t < T; ++t) {
            for (int e = 0; e < E; ++e) merit[e] = logits[t * E + e] + noisy_noise(a.seed, t, e);
            naive_top_k(want[run] + t * K, merit, E, K);
        }
        tbuf_poison(&ids);
        CHECK_STATUS(MOE_LAUNCH(noisy_kernel, l, a), MOE_OK);
        CHECK(tbuf_holds(&ids, want[run]), "ids, run %d", run);
    }
    for (int i = 0; i < T * K; ++i) same += want[0][i] == want[1][i];
    CHECK(same < T * K / 2, "%d of %d choices are the same with another seed", same, T * K);
    free(logits), free(want[0]), free(want[1]);
    tbuf_free(&in), tbuf_free(&ids);
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_device_gate_and_sum);
    RUN(test_device_down_projection);
    RUN(test_device_sort_and_copy);
    RUN(test_device_copy_row);
    RUN(test_device_noisy_choice);
    return test_end();
}
