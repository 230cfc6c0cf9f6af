"""Work that is taken in shares by whoever is there: threads of this process, and other processes beside it.

A share is taken whole by a claim. Its results are files, one for each item, and whoever has nothing left to take
solves items of shares that others have: from the end, as the one who has it goes from the beginning. Who took a share
makes its record, and a share with a record is done. So a slow machine holds nobody up, nor does one that is gone.
"""

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq.checkpoint import claims
from loftq.checkpoint.claims import Crew
from loftq.errors import LoftqError
from loftq.formats import fsio
from loftq.solver import solvers

POLL = 0.5  # seconds between two looks at what others have done


@dataclass(frozen=True)
class Share:
    """What one process takes at a time.

    Attributes:
        record: the file that says that it is done; beside it a directory of its name has the results until then.
        items: how many there are.
        cost: of all of them; the dearest shares are begun first.
        suffix: of the files of results.
    """

    record: Path
    items: int
    cost: float
    suffix: str = ".safetensors"

    @property
    def directory(self) -> Path:
        return self.record.with_suffix("")

    def place(self, item: int) -> Path:
        """Where the result of an item goes."""
        return self.directory / f"{item:05d}{self.suffix}"


@dataclass(frozen=True)
class Handlers:
    """What is done with the items of shares.

    Attributes:
        solve: the result of an item, on a thread.
        keep: puts it into its place.
        close: makes the record of a share whose results are all there; returns those that turn out to be damaged.
        told: called with the number of items that others have done.
    """

    solve: Callable[[Share, int], Any]
    keep: Callable[[Share, int, Any], None]
    close: Callable[[Share], list[int]]
    told: Callable[[int], None]


@dataclass
class Team:
    """This process at work on shares.

    Attributes:
        workers: its threads.
        over: whether the end of all is there already, by others.
    """

    crew: Crew
    workers: int
    over: Callable[[], bool]
    _mine: list[Share] = field(default_factory=list)
    _begun: set[tuple[Path, int]] = field(default_factory=set)
    _counted: set[tuple[Path, int]] = field(default_factory=set)
    _looked: float = 0.0

    def work(self, shares: Iterable[Share], handlers: Handlers) -> None:
        """Until every share has its record, or all is over: return. Errors of the handlers are raised."""
        left = in_order(shares, self.crew.me.id)
        running: dict[Future[Any], tuple[Share, int]] = {}
        self._mine, self._begun = [], set()
        with solvers(self.workers) as pool:
            while (left := self._without_done(left, handlers)) and not self.over():
                if self._close(left, handlers) or self._submit(pool, running, left, handlers):
                    continue
                for future in _next_of(running):
                    share, item = running.pop(future)
                    result = future.result()
                    if result is not None and not self.over():
                        with self._unless_done(share):
                            handlers.keep(share, item, result)
                            self._counted.add((share.record, item))

    @contextlib.contextmanager
    def _unless_done(self, share: Share) -> Iterator[None]:
        """What is written into a share's directory; nothing is missed if it fails because the share is done.

        Who makes the record removes the directory, whatever another process was just about to add.
        """
        try:
            yield
        except LoftqError:
            names_in(share.record.parent)  # a network file system then forgets what it remembers
            if not share.record.exists() and not self.over():
                raise

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        running: dict[Future[Any], tuple[Share, int]],
        left: list[Share],
        handlers: Handlers,
    ) -> bool:
        """As many items as keep the threads busy while results are written; whether a share is taken that has none."""

        def solve(share: Share, item: int) -> Any:
            return None if share.place(item).exists() or share.record.exists() else handlers.solve(share, item)

        while len(running) < 2 * self.workers:
            found = self._own(left)
            if not found and self._take(left):
                found = self._own(left)
                if not found:
                    return True
            if not found and len(running) < self.workers:
                found = self._help(left)
            if not found:
                break
            self._begun.add((found[0].record, found[1]))
            running[pool.submit(solve, *found)] = found
        return False

    def _own(self, left: list[Share]) -> tuple[Share, int] | None:
        """The next item of a share of ours that no other process has begun."""
        for share in self._mine:
            if share in left:
                names = names_in(share.directory)
                for item in self._missing(share, names):
                    if not claims.claimed(names, f"{item:05d}"):
                        return share, item
        return None

    def _take(self, left: list[Share]) -> bool:
        """Claim a share that nobody has, or whose worker is dead; whether there was one."""
        others = [share for share in left if share not in self._mine]
        names = names_in(others[0].record.parent) if others else set()
        free = [share for share in others if not claims.claimed(names, share.directory.name)]
        if not free and time.monotonic() - self._looked > claims.BEAT:
            free, self._looked = others, time.monotonic()
        taken = next((share for share in free if self.crew.take(share.directory)), None)
        self._mine += [taken] if taken else []
        return taken is not None

    def _help(self, left: list[Share]) -> tuple[Share, int] | None:
        """An item that another process has still to begin, or is slow with."""
        for share in left:
            missing = self._missing(share, names_in(share.directory))
            if share in self._mine:
                if missing:
                    return share, missing[0]
                continue
            with self._unless_done(share):
                for item in reversed(missing):
                    fsio.make_dirs(share.directory)
                    if self.crew.take(share.directory / f"{item:05d}"):
                        return share, item
        return None

    def _missing(self, share: Share, names: set[str]) -> list[int]:
        """Items without a result that this process has not begun."""
        items = range(share.items)
        return [i for i in items if share.place(i).name not in names and (share.record, i) not in self._begun]

    def _close(self, left: list[Share], handlers: Handlers) -> bool:
        """Make the record of a share of ours whose results are all there; whether there was one."""
        for share in [share for share in self._mine if share in left]:
            names = names_in(share.directory)
            if all(share.place(i).name in names for i in range(share.items)):
                for item in handlers.close(share):
                    fsio.remove(share.place(item))
                    self._begun.discard((share.record, item))
                return True
        return False

    def _without_done(self, left: list[Share], handlers: Handlers) -> list[Share]:
        """The shares that have no record yet; the items of others are counted once."""
        names = names_in(left[0].record.parent) if left else set()
        done = [share for share in left if share.record.name in names]
        for share in done:
            items = {(share.record, i) for i in range(share.items)}
            handlers.told(len(items - self._counted))
            self._counted |= items
        return [share for share in left if share not in done]


def _next_of(running: dict[Future[Any], Any]) -> set[Future[Any]]:
    """What is done, after a while at the most."""
    if not running:
        time.sleep(POLL)
        return set()
    return wait(running, POLL, FIRST_COMPLETED).done


def in_order(shares: Iterable[Share], seed: str) -> list[Share]:
    """The dearest first, by powers of two, and within one by chance: so not all ask for the same."""
    chance = random.Random(seed)
    return sorted(shares, key=lambda share: (-round(share.cost).bit_length(), chance.random()))


def names_in(directory: Path) -> set[str]:
    """What is in a directory now: a listing asks the server, where a single name might be remembered."""
    try:
        return set(os.listdir(directory))
    except OSError:
        return set()
