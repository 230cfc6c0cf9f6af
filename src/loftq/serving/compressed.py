"""``loftq export --to compressed-tensors``: the quantized model for vLLM, SGLang and transformers, the adapter apart.

By the package's format ``pack-quantized``, symmetric: see :mod:`loftq.serving.packed`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.adapters.bases import WEIGHTS
from loftq.adapters.origins import BESIDE, FIELD
from loftq.checkpoint.produce import Files
from loftq.errors import InputError, listed, option, quoted
from loftq.formats import fsio
from loftq.formats.tensorfile import Entry
from loftq.planning import Matrix, fused
from loftq.serving import packed
from loftq.serving.adapter import CONFIG, Adapter
from loftq.serving.base import Base
from loftq.serving.merge import Begin

NAME = "compressed-tensors"


def check(base: Base) -> str:
    """The type of the scales, by safetensors' name. InputError for what the format cannot hold."""
    packed.check(base, NAME)
    for matrix in base.matrices:
        if matrix.shape[1] * int(matrix.quant.bits) % packed.WORD:
            raise InputError(
                f"{quoted(matrix.name)}: rows of {matrix.shape[1]} fill no words of {packed.WORD} bits; quantize with "
                f"{option('serve', NAME)} and larger blocks"
            )
    return packed.scale_dtype(base)


def write(place: Path, base: Base, adapter: Adapter | None, scales: str, begin: Begin) -> Files:
    """The checkpoint, and the adapter below it as PEFT wrote it.

    Args:
        scales: their type, of :func:`check`.
    """

    def entries(words: packed.Shape, blocks: packed.Shape) -> list[Entry]:
        shape = Entry("weight_shape", "I64", (2,))
        return [Entry("weight_packed", "I32", words), Entry("weight_scale", scales, blocks), shape]

    def made(matrix: Matrix, stream: Tensor, d: Tensor) -> list[Tensor]:
        shape = torch.tensor(matrix.shape, dtype=torch.int64)
        return [stream.view(torch.int32), packed.narrow(matrix, d, scales), shape]

    settings = {"quantization_config": _config(base)}
    files = packed.write_directory(place, base, adapter, settings, entries, made, begin)
    return files if adapter is None else files | _adapter(place, base, adapter)


def _config(base: Base) -> dict[str, Any]:
    groups: dict[tuple[int, int], list[str]] = {}
    for matrix in base.matrices:
        groups.setdefault((int(matrix.quant.bits), matrix.quant.block_size), []).append(matrix.module)
    done = {matrix.module for matrix in base.matrices}
    ignore = [n for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and n not in done]
    weights = {"type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
    return {
        "quant_method": NAME,
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


def commands(base: Base, adapter: Adapter | None) -> list[str]:
    """How vLLM is told to serve it, from inside the directory."""
    quants = {matrix.module: matrix.quant for matrix in base.matrices}
    mixed = [group for group in fused(base.matrices, NAME) if len({quants[name] for name in group}) > 1]
    if mixed:
        return [f"# not for vLLM, where {listed(mixed[0])} are one layer of one width; transformers loads it"]
    if adapter is None:
        return ["vllm serve ."]
    return [f"vllm serve . --enable-lora --max-lora-rank {adapter.served_rank} --lora-modules tuned=./adapter"]
