"""``loftq export --to gguf``: the quantized model with exactly its codes, and the adapter apart, for llama.cpp.

``model.gguf`` holds every quantized matrix in the block of GGUF that has the same numbers, and all else as it is
stored. ``adapter.gguf`` is a LoRA whose ``B`` has the scaling folded in, because readers know ``alpha / rank`` only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loftq.errors import InputError, listed, quoted
from loftq.formats import fsio
from loftq.formats.regular import shown
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base, Dense
from loftq.serving.blocks import Block, block_bytes, block_for
from loftq.serving.gguf_header import Family, Header, add_sizes, family_of, gguf, padding, permuted, rope_factors
from loftq.serving.gguf_vocab import add_vocabulary
from loftq.serving.merge import Begin
from loftq.serving.output import Files
from loftq.spec import stored_tensors

PLAIN = {"F32": 0, "F16": 1, "BF16": 30}  # GGML's types of what is not quantized
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Placed:
    """A tensor of the base in the file."""

    name: str
    tensor: Dense
    kind: int
    size: int
    block: Block | None = None


def check(base: Base, adapter: Adapter | None) -> Family:
    """Refuse what cannot be written, before anything is."""
    family = family_of(base.model)
    for tensor in _tensors(base):
        _placed(tensor, family)
    if adapter is not None:
        whole = [*adapter.replaced, *adapter.new, *adapter.biases]
        embeddings = [name for name, factors in adapter.factors.items() if factors.embedding]
        if whole or embeddings:
            raise InputError(
                f"{shown(adapter.directory)}: {listed([*whole, *embeddings], 3)}: a GGUF adapter holds LoRA of linear "
                "layers only; merge it, and convert that with llama.cpp's convert_hf_to_gguf.py"
            )
    return family


def write(place: Path, base: Base, adapter: Adapter | None, family: Family, rule: str | None, begin: Begin) -> Files:
    """``model.gguf`` and ``adapter.gguf`` in a directory.

    Args:
        rule: llama.cpp's name of the tokenizer's rule for cutting words, where it is not known.
    """
    placed = [_placed(tensor, family) for tensor in _tensors(base)]
    header = _header(base, adapter, family, placed, rule)
    advance = begin(len(placed))
    factors = rope_factors(family)
    if factors is not None:
        header.add(ROPE_FACTORS, factors.shape, PLAIN["F32"], factors.nbytes)

    def contents() -> Iterator[bytes | memoryview]:
        yield header.encoded()
        for one in placed:
            raw = permuted(_raw(base, one, family), family.heads(one.name))
            yield np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data
            yield padding(raw.nbytes)
            advance()
        if factors is not None:
            yield factors.tobytes()
            yield padding(factors.nbytes)

    with_adapter = adapter is not None
    ollama = "FROM ./model.gguf\n" + ("ADAPTER ./adapter.gguf\n" if with_adapter else "")
    made = {"Modelfile": fsio.write_atomic(place / "Modelfile", [ollama.encode()])}
    made["model.gguf"] = fsio.write_atomic(place / "model.gguf", contents())
    if adapter is not None:
        made["adapter.gguf"] = fsio.write_atomic(place / "adapter.gguf", _adapter(base, adapter, family))
    return made


def _tensors(base: Base) -> list[Dense]:
    """All but what the model has no parameter for: old checkpoints hold the frequencies of their embeddings."""
    return [tensor for tensor in base.tensors.values() if tensor.matrix or tensor.role.module]


def _placed(tensor: Dense, family: Family) -> Placed:
    name = family.tensor(tensor)
    if tensor.matrix is not None:
        block = block_for(tensor.matrix)
        rows, columns = tensor.shape
        return Placed(name, tensor, block.type, rows * columns // block.size * block.bytes, block)
    if tensor.dtype not in PLAIN:
        raise InputError(f"{quoted(tensor.name)}: GGUF holds no {tensor.dtype}")
    dtype = tensor.dtype if len(tensor.shape) > 1 else "F32"  # vectors: llama.cpp adds and multiplies them in float32
    width = 4 if dtype == "F32" else 2
    return Placed(name, tensor, PLAIN[dtype], int(np.prod(tensor.shape)) * width)


def _raw(base: Base, placed: Placed, family: Family) -> np.ndarray:
    """The tensor's values or bytes, a row after the other."""
    matrix = placed.tensor.matrix
    if matrix is not None:
        assert placed.block is not None
        stored = dict(zip(stored_tensors(matrix.quant, *matrix.shape), base.stored(matrix), strict=True))
        return block_bytes(placed.block, matrix, stored).numpy()
    value = base.read(placed.tensor)
    if value.ndim == 1:
        value = value.float()
        if family.name == "gemma" and placed.name.endswith("norm.weight"):
            value = value + 1  # transformers multiplies by 1 + weight, llama.cpp by the weight
    return _array(value)


def _array(value: Tensor) -> np.ndarray:
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
    weights = {one.block: 0 for one in placed if one.block}
    for one in placed:
        if one.block:
            weights[one.block] += one.size
    header.add_file_type(max(weights, key=lambda block: weights[block]).file_type)
    header.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with_tokenizer = adapter is not None and (adapter.directory / "tokenizer.json").is_file()
    add_vocabulary(header, adapter.directory if with_tokenizer else base.directory, table.shape[0], rule)  # type: ignore[union-attr]
    for one in placed:
        header.add(one.name, one.tensor.shape, one.kind, one.size)
    return header


def _adapter(base: Base, adapter: Adapter, family: Family) -> Iterator[bytes | memoryview]:
    header = Header(family.name)
    header.add_type(gguf.GGUFType.ADAPTER)
    header.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = max(factors.rank for factors in adapter.factors.values())
    header.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    order = [name for name in base.tensors if name in adapter.factors]
    for name in order:
        tensor, factors = base.tensors[name], adapter.factors[name]
        rows, columns = tensor.shape
        to = family.tensor(tensor)
        header.add(f"{to}.lora_a", (factors.rank, columns), PLAIN["F32"], 4 * factors.rank * columns)
        header.add(f"{to}.lora_b", (rows, factors.rank), PLAIN["F32"], 4 * factors.rank * rows)
    yield header.encoded()
    for name in order:
        b, a, s = adapter.product(name)
        folded = b * (s * a.shape[0] / rank)  # a reader multiplies by alpha / rank, the tensor's own rank
        for array in (a.numpy(), permuted(folded.numpy(), family.heads(family.tensor(base.tensors[name])))):
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
