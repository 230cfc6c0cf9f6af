"""``loftq quantize``: stream a checkpoint, matrix by matrix, into a LoftQ checkpoint.

Work is collected in ``OUTPUT.loftq-partial``: shards first, then adapter, configuration and tokenizer, the manifest
last; one rename then makes it ``OUTPUT``. Whatever stops the run, ``OUTPUT`` is absent or complete, and the same
command continues from the finished shards.
"""

import itertools
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import loftq
from loftq import plan as planning
from loftq.errors import ConflictError, InputError, LoftqError, StorageError, UsageError, listed, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.layouts import LAYOUTS, Layout
from loftq.formats.tensorfile import encode_header, file_size, read_chunks, read_header
from loftq.nn.adapter import adapter_config
from loftq.nn.skeleton import INTERNAL_KEYS
from loftq.plan import Matrix, Policy
from loftq.report.card import model_card
from loftq.report.totals import totals
from loftq.solve import ordered_map
from loftq.workflows.source import Source, open_source
from loftq.workflows.units import Solved, Unit, Workspace, solve_matrix, split

MANIFEST = "loftq_manifest.json"
ADAPTER = "loftq_init"
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*/config.json")
LARGEST_COPY = 64 << 20


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What to make, beside the policy. Of these only ``format`` and ``max_shard_bytes`` change the bytes written."""

    policy: Policy = field(default_factory=Policy)
    format: str = "loftq"
    workers: int = 0  # 0: one per core
    device: str = "cpu"
    max_shard_bytes: int = 1 << 30
    overwrite: bool = False
    revision: str | None = None
    task_type: str | None = None


Progress = Callable[[dict[str, Any]], None]  # called with the report of each matrix
Begin = Callable[[int, int], Progress]  # called once with the number of matrices in all, and of those done already


def quantize(model: str, output: Path, options: QuantizeOptions, begin: Begin | None = None) -> dict[str, Any]:
    """Quantize ``model`` into the directory ``output``; the manifest of the result.

    Args:
        model: a local directory or a hub id.
        begin: called before the work; returns what is called after every matrix.

    Raises: ConflictError if ``output`` holds something else or another process works on it; InputError,
        NumericalError, StorageError as their names say. In every case ``output`` is absent or complete.
    """
    output = Path(os.path.abspath(output.expanduser()))
    source = open_source(model, options.policy, options.revision)
    layout = LAYOUTS[options.format]
    units = split(source.plan, layout, options.max_shard_bytes, _in_order(source))
    identity = _identity(source, layout, options)
    _check_places(source.directory, output)
    done = _already_done(output, identity, options.overwrite)
    work = Workspace(output.with_name(f"{output.name}.loftq-partial"))
    if done:
        fsio.remove_tree(work.root)  # a run that died between its last rename and its cleaning left it
        return done
    fsio.make_dirs(work.root)
    with fsio.DirectoryLock(work.root / "lock"):
        done = _already_done(output, identity, options.overwrite)  # another process may have finished meanwhile
        if not done:
            _prepare(work, identity, units, layout, output)
            records = _make_units(work, source, units, layout, options, begin)
            done = _assemble(work, source, units, records, layout, identity, output, options)
            _publish(work.output, output, options.overwrite)
    fsio.remove_tree(work.root)
    return done


def _in_order(source: Source) -> list[str]:
    """All tensors in the order of the model's layers, matrices and copies mixed."""
    return sorted((t.name for t in (*source.plan.matrices, *source.plan.kept)), key=planning.natural)


def _identity(source: Source, layout: Layout, options: QuantizeOptions) -> dict[str, Any]:
    """Everything that the bytes of the result depend on. Two runs may share work only if these are equal."""
    return {
        "source": [asdict(f) for f in source.checkpoint.files],
        "config_sha256": fsio.sha256_file(source.directory / "config.json").sha256,
        "plan": source.plan.digest(),
        "format": layout.name,
        "max_shard_bytes": options.max_shard_bytes,
        "device": options.device.partition(":")[0],
        "task_type": options.task_type,
        "loftq": loftq.__version__,
        "torch": torch.__version__,
    }


def _check_places(source: Path, output: Path) -> None:
    real_source, real_output = source.resolve(), output.resolve()
    if real_output == real_source or real_source in real_output.parents or real_output in real_source.parents:
        raise UsageError(f"{output}: is, holds or lies in the source {source}; choose another --output")
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise StorageError(f"{parent}: not writable; choose another --output")


