"""Tables and pictures of rows that are made up."""

import math

import pytest

from loftq.finetune.comparison import arms, markdown, notes, number, overview, page, print_comparison, spread, table
from loftq.finetune.comparison_plots import plot_bytes, plot_losses


def row(method, value, seed=0, rate=0.1, failed=None, bits="16", **more):
    settings = {"method": method, "bits": bits, **({"code": "nf", "rank": "8"} if bits != "16" else {})}
    return {
        "task": "sst2",
        "model": "small",
        "arm": f"{method} {bits}",
        "settings": settings,
        "learning_rate": rate,
        "learning_rates": [0.1, 0.2],
        "seed": seed,
        "metric": "accuracy",
        "greater_is_better": True,
        "metrics": {} if value is None else {"accuracy": value},
        "before": None,
        "n": 100,
        "failed": failed,
        "losses": [[1, 2.0], [2, 1.0]],
        "bytes": {} if value is None else {"backbone": 2_000_000, "adapter": 500_000},
        "train_steps": 2,
        "seconds": 30.0,
        "version": "1",
        "commit": "abc",
        "device": "CPU",
        "torch": "2",
        **more,
    }


ROWS = [
    row("lora", 80.0),
    row("qlora", 50.0, bits="2", failed="accuracy 50 is no better than 51, what the best constant answer has"),
    row("loftq", 70.0, bits="2"),
    row("lora", 85.0, rate=0.2),
    row("qlora", None, bits="2", rate=0.2, failed="the training loss is nan"),
    row("loftq", 69.0, bits="2", rate=0.2),
    row("lora", 90.0, rate=0.2, seed=1),
    row("qlora", 60.0, bits="2", seed=1),
    row("loftq", 72.0, bits="2", seed=1),
    row("qlora", 62.0, bits="2", seed=2),
    row("loftq", None, bits="2", seed=2, failed="the training loss is inf"),
]


def test_the_table_has_medians_and_spreads():
    headings, body = table(ROWS)
    assert headings == ["method", "bits", "accuracy", "learning rate", "seeds", "backbone MB", "adapter MB"]
    assert body == [
        ["LoRA", "16", "87.5 (85.0 to 90.0)", "0.2 of 0.1, 0.2", "2", "2.0", "0.5"],
        ["QLoRA", "2", "60.0 (N.A. to 62.0)", "0.1 of 0.1, 0.2", "3", "2.0", "0.5"],
        ["LoftQ", "2", "70.0 (N.A. to 72.0)", "0.1 of 0.1, 0.2", "3", "2.0", "0.5"],
    ]


def test_every_failure_is_told():
    text = "\n".join(notes(ROWS))
    assert "N.A. (sst2, QLoRA 2-bit nf, rank 8, seed 0): accuracy 50 is no better than 51" in text
    assert "N.A. (sst2, LoftQ 2-bit nf, rank 8, seed 2): the training loss is inf" in text
    assert "2 steps for every arm; code nf, rank 8" in text


def test_an_arm_of_which_every_run_failed():
    rows = [row("lora", 80.0), row("qlora", None, bits="2", failed="the training loss is nan")]
    assert table(rows)[1][1] == ["QLoRA", "2", "N.A.", "0.1 of 0.1, 0.2", "1", "", ""]


def test_arms_whose_best_rate_is_at_an_edge_are_named():
    assert "It is the largest tried for LoRA, and the smallest tried for LoftQ 2-bit nf: a rate bey" in notes(ROWS)[0]
    assert "It is the largest tried for every arm: a rate beyond" in notes([ROWS[0], ROWS[3]])[0]
    more = [*ROWS, row("lora", 84.0, rate=0.4), row("loftq", 60.0, bits="2", rate=0.05)]
    assert "a rate beyond" not in notes(more)[0]
    assert [line[3] for line in table(more)[1]] == ["0.2 of 0.1, 0.2, 0.4", "0.1 of 0.1, 0.2", "0.1 of 0.05, 0.1, 0.2"]


