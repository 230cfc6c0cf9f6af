"""Stacks of experts that can be packed: of the classes whose way of computing is known, by a mark or by a trial.

transformers marks most classes of experts with all that tells them apart (``use_experts_implementation``). Of others a
small twin is tried on random numbers: where it computes what our layer would, outputs and gradients, it can be packed.
"""

import copy
import functools
import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loftq.planning import Made

FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"  # the stacks of a module of experts, as it computes
# A Parameter (experts, out, in); (experts, in, out); so too, in a class that does not say it: PEFT then takes it for
# the first, and its A and B are our B.T and A.T.
KIND, TURNED, REVERSED = "experts", "experts-transposed", "experts-reversed"
STACKS = (KIND, TURNED, REVERSED)


@dataclass(frozen=True)
class Way:
    """How a class computes its experts.

    Attributes:
        name: ``routed``: of tokens, their experts and weights; ``batched``: of as many rows for every expert, one
            expert's after the other's (Llama 4); ``product``: of rows sorted by expert and their numbers (JetMoe).
        kind: of its stacks.
        stacks: their names.
    """

    name: str
    kind: str
    stacks: tuple[str, ...]


def stack_kind(module: nn.Module, name: str, parameter: nn.Parameter) -> tuple[str, str]:
    """The kind of a Parameter that is a stack of experts' matrices, else empty; and why it cannot be packed."""
    if parameter.ndim != 3:
        return "", ""
    way, leaf = way_of(module), name.rpartition(".")[2]
    if way is not None and leaf in way.stacks:
        return way.kind, ""
    if "expert" not in name:
        return "", ""
    its = "computes its experts in a way of its own" if way is None else f"has a stack of its own, {leaf}"
    return KIND, f"{type(module).__name__} {its}"


def packable_stacks(model: nn.Module) -> set[str]:
    """Names of all Parameters that are stacks of experts which can be packed."""
    return {
        f"{owner}.{name}"
        for owner, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and stack_kind(module, f"{owner}.{name}", parameter) in ((k, "") for k in STACKS)
    }


def way_of(module: nn.Module) -> Way | None:
    """How a module computes its experts; None if it has none, or does it in a way that is not known."""
    if is_dispatched(module):
        return Way("routed", TURNED if module.is_transposed else KIND, (*FIRST, LAST))
    stacks = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    if any(len(shape) != 3 for shape in stacks.values()):
        return None
    arguments = _arguments(type(module))
    if tuple(stacks) == (FIRST[0], LAST) and arguments == 1 and _agrees(module, _try_batches):
        return Way("batched", REVERSED, tuple(stacks))
    if tuple(stacks) == ("weight",) and arguments == 2 and _agrees(module, _try_products):
        return Way("product", KIND, tuple(stacks))
    return None


def layers_of(stack: str, made: Made, experts: int, rows: int, module: Any) -> dict[str, tuple[int, slice]]:
    """The layers that a stack is of, where each expert has its own: name -> expert, and its rows of the matrix.

    By the names of the source, where it has a tensor for each; else gate, up and down.

    Args:
        made: of such tensors; empty if the source has none.
        rows: of an expert's matrix, ``out``.
        module: that computes the experts. None are known of a class that does it in a way of its own.
    """
    if made:
        found = {}
        for expert, pieces in enumerate(made):
            first = 0
            for piece in pieces:
                found[piece.tensor.removesuffix(".weight")] = expert, slice(first, first + piece.count)
                first += piece.count
        return found
    owner = stack.rpartition(".")[0]
    parts = parts_of(stack, rows, module)
    return {f"{owner}.{e}.{name}": (e, part) for e in range(experts) for name, part in parts.items()}


