"""JSON files that carry their own hash, so that a change in them is noticed when they are read back."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq.errors import InputError, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.regular import open_regular, shown

SEAL = "sha256"


def write(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Put ``content`` and its hash at ``path``, atomically; what a reader will get."""
    raw = _sealed(content)
    fsio.write_atomic(path, [raw])
    return strict_json.loads(raw, shown(path))


def create(path: Path, content: dict[str, Any]) -> bool:
    """:func:`write`, unless something is at ``path``; whether it was done: :func:`loftq.formats.fsio.create`."""
    return fsio.create(path, [_sealed(content)])


def load(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote; InputError if any of it was changed."""
    return whole(strict_json.load_object(path), path)


def whole(sealed: dict[str, Any], path: Path) -> dict[str, Any]:
    """``sealed``, read from ``path``; InputError if any of it was changed."""
    if sealed.get(SEAL) != _hash({k: v for k, v in sealed.items() if k != SEAL}):
        raise InputError(f"{shown(path)}: its content does not match its own sha256; the file was changed")
    return sealed


def line(content: dict[str, Any]) -> bytes:
    """``content`` and its hash as one line, for a file that grows."""
    return json.dumps({**content, SEAL: _hash(content)}, allow_nan=False).encode() + b"\n"


def load_lines(path: Path) -> Iterator[dict[str, Any]]:
    """What the lines of a file say, in order; InputError at one that was changed, or not written to its end."""
    where = shown(path)
    with open_regular(path) as file:
        raw = b"".join(file.chunks(0, file.stamp.size))
    for number, text in enumerate(raw.splitlines(keepends=True), 1):
        sealed = strict_json.loads(text, f"{where}, line {number}")
        content = {k: v for k, v in sealed.items() if k != SEAL} if isinstance(sealed, dict) else {}
        if not content or sealed.get(SEAL) != _hash(content) or not text.endswith(b"\n"):
            raise InputError(f"{where}, line {number}: it does not match its own sha256; the file was changed")
        yield content


def _sealed(content: dict[str, Any]) -> bytes:
    return strict_json.dumps({**content, SEAL: _hash(content)})


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def differences(old: Any, new: dict[str, Any], path: str = "") -> Iterator[str]:
    """``field: old -> new`` for every value that differs, in depth."""
    old = old if isinstance(old, dict) else {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(b, dict) and a is not None:
            yield from differences(a, b, f"{path}{key}.")
        elif a != b:
            yield f"{path}{key}: {quoted(a, 40)} -> {quoted(b, 40)}"