def _already_done(output: Path, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The manifest of an output that this very command made earlier; ConflictError for anything else there."""
    if not output.exists() and not output.is_symlink():
        return None
    if output.is_dir() and not any(output.iterdir()):
        return None
    manifest = output / MANIFEST
    if output.is_dir() and manifest.is_file():
        found = strict_json.load_object(manifest)
        if found.get("identity") == identity:
            return found
        if overwrite:
            return None
        changed = _differences(found.get("identity"), identity)
        raise ConflictError(f"{output}: made by another command ({changed}); choose another --output, or --overwrite")
    kind = "a directory that loftq did not make" if output.is_dir() else "not a directory"
    raise ConflictError(f"{output}: exists and is {kind}; choose another --output")


def _differences(old: Any, new: dict[str, Any]) -> str:
    old = old if isinstance(old, dict) else {}
    fields = [k for k in new if old.get(k) != new[k]]
    return listed(f"{k}: {quoted(old.get(k), 60)} -> {quoted(new[k], 60)}" for k in fields)


def _prepare(work: Workspace, identity: dict[str, Any], units: list[Unit], layout: Layout, output: Path) -> None:
    """Make the workspace, or accept one that an earlier run with the same identity left."""
    path = work.root / "identity.json"
    if path.exists():
        try:
            found = strict_json.load_object(path)
        except InputError:
            found = {}
        if found != identity:
            raise ConflictError(
                f"{work.root}: holds unfinished work of another command ({_differences(found, identity)}); "
                "run that command again to finish it, or delete the directory"
            )
    for leftover in itertools.chain(work.output.glob(".*.tmp"), work.units.glob(".*.tmp"), work.root.glob(".*.tmp")):
        fsio.remove(leftover)
    fsio.make_dirs(work.output)
    fsio.make_dirs(work.units)
    _check_space(work, units, layout)
    if not path.exists():
        fsio.write_json(path, identity)


def _check_space(work: Workspace, units: list[Unit], layout: Layout) -> None:
    """Refuse to begin what will not fit: shards, and the adapter twice while it is put together."""
    wanted = 0
    for unit in units:
        if not work.record_path(unit).exists():
            adapter = file_size(unit.adapter_entries(), None)
            wanted += file_size(unit.entries(layout), None) + 2 * adapter
    free = shutil.disk_usage(work.root).free
    if wanted * 1.05 > free:
        raise StorageError(
            f"{work.root}: no space: needs about {wanted * 1.05 / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space, or choose another --output"
        )


def _make_units(
    work: Workspace,
    source: Source,
    units: list[Unit],
    layout: Layout,
    options: QuantizeOptions,
    begin: Begin | None,
) -> list[dict[str, Any]]:
    """Records of all units, made where they are not there yet; matrices are solved ahead, across units."""
    records = [work.finished(unit) for unit in units]
    missing = [unit for unit, record in zip(units, records, strict=True) if record is None]
    finished = sum(len(r["matrices"]) for r in records if r)
    advance = begin(len(source.plan.matrices), finished) if begin else lambda report: None

    def work_on(matrix: Matrix) -> Solved:
        return solve_matrix(matrix, source.checkpoint, source.plan, layout, options.device)

    def watched(results: Iterator[Solved]) -> Iterator[Solved]:
        for result in results:
            yield result
            advance(result.report)

    workers = options.workers or os.cpu_count() or 1
    matrices = (m for unit in missing for m in unit.matrices)
    solved = watched(ordered_map(work_on, matrices, workers))
    for unit in missing:
        records[unit.index] = work.make(unit, solved, source.checkpoint, layout)
    return [r for r in records if r is not None]


def _assemble(
    work: Workspace,
    source: Source,
    units: list[Unit],
    records: list[dict[str, Any]],
    layout: Layout,
    identity: dict[str, Any],
    output: Path,
    options: QuantizeOptions,
) -> dict[str, Any]:
    """Everything beside the shards; the manifest last. Returns the manifest."""
    files = {unit.file_name: record["shard"] for unit, record in zip(units, records, strict=True)}

    def write(name: str, digest: fsio.FileDigest) -> None:
        files[name] = asdict(digest)

    if len(units) > 1:
        write("model.safetensors.index.json", _write_index(work, units, layout))
    fsio.make_dirs(work.output / ADAPTER)
    write(f"{ADAPTER}/adapter_model.safetensors", _write_adapter(work, units))
    task = options.task_type or planning.task_type(source.architecture)
    others = [m for m in source.adaptable if m not in {x.module for x in source.plan.matrices}]
    config = adapter_config(source.plan, others, source.prefix, str(output), task)
    config["fan_in_fan_out"] = layout.name != "loftq" and any(m.kind == "conv1d" for m in source.plan.matrices)
    write(
        f"{ADAPTER}/adapter_config.json",
        fsio.write_json(work.output / ADAPTER / "adapter_config.json", config),
    )
    write("config.json", _write_config(work, source, layout, options))
    for path in _small_files(source.directory):
        name = path.relative_to(source.directory).as_posix()
        fsio.make_dirs((work.output / name).parent)
        write(name, fsio.copy_file(path, work.output / name))
    matrices = [m for record in records for m in record["matrices"]]
    summary = totals(source.plan, matrices, {n: d["size"] for n, d in files.items()})
    card = model_card(source.name, source.architecture, layout.name, output.name, source.plan, matrices, summary)
    write("README.md", fsio.write_atomic(work.output / "README.md", [card.encode()]))
    manifest = {
        "format_version": 1,
        "identity": identity,
        "plan": source.plan.to_dict(),
        "files": files,
        "matrices": matrices,
        "totals": summary,
    }
    fsio.write_json(work.output / MANIFEST, manifest)
    return strict_json.load_object(work.output / MANIFEST)


def _write_index(work: Workspace, units: list[Unit], layout: Layout) -> fsio.FileDigest:
    placed = [(entry, unit.file_name) for unit in units for entry in unit.entries(layout)]
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry, _ in placed)},
        "weight_map": {entry.name: file_name for entry, file_name in placed},
    }
    return fsio.write_json(work.output / "model.safetensors.index.json", index)


def _write_adapter(work: Workspace, units: list[Unit]) -> fsio.FileDigest:
    """One adapter file from the units' pieces, streamed."""
    entries = [entry for unit in units for entry in unit.adapter_entries()]

    def contents() -> Iterator[bytes | memoryview]:
        yield encode_header(entries, {"format": "pt"})
        for unit in units:
            piece = read_header(work.piece(unit))
            for entry in unit.adapter_entries():
                yield from read_chunks(piece.tensors[entry.name], piece.stamp)

    return fsio.write_atomic(work.output / ADAPTER / "adapter_model.safetensors", contents())


def _write_config(work: Workspace, source: Source, layout: Layout, options: QuantizeOptions) -> fsio.FileDigest:
    """The source's configuration with ours added, without keys that would select or run code."""
    config = strict_json.load_object(source.directory / "config.json")
    config = {k: v for k, v in config.items() if not k.startswith(INTERNAL_KEYS)}
    bits = options.policy.bits
    number = float(bits) if bits.replace(".", "", 1).isdecimal() else source.plan.matrices[-1].quant.bits
    modules = [(m.module, m.quant) for m in source.plan.matrices]
    ours = layout.quantization_config(modules, int(number) if number == int(number) else number, source.kept_modules)
    config.setdefault("architectures", [source.architecture])
    if ours is not None:
        config["quantization_config"] = ours
    return fsio.write_json(work.output / "config.json", config)


def _small_files(directory: Path) -> list[Path]:
    """Tokenizer, generation and similar files: copied as they are, if they are small and are no weights or code."""
    ours = {"config.json", MANIFEST, "model.safetensors.index.json", "pytorch_model.bin.index.json"}
    found = {path for pattern in COPIED for path in directory.glob(pattern)}
    return sorted(
        p
        for p in found
        if p.name not in ours or p.parent != directory
        if p.is_file() and p.stat().st_size <= LARGEST_COPY
    )


def _publish(finished: Path, output: Path, overwrite: bool) -> None:
    """One rename makes the result visible. What was there before is moved aside until then."""
    old = None
    if overwrite and output.is_dir() and any(output.iterdir()):
        old = output.with_name(f"{output.name}.loftq-old-{uuid.uuid4().hex[:8]}")
        fsio.rename(output, old)
    try:
        fsio.rename(finished, output)
    except LoftqError as e:
        if output.exists():
            raise ConflictError(f"{output}: appeared while this command ran; choose another --output") from e
        raise
    if old is not None:
        fsio.remove_tree(old)
