/* 01_layer: a mixture-of-experts layer over a file. Every byte is a token.

     nvcc -I. -O2 -arch=sm_90a samples/01_layer/main.cu -o 01_layer && ./01_layer
     g++ -x c++ -std=c++14 -O2 -I. samples/01_layer/main.cu -o 01_layer && ./01_layer

   The first runs on the GPU, the second, with no CUDA toolkit, on the CPU; --help lists options.
   What to copy from here: make_layer and run_once. The rest reads, times, prints and checks. */
#include "moe/layer.cuh"

#include "options.h"
#include "show.h"
#include "check.h"

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        const cudaError_t cuda_error = (call);                                                     \
        if (cuda_error != cudaSuccess)                                                             \
            quit(EXIT_WRONG_RESULT, "%s: %s", #call, cudaGetErrorString(cuda_error));              \
    } while (0)

/* A call of the collection; what it refuses comes from an option. */
#define MOE(call)                                                                                  \
    do {                                                                                           \
        char moe_text[MOE_STATUS_TEXT];                                                            \
        const moe_status moe_error = (call);                                                       \
        if (moe_error != MOE_OK)                                                                   \
            quit(moe_status_kind(moe_error) == MOE_ERR_CUDA ? EXIT_WRONG_RESULT                    \
                                                            : EXIT_WRONG_INPUT,                    \
                 "the layer refuses: %s", moe_status_describe(moe_error, moe_text));               \
    } while (0)

/* Elements of the buffers. */
typedef struct sizes {
    int64_t x, router, w1, w2, shared_w1, shared_w2;
} sizes;

typedef struct host_data {
    uint16_t *x, *router, *w1, *w2, *shared_w1, *shared_w2, *y;
} host_data;

typedef struct timing {
    double stage[MOE_LAYER_STAGES], layer; /* ms, medians */
} timing;

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* Numbers of mean 0 and the given deviation, uniform: they depend on seed and position alone. */
static void fill(uint16_t* p, int64_t n, float deviation, int dtype, uint64_t seed)
{
    const float step = deviation * 3.4641016f / 65535.0f;
    uint64_t bits = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (i % 4 == 0) bits = mix(seed + (uint64_t)i);
        moe_store(p, i, dtype, ((float)(bits & 0xffff) - 32767.5f) * step);
        bits >>= 16;
        if (i % (1 << 20) == 0) show_progress("making weights", i, n);
    }
    show_progress("", 1, 1);
}

static uint16_t* host_new(int64_t elements)
{
    uint16_t* p = (uint16_t*)malloc((size_t)elements * 2);
    if (!p) quit(EXIT_WRONG_INPUT, "not enough memory for %lld MB", (long long)(elements >> 19));
    return p;
}

/* A token is its byte and, half as strong, the byte before it. Scales keep everything about 1. */
static host_data make_data(const options* o, const unsigned char* bytes, const sizes* n)
{
    const int H = o->hidden;
    const uint64_t seed = mix(o->seed);
    uint16_t* table = host_new(256 * (int64_t)H);
    host_data h;
    h.x = host_new(n->x);
    h.y = host_new(n->x);
    h.router = host_new(n->router);
    h.w1 = host_new(n->w1);
    h.w2 = host_new(n->w2);
    h.shared_w1 = host_new(n->shared_w1);
    h.shared_w2 = host_new(n->shared_w2);
    fill(table, 256 * (int64_t)H, 1.0f, o->dtype, mix(seed + 1));
    fill(h.router, n->router, 1.0f / sqrtf((float)H), o->dtype, mix(seed + 2));
    fill(h.w1, n->w1, 1.0f / sqrtf((float)H), o->dtype, mix(seed + 3));
    fill(h.w2, n->w2, 2.0f / sqrtf((float)o->intermediate), o->dtype, mix(seed + 4));
    fill(h.shared_w1, n->shared_w1, 1.0f / sqrtf((float)H), o->dtype, mix(seed + 5));
    if (o->shared)
        fill(h.shared_w2, n->shared_w2, 2.0f / sqrtf((float)o->shared), o->dtype, mix(seed + 6));
    for (int64_t t = 0; t < o->tokens; ++t)
        for (int i = 0; i < H; ++i) {
            float v = moe_load(table, bytes[t] * (int64_t)H + i, o->dtype);
            if (t > 0) v += 0.5f * moe_load(table, bytes[t - 1] * (int64_t)H + i, o->dtype);
            moe_store(h.x, t * H + i, o->dtype, v);
        }
    free(table);
    return h;
}

