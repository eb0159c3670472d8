/* test_preload.cu: after its preload, a station launches no kernel that was not loaded. The CPU
   backend refuses any other, and says whether the calls of a test launched all that was loaded; on
   a GPU the calls just run.

     nvcc -I. -arch=sm_90a tests/unit/test_preload.cu -o test_preload
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_preload.cu -o test_preload

   test_router           router, with the GEMM
   test_gate             gate
   test_gate_backward    its gradients
   test_balance_loss     balance losses, update of the bias
   test_route            route
   test_grouped_gemm     grouped GEMM and experts
   test_combine          combine
   test_combine_backward its gradients
   test_layer            the layer
   test_layer_backward   its gradients, with those of experts and router
   test_permute          permute
   test_combine_scatter  scatter combine
   test_block_sparse     block-sparse product
   test_block_list       its list
   test_block_layer      block layer
   test_everything       moe_preload loads what every station loads
   test_null             null and refused structs are empty and run nothing */
#include "tests/test.h"

#include "moe/balance_loss.cuh"
#include "moe/combine_backward.cuh"
#include "moe/layer_backward.cuh"
#include "moe/moe.cuh"

enum { T = 5, H = 64, I = 32, E = 4, K = 2, R = T * K, MOST_BUFFERS = 24 };

static const int dtypes[] = {MOE_BF16, MOE_FP16};

/* Buffers of one test, zeros all. */
static tbuf buffers[MOST_BUFFERS];
static int num_buffers;

static void* zeros(size_t bytes)
{
    tbuf* const b = &buffers[num_buffers++];
    *b = tbuf_new("zeros", bytes, 0);
    TEST_CUDA(cudaMemset(b->p, 0, bytes));
    return b->p;
}

static void* ints(const int32_t* from, int n)
{
    buffers[num_buffers] = tbuf_from("integers", from, (size_t)n * 4, 0);
    return buffers[num_buffers++].p;
}

static moe_status preload_all(void) { return moe_preload(); }

/* Only what this preload loads may run from here on. */
static void begin(moe_status (*preload)(void))
{
#if MOE_ON_HOST
    static moe_status (*last)(void);
    moeh_require_preload(0);
    moeh_get().preloaded.clear();
    if (preload != last) moeh_get().launched.clear();
    last = preload;
#endif
    CHECK_STATUS(preload(), MOE_OK);
#if MOE_ON_HOST
    moeh_require_preload(1);
#endif
}

static void end(void)
{
    TEST_CUDA(cudaDeviceSynchronize());
#if MOE_ON_HOST
    moeh_require_preload(0);
#endif
    while (num_buffers) tbuf_free(&buffers[--num_buffers]);
}

/* Every kernel of this preload was launched since the last preload changed. */
static void all_launched(moe_status (*preload)(void))
{
#if MOE_ON_HOST
    int missing = 0;
    moeh_get().preloaded.clear();
    CHECK_STATUS(preload(), MOE_OK);
    for (const void* kernel : moeh_get().preloaded) missing += !moeh_get().launched.count(kernel);
    CHECK(missing == 0, "%d of %zu kernels were not launched", missing,
          moeh_get().preloaded.size());
#else
    (void)preload;
#endif
}

static const int32_t some_ids[T * K] = {0, 1, 2, 3, 3, 1, 0, 2, 1, 2};
static const int32_t map[R] = {4, 0, 2, 5, 3, 1, 9, 7, 8, 6},
                     back[R] = {1, 5, 2, 4, 0, 3, 9, 7, 8, 6};
static const int32_t offsets[E + 1] = {0, 3, 5, 8, R};

static moe_status router_preload(void) /* the product may be a GEMM */
{
    MOE_TRY(moe_router_preload());
    return moe_grouped_gemm_preload();
}

