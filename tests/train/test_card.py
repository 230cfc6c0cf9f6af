"""The card of what was trained: its code loads the model, from wherever the run was moved to."""

import re

import pytest
import tiny
import transformers
import yaml

from loftq.finetune.tasks import get_task, load_data, score
from loftq.finetune.train import finetune


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["full", "loftq"])
def test_the_code_of_the_card_loads_what_was_trained(place, monkeypatch, method):
    whole = finetune(tiny.recipe(place, method, **{"training.learning_rate": 0.02}))
    (place / method).rename(place / "moved")
    directory = place / "moved" / ("model" if method == "full" else "adapter")
    card = (directory / "README.md").read_text()
    assert str(place) not in card
    assert "More Information Needed" not in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == ("transformers" if method == "full" else "peft")
    assert f"| accuracy | {whole.metrics['accuracy']:.4f}".rstrip("0").rstrip(".") in card
    monkeypatch.chdir(directory)
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    rows = load_data(get_task("sst2"), place / "data")["validation"]
    assert score(get_task("sst2", max_length=16), names["model"], tokenizer, rows) == whole.metrics
    if method == "loftq":
        assert "| base | ../backbone |" in card
        assert str(place) not in (directory / "adapter_config.json").read_text()


def test_a_base_of_the_hub_keeps_its_name(place, monkeypatch):
    """Not that of the cache in which it lies on this machine."""
    monkeypatch.setattr("loftq.finetune.train.resolve", lambda model: place / "model")
    finetune(tiny.recipe(place, "lora", model="org/name", **{"training.max_steps": 1}))
    for name in ("README.md", "adapter_config.json"):
        text = (place / "lora" / "adapter" / name).read_text()
        assert "org/name" in text
        assert str(place) not in text
    front = yaml.safe_load((place / "lora" / "adapter" / "README.md").read_text().split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("org/name", "adapter")
