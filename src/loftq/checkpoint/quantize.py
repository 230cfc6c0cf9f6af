"""``loftq quantize``: stream a checkpoint, matrix by matrix, into a LoftQ checkpoint.

Work is collected in ``OUTPUT.loftq-partial``: shards first, then adapter, configuration and tokenizer, the manifest
last; one rename then makes it ``OUTPUT``. Whatever stops the run, ``OUTPUT`` is absent or complete, and the same
command continues from the finished shards, and from the matrices of the unfinished one.
"""

import functools
import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from loftq import planning
from loftq.calibration import collect
from loftq.calibration.calibrate import STATISTICS, CalibrateOptions, asked_for, open_or_collect
from loftq.calibration.streamed import Streamed, reached, tell, tokens_of_experts, waves
from loftq.checkpoint import hub, pieces
from loftq.checkpoint.assemble import Job, adapter_of, assemble
from loftq.checkpoint.budget import check_budget, within_budget
from loftq.checkpoint.output_dir import (
    MACHINE,
    already_done,
    check_places,
    claim,
    is_ours,
    publish,
    put_back,
    was_taken,
)
from loftq.checkpoint.remote_work import RemoteWorkspace
from loftq.checkpoint.shards import Solved, Unit, Workspace, solve_matrix, split, suitable
from loftq.checkpoint.shared import Engine, Prepared, make_shared, write_tasks
from loftq.errors import (
    ConflictError,
    InputError,
    LoftqError,
    NumericalError,
    StorageError,
    UsageError,
    command,
    extra,
    option,
    quoted,
)
from loftq.formats import fsio, layouts
from loftq.formats.layouts import Layout
from loftq.formats.regular import local_path, output_path, shown, url_of
from loftq.formats.remote import store
from loftq.formats.statistics import Statistics
from loftq.formats.tensorfile import file_size
from loftq.numerics.device import check_device
from loftq.numerics.machine import code_path, cpus
from loftq.options import check_fields, check_whole, default, fields_of
from loftq.planning import Matrix, Policy, make_policy
from loftq.solver import ordered_map, workers_for
from loftq.sources.checkpoint import Source, open_source
from loftq.sources.identity import is_unchanged, stamp
from loftq.spec import check_statistics, statistics_kind
from loftq.spelled import spell_size
from loftq.version import __version__

logger = logging.getLogger("loftq")

CLUSTER = re.compile(r"auto|ray://\S+:\d+|[^\s/]+:\d+")


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What to make, beside the policy. Of these only ``format``, ``max_shard_bytes`` and the calibration change bytes.

    Attributes:
        calibrate: a directory of statistics, a file of texts, or a data set of the hub; see ``docs/calibration.md``.
        calibration_samples: of the texts, if statistics are to be collected.
    """

    policy: Policy = field(default_factory=Policy)
    format: str = default("format")
    workers: int = default("workers")  # 0: as many as CPUs, memory and device allow
    device: str = default("device")
    max_shard_bytes: int = 10**9  # 0: what suits the checkpoint's size
    overwrite: bool = default("overwrite")
    shared: bool = default("shared")
    cluster: str | None = default("cluster")
    push_to_hub: str | None = default("push_to_hub")
    private: bool = default("private")
    revision: str | None = default("revision")
    task_type: str | None = default("task_type")
    calibrate: str | None = default("calibrate")
    calibration_samples: int = default("calibration_samples")
    statistics: Path | None = None  # where collected ones go; None: none is kept after its block is solved
    curves: Path | None = None  # where the error curves of a budget are kept; None: in the workspace

    def __post_init__(self) -> None:
        layout = layouts.get(self.format)
        if self.policy.serve and (why := layouts.why_not_served(layout, self.policy.serve)):
            raise UsageError(f"{option('serve', self.policy.serve)}: {why}")
        check_whole(option("max_shard_bytes"), self.max_shard_bytes, 0)
        check_fields(self, option)
        if self.is_shared and self.overwrite:
            raise UsageError(
                f"{option('overwrite', True)}: of processes that share the work, one that is begun late would replace "
                f"what the others made; remove the old output, or choose another {option('output')}"
            )
        if self.cluster is not None and not CLUSTER.fullmatch(str(self.cluster)):
            wanted = "neither auto nor an address like ray://HOST:10001"
            raise UsageError(f"{option('cluster')}: {quoted(self.cluster)} is {wanted}")
        if self.private and not self.push_to_hub:
            raise UsageError(f"{option('private', True)} needs {option('push_to_hub')}; give a name, or leave it out")

    @property
    def is_shared(self) -> bool:
        """Whether other processes may work on the same output."""
        return self.shared or self.cluster is not None


def quantize_options(given: Mapping[str, Any]) -> QuantizeOptions:
    """The options of a run out of a caller's, by name. What they leave open is what the format can hold."""
    layout = layouts.get(given.get("format", default("format")))
    given = layout.filled(given)
    paths = {name: Path(given[name]) for name in ("curves", "statistics") if given.get(name) is not None}
    policy = make_policy(given, calibrated=given.get("calibrate") is not None)
    wanted = planning.widths(policy.bits)
    other = sorted(wanted.difference(layout.widths or wanted))
    if other:
        have, instead = " or ".join(map(str, layout.widths)), option("bits", layout.widths[-1])
        raise UsageError(f"{option('format', layout.name)} has no {other[0]} bits, only {have}; use {instead}")
    return QuantizeOptions(**fields_of(QuantizeOptions, {**given, **paths}), policy=policy)