static void test_router(void)
{
    static const struct {
        int tokens, experts, x_dtype, router_dtype;
    } shape[] = {
        {5, 4, MOE_FP32, MOE_FP32}, {5, 8, MOE_BF16, MOE_BF16},      {5, 6, MOE_FP16, MOE_FP16},
        {5, 6, MOE_BF16, MOE_BF16}, {300, 260, MOE_FP16, MOE_FP16},  {300, 260, MOE_BF16, MOE_BF16},
        {5, 6, MOE_BF16, MOE_FP32}, {1100, 160, MOE_BF16, MOE_FP32}, {5, 6, MOE_FP16, MOE_FP32},
        {600, 160, MOE_FP16, MOE_FP32},
    };
    for (size_t i = 0; i < sizeof shape / sizeof *shape; ++i) {
        moe_router_desc d;
        begin(router_preload);
        memset(&d, 0, sizeof d);
        d.num_tokens = shape[i].tokens;
        d.num_experts = shape[i].experts;
        d.hidden = 16;
        d.x_dtype = shape[i].x_dtype;
        d.router_dtype = shape[i].router_dtype;
        d.x = zeros((size_t)d.num_tokens * 16 * 4);
        d.router = zeros((size_t)d.num_experts * 16 * 4);
        d.logits = (float*)zeros((size_t)d.num_tokens * (size_t)d.num_experts * 4);
        CHECK_STATUS(moe_router_logits(&d, test_now.stream), MOE_OK);
        end();
    }
    all_launched(moe_router_preload);
}

static void test_gate(void)
{
    static const int experts[] = {5, 64, 100, 128, 200, 256, 600, 1024, 1500};
    static const int top_k[] = {2, 8, 20, 40};
    for (int i = 0; i < 9 * 4 * 3; ++i) { /* plain, with rules, one selection for all */
        const int E = experts[i / 12], K = top_k[i / 3 % 4];
        moe_gate_desc d;
        if (K > E) continue;
        begin(moe_gate_preload);
        memset(&d, 0, sizeof d);
        d.logits = zeros((size_t)T * (size_t)E * 4);
        d.ids = (int32_t*)zeros((size_t)T * (size_t)K * 4);
        d.weights = (float*)zeros((size_t)T * (size_t)K * 4);
        d.expert_count = (int32_t*)zeros((size_t)E * 4);
        d.num_tokens = T;
        d.num_experts = E;
        d.top_k = K;
        if (i % 3) d.prob_sum = (float*)zeros((size_t)E * 4);
        d.whole_batch = i % 3 == 2;
        CHECK_STATUS(moe_gate_workspace(&d, &d.workspace_bytes), MOE_OK);
        if (d.workspace_bytes) d.workspace = zeros(d.workspace_bytes);
        CHECK_STATUS(moe_gate(&d, test_now.stream), MOE_OK);
        end();
    }
    all_launched(moe_gate_preload);
}

static void test_gate_backward(void)
{
    static const int experts[] = {5, 200, 600, 1500};
    for (int i = 0; i < 4 * 2; ++i) { /* gradients by the whole row, by the choices alone */
        const int E = experts[i / 2];
        moe_gate_backward_desc d;
        begin(moe_gate_backward_preload);
        memset(&d, 0, sizeof d);
        d.gate.logits = zeros((size_t)T * (size_t)E * 4);
        d.gate.ids = (int32_t*)ints(some_ids, T * K);
        d.gate.weights = (float*)zeros(T * K * 4);
        d.gate.renormalize = i % 2;
        d.gate.num_tokens = T;
        d.gate.num_experts = E;
        d.gate.top_k = K;
        d.dweights = (const float*)zeros(T * K * 4);
        d.dlogits = zeros((size_t)T * (size_t)E * 4);
        CHECK_STATUS(moe_gate_backward(&d, test_now.stream), MOE_OK);
        end();
    }
    all_launched(moe_gate_backward_preload);
}

