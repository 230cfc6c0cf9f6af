"""The studies begin, stop when their time is over, go on, and their report says what is missing."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from rows import ROWS
from test_comparison import row

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import study
import study_decoder
import study_encoder
import study_moe
import study_report
import study_seq2seq

pytestmark = pytest.mark.slow

SQUAD = [{**ROWS["squad"][0][0], "split": split} for split in ("fit", "eval")]
DEEP = {"num_hidden_layers": 4}  # enough for an average of 2.5 bits
MODELS = {
    study_encoder: ("bert", DEEP),
    study_decoder: ("llama", DEEP),
    study_moe: ("qwen3-moe", {}),
    study_seq2seq: ("bart", {}),
}


def _source(source, module):
    name, changes = MODELS[module]
    return source(name, **changes)


@pytest.fixture
def data(tmp_path):
    """A directory with a file of a few rows for everything that the studies read."""
    named = {task: files for task, (_, files) in study_encoder.TASKS.items()}
    named |= {"wikitext2": study_decoder.WIKITEXT, "gsm8k": study_decoder.GSM8K, **study_seq2seq.TASKS}
    for task, files in named.items():
        for name in files.values():
            for one in [name] if isinstance(name, str) else name:
                file = tmp_path / "data" / one.replace("[123]", "1")
                file.parent.mkdir(parents=True, exist_ok=True)
                plain = (
                    (row["text"] for row in ROWS[task][0]) if task == "wikitext2" else map(json.dumps, ROWS[task][0])
                )
                with gzip.open(file, "wt") as lines:
                    lines.writelines(line.rstrip("\n") + "\n" for line in plain)
    (tmp_path / "data" / "squad_v1.1").mkdir()
    with gzip.open(tmp_path / "data" / "squad_v1.1" / "dev.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in SQUAD)
    return tmp_path / "data"


@pytest.fixture
def started(source, data, tmp_path, monkeypatch):
    """``started(module, *options)``: a study's main, with runs of one step."""
    real = study.parse

    def parse(values):
        short = {**values["training"], "max_steps": 1, "per_device_train_batch_size": 2}
        return real({**values, "training": short, "lora": {"rank": 4}})

    def start(module, *options):
        command = ["study", "--data", data, "--model", _source(source, module), "--name", "tiny", *options]
        command += ["--work", tmp_path / "work", "--rows", tmp_path / "rows"]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        module.main()

    monkeypatch.setattr(study, "parse", parse)
    return start


@pytest.mark.parametrize("module", MODELS, ids=lambda module: module.__name__)
def test_a_study_stops_and_goes_on(module, started, tmp_path, monkeypatch, capsys):
    name = module.__name__.removeprefix("study_")
    file = tmp_path / "rows" / f"{name}-small.jsonl"
    started(module, "--minutes", 0)
    assert len(file.read_text().splitlines()) == 1
    with file.open("a") as rows:
        rows.write('{"key": "of another study"}\n')
    started(module, "--minutes", 0)
    assert "1 rows of runs that this study does not have are dropped" in capsys.readouterr().out
    (row,) = map(json.loads, file.read_text().splitlines())
    assert (row["model"], row["size"], row["study"]) == ("tiny", "small", name)
    assert str(tmp_path) not in file.read_text()
    assert row["before"] is not None if name in ("decoder", "moe") else row["before"] is None
    monkeypatch.setattr(study_report, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(sys, "argv", ["report", "--output", str(tmp_path / "docs" / "results.md")])
    study_report.main()
    page = (tmp_path / "docs" / "results.md").read_text()
    assert f"**1 of {row['runs_planned']} runs; the others are not yet run**" in page
    assert "`python benchmarks/study_" in page.partition("\n## Not yet run\n")[2]
    assert len(list((tmp_path / "docs" / "images" / "study").glob("*.png"))) == 2


def test_only_the_arms_that_are_asked_for(started, tmp_path):
    started(study_decoder, "--minutes", 0, "--only", "method=loftq", "bits=2", "preset=fitted")
    (row,) = map(json.loads, (tmp_path / "rows" / "decoder-small.jsonl").read_text().splitlines())
    assert row["settings"]["preset"] == "fitted"
    with pytest.raises(SystemExit, match="--only bits=5: the study has no such arm"):
        started(study_decoder, "--only", "bits=5")


def test_all_recipes_of_the_full_size(data, source, tmp_path):
    """They are read, and stand for more arms than the small ones."""
    for module in MODELS.keys() - {study_moe}:  # whose recipe is the decoder's
        tasks = {study_encoder: study_encoder.TASKS, study_decoder: ["wikitext2", "gsm8k"]}.get(module, ["xsum"])
        count = {}
        for size in ("small", "full"):
            given = study.argparse.Namespace(size=size, data=data, model=_source(source, module), work=tmp_path)
            count[size] = sum(len(study.grid(module.recipe(given, task))) for task in tasks)
        assert count["full"] >= count["small"]


def test_a_report_of_rows_from_before_and_after_a_grid_grew(tmp_path, monkeypatch):
    monkeypatch.setattr(study_report, "ROWS", tmp_path)
    rows = [row("lora", 80.0, runs_planned=2), row("lora", 85.0, rate=0.2, runs_planned=2)]
    state = {2: "all", 3: "**2 of 3 runs; the others are not yet run**"}
    for planned, said in state.items():
        rows[0]["runs_planned"] = planned  # the newer row stands before the older one
        (tmp_path / "encoder-small.jsonl").write_text("".join(json.dumps({"key": "k", **r}) + "\n" for r in rows))
        assert f"`: {said}. loftq 1 at abc" in list(study_report.section("encoder", "small", tmp_path))[2]