Progress = Callable[[dict[str, Any]], None]  # called with the report of each matrix
Begin = Callable[[int, int], Progress]  # called once with the number of matrices in all, and of those done already


def quantize(
    model: str,
    output: Path,
    options: QuantizeOptions,
    begin: Begin | None = None,
    begin_calibration: collect.Begin | None = None,
) -> dict[str, Any]:
    """Quantize ``model`` into the directory ``output``; the manifest of the result.

    Args:
        model: a local directory, a hub id, or a URL that fsspec opens.
        output: a local directory, or a URL.
        begin: called before the work, and before that if error curves are measured for a budget; returns what is
            called after every matrix, with its report.
        begin_calibration: the same for collecting statistics.

    Raises: ConflictError if ``output`` holds something else or another process works on it; InputError,
        NumericalError, StorageError as their names say. In every case ``output`` is absent or complete.
    """
    if not url_of(output):
        work = Workspace(output_path(output))
        name = options.push_to_hub and hub.prepare(options.push_to_hub, options.private)
        manifest = _quantize(model, work, options, begin, begin_calibration)
        if name:
            hub.push(work.target, manifest, name)
        return manifest
    if options.push_to_hub or options.is_shared:
        what = option("push_to_hub") if options.push_to_hub else option("shared" if options.shared else "cluster")
        place = "of this machine" if options.push_to_hub else "that all processes see, no URL"
        raise UsageError(f"{what} needs a directory {place}; choose another {option('output')}, or leave {what} out")
    work = RemoteWorkspace(store(option("output"), output))
    with work.held():
        manifest = _quantize(model, work, options, begin, begin_calibration)
        work.deliver(manifest)
    return manifest


def _quantize(
    model: str, work: Workspace, options: QuantizeOptions, begin: Begin | None, begin_calibration: collect.Begin | None
) -> dict[str, Any]:
    """:func:`quantize` into a directory of this machine."""
    ready = prepared(model, work, options, begin_calibration)
    job, options = ready.job, ready.options
    output, statistics = work.target, ready.statistics
    done = already_done(output, job.identity, options.overwrite)
    if done and not (work.root.exists() and is_ours(work, job.identity)):  # nothing to clean away
        return done
    if options.is_shared:
        if not done:
            engine = _engine(model, ready)  # before anything is written
            fsio.make_dirs(output.parent)
            _check_space(job, work)
            done = make_shared(ready, begin, engine)
        _clean(work)
        return done
    fsio.make_dirs(work.root)
    with fsio.DirectoryLock(work.lock):
        try:
            put_back(work, output)
            done = already_done(output, job.identity, options.overwrite)  # another process may have finished meanwhile
            if not done:
                claim(work, job.identity, job.source.directory)
                work.claimed()
                if options.policy.budget:
                    job = _spend(job, work, options, statistics, begin)
                _check_space(job, work, 3 if isinstance(statistics, Streamed) else 1)
                done = assemble(job, work, _make_units(job, work, options, statistics, begin))
                publish(work, output, done["files"], options.overwrite)
        except LoftqError as e:
            done = already_done(output, job.identity, False) if was_taken(e) else None
            if not done:
                _forget_unfinishable(job, work, e, options.device)
                raise
        if is_ours(work, job.identity):
            _clean(work)
    return done


