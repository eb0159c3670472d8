/* results.h: prints what ran, the times and the rows of the experts, and checks y. */
#ifndef MOE_SAMPLE_RESULTS_H
#define MOE_SAMPLE_RESULTS_H

#include "input.h"
#include "moe/ref/layer.h"

static void show_setting(const options* o, const moe_layer_desc* d, const char* device)
{
    moe_gemm_plan up = {}, down = {};
    MOE(moe_layer_plan(d, &up, &down));
    printf("moe %s, %s backend, %s\n", MOE_VERSION_STRING, MOE_ON_HOST ? "host" : "cuda", device);
    printf("experts     path %s, tile %dx%dx%d up, %dx%dx%d down\n", moe_gemm_path_name(up.path),
           up.tile_m, up.tile_n, up.tile_k, down.tile_m, down.tile_n, down.tile_k);
    printf("tokens      %d from %s%s\n", o->tokens, o->file,
           o->tokens > o->file_bytes ? ", repeated" : "");
    printf("shape       H %d, I %d, E %d, K %d, %s, %s gate\n", o->hidden, o->intermediate,
           o->experts, o->top_k, moe_dtype_name(o->dtype), scores[o->score - MOE_SCORE_SOFTMAX]);
    printf("workspace   %.1f MB\n\n", (double)d->workspace_bytes / 1e6);
}

/* Prints the mean time of each part of the layer and its rate: FLOP, or bytes moved once. */
static void show_time(const options* o, const moe_layer_prepared* layer)
{
    const double T = o->tokens, H = o->hidden, I = o->intermediate, E = o->experts;
    const double R = T * o->top_k; /* rows */
    static const char* const unit[] = {"FLOP", "B", "B", "FLOP", "FLOP", "", "", "B"};
    double work[MOE_LAYER_PARTS] = {0}, ms[MOE_LAYER_PARTS] = {0}, all = 0;
    cudaEvent_t event[MOE_LAYER_PARTS + 1];
    work[MOE_LAYER_ROUTER] = 2 * T * E * H;
    work[MOE_LAYER_GATE] = T * E * 4 + R * 8; /* logits, ids, weights */
    work[MOE_LAYER_ROUTE] = R * 16;           /* ids, row map, places */
    work[MOE_LAYER_UP] = 4 * R * H * I;
    work[MOE_LAYER_DOWN] = 2 * R * H * I;
    work[MOE_LAYER_COMBINE] = (R + T) * H * 2 + R * 12; /* rows, y, places, weights */
    for (int part = 0; part <= MOE_LAYER_PARTS; ++part) CUDA(cudaEventCreate(&event[part]));
    for (int run = 0; run < o->repeat; ++run) {
        CUDA(cudaEventRecord(event[0], 0));
        for (int part = 0; part < MOE_LAYER_PARTS; ++part) {
            MOE(moe_layer_run_part(layer, part, 0));
            CUDA(cudaEventRecord(event[part + 1], 0));
        }
        CUDA(cudaDeviceSynchronize());
        for (int part = 0; part < MOE_LAYER_PARTS; ++part) {
            float one = 0;
            CUDA(cudaEventElapsedTime(&one, event[part], event[part + 1]));
            ms[part] += one / o->repeat;
            all += one / o->repeat;
        }
    }
    for (int part = 0; part <= MOE_LAYER_PARTS; ++part) CUDA(cudaEventDestroy(event[part]));
    for (int part = 0; part < MOE_LAYER_PARTS; ++part)
        if (work[part] > 0)
            printf("%-11s %9.3f ms %8.3g G%s/s\n", moe_layer_part_name(part), ms[part],
                   work[part] / ms[part] * 1e-6, unit[part]);
    printf("layer       %9.3f ms %8.3g ktokens/s, %d runs\n\n", all, T / all, o->repeat);
}

