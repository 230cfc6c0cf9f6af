"""Units made by the workers of a Ray cluster, on a directory that all its machines see.

A task is a unit. The worker finds out for itself, as every process of a shared run does, what is to be done: nothing
but the model's name, the options and the unit's number is sent. Ray starts a task again where a node is lost; what
the lost one had solved is still there, and so it is when the driver is lost and started again.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray  # type: ignore[reportMissingImports]
import torch
from ray.exceptions import RayError, RayTaskError  # type: ignore[reportMissingImports]

from loftq.checkpoint import team
from loftq.checkpoint.claims import Crew
from loftq.checkpoint.curves import Curves
from loftq.checkpoint.output_dir import claim
from loftq.checkpoint.shards import Workspace
from loftq.checkpoint.shared import Engine, Prepared, Sharing
from loftq.checkpoint.team import Share
from loftq.errors import LoftqError, StorageError, first_line, option, quoted
from loftq.formats import fsio
from loftq.solver.cost import constants, memory

if TYPE_CHECKING:
    from loftq.checkpoint.quantize import Begin, QuantizeOptions

TRIES = 3  # of a task, by Ray and then by us, where machines are lost


@dataclass(frozen=True)
class Request:
    """What a worker is told."""

    model: str
    output: str
    options: "QuantizeOptions"


class Cluster(Engine):
    """The workers of a Ray cluster that runs already.

    Raises: StorageError where no cluster answers.
    """

    def __init__(self, model: str, ready: Prepared) -> None:
        address = str(ready.options.cluster)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except Exception as e:  # each kind of address has its own
            why = quoted(str(e).strip().rpartition("\n")[2] or type(e).__name__, 200)
            begin = "`ray start --head` begins one on this machine"
            raise StorageError(f"{option('cluster', address)}: no Ray cluster answers ({why}); {begin}") from e
        options = replace(ready.options, workers=ready.options.workers or 1)
        if options.calibrate is not None:
            options = replace(options, calibrate=str(Path(options.calibrate).resolve()))
        place = Path(model).expanduser()
        name = str(place.resolve()) if place.exists() else model
        self.request = Request(name, str(ready.work.target), replace(options, curves=None))

    def measure(self, sharing: Sharing, begin: "Begin | None") -> Curves:
        if sharing.options.curves is not None:  # what that file has not, this process measures
            return sharing.measure(begin)
        shares = list(sharing.curve_shares())
        fsio.make_dirs(shares[0].record.parent)
        self._hand_out(measure_unit, sharing, shares, begin)
        return sharing.read_curves(shares)

    def make_units(self, sharing: Sharing, begin: "Begin | None") -> None:
        self._hand_out(make_unit, sharing, sharing.shares(), begin)

    def _hand_out(
        self, work: Callable[[Request, int], None], sharing: Sharing, shares: list[Share], begin: "Begin | None"
    ) -> None:
        """Have the shares made that have no record, and again those whose machines are lost."""
        left = [share for share in shares if not share.record.exists()]
        total, missing = (sum(share.items for share in some) for some in (shares, left))
        advance = begin(total, total - missing) if begin and left else lambda _: None
        task = ray.remote(work).options(max_retries=TRIES, **_needs(sharing))
        tasks = {task.remote(self.request, int(share.record.stem)): share for share in team.in_order(left, "")}
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
                            f"{share.record.stem}: its machines were lost {TRIES} times ({first_line(e)}); look after "
                            "the cluster, then run the same command again to continue"
                        ) from e
                if share.record.exists():
                    for _ in range(share.items):
                        advance({"measured": ""} if work is measure_unit else {})
                else:
                    tasks[task.remote(self.request, int(share.record.stem))] = share


def _needs(sharing: Sharing) -> Mapping[str, Any]:
    """What a task takes of its machine: CPUs, memory by the law of costs, a GPU."""
    options, plan = sharing.options, sharing.job.source.plan
    workers = options.workers or 1
    calibrated = sharing.statistics is not None
    largest = max((memory(*m.shape, plan.solve, m.quant, calibrated) for m in plan.matrices), default=0)
    gpus = 0 if torch.device(options.device).type == "cpu" else 1
    return {"num_cpus": workers, "num_gpus": gpus, "memory": constants()["bytes_of_process"] + workers * largest}


_joined: dict[str, Sharing] = {}  # of this worker, which gets many tasks of a run


def make_unit(request: Request, index: int) -> None:
    """A task: join the run, and make one unit, or wait until another has made it."""
    sharing = _join(request)
    if request.options.policy.budget and sharing.job.source.plan.budget is None:
        sharing.spend(Engine(), None)
    sharing.make_units(None, index)


def measure_unit(request: Request, index: int) -> None:
    """A task: the same, for the error curves of a unit's matrices."""
    _join(request).measure(None, index)


def _join(request: Request) -> Sharing:
    """This worker as one of those that share the run; for as long as it lives."""
    from loftq.checkpoint.quantize import prepared

    key = repr(request)
    if key not in _joined:
        _joined.clear()
        ready = prepared(request.model, Workspace(Path(request.output)), request.options)
        claim(ready.work, ready.job.identity, ready.job.source.directory, shared=True)
        _joined[key] = Sharing(ready, Crew(ready.work.root).__enter__())
    return _joined[key]
