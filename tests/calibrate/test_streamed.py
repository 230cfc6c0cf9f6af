"""Calibrated and solved block by block: what is on disk, what is read how often, where a stopped run goes on."""

import functools
import json
import os
import socket

import pytest
import small
import torch
from accelerate.utils.offload import OffloadedWeightsLoader

import loftq
from harness import Child, cli, hooked, start_cli, tree
from loftq.calibration import calibrate, collect, states
from loftq.calibration.blocks import Blocks, load_offloaded
from loftq.checkpoint import quantize as module
from loftq.errors import StorageError

OPTIONS = {"bits": 2, "rank": 4, "block_size": 16, "workers": 1, "calibration_samples": 12, "progress": False}


@pytest.fixture
def source(tmp_path):
    return small.checkpoint(tmp_path / "source", "llama"), small.text(tmp_path, 100)


@pytest.fixture
def held(monkeypatch):
    """The blocks that were really run, in order."""
    names, plain = [], Blocks.held
    monkeypatch.setattr(Blocks, "held", lambda self, name: names.append(name) or plain(self, name))
    return names


def quantized(source, output, **more):
    return loftq.quantize(source[0], output, calibrate=str(source[1]), **{**OPTIONS, **more})


def test_a_blocks_weights_are_read_once_for_all_batches(source, tmp_path, monkeypatch):
    read, plain = [], OffloadedWeightsLoader.__getitem__
    model = load_offloaded(source[0], tmp_path / "offload")
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", lambda self, key: read.append(key) or plain(self, key))
    list(collect.collect(model, small.rows(), "full", tokens=16))
    assert len(collect.batches(small.rows(), model, 16)) > 4
    assert {read.count(key) for key in read} == {2}  # by the one row that looks which matrix is given what; by all
    assert all(p.is_meta for n, p in model.named_parameters() if ".layers." in n)


def test_only_the_block_in_work_is_on_disk(source, tmp_path, monkeypatch):
    seen, plain = [], module.solve_matrix

    def watched(matrix, *args):
        files = sorted(p.name for p in (tmp_path / "out.loftq-partial" / "moments").glob("*.safetensors"))
        seen.append((matrix.name.split(".")[2], [f.split("-")[0] for f in files]))
        return plain(matrix, *args)

    monkeypatch.setattr(module, "solve_matrix", watched)
    quantized(source, tmp_path / "out")
    assert [block for block, _ in seen] == sorted(block for block, _ in seen)
    assert {block for block, _ in seen} == {"0", "1"}
    assert all(files == ["block", "states"] for _, files in seen)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "text.txt"]


def stopped(monkeypatch, run, at):
    """Run until a matrix with ``at`` in its name, or that number, is to be solved."""
    count, plain = [], module.solve_matrix

    def stops(matrix, *args):
        count.append(matrix.name)
        if at == len(count) or (isinstance(at, str) and at in matrix.name):
            raise StorageError("stopped")
        return plain(matrix, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "solve_matrix", stops)
        with pytest.raises(StorageError, match="stopped"):
            run()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("stopped_at", [3, 9])
def test_a_stopped_run_goes_on_at_its_block(source, tmp_path, monkeypatch, held, stopped_at):
    whole = quantized(source, tmp_path / "whole")
    stopped(monkeypatch, lambda: quantized(source, tmp_path / "out"), stopped_at)
    held.clear()
    made = quantized(source, tmp_path / "out")
    assert [name.split(".")[-1] for name in held] == (["1"] if stopped_at < 8 else [])
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert made["matrices"] == whole["matrices"]


def test_experts_and_embeddings_are_what_finished_statistics_make(tmp_path, monkeypatch, held, caplog):
    """With the same warnings. The first shard holds the embeddings, which are solved at the end, and keeps no other."""
    source = small.checkpoint(tmp_path / "source", "mixtral"), small.text(tmp_path, 300)
    more = {"embeddings": True, "max_shard_bytes": 8000, "calibration_samples": 4}
    loftq.calibrate(source[0], source[1], output=tmp_path / "stats", samples=4, progress=False)
    caplog.clear()
    loftq.quantize(source[0], tmp_path / "of stats", calibrate=str(tmp_path / "stats"), **{**OPTIONS, **more})
    said = sorted(record.message for record in caplog.records)
    assert any("experts' matrices each was fitted on" in message for message in said)
    assert any("second moments are shrunk" in message for message in said)
    caplog.clear()
    for at in ("layers.0.mlp.experts.gate_up_proj.2", "embed_tokens"):
        held.clear()
        stopped(monkeypatch, lambda: quantized(source, tmp_path / "out", **more), at)
    assert [name.split(".")[-1] for name in held] == ["1"]  # the moments of the other were on disk
    shards = len(list((tmp_path / "of stats").glob("model-*")))
    assert len(list((tmp_path / "out.loftq-partial" / "units").glob("*.json"))) == shards - 1
    held.clear()
    quantized(source, tmp_path / "out", **more)
    assert held == []
    ours, theirs = tree(tmp_path / "out"), tree(tmp_path / "of stats")
    manifests = [json.loads(each.pop("loftq_manifest.json")) for each in (ours, theirs)]
    assert ours == theirs
    assert manifests[0]["matrices"] == manifests[1]["matrices"]
    caplog.clear()
    quantized(source, tmp_path / "at once", **more)
    assert sorted(record.message for record in caplog.records) == said


