"""``loftq export --to per-expert``: an adapter with separate LoRA for every expert, as vLLM and SGLang read it.

A stack's factors are those of all its experts, each of rank r. What is stored as one matrix in a stack and as several
in the source, ``[gate; up]``, has one A: both get it, and their rows of B. The product is the same to the last bit.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from loftq.adapters.origins import BESIDE, FIELD
from loftq.architecture.experts import layers_of
from loftq.errors import InputError, listed, option, quoted
from loftq.formats import fsio
from loftq.formats.regular import shown
from loftq.formats.tensorfile import Entry, dtype_name, encode_header, tensor_bytes
from loftq.numerics import oriented_shape
from loftq.serving.adapter import CONFIG, Adapter, own_files
from loftq.serving.base import Base, Dense
from loftq.serving.merge import Begin
from loftq.serving.output import Files, copy

Layers = dict[str, tuple[int, slice]]  # of a stack: name -> expert, and rows of its matrix


def check(base: Base, adapter: Adapter | None) -> Adapter:
    """The adapter. InputError for one without stacks of experts, or with more than LoRA."""
    if adapter is None:
        raise InputError(f"per-expert exports an adapter; give {option('adapter', 'RUN')}")
    if not any(factors.experts for factors in adapter.factors.values()):
        raise InputError(f"{shown(adapter.directory)}: has no LoRA on experts; use the adapter as it is")
    whole = [*adapter.replaced, *adapter.new, *adapter.biases]
    if whole:
        raise InputError(f"{shown(adapter.directory)}: {listed(whole, 3)}: more than LoRA, which servers do not read")
    return adapter


def write(place: Path, base: Base, adapter: Adapter, begin: Begin) -> Files:
    """The adapter's two files, and the tokenizer beside it, if there is one."""
    stacks = {name: base.tensors[name] for name, factors in adapter.factors.items() if factors.experts}
    held = {name for stack in stacks for name in (adapter.factors[stack].a, adapter.factors[stack].b)}
    parts = {name: layers(tensor, base) for name, tensor in stacks.items()}
    entries = [Entry(n, _dtype(adapter, n), shape) for n, shape in adapter.shapes.items() if n not in held]
    for stack in stacks:
        factors = adapter.factors[stack]
        dtype, (_, columns), (out, _) = _dtype(adapter, factors.a), *(adapter.shapes[n] for n in (factors.a, factors.b))
        for name, (_, rows) in parts[stack].items():
            shapes = {"A": (factors.rank, columns), "B": (len(range(out)[rows]), factors.rank)}
            entries += [Entry(f"base_model.model.{name}.lora_{x}.weight", dtype, shapes[x]) for x in "AB"]
    advance = begin(len(entries))

    def tensors() -> Iterator[Tensor]:
        yield from (adapter.read(name) for name in adapter.shapes if name not in held)
        for stack in stacks:
            dtype = adapter.part(adapter.factors[stack].a).dtype
            for expert, rows in parts[stack].values():
                b, a, _ = adapter.product(stack, expert)
                yield from (a.to(dtype).contiguous(), b[rows].to(dtype).contiguous())

    def contents() -> Iterator[bytes | memoryview]:
        yield encode_header(entries, {"format": "pt"})
        for tensor in tensors():
            yield tensor_bytes(tensor)
            advance()

    return {
        CONFIG: fsio.write_json(place / CONFIG, _config(adapter, stacks, parts)),
        "adapter_model.safetensors": fsio.write_atomic(place / "adapter_model.safetensors", contents()),
        BESIDE: fsio.write_json(place / BESIDE, {FIELD: base.identity}),
        **copy(own_files(adapter), adapter.directory, place),
    }


def layers(tensor: Dense, base: Base) -> Layers:
    """The layers that a stack is of. InputError for a stack whose experts are no layers."""
    module = base.model.get_submodule(tensor.runtime.rpartition(".")[0])
    rows, _ = oriented_shape(tensor.kind, tensor.shape[1:])
    found = layers_of(tensor.runtime, base.experts_of(tensor), tensor.experts, rows, module)
    if not found:
        raise InputError(f"{quoted(tensor.runtime)}: {type(module).__name__} has no form with a layer for each expert")
    return found


def _config(adapter: Adapter, stacks: dict[str, Dense], parts: dict[str, Layers]) -> dict[str, Any]:
    """``adapter_config.json`` for layers in the place of stacks."""
    config = dict(adapter.config)
    leaves = sorted({name.rpartition(".")[2] for names in parts.values() for name in names})
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        config["target_modules"] = rf"(?:{targets})|.*\.(?:{'|'.join(leaves)})"
    else:
        config["target_modules"] = sorted({*targets, *leaves})
    config["target_parameters"] = None
    for pattern in ("rank_pattern", "alpha_pattern"):
        given = config.get(pattern) or {}
        config[pattern] = {
            key: value for key, value in given.items() if not _matched(key, [t.runtime for t in stacks.values()])
        }
        for stack, tensor in stacks.items():
            value = next((value for key, value in given.items() if _matched(key, [tensor.runtime])), None)
            config[pattern] |= {} if value is None else {_pattern(parts[stack]): value}
    return config


def _matched(key: str, names: Iterable[str]) -> bool:
    """By PEFT's rule."""
    return any(re.match(rf"(.*\.)?({key})$", name) for name in names)


def _pattern(names: Layers) -> str:
    """A regular expression for the layers of a stack."""
    first, (expert, _) = next(iter(names.items()))
    owner = first.rpartition(f".{expert}.")[0]
    leaves = sorted({name.rpartition(".")[2] for name in names})
    return rf"{re.escape(owner)}\.\d+\.(?:{'|'.join(leaves)})"


def _dtype(adapter: Adapter, name: str) -> str:
    return dtype_name(adapter.read(name).dtype)


def commands(adapter: Adapter) -> list[str]:
    """How vLLM is told to serve it over the weights that it was trained on, as a dense model."""
    return [
        "loftq merge DIR --adapter none --output BASE",
        f"vllm serve BASE --enable-lora --max-lora-rank {adapter.served_rank} --lora-modules tuned=.",
    ]
