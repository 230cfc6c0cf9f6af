"""Prompts and responses, or whole conversations, for a model that predicts the next token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from jinja2 import TemplateError

from loftq.errors import InputError, UsageError, quoted
from loftq.finetune.tasks import batches, loops, metrics
from loftq.finetune.tasks.base import IGNORED, Measuring
from loftq.finetune.tasks.next_token import NextToken


def as_is(text: str) -> str:
    """The text without blanks around it."""
    return text.strip()


@dataclass(frozen=True, kw_only=True)
class Instruction(NextToken):
    """The prompt put into ``template``, then the response and an end-of-text token; only these two are learned.

    With a column ``messages`` the tokenizer's chat template writes all, and every message of the assistant is learned.

    Attributes:
        template: text with ``{prompt}`` in it.
        target: what is learned, out of the response in the data.
        extract: what is compared, out of a generated or learned text; None if nothing is generated and only the
            perplexity of the responses is measured.
    """

    template: str = "{prompt}"
    target: Callable[[str], str] = as_is
    extract: Callable[[str], object] | None = None

    kind: ClassVar[str] = "instruction"

    @property
    def roles(self) -> dict[str, str]:
        return {"messages": "messages"} if "messages" in self.columns else {"prompt": "text", "response": "text"}

    @property
    def main_metric(self) -> str:
        return "exact_match" if self.extract else "perplexity"

    def prepare(self, dataset: Dataset, tokenizer: Any, *, train: bool) -> Dataset:
        batches.check_tokenizer(self.limits, tokenizer)
        end = tokenizer.convert_tokens_to_ids(batches.end_token(tokenizer))

        def encoded(row: dict[str, Any], index: int) -> dict[str, Any]:
            try:
                parts = self._conversation(row, tokenizer) if "messages" in row else self._pair(row, tokenizer, end)
            except TemplateError as e:  # of the template itself, for roles that it does not know
                raise InputError(
                    f"task {quoted(self.name)}, row {index + 1}: the tokenizer's chat template refuses it: {quoted(e)}"
                ) from e
            whole = [token for part, _ in parts for token in part]
            ids = whole[: self.limits.max_length]
            labels = [t if learned else IGNORED for part, learned in parts for t in part][: self.limits.max_length]
            prompt = len(whole) - len(parts[-1][0])  # of the response that is generated, where one is
            unanswered = not train and self.extract is not None and prompt >= self.limits.max_length
            if unanswered or all(label == IGNORED for label in labels):
                raise InputError(
                    f"task {quoted(self.name)}, row {index + 1}: the prompt alone fills max_length "
                    f"{self.limits.max_length}; raise it, or shorten the prompt"
                )
            return {"input_ids": ids, "labels": labels, "cut": len(ids) < len(whole)}

        prepared = batches.tokenized(dataset, encoded, with_indices=True)
        if cut := sum(prepared["cut"]):
            batches.tell_cut(self.name, cut, len(prepared), self.limits.max_length)
        return prepared.remove_columns("cut")

    def measure(self, model: Any, tokenizer: Any, dataset: Dataset, options: Measuring) -> dict[str, float]:
        result = super().measure(model, tokenizer, dataset, options)
        if self.extract is None:
            return result
        left = batches.padding(tokenizer, "left")
        prompts = self.prompts(dataset, tokenizer)
        texts = loops.generate(model, left, prompts, batches.pad_inputs(left), options)
        truths = [self.extract(self._answer(row)) for row in dataset]  # type: ignore[arg-type]
        return {"exact_match": metrics.exact_match([self.extract(text) for text in texts], truths), **result}

    def prompts(self, dataset: Dataset, tokenizer: Any) -> Dataset:
        """Token ids of what stands before the last response, for the model to go on from."""

        def encoded(row: dict[str, Any]) -> dict[str, list[int]]:
            if "messages" in row:
                return {"input_ids": _ids(tokenizer, _chat(tokenizer, row["messages"][:-1], prompt=True))}
            return {"input_ids": self._prompt(row, tokenizer)}

        return batches.tokenized(dataset, encoded)

    def _prompt(self, row: dict[str, Any], tokenizer: Any) -> list[int]:
        ids = tokenizer(self.template.replace("{prompt}", row["prompt"]), verbose=False)["input_ids"]
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids

    def _pair(self, row: dict[str, Any], tokenizer: Any, end: int) -> list[tuple[list[int], bool]]:
        target = _ids(tokenizer, self.target(row["response"]))
        return [(self._prompt(row, tokenizer), False), ([*target, end], True)]

    def _conversation(self, row: dict[str, Any], tokenizer: Any) -> list[tuple[list[int], bool]]:
        """The tokens of a conversation in pieces; those that are the assistant's are learned."""
        messages, pieces, done = row["messages"], [], ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = _chat(tokenizer, messages[:i], prompt=True), _chat(tokenizer, messages[: i + 1])
                if not before.startswith(done) or not after.startswith(before):
                    raise UsageError(
                        "the tokenizer's chat template rewrites earlier turns, so that responses cannot be told from "
                        "prompts; give columns prompt and response"
                    )
                pieces += [(before[len(done) :], False), (after[len(before) :], True)]
                done = after
        return [(_ids(tokenizer, text), learned) for text, learned in pieces]

    def _answer(self, row: dict[str, Any]) -> str:
        return self.target(row["messages"][-1]["content"] if "messages" in row else row["response"])


def _chat(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    """A conversation as the model reads it, up to where the assistant is to speak if ``prompt``."""
    if tokenizer.chat_template is None:
        raise UsageError("the tokenizer has no chat template for the column messages; give columns prompt and response")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
