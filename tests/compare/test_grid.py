"""What a section ``compare`` stands for, and the order of its runs."""

import dataclasses
import hashlib

import pytest

import models
from loftq.errors import UsageError
from loftq.finetune import tasks
from loftq.finetune.grid import Run, grid, planned, schedule
from loftq.finetune.inputs import contents
from loftq.finetune.recipe import parse

BASE = {
    "model": "org/model",
    "task": "sst2",
    "method": "loftq",
    "quantization": {"bits": 2},
    "training": {"learning_rate": 1e-4},
}


def arms(*blocks, **compare):
    return grid(parse({**BASE, "compare": {"arms": list(blocks), **compare}}))


def test_a_block_is_the_product_of_its_lists():
    found = arms({"method": ["qlora", "loftq"], "quantization.bits": [4, 2.5], "lora.rank": [8, 16]})
    said = [(a.recipe.method, a.recipe.quantization.bits, a.recipe.lora.rank) for a in found]
    assert said == [(m, b, r) for m in ("qlora", "loftq") for b in ("4", "2.5") for r in ("8", "16")]
    assert {(a.learning_rates, a.seeds) for a in found} == {((1e-4,), (0, 1, 2))}


def test_rates_and_seeds_of_all_and_of_one():
    one, other = arms({"method": "full", "learning_rates": [1], "seeds": [7]}, {}, learning_rates=[0.1, 0.2], seeds=[1])
    assert (one.learning_rates, one.seeds) == ((1.0,), (7,))
    assert (other.learning_rates, other.seeds) == ((0.1, 0.2), (1,))
    assert (planned([[one]], {}), planned([[other]], {})) == (1, 2)


def test_arms_that_mean_the_same_are_one():
    found = arms({"method": ["full", "lora", "qlora"], "quantization.bits": [4, 2], "quantization.steps": [1, 5]})
    assert [a.recipe.method for a in found] == ["full", "lora", "qlora", "qlora"]
    patterns = arms({"method": "lora", "quantization.bits": ["query=16,2", "2", "4"]})
    assert len(patterns) == 2  # the first leaves some modules without an adapter


def test_an_arm_in_two_blocks_has_one_set_of_rates():
    assert len(arms({"method": ["lora", "loftq"]}, {"method": "loftq"})) == 2
    for other in ({"learning_rates": [1]}, {"seeds": [5]}):
        with pytest.raises(UsageError, match=r"block 2: an arm of an earlier block again \(loftq\), with other"):
            arms({"method": ["lora", "loftq"]}, {"method": "loftq", **other})


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ({"seed": 1}, "'?seed'? cannot differ between arms"),
        ({"training.max_steps": [1, 2]}, "training.max_steps'? cannot differ"),
        ({"lora.rank": []}, "lora.rank'? is an empty list"),
        ({"method": "lofq"}, "method"),
        ({"quantization.bit": 2}, "did you mean bits"),
        ({"learning_rates": [0]}, "learning_rates.0: wanted greater than 0"),
        ({"seeds": []}, "seeds"),
        (
            {"learning_rates": [1, 4], "further_rates": [8, 2]},
            "further_rates: 2 is not below or above learning_rates, which are 1 to 4; put it there",
        ),
        ({"further_rates": [0.0]}, "further_rates.0: wanted greater than 0"),
    ],
)
def test_blocks_that_are_refused(block, why):
    with pytest.raises(UsageError, match=why):
        arms(block)


def test_sections_that_are_refused():
    with pytest.raises(UsageError, match="has no section compare"):
        grid(parse(BASE))
    with pytest.raises(UsageError, match=r"compare.*arms: missing.*seed: unknown key; did you mean seeds"):
        grid(parse({**BASE, "compare": {"seed": [1]}}))


def row(run, value, failed=None):
    return {
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "metric": "accuracy",
        "greater_is_better": True,
        "metrics": {"accuracy": value},
        "failed": failed,
    }


