"""The grid of a comparison: its arms, learning rates and seeds, and the order in which they are run.

The ``compare`` section of a recipe::

    compare:
      seeds: [0, 1, 2]
      learning_rates: [1.0e-4, 5.0e-4]        # default: the recipe's own
      arms:                                   # each block stands for the product of its lists
        - {method: full, learning_rates: [5.0e-5]}
        - {method: [qlora, loftq], quantization.bits: [4, 2], lora.rank: 16}

An arm is a way to fine-tune. It may change the method, ``quantization.*`` and ``lora.*``, and have learning rates of
its own; data, their order, steps and batch are the recipe's, so they are equal for all arms.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from loftq.errors import UsageError, quoted
from loftq.recipe import Recipe, Strict, section
from loftq.report.comparison import chosen_rate

NOT_ESSENTIAL = ("output", "note", "compare")


class Section(Strict):
    """What may stand under ``compare``."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1)
    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    arms: Annotated[list[dict[str, Any]], Field(min_length=1)]


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune: a recipe whose learning rate and seed are still open, and the rates to choose from."""

    recipe: Recipe
    learning_rates: tuple[float, ...]

    @property
    def key(self) -> str:
        """Names the arm in the rows; equal for equal arms, whatever the seed and the learning rate."""
        return digest(self.recipe.changed(**{"seed": 0, "training.learning_rate": 1.0}))


@dataclass(frozen=True)
class Run:
    """One fine-tuning: an arm with a learning rate and a seed. ``key`` identifies its row."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def recipe(self) -> Recipe:
        return self.arm.recipe.changed(**{"seed": self.seed, "training.learning_rate": self.learning_rate})

    @property
    def key(self) -> str:
        return digest(self.recipe)


@dataclass(frozen=True)
class Grid:
    """All arms of one recipe, and the seeds. The first seed chooses each arm's learning rate, the others repeat it."""

    recipe: Recipe
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return sum(len(arm.learning_rates) + len(self.seeds) - 1 for arm in self.arms)


def grid(recipe: Recipe) -> Grid:
    """The grid that the ``compare`` section of a recipe stands for.

    Raises: UsageError for a recipe without one, for keys an arm may not set, and whatever a recipe itself refuses.
    """
    if recipe.compare is None:
        raise UsageError("the recipe has no section compare; give it arms: [{method: [lora, qlora, loftq]}]")
    parsed = section(Section, recipe.compare, "compare")
    rates = parsed.learning_rates or _own_rate(recipe)
    arms: dict[str, Arm] = {}
    for number, block in enumerate(parsed.arms, 1):
        for arm in _arms(recipe, block, rates, f"compare.arms, block {number}"):
            arms.setdefault(arm.key, arm)
    return Grid(recipe, tuple(arms.values()), tuple(dict.fromkeys(parsed.seeds)))


def schedule(grids: Sequence[Grid], rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Run]:
    """Every run, in an order in which an interrupted comparison is already a balanced one.

    First all arms of all grids with the first seed and their first learning rate, then with the second rate, and so
    on; then, with the rate that did best, seed by seed. ``rows`` (key of a run -> its row) is read when the rates are
    chosen, so the rows of the runs given out before have to be in it by then.
    """
    for i in range(max((len(arm.learning_rates) for g in grids for arm in g.arms), default=0)):
        for g in grids:
            yield from (Run(arm, arm.learning_rates[i], g.seeds[0]) for arm in g.arms if i < len(arm.learning_rates))
    for j in range(1, max((len(g.seeds) for g in grids), default=0)):
        for g in grids:
            yield from (Run(arm, _best(arm, g.seeds[0], rows), g.seeds[j]) for arm in g.arms if j < len(g.seeds))


def digest(recipe: Recipe) -> str:
    """Twelve digits for everything that a run's result depends on."""
    values = {k: v for k, v in recipe.to_dict().items() if k not in NOT_ESSENTIAL}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _best(arm: Arm, seed: int, rows: Mapping[str, Mapping[str, Any]]) -> float:
    return chosen_rate([rows[Run(arm, rate, seed).key] for rate in arm.learning_rates])


def _own_rate(recipe: Recipe) -> list[float]:
    from transformers import TrainingArguments

    return [recipe.training.get("learning_rate", TrainingArguments.learning_rate)]


def _arms(recipe: Recipe, block: Mapping[str, Any], rates: Sequence[float], place: str) -> Iterator[Arm]:
    """The product of the lists of a block, each a recipe."""
    own = block.get("learning_rates")
    if own is not None:
        rates = section(Section, {"learning_rates": own, "arms": [{}]}, place).learning_rates or rates
    axes = {
        key: value if isinstance(value, list) else [value] for key, value in block.items() if key != "learning_rates"
    }
    for key, values in axes.items():
        if key != "method" and key.partition(".")[0] not in ("quantization", "lora"):
            raise UsageError(
                f"{place}: {quoted(key)} cannot differ between arms, only method, quantization.*, lora.* and "
                "learning_rates can; set it in the recipe, for all arms alike"
            )
        if not values:
            raise UsageError(f"{place}: {quoted(key)} is an empty list")
    for combination in itertools.product(*axes.values()):
        arm = essential(recipe.changed(**dict(zip(axes, combination, strict=True))))
        yield Arm(arm, tuple(dict.fromkeys(map(float, rates))))


def essential(recipe: Recipe) -> Recipe:
    """The recipe without what its method has no use for, so that two arms which differ only in that are one arm."""
    if recipe.method == "full":
        return recipe.changed(quantization=None, lora={})
    if recipe.method == "qlora":
        return recipe.changed(**{"quantization.steps": 0, "quantization.order": "quantize-first"})
    if recipe.method == "lora" and recipe.quantization:
        given = recipe.quantization  # decides which modules get an adapter; widths do only where a pattern leaves some
        kept = {"embeddings": given.embeddings, "min_coverage": given.min_coverage}
        return recipe.changed(quantization={**kept, "bits": given.bits} if "=" in given.bits else kept)
    return recipe
