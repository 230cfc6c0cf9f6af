"""Codes: what the small integer of a weight stands for, and how the scale of a block is chosen.

Every code decodes by one formula, ``value = (levels[code] - zero) * scale`` (docs/format.md). A code is one object,
with its widths, its levels, its rule for the scales, and what it stores beside them. All other modules ask the object,
and compare no names. To add a code, write a subclass of :class:`Code` and give it to :func:`register_code`, which
refuses an incomplete one.

Tables are made once per process. They must not depend on the first caller: models are often built under another
default dtype, on the meta device, or in inference mode.
"""

import base64
import functools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from loftq.errors import UsageError, meant, quoted

BITS = (2, 3, 4, 8)  # widths that the format has
RATE_UNIT = 16  # a trellis has any number of sixteenths of a bit a weight
HOST: Any = {"dtype": torch.float32, "device": "cpu"}
Stored = Callable[[Tensor], Tensor]  # a scale -> the scale as a reader of the file gets it


class Code(ABC):
    """A quantization data type: its levels, and its rule for the scale of a block.

    Attributes:
        name: the code's name in options, recipes and files.
        widths: the numbers of bits that it has, ascending.
        per_tensor: whether the whole matrix has one scale, instead of one for every block of a row.
        zero: safetensors dtype of its zero points: ``U8`` for whole numbers, ``F32`` for any (per tensor only), or None
            if it has none.
        clips: whether its rule clips the largest weights of a block to the outer levels.
        form: layout of the codes: ``blocks`` of a row, each with a scale, or ``trellis``.
        fields: the fields of :class:`loftq.spec.QuantSpec` that it has, besides name and bits.
    """

    form: ClassVar[str] = "blocks"
    fields: ClassVar[tuple[str, ...]] = ("block_size", "scale_dtype", "double_quant")
    name: ClassVar[str] = ""
    widths: ClassVar[tuple[float, ...]] = BITS
    per_tensor: ClassVar[bool] = False
    zero: ClassVar[str | None] = None
    clips: ClassVar[bool] = False

    def tables(self, width: int) -> dict[str, str]:
        """Tables of levels for ``config.json``, for readers that do not have them; none for codes in blocks."""
        return {}

    @abstractmethod
    def levels(self, bits: int) -> Float[Tensor, " levels"]:
        """The ``2**bits`` levels in float32 on the CPU, ascending. Zero may occur twice, as in floating point.

        A trellis has one unordered table for every width of its windows instead.
        """

    @abstractmethod
    def scale(
        self, values: Float[Tensor, "out n size"], bits: int, stored: Stored
    ) -> tuple[Float[Tensor, "out n"], Float[Tensor, "out n"] | None]:
        """Scale and zero point of every block, in float32.

        Args:
            values: the weights, with blocks along the last axis; the whole matrix as ``(1, 1, size)`` if per tensor.
            stored: rounds a scale as the file stores it, for a zero point that depends on the stored scale.
        """

    def lopsided(self, bits: int) -> bool:
        """Whether the levels are asymmetric, so that a negative scale gives other values. Not with a zero point."""
        table = levels(self.name, bits)
        return self.zero is None and not torch.equal(table, -table.flip(0))


class Absmax(Code):
    """A code whose scale maps the largest magnitude of a block to the largest level."""

    def scale(self, values: Tensor, bits: int, stored: Stored) -> tuple[Tensor, None]:
        return values.abs().amax(-1) / levels(self.name, bits)[-1].item(), None


class SignedMaximum(Code):
    """A code whose levels reach further on one side: the scale maps the weight of largest magnitude to that end."""

    def scale(self, values: Tensor, bits: int, stored: Stored) -> tuple[Tensor, None]:
        table = levels(self.name, bits)
        if not self.lopsided(bits):
            return values.abs().amax(-1) / table[-1].item(), None
        low, high = values.amin(-1), values.amax(-1)
        return torch.where(high >= -low, high, low) / table[table.abs().argmax()].item(), None


_CODES: dict[str, Code] = {}
C = TypeVar("C", bound=Code)


