"""``loftq export --to gguf``: the quantized model with exactly its codes, and the adapter apart, for llama.cpp.

``model.gguf`` holds every quantized matrix in the block of GGUF that has the same numbers, and all else as it is
stored. A stack of experts is one tensor there, of gate, of up and of down. ``adapter.gguf`` is a LoRA whose ``B`` has
the scaling folded in, because readers know ``alpha / rank`` only.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loftq.architecture.served import refuse_uneven
from loftq.checkpoint.produce import Files
from loftq.errors import InputError, quoted
from loftq.formats import fsio
from loftq.numerics import oriented_shape
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base, Dense
from loftq.serving.blocks import Block, block_bytes, block_for
from loftq.serving.gguf_header import (
    Family,
    Header,
    add_experts,
    add_sizes,
    family_of,
    gguf,
    padding,
    permuted,
    rope_factors,
)
from loftq.serving.gguf_vocab import add_vocabulary
from loftq.serving.merge import Begin

PLAIN = {"F32": 0, "F16": 1, "BF16": 30}  # GGML's types of what is not quantized
ROPE_FACTORS = "rope_freqs.weight"


ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")  # llama.cpp has them in float32, as its script writes


@dataclass(frozen=True)
class Placed:
    """A tensor of the base in the file, or rows of every matrix of a stack.

    Attributes:
        rows: of each matrix.
        shape: in the file; of a stack experts first.
        kind, size: GGML's type, and bytes.
    """

    name: str
    tensor: Dense
    rows: slice
    shape: tuple[int, ...]
    kind: int
    size: int
    block: Block | None = None


def check(base: Base, adapter: Adapter | None, preferred: str) -> Family:
    """Refuse what cannot be written, before anything is."""
    family = family_of(base.model)
    refuse_uneven(family.name, (placed.name for placed in _placed(base, family, preferred)))
    if adapter is not None:
        adapter.refuse_more_than_linear("a GGUF adapter", "llama.cpp's convert_hf_to_gguf.py", experts=True)
    return family


def write(
    place: Path,
    base: Base,
    adapter: Adapter | None,
    family: Family,
    rule: str | None,
    preferred: str,
    begin: Begin,
) -> Files:
    """``model.gguf`` and ``adapter.gguf`` in a directory.

    Args:
        rule: llama.cpp's name of the tokenizer's rule for cutting words, where it is not known.
        preferred: of two types that hold a matrix the one to take.
    """
    placed = _placed(base, family, preferred)
    header = _header(base, adapter, family, placed, rule)
    advance = begin(len(placed))
    factors = rope_factors(family)
    if factors is not None:
        header.add(ROPE_FACTORS, factors.shape, PLAIN["F32"], factors.nbytes)

    def contents() -> Iterator[bytes | memoryview]:
        yield header.encoded()
        for one in placed:
            yield from _bytes(base, one, family)
            yield padding(one.size)
            advance()
        if factors is not None:
            yield factors.tobytes()
            yield padding(factors.nbytes)

    made = modelfile(place, adapter is not None)
    made["model.gguf"] = fsio.write_atomic(place / "model.gguf", contents())
    if adapter is not None:
        made["adapter.gguf"] = fsio.write_atomic(
            place / "adapter.gguf", lora(family.name, _lora_parts(adapter, placed, family))
        )
    return made


def modelfile(place: Path, with_adapter: bool) -> Files:
    """What Ollama makes its model of."""
    ollama = "FROM ./model.gguf\n" + ("ADAPTER ./adapter.gguf\n" if with_adapter else "")
    return {"Modelfile": fsio.write_atomic(place / "Modelfile", [ollama.encode()])}


def _placed(base: Base, family: Family, preferred: str) -> list[Placed]:
    """All but what the model has no parameter for: old checkpoints hold the frequencies of their embeddings."""
    return [
        _place(name, tensor, rows, preferred)
        for tensor in base.as_model
        for name, rows in family.parts(tensor, base.model).items()
    ]


def _place(name: str, tensor: Dense, rows: slice, preferred: str) -> Placed:
    shape = tensor.shape
    if tensor.experts:
        out, columns = oriented_shape(tensor.kind, shape[1:])
        shape = tensor.experts, len(range(out)[rows]), columns
    count = math.prod(shape)
    if tensor.matrix is not None:
        block = block_for(tensor.matrix, preferred)
        return Placed(name, tensor, rows, shape, block.type, count // block.size * block.bytes, block)
    if tensor.dtype not in PLAIN:
        raise InputError(f"{quoted(tensor.name)}: GGUF holds no {tensor.dtype}")
    single = len(shape) == 1 or name.endswith(ROUTERS)  # vectors: llama.cpp adds and multiplies them in float32
    dtype = "F32" if single else tensor.dtype
    return Placed(name, tensor, rows, shape, PLAIN[dtype], count * (4 if dtype == "F32" else 2))


def _bytes(base: Base, placed: Placed, family: Family) -> Iterator[memoryview]:
    """The tensor as the file has it: tables that are stored so in pieces, stacks expert by expert."""
    tensor, heads = placed.tensor, family.heads(placed.name)
    is_table = len(placed.shape) == 2 and not tensor.matrix and placed.kind == PLAIN[tensor.dtype]
    if is_table and not heads:
        yield from base.checkpoint.chunks(tensor.name)
        return
    for expert in range(tensor.experts) if tensor.experts else (None,):
        raw = permuted(_raw(base, placed, family, expert), heads)
        yield np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data


def _raw(base: Base, placed: Placed, family: Family, expert: int | None) -> np.ndarray:
    """The values or bytes of the tensor, or of an expert, a row after the other."""
    matrix = placed.tensor.matrix
    if matrix is not None:
        assert placed.block is not None
        stored = {suffix: held[placed.rows] for suffix, held in base.by_suffix(matrix, expert).items()}
        return block_bytes(placed.block, matrix, stored).numpy()
    value = base.read(placed.tensor, expert)[placed.rows]
    if placed.kind == PLAIN["F32"]:
        value = value.float()
    if value.ndim == 1 and family.name == "gemma" and placed.name.endswith("norm.weight"):
        value = value + 1  # transformers multiplies by 1 + weight, llama.cpp by the weight
    return array_of(value)


def array_of(value: Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bytes."""
    value = value.contiguous()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


