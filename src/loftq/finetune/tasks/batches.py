"""Tokenized rows and batches of them: lengths that model and tokenizer can hold, the side to pad on, collators."""

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from loftq.errors import UsageError, quoted
from loftq.finetune.tasks.base import IGNORED, Limits
from loftq.sources import databounds
from loftq.sources.datafiles import no_bars

logger = logging.getLogger(__name__)

MANY = 10_000  # rows that take long enough for a bar


def tokenized(dataset: Dataset, function: Callable[..., dict[str, Any]], **options: bool) -> Dataset:
    """``dataset.map`` with the columns that ``function`` gives and no others."""
    with no_bars(len(dataset) < MANY):
        return dataset.map(
            function,
            remove_columns=dataset.column_names,
            desc="Tokenizing",
            batch_size=databounds.batch_size(dataset),
            **options,  # type: ignore[arg-type]
        )


@functools.cache
def tell_cut(task: str, cut: int, rows: int, max_length: int) -> None:
    """Warn, once, of rows of which the end is left out, and with it some of what is to be learned or measured."""
    logger.warning(
        "task %s: %d of %d rows are longer than max_length %d and are cut, so that the end of their answers is neither "
        "learned nor measured; raise max_length",
        *(quoted(task), cut, rows, max_length),
    )


def padding(tokenizer: Any, side: str | None = None) -> Any:
    """The tokenizer itself, or a copy that pads on ``side``, with the end token where it has none for padding."""
    if tokenizer.pad_token is not None and side in (None, tokenizer.padding_side):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    if side is not None:
        changed.padding_side = side
    if changed.pad_token is None:
        changed.pad_token = end_token(tokenizer)
    return changed


def end_token(tokenizer: Any) -> str:
    """The token that ends a text."""
    if tokenizer.eos_token is None:
        raise UsageError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token


def check_tokenizer(limits: Limits, tokenizer: Any) -> None:
    """Refuse inputs that are longer than the tokenizer says its model can read."""
    if limits.max_length > tokenizer.model_max_length:
        raise UsageError(
            f"max_length: {limits.max_length} tokens are more than the model's {tokenizer.model_max_length}; "
            f"set max_length: {tokenizer.model_max_length}"
        )


def pad_inputs(tokenizer: Any) -> Any:
    """A collator for labels that are one number a row."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


def pad_sequences(tokenizer: Any, model: Any) -> Any:
    """A collator for labels that are a sequence; those of padding are -100."""
    from transformers import DataCollatorForSeq2Seq

    encoder_decoder = model is not None and model.config.is_encoder_decoder
    return DataCollatorForSeq2Seq(tokenizer, model=model if encoder_decoder else None, label_pad_token_id=IGNORED)
