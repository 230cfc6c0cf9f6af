import sys
from pathlib import Path

import pytest
import torch
import transformers

import models

sys.path.append(str(Path(__file__).parents[1] / "tasks"))  # rows of every task, and tokenizers

import tiny_models


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """``source("llama")``: the directory of a tiny random model, with a tokenizer of letters."""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            family, place = models.FAMILIES[name], tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            config = getattr(transformers, family.config)(**{**family.options, "max_position_embeddings": 1024})
            family.model_class(config).save_pretrained(place)
            tokenizer = tiny_models.words()
            tokenizer.model_max_length = 1024
            tokenizer.save_pretrained(place)
            made[name] = place
        return made[name]

    return make