def test_lower_is_better():
    lower = {"metric": "perplexity", "greater_is_better": False}
    rows = [
        row("lora", None, metrics={"perplexity": p}, rate=rate, seed=seed, failed=failed, **lower)
        for p, rate, seed, failed in ((9.0, 0.1, 0, None), (8.0, 0.2, 0, None), (7.0, 0.2, 1, "worse than a constant"))
    ]
    (arm,) = arms(rows)
    assert arm.rate == 0.2
    assert arm.values("perplexity") == [8.0, math.inf]
    assert spread(arm.values("perplexity")) == "N.A. (8.00 to N.A.)"


def test_settings_that_differ_have_columns_and_lead3_a_line():
    metrics = {"rouge2": 3.0, "rouge1": 20.0, "lead3_rouge2": 1.6, "lead3_rouge1": 16.3}
    rows = [row("loftq", None, bits="4", metrics=metrics, metric="rouge2", task="xsum") for _ in range(2)]
    rows[1] |= {"arm": "another", "settings": {**rows[1]["settings"], "rank": "16"}}
    headings, body = table(rows)
    assert headings[:5] == ["method", "bits", "rank", "rouge2", "rouge1"]
    assert body[0][:5] == ["Lead-3", "", "", "1.60", "16.3"]
    assert [line[2] for line in body[1:]] == ["8", "16"]


def test_overview_of_tasks():
    rows = [row("lora", 80.0), row("loftq", 70.0, bits="2"), row("loftq", 40.0, bits="2", task="cola")]
    assert overview(rows)[0] == ["method", "bits", "sst2 accuracy", "cola accuracy", "MB"]
    assert overview(rows)[1] == [["LoRA", "16", "80.0", "", "2.5"], ["LoftQ", "2", "70.0", "40.0", "2.5"]]
    rouge = row("lora", None, metrics={"rouge2": 3.0, "lead3_rouge2": 1.6}, metric="rouge2", task="xsum")
    assert overview([*rows, rouge])[1][0] == ["Lead-3", "", "", "", "1.60", ""]


def test_arms_that_no_column_tells_apart_stay_apart():
    rows = [row("loftq", 80.0, bits="4"), row("loftq", 60.0, bits="4", arm="another")]
    assert [line[2] for line in table(rows)[1]] == ["80.0", "60.0"]
    assert [line[2] for line in overview(rows)[1]] == ["80.0", "60.0"]


def test_a_first_run_that_was_lost_says_nothing_of_the_others():
    lost = row("lora", None, failed="the training loss is nan at step 1", n=None, train_steps=None)
    assert "n = 100; 2 steps for every arm" in notes([lost, row("qlora", 60.0, bits="2")])[0]


def test_starts_of_loftq_show_what_else_differs():
    rows = [row("qlora", 60.0, bits="2"), row("loftq", 70.0, bits="2"), row("loftq", 80.0, bits="2")]
    own = {"code": "lloyd", "preset": "descent", "calibrate": "texts.txt", "samples": 128}
    rows[2] |= {"arm": "another", "settings": {**rows[2]["settings"], **own}}
    headings, body = table(rows)
    assert headings[:3] == ["method", "bits", "code"]
    assert [line[:3] for line in body[1:]] == [["LoftQ", "2", "nf"], ["LoftQ (descent, calibrated)", "2", "lloyd"]]
    assert "; calibrated: texts texts.txt, samples 128." in notes(rows)[0]
    rows[2] |= {"settings": {**rows[2]["settings"], "code": "trellis"}}
    assert [arm.method for arm in arms(rows)] == ["QLoRA", "LoftQ", "LoftQ (descent, trellis, calibrated)"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (math.inf, "N.A."), (5.236, "5.24"), (87.34, "87.3"), (1203.4, "1203")]
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_page_and_terminal(capsys):
    text = page("A title", ROWS, {"training loss": "losses.png"})
    assert text.startswith("# A title\n\n| method | bits |")
    assert "![training loss](losses.png)" in text
    assert "loftq 1 at abc; CPU, torch 2. 11 runs" in text
    print_comparison(ROWS)
    assert "87.5 (85.0 to 90.0)" in capsys.readouterr().out
    assert markdown(["method", "x"], [["a", "1"]]) == "| method | x |\n|---|---:|\n| a | 1 |"


def test_pictures(tmp_path):
    lost = [row("full", None, failed="the training loss is nan", losses=[])]
    for plot in (plot_losses, plot_bytes):
        plot([*ROWS, *lost], tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        plot(lost, tmp_path / "b.svg")  # nothing to draw is no failure
