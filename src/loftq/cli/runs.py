"""Verbs on recipes and runs: train, evaluate, compare."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from loftq.cli.app import app
from loftq.cli.options import Json, Overrides, RecipeFile, print_json, quiet
from loftq.errors import extra, quoted
from loftq.report.bars import MatrixBar, RunBar


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the run. Default: the recipe's.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again instead of continuing.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize if the recipe's method needs it, fine-tune, and evaluate. The same command continues a stopped run."""
    with extra("train"):
        from loftq.finetune.recipe import read
        from loftq.finetune.train import finetune
        from loftq.report.tables import print_metrics
    quiet()
    asked = read(recipe, overrides or (), output)
    finished = not restart and Path(asked.output or "", "metrics.json").is_file()
    with MatrixBar() as bar:
        result = finetune(asked, resume=not restart, begin=bar.begin)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        place = quoted(asked.output, 400)
        print_metrics(f"{result.task} of {place}", result.splits, result.metrics)
        weights = "model/" if asked.method == "full" else "adapter/"
        done = "Already done by an earlier run of this command" if finished else "Saved"
        print(f"{done}: {place} has {weights}, metrics.json and logs/.")


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run of `loftq train`, a dense model, or a quantized directory.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str | None, typer.Option(help="Name of a task, or a file with your own task or a recipe. Default: the run's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Directory with files named by split. Default: the run's or the task's data.")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="Split to report on; may be repeated.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Trained adapter to load on the model.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per batch. Default: the run's, or 32.", min=1)] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Largest number of tokens of an input. Default: the run's or the task's.", min=1)
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(help="How answers are generated: greedy, or paper (GSM8K's sampling). Default: greedy."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run, a model or a quantized directory on a task."""
    from loftq import verbs
    from loftq.report.tables import print_metrics

    with extra("train"):
        quiet()
    found = verbs.evaluate(
        target,
        task=_task(task),
        data=data,
        splits=split or (),
        adapter=adapter,
        batch_size=batch_size,
        max_length=max_length,
        sampling=sampling,
    )
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        print_metrics(f"{found.task} of {quoted(target, 400)}", found.splits, found.metrics)


def _task(given: str | None) -> str | dict[str, Any] | None:
    """A task's name, or what stands in a YAML file: a task, or a recipe with one."""
    if given is None or not given.endswith((".yaml", ".yml")):
        return given
    from loftq.finetune.recipe import read_mapping

    return read_mapping(given, "kind and columns, or task")


@app.command()
def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the comparison. Default: the recipe's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune every arm of a recipe's section `compare`, and show a table. The same command continues."""
    with extra("train"):
        from loftq.finetune.compare import compare as run
        from loftq.finetune.comparison import print_comparison
        from loftq.finetune.recipe import read
    quiet()
    asked = read(recipe, overrides or (), output)
    with RunBar() as bar:
        rows = run(asked, bar.begin)
    if as_json:
        print_json(rows)
    else:
        print_comparison(rows)
        print(f"\nSaved to {quoted(asked.output, 400)}: comparison.md, losses.png, bytes.png; every run in rows.jsonl.")