static void test_balance_loss(void)
{
    moe_balance_loss_desc d;
    moe_balance_bias_desc u;
    begin(moe_balance_loss_preload);
    memset(&d, 0, sizeof d);
    memset(&u, 0, sizeof u);
    d.expert_count = u.expert_count = (const int32_t*)zeros(E * 4);
    d.prob_sum = (const float*)zeros(E * 4);
    d.balance_grad = (float*)zeros((E + 1) * 4);
    u.expert_bias = (float*)zeros(E * 4);
    d.num_experts = u.num_experts = E;
    CHECK_STATUS(moe_balance_loss(&d, test_now.stream), MOE_OK);
    CHECK_STATUS(moe_balance_bias(&u, test_now.stream), MOE_OK);
    end();
    all_launched(moe_balance_loss_preload);
}

static void test_route(void)
{
    static const int32_t replicas[E + 1] = {0, 1, 2, 4, 5};
    for (int i = 0; i < 2 * 2 * 3; ++i) { /* counts given; replicas; capacity, by what rule */
        const int counted = i % 2, replicated = i / 2 % 2, P = E + replicated;
        moe_route_desc d;
        if (counted && replicated) continue;
        begin(moe_route_preload);
        memset(&d, 0, sizeof d);
        d.ids = (const int32_t*)ints(some_ids, T * K);
        d.weights = (const float*)zeros(T * K * 4);
        if (counted) {
            static const int32_t counts[E] = {2, 3, 3, 2};
            d.chunk_count = (int32_t*)ints(counts, E);
        }
        if (replicated) d.replica_offset = (const int32_t*)ints(replicas, E + 1);
        d.num_replicas = replicated ? P : 0;
        d.expert_count = (int32_t*)zeros((size_t)P * 4);
        d.expert_offset = (int32_t*)zeros((size_t)P * 4 + 4);
        d.slot_row = (int32_t*)zeros(T * K * 4);
        d.num_tokens = T;
        d.num_experts = E;
        d.top_k = K;
        if (i / 4) d.capacity = 2;
        if (i / 4 == 2) d.drop_rule = MOE_DROP_BY_WEIGHT;
        CHECK_STATUS(moe_route_workspace(&d, &d.workspace_bytes), MOE_OK);
        if (d.workspace_bytes) d.workspace = zeros(d.workspace_bytes);
        CHECK_STATUS(moe_route(&d, test_now.stream), MOE_OK);
        end();
    }
    all_launched(moe_route_preload);
}

static void test_grouped_gemm(void)
{
    for (int tile = MOE_TILE_AUTO; tile <= MOE_TILE_64x64; ++tile)
        for (int i = 0; i < 8; ++i) { /* dtype, major of B, gradient */
            moe_grouped_gemm_desc d;
            moe_gemm_plan p;
            const int gradient = i / 4;
            begin(gradient ? moe_grouped_gemm_gradient_preload : moe_grouped_gemm_preload);
            memset(&d, 0, sizeof d);
            d.a = zeros(R * H * 2);
            d.b.base = zeros(E * I * H * 2);
            d.b.major = i / 2 % 2 ? MOE_MAJOR_MN : MOE_MAJOR_K;
            d.c = zeros(R * I * 2);
            d.gradient = gradient;
            if (gradient) d.activation = MOE_ACTIVATION_GELU, d.pre = zeros(R * I * 2);
            d.expert_offset = (const int32_t*)ints(offsets, E + 1);
            d.num_experts = E;
            d.num_rows = R;
            d.n = I;
            d.k = H;
            d.dtype = dtypes[i % 2];
            d.tile = tile;
            if ((gradient ? moe_grouped_gemm_gradient_plan : moe_grouped_gemm_plan)(&d, &p) !=
                MOE_STATUS(MOE_ERR_CONFLICT, tile)) {
                CHECK_STATUS(
                    (gradient ? moe_grouped_gemm_gradient : moe_grouped_gemm)(&d, test_now.stream),
                    MOE_OK);
            } else {
                CHECK(tile == MOE_TILE_128x256 && i / 2 % 2,
                      "the largest tile has B k-major alone");
            }
            end();
        }
}

