"""Which levels leave Gaussian blocks the least squared error, if every block's scale and its sign are fitted?

Lloyd's algorithm one storey up: fit the scale ``s`` of every block of 64, then put every level at ``Σ w s / Σ s²`` over
the weights that have it, and divide by the largest. Made :data:`loftq.codes.Lloyd.TABLE`. Printed beside it, on
other blocks: the symmetric Lloyd-Max levels of the Gaussian, equally spaced ones, and NormalFloat's.

    python benchmarks/levels.py
    python benchmarks/levels.py --scales 400   # how far are the fitted scales from the best of so many, of either sign?
"""

import argparse
import itertools
from statistics import NormalDist

import torch
from torch import Tensor

from loftq.kernels import cpu, fitting
from loftq.numerics import levels
from loftq.numerics.codebooks import halfway
from loftq.numerics.fitting import HIGHEST, LOWEST, ROUNDS

BLOCK, STARTS = 64, 16


def fitted(blocks: Tensor, table: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """The best scale ``(blocks, 1)`` found, and the codes."""
    parts = torch.linspace(LOWEST[bits], HIGHEST, STARTS)
    factors = torch.cat([parts, -parts]) if signed else parts
    result, near, gaps = blocks.new_empty(2, len(blocks), 1), blocks.new_empty(2, 0, 0), halfway(table)
    args = blocks, near, factors, ROUNDS, gaps, table, False, BLOCK, result
    cpu.run_over_rows(fitting.search, len(blocks), *args)
    return result[0], torch.bucketize(blocks / result[0], gaps)


def trained(blocks: Tensor, table: Tensor, bits: int, iterations: int, signed: bool) -> Tensor:
    for _ in range(iterations):
        scale, codes = fitted(blocks, table, bits, signed)
        products, squares = torch.zeros(2, len(table), dtype=torch.float64)
        products.index_add_(0, codes.flatten(), (blocks * scale).double().flatten())
        squares.index_add_(0, codes.flatten(), scale.square().expand_as(blocks).double().flatten())
        table = (products / squares).sort().values
        table = (table / table.abs().max()).float()
    return table


def lloyd_max(bits: int) -> Tensor:
    """The symmetric levels of least squared error for the Gaussian itself (Max, 1960), the largest 1."""
    normal, count = NormalDist(), 2**bits
    table = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    for _ in range(5000):
        edges = [-40.0, *((a + b) / 2 for a, b in itertools.pairwise(table)), 40.0]
        table = [
            (normal.pdf(a) - normal.pdf(b)) / (normal.cdf(b) - normal.cdf(a)) for a, b in itertools.pairwise(edges)
        ]
    return torch.tensor(table) / max(table)


def error(blocks: Tensor, table: Tensor, bits: int, signed: bool) -> float:
    scale, codes = fitted(blocks, table, bits, signed)
    return float((blocks - table[codes] * scale).norm() / blocks.norm())


def least(blocks: Tensor, table: Tensor, count: int) -> float:
    """The error with the best of ``count`` scales of either sign for every block, each then fitted once."""
    reach, best = blocks.abs().amax(1, keepdim=True) / table.abs().max(), torch.full((len(blocks),), torch.inf)
    for part in torch.linspace(0.2, 1.4, count):
        for scale in (part * reach, -part * reach):
            chosen = table[torch.bucketize(blocks / scale, halfway(table))]
            square = chosen.square().sum(1)
            taken = (blocks * chosen).sum(1).square() / torch.where(square == 0, 1, square)
            best = torch.minimum(best, blocks.square().sum(1) - taken)
    return float(best.sum().sqrt() / blocks.norm())


def compare_scales(blocks: Tensor, bits: list[int], count: int) -> None:
    print(f"| bits | code | scales fitted | best of {2 * count} scales |")
    print("|---|---|---|---|")
    for width in bits:
        for code in ("lloyd", "int"):
            table = levels(code, width)
            print(f"| {width} | {code} | {error(blocks, table, width, True):.4f} | {least(blocks, table, count):.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--blocks", type=int, default=20_000)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--scales", type=int, help="compare fitted scales with the best of twice so many")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    blocks, others = torch.randn(2, options.blocks, BLOCK, generator=generator)
    print(f"relative error on {options.blocks} Gaussian blocks of {BLOCK}, scales not rounded\n")
    if options.scales:
        return compare_scales(others, options.bits, options.scales)
    print("| bits | lloyd | symmetric Lloyd-Max | uniform | nf, both signs | nf |")
    print("|---|---|---|---|---|---|")
    tables = {}
    for bits in options.bits:
        nf = levels("nf", bits)
        table = trained(blocks, nf, bits, options.iterations, signed=True)
        tables[bits] = tuple(round(level, 4) for level in table.tolist())
        rows = [(torch.tensor(tables[bits]), True), (lloyd_max(bits), False), (levels("uniform", bits), False)]
        found = [error(others, t, bits, signed) for t, signed in [*rows, (nf, True), (nf, False)]]
        print(f"| {bits} | " + " | ".join(f"{e:.4f}" for e in found) + " |", flush=True)
    print()
    for bits, table in tables.items():
        print(f"    {bits}: {table},")


if __name__ == "__main__":
    main()
