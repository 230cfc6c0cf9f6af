"""How a quantized matrix is written: packed (our format), dequantized, or as bitsandbytes' NF4.

A layout knows the names, dtypes and shapes of the tensors it writes before any weight is read, so that headers come
first; and it reads back what it wrote, so that errors are measured on the file's own tensors.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from loftq.errors import UsageError, option
from loftq.formats.config import quantization_config, read_groups
from loftq.formats.rows import Rows, gathered, scattered
from loftq.formats.tensorfile import DTYPES, Entry
from loftq.numerics import Quantized, decode, dequantize, encode, normal_float, oriented, oriented_shape
from loftq.options import check_choice
from loftq.spec import QuantSpec, stacked_tensors, stored_tensors

if TYPE_CHECKING:
    from loftq.planning import Matrix

Specs = Sequence[tuple[str, QuantSpec]]  # names of modules or stacks, and how each is stored


class Layout(ABC):
    """An output format: how a quantized matrix is written and read back.

    Attributes:
        name: its name in ``--format``.
        fills: its values for options that the caller left open (None or ``auto``).
        widths: numbers of bits that it has; empty for all.
        imports: lines of Python that its reader needs before ``from_pretrained``, each with a line end.
        packages: packages that are needed to read it, besides transformers and PEFT.
        packed: whether this package's layers load it, so that it can be trained on.
        budgeted: whether it takes the bytes that a budget counts, :attr:`loftq.planning.Matrix.bytes`.
        rounds: whether it rounds to the matrix's dtype, so that a reader's Q may differ from the solver's.
        stacks: whether it stores stacks of experts: entries then have a leading axis for the experts, and each expert
            is encoded alone.
        restores: whether it writes the source's own tensors, if a matrix, or each expert of a stack, is made of whole
            ones.
        keeps_conv1d: whether the model that is loaded from it has a Conv1D where the source has one.
    """

    name: ClassVar[str]
    fills: ClassVar[Mapping[str, Any]] = {}
    widths: ClassVar[tuple[int, ...]] = ()
    imports: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    packed: ClassVar[bool] = False
    budgeted: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    restores: ClassVar[bool] = False
    keeps_conv1d: ClassVar[bool] = True

    def filled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A policy's options, with this layout's values for those that are left open."""
        return {**options, **{name: v for name, v in self.fills.items() if options.get(name) in (None, "auto")}}

    @abstractmethod
    def entries(self, matrix: "Matrix") -> list[Entry]:
        """Names, dtypes and shapes of a matrix's tensors, in order. UsageError for a matrix that it cannot store."""

    @abstractmethod
    def encode(self, matrix: "Matrix", quantized: Quantized) -> list[Tensor]:
        """The values of the tensors of :meth:`entries`."""

    @abstractmethod
    def decode(self, matrix: "Matrix", tensors: list[Tensor]) -> Tensor:
        """The float32 matrix ``(out, in)`` that a reader gets from the tensors of :meth:`encode`."""

    def quantization_config(self, modules: Specs, bits: float, kept: list[str], stacks: Specs = ()) -> dict | None:
        """The ``quantization_config`` for ``config.json``; None for a dense model.

        Args:
            modules, stacks: names and specs of quantized modules, and of Parameters that are stacks of experts.
            kept: modules that an adapter could wrap, but that are not quantized.
        """
        return None

    def modules_in(self, config: Any) -> set[tuple[str, QuantSpec]] | None:
        """The modules that a ``quantization_config`` names, with their specs; None if it names none.

        Raises: InputError for an object that this layout did not write.
        """
        return None


_LAYOUTS: dict[str, Layout] = {}
L = TypeVar("L", bound=Layout)


