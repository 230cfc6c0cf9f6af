"""Directories of a store: what fsspec opens, such as ``s3://bucket/name``, ``gs://…``, ``hf://org/name``.

A directory there gets a stand-in here: the same names, of files with the same sizes and no content, which take no
space. :func:`loftq.formats.regular.open_regular` knows them and reads the object, in ranges, so every reader of ours
works on a store as on a disk. A reader of another library needs the content: :func:`fill` fetches the small files.

An object is known by its version, which the store gives: its ETag, or a time where it has nothing better.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from loftq.errors import InputError, LoftqError, StorageError, UsageError, first_line, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.belongings import LARGEST, reason_to_leave
from loftq.formats.config import MANIFEST
from loftq.formats.regular import (
    STAND_IN_DIRECTORIES,
    STAND_INS,
    FileStamp,
    RegularFile,
    changed,
    local_path,
    url_of,
)

RANGE = 32 << 20  # bytes of one request, and of memory for it
MOST_OBJECTS = 10_000
DEEPEST = 5  # directories that are looked into
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# what stores call the version of an object; the first that there is tells
_VERSIONS = ("etag", "generation", "blobid", "md5hash", "contentmd5", "checksum")
_TIMES = ("lastmodified", "mtime", "modified", "updated", "created")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDICES = tuple(f"{name}.index.json" for name in _WEIGHTS)
_NEVER_ALONE = ("config.json", MANIFEST, *_WEIGHTS, *_INDICES)  # asked for by name: a listing may be late


@dataclass(frozen=True)
class Object:
    """Size and version of an object; equal only if it is the same one."""

    size: int
    version: str

    @property
    def stamp(self) -> FileStamp:
        return FileStamp(self.size, 0, 0, self.version)


class Store:
    """A directory of a store.

    Attributes:
        url: as it may stand in a message: it never holds a password or a key.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs, self.root = _file_system(self.url)

    def __truediv__(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{name}" if name else self.url

    def objects(self) -> dict[str, Object]:
        """Everything in it that a file can be called, by its name. A listing may be late: see :meth:`look`."""
        with self._asking("list", ""):
            self.fs.invalidate_cache()
            files = list(itertools.islice(self._files(self.root, DEEPEST), MOST_OBJECTS + 1))
        if len(files) > MOST_OBJECTS:
            raise InputError(
                f"{self.url}: more than the {MOST_OBJECTS} objects that a model has at most; name its directory"
            )
        named = {info["name"].removeprefix(self.root).strip("/"): info for info in files}
        return {name: _object(named[name]) for name in sorted(named) if _is_plain(name) and not _inside(name, named)}

    def _files(self, directory: str, depth: int) -> Iterator[dict[str, Any]]:
        """What a store says of every file below a directory; fsspec's ``find`` leaves out what it fails to list."""
        try:
            listed = self.fs.ls(directory, detail=True)
        except FileNotFoundError:  # nothing there, or not any more
            return
        for info in listed:
            if info.get("type") == "file":
                yield info
            elif info.get("type") == "directory" and depth > 1 and info["name"].strip("/") != directory.strip("/"):
                yield from self._files(info["name"], depth - 1)

    def look(self, name: str) -> Object | None:
        """What is there under a name, asked of the store itself; None if there is nothing."""
        with self._asking("look", name):
            self.fs.invalidate_cache(self._path(name))
            try:
                info = self.fs.info(self._path(name))
            except FileNotFoundError:
                return None
        return _object(info) if info["type"] == "file" else None

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Some bytes of an object, by one request."""
        with self._asking("get", name):
            return self.fs.cat_file(self._path(name), start=start, end=stop)

    def put(self, local: Path, name: str) -> Object:
        """The bytes of a file under a name: the object is the old one until the new one is whole.

        Raises: StorageError if the store has another size than the file afterwards.
        """
        with self._asking("put", name):
            self.fs.put_file(str(local), self._path(name))
        there = self.look(name)
        if there is None or there.size != local.stat().st_size:
            size = "nothing" if there is None else f"{there.size} bytes"
            raise StorageError(f"{self / name}: {size} there after {local.stat().st_size} were sent; run it again")
        return there

    def remove(self, names: Iterable[str]) -> None:
        """Take objects away; what is not there is fine."""
        for name in names:
            with self._asking("remove", name), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._path(name))

    def open(self, name: str, path: Path, expected: FileStamp | None = None) -> "RemoteFile":
        """An object to be read as a file.

        Args:
            path: what stands for it.
            expected: what it has to be, which is asked after reading; without it the store is asked before.
        """
        if expected is None:
            there = self.look(name)
            if there is None:
                raise InputError(f"{self / name}: no such object; check the URL")
            expected = there.stamp
        return RemoteFile(path, -1, expected, self, name)

    def stand_in(self, name: str, path: Path, there: Object) -> None:
        """From now on ``path`` stands for an object: whatever is read of it comes from the store."""
        fsio.make_dirs(path.parent)
        if not path.is_file() or path.stat().st_size != there.size:
            fsio.write_hole(path, there.size)
        STAND_INS[path] = functools.partial(self.open, name, path)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextlib.contextmanager
    def _asking(self, op: str, name: str) -> Iterator[None]:
        """One request, between ``fsio.step`` and ``fsio.done``. What a store can answer becomes one line."""
        where = self / name
        try:
            fsio.step(op, Path(where))
            yield
            fsio.done(op, Path(where))
        except LoftqError:
            raise
        except FileNotFoundError as e:
            raise InputError(f"{where}: no such object, bucket or repository; check the URL") from e
        except PermissionError as e:
            cure = "check what this account may do there, and the credentials in the environment"
            raise StorageError(f"{where}: {op} was refused ({reason(e)}); {cure}") from e
        except Exception as e:  # the many ways in which a network or a store says no
            cure = "check network and credentials, then run the same command again to continue"
            raise StorageError(f"{where}: {op} failed ({reason(e)}); {cure}") from e


@dataclass(frozen=True, slots=True)
class RemoteFile(RegularFile):
    """An object, read in ranges of at most :data:`RANGE` bytes."""

    store: Store
    name: str

    def _pread(self, offset: int, view: memoryview) -> int:
        try:
            got = self.store.read(self.name, offset, offset + min(len(view), RANGE))
        except (InputError, StorageError):
            self.check_unchanged()  # one that is gone, or shorter, has no such range
            raise
        view[: len(got)] = got
        return len(got)

    def chunks(self, start: int, stop: int, size: int = RANGE) -> Iterator[memoryview]:
        yield from RegularFile.chunks(self, start, stop, max(size, RANGE))

    def stream(self) -> IO[bytes]:
        return io.BufferedReader(_Seekable(self), 1 << 20)

    def check_unchanged(self) -> None:
        there = self.store.look(self.name)
        if there is None or there.stamp != self.stamp:
            raise changed(self.path)


class _Seekable(io.RawIOBase):
    """A file with a position, for readers that want one."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.stamp.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._file.stamp.size - self._at))]
        self._file.read_into(view, self._at)
        self._at += len(view)
        return len(view)


def directory_of(what: str, given: str | Path) -> Path:
    """The directory that a user gave: a path of this machine, or what stands for a directory of a store.

    Args:
        what: the option that it came with.
    """
    return mounted(store(what, given)) if url_of(given) else local_path(what, given)


@functools.lru_cache(maxsize=64)
def _opened(url: str) -> Store:
    return Store(url)


def store(what: str, given: str | Path) -> Store:
    """The directory of a store that a URL names. UsageError if it holds a password, or fsspec does not know it."""
    url = url_of(given)
    assert url is not None, given
    scheme, _, rest = url.partition("://")
    user, _, host = rest.partition("/")[0].rpartition("@")
    if ":" in user or "?" in rest or "#" in rest:
        bare = f"{scheme}://{host}/…"
        raise UsageError(
            f"{what} {quoted(bare)}: a URL with more than a place in it; leave user, keys and `?…` out: credentials "
            "come from the environment or the configuration of that store's own tools"
        )
    if scheme not in _known_schemes():
        local_path(what, given)  # says that it is a URL
    if not _is_plain(rest.strip("/")):
        raise UsageError(f"{what} {quoted(url)}: names no directory; wanted {scheme}://place/name")
    return _opened(url)


def mounted(store: Store, directory: Path | None = None) -> Path:
    """A directory here that stands for the one of a store, with what is in it now.

    Args:
        directory: where; by default one that is always the same for the same objects.

    Raises: InputError if nothing is there.
    """
    found = store.objects()
    for name in _NEVER_ALONE:
        _complete(found, store, [name])
    for name in (*_INDICES, MANIFEST):
        if name in found:
            _complete(found, store, _names_in(store, name, found[name]))
    if not found:
        raise InputError(f"{store.url}: nothing there; check the URL")
    listing = json.dumps([store.url, *((n, o.size, o.version) for n, o in sorted(found.items()))])
    directory = directory or scratch(listing) / (store.url.rpartition("/")[2] or "model")
    for name, there in found.items():
        store.stand_in(name, directory / name, there)
    STAND_IN_DIRECTORIES[directory] = store.url
    return directory


def fill(directory: Path) -> Path:
    """Fetch the small files of a directory that stands for one of a store, for readers of other libraries."""
    for path in [path for path in STAND_INS if directory in path.parents]:
        if path.stat().st_size <= LARGEST and not reason_to_leave(path.name):
            fsio.copy_file(path, path)
    return directory


def scratch(key: str) -> Path:
    """A directory of this machine and this user, below ``TMPDIR``, the same for the same key: work that was stopped is
    found again."""
    private = Path(os.path.realpath(tempfile.gettempdir())) / f"loftq-{os.getuid()}"
    fsio.make_private(private)
    directory = private / hashlib.sha256(key.encode()).hexdigest()[:24]
    fsio.make_dirs(directory)
    return directory


def _complete(found: dict[str, Object], store: Store, names: Iterable[str]) -> None:
    """Ask for names that the listing has not, and put those that are there into it."""
    for name in names:
        if name not in found and _is_plain(name) and not _inside(name, found):
            there = store.look(name)
            if there is not None:
                found[name] = there


def _names_in(store: Store, name: str, there: Object) -> list[str]:
    """The files that an index or a manifest names; whoever reads it in earnest will say what is wrong with it."""
    try:
        raw = store.read(name, 0, there.size) if there.size <= LARGEST else b"{}"
        listed = strict_json.loads(raw, store / name)
        names = listed["files"] if name == MANIFEST else listed["weight_map"].values()
        return [n for n in {*names} if isinstance(n, str)]
    except (InputError, AttributeError, KeyError, TypeError):
        return []


def _is_plain(name: str) -> bool:
    """Whether a file below a directory can have this name: nothing that leads out of it."""
    return name.isprintable() and all(p not in ("", ".", "..") and len(p.encode()) <= 255 for p in name.split("/"))


def _inside(name: str, others: Iterable[str]) -> bool:
    """Whether one of the others would have to be both a file and a directory that holds this one."""
    return any(str(parent) in others for parent in PurePosixPath(name).parents)


def _object(info: dict[str, Any]) -> Object:
    said = {re.sub("[^a-z0-9]", "", key.lower()): value for key, value in info.items()}
    versions = (str(said[key]).strip('"') for key in (*_VERSIONS, *_TIMES) if said.get(key))
    return Object(int(info["size"] or 0), next(versions, ""))


def _known_schemes() -> list[str]:
    import fsspec

    return sorted({*fsspec.available_protocols(), *fsspec.registry} - {"file", "local"})


def _file_system(url: str) -> tuple[Any, str]:
    """What fsspec opens for a URL, without a cache of listings, and the path in it."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as e:
        cure = f"pip install 'loftq[{EXTRAS[scheme]}]'" if scheme in EXTRAS else first_line(e)
        raise UsageError(f"{quoted(url)}: {scheme}:// needs a package that is not installed: {cure}") from e
    except Exception as e:
        raise StorageError(f"{quoted(url)}: cannot be opened ({reason(e)}); check its configuration") from e
    return fs, str(root).rstrip("/")


def reason(e: BaseException) -> str:
    """What another library says, without what may be a key: users and signatures in URLs."""
    return re.sub(r"(\w://)[^\s/@]*@|\?[^\s\"')]+", r"\1", first_line(e))
