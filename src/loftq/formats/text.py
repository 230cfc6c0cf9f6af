"""Reading untrusted text files, with the same limits in every reader.

``strict_json`` and ``strict_yaml`` read through here. A small file can hang its reader or fill the memory: by what it
nests, by what it refers to again and again, by numbers of thousands of digits, or by being no file at all.
"""

from pathlib import Path

from loftq.errors import InputError, quoted
from loftq.formats.regular import open_regular, shown

MAX_BYTES = 64 << 20
LARGEST_POINTER = 1024  # bytes that git-lfs leaves
MAX_DEPTH = 100  # levels of nesting
MAX_VALUES = 2_000_000  # in one text
MAX_DIGITS = 100  # of a whole number: no size and no count has as many, and 309 are more than a float holds


def read(path: Path, kind: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of the regular file ``path``, whose size is checked before it is read.

    Args:
        kind: what it should hold, for the message.
    Raises: InputError for a longer file, and for a pipe or a device, which is not waited for; StorageError.
    """
    with open_regular(path) as file:
        check_size(file.stamp.size, shown(path), kind, max_bytes)
        raw = file.read_at(0, file.stamp.size)
    check_pointer(raw, path)
    return raw


def check_pointer(raw: bytes, path: Path) -> None:
    """InputError for what git leaves in the place of a large file that was not fetched."""
    if len(raw) <= LARGEST_POINTER and raw.startswith(b"version https://git-lfs"):
        raise InputError(f"{shown(path)}: a pointer of git-lfs, not the file; run `git lfs pull` in the directory")


def check_size(size: int, where: str, kind: str, max_bytes: int) -> None:
    """Refuse a text of more than ``max_bytes``."""
    if size > max_bytes:
        raise refused(where, f"{size} bytes of {kind}, at most {max_bytes} are read")


def too_deep(where: str) -> InputError:
    """The error for a text that is nested deeper than :data:`MAX_DEPTH`."""
    return refused(where, f"more than {MAX_DEPTH} levels of nesting")


def decoded(raw: bytes) -> str:
    """UTF-8 without a byte order mark. ValueError for anything else."""
    text = raw.decode("utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark at the start")
    return text


def whole(digits: str) -> int:
    """A whole number in decimal digits. ValueError if it has more than :data:`MAX_DIGITS`."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"number out of range: {quoted(digits, 40)}")
    return int(digits)


def refused(where: str, problem: str) -> InputError:
    """The error for a text that cannot be read."""
    return InputError(f"{where}: {problem}; repair the file or fetch it again")
