/* input.h: ends the program where a call fails, reads the options and the file, makes the data.
   errx prints one line to stderr and ends the program. */
#ifndef MOE_SAMPLE_INPUT_H
#define MOE_SAMPLE_INPUT_H

#include <err.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe/layer.cuh"

#ifndef SAMPLE_TEXT
#define SAMPLE_TEXT "samples/01_layer/text.txt" /* from the root of the repository */
#endif

enum { WRONG_RESULT = 1, WRONG_INPUT = 2, NO_DEVICE = 77 }; /* exit codes */

static void try_call(const char* what, moe_status s)
{
    const int code = moe_status_kind(s) == MOE_ERR_CUDA ? WRONG_RESULT : WRONG_INPUT;
    char text[MOE_STATUS_TEXT];
    if (s != MOE_OK) errx(code, "%s: %s", what, moe_status_describe(s, text));
}
#define MOE(call) try_call("the layer refuses", (call))
#define CUDA(call) try_call(#call, moe_cuda_status(call))

static void* host_memory[16]; /* main frees it last */
static int host_count;

static void* host_new(int64_t bytes)
{
    void* p = malloc((size_t)bytes);
    if (!p) errx(WRONG_INPUT, "not enough memory for %lld bytes", (long long)bytes);
    return host_memory[host_count++] = p;
}

typedef struct options {
    const char* file;
    int tokens, hidden, intermediate, experts, top_k, dtype, score, renormalize;
    int seed, repeat, check, no_check, file_bytes;
} options;

typedef struct option {
    const char *name, *help;
    int *value, cpu, gpu;     /* cpu, gpu: the defaults of the two backends */
    int unit;                 /* divides a number; is the first word; 0: takes no value */
    const char* const* words; /* in the order of their values; null: takes a number */
} option;

static const char* const dtypes[] = {"fp16", "bf16", 0};
static const char* const scores[] = {"softmax", "topk-softmax", "sigmoid", 0};

static int parse_value(const option* p, const char* text)
{
    char* end;
    const long long v = strtoll(text, &end, 10);
    for (int i = 0; p->words && p->words[i]; ++i)
        if (!strcmp(text, p->words[i])) return p->unit + i;
    if (p->words) errx(WRONG_INPUT, "%s %s: not one of %s", p->name, text, p->help);
    if (end == text || *end || v < 1 || v > INT32_MAX)
        errx(WRONG_INPUT, "%s %s: not a whole number from 1 to %d", p->name, text, INT32_MAX);
    if (v % p->unit) errx(WRONG_INPUT, "%s %s: not a multiple of %d", p->name, text, p->unit);
    return (int)v;
}

static options parse_options(int argc, char** argv)
{
    options o = {};
    const option all[] = {
        {"--tokens", "T; a file with fewer bytes is repeated", &o.tokens, 6134, 16384, 1, 0},
        {"--hidden", "H, a multiple of 8", &o.hidden, 256, 2048, 8, 0},
        {"--intermediate", "I, a multiple of 8", &o.intermediate, 128, 1024, 8, 0},
        {"--experts", "E", &o.experts, 16, 64, 1, 0},
        {"--top-k", "K", &o.top_k, 2, 8, 1, 0},
        {"--dtype", "fp16, bf16", &o.dtype, MOE_BF16, MOE_BF16, MOE_FP16, dtypes},
        {"--gate", "softmax, topk-softmax, sigmoid", &o.score, 1, 1, MOE_SCORE_SOFTMAX, scores},
        {"--renormalize", "the weights of a token sum to 1", &o.renormalize, 0, 0, 0, 0},
        {"--seed", "of the random numbers", &o.seed, 1, 1, 1, 0},
        {"--repeat", "timed runs", &o.repeat, 3, 20, 1, 0},
        {"--check", "tokens to compare with the reference", &o.check, 256, 32, 1, 0},
        {"--no-check", "compares none", &o.no_check, 0, 0, 0, 0},
        {"--file", "whose bytes are the tokens", 0, 0, 0, 1, 0},
    };
    const int count = sizeof all / sizeof all[0], file = count - 1;
    o.file = SAMPLE_TEXT;
    for (int n = 0; n < file; ++n) *all[n].value = MOE_ON_HOST ? all[n].cpu : all[n].gpu;
    for (int i = 1; i < argc; ++i) {
        const char *name = argv[i], *text = argv[i + 1]; /* null after the last */
        int n = 0;
        if (!strcmp(name, "--help")) {
            printf("01_layer: a mixture-of-experts layer over a file. Options, N: a value\n");
            for (; n < count; ++n)
                printf("%16s %c  %s\n", all[n].name, all[n].unit ? 'N' : ' ', all[n].help);
            exit(0);
        }
        while (n < count && strcmp(name, all[n].name)) ++n;
        if (n == count) errx(WRONG_INPUT, "%s: no such option; --help lists them", name);
        if (all[n].unit && !text) errx(WRONG_INPUT, "%s needs a value", name);
        if (n == file) o.file = text;
        else *all[n].value = all[n].unit ? parse_value(&all[n], text) : 1;
        if (all[n].unit) ++i;
    }
    if (o.top_k > o.experts)
        errx(WRONG_INPUT, "--top-k %d: more than --experts %d", o.top_k, o.experts);
    return o;
}

