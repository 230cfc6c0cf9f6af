"""Regular files, opened without hanging and read without ``mmap``.

A file truncated while it is mapped kills the process; read by ``pread`` it gives an error with a name.
Nothing here changes the file system; what does is in ``fsio``. A file may stand here for an object of a store
(``formats/remote.py``): then the object is read.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from loftq.errors import InputError, StorageError, UsageError, option, quoted

CHUNK = 4 << 20
"""Bytes per read where a file is copied or hashed: large enough for full speed, small enough to forget."""

PARTIAL = ".loftq-partial"
"""Ending of the directory beside an output in which the work for it is collected."""

URL = re.compile(r"(?:[A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+:(?:/|$)")  # as pathlib leaves it: one slash or none
_NOT_REGULAR = (errno.ENXIO, errno.ENODEV, errno.EISDIR)
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

STAND_INS: "dict[Path, Callable[[FileStamp | None], RegularFile]]" = {}
"""Files that stand for objects of a store, and what opens the object."""

STAND_IN_DIRECTORIES: dict[Path, str] = {}
"""Directories that stand for those of a store -> their URLs."""


def url_of(path: PurePath | str) -> str | None:
    """A path that was given as a URL, or stands for an object of a store: the URL; None for all others."""
    if URL.match(str(path)) and not str(path).startswith("file:"):
        return re.sub(":(/+|$)", "://", str(path), count=1)
    for directory, url in STAND_IN_DIRECTORIES.items():
        if Path(path).is_relative_to(directory):
            return "/".join([url, *Path(path).relative_to(directory).parts])
    return None


def shown(path: PurePath) -> str:
    """``path`` for the head of a message: long enough to keep the file's own name."""
    return quoted(url_of(path) or path, 400)


def local_path(what: str, given: str | Path) -> Path:
    """A path that a user gave, its ``~`` expanded; of ``file:///a/b`` the path ``/a/b``.

    Args:
        what: the option that it came with.

    Raises: UsageError for an empty one, which would be the current directory; for another URL, which would be taken
        for a relative path; and for what no file can be called.
    """
    check_not_empty(what, given)
    given = re.sub("^file:/+", "/", str(given))
    if URL.match(given):
        raise UsageError(
            f"{what} {shown(Path(given))}: a URL, and only paths of this machine are read and written here; give a "
            "local or mounted one, and copy with the tools of that storage (a model of the hub is named org/name)"
        )
    path = Path(given).expanduser()
    _check_name(what, path)
    return path


def check_not_empty(what: str, given: object, wanted: str = "a path") -> None:
    """UsageError for an empty text, or for blanks: as a path they would be the current directory."""
    if not str(given).strip():
        raise UsageError(f"{what}: wanted {wanted}, got an empty text")


def output_path(given: str | Path) -> Path:
    """The real path of a directory to be made. UsageError if nothing can be called so, or work beside it."""
    path = local_path(option("output"), given)
    _check_name(option("output"), Path(f"{path}{PARTIAL}"))
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise UsageError(f"{option('output')} {shown(real)}: a link that leads to itself")
    return real


def _check_name(what: str, path: Path) -> None:
    try:
        str(path).encode()  # names go into files and to safetensors
        os.lstat(path)
    except UnicodeEncodeError as e:
        raise UsageError(f"{what} {quoted(path)}: the name is not UTF-8; rename the directory") from e
    except ValueError as e:  # NUL
        raise UsageError(f"{what} {quoted(path)}: no name of a file ({e})") from e
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{what} {quoted(path)}: the name is too long for this file system") from e


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What must stay the same while a run reads a file."""

    size: int
    mtime_ns: int
    inode: int
    version: str = ""  # of an object of a store, which has no time and no inode


@dataclass(frozen=True, slots=True)
class RegularFile:
    """An open regular file and its stamp at opening."""

    path: Path
    fd: int
    stamp: FileStamp

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes at ``offset``; short reads are continued."""
        filled = 0
        while filled < len(view):
            got = self._pread(offset + filled, view[filled:])
            if got == 0:
                raise changed(self.path)
            filled += got

    def read_at(self, offset: int, count: int) -> bytes:
        """The ``count`` bytes at ``offset``."""
        raw = bytearray(count)
        self.read_into(memoryview(raw), offset)
        return bytes(raw)

    def chunks(self, start: int, stop: int, size: int = CHUNK) -> Iterator[memoryview]:
        """The bytes ``start:stop`` in order, at most ``size`` at a time; each chunk is the caller's own."""
        while start < stop:
            view = memoryview(bytearray(min(size, stop - start)))
            self.read_into(view, start)
            yield view
            start += len(view)

    def stream(self) -> IO[bytes]:
        """The file from its beginning, for a reader that seeks; closing it leaves the file open."""
        return open(self.fd, "rb", closefd=False)

    def check_unchanged(self) -> None:
        """Refuse if size, time or inode are no longer those of the opening."""
        if _stamp(os.fstat(self.fd)) != self.stamp:
            raise changed(self.path)

    def _pread(self, offset: int, view: memoryview) -> int:
        try:
            return os.preadv(self.fd, [view], offset)
        except OSError as e:
            why = f"reading failed at byte {offset} ({e.strerror}); check the disk and run again"
            raise StorageError(f"{shown(self.path)}: {why}") from e


@contextlib.contextmanager
def open_regular(path: Path, expected: FileStamp | None = None) -> Iterator[RegularFile]:
    """Open ``path`` for reading; it must be a regular file and must not change before the block ends.

    Args:
        expected: the stamp of an earlier opening, which the file must still have.
    Raises:
        InputError: no such file, not a regular file (a FIFO is refused, not waited for), changed.
        StorageError: permission, or too many open files.
    """
    if path in STAND_INS:
        file = STAND_INS[path](expected)
        yield file
        file.check_unchanged()
        return
    fd = _open(path)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(path)
        file = RegularFile(path, fd, _stamp(status))
        if expected is not None and file.stamp != expected:
            raise changed(path)
        yield file
        file.check_unchanged()
    finally:
        os.close(fd)


def state(path: Path) -> dict[str, Any]:
    """What tells that a file was changed: its size and time, or of an object of a store its size and version."""
    if path in STAND_INS:
        stamp = STAND_INS[path](None).stamp
        return {"size": stamp.size, "version": stamp.version}
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _open(path: Path) -> int:
    try:
        return os.open(path, _FLAGS)
    except FileNotFoundError as e:
        raise InputError(f"{shown(path)}: no such file; check the path") from e
    except OSError as e:
        if e.errno in _NOT_REGULAR:
            raise _not_regular(path) from e
        if e.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise InputError(f"{shown(path)}: cannot be opened ({e.strerror}); check the path") from e
        raise StorageError(f"{shown(path)}: cannot be read ({e.strerror}); check its permissions") from e


def _stamp(status: os.stat_result) -> FileStamp:
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ino)


def _not_regular(path: Path) -> InputError:
    return InputError(f"{shown(path)}: not a regular file; name a file, not a directory, pipe or device")


def changed(path: Path) -> InputError:
    """The error for a file that became another while it was read."""
    return InputError(f"{shown(path)}: source changed while reading; leave it alone and run again")
