"""A checkpoint directory as Hugging Face writes it: which files hold which tensors, all checked before use.

Only headers are read at opening (a ``.bin`` has none: it is loaded, one shard at a time). Names in the index
never become paths before they are known to be plain file names; links may not lead out of the checkpoint.
"""

import logging
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loftq.errors import InputError, listed, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.lookalikes import described, refuse_pointer
from loftq.formats.picklefile import read_pickle_tensors
from loftq.formats.regular import CHUNK, FileStamp, open_regular, shown
from loftq.formats.tensorfile import (
    TensorInfo,
    check_name,
    dtype_name,
    read_chunks,
    read_header,
    read_tensor,
    sliced,
    tensor_bytes,
)

if TYPE_CHECKING:
    from loftq.planning import Made, Piece

logger = logging.getLogger("loftq")

_KINDS = {
    "safetensors": ("model.safetensors", ".safetensors"),
    "pickle": ("pytorch_model.bin", ".bin"),
}
_LOOKED_FOR = " or ".join(f"{single}(.index.json)" for single, _ in _KINDS.values())
_MAX_FILE_NAME = 255

# Ending of a tensor's name, ending of the tensor that must lie beside it, method.
_QUANTIZED = (
    (".weight_packed", "", "compressed-tensors"),
    (".qweight", "", "GPTQ or AWQ"),
    (".absmax", "", "bitsandbytes 4-bit"),
    (".quant_state.bitsandbytes__nf4", "", "bitsandbytes 4-bit"),
    (".quant_state.bitsandbytes__fp4", "", "bitsandbytes 4-bit"),
    (".SCB", "", "bitsandbytes 8-bit"),
    (".W_q", ".scale", "HQQ"),
    (".codebooks", ".codes", "AQLM"),
    ("_proj_blocks", "_proj_scales", "MXFP4"),
)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one version of a source file from another without reading its tensors.

    ``header_sha256`` covers the header of a safetensors file and all of a ``.bin``, which has no header.
    """

    name: str
    size: int
    mtime_ns: int
    header_sha256: str


class Checkpoint:
    """An opened checkpoint; ``read`` and ``chunks`` may be called from several threads.

    Attributes:
        directory: where it lies.
        kind: ``safetensors`` or ``pickle``.
        tensors: every tensor, sorted by name.
        files: every shard, sorted by name.
    """

    def __init__(self, directory: Path, kind: str, shards: "list[_Shard]") -> None:
        self.directory = directory
        self.kind = kind
        found = {name: info for shard in shards for name, info in shard.tensors.items()}
        self.tensors: dict[str, TensorInfo] = dict(sorted(found.items()))
        self.files = [shard.identity for shard in sorted(shards, key=lambda s: s.identity.name)]
        self._stamps = {shard.path: shard.stamp for shard in shards}
        self._loaded = _LoadedShard()

    def read(self, name: str, made: "Made" = ()) -> torch.Tensor:
        """The tensor in fresh memory; InputError if its file changed since the opening.

        Args:
            made: what it is put together of, if no file holds it as it is.
        """
        parts = [torch.cat([self._rows(piece) for piece in pieces]) for pieces in made]
        if parts:
            return torch.stack(parts) if len(parts) > 1 else parts[0]
        info = self._info(name)
        stamp = self._stamps[info.file]
        if self.kind == "safetensors":
            return read_tensor(info, stamp)
        return self._loaded.read(info, stamp)

    def _rows(self, piece: "Piece") -> torch.Tensor:
        if not piece.transposed:
            return self.rows(piece.tensor, piece.start, piece.stop)[:: piece.step]
        inner, width = piece.shape[-2:]  # the rows are columns of one of the stack's matrices
        place = piece.start // width
        first = place * width
        block = self.rows(piece.tensor, place * inner, (place + 1) * inner).T
        return block[piece.start - first : piece.stop - first : piece.step]

    def rows(self, name: str, start: int, stop: int, columns: int | None = None) -> torch.Tensor:
        """Rows of a tensor, seen as a matrix of its last axis; a vector's are its values.

        Args:
            columns: those of the matrix, if it is to be another.
        """
        info = self._info(name)
        shape = info.shape[1:] and info.shape[-1:] if columns is None else (columns,)
        if self.kind != "safetensors":
            return self.read(name).reshape(-1, *shape)[start:stop]
        row = info.torch_dtype.itemsize * math.prod(shape)
        begin, end = info.start + start * row, info.start + stop * row
        part = replace(info, shape=(stop - start, *shape), start=begin, stop=end, nbytes=end - begin)
        return read_tensor(part, self._stamps[info.file])

    def slice(self, name: str, index: int) -> torch.Tensor:
        """One slice of a tensor's first axis."""
        if self.kind != "safetensors":
            return self.read(name)[index]
        info = self._info(name)
        return read_tensor(sliced(info, index), self._stamps[info.file])

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes for a byte-exact copy, a few megabytes at a time."""
        info = self._info(name)
        if self.kind == "safetensors":
            yield from read_chunks(info, self._stamps[info.file])
            return
        raw = tensor_bytes(self.read(name))
        for start in range(0, len(raw), CHUNK):
            yield raw[start : start + CHUNK]

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InputError(f"{shown(self.directory)}: no tensor {quoted(name)}; check the name")
        return self.tensors[name]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Find the shards of ``directory`` and check index, names, links and headers against each other.

    safetensors are preferred to ``.bin``. All missing, doubled and unlisted tensors are reported at once.

    Raises: InputError, StorageError.
    """
    kind, index, single = _find(directory)
    opener = _open_safetensors if kind == "safetensors" else _open_pickle
    if index is None:
        check_link(single, directory)
        return Checkpoint(directory, kind, [opener(single)])
    check_link(index, directory)
    weight_map, total_size = _read_index(index, single.suffix)
    paths = [directory / name for name in sorted(set(weight_map.values()))]
    missing = {path.name for path in paths if not os.path.lexists(path)}
    present = [path for path in paths if path.name not in missing]
    for path in present:
        check_link(path, directory)
    shards = [opener(path) for path in present]
    _check_agreement(index, weight_map, missing, shards)
    _compare_total_size(index, total_size, shards)
    return Checkpoint(directory, kind, shards)


