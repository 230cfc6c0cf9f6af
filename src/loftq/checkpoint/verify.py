"""``loftq verify`` and the reading side of ``loftq inspect``: a checkpoint examined without loading the model."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loftq.architecture.adapter import adapter_shapes
from loftq.checkpoint.assemble import ADAPTER
from loftq.checkpoint.manifest import MANIFEST, kept, planned, read_manifest
from loftq.checkpoint.output_dir import kind, strangers
from loftq.errors import InputError, LoftqError, UsageError, listed, quoted
from loftq.formats import fsio, layouts, strict_json
from loftq.formats.layouts import Layout
from loftq.formats.regular import shown
from loftq.formats.source import check_link
from loftq.formats.tensorfile import TensorFile, read_header, read_tensor
from loftq.numerics.machine import cpus
from loftq.planning import NO_PARAMETER, Matrix

Begin = Callable[[int], Callable[[], object]]  # called once with the number of reads; returns what each one calls


def verify(directory: Path, begin: Begin = lambda _: lambda: None) -> dict[str, Any]:
    """Check hashes, headers, shapes and finiteness of every file; the manifest. InputError lists all that is wrong."""
    manifest = read_manifest(directory)
    reads = [*manifest["files"], *(name for name in manifest["files"] if name.endswith(".safetensors"))]
    with ThreadPoolExecutor(cpus()) as pool:
        return _verified(directory, manifest, pool, begin(len(reads)))


def _verified(
    directory: Path, manifest: dict[str, Any], pool: ThreadPoolExecutor, advance: Callable[[], object]
) -> dict[str, Any]:
    problems: list[str] = []
    for of_file in pool.map(lambda item: _file_problems(directory, *item), manifest["files"].items()):
        problems += of_file
        advance()
    added = [f"{quoted(name)}: {problem}" for name, problem in strangers(directory, {*manifest["files"], MANIFEST})]
    problems += added
    if not problems:
        files = [read_header(directory / name) for name in manifest["files"] if name.endswith(".safetensors")]
        tensors = {t.name: (t.dtype, t.shape) for f in files for t in f.tensors.values()}
        layout = layout_of(directory, manifest)
        problems = [p for m in planned(manifest) for p in _matrix_problems(m, tensors, layout)]
        limits = {name for name, reason in kept(manifest, directory / MANIFEST).items() if reason == NO_PARAMETER}
        for of_file in pool.map(lambda f: _values_problems(f, limits), files):
            problems += of_file
            advance()
    if problems:
        cure = "move what was added to another place" if problems == added else "make it again, or download it again"
        raise InputError(f"{shown(directory)}: {listed(problems, width=400)}; {cure}")
    _check_config(directory, manifest)
    return manifest


def layout_of(directory: Path, manifest: dict[str, Any]) -> Layout:
    """How the matrices of a checkpoint are written."""
    try:
        return layouts.get(manifest["identity"]["options"]["format"])
    except UsageError as e:
        raise InputError(f"{shown(directory / MANIFEST)}: {e}; import the package that registers it") from e


def _file_problems(directory: Path, name: str, wanted: Mapping[str, Any]) -> list[str]:
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return [f"{quoted(name)}: not a name inside the directory"]
    if not os.path.lexists(path):
        return [f"{quoted(name)}: missing"]
    try:
        check_link(path, directory)
        if not path.is_file():
            return [f"{quoted(name)}: {kind(path)} where a file should be"]
        if path.stat().st_size != wanted["size"]:
            return [f"{quoted(name)}: {path.stat().st_size} bytes, the manifest says {wanted['size']}"]
        same = fsio.sha256_file(path).sha256 == wanted["sha256"]
    except LoftqError as e:
        return [str(e).removeprefix(f"{shown(directory)}/")]
    return [] if same else [f"{quoted(name)}: its bytes have changed (sha256)"]


def _matrix_problems(matrix: Matrix, tensors: dict[str, tuple], layout: Layout) -> list[str]:
    """Tensors of a matrix and its adapter that are missing or have another shape than the plan says."""
    problems = []
    if any(name not in tensors or tensors[name][1] != shape for name, shape in adapter_shapes(matrix).items()):
        problems.append(f"{ADAPTER}: no adapter of rank {matrix.rank} for {quoted(matrix.module)}")
    try:
        wanted = {entry.name: (entry.dtype, entry.shape) for entry in layout.entries(matrix)}
    except UsageError as e:
        return [*problems, str(e)]
    odd = {name: tensors.get(name, "nothing") for name in wanted if tensors.get(name) != wanted[name]}
    return [*problems, *(f"{quoted(name)}: found {found}, the plan says {wanted[name]}" for name, found in odd.items())]


def _values_problems(file: TensorFile, limits: set[str]) -> list[str]:
    """Tensors that are not finite; of ``limits``, which are no parameters, those that hold NaN."""
    problems = []
    for info in file.tensors.values():
        if info.dtype in ("F16", "BF16", "F32", "F64"):
            tensor = read_tensor(info, file.stamp)
            if tensor.isnan().any() or not (info.name in limits or tensor.isfinite().all()):
                problems.append(f"{quoted(info.name)}: not finite")
    return problems


def _check_config(directory: Path, manifest: dict[str, Any]) -> None:
    """The packed modules of ``config.json``, where it names them, are those of the plan, with the same specs."""
    path = directory / "config.json"
    config = strict_json.load_object(path, special=True)
    try:
        listed_there = layout_of(directory, manifest).modules_in(config.get("quantization_config"))
    except InputError as e:
        raise InputError(f"{shown(path)}: {e}") from e
    wanted = {(matrix.module, matrix.quant) for matrix in planned(manifest)}
    if listed_there is not None and listed_there != wanted:
        odd = sorted(module for module, _ in listed_there ^ wanted)
        raise InputError(
            f"{shown(directory / 'config.json')}: the packed modules are not those of the plan: {listed(odd)}"
        )