/* Returns o->tokens bytes of the file, which is repeated where it has fewer. */
static unsigned char* read_tokens(options* o)
{
    unsigned char* bytes = (unsigned char*)host_new(o->tokens);
    FILE* f = fopen(o->file, "rb");
    if (!f) errx(WRONG_INPUT, "%s: cannot be opened", o->file);
    o->file_bytes = (int)fread(bytes, 1, (size_t)o->tokens, f);
    if (ferror(f)) errx(WRONG_INPUT, "%s: cannot be read", o->file);
    if (!o->file_bytes) errx(WRONG_INPUT, "%s: is empty", o->file);
    fclose(f);
    for (int i = o->file_bytes; i < o->tokens; ++i) bytes[i] = bytes[i - o->file_bytes];
    return bytes;
}

/* Returns n random numbers in host memory. Copies them to the device unless `device` is null. */
static uint16_t* fill(const void* device, int64_t n, float largest, int dtype, uint64_t seed)
{
    uint16_t* p = (uint16_t*)host_new(n * 2);
    for (int64_t i = 0; i < n; ++i) {
        uint64_t v = ((seed << 36) + (uint64_t)i) * 0x9e3779b97f4a7c15ull;
        v = (v ^ (v >> 32)) * 0xbf58476d1ce4e5b9ull;
        moe_store(p, i, dtype, ((float)(v >> 40) / 8388608 - 1) * largest);
    }
    if (device) CUDA(cudaMemcpy((void*)device, p, (size_t)n * 2, cudaMemcpyHostToDevice));
    return p;
}

/* Fills x and the weights. A token's row of x is the row of its byte in a random table. Returns the
   descriptor with x and the weights in host memory. */
static moe_layer_desc fill_layer(const moe_layer_desc* d, const unsigned char* bytes, uint64_t seed)
{
    const int64_t T = d->num_tokens, H = d->hidden, I = d->intermediate, E = d->num_experts;
    const float in = 1.7f / sqrtf((float)H), out = 3.4f / sqrtf((float)I);
    const uint16_t* table = fill(0, 256 * H, 1.7f, d->dtype, 4 * seed);
    uint16_t* x = (uint16_t*)host_new(T * H * 2);
    moe_layer_desc host = *d;
    for (int64_t i = 0; i < T * H; ++i) x[i] = table[bytes[i / H] * H + i % H];
    CUDA(cudaMemcpy((void*)d->x, x, (size_t)(T * H) * 2, cudaMemcpyHostToDevice));
    host.x = x;
    host.router = fill(d->router, E * H, in, d->dtype, 4 * seed + 1);
    host.w1.base = fill(d->w1.base, E * 2 * I * H, in, d->dtype, 4 * seed + 2);
    host.w2.base = fill(d->w2.base, E * H * I, out, d->dtype, 4 * seed + 3);
    return host;
}

#endif
