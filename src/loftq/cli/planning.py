"""The verb that decides and reads no weights, or with a budget measures them: plan."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loftq.cli.app import app
from loftq.cli.options import Json, ModelOrUrl, print_json, takes
from loftq.errors import UsageError
from loftq.options import Dtypes, Ranks, Storage


@app.command()
@takes("bits", Ranks, Storage, Dtypes, "preset", "scales", "curves", "workers", "revision")
def plan(
    model: ModelOrUrl,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="With --budget: a directory of `loftq calibrate`; errors are then those of the outputs.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="With --budget: save a plot of error against bytes.")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate CPU time, memory and disk, and the memory of training.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="With --estimate: tokens of a training batch.", min=1)] = 2048,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Show how every tensor would be quantized, or why not. Reads no weights, except with --budget."""
    from loftq import verbs
    from loftq.report.budget import plot as draw
    from loftq.report.budget import print_budget
    from loftq.report.estimate import print_estimate
    from loftq.report.figures import check_place
    from loftq.report.tables import print_cost, print_plan
    from loftq.sources.checkpoint import plan_table

    if not given["budget"] and (plot or given["curves"] or calibrate):
        raise UsageError("--plot and --curves need a budget, and here --calibrate does too; give one: --budget 2.5")
    if plot:
        check_place(plot)
    planned = verbs.plan(model, calibration=calibrate, estimate=estimate, tokens=tokens, **given)
    rows, coverage, spent = plan_table(planned), planned.coverage, planned.budget
    if plot and spent:
        draw(spent, plot)
    if as_json:
        more = {name: told for name, told in (("budget", spent), ("estimate", planned.estimate)) if told}
        print_json({"tensors": rows, "coverage": coverage, "digest": planned.digest(), **more})
        return
    print_plan(rows, coverage)
    if planned.estimate:
        print_estimate(planned.estimate)
    else:
        print_cost([(m.shape, m.quant) for m in planned.matrices for _ in range(m.count)], planned.solve)
    if spent:
        print_budget(spent)
