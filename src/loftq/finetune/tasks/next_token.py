"""What tasks for a model that predicts the next token share."""

from typing import Any, ClassVar

from datasets import Dataset

from loftq.errors import UsageError, quoted
from loftq.finetune.tasks import batches, loops, metrics
from loftq.finetune.tasks.base import Measuring, Task


class NextToken(Task):
    """Sequences whose tokens are learned, all or some, and judged by their perplexity."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"

    @property
    def best_metric(self) -> str:
        return "loss"

    def check(self, config: Any) -> None:
        from transformers import MODEL_FOR_MASKED_LM_MAPPING

        super().check(config)
        causal = any(getattr(config, name, False) for name in ("is_decoder", "is_encoder_decoder", "causal"))
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal:
            raise UsageError(
                f"task {quoted(self.name)} needs a model that reads from left to right, as Llama and GPT-2 do; "
                f"{config.model_type} sees the tokens that it should predict"
            )

    def collator(self, tokenizer: Any, model: Any = None) -> Any:
        return batches.pad_sequences(batches.padding(tokenizer, "right"), model)

    def trainer_metrics(self, examples: Dataset, prepared: Dataset, tokenizer: Any) -> None:
        return None

    def measure(self, model: Any, tokenizer: Any, dataset: Dataset, options: Measuring) -> dict[str, float]:
        prepared = self.prepare(dataset, tokenizer, train=False)
        nats, tokens = loops.loss(model, prepared, self.collator(tokenizer, model), options)
        return metrics.perplexity(nats, tokens)
