"""Check that a checkpoint has all weights of the model of ``config.json``, each in its shape.

transformers answers: it loads tensors without storage, of the names and shapes of the headers, into a model on the meta
device, with all that it does on loading: renaming, fusing and splitting, ties, and what a class says may be missing.
"""

import contextlib
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.architecture.skeleton import output_head, renamer
from loftq.errors import InputError, listed, one_line, quoted
from loftq.formats.regular import shown
from loftq.formats.tensorfile import DTYPES
from loftq.planning import HEADS, natural
from loftq.spelled import spell_size

# What wraps a module in training, by the part that it adds to the names of the tensors, and how to save without it.
WRAPPERS = {
    "_orig_mod": "torch.compile; save the model that it compiled, model._orig_mod",
    "_fsdp_wrapped_module": "FSDP; save its full state dict, as accelerator.save_model does",
    "_checkpoint_wrapped_module": "activation checkpointing; save the model before it is wrapped",
    "base_model": "PEFT; merge the adapter with merge_and_unload(), and save what that returns",
    "module": "DistributedDataParallel; save the model that it wraps, model.module",
}
SMALL_BUFFERS = 1 << 28  # bytes that any model may compute: a mask of 16384 positions
BUFFERS_PER_WEIGHTS = 4  # of larger ones: a mask for each layer
_NUMBER = re.compile(r"\.(\d+)(?=\.)")  # of a layer or an expert, in the name of a tensor


def check_weights(model: nn.Module, tensors: Mapping[str, tuple[str, tuple[int, ...]]], directory: Path) -> None:
    """InputError if a weight of the backbone is missing, or a weight has another shape than the model's.

    The head of a task may be missing, and so may tied weights and what the class of the model says.

    Args:
        model: the skeleton of ``config.json``.
        tensors: of the checkpoint: name -> dtype, shape.
        directory: of the checkpoint, for the message.
    """
    where = shown(directory)
    _check_buffers(model, tensors, directory / "config.json")
    _check_large(model, tensors, where)
    try:
        found = _load_headers(model, tensors)
    except InputError:
        raise
    except Exception as e:  # whatever transformers raises for tensors that it cannot put together
        parts = listed([quoted(name) for name in _missing_parts(model, tensors)], 3)
        problem = f"missing: {parts}" if parts else listed(_unlike_others(model, tensors), 3) or one_line(e)
        raise InputError(f"{where}: the weights cannot be loaded: {problem}; fetch the checkpoint again") from e
    _refuse_misfits(found["mismatched"], where)
    missing = sorted((name for name in found["missing"] if _belongs_to_backbone(model, name)), key=natural)
    if not missing:
        return
    wrapper = _wrapper(model, tensors)
    if wrapper:
        name = next(name for name in tensors if wrapper in name.split("."))
        raise InputError(f"{where}: the tensors are called {quoted(name)}, as saved from inside {WRAPPERS[wrapper]}")
    outside = _outside(missing, tensors)
    if outside:
        raise InputError(
            f"{where}: the tensors are called {quoted(f'{outside}.{missing[0]}')}, as saved from inside a module that "
            f"has the model as {quoted(outside)}; save that part of it with its save_pretrained"
        )
    others = f" (it has others, such as {listed(found['unexpected'], 2)})" if found["unexpected"] else ""
    raise InputError(
        f"{where}: weights of {type(model).__name__} are missing: {listed(missing)}{others}; "
        "fetch the whole checkpoint, transformers would begin them from random numbers"
    )


def _refuse_misfits(found: Iterable[tuple[str, Iterable[int], Iterable[int]]], where: str) -> None:
    wrong = [f"{name} is {tuple(got)}, config.json asks for {tuple(wanted)}" for name, got, wanted in found]
    if wrong:
        raise InputError(f"{where}: the weights do not fit config.json: {listed(wrong)}; one of the two was changed")


def _check_large(model: nn.Module, tensors: Mapping[str, tuple[str, tuple[int, ...]]], where: str) -> None:
    """InputError for large parameters that the checkpoint has in another shape: transformers would compute some."""
    large = {name: tuple(p.shape) for name, p in model.named_parameters() if p.nbytes > SMALL_BUFFERS}
    rename = renamer(model) if large else None
    named = ((*rename(tensor), shape) for tensor, (_, shape) in tensors.items()) if rename else ()
    found = ((name, got, large[name]) for name, converter, got in named if name in large and not converter)
    _refuse_misfits((misfit for misfit in found if misfit[1] != misfit[2]), where)


