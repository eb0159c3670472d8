/* show.h: what the sample prints: progress, rates, the experts' bar chart. */
#ifndef MOE_SAMPLE_SHOW_H
#define MOE_SAMPLE_SHOW_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static double wall_seconds(void)
{
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Long work shows itself on stderr: on a terminal one line that is written over and then wiped,
   elsewhere a line every five seconds. Nothing for work that is done within half a second. */
static void show_progress(const char* what, int64_t done, int64_t total)
{
    static double began, last;
    static int shown;
    const double now = wall_seconds();
    const int terminal = isatty(2);
    if (done == 0) began = last = now, shown = 0;
    if (done >= total) {
        if (terminal && shown) fprintf(stderr, "\r%*s\r", 60, "");
        return;
    }
    if (now - began < 0.5 || now - last < (terminal ? 0.1 : 5.0)) return;
    last = now;
    shown = 1;
    fprintf(stderr, terminal ? "\r%s: %3d%%  " : "%s: %d%%\n", what, (int)(100 * done / total));
}

/* "1.23 TFLOP/s": amount per second with the prefix that fits. */
static const char* show_rate(double amount, double ms, const char* unit, char* text, size_t size)
{
    static const char* const prefix[] = {"", "k", "M", "G", "T", "P"};
    double v = ms > 0 ? amount / (ms * 1e-3) : 0;
    int p = 0;
    while (v >= 1000 && p < 5) v /= 1000, ++p;
    snprintf(text, size, "%.*f %s%s/s", v < 10 ? 2 : v < 100 ? 1 : 0, v, prefix[p], unit);
    return text;
}

static int compare_doubles(const void* a, const void* b)
{
    const double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

/* Sorts v. */
static double median(double* v, int n)
{
    qsort(v, (size_t)n, sizeof *v, compare_doubles);
    return n % 2 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

/* Rows of each expert as bars, at most 32 of them: more experts share a bar, which then shows
   their mean. Then the extremes and the spread. */
static void show_experts(const int32_t* count, int num_experts, int64_t rows)
{
    enum { BARS = 32, WIDTH = 48 };
    const int each = (num_experts + BARS - 1) / BARS;
    const double even = (double)rows / num_experts;
    double largest = 0, squares = 0;
    int busiest = 0, idlest = 0, unused = 0;
    for (int e = 0; e < num_experts; ++e) {
        if (count[e] > count[busiest]) busiest = e;
        if (count[e] < count[idlest]) idlest = e;
        unused += count[e] == 0;
        squares += (count[e] - even) * (count[e] - even);
    }
    for (int pass = 0; pass < 2; ++pass) /* first the scale, then the bars */
        for (int first = 0; first < num_experts; first += each) {
            const int last = (first + each < num_experts ? first + each : num_experts) - 1;
            char label[32], bar[WIDTH + 1];
            double mean = 0;
            int width;
            for (int e = first; e <= last; ++e) mean += count[e];
            mean /= last - first + 1;
            if (pass == 0) {
                if (mean > largest) largest = mean;
                continue;
            }
            width = largest > 0 ? (int)(mean / largest * WIDTH + 0.5) : 0;
            for (int i = 0; i < WIDTH; ++i) bar[i] = i < width ? '#' : ' ';
            bar[WIDTH] = 0;
            if (first == last) snprintf(label, sizeof label, "%d", first);
            else snprintf(label, sizeof label, "%d-%d", first, last);
            printf("  %9s |%s %.0f\n", label, bar, mean);
        }
    printf("  busiest   expert %d, %d rows, %.2f of an even share\n", busiest, count[busiest],
           even > 0 ? count[busiest] / even : 0);
    printf("  idlest    expert %d, %d rows, %.2f of an even share; %d unused\n", idlest,
           count[idlest], even > 0 ? count[idlest] / even : 0, unused);
    printf("  spread    coefficient of variation %.3f (0 is even)\n",
           even > 0 ? sqrt(squares / num_experts) / even : 0);
}

#endif
