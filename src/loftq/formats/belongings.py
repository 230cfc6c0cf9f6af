"""What belongs to a model beside its weights: the files that are copied into an output, and fetched from the hub.

One rule: all that is small and is neither weights nor code nor another framework's. Of directories, those that hold no
weights: processors, chat templates, voices; and the modules of SentenceTransformers, copied with their weights.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from loftq.errors import InputError, StorageError, quoted
from loftq.formats import strict_json, text
from loftq.formats.config import EXPORTED, MANIFEST
from loftq.formats.picklefile import read_pickle_tensors
from loftq.formats.regular import open_regular, shown
from loftq.formats.source import check_link
from loftq.formats.tensorfile import read_header

LARGEST = 64 << 20
MOST_FILES = 1000
DEEPEST = 4
TORCH = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".pkl", ".pickle", ".joblib")
REASONS = {
    "weights": TORCH,
    "code": (".py", ".pyc", ".pyx", ".so", ".sh", ".bat", ".ipynb", ".js", ".cu", ".cpp", ".jar", ".exe", ".dll"),
    "another framework's": (
        *(".h5", ".keras", ".msgpack", ".ot", ".gguf", ".ggml", ".nemo", ".npz", ".pb", ".tflite", ".index"),
        *(".onnx", ".onnx_data", ".xml", ".mlmodel", ".engine", ".llamafile"),
    ),
    "an archive": (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".parquet", ".arrow"),
    "of a training": ("trainer_state.json", ".log"),
}
FOLDERS = {
    "of a training": r"runs|wandb|logs|lightning_logs|checkpoint-\d+",
    "another framework's": "onnx|openvino|original",
}
REPLACED = {"config.json", "README.md", MANIFEST, EXPORTED, "loftq_init"}
REPLACED_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|consolidated.*")


@dataclass
class Belongings:
    """Paths below the directory, in order of their names; and what is not taken: name -> why."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def belongings(directory: Path) -> Belongings:
    """The files of a checkpoint's directory that go into an output as they are. Links are held to the source's rule.

    Raises: InputError for a link out of the directory, damaged modules, pointers of git-lfs, and too many files.
    """
    found = Belongings()
    modules = module_paths(directory)
    for name in sorted(os.listdir(directory)):
        path = directory / name
        if name.startswith(".") or name in REPLACED or REPLACED_WEIGHTS.fullmatch(name):
            continue
        if name in {module.parts[0] for module in modules} and path.is_dir():
            _take_module(path, directory, found)
        elif path.is_dir():
            _take_folder(path, directory, found)
        else:
            _take_file(path, directory, found)
    if len(found.files) > MOST_FILES:
        many = f"{len(found.files)} files beside the weights"
        raise InputError(f"{shown(directory)}: {many}; a model has at most {MOST_FILES}, move the others away")
    return found


