"""safetensors files: a reader that accepts a strict subset of the format, and a writer that streams.

A file is eight bytes of little-endian header length, a JSON header, and the tensors back to back. The reader
trusts nothing: every offset, size, name and type is checked before a byte of a tensor is read, and whatever
it accepts the ``safetensors`` library accepts too, with equal bytes. It is stricter in refusing duplicate
names, unknown fields, control characters in names, rank above 8 and headers above 16 MiB.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from loftq.errors import InputError, StorageError, listed, quoted
from loftq.formats import strict_json
from loftq.formats.regular import CHUNK, FileStamp, RegularFile, open_regular, shown

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 300_000
MAX_RANK = 8
MAX_DIM = 1 << 40
MAX_NAME_BYTES = 1024

T = TypeVar("T")

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
# The library multiplies dimensions left to right in 64 bits, so [2**40, 2**40, 0] overflows there.
_MAX_PRODUCT = 1 << 57


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: the bytes ``start:stop`` of ``file``, little-endian, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int
    stop: int
    file: Path

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type as PyTorch knows it."""
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The validated header of one file; ``tensors`` are in the order of their bytes."""

    path: Path
    stamp: FileStamp
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    header_sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor about to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of the tensor's bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def in_shards(items: Iterable[T], size: Callable[[T], int], largest: int) -> dict[str, list[T]]:
    """Names of the files of a checkpoint, and the items in each: filled in the given order, up to ``largest`` bytes.

    An item that is larger has a file of its own.
    """
    shards: list[list[T]] = [[]]
    filled = 0
    for item in items:
        if shards[-1] and filled + size(item) > largest:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size(item)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_of(shards: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """``model.safetensors.index.json`` for files and their tensors."""
    return {
        "metadata": {"total_size": sum(entry.nbytes for shard in shards.values() for entry in shard)},
        "weight_map": {entry.name: name for name, shard in shards.items() for entry in shard},
    }


def read_header(path: Path, max_header_bytes: int = MAX_HEADER_BYTES) -> TensorFile:
    """Read and check the header of ``path``; no tensor bytes are read.

    Raises:
        InputError: anything but a sound file, naming the tensor where there is one.
        StorageError: the file cannot be read.
    """
    with open_regular(path) as file:
        raw = _raw_header(file, max_header_bytes)
    where, size = shown(path), file.stamp.size
    header = _parsed(raw[8:], where)
    metadata = _checked_metadata(header.pop(_METADATA, {}), where)
    if len(header) > MAX_TENSORS:
        raise InputError(f"{where}: {len(header)} tensors, at most {MAX_TENSORS} are read; split the file")
    infos = [_checked_info(name, fields, path, where, len(raw)) for name, fields in header.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_coverage(infos, len(raw), size, where)
    tensors = {info.name: info for info in infos}
    return TensorFile(path, file.stamp, tensors, metadata, hashlib.sha256(raw).hexdigest())


def read_tensor(info: TensorInfo, stamp: FileStamp) -> torch.Tensor:
    """The tensor's bytes, read straight into fresh memory of PyTorch's.

    Args:
        stamp: the file's stamp when its header was read; InputError if it is another now.
    """
    with open_regular(info.file, stamp) as file:
        raw = _allocate(info)
        file.read_into(raw.numpy().data, info.start)
    return raw.view(info.torch_dtype).reshape(info.shape)


def sliced(info: TensorInfo, index: int) -> TensorInfo:
    """One slice of a tensor's first axis, to be read as a tensor."""
    size = info.nbytes // info.shape[0]
    start = info.start + index * size
    return replace(info, shape=info.shape[1:], start=start, stop=start + size, nbytes=size)


def read_chunks(info: TensorInfo, stamp: FileStamp, chunk: int = CHUNK) -> Iterator[memoryview]:
    """The tensor's bytes for a byte-exact copy, at most ``chunk`` at a time; checked like ``read_tensor``."""
    with open_regular(info.file, stamp) as file:
        yield from file.chunks(info.start, info.stop, chunk)