static void test_combine(void)
{
    static const int all[] = {MOE_FP32, MOE_FP16, MOE_BF16};
    for (int i = 0; i < 6; ++i) {
        moe_combine_desc d;
        begin(moe_combine_preload);
        memset(&d, 0, sizeof d);
        d.rows = zeros(R * H * 4);
        d.place = (const moe_place*)zeros(T * K * sizeof(moe_place));
        d.y = zeros(T * H * 4);
        d.rows_dtype = all[i % 3];
        d.num_tokens = T;
        d.hidden = i < 3 ? H : 31; /* in vectors of 16 bytes, and one by one */
        d.top_k = K;
        CHECK_STATUS(moe_combine(&d, test_now.stream), MOE_OK);
        end();
    }
    all_launched(moe_combine_preload);
}

static void test_combine_backward(void)
{
    static const int all[] = {MOE_FP32, MOE_FP16, MOE_BF16};
    for (int i = 0; i < 12; ++i) {
        moe_combine_backward_desc d;
        begin(moe_combine_backward_preload);
        memset(&d, 0, sizeof d);
        d.dy = zeros(T * H * 4);
        d.place = (const moe_place*)zeros(T * K * sizeof(moe_place));
        d.rows_dtype = all[i % 3];
        if (i / 3 % 2) { /* with dots: rows are read alone, so all slots may name row 0 */
            d.rows = zeros(R * H * 4);
            d.dweights = (float*)zeros(T * K * 4);
        } else {
            d.dshared = zeros(T * H * 4);
        }
        d.num_tokens = T;
        d.hidden = i < 6 ? H : 31; /* in vectors of 16 bytes, and one by one */
        d.top_k = K;
        CHECK_STATUS(moe_combine_backward(&d, test_now.stream), MOE_OK);
        end();
    }
    all_launched(moe_combine_backward_preload);
}

static void test_layer(void)
{
    for (int tile = MOE_TILE_AUTO; tile <= MOE_TILE_64x64; ++tile)
        for (int i = 0; i < 4; ++i) { /* dtypes; with a router, with ids and a shared expert */
            moe_layer_desc d;
            begin(preload_all);
            memset(&d, 0, sizeof d);
            d.x = zeros(T * H * 2);
            if (i < 2) {
                d.router = zeros(E * H * 2);
            } else {
                d.ids = (const int32_t*)ints(some_ids, T * K);
                d.weights = (const float*)zeros(T * K * 4);
                d.shared.w1.base = zeros(2 * I * H * 2);
                d.shared.w2.base = zeros(I * H * 2);
                d.shared.intermediate = I;
            }
            d.w1.base = zeros(E * 2 * I * H * 2);
            d.w2.base = zeros(E * I * H * 2);
            d.y = zeros(T * H * 2);
            d.num_tokens = T;
            d.hidden = H;
            d.intermediate = I;
            d.num_experts = E;
            d.top_k = K;
            d.dtype = dtypes[i % 2];
            d.tile = tile;
            CHECK_STATUS(moe_layer_workspace(&d, &d.workspace_bytes), MOE_OK);
            d.workspace = zeros(d.workspace_bytes);
            CHECK_STATUS(moe_layer_forward(&d, test_now.stream), MOE_OK);
            end();
        }
}

