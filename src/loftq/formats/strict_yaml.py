"""YAML of the 1.2 core schema, without the freedoms of the 1.1 that the library reads, and bounded in all directions.

``1e-4`` is a number and ``no`` a word. A key that is given twice, a tag of any kind, and text that no UTF-8 has are
refused. Aliases may be used, as long as what they stand for stays small; one that stands for itself is refused.
"""

import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from loftq.errors import InputError, quoted
from loftq.formats import text as texts
from loftq.formats.regular import shown
from loftq.formats.text import MAX_DEPTH

MAX_BYTES = 256 << 10  # the library reads about as much in a second
MAX_VALUES = 10_000  # with all that aliases stand for; a recipe has a hundred


def load_file(path: Path) -> Any:
    """What stands in the regular file ``path``; raises as :func:`loads`."""
    where = shown(path)
    raw = texts.read(path, "YAML", MAX_BYTES)
    try:
        text = texts.decoded(raw)
    except ValueError as e:
        raise texts.refused(where, f"not YAML: {quoted(e)}") from e
    return loads(text, where)


def loads(text: str, where: str) -> Any:
    """The value of the YAML ``text``.

    Args:
        where: what the text is; every message starts with it.
    Raises: InputError for what is no YAML, or more of it than is read.
    """
    texts.check_size(len(text), where, "YAML", MAX_BYTES)
    try:
        return yaml.load(text, _Loader)
    except InputError as e:
        raise texts.refused(where, str(e)) from e
    except RecursionError as e:
        raise texts.too_deep(where) from e
    except (yaml.YAMLError, ValueError, OverflowError) as e:
        raise texts.refused(where, f"not YAML: {quoted(' '.join(str(e).split()), 300)}") from e


class _Loader(yaml.SafeLoader):
    """Counts what it composes, and knows five kinds of scalar."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}
    yaml_constructors: typing.ClassVar[dict] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0
        self._weights: dict[str, int] = {}  # of anchors whose node is whole

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._weights:
                raise InputError(f"*{quoted(event.anchor)} stands for what it is a part of")
            self._count(self._weights.get(event.anchor, 0))
            return super().compose_node(parent, index)
        before = self._values
        self._count(1)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise InputError(f"more than {MAX_DEPTH} levels of nesting")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._weights[event.anchor] = self._values - before
        return node

    def _count(self, more: int) -> None:
        self._values += more
        if self._values > MAX_VALUES:
            raise InputError(f"more than {MAX_VALUES} values, with those that aliases stand for")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        found: dict = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is no word", problem_mark=key_node.start_mark)
            key = self.construct_object(key_node)
            if key in found:
                problem = f"key {quoted(repr(key))} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=deep)
        return found


def _scalar(kind: str, pattern: str, value_of: Callable[[str], Any]) -> Callable[[_Loader, yaml.ScalarNode], Any]:
    matches = re.compile(rf"(?:{pattern})\Z").match

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        if not matches(node.value):  # under a tag of its own
            raise yaml.MarkedYAMLError(problem=f"no {kind}: {quoted(node.value)}", problem_mark=node.start_mark)
        return value_of(node.value)

    return construct


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _str(text: str) -> str:
    text.encode()  # ValueError for half a surrogate pair
    return text


for _kind, _pattern, _first, _value_of in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9]+", "-+0123456789", texts.whole),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        _float,
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    ("str", r"(?s:.*)", [], _str),
):
    _tag = f"tag:yaml.org,2002:{_kind}"
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
    _Loader.add_constructor(_tag, _scalar(_kind, _pattern, _value_of))
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.construct_yaml_seq)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
_Loader.add_constructor(None, _Loader.construct_undefined)  # type: ignore[arg-type]  # any other tag
