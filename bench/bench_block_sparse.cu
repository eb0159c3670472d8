/* Block-sparse products compared with cuBLAS dense: sdd, dsd, dds, each forward, dA and dB, over
   kinds of mask and densities.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_block_sparse.cu -lcublas -lcublasLt -o bench_block_sparse

     --size N      m = n = k, a multiple of 8; 8192
     --quick       densities 0.1, 0.25 and 0.5, no diagonal-128, fewer repetitions
     --only NAME   one kind of mask, as random-128 or diagonal-32
     --mask FORM   bytes (default), bits or list
     --tune        each row by the tile that moe_block_sparse_tune chooses
     --tiles       each row also by every tile
     --reps N, --csv FILE

   Masks: random      as many sparse blocks as the density says, at random positions
          diagonal    a block-diagonal of 1 / density experts, with uneven rows as from routing;
                      every border is a multiple of 128
          batch       whole groups of 128 columns: experts that one choice gave to all rows

   d is the share of sparse blocks kept. A ratio is a time over that of cuBLAS dense of the same
   size with untransposed operands. The second ratio is to cuBLAS with the transposes of the row. A
   row's product and cuBLAS's run in turn. TFLOPS count the sparse blocks kept.

   Verified first: every element of small ragged products, then 8192 elements of each row's product,
   against sums in double. Masked-out sparse blocks of operands hold NaN throughout. C is poisoned,
   and masked-out sparse blocks of a sparse C must keep the poison. Every list built on the device
   is compared with the host's. */
#include "bench_blas.h"

#include "../moe/block_sparse.cuh"
#include "../moe/block_sparse/list.cuh"

enum { RANDOM, DIAGONAL, BATCH };
enum { FORM_BYTES, FORM_BITS, FORM_LIST };
enum { NN, NT, TN, NUM_TRANSPOSES };

static const char* const transpose_name[] = {"NN", "NT", "TN"};

/* One kind of mask. */
typedef struct kind {
    const char* name;
    int block; /* side of a sparse block: 32, 64 or 128 */
    int shape; /* RANDOM, DIAGONAL or BATCH */
    int quick; /* 1: --quick runs it; 0: it does not */
} kind;

static const kind kinds[] = {
    {"random", 128, RANDOM, 1},     {"random", 64, RANDOM, 1},     {"random", 32, RANDOM, 1},
    {"diagonal", 128, DIAGONAL, 0}, {"diagonal", 32, DIAGONAL, 1}, {"batch", 32, BATCH, 1},
};
enum { NUM_KINDS = sizeof kinds / sizeof kinds[0] };

static const double densities[] = {0.05, 0.1, 0.25, 0.5, 0.75, 1.0};
enum { NUM_DENSITIES = sizeof densities / sizeof densities[0] };

/* One row: a forward product or a gradient of it, and the call that computes it. For the forward
   product C [m, n] = A [m, k] B [k, n], dA is [m, k] and dB [k, n]. */
typedef struct pass {
    const char *product, *name;
    int op, transposes;
} pass;

static const pass passes[] = {
    {"sdd", "forward", MOE_BLOCK_SPARSE_SDD, NN}, {"sdd", "dA", MOE_BLOCK_SPARSE_DSD, NT},
    {"sdd", "dB", MOE_BLOCK_SPARSE_DDS, TN},      {"dsd", "forward", MOE_BLOCK_SPARSE_DSD, NN},
    {"dsd", "dA", MOE_BLOCK_SPARSE_SDD, NT},      {"dsd", "dB", MOE_BLOCK_SPARSE_DSD, TN},
    {"dds", "forward", MOE_BLOCK_SPARSE_DDS, NN}, {"dds", "dA", MOE_BLOCK_SPARSE_DDS, NT},
    {"dds", "dB", MOE_BLOCK_SPARSE_SDD, TN},
};
enum { NUM_PASSES = sizeof passes / sizeof passes[0] };

typedef struct tile {
    const char* name;
    int value;
} tile;

static const tile tiles[] = {
    {"128x256", MOE_BLOCK_SPARSE_TILE_128x256},
    {"64x256", MOE_BLOCK_SPARSE_TILE_64x256},
    {"32x256", MOE_BLOCK_SPARSE_TILE_32x256},
    {"64x64", MOE_BLOCK_SPARSE_TILE_64x64},
};
enum { NUM_TILES = sizeof tiles / sizeof tiles[0] };

typedef struct options {
    int size, quick, form, tune, tiles;
    const char* only;
    FILE* csv;
} options;

