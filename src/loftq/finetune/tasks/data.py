"""The splits of a task's data, from the hub or from local files, checked."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, concatenate_datasets

from loftq.errors import InputError, StorageError, UsageError, first_line, listed, option, quoted
from loftq.finetune.tasks.base import Hub, Task
from loftq.finetune.tasks.columns import canonical
from loftq.formats.regular import local_path
from loftq.sources import datafiles

OPTIONS = ("directory", "max_train_samples", "max_eval_samples")


def load_data(
    task: Task, data: str | Path | Mapping[str, Any] | None = None, splits: Sequence[str] | None = None
) -> dict[str, Dataset]:
    """split -> its rows, with the columns of ``task.roles`` alone, labels as numbers, everything checked.

    Args:
        data: None for the task's data set on the hub; a directory whose files are named after splits; or a mapping:
            split -> file, glob or list of them, or ``directory``, and ``max_train_samples`` and
            ``max_eval_samples`` to take the first rows only.
        splits: those wanted; None for all there are.

    Raises: UsageError for options that cannot be meant; InputError for a missing file or column, an empty set, a
        broken row or an unknown label, naming all three; StorageError if the hub cannot be reached.
    """
    options = _options(data)
    limits = {name: _count(name, options.get(name)) for name in OPTIONS[1:]}
    named = named_files(task, options)
    available = _available(task, named)
    wanted = available if splits is None else tuple(splits)
    missing = [split for split in wanted if split not in available]
    if missing:
        place = "the data given" if named else str(task.hub)
        raise InputError(f"task {quoted(task.name)}: no split {listed(missing)} in {place}; it has {listed(available)}")
    result = {}
    for split in wanted:
        rows = _read_files(task, named[split]) if named else _read_hub(task, task.hub, split)  # type: ignore[arg-type]
        limit = limits["max_train_samples" if split == "train" else "max_eval_samples"]
        result[split] = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return result


def available_splits(task: Task, data: str | Path | Mapping[str, Any] | None) -> tuple[str, ...]:
    """The splits there are, of local files or on the hub; nothing is read. Raises as :func:`named_files`."""
    return _available(task, named_files(task, data))


def _available(task: Task, named: Mapping[str, list[Path]]) -> tuple[str, ...]:
    if not named and task.hub is None:
        raise UsageError(
            f"task {quoted(task.name)} has no data set on the hub; give {option('data', 'DIR')}, or data: in the recipe"
        )
    return tuple(named or task.hub.splits)  # type: ignore[union-attr]


def named_files(task: Task, data: str | Path | Mapping[str, Any] | None) -> dict[str, list[Path]]:
    """split -> the local files that ``data`` names for it, as :func:`load_data` takes it; nothing for the hub's data.

    Raises: UsageError for splits that the task does not have; InputError for files that are not there.
    """
    options = {name: given for name, given in _options(data).items() if name not in OPTIONS[1:]}
    directory = options.pop("directory", None)
    _check_splits(options, task)
    named = {split: datafiles.expanded(split, given) for split, given in options.items()}
    if directory is not None:
        named = {**datafiles.in_directory(local_path("data", directory), _names(task)), **named}
    return named


def _options(data: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    return {"directory": str(data)} if isinstance(data, (str, Path)) else dict(data or {})


def _count(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UsageError(f"data: {name}: {quoted(repr(value))} is not a number of rows, 1 or more")
    return value


def _check_splits(splits: Iterable[str], task: Task) -> None:
    names = _names(task)
    unknown = [split for split in splits if split not in names]
    if unknown:
        raise UsageError(
            f"data: {listed(unknown)} is neither a split of {quoted(task.name)} ({listed(names)}) "
            f"nor one of {listed(OPTIONS)}"
        )


def _names(task: Task) -> dict[str, tuple[str, ...]]:
    """Every split that data for this task may have, with the hub's names for it."""
    return {**dict.fromkeys(datafiles.SPLITS, ()), **(task.hub.splits if task.hub else {})}


def _read_files(task: Task, paths: list[Path]) -> Dataset:
    return _joined([canonical(datafiles.read(path), task, quoted(path)) for path in paths])


def _read_hub(task: Task, hub: Hub, split: str) -> Dataset:
    parts = []
    for name in hub.splits[split]:
        try:
            rows: Any = datasets.load_dataset(hub.path, hub.config, split=name, revision=hub.revision)
        except Exception as e:
            told = f"data set {hub}, split {name}, cannot be had from the hub: {first_line(e)}"
            raise StorageError(f"{told}; with no network give {option('data', 'DIR')}") from e
        parts.append(canonical(rows, task, f"{hub}, split {name}"))
    return _joined(parts)


def _joined(parts: list[Dataset]) -> Dataset:
    columns = parts[0].column_names
    return concatenate_datasets([part.select_columns(columns) for part in parts])
