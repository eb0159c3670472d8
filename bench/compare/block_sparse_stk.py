"""Block-sparse products of MegaBlocks' sparse toolkit (stk), at the shapes and masks of
bench_block_sparse.cu.

    pip install --no-deps stanford-stk==0.7.1
    python3 bench/compare/block_sparse_stk.py [--quick] [--csv FILE]

Needs torch, triton, stk and one GPU; nothing of this collection. stk is pure Python over Triton kernels and
stands alone: `pip install --target DIR` and PYTHONPATH=DIR do where nothing may be installed. Exit code 77,
with the reason, where there is no stk, no GPU, or none of its kernels runs.

stk's kernels are for sparse blocks of 128 x 128, one tile of 128 x 128 x 32 with 4 stages and 4 warps. So only
such masks are timed: random-128 and diagonal-128. The sparse matrix is packed, its indices int16 as MegaBlocks
has them (from Triton 3.2 on sdd's overflow past 256 sparse blocks a side, stk's pull request 17).
The timed call includes allocating the result from torch's cache.

How it is verified and timed: block_sparse_triton.py.
"""
import os
import sys

try:
    import torch
    import stk
    import stk.ops
except Exception as error:  # not installed, or a Triton that it cannot be imported under
    print(f"skipped: {type(error).__name__}: {error}")
    print("  needs torch with triton, and stk: pip install --no-deps stanford-stk==0.7.1")
    sys.exit(77)

from block_sparse_triton import (COLUMNS, PASSES, Lists, Reference, make_mask, make_operands, open_gpu,
                                 operands, parse, run_kind, spread)

BLOCK = 128


def blocks_of(x, size):
    """[n, n] as [n / 128, n / 128, 128, 128]."""
    n = size // BLOCK
    return x.reshape(n, BLOCK, n, BLOCK).permute(0, 2, 1, 3)


def make_stk(x, lists):
    """The present sparse blocks of x [n, n], as stk packs them."""
    size = x.shape[0]
    row, column = lists.orders[0]
    data = blocks_of(x, size)[row.long(), column.long()].contiguous()
    return stk.Matrix(torch.Size((size, size)), data, row.to(torch.int16), column.to(torch.int16),
                      lists.by_row[0])


def launcher(call, transposes, a, b, sparse):
    """The call, which gives a new tensor or stk matrix. `sparse` is packed, as it lies."""
    if call == "sdd":
        return lambda: stk.ops.sdd(a, b, sparse)
    if call == "dsd":
        left = sparse.t() if transposes == "TN" else sparse
        return lambda: stk.ops.dsd(left, b)
    right = sparse.t() if transposes == "NT" else sparse
    return lambda: stk.ops.dds(a, right)


def to_dense(result, c):
    """A sparse result in its place within c, of NaN; a dense one as it is."""
    if isinstance(result, torch.Tensor):
        return result
    row, column = result.row_indices.long(), result.column_indices.long()
    c.fill_(float("nan"))
    blocks_of(c, c.shape[0])[row, column] = result.data
    return c


def check_all(size, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = make_operands(size, device, dtype)
    for density in (0.25, 0.5):
        lists = Lists(make_mask("random", BLOCK, density, size), device)
        elements = spread(lists.mask, BLOCK)
        sparse, packed = x.masked_fill(~elements, float("nan")), make_stk(x, lists)
        worst = 0.0
        for product, name, call, transposes in PASSES:
            a, b = operands(call, transposes, x, y, sparse, size)
            c = to_dense(launcher(call, transposes, a, b, packed)(), torch.empty_like(x))
            worst = max(worst, Reference(call, a, b, elements).check(c, f"{product} {name}"))
        print(f"random-128, d {lists.kept:.4f}: right, worst error {worst:.2f} of its bound", flush=True)


def main():
    args = parse(__doc__.splitlines()[0])
    kinds = [k for k in args.kinds if k[1] == BLOCK]
    if args.check and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        check_all(args.size, torch.bfloat16 if torch.cuda.is_available() else torch.float16)
        return
    if not torch.cuda.is_available() or not kinds:
        print("no GPU, skipped" if kinds else "sparse blocks of 128 only, skipped")
        sys.exit(77)
    x, y, flush = open_gpu(args.size)
    csv = open(args.csv, "w") if args.csv else None
    if csv:
        csv.write(COLUMNS + "\n")
    packed = {}

    def prepare(mask, block, call, transposes, a, b, c, lists):
        if packed.get("of") is not lists:
            packed["of"], packed["matrix"] = lists, make_stk(x, lists)
        run = launcher(call, transposes, a, b, packed["matrix"])
        return run, lambda: to_dense(run(), c), "128x128x32 stk"

    with torch.no_grad():
        try:
            quarter = Lists(make_mask("random", BLOCK, 0.25, args.size), x.device)
            launcher("sdd", "NN", x, y, make_stk(x, quarter))()
            torch.cuda.synchronize()
        except Exception as error:  # kernels that this Triton does not compile
            print(f"stk does not run here, skipped: {type(error).__name__}: {error}")
            sys.exit(77)
        for mask, block, _ in kinds:
            run_kind("stk", mask, block, args, x, y, flush, csv, prepare)


if __name__ == "__main__":
    main()