static const char* op_name(int op)
{
    return op == MOE_BLOCK_SPARSE_SDD ? "sdd" : op == MOE_BLOCK_SPARSE_DSD ? "dsd" : "dds";
}

/* Returns the name of a choice: tile, or tile+fallback tile. */
static const char* tile_name(const moe_block_sparse_choice* c)
{
    static char name[24];
    const char *tile = "auto", *fallback = 0;
    for (int i = 0; i < NUM_TILES; ++i) {
        if (tiles[i].value == c->tile) tile = tiles[i].name;
        if (tiles[i].value == c->fallback_tile) fallback = tiles[i].name;
    }
    snprintf(name, sizeof name, "%s%s%s", tile, fallback ? "+" : "", fallback ? fallback : "");
    return name;
}

/* ---- masks ---- */

typedef struct mask {
    moe_block_sparse_mask m; /* in the form asked for */
    const uint8_t* bytes;  /* on the device, read by the checks */
    moe_block_sparse_list_desc l; /* builds its list */
    uint8_t* host;
    int RB, CB, blocks;
    double kept; /* share of the sparse blocks */
} mask;

typedef struct ranked {
    uint32_t hash;
    int index;
} ranked;

static int compare_ranked(const void* a, const void* b)
{
    const ranked *x = (const ranked*)a, *y = (const ranked*)b;
    if (x->hash != y->hash) return x->hash < y->hash ? -1 : 1;
    return (x->index > y->index) - (x->index < y->index);
}

/* Marks `count` of n entries, those of the smallest hashes. */
static void choose(uint8_t* chosen, int n, int count, uint32_t seed)
{
    ranked* r = (ranked*)malloc((size_t)n * sizeof(ranked));
    for (int i = 0; i < n; ++i) r[i].hash = bench_hash((uint32_t)i, seed), r[i].index = i;
    qsort(r, (size_t)n, sizeof *r, compare_ranked);
    memset(chosen, 0, (size_t)n);
    for (int i = 0; i < count; ++i) chosen[r[i].index] = 1;
    free(r);
}

/* Returns the experts of a block-diagonal: as many as bring the density nearest, at most one to 128
   rows. */
static int diagonal_experts(double density, int most)
{
    const int n = (int)(1.0 / density + 0.5);
    return n < most ? n : most;
}

/* Writes a mask to `to`. bench/compare/block_sparse_triton.py makes the same masks. */
static void fill_mask(uint8_t* to, const kind* d, double density, int rows, int columns)
{
    const int RB = moe_block_sparse_count(rows, d->block),
              CB = moe_block_sparse_count(columns, d->block);
    /* groups of 128 rows, of 128 columns */
    const int row_groups = moe_block_sparse_count(rows, 128),
              column_groups = moe_block_sparse_count(columns, 128);
    const int each = 128 / d->block; /* sparse blocks in 128 rows or columns */
    const uint32_t seed =
        (uint32_t)(d->shape * 100000 + d->block * 100) + (uint32_t)(density * 100 + 0.5);
    memset(to, 0, (size_t)RB * (size_t)CB);
    if (d->shape == RANDOM) {
        int count = (int)(density * RB * CB + 0.5);
        choose(to, RB * CB, count > 1 ? count : 1, seed);
    } else if (d->shape == BATCH) {
        uint8_t* chosen = (uint8_t*)malloc((size_t)column_groups);
        int count = (int)(density * column_groups + 0.5);
        choose(chosen, column_groups, count > 1 ? count : 1, seed);
        for (int i = 0; i < RB; ++i)
            for (int j = 0; j < CB; ++j) to[(int64_t)i * CB + j] = chosen[j / each];
        free(chosen);
    } else {
        const int least = row_groups < column_groups ? row_groups : column_groups;
        const int experts = diagonal_experts(density, least);
        int64_t total = 0, sum = 0;
        int row = 0, column = 0; /* groups */
        for (int e = 0; e < experts; ++e) total += 1024 + (bench_hash((uint32_t)e, seed) & 1023u);
        for (int e = 0; e < experts; ++e) {
            const int left = experts - 1 - e;
            const int column_end = ((e + 1) * column_groups + experts / 2) / experts;
            int row_end;
            sum += 1024 + (bench_hash((uint32_t)e, seed) & 1023u);
            row_end = (int)((sum * row_groups + total / 2) / total);
            if (row_end < row + 1) row_end = row + 1;
            if (row_end > row_groups - left) row_end = row_groups - left;
            for (int i = row * each; i < row_end * each && i < RB; ++i)
                for (int j = column * each; j < column_end * each && j < CB; ++j)
                    to[(int64_t)i * CB + j] = 1;
            row = row_end, column = column_end;
        }
    }
}

