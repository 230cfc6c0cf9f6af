"""Modules whose weight other code reads, found in the source of the classes around them.

A packed layer computes ``x W^T`` when it is called. Code that takes ``self.proj.weight`` instead gets packed codes, and
passes every adapter by. Such a module stays dense. Nothing is run to find it: the methods of a model's classes are
parsed, and ``.weight`` is followed through local names, items of lists, and functions that a module is given to.
Branches that the model's own settings rule out do not count.
"""

import ast
from collections.abc import Iterator
from typing import Any

from torch import nn

from loftq.architecture.syntax import FIRST, ITEM, CalledMethod, Given, Guard, bases, source_of

UNKNOWN = object()
REGISTERED = ("_modules", "_parameters", "_buffers")


def readers(model: nn.Module) -> dict[str, str]:
    """Name of a module whose weight is read directly -> the method that reads it (``MambaMixer.forward``)."""
    settings = _Settings(model)
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for read in source_of(type(module)).reads:
            if settings.runs(read.method) and not settings.rule_out(module, read.guards):
                for place in _places(module, read.chain.path):
                    method = f"{type(module).__name__}.{read.method}"
                    found.setdefault(f"{name}.{place}" if name else place, method)
    return found


def holders(model: nn.Module) -> dict[str, str]:
    """Name of a module that another one has in a plain list too -> the attribute (``Mask2FormerMLP.layers``).

    What is put in the place of a child is not in that list.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    found: dict[str, str] = {}
    for owner in model.modules():
        for attribute, value in vars(owner).items():
            items = list(value.values()) if isinstance(value, dict) and attribute not in REGISTERED else value
            for held in items if isinstance(items, (list, tuple)) else [items]:
                if isinstance(held, nn.Module):
                    found.update(dict.fromkeys(names.get(id(held), ()), f"{type(owner).__name__}.{attribute}"))
    return found


def _places(module: nn.Module, path: tuple[str, ...]) -> Iterator[str]:
    """Names of the submodules at ``path``."""
    if path == (FIRST,):
        first = next((name for name, _ in module.named_parameters()), "")
        path = tuple(first.split(".")[:-1])
    if not path:
        yield ""
        return
    for name, child in module.named_children():
        if path[0] in (ITEM, name):
            for rest in _places(child, path[1:]):
                yield f"{name}.{rest}" if rest else name


class _Settings:
    """What the settings of a model say about its code."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[type, list[nn.Module]] = {}
        for module in model.modules():
            self._modules.setdefault(type(module), []).append(module)
        self._named = set[str]().union(*(source_of(cls).named for cls in self._modules))
        self._left_out: dict[tuple[type, str, str], bool] = {}

    def runs(self, method: str) -> bool:
        """Whether the model's own code, or transformers, calls a method of this name."""
        return method in self._named or any(hasattr(base, method) for base in bases())

    def rule_out(self, module: nn.Module, guards: tuple[Guard, ...]) -> bool:
        """Whether one of the conditions cannot hold for ``module``."""
        values = ((guard.wanted, self._value(guard.test, module, guard.method)) for guard in guards)
        return any(value is not UNKNOWN and bool(value) != wanted for wanted, value in values)

    def _value(self, node: ast.AST, module: nn.Module, method: CalledMethod) -> Any:
        """Value of an expression of constants, settings and arguments that nobody gives; else UNKNOWN."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in method.optional and self._is_left_out(type(module), method, name):
                return None
            case ast.Attribute():
                return _setting(node, module)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                value = self._value(operand, module, method)
                return value if value is UNKNOWN else not value
            case ast.BoolOp(op=op, values=parts):
                values = [self._value(part, module, method) for part in parts]
                settling = isinstance(op, ast.Or)
                if any(value is not UNKNOWN and bool(value) == settling for value in values):
                    return settling
                return UNKNOWN if UNKNOWN in values else not settling
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _compared(self._value(left, module, method), op, self._value(right, module, method))
        return UNKNOWN

    def _is_left_out(self, cls: type, method: CalledMethod, name: str) -> bool:
        """Whether no call in the model gives a method of ``cls`` the optional argument ``name``.

        A call that only passes on what its own caller left out gives nothing. Models may be called by anybody.
        """
        from transformers import PreTrainedModel

        key = (cls, method.name, name)
        if key not in self._left_out:
            self._left_out[key] = False  # while this is being found out
            self._left_out[key] = not issubclass(cls, PreTrainedModel) and not any(
                given.called == method.name
                and given.place in (name, method.optional[name], "**")
                and not (isinstance(given.value, ast.Constant) and given.value.value is None)
                and given.passed_on != name
                and any(
                    self._may_call(caller, given, cls) and not self.rule_out(caller, given.guards) for caller in callers
                )
                for calling, callers in self._modules.items()
                for given in source_of(calling).given
            )
        return self._left_out[key]

    def _may_call(self, caller: nn.Module, given: Given, cls: type) -> bool:
        called = (caller.get_submodule(place) for path in given.paths for place in _places(caller, path))
        return not given.paths or any(isinstance(module, cls) for module in called)


def _setting(node: ast.Attribute, module: nn.Module) -> Any:
    """A plain value that ``self.a.b`` has and keeps; UNKNOWN for a module, a tensor, or what code changes."""
    root, *parts = ast.unparse(node).split(".")
    if root != "self" or set(parts) & source_of(type(module)).changed:
        return UNKNOWN
    value: Any = module
    for part in parts:
        value = getattr(value, part, UNKNOWN)
    return value if value is None or isinstance(value, (bool, int, float, str)) else UNKNOWN


def _compared(one: Any, op: ast.cmpop, other: Any) -> Any:
    if one is UNKNOWN or other is UNKNOWN:
        return UNKNOWN
    match op:
        case ast.Is() | ast.Eq():
            return one == other
        case ast.IsNot() | ast.NotEq():
            return one != other
        case ast.Gt() if isinstance(one, (int, float)) and isinstance(other, (int, float)):
            return one > other
        case ast.Lt() if isinstance(one, (int, float)) and isinstance(other, (int, float)):
            return one < other
    return UNKNOWN
