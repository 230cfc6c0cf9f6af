"""The grid of a comparison: its arms, learning rates and seeds, and the order in which they are run.

The ``compare`` section of a recipe::

    compare:
      seeds: [0, 1, 2]
      learning_rates: [1.0e-4, 5.0e-4]        # default: the recipe's own
      further_rates: [2.0e-5, 2.0e-3]         # tried only where the best so far is the outermost on that side
      arms:                                   # each block stands for the product of its lists
        - {method: full, learning_rates: [5.0e-5], seeds: [0]}
        - {method: [qlora, loftq], quantization.bits: [4, 2], lora.rank: 16}

An arm is a way to fine-tune. It may change the method, ``quantization.*`` and ``lora.*``, and have learning rates and
seeds of its own; data, their order, steps and batch are the recipe's, so they are equal for all arms. A block with
learning rates of its own has further rates of its own, or none.

The number of runs follows from results: the grid grows while the best learning rate is at its edge.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from loftq.errors import UsageError, quoted
from loftq.finetune.comparison import chosen_rate
from loftq.finetune.inputs import NOT_ESSENTIAL, held
from loftq.finetune.recipe import Quantization, Recipe, Strict, section
from loftq.spec import BITS, code_for

Rate = Annotated[float, Field(gt=0)]
Rows = Mapping[str, Mapping[str, Any]]  # key of a run -> its row


class Open(Strict):
    """What a comparison varies within an arm."""

    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    learning_rates: Annotated[list[Rate], Field(min_length=1)] | None = None
    further_rates: list[Rate] | None = None


class Section(Open):
    """What may stand under ``compare``."""

    arms: Annotated[list[dict[str, Any]], Field(min_length=1)]


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune: a recipe whose learning rate and seed are still open.

    The first seed chooses a learning rate, the other seeds repeat it. ``learning_rates`` are all tried. Of
    ``further_rates``, which lie below or above them, the nearest is tried while the best so far is the outermost on
    that side.
    """

    recipe: Recipe
    learning_rates: tuple[float, ...]
    further_rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def rates(self, rows: Rows) -> tuple[float, ...]:
        """The learning rates to try, as far as the rows tell: without the last one's row, none follows."""
        rates = self.learning_rates
        while (best := self._best(rates, rows)) is not None and (new := self._beyond(best, rates)):
            rates += new
        return rates

    def rate(self, rows: Rows) -> float | None:
        """The learning rate for further seeds; None while rows of rates to try are missing."""
        return self._best(self.rates(rows), rows)

    def missing(self, rows: Rows) -> int:
        """The number of runs still to do, as far as the rows tell: if no further rate does better than the best one."""
        first = [Run(self, rate, self.seeds[0]) for rate in self.rates(rows)]
        there = [row for run in first if (row := rows.get(run.key))]
        rate = chosen_rate(there) if there else first[0].learning_rate
        return sum(run.key not in rows for run in (*first, *(Run(self, rate, seed) for seed in self.seeds[1:])))

    def _best(self, rates: Sequence[float], rows: Rows) -> float | None:
        first = [rows.get(Run(self, rate, self.seeds[0]).key) for rate in rates]
        return chosen_rate([row for row in first if row]) if all(first) else None

    def _beyond(self, best: float, rates: Sequence[float]) -> tuple[float, ...]:
        """Where ``best`` is the outermost rate, the next one on its side; of a single rate, on both."""
        lower = [rate for rate in self.further_rates if rate < min(rates) == best]
        upper = [rate for rate in self.further_rates if rate > max(rates) == best]
        return tuple([max(lower)] if lower else []) + tuple([min(upper)] if upper else [])

    @functools.cached_property
    def key(self) -> str:
        """Names the arm in the rows; equal for equal arms, whatever the seed and the learning rate."""
        return self.digest(seed=0, learning_rate=1.0)

    def digest(self, *, seed: int, learning_rate: float) -> str:
        """Twelve digits for everything that the result of a run depends on."""
        asked = (seed, learning_rate)
        if asked not in self._digests:
            recipe = self.recipe.changed(**{"seed": seed, "training.learning_rate": learning_rate})
            self._digests[asked] = digest(recipe, self.held)
        return self._digests[asked]

    @functools.cached_property
    def _digests(self) -> dict[tuple[int, float], str]:
        return {}

    @functools.cached_property
    def held(self) -> dict[str, Any]:
        """What the files of model and data held when this was first asked."""
        return held(self.recipe)


