/* Permute and unpermute, compared with the copy rate.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_permute.cu -o bench_permute

   Floor of permute: each token read once, each row written once: (T + T K) H elements at the rate
   of a device-to-device copy. Of unpermute: each row read once, each slot written once, 2 T K H. */
#include "bench.h"

#include "../moe/permute.cuh"

typedef struct job {
    moe_permute_desc to, back;
} job;

static void run_permute(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_permute(&((const job*)context)->to, stream));
}

static void run_by_row(void* context, cudaStream_t stream)
{
    moe_permute_desc d = ((const job*)context)->to;
    d.slot_row = 0;
    BENCH_MOE(moe_permute(&d, stream));
}

static void run_unpermute(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_unpermute(&((const job*)context)->back, stream));
}

/* Counts the 16-byte vectors of y that differ from the right row of x: row r of permute is token
   row_slot[r] / K; slot s after both is token s / K again. */
typedef struct check_args {
    const uint4* x;
    const uint4* y;
    const int32_t* row_slot; /* null: y is in slot order */
    unsigned* wrong;
    int32_t top_k, vectors;
} check_args;

MOE_KERNEL(256, 1) check_rows(MOE_ARG(check_args) d)
{
    const int64_t r = blockIdx.x;
    const int64_t t = (d.row_slot ? d.row_slot[r] : r) / d.top_k;
    unsigned wrong = 0;
    for (int i = (int)threadIdx.x; i < d.vectors; i += 256) {
        const uint4 a = d.x[t * d.vectors + i], b = d.y[r * d.vectors + i];
        wrong += a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w;
    }
    if (wrong) atomicAdd(d.wrong, wrong);
}

static unsigned check(bench_state* s, const job* j, const void* y, const int32_t* row_slot)
{
    check_args a;
    moe_launch_config c = moe_grid(j->to.num_rows, 256, 0, s->stream);
    unsigned wrong = 0;
    a.x = (const uint4*)j->to.x;
    a.y = (const uint4*)y;
    a.row_slot = row_slot;
    a.wrong = (unsigned*)bench_alloc(4);
    a.top_k = j->to.top_k, a.vectors = j->to.hidden / 8;
    BENCH_CUDA(cudaMemset(a.wrong, 0, 4));
    BENCH_MOE(MOE_LAUNCH(check_rows, c, a));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemcpy(&wrong, a.wrong, 4, cudaMemcpyDeviceToHost));
    cudaFree(a.wrong);
    return wrong;
}

/* Times a copy that reads and writes `bytes` in all: the floor of the rows that follow. */
static void note_copy(bench_state* s, double bytes, void* to, const void* from)
{
    bench_copy_args copy;
    double ms;
    copy.bytes = (size_t)(bytes / 2) / 16 * 16;
    copy.to = to, copy.from = (void*)from;
    ms = bench_time(s, bench_copy, &copy);
    s->copy_rate = 2.0 * (double)copy.bytes / (ms * 1e-3);
    bench_row(s, "cudaMemcpyAsync device to device, as many bytes", ms, s->copy_rate * 1e-12,
              "TB/s", 1.0, "copy");
}

