"""The recipe of an example comparison runs on rows like SST-2's."""

import json
from pathlib import Path

import pytest
from rows import ROWS

from loftq.finetune.compare import compare
from loftq.finetune.recipe import read

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "recipes" / "examples" / "compare-sst2.yaml"


def test_compare_sst2(source, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["sst2"][0]))
    given = (f"model={source('bert')}", f"data.directory={tmp_path}", "training.max_steps=1", "lora.rank=4")
    recipe = read(EXAMPLE, [*given, f"output={tmp_path / 'out'}"])
    assert [row["settings"]["method"] for row in compare(recipe)] == ["lora", "qlora", "loftq", "loftq"]