static void* device_copy(const void* host, int64_t bytes)
{
    void* p;
    CUDA(cudaMalloc(&p, (size_t)bytes));
    CUDA(cudaMemcpy(p, host, (size_t)bytes, cudaMemcpyHostToDevice));
    return p;
}

/* The descriptor of the whole layer, its buffers in device memory. */
static moe_layer_desc make_layer(const options* o, const host_data* h, const sizes* n)
{
    moe_layer_desc d;
    const uint64_t no_fault = 0;
    memset(&d, 0, sizeof d);
    d.num_tokens = o->tokens;
    d.hidden = o->hidden;
    d.intermediate = o->intermediate;
    d.num_experts = o->experts;
    d.top_k = o->top_k;
    d.dtype = o->dtype;
    d.activation = o->activation;
    d.gate.score = o->score;
    d.gate.renormalize = o->renormalize;
    d.shared.intermediate = o->shared;
    MOE(moe_layer_workspace(&d, &d.workspace_bytes));
    if (!h) return d; /* sizes only */
    if (o->shared) {
        d.shared.w1.base = device_copy(h->shared_w1, n->shared_w1 * 2);
        d.shared.w2.base = device_copy(h->shared_w2, n->shared_w2 * 2);
        d.shared.activation = o->activation;
    }
    d.x = device_copy(h->x, n->x * 2);
    d.router = device_copy(h->router, n->router * 2);
    d.w1.base = device_copy(h->w1, n->w1 * 2);
    d.w2.base = device_copy(h->w2, n->w2 * 2);
    d.fault = (uint64_t*)device_copy(&no_fault, 8);
    CUDA(cudaMalloc(&d.y, (size_t)n->x * 2));
    CUDA(cudaMemset(d.y, 0xff, (size_t)n->x * 2)); /* NaN: what is not written is seen */
    CUDA(cudaMalloc(&d.workspace, d.workspace_bytes));
    return d;
}

static void free_layer(moe_layer_desc* d)
{
    CUDA(cudaFree((void*)d->x));
    CUDA(cudaFree((void*)d->router));
    CUDA(cudaFree((void*)d->w1.base));
    CUDA(cudaFree((void*)d->w2.base));
    CUDA(cudaFree((void*)d->shared.w1.base));
    CUDA(cudaFree((void*)d->shared.w2.base));
    CUDA(cudaFree(d->fault));
    CUDA(cudaFree(d->y));
    CUDA(cudaFree(d->workspace));
}

/* Once with nothing measured: the call that a program needs. */
static void run_once(const moe_layer_desc* d, cudaStream_t stream)
{
    MOE(moe_layer_forward(d, stream));
    CUDA(cudaStreamSynchronize(stream));
}

/* Events around every stage, then around the whole layer; medians. */
static timing measure(const moe_layer_desc* d, int repeat, cudaStream_t stream)
{
    enum { EVENTS = MOE_LAYER_STAGES + 1 };
    cudaEvent_t event[EVENTS];
    double* ms = (double*)malloc(sizeof(double) * (size_t)repeat * EVENTS);
    moe_layer_prepared layer;
    timing t;
    float one = 0;
    if (!ms) quit(EXIT_WRONG_INPUT, "--repeat %d: not enough memory", repeat);
    for (int i = 0; i < EVENTS; ++i) CUDA(cudaEventCreate(&event[i]));
    MOE(moe_layer_prepare(d, &layer)); /* checked once, run many times */
    for (int r = 0; r < repeat; ++r) {
        show_progress("measuring", r, repeat);
        CUDA(cudaEventRecord(event[0], stream));
        for (int s = 0; s < MOE_LAYER_STAGES; ++s) {
            MOE(moe_layer_run_stage(&layer, s, stream));
            CUDA(cudaEventRecord(event[s + 1], stream));
        }
        CUDA(cudaStreamSynchronize(stream));
        for (int s = 0; s < MOE_LAYER_STAGES; ++s) {
            CUDA(cudaEventElapsedTime(&one, event[s], event[s + 1]));
            ms[s * repeat + r] = one;
        }
        CUDA(cudaEventRecord(event[0], stream));
        MOE(moe_layer_run(&layer, stream));
        CUDA(cudaEventRecord(event[1], stream));
        CUDA(cudaStreamSynchronize(stream));
        CUDA(cudaEventElapsedTime(&one, event[0], event[1]));
        ms[MOE_LAYER_STAGES * repeat + r] = one;
    }
    show_progress("", 1, 1);
    for (int s = 0; s < MOE_LAYER_STAGES; ++s) t.stage[s] = median(ms + s * repeat, repeat);
    t.layer = median(ms + MOE_LAYER_STAGES * repeat, repeat);
    for (int i = 0; i < EVENTS; ++i) CUDA(cudaEventDestroy(event[i]));
    free(ms);
    return t;
}