def register_code(kind: type[C]) -> type[C]:
    """Register a code for every option, file and kernel of this process. A class decorator.

    Example:
        >>> @loftq.register_code
        ... class Ternary(loftq.Code):
        ...     name, widths = "ternary", (2,)
        ...     def levels(self, bits):
        ...         return torch.tensor([-1.0, 0.0, 0.0, 1.0])
        ...     def scale(self, values, bits, stored):
        ...         return values.abs().mean(-1), None

    Raises: UsageError if the name is taken, or if levels or scales are not as :class:`Code` describes them.
    """
    code = kind()  # abstract methods that are missing are told by Python
    if not re.fullmatch(r"[a-z][a-z0-9-]*", code.name) or code.name == "auto":
        raise UsageError(f"a code's name has small letters, digits and dashes, got {quoted(repr(code.name))}")
    if code.name in _CODES:
        raise UsageError(f"a code {code.name} is there already; choose another name")
    _CODES[code.name] = code
    try:
        _check(code)
    except UsageError:
        del _CODES[code.name]
        levels.cache_clear()
        raise
    return kind


def get(name: str) -> Code:
    """The code of a name. Raises: UsageError if there is none."""
    if not isinstance(name, str) or name not in _CODES:
        near = meant(name, _CODES)
        raise UsageError(f"code must be one of {', '.join(_CODES)}, got {quoted(repr(name))}{near}")
    return _CODES[name]


def names() -> tuple[str, ...]:
    """All codes, in the order in which they were registered."""
    return tuple(_CODES)


@functools.cache
@torch.inference_mode(False)
def levels(name: str, bits: int) -> Float[Tensor, " levels"]:
    """The levels of a code, :meth:`Code.levels`, made once a process."""
    return get(name).levels(bits)


def _check(code: Code) -> None:
    """Refuse a code that kernels, readers or the solver would be wrong about."""
    if not code.widths or any(bits not in BITS for bits in code.widths):
        raise UsageError(f"code {code.name}: widths are of {BITS}, got {code.widths}")
    if code.zero not in (None, "U8", "F32") or (code.zero == "F32" and not code.per_tensor):
        raise UsageError(f"code {code.name}: zero is None, 'U8', or with per_tensor 'F32'; got {code.zero!r}")
    for bits in map(int, code.widths):
        table = levels(code.name, bits)
        if table.shape != (2**bits,) or table.dtype != torch.float32 or table.device.type != "cpu":
            raise UsageError(f"code {code.name}: {2**bits} float32 levels on the CPU are wanted for {bits} bits")
        twice = table[:-1][table.diff() == 0]
        if not table.isfinite().all() or (table.diff() < 0).any() or twice.any() or len(twice) > 1:
            raise UsageError(f"code {code.name}: levels must be finite and ascend; only zero may be there twice")
        scale, zero = code.scale(torch.linspace(-1, 1, 8, **HOST).view(1, 1, 8), bits, lambda scale: scale)
        if scale.shape != (1, 1) or (zero is None) != (code.zero is None):
            raise UsageError(
                f"code {code.name}: scale() must give a scale for every block, and zero points if it has any"
            )


def _sigma(values: Tensor) -> Tensor:
    """Sample standard deviation over the last axis; 0 for a single value."""
    return values.std(-1) if values.shape[-1] > 1 else torch.zeros_like(values[..., 0])


# --- the codes that come with loftq ---------------------------------------------------------------------------------

OFFSET = 0.9677083  # outer quantile of NF4 in QLoRA's released code; LoftQ's code uses it for every width


