"""A run that is killed, at any moment of it, ends as the one that nobody disturbed."""

import gc
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny

from loftq.finetune import checkpoints
from loftq.finetune.evaluate import evaluate
from loftq.finetune.run import RunDirectory
from loftq.finetune.train import finetune

pytestmark = pytest.mark.slow

SAVING = {"training.save_strategy": "steps", "training.save_steps": 2, "training.per_device_train_batch_size": 16}
WATCHING = {"training.eval_strategy": "steps", "training.eval_steps": 2, "training.load_best_model_at_end": True}
AT_ENDS = {"training.eval_strategy": "epoch", "training.eval_on_start": True, "training.logging_strategy": "epoch"}
SETTINGS = {  # an epoch has 4 steps: the last step is at the end of one, or in the middle
    "in the middle": {**SAVING, "training.max_steps": 6, "training.logging_steps": 5},
    "at the end": {**SAVING, **AT_ENDS, "training.max_steps": 8},
    "the best": {**SAVING, **WATCHING, "training.learning_rate": 0.05, "training.save_total_limit": 1},
}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
listeners = []


def _audit(event, args):
    if listeners and (event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & 3)):
        listeners[-1](event, args[0])


sys.addaudithook(_audit)  # stays for good, and does nothing unless a test listens


class Moments:
    """Copies of a run's directory as a kill would leave it, just before every change of a file that Python makes."""

    def __init__(self, run: Path, place: Path) -> None:
        self.run, self.place, self.found = run, place, {}

    def __call__(self, event, path):
        """Of what comes again and again, such as checkpoints and the removal of their files, the last is kept."""
        place = Path(os.fsdecode(path))
        elsewhere = place.is_absolute() and self.run not in place.parents
        if elsewhere or not self.run.exists() or (event == "os.mkdir" and place.exists()):
            return
        listener = listeners.pop()
        try:
            where = place.relative_to(self.run) if place.is_absolute() else "of a directory"
            name = re.sub(r"[0-9a-f]{16}|\d+", "N", f"{event} {where}")
            copy = self.found.setdefault(name, self.place / f"moment{len(self.found)}" / "run")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.run, copy)
        finally:
            listeners.append(listener)


def told(result):
    """All that the result of a run must have in common with the uninterrupted one: not its times."""
    timed = ("runtime", "per_second")
    history = [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in result.history]
    return history, result.metrics, result.steps, result.epochs


def weights(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_kill_at_every_moment(place, setting):
    """At every change of a file: of the run's own, of the trainer's checkpoints, of the adapter and the metrics."""
    recipe = tiny.recipe(place, "lora", **SETTINGS[setting])
    moments = Moments(place / "lora", place)
    listeners.append(moments)
    try:
        whole = finetune(recipe)
    finally:
        listeners.pop()
    assert {
        "open checkpoints/checkpoint-N/trainer_state.json",
        "open adapter/adapter_config.json",
    } < moments.found.keys()
    gc.collect()
    gc.freeze()  # the trainer collects, which takes longer than the rest of such a run
    for moment, copy in moments.found.items():
        if setting != "in the middle" and RunDirectory(copy).last_checkpoint() is None:
            continue  # begins again, as there
        continued = finetune(recipe.changed(output=str(copy)))
        assert told(continued) == told(whole), (setting, moment)
        assert weights(copy) == weights(place / "lora"), (setting, moment)
        shutil.rmtree(copy)
    gc.unfreeze()


def test_an_order_that_is_drawn_continues(place):
    """In the second epoch, whose order a process that begins in it has to know."""
    sampling = {"training.train_sampling_strategy": "group_by_length", "training.max_steps": 7}
    recipe = tiny.recipe(place, "lora", **{**SETTINGS["in the middle"], **sampling})
    whole = finetune(recipe)
    (place / "lora" / "metrics.json").unlink()
    shutil.rmtree(place / "lora" / "checkpoints" / "checkpoint-7")
    expected = weights(place / "lora")
    assert told(finetune(recipe)) == told(whole)
    assert weights(place / "lora") == expected


def test_a_newest_checkpoint_at_the_end_is_not_trained_on(place, monkeypatch):
    recipe = tiny.recipe(place, "lora", **SETTINGS["in the middle"])
    whole = finetune(recipe)
    (place / "lora" / "metrics.json").unlink()

    def none(*_, **__):
        raise AssertionError("a step beyond the last")

    with monkeypatch.context() as patch:
        patch.setattr("loftq.finetune.trainer.LoftQTrainer.training_step", none)
        continued = finetune(recipe)
    assert told(continued) == told(whole)
    assert sorted(p.name for p in (place / "lora" / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert evaluate(str(place / "lora")).metrics == whole.metrics


def test_checkpoints_of_weights_alone_are_not_trained_on(place):
    """Without the optimizer's state the run would be another one."""
    recipe = tiny.recipe(place, "lora", **SETTINGS["in the middle"], **{"training.save_only_model": True})
    whole = finetune(recipe)
    run = RunDirectory(place / "lora")
    run.metrics.unlink()
    assert run.last_checkpoint(resumable=False) == run.checkpoints / "checkpoint-6"
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    assert run.last_checkpoint(resumable=False) is None
    assert told(finetune(recipe)) == told(whole)


def test_a_checkpoint_of_which_a_file_is_gone_or_cut_is_passed_over(place):
    recipe = tiny.recipe(place, "lora", **SETTINGS["in the middle"])
    finetune(recipe)
    run = RunDirectory(place / "lora")
    newest = run.last_checkpoint()
    assert newest is not None
    state = json.loads((newest / checkpoints.STATE).read_text())
    listed = checkpoints.kept(state)["files"]
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= listed.keys()
    for name in listed:
        file = newest / name
        raw = file.read_bytes()
        file.write_bytes(raw[:-1])
        assert run.last_checkpoint() == run.checkpoints / "checkpoint-4", name
        file.unlink()
        assert run.last_checkpoint() == run.checkpoints / "checkpoint-4", name
        file.write_bytes(raw)
    assert run.last_checkpoint() == newest


def test_a_moved_run_knows_its_best_checkpoint(place):
    recipe = tiny.recipe(place, "lora", **{**SETTINGS["the best"], "training.save_total_limit": 3})
    whole = finetune(recipe)
    (place / "lora").rename(place / "moved")
    (place / "moved" / "metrics.json").unlink()
    assert told(finetune(recipe.changed(output=str(place / "moved")))) == told(whole)