def prepared(
    model: str, work: Workspace, options: QuantizeOptions, begin_calibration: collect.Begin | None = None
) -> Prepared:
    """All that is known before the first matrix is solved; every process of a run finds the same."""
    check_device(options.device)
    output = work.target
    spec = options.policy.solve
    check_statistics(spec, None if options.calibrate is None else statistics_kind(spec))
    source, layout = open_source(model, options.policy, options.revision), layouts.get(options.format)
    options = replace(options, max_shard_bytes=options.max_shard_bytes or suitable(source.plan))
    check_places(source.directory, work, output)
    if options.policy.budget:
        check_budget(source, options.policy, options.curves, layout.name)
    elif options.curves:
        raise UsageError(f"{option('curves')} needs a budget; give one: {option('budget', 2.5)}")
    already_done(output, {}, overwrite=True)  # refuses what is no result of ours, before the texts are run
    statistics = _statistics(model, output, options, begin_calibration)
    if isinstance(statistics, Statistics):
        known, unreached = reached(source.plan.matrices, statistics)
        tell(unreached, tokens_of_experts(known, statistics))
    job = _job(source, layout, _identity(source, layout, options, statistics), options)
    return Prepared(job, work, options, statistics, lambda budgeted: _job(budgeted, layout, job.identity, options))


def _engine(model: str, ready: Prepared) -> Engine:
    """What makes the units of a run that is shared: the threads of this process, or a cluster."""
    if ready.options.cluster is None:
        return Engine()
    with extra("ray"):
        from loftq.checkpoint.cluster import Cluster
    return Cluster(model, ready)


def _job(source: Source, layout: Layout, identity: dict[str, Any], options: QuantizeOptions) -> Job:
    stack = next((m.module for m in source.plan.matrices if m.experts), "")
    if stack and not layout.stacks:
        raise UsageError(
            f"{option('format', layout.name)} holds no stacks of experts, such as {quoted(stack)}; leave them dense: "
            f"{option('bits', 'experts=16,4')}"
        )
    units = split(source.plan, layout, options.max_shard_bytes, _in_order(source))
    return Job(source, layout, units, identity, adapter_of(source, layout.keeps_conv1d, options.task_type))


def _spend(
    job: Job,
    work: Workspace,
    options: QuantizeOptions,
    statistics: Statistics | Streamed | None,
    begin: Begin | None,
) -> Job:
    """The job with the plan that the budget chooses. Its identity stays: that of what the choice depends on."""
    keep = options.curves or work.curves
    source = within_budget(
        *(job.source, options.policy, keep, statistics),
        workers=options.workers,
        device=options.device,
        begin=begin,
        place=work.root / "moments-budget",
    )
    return _job(source, job.layout, job.identity, options)


def _in_order(source: Source) -> list[str]:
    """All tensors in the order of the model's layers, matrices and copies mixed."""
    return sorted((t.name for t in (*source.plan.matrices, *source.plan.kept)), key=planning.natural)


def _statistics(
    model: str, output: Path, options: QuantizeOptions, begin: collect.Begin | None
) -> Statistics | Streamed | None:
    """What ``options.calibrate`` names, or what is collected from it; None if it is None."""
    if options.calibrate is None:
        return None
    if options.is_shared and not Path(options.calibrate).is_dir():
        raise UsageError(
            f"processes that share the work take finished statistics, and {quoted(options.calibrate)} is no directory "
            "of them; collect them from texts first, with torchrun in several processes: "
            f"{command('calibrate', 'MODEL', data=options.calibrate, output='STATS')}"
        )
    asked = CalibrateOptions(
        data=options.calibrate,
        kind=statistics_kind(options.policy.solve),
        samples=options.calibration_samples,
        revision=options.revision,
        device=options.device,
    )
    place = options.statistics
    if place is None and not local_path("--calibrate", options.calibrate).is_dir():
        return Streamed(asked_for(model, replace(asked, data=options.calibrate)), begin)
    try:
        statistics = open_or_collect(options.calibrate, model, place or output, asked, begin)
    except ConflictError:
        if not options.overwrite or place is None or not (place / STATISTICS).is_file():
            raise
        fsio.remove_tree(place)
        statistics = open_or_collect(options.calibrate, model, place, asked, begin)
    check_statistics(options.policy.solve, statistics.kind)
    return statistics


def _identity(
    source: Source, layout: Layout, options: QuantizeOptions, statistics: Statistics | Streamed | None
) -> dict[str, Any]:
    """Everything that the bytes of the result depend on. Two runs may share work only if these are equal."""
    return {
        **({} if statistics is None else {"statistics": statistics.identity}),
        "source": stamp(source),
        "options": {
            **options.policy.to_dict(),
            "format": layout.name,
            "max_shard_bytes": options.max_shard_bytes,
            "device": options.device.partition(":")[0],
            "task_type": options.task_type,
        },
        "plan": source.plan.digest(),
        "loftq": __version__,
        "torch": torch.__version__,
        MACHINE: code_path(options.device),
    }


