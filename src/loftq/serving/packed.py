"""Code ``int`` as vLLM, MLX and ONNX Runtime have it, and directories of such matrices.

A weight is there ``(q - 2**(bits - 1)) * d`` with unsigned ``q``, the ``q`` of a row a stream of bits, low bits first.
``int`` has its numbers the other way round, so ``d`` is the opposite of its scale; at 8 bits it is the scale. Nothing
is rounded.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.produce import Files
from loftq.errors import InputError, listed, option, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.tensorfile import DTYPES, Entry
from loftq.numerics import pack, unpack
from loftq.planning import Matrix
from loftq.planning.containers import CONTAINERS, KINDS
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base, Dense
from loftq.serving.merge import Begin
from loftq.serving.output import small_files, write_shards
from loftq.serving.per_expert import layers
from loftq.spec import STORED, QuantSpec

WORD = 32  # bits of what the streams are read in

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PackedPart:
    """What is written as one tensor: a matrix of the base, or rows of an expert of it, or of all its experts.

    Attributes:
        matrix: by its name and shape there; with experts if all of them are its first axis.
    """

    matrix: Matrix
    whole: Matrix
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))


def parts(base: Base, tensor: Dense) -> list[PackedPart]:
    """The parts of a quantized tensor; of a stack the experts' layers in the source."""
    matrix = tensor.matrix
    assert matrix is not None
    if not matrix.experts:
        return [PackedPart(matrix, matrix)]
    made = []
    for layer, (expert, rows) in layers(tensor, base).items():
        shape = len(range(matrix.shape[0])[rows]), matrix.shape[1]
        one = replace(matrix, name=f"{layer}.weight", module=layer, shape=shape, experts=0, made=())
        made.append(PackedPart(one, matrix, expert, rows))
    return made


def check(base: Base, software: str) -> None:
    """InputError for a matrix that ``software``, a value of ``--serve``, cannot hold."""
    have = {(bits, size) for code, bits, size in CONTAINERS[software] if code == "int"}
    for matrix in base.matrices:
        quant, columns = matrix.quant, matrix.shape[1]
        odd = {
            quant.code: quant.code != "int",
            "double_quant": quant.double_quant,
            matrix.kind: matrix.kind not in KINDS[software],
        }
        if any(odd.values()):
            found = " and ".join(what for what, is_odd in odd.items() if is_odd)
            raise InputError(
                f"{quoted(matrix.name)}: {software} holds code int on linear layers, and not {found}; quantize with "
                f"{option('serve', software)}, or merge"
            )
        if (quant.bits, quant.block_size) not in have or columns % quant.block_size:
            raise InputError(
                f"{quoted(matrix.name)}: {software} holds no {quant.bits} bits in blocks of {quant.block_size} on rows "
                f"of {columns}; quantize with {option('serve', software)}, which leaves dense what it cannot hold"
            )


def numbers(quant: QuantSpec, stored: dict[str, Tensor], columns: int) -> tuple[Tensor, Tensor]:
    """Bytes ``(rows, columns * bits / 8)`` and ``d (rows, blocks)`` in float32, of the stored tensors by suffix."""
    bits = int(quant.bits)
    codes, scale = unpack(stored["weight"], bits, columns), stored["weight_scale"].float()
    if bits == 8:  # of the two zeros one
        codes, sign = codes + (codes <= 127).to(torch.uint8), 1
    else:
        codes, sign = 2**bits - 1 - codes, -1
    return pack(codes, bits).view(torch.uint8).reshape(len(codes), -1), sign * scale.reshape(len(codes), -1)


def scale_dtype(base: Base) -> str:
    """The type that scales are loaded in, the model's own, by safetensors' name."""
    config = base.config
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in STORED:
        raise InputError(
            f"{quoted(base.directory)}: config.json has dtype {quoted(dtype)}; wanted one of {listed(STORED)}"
        )
    return STORED[dtype]


def narrow(matrix: Matrix, values: Tensor, dtype: str) -> Tensor:
    """``values`` in a narrower type. InputError if that rounds one."""
    found = values.to(DTYPES[dtype])
    if not torch.equal(found.float(), values):
        raise InputError(
            f"{quoted(matrix.name)}: a scale does not fit the model's type {dtype}, in which readers load it; "
            f"quantize with {option('scale_dtype', 'bfloat16')}, or the model's own type"
        )
    return found


@dataclass(frozen=True)
class Form:
    """How software has a checkpoint.

    Attributes:
        entries: of a matrix, by suffix, from the shapes of its words and of its scales.
        made: the same tensors, of the two results of :func:`numbers`.
        parts: what is written of a tensor that is quantized.
        name: of one that is not.
    """

    entries: Callable[[Shape, Shape], list[Entry]]
    made: Callable[[Matrix, Tensor, Tensor], list[Tensor]]
    parts: Callable[[Base, Dense], list[PackedPart]] = parts
    name: Callable[[Base, Dense], str] = lambda base, tensor: tensor.name


def write_directory(
    place: Path, base: Base, adapter: Adapter | None, settings: dict[str, Any], form: Form, begin: Begin
) -> Files:
    """The checkpoint: what is quantized by ``form``, the rest as it is. One matrix is in memory at a time.

    Args:
        settings: into ``config.json``.
    """
    by_entry: dict[str, tuple[Entry, PackedPart | Dense]] = {}
    for tensor in base.tensors.values():
        if not tensor.matrix:
            name = form.name(base, tensor)
            by_entry[name] = Entry(name, tensor.dtype, tensor.shape), tensor
        for part in form.parts(base, tensor) if tensor.matrix else ():
            (rows, columns), quant = part.matrix.shape, part.matrix.quant
            stem, words = part.matrix.name.removesuffix("weight"), columns * int(quant.bits) // WORD
            stack = (part.matrix.experts,) if part.matrix.experts else ()
            named = form.entries((*stack, rows, words), (*stack, rows, columns // quant.block_size))
            by_entry |= {stem + entry.name: (replace(entry, name=stem + entry.name), part) for entry in named}
    advance = begin(len(by_entry))
    held: list[list[Tensor]] = []  # of one matrix, whose entries follow each other; of a stack expert after expert

    def first(part: PackedPart) -> Iterator[Tensor]:
        rest = []
        for expert in range(part.matrix.experts) if part.matrix.experts else (part.expert,):
            stored = {suffix: value[part.rows] for suffix, value in base.by_suffix(part.whole, expert).items()}
            one, *others = form.made(part.matrix, *numbers(part.matrix.quant, stored, part.matrix.shape[1]))
            yield one
            rest.append(others)
        held.extend(map(list, zip(*rest, strict=True)))

    def read(entry: Entry) -> Iterable[Tensor]:
        _, part = by_entry[entry.name]
        advance()
        if isinstance(part, Dense):
            return [base.checkpoint.read(part.name)]
        return held.pop(0) if held else first(part)

    files = write_shards(place, [entry for entry, _ in by_entry.values()], read)
    files["config.json"] = fsio.write_json(place / "config.json", strict_json.tagged({**base.config, **settings}))
    return files | small_files(place, base, adapter)
