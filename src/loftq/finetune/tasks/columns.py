"""From the columns of a file to those of a task: found by their names, checked row by row, labels made numbers.

Every refusal names the place, the row (counted from 1) and the column as the user knows it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset, Value

from loftq.errors import InputError, UsageError, listed, quoted
from loftq.finetune.tasks.base import Task
from loftq.sources import databounds

_NEW = "_new"


def canonical(dataset: Dataset, task: Task, place: str) -> Dataset:
    """The columns of ``task.roles`` alone, under those names, with values that are what they should be.

    Args:
        place: what the user calls the source: a file, or a data set of the hub and its split.

    Raises: InputError for a missing column, an empty set, or a value that cannot be used.
    """
    if not len(dataset):
        raise InputError(f"{place}: no rows; it is empty")
    found = _found(dataset, task, place)
    dataset = dataset.select_columns(list(found.values())).rename_columns({v: k for k, v in found.items() if v != k})
    for role, name in found.items():
        dataset = _CONVERT[task.roles[role]](dataset, role, task, f"{place}, column {quoted(name)}")
    return dataset


def _found(dataset: Dataset, task: Task, place: str) -> dict[str, str]:
    """role -> column, for every role that is there."""
    found, missing = {}, []
    for role, accepted in task.columns.items():
        name = next((n for n in accepted if n in dataset.column_names), None)
        if name is not None:
            found[role] = name
        else:
            missing.append(" or ".join(map(quoted, accepted)))
    if missing:
        raise InputError(
            f"{place}: no column {listed(missing)}; it has {listed(dataset.column_names)}; task {quoted(task.name)} "
            "needs it, or name your columns in a task of your own"
        )
    if len(set(found.values())) < len(found):
        raise UsageError(f"task {quoted(task.name)}: two of its columns are called the same: {listed(found.values())}")
    return found


def _text(dataset: Dataset, role: str, task: Task, where: str) -> Dataset:
    if dataset.features[role] != Value("string") or dataset.data.column(role).null_count:
        for row, value in enumerate(dataset[role], 1):
            if not isinstance(value, str):
                raise _broken(where, row, value, "text")
        dataset = dataset.cast_column(role, Value("string"))
    databounds.check_texts(dataset, role, where)
    return dataset


def _label(dataset: Dataset, role: str, task: Task, where: str) -> Dataset:
    """Class numbers from numbers or names; for a task without class names, finite numbers."""
    labels: tuple[str, ...] = task.labels  # type: ignore[attr-defined]
    values: Iterable[Any] = dataset[role]
    if not labels:
        return _replaced(dataset, role, _each(values, _number, "a finite number", where))
    names = getattr(dataset.features[role], "names", None)  # of a ClassLabel of the hub
    if names and set(names) <= set(labels):
        values = [names[value] if value is not None and 0 <= value < len(names) else value for value in values]
    known = {name: i for i, name in enumerate(labels)}
    if not any(name.isdecimal() for name in labels):
        known |= {str(i): i for i in range(len(labels))}
    wanted = f"one of {listed(labels)}" + (f" or 0 to {len(labels) - 1}" if len(known) > len(labels) else "")
    return _replaced(dataset, role, _each(values, lambda value: known.get(_name(value)), wanted, where))


def _answers(dataset: Dataset, role: str, task: Task, where: str) -> Dataset:
    """Texts of answers and where they begin in the context, as ``{"text": [...], "answer_start": [...]}``."""
    rows = zip(dataset[role], dataset["context"], strict=True)
    wanted = "at least one answer, text and answer_start, that stands there in the context"
    return _replaced(dataset, role, _each(rows, _located, wanted, where))


def _messages(dataset: Dataset, role: str, task: Task, where: str) -> Dataset:
    wanted = "a list of messages, role and content, of which the last is the assistant's and the first is not"
    return _replaced(dataset, role, _each(dataset[role], _conversation, wanted, where))


_CONVERT: dict[str, Callable[..., Dataset]] = {
    "text": _text,
    "label": _label,
    "answers": _answers,
    "messages": _messages,
}


def _each(values: Iterable[Any], convert: Callable[[Any], Any], wanted: str, where: str) -> list[Any]:
    """Every value converted; InputError for the first whose conversion is None."""
    result = []
    for row, value in enumerate(values, 1):
        converted = convert(value)
        if converted is None:
            raise _broken(where, row, value[0] if isinstance(value, tuple) else value, wanted)
        if isinstance(converted, list) and (size := sum(len(m["content"]) for m in converted)) > databounds.MAX_ROW:
            raise InputError(f"{where}, row {row}: {databounds.long_text(size)}")
        result.append(converted)
    return result


def _broken(where: str, row: int, value: Any, wanted: str) -> InputError:
    came = "nothing" if value is None else quoted(repr(value), 60)
    return InputError(f"{where}, row {row}: {came} is not {wanted}; mend or remove the row")


def _replaced(dataset: Dataset, role: str, values: list[Any]) -> Dataset:
    added = dataset.add_column(_NEW, values)  # type: ignore[call-arg]
    return added.remove_columns(role).rename_column(_NEW, role)  # never without columns, and so without rows


def _name(value: Any) -> str:
    """A label as a key: 1, 1.0 and "1" are the same, True is ``true``."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _located(value: tuple[Any, str]) -> dict[str, list[Any]] | None:
    answers, context = value
    try:
        if isinstance(answers, list):
            answers = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
        pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
        right = pairs and all(text and start >= 0 and context.startswith(text, start) for text, start in pairs)
    except (KeyError, TypeError, ValueError):
        return None
    return {"text": [text for text, _ in pairs], "answer_start": [start for _, start in pairs]} if right else None


def _conversation(messages: Any) -> list[dict[str, str]] | None:
    try:
        result = [{"role": message["role"], "content": message["content"]} for message in messages]
    except (KeyError, TypeError):
        return None
    usable = result and all(isinstance(part, str) for message in result for part in message.values())
    return result if usable and result[-1]["role"] == "assistant" != result[0]["role"] else None