def is_quantized_source(tensors: Mapping[str, TensorInfo]) -> str | None:
    """With which method ``tensors`` are quantized already, and the tensor that tells; None if they are not.

    8-bit floats with a scale do not count: they are full-precision weights in a short type.
    """
    for name in tensors:
        for ending, partner, method in _QUANTIZED:
            if name.endswith(ending) and (not partner or name.removesuffix(ending) + partner in tensors):
                return f"{method} (tensor {quoted(name)})"
        if name.endswith(".weight_scale"):
            weight = tensors.get(name.removesuffix("_scale"))
            if weight is not None and weight.dtype in ("U8", "I8"):
                return f"loftq or compressed-tensors (tensor {quoted(name)} beside {weight.dtype} weights)"
    return None


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    stamp: FileStamp
    identity: FileIdentity
    tensors: dict[str, TensorInfo]


class _LoadedShard:
    """The one ``.bin`` shard held in memory; workers that ask for another wait for the change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def read(self, info: TensorInfo, stamp: FileStamp) -> torch.Tensor:
        with self._lock:
            if self._path != info.file:
                self._path, self._tensors = None, {}
                self._tensors = read_pickle_tensors(info.file, expected=stamp, checked=True)
                self._path = info.file
            return self._tensors[info.name].clone()


def _open_safetensors(path: Path) -> _Shard:
    refuse_pointer(path)
    file = read_header(path)
    stamp = file.stamp
    identity = FileIdentity(path.name, stamp.size, stamp.mtime_ns, file.header_sha256)
    return _Shard(path, stamp, identity, file.tensors)


def _open_pickle(path: Path) -> _Shard:
    refuse_pointer(path)
    with open_regular(path) as file:
        stamp = file.stamp
        digest = fsio.sha256_file(path).sha256
    infos = {}
    for name, tensor in read_pickle_tensors(path, expected=stamp).items():
        size = tensor.numel() * tensor.itemsize
        infos[name] = TensorInfo(name, dtype_name(tensor.dtype), tuple(tensor.shape), size, 0, size, path)
    return _Shard(path, stamp, FileIdentity(path.name, stamp.size, stamp.mtime_ns, digest), infos)


def _find(directory: Path) -> tuple[str, Path | None, Path]:
    """Kind, index if there is one, and the path that an unsharded checkpoint has."""
    if not os.path.isdir(directory):
        what = "a file" if os.path.lexists(directory) else "no such directory"
        raise InputError(f"{shown(directory)}: {what}; wanted a local directory with {_LOOKED_FOR}")
    found = []
    for kind, (single, _) in _KINDS.items():
        path, index = directory / single, directory / f"{single}.index.json"
        if os.path.lexists(path) and os.path.lexists(index):
            both = f"both {path.name} and {index.name} are there"
            raise InputError(f"{shown(directory)}: {both}; remove the one that does not belong")
        if os.path.lexists(path) or os.path.lexists(index):
            found.append((kind, index if os.path.lexists(index) else None, path))
    if not found:
        what = f"no checkpoint; looked for {_LOOKED_FOR}, {described(directory)}"
        raise InputError(f"{shown(directory)}: {what}")
    if len(found) > 1:
        logger.info("%s: using safetensors, not the .bin files beside them", shown(directory))
    return found[0]


def _read_index(index: Path, ending: str) -> tuple[dict[str, str], Any]:
    """The checked ``weight_map`` and the unchecked ``total_size``; no shard is touched."""
    content = strict_json.load_object(index)
    where = shown(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        got = "an empty one" if weight_map == {} else type(weight_map).__name__
        raise InputError(f"{where}: weight_map must map tensor to file, got {got}; fetch the index again")
    for tensor, file in weight_map.items():
        check_name(tensor, where)
        problem = _file_name_problem(file, ending)
        if problem:
            raise InputError(
                f"{where}: {quoted(tensor)}: file name {quoted(repr(file))} {problem};"
                f" wanted a plain name ending in {ending}, fetch the index again"
            )
    _check_case_twins(set(weight_map.values()), where)
    metadata = content.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _file_name_problem(file: Any, ending: str) -> str | None:
    if not isinstance(file, str):
        return f"is not text but {type(file).__name__}"
    if not file.isprintable():
        return "has a control character"
    if any(c in "/\\:" for c in file):
        return "leads out of the directory"
    if not file.endswith(ending) or file == ending:
        return "has the wrong ending"
    return "is too long" if len(file.encode()) > _MAX_FILE_NAME else None


def _check_case_twins(files: Iterable[str], where: str) -> None:
    seen: dict[str, str] = {}
    for file in sorted(files):
        twin = seen.setdefault(file.casefold(), file)
        if twin != file:
            pair = f"file names {quoted(twin)} and {quoted(file)} differ only by case"
            raise InputError(f"{where}: {pair}; rename one, they are one file on some systems")


def check_link(path: Path, directory: Path) -> None:
    """Refuse a symbolic link that leads nowhere, or out of the checkpoint to what is no part of a model.

    Followed are links inside ``directory``; into the blobs of the hub's cache; and to a file of the same name in
    another model's directory, as in a folder of links. No other file can so get into an output that is published.
    """
    if not path.is_symlink():
        return
    try:
        target = Path(os.path.realpath(path, strict=True))
    except OSError as e:
        why = f"a symbolic link that leads nowhere ({e.strerror})"
        raise InputError(f"{shown(path)}: {why}; fetch the file again") from e
    home = Path(os.path.realpath(directory))
    if not (home in target.parents or _is_blob(target, home) or _is_of_a_model(target, path.name)):
        why = f"a symbolic link out of the checkpoint, to {quoted(target, 400)}"
        cure = "copy what belongs to the model into one directory (`cp -RL` follows links) and name that"
        raise InputError(f"{shown(path)}: {why}; {cure}")


def _is_blob(target: Path, home: Path) -> bool:
    """Whether ``target`` lies in the hub's cache: of the same model, or under a hash, as older versions linked it."""
    repository = target.parent.parent
    hashed = repository.name.startswith("models--") and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", target.name)
    snapshots = repository / "snapshots"
    return target.parent.name == "blobs" and (snapshots in home.parents or bool(hashed))