def register_format(kind: type[L]) -> type[L]:
    """Register an output format for every call and command of this process. A class decorator.

    Example:
        >>> @loftq.register_format
        ... class Halves(loftq.Layout):
        ...     name, packages = "halves", ("halves",)
        ...     def entries(self, matrix):
        ...         stem = matrix.name.removesuffix("weight")
        ...         return [loftq.Entry(stem + part, "F16", matrix.shape) for part in ("high", "low")]
        ...     def encode(self, matrix, quantized):
        ...         weight = loftq.dequantize(quantized, matrix.quant)
        ...         return [weight.half(), (weight - weight.half().float()).half()]
        ...     def decode(self, matrix, tensors):
        ...         return tensors[0].float() + tensors[1].float()

    Raises: UsageError if the name is taken.
    """
    layout = kind()  # abstract methods that are missing are told by Python
    if layout.name in _LAYOUTS:
        raise UsageError(f"a format {layout.name} is there already; choose another name")
    _LAYOUTS[layout.name] = layout
    return kind


def get(name: str) -> Layout:
    """The layout of a name. Raises: UsageError if there is none."""
    check_choice(option("format"), name, names())
    return _LAYOUTS[name]


def why_not_served(layout: Layout, software: str) -> str:
    """Why no file for ``software`` can be made of a directory in this format; empty if one can."""
    if layout.packed:
        return ""
    return (
        f"{option('format', layout.name)} keeps no packed codes, of which the files for {software} are made; quantize "
        f"with {option('format', PackedLayout.name)}, or merge, and convert that"
    )


def names() -> tuple[str, ...]:
    """All layouts, in the order in which they were registered."""
    return tuple(_LAYOUTS)


@register_format
class PackedLayout(Layout):
    """Our own format, docs/format.md."""

    name = "loftq"
    imports = "import loftq  # registers the packed layers\n"
    packages = ("loftq",)
    packed = budgeted = stacks = True
    keeps_conv1d = False

    def entries(self, matrix: "Matrix") -> list[Entry]:
        if matrix.experts:
            stored = stacked_tensors(matrix.quant, matrix.name, matrix.experts, *matrix.shape)
            return [Entry(name, dtype, shape) for name, (dtype, shape) in stored.items()]
        stem = matrix.name.removesuffix("weight")
        return [
            Entry(stem + suffix, dtype, shape)
            for suffix, (dtype, shape) in stored_tensors(matrix.quant, *matrix.shape).items()
        ]

    def encode(self, matrix: "Matrix", quantized: Quantized) -> list[Tensor]:
        tensors = encode(quantized, matrix.quant)
        return [tensors[suffix] for suffix in stored_tensors(matrix.quant, *matrix.shape)]

    def decode(self, matrix: "Matrix", tensors: list[Tensor]) -> Tensor:
        names = stored_tensors(matrix.quant, *matrix.shape)
        return decode(dict(zip(names, tensors, strict=True)), matrix.quant, matrix.shape[1])

    def quantization_config(self, modules: Specs, bits: float, kept: list[str], stacks: Specs = ()) -> dict | None:
        return quantization_config(modules, bits, stacks)

    def modules_in(self, config: Any) -> set[tuple[str, QuantSpec]] | None:
        return {(module, group.quant) for group in read_groups(config) for module in group.names}


@register_format
class DenseLayout(Layout):
    """The dequantized backbone in the dtype of what is kept: loads anywhere, saves nothing.

    By the names of the source, wherever a matrix is all that its tensors hold.
    """

    name = "dense"
    rounds = stacks = restores = True

    def entries(self, matrix: "Matrix") -> list[Entry]:
        if found := matrix.sources:
            return [Entry(name, matrix.dtype, shape) for name, shape in found.items()]
        shape = oriented_shape(matrix.kind, matrix.shape)
        return [Entry(matrix.name, matrix.dtype, (matrix.experts, *shape) if matrix.experts else shape)]

    def encode(self, matrix: "Matrix", quantized: Quantized) -> list[Tensor]:
        weight = dequantize(quantized, matrix.quant).to(DTYPES[matrix.dtype])
        weight = oriented(matrix.kind, weight).contiguous()
        parts: dict[str, list[Rows]] = {name: [] for name in matrix.sources}
        if not parts:
            return [weight]
        (pieces,) = matrix.made
        for piece, rows in zip(pieces, weight.split([piece.count for piece in pieces]), strict=True):
            parts[piece.tensor].append((piece, rows))
        return [scattered(found) for found in parts.values()]

    def decode(self, matrix: "Matrix", tensors: list[Tensor]) -> Tensor:
        found, weight = matrix.sources, tensors[0]
        if found:
            weight = gathered(matrix.made[0], dict(zip(found, tensors, strict=True)))
        return oriented(matrix.kind, weight.float())


