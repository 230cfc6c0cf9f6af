"""The first run on a GPU: what fails there costs no figure but its own. The machinery, tried on a CPU."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

HARNESS = Path(__file__).parents[2] / "benchmarks" / "harness.py"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("harness_of_benchmarks", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["some.py", "--quick", "--threads", "1", "--output", str(tmp_path)])
    return lambda: module.Bench("some.py", "Is it quick?", first=0)


def test_a_side_that_fails_costs_no_other(bench: Any, tmp_path: Path) -> None:
    one, called = bench(), []

    def fail() -> None:
        raise RuntimeError("CUDA error: no kernel image\nand more")

    def measure() -> None:
        sides = one.built({"ours": lambda: lambda: called.append("ours"), "unbuilt": lambda: fail()})
        sides |= {"slow": lambda: called.append("slow"), "broken": fail}
        one.compare("a case", sides, repeats=2, slow=["slow"])

    one.part(measure, "a part")
    found = json.loads((tmp_path / "some.json").read_text())
    assert [row["side"] for row in found["cases"][0]["times"]] == ["ours", "slow"]
    assert called == ["ours", "ours", "ours", "slow"]
    assert found["notes"] == [
        "Failed: unbuilt: RuntimeError: CUDA error: no kernel image",
        "Failed: a case: broken: RuntimeError: CUDA error: no kernel image",
    ]


def test_outside_of_parts_a_failure_is_one(bench: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        bench().compare("a case", {"ours": lambda: 1 / 0})


def test_a_script_goes_on_in_a_new_process(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, commands = bench(), []
    one.part(lambda: one.record("a case", "a finding", [1.0], "x"), "a part")
    monkeypatch.setattr(os, "execv", lambda program, words: commands.append(words))
    one.go_on(first=3)
    assert commands[0][-2:] == ["--first", "3"]
    assert commands[0][-4] == "--minutes"
    other = bench()
    other.recall()
    assert other.result["cases"] == one.result["cases"]
