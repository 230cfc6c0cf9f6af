"""A run: stopped and continued, lost, finished, somebody else's; and evaluated again later."""

import dataclasses
import json
import math
import shutil

import pytest
import tiny
from peft import AutoPeftModelForSequenceClassification, PeftConfig
from safetensors.torch import load_file

import models
from loftq.errors import ConflictError, InputError, NumericalError, UsageError
from loftq.finetune.evaluate import evaluate
from loftq.finetune.run import RunDirectory
from loftq.finetune.train import finetune
from loftq.finetune.trainer import LoftQTrainer

SAVING = {"training.save_strategy": "steps", "training.save_steps": 2}


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step):
    """Let training end before optimizer step ``step``."""
    original = LoftQTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            raise Stopped
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoftQTrainer, "training_step", training_step)


def train_curve(result):
    return [(e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in result.history if "loss" in e]


@pytest.mark.parametrize(
    "method", ["loftq", *(pytest.param(m, marks=pytest.mark.slow) for m in ("full", "lora", "qlora"))]
)
def test_a_continued_run_is_the_uninterrupted_one(place, monkeypatch, method):
    whole = finetune(tiny.recipe(place, method, **SAVING, output=str(place / "whole")))
    stopped = tiny.recipe(place, method, **SAVING)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stopped):
            finetune(stopped)
    assert not (place / method / "metrics.json").exists()
    torn = place / method / "checkpoints" / "checkpoint-5"  # as a kill in the middle of saving leaves it
    shutil.copytree(place / method / "checkpoints" / "checkpoint-4", torn)
    (torn / "trainer_state.json").unlink()
    continued = finetune(stopped)
    assert train_curve(continued) == train_curve(whole)
    assert continued.metrics == whole.metrics
    weights = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert models.same(load_file(place / method / weights), load_file(place / "whole" / weights))


def test_a_finished_run_is_read_back(place, monkeypatch):
    recipe = tiny.recipe(place, "lora")
    first = finetune(recipe)
    monkeypatch.setattr(LoftQTrainer, "train", None)
    assert finetune(recipe) == first
    assert finetune(recipe.changed(note="other words", compare={"seeds": [1]})) == first
    with pytest.raises(ConflictError, match=r"another recipe \(seed: 0 -> 1\); choose another output, or restart=True"):
        finetune(recipe.changed(seed=1))
    (place / "lora" / "adapter").rename(place / "lora" / "moved")
    with pytest.raises(ConflictError, match=r"a finished run, but adapter/ or model/ is gone; put it back, or train"):
        finetune(recipe)


@pytest.mark.slow
def test_rows_or_weights_that_changed_make_another_run(tmp_path):
    tiny.source(tmp_path / "model")
    rows = tiny.data(tmp_path / "data") / "validation.jsonl"
    recipe = tiny.recipe(tmp_path, "lora")
    finetune(recipe)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:7]))
    with pytest.raises(ConflictError, match="a run from before the recipe's data changed; choose another output, or"):
        finetune(recipe)
    assert finetune(recipe, resume=False).metrics["n"] == 7
    tiny.source(tmp_path / "model", seed=1)
    with pytest.raises(ConflictError, match="from before the recipe's model changed"):
        finetune(recipe)
    (tmp_path / "lora" / "inputs.json").unlink()  # as a version that did not write it leaves a run
    assert finetune(recipe).metrics["n"] == 7


def test_a_run_is_evaluated_from_anywhere(place, monkeypatch):
    monkeypatch.chdir(place)
    changes = {"model": "model", "data": "data", "output": "out", "training.max_steps": 1}
    metrics = finetune(tiny.recipe(place, "lora", **changes)).metrics
    assert not RunDirectory(place / "out").is_of_another(tiny.recipe(place, "lora", **changes))
    monkeypatch.chdir("/")
    assert evaluate(str(place / "out")).metrics == metrics
    whole = {name: str(place / changes[name]) for name in ("model", "data", "output")}
    assert finetune(tiny.recipe(place, "lora", **{**changes, **whole})).metrics == metrics


