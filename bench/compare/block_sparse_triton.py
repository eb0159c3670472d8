"""Block-sparse products in Triton, at the shapes and masks of bench_block_sparse.cu.

    python3 bench/compare/block_sparse_triton.py [--quick] [--only KIND-BLOCK] [--csv FILE]
    TRITON_INTERPRET=1 python3 bench/compare/block_sparse_triton.py --check --size 256

Needs torch and triton, and one GPU unless it only checks; nothing of this collection. The masks are the
bench's, bit by bit, and so are the rows: sdd, dsd and dds, each forward, dA and dB, and torch.matmul
in the same run. --csv writes the bench's columns.

A program computes one sparse block of C (sdd), or the height of a sparse block by a tile's width of C
(dsd, dds). It reads the sparse matrix through offsets and indices, stored as the dense one, transposed by
strides. The loop over sparse blocks and the steps in each is one, pipelined over sparse blocks.
Order, tile, warps and stages are the quickest of those listed below, for each product, transpose and kind
of mask at density 0.25. Sparse blocks of 64 and 32 are not joined.

Every result is compared with torch's fp32 product: all elements, masked-out sparse blocks being NaN in operands
and, where C is sparse, still NaN in C. Times: medians between CUDA events after 50 ms of warm-up, L2
flushed before each; a pause on the GPU before each keeps the host's launch out of the time.
"""
import argparse
import os
import statistics
import sys

import torch
import triton
import triton.language as tl

KINDS = [  # mask, side of a sparse block, --quick runs it
    ("random", 128, True),
    ("random", 64, True),
    ("random", 32, True),
    ("diagonal", 128, False),
    ("diagonal", 32, True),
    ("batch", 32, True),
]
SHAPE = {"random": 0, "diagonal": 1, "batch": 2}  # as the bench numbers them
DENSITIES = [0.05, 0.1, 0.25, 0.5, 0.75, 1.0]
PASSES = [  # forward product, pass, the call that it is, its transposes
    ("sdd", "forward", "sdd", "NN"),
    ("sdd", "dA", "dsd", "NT"),
    ("sdd", "dB", "dds", "TN"),
    ("dsd", "forward", "dsd", "NN"),
    ("dsd", "dA", "sdd", "NT"),
    ("dsd", "dB", "dsd", "TN"),
    ("dds", "forward", "dds", "NN"),
    ("dds", "dA", "dds", "NT"),
    ("dds", "dB", "sdd", "TN"),
]
COLUMNS = ("by,mask,block,density,kept,product,pass,call,transposes,tile,ms,dense_ms,ratio,like_ms,"
           "like_ratio,tflops")

# Width of the tile along the dense operand (of sdd: none), step along k, stages, warps. Where the index of
# a sparse block is read first, half of the stages are that read's: 5 stages leave 3 buffers, 7 leave 4.
WIDE = {
    128: [(256, 64, 5, 8), (256, 64, 7, 8), (128, 64, 7, 8), (128, 64, 5, 4), (128, 128, 5, 8)],
    64: [(256, 64, 5, 4), (256, 64, 7, 8), (256, 32, 7, 4), (128, 64, 5, 4), (128, 64, 7, 4)],
    32: [(256, 32, 7, 4), (256, 32, 9, 8), (128, 32, 7, 4), (128, 32, 9, 2), (64, 32, 9, 2)],
}
SQUARE = {
    128: [(0, 64, 4, 8), (0, 64, 3, 4), (0, 64, 4, 4), (0, 32, 5, 4), (0, 128, 3, 8)],
    64: [(0, 64, 4, 4), (0, 64, 6, 4), (0, 128, 3, 4), (0, 128, 4, 4), (0, 64, 4, 2)],
    32: [(0, 64, 4, 1), (0, 64, 5, 2), (0, 128, 3, 2), (0, 128, 4, 4), (0, 64, 4, 4)],
}


