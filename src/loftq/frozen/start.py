"""``loftq start``: an adapter directory for a model that is quantized already, from the original weights on disk.

The base is loaded, the original read matrix by matrix. Every layer's factors are put into ``OUTPUT.loftq-partial`` once
they are known, and the same command continues from there. One rename then makes ``OUTPUT`` of all of them, which is
absent or complete whatever happens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from loftq.architecture.experts import layers_of
from loftq.architecture.kinds import kind_of
from loftq.checkpoint.manifest import Count, Name, Number, Part, Shape
from loftq.checkpoint.output_dir import MACHINE
from loftq.checkpoint.produce import Files, Mark, produce
from loftq.checkpoint.shards import Workspace
from loftq.errors import InputError, StorageError, quoted
from loftq.formats import fsio, hashed_json
from loftq.formats.regular import output_path
from loftq.formats.statistics import Statistics
from loftq.formats.tensorfile import Entry, dtype_name, encode_header, read_chunks, read_header, tensor_bytes
from loftq.frozen.replace import Begin, Layer, Original, fit, summary
from loftq.numerics.device import check_device
from loftq.numerics.machine import code_path
from loftq.options import default, fields_of
from loftq.planning import Matrix, Piece, Plan, Policy
from loftq.sources.checkpoint import Source, open_source, resolve
from loftq.sources.identity import stamp
from loftq.spec import SolveSpec
from loftq.version import __version__

REPORT = "loftq_start.json"


class _LayerRow(Part):
    name: Name
    shape: Shape
    rank: Count
    errors: Annotated[list[Number], Field(min_length=2, max_length=2)]
    reason: str


class _Report(Mark):
    layers: list[_LayerRow]
    error_before: Number
    error: Number
    output_error_before: Number | None = None
    output_error: Number | None = None


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What to make.

    Attributes:
        policy: which matrices get an adapter, of which rank and scaling; its widths and codes do not matter here.
        base_revision, revision: branch, tag or commit of the base and of the original, where they are hub ids.
    """

    policy: Policy = field(default_factory=Policy)
    statistics: Statistics | None = None
    device: str = default("device")
    base_revision: str | None = None
    revision: str | None = default("revision")
    task_type: str | None = default("task_type")


def start_options(given: Mapping[str, Any], statistics: Statistics | None, base_revision: str | None) -> StartOptions:
    """The options of a run out of a caller's, by name."""
    solve = SolveSpec(**fields_of(SolveSpec, given))
    return StartOptions(
        policy=Policy(**fields_of(Policy, given), solve=solve),
        statistics=statistics,
        base_revision=base_revision,
        **fields_of(StartOptions, given),
    )


def start(base: str, weights: str, output: Path, options: StartOptions, begin: Begin) -> dict[str, Any]:
    """Make the adapter directory ``output``; its report: that of :func:`loftq.frozen.replace.summary`, and options.

    Args:
        base: directory or hub id of the frozen model, in any quantization that transformers loads on this machine.
        weights: directory or hub id of the original.

    Raises: ConflictError if ``output`` is taken; InputError if ``weights`` is not the original of ``base``.
    """
    from loftq.frozen.layers import load

    check_device(options.device)
    work = Workspace(output_path(output))
    original = open_source(weights, options.policy, options.revision)
    directory = resolve(base, options.base_revision)
    name = str(directory.resolve()) if Path(base).expanduser().exists() else base
    report: dict[str, Any] = {}

    def fill(place: Path) -> Files:
        model = load(directory, options.device)
        source, experts = _unfused(original, model)
        plan = _located(source, model)
        config = _adapter_config(plan, source, model, name, options)
        report.update(_solve(plan, source, model, experts, options, work, begin))
        return {
            "adapter_model.safetensors": fsio.write_atomic(place / "adapter_model.safetensors", _joined(work, plan)),
            "adapter_config.json": fsio.write_json(place / "adapter_config.json", config),
        }

    return produce(
        output,
        _identity(original, directory, options),
        [original.directory, directory],
        None,
        fill,
        lambda: report,
        mark=(REPORT, _Report),
        resumed_after=(StorageError,),
    )


def _identity(source: Source, base: Path, options: StartOptions) -> dict[str, Any]:
    """Everything that the bytes of the result depend on."""
    files = sorted(p for p in base.iterdir() if p.suffix in (".safetensors", ".bin", ".json") and p.is_file())
    return {
        "source": stamp(source),
        "base": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "plan": source.plan.digest(),
        "options": {
            **options.policy.to_dict(),
            "svd": options.policy.solve.svd,
            "seed": options.policy.solve.seed,
            "device": options.device.partition(":")[0],
            "task_type": options.task_type,
        },
        **({"statistics": options.statistics.identity} if options.statistics else {}),
        "loftq": __version__,
        "torch": torch.__version__,
        MACHINE: code_path(options.device),
    }