def test_a_finished_run_is_read_back_when_its_inputs_are_gone(tmp_path):
    tiny.source(tmp_path / "model")
    tiny.data(tmp_path / "data")
    recipe = tiny.recipe(tmp_path, "lora", **{"training.max_steps": 1})
    first = finetune(recipe)
    for name in ("data", "model"):
        (tmp_path / name).rename(tmp_path / f"{name} moved")
        assert finetune(recipe) == first
        with pytest.raises(InputError, match=r"no such directory|not a directory"):
            finetune(recipe, resume=False)
        with pytest.raises(InputError, match=r"no such directory|not a directory"):
            finetune(recipe.changed(seed=1))


def test_numbers_that_are_not_finite_do_not_lose_a_run(place, monkeypatch):
    """A gradient that overflows, as half precision skips it, and a metric that is none."""
    train = LoftQTrainer.train

    def overflowing(self, *args, **kwargs):
        train(self, *args, **kwargs)
        self.state.log_history[0]["grad_norm"] = math.inf

    monkeypatch.setattr(LoftQTrainer, "train", overflowing)
    recipe = tiny.recipe(place, "lora")
    first = finetune(recipe)
    assert first.history[0]["grad_norm"] is None
    assert finetune(recipe) == first
    run = RunDirectory(place / "lora")
    run.finish(dataclasses.replace(first, metrics={"pearson": math.nan}))
    assert math.isnan(run.result().metrics["pearson"])


