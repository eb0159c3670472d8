/* profile.h: which dispatch and which combine a group uses: a plain struct. profile.cuh measures
   it; a program may as well fill it in by hand, or keep it as text and read it back. C11 and C++14.

     moe_ep_choice c = {0};
     c.dispatch_form = MOE_EP_ALL_TO_ALL;               // by hand; 0: the default
     moe_ep_choice_apply(&c, &layer.buffers);           // sets both forms

     char text[MOE_EP_CHOICE_TEXT];
     moe_ep_choice_write(&c, text, sizeof text);        // the program writes it to its own file
     moe_status s = moe_ep_choice_read(&c, text, &line);

   Text: one fact a line, in any order; '#' begins a comment. Only `dispatch` and `combine` matter,
   the others say what was measured:

     dispatch deduplicated
     combine reduced
     shape ranks 2 tokens 32768 hidden 4096 experts 128 top_k 8 dtype bf16
     dispatch_time deduplicated ms 0.784 up 5.912 GB/s 342.1
     combine_time reduced ms 1.011 GB/s 264.8 */
#ifndef MOE_EP_PROFILE_H
#define MOE_EP_PROFILE_H

#include <stdio.h>
#include <string.h>

#include "desc.h"

#define MOE_EP_DISPATCH_FORMS 5 /* moe_ep_dispatch_form counts below this */
#define MOE_EP_COMBINE_FORMS 4  /* moe_ep_combine_form */
#define MOE_EP_CHOICE_TEXT 1024 /* bytes that any choice's text fits into */

/* What a group uses, and why. Times are of the slowest rank, a barrier of all ranks included; rates
   count the bytes that leave the busiest GPU. 0: not measured. */
typedef struct moe_ep_choice {
    int32_t dispatch_form; /* moe_ep_dispatch_form */
    int32_t combine_form;  /* moe_ep_combine_form */
    int32_t num_ranks;
    int32_t max_tokens; /* most of any rank */
    int32_t hidden, num_experts, top_k;
    int32_t dtype; /* moe_dtype */
    double dispatch_ms[MOE_EP_DISPATCH_FORMS];
    double up_ms[MOE_EP_DISPATCH_FORMS]; /* of the experts' first product behind that dispatch */
    double dispatch_rate[MOE_EP_DISPATCH_FORMS]; /* GB/s */
    double combine_ms[MOE_EP_COMBINE_FORMS];
    double combine_rate[MOE_EP_COMBINE_FORMS]; /* GB/s */
} moe_ep_choice;

/* Return the name of a form, "default" for 0, "?" for a value that is none: static storage. */
MOE_HOST const char* moe_ep_dispatch_name(int form)
{
    static const char* const name[] = {"default", "deduplicated", "all-to-all", "all-gather",
                                       "all-gather-copy"};
    return form >= 0 && form < MOE_EP_DISPATCH_FORMS ? name[form] : "?";
}
MOE_HOST const char* moe_ep_combine_name(int form)
{
    static const char* const name[] = {"default", "reduced", "gathered", "reduce-scatter"};
    return form >= 0 && form < MOE_EP_COMBINE_FORMS ? name[form] : "?";
}

/* Return the form of a name, -1 where there is none. */
MOE_HOST int moe_ep_dispatch_named(const char* name)
{
    int form = MOE_EP_DISPATCH_FORMS - 1;
    while (form >= 0 && strcmp(name, moe_ep_dispatch_name(form))) --form;
    return form;
}
MOE_HOST int moe_ep_combine_named(const char* name)
{
    int form = MOE_EP_COMBINE_FORMS - 1;
    while (form >= 0 && strcmp(name, moe_ep_combine_name(form))) --form;
    return form;
}

/* Sets the forms of `buffers`. Errors: desc: null; dispatch_form, combine_form: not a form. */
MOE_HOST moe_status moe_ep_choice_apply(const moe_ep_choice* choice, moe_ep_buffers* buffers)
{
    MOE_REQUIRE(choice && buffers, MOE_ERR_NULL, desc);
    MOE_REQUIRE(choice->dispatch_form >= 0 && choice->dispatch_form < MOE_EP_DISPATCH_FORMS,
                MOE_ERR_OPTION, dispatch_form);
    MOE_REQUIRE(choice->combine_form >= 0 && choice->combine_form < MOE_EP_COMBINE_FORMS,
                MOE_ERR_OPTION, combine_form);
    buffers->dispatch_form = choice->dispatch_form;
    buffers->combine_form = choice->combine_form;
    return MOE_OK;
}

/* A text that is being written: what does not fit is counted, not written. */
typedef struct moei_ep_text {
    char* text;
    size_t room, length;
} moei_ep_text;

/* Returns where the next characters go, and sets *room to the bytes that are left there. */
MOE_HOST char* moei_ep_text_end(const moei_ep_text* t, size_t* room)
{
    *room = t->length < t->room ? t->room - t->length : 0;
    return *room ? t->text + t->length : 0;
}

/* Appends printf's characters to t. */
#define MOEI_EP_APPEND(t, ...)                                                                     \
    do {                                                                                           \
        size_t room_;                                                                              \
        char* end_ = moei_ep_text_end(t, &room_);                                                  \
        const int n_ = snprintf(end_, room_, __VA_ARGS__);                                         \
        (t)->length += n_ > 0 ? (size_t)n_ : 0;                                                    \
    } while (0)

/* Writes a choice as text, zero-terminated, into `bytes` bytes. Returns the length that it needs
   without the zero: where that is `bytes` or more, the text is cut off. */
