"""One checkpoint made by processes that are begun any number of times, on any machines that see one directory.

Units, and the error curves of a budget, are shares of a :class:`Team`. What a unit is made of has the name of who made
it, and the first record of a unit says whose files count. Who claims the end puts them together in a directory of
its own; one rename makes that the output, so of two that try, one does. Every process returns the same manifest.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from loftq.calibration.streamed import Streamed
from loftq.checkpoint import pieces, team
from loftq.checkpoint.assemble import Job, assemble
from loftq.checkpoint.budget import choose, with_choice
from loftq.checkpoint.claims import Crew
from loftq.checkpoint.curves import Advance, Curves, measured
from loftq.checkpoint.manifest import MANIFEST
from loftq.checkpoint.output_dir import accept, already_done, claim, is_ours, publish
from loftq.checkpoint.shards import Solved, Unit, Workspace, solve_matrix
from loftq.checkpoint.team import Handlers, Share, Team
from loftq.errors import LoftqError
from loftq.formats import fsio, hashed_json
from loftq.formats.statistics import Statistics
from loftq.numerics.machine import cpus
from loftq.planning import Choice, Matrix
from loftq.solver import seconds, workers_for
from loftq.sources.checkpoint import Source

if TYPE_CHECKING:
    from loftq.checkpoint.quantize import Begin, QuantizeOptions

CHOICE = "choice.json"  # in a workspace: what a budget was spent on


class _Damaged(Exception):
    """A result in a file is not what was written; its number in the share."""


@dataclass(frozen=True)
class Prepared:
    """A run before its first matrix is solved.

    Attributes:
        job: with the plan before a budget is spent.
        options: with the bytes of a shard as a number.
        respend: the job of a source with another plan.
    """

    job: Job
    work: Workspace
    options: "QuantizeOptions"
    statistics: Statistics | Streamed | None
    respend: Callable[[Source], Job]


class Sharing:
    """This process among those that make one checkpoint.

    Attributes:
        job: once a budget is spent, with its plan.
        mine: the workspace with files of this process.
        there: names of what was there already when this process joined.
    """

    def __init__(self, ready: Prepared, crew: Crew) -> None:
        assert not isinstance(ready.statistics, Streamed), "texts are refused where the work is shared"
        self.job, self.work, self.options, self.statistics = ready.job, ready.work, ready.options, ready.statistics
        self.respend, self.crew = ready.respend, crew
        self.mine = Workspace(self.work.target, crew.me.id)
        self.there = team.names_in(self.work.units)

    def published(self) -> dict[str, Any] | None:
        """The manifest, if the output is there."""
        team.names_in(self.work.target.parent)  # a listing: a network file system then forgets what it remembers
        return already_done(self.work.target, self.job.identity, False)

    def over(self) -> bool:
        """Whether nothing is left to do here: the output is there, or the workspace is gone or another command's."""
        work = self.work
        return (work.target / MANIFEST).exists() or not work.identity.exists() or not is_ours(work, self.job.identity)

    def team(self) -> Team:
        """Its threads: as the options say, or as fit the machine."""
        calibrated = self.statistics is not None
        matrices = ((m.shape, m.quant) for m in self.job.source.plan.matrices)
        solve = self.job.source.plan.solve
        return Team(
            self.crew,
            self.options.workers or workers_for(matrices, solve, self.options.device, calibrated),
            self.over,
        )

    def shares(self) -> list[Share]:
        return [Share(self.work.record(u), len(u.members), cpu_seconds(self.job, u)) for u in self.job.units]

    def spend(self, engine: "Engine", begin: "Begin | None") -> None:
        """Have the curves of a budget measured; go on with the plan that the first process chose of them."""
        choice, source, policy = self.work.root / CHOICE, self.job.source, self.options.policy
        curves = {} if choice.exists() else engine.measure(self, begin)
        while not choice.exists() and not self.over():
            if self.crew.take(choice):
                hashed_json.create(choice, choose(source, policy, curves))
            else:
                time.sleep(team.POLL)
        if not self.over():
            self.job = self.respend(with_choice(source, policy, hashed_json.load(choice)))

    def curve_shares(self) -> dict[Share, list[Matrix]]:
        """A share for the error curves of every unit's matrices."""
        found = {}
        for unit in self.job.units:
            record = self.work.root / "curves" / self.work.record(unit).name
            found[Share(record, len(unit.matrices), cpu_seconds(self.job, unit), ".json")] = unit.matrices
        return found

    def measure(self, begin: "Begin | None", only: int | None = None) -> Curves:
        """The curves of all matrices, or of one unit's, by the threads of this process, beside others."""
        options = self.options
        shares = {s: found for s, found in self.curve_shares().items() if only in (None, int(s.record.stem))}

        def together(known: Curves, one: Callable[[Matrix], list[Choice]], advance: Advance) -> Curves:
            fsio.make_dirs(self.work.root / "curves")
            self.team().work(shares, _measuring(shares, known, one, advance))
            return self.read_curves(shares)

        return measured(
            *(self.job.source, options.policy, options.curves, self.statistics),
            device=options.device,
            begin=begin,
            together=together,
        )

    def read_curves(self, shares: Iterable[Share]) -> Curves:
        """What the records of shares say; nothing once all is over."""
        rows = [] if self.over() else [hashed_json.load(share.record)["curves"] for share in shares]
        return {module: [Choice(*c) for c in curve] for found in rows for module, curve in found.items()}

    def make_units(self, begin: "Begin | None", only: int | None = None) -> None:
        """Until every unit, or one, has a record, or the output is there."""
        job, work, units = self.job, self.work, {self.work.record(unit): unit for unit in self.job.units}
        now = team.names_in(work.units)
        done = {record for record in units if record.name in now}
        known = sum(len(units[record].members) for record in done)
        advance = begin(sum(len(u.members) for u in job.units), known) if begin else lambda _: None
        began = [time.monotonic()]

        def solve(share: Share, item: int) -> Solved:
            matrix = units[share.record].members[item]
            moments = self.statistics and self.statistics.moments(matrix.module)
            checkpoint, plan = job.source.checkpoint, job.source.plan
            return solve_matrix(matrix, checkpoint, plan, job.layout, self.options.device, moments)

        def keep(share: Share, item: int, solved: Solved) -> None:
            pieces.write(share.place(item), solved, job.layout)
            advance(solved.report)

        def close(share: Share) -> list[int]:
            unit = units[share.record]
            try:
                self.mine.make(unit, self._solved(share, unit), job.source.checkpoint, job.layout, began[0])
            except _Damaged as e:
                return [e.args[0]]
            began[0] = time.monotonic()
            return []

        def told(items: int) -> None:
            for _ in range(items):
                advance({})

        left = [s for s in self.shares() if s.record not in done and only in (None, int(s.record.stem))]
        self.team().work(left, Handlers(solve, keep, close, told))

    def finish(self) -> dict[str, Any] | None:
        """Put it together and publish it, if no other process is at it; the manifest, if all records were good."""
        if not self.crew.take(self.work.root / "assembling"):
            time.sleep(team.POLL)
            return None
        records = self._records()
        if records is None:
            return None
        fsio.remove_tree(self.mine.output)
        fsio.make_dirs(self.mine.output)
        made = [self.work.by(record).shard(unit) for unit, record in zip(self.job.units, records, strict=True)]
        with ThreadPoolExecutor(cpus()) as pool:
            list(pool.map(fsio.place, made, [self.mine.output / unit.file_name for unit in self.job.units]))
        manifest = assemble(self.job, self.mine, records)
        publish(self.mine, self.work.target, manifest["files"], overwrite=False)
        return manifest

    def _records(self) -> list[dict[str, Any]] | None:
        """Of all units; None if one is damaged, which is then made again. Those of this run are read, not hashed."""

        def record_of(unit: Unit) -> dict[str, Any] | None:
            return self.work.finished(unit, trusted=self.work.record(unit).name not in self.there)

        with ThreadPoolExecutor(cpus()) as pool:
            records = list(pool.map(record_of, self.job.units))
        for unit, record in zip(self.job.units, records, strict=True):
            if record is None:
                fsio.remove(self.work.record(unit))
        found = [record for record in records if record is not None]
        return found if len(found) == len(records) else None

    def _solved(self, share: Share, unit: Unit) -> Iterator[Solved]:
        for item, matrix in enumerate(unit.members):
            solved = pieces.read(share.place(item), matrix, self.job.layout)
            if solved is None:
                raise _Damaged(item)
            yield solved


