"""Who works on what, where processes on many machines share one directory and nothing else: no locks, no common clock.

A process has a file in ``workers``, of which the first line says who it is, and which grows by a byte at every beat. A
claim is a file that names its worker; of several that want the same, the first one's file is there. A worker whose
file does not grow any more, by the clock of the one who looks, is taken for dead, and its claims can be taken over.
Claims only save work. Whoever is wrongly taken for dead makes the same thing once more, and the first result stays.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq.errors import LoftqError
from loftq.formats import fsio, strict_json
from loftq.formats.regular import open_regular, shown

BEAT = 5.0  # seconds between two beats
STALE = 60.0  # seconds without one, seen by another process, after which a worker is dead
CLAIM = ".claim."  # in the name of a claim: what is claimed, and how many had it before
DAMAGED = "?"  # no worker's name


@dataclass(frozen=True)
class Worker:
    """A process that takes part.

    Attributes:
        namespace: :func:`namespace` of its process; only within one does ``pid`` say anything.
        time: when it began, by its own clock, for people to read.
    """

    id: str
    host: str
    pid: int
    namespace: str
    time: str

    @classmethod
    def here(cls) -> "Worker":
        """This process, under a name that no other has."""
        return cls(secrets.token_hex(4), socket.gethostname(), os.getpid(), namespace(), now())

    @property
    def has_ended(self) -> bool:
        """Whether it is of this machine, and its process is gone."""
        if not self.namespace or self.namespace != namespace():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


class Watch:
    """What one process has seen of the workers in a directory, by its own clock."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._seen: dict[str, tuple[int, float]] = {}  # size of the file, and when it was first seen to have it
        self._workers: dict[str, Worker] = {}

    def worker(self, name: str) -> Worker | None:
        """Who a worker is; None if its file is gone, as it is when it has left, or cannot be read."""
        if name not in self._workers:
            try:
                with open_regular(self.directory / name) as file:
                    line = file.read_at(0, min(file.stamp.size, 4096)).partition(b"\n")[0]
                self._workers[name] = Worker(**strict_json.loads(line, shown(self.directory / name)))
            except (LoftqError, TypeError):
                return None
        return self._workers[name]

    def has_beaten(self, name: str) -> bool:
        """Whether its file has grown since the last look."""
        first = self._seen.get(name)
        return self._look(name) and first is not None and self._seen[name] != first

    def is_alive(self, name: str) -> bool:
        """Whether a worker's file has grown within ``STALE`` seconds of watching."""
        return self._look(name) and time.monotonic() - self._seen[name][1] < STALE

    def _look(self, name: str) -> bool:
        """Note the size of a worker's file; False if it is gone, or its process is."""
        try:  # opened, for NFS then asks its server
            fd = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        if self._seen.get(name, (-1, 0.0))[0] != size:
            self._seen[name] = (size, time.monotonic())
        worker = self.worker(name)
        return worker is None or not worker.has_ended


class Crew(AbstractContextManager["Crew"]):
    """This process among those that share the directory ``root``, from ``with`` to its end.

    Attributes:
        me: this process.
    """

    def __init__(self, root: Path) -> None:
        self.me = Worker.here()
        self.watch = Watch(root / "workers")
        self._left = threading.Event()
        self._holders: dict[Path, str] = {}

    def __enter__(self) -> "Crew":
        fsio.make_dirs(self.watch.directory)
        fsio.create(self._file, [json.dumps(asdict(self.me)).encode() + b"\n"])
        threading.Thread(target=self._beat, name="loftq beats", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        with contextlib.suppress(LoftqError):
            if self._file.exists():
                fsio.remove(self._file)

    def take(self, what: Path) -> bool:
        """Claim ``what``, the path of something below its directory; False if a living process has it."""
        number = 0
        text = json.dumps({**asdict(self.me), "time": now()}).encode()
        while not fsio.create(claim := what.with_name(f"{what.name}{CLAIM}{number}"), [text]):
            number += 1
            if not what.with_name(f"{what.name}{CLAIM}{number}").exists():  # it is the last one
                holder = self._holder(claim)
                if not holder or holder == self.me.id or self.watch.is_alive(holder):
                    return holder == self.me.id
        return True

    @property
    def _file(self) -> Path:
        return self.watch.directory / self.me.id

    def _holder(self, claim: Path) -> str:
        """The worker that a claim names; nothing if it is gone. One that is damaged names nobody who is alive."""
        if claim not in self._holders:
            try:
                self._holders[claim] = str(strict_json.load_object(claim).get("id"))
            except LoftqError:
                return DAMAGED if claim.exists() else ""
        return self._holders[claim]

    def _beat(self) -> None:
        """Beat until it leaves; where the directory is gone, the work is done."""
        while not self._left.wait(BEAT):
            with contextlib.suppress(LoftqError):
                fsio.append(self._file, b".")


def claimed(names: set[str], what: str) -> bool:
    """Whether a directory with these names in it has a claim of ``what``."""
    return f"{what}{CLAIM}0" in names


def holder(directory: Path, names: set[str], what: str) -> dict[str, Any]:
    """What the last claim of ``what`` says; empty if there is none."""
    numbers = [int(n.rpartition(".")[2]) for n in names if n.startswith(f"{what}{CLAIM}")]
    if not numbers:
        return {}
    with contextlib.suppress(LoftqError):
        return strict_json.load_object(directory / f"{what}{CLAIM}{max(numbers)}")
    return {}


def now() -> str:
    """The time by this machine's clock, for people to read."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def namespace() -> str:
    """Which machine, since it was started, and which processes on it the ids mean; empty if nothing says."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
