"""Verbs on checkpoints: plan, quantize, inspect, verify."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli.app import app
from loftq.cli.bars import Bar
from loftq.cli.options import (
    Alpha,
    Bits,
    BlockSize,
    Budget,
    BudgetRanks,
    BudgetSolver,
    Code,
    Curves,
    Directory,
    DoubleQuant,
    Embeddings,
    Json,
    Method,
    MinCoverage,
    Model,
    Rank,
    RankPolicy,
    Revision,
    RsLora,
    ScaleDtype,
    Scales,
    Workers,
    at_least,
    check_device,
    choice,
    policy,
)
from loftq.errors import UsageError, quoted

if TYPE_CHECKING:
    from loftq.plan import Policy
    from loftq.workflows.source import Source

METHODS = ("loftq", "svd", "qlora")


@app.command()
def plan(
    model: Model,
    bits: Bits = "4",
    rank: Rank = "16",
    alpha: Alpha = None,
    code: Code = "nf",
    block_size: BlockSize = 64,
    scale_dtype: ScaleDtype = None,
    double_quant: DoubleQuant = False,
    rank_policy: RankPolicy = "refuse",
    rslora: RsLora = False,
    embeddings: Embeddings = False,
    min_coverage: MinCoverage = 0.5,
    method: Method = "loftq",
    scales: Scales = "formula",
    budget: Budget = "",
    budget_ranks: BudgetRanks = "",
    budget_solver: BudgetSolver = "greedy",
    curves: Curves = None,
    workers: Workers = 0,
    plot: Annotated[Path | None, typer.Option(help="Save a picture of error against bytes: budget.png.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show, for every tensor, how it would be quantized or why not. Reads no weights, except with --budget."""
    from loftq.report.budget import print_budget
    from loftq.report.tables import print_plan
    from loftq.spec import SolveSpec
    from loftq.workflows.source import open_source, plan_table

    choice("--method", method, METHODS)
    asked = policy(
        bits=bits,
        rank=rank,
        alpha=alpha,
        code=code,
        block_size=block_size,
        scale_dtype=scale_dtype or "bfloat16",
        double_quant=double_quant,
        rank_policy=rank_policy,
        rslora=rslora,
        embeddings=embeddings,
        min_coverage=min_coverage,
        budget=budget,
        budget_ranks=budget_ranks,
        budget_solver=budget_solver,
        solve=SolveSpec(steps=_steps(method, SolveSpec.steps), scales=scales),
    )
    source, spent = open_source(model, asked, revision), {}
    if budget:
        source, report = _spend(source, asked, curves, at_least("--workers", workers, 0), plot)
        spent = {"budget": report}
    elif plot or curves:
        raise UsageError("--plot and --curves are of a budget; give one: --budget 2.5")
    rows, coverage = plan_table(source.plan), source.plan.coverage
    if as_json:
        print(json.dumps({"tensors": rows, "coverage": coverage, "digest": source.plan.digest(), **spent}, indent=2))
    else:
        print_plan(rows, coverage)
        for report in spent.values():
            print_budget(report)


