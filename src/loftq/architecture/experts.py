"""Stacks of experts that can be packed: of the classes that transformers marks with all that tells them apart."""

import sys

from torch import nn

FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"  # the stacks of a module of experts, as it computes
KIND, TURNED = "experts", "experts-transposed"  # stored as (experts, out, in), or (experts, in, out)


def stack_kind(module: nn.Module, name: str, parameter: nn.Parameter) -> tuple[str, str]:
    """The kind of a Parameter that is a stack of experts' matrices, else empty; and why it cannot be packed."""
    if parameter.ndim != 3 or "expert" not in name:
        return "", ""
    leaf = name.rpartition(".")[2]
    if not _is_dispatched(module):
        return KIND, f"{type(module).__name__} computes its experts in a way of its own"
    if leaf not in (*FIRST, LAST):
        return KIND, f"{type(module).__name__} has a stack of its own, {leaf}"
    return TURNED if module.is_transposed else KIND, ""


def packable_stacks(model: nn.Module) -> set[str]:
    """Names of all Parameters that are stacks of experts which can be packed."""
    return {
        f"{owner}.{name}"
        for owner, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and stack_kind(module, f"{owner}.{name}", parameter) in ((KIND, ""), (TURNED, ""))
    }


def _is_dispatched(module: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` made the class's ``forward``, and nobody replaced it."""
    made_in = getattr(sys.modules.get("transformers.integrations.moe"), "__file__", None)
    code = getattr(type(module).forward, "__code__", None)
    marked = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias"))
    return code is not None and code.co_filename == made_in and marked
