/* The three layer forms on block-sparse products, forward and backward, and the memory of a
   training iteration.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_block_layer.cu -lcublas -lcublasLt -o bench_block_layer

   Floor: cuBLAS's time for the dense form's products as dense products (two forward, four backward,
   in turn with each form). For the other forms, the share of that time that their experts have.
   Memory: weights, gradients, saved, workspace, inputs and outputs of one iteration, as allocated
   and as cudaMemGetInfo reports. In the sparse form all experts have tokens, so all have gradients;
   in the batch form K of them do. */
#include "bench_blas.h"

#include "../moe/block_layer.cuh"

typedef struct shape {
    int T, H, I, E, K, block, activation;
    int timed; /* 0: too small for the rates to be meaningful */
} shape;

static int gated(const shape* p) { return moe_activation_is_gated(p->activation); }

/* ---- cuBLAS ---- */

enum { DENSE_FORWARD = 2, DENSE_PRODUCTS = 6 }; /* the others belong to backward */

/* The dense form's products, C [m, n] = A [m, k] B [n, k]^T; all share their operands. */
typedef struct dense_step {
    bench_gemm g[DENSE_PRODUCTS];
    void *a, *b, *c;
} dense_step;

static void open_dense(bench_state* s, const bench_blas* blas, const shape* p, dense_step* d)
{
    const int EI = p->E * p->I, EU = gated(p) ? 2 * EI : EI;
    const int size[DENSE_PRODUCTS][3] = {{p->T, EU, p->H}, {p->T, p->H, EI}, {p->T, EI, p->H},
                                         {p->H, EI, p->T}, {EU, p->H, p->T}, {p->T, p->H, EU}};
    int64_t a = 0, b = 0, c = 0;
    for (int i = 0; i < DENSE_PRODUCTS; ++i) {
        const int64_t m = size[i][0], n = size[i][1], k = size[i][2];
        d->g[i] = bench_gemm_bf16(blas, size[i][0], size[i][1], size[i][2]);
        if (m * k > a) a = m * k;
        if (n * k > b) b = n * k;
        if (m * n > c) c = m * n;
    }
    d->a = bench_random(a, MOE_BF16, 1.0f, 21);
    d->b = bench_random(b, MOE_BF16, 0.02f, 22);
    d->c = bench_alloc((size_t)c * 2);
    for (int i = 0; i < DENSE_PRODUCTS; ++i) {
        d->g[i].a = d->a, d->g[i].b = d->b, d->g[i].c = d->c;
        bench_gemm_choose(s, &d->g[i]);
    }
}

static void close_dense(dense_step* d)
{
    for (int i = 0; i < DENSE_PRODUCTS; ++i) bench_gemm_free(&d->g[i]);
    cudaFree(d->a), cudaFree(d->b), cudaFree(d->c);
}

/* ---- one form ---- */

typedef struct form_run {
    moe_block_layer_desc d;
    moe_block_layer_bytes bytes;
    void* all[32]; /* its allocations */
    size_t size[32];
    int count;
    double asked, measured; /* bytes of an iteration: allocated, and from cudaMemGetInfo */
    double ms[2];           /* forward, backward */
    double dense_ms[2];     /* of cuBLAS, in turn with them */
} form_run;

static void* form_keep(form_run* f, void* p, size_t bytes)
{
    f->all[f->count] = p;
    f->size[f->count++] = bytes;
    f->asked += (double)bytes;
    return p;
}

static void* form_alloc(form_run* f, size_t bytes)
{
    return form_keep(f, bench_alloc(bytes), bytes);
}

static void* form_random(form_run* f, int64_t count, int dtype, float scale, uint32_t seed)
{
    return form_keep(f, bench_random(count, dtype, scale, seed),
                     (size_t)count * (size_t)moe_dtype_bytes(dtype));
}

static void run_forward(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_block_layer_forward(&((form_run*)context)->d, stream));
}

static void run_backward(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_block_layer_backward(&((form_run*)context)->d, stream));
}

