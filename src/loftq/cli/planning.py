"""The verb that decides and reads no weights, or with a budget measures them: plan."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli.app import app
from loftq.cli.bars import Bar
from loftq.cli.options import (
    AdapterDtype,
    Alpha,
    Bits,
    BlockSize,
    Budget,
    BudgetRanks,
    BudgetSolver,
    Code,
    Curves,
    DoubleQuant,
    Dtype,
    Embeddings,
    Json,
    MinCoverage,
    Model,
    Preset,
    Rank,
    RankPolicy,
    Revision,
    RsLora,
    ScaleDtype,
    Scales,
    Workers,
    at_least,
    policy,
)
from loftq.errors import UsageError

if TYPE_CHECKING:
    from loftq.planning import Policy
    from loftq.sources.checkpoint import Source


@app.command()
def plan(
    model: Model,
    bits: Bits = "4",
    rank: Rank = "16",
    alpha: Alpha = None,
    code: Code = "auto",
    block_size: BlockSize = 64,
    scale_dtype: ScaleDtype = None,
    double_quant: DoubleQuant = False,
    rank_policy: RankPolicy = "refuse",
    rslora: RsLora = False,
    embeddings: Embeddings = False,
    dtype: Dtype = "auto",
    adapter_dtype: AdapterDtype = "bfloat16",
    min_coverage: MinCoverage = 0.5,
    preset: Preset = None,
    scales: Scales = None,
    budget: Budget = "",
    budget_ranks: BudgetRanks = "",
    budget_solver: BudgetSolver = "greedy",
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Directory made by `loftq calibrate`: a budget then goes by outputs.", show_default=False),
    ] = None,
    curves: Curves = None,
    workers: Workers = 0,
    plot: Annotated[Path | None, typer.Option(help="Save a picture of error against bytes: budget.png.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show, for every tensor, how it would be quantized or why not. Reads no weights, except with --budget."""
    given = locals()
    from loftq.report.budget import print_budget
    from loftq.report.tables import print_cost, print_plan
    from loftq.sources.checkpoint import open_source, plan_table
    from loftq.spec import check_statistics, solve_spec, statistics_kind

    asked = policy(given, solve=solve_spec(preset, calibrated=calibrate is not None, code=code, scales=scales))
    check_statistics(asked.solve, None if calibrate is None else statistics_kind(asked.solve))
    source, spent = open_source(model, asked, revision), {}
    if budget:
        source, report = _spend(source, asked, calibrate, curves, at_least("--workers", workers, 0), plot)
        spent = {"budget": report}
    elif plot or curves or calibrate:
        raise UsageError("--plot and --curves are of a budget, and so is --calibrate here; give one: --budget 2.5")
    rows, coverage = plan_table(source.plan), source.plan.coverage
    if as_json:
        print(json.dumps({"tensors": rows, "coverage": coverage, "digest": source.plan.digest(), **spent}, indent=2))
    else:
        print_plan(rows, coverage)
        print_cost([m.shape for m in source.plan.matrices], source.plan.solve)
        for report in spent.values():
            print_budget(report)


def _spend(
    source: "Source", asked: "Policy", calibrate: Path | None, curves: Path | None, workers: int, plot: Path | None
) -> tuple["Source", dict[str, Any]]:
    """The source with the plan of its budget, and the report; draws it too."""
    from loftq.calibration.calibrate import statistics_of
    from loftq.checkpoint.budget import check_budget, within_budget
    from loftq.report.budget import plot as draw
    from loftq.report.figures import check_place

    check_budget(source, asked, curves)
    if plot:
        check_place(plot)
    statistics = None if calibrate is None else statistics_of(calibrate, source.directory)
    with Bar() as bar:
        source, report = within_budget(source, asked, curves, statistics, workers=workers, begin=bar.begin)
    if plot:
        draw(report, plot)
    return source, report
