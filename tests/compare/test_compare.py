"""``loftq compare`` on a tiny encoder: equal terms, rows from which it continues, and what does not converge."""

import dataclasses
import json
import math
import time

import pytest
import torch
import transformers

import harness
import models
from loftq.errors import ConflictError, InputError, NumericalError, UsageError
from loftq.finetune import compare as workflow
from loftq.finetune.compare import compare, read_rows
from loftq.finetune.convergence import constant_answer, failure
from loftq.finetune.grid import Run, grid, schedule
from loftq.finetune.recipe import dump, parse
from loftq.finetune.tasks import get_task
from loftq.formats import fsio

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(source, tmp_path):
    rows = [{"sentence": f"a {'good' if i % 2 else 'bad'} cat {i}", "label": i % 2} for i in range(24)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse(
        {
            "model": str(source("bert")),
            "task": "sst2",
            "method": "loftq",
            "data": str(tmp_path),
            "quantization": {"bits": 2},
            "lora": {"rank": 4},
            "training": {"max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1},
            "max_length": 16,
            "output": str(tmp_path / "out"),
            "compare": {
                "seeds": [0, 1],
                "learning_rates": [1e-3],
                "arms": [
                    {"method": "lora", "learning_rates": [1e-3, 1e-2]},
                    {"method": ["qlora", "loftq"]},
                    {"method": "full", "seeds": [0]},
                ],
            },
        }
    )


@pytest.fixture
def counted(monkeypatch):
    """The recipes that were fine-tuned, and the batches they saw."""
    runs, real = [], workflow.finetune

    def finetune(recipe, **options):
        batches, collator = [], get_task("sst2").collator

        def collate(task, tokenizer, model=None):
            inner = collator(tokenizer, model)
            return lambda rows: batches.append([row["input_ids"] for row in rows if "labels" in row]) or inner(rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(get_task("sst2")), "collator", collate)
            result = real(recipe, **options)
        runs.append((recipe, [b for b in batches if b]))
        return result

    monkeypatch.setattr(workflow, "finetune", finetune)
    return runs


def test_equal_terms_and_going_on(recipe, counted, tmp_path):
    seen = []
    rows = compare(recipe, lambda total: seen.append(total) or (lambda row, runs: seen.append(row)))
    assert seen == [8, *rows]
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} >= {"rows.jsonl", "comparison.md", "losses.png", "bytes.png"}
    by_seed = {}
    for run, batches in counted:
        assert len(batches) >= 2  # the next batch is fetched before it is used
        by_seed.setdefault(run.seed, []).append(batches)
    for same in by_seed.values():  # every arm and rate sees the same rows in the same order
        assert all(batches == same[0] for batches in same)
    assert by_seed[0][0] != by_seed[1][0]
    assert len(list((out / "runs").iterdir())) == 8
    assert len(list((out / "backbones").iterdir())) == 2  # QLoRA's and LoftQ's, for all rates and seeds
    assert not list((out / "runs").glob("*/checkpoints"))
    assert all(row["n"] == 24 and row["train_steps"] == 2 and len(row["losses"]) == 2 for row in rows)
    assert {row["settings"]["method"]: row["bytes"]["adapter"] > 0 for row in rows} == {
        "lora": True,
        "qlora": True,
        "loftq": True,
        "full": False,
    }

    counted.clear()
    assert compare(recipe) == rows
    assert counted == []
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:4] + lines[5:]))
    fsio.remove_tree(out / "runs")
    again = compare(recipe)
    assert [run.method for run, _ in counted] == [rows[4]["settings"]["method"]]
    timing = ("seconds", "train_seconds")
    assert [{k: v for k, v in r.items() if k not in timing} for r in again] == [
        {k: v for k, v in r.items() if k not in timing} for r in rows
    ]


