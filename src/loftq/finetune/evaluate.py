"""``loftq evaluate``: a model on a task, whatever it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq.architecture.loading import load_tokenizer
from loftq.checkpoint.assemble import ADAPTER
from loftq.checkpoint.manifest import MANIFEST
from loftq.errors import InputError, UsageError, option, quoted
from loftq.finetune.inputs import read_data, splits_of, task_of
from loftq.finetune.model import add_start, load_adapter, load_model, refuse_untrained
from loftq.finetune.recipe import Recipe, parse
from loftq.finetune.run import RunDirectory
from loftq.finetune.tasks import Task, names
from loftq.finetune.train import evaluate_splits
from loftq.formats.regular import local_path
from loftq.serving.adapter import place_of
from loftq.sources.checkpoint import resolve

# Keys of a recipe that say what is evaluated.
OF_TASKS = ("task", "data", "max_length", "max_target_length", "doc_stride", "generation")


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` of the first of ``splits`` by their names, of others with the split's name before them."""

    target: str
    task: str
    splits: list[str]
    metrics: dict[str, float]


def evaluate(
    target: str,
    *,
    task: str | dict[str, Any] | None = None,
    data: str | None = None,
    splits: Sequence[str] = (),
    adapter: Path | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    generation: str | None = None,
) -> Evaluation:
    """What :func:`loftq.evaluate` documents; ``generation`` is its ``sampling``."""
    adapter = adapter and place_of(adapter)
    run = RunDirectory(local_path("the target", target))
    is_run = run.recipe.is_file()
    asked = _asked(task)
    recipe = run.read_recipe() if is_run else _recipe_for(target, asked.get("task"))
    given = {"generation": generation, "data": data, "max_length": max_length}
    recipe = recipe.changed(**{**asked, **{key: value for key, value in given.items() if value is not None}})
    known = task_of(recipe)
    wanted = tuple(splits) or known.eval_splits(splits_of(recipe, known))
    rows = read_data(recipe, known, wanted)
    model, tokenizer = _model(known, recipe, run if is_run else None, adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    metrics = evaluate_splits(recipe, known, model, tokenizer, rows, batch_size)
    return Evaluation(target, known.identity, list(wanted), metrics)


def _asked(task: str | dict[str, Any] | None) -> dict[str, Any]:
    """What a task, or a recipe with a task, says of an evaluation."""
    if isinstance(task, dict) and "task" in task:
        return {key: task[key] for key in OF_TASKS if task.get(key) is not None}
    return {} if task is None else {"task": task}


def _recipe_for(target: str, task: Any) -> Recipe:
    if task is None:
        raise UsageError(
            f"{quoted(target, 400)} is no run of `loftq train`: say {option('task')}, one of {', '.join(names())}"
        )
    return parse({"model": target, "task": task, "method": "full"})


def _model(task: Task, recipe: Recipe, run: RunDirectory | None, adapter: Path | None) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    if run is not None:
        if adapter is not None:
            raise UsageError(f"{option('adapter')} is for a model; a run has its own adapter")
        trained, result = run.trained, run.result()
        assert result is not None
        base = trained if trained == run.model else _base(run, Path(result.base))
        adapter = trained if trained == run.adapter else None
        dtype: Any = torch.bfloat16 if recipe.training.get("bf16") and adapter else torch.float32
    else:
        base, dtype = resolve(recipe.model), "auto"
    tokenizer = load_tokenizer(base)
    model, new_modules = load_model(task, base, dtype, tokenizer)
    if adapter is not None:
        return load_adapter(model, adapter, new_modules, base), tokenizer
    refuse_untrained(new_modules, base)
    started = (base / MANIFEST).is_file() or (base / ADAPTER).is_dir()
    return (add_start(model, base, 0.0) if started else model), tokenizer


def _base(run: RunDirectory, recorded: Path) -> Path:
    """The frozen model under a run's adapter; a run that was moved has taken its own backbone along."""
    found = next((path for path in (run.backbone, recorded) if path.is_dir()), None)
    if found is None:
        raise InputError(f"{quoted(run.root)}: its base {quoted(recorded)} is gone; listed in {quoted(run.metrics)}")
    return found
