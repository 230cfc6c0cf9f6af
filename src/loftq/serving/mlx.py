"""``loftq export --to mlx``: a directory that mlx-lm loads on Apple's machines, with exactly our codes.

MLX's affine mode has ``q * scale + bias``: the scale is ``d`` of :mod:`loftq.serving.packed`, the bias the power of two
``-2**(bits - 1)`` times it, which rounds nothing. The adapter becomes one of mlx-lm's.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.produce import Files
from loftq.errors import InputError, listed
from loftq.formats import fsio
from loftq.formats.tensorfile import Entry, encode_header, tensor_bytes
from loftq.planning import Matrix
from loftq.serving import packed
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base
from loftq.serving.merge import Begin

NAME = "mlx"
# Classes of transformers whose modules mlx-lm has by the same names.
FAMILIES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    *("GemmaForCausalLM", "Phi3ForCausalLM"),
)


def check(base: Base, adapter: Adapter | None) -> str:
    """The type of the scales, by safetensors' name. InputError for what mlx-lm cannot load."""
    architecture = type(base.model).__name__
    if architecture not in FAMILIES:
        raise InputError(
            f"{architecture}: mlx-lm's names of it are not known here, but those of {listed(FAMILIES)}; merge it, and "
            "convert the result with mlx_lm.convert"
        )
    packed.check(base, NAME)
    if adapter is not None:
        adapter.refuse_more_than_linear("an adapter of mlx-lm", "mlx_lm.convert")
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

    of_most, _ = Counter((m.quant.block_size, int(m.quant.bits)) for m in base.matrices).most_common(1)[0]
    forms = {m.module: (m.quant.block_size, int(m.quant.bits)) for m in base.matrices}
    quantization: dict[str, Any] = {**_form(of_most), "mode": "affine"}
    quantization |= {module: _form(own) for module, own in forms.items() if own != of_most}
    settings = {"quantization": quantization, "quantization_config": quantization, **_rope(base)}
    files = packed.write_directory(place, base, adapter, settings, entries, made, begin)
    return files if adapter is None else files | _adapter(place, base, adapter)


def _rope(base: Base) -> dict[str, Any]:
    """The rotary embedding where mlx-lm looks for it; transformers 5 has it under ``rope_parameters`` alone."""
    rope = getattr(base.model.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    scaled = {} if kind == "default" else {"rope_scaling": {**rope, "type": kind}}
    moved = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if rope.get(name) is not None}
    return {**moved, **scaled}


def _form(form: tuple[int, int]) -> dict[str, int]:
    return {"group_size": form[0], "bits": form[1]}


def _adapter(place: Path, base: Base, adapter: Adapter) -> Files:
    """In mlx-lm's form: ``x @ lora_a @ lora_b``, one rank for all, smaller ones filled up with zeros."""
    folder = place / "adapter"
    fsio.make_dirs(folder)
    rank = max(factors.rank for factors in adapter.factors.values())
    modules = {name: base.tensors[name].runtime.removesuffix(".weight") for name in adapter.factors}
    entries: list[Entry] = []
    for name, module in modules.items():
        rows, columns = base.tensors[name].shape
        entries += [Entry(f"{module}.lora_a", "F32", (columns, rank)), Entry(f"{module}.lora_b", "F32", (rank, rows))]

    def contents() -> Iterator[bytes | memoryview]:
        yield encode_header(entries, {"format": "mlx"})
        for name in modules:
            b, a, s = adapter.product(name)
            for factor, long in ((a.T, 1), (s * b.T, 0)):
                whole = factor.new_zeros((factor.shape[0], rank) if long else (rank, factor.shape[1]))
                whole[: factor.shape[0], : factor.shape[1]] = factor
                yield tensor_bytes(whole)

    config = {
        "fine_tune_type": "lora",
        "num_layers": base.model.config.num_hidden_layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": list(modules.values())},
    }
    return {
        "adapter/adapter_config.json": fsio.write_json(folder / "adapter_config.json", config),
        "adapter/adapters.safetensors": fsio.write_atomic(folder / "adapters.safetensors", contents()),
    }


def commands(adapter: Adapter | None) -> list[str]:
    """How mlx-lm is told to run it, from inside the directory."""
    given = "" if adapter is None else " --adapter-path adapter"
    return [f"mlx_lm.chat --model .{given}", f"mlx_lm.server --model .{given}"]
