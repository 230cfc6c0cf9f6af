"""The configuration files and the script of ``docs/how-to/sharded-training.md``, as they are printed there."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "how-to" / "sharded-training.md"
BLOCK = re.compile(r'^```\w+ title="(?P<name>[\w.-]+)"\n(?P<text>.*?)^```$', re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path):
    """The files of the page, and a packed model of its name."""
    models.tiny("llama").save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    models.quantize(tmp_path / "dense", tmp_path / "model-2bit")
    for block in BLOCK.finditer(PAGE.read_text()):
        (tmp_path / block["name"]).write_text(block["text"])
    rows = [json.dumps({"text": row["sentence"]}) for row in tiny.rows(64, 0)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    return tmp_path


def launched(place, config):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    command += [str(HERE / "sharded_script.py"), "train.py"]
    ended = subprocess.run(
        [sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def losses(place, step=4):
    state = json.loads((place / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return {row["step"]: row["loss"] for row in state["log_history"] if "loss" in row}


def adapter(place):
    return load_file(place / "adapter" / "adapter_model.safetensors")


def test_sharded_checkpoints_continue(place):
    launched(place, "fsdp2.yaml")
    whole, trained = losses(place), adapter(place)
    assert sorted(whole) == [1, 2, 3, 4]
    assert (place / "run" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    start = load_file(place / "model-2bit" / "loftq_init" / "adapter_model.safetensors")
    assert trained.keys() == start.keys()
    assert all((trained[name] != start[name]).any() for name in start)
    packed = transformers.AutoModelForCausalLM.from_pretrained(place / "model-2bit")
    PeftModel.from_pretrained(packed, place / "adapter")
    for gone in ("adapter", "run/checkpoint-4"):
        shutil.rmtree(place / gone)
    launched(place, "fsdp2.yaml")
    assert losses(place) == whole
    assert all((adapter(place)[name] == trained[name]).all() for name in trained)


def test_whole_checkpoints_are_those_of_one_process(place, monkeypatch):
    """Without rounding, two processes with half a batch each do what one does."""
    launched(place, "fsdp2-full.yaml")
    whole, trained = losses(place), adapter(place)
    for gone in ("adapter", "run"):
        shutil.rmtree(place / gone)
    script = (place / "train.py").read_text().replace("train_batch_size=4", "train_batch_size=8")
    (place / "train.py").write_text(script)
    monkeypatch.chdir(place)
    runpy.run_path("train.py", run_name="__main__")
    assert losses(place) == pytest.approx(whole, rel=1e-4)
    alone = adapter(place)
    assert max(float((alone[name] - trained[name]).abs().max()) for name in alone) < 1e-4