def test_every_arm_has_a_rate_before_any_has_the_next_and_then_the_best_repeats():
    first = arms({"method": "lora"}, {"method": "full", "seeds": [0]}, learning_rates=[0.1, 0.2], seeds=[0, 5])
    second = arms({"method": "loftq", "learning_rates": [0.3]}, seeds=[0, 5])
    rows, order = {}, []
    for run in schedule([first, second], rows):
        order.append((run.arm.recipe.method, run.learning_rate, run.seed))
        rows[run.key] = row(run, {0.1: 60.0, 0.2: 70.0, 0.3: 65.0}[run.learning_rate])
    assert order == [
        ("lora", 0.1, 0),
        ("full", 0.1, 0),
        ("loftq", 0.3, 0),
        ("lora", 0.2, 0),
        ("full", 0.2, 0),
        ("lora", 0.2, 5),
        ("loftq", 0.3, 5),
    ]
    assert len(order) == planned([first, second], {}) == planned([first, second], rows)


def followed(arm, accuracy, rows=None):
    """Rates and seeds as they are run; a rate without an accuracy does not converge."""
    rows, order = {} if rows is None else rows, []
    for run in schedule([[arm]], rows):
        order.append((run.learning_rate, run.seed))
        value = accuracy.get(run.learning_rate)
        rows[run.key] = row(run, 0.0 if value is None else value, None if value else "nan")
    assert len(order) == planned([[arm]], rows)
    return order


@pytest.mark.parametrize(
    ("accuracy", "rates", "chosen"),
    [
        ({1: 60, 2: 70, 4: 60}, [1, 2, 4], 2),  # beyond the upper edge, one more
        ({1: 60, 2: 70, 4: 80, 8: 90}, [1, 2, 4, 8], 8),  # as many as there are
        ({1: 60, 2: 70}, [1, 2, 4], 2),  # 4 did not converge
        ({1: 70, 2: 60, 0.5: 80, 0.25: 75}, [1, 2, 0.5, 0.25], 0.5),
        ({1: 70, 2: 70, 0.5: 70}, [1, 2, 0.5], 1),  # the first of equals
        ({}, [1, 2, 0.5], 1),  # nothing converged
    ],
)
def test_a_grid_grows_while_its_best_rate_is_outermost(accuracy, rates, chosen):
    (arm,) = arms({}, learning_rates=[1, 2], further_rates=[8, 4, 0.25, 0.5], seeds=[0, 5])
    assert planned([[arm]], {}) == 3
    assert followed(arm, accuracy) == [*((rate, 0) for rate in rates), (chosen, 5)]


def test_a_grid_of_one_rate_grows_on_both_sides():
    (arm,) = arms({}, learning_rates=[1], further_rates=[2, 4, 0.5], seeds=[0])
    assert followed(arm, {1: 60, 0.5: 50, 2: 70, 4: 50}) == [(1, 0), (0.5, 0), (2, 0), (4, 0)]


def test_rows_of_a_smaller_grid_are_kept_and_a_new_winner_gets_all_seeds():
    (small,) = arms({}, learning_rates=[1, 2], seeds=[0, 5])
    (arm,) = arms({}, learning_rates=[1, 2], further_rates=[4], seeds=[0, 5])
    assert small.key == arm.key
    rows = {}
    assert followed(small, {1: 60, 2: 70}) == [(1, 0), (2, 0), (2, 5)]
    assert followed(small, {1: 60, 2: 70}, rows)
    assert followed(arm, {1: 60, 2: 70, 4: 80}, rows) == [(1, 0), (2, 0), (4, 0), (4, 5)]
    assert len(rows) == 5  # with the second seed of the earlier winner


def test_without_the_row_of_a_rate_none_follows():
    (arm,) = arms({}, learning_rates=[1, 2], further_rates=[4], seeds=[0, 5])
    runs = [Run(arm, rate, 0) for rate in (1, 2, 4)]
    assert arm.missing({}) == 3
    rows = {run.key: row(run, 50.0 + run.learning_rate) for run in runs[:2]}
    assert arm.missing(rows) == 2  # 4, and the second seed
    assert arm.missing({**rows, Run(arm, 2, 5).key: {}}) == 1  # if 2 remains the best
    assert [run.learning_rate for run in schedule([[arm]], {runs[0].key: rows[runs[0].key]})] == [1, 2]
    assert list(schedule([[arm]], rows)) == runs


