/* desc.h: the mask and the descriptors of block-sparse products and their lists. C11 and C++14.
   block_sparse.cuh has the formulas. */
#ifndef MOE_BLOCK_SPARSE_DESC_H
#define MOE_BLOCK_SPARSE_DESC_H

#include <stddef.h>

#include "../base/status.h"
#include "../layout.h"

/* The mask of a matrix [rows, columns], as the matrix is stored: its present sparse blocks.
   The matrix is cut into sparse blocks of block_rows x block_columns elements; the last block row
   and block column may be ragged. RB = ceil(rows / block_rows), CB = ceil(columns / block_columns).
   Requires exactly one of three forms, in device memory, even where RB or CB is 0:

     bytes   [RB, CB] 0: masked out; any other value: present
     bits    [RB, ceil(CB / 32)] bit j % 32 of word j / 32 is 1: sparse block (i, j) is present
     list    the present sparse blocks in row order, numbered block row after block row:
               row_offset [RB + 1]         block row i has the entries
                                           row_offset[i] .. row_offset[i + 1]
               column_index [max_blocks]   block column of each entry, ascending in a block row
             and the same sparse blocks in column order:
               column_offset [CB + 1], row_index [max_blocks] (ascending in a block column),
               position [max_blocks]       number of each entry in row order

   moe_block_sparse_list_build (block_sparse/list.cuh) makes the list from bytes, bits or routing
   tables. */
typedef struct moe_block_sparse_mask {
    const uint8_t* bytes;         /* [RB, CB]; null: another form */
    const uint32_t* bits;         /* [RB, ceil(CB / 32)]; null: another form */
    const int32_t* row_offset;    /* [RB + 1] row order of a list, 0 .. max_blocks; else null */
    const int32_t* column_index;  /* [max_blocks] row order of a list, 0 .. CB - 1; or null */
    const int32_t* column_offset; /* [CB + 1]; column order: required of a list for A transposed of
                                     dsd and B not transposed of dds; else may be null */
    const int32_t* row_index;     /* [max_blocks], 0 .. RB - 1; as column_offset */
    const int32_t* position;      /* [max_blocks], 0 .. max_blocks - 1; as column_offset, of packed
                                     matrices only */
    int32_t rows, columns;        /* of the matrix as stored, elements, >= 0 */
    int32_t block_rows;           /* rows of a sparse block: 16, 32, 64 or 128 */
    int32_t block_columns;        /* columns of a sparse block: 16, 32, 64 or 128 */
    int32_t max_blocks;           /* of a list: entries that its arrays hold, >= 0; else 0 */
} moe_block_sparse_mask;

/* The sparse matrix of a product: the letters name C, A and B in this order. */
typedef enum moe_block_sparse_op {
    MOE_BLOCK_SPARSE_SDD = 1, /* C sparse: only its present sparse blocks are computed */
    MOE_BLOCK_SPARSE_DSD,     /* A sparse: only its present sparse blocks are read */
    MOE_BLOCK_SPARSE_DDS      /* B sparse: only its present sparse blocks are read */
} moe_block_sparse_op;

/* Tile shapes: rows x columns. The rows run along m (sdd, dsd) or n (dds), the columns along the
   other axis of C. sdd: the columns are the present sparse blocks of a strip, one after another;
   the rows run along n where sparse blocks are wider than high and the mask can be walked by
   columns. */
typedef enum moe_block_sparse_tile {
    MOE_BLOCK_SPARSE_TILE_AUTO = 0, /* by the rule in block_sparse.cuh */
    MOE_BLOCK_SPARSE_TILE_128x256,  /* sparse blocks of 128; smaller ones where neighbouring block
                                       rows have the same block columns; 150000 bytes of shared
                                       memory a thread block */
    MOE_BLOCK_SPARSE_TILE_64x256,   /* sparse blocks of 64 in any pattern; of 128 on devices with
                                       less shared memory */
    MOE_BLOCK_SPARSE_TILE_32x256,   /* sparse blocks of 16 or 32 in any pattern */
    MOE_BLOCK_SPARSE_TILE_64x64     /* small matrices; runs on every device, sm_75 included */
} moe_block_sparse_tile;

/* The tiles of a product. Filled in by moe_block_sparse_tune; may be saved, and passed back for
   like shapes and masks. All zero: the rule in block_sparse.cuh. */
typedef struct moe_block_sparse_choice {
    int32_t tile;          /* moe_block_sparse_tile; 0 = by the rule */
    int32_t fallback_tile; /* moe_block_sparse_tile with fewer rows than `tile`, for strips whose
                              joined block rows have different block columns; 0 = `tile`
                              computes them. Ignored where no block rows are joined; 0 with
                              tile 0 */
} moe_block_sparse_choice;

/* Excludes single depths where the sparse blocks are coarser than the data. Requires dsd with B not
   transposed, or dds with A transposed: each strip of C belongs to one block column of a packed
   matrix whose rows are the depths. For one group of strips, an excluded row of the dense operand
   reads as zeros; for other groups the row counts. */
typedef struct moe_block_sparse_depths {
    const int32_t* filter; /* [groups] 1 + row of `keep`; 0: all depths count, at full speed.
                              Null: all depths count for all groups */
    const uint8_t* keep;   /* [filters, stride] 0: the depth is excluded; 16-byte aligned */
    int64_t stride;        /* bytes between rows of `keep`, multiple of 16, >= k */
    int32_t strips;        /* strips of a group, >= 1 */
} moe_block_sparse_depths;

