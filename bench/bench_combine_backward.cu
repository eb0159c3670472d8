/* The gradients of combine through the pointer table, compared with the copy rate.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_combine_backward.cu -o bench_combine_backward

   Floor: dy read once and each gradient row written once, (T + T K) H elements; with dweights each
   forward row read once too, (T + 2 T K) H elements; at the rate of a device-to-device copy. Every
   expert's rows, and their gradients, are a separate allocation.

   Peer: a device-to-device copy that reads and writes as many bytes together, in the same rounds.
   Three calls: gradient rows alone; with dweights; with dweights and the gradients in place of the
   rows. */
#include "bench.h"

#include "../moe/combine_backward.cuh"

typedef struct job {
    moe_combine_backward_desc d;
    int E;
    int32_t* count;                /* [E] rows of each expert, host */
    void **buffer, **gradient;     /* [E] host copies of the tables */
    const void* const* rows_table; /* device */
    void* const* drows_table;      /* device */
    float* dweights;               /* device */
} job;

static void run_backward(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_combine_backward(&((const job*)context)->d, stream));
}

/* Compares tokens 0, step, 2 step, ... with products and sums in double. The bound of a product is
   twice the error of rounding to bf16, that of a dot the house's for fp32 sums of H products. */
typedef struct check_args {
    moe_combine_backward_desc d;
    const void* const* rows_table; /* the forward's rows, not replaced */
    int step;                      /* tokens between two checked ones */
    unsigned* worst;               /* [2] bits of the largest error over its bound: rows, dots */
} check_args;

static __device__ inline void note_worst(unsigned* worst, double error, double bound)
{
    const float ratio = (float)(error / bound);
    atomicMax(worst, ratio <= 1e30f ? __float_as_uint(ratio) : 0x7f800000u);
}

MOE_KERNEL(256, 1) check_backward(MOE_ARG(check_args) a)
{
    const int64_t t = (int64_t)blockIdx.x * a.step, H = a.d.hidden;
    for (int k = threadIdx.x / 32; k < a.d.top_k; k += 8) { /* a warp a slot */
        const int64_t slot = t * a.d.top_k + k;
        const moe_place p = a.d.place[slot];
        double dot = 0.0, sum = 0.0;
        for (int64_t h = threadIdx.x % 32; h < H; h += 32) {
            const double dy = moe_load_f32(a.d.dy, t * H + h, MOE_BF16);
            const double want = a.d.weights[slot] * dy;
            const double row = moe_load_f32(a.rows_table[p.buffer], p.row * H + h, MOE_BF16);
            const double got = moe_load_f32(a.d.drows_table[p.buffer], p.row * H + h, MOE_BF16);
            note_worst(a.worst, fabs(got - want), fabs(want) / 256.0 + 1e-30);
            dot += dy * row;
            sum += fabs(dy * row);
        }
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            dot += __shfl_xor_sync(MOE_FULL_WARP, dot, lanes);
            sum += __shfl_xor_sync(MOE_FULL_WARP, sum, lanes);
        }
        if (a.d.dweights && threadIdx.x % 32 == 0)
            note_worst(a.worst + 1, fabs(a.d.dweights[slot] - dot),
                       (H / 16.0 + 2.0) / 8388608.0 * sum);
    }
}

/* Runs the call on poisoned outputs and compares them. Returns 1 where an error exceeds its bound
   or the call took memory. */
static int verify(bench_state* s, job* j, const char* what)
{
    const int64_t H = j->d.hidden, slots = (int64_t)j->d.num_tokens * j->d.top_k;
    moe_launch_config l = moe_grid(256, 256, 0, s->stream);
    size_t free_before, free_after, total;
    unsigned worst[2] = {0, 0};
    check_args check;
    float rows, dots;
    for (int e = 0; e < j->E; ++e)
        BENCH_CUDA(cudaMemset(j->gradient[e], 0xff, (size_t)(j->count[e] * H * 2)));
    BENCH_CUDA(cudaMemset(j->dweights, 0xff, (size_t)slots * 4));
    BENCH_CUDA(cudaMemGetInfo(&free_before, &total));
    run_backward(j, s->stream);
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemGetInfo(&free_after, &total));
    check.d = j->d;
    check.rows_table = j->rows_table;
    check.step = j->d.num_tokens / 256;
    BENCH_WORST(check_backward, l, check, worst);
    rows = moe_f32_from_bits(worst[0]);
    dots = moe_f32_from_bits(worst[1]);
    printf("%s: worst error of its bound: rows %.2f, dots %.2f; extra memory %lld bytes\n", what,
           rows, dots, (long long)(free_before - free_after));
    return !(rows <= 1.0f && dots <= 1.0f) || free_after != free_before;
}