/* Allocates ids and weights [T, K]: of a top-K gate, or of one choice for the whole batch. */
static void route_tokens(bench_state* s, form_run* f, const shape* p, int whole_batch)
{
    const size_t slots = (size_t)p->T * (size_t)p->K;
    moe_gate_desc g;
    memset(&g, 0, sizeof g);
    g.ids = (int32_t*)form_alloc(f, slots * 4);
    g.weights = (float*)form_alloc(f, slots * 4);
    g.logits = bench_random((int64_t)p->T * p->E, MOE_FP32, 1.0f, 9);
    g.num_tokens = p->T, g.num_experts = p->E, g.top_k = p->K;
    g.renormalize = 1;
    g.whole_batch = whole_batch;
    BENCH_MOE(moe_gate_workspace(&g, &g.workspace_bytes));
    g.workspace = g.workspace_bytes ? bench_alloc(g.workspace_bytes) : (void*)0;
    BENCH_MOE(moe_gate(&g, s->stream));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    cudaFree((void*)g.logits);
    if (g.workspace) cudaFree(g.workspace);
    f->d.ids = g.ids;
    f->d.weights = g.weights;
}

/* ---- verification: single tokens, and single rows of w1 with columns of w2, in double ---- */

typedef struct check_args {
    moe_block_layer_desc d;
    double* scratch; /* tokens: [blocks, choices, 4, I]; columns: [4, T] */
    int choices;     /* of a token: K, dense: E */
    int step;        /* tokens between two checked ones */
    int e, i, gradient; /* columns: expert, its column, index of its gradient in dw1 and dw2 */
    unsigned* worst; /* largest error over its bound */
} check_args;

/* Computes f, and its derivatives by gate (or the one number) and up. */
MOE_DEVICE void curve(int activation, double v, double up, double* f, double* by_v, double* by_up)
{
    if (activation == MOE_ACTIVATION_SWIGLU) {
        const double s = 1.0 / (1.0 + exp(-v));
        *f = v * s * up;
        *by_v = s * (1.0 + v * (1.0 - s)) * up;
        *by_up = v * s;
    } else { /* GELU */
        const double s = 0.5 * erfc(-v * 0.70710678118654752);
        *f = v * s;
        *by_v = s + v * exp(-0.5 * v * v) * 0.39894228040143268;
        *by_up = 0.0;
    }
}

/* Compares one element. The bound grows with the root of the sum of the terms' squares, as rounding
   errors of random sign do. */
MOE_DEVICE void check_one(unsigned* worst, double got, double want, double squares)
{
    const float ratio = (float)(fabs(got - want) / (0.05 * sqrt(squares) + 1e-12));
    atomicMax(worst, ratio <= 1e30f ? __float_as_uint(ratio) : 0x7f800000u);
}

MOE_DEVICE int choice(const check_args* a, int64_t t, int k, double* weight)
{
    *weight = a->d.weights[t * a->choices + k];
    return a->d.ids ? a->d.ids[t * a->choices + k] : k;
}

MOE_DEVICE double w1_at(const moe_block_layer_desc* d, int64_t row, int64_t h)
{
    return moe_load_f32(d->w1.base, row * d->hidden + h, MOE_BF16);
}

MOE_DEVICE double w2_at(const moe_block_layer_desc* d, int e, int64_t h, int64_t i)
{
    return moe_load_f32(d->w2.base, ((int64_t)e * d->hidden + h) * d->intermediate + i, MOE_BF16);
}