def _spend(
    source: "Source", asked: "Policy", curves: Path | None, workers: int, plot: Path | None
) -> tuple["Source", dict[str, Any]]:
    """The source with the plan of its budget, and the report; draws it too."""
    from loftq.report.budget import plot as draw
    from loftq.report.figures import check_place
    from loftq.workflows.budget import check_budget, within_budget

    check_budget(source, asked, "loftq", curves)
    if plot:
        check_place(plot)
    with Bar() as bar:
        source, report = within_budget(source, asked, curves, workers=workers, begin=bar.begin)
    if plot:
        draw(report, plot)
    return source, report


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.", show_default=False)],
    bits: Bits = "4",
    rank: Rank = "16",
    alpha: Alpha = None,
    code: Code = "nf",
    block_size: BlockSize = 64,
    scale_dtype: ScaleDtype = None,
    double_quant: DoubleQuant = False,
    steps: Annotated[int, typer.Option(help="Alternations T; the best step is kept.")] = 5,
    method: Method = "loftq",
    order: Annotated[str, typer.Option(help="quantize-first, or svd-first (the paper's ablation).")] = "quantize-first",
    svd: Annotated[str, typer.Option(help="auto, exact or randomized.")] = "auto",
    scales: Scales = "formula",
    format: Annotated[
        str, typer.Option(help="loftq (packed), bnb (bitsandbytes NF4), or dense (dequantized).")
    ] = "loftq",
    rank_policy: RankPolicy = "refuse",
    rslora: RsLora = False,
    embeddings: Embeddings = False,
    min_coverage: MinCoverage = 0.5,
    budget: Budget = "",
    budget_ranks: BudgetRanks = "",
    budget_solver: BudgetSolver = "greedy",
    curves: Curves = None,
    workers: Workers = 0,
    device: Annotated[str, typer.Option(help="Where to solve: cpu, cuda, cuda:1, …")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seeds random starts, together with each tensor's name.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the backbone: 500MB, 2GB.")] = "1GB",
    task_type: Annotated[str | None, typer.Option(help="PEFT task type to write into the adapter.")] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of loftq.")] = False,
) -> None:
    """Make a LoftQ checkpoint: packed backbone, LoRA start, manifest, model card. Continues where it was stopped."""
    from loftq.formats.layouts import LAYOUTS
    from loftq.plan import parse_size
    from loftq.report.tables import print_summary
    from loftq.spec import SolveSpec
    from loftq.workflows.quantize import QuantizeOptions
    from loftq.workflows.quantize import quantize as run

    choice("--method", method, METHODS)
    choice("--format", format, tuple(LAYOUTS))
    check_device(device)
    solver = SolveSpec(steps=_steps(method, steps), order=order, svd=svd, seed=seed, scales=scales)
    asked = policy(
        bits=bits,
        rank=rank,
        alpha=alpha,
        code=code,
        block_size=block_size,
        scale_dtype=scale_dtype or ("float32" if format == "bnb" else "bfloat16"),
        double_quant=double_quant,
        rank_policy=rank_policy,
        rslora=rslora,
        embeddings=embeddings,
        min_coverage=min_coverage,
        budget=budget,
        budget_ranks=budget_ranks,
        budget_solver=budget_solver,
        solve=solver,
    )
    options = QuantizeOptions(
        policy=asked,
        format=format,
        workers=at_least("--workers", workers, 0),
        device=device,
        max_shard_bytes=parse_size("--max-shard-size", max_shard_size),
        overwrite=overwrite,
        revision=revision,
        task_type=task_type,
        curves=curves,
    )
    with Bar() as bar:
        manifest = run(model, output, options, bar.begin)
    print_summary(output, manifest, bar.began)


def _steps(method: str, steps: int) -> int:
    return {"svd": 1, "qlora": 0}.get(method, steps)


@app.command()
def inspect(
    directory: Directory,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Save a picture of the errors: errors.png.")] = None,
) -> None:
    """Show, per matrix, bits, rank, bytes, error per step and the step kept; and what the whole costs."""
    from loftq.report.inspect import inspection
    from loftq.report.inspect import plot as draw
    from loftq.report.tables import print_inspection
    from loftq.workflows.check import read_manifest

    inspected = inspection(read_manifest(directory))
    if plot:
        draw(inspected, plot)
    if as_json:
        print(json.dumps(inspected, indent=2))
    else:
        print_inspection(inspected)


@app.command()
def verify(directory: Directory) -> None:
    """Check hashes, shapes and finiteness of every file, without loading the model."""
    from loftq.workflows.check import verify as run

    manifest = run(directory)
    size = sum(f["size"] for f in manifest["files"].values()) / 1e6
    counts = f"{len(manifest['files'])} files, {size:.1f} MB, {len(manifest['matrices'])} matrices"
    print(f"{quoted(directory, 400)}: {counts}: all good")
