/* Combine through the pointer table, gather form and scatter form, compared with the copy rate and
   with cat and index-add.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_combine.cu -o bench_combine

   Floor: each row read once, each token written once: (T K + T) H elements at the rate of a
   device-to-device copy. Every expert's rows are a separate allocation.

   The scatter form sets y to 0 and adds rows to y by atomics: in one launch over all experts, and
   in one launch an expert. Both times include the zeroing.

   The peer: one copy per expert into a joined array, one kernel that scales the rows in place,
   zeroed outputs, and one kernel that adds each row to its token by atomics. */
#include "bench.h"

#include "../moe/combine_scatter.cuh"

typedef struct job {
    moe_combine_desc combine;
    void** buffer;           /* [E] host copy of the table */
    int32_t* count;          /* [E] rows of each expert, host */
    char* joined;            /* the peer's extra memory */
    const float* row_weight; /* [T * K] device */
    const int32_t* row_token;
    moe_combine_scatter_desc scatter;
    int E;
} job;

static void run_combine(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_combine(&((const job*)context)->combine, stream));
}

static void zero_y(const job* j, cudaStream_t stream)
{
    const moe_combine_scatter_desc* d = &j->scatter;
    const size_t elems = (size_t)d->num_tokens * (size_t)d->hidden;
    BENCH_CUDA(cudaMemsetAsync(d->y, 0, elems * (size_t)moe_dtype_bytes(d->y_dtype), stream));
}

static void run_scatter(void* context, cudaStream_t stream)
{
    const job* j = (const job*)context;
    zero_y(j, stream);
    BENCH_MOE(moe_combine_scatter(&j->scatter, stream));
}

/* Runs the same kernel in one launch an expert. */
static void run_each_expert(void* context, cudaStream_t stream)
{
    const job* j = (const job*)context;
    zero_y(j, stream);
    for (int e = 0; e < j->E; ++e) {
        moe_combine_scatter_desc d = j->scatter;
        d.table += e;
        d.expert_offset += e;
        d.num_experts = 1;
        d.max_rows = j->count[e];
        if (j->count[e]) BENCH_MOE(moe_combine_scatter(&d, stream));
    }
}

typedef struct index_add_args {
    char* joined; /* [R, H] bf16 */
    __nv_bfloat162* y;
    const float* row_weight;
    const int32_t* row_token;
    int32_t hidden;
} index_add_args;

MOE_KERNEL(256, 1) scale_rows(MOE_ARG(index_add_args) d)
{
    uint4* row = (uint4*)(d.joined + (int64_t)blockIdx.x * d.hidden * 2);
    const float w = d.row_weight[blockIdx.x];
    for (int i = threadIdx.x; i < d.hidden / 8; i += 256) {
        uint4 v = row[i];
        uint32_t* u = &v.x;
        for (int j = 0; j < 4; ++j) {
            const float2 f = moe_unpack2(u[j], MOE_BF16);
            u[j] = moe_pack2(f.x * w, f.y * w, MOE_BF16);
        }
        row[i] = v;
    }
}

MOE_KERNEL(256, 1) index_add(MOE_ARG(index_add_args) d)
{
    const __nv_bfloat162* row =
        (const __nv_bfloat162*)(d.joined + (int64_t)blockIdx.x * d.hidden * 2);
    __nv_bfloat162* y = d.y + (int64_t)d.row_token[blockIdx.x] * d.hidden / 2;
    for (int i = threadIdx.x; i < d.hidden / 2; i += 256) atomicAdd(y + i, row[i]);
}

