"""A budget from files to files: what was promised is what is there, however it was made."""

import dataclasses
import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq
from harness import EXACT, OPTIONS, POLICY, cli, hooked, refused, run, tiny_source, tree
from loftq.checkpoint import curves as module
from loftq.checkpoint.budget import within_budget
from loftq.checkpoint.curves import measured
from loftq.checkpoint.quantize import quantize
from loftq.checkpoint.verify import verify
from loftq.errors import ConflictError, NumericalError, StorageError, UsageError
from loftq.formats.statistics import Group, Statistics
from loftq.numerics import Metric, Moments
from loftq.planning import frontier
from loftq.sources.checkpoint import open_source
from models import close, outputs, substituted, tensors, tiny, written

pytestmark = pytest.mark.usefixtures("quick")

BUDGET = dataclasses.replace(POLICY, bits="4", budget="3.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("budget") / "source")


@pytest.fixture
def counted(monkeypatch):
    """The matrices that were measured."""
    seen, measure = [], module.errors_by_rank

    def count(weight, quants, ranks, spec, name, metric):
        seen.append(name)
        return measure(weight, quants, ranks, spec, name, metric)

    monkeypatch.setattr(module, "errors_by_rank", count)
    return seen


def made(source, output, policy=BUDGET, **changes):
    return run(source, output, policy=policy, **changes)


def made_and_moved(source, directory, **changes):
    """The files of a run, always at the same place, as the adapter names it."""
    made(source, directory / "out", **changes)
    files = tree(directory / "out")
    (directory / "out").rename(directory / str(len(os.listdir(directory))))
    return files


def spent(directory):
    """Bytes of all tensors of a checkpoint: backbone and adapter."""
    found = [*tensors(directory).values(), *tensors(directory / "loftq_init").values()]
    return sum(t.numel() * t.itemsize for t in found)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"budget": "2.6", "budget_solver": "milp", "code": "lloyd", "double_quant": True},
        {"budget": "80KB", "code": "affine"},
        {"budget": "80KB", "budget_ranks": "1,2,8", "embeddings": True},
        {"budget": "3.3", "budget_ranks": "1,8", "bits": "output.dense=4,4"},
        {"budget": "1.9", "code": "trellis", "window": 8},
    ],
    ids=lambda c: " ".join(c.values()) if all(isinstance(v, str) for v in c.values()) else "",
)
def test_what_was_promised_is_there(source, tmp_path, changes):
    policy = dataclasses.replace(BUDGET, **changes)
    manifest = made(source, tmp_path / "out", policy)
    chosen, totals = manifest["budget"]["chosen"], manifest["totals"]
    assert chosen["bytes"] == spent(tmp_path / "out")
    assert chosen["bits_per_weight"] == pytest.approx(totals["bits_per_weight"])
    rows = manifest["plan"]["matrices"]
    adapter = sum(4 * m["rank"] * sum(m["shape"]) for m in rows)
    if policy.budget.endswith("KB"):
        assert 0.97 * 80_000 < chosen["bytes"] <= 80_000
    else:
        as_asked = sum(4 * 4 * sum(m["shape"]) for m in rows)
        weights = totals["quantized_weights"]
        asked = float(policy.budget) + 8 * as_asked / weights
        assert 0.97 * asked < totals["bits_per_weight"] + 8 * adapter / weights <= asked
    assert len({(m["quant"]["bits"], m["quant"].get("block_size"), m["rank"]) for m in rows}) > 1
    assert verify(tmp_path / "out")["budget"] == manifest["budget"]


