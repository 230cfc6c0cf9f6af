"""Local files: which belong to a split, and their rows. JSONL, JSON, CSV, Parquet and text; also with gzip."""

import contextlib
import csv
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from loftq.errors import InputError, LoftqError, StorageError, UsageError, first_line, listed, quoted
from loftq.formats.regular import local_path
from loftq.sources import databounds

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
WANTED = "wanted .jsonl, .json, .csv, .parquet or .txt, or one of them with .gz"
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
EMPTY = "no rows; the file is empty"
_SHARD = r"(?:[-_.]\d+(?:-of-\d+)?)?"


def in_directory(directory: Path, splits: Mapping[str, tuple[str, ...]]) -> dict[str, list[Path]]:
    """The files of a directory that are named after a split: ``dev.jsonl``, ``train-00000-of-00002.parquet``.

    Args:
        splits: split -> other names it goes by; ``valid``, ``val`` and ``dev`` stand for ``validation`` anyway.
    """
    if not directory.is_dir():
        raise InputError(f"{quoted(directory)}: not a directory; give one with files named train, validation or test")
    files = sorted(p for p in directory.iterdir() if p.is_file() and _kind(p))
    found = {}
    for split, others in splits.items():
        base = split.partition("_")[0]
        names = [name + split[len(base) :] for name in SPLITS.get(base, (base,))] + list(others)
        pattern = re.compile(f"(?:{'|'.join(map(re.escape, names))}){_SHARD}", re.IGNORECASE)
        mine = [p for p in files if pattern.fullmatch(_stem(p))]
        if len({_suffix(p) for p in mine}) > 1:
            raise InputError(
                f"{quoted(directory)}: split {split} could be any of {listed(p.name for p in mine)}; "
                f"name the one that is meant: data: {{{split}: FILE}}"
            )
        if mine:
            found[split] = mine
    if not found:
        raise InputError(
            f"{quoted(directory)}: no file is named after a split ({listed(splits)}, then .jsonl, .csv, .parquet "
            f"or .txt, with or without .gz); it has {listed(sorted(p.name for p in directory.iterdir())) or 'nothing'}"
        )
    return found


def expanded(split: str, patterns: str | Sequence[str]) -> list[Path]:
    """The files of a path, of a glob, or of a list of them, in that order; those of a glob by name."""
    paths: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, (str, Path)) else patterns:
        text = str(local_path("data", pattern))
        matches = [Path(text)] if Path(text).exists() else [Path(p) for p in sorted(glob.glob(text, recursive=True))]
        if not matches:
            raise InputError(f"{quoted(pattern, 400)}: no such file, for split {split}")
        paths |= dict.fromkeys(matches)
    for path in paths:
        if not path.is_file() or not _kind(path):
            raise UsageError(f"{quoted(path)}, for split {split}: not a file of data; {WANTED}")
    return list(paths)


def read(path: Path) -> "Dataset":
    """The rows of a file. All of a CSV is text, also words that elsewhere mean that something is missing.

    Raises: InputError naming the first line that is wrong; UsageError for a kind of file that is not read;
        StorageError if the disk is at fault.
    """
    import datasets

    kind = _kind(path)
    if not kind:
        raise UsageError(f"{quoted(path)}: not a file of data; {WANTED}")
    try:
        if not path.stat().st_size:
            raise InputError(f"{quoted(path)}: {EMPTY}")
        try:
            databounds.check_file(path, kind)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise InputError(f"{quoted(path)}: not a whole gzip file ({e}); fetch it again") from e
        options = _csv_options(path) if kind == "csv" else {}
        with no_bars(), _uncounted():
            return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)  # type: ignore[return-value]
    except LoftqError:
        raise
    except Exception as e:
        cause = _cause(e)
        if isinstance(cause, OSError) and cause.errno is not None:  # of the disk, not of what stands in the file
            raise StorageError(f"{quoted(path)}: {cause.strerror}") from e
        raise InputError(f"{quoted(path)}: {_problem(path, kind) or f'cannot be read: {first_line(cause)}'}") from e


@contextlib.contextmanager
def no_bars(hidden: bool = True) -> Iterator[None]:
    """Hide the progress bars of ``datasets``, which stay on the screen when they are full."""
    import datasets

    hidden = hidden and datasets.is_progress_bar_enabled()
    if hidden:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    """``datasets`` without its count of uses, for which it asks a server of the hub, also for a local file."""
    from datasets import config

    before = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _csv_options(path: Path) -> dict[str, Any]:
    """Every column as text. Looked at before pandas does, which takes rows all one field too long for named rows."""
    from datasets import Features, Value

    problem = _problem(path, "csv")
    if problem:
        raise InputError(f"{quoted(path)}: {problem}")
    with _open(path) as file:
        names = enumerate(next(csv.reader(file)))
    header = [name or f"Unnamed: {i}" for i, name in names]  # as pandas calls the index that it wrote
    return {"features": Features({name: Value("string") for name in header}), "keep_default_na": False}


def _suffix(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(_suffix(path))]


def _kind(path: Path) -> str:
    """The reader of ``datasets`` for a file, by its name; empty if there is none."""
    suffix = _suffix(path)
    kind = FORMATS.get(suffix.removesuffix(".gz"), "")
    return "" if kind == "parquet" and suffix.endswith(".gz") else kind


def _open(path: Path) -> TextIO:
    """A file of text; the mark that some programs put before UTF-8 is passed over, as pandas does."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _problem(path: Path, kind: str) -> str | None:
    """What is wrong with a file that could not be read, if it can be told."""
    find = {"json": _json_problem, "csv": _csv_problem}.get(kind)
    if find is None:
        return None
    with _open(path) as file:
        return find(file)


def _json_problem(file: TextIO) -> str | None:
    if file.read(1) == "[":
        file.seek(0)
        try:
            return None if json.load(file) else EMPTY
        except ValueError as e:
            return f"not JSON: {e}"
    file.seek(0)
    columns: dict[str, type] = {}
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return f"line {number} has half a surrogate pair, which is no character"
        except ValueError as e:
            return f"line {number} is not JSON: {e}"
        if not isinstance(row, dict):
            return f"line {number} is not a JSON object but {quoted(repr(row), 60)}"
        for name, value in row.items():
            if value is not None and columns.setdefault(name, type(value)) is not type(value):
                return (
                    f"line {number}, column {quoted(name)}: {type(value).__name__} where the lines before have "
                    f"{columns[name].__name__}"
                )
    return None if columns else EMPTY


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{quoted(repr(name))} stands there twice")
        found[name] = value
    return found


def _csv_problem(file: TextIO) -> str | None:
    csv.field_size_limit(databounds.MAX_ROW)
    rows = csv.reader(file, strict=True)
    try:
        header, count = next(rows, []), 0
        for row in rows:
            if row and len(row) != len(header):
                return f"line {rows.line_num} has {len(row)} fields where the header has {len(header)}"
            count += bool(row)
    except csv.Error as e:
        return f"line {rows.line_num} is not CSV: {e}"
    return None if count else EMPTY


def _cause(e: BaseException) -> BaseException:
    """What an error was at first."""
    while e.__cause__ or e.__context__:
        e = e.__cause__ or e.__context__  # type: ignore[assignment]
    return e
