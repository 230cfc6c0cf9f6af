"""Statistics as a value: what is read is what was written, few tokens are shrunk and told, damage is refused."""

import hashlib
import json
import logging
import threading

import pytest
import small
import torch

import loftq
from harness import Child, hooked
from loftq.calibration.calibrate import (
    CalibrateOptions,
    calibrate,
    check_model,
    open_or_collect,
    open_statistics,
)
from loftq.calibration.collect import collect
from loftq.errors import ConflictError, InputError
from loftq.formats import hashed_json
from loftq.formats.statistics import Group, Statistics, samples_wanted, shrunk
from loftq.numerics import Metric, Moments


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small.checkpoint(tmp_path_factory.mktemp("statistics") / "source")


@pytest.fixture(scope="module")
def text(source):
    return str(small.text(source.parent))


@pytest.fixture(scope="module")
def finished(source, text):
    calibrate(str(source), source.parent / "finished", CalibrateOptions(data=text, samples=12, max_length=10))
    return source.parent / "finished"


@pytest.fixture
def copy(finished, tmp_path):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def moments_of(n, tokens, seed=0):
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed))
    metric = Metric(x.T @ x / tokens)
    return Moments(metric, metric, tokens)


# Few tokens


@pytest.mark.parametrize("tokens", [1, 5, 10, 39, 4000])
def test_the_fewer_the_tokens_the_more_is_shrunk_towards_the_diagonal(tokens):
    measured = moments_of(10, tokens)
    h, less = measured.fit.columns, shrunk(measured).fit.columns
    assert torch.equal(less.diagonal(), h.diagonal())
    off = ~torch.eye(10, dtype=torch.bool)
    torch.testing.assert_close(less[off], h[off] * (1 - 10 / (40 + tokens)))
    assert shrunk(measured).held is measured.held
    if tokens < 10:
        assert torch.linalg.eigvalsh(less.double())[0] > 1e-3, "positive where the measured one is singular"


def test_a_diagonal_is_left_alone():
    diagonal = Moments(Metric(torch.ones(10)), Metric(torch.ones(10)), 1)
    assert shrunk(diagonal) is diagonal


def test_few_tokens_are_told_once(caplog):
    groups = [
        Group(("a", "b"), moments_of(10, 20), 0),
        Group(("c",), moments_of(4, 20), 0),
        Group(("pooler",), moments_of(10, 5), 0),  # one vector a sample: no number of samples would be enough
    ]
    statistics = Statistics.of("full", groups, samples=5)
    assert repr(statistics) == "Statistics(full moments of 4 matrices, from 5 samples)"
    with caplog.at_level(logging.WARNING, "loftq"):
        for module in ("a", "b", "c", "a"):
            assert statistics.moments(module) is not None
    assert len(caplog.records) == 1
    assert "2 of 4 matrices have fewer than 4 tokens per input feature" in caplog.text
    assert "10 samples" in caplog.text
    assert samples_wanted([group.row("") for group in groups], 5) == 10
    caplog.clear()
    assert Statistics.of("full", groups[1:2], samples=5).moments("c") is not None
    assert not caplog.records


# Reading


def test_what_is_read_is_what_was_collected(finished, source, text):
    from loftq.calibration import texts

    _, table = texts.table(text)
    rows = texts.rows_of_table(text, table, small.tokenizer(), 12, 10, None)
    groups = [group for found in collect(small.models.tiny("bert"), rows, "full") for group in found]
    statistics, fresh = open_statistics(finished), Statistics.of("full", groups, 12)
    assert statistics.modules == fresh.modules
    assert len(statistics.modules) == 13
    for module in statistics.modules:
        read, made = statistics.moments(module), fresh.moments(module)
        assert read is not None
        assert made is not None
        assert small.away(read.fit.columns, made.fit.columns) < 1e-6
        assert small.away(read.held.columns, made.held.columns) < 1e-6
        assert read.tokens == made.tokens


def test_a_module_that_is_not_there(finished):
    assert open_statistics(finished).moments("encoder.layer.7") is None


def test_matrices_of_a_group_share_what_is_read(finished):
    """So that a factorization of the moments is made once."""
    statistics = open_statistics(finished)
    stem = "encoder.layer.0.attention.self"
    assert statistics.moments(f"{stem}.query") is statistics.moments(f"{stem}.value")
    assert statistics.moments("pooler.dense") is not statistics.moments(f"{stem}.value")


def test_reading_from_several_threads(finished):
    statistics = open_statistics(finished)
    single = {m: open_statistics(finished).moments(m) for m in statistics.modules}
    wrong = []

    def read():
        for module in statistics.modules:
            found = statistics.moments(module)
            if found is None or not torch.equal(found.fit.columns, single[module].fit.columns):
                wrong.append(module)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_identity_has_what_a_result_depends_on(finished):
    identity = open_statistics(finished).identity
    assert identity["sha256"] == json.loads((finished / "statistics.json").read_text())["sha256"]
    assert identity["identity"]["data"]["name"] == "text.txt"
    assert identity["kind"] == "full"


# Damage


def rewrite(directory, **changes):
    content = json.loads((directory / "statistics.json").read_text())
    del content["sha256"]
    hashed_json.write(directory / "statistics.json", {**content, **changes})
    return content


def group(content, **changes):
    return [{**content["groups"][0], **changes}, *content["groups"][1:]]