def test_a_grid_grows_beside_rows_that_are_there(recipe, monkeypatch, tmp_path):
    """The rows of another grid, and of a winner before, stay where they are; a new one stands where it is run."""
    better = {1e-3: 60.0, 1e-2: 70.0, 1e-1: 80.0}

    def faked(run, *_):
        result = {"metric": "accuracy", "greater_is_better": True, "metrics": {"accuracy": better[run.learning_rate]}}
        return {"key": run.key, "learning_rate": run.learning_rate, "seed": run.seed, "failed": None, **result}

    def ran(**compare):
        arms = grid(recipe.changed(compare={"seeds": [0, 1], "learning_rates": [1e-3, 1e-2], **compare}))
        told.clear()
        begin = lambda runs: told.append(runs) or (lambda row, runs: told.append(runs))  # noqa: E731
        rows = workflow.run_grids([arms], file, tmp_path / "work", begin=begin, about=lambda rows: {"rows": len(rows)})
        return [(row["learning_rate"], row["seed"]) for row in rows]

    monkeypatch.setattr(workflow, "_row", faked)
    file, told = tmp_path / "rows.jsonl", []
    ran(arms=[{"method": "qlora"}])
    assert ran(arms=[{"method": "lora"}]) == [(1e-3, 0), (1e-2, 0), (1e-2, 1)]
    assert told == [3, 3, 3, 3]
    before = read_rows(file)
    assert ran(arms=[{"method": "lora"}], further_rates=[1e-1]) == [(1e-3, 0), (1e-2, 0), (1e-1, 0), (1e-1, 1)]
    assert told == [4, 4, 4, 4, 4]
    rows = read_rows(file)
    assert [row for row in rows if row in before] == before
    assert rows[-1]["rows"] == len(rows) == 8
    assert ran(arms=[{"method": "loftq"}], further_rates=[1e-1])
    assert told == [3, 3, 4, 4, 4]


def test_a_loss_that_is_not_finite_is_a_result(recipe, monkeypatch):
    def finetune(run, **options):
        raise NumericalError("the training loss is nan at step 3")

    monkeypatch.setattr(workflow, "finetune", finetune)
    rows = compare(recipe.changed(compare={"seeds": [0], "arms": [{}]}))
    assert [row["failed"] for row in rows] == ["the training loss is nan at step 3"]
    assert "N.A." in (workflow.Path(recipe.output) / "comparison.md").read_text()


def test_a_metric_that_is_not_finite_is_a_result(recipe, monkeypatch):
    real = workflow.finetune

    def finetune(run, **options):
        result = real(run, **options)
        return dataclasses.replace(result, metrics={**result.metrics, "accuracy": math.nan})

    monkeypatch.setattr(workflow, "finetune", finetune)
    (row,) = compare(recipe.changed(compare={"seeds": [0], "arms": [{"method": "lora"}]}))
    assert (row["failed"], row["metrics"]["accuracy"]) == ("accuracy is nan", None)
    assert read_rows(workflow.Path(recipe.output) / "rows.jsonl") == [row]


def test_rows_that_change_under_a_comparison_stop_it(recipe, counted, monkeypatch, tmp_path):
    """What a run has read of them is not known: it leaves no row under the key of the old ones."""
    real, file = workflow.finetune, tmp_path / "validation.jsonl"

    def finetune(run, **options):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
        return real(run, **options)

    monkeypatch.setattr(workflow, "finetune", finetune)
    with pytest.raises(ConflictError, match="changed while the comparison ran; put the files back, or run the"):
        compare(recipe)
    assert len(counted) == 1
    assert read_rows(tmp_path / "out" / "rows.jsonl") == []
    assert list((tmp_path / "out" / "runs").iterdir()) == []


def test_a_run_is_removed_only_when_its_row_is_there(recipe, monkeypatch, tmp_path):
    removed, real = [], fsio.remove_tree

    def remove_tree(path):
        removed.append((path.name, len(read_rows(tmp_path / "rows.jsonl"))))
        real(path)

    monkeypatch.setattr(fsio, "remove_tree", remove_tree)
    arms = grid(recipe.changed(compare={"seeds": [0], "arms": [{"method": "lora"}]}))
    (row,) = workflow.run_grids([arms], tmp_path / "rows.jsonl", tmp_path / "work", keep=False)
    assert removed[-1] == (f"lora-{row['key']}", 1)
    assert list((tmp_path / "work" / "runs").iterdir()) == []


@pytest.mark.parametrize(
    "block",
    [
        {"quantization.svd": ["exact", "randomized"]},
        {"quantization.seed": [0, 1]},
        {"lora.rank_policy": ["refuse", "clamp"]},
        {"method": "lora", "quantization.bits": ["query=16,2", "key=16,2"]},
        {"method": "qlora", "quantization.min_coverage": [0.5, 0.1]},
    ],
)
def test_settings_tell_arms_apart(recipe, block):
    one, other = grid(recipe.changed(compare={"arms": [block]}))
    said = [workflow.settings(arm.recipe, workflow.Path(recipe.model)) for arm in (one, other)]
    assert said[0] != said[1]


def test_settings_of_a_start_that_is_there_are_what_it_was_made_with(recipe, tmp_path):
    models.quantize(recipe.model, tmp_path / "packed")
    said = workflow.settings(recipe.changed(quantization=None, lora={}), tmp_path / "packed")
    made = {"method": "loftq", "bits": "2", "rank": "4", "code": "lloyd", "scales": "fitted", "steps": 5}
    assert {name: said[name] for name in made} == made


