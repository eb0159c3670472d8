/* picture.h: reads a picture from a text file or a PBM file, makes the mask, draws the mask. */
#ifndef MOE_SAMPLE_PICTURE_H
#define MOE_SAMPLE_PICTURE_H

#include <ctype.h>

#include "options.h"

#define MOST_SIDE 4096 /* of a picture, in dots */

typedef struct picture {
    int rows, columns;
    unsigned char* dots; /* [rows, columns], 1: present; static memory */
} picture;

static unsigned char picture_dots[MOST_SIDE * MOST_SIDE];

/* Returns the next number of a PBM header, after blanks and comments; -1 without a number. */
static int pbm_number(FILE* f)
{
    int c = fgetc(f), v = -1;
    while (c == '#' || isspace(c)) {
        if (c == '#')
            while (c != '\n' && c != EOF) c = fgetc(f);
        else c = fgetc(f);
    }
    for (; c >= '0' && c <= '9' && v <= MOST_SIDE; c = fgetc(f)) v = (v < 0 ? 0 : v * 10) + c - '0';
    return v; /* has read one character after the number */
}

/* Reads the part after "P1" or "P4". Returns what is wrong, or null. */
static const char* read_pbm(FILE* f, int kind, picture* p)
{
    p->columns = pbm_number(f);
    p->rows = pbm_number(f);
    if (p->rows < 0) return "a PBM file without its sizes";
    if (p->rows < 1 || p->columns < 1 || p->rows > MOST_SIDE || p->columns > MOST_SIDE)
        return "not 1 to 4096 dots a side";
    for (int i = 0; i < p->rows; ++i)
        for (int j = 0, byte = 0; j < p->columns; ++j) {
            int c = byte;
            if (kind == '4') {
                if (j % 8 == 0) c = byte = fgetc(f);
            } else {
                do c = fgetc(f);
                while (isspace(c));
                if (c != EOF && c != '0' && c != '1') return "a P1 picture has 0 and 1 only";
            }
            if (c == EOF) return "ends before its last dot";
            p->dots[i * p->columns + j] =
                (unsigned char)(kind == '4' ? byte >> (7 - j % 8) & 1 : c == '1');
        }
    return 0;
}

/* Reads lines of # and . of one length. `c` is the first character. Returns what is wrong, or
   null. */
static const char* read_text(FILE* f, int c, picture* p)
{
    int at = 0, ended = 0; /* an empty line ends the picture */
    p->rows = p->columns = 0;
    for (;; c = fgetc(f)) {
        if (c == '\r') continue;
        if (c == '\n' || c == EOF) {
            ended |= at == 0;
            if (at && p->rows && at != p->columns) return "its lines are not of one length";
            if (at) p->columns = at, ++p->rows;
            at = 0;
            if (c == EOF) return p->rows ? 0 : "is empty";
            continue;
        }
        if (c != '#' && c != '.') return "neither a PBM file (P1, P4) nor lines of # and .";
        if (ended) return "goes on behind an empty line";
        if (at == MOST_SIDE || p->rows == MOST_SIDE) return "not 1 to 4096 dots a side";
        p->dots[(p->rows ? p->rows * p->columns : 0) + at++] = c == '#';
        if (p->rows && at > p->columns) return "its lines are not of one length";
    }
}

/* Reads the picture of the file *name. Where *name is null, sets *name to that of moe.txt: the path
   that the build defines, from the root of the repository, or in the current directory. */
static picture read_picture(const char** name)
{
#ifdef SAMPLE_PICTURE
    static const char* const at[] = {SAMPLE_PICTURE, "samples/04_block_sparse/moe.txt", "moe.txt"};
#else
    static const char* const at[] = {"samples/04_block_sparse/moe.txt", "moe.txt"};
#endif
    FILE* f = *name ? fopen(*name, "rb") : 0;
    picture p = {0, 0, picture_dots};
    const char* wrong;
    int c, bad;
    if (!*name)
        for (size_t i = 0; i < sizeof at / sizeof *at && !f; ++i) f = fopen(*name = at[i], "rb");
    if (!f) quit(EXIT_WRONG_INPUT, "%s: cannot be opened", *name);
    c = fgetc(f);
    if (c == 'P') {
        c = fgetc(f);
        wrong = c == '1' || c == '4' ? read_pbm(f, c, &p) : "of Netpbm's files only PBM, P1 and P4";
    } else {
        wrong = read_text(f, c, &p);
    }
    bad = ferror(f);
    fclose(f);
    if (bad) quit(EXIT_WRONG_INPUT, "%s: cannot be read", *name);
    if (wrong) quit(EXIT_WRONG_INPUT, "%s: %s", *name, wrong);
    return p;
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static double share_of(uint64_t seed, uint64_t i)
{
    return (double)(mix(seed + i) >> 11) / 9007199254740992.0; /* 0 .. 1 */
}

/* Fills the mask [RB, CB] by the options. Returns its description. */
static const char* make_mask(const options* o, const picture* p, int RB, int CB,
                             unsigned char* mask)
{
    const uint64_t seed = mix(o->seed);
    const int64_t squares = o->diagonal < RB ? o->diagonal : RB;
    for (int64_t i = 0; i < RB; ++i)
        for (int64_t j = 0; j < CB; ++j) {
            const uint64_t at = (uint64_t)(i * CB + j);
            int present;
            if (o->random >= 0) present = share_of(seed, at) < o->random;
            else if (o->columns >= 0) present = share_of(seed, (uint64_t)j) < o->columns;
            else if (o->diagonal) present = i * squares / RB == j * squares / CB;
            else present = p->dots[i * p->rows / RB * p->columns + j * p->columns / CB];
            mask[at] = (unsigned char)present;
        }
    return o->random >= 0    ? "random sparse blocks"
           : o->columns >= 0 ? "random block columns"
           : o->diagonal     ? "squares along the diagonal"
                             : "a picture";
}

/* Draws the mask, at most 76 by 38 characters. A character stands for one or more sparse blocks. Up
   to 38 block columns are drawn two characters wide. */
static void draw_mask(const unsigned char* mask, int RB, int CB)
{
    const int columns = CB < 76 ? CB : 76, rows = RB < 38 ? RB : 38, twice = CB <= 38 ? 2 : 1;
    for (int y = 0; y < rows; ++y) {
        printf("  ");
        for (int x = 0; x < columns * twice; ++x) {
            const int64_t i0 = (int64_t)y * RB / rows, i1 = ((int64_t)y + 1) * RB / rows;
            const int64_t j0 = (int64_t)(x / twice) * CB / columns;
            const int64_t j1 = ((int64_t)(x / twice) + 1) * CB / columns;
            int64_t present = 0;
            for (int64_t i = i0; i < i1; ++i)
                for (int64_t j = j0; j < j1; ++j) present += mask[i * CB + j];
            putchar(present == 0 ? '.' : present == (i1 - i0) * (j1 - j0) ? '#' : '+');
        }
        putchar('\n');
    }
    printf("  # present, . masked out%s\n", rows < RB || columns < CB ? ", + some of each" : "");
}

#endif
