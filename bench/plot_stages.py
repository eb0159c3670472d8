"""Plot of a training step's time by stage, from what bench_layer_backward wrote with --csv.

    python3 bench/plot_stages.py layer.csv [--svg FILE]

Needs nothing but Python. Each shape has a bar: the stages of forward, then those of backward, each timed by
itself, in units of cuBLAS's two dense products of the forward pass. A step of three times these would be 3. The
mark below a bar is the step as one CUDA graph. The same numbers go to stdout as a Markdown table.
"""
import argparse
import csv
import html
import sys

STEP = "forward + backward in a graph, bf16"
SHADES = {"forward": ("#0b62a4", "#5b9bd0"), "backward": ("#d1601a", "#eb9c63")}  # of neighbours, in turn
WIDTH, BAR, ROW, LEFT, TOP = 900, 26, 62, 12, 44


def read(path):
    """[(shape, [(pass, stage, units)], units of the step)]"""
    shapes, unit = [], 0.0  # 0: a shape without dense products to compare with, which is left out
    with open(path, newline="") as f:
        for r in csv.reader(f):
            what = r[0].strip()
            if what.startswith("T "):
                shapes.append([what, [], 0.0])
                unit = 0.0
            elif shapes and what == STEP and float(r[4]) > 0:
                shapes[-1][2], unit = float(r[4]), float(r[1]) / float(r[4])
            elif unit > 0 and what.split(", ")[0] in SHADES and len(what.split(", ")) == 2 and r[5].startswith("forward"):
                shapes[-1][1].append((*what.split(", "), float(r[1]) / unit))
    return [tuple(s) for s in shapes if s[1]]


def table(shapes):
    for shape, stages, step in shapes:
        print(f"\n{shape}: step {step:.3f}, sum of stages {sum(s[2] for s in stages):.3f}\n")
        print("| stage | times both dense products |\n|---|---|")
        for name, stage, units in stages:
            print(f"| {name}, {stage} | {units:.3f} |")


def plot(shapes, path):
    most = max(max(sum(s[2] for s in stages), step) for _, stages, step in shapes) * 1.03
    wide, height = WIDTH - 2 * LEFT, TOP + ROW * len(shapes) + 34
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">',
           f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>']

    def text(x, y, s, anchor="start", size=11, color="#000"):
        out.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}">'
                   f"{html.escape(s)}</text>")

    x = LEFT
    for name, colors in SHADES.items():
        out.append(f'<rect x="{x}" y="12" width="16" height="12" fill="{colors[0]}"/>')
        text(x + 22, 22, name, size=12)
        x += 110
    text(x, 22, "a unit: cuBLAS's two dense products of the forward pass", size=12)
    bottom = TOP + ROW * len(shapes)
    for tick in range(int(most) + 1):
        at = LEFT + tick / most * wide
        out.append(f'<path d="M{at:.1f},{TOP - 8}V{bottom}" stroke="#ddd"/>')
        text(at, bottom + 14, str(tick), "middle")
    for i, (shape, stages, step) in enumerate(shapes):
        y, x = TOP + i * ROW + 14, LEFT
        text(LEFT, y - 4, shape)
        for n, (name, stage, units) in enumerate(stages):
            w = units / most * wide
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{BAR}" fill="{SHADES[name][n % 2]}">'
                       f"<title>{html.escape(f'{name}, {stage}: {units:.3f}')}</title></rect>")
            if w > 8 + 6 * len(stage):
                text(x + w / 2, y + BAR / 2 + 4, stage, "middle", 11, "#fff")
            x += w
        at = LEFT + step / most * wide
        out.append(f'<path d="M{at:.1f},{y + BAR}l-5,9h10z" fill="#222"/>')
        text(at + 8, y + BAR + 10, f"step in a graph: {step:.2f}" if at < WIDTH - 150 else f"{step:.2f}")
    with open(path, "w") as f:
        f.write("\n".join(out + ["</svg>"]) + "\n")
    print(f"\n{path}: time by stage")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv")
    parser.add_argument("--svg", default="stages.svg")
    args = parser.parse_args()
    shapes = read(args.csv)
    if not shapes:
        sys.exit("no stages: was it written by bench_layer_backward?")
    table(shapes)
    plot(shapes, args.svg)


if __name__ == "__main__":
    main()
