/* load.cuh: the copies of a block-sparse tile's operands from memory to the ring of stages of
   gemm/mainloop.cuh: X is its A, Y its B. */
#ifndef MOE_BLOCK_SPARSE_LOAD_CUH
#define MOE_BLOCK_SPARSE_LOAD_CUH

#include "../gemm/mainloop.cuh"
#include "where.cuh"

/* A thread's part in the copies of one operand, the same in all steps: one piece, 8 elements, of
   each of a few lines that follow one another. Along K lines are rows, along MN depths; either way
   the thread's lines lie in one chunk of rows and one chunk of depth, and are `stride` apart. So
   the copies have no branch: only the numbers here say which way the operand lies. */
typedef struct moei_block_loader {
    uint64_t from;  /* address part of the chunk of rows, and of the piece in both chunks */
    int32_t stride; /* 16-byte pieces between lines */
    int32_t along;  /* lines are rows */
    int32_t to;     /* place of the first in a stage */
    int32_t chunk;  /* chunk of depth */
    int32_t first;  /* its first depth in that; 16: no row of these is read */
    int32_t row;    /* from here on where pieces may be cut off: chunk of rows */
    int32_t lines;  /* that there are */
    int32_t each;   /* lines for each depth of the chunk behind `first`; K: all */
    int32_t wide;   /* elements of the piece that there are; K: 0, as many as depths */
} moei_block_loader;

/* `width` rows of a tile, of which `here` are there and those of the bits `wanted` are read;
   `chunk` are their address parts. */
MOE_DEVICE moei_block_loader moei_block_loader_begin(const moei_block_matrix* x,
                                                     const uint64_t* chunk, int here,
                                                     uint32_t wanted, const int major,
                                                     const int width, const int deep,
                                                     const int threads)
{
    const int along = major == MOE_MAJOR_K, tid = (int)threadIdx.x;
    const int pieces = along ? deep / 8 : width / 8, lines = width * deep / 8 / threads;
    const int line = tid / pieces * lines, piece = tid % pieces; /* its first line */
    int left;
    moei_block_loader l;
    l.row = along ? line / 16 : piece / 2;
    l.chunk = along ? piece / 2 : line / 16;
    left = along ? here - line : piece * 8 < here ? lines : 0;
    l.lines = !(wanted >> l.row & 1) ? 0 : left < lines ? left : lines;
    l.first = l.lines <= 0 ? 16 : along ? piece % 2 * 8 : line % 16;
    l.each = along ? lines : 1;
    l.wide = along ? 0 : here - piece * 8;
    l.stride = (int32_t)(x->stride / 8);
    l.from = chunk[l.row] + (uint64_t)(line % 16 * 16 * (int64_t)l.stride + piece % 2 * 16);
    l.along = along;
    l.to = moei_swizzled(line, piece * 8, along ? deep : width);
    return l;
}

/* Where line i of a thread's lies in a stage: its first is a multiple of their number. */
MOE_DEVICE int moei_block_to(const moei_block_loader* l, const int i, const int width,
                             const int deep)
{
    return l->to ^ (l->along ? moei_swizzled(i, 0, deep) : moei_swizzled(i, 0, width));
}

/* Copies one part in `parts` of a step of an operand into a stage, of that the thread's share; `c`
   is the thread's chunk of depth of that step. `careful`, a literal: chunks may be cut off, which
   they are not else; and if `masked`, a literal, of X, rows may not want it, if not, of Y, depths
   may not count. */