/* Checks y, dx and dweights of token blockIdx.x * step. */
MOE_KERNEL(256, 1) check_tokens(MOE_ARG(check_args) a)
{
    const moe_block_layer_desc* d = &a.d;
    const int64_t t = (int64_t)blockIdx.x * a.step, H = d->hidden, I = d->intermediate;
    const bool g = moe_activation_is_gated(d->activation);
    double* own = a.scratch + (int64_t)blockIdx.x * a.choices * 4 * I;
    for (int64_t at = threadIdx.x; at < a.choices * I; at += 256) {
        const int k = (int)(at / I);
        const int64_t i = at % I;
        double w, v = 0.0, up = 0.0, da = 0.0, f, by_v, by_up;
        const int e = choice(&a, t, k, &w);
        const int64_t row = e * (g ? 2 * I : I) + i;
        for (int64_t h = 0; h < H; ++h) {
            const double x = moe_load_f32(d->x, t * H + h, MOE_BF16);
            v += x * w1_at(d, row, h);
            if (g) up += x * w1_at(d, row + I, h);
            da += moe_load_f32(d->dy, t * H + h, MOE_BF16) * w2_at(d, e, h, i);
        }
        curve(d->activation, v, up, &f, &by_v, &by_up);
        own[(k * 4 + 0) * I + i] = w * f;
        own[(k * 4 + 1) * I + i] = w * da * by_v;
        own[(k * 4 + 2) * I + i] = w * da * by_up;
        own[(k * 4 + 3) * I + i] = da * f;
    }
    __syncthreads();
    for (int64_t h = threadIdx.x; h < H; h += 256) {
        double y = 0.0, dx = 0.0, y_squares = 0.0, dx_squares = 0.0, w;
        for (int k = 0; k < a.choices; ++k) {
            const int e = choice(&a, t, k, &w);
            for (int64_t i = 0; i < I; ++i) {
                const int64_t row = e * (g ? 2 * I : I) + i;
                const double p = own[(k * 4 + 0) * I + i] * w2_at(d, e, h, i);
                const double q = own[(k * 4 + 1) * I + i] * w1_at(d, row, h);
                const double r = g ? own[(k * 4 + 2) * I + i] * w1_at(d, row + I, h) : 0.0;
                y += p;
                y_squares += p * p;
                dx += q + r;
                dx_squares += q * q + r * r;
            }
        }
        check_one(a.worst, moe_load_f32(d->y, t * H + h, MOE_BF16), y, y_squares);
        check_one(a.worst, moe_load_f32(d->dx, t * H + h, MOE_BF16), dx, dx_squares);
    }
    for (int k = threadIdx.x; k < a.choices; k += 256) {
        double sum = 0.0, squares = 0.0;
        for (int64_t i = 0; i < I; ++i) {
            const double p = own[(k * 4 + 3) * I + i];
            sum += p;
            squares += p * p;
        }
        check_one(a.worst, d->dweights[t * a.choices + k], sum, squares);
    }
}

/* Computes act and the gradients by gate and up of every token at column i of expert e. */
MOE_KERNEL(256, 1) check_column(MOE_ARG(check_args) a)
{
    const moe_block_layer_desc* d = &a.d;
    const int64_t t = (int64_t)blockIdx.x * 256 + threadIdx.x, H = d->hidden, I = d->intermediate;
    const bool g = moe_activation_is_gated(d->activation);
    const int64_t row = a.e * (g ? 2 * I : I) + a.i;
    double w, weight = 0.0, v = 0.0, up = 0.0, da = 0.0, f, by_v, by_up;
    if (t >= d->num_tokens) return;
    for (int k = 0; k < a.choices; ++k)
        if (choice(&a, t, k, &w) == a.e) weight += w;
    if (weight != 0.0)
        for (int64_t h = 0; h < H; ++h) {
            const double x = moe_load_f32(d->x, t * H + h, MOE_BF16);
            v += x * w1_at(d, row, h);
            if (g) up += x * w1_at(d, row + I, h);
            da += moe_load_f32(d->dy, t * H + h, MOE_BF16) * w2_at(d, a.e, h, a.i);
        }
    curve(d->activation, v, up, &f, &by_v, &by_up);
    a.scratch[t] = weight * f;
    a.scratch[d->num_tokens + t] = weight * da * by_v;
    a.scratch[2 * (int64_t)d->num_tokens + t] = weight * da * by_up;
}