/* Draws at most 32 bars: with more experts a bar is the mean of several. */
static void show_experts(const moe_layer_view* v, int E)
{
    static const char full[] = "################################################"; /* 48 */
    int32_t* count = (int32_t*)host_new(E * 4);
    const double even = (double)v->num_rows / E;
    const int each = (E + 31) / 32;
    int busiest = 0, idlest = 0;
    double squares = 0;
    CUDA(cudaMemcpy(count, v->expert_count, (size_t)E * 4, cudaMemcpyDeviceToHost));
    for (int e = 0; e < E; ++e) {
        if (count[e] > count[busiest]) busiest = e;
        if (count[e] < count[idlest]) idlest = e;
        squares += (count[e] - even) * (count[e] - even);
    }
    printf("rows of each expert, %lld in all\n", (long long)v->num_rows);
    for (int first = 0; first < E; first += each) {
        const int end = first + each < E ? first + each : E;
        double mean = 0;
        for (int e = first; e < end; ++e) mean += (double)count[e] / (end - first);
        if (each > 1) printf("  %4d-%-4d ", first, end - 1);
        else printf("  %9d ", first);
        printf("|%-48.*s %.0f\n", (int)(48 * mean / count[busiest]), full, mean);
    }
    printf("busiest     expert %d, %d rows\n", busiest, count[busiest]);
    printf("idlest      expert %d, %d rows\n", idlest, count[idlest]);
    printf("spread      %.3f: standard deviation / mean\n\n", sqrt(squares / E) / even);
}

/* Compares `most` tokens, evenly spread, with the reference. Takes x and the weights of `host` from
   host memory. Returns 1 where the layer is right. README.md explains the bounds. */
static int check_layer(const moe_layer_desc* host, const moe_layer_view* v, int most)
{
    const int64_t T = host->num_tokens, H = host->hidden, E = host->num_experts;
    const int64_t tokens = most < T ? most : T, step = T / tokens;
    const int dtype = host->dtype;
    void* y = host_new(T * H * 2);
    float* logits = (float*)host_new(T * E * 4);
    double* exact = (double*)host_new(tokens * H * 8);
    double* rounded = (double*)host_new(tokens * H * 8);
    double bound = 0, error = 0, largest = 0;
    int wrong = 0, ok;
    moe_ref_layer_desc r = {};
    CUDA(cudaMemcpy(y, host->y, (size_t)(T * H) * 2, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(logits, v->logits, (size_t)(T * E) * 4, cudaMemcpyDeviceToHost));
    r.x = host->x;
    r.logits = logits; /* of the layer: a near tie cannot change the choice */
    r.w1 = host->w1;
    r.w2 = host->w2;
    r.x_stride = step * H;
    r.logits_stride = step * E;
    r.x_dtype = r.w_dtype = dtype;
    r.num_tokens = (int)tokens;
    r.num_experts = host->num_experts;
    r.top_k = host->top_k;
    r.hidden = host->hidden;
    r.intermediate = host->intermediate;
    r.score = host->gate.score;
    r.renormalize = host->gate.renormalize;
    if (moe_ref_layer_f64(&r, exact, 0, 0)) errx(WRONG_INPUT, "not enough memory to check");
    r.act_dtype = r.rows_dtype = dtype; /* rounds where the layer does */
    if (moe_ref_layer_f64(&r, rounded, 0, 0)) errx(WRONG_INPUT, "not enough memory to check");
    for (int64_t i = 0; i < tokens * E; ++i) {
        const int64_t t = i / E * step, e = i % E;
        double sum = 0, size = 0;
        for (int64_t h = 0; h < H; ++h) {
            const double x = moe_load(host->x, t * H + h, dtype);
            const double p = x * moe_load(host->router, e * H + h, dtype);
            sum += p;
            size += fabs(p);
        }
        wrong += !(fabs(logits[t * E + e] - sum) <= (H / 16.0 + 2) * ldexp(size, -23));
    }
    for (int64_t i = 0; i < tokens * H; ++i) {
        const double e = fabs(moe_load(y, i / H * step * H + i % H, dtype) - exact[i]);
        const double rounding = fabs(moe_ref_round_f64(rounded[i], dtype) - exact[i]);
        error = isfinite(e) ? fmax(error, e) : INFINITY;
        bound = fmax(bound, 2 * rounding + 1e-5);
        largest = fmax(largest, fabs(exact[i]));
    }
    ok = !wrong && error <= bound && largest > 16 * bound;
    printf("check       %d of %d tokens against moe/ref in float64\n", (int)tokens, (int)T);
    printf("logits      %d past the bound (H/16 + 2) 2^-23 sum |x w|\n", wrong);
    printf("y           error %.3g, bound %.3g, values up to %.3g\n", error, bound, largest);
    printf("%s\n", ok ? "PASSED: the layer is right" : "FAILED: the layer is wrong");
    return ok;
}

#endif
