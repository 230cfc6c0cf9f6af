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
    """``source("llama")``: the directory of a tiny random model, with a tokenizer of letters; deeper if asked."""
    made = {}

    def make(name: str, **changes: int) -> Path:
        key = (name, *changes.items())
        if key not in made:
            family, place = models.FAMILIES[name], tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            options = {**family.options, "max_position_embeddings": 1024, **changes}
            family.model_class(getattr(transformers, family.config)(**options)).save_pretrained(place)
            tokenizer = tiny_models.words()
            tokenizer.model_max_length = 1024
            tokenizer.save_pretrained(place)
            made[key] = place
        return made[key]

    return make