/* Checks the gradients of that column of w2 and of its one or two rows of w1. */
MOE_KERNEL(256, 1) check_grads(MOE_ARG(check_args) a)
{
    const moe_block_layer_desc* d = &a.d;
    const int64_t h = (int64_t)blockIdx.x * 256 + threadIdx.x, H = d->hidden, I = d->intermediate;
    const int64_t T = d->num_tokens;
    const bool g = moe_activation_is_gated(d->activation);
    const int64_t row = a.gradient * (g ? 2 * I : I) + a.i;
    double sum[3] = {0.0, 0.0, 0.0}, squares[3] = {0.0, 0.0, 0.0};
    if (h >= H) return;
    for (int64_t t = 0; t < T; ++t) {
        const double x = moe_load_f32(d->x, t * H + h, MOE_BF16);
        const double p[3] = {a.scratch[t] * moe_load_f32(d->dy, t * H + h, MOE_BF16),
                             a.scratch[T + t] * x, a.scratch[2 * T + t] * x};
        MOE_UNROLL
        for (int j = 0; j < 3; ++j) {
            sum[j] += p[j];
            squares[j] += p[j] * p[j];
        }
    }
    check_one(a.worst, moe_load_f32(d->dw2, (a.gradient * H + h) * I + a.i, MOE_BF16), sum[0],
              squares[0]);
    check_one(a.worst, moe_load_f32(d->dw1, row * H + h, MOE_BF16), sum[1], squares[1]);
    if (g)
        check_one(a.worst, moe_load_f32(d->dw1, (row + I) * H + h, MOE_BF16), sum[2], squares[2]);
}

/* Returns the largest error of an iteration over its bound; *active gets the number of experts with
   gradients. */
static float verify(bench_state* s, form_run* f, int* active)
{
    enum { TOKENS = 24, COLUMNS = 6 };
    const moe_block_layer_desc* d = &f->d;
    const int choices = d->ids ? d->top_k : d->num_experts, gradients = d->max_experts;
    const size_t by_token = (size_t)TOKENS * (size_t)choices * 4 * (size_t)d->intermediate;
    const size_t by_column = 3 * (size_t)d->num_tokens;
    int32_t* grad_expert = (int32_t*)malloc((size_t)gradients * 4);
    unsigned worst = 0;
    check_args a;
    moe_launch_config c;
    memset(&a, 0, sizeof a);
    a.d = *d;
    a.choices = choices;
    a.step = (d->num_tokens - 1) / (TOKENS - 1);
    a.scratch = (double*)bench_alloc((by_token > by_column ? by_token : by_column) * 8);
    a.worst = (unsigned*)bench_alloc(4);
    BENCH_CUDA(cudaMemsetAsync(a.worst, 0, 4, s->stream));
    c = moe_grid(TOKENS, 256, 0, s->stream);
    BENCH_MOE(MOE_LAUNCH(check_tokens, c, a));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(
        cudaMemcpy(grad_expert, d->grad_expert, (size_t)gradients * 4, cudaMemcpyDeviceToHost));
    *active = 0;
    while (*active < gradients && grad_expert[*active] >= 0) ++*active;
    for (int i = 0; i < COLUMNS && *active > 0; ++i) {
        a.gradient = (int)((int64_t)i * (*active - 1) / (COLUMNS - 1));
        a.e = grad_expert[a.gradient];
        a.i = (int)((int64_t)(i * 7919 + 13) % d->intermediate);
        c = moe_grid((d->num_tokens + 255) / 256, 256, 0, s->stream);
        BENCH_MOE(MOE_LAUNCH(check_column, c, a));
        c = moe_grid((d->hidden + 255) / 256, 256, 0, s->stream);
        BENCH_MOE(MOE_LAUNCH(check_grads, c, a));
    }
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemcpy(&worst, a.worst, 4, cudaMemcpyDeviceToHost));
    cudaFree(a.scratch), cudaFree(a.worst);
    free(grad_expert);
    return *active > 0 ? moe_f32_from_bits(worst) : INFINITY;
}

static const char* form_name(int form)
{
    return form == MOE_BLOCK_LAYER_DENSE    ? "dense"
           : form == MOE_BLOCK_LAYER_SPARSE ? "sparse"
                                            : "batch";
}