static void run_cat(void* context, cudaStream_t stream)
{
    const job* j = (const job*)context;
    const moe_combine_desc* c = &j->combine;
    const int64_t row_bytes = (int64_t)c->hidden * 2;
    const int rows = c->num_tokens * c->top_k;
    index_add_args a;
    moe_launch_config l = moe_grid(rows, 256, 0, stream);
    char* to = j->joined;
    for (int e = 0; e < j->E; ++e) {
        BENCH_CUDA(cudaMemcpyAsync(to, j->buffer[e], (size_t)(j->count[e] * row_bytes),
                                   cudaMemcpyDeviceToDevice, stream));
        to += j->count[e] * row_bytes;
    }
    BENCH_CUDA(cudaMemsetAsync(c->y, 0, (size_t)(c->num_tokens * row_bytes), stream));
    a.joined = j->joined;
    a.y = (__nv_bfloat162*)c->y;
    a.row_weight = j->row_weight;
    a.row_token = j->row_token;
    a.hidden = c->hidden;
    BENCH_MOE(MOE_LAUNCH(scale_rows, l, a));
    BENCH_MOE(MOE_LAUNCH(index_add, l, a));
}

/* Compares tokens 0, step, 2 step, ... with sums in double. The bound is twice the error of
   rounding to y's dtype, once, or with every product and addition. */
typedef struct check_args {
    moe_combine_desc c;
    int step, each;  /* tokens between two checked ones; each: every product and sum was rounded */
    double unit;     /* unit in the last place of y, relative */
    unsigned* worst; /* bits of the largest error over its bound */
} check_args;

MOE_KERNEL(256, 1) check_combine(MOE_ARG(check_args) d)
{
    const int64_t t = (int64_t)blockIdx.x * d.step;
    for (int h = threadIdx.x; h < d.c.hidden; h += 256) {
        double want = 0.0, sum = 0.0, bound;
        float got, ratio;
        for (int k = 0; k < d.c.top_k; ++k) {
            const moe_place p = d.c.place[t * d.c.top_k + k];
            const double v =
                (double)d.c.weights[t * d.c.top_k + k] *
                moe_load_f32(d.c.table[p.buffer], (int64_t)p.row * d.c.hidden + h, MOE_BF16);
            want += v;
            sum += fabs(v);
        }
        got = moe_load_f32(d.c.y, t * d.c.hidden + h, d.c.y_dtype);
        bound = 2.0 * (d.each ? (d.c.top_k + 1) * sum : fabs(want)) * d.unit + 1e-3 * d.unit;
        ratio = (float)(fabs(got - want) / bound);
        atomicMax(d.worst, ratio <= 1e30f ? __float_as_uint(ratio) : 0x7f800000u);
    }
}

/* Returns the largest error of y over its bound. */
static float check_y(bench_state* s, const job* j, void* y, int y_dtype, int each)
{
    check_args check;
    moe_launch_config l = moe_grid(256, 256, 0, s->stream);
    unsigned worst = 0;
    check.c = j->combine;
    check.c.y = y;
    check.c.y_dtype = y_dtype;
    check.unit = y_dtype == MOE_FP32 ? 1.0 / 16777216.0 : 1.0 / 256.0;
    check.step = j->combine.num_tokens / 256;
    check.each = each;
    BENCH_WORST(check_combine, l, check, worst);
    return moe_f32_from_bits(worst);
}

