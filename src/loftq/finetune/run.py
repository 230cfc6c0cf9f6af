"""The directory of a run: what lies where, and whose it is."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loftq.errors import ConflictError, InputError, listed, option, quoted
from loftq.finetune import checkpoints
from loftq.finetune import recipe as recipes
from loftq.finetune.inputs import NOT_ESSENTIAL, located
from loftq.finetune.recipe import Recipe
from loftq.formats import fsio, strict_json
from loftq.formats.hashed_json import differences


@dataclass(frozen=True)
class RunResult:
    """What came out of a run; ``metrics.json`` is this.

    Attributes:
        metrics: of the task's first split by their names, of further ones with the split's name before them; shares in
            percent; NaN where one is not finite.
        history: what the trainer logged, step by step: losses, learning rates, evaluations; None for numbers that are
            not finite, such as the norm of a gradient that overflowed.
        bytes: size on disk of ``backbone`` and ``adapter``; of a fully trained model, ``backbone`` alone.
        seconds: of training alone, since the last start.
    """

    task: str
    method: str
    seed: int
    metrics: dict[str, float]
    splits: list[str]
    history: list[dict[str, Any]]
    steps: int
    epochs: float
    seconds: float
    learning_rate: float
    bytes: dict[str, int]
    base: str
    processes: int
    device: str
    versions: dict[str, str]


class RunDirectory:
    """Where the parts of a run are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe, self.held, self.metrics = root / "recipe.yaml", root / "inputs.json", root / "metrics.json"
        self.backbone, self.checkpoints, self.logs = root / "backbone", root / "checkpoints", root / "logs"
        self.adapter, self.model = root / "adapter", root / "model"

    @contextmanager
    def claimed(self, recipe: Recipe, held: dict[str, Any] | None, resume: bool) -> Iterator[None]:
        """Keep others out of the directory, and see to it that what lies there belongs to ``recipe``.

        Args:
            held: what the files that the recipe names hold, of :func:`loftq.finetune.inputs.held`; None if they are
                gone, and the run is finished.
            resume: continue what an earlier run of the recipe left; else that is removed first.

        Raises: ConflictError for a directory of another recipe, of other rows or weights, or of something else.
        """
        fsio.make_dirs(self.root)
        with fsio.DirectoryLock(self.root / "lock"):
            own = (self.recipe, self.held, self.metrics)
            torn = [path for file in own for path in self.root.glob(f".{file.name}.*.tmp")]  # as a kill leaves them
            if not self.recipe.exists():
                known = {"lock", "backbone", *(path.name for path in torn)}
                strangers = listed(p.name for p in self.root.iterdir() if p.name not in known)
                if strangers:
                    cure = f"choose another {option('output')}"
                    raise ConflictError(f"{self.root}: no run, and not empty ({strangers}); {cure}")
            elif resume and self.begun:
                self._check_same(recipe, held)
            else:
                fsio.remove(self.metrics)
                for path in (self.checkpoints, self.logs, self.adapter, self.model):
                    fsio.remove_tree(path)
                if not resume:
                    for unfinished in self.root.glob("backbone*.loftq-partial"):
                        fsio.remove_tree(unfinished)
            for path in torn:
                fsio.remove(path)
            fsio.write_atomic(self.recipe, [recipes.dump(recipe).encode()])
            if held is not None:
                fsio.write_json(self.held, held)
            yield

    def _check_same(self, recipe: Recipe, held: dict[str, Any] | None) -> None:
        changed = listed(differences(identity(self.read_recipe()), identity(recipe)))
        if changed:
            raise ConflictError(
                f"{self.root}: holds a run of another recipe ({changed}); choose another {option('output')}, or "
                f"{option('restart', True)} to replace it"
            )
        if self.metrics.exists() and self._written is None:
            raise ConflictError(
                f"{self.root}: a finished run, but adapter/ or model/ is gone; put it back, or train again with "
                f"{option('restart', True)}"
            )
        if held is None or not self.held.exists():
            return
        before = strict_json.load_object(self.held)
        parts = [name for name in {**before, **held} if before.get(name) != held.get(name)]
        if parts:
            raise ConflictError(
                f"{self.root}: holds a run from before the recipe's {listed(parts)} changed; choose another "
                f"{option('output')}, or {option('restart', True)} to replace it"
            )

    @property
    def begun(self) -> bool:
        """Whether there is something of a training to lose."""
        written = (self.metrics, self.adapter, self.model, *self.checkpoints.glob("checkpoint-*"))
        return any(path.exists() for path in written)

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether a result of this very recipe is here."""
        return self.metrics.exists() and self.recipe.exists() and not self.is_of_another(recipe)

    def is_of_another(self, recipe: Recipe) -> bool:
        """Whether what is begun here is of another recipe."""
        return self.recipe.exists() and self.begun and identity(self.read_recipe()) != identity(recipe)

    def read_recipe(self) -> Recipe:
        return recipes.read(self.recipe)

    def result(self) -> RunResult | None:
        """The result of a finished run. InputError if ``metrics.json`` is not one."""
        if not self.metrics.exists():
            return None
        values = strict_json.load_object(self.metrics)
        wanted = {field.name for field in fields(RunResult)}
        if values.keys() != wanted:
            odd = listed(sorted(values.keys() ^ wanted))
            raise InputError(f"{self.metrics}: {odd} unknown or missing; not written by this loftq")
        try:
            numbers = {name: math.nan if value is None else value for name, value in values["metrics"].items()}
            found = {**values, "metrics": numbers}
            TypeAdapter(RunResult).validate_python(found)
        except (AttributeError, ValidationError) as e:
            raise InputError(f"{self.metrics}: fields of the wrong type; not written by this loftq") from e
        return RunResult(**found)

    def finish(self, result: RunResult) -> None:
        """Written last: a run without it is not finished."""
        fsio.write_json(self.metrics, strict_json.finite(asdict(result)))

    def last_checkpoint(self, *, resumable: bool = True) -> Path | None:
        """The newest checkpoint that is whole.

        Args:
            resumable: whether checkpoints hold more than weights; else one is of use only at the end of training.
        """
        newest = checkpoints.newest(self.checkpoints)
        return newest if newest and (resumable or checkpoints.is_at_end(newest)) else None

    @property
    def trained(self) -> Path:
        """What training wrote. InputError if it has not come so far."""
        if self._written is None or not self.metrics.exists():
            raise InputError(f"{quoted(self.root)}: not a finished run; `loftq train` on its recipe continues it")
        return self._written

    @property
    def _written(self) -> Path | None:
        return next((path for path in (self.adapter, self.model) if path.is_dir()), None)


def identity(recipe: Recipe) -> dict[str, Any]:
    """All of a recipe that the result depends on, beside what its files hold."""
    return {key: value for key, value in located(recipe).to_dict().items() if key not in NOT_ESSENTIAL}
