"""Questions whose answer is a span of a context, as in SQuAD v1.1."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from loftq.errors import InputError, UsageError, quoted
from loftq.finetune.tasks import batches, loops, metrics
from loftq.finetune.tasks.base import Measuring, Task

N_BEST = 20
MAX_ANSWER_TOKENS = 30
OUTSIDE = [-1, -1]  # offsets of a token that is not of the context


@dataclass(frozen=True, kw_only=True)
class SpanQA(Task):
    """``question [SEP] context``; a context that is too long becomes several pieces that overlap by ``doc_stride``.

    A piece without the whole answer is trained to point at its first token. An answer is the best span of at most
    30 tokens over all pieces of its context; that there is no answer is never an answer.
    """

    kind: ClassVar[str] = "span-qa"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    peft_task_type: ClassVar[str] = "QUESTION_ANS"
    label_names: ClassVar = ("start_positions", "end_positions")

    @property
    def roles(self) -> dict[str, str]:
        return {"context": "text", "question": "text", "answers": "answers"}

    @property
    def main_metric(self) -> str:
        return "f1"

    def prepare(self, dataset: Dataset, tokenizer: Any, *, train: bool) -> Dataset:
        """Pieces with the positions of the first answer; for evaluation also each piece's row and its offsets."""
        batches.check_tokenizer(self.limits, tokenizer)
        if not tokenizer.is_fast:
            raise UsageError(f"task {quoted(self.name)} needs a fast tokenizer, one with a tokenizer.json")
        tokenizer = batches.padding(tokenizer, "right")

        def encoded(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            questions = [question.lstrip() for question in rows["question"]]  # a few of SQuAD's begin with many blanks
            self._check_room(tokenizer, questions, indices)
            pieces = tokenizer(
                questions,
                rows["context"],
                truncation="only_second",
                max_length=self.limits.max_length,
                stride=self.limits.doc_stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            row_of = pieces.pop("overflow_to_sample_mapping")
            offsets = [_of_context(pieces, i) for i in range(len(row_of))]
            del pieces["offset_mapping"]
            spans = [_token_span(o, rows["answers"][row]) for o, row in zip(offsets, row_of, strict=True)]
            result = {**pieces, "start_positions": [s for s, _ in spans], "end_positions": [e for _, e in spans]}
            return result if train else {**result, "row": [indices[row] for row in row_of], "offsets": offsets}

        return batches.tokenized(dataset, encoded, batched=True, with_indices=True)

    def _check_room(self, tokenizer: Any, questions: list[str], indices: list[int]) -> None:
        """Refuse a question that leaves less room for its context than two pieces have in common."""
        room = self.limits.max_length - tokenizer.num_special_tokens_to_add(pair=True)
        for question, index in zip(tokenizer(questions, add_special_tokens=False)["input_ids"], indices, strict=True):
            if room - len(question) <= (self.limits.doc_stride or 0):
                raise InputError(
                    f"task {quoted(self.name)}, row {index + 1}: its question of {len(question)} tokens leaves too "
                    f"little of max_length {self.limits.max_length} for pieces of the context that overlap by "
                    f"doc_stride {self.limits.doc_stride}; raise max_length or lower doc_stride"
                )

    def collator(self, tokenizer: Any, model: Any = None) -> Any:
        return batches.pad_inputs(batches.padding(tokenizer, "right"))

    def trainer_metrics(
        self, examples: Dataset, prepared: Dataset, tokenizer: Any
    ) -> Callable[[Any], dict[str, float]]:
        def compute(evaluated: Any) -> dict[str, float]:
            starts, ends = evaluated.predictions[:2]
            return _metrics(examples, prepared, starts, ends)

        return compute

    def measure(self, model: Any, tokenizer: Any, dataset: Dataset, options: Measuring) -> dict[str, float]:
        prepared = self.prepare(dataset, tokenizer, train=False)
        inputs = prepared.remove_columns(["row", "offsets", *self.label_names])
        collate = self.collator(tokenizer, model)
        outputs = loops.forward(model, inputs, collate, ["start_logits", "end_logits"], options)
        return _metrics(dataset, prepared, [start for start, _ in outputs], [end for _, end in outputs])


def _of_context(pieces: Any, piece: int) -> list[list[int]]:
    """The characters of the context that each token stands for."""
    offsets, sequence = pieces["offset_mapping"][piece], pieces.sequence_ids(piece)
    return [list(o) if s == 1 else OUTSIDE for o, s in zip(offsets, sequence, strict=True)]


def _token_span(offsets: list[list[int]], answers: dict[str, list[Any]]) -> tuple[int, int]:
    """First and last token of the first answer; ``(0, 0)``, the token that begins the input, if it is not all there."""
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    inside = [i for i, (a, b) in enumerate(offsets) if a >= 0 and a < end and b > start]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def _metrics(
    examples: Dataset, prepared: Dataset, starts: Sequence[np.ndarray], ends: Sequence[np.ndarray]
) -> dict[str, float]:
    predictions = best_answers(list(examples["context"]), prepared["row"], prepared["offsets"], starts, ends)
    return metrics.squad(predictions, [answers["text"] for answers in examples["answers"]])


def best_answers(
    contexts: Sequence[str],
    rows: Sequence[int],
    offsets: Sequence[Sequence[Sequence[int]]],
    starts: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
) -> list[str]:
    """For every context the text of the span with the largest sum of start and end logit.

    Considered are, in every piece, the ``N_BEST`` best starts and ends among the tokens of the context, in that order
    and at most ``MAX_ANSWER_TOKENS`` apart; the piece's own best start alone if no such pair exists.

    Args:
        contexts: one a row.
        rows: for each piece, the row it is of.
        offsets: for each piece and token, the characters ``[from, to)`` of the context; negative outside of it.
        starts, ends: for each piece, logits of at least as many tokens.
    """
    best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(contexts)
    for row, piece, start, end in zip(rows, offsets, starts, ends, strict=True):
        at = np.asarray(piece)
        inside = np.flatnonzero(at[:, 0] >= 0)
        if not len(inside):
            continue
        first = inside[np.argsort(-start[inside], kind="stable")[:N_BEST]]
        last = inside[np.argsort(-end[inside], kind="stable")[:N_BEST]]
        length = last[None, :] - first[:, None] + 1
        scores = start[first][:, None] + end[last][None, :]
        scores = np.where((length >= 1) & (length <= MAX_ANSWER_TOKENS), scores, -np.inf)
        i, j = np.unravel_index(np.argmax(scores), scores.shape)
        score, a, b = float(scores[i, j]), first[i], last[j]
        if score == -np.inf:
            score, b = float(start[a] + end[a]), a
        if score > best[row][0]:
            best[row] = (score, int(at[a, 0]), int(at[b, 1]))
    return [context[a:b] for context, (_, a, b) in zip(contexts, best, strict=True)]
