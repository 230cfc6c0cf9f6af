"""The script that makes small models: what it saves is a model and a tokenizer that work."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
TEXT = "The cat sat on the mat, and the dog ran home. Nobody knew why it was 3 pm. "


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [("llama", AutoModelForCausalLM), ("moe", AutoModelForCausalLM), ("bart", AutoModelForSeq2SeqLM)],
    ids=["llama", "moe", "bart"],
)
def test_pretrain(architecture, auto, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT * 40, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"id": "1", "document": TEXT * 5, "summary": "not read"}) + "\n" for _ in range(3))
    sizes = ["--hidden", "16", "--layers", "2", "--heads", "2", "--vocabulary", "300", "--length", "16"]
    command = [tmp_path / "a.txt", tmp_path / "b.jsonl.gz", *sizes, "--steps", "3", "--batch", "4"]
    command += ["--output", tmp_path / "model", "--architecture", architecture]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, command)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "perplexity" in (tmp_path / "model" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("the cat ë 猫", return_tensors="pt")
    assert tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True).strip() == "the cat ë 猫"
    model = auto.from_pretrained(tmp_path / "model")
    assert torch.isfinite(model(**ids, labels=ids["input_ids"]).loss)
    assert not list((tmp_path / "model").glob("checkpoint*"))
