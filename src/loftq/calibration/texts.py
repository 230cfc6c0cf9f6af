"""The rows that a model is calibrated with: tokens of texts, sampled evenly and without randomness."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.calibration.collect import HELD_EVERY, Row
from loftq.errors import InputError, StorageError, UsageError, command, first_line, listed, option, quoted
from loftq.formats.regular import local_path
from loftq.sources.checkpoint import HUB_ID

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = "text"
CHARACTERS = 8  # of running text that are read for a token that is wanted: more than any language needs
LINES = 64  # read at a time


def table(data: str) -> "tuple[str, Dataset]":
    """What a file or a data set of the hub is called, and its rows.

    Args:
        data: a path; or the hub's ``ORG/NAME``, with ``:CONFIG`` where it has several. Its split ``train`` is taken.

    Raises: InputError for a file that cannot be used; UsageError for a kind of file that is not read; StorageError if
        the hub cannot be reached.
    """
    from loftq.sources import datafiles

    path = local_path("data", data)
    if path.is_file():
        return path.name, datafiles.read(path)
    name, _, config = data.partition(":")
    local = path.exists() or (path.parent != Path() and path.parent.is_dir())  # where a name of the hub would be odd
    if local or not HUB_ID.fullmatch(name) or path.suffix in (*datafiles.FORMATS, ".gz"):
        what = "a directory; name one of its files" if path.is_dir() else "no such file, and not a data set of the hub"
        what = "no regular file; save what it gives, and name that" if path.exists() and not path.is_dir() else what
        raise InputError(f"{quoted(data, 400)}: {what}")
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, config or None, split="train")
    except Exception as e:  # the many ways in which a network or a hub says no
        raise StorageError(
            f"{quoted(data)}: no such file, and not found on the hub ({first_line(e)}); "
            "check the spelling, or the network"
        ) from e
    return data, rows


def rows_of_table(
    place: str, dataset: "Dataset", tokenizer: Any, samples: int, max_length: int, column: str | None
) -> list[Row]:
    """At most ``samples`` rows of tokens, evenly from the whole of a table.

    A table of the one column ``text`` is running text, as every text file is: its lines are joined, and cut into rows
    of exactly ``max_length`` tokens. Other tables give a row for a text; one that is too long gives several, its rest a
    shorter one. Special tokens stand around every row as the tokenizer puts them around a text.

    Args:
        place: what the user calls the table.
        column: of the texts, or two with a comma, which are tokenized as a pair; by default ``text``.

    Raises: InputError for missing columns, values that are no texts, or too little text.
    """
    names = _columns(place, dataset, column)
    if dataset.column_names == [TEXT]:
        rows = rows_of_text(_thinned(dataset, samples, max_length), tokenizer, samples, max_length)
    else:
        chosen = dataset.select(spread(len(dataset), samples))
        texts = [tuple(_text(place, row[name], name) for name in names) for row in chosen]  # type: ignore[index]
        rows = rows_of_texts(texts, tokenizer, samples, max_length)
    return checked(rows, place)


def rows_of_text(lines: Iterable[str], tokenizer: Any, samples: int, max_length: int) -> list[Row]:
    """Rows of running text."""
    texts = [f"{line}\n" for line in lines]
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = _cut(list(chain.from_iterable(ids)), _around(tokenizer), max_length)
    return [rows[i] for i in spread(len(rows), samples)]


def rows_of_texts(texts: Sequence[tuple[str, ...]], tokenizer: Any, samples: int, max_length: int) -> list[Row]:
    """Rows of separate texts, or of pairs of texts; empty ones are passed over."""
    around, rows = _around(tokenizer), []
    for text in texts:
        if len(text) == 2:
            parts = (part[: CHARACTERS * max_length] for part in text)
            pair = tokenizer(*parts, truncation="longest_first", max_length=max_length, verbose=False)
            rows.append({name: list(pair[name]) for name in ("input_ids", "token_type_ids") if name in pair})
        elif text[0].strip():
            enough = text[0][: CHARACTERS * max_length * samples]
            ids = tokenizer(enough, add_special_tokens=False, verbose=False)["input_ids"]
            rows += _cut(list(ids), around, max_length)
    return [rows[i] for i in spread(len(rows), samples)]


def rows_of_batches(batches: Iterable[Mapping[str, Any]], samples: int) -> list[Row]:
    """The first ``samples`` rows of batches as a DataLoader gives them, without their padding."""
    rows: list[Row] = []
    for batch in batches:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise UsageError(f"data: wanted texts, or batches with input_ids, got {type(batch).__name__}")
        ids = batch["input_ids"]
        masks = batch.get("attention_mask")
        for i in range(min(len(ids), samples - len(rows))):
            kept = masks[i].bool() if masks is not None else slice(None)
            rows.append({k: batch[k][i][kept].tolist() for k in ("input_ids", "token_type_ids") if k in batch})
        if len(rows) >= samples:
            break
    return rows


def checked(rows: Sequence[Row], place: str) -> list[Row]:
    """``rows`` of two tokens and more. InputError if they are too few to hold some out."""
    good = [row for row in rows if len(row["input_ids"]) > 1]
    if len(good) < HELD_EVERY:
        raise InputError(
            f"{place}: too little text: {len(good)} samples, wanted {HELD_EVERY} or more, for one in {HELD_EVERY} is "
            f"held out; give more text, or a smaller {option('max_length')}"
        )
    return good


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` evenly spaced numbers below ``count``; all if there are no more."""
    return [i * count // wanted for i in range(wanted)] if count > wanted else list(range(count))


def _columns(place: str, dataset: "Dataset", column: str | None) -> list[str]:
    names = [name.strip() for name in (column or TEXT).split(",")]
    if len(names) > 2 or not all(names):
        raise UsageError(f"{option('column')}: {quoted(column)} is not a column, or two with a comma between")
    missing = [name for name in names if name not in dataset.column_names]
    if missing:
        cure = "" if column else f"; name the column of the texts: {command('calibrate', column='NAME')}"
        raise InputError(f"{place}: no column {listed(missing)}; it has {listed(dataset.column_names)}{cure}")
    if not len(dataset):
        raise InputError(f"{place}: no rows; it is empty")
    return names


def _text(place: str, value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}, column {quoted(column)}: {quoted(repr(value), 60)} is not a text")
    return value


def _thinned(dataset: "Dataset", samples: int, max_length: int) -> Iterator[str]:
    """Lines of as many evenly spaced stretches as samples are wanted, each as long as a sample may need."""
    starts = spread(len(dataset), samples)
    for start, end in zip(starts, [*starts[1:], len(dataset)], strict=True):
        left = CHARACTERS * max_length
        for first in range(start, end, LINES):
            for line in dataset[first : min(first + LINES, end)][TEXT]:
                if left > 0:
                    yield (line or "")[: CHARACTERS * max_length * samples]
                    left -= len(line or "") + 1
            if left <= 0:
                break


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for i in range(len(whole) - len(bare) + 1):
        if whole[i : i + len(bare)] == bare:
            return list(whole[:i]), list(whole[i + len(bare) :])
    return [], []


def _cut(ids: list[int], around: tuple[list[int], list[int]], max_length: int) -> list[Row]:
    before, after = around
    room = max_length - len(before) - len(after)
    if room < 1:
        raise UsageError(
            f"{option('max_length')}: {max_length} leaves no room beside {len(before) + len(after)} special tokens"
        )
    return [{"input_ids": [*before, *ids[i : i + room], *after]} for i in range(0, len(ids), room)]