static void* upload(const void* from, size_t bytes)
{
    void* p = bench_alloc(bytes);
    BENCH_CUDA(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice));
    return p;
}

static int32_t* download(const void* from, int count)
{
    int32_t* p = (int32_t*)malloc((size_t)count * 4 + 4);
    BENCH_CUDA(cudaMemcpy(p, from, (size_t)count * 4, cudaMemcpyDeviceToHost));
    return p;
}

/* Returns 0 where the list on the device is the list of the mask. */
static int list_differs(const mask* k)
{
    const moe_block_sparse_list_desc* l = &k->l;
    int32_t *row_offset = download(l->row_offset, k->RB + 1),
            *column_index = download(l->column_index, k->blocks),
            *column_offset = download(l->column_offset, k->CB + 1),
            *row_index = download(l->row_index, k->blocks),
            *position = download(l->position, k->blocks);
    int32_t* number = (int32_t*)malloc((size_t)k->RB * (size_t)k->CB * 4); /* in row order */
    int bad = 0, p = 0;
    for (int i = 0; i < k->RB; ++i) {
        bad += row_offset[i] != p;
        for (int j = 0; j < k->CB; ++j)
            if (k->host[i * k->CB + j]) {
                number[i * k->CB + j] = p;
                bad += column_index[p++] != j;
            }
    }
    bad += row_offset[k->RB] != p;
    p = 0;
    for (int j = 0; j < k->CB; ++j) {
        bad += column_offset[j] != p;
        for (int i = 0; i < k->RB; ++i)
            if (k->host[i * k->CB + j]) {
                bad += row_index[p] != i || position[p] != number[i * k->CB + j];
                ++p;
            }
    }
    bad += column_offset[k->CB] != p;
    free(row_offset), free(column_index), free(column_offset), free(row_index), free(position);
    free(number);
    return bad;
}

static mask make_mask(const kind* d, double density, int rows, int columns, int form, int* failures)
{
    mask k;
    uint32_t* bits;
    int words;
    memset(&k, 0, sizeof k);
    k.RB = moe_block_sparse_count(rows, d->block), k.CB = moe_block_sparse_count(columns, d->block);
    words = (k.CB + 31) / 32;
    k.host = (uint8_t*)malloc((size_t)k.RB * (size_t)k.CB);
    fill_mask(k.host, d, density, rows, columns);
    bits = (uint32_t*)calloc((size_t)k.RB * (size_t)words, 4);
    for (int i = 0; i < k.RB; ++i)
        for (int j = 0; j < k.CB; ++j)
            if (k.host[i * k.CB + j]) bits[i * words + j / 32] |= 1u << (j & 31), ++k.blocks;
    k.kept = (double)k.blocks / ((double)k.RB * k.CB);
    k.bytes = (const uint8_t*)upload(k.host, (size_t)k.RB * (size_t)k.CB);
    k.m.rows = rows, k.m.columns = columns;
    k.m.block_rows = k.m.block_columns = d->block;

    k.l.bytes = k.bytes;
    k.l.rows = rows, k.l.columns = columns;
    k.l.block_rows = k.l.block_columns = d->block;
    k.l.max_blocks = k.blocks;
    k.l.row_offset = (int32_t*)bench_alloc((size_t)k.RB * 4 + 4);
    k.l.column_offset = (int32_t*)bench_alloc((size_t)k.CB * 4 + 4);
    k.l.column_index = (int32_t*)bench_alloc((size_t)k.blocks * 4);
    k.l.row_index = (int32_t*)bench_alloc((size_t)k.blocks * 4);
    k.l.position = (int32_t*)bench_alloc((size_t)k.blocks * 4);
    BENCH_MOE(moe_block_sparse_list_workspace(&k.l, &k.l.workspace_bytes));
    k.l.workspace = bench_alloc(k.l.workspace_bytes);
    BENCH_MOE(moe_block_sparse_list_build(&k.l, 0));
    BENCH_CUDA(cudaDeviceSynchronize());
    if (list_differs(&k)) {
        printf("the list of %s-%d at density %g is wrong\n", d->name, d->block, density);
        ++*failures;
    }

    if (form == FORM_BYTES) k.m.bytes = k.bytes;
    if (form == FORM_BITS)
        k.m.bits = (const uint32_t*)upload(bits, (size_t)k.RB * (size_t)words * 4);
    if (form == FORM_LIST) {
        k.m.row_offset = k.l.row_offset, k.m.column_index = k.l.column_index;
        k.m.column_offset = k.l.column_offset, k.m.row_index = k.l.row_index;
        k.m.max_blocks = k.blocks;
    }
    free(bits);
    return k;
}

