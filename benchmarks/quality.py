"""Which quality at which bytes? One picture of the codes, data-free and calibrated, with the limit of any code.

The rows are those of docs/data/trellis.json (benchmarks/fitted.py --trellis) and docs/data/trellis-calibrated.json
(benchmarks/calibrated.py --trellis). The limit is simulated here, with --limit: LoftQ's alternation with an ideal code
in the place of the quantizer. A code of R bits leaves at least the part D = 2^(-2R) of a Gaussian source's energy; the
test channel that does, X = Q + sqrt(D) sigma Z with Q and Z independent, says how the error of such a code lies to the
weights (Cover and Thomas, Elements of Information Theory, 10.3.2). Weights of one matrix are not quite independent, nor
quite Gaussian: a code that knows more of them could pass this line.

    python benchmarks/quality.py --limit    # simulates, minutes; then draws
    python benchmarks/quality.py            # draws docs/images/quality.png
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitted import RANK, STEPS, Model, minilm
from harness import ROOT, environment

DATA = ROOT / "docs" / "data"
RATES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 4.25)
NAMES = {"nf, absmax (LoftQ)": "NormalFloat, absmax (the paper's LoftQ)", "lloyd": "lloyd, fitted"}


def ideal(target: Tensor, bits: float, generator: torch.Generator) -> Tensor:
    """What an ideal code of ``bits`` makes of a Gaussian matrix, by the test channel: Q = (1 - D) X + noise."""
    left = 2.0 ** (-2 * bits)
    noise = torch.randn(target.shape, generator=generator) * target.square().mean().sqrt()
    return (1 - left) * target + math.sqrt(left * (1 - left)) * noise


def error_left(weight: Tensor, bits: float, generator: torch.Generator) -> float:
    """The least ||W - Q - B A||^2 of the alternation's steps."""
    adapter, least = torch.zeros_like(weight), math.inf
    for _ in range(STEPS):
        residual = weight - ideal(weight - adapter, bits, generator)
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        adapter = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
        least = min(least, (residual - adapter).double().square().sum().item())
    return least


def limit(model: Model) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    size = sum(w.double().square().sum().item() for w in model.weights.values())
    rows = []
    for bits in RATES:
        left = sum(error_left(w, bits, generator) for w in model.weights.values())
        rows.append({"bits_per_weight": bits, "error": float(f"{math.sqrt(left / size):.5g}")})
        print(f"limit, {bits:g} bits: {rows[-1]['error']:.4f}", flush=True)
    return rows


def read(name: str) -> list[dict[str, Any]]:
    """The rows of the first model of a file of docs/data, all-MiniLM-L6-v2's."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))["models"][0]["rows"]


def lines(rows: Iterable[dict[str, Any]], y: str) -> dict[str, list[tuple[float, float]]]:
    """Points of every code, by bits; a trellis is one code at all rates, its window is the default's."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        side = row["side"]
        if side.startswith("trellis") and "window 8" not in side and "one rate" not in side and "cloq" not in side:
            found.setdefault("trellis", []).append((row["bits_per_weight"], row[y]))
        elif side in NAMES:
            found.setdefault(NAMES[side], []).append((row["bits_per_weight"], row[y]))
        elif side == "descent":
            found.setdefault("nf or lloyd", []).append((row["bits_per_weight"], row[y]))
    return {name: sorted(points) for name, points in found.items()}


def draw(file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {**dict(zip(NAMES.values(), ("tab:gray", "tab:blue"), strict=True)), "trellis": "tab:red"}
    colours["nf or lloyd"] = "tab:blue"
    free, calibrated = read("trellis.json"), read("trellis-calibrated.json")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for name, points in lines(free, "error").items():
        left.plot(*zip(*points, strict=True), "o-", color=colours[name], label=name)
    least = json.loads((DATA / "limit.json").read_text(encoding="utf-8"))["rows"]
    left.plot(
        [row["bits_per_weight"] for row in least],
        [row["error"] for row in least],
        "k:",
        label="limit of independent Gaussian weights",
    )
    left.set(yscale="log", ylabel="weight error ‖W - Q - BA‖ / ‖W‖", title="Data-free: weight error (lower is better)")
    for rows, style, told in ((free, "o-", "data-free"), (calibrated, "s--", "calibrated, descent")):
        for name, points in lines(rows, "quality").items():
            right.plot(*zip(*points, strict=True), style, color=colours[name], label=f"{name}, {told}")
    right.set(
        ylabel="cosine of embeddings with full precision's",
        title="Embeddings before any training (higher is better)",
    )
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    for axes in (left, right):
        axes.set_xlabel("stored bits of a quantized weight, scales counted")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)  # below: it hides no point
    figure.suptitle(f"all-MiniLM-L6-v2, rank {RANK}, T = {STEPS}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    print(f"written: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", action="store_true", help="simulate the limit again")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "quality.png")
    options = parser.parse_args()
    if options.limit:
        torch.set_num_threads(1)
        rows = limit(Model(minilm(), None))
        made = {"environment": environment(), "rank": RANK, "steps": STEPS, "seed": 0, "rows": rows}
        (DATA / "limit.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    draw(options.output)


if __name__ == "__main__":
    sys.exit(main())
