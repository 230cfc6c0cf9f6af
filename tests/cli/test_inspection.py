"""The table of ``loftq inspect``: at any width, bits, rank and the error with and without the start, never cut."""

import io

import pytest
from rich.console import Console

from loftq.report import tables
from loftq.spelled import spell_error, spell_size, spell_time

TOTALS = {
    "matrices": 2,
    "quantized_weights": 6_476_005_376,
    "parameters": 6_738_415_616,
    "bits_per_weight": 2.25,
    "disk_bytes": 2.5e9,
    "adapter_bytes": 3.2e8,
    "compression": 5.3,
    "trainable_share": 0.024,
    "qlora_error": 0.5662,
    "error": 0.4501,
}


def matrix(name: str, **more: object) -> dict:
    errors = [0.5662, 0.5111, 0.4822, 0.4733, 0.4644, 0.4501]
    return {
        "name": name, "shape": [4096, 11008], "bits": 2, "rank": 64, "alpha": 16.0, "bytes": 12_682_240,
        "errors": errors, "kept": 5, "qlora_error": 0.5662, **more,
    }  # fmt: skip


def shown(monkeypatch: pytest.MonkeyPatch, width: int, **more: object) -> str:
    out = io.StringIO()
    monkeypatch.setattr(tables, "console", lambda: Console(file=out, width=width, highlight=False, markup=False))
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.31.mlp.down_proj.weight")
    tables.print_inspection({"matrices": [matrix(n, **more) for n in names], "totals": TOTALS, "warnings": []})
    return out.getvalue()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("width", [60, 80, 120, 10_000])
def test_no_number_is_cut(monkeypatch, width, calibrated):
    more = {"output_errors": [0.7123, 0.3, 0.29, 0.28, 0.27, 0.2626], "output_norm": 1.0} if calibrated else {}
    text = shown(monkeypatch, width, **more)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for row in [line for line in text.splitlines() if line.startswith("model.")]:
        assert {"2", "64", "0.5662", "0.4501"} <= set(row.split())
    words = " ".join(text.split())
    for number in ("6,476,005,376", "6,738,415,616", "2.50 GB", "320.0 MB", "5.30x", "2.40%", "0.5662", "20.5%"):
        assert number in words
    assert ("12,682,240" in words) == (width > 100)
    if width > 200:
        assert "0.5111" in words or calibrated
        assert "Left out" not in words


def test_small_figures_are_not_rounded_away():
    assert [spell_error(e) for e in (0.16204, 0.00163, 0.000031, 0)] == ["0.1620", "0.0016", "3.1e-05", "0.0000"]
    assert [spell_time(s) for s in (0.00123, 0.4, 90, 150, 9000)] == [
        *("0.001 seconds", "0.4 seconds", "90.0 seconds", "2.5 minutes", "2.5 hours")
    ]
    sizes = [spell_size(size) for size in (12, 34_560, 2_500_000, 13_476_831_232)]
    assert sizes == ["12 bytes", "34.6 KB", "2.5 MB", "13.48 GB"]


def test_at_80_columns_names_are_whole(monkeypatch):
    text = shown(monkeypatch, 80)
    assert "model.layers.0.self_attn.q_proj.weight" in text
    assert "Left out, because the terminal is narrow: error per step" in text


def test_a_pipe_is_as_wide_as_it_needs():
    assert tables.console().width == tables.WIDE


def test_a_narrow_plan_has_every_rank_and_size(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(tables, "console", lambda: Console(file=out, width=60, highlight=False, markup=False))
    row = {"name": "model.layers.31.mlp.down_proj.weight", "action": "quantize", "shape": [4096, 11008]}
    tables.print_plan([{**row, "bits": 2, "code": "lloyd", "block_size": 64, "rank": 48, "bytes": 12_682_240}], 1.0)
    text = out.getvalue()
    assert "…" not in text
    assert {"rank", "bytes", "4096x11008", "48", "12,682,240"} <= set(text.split())


def test_a_plan_has_a_line_for_the_same_tensor_of_all_layers(monkeypatch):
    """With the numbers as ``--bits`` takes them; what only some layers have is told of these alone."""
    out = io.StringIO()
    monkeypatch.setattr(tables, "console", lambda: Console(file=out, width=200, highlight=False, markup=False))
    common = {"action": "quantize", "shape": [64, 96], "code": "nf", "block_size": 64, "rank": 4, "bytes": 1000}
    rows = [{**common, "name": f"layers.{i}.q_proj.weight", "bits": 4 if i < 2 else 2} for i in range(12)]
    rows += [{**common, "name": f"layers.{i}.experts.{e}.up", "bits": 2} for i in (0, 2) for e in range(3)]
    rows += [{**common, "name": f"blocks.{i}.{j}.up", "bits": 2} for i, j in ((0, 0), (0, 1), (1, 0))]
    rows += [{**common, "name": "old.01.up", "bits": 2}]
    rows += [
        {"name": f"norms.{i}", "action": "keep", "shape": [64], "bytes": 128, "reason": "a vector"} for i in (0, 1)
    ]
    tables.print_plan(rows, 1.0)
    table = out.getvalue().partition("\n\n")[0].splitlines()[1:]
    assert [(line.split()[0], line.split()[1], line.split()[-1]) for line in table] == [
        ("layers.0-1.q_proj.weight", "2", "2,000"),
        ("layers.2-11.q_proj.weight", "10", "10,000"),
        ("layers.0,2.experts.0-2.up", "6", "6,000"),
        ("blocks.0.0.up", "1", "1,000"),
        ("blocks.0.1.up", "1", "1,000"),
        ("blocks.1.0.up", "1", "1,000"),
        ("old.01.up", "1", "1,000"),
        ("vectors", "2", "256"),
    ]