MOE_DEVICE void moei_block_copy(const moei_block_loader* l, uint16_t* stage, moei_block_chunk c,
                                const int part, const int parts, const int width, const int deep,
                                const int threads, const int careful, const int masked)
{
    const uint64_t from = l->from + c.at;
    const int each = width * deep / 8 / threads;
    int lines = c.count > l->first ? each : 0;
    uint32_t count = 0xffff; /* bits: lines that count */
    if (careful) {
        const int there = (c.count - l->first) * l->each;
        const int wide = l->wide ? l->wide : c.count - l->first;
        lines = there < l->lines ? there : l->lines;
        if (masked && !(c.rows >> l->row & 1)) lines = 0;
        if (!masked && !l->along) count = c.rows >> l->first;
        if (lines > 0 && wide < 8) {
            MOEI_NO_UNROLL
            for (int i = 0; part == 0 && i < each * 8; ++i) {
                const uint64_t at = from + (uint64_t)(i / 8 * 16 * (int64_t)l->stride);
                stage[moei_block_to(l, i / 8, width, deep) + i % 8] =
                    i / 8 < lines && (count >> i / 8 & 1) && i % 8 < wide
                        ? ((const uint16_t*)(uintptr_t)at)[i % 8]
                        : (uint16_t)0;
            }
            return;
        }
    }
    MOEI_UNROLL
    for (int i = each * part / parts; i < each * (part + 1) / parts; ++i)
        moei_copy16_async(stage + moei_block_to(l, i, width, deep),
                          (const void*)(uintptr_t)(from + (uint64_t)(i * 16 * (int64_t)l->stride)),
                          (careful ? i < lines && (count >> i & 1) : lines > 0) ? 16 : 0);
}

/* A thread's copies of a tile: its part of X and of Y, and its chunks of the step to copy next, read
   long before they are needed. */
typedef struct moei_block_copies {
    moei_block_loader x, y;
    moei_block_chunk x_chunk, y_chunk;
    moei_block_shared* shared;               /* has the chunks */
    const moei_block_chunk *next_x, *next_y; /* of the step after it */
} moei_block_copies;

MOE_DEVICE moei_block_copies moei_block_copies_begin(const moei_block_args* d, moei_block_shared* s,
                                                     const moe_gemm_shape f)
{
    const moei_block_where* t = &s->tile;
    moei_block_copies o;
    o.x = moei_block_loader_begin(&d->x, s->x, t->rows, s->rows, f.a_major, f.tm, f.tk, f.threads);
    o.y = moei_block_loader_begin(&d->y, s->y, t->columns, s->columns, f.b_major, f.tn, f.tk,
                                  f.threads);
    o.x_chunk = s->chunk_x[o.x.chunk];
    o.y_chunk = s->chunk_y[o.y.chunk];
    o.shared = s;
    o.next_x = s->chunk_x, o.next_y = s->chunk_y;
    return o;
}

/* Before the copies of a step, while step `step` is multiplied (before the first, a negative one).
   Each half of the chunks made is used up in turn: one warp makes the next 32. careful is a literal. */
MOE_DEVICE void moei_block_advance(moei_block_copies* o, const moei_block_args* d, int step,
                                   const int careful, const moe_gemm_shape f)
{
    const int chunks = f.tk / 16, half = MOEI_WARP / chunks; /* of a step; steps */
    const int next = (step + f.stages) * chunks % (2 * MOEI_WARP);
    if (step % half == 0 && step > 0 && moei_warp() == step / half % (f.threads / MOEI_WARP))
        moei_block_chunks(d, &o->shared->tile, o->shared, (step / half + 1) * MOEI_WARP, careful,
                          f.tm);
    o->next_x = &o->shared->chunk_x[next + o->x.chunk];
    o->next_y = &o->shared->chunk_y[next + o->y.chunk];
}

/* Copies one part in `parts` of a step of a tile into a stage. careful is a literal. */
MOE_DEVICE void moei_block_fill(moei_block_copies* o, uint16_t* sx, uint16_t* sy, const int part,
                                const int parts, const int careful, const moe_gemm_shape f)
{
    moei_block_copy(&o->x, sx, o->x_chunk, part, parts, f.tm, f.tk, f.threads, careful, 1);
    moei_block_copy(&o->y, sy, o->y_chunk, part, parts, f.tn, f.tk, f.threads, careful, 0);
    if (part < parts - 1) return;
    o->x_chunk = *o->next_x;
    o->y_chunk = *o->next_y;
}

#endif
