/* desc.h: block masks and the block-sparse product's descriptor. C11 and C++14. What they mean:
   block_sparse.cuh. */
#ifndef MOE_BLOCK_SPARSE_DESC_H
#define MOE_BLOCK_SPARSE_DESC_H

#include <stddef.h>

#include "../base/status.h"
#include "../layout.h"

/* Which blocks of a matrix [rows, columns], as it lies in memory, there are. The matrix is cut into
   blocks of block_rows x block_columns; the last ones may be ragged. RB = ceil(rows / block_rows),
   CB = ceil(columns / block_columns). One of three forms, in device memory, also where there are no
   blocks:

     bytes   [RB, CB], 0: masked out
     bits    [RB, ceil(CB / 32)] words, bit j % 32 of word j / 32: block (i, j) is there
     list    the blocks that are there, numbered row after row:
               row_offset [RB + 1]         row i has the blocks row_offset[i] .. row_offset[i + 1]
               column_index [max_blocks]   the column of each, ascending in a row
             and the same blocks column after column:
               column_offset [CB + 1], row_index [max_blocks] (ascending in a column),
               position [max_blocks]       the number each has in the row order

   moe_block_sparse_list_build (block_sparse/list.cuh) makes the list from the other two, or from routing
   tables. */
typedef struct moe_block_sparse_mask {
    const uint8_t* bytes;
    const uint32_t* bits;
    const int32_t* row_offset;
    const int32_t* column_index;
    const int32_t* column_offset; /* these three: where the matrix is used column by column, that is
                                     transposed, or as B of dds; else may be null */
    const int32_t* row_index;
    const int32_t* position; /* of packed matrices only; else may be null */
    int32_t rows, columns;   /* of the matrix, elements, >= 0 */
    int32_t block_rows;      /* 16, 32, 64 or 128 */
    int32_t block_columns;   /* the same, each by itself */
    int32_t max_blocks;      /* of a list: entries its arrays have room for; else 0 */
} moe_block_sparse_mask;

/* Which operand is sparse: the letters stand for C, A and B. */
typedef enum moe_block_sparse_op {
    MOE_BLOCK_SPARSE_SDD = 1, /* C sparse: only its blocks are computed */
    MOE_BLOCK_SPARSE_DSD,     /* A sparse: only its blocks are read */
    MOE_BLOCK_SPARSE_DDS      /* B sparse: the same */
} moe_block_sparse_op;

/* Tile shapes: rows along the sparse operand's blocks x columns along the other one. For sdd the
   rows run along M, the columns are blocks of a row side by side. */
typedef enum moe_block_sparse_tile {
    MOE_BLOCK_SPARSE_TILE_AUTO = 0,
    MOE_BLOCK_SPARSE_TILE_128x256, /* blocks of 128, and smaller ones that stand together; 150 KB of shared
                               memory a block */
    MOE_BLOCK_SPARSE_TILE_64x256, /* blocks of 64 anywhere, and of 128 on smaller chips */
    MOE_BLOCK_SPARSE_TILE_32x256, /* blocks of 16 or 32 anywhere */
    MOE_BLOCK_SPARSE_TILE_64x64   /* small matrices; runs anywhere, sm_75 included */
} moe_block_sparse_tile;

/* How a product is run. moe_block_sparse_tune fills it in; it may be saved, and passed back for
   like shapes and masks. All zero: by the rule in block_sparse.cuh. */
typedef struct moe_block_sparse_choice {
    int32_t tile; /* moe_block_sparse_tile */
    int32_t
        fallback_tile; /* where several strips of low blocks share a tile: the moe_block_sparse_tile, of fewer
                     rows, for those that have not the same blocks; 0: as the others. Not looked at
                     where none are joined */
} moe_block_sparse_choice;

/* Leaves rows of the dense operand out where blocks are coarser than what is there. Of dsd with B
   untransposed and of dds with A transposed, C's strips being columns of a packed matrix whose rows
   are the depths. A row that does not count reads as zeros, for that group of strips alone. */
typedef struct moe_block_sparse_depths {
    const int32_t* filter; /* [groups] 1 + row of `keep`; 0: all rows count, at full speed; or null:
                             so for all groups */
    const uint8_t* keep;   /* [filters, stride] 0: the row does not count */
    int64_t stride;        /* multiple of 16, >= k; `keep` is 16-byte aligned */
    int32_t strips;       /* of a group, >= 1 */
} moe_block_sparse_depths;

