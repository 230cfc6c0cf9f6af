"""Units made by the workers of a Ray cluster, on a directory that all its machines see.

A task is a unit. The worker finds out for itself, as every process of a shared run does, what is to be done: nothing
but the model's name, the options and the unit's number is sent. Ray starts a task again where a node is lost; what
the lost one had solved is still there, and so it is when the driver is lost and started again.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray  # type: ignore[reportMissingImports]
import torch
from ray.exceptions import RayError, RayTaskError  # type: ignore[reportMissingImports]

from loftq.checkpoint import team
from loftq.checkpoint.budget import planned
from loftq.checkpoint.claims import Crew
from loftq.checkpoint.output_dir import claim
from loftq.checkpoint.shards import Workspace
from loftq.checkpoint.shared import Engine, Prepared, Sharing
from loftq.errors import LoftqError, StorageError, UsageError, first_line, option, quoted
from loftq.formats import hashed_json
from loftq.solver.cost import constants, memory

if TYPE_CHECKING:
    from loftq.checkpoint.quantize import Begin, QuantizeOptions

TRIES = 3  # of a task, by Ray and then by us, where machines are lost
ADDRESS = re.compile(r"auto|ray://\S+:\d+|[^\s/]+:\d+")


@dataclass(frozen=True)
class Request:
    """What a worker is told."""

    model: str
    output: str
    options: "QuantizeOptions"


def engine(model: str, ready: Prepared) -> Engine:
    """Makes units by the tasks of a cluster that runs already.

    Raises: UsageError for what is no address; StorageError where no cluster answers.
    """
    address = str(ready.options.cluster)
    if not ADDRESS.fullmatch(address):
        raise UsageError(f"{option('cluster')}: {quoted(address)} is neither auto nor an address like ray://HOST:10001")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except Exception as e:  # each kind of address has its own
        why = quoted(str(e).strip().rpartition("\n")[2] or type(e).__name__, 200)
        begin = "`ray start --head` begins one on this machine"
        raise StorageError(f"{option('cluster', address)}: no Ray cluster answers ({why}); {begin}") from e
    place = Path(model).expanduser()
    options = ready.options
    if options.calibrate is not None:
        options = replace(options, calibrate=str(Path(options.calibrate).resolve()))
    request = Request(str(place.resolve()) if place.exists() else model, str(ready.work.target), options)
    return lambda sharing, begin: _make_units(sharing, request, begin)


def _make_units(sharing: Sharing, request: Request, begin: "Begin | None") -> None:
    """Hand out the units that have no record, and again those whose machines are lost."""
    counts = {share.record: share.items for share in sharing.shares()}
    left = [share for share in sharing.shares() if not share.record.exists()]
    known = sum(counts.values()) - sum(share.items for share in left)
    advance = begin(sum(counts.values()), known) if begin else lambda _: None
    task = ray.remote(make_unit).options(max_retries=TRIES, **_needs(sharing))
    tasks = {task.remote(request, int(share.record.stem)): share for share in team.in_order(left, "")}
    lost: Counter[Path] = Counter()
    while tasks and not sharing.over():
        done, _ = ray.wait(list(tasks), timeout=team.POLL)
        for reference in done:
            share = tasks.pop(reference)
            try:
                ray.get(reference)
            except RayTaskError as e:
                raise e.cause if isinstance(e.cause, LoftqError) else e from None
            except RayError as e:
                lost[share.record] += 1
                if lost[share.record] >= TRIES:
                    raise StorageError(
                        f"{share.record.stem}: its machines were lost {TRIES} times ({first_line(e)}); look after the "
                        "cluster, then run the same command again to continue"
                    ) from e
            if share.record.exists():
                for _ in range(share.items):
                    advance({})
            else:
                tasks[task.remote(request, int(share.record.stem))] = share


def _needs(sharing: Sharing) -> Mapping[str, Any]:
    """What a task takes of its machine: CPUs, memory by the law of costs, a GPU."""
    options, plan = sharing.options, sharing.job.source.plan
    workers = options.workers or 1
    calibrated = sharing.statistics is not None
    largest = max((memory(*m.shape, plan.solve, calibrated) for m in plan.matrices), default=0)
    gpus = 0 if torch.device(options.device).type == "cpu" else 1
    return {"num_cpus": workers, "num_gpus": gpus, "memory": constants()["bytes_of_process"] + workers * largest}


_joined: dict[str, Sharing] = {}  # of this worker, which gets many tasks of a run


def make_unit(request: Request, index: int) -> None:
    """A task: join the run, and make one unit, or wait until another has made it."""
    key = repr(request)
    if key not in _joined:
        _joined.clear()
        _joined[key] = _join(request)
    sharing = _joined[key]
    share = next(share for share in sharing.shares() if int(share.record.stem) == index)
    sharing.make_units(None, [share], sharing.options.workers or 1)


def _join(request: Request) -> Sharing:
    from loftq.checkpoint.quantize import prepared

    ready = prepared(request.model, Workspace(Path(request.output)), request.options)
    claim(ready.work, ready.job.identity, ready.job.source.directory, shared=True)
    sharing = Sharing(ready, Crew(ready.work.root).__enter__())  # for as long as this process lives
    choice = ready.work.root / "choice.json"
    if choice.exists():
        sharing.job = ready.respend(planned(ready.job.source, ready.options.policy, hashed_json.load(choice)))
    return sharing