/* C [m, n] = A [m, k] * B [k, n], columns contiguous in a row; a transposed operand is stored as
   A [k, m] or B [n, k]. The mask is that of the sparse matrix as stored: of sdd [m, n], of dsd
   [m, k] or transposed [k, m], of dds [k, n] or transposed [n, k].

   Storage of the sparse matrix:
     strided   at its own address within [rows, columns]; masked-out sparse blocks are neither read
               nor written
     packed    entry p of the list's row order begins at element p * block_rows * block_columns and
               has block_rows full rows of block_columns elements, also where ragged

   A table gives a dense matrix several buffers: one address per block row or block column of the
   sparse matrix, along the axis that the two matrices share. Entry i, in device memory, is the
   address, 16-byte aligned, of the first element at block row (block column) i. Where the entries
   divide the rows of the stored matrix, the stride is that of the buffers: block_rows
   (block_columns) elements or more; 0 still means that of the whole matrix. Null entries: of
   C, the rows or columns are not computed; of A or B, fault BAD_TABLE where a present sparse block
   uses the entry. */
typedef struct moe_block_sparse_desc {
    /* in */
    const void* a;              /* [m, k] dtype, 16-byte aligned; null with a_table, or if
                                   m, n or k is 0 */
    const void* b;              /* [k, n] dtype, 16-byte aligned; null with b_table, or if
                                   m, n or k is 0 */
    const void* const* a_table; /* sdd: entries along m; dds: along k; or null. dsd: null */
    const void* const* b_table; /* sdd: entries along n; dsd: along k; or null. dds: null */
    moe_block_sparse_mask mask; /* of the sparse matrix as stored */
    /* out */
    void* c;              /* [m, n] c_dtype, 16-byte aligned; null with c_table, or if C is empty */
    void* const* c_table; /* dsd: entries along m; dds: along n; or null. sdd: null */
    uint64_t* fault;      /* [1] fault word; or null */
    /* sizes and options */
    int32_t op;                           /* moe_block_sparse_op */
    int32_t m, n, k;                      /* elements, 0 .. 2^31 - 512 */
    int64_t a_stride, b_stride, c_stride; /* elements between rows as stored; 0 = dense; multiple
                                             of 8; of the packed matrix 0 */
    int32_t a_transposed, b_transposed;   /* 1: stored as [k, m], [n, k]; 0: [m, k], [k, n] */
    int32_t packed;                       /* 1: the sparse matrix is packed, and the mask a list;
                                             0: strided */
    int32_t zero_masked;                  /* 1: sdd writes zeros to the masked-out sparse blocks of
                                             C, which is strided; 0: they keep their values */
    int32_t dtype;                        /* of A and B: fp16 or bf16; 0 = bf16 */
    int32_t c_dtype;                      /* dtype or fp32; 0 = dtype */
    moe_block_sparse_choice choice;       /* of tiles; all 0 = by the rule in block_sparse.cuh */
    int32_t rank;                         /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    moe_block_sparse_depths depths;       /* set by block_layer.cuh, not checked; else all 0 */
    /* workspace */
    void* workspace;        /* 16-byte aligned; null if moe_block_sparse_workspace returns 0 */
    size_t workspace_bytes; /* >= the bytes of moe_block_sparse_workspace */
} moe_block_sparse_desc;

/* Makes the list of a mask. Requires exactly one source: bytes, bits (as in moe_block_sparse_mask),
   ids or expert_offset. The last two are for matrices [rows, columns] whose columns belong to
   experts: columns / num_experts each, a multiple of block_columns. RB and CB as in
   moe_block_sparse_mask. */
typedef struct moe_block_sparse_list_desc {
    /* in */
    const uint8_t* bytes;         /* [RB, CB] 0: masked out; or null */
    const uint32_t* bits;         /* [RB, ceil(CB / 32)]; or null */
    const int32_t* ids;           /* [rows, top_k] experts of each row, -1 = none; whole_batch:
                                     [top_k], for all rows. A sparse block is present if one of its
                                     rows has the expert of its columns. Or null */
    const int32_t* expert_offset; /* [num_experts + 1] made by moe_route. A sparse block is
                                     present if one of its rows is in the range of the expert of
                                     its columns. Or null */
    /* out */
    int32_t* row_offset;    /* [RB + 1] */
    int32_t* column_index;  /* [max_blocks] */
    int32_t* column_offset; /* [CB + 1]; this and the next two together, or all null */
    int32_t* row_index;     /* [max_blocks]; or null */
    int32_t* position;      /* [max_blocks]; or null */
    uint64_t* fault;        /* [1] fault word; or null */
    /* sizes and options */
    int32_t rows, columns, block_rows, block_columns; /* elements, as in moe_block_sparse_mask */
    int32_t num_experts; /* of ids and expert_offset, 1 .. MOE_MAX_EXPERTS; else 0 */
    int32_t top_k;       /* of ids, 1 .. MOE_MAX_EXPERTS; else 0 */
    int32_t whole_batch; /* 1: ids is [top_k]; 0: ids is [rows, top_k] */
    int32_t max_blocks;  /* entries that the lists hold, >= 0; RB * CB always suffices. A mask with
                            more sparse blocks: fault NO_ROOM, and an empty list */
    int32_t rank;        /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    /* workspace */
    void* workspace;        /* 16-byte aligned */
    size_t workspace_bytes; /* >= the bytes of moe_block_sparse_list_workspace */
} moe_block_sparse_list_desc;

/* Returns the number of block rows or block columns along an axis of n elements. */
MOE_HOST_DEVICE int32_t moe_block_sparse_count(int32_t n, int32_t block)
{
    return n / block + (n % block != 0);
}

/* Returns 1 where a sparse block may have b rows or columns. */
MOE_HOST int moe_block_sparse_size_offered(int32_t b)
{
    return b == 16 || b == 32 || b == 64 || b == 128;
}

#endif
