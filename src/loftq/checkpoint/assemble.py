"""Everything of a LoftQ checkpoint beside its shards: adapter, configuration, small files, card, manifest."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from loftq import planning
from loftq.adapters import bases
from loftq.architecture.adapter import adapter_config, chosen_task
from loftq.architecture.configuration import without_internal_keys, without_quantization
from loftq.checkpoint.manifest import MANIFEST
from loftq.checkpoint.shards import Unit, Workspace
from loftq.errors import InputError, listed
from loftq.formats import fsio, hashed_json, strict_json
from loftq.formats.belongings import belongings, licence
from loftq.formats.layouts import Layout
from loftq.formats.regular import shown
from loftq.formats.tensorfile import encode_header, index_of, read_chunks, read_header
from loftq.report.card import model_card
from loftq.report.totals import totals
from loftq.sources.checkpoint import Source
from loftq.sources.identity import is_unchanged
from loftq.spec import STORED

logger = logging.getLogger("loftq")

ADAPTER = "loftq_init"
TORCH_NAMES = {"F64": "float64", **{stored: name for name, stored in STORED.items()}}


@dataclass(frozen=True)
class Job:
    """One checkpoint to be made: all that is decided before the first weight is read."""

    source: Source
    layout: Layout
    units: list[Unit]
    identity: dict[str, Any]
    adapter: dict[str, Any]  # adapter_config.json


def assemble(job: Job, work: Workspace, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write it all into the workspace, the manifest last. Returns the manifest.

    Nothing that is written depends on where it is: not on the source's place, nor on the output's.

    Args:
        records: of all units, in order.
    """
    files = {unit.file_name: record["shard"] for unit, record in zip(job.units, records, strict=True)}

    def write(file: str, digest: fsio.FileDigest) -> None:
        files[file] = asdict(digest)

    fsio.make_dirs(work.output / ADAPTER)
    if len(job.units) > 1:
        write("model.safetensors.index.json", _write_index(job, work))
    write(f"{ADAPTER}/adapter_model.safetensors", _write_adapter(job, work, records))
    write(f"{ADAPTER}/adapter_config.json", fsio.write_json(work.output / ADAPTER / "adapter_config.json", job.adapter))
    write("config.json", _write_config(job, work))
    own = belongings(job.source.directory)
    for path in own.files:
        file = path.relative_to(job.source.directory).as_posix()
        fsio.make_dirs((work.output / file).parent)
        write(file, fsio.copy_file(path, work.output / file))
    matrices = [m for record in records for m in record["matrices"]]
    summary = totals(job.source.plan, matrices, {n: d["size"] for n, d in files.items()})
    calibration = job.identity.get("statistics", {}).get("identity", {}).get("data", {})
    card = model_card(
        *(job.source.hub_id, job.source.architecture, job.layout, job.source.plan, summary),
        calibration.get("name"),
        licence(job.source.directory / "README.md"),
    )
    write("README.md", fsio.write_atomic(work.output / "README.md", [card.encode()]))
    check_unchanged(job)
    if own.left_out:
        logger.warning("left out of the output: %s", _by_reason(own.left_out))
    manifest = {
        "format_version": 1,
        "identity": job.identity,
        "plan": job.source.plan.to_dict(),
        "files": files,
        "matrices": matrices,
        "totals": summary,
        "left_out": own.left_out,
        **({} if job.source.plan.budget is None else {"budget": job.source.plan.budget}),
    }
    return hashed_json.write(work.output / MANIFEST, manifest)


def adapter_of(source: Source, conv1d: bool, task_type: str | None, base: str = bases.PARENT) -> dict[str, Any]:
    """``adapter_config.json``, made first of all: PEFT must be there, and take the options.

    Args:
        conv1d: whether the model under the adapter has a Conv1D where the source has one.
    """
    chosen = {m.module for m in source.plan.matrices}
    others = [m for m in source.modules if m not in chosen]
    task = chosen_task(task_type, source.task_type, source.text_tasks, source.architecture)
    transposed = conv1d and any(m.kind == "conv1d" for m in source.plan.matrices)
    named = source.architecture, source.library
    return adapter_config(source.plan, others, source.prefix, base, task, transposed, source.parameters, named)


def _by_reason(left_out: dict[str, str]) -> str:
    """``a.py, b.py: code; onnx/: another framework's``"""
    names = {reason: [n for n in left_out if left_out[n] == reason] for reason in left_out.values()}
    return "; ".join(f"{listed(found, 3)}: {reason}" for reason, found in names.items())


def check_unchanged(job: Job) -> None:
    """Refuse to finish if the source is not what it was at the beginning."""
    if not is_unchanged(job.source, job.identity["source"]):
        raise InputError(f"{shown(job.source.directory)}: source changed while reading")


def _write_index(job: Job, work: Workspace) -> fsio.FileDigest:
    index = index_of({unit.file_name: unit.entries(job.layout) for unit in job.units})
    return fsio.write_json(work.output / "model.safetensors.index.json", index)


def _write_adapter(job: Job, work: Workspace, records: list[dict[str, Any]]) -> fsio.FileDigest:
    """One adapter file from the units' pieces, streamed."""
    entries = [entry for unit in job.units for entry in unit.adapter_entries()]

    def contents() -> Iterator[bytes | memoryview]:
        yield encode_header(entries, {"format": "pt"})
        for unit, record in zip(job.units, records, strict=True):
            piece = read_header(work.by(record).piece(unit))
            for entry in unit.adapter_entries():
                yield from read_chunks(piece.tensors[entry.name], piece.stamp)

    return fsio.write_atomic(work.output / ADAPTER / "adapter_model.safetensors", contents())


def _write_config(job: Job, work: Workspace) -> fsio.FileDigest:
    """The source's configuration with ours added, without keys that would select or run code."""
    plan = job.source.plan
    config = strict_json.load_object(job.source.directory / "config.json", special=True)
    config = _without_places(without_quantization(without_internal_keys(config)))
    modules = [(m.module, m.quant) for m in plan.matrices if not m.experts]
    stacks = [(m.module, m.quant) for m in plan.matrices if m.experts]
    bits = planning.mean_bits(plan) if plan.budget else planning.nominal_bits(job.identity["options"]["bits"], plan)
    more = {"stacks": stacks} if stacks else {}  # only layouts that hold them are asked
    ours = job.layout.quantization_config(modules, bits, job.source.kept_modules, **more)
    config.setdefault("architectures", [job.source.architecture])
    if not (config.get("dtype") or config.get("torch_dtype")):  # else the first tensor of the files would decide
        config["dtype"] = TORCH_NAMES[planning.main_dtype(job.source.tensors)]
    if ours is not None:
        config["quantization_config"] = ours
    return fsio.write_json(work.output / "config.json", strict_json.tagged(config))


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """Without the paths from which older versions of transformers say that they loaded a model, or a part of it."""
    return {
        key: _without_places(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "_name_or_path"
    }