static void test_layer_backward(void)
{
    for (int i = 0; i < 12; ++i) { /* dtypes; router's dtype, ids; with biases, in fp32 */
        moe_layer_saved_list list;
        moe_layer_backward_desc b;
        moe_layer_desc d;
        begin(i < 6 ? preload_all : moe_layer_backward_preload);
        memset(&d, 0, sizeof d);
        memset(&b, 0, sizeof b);
        d.x = zeros(T * H * 2);
        if (i / 2 % 3 == 2) {
            d.ids = (const int32_t*)ints(some_ids, T * K);
            d.weights = (const float*)zeros(T * K * 4);
        } else {
            d.router = zeros(E * H * 4);
            d.router_dtype = i / 2 % 3 ? MOE_FP32 : 0;
        }
        d.w1.base = zeros(E * 2 * I * H * 2);
        d.w2.base = zeros(E * I * H * 2);
        d.bias2 = i / 6 ? zeros(E * H * 2) : (void*)0;
        d.y = zeros(T * H * 2);
        d.num_tokens = T, d.hidden = H, d.intermediate = I, d.num_experts = E, d.top_k = K;
        d.dtype = dtypes[i % 2];
        CHECK_STATUS(moe_layer_saved(&d, &list), MOE_OK);
        d.saved = zeros(list.bytes), d.saved_bytes = list.bytes;
        b.layer = d;
        b.dy = zeros(T * H * 2), b.dx = zeros(T * H * 2);
        b.dw1.base = zeros(E * 2 * I * H * 4), b.dw2.base = zeros(E * I * H * 4);
        b.dweights = (float*)zeros(T * K * 4);
        b.dbias1 = i / 6 ? zeros(E * 2 * I * 4) : (void*)0;
        if (d.router) b.drouter = zeros(E * H * 4);
        b.grad_dtype = i / 6 ? MOE_FP32 : 0;
        b.gather = 1 + i / 6;
        CHECK_STATUS(moe_layer_backward_workspace(&b, &b.layer.workspace_bytes), MOE_OK);
        CHECK_STATUS(moe_layer_workspace(&d, &d.workspace_bytes), MOE_OK);
        b.layer.workspace = zeros(b.layer.workspace_bytes);
        d.workspace = zeros(d.workspace_bytes);
        CHECK_STATUS(moe_layer_forward(&d, test_now.stream), MOE_OK);
        CHECK_STATUS(moe_layer_backward(&b, test_now.stream), MOE_OK);
        end();
    }
}

static void test_permute(void)
{
    static const int widths[] = {8, 4, 2, 1, 16, 24, 40, 64}; /* elements of a row: all vectors */
    for (int i = 0; i < 16; ++i) {
        moe_permute_desc d;
        begin(moe_permute_preload);
        memset(&d, 0, sizeof d);
        d.x = zeros(R * H * 2);
        d.y = zeros(R * H * 2);
        d.row_slot = (const int32_t*)ints(map, R);
        if (i % 2) d.slot_row = (const int32_t*)ints(back, R);
        d.num_tokens = T;
        d.top_k = K;
        d.hidden = widths[i / 2];
        d.num_rows = R;
        CHECK_STATUS(moe_permute(&d, test_now.stream), MOE_OK);
        if (i % 2) CHECK_STATUS(moe_unpermute(&d, test_now.stream), MOE_OK);
        end();
    }
    all_launched(moe_permute_preload);
}

static void test_combine_scatter(void)
{
    static const int all[] = {MOE_FP32, MOE_FP16, MOE_BF16};
    for (int i = 0; i < 18; ++i) {
        moe_combine_scatter_desc d;
        begin(moe_combine_scatter_preload);
        memset(&d, 0, sizeof d);
        d.rows = zeros(R * H * 4);
        d.expert_offset = (const int32_t*)ints(offsets, E + 1);
        d.row_slot = (const int32_t*)ints(map, R);
        d.top_k = K;
        d.y = zeros(T * H * 4);
        d.rows_dtype = all[i % 3];
        d.y_dtype = all[i / 3 % 3];
        d.num_tokens = T;
        d.hidden = i < 9 ? H : 31; /* in vectors of 16 bytes, and one by one */
        d.num_experts = E;
        d.num_rows = R;
        CHECK_STATUS(moe_combine_scatter(&d, test_now.stream), MOE_OK);
        end();
    }
    all_launched(moe_combine_scatter_preload);
}

