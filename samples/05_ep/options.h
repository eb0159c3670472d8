/* options.h: reads the options. A wrong option prints one line to stderr and exits with code 2. */
#ifndef MOE_SAMPLE_OPTIONS_H
#define MOE_SAMPLE_OPTIONS_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe/ep/layer.cuh"
#include "moe/ep/profile.cuh"

#define EXIT_WRONG_RESULT 1
#define EXIT_WRONG_INPUT 2
#define EXIT_NO_DEVICE 77
#define MOST_RANKS 16 /* in one process */

typedef struct options {
    int T, H, I, E, K;    /* T: of all ranks */
    int ranks;            /* in this process; 0: one per GPU, on the CPU 4 */
    moe_ep_choice choice; /* forms; 0 in both: the profiler picks them */
    const char* file;     /* that keeps the profiler's choice; null: none */
    int dtype;
    int repeat;
    int train, redispatch, counts; /* backward too; its options */
} options;

/* Prints one line to stderr and ends the program. */
static void quit(int code, const char* format, ...)
{
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("05_ep: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(code);
}

/* Ends the program where a call fails. */
#define MOE(call)                                                                                  \
    do {                                                                                           \
        const moe_status s_ = (call);                                                              \
        char text_[MOE_STATUS_TEXT];                                                               \
        if (s_ != MOE_OK)                                                                          \
            quit(EXIT_WRONG_INPUT, "%s refuses: %s", #call, moe_status_describe(s_, text_));       \
    } while (0)
#define CUDA(call)                                                                                 \
    do {                                                                                           \
        const cudaError_t e_ = (call);                                                             \
        if (e_ != cudaSuccess) quit(EXIT_WRONG_RESULT, "%s: %s", #call, cudaGetErrorString(e_));   \
    } while (0)

static void help(void)
{
    printf("05_ep [options]\n"
           "  --thiek T,H,I,E,K  tokens of all ranks, widths, experts, experts per token\n"
           "  --ranks N          ranks of this process, 1 to %d, spread over the GPUs\n"
           "  --dispatch FORM    deduplicated, all-to-all, all-gather or all-gather-copy\n"
           "  --combine FORM     reduced, gathered or reduce-scatter; without both the profiler\n"
           "                     picks the fastest\n"
           "  --choice FILE      reads the profiler's choice from FILE, or writes it there\n"
           "  --dtype TYPE       bf16 or fp16\n"
           "  --repeat N         timed runs\n"
           "  --train            forward and backward, beside those of one GPU\n"
           "  --redispatch_x_in_backward  training: x is sent again, and not kept\n"
           "  --CPU_sync_on_runtime       training: the host reads the row count, less is kept\n"
           "Under torchrun, mpirun or srun: one rank a process.\n",
           MOST_RANKS);
    exit(0);
}

/* Reads a whole number from `least` on. */
static int number(const char* name, const char* text, int least)
{
    char* end;
    const long v = strtol(text, &end, 10);
    if (!*text || *end || v < least || v > 1 << 30)
        quit(EXIT_WRONG_INPUT, "%s %s: not a whole number from %d on", name, text, least);
    return (int)v;
}

/* Reads an option that has a value. Returns 1. */
static int read_option(options* o, const char* name, const char* value)
{
    if (strcmp(name, "--thiek") && strcmp(name, "--ranks") && strcmp(name, "--combine") &&
        strcmp(name, "--dispatch") && strcmp(name, "--choice") && strcmp(name, "--dtype") &&
        strcmp(name, "--repeat"))
        quit(EXIT_WRONG_INPUT, "%s: no such option", name);
    if (!value) quit(EXIT_WRONG_INPUT, "%s needs a value", name);
    if (!strcmp(name, "--thiek")) {
        char rest;
        if (sscanf(value, "%d,%d,%d,%d,%d%c", &o->T, &o->H, &o->I, &o->E, &o->K, &rest) != 5)
            quit(EXIT_WRONG_INPUT, "--thiek %s: not five numbers T,H,I,E,K", value);
        if (o->T < 1 || o->K > o->E)
            quit(EXIT_WRONG_INPUT, "--thiek %s: T is at least 1, K at most E", value);
    } else if (!strcmp(name, "--ranks")) {
        o->ranks = number(name, value, 1);
        if (o->ranks > MOST_RANKS)
            quit(EXIT_WRONG_INPUT, "--ranks %s: more than %d", value, MOST_RANKS);
    } else if (!strcmp(name, "--combine")) {
        o->choice.combine_form = moe_ep_combine_named(value);
        if (o->choice.combine_form < 1)
            quit(EXIT_WRONG_INPUT, "--combine %s: not one of reduced, gathered, reduce-scatter",
                 value);
    } else if (!strcmp(name, "--dispatch")) {
        o->choice.dispatch_form = moe_ep_dispatch_named(value);
        if (o->choice.dispatch_form < 1)
            quit(EXIT_WRONG_INPUT,
                 "--dispatch %s: not one of deduplicated, all-to-all, all-gather, all-gather-copy",
                 value);
    } else if (!strcmp(name, "--choice")) {
        o->file = value;
    } else if (!strcmp(name, "--dtype")) {
        if (!strcmp(value, "bf16")) o->dtype = MOE_BF16;
        else if (!strcmp(value, "fp16")) o->dtype = MOE_FP16;
        else quit(EXIT_WRONG_INPUT, "--dtype %s: not one of bf16, fp16", value);
    } else {
        o->repeat = number(name, value, 1);
    }
    return 1;
}

static options read_options(int argc, char** argv)
{
    options o;
    memset(&o, 0, sizeof o);
    o.T = 16384, o.H = 2048, o.I = 768, o.E = 128, o.K = 8, o.dtype = MOE_BF16, o.repeat = 20;
    if (MOE_ON_HOST) o.T = 64, o.H = 64, o.I = 40, o.E = 8, o.K = 2, o.repeat = 1;
    for (int i = 1; i < argc; ++i) {
        const char* name = argv[i];
        const char* value = i + 1 < argc ? argv[i + 1] : 0;
        if (!strcmp(name, "--help")) help();
        if (!strcmp(name, "--train")) o.train = 1;
        else if (!strcmp(name, "--redispatch_x_in_backward")) o.train = o.redispatch = 1;
        else if (!strcmp(name, "--CPU_sync_on_runtime")) o.train = o.counts = 1;
        else i += read_option(&o, name, value);
    }
    return o;
}

#endif
