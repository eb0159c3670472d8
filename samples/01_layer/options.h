/* options.h: the sample's command line. One clear line on stderr and exit code 2 for what is wrong.
 */
#ifndef MOE_SAMPLE_OPTIONS_H
#define MOE_SAMPLE_OPTIONS_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe/gate.cuh" /* moe_score; moe_activation is in layout.h */

#define EXIT_WRONG_RESULT 1
#define EXIT_WRONG_INPUT 2
#define EXIT_NO_DEVICE 77

typedef struct options {
    const char* file; /* null: the text shipped with the sample */
    int tokens;       /* 0: the file's bytes, within the limits that --help states */
    int hidden, intermediate, experts, top_k;
    int shared;      /* width of a shared expert; 0: none */
    int dtype;       /* moe_dtype */
    int activation;  /* moe_activation */
    int score;       /* moe_score */
    int renormalize; /* 0 or 1 */
    int repeat;      /* timed runs */
    int check;       /* tokens compared with the reference; 0: none */
    uint64_t seed;
} options;

/* A shape that a real model has, and one that a CPU gets through in seconds. */
#if MOE_ON_HOST
static const options default_options = {
    0, 0, 256, 128, 16, 2, 0, MOE_BF16, MOE_ACTIVATION_SWIGLU, MOE_SCORE_SOFTMAX, 0, 3, 256, 1};
#define LEAST_TOKENS 1
#define MOST_TOKENS 8192
#else
static const options default_options = {
    0, 0, 2048, 1024, 64, 8, 0, MOE_BF16, MOE_ACTIVATION_SWIGLU, MOE_SCORE_SOFTMAX, 0, 20, 32, 1};
#define LEAST_TOKENS 16384
#define MOST_TOKENS 65536
#endif