def test_what_a_kill_leaves_of_a_file_is_passed_over(place):
    run = RunDirectory(place / "lora")
    for step, text in ((2, '{"global_step": 2}'), (4, '{"global_'), (6, "")):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (run.checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-2"
    shutil.rmtree(run.root)
    run.root.mkdir()
    (run.root / ".recipe.yaml.0123.tmp").write_text("mod")
    (run.root / ".precious.tmp").write_text("not ours")
    with pytest.raises(ConflictError, match=r"no run, and not empty \(\.precious\.tmp\)"):
        finetune(tiny.recipe(place, "lora"))
    assert {p.name for p in run.root.iterdir()} >= {".recipe.yaml.0123.tmp", ".precious.tmp"}
    (run.root / ".precious.tmp").unlink()
    finetune(tiny.recipe(place, "lora", **{"training.max_steps": 1}))
    assert not list(run.root.glob(".*.tmp"))


@pytest.mark.slow
def test_restart_replaces_a_run(place):
    first = finetune(tiny.recipe(place, "loftq"))
    again = finetune(tiny.recipe(place, "loftq", seed=1), resume=False)
    assert (first.seed, again.seed) == (0, 1)
    assert train_curve(first) != train_curve(again)


def test_a_directory_of_something_else_is_left_alone(place):
    (place / "lora").mkdir()
    (place / "lora" / "thesis.tex").write_text("dear")
    for resume in (True, False):
        with pytest.raises(ConflictError, match=r"no run, and not empty \(thesis\.tex\)"):
            finetune(tiny.recipe(place, "lora"), resume=resume)
    assert (place / "lora" / "thesis.tex").read_text() == "dear"


def test_a_lost_run_says_what_to_try(place):
    recipe = tiny.recipe(place, "full", **{"training.learning_rate": 1e30, "training.max_grad_norm": 0.0})
    with pytest.raises(NumericalError) as caught:
        finetune(recipe)
    line = str(caught.value)
    assert "the training loss is nan at step 2; try a lower training.learning_rate (it is 1e+30)" in line
    assert "training.max_grad_norm=1" in line
    assert not (place / "full" / "metrics.json").exists()


def test_the_best_checkpoint_is_kept(place):
    evaluating = {"training.eval_strategy": "steps", "training.eval_steps": 2, "training.load_best_model_at_end": True}
    result = finetune(tiny.recipe(place, "lora", **SAVING, **evaluating, **{"training.learning_rate": 0.05}))
    seen = [entry["eval_accuracy"] for entry in result.history if "eval_accuracy" in entry]
    assert len(seen) == 3
    assert result.metrics["accuracy"] == max(seen)


def test_what_a_run_leaves(place):
    result = finetune(tiny.recipe(place, "loftq"))
    run = place / "loftq"
    names = {path.name for path in run.iterdir()}
    assert names == {"recipe.yaml", "inputs.json", "metrics.json", "backbone", "adapter", "logs", "checkpoints"}
    assert any((run / "logs").glob("events.out.tfevents.*"))
    assert result.metrics.keys() == {"accuracy", "n"}
    assert result.metrics["n"] == 30
    assert (result.task, result.steps, result.splits) == ("sst2@1", 6, ["validation"])
    assert result.bytes["backbone"] == (run / "backbone" / "model.safetensors").stat().st_size
    assert result.bytes["adapter"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size


@pytest.mark.slow
def test_backbones_are_shared_through_a_cache(place):
    cache = place / "cache"
    for seed in (0, 1):
        recipe = tiny.recipe(place, "loftq", **{"training.max_steps": 1}, output=str(place / f"run{seed}"))
        finetune(recipe.changed(seed=seed), backbone_cache=cache)
    finetune(tiny.recipe(place, "qlora", **{"training.max_steps": 1}), backbone_cache=cache)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "method", ["loftq", *(pytest.param(m, marks=pytest.mark.slow) for m in ("full", "lora", "qlora"))]
)
def test_a_run_is_evaluated_to_its_own_metrics(place, method):
    result = finetune(tiny.recipe(place, method, **{"training.learning_rate": 0.02}))
    again = evaluate(str(place / method))
    assert again.metrics == result.metrics
    assert again.task == result.task
    moved = place / "moved"
    (place / method).rename(moved)
    assert evaluate(str(moved), splits=["train"], batch_size=3).metrics["n"] == 64
    if method in ("qlora", "loftq"):
        assert PeftConfig.from_pretrained(moved / "adapter").base_model_name_or_path == str(moved / "backbone")
        assert AutoPeftModelForSequenceClassification.from_pretrained(moved / "adapter").active_adapter == "default"


@pytest.mark.slow
def test_a_model_with_an_adapter_is_evaluated(place):
    result = finetune(tiny.recipe(place, "loftq"))
    run, data = place / "loftq", str(place / "data")
    found = evaluate(str(run / "backbone"), task="sst2", data=data, max_length=16, adapter=run)
    assert found.metrics == result.metrics
    full = finetune(tiny.recipe(place, "full"))
    assert evaluate(str(place / "full" / "model"), task="sst2", data=data, max_length=16).metrics == full.metrics


@pytest.mark.slow
def test_own_data_by_naming_columns(place):
    """The same rows under other names, trained and evaluated as the task that has them by its own."""
    named = finetune(tiny.recipe(place, "loftq"))
    own = place / "own"
    own.mkdir()
    for file in (place / "data").iterdir():
        renamed = [
            {"said": row["sentence"], "verdict": row["label"]} for row in map(json.loads, file.read_text().splitlines())
        ]
        (own / file.name).write_text("".join(json.dumps(row) + "\n" for row in renamed))
    task = {"kind": "text-classification", "columns": {"text": "said", "label": "verdict"}, "labels": [0, 1]}
    recipe = tiny.recipe(place, "loftq", task=task, data=str(own), output=str(place / "mine"))
    found = finetune(recipe)
    assert found.history[0]["loss"] == named.history[0]["loss"]
    assert found.metrics["accuracy"] == named.metrics["accuracy"]
    assert evaluate(str(place / "mine")).metrics == found.metrics


@pytest.mark.slow
def test_watching_needs_a_split_for_it(place):
    (place / "data").unlink()  # which tests share
    tiny.data(place / "data")
    (place / "data" / "validation.jsonl").rename(place / "data" / "test.jsonl")
    for setting in ({"training.eval_strategy": "epoch"}, {"training.eval_on_start": True}):
        with pytest.raises(UsageError, match=r"no validation split, only train, test; .* leave out training\.eval_str"):
            finetune(tiny.recipe(place, "loftq", **setting))
    assert not (place / "loftq" / "backbone").exists(), "refused before anything is quantized"
    assert finetune(tiny.recipe(place, "loftq")).splits == ["test"]


def test_a_quantized_directory_is_evaluated_with_its_start(made, tmp_path):
    """Its perplexity is that of the dense model with ``Q + s * B @ A``."""
    checkpoint = made("llama")
    task = {"kind": "causal-lm", "columns": {"text": "sentence"}, "max_length": 16}
    started = checkpoint.started()
    started.save_pretrained(tmp_path / "started")
    for directory in (checkpoint.output, tmp_path / "started"):
        tokenizer = tiny.tokenizer()
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(directory)
    data = str(tiny.data(tmp_path / "data"))
    found, wanted = (evaluate(str(d), task=task, data=data) for d in (checkpoint.output, tmp_path / "started"))
    assert found.metrics["perplexity"] == pytest.approx(wanted.metrics["perplexity"], rel=1e-5)
    assert found.metrics["n"] == 30


def test_what_cannot_be_evaluated(place):
    data = str(place / "data")
    finetune(tiny.recipe(place, "lora"))
    adapter = place / "lora" / "adapter"
    with pytest.raises(UsageError, match="is no run of `loftq train`: say task"):
        evaluate(str(place / "model"))
    with pytest.raises(InputError, match=r"no weights for classifier: not trained for this task; see adapter"):
        evaluate(str(place / "model"), task="sst2", data=data, max_length=16)
    with pytest.raises(UsageError, match="a run has its own"):
        evaluate(str(place / "lora"), adapter=adapter)
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "modules_to_save": None, "task_type": None}))
    with pytest.raises(InputError, match="no weights for classifier"):
        evaluate(str(place / "model"), task="sst2", data=data, max_length=16, adapter=adapter)
    with pytest.raises(InputError, match=r"no adapter: there is no adapter_config\.json"):
        evaluate(str(place / "model"), task="sst2", data=data, max_length=16, adapter=place / "data")
    (place / "lora" / "metrics.json").unlink()
    with pytest.raises(InputError, match="not a finished run"):
        evaluate(str(place / "lora"))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        ({"output": None}, UsageError, "no output"),
        ({"task": "sst3"}, UsageError, "'sst3' is not one of"),
        ({"model": "none/such dir"}, InputError, "no such directory"),
        ({"max_length": 41}, UsageError, "max_length: 41 tokens are more than the model's 40 positions"),
        ({"data": {"train": "nothing.jsonl"}}, InputError, "nothing.jsonl"),
        ({"data": {"validation": "DATA/validation.jsonl"}}, InputError, "no train split"),
        ({"lora.rank": 80}, UsageError, "the rank must be below the shorter side"),
        ({"quantization.bits": "7"}, UsageError, "7 is not a width"),
        ({"quantization.device": "meta"}, UsageError, "device 'meta' cannot be used"),
        (
            {"training.load_best_model_at_end": True},
            UsageError,
            "training.load_best_model_at_end: needs training.eval_strategy",
        ),
    ],
)
def test_what_cannot_be_trained(place, changes, error, wanted):
    recipe = tiny.recipe(place, "loftq", **json.loads(json.dumps(changes).replace("DATA", str(place / "data"))))
    with pytest.raises(error) as caught:
        finetune(recipe)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)
    if (place / "loftq").exists():  # nothing stands in the way of the mended recipe
        finetune(tiny.recipe(place, "loftq", **{"training.max_steps": 1}))


