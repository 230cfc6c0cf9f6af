"""From the name a user gives to a checkpoint, its skeleton and its plan."""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loftq import planning
from loftq.architecture.configuration import dtype_of, quantization_of, read_config
from loftq.errors import InputError, StorageError, UsageError, first_line, listed, option, quoted
from loftq.formats import dequantized
from loftq.formats.belongings import module_paths, not_fetched
from loftq.formats.lookalikes import refuse_adapter
from loftq.formats.regular import local_path, shown, url_of
from loftq.formats.remote import fill, mounted, store
from loftq.formats.source import Checkpoint, is_quantized_source, open_checkpoint
from loftq.planning import Plan, Policy, Role

logger = logging.getLogger("loftq")

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A checkpoint with what the model says about it."""

    directory: Path
    hub_id: str | None  # None: a local directory
    checkpoint: Checkpoint
    plan: Plan
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape; what is converted as the model has it
    roles: dict[str, Role]
    prefix: str  # of the base model
    architecture: str
    library: str  # the module of that class
    task_type: str | None  # PEFT's
    text_tasks: set[str]  # PEFT's that fit
    modules: list[str]  # all of the model
    parameters: list[str]  # the same
    kept_modules: list[str]  # those that an adapter could wrap and that are not quantized


def open_source(model: str, policy: Policy, revision: str | None = None) -> Source:
    """Headers, skeleton and plan of a local directory, a hub id or a URL.

    Reads no weights, so a budget is not spent yet. InputError for a model that what is to serve it cannot run.
    """
    from loftq.architecture import served, skeleton, tokenizer
    from loftq.architecture.adapter import task_type, text_tasks
    from loftq.architecture.conversion import converted_roles
    from loftq.architecture.experts import STACKS

    directory = located(model, revision)
    checkpoint, built = open_dense(directory)
    tensors, roles = converted_roles(built, {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()})
    if policy.serve:
        served.check_model(policy.serve, built)
        if policy.serve == "gguf" and (told := served.needs_converter(built)):
            logger.warning(told)
        elif policy.serve == "gguf" and (directory / tokenizer.FILE).is_file():  # else it may come with the adapter
            tokenizer.read_for_gguf(directory)
        dense = served.loads_dense(policy.serve, built, {r.module for r in roles.values() if r.kind == "linear"})
        roles = {n: replace(r, keep=r.keep or served.READ) if r.module in dense else r for n, r in roles.items()}
    plan = planning.make(tensors, roles, policy)
    if policy.serve:
        quants = {m.name: m.quant for m in plan.matrices}
        served.check_stacks(policy.serve, {n: quants.get(n) for n in tensors if roles[n].kind in STACKS})
        served.check_experts(policy.serve, built, plan.matrices)
    chosen = {m.module for m in plan.matrices}
    return Source(
        directory=directory,
        hub_id=hub_id(model),
        checkpoint=checkpoint,
        plan=plan,
        tensors=tensors,
        roles=roles,
        prefix=str(built.base_model_prefix),
        architecture=type(built).__name__,
        library=type(built).__module__,
        task_type=task_type(built),
        text_tasks=text_tasks(built),
        modules=[name for name, _ in built.named_modules()],
        parameters=[name for name, _ in built.named_parameters()],
        kept_modules=[m for m in skeleton.adaptable(built) if m not in chosen],
    )


def open_dense(directory: Path) -> tuple[Checkpoint, Any]:
    """Headers and skeleton of a full-precision model, which fit each other: nothing of the backbone is missing."""
    from loftq.architecture import presence

    checkpoint, built = open_weights(directory)
    presence.check_weights(built, {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()}, directory)
    return checkpoint, built


def open_weights(directory: Path, cure: str = "start from") -> tuple[Checkpoint, Any]:
    """Headers and skeleton of a full-precision model, or of one in 4 or 8 bits that :mod:`loftq.formats.dequantized`
    can read as that.

    Args:
        cure: what to do with the full-precision checkpoint, for the message.

    Raises: InputError for one that is quantized in another way.
    """
    from loftq.architecture import skeleton

    stored = open_checkpoint(directory)
    refuse_adapter(directory)
    config = read_config(directory, quantized=True)
    found = quantization_of(config)
    readable = found is None or (isinstance(found, dict) and found.get("quant_method") in dequantized.METHODS)
    checkpoint = dequantized.dense(stored, found, dtype_of(config)) if readable else stored
    method = is_quantized_source(checkpoint.tensors)
    if method:
        method = quoted(found["quant_method"]) if isinstance(found, dict) and "quant_method" in found else method
        raise InputError(f"{shown(directory)}: already quantized with {method}; {cure} the full-precision checkpoint")
    return checkpoint, skeleton.build(directory, len(checkpoint.tensors), quantized=checkpoint is not stored)


def located(model: str, revision: str | None = None) -> Path:
    """The directory of :func:`resolve`; for a URL a local directory that stands for it, with weights read remotely.

    Raises: UsageError for a URL with a revision: of the hub it is a part of the URL.
    """
    if not url_of(model):
        return resolve(model, revision)
    if revision is not None:
        raise UsageError(f"{option('revision')} is of a hub id, and not of a URL; write hf://org/name@REVISION")
    return fill(mounted(store("MODEL", model)))


def hub_id(model: str) -> str | None:
    """A model's name on the hub; None for a path or a URL."""
    if (url := url_of(model)) is not None:
        scheme, _, rest = url.partition("://")
        name = rest.partition("@")[0].rstrip("/")
        return name if scheme == "hf" and HUB_ID.fullmatch(name) else None
    return None if local_path("MODEL", model).exists() else model


