"""``loftq start``: an adapter directory for a model that is quantized already, from the original weights on disk.

The base is loaded, the original read matrix by matrix. The files are collected in ``OUTPUT.loftq-partial``; one rename
then makes them ``OUTPUT``, which is absent or complete whatever happens.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import loftq
from loftq.errors import ConflictError, InputError, UsageError, quoted
from loftq.formats import fsio
from loftq.formats.tensorfile import Entry, dtype_name, encode_header, tensor_bytes
from loftq.numerics.device import check_device
from loftq.plan import Plan, Policy
from loftq.workflows.frozen import Begin, FitOptions, Layer, Original, fit, summary
from loftq.workflows.places import check_places, claim, publish
from loftq.workflows.source import Source, open_source, resolve
from loftq.workflows.units import Workspace

REPORT = "loftq_start.json"


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What to make.

    Attributes:
        policy: which matrices get an adapter, of which rank and scaling; its widths and codes do not matter here.
        base_revision, revision: branch, tag or commit of the base and of the original, where they are hub ids.
    """

    policy: Policy = field(default_factory=Policy)
    fit: FitOptions = field(default_factory=FitOptions)
    device: str = "cpu"
    base_revision: str | None = None
    revision: str | None = None
    task_type: str | None = None


def start(base: str, weights: str, output: Path, options: StartOptions, begin: Begin) -> dict[str, Any]:
    """Make the adapter directory ``output``; its report: that of :func:`loftq.workflows.frozen.summary`, and options.

    Args:
        base: directory or hub id of the frozen model, in any quantization that transformers loads on this machine.
        weights: directory or hub id of the original.

    Raises: ConflictError if ``output`` is taken; InputError if ``weights`` is not the original of ``base``.
    """
    from loftq.nn.frozen import load

    check_device(options.device)
    output = Path(os.path.realpath(output.expanduser()))
    work = Workspace(output)
    source, directory = open_source(weights, options.policy, options.revision), resolve(base, options.base_revision)
    for place in (source.directory, directory):
        check_places(place, work, output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConflictError(f"{output}: exists; choose another --output, or remove it")
    model = load(directory, options.device)
    plan = _located(source, model)
    name = str(directory.resolve()) if Path(base).expanduser().exists() else base
    config = _adapter_config(plan, source, model, name, options)
    identity = {
        "base": str(directory.resolve()),
        "weights": str(source.directory.resolve()),
        "plan": plan.digest(),
        "fit": {"svd": options.fit.svd, "seed": options.fit.seed},
        **({"statistics": options.fit.statistics.identity} if options.fit.statistics else {}),
    }
    fsio.make_dirs(work.root)
    with fsio.DirectoryLock(work.lock):
        claim(work, identity)
        try:
            tensors, found = _solve(plan, source, model, options.fit, begin)
            report = {"format_version": 1, "loftq": loftq.__version__, **identity, **found}
            publish(work, output, _write(work.output, tensors, config, report), overwrite=False)
        finally:
            fsio.remove_tree(work.root)
    return report


def _located(source: Source, model: Any) -> Plan:
    """The plan with the names that its modules have in the frozen model, which may have another head."""
    from loftq.nn.skeleton import spellings

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
    from transformers.pytorch_utils import Conv1D

    from loftq.nn import skeleton
    from loftq.nn.adapter import adapter_config, task_type

    chosen = {m.module for m in plan.matrices}
    others = [m for m in skeleton.adaptable(model) if m not in chosen]
    task = options.task_type or task_type(model)
    prefix = str(model.base_model_prefix)
    try:
        config = adapter_config(plan, [*others, *source.kept_modules], prefix, base, task)
    except ValueError as e:
        raise UsageError(f"--task-type {task!r}: {e}") from e
    config["fan_in_fan_out"] = any(isinstance(model.get_submodule(name), Conv1D) for name in chosen)
    return config


def _solve(
    plan: Plan, source: Source, model: Any, options: FitOptions, begin: Begin
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's tensors, and the summary of how they were found."""
    from loftq.nn.adapter import adapter_tensors

    advance = begin(len(plan.matrices), 0)
    tensors: dict[str, Tensor] = {}
    reports = []
    modules = {m.name: m.module for m in source.plan.matrices}  # as the original calls them
    for matrix in plan.matrices:
        original = Original(matrix.name, modules[matrix.name], matrix.dtype, matrix.shape, matrix.kind == "conv1d", "")
        base = model.get_submodule(matrix.module)
        fitted = fit(
            Layer(matrix.module, base, original, matrix.rank, plan.scaling(matrix)), source.checkpoint, options
        )
        tensors.update(adapter_tensors(matrix, fitted.b.cpu(), fitted.a.cpu()))
        reports.append(fitted.report)
        advance(fitted.report)
    return tensors, summary(reports, {})


def _write(
    directory: Path, tensors: dict[str, Tensor], config: dict[str, Any], report: dict[str, Any]
) -> dict[str, Any]:
    """The files of the adapter; name -> digest."""
    entries = [Entry(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    contents = [encode_header(entries, {"format": "pt"}), *map(tensor_bytes, tensors.values())]
    written = {
        "adapter_model.safetensors": fsio.write_atomic(directory / "adapter_model.safetensors", contents),
        "adapter_config.json": fsio.write_json(directory / "adapter_config.json", config),
        REPORT: fsio.write_json(directory / REPORT, report),
    }
    return {name: asdict(digest) for name, digest in written.items()}