static void show_setting(const options* o, const moe_layer_desc* d, const char* file,
                         size_t file_bytes)
{
    static const char* const gate[] = {"", "softmax", "topk-softmax", "sigmoid"};
    struct cudaDeviceProp prop;
    moe_gemm_plan p[2];
    int id;
    CUDA(cudaGetDevice(&id));
    CUDA(cudaGetDeviceProperties(&prop, id));
    MOE(moe_layer_plan(d, &p[0], &p[1]));
    printf("moe %s\n", MOE_VERSION_STRING);
    printf("backend     %s\n", MOE_ON_HOST ? "host: the kernels run on the CPU" : "cuda");
    printf("device      %s, %d multiprocessors\n", prop.name, prop.multiProcessorCount);
    for (int i = 0; i < 2; ++i)
        printf("%-11s path %s, tile %dx%dx%d, %d stages, %d threads\n",
               i ? "experts down" : "experts up", moe_gemm_path_name(p[i].path), p[i].tile_m,
               p[i].tile_n, p[i].tile_k, p[i].stages, p[i].threads);
    printf("tokens      %d from %s, %s\n", o->tokens, file,
           (size_t)o->tokens > file_bytes ? "repeated" : "from its beginning");
    printf("shape       H %d, I %d, E %d, K %d, %s, %s gate%s, %s, seed %llu\n", o->hidden,
           o->intermediate, o->experts, o->top_k, moe_dtype_name(o->dtype), gate[o->score],
           o->renormalize ? " renormalised" : "", activation_words[o->activation - 1],
           (unsigned long long)o->seed);
    if (o->shared) printf("shared      an expert of width %d for all tokens\n", o->shared);
    printf("workspace   %.1f MB\n\n", (double)d->workspace_bytes / 1e6);
}

static void show_timing(const options* o, const timing* t, int64_t rows)
{
    const double T = o->tokens, H = o->hidden, I = o->intermediate, E = o->experts, K = o->top_k,
                 R = (double)rows, S = o->shared;
    const int gated = moe_activation_is_gated(o->activation);
    const struct {
        double amount;
        const char *unit, *counted;
    } work[MOE_LAYER_STAGES] = {
        {2 * T * H * E, "FLOP", "2 T H E"},
        {T * E * 4 + T * K * 8, "B", "logits, ids, weights once"},
        {T * K * 4 + R * 4 + T * K * 8, "B", "ids, row_slot, places once"},
        {(gated ? 4 : 2) * R * H * I, "FLOP", gated ? "4 R H I, R = rows" : "2 R H I, R = rows"},
        {2 * R * H * I, "FLOP", "2 R H I"},
        {(gated ? 4 : 2) * T * H * S, "FLOP", gated ? "4 T H S, S = shared" : "2 T H S, S = shared"},
        {2 * T * H * S, "FLOP", "2 T H S"},
        {(R + T + (S > 0 ? T : 0)) * H * 2 + T * K * 12, "B", "rows, y, places, weights once"}};
    char text[32];
    printf("stage             time      achieved        counted\n");
    for (int s = 0; s < MOE_LAYER_STAGES; ++s)
        if (work[s].amount > 0) /* a stage that the layer has */
            printf("%-11s %10.3f ms  %-14s  %s\n", moe_layer_stage_name(s), t->stage[s],
                   show_rate(work[s].amount, t->stage[s], work[s].unit, text, sizeof text),
                   work[s].counted);
    printf("%-11s %10.3f ms  %-14s  %s\n", "layer", t->layer,
           show_rate(T, t->layer, "tokens", text, sizeof text), "the stages as one call");
    printf("medians of %d runs%s\n\n", o->repeat,
           MOE_ON_HOST ? "; the CPU shows that the kernels are right, not how fast they are" : "");
}