@dataclass(frozen=True)
class Run:
    """One fine-tuning: an arm with a learning rate and a seed. ``key`` identifies its row."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def recipe(self) -> Recipe:
        return self.arm.recipe.changed(**{"seed": self.seed, "training.learning_rate": self.learning_rate})

    @functools.cached_property
    def key(self) -> str:
        return self.arm.digest(seed=self.seed, learning_rate=self.learning_rate)


def grid(recipe: Recipe) -> tuple[Arm, ...]:
    """The arms that the ``compare`` section of a recipe stands for.

    Raises: UsageError for a recipe without one, for keys an arm may not set, and whatever a recipe itself refuses.
    """
    if recipe.compare is None:
        raise UsageError("the recipe has no section compare; give it arms: [{method: [lora, qlora, loftq]}]")
    parsed = section(Section, recipe.compare, "compare")
    arms: dict[str, Arm] = {}
    for number, block in enumerate(parsed.arms, 1):
        for arm in _arms(recipe, block, parsed, f"compare.arms, block {number}"):
            known = arms.setdefault(arm.key, arm)
            if known != replace(arm, recipe=known.recipe):
                raise UsageError(
                    f"compare.arms, block {number}: an arm of an earlier block again ({arm.recipe.method}), with other "
                    "learning_rates, further_rates or seeds; give all of an arm's in one block"
                )
    return tuple(arms.values())


def schedule(grids: Sequence[Sequence[Arm]], rows: Rows) -> Iterator[Run]:
    """Every run, in an order in which an interrupted comparison is already a balanced one.

    First all arms of all grids with their first seed and first learning rate, then with the second rate, and so on;
    then, with the rate that did best, seed by seed. ``rows`` is read as runs are taken: a further rate of an arm, and
    its further seeds, come only if the rows of all its rates before are there by then.
    """
    arms = [arm for g in grids for arm in g]
    for i in range(max(len(arm.learning_rates) + len(arm.further_rates) for arm in arms)):
        for arm in arms:
            if i < len(rates := arm.rates(rows)):
                yield Run(arm, rates[i], arm.seeds[0])
    for j in range(1, max(len(arm.seeds) for arm in arms)):
        for arm in arms:
            if j < len(arm.seeds) and (rate := arm.rate(rows)) is not None:
                yield Run(arm, rate, arm.seeds[j])


def planned(grids: Iterable[Iterable[Arm]], rows: Rows) -> int:
    """The number of runs, as far as the rows tell; a row of a learning rate can add one."""
    return sum(len(arm.rates(rows)) + len(arm.seeds) - 1 for arms in grids for arm in arms)


def digest(recipe: Recipe, held: Mapping[str, Any]) -> str:
    """Twelve digits for everything that a run's result depends on; of local files what they hold, not their place.

    A value equal to its default does not count, so that rows outlive a new key; a changed default makes them wrong, but
    for the solver's, which all count.
    """
    values = recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True, exclude={*NOT_ESSENTIAL, "model"})
    if recipe.method == "loftq":  # the solver as it is, for presets and defaults may change
        given = recipe.quantization or Quantization()
        spec = given.solver("loftq")
        values["solver"] = {**asdict(spec), "codes": [code_for(given.code, bits, spec.scales) for bits in BITS]}
    values["data"] = recipe.data.model_dump(include={"max_train_samples", "max_eval_samples"}, exclude_none=True)
    values.get("quantization", {}).pop("calibrate", None)
    text = json.dumps({**values, "held": held}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _own_rate(recipe: Recipe) -> list[float]:
    from transformers import TrainingArguments

    return [recipe.training.get("learning_rate", TrainingArguments.learning_rate)]


def _arms(recipe: Recipe, block: Mapping[str, Any], given: Open, place: str) -> Iterator[Arm]:
    """The product of the lists of a block, each a recipe."""
    own = section(Open, {key: block[key] for key in Open.model_fields if key in block}, place)
    rates = own.learning_rates or given.learning_rates or _own_rate(recipe)
    further = own.further_rates if own.learning_rates or own.further_rates is not None else given.further_rates
    if inside := [rate for rate in further or () if min(rates) <= rate <= max(rates)]:
        raise UsageError(
            f"{place}: further_rates: {inside[0]:g} is not below or above learning_rates, which are "
            f"{min(rates):g} to {max(rates):g}; put it there"
        )
    seeds = own.seeds or given.seeds or [0, 1, 2]
    axes = {k: v if isinstance(v, list) else [v] for k, v in block.items() if k not in Open.model_fields}
    for key, values in axes.items():
        if key != "method" and key.partition(".")[0] not in ("quantization", "lora"):
            raise UsageError(
                f"{place}: {quoted(key)} cannot differ between arms, only method, quantization.*, lora.*, "
                "learning_rates, further_rates and seeds can; set it in the recipe, for all arms alike"
            )
        if not values:
            raise UsageError(f"{place}: {quoted(key)} is an empty list")
    for combination in itertools.product(*axes.values()):
        changed = recipe.changed(**dict(zip(axes, combination, strict=True)))
        yield Arm(essential(changed), tuple(dict.fromkeys(rates)), tuple(further or ()), tuple(dict.fromkeys(seeds)))


def essential(recipe: Recipe) -> Recipe:
    """The recipe without what its method has no use for, so that two arms which differ only in that are one arm."""
    if recipe.method == "full":
        return recipe.changed(quantization=None, lora={})
    if recipe.method == "qlora":
        unused = dict.fromkeys(("quantization.order", "quantization.preset", "quantization.calibrate"))
        defaults = {"quantization.steps": 0, "quantization.svd": "auto", "quantization.calibration_samples": 128}
        return recipe.changed(**unused, **defaults)
    if recipe.method == "lora" and recipe.quantization:
        given = recipe.quantization  # decides which modules get an adapter; widths do only where a pattern leaves some
        kept = {"embeddings": given.embeddings, "min_coverage": given.min_coverage}
        return recipe.changed(quantization={**kept, "bits": given.bits} if "=" in given.bits else kept)
    return recipe