def resolve(model: str, revision: str | None = None) -> Path:
    """A local directory as it is; else a hub id, downloaded to the usual cache. A local path never uses the network."""
    path = local_path("MODEL", model)
    if path.exists():
        refuse_no_files(path)
        return path
    if not HUB_ID.fullmatch(model):
        raise InputError(f"{quoted(model, 400)}: no such directory, and not a hub id like 'org/name'")
    import huggingface_hub

    def download(**patterns: Any) -> Path:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, **patterns))

    try:
        directory = download(ignore_patterns=not_fetched(".safetensors"))
        if not any(directory.glob("*.safetensors")):
            directory = download(ignore_patterns=not_fetched(".bin"))
        modules = [f"{path}/*" for path in module_paths(directory)]
        if modules:
            download(allow_patterns=modules, ignore_patterns=not_fetched(".safetensors", ".bin"))
    except InputError:
        raise
    except Exception as e:  # the many ways in which a network or a hub says no
        raise StorageError(
            f"{quoted(model, 400)}: no such directory, and not found on the hub ({first_line(e)}); "
            "check the spelling, the network, or `hf auth login`"
        ) from e
    return directory


def refuse_no_files(directory: Path) -> None:
    """InputError for a pipe or a device in a directory: transformers would open it by its name, and never return."""
    names = sorted(directory.iterdir()) if directory.is_dir() else []
    odd = [path.name for path in names if path.exists() and not (path.is_file() or path.is_dir())]
    if odd:
        raise InputError(f"{shown(directory)}: {listed(odd)}: not a regular file; remove it")


def plan_table(plan: Plan) -> list[dict[str, Any]]:
    """One row per tensor, for printing or JSON."""
    rows: list[dict[str, Any]] = [
        {
            "name": m.name,
            "action": "quantize",
            "shape": [*([m.experts] if m.experts else []), *m.shape],
            "kind": m.kind,
            "bits": m.quant.bits,
            "code": m.quant.code,
            **dict([m.quant.detail]),
            "rank": m.rank,
            "bytes": m.bytes,
            **({"instead": m.instead} if m.instead else {}),
        }
        for m in plan.matrices
    ]
    kept = [
        {"name": k.name, "action": "keep", "shape": list(k.shape), "bytes": k.bytes, "reason": k.reason}
        for k in plan.kept
    ]
    return rows + kept
