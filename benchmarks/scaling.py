"""How does the time of LoftQ grow with the size of the matrix, the rank, the steps, and the number of workers?

Peer: none; the picture shows the growth with the number of weights beside the measured times.

Goal: time in proportion to the number of weights while the rank is small beside the matrix, and two workers that take
little more than half the time of one on two cores.
"""

import os
import tempfile
from pathlib import Path

import torch

import loftq
from harness import ROOT, Bench
from models import llama

SIZE, RANK, STEPS, BITS = 4096, 64, 5, 4  # what is not varied


def curve(bench: Bench, what: str, values: list[int], **fixed: int) -> dict[int, float]:
    """Median seconds of quantize_weight for every value of ``size``, ``rank`` or ``steps``."""
    seconds = {}
    for value in values:
        options = {**fixed, what: value}
        size = options.pop("size")
        weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        call = {f"{what} {value}": lambda w=weight, o=options: loftq.quantize_weight(w, bits=BITS, preset="loftq", **o)}
        fixed_text = ", ".join(f"{k} {v}" for k, v in fixed.items())
        found = bench.compare(f"{what}, at {fixed_text}, NF{BITS}", call, repeats=3)
        seconds[value] = sorted(found[f"{what} {value}"])[1]
    return seconds


def workers(bench: Bench, hidden: int, layers: int) -> dict[int, float]:
    """Median seconds of quantizing a checkpoint, from files to files."""
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= max(2, os.cpu_count() or 1)]
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "source"
        llama(hidden, layers, 1024, "bfloat16").save_pretrained(source)

        def run(n: int) -> None:
            with tempfile.TemporaryDirectory(dir=directory) as output:
                options = {"bits": BITS, "rank": RANK, "preset": "loftq", "steps": STEPS, "workers": n}
                loftq.quantize(source, Path(output) / "new", **options)

        sides = {f"workers {n}": lambda n=n: run(n) for n in counts}
        case = f"workers, for a checkpoint of {layers} layers, hidden {hidden}, rank {RANK}, steps {STEPS}, NF{BITS}"
        found = bench.compare(case, sides, repeats=3)
    seconds = {n: sorted(found[f"workers {n}"])[1] for n in counts}
    speeds = [a / b for a, b in zip(found["workers 1"], found["workers 2"], strict=True)]
    bench.record(case, "speed of 2 workers / 1", speeds, "x")
    return seconds


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = {"size": "rows and columns", "rank": "rank", "steps": "steps T", "workers": "workers"}
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), sharey=True, constrained_layout=True)
    for axis, (what, seconds) in zip(axes, curves.items(), strict=True):
        x, y = list(seconds), list(seconds.values())
        axis.plot(x, y, "o-", color="#1f5fa8")
        if what in ("size", "workers"):
            power, text = (2, "as the number of weights") if what == "size" else (-1, "1 / workers")
            anchor = -1 if what == "size" else 0
            axis.plot(x, [y[anchor] * (v / x[anchor]) ** power for v in x], "--", color="0.6", label=text)
            axis.legend(frameon=False)
        if what == "steps":
            axis.set_xscale("symlog", linthresh=1)
        else:
            axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(x, [str(v) for v in x], rotation=45 if what == "size" else 0)
        axis.minorticks_off()
        axis.set_xlabel(labels[what])
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    bench = Bench(__file__, __doc__)
    size = 512 if bench.quick else SIZE
    sizes = [256, 512, 768] if bench.quick else [512, 1024, 2048, 4096, 8192]
    ranks = [8, 64] if bench.quick else [8, 16, 32, 64, 128, 256]
    steps = [0, 1, 5] if bench.quick else [0, 1, 2, 5, 10]
    curves = {
        "size": curve(bench, "size", sizes, rank=RANK, steps=STEPS),
        "rank": curve(bench, "rank", ranks, size=size, steps=STEPS),
        "steps": curve(bench, "steps", steps, size=size, rank=RANK),
        "workers": workers(bench, *((256, 2) if bench.quick else (2048, 2))),
    }
    if bench.output:
        images = bench.output if bench.quick else ROOT / "docs" / "images"
        plot(curves, images / "scaling.png")
    bench.finish()


if __name__ == "__main__":
    main()
