"""A tiny encoder with a tokenizer, rows to classify, and the recipe of a run of two seconds."""

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

import models
from loftq.finetune.recipe import Recipe, parse

KINDS = (("bad", "poor", "awful"), ("good", "fine", "great"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *KINDS[0], *KINDS[1], *(f"w{i}" for i in range(60))]


def tokenizer() -> Any:
    """Whole words, ``[CLS] a [SEP]`` and ``[CLS] a [SEP] b [SEP]``."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def source(directory: Path, dropout: float = 0.1, seed: int = 0) -> Path:
    """A random BERT. It has dropout, so that lost random states are noticed."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**{**models.BERT, "hidden_dropout_prob": dropout})
    transformers.BertModel(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences with one word that tells the label."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        label = chance.randrange(2)
        words = [f"w{chance.randrange(60)}" for _ in range(5)]
        words[chance.randrange(5)] = chance.choice(KINDS[label])
        made.append({"sentence": " ".join(words), "label": label})
    return made


def data(directory: Path) -> Path:
    """Files as SST-2 has them."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate({"train": 64, "validation": 30}.items()):
        lines = "".join(json.dumps(row) + "\n" for row in rows(count, seed))
        (directory / f"{split}.jsonl").write_text(lines)
    return directory


def recipe(place: Path, method: str = "loftq", **changes: Any) -> Recipe:
    """A recipe for the model and data in ``place``; its run goes to ``place / method``. Keys of sections are dotted."""
    values = {
        "model": str(place / "model"),
        "task": "sst2",
        "method": method,
        "data": str(place / "data"),
        "quantization": {"bits": 2},
        "lora": {"rank": 4},
        "training": {
            "learning_rate": 1e-3,
            "max_steps": 6,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        "max_length": 16,
        "output": str(place / method),
    }
    return parse(values).changed(**changes)