static void free_mask(mask* k)
{
    free(k->host);
    cudaFree((void*)k->bytes), cudaFree((void*)k->m.bits), cudaFree(k->l.workspace);
    cudaFree(k->l.row_offset), cudaFree(k->l.column_index), cudaFree(k->l.column_offset);
    cudaFree(k->l.row_index), cudaFree(k->l.position);
}

/* ---- operands and checks ---- */

typedef struct operands {
    void *x, *y;  /* dense, random */
    void* sparse; /* x, but NaN in the masked-out sparse blocks */
    void* c;
    uint64_t* fault;
    void* workspace;
    size_t workspace_bytes;
} operands;

typedef struct poison_args {
    const uint16_t* from;
    uint16_t* to;
    const uint8_t* mask;
    int rows, columns, block, CB;
} poison_args;

MOE_KERNEL(256, 1) poison_masked(MOE_ARG(poison_args) a)
{
    const int64_t count = (int64_t)a.rows * a.columns;
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        const int r = (int)(i / a.columns), c = (int)(i % a.columns);
        const bool kept = a.mask[(int64_t)(r / a.block) * a.CB + c / a.block] != 0;
        a.to[i] = kept ? a.from[i] : (uint16_t)0xffff;
    }
}

static void poison_operand(const operands* o, const mask* k, cudaStream_t stream)
{
    poison_args a;
    moe_launch_config c = moe_grid(1320, 256, 0, stream);
    a.from = (const uint16_t*)o->x, a.to = (uint16_t*)o->sparse;
    a.mask = k->bytes;
    a.rows = k->m.rows, a.columns = k->m.columns, a.block = k->m.block_rows, a.CB = k->CB;
    BENCH_MOE(MOE_LAUNCH(poison_masked, c, a));
}

/* Each group of `lanes` threads checks elements of C: all of them in turn, or `samples` of them at
   random positions where samples is not 0. worst[0]: the largest error over its bound; worst[1]:
   elements compared. */
typedef struct check_args {
    const void *a, *b, *c;
    const uint8_t* mask;
    int op, m, n, k, a_transposed, b_transposed, block, CB;
    int samples, lanes; /* lanes: 1 or 32 */
    unsigned* worst;
} check_args;

MOE_KERNEL(256, 1) check_product(MOE_ARG(check_args) a)
{
    const int64_t count = a.samples ? a.samples : (int64_t)a.m * a.n;
    const int64_t step = (int64_t)gridDim.x * 256 / a.lanes;
    const int lane = (int)threadIdx.x % a.lanes;
    for (int64_t u = (blockIdx.x * 256ll + threadIdx.x) / a.lanes; u < count; u += step) {
        const int i =
            a.samples ? (int)(bench_hash((uint32_t)u, 71u) % (unsigned)a.m) : (int)(u / a.n);
        const int j =
            a.samples ? (int)(bench_hash((uint32_t)u, 72u) % (unsigned)a.n) : (int)(u % a.n);
        const uint16_t bits = ((const uint16_t*)a.c)[(int64_t)i * a.n + j];
        double want = 0.0, size = 0.0;
        float ratio;
        if (a.op == MOE_BLOCK_SPARSE_SDD && !a.mask[(int64_t)(i / a.block) * a.CB + j / a.block]) {
            if (lane == 0 && bits != 0xffffu) atomicMax(a.worst, 0x7f800000u); /* was written */
            continue;
        }
        for (int l = lane; l < a.k; l += a.lanes) {
            double p;
            if (a.op != MOE_BLOCK_SPARSE_SDD) {
                const int row = a.op == MOE_BLOCK_SPARSE_DSD ? i : l,
                          column = a.op == MOE_BLOCK_SPARSE_DSD ? l : j;
                const int over = a.op == MOE_BLOCK_SPARSE_DSD ? a.a_transposed : a.b_transposed;
                const int r = over ? column : row, c = over ? row : column;
                if (!a.mask[(int64_t)(r / a.block) * a.CB + c / a.block]) continue;
            }
            p = (double)moe_load_f32(
                    a.a, a.a_transposed ? (int64_t)l * a.m + i : (int64_t)i * a.k + l, MOE_BF16) *
                moe_load_f32(a.b, a.b_transposed ? (int64_t)j * a.k + l : (int64_t)l * a.n + j,
                             MOE_BF16);
            want += p;
            size += fabs(p);
        }
        for (int w = a.lanes / 2; w > 0; w >>= 1) {
            want += __shfl_xor_sync(MOE_FULL_WARP, want, w);
            size += __shfl_xor_sync(MOE_FULL_WARP, size, w);
        }
        if (lane) continue;
        ratio = (float)(fabs(moe_half_to_f32(bits, MOE_BF16) - want) /
                        (fabs(want) / 256.0 + (a.k / 16 + 2) * size / 8388608.0 + 1e-5));
        atomicMax(a.worst, ratio <= 1e30f ? __float_as_uint(ratio) : 0x7f800000u);
        atomicAdd(a.worst + 1, 1u);
    }
}

