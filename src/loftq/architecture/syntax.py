"""What the methods of a class do with the weights of the modules they hold, read off their syntax trees."""

import ast
import builtins
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

ITEM = "*"  # in a path: any item of a list of modules
FIRST = "<first>"  # at the end of a path: the module below it that has the first parameter
# Methods that run before a model computes, or that change its structure.
SET_UP = re.compile(r"(^|_)(init|reset|tie|resize|prune|set)(_|$)")
LOADING = "_init_weights"
HARMLESS = ("device", "is_meta", "requires_grad", "ndim", "dim")  # of a weight: the same whether it is packed or not
DTYPE_IS_CHECKED = ("int8", "is_floating_point", "_is_quantized")  # in a condition: the code knows of packed weights
MOST_CALLS = 4  # deep, that a module is followed through


@dataclass(frozen=True)
class Chain:
    """``root.a.b``: a name in a function, and the attributes that are followed from it."""

    root: str
    path: tuple[str, ...] = ()

    def then(self, *parts: str) -> "Chain":
        return Chain(self.root, (*self.path, *parts))


@dataclass(frozen=True, eq=False)
class CalledMethod:
    """A method, and its arguments that a caller may leave out as None: name -> position."""

    name: str
    optional: dict[str, int]


@dataclass(frozen=True)
class Guard:
    """A condition that a part of ``method`` is under."""

    test: ast.expr
    wanted: bool
    method: CalledMethod


@dataclass(frozen=True)
class Read:
    """The weight of the module at ``chain`` is read, if all ``guards`` hold."""

    chain: Chain
    method: str
    guards: tuple[Guard, ...] = ()


@dataclass(frozen=True)
class Given:
    """An argument, by position or name, in a call of ``called`` (``forward`` if a module is called).

    ``**`` stands for arguments by any name. ``paths``, from ``self``, lead to what is called; empty if that is unknown.
    """

    called: str
    paths: frozenset[tuple[str, ...]]
    place: int | str
    value: ast.expr
    passed_on: str  # name of an argument that the caller was given itself, or left without
    guards: tuple[Guard, ...]


@dataclass
class ClassSource:
    """All methods of a class: what they read and give, the attributes they name, and those they change."""

    reads: list[Read] = field(default_factory=list)
    given: list[Given] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=lambda: {"training", "gradient_checkpointing"})


@functools.cache
def source_of(cls: type) -> ClassSource:
    """The methods that objects of ``cls`` have, without those that set it up.

    What ``_init_weights`` names counts: transformers calls it while loading, when layers are packed already.
    """
    found = ClassSource()
    for name, method in _methods(cls):
        sets_up = bool(SET_UP.search(name))
        body = None if sets_up and name != LOADING else _body(method, cls)
        if body is not None:
            attributes = [node for node in ast.walk(body.tree) if isinstance(node, ast.Attribute)]
            found.named |= {node.attr for node in attributes}
            if sets_up:
                continue
            found.reads += [replace(read, method=name) for read in body.reads(MOST_CALLS) if read.chain.path]
            found.given += body.given()
            found.changed |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    return found


@functools.cache
def bases() -> frozenset[type]:
    """Classes below every model: what they do to a weight, they do to any."""
    from transformers import GenerationMixin, PreTrainedModel

    classes = (PreTrainedModel, GenerationMixin, nn.Linear, nn.ModuleList, nn.ModuleDict, nn.Sequential)
    return frozenset(base for cls in classes for base in cls.__mro__)


