"""Would products in bfloat16 make the randomized SVD quicker, and what would they cost?

    python benchmarks/svd_bfloat16.py    # two minutes

LoftQ with NF4, rank 64 and T = 5 on two matrices, as it is, and with the products of the residual in bfloat16: those
that make the bases; all of them; and all of them in three products of halves, which has float32's accuracy. Nothing of
the package is changed: products are caught as PyTorch is called. CPU seconds of one thread, the smallest of some
repeats, and the error as a part of float32's.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import loftq
from harness import environment

WAYS = ("float32", "bases", "all", "three products")
MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class Halves(TorchFunctionMode):
    """Products of a large matrix with a narrow one, in bfloat16."""

    def __init__(self, way: str, size: int) -> None:
        super().__init__()
        self.way, self.size = way, size
        self.products = 0
        self._key: Any = None
        self._halves: Any = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in MATMUL and not kwargs and all(isinstance(a, Tensor) and a.dim() == 2 for a in args):
            a, b = args
            for large, other in ((a, b), (b, a)):
                narrow = min(other.shape) < 300 and large.numel() == self.size**2 and large.dtype == torch.float32
                if narrow and (large is a or self.way != "bases"):
                    self.products += 1
                    if self.way != "float32":
                        high, low = self.halves(large)
                        fine = other.bfloat16()
                        parts = [(high, fine)]
                        if self.way == "three products":
                            parts += [(high, (other - fine.float()).bfloat16()), (low, fine)]
                        return sum((x @ y if large is a else y @ x).float() for x, y in parts)
                    break
        return function(*args, **(kwargs or {}))

    def halves(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """A matrix in bfloat16 and, for three products, what that leaves; remembered while the matrix is the same."""
        key = (matrix.data_ptr(), matrix._version, matrix.stride(), matrix[0].tolist())
        if key != self._key:
            high = matrix.bfloat16()
            low = (matrix - high.float()).bfloat16() if self.way == "three products" else None
            self._key, self._halves = key, (high, low)
        return self._halves


def matrices(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    flat = 0.02 * torch.randn(size, size, generator=generator)
    factors = torch.randn(size, 32, generator=generator) / 6, torch.randn(32, size, generator=generator)
    return {"Gaussian": flat, "Gaussian + rank 32": flat + 0.05 * factors[0] @ factors[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    loftq.quantize_weight(torch.randn(256, 256), bits=4, rank=64, preset="loftq", steps=5)  # kernels are compiled
    print(", ".join(f"{name} {value}" for name, value in environment().items()), end="\n\n")
    print("| matrix | products | how many | CPU s | error / error in float32 |\n|---|---|---|---|---|")
    for name, weight in matrices(given.size).items():
        reference = 0.0
        for way in WAYS:
            seconds = []
            for _ in range(given.repeats):
                with Halves(way, given.size) as mode:
                    began = time.process_time()
                    solution = loftq.quantize_weight(weight, bits=4, rank=64, preset="loftq", steps=5)
                    seconds.append(time.process_time() - began)
            reference = reference or solution.error
            part = solution.error / reference
            print(f"| {name} | {way} | {mode.products} | {min(seconds):.2f} | {part:.5f} |", flush=True)


if __name__ == "__main__":
    main()