def _check_space(job: Job, work: Workspace, waiting: int = 1) -> None:
    """Refuse to begin what will not fit: shards, the matrices of those in work, and the adapter twice.

    Args:
        waiting: how many shards are in work. Block by block, those of the embeddings and of the head wait.
    """
    wanted, shards, solved = 0, [0], [0]
    for unit in job.units:
        adapter = file_size(unit.adapter_entries())
        if work.record(unit).exists():
            wanted += adapter
        else:
            wanted += 2 * adapter
            shards.append(file_size(unit.entries(job.layout)))
            solved.append(adapter + sum(m.bytes for m in unit.matrices))
    wanted += sum(sorted(solved)[-waiting:]) + (max(shards) if work.leaves else sum(shards))
    free = shutil.disk_usage(work.root.parent).free  # work.root goes when another process finishes
    if wanted * 1.05 > free:
        raise StorageError(
            f"{shown(work.root)}: no space: needs about {spell_size(wanted * 1.05)}, {spell_size(free)} are free; "
            f"free some space, or choose another {option('output')}"
        )


def _make_units(
    job: Job, work: Workspace, options: QuantizeOptions, statistics: Statistics | Streamed | None, begin: Begin | None
) -> list[dict[str, Any]]:
    """Records of all units, made where they are not there yet, each as soon as its last matrix is solved."""
    source, layout = job.source, job.layout
    with ThreadPoolExecutor(cpus()) as pool:
        records = list(pool.map(work.finished, job.units))
    missing = [unit for unit, record in zip(job.units, records, strict=True) if record is None]
    for unit, record in zip(job.units, records, strict=True):
        if record is not None:
            fsio.remove_tree(work.solved(unit))
    write_tasks(job, work)
    finished = sum(len(unit.members) for unit, record in zip(job.units, records, strict=True) if record)
    owners = {m.name: unit for unit in missing for m in unit.members}
    places = {m.name: work.solved_matrix(unit, i) for unit in missing for i, m in enumerate(unit.members)}
    matrices = [m for unit in missing for m in unit.members]
    unsolved = [m for m in matrices if pieces.read(places[m.name], m, layout) is None]
    lacking = Counter(owners[m.name].index for m in unsolved)
    advance = begin(finished + len(matrices), finished + len(matrices) - len(unsolved)) if begin else lambda _: None

    def work_on(found: Statistics | None, matrix: Matrix) -> Solved:
        moments = found and found.moments(matrix.module)
        return solve_matrix(matrix, source.checkpoint, source.plan, layout, options.device, moments)

    def keep(solved: Solved) -> None:
        pieces.write(places[solved.matrix.name], solved, layout)
        advance(solved.report)

    def solved(unit: Unit) -> Iterator[Solved]:
        for matrix in unit.members:
            found = pieces.read(places[matrix.name], matrix, layout)
            if found is None:
                raise StorageError(f"{places[matrix.name]}: changed during the run; run the same command again")
            yield found

    def make(unit: Unit) -> None:
        nonlocal began
        records[unit.index] = work.make(unit, solved(unit), source.checkpoint, layout, began)
        began = time.monotonic()

    began = time.monotonic()
    workers = options.workers or workers_for(
        ((m.shape, m.quant) for m in unsolved), source.plan.solve, options.device, statistics is not None
    )
    for unit in missing:
        if not lacking[unit.index]:
            make(unit)
    for some, found in waves(statistics, work.root / "moments", unsolved):
        for one in ordered_map(functools.partial(work_on, found), some, workers, keep):
            unit = owners[one.matrix.name]
            lacking[unit.index] -= 1
            if not lacking[unit.index]:
                make(unit)
    return [r for r in records if r is not None]


def _forget_unfinishable(job: Job, work: Workspace, error: LoftqError, device: str) -> None:
    """Remove work that no command can finish: with a value that other weights or options are needed for, or on a source
    that was changed under our hands, which the error then says.

    A GPU may compute such a value once only; its work stays.
    """
    if isinstance(error, NumericalError) and torch.device(device).type == "cpu" and is_ours(work, job.identity):
        fsio.remove_tree(work.root)
    if isinstance(error, InputError) and not is_unchanged(job.source, job.identity["source"]):
        if is_ours(work, job.identity):
            fsio.remove_tree(work.root)
        raise InputError(
            f"{shown(job.source.directory)}: source changed while reading ({error}); leave it alone and run the same "
            "command again: the work begun is removed, and it begins anew"
        ) from error


def _clean(work: Workspace) -> None:
    """Remove the workspace; the result stands already, so a failure here is no failure of the run."""
    try:
        fsio.remove_tree(work.root)
    except StorageError as e:
        logger.warning("%s; the output is complete, this directory can be deleted", e)