def _is_of_a_model(target: Path, name: str) -> bool:
    """Whether ``target`` is called ``name`` and lies beside weights and their configuration."""
    beside = target.parent
    weights = (file for file, _ in _KINDS.values())
    return (
        target.name == name
        and (beside / "config.json").is_file()
        and any((beside / f).is_file() or (beside / f"{f}.index.json").is_file() for f in weights)
    )


def _check_agreement(index: Path, weight_map: Mapping[str, str], missing: set[str], shards: list[_Shard]) -> None:
    """Index and shards must name the same tensors, each once; everything wrong is told in one message."""
    homes: dict[str, list[str]] = {}
    for shard in shards:
        for name in shard.tensors:
            homes.setdefault(name, []).append(shard.path.name)
    astray = [n for n, f in weight_map.items() if f not in missing and f not in homes.get(n, ())]
    doubled = [f"{n} ({listed(files)})" for n, files in homes.items() if len(files) > 1]
    unlisted = [n for n in homes if n not in weight_map]
    problems = [
        f"{what}: {listed(sorted(names))}"
        for what, names in (
            ("missing files", missing),
            ("tensors not in the file the index names", astray),
            ("tensors in two files", doubled),
            ("tensors not in the index", unlisted),
        )
        if names
    ]
    if problems:
        cure = "fetch the checkpoint again or repair the index"
        raise InputError(f"{shown(index)}: {'; '.join(problems)}; {cure}")


def _compare_total_size(index: Path, total_size: Any, shards: list[_Shard]) -> None:
    """``total_size`` is advice: some tools count it otherwise, so a difference is only a warning."""
    actual = math.fsum(info.nbytes for shard in shards for info in shard.tensors.values())
    if total_size is not None and total_size != actual:
        told = quoted(repr(total_size), 40)
        logger.warning("%s: total_size is %s, the tensors have %d bytes", shown(index), told, actual)
