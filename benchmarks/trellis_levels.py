"""Which levels of a trellis leave Gaussian weights the least squared error at 2 bits?

Lloyd's algorithm over paths: find the best windows of every sequence of 128 by Viterbi's algorithm, then put every
level at the mean of the weights that have it, earlier rounds counting less and less. It begins from the quantiles of
the Gaussian in random order; of several such starts the best is kept. Levels are rounded to float16. Printed: the
relative error on other sequences, at several rates. Made ``loftq/trellis_levels.json``, the format's tables:

    python benchmarks/trellis_levels.py --windows 8 --starts 6 --samples 1500 --write FILE
    python benchmarks/trellis_levels.py --windows 10 --starts 3 --samples 400 --write FILE
    python benchmarks/trellis_levels.py --windows 12 --samples 150 --write FILE
"""

import argparse
import base64
import json
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

from loftq.codes import Trellis
from loftq.kernels import cpu, viterbi

LENGTH = 128
MEMORY = 0.75  # weight of what earlier rounds found


def paths(weights: Tensor, table: Tensor, rate: int) -> Tensor:
    """The windows of sequences ``(128, sequences)``."""
    rates = torch.full((weights.shape[1],), rate, dtype=torch.uint8)
    codes = torch.empty(weights.shape, dtype=torch.int16)
    window, none = len(table).bit_length() - 1, codes.new_empty(0, 0)
    args = weights, torch.ones(LENGTH), rates, table, window, LENGTH, none, codes
    cpu.run_over_rows(viterbi.encode, weights.shape[1], *args)
    return codes.int()


def trained(window: int, sequences: int, rounds: int, generator: torch.Generator) -> Tensor:
    count = 2**window
    quantiles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    table = quantiles[torch.randperm(count, generator=generator)]
    sums, counts = torch.zeros(2, count).double()
    for _ in range(rounds):
        weights = torch.randn(LENGTH, sequences, generator=generator)  # new ones: no level learns its few by heart
        path = paths(weights, table, 32).flatten()
        sums, counts = MEMORY * sums, MEMORY * counts
        sums.index_add_(0, path, weights.flatten().double())
        counts.index_add_(0, path, torch.ones(len(path)).double())
        table = torch.where(counts > 0, sums / counts.clamp(min=1), table).float()
    return table.half().float()


def error(weights: Tensor, table: Tensor, rate: int) -> float:
    return float((weights - table[paths(weights, table, rate)]).norm() / weights.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=Trellis.WINDOWS)
    parser.add_argument("--samples", type=int, default=400, help="weights a level and round")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--starts", type=int, default=1)
    parser.add_argument("--rates", type=int, nargs="+", default=[16, 23, 32, 35, 48])
    parser.add_argument("--write", type=Path, help="JSON file of tables, for these windows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    others = torch.randn(LENGTH, 4096, generator=torch.Generator().manual_seed(1))
    print("| window | " + " | ".join(f"{rate / 16:g} bits" for rate in options.rates) + " |")
    print("|---|" + "---|" * len(options.rates))
    tables = json.loads(options.write.read_text("utf-8")) if options.write and options.write.exists() else {}
    for window in options.windows:
        generator, sequences = torch.Generator().manual_seed(window), options.samples * 2**window // LENGTH
        starts = [trained(window, sequences, options.rounds, generator) for _ in range(options.starts)]
        table = min(starts, key=lambda table: error(others, table, 32))
        tables[f"trellis-{window}"] = base64.b64encode(table.half().numpy().astype("<f2").tobytes()).decode()
        found = [error(others, table, rate) for rate in options.rates]
        print(f"| {window} | " + " | ".join(f"{each:.4f}" for each in found) + " |", flush=True)
    if options.write:
        options.write.write_text(json.dumps(tables, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
