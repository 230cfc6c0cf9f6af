"""Write docs/results.md, its pictures, and tables of README and docs/quality.md, from the rows of docs/data/study."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq.finetune.compare import read_rows
from loftq.finetune.comparison import markdown, notes, overview, provenance, table
from loftq.finetune.comparison_plots import plot_bytes, plot_losses
from study import ROOT, ROWS

STUDIES = {
    "encoder": (
        "Encoder: all-MiniLM-L6-v2",
        "Real weights, 22.7M parameters. It saw natural language inference when it was trained to embed sentences, so "
        "its MNLI and ANLI figures are not those of a model that has not.",
        "",
    ),
    "decoder": (
        "Decoder: a small Llama",
        "Perplexity on WikiText, before and after fine-tuning; the widths of the paper's Table 5 and Figure 1.",
        " --model SMALL-LLAMA",
    ),
    "moe": (
        "Decoder: a small mixture of experts",
        "Perplexity on WikiText, before and after fine-tuning. The model is a Qwen3-MoE of 7.4M parameters, with 8 "
        "experts a layer of which 2 take a token, made by `examples/pretrain.py --architecture moe --steps 1200 "
        "--bf16`.",
        " --model SMALL-MOE",
    ),
    "seq2seq": (
        "Encoder and decoder: a small BART",
        "ROUGE of summaries of XSum and CNN/DailyMail, against the first three sentences of the text (Lead-3). The "
        "model of the small study is made by `examples/pretrain.py --architecture bart --bf16 --batch 4 --steps 6000 "
        "--learning-rate 7e-4` from the beginning of WikiText-103, the articles that it is fitted on, and SQuAD's "
        "paragraphs: 6.7M parameters, a loss of 1.66 nats per token on text held out.",
        " --model SMALL-BART",
    ),
}


ABOUT = """How good is a model after fine-tuning, by method and by bits? All figures are of small models on CPUs.

{glance}

Backbones there have 2 bits. wikitext2: the Llama, lower is better. The others: the encoder, higher is better.
[Experiments](experiments.md#fine-tuning) says what follows from the figures, and what does not. How to read the tables:

| column | meaning |
|---|---|
| method | Full FT: full fine-tuning. LoftQ: the paper's; in brackets: another of its [methods](methods.md) |
| bits, code, scales, T | how the backbone is quantized ([options](usage.md#codes)); scales take 0.25 bits more |
| a metric | the median of the seeds (smallest to largest); shares and correlations are in percent |
| N.A. | not converged, by [a rule](comparing.md#runs-that-do-not-converge) |
| learning rate | the best one of those tried |
| MB | on disk |

Made by `python benchmarks/study_report.py` from the rows in `docs/data/study`, one for every run; do not edit."""


def command(study: str, size: str) -> str:
    model = STUDIES[study][2]
    return f"`python benchmarks/study_{study}.py --data DIR{model}{'' if size == 'small' else ' --size full'}`"


def section(study: str, size: str, images: Path) -> Iterator[str]:
    """A study in one size: how it was made, what is missing, all tasks in one table, each task in full."""
    title, told, _ = STUDIES[study]
    rows = read_rows(ROWS / f"{study}-{size}.jsonl")
    yield f"## {title}, {size}"
    yield told
    planned = max(row["runs_planned"] for row in rows)  # each says how many were known when it came: grids grow
    state = "all" if len(rows) == planned else f"**{len(rows)} of {planned} runs; the others are not yet run**"
    yield f"{command(study, size)}: {state}. {provenance(rows)}"
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    if len(tasks) > 1:
        yield markdown(*overview(rows))
    for task, mine in tasks.items():
        yield f"### {task}"
        yield markdown(*table(mine))
        told, *failed = notes(mine)
        yield told
        if failed:
            yield "\n".join(["<details><summary>Runs that did not converge</summary>", "", *failed, "", "</details>"])
        yield from pictures(f"{study}-{size}-{task}", mine, images)


def pictures(name: str, rows: list[dict[str, Any]], images: Path) -> Iterator[str]:
    plot_losses(rows, images / f"{name}-losses.png")
    plot_bytes(rows, images / f"{name}-bytes.png")
    task = rows[0]["task"]
    yield f"![Training loss, {task}](images/study/{name}-losses.png)"
    yield f"![{rows[0]['metric']} against bytes, {task}](images/study/{name}-bytes.png)"


def glance() -> str:
    """Every method at 2 bits with NormalFloat, fitted scales or a trellis, and LoRA on dense weights, by task."""
    return by_task(1, {("2", "nf"), ("2", "lloyd"), ("2.1875", "trellis")})


def widths() -> str:
    """The trellis at every width, beside other codes at 2 bits and LoRA on dense weights, by task."""
    return by_task(2, {("2", "nf"), ("2", "lloyd"), *((bits, "trellis") for bits in ("1.4375", "1.9375", "2.1875"))})


def by_task(labels: int, chosen: set[tuple[str, str]]) -> str:
    """A table with a column for each task, of what has the ``chosen`` bits and codes, and of LoRA at the end.

    Args:
        labels: how many columns before: the method, and the bits.
    """
    rows = [row for study in ("decoder", "encoder") for row in read_rows(ROWS / f"{study}-small.jsonl")]
    mine = [row for row in rows if _is_chosen(row["settings"], chosen)]
    if not mine:
        return ""
    headings, body = overview(sorted(mine, key=lambda row: float(row["settings"]["bits"])))
    tasks = headings[-1 - len({row["task"] for row in mine}) : -1]
    lines: dict[tuple[str, ...], list[str]] = {}  # the studies' models differ, so a method has a line in each
    for line in body:
        name = "LoRA on dense weights" if line[0] == "LoRA" else line[0]
        label = (name, *line[1:labels])
        cells = line[len(headings) - 1 - len(tasks) : -1]
        before = lines.setdefault(label, [""] * len(tasks))
        lines[label] = [cell or other for cell, other in zip(cells, before, strict=True)]
    return markdown([*headings[:labels], *tasks], [[*label, *cells] for label, cells in lines.items()])


def _is_chosen(settings: dict[str, Any], chosen: set[tuple[str, str]]) -> bool:
    return settings["method"] == "lora" or (settings["bits"], settings.get("code")) in chosen


def update(file: Path, text: str) -> None:
    """Put ``text`` between the markers of training of a file."""
    before, begin, rest = file.read_text(encoding="utf-8").partition("<!-- training: begin -->\n")
    _, end, after = rest.partition("<!-- training: end -->")
    if not end:
        raise SystemExit(f"{file} has no markers of training")
    file.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    given = parser.parse_args()
    images = given.output.parent / "images" / "study"
    images.mkdir(parents=True, exist_ok=True)
    parts, missing = ["# Results of fine-tuning", ABOUT.format(glance=glance())], []
    for study in STUDIES:
        for size in ("small", "full"):
            if read_rows(ROWS / f"{study}-{size}.jsonl"):
                parts += section(study, size, images)
            else:
                missing.append(f"* {STUDIES[study][0]}, {size}: {command(study, size)}")
    if missing:
        parts += ["## Not yet run", "\n".join(missing)]
    given.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if given.output.parent == ROOT / "docs":
        update(ROOT / "README.md", glance())
        update(ROOT / "docs" / "quality.md", widths())
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
