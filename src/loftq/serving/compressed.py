"""``loftq export --to compressed-tensors``: the quantized model for vLLM, SGLang and transformers, the adapter apart.

By the package's format ``pack-quantized``, symmetric: see :mod:`loftq.serving.packed`.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.adapters.bases import WEIGHTS
from loftq.adapters.origins import BESIDE, FIELD
from loftq.architecture.experts import STACKS
from loftq.architecture.served import READ, check_experts, check_stacks, loads_dense
from loftq.checkpoint.produce import Files
from loftq.errors import InputError, listed, option, quoted
from loftq.formats import fsio
from loftq.formats.tensorfile import Entry
from loftq.planning import Matrix, fused
from loftq.serving import packed, per_expert
from loftq.serving.adapter import CONFIG, Adapter
from loftq.serving.base import Base, Dense
from loftq.serving.merge import Begin

NAME = "compressed-tensors"


def check(base: Base, adapter: Adapter | None) -> str:
    """The type of the scales, by safetensors' name. InputError for what the format cannot hold."""
    packed.check(base, NAME)
    check_stacks(NAME, base.stacks)
    check_experts(NAME, base.model, base.matrices, base.published[1])
    if dense := loads_dense(NAME, base.model, [m.module for m in base.matrices if m.kind == "linear"]):
        cure = f"quantize with {option('serve', NAME)}, which leaves dense what it has to, or merge"
        raise InputError(f"{listed(sorted(dense), 3)}: {READ}; {cure}")
    if _has_experts(adapter):
        per_expert.check(base, adapter)
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
    files = packed.write_directory(place, base, adapter, settings, packed.Form(entries, made, name=_name), begin)
    return files if adapter is None else files | _adapter(place, base, adapter)


def _name(base: Base, tensor: Dense) -> str:
    """As the family's files have it: a source may have the names of transformers' modules."""
    return base.published[0].get(tensor.name, tensor.name)


def _config(base: Base) -> dict[str, Any]:
    groups: dict[tuple[int, int, bool], list[str]] = {}
    for tensor in base.tensors.values():
        if matrix := tensor.matrix:
            names = groups.setdefault((int(matrix.quant.bits), matrix.quant.block_size, matrix.experts > 0), [])
            names += [name for name in _targets(base, tensor) if name not in names]
    done = {matrix.module for matrix in base.matrices}
    ignore = [n for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and n not in done]
    kept = [t for t in base.tensors.values() if not t.matrix and t.kind != "embedding" and len(t.shape) == 2]
    names = [_name(base, tensor).removesuffix(".weight") for tensor in kept]
    ignore += [name for name in names if name not in ignore]  # routers, dense experts
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
            for i, ((bits, size, _), modules) in enumerate(groups.items())
        },
    }


def _targets(base: Base, tensor: Dense) -> list[str]:
    """What ``config_groups`` calls a matrix; of a stack all experts of its layer.

    A class with a head has the modules of a model without one below the ``base_model_prefix``.
    """
    parts, prefix = packed.parts(base, tensor), base.model.base_model_prefix
    bare = base.model.base_model is base.model and prefix
    below = rf"(?:{re.escape(prefix)}\.)?" if bare else ""
    owners = [re.escape(part.matrix.module.rpartition(f".{part.expert}.")[0]) for part in parts]
    if tensor.experts:
        return [rf"re:{below}{owner}\.\d+\..+" for owner in dict.fromkeys(owners)]
    names = [part.matrix.module for part in parts]
    return [rf"re:{below}{re.escape(name)}$" for name in names] if bare else names


def _has_experts(adapter: Adapter | None) -> bool:
    return adapter is not None and any(factors.experts for factors in adapter.factors.values())


def _adapter(place: Path, base: Base, adapter: Adapter) -> Files:
    """The adapter as it is, but for where its base lies; LoRA on stacks as LoRA on every expert."""
    folder = place / "adapter"
    fsio.make_dirs(folder)
    config = {**adapter.config, "base_model_name_or_path": ".."}
    if _has_experts(adapter):
        made = per_expert.write(folder, base, replace(adapter, config=config), lambda count: lambda: None)
        return {f"adapter/{name}": file for name, file in made.items()}
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
    more = [] if adapter is None else [*adapter.replaced, *adapter.new, *adapter.biases]
    if more:
        return [
            f"# not for vLLM, whose adapters are LoRA alone, and not {listed(more, 2)}; transformers and PEFT load it"
        ]
    if mixed:
        return [f"# not for vLLM, where {listed(mixed[0])} are one layer of one width; transformers loads it"]
    widths = {int(matrix.quant.bits) for matrix in base.matrices if matrix.experts}
    if widths - {4, 8}:
        return ["# not for vLLM, whose experts have 4 or 8 bits; transformers loads it"]
    dense = [tensor.name for tensor in base.tensors.values() if not tensor.matrix and tensor.kind in STACKS]
    told = ["# not for transformers, which loads no dense experts beside packed layers"] if dense else []
    if adapter is None:
        return [*told, "vllm serve ."]
    return [*told, f"vllm serve . --enable-lora --max-lora-rank {adapter.served_rank} --lora-modules tuned=./adapter"]
