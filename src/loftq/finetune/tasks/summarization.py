"""Documents and their summaries, for a model with an encoder and a decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from loftq.errors import UsageError, quoted
from loftq.finetune.tasks import batches, loops, metrics
from loftq.finetune.tasks.base import Measuring, Task


@dataclass(frozen=True, kw_only=True)
class Summarization(Task):
    """The document, after a ``prefix`` (T5 wants one), cut at ``max_length``; the summary at ``max_target_length``.

    ROUGE of the generated summaries, and beside it that of the first three sentences of the documents.
    """

    prefix: str = ""

    kind: ClassVar[str] = "summarization"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_task_type: ClassVar[str] = "SEQ_2_SEQ_LM"

    @property
    def roles(self) -> dict[str, str]:
        return {"document": "text", "summary": "text"}

    @property
    def main_metric(self) -> str:
        return "rouge2"

    def generation_options(self, choice: Any = None) -> dict[str, Any]:
        return {"max_new_tokens": self.limits.max_target_length, **super().generation_options(choice)}

    def prepare(self, dataset: Dataset, tokenizer: Any, *, train: bool) -> Dataset:
        batches.check_tokenizer(self.limits, tokenizer)

        def encoded(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            texts = [self.prefix + document for document in rows["document"]]
            inputs = tokenizer(texts, truncation=True, max_length=self.limits.max_length)
            targets = tokenizer(text_target=rows["summary"], truncation=True, max_length=self.limits.max_target_length)
            return {
                "input_ids": inputs["input_ids"],
                "attention_mask": inputs["attention_mask"],
                "labels": targets["input_ids"],
            }

        return batches.tokenized(dataset, encoded, batched=True)

    def collator(self, tokenizer: Any, model: Any = None) -> Any:
        return batches.pad_sequences(batches.padding(tokenizer), model)

    def trainer_metrics(
        self, examples: Dataset, prepared: Dataset, tokenizer: Any
    ) -> Callable[[Any], dict[str, float]]:
        def compute(evaluated: Any) -> dict[str, float]:
            ids = evaluated.predictions[0] if isinstance(evaluated.predictions, tuple) else evaluated.predictions
            ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            return metrics.rouge(texts, list(examples["summary"]))

        return compute

    def measure(self, model: Any, tokenizer: Any, dataset: Dataset, options: Measuring) -> dict[str, float]:
        tokenizer = batches.padding(tokenizer)
        collate = batches.pad_inputs(tokenizer)
        inputs = self.prepare(dataset, tokenizer, train=False).remove_columns("labels")
        texts = loops.generate(model, tokenizer, inputs, collate, options)
        references = list(dataset["summary"])
        baseline = metrics.rouge([metrics.lead3(document) for document in dataset["document"]], references)
        return {**metrics.rouge(texts, references), **{f"lead3_{name}": value for name, value in baseline.items()}}

    def check(self, config: Any) -> None:
        if not config.is_encoder_decoder:
            raise UsageError(
                f"task {quoted(self.name)} needs a model with an encoder and a decoder, as BART and T5 are; "
                "for a decoder alone use kind: instruction"
            )
        super().check(config)