/* A list of all blocks of 32 x 32 of a matrix of 64 x 96. */
static moe_block_sparse_mask list_of_all(void)
{
    static const int32_t row[] = {0, 3, 6}, column[] = {0, 1, 2, 0, 1, 2};
    static const int32_t down[] = {0, 2, 4, 6}, line[] = {0, 1, 0, 1, 0, 1};
    static const int32_t position[] = {0, 3, 1, 4, 2, 5};
    moe_block_sparse_mask m;
    memset(&m, 0, sizeof m);
    m.row_offset = (const int32_t*)ints(row, 3);
    m.column_index = (const int32_t*)ints(column, 6);
    m.column_offset = (const int32_t*)ints(down, 4);
    m.row_index = (const int32_t*)ints(line, 6);
    m.position = (const int32_t*)ints(position, 6);
    m.rows = 64;
    m.columns = 96;
    m.block_rows = m.block_columns = 32;
    m.max_blocks = 6;
    return m;
}

static void test_block_sparse(void)
{
    for (int tile = MOE_BLOCK_SPARSE_TILE_AUTO; tile <= MOE_BLOCK_SPARSE_TILE_64x64; ++tile)
        for (int op = MOE_BLOCK_SPARSE_SDD; op <= MOE_BLOCK_SPARSE_DDS; ++op)
            for (int i = 0; i < 8; ++i) { /* dtype, transposed, zero_masked */
                moe_block_sparse_desc d;
                if (tile == MOE_BLOCK_SPARSE_TILE_128x256 || tile == MOE_BLOCK_SPARSE_TILE_64x256) {
                    if (i > 1) continue;
                }
                begin(moe_block_sparse_preload);
                memset(&d, 0, sizeof d);
                d.mask = list_of_all();
                d.a = zeros(128 * 128 * 2);
                d.b = zeros(128 * 128 * 2);
                d.c = zeros(128 * 128 * 2);
                d.op = op;
                d.a_transposed = i / 2 % 2;
                d.b_transposed = i / 2 % 2;
                d.m = op == MOE_BLOCK_SPARSE_SDD ? 64 : op == MOE_BLOCK_SPARSE_DSD ? 64 : 40;
                d.k = op == MOE_BLOCK_SPARSE_SDD ? 40 : op == MOE_BLOCK_SPARSE_DSD ? 96 : 64;
                d.n = op == MOE_BLOCK_SPARSE_SDD ? 96 : op == MOE_BLOCK_SPARSE_DSD ? 40 : 96;
                if (op == MOE_BLOCK_SPARSE_DSD && d.a_transposed) d.m = 96, d.k = 64;
                if (op == MOE_BLOCK_SPARSE_DDS && d.b_transposed) d.k = 96, d.n = 64;
                d.zero_masked = op == MOE_BLOCK_SPARSE_SDD && i / 4;
                d.dtype = dtypes[i % 2];
                d.choice.tile = tile;
                CHECK_STATUS(moe_block_sparse_workspace(&d, &d.workspace_bytes), MOE_OK);
                if (d.workspace_bytes) d.workspace = zeros(d.workspace_bytes);
                CHECK_STATUS(moe_block_sparse(&d, test_now.stream), MOE_OK);
                end();
            }
    all_launched(moe_block_sparse_preload);
}

static void test_block_list(void)
{
    for (int i = 0; i < 2; ++i) {
        moe_block_sparse_list_desc d;
        begin(moe_block_sparse_list_preload);
        memset(&d, 0, sizeof d);
        if (i) d.bytes = (const uint8_t*)zeros(2 * 3);
        else d.ids = (const int32_t*)ints(some_ids, T * K);
        d.rows = i ? 64 : T;
        d.columns = 96;
        d.block_rows = d.block_columns = 32;
        if (!i) {
            d.columns = E * 32;
            d.num_experts = E;
            d.top_k = K;
        }
        d.row_offset = (int32_t*)zeros(16 * 4);
        d.column_index = (int32_t*)zeros(16 * 4);
        d.column_offset = (int32_t*)zeros(16 * 4);
        d.row_index = (int32_t*)zeros(16 * 4);
        d.position = (int32_t*)zeros(16 * 4);
        d.max_blocks = 8;
        CHECK_STATUS(moe_block_sparse_list_workspace(&d, &d.workspace_bytes), MOE_OK);
        if (d.workspace_bytes) d.workspace = zeros(d.workspace_bytes);
        CHECK_STATUS(moe_block_sparse_list_build(&d, test_now.stream), MOE_OK);
        end();
    }
    all_launched(moe_block_sparse_list_preload);
}