def test_it_loads_with_the_ranks_that_were_chosen(tmp_path):
    """A GPT-2, whose matrices lie transposed, at ranks from 2 to 8."""
    dense = tiny("gpt2")
    dense.save_pretrained(tmp_path / "source")
    options = {**EXACT, "budget": 10, "budget_ranks": "2,8", "rank": 4, "workers": 1, "scales": "fitted"}
    manifest = loftq.quantize(tmp_path / "source", tmp_path / "out", **options)
    ranks = {m["module"]: m["rank"] for m in manifest["plan"]["matrices"]}
    config = json.loads((tmp_path / "out" / "loftq_init" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert len(set(ranks.values())) > 1
    assert {f"transformer.{k}": v for k, v in config["rank_pattern"].items()} == {
        k: v for k, v in ranks.items() if v != 4
    }
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = PeftModel.from_pretrained(model, tmp_path / "out", subfolder="loftq_init").eval()
    values = {name: q + ba for name, (q, ba) in written(tmp_path / "out").items()}
    with torch.inference_mode():
        assert close(outputs(model), outputs(substituted(dense, values)), 1e-4)
    mean = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"]
    assert mean == 8


def test_the_optimum_is_better_than_all_that_takes_no_more(source, tmp_path):
    policy = dataclasses.replace(BUDGET, budget_solver="milp", budget="3.5")
    report = made(source, tmp_path / "out", policy)["budget"]
    others = [p for kind in ("uniform", "first_layers") for p in report[kind]]
    fitting = [p for p in others if p["bits_per_weight"] <= 3.5]
    assert len(fitting) >= 3
    assert all(report["chosen"]["error"] <= p["error"] for p in fitting)
    assert [p["layers"] for p in report["first_layers"]] == [0, 1, 2]
    assert report["first_layers"][0]["error"] == report["uniform"][0]["error"]
    assert report["first_layers"][2]["bytes"] == report["uniform"][2]["bytes"]
    path = report["frontier"]
    assert all(b[0] > a[0] and b[1] < a[1] for a, b in itertools.pairwise(path))
    assert min(abs(error - report["chosen"]["error"]) / error for _, error in path) < 0.1


# The same bytes, and nothing measured twice


def test_workers_and_kept_curves(source, tmp_path, counted):
    plain = made_and_moved(source, tmp_path)
    for workers in (3, 1):
        assert made_and_moved(source, tmp_path, workers=workers, curves=tmp_path / "curves.json") == plain
    assert len(counted) == 24


def test_what_is_done_is_not_measured_again(source, tmp_path, counted):
    first = made(source, tmp_path / "out")
    assert made(source, tmp_path / "out") == first
    assert len(counted) == 12
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(ConflictError, match=r"options\.budget: 3\.1 -> 3"):
        made(source, tmp_path / "out", dataclasses.replace(BUDGET, budget="3"))
    assert len(counted) == 12


@pytest.mark.sampled(3)
@pytest.mark.parametrize("after", ["curves.json", "00001.json", "adapter_model.safetensors"])
def test_a_stopped_run_continues_to_the_same_bytes(source, tmp_path, counted, after):
    plain = made_and_moved(source, tmp_path)

    def stop(op, path):
        if op == "rename" and path.name == after:
            raise KeyboardInterrupt

    with hooked(lambda op, path: None, stop), pytest.raises(KeyboardInterrupt):
        made(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert made_and_moved(source, tmp_path) == plain
    assert set(counted[12:]) == set(counted[:12])
    assert 24 <= len(counted) <= 26, "12 of each run, and what was measured ahead of the stop"


@pytest.mark.slow
def test_curves_of_something_else_are_not_used(source, tmp_path, counted):
    def measure(where=source, statistics=None, **changes):
        policy = dataclasses.replace(BUDGET, **changes)
        before = len(counted)
        found = measured(open_source(str(where), policy), policy, tmp_path / "c.json", statistics, workers=1)
        return found, len(counted) - before

    first, times = measure()
    assert times == 12
    assert measure() == (first, 0)
    assert measure(budget="70KB", alpha=3.0, budget_solver="milp") == (first, 0)
    assert measure(solve=dataclasses.replace(BUDGET.solve, steps=7))[1] == 0
    assert measure(solve=dataclasses.replace(BUDGET.solve, scales="fitted"))[1] == 12
    assert measure(solve=dataclasses.replace(BUDGET.solve, steps=0))[1] == 12
    assert measure(block_size=32)[1] == 12
    assert measure(adapter_dtype="bfloat16")[1] == 12  # other bytes
    assert measure(budget_ranks="8")[1] == 12
    assert measure(bits="query=4,4")[1] == 12
    assert measure(statistics=Statistics.of("full", [], 4))[1] == 12
    assert measure() == (first, 12)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"] *= -1.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert measure(other)[1] == 12


def test_damaged_curves_are_measured_again(source, tmp_path, counted, caplog):
    made(source, tmp_path / "out", curves=tmp_path / "c.json")
    whole = (tmp_path / "c.json").read_bytes()
    (tmp_path / "c.json").write_bytes(whole.replace(b"64", b"65", 1))
    made(source, tmp_path / "again", curves=tmp_path / "c.json")
    assert len(counted) == 24
    assert "measured again" in caplog.text
    assert (tmp_path / "c.json").read_bytes() == whole


# What calibration found out


def test_moments_weigh(source):
    """The error in the metric, relative to the matrix in it; a metric of ones changes nothing."""
    opened = open_source(str(source), BUDGET)
    plain = measured(opened, BUDGET, None, workers=1)
    ones = {m.module: Metric(torch.ones(m.shape[1])) for m in opened.plan.matrices}
    skewed = {m.module: Metric(torch.rand(m.shape[1]) ** 4) for m in opened.plan.matrices}
    found = {}
    for name, metrics in (("ones", ones), ("skewed", skewed)):
        groups = [Group((module,), Moments(metric, metric, 100), 30) for module, metric in metrics.items()]
        found[name] = measured(opened, BUDGET, None, Statistics.of("diagonal", groups, 4), workers=1)
    for module_, choices in plain.items():
        errors = [c.error for c in choices]
        assert [c.error for c in found["ones"][module_]] == pytest.approx(errors, rel=1e-4)
        assert [c.error for c in found["skewed"][module_]] != pytest.approx(errors, rel=1e-2)
        assert [c.bytes for c in found["skewed"][module_]] == [c.bytes for c in choices]
    assert len(frontier(found["skewed"])) > 12
    source_ = within_budget(opened, BUDGET, None, Statistics.of("diagonal", [], 4), workers=1)
    assert source_.plan.budget["chosen"]["bits_per_weight"] <= 3.1
    assert source_.plan.digest() != opened.plan.digest()


# Refusals, before anything is measured or written


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "dense"}, UsageError, "budget counts bytes of format='loftq'"),
        ({"policy": dataclasses.replace(BUDGET, budget="2")}, UsageError, "budget 2 is too small"),
        ({"policy": dataclasses.replace(BUDGET, budget="1KB")}, UsageError, "budget 1KB is too small"),
        ({"policy": POLICY, "curves": "c.json"}, UsageError, "curves needs a budget"),
        ({"curves": "no/where.json"}, StorageError, "its directory does not exist"),
        ({"curves": "letter.txt"}, ConflictError, "holds no error curves of loftq; choose another curves"),
        ({"curves": "other.json"}, ConflictError, "holds no error curves"),
    ],
)
def test_refused(source, tmp_path, counted, changes, error, message):
    (tmp_path / "letter.txt").write_text("Dear")
    (tmp_path / "other.json").write_text("{}")
    before = tree(tmp_path)
    if "curves" in changes:
        changes = {**changes, "curves": tmp_path / changes["curves"]}
    with pytest.raises(error, match=message):
        quantize(str(source), tmp_path / "out", dataclasses.replace(OPTIONS, **{"policy": BUDGET, **changes}))
    assert counted == []
    assert tree(tmp_path) == before