MOE_HOST size_t moe_ep_choice_write(const moe_ep_choice* c, char* text, size_t bytes)
{
    moei_ep_text t = {0, 0, 0};
    t.text = text;
    t.room = bytes;
    MOEI_EP_APPEND(&t, "dispatch %s\ncombine %s\n", moe_ep_dispatch_name(c->dispatch_form),
                   moe_ep_combine_name(c->combine_form));
    if (c->num_ranks)
        MOEI_EP_APPEND(&t, "shape ranks %d tokens %d hidden %d experts %d top_k %d dtype %s\n",
                       c->num_ranks, c->max_tokens, c->hidden, c->num_experts, c->top_k,
                       moe_dtype_name(c->dtype));
    for (int f = 1; f < MOE_EP_DISPATCH_FORMS; ++f)
        if (c->dispatch_ms[f] > 0)
            MOEI_EP_APPEND(&t, "dispatch_time %s ms %.6f up %.6f GB/s %.3f\n",
                           moe_ep_dispatch_name(f), c->dispatch_ms[f], c->up_ms[f],
                           c->dispatch_rate[f]);
    for (int f = 1; f < MOE_EP_COMBINE_FORMS; ++f)
        if (c->combine_ms[f] > 0)
            MOEI_EP_APPEND(&t, "combine_time %s ms %.6f GB/s %.3f\n", moe_ep_combine_name(f),
                           c->combine_ms[f], c->combine_rate[f]);
    return t.length;
}

/* Reads one line into *c. Returns 1; 0 where the line means nothing. */
MOE_HOST int moei_ep_choice_line(const char* line, moe_ep_choice* c)
{
    char name[32], dtype[16];
    int form, used = 0;
    double ms, up, rate;
    if (sscanf(line, " %n", &used) < 0 || !line[used] || line[used] == '#') return 1;
    if (sscanf(line, " dispatch %31s %n", name, &used) == 1 && !line[used])
        return (c->dispatch_form = moe_ep_dispatch_named(name)) >= 0;
    if (sscanf(line, " combine %31s %n", name, &used) == 1 && !line[used])
        return (c->combine_form = moe_ep_combine_named(name)) >= 0;
    if (sscanf(line, " shape ranks %d tokens %d hidden %d experts %d top_k %d dtype %15s %n",
               &c->num_ranks, &c->max_tokens, &c->hidden, &c->num_experts, &c->top_k, dtype,
               &used) == 6 &&
        !line[used]) {
        c->dtype = MOE_BF16;
        while (c->dtype > 0 && strcmp(dtype, moe_dtype_name(c->dtype))) --c->dtype;
        return c->dtype > 0;
    }
    if (sscanf(line, " dispatch_time %31s ms %lf up %lf GB/s %lf %n", name, &ms, &up, &rate,
               &used) == 4 &&
        !line[used] && (form = moe_ep_dispatch_named(name)) > 0) {
        c->dispatch_ms[form] = ms, c->up_ms[form] = up, c->dispatch_rate[form] = rate;
        return 1;
    }
    if (sscanf(line, " combine_time %31s ms %lf GB/s %lf %n", name, &ms, &rate, &used) == 3 &&
        !line[used] && (form = moe_ep_combine_named(name)) > 0) {
        c->combine_ms[form] = ms, c->combine_rate[form] = rate;
        return 1;
    }
    return 0;
}

/* Reads what moe_ep_choice_write wrote, or a hand, into *choice. *line: number of the line that
   means nothing, from 1; 0: none; line may be null. Errors: desc: null; choice (MOE_ERR_OPTION):
   such a line, *choice stays as it was. */
MOE_HOST moe_status moe_ep_choice_read(moe_ep_choice* choice, const char* text, int32_t* line)
{
    moe_ep_choice c;
    int32_t number = 0;
    if (line) *line = 0;
    MOE_REQUIRE(choice && text, MOE_ERR_NULL, desc);
    memset(&c, 0, sizeof c);
    while (*text) {
        char one[256];
        const char* end = strchr(text, '\n');
        const size_t n = end ? (size_t)(end - text) : strlen(text);
        ++number;
        if (n < sizeof one) {
            memcpy(one, text, n);
            one[n] = 0;
        }
        if (n >= sizeof one || !moei_ep_choice_line(one, &c)) {
            if (line) *line = number;
            return MOE_STATUS(MOE_ERR_OPTION, choice);
        }
        text += n + (end != 0);
    }
    *choice = c;
    return MOE_OK;
}

/* Writes a table of two lines for people: each form's milliseconds and GB/s, and the winner. Room
   and return value: as of moe_ep_choice_write. */
MOE_HOST size_t moe_ep_choice_table(const moe_ep_choice* c, char* text, size_t bytes)
{
    moei_ep_text t = {0, 0, 0};
    t.text = text;
    t.room = bytes;
    MOEI_EP_APPEND(&t, "dispatch:");
    for (int f = 1; f < MOE_EP_DISPATCH_FORMS; ++f)
        if (c->dispatch_ms[f] > 0)
            MOEI_EP_APPEND(&t, " %s %.3f ms (%.1f GB/s)", moe_ep_dispatch_name(f),
                           c->dispatch_ms[f], c->dispatch_rate[f]);
    MOEI_EP_APPEND(&t, " winner %s\ncombine:", moe_ep_dispatch_name(c->dispatch_form));
    for (int f = 1; f < MOE_EP_COMBINE_FORMS; ++f)
        if (c->combine_ms[f] > 0)
            MOEI_EP_APPEND(&t, " %s %.3f ms (%.1f GB/s)", moe_ep_combine_name(f), c->combine_ms[f],
                           c->combine_rate[f]);
    MOEI_EP_APPEND(&t, " winner %s\n", moe_ep_combine_name(c->combine_form));
    return t.length;
}

#endif
