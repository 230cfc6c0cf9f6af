"""The examples of scripts that are not ours do what they say, and the example recipe is a recipe."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from peft import PeftModel

import loftq.finetune.recipe
import models

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL's default
]


def run_example(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plain_trainer(place, monkeypatch, capsys):
    models.quantize(place / "model", place / "packed")
    rows = [{"text": row["sentence"], "label": row["label"]} for row in tiny.rows(64, 0)]
    write_rows(place / "rows.jsonl", rows)
    monkeypatch.chdir(place)
    run_example(monkeypatch, "train_trainer.py", "packed", "rows.jsonl", "--max-steps", 3)
    assert "saved to adapter" in capsys.readouterr().out
    start = json.loads((place / "packed" / "loftq_init" / "adapter_config.json").read_text())
    base = transformers.AutoModelForSequenceClassification.from_pretrained("packed", num_labels=2)
    trained = PeftModel.from_pretrained(base, "adapter")
    assert set(trained.peft_config["default"].target_modules) == set(start["target_modules"])
    assert "classifier" in trained.peft_config["default"].modules_to_save


def test_the_example_of_trl_trains_the_adapter(tmp_path, monkeypatch, capsys):
    models.tiny("llama").save_pretrained(tmp_path / "dense")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "dense")
    models.quantize(tmp_path / "dense", tmp_path / "packed")
    words = [{"prompt": row["sentence"], "completion": " good" if row["label"] else " bad"} for row in tiny.rows(32, 0)]
    write_rows(tmp_path / "rows.jsonl", words)
    monkeypatch.chdir(tmp_path)
    run_example(monkeypatch, "train_sft.py", "packed", "rows.jsonl", "--max-steps", 3, "--max-length", 32)
    assert "saved to adapter" in capsys.readouterr().out
    packed = transformers.AutoModelForCausalLM.from_pretrained("packed")
    start = PeftModel.from_pretrained(packed, "packed", subfolder="loftq_init").state_dict()
    packed = transformers.AutoModelForCausalLM.from_pretrained("packed")
    trained = PeftModel.from_pretrained(packed, "adapter").state_dict()
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    assert moved
    assert all(".lora_" in name for name in moved)


def test_the_example_recipe(place, monkeypatch):
    from loftq.finetune.train import finetune

    monkeypatch.chdir(place)
    overrides = ["training.max_steps=2", "training.eval_steps=2", "training.save_steps=2", "lora.rank=4"]
    overrides += [f"model={place / 'model'}", f"data={place / 'data'}", "max_length=16"]
    result = finetune(loftq.finetune.recipe.read(ROOT / "recipes" / "examples" / "sst2.yaml", overrides))
    assert result.steps == 2
    assert (place / "runs" / "sst2" / "adapter").is_dir()