def _measuring(
    shares: dict[Share, list[Matrix]], known: Curves, one: Callable[[Matrix], list[Choice]], advance: Advance
) -> Handlers:
    """Curves of the matrices of shares: each in a file until all of its share are there."""

    def solve(share: Share, item: int) -> list[Choice]:
        matrix = shares[share][item]
        return known.get(matrix.module) or one(matrix)

    def keep(share: Share, item: int, curve: list[Choice]) -> None:
        fsio.make_dirs(share.directory)
        hashed_json.write(share.place(item), {"choices": [astuple(choice) for choice in curve]})
        advance({"measured": shares[share][item].name})

    def close(share: Share) -> list[int]:
        found, bad = {}, []
        for item, matrix in enumerate(shares[share]):
            try:
                found[matrix.module] = hashed_json.load(share.place(item))["choices"]
            except LoftqError:
                bad.append(item)
        if not bad:
            hashed_json.create(share.record, {"curves": found})
            fsio.remove_tree(share.directory)
        return bad

    def told(items: int) -> None:
        for _ in range(items):
            advance({"measured": ""})

    return Handlers(solve, keep, close, told)


def cpu_seconds(job: Job, unit: Unit) -> float:
    """For all matrices of a unit, by the law of costs."""
    plan, calibrated = job.source.plan, "statistics" in job.identity
    return sum(seconds(*m.shape, plan.solve, m.quant, calibrated) for m in unit.members)


class Engine:
    """What does the work of a run that is shared: here the threads of this process, beside others."""

    def measure(self, sharing: Sharing, begin: "Begin | None") -> Curves:
        """The error curves of all matrices."""
        return sharing.measure(begin)

    def make_units(self, sharing: Sharing, begin: "Begin | None") -> None:
        """All units that have no record yet."""
        sharing.make_units(begin)


def make_shared(ready: Prepared, begin: "Begin | None", engine: Engine) -> dict[str, Any]:
    """The manifest of the output that this process and others make."""
    work, identity = ready.work, ready.job.identity
    try:
        claim(work, identity, ready.job.source.directory, shared=True)
        with Crew(work.root) as crew:
            sharing = Sharing(ready, crew)
            if ready.options.policy.budget:
                sharing.spend(engine, begin)
            write_tasks(sharing.job, work)
            while True:
                engine.make_units(sharing, begin)
                begin = None
                if done := sharing.published():
                    return done
                accept(work, identity, ready.job.source.directory, shared=True)  # still, after however long a stop
                if done := sharing.finish():
                    return done
    except (LoftqError, OSError):
        team.names_in(work.target.parent)
        done = already_done(work.target, identity, False)
        if not done:
            raise
        return done


def write_tasks(job: Job, work: Workspace) -> None:
    """What is to be done: of every unit its file, how many matrices it has, and their CPU time."""
    if not work.tasks.exists():
        units = [[u.file_name, len(u.members), cpu_seconds(job, u)] for u in job.units]
        fsio.write_json(work.tasks, {"units": units})
