"""Calibration statistics: second moments of the inputs of every matrix, in memory or in a directory.

A directory holds one safetensors file for each block of the model and ``statistics.json``, which is written last:
without it a directory is no statistics. Matrices that get the same input (query, key and value; gate and up) share a
group, whose tensors are stored once, as float32: ``MODULE.fit.columns`` and so on, MODULE being the first of the group.
"""

import functools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loftq.errors import InputError, NumericalError, listed, quoted
from loftq.formats import fsio
from loftq.formats.regular import shown
from loftq.formats.stack_statistics import PARTS, StackGroup, moments, names, tensors_wanted
from loftq.formats.tensorfile import (
    Entry,
    TensorFile,
    check_name,
    encode_header,
    read_header,
    read_tensor,
    sliced,
    tensor_bytes,
)
from loftq.numerics import ENOUGH, Metric, Moments, towards_diagonal
from loftq.options import TABLE

logger = logging.getLogger("loftq")

KINDS = TABLE["kind"][1].choices
FORMAT_VERSION = 1
WITH_STACKS = 2  # the version of statistics that are of stacks of experts too


@dataclass(frozen=True)
class Group:
    """Matrices that get the same input, and its moments as they were measured.

    Attributes:
        modules: their names.
        moments: not shrunk; ``held`` is ``fit`` if there were no tokens to hold out.
        held_tokens: how many ``moments.held`` is of.
    """

    modules: tuple[str, ...]
    moments: Moments
    held_tokens: int

    def checked(self, problem: str) -> "Group":
        """The group itself. NumericalError, with the problem, for moments that are not finite."""
        for part in (self.moments.fit, self.moments.held):
            if part.columns is None or not part.columns.isfinite().all():
                raise NumericalError(f"{quoted(self.modules[0])}: {problem}")
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        parts = {"fit": self.moments.fit} | ({"held": self.moments.held} if self.held_tokens else {})
        named = {f"{p}.{side}": t for p, m in parts.items() for side, t in (("columns", m.columns), ("rows", m.rows))}
        return {f"{self.modules[0]}.{end}": t for end, t in named.items() if t is not None}

    def row(self, file: str) -> dict[str, Any]:
        """What ``statistics.json`` says of the group."""
        columns = self.moments.fit.columns
        assert columns is not None, "moments without second moments"
        width, counts = len(columns), {"tokens": self.moments.tokens, "held_tokens": self.held_tokens}
        return {"file": file, "modules": list(self.modules), "width": width, **counts}