/* Allocates the buffers of one form's iteration, runs it poisoned, verifies it, times it in turn
   with dense. */
static form_run run_form(bench_state* s, const shape* p, int form, dense_step* dense, int* failures)
{
    const int64_t T = p->T, H = p->H, I = p->I, U = gated(p) ? 2 * I : I;
    const size_t row_bytes = (size_t)(T * H) * 2;
    moe_block_layer_desc* d;
    size_t before, after, total, workspace;
    bench_call call[2 + DENSE_PRODUCTS];
    form_run f;
    int active;
    float worst;
    memset(&f, 0, sizeof f);
    d = &f.d;
    BENCH_CUDA(cudaDeviceSynchronize());
    BENCH_CUDA(cudaMemGetInfo(&before, &total));
    d->form = form;
    d->num_tokens = p->T, d->hidden = p->H, d->intermediate = p->I, d->num_experts = p->E;
    d->block = p->block;
    d->activation = p->activation;
    d->max_experts = form == MOE_BLOCK_LAYER_BATCH ? p->K : p->E;
    if (form == MOE_BLOCK_LAYER_DENSE) {
        d->weights = (const float*)form_random(&f, T * p->E, MOE_FP32, 0.25f, 8);
    } else {
        d->top_k = p->K;
        route_tokens(s, &f, p, form == MOE_BLOCK_LAYER_BATCH);
    }
    d->x = form_random(&f, T * H, MOE_BF16, 1.0f, 1);
    d->dy = form_random(&f, T * H, MOE_BF16, 1.0f, 2);
    d->w1.base = form_random(&f, p->E * U * H, MOE_BF16, 1.0f / sqrtf((float)H), 3);
    d->w2.base = form_random(&f, p->E * H * I, MOE_BF16, 1.0f / sqrtf((float)I), 4);
    d->y = form_alloc(&f, row_bytes);
    d->dx = form_alloc(&f, row_bytes);
    d->dw1 = form_alloc(&f, (size_t)(d->max_experts * U * H) * 2);
    d->dw2 = form_alloc(&f, (size_t)(d->max_experts * H * I) * 2);
    d->grad_expert = (int32_t*)form_alloc(&f, (size_t)d->max_experts * 4);
    d->dweights = (float*)form_alloc(&f, (size_t)T * (size_t)(d->top_k ? d->top_k : p->E) * 4);
    BENCH_MOE(moe_block_layer_sizes(d, &f.bytes));
    workspace = f.bytes.forward > f.bytes.backward ? f.bytes.forward : f.bytes.backward;
    d->saved = form_alloc(&f, f.bytes.saved);
    d->saved_bytes = f.bytes.saved;
    d->workspace = form_alloc(&f, workspace);
    d->workspace_bytes = workspace;
    d->fault = (uint64_t*)form_alloc(&f, 8);
    BENCH_CUDA(cudaMemset(d->fault, 0, 8));
    {
        void* out[] = {d->y,           d->dx,       d->dw1,   d->dw2,
                       d->grad_expert, d->dweights, d->saved, d->workspace};
        for (size_t i = 0; i < sizeof out / sizeof out[0]; ++i)
            for (int j = 0; j < f.count; ++j)
                if (f.all[j] == out[i]) BENCH_CUDA(cudaMemset(out[i], 0xff, f.size[j]));
    }
    run_forward(&f, s->stream);
    run_backward(&f, s->stream);
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemGetInfo(&after, &total));
    f.measured = (double)before - (double)after;
    worst = verify(s, &f, &active);
    *failures += !(worst <= 1.0f);
    {
        uint64_t word;
        BENCH_CUDA(cudaMemcpy(&word, d->fault, 8, cudaMemcpyDeviceToHost));
        *failures += word != 0;
    }
    printf("  %s: worst error %.2f of its bound, %d experts at work; saved %.1f, scratch %.1f MB\n",
           form_name(form), worst, active, (double)f.bytes.saved * 1e-6, (double)workspace * 1e-6);
    d->act_grad = bench_alloc(f.bytes.act_grad); /* so that backward can be repeated */
    call[0] = bench_one(run_forward, &f);
    call[1] = bench_one(run_backward, &f);
    for (int i = 0; i < DENSE_PRODUCTS; ++i) call[2 + i] = bench_one(bench_run_gemm, &dense->g[i]);
    bench_alternate(s, call, 2 + DENSE_PRODUCTS);
    f.ms[0] = call[0].ms, f.ms[1] = call[1].ms;
    for (int i = 0; i < DENSE_PRODUCTS; ++i) f.dense_ms[i >= DENSE_FORWARD] += call[2 + i].ms;
    if (p->timed) bench_note_clocks(s, run_backward, &f, f.ms[1]);
    cudaFree(d->act_grad);
    for (int i = 0; i < f.count; ++i) cudaFree(f.all[i]);
    return f;
}

