"""The verb that decides and reads no weights, or with a budget measures them: plan."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli.app import app
from loftq.cli.options import Json, Model, takes
from loftq.errors import UsageError
from loftq.options import Adapter, Dtypes, Storage, check
from loftq.report.bars import MatrixBar

if TYPE_CHECKING:
    from loftq.planning import Policy
    from loftq.sources.checkpoint import Source


@app.command()
@takes("bits", Adapter, Storage, Dtypes, "preset", "scales", "curves", "workers", "revision")
def plan(
    model: Model,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Directory made by `loftq calibrate`: a budget then goes by outputs.", show_default=False),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Save a picture of error against bytes: budget.png.")] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Show, for every tensor, how it would be quantized or why not. Reads no weights, except with --budget."""
    from loftq.planning import make_policy
    from loftq.report.budget import print_budget
    from loftq.report.tables import print_cost, print_plan
    from loftq.sources.checkpoint import open_source, plan_table
    from loftq.spec import check_statistics, statistics_kind

    asked = make_policy(given, calibrated=calibrate is not None)
    curves, workers = given["curves"] and Path(given["curves"]), given["workers"]
    check("workers", workers, "--workers")
    check_statistics(asked.solve, None if calibrate is None else statistics_kind(asked.solve))
    source, spent = open_source(model, asked, given["revision"]), {}
    if asked.budget:
        source, report = _spend(source, asked, calibrate, curves, workers, plot)
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
    with MatrixBar() as bar:
        source, report = within_budget(source, asked, curves, statistics, workers=workers, begin=bar.begin)
    if plot:
        draw(report, plot)
    return source, report
