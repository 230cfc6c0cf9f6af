"""A user's own data set, described by a mapping."""

import json
import re
from pathlib import Path

import pytest

from loftq.errors import InputError, UsageError
from loftq.finetune.tasks import get_task, load_data
from loftq.formats.strict_yaml import loads

# description, a row, what it becomes
DESCRIBED = [
    (
        {"kind": "text-classification", "columns": {"text": "review", "label": "stars"}, "labels": [1, 2, 3]},
        {"review": "good", "stars": 2, "more": None},
        {"text": "good", "label": 1},
    ),
    (
        {"kind": "text-classification", "columns": {"text": "a", "text_pair": "b", "label": "same"},
         "labels": [False, True], "metrics": ["accuracy", "f1"]},
        {"a": "x", "b": "y", "same": True},
        {"text": "x", "text_pair": "y", "label": 1},
    ),
    (
        {"kind": "text-classification", "columns": {"text": "a", "label": "score"}, "regression": True},
        {"a": "x", "score": 3},
        {"text": "x", "label": 3.0},
    ),
    (
        {"kind": "span-qa", "columns": {"context": "passage", "question": "q", "answers": "spans"}},
        {"passage": "the cat", "q": "who?", "spans": [{"text": "cat", "answer_start": 4}]},
        {"context": "the cat", "question": "who?", "answers": {"text": ["cat"], "answer_start": [4]}},
    ),
    (
        {"kind": "summarization", "columns": {"document": "body", "summary": "title"}},
        {"body": "long", "title": "short"},
        {"document": "long", "summary": "short"},
    ),
    ({"kind": "causal-lm"}, {"text": "words"}, {"text": "words"}),
    (
        {"kind": "instruction", "columns": {"messages": "chat"}},
        {"chat": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ),
    (
        {"kind": "instruction", "columns": {"prompt": "q", "response": "a"}, "answer": "text"},
        {"q": "hi", "a": "yo"},
        {"prompt": "hi", "response": "yo"},
    ),
]  # fmt: skip


def write(path, row):
    path.write_text(json.dumps(row) + "\n")
    return str(path)


@pytest.mark.parametrize(("description", "row", "loaded"), DESCRIBED)
def test_rows_of_ones_own(description, row, loaded, tmp_path):
    task = get_task(description)
    assert load_data(task, {"train": write(tmp_path / "a.jsonl", row)})["train"].to_list() == [loaded]
    assert task.identity == "own@1"
    assert task.eval_splits(["train", "test"]) == ("test",)


def test_the_examples_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    blocks = [loads(block, "docs/tasks.md") for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    kinds = [get_task(block["task"]).kind for block in blocks if "task" in block]
    assert kinds == ["text-classification", "span-qa", "summarization", "causal-lm", "instruction", "instruction"]


def test_options_reach_the_task():
    task = get_task({"kind": "causal-lm", "name": "notes", "rows": "lines", "max_length": 64}, max_length=32)
    assert (task.name, task.limits.max_length, task.rows) == ("notes", 32, "lines")  # type: ignore[attr-defined]
    task = get_task({"kind": "text-classification", "columns": {"text": "a", "label": "b"}, "labels": ["x", "y"],
                     "metrics": ["matthews_correlation"]})  # fmt: skip
    assert task.main_metric == "matthews_correlation"
    assert task.model_options()["id2label"] == {0: "x", 1: "y"}


def test_a_column_named_twice(tmp_path):
    task = get_task({"kind": "summarization", "columns": {"document": "a", "summary": "a"}})
    with pytest.raises(UsageError, match="two of its columns are called the same: a, a"):
        load_data(task, {"train": write(tmp_path / "a.jsonl", {"a": "x"})})


def test_from_the_hub():
    columns = {"text": "a", "label": "b"}
    task = get_task({"kind": "text-classification", "columns": columns, "regression": True, "dataset": "me/mine",
                     "config": "small", "splits": {"train": "train", "test": "held_out"}})  # fmt: skip
    assert task.hub is not None
    assert (str(task.hub), dict(task.hub.splits)) == ("me/mine (small)", {"train": ("train",), "test": ("held_out",)})
    with pytest.raises(UsageError, match="task own has no data set on the hub; give data=DIR"):
        load_data(get_task({"kind": "causal-lm"}))


@pytest.mark.parametrize(
    ("description", "why"),
    [
        ({}, "task: a task of your own needs its kind, one of text-classification, span-qa"),
        ({"kind": ["span-qa"]}, r"task.kind: \['span-qa'\] is not one of"),
        ({"kind": "ner"}, "task.kind: 'ner' is not one of"),
        ({"kind": "causal-lm", "row": "lines"}, "row: unknown key; did you mean rows"),
        ({"kind": "causal-lm", "max_length": 0}, "max_length: .* greater than or equal to 2, got 0"),
        (
            {"kind": "text-classification", "columns": {"text": "a", "label": "b"}},
            "^task: give labels, in the order of",
        ),
        ({"kind": "text-classification", "columns": {"text": "a"}, "labels": ["x", "y"]}, "columns.label: missing"),
        (
            {
                "kind": "text-classification",
                "columns": {"text": "a", "label": "b"},
                "regression": True,
                "metrics": ["f1"],
            },
            "metrics are of classes",
        ),
        ({"kind": "instruction", "columns": {"prompt": "a"}}, "give messages, or prompt and response"),
        ({"kind": "instruction", "columns": {"prompt": "a", "response": "b"}, "template": "Q:"}, r"\{prompt\} in it"),
    ],
)
def test_descriptions_that_cannot_be_meant(description, why):
    with pytest.raises(UsageError, match=why) as error:
        get_task(description)
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_at_once():
    with pytest.raises(UsageError, match=r"task: .*columns\.label: missing; .*max_len: unknown key"):
        get_task({"kind": "text-classification", "columns": {"text": "a"}, "labels": ["x", "y"], "max_len": 3})


@pytest.mark.parametrize(
    "messages",
    ["hi", [], [{"role": "user", "content": "hi"}], [{"role": "assistant"}], [{"role": "assistant", "content": 3}]],
)
def test_broken_conversations(messages, tmp_path):
    task = get_task({"kind": "instruction", "columns": {"messages": "chat"}})
    with pytest.raises(InputError, match=r"column chat, row 1: .* is not a list of messages, role and content"):
        load_data(task, {"train": write(tmp_path / "a.jsonl", {"chat": messages})})
