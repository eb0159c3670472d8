/* 04_block_sparse: a product with one sparse matrix, whose mask is a picture.

     nvcc -I. -O2 -arch=sm_90a samples/04_block_sparse/main.cu -o block_sparse && ./block_sparse
     g++ -x c++ -std=c++14 -O2 -I. samples/04_block_sparse/main.cu -o block_sparse && ./block_sparse

   The first command builds for a GPU, the second for the CPU, without a CUDA toolkit.
   Copy make_product and run. The other functions make the data, print and check. */
#include "moe/block_sparse.cuh"

#include "picture.h"
#include "check.h"

static void try_call(const char* what, moe_status s)
{
    char text[MOE_STATUS_TEXT];
    if (s == MOE_OK) return;
    quit(moe_status_kind(s) == MOE_ERR_CUDA ? EXIT_WRONG_RESULT : EXIT_WRONG_INPUT, "%s: %s", what,
         moe_status_describe(s, text));
}
#define MOE(call) try_call(#call, (call))
#define CUDA(call) try_call(#call, moe_cuda_status(call))

/* free_all, which exit calls, frees all memory. */
static void *host_memory[8], *device_memory[8];
static int host_count, device_count;

static void free_all(void)
{
    for (int i = 0; i < host_count; ++i) free(host_memory[i]);
    for (int i = 0; i < device_count; ++i) cudaFree(device_memory[i]);
}

static void* host_new(int64_t bytes)
{
    void* p = malloc((size_t)bytes);
    if (!p) quit(EXIT_WRONG_INPUT, "not enough memory for %lld MB", (long long)(bytes >> 20));
    return host_memory[host_count++] = p;
}

/* Returns device memory: a copy of `from`, or NaN where `from` is null. */
static void* device_new(int64_t bytes, const void* from)
{
    void* p = 0;
    CUDA(cudaMalloc(&p, (size_t)bytes));
    device_memory[device_count++] = p;
    CUDA(from ? cudaMemcpy(p, from, (size_t)bytes, cudaMemcpyHostToDevice)
              : cudaMemset(p, 0xff, (size_t)bytes));
    return p;
}

/* Returns rows of numbers from -1 to 1. Equal seeds give equal numbers. */
static uint16_t* numbers(int rows, int columns, int dtype, uint64_t seed)
{
    const int64_t stride = stride_of(columns);
    uint16_t* p = (uint16_t*)host_new(rows * stride * 2);
    for (int64_t i = 0; i < rows * stride; ++i)
        moe_store(p, i, dtype, (float)(2 * share_of(seed, (uint64_t)i) - 1));
    return p;
}

/* Returns the descriptor of the product. The matrices are stored by rows, the mask in bytes. */
static moe_block_sparse_desc make_product(const options* o, const void* a, const void* b,
                                          const uint8_t* mask, void* c, uint64_t* fault)
{
    moe_block_sparse_desc d;
    memset(&d, 0, sizeof d);
    d.op = o->op;
    d.m = o->m;
    d.n = o->n;
    d.k = o->k;
    d.dtype = o->dtype;
    d.a = a;
    d.b = b;
    d.c = c;
    d.a_stride = stride_of(o->k);
    d.b_stride = d.c_stride = stride_of(o->n);
    d.mask.bytes = mask;
    d.mask.rows = o->op == MOE_BLOCK_SPARSE_DDS ? o->k : o->m; /* of the sparse matrix */
    d.mask.columns = o->op == MOE_BLOCK_SPARSE_DSD ? o->k : o->n;
    d.mask.block_rows = o->block_rows;
    d.mask.block_columns = o->block_columns;
    d.fault = fault;
    MOE(moe_block_sparse_workspace(&d, &d.workspace_bytes));
    return d;
}

/* Returns the mean milliseconds of a call. Does not time the first. */
static double run(const moe_block_sparse_desc* d, int repeat, cudaStream_t stream)
{
    cudaEvent_t begin, end;
    float ms;
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    MOE(moe_block_sparse(d, stream));
    CUDA(cudaEventRecord(begin, stream));
    for (int i = 0; i < repeat; ++i) MOE(moe_block_sparse(d, stream));
    CUDA(cudaEventRecord(end, stream));
    CUDA(cudaEventSynchronize(end));
    CUDA(cudaEventElapsedTime(&ms, begin, end));
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    return ms / repeat;
}

static void show_run(const char* what, double ms, double flops, double dense)
{
    const double rate = flops / ms * 1e-6; /* GFLOP/s */
    printf("%-10s%10.3f ms %8.3g %sFLOP/s %6.1f%% of the dense work\n", what, ms,
           rate < 100 ? rate : rate / 1000, rate < 100 ? "G" : "T", 100 * flops / dense);
}

