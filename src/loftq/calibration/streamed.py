"""Second moments collected block by block; only those of the block in work are kept, on disk.

Nothing depends on the order: a block is given what the dense model gives it, whatever was quantized before. In the
directory are the block's moments, what the last finished block handed on to the next, and ``state.json``, written
after both, which says what they are. A run that was stopped goes on from there.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from loftq.calibration.calibrate import Asked
from loftq.calibration.collect import Begin, Step
from loftq.calibration.states import read_states, write_states
from loftq.errors import InputError, listed
from loftq.formats import fsio, hashed_json
from loftq.formats.stack_statistics import members_of, names
from loftq.formats.statistics import Statistics, warn_if_few, write_groups
from loftq.planning import Matrix

logger = logging.getLogger("loftq")

STATE = "state.json"


class Streamed:
    """Statistics that are collected as they are used.

    Attributes:
        kind, identity: as of :class:`Statistics`; no hash of the moments is in it, they are not there yet.
    """

    def __init__(self, asked: Asked, begin: Begin | None = None) -> None:
        self._asked, self._begin = asked, begin
        self.kind = asked.options.kind
        self.identity = asked.of
        self._rows: list[dict[str, Any]] = []
        self._told = False

    def blocks(self, place: Path, wanted: set[str]) -> Iterator[Statistics]:
        """The statistics of block after block; they are gone when the next ones are asked for.

        Args:
            place: a directory for what is in work; the caller removes it when it needs none of this any more.
            wanted: modules whose moments are needed. Blocks from before a stopped run, of which none is, are not
                collected again.

        Raises: as :func:`loftq.calibration.calibrate.calibrate`.
        """
        left = self._left(place, wanted)
        after, self._rows = None, []
        if left is None:
            fsio.remove_tree(place)
            fsio.make_dirs(place)
        else:
            after, self._rows, found = left
            yield found
            found.forget()
            _tidy(place)
            if after is None:
                return
        for step in self._asked.steps(place / "offload", self._begin, after=after):
            if step.groups:
                name = f"block-{len(self._rows):05d}.safetensors"
                file = {name: asdict(write_groups(place / name, step.groups))}
                manifest = self._asked.manifest(file, [group.row(name) for group in step.groups])
                step.groups.clear()  # from now on they are read from the file
                self._keep(place, step, {"manifest": manifest, "rows": self._rows})
                self._rows = [*self._rows, *manifest["groups"]]
                found = Statistics.stored(place, {**manifest, "sha256": ""}, warn=False)
                yield found
                found.forget()
                fsio.remove(place / name)

    def tell(self, unreached: Sequence[Matrix], tokens: Sequence[int]) -> None:
        """Warn, once all that is needed was collected, and once for all that use it, as :func:`tell` does."""
        if not self._told:
            warn_if_few(self.kind, self._rows, len(self._asked.rows))
            tell(unreached, tokens)
        self._told = True

    def _keep(self, place: Path, step: Step, state: dict[str, Any]) -> None:
        """Make this the step to go on from: the last one, or one whose states can be kept."""
        states, named = place / f"states-{len(state['rows']):05d}.safetensors", None
        if step.event is not None:
            digest = None if step.states is None else write_states(states, step.states)
            if digest is None:
                return
            named = {"file": states.name, "digest": asdict(digest), "event": step.event}
        hashed_json.write(place / STATE, {**state, "states": named})
        for old in place.glob("states-*.safetensors"):
            if old != states or named is None:
                fsio.remove(old)

    def _left(self, place: Path, wanted: set[str]) -> tuple[Step | None, list[dict[str, Any]], Statistics] | None:
        """What a stopped run left: the step to go on from, rows of ``statistics.json``, the moments of its block.

        None if there is nothing to go on from: moments that are needed are gone, or a file was changed. No step after
        the last one.
        """
        if not (place / STATE).is_file():
            return None
        try:
            state = hashed_json.load(place / STATE)
            manifest, rows, states = state["manifest"], state["rows"], state["states"]
            if wanted.intersection(module for row in rows for module in names(row)):
                return None
            if wanted.intersection(module for row in manifest["groups"] for module in names(row)):
                found = Statistics.stored(place, {**manifest, "sha256": ""}, warn=False)
            else:  # its moments may be gone, and are not needed
                found = Statistics.of(self.kind, [], len(self._asked.rows))
            rows = [*rows, *manifest["groups"]]
            if states is None:
                return None, rows, found
            path = place / states["file"]
            if asdict(fsio.sha256_file(path)) != states["digest"]:
                return None
            return Step(states["event"], [], read_states(path, self._asked.options.device)), rows, found
        except InputError as e:
            logger.warning("%s; the texts are run from the beginning", e)
            return None


def _tidy(place: Path) -> None:
    """Remove what is not to be gone on from: moments that were used, and what was being written when a run stopped."""
    for path in place.iterdir():
        if path.is_dir():
            fsio.remove_tree(path)
        elif path.name != STATE and not (path.name.startswith("states-") and path.suffix == ".safetensors"):
            fsio.remove(path)


def waves(
    statistics: Statistics | Streamed | None, place: Path, matrices: Sequence[Matrix]
) -> Iterator[tuple[list[Matrix], Statistics | None]]:
    """All matrices, some at a time, with what is known of the inputs of these: all at once, or block after block.

    Args:
        place: a directory for a calibration that is collected as it is used.
    """
    if not isinstance(statistics, Streamed):
        yield list(matrices), statistics
        return
    left, tokens = list(matrices), []
    for found in statistics.blocks(place, _modules(left)) if left else ():
        some, left = reached(left, found)
        tokens += tokens_of_experts(some, found)
        yield some, found
        if not left:
            break
    statistics.tell(left, tokens)
    if left:
        yield left, None
    fsio.remove_tree(place)


def reached(matrices: Sequence[Matrix], statistics: Statistics) -> tuple[list[Matrix], list[Matrix]]:
    """Matrices with statistics of their inputs, and those without."""
    there = set(statistics.modules)
    known = [not there.isdisjoint(_modules([m])) for m in matrices]
    yes, no = ([m for m, is_known in zip(matrices, known, strict=True) if is_known is side] for side in (True, False))
    return yes, no


def tokens_of_experts(matrices: Sequence[Matrix], statistics: Statistics) -> list[int]:
    """How many tokens each expert of the stacks among ``matrices`` was fitted on."""
    wanted, stacks = _modules(matrices), statistics.routed.items()
    return [n for stack, counts in stacks if wanted.intersection(members_of(stack, len(counts))) for n in counts]


def _modules(matrices: Sequence[Matrix]) -> set[str]:
    return {one.module for m in matrices for one in m.members}


def tell(unreached: Sequence[Matrix], tokens: Sequence[int]) -> None:
    """Warn of what is solved by weights alone, for want of statistics, and of experts that few tokens came to.

    Args:
        unreached: matrices without statistics. Of these an embedding has no inputs.
        tokens: that experts were fitted on.
    """
    without = list(dict.fromkeys(m.module for m in unreached if m.kind != "embedding"))
    if without:
        logger.warning(
            "no statistics for %s: solved by their weights, as without a calibration; the texts did not reach them",
            listed(without, 3),
        )
    if tokens:
        logger.warning(
            "calibration: of %d experts' matrices each was fitted on %d tokens at least, %d in the median; %d got none "
            "and are solved by what is known of their layer",
            *(len(tokens), min(tokens), median(tokens), tokens.count(0)),
        )
