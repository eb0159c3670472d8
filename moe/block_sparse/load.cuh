/* load.cuh: the loader of a block-sparse tile: copies X (its A) and Y (its B) from memory to the
   ring of stages of gemm/mainloop.cuh. Called by multiply.cuh. */
#ifndef MOE_BLOCK_SPARSE_LOAD_CUH
#define MOE_BLOCK_SPARSE_LOAD_CUH

#include "../gemm/mainloop.cuh"
#include "address.cuh"

/* A thread's share of the copies of one operand, the same in all steps: one 16-byte vector of each
   of a few consecutive lines. k-major lines are rows, mn-major lines are depths. Either way the
   thread's lines belong to one slice of rows and one slice of depth, and are `stride` apart. So the
   copies have no branch: only these numbers depend on the major. */
typedef struct moei_sparse_loader {
    uint64_t from;   /* address part: of the slice of rows, and of the vector in both slices */
    int32_t stride;  /* 16-byte vectors between lines */
    int32_t k_major; /* 1: lines are rows; 0: lines are depths */
    int32_t to;      /* elements from the stage's begin to the first line's vector */
    int32_t slice;   /* slice of depth in the step */
    int32_t first;   /* first depth in that slice; 16: the thread reads nothing */
    int32_t row;     /* slice of rows; this and the next three are of predicated copies alone */
    int32_t lines;   /* lines inside the tile; <= 0: none */
    int32_t each;    /* lines for each depth from `first` on; k-major: all */
    int32_t valid;   /* elements of the vector inside the tile; k-major: 0, as many as depths */
} moei_sparse_loader;

/* Returns the calling thread's loader for an operand of `width` rows of a tile. `here`: rows inside
   the matrix; `wanted`: bits, the slices that are read; `slice`: their address parts. */
MOE_DEVICE moei_sparse_loader moei_sparse_loader_begin(const moei_sparse_matrix* x,
                                                       const uint64_t* slice, int here,
                                                       uint32_t wanted, const int major,
                                                       const int width, const int tile_k,
                                                       const int threads)
{
    const int k_major = major == MOE_MAJOR_K, tid = (int)threadIdx.x;
    const int vectors = k_major ? tile_k / 8 : width / 8, lines = width * tile_k / 8 / threads;
    const int line = tid / vectors * lines, vector = tid % vectors; /* the thread's first line */
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

/* Returns the offset of the thread's line i in a stage, elements. XOR is right: the number of the
   first line is a multiple of the thread's number of lines. */
MOE_DEVICE int moei_sparse_to(const moei_sparse_loader* l, const int i, const int width,
                              const int tile_k)
{
    return l->to ^ (l->k_major ? moei_swizzled(i, 0, tile_k) : moei_swizzled(i, 0, width));
}

/* Copies the thread's share of part `part` of `parts` of a step of an operand into a stage; `c`:
   the thread's slice of depth of that step. Literals: predicated, 1: slices may be cut off, 0: they
   are whole; masked, predicated alone, 1 (X): row slices outside c.rows become zeros, 0 (Y): depths
   outside c.rows do. */
MOE_DEVICE void moei_sparse_copy(const moei_sparse_loader* l, uint16_t* stage, moei_sparse_slice c,
                                 const int part, const int parts, const int width, const int tile_k,
                                 const int threads, const int predicated, const int masked)
{
    const uint64_t from = l->from + c.at;
    const int each = width * tile_k / 8 / threads;
    int lines = c.count > l->first ? each : 0;
    uint32_t count = 0xffff; /* bits: the lines that count */
    if (predicated) {
        const int there = (c.count - l->first) * l->each;
        const int valid = l->valid ? l->valid : c.count - l->first;
        lines = there < l->lines ? there : l->lines;
        if (masked && !(c.rows >> l->row & 1)) lines = 0;
        if (!masked && !l->k_major) count = c.rows >> l->first;
        if (lines > 0 && valid < 8) {
            /* a vector that is cut off: element by element, all in part 0 */
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

/* A thread's copies of a tile: its loaders, and its slices of the next step to copy, which are read
   a step before they are used. */
typedef struct moei_sparse_copies {
    moei_sparse_loader x, y;
    moei_sparse_slice x_slice, y_slice;       /* of the next step to copy */
    moei_sparse_shared* shared;               /* has slice_x and slice_y */
    const moei_sparse_slice *next_x, *next_y; /* in shared: of the step after that */
} moei_sparse_copies;

/* Returns the calling thread's copies of the tile in s; the first slices are made. */
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

/* Runs before the copies of a step, while step `step` is multiplied (negative before the first).
   Every `half` steps, one warp writes the next 32 slices over the half that has been used. These
   slices are first read in a later step, and each step has a barrier. predicated is a literal.
   Called by the whole thread block. */
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

/* Copies part `part` of `parts` of a step into the stage at sx (X) and sy (Y); after the last part
   reads the slices of the next step. predicated is a literal. Called by the whole thread block. */
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
