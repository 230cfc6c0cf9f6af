"""A sample of the sweep over all model types, through the code that makes docs/families.md (benchmarks/zoo)."""

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
# used many times, time series.
SAMPLE = [
    "clip", "qwen2_vl", "whisper", "wav2vec2", "vit", "deepseek_v3", "jamba", "falcon", "dbrx", "xlnet", "albert",
    "patchtst",
]  # fmt: skip


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
    path = ROOT / "docs" / "data" / "families.jsonl"
    results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert len({r["family"] for r in results}) == len(results)
    assert {r["family"] for r in results} <= set(rows)


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
