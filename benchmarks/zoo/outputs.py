"""Outputs of models as lists of tensors: computed, compared, differentiated."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 2e-4  # of the largest value; float32, and layers that amplify a rounding


class Failed(Exception):
    """A stage whose result is wrong; the message says how."""


class Differ(Failed):
    """Outputs that are not close."""


def computed(model: Any, given: dict[str, Any]) -> list[Tensor]:
    """What the model computes, without gradients and always with the same random numbers."""
    torch.manual_seed(0)
    with torch.no_grad():
        return list(floats(model(**copy.deepcopy(given))))


def floats(found: Any) -> Iterator[Tensor]:
    """Every float tensor in what a model returned."""
    if isinstance(found, Tensor):
        if found.is_floating_point() and found.numel():
            yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from floats(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from floats(value)


def same(got: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Failed unless two sets of tensors have the same names and bits."""
    odd = [n for n in wanted if n not in got or not torch.equal(got[n], wanted[n])] + [
        n for n in got if n not in wanted
    ]
    if odd:
        raise Failed(f"{what}: {len(odd)} tensors differ: {odd[:3]}")


def compare(got: list[Tensor], wanted: list[Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    """Failed if outputs differ by more than ``tolerance`` of the largest value."""
    found = difference(got, wanted)
    if not found <= tolerance:
        raise Differ(f"{what}: outputs differ by {found:.1e} of their largest value")


def difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value of its tensor; infinite for other shapes or NaN."""
    if [g.shape for g in got] != [w.shape for w in wanted]:
        return float("inf")
    worst = 0.0
    for g, w in zip(got, wanted, strict=True):
        finite = w.isfinite()
        if not torch.equal(finite, g.isfinite()):
            return float("inf")
        if finite.any():
            g, w = g[finite].double(), w[finite].double()
            worst = max(worst, float((g - w).abs().max() / w.abs().max().clamp(min=1e-6)))
    return worst


def moved(model: Any, given: dict[str, Any], tries: int = 3) -> float:
    """The largest difference of the outputs when every weight changes by about a millionth of itself."""
    before, worst = computed(model, given), 0.0
    for seed in range(tries):
        near, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in near.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=draw))
        worst = max(worst, difference(computed(near, given), before))
    return worst


def backpropagate(model: Any, given: dict[str, Any]) -> bool:
    """Gradients of the sum of squares of all outputs; whether there was anything to differentiate."""
    torch.manual_seed(0)
    with torch.enable_grad():
        found = [f for f in floats(model(**copy.deepcopy(given))) if f.requires_grad]
        if not found:
            return False
        sum(f[f.isfinite()].square().sum() for f in found).backward()  # type: ignore[union-attr]
    return True


def has_gradient(parameters: Any) -> bool:
    """Whether one of the parameters has a gradient that is not zero."""
    return any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
