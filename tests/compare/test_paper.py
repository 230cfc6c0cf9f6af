"""The recipes of the paper: each is read and runs, and its README reaches every row of the tables."""

import json
import re
from pathlib import Path

import pytest
from rows import ROWS

from loftq.finetune.grid import Arm, essential, grid
from loftq.finetune.recipe import read
from loftq.finetune.train import finetune

pytestmark = pytest.mark.slow

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
FILES = sorted(PAPER.glob("*/*.yaml"))
FAMILIES = {"deberta-v3-base": "deberta-v3", "bart-large": "bart", "llama-2-7b": "llama", "llama-2-13b": "llama"}
DRY = {
    "training.max_steps": 2,
    "training.gradient_accumulation_steps": 1,
    "training.save_strategy": "no",
    "training.logging_steps": 1,
    "training.use_cpu": True,
    "lora.rank": 4,
}


def name(file):
    return f"{file.parent.name}/{file.stem}"


def test_every_model_has_its_tasks():
    glue = {"mnli", "qnli", "rte", "sst2", "mrpc", "cola", "qqp", "stsb"}
    found = {model: {file.stem for file in FILES if file.parent.name == model} for model in FAMILIES}
    assert found["deberta-v3-base"] == {*glue, "squad", "anli"}
    assert found["bart-large"] == {"xsum", "cnn_dailymail"}
    assert found["llama-2-7b"] == found["llama-2-13b"] == {"wikitext2", "gsm8k"}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_two_steps_on_a_tiny_model(file, source, tmp_path):
    recipe = read(file)
    family = FAMILIES[file.parent.name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[recipe.task][0]))
    rows = str(tmp_path / "rows.jsonl")
    splits = ("train", "validation_matched", "validation_mismatched") if recipe.task == "mnli" else ("train", "test")
    changed = {"model": str(source(family)), "output": str(tmp_path / "run"), **DRY}
    generated = {"generation.max_new_tokens": 3} if recipe.task in ("xsum", "cnn_dailymail", "gsm8k") else {}
    result = finetune(recipe.changed(**changed, **generated, data=dict.fromkeys(splits, rows)))
    assert result.steps == 2
    assert len([h for h in result.history if "loss" in h]) == 2
    assert result.metrics["n"] == len(ROWS[recipe.task][0])
    assert ("validation_mismatched_accuracy" in result.metrics) == (recipe.task == "mnli")


def commands():
    """model -> (tasks named, overrides) of every line of the README's tables."""
    found, model = {}, ""
    for line in (PAPER / "README.md").read_text().splitlines():
        heading = re.match(r"## .*`recipes/paper/([\w.-]+)/TASK.yaml`", line)
        model = heading[1] if heading else model
        row = re.match(r"\|[^|]+\|[^|]+\| ([^|]+) \| `([^`]+)` \|", line)
        if row:
            found.setdefault(model, []).append((row[1], row[2].split()))
    return found


def meant(task, tasks):
    return task not in tasks if tasks.startswith("all but") else tasks == "all" or task in tasks.split(", ")


@pytest.mark.parametrize("file", FILES, ids=name)
def test_the_readme_reaches_every_arm(file):
    """A line of the README is an arm of the file's grid, and the other way round, with a learning rate of its grid."""
    arms = {arm.key: arm for arm in grid(read(file))}
    named = []
    for tasks, overrides in commands()[file.parent.name]:
        if not meant(file.stem, tasks):
            continue
        given = [o for o in overrides if not o.endswith("=RATE")]
        given += rates_said_in_words(file, overrides)
        recipe = read(file, given)
        arm = Arm(essential(recipe), (), (), ())
        assert arm.key in arms, overrides
        named.append(arm.key)
        rates = arms[arm.key].learning_rates
        open_rate = "training.learning_rate=RATE" in overrides
        assert len(rates) > 1 if open_rate else rates == (recipe.training["learning_rate"],), overrides
    assert sorted(named) == sorted(arms)


def rates_said_in_words(file, overrides):
    """What the text above the tables adds."""
    text = " ".join(overrides)
    if "code=nf" in text and file.parent.name == "deberta-v3-base":
        rate = {"rte": "5e-5", "stsb": "1e-4"}.get(file.stem)
        return [f"training.learning_rate={rate}"] if rate else []
    if "uniform-tensor" in text and "rank=8" not in text and file.stem == "cnn_dailymail":
        return ["training.learning_rate=3e-4"]
    return []


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_note_says_what_is_followed(file):
    assert "paper" in (read(file).note or "")
