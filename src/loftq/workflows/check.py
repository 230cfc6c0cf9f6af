"""``loftq verify`` and the reading side of ``loftq inspect``: a checkpoint examined without loading the model."""

from pathlib import Path
from typing import Any

from loftq.errors import InputError, UsageError, listed, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.config import read_groups
from loftq.formats.tensorfile import TensorFile, read_header, read_tensor
from loftq.spec import QuantSpec, from_dict, stored_tensors
from loftq.workflows.quantize import ADAPTER, MANIFEST


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, which is written last: a directory without it is not a finished LoftQ checkpoint."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise InputError(f"{directory}: not a directory")
    if not path.is_file():
        raise InputError(f"{path}: missing; not a directory that `loftq quantize` finished")
    manifest = strict_json.load_object(path)
    wanted = {"files": dict, "matrices": list, "plan": dict, "totals": dict, "identity": dict}
    broken = [k for k, kind in wanted.items() if not isinstance(manifest.get(k), kind)]
    if broken:
        raise InputError(f"{path}: {listed(broken)} missing or of the wrong type; the file was changed")
    return manifest


def verify(directory: Path) -> dict[str, Any]:
    """Check hashes, headers, shapes and finiteness of every file; the manifest. InputError lists all that is wrong."""
    manifest = read_manifest(directory)
    problems = [p for name, digest in manifest["files"].items() for p in _file_problems(directory, name, digest)]
    if problems:
        raise InputError(f"{directory}: {listed(problems)}; make it again, or download it again")
    files = [read_header(directory / name) for name in manifest["files"] if name.endswith(".safetensors")]
    tensors = {t.name: (t.dtype, t.shape) for f in files for t in f.tensors.values()}
    problems = [p for m in manifest["plan"]["matrices"] for p in _matrix_problems(m, tensors, manifest)]
    problems += [p for f in files for p in _values_problems(f)]
    if problems:
        raise InputError(f"{directory}: {listed(problems)}; make it again, or download it again")
    if manifest["identity"].get("format") == "loftq":
        _check_config(directory, manifest)
    return manifest


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
    if manifest["identity"].get("format") == "loftq":
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
