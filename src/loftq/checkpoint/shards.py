"""The unit of work, one output shard: which tensors it holds, how it is made, and how it is known to be done.

What a shard contains is fixed by the plan alone, so a plain, a parallel and a resumed run make the same bytes. A unit
is done when its record is whole and its files have the recorded hashes. Until then its matrices wait in ``pieces``.
"""

import hashlib
import itertools
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loftq.architecture.adapter import adapter_product, adapter_shapes, adapter_tensors, stacked_adapter
from loftq.architecture.experts import STACKS
from loftq.errors import InputError, LoftqError, NumericalError, naming, option, quoted
from loftq.formats import fsio, hashed_json
from loftq.formats.layouts import Layout
from loftq.formats.regular import PARTIAL
from loftq.formats.source import Checkpoint
from loftq.formats.tensorfile import DTYPES, Entry, encode_header, in_shards, tensor_bytes
from loftq.numerics import Metric, Moments, frobenius, oriented
from loftq.planning import NO_PARAMETER, Kept, Matrix, Plan
from loftq.solver import check_finite, solve

logger = logging.getLogger("loftq")


@dataclass(frozen=True)
class Unit:
    """One output shard, its tensors in the order of the file."""

    index: int
    file_name: str
    tensors: tuple[Matrix | Kept, ...]

    @property
    def matrices(self) -> list[Matrix]:
        return [t for t in self.tensors if isinstance(t, Matrix)]

    @property
    def members(self) -> list[Matrix]:
        """The matrices that are solved, each expert of a stack for itself."""
        return [member for matrix in self.matrices for member in matrix.members]

    def entries(self, layout: Layout) -> list[Entry]:
        return [e for t in self.tensors for e in entries(t, layout)]

    def adapter_entries(self) -> list[Entry]:
        return [e for m in self.matrices for e in adapter_entries(m)]


@dataclass(frozen=True)
class Solved:
    """A matrix as it will be written, and what is known about it."""

    matrix: Matrix
    stored: list[Tensor]
    adapter: dict[str, Tensor]
    report: dict[str, Any]


def entries(tensor: Matrix | Kept, layout: Layout) -> list[Entry]:
    if isinstance(tensor, Kept):
        return [Entry(t.name, t.dtype, t.shape) for t in _copied(tensor, layout)]
    return layout.entries(tensor)


def _copied(kept: Kept, layout: Layout) -> list[Kept]:
    """The tensors of the source that a kept one is all of, where the layout has them; else itself."""
    found = kept.sources if layout.restores else {}
    return [replace(kept, name=name, shape=shape, made=()) for name, shape in found.items()] or [kept]


def adapter_entries(matrix: Matrix) -> list[Entry]:
    return [Entry(name, matrix.factors, shape) for name, shape in adapter_shapes(matrix).items()]


def split(plan: Plan, layout: Layout, max_shard_bytes: int, order: list[str]) -> list[Unit]:
    """Fill shards with tensors in the given order, each up to ``max_shard_bytes`` (a larger tensor has its own)."""
    by_name = {t.name: t for t in (*plan.matrices, *plan.kept)}
    shards = in_shards(
        (by_name[name] for name in order), lambda t: sum(e.nbytes for e in entries(t, layout)), max_shard_bytes
    )
    return [Unit(i, name, tuple(shard)) for i, (name, shard) in enumerate(shards.items())]