def module_paths(directory: Path) -> list[PurePosixPath]:
    """Where the modules of a SentenceTransformers model lie below its directory, but for its transformer's."""
    listing = directory / "modules.json"
    if not listing.is_file():
        return []
    check_link(listing, directory)
    rows = strict_json.loads(text.read(listing, "JSON"), shown(listing))
    paths = [row.get("path") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    places = [PurePosixPath(path) for path in paths if isinstance(path, str) and path]
    odd = [str(p) for p in places if p.is_absolute() or ".." in p.parts or p.parts[0] in REPLACED]
    if odd:
        raise InputError(f"{shown(listing)}: {quoted(odd[0])} leads out of the directory; fetch the file again")
    return places


def not_fetched(*wanted: str) -> list[str]:
    """Patterns of files that are not fetched from the hub, but for the endings in ``wanted``."""
    endings = (ending for group in REASONS.values() for ending in group)
    return [*(f"*{ending}" for ending in endings if ending not in wanted), "consolidated*", "original/*"]


def reason_to_leave(name: str) -> str:
    """Why a file of this name is not a model's own, in a word or two; empty if it is."""
    lower = name.lower()
    if re.search(r"\.data-\d+-of-\d+$|tfevents", lower):
        return "another framework's"
    return next((reason for reason, endings in REASONS.items() if lower.endswith(endings)), "")


def _take_file(path: Path, directory: Path, found: Belongings) -> None:
    name = path.relative_to(directory).as_posix()
    why = reason_to_leave(path.name) or _unreadable(path)
    if not why:
        check_link(path, directory)
        if path.stat().st_size > LARGEST:
            why = f"larger than {LARGEST >> 20} MB, not copied"
        elif path.stat().st_size <= text.LARGEST_POINTER:
            text.check_pointer(path.read_bytes(), path)
    if why:
        found.left_out[name] = why
    else:
        found.files.append(path)


def _take_folder(path: Path, directory: Path, found: Belongings, depth: int = DEEPEST) -> None:
    """The files of a folder without weights, and of the folders in it; of others nothing."""
    why = next((reason for reason, names in FOLDERS.items() if re.fullmatch(names, path.name)), "")
    names = [] if path.is_symlink() or why else sorted(os.listdir(path))
    if path.is_symlink():
        why = "a link to a directory"
    elif not why and any(reason_to_leave(name) in ("weights", "another framework's") for name in names):
        why = "a directory with weights of its own"
    elif len(names) > MOST_FILES:
        why = f"a directory of more than {MOST_FILES} files"
    elif not depth:
        why = f"more than {DEEPEST} directories deep"
    if why:
        found.left_out[path.relative_to(directory).as_posix() + "/"] = why
        return
    for name in (name for name in names if not name.startswith(".")):
        if len(found.files) > MOST_FILES:
            return
        if (path / name).is_dir():
            _take_folder(path / name, directory, found, depth - 1)
        else:
            _take_file(path / name, directory, found)


def _take_module(path: Path, directory: Path, found: Belongings) -> None:
    """A module's files with its weights, which are known to be nothing else."""
    for inner in _files_below(path, DEEPEST):
        weights = reason_to_leave(inner.name) == "weights"
        if not weights or not inner.name.endswith((".safetensors", ".bin")):
            _take_file(inner, directory, found)
            continue
        check_link(inner, directory)
        if inner.name.endswith(".safetensors"):
            read_header(inner)
        else:
            with open_regular(inner) as file:
                read_pickle_tensors(inner, expected=file.stamp)
        found.files.append(inner)


def _files_below(directory: Path, depth: int) -> Iterator[Path]:
    if directory.is_symlink() or not depth:
        raise InputError(f"{shown(directory)}: a link or too deep, for a module of SentenceTransformers; copy it here")
    for name in sorted(os.listdir(directory)):
        path = directory / name
        if path.is_dir():
            yield from _files_below(path, depth - 1)
        elif not name.startswith("."):
            yield path


def _unreadable(path: Path) -> str:
    """Why nothing can be read there: a pipe, a device, a link to nowhere."""
    try:
        return "" if stat.S_ISREG(path.stat().st_mode) else "no regular file"
    except OSError:
        return "a link that leads nowhere"


def licence(card: Path) -> dict[str, str]:
    """``license``, ``license_name`` and ``license_link`` of the front matter of a model card; none if there is no card.

    Only plain values on one line are read, without a reader of YAML.
    """
    try:
        with open_regular(card) as file:
            head = file.read_at(0, min(file.stamp.size, 1 << 16)).decode(errors="replace")
    except (InputError, StorageError):
        return {}
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", head.replace("\r\n", "\n"), re.DOTALL)
    row = r"^(license(?:_name|_link)?):[ \t]*(\S.*?)[ \t]*$"
    rows: list[Any] = re.findall(row, front[1], re.MULTILINE) if front else []
    return {key: value.strip("\"'") for key, value in rows if value.isprintable() and len(value) < 200}