/* Prints "01_layer: ..." as one line and ends the program. */
static void quit(int code, const char* format, ...)
{
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("01_layer: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(code);
}

static void print_help(void)
{
    const options* d = &default_options;
    printf("01_layer: runs a mixture-of-experts layer over a file, a token a byte\n"
           "  --file F            any file; default: the text shipped with the sample\n"
           "  --tokens N          first N bytes, the file repeated if it is shorter\n"
           "                      default: the file's size, %d to %d\n"
           "  --hidden N          H, a multiple of 8; default %d\n"
           "  --intermediate N    I, width of an expert, a multiple of 8; default %d\n"
           "  --experts N         E; default %d\n"
           "  --top-k N           K, experts per token; default %d\n"
           "  --shared N          width of a shared expert, a multiple of 8; default 0, none\n"
           "  --dtype D           bf16 or fp16; default bf16\n"
           "  --gate G            softmax, topk-softmax or sigmoid; default softmax\n"
           "  --activation A      none, swiglu, geglu, geglu-tanh, swiglu-clamped, silu, gelu,\n"
           "                      gelu-tanh or relu2; default swiglu\n"
           "  --renormalize       a token's weights sum to 1\n"
           "  --seed N            of embedding, router and experts; default %llu\n"
           "  --repeat N          timed runs, the median counts; default %d\n"
           "  --check N           tokens compared with the float64 reference; default %d\n"
           "  --no-check          none\n"
           "  --help              this\n"
           "Exit code 0: the layer is right; 1: it is not; 2: wrong option or unreadable file\n",
           LEAST_TOKENS, MOST_TOKENS, d->hidden, d->intermediate, d->experts, d->top_k,
           (unsigned long long)d->seed, d->repeat, d->check);
}

/* A whole number from least to most, and nothing after it. */
static long long parse_number(const char* name, const char* text, long long least, long long most)
{
    char* end;
    const long long v = strtoll(text, &end, 10);
    if (end == text || *end || v < least || v > most)
        quit(EXIT_WRONG_INPUT, "%s %s: not a whole number from %lld to %lld", name, text, least,
             most);
    return v;
}

/* The position of a word in a list that ends with null. */
static int parse_word(const char* name, const char* text, const char* const* words)
{
    int i = 0;
    while (words[i] && strcmp(words[i], text)) ++i;
    if (!words[i]) {
        char all[160] = "";
        for (i = 0; words[i]; ++i) {
            if (i) strcat(all, ", ");
            strcat(all, words[i]);
        }
        quit(EXIT_WRONG_INPUT, "%s %s: not one of %s", name, text, all);
    }
    return i;
}

static const char* const activation_words[] = {"none",           "swiglu", "geglu", "geglu-tanh",
                                               "swiglu-clamped", "silu",   "gelu",  "gelu-tanh",
                                               "relu2",          0};

static options parse_options(int argc, char** argv)
{
    static const char* const dtypes[] = {"fp16", "bf16", 0};
    static const char* const gates[] = {"softmax", "topk-softmax", "sigmoid", 0};
    options o = default_options;
    for (int i = 1; i < argc; ++i) {
        const char* name = argv[i];
        const char* value = i + 1 < argc ? argv[i + 1] : 0;
        struct {
            const char* name;
            int *to, least;
        } const number[] = {{"--tokens", &o.tokens, 1},
                            {"--hidden", &o.hidden, 1},
                            {"--intermediate", &o.intermediate, 1},
                            {"--experts", &o.experts, 1},
                            {"--top-k", &o.top_k, 1},
                            {"--shared", &o.shared, 0},
                            {"--repeat", &o.repeat, 1},
                            {"--check", &o.check, 0}};
        int known = 0;
        if (!strcmp(name, "--help") || !strcmp(name, "-h")) {
            print_help();
            exit(0);
        }
        if (!strcmp(name, "--renormalize")) {
            o.renormalize = 1;
            continue;
        }
        if (!strcmp(name, "--no-check")) {
            o.check = 0;
            continue;
        }
        for (size_t n = 0; n < sizeof number / sizeof number[0]; ++n) {
            if (strcmp(name, number[n].name)) continue;
            if (!value) quit(EXIT_WRONG_INPUT, "%s needs a value", name);
            *number[n].to = (int)parse_number(name, value, number[n].least, 1 << 26);
            known = 1;
        }
        if (!known && strcmp(name, "--file") && strcmp(name, "--dtype") && strcmp(name, "--gate") &&
            strcmp(name, "--activation") && strcmp(name, "--seed"))
            quit(EXIT_WRONG_INPUT, "%s: no such option; --help lists them", name);
        if (!value) quit(EXIT_WRONG_INPUT, "%s needs a value", name);
        if (!strcmp(name, "--file")) o.file = value;
        if (!strcmp(name, "--dtype")) o.dtype = MOE_FP16 + parse_word(name, value, dtypes);
        if (!strcmp(name, "--gate")) o.score = MOE_SCORE_SOFTMAX + parse_word(name, value, gates);
        if (!strcmp(name, "--activation"))
            o.activation = MOE_ACTIVATION_NONE + parse_word(name, value, activation_words);
        if (!strcmp(name, "--seed"))
            o.seed = (uint64_t)parse_number(name, value, 0, 0x7fffffffffffffffll);
        ++i;
    }
    return o;
}

/* Opens the text shipped with the sample: where the build says, or from the repository's root, or
   beside the source. */
static FILE* open_shipped_text(const char** name)
{
#ifdef SAMPLE_TEXT
    static const char* const at[] = {SAMPLE_TEXT, "samples/01_layer/text.txt", "text.txt"};
#else
    static const char* const at[] = {"samples/01_layer/text.txt", "text.txt"};
#endif
    for (size_t i = 0; i < sizeof at / sizeof at[0]; ++i) {
        FILE* f = fopen(*name = at[i], "rb");
        if (f) return f;
    }
    quit(EXIT_WRONG_INPUT, "samples/01_layer/text.txt not found; name a file with --file");
    return 0;
}

/* The tokens: o->tokens bytes of the file, and o->tokens settled if it was 0. *file_bytes gets
   how many bytes were there, counted up to what was needed. */
static unsigned char* read_tokens(options* o, const char** name, size_t* file_bytes)
{
    FILE* f;
    const size_t most = o->tokens ? (size_t)o->tokens : (size_t)MOST_TOKENS;
    unsigned char* bytes =
        (unsigned char*)malloc(most > LEAST_TOKENS ? most : (size_t)LEAST_TOKENS);
    size_t n;
    int bad;
    if (!bytes) quit(EXIT_WRONG_INPUT, "--tokens %d: not enough memory", o->tokens);
    if (o->file) f = fopen(*name = o->file, "rb");
    else f = open_shipped_text(name);
    n = f ? fread(bytes, 1, most, f) : 0;
    bad = f && ferror(f);
    if (bad || n == 0) free(bytes);
    if (!f) quit(EXIT_WRONG_INPUT, "%s: cannot be opened", *name);
    fclose(f);
    if (bad) quit(EXIT_WRONG_INPUT, "%s: cannot be read", *name);
    if (n == 0) quit(EXIT_WRONG_INPUT, "%s: is empty", *name);
    if (o->tokens == 0) o->tokens = n < LEAST_TOKENS ? LEAST_TOKENS : (int)n;
    for (size_t i = n; i < (size_t)o->tokens; ++i) bytes[i] = bytes[i - n];
    *file_bytes = n;
    return bytes;
}

#endif