QUESTIONS = {"kind": "span-qa", "columns": {"context": "c", "question": "q", "answers": "a"}, "doc_stride": 2}


@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        ({"generation": "paper"}, UsageError, "has no setting named 'paper'"),
        ({"task": QUESTIONS}, InputError, "row 1: its question of 20 tokens leaves too little of max_length 16"),
    ],
)
def test_what_only_the_evaluation_would_refuse_is_refused_first(place, changes, error, wanted):
    data = tiny.data(place / "own")
    answered = {"c": "w1 w2 good w3", "a": {"text": ["good"], "answer_start": [6]}}
    if "task" in changes:
        for split, words in (("train", 2), ("validation", 20)):
            row = {**answered, "q": " ".join(["w4"] * words)}
            (data / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(error, match=wanted):
        finetune(tiny.recipe(place, "loftq", **changes, data=str(data)))
    assert not (place / "loftq" / "backbone").exists()


def test_a_quantized_model_wants_its_own_method(place):
    models.quantize(place / "model", place / "packed")
    models.quantize(place / "model", place / "dense", format="dense")
    packed = {"model": str(place / "packed"), "quantization": None}
    finetune(tiny.recipe(place, "loftq", **packed))
    for method, changes, wanted in (
        ("qlora", packed, "method: qlora, but the initialization in .* was made by loftq"),
        ("lora", packed, "method lora needs a dense model"),
        ("loftq", {"model": str(place / "packed")}, "leave out the section quantization"),
        ("loftq", {"model": str(place / "dense"), "quantization": None}, "has format='dense'"),
    ):
        with pytest.raises(UsageError, match=wanted):
            finetune(tiny.recipe(place, method, **changes, output=str(place / "other")))
