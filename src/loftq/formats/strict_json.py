"""JSON without the freedoms of the standard library: no duplicate names, no NaN, bounded size and depth."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

from loftq.errors import quoted
from loftq.formats import text as texts
from loftq.formats.regular import shown
from loftq.formats.text import MAX_BYTES, MAX_DEPTH, MAX_VALUES

SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
STEP = {mark: 1 if mark in b"[{" else -1 for mark in b"[]{}"}
BUT_MARKS = bytes(set(range(256)) - set(b'"[]{}'))
TAG = "__float__"  # transformers writes {"__float__": "Infinity"} for what JSON has no number for


def loads(raw: bytes, where: str, *, max_bytes: int = MAX_BYTES, special: bool = False) -> Any:
    """The value of the JSON text ``raw``.

    Args:
        where: what the text is; every message starts with it.
        max_bytes: longer texts are refused unparsed.
        special: whether numbers may be NaN or infinite, in each of the spellings that transformers reads.
    Raises:
        InputError: not UTF-8, a byte order mark, a duplicate name, NaN or Infinity, a number out of range, a
            lone surrogate, more than 100 levels or two million values, or no JSON at all.
    """
    texts.check_size(len(raw), where, "JSON", max_bytes)
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES:
        raise texts.refused(where, f"more than {MAX_VALUES} values in one JSON text")
    try:
        text = texts.decoded(raw)
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=SPECIAL.__getitem__ if special else _no_constant,
            parse_float=float if special else _finite,
            parse_int=_whole,
        )
        if b"\\u" in raw:
            _check_surrogates(value)
    except RecursionError as e:
        raise texts.too_deep(where) from e
    except ValueError as e:
        raise texts.refused(where, f"not strict JSON: {quoted(e)}") from e
    if isinstance(value, (dict, list)) and _deeper_than(value, MAX_DEPTH):
        raise texts.too_deep(where)
    return untagged(value) if special else value


def load_object(path: Path, *, max_bytes: int = MAX_BYTES, special: bool = False) -> dict[str, Any]:
    """The JSON object in the regular file ``path``; its size is checked before it is read. See :func:`loads`."""
    where = shown(path)
    raw = texts.read(path, "JSON", max_bytes)
    value = loads(raw, where, max_bytes=max_bytes, special=special)
    if not isinstance(value, dict):
        raise texts.refused(where, f"wanted a JSON object, got {type(value).__name__}")
    return value


def check_bounds(path: Path) -> None:
    """Refuse a file that another parser will read if it is too large, too deep, or no regular file.

    What is in strings does not nest, and whether it is JSON at all the other parser will say.
    """
    raw = texts.read(path, "JSON")
    bare = raw.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, BUT_MARKS)
    brackets = b"".join(bare.split(b'"')[::2])  # outside of strings
    if max(itertools.accumulate(map(STEP.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise texts.too_deep(shown(path))


def dumps(obj: Any) -> bytes:
    """``obj`` as JSON, the same bytes for equal objects: sorted keys, two spaces, UTF-8, a final newline."""
    text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8") + b"\n"


def untagged(value: Any) -> Any:
    """``value`` with the floats that ``{"__float__": "Infinity"}`` and the like stand for."""
    if isinstance(value, list):
        return [untagged(one) for one in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(TAG) if len(value) == 1 else None
    if isinstance(tag, str) and tag in SPECIAL:
        return SPECIAL[tag]
    return {name: untagged(one) for name, one in value.items()}


def tagged(value: Any) -> Any:
    """The inverse of :func:`untagged`, for :func:`dumps`."""
    if isinstance(value, dict):
        return {name: tagged(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [tagged(one) for one in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return {TAG: next(name for name, special in SPECIAL.items() if str(special) == str(value))}


def finite(value: Any) -> Any:
    """``value`` with None for every number in it that is not finite, which JSON has no way to write."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate name {quoted(repr(key))}")
            seen.add(key)
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"number out of range: {quoted(digits, 40)}")
    return number


def _whole(digits: str) -> int | float:
    """An integer; ``-0`` is the float that every other JSON reader takes it for."""
    return -0.0 if digits == "-0" else texts.whole(digits)


def _check_surrogates(value: Any) -> None:
    """Half a surrogate pair can only come from a ``\\u`` escape and has no UTF-8."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            for child in (item.values() if type(item) is dict else item)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True
