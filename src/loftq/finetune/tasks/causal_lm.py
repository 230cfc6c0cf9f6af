"""Plain text, for a model that predicts the next token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Features, List, Value

from loftq.errors import InputError, quoted
from loftq.finetune.tasks import batches
from loftq.finetune.tasks.next_token import NextToken

ROWS = ("documents", "lines")


@dataclass(frozen=True, kw_only=True)
class CausalLM(NextToken):
    """All rows one after the other, cut into blocks of ``max_length`` tokens; what is left over is left out.

    Attributes:
        rows: ``documents``, each with an end-of-text token after it; or ``lines`` of a text, each with the line break
            and whatever the tokenizer puts around a text, blank ones as empty texts. That is what the paper's script
            makes of the hub's WikiText-2, and a file of the same lines gives the same tokens.
    """

    rows: str

    kind: ClassVar[str] = "causal-lm"

    @property
    def roles(self) -> dict[str, str]:
        return {"text": "text"}

    @property
    def main_metric(self) -> str:
        return "perplexity"

    def prepare(self, dataset: Dataset, tokenizer: Any, *, train: bool) -> Dataset:
        batches.check_tokenizer(self.limits, tokenizer)
        end = batches.end_token(tokenizer) if self.rows == "documents" else ""

        def encoded(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            if self.rows == "documents":
                ids = tokenizer([t + end for t in rows["text"]], add_special_tokens=False, verbose=False)
            else:
                ids = tokenizer([_line(t) for t in rows["text"]], verbose=False)
            return {"ids": ids["input_ids"]}

        rows = batches.tokenized(dataset, encoded, batched=True)
        stream = np.concatenate([np.asarray(ids, np.int64) for ids in rows["ids"]])
        if len(stream) < 2:
            raise InputError(f"task {quoted(self.name)}: the texts have no tokens to predict")
        length = min(self.limits.max_length, len(stream))  # a text shorter than a block is a block
        blocks = list(stream[: len(stream) // length * length].reshape(-1, length))
        features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int64"))})
        return Dataset.from_dict({"input_ids": blocks, "labels": blocks}, features=features)


def _line(text: str) -> str:
    """A line as the hub's WikiText has it: with its line break, or empty."""
    return text.rstrip("\n") + "\n" if text.strip() else ""
