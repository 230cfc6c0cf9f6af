"""How fast are weights quantized and packed, and how fast are they decoded?

Peer: bitsandbytes (NF4; its dynamic code at 8 bits), HQQ (affine; without and with its search for better zero points),
torchao (NF4, double quantization), as far as installed; and a plain copy of the decoded matrix. Every side allocates
what it returns; what filling fresh memory costs alone is given, and decoding into memory that is there, as the products
of loftq do, beside a copy into it. HQQ and torchao:
`pip install --no-deps --target .peers hqq torchao einops termcolor`, then `PYTHONPATH=.peers`.

Goal: for 4096 x 4096 at 4 bits, quantize and pack 5 times as fast as bitsandbytes, decode to float32 1.5 times as fast;
at 2 bits, decode to float32 at 0.6 times the speed of the copy.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness import Bench, Versus, installed
from loftq import QuantSpec, kernels
from loftq.kernels import cpu

COPY, FILL, SEARCH = "copy of the output", "fresh memory, filled", "hqq with its search"
REUSED, COPY_REUSED = "loftq, memory used again", "copy, memory used again"
QUANTIZE_GOALS = {(4, "bitsandbytes"): 5.0}  # bits, peer
DECODE_GOALS = {(4, "bitsandbytes"): 1.5, (2, COPY): 0.6}
BLOCK = 64
Pair = tuple[Callable[[], Any], Callable[[Any], Tensor]]  # quantize, and dequantize what it returns


def loftq_side(weight: Tensor, bits: int) -> Pair:
    spec, kernel = QuantSpec(bits=bits, block_size=BLOCK), kernels.backend(weight.device)
    held = weight.float().clone()  # takes the residual, which no other side makes; the solver has such memory

    def quantize() -> dict[str, Tensor]:
        quantized, _ = kernel.quantize_residual(weight, weight, spec, held)
        return {"weight": kernel.pack(quantized.codes, bits), **quantized.scales}

    return quantize, lambda stored: kernel.dequantize(stored, spec, weight.shape[1], weight.dtype)


def bitsandbytes_side(weight: Tensor, bits: int) -> Pair:
    import bitsandbytes.functional as bnb

    if bits == 4:
        return lambda: bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4"), lambda q: bnb.dequantize_4bit(*q)
    return lambda: bnb.quantize_blockwise(weight, blocksize=BLOCK), lambda q: bnb.dequantize_blockwise(*q)


def hqq_side(weight: Tensor, bits: int, search: bool) -> Pair:
    from hqq.core.quantize import Quantizer

    options: dict[str, Any] = {"nbits": bits, "group_size": BLOCK, "axis": 1, "optimize": search}
    options |= {"device": str(weight.device), "compute_dtype": weight.dtype}
    return lambda: Quantizer.quantize(weight, **options), lambda q: Quantizer.dequantize(*q)


def torchao_side(weight: Tensor) -> Pair:
    from torchao.quantization import to_nf4

    return lambda: to_nf4(weight, BLOCK, 256), lambda q: q.get_original_weight()


def sides(weight: Tensor, bits: int) -> dict[str, Pair]:
    found = {"loftq": loftq_side(weight, bits)}
    if bits in (4, 8) and installed("bitsandbytes"):
        found["bitsandbytes"] = bitsandbytes_side(weight, bits)
    if installed("hqq"):
        found["hqq"] = hqq_side(weight, bits, search=False)
        found[SEARCH] = hqq_side(weight, bits, search=True)
    if bits == 4 and installed("torchao"):
        found["torchao"] = torchao_side(weight)
    return found


def quantize(bench: Bench, weight: Tensor, bits: int) -> None:
    calls = {side: pair[0] for side, pair in sides(weight, bits).items()}
    versus = [Versus("loftq", side, QUANTIZE_GOALS.get((bits, side))) for side in calls if side != "loftq"]
    case = f"quantize and pack, {bits} bits, {tuple(weight.shape)}, {weight.device}"
    bench.compare(case, calls, versus, repeats=7, slow=() if bench.quick else (SEARCH,))


def dequantize(bench: Bench, weight: Tensor, bits: int, number: int = 1) -> None:
    """Goals are for float32 on the CPU."""
    calls: dict[str, Callable[[], Any]] = {COPY: weight.clone, FILL: lambda: torch.full_like(weight, 1)}
    for side, (encode, decode) in sides(weight, bits).items():
        if side != SEARCH:  # decodes as without it
            calls[side] = functools.partial(decode, encode())
    if weight.device.type == "cpu":
        stored, spec, held = loftq_side(weight, bits)[0](), QuantSpec(bits=bits, block_size=BLOCK), weight.clone()
        calls[REUSED] = lambda: cpu.multiplicand(stored, spec, len(weight.T)).decode(slice(0, len(weight)), held)
        calls[COPY_REUSED] = lambda: held.copy_(weight)
    goals = DECODE_GOALS if weight.device.type == "cpu" and weight.dtype == torch.float32 else {}
    peers = [side for side in calls if side not in ("loftq", REUSED, COPY_REUSED)]
    versus = [Versus("loftq", side, goals.get((bits, side))) for side in peers]
    versus += [Versus(REUSED, "bitsandbytes"), Versus(REUSED, COPY_REUSED)]
    case = f"decode to {str(weight.dtype)[6:]}, {bits} bits, {tuple(weight.shape)}, {weight.device}"
    seconds = bench.compare(case, calls, versus, repeats=15, number=number)["loftq"]
    bench.record(case, "bytes that loftq writes in a second", [weight.nbytes / s for s in seconds], "B")


def main() -> None:
    bench = Bench(__file__, __doc__)
    size = 512 if bench.quick else 4096
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    for bits in (4, 2, 3, 8):
        quantize(bench, weight, bits)
    for dtype in (torch.float32, torch.bfloat16):
        for bits in (4, 2, 3, 8):
            dequantize(bench, weight.to(dtype), bits)
    for peer in ("bitsandbytes", "hqq", "torchao"):
        if not installed(peer):
            bench.note(f"{peer} is not installed and was left out.")
    bench.finish()


if __name__ == "__main__":
    main()