/* Times the call and a copy of as many bytes in turn. */
static void compare_with_copy(bench_state* s, job* j, const char* what, double bytes)
{
    bench_copy_args copy;
    bench_call calls[2];
    copy.bytes = (size_t)(bytes / 2);
    copy.to = bench_alloc(copy.bytes);
    copy.from = bench_random((int64_t)(copy.bytes / 2), MOE_BF16, 1.0f, 3);
    calls[0] = bench_one(bench_copy, &copy);
    calls[1] = bench_one(run_backward, j);
    bench_alternate(s, calls, 2);
    bench_row(s, "cudaMemcpyAsync device to device, as many bytes", calls[0].ms,
              bytes / calls[0].ms * 1e-9, "TB/s", 1.0, "copy");
    bench_row(s, what, calls[1].ms, bytes / calls[1].ms * 1e-9, "TB/s", calls[0].ms / calls[1].ms,
              "copy rate");
    BENCH_CUDA(cudaFree(copy.to));
    BENCH_CUDA(cudaFree(copy.from));
}

/* Makes the inputs and outputs: a token's experts are distinct, and rows are in token order. */
static void open_job(job* j, int T, int H, int E, int K)
{
    const int64_t slots = (int64_t)T * K;
    moe_place* place = (moe_place*)malloc((size_t)slots * sizeof(moe_place));
    void* places = bench_alloc((size_t)slots * sizeof(moe_place));
    void* table = bench_alloc((size_t)E * sizeof(void*));
    void* gradients = bench_alloc((size_t)E * sizeof(void*));
    memset(j, 0, sizeof *j);
    j->E = E;
    j->count = (int32_t*)calloc((size_t)E, 4);
    j->buffer = (void**)calloc((size_t)E, sizeof(void*));
    j->gradient = (void**)calloc((size_t)E, sizeof(void*));
    for (int64_t i = 0; i < slots; ++i) {
        const int first = (int)(bench_hash(7, (uint32_t)(i / K)) % (unsigned)E);
        const int step = 2 * (int)(bench_hash(8, (uint32_t)(i / K)) % (unsigned)(E / 2)) + 1;
        const int e = (first + (int)(i % K) * step) % E;
        place[i].buffer = e;
        place[i].row = j->count[e]++;
    }
    for (int e = 0; e < E; ++e) {
        j->buffer[e] = bench_random((int64_t)j->count[e] * H, MOE_BF16, 1.0f, (uint32_t)(100 + e));
        j->gradient[e] = bench_alloc((size_t)j->count[e] * (size_t)H * 2);
    }
    BENCH_CUDA(cudaMemcpy(table, j->buffer, (size_t)E * sizeof(void*), cudaMemcpyHostToDevice));
    BENCH_CUDA(
        cudaMemcpy(gradients, j->gradient, (size_t)E * sizeof(void*), cudaMemcpyHostToDevice));
    BENCH_CUDA(
        cudaMemcpy(places, place, (size_t)slots * sizeof(moe_place), cudaMemcpyHostToDevice));
    free(place);
    j->rows_table = (const void* const*)table;
    j->drows_table = (void* const*)gradients;
    j->dweights = (float*)bench_alloc((size_t)slots * 4);
    j->d.dy = bench_random((int64_t)T * H, MOE_BF16, 1.0f, 4);
    j->d.place = (const moe_place*)places;
    j->d.weights = (const float*)bench_random(slots, MOE_FP32, 0.3f, 5);
    j->d.drows_table = j->drows_table;
    j->d.num_buffers = E;
    j->d.num_tokens = T, j->d.hidden = H, j->d.top_k = K;
}

static void close_job(job* j)
{
    for (int e = 0; e < j->E; ++e) cudaFree(j->buffer[e]), cudaFree(j->gradient[e]);
    cudaFree((void*)j->rows_table), cudaFree((void*)j->drows_table), cudaFree(j->dweights);
    cudaFree((void*)j->d.dy), cudaFree((void*)j->d.place), cudaFree((void*)j->d.weights);
    free(j->count), free(j->buffer), free(j->gradient);
}

static void run_shape(bench_state* s, int T, int H, int E, int K, int* failures)
{
    const double token = (double)T * H * 2.0, rows = token * K;
    char what[96];
    job j;
    open_job(&j, T, H, E, K);
    snprintf(what, sizeof what, "T %d H %d E %d K %d, rows", T, H, E, K);
    *failures += verify(s, &j, what);
    compare_with_copy(s, &j, what, token + rows);
    j.d.table = j.rows_table;
    j.d.dweights = j.dweights;
    snprintf(what, sizeof what, "T %d H %d E %d K %d, rows and dweights", T, H, E, K);
    *failures += verify(s, &j, what);
    compare_with_copy(s, &j, what, token + 2.0 * rows);
    bench_note_clocks(s, run_backward, &j, (token + 2.0 * rows) / s->copy_rate * 1e3);
    j.d.drows_table = (void* const*)j.rows_table; /* last, since the rows are lost */
    snprintf(what, sizeof what, "T %d H %d E %d K %d, in place, dweights", T, H, E, K);
    compare_with_copy(s, &j, what, token + 2.0 * rows);
    close_job(&j);
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, "combine_backward");
    int failures = 0;
    BENCH_MOE(moe_combine_backward_preload());
    run_shape(&s, 32768, 4096, 128, 8, &failures);
    run_shape(&s, 24576, 1536, 128, 8, &failures);
    run_shape(&s, 8192, 7168, 256, 8, &failures);
    run_shape(&s, 16384, 4096, 8, 2, &failures);
    return bench_close(&s, failures);
}