/* Returns 1 where C is right, with at least one element compared if the mask has a sparse block. */
static int check_c(bench_state* s, check_args* a, int blocks, const char* what, float* largest)
{
    unsigned worst[2] = {0, 0};
    float ratio;
    moe_launch_config l = moe_grid(1056, 256, 0, s->stream);
    BENCH_WORST(check_product, l, *a, worst);
    ratio = moe_f32_from_bits(worst[0]);
    if (ratio > *largest) *largest = ratio;
    if (ratio <= 1.0f && (worst[1] || !blocks)) return 1;
    printf("%s: %g of its bound, %u elements compared\n", what, ratio, worst[1]);
    return 0;
}

/* Returns the call of pass p of the forward product m, n, k. */
static moe_block_sparse_desc describe(const operands* o, const pass* p, const mask* k, int m, int n,
                                      int kk)
{
    moe_block_sparse_desc d;
    memset(&d, 0, sizeof d);
    d.op = p->op;
    d.a = p->op == MOE_BLOCK_SPARSE_DSD ? o->sparse : p->op == MOE_BLOCK_SPARSE_DDS ? o->y : o->x;
    d.b = p->op == MOE_BLOCK_SPARSE_DDS ? o->sparse : o->y;
    d.c = o->c;
    d.mask = k->m;
    d.fault = o->fault;
    d.a_transposed = p->transposes == TN;
    d.b_transposed = p->transposes == NT;
    d.m = p->transposes == TN ? kk : m;
    d.n = p->transposes == NT ? kk : n;
    d.k = p->transposes == NN ? kk : p->transposes == NT ? n : m;
    d.workspace = o->workspace;
    d.workspace_bytes = o->workspace_bytes;
    return d;
}

static void room_for(operands* o, moe_block_sparse_desc* d)
{
    size_t bytes;
    BENCH_MOE(moe_block_sparse_workspace(d, &bytes));
    if (bytes > o->workspace_bytes) {
        BENCH_CUDA(cudaDeviceSynchronize());
        cudaFree(o->workspace);
        o->workspace = bench_alloc(bytes);
        o->workspace_bytes = bytes;
    }
    d->workspace = o->workspace;
    d->workspace_bytes = o->workspace_bytes;
}

/* Runs and checks one call. samples: 0 = every element. */
static int verify(bench_state* s, const operands* o, const moe_block_sparse_desc* d, const mask* k,
                  int samples, const char* what, float* largest)
{
    check_args a;
    uint64_t fault;
    const size_t bytes = (size_t)d->m * (size_t)d->n * 2;
    memset(&a, 0, sizeof a);
    a.a = d->a, a.b = d->b, a.c = d->c;
    a.mask = k->bytes;
    a.op = d->op, a.m = d->m, a.n = d->n, a.k = d->k;
    a.a_transposed = d->a_transposed, a.b_transposed = d->b_transposed;
    a.block = k->m.block_rows, a.CB = k->CB;
    a.samples = samples, a.lanes = samples ? 32 : 1;
    BENCH_CUDA(cudaMemsetAsync(d->c, 0xff, bytes, s->stream));
    if (d->workspace_bytes)
        BENCH_CUDA(cudaMemsetAsync(d->workspace, 0xff, d->workspace_bytes, s->stream));
    BENCH_MOE(moe_block_sparse(d, s->stream));
    BENCH_CUDA(cudaStreamSynchronize(s->stream));
    BENCH_CUDA(cudaMemcpy(&fault, o->fault, 8, cudaMemcpyDeviceToHost));
    if (fault) {
        printf("%s: %s\n", what, moe_fault_text(moe_fault_decode(fault).code));
        BENCH_CUDA(cudaMemset(o->fault, 0, 8));
        return 0;
    }
    return check_c(s, &a, samples ? 0 : k->blocks, what, largest);
}

