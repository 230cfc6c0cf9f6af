"""Every named task, from rows as the hub has them to its figures."""

import json
import math

import pytest
import tiny_models
import torch
from rows import ROWS

import loftq.finetune.tasks
from loftq.errors import UsageError
from loftq.finetune.tasks import get_task, load_data, score

# task -> what it reports, main metric first
REPORTED = {
    "anli": ["accuracy"],
    "mnli": ["accuracy"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
    "sst2": ["accuracy"],
    "mrpc": ["accuracy", "f1"],
    "cola": ["matthews_correlation", "accuracy"],
    "qqp": ["accuracy", "f1"],
    "stsb": ["pearson", "spearman"],
    "squad": ["f1", "exact_match"],
    "xsum": [*(f"{p}{r}" for p in ("", "lead3_") for r in ("rouge2", "rouge1", "rougeL", "rougeLsum"))],
    "cnn_dailymail": [*(f"{p}{r}" for p in ("", "lead3_") for r in ("rouge2", "rouge1", "rougeL", "rougeLsum"))],
    "wikitext2": ["perplexity", "log_perplexity", "tokens"],
    "gsm8k": ["exact_match", "perplexity", "log_perplexity", "tokens"],
}


def loaded(name, tmp_path, which=0):
    """The task, and its rows read back from a file."""
    path = tmp_path / f"{name}-{which}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name][which]))
    task = get_task(name, max_length=150)
    return task, load_data(task, {"validation": str(path)})["validation"]


def tokenizer_of(task, words, letters):
    return words if task.auto_class != "AutoModelForCausalLM" else letters


def test_every_named_task_is_tested():
    assert loftq.finetune.tasks.names() == tuple(sorted(ROWS))
    assert set(REPORTED) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_every_task_reports_its_metrics(name, tmp_path, words, letters):
    task, rows = loaded(name, tmp_path)
    model = tiny_models.model(task.kind, **task.model_options())
    generation = {"max_new_tokens": 4}
    figures = score(
        task, model, tokenizer_of(task, words, letters), rows, batch_size=2, generation=generation, progress=False
    )
    assert list(figures) == [*REPORTED[name], "n"]
    assert figures["n"] == len(rows)
    assert all(math.isfinite(value) for value in figures.values())
    assert task.main_metric == REPORTED[name][0]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ROWS)
def test_other_names_of_columns_and_labels(name, tmp_path, words, letters):
    task, rows = loaded(name, tmp_path)
    _, others = loaded(name, tmp_path, 1)
    if name == "wikitext2":  # equal only once they are tokenized
        rows, others = (task.prepare(each, letters, train=True) for each in (rows, others))
    assert set(rows.column_names) == set(others.column_names)
    assert rows.to_list() == others.select_columns(rows.column_names).to_list()


@pytest.mark.parametrize("name", ROWS)
def test_a_training_step(name, tmp_path, words, letters):
    """What is prepared for training fits the model, and only what is to be learned is in the loss."""
    task, rows = loaded(name, tmp_path)
    tokenizer = tokenizer_of(task, words, letters)
    model = tiny_models.model(task.kind, **task.model_options())
    prepared = task.prepare(rows, tokenizer, train=True)
    batch = task.collator(tokenizer, model)(list(prepared))
    assert set(task.label_names) <= set(batch)
    loss = model(**batch).loss
    assert torch.isfinite(loss)
    loss.backward()


def test_labels_of_the_models(words):
    options = get_task("mnli").model_options()
    assert options["id2label"] == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert options["label2id"]["contradiction"] == options["num_labels"] - 1 == 2
    assert get_task("stsb").model_options() == {"num_labels": 1, "problem_type": "regression"}
    assert get_task("squad").model_options() == get_task("xsum").model_options() == {}


def test_which_splits_are_reported_and_watched():
    mnli, anli, gsm8k = (get_task(name) for name in ("mnli", "anli", "gsm8k"))
    matched = ("validation_matched", "validation_mismatched")
    assert mnli.eval_splits(["train", *matched]) == matched
    assert mnli.dev_split(["train", *matched]) == "validation_matched"
    assert mnli.eval_splits(["train", "validation"]) == ("validation",)
    assert anli.eval_splits(["train", "validation", "test"]) == ("test",)
    assert anli.dev_split(["train", "validation", "test"]) == "validation"
    assert gsm8k.dev_split(["train", "test"]) is None
    assert get_task("rte").eval_splits(["test"]) == ("test",)
    with pytest.raises(UsageError, match=r"rte.*nothing to evaluate on among the splits train; wanted validation"):
        get_task("rte").eval_splits(["train"])


def test_what_can_be_watched():
    assert (get_task("cola").best_metric, get_task("cola").best_is_greater) == ("matthews_correlation", True)
    assert (get_task("gsm8k").best_metric, get_task("gsm8k").best_is_greater) == ("loss", False)
    assert not get_task("wikitext2").greater_is_better
    assert get_task("gsm8k").greater_is_better


def test_generation_options():
    greedy = get_task("gsm8k").generation_options()
    assert greedy["do_sample"] is False
    assert greedy["num_beams"] == 1
    assert greedy["max_new_tokens"] == 256
    assert get_task("gsm8k").generation_options("greedy") == greedy
    paper = get_task("gsm8k").generation_options("paper")
    assert paper == {**greedy, "do_sample": True, "temperature": 0.1, "top_k": 40, "top_p": 0.95, "seed": 42}
    assert get_task("xsum").generation_options({"num_beams": 4})["num_beams"] == 4
    assert get_task("xsum", max_target_length=60).generation_options()["max_new_tokens"] == 60
    with pytest.raises(UsageError, match="xsum has no setting named 'paper'"):
        get_task("xsum").generation_options("paper")
    with pytest.raises(UsageError, match="'beam' is neither"):
        get_task("xsum").generation_options("beam")


@pytest.mark.parametrize(
    ("name", "limits", "why"),
    [
        ("rta", {}, "'rta' is not one of anli"),
        ("rte", {"doc_stride": 8}, "rte has no doc_stride; leave it out"),
        ("rte", {"max_length": 1}, "max_length: 1 is not a number of tokens"),
        ("squad", {"max_length": 100}, "doc_stride: 128 is not less than max_length 100"),
    ],
)
def test_refusals(name, limits, why):
    with pytest.raises(UsageError, match=why):
        get_task(name, **limits)