def _header(base: Base, adapter: Adapter | None, family: Family, placed: list[Placed], rule: str | None) -> Header:
    header = Header(family.name)
    header.add_type(gguf.GGUFType.MODEL)
    header.add_name(type(base.model).__name__)
    table = base.parameter("model.embed_tokens.weight")
    assert table is not None
    add_sizes(header, family, table.shape[0])
    add_experts(header, family, {one.name: one.shape for one in placed})
    sizes = [(one.block, one.size) for one in placed if one.block]
    header.add_file_type(file_type(sizes) if sizes else _dense_type(placed))
    header.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with_tokenizer = adapter is not None and (adapter.directory / "tokenizer.json").is_file()
    add_vocabulary(header, adapter.directory if with_tokenizer else base.directory, table.shape[0], rule)  # type: ignore[union-attr]
    for one in placed:
        header.add(one.name, one.shape, one.kind, one.size)
    return header


def file_type(sizes: list[tuple[Block, int]]) -> int:
    """Of a file: that of the blocks which take the most bytes."""
    totals: dict[Block, int] = {}
    for block, size in sizes:
        totals[block] = totals.get(block, 0) + size
    return max(totals, key=lambda block: totals[block]).file_type


def _dense_type(placed: list[Placed]) -> int:
    """A file's type where nothing is quantized, by its largest tensor."""
    return {"F32": 0, "F16": 1, "BF16": 32}[max(placed, key=lambda one: one.size).tensor.dtype]


@dataclass(frozen=True)
class LoraPart:
    """The adapter of one tensor: ``A (rank, columns)`` and ``B (rows, rank)`` with the scaling in it, when read.

    Attributes:
        shape: of the tensor in the file. Of a stack ``(experts, rows, columns)``: ``A`` and ``B`` have experts first.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    read: Callable[[], tuple[Tensor, Tensor]]


def _lora_parts(adapter: Adapter, placed: list[Placed], family: Family) -> list[LoraPart]:
    def part(one: Placed) -> LoraPart:
        name = one.tensor.name

        def product(expert: int | None) -> tuple[Tensor, Tensor]:
            b, a, s = adapter.product(name, expert)
            return a, torch.from_numpy(permuted((s * b[one.rows]).numpy(), family.heads(one.name)))

        def read() -> tuple[Tensor, Tensor]:
            if not one.tensor.experts:
                return product(None)
            every = [product(expert) for expert in range(one.tensor.experts)]
            return torch.stack([a for a, _ in every]), torch.stack([b for _, b in every])

        return LoraPart(one.name, one.shape, adapter.factors[name].rank, read)

    return [part(one) for one in placed if one.tensor.name in adapter.factors]


def lora(architecture: str, parts: list[LoraPart]) -> Iterator[bytes | memoryview]:
    """A file with an adapter."""
    header = Header(architecture)
    header.add_type(gguf.GGUFType.ADAPTER)
    header.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = max(part.rank for part in parts)
    header.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for part in parts:
        *experts, rows, columns = part.shape
        for x, shape in (("a", (*experts, part.rank, columns)), ("b", (*experts, rows, part.rank))):
            header.add(f"{part.name}.lora_{x}", shape, PLAIN["F32"], 4 * math.prod(shape))
    yield header.encoded()
    for part in parts:
        a, b = part.read()
        folded = b * (part.rank / rank)  # a reader multiplies by alpha / rank, the tensor's own rank
        for array in (a.numpy(), folded.numpy()):
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            yield padding(array.nbytes)


def commands(with_adapter: bool) -> list[str]:
    """How llama.cpp and Ollama are told to run it, from inside the directory."""
    lora = " --lora adapter.gguf" if with_adapter else ""
    return [
        f"llama-cli -m model.gguf{lora}",
        f"llama-server -m model.gguf{lora}",
        "ollama create my-model -f Modelfile && ollama run my-model",
    ]
