"""A user's own data set as a task: which kind it is, and what its columns are called. No code."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from loftq.errors import UsageError, quoted
from loftq.finetune.recipe import Strict, section
from loftq.finetune.tasks.base import Hub, Limits, Task, plain_splits
from loftq.finetune.tasks.causal_lm import CausalLM
from loftq.finetune.tasks.classification import TextClassification
from loftq.finetune.tasks.instruction import Instruction, as_is
from loftq.finetune.tasks.metrics import last_number
from loftq.finetune.tasks.span_qa import SpanQA
from loftq.finetune.tasks.summarization import Summarization

Name = Annotated[str, Field(min_length=1)]
Length = Annotated[int, Field(ge=2)]
EXTRACT: dict[str, Callable[[str], object]] = {"text": as_is, "number": last_number}


class _Own(Strict):
    """What every kind has: a name, and where on the hub the data is if it is not given as files."""

    name: Name = "own"
    dataset: Name | None = None
    config: Name | None = None
    splits: dict[str, Name] | None = None

    def shared(self, columns: "Strict") -> dict[str, Any]:
        hub = None
        if self.dataset is not None:
            named = {ours: (theirs,) for ours, theirs in (self.splits or {}).items()}
            hub = Hub(path=self.dataset, config=self.config, splits=named or plain_splits("train", "validation"))
        accepted = {role: (name,) for role, name in columns.model_dump(exclude_none=True).items()}
        return {"name": self.name, "hub": hub, "columns": accepted}

    def task(self) -> Task:
        raise NotImplementedError(f"{type(self).__name__} does not say what task it makes")


class _TextColumns(Strict):
    text: Name
    text_pair: Name | None = None
    label: Name


class _TextClassification(_Own):
    kind: Literal["text-classification"]
    columns: _TextColumns
    labels: Annotated[list[str | int | bool], Field(min_length=2)] | None = None
    regression: bool = False
    metrics: list[Literal["accuracy", "f1", "matthews_correlation"]] = Field(default=["accuracy"], min_length=1)
    max_length: Length = 128

    @model_validator(mode="after")
    def _one_target(self) -> "_TextClassification":
        if (self.labels is None) != self.regression:
            raise PydanticCustomError("labels", "give labels, in the order of their ids, or regression: true")
        if self.regression and "metrics" in self.model_fields_set:
            raise PydanticCustomError("metrics", "metrics are of classes; a regression has its own, leave them out")
        return self

    def task(self) -> Task:
        labels = tuple(str(label).lower() if isinstance(label, bool) else str(label) for label in self.labels or ())
        metrics = ("pearson", "spearman") if self.regression else tuple(dict.fromkeys(self.metrics))
        limits = Limits(self.max_length)
        return TextClassification(**self.shared(self.columns), labels=labels, metrics=metrics, limits=limits)


class _QAColumns(Strict):
    context: Name
    question: Name
    answers: Name


class _SpanQA(_Own):
    kind: Literal["span-qa"]
    columns: _QAColumns
    max_length: Length = 384
    doc_stride: Annotated[int, Field(ge=0)] = 128

    def task(self) -> Task:
        return SpanQA(**self.shared(self.columns), limits=Limits(self.max_length, doc_stride=self.doc_stride))


class _SummaryColumns(Strict):
    document: Name
    summary: Name


class _Summarization(_Own):
    kind: Literal["summarization"]
    columns: _SummaryColumns
    prefix: str = ""
    max_length: Length = 512
    max_target_length: Length = 128

    def task(self) -> Task:
        limits = Limits(self.max_length, self.max_target_length)
        return Summarization(**self.shared(self.columns), prefix=self.prefix, limits=limits)


class _PlainColumns(Strict):
    text: Name = "text"


class _CausalLM(_Own):
    kind: Literal["causal-lm"]
    columns: _PlainColumns = _PlainColumns()
    rows: Literal["documents", "lines"] = "documents"
    max_length: Length = 1024

    def task(self) -> Task:
        return CausalLM(**self.shared(self.columns), rows=self.rows, limits=Limits(self.max_length))


class _InstructionColumns(Strict):
    messages: Name | None = None
    prompt: Name | None = None
    response: Name | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "_InstructionColumns":
        if sorted(self.model_fields_set) not in (["messages"], ["prompt", "response"]):
            raise PydanticCustomError("columns", "give messages, or prompt and response")
        return self


class _Instruction(_Own):
    kind: Literal["instruction"]
    columns: _InstructionColumns
    template: str = "{prompt}\n"
    answer: Literal["text", "number"] | None = None
    max_length: Length = 512

    @model_validator(mode="after")
    def _placeholder(self) -> "_Instruction":
        if self.template.count("{prompt}") != 1:
            raise PydanticCustomError("template", "the template must have {prompt} in it, once")
        return self

    def task(self) -> Task:
        return Instruction(
            **self.shared(self.columns),
            template=self.template,
            extract=EXTRACT[self.answer] if self.answer else None,
            generation={"max_new_tokens": 256},
            limits=Limits(self.max_length),
        )


KINDS: dict[str, type[_Own]] = {
    get_args(own.model_fields["kind"].annotation)[0]: own
    for own in (_TextClassification, _SpanQA, _Summarization, _CausalLM, _Instruction)
}


def own_task(mapping: Mapping[str, Any]) -> Task:
    """The task that a recipe's mapping describes. UsageError, of one line, with all that is wrong in it."""
    kind = mapping.get("kind")
    if kind is None:
        raise UsageError(f"task: a task of your own needs its kind, one of {', '.join(KINDS)}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UsageError(f"task.kind: {quoted(repr(kind))} is not one of {', '.join(KINDS)}")
    return section(KINDS[kind], dict(mapping), "task").task()
