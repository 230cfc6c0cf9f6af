"""How much faster than the official algorithm is LoftQ of one matrix, and is its error as small?

Peer: Algorithm 1 as released and as in PEFT: a full SVD (LAPACK) at every step, the last step returned. At 4 bits
bitsandbytes quantizes; at 2 bits, or without it, a search of the nearest level through a table of all distances, as in
the official code; and PEFT's own loftq_init, made to run without CUDA. The matrix is Gaussian: its flat spectrum is the
worst case for a randomized SVD.

Goal: 50 times as fast, with at most 1.001 times the error, for a 4096 x 4096 matrix, rank 64, 5 steps.
"""

import inspect
import time
from collections.abc import Callable

import torch
from torch import Tensor

import loftq
from harness import Bench, Versus, installed
from loftq.numerics import dequantize, levels
from loftq.spec import QuantSpec

STEPS, BLOCK = 5, 64
Found = tuple[Tensor, Tensor, Tensor]  # backbone, B, A


def official(weight: Tensor, rank: int, round_trip: Callable[[Tensor], Tensor]) -> Found:
    """The alternation with a full SVD at every step; ``round_trip`` quantizes and dequantizes."""
    low_rank = torch.zeros_like(weight)
    for _ in range(STEPS):
        backbone = round_trip(weight - low_rank)
        u, s, vh = torch.linalg.svd(weight - backbone, full_matrices=False)
        root = s[:rank].sqrt()
        b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
        low_rank = b @ a
    return backbone, b, a


def by_bitsandbytes(matrix: Tensor) -> Tensor:
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(*bnb.quantize_4bit(matrix, blocksize=BLOCK, quant_type="nf4", compress_statistics=False))


def by_distances(matrix: Tensor, bits: int) -> Tensor:
    """The nearest level of every weight through the distances to all levels."""
    table = levels("nf", bits).to(matrix.device)
    blocks = matrix.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = ((blocks / scale)[..., None] - table).abs().argmin(-1)
    return (table[codes] * scale).view_as(matrix)


def of_peft(device: str) -> Callable[..., Found]:
    """PEFT's loftq_init, whose device is hard-coded, for ``device``."""
    from peft.utils import loftq_utils

    names = dict(vars(loftq_utils))
    exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', repr(device)), names)

    def init(weight: Tensor, rank: int) -> Found:
        backbone, a, b = names["loftq_init"](weight, num_bits=4, reduced_rank=rank, num_iter=STEPS)
        return backbone, b, a

    return init


def of_loftq(weight: Tensor, rank: int, bits: int) -> Found:
    solution = loftq.quantize_weight(weight, bits=bits, rank=rank, preset="loftq", steps=STEPS, block_size=BLOCK)
    return dequantize(solution.quantized, QuantSpec(bits=bits, block_size=BLOCK)), solution.b, solution.a


def error(weight: Tensor, found: Found) -> float:
    backbone, b, a = (part.double() for part in found)
    return float((weight - backbone - b @ a).norm() / weight.double().norm())


def one_matrix(bench: Bench, bits: int, size: int, rank: int, goal: float | None, device: str = "cpu") -> None:
    """Times and errors of every side on one matrix."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device) * 0.02
    found: dict[str, Found] = {}
    own_quantizer = bits == 4 and installed("bitsandbytes")
    sides: dict[str, Callable[[], Found]] = {
        "loftq": lambda: found.update({"loftq": of_loftq(weight, rank, bits)}),
        "official": lambda: found.update(
            {"official": official(weight, rank, by_bitsandbytes if own_quantizer else lambda m: by_distances(m, bits))}
        ),
    }
    if bits == 4:
        peft = of_peft(device)
        sides["peft loftq_init"] = lambda: found.update({"peft loftq_init": peft(weight, rank)})
    peers = [side for side in sides if side != "loftq"]
    case = f"NF{bits}, {size} x {size}, rank {rank}, {STEPS} steps, {device}"
    versus = [Versus("loftq", peer, goal) for peer in peers]
    bench.compare(case, sides, versus, repeats=3, slow=() if bench.quick else peers)
    errors = {side: error(weight, f) for side, f in found.items()}
    bench.record(case, "relative error of loftq", [errors["loftq"]], "")
    for peer in peers:
        bench.record(case, f"error of loftq / {peer}", [errors["loftq"] / errors[peer]], "x", at_most=1.001)


def main() -> None:
    bench = Bench(__file__, __doc__)
    if bench.threads == 1:
        bench.clock = time.process_time
        bench.note("Times are CPU seconds of one thread, since others worked on the machine.")
    for bits in (4, 2):
        one_matrix(bench, bits, 768 if bench.quick else 4096, 64, goal=50)
    bench.finish()


if __name__ == "__main__":
    main()
