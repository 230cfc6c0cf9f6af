"""Tasks: data set, prompt, preprocessing and metric; named ones, and a user's own data sets by naming columns."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from loftq.errors import UsageError, in_memory, listed, meant, option, quoted
from loftq.finetune.tasks.base import Limits, Measuring, Task
from loftq.finetune.tasks.data import available_splits, load_data, named_files
from loftq.finetune.tasks.named import TASKS


def names() -> tuple[str, ...]:
    """The names of the tasks that come with the package."""
    return tuple(TASKS)


def get_task(
    spec: str | Mapping[str, Any],
    *,
    max_length: int | None = None,
    max_target_length: int | None = None,
    doc_stride: int | None = None,
) -> Task:
    """The task of a name, or that of a mapping which names the columns of a data set (``docs/tasks.md``).

    Args:
        max_length, max_target_length, doc_stride: lengths in tokens, in place of the task's own.

    Raises: UsageError for an unknown name, a mapping with anything wrong in it, or a length the task does not have.
    """
    if isinstance(spec, str):
        if spec not in TASKS:
            known = f"{listed(TASKS, 20)}, nor a mapping of columns{meant(spec, TASKS)}"
            raise UsageError(f"task: {quoted(repr(spec))} is not one of {known}")
        task = TASKS[spec]
    else:
        from loftq.finetune.tasks.own import own_task

        task = own_task(spec)
    return task.limited(max_length=max_length, max_target_length=max_target_length, doc_stride=doc_stride)


def score(
    task: Task,
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    generation: str | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Every metric of the task for a model, and ``n``, the number of rows. Shares are in percent.

    The model is used where it is, without gradients, and left in the mode it was in. In a distributed run every process
    calls this with all of the rows, and gets the same.

    Args:
        dataset: one split, as ``load_data`` gave it.
        batch_size: rows at a time; it changes the last digits, not the meaning.
        generation: see ``Task.generation_options``; for tasks that generate text.

    Raises: NumericalError if what the model puts out is not finite; UsageError if the task's lengths do not fit it.
    """
    task.check(model.config)
    options = Measuring(batch_size, task.generation_options(generation), progress)
    training = model.training
    model.eval()
    try:
        fewer = f"training.per_device_eval_batch_size in a recipe, {option('batch_size')} of `loftq evaluate`"
        with torch.no_grad(), in_memory(f"to evaluate {batch_size} rows at a time; try fewer: {fewer}"):
            return {**task.measure(model, tokenizer, dataset, options), "n": len(dataset)}
    finally:
        model.train(training)