@pytest.mark.slow
def test_killed_again_and_again(source, tmp_path):
    """Each time later among the changes of what is kept of a block."""
    quantized(source, tmp_path / "whole")

    def work(k):
        left = iter(range(k, -1, -1))
        with hooked(lambda op, path: "moments" in path.parts and next(left) == 0 and os._exit(9)):
            quantized(source, tmp_path / "out")

    codes = []
    while 0 not in codes:
        codes.append(Child(functools.partial(work, 2 * len(codes))).ended().code)
    assert len(codes) > 3
    assert set(codes[:-1]) == {9}
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_a_stopped_run_has_its_fisher_information(source, tmp_path, monkeypatch):
    whole = quantized(source, tmp_path / "whole", preset="lq-lora")
    stopped(monkeypatch, lambda: quantized(source, tmp_path / "out", preset="lq-lora"), 3)
    monkeypatch.setattr(calibrate, "collect_fisher", None)
    assert quantized(source, tmp_path / "out", preset="lq-lora")["matrices"] == whole["matrices"]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_what_is_needed_and_gone_is_collected_again(source, tmp_path, monkeypatch, held, caplog):
    """A matrix of a block that is done was damaged; or the file of states was."""
    quantized(source, tmp_path / "whole")
    for damaged in ("units/00000/00000.safetensors", "moments/states-*.safetensors"):
        stopped(monkeypatch, lambda: quantized(source, tmp_path / "out"), ".1.mlp.down")
        (path,) = (tmp_path / "out.loftq-partial").glob(damaged)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        held.clear()
        quantized(source, tmp_path / "out")
        assert [name.split(".")[-1] for name in held] == ["0", "1"]
        assert tree(tmp_path / "out") == tree(tmp_path / "whole")
        (tmp_path / "out").rename(tmp_path / f"done-{len(damaged)}")


@pytest.mark.slow
def test_a_budget_runs_the_texts_twice(source, tmp_path, held):
    spent = {"budget": 4.0}
    made = loftq.quantize(source[0], tmp_path / "out", calibrate=str(source[1]), **{**OPTIONS, **spent, "bits": None})
    assert [name.split(".")[-1] for name in held] == ["0", "1", "0", "1"]
    loftq.calibrate(source[0], source[1], output=tmp_path / "stats", samples=12, progress=False)
    again = loftq.quantize(
        source[0], tmp_path / "again", calibrate=str(tmp_path / "stats"), **{**OPTIONS, **spent, "bits": None}
    )
    assert made["matrices"] == again["matrices"]


@pytest.mark.slow
def test_into_a_store(source, tmp_path, memory):
    quantized(source, tmp_path / "made")
    quantized(source, "memory://bucket/made")
    found = {path.removeprefix("/bucket/made/"): memory.cat_file(path) for path in memory.find("/bucket/made")}
    assert found == tree(tmp_path / "made")


def test_states_of_any_plain_form(tmp_path):
    tensor = torch.randn(2, 3)
    given = [{"a.layers": {0: (tensor, None), 3: [tensor.T, {"x": (1, 2.5, "s", True)}]}}]
    assert states.write_states(tmp_path / "states", given)
    read = states.read_states(tmp_path / "states", "cpu")
    assert torch.equal(read[0]["a.layers"][0][0], tensor)
    assert torch.equal(read[0]["a.layers"][3][0], tensor.T)
    assert read[0]["a.layers"][0][1] is None
    assert read[0]["a.layers"][3][1] == {"x": (1, 2.5, "s", True)}
    for strange in (object(), torch.zeros(2, dtype=torch.complex64)):
        assert states.write_states(tmp_path / "none", [{"a": {0: strange}}]) is None
    assert not (tmp_path / "none").exists()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_processes_collect_what_one_does(name, tmp_path, monkeypatch):
    """To the bit: batches are dealt out, and float64 sums of float32 products added up."""
    source = small.checkpoint(tmp_path / "source", name), small.text(tmp_path, 100)
    monkeypatch.setattr(calibrate, "steps", functools.partial(collect.steps, tokens=28))
    command = ("calibrate", source[0], "--data", source[1], "--samples", "24", "--max-length", "14")
    assert cli(*command, "-o", tmp_path / "one").code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def setup(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    begun = [start_cli(*command, "-o", tmp_path / "two", setup=functools.partial(setup, rank)) for rank in (0, 1)]
    ended = [child.ended() for child in begun]
    assert [each.code for each in ended] == [0, 0], [each.err for each in ended]
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    said = [json.loads(each.pop("statistics.json")) for each in (one, two)]
    assert one == two
    assert said[0] == said[1]
    assert "block-00000.safetensors" in one