static void test_block_layer(void)
{
    for (int i = 0; i < 12;
         ++i) { /* forms; dtypes; gradients in fp32, over the activations or not */
        const int form = MOE_BLOCK_LAYER_DENSE + i % 3, apart = i / 6;
        moe_block_layer_bytes bytes;
        moe_block_layer_desc d;
        begin(moe_block_layer_preload);
        memset(&d, 0, sizeof d);
        d.x = zeros(T * H * 2);
        if (form == MOE_BLOCK_LAYER_SPARSE) d.ids = (const int32_t*)ints(some_ids, T * K);
        if (form == MOE_BLOCK_LAYER_BATCH) d.ids = (const int32_t*)zeros(T * K * 4);
        d.weights = (const float*)zeros(T * E * 4);
        d.w1.base = zeros(E * 2 * I * H * 2);
        d.w2.base = zeros(E * I * H * 2);
        d.y = zeros(T * H * 2);
        d.dy = zeros(T * H * 2);
        d.dx = zeros(T * H * 2);
        d.dw1 = zeros(E * 2 * I * H * 4);
        d.dw2 = zeros(E * I * H * 4);
        d.grad_expert = (int32_t*)zeros(E * 4);
        d.dweights = (float*)zeros(T * E * 4);
        d.form = form;
        d.num_tokens = T;
        d.hidden = H;
        d.intermediate = I;
        d.num_experts = E;
        d.top_k = form == MOE_BLOCK_LAYER_DENSE ? 0 : K;
        d.block = 32;
        d.dtype = dtypes[i / 3 % 2];
        d.grad_dtype = apart ? MOE_FP32 : 0;
        CHECK_STATUS(moe_block_layer_sizes(&d, &bytes), MOE_OK);
        d.saved_bytes = bytes.saved;
        d.saved = zeros(bytes.saved);
        if (apart) d.act_grad = zeros(bytes.act_grad);
        d.workspace_bytes = bytes.forward > bytes.backward ? bytes.forward : bytes.backward;
        d.workspace = zeros(d.workspace_bytes);
        CHECK_STATUS(moe_block_layer_forward(&d, test_now.stream), MOE_OK);
        CHECK_STATUS(moe_block_layer_backward(&d, test_now.stream), MOE_OK);
        end();
    }
    all_launched(moei_block_layer_act_preload);
    all_launched(moei_block_layer_setup_preload);
}

/* moe_preload loads what every station's own preload loads. */
static void test_everything(void)
{
    static moe_status (*const stations[])(void) = {moe_router_preload,
                                                   moe_gate_preload,
                                                   moe_gate_backward_preload,
                                                   moe_balance_loss_preload,
                                                   moe_route_preload,
                                                   moe_grouped_gemm_preload,
                                                   moe_combine_preload,
                                                   moe_combine_backward_preload,
                                                   moe_layer_preload,
                                                   moe_router_backward_preload,
                                                   moe_experts_backward_preload,
                                                   moe_layer_backward_preload,
                                                   moe_permute_preload,
                                                   moe_combine_scatter_preload,
                                                   moe_block_sparse_preload,
                                                   moe_block_sparse_list_preload,
                                                   moe_block_layer_preload,
                                                   moe_k_grouped_gemm_preload,
                                                   moe_grouped_gemm_gradient_preload};
    for (size_t i = 0; i < sizeof stations / sizeof stations[0]; ++i) {
#if MOE_ON_HOST
        int missing = 0;
        std::set<const void*> all;
        moeh_get().preloaded.clear();
        CHECK_STATUS(moe_preload(), MOE_OK);
        all.swap(moeh_get().preloaded);
        CHECK_STATUS(stations[i](), MOE_OK);
        for (const void* kernel : moeh_get().preloaded) missing += !all.count(kernel);
        CHECK(missing == 0 && !moeh_get().preloaded.empty(), "station %d: %d of %zu", (int)i,
              missing, moeh_get().preloaded.size());
#else
        CHECK_STATUS(stations[i](), MOE_OK);
#endif
    }
    CHECK_STATUS(moe_preload(), MOE_OK);
}

