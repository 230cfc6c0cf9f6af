"""How many Krylov blocks the randomized SVD needs: LoftQ's final error against the one with an exact SVD.

    OMP_NUM_THREADS=1 python benchmarks/svd_accuracy.py                      # the table in docs/experiments.md
    OMP_NUM_THREADS=1 python benchmarks/svd_accuracy.py --settings 8,3,8 --matrices large larger --ranks 64 --seeds 1
    OMP_NUM_THREADS=1 python benchmarks/svd_accuracy.py --matrices --model DIR   # real: the largest six
    OMP_NUM_THREADS=1 python benchmarks/svd_accuracy.py --matrices           # only the times of one SVD

Every matrix is solved with T = 5, once exactly and once per setting. An excess is
``error(randomized) / error(exact) - 1``: after one step it is the accuracy of the SVD itself, at the end it also
holds the noise of the alternation, which is measured by solving exactly again with weights changed by 1e-6.
"""

import argparse
import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from loftq.numerics import lowrank
from loftq.solver import solve
from loftq.spec import QuantSpec, SolveSpec

MATRICES = {  # name: family, rows, columns
    "flat": ("flat", 768, 768),
    "decaying": ("decaying", 768, 1024),
    "heavy-tailed": ("heavy", 768, 768),
    "rank 32": ("deficient", 640, 768),
    "tall": ("flat", 1536, 640),
    "wide": ("flat", 640, 1536),
    "large": ("flat", 2048, 2048),
    "larger": ("decaying", 2048, 4096),
    "largest": ("flat", 4096, 4096),
}
SMALL = [name for name in MATRICES if "large" not in name]
QUANTS = {
    "nf2": QuantSpec(bits=2),
    "nf4": QuantSpec(bits=4),
    "uniform2": QuantSpec(bits=2, code="uniform"),
    "uniform-tensor4": QuantSpec(bits=4, code="uniform-tensor"),
}
SETTINGS = ("4,2,8", "6,3,8", "8,3,8", "10,3,8")


def matrix(family: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    if family == "flat":
        return normal
    if family == "heavy":  # Student's t with 3 degrees of freedom
        return normal / torch.randn(3, rows, columns, generator=generator).square().mean(0).sqrt()
    u, s, vh = torch.linalg.svd(normal, full_matrices=False)
    k = torch.arange(1, len(s) + 1)
    return u * ((k <= 32).float() if family == "deficient" else k**-0.5) @ vh


def excess(weight: torch.Tensor, quant: QuantSpec, rank: int, exact, seed: int) -> tuple[float, float, float]:
    """After one step, at the end, and seconds of the processor."""
    start = time.process_time()
    found = solve(weight, quant, rank, SolveSpec(svd="randomized", seed=seed))
    seconds = time.process_time() - start
    return (
        found.errors[1] / exact.errors[1] - 1,
        found.errors[found.kept] / exact.errors[exact.kept] - 1,
        seconds,
    )


def real(directory: Path) -> list[torch.Tensor]:
    """The six largest matrices of a model, embeddings aside."""
    tensors = {n: t.float() for f in sorted(directory.glob("*.safetensors")) for n, t in load_file(f).items()}
    found = [t for n, t in tensors.items() if t.ndim == 2 and "embed" not in n]
    return sorted(found, key=torch.numel, reverse=True)[:6]


Draw = Callable[[int], torch.Tensor]  # a seed's matrix


def accuracy(settings: list[str], draws: list[Draw], quants: list[str], ranks: list[int], seeds: int) -> Iterator[str]:
    rows: dict[str, list[tuple[float, float, float]]] = {s: [] for s in settings}
    noise, exact_seconds = [], []
    for draw in draws:
        for quant in (QUANTS[name] for name in quants):
            for rank in ranks:
                for seed in range(seeds):
                    weight = draw(seed)
                    start = time.process_time()
                    exact = solve(weight, quant, rank, SolveSpec(svd="exact"))
                    exact_seconds.append(time.process_time() - start)
                    if seed == 0:
                        shaken = weight * (1 + 1e-6 * torch.randn_like(weight))
                        again = solve(shaken, quant, rank, SolveSpec(svd="exact"))
                        noise.append(again.errors[again.kept] / exact.errors[exact.kept] - 1)
                    for setting in settings:
                        lowrank.COLD, lowrank.WARM, lowrank.OVERSAMPLE = map(int, setting.split(","))
                        rows[setting].append(excess(weight, quant, rank, exact, seed))
    yield "| cold, warm, oversample | one step, worst | final, mean | 95 % below | worst | CPU time / exact |"
    yield "|---|---|---|---|---|---|"
    for setting, values in rows.items():
        one, final, seconds = zip(*values, strict=True)
        yield (
            f"| {setting.replace(',', ', ')} | {max(one):+.5f} | {statistics.mean(final):+.5f} "
            f"| {sorted(final)[int(0.95 * len(final))]:+.5f} | {max(final):+.5f} "
            f"| {sum(seconds) / sum(exact_seconds):.2f} |"
        )
    yield (
        f"| exact, weights · (1 ± 1e-6) | | {statistics.mean(noise):+.5f} "
        f"| {sorted(noise)[int(0.95 * len(noise))]:+.5f} | {max(noise):+.5f} | |"
    )
    yield f"\nn = {len(exact_seconds)} matrices a row (noise: {len(noise)}), {seeds} seed(s)."


def crossover(setting: str) -> Iterator[str]:
    lowrank.COLD, lowrank.WARM, lowrank.OVERSAMPLE = map(int, setting.split(","))
    yield "| shape | rank | exact, s | randomized cold, s | warm, s |"
    yield "|---|---|---|---|---|"
    for rows, columns in ((256, 256), (384, 384), (512, 512), (640, 640), (768, 768), (1024, 1024), (2048, 2048)):
        for rank in (16, 64):
            weight = matrix("flat", rows, columns, 0)
            _, a = lowrank.truncated_svd(weight, rank, method="randomized")
            seconds = []
            for method, start in (("exact", None), ("randomized", None), ("randomized", a)):
                begun = time.process_time()
                for _ in range(3):
                    lowrank.truncated_svd(weight, rank, method=method, start=start)
                seconds.append((time.process_time() - begun) / 3)
            yield f"| {rows} x {columns} | {rank} | " + " | ".join(f"{s:.3f}" for s in seconds) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="COLD,WARM,OVERSAMPLE")
    parser.add_argument("--matrices", nargs="*", default=SMALL, choices=MATRICES)
    parser.add_argument("--model", type=Path, help="a directory with safetensors files")
    parser.add_argument("--quants", nargs="+", default=list(QUANTS), choices=QUANTS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--chosen", default=f"{lowrank.COLD},{lowrank.WARM},{lowrank.OVERSAMPLE}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    solve(torch.eye(64), QuantSpec(bits=4), 4)  # compiles the kernels
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    print(f"commit {commit}, torch {torch.__version__}, {platform.machine()}, 1 thread\n")
    draws: list[Draw] = [functools.partial(matrix, *MATRICES[name]) for name in options.matrices]
    draws += [lambda _, w=w: w for w in (real(options.model) if options.model else [])]
    print(f"matrices: {', '.join(options.matrices) or 'none made'}; of a model: {options.model or 'none'}\n")
    if draws:
        for line in accuracy(list(options.settings), draws, options.quants, options.ranks, options.seeds):
            print(line, flush=True)
    print(f"\nOne truncated SVD, setting {options.chosen}:\n")
    for line in crossover(options.chosen):
        print(line, flush=True)


if __name__ == "__main__":
    main()
