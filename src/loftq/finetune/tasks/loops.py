"""Loops over batches without gradients: outputs of a model, its loss, its generated text."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from loftq.errors import NumericalError
from loftq.finetune.tasks.base import Measuring, positions_of
from loftq.numerics.device import seeded
from loftq.report.bars import are_shown

Collate = Callable[[list[dict[str, Any]]], Any]


def forward(
    model: Any, prepared: Dataset, collate: Collate, outputs: Sequence[str], options: Measuring
) -> list[tuple[np.ndarray, ...]]:
    """The named outputs for every row, float32, in the order of the rows; sequences keep their batch's padding.

    Raises: NumericalError if an output is not finite.
    """
    results: list[Any] = [None] * len(prepared)
    for rows, batch in _batches(model, prepared, collate, options):
        result = model(**batch)
        values = [result[name].float().cpu() for name in outputs]
        for i, row in enumerate(rows):
            results[row] = tuple(value[i].numpy() for value in values)
            if not all(value[i].isfinite().all() for value in values):
                raise NumericalError(f"the model's outputs for row {row + 1} are not finite")
    return results


def loss(model: Any, prepared: Dataset, collate: Collate, options: Measuring) -> tuple[float, int]:
    """Sum of the losses, in nats, over all tokens that have a label, and the number of those tokens.

    Raises: NumericalError if the loss is not finite.
    """
    nats, tokens = 0.0, 0
    for rows, batch in _batches(model, prepared, collate, options):
        count = int((batch["labels"][:, 1:] != -100).sum())  # a causal model predicts the next token
        if count:
            mean = model(**batch).loss.item()
            if not math.isfinite(mean):
                raise NumericalError(f"the model's loss is {mean} for the batch with row {rows[0] + 1}")
            nats, tokens = nats + mean * count, tokens + count
    return nats, tokens


def generate(model: Any, tokenizer: Any, prompts: Dataset, collate: Collate, options: Measuring) -> list[str]:
    """The text that the model adds to every prompt, or, of an encoder and decoder, makes of it.

    A text ends where the model's positions do. Sampling without a ``seed`` has 0, so that it can be repeated.

    Raises: NumericalError if a token's score is not a number; the text would be any.
    """

    def check(_: Any, scores: Any) -> Any:
        if scores.isnan().any():
            raise NumericalError("the model's scores of the next token are not finite")
        return scores

    settings = dict(options.generation)
    seed, most = settings.pop("seed", 0), settings.pop("max_new_tokens")
    texts = [""] * len(prompts)
    with seeded(seed, [parameter.device for parameter in model.parameters()]):
        for rows, batch in _batches(model, prompts, collate, options):
            start = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
            settings["max_new_tokens"] = max(1, min(most, (positions_of(model.config) or math.inf) - start))
            ids = model.generate(
                **batch, **settings, use_cache=True, pad_token_id=tokenizer.pad_token_id, logits_processor=[check]
            )
            for row, text in zip(rows, tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True), strict=True):
                texts[row] = text
    return texts


def _batches(
    model: Any, prepared: Dataset, collate: Collate, options: Measuring
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Row numbers and a batch on the model's device; rows of like length together, the longest first."""
    device = next(model.parameters()).device
    lengths = [len(ids) for ids in prepared["input_ids"]]
    order = sorted(range(len(prepared)), key=lambda row: -lengths[row])
    hidden = not (options.progress and are_shown())
    with tqdm(total=len(order), desc="Evaluating", unit="row", leave=False, disable=hidden) as bar:
        for at in range(0, len(order), options.batch_size):
            rows = order[at : at + options.batch_size]
            batch = collate([prepared[row] for row in rows])
            yield rows, {name: tensor.to(device) for name, tensor in batch.items()}
            bar.update(len(rows))