static void run_shape(bench_state* s, int T, int H, int E, int K, int* failures)
{
    const int64_t slots = (int64_t)T * K;
    const double bytes = ((double)slots + T) * H * 2.0;
    moe_place* place = (moe_place*)malloc((size_t)slots * sizeof(moe_place));
    int32_t* row_token = (int32_t*)malloc((size_t)slots * 4);
    int32_t* id = (int32_t*)malloc((size_t)slots * 4);
    int32_t* next = (int32_t*)calloc((size_t)E + 1, 4);
    job j;
    float* weights = (float*)malloc((size_t)slots * 4);
    float* row_weight = (float*)malloc((size_t)slots * 4);
    float worst;
    char what[96];
    double ms, cat, scatter;
    bench_copy_args copy;
    size_t free_before, free_after, total;

    memset(&j, 0, sizeof j);
    j.E = E;
    j.count = (int32_t*)calloc((size_t)E, 4);
    j.buffer = (void**)calloc((size_t)E, sizeof(void*));
    for (int64_t i = 0; i < slots; ++i) { /* a token's experts are distinct */
        const int first = (int)(bench_hash(7, (uint32_t)(i / K)) % (unsigned)E);
        const int step = 2 * (int)(bench_hash(8, (uint32_t)(i / K)) % (unsigned)(E / 2)) + 1;
        id[i] = (first + (int)(i % K) * step) % E;
        place[i].buffer = id[i];
        place[i].row = j.count[id[i]]++;
    }
    for (int e = 0; e < E; ++e) next[e + 1] = next[e] + j.count[e];
    for (int64_t i = 0; i < slots; ++i) row_token[next[id[i]] + place[i].row] = (int32_t)(i / K);
    for (int e = 0; e < E; ++e)
        j.buffer[e] = bench_random((int64_t)j.count[e] * H, MOE_BF16, 1.0f, (uint32_t)(100 + e));
    {
        void* table = bench_alloc((size_t)E * sizeof(void*));
        void* places = bench_alloc((size_t)slots * sizeof(moe_place));
        void* tokens = bench_alloc((size_t)slots * 4);
        BENCH_CUDA(cudaMemcpy(table, j.buffer, (size_t)E * sizeof(void*), cudaMemcpyHostToDevice));
        BENCH_CUDA(cudaMemcpy(places, place, (size_t)slots * sizeof(moe_place), cudaMemcpyHostToDevice));
        BENCH_CUDA(cudaMemcpy(tokens, row_token, (size_t)slots * 4, cudaMemcpyHostToDevice));
        j.combine.table = (const void* const*)table;
        j.combine.place = (const moe_place*)places;
        j.row_token = (const int32_t*)tokens;
    }
    j.combine.weights = (const float*)bench_random(slots, MOE_FP32, 0.3f, 5);
    BENCH_CUDA(cudaMemcpy(weights, j.combine.weights, (size_t)slots * 4, cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < slots; ++i) row_weight[next[id[i]] + place[i].row] = weights[i];
    j.row_weight = (const float*)bench_alloc((size_t)slots * 4);
    BENCH_CUDA(cudaMemcpy((void*)j.row_weight, row_weight, (size_t)slots * 4, cudaMemcpyHostToDevice));
    j.combine.y = bench_alloc((size_t)T * (size_t)H * 2);
    j.combine.num_buffers = E;
    j.combine.num_tokens = T, j.combine.hidden = H, j.combine.top_k = K;
    {
        void* offset = bench_alloc((size_t)(E + 1) * 4);
        BENCH_CUDA(cudaMemcpy(offset, next, (size_t)(E + 1) * 4, cudaMemcpyHostToDevice));
        j.scatter.expert_offset = (const int32_t*)offset;
    }
    j.scatter.table = j.combine.table;
    j.scatter.row_token = j.row_token;
    j.scatter.row_weight = j.row_weight;
    j.scatter.num_tokens = T, j.scatter.hidden = H, j.scatter.num_experts = E;
    j.scatter.num_rows = (int32_t)slots;
    for (int e = 0; e < E; ++e)
        if (j.count[e] > j.scatter.max_rows) j.scatter.max_rows = j.count[e];

    BENCH_CUDA(cudaMemset(j.combine.y, 0xff, (size_t)T * (size_t)H * 2));
    BENCH_CUDA(cudaMemGetInfo(&free_before, &total));
    run_combine(&j, s->stream);
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemGetInfo(&free_after, &total));
    worst = check_y(s, &j, j.combine.y, MOE_BF16, 0);
    *failures += !(worst <= 1.0f) || free_after != free_before;
    printf("T %d H %d E %d K %d bf16: worst error %.2f of its bound, extra memory %lld bytes\n", T, H, E,
           K, worst, (long long)(free_before - free_after));

    copy.bytes = (size_t)(bytes / 2);
    copy.to = bench_alloc(copy.bytes);
    copy.from = bench_random((int64_t)(copy.bytes / 2), MOE_BF16, 1.0f, 3);
    ms = bench_time(s, bench_copy, &copy);
    s->copy_rate = 2.0 * (double)copy.bytes / (ms * 1e-3);
    bench_row(s, "cudaMemcpyAsync device to device, as many bytes", ms, s->copy_rate * 1e-12, "TB/s", 1.0,
              "copy");
    BENCH_CUDA(cudaFree(copy.to));
    BENCH_CUDA(cudaFree(copy.from));
    ms = bench_time(s, run_combine, &j);
    snprintf(what, sizeof what, "combine T %d H %d E %d K %d", T, H, E, K);
    bench_row(s, what, ms, bytes / ms * 1e-9, "TB/s", bytes / s->copy_rate * 1e3 / ms, "copy rate");
    j.joined = (char*)bench_alloc((size_t)slots * (size_t)H * 2);
    BENCH_CUDA(cudaMemset(j.combine.y, 0xff, (size_t)T * (size_t)H * 2));
    run_cat(&j, s->stream);
    *failures += !(check_y(s, &j, j.combine.y, MOE_BF16, 1) <= 1.0f);
    bench_note_clocks(s, run_combine, &j, ms);
    cat = bench_time(s, run_cat, &j);
    snprintf(what, sizeof what, "cat + index_add, %.1f GiB extra", (double)slots * H * 2 / (1 << 30));
    bench_row(s, what, cat, bytes / cat * 1e-9, "TB/s", ms / cat, "its time taken by combine");

    for (int y_dtype = MOE_FP32; y_dtype <= MOE_BF16; y_dtype += MOE_BF16 - MOE_FP32) {
        j.scatter.y_dtype = y_dtype;
        j.scatter.y = y_dtype == MOE_BF16 ? j.combine.y : bench_alloc((size_t)T * (size_t)H * 4);
        for (int each = 0; each < 2; ++each) {
            bench_fn run = each ? run_each_expert : run_scatter;
            BENCH_CUDA(cudaMemset(j.scatter.y, 0xff,
                                  (size_t)T * (size_t)H * (size_t)moe_dtype_bytes(y_dtype)));
            BENCH_CUDA(cudaMemGetInfo(&free_before, &total));
            run(&j, s->stream);
            BENCH_CUDA(cudaStreamSynchronize(s->stream));
            BENCH_CUDA(cudaMemGetInfo(&free_after, &total));
            worst = check_y(s, &j, j.scatter.y, y_dtype, 1);
            *failures += !(worst <= 1.0f) || free_after != free_before;
            scatter = bench_time(s, run, &j);
            snprintf(what, sizeof what, "scatter, y %s, %s: error %.2f, 0 extra",
                     moe_dtype_name(y_dtype), each ? "a launch an expert" : "one launch", worst);
            bench_row(s, what, scatter, bytes / scatter * 1e-9, "TB/s", scatter / cat,
                      "the time of cat + index_add");
        }
        if (y_dtype != MOE_BF16) BENCH_CUDA(cudaFree(j.scatter.y));
    }
    printf("  cat + index_add takes %.1f times combine's time\n", cat / ms);

    for (int e = 0; e < E; ++e) cudaFree(j.buffer[e]);
    cudaFree((void*)j.combine.table), cudaFree((void*)j.combine.place), cudaFree((void*)j.row_token);
    cudaFree((void*)j.combine.weights), cudaFree((void*)j.row_weight), cudaFree(j.combine.y);
    cudaFree(j.joined), cudaFree((void*)j.scatter.expert_offset);
    free(row_weight), free(weights);
    free(place), free(row_token), free(id), free(next), free(j.count), free(j.buffer);
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, "combine");
    int failures = 0;
    BENCH_MOE(moe_combine_scatter_preload());
    run_shape(&s, 8192, 16384, 256, 8, &failures);
    run_shape(&s, 32768, 4096, 128, 8, &failures);
    run_shape(&s, 24576, 1536, 128, 8, &failures);
    run_shape(&s, 16384, 4096, 8, 2, &failures);
    return bench_close(&s, failures);
}
