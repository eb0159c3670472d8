"""Expert products and whole layers of Python libraries, at the shapes of bench_layer.cu.

    python3 bench/compare/experts_peers.py [--shape T,H,I,E,K]... [--peers NAME,...] [--reps N] [--training]

Needs torch and one GPU; nothing of this collection. --training times forward + backward of the layers instead,
with the gradients of x, router, w1 and w2, and prints what the allocator's peak holds beside inputs. A peer
that is not installed, or does not run, is one line "skipped: ..."; the others go on. Exit code 77 without a GPU,
1 where a peer's result was wrong.

    torch       grouped_mm for the two products; an eager layer over it
    deepgemm    its bf16 grouped product, the rows of an expert padded to its alignment beforehand
    sonic       SonicMoE's layer (pip install sonic-moe; QuACK must lie in a folder site-packages). The first
                call of a shape compiles and tunes: minutes, more of them in training
    liger       Liger's Triton layer (pip install liger-kernel). It waits in each call: its host time counts
    scatter     ScatterMoE's experts, Triton, over the same router (github.com/shawntan/scattermoe)

Routing is that of a random router, the same for all peers: top K of bf16 logits, softmax over the K. A layer's
time is from x to y, router included; a product's rows lie in expert order already. What a call allocates
comes from torch's cache.

Every result is compared with fp32 sums before it is timed. The peers of a shape and torch.mm are timed in turn,
L2 flushed before each call; times are medians between CUDA events. The last column is a speed: the time of
torch.mm's dense product with the same rows over the peer's; for layers, of both dense products; for forward +
backward, three times that.
"""
import argparse
import importlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

SHAPES = [  # T, H, I, E, K
    (32768, 4096, 1536, 128, 8), (24576, 1536, 256, 128, 8), (16384, 4096, 14336, 8, 2),
    (8192, 7168, 2048, 256, 8), (8192, 2048, 768, 128, 8), (32768, 2048, 768, 128, 8),
    (8192, 4096, 14336, 8, 2), (8192, 2048, 512, 512, 10), (8192, 2880, 2880, 128, 4),
]
DEVICE = "cuda"
BOUND = 0.01  # of |got - want| / |want| over sampled rows; bf16 rounds to 2^-9
GRADIENT_BOUND = 0.02  # the same: gradients pass through more roundings


