"""``loftq export --to mlx``: a directory that mlx-lm loads on Apple's machines, with exactly our codes.

MLX's affine mode has ``q * scale + bias``: the scale is ``d`` of :mod:`loftq.serving.packed`, the bias the power of two
``-2**(bits - 1)`` times it, which rounds nothing. A stack of experts is one tensor there too, of gate, of up and of
down. The adapter becomes one of mlx-lm's.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.architecture.experts import parts_of
from loftq.architecture.served import MLX_MLP, check_model, check_stacks
from loftq.checkpoint.produce import Files
from loftq.formats import fsio
from loftq.formats.tensorfile import Entry, encode_header, tensor_bytes
from loftq.numerics import oriented_shape
from loftq.planning import Matrix
from loftq.serving import packed
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base, Dense
from loftq.serving.merge import Begin

NAME = "mlx"


def check(base: Base, adapter: Adapter | None) -> str:
    """The type of the scales, by safetensors' name. InputError for what mlx-lm cannot load."""
    check_model(NAME, base.model)
    packed.check(base, NAME)
    check_stacks(NAME, base.stacks)
    if adapter is not None:
        adapter.refuse_more_than_linear("an adapter of mlx-lm", "mlx_lm.convert", experts=True)
    return packed.scale_dtype(base)


def write(place: Path, base: Base, adapter: Adapter | None, scales: str, begin: Begin) -> Files:
    """The checkpoint, and the adapter below it.

    Args:
        scales: their type, of :func:`check`.
    """

    def entries(words: packed.Shape, blocks: packed.Shape) -> list[Entry]:
        return [Entry("weight", "U32", words), Entry("scales", scales, blocks), Entry("biases", scales, blocks)]

    def made(matrix: Matrix, stream: Tensor, d: Tensor) -> list[Tensor]:
        bias = -(2.0 ** (int(matrix.quant.bits) - 1)) * d
        return [stream.view(torch.uint32), *(packed.narrow(matrix, values, scales) for values in (d, bias))]

    written = [part.matrix for tensor in base.tensors.values() if tensor.matrix for part in _parts(base, tensor)]
    forms = {m.module: (m.quant.block_size, int(m.quant.bits)) for m in written}
    of_most, _ = Counter(forms.values()).most_common(1)[0]
    quantization: dict[str, Any] = {**_form(of_most), "mode": "affine"}
    quantization |= {module: _form(own) for module, own in forms.items() if own != of_most}
    settings = {"quantization": quantization, "quantization_config": quantization, **_aliases(base)}
    form = packed.Form(entries, made, _parts, lambda base, tensor: _name(base, tensor.runtime))
    files = packed.write_directory(place, base, adapter, settings, form, begin)
    return files if adapter is None else files | _adapter(place, base, adapter)


def _name(base: Base, parameter: str) -> str:
    """What mlx-lm calls a Parameter."""
    return parameter.replace(".mlp.", f".{MLX_MLP.get(type(base.model).__name__, 'mlp')}.")


def _parts(base: Base, tensor: Dense) -> list[packed.PackedPart]:
    """What is written of a matrix, or of a stack, by mlx-lm's names."""
    matrix = tensor.matrix
    assert matrix is not None
    return [
        packed.PackedPart(
            replace(
                matrix, name=f"{module}.weight", module=module, shape=(len(range(rows.stop)[rows]), matrix.shape[1])
            ),
            matrix,
            rows=rows,
        )
        for module, rows in _modules(base, tensor).items()
    ]


def _modules(base: Base, tensor: Dense) -> dict[str, slice]:
    """The modules that a weight is of, with their rows of it, or of every expert's."""
    rows = oriented_shape(tensor.kind, tensor.shape[-2:])[0]
    if not tensor.experts:
        return {_name(base, tensor.runtime).removesuffix(".weight"): slice(0, rows)}
    owner = tensor.runtime.rpartition(".")[0]
    stem = _name(base, owner.removesuffix("experts")) + "switch_mlp"
    parts = parts_of(tensor.runtime, rows, base.model.get_submodule(owner))
    return {f"{stem}.{name}": part for name, part in parts.items()}


def _aliases(base: Base) -> dict[str, Any]:
    """The configuration under names that mlx-lm looks for, and transformers 5 may have replaced.

    It writes ``num_experts`` of a Qwen3-MoE as ``num_local_experts``, the rotary embedding under ``rope_parameters``.
    """
    config = base.model.config
    renamed = {alias: getattr(config, alias) for alias, name in config.attribute_map.items() if hasattr(config, name)}
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    scaled = {} if kind == "default" else {"rope_scaling": {**rope, "type": kind}}
    moved = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if rope.get(name) is not None}
    return {**renamed, **moved, **scaled}


def _form(form: tuple[int, int]) -> dict[str, int]:
    return {"group_size": form[0], "bits": form[1]}


def _adapter(place: Path, base: Base, adapter: Adapter) -> Files:
    """In mlx-lm's form: ``x @ lora_a @ lora_b``, one rank for all, smaller ones filled up with zeros.

    Those of a stack are ``(experts, rank, in)`` and ``(experts, out, rank)``.
    """
    folder = place / "adapter"
    fsio.make_dirs(folder)
    rank = max(factors.rank for factors in adapter.factors.values())
    modules = {name: _modules(base, base.tensors[name]) for name in adapter.factors}
    entries: list[Entry] = []
    for name, parts in modules.items():
        experts, columns = base.tensors[name].experts, base.tensors[name].shape[-1]
        for module, part in parts.items():
            rows = len(range(part.stop)[part])
            shapes = ((experts, rank, columns), (experts, rows, rank)) if experts else ((columns, rank), (rank, rows))
            entries += [Entry(f"{module}.lora_{x}", "F32", shape) for x, shape in zip("ab", shapes, strict=True)]

    def wide(factor: Tensor, axis: int) -> Tensor:
        missing = rank - factor.shape[axis]
        return torch.nn.functional.pad(factor, (0, 0, 0, missing) if axis == 0 else (0, missing)).contiguous()

    def contents() -> Iterator[bytes | memoryview]:
        yield encode_header(entries, {"format": "mlx"})
        for name, parts in modules.items():
            experts = base.tensors[name].experts
            if not experts:
                b, a, s = adapter.product(name)
                yield from map(tensor_bytes, (wide(a.T, 1), wide(s * b.T, 0)))
            for part in parts.values() if experts else ():
                for e in range(experts):
                    yield tensor_bytes(wide(adapter.product(name, e)[1], 0))
                for e in range(experts):
                    b, _, s = adapter.product(name, e)
                    yield tensor_bytes(wide(s * b[part], 1))

    config = {
        "fine_tune_type": "lora",
        "num_layers": base.model.config.num_hidden_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": [module for parts in modules.values() for module in parts],
        },
    }
    return {
        "adapter/adapter_config.json": fsio.write_json(folder / "adapter_config.json", config),
        "adapter/adapters.safetensors": fsio.write_atomic(folder / "adapters.safetensors", contents()),
    }


def commands(adapter: Adapter | None) -> list[str]:
    """The commands that run it in mlx-lm, from inside the directory."""
    given = "" if adapter is None else " --adapter-path adapter"
    return [f"mlx_lm.chat --model .{given}", f"mlx_lm.server --model .{given}"]