static operands make_operands(int64_t count)
{
    operands o;
    memset(&o, 0, sizeof o);
    o.x = bench_random(count, MOE_BF16, 1.0f, 31);
    o.y = bench_random(count, MOE_BF16, 1.0f / sqrtf(sqrtf((float)count)), 32);
    o.sparse = bench_alloc((size_t)count * 2);
    o.c = bench_alloc((size_t)count * 2);
    o.fault = (uint64_t*)bench_alloc(8);
    BENCH_CUDA(cudaMemset(o.fault, 0, 8));
    BENCH_CUDA(cudaDeviceSynchronize());
    return o;
}

static void free_operands(operands* o)
{
    cudaFree(o->x), cudaFree(o->y), cudaFree(o->sparse), cudaFree(o->c), cudaFree(o->fault);
    cudaFree(o->workspace);
}

static int is_wanted(const options* opt, const kind* d)
{
    char name[32];
    snprintf(name, sizeof name, "%s-%d", d->name, d->block);
    return !opt->only || !strcmp(opt->only, name);
}

/* Verifies every element of small products with ragged edges, by every tile. */
static void verify_small(bench_state* s, const options* opt, int* failures)
{
    const int base = opt->size < 512 ? opt->size : 512, m = base + 8, n = base + 136, k = base + 72;
    operands o = make_operands((int64_t)(base + 136) * (base + 136));
    float largest = 0.0f;
    int products = 0;
    for (int i = 0; i < NUM_KINDS; ++i) {
        if (!is_wanted(opt, &kinds[i])) continue;
        for (int p = 0; p < NUM_PASSES; ++p) {
            const char* product = passes[p].product;
            mask mk = make_mask(&kinds[i], 0.25, !strcmp(product, "dds") ? k : m,
                                !strcmp(product, "dsd") ? k : n, opt->form, failures);
            moe_block_sparse_desc d = describe(&o, &passes[p], &mk, m, n, k);
            poison_operand(&o, &mk, s->stream);
            room_for(&o, &d);
            for (int t = -1; t < NUM_TILES; ++t) { /* -1: the tile of the heuristic */
                char what[96];
                d.choice.tile = t < 0 ? 0 : tiles[t].value;
                if (t >= 0 && moe_status_kind(moe_block_sparse(&d, s->stream)) == MOE_ERR_DEVICE)
                    continue;
                snprintf(what, sizeof what, "small %s-%d, %s %s, tile %s", kinds[i].name,
                         kinds[i].block, product, passes[p].name, tile_name(&d.choice));
                *failures += !verify(s, &o, &d, &mk, 0, what, &largest);
                ++products;
            }
            free_mask(&mk);
        }
    }
    printf("%d small products, every element: worst error %.2f of its bound\n", products, largest);
    free_operands(&o);
}

/* ---- timing ---- */

static void run_product(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_block_sparse((const moe_block_sparse_desc*)context, stream));
}

static void run_list(void* context, cudaStream_t stream)
{
    BENCH_MOE(moe_block_sparse_list_build((const moe_block_sparse_list_desc*)context, stream));
}

/* One mask, and what its rows are compared with. */
typedef struct table {
    const options* opt;
    const kind* d;
    const mask* k;
    bench_gemm* dense; /* [NUM_TRANSPOSES] */
    double density;
} table;

/* dense: milliseconds of cuBLAS by transposes; those of NN and of p are set. */
static void csv_row(const table* t, const char* by, const pass* p, const char* tile_used, double ms,
                    const double* dense)
{
    const double n = t->k->m.rows, flops = 2.0 * n * n * n * t->k->kept;
    FILE* csv = t->opt->csv;
    if (!csv) return;
    fprintf(csv, "%s,%s,%d,%g,%.5f,%s,%s,%s,%s,%s,%.5f,%.5f,%.4f,%.5f,%.4f,", by, t->d->name,
            t->d->block, t->density, t->k->kept, p->product, p->name, op_name(p->op),
            transpose_name[p->transposes], tile_used, ms, dense[NN], ms / dense[NN],
            dense[p->transposes], ms / dense[p->transposes]);
    fprintf(csv, "%.1f\n", flops / ms * 1e-9);
}

/* Times one row: the product in turn with cuBLAS's NN, with cuBLAS's product of the same transposes
   and, with --tiles, with the product by every tile. */
