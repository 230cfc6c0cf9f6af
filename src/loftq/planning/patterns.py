"""Options that differ by module: ``layers.0-3=4,2`` is 4 in layers 0 to 3, else 2."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

from loftq.errors import UsageError, listed, quoted

V = TypeVar("V")
DIGITS = 18  # no size and no place has as many, and Python converts only so many


@dataclass(frozen=True)
class Rules(Generic[V]):
    """The first pattern that matches a module's name decides; else ``default``."""

    rules: tuple[tuple[str, V], ...]
    default: V

    def __call__(self, module: str) -> V:
        return next((value for pattern, value in self.rules if matches(pattern, module)), self.default)

    def refuse_unmatched(self, option: str, modules: Iterable[str]) -> None:
        """UsageError, naming the nearest modules, for a pattern that matches none of ``modules``."""
        names = list(modules)
        for pattern, _ in self.rules:
            if not any(matches(pattern, name) for name in names):
                near = difflib.get_close_matches(pattern, names, n=5, cutoff=0)
                raise UsageError(f"{option}: {quoted(pattern)} matches no module; the nearest are {listed(near)}")


def parse_rules(option: str, text: str, value: Callable[[str], V]) -> Rules[V]:
    """Parse ``PATTERN=VALUE,…,DEFAULT``. A pattern is a run of a name's parts, each a glob or a range ``0-3``."""
    rules: list[tuple[str, V]] = []
    defaults: list[V] = []
    for item in text.split(","):
        pattern, equals, written = (part.strip() for part in item.rpartition("="))
        if equals and not pattern:
            raise UsageError(f"{option}: {quoted(item)} has nothing before the '='")
        if equals:
            rules.append((pattern, value(written)))
        else:
            defaults.append(value(written))
    if len(defaults) != 1:
        raise UsageError(
            f"{option}: {quoted(text)} needs exactly one value without a pattern, for all other modules; "
            "for example 'layers.0-3=4,2'"
        )
    return Rules(tuple(rules), defaults[0])


def matches(pattern: str, module: str) -> bool:
    """Whether ``pattern`` matches consecutive parts of ``module``."""
    wanted, parts = pattern.split("."), module.split(".")
    return any(
        all(_part_matches(w, p) for w, p in zip(wanted, parts[i : i + len(wanted)], strict=True))
        for i in range(len(parts) - len(wanted) + 1)
    )


def _part_matches(wanted: str, part: str) -> bool:
    first, _, last = map(whole, wanted.partition("-"))
    if min(first, last) >= 0:
        return first <= whole(part) <= last
    return fnmatchcase(part, wanted)


def whole(text: str) -> int:
    """The whole number that ``text`` is, of up to :data:`DIGITS` digits; -1 for anything else."""
    return int(text) if text.isdecimal() and len(text) <= DIGITS else -1