def write_groups(path: Path, groups: Iterable[Group | StackGroup]) -> fsio.FileDigest:
    """The tensors of ``groups`` as a safetensors file, atomically."""
    tensors = {name: tensor for group in groups for name, tensor in group.tensors().items()}
    entries = [Entry(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()]
    header = encode_header(entries, {"format": "pt"})
    return fsio.write_atomic(path, (header, *(tensor_bytes(t) for t in tensors.values())))


class Statistics:
    """The moments of every matrix that was reached. ``moments`` may be called from several threads.

    Attributes:
        kind: ``full``, ``diagonal`` or ``fisher``.
        identity: what a result made with these statistics depends on.
    """

    def __init__(
        self,
        kind: str,
        rows: Sequence[Mapping[str, Any]],
        read: Callable[[int, int], Moments],  # of a group, and the place among its modules
        samples: int,
        identity: Mapping[str, Any],
        warn: bool = True,
    ) -> None:
        self.kind, self.identity = kind, dict(identity)
        self._rows, self._read, self._samples = rows, read, samples
        self._index = {m: (i, place) for i, row in enumerate(rows) for place, m in enumerate(names(row))}
        self._lock, self._warned = threading.Lock(), not warn
        self._last: Moments | None = None  # kept for the next matrix, which may be of the same group
        self._used: weakref.WeakValueDictionary[tuple[int, int], Moments] = weakref.WeakValueDictionary()

    def __repr__(self) -> str:
        return f"Statistics({self.kind} moments of {len(self._index)} matrices, from {self._samples} samples)"

    @classmethod
    def of(cls, kind: str, groups: Iterable[Group | StackGroup], samples: int) -> "Statistics":
        """Statistics that are in memory."""
        kept = list(groups)
        rows = [group.row("") for group in kept]

        def read(index: int, place: int) -> Moments:
            group = kept[index]
            return group.moments if isinstance(group, Group) else moments(rows[index], kind, group.read, place)

        return cls(kind, rows, read, samples, {"kind": kind, "samples": samples})

    @classmethod
    def stored(cls, directory: Path, manifest: Mapping[str, Any], warn: bool = True) -> "Statistics":
        """The statistics of a directory, of whose tensors only headers are read now.

        Args:
            manifest: what its ``statistics.json`` says, its seal checked already.
            warn: of too few tokens, when moments are first asked for.

        Raises: InputError for anything that is not as :func:`write_groups` and ``loftq calibrate`` leave it.
        """
        where = shown(directory / "statistics.json")
        _check_manifest(manifest, where)
        files = {name: _header(directory / name, digest) for name, digest in manifest["files"].items()}
        for row in manifest["groups"]:
            _check_tensors(row, files[row["file"]], manifest["kind"])
        reader = _Reader(manifest, files)
        identity = {key: manifest[key] for key in ("kind", "samples", "identity", "sha256")}
        return cls(manifest["kind"], manifest["groups"], reader.moments, manifest["samples"], identity, warn)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules with statistics; an expert of a stack is called by its number."""
        return tuple(self._index)

    @property
    def routed(self) -> dict[str, list[int]]:
        """How many tokens each expert of a stack was fitted on."""
        return {row["modules"][0]: row["experts"]["tokens"] for row in self._rows if "experts" in row}

    def moments(self, module: str) -> Moments | None:
        """The moments of a module, ``fit`` shrunk where tokens were few; None for a module that was never reached.

        Of n input features, few tokens give ``H`` with too much noise to be trusted in every direction, and the fewer
        the more it is shrunk towards its diagonal; below ``4 n`` tokens a warning says so:

            H <- (1 - a) H + a diag(H),    a = n / (4 n + tokens)

        Those of an expert are shrunk towards the mean of its layer (:mod:`loftq.formats.stack_statistics`).

        Raises: InputError for damaged files.
        """
        if module not in self._index:
            return None
        index, place = self._index[module]
        of_stack = "experts" in self._rows[index]
        key = index, place if of_stack else 0
        with self._lock:
            found = self._used.get(key)
            if found is None:
                if not self._warned:
                    warn_if_few(self.kind, self._rows, self._samples)
                self._warned = True
                found = self._read(*key)
                found = self._used[key] = found if of_stack else shrunk(found)
            self._last = found
            return found

    def forget(self) -> None:
        """Drop the moments that are kept in memory for the next matrix."""
        self._last = None


def warn_if_few(kind: str, rows: Sequence[Mapping[str, Any]], samples: int) -> None:
    """Warn if full second moments are of so few tokens that they are shrunk."""
    few = [row for row in rows if kind == "full" and _wants_more(row, samples)]
    if few:
        logger.warning(
            "calibration: %d of %d matrices have fewer than %d tokens per input feature; their second moments are "
            "shrunk towards their diagonal; %d samples of the same length would be enough",
            *(sum(len(row["modules"]) for row in few), sum(len(names(row)) for row in rows), ENOUGH),
            samples_wanted(rows, samples),
        )


def _wants_more(row: Mapping[str, Any], samples: int) -> bool:
    """Whether a group has few tokens, and would have more with more samples, as a pooler would not."""
    return samples < row["tokens"] < ENOUGH * row["width"]


def fewest(rows: Sequence[Mapping[str, Any]], samples: int) -> Mapping[str, Any]:
    """The group with the fewest tokens per input feature, of those that are given more than a vector a sample.

    Those that are not, poolers and classifiers, never have enough, and what they are given is hardly worth it.
    """
    by_token = [row for row in rows if row["tokens"] > samples]
    return min(by_token or rows, key=lambda row: row["tokens"] / row["width"])


def samples_wanted(rows: Sequence[Mapping[str, Any]], samples: int) -> int:
    """How many samples of the same length would be enough for all of :func:`fewest`'s groups."""
    row = fewest(rows, samples)
    return math.ceil(samples * max(1.0, ENOUGH * row["width"] / row["tokens"]))


def shrunk(moments: Moments) -> Moments:
    """``moments`` with the whole second moments of ``fit`` shrunk towards their diagonal."""
    h = moments.fit.columns
    if h is None or h.ndim == 1:
        return moments
    return Moments(Metric(towards_diagonal(h, moments.tokens), moments.fit.rows), moments.held, moments.tokens)


class _Reader:
    """Reads groups from files, each of which is compared with its hash before its first tensor is used."""

    def __init__(self, manifest: Mapping[str, Any], files: Mapping[str, TensorFile]) -> None:
        self._manifest, self._files = manifest, files
        self._checked: set[str] = set()

    def moments(self, index: int, place: int) -> Moments:
        row = self._manifest["groups"][index]
        name, file = row["file"], self._files[row["file"]]
        if name not in self._checked:
            if fsio.sha256_file(file.path).sha256 != self._manifest["files"][name]["sha256"]:
                raise _damaged(file.path, "its bytes have changed (sha256)")
            self._checked.add(name)
        if "experts" in row:
            return moments(row, self._manifest["kind"], functools.partial(_read, file), place)
        fit = self._metric(row, "fit")
        return Moments(fit, self._metric(row, "held") if row["held_tokens"] else fit, row["tokens"])

    def _metric(self, row: Mapping[str, Any], part: str) -> Metric:
        file, stem = self._files[row["file"]], f"{row['modules'][0]}.{part}"
        columns = _read(file, f"{stem}.columns")
        return Metric(columns, _read(file, f"{stem}.rows") if f"{stem}.rows" in file.tensors else None)


def _read(file: TensorFile, name: str, index: int | None = None) -> Tensor:
    info = file.tensors[name]
    tensor = read_tensor(info if index is None else sliced(info, index), file.stamp)
    square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
    diagonal = tensor.diagonal() if square else tensor
    if not tensor.isfinite().all() or bool((diagonal < 0).any()):
        raise _damaged(file.path, f"{quoted(name)}: no second moments: not finite, or below zero")
    return tensor


def _header(path: Path, digest: Mapping[str, Any]) -> TensorFile:
    file = read_header(path)
    if file.stamp.size != digest["size"]:
        raise _damaged(path, f"{file.stamp.size} bytes, statistics.json says {digest['size']}")
    return file


def _check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Refuse a ``statistics.json`` with other fields than those that are used, before they are."""
    if manifest.get("format_version") not in (FORMAT_VERSION, WITH_STACKS):
        raise InputError(
            f"{where}: format_version {quoted(manifest.get('format_version'))}, this loftq reads {FORMAT_VERSION} and "
            f"{WITH_STACKS}; collect the statistics again"
        )
    problem = None
    try:
        files, rows = manifest["files"], manifest["groups"]
        odd = [k for k in ("identity", "sha256") if not isinstance(manifest[k], {"identity": dict}.get(k, str))]
        odd += [f"kind {quoted(manifest['kind'])}"] if manifest["kind"] not in KINDS else []
        odd += [] if _count(manifest["samples"]) else ["samples"]
        odd += [quoted(name) for name, digest in files.items() if not _plain_file(name, digest)]
        odd += [f"group {i}" for i, row in enumerate(rows) if not _sound(row, files)]
        if odd or not rows:
            problem = listed(odd) or "no groups"
    except (AttributeError, KeyError, TypeError) as e:
        problem = quoted(repr(e))
    if problem:
        raise InputError(f"{where}: {problem}: missing or not what it should be; collect the statistics again")
    modules = [module for row in manifest["groups"] for module in names(row)]
    for module in modules:
        check_name(module, where)
    if len(set(modules)) < len(modules):
        raise InputError(f"{where}: a module is in two groups; collect the statistics again")


def _count(value: Any, low: int = 1) -> bool:
    return type(value) is int and value >= low


def _plain_file(name: str, digest: Mapping[str, Any]) -> bool:
    plain = name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\:")
    return plain and _count(digest["size"]) and isinstance(digest["sha256"], str)


def _sound(row: Mapping[str, Any], files: Mapping[str, Any]) -> bool:
    modules = row["modules"]
    named = isinstance(modules, list) and bool(modules) and all(isinstance(name, str) for name in modules)
    if "experts" in row:
        fit, held = row["experts"]["tokens"], row["experts"]["held_tokens"]
        lists = isinstance(fit, list) and isinstance(held, list) and len(fit) == len(held) and bool(fit)
        summed = lists and all(_count(n, 0) for n in (*fit, *held))
        named = named and len(modules) == 1 and summed and (sum(fit), sum(held)) == (row["tokens"], row["held_tokens"])
    counted = _count(row["width"]) and _count(row["tokens"]) and _count(row["held_tokens"], 0)
    return named and counted and row["file"] in files


def _check_tensors(row: Mapping[str, Any], file: TensorFile, kind: str) -> None:
    """The tensors of a group are there, and have the shapes that the kind asks for."""
    if "experts" in row:
        shapes = {name: info.shape for name, info in file.tensors.items()}
        for tensor, fitting in tensors_wanted(row, kind, shapes).items():
            if shapes.get(tensor) not in fitting or file.tensors[tensor].dtype != "F32":
                raise _damaged(file.path, f"{quoted(tensor)}: found {shapes.get(tensor)}, wanted F32 {fitting}")
        return
    for part in PARTS if row["held_tokens"] else PARTS[:1]:
        name, n = f"{row['modules'][0]}.{part}.columns", row["width"]
        wanted: dict[str, tuple[int, ...] | None] = {name: (n, n) if kind == "full" else (n,)}
        if kind == "fisher":
            wanted[f"{row['modules'][0]}.{part}.rows"] = None
        for tensor, shape in wanted.items():
            found = file.tensors.get(tensor)
            if found is None:
                raise _damaged(file.path, f"no tensor {quoted(tensor)}")
            good = found.shape == shape if shape else len(found.shape) == 1
            if not good or found.dtype != "F32":
                raise _damaged(
                    file.path, f"{quoted(tensor)} is {found.dtype} of shape {found.shape}, wanted F32 {shape}"
                )


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(f"{shown(path)}: {problem}; collect the statistics again")
