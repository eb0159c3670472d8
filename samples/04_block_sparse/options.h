/* options.h: reads the options. A wrong option prints one line to stderr and exits with code 2. */
#ifndef MOE_SAMPLE_OPTIONS_H
#define MOE_SAMPLE_OPTIONS_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe/block_sparse/desc.h"

#define EXIT_WRONG_RESULT 1
#define EXIT_WRONG_INPUT 2
#define EXIT_NO_DEVICE 77

typedef struct options {
    const char* file;       /* null: moe.txt, or a mask of the next three */
    double random, columns; /* probability of a sparse block, a block column; < 0: unused */
    int diagonal;           /* squares along the diagonal; 0: unused */
    int op;                 /* moe_block_sparse_op */
    int m, n, k;
    int block_rows, block_columns;
    int dtype;  /* moe_dtype */
    int check;  /* elements of C to compare; -1: all */
    int repeat; /* timed runs */
    int tune;   /* 1: moe_block_sparse_tune chooses the tile */
    uint64_t seed;
} options;

/* The sizes suit the backend: the CPU needs less than a second. */
#define DEFAULT_SIZE (MOE_ON_HOST ? 304 : 4864)
#define DEFAULT_BLOCK (MOE_ON_HOST ? 16 : 64)
static const options default_options = {0,
                                        -1,
                                        -1,
                                        0,
                                        MOE_BLOCK_SPARSE_DSD,
                                        DEFAULT_SIZE,
                                        DEFAULT_SIZE,
                                        DEFAULT_SIZE,
                                        DEFAULT_BLOCK,
                                        DEFAULT_BLOCK,
                                        MOE_BF16,
                                        4096,
                                        MOE_ON_HOST ? 1 : 20,
                                        0,
                                        1};

/* Prints one line to stderr and ends the program. */
static void quit(int code, const char* format, ...)
{
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("04_block_sparse: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(code);
}

static void print_help(void)
{
    const options* d = &default_options;
    printf(
        "04_block_sparse: multiplies by a mask of sparse blocks, C [m, n] = A [m, k] * B [k, n]\n"
        "The mask, a picture that is scaled to the sparse blocks:\n"
        "  --mask F         a text file of # and . or a PBM file (P1, P4); default: moe.txt\n"
        "  --random D       each sparse block with probability D, 0 to 1\n"
        "  --diagonal N     N squares along the diagonal, as of tokens sorted by N experts\n"
        "  --columns D      each block column with probability D, as of one choice for a whole "
        "batch\n"
        "The product:\n"
        "  --op O           sdd (C sparse), dsd (A sparse) or dds (B sparse); default dsd\n"
        "  --m N --n N --k N  sizes, any; default %d each\n"
        "  --block N        size of a sparse block: 16, 32, 64 or 128, or two of them as 32x128;\n"
        "                   default %d\n"
        "  --dtype D        bf16 or fp16; default bf16\n"
        "  --tune           the quickest tile for this mask; default: by the header's rule\n"
        "  --seed N         of mask, A and B; default %llu\n"
        "  --repeat N       timed runs, their mean counts; default %d\n"
        "  --check N        elements of C compared with a naive product; default %d\n"
        "  --check all      every element\n"
        "  --help           this\n"
        "Exit code 0: C is right; 1: it is not; 2: wrong option or unreadable picture\n",
        d->m, d->block_rows, (unsigned long long)d->seed, d->repeat, d->check);
}

static long long parse_number(const char* name, const char* value, long long least, long long most)
{
    char* end;
    const long long v = strtoll(value, &end, 10);
    if (*end || end == value || v < least || v > most)
        quit(EXIT_WRONG_INPUT, "%s %s: not a whole number from %lld to %lld", name, value, least,
             most);
    return v;
}

static double parse_share(const char* name, const char* value)
{
    char* end;
    const double v = strtod(value, &end);
    if (*end || end == value || !(v >= 0 && v <= 1))
        quit(EXIT_WRONG_INPUT, "%s %s: not a number from 0 to 1", name, value);
    return v;
}

static void parse_block(options* o, const char* value)
{
    char* end;
    o->block_rows = o->block_columns = (int)strtol(value, &end, 10);
    if (*end == 'x') o->block_columns = (int)strtol(end + 1, &end, 10);
    if (*end || !moe_block_sparse_size_offered(o->block_rows) ||
        !moe_block_sparse_size_offered(o->block_columns))
        quit(EXIT_WRONG_INPUT, "--block %s: not 16, 32, 64 or 128, nor two of them as 32x128",
             value);
}

static options parse_options(int argc, char** argv)
{
    options o = default_options;
    int masks = 0;
    for (int i = 1; i < argc; ++i) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : 0;
        static const char* const known[] = {
            "--mask", "--random", "--diagonal", "--columns", "--op",     "--m",    "--n",
            "--k",    "--block",  "--dtype",    "--seed",    "--repeat", "--check"};
        size_t which = 0;
        if (!strcmp(name, "--help")) {
            print_help();
            exit(0);
        }
        if (!strcmp(name, "--tune")) {
            o.tune = 1;
            continue;
        }
        while (which < sizeof known / sizeof *known && strcmp(name, known[which])) ++which;
        if (which == sizeof known / sizeof *known)
            quit(EXIT_WRONG_INPUT, "%s: no such option; --help lists them", name);
        if (!value) quit(EXIT_WRONG_INPUT, "%s needs a value", name);
        masks += which < 4;
        if (!strcmp(name, "--mask")) o.file = value;
        if (!strcmp(name, "--random")) o.random = parse_share(name, value);
        if (!strcmp(name, "--columns")) o.columns = parse_share(name, value);
        if (!strcmp(name, "--diagonal")) o.diagonal = (int)parse_number(name, value, 1, 1 << 20);
        if (!strcmp(name, "--m")) o.m = (int)parse_number(name, value, 1, 1 << 20);
        if (!strcmp(name, "--n")) o.n = (int)parse_number(name, value, 1, 1 << 20);
        if (!strcmp(name, "--k")) o.k = (int)parse_number(name, value, 1, 1 << 20);
        if (!strcmp(name, "--block")) parse_block(&o, value);
        if (!strcmp(name, "--repeat")) o.repeat = (int)parse_number(name, value, 1, 1000000);
        if (!strcmp(name, "--seed")) o.seed = (uint64_t)parse_number(name, value, 0, INT64_MAX);
        if (!strcmp(name, "--check"))
            o.check = strcmp(value, "all") ? (int)parse_number(name, value, 1, 1 << 30) : -1;
        if (!strcmp(name, "--op")) {
            o.op = !strcmp(value, "sdd")   ? MOE_BLOCK_SPARSE_SDD
                   : !strcmp(value, "dsd") ? MOE_BLOCK_SPARSE_DSD
                                           : MOE_BLOCK_SPARSE_DDS;
            if (o.op == MOE_BLOCK_SPARSE_DDS && strcmp(value, "dds"))
                quit(EXIT_WRONG_INPUT, "--op %s: not one of sdd, dsd, dds", value);
        }
        if (!strcmp(name, "--dtype")) {
            o.dtype = strcmp(value, "fp16") ? MOE_BF16 : MOE_FP16;
            if (o.dtype == MOE_BF16 && strcmp(value, "bf16"))
                quit(EXIT_WRONG_INPUT, "--dtype %s: not one of fp16, bf16", value);
        }
        ++i;
    }
    if (masks > 1) quit(EXIT_WRONG_INPUT, "one of --mask, --random, --diagonal, --columns, please");
    return o;
}

#endif
