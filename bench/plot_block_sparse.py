"""Plot and tables of what bench_block_sparse and bench/compare/block_sparse_*.py wrote with --csv.

    python3 bench/plot_block_sparse.py moe.csv [triton.csv stk.csv] [--svg FILE] [--row "sdd dA"]

Needs nothing but Python. The tables go to stdout as Markdown: times over dense for each mask and density,
and, for each other file, its time over ours, both as ratios to the dense product of their own run. The plot
has a panel for each kind of mask: ratio to dense over density, the line being the median of the nine rows
and the band their range, or with --row the one named.
"""
import argparse
import csv
import html
import statistics
import sys

NAMES = {"moe": "this collection", "triton": "Triton", "stk": "stk (MegaBlocks)"}
COLORS = {"moe": "#0b62a4", "triton": "#d1601a", "stk": "#5a8f29"}
ROWS = [(p, q) for p in ("sdd", "dsd", "dds") for q in ("forward", "dA", "dB")]
WIDTH, HEIGHT, LEFT, TOP = 300, 230, 44, 40  # a panel, and its margins


def read(paths):
    """{by: {(mask, density): {(product, pass): row}}}, in the files' order."""
    data = {}
    for path in paths:
        with open(path, newline="") as f:
            for r in csv.DictReader(f):
                for field in ("kept", "ratio", "like_ratio", "ms"):
                    r[field] = float(r[field])
                at = data.setdefault(r["by"], {}).setdefault((f"{r['mask']}-{r['block']}", r["density"]), {})
                at[r["product"], r["pass"]] = r
    return data


def table(title, masks, cell):
    print(f"\n{title}\n\n| mask, d | " + " | ".join(f"{p} {q}" for p, q in ROWS) + " |")
    print("|---" * (len(ROWS) + 1) + "|")
    for key, rows in masks.items():
        kept = next(iter(rows.values()))["kept"]
        print(f"| {key[0]}, {kept:.3f} | " + " | ".join(cell(key, row) for row in ROWS) + " |")


def tables(data):
    for by, masks in data.items():
        if by not in NAMES:
            continue

        def ratio(key, row):
            r = masks[key].get(row)
            if not r:
                return "-"
            return f"{r['ratio']:.3f}"

        table(f"{NAMES[by]}: time over dense", masks, ratio)
    ours = data.get("moe", {})
    for by in ("triton", "stk"):
        both = {k: v for k, v in ours.items() if k in data.get(by, {})}
        if not both:
            continue

        def times(key, row):
            a, b = ours[key].get(row), data[by][key].get(row)
            return f"{b['ratio'] / a['ratio']:.2f}" if a and b else "-"

        table(f"{NAMES[by]} takes so many times as long as {NAMES['moe']}", both, times)
        cells = [times(k, row) for k in both for row in ROWS]
        cells = [float(c) for c in cells if c != "-"]
        print(f"\n{sum(c > 1 for c in cells)} of {len(cells)} quicker than {NAMES[by]}, from "
              f"{min(cells):.2f} to {max(cells):.2f} times, median {statistics.median(cells):.2f}")


def ticks(most):
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10) if most / s <= 6)
    return [i * step for i in range(int(most / step + 1e-9) + 1)]


def panel(out, x0, y0, kind, data, only):
    """One kind of mask; its lower left corner of the axes is (x0 + LEFT, y0 + HEIGHT - 30)."""
    lines = {}  # by -> [(kept, least, median, most)]
    for by in NAMES:
        for (mask, _), rows in data.get(by, {}).items():
            picked = [r for k, r in rows.items() if only is None or k == only]
            if mask != kind or not picked:
                continue
            ratios = [r["ratio"] for r in picked]
            lines.setdefault(by, []).append((picked[0]["kept"], min(ratios), statistics.median(ratios),
                                             max(ratios)))
    most = max([1.0] + [p[3] for points in lines.values() for p in points]) * 1.05
    left, bottom, wide, high = x0 + LEFT, y0 + HEIGHT - 30, WIDTH - LEFT - 12, HEIGHT - 30 - TOP

    def at(kept, ratio):
        return f"{left + kept * wide:.1f},{bottom - ratio / most * high:.1f}"

    def text(x, y, s, anchor="middle", size=11):
        out.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">'
                   f"{html.escape(s)}</text>")

    text(left + wide / 2, y0 + TOP - 10, kind, size=13)
    text(left + wide / 2, bottom + 27, "share of sparse blocks kept")
    for t in ticks(most):
        y = bottom - t / most * high
        out.append(f'<path d="M{left},{y:.1f}h{wide}" stroke="#ddd"/>')
        text(left - 5, y + 4, f"{t:g}", "end")
    for t in (0, 0.25, 0.5, 0.75, 1):
        text(left + t * wide, bottom + 14, f"{t:g}")
    out.append(f'<path d="M{at(0, 1)}L{at(1, 1)}" stroke="#888"/>')
    out.append(f'<path d="M{left},{bottom - high}v{high}h{wide}" fill="none" stroke="#444"/>')
    for by, points in lines.items():
        points.sort()
        band = [at(p[0], p[3]) for p in points] + [at(p[0], p[1]) for p in reversed(points)]
        out.append(f'<path d="M{"L".join(band)}Z" fill="{COLORS[by]}" fill-opacity="0.18"/>')
        out.append(f'<path d="M{"L".join(at(p[0], p[2]) for p in points)}" fill="none" '
                   f'stroke="{COLORS[by]}" stroke-width="2"/>')
        for p in points:
            x, y = at(p[0], p[2]).split(",")
            out.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{COLORS[by]}"/>')


def plot(data, path, only):
    kinds = list(dict.fromkeys(key[0] for by in NAMES for key in data.get(by, {})))
    columns = min(3, len(kinds))
    rows = (len(kinds) + columns - 1) // columns
    w, h = columns * WIDTH + 10, rows * HEIGHT + 40
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" font-family="sans-serif">',
           f'<rect width="{w}" height="{h}" fill="#fff"/>']
    x = 12
    shown = [(NAMES[by], COLORS[by]) for by in NAMES if by in data]
    for name, color in shown + [("dense", "#888")]:
        out.append(f'<path d="M{x},20h22" stroke="{color}" stroke-width="2"/>'
                   f'<text x="{x + 27}" y="24" font-size="12">{html.escape(name)}</text>')
        x += 50 + 7 * len(name)
    for i, kind in enumerate(kinds):
        panel(out, i % columns * WIDTH, 30 + i // columns * HEIGHT, kind, data, only)
    with open(path, "w") as f:
        f.write("\n".join(out + ["</svg>"]) + "\n")
    print(f"\n{path}: time over dense, " + (" ".join(only) if only else "nine rows: median and range"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="+")
    parser.add_argument("--svg", default="block_sparse.svg")
    parser.add_argument("--row", help='one of the nine, as "dsd forward"; else all')
    args = parser.parse_args()
    only = tuple(args.row.split()) if args.row else None
    if only and only not in ROWS:
        parser.error("--row: one of " + ", ".join(f"{p} {q}" for p, q in ROWS))
    data = read(args.csv)
    if not any(by in data for by in NAMES):
        sys.exit("no rows")
    tables(data)
    plot(data, args.svg, only)


if __name__ == "__main__":
    main()