def parts_of(stack: str, rows: int, module: Any) -> dict[str, slice]:
    """Gate and up, or down, in a stack: name -> rows of every expert's matrix; none of a class with its own way."""
    leaf = stack.rpartition(".")[2]
    if not is_dispatched(module):
        return {}
    if leaf != FIRST[0]:
        return {leaf: slice(0, rows)}
    if getattr(module, "is_concatenated", True):
        return {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
    return {"gate_proj": slice(0, rows, 2), "up_proj": slice(1, rows, 2)}  # a row of the gate, a row of up, and so on


def is_dispatched(module: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` made the class's ``forward``, and nobody replaced it."""
    made_in = getattr(sys.modules.get("transformers.integrations.moe"), "__file__", None)
    code = getattr(type(module).forward, "__code__", None)
    marked = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias"))
    return code is not None and code.co_filename == made_in and marked


@functools.cache
def _arguments(cls: type[nn.Module]) -> int:
    """How many a ``forward`` takes."""
    return len(inspect.signature(cls.forward).parameters) - 1


_tried: dict[Any, bool] = {}


def _agrees(module: nn.Module, trial: Any) -> bool:
    """Whether a class passes a trial; once for each class, and what its instances may differ in."""
    key = (trial, type(module), *(type(child) for child in module.children()))
    if key not in _tried:
        try:
            with torch.enable_grad(), torch.device("cpu"):
                _tried[key] = trial(module)
        except Exception:  # whatever a forward that asks for something else raises
            _tried[key] = False
    return _tried[key]


def _twin(module: nn.Module, little: dict[int, int]) -> Any:
    """A copy with small sizes in the places of its own, random numbers, and the class's ``forward`` without hooks."""
    draw = torch.Generator().manual_seed(0)
    twin: Any = copy.copy(module)
    values = {k: little.get(v, v) if type(v) is int else v for k, v in vars(module).items()}
    twin.__dict__.update(values)
    twin.__dict__.update({name: type(held)() for name, held in values.items() if name.endswith("_hooks")})
    twin.__dict__.pop("forward", None)  # accelerate's, which fetches the weights of the module itself
    twin._parameters = {
        name: nn.Parameter(torch.randn([little[n] for n in p.shape], generator=draw, dtype=torch.float64))
        for name, p in module._parameters.items()
        if p is not None
    }
    return twin


def _sizes(*pairs: tuple[int, int]) -> dict[int, int]:
    """Own size -> small size. Of equal ones the first counts, so that what is equal stays so."""
    return dict(reversed(pairs))


def _try_batches(module: Any) -> bool:
    """``down((gate(x) * up(x)))`` of every expert's rows, the gate's half first, its stacks as ``x @ W``."""
    count, inner, hidden = module.down_proj.shape
    twin = _twin(module, _sizes((inner, 4), (2 * inner, 8), (hidden, 6), (count, 3)))
    count, _, hidden = twin.down_proj.shape
    x = torch.randn(2 * count, hidden, dtype=torch.float64)
    x[1::2] = 0  # of an expert that a token is not sent to: no part of ours in the product
    x.requires_grad_(True)
    gate, up = (x.view(count, 2, hidden) @ twin.gate_up_proj).chunk(2, -1)
    wanted = ((up * twin.act_fn(gate)) @ twin.down_proj).flatten(0, 1)
    return _equal(twin, twin(x), wanted, x) and not wanted[1::2].any() and not _of(wanted, x)[1::2].any()


def _try_products(module: Any) -> bool:
    """``x_i @ W_e.T`` for the rows ``i`` of every expert ``e``."""
    count, rows, columns = module.weight.shape
    twin = _twin(module, _sizes((columns, 6), (rows, 5), (count, 3)))
    numbers = [(e + 2) % 3 for e in range(len(twin.weight))]  # 2, 0, 1
    x = torch.randn(sum(numbers), twin.weight.shape[2], dtype=torch.float64, requires_grad=True)
    parts = zip(x.split(numbers), twin.weight, strict=True)
    return _equal(twin, twin(x, numbers), torch.cat([part @ weight.T for part, weight in parts]), x)


def _equal(twin: nn.Module, got: Any, wanted: Tensor, x: Tensor) -> bool:
    """Whether outputs, and gradients of all that they are made of, are those wanted."""
    if not isinstance(got, Tensor) or got.shape != wanted.shape or not torch.allclose(got, wanted):
        return False
    leaves = [x, *twin.parameters()]
    pairs = zip(*(torch.autograd.grad(y.square().sum(), leaves, retain_graph=True) for y in (got, wanted)), strict=True)
    return all(torch.allclose(one, other) for one, other in pairs)


def _of(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
