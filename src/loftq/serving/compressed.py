"""``loftq export --to compressed-tensors``: the quantized model for vLLM, SGLang and transformers, the adapter apart.

By the package's format ``pack-quantized``, symmetric: a weight is ``(q - 2**(bits - 1)) * d``, the numbers ``q`` of a
row a stream of bits, low bits first, in int32. It holds code ``int`` to the last bit, with the scale's other sign; at 8
bits with its own.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.adapters.origins import BESIDE, FIELD
from loftq.errors import InputError, listed, option, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.belongings import belongings
from loftq.formats.tensorfile import DTYPES, Entry
from loftq.numerics import pack, unpack
from loftq.planning import Matrix
from loftq.serving.adapter import CONFIG, WEIGHTS, Adapter, own_files
from loftq.serving.base import Base, Dense
from loftq.serving.merge import Begin
from loftq.serving.output import Files, copy, write_shards
from loftq.spec import STORED, stored_tensors

LARGEST_FILE = 5 << 30
WORD = 32  # bits of an int32


def check(base: Base, adapter: Adapter | None) -> str:
    """The type that scales are loaded in, by safetensors' name. InputError for what the format cannot hold."""
    config = strict_json.load_object(base.directory / "config.json", special=True)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in STORED:
        raise InputError(
            f"{quoted(base.directory, 400)}: config.json has dtype {quoted(dtype)}; wanted one of {listed(STORED)}"
        )
    for tensor in base.tensors.values():
        if tensor.matrix is not None:
            _check(tensor.matrix)
    return STORED[dtype]


def _check(matrix: Matrix) -> None:
    quant, columns = matrix.quant, matrix.shape[1]
    if quant.code != "int" or quant.double_quant or matrix.kind != "linear":
        raise InputError(
            f"{quoted(matrix.name)}: compressed-tensors holds code int on linear layers, and not {quant.code} on "
            f"{matrix.kind}; quantize with {option('serve', 'compressed-tensors')}, or merge"
        )
    if columns % quant.block_size or columns * int(quant.bits) % WORD:
        raise InputError(
            f"{quoted(matrix.name)}: rows of {columns} fill no whole blocks of {quant.block_size} and words of {WORD} "
            f"bits; quantize with {option('serve', 'compressed-tensors')}, which leaves it dense"
        )


def write(place: Path, base: Base, adapter: Adapter | None, scales: str, begin: Begin) -> Files:
    """The checkpoint, and the adapter below it as PEFT wrote it.

    Args:
        scales: their type, of :func:`check`.
    """
    entries = [entry for tensor in base.tensors.values() for entry in _entries(tensor, scales)]
    advance = begin(len(entries))
    held: dict[str, Tensor] = {}
    by_entry = {entry.name: t for t in base.tensors.values() for entry in _entries(t, scales)}

    def read(entry: Entry) -> Tensor:
        tensor = by_entry[entry.name]
        if tensor.matrix is not None and entry.name not in held:
            held.clear()  # the tensors of a matrix follow each other
            held.update(_packed(tensor.matrix, base.stored(tensor.matrix), scales))
        advance()
        return base.checkpoint.read(tensor.name) if tensor.matrix is None else held[entry.name]

    made = write_shards(place, entries, read, LARGEST_FILE)
    config = strict_json.load_object(base.directory / "config.json", special=True)
    config["quantization_config"] = _config(base)
    made["config.json"] = fsio.write_json(place / "config.json", strict_json.tagged(config))
    made |= copy(belongings(base.directory).files, base.directory, place)
    if adapter is not None:
        made |= copy(own_files(adapter), adapter.directory, place)
        made |= _adapter(place, base, adapter)
    return made


def _entries(tensor: Dense, scales: str) -> list[Entry]:
    if tensor.matrix is None:
        return [Entry(tensor.name, tensor.dtype, tensor.shape)]
    stem, (rows, columns), quant = tensor.name.removesuffix("weight"), tensor.shape, tensor.matrix.quant
    return [
        Entry(f"{stem}weight_packed", "I32", (rows, columns * int(quant.bits) // WORD)),
        Entry(f"{stem}weight_scale", scales, (rows, columns // quant.block_size)),
        Entry(f"{stem}weight_shape", "I64", (2,)),
    ]


def _packed(matrix: Matrix, stored: list[Tensor], scales: str) -> dict[str, Tensor]:
    """The three tensors of a matrix. InputError for a scale that the model's type does not hold."""
    bits, (rows, columns) = int(matrix.quant.bits), matrix.shape
    tensors = dict(zip(stored_tensors(matrix.quant, rows, columns), stored, strict=True))
    codes = unpack(tensors["weight"], bits, columns)
    if bits == 8:  # of the two zeros one
        numbers, sign = codes + (codes <= 127).to(torch.uint8), 1
    else:
        numbers, sign = 2**bits - 1 - codes, -1
    wide = tensors["weight_scale"].float()
    scale = wide.to(DTYPES[scales])
    if not torch.equal(scale.float(), wide):
        raise InputError(
            f"{quoted(matrix.name)}: a scale does not fit the model's type {scales}, in which readers load it; "
            f"quantize with {option('scale_dtype', 'bfloat16')}, or the model's own type"
        )
    words = pack(numbers, bits).reshape(rows, -1).view(torch.int32)
    stem = matrix.name.removesuffix("weight")
    shape = torch.tensor([rows, columns], dtype=torch.int64)
    return {f"{stem}weight_packed": words, f"{stem}weight_scale": sign * scale, f"{stem}weight_shape": shape}


def _config(base: Base) -> dict[str, Any]:
    groups: dict[tuple[int, int], list[str]] = {}
    matrices = [tensor.matrix for tensor in base.tensors.values() if tensor.matrix]
    for matrix in matrices:
        groups.setdefault((int(matrix.quant.bits), matrix.quant.block_size), []).append(matrix.module)
    done = {matrix.module for matrix in matrices}
    ignore = [n for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and n not in done]
    weights = {"type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            f"group_{i}": {
                "targets": modules,
                "weights": {**weights, "num_bits": bits, "group_size": size},
                "input_activations": None,
                "output_activations": None,
            }
            for i, ((bits, size), modules) in enumerate(groups.items())
        },
    }


def _adapter(place: Path, base: Base, adapter: Adapter) -> Files:
    """The adapter as it is, but for where its base lies."""
    folder = place / "adapter"
    fsio.make_dirs(folder)
    config = {**adapter.config, "base_model_name_or_path": ".."}
    weights = next(name for name in WEIGHTS if (adapter.directory / name).is_file())
    return {
        f"adapter/{CONFIG}": fsio.write_json(folder / CONFIG, config),
        f"adapter/{weights}": fsio.copy_file(adapter.directory / weights, folder / weights),
        f"adapter/{BESIDE}": fsio.write_json(folder / BESIDE, {FIELD: base.identity}),
    }


def commands(adapter: Adapter | None) -> list[str]:
    """How vLLM is told to serve it, from inside the directory."""
    if adapter is None:
        return ["vllm serve ."]
    ranks = max((factors.rank for factors in adapter.factors.values()), default=8)
    served = next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512, ranks) if rank >= ranks)
    return [f"vllm serve . --enable-lora --max-lora-rank {served} --lora-modules tuned=./adapter"]
