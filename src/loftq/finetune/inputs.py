"""What a recipe names: its task, its rows, its model; and what tells their contents from others'."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from loftq.checkpoint.assemble import ADAPTER
from loftq.checkpoint.manifest import MANIFEST, read_manifest
from loftq.finetune.recipe import Recipe
from loftq.finetune.tasks import Task, available_splits, get_task, load_data, named_files
from loftq.formats.regular import local_path
from loftq.sources.identity import digests

NOT_ESSENTIAL = {"output", "note", "compare"}  # of a recipe: what the result of a run does not depend on
# Files of a model's directory that are read, beside weights.
OF_MODEL = ("config.json", "generation_config.json", "tokenizer", "vocab", "merges", "spiece", "sentencepiece",
            "special_tokens_map", "added_tokens", "chat_template")  # fmt: skip


def task_of(recipe: Recipe) -> Task:
    """The task with the recipe's limits."""
    limits = {k: getattr(recipe, k) for k in ("max_length", "max_target_length", "doc_stride")}
    return get_task(recipe.task, **limits)


def located(recipe: Recipe) -> Recipe:
    """The recipe with whole paths for what is local, so that it means the same from every directory."""

    def whole(place: Any) -> Any:
        if isinstance(place, list):
            return [whole(one) for one in place]
        return str(local_path("data", place).absolute()) if isinstance(place, str) else place

    changes = {"data": {name: whole(place) for name, place in _data(recipe).items()}}
    calibrate = recipe.quantization.calibrate if recipe.quantization else None
    for key, place in (("model", recipe.model), ("quantization.calibrate", calibrate)):
        if place and Path(place).expanduser().exists():  # else it is a name on the hub
            changes[key] = whole(place)
    return recipe.changed(**changes)


def splits_of(recipe: Recipe, task: Task) -> tuple[str, ...]:
    """The splits that the recipe's data have."""
    return available_splits(task, _data(recipe))


def read_data(recipe: Recipe, task: Task, splits: Sequence[str]) -> dict[str, Dataset]:
    """Split -> rows, as many of the first as the recipe wants. A split that is not wanted may be as it likes."""
    return load_data(task, _data(recipe), splits)


def held(recipe: Recipe) -> dict[str, Any]:
    """What the files that a recipe names hold, and the version of its task; of names on the hub, the names.

    Places and times are no part of it: a copy holds the same.
    """
    task = task_of(recipe)
    files = named_files(task, _data(recipe))
    calibrate = recipe.quantization.calibrate if recipe.quantization else None
    return {
        "task": task.identity,
        "model": _model(Path(recipe.model).expanduser()) or recipe.model,
        "data": {split: digests(mine) for split, mine in files.items()} or str(task.hub),
        **({"calibrate": contents(calibrate)} if calibrate else {}),
    }


def contents(place: str) -> Any:
    """Name, size and SHA-256 of a file, of every file of a directory, or of a glob's.

    A name that is nothing local stands for itself.
    """
    path = Path(place).expanduser()
    found = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    files = [f for p in found for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
    return digests(f for f in files if f.is_file()) or place


def _data(recipe: Recipe) -> dict[str, Any]:
    """As the tasks take it."""
    return recipe.data.model_dump(exclude_none=True)


def _model(directory: Path) -> list[Any]:
    """The files of a local model that are read. Of a LoftQ checkpoint, also how it was made, and its adapter."""
    if not directory.is_dir():
        return []
    weights = (".safetensors", ".bin")
    files = [f for f in sorted(directory.iterdir()) if f.name.startswith(OF_MODEL) or f.suffix in weights]
    if not (directory / MANIFEST).is_file():
        return digests(files)
    made = read_manifest(directory)["identity"]
    return [*digests([*files, *sorted((directory / ADAPTER).glob("*.safetensors"))]), made["options"], made["plan"]]
