"""A result in a store: units are made in a scratch directory of this machine, and go there one by one.

The store has no rename, so it gets the files in an order: shards as they are finished, then all else, then the index
and ``config.json``, without which no loader takes the directory for a model. The manifest, last, is the commit.

What is needed to continue, on this machine or another, lies in ``OUTPUT/.loftq-partial``: the identity of the work, a
record of every unit, its part of the adapter. It is removed after the commit.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loftq.checkpoint.manifest import MANIFEST
from loftq.checkpoint.shards import Unit, Workspace
from loftq.errors import InputError, StorageError
from loftq.formats import fsio, hashed_json, strict_json
from loftq.formats.regular import PARTIAL, STAND_IN_DIRECTORIES
from loftq.formats.remote import Object, Store, mounted, scratch

MODEL = ("model.safetensors.index.json", "config.json")  # without them no loader takes a directory for a model
_IDENTITY, _REPLACED = f"{PARTIAL}/identity.json", f"{PARTIAL}/replaced.json"


class RemoteWorkspace(Workspace):
    """The workspace of a result in a store. In the scratch directory, what was sent has names and sizes only."""

    leaves = True

    def __init__(self, store: Store) -> None:
        super().__init__(scratch(f"output {store.url}") / (store.url.rpartition("/")[2] or "output"))
        self.store = store
        self._sent: dict[str, Object] = {}  # of finished units
        self._opened = False  # whether nothing in the store is a result any more
        STAND_IN_DIRECTORIES[self.target] = store.url
        STAND_IN_DIRECTORIES[self.root] = store / PARTIAL

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Around a run: the scratch directory shows what the store has. It is removed if all went well."""
        with fsio.DirectoryLock(self.target.with_name("lock")):
            self._pull()
            yield
        fsio.remove_tree(self.target.parent)

    def claimed(self) -> None:
        self.store.put(self.identity, _IDENTITY)

    def finished(self, unit: Unit, trusted: bool = False) -> dict[str, Any] | None:
        """The record of a unit that the store has; of one that is finished here and was not sent, after sending it."""
        record, found = self._json(_record(unit)), [self.store.look(name) for name in _files(unit)]
        if record and record.pop("sent", None) == [there and asdict(there) for there in found]:
            for (name, path), there in zip(self._places(unit).items(), found, strict=True):
                self._seen(name, path, there)
            return record
        record = super().finished(unit, trusted)
        return record and self._send(unit, record)

    def make(self, unit: Unit, *rest: Any) -> dict[str, Any]:
        """What a workspace makes, sent to the store."""
        return self._send(unit, super().make(unit, *rest))

    def deliver(self, manifest: Mapping[str, Any]) -> None:
        """Send all but the shards, which are there; the manifest last. Then remove what was there for the work alone.

        Raises: StorageError if something that was sent is not there any more.
        """
        files = manifest["files"]
        if self._json(MANIFEST).get(hashed_json.SEAL) != manifest[hashed_json.SEAL]:
            self._open()
            late = [name for name in MODEL if name in files]
            for name in (*(n for n in files if n not in self._sent and n not in late), *late):
                self.store.put(self.target / name, name)
            for name, there in self._sent.items():
                if self.store.look(name) != there:
                    raise StorageError(f"{self.store / name}: vanished or changed; run the same command again")
            self.store.put(self.target / MANIFEST, MANIFEST)
            replaced = self._json(_REPLACED).get("files", {})
            self.store.remove(name for name in replaced if name not in files)
        begun = self._json(_IDENTITY)
        if begun and all(begun.get(key) == value for key, value in manifest["identity"].items()):
            work = {name for name in self.store.objects() if name.startswith(f"{PARTIAL}/")}
            self.store.remove(sorted(work - {_IDENTITY}))
            self.store.remove([_IDENTITY])  # last: until then the same command finds what is left

    def _pull(self) -> None:
        """Show what the store has. What was begun here, of which it knows nothing, is of no work that could go on."""
        fsio.remove_tree(self.target)
        begun = self._json(_IDENTITY)
        if not begun or not self.identity.exists() or strict_json.load_object(self.identity) != begun:
            fsio.remove_tree(self.root)
        if begun:
            fsio.make_dirs(self.root)
            fsio.write_json(self.identity, begun)
        others = begun or [name for name in self.store.objects() if not name.startswith(f"{PARTIAL}/")]
        if self._json(MANIFEST) or (others and not begun):
            mounted(self.store, self.target)

    def _send(self, unit: Unit, record: dict[str, Any]) -> dict[str, Any]:
        """Put the files of a unit that is finished into the store, its record last."""
        self._open()
        found = {name: self.store.put(path, name) for name, path in self._places(unit).items()}
        record.pop(hashed_json.SEAL, None)
        hashed_json.write(self.record(unit), {**record, "sent": [asdict(o) for o in found.values()]})
        self.store.put(self.record(unit), _record(unit))
        self._seen(unit.file_name, self.shard(unit), found[unit.file_name])
        return record

    def _seen(self, name: str, path: Path, there: Object | None) -> None:
        """From now on a file of a unit is read where it is, and takes no space here."""
        assert there is not None, name
        self._sent[name] = there
        fsio.write_hole(path, there.size)
        self.store.stand_in(name, path, there)

    def _places(self, unit: Unit) -> dict[str, Path]:
        return dict(zip(_files(unit), (self.shard(unit), self.piece(unit)), strict=True))

    def _open(self) -> None:
        """Before a result's files change: it is none from now on. Old ones are removed at the end."""
        if not self._opened and self.store.look(MANIFEST):
            fsio.make_dirs(self.root)
            fsio.write_json(self.root / "replaced.json", {"files": self._json(MANIFEST).get("files", {})})
            self.store.put(self.root / "replaced.json", _REPLACED)
            self.store.remove([MANIFEST, *MODEL])
        self._opened = True

    def _json(self, name: str) -> dict[str, Any]:
        """What a JSON object holds; nothing if it is not there, or not whole."""
        there, path = self.store.look(name), Path(self.store / name)
        if there is None or not there.size:
            return {}
        try:
            found = strict_json.loads(self.store.read(name, 0, there.size), self.store / name)
            return hashed_json.whole(found, path) if hashed_json.SEAL in found else found
        except (InputError, TypeError):
            return {}


def _record(unit: Unit) -> str:
    return f"{PARTIAL}/units/{unit.index:05d}.json"


def _files(unit: Unit) -> list[str]:
    """Objects of a unit: its shard, and its part of the adapter."""
    return [unit.file_name, f"{PARTIAL}/units/{unit.index:05d}.safetensors"]