def test_weights_that_are_not_finite_are_named(source, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][3, 4] = torch.inf
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        NumericalError, match=r"encoder.layer.1.output.dense.weight: 1 of 2880 values are NaN or infinite"
    ):
        made(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_has_no_budget():
    with pytest.raises(UsageError, match="a budget works on checkpoints"):
        loftq.get_peft_model(tiny("llama"), budget=2.5, rank=4)


# The command line


def test_plan_then_quantize(source, tmp_path):
    pytest.importorskip("matplotlib")
    asked = ("--budget", "3.1", "--rank", "4", "--curves", tmp_path / "c.json", "--workers", "1")
    ended = cli("plan", source, *asked, "--plot", tmp_path / "budget.png")
    assert ended.code == 0, ended.err
    assert "measuring for the budget" in ended.err
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")
    for words in ("at no more bytes", "budget 3.1", "uniform, 2 bits", "paper: first 0 layers"):
        assert words in ended.out
    ended = cli("plan", source, *asked, "--json")
    assert (ended.code, ended.err) == (0, "")
    told = json.loads(ended.out)
    ended = cli("quantize", source, "-o", tmp_path / "out", *asked, "--steps", "1")
    assert ended.code == 0, ended.err
    assert "measuring" not in ended.err
    manifest = json.loads((tmp_path / "out" / "loftq_manifest.json").read_text())
    assert manifest["budget"] == told["budget"]
    planned = {r["name"]: (r["bits"], r["block_size"], r["rank"]) for r in told["tensors"] if r["action"] == "quantize"}
    assert planned == {
        m["name"]: (m["quant"]["bits"], m["quant"]["block_size"], m["rank"]) for m in manifest["plan"]["matrices"]
    }


def test_a_picture_that_cannot_be_saved_is_refused_first(source, tmp_path):
    pytest.importorskip("matplotlib")
    asked = ("plan", source, "--budget", "3.1", "--rank", "4", "--plot")
    assert "measuring" not in refused(cli(*asked, tmp_path / "budget.nonsense"), 2, "--plot")
    refused(cli(*asked, tmp_path / "no" / "budget.png"), 4, "--plot")
    refused(cli("plan", source, "--rank", "4", "--plot", tmp_path / "b.png"), 2, "--plot and --curves need a budget")


def test_a_measurement_that_stops_goes_on(source, tmp_path, counted):
    """Every curve is kept as it comes."""
    keep = tmp_path / "c.json"
    opened, reports = open_source(str(source), BUDGET), []

    def begin(total, done):
        reports.append((total, done))

        def advance(report):
            if len(keep.read_bytes().splitlines()) == 1 + 3 and len(reports) == 1:  # after a head
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        measured(opened, BUDGET, keep, workers=1, begin=begin)
    before = len(counted)
    whole = measured(opened, BUDGET, keep, workers=1, begin=begin)
    assert reports == [(12, 0), (12, 3)]
    names = [matrix.name for matrix in opened.plan.matrices]
    assert set(counted[before:]) == set(names[3:]), "those that were kept are not measured again"
    assert whole == measured(opened, BUDGET, None, workers=1)


def test_kept_curves_grow_line_by_line(source, tmp_path, counted):
    """What is there is not written again; a line that was torn by a kill is measured again, and no other."""
    keep, seen = tmp_path / "c.json", []
    opened = open_source(str(source), BUDGET)
    whole = measured(opened, BUDGET, keep, workers=1, begin=lambda *_: lambda report: seen.append(keep.read_bytes()))
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    keep.write_bytes(seen[-1][:-1])
    assert measured(opened, BUDGET, keep, workers=1) == whole
    assert len(counted) == 12 + 1
    assert keep.read_bytes() == seen[-1]


def test_curves_of_another_machine(source, tmp_path, counted, monkeypatch):
    """Those of all matrices are as good as ours; a part of them is not mixed with ours."""
    keep, opened = tmp_path / "c.json", open_source(str(source), BUDGET)
    whole = measured(opened, BUDGET, keep, workers=1)
    monkeypatch.setattr(module, "code_path", lambda device: {"cpu": "ABACUS"})
    assert measured(opened, BUDGET, keep, workers=1) == whole
    keep.write_bytes(b"".join(keep.read_bytes().splitlines(keepends=True)[:5]))
    before = keep.read_bytes()
    with pytest.raises(
        ConflictError, match=r"c\.json: begun on another machine \(.*cpu: .* -> ABACUS\).*another curves"
    ):
        measured(opened, BUDGET, keep, workers=1)
    assert keep.read_bytes() == before
    assert len(counted) == 12


def test_curves_in_the_format_of_before(source, tmp_path, counted, caplog):
    """One JSON object, written anew for every matrix: known as curves, and measured again."""
    keep = tmp_path / "c.json"
    keep.write_text(json.dumps({"curves": {}, "identity": {}, "kind": module.KIND, "sha256": ""}, indent=2))
    measured(open_source(str(source), BUDGET), BUDGET, keep, workers=1)
    assert len(counted) == 12
    assert "measured again" in caplog.text


def test_one_worker_for_one_gpu(source, monkeypatch):
    """Whatever the host has."""
    asked = []
    monkeypatch.setattr(module, "workers_for", lambda *given: asked.append(given) or 1)
    opened = open_source(str(source), BUDGET)
    measured(opened, BUDGET, None, device="cpu:0")
    assert [given[2] for given in asked] == ["cpu:0"]