/* In every station a null descriptor or prepared struct is refused, and a prepared struct whose
   descriptor was refused is empty and runs nothing, whatever it held before. */
static void test_null(void)
{
    const moe_status want = MOE_STATUS(MOE_ERR_NULL, desc);
#define NULLS(prepare, run, type)                                                                 \
    {                                                                                             \
        moe_##type##_desc d;                                                                      \
        static moe_##type##_prepared p;                                                           \
        memset(&d, 0, sizeof d);                                                                  \
        memset((void*)&p, 0xab, sizeof p);                                                        \
        (void)moe_##prepare(&d, &p); /* refused, or nothing to do */                              \
        CHECK_STATUS(moe_##run(&p, test_now.stream), MOE_OK);                                     \
        memset((void*)&p, 0xab, sizeof p);                                                        \
        CHECK_STATUS(moe_##prepare(0, &p), want);                                                 \
        test_empty(&p, sizeof p, __LINE__);                                                       \
        CHECK_STATUS(moe_##prepare(&d, 0), want);                                                 \
        CHECK_STATUS(moe_##run(0, test_now.stream), want);                                        \
    }
    NULLS(router_prepare, router_run, router)
    NULLS(gate_prepare, gate_run, gate)
    NULLS(gate_backward_prepare, gate_backward_run, gate_backward)
    NULLS(balance_loss_prepare, balance_loss_run, balance_loss)
    NULLS(balance_bias_prepare, balance_bias_run, balance_bias)
    NULLS(route_prepare, route_run, route)
    NULLS(grouped_gemm_prepare, grouped_gemm_run, grouped_gemm)
    NULLS(experts_prepare, experts_run, experts)
    NULLS(combine_prepare, combine_run, combine)
    NULLS(combine_backward_prepare, combine_backward_run, combine_backward)
    NULLS(layer_prepare, layer_run, layer)
    NULLS(layer_backward_prepare, layer_backward_run, layer_backward)
    NULLS(experts_backward_prepare, experts_backward_run, experts_backward)
    NULLS(router_backward_prepare, router_backward_run, router_backward)
    NULLS(permute_prepare, permute_run, permute)
    NULLS(unpermute_prepare, permute_run, permute)
    NULLS(combine_scatter_prepare, combine_scatter_run, combine_scatter)
    NULLS(block_sparse_list_prepare, block_sparse_list_run, block_sparse_list)
    NULLS(block_sparse_prepare, block_sparse_run, block_sparse)
    NULLS(block_layer_prepare_forward, block_layer_run, block_layer)
    NULLS(block_layer_prepare_backward, block_layer_run, block_layer)
#undef NULLS
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_null);
    RUN(test_router);
    RUN(test_gate);
    RUN(test_gate_backward);
    RUN(test_balance_loss);
    RUN(test_route);
    RUN(test_grouped_gemm);
    RUN(test_combine);
    RUN(test_combine_backward);
    RUN(test_layer);
    RUN(test_layer_backward);
    RUN(test_permute);
    RUN(test_combine_scatter);
    RUN(test_block_sparse);
    RUN(test_block_list);
    RUN(test_block_layer);
    RUN(test_everything);
    return test_end();
}
