"""Every change that loftq makes to the file system.

One module, so that a test can fail, kill or cut off power at each primitive: ``step`` is called just before
it and ``done`` just after. A file is written beside its place, synced and renamed over it: under its name it
is absent, old or complete, never torn. A failed fsync is never retried, because the kernel may have dropped
the pages and report success the second time.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.errors import ConflictError, StorageError, option, quoted
from loftq.formats import strict_json
from loftq.formats.regular import RegularFile, open_regular, shown

logger = logging.getLogger("loftq")

TRIES = 10  # to remove a directory that others use

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_IN_USE = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
_CURES = {
    errno.EEXIST: "move it away or choose another {output}",
    errno.EISDIR: "move it away or choose another {output}",
    errno.ENOTDIR: "a file stands where a directory is needed; choose another {output}",
    errno.ENOTEMPTY: "move it away or choose another {output}",
    errno.ENOENT: "its directory does not exist or was removed; create it and run again",
    errno.ENAMETOOLONG: "choose a shorter {output}",
    errno.EXDEV: "both must be on one file system; choose another {output}",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another {output}",
}


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Length and SHA-256 (hexadecimal) of a file's bytes."""

    size: int
    sha256: str


def step(op: str, path: Path) -> None:
    """Called just before each primitive; does nothing. Tests replace it.

    Args:
        op: create, open, write, fsync, rename, link, mkdir, unlink, fsync-dir or rmtree.
        path: what is changed; for rename and link the destination.
    """


def done(op: str, path: Path) -> None:
    """Called just after each primitive that succeeded; does nothing. Tests replace it."""


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
    """Put the bytes of ``chunks`` at ``path``, whole or not at all, and durably.

    An error of ``chunks`` itself passes through unchanged. Whatever goes wrong, the temporary sibling is
    removed; after a kill it stays and is named ``.{name}.{random}.tmp``.

    Raises: StorageError naming ``path`` and what to do, also for a device, pipe or link there, which is not replaced.
    """
    check_replaceable(path)
    temporary, fd = _temporary(path)
    try:
        digest = _fill(fd, chunks, temporary, path)
        with _mutation("rename", path):
            os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError), _mutation("unlink", temporary):
            os.unlink(temporary)
        raise
    _sync_directory(path.parent)
    return digest


def create(path: Path, chunks: Iterable[bytes | memoryview]) -> bool:
    """Put the bytes of ``chunks`` at ``path``, whole and durably, unless something is there; whether it was done.

    Of several processes at once, on any machines, the first one wins: a link is made, which no file system lets replace
    another. One without links gets a rename after a look: of two at the very same moment the last one stays, and
    both are told that they won.

    Raises: StorageError, as :func:`write_atomic`.
    """
    if os.path.lexists(path):
        return False
    temporary, fd = _temporary(path)
    try:
        _fill(fd, chunks, temporary, path)
        won = _link(temporary, path)
    finally:
        with _mutation("unlink", temporary, path):
            temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)
    return won


def place(src: Path, dst: Path) -> None:
    """Give the file ``src`` a second name, durably; where there are no links, a copy has it."""
    try:
        with _mutation("link", dst):
            os.link(src, dst)
    except StorageError as e:
        if _errno(e) not in _NO_LINKS:
            raise
        copy_file(src, dst)
    else:
        _sync_directory(dst.parent)


def _temporary(path: Path) -> tuple[Path, int]:
    """A new file beside ``path``, and its descriptor."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with _mutation("create", temporary, path):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    return temporary, fd


def _link(temporary: Path, path: Path) -> bool:
    try:
        with _mutation("link", path):
            os.link(temporary, path)
    except StorageError as e:
        if _errno(e) == errno.EEXIST:  # NFS says so too where its first answer was lost, and counts two names
            return os.stat(temporary).st_nlink > 1
        if _errno(e) not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            return False
        with _mutation("rename", path):
            os.rename(temporary, path)
    return True


def _errno(error: StorageError) -> int | None:
    return error.__cause__.errno if isinstance(error.__cause__, OSError) else None


def check_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of what is none: root's rename would take a device away from everybody.

    A directory is left to the rename, which cannot replace it.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # nothing there, or the writing will say what it is
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a device, pipe or socket"
        raise StorageError(f"{shown(path)}: {what}, which is not replaced by a file; choose another name")


def append(path: Path, raw: bytes) -> None:
    """Put ``raw`` at the end of the file ``path``, durably. After a kill a part of it may be there."""
    with _mutation("open", path):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    _fill(fd, [raw], path, path)


def write_json(path: Path, obj: Any) -> FileDigest:
    """``obj`` as strict, deterministic JSON at ``path``, atomically."""
    return write_atomic(path, [strict_json.dumps(obj)])


def copy_file(src: Path, dst: Path) -> FileDigest:
    """The bytes of the regular file ``src`` at ``dst``, atomically; mode and times are not copied."""
    with open_regular(src) as file:
        return write_atomic(dst, _checked_chunks(file))


def sha256_file(path: Path) -> FileDigest:
    """Length and SHA-256 of the regular file ``path``, which must not change meanwhile."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for chunk in file.chunks(0, file.stamp.size):
            digest.update(chunk)
        return FileDigest(file.stamp.size, digest.hexdigest())