def _check_buffers(model: nn.Module, tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Path) -> None:
    """InputError for masks and tables that transformers would compute, and that are far larger than the checkpoint."""
    held = sum(math.prod(shape) * DTYPES.get(dtype, torch.float32).itemsize for dtype, shape in tensors.values())
    sizes = {name: buffer.nbytes for name, buffer in model.named_buffers()}
    if sum(sizes.values()) > max(SMALL_BUFFERS, BUFFERS_PER_WEIGHTS * held):
        name = max(sizes, key=lambda name: sizes[name])
        raise InputError(
            f"{shown(config)}: {quoted(name)} of such a model takes {spell_size(sizes[name])}, and the checkpoint "
            f"has {spell_size(held)} of weights; a number in it, of positions or of a window, was changed"
        )


def _load_headers(model: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Names that are ``missing`` or ``unexpected``; and ``mismatched``: name, shape there, shape of the model."""
    from transformers import PreTrainedModel

    headers = {
        name: torch.empty(shape, dtype=DTYPES.get(dtype, torch.float32), device="meta")
        for name, (dtype, shape) in tensors.items()
    }
    with _quiet():
        _, found = PreTrainedModel.from_pretrained.__func__(  # type: ignore[attr-defined]
            type(model),  # whose own may want more files, and not tell what it found
            None,
            config=model.config,
            state_dict=headers,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return {kind: sorted(found[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}


def _belongs_to_backbone(model: Any, name: str) -> bool:
    """Whether a parameter or buffer is one that must not be random: no head's, no mask token, no counter."""
    prefix, head = str(model.base_model_prefix), output_head(model)
    module, _, leaf = name.rpartition(".")
    if prefix in dict(model.named_children()) and not name.startswith(f"{prefix}."):
        return False
    if HEADS & set(name.split(".")) or (head is not None and model.get_submodule(module) is head):
        return False
    values = getattr(model.get_submodule(module), leaf, None)
    buffer = None if isinstance(values, nn.Parameter) or not isinstance(values, torch.Tensor) else values
    counts = buffer is not None and not buffer.is_floating_point()
    return not counts and not leaf.startswith("mask")  # a mask token stands for hidden input, in training alone


def _wrapper(model: nn.Module, tensors: Mapping[str, Any]) -> str | None:
    """What wrapped the modules when the tensors were named; None if it was nothing we know."""
    own = {part for name, _ in model.named_modules() for part in name.split(".")}
    parts = Counter(part for name in tensors for part in set(name.split(".")))
    return next((wrapper for wrapper in WRAPPERS if wrapper not in own and 2 * parts[wrapper] > len(tensors)), None)


def _outside(missing: list[str], tensors: Mapping[str, Any]) -> str:
    """What stands before the name of every tensor that is missing; empty if they have not all the same before them."""
    ends = [name for name in tensors if name.endswith(f".{missing[0]}")]
    before = {name.removesuffix(f".{missing[0]}") for name in ends}
    return next((prefix for prefix in before if all(f"{prefix}.{name}" in tensors for name in missing)), "")


def _missing_parts(model: nn.Module, tensors: Mapping[str, Any]) -> list[str]:
    """Tensors that become part of a parameter, such as one expert's matrix, and are missing beside their likes.

    A parameter is to have each part that its likes of other layers have, and each of its kinds for every expert.
    """
    rename = renamer(model)
    found: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {}  # parameter -> kind and expert -> all numbers
    for source in tensors:
        name, converted = rename(source)
        if converted:
            numbers = tuple(_NUMBER.findall(source))
            found.setdefault(name, {})[_NUMBER.sub(".#", source), numbers[-1] if numbers else ""] = numbers
    likes: dict[str, dict[str, set[str]]] = {}  # the parameter in any layer -> kind -> experts
    for name, parts in found.items():
        kinds = likes.setdefault(_NUMBER.sub(".#", name), {})
        for kind, expert in parts:
            kinds.setdefault(kind, set()).add(expert)
    missing = []
    for name, parts in found.items():
        kinds = likes[_NUMBER.sub(".#", name)]
        layer = next(iter(parts.values()))[:-1]
        for part in itertools.product(kinds, set().union(*kinds.values())):
            if part not in parts:
                kind, expert = part
                missing.append(functools.reduce(lambda text, n: text.replace("#", n, 1), (*layer, expert), kind))
    return sorted(missing, key=natural)


def _unlike_others(model: nn.Module, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Parts of parameters, such as one expert's matrix, with another shape than most of their kind."""
    rename = renamer(model)
    kinds: dict[str, dict[str, tuple[int, ...]]] = {}
    for source, (_, shape) in tensors.items():
        if rename(source)[1]:
            kinds.setdefault(_NUMBER.sub("", source), {})[source] = shape
    odd = []
    for parts in kinds.values():
        usual, _ = Counter(parts.values()).most_common(1)[0]
        odd += [f"{quoted(n)} is {shape}, its likes are {usual}" for n, shape in parts.items() if shape != usual]
    return odd


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its bar and its report, which are of a model that nobody sees."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_is_quiet = are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_is_quiet:
            disable_progress_bars()
