"""What every task has: a name and version, its columns, its limits, and where the hub keeps its data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from datasets import Dataset

from loftq.errors import UsageError, listed, quoted

IGNORED = -100  # label of a token that is not learned; PyTorch's cross entropy leaves it out
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens: of an input, of a target, and the overlap of two pieces of a long context."""

    max_length: int
    max_target_length: int | None = None
    doc_stride: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("max_length", 2), ("max_target_length", 1), ("doc_stride", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise UsageError(f"{name}: {quoted(repr(value))} is not a number of tokens, {low} or more")
        if self.doc_stride is not None and self.doc_stride >= self.max_length:
            raise UsageError(f"doc_stride: {self.doc_stride} is not less than max_length {self.max_length}")


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set on the hub. ``splits``: our name of a split -> the hub's splits that make it up."""

    path: str
    config: str | None = None
    revision: str | None = None
    splits: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        return f"{self.path} ({self.config})" if self.config else self.path


def plain_splits(*names: str) -> dict[str, tuple[str, ...]]:
    """Splits that the hub calls as we do."""
    return {name: (name,) for name in names}


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A data set with its prompt, its preprocessing and its metric. Made by ``get_task``.

    Attributes:
        version: raised when the same model would get another figure.
        columns: role -> names a data set may give it; the first that is there is taken.
        reported: splits whose figures are reported; the first that has them is also watched in training,
            unless there is a split to develop on.
    """

    name: str
    version: int = 1
    columns: Mapping[str, tuple[str, ...]]
    limits: Limits
    hub: Hub | None = None
    reported: tuple[str, ...] = ("validation",)
    generation: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str]
    auto_class: ClassVar[str]
    peft_task_type: ClassVar[str]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)

    @property
    @abstractmethod
    def roles(self) -> Mapping[str, str]:
        """Columns of a loaded split, and what stands in them: text, label, answers or messages."""

    @property
    @abstractmethod
    def main_metric(self) -> str:
        """The one figure by which two models are compared."""

    @property
    def greater_is_better(self) -> bool:
        return self.main_metric != "perplexity"

    @property
    def best_metric(self) -> str:
        """What can be watched while training: the main metric, or the loss where that needs text to be generated."""
        return self.main_metric

    @property
    def best_is_greater(self) -> bool:
        return self.best_metric != "loss"

    @property
    def identity(self) -> str:
        return f"{self.name}@{self.version}"

    def check(self, config: Any) -> None:
        """UsageError for a model's configuration that is not of the task's kind, or too short for its lengths."""
        import transformers

        auto = getattr(transformers, self.auto_class)
        if type(config) not in auto._model_mapping and self.auto_class not in getattr(config, "auto_map", {}):
            raise UsageError(f"task {quoted(self.name)} needs {self.auto_class}; there is none of {config.model_type}")
        check_positions(self.limits, config)

    def model_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained`` for the head."""
        return {}

    @abstractmethod
    def prepare(self, dataset: Dataset, tokenizer: Any, *, train: bool) -> Dataset:
        """Token ids and labels of a split that ``load_data`` gave; not padded, that is the collator's work."""

    @abstractmethod
    def collator(self, tokenizer: Any, model: Any = None) -> Callable[[list[dict[str, Any]]], Any]:
        """Makes a padded batch; padding is masked in the attention and, as -100, in the labels."""

    @abstractmethod
    def trainer_metrics(
        self, examples: Dataset, prepared: Dataset, tokenizer: Any
    ) -> Callable[[Any], dict[str, float]] | None:
        """``compute_metrics`` of a Trainer that evaluates ``prepared``; None if only the loss can be watched."""

    @abstractmethod
    def measure(self, model: Any, tokenizer: Any, dataset: Dataset, options: "Measuring") -> dict[str, float]:
        """All metrics of ``model`` on a split; called by ``score``, which documents it."""

    def limited(self, **limits: int | None) -> "Task":
        """The same task with those limits replaced that are not None."""
        given = {name: value for name, value in limits.items() if value is not None}
        unused = [name for name in given if getattr(self.limits, name) is None]
        if unused:
            raise UsageError(f"task {quoted(self.name)} has no {listed(unused)}; leave it out")
        return replace(self, limits=replace(self.limits, **given)) if given else self

    def dev_split(self, available: Collection[str]) -> str | None:
        """The split to watch while training, or None: what is only for testing is never looked at."""
        return next((split for split in ("validation", *self.reported) if split in available and split != "test"), None)

    def eval_splits(self, available: Collection[str]) -> tuple[str, ...]:
        """The splits to report on: the task's own, or else what there is for validation or testing."""
        chosen = tuple(split for split in self.reported if split in available)
        chosen = chosen or next(((split,) for split in ("validation", "test") if split in available), ())
        if not chosen:
            raise UsageError(
                f"task {quoted(self.name)}: nothing to evaluate on among the splits {listed(sorted(available))}; "
                f"wanted {listed(self.reported)}"
            )
        return chosen

    def generation_options(self, choice: str | Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Options for ``generate``: deterministic unless asked otherwise.

        Args:
            choice: None or ``"greedy"``; ``"paper"`` for the sampling of the paper's script, where it has one; or
                options that replace the greedy ones.
        """
        greedy = {**GREEDY, **self.generation}
        if choice is None or choice == "greedy":
            return greedy
        if choice == "paper":
            if not self.sampling:
                raise UsageError(f"generation: task {quoted(self.name)} has no setting named 'paper'; use 'greedy'")
            return {**greedy, **self.sampling}
        if isinstance(choice, str):
            raise UsageError(f"generation: {quoted(repr(choice))} is neither 'greedy', 'paper' nor a mapping")
        return {**greedy, **choice}


def positions_of(config: Any) -> int | None:
    """The tokens that a model's configuration says it can read; None if it sets no end to them."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or None


def check_positions(limits: Limits, config: Any) -> None:
    """Refuse inputs and targets that are longer than the positions of the model: the failure would come late."""
    positions = positions_of(config)
    for name in ("max_length", "max_target_length"):
        length = getattr(limits, name)
        if positions and length and length > positions:
            raise UsageError(
                f"{name}: {length} tokens are more than the model's {positions} positions; "
                f"set {name}: {positions} or less"
            )


@dataclass(frozen=True)
class Measuring:
    """How to measure: rows at a time, options for ``generate``, whether to show a bar."""

    batch_size: int
    generation: Mapping[str, Any]
    progress: bool