def make_dirs(path: Path) -> None:
    """Create ``path`` and its missing parents, each synced into its parent; an existing directory is fine."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        if path.parent == path:
            break
        path = path.parent
    for directory in reversed(missing):
        with _mutation("mkdir", directory):
            _make_directory(directory)
        _sync_directory(directory.parent)


def make_private(path: Path) -> None:
    """Create the directory ``path`` for this user alone; StorageError if it is there and another's."""
    with _mutation("mkdir", path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StorageError(f"{shown(path)}: not a directory of this user alone; remove it, or set TMPDIR to another")


def write_hole(path: Path, size: int) -> None:
    """A file of ``size`` bytes without content at ``path``, which takes no space."""
    with _mutation("create", path), open(path, "wb") as file:
        os.ftruncate(file.fileno(), size)


def rename(src: Path, dst: Path) -> None:
    """Rename a file or directory and sync the directories it leaves and enters."""
    with _mutation("rename", dst):
        os.rename(src, dst)
    _sync_directory(dst.parent)
    if src.parent != dst.parent:
        _sync_directory(src.parent)


def remove(path: Path) -> None:
    """Remove a file or symbolic link, durably; an absent one is fine."""
    with _mutation("unlink", path):
        path.unlink(missing_ok=True)
    if path.parent.is_dir():
        _sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it, durably; links are not followed, an absent one is fine.

    Other processes may remove it too, or still write into it, for some tries.
    """
    if not os.path.lexists(path):
        return
    with _mutation("rmtree", path):
        for tries in range(TRIES, 0, -1):
            try:
                shutil.rmtree(path)
            except OSError as e:
                if e.errno not in _IN_USE or tries == 1:
                    raise
            if not os.path.lexists(path):
                break
    if path.parent.is_dir():
        _sync_directory(path.parent)


class DirectoryLock:
    """Keeps a second process out of a directory while the first works on it.

    ``path`` is the lock file; with ``wait`` the second process waits for the first, instead of being refused. The
    kernel drops the lock when the holder and its forked children end, however they end, so there are no stale locks;
    the file itself is removed on leaving. Best effort: some network file systems have no locks or only pretend, and
    correctness never rests on it.

    Raises: ConflictError naming process and host of the holder.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self.path, self.wait = path, wait
        self._fd: int | None = None

    def __enter__(self) -> "DirectoryLock":
        while self._fd is None:
            fd = self._open()
            try:
                self._take(fd)
                if self._is_current(fd):
                    self._sign(fd)
                    self._fd = fd
            finally:
                if self._fd is None:
                    os.close(fd)
        return self

    def __exit__(self, *exception: object) -> None:
        fd, self._fd = self._fd, None
        assert fd is not None, "left without having been entered"
        try:
            if self._is_current(fd):
                with contextlib.suppress(OSError), _mutation("unlink", self.path):
                    os.unlink(self.path)
        finally:
            os.close(fd)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with _mutation("create", self.path):
            fd = os.open(self.path, flags, 0o666)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StorageError(f"{shown(self.path)}: not a regular file; remove it, the lock goes there")
        return fd

    def _take(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if self.wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            why = f"in use by {_holder(fd)}; wait for it or choose another {option('output')}"
            raise ConflictError(f"{shown(self.path)}: {why}") from e
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise StorageError(_explained("lock", self.path, e)) from e
            logger.warning("%s: this file system has no locks; run one process at a time", shown(self.path))

    def _is_current(self, fd: int) -> bool:
        """Whether the file we hold is still the one under the name (the last holder may have removed it)."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _sign(self, fd: int) -> None:
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n"
        with _mutation("write", self.path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, text.encode(), 0)


def _holder(fd: int) -> str:
    """Who signed the lock file; it may be empty, as the holder signs just after it has the lock."""
    try:
        signed = json.loads(os.pread(fd, 4096, 0))
        return f"process {int(signed['pid'])} on {quoted(signed['host'])}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "another process"


def _fill(fd: int, chunks: Iterable[bytes | memoryview], temporary: Path, path: Path) -> FileDigest:
    """Write, hash and sync ``chunks``; closes ``fd`` whatever happens."""
    try:
        digest, size = hashlib.sha256(), 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            size += len(view)
            while view:
                with _mutation("write", temporary, path):
                    written = os.write(fd, view)
                view = view[written:]
            del chunk, view  # before the next is made: of two large tensors one is in memory
        with _mutation("fsync", temporary, path):
            os.fsync(fd)
        return FileDigest(size, digest.hexdigest())
    finally:
        os.close(fd)


def _checked_chunks(file: RegularFile) -> Iterator[memoryview]:
    """All bytes of an open file; a change is noticed before the copy gets its name."""
    yield from file.chunks(0, file.stamp.size)
    file.check_unchanged()


def _make_directory(directory: Path) -> None:
    try:
        os.mkdir(directory)
    except FileExistsError:
        if not directory.is_dir():
            raise


def _sync_directory(directory: Path) -> None:
    with _mutation("fsync-dir", directory):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as e:
            if e.errno not in _NO_DIRECTORY_SYNC:
                raise
        finally:
            os.close(fd)


@contextlib.contextmanager
def _mutation(op: str, path: Path, blamed: Path | None = None) -> Iterator[None]:
    """One primitive between ``step`` and ``done``; its OSError becomes a StorageError naming ``blamed``."""
    try:
        step(op, path)
        yield
        done(op, path)
    except OSError as e:
        raise StorageError(_explained(op, blamed or path, e)) from e


def _explained(op: str, path: Path, e: OSError) -> str:
    where, why = shown(path), e.strerror or str(e)
    if e.errno in _NO_SPACE:
        return f"{where}: no space left ({why}); free some space and run the same command again to continue"
    if e.errno in _NOT_WRITABLE:
        return f"{where}: not writable ({why}); choose another {option('output')}"
    cure = _CURES.get(e.errno or 0, "check the disk, then run the same command again to continue")
    return f"{where}: {op} failed ({why}); {cure.format(output=option('output'))}"