static void run_shape(bench_state* s, const bench_blas* blas, const shape* p, int* failures)
{
    static const int forms[] = {MOE_BLOCK_LAYER_DENSE, MOE_BLOCK_LAYER_SPARSE,
                                MOE_BLOCK_LAYER_BATCH};
    const int EI = p->E * p->I, EU = gated(p) ? 2 * EI : EI;
    const double flops = 2.0 * (double)p->T * p->H * ((double)EI + EU); /* forward, dense */
    dense_step dense;
    form_run f[3];
    printf("T %d H %d I %d E %d K %d, %s, sparse blocks of %d\n", p->T, p->H, p->I, p->E, p->K,
           gated(p) ? "SwiGLU" : "GELU", p->block);
    open_dense(s, blas, p, &dense);
    for (int i = 0; i < 3; ++i) f[i] = run_form(s, p, forms[i], &dense, failures);
    close_dense(&dense);
    for (int back = 0; back < 2; ++back)
        for (int i = 0; i < 3; ++i) {
            const double part = i == 0 ? 1.0 : (double)p->K / p->E, all = flops * (1 + back);
            char what[96];
            snprintf(what, sizeof what, "%s %s T %d H %d I %d E %d K %d", form_name(forms[i]),
                     back ? "backward" : "forward", p->T, p->H, p->I, p->E, p->K);
            bench_row_dense(s, what, f[i].ms[back], part * all, part * f[i].dense_ms[back]);
            snprintf(what, sizeof what, "  cuBLAS dense %s in turn", back ? "backward" : "forward");
            bench_row_dense(s, what, f[i].dense_ms[back], all, f[i].dense_ms[back]);
        }
    for (int i = 0; i < 3; ++i) {
        printf("  %s: a step takes %.1f MB, measured %.1f MB: %.3f and %.3f of dense\n",
               form_name(forms[i]), f[i].asked * 1e-6, f[i].measured * 1e-6,
               f[i].asked / f[0].asked, f[i].measured / f[0].measured);
        if (s->csv)
            fprintf(s->csv,
                    "\"%s memory T %d H %d I %d E %d K %d\",0,%.3f,MB,%.4f,\"dense form\"\n",
                    form_name(forms[i]), p->T, p->H, p->I, p->E, p->K, f[i].asked * 1e-6,
                    f[i].asked / f[0].asked);
    }
}

int main(int argc, char** argv)
{
    static const shape shapes[] = {
        {8192, 1024, 2048, 16, 4, 128, MOE_ACTIVATION_SWIGLU, 1},
        {16384, 2048, 4096, 16, 4, 128, MOE_ACTIVATION_SWIGLU, 1},
        {1024, 128, 512, 16, 4, 32, MOE_ACTIVATION_GELU, 0}, /* tens of MB, as of small models */
    };
    bench_state s = bench_open(argc, argv, "block-sparse layer forms, bf16");
    bench_blas blas = bench_blas_open(&s, 0);
    int failures = 0;
    BENCH_MOE(moe_block_layer_preload());
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; ++i)
        run_shape(&s, &blas, &shapes[i], &failures);
    bench_blas_close(&blas);
    return bench_close(&s, failures);
}