def encode_header(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Header length and header of a file whose tensors lie in the order of ``entries``.

    Equal arguments give equal bytes; metadata is sorted. The data starts at a multiple of eight.

    Raises: InputError for what our own reader would refuse.
    """
    where = "new safetensors file"
    header: dict[str, Any] = {}
    if metadata:
        header[_METADATA] = dict(sorted(_checked_metadata(dict(metadata), where).items()))
    position = 0
    for entry in entries:
        check_name(entry.name, where)
        if entry.name in header or entry.name == _METADATA:
            raise InputError(f"{where}: duplicate name {quoted(repr(entry.name))}; each tensor needs its own")
        _check_dtype(entry.dtype, entry.name, where)
        _check_shape(list(entry.shape), entry.name, where)
        span = [position, position + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or len(entries) > MAX_TENSORS:
        size = f"{len(entries)} tensors in a header of {len(text)} bytes"
        raise InputError(f"{where}: {size} would not be read back; write smaller shards")
    return len(text).to_bytes(8, "little") + text


def file_size(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> int:
    """Length of the whole file."""
    return len(encode_header(entries, metadata)) + sum(entry.nbytes for entry in entries)


def tensor_bytes(t: torch.Tensor) -> memoryview:
    """The bytes of ``t``, row-major, without a copy if it is contiguous and on the CPU."""
    dtype_name(t.dtype)
    flat = t.detach().cpu().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a PyTorch type; InputError for complex and sub-byte types."""
    if dtype not in _NAMES:
        raise InputError(f"dtype {dtype} cannot be stored; convert it to one of {', '.join(DTYPES)}")
    return _NAMES[dtype]


def check_name(name: str, where: str) -> None:
    """Refuse names that could harm whoever prints them; the InputError starts with ``where``."""
    if not name:
        raise _damaged(where, "a tensor with an empty name")
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise _damaged(where, f"{quoted(name)}: name longer than {MAX_NAME_BYTES} bytes")
    if not name.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise _damaged(where, f"{quoted(name)}: control character in the name")


def _damaged(where: str, problem: str) -> InputError:
    return InputError(f"{where}: {problem}; the file is damaged or not what it claims, fetch it again")


def _raw_header(file: RegularFile, max_header_bytes: int) -> bytes:
    where, size = shown(file.path), file.stamp.size
    if size < 8:
        raise _damaged(where, f"file has {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(file.read_at(0, 8), "little")
    if length > size - 8 or length < 2:
        raise _damaged(where, f"header length {length}, file has {size} bytes")
    if length > max_header_bytes:
        why = f"header length {length}, at most {max_header_bytes} are read; if you trust the file split it"
        raise InputError(f"{where}: {why}")
    return file.read_at(0, 8 + length)


def _parsed(text: bytes, where: str) -> dict[str, Any]:
    # Each tensor opens one object and two lists; this bounds the memory of a header made of brackets.
    if text.count(b"[") + text.count(b"{") > 4 * MAX_TENSORS:
        raise InputError(f"{where}: more than {MAX_TENSORS} tensors; split the file")
    if not text.startswith(b"{"):
        raise _damaged(where, "the header is not a JSON object")
    return strict_json.loads(text, where, max_bytes=len(text))


def _checked_metadata(metadata: Any, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise _damaged(where, f"{_METADATA} must map text to text, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            got = type(value).__name__
            raise _damaged(where, f"{_METADATA} must map text to text, got {got} at {quoted(repr(key))}")
    return metadata


def _checked_info(name: str, fields: Any, path: Path, where: str, base: int) -> TensorInfo:
    check_name(name, where)
    if not isinstance(fields, dict):
        raise _damaged(where, f"{quoted(name)}: wanted an object, got {type(fields).__name__}")
    if fields.keys() != _FIELDS:
        odd = f"unknown or missing field(s) {listed(sorted(fields.keys() ^ _FIELDS))}"
        raise _damaged(where, f"{quoted(name)}: {odd}, wanted dtype, shape, data_offsets")
    dtype = _check_dtype(fields["dtype"], name, where)
    shape = _check_shape(fields["shape"], name, where)
    start, stop = _check_offsets(fields["data_offsets"], name, where)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != nbytes:
        span = f"offsets [{start}, {stop}] hold {stop - start}"
        raise _damaged(where, f"{quoted(name)}: {dtype} of shape {list(shape)} needs {nbytes} bytes, {span}")
    return TensorInfo(name, dtype, shape, nbytes, base + start, base + stop, path)


def _check_dtype(dtype: Any, name: str, where: str) -> str:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        what = f"dtype {quoted(dtype, 40)} not supported for {quoted(name)}"
        raise InputError(f"{where}: {what}; convert it to one of {', '.join(DTYPES)}")
    return dtype


def _check_shape(shape: Any, name: str, where: str) -> tuple[int, ...]:
    if isinstance(shape, list) and len(shape) > MAX_RANK:
        why = f"rank {len(shape)}, at most {MAX_RANK} are read"
        raise InputError(f"{where}: {quoted(name)}: {why}; reshape the tensor")
    if not isinstance(shape, list) or not all(type(d) is int and 0 <= d <= MAX_DIM for d in shape):
        got = quoted(repr(shape))
        raise _damaged(where, f"{quoted(name)}: shape must be whole numbers from 0 to {MAX_DIM}, got {got}")
    if math.prod(max(d, 1) for d in shape) > _MAX_PRODUCT:
        raise _damaged(where, f"{quoted(name)}: shape {shape} has too many elements")
    return tuple(shape)


def _check_offsets(offsets: Any, name: str, where: str) -> tuple[int, int]:
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)
    if not pair or not 0 <= offsets[0] <= offsets[1]:
        got = quoted(repr(offsets))
        raise _damaged(where, f"{quoted(name)}: data_offsets must be two rising whole numbers, got {got}")
    return offsets[0], offsets[1]


def _check_coverage(infos: list[TensorInfo], base: int, size: int, where: str) -> None:
    """The tensors, sorted by offset, must tile the file from the end of the header to its last byte."""
    end = base
    for info in infos:
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            span = f"starts at {info.start - base}, wanted {end - base}"
            raise _damaged(where, f"{quoted(info.name)}: {what}: {span}")
        end = info.stop
    if end != size:
        raise _damaged(where, f"header and tensors cover {end} bytes, file has {size}")


def _allocate(info: TensorInfo) -> torch.Tensor:
    try:
        return torch.empty(info.nbytes, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as e:
        why = f"not enough memory for {info.nbytes} bytes; free some or use a larger machine"
        raise StorageError(f"{shown(info.file)}: {quoted(info.name)}: {why}") from e
