/* prepare.cuh: a checked grouped GEMM becomes a launch: choice of path and tile, tensor maps. Host
   code. Called by grouped.cuh and grouped_gradient.cuh, each with its table of kernels. */
#ifndef MOE_GEMM_PREPARE_CUH
#define MOE_GEMM_PREPARE_CUH

#include "check.cuh"
#include "tile.cuh"
#include "variant.cuh"
#include "wgmma/map.cuh"
#include "wgmma/tile.cuh"

/* Tiles of the WMMA path: name, shape, thread blocks a multiprocessor. */
#define MOEI_GEMM_TILE_LIST(X)                                                                     \
    X(128x256, MOE_GEMM_SHAPE_128x256, 1)                                                          \
    X(128x128, MOE_GEMM_SHAPE_128x128, 2)                                                          \
    X(32x128, MOE_GEMM_SHAPE_32x128, 2)                                                            \
    X(64x64, MOE_GEMM_SHAPE_64x64, 4)

/* The dtype and majors that every tile is stamped with. Predefine the list to compile fewer or more
   kernels. */
#ifndef MOE_GEMM_VARIANT_LIST
#define MOE_GEMM_VARIANT_LIST(X, ...)                                                              \
    X(f16_kk, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                     \
    X(f16_kn, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)                                    \
    X(bf16_kk, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                    \
    X(bf16_kn, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)
#endif

/* Versions of code that have a body: bf16 from sm_80; the largest tile where a block may have
   180 KB of shared memory. The largest tile leaves no register free: it is compiled for k-major
   operands only. */
#define MOEI_GEMM_LEAST(dtype, tile_m, tile_n, a_major, b_major)                                   \
    ((tile_m) * (tile_n) <= 128 * 128                       ? ((dtype) == MOE_BF16 ? 80 : 75)      \
     : (a_major) == MOE_MAJOR_K && (b_major) == MOE_MAJOR_K ? 90                                   \
                                                            : MOEI_CODE_NEVER)
#define MOEI_GEMM_MOST(tile_m, tile_n) ((tile_m) * (tile_n) <= 128 * 128 ? MOEI_CODE_ANY : 119)

#define MOEI_GEMM_CHECK(name, tile_m, tile_n, tile_k, warps_m, warps_n, stages, blocks)            \
    static_assert((stages) == 3, "moei_tiles.position has room for a loader two tiles ahead");
#define MOEI_GEMM_TILE_CHECK(...) MOEI_GEMM_CHECK(__VA_ARGS__)
MOEI_GEMM_TILE_LIST(MOEI_GEMM_TILE_CHECK)
#undef MOEI_GEMM_TILE_CHECK
#undef MOEI_GEMM_CHECK

static_assert(sizeof(moei_wgmma_param) == sizeof(moei_wgmma_args),
              "moe_grouped_gemm_run launches with the args of a prepared product");
#define MOEI_GEMM_BOXED_K 512          /* most depths of tiles that are stored in boxes */
#define MOEI_GEMM_GRADIENT_GROUPS 1792 /* most groups of a gradient on the wgmma path */
#define MOEI_GEMM_WGMMA_LEAST(a_major, b_major) ((a_major) == MOE_MAJOR_K ? 90 : MOEI_CODE_NEVER)

static_assert(MOEI_WGMMA_SMEM + MOEI_WGMMA_PRE + sizeof(moei_wgmma_shared) +
                      4 * (MOEI_GEMM_GRADIENT_GROUPS + 1) <=
                  227 * 1024,
              "the first tiles of all groups of a gradient have room in shared memory");

/* Returns 1 where v has a good tile for these sizes on a device of `sms` multiprocessors; with
   batch_invariant the first line of the rule does not count, and experts count as having many rows.
   bench/bench_tiles.cu fitted the rule:
     32x128   where its tiles all run at one time, two a multiprocessor: more multiprocessors beat
              larger tiles
     128x256  otherwise where B has more than 128 rows; WMMA where also its tiles fill the device
              and experts have more than 32 rows
     128x128  otherwise where experts have more than 64 rows and B as many
     32x128   otherwise; 64x64 where it does not run, or B has 64 rows or less */
MOE_HOST int moei_gemm_suits(const moei_variant* v, const moe_grouped_gemm_desc* d, int sms)
{
    const int64_t tile_m = v->shape.tile_m, tile_n = v->shape.tile_n;
    const int64_t most = moei_gemm_groups(d), groups = d->num_rows < most ? d->num_rows : most;
    const int64_t rows = groups ? d->num_rows / groups : 0; /* of a group, on average */
    const int64_t b_rows = (int64_t)d->n * (moei_gemm_gated(d) ? 2 : 1);
    const int64_t tiles =
        ((rows + tile_m - 1) / tile_m) * groups * ((b_rows + tile_n - 1) / tile_n);
    const int64_t small = ((rows + 31) / 32) * groups * ((b_rows + 127) / 128);
    const int many = d->batch_invariant, few = !many && small <= 2 * (int64_t)sms;
    switch (v->tile) {
    case MOE_TILE_128x256:
        return !few && b_rows > 128 &&
               (many || v->path == MOE_GEMM_PATH_WGMMA || (rows > 32 && tiles >= sms));
    case MOE_TILE_128x128: return !few && b_rows > 64 && (many || rows > 64);
    case MOE_TILE_32x128: return few || b_rows > 64;
    default: return 1;
    }
}

/* Returns 1 where the wgmma path can take a checked product: A k-major, rows gathered or undivided;
   gates and ups not interleaved where B is mn-major; room for a cluster; sizes within the limits of
   tensor maps; of a gradient, room for the first tiles of all groups, and a place where P is handed
   over. */
MOE_HOST int moei_gemm_wgmma_takes(const moe_grouped_gemm_desc* d)
{
    const int64_t most = (int64_t)1 << 39;
    return d->a_major == MOE_MAJOR_K && (d->row_index || d->row_div == 1) && d->grid_limit != 1 &&
           d->a_stride < most && d->b.row_stride < most / 2 &&
           !(d->b.major == MOE_MAJOR_MN && moei_gemm_gated(d) &&
             d->gate_up == MOE_GATE_UP_INTERLEAVED) &&
           !(d->gradient &&
             (d->pre_stride >= most || moei_gemm_groups(d) > MOEI_GEMM_GRADIENT_GROUPS ||
              (d->c && !d->act && d->c == d->pre)));
}

/* Returns 1 where tensor copies store full tiles on the wgmma path: rows in order, tiles of few
   steps, C one array of 16-bit elements, room for the boxes beside the first tiles of all groups. */
MOE_HOST int moei_gemm_boxed(const moe_grouped_gemm_desc* d)
{
    return !d->row_index && d->k <= MOEI_GEMM_BOXED_K && d->c && !d->gradient &&
           d->c_dtype != MOE_FP32 && d->c_stride < (int64_t)1 << 39 && moei_gemm_groups(d) <= 2048;
}

/* Encodes the tensor maps of a checked product with rows: gates and ups as two matrices of n rows,
   however they lie in memory. */
MOE_HOST moe_status moei_gemm_encode(moei_wgmma_args* a, const moe_grouped_gemm_desc* d)
{
    const int gated = moei_gemm_gated(d), mn = d->b.major == MOE_MAJOR_MN;
    moei_tensor t;
    memset(&t, 0, sizeof t);
    t.dtype = d->dtype;
    t.base = d->a;
    t.columns = d->k;
    t.rows = d->a_rows;
    t.row_stride = d->a_stride;
    t.box_rows = 64;
    if (!d->row_index) MOE_TRY(moei_tensor_encode(&a->a, &t));
    a->boxes = moei_gemm_boxed(d);
    if (a->boxes || d->gradient) { /* boxes of results, or of pre */
        moei_tensor c = t;
        c.base = d->gradient ? d->pre : d->c;
        c.columns = d->n;
        c.rows = d->num_rows;
        c.row_stride = d->gradient ? d->pre_stride : d->c_stride;
        if (d->gradient) c.box_rows = MOEI_WGMMA_PRE_ROWS;
        if (d->gradient) c.halves = moe_activation_is_gated(d->activation) ? 2 : 1;
        MOE_TRY(moei_tensor_encode(&a->c, &c));
    }
    t.columns = mn ? d->n : d->k;
    t.rows = mn ? d->k : d->n;
    t.row_stride = d->b.row_stride;
    t.box_rows = mn ? 64 : 128;
    a->up = 0;
    if (gated && d->gate_up == MOE_GATE_UP_CONCATENATED)
        a->up = (mn ? (int64_t)d->n : d->b.row_stride * d->n) * 2;
    if (gated && d->gate_up == MOE_GATE_UP_INTERLEAVED) {
        a->up = d->b.row_stride * 2;
        t.row_stride *= 2;
    }
    return moei_tensor_encode(&a->b, &t);
}

/* Refuses a product that MOE_GEMM_VARIANT_LIST lacks. Names the first of dtype, a_major, b_major
   that no entry of the table matches. */
MOE_HOST moe_status moei_gemm_listed(const moei_variant* table, const moe_grouped_gemm_desc* d)
{
    int dtype = 0, a_major = 0, b_major = 0;
    for (const moei_variant* v = table; v->kernel; ++v) {
        const int agrees = v->shape.dtype == d->dtype;
        dtype |= agrees;
        a_major |= agrees && v->shape.a_major == d->a_major;
        b_major |= agrees && v->shape.a_major == d->a_major && v->shape.b_major == d->b.major;
    }
    MOE_REQUIRE(dtype, MOE_ERR_NOT_COMPILED, dtype);
    MOE_REQUIRE(a_major, MOE_ERR_NOT_COMPILED, a_major);
    MOE_REQUIRE(b_major, MOE_ERR_NOT_COMPILED, b_major);
    return MOE_OK;
}

/* Returns the shared memory that depends on the product, bytes: tile_start, boxes. */
MOE_HOST size_t moei_gemm_more(const moei_variant* v, const moe_grouped_gemm_desc* d)
{
    const int boxed = v->path == MOE_GEMM_PATH_WGMMA && moei_gemm_boxed(d);
    return ((size_t)moei_gemm_groups(d) + 1) * 4 + (boxed ? 2 * MOEI_WGMMA_BOX : 0);
}

/* Sets *chosen to the variant for a checked descriptor on *dev: the first that suits and runs. */
MOE_HOST moe_status moei_gemm_choose(const moei_variant* table, const moe_grouped_gemm_desc* d,
                                     const moe_device* dev, const moei_variant** chosen)
{
    int compiled = 0; /* 1: the requested tile has a body with these majors in some version */
    MOE_TRY(moei_gemm_listed(table, d));
    MOE_REQUIRE(MOE_ON_HOST || d->dtype == MOE_FP16 || dev->major >= 8, MOE_ERR_DEVICE, dtype);
    for (const moei_variant* v = table; v->kernel; ++v) {
        int runs;
        if (v->shape.dtype != d->dtype || v->shape.a_major != d->a_major ||
            v->shape.b_major != d->b.major ||
            v->rows == (d->row_index ? MOEI_VARIANT_IN_ORDER : MOEI_VARIANT_GATHERED) ||
            (d->path && v->path != d->path) ||
            (v->path == MOE_GEMM_PATH_WGMMA && !moei_gemm_wgmma_takes(d)) ||
            !(d->tile ? v->tile == d->tile
                      : d->path == MOE_GEMM_PATH_WGMMA || moei_gemm_suits(v, d, dev->sms)))
            continue;
        compiled |= v->least != MOEI_CODE_NEVER;
        MOE_TRY(moei_variant_runs(v, dev, moei_gemm_more(v, d), &runs));
        *chosen = v;
        if (runs) return MOE_OK;
    }
    MOE_REQUIRE(d->path != MOE_GEMM_PATH_WGMMA, compiled ? MOE_ERR_DEVICE : MOE_ERR_CONFLICT, path);
    MOE_REQUIRE(!d->tile || compiled, MOE_ERR_CONFLICT, tile);
    MOE_REQUIRE(!d->tile, MOE_ERR_DEVICE, tile);
    return MOE_STATUS(MOE_ERR_DEVICE, dtype); /* built without -arch=sm_80 or later, most often */
}

/* A prepared product: all but its stream is resolved, for the device that was current. */
typedef struct moe_grouped_gemm_prepared {
    moei_wgmma_args args; /* of the kernel; the WMMA path reads args.d alone */
    moe_gemm_plan plan;   /* the choice of kernel and grid */
    moe_launch launch;    /* kernel null: run queues nothing */
} moe_grouped_gemm_prepared;

/* Prepares *p, which is empty, for a checked descriptor and the kernels of a table. */
MOE_HOST moe_status moei_gemm_prepare(const moei_variant* table, const moe_grouped_gemm_desc* d,
                                      moe_grouped_gemm_prepared* p)
{
    moe_device dev;
    const moei_variant* v = 0;
    int64_t columns, tiles;
    MOE_TRY(moe_device_query(&dev));
    MOE_TRY(moei_gemm_choose(table, d, &dev, &v));
    columns = moei_gemm_gated(d) ? v->shape.tile_n / 2 : v->shape.tile_n;
    tiles = ((int64_t)d->num_rows / v->shape.tile_m + moei_gemm_groups(d) + 1) *
            ((d->n + columns - 1) / columns); /* upper bound */
    MOE_REQUIRE(tiles <= MOEI_VARIANT_MAX_TILES, MOE_ERR_RANGE, num_rows);
    p->args.d = moei_gemm_args_of(d);
    p->plan = moei_variant_plan(v, &dev, tiles, moei_gemm_more(v, d), d->grid_limit);
    if (d->num_rows == 0) return MOE_OK;
    if (v->path == MOE_GEMM_PATH_WGMMA) {
        const moe_status s = moei_gemm_encode(&p->args, d);
        if (s != MOE_OK && !d->path) { /* a driver without tensor maps, or one that refuses these */
            moe_grouped_gemm_desc other = *d;
            other.path = MOE_GEMM_PATH_WMMA;
            return moei_gemm_prepare(table, &other, p);
        }
        MOE_TRY(s);
        p->args.ticket = (int32_t*)d->workspace;
    }
    return moei_variant_prepare(&p->launch, v, p->plan.blocks, moei_gemm_more(v, d));
}

/* Prepares *p, which is empty, for an unchecked descriptor: a gradient, or a forward product. */
MOE_HOST moe_status moei_gemm_check_prepare(const moei_variant* table,
                                            const moe_grouped_gemm_desc* desc, int gradient,
                                            moe_grouped_gemm_prepared* p)
{
    moe_grouped_gemm_desc d = *desc;
    MOE_TRY(moei_gemm_check(&d, gradient));
    return moei_gemm_prepare(table, &d, p);
}

/* Queues a prepared product whose counter of tiles is 0. */
MOE_HOST moe_status moei_gemm_run_cleared(const moe_grouped_gemm_prepared* p, cudaStream_t stream)
{
    if (p->plan.path != MOE_GEMM_PATH_WGMMA) return MOE_RUN(&p->launch, p->args.d, stream);
    return MOE_RUN(&p->launch, *(const moei_wgmma_param*)(const void*)&p->args, stream);
}

/* Queues a prepared product on `stream`. Refuses a null p. */
MOE_HOST moe_status moe_grouped_gemm_run(const moe_grouped_gemm_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    if (p->args.ticket && p->launch.kernel)
        MOE_TRY_CUDA(cudaMemsetAsync(p->args.ticket, 0, 4, stream));
    return moei_gemm_run_cleared(p, stream);
}

#endif
