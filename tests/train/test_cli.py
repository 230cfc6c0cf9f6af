"""A user's path on the command line: quantize, train, evaluate; and one line for whatever goes wrong."""

import json
import sys

import datasets  # noqa: F401  # here and below: imported once, before the first fork
import pytest
import tiny

import loftq.finetune.evaluate  # noqa: F401
from harness import cli, refused
from loftq.finetune.recipe import dump


def written(place, method="loftq", **changes):
    path = place / "recipe.yaml"
    path.write_text(dump(tiny.recipe(place, method, **changes)))
    return path


def lines(err):
    """What is left of stderr without bars."""
    return [line for part in err.split("\n") if (line := part.split("\r")[-1].strip()) and "it/s" not in line]


def test_quantize_train_evaluate(place):
    quantized = place / "quantized"
    ended = cli("quantize", place / "model", "-o", quantized, "--bits", "2", "--rank", "4", "--workers", "1")
    assert ended.code == 0, ended.err
    recipe = written(place, model=str(quantized), quantization=None, output=None)
    run = place / "run"
    ended = cli("train", recipe, "training.max_steps=3", "seed=1", "-o", run)
    assert ended.code == 0, ended.err
    assert f"sst2@1 of {run}, validation:" in ended.out
    assert "accuracy" in ended.out
    assert f"Saved: {run} has adapter/, metrics.json and logs/." in ended.out
    trained = json.loads((run / "metrics.json").read_text())
    assert (trained["steps"], trained["seed"], trained["base"]) == (3, 1, str(quantized))
    ended = cli("evaluate", run, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found == {
        "target": str(run), "task": "sst2@1", "splits": ["validation"], "metrics": trained["metrics"]
    }  # fmt: skip
    ended = cli(
        "evaluate", quantized, "--adapter", run / "adapter", "--task", "sst2", "--data", place / "data",
        "--split", "train", "--split", "validation", "--max-length", "16", "--batch-size", "7", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    both = json.loads(ended.out)["metrics"]
    assert (both["n"], both["validation_n"], both["validation_accuracy"]) == (64, 30, found["metrics"]["accuracy"])
    again = cli("train", recipe, "training.max_steps=3", "seed=1", "-o", run, "--json")
    assert json.loads(again.out) == trained
    again = cli("train", recipe, "training.max_steps=3", "seed=1", "-o", run)
    assert f"Already done by an earlier run of this command: {run} has adapter/" in again.out
    unknown = {**trained, "metrics": {**trained["metrics"], "accuracy": None}}  # as a figure that is not finite is kept
    (run / "metrics.json").write_text(json.dumps(unknown))
    again = cli("train", recipe, "training.max_steps=3", "seed=1", "-o", run, "--json")
    assert json.loads(again.out, parse_constant=pytest.fail) == unknown


@pytest.mark.slow
def test_a_task_of_ones_own_on_any_model(place):
    """``--task`` takes a recipe, with its data; here the same data as a task that the package does not have."""
    columns = {"text": "sentence", "label": "label"}
    task = {"kind": "text-classification", "columns": columns, "labels": ["bad", "good"]}
    run = cli("train", written(place, "full", task=task, **{"training.max_steps": 1, "max_length": 5}))
    assert run.code == 0, run.err
    model = place / "full" / "model"
    trained = json.loads((place / "full" / "metrics.json").read_text())["metrics"]
    for data in ((), ("--data", place / "data")):
        ended = cli("evaluate", model, "--task", place / "recipe.yaml", *data, "--json")
        assert ended.code == 0, ended.err
        assert json.loads(ended.out)["metrics"] == trained
    refused(cli("evaluate", model, "--task", place / "no.yaml"), 3, "no.yaml", "no such file")


def test_training_prints_bars_and_nothing_else(place):
    ended = cli("train", written(place, **{"training.eval_strategy": "steps", "training.eval_steps": 3}))
    assert ended.code == 0, ended.err
    assert {line.split(":")[0] for line in lines(ended.err)} <= {"LoftQ", "train", "Evaluating"}
    assert "loss" in ended.err
    assert len(ended.out.strip().split("\n")) == 4


def test_a_lost_run(place):
    recipe = written(place, "full", **{"training.max_grad_norm": 0.0})
    ended = cli("train", recipe, "training.learning_rate=1e30")
    assert ended.code == 6
    assert lines(ended.err)[-1].startswith("loftq: error[numerical]: the training loss is nan at step 2; try a lower")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        (["training.lr=1", "lora.rnk=2"], 2, "training.lr: no field of transformers.TrainingArguments"),
        (["training.lr=1", "lora.rnk=2"], 2, "lora.rnk: unknown key; did you mean rank?"),
        (["nonsense"], 2, "wanted key=value"),
        (["task=cola"], 3, "validation.jsonl"),
        (["data=nowhere"], 3, "nowhere"),
        (["model=nowhere/at all"], 3, "no such directory"),
    ],
)
def test_one_line_for_a_recipe_that_cannot_be(place, arguments, code, wanted):
    (place / "data").unlink()
    tiny.data(place / "data")
    (place / "data" / "validation.jsonl").write_text('{"words": "x", "label": 0}\n')
    refused(cli("train", written(place), *arguments), code, wanted)


def test_one_line_for_what_cannot_be_evaluated(place):
    refused(cli("evaluate", place / "model"), 2, "say --task")
    refused(cli("evaluate", place / "model", "--task", "sst2", "--sampling", "warm"), 2, "--sampling", "greedy, paper")
    refused(cli("evaluate", place / "model", "--task", "sst2", "--batch-size", "-1"), 2, "--batch-size")
    refused(cli("evaluate", place / "none here", "--task", "sst2", "--data", place / "data"), 3, "no such directory")
    refused(cli("train", place / "none.yaml"), 3, "none.yaml: no such file")


def test_the_extra_is_named(place):
    def without_datasets():
        for name in [n for n in sys.modules if n.startswith("loftq.finetune.train")]:
            del sys.modules[name]
        sys.modules["datasets"] = None

    ended = cli("train", written(place), setup=without_datasets)
    refused(ended, 2, "this verb needs datasets", "pip install 'loftq[train]'")


@pytest.mark.slow
def test_a_budget_is_spent_before_training(place):
    """Bits and ranks that differ by matrix train like all others; LoRA beside it has no use for a budget."""
    budget = {"budget": 8, "budget_ranks": "2,8", "steps": 1}
    recipe = written(place, quantization=budget, output=None, **{"training.max_steps": 3})
    ended = cli("train", recipe, "-o", place / "budget")
    assert ended.code == 0, ended.err
    manifest = json.loads((place / "budget" / "backbone" / "loftq_manifest.json").read_text())
    assert manifest["budget"]["budget"] == "8"
    assert len({(m["quant"]["bits"], m["rank"]) for m in manifest["plan"]["matrices"]}) > 1
    assert cli("evaluate", place / "budget").code == 0
    assert cli("train", recipe, "method=lora", "-o", place / "lora").code == 0
