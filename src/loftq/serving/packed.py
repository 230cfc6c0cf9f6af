"""Code ``int`` as vLLM, MLX and ONNX Runtime have it, and directories of such matrices.

A weight is there ``(q - 2**(bits - 1)) * d`` with unsigned ``q``, the ``q`` of a row a stream of bits, low bits first.
``int`` has its numbers the other way round, so ``d`` is the opposite of its scale; at 8 bits it is the scale. Nothing
is rounded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.produce import Files
from loftq.errors import InputError, listed, option, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.belongings import belongings
from loftq.formats.tensorfile import DTYPES, Entry
from loftq.numerics import pack, unpack
from loftq.planning import Matrix
from loftq.planning.containers import CONTAINERS
from loftq.serving.adapter import Adapter, own_files
from loftq.serving.base import Base, Dense
from loftq.serving.merge import Begin
from loftq.serving.output import copy, write_shards
from loftq.spec import STORED, QuantSpec, stored_tensors

LARGEST_FILE = 5 << 30
WORD = 32  # bits of what the streams are read in


def check(base: Base, software: str, kinds: tuple[str, ...] = ("linear",)) -> None:
    """InputError for a matrix that ``software``, a value of ``--serve``, cannot hold."""
    have = {(bits, size) for code, bits, size in CONTAINERS[software] if code == "int"}
    for matrix in base.matrices:
        quant, columns = matrix.quant, matrix.shape[1]
        if quant.code != "int" or quant.double_quant or matrix.kind not in kinds:
            raise InputError(
                f"{quoted(matrix.name)}: {software} holds code int on linear layers, and not {quant.code} on "
                f"{matrix.kind}; quantize with {option('serve', software)}, or merge"
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
    config = strict_json.load_object(base.directory / "config.json", special=True)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in STORED:
        raise InputError(
            f"{quoted(base.directory, 400)}: config.json has dtype {quoted(dtype)}; wanted one of {listed(STORED)}"
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


def write_directory(
    place: Path,
    base: Base,
    adapter: Adapter | None,
    settings: dict[str, Any],
    entries: Callable[[Matrix], list[Entry]],
    made: Callable[[Matrix, Tensor, Tensor], dict[str, Tensor]],
    begin: Begin,
) -> Files:
    """The checkpoint: what is quantized by ``made``, the rest as it is. One matrix is in memory at a time.

    Args:
        settings: into ``config.json``.
        entries: of a matrix; ``made``: the same tensors by name, of the two results of :func:`numbers`.
    """
    by_entry: dict[str, tuple[Entry, Dense]] = {}
    for tensor in base.tensors.values():
        plain = [Entry(tensor.name, tensor.dtype, tensor.shape)]
        by_entry |= {e.name: (e, tensor) for e in (entries(tensor.matrix) if tensor.matrix else plain)}
    advance = begin(len(by_entry))
    held: dict[str, Tensor] = {}

    def read(entry: Entry) -> list[Tensor]:
        _, tensor = by_entry[entry.name]
        advance()
        if tensor.matrix is None:
            return [base.checkpoint.read(tensor.name)]
        if entry.name not in held:
            held.clear()  # the tensors of a matrix follow each other
            quant, (rows, columns) = tensor.matrix.quant, tensor.matrix.shape
            stored = dict(zip(stored_tensors(quant, rows, columns), base.stored(tensor.matrix), strict=True))
            held.update(made(tensor.matrix, *numbers(quant, stored, columns)))
        return [held[entry.name]]

    files = write_shards(place, [entry for entry, _ in by_entry.values()], read, LARGEST_FILE)
    config = {**strict_json.load_object(base.directory / "config.json", special=True), **settings}
    files["config.json"] = fsio.write_json(place / "config.json", strict_json.tagged(config))
    return files | small_files(place, base, adapter)


def small_files(place: Path, base: Base, adapter: Adapter | None) -> Files:
    """The tokenizer and the like, the adapter's own before the base's."""
    files = copy(belongings(base.directory).files, base.directory, place)
    return files if adapter is None else files | copy(own_files(adapter), adapter.directory, place)