def test_further_rates_of_all_and_of_one():
    one, other, third = arms(
        {"method": "full", "learning_rates": [1]}, {}, {"method": "lora", "further_rates": [3]},
        learning_rates=[0.1, 0.2], further_rates=[0.4],
    )  # fmt: skip
    assert (one.further_rates, other.further_rates, third.further_rates) == ((), (0.4,), (3.0,))


def test_a_rate_that_did_not_converge_is_not_chosen():
    (arm,) = arms({}, learning_rates=[0.1, 0.2], seeds=[0, 1])
    runs = [Run(arm, 0.1, 0), Run(arm, 0.2, 0)]
    rows = {runs[0].key: row(runs[0], 60.0), runs[1].key: row(runs[1], 99.0, "nan")}
    assert list(schedule([[arm]], rows))[-1] == Run(arm, 0.1, 1)


def test_keys_know_files_by_content(tmp_path):
    def key(place, rate=0.1, **changes):
        (arm,) = grid(parse({**BASE, "data": {"train": str(place)}, "compare": {"arms": [{}]}, **changes}))
        return Run(arm, rate, 0).key

    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "train.jsonl").write_text("rows")
    (tmp_path / "b" / "train.jsonl").write_text("rows")
    (tmp_path / "c" / "train.jsonl").write_text("wors")
    keys = [key(tmp_path / name / "train.jsonl") for name in ("a", "b", "c")]
    assert keys[0] == keys[1] != keys[2]
    assert key(tmp_path / "a" / "*.jsonl") == keys[0]
    assert key(tmp_path / "a" / "train.jsonl", rate=0.2) != keys[0]
    assert key(tmp_path / "a" / "train.jsonl", note="other", output="x") == keys[0]


def test_keys_know_all_of_a_file_and_only_files_that_are_read(tmp_path):
    def key(**changes):
        (arm,) = grid(parse({**BASE, "model": str(model), "data": str(data), "compare": {"arms": [{}]}, **changes}))
        return arm.key

    model, data = tmp_path / "model", tmp_path / "data"
    for place in (model, data):
        place.mkdir()
    (model / "model.safetensors").write_bytes(bytes(3 << 20))
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("rows")
    first = key()
    for stranger in (data / "nohup.out", data / "notes.json", model / "notes.txt", model / "README.md"):
        stranger.write_text("something")
    assert key() == first
    (model / "model.safetensors").write_bytes(bytes((3 << 20) - 1) + b"1")
    second = key()
    assert second != first
    (data / "validation.jsonl").write_text("wors")
    assert key() not in (first, second)


def test_keys_know_the_version_of_a_task(monkeypatch):
    before = arms({})[0].key
    monkeypatch.setitem(tasks.TASKS, "sst2", dataclasses.replace(tasks.get_task("sst2"), version=2))
    assert arms({})[0].key != before


def test_keys_of_a_start_know_its_adapter_and_how_it_was_made_but_not_its_name(source, tmp_path):
    def key(place):
        changes = {"model": str(place), "quantization": None, "compare": {"arms": [{}]}}
        return grid(parse({**BASE, **changes}))[0].key

    for name in ("one", "other"):
        models.quantize(source("bert"), tmp_path / name)
    models.quantize(source("bert"), tmp_path / "alpha", alpha=1)
    assert key(tmp_path / "one") == key(tmp_path / "other") != key(tmp_path / "alpha")
    adapter = tmp_path / "other" / "loftq_init" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"1")
    assert key(tmp_path / "one") != key(tmp_path / "other")


def test_a_place_with_brackets_is_a_place(tmp_path):
    (tmp_path / "model[v2]").mkdir()
    (tmp_path / "model[v2]" / "config.json").write_text("{}")
    assert contents(str(tmp_path / "model[v2]")) == [["config.json", 2, hashlib.sha256(b"{}").hexdigest()]]