def suitable(plan: Plan) -> int:
    """Bytes of a shard such that there are about a thousand, and none below 64 MiB or above 1 GiB.

    Depends on the plan alone, so that any number of processes makes the same files.
    """
    packed = sum(t.bytes for t in (*plan.matrices, *plan.kept))
    return min(max(packed // 1024, 64 << 20), 1 << 30)


def solve_matrix(
    matrix: Matrix, checkpoint: Checkpoint, plan: Plan, layout: Layout, device: str, moments: Moments | None = None
) -> Solved:
    """Read, solve and encode one matrix; measure the errors on the tensors that will be written."""
    with naming(matrix.name, matrix.shape, option("workers")):
        raw = checkpoint.read(matrix.name, matrix.made)
        source_sha256 = hashlib.sha256(tensor_bytes(raw)).hexdigest()
        weight = oriented(matrix.kind, raw).contiguous()
        solution = solve(weight.to(device), matrix.quant, matrix.rank, plan.solve, matrix.name, moments)
        s = plan.scaling(matrix)
        b, a = (factor.cpu() for factor in solution.factors(s))
        exact = adapter_tensors(matrix, b, a)
        adapter = {name: t.to(DTYPES[matrix.factors]) for name, t in exact.items()}
        codes = type(solution.quantized)(
            solution.quantized.codes.cpu(), {k: v.cpu() for k, v in solution.quantized.scales.items()}
        )
        stored = layout.encode(matrix, codes)
        held = moments and moments.held
        written = _measured(weight, matrix, stored, adapter, s, layout, held, solution.output_norm)
    traces = {"errors": list(solution.errors), "output_errors": list(solution.output_errors)}
    traces = {name: trace for name, trace in traces.items() if trace}
    for name, trace in traces.items():
        measure, norm = frobenius, frobenius(weight)
        if held is not None and name == "output_errors":
            measure, norm = held.norm, solution.output_norm
        rest = abs(written[name] - trace[solution.kept]) - 1e-3 * trace[0] - 1e-6
        if not layout.rounds and rest > 0 and rest > measure(_rounding(matrix, exact, adapter, s)) / (norm or 1.0):
            raise LoftqError(
                f"{matrix.name}: the written tensors have {name} {written[name]}, the solver found "
                f"{trace[solution.kept]}; please report this"
            )
        trace[solution.kept] = written[name]
    report = {
        "name": matrix.name,
        "shape": list(matrix.shape),
        "bits": matrix.quant.bits,
        "rank": matrix.rank,
        "alpha": plan.lora_alpha,
        "bytes": sum(e.nbytes for e in layout.entries(matrix)),
        **traces,
        "kept": solution.kept,
        "qlora_error": solution.errors[0],
        "norm": frobenius(weight),
        **({} if moments is None else {"output_norm": solution.output_norm}),
        **({"tokens": moments.tokens} if moments and matrix.kind in STACKS else {}),
        "adapter_norm_ratio": written["product"],
        "source_sha256": source_sha256,
        **({"instead": matrix.instead} if matrix.instead else {}),
    }
    return Solved(matrix, stored, adapter, report)


def _rounding(matrix: Matrix, exact: dict[str, Tensor], adapter: dict[str, Tensor], s: float) -> Tensor:
    """What ``s·BA`` lost as its factors were rounded to their dtype: an error changes by its norm at the most."""
    return (adapter_product(matrix, adapter) - adapter_product(matrix, exact)).mul_(s)


def _measured(
    weight: Tensor,
    matrix: Matrix,
    stored: list[Tensor],
    adapter: dict[str, Tensor],
    s: float,
    layout: Layout,
    held: Metric | None,
    output_norm: float,
) -> dict[str, float]:
    """Of the very tensors that are written: ``errors`` ``||W - Q - s·BA|| / ||W||``, ``product`` ``||s·BA|| / ||W||``.

    With a metric of tokens held out, ``output_errors`` too: the first in that.
    """
    for tensor in (*stored, *adapter.values()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NumericalError(
                "a tensor to be written is not finite; the weights' range is too wide for its dtype: "
                f"see {option('scale_dtype')}, {option('adapter_dtype')}"
            )
    norm = frobenius(weight) or 1.0
    product = adapter_product(matrix, adapter).mul_(s)
    part = frobenius(product) / norm
    rest = product.add_(layout.decode(matrix, stored)).sub_(weight)
    found = {"errors": frobenius(rest) / norm, "product": part}
    if held is not None:
        found["output_errors"] = held.norm(rest) / (output_norm or 1.0)
    return found


class Workspace:
    """The directory beside the output in which units are collected until all are there.

    Attributes:
        target: the output's directory.
        maker: where several processes share it, the one whose files these are: two may make the same unit.
        leaves: whether a unit that is finished takes no more space here.
    """

    leaves = False

    def __init__(self, output: Path, maker: str = "") -> None:
        self.target, self.maker = output, maker
        self.root = output.with_name(f"{output.name}{PARTIAL}")
        self.lock, self.identity = self.root / "lock", self.root / "identity.json"
        self.tasks = self.root / "tasks.json"  # what is to be done, for those who ask how far it is
        self.curves = self.root / "curves.json"  # of a budget
        self.units = self.root / "units"
        self.output = self.root / (f"output.{maker}" if maker else "output")
        self.replaced = self.root / "replaced"  # by --overwrite, until the new output stands

    def by(self, record: dict[str, Any]) -> "Workspace":
        """As the process sees it that made a unit, by its record."""
        return Workspace(self.target, record.get("maker", ""))

    def shard(self, unit: Unit) -> Path:
        """Of a process that shares the workspace among the units: which process assembles is not known yet."""
        return self.units / f"{unit.index:05d}.{self.maker}.shard" if self.maker else self.output / unit.file_name

    def piece(self, unit: Unit) -> Path:
        name = f"{unit.index:05d}.{self.maker}" if self.maker else f"{unit.index:05d}"
        return self.units / f"{name}.safetensors"

    def record(self, unit: Unit) -> Path:
        return self.units / f"{unit.index:05d}.json"

    def solved(self, unit: Unit) -> Path:
        """Where the matrices of a unit wait until its shard is written."""
        return self.units / f"{unit.index:05d}"

    def solved_matrix(self, unit: Unit, place: int) -> Path:
        """Of the matrix at a place among those of the unit."""
        return self.solved(unit) / f"{place:05d}.safetensors"

    def claimed(self) -> None:
        """Called as soon as the identity is there."""

    def finished(self, unit: Unit, trusted: bool = False) -> dict[str, Any] | None:
        """The record of a unit that is done; None if its record is missing, or it or its files were changed.

        Args:
            trusted: that the files are as they were written, in this very run.
        """
        if not self.record(unit).exists():
            return None
        try:
            record = hashed_json.load(self.record(unit))
            found = {"shard": self.by(record).shard(unit), "piece": self.by(record).piece(unit)}
            if trusted or all(record[key] == asdict(fsio.sha256_file(path)) for key, path in found.items()):
                return record
        except InputError:
            pass
        logger.warning("%s: its bytes are not those that were recorded; it is made again", unit.file_name)
        return None

    def make(
        self, unit: Unit, solved: Iterator[Solved], checkpoint: Checkpoint, layout: Layout, began: float
    ) -> dict[str, Any]:
        """Write a unit's shard, its part of the adapter and, last, its record; no matrix has to wait any more.

        Where processes share the workspace, the first record stays, whoever made it.

        Args:
            began: the work on it, by the monotonic clock; the record says how long it took, and who did it.
        """
        reports: list[dict[str, Any]] = []
        adapter: dict[str, Tensor] = {}

        def contents() -> Iterator[bytes | memoryview]:
            yield encode_header(unit.entries(layout), {"format": "pt"})
            for tensor in unit.tensors:
                if isinstance(tensor, Kept):
                    for copied in _copied(tensor, layout):
                        yield from map(tensor_bytes, read_finite(copied, checkpoint))
                    continue
                members = itertools.islice(solved, tensor.count)
                yield from _written(tensor, members, bool(layout.restores and tensor.sources), reports, adapter)

        def adapter_contents() -> Iterator[bytes | memoryview]:
            yield encode_header(unit.adapter_entries(), {"format": "pt"})
            for entry in unit.adapter_entries():
                yield tensor_bytes(adapter.pop(entry.name))

        try:
            shard = fsio.write_atomic(self.shard(unit), contents())
            piece = fsio.write_atomic(self.piece(unit), adapter_contents())
            record = {"shard": asdict(shard), "piece": asdict(piece), "matrices": reports}
            record |= {"host": socket.gethostname(), "pid": os.getpid(), "seconds": time.monotonic() - began}
            if self.maker:
                record["maker"] = self.maker
                hashed_json.create(self.record(unit), record)
            else:
                record = hashed_json.write(self.record(unit), record)
        finally:
            if self.maker and not self._counts(unit):
                fsio.remove(self.shard(unit))
                fsio.remove(self.piece(unit))
        fsio.remove_tree(self.solved(unit))
        return record

    def _counts(self, unit: Unit) -> bool:
        """Whether the record of a unit is of the files of this maker; they only take space if it is another's."""
        try:
            return hashed_json.load(self.record(unit))["maker"] == self.maker
        except InputError:
            return self.record(unit).exists()


def _written(
    matrix: Matrix,
    members: Iterator[Solved],
    apart: bool,
    reports: list[dict[str, Any]],
    adapter: dict[str, Tensor],
) -> Iterator[memoryview]:
    """The bytes of a matrix or stack. Of a stack the codes are written as they come; what follows them has to wait,
    unless the tensors of each expert stay together.
    """
    found = []
    for member in members:
        first, others = (member.stored, []) if apart else (member.stored[:1], member.stored[1:])
        yield from map(tensor_bytes, first)
        found.append((others, member.adapter, member.report))
    for tensors in zip(*(others for others, _, _ in found), strict=True):
        yield from map(tensor_bytes, tensors)
    reports.append(_together(matrix, [report for *_, report in found]))
    factors = [factors for _, factors, _ in found]
    adapter.update(stacked_adapter(matrix, factors) if matrix.experts else factors[0])


def _together(matrix: Matrix, members: list[dict[str, Any]]) -> dict[str, Any]:
    """The report on a stack: errors before and after, of all its experts together, and after of each."""
    if not matrix.experts:
        return members[0]
    report = {**members[0], "name": matrix.name, "bytes": sum(m["bytes"] for m in members)}
    kinds = {"errors": "norm", "output_errors": "output_norm"}
    for kind, norm in kinds.items():
        if not all(kind in m for m in members):
            report.pop(kind, None)
            continue
        whole = math.hypot(*(m[norm] for m in members))
        first = math.hypot(*(m[kind][0] * m[norm] for m in members))
        last = math.hypot(*(m[kind][m["kept"]] * m[norm] for m in members))
        report |= {kind: [first / (whole or 1.0), last / (whole or 1.0)], norm: whole}
    ratios = (m["adapter_norm_ratio"] * m["norm"] for m in members)
    return {
        **report,
        "kept": int(any(m["kept"] for m in members)),
        "qlora_error": report["errors"][0],
        "adapter_norm_ratio": math.hypot(*ratios) / (report["norm"] or 1.0),
        "source_sha256": hashlib.sha256("".join(m["source_sha256"] for m in members).encode()).hexdigest(),
        "experts": [m["errors"][m["kept"]] for m in members],
        **({"tokens": [m["tokens"] for m in members]} if "tokens" in report else {}),
    }


def read_finite(kept: Kept, checkpoint: Checkpoint) -> Iterator[Tensor]:
    """A tensor that is copied, in its new dtype, one expert after the other if it is put together of many.

    Infinity in a buffer is a limit that is off, as in a mask.

    Raises: NumericalError if it holds NaN or infinity, or comes to.
    """
    for made in [(pieces,) for pieces in kept.made] or [()]:
        original = checkpoint.read(kept.name, made)
        tensor = original.to(DTYPES[kept.dtype])
        if tensor.is_floating_point() and not kept.dtype.startswith("F8"):
            try:
                limits = kept.reason == NO_PARAMETER and not original.isnan().any()
                check_finite(tensor[~original.isinf()] if limits else tensor)
            except NumericalError as e:
                told = str(e)
                if original.isfinite().all():
                    wider = option("dtype", "bfloat16" if kept.dtype == "F16" else "source")
                    dtype, beyond = str(tensor.dtype).removeprefix("torch."), int(tensor.isinf().sum())
                    told = f"{beyond} of {tensor.numel()} values lie beyond {dtype}; use {wider}"
                raise NumericalError(f"{quoted(kept.name)}: {told}") from e
        yield tensor