static void run_row(bench_state* s, const table* t, const pass* p, moe_block_sparse_desc* job)
{
    const int n = t->opt->size, like = p->transposes;
    const double flops = 2.0 * n * (double)n * n;
    moe_block_sparse_desc by_tile[NUM_TILES];
    bench_call call[1 + NUM_TILES + 2]; /* the product, by tile, cuBLAS */
    double dense[NUM_TRANSPOSES], ms, best;
    int tile_of[NUM_TILES], count = 0;
    call[0] = bench_one(run_product, job);
    for (int i = 0; i < NUM_TILES && t->opt->tiles; ++i) {
        by_tile[count] = *job;
        by_tile[count].choice.tile = tiles[i].value;
        by_tile[count].choice.fallback_tile = 0;
        if (moe_status_kind(moe_block_sparse(&by_tile[count], s->stream)) == MOE_ERR_DEVICE)
            continue;
        tile_of[count] = i;
        call[1 + count] = bench_one(run_product, &by_tile[count]);
        ++count;
    }
    call[1 + count] = bench_one(bench_run_gemm, &t->dense[NN]);
    call[2 + count] = bench_one(bench_run_gemm, &t->dense[like]);
    bench_alternate(s, call, (like == NN ? 2 : 3) + count);
    ms = best = call[0].ms;
    dense[NN] = call[1 + count].ms;
    if (like != NN) dense[like] = call[2 + count].ms;
    printf("  %s %-7s  %s %s %-14s %9.4f ms %8.3f of cuBLAS, %6.3f of its %s %7.1f TFLOPS\n",
           p->product, p->name, op_name(p->op), transpose_name[like], tile_name(&job->choice), ms,
           ms / dense[NN], ms / dense[like], transpose_name[like], flops * t->k->kept / ms * 1e-9);
    csv_row(t, "moe", p, tile_name(&job->choice), ms, dense);
    for (int i = 0; i < count; ++i) {
        const char* name = tiles[tile_of[i]].name;
        if (call[1 + i].ms < best) best = call[1 + i].ms;
        printf("%s %s %.4f,", i ? "" : "     ", name, call[1 + i].ms);
        csv_row(t, "moe-tiles", p, name, call[1 + i].ms, dense);
    }
    if (count) printf(" %s %.3f of the best\n", t->opt->tune ? "tuned" : "auto", ms / best);
    fflush(stdout);
}

/* Runs the rows of t's mask, which is made here from t->d and t->density. */
static void run_mask(bench_state* s, table* t, operands* o, float* largest, int* failures)
{
    const int n = t->opt->size;
    const kind* d = t->d;
    mask k = make_mask(d, t->density, n, n, t->opt->form, failures);
    t->k = &k;
    printf("%s-%d, d %.4f, %d of %d sparse blocks\n", d->name, d->block, k.kept, k.blocks,
           k.RB * k.CB);
    poison_operand(o, &k, s->stream);
    for (int p = 0; p < NUM_PASSES; ++p) {
        moe_block_sparse_desc job = describe(o, &passes[p], &k, n, n, n);
        char what[96];
        room_for(o, &job);
        if (t->opt->tune) BENCH_MOE(moe_block_sparse_tune(&job, s->stream, &job.choice));
        snprintf(what, sizeof what, "%s-%d d %.4f %s %s", d->name, d->block, k.kept,
                 passes[p].product, passes[p].name);
        *failures += !verify(s, o, &job, &k, 8192, what, largest);
        run_row(s, t, &passes[p], &job);
    }
    free_mask(&k);
}

/* Times lists made from bytes: 256 x 256 sparse blocks, in a captured graph of 24 builds. */
static void time_list(bench_state* s, int* failures)
{
    enum { CALLS = 24 };
    static const kind lists[] = {
        {"random", 32, RANDOM, 1},
        {"diagonal", 32, DIAGONAL, 1},
        {"batch", 32, BATCH, 1},
    };
    for (int l = 0; l < 3; ++l) {
        mask k = make_mask(&lists[l], 0.1, 8192, 8192, FORM_BYTES, failures);
        void* context[CALLS];
        for (int i = 0; i < CALLS; ++i) context[i] = &k.l;
        printf("  list of %d x %d sparse blocks from bytes, %s, %d kept: %.2f us\n", k.RB, k.CB,
               lists[l].name, k.blocks, bench_time_graph(s, run_list, context, CALLS) * 1e3);
        BENCH_CUDA(cudaStreamSynchronize(s->stream));
        *failures += list_differs(&k) != 0;
        free_mask(&k);
    }
}

static void usage(const char* name)
{
    fprintf(stderr,
            "usage: %s [--size N] [--quick] [--only KIND-BLOCK] [--mask bytes|bits|list] "
            "[--tune] [--tiles] [--reps N] [--csv FILE]\n",
            name);
    exit(2);
}