def _unfused(source: Source, model: Any) -> tuple[Source, dict[str, str]]:
    """The source with a matrix for each layer of an expert, and how statistics call the expert.

    Stacks are left alone that the frozen model has as they are: they are no layers, and hold the original's weights.
    """
    from loftq.architecture import skeleton

    there, matrices, experts = {name for name, _ in model.named_modules()}, [], {}
    built = skeleton.build(source.directory) if any(m.experts for m in source.plan.matrices) else None
    for matrix in source.plan.matrices:
        if not matrix.experts or built is None:
            matrices.append(matrix)
            continue
        module, made = built.get_submodule(matrix.module.rpartition(".")[0]), matrix.made if matrix.sources else ()
        known = matrix.sources or all(len(pieces) == 1 for pieces in matrix.pieces)
        layers = layers_of(matrix.module, made, matrix.experts, matrix.shape[0], module) if known else {}
        if layers and all(there.intersection(skeleton.spellings(name, source.prefix)) for name in layers):
            found = [_layer(matrix, name, expert, rows) for name, (expert, rows) in layers.items()]
            matrices += found
            experts |= {m.name: f"{matrix.module}.{layers[m.module][0]}" for m in found}
    if not matrices:
        raise InputError(
            f"{source.directory}: no layer to initialize but stacks of experts, which this verb does not support"
        )
    return replace(source, plan=replace(source.plan, matrices=tuple(matrices))), experts


def _layer(stack: Matrix, name: str, expert: int, rows: slice) -> Matrix:
    """One layer of an expert: a tensor of the source, or rows of its stack."""
    shape = (len(range(*rows.indices(stack.shape[0]))), stack.shape[1])
    one = replace(stack, name=f"{name}.weight", module=name, kind="linear", shape=shape, experts=0, nested=0, made=())
    if stack.sources:
        return one
    whole, (piece,), out = stack.pieces[expert][0].shape, stack.pieces[expert], stack.shape[0]
    begin, end, step = rows.indices(out)
    place, transposed = expert * out, stack.kind != "experts"
    made = Piece(piece.tensor, whole, place + begin, place + end, step, transposed)
    return replace(one, made=((made,),))


def _located(source: Source, model: Any) -> Plan:
    """The plan with the names that its modules have in the frozen model, which may have another head."""
    from loftq.architecture.skeleton import spellings

    modules = dict(model.named_modules())
    matrices = []
    for matrix in source.plan.matrices:
        name = next((n for n in spellings(matrix.module, source.prefix) if n in modules), None)
        if name is None:
            raise InputError(
                f"{quoted(matrix.module)}: {type(model).__name__} has no such module; another model's base?"
            )
        matrices.append(replace(matrix, module=name))
    return replace(source.plan, matrices=tuple(matrices))


def _adapter_config(plan: Plan, source: Source, model: Any, base: str, options: StartOptions) -> dict[str, Any]:
    from loftq.architecture.adapter import adapter_config, chosen_task, task_type, text_tasks

    chosen = {m.module for m in plan.matrices}
    others = [name for name, _ in model.named_modules() if name not in chosen]
    task = chosen_task(options.task_type, task_type(model), text_tasks(model), type(model).__name__)
    prefix = str(model.base_model_prefix)
    transposed = any(kind_of(model.get_submodule(name)) == "conv1d" for name in chosen)
    named = type(model).__name__, type(model).__module__
    others += source.kept_modules
    return adapter_config(plan, others, prefix, base, task, transposed, model_class=named)


def _solve(
    plan: Plan,
    source: Source,
    model: Any,
    experts: Mapping[str, str],
    options: StartOptions,
    work: Workspace,
    begin: Begin,
) -> dict[str, Any]:
    """Put every layer's factors into a file of its own, where they are not there yet; the summary of all layers."""
    from loftq.architecture.adapter import adapter_tensors

    records = [_finished(work, i, matrix) for i, matrix in enumerate(plan.matrices)]
    advance = begin(len(records), sum(record is not None for record in records))
    modules = {m.name: m.module for m in source.plan.matrices}  # as the original calls them
    if options.statistics and options.statistics.kind != "fisher":  # which knows the rows of whole matrices
        modules |= experts
    for i, matrix in enumerate(plan.matrices):
        if records[i] is not None:
            continue
        original = Original(matrix.name, modules[matrix.name], matrix.dtype, matrix.shape, matrix.kind, "", matrix.made)
        base = model.get_submodule(matrix.module)
        layer = Layer(matrix.module, base, original, matrix.rank, plan.scaling(matrix))
        fitted = fit(layer, source.checkpoint, options.policy.solve, options.statistics)
        tensors = adapter_tensors(matrix, fitted.b.cpu(), fitted.a.cpu())
        entries = [Entry(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
        piece = fsio.write_atomic(_piece(work, i), [encode_header(entries), *map(tensor_bytes, tensors.values())])
        records[i] = hashed_json.write(_record(work, i), {"piece": asdict(piece), "report": fitted.report})
        advance(fitted.report)
    return summary([record["report"] for record in records if record], {})


def _piece(work: Workspace, index: int) -> Path:
    return work.units / f"{index:05d}.safetensors"


def _record(work: Workspace, index: int) -> Path:
    return work.units / f"{index:05d}.json"


def _finished(work: Workspace, index: int, matrix: Matrix) -> dict[str, Any] | None:
    """The record of a layer that is done; None if it, or what it is of, is missing or was changed."""
    if not _record(work, index).exists():
        return None
    try:
        record = hashed_json.load(_record(work, index))
        whole = record["piece"] == asdict(fsio.sha256_file(_piece(work, index)))
        return record if whole and record["report"]["name"] == matrix.module else None
    except InputError:
        return None


def _joined(work: Workspace, plan: Plan) -> Iterator[bytes | memoryview]:
    """The adapter's weights, of all pieces."""
    pieces = [read_header(_piece(work, i)) for i in range(len(plan.matrices))]
    infos = [(info, piece.stamp) for piece in pieces for info in piece.tensors.values()]
    yield encode_header([Entry(info.name, info.dtype, info.shape) for info, _ in infos], {"format": "pt"})
    for info, opened in infos:
        yield from read_chunks(info, opened)
