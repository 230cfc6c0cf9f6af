"""Code ``int`` as vLLM, MLX and ONNX Runtime have it, and directories of such matrices.

A weight is there ``(q - 2**(bits - 1)) * d`` with unsigned ``q``, the ``q`` of a row a stream of bits, low bits first.
``int`` has its numbers the other way round, so ``d`` is the opposite of its scale; at 8 bits it is the scale. Nothing
is rounded.
"""

from collections.abc import Callable
from dataclasses import replace
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
from loftq.planning.containers import CONTAINERS
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base, Dense
from loftq.serving.merge import Begin
from loftq.serving.output import small_files, write_shards
from loftq.spec import STORED, QuantSpec

WORD = 32  # bits of what the streams are read in

Shape = tuple[int, ...]


def check(base: Base, software: str, kinds: tuple[str, ...] = ("linear",)) -> None:
    """InputError for a matrix that ``software``, a value of ``--serve``, cannot hold."""
    have = {(bits, size) for code, bits, size in CONTAINERS[software] if code == "int"}
    for matrix in base.matrices:
        quant, columns = matrix.quant, matrix.shape[1]
        odd = {
            quant.code: quant.code != "int",
            "double_quant": quant.double_quant,
            matrix.kind: matrix.kind not in kinds,
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
    entries: Callable[[Shape, Shape], list[Entry]],
    made: Callable[[Matrix, Tensor, Tensor], list[Tensor]],
    begin: Begin,
) -> Files:
    """The checkpoint: what is quantized by ``made``, the rest as it is. One matrix is in memory at a time.

    Args:
        settings: into ``config.json``.
        entries: of a matrix, by suffix, from the shapes of its words and of its scales.
        made: the same tensors, of the two results of :func:`numbers`.
    """
    by_entry: dict[str, tuple[Entry, Dense]] = {}
    for tensor in base.tensors.values():
        found = [Entry(tensor.name, tensor.dtype, tensor.shape)]
        if matrix := tensor.matrix:
            (rows, columns), quant = matrix.shape, matrix.quant
            stem, words = matrix.name.removesuffix("weight"), columns * int(quant.bits) // WORD
            named = entries((rows, words), (rows, columns // quant.block_size))
            found = [replace(entry, name=stem + entry.name) for entry in named]
        by_entry |= {entry.name: (entry, tensor) for entry in found}
    advance = begin(len(by_entry))
    held: list[Tensor] = []  # of one matrix, whose entries follow each other

    def read(entry: Entry) -> list[Tensor]:
        _, tensor = by_entry[entry.name]
        advance()
        if tensor.matrix is None:
            return [base.checkpoint.read(tensor.name)]
        if not held:
            stored = base.by_suffix(tensor.matrix)
            held.extend(made(tensor.matrix, *numbers(tensor.matrix.quant, stored, tensor.matrix.shape[1])))
        return [held.pop(0)]

    files = write_shards(place, [entry for entry, _ in by_entry.values()], read)
    files["config.json"] = fsio.write_json(place / "config.json", strict_json.tagged({**base.config, **settings}))
    return files | small_files(place, base, adapter)
