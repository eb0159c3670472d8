/* load.cuh: the copies of a block-sparse tile's operands from memory to the ring of stages of
   gemm/mainloop.cuh: X is its A, Y its B. */
#ifndef MOE_BLOCK_SPARSE_LOAD_CUH
#define MOE_BLOCK_SPARSE_LOAD_CUH

#include "../gemm/mainloop.cuh"
#include "address.cuh"

/* A thread's part in the copies of one operand, the same in all steps: one vector, 8 elements, of
   each of a few lines that follow one another. Along K lines are rows, k_major MN depths; either way
   the thread's lines lie in one slice of rows and one slice of depth, and are `stride` apart. So
   the copies have no branch: only the numbers here say which way the operand lies. */
typedef struct moei_sparse_loader {
    uint64_t from;   /* address part of the slice of rows, and of the vector in both slices */
    int32_t stride;  /* 16-byte vectors between lines */
    int32_t k_major; /* lines are rows */
    int32_t to;     /* place of the first in a stage */
    int32_t slice;  /* slice of depth */
    int32_t first;  /* its first depth in that; 16: no row of these is read */
    int32_t row;    /* from here on where vectors may be cut off: slice of rows */
    int32_t lines;  /* that there are */
    int32_t each;   /* lines for each depth of the slice behind `first`; K: all */
    int32_t valid;  /* elements of the vector that there are; K: 0, as many as depths */
} moei_sparse_loader;

/* `width` rows of a tile, of which `here` are there and those of the bits `wanted` are read;
   `slice` are their address parts. */
MOE_DEVICE moei_sparse_loader moei_sparse_loader_begin(const moei_sparse_matrix* x,
                                                       const uint64_t* slice, int here,
                                                       uint32_t wanted, const int major,
                                                       const int width, const int tile_k,
                                                       const int threads)
{
    const int k_major = major == MOE_MAJOR_K, tid = (int)threadIdx.x;
    const int vectors = k_major ? tile_k / 8 : width / 8, lines = width * tile_k / 8 / threads;
    const int line = tid / vectors * lines, vector = tid % vectors; /* its first line */
    int left;
    moei_sparse_loader l;
    l.row = k_major ? line / 16 : vector / 2;
    l.slice = k_major ? vector / 2 : line / 16;
    left = k_major ? here - line : vector * 8 < here ? lines : 0;
    l.lines = !(wanted >> l.row & 1) ? 0 : left < lines ? left : lines;
    l.first = l.lines <= 0 ? 16 : k_major ? vector % 2 * 8 : line % 16;
    l.each = k_major ? lines : 1;
    l.valid = k_major ? 0 : here - vector * 8;
    l.stride = (int32_t)(x->stride / 8);
    l.from = slice[l.row] + (uint64_t)(line % 16 * 16 * (int64_t)l.stride + vector % 2 * 16);
    l.k_major = k_major;
    l.to = moei_swizzled(line, vector * 8, k_major ? tile_k : width);
    return l;
}

/* Where line i of a thread's lies in a stage: its first is a multiple of their number. */
MOE_DEVICE int moei_sparse_to(const moei_sparse_loader* l, const int i, const int width,
                              const int tile_k)
{
    return l->to ^ (l->k_major ? moei_swizzled(i, 0, tile_k) : moei_swizzled(i, 0, width));
}

/* Copies one part in `parts` of a step of an operand into a stage, of that the thread's share; `c`
   is the thread's slice of depth of that step. `predicated`, a literal: slices may be cut off, which
   they are not else; and if `masked`, a literal, of X, rows may not want it, if not, of Y, depths
   may not count. */