def test_an_arm_that_cannot_be_stops_all_before_the_first_run(recipe, counted):
    with pytest.raises(UsageError, match="the rank must be below the shorter side"):
        compare(recipe.changed(compare={"arms": [{"method": "lora"}, {"lora.rank": 5000}]}))
    assert counted == []


def test_dense_weights_count_as_they_are_stored(recipe, tmp_path):
    assert workflow.settings(recipe.changed(method="lora"), workflow.Path(recipe.model))["bits"] == "32"
    half = transformers.AutoModel.from_pretrained(recipe.model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert workflow.settings(recipe.changed(method="lora"), tmp_path / "half")["bits"] == "16"


def test_other_errors_stop_it(recipe, monkeypatch):
    with pytest.raises(UsageError, match="rank"):
        compare(recipe.changed(**{"lora.rank": 4000}))
    with pytest.raises(UsageError, match="no output"):
        compare(recipe.changed(output=None))
    (workflow.Path(recipe.output) / "rows.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: no row"):
        compare(recipe)


def test_processes_share_the_runs(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    file = tmp_path / "out" / "rows.jsonl"
    held = Run(grid(recipe)[0], 1e-3, 0)  # LoRA with its first rate: without it none is chosen for the second seed
    fsio.make_dirs(file.parent)
    with fsio.DirectoryLock(file.parent / f"{held.key}.lock"):
        children = [harness.start_cli("compare", tmp_path / "recipe.yaml", "--json") for _ in range(2)]
        while len(read_rows(file)) < 6:
            assert not any(map(harness.Child.has_ended, children))
            time.sleep(0.1)
        assert held.key not in {row["key"] for row in read_rows(file)}
        time.sleep(2)
    first, second = (child.ended() for child in children)
    assert first.code == second.code == 0, first.err + second.err
    assert all("waiting for runs of other processes" in child.err for child in (first, second))
    rows = read_rows(file)
    assert json.loads(first.out) == json.loads(second.out) == rows
    assert [row["key"] for row in rows] == [run.key for run in schedule([grid(recipe)], {r["key"]: r for r in rows})]
    assert len({row["key"] for row in rows}) == 8
    assert len(list((tmp_path / "out" / "backbones").iterdir())) == 2
    assert not list(file.parent.glob("*.lock"))


def test_a_launcher_of_processes_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="start the command several times"):
        compare(recipe)


def test_constant_answers(source):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source("bert"))
    from datasets import Dataset

    labelled = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 1, 0]})
    assert constant_answer(get_task("sst2"), labelled, tokenizer) == ("accuracy", pytest.approx(200 / 3))
    assert constant_answer(get_task("cola"), labelled, tokenizer) == ("matthews_correlation", 0)
    text = Dataset.from_dict({"text": ["aaab"]})
    task = get_task({"kind": "causal-lm", "columns": {"text": "text"}, "rows": "documents", "max_length": 5})
    shares = torch.tensor([3 / 5, 1 / 5, 1 / 5])  # a, b, and the end
    wanted = torch.exp(-(shares * shares.log()).sum()).item()
    assert constant_answer(task, text, tokenizer) == ("perplexity", pytest.approx(wanted))


@pytest.mark.parametrize(
    ("metrics", "judged", "constant", "converged"),
    [
        ({"accuracy": 51.0}, "accuracy", 50.9, True),
        ({"accuracy": 50.9}, "accuracy", 50.9, False),
        ({"perplexity": 99.0, "exact_match": 0.0}, "perplexity", 100.0, True),
        ({"perplexity": 100.0}, "perplexity", 100.0, False),
        ({"pearson": 10.0, "spearman": float("nan")}, "pearson", 0.0, False),
    ],
)
def test_what_counts_as_converged(metrics, judged, constant, converged):
    assert (failure(metrics, judged, constant) is None) == converged


def test_command_line(recipe, tmp_path):
    short = recipe.changed(compare={"seeds": [0], "arms": [{"method": ["lora", "loftq"]}]})
    (tmp_path / "recipe.yaml").write_text(dump(short))
    ended = harness.cli("compare", tmp_path / "recipe.yaml", "lora.rank=2", "-o", tmp_path / "other")
    assert ended.code == 0, ended.err
    assert "LoftQ" in ended.out
    assert "rows.jsonl" in ended.out
    assert "rank 2" in (tmp_path / "other" / "comparison.md").read_text()