int main(int argc, char** argv)
{
    options opt;
    bench_state s;
    bench_blas blas;
    bench_gemm dense[NUM_TRANSPOSES];
    bench_call call[NUM_TRANSPOSES];
    operands o;
    char reps[16] = "", reps_name[] = "--reps";
    char* args[] = {argv[0], reps_name, reps};
    float largest = 0.0f;
    int failures = 0, known = 0;
    memset(&opt, 0, sizeof opt);
    opt.size = 8192;
    for (int i = 1; i < argc; ++i) {
        const int value = i + 1 < argc;
        if (!strcmp(argv[i], "--quick")) opt.quick = 1;
        else if (!strcmp(argv[i], "--tune")) opt.tune = 1;
        else if (!strcmp(argv[i], "--tiles")) opt.tiles = 1;
        else if (!strcmp(argv[i], "--size") && value) opt.size = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--only") && value) opt.only = argv[++i];
        else if (!strcmp(argv[i], "--reps") && value) snprintf(reps, sizeof reps, "%s", argv[++i]);
        else if (!strcmp(argv[i], "--mask") && value) {
            ++i;
            if (!strcmp(argv[i], "bytes")) opt.form = FORM_BYTES;
            else if (!strcmp(argv[i], "bits")) opt.form = FORM_BITS;
            else if (!strcmp(argv[i], "list")) opt.form = FORM_LIST;
            else usage(argv[0]);
        } else if (!strcmp(argv[i], "--csv") && value) {
            opt.csv = fopen(argv[++i], "w");
            if (!opt.csv) fprintf(stderr, "cannot write %s\n", argv[i]), exit(1);
            fprintf(opt.csv,
                    "by,mask,block,density,kept,product,pass,call,transposes,tile,ms,dense_ms,"
                    "ratio,like_ms,like_ratio,tflops\n");
        } else usage(argv[0]);
    }
    for (int i = 0; i < NUM_KINDS; ++i) known += is_wanted(&opt, &kinds[i]);
    if (!known || opt.size < 8 || opt.size > 32768 || opt.size % 8) usage(argv[0]);
    if (!reps[0]) snprintf(reps, sizeof reps, opt.quick ? "7" : "11");
    s = bench_open(3, args, "block-sparse products, bf16");
    BENCH_MOE(moe_block_sparse_preload());

    verify_small(&s, &opt, &failures);
    o = make_operands((int64_t)opt.size * opt.size);
    blas = bench_blas_open(&s, 0);
    for (int t = 0; t < NUM_TRANSPOSES; ++t) {
        dense[t] = bench_gemm_bf16(&blas, opt.size, opt.size, opt.size);
        dense[t].a_transposed = t == TN, dense[t].b_transposed = t == NT;
        dense[t].a = o.x, dense[t].b = o.y, dense[t].c = o.c;
        bench_gemm_choose(&s, &dense[t]);
        call[t] = bench_one(bench_run_gemm, &dense[t]);
    }
    bench_alternate(&s, call, NUM_TRANSPOSES);
    for (int t = 0; t < NUM_TRANSPOSES; ++t) {
        const double flops = 2.0 * opt.size * (double)opt.size * opt.size;
        char what[32];
        snprintf(what, sizeof what, "cuBLAS dense, %s", transpose_name[t]);
        bench_row(&s, what, call[t].ms, flops / call[t].ms * 1e-9, "TFLOPS",
                  call[t].ms / call[NN].ms, "NN's time");
    }
    time_list(&s, &failures);

    for (int i = 0; i < NUM_KINDS; ++i) {
        int experts = 0;
        table t;
        memset(&t, 0, sizeof t);
        t.opt = &opt, t.d = &kinds[i], t.dense = dense;
        if (!is_wanted(&opt, &kinds[i])) continue;
        if (opt.quick && !kinds[i].quick) continue;
        for (int j = 0; j < NUM_DENSITIES; ++j) {
            if (opt.quick && !(densities[j] > 0.09 && densities[j] < 0.51)) continue;
            if (kinds[i].shape == DIAGONAL) { /* skips a number of experts that was run already */
                const int now =
                    diagonal_experts(densities[j], moe_block_sparse_count(opt.size, 128));
                if (now == experts || (now == 1 && densities[j] < 1.0)) continue;
                experts = now;
            }
            t.density = densities[j];
            run_mask(&s, &t, &o, &largest, &failures);
        }
    }
    bench_note_clocks(&s, bench_run_gemm, &dense[NN], call[NN].ms);
    printf("rows' products, sampled: worst error %.2f of its bound\n", largest);
    for (int t = 0; t < NUM_TRANSPOSES; ++t) bench_gemm_free(&dense[t]);
    bench_blas_close(&blas);
    free_operands(&o);
    if (opt.csv) fclose(opt.csv);
    return bench_close(&s, failures);
}