class Case:
    """Operands of a shape and their routing. R = T * K rows, in expert order."""

    def __init__(self, shape):
        T, H, I, E, K = self.shape = shape
        torch.manual_seed(sum(shape))

        def random(*size, scale=1.0):
            return torch.randn(*size, device=DEVICE, dtype=torch.bfloat16).mul_(scale)

        self.x, self.router, self.dy = random(T, H), random(E, H, scale=H**-0.5), random(T, H)
        self.w1, self.w2 = random(E, 2 * I, H, scale=H**-0.5), random(E, H, I, scale=I**-0.5)
        ids = self.route()[1]
        order, self.end = self.sort(ids)  # [R] row -> slot, [E] last row + 1
        self.expert = ids.reshape(-1)[order]  # [R]
        self.a = {"up": self.x[order // K], "down": random(T * K, I)}  # [R, H], [R, I]
        self.w = {"up": self.w1, "down": self.w2}
        self.flops = {"up": 4 * T * K * H * I, "down": 2 * T * K * H * I, "layer": 6 * T * K * H * I,
                      "training": 18 * T * K * H * I}

    def route(self):
        """Weights [T, K] fp32 and ids [T, K]."""
        logit, ids = F.linear(self.x, self.router).topk(self.shape[4], dim=1)
        return torch.softmax(logit.float(), dim=1), ids

    def sort(self, ids):
        flat = ids.reshape(-1)
        end = torch.bincount(flat, minlength=self.shape[3]).cumsum(0).to(torch.int32)
        return torch.argsort(flat, stable=True), end

    def error_of_product(self, part, got, place=None):
        """Over 64 rows; row r of the product is got[place[r]]."""
        rows = torch.arange(64, device=DEVICE) * self.expert.numel() // 64
        want = torch.stack([self.w[part][e].float() @ self.a[part][r].float()
                            for r, e in zip(rows.tolist(), self.expert[rows].tolist())])
        return relative_error(got[rows if place is None else place[rows]], want)

    def sure(self, n):
        """Up to n tokens whose choice does not depend on the order of equal logits."""
        T, H, I, E, K = self.shape
        most = F.linear(self.x, self.router).topk(min(K + 1, E), dim=1).values
        return (most[:, K - 1] > most[:, -1]).nonzero()[:n, 0] if K < E else torch.arange(min(n, T), device=DEVICE)

    def layer(self, x, tokens, interleaved):
        """y [n, H] in fp32 for x [n, H] fp32, the rows of these tokens."""
        I, logit = self.shape[2], F.linear(x, self.router.float())
        ids = self.route()[1][tokens]
        weight, y = torch.softmax(logit.gather(1, ids), dim=1), []
        for i, chosen in enumerate(ids.tolist()):
            rows = [expert(x[i], self.w1[e].float(), self.w2[e].float(), interleaved) for e in chosen]
            y.append(weight[i] @ torch.stack(rows))
        return torch.stack(y)

    def error_of_layer(self, got, interleaved=False):
        """Over 32 tokens. interleaved: w1 has gate and up rows in turn, not all gates first."""
        tokens = self.sure(32)
        return relative_error(got[tokens], self.layer(self.x[tokens].float(), tokens, interleaved))

    def error_of_gradients(self, got, interleaved=False):
        """The greatest of: dx over 8 tokens; drouter's norm; dw1 and dw2 of the middle row's expert. got: dx,
        drouter, dw1, dw2."""
        weight, ids = self.route()
        tokens, e = self.sure(8), self.expert[self.expert.numel() // 2].item()
        token, k = (ids == e).nonzero(as_tuple=True)
        with torch.enable_grad():
            x, w1, w2 = (v.detach().float().requires_grad_() for v in (self.x[tokens], self.w1[e], self.w2[e]))
            dx = torch.autograd.grad(self.layer(x, tokens, interleaved), x, self.dy[tokens].float())[0]
            y = weight[token, k][:, None] * expert(self.x[token].float(), w1, w2, interleaved)
            dw1, dw2 = torch.autograd.grad(y, (w1, w2), self.dy[token].float())
        errors = [relative_error(got[0][tokens], dx), relative_error(got[2][e], dw1), relative_error(got[3][e], dw2)]
        return max(errors) if got[1].float().norm() > 0 else float("nan")

    def training(self, layer, leaves=None):
        """A call of layer() and its backward pass that returns the gradients of x, router, w1, w2 (or leaves)."""
        leaves = leaves or (self.x, self.router, self.w1, self.w2)

        def call():
            with torch.enable_grad():
                for leaf in leaves:
                    leaf.requires_grad_()
                return torch.autograd.grad(layer(), leaves, self.dy)
        return call


def expert(x, w1, w2, interleaved=False):
    h = F.linear(x, w1)
    gate, up = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
    return F.linear(F.silu(gate) * up, w2)


def relative_error(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


# Each peer gives entries: name, part (which flops and which dense product), call() that runs it and returns the
# result, check(result) that returns its error. main() runs those of the parts that were asked for.


def torch_peer(case, module):
    T, H, I, E, K = case.shape
    grouped = getattr(F, "grouped_mm", None) or module._grouped_mm

    def layer():
        weight, ids = case.route()
        order, end = case.sort(ids)
        h = grouped(case.x[order // K], case.w1.transpose(1, 2), offs=end)
        rows = grouped(F.silu(h[:, :I]) * h[:, I:], case.w2.transpose(1, 2), offs=end)
        slots = torch.empty_like(rows).index_copy_(0, order, rows).view(T, K, H)
        return torch.bmm(weight.to(rows.dtype)[:, None], slots)[:, 0]

    for part in ("up", "down"):
        yield (f"torch grouped_mm, {part}", part,
               lambda part=part: grouped(case.a[part], case.w[part].transpose(1, 2), offs=case.end),
               lambda got, part=part: case.error_of_product(part, got))
    yield "torch eager layer, grouped_mm", "layer", layer, case.error_of_layer
    yield ("torch eager layer, grouped_mm, forward + backward", "training", case.training(layer),
           case.error_of_gradients)


def pad(case, alignment):
    """Place [R] of each row when experts' rows are padded; expert of each padded row, -1: padding."""
    count = torch.bincount(case.expert, minlength=case.shape[3])
    padded = (count + alignment - 1) // alignment * alignment
    shift = (padded.cumsum(0) - padded) - (count.cumsum(0) - count)
    place = torch.arange(case.expert.numel(), device=DEVICE) + shift[case.expert]
    index = torch.full((int(padded.sum()),), -1, dtype=torch.int32, device=DEVICE)
    index[place] = case.expert.to(torch.int32)
    return place, index


def deepgemm_peer(case, module):
    place, index = pad(case, module.get_mk_alignment_for_contiguous_layout())
    for part in ("up", "down"):
        w = case.w[part]
        a = w.new_zeros(index.numel(), w.shape[2]).index_copy_(0, place, case.a[part])
        c = w.new_empty(index.numel(), w.shape[1])

        def call(w=w, a=a, c=c):
            module.m_grouped_bf16_gemm_nt_contiguous(a, w, c, index)
            return c

        yield (f"DeepGEMM grouped, {part}", part, call,
               lambda got, part=part: case.error_of_product(part, got, place))


def sonic_peer(case, module):
    stream = torch.cuda.current_stream().cuda_stream

    def layer(inference):
        w1, w2 = case.w1.permute(1, 2, 0), case.w2.permute(1, 2, 0)  # [2I, H, E], [H, I, E]
        return module.moe_TC_softmax_topk_layer(case.x, case.router, w1, None, w2, None, case.shape[4], stream,
                                                "swiglu", inference)[0]

    yield ("SonicMoE layer, inference", "layer", lambda: layer(True),
           lambda got: case.error_of_layer(got, interleaved=True))
    yield ("SonicMoE layer, forward + backward", "training", case.training(lambda: layer(False)),
           lambda got: case.error_of_gradients(got, interleaved=True))


def liger_peer(case, module):
    def layer():
        weight, ids = case.route()
        return module.LigerFusedMoEFunction.apply(case.x, case.w1, case.w2, ids.to(torch.int32), weight)

    yield "Liger layer, Triton", "layer", layer, case.error_of_layer
    yield "Liger layer, Triton, forward + backward", "training", case.training(layer), case.error_of_gradients


def scatter_peer(case, module):
    T, H, I, E, K = case.shape
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            mlp = module.GLUMLP(H, I, E, K)
    finally:
        torch.set_default_dtype(torch.float32)
    w1, w2 = mlp.experts.weight, mlp.output_experts.weight  # [E, 2I, H] with the ups first, [E, H, I]
    with torch.no_grad():
        w1.copy_(case.w1.roll(I, 1))
        w2.copy_(case.w2)

    def layer():
        weight, ids = case.route()
        return mlp(case.x, weight.to(torch.bfloat16), ids)

    yield "ScatterMoE experts, Triton", "layer", layer, case.error_of_layer
    yield ("ScatterMoE experts, Triton, forward + backward", "training",
           case.training(layer, (case.x, case.router, w1, w2)),
           lambda got: case.error_of_gradients((got[0], got[1], got[2].roll(I, 1), got[3])))


PEER = {  # name: module, entries
    "torch": ("torch", torch_peer), "deepgemm": ("deep_gemm", deepgemm_peer),
    "sonic": ("sonicmoe", sonic_peer), "liger": ("liger_kernel.ops.fused_moe", liger_peer),
    "scatter": ("scattermoe.mlp", scatter_peer),
}


def in_turn(calls, reps, flush):
    """Median milliseconds of each call. A pause on the GPU before each hides the host's launches."""
    times = [[] for _ in calls]
    for r in range(3 + reps):  # three rounds of warm-up
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        for call, (begin, end) in zip(calls, events):
            flush.zero_()
            torch.cuda._sleep(4000000)  # clocks: 2 ms or more
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        if r >= 3:
            for own, (begin, end) in zip(times, events):
                own.append(begin.elapsed_time(end))
    return [statistics.median(own) for own in times]


def skip(name, reason):
    print(f"skipped: {name}: {type(reason).__name__}: {' '.join(str(reason).split())[:200]}", flush=True)


def run_shape(shape, modules, parts, reps, flush):
    """Returns the number of wrong results."""
    T, H, I, E, K = shape
    print(f"T {T} H {H} I {I} E {E} K {K}", flush=True)
    torch.cuda.empty_cache()
    case, entries, wrong = Case(shape), [], 0
    bound = GRADIENT_BOUND if "training" in parts else BOUND
    for part in ("up", "down"):
        c = torch.empty(T * K, case.w[part].shape[1], dtype=torch.bfloat16, device=DEVICE)
        entries.append((f"torch.mm dense, {part}", part,
                        lambda part=part, c=c: torch.mm(case.a[part], case.w[part][0].t(), out=c)))
    for name, module in modules.items():
        try:
            for what, part, call, check in PEER[name][1](case, module):
                if part not in parts:
                    continue
                began, held = time.time(), torch.cuda.memory_allocated()
                error = check(call())  # reads the result: waits for the GPU
                took = time.time() - began
                torch.cuda.reset_peak_memory_stats()
                call()
                peak = (torch.cuda.max_memory_allocated() - held) * 1e-6
                verdict = "" if error <= bound else ": WRONG, not timed"  # NaN too
                print(f"  {what}: {took:.1f} s at first, peak {peak:.0f} MB, error {error:.1e}{verdict}", flush=True)
                wrong += verdict != ""
                entries += [] if verdict else [(what, part, call)]
        except Exception as reason:  # a shape or a GPU that the peer does not support, or no memory
            skip(name, reason)
    times = in_turn([call for _, _, call in entries], reps, flush)
    dense = {"up": times[0], "down": times[1], "layer": times[0] + times[1],
             "training": 3 * (times[0] + times[1])}
    for (what, part, _), ms in zip(entries, times):
        print(f"  {what:58s} {ms:9.4f} ms {case.flops[part] / ms * 1e-9:9.2f} TFLOPS  {dense[part] / ms:6.3f} "
              "of torch.mm dense", flush=True)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", metavar="T,H,I,E,K")
    parser.add_argument("--peers", default=",".join(PEER), help="of " + ",".join(PEER))
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--training", action="store_true", help="forward + backward of the layers")
    args = parser.parse_args()
    shapes = [tuple(map(int, s.split(","))) for s in args.shape or []] or SHAPES
    names = args.peers.split(",")
    if args.reps < 1 or not set(names) <= set(PEER) or any(len(s) != 5 or s[4] > s[3] for s in shapes):
        parser.error("--reps N >= 1; --peers of " + ",".join(PEER) + "; --shape T,H,I,E,K with K <= E")
    if not torch.cuda.is_available():
        print("no GPU, skipped")
        sys.exit(77)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, SwiGLU, random routing")
    modules = {}
    for name in names:
        try:
            modules[name] = importlib.import_module(PEER[name][0])
        except Exception as reason:  # not installed, or a torch that it cannot be imported under
            skip(name, reason)
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    flush = torch.empty(4 * l2, dtype=torch.int8, device=DEVICE)
    parts = ("training",) if args.training else ("up", "down", "layer")
    with torch.no_grad():
        wrong = sum(run_shape(shape, modules, parts, args.reps, flush) for shape in shapes)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
