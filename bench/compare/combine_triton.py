"""The combine of experts' rows in PyTorch and Triton, at the shapes of bench_combine.cu.

    python3 bench/compare/combine_triton.py [--reps N]

Needs torch and triton and one GPU; nothing of this collection. Every expert's rows are a tensor of
their own, bf16, the experts of a token are distinct.

    cat + index_add     torch.cat of all experts' rows, times the weights, index_add_ into zeros
    2-D grid, atomics   one Triton launch over (rows of the fullest expert) x (experts): programs past
                        an expert's last row leave at once, the row is read through a table of
                        addresses, weighted in registers and added to its token by atomics

Each result is compared with a sum in float64 before it is timed. Times are medians between CUDA
events, L2 flushed before each, zeroing of the output included; Triton's is the best of several
block sizes. Extra memory is what the allocator's peak shows beside inputs and output.
"""
import argparse
import statistics

import torch
import triton
import triton.language as tl

SHAPES = [  # tokens, hidden, experts, experts of a token
    (8192, 16384, 256, 8),
    (32768, 4096, 128, 8),
    (24576, 1536, 128, 8),
    (16384, 4096, 8, 2),
]


@triton.jit
def scatter_kernel(table, offset, token, weight, y, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    expert = tl.program_id(1)
    begin = tl.load(offset + expert)
    count = tl.load(offset + expert + 1) - begin
    if row < count:
        address = tl.multiple_of(tl.load(table + expert), 16)
        source = address.to(tl.pointer_type(tl.bfloat16)) + row.to(tl.int64) * H
        target = y + tl.load(token + begin + row).to(tl.int64) * H
        w = tl.load(weight + begin + row)
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            inside = column < H
            v = tl.load(source + column, mask=inside, other=0.0).to(tl.float32) * w
            tl.atomic_add(target + column, v.to(y.dtype.element_ty), mask=inside, sem="relaxed")


def make_case(T, H, E, K):
    """Rows of each expert, their tokens and weights in expert order, and the experts' offsets."""
    torch.manual_seed(T + H + E + K)
    ids = torch.rand(T, E, device="cuda").topk(K, dim=1).indices.reshape(-1)  # slot -> expert
    order = torch.argsort(ids, stable=True)
    token = (order // K).to(torch.int32)
    counts = torch.bincount(ids, minlength=E)
    offset = torch.zeros(E + 1, dtype=torch.int32, device="cuda")
    offset[1:] = torch.cumsum(counts, 0)
    weight = 0.3 * torch.randn(T * K, device="cuda")
    rows = [torch.randn(n, H, device="cuda").to(torch.bfloat16) for n in counts.tolist()]
    return rows, token, weight, offset


def check(name, y, rows, token, weight, offset, K):
    """Largest error of the first tokens, over the bound of K products and K sums rounded to y's
    dtype."""
    some = min(64, y.shape[0])
    exact = torch.zeros(some, y.shape[1], dtype=torch.float64, device="cuda")
    size = torch.zeros_like(exact)
    for e, r in enumerate(rows):
        begin = int(offset[e])
        t = token[begin : begin + r.shape[0]].long()
        mine = (t < some).nonzero().reshape(-1)
        v = r[mine].double() * weight[begin : begin + r.shape[0]][mine].double()[:, None]
        exact.index_add_(0, t[mine], v)
        size.index_add_(0, t[mine], v.abs())
    unit = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}[y.dtype]
    worst = ((y[:some].double() - exact).abs() / ((2 * K + 2) * unit * size + 1e-30)).max().item()
    if not (worst <= 1.0 and exact.abs().max().item() > 0.1):
        raise SystemExit(f"{name}: wrong, {worst} of the bound")
    return worst


def median_ms(call, reps, flush):
    for _ in range(3):
        call()
    times = []
    for i in range(reps):
        flush.fill_(i & 127)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def extra_bytes(call):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run_shape(T, H, E, K, reps, flush):
    rows, token, weight, offset = make_case(T, H, E, K)
    table = torch.tensor([r.data_ptr() for r in rows], dtype=torch.int64, device="cuda")
    most = max(r.shape[0] for r in rows)
    index = token.long()
    least = (T * K + T) * H * 2
    print(f"T {T} H {H} E {E} K {K}: fullest expert {most} rows; rows read and tokens written once "
          f"{least / 1e9:.2f} GB")

    y16 = torch.empty(T, H, dtype=torch.bfloat16, device="cuda")
    factor = weight.to(torch.bfloat16)[:, None]

    def cat_index_add():
        joined = torch.cat(rows)
        y16.zero_()
        y16.index_add_(0, index, joined * factor)

    base = report("cat + index_add, torch", cat_index_add, y16, rows, token,
                  weight.to(torch.bfloat16).float(), offset, K, reps, flush, 0.0)

    for dtype in (torch.bfloat16, torch.float32):
        y = y16 if dtype == torch.bfloat16 else torch.empty(T, H, dtype=dtype, device="cuda")
        best = None
        for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8)):

            def scatter(block=block, warps=warps):
                y.zero_()
                scatter_kernel[(most, E)](table, offset, token, weight, y, H, block,
                                          num_warps=warps)

            try:
                scatter()
                ms = median_ms(scatter, 5, flush)
            except Exception as error:  # a Triton that has no bf16 atomics, say
                print(f"  block {block}: {type(error).__name__}: {str(error).splitlines()[:1]}")
                continue
            if best is None or ms < best[0]:
                best = (ms, block, warps, scatter)
        if best:
            name = f"2-D grid, atomics, Triton, y {str(dtype)[6:]}, block {best[1]}, {best[2]} warps"
            report(name, best[3], y, rows, token, weight, offset, K, reps, flush, base)


def report(name, call, y, rows, token, weight, offset, K, reps, flush, base):
    y.fill_(float("nan"))
    call()
    torch.cuda.synchronize()
    worst = check(name, y, rows, token, weight, offset, K)
    extra = extra_bytes(call)
    ms = median_ms(call, reps, flush)
    ratio = f"{base / ms:6.2f} times as fast as cat + index_add" if base else ""
    print(f"  {name:66s} {ms:8.3f} ms  {extra / 2**30:6.2f} GiB extra  error {worst:.2f}  {ratio}")
    return ms


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--reps", type=int, default=30)
    reps = max(20, parser.parse_args().reps)
    if not torch.cuda.is_available():
        print("no GPU, skipped")
        raise SystemExit(77)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    with torch.no_grad():
        for shape in SHAPES:
            run_shape(*shape, reps, flush)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