@register_format
class BitsAndBytesLayout(Layout):
    """bitsandbytes' 4-bit NF4 tensors, as its ``Linear4bit`` saves them: loads without our package.

    NF2's levels are four of NF4's sixteen, so a 2-bit backbone fits exactly (and takes 4 bits).
    """

    name = "bnb"
    fills: ClassVar[Mapping[str, Any]] = {"scale_dtype": "float32", "code": "nf"}
    widths = (2, 4)
    packages = ("bitsandbytes",)
    SUFFIXES = ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")
    NF2_IN_NF4 = (0, 7, 11, 15)

    def entries(self, matrix: "Matrix") -> list[Entry]:
        self._check(matrix)
        stem = matrix.name.removesuffix("weight")
        numel = matrix.shape[0] * matrix.shape[1]
        shapes = [(numel // 2, 1), (numel // matrix.quant.block_size,), (16,), (len(self._state(matrix)),)]
        dtypes = ["U8", "F32", "F32", "U8"]
        return [Entry(stem + s, d, n) for s, d, n in zip(self.SUFFIXES, dtypes, shapes, strict=True)]

    def encode(self, matrix: "Matrix", quantized: Quantized) -> list[Tensor]:
        codes = quantized.codes.flatten()
        if matrix.quant.bits == 2:
            codes = torch.tensor(self.NF2_IN_NF4, dtype=torch.uint8)[codes.int()]
        packed = (codes[0::2] << 4) | codes[1::2]  # the first of two codes is the high half
        state = torch.frombuffer(bytearray(self._state(matrix)), dtype=torch.uint8)
        return [
            packed[:, None].contiguous(),
            quantized.scales["weight_scale"].flatten(),
            normal_float(4),
            state,
        ]

    def decode(self, matrix: "Matrix", tensors: list[Tensor]) -> Tensor:
        packed, absmax, levels, _ = tensors
        codes = torch.stack([packed[:, 0] >> 4, packed[:, 0] & 15], 1).view(-1, matrix.quant.block_size)
        return (levels[codes.int()] * absmax[:, None]).view(matrix.shape)

    def quantization_config(self, modules: Specs, bits: float, kept: list[str], stacks: Specs = ()) -> dict | None:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": kept,
        }

    def _check(self, matrix: "Matrix") -> None:
        quant = matrix.quant
        stored = (quant.code, quant.scale_dtype, quant.double_quant)
        if stored != ("nf", "float32", False) or quant.bits not in self.widths:
            raise UsageError(
                f"{matrix.name}: {option('format', 'bnb')} holds NF4 (or NF2 in it) with float32 scales; use "
                f"{option('bits', 4)}, {option('code', 'nf')}, {option('scale_dtype', 'float32')}, without "
                f"{option('double_quant')}"
            )
        if matrix.shape[1] % quant.block_size or matrix.kind == "embedding":
            raise UsageError(
                f"{matrix.name}: {option('format', 'bnb')} needs a Linear whose in_features are a multiple of the "
                f"block size {quant.block_size}, got {matrix.kind} {matrix.shape}; leave it dense with "
                f"{option('bits', 'NAME=16,4')}"
            )

    def _state(self, matrix: "Matrix") -> bytes:
        dtype = str(DTYPES[matrix.source or matrix.dtype]).removeprefix("torch.")
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": matrix.quant.block_size, "dtype": dtype}
        return json.dumps({**state, "shape": list(matrix.shape)}).encode()