int main(int argc, char** argv)
{
    static const char* const ops[] = {"", "sdd, C sparse", "dsd, A sparse", "dds, B sparse"};
    static const char* const tiles[] = {"by rule", "128x256", "64x256", "32x256", "64x64"};
    const options o = parse_options(argc, argv);
    const char *file = o.file, *kind;
    picture p = {1, 1, picture_dots};
    const int rows = o.op == MOE_BLOCK_SPARSE_DDS ? o.k : o.m,
              columns = o.op == MOE_BLOCK_SPARSE_DSD ? o.k : o.n;
    const int RB = moe_block_sparse_count(rows, o.block_rows),
              CB = moe_block_sparse_count(columns, o.block_columns);
    const int64_t a_bytes = o.m * stride_of(o.k) * 2, b_bytes = o.k * stride_of(o.n) * 2;
    const int64_t c_bytes = o.m * stride_of(o.n) * 2, blocks = (int64_t)RB * CB;
    const double dense = 2.0 * o.m * o.n * o.k;
    const uint64_t no_fault = 0;
    int64_t present = 0, kept = 0; /* present sparse blocks; their elements */
    uint64_t word;
    size_t free_bytes, all_bytes;
    unsigned char *mask, *full;
    uint16_t *a, *b, *c;
    moe_block_sparse_desc d, all;
    double ms, all_ms;
    cudaStream_t stream;
    int devices = 0, ok;

    if (o.random < 0 && o.columns < 0 && !o.diagonal) p = read_picture(&file);
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
        quit(EXIT_NO_DEVICE, "no CUDA device; build with g++ for the CPU, as README.md here says");
    CUDA(cudaMemGetInfo(&free_bytes, &all_bytes));
    if ((double)(a_bytes + b_bytes + c_bytes + 24 * blocks) > 0.9 * (double)free_bytes)
        quit(EXIT_WRONG_INPUT, "these sizes need more memory than the device's %.1f GB",
             (double)free_bytes / 1e9);
    atexit(free_all);
    mask = (unsigned char*)host_new(blocks);
    full = (unsigned char*)host_new(blocks);
    kind = make_mask(&o, &p, RB, CB, mask);
    memset(full, 1, (size_t)blocks);
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t row = i / CB * o.block_rows, column = i % CB * o.block_columns;
        const int64_t h = rows - row < o.block_rows ? rows - row : o.block_rows;
        const int64_t w = columns - column < o.block_columns ? columns - column : o.block_columns;
        present += mask[i];
        kept += mask[i] * h * w;
    }
    a = numbers(o.m, o.k, o.dtype, mix(o.seed + 1));
    b = numbers(o.k, o.n, o.dtype, mix(o.seed + 2));
    c = (uint16_t*)host_new(c_bytes);
    d = make_product(&o, device_new(a_bytes, a), device_new(b_bytes, b),
                     (const uint8_t*)device_new(blocks, mask), device_new(c_bytes, 0),
                     (uint64_t*)device_new(8, &no_fault));
    all = make_product(&o, d.a, d.b, (const uint8_t*)device_new(blocks, full), d.c, d.fault);
    d.workspace = all.workspace = d.workspace_bytes ? device_new((int64_t)d.workspace_bytes, 0) : 0;

    CUDA(cudaStreamCreate(&stream));
    if (o.tune) MOE(moe_block_sparse_tune(&d, stream, &d.choice));
    if (o.tune) MOE(moe_block_sparse_tune(&all, stream, &all.choice));
    all_ms = run(&all, o.repeat, stream);
    CUDA(cudaMemset(d.c, 0xff, (size_t)c_bytes));
    ms = run(&d, o.repeat, stream);
    CUDA(cudaStreamDestroy(stream));
    CUDA(cudaMemcpy(c, d.c, (size_t)c_bytes, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(&word, d.fault, 8, cudaMemcpyDeviceToHost));

    printf("moe %s on the %s\n", MOE_VERSION_STRING, MOE_ON_HOST ? "CPU (moe/host)" : "GPU");
    printf("product   %s: C [%d, %d] = A [%d, %d] * B [%d, %d], %s\n", ops[o.op], o.m, o.n, o.m,
           o.k, o.k, o.n, moe_dtype_name(o.dtype));
    printf("mask      %s%s%s, %d x %d sparse blocks of %d x %d, %lld of %lld present\n\n", kind,
           file ? ", " : "", file ? file : "", RB, CB, o.block_rows, o.block_columns,
           (long long)present, (long long)blocks);
    draw_mask(mask, RB, CB);
    printf("\n");
    show_run("mask", ms, dense * (double)kept / ((double)rows * columns), dense);
    show_run("full mask", all_ms, dense, dense);
    printf("tile      %s%s%s, full mask %s%s%s; mean of %d runs\n", tiles[d.choice.tile],
           d.choice.fallback_tile ? " and " : "",
           d.choice.fallback_tile ? tiles[d.choice.fallback_tile] : "", tiles[all.choice.tile],
           all.choice.fallback_tile ? " and " : "",
           all.choice.fallback_tile ? tiles[all.choice.fallback_tile] : "", o.repeat);
    if (MOE_ON_HOST)
        printf("          the CPU shows that the kernels are right, not how fast they are\n");
    ok = check(&o, a, b, c, mask, CB) && word == 0;
    printf("%s: %s\n", ok ? "PASSED" : "FAILED",
           word ? moe_fault_text(moe_fault_decode(word).code)
           : ok ? "C is right"
                : "C is wrong");
    return ok ? 0 : EXIT_WRONG_RESULT;
}
