"""Blocks of GGUF that hold a code of ours exactly: which there are, and how their bytes are made.

In every one a value is a whole number times ``d``, a float16. The numbers are the levels of ``int`` and ``iq4nl``, so
that ``d`` is the scale, or its opposite; nothing is rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from loftq.errors import InputError, option, quoted
from loftq.numerics import unpack
from loftq.planning import Matrix
from loftq.spec import QuantSpec

Codes = UInt8[Tensor, "blocks size"]


@dataclass(frozen=True)
class Block:
    """One of GGML's types.

    Attributes:
        type, file_type: its numbers in a GGUF file, of a tensor and of a file that is mostly of it.
        code, bits, size: what it holds: a code, its width, weights of a block.
        bytes: of a block.
        sign: -1 if ``d`` is the opposite of the scale.
        packed: codes of blocks -> their bytes.
        first: whether ``d`` comes before them.
        copies: how often it is stored.
    """

    name: str
    type: int
    file_type: int
    code: str
    bits: int
    size: int
    bytes: int
    sign: int
    packed: Callable[[Codes], Tensor]
    first: bool = True
    copies: int = 1

    def fits(self, quant: QuantSpec) -> bool:
        return (quant.code, quant.bits, quant.block_size) == (self.code, self.bits, self.size)


def _quarters(codes: Codes) -> Tensor:
    """Element ``j`` at bits ``2 (j mod 4)`` of byte ``j div 4``: our own order."""
    parts = codes.unflatten(1, (-1, 4))
    return parts[..., 0] | parts[..., 1] << 2 | parts[..., 2] << 4 | parts[..., 3] << 6


def _strides(codes: Codes) -> Tensor:
    """Of each 128 elements, ``32 l + j`` at bits ``2 l`` of byte ``j``."""
    parts = codes.unflatten(1, (-1, 4, 32))
    return (parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6).flatten(1)


def _strides_of_ones(codes: Codes) -> Tensor:
    """As before, behind the 16 scales and minima of Q2_K, ``w = d · scale · q - dmin · minimum``: here all are one."""
    return torch.cat([torch.full((len(codes), 16), 0x11, dtype=torch.uint8), _strides(codes)], 1)


def _halves(codes: Codes) -> Tensor:
    """Element ``j`` of the first half in the low bits of byte ``j``, of the second half in the high bits."""
    low, high = codes.chunk(2, 1)
    return low | high << 4


def _opposite_halves(codes: Codes) -> Tensor:
    """Q4_0 has ``q - 8``, ``int`` has ``c - 7``: ``q = 15 - c``, and the scale's other sign."""
    return _halves(15 - codes)


def _bytes(codes: Codes) -> Tensor:
    """The whole numbers themselves; of the two zeros of ``int`` one."""
    numbers = codes.to(torch.int16)
    return (numbers - 127 - (numbers > 127).to(torch.int16)).to(torch.int8).view(torch.uint8)


BLOCKS = (
    Block("Q2_0", 42, 41, "int", 2, 64, 18, 1, _quarters),
    Block("TQ2_0", 35, 37, "int", 2, 256, 66, 1, _strides, first=False),
    Block("Q2_K", 10, 10, "int", 2, 256, 84, 1, _strides_of_ones, first=False, copies=2),
    Block("Q4_0", 2, 2, "int", 4, 32, 18, -1, _opposite_halves),
    Block("IQ4_NL", 20, 25, "iq4nl", 4, 32, 18, 1, _halves),
    Block("Q8_0", 8, 7, "int", 8, 32, 34, 1, _bytes),
)


def block_for(matrix: Matrix, preferred: str = "") -> Block:
    """The type that holds a matrix exactly, the first or the ``preferred`` one. InputError if there is none."""
    quant = matrix.quant
    found = min((b for b in BLOCKS if b.fits(quant)), key=lambda b: b.name != preferred, default=None)
    if found is None or quant.double_quant:
        have = ", ".join(dict.fromkeys(f"{b.code} {b.bits} bits block {b.size}" for b in BLOCKS))
        blocks = f" in blocks of {quant.block_size}" if quant.codebook.form == "blocks" else ""
        held = f"code {quant.code} of {quant.bits} bits{blocks}"
        nested = " with scales that are quantized too" if quant.double_quant else ""
        raise InputError(
            f"{quoted(matrix.name)}: GGUF holds no {held}{nested}; exactly held are {have}. Quantize with "
            f"{option('serve', 'gguf')}, or merge, and convert that with llama.cpp"
        )
    if matrix.shape[1] % found.size:
        raise InputError(
            f"{quoted(matrix.name)}: rows of {matrix.shape[1]} are no multiple of {found.name}'s block of "
            f"{found.size}; quantize with {option('serve', 'gguf')}, which leaves it dense"
        )
    return found


def block_bytes(block: Block, matrix: Matrix, stored: dict[str, Tensor]) -> UInt8[Tensor, "rows bytes"]:
    """A matrix as GGUF has it, a row after the other.

    Args:
        stored: its tensors by suffix, or some of its rows.

    Raises: InputError for a scale that float16 does not hold.
    """
    scale = stored["weight_scale"].float()
    narrow = scale.half()
    if not torch.equal(narrow.float(), scale):
        raise InputError(
            f"{quoted(matrix.name)}: a scale does not fit float16, the type that GGUF has; quantize with "
            f"{option('scale_dtype', 'float16')}"
        )
    codes = unpack(stored["weight"], block.bits, matrix.shape[1]).view(-1, block.size)
    d = (block.sign * narrow).reshape(-1, 1).view(torch.uint8)
    parts = [d, block.packed(codes)] if block.first else [block.packed(codes), *[d] * block.copies]
    return torch.cat(parts, 1).view(len(scale), -1)
