"""Sentences and pairs of sentences, put into classes or given a number."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from loftq.errors import UsageError, listed, quoted
from loftq.finetune.tasks import batches, loops, metrics
from loftq.finetune.tasks.base import Measuring, Task


@dataclass(frozen=True, kw_only=True)
class TextClassification(Task):
    """The text, or the pair of texts as the tokenizer joins them, cut at ``max_length``, the longer one first.

    Attributes:
        labels: names of the classes, by id; empty for a regression.
        metrics: main one first.
    """

    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)

    kind: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"

    @property
    def roles(self) -> dict[str, str]:
        return {"text": "text", "text_pair": "text", "label": "label"}

    @property
    def main_metric(self) -> str:
        return self.metrics[0]

    def check(self, config: Any) -> None:
        super().check(config)
        trained = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
        theirs = [config.id2label[i] for i in sorted(config.id2label or {})]
        ours, own = ([str(name).lower() for name in names] for names in (self.labels, theirs))
        if trained and ours != own and sorted(ours) == sorted(own):
            raise UsageError(
                f"task {quoted(self.name)} has the classes {listed(self.labels)}, the model's head has them as "
                f"{listed(theirs)}; put the rows of the head, and id2label in config.json, in the task's order"
            )

    def model_options(self) -> dict[str, Any]:
        if not self.labels:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def prepare(self, dataset: Dataset, tokenizer: Any, *, train: bool) -> Dataset:
        batches.check_tokenizer(self.limits, tokenizer)

        def encoded(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            pairs = (rows["text_pair"],) if "text_pair" in rows else ()
            ids = tokenizer(rows["text"], *pairs, truncation=True, max_length=self.limits.max_length)
            return {**ids, "labels": rows["label"]}

        return batches.tokenized(dataset, encoded, batched=True)

    def collator(self, tokenizer: Any, model: Any = None) -> Any:
        return batches.pad_inputs(batches.padding(tokenizer))

    def trainer_metrics(
        self, examples: Dataset, prepared: Dataset, tokenizer: Any
    ) -> Callable[[Any], dict[str, float]]:
        def compute(evaluated: Any) -> dict[str, float]:
            logits = evaluated.predictions
            return self._metrics(logits[0] if isinstance(logits, tuple) else logits, evaluated.label_ids)

        return compute

    def measure(self, model: Any, tokenizer: Any, dataset: Dataset, options: Measuring) -> dict[str, float]:
        prepared = self.prepare(dataset, tokenizer, train=False)
        inputs = prepared.remove_columns("labels")
        logits = loops.forward(model, inputs, self.collator(tokenizer, model), ["logits"], options)
        return self._metrics([row for (row,) in logits], prepared["labels"])

    def _metrics(self, logits: Any, references: Any) -> dict[str, float]:
        if not self.labels:
            return metrics.regression(np.reshape(logits, -1), np.asarray(references))
        predictions = np.argmax(np.asarray(logits), axis=-1)
        return metrics.classification(self.metrics, predictions, np.asarray(references), len(self.labels))
