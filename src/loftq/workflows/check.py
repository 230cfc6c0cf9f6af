"""``loftq verify`` and the reading side of ``loftq inspect``: a checkpoint examined without loading the model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq.errors import InputError, UsageError, listed, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.config import read_groups
from loftq.formats.tensorfile import TensorFile, check_name, read_header, read_tensor
from loftq.spec import QuantSpec, from_dict, stored_tensors
from loftq.workflows import sealed
from loftq.workflows.assemble import ADAPTER
from loftq.workflows.places import MANIFEST

LOADED = {".safetensors", ".bin", ".pt", ".pth", ".json", ".py", ".model", ".jinja"}  # what loaders look for by name

NUMBER = (int, float)
FIELDS: dict[str, dict[str, Any]] = {
    "files": {"size": int, "sha256": str},
    "matrices": {
        "name": str,
        "shape": list,
        "bits": int,
        "rank": int,
        "alpha": NUMBER,
        "bytes": int,
        "errors": list,
        "kept": int,
        "qlora_error": NUMBER,
    },
    "plan": {"name": str, "module": str, "kind": str, "shape": list, "rank": int, "quant": dict},
    "totals": dict.fromkeys(
        (
            *("matrices", "quantized_weights", "parameters", "disk_bytes", "adapter_bytes", "bits_per_weight"),
            *("compression", "trainable_share", "error", "qlora_error"),
        ),
        NUMBER,
    ),
}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, which is written last: a directory without it is not a finished LoftQ checkpoint."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise InputError(f"{directory}: not a directory")
    if not path.is_file():
        raise InputError(f"{path}: missing; not a directory that `loftq quantize` finished")
    manifest = sealed.load(path)
    try:
        odd = list(_odd_fields(manifest))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        odd = [repr(e)]
    if odd:
        raise InputError(f"{path}: {listed(odd)} missing or of the wrong type; not a manifest of this loftq")
    return manifest


def _odd_fields(manifest: dict[str, Any]) -> Iterator[str]:
    """Fields of a manifest that are missing or have another type than ``FIELDS`` says."""
    rows = {
        "files": manifest["files"].values(),
        "matrices": manifest["matrices"],
        "plan": manifest["plan"]["matrices"],
        "totals": [manifest["totals"]],
    }
    for part, fields in FIELDS.items():
        for row in rows[part]:
            yield from (f"{part}.{k}" for k, kind in fields.items() if not isinstance(row.get(k), kind))
            if "shape" in fields and [type(n) for n in row["shape"]] != [int, int]:
                yield f"{part}.shape"
            if "name" in fields:
                check_name(row["name"], part)
    if [m["name"] for m in rows["matrices"]] != [m["name"] for m in rows["plan"]]:
        yield "matrices"
    for row in rows["matrices"]:
        for trace in ("errors", "output_errors") if "output_errors" in row else ("errors",):
            if not all(isinstance(e, NUMBER) for e in row[trace]) or not 0 <= row["kept"] < len(row[trace]):
                yield f"matrices.{trace}"
    if not isinstance(manifest["identity"]["options"]["format"], str):
        yield "identity.options.format"


def verify(directory: Path) -> dict[str, Any]:
    """Check hashes, headers, shapes and finiteness of every file; the manifest. InputError lists all that is wrong."""
    manifest = read_manifest(directory)
    problems = [p for name, digest in manifest["files"].items() for p in _file_problems(directory, name, digest)]
    problems += [f"{quoted(name)}: not in the manifest" for name in _extra_files(directory, manifest)]
    if not problems:
        files = [read_header(directory / name) for name in manifest["files"] if name.endswith(".safetensors")]
        tensors = {t.name: (t.dtype, t.shape) for f in files for t in f.tensors.values()}
        problems = [p for m in manifest["plan"]["matrices"] for p in _matrix_problems(m, tensors, manifest)]
        problems += [p for f in files for p in _values_problems(f)]
    if problems:
        raise InputError(f"{directory}: {listed(problems)}; make it again, or download it again")
    if _is_packed(manifest):
        _check_config(directory, manifest)
    return manifest


def _is_packed(manifest: dict[str, Any]) -> bool:
    return manifest["identity"]["options"]["format"] == "loftq"


def _extra_files(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """Files that a loader might take for a part of the checkpoint, and that the manifest does not name."""
    found = [p for place in (directory, directory / ADAPTER) if place.is_dir() for p in place.iterdir()]
    names = {p.relative_to(directory).as_posix() for p in found if p.suffix in LOADED and not p.name.startswith(".")}
    return sorted(names - {MANIFEST, *manifest["files"]})


def _file_problems(directory: Path, name: str, wanted: dict[str, Any]) -> list[str]:
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return [f"{quoted(name)}: not a name inside the directory"]
    if not path.is_file():
        return [f"{quoted(name)}: missing"]
    found = fsio.sha256_file(path)
    if found.size != wanted.get("size"):
        return [f"{quoted(name)}: {found.size} bytes, the manifest says {wanted.get('size')}"]
    return [] if found.sha256 == wanted.get("sha256") else [f"{quoted(name)}: its bytes have changed (sha256)"]


def _matrix_problems(matrix: dict[str, Any], tensors: dict[str, tuple], manifest: dict[str, Any]) -> list[str]:
    """Tensors of a matrix and its adapter that are missing or have another shape than the plan says."""
    rows, columns = matrix["shape"]
    rank, problems = matrix["rank"], []
    factors = {(rank, columns), (rows, rank)} if matrix["kind"] != "embedding" else {(rank, rows), (columns, rank)}
    stems = (
        f"base_model.model.{matrix['module']}.lora_A",
        f"base_model.model.{matrix['module']}.lora_embedding_A",
    )
    if not any(t.startswith(stems) and tensors[t][1] in factors for t in tensors):
        problems.append(f"{ADAPTER}: no adapter of rank {rank} for {matrix['module']}")
    if _is_packed(manifest):
        layout = stored_tensors(from_dict(QuantSpec, matrix["quant"]), rows, columns)
        for suffix, wanted in layout.items():
            name = matrix["name"].removesuffix("weight") + suffix
            if tensors.get(name) != wanted:
                problems.append(f"{name}: found {tensors.get(name, 'nothing')}, the plan says {wanted}")
    return problems


def _values_problems(file: TensorFile) -> list[str]:
    problems = []
    for info in file.tensors.values():
        if info.dtype in ("F16", "BF16", "F32", "F64"):
            tensor = read_tensor(info, file.stamp)
            if not tensor.isfinite().all():
                problems.append(f"{quoted(info.name)}: not finite")
    return problems


def _check_config(directory: Path, manifest: dict[str, Any]) -> None:
    """The packed modules of ``config.json`` are those of the plan, with the same specs."""
    config = strict_json.load_object(directory / "config.json")
    try:
        groups = read_groups(config["quantization_config"])
    except (KeyError, TypeError, UsageError) as e:
        raise InputError(f"{directory / 'config.json'}: quantization_config cannot be read: {e}") from e
    listed_there = {(module, group.quant) for group in groups for module in group.modules}
    planned = {(m["module"], from_dict(QuantSpec, m["quant"])) for m in manifest["plan"]["matrices"]}
    if listed_there != planned:
        odd = sorted(module for module, _ in listed_there ^ planned)
        raise InputError(f"{directory / 'config.json'}: the packed modules are not those of the plan: {listed(odd)}")