@functools.cache
@torch.inference_mode(False)
def normal_float(bits: int) -> Float[Tensor, " levels"]:
    """Levels of the NormalFloat code, sorted, in [-1, 1], with an exact zero.

    QLoRA (arXiv 2305.14314, section 3): quantiles of N(0, 1) taken separately on each side of zero, then
    divided by the largest. One more positive level than negative. Built in the precision of the released
    code (float32 probabilities, float64 quantiles), so that NF4 equals bitsandbytes' table to the bit.

    Returns: ``2**bits`` float32 values. For 2 bits: -1, 0, 0.3379, 1.
    Raises: UsageError if ``bits`` is not 2, 3, 4 or 8.
    """
    if bits not in BITS:
        raise UsageError(f"NormalFloat has 2, 3, 4 or 8 bits, got {bits!r}")
    half = 2**bits // 2
    positive = torch.special.ndtri(torch.linspace(OFFSET, 0.5, half + 1, **HOST)[:-1].double())
    negative = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, half, **HOST)[:-1].double())
    values = torch.cat([negative, torch.zeros(1, **HOST).double(), positive]).float().sort().values
    return values / values.max()


@register_code
class NormalFloat(Absmax):
    """NormalFloat with absmax scales (QLoRA, LoftQ)."""

    name = "nf"

    def levels(self, bits: int) -> Tensor:
        return normal_float(bits)


@register_code
class Lloyd(SignedMaximum):
    """The levels that leave Gaussian blocks of 64 the least squared error if scale and sign are fitted.

    They are lopsided, so that the sign is of use. By formula the scale is the weight of largest magnitude, with its
    sign: the level 1 meets it. benchmarks/levels.py makes the table.
    """

    name = "lloyd"
    widths = (2, 3, 4)
    TABLE: ClassVar = {
        2: (-0.7643, -0.1683, 0.347, 1.0),
        3: (-0.7998, -0.4859, -0.2539, -0.0516, 0.1443, 0.3541, 0.6087, 1.0),
        4: (
            *(-0.9163, -0.7046, -0.5496, -0.4214, -0.3097, -0.2088, -0.1148, -0.0244),
            *(0.065, 0.1554, 0.2484, 0.3477, 0.4572, 0.5847, 0.7472, 1.0),
        ),
    }

    def levels(self, bits: int) -> Tensor:
        return torch.tensor(self.TABLE[bits], **HOST)


@register_code
class Uniform(Code):
    """The block uniform of LoftQ's released quantizer: no zero among the levels, scale = mean + 2.5 sigma."""

    name = "uniform"
    clips = True

    def levels(self, bits: int) -> Tensor:
        return torch.linspace(-1, 1, 2**bits, **HOST)

    def scale(self, values: Tensor, bits: int, stored: Stored) -> tuple[Tensor, None]:
        return values.mean(-1) + 2.5 * _sigma(values), None


@register_code
class UniformTensor(Code):
    """The per-tensor uniform of LoftQ's GLUE code: clip at mean ± 2 sigma, then min-max, with one scale and offset.

    Its 1e-8 keeps a constant tensor finite. The zero point belongs to the stored scale, so that the lower end is met
    exactly even where the scale is coarse.
    """

    name = "uniform-tensor"
    per_tensor = True
    zero = "F32"
    clips = True

    def levels(self, bits: int) -> Tensor:
        return torch.arange(2**bits, **HOST)

    def scale(self, values: Tensor, bits: int, stored: Stored) -> tuple[Tensor, Tensor]:
        mean, sigma = values.mean(), _sigma(values.flatten())
        low = values.min().clamp(min=mean - 2 * sigma)
        high = values.max().clamp(max=mean + 2 * sigma)
        scale = stored(((high - low + 1e-8) / (2**bits - 1)).reshape(1, 1))
        smallest = torch.finfo(scale.dtype).tiny * torch.finfo(scale.dtype).eps
        scale = torch.where(scale == 0, smallest, scale).float()
        return scale, -low / scale


