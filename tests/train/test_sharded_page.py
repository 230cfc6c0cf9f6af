"""The configuration files and the script of ``docs/how-to/sharded-training.md``, as they are printed there."""

import importlib.util
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
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel
from safetensors.torch import load_file
from sharded_script import script
from together import together

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
    """``accelerate launch`` as the page has it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    command += [str(HERE / "sharded_script.py"), "train.py"]
    ended = subprocess.run(
        [sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr


def forked(place, config):
    """The same processes, with the environment that accelerate gives them."""

    def work():
        os.chdir(place)
        script("train.py")

    arguments = launch_command_parser().parse_args(["--config_file", str(place / config), "train.py"])
    together(work, prepare_multi_gpu_env(_validate_launch_command(arguments)[0]))


def alone(place, monkeypatch):
    """Losses and adapter of one process with the batch of two."""
    for gone in ("adapter", "run"):
        shutil.rmtree(place / gone)
    script = (place / "train.py").read_text().replace("train_batch_size=4", "train_batch_size=8")
    (place / "train.py").write_text(script)
    monkeypatch.chdir(place)
    runpy.run_path("train.py", run_name="__main__")
    return losses(place), adapter(place)


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
    forked(place, "fsdp2.yaml")
    assert losses(place) == whole
    assert all((adapter(place)[name] == trained[name]).all() for name in trained)


def test_whole_checkpoints_are_those_of_one_process(place, monkeypatch):
    """Without rounding, two processes with half a batch each do what one does."""
    forked(place, "fsdp2-full.yaml")
    whole, trained = losses(place), adapter(place)
    found, by_one = alone(place, monkeypatch)
    assert found == pytest.approx(whole, rel=1e-4)
    assert max(float((by_one[name] - trained[name]).abs().max()) for name in by_one) < 1e-4


GATHERED = """
import json
import deepspeed
from safetensors.torch import load_file
files, same, cut = load_file("model-2bit/model.safetensors"), 0, 0
for name, parameter in trainer.model.named_parameters():
    key = name.replace("base_model.model.", "").replace(".base_layer", "")
    if key in files:
        cut += parameter.numel() == 0
        with deepspeed.zero.GatheredParameters([parameter]):
            same += parameter.dtype == files[key].dtype and bool((parameter == files[key]).all())
json.dump([len(files), cut, same], open(f"gathered-{trainer.args.process_index}.json", "w"))
"""  # of the files' tensors: how many there are, are cut, and are bit for bit those of the files after training


@pytest.mark.timeout(1800)  # DeepSpeed compiles at its first start
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs DeepSpeed: see CONTRIBUTING.md")
def test_zero3_of_deepspeed(place, monkeypatch):
    """Every tensor is cut, packed ones stay as they are, losses are those of one process, and a run continues."""
    script, config = place / "train.py", json.loads((place / "zero3.json").read_text())
    plain = script.read_text()
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # the small tensors too
    (place / "zero3.json").write_text(json.dumps(config))
    script.write_text(plain.replace('"run",', '"run", deepspeed="zero3.json", use_cpu=True,') + GATHERED)

    def launch():
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
        ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=900)
        assert ended.returncode == 0, ended.stderr

    launch()
    whole, trained = losses(place), adapter(place)
    for rank in range(2):
        count, cut, same = json.loads((place / f"gathered-{rank}.json").read_text())
        assert count == cut == same > 20
    assert trained.keys() == load_file(place / "model-2bit" / "loftq_init" / "adapter_model.safetensors").keys()
    for gone in ("adapter", "run/checkpoint-4"):
        shutil.rmtree(place / gone)
    launch()
    assert losses(place) == whole
    script.write_text(plain)
    found, _ = alone(place, monkeypatch)
    assert found == pytest.approx(whole, abs=1e-5)
