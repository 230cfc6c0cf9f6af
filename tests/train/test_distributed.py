"""Several micro-batches and several processes see what one sees: same losses, same metrics, one writer."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
from together import together, train, train_sharded

from loftq.finetune.evaluate import evaluate
from loftq.finetune.recipe import dump
from loftq.finetune.run import RunDirectory
from loftq.finetune.train import finetune

pytestmark = pytest.mark.slow

BATCH = "training.per_device_train_batch_size"
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no",
              "--dynamo_backend=no", "--num_processes=2", "-m", "loftq"]  # fmt: skip
KINDS = {"ddp": train, "fsdp2": train_sharded}
SHARDED = {"training.fsdp": True, "training.fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}
SAVING = {"training.save_strategy": "steps", "training.save_steps": 3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model without dropout, and what one process makes of it in batches of 8."""
    place = tmp_path_factory.mktemp("plain")
    tiny.source(place / "model", dropout=0.0)
    tiny.data(place / "data")
    return place, finetune(tiny.recipe(place, "loftq"))


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


def close(result, wanted):
    """Equal up to the order of additions."""
    assert losses(result) == pytest.approx(losses(wanted), rel=1e-5)
    assert result.metrics == pytest.approx(wanted.metrics)


def test_accumulated_micro_batches_are_one_batch(plain):
    place, wanted = plain
    changes = {BATCH: 2, "training.gradient_accumulation_steps": 4}
    close(finetune(tiny.recipe(place, "loftq", **changes, output=str(place / "accumulated"))), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_and_two_that_continue(plain, tmp_path, kind):
    place, wanted = plain
    changes = SHARDED if kind == "fsdp2" else {}
    recipe = tiny.recipe(place, "loftq", **{BATCH: 4}, **SAVING, **changes, output=str(tmp_path / kind))
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    first = launched if kind == "ddp" else functools.partial(forked, kind)
    assert first(tmp_path / "recipe.yaml").count("sst2@1 of") == 1
    run = RunDirectory(tmp_path / kind)
    result = run.result()
    assert result.processes == 2
    close(result, wanted)
    assert evaluate(str(tmp_path / kind)).metrics == result.metrics
    (tmp_path / kind / "metrics.json").unlink()  # as if it had been stopped after step 3
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    mark(run.checkpoints / "checkpoint-3" / "trainer_state.json")
    forked(kind, tmp_path / "recipe.yaml")
    continued = run.result()
    assert [entry["step"] for entry in continued.history if entry.get("marked")] == [1]
    close(continued, wanted)


@pytest.mark.parametrize(("kind", "method"), [("ddp", "qlora"), ("fsdp2", "full"), ("fsdp2", "lora")])
def test_two_processes_of_other_methods(plain, tmp_path, kind, method):
    place, _ = plain
    wanted = finetune(tiny.recipe(place, method))
    changes = SHARDED if kind == "fsdp2" else {}
    recipe = tiny.recipe(place, method, **{BATCH: 4}, **changes, output=str(tmp_path / kind))
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    forked(kind, tmp_path / "recipe.yaml")
    close(RunDirectory(tmp_path / kind).result(), wanted)
    assert evaluate(str(tmp_path / kind)).metrics == wanted.metrics


def forked(kind, recipe):
    """What ``loftq train`` prints in two processes."""
    return together(lambda: KINDS[kind](recipe))


def launched(recipe):
    """The same, from accelerate's launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    command = [sys.executable, "-m", *ACCELERATE, "train", str(recipe)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def mark(file):
    """Mark the first entry of a checkpoint's history, to see later that the run continued from there."""
    state = json.loads(file.read_text())
    state["log_history"][0]["marked"] = True
    file.write_text(json.dumps(state))