@register_code
class FloatingPoint(Absmax):
    """4-bit floating point E2M1, the elements of MXFP4 and NVFP4.

    The scale takes the largest magnitude of a block to 6; to 4 where that is a power of 2 and holds the block exactly,
    so that weights that come from MXFP4 stay as they are, in its blocks of 32.

    One sign, two exponent and one mantissa bits (OCP Microscaling Formats v1.0, section 5.3.3): 0, 0.5, 1, 1.5, 2, 3,
    4, 6 of either sign. Zero has both signs. A code is the place among the sorted values, not the bits of E2M1.
    """

    name = "fp4"
    widths = (4,)

    def levels(self, bits: int) -> Tensor:
        half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], **HOST)
        return torch.cat([-half.flip(0), half])

    def scale(self, values: Tensor, bits: int, stored: Stored) -> tuple[Tensor, None]:
        largest = values.abs().amax(-1)
        fourth, table = largest / 4, levels(self.name, bits).to(values.device)
        places = (torch.frexp(fourth).mantissa == 0.5).nonzero(as_tuple=True)
        codes = values[places] / fourth[places][:, None]
        held = (table[torch.bucketize(codes, table).clamp(max=len(table) - 1)] == codes).all(-1)
        scale = largest / 6
        scale[places] = torch.where(held, fourth[places], scale[places])
        return scale, None


@register_code
class Affine(Code):
    """Whole numbers with a scale and a whole zero point per block (the GPTQ and AWQ family)."""

    name = "affine"
    zero = "U8"

    def levels(self, bits: int) -> Tensor:
        return torch.arange(2**bits, **HOST)

    def scale(self, values: Tensor, bits: int, stored: Stored) -> tuple[Tensor, Tensor]:
        top = 2**bits - 1
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        scale = (high - low) / top
        return scale, (-low / torch.where(scale == 0, 1, scale)).round().clamp(0, top)


@register_code
class Integer(SignedMaximum):
    """Whole numbers around zero and a scale of either sign: what GGUF, compressed-tensors, MLX and ONNX hold exactly.

    ``-2**(bits - 1) + 1`` to ``2**(bits - 1)``: -1, 0, 1, 2 for 2 bits. At 8 bits -127 to 127, with zero twice: some
    readers negate the numbers, and -128 has no opposite.
    """

    name = "int"

    def levels(self, bits: int) -> Tensor:
        top = 2 ** (bits - 1)
        if bits == 8:
            half = torch.arange(top, **HOST)
            return torch.cat([-half.flip(0), half])
        return torch.arange(1 - top, top + 1, **HOST)


@register_code
class Iq4nl(SignedMaximum):
    """The 16 levels of GGUF's IQ4_NL, whole numbers of 8 bits; scales of either sign."""

    name = "iq4nl"
    widths = (4,)

    def levels(self, bits: int) -> Tensor:
        low = [-127, -104, -83, -65, -49, -35, -22, -10]
        return torch.tensor([*low, 1, 13, 25, 38, 53, 69, 89, 113], **HOST)


class Trellis(Code):
    """Windows into a string of bits that neighbouring weights share (:mod:`loftq.numerics.trellis`); a scale a row.

    The levels are those that leave Gaussian weights at 2 bits the least squared error: Lloyd's algorithm over Viterbi's
    paths. benchmarks/trellis_levels.py makes the tables.
    """

    form = "trellis"
    fields = ("scale_dtype", "window", "column_rates")
    name = "trellis"
    widths = tuple(p // RATE_UNIT if p % RATE_UNIT == 0 else p / RATE_UNIT for p in range(1, 4 * RATE_UNIT + 1))
    WINDOWS: ClassVar = (8, 10, 12)

    def tables(self, width: int) -> dict[str, str]:
        """The table of windows of so many bits: ``trellis-L`` -> base64 of 2^L little-endian float16."""
        return {(name := f"{self.name}-{width}"): _trellis_tables()[name]}

    def levels(self, bits: int) -> Tensor:
        """The levels of windows of so many bits, in float32."""
        (text,) = self.tables(bits).values()
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float16).float()

    def scale(self, values: Tensor, bits: int, stored: Stored) -> tuple[Tensor, None]:
        norm = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
        return (norm / values.shape[-1] ** 0.5).float(), None


@functools.cache
def _trellis_tables() -> dict[str, str]:
    return json.loads((Path(__file__).parent / "trellis_levels.json").read_text("utf-8"))


_CODES[Trellis.name] = Trellis()