/* C [m, n] = A [m, k] * B [k, n], all in row order; a transposed operand lies as A [k, m] or
   B [n, k]. The mask is that of the sparse matrix as it lies: of sdd [m, n], of dsd [m, k] or
   transposed [k, m], of dds [k, n] or transposed [n, k].

   Storage of the sparse matrix: strided, in its place within [rows, columns], masked-out blocks
   being neither read nor written; or packed: block p of the list's row order begins at element
   p * block_rows * block_columns and has all block_rows rows of block_columns elements, ragged
   ones too.

   A table gives a dense matrix's blocks addresses of their own, so that it may lie in vectors: entry
   i, in device memory, is the address, 16-byte aligned, of the first element of the i-th strip
   along the axis that it shares with the sparse matrix, in strips of the mask's blocks. Where
   strips lie side by side within rows, the stride is that of the vectors, and may be as short as a
   strip; 0 still means that of the whole matrix. Null entries: a strip of C is not computed; one of
   A or B is a fault where a block wants it. */
typedef struct moe_block_sparse_desc {
    /* in */
    const void* a;              /* dtype, 16-byte aligned; or null with a table */
    const void* b;              /* the same */
    const void* const* a_table; /* sdd: strips along m; dds: along k; else null */
    const void* const* b_table; /* sdd: strips along n; dsd: along k; else null */
    moe_block_sparse_mask mask;
    /* out */
    void* c;              /* c_dtype, 16-byte aligned; or null with a table */
    void* const* c_table; /* dsd: strips along m; dds: along n; else null */
    uint64_t* fault;      /* [1] fault word; or null */
    /* sizes and options */
    int32_t op;                           /* moe_block_sparse_op */
    int32_t m, n, k;                      /* >= 0 */
    int64_t a_stride, b_stride, c_stride; /* elements between rows as they lie; 0 = dense; multiple
                                             of 8; of the packed matrix 0 */
    int32_t a_transposed, b_transposed;   /* 1: lies as [k, m], [n, k] */
    int32_t packed;                       /* 1: the sparse matrix is packed; wants a list */
    int32_t zero_masked; /* 1: sdd writes zeros to the masked-out blocks of C, which
                                           is strided; 0: leaves them as they are */
    int32_t dtype;       /* of A and B: fp16 or bf16; 0 = bf16 */
    int32_t c_dtype;     /* dtype or fp32; 0 = dtype */
    moe_block_sparse_choice choice;
    int32_t rank;            /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    moe_block_sparse_depths depths; /* unchecked, as block_layer.cuh sets it; else zero */
    /* workspace */
    void* workspace; /* 16-byte aligned; null if moe_block_sparse_workspace asks for 0 */
    size_t workspace_bytes;
} moe_block_sparse_desc;

/* Makes a mask's list. In: exactly one of bytes, bits (as in moe_block_sparse_mask), ids, expert_offset.
   The last two are for matrices [rows, columns] whose columns belong to experts, columns /
   num_experts each, a multiple of block_columns. */
typedef struct moe_block_sparse_list_desc {
    /* in */
    const uint8_t* bytes;
    const uint32_t* bits;
    const int32_t* ids;           /* [rows, top_k] experts of each row, -1 = none: a block is there
                                     if one of its rows has its expert; whole_batch: [top_k], for
                                     all rows */
    const int32_t* expert_offset; /* [num_experts + 1] as moe_route gives it: a block is there if
                                     one of its rows lies in its expert's range */
    /* out */
    int32_t* row_offset;    /* [RB + 1] */
    int32_t* column_index;  /* [max_blocks] */
    int32_t* column_offset; /* [CB + 1]; this and the next two together, or all null */
    int32_t* row_index;     /* [max_blocks] */
    int32_t* position;      /* [max_blocks] */
    uint64_t* fault;        /* [1] fault word; or null */
    /* sizes and options */
    int32_t rows, columns, block_rows, block_columns; /* as in moe_block_sparse_mask */
    int32_t num_experts;                              /* of ids and expert_offset; else 0 */
    int32_t top_k;                                    /* of ids; else 0 */
    int32_t whole_batch;                              /* 1: one row of ids */
    int32_t max_blocks; /* room in the lists, RB * CB is always enough. A mask with more blocks:
                           fault NO_ROOM, and an empty list */
    int32_t rank;       /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    /* workspace */
    void* workspace; /* 16-byte aligned; null if moe_block_sparse_list_workspace asks for 0 */
    size_t workspace_bytes;
} moe_block_sparse_list_desc;

/* Blocks along an axis of n elements. */
MOE_HOST_DEVICE int32_t moe_block_sparse_count(int32_t n, int32_t block)
{
    return n / block + (n % block != 0);
}

MOE_HOST int moei_sparse_size_offered(int32_t b)
{
    return b == 16 || b == 32 || b == 64 || b == 128;
}

#endif