/* The layer's results against the reference; 1 if they are right. */
static int check(const options* o, host_data* h, const moe_layer_desc* d, const moe_layer_view* v)
{
    const int64_t T = o->tokens;
    float* logits = (float*)host_new(T * o->experts * 2);
    int32_t* ids = (int32_t*)host_new(T * o->top_k * 2);
    const check_input in = {h->x, h->router, h->w1, h->w2, h->shared_w1, h->shared_w2, h->y,
                            logits, ids, o};
    check_result r;
    CUDA(cudaMemcpy(logits, v->logits, (size_t)(T * o->experts) * 4, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(ids, v->ids, (size_t)(T * o->top_k) * 4, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(h->y, d->y, (size_t)T * o->hidden * 2, cudaMemcpyDeviceToHost));
    if (check_layer(&in, o->check, o->seed, &r))
        quit(EXIT_WRONG_INPUT, "not enough memory to check");
    free(logits);
    free(ids);
    return show_check(&in, &r);
}

int main(int argc, char** argv)
{
    options o = parse_options(argc, argv);
    const char* file;
    size_t file_bytes, free_bytes, all_bytes;
    unsigned char* bytes;
    int32_t* count;
    uint64_t word;
    int64_t rows = 0, elements;
    int devices = 0, ok = 1;
    sizes n;
    host_data h;
    moe_layer_desc d;
    moe_layer_view v;
    moe_fault fault;
    timing t;
    cudaStream_t stream;

    if (o.hidden % 8) quit(EXIT_WRONG_INPUT, "--hidden %d: not a multiple of 8", o.hidden);
    if (o.intermediate % 8)
        quit(EXIT_WRONG_INPUT, "--intermediate %d: not a multiple of 8", o.intermediate);
    if (o.shared % 8) quit(EXIT_WRONG_INPUT, "--shared %d: not a multiple of 8", o.shared);
    if (o.top_k > o.experts)
        quit(EXIT_WRONG_INPUT, "--top-k %d: more than --experts %d", o.top_k, o.experts);
    bytes = read_tokens(&o, &file, &file_bytes);
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
        quit(EXIT_NO_DEVICE,
             "no CUDA device; build with g++ for the CPU, as samples/01_layer/README.md says");

    n.x = (int64_t)o.tokens * o.hidden;
    n.router = (int64_t)o.experts * o.hidden;
    n.w2 = n.router * o.intermediate;
    n.w1 = (moe_activation_is_gated(o.activation) ? 2 : 1) * n.w2;
    n.shared_w2 = (int64_t)o.hidden * o.shared;
    n.shared_w1 = (moe_activation_is_gated(o.activation) ? 2 : 1) * n.shared_w2;
    d = make_layer(&o, 0, &n);
    CUDA(cudaMemGetInfo(&free_bytes, &all_bytes));
    elements = 2 * n.x + n.router + n.w1 + n.w2 + n.shared_w1 + n.shared_w2;
    if ((double)d.workspace_bytes + 2.0 * (double)elements > 0.9 * (double)free_bytes)
        quit(EXIT_WRONG_INPUT, "this shape needs more memory than the device's %.1f GB",
             (double)free_bytes / 1e9);

    h = make_data(&o, bytes, &n);
    d = make_layer(&o, &h, &n);
    MOE(moe_layer_get_view(&d, &v));
    CUDA(cudaStreamCreate(&stream));
    show_setting(&o, &d, file, file_bytes);
    fflush(stdout);
    MOE(moe_layer_preload());
    run_once(&d, stream);
    t = measure(&d, o.repeat, stream);

    count = (int32_t*)host_new((int64_t)o.experts * 2);
    CUDA(cudaMemcpy(count, v.expert_count, (size_t)o.experts * 4, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(&word, d.fault, 8, cudaMemcpyDeviceToHost));
    for (int e = 0; e < o.experts; ++e) rows += count[e];
    show_timing(&o, &t, rows);
    printf("rows of each expert, %lld in all\n", (long long)rows);
    show_experts(count, o.experts, rows);
    fault = moe_fault_decode(word);
    printf("\nfault word  %s", moe_fault_text(fault.code));
    if (fault.code) printf(": index %lld, rank %d", (long long)fault.index, (int)fault.rank);
    printf("\n\n");
    fflush(stdout);
    if (o.check > 0) ok = check(&o, &h, &d, &v);
    else printf("not checked against the reference\n");

    CUDA(cudaStreamDestroy(stream));
    free_layer(&d);
    free(h.x);
    free(h.y);
    free(h.router);
    free(h.w1);
    free(h.w2);
    free(h.shared_w1);
    free(h.shared_w2);
    free(count);
    free(bytes);
    return ok && fault.code == MOE_FAULT_NONE ? 0 : EXIT_WRONG_RESULT;
}