static void run_shape(bench_state* s, int T, int H, int E, int K, int* failures)
{
    const int64_t slots = (int64_t)T * K;
    const double row = (double)H * 2.0;
    int32_t* id = (int32_t*)malloc((size_t)slots * 4);
    int32_t* row_slot = (int32_t*)malloc((size_t)slots * 4);
    int32_t* slot_row = (int32_t*)malloc((size_t)slots * 4);
    int32_t* next = (int32_t*)calloc((size_t)E + 1, 4);
    unsigned wrong[3];
    double ms, bytes;
    char what[96];
    job j;
    memset(&j, 0, sizeof j);
    for (int64_t i = 0; i < slots; ++i) { /* a token's experts are distinct */
        const int first = (int)(bench_hash(7, (uint32_t)(i / K)) % (unsigned)E);
        const int step = 2 * (int)(bench_hash(8, (uint32_t)(i / K)) % (unsigned)(E / 2)) + 1;
        id[i] = (first + (int)(i % K) * step) % E;
        ++next[id[i] + 1];
    }
    for (int e = 0; e < E; ++e) next[e + 1] += next[e];
    for (int64_t i = 0; i < slots; ++i) {
        slot_row[i] = next[id[i]]++;
        row_slot[slot_row[i]] = (int32_t)i;
    }
    j.to.x = bench_random((int64_t)T * H, MOE_BF16, 1.0f, 3);
    j.to.y = bench_alloc((size_t)slots * (size_t)H * 2);
    j.to.row_slot = (const int32_t*)bench_alloc((size_t)slots * 4);
    j.to.slot_row = (const int32_t*)bench_alloc((size_t)slots * 4);
    BENCH_CUDA(cudaMemcpy((void*)j.to.row_slot, row_slot, (size_t)slots * 4,
                          cudaMemcpyHostToDevice));
    BENCH_CUDA(cudaMemcpy((void*)j.to.slot_row, slot_row, (size_t)slots * 4,
                          cudaMemcpyHostToDevice));
    j.to.num_tokens = T, j.to.top_k = K, j.to.hidden = H, j.to.num_rows = slots;
    j.back = j.to;
    j.back.x = j.to.y;
    j.back.y = bench_alloc((size_t)slots * (size_t)H * 2);

    BENCH_CUDA(cudaMemset(j.to.y, 0xff, (size_t)slots * (size_t)H * 2));
    run_by_row(&j, s->stream);
    wrong[0] = check(s, &j, j.to.y, j.to.row_slot);
    BENCH_CUDA(cudaMemset(j.to.y, 0xff, (size_t)slots * (size_t)H * 2));
    run_permute(&j, s->stream);
    wrong[1] = check(s, &j, j.to.y, j.to.row_slot);
    BENCH_CUDA(cudaMemset(j.back.y, 0xff, (size_t)slots * (size_t)H * 2));
    run_unpermute(&j, s->stream);
    wrong[2] = check(s, &j, j.back.y, 0);
    *failures += wrong[0] || wrong[1] || wrong[2];
    printf("T %d H %d E %d K %d bf16: %u, %u, %u vectors are wrong\n", T, H, E, K, wrong[0],
           wrong[1], wrong[2]);

    bytes = ((double)slots + T) * row;
    note_copy(s, bytes, j.back.y, j.to.y);
    ms = bench_time(s, run_permute, &j);
    snprintf(what, sizeof what, "permute T %d H %d E %d K %d", T, H, E, K);
    bench_row(s, what, ms, bytes / ms * 1e-9, "TB/s", bytes / s->copy_rate * 1e3 / ms, "copy rate");
    bench_note_clocks(s, run_permute, &j, ms);
    ms = bench_time(s, run_by_row, &j);
    bench_row(s, "  without slot_row: each row fetches its token", ms, bytes / ms * 1e-9, "TB/s",
              bytes / s->copy_rate * 1e3 / ms, "copy rate");
    bytes = 2.0 * (double)slots * row;
    note_copy(s, bytes, j.back.y, j.to.y);
    ms = bench_time(s, run_unpermute, &j);
    snprintf(what, sizeof what, "unpermute T %d H %d E %d K %d", T, H, E, K);
    bench_row(s, what, ms, bytes / ms * 1e-9, "TB/s", bytes / s->copy_rate * 1e3 / ms, "copy rate");

    cudaFree((void*)j.to.x), cudaFree(j.to.y), cudaFree(j.back.y);
    cudaFree((void*)j.to.row_slot), cudaFree((void*)j.to.slot_row);
    free(id), free(row_slot), free(slot_row), free(next);
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, "permute and unpermute");
    int failures = 0;
    run_shape(&s, 32768, 4096, 128, 8, &failures);
    run_shape(&s, 8192, 16384, 256, 8, &failures);
    run_shape(&s, 24576, 1536, 128, 8, &failures);
    run_shape(&s, 16384, 4096, 8, 2, &failures);
    return bench_close(&s, failures);
}
