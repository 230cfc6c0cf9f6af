"""The verbs of fine-tuning as Python calls."""

import json

import pytest
import tiny
import torch

import loftq
from loftq.errors import UsageError
from loftq.finetune.recipe import dump


def test_train_evaluate_and_compare(place, capfd, caplog, monkeypatch):
    monkeypatch.setattr("loftq.finetune.train.SLOW_DTYPES", {torch.bfloat16})
    path = place / "recipe.yaml"
    path.write_text(dump(tiny.recipe(place, output=None)))
    run, few = place / "run", {"training.max_steps": 1, "training.bf16": True, "quantization.bits": 2}
    result = loftq.train(path, overrides=few, output=run, progress=False)
    assert "training.bf16: this processor has no products in bfloat16" in caplog.text
    assert json.loads((run / "metrics.json").read_text())["metrics"] == result.metrics
    assert loftq.evaluate(run, progress=False).metrics == result.metrics
    arms = {"arms": [{"method": "lora"}], "seeds": [0], "learning_rates": [1e-3]}
    values = {**tiny.recipe(place, output=None).to_dict(), "compare": arms}
    rows = loftq.compare(values, overrides={"training.max_steps": 1}, output=place / "side-by-side", progress=False)
    hidden = capfd.readouterr().err
    assert not any(unit in hidden for unit in ("matrix/s", "step/s", "row/s", "run/s")), hidden
    loftq.evaluate(run)
    assert "row/s" in capfd.readouterr().err
    assert repr(rows) == "<Comparison: 1 runs of 1 arms>"
    assert "LoRA" in rows._repr_markdown_()
    assert rows == [json.loads(line) for line in (place / "side-by-side" / "rows.jsonl").read_text().splitlines()]


def test_one_line_in_words_of_python(place, tmp_path):
    recipe = tiny.recipe(place, output=None).to_dict()
    for call, word in (
        (lambda: loftq.train(recipe), "or output"),
        (lambda: loftq.train(recipe, overrides={"sed": 1}), "did you mean seed"),
        (lambda: loftq.train(recipe, outputs="x"), "did you mean 'output'"),
        (lambda: loftq.train(3), "recipe: wanted a path, got int"),
        (lambda: loftq.compare(recipe), "or output"),
        (lambda: loftq.evaluate(place / "model"), "say task, one of"),
        (lambda: loftq.evaluate(place / "model", split="test"), "did you mean 'splits'"),
        (lambda: loftq.evaluate(place / "model", sampling="beam"), "sampling must be one of greedy, paper"),
        (lambda: loftq.evaluate(place / "model", batch_size=0), "batch_size must be a whole number of at least 1"),
    ):
        with pytest.raises(UsageError, match=word) as caught:
            call()
        assert "--" not in str(caught.value)