MOE_DEVICE void moei_sparse_copy(const moei_sparse_loader* l, uint16_t* stage, moei_sparse_slice c,
                                 const int part, const int parts, const int width, const int tile_k,
                                 const int threads, const int predicated, const int masked)
{
    const uint64_t from = l->from + c.at;
    const int each = width * tile_k / 8 / threads;
    int lines = c.count > l->first ? each : 0;
    uint32_t count = 0xffff; /* bits: lines that count */
    if (predicated) {
        const int there = (c.count - l->first) * l->each;
        const int valid = l->valid ? l->valid : c.count - l->first;
        lines = there < l->lines ? there : l->lines;
        if (masked && !(c.rows >> l->row & 1)) lines = 0;
        if (!masked && !l->k_major) count = c.rows >> l->first;
        if (lines > 0 && valid < 8) {
            MOE_NO_UNROLL
            for (int i = 0; part == 0 && i < each * 8; ++i) {
                const uint64_t at = from + (uint64_t)(i / 8 * 16 * (int64_t)l->stride);
                stage[moei_sparse_to(l, i / 8, width, tile_k) + i % 8] =
                    i / 8 < lines && (count >> i / 8 & 1) && i % 8 < valid
                        ? ((const uint16_t*)(uintptr_t)at)[i % 8]
                        : (uint16_t)0;
            }
            return;
        }
    }
    MOE_UNROLL
    for (int i = each * part / parts; i < each * (part + 1) / parts; ++i)
        moei_copy16_async(stage + moei_sparse_to(l, i, width, tile_k),
                          (const void*)(uintptr_t)(from + (uint64_t)(i * 16 * (int64_t)l->stride)),
                          (predicated ? i < lines && (count >> i & 1) : lines > 0) ? 16 : 0);
}

/* A thread's copies of a tile: its part of X and of Y, and its slices of the step to copy next, read
   long before they are needed. */
typedef struct moei_sparse_copies {
    moei_sparse_loader x, y;
    moei_sparse_slice x_slice, y_slice;
    moei_sparse_shared* shared;               /* has the slices */
    const moei_sparse_slice *next_x, *next_y; /* of the step after it */
} moei_sparse_copies;

MOE_DEVICE moei_sparse_copies moei_sparse_copies_begin(const moei_sparse_args* d,
                                                       moei_sparse_shared* s,
                                                       const moe_gemm_shape f)
{
    const moei_sparse_position* t = &s->tile;
    moei_sparse_copies o;
    o.x = moei_sparse_loader_begin(&d->x, s->x, t->rows, s->rows, f.a_major, f.tile_m, f.tile_k,
                                   f.threads);
    o.y = moei_sparse_loader_begin(&d->y, s->y, t->columns, s->columns, f.b_major, f.tile_n,
                                   f.tile_k, f.threads);
    o.x_slice = s->slice_x[o.x.slice];
    o.y_slice = s->slice_y[o.y.slice];
    o.shared = s;
    o.next_x = s->slice_x, o.next_y = s->slice_y;
    return o;
}

/* Before the copies of a step, while step `step` is multiplied (before the first, a negative one).
   Each half of the slices made is used up in turn: one warp makes the next 32. predicated is a literal. */
MOE_DEVICE void moei_sparse_advance(moei_sparse_copies* o, const moei_sparse_args* d, int step,
                                    const int predicated, const moe_gemm_shape f)
{
    const int slices = f.tile_k / 16, half = MOE_WARP_SIZE / slices; /* of a step; steps */
    const int next = (step + f.stages) * slices % (2 * MOE_WARP_SIZE);
    if (step % half == 0 && step > 0 && moe_warp() == step / half % (f.threads / MOE_WARP_SIZE))
        moei_sparse_slices(d, &o->shared->tile, o->shared, (step / half + 1) * MOE_WARP_SIZE,
                           predicated, f.tile_m);
    o->next_x = &o->shared->slice_x[next + o->x.slice];
    o->next_y = &o->shared->slice_y[next + o->y.slice];
}

/* Copies one part in `parts` of a step of a tile into a stage. predicated is a literal. */
MOE_DEVICE void moei_sparse_fill(moei_sparse_copies* o, uint16_t* sx, uint16_t* sy, const int part,
                                 const int parts, const int predicated, const moe_gemm_shape f)
{
    moei_sparse_copy(&o->x, sx, o->x_slice, part, parts, f.tile_m, f.tile_k, f.threads, predicated,
                     1);
    moei_sparse_copy(&o->y, sy, o->y_slice, part, parts, f.tile_n, f.tile_k, f.threads, predicated,
                     0);
    if (part < parts - 1) return;
    o->x_slice = *o->next_x;
    o->y_slice = *o->next_y;
}

#endif
