"""Which levels of a trellis leave Gaussian weights the least squared error at 2 bits?

Lloyd's algorithm over paths: find the best windows of every sequence of 128 by Viterbi's algorithm, then put every
level at the mean of the weights that have it, earlier rounds counting less and less. It begins from the quantiles of the Gaussian in random order, and ends
with unit variance of the weights, rounded to float16. Made ``loftq/trellis_levels.json``, the format's tables. Printed:
the relative error on other sequences, at several rates.

    python benchmarks/trellis_levels.py [--write FILE]
"""

import argparse
import base64
import json
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

from loftq.codes import Trellis
from loftq.numerics.trellis import STATES, Walk, viterbi

LENGTH = 128
MEMORY = 0.75  # weight of what earlier rounds found


def paths(weights: Tensor, table: Tensor, rate: int) -> Tensor:
    walk, size = Walk(LENGTH, rate, len(table).bit_length() - 1), max(1, STATES // len(table))
    return torch.cat([viterbi(part, torch.ones_like(part), table, walk) for part in weights.split(size)])


def trained(window: int, sequences: int, rounds: int, generator: torch.Generator) -> Tensor:
    count = 2**window
    quantiles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    table = quantiles[torch.randperm(count, generator=generator)]
    sums, counts = torch.zeros(2, count).double()
    for _ in range(rounds):
        weights = torch.randn(sequences, LENGTH, generator=generator)  # new ones: no level learns its few by heart
        path = paths(weights, table, 32).flatten()
        sums, counts = MEMORY * sums, MEMORY * counts
        sums.index_add_(0, path, weights.flatten().double())
        counts.index_add_(0, path, torch.ones(len(path)).double())
        table = torch.where(counts > 0, sums / counts.clamp(min=1), table).float()
    return table.half().float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=Trellis.WINDOWS)
    parser.add_argument("--samples", type=int, default=400, help="weights a level and round")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rates", type=int, nargs="+", default=[16, 23, 32, 35, 48])
    parser.add_argument("--write", type=Path, help="JSON file of the tables, as the package has it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    others = torch.randn(512, LENGTH, generator=torch.Generator().manual_seed(1))
    print("| window | " + " | ".join(f"{rate / 16:g} bits" for rate in options.rates) + " |")
    print("|---|" + "---|" * len(options.rates))
    tables = {}
    for window in options.windows:
        generator = torch.Generator().manual_seed(window)
        table = trained(window, options.samples * 2**window // LENGTH, options.rounds, generator)
        tables[f"trellis-{window}"] = base64.b64encode(table.half().numpy().astype("<f2").tobytes()).decode()
        found = [(others - table[paths(others, table, rate)]).norm() / others.norm() for rate in options.rates]
        print(f"| {window} | " + " | ".join(f"{error:.4f}" for error in found) + " |", flush=True)
    if options.write:
        options.write.write_text(json.dumps(tables, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
