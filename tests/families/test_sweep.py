"""A sample of the sweep over all model types, through the code that makes docs/families.md (benchmarks/zoo)."""

import collections
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # behind everything else: some of its names are also names of tests

from zoo import page, stages  # noqa: E402

pytestmark = pytest.mark.slow

# One of each kind: two towers, pictures among words, speech with and without a decoder, pictures alone, experts beside
# dense layers, a state space, a Linear of its own, experts as bare Parameters, attention as bare Parameters, one block
# used many times, time series, fused tensors that are split on loading, names in files that no scale can have.
SAMPLE = [
    "clip", "qwen2_vl", "whisper", "wav2vec2", "vit", "deepseek_v3", "jamba", "falcon", "dbrx", "xlnet", "albert",
    "patchtst", "step3p7", "inkling_mm_model",
]  # fmt: skip
COMMON = 0.05  # of the families that work: what so many have, one of the sample has


def written():
    path = ROOT / "docs" / "data" / "families.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kinds(result):
    """What sets a family apart in the table: its inputs, what stays dense and why, whether it generates."""
    reasons = {page.brief(reason).partition(".")[2] or page.brief(reason) for reason in result.get("missed", [])}
    more = {key for key in ("unused", "asked", "generate") if result.get(key)}
    return {name for name in result["inputs"] if not name.endswith("mask")} | reasons | more


@pytest.mark.parametrize("family", SAMPLE)
def test_the_whole_way(family):
    result = stages.journey(family)
    assert result["outcome"] == stages.WORKS, result
    assert result["passed"] == [stage.__name__.removeprefix("_") for stage in stages.STAGES]
    assert not result["routers"]


def test_a_family_without_matrices_is_refused_in_one_line():
    result = stages.journey("bit")  # convolutions alone
    assert (result["outcome"], result["stage"]) == (stages.REFUSED, "quantize"), result
    assert result["why"].startswith("InputError: nothing to quantize")


def test_the_page_has_a_row_for_every_result():
    results = written()
    lines = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert len({r["family"] for r in results}) == len(results)
    assert {r["family"] for r in results} <= set(rows)


def test_nothing_is_made_that_is_wrong():
    assert [r["family"] for r in written() if r["outcome"] == stages.DEFECT] == []


def test_the_sample_has_every_common_kind():
    works = [r for r in written() if r["outcome"] == stages.WORKS]
    counts = collections.Counter(kind for r in works for kind in kinds(r))
    sampled = set().union(*(kinds(r) for r in works if r["family"] in SAMPLE))
    assert {kind for kind, n in counts.items() if n >= COMMON * len(works)} <= sampled


def test_a_result_that_is_wrong_is_on_the_page_as_a_defect():
    written = {"commit": "0000000", "versions": "torch 2"}
    wrong = {"family": "bert", "outcome": stages.DEFECT, "stage": "merge", "why": "outputs | differ", **written}
    right = {
        "family": "t5",
        "outcome": stages.WORKS,
        "class": "T5",
        "matrices": 2,
        "coverage": 1.0,
        "inputs": [],
        **written,
    }
    text = page.page({"bert": wrong, "t5": right}, 7)
    assert "**1 of 2 model types work**" in text
    assert "| bert | merge | outputs / differ |" in text
    assert "n = 2 of the 7 model types" in text