@triton.jit
def sdd_kernel(a, b, c, block_row, block_column, K, sam, sak, sbk, sbn, scm, scn, B: tl.constexpr,
               BK: tl.constexpr):
    p = tl.program_id(0)
    m = tl.load(block_row + p) * B + tl.arange(0, B)
    n = tl.load(block_column + p) * B + tl.arange(0, B)
    k = tl.arange(0, BK)
    a_at = a + m[:, None] * sam + k[None, :] * sak
    b_at = b + k[:, None] * sbk + n[None, :] * sbn
    acc = tl.zeros((B, B), dtype=tl.float32)
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(a_at), tl.load(b_at), acc)
        a_at += BK * sak
        b_at += BK * sbk
    tl.store(c + m[:, None] * scm + n[None, :] * scn, acc.to(c.dtype.element_ty))


@triton.jit
def grouped(strips, tiles, GROUP: tl.constexpr):
    """Strip and tile of this program: GROUP strips side by side, so that what runs together shares
    both operands."""
    p = tl.program_id(0)
    first = p // (GROUP * tiles) * GROUP
    height = tl.minimum(strips - first, GROUP)
    within = p % (GROUP * tiles)
    return first + within % height, within // height


@triton.jit
def strip_product(a, b, c, offset, index, strip, m, n, sam, sak, sbk, sbn, scm, scn, M: tl.constexpr,
                  N: tl.constexpr, B: tl.constexpr, BK: tl.constexpr):
    """The rows m and columns n of C, over the blocks that are present in a strip."""
    k = tl.arange(0, BK)
    begin = tl.load(offset + strip)
    end = tl.load(offset + strip + 1)
    STEPS: tl.constexpr = B // BK
    a_at = a + m[:, None] * sam + k[None, :] * sak
    b_at = b + k[:, None] * sbk + n[None, :] * sbn
    acc = tl.zeros((M, N), dtype=tl.float32)
    for step in range(0, (end - begin) * STEPS):
        at = tl.load(index + begin + step // STEPS) * B + step % STEPS * BK
        acc = tl.dot(tl.load(a_at + at * sak), tl.load(b_at + at * sbk), acc)
    tl.store(c + m[:, None] * scm + n[None, :] * scn, acc.to(c.dtype.element_ty))


@triton.jit
def dsd_kernel(a, b, c, offset, index, strips, tiles, sam, sak, sbk, sbn, scm, scn, B: tl.constexpr,
               WIDTH: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    strip, tile = grouped(strips, tiles, GROUP)
    strip_product(a, b, c, offset, index, strip, strip * B + tl.arange(0, B),
                  tile * WIDTH + tl.arange(0, WIDTH), sam, sak, sbk, sbn, scm, scn, B, WIDTH, B, BK)


@triton.jit
def dds_kernel(a, b, c, offset, index, strips, tiles, sam, sak, sbk, sbn, scm, scn, B: tl.constexpr,
               WIDTH: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    strip, tile = grouped(strips, tiles, GROUP)
    strip_product(a, b, c, offset, index, strip, tile * WIDTH + tl.arange(0, WIDTH),
                  strip * B + tl.arange(0, B), sam, sak, sbk, sbn, scm, scn, WIDTH, B, B, BK)


# ---- masks, as bench_block_sparse.cu makes them ----


def bench_hash(a, b):
    """a: int64 tensor or int, b: int; both taken modulo 2^32."""
    full = 0xFFFFFFFF
    h = (a * 0x9E3779B9 & full) ^ (b + 0x7F4A7C15 & full)
    h = (h ^ h >> 16) * 0x85EBCA6B & full
    h = (h ^ h >> 13) * 0xC2B2AE35 & full
    return h ^ h >> 16


def choose(n, count, seed):
    order = torch.argsort(bench_hash(torch.arange(n, dtype=torch.int64), seed), stable=True)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen


def make_mask(mask, block, density, size):
    """Bool [blocks, blocks] on the host; None where the bench has no such row."""
    blocks, groups, each = size // block, size // 128, 128 // block  # groups: of 128 rows or columns
    seed = SHAPE[mask] * 100000 + block * 100 + int(density * 100 + 0.5)
    if mask == "random":
        return choose(blocks * blocks, max(1, int(density * blocks * blocks + 0.5)),
                      seed).reshape(blocks, blocks)
    if mask == "batch":
        chosen = choose(groups, max(1, int(density * groups + 0.5)), seed)
        return chosen.repeat_interleave(each).expand(blocks, blocks).contiguous()
    experts = min(int(1 / density + 0.5), groups)
    if experts == 1 and density < 1:
        return None
    kept = torch.zeros(blocks, blocks, dtype=torch.bool)
    share = [1024 + (bench_hash(e, seed) & 1023) for e in range(experts)]
    row = column = done = 0
    for e in range(experts):
        done += share[e]
        row_end = (done * groups + sum(share) // 2) // sum(share)
        row_end = min(max(row_end, row + 1), groups - (experts - 1 - e))
        column_end = ((e + 1) * groups + experts // 2) // experts
        kept[row * each : row_end * each, column * each : column_end * each] = True
        row, column = row_end, column_end
    return kept


class Lists:
    """Offsets and indices of the present sparse blocks by rows and by columns, and these in two orders."""

    def __init__(self, kept, device):
        def one_way(k):
            offset = torch.zeros(k.shape[0] + 1, dtype=torch.int32)
            offset[1:] = k.sum(1).cumsum(0)
            return offset.to(device), k.nonzero()[:, 1].to(torch.int32).to(device)

        self.by_row, self.by_column = one_way(kept), one_way(kept.t().contiguous())
        row, column = kept.nonzero().t()
        eight = torch.argsort((row // 8 * kept.shape[1] + column) * 8 + row % 8)
        self.orders = [(row.to(torch.int32).to(device), column.to(torch.int32).to(device)),
                       (row[eight].to(torch.int32).to(device), column[eight].to(torch.int32).to(device))]
        self.kept = kept.float().mean().item()
        self.mask = kept.to(device)


def spread(kept, block):
    """The mask of sparse blocks as one of elements."""
    return kept.repeat_interleave(block, 0).repeat_interleave(block, 1)


# ---- one row ----


def operands(call, transposes, x, y, sparse, size):
    """A and B as they are multiplied; a transposed one is a view."""
    a, b = {"sdd": (x, y), "dsd": (sparse, y), "dds": (y, sparse)}[call]
    return (a.t() if transposes == "TN" else a), (b.t() if transposes == "NT" else b)


def launcher(call, transposes, a, b, c, lists, block, config, order):
    width, step, stages, warps = config
    M, K = a.shape
    N = b.shape[1]
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1), c.stride(0), c.stride(1))
    how = {"num_stages": stages, "num_warps": warps}
    if call == "sdd":
        row, column = lists.orders[order]
        return lambda: sdd_kernel[(row.numel(),)](a, b, c, row, column, K, *strides, block, step, **how)
    if call == "dsd":
        offset, index = lists.by_column if transposes == "TN" else lists.by_row
        strips, tiles, kernel = M // block, N // width, dsd_kernel
    else:
        offset, index = lists.by_row if transposes == "NT" else lists.by_column
        strips, tiles, kernel = N // block, M // width, dds_kernel
    group = 1 if order == 0 else max(1, 1024 // block)
    return lambda: kernel[(strips * tiles,)](a, b, c, offset, index, strips, tiles, *strides, block,
                                             width, step, group, **how)


def configs(call, block, size):
    for order in (1, 0):
        for config in (SQUARE if call == "sdd" else WIDE)[block]:
            if config[0] <= size and config[1] <= (size if call == "sdd" else block):
                yield config, order


def config_name(call, block, config, order):
    width, step, stages, warps = config
    tile = f"{block}x{width or block}" if call != "dds" else f"{width}x{block}"
    return f"{tile}x{step} {stages} stages {warps} warps{'' if order else ' in rows'}"


class Reference:
    """What a call should give: fp32 products of the operands with zeros for masked-out sparse blocks."""

    def __init__(self, call, a, b, kept_elements):
        clean = [torch.nan_to_num(v.float(), nan=0.0) for v in (a, b)]
        self.want = clean[0] @ clean[1]
        k = a.shape[1]
        self.bound = (clean[0].abs() @ clean[1].abs()) * ((k / 16 + 2) * 2.0**-23)
        self.bound += self.want.abs() / 256 + 1e-5
        self.kept = kept_elements if call == "sdd" else None

    def check(self, c, name):
        error = (c.float() - self.want).abs() / self.bound
        if self.kept is not None:
            if not torch.isnan(c[~self.kept]).all():
                raise SystemExit(f"{name}: masked-out sparse blocks were written")
            error = error[self.kept]
        worst = error.max().item()
        if not (worst <= 1.0 and self.want.abs().max().item() > 0.01):
            raise SystemExit(f"{name}: wrong, {worst} of the bound")
        return worst


def time_ms(call, reps, flush, warm_ms=50.0):
    def once():
        flush.zero_()
        torch.cuda._sleep(400000)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        return begin, end

    spent = 0.0
    while spent < warm_ms:
        pairs = [once() for _ in range(8)]
        pairs[-1][1].synchronize()
        spent += pairs[0][0].elapsed_time(pairs[-1][1])
    times = []
    for _ in range(reps):
        begin, end = once()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def tune(call, transposes, a, b, c, lists, block, size, flush):
    """The quickest configuration and its order; those that do not compile or fit are left out."""
    best = None
    for config, order in configs(call, block, size):
        run = launcher(call, transposes, a, b, c, lists, block, config, order)
        try:
            run()
            ms = time_ms(run, 5, flush, 5.0)
        except triton.runtime.errors.OutOfResources:
            continue
        if best is None or ms < best[0]:
            best = (ms, config, order)
    return best[1:]


def make_operands(size, device, dtype):
    torch.manual_seed(7)
    x = torch.randn(size, size, device=device).to(dtype)
    y = (torch.randn(size, size, device=device) / size**0.5).to(dtype)
    return x, y


def check_all(size, dtype, wanted):
    """Every kernel once, on any device; small sizes under TRITON_INTERPRET=1."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = make_operands(size, device, dtype)
    for mask, block, _ in wanted:
        for density in (0.25, 0.5):
            kept = make_mask(mask, block, density, size)
            if kept is None:
                continue
            lists = Lists(kept, device)
            elements = spread(lists.mask, block)
            sparse = x.masked_fill(~elements, float("nan"))
            worst = 0.0
            for product, name, call, transposes in PASSES:
                a, b = operands(call, transposes, x, y, sparse, size)
                reference = Reference(call, a, b, elements)
                for config, order in list(configs(call, block, size))[:: 3 if device == "cpu" else 1]:
                    c = torch.full((size, size), float("nan"), device=device, dtype=dtype)
                    try:
                        launcher(call, transposes, a, b, c, lists, block, config, order)()
                    except triton.runtime.errors.OutOfResources:
                        continue
                    worst = max(worst, reference.check(c, f"{mask}-{block} {product} {name} {config}"))
            print(f"{mask}-{block}, d {lists.kept:.4f}: right, worst error {worst:.2f} of its bound",
                  flush=True)


def run_kind(by, mask, block, args, x, y, flush, csv, prepare):
    """All rows of one kind of mask. prepare(mask, block, call, transposes, a, b, c, lists) gives what
    is to be timed, where it leaves C, and a name for its tile; or None."""
    size = args.size
    flops = 2.0 * size**3
    c = torch.empty_like(x)
    like = {}
    for transposes in ("NN", "NT", "TN"):
        a, b = operands("sdd", transposes, x, y, None, size)
        like[transposes] = time_ms(lambda: torch.matmul(a, b, out=c), args.reps, flush)
    print("torch.matmul, dense: " + ", ".join(f"{t} {ms:.4f} ms, {flops / ms * 1e-9:.0f} TFLOPS"
                                               for t, ms in like.items()))
    experts = 0
    for density in [0.1, 0.25, 0.5] if args.quick else DENSITIES:
        kept = make_mask(mask, block, density, size)
        if mask == "diagonal":  # as many experts as before: that mask has been
            now = min(int(1 / density + 0.5), size // 128)
            if kept is None or now == experts:
                continue
            experts = now
        lists = Lists(kept, x.device)
        elements = spread(lists.mask, block)
        sparse = x.masked_fill(~elements, float("nan"))
        print(f"{mask}-{block}, d {lists.kept:.4f}")
        for product, name, call, transposes in PASSES:
            a, b = operands(call, transposes, x, y, sparse, size)
            run, result, tile = prepare(mask, block, call, transposes, a, b, c, lists)
            c.fill_(float("nan"))
            run()
            Reference(call, a, b, elements).check(result(), f"{mask}-{block} {density} {product} {name}")
            ms = time_ms(run, args.reps, flush)
            tflops = flops * lists.kept / ms * 1e-9
            print(f"  {product} {name:7s}  {call} {transposes} {ms:9.4f} ms {ms / like['NN']:8.3f} of "
                  f"torch dense, {ms / like[transposes]:6.3f} of its {transposes} {tflops:7.1f} TFLOPS  "
                  f"{tile}", flush=True)
            if csv:
                csv.write(f"{by},{mask},{block},{density:g},{lists.kept:.5f},{product},{name},{call},"
                          f"{transposes},{tile},{ms:.5f},{like['NN']:.5f},{ms / like['NN']:.4f},"
                          f"{like[transposes]:.5f},{ms / like[transposes]:.4f},{tflops:.1f}\n")
                csv.flush()


def parse(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", type=int, default=8192, help="m = n = k, a multiple of 256")
    parser.add_argument("--reps", type=int, default=11)
    parser.add_argument("--quick", action="store_true",
                        help="densities 0.1, 0.25 and 0.5, no diagonal-128")
    parser.add_argument("--only", help="one kind of mask, as random-128")
    parser.add_argument("--csv")
    parser.add_argument("--check", action="store_true", help="no timing")
    args = parser.parse_args()
    if args.size < 256 or args.size % 256 or args.size > 32768:
        parser.error("--size: a multiple of 256, at most 32768")
    args.kinds = [k for k in KINDS if args.only in (None, f"{k[0]}-{k[1]}") and (k[2] or not args.quick)]
    if not args.kinds:
        parser.error("--only: no such kind, or none that --quick runs")
    return args


def open_gpu(size):
    """Operands, what flushes L2, and an untouched GPU state."""
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
          f"bf16, {size}^3")
    x, y = make_operands(size, "cuda", torch.bfloat16)
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    return x, y, torch.empty(4 * l2, dtype=torch.int8, device="cuda")


def main():
    args = parse(__doc__.splitlines()[0])
    if args.check and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        # Triton's interpreter multiplies the bits of bf16 as integers.
        check_all(args.size, torch.bfloat16 if torch.cuda.is_available() else torch.float16, args.kinds)
        return
    if not torch.cuda.is_available():
        print("no GPU, skipped")
        sys.exit(77)
    x, y, flush = open_gpu(args.size)
    csv = open(args.csv, "w") if args.csv else None
    if csv:
        csv.write(COLUMNS + "\n")
    chosen = {}

    def prepare(mask, block, call, transposes, a, b, c, lists):
        key = mask, block, call, transposes
        if key not in chosen:
            at = lists if mask == "diagonal" else Lists(make_mask(mask, block, 0.25, args.size), x.device)
            chosen[key] = tune(call, transposes, a, b, c, at, block, args.size, flush)
        config, order = chosen[key]
        return (launcher(call, transposes, a, b, c, lists, block, config, order), lambda: c,
                config_name(call, block, config, order))

    with torch.no_grad():
        for mask, block, _ in args.kinds:
            run_kind("triton", mask, block, args, x, y, flush, csv, prepare)


if __name__ == "__main__":
    main()