def _methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Methods and properties of ``cls``; one of a base also if the method over it calls ``super()``."""
    hidden: set[str] = set()
    for owner in cls.__mro__:
        for name, value in vars(owner).items() if owner not in bases() else ():
            method = _function(value)
            if method is not None and name not in hidden:
                yield name, method
                if "super" not in method.__code__.co_names:
                    hidden.add(name)


def _function(value: Any) -> Any:
    """The Python function behind a method, a property or a decorator; else None."""
    for attribute in ("fget", "func", "__func__"):
        value = getattr(value, attribute, value)
    value = inspect.unwrap(value) if callable(value) else value
    return value if inspect.isfunction(value) else None


@functools.cache
def _body(function: Callable[..., Any], cls: type | None) -> "_Body | None":
    try:
        source = inspect.getsource(function)
        return _Body(function, cls, ast.parse(f"if True:\n{source}" if source[0].isspace() else source))
    except (OSError, TypeError, SyntaxError):  # it has no file, or was made by another function
        return None


class _Body:
    """A parsed function: which modules its names stand for, and where it reads their weights."""

    def __init__(self, function: Callable[..., Any], cls: type | None, tree: ast.AST) -> None:
        self._function, self._cls, self.tree = function, cls, tree
        self._parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        parameters = list(inspect.signature(function).parameters.values())[cls is not None :]
        self._left_out = {p.name: i for i, p in enumerate(parameters) if p.default is None}
        optional = {name: i for name, i in self._left_out.items() if not self._assigned(name)}
        self._method = CalledMethod(function.__name__, optional)
        self._known: dict[str, set[Chain]] = {}
        for node in ast.walk(tree):
            self._learn(node)

    def reads(self, calls: int) -> Iterator[Read]:
        """Reads of a weight, by this function's names; also in the functions that it gives a module to."""
        for node in ast.walk(self.tree):
            owners = self._weight_of(node)
            if owners and not self._is_harmless(node):
                yield from (Read(chain, self._method.name, self._guards(node)) for chain in owners)
            if isinstance(node, ast.Call) and calls:
                yield from self._through(node, calls - 1)

    def given(self) -> Iterator[Given]:
        """Arguments of the methods and modules of ``self`` that are called, and of modules that a local name is."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                called, paths = self._called(node.func)
                places = [*enumerate(node.args), *((k.arg or "**", k.value) for k in node.keywords)]
                for place, value in places if called else ():
                    yield Given(called, paths, place, value, self._passed_on(value), self._guards(node))

    def _passed_on(self, value: ast.expr) -> str:
        """Name of the optional argument that ``value`` still is; empty if it may be anything else by then."""
        if not isinstance(value, ast.Name) or value.id not in self._left_out:
            return ""
        assigned = self._assigned(value.id)
        in_a_loop = any(isinstance(node, (ast.For, ast.While)) for node in self._above(value))
        later = all(node.lineno > value.lineno for node in assigned) and not in_a_loop
        return value.id if later or not assigned else ""

    def _assigned(self, name: str) -> list[ast.Name]:
        """Where an argument gets another value, although it may be left out."""
        names = (n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and n.id == name)
        stores = (n for n in names if isinstance(n.ctx, ast.Store))
        given = f"{name} is not None"
        return [n for n in stores if not any(t and ast.unparse(test) == given for test, t in self._conditions(n))]

    def _learn(self, node: ast.AST) -> None:
        """Names that stand for modules: assigned, or the items of a loop."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._name(target, node.value)
        elif isinstance(node, ast.NamedExpr):
            self._name(node.target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._items(node.target, node.iter)

    def _name(self, target: ast.AST, value: ast.AST, *parts: str) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and not parts:
            for one, its in zip(target.elts, value.elts, strict=False):
                self._name(one, its)
        elif isinstance(target, ast.Name):
            chains = {c.then(*parts) for c in self._chains(value) if c.root != target.id}
            self._known.setdefault(target.id, set()).update(chains)

    def _items(self, target: ast.AST, over: ast.AST) -> None:
        match target, over:
            case ast.Tuple(elts=[_, item]), ast.Call(func=ast.Name(id="enumerate"), args=[modules, *_]):
                self._items(item, modules)
            case ast.Tuple(elts=items), ast.Call(func=ast.Name(id="zip"), args=lists):
                for item, modules in zip(items, lists, strict=False):
                    self._items(item, modules)
            case _:
                self._name(target, over, ITEM)

    def _chains(self, node: ast.AST) -> set[Chain]:
        """What an expression may be, as far as it is names and attributes."""
        match node:
            case ast.Name(id=name):
                return self._known.get(name) or {Chain(name)}
            case ast.Attribute(value=value, attr=attribute):
                return {c.then(attribute) for c in self._chains(value)}
            case ast.Subscript(value=value):
                return {c.then(ITEM) for c in self._chains(value)}
            case ast.IfExp(body=one, orelse=other):
                return self._chains(one) | self._chains(other)
            case ast.Call(func=ast.Name(id="getattr"), args=[value, name, *_]):
                part = name.value if isinstance(name, ast.Constant) else ITEM
                return {c.then(str(part)) for c in self._chains(value)}
            case ast.Call(func=ast.Name(id="reversed" | "list"), args=[value]):
                return self._chains(value)
        return set()

    def _weight_of(self, node: ast.AST) -> set[Chain]:
        """Modules whose weight an expression is."""
        match node:
            case ast.Attribute(value=module, attr="weight"):
                return self._chains(module)
            case ast.Call(func=ast.Name(id="getattr"), args=[module, ast.Constant(value="weight"), *_]):
                return self._chains(module)
            case ast.Call(func=ast.Name(id="next"), args=[ast.Call(func=ast.Attribute(value=module, attr=attribute))]):
                return {c.then(FIRST) for c in self._chains(module)} if attribute == "parameters" else set()
        return set()

    def _is_harmless(self, node: ast.AST) -> bool:
        """Whether a weight is only asked for what packing leaves as it is, or for a dtype that is checked."""
        parent = self._parents[node]
        match parent:
            case ast.Attribute(attr="dtype"):
                above = [self._parents[parent], *(g.test for g in self._guards(node))]
                checked = any(word in ast.unparse(test) for test in above[1:] for word in DTYPE_IS_CHECKED)
                return checked or isinstance(above[0], ast.Compare)
            case ast.Attribute(attr=attribute):
                return attribute in HARMLESS
            case ast.Call(func=ast.Name(id="isinstance")) | ast.Compare(ops=[ast.Is() | ast.IsNot()]):
                return True
        return False

    def _above(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self._parents:
            node = self._parents[node]
            yield node

    def _conditions(self, node: ast.AST) -> Iterator[tuple[ast.expr, bool]]:
        """Conditions around ``node``, and whether they hold there; one that it is part of itself counts as holding."""
        for above in self._above(node):
            if isinstance(above, (ast.If, ast.IfExp)):
                otherwise = above.orelse if isinstance(above.orelse, list) else [above.orelse]
                yield above.test, node not in otherwise
            node = above

    def _guards(self, node: ast.AST) -> tuple[Guard, ...]:
        return tuple(Guard(test, wanted, self._method) for test, wanted in self._conditions(node))

    def _through(self, call: ast.Call, calls: int) -> Iterator[Read]:
        """Reads in a called function, of the modules that it is given."""
        callee, bound = self._callee(call.func)
        body = None if callee is None or SET_UP.search(callee.__name__) else _body(callee, self._cls if bound else None)
        if callee is None or body is None:
            return
        names = list(inspect.signature(callee).parameters)[bound:]
        given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg in names}
        for read in body.reads(calls):
            if read.chain.root in given:
                for chain in self._chains(given[read.chain.root]):
                    yield Read(chain.then(*read.chain.path), read.method, self._guards(call))

    def _callee(self, node: ast.AST) -> tuple[Callable[..., Any] | None, int]:
        """The function that is called, and how many arguments are bound already."""
        bound = 0
        match node:
            case ast.Name(id=name):
                found = _function(self._function.__globals__.get(name))  # type: ignore[attr-defined]
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if self._cls is not None:
                static = inspect.getattr_static(self._cls, name, None)
                found, bound = _function(static), int(not isinstance(static, staticmethod))
            case _:
                found = None
        return (None, 0) if found is None or found.__module__.startswith("torch.") else (found, bound)

    def _called(self, node: ast.AST) -> tuple[str, frozenset[tuple[str, ...]]]:
        """Method that is called (``forward`` for what may be a module, empty for a function), and the paths to it."""
        if self._callee(node)[1]:
            return node.attr, frozenset({()})  # type: ignore[attr-defined]
        chains = self._chains(node)
        paths = frozenset(chain.path for chain in chains if chain.root == "self")
        if isinstance(node, ast.Name) and not paths:
            known = {**vars(builtins), **self._function.__globals__}  # type: ignore[attr-defined]
            return "" if node.id in known else "forward", paths
        return "forward" if paths else "", paths
