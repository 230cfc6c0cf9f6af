"""Rows of tokens, a tokenizer of whole words, checkpoints; and statistics the plain way, by hooks, row by row."""

import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

import models
from loftq.calibration.collect import HELD_EVERY, collect, matrices
from loftq.formats.statistics import Group

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(90))]
ALBERT = {**models.BERT, "embedding_size": 16, "num_hidden_layers": 3}
CONVOLVED = {**models.DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"}
MORE = {
    "albert": models.Family("AlbertForMaskedLM", "AlbertConfig", ALBERT, 0),
    "deberta-conv": models.Family("DebertaV2ForMaskedLM", "DebertaV2Config", CONVOLVED, 0),
}


def tiny(name: str) -> Any:
    """A random model; of some families that other tests do not need."""
    if name not in MORE:
        return models.tiny(name)
    torch.manual_seed(0)
    family = MORE[name]
    return family.model_class(getattr(transformers, family.config)(**family.options)).eval()


def rows(lengths: tuple[int, ...] = (7, 9, 7, 7, 9, 7, 5, 7, 7, 12)) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(5, 90, (n,), generator=generator).tolist()} for n in lengths]


def fitted(all_rows: list[Any]) -> list[Any]:
    return [row for i, row in enumerate(all_rows) if i % HELD_EVERY != HELD_EVERY - 1]


def arguments(model: Any, ids: Tensor) -> dict[str, Tensor]:
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        made["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(ids)
    return made


def plainly(model: Any, some: list[Any]) -> dict[str, tuple[Tensor, int]]:
    """matrix -> E[x xᵀ] in float64, and of how many x."""
    sums: dict[str, Any] = {}
    handles = []
    for name, module in matrices(model).items():

        def see(_: Any, args: tuple, name: str = name) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            total, count = sums.get(name, (0, 0))
            sums[name] = (total + x.T @ x, count + len(x))

        handles.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        for row in some:
            model(**arguments(model, torch.tensor([row["input_ids"]])))
    for handle in handles:
        handle.remove()
    return {name: (total / count, count) for name, (total, count) in sums.items()}


def collected(model: Any, some: list[Any], kind: str = "full", **options: Any) -> dict[str, Any]:
    """matrix -> its moments."""
    found = [group for groups in collect(model, some, kind, **options) for group in groups]
    return {module: group.moments for group in found if isinstance(group, Group) for module in group.modules}


def away(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def tokenizer() -> Any:
    """``[CLS] w1 w2 [SEP]``, a token a word."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {k: f"[{k[:-6].upper()}]" for k in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=names, **special)


def checkpoint(directory: Path, name: str = "bert", seed: int = 0) -> Path:
    """A tiny model with its tokenizer."""
    models.tiny(name, seed).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def text(directory: Path, lines: int = 60) -> Path:
    """Six words a line."""
    path = directory / "text.txt"
    chance = random.Random(0)
    path.write_text("".join(" ".join(f"w{chance.randrange(90)}" for _ in range(6)) + "\n" for _ in range(lines)))
    return path
