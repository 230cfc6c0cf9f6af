"""Every verb as a call: the same results as on the command line, and types that say what they are."""

import re

import numpy as np
import pytest
import torch

import harness
import loftq
from loftq.errors import InputError, UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return harness.tiny_source(tmp_path_factory.mktemp("verbs") / "source")


@pytest.fixture(scope="module")
def made(source):
    return loftq.quantize(source, source.parent / "out", bits=2, rank=4, workers=1)


def test_a_plan_describes_itself_and_keeps_to_a_budget(source):
    plan = loftq.plan(source, bits="layer.0=4,2", rank=4)
    assert isinstance(plan, loftq.Plan)
    assert {m.quant.bits for m in plan.matrices} == {2, 4}
    assert re.fullmatch(r"Plan\(\d+ matrices at \d\.\d\d bits, rank 4, coverage \d+%; \d+ tensors kept\)", repr(plan))
    spent = loftq.plan(source, budget=3.5, rank=4, workers=1, progress=False)
    assert 8 * sum(m.bytes for m in spent.matrices) / sum(m.numel for m in spent.matrices) <= 3.5
    for options, word in (
        ({"bit": 2}, "plan has no option 'bit'; did you mean 'bits'?"),
        ({"curves": "c.json"}, "give one: budget=2.5"),
        ({"preset": "cloq"}, "needs statistics"),
    ):
        with pytest.raises(UsageError, match=re.escape(word)):
            loftq.plan(source, **options)


def test_what_is_made_is_inspected_and_verified(source, made):
    out = source.parent / "out"
    told = loftq.inspect(out)
    assert told["totals"] == made["totals"]
    assert loftq.verify(out) == made
    for report in (made, told, loftq.verify(out)):
        assert isinstance(report, loftq.Report)
        assert len(repr(report)) < 250
        assert f"error {made['totals']['error']:.4f}" in repr(report)
    with pytest.raises(InputError, match="loftq_manifest"):
        loftq.inspect(source)
    with pytest.raises(UsageError, match="directory: wanted a path, got int"):
        loftq.verify(3)


def test_the_command_finds_what_the_call_made(source, made):
    """Both have the same defaults, so that one leaves the other's output alone."""
    out, merged = source.parent / "out", source.parent / "merged"
    loftq.merge(out, merged, progress=False)
    for command in (
        ("quantize", source, "--output", out, "--bits", 2, "--rank", 4),
        ("merge", out, "--output", merged),
    ):
        ended = harness.cli(*command)
        assert ended.code == 0, ended.err
    assert loftq.verify(out) == made
    numpys = {"bits": np.int64(2), "rank": np.int32(4), "device": torch.device("cpu"), "overwrite": np.False_}
    assert loftq.quantize(source, out, progress=False, **numpys) == made
    with pytest.raises(UsageError, match="model: wanted a path, got an empty text"):
        loftq.plan("")


def test_start_over_a_quantized_base(source, made):
    place = source.parent / "adapter"
    report = loftq.start(source.parent / "out", source, place, rank=4, progress=False)
    assert (place / "adapter_model.safetensors").is_file()
    assert report["error"] < report["error_before"]
    assert repr(report).startswith(f"<Report: {len(report['layers'])} layers, error {report['error']:.4f}")
    with pytest.raises(UsageError, match="did you mean 'weights'"):
        loftq.start("base", weight="x", output="y")
