"""PyTorch ``.bin`` files: the only place that unpickles, and only what cannot run code.

``torch.load(weights_only=True)`` is one wall, not the only one: before it the zip directory is checked (so
the file cannot expand beyond its own size), after it only plain dense CPU tensors with sound strides pass.
There is no fallback. Known limit: PyTorch takes many seconds over a pickle of millions of tiny instructions.
"""

import logging
import math
import re
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch.torch_version import TorchVersion

from loftq.errors import InputError, StorageError, UsageError, quoted
from loftq.formats.regular import CHUNK, FileStamp, RegularFile, open_regular, shown
from loftq.formats.tensorfile import DTYPES, check_name

logger = logging.getLogger("loftq")

MAX_RECORDS = 300_000
MAX_PICKLE_BYTES = 64 << 20

_TORCH_FLOOR = "2.10"
_ADVICE = "convert it to safetensors where you trust it"
_ENCRYPTED = 0x1
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|function ([\w.]+)|Can not set ([\w.]+)|instantiate ([\w.]+)")


def read_pickle_tensors(
    path: Path, max_bytes: int | None = None, expected: FileStamp | None = None, *, checked: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of one ``.bin`` file, dense, contiguous, on the CPU.

    Args:
        max_bytes: larger files are refused unread.
        expected: the stamp of an earlier opening, which the file must still have.
        checked: whether that opening compared the records with their checksums, which is not done again then.
    Raises:
        InputError: a record that is not what its CRC-32 says; not a plain PyTorch zip archive, or anything in it but
            ``name -> tensor`` (one level of ``state_dict`` is looked through).
        UsageError: PyTorch older than 2.10, whose restricted unpickler has a known hole (CVE-2026-24747).
    """
    _check_torch()
    where = shown(path)
    with open_regular(path, expected) as file:
        if max_bytes is not None and file.stamp.size > max_bytes:
            raise _refused(where, f"file has {file.stamp.size} bytes, at most {max_bytes} are read")
        with file.stream() as stream:
            stored = _check_archive(file, stream, where, checked)
            stream.seek(0)
            loaded = _loaded(stream, where)
    found = _named_tensors(loaded, where)
    _check_storages(list(found.values()), stored, where)
    logger.warning("%s: a pickle; safetensors is safer and faster, convert it when you can", where)
    return {name: _plain(tensor) for name, tensor in found.items()}


def _check_torch() -> None:
    if TorchVersion(torch.__version__) < _TORCH_FLOOR:
        need = "reading .bin files needs torch 2.10 or newer (CVE-2026-24747)"
        raise UsageError(f"{need}, this is {torch.__version__}; upgrade torch or {_ADVICE}")


def _refused(where: str, problem: str) -> InputError:
    return InputError(f"{where}: {problem}; {_ADVICE}")


def _check_archive(file: RegularFile, stream: IO[bytes], where: str, checked: bool) -> int:
    """Check the zip directory against the file, and the records; the bytes that its tensor records hold."""
    if not file.stamp.size:
        raise InputError(f"{where}: an empty file; fetch it again")
    if file.stamp.size < 4 or file.read_at(0, 4) != b"PK\x03\x04":
        raise _refused(where, "not a PyTorch zip archive (a legacy or raw pickle, a tar, or no checkpoint)")
    try:
        with zipfile.ZipFile(stream) as archive:
            members, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, EOFError) as e:
        raise InputError(
            f"{where}: not a sound zip archive, or one cut short ({quoted(e)}); fetch the file again"
        ) from e
    if file.read_at(file.stamp.size - 22, 6) != b"PK\x05\x06\0\0":
        raise _refused(where, "bytes after the end of the zip archive")
    if len(members) > MAX_RECORDS:
        raise _refused(where, f"{len(members)} zip records, at most {MAX_RECORDS} are read")
    _check_names([member.filename for member in members], where)
    for member in members:
        _check_member(member, where)
    starts = _check_spans(file, members, end, where)
    if not checked:
        _check_sums(file, members, starts, where)
    return sum(member.file_size for member in members if "/data/" in member.filename)


def _check_names(names: list[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _refused(where, f"duplicate zip record {quoted(name)}")
        seen.add(name)
        inner = name.partition("/")[2]
        if inner == "constants.pkl" or inner.startswith("code/"):
            raise _refused(where, f"a TorchScript archive, which holds code (record {quoted(name)})")
    if sum(name.endswith("/data.pkl") for name in names) != 1:
        raise _refused(where, "wanted exactly one record data.pkl in the zip archive")


def _check_member(member: zipfile.ZipInfo, where: str) -> None:
    name = quoted(member.filename)
    if member.flag_bits & _ENCRYPTED:
        raise _refused(where, f"encrypted zip record {name}")
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        sizes = f"{member.compress_size} bytes expand to {member.file_size}"
        raise _refused(where, f"compressed zip record {name} ({sizes}), PyTorch stores them plain")
    if member.filename.endswith("/data.pkl") and member.file_size > MAX_PICKLE_BYTES:
        raise _refused(where, f"{name} has {member.file_size} bytes, at most {MAX_PICKLE_BYTES} are read")


def _check_spans(file: RegularFile, members: list[zipfile.ZipInfo], end: int, where: str) -> dict[str, int]:
    """Records must lie one after the other from byte 0, under the directory's names and before it; their starts."""
    position, starts = 0, {}
    members = sorted(members, key=lambda m: m.header_offset)
    if members[0].header_offset:
        raise _refused(where, f"{members[0].header_offset} bytes before the zip archive")
    for member in members:
        start, name = member.header_offset, quoted(member.filename)
        if start < position or start + 30 > end:
            raise _refused(where, f"zip record {name} overlaps another or leaves the file")
        local = file.read_at(start, 30)
        name_size, extra_size = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
        position = start + 30 + name_size + extra_size + member.file_size
        if local[:4] != b"PK\x03\x04" or position > end:
            raise _refused(where, f"zip record {name} overlaps another or leaves the file")
        if file.read_at(start + 30, name_size) != member.orig_filename.encode():
            raise _refused(where, f"zip record {name} has another name in its own header")
        starts[member.filename] = position - member.file_size
    return starts


def _check_sums(file: RegularFile, members: list[zipfile.ZipInfo], starts: dict[str, int], where: str) -> None:
    """Compare every record with its CRC-32, which PyTorch does not do; a file may have been saved without any."""
    if not any(member.CRC for member in members):
        logger.warning("%s: saved without checksums; damage in it cannot be noticed", where)
        return
    buffer = memoryview(bytearray(min(CHUNK, max(member.file_size for member in members))))
    for member in members:
        found, position, stop = 0, starts[member.filename], starts[member.filename] + member.file_size
        while position < stop:
            part = buffer[: min(len(buffer), stop - position)]
            file.read_into(part, position)
            found, position = zlib.crc32(part, found), position + len(part)
        if found != member.CRC:
            sums = f"its CRC-32 is {found:08x}, the archive says {member.CRC:08x}"
            raise InputError(f"{where}: zip record {quoted(member.filename)} is damaged: {sums}; fetch the file again")


def _loaded(stream: IO[bytes], where: str) -> Any:
    try:
        return torch.load(stream, map_location="cpu", weights_only=True, mmap=False)
    except MemoryError as e:
        raise StorageError(f"{where}: not enough memory to load it; free some or use a larger machine") from e
    except OSError as e:
        raise StorageError(f"{where}: reading failed ({e.strerror or quoted(e)}); check the disk") from e
    except Exception as e:
        raise _refused(where, _why_refused(e)) from e


def _why_refused(e: Exception) -> str:
    """PyTorch's refusal in a few words; its own message runs over many lines and advises to switch it off."""
    text = str(e)
    named = _GLOBAL.search(text)
    if named and "eights only" in text:
        name = next(group for group in named.groups() if group)
        return f"the pickle calls {quoted(name.rstrip('.'))}, which is more than tensors"
    reason = text.partition("WeightsUnpickler error: ")[2].partition("Check the documentation")[0] or text
    return f"PyTorch refuses it ({type(e).__name__}: {quoted(' '.join(reason.split()))})"


def _named_tensors(loaded: Any, where: str) -> dict[str, torch.Tensor]:
    prefix, named = "", _entries(loaded, where)
    if list(named) == ["state_dict"]:
        prefix, named = "state_dict.", _entries(named["state_dict"], where)
    found = {}
    for key, value in named.items():
        if type(key) is not str:
            got = type(key).__name__
            raise _refused(where, f"{prefix}{quoted(repr(key))}: wanted text as key, got {got}")
        check_name(key, where)
        if isinstance(value, dict):
            raise InputError(
                f"{where}: {quoted(prefix + key)}: wanted a tensor, got a dict of {dict.__len__(value)}; if it holds "
                "the weights, save it alone: torch.save of that dict, or save_pretrained of a model that has loaded it"
            )
        tensor = _bare(value)
        problem = quoted(type(value).__name__) if tensor is None else _problem(tensor)
        if problem:
            raise _refused(where, f"{quoted(prefix + key)}: wanted a plain dense CPU tensor, got {problem}")
        found[key] = tensor
    return found


def _entries(loaded: Any, where: str) -> dict[Any, Any]:
    """The entries of a dict, by the methods of ``dict``: a pickle can hang other ones on an OrderedDict."""
    if type(loaded) not in (dict, OrderedDict):
        raise _refused(where, f"wanted a dict of tensors, got {quoted(type(loaded).__name__)}")
    return dict(dict.items(loaded))


def _bare(value: Any) -> torch.Tensor | None:
    """A tensor without the attributes that a pickle can hang on it; None for anything else."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return None
    return torch.Tensor.detach(value)


def _problem(value: torch.Tensor) -> str | None:
    """Why ``value`` is not a plain dense CPU tensor."""
    if value.layout is not torch.strided or value.is_nested:
        return "a sparse or nested tensor"
    if value.device.type != "cpu":
        return f"a tensor on {value.device.type}"
    if value.is_quantized or value.dtype not in DTYPES.values():
        return f"dtype {value.dtype}"
    if value.is_neg() or value.is_conj():
        return "a lazily negated tensor"
    return _stride_problem(value)


def _stride_problem(value: torch.Tensor) -> str | None:
    """Elements must lie inside the storage, no two on one place (else a small file grows without bound)."""
    if value.numel() == 0:
        return None
    last = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= last:
            return f"overlapping strides {tuple(value.stride())}"
        last += (size - 1) * stride
    held = value.untyped_storage().nbytes() // value.itemsize
    if value.storage_offset() + last >= held:
        return f"a view of element {value.storage_offset() + last} in a storage of {held}"
    return None


def _check_storages(tensors: list[torch.Tensor], stored: int, where: str) -> None:
    """All memory must come from the file's records, and unpacking views must not multiply it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    if sum(storages.values()) > stored:
        raise _refused(where, f"tensors of {sum(storages.values())} bytes, the file stores {stored}")
    copied = sum(math.prod(t.shape) * t.itemsize for t in tensors if not _owns_storage(t))
    if copied > 2 * stored:
        raise _refused(where, f"views that expand to {copied} bytes, the file stores {stored}")


def _owns_storage(t: torch.Tensor) -> bool:
    return t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * t.itemsize


def _plain(t: torch.Tensor) -> torch.Tensor:
    return t if _owns_storage(t) else t.clone(memory_format=torch.contiguous_format)