HOSTILE = {
    "another format": (lambda c: {"format_version": 3}, "format_version 3"),
    "no groups": (lambda c: {"groups": []}, "no groups"),
    "groups that are none": (lambda c: {"groups": [1]}, "missing or not"),
    "a kind": (lambda c: {"kind": "whole"}, "kind whole"),
    "samples": (lambda c: {"samples": 0}, "samples"),
    "a path": (lambda c: {"files": {"../block-00000.safetensors": {"size": 1, "sha256": ""}}}, "group 0"),
    "a file that is not listed": (lambda c: {"groups": group(c, file="x.safetensors")}, "group 0"),
    "no modules": (lambda c: {"groups": group(c, modules=[])}, "group 0"),
    "a module twice": (lambda c: {"groups": [*c["groups"], c["groups"][0]]}, "in two groups"),
    "tokens": (lambda c: {"groups": group(c, tokens=-1)}, "group 0"),
    "true tokens": (lambda c: {"groups": group(c, tokens=True)}, "group 0"),
    "a width": (lambda c: {"groups": group(c, width=71)}, r"of shape \(72, 72\), wanted"),
    "another module": (lambda c: {"groups": group(c, modules=["other"])}, "no tensor other.fit.columns"),
    "another kind": (lambda c: {"kind": "diagonal"}, "wanted F32"),
    "fisher": (lambda c: {"kind": "fisher"}, "wanted F32"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_description(copy, name):
    change, words = HOSTILE[name]
    rewrite(copy, **change(json.loads((copy / "statistics.json").read_text())))
    with pytest.raises(InputError, match=words):
        open_statistics(copy)


def test_a_changed_description(copy):
    raw = (copy / "statistics.json").read_bytes()
    (copy / "statistics.json").write_bytes(raw.replace(b'"tokens": ', b'"tokens": 1', 1))
    with pytest.raises(InputError, match="its own sha256"):
        open_statistics(copy)


def test_damaged_tensors(copy):
    path = copy / "block-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"block-00000\.safetensors: its bytes have changed"):
        open_statistics(copy).moments("encoder.layer.0.output.dense")
    path.write_bytes(raw[:-4])
    with pytest.raises(InputError, match=r"block-00000\.safetensors"):
        open_statistics(copy)
    path.unlink()
    with pytest.raises(InputError, match=r"block-00000\.safetensors: no such file"):
        open_statistics(copy)


def test_moments_that_are_none(copy):
    """Sealed, hashed, and still not second moments."""
    path = copy / "block-00000.safetensors"
    content = json.loads((copy / "statistics.json").read_text())
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(raw[:start] + b"\xff" * (len(raw) - start))
    digest = {"size": len(raw), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    rewrite(copy, files={**content["files"], path.name: digest})
    with pytest.raises(InputError, match="no second moments"):
        open_statistics(copy).moments("encoder.layer.0.output.dense")


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(InputError, match="not a directory that `loftq calibrate` finished"):
        open_statistics(tmp_path)


# Which model


def test_another_model_is_refused(finished, source, tmp_path):
    check_model(open_statistics(finished), finished, source)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in source.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    check_model(open_statistics(finished), finished, moved)  # a copy is the same model
    trained = small.checkpoint(tmp_path / "trained", seed=1)
    with pytest.raises(ConflictError, match=r"statistics of another model than .*model\.safetensors\.sampled_sha256"):
        check_model(open_statistics(finished), finished, trained)


def test_open_or_collect(finished, source, text, tmp_path):
    options = CalibrateOptions(data="", samples=12, max_length=10)
    opened = open_or_collect(str(finished), str(source), tmp_path / "none", options)
    assert not (tmp_path / "none").exists()
    collected = open_or_collect(text, str(source), tmp_path / "made", options)
    assert collected.modules == opened.modules
    assert torch.equal(*(s.moments("encoder.layer.1.output.dense").fit.columns for s in (opened, collected)))
    trained = small.checkpoint(tmp_path / "trained", seed=1)
    with pytest.raises(ConflictError, match="another model"):
        open_or_collect(str(finished), str(trained), tmp_path / "none", options)
    with pytest.raises(ConflictError, match="another model"):
        loftq.replace_lora_weights(torch.nn.Module(), trained, calibration=finished)


# Stopped


@pytest.mark.slow
def test_killed_before_every_change(source, text, tmp_path):
    """Absent or complete; and the same call then makes the same statistics."""
    options = CalibrateOptions(data=text, kind="diagonal", samples=8, max_length=10)
    calls = []
    with hooked(lambda op, path: calls.append(op)):
        whole = calibrate(str(source), tmp_path / "whole", options)
    assert calls.count("rename") == len(whole["files"]) + 1
    for k in [n for n, op in enumerate(calls) if op in ("rename", "rmtree")]:
        output = tmp_path / f"killed-{k}"

        def work(k=k, output=output):
            count = iter(range(1000))
            with hooked(lambda op, path: next(count) == k and __import__("os")._exit(9)):
                calibrate(str(source), output, options)

        assert Child(work).ended().code == 9
        if (output / "statistics.json").exists():
            assert open_statistics(output).modules
        again = calibrate(str(source), output, options)
        assert again["files"] == whole["files"]
        assert {p.name for p in output.iterdir()} == {*whole["files"], "statistics.json"}
